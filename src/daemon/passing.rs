//! Descriptors that go with bytes over a unix socket (SCM_RIGHTS).

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// Descriptors that the kernel takes with one message (SCM_MAX_FD).
const A_MESSAGE: usize = 253;

/// What came.
#[derive(Clone, Copy, Debug)]
pub struct Received {
    /// Bytes; 0 at the end of the stream.
    pub bytes: usize,
    /// Descriptors were lost: this process may have no more.
    pub lost: bool,
}

/// Reads bytes, and appends the descriptors that come with them to `fds`.
pub fn receive(stream: &UnixStream, bytes: &mut [u8], fds: &mut Vec<OwnedFd>) -> io::Result<Received> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(A_MESSAGE))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = recvmsg(stream, &mut [IoSliceMut::new(bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for rights in control.drain() {
        if let RecvAncillaryMessage::ScmRights(came) = rights {
            fds.extend(came);
        }
    }
    Ok(Received { bytes: message.bytes, lost: message.flags.contains(ReturnFlags::CTRUNC) })
}

/// Writes a line. The descriptors come with its first bytes.
pub fn send(stream: &UnixStream, line: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut line = line;
    for some in fds.chunks(A_MESSAGE) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(A_MESSAGE))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(some));
        // A byte for each message, for none goes without.
        let byte = &[IoSlice::new(&line[..1])];
        rustix::io::retry_on_intr(|| sendmsg(stream, byte, &mut control, SendFlags::NOSIGNAL))?;
        line = &line[1..];
    }
    while !line.is_empty() {
        // Not `write`: a peer that is gone must not be the end of a process that did not ask for SIGPIPE to be ignored.
        let sent = rustix::io::retry_on_intr(|| rustix::net::send(stream, line, SendFlags::NOSIGNAL))?;
        line = &line[sent..];
    }
    Ok(())
}
