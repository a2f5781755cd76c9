//! Recovery: servers that are killed with requests in flight, every state that a crash can leave in the inflight region,
//! and regions that no server ever wrote.

use crate::frontend::*;
use crate::random::Rng;
use crate::{DISK, Target, pattern};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

const INFLIGHT_SHMFD: u64 = 1 << 12;
const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;

/// Nothing comes within this time.
const NOTHING: Duration = Duration::from_millis(30);

/// Request types.
const READ: u32 = 0;
const WRITE_TO: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;

/// Fields of the header of a queue's part, and of an entry (QEMU docs/interop/vhost-user.rst).
const VERSION_AT: usize = 8;
const ENTRIES: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;

fn entry(head: u16) -> usize {
    16 + 16 * usize::from(head)
}

/// As the frontend keeps it.
struct Shared {
    fd: OwnedFd,
    base: *mut u8,
    size: usize,
    queues: u16,
    queue_size: u16,
}

// SAFETY: shared memory of a test; every access is a raw copy.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(fd: OwnedFd, size: usize, queues: u16, queue_size: u16) -> Shared {
        // SAFETY: a fresh mapping at an address that the kernel chooses.
        let base =
            unsafe { mmap(std::ptr::null_mut(), size, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &fd, 0) };
        Shared { fd, base: base.unwrap().cast(), size, queues, queue_size }
    }

    fn put(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.size);
        // SAFETY: within the mapping, as was just checked.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base.add(at), bytes.len()) };
    }

    fn put16(&self, at: usize, value: u16) {
        self.put(at, &value.to_ne_bytes());
    }

    fn get16(&self, at: usize) -> u16 {
        assert!(at + 2 <= self.size);
        // SAFETY: within the mapping, as was just checked.
        unsafe { self.base.add(at).cast::<u16>().read_volatile() }
    }

    fn mark(&self, head: u16, counter: u64) {
        self.put(entry(head) + 8, &counter.to_ne_bytes());
        self.put(entry(head), &[1]);
    }

    /// Heads of the first queue that are in flight.
    fn marked(&self) -> Vec<u16> {
        (0..self.queue_size).filter(|head| self.get16(entry(*head)) as u8 == 1).collect()
    }

    /// A part in use, with nothing in flight.
    fn clear(&self, used: u16) {
        self.put(0, &vec![0; self.size]);
        self.put16(VERSION_AT, 1);
        self.put16(ENTRIES, self.queue_size);
        self.put16(USED_IDX, used);
    }

    fn message(&self) -> Vec<u8> {
        description(self.size as u64, 0, self.queues, self.queue_size)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping after its owner is gone.
        unsafe { munmap(self.base.cast(), self.size) }.unwrap();
    }
}

fn description(size: u64, offset: u64, queues: u16, queue_size: u16) -> Vec<u8> {
    let mut body = [size.to_le_bytes(), offset.to_le_bytes()].concat();
    body.extend(queues.to_le_bytes());
    body.extend(queue_size.to_le_bytes());
    // With the padding that QEMU's structure has.
    body.extend([0; 4]);
    body
}

/// Acknowledges the feature on a connection that was made without it.
fn acknowledge(f: &mut Frontend) {
    f.set(SET_PROTOCOL_FEATURES, &[PROTOCOL | INFLIGHT_SHMFD]);
}

/// GET_INFLIGHT_FD, with what QEMU checks of the answer.
fn get(f: &mut Frontend, queues: u16, queue_size: u16) -> Shared {
    f.send(GET_INFLIGHT_FD, VERSION, &description(0, 0, queues, queue_size), &[]);
    let mut header = [0; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(&f.stream, &mut [IoSliceMut::new(&mut header)], &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    assert_eq!(got.bytes, 12);
    let fd = control
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .unwrap();
    assert_eq!(header[..4], GET_INFLIGHT_FD.to_le_bytes());
    assert_eq!(header[8..], 24u32.to_le_bytes(), "QEMU refuses any other size");
    let mut body = [0; 24];
    f.stream.read_exact(&mut body).unwrap();
    let size = u64::from_le_bytes(body[..8].try_into().unwrap());
    assert_eq!(body[8..16], [0; 8]);
    assert_eq!(body[16..20], [queues.to_le_bytes(), queue_size.to_le_bytes()].concat());
    assert!(size >= u64::from(queues) * (16 + 16 * u64::from(queue_size)));
    Shared::new(fd, size as usize, queues, queue_size)
}

fn set(f: &mut Frontend, shared: &Shared) {
    f.ok(SET_INFLIGHT_FD, &shared.message(), &[shared.fd.as_fd()]);
}

/// A connection with a region of its own; no ring runs.
fn tracked(target: &Target, queue_size: u16) -> (Frontend, Shared) {
    let mut f = Frontend::bare(&target.socket, FEATURES);
    acknowledge(&mut f);
    let shared = get(&mut f, 1, queue_size);
    assert!(shared.marked().is_empty());
    assert_eq!(shared.get16(VERSION_AT), 0, "not used yet");
    set(&mut f, &shared);
    f.add_ring(0, queue_size);
    (f, shared)
}

fn take_up(f: &mut Frontend, socket: &Path, shared: &Shared) {
    f.reconnect(socket, FEATURES);
    acknowledge(f);
    set(f, shared);
}

/// Three descriptors of request `i`; its head is `3 * i`.
fn request(f: &Frontend, i: u16, kind: u32, sector: u64, data: u64, len: u32) -> u16 {
    let (header, status) = (HEADERS + u64::from(i) * 16, STATUSES + u64::from(i));
    f.header(header, kind, sector);
    f.put(status, &[0xEE]);
    let data = if kind == WRITE_TO { r(data, len) } else { w(data, len) };
    let chain = match kind {
        FLUSH => Frontend::chain(i * 3, &[r(header, 16), w(status, 1)]),
        _ => Frontend::chain(i * 3, &[r(header, 16), data, w(status, 1)]),
    };
    f.table(f.rings[0].desc(), i * 3, &chain);
    i * 3
}

/// A request that ends where it is started, so that used heads tell the order of starting.
fn get_id(f: &Frontend, i: u16) -> u16 {
    request(f, i, GET_ID, 0, DATA + u64::from(i) * 64, 20)
}

fn heads(used: &[(u32, u32)]) -> Vec<u16> {
    used.iter().map(|(head, _)| *head as u16).collect()
}

/// Puts the ring where it is after `used` requests: the driver has seen that many, and has offered these heads since.
fn wind(f: &mut Frontend, used: u16, offered: &[u16]) {
    f.rings[0].avail = used;
    f.rings[0].seen = used;
    let at = f.rings[0].used_ring() + 2;
    f.put(at, &used.to_le_bytes());
    f.offer(0, offered);
}

/// Puts a head into the used ring, without moving its index.
fn publish(f: &Frontend, idx: u16, head: u16) {
    let ring = &f.rings[0];
    let at = ring.used_ring() + 4 + u64::from(idx % ring.size) * 8;
    f.put(at, &[u32::from(head).to_le_bytes(), 21u32.to_le_bytes()].concat());
}

/// What a server does between two instants at which it can be killed.
type Step = Box<dyn Fn(&Frontend, &Shared)>;

/// Publishing a batch, store by store.
fn steps(start: u16, batch: &'static [u16]) -> Vec<Step> {
    let mut steps: Vec<Step> = vec![Box::new(|_, _| {})];
    for head in batch {
        steps.push(Box::new(|_, s| s.put16(entry(*head) + 6, s.get16(LAST_BATCH_HEAD))));
        steps.push(Box::new(|_, s| s.put16(LAST_BATCH_HEAD, *head)));
    }
    for (i, head) in batch.iter().enumerate() {
        steps.push(Box::new(move |f, _| publish(f, start.wrapping_add(i as u16), *head)));
    }
    steps.push(Box::new(move |f, _| {
        f.put(f.rings[0].used_ring() + 2, &start.wrapping_add(batch.len() as u16).to_le_bytes());
    }));
    for head in batch {
        steps.push(Box::new(|_, s| s.put(entry(*head), &[0])));
    }
    steps.push(Box::new(move |_, s| s.put16(USED_IDX, start.wrapping_add(batch.len() as u16))));
    steps
}

/// The driver offered requests 4, 2, 7, 1, 5 and 3; the server took four of them. It is killed after each store of
/// publishing a batch.
#[test]
fn every_state_of_publishing_a_batch() {
    let mut target = Target::writable();
    for used in [0u16, 1000, 65534] {
        for batch in [&[6u16][..], &[12], &[3, 21], &[12, 6, 21, 3]] {
            let steps = steps(used, batch);
            for killed_after in 0..steps.len() {
                let (mut f, shared) = tracked(&target, 64);
                let offered: Vec<u16> = [4, 2, 7, 1, 5, 3].iter().map(|i| get_id(&f, *i)).collect();
                wind(&mut f, used, &offered);
                shared.clear(used);
                // A head of an earlier batch, noted as a whole.
                shared.put16(LAST_BATCH_HEAD, 9);
                for (counter, head) in (70u64..).zip(&offered[..4]) {
                    shared.mark(*head, counter);
                }
                for step in &steps[..=killed_after] {
                    step(&f, &shared);
                }
                let published = f.used_idx(0) != used;
                let left: Vec<u16> =
                    offered.iter().copied().filter(|head| !(published && batch.contains(head))).collect();
                let base = used.wrapping_add(3);
                f.start_ring(0, base);
                let case = format!("used {used}, batch {batch:?}, killed after {killed_after}");
                let was = if published { batch.len() } else { 0 };
                let got = heads(&f.wait(0, 6));
                assert_eq!(got[was..], left, "{case}");
                assert!(f.wait_for(0, 1, Duration::from_millis(2)).is_empty(), "{case}");
                assert_eq!(f.stop_ring(0), used.wrapping_add(6), "{case}");
                assert_eq!(f.used_idx(0), used.wrapping_add(6), "{case}");
                assert!(shared.marked().is_empty(), "{case}");
                assert_eq!(shared.get16(USED_IDX), used.wrapping_add(6), "{case}");
            }
        }
    }
    target.check();
    target.is_idle();
}

/// The counters tell the order, not the place in the table; a head whose counter is set and that is not marked was not
/// taken.
#[test]
fn every_state_of_taking() {
    let mut target = Target::writable();
    for taken in 0..=5usize {
        for half in [false, true] {
            let (mut f, shared) = tracked(&target, 64);
            let offered: Vec<u16> = [9, 0, 5, 1, 8].iter().map(|i| get_id(&f, *i)).collect();
            wind(&mut f, 500, &offered);
            shared.clear(500);
            for (counter, head) in (u64::MAX / 2..).zip(&offered[..taken]) {
                shared.mark(*head, counter);
            }
            if half && taken < 5 {
                shared.put(entry(offered[taken]) + 8, &u64::MAX.to_ne_bytes());
            }
            f.start_ring(0, 0);
            assert_eq!(heads(&f.wait(0, 5)), offered, "{taken} {half}");
            // And it goes on from there: what is taken next has a counter above all.
            f.offer(0, &offered);
            f.kick(0);
            assert_eq!(heads(&f.wait(0, 5)), offered);
            assert!(shared.marked().is_empty());
        }
    }
    target.check();
}

/// A region that was being set up counts for nothing; the base is the frontend's then, the used index the ring's.
#[test]
fn every_state_of_the_first_start() {
    let mut target = Target::writable();
    for step in 0..4 {
        let (mut f, shared) = tracked(&target, 64);
        let offered: Vec<u16> = [2, 0, 1].iter().map(|i| get_id(&f, *i)).collect();
        wind(&mut f, 300, &offered);
        if step > 0 {
            shared.mark(30, 5);
        }
        if step > 1 {
            shared.put16(ENTRIES, 64);
        }
        if step > 2 {
            shared.put16(USED_IDX, 77);
        }
        f.start_ring(0, 300);
        assert_eq!(heads(&f.wait(0, 3)), offered, "{step}");
        assert!(f.wait_for(0, 1, NOTHING).is_empty());
        assert_eq!((shared.get16(VERSION_AT), shared.get16(ENTRIES), shared.get16(USED_IDX)), (1, 64, 303));
        assert!(shared.marked().is_empty());
    }
    target.check();
}

/// Requests of one round: each writes or reads 8 KiB of its own.
const LOAD: u16 = 300;
const PIECE: usize = 8 << 10;

fn content(round: u64, i: u16) -> Vec<u8> {
    (0..PIECE).map(|at| (round * 31 + u64::from(i) * 7 + at as u64 / 512) as u8).collect()
}

#[test]
fn killed_with_requests_in_flight_each_ends_once() {
    let mut target = Target::writable();
    let (mut f, shared) = tracked(&target, 1024);
    f.start_ring(0, 0);
    let mut disk = pattern();
    let mut rng = Rng::new(42);
    let (mut in_flight, mut rounds_with) = (0, 0);
    for round in 0..60u64 {
        // Some writes, some reads of what earlier rounds wrote, some flushes, all mixed.
        let mut offered = Vec::new();
        let mut kinds = Vec::new();
        for i in 0..LOAD {
            let kind = [READ, WRITE_TO, WRITE_TO, FLUSH][rng.below(4) as usize];
            let data = DATA + u64::from(i) * PIECE as u64;
            let at = usize::from(i) * PIECE;
            match kind {
                WRITE_TO => f.put(data, &content(round, i)),
                _ => f.put(data, &[0xA5; PIECE]),
            }
            offered.push(request(&f, i, kind, at as u64 / 512, data, PIECE as u32));
            kinds.push(kind);
        }
        f.offer(0, &offered);
        f.kick(0);
        std::thread::sleep(Duration::from_micros(rng.below(4000)));
        target.kill_and_start();
        let marked = shared.marked().len();
        in_flight += marked;
        rounds_with += usize::from(marked > 0);
        take_up(&mut f, &target.socket, &shared);
        // What QEMU says here is not to be trusted.
        f.start_ring(0, rng.next() as u16);
        let mut got = heads(&f.wait(0, LOAD.into()));
        got.sort_unstable();
        assert_eq!(got, offered, "round {round}, {marked} in flight");
        for (i, kind) in (0..LOAD).zip(kinds) {
            assert_eq!(f.get(STATUSES + u64::from(i), 1), [0], "round {round}, request {i}");
            let at = usize::from(i) * PIECE;
            match kind {
                READ => assert!(f.get(DATA + at as u64, PIECE) == disk[at..][..PIECE], "round {round}, request {i}"),
                WRITE_TO => disk[at..][..PIECE].copy_from_slice(&content(round, i)),
                _ => {}
            }
        }
        assert!(f.wait_for(0, 1, Duration::from_millis(1)).is_empty());
        assert!(shared.marked().is_empty());
    }
    assert!(disk.len() == DISK && target.content() == disk);
    println!("{in_flight} requests in flight at {rounds_with} of 60 kills");
    assert!(rounds_with > 5, "{in_flight} requests in {rounds_with} rounds: too few to show anything");
    drop(f);
    target.check();
}

/// The same without a kill: the server lives, and the connection breaks.
#[test]
fn several_connections_in_a_row() {
    let mut target = Target::writable();
    let (mut f, shared) = tracked(&target, 1024);
    f.start_ring(0, 0);
    for round in 0..20u64 {
        let offered: Vec<u16> = (0..LOAD)
            .map(|i| {
                let kind = if i % 5 == 0 { FLUSH } else { READ };
                request(&f, i, kind, u64::from(i) * 16, DATA + u64::from(i) * PIECE as u64, PIECE as u32)
            })
            .collect();
        f.offer(0, &offered);
        f.kick(0);
        std::thread::sleep(Duration::from_micros(round * 100));
        take_up(&mut f, &target.socket, &shared);
        f.start_ring(0, 12345);
        let mut got = heads(&f.wait(0, LOAD.into()));
        got.sort_unstable();
        assert_eq!(got, offered, "round {round}");
        if round % 4 == 0 {
            let base = f.stop_ring(0);
            assert_eq!((base, shared.get16(USED_IDX)), (f.used_idx(0), f.used_idx(0)));
            f.start_ring(0, base);
        }
    }
    // Published by one that was killed before it told: the next one tells without being asked.
    target.kill_and_start();
    take_up(&mut f, &target.socket, &shared);
    let _ = rustix::io::read(&f.rings[0].call, &mut [0u8; 8][..]);
    f.start_ring(0, 0);
    let mut told = [0u8; 8];
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    while rustix::io::read(&f.rings[0].call, &mut told[..]).is_err() {
        assert!(std::time::Instant::now() < deadline, "nobody told the guest to look");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(f);
    target.check();
    target.is_idle();
}

/// A flush goes to a thread, GET_ID ends at once: they end in another order than they were offered in.
#[test]
fn without_a_region_completions_keep_their_order() {
    let mut target = Target::writable();
    for region in [false, true] {
        let mut f = Frontend::bare(&target.socket, FEATURES);
        acknowledge(&mut f);
        let shared = get(&mut f, 1, 256);
        if region {
            set(&mut f, &shared);
        }
        f.add_ring(0, 256);
        f.start_ring(0, 0);
        let mut kept = true;
        for _ in 0..20 {
            let offered: Vec<u16> =
                (0..60).map(|i| if i % 7 == 0 { request(&f, i, FLUSH, 0, 0, 0) } else { get_id(&f, i) }).collect();
            f.offer(0, &offered);
            f.kick(0);
            let got = heads(&f.wait(0, 60));
            kept &= got == offered;
        }
        assert_eq!(kept, !region, "with a region it need not be kept, or this shows nothing");
    }
    target.check();
    target.is_idle();
}

/// A server without a region that is killed: the ring goes on at its used index, and nothing is lost or comes twice.
#[test]
fn killed_without_a_region() {
    let mut target = Target::writable();
    let mut f = target.connect(FEATURES, 1, 1024);
    let mut rng = Rng::new(7);
    for round in 0..30 {
        let offered: Vec<u16> = (0..LOAD)
            .map(|i| {
                let kind = if i % 3 == 0 { FLUSH } else { READ };
                request(&f, i, kind, u64::from(i) * 16, DATA + u64::from(i) * PIECE as u64, PIECE as u32)
            })
            .collect();
        f.offer(0, &offered);
        f.kick(0);
        std::thread::sleep(Duration::from_micros(rng.below(3000)));
        target.kill_and_start();
        f.reconnect(&target.socket, FEATURES);
        let base = f.used_idx(0);
        f.start_ring(0, base);
        assert_eq!(heads(&f.wait(0, LOAD.into())), offered, "round {round}");
    }
    drop(f);
    target.check();
}

fn memfd(size: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("region", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

#[test]
fn regions_that_cannot_be_are_refused() {
    let mut target = Target::writable();
    let size = 2048u64;
    let (shrink, none) = (SealFlags::SHRINK, SealFlags::empty());
    let disk = OwnedFd::from(std::fs::File::options().read(true).write(true).open(&target.file).unwrap());
    let null = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
    let (pipe, _other) = rustix::pipe::pipe().unwrap();
    let written = |at: usize, bytes: &[u8]| {
        let fd = memfd(size, shrink);
        rustix::io::pwrite(&fd, bytes, at as u64).unwrap();
        fd
    };
    let good = description(size, 0, 1, 64);
    let cases: Vec<(&str, OwnedFd, Vec<u8>)> = vec![
        ("may be truncated", memfd(size, none), good.clone()),
        ("sealed against writing", memfd(size, shrink | SealFlags::WRITE), good.clone()),
        ("a file", disk, good.clone()),
        ("a device", null, good.clone()),
        ("a pipe", pipe, good.clone()),
        ("too short a file", memfd(512, shrink), good.clone()),
        ("too small", memfd(size, shrink), description(512, 0, 1, 64)),
        ("nothing", memfd(size, shrink), description(0, 0, 1, 64)),
        ("an offset past the end", memfd(size, shrink), description(size, 4096, 1, 64)),
        ("an odd offset", memfd(2 * size, shrink), description(size, 8, 1, 64)),
        ("an offset that wraps", memfd(size, shrink), description(size, u64::MAX - 63, 1, 64)),
        ("a size that wraps", memfd(size, shrink), description(u64::MAX, 64, 1, 64)),
        ("too many queues", memfd(1 << 20, shrink), description(1 << 20, 0, 500, 64)),
        ("no queue", memfd(size, shrink), description(size, 0, 0, 64)),
        ("no entry", memfd(size, shrink), description(size, 0, 1, 0)),
        ("no power of two", memfd(size, shrink), description(size, 0, 1, 63)),
        ("too many entries", memfd(1 << 20, shrink), description(1 << 20, 0, 1, 2048)),
        ("another version", written(VERSION_AT, &2u16.to_ne_bytes()), good.clone()),
        ("features", written(0, &[1, 0, 0, 0, 0, 0, 0, 0, 1, 0, 64, 0]), good.clone()),
        ("other entries", written(VERSION_AT, &[1, 0, 32, 0]), good.clone()),
    ];
    for (name, fd, body) in &cases {
        let mut f = Frontend::bare(&target.socket, FEATURES);
        acknowledge(&mut f);
        assert!(!matches!(f.ask(SET_INFLIGHT_FD, body, &[fd.as_fd()]), Ok(0)), "{name}");
    }
    for (queues, queue_size) in [(0, 64), (500, 64), (1, 0), (1, 63), (1, 2048), (u16::MAX, u16::MAX)] {
        let mut f = Frontend::bare(&target.socket, FEATURES);
        acknowledge(&mut f);
        f.send(GET_INFLIGHT_FD, VERSION, &description(0, 0, queues, queue_size), &[]);
        assert!(f.reply().is_err(), "{queues} {queue_size}");
    }
    // No descriptor, two of them, and none of it negotiated.
    let fd = memfd(size, shrink);
    for fds in [&[][..], &[fd.as_fd(), fd.as_fd()]] {
        let mut f = Frontend::bare(&target.socket, FEATURES);
        acknowledge(&mut f);
        assert!(!matches!(f.ask(SET_INFLIGHT_FD, &good, fds), Ok(0)));
    }
    let mut f = Frontend::bare(&target.socket, FEATURES);
    assert!(!matches!(f.ask(SET_INFLIGHT_FD, &good, &[fd.as_fd()]), Ok(0)));
    // A ring that has more entries than the region, a ring that the region has no part for, a region that comes too late.
    let (mut f, _shared) = tracked(&target, 64);
    f.rings[0].size = 128;
    assert!(start(&mut f).is_err());
    let (mut f, _shared) = tracked(&target, 64);
    f.rings[0].index = 1;
    assert!(start(&mut f).is_err());
    let (mut f, shared) = tracked(&target, 64);
    f.start_ring(0, 0);
    assert!(!matches!(f.ask(SET_INFLIGHT_FD, &shared.message(), &[shared.fd.as_fd()]), Ok(0)));
    drop(f);
    target.check();
    target.is_idle();
}

/// Starts ring 0 as QEMU does; an error when it is refused.
fn start(f: &mut Frontend) -> Result<(), ()> {
    let (ring, kick) = (&f.rings[0], f.rings[0].kick.try_clone().unwrap());
    let (index, size) = (ring.index, u32::from(ring.size));
    let addr = [u64::from(index), USER + ring.desc(), USER + ring.used_ring(), USER + ring.avail_ring(), 0];
    let addr: Vec<u8> = addr.iter().flat_map(|w| w.to_le_bytes()).collect();
    let index64 = u64::from(index).to_le_bytes();
    let one = Frontend::body32(index, 1);
    let num = Frontend::body32(index, size);
    let messages: [(u32, &[u8], &[BorrowedFd<'_>]); 4] = [
        (SET_VRING_NUM, &num, &[]),
        (SET_VRING_ADDR, &addr, &[]),
        (SET_VRING_KICK, &index64, &[kick.as_fd()]),
        (SET_VRING_ENABLE, &one, &[]),
    ];
    for (request, body, fds) in messages {
        if !matches!(f.ask(request, body, fds), Ok(0)) {
            return Err(());
        }
    }
    Ok(())
}

#[test]
fn a_region_of_garbage_hangs_and_breaks_nothing() {
    let mut target = Target::writable();
    let mut rng = Rng::new(99);
    for round in 0..150 {
        let (mut f, shared) = tracked(&target, 64);
        let offered: Vec<u16> = (0..10).map(|i| get_id(&f, i)).collect();
        let used = rng.next() as u16;
        wind(&mut f, used, &offered);
        let garbage: Vec<u8> = (0..shared.size).map(|_| rng.next() as u8 >> (round % 8)).collect();
        shared.put(0, &garbage);
        shared.put(0, &[0; 8]);
        shared.put16(VERSION_AT, 1);
        shared.put16(ENTRIES, 64);
        // A list that bites its own tail, of every length.
        for head in 0..64 {
            shared.put16(entry(head) + 6, rng.below(64) as u16);
        }
        shared.put16(LAST_BATCH_HEAD, rng.below(80) as u16);
        shared.put16(USED_IDX, used.wrapping_sub(rng.below(80) as u16));
        f.start_ring(0, used);
        for (head, _) in f.wait_for(0, 64, Duration::from_millis(5)) {
            assert!(head < 64);
        }
        f.stop_ring(0);
    }
    // More in flight than the driver has offered: nothing is started, the rest of the server goes on.
    let (mut f, shared) = tracked(&target, 64);
    wind(&mut f, 10, &[]);
    shared.clear(10);
    let head = get_id(&f, 1);
    shared.mark(head, 1);
    f.start_ring(0, 10);
    assert!(f.wait_for(0, 1, NOTHING).is_empty());
    drop(f);
    target.check();
    target.is_idle();
}

#[test]
fn a_region_that_is_scribbled_on_loses_nothing() {
    let mut target = Target::writable();
    let (mut f, shared) = tracked(&target, 1024);
    f.start_ring(0, 0);
    // What the server finds at the start it believes; from here on it only writes.
    let head = get_id(&f, 0);
    f.offer(0, &[head]);
    f.kick(0);
    f.wait(0, 1);
    let shared = std::sync::Arc::new(shared);
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let scribbler = std::thread::spawn({
        let (shared, stop) = (shared.clone(), stop.clone());
        move || {
            let mut rng = Rng::new(3);
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                shared.put(rng.below(shared.size as u64) as usize, &[rng.next() as u8]);
            }
        }
    });
    for _ in 0..20 {
        let offered: Vec<u16> =
            (0..LOAD).map(|i| if i % 5 == 0 { request(&f, i, FLUSH, 0, 0, 0) } else { get_id(&f, i) }).collect();
        f.offer(0, &offered);
        f.kick(0);
        let mut got = heads(&f.wait(0, LOAD.into()));
        got.sort_unstable();
        assert_eq!(got, offered);
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    scribbler.join().unwrap();
    drop(f);
    target.check();
}
