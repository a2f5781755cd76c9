//! `vmar overlay` as a script sees it.

use crate::common::*;
use std::path::Path;
use std::process::Command;
use vmar::fingerprint::Algorithm;
use vmar::library::{Library, Policy};

struct Output {
    status: i32,
    stdout: String,
    stderr: String,
}

fn vmar(args: &[&str]) -> Output {
    let out = Command::new(env!("CARGO_BIN_EXE_vmar")).args(args).env_remove("VMAR_LIBRARY").output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Output { status: out.status.code().unwrap(), stdout: text(out.stdout), stderr: text(out.stderr) }
}

fn json(args: &[&str]) -> serde_json::Value {
    let out = vmar(&[args, &["--json"]].concat());
    assert_eq!(out.status, 0, "{}", out.stderr);
    serde_json::from_str(&out.stdout).unwrap()
}

#[test]
fn info_and_check_of_an_overlay_in_all_its_states() {
    let fx = Fixture::new();
    let file = path_str(&fx.overlay);
    let state_dir = fx.state_dir();
    let info = || json(&["overlay", "info", file, "--state-dir", path_str(&state_dir)]);
    let new = info();
    assert_eq!(new["size"], fx.size());
    assert_eq!(new["session"], "closed");
    assert_eq!(new["in_use"], false);
    assert_eq!(new["base"]["digest"], "b5".repeat(32));
    assert_eq!(new["base"]["path"], path_str(&fx.base_path));
    assert_eq!((new["data_subclusters"].as_u64(), new["zero_subclusters"].as_u64()), (Some(0), Some(0)));

    let o = fx.open();
    write(&o, &fx, 0, &[1; 4096]);
    o.write_zeroes(65536, 65536, true, &fx).unwrap();
    let open = info();
    assert_eq!((open["session"].as_str(), open["in_use"].as_bool()), (Some("open"), Some(true)));
    assert_eq!((open["data_subclusters"].as_u64(), open["zero_subclusters"].as_u64()), (Some(2), Some(32)));
    let text = vmar(&["overlay", "info", file, "--state-dir", path_str(&state_dir)]).stdout;
    assert!(text.contains("open, in use") && text.contains("4.0 KiB (2 subclusters)"), "{text}");
    assert_eq!(json(&["overlay", "check", file])["clean"], true, "while it is in use");
    drop(o);
    assert_eq!((info()["session"].as_str(), info()["in_use"].as_bool()), (Some("open"), Some(false)));
    std::fs::remove_file(&fx.live_files()[0]).unwrap();
    let lost = info();
    assert_eq!(lost["session"], "lost");
    assert_eq!(lost["data_subclusters"], 0, "what the file alone says");
}

#[test]
fn check_prints_the_faults_and_fails_with_one_line() {
    let fx = Fixture::new();
    patch(&fx.overlay, 0x40000 + 3 * 16, &[0; 16]);
    let out = vmar(&["overlay", "check", path_str(&fx.overlay)]);
    assert_eq!(out.status, 0, "{}", out.stderr);
    assert!(out.stdout.contains("note: 1 clusters that QEMU has freed or added"), "{}", out.stdout);
    assert_eq!(json(&["overlay", "check", path_str(&fx.overlay)])["freed_clusters"], 1);
    patch(&fx.overlay, 0x40000 + 3 * 16 + 5, &[9]);
    let out = vmar(&["overlay", "check", path_str(&fx.overlay)]);
    assert_eq!(out.status, 1);
    assert_eq!(out.stdout, "cluster 3 may be shared\n");
    assert_eq!(out.stderr.lines().count(), 1, "{}", out.stderr);
    assert!(out.stderr.contains("'vmar overlay relayout"), "{}", out.stderr);
    let out = vmar(&["overlay", "check", path_str(&fx.base_path)]);
    assert_eq!((out.status, out.stdout.as_str()), (1, ""));
    assert!(out.stderr.contains("is no qcow2 file"), "{}", out.stderr);
}

#[test]
fn wrong_usage_is_status_2_and_help_is_0() {
    for args in [
        &["overlay", "create", "/tmp/x", "--image", "web"][..],
        &["overlay", "create", "/tmp/x"],
        &["overlay", "create", "/tmp/x", "--image", "web", "--size", "10X"],
        &["overlay"],
    ] {
        let out = vmar(args);
        assert_eq!(out.status, 2, "{args:?}: {}", out.stderr);
    }
    for verb in ["create", "info", "check", "relayout", "commit", "resize"] {
        assert_eq!(vmar(&["overlay", verb, "--help"]).status, 0);
    }
}

#[test]
fn create_needs_a_library_with_that_image() {
    let fx = Fixture::new();
    let dir = fx.dir.path().join("lib");
    let make =
        |library: &Path| vmar(&["--library", path_str(library), "overlay", "create", "/tmp/none", "--image", "web"]);
    let out = make(&dir);
    assert_eq!(out.status, 1, "{}", out.stderr);
    Library::init(&dir, Policy::Paper, Algorithm::Sha1).unwrap();
    let out = make(&dir);
    assert_eq!(out.status, 1);
    assert!(out.stderr.contains("web: no such image"), "{}", out.stderr);
}

#[test]
fn create_makes_a_disk_that_plain_qemu_reads_like_the_image() {
    let fx = Fixture::new();
    let library = fx.dir.path().join("lib");
    let library = path_str(&library);
    let ok = |args: &[&str]| {
        let out = vmar(&[&["--library", library], args].concat());
        assert_eq!(out.status, 0, "{args:?}: {}", out.stderr);
        out.stdout
    };
    ok(&["library", "init", library]);
    ok(&["image", "add", &format!("web={}", path_str(&fx.base_path))]);
    let file = fx.dir.path().join("vm.qcow2");
    let said = ok(&["overlay", "create", path_str(&file), "--image", "web", "--size", "8M"]);
    assert!(said.contains("8.0 MiB on image web"), "{said}");
    qemu_check(&file);
    let record = Library::open(library).unwrap().image("web").unwrap().clone();
    let info = json(&["overlay", "info", path_str(&file)]);
    assert_eq!(info["size"], 8 << 20);
    assert_eq!(info["base"]["digest"], vmar::codec::hex(&record.digest));
    assert_eq!(info["base"]["path"], path_str(&fx.base_path));
    let raw = fx.dir.path().join("vm.raw");
    qemu(&["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path_str(&file), path_str(&raw)]);
    let bytes = std::fs::read(raw).unwrap();
    assert!(bytes[..fx.base.len()] == fx.base && bytes[fx.base.len()..].iter().all(|b| *b == 0));
    assert_eq!(bytes.len(), 8 << 20);

    for (args, status, why) in [
        (&["--image", "web"][..], 1, "exists already"),
        (&["--image", "web", "--size", "9M"], 1, "exists already"),
        (&["--image", "db"], 1, "no such image"),
    ] {
        let out = vmar(&[&["--library", library, "overlay", "create", path_str(&file)], args].concat());
        assert_eq!(out.status, status, "{}", out.stderr);
        assert!(out.stderr.contains(why) && out.stderr.lines().count() == 1, "{}", out.stderr);
    }
    let out = vmar(&["--library", library, "overlay", "create", "/tmp/none", "--image", "web", "--size", "1M"]);
    assert_eq!(out.status, 2);
    assert!(out.stderr.contains("is smaller than its base"), "{}", out.stderr);
}

/// A library with one image, `web`, on the fixture's base.
fn library(fx: &Fixture) -> String {
    let library = path_str(&fx.dir.path().join("lib")).to_string();
    assert_eq!(vmar(&["library", "init", &library]).status, 0);
    let web = format!("web={}", path_str(&fx.base_path));
    let out = vmar(&["--library", &library, "image", "add", &web]);
    assert_eq!(out.status, 0, "{}", out.stderr);
    library
}

#[test]
fn the_life_of_an_overlay_that_came_from_qemu() {
    let fx = Fixture::new();
    let library = library(&fx);
    let state_dir = fx.state_dir();
    let run = |args: &[&str]| vmar(&[&["--library", &library, "overlay"], args].concat());
    let ok = |args: &[&str]| {
        let out = run(args);
        assert_eq!(out.status, 0, "{args:?}: {}", out.stderr);
        out.stdout
    };
    let path = |name| fx.dir.path().join(name);
    let (other, file, raw) = (path("other.qcow2"), path("vm.qcow2"), path("vm.raw"));
    let (other, file, raw) = (path_str(&other), path_str(&file), path_str(&raw));
    qemu(&["qemu-img", "create", "-q", "-f", "qcow2", "-b", path_str(&fx.base_path), "-F", "raw", other, "5M"]);
    qemu(&["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 100k", "-c", "write -z 2M 64k", other]);
    let mut want = fx.base.clone();
    want.resize(5 << 20, 0);
    want[1 << 20..(1 << 20) + 102_400].fill(7);
    want[2 << 20..(2 << 20) + 65536].fill(0);

    let said = ok(&["create", file, "--image", "web", "--from", other, "--max-size", "8M"]);
    assert!(said.contains("a disk of 5.0 MiB on image web"), "{said}");
    let info = json(&["overlay", "info", file, "--state-dir", path_str(&state_dir)]);
    assert_eq!((info["size"].as_u64(), info["capacity"].as_u64()), (Some(5 << 20), Some(8 << 20)));
    assert!(ok(&["info", file, "--state-dir", path_str(&state_dir)]).contains("capacity 8.0 MiB"));

    let state = ["--state-dir", path_str(&state_dir)];
    let said = ok(&[&["resize", file, "6M"], &state[..]].concat());
    assert!(said.contains("a disk of 6.0 MiB"), "{said}");
    want.resize(6 << 20, 0);
    let out = run(&[&["resize", file, "1M"], &state[..]].concat());
    assert!(out.status == 2 && out.stderr.contains("cannot shrink"), "{}", out.stderr);

    qemu(&["qemu-io", "-f", "qcow2", "-d", "unmap", "-c", "discard 1M 1M", "-c", "write -P 9 1536k 64k", file]);
    want[1 << 20..2 << 20].fill(0);
    want[3 << 19..(3 << 19) + 65536].fill(9);
    let out = run(&["check", file]);
    assert!(out.status == 1 && out.stderr.contains("'vmar overlay relayout"), "{}", out.stderr);
    let out = vmar(&["overlay", "check", file, "--json"]);
    let report: serde_json::Value = serde_json::from_str(&out.stdout).unwrap();
    assert_eq!((&report["relayout"], &report["clean"]), (&true.into(), &false.into()));
    assert!(ok(&[&["relayout", file], &state[..]].concat()).contains("a disk of 6.0 MiB"));
    assert!(ok(&["check", file]).ends_with(": clean\n"));
    let out = vmar(&["overlay", "check", file, "--json"]);
    let report: serde_json::Value = serde_json::from_str(&out.stdout).unwrap();
    assert_eq!((&report["relayout"], &report["freed_clusters"]), (&false.into(), &0.into()));

    // With the image of the library, and with the backing file.
    assert!(ok(&[&["commit", file, "--to", raw], &state[..]].concat()).contains("a disk of 6.0 MiB"));
    assert!(std::fs::read(raw).unwrap() == want);
    std::fs::remove_file(raw).unwrap();
    let out = vmar(&[&["overlay", "commit", file, "--to", raw], &state[..]].concat());
    assert_eq!(out.status, 0, "{}", out.stderr);
    assert!(std::fs::read(raw).unwrap() == want);
    let out = run(&[&["commit", file, "--to", raw], &state[..]].concat());
    assert!(out.status == 1 && out.stderr.contains("exists already"), "{}", out.stderr);
    // An image that changed since is not merged with.
    std::fs::remove_file(raw).unwrap();
    patch(&fx.base_path, 0, b"changed");
    let out = run(&[&["commit", file, "--to", raw], &state[..]].concat());
    assert!(out.status == 1 && out.stderr.contains("modification time"), "{}", out.stderr);
    assert!(!Path::new(raw).exists());
}

#[test]
fn an_overlay_in_use_is_neither_rewritten_nor_committed() {
    let fx = Fixture::new();
    let o = fx.open();
    let (file, state_dir) = (path_str(&fx.overlay), fx.state_dir());
    let to = fx.dir.path().join("new");
    for args in [
        &["relayout", file][..],
        &["resize", file, "8M"],
        &["commit", file, "--to", path_str(&to)],
        &["relayout", file, "--out", path_str(&to)],
    ] {
        let out = vmar(&[&["overlay"], args, &["--state-dir", path_str(&state_dir)]].concat());
        assert!(out.status == 1 && out.stderr.contains("is in use by another process"), "{args:?}: {}", out.stderr);
    }
    assert!(!to.exists());
    o.close().unwrap();
}
