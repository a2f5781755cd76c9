//! What is done to overlays while no VM runs: relayout, commit, resize, and taking over those of plain QEMU.

use crate::common::*;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use vmar::ErrorKind;
use vmar::overlay::{self, CreateOptions, OpenOptions, Overlay, RelayoutOptions, Report, Work};

const MIB: usize = 1 << 20;

fn with_work<T>(run: impl FnOnce(&Work<'_>) -> T) -> T {
    let stop = AtomicBool::new(false);
    run(&Work { stop: &stop, begin: &|_, _| {}, advance: &|_| {} })
}

fn relayout(fx: &Fixture, change: impl FnOnce(&mut RelayoutOptions<'_>)) -> vmar::Result<()> {
    relayout_to(fx, None, change)
}

fn relayout_to(fx: &Fixture, out: Option<&Path>, change: impl FnOnce(&mut RelayoutOptions<'_>)) -> vmar::Result<()> {
    let state_dir = fx.state_dir();
    let mut options =
        RelayoutOptions { out, size: None, capacity: None, state_dir: &state_dir, discard_unflushed: false };
    change(&mut options);
    with_work(|work| overlay::relayout(&fx.overlay, &options, work))
}

fn names(fx: &Fixture) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(fx.dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// An overlay that QEMU has rearranged, and what is in it.
fn rearranged() -> (Fixture, Vec<u8>) {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 512, &[3; 1536]);
    o.write_zeroes(3 * MIB as u64, 100_352, false, &fx).unwrap();
    o.close().unwrap();
    drop(o);
    qemu_io_unmap(
        &fx,
        &["discard 64k 640k", "write -P 2 128k 64k", "write -P 4 300k 5k", "write -P 5 600k 70k", "write -z 1M 3k"],
    );
    let mut want = fx.base.clone();
    want[512..2048].fill(3);
    want[3 * MIB..3 * MIB + 100_352].fill(0);
    want[64 << 10..704 << 10].fill(0);
    want[128 << 10..192 << 10].fill(2);
    want[300 << 10..305 << 10].fill(4);
    want[600 << 10..670 << 10].fill(5);
    want[MIB..MIB + 3072].fill(0);
    assert!(convert(&fx) == want);
    assert!(fx.try_open().unwrap_err().to_string().contains("relayout"));
    (fx, want)
}

#[test]
fn a_relayout_in_place_keeps_content_mode_and_name() {
    let (fx, want) = rearranged();
    fs::set_permissions(&fx.overlay, fs::Permissions::from_mode(0o640)).unwrap();
    let (before, inode) = (names(&fx), fs::metadata(&fx.overlay).unwrap().ino());
    let map = || qemu(&["qemu-img", "map", "--output=json", path_str(&fx.overlay)]);
    let states = |map: String| -> Vec<(u64, u64, bool, bool, u64)> {
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let mut out: Vec<(u64, u64, bool, bool, u64)> = Vec::new();
        for e in map.as_array().unwrap() {
            let n = |key: &str| e[key].as_u64().unwrap();
            let next = (n("start"), n("length"), e["data"] == true, e["zero"] == true, n("depth"));
            match out.last_mut() {
                // Neighbours that differ in their place only.
                Some(last) if (last.2, last.3, last.4) == (next.2, next.3, next.4) => last.1 += next.1,
                _ => out.push(next),
            }
        }
        out
    };
    let states_before = states(map());
    relayout(&fx, |_| {}).unwrap();
    assert_eq!(states(map()), states_before, "data, zeros and base are what they were");
    assert_eq!(overlay::examine(&fx.overlay).unwrap(), Report::default());
    qemu_check(&fx.overlay);
    assert!(convert(&fx) == want);
    assert_eq!(names(&fx), before);
    let meta = fs::metadata(&fx.overlay).unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o640);
    assert_ne!(meta.ino(), inode);
    let o = fx.open();
    assert!(read_all(&o, &fx) == want);
    // One that is as it should be stays so; and the file may be sparse.
    o.close().unwrap();
    drop(o);
    relayout(&fx, |o| o.capacity = Some(1 << 30)).unwrap();
    assert!(convert(&fx) == want);
    let o = fx.open();
    assert_eq!((o.size(), o.capacity()), (fx.size(), 1 << 30));
    assert!(fs::metadata(&fx.overlay).unwrap().blocks() * 512 < 2 * MIB as u64);
}

#[test]
fn a_relayout_to_another_file_leaves_the_first_as_it_is() {
    let (fx, want) = rearranged();
    let bytes = fs::read(&fx.overlay).unwrap();
    let new = fx.dir.path().join("new.qcow2");
    relayout_to(&fx, Some(&new), |_| {}).unwrap();
    assert!(fs::read(&fx.overlay).unwrap() == bytes);
    assert!(read_all(&fx.open_with(&new, false, false).unwrap(), &fx) == want);
    assert_eq!(relayout_to(&fx, Some(&new), |_| {}).unwrap_err().kind(), ErrorKind::Exists);
}

#[test]
fn a_relayout_that_is_stopped_or_refused_changes_nothing() {
    let (fx, _) = rearranged();
    let (bytes, before) = (fs::read(&fx.overlay).unwrap(), names(&fx));
    let state_dir = fx.state_dir();
    let options =
        RelayoutOptions { out: None, size: None, capacity: None, state_dir: &state_dir, discard_unflushed: false };
    let stop = AtomicBool::new(false);
    let advance = |_| stop.store(true, Ordering::Relaxed);
    let work = Work { stop: &stop, begin: &|_, _| {}, advance: &advance };
    let err = overlay::relayout(&fx.overlay, &options, &work).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Interrupted);
    let err = relayout(&fx, |o| o.capacity = Some(MIB as u64)).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Usage, "{err}");
    assert!(fs::read(&fx.overlay).unwrap() == bytes && names(&fx) == before);

    qemu(&["qemu-img", "snapshot", "-c", "one", path_str(&fx.overlay)]);
    assert!(relayout(&fx, |_| {}).unwrap_err().to_string().contains("qemu-img snapshot -d"));
    qemu(&["qemu-img", "snapshot", "-d", "one", path_str(&fx.overlay)]);
    relayout(&fx, |_| {}).unwrap();
    let o = fx.open();
    assert_eq!(relayout(&fx, |_| {}).unwrap_err().kind(), ErrorKind::Busy);
    drop(o);
}

#[test]
fn a_relayout_finishes_the_session_of_a_killed_process_or_refuses() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 0, &[9; 4096]);
    drop(o);
    let mut want = fx.base.clone();
    want[..4096].fill(9);
    relayout(&fx, |o| o.capacity = Some(8 << 20)).unwrap();
    assert!(fx.live_files().is_empty(), "what it held is in the file");
    assert!(convert(&fx) == want);
    // Its live bitmap is gone.
    let o = fx.open();
    write(&o, &fx, 8192, &[8; 4096]);
    drop(o);
    fs::remove_file(&fx.live_files()[0]).unwrap();
    let err = relayout(&fx, |_| {}).unwrap_err();
    assert!(err.to_string().contains("is missing"), "{err}");
    relayout(&fx, |o| o.discard_unflushed = true).unwrap();
    assert!(convert(&fx) == want);
    // QEMU has rearranged the file.
    let o = fx.open();
    write(&o, &fx, 8192, &[8; 4096]);
    drop(o);
    qemu_io_unmap(&fx, &["discard 64k 640k", "write -P 2 128k 64k"]);
    let err = relayout(&fx, |_| {}).unwrap_err();
    assert!(err.kind() == ErrorKind::Changed && err.to_string().contains("--discard-unflushed"), "{err}");
    relayout(&fx, |o| o.discard_unflushed = true).unwrap();
    want[64 << 10..704 << 10].fill(0);
    want[128 << 10..192 << 10].fill(2);
    assert!(convert(&fx) == want);
    assert!(fx.live_files().is_empty());
}

#[test]
fn a_disk_that_is_made_larger_offline_reads_zeros_there() {
    let fx = Fixture::with_sizes(4 << 20, (4 << 20) + 512);
    let o = fx.open();
    write(&o, &fx, 4 << 20, &[6; 512]);
    o.close().unwrap();
    drop(o);
    let mut want = fx.base.clone();
    want.extend([6; 512]);
    let state_dir = fx.state_dir();
    let options =
        RelayoutOptions { out: None, size: None, capacity: None, state_dir: &state_dir, discard_unflushed: false };
    let grow = |size: u64, capacity| {
        with_work(|work| overlay::grow(&fx.overlay, size, &RelayoutOptions { capacity, ..options }, work))
    };
    assert_eq!(grow(4 << 20, None).unwrap_err().kind(), ErrorKind::Usage);
    // More than there is room for, then within it: the second changes the header only.
    for (size, capacity) in [(6 << 20, Some(32 << 20)), (7 << 20, None), (40 << 20, None)] {
        let inode = fs::metadata(&fx.overlay).unwrap().ino();
        grow(size, capacity).unwrap();
        assert_eq!(fs::metadata(&fx.overlay).unwrap().ino() == inode, size == 7 << 20);
        want.resize(size as usize, 0);
        qemu_check(&fx.overlay);
        assert!(convert(&fx) == want && read_all(&fx.open_read_only().unwrap(), &fx) == want);
    }
}

#[test]
fn a_disk_that_qemu_made_smaller_than_its_base_shows_no_base_when_it_grows() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, MIB as u64, &vec![6; 2 * MIB]);
    o.close().unwrap();
    drop(o);
    let small = (3 * MIB / 2 + 512).to_string();
    qemu(&["qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path_str(&fx.overlay), &small]);
    let state_dir = fx.state_dir();
    let options =
        RelayoutOptions { out: None, size: None, capacity: None, state_dir: &state_dir, discard_unflushed: false };
    with_work(|work| overlay::grow(&fx.overlay, 5 << 20, &options, work)).unwrap();
    let mut want = fx.base.clone();
    want[MIB..].fill(6);
    want.resize(5 * MIB, 0);
    want[3 * MIB / 2 + 512..].fill(0);
    assert!(convert(&fx) == want);
    assert!(read_all(&fx.open(), &fx) == want);
}

#[test]
fn a_commit_to_a_new_file_is_the_disk_and_sparse() {
    let fx = Fixture::with_sizes(4 << 20, (64 << 20) + 512);
    let o = fx.open();
    write(&o, &fx, 5 * 512, &[1; 512]);
    write(&o, &fx, (64 << 20) - 512, &[2; 1024]);
    o.write_zeroes(65536, MIB as u64, true, &fx).unwrap();
    let want = read_all(&o, &fx);
    let to = fx.dir.path().join("new.raw");
    drop(o);
    // Of a process that was killed, what it had not flushed counts too.
    let o = fx.open_read_only().unwrap();
    let done = std::sync::atomic::AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let advance = |n| {
        done.fetch_add(n, Ordering::Relaxed);
    };
    let work = Work { stop: &stop, begin: &|_, total| assert_eq!(total, (64 << 20) + 512), advance: &advance };
    overlay::commit(&o, &fx.base_path, &to, &work).unwrap();
    assert_eq!(done.load(Ordering::Relaxed), (64 << 20) + 512);
    assert!(fs::read(&to).unwrap() == want);
    assert!(fs::metadata(&to).unwrap().blocks() * 512 < 5 * MIB as u64);
    assert!(fs::read(&fx.base_path).unwrap() == fx.base, "the base is never written");
    let again = overlay::commit(&o, &fx.base_path, &to, &work).unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Exists);
    let short = fx.dir.path().join("short.raw");
    fs::write(&short, [0; 512]).unwrap();
    let other = fx.dir.path().join("other.raw");
    assert_eq!(overlay::commit(&o, &short, &other, &work).unwrap_err().kind(), ErrorKind::Changed);
    stop.store(true, Ordering::Relaxed);
    assert_eq!(overlay::commit(&o, &fx.base_path, &other, &work).unwrap_err().kind(), ErrorKind::Interrupted);
    assert!(!other.exists());
}

/// A qcow2 of plain QEMU on the fixture's base (or on none), made by `qemu-io` commands.
fn plain(fx: &Fixture, options: &str, backed: bool, size: &str, commands: &[&str]) -> PathBuf {
    let other = fx.dir.path().join("other.qcow2");
    let mut line = vec!["qemu-img", "create", "-q", "-f", "qcow2", "-o", options];
    if backed {
        line.extend(["-b", path_str(&fx.base_path), "-F", "raw"]);
    }
    line.extend([path_str(&other), size]);
    qemu(&line);
    let mut line = vec!["qemu-io", "-f", "qcow2", "-d", "unmap"];
    commands.iter().for_each(|c| line.extend(["-c", c]));
    line.push(path_str(&other));
    qemu(&line);
    other
}

fn flat(fx: &Fixture, file: &Path) -> Vec<u8> {
    let raw = fx.dir.path().join("flat.raw");
    qemu(&["qemu-img", "convert", "-f", "qcow2", "-O", "raw", path_str(file), path_str(&raw)]);
    fs::read(raw).unwrap()
}

#[test]
fn an_overlay_of_plain_qemu_is_taken_over_byte_by_byte() {
    let commands =
        ["write -P 1 100k 30k", "write -z 200k 300k", "write -P 5 1M 512", "discard 2M 256k", "write -P 7 5119k 512"];
    for (options, backed) in [
        ("compat=v3", true),
        ("compat=0.10", true),
        ("cluster_size=4k", true),
        ("cluster_size=2M", true),
        ("extended_l2=on,cluster_size=128k", true),
        ("compat=v3", false),
    ] {
        let fx = Fixture::new();
        let other = plain(&fx, options, backed, "5M", &commands);
        let want = flat(&fx, &other);
        let before = fs::read(&other).unwrap();
        let file = fx.dir.path().join("taken.qcow2");
        let opts = CreateOptions { size: 0, capacity: 16 << 20, ..fx.create_options() };
        let size = with_work(|work| overlay::create_from(&file, &other, &opts, work)).unwrap();
        assert_eq!(size, 5 << 20);
        assert_eq!(overlay::examine(&file).unwrap(), Report::default(), "{options}");
        qemu_check(&file);
        assert!(flat(&fx, &file) == want, "{options}");
        let o = fx.open_with(&file, false, false).unwrap();
        assert!(read_all(&o, &fx) == want, "{options}");
        assert_eq!((o.size(), o.capacity()), (5 << 20, 16 << 20));
        if backed {
            let own: u64 = o.runs(0, size).filter(|r| r.state != overlay::State::Base).map(|r| r.len).sum();
            assert!(own < 5 << 20, "{options}: what is the base's stays in the base ({own} bytes are not)");
        }
        assert!(fs::read(&other).unwrap() == before);
        assert!(!names(&fx).iter().any(|n| n.contains(".tmp")), "{:?}", names(&fx));
    }
}

#[test]
fn what_cannot_be_taken_over_is_refused_and_leaves_nothing() {
    let fx = Fixture::new();
    let file = fx.dir.path().join("taken.qcow2");
    let take = |other: &Path, size: u64| {
        let opts = CreateOptions { size, capacity: 0, ..fx.create_options() };
        let err = with_work(|work| overlay::create_from(&file, other, &opts, work)).unwrap_err().to_string();
        assert!(!file.exists() && !names(&fx).iter().any(|n| n.contains(".tmp")));
        err
    };
    let other = plain(&fx, "compat=v3", true, "5M", &["write -P 1 0 64k"]);
    assert!(take(&other, 4 << 20).contains("is smaller than that of"));
    let small = plain(&fx, "compat=v3", true, "3M", &["write -P 1 0 64k"]);
    assert!(take(&small, 0).contains("qemu-img resize"));
    assert!(take(&fx.base_path, 0).contains("qemu-img failed"));
    assert!(take(Path::new("/none"), 0).contains("cannot open"));
    // A chain: another overlay in between.
    let chained = fx.dir.path().join("chained.qcow2");
    let other = plain(&fx, "compat=v3", true, "5M", &["write -P 1 0 64k"]);
    qemu(&["qemu-img", "create", "-q", "-f", "qcow2", "-b", path_str(&other), "-F", "qcow2", path_str(&chained)]);
    let err = take(&chained, 0);
    assert!(err.contains("its backing file is") && err.contains("qemu-img rebase"), "{err}");
}

#[test]
fn an_overlay_of_a_killed_vmar_is_not_taken_over_before_it_is_finished() {
    let fx = Fixture::new();
    let file = fx.dir.path().join("taken.qcow2");
    let take = || {
        let opts = CreateOptions { size: 0, capacity: 0, ..fx.create_options() };
        with_work(|work| overlay::create_from(&file, &fx.overlay, &opts, work))
    };
    let o = fx.open();
    write(&o, &fx, 0, &[7; 65536]);
    drop(o);
    let err = take().unwrap_err().to_string();
    assert!(err.contains("whose vmar was killed") && !file.exists(), "{err}");
    fx.open().close().unwrap();
    take().unwrap();
    let o = fx.open_with(&file, false, false).unwrap();
    assert!(read_all(&o, &fx)[..65536] == [7; 65536]);
}

#[test]
fn a_size_that_cannot_be_leaves_no_session_and_one_inside_the_base_shows_nothing_of_it() {
    let fx = Fixture::with_sizes(4 << 20, 8 << 20);
    let state_dir = fx.state_dir();
    let options =
        RelayoutOptions { out: None, size: None, capacity: None, state_dir: &state_dir, discard_unflushed: false };
    let grow = |size| with_work(|work| overlay::grow(&fx.overlay, size, &options, work));
    assert_eq!(grow((4 << 20) + 100).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(overlay::inspect(&fx.overlay, &state_dir).unwrap().session, overlay::SessionInfo::Closed);
    let small = (3 << 20) + 512;
    let size = small.to_string();
    qemu(&["qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path_str(&fx.overlay), &size]);
    let err = grow(4 << 20).unwrap_err().to_string();
    assert!(err.contains("ends inside a block of its larger base") && err.contains("qemu-img resize"), "{err}");
    qemu(&["qemu-img", "resize", "-q", "-f", "qcow2", path_str(&fx.overlay), "4M"]);
    grow(5 << 20).unwrap();
    let mut want = fx.base[..small].to_vec();
    want.resize(5 << 20, 0);
    assert!(convert(&fx) == want);
}

#[test]
fn an_overlay_that_was_replaced_while_somebody_waited_for_it_is_not_opened() {
    let fx = Fixture::new();
    let o = fx.open();
    std::thread::scope(|s| {
        let waits = s.spawn(|| {
            let state_dir = fx.state_dir();
            let options = OpenOptions { read_only: false, state_dir: &state_dir, base: None, discard_unflushed: false };
            Overlay::open(&fx.overlay, &options).map(drop)
        });
        std::thread::sleep(std::time::Duration::from_millis(500));
        let copy = fx.dir.path().join("copy");
        fs::copy(&fx.overlay, &copy).unwrap();
        fs::rename(&copy, &fx.overlay).unwrap();
        drop(o);
        let err = waits.join().unwrap().unwrap_err();
        assert!(err.to_string().contains("was replaced by another vmar meanwhile"), "{err}");
    });
}

#[test]
fn an_overlay_of_format_1_is_rewritten() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 1024, &[3; 5120]);
    o.write_zeroes(MIB as u64, 70_000 / 512 * 512, true, &fx).unwrap();
    let want = read_all(&o, &fx);
    o.close().unwrap();
    drop(o);
    // Format 1 had neither capacity nor counter; an extension that nobody knows takes their room.
    let extension = 136;
    patch(&fx.overlay, extension - 4, &104u32.to_be_bytes());
    patch(&fx.overlay, extension, &1u32.to_be_bytes());
    patch(&fx.overlay, extension + 104, &[0x12, 0x34, 0x56, 0x78, 0, 0, 0, 8]);
    qemu_check(&fx.overlay);
    let err = fx.try_open().unwrap_err().to_string();
    assert!(err.contains("'vmar overlay relayout"), "{err}");
    relayout(&fx, |o| o.capacity = Some(8 << 20)).unwrap();
    qemu_check(&fx.overlay);
    assert!(convert(&fx) == want);
    let o = fx.open();
    assert!(read_all(&o, &fx) == want && o.capacity() == 8 << 20 && o.base() == fx.identity());
}
