//! `vmar stats --matrix`, against a plain count over the real bytes.

use super::support::{BLOCK, Place, image_of};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::collections::HashSet;

/// What the matrix must be, of the bytes of images in order of ID.
fn plain(images: &[(String, Vec<u8>)]) -> Value {
    let blocks = |bytes: &[u8]| -> Vec<Vec<u8>> {
        bytes.chunks(BLOCK).filter(|b| b.iter().any(|&x| x != 0)).map(<[u8]>::to_vec).collect()
    };
    let all: Vec<Vec<Vec<u8>>> = images.iter().map(|(_, bytes)| blocks(bytes)).collect();
    let sets: Vec<HashSet<&Vec<u8>>> = all.iter().map(|b| b.iter().collect()).collect();
    let line = |i: usize| json!({ "name": images[i].0, "id": i, "nonzero_blocks": all[i].len(), "unique_blocks": sets[i].len() });
    let mut pairs = Vec::new();
    for a in 0..images.len() {
        for b in a + 1..images.len() {
            let contents = sets[a].intersection(&sets[b]).count();
            let of = |i: usize, j: usize| all[i].iter().filter(|block| sets[j].contains(block)).count();
            if contents > 0 {
                pairs.push(json!({ "a": images[a].0, "b": images[b].0, "contents": contents,
                    "blocks_of_a": of(a, b), "blocks_of_b": of(b, a) }));
            }
        }
    }
    json!({ "images": (0..images.len()).map(line).collect::<Vec<_>>(), "pairs": pairs })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    /// Contents 1 to 8 are pairs with one SHA-1; names are not in the order of the IDs.
    #[test]
    fn the_matrix_is_what_a_plain_count_says(
        contents in prop::collection::vec(prop::collection::vec(0u32..16, 1..40), 1..6),
        tail in prop::option::of((9u32..12, 1usize..8)),
    ) {
        let place = Place::new();
        let mut images = Vec::new();
        for (i, contents) in contents.iter().enumerate() {
            let bytes = image_of(contents, tail.map(|(k, sectors)| (k, sectors * 512)));
            let name = format!("{}{i}", ["z", "b", "y", "a", "x"][i]);
            let path = place.raw(&name, &bytes, |b| b % 2 == 0);
            place.add(&[(&name, &path)]).unwrap();
            images.push((name, bytes));
        }
        let found: Value = serde_json::from_str(&place.ok(&["--json", "stats", "--matrix"])).unwrap();
        prop_assert_eq!(found, plain(&images));
    }
}

#[test]
fn the_table_has_shares_of_the_rows_image() {
    let place = Place::new();
    let a = place.raw("a", &image_of(&[20, 21, 21, 0], None), |_| false);
    let b = place.raw("b", &image_of(&[21, 22, 23, 24], None), |_| false);
    place.add(&[("a", &a), ("b", &b)]).unwrap();
    let text = place.ok(&["stats", "--matrix"]);
    let cells = |row: &str| -> Vec<String> {
        let line = text.lines().find(|l| l.contains(row)).unwrap();
        line.split_whitespace().map(str::to_string).collect()
    };
    assert_eq!(cells("(0)  a"), ["(0)", "a", "3", "2", "-", "66.7%"]);
    assert_eq!(cells("(1)  b"), ["(1)", "b", "4", "4", "25.0%", "-"]);
    assert_eq!(
        Place::new().ok(&["--json", "stats", "--matrix"]).split_whitespace().collect::<String>(),
        r#"{"images":[],"pairs":[]}"#
    );
}
