//! What the images of a library have in common: figure 11 of the paper on them, what each image costs, who shares with whom,
//! and which could be one.

use super::chart::{Axis, Chart, Series, distribution};
use super::maps::{self, Looked};
use super::relations::Square;
use super::{Cell, Part, Picture, Plot, Section, Table, percent, ratio};
use crate::cluster::Clusters;
use crate::error::Result;
use crate::indexer::matrix::{Line, Matrix, Pair, matrix};
use crate::indexer::stats::{Stats, clusters, stats_of};
use crate::library::{ImageRecord, Library};
use crate::units::{BLOCK_SIZE, human_bytes};
use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;

/// Pairs of images that the page lists; the CSV file has all.
const PAIRS_MAX: usize = 25;
/// Images up to which all pairs are shown in a square: more are not legible.
const SQUARE_MAX: usize = 40;
/// From this share of the contents of both on, two images could be one.
const NEARLY_ONE: f64 = 0.9;
/// From this share of the contents of an image on, another one nearly contains it.
const NEARLY_INSIDE: f64 = 0.95;
/// Pairs below this are no candidates.
const LIKE_MIN: f64 = 0.5;

/// What was counted.
struct Counted<'l> {
    library: &'l Library,
    figures: Stats,
    clusters: Clusters,
    pairs: Matrix,
    looked: Vec<Looked>,
}

/// The sections, of one sharing domain or of all. What images of different domains have in common is never looked at.
///
/// # Errors
/// When a map or a run of the library cannot be read.
pub fn sections(library: &Library, domain: Option<&str>) -> Result<Vec<Section>> {
    let clusters = clusters(library, domain)?;
    let figures = stats_of(library, domain, &clusters)?;
    if figures.images.is_empty() {
        let text = "There is no image in it yet: 'vmar image add NAME=FILE'.".to_string();
        return Ok(vec![Section { title: "The library".into(), parts: vec![Part::Note(text)], ..Section::default() }]);
    }
    let looked = maps::look(library, &figures)?;
    let counted = Counted { library, figures, clusters, pairs: matrix(library, domain)?, looked };
    Ok(vec![
        counted.costs()?,
        counted.similarity(),
        counted.sharing(),
        counted.candidates(),
        maps::section(library, &counted.looked),
    ])
}

fn bytes(blocks: u64, most: u64) -> Cell {
    Cell::bar((blocks * BLOCK_SIZE) as f64, human_bytes(blocks * BLOCK_SIZE), ratio(blocks, most))
}

impl Counted<'_> {
    /// What each image costs.
    fn costs(&self) -> Result<Section> {
        let figures = &self.figures;
        let text = format!(
            "{} images hold {} of data, {} of it distinct; {} of the blocks have a content that at least two images hold. What \
             an image alone holds is what a host pays for it: the rest it has anyway, for other images. So much memory is \
             free again when nobody reads the image any more.",
            figures.images.len(),
            human_bytes(figures.nonzero_blocks * BLOCK_SIZE),
            human_bytes(figures.unique_blocks * BLOCK_SIZE),
            percent(figures.shared_ge2_images),
        );
        let title = "What each image costs".into();
        Ok(Section { title, text, parts: vec![Part::Table(self.cost_table()?)] })
    }

    fn cost_table(&self) -> Result<Table> {
        let mut alone: BTreeMap<u32, u64> = BTreeMap::new();
        for cluster in self.clusters.clusters() {
            if let [image] = *cluster.images {
                alone.insert(image, cluster.contents);
            }
        }
        let mut lent: BTreeMap<&str, u64> = BTreeMap::new();
        for (name, blocks) in self.looked.iter().flat_map(|l| &l.read_from) {
            *lent.entry(name).or_default() += blocks;
        }
        let place = |name: &str| (0u32..).zip(self.library.images()).find(|(_, r)| r.name == name).map(|(n, _)| n);
        let most = self.figures.images.iter().map(|i| i.nonzero_blocks).max().unwrap_or(0);
        let mut rows = Vec::new();
        for image in &self.figures.images {
            let record = self.library.image(&image.name)?;
            let own = place(&image.name).and_then(|place| alone.get(&place)).copied().unwrap_or(0);
            let freed = freed_bytes(self.library, record) + image.map_bytes;
            rows.push(vec![
                Cell::text(&image.name),
                bytes(image.nonzero_blocks, most),
                bytes(own, most),
                Cell::share(ratio(image.redirected_blocks, image.nonzero_blocks)),
                bytes(lent.get(image.name.as_str()).copied().unwrap_or(0), most),
                Cell::number(freed as f64, human_bytes(freed)),
            ]);
        }
        let head = [
            "image",
            "data",
            "held by no other",
            "read from others",
            "others read from it",
            "freed on disk by removal",
        ];
        let caption = "Bars: of the largest image's data. On disk: fingerprints and map, and the raw file if vmar made it; other \
                       raw files stay where they are.";
        let head = head.map(String::from).to_vec();
        Ok(Table { id: "library-images".into(), caption: caption.into(), head, rows, rows_max: 0 })
    }

    /// Figure 11.
    fn similarity(&self) -> Section {
        let figures = &self.figures;
        let copies =
            distribution("", 0, self.clusters.by_copies().map(|(copies, contents)| (copies as f64, copies * contents)));
        let holders = distribution("", 0, self.clusters.clusters().iter().map(|c| (c.images.len() as f64, c.blocks)));
        let above = |series: &Series, most: f64| {
            let below = series.points.iter().rev().find(|p| p.x <= most).map_or(0.0, |p| p.y);
            format!("{:.1}%", 100.0 - below)
        };
        let chart = |label: &str, log: bool, mut series: Series| {
            series.name = "non-zero blocks".into();
            let x = Axis { label: label.into(), log };
            Picture::Lines(Chart { x, y: "share of the non-zero blocks (%)".into(), series: vec![series] })
        };
        let at_least_nine = above(&copies, 8.0);
        let copies = chart("blocks of the library with the same content, at most", true, copies);
        let holders = chart("images with the same content, at most", false, holders);
        let mut a = Plot::new(
            "library-duplicates",
            "Figure 11a: how often the content of a block is there, in one image or in several.",
            copies,
        );
        let mut b = Plot::new("library-holders", "Figure 11b: how many images hold the content of a block.", holders);
        a.told = vec![
            ("Paper".into(), "more than 60% at least twice, 10% more than eight times".into()),
            ("Ours".into(), format!("{} and {at_least_nine}", percent(figures.duplicated_ge2))),
        ];
        b.told = vec![
            ("Paper".into(), "more than 50% in at least two images, about 25% in more than three".into()),
            (
                "Ours".into(),
                format!("{} and {}", percent(figures.shared_ge2_images), percent(figures.shared_gt3_images)),
            ),
        ];
        Section {
            title: "Similarity".into(),
            text: format!("{} clusters: distinct sets of images that hold some content.", figures.clusters),
            parts: vec![Part::Plot(a), Part::Plot(b)],
        }
    }

    /// Who shares with whom.
    fn sharing(&self) -> Section {
        let mut parts = Vec::new();
        if (2..=SQUARE_MAX).contains(&self.pairs.images.len()) {
            let caption = "Of the blocks of an image (row), how many have a content that another image (column, numbered as the \
                           rows) holds too: percent.";
            parts.push(Part::Plot(Plot::new("library-matrix", caption, Picture::Square(square(&self.pairs)))));
        }
        parts.extend(maps::bands(&self.looked).map(Part::Plot));
        parts.push(Part::Table(self.pair_table()));
        Section {
            title: "Who shares with whom".into(),
            text: "VMs of images that share much belong on one host: the second one finds in memory what the first one read."
                .into(),
            parts,
        }
    }

    fn unique(&self, name: &str) -> u64 {
        self.pairs.images.iter().find(|l| l.name == name).map_or(0, |l| l.unique_blocks)
    }

    /// Of what either has, how much both have.
    fn likeness(&self, p: &Pair) -> f64 {
        ratio(p.contents, (self.unique(&p.a) + self.unique(&p.b)).saturating_sub(p.contents))
    }

    fn pair_table(&self) -> Table {
        let mut pairs: Vec<&Pair> = self.pairs.pairs.iter().collect();
        pairs.sort_by_key(|p| std::cmp::Reverse(p.contents));
        let most = pairs.first().map_or(0, |p| p.contents);
        let row = |p: &&Pair| {
            vec![Cell::text(&p.a), Cell::text(&p.b), bytes(p.contents, most), Cell::share(self.likeness(p))]
        };
        Table {
            id: "library-pairs".into(),
            caption: "What every two images have in common, most first.".into(),
            head: ["image", "and", "distinct data in common", "of what either has"].map(String::from).to_vec(),
            rows: pairs.iter().map(row).collect(),
            rows_max: PAIRS_MAX,
        }
    }

    /// Pairs that could be one image.
    fn candidates(&self) -> Section {
        let mut found: Vec<(f64, &Pair, String)> = Vec::new();
        for pair in &self.pairs.pairs {
            let likeness = self.likeness(pair);
            let (in_b, in_a) = (ratio(pair.contents, self.unique(&pair.a)), ratio(pair.contents, self.unique(&pair.b)));
            let advice = match () {
                () if likeness >= NEARLY_ONE => "nearly the same: one of them may do for both".to_string(),
                () if in_b >= NEARLY_INSIDE => format!("{} is nearly contained in {}", pair.a, pair.b),
                () if in_a >= NEARLY_INSIDE => format!("{} is nearly contained in {}", pair.b, pair.a),
                () if likeness >= LIKE_MIN => "alike: look whether both are needed".to_string(),
                () => continue,
            };
            found.push((likeness, pair, advice));
        }
        found.sort_by(|a, b| b.0.total_cmp(&a.0));
        let row = |(likeness, pair, advice): &(f64, &Pair, String)| {
            let share = |name: &str| Cell::share(ratio(pair.contents, self.unique(name)));
            let advice = Cell::text(advice);
            let names = [Cell::text(&pair.a), Cell::text(&pair.b)];
            names.into_iter().chain([Cell::share(*likeness), share(&pair.a), share(&pair.b), advice]).collect()
        };
        let head = ["image", "and", "of what either has", "of the first", "of the second", "advice"];
        let table = Table {
            id: "library-candidates".into(),
            caption: "Shares are of distinct contents.".into(),
            head: head.map(String::from).to_vec(),
            rows: found.iter().map(row).collect(),
            rows_max: PAIRS_MAX,
        };
        let none = format!("No two images have {} of their contents in common.", percent(LIKE_MIN));
        Section {
            title: "Candidates to merge".into(),
            text: "Images so alike that one of them may do. That is about upkeep: what they share costs a host nothing twice."
                .into(),
            parts: vec![if found.is_empty() { Part::Note(none) } else { Part::Table(table) }],
        }
    }
}

/// Bytes of the files that go with an image, its map left out.
fn freed_bytes(library: &Library, record: &ImageRecord) -> u64 {
    let on_disk = |path| std::fs::metadata(path).map_or(0, |meta| meta.blocks() * 512);
    let raw = if record.owned() { on_disk(library.image_path(record)) } else { 0 };
    raw + record.files().map(|f| on_disk(library.dir().join(&f.file))).sum::<u64>()
}

fn square(found: &Matrix) -> Square {
    let mut held: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for pair in &found.pairs {
        held.insert((&pair.a, &pair.b), pair.blocks_of_a);
        held.insert((&pair.b, &pair.a), pair.blocks_of_b);
    }
    let share = |of: &Line, by: &Line| match of.id == by.id {
        true => 1.0,
        false => ratio(held.get(&(of.name.as_str(), by.name.as_str())).copied().unwrap_or(0), of.nonzero_blocks),
    };
    let row = |of: &Line| found.images.iter().map(|by| share(of, by)).collect();
    Square {
        names: found.images.iter().map(|l| l.name.clone()).collect(),
        shares: found.images.iter().map(row).collect(),
    }
}
