//! What every two images of a library have in common, exactly: for a scheduler that puts VMs where their blocks already are.
//!
//! One pass over all runs, merged. What is kept is a number for each *set* of images that hold some content (paper, section
//! 3.1), and one for each image in it; sets are few, however many contents there are. Pairs are made of the sets at the end.

use super::stats::open_run;
use crate::cluster::{Clusters, merge};
use crate::error::Result;
use crate::library::{ImageRecord, Library};
use serde::Serialize;
use std::collections::BTreeMap;

/// The matrix.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Matrix {
    /// In order of ID.
    pub images: Vec<Line>,
    /// Every two images that have something in common, in order of ID.
    pub pairs: Vec<Pair>,
}

/// An image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Line {
    /// Name.
    pub name: String,
    /// Number.
    pub id: u32,
    /// Blocks that are not all zero.
    pub nonzero_blocks: u64,
    /// Distinct contents of these.
    pub unique_blocks: u64,
}

/// Two images.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Pair {
    /// Name of the image with the lower ID.
    pub a: String,
    /// Name of the other.
    pub b: String,
    /// Distinct contents that both hold.
    pub contents: u64,
    /// Blocks of `a` whose content `b` holds.
    pub blocks_of_a: u64,
    /// Blocks of `b` whose content `a` holds.
    pub blocks_of_b: u64,
}

/// Counts. Images of different sharing domains have nothing in common, whatever they hold.
pub fn matrix(library: &Library) -> Result<Matrix> {
    let mut domains: BTreeMap<(&str, String), Vec<&ImageRecord>> = BTreeMap::new();
    for record in library.images() {
        domains.entry((&record.domain, record.fingerprint.to_string())).or_default().push(record);
    }
    let mut out = Matrix::default();
    for images in domains.values() {
        let sets = Sets::of(library, images)?;
        sets.expand(images, &mut out);
    }
    let ids: BTreeMap<&str, u32> = library.images().iter().map(|r| (r.name.as_str(), r.id.0)).collect();
    out.images.sort_by_key(|line| line.id);
    out.pairs.sort_by_key(|pair| (ids.get(pair.a.as_str()), ids.get(pair.b.as_str())));
    Ok(out)
}

/// The sets of images, and for each image of a set its blocks with the contents of that set.
#[derive(Default)]
struct Sets {
    clusters: Clusters,
    blocks: Vec<Vec<u64>>,
}

impl Sets {
    fn of(library: &Library, images: &[&ImageRecord]) -> Result<Sets> {
        let runs = images.iter().map(|record| open_run(library, record)).collect::<Result<Vec<_>>>()?;
        let mut sets = Sets::default();
        let mut content = None;
        // How many blocks of each image hold the content.
        let mut holders: BTreeMap<u32, u64> = BTreeMap::new();
        for item in merge(runs) {
            let (row, image) = item?;
            let this = Some((row.hash, row.variant));
            if this != content {
                sets.add(&holders);
                holders.clear();
                content = this;
            }
            *holders.entry(u32::try_from(image).unwrap_or(u32::MAX)).or_default() += 1;
        }
        sets.add(&holders);
        Ok(sets)
    }

    fn add(&mut self, holders: &BTreeMap<u32, u64>) {
        if holders.is_empty() {
            return;
        }
        let images: Vec<u32> = holders.keys().copied().collect();
        let number = self.clusters.add(&images, holders.values().sum());
        if number == self.blocks.len() {
            self.blocks.push(vec![0; images.len()]);
        }
        for (sum, blocks) in self.blocks.get_mut(number).into_iter().flatten().zip(holders.values()) {
            *sum += blocks;
        }
    }

    /// From sets to images and pairs of them.
    fn expand(&self, images: &[&ImageRecord], out: &mut Matrix) {
        // (contents, blocks of the first, blocks of the second); of an image with itself on the diagonal.
        let mut sums: BTreeMap<(u32, u32), (u64, u64, u64)> = BTreeMap::new();
        for (cluster, blocks) in self.clusters.clusters().iter().zip(&self.blocks) {
            let members: Vec<(u32, u64)> = cluster.images.iter().copied().zip(blocks.iter().copied()).collect();
            for (i, &(a, of_a)) in members.iter().enumerate() {
                for &(b, of_b) in members.iter().skip(i) {
                    let sum = sums.entry((a, b)).or_default();
                    *sum = (sum.0 + cluster.contents, sum.1 + of_a, sum.2 + of_b);
                }
            }
        }
        for (a, record) in (0..).zip(images) {
            let (unique_blocks, nonzero_blocks, _) = sums.get(&(a, a)).copied().unwrap_or_default();
            out.images.push(Line { name: record.name.clone(), id: record.id.0, nonzero_blocks, unique_blocks });
        }
        let name = |i: u32| images.get(i as usize).map_or(String::new(), |r| r.name.clone());
        for (&(a, b), &(contents, blocks_of_a, blocks_of_b)) in sums.iter().filter(|((a, b), _)| a != b) {
            out.pairs.push(Pair { a: name(a), b: name(b), contents, blocks_of_a, blocks_of_b });
        }
    }
}
