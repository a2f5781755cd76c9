//! `src/daemon/FEATURES.md` says what vmar offers; real disks must agree, bit by bit.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "common/offer.rs"]
mod offer;

use common::{Bench, text};
use offer::{FEATURES, Offer, PROTOCOL_FEATURES, name};
use std::collections::BTreeMap;

const TABLES: &str = include_str!("../src/daemon/FEATURES.md");

/// A disk that is served, and what its cells in the tables mean.
struct Served {
    what: &'static str,
    offer: Offer,
    writable: bool,
    queues: u64,
}

/// Rows `| NAME | bit | vmar | ...` below this heading: bit, name and vmar's cell.
fn rows(heading: &str) -> BTreeMap<u32, (String, String)> {
    let (_, part) = TABLES.split_once(&format!("\n## {heading}\n")).expect(heading);
    let part = part.split("\n## ").next().unwrap();
    let mut out = BTreeMap::new();
    for line in part.lines().filter(|l| l.starts_with('|')) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        if let Ok(bit) = cells[1].parse() {
            let old = out.insert(bit, (cells[0].to_string(), cells[2].to_string()));
            assert!(old.is_none(), "bit {bit} is there twice");
        }
    }
    assert!(out.len() > 10, "{heading}: the table was found");
    out
}

/// What is wrong with a table, seen from one disk.
fn differences(rows: &BTreeMap<u32, (String, String)>, names: &[(u32, &str)], bits: u64, disk: &Served) -> Vec<String> {
    let mut wrong = Vec::new();
    for bit in 0..u64::BITS {
        let offered = bits >> bit & 1 != 0;
        let Some((row, cell)) = rows.get(&bit) else {
            if offered {
                wrong.push(format!("{}: bit {bit} ({}) is offered and not in the table", disk.what, name(names, bit)));
            }
            continue;
        };
        let says = match cell.as_str() {
            "y" => true,
            "n" => false,
            "rw" => disk.writable,
            "ro" => !disk.writable,
            "mq" => disk.queues > 1,
            other => {
                wrong.push(format!("{row}: '{other}' is none of y, n, rw, ro, mq"));
                continue;
            }
        };
        if says != offered {
            let does = if offered { "offers" } else { "does not offer" };
            wrong.push(format!("{}: it {does} {row}, the table has '{cell}'", disk.what));
        }
        if *row != name(names, bit) {
            wrong.push(format!("bit {bit} is {}, not {row}", name(names, bit)));
        }
    }
    wrong
}

#[test]
fn the_tables_say_what_vmar_offers() {
    let (features, protocol) = (rows("Device and ring features"), rows("Protocol features"));
    let bench = Bench::with_library();
    let raw = bench.file("disk.raw", &vec![7; 3 << 20]);
    bench.add(&[format!("disk={}", text(&raw))]);
    let flat = bench.file("flat.raw", &vec![1; 1 << 20]);
    let overlay = bench.overlay("disk");
    let cases: [(&str, Vec<&str>, bool, u64); 4] = [
        ("an overlay", vec!["--image", "disk", "--overlay", text(&overlay)], true, 16),
        ("an image, read-only, one queue", vec!["--image", "disk", "--read-only", "--num-queues", "1"], false, 1),
        ("a raw file, one queue", vec!["--blk-file", text(&flat), "--num-queues", "1"], true, 1),
        ("a raw file, read-only", vec!["--blk-file", text(&flat), "--read-only"], false, 16),
    ];
    let mut wrong = Vec::new();
    for (what, args, writable, queues) in cases {
        let server = bench.serve(&args);
        let offer = offer::ask(&server.socket).unwrap();
        assert_eq!(offer.queues, Some(queues), "{what}");
        assert_eq!(offer.field(34, 2), Some(queues), "{what}: num_queues in the config space");
        assert!(offer.mem_slots.is_some_and(|n| n > 8), "{what}");
        let disk = Served { what, offer, writable, queues };
        wrong.extend(differences(&features, FEATURES, disk.offer.features, &disk));
        wrong.extend(differences(&protocol, PROTOCOL_FEATURES, disk.offer.protocol, &disk));
        assert!(server.stop().0.success(), "{what}");
    }
    wrong.dedup();
    assert!(wrong.is_empty(), "mend src/daemon/FEATURES.md:\n{}", wrong.join("\n"));
}

#[test]
fn the_comparison_can_fail() {
    let rows =
        BTreeMap::from([(5, ("RO".to_string(), "ro".to_string())), (6, ("BLK_SIZE".to_string(), "y".to_string()))]);
    let disk = Served { what: "a disk", offer: Offer::default(), writable: true, queues: 1 };
    assert!(differences(&rows, FEATURES, 1 << 6, &disk).is_empty());
    assert_eq!(differences(&rows, FEATURES, 1 << 5 | 1 << 6, &disk).len(), 1, "RO on a writable disk");
    assert_eq!(differences(&rows, FEATURES, 0, &disk).len(), 1, "BLK_SIZE is missing");
    assert_eq!(differences(&rows, FEATURES, 1 << 6 | 1 << 50, &disk).len(), 1, "a bit that no row has");
}
