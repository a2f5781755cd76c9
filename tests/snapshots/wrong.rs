//! Bad input: each ends in one line that says what to do, the VM runs on as it was, and earlier snapshots are what they were.

use crate::common::*;
use crate::guest::*;
use crate::qemu::{Qemu, Takes, Writes};
use crate::rig::*;
use std::fs;
use std::path::{Path, PathBuf};

/// One store with a snapshot.
fn one_store() -> (Rig, Saved) {
    let rig = Rig::new(1);
    let (saved, _) = rig.save("early", &vm(guest(1, 600)), &[]);
    (rig, saved)
}

/// A change to a file that is taken back when this is dropped.
struct Hurt {
    path: PathBuf,
    before: Vec<u8>,
}

impl Hurt {
    fn new(path: &Path, change: impl FnOnce(&mut Vec<u8>)) -> Hurt {
        let before = fs::read(path).unwrap();
        let mut bytes = before.clone();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
        Hurt { path: path.into(), before }
    }
}

impl Drop for Hurt {
    fn drop(&mut self) {
        fs::write(&self.path, &self.before).unwrap();
    }
}

fn packs_of(rig: &Rig) -> Vec<PathBuf> {
    rig.packs(0).iter().map(|name| rig.stores[0].join("packs").join(name)).collect()
}

#[test]
fn a_pack_that_is_cut_or_has_a_wrong_byte_is_not_believed() {
    let (rig, saved) = one_store();
    let pack = packs_of(&rig).remove(0);
    let len = fs::metadata(&pack).unwrap().len() as usize;
    let bytes = fs::read(&pack).unwrap();
    let index = u64::from_le_bytes(bytes[len - 24..len - 16].try_into().unwrap()) as usize;
    // Magic, version; the first, a middle and the last batch; table and hashes of the index; each field of the trailer.
    let places = [
        0,
        8,
        16,
        20,
        index / 2,
        index - 1,
        index,
        index + 4,
        index + 30,
        len - 25,
        len - 24,
        len - 16,
        len - 12,
        len - 1,
    ];
    let words = ["snapshot early", "no store has a whole copy of pack", "snapshot check"];
    for at in places {
        let _hurt = Hurt::new(&pack, |bytes| bytes[at] ^= 1);
        let (out, qemu) = rig.restore_in(&rig.stores, &saved, &[]);
        line(&out, 1, &words);
        assert!(qemu.state().status == "inmigrate", "byte {at}: the VM was loaded");
        // The log names the file.
        assert!(String::from_utf8_lossy(&out.stderr).contains(text(&pack)), "byte {at}");
        line(&rig.run("check", &[]), 1, &["cannot be restored", "early"]);
    }
    for len in [0, 10, 16, 39, index, len - 24, len - 1] {
        let _hurt = Hurt::new(&pack, |bytes| bytes.truncate(len));
        line(&rig.restore_in(&rig.stores, &saved, &[]).0, 1, &words);
    }
    let hurt = Hurt::new(&pack, |bytes| bytes.push(0));
    line(&rig.restore_in(&rig.stores, &saved, &[]).0, 1, &words);
    drop(hurt);
    rig.comes_back(&saved);
}

#[test]
fn a_snapshots_file_that_is_cut_wrong_or_anothers_is_not_believed() {
    let (rig, saved) = one_store();
    let (second, _) = rig.save("second", &vm(guest(2, 100)), &[]);
    let path = |name: &str| rig.stores[0].join(format!("snapshots/{name}.snapshot"));
    let file = path("early");
    let len = fs::metadata(&file).unwrap().len() as usize;
    for at in [0, 8, 12, 16, 24, len / 2, len - 33, len - 32, len - 1] {
        let _hurt = Hurt::new(&file, |bytes| bytes[at] ^= 0x10);
        let mend = if at == 8 { "use the vmar that wrote it, or a newer one" } else { "snapshot repair" };
        line(&rig.restore_in(&rig.stores, &saved, &[]).0, 1, &["early.snapshot", mend]);
        // It is listed as what it is, and the others are read.
        let list = rig.ok("list", &[]);
        assert!(list["snapshots"][0]["error"].as_str().unwrap().contains("early.snapshot"), "{list}");
        assert_eq!(list["snapshots"][1]["vm"].as_str(), Some("web"));
        line(&rig.run("check", &[]), 1, &["cannot be restored", "early"]);
    }
    for len in [0, 7, 12, 24, 55, len / 2, len - 1] {
        let _hurt = Hurt::new(&file, |bytes| bytes.truncate(len));
        line(&rig.restore_in(&rig.stores, &saved, &[]).0, 1, &["early.snapshot", "snapshot repair"]);
        // What it names may still be wanted: nothing is removed as long as nobody can tell.
        let before = rig.packs(0);
        rig.run("repair", &[]);
        let out = rig.save_with(&rig.running(&second.stream), "third", &[]);
        assert!(out.status.success());
        assert!(rig.run("delete", &["third"]).status.success());
        assert_eq!(rig.packs(0), before);
    }
    let swapped = Hurt::new(&file, |bytes| *bytes = fs::read(path("second")).unwrap());
    let (out, _) = rig.restore_in(&rig.stores, &saved, &[]);
    line(&out, 1, &["early.snapshot", "is the snapshot \"second\"", "files were swapped", "snapshot repair"]);
    line(&rig.run("show", &["early"]), 1, &["files were swapped"]);
    drop(swapped);
    rig.comes_back(&saved);
    rig.comes_back(&second);
}

#[test]
fn a_store_that_is_none_or_of_a_newer_vmar_is_not_written_to() {
    let (rig, saved) = one_store();
    let qemu = rig.running(&saved.stream);
    let refused = |verbs: &[&str], status, words: &[&str]| {
        let before = tree(&rig.stores[0]);
        for verb in verbs {
            let out = match *verb {
                "save" => rig.save_with(&qemu, "new", &[]),
                "restore" => rig.restore_in(&rig.stores, &saved, &[]).0,
                "delete" | "show" => rig.run(verb, &["early"]),
                verb => rig.run(verb, &[]),
            };
            line(&out, status, words);
            as_before(&qemu);
        }
        assert!(before == tree(&rig.stores[0]), "something was changed");
    };
    let all = ["save", "restore", "delete", "show", "check", "repair", "list"];
    let mark = rig.stores[0].join("vmar-snapshots");
    let text_of = fs::read_to_string(&mark).unwrap();
    let newer = Hurt::new(&mark, |bytes| *bytes = text_of.replace("\"version\":1", "\"version\":2").into_bytes());
    refused(&all, 1, &["store0", "has version 2, not 1", "use the vmar that made it, or a newer one"]);
    drop(newer);
    for garbage in ["", "{", "{}", "{\"format\":\"other\",\"version\":1,\"id\":\"a\"}"] {
        let _hurt = Hurt::new(&mark, |bytes| *bytes = garbage.into());
        refused(&all, 1, &["store0", "is not marked as a store of snapshots", "check the URL"]);
    }
    // No mark at all: what is there is not taken for a new store, but by who knows it for one.
    fs::rename(&mark, rig.path("mark")).unwrap();
    fs::write(rig.stores[0].join("holiday.jpg"), "x").unwrap();
    refused(&["save", "delete", "repair"], 1, &["store0", "not empty", "name an empty or a new directory"]);
    refused(&["restore", "show", "check", "list"], 1, &["store0", "is no store of snapshots", "check the URL"]);
    fs::remove_file(rig.stores[0].join("holiday.jpg")).unwrap();
    fs::rename(rig.path("mark"), &mark).unwrap();
    rig.comes_back(&saved);
    // A file where a directory has to be.
    let file = vec![rig.bench.file("file", b"x")];
    let out = rig.command_in(&file, "list", &[]).output().unwrap();
    line(&out, 1, &["file", "check the path"]);
}

#[test]
fn names_and_numbers_that_cannot_be_are_refused_before_the_vm_is_touched() {
    let (rig, saved) = one_store();
    let before = tree(&rig.stores[0]);
    let qemu = rig.running(&saved.stream);
    for name in ["", ".", "..", ".hidden", "a/b", "../x", "a b", "ä", "a\nb", &"n".repeat(101)] {
        line(&rig.save_with(&qemu, name, &[]), 2, &["name", "cannot be that of a snapshot", "letters, digits"]);
        for verb in ["show", "delete", "check", "repair"] {
            line(&rig.run(verb, &[name]), 2, &["cannot be that of a snapshot", "letters, digits"]);
        }
        let (out, _) = rig.restore_in(&rig.stores, &Saved { name: name.into(), stream: vec![0] }, &[]);
        line(&out, 2, &["cannot be that of a snapshot"]);
    }
    line(&rig.save_with(&qemu, "early", &[]), 1, &["snapshot early", "is there already", "take another name"]);
    for copies in ["0", "2"] {
        line(&rig.save_with(&qemu, "new", &["--copies", copies]), 2, &["--copies", "in 1 stores", "name more stores"]);
    }
    // One store under two names.
    let link = rig.path("link");
    std::os::unix::fs::symlink(&rig.stores[0], &link).unwrap();
    for second in [text(&rig.stores[0]), text(&link), &format!("{}/.", text(&link)), &format!("file://{}", text(&link))]
    {
        let words = [second, "is the same store as", "name each store once"];
        line(&rig.save_with(&qemu, "new", &["--store", second]), 2, &words);
        for (verb, args) in [("delete", &["early"][..]), ("check", &[]), ("repair", &[]), ("list", &[])] {
            line(&rig.run(verb, &[args, &["--store", second]].concat()), 2, &words);
        }
    }
    line(&rig.save_with(&qemu, "new", &["--store", ""]), 2, &["--store", "is empty"]);
    qemu.state().name = None;
    line(&rig.save_with(&qemu, "new", &[]), 2, &["--vm", "no name", "give it one"]);
    // A disk that would not be in the snapshot; and neither disks nor that there shall be none.
    qemu.state().blocks[0]["inserted"]["ro"] = false.into();
    let overlay = rig.path("overlay");
    let args = ["save", "new", "--qmp", text(&qemu.path)];
    line(&rig.run("save", &args[1..]), 2, &["--overlay", "--memory-only"]);
    rig.image("base", &noise(1));
    let library = rig.bench.library();
    ok(&["--library", text(&library), "overlay", "create", text(&overlay), "--image", "base"]);
    let out = rig.save_with(&qemu, "new", &["--overlay", text(&overlay)]);
    line(&out, 1, &["/seed.iso", "would not be in the snapshot", "--memory-only"]);
    assert!(!qemu.state().told.iter().any(|c| c == "stop" || c == "migrate"), "{:?}", qemu.state().told);
    as_before(&qemu);
    assert!(before == tree(&rig.stores[0]));
    line(&rig.run("restore", &["early"]), 2, &["there is nothing to do", "--qmp"]);
    line(&rig.run("restore", &["early", "--overlay", "x"]), 2, &["--overlay", "has 0 disks"]);
    line(&rig.run("show", &["late"]), 1, &["snapshot late", "is not in", "snapshot list"]);
    rig.comes_back(&saved);
}

/// The VM runs, all is set as it was, nothing is in the stores that was not before, and the next save goes well.
fn refused_by(rig: &Rig, saved: &Saved, qemu: &Qemu, status: i32, words: &[&str]) {
    line(&rig.save_with(qemu, "new", &[]), status, words);
    as_before(qemu);
    rig.check_spool();
    assert_eq!(names(&rig.stores[0].join("snapshots")), ["early.snapshot"]);
    assert!(names(&rig.stores[0].join("staging")).is_empty());
    qemu.state().writes = Writes::All;
    qemu.state().stream.clone_from(&saved.stream);
    went_well(rig.save_with(qemu, "new", &[]));
    as_before(qemu);
    rig.comes_back(&Saved { name: "new".into(), stream: saved.stream.clone() });
    rig.comes_back(saved);
    assert!(rig.run("delete", &["new"]).status.success());
}

#[test]
fn a_migration_that_fails_is_cut_or_is_none_leaves_the_vm_running() {
    let (rig, saved) = one_store();
    let why = "State blocked by non-migratable device '0000:00:05.0/nvme'";
    for len in [0, 1, 100_000, saved.stream.len() - 1, saved.stream.len()] {
        let qemu = rig.running(&saved.stream);
        qemu.state().writes = Writes::Fails(len, why);
        refused_by(&rig, &saved, &qemu, 1, &["QEMU cannot write this VM", "nvme", "take it away"]);
    }
    for len in [0, 5, 60, 500_000, saved.stream.len() - 20_100] {
        let qemu = rig.running(&saved.stream);
        qemu.state().writes = Writes::Cut(len);
        refused_by(&rig, &saved, &qemu, 1, &["QEMU's migration stream", "it ends in the middle of memory"]);
    }
    let mut strange: Vec<(Vec<u8>, &str)> = vec![
        ((0..3000).flat_map(noise).collect(), "it is not understood"),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "it is not understood"),
    ];
    // A page in a block that was not announced, one behind the end of its block, and a flag that nobody knows.
    let with = |change: &dyn Fn(&mut Vec<u8>, usize)| {
        let mut stream = saved.stream.clone();
        // The second time that it is named is in a record.
        let named = stream.windows(7).enumerate().filter(|(_, w)| *w == b"\x06pc.ram").map(|(at, _)| at);
        let first = named.take(2).last().unwrap();
        change(&mut stream, first);
        stream
    };
    strange.push((with(&|stream, at| stream[at + 3] = b'X'), "was not announced"));
    strange.push((with(&|stream, at| stream[at - 5] = 1), "behind the end of its block"));
    strange.push((with(&|stream, at| stream[at - 1] |= 0x80), "it is not understood"));
    for (stream, why) in strange {
        let qemu = rig.running(&stream);
        refused_by(&rig, &saved, &qemu, 1, &["QEMU's migration stream", why, "docs/snapshots.md"]);
    }
    for status in ["inmigrate", "suspended", "internal-error"] {
        let qemu = rig.running(&saved.stream);
        qemu.state().status = status.into();
        line(&rig.save_with(&qemu, "new", &[]), 2, &["QEMU", status, "that runs, or is paused"]);
        assert_eq!(qemu.state().status, status);
    }
}

#[test]
fn a_qemu_that_dies_is_named_and_nothing_is_kept_of_it() {
    let (rig, saved) = one_store();
    for len in [0, 700_000, saved.stream.len()] {
        let qemu = rig.running(&saved.stream);
        qemu.state().writes = Writes::Dies(len);
        let out = rig.save_with(&qemu, "new", &[]);
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(
            out.status.code() == Some(1) && said.contains(text(&qemu.path)) && !said.contains("panicked"),
            "{said}"
        );
        assert_eq!(said.lines().filter(|line| line.starts_with("vmar: ")).count(), 1, "{said}");
        rig.check_spool();
        assert_eq!(names(&rig.stores[0].join("snapshots")), ["early.snapshot"]);
    }
    let nobody = rig.path("nobody");
    let out = rig.run("save", &["new", "--memory-only", "--qmp", text(&nobody)]);
    line(&out, 1, &["nobody", "connect to QEMU's monitor", "check the path"]);
    rig.comes_back(&saved);
}

#[test]
fn a_qemu_that_waits_for_no_vm_or_does_not_take_it_is_named() {
    let (rig, saved) = one_store();
    let qemu = rig.running(&saved.stream);
    let out = rig.run("restore", &["early", "--qmp", text(&qemu.path)]);
    line(&out, 2, &[text(&qemu.path), "waits for no VM", "running", "-incoming defer"]);
    as_before(&qemu);
    for len in [0, 1000, saved.stream.len()] {
        for takes in [Takes::Fails(len), Takes::Dies(len)] {
            let qemu = rig.waiting(&saved.stream);
            qemu.state().takes = takes;
            let out = rig.run("restore", &["early", "--qmp", text(&qemu.path), "--spool", text(&rig.spool())]);
            line(&out, 1, &["QEMU", "; see its log"]);
            assert_ne!(qemu.state().status, "running", "{takes:?}");
            rig.check_spool();
        }
    }
    let nobody = rig.path("nobody");
    let out = rig.run("restore", &["early", "--qmp", text(&nobody), "--wait", "0"]);
    line(&out, 1, &["nobody", "connect to QEMU's monitor"]);
    let incoming = rig.waiting(&saved.stream);
    let out = rig.run("restore", &["early", "--qmp", text(&incoming.path), "--incoming", text(&nobody)]);
    line(&out, 1, &["nobody", "connect to the waiting QEMU"]);
    rig.comes_back(&saved);
}
