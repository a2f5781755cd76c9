//! From equal hashes to equal bytes: decides for each block of a new image where it is read from, and proves it.
//!
//! Nearly always the one candidate that the hash suggests is equal, and the comparison runs in large pieces. A block
//! that differs from its candidate shares the hash and not the bytes: it is compared with the other contents of this
//! hash, and becomes a content of its own (another *variant*) if it equals none.

use super::Work;
use super::arrange::{Gap, bridge, gaps, keep_short_runs, pairs_of};
use super::compare::{Pair, Sides, differing, equal};
use super::join::{Groups, Known};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::{BLOCK_BYTES, Row, hash_block, scan};
use crate::library::Policy;
use crate::map::{Entry, EntryBuilder};
use crate::units::BLOCK_SIZE;
use std::collections::{BTreeSet, HashMap};

/// Where each block of an image is read from.
#[derive(Debug)]
pub(super) struct Resolved {
    /// The fingerprints with their variants, sorted.
    pub rows: Vec<Row>,
    /// Images that are read from, ascending, as indices into the sides.
    pub images: Vec<u32>,
    /// The map's entries; their targets are indices into `images`.
    pub entries: Vec<Entry>,
}

/// What is decided about one row.
#[derive(Clone, Copy)]
struct Choice {
    variant: u32,
    image: u32,
    block: u32,
}

/// Compares every block with its candidate and settles what differs; then the policy has its say.
///
/// `groups` are those of `rows`, joined with the earlier ones of `sides`.
pub(super) fn resolve(
    mut rows: Vec<Row>,
    groups: &Groups,
    sides: &Sides,
    policy: Policy,
    work: &Work,
) -> Result<Resolved> {
    let mut choices = candidates(&rows, groups, sides.own_index());
    let order = by_block(&rows);
    let pair = |&i: &u32| {
        let (row, choice) = (rows[i as usize], choices[i as usize]);
        Pair { source: row.block, image: choice.image, block: choice.block }
    };
    // A block that is its own candidate needs no comparison.
    let is_redirect = |i: &u32| {
        let pair = pair(i);
        (pair.image, pair.block) != (sides.own_index(), pair.source)
    };
    let redirects: Vec<u32> = order.iter().copied().filter(is_redirect).collect();
    let pairs: Vec<Pair> = redirects.iter().map(pair).collect();
    work.observer.begin(&format!("comparing {}", sides.own().record.name), pairs.len() as u64 * BLOCK_SIZE);
    let differing = differing(sides, &pairs, work)?;
    work.observer.end();
    drop(pairs);

    let odd: Vec<u32> = differing.into_iter().map(|d| redirects[d]).collect();
    drop(redirects);
    settle(&odd, &rows, &mut choices, groups, sides)?;
    let mut places = places(&rows, &choices, &order, sides);
    if let Policy::Bridge { bridge, min_run } = policy {
        arrange(&mut places, bridge, min_run, sides, work)?;
    }
    let (images, entries) = entries(&places, sides);
    for (row, choice) in rows.iter_mut().zip(&choices) {
        row.variant = choice.variant;
    }
    if choices.iter().any(|c| c.variant != 0) {
        scan::sort(&mut rows, work.threads);
    }
    Ok(Resolved { rows, images, entries })
}

/// Indices of the rows in order of their blocks.
fn by_block(rows: &[Row]) -> Vec<u32> {
    let mut order: Vec<u32> = (0u32..).zip(rows).map(|(i, _)| i).collect();
    order.sort_unstable_by_key(|&i| rows[i as usize].block);
    order
}

/// For each row the candidate that its hash suggests: the first known content, else the lowest own block.
fn candidates(rows: &[Row], groups: &Groups, own: u32) -> Vec<Choice> {
    let mut out = Vec::with_capacity(rows.len());
    for group in 0..groups.len() {
        let (start, end) = (groups.start(group) as usize, (groups.start(group + 1) as usize).min(rows.len()));
        let choice = match groups.first(group) {
            Some(known) => Choice { variant: known.variant, image: known.image, block: known.block },
            None => Choice { variant: 0, image: own, block: rows[start].block },
        };
        out.resize(end, choice);
    }
    out
}

/// Settles the rows whose candidate turned out to be another content. `odd` is in order of block, so that the lowest
/// block of a new content becomes its canonical copy.
fn settle(odd: &[u32], rows: &[Row], choices: &mut [Choice], groups: &Groups, sides: &Sides) -> Result<()> {
    let mut new: HashMap<usize, Vec<Known>> = HashMap::new();
    for &i in odd {
        let (row, tried) = (rows[i as usize], choices[i as usize]);
        check_collision(row, tried, sides)?;
        let group = groups.of_row(i);
        let found = new.entry(group).or_default();
        let known = match equal_content(row, groups.more(group).iter().chain(found.iter()), sides)? {
            Some(known) => known,
            None => {
                let taken: BTreeSet<u32> =
                    groups.more(group).iter().chain(found.iter()).map(|k| k.variant).chain([tried.variant]).collect();
                let variant = (0..).find(|v| !taken.contains(v)).unwrap_or(u32::MAX);
                let known = Known { variant, image: sides.own_index(), block: row.block };
                found.push(known);
                known
            }
        };
        choices[i as usize] = Choice { variant: known.variant, image: known.image, block: known.block };
    }
    Ok(())
}

/// The first of the contents that has the bytes of the row's block.
fn equal_content<'k>(row: Row, contents: impl Iterator<Item = &'k Known>, sides: &Sides) -> Result<Option<Known>> {
    for known in contents {
        if equal(sides.own(), row.block, sides.get(known.image)?, known.block)? {
            return Ok(Some(*known));
        }
    }
    Ok(None)
}

/// Two blocks that differ must be a collision of the hash. If one of them no longer has its hash, its image changed.
fn check_collision(row: Row, tried: Choice, sides: &Sides) -> Result<()> {
    for (side, block) in [(sides.own(), row.block), (sides.get(tried.image)?, tried.block)] {
        let mut buf = [0u8; BLOCK_BYTES];
        let bytes = side.read(block, 1, &mut buf)?;
        if hash_block(side.record.fingerprint, bytes) != row.hash {
            let name = &side.record.name;
            let cause = format!("block {block} of image {name} is not what was fingerprinted");
            return Err(Error::file(ErrorKind::Changed, &side.path, cause)
                .mend(format!("put the original back ('vmar image verify {name}' checks all of it)")));
        }
    }
    Ok(())
}

/// Where each block is read from by its canonical address, in order of block. A partial last block is its own target,
/// whoever else holds its content.
fn places(rows: &[Row], choices: &[Choice], order: &[u32], sides: &Sides) -> Vec<Pair> {
    let place = |&i: &u32| {
        let (row, choice) = (rows[i as usize], choices[i as usize]);
        let is_partial = sides.own().record.block_len(row.block) < BLOCK_SIZE;
        let (image, block) = if is_partial { (sides.own_index(), row.block) } else { (choice.image, choice.block) };
        Pair { source: row.block, image, block }
    };
    order.iter().map(place).collect()
}

/// The policy `bridge`: what it reads elsewhere than the canonical address says is compared like every redirect.
fn arrange(places: &mut [Pair], limit: u32, min_run: u32, sides: &Sides, work: &Work) -> Result<()> {
    let found = gaps(places, sides.own_index(), limit);
    let pairs: Vec<Pair> = pairs_of(&found, places).collect();
    work.observer.begin(&format!("bridging {}", sides.own().record.name), pairs.len() as u64 * BLOCK_SIZE);
    let differing = differing(sides, &pairs, work)?;
    work.observer.end();
    let (mut differing, mut first) = (differing.into_iter().peekable(), 0);
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
    keep_short_runs(places, sides.own_index(), min_run);
    Ok(())
}

/// The images that are read from, ascending, and the map's entries.
fn entries(places: &[Pair], sides: &Sides) -> (Vec<u32>, Vec<Entry>) {
    let mut is_target = vec![false; sides.own_index() as usize + 1];
    places.iter().for_each(|p| is_target[p.image as usize] = true);
    let images: Vec<u32> = (0u32..).zip(&is_target).filter(|(_, is)| **is).map(|(image, _)| image).collect();
    let mut number = vec![0u32; is_target.len()];
    (0u32..).zip(&images).for_each(|(n, &image)| number[image as usize] = n);

    let mut builder = EntryBuilder::new();
    for place in places {
        builder.push(place.source, number[place.image as usize], place.block);
    }
    (images, builder.finish())
}
