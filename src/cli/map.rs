//! `vmar map`: looks inside a block map (`src/map/FORMAT.md`).

use super::Common;
use super::explain::Explained;
use super::output::print_json;
use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Mapping;
use crate::library::{ImageRecord, Library, Policy};
use crate::map::{Entry, Map, MapError, Scheme, Target, Totals};
use crate::units::human_bytes;
use serde::Serialize;
use std::path::{Path, PathBuf};

/// Verbs of `vmar map`.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Where the blocks of an image live, how they are cut into entries, and how deep a search goes
    Show {
        /// Name of the image
        name: String,
    },
    /// Check every byte of a map
    Verify {
        /// Name of the image
        #[arg(required_unless_present = "file", conflicts_with = "file")]
        name: Option<String>,
        /// Check this file instead, without a library
        #[arg(long, value_name = "FILE")]
        file: Option<PathBuf>,
    },
    /// Where one block lives, and who shares it
    Explain {
        /// Name of the image
        name: String,
        /// Number of the block: byte offset / 4096
        #[arg(long, value_name = "N")]
        block: u32,
    },
}

/// Runs the verb.
pub fn run(common: &Common, verb: Verb) -> Result<()> {
    match verb {
        Verb::Show { name } => {
            let library = Library::open(common.library()?)?;
            let shown = Shown::of(&library, library.image(&name)?)?;
            if common.json { print_json(&shown) } else { shown.print() }
        }
        Verb::Verify { file: Some(path), .. } => verify(common, &path, &open(&path)?),
        Verb::Verify { name, .. } => {
            let library = Library::open(common.library()?)?;
            let name = name.unwrap_or_default(); // clap has required it
            verify(common, &library.map_path(&name), &open_of(&library, library.image(&name)?)?)
        }
        Verb::Explain { name, block } => {
            let library = Library::open(common.library()?)?;
            let explained = Explained::of(&library, library.image(&name)?, block)?;
            if common.json { print_json(&explained) } else { explained.print() }
        }
    }
}

/// The verified map in a file.
fn open(path: &Path) -> Result<Map<Mapping>> {
    let mapping = Mapping::open(path).map_err(|e| match Error::io(path, "open the block map", e) {
        err if err.kind() == ErrorKind::NotFound => err.mend("restore it from a copy of the library"),
        err => err,
    })?;
    Map::new(mapping).map_err(|e: MapError| e.at(path))
}

/// The verified map of an image, which must be the map of that very image.
pub(super) fn open_of(library: &Library, record: &ImageRecord) -> Result<Map<Mapping>> {
    let path = library.map_path(&record.name);
    let map = open(&path)?;
    let want = Target { image: record.id, generation: record.generation, digest: record.digest, size: record.size };
    if map.source() != want {
        let cause = format!("is not the map of image {} as the library knows it", record.name);
        return Err(Error::file(ErrorKind::Changed, &path, cause).mend("make it anew with 'vmar library remap'"));
    }
    Ok(map)
}

fn percent(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { 100.0 * part as f64 / whole as f64 }
}

// ---- verify ----

#[derive(Serialize)]
struct Verified<'a> {
    file: &'a Path,
    ok: bool,
    #[serde(flatten)]
    totals: Sums,
}

/// [`Totals`] for JSON.
#[derive(Clone, Copy, Serialize)]
struct Sums {
    blocks: u64,
    nonzero_blocks: u64,
    redirected_blocks: u64,
    self_redirected_blocks: u64,
    entries: u64,
    map_bytes: u64,
}

impl From<Totals> for Sums {
    fn from(t: Totals) -> Self {
        Sums {
            blocks: t.blocks,
            nonzero_blocks: t.nonzero_blocks,
            redirected_blocks: t.redirected_blocks,
            self_redirected_blocks: t.self_redirected_blocks,
            entries: t.entries,
            map_bytes: t.map_bytes,
        }
    }
}

fn verify(common: &Common, file: &Path, map: &Map<Mapping>) -> Result<()> {
    let totals = map.totals();
    if common.json {
        return print_json(&Verified { file, ok: true, totals: totals.into() });
    }
    println!(
        "{}: ok: image {}, {} blocks, {} non-zero, {} redirected, {} entries; targets: {}; {} bytes",
        file.display(),
        map.source().image,
        totals.blocks,
        totals.nonzero_blocks,
        totals.redirected_blocks,
        totals.entries,
        map.target_count(),
        totals.map_bytes
    );
    Ok(())
}

// ---- show ----

/// What `map show` shows.
#[derive(Serialize)]
struct Shown {
    name: String,
    id: u32,
    generation: u64,
    size: u64,
    digest: String,
    policy: String,
    #[serde(flatten)]
    totals: Sums,
    targets: Vec<TargetRow>,
    entry_sizes: Vec<SizeRow>,
    section_blocks: u64,
    sections: u32,
    bloom_bits: u64,
    bloom_hashes: u32,
    bloom_keys: u32,
    bloom_group_blocks: u64,
    parts: Parts,
    search_depth: Depths,
}

#[derive(Serialize)]
struct TargetRow {
    id: u32,
    name: String,
    generation: u64,
    digest: String,
    blocks: u64,
}

/// A step of the paper's figure 9: entries of at most `blocks_max` blocks (`None`: any), and what they cover.
#[derive(Serialize)]
struct SizeRow {
    blocks_max: Option<u32>,
    entries: u64,
    blocks: u64,
}

/// Bytes of the parts of the file, without padding.
#[derive(Serialize)]
struct Parts {
    targets_bytes: u64,
    entries_bytes: u64,
    index_bytes: u64,
    bloom_bytes: u64,
}

/// The paper's figure 10, averaged over all blocks of the image instead of the blocks that a boot reads.
#[derive(Serialize)]
struct Depths {
    plain: Depth,
    sections: Depth,
    sections_and_bloom: Depth,
}

/// Mean probes of the binary search.
#[derive(Clone, Copy, Serialize)]
struct Depth {
    nonzero: f64,
    zero: f64,
    all: f64,
}

impl Shown {
    fn of(library: &Library, record: &ImageRecord) -> Result<Shown> {
        let map = open_of(library, record)?;
        let layout = map.layout();
        let [targets_bytes, entries_bytes, index_bytes, bloom_bytes] = layout.part_bytes;
        Ok(Shown {
            name: record.name.clone(),
            id: record.id.0,
            generation: record.generation,
            size: record.size,
            digest: hex(&record.digest),
            policy: policy_name(map.policy()),
            totals: map.totals().into(),
            targets: map
                .targets()
                .map(|(target, blocks)| TargetRow {
                    id: target.image.0,
                    name: image_name(library, &target),
                    generation: target.generation,
                    digest: hex(&target.digest),
                    blocks,
                })
                .collect(),
            entry_sizes: entry_sizes(map.entries()),
            section_blocks: layout.section_blocks,
            sections: layout.sections,
            bloom_bits: layout.bloom_bits,
            bloom_hashes: layout.bloom_hashes,
            bloom_keys: layout.bloom_keys,
            bloom_group_blocks: layout.bloom_group_blocks,
            parts: Parts { targets_bytes, entries_bytes, index_bytes, bloom_bytes },
            search_depth: Depths {
                plain: mean_depth(&map, Scheme::Plain),
                sections: mean_depth(&map, Scheme::Sections),
                sections_and_bloom: mean_depth(&map, Scheme::SectionsAndBloom),
            },
        })
    }

    fn print(&self) -> Result<()> {
        let t = &self.totals;
        println!(
            "{}: image {}, generation {}, {}, policy {}",
            self.name,
            self.id,
            self.generation,
            human_bytes(self.size),
            self.policy
        );
        println!("content {}", self.digest);
        println!();
        let row = |what: &str, blocks: u64, of: u64| println!("{what:<28}{blocks:>12}  {:5.1} %", percent(blocks, of));
        row("blocks", t.blocks, t.blocks);
        row("non-zero", t.nonzero_blocks, t.blocks);
        row("  in another image", t.redirected_blocks, t.nonzero_blocks);
        row("  elsewhere in this image", t.self_redirected_blocks, t.nonzero_blocks);
        println!();
        println!("{:<28}{:>12}  of non-zero", "target", "blocks");
        for target in &self.targets {
            row(&format!("  {} ({})", target.name, target.id), target.blocks, t.nonzero_blocks);
        }
        self.print_sizes();
        self.print_depths();
        Ok(())
    }

    fn print_sizes(&self) {
        let t = &self.totals;
        println!();
        println!("{:<28}{:>12}  of non-zero blocks", "entries of at most", "entries");
        for row in &self.entry_sizes {
            let what =
                row.blocks_max.map_or("  any size".into(), |n| format!("  {n} block{}", if n == 1 { "" } else { "s" }));
            let share = percent(row.blocks, t.nonzero_blocks);
            let marks = usize::try_from(40 * row.blocks / t.nonzero_blocks.max(1)).unwrap_or(0);
            let bar = "#".repeat(marks);
            println!("{}", format!("{what:<28}{:>12}  {share:5.1} %  {bar}", row.entries).trim_end());
        }
    }

    fn print_depths(&self) {
        println!();
        println!("{:<28}{:>12}{:>10}{:>10}", "mean search depth", "non-zero", "zero", "all");
        let row = |what: &str, d: Depth| println!("{what:<28}{:>12.2}{:>10.2}{:>10.2}", d.nonzero, d.zero, d.all);
        row("  binary search", self.search_depth.plain);
        row("  + section index", self.search_depth.sections);
        // The least filter that the format allows says nothing.
        if self.bloom_keys > 2 {
            row("  + Bloom filter", self.search_depth.sections_and_bloom);
        }
        println!();
        println!(
            "map {} bytes: targets {}, entries {}, index {} ({} sections of {} blocks), \
             Bloom filter {} ({} bits, {} hashes, {} keys; blocks a key: {})",
            self.totals.map_bytes,
            self.parts.targets_bytes,
            self.parts.entries_bytes,
            self.parts.index_bytes,
            self.sections,
            self.section_blocks,
            self.parts.bloom_bytes,
            self.bloom_bits,
            self.bloom_hashes,
            self.bloom_keys,
            self.bloom_group_blocks
        );
    }
}

fn policy_name(code: u32) -> String {
    Policy::name_of(code).map_or_else(|| format!("number {code}"), str::to_string)
}

/// The name of an image that a map points to; its number if the library does not know it.
pub(super) fn image_name(library: &Library, target: &Target) -> String {
    library.image_by_id(target.image).map_or_else(|_| format!("image {}", target.image), |record| record.name.clone())
}

/// Entries and blocks by entry size: at most 1, 4, 16, … blocks, the last row for all.
fn entry_sizes(entries: impl Iterator<Item = Entry>) -> Vec<SizeRow> {
    let limits = [1, 4, 16, 64, 256, 1024, 4096].map(Some).into_iter().chain([None]);
    let mut rows: Vec<SizeRow> = limits.map(|blocks_max| SizeRow { blocks_max, entries: 0, blocks: 0 }).collect();
    for entry in entries {
        for row in rows.iter_mut().filter(|row| row.blocks_max.is_none_or(|max| entry.len <= max)) {
            row.entries += 1;
            row.blocks += u64::from(entry.len);
        }
    }
    rows
}

/// Mean search depth over all blocks of the image.
fn mean_depth(map: &Map<Mapping>, scheme: Scheme) -> Depth {
    let (mut sum, mut count) = ([0u64; 2], [0u64; 2]);
    let blocks = u32::try_from(map.totals().blocks).unwrap_or(u32::MAX);
    for run in map.runs(0, blocks) {
        let zero = usize::from(run.to.is_none());
        count[zero] += u64::from(run.len);
        sum[zero] += (run.source..=run.source + (run.len - 1))
            .map(|block| u64::from(map.search_depth_by(scheme, block)))
            .sum::<u64>();
    }
    let mean = |sum: u64, count: u64| if count == 0 { 0.0 } else { sum as f64 / count as f64 };
    let [nonzero, zero] = [0, 1].map(|i| mean(sum[i], count[i]));
    Depth { nonzero, zero, all: mean(sum[0] + sum[1], count[0] + count[1]) }
}
