//! What a library looks like: figures 8 to 11 of the paper on its images, who shares with whom, and what each image costs.

use super::chart::{Axis, Chart, distribution, number};
use super::{Cell, Part, Section, Table};
use crate::error::Result;
use crate::indexer::matrix::{Matrix, matrix};
use crate::indexer::stats::{Stats, indexed_clusters, mean_search_depths, stats};
use crate::indexer::{read_map, target_of};
use crate::library::Library;
use crate::map::Entry;
use crate::units::{BLOCK_SIZE, human_bytes};
use std::collections::BTreeMap;

/// Bytes of an entry of a block map.
const ENTRY_BYTES: u64 = 16;
/// Pairs of images that are listed.
const PAIRS_MAX: usize = 25;
/// Images up to which all pairs are shown in a square.
const SQUARE_MAX: usize = 24;
/// From this share of common contents on (Jaccard), two images could be one.
const NEARLY_ONE: f64 = 0.9;

/// The sections.
///
/// # Errors
/// When a map or a run of the library cannot be read.
pub fn sections(library: &Library, domain: Option<&str>) -> Result<Vec<Section>> {
    let figures = stats(library, domain)?;
    let pairs = matrix(library, domain)?;
    let clusters = indexed_clusters(library, domain)?;
    let cost = Section {
        title: "What each image costs".into(),
        text: format!(
            "{} images, {} of data, {} of it distinct: {} that VMs of different images can share. A content that only one \
             image holds is what that image costs.",
            figures.images.len(),
            human_bytes(figures.nonzero_blocks * BLOCK_SIZE),
            human_bytes(figures.unique_blocks * BLOCK_SIZE),
            percent(figures.shared_ge2_images),
        ),
        parts: vec![Part::Table(cost(&figures, &clusters))],
    };
    Ok(vec![cost, similar(&figures, &clusters), sharing(&pairs), maps(library, &figures)?])
}

fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

fn bytes(blocks: u64, most: u64) -> Cell {
    Cell::bar((blocks * BLOCK_SIZE) as f64, human_bytes(blocks * BLOCK_SIZE), ratio(blocks, most))
}

fn cost(figures: &Stats, clusters: &[(Vec<u32>, u64)]) -> Table {
    let alone: BTreeMap<u32, u64> = clusters
        .iter()
        .filter_map(|(images, contents)| match images.as_slice() {
            [image] => Some((*image, *contents)),
            _ => None,
        })
        .collect();
    let own = |id: u32| alone.get(&id).copied().unwrap_or(0);
    let most = figures.images.iter().map(|i| i.nonzero_blocks).max().unwrap_or(0);
    let row = |image: &crate::indexer::stats::ImageStats| {
        vec![
            Cell::text(&image.name),
            bytes(image.nonzero_blocks, most),
            bytes(own(image.id), most),
            Cell::number(
                ratio(image.redirected_blocks, image.nonzero_blocks),
                percent(ratio(image.redirected_blocks, image.nonzero_blocks)),
            ),
            Cell::number(image.entries as f64, image.entries.to_string()),
            Cell::number(image.map_bytes as f64, human_bytes(image.map_bytes)),
        ]
    };
    Table {
        id: "images".into(),
        caption: "Bars: of the largest image's data.".into(),
        head: ["image", "data", "held by no other", "read from others", "map entries", "map"].map(String::from).to_vec(),
        rows: figures.images.iter().map(row).collect(),
    }
}

/// Figure 11.
fn similar(figures: &Stats, clusters: &[(Vec<u32>, u64)]) -> Section {
    let by_holders = distribution("contents", clusters.iter().map(|(images, contents)| (images.len() as f64, *contents)));
    let chart = Chart {
        x: Axis::linear("images that hold a content, at most"),
        y: Axis::linear("% of distinct contents"),
        series: vec![by_holders],
        limit: None,
    };
    let row = |what: &str, ours: f64| vec![Cell::text(what), Cell::number(ours, percent(ours))];
    let table = Table {
        id: "similarity".into(),
        caption: "Of the non-zero blocks (paper, figure 11).".into(),
        head: ["content held", "share of blocks"].map(String::from).to_vec(),
        rows: vec![
            row("at least twice, in one image or several", figures.duplicated_ge2),
            row("by at least two images", figures.shared_ge2_images),
            row("by more than three images", figures.shared_gt3_images),
        ],
    };
    Section {
        title: "Similarity".into(),
        text: format!("{} clusters: distinct sets of images that hold some content.", figures.clusters),
        parts: vec![
            Part::Table(table),
            Part::Plot { id: "holders".into(), caption: "How many images hold a content.".into(), chart },
        ],
    }
}

fn sharing(found: &Matrix) -> Section {
    let unique: BTreeMap<&str, u64> = found.images.iter().map(|l| (l.name.as_str(), l.unique_blocks)).collect();
    let of = |name: &str| unique.get(name).copied().unwrap_or(0);
    let likeness = |p: &crate::indexer::matrix::Pair| ratio(p.contents, of(&p.a) + of(&p.b) - p.contents);
    let mut pairs: Vec<_> = found.pairs.iter().collect();
    pairs.sort_by_key(|p| std::cmp::Reverse(p.contents));
    let most = pairs.first().map_or(0, |p| p.contents);
    let row = |p: &&crate::indexer::matrix::Pair| {
        let hint = if likeness(p) >= NEARLY_ONE { "could be one image" } else { "" };
        vec![
            Cell::text(&p.a),
            Cell::text(&p.b),
            bytes(p.contents, most),
            Cell::number(likeness(p), percent(likeness(p))),
            Cell::text(hint),
        ]
    };
    let listed = Table {
        id: "pairs".into(),
        caption: format!("The {} pairs that share most, of {}.", pairs.len().min(PAIRS_MAX), pairs.len()),
        head: ["image", "and", "distinct data in common", "of both", ""].map(String::from).to_vec(),
        rows: pairs.iter().take(PAIRS_MAX).map(row).collect(),
    };
    let mut parts = vec![Part::Table(listed)];
    if (2..=SQUARE_MAX).contains(&found.images.len()) {
        parts.push(Part::Table(square(found)));
    }
    Section {
        title: "Who shares with whom".into(),
        text: "VMs of images that share much belong on one host: the second one finds in memory what the first one read."
            .into(),
        parts,
    }
}

fn square(found: &Matrix) -> Table {
    let mut held: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for pair in &found.pairs {
        held.insert((&pair.a, &pair.b), pair.blocks_of_a);
        held.insert((&pair.b, &pair.a), pair.blocks_of_b);
    }
    let row = |line: &crate::indexer::matrix::Line| {
        let cell = |other: &crate::indexer::matrix::Line| {
            let share = ratio(held.get(&(line.name.as_str(), other.name.as_str())).copied().unwrap_or(0), line.nonzero_blocks);
            match other.id == line.id {
                true => Cell::text("–"),
                false => Cell::bar(share, format!("{:.0}%", 100.0 * share), share),
            }
        };
        let name = Cell::text(format!("{} ({})", line.name, line.id));
        [name].into_iter().chain(found.images.iter().map(cell)).collect()
    };
    let numbers = found.images.iter().map(|l| format!("({})", l.id));
    Table {
        id: "matrix".into(),
        caption: "Of the blocks of an image (row), how many have a content that another one (column) holds too.".into(),
        head: ["image".to_string()].into_iter().chain(numbers).collect(),
        rows: found.images.iter().map(row).collect(),
    }
}

/// Figures 8, 9 and 10.
fn maps(library: &Library, figures: &Stats) -> Result<Section> {
    let mut by_entry: BTreeMap<u32, u64> = BTreeMap::new();
    let mut sizes = Vec::new();
    let mut depths = Vec::new();
    for image in &figures.images {
        let record = library.image(&image.name)?;
        let map = read_map(library, record)?;
        debug_assert_eq!(map.source(), target_of(record));
        map.entries().for_each(|e: Entry| *by_entry.entry(e.len).or_default() += 1);
        let [plain, sections] = mean_search_depths(&map);
        depths.push((image.name.clone(), plain, sections));
        sizes.push((image.name.clone(), image.nonzero_blocks * ENTRY_BYTES, image.map_bytes));
    }
    let entries = distribution("entries", by_entry.iter().map(|(len, count)| (f64::from(*len), *count)));
    let blocks = distribution("blocks in them", by_entry.iter().map(|(len, count)| (f64::from(*len), count * u64::from(*len))));
    let chart = Chart {
        x: Axis::log("blocks of an entry, at most"),
        y: Axis::linear("%"),
        series: vec![entries, blocks],
        limit: None,
    };
    let most = sizes.iter().map(|(_, before, _)| *before).max().unwrap_or(0);
    let row = |((name, before, after), (_, plain, sections)): (&(String, u64, u64), &(String, f64, f64))| {
        vec![
            Cell::text(name),
            Cell::bar(*before as f64, human_bytes(*before), ratio(*before, most)),
            Cell::bar(*after as f64, human_bytes(*after), ratio(*after, most)),
            Cell::number(*plain, number(*plain)),
            Cell::number(*sections, number(*sections)),
        ]
    };
    let table = Table {
        id: "maps".into(),
        caption: "Size of the block maps (paper, figure 8), and probes a look-up (figure 10). The paper: mostly under 5 MB for \
                  32 GB, 18.5 probes by binary search, 0.2 by sections and filter."
            .into(),
        head: ["image", "an entry a block", "merged", "binary search", "by sections"].map(String::from).to_vec(),
        rows: sizes.iter().zip(&depths).map(row).collect(),
    };
    Ok(Section {
        title: "Block maps".into(),
        text: format!("Policy {}: which copy of a content is read.", library.catalog().policy),
        parts: vec![
            Part::Table(table),
            Part::Plot { id: "entries".into(), caption: "Entries by their length (paper, figure 9).".into(), chart },
        ],
    })
}
