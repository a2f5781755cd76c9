//! The thread of one queue: takes chains off the ring, starts them, publishes what has ended.

use super::dirty_log::{DirtyLog, Logging};
use super::inflight::{Part, Tracker};
use super::replay::Shown;
use super::ring::{in_reach, interrupts_off};
use super::{GuestMap, GuestMemory, Vring};
use crate::device::executor::Written;
use crate::device::{Completion, Disk, Executor, Jobs, Late, Mailbox, Request};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vhost_user_backend::VringT;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestAddressSpace;

/// Requests taken off the ring before their completions are published and the guest is told.
const BATCH: usize = 32;

/// How long a queue may take to switch its log: it does so between two batches of requests.
const LOG_TIME: Duration = Duration::from_secs(5);

/// What a worker is told.
enum Command {
    /// Serve the ring, starting with a look at it (a kick may have come before).
    Run(Run),
    /// Take nothing more, finish what is in flight, publish it, then answer; at the deadline in any case.
    Stop { done: Sender<Stopped>, deadline: Instant, late: Late },
    /// Give up what is still in flight, but publish nothing.
    Abandon { done: Sender<()>, late: Late },
    /// Log what is written to guest memory from here on, or no more.
    Log { logging: Option<Logging>, done: Sender<()> },
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
                let queue = Queue {
                    index,
                    vring,
                    memory,
                    mailbox,
                    asked,
                    executor,
                    kick: None,
                    err: None,
                    fresh: true,
                    tracker: Tracker::default(),
                    again: VecDeque::new(),
                    ended: Vec::new(),
                    bad_heads: 0,
                    held: false,
                    log_used: None,
                };
                queue.run(receiver);
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

/// What lives on the thread.
struct Queue {
    index: usize,
    vring: Vring,
    memory: GuestMemory,
    mailbox: Mailbox,
    asked: Arc<AtomicBool>,
    executor: Executor<Arc<GuestMap>>,
    /// The ring runs as long as this is here.
    kick: Option<File>,
    err: Option<File>,
    /// Nothing was taken off the ring since it was last stopped.
    fresh: bool,
    /// What was taken and is not yet in the used ring.
    tracker: Tracker,
    /// Heads that another process had in flight, to be started before any other.
    again: VecDeque<u16>,
    /// What has ended and was not yet told to the tracker.
    ended: Vec<Completion>,
    bad_heads: u64,
    /// What has ended must not be published yet.
    held: bool,
    /// Where writes to the used ring are logged.
    log_used: Option<(Arc<DirtyLog>, u64)>,
}

/// What a look at the ring found.
enum Looked {
    /// Nothing left to take.
    Empty,
    /// More may be there.
    More,
    /// The ring makes no sense or is out of reach; it is left alone until it, or the guest's memory, is set up anew.
    Broken,
}

impl Queue {
    fn run(mut self, commands: Receiver<Command>) {
        let mut busy = false;
        loop {
            if let Err(e) = self.wait(busy) {
                log::error!("queue {}: poll failed: {e}", self.index);
                return;
            }
            self.asked.store(false, Ordering::Release);
            loop {
                match commands.try_recv() {
                    Ok(Command::Run(Run { kick, err, write_through, part })) => {
                        self.executor.set_write_through(write_through);
                        self.err = err;
                        self.kick = (!self.fresh || self.take_up(part)).then_some(kick);
                    }
                    Ok(Command::Stop { done, deadline, late }) => {
                        let stopped = self.drain(Some(deadline), late);
                        self.kick = None;
                        if stopped == Stopped::Drained {
                            self.let_go();
                        }
                        let _ = done.send(stopped);
                    }
                    Ok(Command::Abandon { done, late }) => {
                        self.held = true;
                        self.executor.abandon(late, &mut self.ended);
                        if late == Late::Fail {
                            self.refuse_rest();
                        }
                        drop(done);
                    }
                    Ok(Command::Log { logging, done }) => {
                        self.log(logging);
                        let _ = done.send(());
                    }
                    Ok(Command::Publish { done }) => {
                        self.held = false;
                        self.publish();
                        self.let_go();
                        drop(done);
                    }
                    Err(std::sync::mpsc::TryRecvError::Empty) => break,
                    Err(std::sync::mpsc::TryRecvError::Disconnected) => {
                        self.drain(None, Late::Leave);
                        return;
                    }
                }
            }
            self.collect();
            self.publish();
            busy = self.kick.is_some() && self.serve();
        }
    }

    /// Begins with a ring: finds out what another process has left in flight, and tells the guest to look, as that one may
    /// have published something and not told. False when the ring cannot be served as it is.
    fn take_up(&mut self, part: Option<Part>) -> bool {
        let memory = self.memory.memory().into_inner();
        let mut vring = self.vring.get_mut();
        let queue = vring.get_queue_mut();
        if !in_reach(queue, &memory) {
            log::error!("queue {}: the ring is not in the guest's memory", self.index);
            return false;
        }
        let load = Ordering::Acquire;
        let (Ok(used), Ok(avail)) = (queue.used_idx(&*memory, load), queue.avail_idx(&*memory, load)) else {
            return false;
        };
        queue.set_next_used(used.0);
        self.tracker = Tracker::default();
        if let Some(mut part) = part {
            let found = part.recover(used.0, queue.size());
            let heads = found.as_ref().map_or(0, Vec::len);
            // The driver has that many in flight, all told.
            let offered = (avail - used).0;
            if heads > usize::from(offered) {
                log::error!(
                    "queue {}: the inflight region has {heads} requests, the ring only {offered}; it is left alone",
                    self.index
                );
                return false;
            }
            if let Some(found) = found {
                // Heads are taken in order, so those that were taken follow the used ones. SET_VRING_BASE knows less.
                queue.set_next_avail(used.0.wrapping_add(u16::try_from(heads).unwrap_or(0)));
                self.again = found.into();
                if heads > 0 {
                    log::info!("queue {}: {heads} requests in flight are started again", self.index);
                }
            }
            self.tracker = Tracker::new(Some(part), heads);
        }
        let _ = vring.signal_used_queue();
        drop(vring);
        self.fresh = false;
        true
    }

    /// Ends with a ring after [`Queue::drain`]. What could not be published stays in flight for whoever takes the ring up.
    fn let_go(&mut self) {
        self.kick = None;
        let (left, forgotten) = (self.tracker.outstanding(), self.tracker.forgotten());
        if left > 0 {
            log::error!("queue {}: {left} requests are left to be started again", self.index);
            let mut vring = self.vring.get_mut();
            let queue = vring.get_queue_mut();
            queue.set_next_avail(queue.next_avail().wrapping_sub(forgotten));
        }
        self.tracker = Tracker::default();
        self.again.clear();
        self.ended.clear();
        self.fresh = true;
    }

    /// Sleeps until a kick, a completion or a command; does not sleep when the ring is known to hold more. Leaves both
    /// events put out.
    fn wait(&mut self, busy: bool) -> io::Result<()> {
        // A guest that floods its ring faster than it is drained waits here, not in memory of ours.
        let full = self.full();
        let mailbox = self.mailbox.clone();
        let mut fds = vec![PollFd::from_borrowed_fd(mailbox.as_fd(), PollFlags::IN)];
        if let Some(kick) = &self.kick
            && !full
        {
            fds.push(PollFd::new(kick, PollFlags::IN));
        }
        let limit = if busy && !full { Some(Duration::ZERO) } else { self.executor.until_due() };
        match poll(&mut fds, limit.map(timespec).as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let seen = fds.get(1).map_or(PollFlags::empty(), PollFd::revents);
        self.mailbox.clear();
        if let Some(kick) = &self.kick {
            let dead = if seen.contains(PollFlags::IN) {
                // Not blocking: the handler has seen to that. Whatever cannot be emptied would be ready forever.
                !matches!(rustix::io::read(kick, &mut [0u8; 8][..]), Ok(1..) | Err(Errno::AGAIN | Errno::INTR))
            } else {
                seen.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL)
            };
            if dead {
                log::error!("queue {}: the kick descriptor is dead, the ring stops", self.index);
                self.kick = None;
            }
        }
        Ok(())
    }

    fn full(&self) -> bool {
        self.executor.is_full() || self.tracker.outstanding() >= usize::from(self.vring.get_ref().get_queue().size())
    }

    /// Serves up to one ring's worth of requests; true when the ring may hold more.
    fn serve(&mut self) -> bool {
        let rounds = usize::from(self.vring.get_ref().get_queue().size()).div_ceil(BATCH);
        for _ in 0..rounds.max(1) {
            let looked = self.batch();
            self.used_written();
            self.executor.submit();
            self.collect();
            self.publish();
            match looked {
                Looked::Empty => return false,
                Looked::More if self.asked.load(Ordering::Acquire) => return true,
                Looked::More => {}
                Looked::Broken => {
                    self.kick = None;
                    if let Some(err) = &self.err {
                        // A frontend that reads none of it has been told.
                        let _ = rustix::io::write(err, &1u64.to_ne_bytes());
                    }
                    return false;
                }
            }
        }
        true
    }

    /// Takes up to [`BATCH`] chains off the ring and starts them.
    fn batch(&mut self) -> Looked {
        // One snapshot of the memory map for the batch; each request keeps it alive until it has ended.
        let memory = self.memory.memory().into_inner();
        let mut vring = self.vring.get_mut();
        let queue = vring.get_queue_mut();
        let size = queue.size();
        if !in_reach(queue, &memory) {
            log::error!("queue {}: the ring is not in the guest's memory", self.index);
            return Looked::Broken;
        }
        if let Err(e) = queue.disable_notification(&*memory) {
            log::error!("queue {}: the used ring is out of reach: {e}", self.index);
            return Looked::Broken;
        }
        let mut taken = start_again(&mut self.again, &mut self.executor, &mut self.ended, queue, &memory);
        let mut chains = match queue.iter(Arc::clone(&memory)) {
            Ok(chains) => chains,
            // The handler is about to stop it.
            Err(virtio_queue::Error::QueueNotReady) => return Looked::Empty,
            Err(e) => {
                log::error!("queue {}: the guest broke its ring: {e}", self.index);
                return Looked::Broken;
            }
        };
        while taken < BATCH && !self.executor.is_full() && self.tracker.outstanding() < usize::from(size) {
            let chain = if self.asked.load(Ordering::Acquire) { None } else { chains.next() };
            let Some(chain) = chain else { break };
            taken += 1;
            let head = chain.head_index();
            if head >= size {
                // There is no such descriptor, and no place in the used ring for it.
                self.bad_heads += 1;
                if self.bad_heads.is_power_of_two() {
                    log::warn!("queue {}: the guest offered descriptor {head} of {size}", self.index);
                }
                continue;
            }
            let request = Request::parse(chain);
            self.tracker.take(head);
            self.ended.extend(self.executor.start(head, request, Arc::clone(&memory)));
        }
        if taken > 0 {
            return Looked::More;
        }
        match queue.enable_notification(&*memory) {
            Ok(true) if !self.executor.is_full() && self.tracker.outstanding() < usize::from(size) => Looked::More,
            Ok(_) => Looked::Empty,
            Err(e) => {
                log::error!("queue {}: the ring is out of reach: {e}", self.index);
                Looked::Broken
            }
        }
    }

    fn log(&mut self, logging: Option<Logging>) {
        self.log_used = logging.as_ref().and_then(|l| l.used.map(|at| (Arc::clone(&l.log), at)));
        self.executor.set_written(logging.filter(|l| l.data).map(|l| {
            let written: Written<Arc<super::GuestMap>> = Box::new(move |map, piece| l.log.mark_piece(map, piece));
            written
        }));
    }

    /// Marks the used ring as written, after it was (the indices, or whether we want to be told).
    fn used_written(&self) {
        if let Some((log, at)) = &self.log_used {
            log.mark(*at, 6 + 8 * u64::from(self.vring.get_ref().get_queue().size()));
        }
    }

    /// Collects what has ended.
    fn collect(&mut self) {
        self.executor.reap(&mut self.ended);
    }

    /// Puts what has ended into the used ring and tells the guest, if it wants to be told. While the frontend is changing
    /// the memory map the ring may be out of reach; what has ended then waits for the next look.
    fn publish(&mut self) {
        if self.held {
            return;
        }
        for done in self.ended.drain(..) {
            self.tracker.end(done);
        }
        if !self.tracker.is_ready() {
            return;
        }
        let memory = self.memory.memory().into_inner();
        let mut vring = self.vring.get_mut();
        let queue = vring.get_queue_mut();
        if !in_reach(queue, &memory) {
            return;
        }
        while let Some(done) = self.tracker.next_ended() {
            self.tracker.publishing(done.head);
            match queue.add_used(&*memory, done.head, done.len) {
                Ok(()) => self.tracker.published(done.head, queue.next_used()),
                Err(e) => log::error!("queue {}: the used ring is out of reach: {e}", self.index),
            }
        }
        let wanted = queue.needs_notification(&*memory).unwrap_or(true) && !interrupts_off(queue, &memory);
        drop(vring);
        self.used_written();
        // A call descriptor that takes no more is a guest that has been told.
        if wanted
            && let Err(e) = self.vring.signal_used_queue()
            && e.kind() != io::ErrorKind::WouldBlock
        {
            log::error!("queue {}: cannot signal the guest: {e}", self.index);
        }
    }

    /// Finishes what is in flight and publishes it. At the deadline, what waits for another try is given up; what the
    /// kernel has stays in flight. Without a deadline, also waits for what was given up.
    fn drain(&mut self, deadline: Option<Instant>, late: Late) -> Stopped {
        self.collect();
        self.resume();
        while self.has_work(late) || deadline.is_none() && self.executor.abandoned() > 0 {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                self.executor.give_up(late, &mut self.ended);
                break;
            }
            // What ends early is not held back.
            self.publish();
            let limit = left.into_iter().chain(self.executor.until_due()).min();
            let mailbox = self.mailbox.clone();
            let mut fds = [PollFd::from_borrowed_fd(mailbox.as_fd(), PollFlags::IN)];
            let _ = poll(&mut fds, limit.map(timespec).as_ref());
            self.mailbox.clear();
            self.collect();
            self.resume();
        }
        self.publish();
        match self.has_work(late) {
            false => Stopped::Drained,
            true => Stopped::Stuck(self.executor.in_flight() + self.again.len()),
        }
    }

    /// True when something is in flight that can end, and should. What was not started again yet can be left as it is.
    fn has_work(&self, late: Late) -> bool {
        let again = late == Late::Fail && !self.again.is_empty();
        self.executor.in_flight() > 0 || again && self.reaches_ring()
    }

    fn reaches_ring(&self) -> bool {
        in_reach(self.vring.get_ref().get_queue(), &self.memory.memory().into_inner())
    }

    /// Ends what was to be started again with an I/O error, for a queue that must stop now.
    fn refuse_rest(&mut self) {
        let memory = self.memory.memory().into_inner();
        let vring = self.vring.get_ref();
        if in_reach(vring.get_queue(), &memory) {
            for head in self.again.drain(..) {
                let request = Shown::new(&memory, head).chain(vring.get_queue()).map(Request::parse);
                self.ended.extend(request.and_then(|request| self.executor.refuse(head, &request, &memory)));
            }
        }
    }

    /// Starts what is to be started again, as far as there is room: it was taken, and so is to be finished.
    fn resume(&mut self) {
        if self.again.is_empty() {
            return;
        }
        let memory = self.memory.memory().into_inner();
        let vring = self.vring.get_ref();
        let queue = vring.get_queue();
        while in_reach(queue, &memory)
            && start_again(&mut self.again, &mut self.executor, &mut self.ended, queue, &memory) > 0
        {}
        drop(vring);
        self.executor.submit();
        self.collect();
    }
}

/// Starts up to [`BATCH`] of the requests that another process had in flight; tells how many. The ring is in reach.
fn start_again(
    again: &mut VecDeque<u16>,
    executor: &mut Executor<Arc<GuestMap>>,
    ended: &mut Vec<Completion>,
    queue: &virtio_queue::Queue,
    memory: &Arc<GuestMap>,
) -> usize {
    let mut started = 0;
    while started < BATCH
        && !executor.is_full()
        && let Some(head) = again.pop_front()
    {
        started += 1;
        // The region says that it was taken; what it asks for is in the guest's own memory, still.
        if let Some(chain) = Shown::new(memory, head).chain(queue) {
            ended.extend(executor.start(head, Request::parse(chain), Arc::clone(memory)));
        }
    }
    started
}

/// As poll takes it; rounded up to a millisecond, so that a wait for a moment does not end just before it.
fn timespec(time: Duration) -> rustix::event::Timespec {
    let ns = if time.is_zero() { 0 } else { time.subsec_millis() * 1_000_000 + 999_999 };
    rustix::event::Timespec { tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX), tv_nsec: i64::from(ns) }
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
