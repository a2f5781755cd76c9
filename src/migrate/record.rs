//! Who looks on while a VM migrates, and notes what its memory is in the end: to keep it where it was, or to know what is kept there.

use super::frame::Source;
use super::kept::{Hashes, Spool};
use super::part::{Cutter, Item, Part};
use super::stream::Block;
use super::wire::Digest;
use super::work::Counts;
use crate::error::{Error, Result};
use crate::store::manifest::{MemoryBlock, ZERO};
use std::path::PathBuf;

/// Sees every part of a stream, in order.
pub trait Recorder: Send {
    /// The next part, with hash and place of each of its pages that is no zero record; a hash of zeros is that of a zero page.
    fn part(&mut self, part: &Part, pages: &[(Digest, Option<Source>)]);

    /// What was made of all parts so far: by rounds, and bytes on the link.
    fn told(&mut self, _rounds: &[Counts], _link_bytes: u64) {}
}

/// Nobody looks.
impl Recorder for () {
    fn part(&mut self, _: &Part, _: &[(Digest, Option<Source>)]) {}
}

/// The blocks of memory, when the list of them is complete.
fn memory(blocks: &[Block]) -> Vec<MemoryBlock> {
    let known = |b: &Block| Some(MemoryBlock { name: b.name.to_vec(), len: b.len? });
    blocks.iter().filter_map(known).collect()
}

/// Keeps the pages of a VM that leaves.
#[derive(Debug)]
pub struct Leaving {
    dir: PathBuf,
    spool: Option<Spool>,
    error: Option<Error>,
}

impl Leaving {
    /// In a spool file of this directory.
    pub fn new(dir: PathBuf) -> Leaving {
        Leaving { dir, spool: None, error: None }
    }

    /// All pages, once the VM has left.
    ///
    /// # Errors
    /// Why they could not be kept: the migration went on without.
    pub fn finish(self) -> Result<Option<Spool>> {
        match self.error {
            Some(error) => Err(error),
            None => Ok(self.spool),
        }
    }

    fn note(&mut self, part: &Part, pages: &[(Digest, Option<Source>)]) -> Result<()> {
        let mut pages = pages.iter();
        for item in &part.items {
            let (place, at) = match *item {
                Item::Bytes(_) => continue,
                Item::Zero(place) => (place, None),
                Item::Page(place, at) => (place, Some(at)),
            };
            let spool = match &mut self.spool {
                Some(spool) => spool,
                None => self.spool.insert(Spool::create(&self.dir, memory(&part.blocks))?),
            };
            let block = part.name(place.block);
            match at.and_then(|at| pages.next().map(|page| (at, page))) {
                None | Some((_, (ZERO, _))) => spool.zero(block, place.offset),
                Some((_, (hash, Some(Source::Base { image, block: at })))) => {
                    spool.image(block, place.offset, *hash, *image, *at);
                }
                Some((at, (hash, _))) => spool.page(block, place.offset, *hash, part.page(at))?,
            }
        }
        Ok(())
    }
}

impl Recorder for Leaving {
    fn part(&mut self, part: &Part, pages: &[(Digest, Option<Source>)]) {
        if self.error.is_none()
            && let Err(error) = self.note(part, pages)
        {
            log::warn!("the memory of the VM will not be kept: {error}");
            self.error = Some(error);
        }
    }
}

/// Notes the hashes of a VM that comes, from the stream that its QEMU gets.
#[derive(Debug, Default)]
pub struct Coming {
    cutter: Cutter,
    hashes: Option<Hashes>,
    error: Option<Error>,
}

impl Coming {
    /// The next bytes of the stream.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.cutter.feed(bytes);
        self.note();
    }

    /// The hashes of all its memory, once it has come.
    ///
    /// # Errors
    /// Why they could not be noted.
    pub fn finish(mut self) -> Result<Option<Hashes>> {
        self.cutter.flush();
        self.note();
        match self.error {
            Some(error) => Err(error),
            None => Ok(self.hashes),
        }
    }

    fn note(&mut self) {
        for part in self.cutter.take_parts() {
            if self.error.is_none() {
                self.error = self.part(&part).err();
            }
        }
    }

    fn part(&mut self, part: &Part) -> Result<()> {
        for item in &part.items {
            let (place, hash) = match *item {
                Item::Bytes(_) => continue,
                Item::Zero(place) => (place, ZERO),
                Item::Page(place, at) => {
                    let page = part.page(at);
                    let zero = crate::units::is_zero(page);
                    (place, if zero { ZERO } else { *blake3::hash(page).as_bytes() })
                }
            };
            let hashes = match &mut self.hashes {
                Some(hashes) => hashes,
                None => self.hashes.insert(Hashes::new(memory(&part.blocks))?),
            };
            hashes.set(part.name(place.block), place.offset, hash);
        }
        Ok(())
    }
}
