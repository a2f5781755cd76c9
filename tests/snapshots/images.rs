//! Base images that are gone or edited, overlays that are in the way, and file systems without room.

use crate::common::*;
use crate::guest::*;
use crate::rig::*;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

/// Changes bytes of an image that a library has, so that its time of modification stays.
fn edit_unseen(image: &Path, at: usize, bytes: &[u8]) {
    let times = fs::metadata(image).unwrap();
    fs::set_permissions(image, fs::Permissions::from_mode(0o600)).unwrap();
    let file = fs::File::options().write(true).open(image).unwrap();
    file.write_all_at(bytes, at as u64).unwrap();
    file.set_modified(times.modified().unwrap()).unwrap();
    fs::set_permissions(image, times.permissions()).unwrap();
}

/// A snapshot of a VM whose memory and disk refer to blocks of its image.
fn with_image(rig: &Rig) -> (Saved, Disk, PathBuf) {
    let image: Vec<u8> = (0..100).flat_map(|n| noise(4_000 + n)).collect();
    let file = rig.image("base", &image);
    let mut disk = rig.overlay("base");
    disk.write(7 * PAGE, &image[50 * PAGE..51 * PAGE]);
    disk.write(9 * PAGE, &noise(7));
    let memory = [guest(1, 100), image.as_chunks::<PAGE>().0[20..60].to_vec()].concat();
    let (saved, said) = rig.save("one", &vm(memory), &["--overlay", text(&disk.path)]);
    let base = |class: &str| said["pages"][class]["base"].as_u64();
    assert_eq!((base("unknown"), base("disk")), (Some(40), Some(1)), "{said}");
    (saved, disk, file)
}

#[test]
fn an_image_that_was_edited_or_is_gone_is_named_and_all_is_well_when_it_is_back() {
    let rig = Rig::new(1);
    let (saved, disk, image) = with_image(&rig);
    let (library, new) = (rig.bench.library(), rig.path("new"));
    let comes_back = || {
        rig.comes_back_from(&rig.stores, &saved, &["--overlay", text(&new)]);
        assert!(rig.disk(&new) == disk.model);
        fs::remove_file(&new).unwrap();
    };
    let refused = |args: &[&str], status, words: &[&str]| {
        let (out, qemu) = rig.restore_in(&rig.stores, &saved, args);
        line(&out, status, words);
        assert_ne!(qemu.state().status, "running");
        assert!(!new.exists() && !new.with_file_name(".new.arriving").exists(), "half a disk is left");
        assert_eq!(names(&rig.path("state")), [""; 0], "a live bitmap is left");
    };
    comes_back();
    // Behind the library's back, with its times as they were: only the content tells. First a block of memory, then one of the disk.
    edit_unseen(&image, 30 * PAGE + 5, b"edited");
    refused(&[], 1, &["image base", "block 30 is not what it was", "vmar image verify", "bring the image back"]);
    edit_unseen(&image, 30 * PAGE, &noise(4_030));
    edit_unseen(&image, 50 * PAGE + 5, b"edited");
    refused(&["--overlay", text(&new)], 1, &["image base", "block 50 is not what it was", "bring the image back"]);
    // What is saved meanwhile does not refer to it.
    let (meanwhile, _) = rig.save("meanwhile", &vm(vec![noise(4_050); 3]), &["--image", "base"]);
    edit_unseen(&image, 50 * PAGE, &noise(4_050));
    comes_back();
    rig.comes_back(&meanwhile);
    // No library is named, a wrong one is, and the image is in it no more.
    let none = || vmar(&["snapshot", "restore", "one", "--store", text(&rig.stores[0])]);
    let qemu = rig.waiting(&saved.stream);
    let words = ["snapshot one", "needs image base", "name the library with --library"];
    line(&none().args(["--qmp", text(&qemu.path)]).output().unwrap(), 1, &words);
    let overlay = none().args(["--overlay", text(&new)]).output().unwrap();
    line(&overlay, 1, &words);
    ok(&["--library", text(&library), "image", "remove", "base", "--force"]);
    refused(&["--overlay", text(&new)], 1, &words);
    let out = rig.save_with(&rig.running(&saved.stream), "new", &["--overlay", text(&disk.path)]);
    line(&out, 1, &["overlay", "that the library does not have", "add the image to it"]);
    // Under another name it is the same.
    rig.bench.add(&[format!("again={}", text(&image))]);
    comes_back();
}

#[test]
fn an_overlay_that_is_there_is_not_touched() {
    let rig = Rig::new(1);
    let (saved, disk, _) = with_image(&rig);
    let mut two = [rig.overlay("base"), rig.overlay("base")];
    two[0].write(0, &noise(1));
    let args: Vec<&str> = two.iter().flat_map(|disk| ["--overlay", text(&disk.path)]).collect();
    let (both, _) = rig.save("both", &vm(guest(1, 50)), &args);
    let there = rig.bench.file("there", b"somebody's");
    let (out, qemu) = rig.restore_in(&rig.stores, &saved, &["--overlay", text(&there)]);
    line(&out, 1, &["there", "is there already", "name a new file"]);
    assert_eq!(qemu.state().told.len(), 0);
    // The second of two: the first is not made either, so that the same command goes well when it is out of the way.
    let new = rig.path("new");
    let args = ["--overlay", text(&new), "--overlay", text(&there)];
    line(&rig.restore_in(&rig.stores, &both, &args).0, 1, &["there", "is there already"]);
    assert!(!new.exists() && fs::read(&there).unwrap() == b"somebody's");
    line(&rig.restore_in(&rig.stores, &both, &args[..2]).0, 2, &["--overlay", "has 2 disks"]);
    fs::remove_file(&there).unwrap();
    rig.comes_back_from(&rig.stores, &both, &args);
    assert!(rig.disk(&new) == two[0].model && rig.disk(&there) == two[1].model);
    // No overlay at all, where one is to be saved.
    let raw = rig.bench.file("raw", &[0; 8192]);
    let qemu = rig.running(&saved.stream);
    assert_eq!(rig.save_with(&qemu, "new", &["--overlay", text(&raw)]).status.code(), Some(1));
    as_before(&qemu);
    assert!(rig.disk(&disk.path) == disk.model);
}

/// A file system of this size, unmounted whatever happens; none without the right to mount.
struct Small(PathBuf);

impl Small {
    fn mount(at: PathBuf, size: &str) -> Option<Small> {
        fs::create_dir(&at).unwrap();
        let status =
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(&at).status();
        status.is_ok_and(|s| s.success()).then_some(Small(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_store_or_a_spool_without_room_costs_the_new_snapshot_alone() {
    let mut rig = Rig::new(1);
    let Some(small) = Small::mount(rig.path("small"), "6M") else {
        eprintln!("not root: nothing is mounted");
        return;
    };
    rig.stores.push(small.0.join("store"));
    let (early, _) = rig.save("early", &vm(guest(1, 400)), &[]);
    let stream = vm(guest(2, 2000)).stream();
    let qemu = rig.running(&stream);
    let out = rig.save_with(&qemu, "large", &[]);
    line(&out, 1, &["small/store", "No space left", "free some space"]);
    as_before(&qemu);
    rig.check_spool();
    rig.comes_back(&early);
    for store in &rig.stores {
        assert_eq!(names(&store.join("snapshots")), ["early.snapshot"]);
        assert!(names(&store.join("staging")).is_empty(), "half a pack is left");
    }
    rig.ok("check", &[]);
    // So little that the snapshot's own file does not fit: then no store has it.
    let left = fs::File::create(small.0.join("ballast")).unwrap();
    [1 << 16, 1 << 12].into_iter().for_each(|bytes| while fill(&left, bytes) {});
    line(&rig.save_with(&rig.running(&early.stream), "same", &[]), 1, &["small/store", "free some space"]);
    for store in &rig.stores {
        assert_eq!(names(&store.join("snapshots")), ["early.snapshot"]);
    }
    drop(left);
    fs::remove_file(small.0.join("ballast")).unwrap();
    went_well(rig.save_with(&rig.running(&early.stream), "same", &[]));
    // The other way round: the memory has no room in the spool.
    let spool = Small::mount(rig.path("spool-small"), "1M").unwrap();
    let out = rig.run("save", &["large", "--memory-only", "--qmp", text(&qemu.path), "--spool", text(&spool.0)]);
    line(&out, 1, &["spool-small", "bytes of memory there for a while", "free some space"]);
    as_before(&qemu);
    assert!(names(&spool.0).is_empty());
    // Pages that were written before there was no more room are freed by a repair.
    rig.ok("repair", &[]);
    rig.ok("check", &[]);
    rig.comes_back(&early);
}

/// Writes so many bytes; false when they do not fit.
fn fill(mut file: &fs::File, bytes: usize) -> bool {
    use std::io::Write;
    file.write_all(&vec![1; bytes]).is_ok()
}
