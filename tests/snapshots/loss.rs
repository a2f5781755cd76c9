//! Stores that are lost, and copies that rot: what is left is enough as long as one copy is, and it is healed from there.

use crate::common::*;
use crate::guest::*;
use crate::rig::*;
use std::fs;
use std::path::{Path, PathBuf};

/// The pairs and the single ones of three.
const LOST: [&[usize]; 6] = [&[0], &[1], &[2], &[0, 1], &[0, 2], &[1, 2]];

/// Calls `then` with the stores that are left while these are away; all are named, or those that are left.
fn without(rig: &Rig, lost: &[usize], then: impl Fn(&[PathBuf])) {
    for n in lost {
        fs::rename(&rig.stores[*n], rig.path(&format!("away{n}"))).unwrap();
    }
    then(&rig.stores);
    let left: Vec<PathBuf> = rig.stores.iter().filter(|store| store.exists()).cloned().collect();
    then(&left);
    for n in lost {
        fs::rename(rig.path(&format!("away{n}")), &rig.stores[*n]).unwrap();
    }
}

#[test]
fn any_store_that_is_left_is_enough() {
    let rig = Rig::new(3);
    rig.image("base", &(0..64).flat_map(noise).collect::<Vec<_>>());
    let mut disk = rig.overlay("base");
    disk.write(5 * PAGE, &noise(555));
    let (one, _) = rig.save("one", &vm(guest(1, 600)), &["--overlay", text(&disk.path)]);
    let (two, _) = rig.save("two", &vm([guest(1, 500), guest(3, 200)].concat()), &[]);
    for lost in LOST {
        without(&rig, lost, |stores| {
            let new = rig.fresh("new");
            rig.comes_back_from(stores, &one, &["--overlay", text(&new)]);
            assert!(rig.disk(&new) == disk.model);
            rig.comes_back_from(stores, &two, &[]);
        });
    }
    // All of them: no store, and that is said.
    without(&rig, &[0, 1, 2], |stores| {
        if !stores.is_empty() {
            let (out, qemu) = rig.restore_in(stores, &one, &[]);
            line(&out, 1, &["store", "is no store of snapshots", "check the URL"]);
            assert_eq!(qemu.state().told.len(), 0);
        }
    });
}

/// Two copies in three stores: any one may be lost. Of the pairs it is the one with both copies alone that may not.
#[test]
fn so_many_copies_are_so_many() {
    let rig = Rig::new(3);
    let (saved, said) = rig.save("two", &vm(guest(1, 700)), &["--copies", "2"]);
    assert_eq!((said["new_packs"].as_u64(), said["about"]["copies"].as_u64()), (Some(1), Some(2)));
    let has: Vec<usize> = (0..3).filter(|n| !rig.packs(*n).is_empty()).collect();
    assert_eq!(has.len(), 2);
    for lost in LOST {
        without(&rig, lost, |stores| {
            if lost != has {
                rig.comes_back_from(stores, &saved, &[]);
                return;
            }
            let (out, qemu) = rig.restore_in(stores, &saved, &[]);
            line(&out, 1, &["snapshot two", "no store has a whole copy of pack", "name all stores"]);
            assert!(qemu.state().got.is_empty());
            let out = rig.command_in(stores, "check", &[]).output().unwrap();
            line(&out, 1, &["cannot be restored", "two", "name more stores"]);
        });
    }
    assert_eq!(rig.ok("check", &[])["faults"].as_array().unwrap().len(), 0);
    // A snapshot that wants three does not count on what two have.
    let (more, said) = rig.save("three", &vm(guest(1, 700)), &[]);
    assert_eq!(said["pages"]["unknown"]["known"].as_u64(), Some(0), "{said}");
    without(&rig, &has, |stores| drop(rig.comes_back_from(stores, &more, &[])));
    rig.ok("check", &[]);
}

/// Pages of a pack that is rotten in one place are read from where they are whole, also if each store has lost another part.
#[test]
fn each_store_may_have_lost_another_part() {
    let rig = Rig::new(3);
    let (saved, _) = rig.save("one", &vm(guest(1, 1200)), &[]);
    for n in 0..3 {
        let pack = only(&rig.stores[n].join("packs"));
        let mut bytes = fs::read(&pack).unwrap();
        let at = bytes.len() * (2 * n + 1) / 6;
        bytes[at..at + 50].fill(0xEE);
        fs::write(pack, bytes).unwrap();
    }
    rig.comes_back(&saved);
    let out = rig.run("check", &["one"]);
    // Nothing copies parts of packs together: it can be restored now, and not be healed.
    line(&out, 1, &["cannot be restored", "one"]);
}

fn only(dir: &Path) -> PathBuf {
    let names = names(dir);
    assert_eq!(names.len(), 1, "{names:?}");
    dir.join(&names[0])
}

fn flip(file: &Path) {
    let mut bytes = fs::read(file).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 4;
    fs::write(file, bytes).unwrap();
}

#[test]
fn what_is_missing_or_rotten_is_found_and_healed() {
    let rig = Rig::new(3);
    let (saved, _) = rig.save("one", &vm(guest(1, 400)), &[]);
    let whole: Vec<_> = rig.stores.iter().map(|store| tree(store)).collect();
    let first = rig.ok("check", &[]);
    assert!(first["bytes"].as_u64() > Some(1_000_000) && first["packs"].as_u64() == Some(1), "{first}");
    for store in &rig.stores {
        let (pack, file) = (only(&store.join("packs")), only(&store.join("snapshots")));
        // (what is done, what is done to, what is said, also without reading)
        type Hurt = fn(&Path);
        let remove: Hurt = |file| fs::remove_file(file).unwrap();
        let cases: [(Hurt, &Path, &str, bool); 4] = [
            (remove, &pack, "has no pack", true),
            (flip, &pack, "is broken", false),
            (remove, &file, "has no snapshot one", true),
            (flip, &file, "checksum is wrong", true),
        ];
        for (hurt, what, why, quick) in cases {
            hurt(what);
            let out = rig.run("check", &[]);
            line(&out, 1, &["snapshots: 1 faults", "all can be restored", "snapshot repair"]);
            let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
            let fault = said["faults"][0].as_str().unwrap();
            assert!(fault.contains(why) && fault.contains(text(store)), "{fault}");
            assert_eq!(said["broken"].as_array().unwrap().len(), 0, "{said}");
            let out = rig.run("check", &["--quick"]);
            assert_eq!(out.status.code(), Some(quick.into()), "without reading: {why}");
            let said: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
            assert_eq!(said["bytes"].as_u64(), Some(0), "nothing is read");
            rig.comes_back(&saved);
            let said = rig.ok("repair", &[]);
            assert_eq!((said["mended"].as_array().unwrap().len(), said["faults"].as_array().unwrap().len()), (1, 0));
            assert_eq!(rig.ok("check", &[])["faults"].as_array().unwrap().len(), 0);
            let now: Vec<_> = rig.stores.iter().map(|store| tree(store)).collect();
            assert!(now == whole, "it is healed to what it was: {why}");
        }
    }
    // A store that is new and empty gets all of it.
    fs::remove_dir_all(&rig.stores[1]).unwrap();
    let said = rig.ok("repair", &[]);
    assert_eq!(said["mended"].as_array().unwrap().len(), 2, "{said}");
    rig.comes_back_from(&rig.stores[1..2], &saved, &[]);
}

#[test]
fn leftovers_of_writers_go_when_the_stores_are_repaired() {
    let rig = Rig::new(2);
    let (saved, _) = rig.save("one", &vm(guest(1, 100)), &[]);
    let whole: Vec<_> = rig.stores.iter().map(|store| tree(store)).collect();
    for store in &rig.stores {
        fs::write(store.join("packs").join(format!("{}.pack", "ab".repeat(32))), [7; 5000]).unwrap();
        fs::write(store.join("staging/77-0"), [7; 5000]).unwrap();
    }
    rig.ok("check", &[]);
    assert_eq!(rig.ok("repair", &[])["freed_bytes"].as_u64(), Some(10_000));
    let now: Vec<_> = rig.stores.iter().map(|store| tree(store)).collect();
    assert!(now == whole);
    rig.comes_back(&saved);
}

#[test]
fn the_majority_is_right_and_half_against_half_is_nobody() {
    // Another snapshot of the same name, from stores of its own.
    let (rig, other) = (Rig::new(3), Rig::new(1));
    let (saved, _) = rig.save("one", &vm(guest(1, 100)), &[]);
    other.save("one", &vm(guest(2, 100)), &[]);
    for dir in ["packs", "snapshots"] {
        copy_all(&other.stores[0].join(dir), &rig.stores[2].join(dir));
    }
    let two = &rig.stores[1..];
    let before: Vec<_> = two.iter().map(|store| tree(store)).collect();
    for verb in ["check", "repair"] {
        let out = rig.command_in(two, verb, &[]).output().unwrap();
        line(&out, 1, &["cannot be restored", "one"]);
    }
    let (out, qemu) = rig.restore_in(two, &saved, &[]);
    line(&out, 1, &["snapshot one", "is not the same in", "store1", "store2", "find out which one is right"]);
    assert!(qemu.state().got.is_empty());
    let after: Vec<_> = two.iter().map(|store| tree(store)).collect();
    assert!(before == after, "nobody knows which one is right, and one was changed");
    // With the third store there is a majority.
    let out = rig.run("check", &[]);
    assert!(String::from_utf8_lossy(&out.stdout).contains("is not what other stores have"));
    rig.ok("repair", &[]);
    rig.comes_back_from(&rig.stores[2..], &saved, &[]);
    rig.ok("check", &[]);
}
