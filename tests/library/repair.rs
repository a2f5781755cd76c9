//! `vmar image repair`: bad blocks become good again, byte for byte, and nothing else changes, whatever happens.

use super::support::{BLOCK, Place, content, image_of, named, noise, one_line, qemu_img};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

/// Writes into an image and, as a disk that forgets would, leaves mode and modification time as they were.
fn damage(path: &Path, offset: u64, bytes: &[u8]) {
    let meta = fs::metadata(path).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
    file.set_modified(meta.modified().unwrap()).unwrap();
    fs::set_permissions(path, meta.permissions()).unwrap();
}

fn at(block: u64) -> u64 {
    block * BLOCK as u64
}

/// Two images that share contents 10 to 12 and a collision (1 and 2 have one SHA-1); and zeros, and a partial last block.
fn place() -> (Place, PathBuf, PathBuf) {
    let place = Place::new();
    let a = place.raw("a", &image_of(&[9, 10, 11, 12, 1, 0, 2, 10], Some((13, 1024))), |_| true);
    let b = place.raw("b", &image_of(&[12, 2, 11, 10, 1, 0], Some((13, 1024))), |_| true);
    place.add(&[("a", &a), ("b", &b)]).unwrap();
    (place, a, b)
}

const IN_PLACE: [&str; 4] = ["image", "repair", "a", "--in-place"];

#[test]
fn every_kind_of_block_is_mended_byte_for_byte() {
    let (place, a, b) = place();
    let (good, sibling) = (fs::read(&a).unwrap(), fs::read(&b).unwrap());
    let inode = fs::metadata(&a).unwrap().ino();
    // One byte; a whole block; zeros; the partial last one; and one that is zero now, whose hash another content has too.
    damage(&a, at(1) + 77, b"x");
    damage(&a, at(3), &noise(5, BLOCK));
    damage(&a, at(5) + 4095, b"x");
    damage(&a, at(6), &[0; BLOCK]);
    damage(&a, at(8) + 1023, b"x");
    place.fails(1, &["image", "verify", "a"]);
    let text = place.ok(&IN_PLACE);
    assert!(
        text.contains("a: block 3 was mended from block 0 of b") && text.contains("block 5 was mended: zeros"),
        "{text}"
    );
    // Content 10 is in block 7 of the image itself.
    assert!(text.contains("block 1 was mended from block 7 of a"), "{text}");
    assert!(text.ends_with("a: good: every byte is what was added\n"), "{text}");
    assert!(fs::read(&a).unwrap() == good && fs::read(&b).unwrap() == sibling);
    let after = fs::metadata(&a).unwrap();
    assert_eq!((after.ino(), after.permissions().mode() & 0o222), (inode, 0), "the same file, read-only as before");
    // The catalog has the new modification time: nothing is left to accept.
    assert!(!place.ok(&["image", "verify"]).contains("accepted"));
    place.assert_no_leftovers();
}

/// Contents 1 and 2 have one SHA-1, so a block that changed from one to the other looks right by its hash. Only the digest
/// of the whole image tells, and no repair may claim that the image is good.
#[test]
fn a_collision_is_never_taken_for_good() {
    let (place, a, _) = place();
    damage(&a, at(4), &content(2));
    let line = place.fails(1, &["image", "verify", "a"]);
    assert!(line.contains("yet no fingerprint differs"), "{line}");
    let line = place.fails(1, &IN_PLACE);
    assert!(line.contains("yet no fingerprint differs"), "{line}");
    damage(&a, at(3), b"x");
    let before = fs::read(&a).unwrap();
    let output = place.run(&["--json", "image", "repair", "a", "--in-place"]);
    let out: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&out["good"], &out["blocks"][0]["block"]), (&false.into(), &3.into()));
    let line = one_line(output, 1);
    assert!(line.contains("yet the image is not what was added"), "{line}");
    let mut want = before;
    want[3 * BLOCK..4 * BLOCK].copy_from_slice(&content(12));
    assert!(fs::read(&a).unwrap() == want);
}

#[test]
fn a_file_of_others_is_only_written_to_with_leave() {
    let (place, a, _) = place();
    damage(&a, at(1), b"x");
    let bad = fs::read(&a).unwrap();
    let line = place.fails(2, &["image", "repair", "a"]);
    assert!(line.contains("vmar did not make this file") && line.contains("--in-place"), "{line}");
    let library = place.snapshot();
    let text = place.ok(&["image", "repair", "a", "--dry-run"]);
    assert!(text.contains("block 1 can be mended from"), "{text}");
    assert!(fs::read(&a).unwrap() == bad && place.snapshot() == library, "nothing changed");
}

#[test]
fn an_image_that_vmar_made_needs_no_leave() {
    let place = Place::new();
    let raw = place.raw("raw", &image_of(&[9, 10, 11], None), |_| false);
    let qcow2 = place.path("q.qcow2");
    let args = ["convert", "-f", "raw", "-O", "qcow2"].map(OsStr::new);
    qemu_img(&[&args[..], &[raw.as_os_str(), qcow2.as_os_str()]].concat());
    place.ok(&["image", "add", &named("q", &qcow2), &named("raw", &raw)]);
    let own = place.library().image_path(place.library().image("q").unwrap());
    let good = fs::read(&own).unwrap();
    damage(&own, at(2), b"x");
    place.ok(&["image", "repair", "q"]);
    assert!(fs::read(&own).unwrap() == good);
    assert_eq!(fs::metadata(&own).unwrap().permissions().mode() & 0o222, 0, "read-only as before");
    place.ok(&["image", "verify"]);
}

#[test]
fn what_nobody_else_holds_stays_bad_and_is_named() {
    let (place, a, _) = place();
    // Content 9 is in this image alone.
    damage(&a, at(0), b"x");
    damage(&a, at(2), b"x");
    let time = fs::metadata(&a).unwrap().modified().unwrap();
    let bad = fs::read(&a).unwrap();
    let text = place.ok(&["image", "repair", "a", "--dry-run"]);
    assert!(text.contains("block 0 is bad, and no other block has its content"), "{text}");
    let line = place.fails(1, &IN_PLACE);
    assert!(line.contains("1 of 2 bad blocks are not mended") && line.contains("the first is block 0"), "{line}");
    assert!(line.contains("copy the 4096 bytes at 0 (and so on) from a backup"), "{line}");
    let mut want = bad;
    want[2 * BLOCK..3 * BLOCK].copy_from_slice(&content(11));
    assert!(fs::read(&a).unwrap() == want, "the other one was mended, and no byte besides");
    assert_eq!(fs::metadata(&a).unwrap().modified().unwrap(), time, "it serves as before");
    // What helps: the block from a backup.
    damage(&a, at(0), &content(9));
    place.ok(&["image", "verify", "a"]);
}

#[test]
fn a_bad_sibling_is_no_cure_but_the_next_one_is() {
    let place = Place::new();
    let files = ["a", "b", "c"].map(|n| place.raw(n, &image_of(&[20, 21, 22], None), |_| false));
    let images: Vec<(&str, &Path)> = ["a", "b", "c"].into_iter().zip(files.iter().map(PathBuf::as_path)).collect();
    place.add(&images).unwrap();
    let good = fs::read(&files[0]).unwrap();
    damage(&files[0], at(1), b"xyz");
    damage(&files[1], at(1), b"xyz");
    fs::remove_file(&files[1]).unwrap();
    let text = place.ok(&IN_PLACE);
    assert!(text.contains("block 1 was mended from block 1 of c"), "{text}");
    assert!(fs::read(&files[0]).unwrap() == good);

    damage(&files[0], at(1), b"xyz");
    damage(&files[2], at(1), b"xyz");
    let bad = fs::read(&files[0]).unwrap();
    place.fails(1, &IN_PLACE);
    assert!(fs::read(&files[0]).unwrap() == bad);
}

#[test]
fn a_single_block_is_mended_alone() {
    let (place, a, _) = place();
    damage(&a, at(1), b"x");
    damage(&a, at(2), b"x");
    let mut want = fs::read(&a).unwrap();
    want[2 * BLOCK..3 * BLOCK].copy_from_slice(&content(11));
    let text = place.ok(&["image", "repair", "a", "--in-place", "--block", "2"]);
    assert_eq!(text, "a: block 2 was mended from block 2 of b\n");
    assert!(fs::read(&a).unwrap() == want);
    assert_eq!(place.ok(&["image", "repair", "a", "--in-place", "--block", "3"]), "a: block 3 is what was added\n");
    let text = place.ok(&["image", "repair", "a", "--in-place", "--block", "1"]);
    assert!(text.contains("good: every byte"), "{text}");
    let line = place.fails(2, &["image", "repair", "a", "--in-place", "--block", "9"]);
    assert!(line.contains("has no block 9") && line.contains("below 9"), "{line}");
}

#[test]
fn damaged_fingerprints_never_reach_an_image() {
    let (place, a, _) = place();
    damage(&a, at(1), b"x");
    let run = place.lib().join("runs/b.1.parquet");
    let mut bytes = fs::read(&run).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&run, bytes).unwrap();
    let bad = fs::read(&a).unwrap();
    let line = place.fails(1, &IN_PLACE);
    assert!(line.contains("runs/b.1.parquet") && line.contains("checksum"), "{line}");
    assert!(fs::read(&a).unwrap() == bad);
}

#[test]
fn who_uses_the_image_for_writing_is_in_the_way_and_readers_are_not() {
    use vmar::io::lock::{Access, try_lock};
    let (place, a, _) = place();
    damage(&a, at(1), b"x");
    let writer = File::open(&a).unwrap();
    fs::set_permissions(&a, fs::Permissions::from_mode(0o644)).unwrap();
    let both = File::options().read(true).write(true).open(&a).unwrap();
    assert!(try_lock(&both, Access::Write).unwrap());
    let line = place.fails(1, &IN_PLACE);
    assert!(line.contains("is in use by another process"), "{line}");
    drop(both);
    assert!(try_lock(&writer, Access::Read).unwrap());
    // A reader of the page cache sees the mended bytes at once, by the file that it has open.
    let mut seen = vec![0; BLOCK];
    writer.read_exact_at(&mut seen, at(1)).unwrap();
    assert!(seen != content(10));
    place.ok(&IN_PLACE);
    writer.read_exact_at(&mut seen, at(1)).unwrap();
    assert!(seen == content(10));
}

/// Kills the repair when it comes to byte `limit`: a file may not be written to behind it, and the signal that says so is
/// deadly. The same as `kill -9`, but for the moment, which is always the same.
fn killed_at(place: &Place, limit: u64) {
    use std::os::unix::process::CommandExt;
    let mut command = place.vmar();
    command.args(IN_PLACE).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: a plain system call between fork and exec.
    unsafe {
        command.pre_exec(move || {
            let limit = libc::rlimit { rlim_cur: limit, rlim_max: limit };
            libc::setrlimit(libc::RLIMIT_FSIZE, &limit);
            Ok(())
        });
    }
    let status = command.status().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(libc::SIGXFSZ), "{status}");
}

/// Killed anywhere: each block is bad as before or good, all other bytes are as they were, and the next repair ends it.
#[test]
fn a_kill_leaves_every_block_bad_or_good() {
    const BLOCKS: usize = 600;
    let place = Place::new();
    let good = noise(7, BLOCKS * BLOCK);
    let a = place.raw("a", &good, |_| true);
    let b = place.raw("b", &good, |_| true);
    place.add(&[("a", &a), ("b", &b)]).unwrap();
    let mut bad = good.clone();
    bad.chunks_mut(BLOCK).step_by(2).for_each(|block| block.fill(0xbd));
    let time = fs::metadata(&a).unwrap().modified().unwrap();
    fs::set_permissions(&a, fs::Permissions::from_mode(0o644)).unwrap();
    let restore = || {
        fs::write(&a, &bad).unwrap();
        File::options().write(true).open(&a).unwrap().set_modified(time).unwrap();
    };
    // Between two blocks: exactly those before are good.
    for cut in [2, 3, 300, 598] {
        restore();
        killed_at(&place, at(cut));
        let cut = cut as usize * BLOCK;
        assert!(fs::read(&a).unwrap() == [&good[..cut], &bad[cut..]].concat(), "cut at {cut}");
    }
    // At any time.
    for round in 0..8u64 {
        restore();
        let mut child = place.vmar().args(IN_PLACE).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(3 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let now = fs::read(&a).unwrap();
        assert_eq!(now.len(), good.len());
        for (block, ((now, good), bad)) in now.chunks(BLOCK).zip(good.chunks(BLOCK)).zip(bad.chunks(BLOCK)).enumerate()
        {
            assert!(now == good || now == bad, "block {block} in round {round}");
        }
    }
    place.ok(&IN_PLACE);
    assert!(fs::read(&a).unwrap() == good);
    assert!(!place.ok(&["image", "verify"]).contains("accepted"));
    // Killed behind its last write, a repair leaves nothing but another time.
    File::options().write(true).open(&a).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
    place.ok(&IN_PLACE);
    assert!(!place.ok(&["image", "verify"]).contains("accepted"));
    place.assert_no_leftovers();
}
