//! Random steps under random faults, compared with a flat model: reads (as the device reads: page cache first, io_uring for
//! the rest), writes of all sizes, discards, write-zeroes and flushes from several threads at a time, clean stops, kills.
//!
//! A request that fails must have met an error, and one that met an error must fail. A failed write leaves each of its
//! sectors old or new. After a failed sync every flush fails, the next open is refused, and going on without what was
//! not flushed gives what was flushed or newer.

use crate::engine::{self, Engine, Met};
use crate::kill::{KillSwitch, Killed};
use crate::model::{Change, Flush, History, Version};
use crate::rig::{Action, Rig, Rng, SECTOR, ZERO, fill, iobufs, qemu_check, qemu_read, random_request};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;
use vmar::ErrorKind;
use vmar::device::{Disk, Store};
use vmar::redirect::reader::Reader;
use vmar::redirect::{Base, Current};

const THREADS: u64 = 4;
/// Steps of a thread between two looks at the whole disk.
const ROUND: u64 = 40;

/// What to do.
#[derive(Clone, Debug, Default)]
pub struct Steps {
    pub seed: u64,
    /// Requests, all in all.
    pub steps: u64,
    /// Say how far it is, each so many steps.
    pub tell: Option<u64>,
}

/// What was done.
#[derive(Debug)]
pub struct Report {
    seed: u64,
    steps: u64,
    seconds: u64,
    counts: BTreeMap<&'static str, u64>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "seed {}: {} steps in {} s, all as in the model", self.seed, self.steps, self.seconds)?;
        self.counts.iter().try_for_each(|(what, count)| write!(f, "\n  {count:>9} {what}"))
    }
}

impl Report {
    /// A run that met no faults would show nothing.
    pub fn assert_all_happened(&self) {
        for what in [
            "flush",
            "flush failed",
            "held and overtaken",
            "kill",
            "punch failed",
            "read",
            "read made a miss",
            "read of sectors that were being written",
            "read short",
            "refused after a failed sync",
            "restart",
            "sync failed",
            "waiting read late",
            "waiting read short",
            "write",
            "write failed",
            "write failed half-way",
            "write interrupted",
            "write short",
            "zero",
            "zero with unmap",
        ] {
            assert!(self.counts.get(what).is_some_and(|n| *n > 0), "no '{what}' in {self}");
        }
    }
}

/// Runs the steps; panics at the first difference, with the seed.
pub fn run(steps: &Steps) -> Report {
    let begun = Instant::now();
    let mut run = Run::new(steps.seed);
    let mut done = 0;
    while done < steps.steps {
        done += run.round();
        if steps.tell.is_some_and(|n| done / n != done.saturating_sub(THREADS * ROUND) / n) {
            println!("{done} steps, {} s", begun.elapsed().as_secs());
        }
    }
    run.end();
    Report { seed: steps.seed, steps: done, seconds: begun.elapsed().as_secs(), counts: run.engine.counts() }
}

/// What a read gave.
struct Seen {
    sector: u64,
    begin: u64,
    end: u64,
    bytes: Vec<u8>,
}

/// What one thread did in a round.
#[derive(Default)]
struct Done {
    steps: u64,
    changes: Vec<Change>,
    flushes: Vec<Flush>,
    seen: Vec<Seen>,
}

struct Run {
    seed: u64,
    rig: Rig,
    engine: Arc<Engine>,
    history: History,
    disk: Option<Disk>,
    rounds: u64,
    authors: AtomicU64,
    /// When a sync of this session failed, or 0: flushes that begin now must fail.
    failed: AtomicU64,
    rng: Rng,
}

impl Run {
    fn new(seed: u64) -> Run {
        let rig = Rig::new(7 * 65536 + 2560, 12 * 65536 + 512, 12 * 65536 + 512);
        let kill = KillSwitch::new(&rig.state_dir());
        let mut run = Run {
            seed,
            history: History::new(&rig),
            rig,
            engine: Arc::new(Engine::new(kill)),
            disk: None,
            rounds: 0,
            authors: AtomicU64::new(1),
            failed: AtomicU64::new(0),
            rng: Rng::new(seed),
        };
        run.open();
        run
    }

    fn tick(&self) -> u64 {
        self.engine.tick()
    }

    fn disk(&self) -> &Disk {
        self.disk.as_ref().unwrap()
    }

    /// Opens the overlay, at first with faults now and then; an open that fails has changed nothing that counts.
    fn open(&mut self) {
        if self.rng.one_in(3) {
            engine::begin_request();
            engine::faults_here(Some(Rng::part(self.seed, self.rounds << 8 | 0xff)));
            let opened = self.rig.open(Some(self.engine.clone()), false);
            engine::faults_here(None);
            let met = engine::met();
            self.engine.count(if opened.is_ok() { "open under faults" } else { "open failed" });
            assert!(opened.is_err() == (met != Met::default()), "seed {}: {met:?} and {opened:?}", self.seed);
        }
        let overlay = self.rig.open(Some(self.engine.clone()), false);
        let overlay = overlay.unwrap_or_else(|e| panic!("seed {}, round {}: {e}", self.seed, self.rounds));
        let base = Base::flat(&self.rig.base_path, false).unwrap();
        self.disk = Some(Disk::new(Current::new(base), Store::Overlay(overlay), [0; 20], Arc::default()));
    }

    /// One round: all threads, then the whole disk; then perhaps another session. Returns the steps.
    fn round(&mut self) -> u64 {
        self.rounds += 1;
        if self.rng.one_in(6) {
            self.engine.kill.arm(self.rng.below(THREADS * ROUND * 2));
        }
        let all: Vec<Done> = std::thread::scope(|s| {
            let run = &*self;
            let threads: Vec<_> = (0..THREADS).map(|t| s.spawn(move || run.thread(t))).collect();
            threads.into_iter().map(|t| t.join().unwrap()).collect()
        });
        if self.engine.kill.has_killed() {
            self.engine.count("kill");
            self.disk = None;
        }
        let killed = self.engine.kill.bury();
        let now = self.tick();
        let (mut steps, mut seen) = (0, Vec::new());
        for mut done in all {
            steps += done.steps;
            for change in &mut done.changes {
                change.finish(killed, now);
                self.history.change(change);
            }
            let counts = |f: &Flush| f.end < killed.unwrap_or(now);
            done.flushes.into_iter().filter(counts).for_each(|f| self.history.flush(f));
            seen.append(&mut done.seen);
        }
        self.check_reads(&seen);
        if killed.is_some() {
            self.restart_killed(killed);
        }
        self.check_disk();
        match self.rng.below(8) {
            0 if self.failed.load(Ordering::SeqCst) == 0 => self.close(),
            1 => {
                self.engine.count("restart");
                self.restart_killed(None);
                self.check_disk();
            }
            _ => {}
        }
        if self.rounds.is_multiple_of(200) {
            qemu_check(&self.rig.overlay).unwrap_or_else(|e| panic!("{}: {e}", self.place()));
        }
        steps
    }

    fn place(&self) -> String {
        format!("seed {}, round {}", self.seed, self.rounds)
    }

    fn check_reads(&self, seen: &[Seen]) {
        for read in seen {
            let mut torn = false;
            for (n, bytes) in read.bytes.chunks(SECTOR).enumerate() {
                let sector = read.sector + n as u64;
                let under_way = |v: &Version| v.end > read.begin && v.begin < read.end;
                let busy = self.history.allowed(sector, read.begin, read.end).any(under_way);
                torn |= busy;
                if let Err(e) = self.history.check(sector, bytes, read.begin, read.end, busy) {
                    panic!("{}: a read: {e}", self.place());
                }
            }
            if torn {
                self.engine.count("read of sectors that were being written");
            }
        }
    }

    /// Compares the quiet disk with the model; what it holds is what it holds from then on.
    fn check_disk(&mut self) {
        let disk = self.read_all();
        let now = self.tick();
        let wrong = self.history.check_all(&disk, now, now);
        assert!(wrong.is_empty(), "{}: {}", self.place(), wrong[0]);
        self.history.settle(&disk, now);
        self.history.forget(now);
    }

    fn read_all(&self) -> Vec<u8> {
        let mut all = vec![0xee; self.rig.size as usize];
        let (event, mut reader) = new_reader();
        let result = read(self.disk(), &event, &mut reader, 0, &mut all);
        result.unwrap_or_else(|e| panic!("{}: {e}", self.place()));
        all
    }

    /// Drops the overlay without a close and opens it again. After a failed sync that is refused, and the state of the
    /// last flush, or newer, goes on.
    fn restart_killed(&mut self, killed: Option<u64>) {
        self.disk = None;
        let failed = self.failed.swap(0, Ordering::SeqCst);
        if failed == 0 {
            return self.open();
        }
        let refused = match self.rig.open(None, false) {
            Err(refused) => refused,
            // Killed when the sync had failed and nobody knew.
            Ok(_) if killed.is_some_and(|at| failed > at) => return self.open(),
            Ok(_) => panic!("{}: taken up though a sync had failed", self.place()),
        };
        assert_eq!(refused.kind(), ErrorKind::Io, "{}: {refused}", self.place());
        self.engine.count("refused after a failed sync");
        let overlay = self.rig.open(Some(self.engine.clone()), true).unwrap();
        let disk = self.rig.read_all(&overlay);
        let now = self.tick();
        let wrong = self.history.check_all(&disk, self.history.durable(now), now);
        assert!(wrong.is_empty(), "{}: after --discard-unflushed: {}", self.place(), wrong[0]);
        self.history.settle(&disk, now);
        // It is what the file holds: nothing older comes back.
        let begin = self.tick();
        self.history.flush(Flush { begin, end: begin });
        let now = self.tick();
        self.history.forget(now);
        drop(overlay);
        self.open();
    }

    /// A clean stop, with faults now and then: if it fails, the session stays, or everything is in the file.
    fn close(&mut self) {
        let begin = self.tick();
        engine::begin_request();
        if self.rng.one_in(3) {
            engine::faults_here(Some(Rng::part(self.seed, self.rounds << 8 | 0xfe)));
        }
        let closed = self.disk().close();
        engine::faults_here(None);
        let met = engine::met();
        assert!(closed.is_err() == (met != Met::default()), "{}: {met:?} and {closed:?}", self.place());
        self.engine.count(if closed.is_ok() { "close" } else { "close failed" });
        if closed.is_ok() {
            self.history.flush(Flush { begin, end: self.tick() });
        }
        self.disk = None;
        match self.rig.open(None, false) {
            Ok(overlay) => drop(overlay),
            // The sync that failed was one of its flush.
            Err(e) if met.sync => {
                assert_eq!(e.kind(), ErrorKind::Io, "{}: {e}", self.place());
                self.failed.store(self.tick(), Ordering::SeqCst);
                return self.restart_killed(None);
            }
            Err(e) => panic!("{}: {e}", self.place()),
        }
        self.open();
        self.check_disk();
    }

    /// The steps of one thread, until they are done or it is killed.
    fn thread(&self, number: u64) -> Done {
        let part = self.rounds << 8 | number << 1;
        let mut rng = Rng::part(self.seed, part);
        let (event, mut reader) = new_reader();
        let mut done = Done::default();
        engine::faults_here(Some(Rng::part(self.seed, part | 1)));
        while done.steps < ROUND && !self.engine.kill.has_killed() {
            done.steps += 1;
            let step = || self.step(&mut rng, &event, &mut reader, &mut done);
            if let Err(payload) = catch_unwind(AssertUnwindSafe(step)) {
                match payload.downcast::<Killed>() {
                    Ok(_) => break,
                    Err(other) => {
                        eprintln!("{}, thread {number}, step {}", self.place(), done.steps);
                        std::panic::resume_unwind(other);
                    }
                }
            }
        }
        engine::faults_here(None);
        done
    }

    fn step(&self, rng: &mut Rng, event: &OwnedFd, reader: &mut Reader, done: &mut Done) {
        let (action, sector, sectors) = random_request(rng, self.rig.sectors());
        let (offset, len) = (sector * SECTOR as u64, (sectors * SECTOR as u64) as usize);
        engine::begin_request();
        let author = match action {
            Action::Read => {
                self.engine.count("read");
                let mut bytes = vec![0xee; len];
                let begin = self.tick();
                let result = read(self.disk(), event, reader, offset, &mut bytes);
                let end = self.tick();
                assert_eq!(result.is_err(), engine::met().read, "{}: {result:?}", self.place());
                match result {
                    Ok(()) => done.seen.push(Seen { sector, begin, end, bytes }),
                    Err(_) => self.engine.count("read that failed"),
                }
                return;
            }
            Action::Flush => return self.flush(done),
            Action::Write => self.authors.fetch_add(1, Ordering::Relaxed),
            Action::Zero { .. } => ZERO,
        };
        let version = Version { author, begin: self.tick(), end: u64::MAX, ok: false };
        done.changes.push(Change { sector, sectors, version });
        let result = if let Action::Zero { unmap } = action {
            self.engine.count(if unmap { "zero with unmap" } else { "zero" });
            self.disk().write_zeroes(offset, len as u64, unmap)
        } else {
            self.engine.count("write");
            let mut mem = vec![0; len];
            fill(&mut mem, author, sector);
            let bufs = iobufs(&mut mem);
            match self.disk().try_write(offset, &bufs) {
                Ok(true) => Ok(()),
                Ok(false) => self.disk().write(offset, &bufs),
                Err(e) => Err(e),
            }
        };
        let version = &mut done.changes.last_mut().unwrap().version;
        (version.end, version.ok) = (self.tick(), result.is_ok());
        assert_eq!(result.is_err(), engine::met().write, "{}: {result:?}", self.place());
        // A disk without a write cache flushes each write.
        if rng.one_in(25) {
            self.flush(done);
        }
    }

    fn flush(&self, done: &mut Done) {
        self.engine.count("flush");
        engine::begin_request();
        let must_fail = self.failed.load(Ordering::SeqCst) != 0;
        let begin = self.tick();
        let result = self.disk().flush();
        let end = self.tick();
        let met = engine::met();
        if met.sync {
            // The first one counts.
            let _ = self.failed.compare_exchange(0, end, Ordering::SeqCst, Ordering::SeqCst);
        }
        if must_fail || met.sync || met.write {
            assert!(result.is_err(), "{}: a flush succeeded: {must_fail}, {met:?}", self.place());
        }
        match result {
            Ok(()) => done.flushes.push(Flush { begin, end }),
            Err(e) => {
                self.engine.count("flush failed");
                // If it met nothing, another one did before it.
                let sticky = e.to_string().contains("an earlier flush");
                assert!(met.sync || met.write || sticky, "{}: {e}", self.place());
            }
        }
    }

    /// A clean end: plain QEMU sees the same disk.
    fn end(&mut self) {
        if self.failed.load(Ordering::SeqCst) != 0 {
            self.restart_killed(None);
        }
        let want = self.read_all();
        self.disk().close().unwrap();
        qemu_check(&self.rig.overlay).unwrap_or_else(|e| panic!("{}: {e}", self.place()));
        assert!(qemu_read(&self.rig.overlay) == want, "{}: plain QEMU sees another disk", self.place());
    }
}

fn new_reader() -> (OwnedFd, Reader) {
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let reader = Reader::new(event.as_fd()).unwrap();
    (event, reader)
}

/// Reads as a queue thread does: in pieces of at most 64 KiB that are in flight together, their ends told by the event.
fn read(disk: &Disk, event: &OwnedFd, reader: &mut Reader, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
    const PIECE: usize = 64 << 10;
    let mut waiting = 0;
    let mut result = Ok(());
    let mut pieces = Vec::new();
    let view = disk.view(|| ());
    let base = view.base();
    for (n, part) in bytes.chunks_mut(PIECE).enumerate() {
        let at = offset + (n * PIECE) as u64;
        pieces.clear();
        disk.plan(base, at, part.len(), &mut pieces);
        match reader.read(n as u64, &pieces, &iobufs(part), base, |source| disk.file_of(base, source)) {
            Some(ended) => result = result.and(ended),
            None => waiting += 1,
        }
    }
    reader.submit().unwrap();
    while waiting > 0 {
        let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
        let told = poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&limit)).unwrap();
        assert_eq!(told, 1, "{waiting} reads are never told");
        let _ = rustix::io::read(event, &mut [0u8; 8][..]);
        let ended = reader.reap(|_, ended| {
            waiting -= 1;
            if let Err(e) = ended {
                result = Err(e);
            }
        });
        ended.unwrap();
    }
    result
}
