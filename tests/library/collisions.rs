//! Blocks with one SHA-1 and different bytes (SHAttered) must read back right.

use super::oracle;
use super::support::{Place, content, image_of, work};
use std::collections::HashSet;
use std::os::unix::fs::FileExt;
use vmar::fingerprint::{Hasher, run};
use vmar::indexer::read_map;
use vmar::indexer::verify::verify;

const S1: u32 = 1;
const S2: u32 = 2;

#[test]
fn the_pair_is_a_pair() {
    assert_ne!(content(S1), content(S2));
    let sha1 = |k| Hasher::Sha1.hash(&content(k));
    assert_eq!(sha1(S1), sha1(S2));
    assert_ne!(sha1(1), sha1(3));
    // The first 4,096 bytes of the published files, whose hash is this, have the same property for the same reason.
    assert_eq!(sha1(3), sha1(4));
}

/// Adds the images, each by itself or all at once, and reads every block through the maps.
fn check(images: &[&[u32]]) {
    for together in [true, false] {
        let place = Place::new();
        let names: Vec<String> = (0..images.len()).map(|i| format!("i{i}")).collect();
        let bytes: Vec<Vec<u8>> = images.iter().map(|contents| image_of(contents, None)).collect();
        let files: Vec<_> = names.iter().zip(&bytes).map(|(n, b)| place.raw(n, b, |_| false)).collect();
        let all: Vec<_> = names.iter().zip(&files).map(|(n, f)| (n.as_str(), f.as_path())).collect();
        all.chunks(if together { all.len() } else { 1 }).for_each(|part| drop(place.add(part).unwrap()));

        let library = place.library();
        for (name, bytes) in names.iter().zip(&bytes) {
            let map = read_map(&library, library.image(name).unwrap()).unwrap();
            for (b, want) in (0u32..).zip(bytes.chunks(4096)) {
                let hit = map.lookup(b).unwrap();
                let target = library.image_by_id(map.target(hit.target).unwrap().image).unwrap();
                let mut got = vec![0; 4096];
                library.open_image(target).unwrap().read_exact_at(&mut got, u64::from(hit.block) * 4096).unwrap();
                assert!(got == want, "{images:?}: image {name} block {b}");
            }
            verify(&place.lib(), name, &work()).unwrap();
        }
        // Same hash and variant, throughout the library: same bytes; and the other way round.
        let mut contents = HashSet::new();
        for record in library.images() {
            let stamp = run::Stamp { bytes: record.run.bytes, crc32c: record.run.crc32c };
            let rows = run::Reader::open(&library.run_path(record), stamp).unwrap();
            contents.extend(rows.map(Result::unwrap).map(|r| (r.hash, r.variant)));
        }
        let want: HashSet<u32> = images.concat().into_iter().collect();
        assert_eq!(contents.len(), want.len());
        let images: Vec<(&str, Vec<u8>)> = names.iter().map(String::as_str).zip(bytes).collect();
        oracle::check(&place, &images);
    }
}

#[test]
fn in_two_images() {
    check(&[&[S1], &[S2]]);
    check(&[&[9, S2, 10], &[9, S1, 10]]);
}

#[test]
fn in_three_images_the_third_like_the_second() {
    check(&[&[S1], &[S2], &[S2]]);
    check(&[&[S1], &[S2], &[S2], &[S1], &[S2, S1]]);
}

#[test]
fn both_inside_one_image() {
    check(&[&[S1, S2]]);
    check(&[&[S2, S1, S1, S2, 9, S2]]);
    check(&[&[9], &[S2, S1, S2], &[S1, S1, S2]]);
}

#[test]
fn several_hashes_that_collide_at_once() {
    check(&[&[1, 3, 6], &[2, 4, 5, 1, 7], &[6, 5, 4, 3, 2, 1, 8, 7]]);
}

#[test]
fn a_partial_last_block_with_colliding_bytes() {
    let place = Place::new();
    let images = [
        ("a", image_of(&[9], Some((S1, 512)))),
        ("b", image_of(&[9], Some((S2, 512)))),
        ("c", image_of(&[S2], Some((S2, 512)))),
    ];
    for (name, bytes) in &images {
        let file = place.raw(name, bytes, |_| false);
        place.add(&[(name, &file)]).unwrap();
    }
    oracle::check(&place, &images);
}
