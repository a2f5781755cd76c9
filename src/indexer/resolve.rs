//! From equal hashes to equal bytes: proves for the blocks of an image that they can be read where their fingerprints say.
//!
//! Nearly always the one candidate that the hash suggests is equal, and the comparison runs in large pieces. A block
//! that differs from its candidate shares the hash and not the bytes: it is compared with the other contents of this
//! hash, and becomes a content of its own (another *variant*) if it equals none.

use super::Work;
use super::arrange::{Gap, bridge, gaps, keep_short_runs, pairs_of};
use super::candidates::blocks_of;
use super::choose::Choose;
use super::compare::{Pair, Side, Sides, differing, equal};
use super::contents::{Content, Contents};
use super::images::Images;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::{BLOCK_BYTES, Hash, hash_block};
use crate::library::{Policy, Runs};
use crate::units::BLOCK_SIZE;
use std::collections::{BTreeMap, BTreeSet};

/// What a proof needs.
#[derive(Clone, Copy)]
pub(super) struct Proof<'a> {
    pub sides: Sides<'a>,
    pub images: &'a Images,
    pub contents: &'a Contents,
    pub choose: &'a Choose,
    /// The image's contents were told apart when it was added, so that a block which differs from its candidate is an
    /// error.
    pub is_settled: bool,
    /// Pairs that need no comparison: they were compared before.
    pub is_proved: &'a (dyn Fn(&Pair) -> bool + Sync),
    pub work: &'a Work<'a>,
}

/// A block that turned out to have another content of its hash than its candidate: its variants by block.
pub(super) type Corrections = BTreeMap<u32, (Hash, u16)>;

/// Compares every block with its candidate, and finds another for those that differ. `pairs` are ascending by source
/// block.
pub(super) fn prove(pairs: &mut [Pair], proof: &Proof<'_>, corrections: &mut Corrections) -> Result<()> {
    let Proof { sides, work, .. } = *proof;
    // A block that is its own candidate needs no comparison.
    let is_own = |p: &Pair| (p.image, p.block) == (sides.own_id(), p.source);
    let open: Vec<usize> =
        pairs.iter().enumerate().filter(|(_, p)| !is_own(p) && !(proof.is_proved)(p)).map(|(i, _)| i).collect();
    let to_compare: Vec<Pair> = open.iter().filter_map(|&i| pairs.get(i).copied()).collect();
    work.observer.begin(&format!("comparing {}", sides.own.record.name), to_compare.len() as u64 * BLOCK_SIZE);
    let differing = differing(&sides, &to_compare, work)?;
    work.observer.end();
    drop(to_compare);
    let odd: Vec<usize> = differing.into_iter().filter_map(|d| open.get(d).copied()).collect();
    if odd.is_empty() { Ok(()) } else { settle(&odd, pairs, proof, corrections) }
}

/// Settles the blocks whose candidate turned out to be another content. `odd` is in order of block, so that the lowest
/// block of a new content becomes its canonical copy.
fn settle(odd: &[usize], pairs: &mut [Pair], proof: &Proof<'_>, corrections: &mut Corrections) -> Result<()> {
    let sides = &proof.sides;
    let hash_of = |&i: &usize| check_collision(pairs[i], proof).map(|hash| (i, hash));
    let odd: Vec<(usize, Hash)> = odd.iter().map(hash_of).collect::<Result<_>>()?;
    if let (true, Some((i, _))) = (proof.is_settled, odd.first()) {
        let (own, pair) = (&sides.own, pairs[*i]);
        let cause =
            format!("block {} of image {} is not the content that its fingerprint says", pair.source, own.record.name);
        return Err(
            Error::file(ErrorKind::Corrupt, &own.path, cause).mend("make everything anew: 'vmar library rebuild'")
        );
    }
    let hashes: Vec<Hash> = odd.iter().map(|(_, hash)| *hash).collect::<BTreeSet<_>>().into_iter().collect();
    let found = proof.contents.lookup(&hashes)?;
    let mut new: BTreeMap<Hash, Vec<Known>> = BTreeMap::new();
    for (i, hash) in odd {
        let key = hashes.binary_search(&hash).unwrap_or_default();
        let (tried, others) = match found.of(key) {
            [first, others @ ..] => (first.variant, others),
            [] => (0, &[][..]),
        };
        let mut known: Vec<Known> = others.iter().map(|c| known_of(proof, hash, *c)).collect::<Result<_>>()?;
        let found_here = new.entry(hash).or_default();
        known.extend(found_here.iter().copied());
        let chosen = match equal_content(pairs[i].source, &known, sides)? {
            Some(known) => known,
            None => {
                let taken: BTreeSet<u16> = known.iter().map(|k| k.variant).chain([tried]).collect();
                let free = (0..=u16::MAX).find(|v| !taken.contains(v));
                let variant = free.ok_or_else(|| {
                    Error::file(ErrorKind::Unsupported, &sides.own.path, "has too many blocks of one fingerprint")
                })?;
                let known = Known { variant, image: sides.own_id(), block: pairs[i].source };
                found_here.push(known);
                known
            }
        };
        (pairs[i].image, pairs[i].block) = (chosen.image, chosen.block);
        corrections.insert(pairs[i].source, (hash, chosen.variant));
    }
    Ok(())
}

/// A content and where it is read.
#[derive(Clone, Copy)]
struct Known {
    variant: u16,
    image: u32,
    block: u32,
}

fn known_of(proof: &Proof<'_>, hash: Hash, content: Content) -> Result<Known> {
    let image = proof.choose.one(proof.contents.sets().images(content.set));
    let block = blocks_of(proof.images, image, &[(hash, content.variant)])?;
    Ok(Known { variant: content.variant, image, block: block.first().copied().unwrap_or_default() })
}

/// The first of the contents that has the bytes of the block.
fn equal_content(block: u32, contents: &[Known], sides: &Sides) -> Result<Option<Known>> {
    for known in contents {
        if equal(sides.own, block, sides.get(known.image)?, known.block)? {
            return Ok(Some(*known));
        }
    }
    Ok(None)
}

/// Two blocks that differ must be a collision of the hash, which is returned. If they have different ones, an image changed.
fn check_collision(pair: Pair, proof: &Proof<'_>) -> Result<Hash> {
    let hash = |side: &Side, block| -> Result<Hash> {
        let mut buf = [0u8; BLOCK_BYTES];
        Ok(hash_block(side.record.fingerprint, side.read(block, 1, &mut buf)?))
    };
    let (own, target) = (proof.sides.own, proof.sides.get(pair.image)?);
    let (hash_here, hash_there) = (hash(own, pair.source)?, hash(target, pair.block)?);
    if hash_here == hash_there {
        return Ok(hash_here);
    }
    // One of them is not what was fingerprinted. An image that is being added was read a moment ago.
    let is_held = |c: &Content| proof.contents.sets().images(c.set).contains(&own.record.id.0);
    let is_own_good = !proof.is_settled || proof.contents.lookup(&[hash_here])?.of(0).iter().any(is_held);
    let (side, block) = if is_own_good { (target, pair.block) } else { (own, pair.source) };
    let name = &side.record.name;
    let cause = format!("block {block} of image {name} is not what was fingerprinted");
    Err(Error::file(ErrorKind::Changed, &side.path, cause)
        .mend(format!("put the original back ('vmar image verify {name}' checks all of it)")))
}

/// A partial last block is its own target, whoever else holds its content.
pub(super) fn keep_partial_block(pairs: &mut [Pair], sides: &Sides) {
    if let Some(last) = pairs.last_mut()
        && sides.own.record.block_len(last.source) < BLOCK_SIZE
    {
        (last.image, last.block) = (sides.own_id(), last.source);
    }
}

/// The policy's say on where runs begin and end. What the policy `bridge` reads elsewhere than the canonical address says
/// is compared like every redirect.
pub(super) fn arrange(places: &mut [Pair], policy: Policy, proof: &Proof<'_>) -> Result<()> {
    let Some(Runs { bridge: limit, min_run }) = policy.runs() else { return Ok(()) };
    let Proof { sides, work, .. } = *proof;
    let found = gaps(places, sides.own_id(), limit);
    let pairs: Vec<Pair> = pairs_of(&found, places).collect();
    let open: Vec<usize> = pairs.iter().enumerate().filter(|(_, p)| !(proof.is_proved)(p)).map(|(i, _)| i).collect();
    let to_compare: Vec<Pair> = open.iter().filter_map(|&i| pairs.get(i).copied()).collect();
    work.observer.begin(&format!("bridging {}", sides.own.record.name), to_compare.len() as u64 * BLOCK_SIZE);
    let differing = differing(&sides, &to_compare, work)?;
    work.observer.end();
    let mut differing = differing.into_iter().filter_map(|d| open.get(d).copied()).peekable();
    let mut first = 0;
    let same = |gap: &Gap| {
        let end = first + gap.gap.len();
        first = end;
        let mut all_equal = true;
        while differing.next_if(|&i| i < end).is_some() {
            all_equal = false;
        }
        all_equal
    };
    let proved: Vec<Gap> = found.into_iter().filter(same).collect();
    bridge(places, &proved);
    keep_short_runs(places, sides.own_id(), min_run);
    Ok(())
}
