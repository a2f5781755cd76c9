//! `vmar estimate`: what image files would share, before anything is set up.

use super::Common;
use super::image::stop_on_signals;
use super::output::{Progress, Table, percent, print_json};
use crate::error::{Error, ErrorKind, Result};
use crate::image::partitions::{Partition, misaligned, warning};
use crate::image::{Conversion, Format, Probe, convert, probe};
use crate::indexer::Work;
use crate::indexer::estimate::interval::Interval;
use crate::indexer::estimate::sample::{Sample, Sampling, sample};
use crate::indexer::estimate::{Estimate, FileEstimate, PairEstimate, estimate};
use crate::units::{BLOCK_SIZE, human_bytes};
use serde::Serialize;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Arguments of `vmar estimate`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Image files: raw, or qcow2 and VMDK with --scratch
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Look at one content in N; 1 looks at all of them, and takes memory for all
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    sample: u64,
    /// Take another sample
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Convert qcow2 and VMDK files to sparse raw files in this directory for the time being
    #[arg(long, value_name = "DIR")]
    scratch: Option<PathBuf>,
}

/// What is printed as JSON.
#[derive(Debug, Serialize)]
struct Report<'a> {
    block_size: u64,
    confidence: f64,
    files: Vec<FileLine<'a>>,
    pairs: Vec<PairLine<'a>>,
    #[serde(flatten)]
    all: Figures<'a>,
}

#[derive(Debug, Serialize)]
struct FileLine<'a> {
    file: &'a Path,
    #[serde(flatten)]
    figures: &'a FileEstimate,
    misaligned_partitions: Vec<MisalignedLine>,
}

#[derive(Debug, Serialize)]
struct MisalignedLine {
    partition: u32,
    start: u64,
    bytes: u64,
}

#[derive(Debug, Serialize)]
struct PairLine<'a> {
    file_a: &'a Path,
    file_b: &'a Path,
    #[serde(flatten)]
    figures: &'a PairEstimate,
}

/// The figures of all files together.
#[derive(Debug, Serialize)]
struct Figures<'a> {
    sample: u64,
    seed: u64,
    sampled_contents: u64,
    nonzero_blocks: u64,
    unique_blocks: &'a Interval,
    duplicates_within: &'a Interval,
    duplicates_between: &'a Interval,
    saving: &'a Interval,
}

/// A file that was looked through.
struct Looked {
    path: PathBuf,
    misaligned: Vec<Partition>,
}

/// Runs the verb.
pub fn run(common: &Common, args: Args) -> Result<()> {
    let stop = stop_on_signals()?;
    let progress = Progress::new();
    let work = Work::on_all_cores(&stop, &progress);
    // All of them, before any work is done.
    let probes: Vec<Probe> = args.files.iter().map(|file| probe(file)).collect::<Result<_>>()?;
    probes.iter().try_for_each(|p| check_format(p, args.scratch.as_deref()))?;
    let sampling = Sampling { one_in: args.sample, seed: args.seed };
    let (mut looked, mut samples) = (Vec::new(), Vec::new());
    for (path, from) in args.files.iter().zip(&probes) {
        let (misaligned, sample) = look(path, from, args.scratch.as_deref(), sampling, &work)?;
        looked.push(Looked { path: path.clone(), misaligned });
        samples.push(sample);
    }
    drop(progress);
    let found = estimate(&samples, sampling);
    if common.json {
        return print_json(&report(&looked, &found));
    }
    print_tables(&looked, &found);
    Ok(())
}

fn check_format(from: &Probe, scratch: Option<&Path>) -> Result<()> {
    if from.format == Format::Raw || scratch.is_some() {
        return Ok(());
    }
    let cause = format!("a {} image, whose blocks are not where the disk has them", from.format);
    Err(Error::file(ErrorKind::Unsupported, &from.path, cause)
        .mend("name a directory with room for a sparse raw copy with --scratch DIR"))
}

fn look(
    shown: &Path,
    from: &Probe,
    scratch: Option<&Path>,
    sampling: Sampling,
    work: &Work,
) -> Result<(Vec<Partition>, Sample)> {
    let copy = match (from.format, scratch) {
        (Format::Raw, _) | (_, None) => None,
        (_, Some(dir)) => Some(Scratch::convert(from, dir, work)?),
    };
    let path = copy.as_ref().map_or(&from.path, |copy| &copy.0);
    let file = File::open(path).map_err(|e| Error::io(path, "open it", e))?;
    let size = file.metadata().map_err(|e| Error::io(path, "look at it", e))?.len();
    Ok((misaligned(&file, shown, size)?, sample(path, shown, sampling, work)?))
}

/// A converted image that goes away again.
struct Scratch(PathBuf);

impl Scratch {
    fn convert(from: &Probe, dir: &Path, work: &Work) -> Result<Scratch> {
        let copy = Scratch(dir.join(format!(".vmar-estimate-{}.raw", std::process::id())));
        let name = from.path.file_name().unwrap_or_default().display();
        work.observer.begin(&format!("converting {name}"), 0);
        convert(&Conversion { from, to: &copy.0, stop: work.stop, progress: &|_| {} })?;
        work.observer.end();
        Ok(copy)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(e) = std::fs::remove_file(&self.0)
            && e.kind() != std::io::ErrorKind::NotFound
        {
            log::warn!("{}: cannot remove it: {e}", self.0.display());
        }
    }
}

/// Says on standard error which partitions of an image that was added are misaligned. Never an error: the image is added.
pub(super) fn warn_misaligned(path: &Path) {
    let found = File::open(path).map_err(|e| Error::io(path, "open it", e)).and_then(|file| {
        let size = file.metadata().map_err(|e| Error::io(path, "look at it", e))?.len();
        misaligned(&file, path, size)
    });
    match found {
        Ok(partitions) => partitions.iter().for_each(|p| eprintln!("warning: {}", warning(path, p))),
        Err(err) => log::info!("{err}"),
    }
}

fn report<'a>(looked: &'a [Looked], found: &'a Estimate) -> Report<'a> {
    let path = |i: usize| looked.get(i).map_or(Path::new(""), |l| l.path.as_path());
    let line = |p: &Partition| MisalignedLine { partition: p.number, start: p.start, bytes: p.len };
    Report {
        block_size: BLOCK_SIZE,
        confidence: 0.95,
        files: looked
            .iter()
            .zip(&found.files)
            .map(|(l, figures)| FileLine {
                file: &l.path,
                figures,
                misaligned_partitions: l.misaligned.iter().map(line).collect(),
            })
            .collect(),
        pairs: found
            .pairs
            .iter()
            .map(|figures| PairLine { file_a: path(figures.a), file_b: path(figures.b), figures })
            .collect(),
        all: Figures {
            sample: found.sample,
            seed: found.seed,
            sampled_contents: found.sampled_contents,
            nonzero_blocks: found.nonzero_blocks,
            unique_blocks: &found.unique_blocks,
            duplicates_within: &found.duplicates_within,
            duplicates_between: &found.duplicates_between,
            saving: &found.saving,
        },
    }
}

fn print_tables(looked: &[Looked], found: &Estimate) {
    let names: Vec<String> = looked.iter().map(|l| l.path.display().to_string()).collect();
    let head = ["file", "blocks", "non-zero", "unique", "only here", "repeated inside", "others hold"];
    let mut table = Table::new(&head, 1);
    for (name, file) in names.iter().zip(&found.files) {
        table.row(vec![
            name.clone(),
            file.blocks.to_string(),
            file.nonzero_blocks.to_string(),
            number(&file.unique_blocks),
            number(&file.only_here),
            number(&file.duplicates_within),
            share(&file.held_by_others),
        ]);
    }
    table.print();
    if names.len() > 1 {
        println!();
        print_matrix(&names, found);
    }
    println!();
    print_summary(found);
    for l in looked {
        l.misaligned.iter().for_each(|p| println!("\nwarning: {}", warning(&l.path, p)));
    }
}

fn print_matrix(names: &[String], found: &Estimate) {
    println!("share of the contents of each (row) that another (column) holds:");
    let columns: Vec<String> = (1..=names.len()).map(|i| format!("({i})")).collect();
    let head: Vec<&str> = ["", ""].into_iter().chain(columns.iter().map(String::as_str)).collect();
    let mut table = Table::new(&head, 2);
    for (a, (name, column)) in names.iter().zip(&columns).enumerate() {
        let cell = |b: usize| {
            let pair = found.pairs.iter().find(|p| (p.a, p.b) == (a.min(b), a.max(b)));
            pair.map_or("-".to_string(), |p| share(if a < b { &p.a_held_by_b } else { &p.b_held_by_a }))
        };
        let cells = [column.clone(), name.clone()].into_iter().chain((0..names.len()).map(cell));
        table.row(cells.collect());
    }
    table.print();
}

fn print_summary(found: &Estimate) {
    let bytes = |blocks: f64| human_bytes(whole(blocks).saturating_mul(BLOCK_SIZE));
    let all = found.nonzero_blocks;
    let unique = &found.unique_blocks;
    println!("non-zero blocks     {all} ({})", bytes(all as f64));
    let held = percent(whole(unique.estimate), all);
    println!("unique blocks       {} ({}, {held})", number(unique), bytes(unique.estimate));
    println!("repeated inside     {}", number(&found.duplicates_within));
    println!("held by several     {}", number(&found.duplicates_between));
    println!(
        "saving              {} of page cache and disk: {} ±{}",
        share(&found.saving),
        bytes(found.saving.estimate * all as f64),
        bytes(found.saving.margin() * all as f64),
    );
    match found.sample {
        1 => println!("every content was looked at: the figures are exact"),
        n => println!("one content in {n} was looked at ({}); ± is a 95 % confidence interval", found.sampled_contents),
    }
}

/// A number that is not negative, rounded.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "conversions of floats saturate")]
fn whole(x: f64) -> u64 {
    x.round() as u64
}

fn number(x: &Interval) -> String {
    format!("{} ±{}", whole(x.estimate), whole(x.margin()))
}

fn share(x: &Interval) -> String {
    format!("{:.1}% ±{:.1}", 100.0 * x.estimate, 100.0 * x.margin())
}
