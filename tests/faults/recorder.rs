//! Records what is done to the overlay file and when, and can kill in the middle of it.

use crate::kill::KillSwitch;
use std::cell::Cell;
use std::io;
use std::sync::Mutex;
use vmar::io::fault::{Faults, Op};

/// A change of the file.
#[derive(Debug)]
pub struct FileChange {
    pub at: u64,
    pub what: What,
    pub begin: u64,
    /// `u64::MAX` until it has ended.
    pub end: u64,
}

#[derive(Debug)]
pub enum What {
    Write(Vec<u8>),
    Hole(u64),
}

impl FileChange {
    pub fn len(&self) -> u64 {
        match &self.what {
            What::Write(bytes) => bytes.len() as u64,
            What::Hole(len) => *len,
        }
    }
}

/// A sync that succeeded: makes durable what had ended before it began.
#[derive(Clone, Copy, Debug)]
pub struct Sync {
    pub begin: u64,
    pub end: u64,
}

/// Everything, in the order in which it began.
#[derive(Debug, Default)]
pub struct Log {
    clock: u64,
    pub changes: Vec<FileChange>,
    pub syncs: Vec<Sync>,
}

/// A broken order of a flush, to see whether it would be noticed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Broken {
    #[default]
    No,
    /// The sync before the bits is left out.
    BitsBeforeData,
    /// The sync after the bits is left out; the next flush makes up for it.
    BitsLater,
}

#[derive(Debug)]
pub struct Recorder {
    log: Mutex<Log>,
    broken: Broken,
    pub kill: KillSwitch,
}

thread_local! {
    /// Syncs so far of the flush that this thread is in.
    static SYNCS: Cell<Option<u32>> = const { Cell::new(None) };
}

impl Recorder {
    pub fn new(broken: Broken, kill: KillSwitch) -> Recorder {
        Recorder { log: Mutex::default(), broken, kill }
    }

    fn log<T>(&self, f: impl FnOnce(&mut Log, u64) -> T) -> T {
        let mut log = self.log.lock().unwrap();
        log.clock += 1;
        let now = log.clock;
        f(&mut log, now)
    }

    /// The time now. Each call gives a later one.
    pub fn tick(&self) -> u64 {
        self.log(|_, now| now)
    }

    pub fn finish(&self) -> Log {
        std::mem::take(&mut self.log.lock().unwrap())
    }

    /// Runs a flush in the broken order, if there is one.
    pub fn flush(&self, flush: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        if self.broken == Broken::No {
            return flush();
        }
        SYNCS.set(Some(0));
        let result = flush();
        if SYNCS.take() == Some(1) && self.broken == Broken::BitsBeforeData {
            // No bits: its only sync was left out, and that is another fault than the one that is meant.
            self.log(|log, now| log.syncs.push(Sync { begin: now - 1, end: now }));
        }
        result
    }

    /// True if the sync that this thread comes to is the one that the broken order leaves out.
    fn left_out(&self) -> bool {
        let Some(before) = SYNCS.get() else { return false };
        SYNCS.set(Some(before + 1));
        match self.broken {
            Broken::No => false,
            Broken::BitsBeforeData => before == 0,
            Broken::BitsLater => before == 1,
        }
    }

    fn change(&self, at: u64, what: What, go: &mut dyn FnMut(usize) -> io::Result<usize>) -> io::Result<usize> {
        let number = self.log(|log, begin| {
            log.changes.push(FileChange { at, what, begin, end: u64::MAX });
            log.changes.len() - 1
        });
        let result = go(usize::MAX);
        self.log(|log, end| {
            let change = &mut log.changes[number];
            change.end = end;
            if let (What::Write(bytes), Ok(done)) = (&mut change.what, &result) {
                bytes.truncate(*done);
            }
        });
        result
    }
}

impl Faults for Recorder {
    fn run(&self, op: &Op<'_>, go: &mut dyn FnMut(usize) -> io::Result<usize>) -> io::Result<usize> {
        if matches!(op, Op::Read { .. } | Op::ReadCached { .. }) {
            return go(usize::MAX);
        }
        self.kill.maybe_die(|| self.tick());
        let result = match *op {
            Op::Write { at, .. } => self.change(at, What::Write(op.bytes()), go),
            Op::Punch { at, len } => self.change(at, What::Hole(len), go),
            _ if self.left_out() => Ok(0),
            _ => {
                let begin = self.tick();
                let result = go(usize::MAX);
                if result.is_ok() {
                    self.log(|log, end| log.syncs.push(Sync { begin, end }));
                }
                result
            }
        };
        // Death may come after the operation, too, before anybody learns of it.
        self.kill.maybe_die(|| self.tick());
        result
    }
}
