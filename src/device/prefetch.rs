//! Brings what a recorded trace tells of into the page cache, behind all that the guest wants: a thread of its own.
//!
//! It only warms the cache: the bytes go to memory that nobody looks at ([`Uring::fetch`]), and every read of the guest goes
//! the way that it goes without this.
//!
//! What it gains is the time in which the guest computes and the disk would rest; what it may cost is the time that a read
//! of the guest waits behind one that was begun here. So
//! - nothing is begun while a request of the guest is in flight, or shortly after one that had to wait has ended: a guest
//!   that reads what is not cached will soon do so again, and knows better what it needs than a trace of another day. The
//!   thread learns that from the counters that the queues keep anyway; the data path does nothing for it;
//! - no more is in flight than the disk delivers in 20 ms, as far as one can tell from what came before;
//! - the reads are the last in the disk's queue, where the disk has one ([`prio::read_last`]).
//!
//! What is in the cache by the time is skipped, so two servers with the same trace read it once, and a guest that is ahead
//! of its trace is not held up by it.

use super::mailbox::Mailbox;
use super::stats::Ledger;
use crate::error::{Error, ErrorKind, Result};
use crate::io::prio;
use crate::io::uring::{Keep, Uring};
use crate::redirect::prefetch::{PIECE_BLOCKS, Piece, Plan};
use crate::redirect::{Base, Current, View};
use crate::units::{BLOCK_SIZE, to_usize};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a read of the guest may have to wait behind what was begun here.
const DELAY: Duration = Duration::from_millis(20);

/// Bytes in flight: at first and at least, and at most.
const WINDOW_MIN: u64 = 64 << 10;
const WINDOW_MAX: u64 = 1 << 20;

/// Requests in flight at most.
const REQUESTS_MAX: usize = 32;

/// How long the guest must not have waited for the disk.
const QUIET: Duration = Duration::from_millis(2);

/// How often to look at a guest that keeps the disk busy: at first, and at most.
const LOOK_FIRST: Duration = Duration::from_millis(1);
const LOOK_MAX: Duration = Duration::from_millis(2);

/// Looks at a guest that may only be copying from the cache: each such request is over in microseconds.
const GLANCES: u32 = 4;

/// Reads that may fail before this gives up: the guest will be told of errors where it matters.
const FAILURES_MAX: u32 = 8;

/// How far it has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    /// It goes on.
    Running,
    /// All is done.
    Done,
    /// As much was read as it may.
    Limit,
    /// The server stopped, or is drained.
    Stopped,
    /// The disk fails.
    Failed,
}

impl State {
    const ALL: [State; 5] = [State::Running, State::Done, State::Limit, State::Stopped, State::Failed];

    /// As the control socket names it.
    pub fn name(self) -> &'static str {
        match self {
            State::Running => "running",
            State::Done => "done",
            State::Limit => "limit",
            State::Stopped => "stopped",
            State::Failed => "failed",
        }
    }
}

/// What has come of it so far, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Whether it goes on.
    pub state: State,
    /// To be brought into the cache, at the beginning.
    pub planned: u64,
    /// Read.
    pub read: u64,
    /// In the cache already when their turn came.
    pub cached: u64,
    /// Not looked at, or in flight.
    pub left: u64,
}

/// A prefetch under way, or at its end.
#[derive(Debug)]
pub struct Prefetch {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    stop: AtomicBool,
    mailbox: Mailbox,
    state: AtomicU8,
    planned: u64,
    read: AtomicU64,
    cached: AtomicU64,
    left: AtomicU64,
}

impl Prefetch {
    /// Begins. Reads at most `limit` bytes.
    ///
    /// # Errors
    /// When there is no thread, or no descriptor, to be had.
    pub fn start(plan: Plan, current: &Arc<Current>, ledger: Arc<Ledger>, limit: u64) -> Result<Prefetch> {
        let failed = |e| Error::new(ErrorKind::Io, "the prefetch", format!("cannot begin: {e}"));
        let mailbox = Mailbox::new().map_err(failed)?;
        let planned = plan.bytes();
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            mailbox: mailbox.clone(),
            state: AtomicU8::new(State::Running as u8),
            planned,
            read: AtomicU64::new(0),
            cached: AtomicU64::new(0),
            left: AtomicU64::new(planned),
        });
        let view = current.view(move || mailbox.wake());
        let mine = Arc::clone(&shared);
        let run = move || {
            let state = match Runner::new(plan, view, ledger, limit, &mine) {
                Ok(runner) => runner.run(),
                Err(e) => {
                    log::warn!("nothing is prefetched: {e}");
                    State::Failed
                }
            };
            mine.state.store(state as u8, Ordering::Relaxed);
        };
        std::thread::Builder::new().name("vmar-prefetch".into()).spawn(run).map_err(failed)?;
        Ok(Prefetch { shared })
    }

    /// Has it end. Waits for nothing: the disk may hang, and what is in flight goes nowhere.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.mailbox.wake();
    }

    /// How far it has come.
    pub fn progress(&self) -> Progress {
        let Shared { state, planned, read, cached, left, .. } = &*self.shared;
        let state = state.load(Ordering::Relaxed);
        Progress {
            state: State::ALL.into_iter().find(|s| *s as u8 == state).unwrap_or(State::Failed),
            planned: *planned,
            read: read.load(Ordering::Relaxed),
            cached: cached.load(Ordering::Relaxed),
            left: left.load(Ordering::Relaxed),
        }
    }
}

/// A request in flight.
struct Flight {
    since: Instant,
    /// Bytes that the disk has to deliver for it.
    len: u64,
    /// Bytes of the plan that it stands for.
    of_plan: u64,
}

/// The thread's side.
struct Runner<'s> {
    plan: Plan,
    view: View,
    ring: Uring,
    shared: &'s Shared,
    guest: Guest,
    window: Window,
    flights: HashMap<u64, Flight>,
    in_flight: u64,
    tokens: u64,
    /// Bytes that may still be read.
    allowed: u64,
    failures: u32,
}

impl<'s> Runner<'s> {
    fn new(plan: Plan, view: View, ledger: Arc<Ledger>, limit: u64, shared: &'s Shared) -> io::Result<Self> {
        // Without it only the rest of what keeps this behind the guest is left.
        if let Err(e) = prio::read_last() {
            log::debug!("the prefetch has the priority of all others: {e}");
        }
        let ring = Uring::new(shared.mailbox.as_fd())?;
        Ok(Runner {
            plan,
            view,
            ring,
            shared,
            guest: Guest::new(ledger),
            window: Window::default(),
            flights: HashMap::new(),
            in_flight: 0,
            tokens: 0,
            allowed: limit,
            failures: 0,
        })
    }

    fn run(mut self) -> State {
        let mut pause = LOOK_FIRST;
        loop {
            if self.shared.stop.load(Ordering::Acquire) {
                return State::Stopped;
            }
            self.shared.mailbox.clear();
            if let Err(e) = self.reap() {
                log::warn!("the prefetch ends: {e}");
                return State::Failed;
            }
            if self.failures >= FAILURES_MAX {
                log::warn!("the prefetch ends: {} of its reads have failed", self.failures);
                return State::Failed;
            }
            if self.view.refresh() {
                self.plan.keep_reachable(self.view.base());
                self.tell();
            }
            let begun = match self.begin() {
                Ok(begun) => begun,
                Err(e) => {
                    log::warn!("the prefetch ends: {e}");
                    return State::Failed;
                }
            };
            match begun {
                Begun::Nothing(state) if self.flights.is_empty() => return state,
                Begun::Nothing(_) | Begun::Full => self.sleep(None),
                Begun::Guest => {
                    self.sleep(Some(pause));
                    pause = (pause * 2).min(LOOK_MAX);
                    continue;
                }
            }
            pause = LOOK_FIRST;
        }
    }

    /// Begins as much as may be in flight now.
    fn begin(&mut self) -> io::Result<Begun> {
        let begun = loop {
            if self.shared.stop.load(Ordering::Acquire) {
                break Begun::Full;
            }
            if self.guest.is_waiting() {
                break Begun::Guest;
            }
            if self.allowed < BLOCK_SIZE {
                break Begun::Nothing(State::Limit);
            }
            let room = self.window.bytes.saturating_sub(self.in_flight).min(self.allowed);
            if room < BLOCK_SIZE || self.flights.len() >= REQUESTS_MAX {
                break Begun::Full;
            }
            let blocks = u32::try_from(room / BLOCK_SIZE).map_or(PIECE_BLOCKS, |n| n.min(PIECE_BLOCKS));
            let Some(piece) = self.plan.next(blocks) else { break Begun::Nothing(State::Done) };
            self.fetch(&piece);
        };
        self.tell();
        self.ring.submit()?;
        Ok(begun)
    }

    /// Has the kernel fetch what is missing of a piece.
    fn fetch(&mut self, piece: &Piece) {
        let base = Arc::clone(self.view.base());
        // Nothing that another map does not reach is in the plan.
        let Some(target) = base.target_of(piece.image) else { return };
        let offset = u64::from(piece.block) * BLOCK_SIZE;
        let len = piece.bytes().min(base.target_size(target).saturating_sub(offset));
        let Some(missing) = Missing::of(&base, target, offset, len) else {
            add(&self.shared.cached, piece.bytes());
            return;
        };
        add(&self.shared.cached, piece.bytes().saturating_sub(missing.bytes));
        let token = self.tokens;
        self.tokens += 1;
        let file = base.file(target);
        let keep = Some(Arc::clone(&base) as Keep);
        // There is always room: it holds more than may be in flight here.
        if self.ring.fetch(Some(token), file, missing.offset, to_usize(missing.len), keep) {
            self.allowed = self.allowed.saturating_sub(missing.bytes);
            self.in_flight += missing.bytes;
            let of_plan = missing.bytes.min(piece.bytes());
            self.flights.insert(token, Flight { since: Instant::now(), len: missing.bytes, of_plan });
        }
    }

    fn reap(&mut self) -> io::Result<()> {
        let Runner { ring, flights, in_flight, window, shared, failures, .. } = self;
        ring.reap(|finished| {
            let Some(flight) = flights.remove(&finished.token) else { return };
            *in_flight -= flight.len;
            match finished.result {
                Ok(()) => {
                    add(&shared.read, flight.of_plan);
                    window.took(flight.since.elapsed(), flight.len);
                }
                Err(e) => {
                    log::info!("a read of the prefetch failed: {e}");
                    *failures += 1;
                }
            }
        })
    }

    /// What the control socket tells.
    fn tell(&self) {
        let in_flight: u64 = self.flights.values().map(|flight| flight.of_plan).sum();
        self.shared.left.store(self.plan.bytes() + in_flight, Ordering::Relaxed);
    }

    /// Until something has ended, or it is time to look again.
    fn sleep(&self, limit: Option<Duration>) {
        let limit = limit.map(|limit| Timespec { tv_sec: 0, tv_nsec: i64::from(limit.subsec_nanos()) });
        let _ = poll(&mut [PollFd::new(&self.shared.mailbox, PollFlags::IN)], limit.as_ref());
    }
}

/// What [`Runner::begin`] ended by.
enum Begun {
    /// As much as may be is in flight.
    Full,
    /// It is the guest's turn.
    Guest,
    /// There is nothing more to begin.
    Nothing(State),
}

/// What is not in the page cache of a range.
struct Missing {
    /// From the first missing page to the last.
    offset: u64,
    len: u64,
    /// Bytes that are missing.
    bytes: u64,
}

impl Missing {
    /// `None`: nothing is. Where the kernel does not tell, all is: reading what is there costs the disk nothing.
    fn of(base: &Base, target: u32, offset: u64, len: u64) -> Option<Missing> {
        let absent = base.absent(target, offset, len).unwrap_or_else(|| vec![(offset, len)]);
        let (first, last) = (absent.first()?, absent.last()?);
        let end = (last.0 + last.1).min(offset + len);
        let bytes = absent.iter().map(|(_, len)| len).sum();
        (end > first.0).then_some(Missing { offset: first.0, len: end - first.0, bytes })
    }
}

/// Adds to a number that only this thread writes.
fn add(number: &AtomicU64, n: u64) {
    number.store(number.load(Ordering::Relaxed) + n, Ordering::Relaxed);
}

/// Whether the guest waits for the disk.
struct Guest {
    ledger: Arc<Ledger>,
    /// Reads that had to wait, so far.
    waited: u64,
    busy_at: Option<Instant>,
}

impl Guest {
    fn new(ledger: Arc<Ledger>) -> Guest {
        Guest { ledger, waited: 0, busy_at: None }
    }

    /// True while something is in flight that is not over at once, and shortly after a read that had to wait.
    fn is_waiting(&mut self) -> bool {
        let queues = || self.ledger.queues().iter().filter(|q| q.begun.get() > 0);
        let waited = queues().map(super::stats::QueueStats::reads_that_waited).sum();
        let in_flight = || queues().any(|q| q.in_flight() > 0);
        let glance = |_| {
            std::hint::spin_loop();
            in_flight()
        };
        if waited != self.waited || self.ledger.stuck() > 0 || (0..GLANCES).all(glance) {
            self.waited = waited;
            self.busy_at = Some(Instant::now());
        }
        self.busy_at.is_some_and(|at| at.elapsed() < QUIET)
    }
}

/// How much may be in flight: as much as comes back in [`DELAY`].
#[derive(Debug)]
struct Window {
    bytes: u64,
}

impl Default for Window {
    fn default() -> Self {
        Window { bytes: WINDOW_MIN }
    }
}

impl Window {
    /// A request of so many bytes has taken that long.
    fn took(&mut self, time: Duration, len: u64) {
        self.bytes = match time {
            time if time < DELAY / 2 => self.bytes + len,
            time if time > DELAY => self.bytes / 2,
            _ => self.bytes,
        }
        .clamp(WINDOW_MIN, WINDOW_MAX);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::OnError;
    use std::io::Write;

    const PAGES: u64 = 512;

    /// A file that is not in the page cache, as the base that is read.
    fn cold() -> (tempfile::NamedTempFile, Arc<Current>) {
        let mut file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        file.write_all(&vec![7; PAGES as usize * 4096]).unwrap();
        file.as_file().sync_all().unwrap();
        rustix::fs::fadvise(file.as_file(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let base = Base::flat(file.path(), false).unwrap();
        // As the images of a library are opened.
        crate::io::file::disable_readahead(base.file(0)).unwrap();
        (file, Current::new(base))
    }

    /// Every other 16 blocks.
    fn plan() -> Plan {
        let piece = |i: u32| Piece { image: crate::units::ImageId(0), block: i * 32, count: 16 };
        Plan::of((0..16).map(piece).collect())
    }

    fn wait(prefetch: &Prefetch) -> Progress {
        let limit = Instant::now() + Duration::from_secs(20);
        loop {
            let progress = prefetch.progress();
            if progress.state != State::Running {
                return progress;
            }
            assert!(Instant::now() < limit, "{progress:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn absent(current: &Current) -> u64 {
        current.get().absent(0, 0, PAGES * 4096).unwrap().iter().map(|(_, len)| len).sum()
    }

    #[test]
    fn what_is_planned_is_cached_in_the_end_and_read_once() {
        let (_file, current) = cold();
        let ledger = || Arc::new(Ledger::new(OnError::Report, 1));
        let half = PAGES * 4096 / 2;
        assert_eq!(absent(&current), 2 * half);
        let first = wait(&Prefetch::start(plan(), &current, ledger(), u64::MAX).unwrap());
        assert_eq!(first, Progress { state: State::Done, planned: half, read: half, cached: 0, left: 0 });
        assert_eq!(absent(&current), half);
        let second = wait(&Prefetch::start(plan(), &current, ledger(), u64::MAX).unwrap());
        assert_eq!(second, Progress { state: State::Done, planned: half, read: 0, cached: half, left: 0 });
    }

    #[test]
    fn it_ends_at_its_limit() {
        let (_file, current) = cold();
        let limit = 5 * 64 * 1024 + 8192;
        let ledger = Arc::new(Ledger::new(OnError::Report, 1));
        let end = wait(&Prefetch::start(plan(), &current, ledger, limit + 4095).unwrap());
        assert_eq!((end.state, end.read, end.left), (State::Limit, limit, end.planned - limit));
        assert_eq!(absent(&current), PAGES * 4096 - limit);
    }

    #[test]
    fn nothing_is_read_while_the_guest_waits_and_a_stop_is_heard() {
        let (_file, current) = cold();
        let ledger = Arc::new(Ledger::new(OnError::Report, 3));
        ledger.queue(1).begin();
        let prefetch = Prefetch::start(plan(), &current, Arc::clone(&ledger), u64::MAX).unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let now = prefetch.progress();
        assert_eq!((now.state, now.read, now.cached, now.left), (State::Running, 0, 0, now.planned));
        prefetch.stop();
        let end = wait(&prefetch);
        assert_eq!((end.state, end.read, end.left), (State::Stopped, 0, end.planned));
        assert_eq!(absent(&current), PAGES * 4096);
        let prefetch = Prefetch::start(plan(), &current, Arc::clone(&ledger), u64::MAX).unwrap();
        ledger.queue(1).leave();
        assert_eq!(wait(&prefetch).state, State::Done);
    }

    #[test]
    fn a_disk_that_fails_ends_it() {
        let (file, current) = cold();
        file.as_file().set_len(4096).unwrap();
        let ledger = Arc::new(Ledger::new(OnError::Report, 1));
        let end = wait(&Prefetch::start(plan(), &current, ledger, u64::MAX).unwrap());
        assert_eq!(end.state, State::Failed);
    }

    /// The window on a disk of that many bytes a second that takes one request at a time.
    fn settled(rate: u64) -> u64 {
        let mut window = Window::default();
        for _ in 0..200 {
            let bytes = window.bytes;
            // The last of those in flight waits for all.
            window.took(Duration::from_nanos(bytes * 1_000_000_000 / rate), bytes.min(256 << 10));
        }
        window.bytes
    }

    #[test]
    fn no_more_is_in_flight_than_the_disk_delivers_in_time() {
        assert_eq!(settled(1 << 20), WINDOW_MIN, "less would be no request");
        for rate in [8 << 20, 20 << 20, 40 << 20u64] {
            let time = Duration::from_nanos(settled(rate) * 1_000_000_000 / rate);
            assert!(time <= DELAY, "{rate} bytes a second: {time:?}");
            assert!(time >= DELAY / 4, "{rate} bytes a second: {time:?}, the disk rests");
        }
        assert_eq!(settled(1 << 30), WINDOW_MAX);
    }

    #[test]
    fn a_guest_that_waits_has_the_disk_for_itself() {
        use crate::device::request::{Kind, Request, Status};
        let ledger = Arc::new(Ledger::new(OnError::Report, 4));
        let mut guest = Guest::new(Arc::clone(&ledger));
        assert!(!guest.is_waiting(), "nobody is there");
        let queue = ledger.queue(2);
        let mut request = Request::default();
        request.kind = Ok(Kind::Read { offset: 0 });
        queue.begin();
        assert!(guest.is_waiting());
        queue.end(&request, Status::Ok, Some(Duration::from_millis(3)));
        assert!(guest.is_waiting(), "it may go on at once");
        std::thread::sleep(QUIET);
        assert!(!guest.is_waiting());
        queue.begin();
        queue.end(&request, Status::Ok, None);
        assert!(!guest.is_waiting(), "what was cached took no time of the disk");
    }
}
