//! A block map without a look at the images: of the canonical addresses that an engine over the fingerprint runs found.
//!
//! The engine is told (hash, variant) and nothing else. That is enough, for equal (hash, variant) of two rows means
//! equal bytes throughout a sharing domain: [`super::add`] compared them when the images were added. What must hold then
//! is that the engine neither lost nor doubled a row, and that is checked here, not believed:
//!
//! - blocks come in ascending order, as many as the image has non-zero ones (a block without an entry reads as zeros),
//! - an address is of this domain and not behind its block, in the policy's order of images,
//! - it is the canonical address of its own block too.
//!
//! The result is, byte for byte, what [`super::remap`] writes with the same policy for the same library.

use super::arrange::{Gap, bridge, gaps, keep_short_runs};
use super::choose::Choose;
use super::compare::Pair;
use super::spool::each_window;
use super::target_of;
use crate::error::{Error, ErrorKind, Result};
use crate::library::{ImageRecord, Policy, Runs};
use crate::map::{EntryBuilder, Map, MapError, MapSpec, Totals, build};
use crate::units::BLOCK_SIZE;
use std::collections::{BTreeMap, BTreeSet};

/// The images of a sharing domain in the order of the policy: of those that hold a content, the first one is read by all.
/// `preference` is what the policies `most-used` and `least-fragmented` go by, as in [`crate::library::Catalog`].
pub fn in_order<'a>(
    images: impl IntoIterator<Item = &'a ImageRecord>,
    policy: Policy,
    preference: &BTreeMap<u32, u64>,
) -> Vec<&'a ImageRecord> {
    let choose = Choose::by(policy, preference);
    let mut images: Vec<&ImageRecord> = images.into_iter().collect();
    images.sort_by_key(|record| choose.rank(record.id.0));
    images
}

/// The mean length of the runs of an image that others could read, in thousandths of a block: what `least-fragmented`
/// prefers. Of so many blocks in so many runs.
pub fn mean_length(blocks: u64, runs: u64) -> u64 {
    (blocks * 1000).checked_div(runs).unwrap_or(0)
}

/// A block of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Place of the image in the order of the policy, see [`in_order`]; not its ID.
    pub rank: u32,
    /// The block.
    pub block: u32,
}

/// The canonical addresses of all images up to the one whose map is made, that one included.
pub trait Canonical {
    /// The canonical address of each of the blocks `first..first + count` of the image of that rank; `None` for a block
    /// that is zero or not there.
    fn of(&mut self, rank: u32, first: u32, count: u32) -> Result<Vec<Option<Address>>>;
}

/// The map of one image, from block to block.
pub struct Offline<'a> {
    /// The images of the domain up to this one, in the order of the policy.
    images: &'a [&'a ImageRecord],
    own: &'a ImageRecord,
    own_rank: u32,
    /// Images are ranks.
    places: Vec<Pair>,
}

impl<'a> Offline<'a> {
    /// The map of the last one of these images, which are the first ones [`in_order`]; `None` if there is none.
    pub fn new(images: &'a [&'a ImageRecord]) -> Option<Offline<'a>> {
        let own_rank = u32::try_from(images.len().checked_sub(1)?).ok()?;
        images.last().map(|own| Offline { images, own, own_rank, places: Vec::new() })
    }

    /// Says where block `block` of the image is canonically: the lowest address with the same hash and variant. Blocks
    /// ascend.
    ///
    /// # Errors
    /// `Corrupt` when this cannot be true of the library.
    pub fn push(&mut self, block: u32, home: Address) -> Result<()> {
        if self.places.last().is_some_and(|last| last.source >= block) {
            return Err(self.wrong(format!("block {block} came twice or out of order")));
        }
        let fits = self.images.get(home.rank as usize).is_some_and(|r| {
            r.domain == self.own.domain
                && home <= Address { rank: self.own_rank, block }
                && r.block_len(home.block) == self.own.block_len(block)
        });
        if !fits {
            let cause =
                format!("block {block} cannot have the canonical address {}:{}", self.name(home.rank), home.block);
            return Err(self.wrong(cause));
        }
        self.places.push(Pair { source: block, image: home.rank, block: home.block });
        Ok(())
    }

    /// The bytes of the map, and what they say in numbers.
    ///
    /// # Errors
    /// `Corrupt` when blocks are missing or an address is not canonical.
    pub fn finish(mut self, policy: Policy, canonical: &mut impl Canonical) -> Result<(Vec<u8>, Totals)> {
        if self.places.len() as u64 != self.own.nonzero_blocks {
            let (found, want) = (self.places.len(), self.own.nonzero_blocks);
            return Err(self.wrong(format!("it has {found} canonical addresses for {want} non-zero blocks")));
        }
        self.check_homes(canonical)?;
        self.keep_partial_block();
        if let Some(runs) = policy.runs() {
            let mut places = std::mem::take(&mut self.places);
            each_window(&mut places, &mut |window| self.arrange(window, runs, canonical))?;
            self.places = places;
        }
        self.build(policy).map_err(|e| e.at(&self.own.name))
    }

    fn name(&self, rank: u32) -> &str {
        self.images.get(rank as usize).map_or("no image", |r| &r.name)
    }

    /// A redirect to a block that is read elsewhere itself, or that is no row at all, is the mark of a lost row.
    fn check_homes(&self, canonical: &mut impl Canonical) -> Result<()> {
        let in_step = |a: &Pair, b: &Pair| a.image == b.image && a.block.checked_add(1) == Some(b.block);
        for run in self.places.chunk_by(in_step) {
            let [first, ..] = run else { continue };
            let rank = first.image;
            let count = u32::try_from(run.len()).unwrap_or(u32::MAX);
            let homes = canonical.of(rank, first.block, count)?;
            let want = (first.block..).map(|block| Some(Address { rank, block }));
            if let Some((_, place)) = homes.iter().zip(want).zip(run).find(|((is, want), _)| *is != want) {
                let (source, name) = (place.source, self.name(rank));
                return Err(
                    self.wrong(format!("block {source} leads to {name}:{}, which is not canonical", place.block))
                );
            }
        }
        Ok(())
    }

    /// A partial last block is its own target, whoever else holds its content: readers take whole blocks of others.
    fn keep_partial_block(&mut self) {
        if let Some(last) = self.places.last_mut()
            && self.own.block_len(last.source) < BLOCK_SIZE
        {
            (last.image, last.block) = (self.own_rank, last.source);
        }
    }

    fn arrange(&self, places: &mut [Pair], runs: Runs, canonical: &mut impl Canonical) -> Result<()> {
        let found = gaps(places, self.own_rank, runs.bridge);
        let proved = same_content(found, places, canonical)?;
        bridge(places, &proved);
        keep_short_runs(places, self.own_rank, runs.min_run);
        Ok(())
    }

    fn build(&self, policy: Policy) -> Result<(Vec<u8>, Totals), MapError> {
        let used: BTreeSet<u32> = self.places.iter().map(|p| p.image).collect();
        let mut targets: Vec<(u32, &ImageRecord)> =
            used.into_iter().filter_map(|rank| Some((rank, *self.images.get(rank as usize)?))).collect();
        // In a map they are in order of ID.
        targets.sort_by_key(|(_, record)| record.id);
        let number: BTreeMap<u32, u32> = targets.iter().zip(0..).map(|((rank, _), n)| (*rank, n)).collect();
        let mut entries = EntryBuilder::new();
        for place in &self.places {
            entries.push(place.source, number.get(&place.image).copied().unwrap_or(u32::MAX), place.block);
        }
        let targets = targets.into_iter().map(|(_, record)| target_of(record)).collect();
        let spec = MapSpec { source: target_of(self.own), policy: policy.code(), targets, entries: entries.finish() };
        let bytes = build(&spec)?;
        // What a `serve` would refuse must not be published.
        let totals = Map::new(&bytes[..])?.totals();
        Ok((bytes, totals))
    }

    fn wrong(&self, cause: String) -> Error {
        Error::new(ErrorKind::Corrupt, &self.own.name, format!("the answer of the engine is wrong: {cause}"))
            .mend("run it again; 'vmar library remap' needs no engine")
    }
}

/// The gaps whose blocks the other image holds too: two rows with one canonical address have one (hash, variant).
fn same_content(found: Vec<Gap>, places: &[Pair], canonical: &mut impl Canonical) -> Result<Vec<Gap>> {
    let mut proved = Vec::with_capacity(found.len());
    for gap in found {
        let blocks = places.get(gap.gap.clone()).unwrap_or(&[]);
        let count = u32::try_from(blocks.len()).unwrap_or(u32::MAX);
        let there = canonical.of(gap.image, gap.block, count)?;
        let here = blocks.iter().map(|p| Some(Address { rank: p.image, block: p.block }));
        if there.len() == blocks.len() && here.eq(there) {
            proved.push(gap);
        }
    }
    Ok(proved)
}
