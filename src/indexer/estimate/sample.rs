//! Reads a file once, on all cores and beside the page cache, and keeps a sample of its contents.
//!
//! A content is in the sample if a hash of its bytes, mixed with a seed, is a multiple of N. The hash that every block pays
//! for is cheap: two CRC-32C, one a half, which the processor computes. Only what is in the sample gets a good one: 64 bits
//! of BLAKE3, by which contents are told apart. Two of 10⁹ blocks' contents (4 TB; 16 million in a sample of one in 64) are
//! taken for one with a probability of 10⁻⁵.

use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::{BLOCK_BYTES, extents::data_extents};
use crate::indexer::Work;
use crate::io::cold::{Cold, Pages};
use crate::units::{BLOCK_SIZE, blocks_in, is_zero};
use std::collections::HashSet;
use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// Bytes that are read at a time.
const PIECE: u64 = 4 << 20;

/// Which contents are in a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sampling {
    /// One content in so many.
    pub one_in: u64,
    /// Another seed takes another sample.
    pub seed: u64,
}

/// A file's share of the sample.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// Blocks, zero ones and a partial last one included.
    pub blocks: u64,
    /// Blocks that are not all zero.
    pub nonzero_blocks: u64,
    /// The contents in the sample, ascending, each once.
    pub contents: Vec<u64>,
}

impl Sampling {
    /// What tells the content from others, if it is in the sample.
    pub fn pick(&self, block: &[u8]) -> Option<u64> {
        let (a, b) = block.split_at(block.len() / 2);
        let cheap = u64::from(crc32c::crc32c(a)) << 32 | u64::from(crc32c::crc32c(b));
        self.takes(cheap).then(|| {
            let [a, b, c, d, e, f, g, h, ..] = *blake3::hash(block).as_bytes();
            u64::from_le_bytes([a, b, c, d, e, f, g, h])
        })
    }

    /// True if a content with this hash is in the sample. The hash need only differ between contents: it is mixed.
    pub(super) fn takes(&self, hash: u64) -> bool {
        mix(hash ^ mix(self.seed)).is_multiple_of(self.one_in.max(1))
    }
}

/// The finalizer of SplitMix64 (Steele, Lea, Flood 2014): a bijection whose output looks random for any inputs.
fn mix(key: u64) -> u64 {
    let mut x = key.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ x >> 31
}

/// Takes the sample of a raw file.
pub fn sample(path: &Path, shown: &Path, sampling: Sampling, work: &Work) -> Result<Sample> {
    let file = File::open(path).map_err(|e| Error::io(shown, "open it", e))?;
    let size = file.metadata().map_err(|e| Error::io(shown, "look at it", e))?.len();
    let extents = data_extents(&file, size).map_err(|e| Error::io(shown, "find its holes", e))?;
    let pieces = pieces(&extents, size);
    let cold = Cold::new(file, size).map_err(|e| Error::io(shown, "read", e))?;
    let name = shown.file_name().unwrap_or_default().display().to_string();
    work.observer.begin(&format!("reading {name}"), pieces.iter().map(|p| p.end - p.start).sum());
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let worker = || {
        let part = scan(&cold, shown, &pieces, sampling, work, (&next, &failed));
        failed.fetch_or(part.is_err(), Ordering::Relaxed);
        part
    };
    let parts: Vec<Result<Part>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..work.threads.max(1)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let (mut nonzero_blocks, mut all) = (0, HashSet::new());
    for part in parts {
        let part = part?;
        nonzero_blocks += part.nonzero_blocks;
        all.extend(part.contents);
    }
    work.observer.end();
    let mut contents: Vec<u64> = all.into_iter().collect();
    contents.sort_unstable();
    Ok(Sample { blocks: blocks_in(size), nonzero_blocks, contents })
}

/// What one worker found.
#[derive(Default)]
struct Part {
    nonzero_blocks: u64,
    /// A set: a content that fills half the disk takes no more memory than another.
    contents: HashSet<u64>,
}

/// What is read at a time: whole blocks, each once, ascending.
fn pieces(extents: &[Range<u64>], size: u64) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    let mut done = 0;
    for extent in extents {
        // A file system of smaller blocks may begin data in the middle of one of ours.
        let mut at = (extent.start / BLOCK_SIZE * BLOCK_SIZE).max(done);
        let end = extent.end.next_multiple_of(BLOCK_SIZE).min(size);
        while at < end {
            let piece = at..end.min(at + PIECE);
            at = piece.end;
            out.push(piece);
        }
        done = done.max(end);
    }
    out
}

fn scan(
    cold: &Cold,
    path: &Path,
    pieces: &[Range<u64>],
    sampling: Sampling,
    work: &Work,
    (next, failed): (&AtomicUsize, &AtomicBool),
) -> Result<Part> {
    let mut part = Part::default();
    let mut pages = Pages::new(PIECE).map_err(|e| Error::io(path, "get memory to read", e))?;
    while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
        if failed.load(Ordering::Relaxed) {
            break;
        }
        if work.stop.load(Ordering::Relaxed) {
            return Err(Error::file(ErrorKind::Interrupted, path, "stopped while it was read"));
        }
        let bytes = cold.read(piece.start, piece.end - piece.start, &mut pages).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => {
                Error::file(ErrorKind::Changed, path, "became shorter while it was read").mend("stop what writes to it")
            }
            _ => Error::io(path, "read", e),
        })?;
        for block in bytes.chunks(BLOCK_BYTES).filter(|block| !is_zero(block)) {
            part.nonzero_blocks += 1;
            part.contents.extend(sampling.pick(block));
        }
        work.observer.advance(piece.end - piece.start);
    }
    Ok(part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn whatever_the_contents_look_like_one_in_n_is_taken() {
        // Blocks that differ in a counter only, in one half or the other: a weak hash would take all or none.
        for seed in 0..8 {
            let sampling = Sampling { one_in: 64, seed };
            for at in [0, 2040, 4088] {
                let taken = (0u64..20_000).filter(|i| {
                    let mut block = vec![0xee; 4096];
                    block[at..at + 8].copy_from_slice(&i.to_le_bytes());
                    sampling.pick(&block).is_some()
                });
                // 312.5 expected, 17.5 is a standard deviation.
                let taken = taken.count();
                assert!((235..390).contains(&taken), "{taken} with the counter at {at}, seed {seed}");
            }
        }
    }

    #[test]
    fn a_sample_of_one_in_one_tells_all_contents_apart() {
        let all = Sampling { one_in: 1, seed: 0 };
        let ids: HashSet<u64> = (0u32..5000).map(|i| all.pick(&i.to_le_bytes().repeat(1024)).unwrap()).collect();
        assert_eq!(ids.len(), 5000);
        assert_eq!(all.pick(&[7; 4096]), all.pick(&[7; 4096]));
        assert_ne!(all.pick(&[7; 4096]), all.pick(&[7; 512]));
    }

    proptest! {
        #[test]
        fn pieces_have_each_block_with_data_once(
            ends in prop::collection::btree_set(0u64..30_000_000, 0..12), extra in 0u64..5_000_000,
        ) {
            let ends: Vec<u64> = ends.into_iter().collect();
            let extents: Vec<Range<u64>> = ends.chunks_exact(2).map(|c| c[0]..c[1]).collect();
            let size = (ends.last().copied().unwrap_or(0) + extra).next_multiple_of(512);
            let found = pieces(&extents, size);
            prop_assert!(found.windows(2).all(|w| w[0].end <= w[1].start));
            let blocks = |r: &Range<u64>| r.start / 4096..r.end.div_ceil(4096);
            let want: std::collections::BTreeSet<u64> = extents.iter().flat_map(blocks).collect();
            let got: Vec<u64> = found.iter().flat_map(blocks).collect();
            prop_assert_eq!(got, want.into_iter().collect::<Vec<_>>());
            for p in found {
                prop_assert!(p.start % 4096 == 0 && (p.end % 4096 == 0 || p.end == size) && p.end - p.start <= PIECE);
            }
        }
    }
}
