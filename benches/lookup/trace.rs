//! What is looked up: requests, and each of their blocks.

use super::Case;
use super::shape::Random;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use vmar::indexer::read_map;
use vmar::library::Library;
use vmar::map::{Entry, Map, MapSpec};
use vmar::redirect::trace::TraceReader;

/// Lookups of a synthetic trace.
const LOOKUPS: usize = 200_000;

pub struct Trace {
    pub name: String,
    /// First block and number of blocks.
    pub requests: Vec<(u32, u32)>,
    /// Every block of every request, in order.
    pub blocks: Vec<u32>,
}

impl Trace {
    fn of(name: &str, requests: Vec<(u32, u32)>) -> Trace {
        let blocks = requests.iter().flat_map(|&(first, count)| first..first + count).collect();
        Trace { name: name.to_string(), requests, blocks }
    }

    /// Single blocks of data, anywhere.
    pub fn random(map: &Map<Vec<u8>>) -> Trace {
        let entries: Vec<Entry> = map.entries().collect();
        let mut random = Random::new(1);
        let mut any = || {
            let entry = entries[usize::try_from(random.below(entries.len() as u64)).unwrap()];
            (entry.source + u32::try_from(random.below(entry.len.into())).unwrap(), 1)
        };
        Trace::of("random", (0..LOOKUPS).map(|_| any()).collect())
    }

    /// From the first block on, holes too, 32 blocks a request.
    pub fn sequential(map: &Map<Vec<u8>>) -> Trace {
        let end = u32::try_from(map.totals().blocks).unwrap_or(u32::MAX).min(u32::try_from(LOOKUPS).unwrap());
        Trace::of("sequential", (0..end / 32).map(|i| (32 * i, 32)).collect())
    }

    /// Like a booting guest: half of the requests go on where the last one ended, the others jump to other data; they
    /// take 1 to 32 blocks (readahead), the mean of recorded boots being 8.
    pub fn boot_like(map: &Map<Vec<u8>>) -> Trace {
        let entries: Vec<Entry> = map.entries().collect();
        let blocks = u32::try_from(map.totals().blocks).unwrap_or(u32::MAX);
        let mut random = Random::new(2);
        let (mut requests, mut at, mut sum) = (Vec::new(), 0u32, 0);
        while sum < LOOKUPS {
            if random.below(2) == 0 || at >= blocks {
                let entry = entries[usize::try_from(random.below(entries.len() as u64)).unwrap()];
                at = entry.source + u32::try_from(random.below(entry.len.into())).unwrap();
            }
            let count = (1u32 << random.below(6)).min(blocks - at);
            requests.push((at, count));
            at += count;
            sum += count as usize;
        }
        Trace::of("boot-like", requests)
    }

    /// A recorded one, in the order of its requests.
    fn recorded(path: &Path) -> (u32, Trace) {
        let mut reader = TraceReader::new(File::open(path).unwrap(), path).unwrap();
        let image = reader.header().image;
        let mut requests = Vec::new();
        for record in reader.by_ref().map(Result::unwrap) {
            assert_eq!(record.image, image, "{}: has redirected reads; see the top of benches/lookup", path.display());
            requests.push((record.block, record.count));
        }
        (image, Trace::of("boot", requests))
    }
}

/// Maps of `VMAR_BENCH_LIBRARY` with their traces of `VMAR_BENCH_TRACES`; none without these variables.
pub fn recorded() -> Vec<Case> {
    let (Some(dir), Some(files)) = (std::env::var_os("VMAR_BENCH_LIBRARY"), std::env::var_os("VMAR_BENCH_TRACES"))
    else {
        return Vec::new();
    };
    let library = Library::open(dir).unwrap();
    let mut by_image: BTreeMap<u32, Vec<Trace>> = BTreeMap::new();
    for file in std::env::split_paths(&files) {
        let (image, trace) = Trace::recorded(&file);
        by_image.entry(image).or_default().push(trace);
    }
    let case = |(image, traces)| {
        let record = library.image_by_id(vmar::units::ImageId(image)).unwrap();
        let map = read_map(&library, record).unwrap();
        let spec = MapSpec {
            source: map.source(),
            policy: map.policy(),
            targets: map.targets().map(|(target, _)| target).collect(),
            entries: map.entries().collect(),
        };
        Case::new(format!("{} ({})", record.name, library.catalog().policy), &spec, traces)
    };
    by_image.into_iter().map(case).collect()
}
