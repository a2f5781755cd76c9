//! Carries requests out: one executor a queue thread.
//!
//! Hits and plain writes are done inline; misses go to io_uring, and whatever may wait goes to the threads of
//! [`super::jobs`]. Each request completes exactly once, in any order.

use super::config::zeroes_len_ok;
use super::disk::Disk;
use super::jobs::{Job, Jobs, Work};
use super::mailbox::Mailbox;
use super::request::{Kind, Request, Status};
use crate::io::buf::{self, total_len};
use crate::redirect::plan::Piece;
use crate::redirect::reader::Reader;
use crate::units::to_usize;
use std::io;
use std::sync::Arc;

/// A request that has ended: its head goes back to the guest with this used length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Head of the descriptor chain.
    pub head: u16,
    /// Bytes written to guest memory.
    pub len: u32,
}

/// Bytes of requests in flight at which a queue takes no more: a guest may point thousands of large requests at the same
/// memory of its own, and each costs memory of ours by the pieces that its plan has.
const BYTES_MAX: usize = 256 << 20;

/// A request in flight, with the guest memory that its buffers lie in.
struct InFlight<G> {
    head: u16,
    request: Request,
    /// Flushed: a write of a write-through disk is durable before it completes.
    flushed: bool,
    _memory: G,
}

/// The executor of one queue. `G` keeps guest memory mapped (an `Arc` of a memory snapshot).
pub struct Executor<G> {
    disk: Arc<Disk>,
    jobs: Arc<Jobs>,
    mailbox: Mailbox,
    reader: Reader,
    slots: Vec<Option<InFlight<G>>>,
    free: Vec<usize>,
    in_flight: usize,
    bytes: usize,
    failures: u64,
    pieces: Vec<Piece>,
    /// The driver did not negotiate FLUSH: it expects a write-through disk (virtio 1.2, section 5.2.6.2).
    write_through: bool,
}

impl<G> Executor<G> {
    /// An executor that raises `mailbox` when [`Executor::reap`] has something to tell. Must stay on this thread.
    pub fn new(disk: Arc<Disk>, jobs: Arc<Jobs>, mailbox: Mailbox) -> io::Result<Self> {
        let reader = Reader::new(std::os::fd::AsFd::as_fd(&mailbox))?;
        Ok(Executor {
            disk,
            jobs,
            mailbox,
            reader,
            slots: Vec::new(),
            free: Vec::new(),
            in_flight: 0,
            bytes: 0,
            failures: 0,
            pieces: Vec::new(),
            write_through: false,
        })
    }

    /// Requests that have not ended.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// True when no more should be started before something has ended.
    pub fn is_full(&self) -> bool {
        self.bytes >= BYTES_MAX
    }

    /// Makes every write durable before it completes.
    pub fn set_write_through(&mut self, on: bool) {
        self.write_through = on;
    }

    /// Starts a request; `Some` when it has ended already.
    pub fn start(&mut self, head: u16, request: Request, memory: G) -> Option<Completion> {
        let status = match &request.kind {
            Err(status) => *status,
            Ok(Kind::GetId) => {
                buf::copy_to(&request.data, self.disk.serial());
                Status::Ok
            }
            Ok(Kind::Flush) if self.disk.read_only() => Status::Ok,
            Ok(Kind::Flush) => return self.post(head, request, memory, Work::Flush),
            Ok(Kind::Read { offset }) => {
                let offset = *offset;
                return self.read(head, offset, request, memory);
            }
            Ok(Kind::Write { offset }) => {
                let offset = *offset;
                return self.write(head, offset, request, memory);
            }
            Ok(Kind::WriteZeroes(segments)) => {
                let fits = |s: &super::request::Segment| self.disk.contains(s.offset, s.len) && zeroes_len_ok(s.len);
                if self.disk.read_only() || !segments.iter().all(fits) {
                    Status::IoErr
                } else {
                    let work = Work::WriteZeroes(segments.clone());
                    return self.post(head, request, memory, work);
                }
            }
        };
        Some(Completion { head, len: request.finish(status) })
    }

    /// Hands what [`Executor::start`] queued to the kernel: once a batch.
    pub fn submit(&mut self) -> io::Result<()> {
        self.reader.submit()
    }

    /// Appends the requests that have ended; never waits.
    pub fn reap(&mut self, out: &mut Vec<Completion>) -> io::Result<()> {
        let mut ended = self.mailbox.take();
        let reaped = self.reader.reap(|token, result| ended.push((token, result)));
        // Whatever became of the ring: what has ended is told.
        for (token, result) in ended {
            out.extend(self.end(token, result));
        }
        reaped
    }

    fn read(&mut self, head: u16, offset: u64, request: Request, memory: G) -> Option<Completion> {
        let len = total_len(&request.data);
        if !self.disk.contains(offset, len as u64) {
            return Some(Completion { head, len: request.finish(Status::IoErr) });
        }
        let mut pieces = std::mem::take(&mut self.pieces);
        pieces.clear();
        self.disk.plan(offset, len, &mut pieces);
        self.disk.record(&pieces);
        let token = self.allot();
        let disk = &self.disk;
        let done = self.reader.read(token as u64, &pieces, &request.data, |source| disk.file_of(source));
        self.pieces = pieces;
        match done {
            Some(result) => {
                self.release(token);
                Some(Completion { head, len: request.finish(status_of(&result, "read", &mut self.failures)) })
            }
            None => {
                self.keep(token, InFlight { head, request, flushed: false, _memory: memory });
                None
            }
        }
    }

    fn write(&mut self, head: u16, offset: u64, request: Request, memory: G) -> Option<Completion> {
        if self.disk.read_only() || !self.disk.contains(offset, total_len(&request.data) as u64) {
            return Some(Completion { head, len: request.finish(Status::IoErr) });
        }
        match self.disk.try_write(offset, &request.data) {
            Ok(true) if self.writes_through() => self.post(head, request, memory, Work::Flush),
            Ok(false) => {
                let work = Work::Write { offset, bufs: request.data.clone() };
                self.post(head, request, memory, work)
            }
            result => Some(Completion { head, len: request.finish(status_of(&result, "write", &mut self.failures)) }),
        }
    }

    /// True when a write that was just done must be flushed before it completes.
    fn writes_through(&self) -> bool {
        self.write_through || self.disk.write_through()
    }

    /// Gives work to a thread that may wait.
    fn post(&mut self, head: u16, request: Request, memory: G, work: Work) -> Option<Completion> {
        let token = self.allot();
        let flushed = matches!(work, Work::Flush);
        self.keep(token, InFlight { head, request, flushed, _memory: memory });
        self.jobs.post(Job::new(work, token as u64, self.mailbox.clone()));
        None
    }

    /// Takes a result into account; `Some` when the request has ended by it.
    fn end(&mut self, token: u64, result: io::Result<()>) -> Option<Completion> {
        let token = to_usize(token);
        let writes_through = self.writes_through();
        let slot = self.slots[token].as_mut();
        let Some(flight) = slot else { unreachable!("a result names a request in flight") };
        let writes = matches!(flight.request.kind, Ok(Kind::Write { .. } | Kind::WriteZeroes(_)));
        if writes && writes_through && !flight.flushed && result.is_ok() {
            flight.flushed = true;
            self.jobs.post(Job::new(Work::Flush, token as u64, self.mailbox.clone()));
            return None;
        }
        let what = match flight.request.kind {
            Ok(Kind::Read { .. }) => "read",
            Ok(Kind::Flush) => "flush",
            _ => "write",
        };
        let status = status_of(&result, what, &mut self.failures);
        let done = Completion { head: flight.head, len: flight.request.finish(status) };
        self.bytes -= total_len(&flight.request.data);
        self.slots[token] = None;
        self.release(token);
        Some(done)
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

/// The guest sees only that it failed; the log says why, each time that the count of failures has doubled: a guest can
/// repeat what fails as often as it likes.
fn status_of<T>(result: &io::Result<T>, what: &str, failures: &mut u64) -> Status {
    match result {
        Ok(_) => Status::Ok,
        Err(e) => {
            *failures += 1;
            if failures.is_power_of_two() {
                log::error!("{what} failed: {e} (failure {failures} of this queue)");
            }
            Status::IoErr
        }
    }
}
