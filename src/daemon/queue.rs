//! What the thread of a queue does: takes chains off the ring, starts them, publishes what has ended.

use super::GuestMap;
use super::dirty_log::{DirtyLog, Logging};
use super::inflight::{Part, Tracker};
use super::port::Port;
use super::spin::Spin;
use super::worker::{Command, Run, Stopped};
use crate::device::executor::Written;
use crate::device::{Completion, Executor, Late, Mailbox, Request, Ring};
use crate::units::BLOCK_SIZE;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;

/// Requests taken off the ring before their completions are published and the guest is told.
const BATCH: usize = 32;

/// Requests that are taken apart together, before the first of them is started.
const GROUP: usize = 8;

/// Bytes after which what has ended is published before the batch is through: a guest that sleeps is woken early, and works
/// on the first requests while we work on the last. Every request counts as a block at least.
const EARLY: u64 = 32 << 10;

/// What lives on the thread.
pub(super) struct Queue {
    index: usize,
    port: Port,
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
    /// The requests in hand, their heads, and the heads that are being published: these lists keep their room.
    requests: [Request; GROUP],
    heads: Vec<u16>,
    shown: Vec<u16>,
    spin: Spin,
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
    /// A queue whose ring does not run yet. `asked` is raised when there is a command.
    pub fn new(
        index: usize,
        port: Port,
        mailbox: Mailbox,
        asked: Arc<AtomicBool>,
        executor: Executor<Arc<GuestMap>>,
    ) -> Self {
        Queue {
            index,
            port,
            mailbox,
            asked,
            executor,
            kick: None,
            err: None,
            fresh: true,
            tracker: Tracker::default(),
            again: VecDeque::new(),
            ended: Vec::new(),
            requests: Default::default(),
            heads: Vec::new(),
            shown: Vec::new(),
            spin: Spin::default(),
            bad_heads: 0,
            held: false,
            log_used: None,
        }
    }

    /// Serves until the other end of `commands` is dropped, and drains then.
    pub fn run(mut self, commands: Receiver<Command>) {
        let mut busy = false;
        loop {
            let mut away = false;
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
                        away = false;
                        // What the driver accepted, or the memory, may be new.
                        self.port.close();
                        self.kick = (!self.fresh || self.take_up(part)).then_some(kick);
                    }
                    Ok(Command::Stop { done, deadline, late }) => {
                        let stopped = self.drain(Some(deadline), late);
                        self.kick = None;
                        self.port.close();
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
                        // It is about to be revoked.
                        self.port.close();
                        drop(done);
                    }
                    Ok(Command::Log { logging, done }) => {
                        self.log(logging);
                        let _ = done.send(());
                    }
                    Ok(Command::Forget) => {
                        self.port.close();
                        // The frontend takes a region away and gives it back to change its size; it says so when it has.
                        away = self.port.ring().is_none();
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
            busy = self.kick.is_some() && !away && self.serve();
        }
    }

    /// Begins with a ring: finds out what another process has left in flight, and tells the guest to look, as that one may
    /// have published something and not told. False when the ring cannot be served as it is.
    fn take_up(&mut self, part: Option<Part>) -> bool {
        let Some((used, avail)) = self.port.ring().map(|ring| ring.indices()) else {
            log::error!("queue {}: the ring is not in the guest's memory", self.index);
            return false;
        };
        self.port.close();
        let mut vring = self.port.vring().get_mut();
        let queue = vring.get_queue_mut();
        queue.set_next_used(used);
        self.tracker = Tracker::default();
        if let Some(mut part) = part {
            let found = part.recover(used, queue.size());
            let heads = found.as_ref().map_or(0, Vec::len);
            // The driver has that many in flight, all told.
            let offered = avail.wrapping_sub(used);
            if heads > usize::from(offered) {
                log::error!(
                    "queue {}: the inflight region has {heads} requests, the ring only {offered}; it is left alone",
                    self.index
                );
                return false;
            }
            if let Some(found) = found {
                // Heads are taken in order, so those that were taken follow the used ones. SET_VRING_BASE knows less.
                queue.set_next_avail(used.wrapping_add(u16::try_from(heads).unwrap_or(0)));
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
            self.port.close();
            let mut vring = self.port.vring().get_mut();
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
        let event = PollFd::from_borrowed_fd(self.mailbox.as_fd(), PollFlags::IN);
        // Without a kick to wait for, the same event twice.
        let kick = self.kick.as_ref().filter(|_| !full);
        let mut fds = [event.clone(), kick.map_or(event, |kick| PollFd::new(kick, PollFlags::IN))];
        let limit = if busy && !full { Some(Duration::ZERO) } else { self.executor.until_due() };
        match poll(&mut fds, limit.map(timespec).as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        let seen = kick.map_or(PollFlags::empty(), |_| fds[1].revents());
        if fds[0].revents().contains(PollFlags::IN) {
            self.mailbox.clear();
        }
        if seen.contains(PollFlags::IN) {
            self.spin.woken();
        }
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
        self.executor.is_full() || self.tracker.outstanding() >= usize::from(self.port.size())
    }

    /// Serves up to one ring's worth of requests; true when the ring may hold more.
    fn serve(&mut self) -> bool {
        let rounds = usize::from(self.port.size()).div_ceil(BATCH);
        for _ in 0..rounds.max(1) {
            let looked = match self.batch() {
                Looked::Empty => self.rest(),
                looked => looked,
            };
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

    /// Takes up to [`BATCH`] chains off the ring, starts them, and publishes what has ended. `Empty`: there was none.
    fn batch(&mut self) -> Looked {
        let Some(ring) = self.port.ring() else {
            log::error!("queue {}: the ring is not in the guest's memory", self.index);
            return Looked::Broken;
        };
        ring.quiet();
        let size = ring.size();
        let mut taken = start_again(&mut self.again, &mut self.executor, &mut self.ended, &mut self.requests[0], ring);
        let mut bytes = 0;
        let mut broken = false;
        'batch: while taken < BATCH && !broken {
            broken = !self.look_ahead(GROUP.min(BATCH - taken));
            if self.heads.is_empty() {
                break;
            }
            for at in 0..self.heads.len() {
                if self.asked.load(Ordering::Acquire)
                    || self.executor.is_full()
                    || self.tracker.outstanding() >= usize::from(size)
                {
                    // Those that are not taken are looked at again.
                    break 'batch;
                }
                let Some(ring) = self.port.open() else { break 'batch };
                ring.advance();
                taken += 1;
                let (head, request) = (self.heads[at], &mut self.requests[at]);
                if head >= size {
                    // There is no such descriptor, and no place in the used ring for it.
                    self.bad_heads += 1;
                    if self.bad_heads.is_power_of_two() {
                        log::warn!("queue {}: the guest offered descriptor {head} of {size}", self.index);
                    }
                    continue;
                }
                self.tracker.take(head);
                bytes += request.bytes().max(BLOCK_SIZE);
                self.ended.extend(self.executor.start(head, request, ring.space().map()));
                if bytes >= EARLY {
                    bytes = 0;
                    // In the memory map of this batch: the requests of the group lie in it.
                    self.show();
                }
            }
        }
        self.used_written();
        self.executor.submit();
        self.collect();
        self.publish();
        match taken {
            _ if broken => Looked::Broken,
            0 => Looked::Empty,
            _ => Looked::More,
        }
    }

    /// Takes the next requests apart, but not off the ring. Their first bytes are fetched side by side: from memory that is
    /// spread widely, each alone would take as long as the copy. False when the ring makes no sense.
    #[inline]
    fn look_ahead(&mut self, max: usize) -> bool {
        self.heads.clear();
        let Some(ring) = self.port.open() else { return true };
        let result = ring.peek(max, &mut self.heads);
        for (head, request) in self.heads.iter().zip(&mut self.requests) {
            if *head < ring.size() {
                request.parse(ring, *head);
                self.executor.fetch(request);
            }
        }
        result.inspect_err(|e| log::error!("queue {}: the guest broke its ring: {e}", self.index)).is_ok()
    }

    /// Nothing is left to take: looks for more for a while, then asks the guest for a kick.
    fn rest(&mut self) -> Looked {
        if self.full() {
            return Looked::Empty;
        }
        let Some(ring) = self.port.open() else { return Looked::Empty };
        let found =
            self.spin.look(|| ring.has_more() || self.asked.load(Ordering::Acquire) || self.executor.is_ready());
        if found || ring.listen() {
            self.collect();
            self.publish();
            return Looked::More;
        }
        self.used_written();
        Looked::Empty
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
            log.mark(*at, 6 + 8 * u64::from(self.port.size()));
        }
    }

    /// Collects what has ended.
    fn collect(&mut self) {
        self.executor.reap(&mut self.ended);
    }

    /// Puts what has ended into the used ring and tells the guest, if it wants to be told. While the frontend is changing
    /// the memory map the ring may be out of reach; what has ended then waits for the next look.
    fn publish(&mut self) {
        // Looked up anew if the map has changed.
        if !self.held && self.port.ring().is_some() {
            self.show();
        }
    }

    /// [`Queue::publish`], in the ring as it was last looked up.
    fn show(&mut self) {
        if self.held {
            return;
        }
        for done in self.ended.drain(..) {
            self.tracker.end(done);
        }
        if !self.tracker.is_ready() {
            return;
        }
        let Some(ring) = self.port.open() else { return };
        self.shown.clear();
        while let Some(done) = self.tracker.next_ended() {
            self.tracker.publishing(done.head);
            ring.push(done.head, done.len);
            self.shown.push(done.head);
        }
        ring.publish();
        self.tracker.published(&self.shown, ring.position().1);
        let wanted = ring.wants_signal();
        self.used_written();
        // A call descriptor that takes no more is a guest that has been told.
        if wanted
            && let Err(e) = self.port.vring().signal_used_queue()
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
    fn has_work(&mut self, late: Late) -> bool {
        let again = late == Late::Fail && !self.again.is_empty();
        self.executor.in_flight() > 0 || again && self.port.ring().is_some()
    }

    /// Ends what was to be started again with an I/O error, for a queue that must stop now.
    fn refuse_rest(&mut self) {
        let Some(ring) = self.port.ring() else { return };
        for head in self.again.drain(..).filter(|head| *head < ring.size()) {
            self.requests[0].parse(ring, head);
            self.ended.extend(self.executor.refuse(head, &self.requests[0], ring.space().map()));
        }
    }

    /// Starts what is to be started again, as far as there is room: it was taken, and so is to be finished.
    fn resume(&mut self) {
        if self.again.is_empty() {
            return;
        }
        let Some(ring) = self.port.ring() else { return };
        while start_again(&mut self.again, &mut self.executor, &mut self.ended, &mut self.requests[0], ring) > 0 {}
        self.executor.submit();
        self.collect();
    }
}

/// Starts up to [`BATCH`] of the requests that another process had in flight; tells how many.
fn start_again(
    again: &mut VecDeque<u16>,
    executor: &mut Executor<Arc<GuestMap>>,
    ended: &mut Vec<Completion>,
    request: &mut Request,
    ring: &Ring,
) -> usize {
    let mut started = 0;
    while started < BATCH
        && !executor.is_full()
        && let Some(head) = again.pop_front()
    {
        started += 1;
        // The region says that it was taken; what it asks for is in the guest's own memory, still. Recovery looks at heads
        // below the ring's size only.
        request.parse(ring, head);
        ended.extend(executor.start(head, request, ring.space().map()));
    }
    started
}

/// As poll takes it; rounded up to a millisecond, so that a wait for a moment does not end just before it.
fn timespec(time: Duration) -> rustix::event::Timespec {
    let ns = if time.is_zero() { 0 } else { time.subsec_millis() * 1_000_000 + 999_999 };
    rustix::event::Timespec { tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX), tv_nsec: i64::from(ns) }
}
