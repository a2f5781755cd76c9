//! Base images as a dictionary: most pages of a booted guest are blocks of its disk.
//!
//! The sender has the fingerprints of the images in memory, and believes them: whether the receiver's block is the page is told by
//! the digest of the frame, which both make of the bytes. So the sender reads no image, and a collision, an image that was edited
//! behind the library's back, or a wrong fingerprint cost a frame that comes again.

use super::frame::Source;
use super::stream::PAGE_BYTES;
use super::wire::Digest;
use crate::error::Result;
use crate::fingerprint::{Hash, Hasher, run};
use crate::library::{ImageRecord, Library};
use crate::units::BLOCK_SIZE;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

/// Contents in memory, at most; about half a GiB.
pub const CONTENTS_MAX: usize = 8 << 20;

/// The images whose blocks a sender looks for.
#[derive(Debug)]
pub struct Bases {
    domain: String,
    hasher: Hasher,
    digests: Vec<Digest>,
    places: HashMap<Hash, (u32, u32)>,
    /// By their place in `digests`: the receiver has it.
    there: Vec<bool>,
}

impl Bases {
    /// Of the sharing domain of an image: that image first, so that runs of pages stay runs of blocks, then the others by their ID, as
    /// far as there is room.
    ///
    /// # Errors
    /// There is no such image, or its fingerprints cannot be read.
    pub fn load(library: &Library, image: &str, most: usize) -> Result<Bases> {
        let own = library.image(image)?;
        let others = library.images().iter().filter(|r| r.domain == own.domain && r.id != own.id);
        Bases::of(library, own, std::iter::once(own).chain(others), most)
    }

    /// Of one image alone.
    ///
    /// # Errors
    /// Its fingerprints cannot be read.
    pub fn of_image(library: &Library, own: &ImageRecord) -> Result<Bases> {
        let mut bases = Bases::of(library, own, std::iter::once(own), usize::MAX)?;
        bases.set_there(&[true]);
        Ok(bases)
    }

    fn of<'a>(
        library: &Library,
        own: &ImageRecord,
        images: impl Iterator<Item = &'a ImageRecord>,
        most: usize,
    ) -> Result<Bases> {
        let (mut digests, mut places) = (Vec::new(), HashMap::new());
        for record in images {
            if !digests.is_empty() && places.len() as u64 + record.nonzero_blocks > most as u64 {
                log::warn!("migration: no room for the fingerprints of image {} and those after it", record.name);
                break;
            }
            let number = u32::try_from(digests.len()).unwrap_or(u32::MAX);
            digests.push(record.digest);
            for row in open_run(library, record)? {
                let row = row?;
                // A partial last block is no page.
                if record.block_len(row.block) == BLOCK_SIZE {
                    places.entry(row.hash).or_insert((number, row.block));
                }
            }
        }
        let hasher = library.hasher(&own.domain)?;
        Ok(Bases { domain: own.domain.clone(), hasher, there: vec![false; digests.len()], digests, places })
    }

    /// The sharing domain.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// Content digests of the images, for the greeting.
    pub fn digests(&self) -> &[Digest] {
        &self.digests
    }

    /// Which of them the receiver has.
    pub fn set_there(&mut self, there: &[bool]) {
        self.there.copy_from_slice(there);
    }

    /// Where a page is.
    pub fn find(&self, page: &[u8]) -> Option<Source> {
        let (image, block) = *self.places.get(&self.hasher.hash(page))?;
        let there = usize::try_from(image).ok().and_then(|i| self.there.get(i));
        (there == Some(&true)).then_some(Source::Base { image, block })
    }
}

fn open_run(library: &Library, record: &ImageRecord) -> Result<run::Reader> {
    let stamp = run::Stamp { bytes: record.run.bytes, crc32c: record.run.crc32c };
    run::Reader::open(&library.run_path(record), stamp)
}

/// The same images at the receiver, in the order of the greeting.
#[derive(Debug)]
pub struct BaseFiles {
    files: Vec<Option<File>>,
}

impl BaseFiles {
    /// Those that the library has. One that cannot be opened, or has changed, is one that it has not.
    pub fn open(library: &Library, digests: &[Digest]) -> BaseFiles {
        let open = |digest: &Digest| {
            let record = library.images().iter().find(|r| r.digest == *digest)?;
            library.open_image(record).inspect_err(|e| log::warn!("migration: {e}")).ok()
        };
        BaseFiles { files: digests.iter().map(open).collect() }
    }

    /// None at all.
    pub fn none() -> BaseFiles {
        BaseFiles { files: Vec::new() }
    }

    /// For each image of the greeting whether it is here.
    pub fn here(&self) -> Vec<bool> {
        self.files.iter().map(Option::is_some).collect()
    }

    /// Whether one of them is here.
    pub fn has(&self, image: u32) -> bool {
        usize::try_from(image).is_ok_and(|i| self.files.get(i).is_some_and(Option::is_some))
    }

    /// Reads a block.
    pub fn read(&self, image: u32, block: u32, page: &mut [u8; PAGE_BYTES]) -> bool {
        let file = usize::try_from(image).ok().and_then(|i| self.files.get(i)?.as_ref());
        file.is_some_and(|file| file.read_exact_at(page, u64::from(block) * BLOCK_SIZE).is_ok())
    }
}
