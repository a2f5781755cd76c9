//! What QEMU's discard, write-zeroes and resize leave behind is taken back.

use crate::common::*;
use std::fs;
use vmar::overlay::{self, SessionInfo};

#[test]
fn discards_of_qemu_are_taken_back() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 0, &vec![7; 1 << 20]);
    o.close().unwrap();
    drop(o);
    qemu_io_unmap(&fx, &["discard 64k 192k", "write -z -u 512k 100k", "discard 2M 64k", "write -P 9 600k 4k"]);
    let mut want = fx.base.clone();
    want[..1 << 20].fill(7);
    for (at, len) in [(64 << 10, 192 << 10), (512 << 10, 100 << 10), (2 << 20, 64 << 10)] {
        want[at..at + len].fill(0);
    }
    want[600 << 10..604 << 10].fill(9);
    assert!(convert(&fx) == want);
    let info = overlay::inspect(&fx.overlay, &fx.state_dir()).unwrap();
    assert_eq!((info.freed_clusters, info.session), (5, SessionInfo::Closed));
    let bytes = fs::read(&fx.overlay).unwrap();
    let o = fx.open_read_only().unwrap();
    assert!(read_all(&o, &fx) == want);
    drop(o);
    assert!(fs::read(&fx.overlay).unwrap() == bytes, "reading changes nothing");

    let o = fx.open();
    assert!(read_all(&o, &fx) == want);
    qemu_check(&fx.overlay);
    // A part of a subcluster: the rest of it is zeros, not what was there before.
    write(&o, &fx, 65536 + 512, &[5; 512]);
    want[65536 + 512..65536 + 1024].fill(5);
    assert!(read_all(&o, &fx) == want);
    o.close().unwrap();
    qemu_check(&fx.overlay);
    assert!(convert(&fx) == want);
    assert_eq!(overlay::examine(&fx.overlay).unwrap(), overlay::Report::default());
}

#[test]
fn a_cluster_that_qemu_put_elsewhere_is_refused_with_the_mend() {
    let fx = Fixture::new();
    // The second write takes the place of the first cluster.
    qemu_io_unmap(&fx, &["discard 64k 192k", "write -P 2 128k 64k"]);
    for read_only in [false, true] {
        let err = fx.open_with(&fx.overlay, read_only, false).unwrap_err().to_string();
        assert!(err.contains("(cluster 2 is elsewhere)"), "{err}");
        assert!(err.contains(&format!("'vmar overlay relayout {}'", path_str(&fx.overlay))), "{err}");
    }
    assert!(overlay::examine(&fx.overlay).unwrap().relayout);
}

#[test]
fn a_discard_by_qemu_of_what_a_killed_vmar_had_written_is_not_guessed_at() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 0, &[7; 65536]);
    o.flush().unwrap();
    drop(o);
    qemu_io_unmap(&fx, &["discard 64k 64k"]);
    fx.open().close().unwrap();
    let o = fx.open();
    write(&o, &fx, 0, &[8; 65536]);
    o.flush().unwrap();
    drop(o);
    qemu_io_unmap(&fx, &["discard 0 64k"]);
    let err = fx.try_open().unwrap_err().to_string();
    assert!(err.contains("and then QEMU wrote to it"), "{err}");
}

#[test]
fn a_disk_that_qemu_img_made_larger_is_taken_back_with_its_new_room() {
    for killed in [false, true] {
        let fx = Fixture::with_sizes(4 << 20, (4 << 20) + 512);
        let mut want = fx.base.clone();
        want.resize(6 << 20, 0);
        let o = fx.open();
        write(&o, &fx, 4 << 20, &[7; 512]);
        want[4 << 20..(4 << 20) + 512].fill(7);
        o.flush().unwrap();
        if !killed {
            o.close().unwrap();
        }
        drop(o);
        qemu(&["qemu-img", "resize", "-q", "-f", "qcow2", path_str(&fx.overlay), "6M"]);
        qemu_io(&fx, &["write -P 3 5M 3k"]);
        want[5 << 20..(5 << 20) + 3072].fill(3);
        // The first cluster behind the old end is where QEMU writes first, and that is not the place of this one.
        let err = fx.try_open().unwrap_err().to_string();
        assert!(err.contains("cluster 80 is elsewhere"), "{err}");

        let fx = Fixture::with_sizes(4 << 20, (4 << 20) + 512);
        let o = fx.open();
        write(&o, &fx, 4 << 20, &[7; 512]);
        o.flush().unwrap();
        if !killed {
            o.close().unwrap();
        }
        drop(o);
        qemu(&["qemu-img", "resize", "-q", "-f", "qcow2", path_str(&fx.overlay), "6M"]);
        want[5 << 20..(5 << 20) + 3072].fill(0);
        assert!(read_all(&fx.open_read_only().unwrap(), &fx) == want);
        let o = fx.open();
        assert_eq!((o.size(), o.capacity()), (6 << 20, 6 << 20));
        assert!(read_all(&o, &fx) == want);
        write(&o, &fx, (6 << 20) - 1024, &[4; 1024]);
        want[(6 << 20) - 1024..].fill(4);
        drop(o);
        let o = fx.open();
        assert!(read_all(&o, &fx) == want, "taken up after a kill, with the new room");
        o.close().unwrap();
        qemu_check(&fx.overlay);
        assert!(convert(&fx) == want);
        assert_eq!(overlay::examine(&fx.overlay).unwrap(), overlay::Report::default());
    }
}

#[test]
fn shrinking_and_growing_by_qemu_img_is_taken_back() {
    let fx = Fixture::new();
    let o = fx.open();
    write(&o, &fx, 3 << 20, &vec![7; 1 << 20]);
    o.close().unwrap();
    drop(o);
    for size in ["2M", "4M"] {
        qemu(&["qemu-img", "resize", "-q", "--shrink", "-f", "qcow2", path_str(&fx.overlay), size]);
    }
    let mut want = fx.base.clone();
    want[2 << 20..].fill(0);
    assert!(convert(&fx) == want);
    let o = fx.open();
    assert!(read_all(&o, &fx) == want);
    o.close().unwrap();
    qemu_check(&fx.overlay);
    assert!(convert(&fx) == want);
}
