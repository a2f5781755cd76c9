//! The policy `bridge` against a model that knows only the bytes, and `library remap` from policy to policy.

use super::family::{Spec, spec};
use super::support::{BLOCK, Place, image_of, work};
use proptest::prelude::*;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::Instant;
use vmar::indexer::read_map;
use vmar::indexer::remap::remap;
use vmar::indexer::verify::verify;
use vmar::library::{Policy, Runs, Writer};
use vmar::redirect::Base;
use vmar::redirect::plan::Source;

/// Image and block.
type Address = (usize, usize);

/// Where each block of image `own` must be read, worked out from left to right over the real bytes.
fn model(images: &[(&str, Vec<u8>)], own: usize, gap_max: usize, run_min: usize) -> Vec<Option<Address>> {
    let blocks = |i: usize| images[i].1.chunks(BLOCK).collect::<Vec<&[u8]>>();
    let mut first: HashMap<&[u8], Address> = HashMap::new();
    for i in 0..=own {
        for (b, block) in blocks(i).into_iter().enumerate() {
            first.entry(block).or_insert((i, b));
        }
    }
    let mine = blocks(own);
    let canonical: Vec<Option<Address>> = mine
        .iter()
        .enumerate()
        .map(|(b, block)| match block.iter().all(|&byte| byte == 0) {
            true => None,
            false if block.len() < BLOCK => Some((own, b)),
            false => Some(first[block]),
        })
        .collect();
    let mut read = canonical.clone();
    let mut b = 1;
    while b < mine.len() {
        let Some((image, at)) = read[b - 1].filter(|&(image, _)| image != own) else {
            b += 1;
            continue;
        };
        // How many blocks until the run goes on in step: none, if it simply does.
        let resumes = (0..=gap_max).find(|k| {
            b + k < mine.len()
                && (b..=b + k).all(|x| canonical[x].is_some())
                && canonical[b + k] == Some((image, at + 1 + k))
        });
        let gap = resumes.unwrap_or(0);
        let theirs = blocks(image);
        if (0..gap).all(|x| mine[b + x] == theirs[at + 1 + x]) {
            (0..gap).for_each(|x| read[b + x] = Some((image, at + 1 + x)));
            b += gap;
        }
        b += 1;
    }
    let mut start = 0;
    while start < read.len() {
        let Some((image, at)) = read[start] else {
            start += 1;
            continue;
        };
        let len = (0..).find(|&x| read.get(start + x).copied().flatten() != Some((image, at + x))).unwrap();
        if len < run_min {
            (start..start + len).for_each(|x| read[x] = Some((own, x)));
        }
        start += len;
    }
    read
}

/// Every block of every image, by the model, by lookup, and by the plan of reads of all sizes.
fn check(place: &Place, images: &[(&str, Vec<u8>)], gap_max: usize, run_min: usize) {
    let library = place.library();
    for (own, (name, bytes)) in images.iter().enumerate() {
        let map = read_map(&library, library.image(name).unwrap()).unwrap();
        assert_eq!(map.policy(), 2);
        for (b, want) in model(images, own, gap_max, run_min).into_iter().enumerate() {
            let got = map.lookup(b as u32).map(|h| (map.target(h.target).unwrap().image.0 as usize, h.block as usize));
            assert_eq!(got, want, "image {name} block {b}");
        }
        for entry in map.entries().filter(|e| map.target(e.target).unwrap().image.0 as usize != own) {
            assert!(entry.len as usize >= run_min, "image {name}: {entry:?} is too short to leave the image");
        }
        let base = Base::open(&library, name).unwrap();
        for size in [512, 4096, 5 * 4096 + 512, bytes.len()] {
            assert!(through(&base, bytes.len(), size) == *bytes, "image {name} in reads of {size}");
        }
        verify(&place.lib(), name, &work()).unwrap();
    }
    place.assert_no_leftovers();
}

/// The whole image, read through the plan in requests of `size` bytes.
fn through(base: &Base, len: usize, size: usize) -> Vec<u8> {
    let mut out = vec![0xaa; len];
    for at in (0..len).step_by(size.max(1)) {
        let mut pieces = Vec::new();
        base.plan(at as u64, size.min(len - at), at, &mut pieces);
        for piece in pieces {
            let part = &mut out[piece.at..piece.at + piece.len];
            match piece.source {
                Source::Image { target, offset } => base.file(target).read_exact_at(part, offset).unwrap(),
                Source::Zero => part.fill(0),
                Source::Overlay { .. } => panic!("a base has no overlay"),
            }
        }
    }
    out
}

fn make(place: &Place, specs: &[Spec]) -> (Vec<String>, Vec<PathBuf>) {
    let names: Vec<String> = (0..specs.len()).map(|i| format!("image{i}")).collect();
    let file =
        |(name, s): (&String, &Spec)| place.raw(name, &image_of(&s.contents, s.tail), |i| i % s.written_zeros == 0);
    let files = names.iter().zip(specs).map(file).collect();
    (names, files)
}

fn maps_of(place: &Place) -> Vec<(PathBuf, Vec<u8>)> {
    place.snapshot().into_iter().filter(|(path, _)| path.starts_with("maps")).collect()
}

fn change(place: &Place, policy: Policy) {
    remap(&mut Writer::open(place.lib()).unwrap(), policy, &work()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Whatever the images (colliding hashes too) and the knobs; a remap gives the maps that adding would have given.
    #[test]
    fn blocks_are_read_where_the_model_says_and_hold_the_right_bytes(
        specs in prop::collection::vec(spec(), 1..6),
        bridge in 0u32..6,
        min_run in 0u32..6,
    ) {
        let policy = Policy::Bridge(Runs { bridge, min_run });
        let place = Place::with(policy);
        let (names, files) = make(&place, &specs);
        let all: Vec<(&str, &Path)> = names.iter().zip(&files).map(|(n, f)| (n.as_str(), f.as_path())).collect();
        place.add(&all).unwrap();
        let images: Vec<(&str, Vec<u8>)> =
            names.iter().zip(&specs).map(|(n, s)| (n.as_str(), image_of(&s.contents, s.tail))).collect();
        check(&place, &images, bridge as usize, min_run as usize);

        let (bridged, runs) = (maps_of(&place), place.snapshot());
        change(&place, Policy::Paper);
        super::oracle::check(&place, &images);
        change(&place, policy);
        prop_assert!(maps_of(&place) == bridged);
        prop_assert!(place.snapshot() == runs, "catalog and fingerprints are as before");
    }
}

/// Contents that no two tests share: the three images hold one long run each way.
fn family(odd: u32, in_second: u32) -> Vec<(&'static str, Vec<u8>)> {
    let run = |middle: u32| (20..30).chain([middle]).chain(30..40).collect::<Vec<u32>>();
    vec![
        ("first", image_of(&[50, odd, 51], None)),
        ("second", image_of(&run(in_second), None)),
        ("third", image_of(&run(odd), None)),
    ]
}

fn entries_of_third(images: &[(&str, Vec<u8>)]) -> usize {
    let place = Place::with(Policy::BRIDGE);
    let files: Vec<PathBuf> = images.iter().map(|(n, b)| place.raw(n, b, |_| false)).collect();
    let all: Vec<(&str, &Path)> = images.iter().zip(&files).map(|((n, _), f)| (*n, f.as_path())).collect();
    place.add(&all).unwrap();
    check(&place, images, 8, 8);
    let library = place.library();
    read_map(&library, library.image("third").unwrap()).unwrap().entries().count()
}

#[test]
fn a_run_is_read_on_through_a_block_whose_canonical_copy_is_elsewhere() {
    assert_eq!(entries_of_third(&family(60, 60)), 1);
}

#[test]
fn a_block_with_the_same_hash_and_other_bytes_is_no_bridge() {
    // 1 and 2 have one SHA-1.
    assert_eq!(entries_of_third(&family(1, 1)), 1);
    assert_eq!(entries_of_third(&family(1, 2)), 3);
    assert_eq!(entries_of_third(&family(60, 61)), 3);
}

/// A server that has the old map open goes on with it; the next one gets the new map.
#[test]
fn an_open_base_outlives_a_remap() {
    let place = Place::with(Policy::Paper);
    let images = family(60, 60);
    let files: Vec<PathBuf> = images.iter().map(|(n, b)| place.raw(n, b, |_| false)).collect();
    for ((name, _), file) in images.iter().zip(&files) {
        place.add(&[(name, file)]).unwrap();
    }
    let old = Base::open(&place.library(), "third").unwrap();
    let before = place.library();
    change(&place, Policy::BRIDGE);
    let new = Base::open(&place.library(), "third").unwrap();
    // Opened with the catalog as it was before: the images are the same, so the new map fits it too.
    let mixed = Base::open(&before, "third").unwrap();
    let want = &images[2].1;
    for base in [&old, &new, &mixed] {
        assert!(through(base, want.len(), 4096) == *want);
    }
}

#[test]
fn a_damaged_map_comes_back() {
    let place = Place::new();
    let file = place.raw("f", &image_of(&(20..40).collect::<Vec<u32>>(), None), |_| false);
    place.add(&[("a", &file), ("b", &file)]).unwrap();
    let before = place.snapshot();
    fs::write(place.lib().join("maps/b.map"), "broken").unwrap();
    fs::remove_file(place.lib().join("maps/a.map")).unwrap();
    place.ok(&["library", "remap"]);
    assert!(place.snapshot() == before);
}

#[test]
fn a_changed_image_or_a_damaged_run_stops_a_remap_and_nothing_changes() {
    let place = Place::new();
    let bytes = image_of(&(20..40).collect::<Vec<u32>>(), None);
    let (a, b) = (place.raw("a.raw", &bytes, |_| false), place.raw("b.raw", &bytes, |_| false));
    place.add(&[("a", &a), ("b", &b)]).unwrap();
    let before = place.snapshot();
    let run = place.lib().join("runs/b.1.parquet");
    let good = fs::read(&run).unwrap();
    fs::write(&run, &good[..good.len() - 1]).unwrap();
    assert!(place.fails(1, &["library", "remap", "--policy", "bridge"]).contains("b.1.parquet"));
    fs::write(&run, &good).unwrap();

    // Other bytes under the same size and time: what would be published is compared, and does not fit.
    let meta = fs::metadata(&b).unwrap();
    let mut permissions = meta.permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
    fs::set_permissions(&b, permissions).unwrap();
    let file = fs::File::options().write(true).open(&b).unwrap();
    file.write_all_at(b"x", 5 * BLOCK as u64).unwrap();
    file.set_modified(meta.modified().unwrap()).unwrap();
    let line = place.fails(1, &["library", "remap", "--policy", "bridge"]);
    assert!(line.contains("not what was fingerprinted") && line.contains("image verify"), "{line}");
    assert!(place.snapshot() == before);
}

#[test]
fn policies_and_knobs_on_the_command_line() {
    let place = Place::with(Policy::Paper);
    let file = place.raw("f", &image_of(&[20, 21], None), |_| false);
    place.add(&[("a", &file), ("b", &file)]).unwrap();
    let stats = || -> serde_json::Value { serde_json::from_str(&place.ok(&["stats", "--json"])).unwrap() };
    assert_eq!((stats()["policy"].as_str(), stats().get("bridge")), (Some("paper"), None));
    let line = place.fails(2, &["library", "remap", "--bridge", "3"]);
    assert!(line.contains("--policy bridge"), "{line}");
    place.fails(2, &["library", "remap", "--policy", "bridge", "--bridge", "5000"]);
    place.fails(2, &["library", "remap", "--policy", "magic"]);
    assert!(place.ok(&["library", "remap", "--policy", "bridge"]).contains("bridge 8, min-run 8, before paper"));
    let s = stats();
    assert_eq!((s["policy"].as_str(), &s["bridge"], &s["min_run"]), (Some("bridge"), &8.into(), &8.into()));
    assert_eq!(s["images"][1]["redirected_blocks"], 0, "a run of two stays");
    place.ok(&["library", "remap", "--min-run", "2"]);
    let s = stats();
    assert_eq!((&s["bridge"], &s["min_run"]), (&8.into(), &2.into()), "the other knob is as it was");
    assert_eq!(s["images"][1]["redirected_blocks"], 2);
    let json: serde_json::Value =
        serde_json::from_str(&place.ok(&["library", "remap", "--policy", "paper", "--json"])).unwrap();
    assert_eq!(json[1]["reads_from"], serde_json::json!([0]));

    let default = place.path("default");
    place.ok(&["library", "init", default.to_str().unwrap()]);
    assert_eq!(vmar::library::Library::open(default).unwrap().catalog().policy, Policy::DEFAULT);
    let other = place.path("other");
    let other = other.to_str().unwrap();
    place.ok(&["library", "init", other, "--policy", "bridge", "--bridge", "4", "--min-run", "3"]);
    let library = vmar::library::Library::open(other).unwrap();
    assert_eq!(library.catalog().policy, Policy::Bridge(Runs { bridge: 4, min_run: 3 }));
}

/// Killed at any instant, with maps of both policies perhaps: every map is right, and the next writer ends it.
#[test]
fn kill_9_during_a_remap_leaves_before_or_after() {
    let place = Place::new();
    let names: Vec<String> = (0..12).map(|i| format!("image{i}")).collect();
    let all: Vec<u32> = (20..600).collect();
    for (i, name) in names.iter().enumerate() {
        let mut contents = all[i * 7..][..400].to_vec();
        contents.extend((0..60).map(|x| 20 + (x * 37 + i as u32) % 500));
        place.add(&[(name, &place.raw(name, &image_of(&contents, None), |_| false))]).unwrap();
    }
    let remap = |policy: &str| {
        let mut command = place.vmar();
        command.args(["library", "remap", "--policy", policy]).stdout(Stdio::null()).stderr(Stdio::null());
        command.spawn().unwrap()
    };
    let paper = place.snapshot();
    let began = Instant::now();
    assert!(remap("bridge").wait().unwrap().success());
    let time = began.elapsed();
    let bridge = place.snapshot();
    assert!(paper != bridge);
    let (mut before, mut after) = (0, 0);
    for i in 0..24 {
        let goal = if i % 2 == 0 { "paper" } else { "bridge" };
        let mut child = remap(goal);
        thread::sleep(time * (i / 2) / 10);
        child.kill().unwrap();
        child.wait().unwrap();
        place.ok(&["image", "verify"]);
        drop(Writer::open(place.lib()).unwrap());
        let now = place.snapshot();
        assert!(now == paper || now == bridge, "a mixture is left");
        if (now == paper) == (goal == "paper") {
            after += 1
        } else {
            before += 1
        }
        assert!(remap(goal).wait().unwrap().success());
    }
    assert!(before > 0 && after > 0, "{before} before, {after} after");
}
