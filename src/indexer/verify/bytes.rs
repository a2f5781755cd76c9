//! Compares the bytes of an image with its fingerprints, chunk by chunk of the digest: any chunk can be looked at by itself,
//! now or later.

use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::digest::{self, CHUNK_BYTES, CHUNK_SIZE};
use crate::fingerprint::{Algorithm, BLOCK_BYTES, Hash, Row, extents::data_extents, hash_block};
use crate::indexer::Work;
use crate::indexer::compare::Side;
use crate::io::pace::Pace;
use crate::units::{BLOCK_SIZE, is_zero};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// Blocks of a chunk.
const CHUNK_BLOCKS: u64 = CHUNK_SIZE / BLOCK_SIZE;

/// The chunk that a block is in.
pub(in crate::indexer) fn chunk_of(block: u32) -> u64 {
    u64::from(block) / CHUNK_BLOCKS
}

/// What the blocks of an image must be. Memory: 24 bytes a non-zero block.
pub(in crate::indexer) struct Expected {
    algorithm: Algorithm,
    /// In order of block, each once: no row, no data.
    blocks: Vec<(u32, Hash)>,
}

impl Expected {
    /// Of the rows of a run.
    pub fn new(algorithm: Algorithm, run: impl Iterator<Item = Result<Row>>) -> Result<Expected> {
        let mut blocks = run.map(|row| row.map(|r| (r.block, r.hash))).collect::<Result<Vec<_>>>()?;
        blocks.sort_unstable();
        Ok(Expected { algorithm, blocks })
    }

    /// The blocks that have data, ascending.
    pub fn with_data(&self) -> impl Iterator<Item = u32> {
        self.blocks.iter().map(|b| b.0)
    }

    /// The hash of a block; `None` if it must be zero.
    pub fn hash_of(&self, block: u32) -> Option<&Hash> {
        let at = self.blocks.binary_search_by_key(&block, |b| b.0).ok()?;
        self.blocks.get(at).map(|b| &b.1)
    }

    /// True if these are the bytes of the block.
    pub fn is_right(&self, block: u32, bytes: &[u8]) -> bool {
        match self.hash_of(block) {
            None => is_zero(bytes),
            Some(hash) => !is_zero(bytes) && hash_block(self.algorithm, bytes) == *hash,
        }
    }

    /// The rows of a chunk.
    fn of_chunk(&self, chunk: u64) -> &[(u32, Hash)] {
        let at = |chunk: u64| self.blocks.partition_point(|b| u64::from(b.0) < chunk * CHUNK_BLOCKS);
        self.blocks.get(at(chunk)..at(chunk + 1)).unwrap_or_default()
    }
}

/// What a chunk turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::indexer) struct Checked {
    /// Which one.
    pub chunk: u64,
    /// Hash of its bytes; `None` if they are all zero.
    pub hash: Option<[u8; 32]>,
    /// Blocks in it that are not what they must be, ascending.
    pub bad: Vec<u32>,
}

/// The chunks that have data or must have some; all others are holes, and right.
pub(in crate::indexer) fn chunks(side: &Side, expected: &Expected) -> Result<Vec<u64>> {
    let extents = extents(side)?;
    let mut out: Vec<u64> = extents.iter().flat_map(|e| e.start / CHUNK_SIZE..e.end.div_ceil(CHUNK_SIZE)).collect();
    out.extend(expected.with_data().map(chunk_of));
    out.sort_unstable();
    out.dedup();
    Ok(out)
}

fn extents(side: &Side) -> Result<Vec<Range<u64>>> {
    data_extents(&side.file, side.record.size).map_err(|e| Error::io(&side.path, "find its holes", e))
}

/// Bytes of data in these chunks, as [`check`] tells the observer.
pub(in crate::indexer) fn data_bytes(side: &Side, chunks: &[u64]) -> Result<u64> {
    let extents = extents(side)?;
    Ok(chunks.iter().map(|&chunk| overlaps(&extents, chunk).map(|r| r.end - r.start).sum::<u64>()).sum())
}

/// The parts of a chunk that are data.
fn overlaps(extents: &[Range<u64>], chunk: u64) -> impl Iterator<Item = Range<u64>> {
    let (start, end) = (chunk * CHUNK_SIZE, (chunk + 1) * CHUNK_SIZE);
    let first = extents.partition_point(|e| e.end <= start);
    let rest = extents.get(first..).unwrap_or_default().iter();
    rest.take_while(move |e| e.start < end).map(move |e| e.start.max(start)..e.end.min(end))
}

/// Checks the chunks on all cores, at a pace, and tells `done` of each, in any order.
pub(in crate::indexer) fn check(
    side: &Side,
    expected: &Expected,
    chunks: &[u64],
    pace: Option<&Pace>,
    work: &Work,
    done: &(dyn Fn(Checked) -> Result<()> + Sync),
) -> Result<()> {
    let extents = extents(side)?;
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let worker = || -> Result<()> {
        let mut buf = vec![0u8; CHUNK_BYTES];
        while let Some(&chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) {
            if failed.load(Ordering::Relaxed) {
                break;
            }
            let data = overlaps(&extents, chunk).map(|r| r.end - r.start).sum();
            if let Some(pace) = pace {
                pace.take(data, work.stop);
            }
            if work.stop.load(Ordering::Relaxed) {
                return Err(Error::file(ErrorKind::Interrupted, &side.path, "stopped while it was read"));
            }
            let bytes = read(side, &extents, chunk, &mut buf)?;
            done(check_chunk(expected, chunk, bytes))?;
            work.observer.advance(data);
        }
        Ok(())
    };
    let worker = || {
        let out = worker();
        failed.fetch_or(out.is_err(), Ordering::Relaxed);
        out
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..work.threads.max(1)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().try_for_each(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// The bytes of a chunk. Holes are not read, for that would fill the page cache with zeros.
fn read<'b>(side: &Side, extents: &[Range<u64>], chunk: u64, buf: &'b mut [u8]) -> Result<&'b [u8]> {
    let start = chunk * CHUNK_SIZE;
    let len = side.record.size.saturating_sub(start).min(CHUNK_SIZE);
    let bytes = buf.get_mut(..crate::units::to_usize(len)).unwrap_or_default();
    bytes.fill(0);
    for part in overlaps(extents, chunk) {
        let inside = crate::units::to_usize(part.start - start)..crate::units::to_usize(part.end - start);
        let target = bytes.get_mut(inside).unwrap_or_default();
        side.file.read_exact_at(target, part.start).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                Error::file(ErrorKind::Changed, &side.path, "became shorter while it was read")
            }
            _ => Error::io(&side.path, "read", e),
        })?;
    }
    Ok(bytes)
}

fn check_chunk(expected: &Expected, chunk: u64, bytes: &[u8]) -> Checked {
    let mut rows = expected.of_chunk(chunk).iter().peekable();
    let mut bad = Vec::new();
    let mut all_zero = true;
    for (number, block) in (chunk * CHUNK_BLOCKS..).zip(bytes.chunks(BLOCK_BYTES)) {
        // Images have no more than 2^32 blocks.
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        let zero = is_zero(block);
        all_zero &= zero;
        let right = match rows.next_if(|row| row.0 == number) {
            None => zero,
            Some((_, hash)) => !zero && hash_block(expected.algorithm, block) == *hash,
        };
        if !right {
            bad.push(number);
        }
    }
    // A run that names blocks past the end, or one block twice, is not the run of this image.
    bad.extend(rows.map(|row| row.0));
    Checked { chunk, hash: (!all_zero).then(|| digest::chunk(bytes)), bad }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn exactly_the_blocks_that_differ_are_bad(
            blocks in prop::collection::vec(0u8..3, 1..300),
            changes in prop::collection::vec((0usize..300, 0u8..3), 0..5),
            tail in 1usize..=8,
        ) {
            let bytes_of = |blocks: &[u8]| {
                let mut bytes: Vec<u8> = blocks.iter().flat_map(|&b| [b; 4096]).collect();
                bytes.truncate(blocks.len() * 4096 - 4096 + tail * 512);
                bytes
            };
            let before = bytes_of(&blocks);
            let rows = (0u32..).zip(before.chunks(4096)).filter(|(_, b)| !is_zero(b))
                .map(|(block, b)| Ok(Row { hash: hash_block(Algorithm::Sha1, b), variant: 0, block }));
            let expected = Expected::new(Algorithm::Sha1, rows).unwrap();
            let mut now = blocks.clone();
            for (at, value) in changes {
                if let Some(b) = now.get_mut(at) {
                    *b = value;
                }
            }
            let after = bytes_of(&now);
            let mut bad = Vec::new();
            for (chunk, bytes) in (0u64..).zip(after.chunks(CHUNK_BYTES)) {
                let found = check_chunk(&expected, chunk, bytes);
                prop_assert_eq!(found.hash, (!is_zero(bytes)).then(|| digest::chunk(bytes)));
                bad.extend(found.bad);
            }
            let want: Vec<u32> = (0u32..).zip(blocks.iter().zip(&now)).filter(|(_, (a, b))| a != b).map(|x| x.0).collect();
            prop_assert_eq!(bad, want);
        }
    }

    #[test]
    fn a_run_that_names_more_blocks_than_there_are_is_found_out() {
        let row = |block| Ok(Row { hash: hash_block(Algorithm::Sha1, &[1; 4096]), variant: 0, block });
        for rows in [vec![0, 5], vec![0, 0]] {
            let expected = Expected::new(Algorithm::Sha1, rows.iter().map(|&b| row(b))).unwrap();
            assert!(!check_chunk(&expected, 0, &[1; 4096]).bad.is_empty(), "{rows:?}");
        }
        let expected = Expected::new(Algorithm::Sha1, [0].into_iter().map(row)).unwrap();
        assert!(check_chunk(&expected, 0, &[1; 4096]).bad.is_empty());
    }
}
