//! A queue that has to stop while the host's disk hangs: QEMU waits for the answer, the guest and its monitor with it.

use crate::common::{Bench, Server, signal, text, wait};
use crate::frontend::*;
use crate::hanging::Hanging;
use crate::support::{Mount, pattern};
use std::time::{Duration, Instant};

const DISK: usize = 4 << 20;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const OK: u8 = 0;
const IOERR: u8 = 1;
const PENDING: u8 = 0xEE;
/// Longer than a server takes with --drain-timeout 1, and a hint if the machine is slow: nothing here is timed.
const LIMIT: Duration = Duration::from_secs(60);

/// A disk that can hang, and its server.
struct Place {
    disk: Hanging,
    server: Server,
    _bench: Bench,
}

fn place() -> Place {
    let bench = Bench::new();
    let disk = Hanging::new(&bench.path("disk"), pattern(1, DISK));
    let server = bench.serve(&["--blk-file", text(&disk.path), "--drain-timeout", "1"]);
    Place { disk, server, _bench: bench }
}

impl Place {
    fn frontend(&self, queues: u32) -> Frontend {
        let f = Frontend::connect(&self.server.socket, FEATURES, queues, 64);
        f.stream.set_read_timeout(Some(LIMIT)).unwrap();
        f
    }

    /// The log so far, once the server has been ended.
    fn log_of(mut server: Server) -> String {
        use std::io::Read;
        let mut log = String::new();
        server.child.kill().unwrap();
        server.child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        log
    }
}

/// Waits until the socket is gone, which is the last thing that a server does.
fn gone(server: &Server) {
    let deadline = Instant::now() + LIMIT;
    while server.socket.exists() {
        assert!(Instant::now() < deadline, "the socket is still there");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Where request `n` of queue `q` has its status byte and its data.
fn status_of(q: usize, n: u16) -> u64 {
    STATUSES + q as u64 * 64 + u64::from(n)
}

fn data_of(q: usize, n: u16) -> u64 {
    DATA + (q as u64 * 16 + u64::from(n)) * (64 << 10)
}

/// Offers request `n` and kicks; its buffer holds `fill`.
fn submit(f: &mut Frontend, q: usize, n: u16, kind: u32, sector: u64, len: u32, fill: u8) {
    let (header, status) = (HEADERS + q as u64 * 1024 + u64::from(n) * 16, status_of(q, n));
    f.header(header, kind, sector);
    f.put(status, &[PENDING]);
    let data = data_of(q, n);
    f.put(data, &vec![fill; len as usize]);
    let middle = if kind != OUT { w(data, len) } else { r(data, len) };
    let descs = if len == 0 { vec![r(header, 16), w(status, 1)] } else { vec![r(header, 16), middle, w(status, 1)] };
    let table = f.rings[q].desc();
    f.table(table, n * 4, &Frontend::chain(n * 4, &descs));
    f.offer(q, &[n * 4]);
    f.kick(q);
}

fn status(f: &Frontend, q: usize, n: u16) -> u8 {
    f.get(status_of(q, n), 1)[0]
}

/// The read comes back as an I/O error in time; what the kernel copies later does not reach the guest's memory, on none of
/// the queues; and when the disk answers again, so does vmar.
#[test]
fn a_read_that_hangs_is_taken_from_the_kernel() {
    let place = place();
    let mut f = place.frontend(3);
    assert!(f.read(0, 0, 4096) == pattern(1, DISK)[..4096]);
    place.disk.hold_reads();
    submit(&mut f, 0, 1, IN, 1024, 8192, 0xA5);
    submit(&mut f, 1, 2, IN, 2048, 4096, 0xA5);
    place.disk.wait_for_hang();
    // What needs no disk is served meanwhile; on a ring of its own, as completions keep their order without a region.
    submit(&mut f, 2, 3, 8, 0, 20, 0);
    assert_eq!(f.wait(2, 1), [(12, 21)]);

    let base = f.stop_ring(0);
    assert_eq!(base, f.rings[0].avail, "all that was taken has ended");
    assert_eq!(f.take(0), [(4, 1)]);
    assert_eq!(status(&f, 0, 1), IOERR);
    // The other ring has run all the time as far as the guest can tell.
    assert_eq!(f.take(1), [(8, 1)]);
    assert_eq!(status(&f, 1, 2), IOERR);
    f.put(status_of(0, 1), &[PENDING]);
    f.put(status_of(1, 2), &[PENDING]);

    // It runs on, but takes nothing as long as the kernel holds those reads.
    submit(&mut f, 1, 4, IN, 0, 512, 0x5A);
    f.start_ring(0, base);
    submit(&mut f, 0, 5, IN, 8, 512, 0x5A);
    assert_eq!(f.wait_for(1, 1, Duration::from_millis(300)), []);

    place.disk.release();
    assert_eq!(f.wait(1, 1), [(16, 513)]);
    assert_eq!(f.wait(0, 1), [(20, 513)]);
    assert!(f.get(data_of(1, 4), 512) == pattern(1, DISK)[..512]);
    assert!(f.get(data_of(0, 5), 512) == pattern(1, DISK)[4096..4608]);
    // The late reads are over by now, and have changed nothing.
    assert_eq!((status(&f, 0, 1), status(&f, 1, 2)), (PENDING, PENDING));
    assert!(f.get(data_of(0, 1), 8192) == [0xA5; 8192]);
    assert!(f.get(data_of(1, 2), 4096) == [0xA5; 4096]);
    assert_eq!(f.read(0, 1024, 8192), pattern(1, DISK)[512 << 10..][..8192]);
    assert_eq!(f.stop_ring(1), f.rings[1].avail);
    drop(f);
    let (status, log) = place.server.stop();
    assert!(status.success(), "{log}");
    assert!(log.contains("holds 2 requests for longer than --drain-timeout"), "{log}");
    assert!(log.contains("the kernel has let go"), "{log}");
}

/// A frontend that goes away and comes back, with new memory, while the disk hangs.
#[test]
fn a_read_that_hangs_outlives_its_connection() {
    let place = place();
    let mut f = place.frontend(1);
    place.disk.hold_reads();
    submit(&mut f, 0, 1, IN, 0, 4096, 0xA5);
    place.disk.wait_for_hang();
    f.stream.shutdown(std::net::Shutdown::Both).unwrap();
    let mut again = place.frontend(1);
    assert_eq!((f.take(0), status(&f, 0, 1)), (vec![], PENDING), "left for a frontend that reconnects");
    submit(&mut again, 0, 1, IN, 0, 4096, 0x5A);
    assert_eq!(again.wait_for(0, 1, Duration::from_millis(300)), []);
    place.disk.release();
    assert_eq!(again.wait(0, 1), [(4, 4097)]);
    assert!(again.get(data_of(0, 1), 4096) == pattern(1, DISK)[..4096]);
    assert!(f.get(data_of(0, 1), 4096) == [0xA5; 4096]);
    drop(again);
    assert!(place.server.stop().0.success());
}

/// fsync hangs in a thread of its own: the flush is given up, and so is the end of the server.
#[test]
fn a_flush_that_hangs_does_not_hold_up_the_end() {
    let mut place = place();
    let mut f = place.frontend(1);
    submit(&mut f, 0, 1, OUT, 0, 512, 0x11);
    assert_eq!(f.wait(0, 1), [(4, 1)]);
    place.disk.hold_fsyncs();
    submit(&mut f, 0, 2, FLUSH, 0, 0, 0);
    place.disk.wait_for_hang();
    signal(place.server.child.id(), libc::SIGTERM);
    assert!(f.reply().is_err(), "the server hangs up");
    assert_eq!((f.take(0), status(&f, 0, 2)), (vec![], PENDING), "left for the next server");
    gone(&place.server);
    // The kernel lets a process die only when it has let go of its threads.
    place.disk.release();
    let ended = wait(&mut place.server.child, LIMIT);
    assert_eq!(ended.code(), Some(1));
    let log = Place::log_of(place.server);
    assert!(log.contains("nothing is lost if vmar is started again once the disk answers"), "{log}");
}

/// A write hangs in the queue's own thread. Nobody can answer for it: the server ends, as by a kill, QEMU is free at once,
/// and nothing that the guest puts into its memory later reaches the disk.
#[test]
fn a_write_that_hangs_ends_the_server() {
    let mut place = place();
    let mut f = place.frontend(2);
    place.disk.hold_writes();
    submit(&mut f, 0, 1, OUT, 8, 4096, 0x22);
    place.disk.wait_for_hang();
    f.send(GET_VRING_BASE, VERSION, &Frontend::body32(0, 0), &[]);
    assert!(f.reply().is_err(), "the server hangs up");
    assert_eq!(status(&f, 0, 1), PENDING, "not ended: it is taken up again after a reconnect");
    f.put(data_of(0, 1), &[0xFF; 4096]);
    gone(&place.server);
    place.disk.release();
    let ended = wait(&mut place.server.child, LIMIT);
    assert!(!ended.success());
    let expected = pattern(1, DISK);
    let content = place.disk.content();
    assert!(content[4096..8192] == expected[4096..8192] || content[4096..8192] == [0x22; 4096], "old or new");
    assert!(content[8192..] == expected[8192..]);
    let log = Place::log_of(place.server);
    assert!(log.contains("a queue's thread with it"), "{log}");
}

/// A disk that is slow, as one is when the host's page cache is full of writes, but does not hang: a queue stops between two
/// requests, however many its guest has offered.
#[test]
fn a_slow_disk_is_not_taken_for_one_that_hangs() {
    let place = place();
    let mut f = place.frontend(1);
    place.disk.slow_writes(Duration::from_millis(400));
    let heads: Vec<u16> = (0..16).map(|n| n * 4).collect();
    for n in 0..16 {
        let header = HEADERS + u64::from(n) * 16;
        f.header(header, OUT, u64::from(n) * 8);
        f.put(status_of(0, n), &[PENDING]);
        f.put(data_of(0, n), &[n as u8 + 1; 4096]);
        let table = f.rings[0].desc();
        let chain = Frontend::chain(n * 4, &[r(header, 16), r(data_of(0, n), 4096), w(status_of(0, n), 1)]);
        f.table(table, n * 4, &chain);
    }
    f.offer(0, &heads);
    f.kick(0);
    let deadline = Instant::now() + LIMIT;
    while status(&f, 0, 0) == PENDING {
        assert!(Instant::now() < deadline, "the first write does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
    let base = f.stop_ring(0);
    let done = f.take(0);
    assert_eq!(done.len(), usize::from(base), "all that was taken has ended");
    assert!((0..16).all(|n| status(&f, 0, n) == if n < base { OK } else { PENDING }));
    f.start_ring(0, base);
    f.wait(0, 16 - done.len());
    assert!((0..16).all(|n| status(&f, 0, n) == OK));
    drop(f);
    assert!(place.server.stop().0.success());
}

/// What waits for another try when a ring has to stop ends with an I/O error, or well if there is room in time.
#[test]
fn a_retry_ends_with_the_drain() {
    let bench = Bench::new();
    let mount = Mount::tmpfs(&bench, "2m");
    let file = mount.0.join("disk");
    std::fs::File::create(&file).unwrap().set_len(DISK as u64).unwrap();
    let server = bench.serve(&["--blk-file", text(&file), "--drain-timeout", "1", "--on-error", "retry"]);
    let mut f = Frontend::connect(&server.socket, FEATURES, 1, 64);
    f.stream.set_read_timeout(Some(LIMIT)).unwrap();
    mount.fill(0);
    submit(&mut f, 0, 1, OUT, 0, 4096, 0x33);
    assert_eq!(f.wait_for(0, 1, Duration::from_millis(300)), []);
    let base = f.stop_ring(0);
    assert_eq!(f.take(0), [(4, 1)]);
    assert_eq!(status(&f, 0, 1), IOERR);
    // Room comes while the drain waits: the request is done.
    f.start_ring(0, base);
    submit(&mut f, 0, 2, OUT, 8, 4096, 0x44);
    assert_eq!(f.wait_for(0, 1, Duration::from_millis(300)), []);
    signal(server.child.id(), libc::SIGTERM);
    mount.free();
    assert_eq!(f.wait(0, 1), [(8, 1)]);
    assert_eq!(status(&f, 0, 2), OK);
    drop(f);
    let mut server = server;
    assert!(wait(&mut server.child, LIMIT).success());
    assert!(std::fs::read(&file).unwrap()[4096..8192] == [0x44; 4096]);
}
