//! Interned sets of images, with what each set holds.

use std::collections::{BTreeMap, HashMap};

/// What the images of one set, and no others, have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cluster {
    /// The images, ascending; in whatever numbering the caller uses.
    pub images: Box<[u32]>,
    /// Distinct contents that exactly these images hold.
    pub contents: u64,
    /// Blocks with such a content, all copies in all images counted.
    pub blocks: u64,
}

/// All clusters of a library, and the figures that follow from them (paper, figure 11).
#[derive(Clone, Debug, Default)]
pub struct Clusters {
    numbers: HashMap<Box<[u32]>, usize>,
    clusters: Vec<Cluster>,
    blocks_of_repeated: u64,
    /// Contents by the number of blocks that hold them.
    by_copies: BTreeMap<u64, u64>,
}

impl Clusters {
    /// Counts one content that the images in `holders` (ascending) hold in `copies` blocks altogether. Returns the
    /// number of its cluster.
    pub fn add(&mut self, holders: &[u32], copies: u64) -> usize {
        debug_assert!(holders.is_sorted_by(|a, b| a < b) && copies >= holders.len() as u64);
        let number = match self.numbers.get(holders) {
            Some(&number) => number,
            None => {
                let number = self.clusters.len();
                self.numbers.insert(holders.into(), number);
                self.clusters.push(Cluster { images: holders.into(), contents: 0, blocks: 0 });
                number
            }
        };
        if let Some(cluster) = self.clusters.get_mut(number) {
            cluster.contents += 1;
            cluster.blocks += copies;
        }
        *self.by_copies.entry(copies).or_default() += 1;
        if copies >= 2 {
            self.blocks_of_repeated += copies;
        }
        number
    }

    /// The clusters, in order of their numbers.
    pub fn clusters(&self) -> &[Cluster] {
        &self.clusters
    }

    /// Distinct contents.
    pub fn contents(&self) -> u64 {
        self.clusters.iter().map(|c| c.contents).sum()
    }

    /// Blocks, all copies counted.
    pub fn blocks(&self) -> u64 {
        self.clusters.iter().map(|c| c.blocks).sum()
    }

    /// How many blocks hold a content, and how many contents that many blocks hold; ascending (figure 11a).
    pub fn by_copies(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.by_copies.iter().map(|(copies, contents)| (*copies, *contents))
    }

    /// Share of the blocks whose content exists at least twice, inside one image or in several (figure 11a).
    pub fn share_repeated(&self) -> f64 {
        share(self.blocks_of_repeated, self.blocks())
    }

    /// Share of the blocks whose content at least `images` images hold (figure 11b).
    pub fn share_in_images(&self, images: usize) -> f64 {
        let held = self.clusters.iter().filter(|c| c.images.len() >= images).map(|c| c.blocks).sum();
        share(held, self.blocks())
    }
}

/// `part / whole`, 0 when there is nothing.
fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the paper's figure 3: seven clusters of three images.
    #[test]
    fn the_papers_example() {
        let mut clusters = Clusters::default();
        // C and D are in all three images, C twice in images 1 and 2.
        for (holders, copies) in [
            (&[0, 1, 2][..], 6),
            (&[0, 1, 2], 3),
            (&[0, 1], 2),
            (&[0, 1], 2),
            (&[1, 2], 3),
            (&[0], 1),
            (&[1], 1),
            (&[2], 1),
            (&[2], 1),
            (&[0, 2], 2),
        ] {
            clusters.add(holders, copies);
        }
        assert_eq!(clusters.clusters().len(), 7);
        assert_eq!(clusters.contents(), 10);
        assert_eq!(clusters.blocks(), 22);
        assert_eq!(clusters.clusters()[0], Cluster { images: [0, 1, 2].into(), contents: 2, blocks: 9 });
        assert_eq!(clusters.by_copies().collect::<Vec<_>>(), [(1, 4), (2, 3), (3, 2), (6, 1)]);
        assert_eq!(clusters.share_repeated(), 18.0 / 22.0);
        assert_eq!(clusters.share_in_images(2), 18.0 / 22.0);
        assert_eq!(clusters.share_in_images(3), 9.0 / 22.0);
        assert_eq!(clusters.share_in_images(4), 0.0);
        assert_eq!(Clusters::default().share_repeated(), 0.0);
    }
}
