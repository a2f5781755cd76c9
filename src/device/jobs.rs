//! Threads for what may wait: flushes, and writes that need base data or a lock.
//!
//! Two threads a disk, started at first use: one flushes, one does the rest, so that a slow fsync does not hold up a
//! small write. Flushes that pile up behind a running one are done by one flush.

use super::disk::Disk;
use super::mailbox::Mailbox;
use super::request::Segment;
use crate::io::buf::IoBuf;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Something to do, and where its result goes. The buffers are pieces of guest memory that the poster keeps mapped until
/// it has taken the result from the mailbox.
#[derive(Debug)]
pub struct Job {
    /// What to do.
    pub work: Work,
    /// For the mailbox.
    pub token: u64,
    /// Where the result goes.
    pub reply: Mailbox,
}

/// What a job does.
#[derive(Debug)]
pub enum Work {
    /// Write the buffers from byte `offset` on; then flush, if so asked.
    Write {
        /// Byte offset on the disk.
        offset: u64,
        /// The data.
        bufs: Vec<IoBuf>,
    },
    /// Make ranges read as zeros.
    WriteZeroes(Vec<Segment>),
    /// Make completed writes durable.
    Flush,
}

/// The two threads of a disk.
#[derive(Debug)]
pub struct Jobs {
    disk: Arc<Disk>,
    slow: Mutex<Option<Sender<Job>>>,
    flush: Mutex<Option<Sender<Job>>>,
}

impl Jobs {
    /// No thread yet.
    pub fn new(disk: Arc<Disk>) -> Self {
        Jobs { disk, slow: Mutex::new(None), flush: Mutex::new(None) }
    }

    /// Hands a job over. If its thread cannot be made the job fails by its mailbox.
    pub fn post(&self, job: Job) {
        let (slot, name, run): (_, _, fn(&Disk, Receiver<Job>)) = match job.work {
            Work::Flush => (&self.flush, "vmar-flush", run_flushes),
            Work::Write { .. } | Work::WriteZeroes(_) => (&self.slow, "vmar-slow", run_slow),
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_none() {
            let (sender, receiver) = channel();
            let disk = Arc::clone(&self.disk);
            let made = thread::Builder::new().name(name.into()).spawn(move || run(&disk, receiver));
            if let Err(e) = made {
                log::error!("cannot start the thread {name}: {e}");
                return job.reply.post(job.token, Err(e));
            }
            *slot = Some(sender);
        }
        let Some(sender) = slot.as_ref() else { return };
        if let Err(failed) = sender.send(job) {
            let job = failed.0;
            job.reply.post(job.token, Err(io::Error::other("the thread for slow requests has ended")));
        }
    }
}

fn run_slow(disk: &Disk, jobs: Receiver<Job>) {
    for job in jobs {
        let result = match &job.work {
            Work::Write { offset, bufs } => disk.write(*offset, bufs),
            Work::WriteZeroes(segments) => {
                segments.iter().try_for_each(|s| disk.write_zeroes(s.offset, s.len, s.unmap))
            }
            Work::Flush => disk.flush(),
        };
        job.reply.post(job.token, result);
    }
}

fn run_flushes(disk: &Disk, jobs: Receiver<Job>) {
    while let Ok(first) = jobs.recv() {
        // Every job here was posted before the flush starts, so one flush serves them all.
        let batch: Vec<Job> = std::iter::once(first).chain(jobs.try_iter()).collect();
        let result = disk.flush();
        for job in batch {
            let copy = match &result {
                Ok(()) => Ok(()),
                Err(e) => Err(e.raw_os_error().map_or_else(|| e.kind().into(), io::Error::from_raw_os_error)),
            };
            job.reply.post(job.token, copy);
        }
    }
}
