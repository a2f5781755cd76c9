//! Where helper threads leave the results that a queue thread picks up.

use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Results by token, and an eventfd that is raised for each. Clones are the same mailbox.
#[derive(Clone, Debug)]
pub struct Mailbox(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    event: OwnedFd,
    /// There are results.
    filled: AtomicBool,
    results: Mutex<Vec<(u64, io::Result<()>)>>,
}

impl Mailbox {
    /// An empty mailbox.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Mailbox(Arc::new(Inner { event, filled: AtomicBool::new(false), results: Mutex::new(Vec::new()) })))
    }

    /// Leaves a result.
    pub fn post(&self, token: u64, result: io::Result<()>) {
        let mut results = self.lock();
        results.push((token, result));
        self.0.filled.store(true, Ordering::Release);
        drop(results);
        self.wake();
    }

    /// Raises the event without a result.
    pub fn wake(&self) {
        // EAGAIN means the counter is full, and the owner is being woken anyway.
        let _ = rustix::io::write(&self.0.event, &1u64.to_ne_bytes());
    }

    /// True when there is something to take.
    pub fn is_filled(&self) -> bool {
        self.0.filled.load(Ordering::Acquire)
    }

    /// Everything left so far.
    pub fn take(&self) -> Vec<(u64, io::Result<()>)> {
        if !self.is_filled() {
            return Vec::new();
        }
        let mut results = self.lock();
        self.0.filled.store(false, Ordering::Release);
        std::mem::take(&mut *results)
    }

    /// Puts the event out, before looking at what it announced.
    pub fn clear(&self) {
        let _ = rustix::io::read(&self.0.event, &mut [0u8; 8][..]);
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(u64, io::Result<()>)>> {
        self.0.results.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Mailbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.event.as_fd()
    }
}
