//! A block map without a look at the images: of the canonical addresses that an engine over the fingerprint runs found.
//!
//! The engine is told (hash, variant) and nothing else. That is enough, for equal (hash, variant) of two rows means
//! equal bytes throughout a sharing domain: [`super::add`] compared them when the images were added. What must hold then
//! is that the engine neither lost nor doubled a row, and that is checked here, not believed:
//!
//! - blocks come in ascending order, as many as the image has non-zero ones (a block without an entry reads as zeros),
//! - an address is of this domain and not behind its block,
//! - it is the canonical address of its own block too.
//!
//! The result is, byte for byte, what [`super::remap`] writes with the same policy for the same library.

use super::arrange::{Gap, bridge, gaps, keep_short_runs};
use super::compare::Pair;
use super::target_of;
use crate::error::{Error, ErrorKind, Result};
use crate::library::{ImageRecord, Policy};
use crate::map::{EntryBuilder, Map, MapError, MapSpec, Totals, build};
use crate::units::{BLOCK_SIZE, ImageId};
use std::collections::BTreeMap;

/// A block of an image of the library.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// The image.
    pub image: ImageId,
    /// The block.
    pub block: u32,
}

/// The canonical addresses of all images up to the one whose map is made, that one included.
pub trait Canonical {
    /// The canonical address of each of the blocks `first..first + count` of an image; `None` for a block that is zero
    /// or not there.
    fn of(&mut self, image: ImageId, first: u32, count: u32) -> Result<Vec<Option<Address>>>;
}

/// The map of one image, from block to block.
pub struct Offline<'a> {
    /// The images of the library up to this one, in order of ID.
    images: &'a [ImageRecord],
    own: &'a ImageRecord,
    /// Images are indices into `images`.
    places: Vec<Pair>,
}

impl<'a> Offline<'a> {
    /// The map of the last one of these images, which are those of a library in order of ID; `None` if there is none.
    pub fn new(images: &'a [ImageRecord]) -> Option<Offline<'a>> {
        images.last().map(|own| Offline { images, own, places: Vec::new() })
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
        let index = self.images.binary_search_by_key(&home.image, |r| r.id).ok();
        let record = index.and_then(|i| self.images.get(i));
        let fits = record.is_some_and(|r| {
            (r.domain == self.own.domain && r.fingerprint == self.own.fingerprint)
                && home <= Address { image: self.own.id, block }
                && r.block_len(home.block) == self.own.block_len(block)
        });
        let Some(image) = index.and_then(|i| u32::try_from(i).ok()).filter(|_| fits) else {
            let cause = format!("block {block} cannot have the canonical address {}:{}", home.image, home.block);
            return Err(self.wrong(cause));
        };
        self.places.push(Pair { source: block, image, block: home.block });
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
        if let Policy::Bridge { bridge: limit, min_run } = policy {
            let own = self.own_index();
            let found = gaps(&self.places, own, limit);
            let proved = self.same_content(found, canonical)?;
            bridge(&mut self.places, &proved);
            keep_short_runs(&mut self.places, own, min_run);
        }
        self.build(policy).map_err(|e| e.at(&self.own.name))
    }

    fn own_index(&self) -> u32 {
        u32::try_from(self.images.len() - 1).unwrap_or(u32::MAX)
    }

    fn id_of(&self, index: u32) -> ImageId {
        self.images.get(index as usize).map_or(self.own.id, |r| r.id)
    }

    /// A redirect to a block that is read elsewhere itself, or that is no row at all, is the mark of a lost row.
    fn check_homes(&self, canonical: &mut impl Canonical) -> Result<()> {
        let in_step = |a: &Pair, b: &Pair| a.image == b.image && a.block.checked_add(1) == Some(b.block);
        for run in self.places.chunk_by(in_step) {
            let [first, ..] = run else { continue };
            let image = self.id_of(first.image);
            let count = u32::try_from(run.len()).unwrap_or(u32::MAX);
            let homes = canonical.of(image, first.block, count)?;
            let want = (first.block..).map(|block| Some(Address { image, block }));
            if let Some((_, place)) = homes.iter().zip(want).zip(run).find(|((is, want), _)| *is != want) {
                let cause = format!("block {} leads to {image}:{}, which is not canonical", place.source, place.block);
                return Err(self.wrong(cause));
            }
        }
        Ok(())
    }

    /// A partial last block is its own target, whoever else holds its content: readers take whole blocks of others.
    fn keep_partial_block(&mut self) {
        let own = self.own_index();
        if let Some(last) = self.places.last_mut()
            && self.own.block_len(last.source) < BLOCK_SIZE
        {
            (last.image, last.block) = (own, last.source);
        }
    }

    /// The gaps whose blocks the other image holds too: two rows with one canonical address have one (hash, variant).
    fn same_content(&self, found: Vec<Gap>, canonical: &mut impl Canonical) -> Result<Vec<Gap>> {
        let mut proved = Vec::with_capacity(found.len());
        for gap in found {
            let blocks = self.places.get(gap.gap.clone()).unwrap_or(&[]);
            let count = u32::try_from(blocks.len()).unwrap_or(u32::MAX);
            let there = canonical.of(self.id_of(gap.image), gap.block, count)?;
            let here = blocks.iter().map(|p| Some(Address { image: self.id_of(p.image), block: p.block }));
            if there.len() == blocks.len() && here.eq(there) {
                proved.push(gap);
            }
        }
        Ok(proved)
    }

    fn build(&self, policy: Policy) -> Result<(Vec<u8>, Totals), MapError> {
        let mut number: BTreeMap<u32, u32> = self.places.iter().map(|p| (p.image, 0)).collect();
        (0..).zip(number.values_mut()).for_each(|(n, slot)| *slot = n);
        let mut entries = EntryBuilder::new();
        for place in &self.places {
            entries.push(place.source, number.get(&place.image).copied().unwrap_or(u32::MAX), place.block);
        }
        let targets = number.keys().filter_map(|&image| self.images.get(image as usize)).map(target_of).collect();
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
