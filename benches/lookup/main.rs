//! The map alone (paper, figure 10): nanoseconds and search depth of a lookup, by scheme, image size and trace.
//!
//! ```text
//! cargo bench --bench lookup                                     synthetic maps of 1 GiB, 32 GiB and 1 TiB
//! VMAR_BENCH_LIBRARY=DIR VMAR_BENCH_TRACES=a:b:… cargo bench --bench lookup -- boot       real ones too
//! ```
//!
//! Synthetic maps have the fragmentation of real images ([`shape`]), by the default policy and, for 32 GiB, by `paper`
//! too. Each is read in three ways: `random` (any block of data), `sequential`, and `boot` (requests of the sizes and
//! jumps of a booting guest). The traces in `VMAR_BENCH_TRACES` were written by `vmar serve --record` while no block was
//! redirected (`vmar library remap --policy bridge --min-run 4294967295`), so that they hold the guest's own addresses;
//! they are looked up in the maps that the library has now.
//!
//! First comes a table with the depths, the means of all lookups, and what opening costs; then criterion, lookup by lookup.
#![allow(missing_docs, reason = "criterion's macros make public items")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a benchmark")]

mod bitmap;
mod shape;
mod trace;

use bitmap::Bitmap;
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use std::time::{Duration, Instant};
use trace::Trace;
use vmar::map::{Hit, Map, MapSpec, Scheme, build, build_with_filter};

/// A map, what may stand before its search, and who reads it how.
pub struct Case {
    name: String,
    /// As the library has it.
    map: Map<Vec<u8>>,
    bytes: Vec<u8>,
    /// The same with the paper's Bloom filter.
    filtered: Map<Vec<u8>>,
    bits: Bitmap,
    traces: Vec<Trace>,
}

impl Case {
    pub fn new(name: String, spec: &MapSpec, traces: Vec<Trace>) -> Case {
        let bytes = build(spec).unwrap();
        let map = Map::new(bytes.clone()).unwrap();
        let filtered = Map::new(build_with_filter(spec).unwrap()).unwrap();
        Case { name, bits: Bitmap::of(&map), map, bytes, filtered, traces }
    }
}

/// How a block is looked up, and how deep.
type Lookup = (&'static str, fn(&Case, u32) -> Option<Hit>, fn(&Case, u32) -> u32);

const LOOKUPS: [Lookup; 4] = [
    ("plain", |c, b| c.map.lookup_by(Scheme::Plain, b), |c, b| c.map.search_depth_by(Scheme::Plain, b)),
    // What vmar does.
    ("sections", |c, b| c.map.lookup(b), |c, b| c.map.search_depth(b)),
    (
        "sections+bloom",
        |c, b| c.filtered.lookup_by(Scheme::SectionsAndBloom, b),
        |c, b| c.filtered.search_depth_by(Scheme::SectionsAndBloom, b),
    ),
    (
        "sections+bitmap",
        |c, b| if c.bits.holds(b) { c.map.lookup(b) } else { None },
        |c, b| if c.bits.holds(b) { c.map.search_depth(b) } else { 0 },
    ),
];

/// Nanoseconds of one call in a pass over `items`: the median of 15 passes.
fn ns_per<T>(items: &[T], mut call: impl FnMut(&T)) -> f64 {
    let mut passes: Vec<f64> = (0..15)
        .map(|_| {
            let began = Instant::now();
            items.iter().for_each(&mut call);
            began.elapsed().as_secs_f64() * 1e9 / items.len() as f64
        })
        .collect();
    passes.sort_unstable_by(f64::total_cmp);
    passes[passes.len() / 2]
}

fn print_case(case: &Case) {
    let bits = &case.bits;
    let (totals, layout) = (case.map.totals(), case.map.layout());
    let mut opens: Vec<f64> = (0..9)
        .map(|_| {
            let began = Instant::now();
            black_box(Map::new(&case.bytes[..]).unwrap());
            began.elapsed().as_secs_f64() * 1e3
        })
        .collect();
    opens.sort_unstable_by(f64::total_cmp);
    let [_, entries, index, _] = layout.part_bytes;
    let [.., filter] = case.filtered.layout().part_bytes;
    println!(
        "\n{}: {} of {} blocks non-zero, {} entries; map {} KiB (entries {}, index {}); Bloom filter {} KiB, bitmap {} KiB; \
         {} blocks a section; open {:.2} ms",
        case.name,
        totals.nonzero_blocks,
        totals.blocks,
        totals.entries,
        totals.map_bytes / 1024,
        entries / 1024,
        index / 1024,
        filter / 1024,
        bits.bytes() / 1024,
        layout.section_blocks,
        opens[opens.len() / 2]
    );
    println!(
        "  {:<22}{:>10}{:>8}  {}{:>18}",
        "trace",
        "lookups",
        "zero",
        LOOKUPS.map(|(name, ..)| format!("{name:>16}")).concat(),
        "runs"
    );
    for trace in &case.traces {
        let blocks = &trace.blocks;
        let cells = LOOKUPS.map(|(_, lookup, depth)| {
            let ns = ns_per(blocks, |&block| {
                black_box(lookup(case, block));
            });
            let sum: u64 = blocks.iter().map(|&b| u64::from(depth(case, b))).sum();
            format!("{:>16}", format!("{ns:.1} / {:.2}", sum as f64 / blocks.len() as f64))
        });
        let zero = blocks.iter().filter(|&&b| !bits.holds(b)).count() as f64 / blocks.len() as f64;
        // As a read does it: one search a request, then from entry to entry.
        let ns = ns_per(&trace.requests, |&(first, count)| {
            black_box(case.map.runs(first, count).fold(0u32, |n, run| n ^ run.len));
        });
        let sum: u64 = trace.requests.iter().map(|&(b, _)| u64::from(case.map.search_depth(b))).sum();
        let n = trace.requests.len() as f64;
        let runs = format!("{ns:.1} / {:.2}", sum as f64 / n);
        println!("  {:<22}{:>10}{:>7.1}%  {}{runs:>18}", trace.name, blocks.len(), 100.0 * zero, cells.concat());
    }
    println!("  (ns / mean depth; 'runs' a request of {:.1} blocks, the others a block)", {
        let (sum, n) =
            case.traces.iter().flat_map(|t| &t.requests).fold((0u64, 0u64), |(s, n), r| (s + u64::from(r.1), n + 1));
        sum as f64 / n.max(1) as f64
    });
}

fn lookups(c: &mut Criterion) {
    for case in shape::cases().into_iter().chain(trace::recorded()) {
        print_case(&case);
        for trace in &case.traces {
            let mut group = c.benchmark_group(format!("{}/{}", case.name, trace.name));
            group.warm_up_time(Duration::from_millis(100)).measurement_time(Duration::from_millis(400)).sample_size(20);
            for (name, lookup, _) in LOOKUPS {
                let mut next = 0;
                group.bench_function(BenchmarkId::from_parameter(name), |b| {
                    b.iter(|| {
                        next = if next + 1 < trace.blocks.len() { next + 1 } else { 0 };
                        lookup(&case, black_box(trace.blocks[next]))
                    });
                });
            }
            group.finish();
        }
    }
}

criterion_group!(benches, lookups);
criterion_main!(benches);
