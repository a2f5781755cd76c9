//! Memory reuse: a host keeps the memory of a VM that leaves it, and gets back only what has changed.
//!
//! While a VM leaves, the sender writes its pages to a spool file, each to its one place, so that of a page that is sent again the
//! last version stays; when the VM has moved, that becomes a memory image of the store ([`crate::store`]). The receiver notes the hashes
//! alone. When the VM goes back it is the sender that has hashes, and the receiver the pages: both name the image by its root.

use super::frame::Source;
use super::stream::{PAGE_BYTES, PAGE_SIZE, Place};
use super::wire::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::store::manifest::{Held, Manifest, MemoryBlock, Page, ZERO, number, root};
use crate::store::{Pack, PackId, PackWriter};
use crate::units::to_usize;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Pages that are noted, at most: 1 TiB of memory, for which the hashes take 8 GiB.
const PAGES_MAX: u64 = 1 << 28;

/// The hashes of a VM's memory, as its stream tells of them.
#[derive(Debug, Default)]
pub struct Hashes {
    blocks: Vec<MemoryBlock>,
    /// Of all pages of all blocks; those that were never told of are zero at the other side.
    pages: Vec<Digest>,
}

impl Hashes {
    /// Of these blocks of memory, all zero.
    ///
    /// # Errors
    /// It is more than 1 TiB: a stream that lies, or a VM that is too large to be noted.
    pub fn new(blocks: Vec<MemoryBlock>) -> Result<Hashes> {
        let pages = blocks.iter().try_fold(0u64, |sum, b| sum.checked_add(b.len / PAGE_SIZE));
        match pages.filter(|pages| *pages <= PAGES_MAX) {
            Some(pages) => Ok(Hashes { blocks, pages: vec![ZERO; to_usize(pages)] }),
            None => Err(Error::new(ErrorKind::Unsupported, "memory to keep", "it is more than 1 TiB")),
        }
    }

    /// Those of a memory image.
    pub fn of(manifest: Manifest) -> Hashes {
        Hashes { pages: manifest.pages.iter().map(|page| page.hash).collect(), blocks: manifest.blocks }
    }

    /// A memory image whose pages another host has.
    pub fn elsewhere(self, vm: &str, taken: u64) -> Manifest {
        let page = |hash| if hash == ZERO { Page::ZERO } else { Page { hash, held: Held::Elsewhere } };
        Manifest {
            vm: vm.into(),
            taken,
            blocks: self.blocks,
            pages: self.pages.into_iter().map(page).collect(),
            ..Manifest::default()
        }
    }

    /// A page is this now; the number of the page, if there is such a one.
    pub fn set(&mut self, block: &[u8], offset: u64, hash: Digest) -> Option<usize> {
        let number = number(&self.blocks, block, offset)?;
        *self.pages.get_mut(number)? = hash;
        Some(number)
    }

    /// What names this memory.
    pub fn root(&self) -> Digest {
        root(&self.blocks, self.pages.iter().copied())
    }
}

/// The hashes of a memory image that the other side has the pages of.
#[derive(Debug)]
pub struct Remembered {
    hashes: Hashes,
    by_hash: HashMap<Digest, u64>,
}

impl Remembered {
    /// To be looked up by place, and by hash.
    pub fn new(hashes: Hashes) -> Remembered {
        let mut by_hash = HashMap::with_capacity(hashes.pages.len());
        for (number, hash) in (0u64..).zip(&hashes.pages) {
            if *hash != ZERO {
                by_hash.entry(*hash).or_insert(number);
            }
        }
        Remembered { hashes, by_hash }
    }

    /// What both sides name it by.
    pub fn root(&self) -> Digest {
        self.hashes.root()
    }

    /// Where it has this page.
    pub fn find(&self, block: &[u8], place: Place, hash: &Digest) -> Option<Source> {
        let here = number(&self.hashes.blocks, block, place.offset).and_then(|n| self.hashes.pages.get(n));
        if here == Some(hash) {
            return Some(Source::Same);
        }
        self.by_hash.get(hash).map(|number| Source::Kept(*number))
    }
}

/// Pages of a memory image, where they are kept.
#[derive(Debug)]
pub struct Kept {
    manifest: Manifest,
    packs: Vec<Pack>,
    images: super::bases::BaseFiles,
}

impl Kept {
    /// With the files that its manifest names.
    pub fn new(manifest: Manifest, packs: Vec<Pack>, images: super::bases::BaseFiles) -> Kept {
        Kept { manifest, packs, images }
    }

    /// Reads the page at this offset of a block.
    pub fn same(&self, block: &[u8], offset: u64, page: &mut [u8; PAGE_BYTES]) -> bool {
        self.manifest.number(block, offset).is_some_and(|number| self.read(number as u64, page))
    }

    /// Reads a page by its number. False, with a line in the log, if it is not what the manifest says.
    pub fn read(&self, number: u64, page: &mut [u8; PAGE_BYTES]) -> bool {
        let Some(Page { hash, held }) = usize::try_from(number).ok().and_then(|n| self.manifest.pages.get(n)) else {
            return false;
        };
        match *held {
            Held::Zero => {
                page.fill(0);
                true
            }
            Held::Elsewhere => false,
            Held::Pack { pack, page: number } => {
                let pack = self.packs.get(to_usize(pack.into()));
                pack.is_some_and(|p| p.read(number, page).inspect_err(|e| log::warn!("migration: {e}")).is_ok())
            }
            Held::Image { image, block } => {
                self.images.read(image, block, page) && blake3::hash(page).as_bytes() == hash
            }
        }
    }
}

/// What a memory image says beside its pages.
#[derive(Clone, Debug, Default)]
pub struct Stay<'a> {
    /// Name of the VM.
    pub vm: &'a str,
    /// Its sharing domain.
    pub domain: &'a str,
    /// When it left, in seconds since 1970.
    pub taken: u64,
    /// Content digests of the images that [`Spool::image`] names.
    pub images: Vec<Digest>,
}

/// The pages of a VM that leaves, each in its place.
#[derive(Debug)]
pub struct Spool {
    path: PathBuf,
    file: File,
    hashes: Hashes,
    held: Vec<Held>,
}

impl Spool {
    /// In a file of this directory that has no name, and is gone with the process.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(dir: &Path, blocks: Vec<MemoryBlock>) -> Result<Spool> {
        use rustix::fs::{Mode, OFlags, open};
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = open(dir, flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(file.map_err(|e| Error::io(dir, "make a file in it", e.into()))?);
        let hashes = Hashes::new(blocks)?;
        Ok(Spool { path: dir.to_path_buf(), file, held: vec![Held::Zero; hashes.pages.len()], hashes })
    }

    /// A page is zero now.
    pub fn zero(&mut self, block: &[u8], offset: u64) {
        if let Some(held) = self.hashes.set(block, offset, ZERO).and_then(|n| self.held.get_mut(n)) {
            *held = Held::Zero;
        }
    }

    /// A page is this now, and an image has it.
    pub fn image(&mut self, block: &[u8], offset: u64, hash: Digest, image: u32, at: u32) {
        if let Some(held) = self.hashes.set(block, offset, hash).and_then(|n| self.held.get_mut(n)) {
            *held = Held::Image { image, block: at };
        }
    }

    /// A page is this now.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn page(&mut self, block: &[u8], offset: u64, hash: Digest, page: &[u8]) -> Result<()> {
        let Some(number) = self.hashes.set(block, offset, hash) else { return Ok(()) };
        if let Some(held) = self.held.get_mut(number) {
            // Its number in the pack is known at the end.
            *held = Held::Pack { pack: 0, page: 0 };
        }
        let at = number as u64 * PAGE_SIZE;
        self.file.write_all_at(page, at).map_err(|e| Error::io(&self.path, "write the memory to keep into it", e))
    }

    /// Makes a memory image of it: its pages in a new pack at `pack`, every content once, and the manifest, which the caller publishes
    /// when the pack has its name.
    ///
    /// # Errors
    /// A file cannot be read or written.
    pub fn seal(mut self, stay: Stay<'_>, pack: &Path) -> Result<(Manifest, PackId)> {
        let mut writer = PackWriter::create(pack)?;
        let (mut seen, mut page) = (HashMap::<Digest, u32>::new(), [0; PAGE_BYTES]);
        for (number, (hash, held)) in self.hashes.pages.iter().zip(&mut self.held).enumerate() {
            let Held::Pack { page: place, .. } = held else { continue };
            *place = match seen.get(hash) {
                Some(place) => *place,
                None => {
                    let at = number as u64 * PAGE_SIZE;
                    let read = self.file.read_exact_at(&mut page, at);
                    read.map_err(|e| Error::io(&self.path, "read the memory to keep from it", e))?;
                    let place = writer.len();
                    writer.push(hash, &page)?;
                    seen.insert(*hash, place);
                    place
                }
            };
        }
        let id = writer.finish()?;
        let pages = self.hashes.pages.iter().zip(&self.held).map(|(hash, held)| Page { hash: *hash, held: *held });
        let manifest = Manifest {
            vm: stay.vm.into(),
            domain: stay.domain.into(),
            taken: stay.taken,
            images: stay.images,
            packs: vec![id],
            pages: pages.collect(),
            blocks: self.hashes.blocks,
        };
        Ok((manifest, id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(byte: u8) -> [u8; PAGE_BYTES] {
        [byte; PAGE_BYTES]
    }

    fn hash(byte: u8) -> Digest {
        *blake3::hash(&page(byte)).as_bytes()
    }

    fn blocks() -> Vec<MemoryBlock> {
        let block = |name: &[u8], pages| MemoryBlock { name: name.to_vec(), len: pages * PAGE_SIZE };
        vec![block(b"ram0", 8), block(b"vram", 2)]
    }

    #[test]
    fn memory_that_no_host_has_is_not_noted() {
        let block = |len| MemoryBlock { name: b"ram".to_vec(), len };
        for len in [(PAGES_MAX + 1) * PAGE_SIZE, u64::MAX] {
            assert!(Hashes::new(vec![block(len), block(len)]).is_err(), "{len}");
        }
    }

    /// What leaves comes to lie in the store, and what was noted of it on the other side finds it there.
    #[test]
    fn what_left_is_found_when_it_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let mut spool = Spool::create(dir.path(), blocks()).unwrap();
        let mut noted = Hashes::new(blocks()).unwrap();
        // Page 1 is sent three times, page 2 becomes zero, pages 1 and 4 are alike at the end.
        for (n, byte) in [(0, 7), (1, 1), (2, 9), (1, 2), (3, 3), (1, 5), (4, 5)] {
            spool.page(b"ram0", n * PAGE_SIZE, hash(byte), &page(byte)).unwrap();
            noted.set(b"ram0", n * PAGE_SIZE, hash(byte)).unwrap();
        }
        spool.zero(b"ram0", 2 * PAGE_SIZE);
        noted.set(b"ram0", 2 * PAGE_SIZE, ZERO).unwrap();
        spool.page(b"vram", PAGE_SIZE, hash(8), &page(8)).unwrap();
        noted.set(b"vram", PAGE_SIZE, hash(8)).unwrap();
        // Of no block that was told of.
        spool.page(b"rom", 0, hash(8), &page(8)).unwrap();
        assert_eq!(noted.set(b"ram0", 8 * PAGE_SIZE, hash(1)), None);

        let path = dir.path().join("new.pack");
        let (manifest, id) = spool.seal(Stay { vm: "web", ..Stay::default() }, &path).unwrap();
        assert_eq!(manifest.root(), noted.root());
        // As this side keeps it.
        let mut noted = noted.elsewhere("web", 1);
        assert_eq!((noted.root(), noted.vm.as_str()), (manifest.root(), "web"));
        noted = Manifest::decode(&path, &noted.encode().unwrap()).unwrap();
        let noted = Hashes::of(noted);
        let pack = Pack::open(&path, id).unwrap();
        assert_eq!(pack.hashes().len(), 4, "every content once");
        let read = Manifest::decode(&path, &manifest.encode().unwrap()).unwrap();
        let none = super::super::bases::BaseFiles::none();
        let kept = Kept::new(read, vec![pack], none);

        let remembered = Remembered::new(noted);
        let place = |offset| Place { block: 0, offset, named: false };
        assert_eq!(remembered.find(b"ram0", place(PAGE_SIZE), &hash(5)), Some(Source::Same));
        assert_eq!(remembered.find(b"ram0", place(7 * PAGE_SIZE), &hash(8)), Some(Source::Kept(9)));
        assert_eq!(remembered.find(b"ram0", place(0), &hash(1)), None, "an older version of a page is not kept");
        let mut out = page(0xEE);
        assert!(kept.same(b"ram0", PAGE_SIZE, &mut out) && out == page(5));
        assert!(kept.same(b"ram0", 2 * PAGE_SIZE, &mut out) && out == page(0));
        assert!(kept.read(9, &mut out) && out == page(8));
        assert!(!kept.read(10, &mut out) && !kept.same(b"rom", 0, &mut out));
    }
}
