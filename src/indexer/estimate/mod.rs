//! What files would share, estimated before any of them is in a library: from a sample of their contents.
//!
//! ```text
//! files ─ sample ─ contents in the sample, a sorted list a file ─ merge ─ who holds what ─ figures with intervals
//! ```
//!
//! - [`sample`] reads a file once and keeps what is in the sample; memory grows with the sample alone: 8 bytes for each of a
//!   file's contents in it.
//! - [`interval`] has the formulas, and what they take for granted.
//!
//! Non-zero blocks are counted, all else is estimated. All figures are about distinct contents, for that is what the page
//! cache and the disk can save: "db holds 60 % of web" means 60 % of the distinct contents of web.

pub mod interval;
pub mod sample;

use crate::cluster::{Clusters, merge};
use interval::{Interval, count, share, weighted};
use sample::{Sample, Sampling};
use serde::Serialize;

/// The figures of some files.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// One content in so many was looked at.
    pub sample: u64,
    /// Chooses the sample.
    pub seed: u64,
    /// Contents that were looked at.
    pub sampled_contents: u64,
    /// Non-zero blocks of all files: counted.
    pub nonzero_blocks: u64,
    /// Distinct non-zero contents.
    pub unique_blocks: Interval,
    /// Blocks whose content an earlier block of the same file holds.
    pub duplicates_within: Interval,
    /// Contents that several files hold, each counted once for every file but one.
    pub duplicates_between: Interval,
    /// Share of the non-zero blocks that need neither memory nor disk of their own.
    pub saving: Interval,
    /// In the order of the command line.
    pub files: Vec<FileEstimate>,
    /// Every two files.
    pub pairs: Vec<PairEstimate>,
}

/// The figures of one file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FileEstimate {
    /// Blocks, zero ones and a partial last one included.
    pub blocks: u64,
    /// Blocks that are not all zero: counted.
    pub nonzero_blocks: u64,
    /// Distinct non-zero contents.
    pub unique_blocks: Interval,
    /// Blocks whose content an earlier block of the file holds.
    pub duplicates_within: Interval,
    /// Contents that no other of the files holds: what this file adds to them.
    pub only_here: Interval,
    /// Share of the file's contents that some other of the files holds.
    pub held_by_others: Interval,
}

/// What two files have in common.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PairEstimate {
    /// Index of one file.
    pub a: usize,
    /// Index of the other.
    pub b: usize,
    /// Contents that both hold.
    pub common_blocks: Interval,
    /// Share of the contents of `a` that `b` holds.
    pub a_held_by_b: Interval,
    /// Share of the contents of `b` that `a` holds.
    pub b_held_by_a: Interval,
    /// Contents of both among the contents of either (Jaccard).
    pub similarity: Interval,
}

/// Makes the figures. The samples are all of the same `sampling`.
pub fn estimate(samples: &[Sample], sampling: Sampling) -> Estimate {
    let held = Held::of(samples);
    let n = sampling.one_in;
    let nonzero_blocks: u64 = samples.iter().map(|s| s.nonzero_blocks).sum();
    let files: Vec<FileEstimate> = samples.iter().zip(&held.only_here).map(|(s, &only)| file(s, only, n)).collect();
    let (seen, all) = (held.contents as f64, nonzero_blocks as f64);
    let unique_blocks = count(seen, n).within(seen.max(all.min(1.0)), all);
    // The distinct contents of each file, added up: one that k files hold counts k, and once less when it is a duplicate.
    let distinct = weighted(held.holders as f64, held.squares as f64, samples.len() as f64, n);
    let distinct = distinct.within(held.holders as f64, all);
    let between = weighted(held.repeats as f64, held.repeat_squares as f64, samples.len().saturating_sub(1) as f64, n);
    let saved = unique_blocks.subtracted_from(all);
    Estimate {
        sample: n,
        seed: sampling.seed,
        sampled_contents: held.contents,
        nonzero_blocks,
        unique_blocks,
        duplicates_within: distinct.subtracted_from(all),
        duplicates_between: between.within(held.repeats as f64, all),
        saving: saved.scaled(if nonzero_blocks == 0 { 0.0 } else { 1.0 / all }),
        pairs: held.pairs(samples, n),
        files,
    }
}

fn file(sample: &Sample, only_here: u64, one_in: u64) -> FileEstimate {
    let (seen, all) = (sample.contents.len() as u64, sample.nonzero_blocks as f64);
    // A file with data has a content, though none may be in the sample.
    let least = (seen as f64).max(all.min(1.0));
    let unique_blocks = count(seen as f64, one_in).within(least, all);
    FileEstimate {
        blocks: sample.blocks,
        nonzero_blocks: sample.nonzero_blocks,
        unique_blocks,
        duplicates_within: unique_blocks.subtracted_from(all),
        only_here: count(only_here as f64, one_in).within(only_here as f64, all),
        held_by_others: share(seen - only_here, seen, one_in),
    }
}

/// Who holds the contents of the sample.
#[derive(Default)]
struct Held {
    clusters: Clusters,
    /// Distinct contents.
    contents: u64,
    /// Holders of each, added up; and their squares.
    holders: u64,
    squares: u64,
    /// The same, one holder of each left out.
    repeats: u64,
    repeat_squares: u64,
    /// For each file the contents that it alone holds.
    only_here: Vec<u64>,
}

impl Held {
    fn of(samples: &[Sample]) -> Held {
        let mut held = Held { only_here: vec![0; samples.len()], ..Held::default() };
        let lists =
            samples.iter().map(|s| s.contents.iter().map(|&c| Ok::<u64, std::convert::Infallible>(c))).collect();
        let (mut holders, mut content) = (Vec::new(), None);
        for (this, file) in merge(lists).flatten() {
            if content != Some(this) {
                held.add(&holders);
                holders.clear();
                content = Some(this);
            }
            holders.push(u32::try_from(file).unwrap_or(u32::MAX));
        }
        held.add(&holders);
        held
    }

    fn add(&mut self, holders: &[u32]) {
        let Some(more) = (holders.len() as u64).checked_sub(1) else { return };
        self.clusters.add(holders, holders.len() as u64);
        self.contents += 1;
        self.holders += more + 1;
        self.squares += (more + 1) * (more + 1);
        self.repeats += more;
        self.repeat_squares += more * more;
        if let ([only], true) = (holders, more == 0)
            && let Some(count) = self.only_here.get_mut(*only as usize)
        {
            *count += 1;
        }
    }

    /// Each set of holders is looked at once, however many contents it has.
    fn pairs(&self, samples: &[Sample], one_in: u64) -> Vec<PairEstimate> {
        let files = samples.len();
        let mut common = vec![0u64; files * files];
        for cluster in self.clusters.clusters() {
            for (i, &a) in cluster.images.iter().enumerate() {
                for &b in cluster.images.iter().skip(i + 1) {
                    if let Some(sum) = common.get_mut(a as usize * files + b as usize) {
                        *sum += cluster.contents;
                    }
                }
            }
        }
        let mut out = Vec::new();
        for (a, sample_a) in samples.iter().enumerate() {
            for (b, sample_b) in samples.iter().enumerate().skip(a + 1) {
                let both = common.get(a * files + b).copied().unwrap_or(0);
                out.push(pair((a, sample_a), (b, sample_b), both, one_in));
            }
        }
        out
    }
}

fn pair((a, sample_a): (usize, &Sample), (b, sample_b): (usize, &Sample), both: u64, one_in: u64) -> PairEstimate {
    let (in_a, in_b) = (sample_a.contents.len() as u64, sample_b.contents.len() as u64);
    let most = sample_a.nonzero_blocks.min(sample_b.nonzero_blocks) as f64;
    PairEstimate {
        a,
        b,
        common_blocks: count(both as f64, one_in).within(both as f64, most),
        a_held_by_b: share(both, in_a, one_in),
        b_held_by_a: share(both, in_b, one_in),
        similarity: share(both, in_a + in_b - both, one_in),
    }
}

#[cfg(test)]
mod tests;
