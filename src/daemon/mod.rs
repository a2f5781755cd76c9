//! The vhost-user daemon: connections, rings and their threads. The only importer of the vhost crates.
//!
//! | file | holds |
//! | --- | --- |
//! | [`socket`] | the listening socket |
//! | [`handler`] | the messages of a connection |
//! | [`worker`] | the thread of a queue |

pub mod handler;
pub mod socket;
pub mod worker;

use crate::device::{Disk, Jobs};
use crate::error::{Error, ErrorKind, Result};
use handler::Handler;
use rustix::event::{PollFd, PollFlags, poll};
use signal_hook::consts::{SIGINT, SIGTERM};
use socket::{Inherited, Listening};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use vhost::vhost_user::BackendReqHandler;
use vhost_user_backend::VringMutex;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// A snapshot of the guest's memory map.
pub type GuestMap = GuestMemoryMmap<()>;
/// The guest's memory map, replaced as a whole when the frontend changes it.
pub type GuestMemory = GuestMemoryAtomic<GuestMap>;
/// A ring, shared by the message handler and the queue's thread.
pub type Vring = VringMutex<GuestMemory>;

/// Queues that can be offered: what fits the protocol's 8-bit ring index in SET_VRING_KICK and CALL.
pub const QUEUES_MAX: u16 = 256;

/// SIGTERM and SIGINT as a descriptor that can be polled.
#[derive(Debug)]
pub struct StopSignal(UnixStream);

impl StopSignal {
    /// From here on the two signals do not kill the process but end [`serve`].
    pub fn install() -> Result<Self> {
        let failed = |e| Error::new(ErrorKind::Io, "SIGTERM", "cannot be handled").mend(e);
        let (read, write) = UnixStream::pair().map_err(failed)?;
        for signal in [SIGTERM, SIGINT] {
            let write = write.try_clone().map_err(failed)?;
            signal_hook::low_level::pipe::register(signal, write).map_err(failed)?;
        }
        Ok(StopSignal(read))
    }
}

/// Serves `disk`: one connection after the other, until SIGTERM (or until the one connection of `--fd` ends). Requests in
/// flight are finished before it returns.
///
/// # Errors
/// `Io` when the listening socket fails. A connection that fails is logged and the next one awaited.
pub fn serve(disk: Disk, endpoint: Inherited, num_queues: u16, stop: &StopSignal) -> Result<()> {
    let disk = Arc::new(disk);
    let jobs = Arc::new(Jobs::new(Arc::clone(&disk)));
    let result = match endpoint {
        Inherited::Connected(stream) => {
            connection(&disk, &jobs, stream, num_queues, stop);
            Ok(())
        }
        Inherited::Listening(listening) => accept_loop(&disk, &jobs, &listening, num_queues, stop),
    };
    disk.close()?;
    result
}

fn accept_loop(
    disk: &Arc<Disk>,
    jobs: &Arc<Jobs>,
    listening: &Listening,
    queues: u16,
    stop: &StopSignal,
) -> Result<()> {
    while ready(listening.as_fd(), stop) {
        let accepted = listening.accept().map_err(|e| Error::io("the vhost-user socket", "accept a connection", e))?;
        if let Some(stream) = accepted
            && !connection(disk, jobs, stream, queues, stop)
        {
            return Ok(());
        }
    }
    Ok(())
}

/// Serves one connection to its end; false when a signal ended it.
fn connection(disk: &Arc<Disk>, jobs: &Arc<Jobs>, stream: UnixStream, queues: u16, stop: &StopSignal) -> bool {
    let handler = match Handler::new(Arc::clone(disk), Arc::clone(jobs), queues) {
        Ok(handler) => Arc::new(Mutex::new(handler)),
        Err(e) => {
            log::error!("cannot serve a connection: {e}");
            return true;
        }
    };
    log::info!("connected");
    let mut requests = BackendReqHandler::from_stream(stream, Arc::clone(&handler));
    let goes_on = loop {
        // SAFETY: the descriptor belongs to `requests`, which lives longer than this borrow.
        let fd = unsafe { BorrowedFd::borrow_raw(requests.as_raw_fd()) };
        if !ready(fd, stop) {
            break false;
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
            break true;
        }
    };
    handler.lock().unwrap_or_else(PoisonError::into_inner).shut_down();
    goes_on
}

/// Waits until `fd` can be read; false when it is time to stop.
fn ready(fd: BorrowedFd<'_>, stop: &StopSignal) -> bool {
    loop {
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN), PollFd::new(&stop.0, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) if !fds[1].revents().is_empty() => return false,
            Ok(_) if !fds[0].revents().is_empty() => return true,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                log::error!("poll failed: {e}");
                return false;
            }
        }
    }
}
