//! What happened to the requests of a server: counters by queue, read by the control socket.
//!
//! Each counter has one writer, the thread of its queue, so counting is a plain load and store. A reader may see the
//! counters of one request half done; it never sees one go backwards.

use super::request::{Kind, Request, Status};
use super::retry::OnError;
use crate::redirect::plan::{Piece, Source};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Upper bounds of the classes of waiting times, in microseconds; the last class has none.
pub const WAITS_US: [u64; 6] = [100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000];

/// A counter with one writer.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    fn add(&self, n: u64) {
        self.0.store(self.0.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
    }

    /// Its value now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// What a request was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A discard.
    Discard,
    /// A write-zeroes.
    WriteZeroes,
    /// A flush.
    Flush,
    /// GET_ID, and what makes no sense.
    Other,
}

impl Class {
    /// All of them, in the order of [`QueueStats::by_class`].
    pub const ALL: [Class; 6] =
        [Class::Read, Class::Write, Class::Discard, Class::WriteZeroes, Class::Flush, Class::Other];

    /// As the control socket names it.
    pub fn name(self) -> &'static str {
        match self {
            Class::Read => "reads",
            Class::Write => "writes",
            Class::Discard => "discards",
            Class::WriteZeroes => "write_zeroes",
            Class::Flush => "flushes",
            Class::Other => "other",
        }
    }

    fn of(request: &Request) -> Class {
        match &request.kind {
            Ok(Kind::Read { .. }) => Class::Read,
            Ok(Kind::Write { .. }) => Class::Write,
            Ok(Kind::WriteZeroes(_)) => Class::WriteZeroes,
            Ok(Kind::Discard(_)) => Class::Discard,
            Ok(Kind::Flush) => Class::Flush,
            Ok(Kind::GetId) | Err(_) => Class::Other,
        }
    }
}

/// Counters of one class of requests that have ended.
#[derive(Debug, Default)]
pub struct ClassStats {
    /// Requests, failed ones included.
    pub operations: Counter,
    /// Bytes of those that did not fail: transferred, zeroed or discarded.
    pub bytes: Counter,
    /// Requests that did not end with VIRTIO_BLK_S_OK.
    pub errors: Counter,
    /// Requests that did not end at once, by how long they took (see [`WAITS_US`]). Those that did, reads from the page
    /// cache and plain writes, are not timed: the clock would cost more than the counting.
    pub waits: [Counter; WAITS_US.len() + 1],
    /// Nanoseconds that those took together.
    pub wait_ns: Counter,
}

/// Counters of one queue.
#[derive(Debug, Default)]
#[repr(align(128))] // A cache line of its own (two, as they are fetched in pairs): no queue slows another one down.
pub struct QueueStats {
    classes: [ClassStats; Class::ALL.len()],
    /// Bytes read from the VM's own image.
    pub own_bytes: Counter,
    /// Bytes read from another image, which holds the same content: what the VMs share.
    pub shared_bytes: Counter,
    /// Bytes read from the overlay.
    pub overlay_bytes: Counter,
    /// Bytes that were zeros without reading.
    pub zero_bytes: Counter,
    /// Requests begun and ended.
    pub begun: Counter,
    /// Requests ended.
    pub ended: Counter,
    /// Tries after the first one (`--on-error retry`).
    pub retries: Counter,
}

impl QueueStats {
    /// The counters of a class.
    pub fn by_class(&self, class: Class) -> &ClassStats {
        &self.classes[class as usize]
    }

    /// Requests in flight.
    pub fn in_flight(&self) -> u64 {
        self.begun.get().saturating_sub(self.ended.get())
    }

    /// Reads that did not end at once: the page cache did not hold all that they wanted.
    pub fn reads_that_waited(&self) -> u64 {
        self.by_class(Class::Read).waits.iter().map(Counter::get).sum()
    }

    /// A request is taken from the ring.
    pub(super) fn begin(&self) {
        self.begun.add(1);
    }

    /// A request has ended, after `waited` unless it was done at once.
    pub(super) fn end(&self, request: &Request, status: Status, waited: Option<Duration>) {
        let class = &self.classes[Class::of(request) as usize];
        class.operations.add(1);
        if status == Status::Ok {
            class.bytes.add(request.bytes());
        } else {
            class.errors.add(1);
        }
        if let Some(waited) = waited {
            let us = u64::try_from(waited.as_micros()).unwrap_or(u64::MAX);
            class.waits[WAITS_US.iter().take_while(|bound| us >= **bound).count()].add(1);
            class.wait_ns.add(u64::try_from(waited.as_nanos()).unwrap_or(u64::MAX));
        }
        self.ended.add(1);
    }

    /// A request is left to whoever serves the ring next.
    pub(super) fn leave(&self) {
        self.ended.add(1);
    }

    /// A read is made up of these pieces; `own` is the VM's own image among the targets of its map.
    pub(super) fn sources(&self, pieces: &[Piece], own: Option<u32>) {
        for piece in pieces {
            let counter = match piece.source {
                Source::Image { target, .. } if Some(target) == own => &self.own_bytes,
                Source::Image { .. } => &self.shared_bytes,
                Source::Overlay { .. } => &self.overlay_bytes,
                Source::Zero => &self.zero_bytes,
            };
            counter.add(piece.len as u64);
        }
    }

    pub(super) fn retry(&self) {
        self.retries.add(1);
    }
}

/// What a server keeps on its requests, and how it treats those that fail: one for all queues, connections and activations.
#[derive(Debug)]
pub struct Ledger {
    on_error: OnError,
    queues: Box<[QueueStats]>,
    /// Requests that failed and wait for another try.
    retrying: AtomicUsize,
    /// Requests that were given up while the kernel still works on them.
    stuck: AtomicUsize,
    flush_failed: AtomicBool,
}

impl Ledger {
    /// An empty ledger for that many queues.
    pub fn new(on_error: OnError, queues: u16) -> Self {
        Ledger {
            on_error,
            queues: (0..queues.max(1)).map(|_| QueueStats::default()).collect(),
            retrying: AtomicUsize::new(0),
            stuck: AtomicUsize::new(0),
            flush_failed: AtomicBool::new(false),
        }
    }

    /// How failures are treated.
    pub fn on_error(&self) -> OnError {
        self.on_error
    }

    /// The counters of each queue.
    pub fn queues(&self) -> &[QueueStats] {
        &self.queues
    }

    /// The counters of one queue.
    ///
    /// # Panics
    /// If there is no such queue.
    pub fn queue(&self, index: usize) -> &QueueStats {
        &self.queues[index]
    }

    /// Requests that wait for another try.
    pub fn retrying(&self) -> usize {
        self.retrying.load(Ordering::Relaxed)
    }

    /// Requests that a bounded drain gave up and that the kernel has not let go of. As long as there are any, no queue
    /// takes a request, and the overlay must not be let go: a late write may still reach it.
    pub fn stuck(&self) -> usize {
        self.stuck.load(Ordering::Acquire)
    }

    /// True once a flush has failed.
    pub fn flush_failed(&self) -> bool {
        self.flush_failed.load(Ordering::Relaxed)
    }

    pub(super) fn set_flush_failed(&self) {
        self.flush_failed.store(true, Ordering::Relaxed);
    }

    /// A request waits for another try; true when it is the only one.
    pub(super) fn retry_begins(&self) -> bool {
        self.retrying.fetch_add(1, Ordering::Relaxed) == 0
    }

    /// It has ended; true when it was the last one.
    pub(super) fn retry_ends(&self) -> bool {
        self.retrying.fetch_sub(1, Ordering::Relaxed) == 1
    }

    pub(super) fn stuck_begins(&self) {
        self.stuck.fetch_add(1, Ordering::AcqRel);
    }

    /// The kernel has let go of one; true when it was the last.
    pub(super) fn stuck_ends(&self) -> bool {
        self.stuck.fetch_sub(1, Ordering::AcqRel) == 1
    }
}
