//! Which of the images that hold a content is read: the policies. All images that hold it must read the same copy, or the
//! page cache holds it twice; so a policy is an order of the images, and never a choice of each image for itself.
//! (Measured: where each image took the longest runs that it could get, four fifths of the saving was lost, and requests
//! were split no less.)

use super::contents::Contents;
use super::images::Images;
use super::offline::mean_length;
use crate::error::Result;
use crate::fingerprint::{Hash, Row};
use crate::library::Policy;
use std::cmp::Reverse;
use std::collections::BTreeMap;

/// Rows that are looked up at a time.
const ROWS_AT_A_TIME: usize = 1 << 20;

/// Chooses among the images that hold a content.
pub(super) enum Choose {
    /// The lowest ID (paper, figure 4: `lowest_numbered_image`).
    Lowest,
    /// The one with the highest number here, then the lowest ID.
    Preferred(BTreeMap<u32, u64>),
}

impl Choose {
    /// What the policy does, given which images it prefers.
    pub fn by(policy: Policy, preference: &BTreeMap<u32, u64>) -> Choose {
        match policy {
            Policy::Paper | Policy::Bridge(_) => Choose::Lowest,
            Policy::MostUsed(_) | Policy::LeastFragmented(_) => Choose::Preferred(preference.clone()),
        }
    }

    /// One of `images`, which are ascending and at least one.
    pub fn one(&self, images: &[u32]) -> u32 {
        let first = match self {
            Choose::Lowest => images.first(),
            Choose::Preferred(_) => images.iter().min_by_key(|id| self.rank(**id)),
        };
        first.copied().unwrap_or_default()
    }

    /// By which all images are ordered: of those that hold a content, the one with the lowest is read.
    pub fn rank(&self, id: u32) -> (Reverse<u64>, u32) {
        match self {
            Choose::Lowest => (Reverse(0), id),
            Choose::Preferred(preference) => (Reverse(preference.get(&id).copied().unwrap_or(0)), id),
        }
    }
}

/// How long the runs of an image are that others could read: the mean length, in thousandths of a block, of its maximal runs
/// of blocks whose contents other images hold too.
pub(super) fn run_length(image: u32, contents: &Contents, images: &Images) -> Result<u64> {
    let mut shared: Vec<u32> = Vec::new();
    let mut rows = images.run(image)?.peekable();
    while rows.peek().is_some() {
        let part: Vec<Row> = rows.by_ref().take(ROWS_AT_A_TIME).collect::<Result<_>>()?;
        let mut hashes: Vec<Hash> = part.iter().map(|r| r.hash).collect();
        hashes.dedup();
        let found = contents.lookup(&hashes)?;
        let mut key = 0;
        for row in part {
            while hashes.get(key).is_some_and(|h| *h < row.hash) {
                key += 1;
            }
            let of_row = found.of(key).iter().find(|c| u32::from(c.variant) == row.variant);
            if of_row.is_some_and(|c| contents.sets().images(c.set).len() > 1) {
                shared.push(row.block);
            }
        }
    }
    shared.sort_unstable();
    let runs = shared.chunk_by(|a, b| a.checked_add(1) == Some(*b)).count() as u64;
    Ok(mean_length(shared.len() as u64, runs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_preferred_is_read() {
        let choose = Choose::Preferred([(3, 10), (5, 20)].into());
        assert_eq!(choose.one(&[1, 3, 5]), 5);
        assert_eq!(choose.one(&[1, 3]), 3);
        assert_eq!(choose.one(&[1, 2]), 1);
        assert_eq!(Choose::Lowest.one(&[1, 2, 3]), 1);
    }
}
