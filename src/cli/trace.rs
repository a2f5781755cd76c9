//! `vmar trace`: looks at traces of base reads (`src/redirect/TRACE.md`).

use super::Common;
use super::output::print_json;
use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::redirect::trace::{Record, TraceEnd, TraceHeader, TraceReader};
use crate::units::{BLOCK_SIZE, human_bytes};
use serde::Serialize;
use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Verbs of `vmar trace`.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// What was traced, and the first reads
    Show {
        /// A file that 'vmar serve --record' wrote
        file: PathBuf,
        /// Reads to show
        #[arg(long, value_name = "N", default_value_t = 10)]
        rows: usize,
    },
    /// Sums over one or several traces of a library; a block that several of them read counts once as distinct
    Stat {
        /// Files that 'vmar serve --record' wrote
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Plan the requests of traces again, through the block maps that the library has now
    ///
    /// The traces must hold addresses in the VM's own image: record them while no block is redirected
    /// (vmar library remap --policy bridge --min-run 4294967295). Zero blocks leave no trace and count nowhere.
    Replay {
        /// Files that 'vmar serve --record' wrote
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
        /// Read the bytes too, one read after the other, and say how long that took
        #[arg(long)]
        read: bool,
    },
}

/// Runs the verb.
pub fn run(common: &Common, verb: Verb) -> Result<()> {
    match verb {
        Verb::Show { file, rows } => show(common, &file, rows),
        Verb::Stat { files } => stat(common, &files),
        Verb::Replay { files, read } => super::replay::run(common, &files, read),
    }
}

/// What one or several traces add up to.
#[derive(Debug, Default, Serialize)]
struct Sums {
    traces: u64,
    /// Requests of guests that read base data.
    requests: u64,
    /// Records: reads after redirection.
    reads: u64,
    /// Reads that a request was split into.
    #[serde(flatten)]
    split: Split,
    /// Blocks of these reads.
    blocks: u64,
    distinct_blocks: u64,
    /// Distinct blocks in bytes, a partial last block as a whole one.
    distinct_bytes: u64,
    dropped: u64,
    /// Traces that ended before their trailer.
    cut: u64,
}

/// How many reads became of a request that reads base data; all 0 without requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Split {
    reads_per_request_mean: f64,
    /// 95 of 100 requests have at most so many.
    reads_per_request_p95: u32,
    reads_per_request_max: u32,
}

impl Split {
    /// `counts`: reads of each request, in any order.
    pub(super) fn of(mut counts: Vec<u32>) -> Split {
        counts.sort_unstable();
        let Some(&max) = counts.last() else { return Split::default() };
        let sum: u64 = counts.iter().copied().map(u64::from).sum();
        let rank = (counts.len() * 95).div_ceil(100).max(1);
        Split {
            reads_per_request_mean: sum as f64 / counts.len() as f64,
            reads_per_request_p95: counts.get(rank - 1).copied().unwrap_or(max),
            reads_per_request_max: max,
        }
    }
}

impl std::fmt::Display for Split {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Split { reads_per_request_mean: mean, reads_per_request_p95: p95, reads_per_request_max: max } = self;
        write!(f, "reads a request: mean {mean:.3}, p95 {p95}, max {max}")
    }
}

/// Distinct blocks as ranges.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// (image, first, end): sorted and apart up to `merged`, as they came after that.
    ranges: Vec<(u32, u64, u64)>,
    merged: usize,
}

impl Seen {
    /// Takes in blocks `first..end` of an image.
    pub(super) fn add(&mut self, image: u32, first: u64, end: u64) {
        self.ranges.push((image, first, end));
        if self.ranges.len() > 2 * self.merged + (1 << 16) {
            self.merge();
        }
    }

    /// Joins ranges that touch or overlap.
    fn merge(&mut self) {
        self.ranges.sort_unstable();
        self.ranges.dedup_by(|next, last| {
            let joins = next.0 == last.0 && next.1 <= last.2;
            if joins {
                last.2 = last.2.max(next.2);
            }
            joins
        });
        self.merged = self.ranges.len();
    }

    /// How many blocks were taken in.
    pub(super) fn blocks(&mut self) -> u64 {
        self.merge();
        self.ranges.iter().map(|(_, first, end)| end - first).sum()
    }
}

/// Collects the sums; remembers which blocks were seen as ranges.
#[derive(Debug, Default)]
struct Tally {
    sums: Sums,
    seen: Seen,
    /// Reads of each request.
    counts: Vec<u32>,
}

impl Tally {
    /// Reads a trace to its end, and hands each record on.
    fn add(&mut self, path: &Path, mut each: impl FnMut(&Record)) -> Result<TraceHeader> {
        let file = File::open(path).map_err(|e| Error::io(path, "open the trace", e))?;
        let mut reader = TraceReader::new(file, path)?;
        let mut requests: HashMap<u32, u32> = HashMap::new();
        for record in reader.by_ref() {
            let record = record?;
            each(&record);
            *requests.entry(record.request).or_default() += 1;
            self.sums.reads += 1;
            self.sums.blocks += u64::from(record.count);
            self.seen.add(record.image, record.block.into(), record.end());
        }
        self.sums.traces += 1;
        self.sums.requests += requests.len() as u64;
        self.counts.extend(requests.into_values());
        match reader.end() {
            Some(TraceEnd::Finished { dropped }) => self.sums.dropped += dropped,
            Some(TraceEnd::Cut { torn_bytes }) => {
                self.sums.cut += 1;
                log::warn!("{}: no orderly end, {torn_bytes} bytes of a torn record left out", path.display());
            }
            None => {}
        }
        Ok(*reader.header())
    }

    fn finish(mut self) -> Sums {
        self.sums.distinct_blocks = self.seen.blocks();
        self.sums.distinct_bytes = self.sums.distinct_blocks * BLOCK_SIZE;
        self.sums.split = Split::of(self.counts);
        self.sums
    }
}

#[derive(Serialize)]
struct Shown<'a> {
    file: &'a Path,
    library: String,
    image: u32,
    generation: u64,
    digest: String,
    start_ns: u64,
    duration_us: u64,
    #[serde(flatten)]
    sums: Sums,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    time_us: u64,
    request: u32,
    image: u32,
    block: u32,
    count: u32,
}

fn show(common: &Common, file: &Path, rows: usize) -> Result<()> {
    let mut tally = Tally::default();
    let (mut first, mut duration_us) = (Vec::new(), 0);
    let header = tally.add(file, |r| {
        duration_us = duration_us.max(r.time_us);
        if first.len() < rows {
            let Record { time_us, request, image, block, count } = *r;
            first.push(Row { time_us, request, image, block, count });
        }
    })?;
    let shown = Shown {
        file,
        library: hex(&header.library),
        image: header.image,
        generation: header.generation,
        digest: hex(&header.digest),
        start_ns: header.start_ns,
        duration_us,
        sums: tally.finish(),
        rows: first,
    };
    if common.json {
        return print_json(&shown);
    }
    println!("image {}, generation {}, of library {}", shown.image, shown.generation, shown.library);
    println!("content {}", shown.digest);
    println!(
        "start {} s since 1970, last read {:.3} s later",
        header.start_ns / 1_000_000_000,
        duration_us as f64 / 1e6
    );
    print_sums(&shown.sums);
    println!();
    println!("{:>12}{:>10}{:>8}{:>12}{:>8}", "µs", "request", "image", "block", "count");
    for r in &shown.rows {
        println!("{:>12}{:>10}{:>8}{:>12}{:>8}", r.time_us, r.request, r.image, r.block, r.count);
    }
    if shown.sums.reads > shown.rows.len() as u64 {
        println!("… {} more", shown.sums.reads - shown.rows.len() as u64);
    }
    Ok(())
}

fn stat(common: &Common, files: &[PathBuf]) -> Result<()> {
    let mut tally = Tally::default();
    let mut library = None;
    for file in files {
        let header = tally.add(file, |_| ())?;
        if *library.get_or_insert(header.library) != header.library {
            return Err(Error::file(ErrorKind::Usage, file, "was recorded with another library than the files before")
                .mend("give traces of one library: image IDs of two cannot be compared"));
        }
    }
    let sums = tally.finish();
    if common.json {
        return print_json(&sums);
    }
    print_sums(&sums);
    Ok(())
}

fn print_sums(s: &Sums) {
    println!(
        "{} reads of {} blocks for {} requests; {} distinct blocks ({}); {} records dropped",
        s.reads,
        s.blocks,
        s.requests,
        s.distinct_blocks,
        human_bytes(s.distinct_bytes),
        s.dropped
    );
    println!("{}", s.split);
    if s.cut > 0 {
        println!("{} of {} traces ended without a trailer", s.cut, s.traces);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::redirect::trace::TraceWriter;

    fn write(dir: &Path, name: &str, library: u8, records: &[(u32, u32, u32, u32)]) -> PathBuf {
        let path = dir.join(name);
        let header = TraceHeader { library: [library; 16], image: 0, generation: 1, digest: [1; 32], start_ns: 5 };
        let mut writer = TraceWriter::new(File::create(&path).unwrap(), &header).unwrap();
        for &(request, image, block, count) in records {
            writer.record(&Record { time_us: 3, request, image, block, count }).unwrap();
        }
        writer.finish(1).unwrap();
        path
    }

    #[test]
    fn distinct_blocks_are_the_union_over_all_traces() {
        let dir = tempfile::tempdir().unwrap();
        let a = write(dir.path(), "a", 1, &[(0, 0, 10, 5), (1, 0, 12, 8), (1, 1, 10, 2)]);
        let b = write(dir.path(), "b", 1, &[(0, 0, 0, 10), (7, 1, 11, 1), (8, 0, 30, 1)]);
        let mut tally = Tally::default();
        tally.add(&a, |_| ()).unwrap();
        tally.add(&b, |_| ()).unwrap();
        let s = tally.finish();
        assert_eq!((s.traces, s.requests, s.reads, s.blocks, s.dropped, s.cut), (2, 5, 6, 27, 2, 0));
        assert_eq!(s.distinct_blocks, 20 + 1 + 2);
        assert_eq!(s.distinct_bytes, 23 * 4096);
    }

    #[test]
    fn traces_of_two_libraries_are_not_mixed() {
        let dir = tempfile::tempdir().unwrap();
        let files = [write(dir.path(), "a", 1, &[]), write(dir.path(), "b", 2, &[])];
        let err = stat(&Common { library: None, json: true }, &files).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Usage);
    }

    #[test]
    fn many_ranges_are_merged_on_the_way() {
        let mut seen = Seen::default();
        for i in 0..200_000u64 {
            seen.add(0, i % 1000, i % 1000 + 1);
        }
        assert!(seen.ranges.len() < 70_000);
        assert_eq!(seen.blocks(), 1000);
    }

    #[test]
    fn requests_are_counted_by_their_reads() {
        let counts = (0..100).map(|i| if i < 95 { 1 } else { 9 }).collect();
        let split = Split::of(counts);
        assert_eq!((split.reads_per_request_p95, split.reads_per_request_max), (1, 9));
        assert!((split.reads_per_request_mean - 1.4).abs() < 1e-9);
        assert_eq!(Split::of(vec![3]).reads_per_request_p95, 3);
        assert_eq!(Split::of(vec![]), Split::default());
    }
}
