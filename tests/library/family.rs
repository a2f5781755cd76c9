//! Random families of small images against the oracle.

use super::support::{Place, image_of, noise, work};
use super::{brute_force, oracle};
use proptest::prelude::*;
use std::path::{Path, PathBuf};
use vmar::indexer::verify::verify;

/// One image: contents, an unaligned end, and which of its zero blocks are written instead of holes.
#[derive(Clone, Debug)]
pub struct Spec {
    pub contents: Vec<u32>,
    pub tail: Option<(u32, usize)>,
    pub written_zeros: usize,
}

pub fn spec() -> impl Strategy<Value = Spec> {
    // Runs of ascending contents make long entries; 1 to 8 are colliding pairs.
    let run = (0u32..40, 1u32..8).prop_map(|(first, len)| (first..first + len).collect::<Vec<u32>>());
    let zeros = (1usize..20).prop_map(|n| vec![0u32; n]);
    let collide = prop::collection::vec(1u32..=8, 1..4);
    let part = prop_oneof![4 => run, 2 => zeros, 2 => collide];
    let tail = prop::option::of((0u32..12, (1usize..8).prop_map(|sectors| sectors * 512)));
    (prop::collection::vec(part, 0..8), tail, 1usize..5).prop_filter_map("an empty image", |(parts, tail, n)| {
        let contents = parts.concat();
        (!contents.is_empty() || tail.is_some()).then_some(Spec { contents, tail, written_zeros: n })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Every figure of `stats`, every redirect of every block, whatever the images were added together with.
    #[test]
    fn figures_and_redirects_are_those_of_the_real_bytes(
        specs in prop::collection::vec(spec(), 1..6),
        together in 1usize..4,
    ) {
        let place = Place::new();
        let names: Vec<String> = (0..specs.len()).map(|i| format!("image{i}")).collect();
        let images: Vec<(&str, Vec<u8>)> =
            names.iter().zip(&specs).map(|(n, s)| (n.as_str(), image_of(&s.contents, s.tail))).collect();
        let files: Vec<PathBuf> = images
            .iter()
            .zip(&specs)
            .map(|((name, bytes), s)| place.raw(name, bytes, |i| i % s.written_zeros == 0))
            .collect();
        let all: Vec<(&str, &Path)> = images.iter().zip(&files).map(|((n, _), f)| (*n, f.as_path())).collect();
        for part in all.chunks(together) {
            place.add(part).unwrap();
        }
        oracle::check(&place, &images);
        place.assert_no_leftovers();
        for (name, _) in &images {
            verify(&place.lib(), name, &work()).unwrap();
        }
    }
}

/// Many pieces of work for the workers: comparison batches that end at 1 MiB, chunks with holes, sorting in parallel.
#[test]
fn larger_images() {
    let place = Place::new();
    let base = noise(1, 20 << 20);
    let mut second = base.clone();
    second.rotate_right(3 << 20);
    second[5 << 20..9 << 20].fill(0);
    second[9 << 20..][..4096].copy_from_slice(&noise(2, 4096));
    second.extend_from_slice(&base[..512]);
    let mut third = noise(3, 2 << 20);
    third.extend_from_slice(&second);
    let images = [("a", base), ("b", second), ("c", third)];
    let files: Vec<PathBuf> = images.iter().map(|(n, b)| place.raw(n, b, |_| false)).collect();
    let added = place.add(&[("a", &files[0]), ("b", &files[1])]).unwrap();
    assert_eq!(added[0].data_bytes, 20 << 20);
    assert_eq!(added[1].reads_from.len(), 1);
    place.add(&[("c", &files[2])]).unwrap();
    oracle::check(&place, &images);
}

/// The independent counter that people run on real images says the same (on real images too, when
/// `VMAR_REAL_IMAGES` names some raw files, separated by colons).
#[test]
fn the_brute_force_example_counts_the_same() {
    let place = Place::new();
    let contents: Vec<u32> = (0..3000).map(|i| i % 700).collect();
    let mut files: Vec<PathBuf> = [(0, 900), (300, 2000), (100, 3000), (0, 10), (500, 1200)]
        .iter()
        .enumerate()
        .map(|(i, &(from, to))| {
            place.raw(&format!("{i}.raw"), &image_of(&contents[from..to], Some((9, 512 * (i + 1)))), |b| b % 3 == 0)
        })
        .collect();
    if let Some(real) = std::env::var_os("VMAR_REAL_IMAGES") {
        files.extend(std::env::split_paths(&real));
    }
    let named: Vec<(String, PathBuf)> = files.iter().enumerate().map(|(i, f)| (format!("i{i}"), f.clone())).collect();
    let all: Vec<(&str, &Path)> = named.iter().map(|(n, f)| (n.as_str(), f.as_path())).collect();
    place.add(&all).unwrap();
    let mut found: serde_json::Value = serde_json::from_str(&place.ok(&["stats", "--json"])).unwrap();
    for image in found["images"].as_array_mut().unwrap() {
        image.as_object_mut().unwrap().remove("map_bytes");
    }
    // Through text like the other one: reading a number back may change its last bit.
    let counted = brute_force::count(&named).unwrap().to_string();
    assert_eq!(found, serde_json::from_str::<serde_json::Value>(&counted).unwrap());
}

/// The same file under two names, and a library that moved with its raw images staying where they are.
#[test]
fn one_file_twice_shares_wholly_and_a_moved_library_works() {
    let place = Place::new();
    let bytes = image_of(&[9, 10, 11, 9], None);
    let file = place.raw("f", &bytes, |_| false);
    place.add(&[("a", &file), ("b", &file)]).unwrap();
    let elsewhere = place.path("elsewhere");
    std::fs::rename(place.lib(), &elsewhere).unwrap();
    verify(&elsewhere, "b", &work()).unwrap();
    std::fs::rename(&elsewhere, place.lib()).unwrap();
    let link = place.path("link");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    place.add(&[("c", &link)]).unwrap();
    oracle::check(&place, &[("a", bytes.clone()), ("b", bytes.clone()), ("c", bytes.clone())]);
    assert_eq!(std::fs::read(&file).unwrap(), bytes, "vmar does not change images");
}

/// The contract of `vmar stats --json`, to the letter.
#[test]
fn stats_json_has_the_keys_that_scripts_rely_on() {
    let place = Place::new();
    let empty: serde_json::Value = serde_json::from_str(&place.ok(&["stats", "--json"])).unwrap();
    assert_eq!(empty["nonzero_blocks"], 0);
    assert_eq!(empty["duplicated_ge2"], 0.0);
    let file = place.raw("f", &image_of(&[9, 10], None), |_| false);
    place.add(&[("web", &file), ("db", &file)]).unwrap();
    let found: serde_json::Value = serde_json::from_str(&place.ok(&["stats", "--json"])).unwrap();
    let map_bytes = std::fs::metadata(place.lib().join("maps/web.map")).unwrap().len();
    let image = |name: &str, id: u32, redirected: u32| {
        serde_json::json!({
            "name": name, "id": id, "blocks": 2, "nonzero_blocks": 2, "redirected_blocks": redirected, "entries": 1,
            "map_bytes": map_bytes,
        })
    };
    assert_eq!(
        found,
        serde_json::json!({
            "policy": "paper", "nonzero_blocks": 4, "unique_blocks": 2, "clusters": 1, "duplicated_ge2": 1.0,
            "shared_ge2_images": 1.0, "shared_gt3_images": 0.0, "images": [image("web", 0, 0), image("db", 1, 2)],
        })
    );
    for args in [&["stats"][..], &["image", "list"], &["image", "show", "web"], &["image", "verify"]] {
        assert!(place.ok(args).contains("web"));
    }
    for args in [&["image", "list", "--json"][..], &["image", "show", "web", "--json"]] {
        let json: serde_json::Value = serde_json::from_str(&place.ok(args)).unwrap();
        assert!(json.to_string().contains("\"web\""));
    }
}
