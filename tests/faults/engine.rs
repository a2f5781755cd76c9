//! Random faults: each system call on the overlay file may be held, shortened, interrupted or failed, and threads may be
//! killed in it.

use crate::kill::KillSwitch;
use crate::rig::{Rng, SECTOR};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use vmar::io::buf::total_len;
use vmar::io::fault::{Fate, Faults, Op};

/// How long an operation is held at most: (pauses, microseconds each). Others that hold or wait for it may be all there is.
const HOLD: (u32, u64) = (40, 25);

#[derive(Debug)]
pub struct Engine {
    clock: AtomicU64,
    pub kill: KillSwitch,
    counts: Mutex<BTreeMap<&'static str, u64>>,
    /// Operations so far; what is held waits for some of those that come after it.
    passed: AtomicU64,
}

thread_local! {
    /// Faults happen on threads that have random numbers only.
    static RNG: RefCell<Option<Rng>> = const { RefCell::new(None) };
    /// What must become of this thread's next write, after one that was short.
    static NEXT: Cell<Next> = const { Cell::new(Next::Any) };
    /// What this thread's request ran into.
    static MET: Cell<Met> = const { Cell::new(Met { read: false, write: false, sync: false }) };
}

/// What becomes of the rest of a short write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Next {
    #[default]
    Any,
    /// It was short so that this can be seen: the rest fails with this errno.
    Fail(i32),
    /// It ended inside a sector. No kernel leaves it at that, whatever fails and whoever is killed.
    Whole,
}

/// Errors that a request was given and that it has to report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Met {
    pub read: bool,
    pub write: bool,
    pub sync: bool,
}

/// Faults on this thread from now on, or none.
pub fn faults_here(rng: Option<Rng>) {
    RNG.set(rng);
    NEXT.set(Next::Any);
}

/// Begins a request: nothing has been met.
pub fn begin_request() {
    MET.set(Met::default());
    NEXT.set(Next::Any);
}

/// What the request has met.
pub fn met() -> Met {
    MET.get()
}

fn meet(f: impl FnOnce(&mut Met)) {
    let mut met = MET.get();
    f(&mut met);
    MET.set(met);
}

/// Rolls a die of this thread; `None` on one without faults.
fn roll<T>(f: impl FnOnce(&mut Rng) -> T) -> Option<T> {
    RNG.with_borrow_mut(|rng| rng.as_mut().map(f))
}

fn errno(rng: &mut Rng) -> i32 {
    [libc::EIO, libc::ENOSPC][rng.below(2) as usize]
}

impl Engine {
    pub fn new(kill: KillSwitch) -> Engine {
        Engine { clock: AtomicU64::new(1), kill, counts: Mutex::default(), passed: AtomicU64::new(0) }
    }

    pub fn count(&self, what: &'static str) {
        *self.counts.lock().unwrap().entry(what).or_default() += 1;
    }

    pub fn counts(&self) -> BTreeMap<&'static str, u64> {
        self.counts.lock().unwrap().clone()
    }

    /// The time now. Each call gives a later one.
    pub fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// A thread is not killed where no kernel would stop: in a sector.
    fn maybe_die(&self) {
        if NEXT.get() != Next::Whole {
            self.kill.maybe_die(|| self.tick());
        }
    }

    fn fail(&self, what: &'static str, errno: i32) -> io::Result<usize> {
        self.count(what);
        Err(io::Error::from_raw_os_error(errno))
    }

    /// Waits until some other operations have passed, or for a millisecond if there are none.
    fn hold(&self, operations: u64) {
        let until = self.passed.load(Ordering::SeqCst) + operations;
        for _ in 0..HOLD.0 {
            if self.passed.load(Ordering::SeqCst) >= until {
                return self.count("held and overtaken");
            }
            std::thread::sleep(Duration::from_micros(HOLD.1));
        }
        self.count("held");
    }

    fn write(&self, at: u64, len: usize, go: &mut dyn FnMut(usize) -> io::Result<usize>) -> io::Result<usize> {
        match NEXT.take() {
            Next::Any => {}
            Next::Whole => return go(usize::MAX),
            Next::Fail(errno) => {
                meet(|m| m.write = true);
                return self.fail("write failed half-way", errno);
            }
        }
        let fails = |met: &mut Met| met.write = true;
        match roll(|rng| (rng.below(240), errno(rng), rng.next())) {
            Some((0..3, errno, _)) => {
                meet(fails);
                self.fail("write failed", errno)
            }
            Some((3..6, ..)) => self.fail("write interrupted", libc::EINTR),
            Some((6..16, _, r)) if len > 1 => {
                self.count("write short");
                NEXT.set(Next::Whole);
                go(1 + (r % (len as u64 - 1)) as usize)
            }
            Some((16..20, errno, r)) => {
                // At the end of a sector of the file.
                let first = SECTOR - at as usize % SECTOR;
                let borders = if len > first { (len - first - 1) / SECTOR + 1 } else { 0 };
                if borders == 0 {
                    return go(usize::MAX);
                }
                NEXT.set(Next::Fail(errno));
                go(first + (r % borders as u64) as usize * SECTOR)
            }
            _ => go(usize::MAX),
        }
    }

    fn read(&self, len: usize, go: &mut dyn FnMut(usize) -> io::Result<usize>) -> io::Result<usize> {
        match roll(|rng| (rng.below(200), rng.next())) {
            Some((0, _)) => {
                meet(|m| m.read = true);
                self.fail("read failed", libc::EIO)
            }
            Some((1..5, _)) => self.fail("read interrupted", libc::EINTR),
            Some((5..25, r)) if len > 1 => {
                self.count("read short");
                go(1 + (r % (len as u64 - 1)) as usize)
            }
            _ => go(usize::MAX),
        }
    }
}

impl Faults for Engine {
    fn run(&self, op: &Op<'_>, go: &mut dyn FnMut(usize) -> io::Result<usize>) -> io::Result<usize> {
        self.passed.fetch_add(1, Ordering::SeqCst);
        self.maybe_die();
        let held = roll(|rng| rng.one_in(60).then(|| (rng.one_in(2), 1 + rng.below(12)))).flatten();
        if let Some((true, operations)) = held {
            self.hold(operations);
        }
        let result = match *op {
            Op::Write { at, bufs } => self.write(at, total_len(bufs), go),
            Op::Punch { .. } => match roll(|rng| (rng.one_in(12), errno(rng))) {
                // No error of the request: its zeros are there by then.
                Some((true, errno)) => self.fail("punch failed", errno),
                _ => go(usize::MAX),
            },
            Op::SyncData | Op::SyncAll => match roll(|rng| rng.one_in(400)) {
                Some(true) => {
                    meet(|m| m.sync = true);
                    self.fail("sync failed", libc::EIO)
                }
                _ => go(usize::MAX),
            },
            Op::ReadCached { .. } if roll(|rng| rng.one_in(3)) == Some(true) => {
                self.fail("read made a miss", libc::EAGAIN)
            }
            Op::ReadCached { len, .. } | Op::Read { len, .. } => self.read(len, go),
        };
        if let Some((false, operations)) = held {
            self.hold(operations);
        }
        self.maybe_die();
        result
    }

    fn waiting_read(&self, _at: u64, len: usize) -> Fate {
        self.passed.fetch_add(1, Ordering::SeqCst);
        match roll(|rng| (rng.below(60), rng.next())) {
            Some((0, r)) if r % 4 == 0 => {
                meet(|m| m.read = true);
                self.count("waiting read failed");
                Fate::Fail(libc::EIO)
            }
            Some((1..4, r)) => {
                self.count("waiting read interrupted");
                Fate::Fail([libc::EAGAIN, libc::EINTR][(r % 2) as usize])
            }
            Some((4..16, r)) if len > 1 => {
                self.count("waiting read short");
                Fate::Short(1 + (r % (len as u64 - 1)) as usize)
            }
            Some((16..22, r)) => {
                self.count("waiting read late");
                Fate::Late(Duration::from_micros(r % 1500))
            }
            _ => Fate::Go,
        }
    }
}
