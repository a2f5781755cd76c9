//! `vmar image verify`: a part of an image, at a rate, and on after a kill.

use super::support::{BLOCK, Place, image_of, noise, one_line};
use serde_json::Value;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;

/// An image of so many MiB of noise, and one that shares all but its first MiB.
fn place(mib: usize) -> (Place, PathBuf) {
    let place = Place::new();
    let bytes = noise(3, mib * MIB);
    let base = place.raw("base", &bytes, |_| true);
    let other = place.raw("other", &[noise(4, MIB), bytes[MIB..].to_vec()].concat(), |_| true);
    place.add(&[("base", &base), ("other", &other)]).unwrap();
    (place, base)
}

fn writable(path: &Path) -> File {
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    File::options().write(true).open(path).unwrap()
}

/// Writes into an image and leaves its modification time as it was.
fn damage(path: &Path, offset: u64, bytes: &[u8]) {
    let time = fs::metadata(path).unwrap().modified().unwrap();
    let file = writable(path);
    file.write_all_at(bytes, offset).unwrap();
    file.set_modified(time).unwrap();
}

fn json(place: &Place, args: &[&str]) -> Value {
    let args = [&["--json", "image", "verify"], args].concat();
    serde_json::from_str(&place.ok(&args)).unwrap()
}

fn state(place: &Place, name: &str) -> PathBuf {
    place.lib().join("verify").join(name)
}

#[test]
fn a_sample_looks_at_its_share_and_the_seed_repeats_it() {
    let (place, base) = place(20);
    let line = &json(&place, &["base", "--sample", "1/4"])[0];
    assert_eq!((&line["chunks"], &line["verified_chunks"]), (&20.into(), &5.into()));
    assert_eq!(line["data_bytes"], 5 * MIB);
    assert!(line["seed"].is_u64());

    // Damage in one of 20 MiB is found by a quarter of the seeds, and always by the same ones.
    damage(&base, 7 * MIB as u64 + 5, b"x");
    let finds = |seed: u64| {
        !place.run(&["image", "verify", "base", "--sample", "25%", "--seed", &seed.to_string()]).status.success()
    };
    let first: Vec<bool> = (0..24).map(finds).collect();
    assert_eq!(first, (0..24).map(finds).collect::<Vec<_>>());
    let found = first.iter().filter(|f| **f).count();
    assert!((1..16).contains(&found), "{found} of 24");
    let seed = first.iter().position(|f| *f).unwrap();
    let line = place.fails(1, &["image", "verify", "base", "--sample", "25%", "--seed", &seed.to_string()]);
    assert!(line.contains(&format!("block {} of image base is not what was added", 7 * 256)), "{line}");
}

#[test]
fn a_sample_does_not_accept_a_new_modification_time() {
    let (place, base) = place(2);
    writable(&base).set_modified(std::time::SystemTime::now()).unwrap();
    assert!(!place.ok(&["image", "verify", "base", "--sample", "100%", "--seed", "1"]).contains("accepted"));
    assert!(place.ok(&["image", "verify", "base"]).contains("accepted"));
}

#[test]
fn redirects_inside_the_sample_are_compared() {
    let (place, base) = place(4);
    let all = &json(&place, &["other", "--sample", "1/4", "--seed", "0"]);
    assert!(all[0]["redirects"].as_u64().unwrap() <= 256);
    // The base is bad, and a sample of the other image must notice by what it reads from there.
    damage(&base, 2 * MIB as u64, b"x");
    let line = place.fails(1, &["image", "verify", "other", "--sample", "100%"]);
    assert!(line.contains("block 512 of image other is read from block 512 of image base"), "{line}");
}

#[test]
fn the_rate_is_kept() {
    let (place, _) = place(6);
    let timed = |args: &[&str]| {
        let began = Instant::now();
        place.ok(&[&["image", "verify", "base"], args].concat());
        began.elapsed()
    };
    let free = timed(&[]);
    let slow = timed(&["--rate-limit", "3M"]);
    let slower = timed(&["--rate-limit", "1536K"]);
    // 6 MiB take 2 s and 4 s, less the burst and one piece that each of two workers begins.
    assert!(slow >= Duration::from_millis(900) && slower >= Duration::from_millis(2200), "{slow:?} {slower:?}");
    assert!(slower > slow.mul_f64(1.3), "{slow:?} {slower:?}");
    assert!(free < slower, "{free:?} {slower:?}");
}

/// Starts a verification, kills it when it has some chunks, and returns how many it had.
fn killed(place: &Place, name: &str, chunks: u64) -> u64 {
    let mut child = place
        .vmar()
        .args(["image", "verify", name, "--resume", "--rate-limit", "4M"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let done = || fs::metadata(state(place, name)).map_or(0, |m| m.len().saturating_sub(40) / 48);
    let began = Instant::now();
    while done() < chunks {
        assert!(began.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none(), "it went too far");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    done()
}

#[test]
fn a_killed_verification_goes_on_where_it_was() {
    let (place, _) = place(16);
    let done = killed(&place, "base", 3);
    let line = &json(&place, &["base", "--resume"])[0];
    assert_eq!(line["data_bytes"], (16 - done) * MIB as u64);
    assert_eq!(line["resumed_bytes"], done * MIB as u64);
    assert!(!state(&place, "base").exists(), "removed when it has ended");
    assert_eq!(json(&place, &["base", "--resume"])[0]["resumed_bytes"], 0);
    place.assert_no_leftovers();
}

#[test]
fn what_was_found_before_the_kill_is_not_forgotten() {
    let (place, base) = place(16);
    for block in [0u64, 1] {
        damage(&base, block * BLOCK as u64, b"x");
    }
    killed(&place, "base", 6);
    let line = place.fails(1, &["image", "verify", "base", "--resume"]);
    assert!(line.contains("block 0 of image base is not what was added (the first of 2)"), "{line}");
    assert!(!state(&place, "base").exists());
}

#[test]
fn redirects_are_resumed_too_and_a_stop_says_how() {
    let (place, _) = place(24);
    let mut child = place
        .vmar()
        .args(["image", "verify", "other", "--resume", "--rate-limit", "10M"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // All chunks, and some redirects.
    let began = Instant::now();
    while fs::metadata(state(&place, "other")).map_or(0, |m| m.len()) < 40 + 48 * (24 + 3) {
        assert!(began.elapsed() < Duration::from_secs(60) && child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(2));
    }
    // SAFETY: kill has no memory effects here.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGTERM) }, 0);
    let line = one_line(child.wait_with_output().unwrap(), 1);
    assert!(line.contains("--resume goes on from here"), "{line}");
    let output = place.run(&["image", "verify", "other", "--resume"]);
    let text = String::from_utf8_lossy(&output.stderr).to_string();
    assert!(output.status.success(), "{text}");
    // 23 MiB of redirects; the rest of them is told as progress.
    let said = text.lines().find(|l| l.starts_with("comparing other")).unwrap();
    assert!(!said.contains("of 23.0 MiB"), "{said}");
}

#[test]
fn progress_of_another_file_does_not_count() {
    let (place, base) = place(8);
    killed(&place, "base", 3);
    // Other bytes in a chunk that may have been looked at, and another time.
    writable(&base).write_all_at(b"x", 0).unwrap();
    writable(&base).write_all_at(b"x", 7 * MIB as u64).unwrap();
    let line = place.fails(1, &["image", "verify", "base", "--resume"]);
    assert!(line.contains("block 0 of image base is not what was added (the first of 2)"), "{line}");
    assert!(!state(&place, "base").exists());
}

#[test]
fn progress_of_images_that_are_gone_is_removed() {
    let (place, _) = place(1);
    fs::create_dir(place.lib().join("verify")).unwrap();
    fs::write(state(&place, "gone"), "VMARVFY1").unwrap();
    place.ok(&["image", "verify", "--resume"]);
    assert_eq!(fs::read_dir(place.lib().join("verify")).unwrap().count(), 0);
}

#[test]
fn two_at_once_are_refused_and_what_makes_no_sense_too() {
    let (place, _) = place(4);
    let mut first = place
        .vmar()
        .args(["image", "verify", "base", "--resume", "--rate-limit", "1M"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let began = Instant::now();
    // Its head is written under the lock.
    while fs::metadata(state(&place, "base")).map_or(0, |m| m.len()) < 40 {
        assert!(began.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(2));
    }
    let line = place.fails(1, &["image", "verify", "base", "--resume"]);
    assert!(line.contains("is being verified already"), "{line}");
    first.kill().unwrap();
    first.wait().unwrap();
    place.fails(2, &["image", "verify", "base", "--resume", "--sample", "1/2"]);
    place.fails(2, &["image", "verify", "base", "--sample", "0%"]);
    place.fails(2, &["image", "verify", "base", "--rate-limit", "0"]);
    place.fails(2, &["image", "verify", "base", "--seed", "1"]);
}

/// A verification without options leaves nothing behind and takes nothing into account.
#[test]
fn without_resume_nothing_is_kept() {
    let place = Place::new();
    let base = place.raw("base", &image_of(&[9, 10, 11], None), |_| false);
    place.add(&[("base", &base)]).unwrap();
    let before = place.snapshot();
    place.ok(&["image", "verify"]);
    assert_eq!(place.snapshot(), before);
    assert!(!place.lib().join("verify").exists());
}
