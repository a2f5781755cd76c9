//! The engine that waits: io_uring, one ring a queue thread.
//!
//! Only reads that the page cache could not serve come here. Buffered reads of a regular file wait on the page's lock by
//! task work, so hundreds of misses can be in flight without a thread each. Guest memory is never registered as fixed
//! buffers: ballooning punches the memfd, and pinned pages would live on silently beside the guest's.

use super::buf::{IoBuf, advance, total_len};
use super::fault::{Fate, Faults, FileRef, first};
use crate::units::to_usize;
use io_uring::{IoUring, opcode, squeue, types};
use std::any::Any;
use std::cell::UnsafeCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

/// Entries of the submission queue; the completion queue has twice as many.
const ENTRIES: u32 = 128;

/// Operations handed to the kernel at a time. Below the completion queue's size, so that it cannot overflow; further
/// operations wait in a list of our own.
const IN_KERNEL_MAX: usize = 2 * ENTRIES as usize;

/// How long to wait when the kernel has no memory for a request.
const RETRY_PAUSE: Duration = Duration::from_millis(1);

/// IORING_ENTER_GETEVENTS (io_uring_enter(2)): run the deferred completions.
const ENTER_GETEVENTS: u32 = 1;

/// Deferred completions that the kernel runs at least, if there are as many, each time it is asked (IO_LOCAL_TW_DEFAULT_MAX
/// in Linux 6.18).
const DEFERRED_A_CALL: usize = 20;

/// IOV_MAX: pieces that one operation may have.
const IOV_MAX: u32 = 1024;

/// A finished read: the caller's token and how it went. A read that hits the end of the file is `UnexpectedEof`.
#[derive(Debug)]
pub struct Finished {
    /// What [`Uring::read`] was given.
    pub token: u64,
    /// Ok when every byte was read.
    pub result: io::Result<()>,
}

/// What has to live until a read has ended: whatever owns its file, if that may be closed earlier otherwise.
pub type Keep = Arc<dyn Any + Send + Sync>;

/// Loose reads handed to the kernel at a time: there is always room for the others.
const LOOSE_MAX: usize = ENTRIES as usize / 2;

/// Loose reads that wait at most; more are not taken.
const LOOSE_WAITING_MAX: usize = 4 * LOOSE_MAX;

/// Where loose reads go to.
struct Sink(UnsafeCell<[u8; 64 << 10]>);

// SAFETY: only the kernel writes there, from any number of threads at a time, and nobody ever reads it.
unsafe impl Sync for Sink {}

static SINK: Sink = Sink(UnsafeCell::new([0; 64 << 10]));

/// One read in flight. Boxed iovecs stay where they are until the operation has ended.
#[derive(Debug)]
struct Op {
    /// `None`: nobody is told of its end.
    token: Option<u64>,
    /// Nobody wants its bytes.
    loose: bool,
    fd: RawFd,
    offset: u64,
    bufs: Vec<IoBuf>,
    /// Only in tests.
    hook: Option<Box<Hook>>,
    /// Owns the file. The kernel looks `fd` up when the operation is handed over, which may be long after it was queued,
    /// and again when a short read goes on: by then the number must not be another file's.
    _keep: Option<Keep>,
}

/// Waiting reads on an io_uring. Must stay on the thread that made it.
pub struct Uring {
    ring: IoUring,
    ops: Vec<Option<Op>>,
    free: Vec<usize>,
    waiting: VecDeque<usize>,
    /// Loose reads, which the others overtake.
    loose: VecDeque<usize>,
    in_kernel: usize,
    loose_in_kernel: usize,
}

impl Uring {
    /// Makes a ring that raises `event` (an eventfd) when a read has finished.
    pub fn new(event: BorrowedFd<'_>) -> io::Result<Self> {
        // DEFER_TASKRUN (Linux 6.1) keeps completions off this thread's other system calls, and the flag tells when some
        // are due; older kernels go without.
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .build(ENTRIES)
            .or_else(|_| IoUring::new(ENTRIES))?;
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Uring {
            ring,
            ops: Vec::new(),
            free: Vec::new(),
            waiting: VecDeque::new(),
            loose: VecDeque::new(),
            in_kernel: 0,
            loose_in_kernel: 0,
        })
    }

    /// Reads that have not finished, also those that nobody waits for.
    pub fn in_flight(&self) -> usize {
        self.in_kernel + self.waiting.len() + self.loose.len()
    }

    /// Queues a read of exactly the list's length at `offset`; [`Uring::reap`] tells its end under `token`. Nothing is
    /// handed to the kernel before [`Uring::submit`].
    ///
    /// The file stays open as long as `keep` lives, which is held until then, or by the caller's doing; the caller keeps
    /// the memory behind `bufs` mapped (a request holds it).
    pub fn read<'f>(
        &mut self,
        token: u64,
        file: impl Into<FileRef<'f>>,
        offset: u64,
        bufs: Vec<IoBuf>,
        keep: Option<Keep>,
    ) {
        let file = file.into();
        let hook = file.faults().map(|faults| Box::new(Hook::new(Arc::clone(faults))));
        let index = self.allot(Op {
            token: Some(token),
            loose: false,
            fd: file.file().as_raw_fd(),
            offset,
            bufs,
            hook,
            _keep: keep,
        });
        self.waiting.push_back(index);
    }

    /// Brings a range of a file into the page cache, behind all that is to be read. False: there is too much of that
    /// already. With a token [`Uring::reap`] tells when it is there, or why it is not; without one nobody is told.
    ///
    /// It is a read, into memory that nobody looks at. `fadvise` would do without the copy, but takes a kernel thread for
    /// each call, and may wait for the disk's queue.
    ///
    /// The file stays open as long as `keep` lives, or as long as this ring by the caller's doing.
    pub fn fetch(&mut self, token: Option<u64>, file: &File, offset: u64, len: usize, keep: Option<Keep>) -> bool {
        if self.loose.len() >= LOOSE_WAITING_MAX {
            return false;
        }
        let sink = SINK.0.get();
        let size = size_of::<Sink>();
        let piece = |at: usize| {
            // SAFETY: the memory is static; the kernel alone writes there, and no reference to it exists.
            unsafe { IoBuf::from_raw(sink.cast(), size.min(len - at)) }
        };
        let bufs = (0..len).step_by(size).map(piece).collect();
        let index = self.allot(Op { token, loose: true, fd: file.as_raw_fd(), offset, bufs, hook: None, _keep: keep });
        self.loose.push_back(index);
        true
    }

    fn allot(&mut self, op: Op) -> usize {
        match self.free.pop() {
            Some(index) => {
                self.ops[index] = Some(op);
                index
            }
            None => {
                self.ops.push(Some(op));
                self.ops.len() - 1
            }
        }
    }

    /// Hands waiting reads to the kernel, as many as it takes.
    pub fn submit(&mut self) -> io::Result<()> {
        while self.in_kernel < IN_KERNEL_MAX
            && let Some(index) = self.next()
        {
            let Some(op) = &mut self.ops[index] else { unreachable!("a waiting operation has a slot") };
            let entry = match op.hook.is_some() {
                false => entry_of(op.fd, &op.bufs, op.offset),
                true => hooked_entry(op),
            };
            let entry = entry.user_data(index as u64);
            // SAFETY: the iovecs (and a hook's timeout) live in heap buffers of `self.ops[index]`, which do not move, until
            // the completion is reaped; the file is kept by the operation itself or, as the memory, by the caller of `read`.
            match unsafe { self.ring.submission().push(&entry) } {
                Ok(()) => {
                    self.in_kernel += 1;
                    if self.waiting.pop_front().is_none() {
                        self.loose.pop_front();
                        self.loose_in_kernel += 1;
                    }
                }
                Err(squeue::PushError { .. }) => self.enter()?,
            }
        }
        self.enter()
    }

    /// What is to be handed over next; of the loose reads only if nothing else waits.
    fn next(&self) -> Option<usize> {
        let loose = || self.loose.front().filter(|_| self.loose_in_kernel < LOOSE_MAX);
        self.waiting.front().or_else(loose).copied()
    }

    /// Submits all that is in the queue. The kernel stops early when an entry fails at once or memory is short; what it
    /// left would wait for a next call that may never come.
    fn enter(&mut self) -> io::Result<()> {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(n) if n > 0 => {}
                Ok(_) => std::thread::sleep(RETRY_PAUSE),
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => {}
                // The completion queue has room for all that is in the kernel, so this is only about memory.
                Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    std::thread::sleep(RETRY_PAUSE);
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// True when [`Uring::reap`] would find something.
    pub fn is_ready(&mut self) -> bool {
        self.in_kernel > 0 && (self.ring.submission().taskrun() || !self.ring.completion().is_empty())
    }

    /// Collects finished reads without waiting. Short reads are carried on and do not show.
    pub fn reap(&mut self, mut finished: impl FnMut(Finished)) -> io::Result<()> {
        self.take(&mut finished);
        // The kernel runs a few deferred completions a call (DEFERRED_A_CALL) and raises the event no second time for the
        // others; the flag stays set as long as there are any. Its being set proves nothing, though: the kernel sets it
        // after queueing the work, which this thread may have run by then, and clears it only when it runs some. Each
        // read has at most one completion queued, so this many calls run all that is there now; what comes later raises
        // the event anew.
        for _ in 0..self.in_kernel.div_ceil(DEFERRED_A_CALL) + 1 {
            if self.in_kernel == 0 || !self.ring.submission().taskrun() {
                break;
            }
            self.run_deferred()?;
            self.take(&mut finished);
        }
        // Also what an earlier call that failed has left in the submission queue.
        if self.next().is_none() && self.ring.submission().is_empty() { Ok(()) } else { self.submit() }
    }

    /// Lets the reads fail that were not handed to the kernel, and forgets the loose ones.
    pub fn cancel_waiting(&mut self, mut finished: impl FnMut(Finished)) {
        for index in std::mem::take(&mut self.loose) {
            self.ops[index] = None;
            self.free.push(index);
        }
        for index in std::mem::take(&mut self.waiting) {
            let Some(op) = self.ops[index].take() else { unreachable!("a waiting operation has a slot") };
            self.free.push(index);
            if let Some(token) = op.token {
                finished(Finished { token, result: Err(io::Error::from_raw_os_error(libc::ECANCELED)) });
            }
        }
    }

    /// Takes what is in the completion queue.
    fn take(&mut self, finished: &mut impl FnMut(Finished)) {
        while let Some(cqe) = { self.ring.completion().next() } {
            self.in_kernel -= 1;
            let index = to_usize(cqe.user_data());
            let ended = self.step(index, cqe.result());
            let Some(op) = &self.ops[index] else { unreachable!("a completed operation has a slot") };
            let (token, loose) = (op.token, op.loose);
            if loose {
                self.loose_in_kernel -= 1;
            }
            match ended {
                Some(result) => {
                    self.ops[index] = None;
                    self.free.push(index);
                    if let Some(token) = token {
                        finished(Finished { token, result });
                    }
                }
                None if loose => self.loose.push_back(index),
                None => self.waiting.push_back(index),
            }
        }
    }

    /// Lets completions appear: with DEFER_TASKRUN they do so only in a call that asks for events, and the crate's
    /// `submit*` functions do not ask when they need not wait.
    fn run_deferred(&mut self) -> io::Result<()> {
        // SAFETY: no argument is passed that the kernel would read.
        match unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 0, ENTER_GETEVENTS, None) } {
            Ok(_) => Ok(()),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Takes one completion into account: `None` when the operation has to go on.
    fn step(&mut self, index: usize, result: i32) -> Option<io::Result<()>> {
        let Some(Some(op)) = self.ops.get_mut(index) else { unreachable!("a completion names a slot") };
        let result = match &mut op.hook {
            None => result,
            Some(hook) => hook.result(result)?,
        };
        match result {
            0 => Some(Err(io::ErrorKind::UnexpectedEof.into())),
            n if n > 0 => {
                op.offset += u64::from(n.unsigned_abs());
                advance(&mut op.bufs, n.unsigned_abs() as usize);
                op.bufs.is_empty().then_some(Ok(()))
            }
            e if matches!(-e, libc::EINTR | libc::EAGAIN) => None,
            e => Some(Err(io::Error::from_raw_os_error(-e))),
        }
    }
}

/// The submission entry of a read.
fn entry_of(fd: RawFd, bufs: &[IoBuf], offset: u64) -> squeue::Entry {
    let count = u32::try_from(bufs.len()).map_or(IOV_MAX, |n| n.min(IOV_MAX));
    opcode::Readv::new(types::Fd(fd), bufs.as_ptr().cast(), count).offset(offset).build()
}

/// The faults of one read in flight. What has to be delayed, or to fail, is a timeout of the ring: its end comes the way
/// that every completion comes, with the event raised.
#[derive(Debug)]
struct Hook {
    faults: Arc<dyn Faults>,
    /// What becomes of the part in hand. `None`: not decided yet.
    fate: Option<Fate>,
    /// The pieces of a short read.
    short: Vec<IoBuf>,
    /// A timeout runs or waits to be submitted; when it ends, this is the result of the read.
    after_timeout: Option<i32>,
    timeout: types::Timespec,
}

impl Hook {
    fn new(faults: Arc<dyn Faults>) -> Hook {
        Hook { faults, fate: None, short: Vec::new(), after_timeout: None, timeout: types::Timespec::new() }
    }

    /// Takes a completion: the result that it stands for, or `None` if the end of the read is not to be told yet.
    fn result(&mut self, result: i32) -> Option<i32> {
        let told = match (self.after_timeout.take(), self.fate) {
            (Some(held), _) => held,
            (None, Some(Fate::Late(time))) => {
                self.after_timeout = Some(result);
                self.timeout = time.into();
                return None;
            }
            (None, _) => result,
        };
        self.fate = None;
        Some(told)
    }
}

/// The submission entry of a read that has faults. Called again for the same part if the queue was full.
fn hooked_entry(op: &mut Op) -> squeue::Entry {
    let Op { fd, offset, bufs, hook: Some(hook), .. } = op else { unreachable!("the operation has a hook") };
    let fate = *hook.fate.get_or_insert_with(|| hook.faults.waiting_read(*offset, total_len(bufs)));
    if let Fate::Fail(errno) = fate {
        hook.after_timeout = Some(-errno);
        hook.timeout = types::Timespec::new();
    }
    match fate {
        _ if hook.after_timeout.is_some() => opcode::Timeout::new(&raw const hook.timeout).build(),
        Fate::Short(max) => {
            hook.short = first(bufs, max.max(1));
            entry_of(*fd, &hook.short, *offset)
        }
        _ => entry_of(*fd, bufs, *offset),
    }
}

impl Drop for Uring {
    /// Waits for what is in flight: the kernel writes into memory that its owner may free next. Not for loose reads, which a
    /// disk that hangs may hold for good; their lists were copied when they were submitted (Linux 5.5).
    fn drop(&mut self) {
        self.waiting.clear();
        while self.in_kernel > self.loose_in_kernel {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {}
                Err(e) if e.raw_os_error() == Some(libc::EINTR) => continue,
                Err(_) => break,
            }
            while let Some(cqe) = { self.ring.completion().next() } {
                self.in_kernel -= 1;
                if self.ops[to_usize(cqe.user_data())].as_ref().is_some_and(|op| op.loose) {
                    self.loose_in_kernel -= 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::sync::Mutex;

    fn wait_all(ring: &mut Uring) -> Vec<Finished> {
        let mut out = Vec::new();
        while ring.in_flight() > 0 {
            ring.reap(|f| out.push(f)).unwrap();
        }
        out
    }

    #[test]
    fn many_reads_more_than_the_ring_holds() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..4096 * 1000u32).map(|i| (i / 7) as u8).collect();
        file.write_all_at(&data, 0).unwrap();
        let mut mem = vec![0u8; data.len()];
        let mut ring = Uring::new(event.as_fd()).unwrap();
        for i in 0..1000usize {
            // SAFETY: `mem` outlives the ring's work, which is waited for below.
            let buf = unsafe { IoBuf::from_raw(mem.as_mut_ptr().wrapping_add(i * 4096), 4096) };
            ring.read(i as u64, &file, i as u64 * 4096, vec![buf], None);
        }
        ring.submit().unwrap();
        let mut tokens: Vec<_> = wait_all(&mut ring).into_iter().map(|f| f.result.map(|()| f.token).unwrap()).collect();
        tokens.sort_unstable();
        assert_eq!(tokens, (0..1000).collect::<Vec<_>>());
        assert!(mem == data);
    }

    /// What is not in the page cache completes later, and only the event tells.
    #[test]
    fn misses_are_told_by_the_event() {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        let file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..(8 << 20)).map(|i: u32| (i / 4096 * 7 + i) as u8).collect();
        file.write_all_at(&data, 0).unwrap();
        file.sync_all().unwrap();
        // SAFETY: plain system call on an open descriptor.
        unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        super::super::file::disable_readahead(&file).unwrap();
        let mut mem = vec![0u8; 200 * 4096];
        let offset = |i: usize| (i * 37 % 2048) * 4096;
        let mut ring = Uring::new(event.as_fd()).unwrap();
        for i in 0..200usize {
            // SAFETY: `mem` outlives the ring's work, which is waited for below.
            let buf = unsafe { IoBuf::from_raw(mem.as_mut_ptr().wrapping_add(i * 4096), 4096) };
            ring.read(i as u64, &file, offset(i) as u64, vec![buf], None);
        }
        ring.submit().unwrap();
        let mut ended = 0;
        while ring.in_flight() > 0 {
            let limit = Timespec { tv_sec: 10, tv_nsec: 0 };
            let told = poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&limit)).unwrap();
            assert_eq!(told, 1, "{} reads are never told", ring.in_flight());
            let _ = rustix::io::read(&event, &mut [0u8; 8][..]);
            ring.reap(|f| ended += usize::from(f.result.is_ok())).unwrap();
        }
        assert_eq!(ended, 200);
        for i in 0..200 {
            assert!(mem[i * 4096..][..4096] == data[offset(i)..][..4096]);
        }
    }

    #[test]
    fn what_is_fetched_is_overtaken_limited_and_not_told() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..4096 * 1000u32).map(|i| (i / 7) as u8).collect();
        file.write_all_at(&data, 0).unwrap();
        let mut mem = vec![0u8; 4096];
        let mut ring = Uring::new(event.as_fd()).unwrap();
        let taken = (0..1000).take_while(|i| ring.fetch(None, &file, i * 4096, 200_000, None)).count();
        assert_eq!((taken, ring.in_flight()), (LOOSE_WAITING_MAX, LOOSE_WAITING_MAX));
        // SAFETY: `mem` outlives the ring's work, which is waited for below.
        let buf = unsafe { IoBuf::from_raw(mem.as_mut_ptr(), 4096) };
        ring.read(7, &file, 8192, vec![buf], None);
        assert_eq!(ring.next(), ring.waiting.front().copied(), "it overtakes them");
        ring.submit().unwrap();
        assert!(ring.loose_in_kernel <= LOOSE_MAX);
        let told = wait_all(&mut ring);
        assert!(matches!(told[..], [Finished { token: 7, result: Ok(()) }]), "{told:?}");
        assert!(mem == data[8192..][..4096]);
        assert_eq!((ring.in_kernel, ring.loose_in_kernel, ring.ops.iter().flatten().count()), (0, 0, 0));

        // Past the end of the file, and given up before the kernel has seen it.
        assert!(ring.fetch(None, &file, 10 << 20, 4096, None));
        ring.submit().unwrap();
        assert!(wait_all(&mut ring).is_empty());
        assert!(ring.fetch(None, &file, 0, 4096, None));
        ring.cancel_waiting(|f| panic!("{f:?}"));
        assert_eq!((ring.in_flight(), ring.ops.iter().flatten().count()), (0, 0));
        assert!(ring.fetch(None, &file, 0, 4096, None));
        ring.submit().unwrap();
    }

    #[test]
    fn a_read_past_the_end_is_an_error() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 1000], 0).unwrap();
        let mut mem = vec![0u8; 2000];
        let mut ring = Uring::new(event.as_fd()).unwrap();
        // SAFETY: as above.
        let buf = unsafe { IoBuf::from_raw(mem.as_mut_ptr(), 2000) };
        ring.read(5, &file, 0, vec![buf], None);
        ring.submit().unwrap();
        let done = wait_all(&mut ring);
        assert_eq!(done.len(), 1);
        assert_eq!(done[0].result.as_ref().unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
    /// Gives reads the fates of a list, one after the other, and then none.
    #[derive(Debug)]
    struct Fates(Mutex<Vec<Fate>>);

    impl Faults for Fates {
        fn run(
            &self,
            _: &super::super::fault::Op<'_>,
            go: &mut dyn FnMut(usize) -> io::Result<usize>,
        ) -> io::Result<usize> {
            go(usize::MAX)
        }

        fn waiting_read(&self, _: u64, _: usize) -> Fate {
            self.0.lock().unwrap().pop().unwrap_or(Fate::Go)
        }
    }

    #[test]
    fn faults_reorder_shorten_retry_and_fail() {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..6 * 4096u32).map(|i| (i / 7) as u8).collect();
        file.write_all_at(&data, 0).unwrap();
        let late = |ms| Fate::Late(Duration::from_millis(ms));
        // Taken from the end: the fates of the six reads, then those of what is tried again.
        let mut fates = vec![late(400), Fate::Short(700), Fate::Fail(libc::EIO), late(200), Fate::Fail(libc::EAGAIN)];
        fates.extend([Fate::Short(1)]);
        fates.reverse();
        let faults: Arc<dyn Faults> = Arc::new(Fates(Mutex::new(fates)));
        let mut mem = vec![0u8; data.len()];
        let mut ring = Uring::new(event.as_fd()).unwrap();
        for i in 0..6usize {
            // SAFETY: `mem` outlives the ring's work, which is waited for below.
            let buf = unsafe { IoBuf::from_raw(mem.as_mut_ptr().wrapping_add(i * 4096), 4096) };
            ring.read(i as u64, FileRef::new(&file, Some(&faults)), i as u64 * 4096, vec![buf], None);
        }
        ring.submit().unwrap();
        let done = wait_all(&mut ring);
        let place = |token| done.iter().position(|f| f.token == token);
        assert!(place(3) < place(0), "the later one comes first: {done:?}");
        for f in done {
            let at = f.token as usize * 4096;
            match f.result {
                Ok(()) => assert!(mem[at..at + 4096] == data[at..at + 4096]),
                Err(e) => assert_eq!((f.token, e.raw_os_error()), (2, Some(libc::EIO))),
            }
        }
        assert!(mem[2 * 4096..3 * 4096].iter().all(|b| *b == 0));
    }
}
