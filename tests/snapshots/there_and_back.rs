//! What was saved comes back, and what is there already is not written again.

use crate::common::{ok, text};
use crate::guest::*;
use crate::rig::*;
use std::fs;

/// Memory with all that there is: zeros, pages that repeat, blocks of the image, several blocks, names longer than others.
fn rich(image: &[u8]) -> Vm {
    let mut ram = guest(1, 1500);
    // A run longer than a piece of the skeleton, and repeats within and across blocks.
    ram.extend((0..1100).map(|n| if n < 1050 { [0; PAGE] } else { noise(5) }));
    ram[7] = noise(5);
    ram.extend_from_slice(&image.as_chunks::<PAGE>().0[..40]);
    let vga: Vec<_> = (0..64).map(|n| if n % 2 == 0 { noise(5) } else { noise(900 + n) }).collect();
    let rom = vec![[0xFF; PAGE]; 3];
    let blocks = vec![("pc.ram", ram), ("0000:00:02.0/vga.vram", vga), ("/rom@etc/acpi/tables", rom)];
    Vm { machine: "pc-q35-9.2", return_path: false, blocks, section_pages: 777, again: vec![] }
}

fn image() -> Vec<u8> {
    (0..600).flat_map(|n| if n % 7 == 3 { [0; PAGE] } else { noise(4_000 + n) }).collect()
}

#[test]
fn the_stream_comes_back_byte_for_byte() {
    let rig = Rig::new(2);
    let image = image();
    rig.image("base", &image);
    let vm = rich(&image);
    let (saved, said) = rig.save("one", &vm, &["--image", "base", "--vm", "a"]);
    // The classes without a kernel: zero and unknown. 34 of the 40 blocks of the image are not zero.
    let unknown = &said["pages"]["unknown"];
    assert_eq!((unknown["base"].as_u64(), unknown["once"].as_u64()), (Some(34), Some(0)), "{said}");
    assert_eq!(said["pages"]["zero"]["zero"].as_u64(), Some(150 + 1050 - 1 + 1 + 6), "{said}");
    assert_eq!(said["about"]["stream_bytes"].as_u64(), Some(saved.stream.len() as u64));
    rig.comes_back(&saved);
    // Without the image nothing is refilled, and all is in packs.
    let (all, said) = rig.save("two", &vm, &[]);
    assert_eq!((said["pages"]["unknown"]["base"].as_u64(), said["about"]["vm"].as_str()), (Some(0), Some("web")));
    rig.comes_back(&all);
    // The other way in: a QEMU that waits at a socket of its own.
    let (qemu, at) = (rig.waiting(&saved.stream), rig.path("incoming"));
    qemu.waits_at(&at);
    rig.ok("restore", &["one", "--qmp", crate::common::text(&qemu.path), "--incoming", crate::common::text(&at)]);
    assert!(qemu.got() == saved.stream);
    assert!(!qemu.state().told.contains(&"migrate-incoming".to_string()));
}

/// QEMU writes a page once when the VM stands still. If one writes some twice both have the content that counts: the last.
#[test]
fn pages_that_come_twice_come_twice_with_their_last_content() {
    let rig = Rig::new(1);
    let mut vm = rich(&image());
    // Zero and noise, in each block; the last one is zero and was not.
    vm.again = vec![(0, 3), (0, 4), (0, 10), (1, 9), (2, 0), (0, 1600)];
    let (saved, _) = rig.save("same", &vm, &[]);
    rig.comes_back(&saved);
    let qemu = rig.running(&vm.stream_that_changes(31));
    went_well(rig.save_with(&qemu, "changed", &[]));
    as_before(&qemu);
    rig.comes_back(&Saved { name: "changed".into(), stream: vm.stream() });
}

/// A VM that is paused stays so, there and here; one that shall not go on does not; and what does not run there does not run here.
#[test]
fn whether_it_runs_is_kept() {
    let rig = Rig::new(1);
    let stream = vm(guest(2, 300)).stream();
    let mut saved = Saved { name: "paused".into(), stream };
    let qemu = rig.running(&saved.stream);
    qemu.state().status = "paused".into();
    went_well(rig.save_with(&qemu, "paused", &[]));
    assert_eq!(qemu.state().status, "postmigrate");
    assert!(!qemu.state().told.iter().any(|c| c == "cont" || c == "stop"), "{:?}", qemu.state().told);
    let (out, there) = rig.restore_in(&rig.stores, &saved, &[]);
    went_well(out);
    assert!(there.state().status == "paused" && there.got() == saved.stream);
    // From where the last snapshot left it.
    went_well(rig.save_with(&qemu, "again", &[]));
    qemu.state().status = "running".into();
    went_well(rig.save_with(&qemu, "stay", &["--stay-stopped"]));
    assert_eq!(qemu.state().status, "postmigrate");
    saved.name = "stay".into();
    let (out, there) = rig.restore_in(&rig.stores, &saved, &["--stay-stopped"]);
    went_well(out);
    assert!(there.state().status == "paused" && !there.state().told.contains(&"cont".to_string()));
    rig.comes_back(&saved);
}

#[test]
fn disks_come_back_as_they_were_at_that_instant() {
    let rig = Rig::new(2);
    let mut bytes = image();
    rig.image("base", &bytes);
    // No whole number of blocks.
    bytes.truncate(100 * PAGE + 5 * 512);
    rig.image("odd", &bytes);
    let mut disks = [rig.overlay("base"), rig.overlay("odd"), rig.overlay("odd"), rig.overlay("base")];
    disks[0].write(0, &noise(77));
    disks[0].write(3 * PAGE + 512, &[0x5A; 512]);
    disks[0].write(8 * PAGE - 1024, &(0..70).flat_map(|n| noise(8_000 + n)).collect::<Vec<_>>());
    disks[0].zero(200 * PAGE, 90 * PAGE);
    disks[0].zero(400 * PAGE + 512, 1024);
    // What the image has elsewhere, and what memory has.
    let elsewhere = disks[0].model[500 * PAGE..510 * PAGE].to_vec();
    disks[0].write(300 * PAGE, &elsewhere);
    disks[0].write(350 * PAGE, &noise(1_000_001));
    disks[1].write(100 * PAGE, &[0x11; 5 * 512]);
    disks[1].write(99 * PAGE, &noise(78));
    disks[2].zero(100 * PAGE + 512, 4 * 512);
    let overlays: Vec<&str> = disks.iter().flat_map(|d| ["--overlay", d.path.to_str().unwrap()]).collect();
    let before: Vec<_> = disks.iter().map(|disk| fs::read(&disk.path).unwrap()).collect();
    let (saved, said) = rig.save("one", &vm(guest(1, 200)), &overlays);
    assert!(said["pages"]["disk"]["base"].as_u64() == Some(8), "blocks that the image has elsewhere: {said}");
    assert!(said["pages"]["disk"]["same"].as_u64() > Some(0), "a block that memory has: {said}");
    let after: Vec<_> = disks.iter().map(|disk| fs::read(&disk.path).unwrap()).collect();
    assert!(before == after, "an overlay was written to");
    // What is written later is not in it.
    let models: Vec<Vec<u8>> = disks.iter().map(|disk| disk.model.clone()).collect();
    disks[0].write(2 * PAGE, &noise(99));
    disks[3].write(0, &noise(99));
    let new: Vec<_> = (0..4).map(|_| rig.fresh("restored")).collect();
    let args: Vec<&str> = new.iter().flat_map(|path| ["--overlay", path.to_str().unwrap()]).collect();
    let said = rig.comes_back_from(&rig.stores, &saved, &args);
    assert_eq!((said["runs"].as_bool(), said["lost_pages"].as_u64()), (Some(true), Some(0)));
    for (n, (path, model)) in new.iter().zip(&models).enumerate() {
        assert!(rig.disk(path) == *model, "disk {n} is another one");
    }
    // Disks alone, without any QEMU; and saved again from what was restored nothing new is to be written.
    let alone: Vec<_> = (0..4).map(|_| rig.fresh("alone")).collect();
    let args: Vec<&str> = alone.iter().flat_map(|path| ["--overlay", path.to_str().unwrap()]).collect();
    let state = rig.path("state");
    rig.ok("restore", &[&["one", "--state-dir", state.to_str().unwrap()], &args[..]].concat());
    assert!(rig.disk(&alone[0]) == models[0] && rig.disk(&alone[2]) == models[2]);
    let (again, said) = rig.save("two", &vm(guest(1, 200)), &args);
    assert_eq!(said["new_packs"].as_u64(), Some(0), "{said}");
    rig.comes_back(&again);
}

#[test]
fn what_the_stores_have_is_not_written_again_and_not_freed_too_early() {
    let rig = Rig::new(2);
    let mut memory = guest(1, 1000);
    let (first, said) = rig.save("first", &vm(memory.clone()), &["--vm", "a"]);
    assert_eq!(said["new_packs"].as_u64(), Some(1));
    memory[500] = noise(1);
    memory[10] = noise(2);
    let (second, said) = rig.save("second", &vm(memory.clone()), &["--vm", "a"]);
    assert_eq!(
        (said["pages"]["unknown"]["known"].as_u64(), said["pages"]["unknown"]["critical"].as_u64()),
        (Some(900), Some(2)),
        "{said}"
    );
    assert!(said["new_bytes"].as_u64() < Some(20_000), "{said}");
    // Another VM of the domain, and one of another.
    let (other, said) = rig.save("other", &vm(memory.clone()), &["--vm", "b"]);
    assert_eq!(said["new_packs"].as_u64(), Some(0), "{said}");
    let (bank, said) = rig.save("bank", &vm(memory.clone()), &["--vm", "b", "--domain", "bank"]);
    assert_eq!((said["new_packs"].as_u64(), said["pages"]["unknown"]["known"].as_u64()), (Some(1), Some(0)), "{said}");
    assert_eq!(rig.packs(0), rig.packs(1));
    assert_eq!(rig.packs(0).len(), 3, "the first two and that of the bank");
    rig.run("delete", &["first"]);
    for saved in [&second, &other, &bank] {
        rig.comes_back(saved);
    }
    line(&rig.restore_in(&rig.stores, &first, &[]).0, 1, &["first", "is not in", "snapshot list"]);
    rig.run("delete", &["second", "bank"]);
    assert_eq!(rig.packs(0).len(), 2, "what was the bank's alone is gone");
    rig.comes_back(&other);
    rig.run("delete", &["other"]);
    for n in [0, 1] {
        for dir in ["packs", "snapshots", "staging"] {
            assert!(names(&rig.stores[n].join(dir)).is_empty(), "{dir} of store {n} is not empty");
        }
    }
    assert_eq!(rig.ok("list", &[])["snapshots"].as_array().unwrap().len(), 0);
    // One name that is not there takes nothing away with it.
    let (last, _) = rig.save("last", &vm(memory), &[]);
    line(&rig.run("delete", &["last", "nosuch"]), 1, &["nosuch", "in none of the stores", "snapshot list"]);
    rig.comes_back(&last);
}

/// A template is a pack of pages; one of them is used, so all of it goes to the stores, and the snapshot stays when the template goes.
#[test]
fn what_a_template_has_is_not_packed_again() {
    let rig = Rig::new(2);
    let memory = guest(7, 500);
    rig.save("other", &vm(memory.clone()), &[]);
    let id = rig.packs(0).remove(0);
    let (file, kept) = (rig.path(&format!("1-{id}")), rig.path("kept"));
    fs::copy(rig.stores[0].join("packs").join(&id), &file).unwrap();
    ok(&["template", "import", "--store", text(&kept), text(&file)]);
    rig.run("delete", &["other"]);
    assert!(rig.packs(0).is_empty());
    let mut changed = memory;
    changed[3] = noise(3);
    let (saved, said) = rig.save("new", &vm(changed), &["--templates", text(&kept)]);
    let count = &said["pages"]["unknown"];
    assert_eq!((count["known"].as_u64(), count["critical"].as_u64()), (Some(449), Some(1)), "{said}");
    assert!(rig.packs(0).contains(&id) && rig.packs(1).contains(&id), "the template is in all stores");
    fs::remove_dir_all(kept).unwrap();
    rig.comes_back_from(&rig.stores[1..], &saved, &[]);
    rig.ok("check", &[]);
}
