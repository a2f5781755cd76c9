//! The engine for what the page cache is known to hold: a copy from a mapping of the file, without a system call.
//!
//! Touching a mapped page that is not in the cache would put the thread to sleep until the disk has read it, and every
//! request behind it with it. So pages are *warm* or not:
//! - A page becomes warm when a read that cannot sleep ([`super::nowait`]) has just found it in the cache. Only ranges that
//!   are warm throughout are copied here; all others go the way of misses.
//! - The kernel may take a warm page away, which nothing tells. But it takes first what was not used for long, and it
//!   counts for each thread the faults that had to wait. Whoever copies asks for that count now and then
//!   ([`Watch::faulted`]), and when it has grown, all pages of all files are cold again, and stay so for a while that
//!   doubles as long as this goes on ([`Hot::cool`]). A host that is short of memory so costs a thread a sleep now and then,
//!   not one for each page.
//! - A page that is lost for good (the file was truncated, the disk fails) ends the copy ([`super::guarded`]); the file is
//!   never copied from again, and the request goes to the engine that tells errors.

use super::buf::{IoBuf, total_len};
use super::guarded;
use crate::units::to_usize;
use memmap2::{Advice, MmapOptions, MmapRaw, UncheckedAdvice};
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// log2 of the bytes that are warm or not: a page.
const PAGE_BITS: u32 = 12;

/// Pages that one word tells of.
const WORD_PAGES: u64 = 64;

/// How long all pages stay cold when some were lost for the first time, and at most.
const COLD_FIRST: Duration = Duration::from_secs(1);
const COLD_MAX: Duration = Duration::from_secs(60);

/// A file that is copied from. Shared by all threads that read it.
#[derive(Debug)]
pub struct Hot {
    map: MmapRaw,
    /// A bit a page, in memory that costs nothing as long as it is zero.
    warm: MmapRaw,
    /// The kernel tells us which pages are in the cache.
    told: bool,
    broken: AtomicBool,
    start: Instant,
    /// Until when no page becomes warm, and how long that was; in milliseconds since `start`.
    cold_until: AtomicU64,
    cold_for: AtomicU64,
}

impl Hot {
    /// Maps the first `len` bytes of a regular file. `None` where that cannot be done; the file is then read by system calls
    /// alone.
    pub fn map(file: &File, len: u64) -> Option<Hot> {
        Self::try_map(file, len).inspect_err(|e| log::debug!("a file is not mapped: {e}")).ok()
    }

    fn try_map(file: &File, len: u64) -> io::Result<Hot> {
        guarded::install()?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        let map = MmapOptions::new().len(to_usize(len)).no_reserve_swap().map_raw_read_only(file)?;
        // A page that is lost after all is read alone. Pages that are there are mapped by the sixteen all the same.
        map.advise(Advice::Random)?;
        let words = len.div_ceil(WORD_PAGES << PAGE_BITS).max(1);
        let warm = MmapOptions::new().len(to_usize(words * 8)).no_reserve_swap().map_anon()?.into();
        Ok(Hot {
            map,
            warm,
            told: super::cold::may_ask(file)?,
            broken: AtomicBool::new(false),
            start: Instant::now(),
            cold_until: AtomicU64::new(0),
            cold_for: AtomicU64::new(0),
        })
    }

    /// Fills the list from `offset` on if all of it is warm. False: nothing, or something that is to be read again.
    pub fn read(&self, bufs: &[IoBuf], offset: u64) -> bool {
        let len = total_len(bufs) as u64;
        if !self.is_warm(offset, len) {
            return false;
        }
        let mut from = self.map.as_ptr().wrapping_add(to_usize(offset));
        for buf in bufs {
            // SAFETY: `install` was called when this was made. `is_warm` has checked that the range lies in the mapping; the
            // makers of the IoBufs promised that theirs is mapped; they point to guest memory or a buffer of ours, never
            // into a mapping of an image, and no reference covers either.
            let left = unsafe { guarded::copy(buf.as_ptr(), from, buf.len()) };
            if left > 0 {
                self.broken.store(true, Ordering::Relaxed);
                self.clear();
                log::error!(
                    "a mapped page was lost: the file was truncated, or its disk fails; it is not mapped any more"
                );
                return false;
            }
            from = from.wrapping_add(buf.len());
        }
        true
    }

    /// Has the processor fetch the first lines of a copy from `offset` to `buf`, and with them the translations of their
    /// addresses. A hint: it touches nothing, whatever the addresses are.
    #[inline]
    pub fn fetch(&self, offset: u64, buf: &IoBuf) {
        if offset < self.map.len() as u64 {
            guarded::fetch(self.map.as_ptr().wrapping_add(to_usize(offset)), buf.as_ptr());
        }
    }

    /// The range was just found in the page cache.
    pub fn mark(&self, offset: u64, len: u64) {
        let Some(end) = offset.checked_add(len).filter(|end| *end <= self.map.len() as u64) else { return };
        if len == 0 || self.broken.load(Ordering::Relaxed) || self.now() < self.cold_until.load(Ordering::Relaxed) {
            return;
        }
        for (word, mask) in masks(offset, end) {
            // Not written if it would change nothing: threads share the line.
            if self.word(word).load(Ordering::Relaxed) & mask != mask {
                self.word(word).fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    /// Forgets what is warm, and learns anew after a while.
    pub fn cool(&self) {
        let now = self.now();
        let last = self.cold_until.load(Ordering::Relaxed);
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let before = self.cold_for.load(Ordering::Relaxed);
        // Soon after the last time: it was too short.
        let time = if before > 0 && now < last + before { (before * 2).min(ms(COLD_MAX)) } else { ms(COLD_FIRST) };
        self.cold_for.store(time, Ordering::Relaxed);
        self.cold_until.store(now + time, Ordering::Relaxed);
        self.clear();
    }

    /// Bytes that are warm.
    pub fn warm_bytes(&self) -> u64 {
        let words = 0..self.warm.len() / 8;
        words.map(|word| u64::from(self.word(word).load(Ordering::Relaxed).count_ones())).sum::<u64>() << PAGE_BITS
    }

    /// True if the range is not empty and was found in the page cache.
    #[inline]
    pub fn is_warm(&self, offset: u64, len: u64) -> bool {
        let Some(end) = offset.checked_add(len).filter(|end| *end <= self.map.len() as u64) else { return false };
        len > 0 && masks(offset, end).all(|(word, mask)| self.word(word).load(Ordering::Relaxed) & mask == mask)
    }

    /// True if the kernel says that the range is in the page cache (mincore(2)), which it does of every range to a process
    /// that neither owns the file nor may write it. Fetches nothing.
    pub fn is_cached(&self, offset: u64, len: u64) -> bool {
        let Some(end) = offset.checked_add(len).filter(|end| *end <= self.map.len() as u64) else { return false };
        let mut pages = [0u8; 64];
        let start = offset >> PAGE_BITS << PAGE_BITS;
        (start..end).step_by(pages.len() << PAGE_BITS).all(|at| {
            let len = to_usize(end - at).min(pages.len() << PAGE_BITS);
            let from = self.map.as_mut_ptr().wrapping_add(to_usize(at));
            // SAFETY: the range lies in the mapping and begins at a page, and there is a byte for each of its pages.
            let told = unsafe { libc::mincore(from.cast(), len, pages.as_mut_ptr()) };
            told == 0 && pages[..len.div_ceil(1 << PAGE_BITS)].iter().all(|page| page & 1 == 1)
        })
    }

    /// The pages of a range that are not in the page cache, as {start, length}; `offset` is a multiple of a page. `None` when
    /// that cannot be known. Fetches nothing.
    pub fn absent(&self, offset: u64, len: u64) -> Option<Vec<(u64, u64)>> {
        if self.told { super::cold::absent(&self.map, offset, len) } else { None }
    }

    /// What another thread marks meanwhile may stay or go: it was in the cache a moment ago.
    fn clear(&self) {
        // SAFETY: the memory is private and anonymous, reads as zeros from then on, and is reached through atomics only.
        let cleared = unsafe { self.warm.unchecked_advise(UncheckedAdvice::DontNeed) };
        if cleared.is_err() {
            (0..self.warm.len() / 8).for_each(|word| self.word(word).store(0, Ordering::Relaxed));
        }
    }

    #[inline]
    fn word(&self, word: usize) -> &AtomicU64 {
        let at = self.warm.as_mut_ptr().cast::<u64>().wrapping_add(word);
        debug_assert!(word < self.warm.len() / 8);
        // SAFETY: callers pass words of pages inside the mapping, which `warm` has one for, or less than its length; it is
        // page-aligned, lives as long as this, and all accesses are atomic.
        unsafe { AtomicU64::from_ptr(at) }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

/// The words and bits of the pages that `[offset, end)` touches; the range is not empty.
#[inline]
fn masks(offset: u64, end: u64) -> impl Iterator<Item = (usize, u64)> {
    let (first, last) = (offset >> PAGE_BITS, (end - 1) >> PAGE_BITS);
    (first / WORD_PAGES..=last / WORD_PAGES).map(move |word| {
        let low = first.saturating_sub(word * WORD_PAGES);
        let high = (last - word * WORD_PAGES).min(WORD_PAGES - 1);
        (to_usize(word), (u64::MAX << low) & (u64::MAX >> (WORD_PAGES - 1 - high)))
    })
}

/// Watches whether this thread had to wait for pages. Belongs to one thread.
#[derive(Debug, Default)]
pub struct Watch {
    seen: Option<i64>,
}

impl Watch {
    /// True if this thread has waited for a page since it was last asked. One system call.
    pub fn faulted(&mut self) -> bool {
        let now = major_faults();
        let before = self.seen.replace(now);
        before.is_some_and(|before| now > before)
    }
}

/// Faults of this thread that had to wait for a disk.
fn major_faults() -> i64 {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: the kernel fills the struct; all zeros is a valid one too, if it does not.
    unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init().ru_majflt
    }
}

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn file(pages: usize) -> (File, Vec<u8>) {
        let file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..pages * 4096).map(|i| (i / 4096 * 7 + i % 256) as u8).collect();
        file.write_all_at(&data, 0).unwrap();
        (file, data)
    }

    fn read(hot: &Hot, offset: u64, len: usize) -> Option<Vec<u8>> {
        let mut out = vec![0xAA; len];
        // SAFETY: `out` outlives the call, and is not used meanwhile.
        let bufs = unsafe {
            [
                IoBuf::from_raw(out.as_mut_ptr(), len / 3),
                IoBuf::from_raw(out.as_mut_ptr().wrapping_add(len / 3), len - len / 3),
            ]
        };
        hot.read(&bufs, offset).then_some(out)
    }

    #[test]
    fn only_what_is_warm_throughout_is_copied() {
        let (file, data) = file(200);
        let hot = Hot::map(&file, data.len() as u64).unwrap();
        assert_eq!(read(&hot, 0, 4096), None);
        hot.mark(4096 * 60 + 100, 4096 * 70);
        assert_eq!(hot.warm_bytes(), 71 * 4096);
        for (offset, len) in [(60 * 4096, 71 * 4096), (60 * 4096 + 1, 10), (100 * 4096 - 3, 4096), (130 * 4096, 4096)] {
            assert_eq!(read(&hot, offset as u64, len).unwrap(), data[offset..offset + len]);
        }
        for (offset, len) in [(60 * 4096 - 1, 2), (131 * 4096 - 1, 2), (0, 200 * 4096), (199 * 4096, 4096)] {
            assert_eq!(read(&hot, offset, len), None, "{offset} {len}");
        }
    }

    #[test]
    fn every_range_has_exactly_its_pages() {
        for first in 0..140u64 {
            for last in first..140 {
                let mut pages = Vec::new();
                for (word, mask) in masks(first << 12, (last << 12) + 1) {
                    pages.extend((0..64).filter(|bit| mask >> bit & 1 == 1).map(|bit| word as u64 * 64 + bit));
                }
                assert_eq!(pages, (first..=last).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn the_kernel_tells_what_is_cached() {
        let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        std::io::Write::write_all(&mut file, &vec![7; 200 << PAGE_BITS]).unwrap();
        file.as_file().sync_all().unwrap();
        let hot = Hot::map(file.as_file(), 200 << PAGE_BITS).unwrap();
        assert!(hot.is_cached(0, 200 << PAGE_BITS) && hot.is_cached(100, 70 << PAGE_BITS));
        assert!(!hot.is_cached(0, (200 << PAGE_BITS) + 1) && !hot.is_cached(u64::MAX, 2));
        rustix::fs::fadvise(file.as_file(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
        assert!(!hot.is_cached(0, 200 << PAGE_BITS) && !hot.is_cached(199 << PAGE_BITS, 1));
    }

    #[test]
    fn ranges_outside_are_never_warm() {
        let (file, _) = file(2);
        let hot = Hot::map(&file, 8192).unwrap();
        hot.mark(0, 8192);
        hot.mark(4096, 4097);
        hot.mark(u64::MAX, 2);
        for (offset, len) in [(0, 8193), (8192, 1), (u64::MAX, 1), (4096, 4097), (0, 0)] {
            assert_eq!(read(&hot, offset, len), None, "{offset} {len}");
        }
        assert_eq!(hot.warm_bytes(), 8192);
    }

    #[test]
    fn a_file_that_was_truncated_is_not_copied_from_again() {
        let (file, data) = file(8);
        let hot = Hot::map(&file, data.len() as u64).unwrap();
        hot.mark(0, data.len() as u64);
        assert_eq!(read(&hot, 0, 8192).unwrap(), data[..8192]);
        file.set_len(4096).unwrap();
        assert_eq!(read(&hot, 0, 8192), None);
        hot.mark(0, 4096);
        assert_eq!(read(&hot, 0, 4096), None);
    }

    #[test]
    fn what_was_cooled_stays_cold_for_a_while() {
        let (file, data) = file(8);
        let hot = Hot::map(&file, data.len() as u64).unwrap();
        hot.mark(0, 4096);
        hot.cool();
        hot.mark(0, 4096);
        assert_eq!((read(&hot, 0, 4096), hot.warm_bytes()), (None, 0));
        let first = hot.cold_for.load(Ordering::Relaxed);
        hot.cool();
        assert_eq!(hot.cold_for.load(Ordering::Relaxed), 2 * first);
        hot.cold_until.store(0, Ordering::Relaxed);
        hot.mark(0, 4096);
        assert_eq!(read(&hot, 0, 4096).unwrap(), data[..4096]);
    }
}
