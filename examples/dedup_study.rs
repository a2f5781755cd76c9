//! How much of a migration deduplication within its stream takes away (DedupMR), by the size of the chunks, and how fast that goes, by
//! the number of workers.
//!
//! ```text
//! cargo run --release --example dedup_study -- [--workers N] [--rounds N] [--json] FILE...
//! ```
//!
//! A FILE is what QEMU writes when it migrates: `migrate "exec:cat > FILE"`.
//!
//! **Chunks.** The stream has pages; a record of a zero page is a page, too. A chunk of up to 4 KiB is a part of a page. A larger one is
//! an aligned piece of a block's memory, as far as its pages follow each other in the stream; what stands between two records, such as
//! the end of a section, does not matter. Where a run of pages begins or ends within such a piece, the chunk is what there is of it: it
//! is shorter, is counted as *incomplete*, and equals only chunks of its own length. A page that is sent again is a chunk again, as in the
//! paper, which deduplicates every round of pre-copy.
//!
//! **Columns.** *zero*: of all bytes; the sender of every QEMU leaves these out. *again*: chunks that are not zero and came before in
//! the same stream, of all bytes that are not zero. *paper*: size after deduplication to size before it (the paper's *deduplication ratio*,
//! its section 5, for which a zero chunk is a chunk like any other). *removed* is what is missing there to 100 %. *unique*: bytes that
//! are neither zero nor again; *zstd*: these at level 1, in batches of 256 KiB. *table*: hash and number of each unique chunk.
//!
//! **Rates.** For 4 KiB, with the functions of `vmar::migrate::work`, of the bytes of the stream: *map* hashes the pages of each part and
//! looks at zeros, *reduce* decides in order, *pack* runs zstd, each phase by itself as in MapReduce; *one after the other* is the
//! sum. *Pipelined* is as `vmar migrate send` does it: so many threads that hash, one that decides, and so many that pack, all
//! at once. *CPU s/GB* is what map, reduce and pack take of the processors, whoever else uses them. What is sent so differs from the row of 4 KiB: the receiver remembers the last 128 MiB of literals alone.

#![allow(clippy::unwrap_used, reason = "a program of its own")]

use clap::Parser;
use serde::Serialize;
use std::collections::HashSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vmar::cli::output::{Table, percent};
use vmar::migrate::frame::{FRAME_BYTES, Source};
use vmar::migrate::known::{Nothing, WINDOW};
use vmar::migrate::order::Reorder;
use vmar::migrate::part::{Cutter, Item, Part};
use vmar::migrate::stream::{PAGE_BYTES, PAGE_SIZE};
use vmar::migrate::wire::{Digest, Frame, Message};
use vmar::migrate::work::{self, Decided, Decider, Hashed, LEVEL};
use vmar::units::is_zero;

/// Chunk sizes of the paper, and 2 KiB.
const SIZES: [usize; 7] = [1 << 10, 2 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10, 64 << 10];
/// Bytes of a stream that are in memory at once.
const BATCH_BYTES: usize = 256 << 20;
/// A hash, and where its chunk is.
const TABLE_ENTRY_BYTES: u64 = 40;

/// Deduplication within migration streams: shares by chunk size, rates by workers.
#[derive(Debug, Parser)]
struct Args {
    /// What QEMU wrote
    #[arg(required = true)]
    files: Vec<PathBuf>,
    /// Workers, at most [default: one a processor]
    #[arg(long)]
    workers: Option<usize>,
    /// How often each rate is measured; the median counts
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    #[arg(long)]
    json: bool,
}

/// What there is to say of a stream.
#[derive(Serialize)]
struct Study {
    file: String,
    stream_bytes: u64,
    pages: u64,
    chunks: Vec<Share>,
    sent: SentPages,
    rates: Vec<Rates>,
}

/// Chunks of one size.
#[derive(Clone, Default, Serialize)]
struct Share {
    chunk_bytes: usize,
    chunks: u64,
    incomplete: u64,
    bytes: u64,
    zero_bytes: u64,
    again_bytes: u64,
    unique_bytes: u64,
    zstd_bytes: u64,
    table_bytes: u64,
    /// Size after deduplication to size before.
    ratio: f64,
}

/// What the pipeline made of the pages.
#[derive(Clone, Copy, Default, Serialize)]
struct SentPages {
    zero: u64,
    again: u64,
    literal: u64,
    link_bytes: u64,
}

/// GB/s of the stream.
#[derive(Serialize)]
struct Rates {
    workers: usize,
    map: f64,
    reduce: f64,
    pack: f64,
    one_after_the_other: f64,
    pipelined: f64,
    /// Processor time of map, reduce and pack: seconds for a GB of the stream. On a machine that is busy otherwise it tells more.
    cpu_seconds_gb: [f64; 3],
}

/// A chunk that may go on.
#[derive(Default)]
struct Open {
    block: u16,
    /// Its first byte in the block, and where its next page would be.
    piece: u64,
    next: u64,
    bytes: Vec<u8>,
}

/// Counts the chunks of one size.
struct Chunker {
    share: Share,
    seen: HashSet<Digest>,
    open: Open,
    unique: Vec<u8>,
    zstd: zstd::bulk::Compressor<'static>,
}

impl Chunker {
    fn new(size: usize) -> Chunker {
        Chunker {
            share: Share { chunk_bytes: size, ..Share::default() },
            seen: HashSet::new(),
            open: Open::default(),
            unique: Vec::new(),
            zstd: zstd::bulk::Compressor::new(LEVEL).unwrap(),
        }
    }

    fn page(&mut self, block: u16, offset: u64, page: &[u8]) {
        let size = self.share.chunk_bytes;
        if size <= PAGE_BYTES {
            page.chunks(size).for_each(|chunk| self.chunk(chunk));
            return;
        }
        let piece = offset - offset % size as u64;
        let open = &self.open;
        if open.bytes.is_empty() || (open.block, open.piece, open.next) != (block, piece, offset) {
            self.end_open();
            (self.open.block, self.open.piece) = (block, piece);
        }
        self.open.bytes.extend_from_slice(page);
        self.open.next = offset + PAGE_SIZE;
        if self.open.bytes.len() == size {
            self.end_open();
        }
    }

    fn end_open(&mut self) {
        let mut bytes = std::mem::take(&mut self.open.bytes);
        if !bytes.is_empty() {
            self.chunk(&bytes);
            bytes.clear();
        }
        self.open.bytes = bytes;
    }

    fn chunk(&mut self, chunk: &[u8]) {
        let len = chunk.len() as u64;
        self.share.chunks += 1;
        self.share.incomplete += u64::from(chunk.len() < self.share.chunk_bytes);
        self.share.bytes += len;
        if is_zero(chunk) {
            self.share.zero_bytes += len;
        } else if self.seen.insert(*blake3::hash(chunk).as_bytes()) {
            self.share.unique_bytes += len;
            self.unique.extend_from_slice(chunk);
            if self.unique.len() >= FRAME_BYTES {
                self.pack();
            }
        } else {
            self.share.again_bytes += len;
        }
    }

    fn pack(&mut self) {
        self.share.zstd_bytes += self.zstd.compress(&self.unique).unwrap().len() as u64;
        self.unique.clear();
    }

    fn finish(mut self) -> Share {
        self.end_open();
        self.pack();
        let share = &mut self.share;
        share.table_bytes = self.seen.len() as u64 * TABLE_ENTRY_BYTES;
        // One zero chunk stays.
        let after = share.unique_bytes + share.zero_bytes.min(share.chunk_bytes as u64);
        share.ratio = after as f64 / (share.bytes as f64).max(1.0);
        self.share
    }
}

/// The parts of a file, so many bytes at a time.
struct Batches {
    file: File,
    cutter: Cutter,
    ended: bool,
}

impl Batches {
    fn open(path: &Path) -> Batches {
        let file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Batches { file, cutter: Cutter::default(), ended: false }
    }
}

impl Iterator for Batches {
    type Item = Vec<Part>;

    fn next(&mut self) -> Option<Vec<Part>> {
        let (mut parts, mut bytes, mut buf) = (Vec::new(), 0, vec![0; 1 << 20]);
        while bytes < BATCH_BYTES && !self.ended {
            let n = self.file.read(&mut buf).unwrap();
            if n == 0 {
                self.ended = true;
                self.cutter.flush();
            }
            self.cutter.feed(&buf[..n]);
            let more = self.cutter.take_parts();
            bytes += more.iter().map(|p| p.bytes.len()).sum::<usize>();
            parts.extend(more);
        }
        (!parts.is_empty()).then_some(parts)
    }
}

/// Runs `work` on all pieces with so many threads; what came of them, in the order of their numbers.
fn parallel<T: Send, U: Send>(
    pieces: Vec<T>,
    workers: usize,
    number: impl Fn(&U) -> u64,
    work: impl Fn(T) -> U + Sync,
) -> Vec<U> {
    let queue = Mutex::new(pieces.into_iter());
    let one = || {
        let mut done = Vec::new();
        loop {
            let Some(piece) = queue.lock().unwrap().next() else { return done };
            done.push(work(piece));
        }
    };
    let mut all: Vec<U> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..workers).map(|_| scope.spawn(one)).collect();
        threads.into_iter().flat_map(|t| t.join().unwrap()).collect()
    });
    all.sort_by_key(number);
    all
}

/// How long a phase takes.
#[derive(Clone, Copy, Default)]
struct Took {
    wall: Duration,
    cpu_seconds: f64,
}

impl Took {
    /// Adds what `work` takes.
    fn time<T>(&mut self, work: impl FnOnce() -> T) -> T {
        let (began, before) = (Instant::now(), cpu_seconds());
        let result = work();
        self.wall += began.elapsed();
        self.cpu_seconds += cpu_seconds() - before;
        result
    }
}

/// Processor time of this process so far.
fn cpu_seconds() -> f64 {
    // SAFETY: all of a `rusage` may be zero, and the kernel fills it.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: `usage` is one, and ours.
    assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) }, 0);
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// Map, reduce and pack.
type Phases = [Took; 3];

/// Map, reduce and pack one after the other.
fn phases(parts: Vec<Part>, workers: usize, decider: &mut Decider, times: &mut Phases, sent: &mut SentPages) {
    let [map, reduce, pack] = times;
    let hashed = map.time(|| parallel(parts, workers, |h: &Hashed| h.part.number, |part| work::hash(part, &Nothing)));
    let decided: Vec<Decided> = reduce.time(|| hashed.into_iter().map(|h| decider.decide(h)).collect());
    for decided in &decided {
        for item in &decided.part.items {
            sent.zero += u64::from(matches!(item, Item::Zero(_)));
        }
        for source in &decided.sources {
            match source {
                Source::Literal => sent.literal += 1,
                Source::Zero => sent.zero += 1,
                _ => sent.again += 1,
            }
        }
    }
    let pieces: Vec<&Decided> = decided.iter().collect();
    let frames = pack.time(|| parallel(pieces, workers, |f: &Frame| f.number, |d: &Decided| d.pack().unwrap()));
    for frame in frames {
        let mut bytes = Vec::new();
        Message::Frame(frame).write(&mut bytes);
        sent.link_bytes += bytes.len() as u64;
    }
}

/// As a sender does it: all at once.
fn pipelined(parts: Vec<Part>, workers: usize, decider: &mut Decider) -> Duration {
    let began = Instant::now();
    // Of this batch: the numbers of parts go on from batch to batch.
    let queue = Mutex::new((0u64..).zip(parts));
    std::thread::scope(|scope| {
        let (hashed, to_decide) = channel();
        let (decided, to_pack) = channel::<Decided>();
        let (queue, to_pack) = (&queue, Arc::new(Mutex::new(to_pack)));
        for _ in 0..workers {
            let hashed = hashed.clone();
            scope.spawn(move || {
                loop {
                    let Some((number, part)) = queue.lock().unwrap().next() else { return };
                    hashed.send((number, work::hash(part, &Nothing))).unwrap();
                }
            });
            let to_pack = Arc::clone(&to_pack);
            scope.spawn(move || {
                loop {
                    let Ok(decided) = to_pack.lock().unwrap().recv() else { return };
                    std::hint::black_box(decided.pack().unwrap());
                }
            });
        }
        drop(hashed);
        let mut order = Reorder::default();
        while let Ok((number, piece)) = to_decide.recv() {
            for piece in order.push(number, piece) {
                decided.send(decider.decide(piece)).unwrap();
            }
        }
        drop(decided);
    });
    began.elapsed()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The rates of a file with so many workers, and what was sent.
fn rates(path: &Path, workers: usize, rounds: usize) -> (Rates, SentPages) {
    let mut all: [Vec<f64>; 8] = Default::default();
    let mut sent = SentPages::default();
    for _ in 0..rounds.max(1) {
        let (mut apart, mut together) = (Decider::new(WINDOW), Decider::new(WINDOW));
        let (mut times, mut all_at_once, mut bytes) = (Phases::default(), Duration::ZERO, 0u64);
        sent = SentPages::default();
        for parts in Batches::open(path) {
            bytes += parts.iter().map(|p| p.bytes.len() as u64).sum::<u64>();
            all_at_once += pipelined(parts.clone(), workers, &mut together);
            phases(parts, workers, &mut apart, &mut times, &mut sent);
        }
        let [map, reduce, pack] = times.map(|t| t.wall);
        let gb = bytes as f64 / 1e9;
        let walls = [map, reduce, pack, map + reduce + pack, all_at_once];
        let round = walls.map(|t| gb / t.as_secs_f64().max(1e-9)).into_iter().chain(times.map(|t| t.cpu_seconds / gb));
        all.iter_mut().zip(round).for_each(|(all, one)| all.push(one));
    }
    let [map, reduce, pack, one_after_the_other, pipelined, cpu_seconds_gb @ ..] = all.map(median);
    (Rates { workers, map, reduce, pack, one_after_the_other, pipelined, cpu_seconds_gb }, sent)
}

fn study(path: &Path, workers: usize, rounds: usize) -> Study {
    let mut chunkers: Vec<Chunker> = SIZES.map(Chunker::new).into();
    let (mut stream_bytes, mut pages) = (0, 0);
    for part in Batches::open(path).flatten() {
        stream_bytes += part.bytes.len() as u64;
        for item in &part.items {
            let (place, page) = match *item {
                Item::Bytes(_) => continue,
                Item::Zero(place) => (place, &[0; PAGE_BYTES][..]),
                Item::Page(place, at) => (place, part.page(at)),
            };
            pages += 1;
            chunkers.iter_mut().for_each(|c| c.page(place.block, place.offset, page));
        }
    }
    let chunks = chunkers.into_iter().map(Chunker::finish).collect();
    let (rates, sent): (Vec<_>, Vec<_>) = (1..=workers).map(|n| rates(path, n, rounds)).unzip();
    let file = path.display().to_string();
    Study { file, stream_bytes, pages, chunks, sent: sent.last().copied().unwrap_or_default(), rates }
}

fn show(study: &Study) {
    let mib = |bytes: u64| format!("{:.1}", bytes as f64 / f64::from(1 << 20));
    println!("{}: {} MiB of stream, {} pages", study.file, mib(study.stream_bytes), study.pages);
    let head = [
        "chunk KiB",
        "chunks",
        "incomplete",
        "zero",
        "again",
        "paper",
        "removed",
        "unique MiB",
        "zstd MiB",
        "table MiB",
    ];
    let mut table = Table::new(&head, 0);
    for s in &study.chunks {
        table.row(vec![
            (s.chunk_bytes >> 10).to_string(),
            s.chunks.to_string(),
            percent(s.incomplete, s.chunks),
            percent(s.zero_bytes, s.bytes),
            percent(s.again_bytes, s.bytes - s.zero_bytes),
            format!("{:.1}%", 100.0 * s.ratio),
            format!("{:.1}%", 100.0 * (1.0 - s.ratio)),
            mib(s.unique_bytes),
            mib(s.zstd_bytes),
            mib(s.table_bytes),
        ]);
    }
    table.print();
    let SentPages { zero, again, literal, link_bytes } = study.sent;
    println!("sent: {zero} pages of zeros, {again} again, {literal} as literals; {} MiB on the link", mib(link_bytes));
    println!("GB/s of the stream:");
    let head =
        ["workers", "map", "reduce", "pack", "one after the other", "pipelined", "CPU s/GB: map", "reduce", "pack"];
    let mut table = Table::new(&head, 0);
    for r in &study.rates {
        let rates = [r.map, r.reduce, r.pack, r.one_after_the_other, r.pipelined].into_iter().chain(r.cpu_seconds_gb);
        let rates = rates.map(|rate| format!("{rate:.2}"));
        table.row(std::iter::once(r.workers.to_string()).chain(rates).collect());
    }
    table.print();
    println!();
}

fn main() {
    let args = Args::parse();
    let workers = args.workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |n| n.get())).max(1);
    let mut studies = Vec::new();
    for file in &args.files {
        studies.push(study(file, workers, args.rounds));
        if !args.json {
            studies.iter().last().into_iter().for_each(show);
        }
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&studies).unwrap());
    }
}
