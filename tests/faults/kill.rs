//! Kills the "process" at some system call, without a process: every thread ends in its next operation on the file.
//!
//! A thread that ends by unwinding lets go of its locks, as no killed one does, and others may then change the live bitmap
//! before they come to an operation of their own. So the live bitmap is copied when the first thread ends, and put back
//! before the next open. What ends after that moment counts as killed: it may have happened or not.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Condvar, Mutex};

/// What a killed thread unwinds with.
#[derive(Debug)]
pub struct Killed;

#[derive(Debug)]
struct Snapshot {
    time: u64,
    live: Vec<(PathBuf, Vec<u8>)>,
}

#[derive(Debug, Default)]
pub struct KillSwitch {
    state_dir: PathBuf,
    armed: AtomicBool,
    /// Operations that are still done.
    left: AtomicI64,
    taken: Mutex<Option<Snapshot>>,
    changed: Condvar,
}

impl KillSwitch {
    pub fn new(state_dir: &Path) -> KillSwitch {
        KillSwitch { state_dir: state_dir.to_path_buf(), ..KillSwitch::default() }
    }

    /// Kills once this many operations have been done, if there are as many.
    pub fn arm(&self, operations: u64) {
        self.left.store(operations as i64, Ordering::SeqCst);
        self.armed.store(true, Ordering::SeqCst);
    }

    /// True once the process is as good as dead.
    pub fn has_killed(&self) -> bool {
        self.taken.lock().unwrap().is_some()
    }

    /// Called before and after each operation; the end of the thread if it is time.
    pub fn maybe_die(&self, tick: impl FnOnce() -> u64) {
        if !self.armed.load(Ordering::SeqCst) {
            return;
        }
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            1.. => return,
            0 => {
                let time = tick();
                let paths = fs::read_dir(&self.state_dir).unwrap().map(|e| e.unwrap().path());
                let live = paths.map(|path| (path.clone(), fs::read(path).unwrap())).collect();
                *self.taken.lock().unwrap() = Some(Snapshot { time, live });
                self.changed.notify_all();
            }
            _ => drop(self.changed.wait_while(self.taken.lock().unwrap(), |t| t.is_none()).unwrap()),
        }
        std::panic::resume_unwind(Box::new(Killed));
    }

    /// Called when all threads have ended and the overlay is dropped: the moment of death, if it came; then what the
    /// process left is as it was at that moment.
    pub fn bury(&self) -> Option<u64> {
        self.armed.store(false, Ordering::SeqCst);
        let snapshot = self.taken.lock().unwrap().take()?;
        for (path, bytes) in snapshot.live {
            // Into the same file, as the next process maps it.
            let file = fs::File::options().write(true).open(path).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, &bytes, 0).unwrap();
        }
        Some(snapshot.time)
    }
}
