//! What the images of a library have in common: the figures of the paper's section 4 on this library.

use super::read_map;
use crate::cluster::{Clusters, merge};
use crate::error::Result;
use crate::fingerprint::run;
use crate::library::{ImageRecord, Library, Runs};
use crate::map::{Map, Scheme};
use crate::units::ImageId;
use serde::Serialize;
use std::collections::BTreeMap;

/// Figures of a library. Shares are of its non-zero blocks, 0 to 1.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stats {
    /// Name of the policy that chose which copy is read.
    pub policy: String,
    /// Its knobs `bridge` and `min_run`, in blocks; nothing for a policy without knobs.
    #[serde(flatten)]
    pub knobs: Option<Knobs>,
    /// Non-zero blocks of all images.
    pub nonzero_blocks: u64,
    /// Distinct non-zero contents.
    pub unique_blocks: u64,
    /// Distinct sets of images that hold some content, singletons included (paper, section 3.1).
    pub clusters: u64,
    /// Share of the blocks whose content exists at least twice, inside one image or in several (figure 11a).
    pub duplicated_ge2: f64,
    /// Share of the blocks whose content at least two images hold (figure 11b).
    pub shared_ge2_images: f64,
    /// Share of the blocks whose content more than three images hold (figure 11b).
    pub shared_gt3_images: f64,
    /// In order of ID.
    pub images: Vec<ImageStats>,
}

/// Knobs of the policies that look at runs (see [`Runs`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Knobs {
    /// Longest break that is bridged, in blocks.
    pub bridge: u32,
    /// Shortest run that leaves the image, in blocks.
    pub min_run: u32,
}

/// Figures of one image.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ImageStats {
    /// Name.
    pub name: String,
    /// Number.
    pub id: u32,
    /// Blocks, zero ones and a partial last one included.
    pub blocks: u64,
    /// Blocks that are not all zero.
    pub nonzero_blocks: u64,
    /// Blocks that are read from another image.
    pub redirected_blocks: u64,
    /// Entries of its block map (figure 9).
    pub entries: u64,
    /// Bytes of its block map (figure 8).
    pub map_bytes: u64,
}

/// Counts, in one pass over all runs; memory does not grow with them. Of one sharing domain, or the sums of all: what images
/// of different domains have in common is never looked at.
pub fn stats(library: &Library, domain: Option<&str>) -> Result<Stats> {
    stats_of(library, domain, &clusters(library, domain)?)
}

/// [`stats`], of the clusters of that domain, or of all.
pub fn stats_of(library: &Library, domain: Option<&str>, clusters: &Clusters) -> Result<Stats> {
    let images = of_domain(library, domain).map(|(_, r)| image_stats(library, r)).collect::<Result<_>>()?;
    Ok(Stats {
        policy: library.catalog().policy.name().to_string(),
        knobs: library.catalog().policy.runs().map(|Runs { bridge, min_run }| Knobs { bridge, min_run }),
        nonzero_blocks: clusters.blocks(),
        unique_blocks: clusters.contents(),
        clusters: clusters.clusters().len() as u64,
        duplicated_ge2: clusters.share_repeated(),
        shared_ge2_images: clusters.share_in_images(2),
        shared_gt3_images: clusters.share_in_images(4),
        images,
    })
}

/// The images of a domain, or all, with their places in the order of IDs.
fn of_domain<'a>(library: &'a Library, domain: Option<&'a str>) -> impl Iterator<Item = (u32, &'a ImageRecord)> {
    (0u32..).zip(library.images()).filter(move |(_, r)| domain.is_none_or(|domain| r.domain == domain))
}

/// The clusters of a domain, or of all; images are numbered in order of ID, from 0 without gaps.
pub fn clusters(library: &Library, domain: Option<&str>) -> Result<Clusters> {
    let mut clusters = Clusters::default();
    for name in library.catalog().domains.keys().filter(|name| domain.is_none_or(|domain| *name == domain)) {
        let (numbers, records): (Vec<u32>, Vec<&ImageRecord>) = of_domain(library, Some(name)).unzip();
        count_domain(library, &numbers, &records, &mut clusters)?;
    }
    Ok(clusters)
}

fn count_domain(library: &Library, numbers: &[u32], records: &[&ImageRecord], clusters: &mut Clusters) -> Result<()> {
    let runs = records.iter().map(|record| open_run(library, record)).collect::<Result<Vec<_>>>()?;
    let mut content = None;
    let (mut holders, mut copies) = (Vec::new(), 0u64);
    for item in merge(runs) {
        let (row, image) = item?;
        let this = Some((row.hash, row.variant));
        if this != content {
            if copies > 0 {
                clusters.add(&holders, copies);
            }
            content = this;
            holders.clear();
            copies = 0;
        }
        // The images of a content come in order of its blocks, not of their numbers.
        let image = numbers.get(image).copied().unwrap_or(u32::MAX);
        if let Err(at) = holders.binary_search(&image) {
            holders.insert(at, image);
        }
        copies += 1;
    }
    if copies > 0 {
        clusters.add(&holders, copies);
    }
    Ok(())
}

/// The clusters as the content indexes have them: the IDs of the images, ascending, and the contents that exactly these
/// images hold. Costs no look at any fingerprint, but in a library of an older vmar that was not changed since.
pub fn indexed_clusters(library: &Library, domain: Option<&str>) -> Result<Vec<(Vec<u32>, u64)>> {
    let mut counts: BTreeMap<Vec<u32>, u64> = BTreeMap::new();
    let indexed = &library.catalog().index;
    let domains = library.catalog().domains.keys().filter(|name| domain.is_none_or(|domain| *name == domain));
    for name in domains.filter(|name| !indexed.contains_key(*name)) {
        // An older vmar kept none, and nothing was changed since.
        for cluster in clusters(library, Some(name))?.clusters() {
            let id = |n: &u32| library.images().get(*n as usize).map_or(u32::MAX, |r| r.id.0);
            *counts.entry(cluster.images.iter().map(id).collect()).or_default() += cluster.contents;
        }
    }
    let is_wanted = |name: &str| domain.is_none_or(|domain| name == domain);
    for (_, index) in indexed.iter().filter(|(name, _)| is_wanted(name)) {
        for (_, images, contents) in super::contents::read_sets(library, index)?.live() {
            *counts.entry(images.to_vec()).or_default() += contents;
        }
    }
    Ok(counts.into_iter().collect())
}

/// With which images of its sharing domain an image has contents in common, and how many distinct ones; the most first. By the content index.
pub fn shares_of(library: &Library, record: &ImageRecord) -> Result<Vec<(ImageId, u64)>> {
    let image = record.id;
    let mut shares: BTreeMap<u32, u64> = BTreeMap::new();
    for (images, contents) in
        indexed_clusters(library, Some(&record.domain))?.iter().filter(|(images, _)| images.contains(&image.0))
    {
        images.iter().filter(|id| **id != image.0).for_each(|id| *shares.entry(*id).or_default() += contents);
    }
    let mut out: Vec<(ImageId, u64)> = shares.into_iter().map(|(id, contents)| (ImageId(id), contents)).collect();
    out.sort_by_key(|(id, contents)| (std::cmp::Reverse(*contents), *id));
    Ok(out)
}

/// Mean number of probes that a lookup makes, under two schemes of the paper's figure 10, in this order: binary search among
/// all entries, section index.
pub fn mean_search_depths(map: &Map<impl AsRef<[u8]>>) -> [f64; 2] {
    [Scheme::Plain, Scheme::Sections].map(|scheme| mean_search_depth(map, scheme))
}

/// Mean number of probes that a lookup makes under a scheme of the paper's figure 10. All blocks of the image count alike (the
/// paper's means are over the blocks that a booting guest reads); of a large image an even sample is taken.
pub fn mean_search_depth(map: &Map<impl AsRef<[u8]>>, scheme: Scheme) -> f64 {
    const SAMPLES_MAX: u64 = 1 << 20;
    let blocks = map.totals().blocks;
    let step = blocks.div_ceil(SAMPLES_MAX).max(1);
    let sample = (0..blocks).step_by(usize::try_from(step).unwrap_or(usize::MAX)).filter_map(|b| u32::try_from(b).ok());
    let (sum, count) = sample
        .fold((0u64, 0u64), |(sum, count), block| (sum + u64::from(map.search_depth_by(scheme, block)), count + 1));
    sum as f64 / count.max(1) as f64
}

/// Opens the fingerprints of an image.
pub(super) fn open_run(library: &Library, record: &ImageRecord) -> Result<run::Reader> {
    let stamp = run::Stamp { bytes: record.run.bytes, crc32c: record.run.crc32c };
    run::Reader::open(&library.run_path(record), stamp)
}

fn image_stats(library: &Library, record: &ImageRecord) -> Result<ImageStats> {
    let totals = read_map(library, record)?.totals();
    Ok(ImageStats {
        name: record.name.clone(),
        id: record.id.0,
        blocks: totals.blocks,
        nonzero_blocks: totals.nonzero_blocks,
        redirected_blocks: totals.redirected_blocks,
        entries: totals.entries,
        map_bytes: totals.map_bytes,
    })
}
