//! A disk that goes with its VM.

use crate::common::*;
use crate::fakes::*;
use std::path::Path;
use std::sync::Mutex;

const MIB: u64 = 1 << 20;

/// A host with a library that has the image `base`, and an overlay on it.
fn host(image: &[u8]) -> (Bench, std::path::PathBuf) {
    let bench = Bench::with_library();
    let file = bench.file("base.raw", image);
    bench.add(&[format!("base={}", text(&file))]);
    let overlay = bench.overlay("base");
    (bench, overlay)
}

fn image() -> Vec<u8> {
    (0..2048).flat_map(noise).collect()
}

/// The disk of an overlay.
fn disk(bench: &Bench, overlay: &Path, to: &str) -> Vec<u8> {
    let (library, state, to) = (bench.library(), bench.path("state"), bench.path(to));
    let args = [
        "--library",
        text(&library),
        "overlay",
        "commit",
        text(overlay),
        "--to",
        text(&to),
        "--state-dir",
        text(&state),
    ];
    ok(&args);
    std::fs::read(to).unwrap()
}

#[test]
fn what_the_guest_wrote_before_and_meanwhile_is_there_and_nothing_else() {
    let image = image();
    let ((a, from), (b, to)) = (host(&image), host(&image));
    let server = a.serve_overlay("base", &from);
    let mut client = server.client();
    let mut model = image.clone();
    let write = |client: &mut Client, model: &mut Vec<u8>, at: u64, bytes: &[u8]| {
        client.write(at, bytes);
        model[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    };
    // Whole blocks, one sector, across blocks, what the image has elsewhere, zeros.
    let big: Vec<u8> = (9000..9400).flat_map(noise).collect();
    write(&mut client, &mut model, 0, &big);
    write(&mut client, &mut model, 3 * MIB + 512, &[0x5A; 512]);
    write(&mut client, &mut model, 4 * MIB - 1024, &[0x5B; 4096]);
    write(&mut client, &mut model, 5 * MIB, &noise(7));
    client.write_zeroes(6 * MIB, MIB, true);
    model[6 << 20..7 << 20].fill(0);

    let memory = stream(&guest(1, 200));
    let (state_a, state_b, library_a, library_b) = (a.path("state"), b.path("state"), a.library(), b.library());
    let sender =
        ["--with-disk", text(&from), "--state-dir", text(&state_a), "--library", text(&library_a), "--image", "base"];
    let receiver = ["--with-disk", text(&to), "--state-dir", text(&state_b), "--library", text(&library_b)];
    let hosts = Hosts::new();
    let parts = Mutex::new(Some((client, server, model)));
    let end = hosts.migrate("web", &memory, &sender, &receiver, || {
        // The memory is there; the guest has written on, and its server lets go of the disk.
        let (mut client, server, mut model) = parts.lock().unwrap().take().unwrap();
        write(&mut client, &mut model, 100 * PAGE as u64, &noise(123));
        write(&mut client, &mut model, 2 * MIB + 2048, &[0x77; 2048]);
        drop(client);
        assert!(server.stop().0.success());
        *parts.lock().unwrap() = None;
        assert!(disk(&a, &from, "here.raw") == model);
    });
    end.ok(&memory);
    let said = said(&end.sent);
    assert!(said.matches("disk, pass").count() >= 2, "{said}");
    let here = std::fs::read(a.path("here.raw")).unwrap();
    assert!(disk(&b, &to, "there.raw") == here, "the disk is another one");
    assert!(vmar::overlay::check(&to).unwrap().is_empty());
    // It is served as any other.
    let server = b.serve_overlay("base", &to);
    assert_eq!(server.client().read(5 * MIB, PAGE), noise(7));
}

#[test]
fn a_disk_that_does_not_fit_stays_and_its_vm_with_it() {
    let image = image();
    let ((a, from), (b, to)) = (host(&image), host(&image));
    let memory = stream(&guest(1, 50));
    let (state_a, state_b) = (a.path("state"), b.path("state"));
    let sender = ["--with-disk", text(&from), "--state-dir", text(&state_a)];
    let hosts = Hosts::new();
    let refused = |sender: &[&str], receiver: &[&str], why: &str| {
        let end = hosts.migrate("web", &memory, sender, receiver, || ());
        assert!(!end.sent.status.success() && !end.received.status.success() && !end.moved);
        assert!(said(&end.received).contains(why), "{}", said(&end.received));
        assert!(said(&end.sent).contains(why), "{}", said(&end.sent));
        assert!(end.got.is_empty());
    };
    refused(&sender, &[], "takes none");
    refused(&[], &["--with-disk", text(&to), "--state-dir", text(&state_b)], "does not go with the VM");
    // Another image.
    let (c, other) = host(&image[PAGE..]);
    let state_c = c.path("state");
    refused(&sender, &["--with-disk", text(&other), "--state-dir", text(&state_c)], "another image");
    // Another size.
    let larger = b.path("larger.qcow2");
    let library = b.library();
    ok(&["--library", text(&library), "overlay", "create", text(&larger), "--image", "base", "--size", "16M"]);
    refused(&sender, &["--with-disk", text(&larger), "--state-dir", text(&state_b)], "the VM's has");
    // One that holds data.
    let server = b.serve_overlay("base", &to);
    server.client().write(0, &[1; 4096]);
    refused(&sender, &["--with-disk", text(&to), "--state-dir", text(&state_b)], "is in use");
    server.stop();
    refused(&sender, &["--with-disk", text(&to), "--state-dir", text(&state_b)], "not empty");
}

/// The link ends while the disk goes: the overlay there is as empty as it was, and nothing lies beside it.
#[test]
fn half_a_disk_is_not_left() {
    let image = image();
    let ((a, from), (b, to)) = (host(&image), host(&image));
    let server = a.serve_overlay("base", &from);
    let mut client = server.client();
    client.write(0, &(0..1000).flat_map(|n| noise(50_000 + n)).collect::<Vec<_>>());
    let (state_a, state_b) = (a.path("state"), b.path("state"));
    let hosts = Hosts::new();
    let destination = std::os::unix::net::UnixListener::bind(hosts.path("destination")).unwrap();
    let before = std::fs::read(&to).unwrap();
    let receiver = hosts.receiver(&["--with-disk", text(&to), "--state-dir", text(&state_b)]);
    let mut sender = hosts.sender("web", &["--with-disk", text(&from), "--state-dir", text(&state_a)]);
    // The sender is ready for QEMU when the disk has gone for the first time.
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while !hosts.path("source").exists() {
        assert!(std::time::Instant::now() < deadline && sender.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let new = to.with_file_name(".base.qcow2.arriving");
    assert!(new.exists());
    sender.kill().unwrap();
    sender.wait().unwrap();
    let received = receiver.wait_with_output().unwrap();
    assert!(!received.status.success());
    assert!(said(&received).contains("link"), "{}", said(&received));
    assert!(!new.exists() && std::fs::read(&to).unwrap() == before);
    assert_eq!(std::fs::read_dir(&state_b).unwrap().count(), 0, "a live bitmap is left");
    drop(destination);
}

/// A file system without room, unmounted whatever happens; none without the right to mount.
struct Small(std::path::PathBuf);

impl Small {
    fn mount(at: std::path::PathBuf, size: &str) -> Option<Small> {
        std::fs::create_dir(&at).unwrap();
        let options = format!("size={size}");
        let status =
            std::process::Command::new("mount").args(["-t", "tmpfs", "-o", &options, "none"]).arg(&at).status();
        status.is_ok_and(|s| s.success()).then_some(Small(at))
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn no_room_for_the_disk_keeps_the_vm_and_no_room_for_its_memory_does_not() {
    let image = image();
    let ((a, from), b) = (host(&image), Bench::with_library());
    let file = b.file("base.raw", &image);
    b.add(&[format!("base={}", text(&file))]);
    let server = a.serve_overlay("base", &from);
    server.client().write(0, &(0..1500).flat_map(|n| noise(50_000 + n)).collect::<Vec<_>>());
    server.stop();
    let Some(small) = Small::mount(b.path("small"), "4M") else {
        eprintln!("not root: nothing is mounted");
        return;
    };
    let (to, library) = (small.0.join("web.qcow2"), b.library());
    ok(&["--library", text(&library), "overlay", "create", text(&to), "--image", "base"]);
    let (state_a, state_b, store) = (a.path("state"), b.path("state"), small.0.join("store"));
    let (memory, hosts) = (stream(&guest(1, 2000)), Hosts::new());
    let sender = ["--with-disk", text(&from), "--state-dir", text(&state_a)];
    let receiver = ["--with-disk", text(&to), "--state-dir", text(&state_b)];
    let end = hosts.migrate("web", &memory, &sender, &receiver, || ());
    assert!(!end.moved && end.got.is_empty());
    for out in [&end.sent, &end.received] {
        let said = said(out);
        assert!(!out.status.success() && said.contains("web.qcow2") && said.contains("free some space"), "{said}");
    }
    assert_eq!(std::fs::read_dir(&small.0).unwrap().count(), 1, "half a disk is left");

    // What cannot be kept does not hold the VM up.
    let end = hosts.migrate("web", &memory, &["--store", text(&store)], &[], || ());
    end.ok(&memory);
    assert!(
        said(&end.sent).contains("is not kept") && said(&end.sent).contains("free some space"),
        "{}",
        said(&end.sent)
    );
    let list = ok(&["--json", "kept", "list", "--store", text(&store)]);
    assert!(list.contains("\"images\": []"), "{list}");
}
