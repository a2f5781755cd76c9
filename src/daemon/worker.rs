//! The thread of one queue, as the message handler has it: what it is told, and what it answers.

use super::dirty_log::Logging;
use super::inflight::Part;
use super::port::Port;
use super::queue::Queue;
use super::{GuestMemory, Vring};
use crate::device::{Disk, Executor, Jobs, Late, Mailbox};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a queue may take to switch its log: it does so between two batches of requests.
const LOG_TIME: Duration = Duration::from_secs(5);

/// What a worker is told.
pub(super) enum Command {
    /// Serve the ring, starting with a look at it (a kick may have come before).
    Run(Run),
    /// Take nothing more, finish what is in flight, publish it, then answer; at the deadline in any case.
    Stop { done: Sender<Stopped>, deadline: Instant, late: Late },
    /// Give up what is still in flight, but publish nothing.
    Abandon { done: Sender<()>, late: Late },
    /// Log what is written to guest memory from here on, or no more.
    Log { logging: Option<Logging>, done: Sender<()> },
    /// Let go of guest memory that is not the guest's any more.
    Forget,
    /// Publish again, now that the memory of what was given up is revoked.
    Publish { done: Sender<()> },
}

/// How a ring is to run.
#[derive(Debug)]
pub struct Run {
    /// Raised by the guest when there is something to look at.
    pub kick: File,
    /// Raised when the guest has broken the ring.
    pub err: Option<File>,
    /// Each write is durable before it completes.
    pub write_through: bool,
    /// Where what is in flight is noted. A ring that was not running takes up what is there.
    pub part: Option<Part>,
}

/// How a ring has stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// Nothing is in flight.
    Drained,
    /// The time is up, and the kernel or a job still works on this many requests.
    Stuck(usize),
    /// The time is up, and the thread itself does not answer: the kernel holds it in a write.
    Hung,
}

/// How much later than asked a thread may answer before it counts as hung.
const ANSWER_TIME: Duration = Duration::from_secs(2);

/// A queue's thread, started when its ring first runs.
pub struct Worker {
    commands: Sender<Command>,
    /// There is a command: between two requests, each of which a slow disk may hold up, the thread looks only at this.
    asked: Arc<AtomicBool>,
    mailbox: Mailbox,
    thread: Option<JoinHandle<()>>,
    /// The kernel may keep the thread, or what it works for, as long as it likes: it is not waited for.
    detached: bool,
}

impl Worker {
    /// Starts the thread of queue `index`.
    pub fn spawn(
        index: usize,
        vring: Vring,
        memory: GuestMemory,
        disk: Arc<Disk>,
        jobs: Arc<Jobs>,
    ) -> io::Result<Self> {
        let mailbox = Mailbox::new()?;
        let (commands, receiver) = channel();
        let asked = Arc::new(AtomicBool::new(false));
        let (ready, started) = channel();
        let thread = std::thread::Builder::new().name(format!("vmar-queue{index}")).spawn({
            let (mailbox, asked) = (mailbox.clone(), Arc::clone(&asked));
            move || {
                // The ring must be made on the thread that uses it.
                let executor = match Executor::new(index, disk, jobs, mailbox.clone()) {
                    Ok(executor) => executor,
                    Err(e) => return drop(ready.send(Err(e))),
                };
                let _ = ready.send(Ok(()));
                Queue::new(index, Port::new(vring, memory), mailbox, asked, executor).run(receiver);
            }
        })?;
        started.recv().unwrap_or_else(|_| Err(io::Error::other("the queue thread died")))?;
        Ok(Worker { commands, asked, mailbox, thread: Some(thread), detached: false })
    }

    /// Lets the ring run.
    pub fn run(&self, run: Run) {
        self.tell(Command::Run(run));
    }

    /// Gives up what a [`Stopped::Stuck`] ring still has in flight. Nothing is published before [`Worker::publish`]: in
    /// between, the caller revokes the guest memory (see [`super::revoke`]).
    pub fn abandon(&mut self, late: Late) {
        self.detached = true;
        let (done, wait) = channel();
        self.tell(Command::Abandon { done, late });
        let _ = wait.recv();
    }

    /// Ends what [`Worker::abandon`] began.
    pub fn publish(&self) {
        let (done, wait) = channel();
        self.tell(Command::Publish { done });
        let _ = wait.recv();
    }

    /// Has the thread look up its ring anew, so that it does not keep memory that the frontend took away.
    pub fn forget(&self) {
        self.tell(Command::Forget);
    }

    /// Leaves the thread alone from now on: it hangs.
    pub fn detach(&mut self) {
        self.detached = true;
    }

    /// Switches the log of dirty pages. On return whatever ends in this queue is logged so.
    pub fn log(&self, logging: Option<Logging>) -> io::Result<()> {
        let (done, wait) = channel();
        self.tell(Command::Log { logging, done });
        match wait.recv_timeout(LOG_TIME) {
            // A thread that has ended writes no more.
            Ok(()) | Err(RecvTimeoutError::Disconnected) => Ok(()),
            Err(RecvTimeoutError::Timeout) => Err(io::Error::other("a queue's thread hangs")),
        }
    }

    fn tell(&self, command: Command) {
        let _ = self.commands.send(command);
        self.asked.store(true, Ordering::Release);
        self.mailbox.wake();
    }
}

impl Drop for Worker {
    /// Ends the thread, which drains first. One that was detached ends by itself when the kernel has let go of all that it
    /// gave up.
    fn drop(&mut self) {
        let (closed, _) = channel();
        self.commands = closed;
        self.asked.store(true, Ordering::Release);
        self.mailbox.wake();
        if let Some(thread) = self.thread.take()
            && !self.detached
            && thread.join().is_err()
        {
            log::error!("a queue thread panicked");
        }
    }
}

/// Stops these workers' rings, and waits until nothing of them is in flight, or until the deadline. All at once: queues
/// drain side by side.
pub fn stop_all<'w>(workers: impl Iterator<Item = &'w Worker>, deadline: Instant, late: Late) -> Vec<Stopped> {
    let waits: Vec<_> = workers
        .map(|worker| {
            let (done, wait) = channel();
            worker.tell(Command::Stop { done, deadline, late });
            wait
        })
        .collect();
    let answer = |wait: Receiver<Stopped>| {
        let limit = deadline.saturating_duration_since(Instant::now()) + ANSWER_TIME;
        match wait.recv_timeout(limit) {
            Ok(stopped) => stopped,
            Err(RecvTimeoutError::Timeout) => Stopped::Hung,
            // A dead thread has dropped its end, and there is nothing to wait for.
            Err(RecvTimeoutError::Disconnected) => Stopped::Drained,
        }
    };
    waits.into_iter().map(answer).collect()
}
