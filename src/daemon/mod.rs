//! The vhost-user daemon: connections, rings and their threads. The only importer of the vhost crates.
//!
//! | file | holds |
//! | --- | --- |
//! | [`socket`] | the listening socket |
//! | [`handler`] | the messages of a connection |
//! | [`frontend`] | what comes as a descriptor: memory, kicks, calls |
//! | [`worker`] | the thread of a queue: what it is told |
//! | `queue` | what it does |
//! | [`revoke`] | takes guest memory away from transfers that hang |
//! | [`backend_channel`] | messages to the frontend |
//! | [`inflight`] | what is in flight, for whoever comes after a crash |
//! | [`port`] | the ring of a queue, in the guest's present memory |
//! | [`spin`] | how long a queue looks before it sleeps |
//! | [`dirty_log`] | the pages that we write, for a live migration |
//! | [`control`], [`report`] | the control socket, and what it tells |
//! | [`metrics`] | the same for Prometheus |
//! | [`hub`] | where it meets the serving thread |
//! | [`home`], [`reload`] | the library behind a served image, and another map while the VM runs |
//! | [`passing`] | descriptors that go over a unix socket |
//! | [`take_over`] | a server that takes the place of another |

pub mod backend_channel;
pub mod control;
pub mod dirty_log;
pub mod frontend;
pub mod handler;
pub mod home;
pub mod hub;
pub mod inflight;
pub mod metrics;
pub mod passing;
pub mod port;
mod queue;
pub mod reload;
pub mod report;
pub mod revoke;
pub mod socket;
pub mod spin;
pub mod take_over;
pub mod worker;

use crate::device::{Drive, Prefetch};
use crate::error::{Error, ErrorKind, Result};
use backend_channel::{BackendChannel, SET_BACKEND_REQ_FD};
use handler::Handler;
use home::Home;
use hub::{HandedOver, Hub};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::RecvFlags;
use signal_hook::consts::{SIGINT, SIGTERM};
use socket::{Inherited, Listening};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vhost::vhost_user::BackendReqHandler;
use vhost_user_backend::VringMutex;
use vm_memory::GuestMemoryAtomic;

pub use crate::device::GuestMap;

/// The guest's memory map, replaced as a whole when the frontend changes it.
pub type GuestMemory = GuestMemoryAtomic<GuestMap>;
/// A ring, shared by the message handler and the queue's thread.
pub type Vring = VringMutex<GuestMemory>;

/// Queues that can be offered: what fits the protocol's 8-bit ring index in SET_VRING_KICK and CALL.
pub const QUEUES_MAX: u16 = 256;

/// Bytes of a message's header: request, flags and size of the body, u32 each.
const MESSAGE_HEADER: usize = 12;

/// The largest body that the crate takes (its MAX_MSG_SIZE).
const MESSAGE_BODY_MAX: u32 = 4096;

/// The most descriptors that the crate takes with a message (its MAX_ATTACHED_FD_ENTRIES).
const DESCRIPTORS_MAX: usize = 32;

/// How long the rest of a message may take, and how often to look for it.
const MESSAGE_TIME: Duration = Duration::from_secs(5);
const MESSAGE_PAUSE: Duration = Duration::from_millis(2);

/// How long the last flush may take. Nobody but a supervisor waits for it, so it is not bounded as a drain is.
const CLOSE_TIME: Duration = Duration::from_secs(60);

/// How long to wait when the host is short of descriptors or memory.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

/// SIGTERM and SIGINT as a descriptor that can be polled.
#[derive(Debug)]
pub struct StopSignal(UnixStream);

impl StopSignal {
    /// From here on the two signals do not kill the process but end [`serve`].
    pub fn install() -> Result<Self> {
        let failed = |e| Error::new(ErrorKind::Io, "SIGTERM", "cannot be handled").mend(e);
        // A frontend that closes its end of a call descriptor must not kill its backend.
        // SAFETY: SIG_IGN is a valid disposition, and nothing here relies on SIGPIPE.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
        let (read, write) = UnixStream::pair().map_err(failed)?;
        for signal in [SIGTERM, SIGINT] {
            let write = write.try_clone().map_err(failed)?;
            signal_hook::low_level::pipe::register(signal, write).map_err(failed)?;
        }
        Ok(StopSignal(read))
    }
}

/// How to serve.
#[derive(Clone, Debug)]
pub struct Options {
    /// Queues to offer.
    pub num_queues: u16,
    /// How long a queue that has to stop may take for what is in flight.
    pub drain_time: Duration,
}

/// A disk and whoever is connected to it: what the connections and the control socket share.
#[derive(Debug)]
pub struct Served {
    /// The disk.
    pub drive: Drive,
    /// The way to the frontend of the connection there is.
    pub channel: BackendChannel,
    /// Where the control socket meets the serving thread.
    pub hub: Hub,
    /// What the operator calls it.
    pub names: Names,
    /// The library that the image is in, if it is one of a library.
    pub home: Option<Arc<Home>>,
    /// What is brought into the page cache ahead of the guest.
    pub prefetch: Option<Prefetch>,
}

/// What is served, as the command line named it.
#[derive(Clone, Debug, Default)]
pub struct Names {
    /// The image of the library.
    pub image: Option<String>,
    /// The overlay.
    pub overlay: Option<PathBuf>,
    /// The raw file.
    pub blk_file: Option<PathBuf>,
}

impl Served {
    /// Nobody is connected.
    pub fn new(drive: Drive, names: Names) -> Result<Self> {
        let hub = Hub::new().map_err(|e| Error::new(ErrorKind::Io, "serve", e))?;
        Ok(Served { drive, channel: BackendChannel::default(), hub, names, home: None, prefetch: None })
    }

    /// Makes the disk larger and tells the guest; false when nobody could be told (the guest sees it with its next start).
    ///
    /// # Errors
    /// Those of [`Drive::resize`].
    pub fn resize(&self, size: u64) -> Result<bool> {
        self.drive.resize(size)?;
        Ok(self.channel.config_changed())
    }

    /// Ends the prefetch, if there is one. Waits for nothing.
    pub fn stop_prefetch(&self) {
        self.prefetch.iter().for_each(Prefetch::stop);
    }

    /// Ends the disk's life. A disk that hangs is left as a kill would leave it.
    fn close(self: &Arc<Self>) -> Result<()> {
        self.stop_prefetch();
        match self.drive.ledger().stuck() {
            0 => {}
            n => return Err(hangs(&format!("{n} requests hang"))),
        }
        let served = Arc::clone(self);
        within(CLOSE_TIME, move || served.drive.close()).unwrap_or_else(|| Err(hangs("the last flush hangs")))
    }
}

/// Serves a disk: one connection after the other, until SIGTERM (or until the one connection of `--fd` ends). Requests in
/// flight are finished before it returns.
///
/// # Errors
/// `Io` when the listening socket fails. A connection that fails is logged and the next one awaited.
pub fn serve(served: &Arc<Served>, endpoint: Inherited, options: &Options, stop: &StopSignal) -> Result<()> {
    crate::io::file::raise_open_files();
    let server = Server { served, options, stop };
    match endpoint {
        Inherited::Connected(stream) => server.connection(stream).and_then(|_| served.close()),
        Inherited::Listening(listening) => server.listen(listening),
    }
}

/// What makes the serving thread stop.
#[derive(Clone, Copy)]
struct Stops<'s> {
    signal: &'s StopSignal,
    hub: &'s Hub,
}

/// What every connection needs.
struct Server<'s> {
    served: &'s Arc<Served>,
    options: &'s Options,
    stop: &'s StopSignal,
}

impl Server<'_> {
    /// Serves connections until a signal comes or another server has taken over.
    fn listen(&self, mut listening: Listening) -> Result<()> {
        self.served.hub.listens();
        loop {
            self.accept_loop(&listening)?;
            let closed = self.served.close();
            match self.served.hub.offer(listening, &closed) {
                HandedOver::Back(back) => listening = back,
                HandedOver::NotAsked(_) => return closed,
                HandedOver::Gone => {
                    log::info!("another server has taken over");
                    return Ok(());
                }
            }
        }
    }

    fn stops(&self) -> Stops<'_> {
        Stops { signal: self.stop, hub: &self.served.hub }
    }

    fn accept_loop(&self, listening: &Listening) -> Result<()> {
        while ready(listening.as_fd(), self.stops()) {
            match listening.accept() {
                Ok(Some(stream)) => {
                    if !self.connection(stream)? {
                        return Ok(());
                    }
                }
                Ok(None) => {}
                Err(e) if is_shortage(&e) => {
                    log::error!("cannot accept a connection now: {e}");
                    std::thread::sleep(SHORTAGE_PAUSE);
                }
                Err(e) => return Err(Error::io("the vhost-user socket", "accept a connection", e)),
            }
        }
        Ok(())
    }

    /// Serves one connection to its end; false when a signal ended it.
    ///
    /// # Errors
    /// When the kernel does not let go of a thread, and the process has to end.
    fn connection(&self, stream: UnixStream) -> Result<bool> {
        let handler = match Handler::new(Arc::clone(self.served), self.options.num_queues, self.options.drain_time) {
            Ok(handler) => Arc::new(Mutex::new(handler)),
            Err(e) => {
                log::error!("cannot serve a connection: {e}");
                return Ok(true);
            }
        };
        log::info!("connected");
        self.served.hub.connected(Some(Arc::clone(&handler)));
        // The socket stays open until the last completion is published: QEMU takes its end for the end of this backend.
        let mut requests = BackendReqHandler::from_stream(stream, Arc::clone(&handler));
        let goes_on = messages(&mut requests, &self.served.channel, self.stops());
        let mut handler = handler.lock().unwrap_or_else(PoisonError::into_inner);
        handler.shut_down();
        self.served.hub.connected(None);
        self.served.channel.clear();
        if handler.is_hung() { Err(hangs("a thread hangs in a write")) } else { Ok(goes_on) }
    }
}

/// The kernel does not end what was asked of it.
fn hangs(what: &str) -> Error {
    Error::new(ErrorKind::Io, "the host's disk", format!("does not answer: {what} in the kernel"))
        .mend("nothing is lost if vmar is started again once the disk answers: the overlay goes on where it is")
}

/// Closes a disk that nobody uses any more. QEMU's monitor, or whoever asked, waits for this: a flush that takes longer than
/// `limit` goes on behind its back, and the disk is let go of when that is done, unless it is in use again by then.
fn let_go(served: &Arc<Served>, limit: Duration) -> Result<()> {
    served.drive.release();
    let served = Arc::clone(served);
    let closed = within(limit, move || {
        if let Some(active) = served.drive.active().filter(|_| served.drive.ledger().stuck() == 0) {
            // Whether it worked, the one of the close will tell.
            let _ = active.disk.flush();
        }
        let closed = served.drive.inactivate();
        if let Err(e) = &closed {
            log::error!("the disk stays open and locked, for this server to go on with: {e}");
        }
        closed
    });
    closed.unwrap_or_else(|| {
        let late = Error::new(
            ErrorKind::Busy,
            "the disk",
            "stays locked for now: its flush takes longer than --drain-timeout",
        );
        log::error!("{late}");
        Err(late)
    })
}

/// Does something that may hang on a thread of its own; `None` when it takes longer than `limit` (it goes on then).
fn within<T: Send + 'static>(limit: Duration, work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (done, wait) = channel();
    let thread = std::thread::Builder::new().name("vmar-close".into()).spawn(move || done.send(work()));
    if let Err(e) = thread {
        log::error!("cannot start a thread: {e}");
        return None;
    }
    wait.recv_timeout(limit).ok()
}

/// Something that the host lacks for the moment.
fn is_shortage(e: &std::io::Error) -> bool {
    matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM))
}

/// Handles the messages of a connection to its end; false when a signal ended it.
fn messages(requests: &mut BackendReqHandler<Mutex<Handler>>, channel: &BackendChannel, stop: Stops<'_>) -> bool {
    loop {
        // SAFETY: the descriptor belongs to `requests`, which lives longer than this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(requests.as_raw_fd()) };
        match next_message(fd, stop) {
            Next::Message => {}
            Next::Stop => return false,
            Next::Stalled => {
                log::error!("the vhost-user connection ends: half a message, and nothing more came");
                return true;
            }
            Next::Overloaded => {
                log::error!("the vhost-user connection ends: a message with more than {DESCRIPTORS_MAX} descriptors");
                return true;
            }
        }
        if peek_header(fd).is_ok_and(|header| header.is_some_and(|h| h[0] == SET_BACKEND_REQ_FD)) {
            channel.peek(fd);
        }
        if let Err(e) = requests.handle_request() {
            use vhost::vhost_user::Error as E;
            match e {
                E::Disconnected | E::SocketBroken(_) | E::PartialMessage => log::info!("disconnected: {e}"),
                // A refused message that changed nothing; the frontend got a negative reply if it wanted one.
                E::InvalidOperation(_) => {
                    log::warn!("a vhost-user message was refused: {e}");
                    continue;
                }
                // Anything else may leave the two sides with different ideas of the state: the frontend starts anew.
                _ => log::error!("the vhost-user connection ends: {e}"),
            }
            return true;
        }
    }
}

/// What there is to do on a connection.
enum Next {
    /// Handle a message, or the end of the connection.
    Message,
    /// Stop serving.
    Stop,
    /// End the connection: a message began and never ended.
    Stalled,
    /// End the connection: more descriptors came than there is room for.
    Overloaded,
}

/// Waits until the next message has come as a whole and a reply has room. Reading and replying block, and whoever is stuck
/// in them hears no SIGTERM; the crate also takes a body that comes in two pieces for a broken one.
fn next_message(fd: BorrowedFd<'_>, stop: Stops<'_>) -> Next {
    if !ready(fd, stop) {
        return Next::Stop;
    }
    let deadline = Instant::now() + MESSAGE_TIME;
    while !is_whole(fd) {
        if Instant::now() > deadline {
            return Next::Stalled;
        }
        // Not for more bytes: those that are there would end the wait at once.
        match wait(fd, PollFlags::RDHUP, stop, Some(MESSAGE_PAUSE)) {
            Some(true) => break,
            Some(false) => {}
            None => return Next::Stop,
        }
    }
    if carries_too_much(fd) {
        return Next::Overloaded;
    }
    match wait(fd, PollFlags::OUT, stop, None) {
        Some(_) => Next::Message,
        None => Next::Stop,
    }
}

/// True when more descriptors came with the next message than the crate has room for. It would drop the message and wait for
/// another one, deaf to everything else, while the frontend waits for the answer.
fn carries_too_much(fd: BorrowedFd<'_>) -> bool {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, ReturnFlags, recvmsg};
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX + 1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut header = [0u8; MESSAGE_HEADER];
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let Ok(peeked) = recvmsg(fd, &mut [io::IoSliceMut::new(&mut header)], &mut control, flags) else { return false };
    // These are copies, which are closed here.
    let came: usize =
        control.drain().map(|m| if let RecvAncillaryMessage::ScmRights(fds) = m { fds.count() } else { 0 }).sum();
    came > DESCRIPTORS_MAX || peeked.flags.contains(ReturnFlags::CTRUNC)
}

/// True when handling the next message will not wait for more of it. An error or the end of the stream counts as one.
fn is_whole(fd: BorrowedFd<'_>) -> bool {
    let Ok(there) = rustix::io::ioctl_fionread(fd) else { return true };
    match peek_header(fd) {
        // The third word: bytes of the body. The crate refuses a larger one without reading it.
        Ok(Some([_, _, size])) => size > MESSAGE_BODY_MAX || there >= (MESSAGE_HEADER as u64) + u64::from(size),
        Ok(None) => false,
        Err(()) => true,
    }
}

/// Request, flags and size of the next message; none if that much has not come, an error if no more will come.
fn peek_header(fd: BorrowedFd<'_>) -> std::result::Result<Option<[u32; 3]>, ()> {
    let mut header = [0u8; MESSAGE_HEADER];
    match rustix::net::recv(fd, &mut header, RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((_, 0)) => Err(()),
        Ok((_, MESSAGE_HEADER)) => {
            let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
            Ok(Some([word(0), word(4), word(8)]))
        }
        Ok(_) | Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
        Err(_) => Err(()),
    }
}

/// Waits until `fd` can be read; false when it is time to stop.
fn ready(fd: BorrowedFd<'_>, stop: Stops<'_>) -> bool {
    wait(fd, PollFlags::IN, stop, None).is_some()
}

/// Waits for `events` on `fd`: true when there are some, false when the time is up, `None` when it is time to stop.
fn wait(fd: BorrowedFd<'_>, events: PollFlags, stop: Stops<'_>, limit: Option<Duration>) -> Option<bool> {
    let limit = limit.map(|limit| rustix::event::Timespec { tv_sec: 0, tv_nsec: i64::from(limit.subsec_nanos()) });
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(fd, events),
            PollFd::new(&stop.signal.0, PollFlags::IN),
            PollFd::new(stop.hub, PollFlags::IN),
        ];
        match poll(&mut fds, limit.as_ref()) {
            Ok(_) if fds[1..].iter().any(|fd| !fd.revents().is_empty()) => return None,
            Ok(_) if !fds[0].revents().is_empty() => return Some(true),
            Ok(_) if limit.is_some() => return Some(false),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                log::error!("poll failed: {e}");
                return None;
            }
        }
    }
}
