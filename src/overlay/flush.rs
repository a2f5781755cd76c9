//! Flush: what was written so far becomes durable, data before the bits that say it is there.

use super::Overlay;
use super::layout::{L2_ENTRY, index};
use std::io;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

/// Words taken up at once: bounds the memory of a flush (16 bytes each; 4 GiB of the disk at least).
const BATCH: usize = 1 << 16;

/// What flushes share.
#[derive(Debug, Default)]
pub(super) struct Flusher {
    /// How many flushes have begun.
    begun: AtomicU64,
    state: Mutex<FlushState>,
}

#[derive(Debug, Default)]
struct FlushState {
    /// An fsync failed. The kernel has marked the pages clean all the same, so a later fsync would say nothing.
    failed: bool,
    /// The number of the last flush that succeeded.
    done: u64,
    /// Words were written since the flush counter was.
    uncounted: bool,
}

impl Flusher {
    fn state(&self) -> MutexGuard<'_, FlushState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Overlay {
    /// Makes every write that has completed durable. Blocks; a second flush waits for the first.
    ///
    /// A failed fsync is final: what it covered may be lost although the kernel now calls it clean, so every later flush
    /// of this session fails too, in this process and in one that takes the session up after a kill.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only {
            return Ok(());
        }
        // A read-modify-write, not a load: it puts this thread's writes before the snapshot of any flush that begins
        // (increments) later.
        let seen = self.flusher.begun.fetch_add(0, Ordering::AcqRel);
        let mut state = self.flusher.state();
        if state.failed {
            return Err(sticky());
        }
        if state.done > seen {
            // Begun after this call and done: it covered all that this one would.
            return Ok(());
        }
        if self.closed.load(Ordering::Acquire) {
            return Err(io::Error::other("the overlay is closed"));
        }
        let number = self.flusher.begun.fetch_add(1, Ordering::AcqRel) + 1;
        self.flush_words(&mut state)?;
        state.done = number;
        Ok(())
    }

    fn flush_words(&self, state: &mut FlushState) -> io::Result<()> {
        let words = self.words.get();
        let mut from = 0;
        let mut taken: Vec<(u64, u64)> = Vec::new();
        while !self.dirty.is_end(from) {
            // The value with the mark: bits that are set after this may stand for data that the fdatasync below misses.
            taken.clear();
            self.dirty.take(&mut from, BATCH, |word| {
                taken.push((word as u64, words[word].load(Ordering::Acquire)));
            });
            if taken.is_empty() {
                continue;
            }
            self.sync(state)?;
            state.uncounted = true;
            if let Err(e) = self.write_words(&taken) {
                // Data is durable and each word on disk is an old or a new one: the next flush may try again.
                taken.iter().for_each(|(cluster, _)| self.dirty.mark(index(*cluster)));
                return Err(e);
            }
        }
        self.count(state)?;
        // The words, or, if there were none, the data alone.
        self.sync(state)
    }

    /// Counts a flush that wrote words, in the file and in the live bitmap, so that an older copy of the file that somebody
    /// puts in its place is known for what it is. Whenever a kill comes, the file's counter is one of the two that the
    /// live bitmap has.
    fn count(&self, state: &mut FlushState) -> io::Result<()> {
        if !state.uncounted {
            return Ok(());
        }
        let mut header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
        let before = header.extension.flushes;
        let flushes = before.wrapping_add(1);
        self.words.begin_counting(flushes);
        let (word, at) = header.with_flushes(flushes);
        if let Err(e) = self.disk.write(&word, at) {
            header.with_flushes(before);
            return Err(e);
        }
        self.words.end_counting(flushes);
        state.uncounted = false;
        Ok(())
    }

    /// One `fdatasync` for whoever has written without changing a word. It goes by the same rule as all others: a failure
    /// is final, because the kernel tells of it only once and it may have been about anybody's data.
    pub(super) fn sync_all_that_is_written(&self) -> io::Result<()> {
        let mut state = self.flusher.state();
        if state.failed { Err(sticky()) } else { self.sync(&mut state) }
    }

    fn sync(&self, state: &mut FlushState) -> io::Result<()> {
        self.disk.sync_data().inspect_err(|e| {
            state.failed = true;
            self.words.set_failed();
            log::error!("{}: fdatasync failed ({e}); flushes fail from now on", self.path.display());
        })
    }

    /// Writes bitmaps in runs of neighbours: from the bitmap of the first to that of the last, the descriptors between
    /// them being the constants they are.
    fn write_words(&self, taken: &[(u64, u64)]) -> io::Result<()> {
        const RUN_MAX: usize = 4096;
        let mut bytes = Vec::new();
        for neighbours in taken.chunk_by(|a, b| a.0 + 1 == b.0) {
            for run in neighbours.chunks(RUN_MAX) {
                bytes.clear();
                for (cluster, word) in run {
                    if !bytes.is_empty() {
                        bytes.extend(self.layout.descriptor(*cluster).to_be_bytes());
                    }
                    bytes.extend(word.to_be_bytes());
                }
                debug_assert_eq!(bytes.len() as u64, run.len() as u64 * L2_ENTRY - 8);
                self.disk.write(&bytes, self.layout.bitmap_at(run[0].0))?;
            }
        }
        Ok(())
    }
}

fn sticky() -> io::Error {
    io::Error::other(
        "an earlier flush of this overlay failed, so what it covered may be lost; \
         check the disk and open the overlay again with --discard-unflushed",
    )
}
