//! Which of the images that hold a content is read: the policies.

use super::compare::Pair;
use crate::library::Policy;
use std::collections::BTreeMap;

/// Images of a set that the policy `least-fragmented` looks at: the lowest IDs of a set that may have thousands.
const LOOKED_AT: usize = 8;

/// Chooses among the images that hold a content.
pub(super) enum Choose {
    /// The lowest ID (paper, figure 4: `lowest_numbered_image`).
    Lowest,
    /// The one with the highest number here, then the lowest ID.
    MostUsed(BTreeMap<u32, u64>),
    /// All are candidates; [`longest_runs`] chooses when their blocks are known.
    Longest,
}

impl Choose {
    /// What the policy does, given how much each image is used.
    pub fn by(policy: Policy, usage: &BTreeMap<u32, u64>) -> Choose {
        match policy {
            Policy::Paper | Policy::Bridge(_) => Choose::Lowest,
            Policy::MostUsed(_) => Choose::MostUsed(usage.clone()),
            Policy::LeastFragmented(_) => Choose::Longest,
        }
    }

    /// One of `images`, which are ascending and at least one.
    pub fn one(&self, images: &[u32]) -> u32 {
        let used = |usage: &BTreeMap<u32, u64>| {
            let rank = |id: &&u32| (std::cmp::Reverse(usage.get(id).copied().unwrap_or(0)), **id);
            images.iter().min_by_key(rank).copied()
        };
        match self {
            Choose::MostUsed(usage) => used(usage),
            Choose::Lowest | Choose::Longest => images.first().copied(),
        }
        .unwrap_or_default()
    }

    /// Those that may be read for a content of image `own`.
    pub fn some(&self, images: &[u32], own: u32) -> Vec<u32> {
        match self {
            Choose::Lowest | Choose::MostUsed(_) => vec![self.one(images)],
            Choose::Longest => {
                let others = images.iter().copied().filter(|id| *id != own).take(LOOKED_AT);
                others.chain(images.contains(&own).then_some(own)).collect()
            }
        }
    }

    /// True if [`Choose::some`] gives more than one, so that [`longest_runs`] is to choose.
    pub fn is_open(&self) -> bool {
        matches!(self, Choose::Longest)
    }
}

/// One pair for each source block: from left to right the one whose run reaches farthest, of those that reach as far the
/// lowest image. `pairs` are ascending by source block.
pub(super) fn longest_runs(pairs: &[Pair]) -> Vec<Pair> {
    let blocks: Vec<&[Pair]> = pairs.chunk_by(|a, b| a.source == b.source).collect();
    let mut out = Vec::with_capacity(blocks.len());
    while let Some(here) = blocks.get(out.len()..).and_then(<[_]>::first) {
        let start = out.len();
        let mut best: Option<(usize, Pair)> = None;
        for pair in here.iter() {
            let reach = 1 + blocks
                .get(start + 1..)
                .unwrap_or(&[])
                .iter()
                .zip(1u32..)
                .take_while(|(b, by)| has(b, pair, *by))
                .count();
            let is_better = best.is_none_or(|(longest, of)| {
                reach > longest || (reach == longest && (pair.image, pair.block) < (of.image, of.block))
            });
            if is_better {
                best = Some((reach, *pair));
            }
        }
        let Some((reach, first)) = best else { break };
        out.extend((0u32..).take(reach).map(|by| Pair {
            source: first.source + by,
            image: first.image,
            block: first.block + by,
        }));
    }
    out
}

/// True if `candidates` (of one block) are `by` blocks behind `pair`, and one of them is so in the same image.
fn has(candidates: &[Pair], pair: &Pair, by: u32) -> bool {
    let goal = (pair.source.checked_add(by), pair.image, pair.block.checked_add(by));
    candidates.iter().any(|c| (Some(c.source), c.image, Some(c.block)) == goal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(source: u32, image: u32, block: u32) -> Pair {
        Pair { source, image, block }
    }

    #[test]
    fn the_longest_run_wins_then_the_lowest_image() {
        let pairs = [
            pair(0, 0, 7),
            pair(0, 1, 0),
            pair(1, 0, 3),
            pair(1, 1, 1),
            pair(2, 1, 2),
            pair(2, 2, 9),
            pair(3, 2, 10),
            pair(5, 0, 1),
            pair(5, 2, 12),
        ];
        let want = [pair(0, 1, 0), pair(1, 1, 1), pair(2, 1, 2), pair(3, 2, 10), pair(5, 0, 1)];
        assert_eq!(longest_runs(&pairs), want);
        assert_eq!(longest_runs(&[]), []);
        assert_eq!(longest_runs(&[pair(u32::MAX, 0, u32::MAX)]).len(), 1);
    }

    #[test]
    fn what_is_used_most_is_read() {
        let choose = Choose::MostUsed([(3, 10), (5, 20)].into());
        assert_eq!(choose.one(&[1, 3, 5]), 5);
        assert_eq!(choose.one(&[1, 3]), 3);
        assert_eq!(choose.one(&[1, 2]), 1);
        assert_eq!(Choose::Lowest.some(&[1, 2, 3], 2), [1]);
        assert_eq!(Choose::Longest.some(&[1, 2, 3], 2), [1, 3, 2]);
    }
}
