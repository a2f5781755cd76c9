//! Image locks: vmar and the real QEMU keep each other from what would break a disk, and from nothing else.

use crate::common::*;
use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use vmar::ErrorKind;
use vmar::fingerprint::Algorithm;
use vmar::library::{Library, Policy};
use vmar::overlay;
use vmar::redirect::Base;

/// Runs a QEMU tool that must fail because of a lock.
fn locked_out(command: &[&str]) {
    let out = Command::new(command[0]).args(&command[1..]).output().unwrap();
    let text = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
    assert!(text.contains("lock"), "{command:?}: {text}");
}

/// `qemu-io` that has an image open until it is dropped.
struct QemuIo(Child);

impl QemuIo {
    fn open(options: &[&str], path: &Path) -> QemuIo {
        let mut command = Command::new("qemu-io");
        command.args(options).args(["-f", "qcow2"]).arg(path).stdin(Stdio::piped()).stdout(Stdio::null());
        QemuIo(command.spawn().unwrap())
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        if let Some(mut stdin) = self.0.stdin.take() {
            let _ = stdin.write_all(b"quit\n");
        }
        self.0.wait().unwrap();
    }
}

fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn while_vmar_writes_qemu_may_only_look() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 0, &[1; 4096]);
    o.flush().unwrap();
    let file = path_str(&fx.overlay);
    let before = fs::read(&fx.overlay).unwrap();
    locked_out(&["qemu-io", "-f", "qcow2", "-c", "write -P 9 0 4k", file]);
    locked_out(&["qemu-img", "commit", "-f", "qcow2", file]);
    locked_out(&["qemu-img", "resize", "-f", "qcow2", file, "8M"]);
    locked_out(&["qemu-img", "check", "-f", "qcow2", file]);
    locked_out(&["qemu-img", "info", file]);
    for look in [&["check"][..], &["info"], &["map"]] {
        qemu(&[&["qemu-img"], look, &["-U", file]].concat());
    }
    assert!(convert(&fx)[..4096] == [1; 4096]);
    assert_eq!(overlay::check(&fx.overlay).unwrap(), Vec::<String>::new());
    assert!(overlay::inspect(&fx.overlay, &fx.state_dir()).unwrap().in_use);
    assert!(fs::read(&fx.overlay).unwrap() == before);
    write(&o, &fx, 4096, &[2; 4096]);
    o.close().unwrap();
    drop(o);
    qemu_check(&fx.overlay);
    qemu_io(&fx, &["write -P 9 0 4k"]);
}

#[test]
fn while_vmar_reads_qemu_may_read() {
    let fx = Fixture::new();
    let o = fx.open_read_only().unwrap();
    let file = path_str(&fx.overlay);
    locked_out(&["qemu-io", "-f", "qcow2", "-c", "write -P 9 0 4k", file]);
    qemu(&["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 4k", file]);
    qemu(&["qemu-img", "check", "-f", "qcow2", file]);
    assert!(read_all(&o, &fx) == fx.base);
}

#[test]
fn while_qemu_has_it_vmar_waits_and_then_says_so() {
    let fx = Fixture::new();
    let in_use = || overlay::inspect(&fx.overlay, &fx.state_dir()).unwrap().in_use;
    let writer = QemuIo::open(&[], &fx.overlay);
    wait_for("qemu-io opens it", in_use);
    std::thread::scope(|s| {
        for read_only in [false, true] {
            let fx = &fx;
            s.spawn(move || {
                let err = fx.open_with(&fx.overlay, read_only, false).unwrap_err();
                assert_eq!(err.kind(), ErrorKind::Busy);
                assert!(err.to_string().contains("in use by another process (vmar or QEMU)"), "{err}");
            });
        }
    });
    assert!(fx.live_files().is_empty());
    drop(writer);
    wait_for("qemu-io lets go", || !in_use());
    let reader = QemuIo::open(&["-r"], &fx.overlay);
    wait_for("qemu-io opens it", in_use);
    assert!(read_all(&fx.open_read_only().unwrap(), &fx) == fx.base);
    // One that only peeks is in nobody's way.
    drop(reader);
    wait_for("qemu-io lets go", || !in_use());
    let _peek = QemuIo::open(&["-r", "-U"], &fx.overlay);
    wait_for("qemu-io opens it", in_use);
    fx.open().close().unwrap();
}

#[test]
fn a_base_that_is_served_cannot_be_written_and_can_be_shared() {
    let fx = Fixture::new();
    let dir = fx.dir.path().join("lib");
    Library::init(&dir, Policy::Paper, Algorithm::Sha1).unwrap();
    let other = fx.dir.path().join("other.raw");
    // Half of it is the same as the base, so that its map reaches both files.
    let mut bytes = fx.base.clone();
    bytes[..2 << 20].fill(0x5a);
    fs::write(&other, &bytes).unwrap();
    for spec in [format!("web={}", path_str(&fx.base_path)), format!("db={}", path_str(&other))] {
        let out = Command::new(env!("CARGO_BIN_EXE_vmar"))
            .args(["--library", path_str(&dir), "image", "add", &spec])
            .output();
        assert!(out.unwrap().status.success());
    }
    let library = Library::open(&dir).unwrap();
    let writable = || fs::set_permissions(&fx.base_path, fs::Permissions::from_mode(0o644)).unwrap();
    writable();
    let qcow2 = |name: &str| {
        let path = fx.dir.path().join(name);
        let base = path_str(&fx.base_path);
        qemu(&["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", path_str(&path)]);
        qemu(&["qemu-io", "-f", "qcow2", "-c", "write -P 3 3m 4k", path_str(&path)]);
        path
    };
    // Served as db: web's file is reached through the map alone.
    let db = Base::open(&library, "db").unwrap();
    let (plain, committed) = (qcow2("plain.qcow2"), qcow2("committed.qcow2"));
    locked_out(&["qemu-img", "commit", "-q", "-f", "qcow2", path_str(&committed)]);
    locked_out(&["qemu-io", "-f", "raw", "-c", "write 0 4k", path_str(&fx.base_path)]);
    assert!(fs::read(&fx.base_path).unwrap() == fx.base);
    // A second vmar, and plain QEMU with an overlay of its own, go on beside it.
    let web = Base::open(&library, "web").unwrap();
    qemu(&["qemu-io", "-f", "qcow2", "-c", "write -P 4 0 4k", "-c", "read -P 3 3m 4k", path_str(&plain)]);
    qemu(&["qemu-img", "convert", "-O", "raw", path_str(&fx.base_path), path_str(&fx.dir.path().join("copy"))]);
    drop(db);
    locked_out(&["qemu-img", "commit", "-q", "-f", "qcow2", path_str(&committed)]);
    drop(web);
    // And while somebody writes the base, it is not served.
    let mut writer = Command::new("qemu-io");
    writer.args(["-f", "raw"]).arg(&fx.base_path).stdin(Stdio::piped()).stdout(Stdio::null());
    let writer = QemuIo(writer.spawn().unwrap());
    wait_for("a base that is being written is refused", || {
        Base::open(&library, "db")
            .is_err_and(|e| e.kind() == ErrorKind::Busy && e.to_string().contains("base.raw: is in use"))
    });
    drop(writer);
    Base::open(&library, "db").unwrap();
    qemu(&["qemu-img", "commit", "-q", "-f", "qcow2", path_str(&committed)]);
    assert!(fs::read(&fx.base_path).unwrap()[3 << 20..][..4096] == [3; 4096], "free again");
}
