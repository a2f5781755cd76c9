//! The log of dirty pages: what is written to guest memory is in it, and nothing else.

use crate::frontend::*;
use crate::{Target, pattern};
use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

/// Bytes of a log for all of the guest's memory: a bit for each page of 4 KiB.
const LOG: u64 = (DATA + DATA_SIZE) / 4096 / 8;

struct Log(std::fs::File);

impl Log {
    fn new() -> Log {
        let fd: OwnedFd = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = std::fs::File::from(fd);
        file.set_len(LOG).unwrap();
        Log(file)
    }

    /// Hands it to the server.
    fn set(&self, f: &mut Frontend) {
        f.send(SET_LOG_BASE, VERSION, &bytes_of(&[LOG, 0]), &[self.0.as_fd()]);
        assert_eq!(f.reply().unwrap(), bytes_of(&[LOG, 0]));
    }

    /// Addresses of the pages that are marked; none is marked afterwards.
    fn take(&self) -> BTreeSet<u64> {
        let mut bytes = vec![0; LOG as usize];
        self.0.read_exact_at(&mut bytes, 0).unwrap();
        self.0.write_all_at(&vec![0; LOG as usize], 0).unwrap();
        (0..LOG * 8).filter(|p| bytes[(p / 8) as usize] >> (p % 8) & 1 == 1).map(|p| p * 4096).collect()
    }
}

fn set_features(f: &mut Frontend, features: u64) {
    f.ok(SET_FEATURES, &features.to_le_bytes(), &[]);
}

/// What QEMU sends to a ring that runs, to switch its log on or off.
fn set_address(f: &mut Frontend, q: usize, log: bool) {
    let ring = &f.rings[q];
    let index = u64::from(ring.index) | u64::from(log) << 32;
    let words = [index, USER + ring.desc(), USER + ring.used_ring(), USER + ring.avail_ring(), ring.used_ring()];
    f.set(SET_VRING_ADDR, &words);
}

fn pages(range: std::ops::Range<u64>) -> BTreeSet<u64> {
    (range.start / 4096..range.end.div_ceil(4096)).map(|p| p * 4096).collect()
}

#[test]
fn what_is_written_is_marked_and_nothing_else() {
    for features in [FEATURES, FEATURES | F_EVENT_IDX] {
        let mut target = Target::writable();
        let mut f = target.connect(features, 1, 16);
        let log = Log::new();
        log.set(&mut f);
        f.read(0, 8, 4096);
        assert!(log.take().is_empty(), "the log is not switched on");
        set_features(&mut f, features | F_LOG_ALL);
        set_address(&mut f, 0, true);
        log.take();
        let used = f.rings[0].used_ring();
        // `Frontend::read` has its status byte there.
        let around = &pages(used..used + 6 + 8 * 16) | &pages(STATUSES + 0xF00..STATUSES + 0xF01);
        // Cold and warm: by io_uring, and by a copy.
        for cold in [true, false] {
            if cold {
                target.go_cold();
            }
            for len in [512, 4096, 5120, 64 << 10, 1 << 20] {
                assert!(f.read(0, 16, len) == pattern()[16 * 512..][..len as usize]);
                assert_eq!(log.take(), &around | &pages(SCRATCH..SCRATCH + u64::from(len)), "{len} bytes");
            }
        }
        f.write(0, 100, 8192, 7);
        assert_eq!(log.take(), around, "a write changes no data of the guest");
        set_features(&mut f, features);
        set_address(&mut f, 0, false);
        log.take();
        f.read(0, 8, 8192);
        assert!(log.take().is_empty(), "the log is switched off");
        drop(f);
        std::fs::write(&target.file, pattern()).unwrap();
        target.check();
    }
}

/// Requests that began before the log was switched on and end after are marked; those that failed are too, as far as they
/// may have written.
#[test]
fn requests_in_flight_are_marked_when_they_end() {
    let mut target = Target::writable();
    let mut f = target.connect(FEATURES, 1, 1024);
    let log = Log::new();
    log.set(&mut f);
    for round in 0..20u64 {
        target.go_cold();
        let piece = 64 << 10;
        let mut heads = Vec::new();
        for i in 0..32u16 {
            let (header, status) = (HEADERS + u64::from(i) * 16, STATUSES + u64::from(i));
            f.header(header, 0, u64::from(i) * 128);
            let data = DATA + u64::from(i) * piece;
            f.table(
                f.rings[0].desc(),
                i * 3,
                &Frontend::chain(i * 3, &[r(header, 16), w(data, piece as u32), w(status, 1)]),
            );
            heads.push(i * 3);
        }
        let seen = f.used_idx(0);
        f.offer(0, &heads);
        f.kick(0);
        for _ in 0..round * 20 {
            std::hint::spin_loop();
        }
        set_features(&mut f, FEATURES | F_LOG_ALL);
        set_address(&mut f, 0, true);
        let before = usize::from(f.used_idx(0).wrapping_sub(seen));
        let used = f.wait(0, 32);
        let marked = log.take();
        // Those whose completion was seen after the switch for certain.
        for (head, _) in &used[before..] {
            let data = DATA + u64::from(head / 3) * piece;
            assert!(marked.is_superset(&pages(data..data + piece)), "round {round}, head {head}");
        }
        set_address(&mut f, 0, false);
        set_features(&mut f, FEATURES);
        log.take();
    }
    drop(f);
    target.check();
}

#[test]
fn a_log_that_cannot_be_is_refused_and_one_too_small_harms_nobody() {
    let mut target = Target::writable();
    let log = Log::new();
    for (size, offset) in [(LOG + 1, 0), (LOG, 1), (u64::MAX, 0), (1, u64::MAX), (0, 0)] {
        let mut f = target.connect(FEATURES, 1, 16);
        f.send(SET_LOG_BASE, VERSION, &bytes_of(&[size, offset]), &[log.0.as_fd()]);
        assert!(f.reply().is_err(), "{size} bytes at {offset}");
    }
    let mut f = target.connect(FEATURES, 1, 16);
    f.send(SET_LOG_BASE, VERSION, &bytes_of(&[8, 8]), &[log.0.as_fd()]);
    f.reply().unwrap();
    set_features(&mut f, FEATURES | F_LOG_ALL);
    set_address(&mut f, 0, true);
    assert!(f.read(0, 8, 8192) == pattern()[8 * 512..][..8192]);
    assert!(log.take().is_empty());
    drop(f);
    target.check();
}

/// The addresses of a ring that runs can be told again, and not changed.
#[test]
fn ring_addresses_told_again_change_nothing() {
    let mut target = Target::writable();
    let mut f = target.connect(FEATURES, 1, 16);
    for log in [false, true, false] {
        set_address(&mut f, 0, log);
        assert!(f.read(0, 8, 4096) == pattern()[8 * 512..][..4096]);
    }
    drop(f);
    target.check();
}
