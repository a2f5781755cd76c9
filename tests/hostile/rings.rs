//! Rings that are wrong, and rings that are stopped, moved and cut off while they work.

use crate::frontend::*;
use crate::{SECTORS, Target, pattern};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

const NOTHING: Duration = Duration::from_millis(200);
/// Requests of a load: each is three descriptors of a ring of 1,024.
const LOAD: u16 = 300;
/// Bytes of each.
const PIECE: u32 = 16 << 10;

fn header_of(i: u16) -> u64 {
    HEADERS + u64::from(i) * 16
}

fn status_of(i: u16) -> u64 {
    STATUSES + u64::from(i)
}

fn data_of(i: u16) -> u64 {
    DATA + u64::from(i % 200) * u64::from(PIECE)
}

fn sector_of(i: u16) -> u64 {
    u64::from(i) * 37 % (SECTORS / 32) * 32
}

/// Puts `LOAD` reads into queue `q` and offers them; no kick.
fn load(f: &mut Frontend, q: usize) {
    for i in 0..LOAD {
        f.header(header_of(i), 0, sector_of(i));
        f.put(status_of(i), &[0xEE]);
        let chain = Frontend::chain(i * 3, &[r(header_of(i), 16), w(data_of(i), PIECE), w(status_of(i), 1)]);
        f.table(f.rings[q].desc(), i * 3, &chain);
    }
    let heads: Vec<u16> = (0..LOAD).map(|i| i * 3).collect();
    f.offer(q, &heads);
}

/// Each request of the load came back once, and well.
fn all_once(f: &Frontend, mut used: Vec<(u32, u32)>) {
    used.sort_unstable();
    let want: Vec<_> = (0..LOAD).map(|i| (u32::from(i) * 3, PIECE + 1)).collect();
    assert_eq!(used, want);
    for i in 0..LOAD {
        assert_eq!(f.get(status_of(i), 1), [0], "request {i}");
    }
}

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

#[test]
fn cold_reads_come_back() {
    let mut target = Target::writable();
    let old = pattern();
    for features in [FEATURES, FEATURES | F_EVENT_IDX] {
        let mut f = target.connect(features, 1, 1024);
        target.go_cold();
        load(&mut f, 0);
        f.kick(0);
        let used = f.wait(0, LOAD.into());
        all_once(&f, used);
        for i in LOAD - 200..LOAD {
            let at = sector_of(i) as usize * 512;
            assert!(f.get(data_of(i), PIECE as usize) == old[at..][..PIECE as usize], "request {i}");
        }
    }
    target.check();
    target.is_idle();
}

#[test]
fn heads_out_of_range_are_passed_over() {
    let mut target = Target::writable();
    let mut f = target.connect(FEATURES, 1, 64);
    f.header(HEADERS, 0, 0);
    f.table(f.rings[0].desc(), 0, &Frontend::chain(0, &[r(HEADERS, 16), w(DATA, 512), w(STATUSES, 1)]));
    f.offer(0, &[64, 0, 0xFFFF, 1000, 0]);
    f.kick(0);
    // The same head twice is two requests.
    assert_eq!(f.wait(0, 2), [(0, 513), (0, 513)]);
    assert!(f.wait_for(0, 1, NOTHING).is_empty());
    f.offer(0, &[0xFFFF; 64]);
    f.kick(0);
    assert!(f.wait_for(0, 1, NOTHING).is_empty());
    assert!(f.read(0, 0, 512) == pattern()[..512]);
    drop(f);
    target.check();
    target.is_idle();
}

#[test]
fn an_available_index_that_jumps_stops_its_queue_alone() {
    let mut target = Target::writable();
    for features in [FEATURES, FEATURES | F_EVENT_IDX] {
        for jump in [65u16, 1000, 0x8000, 0xFFFF] {
            let mut f = target.connect(features, 2, 64);
            f.read(0, 0, 512);
            f.set_avail_idx(0, f.rings[0].avail.wrapping_add(jump));
            for _ in 0..3 {
                f.kick(0);
                assert!(f.wait_for(0, 1, Duration::from_millis(30)).is_empty(), "jump of {jump}");
            }
            assert!(f.read(1, 8, 512) == pattern()[4096..4608], "the other queue");
            // The frontend starts the ring anew, and it works.
            f.set_avail_idx(0, f.rings[0].avail);
            let base = f.stop_ring(0);
            assert_eq!(base, f.rings[0].avail);
            f.start_ring(0, base);
            assert!(f.read(0, 8, 512) == pattern()[4096..4608], "jump of {jump}");
        }
    }
    target.check();
    target.is_idle();
}

#[test]
fn ring_addresses_that_cannot_be_are_refused() {
    let mut target = Target::writable();
    let end = USER + RAM + RAM_SIZE;
    let good = USER + RAM;
    for (desc, used, avail) in [
        (good + 1, good + 0xA000, good + 0x8000),
        (good + 8, good + 0xA000, good + 0x8000),
        (good, good + 0xA002, good + 0x8000),
        (good, good + 0xA000, good + 0x8001),
        (end, good + 0xA000, good + 0x8000),
        (good, end, good + 0x8000),
        (good, good + 0xA000, 0),
        (0, 0, 0),
        (!15, !15, !15),
    ] {
        let mut f = Frontend::bare(&target.socket, FEATURES);
        f.set32(SET_VRING_NUM, 0, 64);
        let body: Vec<u8> = [0, desc, used, avail, 0].iter().flat_map(|w: &u64| w.to_le_bytes()).collect();
        assert!(!matches!(f.ask(SET_VRING_ADDR, &body, &[]), Ok(0)), "{desc:#x} {used:#x} {avail:#x}");
    }
    // Parts that begin inside the memory and end outside; the frontend is told nothing, but nothing happens either.
    for (desc, used, avail) in
        [(end - 64, good + 0xA000, good + 0x8000), (good, end - 64, good + 0x8000), (good, good + 0xA000, end - 16)]
    {
        let mut f = Frontend::bare(&target.socket, FEATURES | F_EVENT_IDX);
        f.set32(SET_VRING_NUM, 0, 64);
        f.set(SET_VRING_ADDR, &[0, desc, used, avail, 0]);
        let kick = event();
        let _ = f.ask(SET_VRING_KICK, &[0; 8], &[kick.as_fd()]);
        let _ = f.ask(SET_VRING_ENABLE, &Frontend::body32(0, 1), &[]);
        f.put(avail - USER + 2, &64u16.to_le_bytes());
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        target.is_idle();
        assert_eq!(f.get(RAM + 0xA002, 2), [0, 0]);
    }
    target.check();
}

#[test]
fn queue_sizes_that_cannot_be_are_refused() {
    let mut target = Target::writable();
    for size in [0, 3, 100, 1023, 2048, 32768, 0x1_0000, 0x1_0001, 0x1_0040, u32::MAX] {
        let mut f = Frontend::bare(&target.socket, FEATURES);
        assert!(!matches!(f.ask(SET_VRING_NUM, &Frontend::body32(0, size), &[]), Ok(0)), "{size}");
    }
    for (request, index) in [(SET_VRING_NUM, 16), (SET_VRING_ENABLE, 16), (SET_VRING_BASE, u32::MAX)] {
        let mut f = Frontend::bare(&target.socket, FEATURES);
        assert!(!matches!(f.ask(request, &Frontend::body32(index, 1), &[]), Ok(0)), "ring {index}");
    }
    for size in [1, 2, 4, 1024] {
        let mut f = target.connect(FEATURES, 0, 0);
        f.add_ring(0, size);
        f.start_ring(0, 0);
        if size >= 4 {
            assert!(f.read(0, 0, 512) == pattern()[..512]);
        } else {
            f.table(f.rings[0].desc(), 0, &[r(HEADERS, 16)]);
            f.offer(0, &[0]);
            f.kick(0);
            assert_eq!(f.wait(0, 1), [(0, 0)]);
        }
    }
    target.check();
}

#[test]
fn a_ring_that_runs_cannot_be_changed() {
    let mut target = Target::writable();
    let mut f = target.connect(FEATURES, 1, 64);
    assert_ne!(f.ask(SET_VRING_BASE, &Frontend::body32(0, 7), &[]).unwrap(), 0);
    let ring = &f.rings[0];
    let addr = [USER + ring.desc(), USER + ring.used_ring(), USER + ring.avail_ring()];
    for changed in 0..3 {
        let mut addr = addr;
        addr[changed] += 0x1000;
        let body: Vec<u8> = [&[0], &addr[..], &[0]].concat().iter().flat_map(|w: &u64| w.to_le_bytes()).collect();
        assert_ne!(f.ask(SET_VRING_ADDR, &body, &[]).unwrap(), 0);
    }
    assert!(f.read(0, 0, 512) == pattern()[..512], "and goes on");
    drop(f);
    target.check();
}

/// The ring's memory goes away and comes back, as QEMU does it to change the size of a region.
#[test]
fn a_ring_without_memory_waits_for_it() {
    let mut target = Target::writable();
    for features in [FEATURES, FEATURES | F_EVENT_IDX] {
        let mut f = target.connect(features, 1, 1024);
        f.read(0, 0, 512);
        let message = Frontend::region_message(&f.ram);
        f.ok(REM_MEM_REG, &message, &[]);
        load(&mut f, 0);
        f.kick(0);
        assert!(f.wait_for(0, 1, NOTHING).is_empty());
        target.is_idle();
        let fd = f.ram.fd.try_clone().unwrap();
        f.ok(ADD_MEM_REG, &message, &[fd.as_fd()]);
        let used = f.wait(0, LOAD.into());
        all_once(&f, used);

        // The same with requests in flight.
        target.go_cold();
        load(&mut f, 0);
        f.kick(0);
        f.ok(REM_MEM_REG, &message, &[]);
        f.ok(ADD_MEM_REG, &message, &[fd.as_fd()]);
        let used = f.wait(0, LOAD.into());
        all_once(&f, used);
    }
    target.check();
}

#[test]
fn a_memory_table_replaced_under_load() {
    let mut target = Target::writable();
    let mut f = target.connect(FEATURES | F_EVENT_IDX, 1, 1024);
    for round in 0..20 {
        if round % 4 == 0 {
            target.go_cold();
        }
        load(&mut f, 0);
        f.kick(0);
        // A new file under the data region: requests in flight go on into the old one.
        f.data = Region::new(DATA, DATA_SIZE);
        f.share();
        let used = f.wait(0, LOAD.into());
        all_once(&f, used);
    }
    let message = Frontend::region_message(&f.data);
    f.ok(REM_MEM_REG, &message, &[]);
    load(&mut f, 0);
    f.kick(0);
    let used = f.wait(0, LOAD.into());
    assert!(used.iter().all(|(_, len)| *len == 1), "no data, but each has its error");
    assert!((0..LOAD).all(|i| f.get(status_of(i), 1) == [1]));
    drop(f);
    target.check();
}

#[test]
fn a_ring_disabled_and_enabled_under_load() {
    let mut target = Target::writable();
    let mut f = target.connect(FEATURES | F_EVENT_IDX, 1, 1024);
    for round in 0..20 {
        if round % 4 == 0 {
            target.go_cold();
        }
        load(&mut f, 0);
        f.kick(0);
        f.set32(SET_VRING_ENABLE, 0, 0);
        let at_stop = f.used_idx(0);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(f.used_idx(0), at_stop, "a ring that is off does nothing");
        // No kick: what was offered before is found.
        f.set32(SET_VRING_ENABLE, 0, 1);
        let used = f.wait(0, LOAD.into());
        all_once(&f, used);
    }
    drop(f);
    target.check();
}

#[test]
fn get_vring_base_under_load_loses_and_repeats_nothing() {
    let mut target = Target::writable();
    for features in [FEATURES, FEATURES | F_EVENT_IDX] {
        let mut f = target.connect(features, 1, 1024);
        for round in 0..20 {
            if round % 4 == 0 {
                target.go_cold();
            }
            load(&mut f, 0);
            f.kick(0);
            if round % 2 == 0 {
                std::thread::sleep(Duration::from_micros(round * 50));
            }
            let base = f.stop_ring(0);
            assert_eq!(f.used_idx(0), base, "all that was taken is done");
            std::thread::sleep(Duration::from_millis(1));
            assert_eq!(f.used_idx(0), base, "and nothing comes after");
            f.start_ring(0, base);
            let used = f.wait(0, LOAD.into());
            all_once(&f, used);
        }
        assert_eq!(f.stop_ring(0), f.rings[0].avail);
    }
    target.check();
}

#[test]
fn reset_under_load_drains() {
    let mut target = Target::writable();
    let mut f = target.connect(FEATURES, 2, 1024);
    target.go_cold();
    load(&mut f, 0);
    f.kick(0);
    f.ok(RESET_DEVICE, &[], &[]);
    let used = f.used_idx(0);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(f.used_idx(0), used, "nothing comes after");
    f.set(SET_FEATURES, &[FEATURES]);
    f.start_ring(0, used);
    let used = f.wait(0, LOAD.into());
    all_once(&f, used);
    drop(f);
    target.check();
}

/// As QEMU does it without an inflight region: it goes on from the used index, in the same memory.
#[test]
fn a_connection_lost_under_load_is_taken_up_again() {
    let mut target = Target::writable();
    let mut f = target.connect(FEATURES | F_EVENT_IDX, 1, 1024);
    for round in 0..20 {
        if round % 4 == 0 {
            target.go_cold();
        }
        load(&mut f, 0);
        f.kick(0);
        // The next connection is accepted once the last has drained, so the used index is final then.
        f.reconnect(&target.socket, FEATURES | F_EVENT_IDX);
        let base = f.used_idx(0);
        f.start_ring(0, base);
        let used = f.wait(0, LOAD.into());
        all_once(&f, used);
    }
    drop(f);
    for _ in 0..20 {
        let mut f = target.connect(FEATURES, 1, 1024);
        target.go_cold();
        load(&mut f, 0);
        f.kick(0);
    }
    target.check();
    target.is_idle();
}

#[test]
fn kick_descriptors_that_are_none() {
    let mut target = Target::writable();
    let file = std::fs::File::open(&target.file).unwrap();
    let zero = std::fs::File::open("/dev/zero").unwrap();
    for fd in [file.as_fd(), zero.as_fd()] {
        let mut f = target.connect(FEATURES, 0, 0);
        f.add_ring(0, 64);
        f.start_ring(0, 0);
        assert!(!matches!(f.ask(SET_VRING_KICK, &[0; 8], &[fd]), Ok(0)));
    }
    let (read, write) = rustix::pipe::pipe().unwrap();
    let (socket, other) = std::os::unix::net::UnixStream::pair().unwrap();
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let watched = event();
    rustix::io::write(&watched, &1u64.to_ne_bytes()).unwrap();
    let data = rustix::event::epoll::EventData::new_u64(0);
    rustix::event::epoll::add(&epoll, &watched, data, rustix::event::epoll::EventFlags::IN).unwrap();
    // What can be emptied will do.
    for (fd, end) in [(read.as_fd(), write.as_fd()), (socket.as_fd(), other.as_fd())] {
        let mut f = target.connect(FEATURES, 1, 64);
        f.ok(SET_VRING_KICK, &[0; 8], &[fd]);
        f.header(HEADERS, 0, 0);
        f.table(f.rings[0].desc(), 0, &Frontend::chain(0, &[r(HEADERS, 16), w(DATA, 512), w(STATUSES, 1)]));
        f.offer(0, &[0]);
        rustix::io::write(end, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(f.wait(0, 1), [(0, 513)]);
    }
    let mut f = target.connect(FEATURES, 1, 64);
    f.ok(SET_VRING_KICK, &[0; 8], &[read.as_fd()]);
    drop(write);
    target.is_idle();
    f.ok(SET_VRING_KICK, &[0; 8], &[socket.as_fd()]);
    drop(other);
    target.is_idle();
    f.ok(SET_VRING_KICK, &[0; 8], &[epoll.as_fd()]);
    target.is_idle();
    // Two that block, of which the frontend takes the kick away again.
    let kick = event();
    f.ok(SET_VRING_KICK, &[0; 8], &[kick.as_fd()]);
    for _ in 0..1000 {
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        let _ = rustix::io::read(&kick, &mut [0u8; 8][..]);
    }
    // And polling mode is refused.
    assert!(!matches!(f.ask(SET_VRING_KICK, &0x100u64.to_le_bytes(), &[]), Ok(0)));
    drop(f);
    target.check();
    target.is_idle();
}

#[test]
fn call_descriptors_that_take_nothing() {
    let mut target = Target::writable();
    let full = event();
    rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let (_read, pipe) = rustix::pipe::pipe().unwrap();
    let filler = pipe.try_clone().unwrap();
    rustix::fs::fcntl_setfl(&filler, rustix::fs::OFlags::NONBLOCK).unwrap();
    while rustix::io::write(&filler, &[0; 4096]).is_ok() {}
    rustix::fs::fcntl_setfl(&filler, rustix::fs::OFlags::empty()).unwrap();
    let (closed, broken) = rustix::pipe::pipe().unwrap();
    drop(closed);
    for (name, fd) in [("full eventfd", full.as_fd()), ("full pipe", pipe.as_fd()), ("closed pipe", broken.as_fd())] {
        let mut f = target.connect(FEATURES, 1, 64);
        f.ok(SET_VRING_CALL, &[0; 8], &[fd]);
        for i in 0..3 {
            f.header(HEADERS, 0, 0);
            f.table(f.rings[0].desc(), 0, &Frontend::chain(0, &[r(HEADERS, 16), w(DATA, 512), w(STATUSES, 1)]));
            f.offer(0, &[0]);
            f.kick(0);
            let deadline = std::time::Instant::now() + Duration::from_secs(5);
            while f.used_idx(0) != i + 1 {
                assert!(std::time::Instant::now() < deadline, "{name}");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        assert_eq!(f.stop_ring(0), 3, "{name}");
    }
    target.check();
}

#[test]
fn a_second_connection_waits_for_the_first_to_end() {
    let mut target = Target::writable();
    let mut first = target.connect(FEATURES, 1, 64);
    let waiting = std::thread::spawn({
        let socket = target.socket.clone();
        move || Frontend::connect(&socket, FEATURES, 1, 64).read(0, 8, 512)
    });
    for _ in 0..20 {
        assert!(first.read(0, 0, 512) == pattern()[..512]);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(!waiting.is_finished());
    drop(first);
    assert!(waiting.join().unwrap() == pattern()[4096..4608]);
    target.check();
}
