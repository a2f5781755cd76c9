//! qcow2 and VMDK become sparse raws in the library, byte for byte the disks that they hold.

use super::support::{Place, image_of, named, noise, one_line, qemu_img};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A disk with data, holes and an end that is no multiple of 4 KiB.
fn disk(place: &Place) -> (PathBuf, Vec<u8>) {
    let mut bytes = image_of(&[9, 10, 0, 0, 11], None);
    bytes.resize(5 << 20, 0);
    bytes.extend_from_slice(&noise(5, 100 << 10));
    bytes.resize(9 << 20, 0);
    bytes.extend_from_slice(&noise(6, 512));
    (place.raw("disk.raw", &bytes, |_| false), bytes)
}

fn converted(place: &Place, raw: &Path, name: &str, args: &[&str]) -> PathBuf {
    let out = place.path(name);
    let mut all: Vec<&OsStr> = ["convert", "-f", "raw"].iter().map(OsStr::new).collect();
    all.extend(args.iter().map(OsStr::new));
    all.extend([raw.as_os_str(), out.as_os_str()]);
    qemu_img(&all);
    out
}

#[test]
fn every_flavour_equals_the_raw_disk() {
    let place = Place::new();
    let (raw, bytes) = disk(&place);
    place.add(&[("raw", &raw)]).unwrap();
    let digest = place.library().image("raw").unwrap().digest;
    for (name, format, args) in [
        ("q3", "qcow2", &["-O", "qcow2"][..]),
        ("q2", "qcow2", &["-O", "qcow2", "-o", "compat=0.10"]),
        ("qz", "qcow2", &["-O", "qcow2", "-c"]),
        ("q512", "qcow2", &["-O", "qcow2", "-o", "cluster_size=512"]),
        ("vsparse", "vmdk", &["-O", "vmdk"]),
        ("vstream", "vmdk", &["-O", "vmdk", "-o", "subformat=streamOptimized"]),
        ("vflat", "vmdk", &["-O", "vmdk", "-o", "subformat=monolithicFlat"]),
        ("vsplit", "vmdk", &["-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"]),
    ] {
        let source = converted(&place, &raw, &format!("{name}.img"), args);
        place.ok(&["image", "add", &named(name, &source)]);
        let library = place.library();
        let record = library.image(name).unwrap();
        assert!(record.owned(), "{name}");
        assert_eq!(record.source.as_ref().unwrap().format.to_string(), format);
        assert_eq!(record.digest, digest, "{name}");
        let path = library.image_path(record);
        assert!(path.starts_with(place.lib()));
        assert_eq!(fs::read(&path).unwrap(), bytes, "{name}");
        assert!(fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20, "{name} is sparse");
        // The source is not needed any more.
        fs::remove_file(&source).unwrap();
        place.ok(&["image", "verify", name]);
    }
    place.assert_no_leftovers();
    let stats: serde_json::Value = serde_json::from_str(&place.ok(&["stats", "--json"])).unwrap();
    assert_eq!(stats["clusters"], 1, "all are the same disk");
}

#[test]
fn an_image_on_top_of_another_is_refused() {
    let place = Place::new();
    let (raw, _) = disk(&place);
    let top = place.path("top.qcow2");
    let args = ["create", "-f", "qcow2", "-F", "raw", "-b"].map(OsStr::new);
    qemu_img(&[&args[..], &[raw.as_os_str(), top.as_os_str()]].concat());
    let before = place.snapshot();
    let line = place.fails(1, &["image", "add", &named("top", &top)]);
    assert!(line.contains("backing file") && line.contains("flatten"), "{line}");

    let data = place.path("data.raw");
    let option = format!("data_file={},data_file_raw=on", data.display());
    let outside = converted(&place, &raw, "outside.qcow2", &["-O", "qcow2", "-o", &option]);
    let line = place.fails(1, &["image", "add", &named("outside", &outside)]);
    assert!(line.contains("another file"), "{line}");
    assert_eq!(place.snapshot(), before);
}

#[test]
fn a_broken_image_is_refused_with_what_the_tool_says() {
    let place = Place::new();
    let (raw, _) = disk(&place);
    let qcow2 = converted(&place, &raw, "d.qcow2", &["-O", "qcow2"]);
    let mut bytes = fs::read(&qcow2).unwrap();
    // The table of the L1 entries points behind the end of the file.
    bytes[40..48].fill(0x7f);
    fs::write(&qcow2, bytes).unwrap();
    let before = place.snapshot();
    let line = place.fails(1, &["image", "add", &named("d", &qcow2)]);
    assert!(line.contains("qemu-img") && line.contains("d.qcow2"), "{line}");
    assert_eq!(place.snapshot(), before);
}

/// The converter reads zeros behind the end of a file, and zeros in place of data must not get into a library.
#[test]
fn an_image_that_was_cut_off_is_refused() {
    let place = Place::new();
    let (raw, _) = disk(&place);
    let before = place.snapshot();
    for (name, args, cut) in [
        ("c.qcow2", &["-O", "qcow2"][..], "c.qcow2"),
        ("z.qcow2", &["-O", "qcow2", "-c"], "z.qcow2"),
        ("sparse.vmdk", &["-O", "vmdk"], "sparse.vmdk"),
        ("split.vmdk", &["-O", "vmdk", "-o", "subformat=twoGbMaxExtentSparse"], "split-s001.vmdk"),
        ("flat.vmdk", &["-O", "vmdk", "-o", "subformat=monolithicFlat"], "flat-flat.vmdk"),
        ("flats.vmdk", &["-O", "vmdk", "-o", "subformat=twoGbMaxExtentFlat"], "flats-f001.vmdk"),
    ] {
        let source = converted(&place, &raw, name, args);
        let cut = place.path(cut);
        let len = fs::metadata(&cut).unwrap().len();
        fs::File::options().write(true).open(&cut).unwrap().set_len(len - (70 << 10)).unwrap();
        let line = place.fails(1, &["image", "add", &named("d", &source)]);
        assert!(line.contains("cut off") && line.contains(name) && line.contains("fetch it again"), "{line}");
        assert_eq!(place.snapshot(), before);
    }
}

#[test]
fn an_encrypted_image_is_refused() {
    let place = Place::new();
    let file = place.path("secret.qcow2");
    let args = "create -q -f qcow2 --object secret,id=s,data=abc -o encrypt.format=luks,encrypt.key-secret=s";
    let args: Vec<&OsStr> = args.split(' ').map(OsStr::new).chain([file.as_os_str(), OsStr::new("1M")]).collect();
    // qemu-img tunes the key derivation by the CPU time it gets, and gives up where that is too uneven to tell: a busy
    // machine, and no fault of anybody's.
    let made = (0..50).any(|_| {
        let output = std::process::Command::new("qemu-img").args(&args).output().expect("qemu-img is missing");
        let why = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() || why.contains("accurate CPU usage"), "{why}");
        output.status.success()
    });
    assert!(made, "qemu-img makes no encrypted image here");
    assert!(place.fails(1, &["image", "add", &named("s", &file)]).contains("encrypted"));
}

#[test]
fn a_missing_converter_is_named() {
    let place = Place::new();
    let (raw, _) = disk(&place);
    let qcow2 = converted(&place, &raw, "d.qcow2", &["-O", "qcow2"]);
    let output = place.vmar().args(["image", "add", &named("d", &qcow2)]).env("PATH", "/nonexistent").output().unwrap();
    assert!(one_line(output, 1).contains("apt install qemu-utils"));
    place.assert_no_leftovers();
    // Raw images need no tool.
    let output = place.vmar().args(["image", "add", &named("r", &raw)]).env("PATH", "/nonexistent").output().unwrap();
    assert!(output.status.success());
}

#[test]
fn a_users_own_file_in_the_library_is_never_overwritten() {
    let place = Place::new();
    let (raw, _) = disk(&place);
    let qcow2 = converted(&place, &raw, "d.qcow2", &["-O", "qcow2"]);
    let mine = place.lib().join("images/d.0.raw");
    fs::write(&mine, "mine").unwrap();
    let line = place.fails(1, &["image", "add", &named("d", &qcow2)]);
    assert!(line.contains("in the way"), "{line}");
    assert_eq!(fs::read_to_string(&mine).unwrap(), "mine");
    // A raw image of the same name does not need that place.
    place.ok(&["image", "add", &named("d", &raw)]);
    assert_eq!(fs::read_to_string(&mine).unwrap(), "mine");
}
