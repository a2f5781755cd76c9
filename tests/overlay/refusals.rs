//! Everything that vmar refuses to open, each with its reason; and that nothing of it changes a byte.

use crate::common::*;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use vmar::overlay::{self, BaseIdentity, CreateOptions, OpenOptions, Overlay, SessionInfo};
use vmar::{ErrorKind, units};

const L2_START: u64 = 0x40000;
const DATA_START: u64 = 0x50000;

/// Opens for writing and for reading; both must refuse with `why` and leave the file alone.
fn refused(fx: &Fixture, path: &Path, kind: ErrorKind, why: &str) {
    let before = fs::read(path).unwrap();
    for read_only in [false, true] {
        let err = fx.open_with(path, read_only, false).unwrap_err();
        let text = err.to_string();
        assert!(text.contains(why), "{text}\nshould say: {why}");
        assert!(text.starts_with(path_str(path)) && !text.contains('\n'), "{text}");
        assert_eq!(err.kind(), kind, "{text}");
    }
    assert!(fs::read(path).unwrap() == before, "refused and yet changed");
}

#[test]
fn files_that_are_no_overlay_of_vmar() {
    let fx = Fixture::new();
    let other = fx.dir.path().join("other");
    let make = |options: &str, extra: &[&str]| {
        let _ = fs::remove_file(&other);
        let mut line = vec!["qemu-img", "create", "-q", "-f", "qcow2", "-o", options];
        line.extend(extra);
        line.extend([path_str(&other), "4M"]);
        qemu(&line);
    };
    refused(&fx, &fx.base_path, ErrorKind::Unsupported, "is no qcow2 file");
    fs::write(&other, b"").unwrap();
    refused(&fx, &other, ErrorKind::Unsupported, "is no qcow2 file");
    fs::write(&other, b"QFI\xfb\0\0\0\x03").unwrap();
    refused(&fx, &other, ErrorKind::Corrupt, "the qcow2 header is cut off");
    make("compat=v3,extended_l2=on,preallocation=metadata", &["-b", path_str(&fx.base_path), "-F", "raw"]);
    refused(&fx, &other, ErrorKind::Unsupported, "vmar did not make it");
    refused(&fx, &other, ErrorKind::Unsupported, "make an overlay with 'vmar overlay create'");
    make("compat=0.10", &[]);
    refused(&fx, &other, ErrorKind::Unsupported, "qcow2 version 2");
    let data = format!("data_file={}", path_str(&fx.dir.path().join("data")));
    make(&data, &[]);
    refused(&fx, &other, ErrorKind::Unsupported, "external data file");
    make("compression_type=zstd", &[]);
    refused(&fx, &other, ErrorKind::Unsupported, "uses compression type 1");
    let err = fx.open_with(&fx.dir.path().join("missing"), false, false).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::NotFound);
    let err = fx.open_with(Path::new("/dev/null"), false, false).unwrap_err();
    assert!(err.to_string().contains("is no regular file"), "{err}");
}

#[test]
fn headers_that_vmar_does_not_handle() {
    use ErrorKind::{Corrupt, Unsupported};
    let extension = 136; // payload of vmar's extension, see FORMAT.md
    let cases: &[(u64, &[u8], ErrorKind, &str)] = &[
        (4, &4u32.to_be_bytes(), Unsupported, "qcow2 version 4"),
        (79, &[0x11], Unsupported, "marked it dirty"),
        (79, &[0x12], Corrupt, "marked it corrupt"),
        (79, &[0x14], Unsupported, "external data file"),
        (79, &[0x30], Unsupported, "unknown incompatible features (0x20)"),
        (72, &[0x80], Unsupported, "unknown incompatible features (0x8000000000000000)"),
        (104, &[1], Unsupported, "compression type 1"),
        (35, &[2], Unsupported, "is encrypted"),
        (63, &[3], Unsupported, "3 internal snapshot(s)"),
        (79, &[0], Corrupt, "extended L2 entries"),
        (20, &17u32.to_be_bytes(), Corrupt, "cluster bits is 17"),
        (96, &3u32.to_be_bytes(), Corrupt, "refcount order is 3"),
        (100, &100u32.to_be_bytes(), Corrupt, "header of 100 bytes"),
        (24, &0u64.to_be_bytes(), Corrupt, "size of the disk is 0"),
        (24, &1000u64.to_be_bytes(), Corrupt, "size of the disk is 1000"),
        (24, &(units::IMAGE_SIZE_MAX + 512).to_be_bytes(), Corrupt, "size of the disk is"),
        (24, &u64::MAX.to_be_bytes(), Corrupt, "size of the disk is"),
        (extension, &1u32.to_be_bytes(), Unsupported, "rewrite it with 'vmar overlay relayout"),
        (extension, &3u32.to_be_bytes(), Unsupported, "vmar overlay format 3; this vmar knows format 2"),
        (extension + 104, &0u64.to_be_bytes(), Corrupt, "the capacity in vmar's extension is 0"),
        (extension + 104, &1000u64.to_be_bytes(), Corrupt, "the capacity in vmar's extension is 1000"),
        (extension + 104, &u64::MAX.to_be_bytes(), Corrupt, "the capacity in vmar's extension is"),
        (extension - 4, &96u32.to_be_bytes(), Corrupt, "header extension"),
        (extension - 4, &u32::MAX.to_be_bytes(), Corrupt, "extensions are damaged"),
        (extension - 8, b"XXXX", Unsupported, "vmar did not make it"),
        (120, b"qc2", Unsupported, "format 'qc2'"),
        (8, &0u64.to_be_bytes(), Unsupported, "has no backing file"),
        (16, &0u32.to_be_bytes(), Unsupported, "has no backing file"),
        (16, &2000u32.to_be_bytes(), Unsupported, "has no backing file"),
        (8, &50u64.to_be_bytes(), Corrupt, "extensions are damaged"),
        (8, &u64::MAX.to_be_bytes(), Corrupt, "extensions are damaged"),
    ];
    for (at, bytes, kind, why) in cases {
        let fx = Fixture::new();
        patch(&fx.overlay, *at, bytes);
        refused(&fx, &fx.overlay, *kind, why);
        assert!(overlay::inspect(&fx.overlay, &fx.state_dir()).is_err() && overlay::check(&fx.overlay).is_err());
    }
}

#[test]
fn metadata_that_is_not_at_home() {
    use ErrorKind::{Corrupt, Unsupported};
    let moved = |to: u64| (to | 1 << 63).to_be_bytes();
    let l2 = |cluster: u64| L2_START + cluster * 16;
    let cases: &[(u64, &[u8], ErrorKind, &str)] = &[
        (l2(5), &moved(DATA_START + 6 * 65536), Unsupported, "not in vmar's fixed layout (cluster 5 is elsewhere)"),
        (l2(5), &[0; 16], Unsupported, "(cluster 5 is unallocated)"),
        (l2(5), &(DATA_START + 5 * 65536).to_be_bytes(), Unsupported, "(cluster 5 may be shared)"),
        (l2(0), &[0x40], Unsupported, "(cluster 0 may be shared)"),
        (l2(64), &[0xff; 8], Unsupported, "L2 entry 64, behind the end of the disk, is used"),
        (l2(7) + 8, &[0, 0, 0, 1, 0, 0, 0, 1], Corrupt, "cluster 7 has subclusters that are both data and zero"),
        (0x30000, &moved(L2_START + 65536), Unsupported, "(L2 table 0 is elsewhere)"),
        (0x30000, &[0; 8], Unsupported, "(L2 table 0 is unallocated)"),
        (0x10000, &0x30000u64.to_be_bytes(), Unsupported, "(refcount block 0 is elsewhere)"),
        (0x20000 + 2 * 6, &[0, 2], Unsupported, "(cluster 1 has refcount 2)"),
        (0x20000 + 2 * 3, &[0, 0], Unsupported, "(the metadata cluster at byte 196608 has refcount 0)"),
        (40, &0x50000u64.to_be_bytes(), Unsupported, "(the L1 table is 327680 in place of 196608)"),
        (48, &0u64.to_be_bytes(), Unsupported, "the refcount table is 0"),
        (136 + 64, &0u64.to_be_bytes(), Unsupported, "the data area in vmar's extension is 0"),
        (24, &(300u64 << 20).to_be_bytes(), Unsupported, "has no room in a capacity of 4194304"),
        (24, &(5u64 << 20).to_be_bytes(), Unsupported, "has no room in a capacity of 4194304"),
        (136 + 104, &(1u64 << 20).to_be_bytes(), Unsupported, "has no room in a capacity of 1048576"),
        (136 + 104, &(5u64 << 20).to_be_bytes(), Unsupported, "cluster 64 is unallocated"),
    ];
    for (at, bytes, kind, why) in cases {
        let fx = Fixture::new();
        patch(&fx.overlay, *at, bytes);
        refused(&fx, &fx.overlay, *kind, why);
        // `check` finds the same fault.
        let found = overlay::check(&fx.overlay).map_or_else(|e| e.to_string(), |faults| faults.join("\n"));
        let inner = why.split_once('(').map_or(*why, |(_, inner)| inner.trim_end_matches(')'));
        assert!(found.contains(inner), "{found} for {why}");
    }
    let fx = Fixture::new();
    File::options().write(true).open(&fx.overlay).unwrap().set_len(DATA_START + (4 << 20) - 1).unwrap();
    refused(&fx, &fx.overlay, Corrupt, "is cut off");
}

#[test]
fn check_tells_many_faults_and_stops_somewhere() {
    let fx = Fixture::new();
    patch(&fx.overlay, L2_START, &[0; 16 * 30]);
    let faults = overlay::check(&fx.overlay).unwrap();
    assert_eq!(faults.len(), 21);
    assert_eq!(faults[0], "cluster 0 is unallocated");
    assert_eq!(faults[20], "and 10 more");
}

#[test]
fn what_qemu_7_2_leaves_behind_is_refused_by_name_for_now() {
    let fx = Fixture::new();
    qemu(&["qemu-img", "resize", "-q", "-f", "qcow2", path_str(&fx.overlay), "6M"]);
    refused(&fx, &fx.overlay, ErrorKind::Unsupported, "has no room in a capacity of 4194304");
    let fx = Fixture::new();
    qemu(&["qemu-img", "snapshot", "-c", "one", path_str(&fx.overlay)]);
    refused(&fx, &fx.overlay, ErrorKind::Unsupported, "1 internal snapshot(s)");
    let fx = Fixture::new();
    qemu(&["qemu-img", "bitmap", "--add", "-f", "qcow2", path_str(&fx.overlay), "b0"]);
    // Dirty bitmaps do not move anything: allowed, and declared out of date.
    fx.open().close().unwrap();
    let mut autoclear = [0; 8];
    File::open(&fx.overlay).unwrap().read_exact_at(&mut autoclear, 88).unwrap();
    assert_eq!(autoclear, [0; 8]);
}

#[test]
fn another_base_image() {
    let fx = Fixture::new();
    let state_dir = fx.state_dir();
    let mine = fx.identity();
    let open = |base| {
        Overlay::open(
            &fx.overlay,
            &OpenOptions { read_only: true, state_dir: &state_dir, base, discard_unflushed: true },
        )
    };
    for base in [BaseIdentity { digest: [9; 32], ..mine }, BaseIdentity { size: mine.size - 512, ..mine }] {
        let err = open(Some(base)).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Changed);
        for part in ["was made for another base image", path_str(&fx.base_path), "b5b5b5b5b5b5…, generation 1, 4194304"]
        {
            assert!(err.to_string().contains(part), "{err}");
        }
    }
    // The same content under another generation is the same content.
    open(Some(BaseIdentity { generation: 5, ..mine })).unwrap();
    open(None).unwrap();
}

#[test]
fn two_writers_and_a_reader_beside_a_writer() {
    let fx = Fixture::new();
    let o = fx.open();
    std::thread::scope(|s| {
        for read_only in [false, true] {
            let fx = &fx;
            s.spawn(move || {
                let start = std::time::Instant::now();
                let err = fx.open_with(&fx.overlay, read_only, true).unwrap_err();
                assert_eq!(err.kind(), ErrorKind::Busy);
                assert!(err.to_string().contains("is in use by another process (vmar or QEMU)"), "{err}");
                assert!(start.elapsed().as_millis() >= 4000);
            });
        }
    });
    let info = overlay::inspect(&fx.overlay, &fx.state_dir()).unwrap();
    assert!(info.in_use && info.session == SessionInfo::Open);
    // One that lets go meanwhile is waited for.
    std::thread::scope(|s| {
        let next = s.spawn(|| fx.try_open().map(drop));
        std::thread::sleep(std::time::Duration::from_millis(200));
        drop(o);
        next.join().unwrap().unwrap();
    });
    assert!(!overlay::inspect(&fx.overlay, &fx.state_dir()).unwrap().in_use);
}

/// Killed with one unflushed subcluster over one that was flushed.
fn killed() -> (Fixture, Vec<u8>) {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 0, &[1; 2048]);
    o.flush().unwrap();
    write(&o, &fx, 65536, &[2; 2048]);
    let mut durable = fx.base.clone();
    durable[..2048].fill(1);
    drop(o);
    (fx, durable)
}

#[test]
fn a_live_bitmap_that_is_gone() {
    let (fx, durable) = killed();
    fs::remove_file(&fx.live_files()[0]).unwrap();
    refused(
        &fx,
        &fx.overlay,
        ErrorKind::NotFound,
        "is missing, so what the VM wrote since its last flush would be lost",
    );
    refused(&fx, &fx.overlay, ErrorKind::NotFound, "--discard-unflushed");
    assert_eq!(overlay::inspect(&fx.overlay, &fx.state_dir()).unwrap().session, SessionInfo::Lost);
    let o = fx.open_with(&fx.overlay, true, true).unwrap();
    assert!(read_all(&o, &fx) == durable);
    drop(o);
    refused(&fx, &fx.overlay, ErrorKind::NotFound, "is missing");
    let o = fx.open_discarding().unwrap();
    assert!(read_all(&o, &fx) == durable);
    drop(o);
    assert!(read_all(&fx.open(), &fx) == durable, "a session of its own, taken up again");
}

#[test]
fn a_live_bitmap_that_is_damaged() {
    for (at, bytes, why) in [
        (0, &b"X"[..], "it is no live bitmap"),
        (8, &1u32.to_ne_bytes(), "its format is 1 and this vmar knows format 2"),
        (12, &0x0403_0201u32.to_ne_bytes(), "another byte order"),
        (64, &9u64.to_ne_bytes(), "the checksum of its header is wrong"),
        (4096 + 3 * 8, &[0xff; 8], "cluster 3 has subclusters that are both data and zero"),
    ] {
        let (fx, durable) = killed();
        patch(&fx.live_files()[0], at, bytes);
        refused(&fx, &fx.overlay, ErrorKind::Corrupt, why);
        let o = fx.open_discarding().unwrap();
        assert!(read_all(&o, &fx) == durable);
    }
    let (fx, _) = killed();
    File::options().write(true).open(&fx.live_files()[0]).unwrap().set_len(4096 + 8).unwrap();
    refused(&fx, &fx.overlay, ErrorKind::Corrupt, "it has 4104 bytes in place of 4608");
}

#[test]
fn a_copy_of_an_open_overlay_does_not_take_the_originals_bitmap() {
    let (fx, durable) = killed();
    let copy = fx.dir.path().join("copy.qcow2");
    fs::copy(&fx.overlay, &copy).unwrap();
    refused(&fx, &copy, ErrorKind::Corrupt, "it belongs to another file, of which this one is a copy");
    let o = fx.open_with(&copy, false, true).unwrap();
    assert!(read_all(&o, &fx) == durable);
    o.close().unwrap();
    // The original still has everything.
    let mut all = durable;
    all[65536..65536 + 2048].fill(2);
    assert!(read_all(&fx.open(), &fx) == all);
}

/// `cp copy overlay`: the same inode, with another content.
fn copy_over(fx: &Fixture, copy: &Path, truncate: bool) {
    let bytes = fs::read(copy).unwrap();
    let file = File::options().write(true).truncate(truncate).open(&fx.overlay).unwrap();
    file.write_all_at(&bytes, 0).unwrap();
}

#[test]
fn an_older_copy_written_over_an_open_overlay_does_not_get_its_live_bitmap() {
    let why = "an older copy was written over it while its session was open";
    for (flush_after_copy, truncate) in [(true, true), (true, false), (false, true)] {
        let fx = Fixture::new();
        let o = fx.open();
        write(&o, &fx, 0, &[1; 2048]);
        o.flush().unwrap();
        let copy = fx.dir.path().join("backup.qcow2");
        fs::copy(&fx.overlay, &copy).unwrap();
        let then = read_all(&o, &fx);
        write(&o, &fx, 65536, &[2; 2048]);
        if flush_after_copy {
            o.flush().unwrap();
        }
        drop(o);
        let live = fs::read(&fx.live_files()[0]).unwrap();
        let seal = u64::from_ne_bytes(live[1056..1064].try_into().unwrap());
        if !flush_after_copy && seal == 0 {
            eprintln!("skipped: this file system cannot reserve a block behind the end of a file and tell of it");
            continue;
        }
        let now = fs::read(&fx.overlay).unwrap();
        copy_over(&fx, &copy, truncate);
        refused(&fx, &fx.overlay, ErrorKind::Changed, why);
        refused(&fx, &fx.overlay, ErrorKind::Changed, "--discard-unflushed");
        assert_eq!(overlay::inspect(&fx.overlay, &fx.state_dir()).unwrap().session, SessionInfo::Lost);
        if !truncate {
            // What was there before belongs to the bitmap.
            fs::write(fx.dir.path().join("now"), &now).unwrap();
            copy_over(&fx, &fx.dir.path().join("now"), false);
            let mut all = then.clone();
            all[65536..65536 + 2048].fill(2);
            assert!(read_all(&fx.open(), &fx) == all);
            copy_over(&fx, &copy, truncate);
        }
        let o = fx.open_discarding().unwrap();
        assert!(read_all(&o, &fx) == then);
        o.close().unwrap();
        qemu_check(&fx.overlay);
        assert!(fx.live_files().is_empty());
    }
}

#[test]
fn qemu_wrote_while_writes_were_unflushed() {
    let (fx, mut durable) = killed();
    qemu_io(&fx, &["write -P 3 128k 4k"]);
    durable[128 << 10..132 << 10].fill(3);
    refused(&fx, &fx.overlay, ErrorKind::Changed, "2 KiB that the VM may have written without a flush would be lost");
    let o = fx.open_discarding().unwrap();
    assert!(read_all(&o, &fx) == durable);
    o.close().unwrap();
    assert!(fx.live_files().is_empty());
}

#[test]
fn after_a_reboot_the_last_flush_counts() {
    let (fx, durable) = killed();
    // Another boot ID in the header, as if the host had been restarted since; /run would be empty then.
    patch(&fx.overlay, 136 + 88, &[0xab; 16]);
    assert_eq!(overlay::inspect(&fx.overlay, &fx.state_dir()).unwrap().session, SessionInfo::OtherBoot);
    assert!(read_all(&fx.open_read_only().unwrap(), &fx) == durable);
    let o = fx.open();
    assert!(read_all(&o, &fx) == durable);
    o.close().unwrap();
    assert!(fx.live_files().is_empty(), "the old bitmap was of no use any more");
}

#[test]
fn an_option_to_discard_discards_nothing_that_is_there() {
    let (fx, durable) = killed();
    let o = fx.open_discarding().unwrap();
    assert!(read_all(&o, &fx)[65536..65536 + 2048] == [2; 2048]);
    assert!(durable[65536] != 2);
}

#[test]
fn a_state_directory_without_room_or_rights() {
    let fx = Fixture::new();
    fs::write(fx.state_dir(), b"a file").unwrap();
    let before = fs::read(&fx.overlay).unwrap();
    let err = fx.try_open().unwrap_err();
    assert!(err.to_string().starts_with(path_str(&fx.state_dir())), "{err}");
    assert!(fs::read(&fx.overlay).unwrap() == before);
}

#[test]
fn random_damage_to_the_metadata_is_an_error_or_harmless_but_no_panic() {
    use proptest::prelude::*;
    let fx = Fixture::with_sizes(65536, 65536 * 4);
    let create = CreateOptions { backing: &fx.base_path, base: fx.identity(), size: 65536 * 4, capacity: 65536 * 4 };
    proptest!(|(damage in prop::collection::vec((0u64..0x50000, any::<u8>()), 1..6), dense in prop::collection::vec((0u64..400, any::<u8>()), 0..4))| {
        let path = fx.dir.path().join("damaged");
        let _ = fs::remove_file(&path);
        overlay::create(&path, &create).unwrap();
        for (at, byte) in damage.iter().chain(&dense) {
            patch(&path, *at, &[*byte]);
        }
        let _ = overlay::check(&path);
        let _ = overlay::inspect(&path, &fx.state_dir());
        if let Ok(o) = fx.open_with(&path, false, false) {
            let _ = read_all(&o, &fx);
            o.close().unwrap();
        }
    });
}
