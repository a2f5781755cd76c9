//! Images that were changed behind the library's back.

use super::support::{Place, image_of, named, one_line, qemu_img, work};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};
use vmar::indexer::add::{NewImage, add};
use vmar::indexer::verify::verify;
use vmar::indexer::{Observer, Work};
use vmar::library::Writer;

/// A library with image `base` (contents 9 to 12), and a file that shares with it.
fn place() -> (Place, PathBuf, PathBuf) {
    let place = Place::new();
    let base = place.raw("base", &image_of(&[9, 10, 11, 12], None), |_| false);
    place.add(&[("base", &base)]).unwrap();
    let mut permissions = fs::metadata(&base).unwrap().permissions();
    assert_eq!(permissions.mode() & 0o222, 0, "an added image is read-only");
    permissions.set_mode(0o644);
    fs::set_permissions(&base, permissions).unwrap();
    let other = place.raw("other", &image_of(&[10, 11, 20], None), |_| false);
    (place, base, other)
}

fn mtime(path: &PathBuf) -> SystemTime {
    fs::metadata(path).unwrap().modified().unwrap()
}

fn set_mtime(path: &PathBuf, time: SystemTime) {
    File::options().write(true).open(path).unwrap().set_modified(time).unwrap();
}

fn refused(place: &Place, other: &Path) -> String {
    let before = place.snapshot();
    let line = place.fails(1, &["image", "add", &named("other", other)]);
    assert_eq!(place.snapshot(), before, "a refused add changes nothing");
    line
}

#[test]
fn a_touched_image_is_refused_until_verify_has_looked_at_it() {
    let (place, base, other) = place();
    set_mtime(&base, mtime(&base) + Duration::from_secs(5));
    let line = refused(&place, &other);
    assert!(line.contains("vmar image verify base") && line.contains("/base:"), "{line}");
    assert!(place.ok(&["image", "verify", "base"]).contains("accepted"));
    place.ok(&["image", "add", &named("other", &other)]);
    assert!(!place.ok(&["image", "verify"]).contains("accepted"));
}

#[test]
fn a_changed_image_is_refused_and_verify_names_the_first_bad_block() {
    let (place, base, other) = place();
    File::options().write(true).open(&base).unwrap().write_all_at(b"x", 2 * 4096 + 7).unwrap();
    assert!(refused(&place, &other).contains("vmar image verify base"));
    let line = place.fails(1, &["image", "verify", "base"]);
    assert!(line.contains("block 2 of image base is not what was added"), "{line}");
    let line = place.fails(1, &["image", "verify"]);
    assert!(line.contains("block 2"), "{line}");
}

#[test]
fn a_change_that_left_no_trace_is_found_by_the_comparison() {
    let (place, base, other) = place();
    let time = mtime(&base);
    File::options().write(true).open(&base).unwrap().write_all_at(b"x", 2 * 4096 + 7).unwrap();
    set_mtime(&base, time);
    let line = refused(&place, &other);
    assert!(line.contains("block 2 of image base is not what was fingerprinted"), "{line}");
}

/// While one image of a command is converted, somebody writes into another that was hashed already.
#[test]
fn an_image_that_is_written_to_during_the_add_is_refused() {
    let (place, _, other) = place();
    let qcow2 = place.path("q.qcow2");
    let args = ["convert", "-f", "raw", "-O", "qcow2"].map(OsStr::new);
    let unrelated = place.raw("unrelated", &image_of(&[40, 41], None), |_| false);
    qemu_img(&[&args[..], &[unrelated.as_os_str(), qcow2.as_os_str()]].concat());
    let path = place.fake_qemu_img(&format!("touch {}", other.display()));
    let before = place.snapshot();
    let mut command = place.vmar();
    command.args(["image", "add", &named("other", &other), &named("q", &qcow2)]).env("PATH", path);
    let line = one_line(command.output().unwrap(), 1);
    assert!(line.contains("image other was written to while it was being read"), "{line}");
    assert_eq!(place.snapshot(), before);
}

/// Time stamps are as coarse as a clock tick: bytes are read only when a further write would leave another one.
#[test]
fn a_file_is_read_when_its_modification_time_has_settled() {
    struct Watch(PathBuf, AtomicU64);
    impl Observer for Watch {
        fn begin(&self, what: &str, _: u64) {
            if what.starts_with("hashing") {
                let age = mtime(&self.0).elapsed().unwrap();
                self.1.store(u64::try_from(age.as_millis()).unwrap(), Ordering::Relaxed);
            }
        }
        fn advance(&self, _: u64) {}
        fn end(&self) {}
    }
    let (place, _, other) = place();
    let watch = Watch(other.clone(), AtomicU64::new(0));
    let work = Work { observer: &watch, ..work() };
    let mut writer = Writer::open(place.lib()).unwrap();
    set_mtime(&other, SystemTime::now());
    add(&mut writer, &[NewImage { name: "other".into(), file: other }], &work).unwrap();
    let age = watch.1.load(Ordering::Relaxed);
    assert!(age >= 20, "{age} ms");
    drop(writer);
    set_mtime(&watch.0, SystemTime::now());
    verify(&place.lib(), "other", &work).unwrap();
    let age = watch.1.load(Ordering::Relaxed);
    assert!(age >= 20, "{age} ms");
}

#[test]
fn a_vanished_or_truncated_image_is_refused() {
    let (place, base, other) = place();
    let bytes = fs::read(&base).unwrap();
    fs::write(&base, &bytes[..8192]).unwrap();
    let line = refused(&place, &other);
    assert!(line.contains("8192 bytes, but 16384"), "{line}");
    let line = place.fails(1, &["image", "verify", "base"]);
    assert!(line.contains("8192 bytes, but 16384"), "{line}");
    fs::remove_file(&base).unwrap();
    let line = refused(&place, &other);
    assert!(line.contains("image base has vanished"), "{line}");
}

#[test]
fn an_image_that_shares_nothing_with_a_vanished_one_is_added() {
    let (place, base, _) = place();
    fs::remove_file(&base).unwrap();
    let other = place.raw("z", &image_of(&[30, 31], None), |_| false);
    place.add(&[("z", &other)]).unwrap();
}

#[test]
fn verify_finds_a_redirect_whose_target_changed() {
    let (place, base, other) = place();
    place.add(&[("other", &other)]).unwrap();
    let time = mtime(&base);
    File::options().write(true).open(&base).unwrap().write_all_at(b"x", 4096).unwrap();
    set_mtime(&base, time);
    let line = place.fails(1, &["image", "verify", "other"]);
    assert!(line.contains("block 0 of image other is read from block 1 of image base"), "{line}");
    let output = place.run(&["image", "verify"]);
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("2 of 2 images are bad: base, other"), "{text}");
}

/// Every byte of a map and of a run is under a checksum; a damaged one is refused, never half believed.
#[test]
fn damaged_files_of_the_library_are_refused() {
    let (place, _, other) = place();
    for (file, commands) in [
        ("maps/base.map", &[&["stats"][..], &["image", "show", "base"], &["image", "verify", "base"]][..]),
        ("runs/base.0.parquet", &[&["stats"][..], &["image", "verify", "base"]]),
    ] {
        let path = place.lib().join(file);
        let good = fs::read(&path).unwrap();
        let cut = good[..good.len() - 1].to_vec();
        let mut flipped = good.clone();
        let middle = flipped.len() / 2;
        flipped[middle] ^= 4;
        for bad in [cut, flipped, Vec::new(), b"junk".to_vec()] {
            fs::write(&path, bad).unwrap();
            for command in commands {
                let line = place.fails(1, command);
                assert!(line.contains(file), "{line}");
            }
            if file.starts_with("runs") {
                assert!(refused(&place, &other).contains(file));
            }
        }
        fs::remove_file(&path).unwrap();
        assert!(place.fails(1, commands[0]).contains(file));
        fs::write(&path, good).unwrap();
    }
    // The map of one image in the place of another's.
    place.add(&[("other", &other)]).unwrap();
    fs::copy(place.lib().join("maps/other.map"), place.lib().join("maps/base.map")).unwrap();
    assert!(place.fails(1, &["image", "verify", "base"]).contains("another image"));
}
