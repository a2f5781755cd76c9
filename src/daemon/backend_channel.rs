//! Messages from here to the frontend (VHOST_USER_SET_BACKEND_REQ_FD): that the config space has changed.
//!
//! The `vhost` crate takes the channel off the socket and keeps it to itself, and it has no such message. So the descriptor
//! is looked at while it is still on the socket (the kernel makes a second one for whoever peeks), and used once the crate
//! has checked and accepted the first.

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// VHOST_USER_SET_BACKEND_REQ_FD.
pub const SET_BACKEND_REQ_FD: u32 = 21;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: request, flags (version 1, no reply wanted), bytes of the body.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// The channel of the connection that is being served, if it has one.
#[derive(Debug, Default)]
pub struct BackendChannel(Mutex<Ends>);

#[derive(Debug, Default)]
struct Ends {
    /// On the socket, and not accepted yet.
    offered: Option<OwnedFd>,
    accepted: Option<OwnedFd>,
}

impl BackendChannel {
    /// Looks at the descriptor that comes with the message at the head of `socket`.
    pub fn peek(&self, socket: BorrowedFd<'_>) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut header = [0; 12];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut header)], &mut control, flags);
        let mut fds = control.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        });
        let first = received.ok().and_then(|_| fds.next()).and_then(|mut fds| fds.next());
        self.ends().offered = first;
    }

    /// The descriptor that was seen last is the channel from now on.
    pub fn accept(&self) {
        let mut ends = self.ends();
        ends.accepted = ends.offered.take();
    }

    /// The connection has ended, and its channel with it.
    pub fn clear(&self) {
        *self.ends() = Ends::default();
    }

    /// Tells the frontend that the config space has changed; it will read it. False when there is nobody to tell, or the
    /// frontend does not read its channel. Never waits.
    pub fn config_changed(&self) -> bool {
        let ends = self.ends();
        let Some(channel) = &ends.accepted else { return false };
        let message: Vec<u8> = CONFIG_CHANGE.iter().flat_map(|word| word.to_ne_bytes()).collect();
        match rustix::net::send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(n) if n == message.len() => true,
            Ok(_) | Err(rustix::io::Errno::AGAIN) => {
                log::warn!("the frontend does not read its channel; it is not told that the disk has changed");
                false
            }
            Err(e) => {
                log::warn!("the frontend cannot be told that the disk has changed: {e}");
                false
            }
        }
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
