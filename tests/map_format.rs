//! `src/map/FORMAT.md` and the code describe the same bytes: its hexdump is the golden map.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a test")]

mod golden;

use vmar::map::{Entry, Map, MapSpec, Target, Totals, build_with_filter};
use vmar::units::ImageId;

const SPECIFICATION: &str = include_str!("../src/map/FORMAT.md");

/// The example of the specification: image 1, 40 blocks and 512 bytes long, and what it shares with image 0.
fn example() -> MapSpec {
    let source = Target { image: ImageId(1), generation: 1, digest: [0xb1; 32], size: 40 * 4096 + 512 };
    let other = Target { image: ImageId(0), generation: 3, digest: [0xa0; 32], size: 64 * 4096 };
    MapSpec {
        source,
        policy: 1,
        targets: vec![other, source],
        entries: vec![
            Entry { source: 0, len: 2, target: 0, block: 0 },
            Entry { source: 8, len: 4, target: 0, block: 17 },
            Entry { source: 12, len: 1, target: 1, block: 12 },
            Entry { source: 13, len: 1, target: 1, block: 12 },
            Entry { source: 39, len: 2, target: 1, block: 39 },
        ],
    }
}

#[test]
fn the_specification_shows_the_bytes_that_are_built() {
    golden::assert_golden(SPECIFICATION, &build_with_filter(&example()).unwrap());
}

#[test]
fn the_bytes_of_the_specification_are_read_as_it_says() {
    let map = Map::new(golden::hexdump(SPECIFICATION)).unwrap();
    let spec = example();
    assert_eq!(map.source(), spec.source);
    assert_eq!(map.policy(), 1);
    assert!(map.targets().map(|(t, _)| t).eq(spec.targets));
    assert!(map.targets().map(|(_, blocks)| blocks).eq([6, 4]));
    assert!(map.entries().eq(spec.entries));
    let want = Totals {
        blocks: 41,
        nonzero_blocks: 10,
        redirected_blocks: 6,
        self_redirected_blocks: 1,
        entries: 5,
        map_bytes: golden::hexdump(SPECIFICATION).len() as u64,
    };
    assert_eq!(map.totals(), want);
}

/// What the reader of the specification computes for a key of the Bloom filter; independent of the code in `bloom.rs`.
#[test]
fn the_filter_is_the_one_that_is_specified() {
    let file = golden::hexdump(SPECIFICATION);
    let word = |at: usize| u64::from(u32::from_le_bytes(file[at..at + 4].try_into().unwrap()));
    let (group_bits, keys, lines, hashes) = (word(148), word(152), word(156), word(160));
    let filter = &file[word(224) as usize..][..lines as usize * 64];
    let blocks = [0u64, 1, 8, 9, 10, 11, 12, 13, 39, 40];
    assert_eq!((group_bits, keys), (0, blocks.len() as u64));
    let mut want = vec![0u8; filter.len()];
    for key in blocks {
        let mut z = key.wrapping_add(0x9e3779b97f4a7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d049bb133111eb);
        let h = z ^ (z >> 31);
        let line = ((h >> 32) * lines) >> 32;
        for i in 0..hashes {
            let bit = ((h & 511) + i * (((h >> 9) & 511) | 1)) % 512;
            want[(line * 64 + bit / 8) as usize] |= 1 << (bit % 8);
        }
    }
    assert_eq!(filter, want);
}
