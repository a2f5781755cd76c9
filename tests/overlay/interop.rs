//! What vmar writes, QEMU reads, checks and may write; and the whole interface once, sequentially.

use crate::common::*;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use vmar::ErrorKind;
use vmar::overlay::{self, BaseIdentity, CreateOptions, Run, SessionInfo, State};

const MIB: u64 = 1 << 20;

#[test]
fn a_new_overlay_is_what_qemu_img_would_make() {
    for size in [512, 65536, 100 * MIB, 100 * MIB + 512, 3 << 30] {
        let fx = Fixture::with_sizes(size.min(MIB), size);
        qemu_check(&fx.overlay);
        let theirs = fx.dir.path().join("theirs.qcow2");
        qemu(&[
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "extended_l2=on,cluster_size=64k,preallocation=metadata",
            "-b",
            path_str(&fx.base_path),
            "-F",
            "raw",
            path_str(&theirs),
            &size.to_string(),
        ]);
        let info = |path: &Path| {
            let text = qemu(&["qemu-img", "info", "--output=json", path_str(path)]);
            let json: serde_json::Value = serde_json::from_str(&text).unwrap();
            let specific = json["format-specific"].clone();
            (
                json["virtual-size"].clone(),
                json["cluster-size"].clone(),
                json["backing-filename"].clone(),
                json["backing-filename-format"].clone(),
                json["dirty-flag"].clone(),
                specific,
            )
        };
        assert_eq!(info(&fx.overlay), info(&theirs));
        // Both in the same strict order: cluster n of the disk is cluster n of the data area.
        assert_eq!(fs::metadata(&fx.overlay).unwrap().len() % 65536, 0);
        let on_disk = fs::metadata(&fx.overlay).unwrap().blocks() * 512;
        assert!(on_disk <= 300 * 1024 * size.div_ceil(1 << 30) + 300 * 1024, "{size}: {on_disk} on disk");
    }
}

#[test]
fn the_header_is_golden() {
    let fx = Fixture::with_sizes(MIB, 3 << 30);
    let path = fx.dir.path().join("golden.qcow2");
    let base = BaseIdentity { digest: [0xd1; 32], generation: 7, size: MIB };
    overlay::create(
        &path,
        &CreateOptions { backing: Path::new("/images/web.raw"), base, size: 3 << 30, capacity: 5 << 30 },
    )
    .unwrap();
    let mut bytes = vec![0; 400];
    File::open(&path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    let dump: Vec<String> = bytes.chunks(16).map(vmar::codec::hex).collect();
    assert_eq!(dump.join("\n"), include_str!("header.hex").trim_end());
    // FORMAT.md shows the same bytes.
    let spec = include_str!("../../src/overlay/FORMAT.md");
    for line in &dump {
        assert!(spec.contains(line), "FORMAT.md does not show {line}");
    }
}

#[test]
fn create_never_overwrites_and_leaves_nothing_behind() {
    let fx = Fixture::new();
    let opts = fx.create_options();
    let err = overlay::create(&fx.overlay, &opts).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Exists);
    assert!(err.to_string().contains("exists already"), "{err}");
    let listing = || {
        let mut names: Vec<_> = fs::read_dir(fx.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        names
    };
    let before = listing();
    let new = fx.dir.path().join("new.qcow2");
    for (opts, why) in [
        (CreateOptions { size: 0, ..opts }, "a disk of 0 bytes cannot be"),
        (CreateOptions { size: 1000, ..opts }, "multiple of 512"),
        (CreateOptions { size: (16 << 40) + 512, ..opts }, "larger than 16 TiB"),
        (CreateOptions { size: 512, ..opts }, "smaller than its base"),
        (CreateOptions { capacity: opts.size - 512, ..opts }, "cannot have a capacity of"),
        (CreateOptions { capacity: opts.size + 100, ..opts }, "cannot have a capacity of"),
        (CreateOptions { capacity: (16 << 40) + 512, ..opts }, "cannot have a capacity of"),
        (CreateOptions { backing: Path::new("base.raw"), ..opts }, "not absolute"),
        (CreateOptions { backing: Path::new(&format!("/{}", "x".repeat(1023))), ..opts }, "qcow2 takes 1023"),
    ] {
        let err = overlay::create(&new, &opts).unwrap_err();
        assert!(err.to_string().contains(why), "{err}");
    }
    let err = overlay::create(&fx.dir.path().join("no/such/dir.qcow2"), &opts).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::NotFound);
    assert_eq!(listing(), before);
    let mode = fs::metadata(&fx.overlay).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "a VM's disk is nobody else's business");
}

#[test]
fn what_vmar_writes_qemu_reads_and_checks() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 4096, &[0xaa; 8192]);
    write(&o, &fx, MIB + 512, &[0xbb; 512]);
    write(&o, &fx, 2 * MIB - 1024, &[0xcc; 2048]);
    o.write_zeroes(3 * MIB + 512, 65536, true, &fx).unwrap();
    qemu_check(&fx.overlay);
    let mut want = fx.base.clone();
    want[4096..12288].fill(0xaa);
    want[MIB as usize + 512..MIB as usize + 1024].fill(0xbb);
    want[2 * MIB as usize - 1024..2 * MIB as usize + 1024].fill(0xcc);
    want[3 * MIB as usize + 512..3 * MIB as usize + 512 + 65536].fill(0);
    assert!(read_all(&o, &fx) == want);
    o.flush().unwrap();
    qemu_check(&fx.overlay);
    assert!(convert(&fx) == want, "durable after a flush, with the session open");
    o.close().unwrap();
    qemu_check(&fx.overlay);
    assert!(convert(&fx) == want);
    let map = qemu(&["qemu-img", "map", "--output=json", path_str(&fx.overlay)]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let ours = map.as_array().unwrap().iter().find(|e| e["depth"] == 0 && e["data"] == true).unwrap();
    assert_eq!(ours["start"], 4096);
    assert_eq!(ours["length"], 8192);
    assert_eq!(ours["offset"], o.data_start() + 4096);
}

#[test]
fn runs_tell_base_data_and_zero_apart_and_merge_over_clusters() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 65536 - 2048, &vec![1; 65536 + 4096]);
    o.write_zeroes(4 * 65536, 65536, false, &fx).unwrap();
    let all: Vec<Run> = o.runs(512, 5 * 65536).collect();
    assert_eq!(
        all,
        [
            Run { offset: 512, len: 65536 - 2048 - 512, state: State::Base },
            Run { offset: 65536 - 2048, len: 65536 + 4096, state: State::Data },
            Run { offset: 2 * 65536 + 2048, len: 2 * 65536 - 2048, state: State::Base },
            Run { offset: 4 * 65536, len: 65536, state: State::Zero },
            Run { offset: 5 * 65536, len: 512, state: State::Base },
        ]
    );
    assert_eq!(o.runs(1024, 0).count(), 0);
    assert_eq!(o.runs(fx.size() - 512, 512).count(), 1);
}

#[test]
fn the_fast_path_declines_what_needs_a_fill() {
    let fx = Fixture::new();
    let o = fx.open();
    let mut sector = [7u8; 512];
    let bufs = iobufs(&mut sector);
    assert!(!o.try_write(512, &bufs).unwrap(), "a part of a base subcluster");
    o.write(512, &bufs, &fx).unwrap();
    assert!(o.try_write(1024, &bufs).unwrap(), "a part of a data subcluster");
    o.write_zeroes(2048, 2048, false, &fx).unwrap();
    assert!(!o.try_write(2048, &bufs).unwrap(), "a part of a zero subcluster");
    let mut whole = [8u8; 4096];
    assert!(o.try_write(8192, &iobufs(&mut whole)).unwrap(), "whole subclusters");
    let mut want = fx.base.clone();
    want[512..1536].fill(7);
    want[2048..4096].fill(0);
    want[8192..8192 + 4096].fill(8);
    assert!(read_all(&o, &fx) == want);
}

#[test]
fn ranges_that_are_no_sectors_of_the_disk_are_refused() {
    let fx = Fixture::new();
    let o = fx.open();
    let mut mem = [0u8; 1024];
    let bufs = iobufs(&mut mem);
    for offset in [1, 256, fx.size() - 512, fx.size(), u64::MAX - 511, u64::MAX] {
        assert_eq!(o.write(offset, &bufs, &fx).unwrap_err().kind(), std::io::ErrorKind::InvalidInput, "{offset}");
        assert_eq!(o.try_write(offset, &bufs).unwrap_err().kind(), std::io::ErrorKind::InvalidInput);
        assert!(o.write_zeroes(offset, 1024, true, &fx).is_err());
    }
    assert!(o.write_zeroes(0, 100, true, &fx).is_err());
    o.write(0, &[], &fx).unwrap();
    o.write_zeroes(0, 0, true, &fx).unwrap();
    assert!(read_all(&o, &fx) == fx.base);
}

#[test]
fn the_end_of_a_disk_that_is_no_multiple_of_anything() {
    // The base ends before the disk, both in the middle of a subcluster.
    let fx = Fixture::with_sizes(65536 + 512, 3 * 65536 + 1536);
    let o = fx.open();
    let end = fx.size();
    let mut want = fx.base.clone();
    want.resize(end as usize, 0);
    write(&o, &fx, end - 512, &[1; 512]);
    want[end as usize - 512..].fill(1);
    write(&o, &fx, 65536, &[2; 512]);
    want[65536..65536 + 512].fill(2);
    write(&o, &fx, 65536 + 1024, &[3; 512]);
    want[65536 + 1024..65536 + 1536].fill(3);
    assert!(read_all(&o, &fx) == want);
    o.write_zeroes(2 * 65536, end - 2 * 65536, true, &fx).unwrap();
    want[2 * 65536..].fill(0);
    assert!(read_all(&o, &fx) == want);
    assert_eq!(o.runs(end - 1536, 1536).map(|r| r.state).collect::<Vec<_>>(), [State::Zero]);
    o.close().unwrap();
    qemu_check(&fx.overlay);
    assert!(convert(&fx) == want);
}

#[test]
fn write_zeroes_with_unmap_gives_the_space_back() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 0, &vec![9; 2 * MIB as usize]);
    o.flush().unwrap();
    let blocks = || fs::metadata(&fx.overlay).unwrap().blocks() * 512;
    let before = blocks();
    o.write_zeroes(0, 2 * MIB, false, &fx).unwrap();
    assert_eq!(blocks(), before, "without unmap the space stays");
    write(&o, &fx, 0, &vec![9; 2 * MIB as usize]);
    o.write_zeroes(0, 2 * MIB, true, &fx).unwrap();
    assert!(blocks() + 2 * MIB <= before + 65536, "{} of {before}", blocks());
    assert_eq!(o.runs(0, 2 * MIB).map(|r| r.state).collect::<Vec<_>>(), [State::Zero]);
}

#[test]
fn a_killed_process_loses_nothing_and_a_clean_stop_leaves_no_bitmap() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 1024, &[5; 512]);
    let want = read_all(&o, &fx);
    drop(o); // = kill -9: no flush, no close
    assert_eq!(fx.live_files().len(), 1);
    assert_eq!(overlay::inspect(&fx.overlay, &fx.state_dir()).unwrap().session, SessionInfo::Open);
    assert!(convert(&fx) == fx.base, "nothing was flushed, so the qcow2 alone still is the base");
    let o = fx.open();
    assert!(read_all(&o, &fx) == want);
    o.flush().unwrap();
    assert!(convert(&fx) == want, "what the killed process left unflushed is flushed by the next");
    o.close().unwrap();
    o.close().unwrap();
    assert!(fx.live_files().is_empty());
    let mut sector = [0u8; 512];
    assert!(o.write(0, &iobufs(&mut sector), &fx).unwrap_err().to_string().contains("closed"));
    assert!(o.flush().unwrap_err().to_string().contains("closed"));
    drop(o);
    assert_eq!(overlay::inspect(&fx.overlay, &fx.state_dir()).unwrap().session, SessionInfo::Closed);
}

#[test]
fn reading_only_changes_nothing() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 0, &[5; 4096]);
    let want = read_all(&o, &fx);
    drop(o);
    let bytes = fs::read(&fx.overlay).unwrap();
    let (a, b) = (fx.open_read_only().unwrap(), fx.open_read_only().unwrap());
    assert!(read_all(&a, &fx) == want && read_all(&b, &fx) == want, "with the live bitmap, by several readers");
    let mut sector = [0u8; 512];
    let err = a.try_write(0, &iobufs(&mut sector)).unwrap_err();
    assert_eq!(err.raw_os_error(), Some(30), "EROFS");
    a.flush().unwrap();
    a.close().unwrap();
    drop((a, b));
    assert!(fs::read(&fx.overlay).unwrap() == bytes);
    fx.open().close().unwrap();
    let clean = fx.open_read_only().unwrap();
    assert!(read_all(&clean, &fx) == want);
}

#[test]
fn qemu_writes_after_a_clean_stop_and_vmar_goes_on() {
    let fx = Fixture::new();
    let mut want = fx.base.clone();
    for round in 0..3u64 {
        let o = fx.open();
        let at = round * 65536 + 1024;
        write(&o, &fx, at, &[0x40 + round as u8; 3072]);
        want[at as usize..at as usize + 3072].fill(0x40 + round as u8);
        o.close().unwrap();
        drop(o);
        let at = (round * 65536 + 2560) as usize;
        qemu_io(
            &fx,
            &[&format!("write -P {} {at} 4096", 0x60 + round), &format!("write -z {} 70k", MIB * (round + 1))],
        );
        want[at..at + 4096].fill(0x60 + round as u8);
        let zeros = (MIB * (round + 1)) as usize;
        want[zeros..zeros + 70 * 1024].fill(0);
        qemu_check(&fx.overlay);
        let o = fx.open();
        assert!(read_all(&o, &fx) == want, "round {round}");
        o.close().unwrap();
    }
    assert!(convert(&fx) == want);
    assert_eq!(overlay::check(&fx.overlay).unwrap(), Vec::<String>::new());
}

#[test]
fn qemu_writes_after_a_kill_that_left_nothing_unflushed_and_vmar_goes_on() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 0, &[1; 2048]);
    o.flush().unwrap();
    drop(o);
    qemu_io(&fx, &["write -P 2 8k 4k"]);
    let mut want = fx.base.clone();
    want[..2048].fill(1);
    want[8192..12288].fill(2);
    let o = fx.open();
    assert!(read_all(&o, &fx) == want);
    assert_eq!(fx.live_files().len(), 1, "the bitmap of the old session is gone");
    // The feature bit is set again: killed now, the live bitmap counts.
    write(&o, &fx, 65536, &[3; 512]);
    want[65536..65536 + 512].fill(3);
    drop(o);
    assert!(read_all(&fx.open(), &fx) == want);
}

#[test]
fn qemu_keeps_the_extension_when_it_rewrites_the_header() {
    let fx = Fixture::new();
    // What makes QEMU write every extension anew.
    qemu(&[
        "qemu-img",
        "rebase",
        "-u",
        "-f",
        "qcow2",
        "-F",
        "raw",
        "-b",
        path_str(&fx.base_path),
        path_str(&fx.overlay),
    ]);
    let o = fx.open();
    assert_eq!(o.base(), fx.identity());
    write(&o, &fx, 0, &[1; 512]);
    qemu_check(&fx.overlay);
    drop(o);
    let o = fx.open();
    o.close().unwrap();
    let mut want = fx.base.clone();
    want[..512].fill(1);
    assert!(convert(&fx) == want);
}

#[test]
fn a_commit_to_a_copy_of_the_base_gives_the_disk() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 5 * 512, &[1; 512]);
    o.write_zeroes(65536, 65536, true, &fx).unwrap();
    let want = read_all(&o, &fx);
    o.close().unwrap();
    drop(o);
    qemu(&["qemu-img", "commit", "-q", "-f", "qcow2", path_str(&fx.overlay)]);
    assert!(fs::read(&fx.base_path).unwrap() == want);
}

#[test]
fn room_to_grow_does_not_disturb_qemu() {
    // The disk ends in the middle of a subcluster, and several L2 tables before its capacity.
    let fx = Fixture::with_capacity(MIB, 5 * MIB + 512, 1 << 30);
    qemu_check(&fx.overlay);
    qemu_io(&fx, &["write -P 7 0 512", "write -P 8 5m 512", "write -z 1m 64k"]);
    qemu_check(&fx.overlay);
    assert_eq!(overlay::check(&fx.overlay).unwrap(), Vec::<String>::new());
    let mut want = fx.base.clone();
    want.resize(fx.size() as usize, 0);
    want[..512].fill(7);
    want[5 * MIB as usize..].fill(8);
    let o = fx.open();
    assert_eq!((o.size(), o.capacity()), (fx.size(), 1 << 30));
    assert!(read_all(&o, &fx) == want);
    o.close().unwrap();
    drop(o);
    assert!(convert(&fx) == want);
    // vmar's growth, with the session open.
    let o = fx.open();
    o.resize(5 * MIB + 1024).unwrap();
    qemu_check(&fx.overlay);
    drop(o);
    want.resize(5 * MIB as usize + 1024, 0);
    assert!(convert(&fx) == want);
    let o = fx.open();
    assert!(read_all(&o, &fx) == want);
    o.close().unwrap();
    drop(o);
    // QEMU's own growth moves nothing as long as there is room.
    qemu(&["qemu-img", "resize", "-q", "-f", "qcow2", path_str(&fx.overlay), "6M"]);
    qemu_check(&fx.overlay);
    want.resize(6 * MIB as usize, 0);
    let o = fx.open();
    assert!(read_all(&o, &fx) == want);
    o.close().unwrap();
}

#[test]
fn what_qemu_cut_off_does_not_come_back_when_the_disk_grows() {
    let fx = Fixture::with_capacity(MIB, 2 * MIB, 3 * MIB);
    let mut want = fx.base.clone();
    want.resize(3 * MIB as usize, 0);
    let o = fx.open();
    let end = 2 * MIB as usize;
    write(&o, &fx, 2 * MIB - 16384, &[9; 16384]);
    want[end - 16384..end].fill(9);
    o.close().unwrap();
    drop(o);
    // Inside the last cluster and in the middle of a subcluster: QEMU keeps the data behind the new end, and its bits.
    let cut = 2 * MIB - 8192 + 512;
    qemu(&["qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path_str(&fx.overlay), &cut.to_string()]);
    want[cut as usize..end].fill(0);
    let o = fx.open();
    assert_eq!(o.size(), cut);
    o.resize(cut + 1024).unwrap();
    assert!(read_all(&o, &fx) == want[..cut as usize + 1024]);
    // Killed: the live bitmap and the file tell the same story.
    drop(o);
    let o = fx.open();
    o.resize(3 * MIB).unwrap();
    assert!(read_all(&o, &fx) == want);
    o.close().unwrap();
    drop(o);
    qemu_check(&fx.overlay);
    assert!(convert(&fx) == want);
}

#[test]
fn sizes_that_the_disk_cannot_have() {
    let fx = Fixture::with_capacity(MIB, 2 * MIB, 3 * MIB);
    let o = fx.open();
    for (size, why) in [
        (2 * MIB - 512, "cannot shrink"),
        (0, "cannot shrink"),
        (2 * MIB + 100, "must be a multiple of 512"),
        (3 * MIB + 512, "more than its capacity of 3145728 bytes"),
        (u64::MAX - 511, "more than its capacity"),
    ] {
        let err = o.resize(size).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Usage);
        assert!(err.to_string().contains(why) && err.to_string().contains("; "), "{err}");
        assert_eq!(o.size(), 2 * MIB);
    }
    o.resize(2 * MIB).unwrap();
    o.close().unwrap();
    assert!(o.resize(3 * MIB).unwrap_err().to_string().contains("closed"));
    drop(o);
    let reader = fx.open_read_only().unwrap();
    assert!(reader.resize(3 * MIB).unwrap_err().to_string().contains("reading only"));
    assert_eq!(reader.size(), 2 * MIB);
}
