//! The log of dirty pages that live migration needs: a bitmap in memory shared with the frontend, in which each page of guest
//! memory that we write is marked *after* it was written (QEMU docs/interop/vhost-user.rst, "Migration").
//!
//! The frontend clears a bit before it copies the page. Were a page marked before it is written, the copy could miss the
//! write and nothing would say so.

use super::GuestMap;
use crate::io::buf::IoBuf;
use memmap2::{MmapOptions, MmapRaw};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

/// log2 of the bytes that a bit stands for (VHOST_LOG_PAGE).
const PAGE_BITS: u32 = 12;

/// The frontend's bitmap, mapped. Page `n` is bit `n % 8` of byte `n / 8`.
#[derive(Debug)]
pub struct DirtyLog {
    map: MmapRaw,
    /// A page was outside the bitmap, and it was told.
    outside: AtomicBool,
}

/// What a queue logs.
#[derive(Clone, Debug)]
pub struct Logging {
    /// Where to.
    pub log: Arc<DirtyLog>,
    /// Data and status bytes (VHOST_F_LOG_ALL).
    pub data: bool,
    /// The used ring, by the address that the frontend gave for it (VHOST_VRING_F_LOG).
    pub used: Option<u64>,
}

impl DirtyLog {
    /// Maps `size` bytes at `offset` of the file that the frontend sent.
    ///
    /// # Errors
    /// When the file is shorter than that (touching it would be SIGBUS), or cannot be mapped.
    pub fn open(file: &File, offset: u64, size: u64) -> io::Result<Self> {
        let there = file.metadata()?.len();
        let len = usize::try_from(size).ok().filter(|_| offset.checked_add(size).is_some_and(|end| end <= there));
        let Some(len) = len else {
            return Err(io::Error::other(format!("{size} bytes at {offset} of a file of {there}")));
        };
        let map = MmapOptions::new().offset(offset).len(len).map_raw(file)?;
        Ok(DirtyLog { map, outside: AtomicBool::new(false) })
    }

    /// Marks the pages of `[address, address + len)` of guest memory. Pages that the bitmap has no place for are passed over:
    /// the frontend made it as large as its memory.
    pub fn mark(&self, address: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|n| address.saturating_add(n) >> PAGE_BITS) else { return };
        let (mut page, end) = (address >> PAGE_BITS, last.saturating_add(1));
        while page < end {
            let next = (page / 8 + 1).saturating_mul(8).min(end);
            let bits = (0xFFu8 << (page % 8)) & (0xFFu8 >> ((8 - next % 8) % 8));
            let Some(at) = usize::try_from(page / 8).ok().filter(|at| *at < self.map.len()) else {
                if !self.outside.swap(true, Ordering::Relaxed) {
                    log::error!("guest address {address:#x} is outside the frontend's log of dirty pages");
                }
                return;
            };
            // SAFETY: the byte lies in the mapping, which lives as long as this, and whose file covers it (`open`). The
            // frontend changes it at the same time, by atomic operations too.
            let byte = unsafe { AtomicU8::from_ptr(self.map.as_mut_ptr().add(at)) };
            byte.fetch_or(bits, Ordering::SeqCst);
            page = next;
        }
    }

    /// Marks what a piece of guest memory covers that a request has written. The piece was made from a region of `map`.
    pub fn mark_piece(&self, map: &GuestMap, piece: &IoBuf) {
        let at = piece.as_ptr() as usize;
        for region in map.iter() {
            let inside = at.wrapping_sub(region.as_ptr() as usize) as u64;
            if inside < region.len() {
                return self.mark(region.start_addr().raw_value() + inside, piece.len() as u64);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(offset: u64, ranges: &[(u64, u64)]) -> Vec<u64> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(offset + 4).unwrap();
        let log = DirtyLog::open(&file, offset, 4).unwrap();
        for (address, len) in ranges {
            log.mark(*address, *len);
        }
        let mut bytes = vec![0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, offset).unwrap();
        (0..32).filter(|page| bytes[*page / 8] >> (page % 8) & 1 == 1).map(|page| page as u64).collect()
    }

    #[test]
    fn exactly_the_pages_of_a_range_are_marked() {
        assert_eq!(marked(0, &[(0, 1)]), [0]);
        assert_eq!(marked(0, &[(4095, 1), (4096 * 9, 4096)]), [0, 9]);
        assert_eq!(marked(0, &[(4095, 2)]), [0, 1]);
        assert_eq!(marked(0, &[(5000, 0)]), [0u64; 0]);
        assert_eq!(marked(4096, &[(4096 * 6 + 7, 4096 * 12)]), (6..=18).collect::<Vec<_>>());
        for first in 0..32u64 {
            for last in first..32 {
                assert_eq!(marked(0, &[(first << 12, (last - first + 1) << 12)]), (first..=last).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn what_the_bitmap_has_no_place_for_is_passed_over() {
        assert_eq!(marked(0, &[(31 << 12, 8192), (32 << 12, 1), (u64::MAX, 1), (u64::MAX - 5, 100)]), [31]);
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        for (offset, size) in [(0, 101), (100, 1), (u64::MAX, 1), (1, u64::MAX)] {
            assert!(DirtyLog::open(&file, offset, size).is_err(), "{offset} {size}");
        }
    }
}
