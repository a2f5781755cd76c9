//! `vmar map` and `vmar trace` from the command line.

#![allow(clippy::unwrap_used, reason = "a test")]

use serde_json::Value;
use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output};
use vmar::redirect::trace::{Record, TraceHeader, TraceWriter};

fn vmar(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vmar")).args(args).env_remove("VMAR_LIBRARY").output().unwrap()
}

fn json(args: &[&str]) -> Value {
    let out = vmar(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    serde_json::from_slice(&out.stdout).unwrap()
}

/// Exit status 1 and one line on stderr that holds all the words.
fn refused(args: &[&str], words: &[&str]) {
    let out = vmar(args);
    let text = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(1), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    words.iter().for_each(|w| assert!(text.contains(w), "{w}: {text}"));
}

/// A raw image: one letter a block, `.` for zeros; letters are contents.
fn image(path: &Path, blocks: &str) {
    let bytes: Vec<u8> = blocks.bytes().flat_map(|b| [if b == b'.' { 0 } else { b }; 4096]).collect();
    fs::write(path, bytes).unwrap();
}

/// A library of two images in `dir`.
fn library(dir: &Path) -> String {
    let lib = dir.join("lib").display().to_string();
    image(&dir.join("one.raw"), "ABCD..EE");
    image(&dir.join("two.raw"), "..BCDX.AE");
    assert!(vmar(&["library", "init", &lib, "--policy", "paper"]).status.success());
    let add = |name: &str| format!("{name}={}", dir.join(format!("{name}.raw")).display());
    let out = vmar(&["--library", &lib, "image", "add", &add("one"), &add("two")]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    lib
}

#[test]
fn a_map_is_shown_verified_and_explained() {
    let dir = tempfile::tempdir().unwrap();
    let lib = library(dir.path());
    let shown = json(&["--library", &lib, "map", "show", "two", "--json"]);
    for (field, want) in [("blocks", 9), ("nonzero_blocks", 6), ("redirected_blocks", 5), ("entries", 4), ("id", 1)] {
        assert_eq!(shown[field], want, "{field}");
    }
    assert_eq!(shown["policy"], "paper");
    assert_eq!((&shown["targets"][0]["name"], &shown["targets"][0]["blocks"]), (&"one".into(), &5.into()));
    assert_eq!(shown["entry_sizes"].as_array().unwrap().last().unwrap()["blocks"], 6);
    assert_eq!(json(&["--library", &lib, "map", "verify", "two", "--json"])["ok"], true);

    let explained = json(&["--library", &lib, "map", "explain", "two", "--block", "8", "--json"]);
    assert_eq!((&explained["target"]["id"], &explained["target"]["block"]), (&0.into(), &6.into()));
    assert_eq!(explained["shared_by"][0]["blocks"], Value::from(vec![6, 7]));
    assert_eq!(json(&["--library", &lib, "map", "explain", "two", "--block", "0", "--json"])["zero"], true);
    assert_eq!(vmar(&["--library", &lib, "map", "explain", "two", "--block", "9"]).status.code(), Some(2));
    for verb in [&["show", "two"][..], &["verify", "two"], &["explain", "two", "--block", "2"]] {
        let out = vmar(&[&["--library", &lib, "map"], verb].concat());
        assert!(out.status.success() && !out.stdout.is_empty());
    }
}

#[test]
fn a_broken_map_is_refused_in_one_line() {
    let dir = tempfile::tempdir().unwrap();
    let lib = library(dir.path());
    let path = format!("{lib}/maps/two.map");
    let good = fs::read(&path).unwrap();
    let mut bad = good.clone();
    bad[300] ^= 1;
    let file = dir.path().join("bad.map").display().to_string();
    fs::write(&file, bad).unwrap();
    refused(&["map", "verify", "--file", &file], &["bad.map", "checksum", "restore"]);
    fs::write(&file, &good[..good.len() - 1]).unwrap();
    refused(&["map", "verify", "--file", &file], &["bad.map", "bytes long"]);
    refused(&["map", "verify", "--file", &format!("{file}x")], &["bad.mapx", "No such file"]);
    // A whole map, but of another image.
    fs::remove_file(&path).unwrap();
    fs::copy(format!("{lib}/maps/one.map"), &path).unwrap();
    refused(&["--library", &lib, "map", "show", "two"], &["two.map", "not the map of image two"]);
}

#[test]
fn traces_are_summed_up() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("t.trace");
    let header = TraceHeader { library: [1; 16], image: 1, generation: 1, digest: [2; 32], start_ns: 7 };
    let mut writer = TraceWriter::new(File::create(&path).unwrap(), &header).unwrap();
    for (request, image, block, count) in [(0, 0, 5, 3), (1, 0, 6, 4), (1, 1, 5, 1)] {
        writer.record(&Record { time_us: 9, request, image, block, count }).unwrap();
    }
    writer.finish(4).unwrap();
    let file = path.display().to_string();
    let stat = json(&["trace", "stat", &file, &file, "--json"]);
    let want = [("traces", 2), ("requests", 4), ("reads", 6), ("blocks", 16), ("distinct_blocks", 6), ("dropped", 8)];
    want.iter().for_each(|(field, want)| assert_eq!(stat[field], *want, "{field}"));
    assert_eq!(stat["distinct_bytes"], 6 * 4096);
    let shown = json(&["trace", "show", &file, "--rows", "2", "--json"]);
    assert_eq!((shown["rows"].as_array().unwrap().len(), &shown["reads"]), (2, &3.into()));
    // Cut off: still readable, and said so.
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 30]).unwrap();
    let stat = json(&["trace", "stat", &file, "--json"]);
    assert_eq!((&stat["reads"], &stat["cut"]), (&2.into(), &1.into()));
    refused(&["trace", "show", &format!("{file}x")], &["t.tracex", "No such file"]);
}
