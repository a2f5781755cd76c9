//! Readahead that follows the guest's disk, whichever images it leads through. Pure: offsets in, ranges out.
//!
//! The kernel's own is switched off for the images of a library: it would go on in the file that a piece came from, while
//! the guest goes on with another file at the next entry of the map. What is sequential is decided here by the guest's
//! addresses, and what is read ahead goes through the map as a read does.
//!
//! Guests have a readahead of their own for files; this one is for those that do without (a boot loader, direct reads, a
//! database that scans with small requests), and to have more than a guest's 128 KiB in flight on a slow disk. It never
//! reads further ahead than the guest has read in a row, and leaves alone what is cached. Reads that are copied from
//! mappings ([`crate::io::hot`]) are not looked at; others cost a comparison with each stream.

use std::ops::Range;

/// Sequential readers that are told apart on one queue.
const STREAMS: usize = 4;

/// Bytes in a row before anything is read ahead. A guest's own readahead makes rows, too, which end with its file: with
/// 256 KiB a sixth of what booting guests read was read ahead for nobody, with this a hundredth.
const START: u64 = 1 << 20;

/// A reader that skips this much is still sequential: small holes in a file, and the other queues' share of its requests.
const SKIP: u64 = 128 << 10;

/// Bytes read ahead at most, unless `serve --readahead` says otherwise.
pub const WINDOW: u64 = 1 << 20;

/// One sequential reader.
#[derive(Clone, Copy, Debug)]
struct Stream {
    /// Where it has begun, and where its next request is expected.
    start: u64,
    next: u64,
    /// Up to where it was read ahead.
    ahead: u64,
    /// When it read last, counted in requests.
    used: u64,
}

/// The sequential readers of one queue.
#[derive(Debug)]
pub struct Streams {
    streams: [Stream; STREAMS],
    requests: u64,
    window: u64,
}

impl Streams {
    /// Reads ahead at most `window` bytes; 0: never.
    pub fn new(window: u64) -> Streams {
        // A place that no request begins at.
        let none = Stream { start: u64::MAX, next: u64::MAX, ahead: 0, used: 0 };
        Streams { streams: [none; STREAMS], requests: 0, window }
    }

    /// Takes a read of `len` bytes into account; gives what to read ahead now. The range may lie behind the end of the disk.
    pub fn read(&mut self, offset: u64, len: u64) -> Option<Range<u64>> {
        if self.window == 0 {
            return None;
        }
        self.requests += 1;
        let next = offset + len;
        let goes_on = |s: &&mut Stream| offset.checked_sub(s.next).is_some_and(|skipped| skipped <= SKIP);
        if let Some(stream) = self.streams.iter_mut().find(goes_on) {
            (stream.next, stream.used) = (next, self.requests);
            return stream.more(self.window);
        }
        let oldest = self.streams.iter_mut().min_by_key(|s| s.used)?;
        *oldest = Stream { start: offset, next, ahead: next, used: self.requests };
        None
    }
}

impl Stream {
    /// What to read ahead, once half of the window is used up.
    fn more(&mut self, window: u64) -> Option<Range<u64>> {
        let run = self.next - self.start;
        let window = window.min(run);
        if run < START || self.ahead.saturating_sub(self.next) > window / 2 {
            return None;
        }
        let from = self.ahead.max(self.next);
        self.ahead = self.next + window;
        Some(from..self.ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const K: u64 = 1 << 10;

    #[test]
    fn a_sequential_reader_is_read_ahead_of() {
        let mut streams = Streams::new(WINDOW);
        let mut ahead = 0;
        let mut first = None;
        for i in 0..64 {
            let offset = i * 64 * K;
            if let Some(range) = streams.read(offset, 64 * K) {
                first.get_or_insert(range.clone());
                assert!(range.start >= offset + 64 * K && range.start >= ahead, "nothing twice");
                assert!(range.end - (offset + 64 * K) <= WINDOW.min(offset + 64 * K), "no more than was read");
                ahead = range.end;
            }
        }
        assert_eq!(first, Some(1024 * K..2048 * K));
        assert!(ahead >= 64 * 64 * K + WINDOW / 2, "the window stays full");
    }

    #[test]
    fn nothing_is_read_ahead_of_what_is_random_or_short() {
        let mut streams = Streams::new(WINDOW);
        for i in 0..1000u64 {
            assert_eq!(streams.read(i.wrapping_mul(0x9E37_79B1) % (1 << 20) * 4 * K, 4 * K), None, "random");
        }
        for i in 0..100 {
            assert_eq!(streams.read((100 + i * 10) << 20, 128 * K), None, "files of 128 KiB");
        }
        let mut off = Streams::new(0);
        for i in 0..1000 {
            assert_eq!(off.read(i * 64 * K, 64 * K), None, "switched off");
        }
    }

    #[test]
    fn several_readers_and_small_skips() {
        let mut streams = Streams::new(WINDOW);
        let mut ranges = [0; STREAMS];
        for i in 0..32 {
            for (reader, found) in ranges.iter_mut().enumerate() {
                // Each leaves out 64 KiB after 64 KiB.
                let offset = ((reader as u64) << 30) + i * 128 * K;
                *found += u32::from(streams.read(offset, 64 * K).is_some());
            }
        }
        assert!(ranges.iter().all(|found| *found >= 5), "{ranges:?}");
    }

    #[test]
    fn a_reader_that_is_faster_is_read_ahead_of_from_where_it_is() {
        let mut streams = Streams::new(WINDOW);
        assert_eq!(streams.read(0, 512 * K), None);
        assert_eq!(streams.read(512 * K, 512 * K), Some(1024 * K..2048 * K));
        assert_eq!(streams.read(1024 * K, 2048 * K), Some(3072 * K..4096 * K));
    }

    proptest! {
        #[test]
        fn no_byte_is_asked_for_twice_in_a_row_and_nothing_overflows(
            reads in proptest::collection::vec((any::<u64>(), 1u64..1 << 32, any::<bool>()), 1..200),
        ) {
            let mut streams = Streams::new(WINDOW);
            let mut at = 0;
            for (offset, len, goes_on) in reads {
                let offset = if goes_on { at } else { offset % (1 << 50) };
                at = offset + len;
                if let Some(range) = streams.read(offset, len) {
                    prop_assert!(range.start >= at && range.start < range.end);
                    prop_assert!(range.end - at <= WINDOW);
                }
            }
        }
    }
}
