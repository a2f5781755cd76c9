//! Threads for what may wait: flushes, and writes that need base data or a lock.
//!
//! Two threads a disk, started at first use: one flushes, one does the rest, so that a slow fsync does not hold up a
//! small write. Flushes that pile up behind a running one are done by one flush.

use super::disk::Disk;
use super::mailbox::Mailbox;
use super::request::Segment;
use super::stats::Ledger;
use crate::io::buf::IoBuf;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

/// Something to do, and where its result goes. The buffers are pieces of guest memory that the poster keeps mapped until
/// it has taken the result from the mailbox.
///
/// Each job leaves exactly one result, whatever becomes of it: one that is dropped (its thread panicked, or could not be
/// made) has failed. A request without a result would hang the guest, and every drain of its queue.
#[derive(Debug)]
pub struct Job {
    work: Work,
    token: u64,
    /// Taken by the result.
    reply: Option<Mailbox>,
}

impl Job {
    /// Something to do whose result goes to `reply` under `token`.
    pub fn new(work: Work, token: u64, reply: Mailbox) -> Self {
        Job { work, token, reply: Some(reply) }
    }

    fn end(mut self, result: io::Result<()>) {
        if let Some(reply) = self.reply.take() {
            reply.post(self.token, result);
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        if let Some(reply) = self.reply.take() {
            reply.post(self.token, Err(io::Error::other("the thread for this request has ended")));
        }
    }
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
    ledger: Arc<Ledger>,
    slow: Mutex<Option<Desk>>,
    flush: Mutex<Option<Desk>>,
}

/// A thread, and where its jobs go.
#[derive(Debug)]
struct Desk {
    jobs: Sender<Job>,
    thread: Option<JoinHandle<()>>,
}

impl Jobs {
    /// No thread yet. What happens to the requests of all queues goes to `ledger`.
    pub fn new(disk: Arc<Disk>, ledger: Arc<Ledger>) -> Self {
        Jobs { disk, ledger, slow: Mutex::new(None), flush: Mutex::new(None) }
    }

    /// What is kept on the requests of the disk.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Ends the threads when they have done what they were given. They hold the disk, which is free on return.
    pub fn end(&self) {
        for slot in [&self.slow, &self.flush] {
            let desk = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
            let Some(Desk { jobs, thread }) = desk else { continue };
            drop(jobs);
            // One that has panicked is gone too, and has said so.
            let _ = thread.map(JoinHandle::join);
        }
    }

    /// Hands a job over. If its thread cannot be made the job fails by its mailbox. A thread that has ended (by a panic) is
    /// replaced.
    pub fn post(&self, job: Job) {
        let (slot, name, run): (_, _, fn(&Disk, Receiver<Job>)) = match job.work {
            Work::Flush => (&self.flush, "vmar-flush", run_flushes),
            Work::Write { .. } | Work::WriteZeroes(_) => (&self.slow, "vmar-slow", run_slow),
        };
        let mut slot = slot.lock().unwrap_or_else(PoisonError::into_inner);
        let job = match slot.as_ref() {
            Some(desk) => match desk.jobs.send(job) {
                Ok(()) => return,
                Err(failed) => failed.0,
            },
            None => job,
        };
        let (sender, receiver) = channel();
        let disk = Arc::clone(&self.disk);
        match thread::Builder::new().name(name.into()).spawn(move || run(&disk, receiver)) {
            Ok(thread) => {
                // The receiver lives, so this cannot fail; if it did, the job would end by being dropped.
                let _ = sender.send(job);
                *slot = Some(Desk { jobs: sender, thread: Some(thread) });
            }
            Err(e) => {
                log::error!("cannot start the thread {name}: {e}");
                job.end(Err(e));
            }
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
        job.end(result);
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
            job.end(copy);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Store;
    use crate::redirect::{Base, Current};
    use std::time::{Duration, Instant};

    fn disk() -> Arc<Disk> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let base = Current::new(Base::flat(file.path(), true).unwrap());
        Arc::new(Disk::new(base, Store::InPlace, [0; 20], Arc::default()))
    }

    fn results(mailbox: &Mailbox, count: usize) -> Vec<(u64, bool)> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut out = Vec::new();
        while out.len() < count {
            assert!(Instant::now() < deadline, "{out:?}");
            out.extend(mailbox.take().into_iter().map(|(token, result)| (token, result.is_ok())));
            thread::yield_now();
        }
        out.sort_unstable();
        out
    }

    /// What a panic of the thread does to the job in its hands and to those that wait behind it.
    #[test]
    fn a_job_whose_thread_dies_fails_and_the_next_one_gets_a_new_thread() {
        let mailbox = Mailbox::new().unwrap();
        let jobs = Jobs::new(disk(), Arc::new(Ledger::new(crate::device::OnError::Report, 1)));
        let (sender, receiver) = channel::<Job>();
        *jobs.flush.lock().unwrap() = Some(Desk { jobs: sender, thread: None });
        for token in [1, 2] {
            jobs.post(Job::new(Work::Flush, token, mailbox.clone()));
        }
        let dying = thread::spawn(move || {
            let _job = receiver.recv().unwrap();
            panic!("on purpose");
        });
        assert!(dying.join().is_err());
        assert_eq!(results(&mailbox, 2), [(1, false), (2, false)]);
        jobs.post(Job::new(Work::Flush, 3, mailbox.clone()));
        assert_eq!(results(&mailbox, 1), [(3, true)]);
    }
}
