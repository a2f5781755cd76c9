//! The live bitmap: a fully allocated file on tmpfs, mapped shared, that outlives the process (see `FORMAT.md`).

use super::bits::is_valid;
use super::header::Session;
use super::layout::index;
use crate::codec::{Cursor, hex};
use crate::error::{Error, Result};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const MAGIC: [u8; 8] = *b"VMARLIVE";
const VERSION: u32 = 2;
/// Reads differently on a host of the other byte order.
const BYTE_ORDER: u32 = 0x0102_0304;
/// The words start here: one page, so that they are aligned however the header grows.
const HEADER_LEN: usize = 4096;
/// Bytes of the header that the checksum covers; it stands behind them.
const CHECKED_LEN: usize = 72;
/// Words that change while the session lasts, so the checksum does not cover them.
/// Not zero once an fsync of this session failed.
const FAILED_AT: usize = 1024;
/// The flush counter that the overlay's header has, and the one that it is about to get.
const FLUSHES_AT: usize = 1032;
const FLUSHES_NEXT_AT: usize = 1040;
/// Not zero while the guest has switched the write cache off.
const WRITE_THROUGH_AT: usize = 1048;
/// Where the seal behind the overlay file's end is; 0: there is none.
const SEAL_AT: usize = 1056;

/// What a live bitmap belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LiveId {
    pub session: Session,
    /// Device and inode of the overlay file: a copy of the file is not the file.
    pub dev: u64,
    pub ino: u64,
    pub clusters: u64,
}

impl LiveId {
    /// The identity for the open overlay `file`.
    pub fn of(file: &File, session: Session, clusters: u64) -> io::Result<LiveId> {
        let meta = file.metadata()?;
        Ok(LiveId { session, dev: meta.dev(), ino: meta.ino(), clusters })
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_ne_bytes());
        out.extend(BYTE_ORDER.to_ne_bytes());
        out.extend(self.session.id);
        out.extend(self.session.boot);
        for n in [self.dev, self.ino, self.clusters] {
            out.extend(n.to_ne_bytes());
        }
        debug_assert_eq!(out.len(), CHECKED_LEN);
        out.extend(crc32c::crc32c(&out).to_ne_bytes());
        out
    }

    /// The identity in a header, or why there is none.
    fn parse(bytes: &[u8]) -> Result<LiveId, String> {
        let checked = bytes.get(..CHECKED_LEN).ok_or("it is cut off")?;
        let mut c = Cursor::new(bytes);
        if c.array() != Some(MAGIC) {
            return Err("it is no live bitmap".into());
        }
        let fields = |c: &mut Cursor| {
            let (version, order) = (c.array()?, c.array()?);
            let session = Session { id: c.array()?, boot: c.array()? };
            let (dev, ino, clusters) = (c.array()?, c.array()?, c.array()?);
            let [dev, ino, clusters] = [dev, ino, clusters].map(u64::from_ne_bytes);
            let [version, order, crc] = [version, order, c.array()?].map(u32::from_ne_bytes);
            Some((version, order, LiveId { session, dev, ino, clusters }, crc))
        };
        let (version, order, id, crc) = fields(&mut c).ok_or("it is cut off")?;
        if order != BYTE_ORDER {
            return Err("it was written in another byte order".into());
        }
        if version != VERSION {
            return Err(format!("its format is {version} and this vmar knows format {VERSION}"));
        }
        if crc != crc32c::crc32c(checked) {
            return Err("the checksum of its header is wrong".into());
        }
        Ok(id)
    }
}

/// A live bitmap, mapped.
#[derive(Debug)]
pub(super) struct LiveFile {
    path: PathBuf,
    map: memmap2::MmapRaw,
    words: usize,
    /// Still under its temporary name, and removed when dropped.
    pending: bool,
}

/// What `open` finds.
#[derive(Debug)]
pub(super) enum Found {
    Matching(LiveFile),
    Missing,
    /// There is one, and why it is not this overlay's.
    Foreign(String),
}

/// Where the live bitmap of a session is.
pub(super) fn path_of(dir: &Path, session: &Session) -> PathBuf {
    dir.join(format!("{}.live", hex(&session.id)))
}

impl LiveFile {
    /// Makes a live bitmap in which every word is 0. It has its final name only after [`publish`](Self::publish).
    pub fn create(dir: &Path, id: &LiveId) -> Result<LiveFile> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(|e| state(dir, e))?;
        let path = path_of(dir, &id.session).with_extension("live.tmp");
        let words = index(id.clusters);
        let len = HEADER_LEN + words * 8;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| state(&path, e))?;
        let made = reserve(&file, len)
            .and_then(|()| file.write_all_at(&id.encode(), 0))
            .and_then(|()| memmap2::MmapOptions::new().len(len).map_raw(&file));
        match made {
            Ok(map) => Ok(LiveFile { path, map, words, pending: true }),
            Err(e) => {
                let _ = fs::remove_file(&path);
                Err(Error::io(&path, &format!("reserve {len} bytes for the live bitmap"), e))
            }
        }
    }

    /// Gives it its final name.
    pub fn publish(&mut self) -> Result<()> {
        let path = self.path.with_extension("");
        fs::rename(&self.path, &path).map_err(|e| Error::io(&path, "create", e))?;
        self.path = path;
        self.pending = false;
        Ok(())
    }

    /// Looks for the live bitmap of `id` in `dir`.
    pub fn open(dir: &Path, id: &LiveId) -> Result<Found> {
        let path = path_of(dir, &id.session);
        let open = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&path);
        let file = match open {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Missing),
            Err(e) => return Err(Error::io(&path, "open", e)),
        };
        let found = match read_header(&file).map_err(|e| Error::io(&path, "read", e))? {
            Ok(found) => found,
            Err(why) => return Ok(Found::Foreign(why)),
        };
        if (found.dev, found.ino) != (id.dev, id.ino) {
            return Ok(Found::Foreign("it belongs to another file, of which this one is a copy".into()));
        }
        if found != *id {
            return Ok(Found::Foreign("it belongs to another session".into()));
        }
        let words = index(id.clusters);
        let len = HEADER_LEN + words * 8;
        let actual = file.metadata().map_err(|e| Error::io(&path, "read", e))?.len();
        if actual != len as u64 {
            return Ok(Found::Foreign(format!("it has {actual} bytes in place of {len}")));
        }
        let map = memmap2::MmapOptions::new().len(len).map_raw(&file).map_err(|e| Error::io(&path, "map", e))?;
        let live = LiveFile { path, map, words, pending: false };
        match live.words().iter().position(|w| !is_valid(w.load(Ordering::Acquire))) {
            Some(n) => Ok(Found::Foreign(format!("cluster {n} has subclusters that are both data and zero in it"))),
            None => Ok(Found::Matching(live)),
        }
    }

    /// The words: state of each cluster's subclusters.
    pub fn words(&self) -> &[AtomicU64] {
        // SAFETY: `create` and `open` mapped HEADER_LEN + 8 * words bytes, shared and writable, and the mapping lives as
        // long as self. It starts on a page and HEADER_LEN is a multiple of 8, so the words are aligned. AtomicU64 has
        // the layout of u64, every bit pattern is valid, and all access in this and any other vmar process is atomic.
        // The file is never truncated: only vmar opens it, in a directory that is its owner's alone.
        unsafe { std::slice::from_raw_parts(self.map.as_mut_ptr().add(HEADER_LEN).cast(), self.words) }
    }

    /// One of the changing words of the header.
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at + 8 <= HEADER_LEN);
        // SAFETY: as for `words`; the word is aligned and inside the header page.
        unsafe { &*self.map.as_mut_ptr().add(at).cast::<AtomicU64>() }
    }

    /// Remembers that an fsync failed, also for the process that comes after this one.
    pub fn set_failed(&self) {
        self.word(FAILED_AT).store(1, Ordering::Release);
    }

    pub fn has_failed(&self) -> bool {
        self.word(FAILED_AT).load(Ordering::Acquire) != 0
    }

    /// The flush counter that the overlay's header has. While it is being written, it may be the second one already.
    pub fn flushes(&self) -> (u64, u64) {
        (self.word(FLUSHES_AT).load(Ordering::Acquire), self.word(FLUSHES_NEXT_AT).load(Ordering::Acquire))
    }

    /// Called before the header gets that counter.
    pub fn begin_counting(&self, flushes: u64) {
        self.word(FLUSHES_NEXT_AT).store(flushes, Ordering::Release);
    }

    /// Called after the header has got that counter.
    pub fn end_counting(&self, flushes: u64) {
        self.word(FLUSHES_NEXT_AT).store(flushes, Ordering::Release);
        self.word(FLUSHES_AT).store(flushes, Ordering::Release);
    }

    pub fn write_through(&self) -> bool {
        self.word(WRITE_THROUGH_AT).load(Ordering::Acquire) != 0
    }

    pub fn set_write_through(&self, on: bool) {
        self.word(WRITE_THROUGH_AT).store(on.into(), Ordering::Release);
    }

    pub fn seal(&self) -> u64 {
        self.word(SEAL_AT).load(Ordering::Acquire)
    }

    pub fn set_seal(&self, at: u64) {
        self.word(SEAL_AT).store(at, Ordering::Release);
    }

    /// Removes the file; the mapping stays usable until dropped.
    pub fn remove(&self) -> Result<()> {
        match fs::remove_file(&self.path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::io(&self.path, "remove", e)),
            _ => Ok(()),
        }
    }
}

impl Drop for LiveFile {
    fn drop(&mut self) {
        if self.pending {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The error for a live bitmap that cannot be made.
fn state(path: &Path, err: io::Error) -> Error {
    let mend = match err.kind() {
        io::ErrorKind::StorageFull => "free some space on that file system and try again",
        _ => "name a directory on tmpfs that this user can write with --state-dir",
    };
    Error::io(path, "create the overlay's live state", err).mend(mend)
}

/// Allocates all of it, so that a full tmpfs shows here and not as SIGBUS in a write.
fn reserve(file: &File, len: usize) -> io::Result<()> {
    let len = libc::off_t::try_from(len).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
    // SAFETY: plain system call on an open descriptor.
    match unsafe { libc::posix_fallocate(file.as_raw_fd(), 0, len) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

fn read_header(file: &File) -> io::Result<Result<LiveId, String>> {
    let mut bytes = [0; CHECKED_LEN + 4];
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => Ok(LiveId::parse(&bytes)),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(Err("it is cut off".into())),
        Err(e) => Err(e),
    }
}

/// Removes live bitmaps of earlier sessions of the same overlay file: left by a kill between closing a session and
/// removing its bitmap, or by an overlay that was deleted and whose inode number is used again. The caller holds the
/// overlay's lock and has decided that none of them holds anything that counts.
pub(super) fn remove_stale(dir: &Path, id: &LiveId) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|e| e.path()) {
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        if !(name.ends_with(".live") || name.ends_with(".live.tmp")) || path == path_of(dir, &id.session) {
            continue;
        }
        let header = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(&path);
        if let Ok(Ok(Ok(found))) = header.map(|f| read_header(&f))
            && (found.dev, found.ino) == (id.dev, id.ino)
            && found.session.id != id.session.id
            && let Err(e) = fs::remove_file(&path)
        {
            log::warn!("{}: cannot remove an old live bitmap: {e}", path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id() -> LiveId {
        LiveId { session: Session { id: [3; 16], boot: [4; 16] }, dev: 1, ino: 2, clusters: 9 }
    }

    #[test]
    fn what_is_stored_is_found_again_and_only_by_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("made/below");
        let mut live = LiveFile::create(&dir, &id()).unwrap();
        assert!(matches!(LiveFile::open(&dir, &id()).unwrap(), Found::Missing));
        live.publish().unwrap();
        live.words()[8].store(77, Ordering::Relaxed);
        live.set_failed();
        live.begin_counting(6);
        live.set_write_through(true);
        live.set_seal(4096);
        drop(live);
        match LiveFile::open(&dir, &id()).unwrap() {
            Found::Matching(live) => {
                assert_eq!(live.words()[8].load(Ordering::Relaxed), 77);
                assert!(live.has_failed() && live.write_through());
                assert_eq!((live.flushes(), live.seal()), ((0, 6), 4096));
            }
            other => panic!("{other:?}"),
        }
        for (other, why) in [
            (LiveId { ino: 3, ..id() }, "another file"),
            (LiveId { clusters: 10, ..id() }, "another session"),
            (LiveId { session: Session { boot: [5; 16], ..id().session }, ..id() }, "another session"),
        ] {
            match LiveFile::open(&dir, &other).unwrap() {
                Found::Foreign(text) => assert!(text.contains(why), "{text}"),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn every_flipped_bit_of_the_header_is_noticed() {
        let bytes = id().encode();
        assert_eq!(LiveId::parse(&bytes), Ok(id()));
        for at in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[at / 8] ^= 1 << (at % 8);
            assert!(LiveId::parse(&bad).is_err(), "bit {at}");
        }
        for len in 0..bytes.len() {
            assert!(LiveId::parse(&bytes[..len]).is_err());
        }
    }

    #[test]
    fn one_that_was_never_published_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        drop(LiveFile::create(dir.path(), &id()).unwrap());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn stale_ones_of_the_same_file_go_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let session = |n| Session { id: [n; 16], boot: [4; 16] };
        for (n, ino) in [(1, 2), (2, 2), (3, 99)] {
            LiveFile::create(dir.path(), &LiveId { session: session(n), ino, ..id() }).unwrap().publish().unwrap();
        }
        remove_stale(dir.path(), &LiveId { session: session(2), ..id() });
        let left: Vec<bool> = (1..=3).map(|n| path_of(dir.path(), &session(n)).exists()).collect();
        assert_eq!(left, [false, true, true]);
    }
}
