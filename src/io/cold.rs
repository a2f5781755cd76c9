//! Reads of whole files that leave the page cache as it was: who looks through images once must not push out of memory
//! what running VMs read all day.
//!
//! A range that is in the cache already is copied from there. Anything else is read past the cache (O_DIRECT) or, where
//! the file system does not do that, through the cache, and the pages that were not there before are dropped again.
//!
//! Limit: the kernel tells only the owner of a file, root, and who may write to it what is cached. Others read past the
//! cache; where that is not possible they leave behind what they read.

use crate::units::{BLOCK_SIZE, to_usize};
use memmap2::{MmapMut, MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// What offset, length and memory of a read past the cache are multiples of: a page, enough for every disk.
const ALIGN: u64 = BLOCK_SIZE;

/// Memory that reads past the cache may fill.
#[derive(Debug)]
pub struct Pages(MmapMut);

impl Pages {
    /// So many bytes, rounded up to pages.
    pub fn new(len: u64) -> io::Result<Pages> {
        MmapMut::map_anon(to_usize(len.max(1).next_multiple_of(ALIGN))).map(Pages)
    }
}

/// A file to look through. Shared by all threads that read it.
#[derive(Debug)]
pub struct Cold {
    file: File,
    /// The same file, open for reads past the cache.
    direct: Option<File>,
    /// The disk or the file system turned out to refuse such reads.
    refused: AtomicBool,
    /// Mapped only to ask what is cached; `None` where that cannot be known.
    map: Option<MmapRaw>,
    /// Ranges that stay in the cache until this is dropped; `None` if nothing stays.
    guests: Option<Mutex<Vec<(u64, u64)>>>,
}

impl Drop for Cold {
    fn drop(&mut self) {
        let guests = self.guests.take().map(|g| g.into_inner().unwrap_or_else(PoisonError::into_inner));
        self.forget(&guests.unwrap_or_default());
    }
}

impl Cold {
    /// The first `size` bytes of a regular file.
    pub fn new(file: File, size: u64) -> io::Result<Cold> {
        // Otherwise the kernel would read on behind each piece, and the next piece would look as if others had cached it.
        super::file::disable_readahead(&file)?;
        let direct = reopen_direct(&file).inspect_err(|e| log::debug!("no reads past the page cache: {e}")).ok();
        let map = may_ask(&file)?.then(|| MmapOptions::new().len(to_usize(size)).map_raw_read_only(&file));
        let map = map.and_then(|map| map.inspect_err(|e| log::debug!("cannot ask what is cached: {e}")).ok());
        Ok(Cold { file, direct, refused: AtomicBool::new(false), map, guests: None })
    }

    /// Reads through the cache, and drops what was not there before only when this is dropped: for a file that is read more
    /// than once by then, if `len` bytes of it are little beside the memory that is free. Otherwise it changes nothing.
    #[must_use]
    pub fn keep_for_now(mut self, len: u64) -> Cold {
        if self.map.is_some() && len < available_memory() / 4 {
            self.guests = Some(Mutex::new(Vec::new()));
        }
        self
    }

    /// Reads `len` bytes at `offset`, a multiple of a block; no more than `pages` hold.
    ///
    /// # Errors
    /// `UnexpectedEof` when the file ends before that.
    pub fn read<'p>(&self, offset: u64, len: u64, pages: &'p mut Pages) -> io::Result<&'p [u8]> {
        debug_assert!(offset.is_multiple_of(ALIGN));
        let room = to_usize(len.next_multiple_of(ALIGN));
        let room = pages.0.get_mut(..room).ok_or(io::ErrorKind::InvalidInput)?;
        let absent = self.absent(offset, len);
        let all_cached = absent.as_ref().is_some_and(Vec::is_empty);
        let through = all_cached || self.guests.is_some() || self.refused.load(Ordering::Relaxed);
        let past = self.direct.as_ref().filter(|_| !through);
        match past.map(|file| read_direct(file, offset, to_usize(len), room)) {
            Some(Err(e)) if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                self.refused.store(true, Ordering::Relaxed);
                self.read_through(offset, to_usize(len), room, absent)?;
            }
            Some(done) => done?,
            None => self.read_through(offset, to_usize(len), room, absent)?,
        }
        Ok(room.get(..to_usize(len)).unwrap_or_default())
    }

    /// Fills `buf` with what is at `offset`, through the cache: for reads that are too small to pass it by. What was not there before is dropped again, or kept for now.
    ///
    /// # Errors
    /// As for [`Cold::read`].
    pub fn read_small(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let page = offset - offset % ALIGN;
        let absent = self.absent(page, offset - page + buf.len() as u64);
        self.read_through(offset, buf.len(), buf, absent)
    }

    /// Reads through the cache and drops what was not there before.
    fn read_through(&self, offset: u64, len: usize, buf: &mut [u8], absent: Option<Vec<(u64, u64)>>) -> io::Result<()> {
        let outcome = self.file.read_exact_at(buf.get_mut(..len).unwrap_or_default(), offset);
        match &self.guests {
            Some(guests) => {
                guests.lock().unwrap_or_else(PoisonError::into_inner).extend(absent.into_iter().flatten());
            }
            None => self.forget(&absent.unwrap_or_default()),
        }
        outcome
    }

    fn forget(&self, ranges: &[(u64, u64)]) {
        for (at, len) in ranges {
            // Only a hint: pages that somebody uses stay, and so does everything if the call fails.
            let _ = rustix::fs::fadvise(&self.file, *at, NonZeroU64::new(*len), rustix::fs::Advice::DontNeed);
        }
    }

    /// The ranges (offset, length) of whole pages that are not in the cache; `None` if that cannot be known.
    fn absent(&self, offset: u64, len: u64) -> Option<Vec<(u64, u64)>> {
        absent(self.map.as_ref()?, offset, len)
    }
}

/// The pages of a mapped range that are not in the page cache, as {start, length}; `offset` is a multiple of a page. `None`
/// when the range is not in the mapping, or the kernel does not tell.
pub(super) fn absent(map: &MmapRaw, offset: u64, len: u64) -> Option<Vec<(u64, u64)>> {
    let end = offset.checked_add(len).filter(|end| *end <= map.len() as u64)?;
    let mut told = vec![0u8; to_usize((end - offset).div_ceil(ALIGN))];
    let from = map.as_mut_ptr().wrapping_add(to_usize(offset));
    // SAFETY: the range lies in the mapping and begins at a page, and there is a byte for each of its pages.
    if unsafe { libc::mincore(from.cast(), to_usize(end - offset), told.as_mut_ptr()) } != 0 {
        return None;
    }
    let mut out: Vec<(u64, u64)> = Vec::new();
    for (page, _) in (0u64..).zip(&told).filter(|(_, told)| **told & 1 == 0) {
        let at = offset + page * ALIGN;
        match out.last_mut() {
            Some((start, len)) if *start + *len == at => *len += ALIGN,
            _ => out.push((at, ALIGN)),
        }
    }
    Some(out)
}

/// Bytes that programs can have without anybody else's being pushed out; 0 if that cannot be known.
fn available_memory() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"));
    line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).unwrap_or(0) << 10
}

/// The same file once more, whatever its name means by now.
fn reopen_direct(file: &File) -> io::Result<File> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    File::options().read(true).custom_flags(libc::O_DIRECT).open(path)
}

/// True if the kernel tells this process what of the file is cached. (It tells others that all is.)
pub(super) fn may_ask(file: &File) -> io::Result<bool> {
    let user = rustix::process::geteuid();
    Ok(user.is_root() || user.as_raw() == file.metadata()?.uid())
}

/// Fills the first `len` bytes of `room`, which is as long as whole pages take: only the end of the file may be short.
fn read_direct(file: &File, offset: u64, len: usize, room: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        match file.read_at(room.get_mut(done..).unwrap_or_default(), offset + done as u64) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
        // The next read must begin at a page; a read that ended elsewhere ended at the end of the file.
        if done < len && !(done as u64).is_multiple_of(ALIGN) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{Advice, fadvise};
    use std::io::Write;

    const PAGES: u64 = 100;

    /// A file on a disk (not tmpfs), of which only pages 10 to 19 are cached.
    fn file() -> (tempfile::NamedTempFile, Vec<u8>) {
        let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let bytes: Vec<u8> = (0..PAGES * 4096 - 1000).map(|i| (i / 4096 + i % 251) as u8).collect();
        file.write_all(&bytes).unwrap();
        file.as_file().sync_all().unwrap();
        fadvise(file.as_file(), 0, None, Advice::DontNeed).unwrap();
        fadvise(file.as_file(), 0, None, Advice::Random).unwrap();
        file.as_file().read_exact_at(&mut [0; 10 * 4096], 10 * 4096).unwrap();
        (file, bytes)
    }

    fn cold(file: &tempfile::NamedTempFile, len: usize, direct: bool) -> Cold {
        let mut cold = Cold::new(file.reopen().unwrap(), len as u64).unwrap();
        if !direct {
            cold.direct = None;
        }
        cold
    }

    #[test]
    fn what_is_read_is_right_and_the_cache_stays_as_it_was() {
        for direct in [true, false] {
            let (file, bytes) = file();
            let cold = cold(&file, bytes.len(), direct);
            let size = bytes.len() as u64;
            let before = cold.absent(0, size).expect("its owner may ask");
            assert_eq!(before, [(0, 10 * 4096), (20 * 4096, 80 * 4096)]);
            let mut pages = Pages::new(7 * 4096).unwrap();
            for at in (0..size).step_by(7 * 4096) {
                let len = (size - at).min(7 * 4096);
                let got = cold.read(at, len, &mut pages).unwrap();
                assert_eq!(got, &bytes[at as usize..(at + len) as usize], "{direct} {at}");
            }
            assert_eq!(cold.absent(0, size).unwrap(), before, "direct: {direct}");
        }
    }

    #[test]
    fn what_is_kept_for_now_goes_in_the_end() {
        let (file, bytes) = file();
        let size = bytes.len() as u64;
        let look = cold(&file, bytes.len(), true);
        let before = look.absent(0, size).unwrap();
        let kept = cold(&file, bytes.len(), true).keep_for_now(size);
        kept.read(0, 64 * 4096, &mut Pages::new(64 * 4096).unwrap()).unwrap();
        assert_eq!(look.absent(0, size).unwrap(), [(64 * 4096, 36 * 4096)], "the next read finds it");
        drop(kept);
        assert_eq!(look.absent(0, size).unwrap(), before);
    }

    #[test]
    fn small_reads_leave_the_cache_as_it_was_too() {
        let (file, bytes) = file();
        let size = bytes.len() as u64;
        let cold = cold(&file, bytes.len(), true);
        let before = cold.absent(0, size).unwrap();
        for (at, len) in [(0, 4096), (8 * 4096, 4 * 4096), (30 * 4096 + 512, 1024), (size - 600, 600)] {
            let mut buf = vec![0; len as usize];
            cold.read_small(&mut buf, at).unwrap();
            assert_eq!(buf, &bytes[at as usize..(at + len) as usize]);
        }
        assert_eq!(cold.absent(0, size).unwrap(), before);
        let err = cold.read_small(&mut [0; 4096], size - 100).unwrap_err();
        assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn the_end_of_the_file_is_an_error_and_not_zeros() {
        for direct in [true, false] {
            let (file, bytes) = file();
            let cold = cold(&file, bytes.len(), direct);
            let mut pages = Pages::new(4 * 4096).unwrap();
            let at = (PAGES - 2) * 4096;
            let err = cold.read(at, 2 * 4096, &mut pages).unwrap_err();
            assert_eq!(err.kind(), io::ErrorKind::UnexpectedEof, "direct: {direct}");
        }
    }

    #[test]
    fn a_file_system_in_memory_is_read_too() {
        let mut file = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
        file.write_all(&[7; 5000]).unwrap();
        let cold = Cold::new(file.reopen().unwrap(), 5000).unwrap();
        let mut pages = Pages::new(8192).unwrap();
        assert_eq!(cold.read(0, 5000, &mut pages).unwrap(), [7; 5000]);
        assert!(cold.read(0, 8193, &mut pages).is_err(), "more than there is room for");
    }
}
