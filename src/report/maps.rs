//! The block maps of a library: figures 8, 9 and 10 of the paper on its images, and who reads how much from whom.

use super::bars::{Bars, Group};
use super::canvas::number;
use super::chart::{Axis, Chart, Point, distribution};
use super::relations::Bands;
use super::{Cell, Part, Picture, Plot, Section, Table, ratio};
use crate::error::Result;
use crate::indexer::read_map;
use crate::indexer::stats::{Stats, mean_search_depth};
use crate::library::{ImageRecord, Library};
use crate::map::{Map, MapSpec, Scheme, build_with_filter};
use crate::units::{BLOCK_SIZE, human_bytes};
use std::collections::BTreeMap;

/// Bytes of an entry of the paper's map before it is merged, which has one for each block: image and block there.
const PLAIN_ENTRY_BYTES: u64 = 8;
const MIB: f64 = 1_048_576.0;
/// Images up to which each has its bars.
const BARS_MAX: usize = 40;

/// The schemes of figure 10, in the order of [`Looked::depths`].
const SCHEMES: [&str; 4] = [
    "an entry a block, binary search",
    "merged, binary search",
    "merged, section index",
    "merged, index and Bloom filter",
];

/// What was found in the map of an image.
#[derive(Clone, Debug)]
pub struct Looked {
    /// Name of the image.
    pub name: String,
    /// Bytes of the paper's map before it is merged.
    pub plain_bytes: u64,
    /// Bytes of the map.
    pub map_bytes: u64,
    /// Entries by their length in blocks.
    pub lengths: BTreeMap<u32, u64>,
    /// Mean probes of a look-up under the schemes of figure 10.
    pub depths: [f64; 4],
    /// Blocks by the name of the other image that they are read from.
    pub read_from: BTreeMap<String, u64>,
}

/// Looks into the maps of these images.
///
/// # Errors
/// When one cannot be read.
pub fn look(library: &Library, figures: &Stats) -> Result<Vec<Looked>> {
    figures.images.iter().map(|image| look_at(library, library.image(&image.name)?)).collect()
}

fn look_at(library: &Library, record: &ImageRecord) -> Result<Looked> {
    let map = read_map(library, record)?;
    let mut lengths: BTreeMap<u32, u64> = BTreeMap::new();
    map.entries().for_each(|e| *lengths.entry(e.len).or_default() += 1);
    let mut read_from = BTreeMap::new();
    for (target, blocks) in map.targets().filter(|(target, _)| target.image != record.id) {
        read_from.insert(library.image_by_id(target.image)?.name.clone(), blocks);
    }
    let totals = map.totals();
    let filtered = with_filter(&map).map_err(|e| e.at(library.map_path(&record.name)))?;
    let depths = [
        // A binary search among so many entries.
        f64::from(totals.nonzero_blocks.checked_ilog2().map_or(0, |log| log + 1)),
        mean_search_depth(&map, Scheme::Plain),
        mean_search_depth(&map, Scheme::Sections),
        mean_search_depth(&filtered, Scheme::SectionsAndBloom),
    ];
    Ok(Looked {
        name: record.name.clone(),
        plain_bytes: totals.blocks * PLAIN_ENTRY_BYTES,
        map_bytes: totals.map_bytes,
        lengths,
        depths,
        read_from,
    })
}

/// The same map with the filter of the paper: vmar's have none to speak of.
fn with_filter(map: &Map<Vec<u8>>) -> std::result::Result<Map<Vec<u8>>, crate::map::MapError> {
    let targets = map.targets().map(|(target, _)| target).collect();
    let spec = MapSpec { source: map.source(), policy: map.policy(), targets, entries: map.entries().collect() };
    Map::new(build_with_filter(&spec)?)
}

/// The section of figures 8, 9 and 10.
pub fn section(library: &Library, looked: &[Looked]) -> Section {
    let mut parts = vec![Part::Table(table(looked))];
    parts.extend((looked.len() <= BARS_MAX).then(|| Part::Plot(sizes(looked))));
    parts.extend([Part::Plot(lengths(looked)), Part::Plot(depths(looked))]);
    Section {
        title: "Block maps".into(),
        text: format!(
            "A map says where each block of an image is read. Which copy of a content that is says the policy: {}.",
            library.catalog().policy
        ),
        parts,
    }
}

fn table(looked: &[Looked]) -> Table {
    let row = |l: &Looked| {
        let bytes = |bytes: u64| Cell::number(bytes as f64, human_bytes(bytes));
        let depths = l.depths.iter().map(|d| Cell::number(*d, number(*d)));
        [Cell::text(&l.name), bytes(l.plain_bytes), bytes(l.map_bytes)].into_iter().chain(depths).collect()
    };
    let probes = SCHEMES.iter().map(|scheme| format!("probes: {scheme}"));
    Table {
        id: "library-maps".into(),
        caption: "Size of the block maps, and mean probes of a look-up over all blocks of the image.".into(),
        head: ["image", "an entry a block", "map"].into_iter().map(String::from).chain(probes).collect(),
        rows: looked.iter().map(row).collect(),
        rows_max: 0,
    }
}

fn point(y: f64, deviation: f64) -> Option<Point> {
    Some(Point { x: 0.0, y, deviation })
}

fn sizes(looked: &[Looked]) -> Plot {
    let group = |name: &str, color, bytes: &dyn Fn(&Looked) -> u64| {
        let values = looked.iter().map(|l| point(bytes(l) as f64 / MIB, 0.0)).collect();
        Group { name: name.into(), color, is_limit: false, values }
    };
    let bars = Bars {
        x: "image".into(),
        y: "size of the block map (MiB)".into(),
        words: looked.iter().map(|l| l.name.clone()).collect(),
        series: vec![group("an entry a block", 1, &|l| l.plain_bytes), group("entries merged", 0, &|l| l.map_bytes)],
    };
    let mut plot = Plot::new(
        "library-map-sizes",
        "Figure 8: size of the block maps with an entry a block, and with neighbours merged.",
        Picture::Bars(bars),
    );
    plot.told.push(("Paper".into(), "up to 64 MB for an image of 32 GB before, mostly under 5 MB after".into()));
    plot
}

fn lengths(looked: &[Looked]) -> Plot {
    let mut by_length: BTreeMap<u32, u64> = BTreeMap::new();
    for (length, count) in looked.iter().flat_map(|l| &l.lengths) {
        *by_length.entry(*length).or_default() += count;
    }
    let above = |least: u32| {
        let weigh = |(length, count): (&u32, &u64)| u64::from(*length) * count;
        let all: u64 = by_length.iter().map(weigh).sum();
        super::percent(ratio(by_length.range(least..).map(weigh).sum(), all))
    };
    let blocks =
        distribution("blocks in them", 0, by_length.iter().map(|(len, n)| (f64::from(*len), n * u64::from(*len))));
    let entries = distribution("entries", 1, by_length.iter().map(|(len, n)| (f64::from(*len), *n)));
    let ours = format!("{} and {}", above(65), above(2046));
    let chart = Chart {
        x: Axis { label: "length of an entry, at most (blocks of 4 KiB)".into(), log: true },
        y: "share (%)".into(),
        series: vec![blocks, entries],
    };
    let mut plot = Plot::new(
        "library-entry-lengths",
        "Figure 9: entries of the block maps by their length.",
        Picture::Lines(chart),
    );
    plot.told = vec![
        (
            "Paper".into(),
            "entries of more than 64 blocks cover about 75% of the blocks, of more than 2,045 about 25%".into(),
        ),
        ("Ours".into(), ours),
    ];
    plot
}

fn depths(looked: &[Looked]) -> Plot {
    let of = |scheme: usize| {
        let depths: Vec<f64> = looked.iter().filter_map(|l| l.depths.get(scheme).copied()).collect();
        super::points::Mean::of(&depths).and_then(|m| point(m.mean, m.deviation))
    };
    let bars = Bars {
        x: "scheme".into(),
        y: "probes of a look-up, mean over the images".into(),
        words: SCHEMES.map(String::from).to_vec(),
        series: vec![Group {
            name: "mean ± standard deviation over the images".into(),
            values: (0..SCHEMES.len()).map(of).collect(),
            ..Group::default()
        }],
    };
    let mut plot = Plot::new(
        "library-search-depth",
        "Figure 10: search depth of the schemes; all blocks count alike, zero blocks too. vmar looks up by the section index alone.",
        Picture::Bars(bars),
    );
    plot.told.push((
        "Paper".into(),
        "from 18.5 (binary search) to 0.2 (index and filter), over the blocks that booting guests read".into(),
    ));
    plot
}

/// Who reads how much from whom.
pub fn bands(looked: &[Looked]) -> Option<Plot> {
    let mut edges = Vec::new();
    for image in looked {
        for (target, blocks) in &image.read_from {
            let bytes = blocks * BLOCK_SIZE;
            edges.push((image.name.clone(), target.clone(), bytes as f64, human_bytes(bytes)));
        }
    }
    edges.sort_by(|a, b| b.2.total_cmp(&a.2));
    if edges.is_empty() {
        return None;
    }
    let bands = Bands { from: "VMs of".into(), to: "read from the image".into(), edges };
    let caption = "Who reads from whom, by the block maps: a band is as wide as what is read from the other image. At most the \
                   60 widest bands are drawn; what an image reads from itself is left out.";
    Some(Plot::new("library-readers", caption, Picture::Bands(bands)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn looked(name: &str, from: &[(&str, u64)]) -> Looked {
        Looked {
            name: name.into(),
            plain_bytes: 1 << 20,
            map_bytes: 4096,
            lengths: BTreeMap::from([(1, 6), (100, 1)]),
            depths: [4.0, 3.0, 1.0, 0.5],
            read_from: from.iter().map(|(name, blocks)| (name.to_string(), *blocks)).collect(),
        }
    }

    #[test]
    fn plots_are_of_all_maps_together() {
        let all = [looked("a", &[]), looked("b", &[("a", 3)])];
        let Picture::Lines(chart) = lengths(&all).picture else { panic!("no lines") };
        assert_eq!(chart.series[1].points[0], Point { x: 1.0, y: 100.0 * 12.0 / 14.0, deviation: 0.0 });
        assert_eq!(lengths(&all).told[1].1, "94.3% and 0.0%");
        let Picture::Bars(bars) = depths(&all).picture else { panic!("no bars") };
        assert_eq!(bars.series[0].values[3], Some(Point { x: 0.0, y: 0.5, deviation: 0.0 }));
        let edges = bands(&all).unwrap().data.csv();
        assert_eq!(edges, "VMs of,read from the image,bytes\r\nb,a,12288\r\n");
        assert!(bands(&all[..1]).is_none());
    }
}
