//! Synthetic maps with the fragmentation of real ones.
//!
//! The quantiles were measured on two Debian images of 2 GiB (db and python2 of `docs/performance.md`) that share with
//! others: lengths of stretches of data, of the holes between them, and of the entries, by both policies. Every 300 holes
//! one is as large as it takes for a third of the image to be data.

use super::Case;
use super::trace::Trace;
use vmar::map::{Entry, Map, MapSpec, Target, build};
use vmar::units::{BLOCK_SIZE, ImageId};

/// Where the quantiles lie.
const AT: [f64; 14] = [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0];
const STRETCHES: [f64; 14] = [1., 1., 4., 15., 20., 24., 29., 40., 58., 110., 500., 1200., 3900., 12000.];
const HOLES: [f64; 14] = [1., 1., 1., 1., 1., 3., 6., 9., 12., 15., 25., 30., 200., 400.];
const RUNS_PAPER: [f64; 14] = [1., 1., 1., 1., 1., 1., 2., 3., 6., 14., 30., 70., 340., 5000.];
const RUNS_BRIDGE: [f64; 14] = [1., 1., 2., 8., 14., 18., 22., 30., 45., 85., 190., 355., 1050., 8000.];
const HOLES_A_LARGE_ONE: u64 = 300;
/// Blocks of a large hole.
const LARGE: u64 = 150_000;

/// SplitMix64: the same numbers everywhere.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A length with these quantiles, geometric between two of them.
    fn length(&mut self, quantiles: &[f64; 14]) -> u64 {
        let at = (self.next() >> 11) as f64 / (1u64 << 53) as f64;
        let i = AT.iter().rposition(|&q| q <= at).unwrap_or(0).min(AT.len() - 2);
        let part = (at - AT[i]) / (AT[i + 1] - AT[i]);
        (quantiles[i] * (quantiles[i + 1] / quantiles[i]).powf(part)) as u64
    }
}

/// An image of so many GiB that reads from seven others of its size and from itself.
fn map_of(gib: u64, runs: &[f64; 14]) -> MapSpec {
    const TARGETS: u64 = 8;
    let blocks = (gib << 30) / BLOCK_SIZE;
    let image = |id: u32| Target { image: ImageId(id), generation: 1, digest: [0; 32], size: gib << 30 };
    let mut random = Random::new(gib);
    let (mut entries, mut at, mut holes) = (Vec::new(), 256u64, 0u64);
    let u32_of = |n: u64| u32::try_from(n).unwrap();
    while at < blocks {
        let end = (at + random.length(&STRETCHES)).min(blocks);
        while at < end {
            let len = random.length(runs).min(end - at);
            let target = random.below(TARGETS);
            let block = if target == TARGETS - 1 { at } else { random.below(blocks - len) };
            entries.push(Entry { source: u32_of(at), len: u32_of(len), target: u32_of(target), block: u32_of(block) });
            at += len;
        }
        holes += 1;
        at += if holes % HOLES_A_LARGE_ONE == 0 { LARGE } else { random.length(&HOLES) };
    }
    let targets = (0..u32_of(TARGETS)).map(image).collect();
    MapSpec { source: image(u32_of(TARGETS - 1)), policy: 0, targets, entries }
}

pub fn cases() -> Vec<Case> {
    let of = |name: &str, gib: u64, runs| {
        let spec = map_of(gib, runs);
        let map = Map::new(build(&spec).unwrap()).unwrap();
        let traces = vec![Trace::random(&map), Trace::sequential(&map), Trace::boot_like(&map)];
        Case::new(name.into(), &spec, traces)
    };
    vec![
        of("1 GiB", 1, &RUNS_BRIDGE),
        of("32 GiB", 32, &RUNS_BRIDGE),
        of("32 GiB, policy paper", 32, &RUNS_PAPER),
        of("1 TiB", 1024, &RUNS_BRIDGE),
    ]
}
