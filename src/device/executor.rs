//! Carries requests out: one executor a queue thread.
//!
//! Hits and plain writes are done inline; misses go to io_uring, and whatever may wait goes to the threads of
//! [`super::jobs`]. Each request completes exactly once, in any order.

use super::config::zeroes_len_ok;
use super::disk::Disk;
use super::jobs::{Job, Jobs, Work};
use super::mailbox::Mailbox;
use super::request::{Kind, Request, Status};
use super::retry::Pause;
use super::stats::{Ledger, QueueStats};
use crate::io::buf::{self, total_len};
use crate::io::hot::Watch;
use crate::redirect::View;
use crate::redirect::ahead::Streams;
use crate::redirect::plan::Piece;
use crate::redirect::reader::Reader;
use crate::units::to_usize;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// A request that has ended: its head goes back to the guest with this used length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Head of the descriptor chain.
    pub head: u16,
    /// Bytes written to guest memory.
    pub len: u32,
}

/// What becomes of requests that are not done when the time for a drain is up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Late {
    /// The guest gets an I/O error for them: it asked for the ring to stop, and may start it anew or never again.
    Fail,
    /// Nothing: they stay in flight, and who serves the ring next starts them again.
    Leave,
}

/// Bytes of requests in flight at which a queue takes no more: a guest may point thousands of large requests at the same
/// memory of its own, and each costs memory of ours by the pieces that its plan has.
const BYTES_MAX: usize = 256 << 20;

/// Reads after which a queue asks whether it had to wait for a page that was held to be in the cache (see
/// [`crate::io::hot`]): as many may be held up before it stops relying on that.
const WATCH_EVERY: u32 = 64;

/// How long to wait when io_uring takes no work.
const SUBMIT_PAUSE: Duration = Duration::from_millis(100);

/// How often a queue that must not take requests looks whether it may (see [`Ledger::stuck`]).
const STUCK_PAUSE: Duration = Duration::from_millis(100);

/// A request in flight, with the guest memory that its buffers lie in.
struct InFlight<G> {
    head: u16,
    request: Request,
    since: Instant,
    stage: Stage,
    /// Set by its first failure that is tried again.
    pause: Option<Pause>,
    memory: G,
}

impl<G> InFlight<G> {
    fn new(head: u16, request: Request, stage: Stage, memory: G) -> Self {
        InFlight { head, request, since: Instant::now(), stage, pause: None, memory }
    }
}

/// What a request in flight waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Its work.
    Work,
    /// A flush: the request is one, or a write of a driver that expects a write-through disk. A failure is final.
    Flush,
    /// Another try.
    Paused,
    /// Nothing: its head went back when the time for the drain was up. The kernel, or a job, may still use its buffers.
    Abandoned,
}

/// Told of each piece of guest memory that a request may have written, before it completes.
pub type Written<G> = Box<dyn Fn(&G, &buf::IoBuf) + Send>;

/// The executor of one queue. `G` keeps guest memory mapped (an `Arc` of a memory snapshot).
pub struct Executor<G> {
    index: usize,
    disk: Arc<Disk>,
    jobs: Arc<Jobs>,
    ledger: Arc<Ledger>,
    mailbox: Mailbox,
    reader: Reader,
    slots: Vec<Option<InFlight<G>>>,
    free: Vec<usize>,
    /// Slots of those that wait for another try.
    paused: Vec<usize>,
    in_flight: usize,
    abandoned: usize,
    bytes: usize,
    failures: u64,
    /// How often io_uring took no work, and when to try again.
    refusals: u64,
    submit_at: Option<Instant>,
    /// The base that is read, until the next [`Executor::reap`].
    view: View,
    own_target: Option<u32>,
    /// The driver did not negotiate FLUSH: it expects a write-through disk (virtio 1.2, section 5.2.6.2).
    write_through: bool,
    written: Option<Written<G>>,
    /// Reads since this thread was last asked whether it had to wait for a page.
    unwatched: u32,
    watch: Watch,
    streams: Streams,
    /// The plan of what is read ahead.
    ahead: Vec<Piece>,
}

impl<G: Clone> Executor<G> {
    /// The executor of queue `index`; raises `mailbox` when [`Executor::reap`] has something to tell. Must stay on this
    /// thread.
    pub fn new(index: usize, disk: Arc<Disk>, jobs: Arc<Jobs>, mailbox: Mailbox) -> io::Result<Self> {
        let reader = Reader::new(std::os::fd::AsFd::as_fd(&mailbox))?;
        let view = disk.view({
            let mailbox = mailbox.clone();
            move || mailbox.wake()
        });
        let (own_target, streams) = (view.base().own_target(), Streams::new(view.base().readahead()));
        Ok(Executor {
            index,
            disk,
            ledger: Arc::clone(jobs.ledger()),
            jobs,
            mailbox,
            reader,
            slots: Vec::new(),
            free: Vec::new(),
            paused: Vec::new(),
            in_flight: 0,
            abandoned: 0,
            bytes: 0,
            failures: 0,
            refusals: 0,
            submit_at: None,
            view,
            own_target,
            write_through: false,
            written: None,
            unwatched: 0,
            watch: Watch::default(),
            streams,
            ahead: Vec::new(),
        })
    }

    /// Requests that have not ended.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Requests that were given up (see [`Executor::abandon`]) and are not done with.
    pub fn abandoned(&self) -> usize {
        self.abandoned
    }

    /// True when no more should be started before something has ended.
    pub fn is_full(&self) -> bool {
        self.bytes >= BYTES_MAX || self.ledger.stuck() > 0
    }

    /// How long the queue may sleep if nothing wakes it.
    pub fn until_due(&self) -> Option<Duration> {
        let stuck = (self.ledger.stuck() > 0).then_some(STUCK_PAUSE);
        let due = self.paused.iter().filter_map(|token| self.slots[*token].as_ref()?.pause.map(|p| p.due()));
        let due = due.chain(self.submit_at).min().map(|due| due.saturating_duration_since(Instant::now()));
        stuck.into_iter().chain(due).min()
    }

    /// Makes every write durable before it completes.
    pub fn set_write_through(&mut self, on: bool) {
        self.write_through = on;
    }

    /// From here on tells `written` of what the requests that end have written, also those that have begun before.
    pub fn set_written(&mut self, written: Option<Written<G>>) {
        self.written = written;
    }

    /// Starts a request; `Some` when it has ended already. Else the request and a clone of `memory` are kept until it has,
    /// and what the caller gave is empty.
    pub fn start(&mut self, head: u16, request: &mut Request, memory: &G) -> Option<Completion> {
        self.stats().begin();
        let read_only = self.disk.read_only();
        let status = match &request.kind {
            Err(status) => *status,
            Ok(Kind::GetId) => {
                buf::copy_to(&request.data, self.disk.serial());
                Status::Ok
            }
            Ok(Kind::Flush) if read_only => Status::Ok,
            Ok(Kind::Read { offset }) if !self.disk.contains(*offset, total_len(&request.data) as u64) => Status::IoErr,
            Ok(Kind::Write { offset })
                if read_only || !self.disk.contains(*offset, total_len(&request.data) as u64) =>
            {
                Status::IoErr
            }
            Ok(Kind::WriteZeroes(segments) | Kind::Discard(segments))
                if read_only
                    || !segments.iter().all(|s| self.disk.contains(s.offset, s.len) && zeroes_len_ok(s.len)) =>
            {
                Status::IoErr
            }
            Ok(Kind::Read { .. } | Kind::Write { .. } | Kind::WriteZeroes(_) | Kind::Discard(_) | Kind::Flush) => {
                let token = self.allot();
                let mut stage = Stage::Work;
                let Some(result) = self.attempt(token, request, &mut stage) else {
                    self.keep(token, InFlight::new(head, std::mem::take(request), stage, memory.clone()));
                    return None;
                };
                if let Err(e) = &result
                    && self.ledger.on_error().tries_again(e)
                {
                    self.keep(token, InFlight::new(head, std::mem::take(request), stage, memory.clone()));
                    self.pause(token, e);
                    return None;
                }
                self.release(token);
                let status = self.status_of(&result, request);
                return self.finish(memory, head, request, Some(status), None);
            }
        };
        self.finish(memory, head, request, Some(status), None)
    }

    /// Plans a read before its turn, and has the processor fetch the beginning of what it will copy. Requests that a guest
    /// has in flight together have no order, so a write that ends between plan and read may or may not be seen.
    #[inline]
    pub fn fetch(&self, request: &mut Request) {
        if let Ok(Kind::Read { offset }) = request.kind
            && self.disk.contains(offset, total_len(&request.data) as u64)
        {
            let base = self.view.base();
            self.disk.plan(base, offset, total_len(&request.data), &mut request.plan);
            request.planned_by = self.view.version();
            if let (Some(piece), Some(buf)) = (request.plan.first(), request.data.first())
                && let Some((file, at)) = self.disk.file_of(base, &piece.source)
            {
                file.fetch(at, buf);
            }
        }
    }

    /// Ends a request that is not to be started with an I/O error.
    pub fn refuse(&self, head: u16, request: &Request, memory: &G) -> Option<Completion> {
        self.stats().begin();
        self.finish(memory, head, request, Some(Status::IoErr), None)
    }

    /// Hands what [`Executor::start`] queued to the kernel: once a batch. What it does not take is offered again later.
    pub fn submit(&mut self) {
        if self.unwatched >= WATCH_EVERY {
            self.unwatched = 0;
            if self.watch.faulted() {
                self.disk.cool(self.view.base());
            }
        }
        let result = self.reader.submit();
        self.submitted(&result);
    }

    /// True when [`Executor::reap`] would find something that has ended. For a thread that would rather look than sleep.
    pub fn is_ready(&mut self) -> bool {
        self.mailbox.is_filled() || self.reader.is_ready()
    }

    /// Appends the requests that have ended, and tries again what is due; never waits. From here on the latest base is
    /// read.
    pub fn reap(&mut self, out: &mut Vec<Completion>) {
        if self.view.refresh() {
            self.own_target = self.view.base().own_target();
        }
        let mut ended = self.mailbox.take();
        let reaped = self.reader.reap(|token, result| ended.push((token, result)));
        // Whatever became of the ring: what has ended is told.
        for (token, result) in ended {
            out.extend(self.end(to_usize(token), result));
        }
        self.submitted(&reaped);
        if !self.paused.is_empty() {
            self.try_again(out);
        }
    }

    /// Gives up the requests that wait for another try. For a queue that must stop now.
    pub fn give_up(&mut self, late: Late, out: &mut Vec<Completion>) {
        for token in std::mem::take(&mut self.paused) {
            let Some(flight) = self.slots[token].take() else { unreachable!("a paused request has a slot") };
            let done = self.complete(token, flight, (late == Late::Fail).then_some(Status::IoErr));
            out.extend(done);
        }
    }

    /// Gives up all that is in flight although the kernel or a job may still work on it. What they still use stays here
    /// until they are done with.
    ///
    /// The caller must neither publish the completions nor let anybody else serve the ring before the guest memory behind
    /// it is revoked: the guest takes back its buffers then, and a late transfer must neither change nor read them.
    pub fn abandon(&mut self, late: Late, out: &mut Vec<Completion>) {
        self.give_up(late, out);
        // What the kernel has not seen ends here.
        let mut unseen = Vec::new();
        self.reader.cancel_waiting(|token, _| unseen.push(to_usize(token)));
        let status = (late == Late::Fail).then_some(Status::IoErr);
        for token in unseen {
            match self.slots[token].take() {
                Some(flight) if flight.stage != Stage::Abandoned => out.extend(self.complete(token, flight, status)),
                // Given up before, and only now done with.
                flight => {
                    self.slots[token] = flight;
                    out.extend(self.end(token, Err(io::ErrorKind::Interrupted.into())));
                }
            }
        }
        for token in 0..self.slots.len() {
            let Some(mut flight) = self.slots[token].take() else { continue };
            if flight.stage != Stage::Abandoned {
                flight.stage = Stage::Abandoned;
                self.in_flight -= 1;
                self.abandoned += 1;
                self.bytes -= total_len(&flight.request.data);
                self.ledger.stuck_begins();
                if flight.pause.take().is_some() {
                    self.ledger.retry_ends();
                }
                out.extend(self.finish(&flight.memory, flight.head, &flight.request, status, Some(flight.since)));
            }
            self.slots[token] = Some(flight);
        }
    }

    /// True when a write that was just done must be flushed before it completes.
    fn writes_through(&self) -> bool {
        self.write_through || self.disk.write_through()
    }

    /// One try at a request that makes sense: `Some` when it has ended by it, else [`Executor::reap`] will see it end under
    /// `token`.
    fn attempt(&mut self, token: usize, request: &mut Request, stage: &mut Stage) -> Option<io::Result<()>> {
        *stage = Stage::Work;
        let work = match &request.kind {
            &Ok(Kind::Read { offset }) => return self.read(token, offset, request),
            Ok(Kind::Write { offset }) => match self.disk.try_write(*offset, &request.data) {
                Ok(true) if self.writes_through() => Work::Flush,
                Ok(true) => return Some(Ok(())),
                Ok(false) => Work::Write { offset: *offset, bufs: request.data.clone() },
                Err(e) => return Some(Err(e)),
            },
            Ok(Kind::WriteZeroes(segments) | Kind::Discard(segments)) => Work::WriteZeroes(segments.clone()),
            Ok(Kind::Flush) => Work::Flush,
            Ok(Kind::GetId) | Err(_) => return Some(Ok(())),
        };
        if matches!(work, Work::Flush) {
            *stage = Stage::Flush;
        }
        self.jobs.post(Job::new(work, token as u64, self.mailbox.clone()));
        None
    }

    fn read(&mut self, token: usize, offset: u64, request: &mut Request) -> Option<io::Result<()>> {
        let Request { plan, data, planned_by, .. } = request;
        let base = self.view.base();
        if plan.is_empty() || *planned_by != self.view.version() {
            plan.clear();
            self.disk.plan(base, offset, total_len(data), plan);
        }
        self.unwatched += 1;
        self.disk.record(base, plan);
        self.ledger.queue(self.index).sources(plan, self.own_target);
        let disk = &self.disk;
        let done = self.reader.read(token as u64, plan, data, base, |source| disk.file_of(base, source));
        // Another try is another look.
        plan.clear();
        if self.reader.was_cold()
            && let Some(range) = self.streams.read(offset, total_len(data) as u64)
        {
            self.read_ahead(&range);
        }
        done
    }

    /// Has the page cache fetch what a sequential guest will read next, if that is in the base.
    fn read_ahead(&mut self, range: &Range<u64>) {
        let len = range.end.min(self.disk.size()).saturating_sub(range.start);
        self.ahead.clear();
        let base = self.view.base();
        if len > 0 {
            self.disk.plan(base, range.start, to_usize(len), &mut self.ahead);
        }
        self.reader.read_ahead(&self.ahead, base);
    }

    /// Takes a result into account; `Some` when the request has ended by it.
    fn end(&mut self, token: usize, result: io::Result<()>) -> Option<Completion> {
        let Some(mut flight) = self.slots[token].take() else { unreachable!("a result names a request in flight") };
        match (&result, flight.stage) {
            (_, Stage::Abandoned) => {
                self.abandoned -= 1;
                self.free.push(token);
                if self.ledger.stuck_ends() {
                    log::warn!("the kernel has let go of all requests that were given up; the disk goes on");
                }
                return None;
            }
            // A write is done; the driver wants it durable.
            (Ok(()), Stage::Work) if !matches!(flight.request.kind, Ok(Kind::Read { .. })) && self.writes_through() => {
                flight.stage = Stage::Flush;
                self.slots[token] = Some(flight);
                self.jobs.post(Job::new(Work::Flush, token as u64, self.mailbox.clone()));
                return None;
            }
            (Err(e), Stage::Work) if self.ledger.on_error().tries_again(e) => {
                self.slots[token] = Some(flight);
                self.pause(token, e);
                return None;
            }
            (Err(_), Stage::Flush) => self.ledger.set_flush_failed(),
            _ => {}
        }
        let status = self.status_of(&result, &flight.request);
        self.complete(token, flight, Some(status))
    }

    /// Lets a request that failed wait for another try.
    fn pause(&mut self, token: usize, error: &io::Error) {
        let Some(flight) = self.slots[token].as_mut() else { unreachable!("a paused request has a slot") };
        let now = Instant::now();
        let first = flight.pause.is_none();
        flight.pause = Some(flight.pause.map_or_else(|| Pause::first(now), |pause| pause.next(now)));
        flight.stage = Stage::Paused;
        let what = name_of(&flight.request);
        self.paused.push(token);
        if first && self.ledger.retry_begins() {
            log::error!(
                "a {what} failed: {error}; it is tried again until it works, and the guest waits (--on-error retry)"
            );
        }
    }

    /// Tries again what is due.
    fn try_again(&mut self, out: &mut Vec<Completion>) {
        let now = Instant::now();
        let due = |slot: &Option<InFlight<G>>| slot.as_ref().and_then(|f| f.pause).is_some_and(|p| p.due() <= now);
        let (ready, later) = std::mem::take(&mut self.paused).into_iter().partition(|token| due(&self.slots[*token]));
        self.paused = later;
        let ready: Vec<usize> = ready;
        let tried = !ready.is_empty();
        for token in ready {
            self.stats().retry();
            let Some(mut flight) = self.slots[token].take() else { unreachable!("a paused request has a slot") };
            let result = self.attempt(token, &mut flight.request, &mut flight.stage);
            self.slots[token] = Some(flight);
            if let Some(result) = result {
                // Without write-through: `attempt` has seen to the flush.
                out.extend(self.end(token, result));
            }
        }
        if tried {
            self.submit();
        }
    }

    /// Ends a request in flight; without a status, only for us.
    fn complete(&mut self, token: usize, flight: InFlight<G>, status: Option<Status>) -> Option<Completion> {
        self.bytes -= total_len(&flight.request.data);
        if flight.pause.is_some() && self.ledger.retry_ends() {
            log::warn!("no request waits for another try any more");
        }
        self.release(token);
        self.finish(&flight.memory, flight.head, &flight.request, status, Some(flight.since))
    }

    /// Tells the guest how a request ended, and counts it.
    fn finish(
        &self,
        memory: &G,
        head: u16,
        request: &Request,
        status: Option<Status>,
        since: Option<Instant>,
    ) -> Option<Completion> {
        let Some(status) = status else {
            self.stats().leave();
            return None;
        };
        self.stats().end(request, status, since.map(|since| since.elapsed()));
        let len = request.finish(status);
        if let Some(written) = &self.written {
            request.writable().for_each(|piece| written(memory, piece));
        }
        Some(Completion { head, len })
    }

    /// The guest sees only that it failed; the log says why, each time that the count of failures has doubled: a guest can
    /// repeat what fails as often as it likes.
    fn status_of(&mut self, result: &io::Result<()>, request: &Request) -> Status {
        let Err(e) = result else { return Status::Ok };
        self.failures += 1;
        if self.failures.is_power_of_two() {
            log::error!("{} failed: {e} (failure {} of queue {})", name_of(request), self.failures, self.index);
        }
        Status::IoErr
    }

    /// Sees to what io_uring refused: without another try those reads would wait for the next wake of the queue.
    fn submitted(&mut self, result: &io::Result<()>) {
        match result {
            Ok(()) => self.submit_at = None,
            Err(e) => {
                self.submit_at = Some(Instant::now() + SUBMIT_PAUSE);
                self.refusals += 1;
                if self.refusals.is_power_of_two() {
                    log::error!("queue {}: io_uring refuses work: {e} (refusal {})", self.index, self.refusals);
                }
            }
        }
    }

    fn stats(&self) -> &QueueStats {
        self.ledger.queue(self.index)
    }

    fn keep(&mut self, token: usize, flight: InFlight<G>) {
        self.bytes += total_len(&flight.request.data);
        self.slots[token] = Some(flight);
    }

    fn allot(&mut self) -> usize {
        self.in_flight += 1;
        self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        })
    }

    fn release(&mut self, token: usize) {
        self.in_flight -= 1;
        self.free.push(token);
    }
}

/// What the log calls a request.
fn name_of(request: &Request) -> &'static str {
    match request.kind {
        Ok(Kind::Read { .. }) => "read",
        Ok(Kind::Flush) => "flush",
        _ => "write",
    }
}

impl<G> Drop for Executor<G> {
    /// A queue drains before it ends. If it could not (a panic), threads may still use the guest memory of what is in
    /// flight: then that memory stays mapped for good.
    fn drop(&mut self) {
        if self.slots.iter().any(Option::is_some) {
            log::error!("a queue ends with requests in flight");
            std::mem::forget(std::mem::take(&mut self.slots));
        }
    }
}
