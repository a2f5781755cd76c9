//! A pack: a file of pages, each named by its hash, made once and never changed.
//!
//! ```text
//! header    "vmar-pak", version u32, reserved u32
//! batches   up to 256 pages each, zstd, one after the other
//! index     for each batch: pages u32, bytes u32; for each page: BLAKE3, 32 bytes
//! trailer   index at u64, batches u32, pages u32, "vmar-pak"
//! ```
//!
//! Integers are little-endian. A pack is named by the BLAKE3 of its index, so that its name says what it holds: two packs of one
//! name are the same, whoever made them. Every page is compared with its hash when it is read; nothing else of the batches
//! needs a checksum.

use super::{Digest, MEND, PAGE_BYTES};
use crate::codec::{Cursor, hex};
use crate::error::{Error, ErrorKind, Result};
use crate::units::to_usize;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

const MAGIC: &[u8; 8] = b"vmar-pak";
const VERSION: u32 = 1;
const HEADER: usize = 16;
const TRAILER: usize = 24;
/// Pages of a batch: what is unpacked to read one of them.
const BATCH: usize = 256;
/// Pages of a pack; with 16 GiB it is as large as a file should be that is copied whole.
pub const PAGES_MAX: u32 = 1 << 22;
/// Batches that stay unpacked: readers come in the order of memory, which is nearly that of the pack.
const UNPACKED: usize = 8;
/// The fastest level: pages are written while a guest waits for its migration.
const LEVEL: i32 = 1;

/// Name of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackId(pub Digest);

impl PackId {
    /// The name of its file.
    pub fn file_name(&self) -> String {
        format!("{}.pack", hex(&self.0))
    }
}

/// Where a batch lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Batch {
    at: u64,
    len: u32,
    pages: u32,
    /// Number of its first page.
    first: u32,
}

/// Writes a pack: to a file, or to memory.
#[derive(Debug)]
pub struct PackWriter<W = BufWriter<File>> {
    path: PathBuf,
    out: W,
    level: i32,
    batch: Vec<u8>,
    batches: Vec<Batch>,
    hashes: Vec<Digest>,
    at: u64,
}

impl PackWriter<BufWriter<File>> {
    /// Starts a new file. The caller gives it its name when it is whole.
    ///
    /// # Errors
    /// The file is there already, or cannot be made.
    pub fn create(path: &Path) -> Result<PackWriter> {
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(path);
        let file = BufWriter::with_capacity(1 << 20, file.map_err(|e| Error::io(path, "create it", e))?);
        PackWriter::begin(path, file, LEVEL)
    }

    /// Writes what is left and makes the file durable.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn finish(mut self) -> Result<PackId> {
        let id = self.end()?;
        self.out.get_ref().sync_data().map_err(|e| Error::io(&self.path, "write", e))?;
        Ok(id)
    }
}

impl PackWriter<Vec<u8>> {
    /// Starts one in memory; `level` is zstd's.
    ///
    /// # Errors
    /// None that is known.
    pub fn in_memory(level: i32) -> Result<PackWriter<Vec<u8>>> {
        PackWriter::begin(Path::new("a new pack"), Vec::new(), level)
    }

    /// Its bytes.
    ///
    /// # Errors
    /// zstd fails.
    pub fn into_bytes(mut self) -> Result<(PackId, Vec<u8>)> {
        let id = self.end()?;
        Ok((id, self.out))
    }
}

impl<W: Write> PackWriter<W> {
    fn begin(path: &Path, mut out: W, level: i32) -> Result<PackWriter<W>> {
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.resize(HEADER, 0);
        out.write_all(&header).map_err(|e| Error::io(path, "write", e))?;
        Ok(PackWriter {
            path: path.to_path_buf(),
            out,
            level,
            batch: Vec::with_capacity(BATCH * PAGE_BYTES),
            batches: Vec::new(),
            hashes: Vec::new(),
            at: HEADER as u64,
        })
    }

    /// Pages so far; the number that the next one gets.
    pub fn len(&self) -> u32 {
        u32::try_from(self.hashes.len()).unwrap_or(u32::MAX)
    }

    /// True if there is no page yet.
    pub fn is_empty(&self) -> bool {
        self.hashes.is_empty()
    }

    /// Appends a page with its hash.
    ///
    /// # Errors
    /// It cannot be written, or the pack is full ([`PAGES_MAX`]).
    pub fn push(&mut self, hash: &Digest, page: &[u8; PAGE_BYTES]) -> Result<()> {
        if self.len() >= PAGES_MAX {
            return Err(Error::file(ErrorKind::Unsupported, &self.path, "a pack holds no more than 16 GiB of pages"));
        }
        self.hashes.push(*hash);
        self.batch.extend_from_slice(page);
        if self.batch.len() == BATCH * PAGE_BYTES { self.end_batch() } else { Ok(()) }
    }

    fn end_batch(&mut self) -> Result<()> {
        let pages = u32::try_from(self.batch.len() / PAGE_BYTES).unwrap_or_default();
        if pages == 0 {
            return Ok(());
        }
        let failed = |e| Error::io(&self.path, "write", e);
        let packed = zstd::bulk::compress(&self.batch, self.level).map_err(failed)?;
        self.out.write_all(&packed).map_err(failed)?;
        let len = u32::try_from(packed.len()).unwrap_or(u32::MAX);
        self.batches.push(Batch { at: self.at, len, pages, first: self.len() - pages });
        self.at += u64::from(len);
        self.batch.clear();
        Ok(())
    }

    fn end(&mut self) -> Result<PackId> {
        self.end_batch()?;
        let mut index = Vec::with_capacity(self.batches.len() * 8 + self.hashes.len() * 32 + TRAILER);
        for batch in &self.batches {
            index.extend(batch.pages.to_le_bytes());
            index.extend(batch.len.to_le_bytes());
        }
        index.extend(self.hashes.as_flattened());
        let id = PackId(*blake3::hash(&index).as_bytes());
        index.extend(self.at.to_le_bytes());
        index.extend(u32::try_from(self.batches.len()).unwrap_or(u32::MAX).to_le_bytes());
        index.extend(self.len().to_le_bytes());
        index.extend(MAGIC);
        let written = self.out.write_all(&index).and_then(|()| self.out.flush());
        written.map_err(|e| Error::io(&self.path, "write", e))?;
        Ok(id)
    }
}

/// A pack, open. Threads may share it.
#[derive(Debug)]
pub struct Pack {
    path: PathBuf,
    file: File,
    batches: Vec<Batch>,
    hashes: Vec<Digest>,
    unpacked: Mutex<VecDeque<(usize, Arc<Vec<u8>>)>>,
}

impl Pack {
    /// Opens a pack and checks that it is the one of this name.
    ///
    /// # Errors
    /// `Corrupt` when it is another one or cut off, `Unsupported` when a newer vmar wrote it.
    pub fn open(path: &Path, id: PackId) -> Result<Pack> {
        let file = File::open(path).map_err(|e| Error::io(path, "open it", e))?;
        Pack::of_file(path, file, id)
    }

    /// The same of a file that is open; `path` is for errors alone.
    ///
    /// # Errors
    /// As [`Pack::open`].
    pub fn of_file(path: &Path, file: File, id: PackId) -> Result<Pack> {
        let len = file.metadata().map_err(|e| Error::io(path, "look at it", e))?.len();
        let broken = |what: &str| corrupt(path, what);
        if len < (HEADER + TRAILER) as u64 {
            return Err(broken("it is cut off"));
        }
        let mut header = [0; HEADER];
        read_at(path, &file, &mut header, 0)?;
        let mut c = Cursor::new(&header);
        if c.array() != Some(*MAGIC) {
            return Err(broken("it is no pack"));
        }
        super::check_version(path, c.u32_le(), VERSION)?;
        let mut trailer = [0; TRAILER];
        read_at(path, &file, &mut trailer, len - TRAILER as u64)?;
        let mut c = Cursor::new(&trailer);
        let fields = (|| Some((c.u64_le()?, c.u32_le()?, c.u32_le()?, c.array()?)))();
        let (index_at, batches, pages, magic): (u64, u32, u32, [u8; 8]) =
            fields.ok_or_else(|| broken("it is cut off"))?;
        let index_len = u64::from(batches) * 8 + u64::from(pages) * 32;
        if magic != *MAGIC || pages > PAGES_MAX || index_at.checked_add(index_len) != Some(len - TRAILER as u64) {
            return Err(broken("it is cut off, or longer than it was"));
        }
        let mut index = vec![0; to_usize(index_len)];
        read_at(path, &file, &mut index, index_at)?;
        if *blake3::hash(&index).as_bytes() != id.0 {
            return Err(broken("its index is not what its name says"));
        }
        let (batches, hashes) = parse(&index, batches, index_at).ok_or_else(|| broken("its index makes no sense"))?;
        Ok(Pack { path: path.to_path_buf(), file, batches, hashes, unpacked: Mutex::default() })
    }

    /// Hashes of its pages, in order.
    pub fn hashes(&self) -> &[Digest] {
        &self.hashes
    }

    /// Reads a page by its number.
    ///
    /// # Errors
    /// There is no such page, or it is not what its hash says.
    pub fn read(&self, number: u32, page: &mut [u8; PAGE_BYTES]) -> Result<()> {
        let broken = |what: &str| corrupt(&self.path, &format!("page {number}: {what}"));
        let hash = self.hashes.get(to_usize(number.into())).ok_or_else(|| broken("it has fewer pages"))?;
        let batch = self.batches.partition_point(|b| b.first <= number) - 1;
        let bytes = self.unpack(batch)?;
        let at = self.batches.get(batch).map_or(0, |b| to_usize((number - b.first).into())) * PAGE_BYTES;
        page.copy_from_slice(bytes.get(at..at + PAGE_BYTES).ok_or_else(|| broken("its batch is short"))?);
        if blake3::hash(page).as_bytes() != hash {
            return Err(broken("it is not what its hash says"));
        }
        Ok(())
    }

    /// Reads all of it and compares every page with its hash.
    ///
    /// # Errors
    /// The first page that is wrong.
    pub fn verify(&self) -> Result<()> {
        let mut page = [0; PAGE_BYTES];
        (0..self.hashes.len()).try_for_each(|n| self.read(u32::try_from(n).unwrap_or(u32::MAX), &mut page))
    }

    fn unpack(&self, number: usize) -> Result<Arc<Vec<u8>>> {
        let unpacked = || self.unpacked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = unpacked().iter().find(|(n, _)| *n == number) {
            return Ok(Arc::clone(bytes));
        }
        // Without the lock, so that several threads unpack at once.
        let broken = |what: &str| corrupt(&self.path, &format!("batch {number}: {what}"));
        let batch = self.batches.get(number).ok_or_else(|| broken("there is none"))?;
        let mut packed = vec![0; to_usize(batch.len.into())];
        read_at(&self.path, &self.file, &mut packed, batch.at)?;
        let len = to_usize(batch.pages.into()) * PAGE_BYTES;
        let bytes = zstd::bulk::decompress(&packed, len).map_err(|e| broken(&format!("cannot be unpacked: {e}")))?;
        let bytes = Arc::new(bytes);
        let mut unpacked = unpacked();
        if unpacked.len() == UNPACKED {
            unpacked.pop_front();
        }
        unpacked.push_back((number, Arc::clone(&bytes)));
        Ok(bytes)
    }
}

/// The parts of an index, if they fit each other and the batches end where it begins.
fn parse(index: &[u8], batches: u32, index_at: u64) -> Option<(Vec<Batch>, Vec<Digest>)> {
    let (table, hashes) = index.split_at_checked(to_usize(batches.into()) * 8)?;
    let (hashes, _) = hashes.as_chunks::<32>();
    let mut c = Cursor::new(table);
    let (mut at, mut first, mut out) = (HEADER as u64, 0u32, Vec::new());
    for _ in 0..batches {
        let (pages, len) = (c.u32_le()?, c.u32_le()?);
        // zstd makes nothing twice as long.
        if pages == 0 || to_usize(pages.into()) > BATCH || to_usize(len.into()) > 2 * BATCH * PAGE_BYTES {
            return None;
        }
        out.push(Batch { at, len, pages, first });
        at = at.checked_add(len.into())?;
        first = first.checked_add(pages)?;
    }
    let fits = at == index_at && to_usize(first.into()) == hashes.len();
    fits.then(|| (out, hashes.to_vec()))
}

fn read_at(path: &Path, file: &File, buf: &mut [u8], at: u64) -> Result<()> {
    file.read_exact_at(buf, at).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => corrupt(path, "it is cut off"),
        _ => Error::io(path, "read", e),
    })
}

fn corrupt(path: &Path, what: &str) -> Error {
    Error::file(ErrorKind::Corrupt, path, what).mend(MEND)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(n: u32) -> [u8; PAGE_BYTES] {
        let mut page = [0; PAGE_BYTES];
        page.as_chunks_mut::<4>().0.iter_mut().step_by(7).for_each(|word| *word = n.to_le_bytes());
        page
    }

    fn written(dir: &Path, pages: u32) -> (PathBuf, PackId) {
        let path = dir.join("a.pack");
        let mut writer = PackWriter::create(&path).unwrap();
        for n in 0..pages {
            writer.push(blake3::hash(&page(n)).as_bytes(), &page(n)).unwrap();
        }
        (path, writer.finish().unwrap())
    }

    #[test]
    fn pages_come_back_in_any_order() {
        let dir = tempfile::tempdir().unwrap();
        let (path, id) = written(dir.path(), 1000);
        let pack = Pack::open(&path, id).unwrap();
        pack.verify().unwrap();
        let mut out = [0; PAGE_BYTES];
        for n in [999, 0, 255, 256, 512, 511, 0] {
            pack.read(n, &mut out).unwrap();
            assert_eq!(out, page(n), "{n}");
        }
        assert!(pack.read(1000, &mut out).is_err());
        assert_eq!(pack.hashes().len(), 1000);
    }

    #[test]
    fn the_same_pages_have_the_same_name() {
        let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert_eq!(written(one.path(), 300).1, written(two.path(), 300).1);
        assert_ne!(
            written(tempfile::tempdir().unwrap().path(), 299).1,
            written(tempfile::tempdir().unwrap().path(), 300).1
        );
    }

    #[test]
    fn an_empty_pack_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let (path, id) = written(dir.path(), 0);
        assert!(Pack::open(&path, id).unwrap().hashes().is_empty());
    }

    #[test]
    fn every_cut_and_every_wrong_byte_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, id) = written(dir.path(), 300);
        let whole = std::fs::read(&path).unwrap();
        let fails = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            Pack::open(&path, id).and_then(|pack| pack.verify())
        };
        for at in (0..whole.len()).step_by(97).chain([whole.len() - 1]) {
            fails(&whole[..at]).unwrap_err();
            let mut wrong = whole.clone();
            wrong[at] ^= 1;
            // What is reserved is not looked at.
            if !(12..16).contains(&at) {
                let error = fails(&wrong).unwrap_err();
                assert!(error.to_string().contains("a.pack"), "{error}");
            }
        }
        fails(&whole).unwrap();
    }

    #[test]
    fn a_newer_version_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (path, id) = written(dir.path(), 3);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[8] = 2;
        std::fs::write(&path, bytes).unwrap();
        let error = Pack::open(&path, id).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains("version 2"), "{error}");
    }
}
