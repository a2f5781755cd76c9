//! Sockets on either side of a proxy, and the messages on the one between them.

use super::frame::FRAME_BYTES_MAX;
use super::wire::{HEADER_BYTES, Malformed, Message};
use crate::error::{Error, ErrorKind};
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// How long a link may make no progress.
pub const STALL: Duration = Duration::from_secs(30);

/// Bytes of a message that room is made for before they come: most frames have no more.
const RESERVED_BYTES: usize = FRAME_BYTES_MAX;

/// A connected socket. Its copies are one connection.
#[derive(Debug)]
pub enum Socket {
    /// To QEMU, or in tests.
    Unix(UnixStream),
    /// Between hosts.
    Tcp(TcpStream),
}

impl Socket {
    /// The same connection, for another thread.
    ///
    /// # Errors
    /// The process has no more files.
    pub fn copy(&self) -> io::Result<Socket> {
        Ok(match self {
            Socket::Unix(socket) => Socket::Unix(socket.try_clone()?),
            Socket::Tcp(socket) => Socket::Tcp(socket.try_clone()?),
        })
    }

    /// Has the kernel give the connection up when it makes no progress for [`STALL`], also when nothing is to be sent: a host that
    /// lost its power says nothing.
    ///
    /// # Errors
    /// The kernel has no such option.
    pub fn watch(&self) -> io::Result<()> {
        use rustix::net::sockopt;
        match self {
            Socket::Unix(socket) => socket.set_write_timeout(Some(STALL)),
            Socket::Tcp(socket) => {
                socket.set_write_timeout(Some(STALL))?;
                socket.set_nodelay(true)?;
                sockopt::set_socket_keepalive(socket, true)?;
                sockopt::set_tcp_keepidle(socket, STALL / 3)?;
                sockopt::set_tcp_keepintvl(socket, STALL / 6)?;
                sockopt::set_tcp_keepcnt(socket, 4)?;
                sockopt::set_tcp_user_timeout(socket, u32::try_from(STALL.as_millis()).unwrap_or(u32::MAX))?;
                Ok(())
            }
        }
    }

    /// Ends the connection for all its copies: whoever reads or writes it comes back at once.
    pub fn shut(&self) {
        // A peer that has ended it already is as good.
        let _ = match self {
            Socket::Unix(socket) => socket.shutdown(Shutdown::Both),
            Socket::Tcp(socket) => socket.shutdown(Shutdown::Both),
        };
    }

    /// Whether something can be read within this time.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub fn is_readable(&self, within: Duration) -> io::Result<bool> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut fds = [PollFd::new(self, PollFlags::IN)];
        let within = Timespec::try_from(within).map_err(|_| io::ErrorKind::InvalidInput)?;
        loop {
            match poll(&mut fds, Some(&within)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Socket::Unix(socket) => socket.as_fd(),
            Socket::Tcp(socket) => socket.as_fd(),
        }
    }
}

impl Read for &Socket {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(socket) => (&mut &*socket).read(buf),
            Socket::Tcp(socket) => (&mut &*socket).read(buf),
        }
    }
}

impl Write for &Socket {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Socket::Unix(socket) => (&mut &*socket).write(buf),
            Socket::Tcp(socket) => (&mut &*socket).write(buf),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A link that several threads write to, each a whole message.
#[derive(Clone, Copy, Debug)]
pub struct Line<'a> {
    /// The link.
    pub link: &'a Socket,
    /// Held for a whole message.
    pub writing: &'a Mutex<()>,
}

impl Line<'_> {
    /// Writes a message; its bytes.
    ///
    /// # Errors
    /// The connection broke.
    pub fn send(&self, message: &Message) -> io::Result<usize> {
        let mut bytes = Vec::new();
        message.write(&mut bytes);
        self.write(&bytes)?;
        Ok(bytes.len())
    }

    /// Writes a message that was made before.
    ///
    /// # Errors
    /// The connection broke.
    pub fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let _whole = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut link = self.link;
        link.write_all(bytes)
    }
}

/// Why there is no message.
#[derive(Debug)]
pub enum NoMessage {
    /// The other side has ended the connection between two messages.
    End,
    /// It broke.
    Broken(io::Error),
    /// What came is none.
    Malformed(Malformed),
}

/// Reads the next message.
///
/// # Errors
/// See [`NoMessage`].
pub fn receive(mut from: &Socket) -> Result<Message, NoMessage> {
    let mut header = [0; HEADER_BYTES];
    let mut len = 0;
    while let Some(rest) = header.get_mut(len..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) if len == 0 => return Err(NoMessage::End),
            Ok(0) => return Err(NoMessage::Broken(io::ErrorKind::UnexpectedEof.into())),
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(NoMessage::Broken(e)),
        }
    }
    let (kind, len) = Message::header(header).map_err(NoMessage::Malformed)?;
    // Not much more than has come: a stranger may announce a lot.
    let mut body = Vec::with_capacity(len.min(RESERVED_BYTES));
    let read = from.take(len as u64).read_to_end(&mut body).map_err(NoMessage::Broken)?;
    if read < len {
        return Err(NoMessage::Broken(io::ErrorKind::UnexpectedEof.into()));
    }
    Message::read(kind, &body).map_err(NoMessage::Malformed)
}

/// What a peer has said why it gave up, before it closed a link that could not be written to any more; one that takes nothing is not
/// waited for.
pub fn last_word(from: &Socket, broke: &io::Error) -> Option<String> {
    while broke.kind() == io::ErrorKind::BrokenPipe {
        match receive(from) {
            Ok(Message::Abort(why)) => return Some(why),
            Ok(_) => {}
            Err(_) => break,
        }
    }
    None
}

/// What it means that a side has given up.
pub fn given_up(side: &str, why: &str) -> Error {
    Error::new(ErrorKind::Interrupted, side, format!("it has given up: {why}"))
}

/// Writes a message.
///
/// # Errors
/// The connection broke.
pub fn send(mut to: &Socket, message: &Message) -> io::Result<()> {
    let mut bytes = Vec::new();
    message.write(&mut bytes);
    to.write_all(&bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn messages_cross_a_tcp_link_and_its_end_is_noticed() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = Socket::Tcp(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        let far = Socket::Tcp(listener.accept().unwrap().0);
        near.watch().unwrap();
        far.watch().unwrap();
        assert!(!far.is_readable(Duration::ZERO).unwrap());
        for message in [Message::Ack(7), Message::Return(vec![1; 70_000]), Message::Ready] {
            send(&near, &message).unwrap();
            assert!(far.is_readable(Duration::from_secs(5)).unwrap());
            assert_eq!(receive(&far).unwrap(), message);
        }
        (&near).write_all(&[4, 8, 0]).unwrap();
        near.copy().unwrap().shut();
        assert!(matches!(receive(&far), Err(NoMessage::Broken(_))), "in the middle of a message");
        assert!(matches!(receive(&far), Err(NoMessage::End)));
        far.shut();
        assert!(receive(&far).is_err() && send(&far, &Message::End).is_err());
    }

    #[test]
    fn what_is_announced_and_does_not_come_takes_no_memory() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut header = vec![3];
        header.extend(u32::try_from(super::super::wire::BODY_BYTES_MAX).unwrap().to_le_bytes());
        (&near).write_all(&header).unwrap();
        near.shutdown(Shutdown::Write).unwrap();
        assert!(matches!(receive(&Socket::Unix(far)), Err(NoMessage::Broken(_))));
    }
}
