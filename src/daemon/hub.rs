//! What the control socket and the serving thread know of each other.

use super::handler::Handler;
use super::socket::Listening;
use rustix::event::{EventfdFlags, eventfd};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

/// How often to look whether a connection is free to be asked something.
const BUSY_PAUSE: Duration = Duration::from_millis(10);

/// The listening socket, offered to another process: all that was served is finished, and the disk is closed. Or why not.
pub struct Offer {
    /// The socket.
    pub listening: Result<Listening, String>,
    /// What became of it: back, for this process to go on, or away.
    pub back: Sender<Option<Listening>>,
}

/// How a hand-over ended.
pub enum HandedOver {
    /// Nobody has asked for one.
    NotAsked(Listening),
    /// Another process serves now.
    Gone,
    /// It came to nothing; go on.
    Back(Listening),
}

/// The meeting point.
pub struct Hub {
    /// The connection there is.
    handler: Mutex<Option<Arc<Mutex<Handler>>>>,
    /// No ring may run ('drain').
    paused: AtomicBool,
    /// There is a listening socket to hand over.
    listens: AtomicBool,
    wake: OwnedFd,
    asked: Mutex<Option<Sender<Offer>>>,
}

impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub").field("paused", &self.paused).finish_non_exhaustive()
    }
}

impl Hub {
    /// Nobody is connected.
    pub fn new() -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let (paused, listens) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Hub { handler: Mutex::new(None), paused, listens, wake, asked: Mutex::new(None) })
    }

    /// A connection begins or, without a handler, has ended (the caller holds the lock of its handler then).
    pub(super) fn connected(&self, handler: Option<Arc<Mutex<Handler>>>) {
        *self.handler.lock().unwrap_or_else(PoisonError::into_inner) = handler;
    }

    /// True while no ring may run.
    pub fn paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    /// Lets rings run or not, from the next look at them on.
    pub(super) fn pause(&self, on: bool) {
        self.paused.store(on, Ordering::Release);
    }

    /// Does something with the connection there is (`None` if there is none), once it is between two messages. An error if
    /// it is busy for longer than `limit`.
    ///
    /// Never with one that has ended while it was waited for: rings that it started would run beside those of the next one.
    pub(super) fn with_handler<T>(
        &self,
        limit: Duration,
        work: impl FnOnce(Option<&mut Handler>) -> T,
    ) -> Result<T, String> {
        let deadline = Instant::now() + limit;
        loop {
            let Some(handler) = self.current() else { return Ok(work(None)) };
            let guard = match handler.try_lock() {
                Ok(guard) => Some(guard),
                Err(TryLockError::Poisoned(guard)) => Some(guard.into_inner()),
                Err(TryLockError::WouldBlock) => None,
            };
            match guard {
                // It ends with its lock held.
                Some(mut guard) if self.current().is_some_and(|now| Arc::ptr_eq(&now, &handler)) => {
                    return Ok(work(Some(&mut guard)));
                }
                Some(_) => {}
                None if Instant::now() < deadline => std::thread::sleep(BUSY_PAUSE),
                None => return Err("the connection to the VM is busy".into()),
            }
        }
    }

    fn current(&self) -> Option<Arc<Mutex<Handler>>> {
        self.handler.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The serving thread listens, and will answer [`Hub::ask_for_socket`].
    pub(super) fn listens(&self) {
        self.listens.store(true, Ordering::Release);
    }

    /// Asks the serving thread to end all that it does and to offer its socket; waits for that. One without a listening
    /// socket is left alone.
    pub(super) fn ask_for_socket(&self, limit: Duration) -> Result<Offer, String> {
        if !self.listens.load(Ordering::Acquire) {
            return Err("this server has no listening socket to hand over (--fd), or has only just started".into());
        }
        let (sender, offers) = channel();
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        offers.recv_timeout(limit).map_err(|_| "the server does not stop in time".to_string())
    }

    /// The other side of [`Hub::ask_for_socket`], on the serving thread, when it has closed the disk (or could not).
    pub(super) fn offer(&self, listening: Listening, closed: &crate::Result<()>) -> HandedOver {
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8][..]);
        let Some(asked) = self.asked.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return HandedOver::NotAsked(listening);
        };
        let (back, answer) = channel();
        if let Err(e) = closed {
            let _ = asked.send(Offer { listening: Err(e.to_string()), back });
            return HandedOver::Back(listening);
        }
        if let Err(unsent) = asked.send(Offer { listening: Ok(listening), back }) {
            // Whoever asked has lost patience.
            return match unsent.0.listening {
                Ok(listening) => HandedOver::Back(listening),
                Err(_) => HandedOver::Gone,
            };
        }
        match answer.recv() {
            Ok(Some(listening)) => HandedOver::Back(listening),
            Ok(None) | Err(_) => HandedOver::Gone,
        }
    }
}

impl AsFd for Hub {
    /// Readable when the serving thread is asked to stop.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Names, Served};
    use super::*;
    use crate::device::{Drive, Ledger, OnError, Recipe};

    /// 'resume' would start its rings again, while the frontend starts the same ones on its next connection.
    #[test]
    fn a_connection_that_ends_while_it_is_waited_for_is_left_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let recipe = Recipe::File { path: file.path().to_path_buf(), read_only: false };
        let drive = Drive::new(recipe, [0; 20], Arc::new(Ledger::new(OnError::Report, 1))).unwrap();
        let served = Arc::new(Served::new(drive, Names::default()).unwrap());
        let handler = Arc::new(Mutex::new(Handler::new(Arc::clone(&served), 1, Duration::from_secs(1)).unwrap()));
        served.hub.connected(Some(Arc::clone(&handler)));
        let held = handler.lock().unwrap();
        let asks = std::thread::spawn({
            let served = Arc::clone(&served);
            move || served.hub.with_handler(Duration::from_secs(60), |handler| handler.is_some())
        });
        // Ours, the hub's, and the one of whoever asks.
        while Arc::strong_count(&handler) < 3 {
            std::thread::yield_now();
        }
        served.hub.connected(None);
        drop(held);
        assert_eq!(asks.join().unwrap(), Ok(false));
    }
}
