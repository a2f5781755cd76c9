//! The base that a server reads at present. Another one may take its place while requests run.
//!
//! Maps of one image differ in *where* they read a block, never in what it holds: images do not change. So which of two
//! bases a request is served by makes no difference, as long as it is one of them throughout: pieces name targets by their
//! number in the map that planned them.
//!
//! - A queue has a [`View`] and looks once a batch, between two requests, whether it is still the latest: one load of a
//!   counter that hardly ever changes. All that the queue plans and reads until then is of the base in its view.
//! - Reads that are handed to io_uring hold the base that they were planned with ([`super::reader`]).
//! - Threads that read a base now and then ask for it each time ([`Current::get`]) and let go of it when they are done.
//! - A queue that sleeps is woken to let go of the old base. When the last user is gone, whoever made the change closes it
//!   ([`Retired`]), so that no queue waits for that.

use super::Base;
use crate::error::{Error, ErrorKind, Result};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How often to look whether an old base is still in use: at first, and at most.
const LOOK_FIRST: Duration = Duration::from_micros(200);
const LOOK_MAX: Duration = Duration::from_millis(50);

/// Wakes whoever has a view.
type Wake = Box<dyn Fn() + Send>;

/// The base that is read, replaced as a whole.
pub struct Current {
    /// Counts the bases there were. Changed with the lock held.
    version: AtomicU64,
    state: Mutex<State>,
}

struct State {
    base: Arc<Base>,
    /// By the number of the view.
    wakes: Vec<(u64, Wake)>,
    next: u64,
}

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Current").field("version", &self.version).field("base", &self.get()).finish_non_exhaustive()
    }
}

impl Current {
    /// Begins with this base.
    pub fn new(base: Base) -> Arc<Current> {
        let state = State { base: Arc::new(base), wakes: Vec::new(), next: 0 };
        Arc::new(Current { version: AtomicU64::new(0), state: Mutex::new(state) })
    }

    /// The base at this moment. Whoever keeps it keeps its files open.
    pub fn get(&self) -> Arc<Base> {
        Arc::clone(&self.lock().base)
    }

    /// A view for a queue; `wake` gets the queue to call [`View::refresh`] when it has nothing to do. It is called with a
    /// lock held, and must not wait.
    pub fn view(self: &Arc<Self>, wake: impl Fn() + Send + 'static) -> View {
        let mut state = self.lock();
        let number = state.next;
        state.next += 1;
        state.wakes.push((number, Box::new(wake)));
        let (version, base) = (self.version.load(Ordering::Relaxed), Arc::clone(&state.base));
        drop(state);
        View { current: Arc::clone(self), number, version, base }
    }

    /// Puts another base in place: what is planned from now on is planned with it. Gives back the old one, which requests
    /// in flight may still use.
    ///
    /// # Errors
    /// `Usage` when `base` is not of the same image, generation and content, or is no image's: it would be another disk.
    pub fn replace(&self, base: Base) -> Result<Retired> {
        let mut state = self.lock();
        if state.base.source().is_none() || state.base.source() != base.source() {
            let other = base.source().map_or_else(|| "no image".into(), |s| format!("image {}", s.image));
            return Err(Error::new(
                ErrorKind::Usage,
                "the new map",
                format!("is of {other}, which is not served here"),
            ));
        }
        let old = std::mem::replace(&mut state.base, Arc::new(base));
        // Release: who sees the number finds the base behind the lock.
        self.version.fetch_add(1, Ordering::Release);
        state.wakes.iter().for_each(|(_, wake)| wake());
        Ok(Retired(old))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Between any two statements the state is one that can be gone on with.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What one queue reads. Belongs to its thread.
#[derive(Debug)]
pub struct View {
    current: Arc<Current>,
    number: u64,
    version: u64,
    base: Arc<Base>,
}

impl View {
    /// The base to plan with, and to read what was planned with it.
    #[inline]
    pub fn base(&self) -> &Arc<Base> {
        &self.base
    }

    /// Tells this base from those that come before and after it.
    #[inline]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Takes the latest base; true when it is another one. Plans that were made before must not be used any more.
    #[inline]
    pub fn refresh(&mut self) -> bool {
        if self.current.version.load(Ordering::Acquire) == self.version {
            return false;
        }
        self.change();
        true
    }

    #[cold]
    fn change(&mut self) {
        let state = self.current.lock();
        self.version = self.current.version.load(Ordering::Relaxed);
        // Behind the lock: the old one may be the last, and its end takes time.
        let old = std::mem::replace(&mut self.base, Arc::clone(&state.base));
        drop(state);
        drop(old);
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.current.lock().wakes.retain(|(number, _)| *number != self.number);
    }
}

/// A base that is not read any more but by requests in flight. Dropped, it is closed by the last of them.
#[derive(Debug)]
#[must_use = "closed here, it holds up no queue"]
pub struct Retired(Arc<Base>);

impl Retired {
    /// The base.
    pub fn base(&self) -> &Base {
        &self.0
    }

    /// Closes it if nobody uses it any more.
    pub fn close(self) -> std::result::Result<(), Retired> {
        // Nobody can come by it anew, so the count only falls.
        Arc::try_unwrap(self.0).map(drop).map_err(Retired)
    }

    /// Waits until nobody uses it, for as long as `limit` if there is one, and closes it.
    pub fn close_in_time(mut self, limit: Option<Duration>) -> std::result::Result<(), Retired> {
        let begin = Instant::now();
        let mut pause = LOOK_FIRST;
        loop {
            self = match self.close() {
                Ok(()) => return Ok(()),
                Err(used) if limit.is_some_and(|limit| begin.elapsed() >= limit) => return Err(used),
                Err(used) => used,
            };
            std::thread::sleep(pause);
            pause = (pause * 2).min(LOOK_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raw_file_stays_what_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let open = || Base::flat(file.path(), false).unwrap();
        let current = Current::new(open());
        let mut view = current.view(|| panic!("nothing has changed"));
        assert_eq!(current.replace(open()).unwrap_err().kind(), ErrorKind::Usage);
        assert!(!view.refresh());
        drop(view);
        assert!(current.lock().wakes.is_empty());
    }

    #[test]
    fn what_is_retired_is_closed_by_whoever_made_the_change() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let base = Arc::new(Base::flat(file.path(), false).unwrap());
        let used = Arc::clone(&base);
        let retired = Retired(base).close().unwrap_err();
        let retired = retired.close_in_time(Some(Duration::from_millis(1))).unwrap_err();
        let user = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            drop(used);
        });
        assert!(retired.close_in_time(None).is_ok());
        user.join().unwrap();
    }
}
