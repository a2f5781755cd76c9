//! A disk that fills up while an image is added: a clear line, and nothing half-written.

use super::support::{Place, named, noise, qemu_img};
use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use vmar::fingerprint::Algorithm;
use vmar::library::{Library, Policy};

/// A mounted file system that is unmounted whatever happens.
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

/// A library on a tmpfs of `size`. `None` without the right to mount.
fn small_library(dir: &Path, size: &str) -> Option<(Mount, PathBuf)> {
    let at = dir.join("small");
    std::fs::create_dir(&at).unwrap();
    let status = Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(&at).status();
    if !status.is_ok_and(|s| s.success()) {
        return None;
    }
    let mount = Mount(at.clone());
    let lib = at.join("lib");
    Library::init(&lib, Policy::Paper, Algorithm::Sha1).unwrap();
    Some((mount, lib))
}

/// Adds with the binary to a library that has no room, by a small disk or (without root) by a limit on file sizes.
fn add_without_room(place: &Place, image: &Path) {
    let small = small_library(place.dir(), "512k");
    let lib = small.as_ref().map_or_else(|| place.lib(), |(_, lib)| lib.clone());
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmar"));
    command.arg("--library").arg(&lib).args(["image", "add", &named("big", image)]);
    if small.is_none() {
        // SAFETY: two plain system calls between fork and exec.
        unsafe {
            command.pre_exec(|| {
                let limit = libc::rlimit { rlim_cur: 512 << 10, rlim_max: 512 << 10 };
                libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
                libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
                Ok(())
            });
        }
    }
    let line = super::support::one_line(command.output().unwrap(), 1);
    if small.is_some() {
        assert!(line.contains("free some space"), "{line}");
    } else {
        assert!(line.contains("File too large"), "{line}");
    }
    assert!(Library::open(&lib).unwrap().images().is_empty());
    for sub in ["runs", "maps", "images", "staging"] {
        assert_eq!(std::fs::read_dir(lib.join(sub)).unwrap().count(), 0, "{sub} is empty");
    }
    // The library is not hurt: with less to write, an image goes in.
    let tiny = place.raw("tiny", &noise(9, 8192), |_| false);
    let status = Command::new(env!("CARGO_BIN_EXE_vmar"))
        .arg("--library")
        .arg(&lib)
        .args(["image", "add", &named("tiny", &tiny)])
        .status();
    assert!(status.unwrap().success());
}

#[test]
fn while_the_fingerprints_are_written() {
    let place = Place::new();
    // 40,000 blocks: 900 KiB of fingerprints.
    let image = place.raw("big.raw", &noise(1, 160 << 20), |_| false);
    add_without_room(&place, &image);
}

#[test]
fn while_an_image_is_converted() {
    let place = Place::new();
    let raw = place.raw("big.raw", &noise(1, 8 << 20), |_| false);
    let qcow2 = place.path("big.qcow2");
    let args = ["convert", "-f", "raw", "-O", "qcow2"].map(OsStr::new);
    qemu_img(&[&args[..], &[raw.as_os_str(), qcow2.as_os_str()]].concat());
    add_without_room(&place, &qcow2);
}
