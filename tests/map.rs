//! The block map against a flat model, and against every way in which its bytes can be wrong.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, reason = "a test")]

use proptest::prelude::*;
use vmar::map::{
    Entry, EntryBuilder, Map, MapErrorKind, MapSpec, Run, Scheme, Target, VERSION, build, build_with_filter,
};
use vmar::units::{BLOCK_SIZE, ImageId};

/// One element a block: where it lives, `None` for a zero block.
type Model = Vec<Option<(u32, u32)>>;

fn image(id: u32, size: u64) -> Target {
    Target { image: ImageId(id), generation: 1 + u64::from(id), digest: [id as u8 ^ 0x5a; 32], size }
}

fn entries_of(model: &Model) -> Vec<Entry> {
    let mut builder = EntryBuilder::new();
    for (block, to) in model.iter().enumerate() {
        if let Some((target, target_block)) = *to {
            builder.push(block as u32, target, target_block);
        }
    }
    builder.finish()
}

/// The source image is number 2; targets are 0, 1 and itself.
fn spec_of(model: &Model) -> MapSpec {
    let source = image(2, model.len() as u64 * BLOCK_SIZE);
    let targets = vec![image(0, 3000 * BLOCK_SIZE), image(1, 700 * BLOCK_SIZE), source];
    MapSpec { source, policy: 0, targets, entries: entries_of(model) }
}

/// Random maps as they look in life: zero runs, long runs, scattered single blocks, runs that touch.
fn models() -> impl Strategy<Value = Model> {
    let piece = (0u32..5, 0u32..3000, prop_oneof![3 => 1usize..4, 2 => 1usize..70, 1 => 1usize..400]);
    proptest::collection::vec(piece, 0..40).prop_map(|pieces| {
        let total: usize = pieces.iter().map(|p| p.2).sum();
        let limits = [3000, 700, total as u32];
        let mut model = Model::new();
        for (kind, start, len) in pieces {
            for i in 0..len as u32 {
                model.push((kind < 3).then(|| (kind, (start + i) % limits[kind as usize])));
            }
        }
        model
    })
}

fn small_model() -> Model {
    let mut model = vec![None; 90];
    (2..9).for_each(|b| model[b] = Some((0, 40 + b as u32)));
    (20..22).for_each(|b| model[b] = Some((2, b as u32)));
    model[22] = Some((1, 5));
    model[23] = Some((2, 21));
    (64..90).for_each(|b| model[b] = Some((1, 100 + b as u32)));
    model
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn lookup_and_runs_equal_the_flat_model(model in models(), ranges in proptest::collection::vec((0u32..4000, 0u32..900), 12)) {
        let map = Map::new(build(&spec_of(&model)).unwrap()).unwrap();
        let at = |block: u64| usize::try_from(block).ok().and_then(|b| model.get(b).copied().flatten());
        for block in 0..model.len() as u32 + 3 {
            let hit = map.lookup(block);
            prop_assert_eq!(hit.map(|h| (h.target, h.block)), at(block.into()));
            for i in 0..hit.map_or(0, |h| h.run) {
                prop_assert_eq!(at(u64::from(block + i)), hit.map(|h| (h.target, h.block + i)));
            }
            for scheme in [Scheme::Plain, Scheme::Sections, Scheme::SectionsAndBloom] {
                prop_assert!(map.search_depth_by(scheme, block) <= map.search_depth_by(Scheme::Plain, block));
                prop_assert_eq!(map.lookup_by(scheme, block), hit);
            }
            prop_assert_eq!(map.entry_of(block).is_some(), hit.is_some());
        }
        for (first, count) in ranges.into_iter().chain([(0, u32::MAX), (u32::MAX, 7), (u32::MAX - 3, u32::MAX)]) {
            check_runs(&map, &model, first, count)?;
        }
    }

    #[test]
    fn entries_are_maximal_runs(model in models()) {
        let entries = entries_of(&model);
        let mut flat: Model = vec![None; model.len()];
        for e in &entries {
            for i in 0..e.len {
                prop_assert!(flat[(e.source + i) as usize].replace((e.target, e.block + i)).is_none());
            }
        }
        prop_assert_eq!(&flat, &model);
        let starts = (0..model.len()).filter(|&b| match (b.checked_sub(1).and_then(|p| model[p]), model[b]) {
            (Some((t, at)), Some(here)) => here != (t, at + 1),
            (None, here) => here.is_some(),
            (_, None) => false,
        });
        prop_assert_eq!(starts.count(), entries.len());
    }

    #[test]
    fn totals_equal_the_model(model in models()) {
        let spec = spec_of(&model);
        let bytes = build(&spec).unwrap();
        let map = Map::new(&bytes).unwrap();
        let count = |f: &dyn Fn(usize, (u32, u32)) -> bool| {
            model.iter().enumerate().filter(|(b, to)| to.is_some_and(|to| f(*b, to))).count() as u64
        };
        let t = map.totals();
        prop_assert_eq!(t.blocks, model.len() as u64);
        prop_assert_eq!(t.nonzero_blocks, count(&|_, _| true));
        prop_assert_eq!(t.redirected_blocks, count(&|_, (target, _)| target != 2));
        prop_assert_eq!(t.self_redirected_blocks, count(&|b, (target, at)| target == 2 && at as usize != b));
        prop_assert_eq!(t.entries, spec.entries.len() as u64);
        prop_assert_eq!(t.map_bytes, bytes.len() as u64);
        prop_assert!(map.entries().eq(spec.entries.iter().copied()));
        for (i, (target, blocks)) in map.targets().enumerate() {
            prop_assert_eq!(target, spec.targets[i]);
            prop_assert_eq!(blocks, count(&|_, (t, _)| t as usize == i));
        }
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..1500), with_magic: bool) {
        let mut bytes = bytes;
        if with_magic && bytes.len() >= 16 {
            bytes[..8].copy_from_slice(b"vmar-map");
            bytes[8..16].copy_from_slice(&[1, 0, 0, 0, 0, 1, 0, 0]);
            fix_checksums(&mut bytes);
        }
        prop_assert!(Map::new(&bytes).is_err());
    }
}

fn check_runs(map: &Map<Vec<u8>>, model: &Model, first: u32, count: u32) -> Result<(), TestCaseError> {
    let mut next = u64::from(first);
    let end = (next + u64::from(count)).min(1 << 32);
    let mut before: Option<Run> = None;
    for run in map.runs(first, count) {
        prop_assert_eq!(u64::from(run.source), next);
        prop_assert!(run.len > 0);
        next += u64::from(run.len);
        for i in (0..run.len).take_while(|i| ((run.source + i) as usize) < model.len()) {
            prop_assert_eq!(run.to.map(|(t, b)| (t, b + i)), model[(run.source + i) as usize]);
        }
        if u64::from(run.source) + u64::from(run.len) > model.len() as u64 {
            prop_assert_eq!(run.to, None);
        }
        prop_assert!(run.to.is_some() || before.is_none_or(|b| b.to.is_some()), "two zero runs in a row");
        before = Some(run);
    }
    prop_assert_eq!(next, end);
    Ok(())
}

/// Offset of the table of parts in the header.
const PARTS_AT: usize = 164;

/// Makes all five checksums of a damaged map right again, as far as its header points into it.
fn fix_checksums(bytes: &mut [u8]) {
    if bytes.len() < 256 {
        return;
    }
    for i in 0..4 {
        let at = PARTS_AT + 20 * i;
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let (offset, len) = (word(at) as usize, word(at + 8) as usize);
        if let Some(part) = offset.checked_add(len).and_then(|end| bytes.get(offset..end)) {
            let crc = crc32c::crc32c(part);
            bytes[at + 16..at + 20].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let crc = crc32c::crc32c(&bytes[..252]);
    bytes[252..256].copy_from_slice(&crc.to_le_bytes());
}

#[test]
fn every_flipped_bit_is_refused() {
    let mut bytes = build(&spec_of(&small_model())).unwrap();
    for bit in 0..bytes.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(Map::new(&bytes).is_err(), "bit {bit}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    Map::new(&bytes).unwrap();
}

#[test]
fn every_truncation_and_every_tail_is_refused() {
    let bytes = build(&spec_of(&small_model())).unwrap();
    for len in 0..bytes.len() {
        let err = Map::new(&bytes[..len]).unwrap_err();
        assert_eq!(err.kind(), MapErrorKind::Length, "{len}: {err}");
    }
    for tail in [1, 63, 64, 4096] {
        let longer = [bytes.clone(), vec![0; tail]].concat();
        assert_eq!(Map::new(&longer).unwrap_err().kind(), MapErrorKind::Length);
    }
}

#[test]
fn other_files_and_newer_maps_are_refused_by_name() {
    let mut bytes = build(&spec_of(&small_model())).unwrap();
    assert_eq!(Map::new(b"QFI\xfb\0\0\0\x03".as_slice()).unwrap_err().kind(), MapErrorKind::NotAMap);
    bytes[8] = VERSION as u8 + 1;
    let err = Map::new(&bytes).unwrap_err();
    assert_eq!(err.kind(), MapErrorKind::Newer);
    assert!(err.to_string().contains("version 2"), "{err}");
    bytes[8] = 0;
    assert_eq!(Map::new(&bytes).unwrap_err().kind(), MapErrorKind::Broken);
}

/// Whoever computes checksums can write any map: it must be refused, or give answers inside its images.
#[test]
fn a_damaged_map_with_right_checksums_stays_inside_its_images() {
    let good = build(&spec_of(&small_model())).unwrap();
    let mut accepted = 0;
    let values = [0u32, 1, 2, 3, 31, 32, 64, 255, 0x7fff_ffff, 0x8000_0000, 0xffff_fffe, u32::MAX];
    for at in (0..good.len() - 3).step_by(4) {
        let was = u32::from_le_bytes(good[at..at + 4].try_into().unwrap());
        for value in values.into_iter().chain([was.wrapping_add(1), was.wrapping_sub(1), was << 1, was >> 1]) {
            let mut bytes = good.clone();
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
            fix_checksums(&mut bytes);
            let Ok(map) = Map::new(&bytes) else { continue };
            accepted += 1;
            exercise(&map);
        }
    }
    assert!(accepted > 100, "the checksums were not repaired: {accepted}");
}

#[test]
fn index_and_filter_must_fit_the_entries() {
    let good = build_with_filter(&spec_of(&small_model())).unwrap();
    for (part, what) in [(2, "section index"), (3, "Bloom filter")] {
        let at = PARTS_AT + 20 * part;
        let offset = u32::from_le_bytes(good[at..at + 4].try_into().unwrap()) as usize;
        let len = u32::from_le_bytes(good[at + 8..at + 12].try_into().unwrap()) as usize;
        for word in (offset..offset + len).step_by(4).filter(|&w| good[w..w + 4] != [0; 4]) {
            let mut bytes = good.clone();
            bytes[word..word + 4].fill(0);
            fix_checksums(&mut bytes);
            assert!(Map::new(&bytes).unwrap_err().to_string().contains(what), "{what} at {word}");
        }
    }
}

fn exercise<B: AsRef<[u8]>>(map: &Map<B>) {
    let total = u32::try_from(map.totals().blocks).unwrap_or(u32::MAX);
    let mut covered = 0;
    for run in map.runs(0, total) {
        covered += u64::from(run.len);
        assert_eq!(map.lookup(run.source).map(|h| (h.target, h.block, h.run)), run.to.map(|(t, b)| (t, b, run.len)));
        if let Some((target, block)) = run.to {
            assert!(u64::from(block) + u64::from(run.len) <= map.target(target).unwrap().blocks());
        }
    }
    assert_eq!(covered, u64::from(total));
    for block in [0, 1, total / 2, total.saturating_sub(1), total, u32::MAX] {
        map.lookup(block);
        map.search_depth(block);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn many_damaged_words_with_right_checksums_never_panic(
        words in proptest::collection::vec((0usize..200, prop_oneof![any::<u32>(), 0u32..100]), 1..6)
    ) {
        let mut bytes = build(&spec_of(&small_model())).unwrap();
        for (word, value) in words {
            let at = 4 * word % (bytes.len() - 3);
            bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        fix_checksums(&mut bytes);
        if let Ok(map) = Map::new(&bytes) {
            exercise(&map);
        }
    }
}

#[test]
fn what_cannot_be_right_is_not_built() {
    let model = small_model();
    let refused = |what: &str, change: &dyn Fn(&mut MapSpec)| {
        let mut spec = spec_of(&model);
        change(&mut spec);
        let err = build(&spec).expect_err(what);
        assert!(err.to_string().contains(what), "{err}");
    };
    refused("covers no block", &|s| s.entries[1].len = 0);
    refused("starts at block", &|s| s.entries.swap(0, 1));
    refused("starts at block", &|s| s.entries[0].len = 50);
    refused("past the end", &|s| s.entries.last_mut().unwrap().len += 1);
    refused("past the end", &|s| s.entries[2].block = 700);
    refused("past the end", &|s| s.entries[2].block = u32::MAX);
    refused("points to target 3 of 3", &|s| s.entries[0].target = 3);
    refused("the same image", &|s| s.targets[1] = s.targets[0]);
    refused("differs from it", &|s| s.targets[2].digest[0] ^= 1);
    refused("cannot have", &|s| s.source.size += 1);
    refused("cannot have", &|s| s.targets[0].size = !511);
}

#[test]
fn a_partial_last_block_maps_to_itself_or_not_at_all() {
    let source = image(1, 10 * BLOCK_SIZE - 512);
    let other = image(0, 20 * BLOCK_SIZE - 512);
    let with = |entry| build(&MapSpec { source, policy: 0, targets: vec![other, source], entries: vec![entry] });
    with(Entry { source: 5, len: 5, target: 1, block: 5 }).unwrap();
    with(Entry { source: 4, len: 5, target: 0, block: 14 }).unwrap();
    for entry in [
        Entry { source: 5, len: 5, target: 0, block: 5 }, // the partial block of the source is redirected
        Entry { source: 0, len: 5, target: 0, block: 15 }, // the partial block of another image is a target
        Entry { source: 0, len: 1, target: 1, block: 9 }, // the own partial block is the target of another block
        Entry { source: 9, len: 1, target: 1, block: 3 },
    ] {
        assert!(with(entry).unwrap_err().to_string().contains("partial last block"), "{entry:?}");
    }
}

#[test]
fn the_largest_image_works_and_costs_little() {
    let source = image(0, BLOCK_SIZE << 32);
    let entries =
        vec![Entry { source: 0, len: 1, target: 0, block: 0 }, Entry { source: 1, len: u32::MAX, target: 0, block: 1 }];
    let bytes = build(&MapSpec { source, policy: 0, targets: vec![source], entries }).unwrap();
    assert!(bytes.len() < 400 << 10, "{}", bytes.len());
    let map = Map::new(bytes).unwrap();
    assert_eq!(map.lookup(u32::MAX).map(|h| (h.block, h.run)), Some((u32::MAX, 1)));
    assert_eq!(map.runs(u32::MAX, u32::MAX).map(|r| (r.source, r.len)).collect::<Vec<_>>(), [(u32::MAX, 1)]);
    assert_eq!(map.totals().nonzero_blocks, 1 << 32);
}

/// Many entries in one section, as in a large image.
#[test]
fn a_fragmented_corner_of_a_large_image_is_right() {
    let mut model: Model = vec![None; 1 << 22];
    for i in 0..2000 {
        model[70_000 + 2 * i] = Some((1, (i as u32 * 7) % 600));
    }
    let spec = spec_of(&model);
    let map = Map::new(build(&spec).unwrap()).unwrap();
    let filtered = Map::new(build_with_filter(&spec).unwrap()).unwrap();
    assert!(map.search_depth(71_001) >= 4, "the test is about crowded sections");
    let (mut zeros, mut unfiltered) = (0, 0);
    for block in 69_000..76_000 {
        let want = model[block as usize];
        assert_eq!(map.lookup(block).map(|h| (h.target, h.block)), want);
        for scheme in [Scheme::Plain, Scheme::Sections, Scheme::SectionsAndBloom] {
            for map in [&map, &filtered] {
                assert_eq!(map.lookup_by(scheme, block), map.lookup(block), "{scheme:?}, block {block}");
            }
        }
        if want.is_none() {
            zeros += 1;
            unfiltered += u32::from(filtered.search_depth_by(Scheme::SectionsAndBloom, block) > 0);
        }
    }
    assert!(unfiltered * 20 < zeros, "{unfiltered} of {zeros} zero blocks pass the filter");
}

#[test]
fn an_image_of_zeros_has_a_map() {
    for blocks in [0, 1, 77] {
        let map = Map::new(build(&spec_of(&vec![None; blocks])).unwrap()).unwrap();
        assert_eq!(map.lookup(0), None);
        assert_eq!(map.runs(0, 80).collect::<Vec<_>>(), [Run { source: 0, len: 80, to: None }]);
        assert_eq!(map.search_depth(0), 0);
    }
}
