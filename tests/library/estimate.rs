//! `vmar estimate`: against a plain count over the real bytes.

use super::support::{BLOCK, Place, image_of, noise, one_line, qemu_img};
use serde_json::Value;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn run(args: &[&OsStr]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmar"));
    command.arg("estimate").args(args).env_remove("VMAR_LIBRARY").env_remove("RUST_LOG").output().unwrap()
}

fn json(files: &[&Path], options: &[&str]) -> Value {
    let args: Vec<&OsStr> =
        files.iter().map(|f| f.as_os_str()).chain(options.iter().chain(&["--json"]).map(OsStr::new)).collect();
    let output = run(&args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Distinct non-zero contents, and how many blocks have one.
fn contents(bytes: &[u8]) -> (HashSet<&[u8]>, u64) {
    let blocks: Vec<&[u8]> = bytes.chunks(BLOCK).filter(|b| b.iter().any(|&x| x != 0)).collect();
    (blocks.iter().copied().collect(), blocks.len() as u64)
}

/// Three files of 3,000 to 4,000 blocks with much in common, zeros, repetitions and a partial last block.
fn family() -> Vec<Vec<u8>> {
    let image = |range: std::ops::Range<u32>, every: u32, tail: usize| {
        let pick = |i: u32| match i % every {
            0 => 0,
            1 => 9,
            _ => i,
        };
        image_of(&range.map(pick).collect::<Vec<_>>(), Some((10, tail)))
    };
    vec![image(20..4020, 7, 512), image(1020..4020, 7, 1024), image(3020..7020, 50, 4095 / 512 * 512)]
}

fn files(place: &Place, family: &[Vec<u8>]) -> Vec<PathBuf> {
    let write = |(i, bytes): (usize, &Vec<u8>)| place.raw(&format!("{i}.raw"), bytes, |b| b % 3 == 0);
    family.iter().enumerate().map(write).collect()
}

/// Asks `check` about every figure: what it is, what is true, and where its interval is.
fn compare(found: &Value, family: &[Vec<u8>], check: &mut dyn FnMut(&str, f64, [f64; 3])) {
    let interval = |v: &Value| ["low", "estimate", "high"].map(|end| v[end].as_f64().unwrap());
    let sets: Vec<(HashSet<&[u8]>, u64)> = family.iter().map(|bytes| contents(bytes)).collect();
    let all: HashSet<&[u8]> = sets.iter().flat_map(|(set, _)| set.iter().copied()).collect();
    let blocks: u64 = sets.iter().map(|(_, n)| n).sum();
    let distinct: usize = sets.iter().map(|(set, _)| set.len()).sum();
    assert_eq!(found["nonzero_blocks"], blocks);
    check("unique", all.len() as f64, interval(&found["unique_blocks"]));
    check("within", (blocks as usize - distinct) as f64, interval(&found["duplicates_within"]));
    check("between", (distinct - all.len()) as f64, interval(&found["duplicates_between"]));
    check("saving", (blocks as usize - all.len()) as f64 / blocks as f64, interval(&found["saving"]));
    for (i, (set, n)) in sets.iter().enumerate() {
        let file = &found["files"][i];
        assert_eq!(file["nonzero_blocks"], *n);
        assert_eq!(file["blocks"], family[i].len().div_ceil(BLOCK));
        let only = set.iter().filter(|c| !sets.iter().enumerate().any(|(j, s)| j != i && s.0.contains(*c))).count();
        check("unique of a file", set.len() as f64, interval(&file["unique_blocks"]));
        check("only in a file", only as f64, interval(&file["only_here"]));
        check("held by others", 1.0 - only as f64 / set.len() as f64, interval(&file["held_by_others"]));
    }
    assert_eq!(found["pairs"].as_array().unwrap().len(), sets.len() * (sets.len() - 1) / 2);
    for pair in found["pairs"].as_array().unwrap() {
        let [a, b] = ["a", "b"].map(|k| &sets[pair[k].as_u64().unwrap() as usize].0);
        let both = a.intersection(b).count() as f64;
        check("common", both, interval(&pair["common_blocks"]));
        check("a in b", both / a.len() as f64, interval(&pair["a_held_by_b"]));
        check("b in a", both / b.len() as f64, interval(&pair["b_held_by_a"]));
        check("similarity", both / a.union(b).count() as f64, interval(&pair["similarity"]));
    }
}

#[test]
fn a_sample_of_everything_is_what_a_plain_count_says() {
    let (place, family) = (Place::new(), family());
    let files = files(&place, &family);
    let found = json(&files.iter().map(PathBuf::as_path).collect::<Vec<_>>(), &["--sample", "1"]);
    let mut figures = 0;
    compare(&found, &family, &mut |what, want, ends| {
        figures += 1;
        assert!(ends.iter().all(|x| (x - want).abs() < 1e-9), "{what}: {ends:?}, counted {want}");
    });
    assert_eq!(figures, 4 + 3 * 3 + 3 * 4);
}

#[test]
fn the_truth_is_in_the_intervals_of_a_real_sample() {
    let (place, family) = (Place::new(), family());
    let files = files(&place, &family);
    let files: Vec<&Path> = files.iter().map(PathBuf::as_path).collect();
    let (mut figures, mut inside, mut exact) = (0, 0, 0);
    for seed in 0..8 {
        let found = json(&files, &["--sample", "16", "--seed", &seed.to_string()]);
        compare(&found, &family, &mut |_, want, [low, estimate, high]| {
            figures += 1;
            inside += u32::from(low <= want && want <= high);
            exact += u32::from((estimate - want).abs() < 1e-9);
        });
    }
    // The figures of one sample go astray together, so a few bad samples of eight are few.
    assert!(inside * 100 >= figures * 85, "{inside} of {figures}");
    assert!(exact * 10 < figures, "it really was a sample: {exact} of {figures} are exact");
}

#[test]
fn the_page_cache_is_left_as_it_was() {
    // Not on tmpfs, which is all cache.
    let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = dir.path().join("image.raw");
    fs::write(&path, noise(1, 8 << 20)).unwrap();
    let file = File::open(&path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
    file.read_exact_at(&mut [0; 65536], 1 << 20).unwrap();
    let cached = |at, len| vmar::io::Hot::map(&file, 8 << 20).unwrap().is_cached(at, len);
    assert!(cached(1 << 20, 65536) && !cached(0, 4096));
    json(&[&path], &[]);
    // What tells the format is at both ends, and is read like any file's.
    let left: Vec<u64> = (4..2044).filter(|page| cached(page * 4096, 4096)).collect();
    assert_eq!(left, (256..272).collect::<Vec<_>>());
}

#[test]
fn misaligned_partitions_are_named_with_the_mend() {
    let place = Place::new();
    let mut disk = image_of(&(20..200).collect::<Vec<_>>(), None);
    disk[446..512].fill(0);
    for (slot, start) in [(0, 63u32), (1, 512)] {
        let entry = 446 + 16 * slot;
        disk[entry + 4] = 0x83;
        disk[entry + 8..entry + 12].copy_from_slice(&start.to_le_bytes());
        disk[entry + 12..entry + 16].copy_from_slice(&200u32.to_le_bytes());
    }
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let path = place.raw("old.raw", &disk, |_| true);
    let found = json(&[&path], &[]);
    let line = serde_json::json!([{ "partition": 1, "start": 63 * 512, "bytes": 200 * 512 }]);
    assert_eq!(found["files"][0]["misaligned_partitions"], line);
    let text = String::from_utf8(run(&[path.as_os_str()]).stdout).unwrap();
    assert!(text.contains("old.raw: partition 1 starts at sector 63") && text.contains("virt-resize"), "{text}");
    assert!(!text.contains("partition 2"), "{text}");
    // The same line when it is added.
    let output = place.run(&["image", "add", &format!("old={}", path.display())]);
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success() && said.contains("warning: ") && said.contains("starts at sector 63"), "{said}");
}

#[test]
fn what_is_not_raw_needs_room_for_a_copy_that_goes_away() {
    let place = Place::new();
    let raw = place.raw("a.raw", &family()[1], |_| false);
    let qcow2 = place.path("a.qcow2");
    let args = ["convert", "-f", "raw", "-O", "qcow2"].map(OsStr::new);
    qemu_img(&[&args[..], &[raw.as_os_str(), qcow2.as_os_str()]].concat());
    let line = one_line(run(&[qcow2.as_os_str()]), 1);
    assert!(line.contains("a.qcow2: a qcow2 image") && line.contains("--scratch DIR"), "{line}");

    let scratch = place.path("scratch");
    fs::create_dir(&scratch).unwrap();
    let found = json(&[&raw, &qcow2], &["--scratch", scratch.to_str().unwrap(), "--sample", "1"]);
    assert_eq!(found["pairs"][0]["similarity"]["low"], 1.0);
    assert_eq!(fs::read_dir(&scratch).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_read_is_refused_before_any_work() {
    let place = Place::new();
    let good = place.raw("good.raw", &family()[1], |_| false);
    let missing = place.path("missing.raw");
    let line = one_line(run(&[good.as_os_str(), missing.as_os_str()]), 1);
    assert!(line.contains("missing.raw"), "{line}");
    assert_eq!(run(&[]).status.code(), Some(2));
    assert_eq!(run(&[good.as_os_str(), OsStr::new("--sample"), OsStr::new("0")]).status.code(), Some(2));
}
