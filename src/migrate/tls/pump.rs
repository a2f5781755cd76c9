//! The thread between a program's socket and a TLS connection.
//!
//! Both directions are carried by one thread that never blocks but in poll, so each may stand still without the other. What it holds is
//! bounded, for QEMU guesses by what is taken from it when the rest fits into the downtime:
//!
//! ```text
//! program ──▶ socket (SOCKET_BYTES) ──▶ CHUNK_BYTES of TLS records ──▶ TCP: UNSENT_BYTES, then the network and the peer's kernel
//! program ◀── socket (SOCKET_BYTES) ◀── CHUNK_BYTES decrypted ◀─────── TCP
//! ```
//!
//! No more is read from a side before the other has taken what was read.
//!
//! | what ends | what happens |
//! | --- | --- |
//! | the program shuts its socket, or closes it | all that it wrote before goes out, then `close_notify`; what comes is thrown away |
//! | the peer ends, with `close_notify` or without | the program gets what had come, then its socket ends; what it writes is thrown away |
//! | TCP breaks, or takes nothing for `link::STALL` | the same |
//!
//! An end without `close_notify` is no error here: which message is the last one, the messages say themselves.

use super::{Limits, Socket, flush, is_retry, wait};
use rustix::event::{PollFd, PollFlags};
use rustix::net::sockopt;
use rustls::Connection;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::thread::JoinHandle;
use std::time::Instant;

/// What is read at once from either side.
const CHUNK_BYTES: usize = 64 << 10;
/// What the kernel keeps between program and pump, in each direction; it counts its own bookkeeping, too.
const SOCKET_BYTES: usize = 64 << 10;
/// What TCP takes that it cannot send yet.
const UNSENT_BYTES: libc::c_int = 64 << 10;

/// A TLS connection under a link. When it is dropped the link is ended, and what was written to it goes out first, if the peer takes it
/// in time: without that the last message could be lost with the process.
#[derive(Debug)]
pub struct Tunnel {
    end: UnixStream,
    pump: Option<JoinHandle<()>>,
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        // Ended already, if all went well.
        let _ = self.end.shutdown(Shutdown::Both);
        // It ends by itself: see `Limits::farewell`.
        if self.pump.take().is_some_and(|pump| pump.join().is_err()) {
            log::error!("the thread that carries the link's TLS has panicked");
        }
    }
}

/// What the thread has.
pub(super) struct Pump {
    tls: Connection,
    tcp: TcpStream,
    plain: UnixStream,
    limits: Limits,
    /// As it was read.
    chunk: Vec<u8>,
    /// Decrypted, and so much of it taken by the program.
    ready: Vec<u8>,
    taken: usize,
    /// When TCP took something last, or was given the first that it has not taken.
    moved: Instant,
    /// Since when nothing more is to be sent.
    quiet: Option<Instant>,
    /// All was sent, or never will be.
    sent: bool,
    /// Nothing more comes.
    peer_ended: bool,
    broken: bool,
}

impl Pump {
    /// Starts the thread on a connection that has its handshake behind it. Gives the program's end.
    pub(super) fn start(tls: Connection, tcp: TcpStream, limits: Limits) -> io::Result<(Socket, Tunnel)> {
        let (end, plain) = UnixStream::pair()?;
        for socket in [&end, &plain] {
            sockopt::set_socket_send_buffer_size(socket, SOCKET_BYTES)?;
        }
        plain.set_nonblocking(true)?;
        limit_unsent(&tcp)?;
        let mut pump = Pump {
            tls,
            tcp,
            plain,
            limits,
            chunk: vec![0; CHUNK_BYTES],
            ready: Vec::new(),
            taken: 0,
            moved: Instant::now(),
            quiet: None,
            sent: false,
            peer_ended: false,
            broken: false,
        };
        let socket = Socket::Unix(end.try_clone()?);
        let thread = std::thread::Builder::new().name("tls".into()).spawn(move || pump.run())?;
        Ok((socket, Tunnel { end, pump: Some(thread) }))
    }

    fn run(&mut self) {
        // What came with the end of the handshake.
        let first = self.decrypt(0);
        self.or_break(first);
        loop {
            let moved = self.send().and_then(|()| self.receive());
            self.or_break(moved);
            self.deliver();
            if self.sent && self.peer_ended && self.ready.is_empty() {
                return;
            }
            let waited = self.wait();
            self.or_break(waited);
        }
    }

    fn or_break(&mut self, done: io::Result<()>) {
        let Err(e) = done else { return };
        // After the program has ended the link nobody misses it.
        let level = if self.quiet.is_some() { log::Level::Debug } else { log::Level::Warn };
        log::log!(level, "the link's TLS connection broke: {e}");
        // The alert that says why, if there is one.
        let _ = flush(&mut self.tls, &self.tcp);
        self.quiet.get_or_insert_with(Instant::now);
        (self.broken, self.sent, self.peer_ended) = (true, true, true);
    }

    /// Nothing more is to be sent.
    fn end(&mut self) {
        if self.quiet.is_none() {
            self.quiet = Some(Instant::now());
            self.tls.send_close_notify();
        }
    }

    /// From the program to TCP.
    fn send(&mut self) -> io::Result<()> {
        if self.sent || !self.flush()? {
            return Ok(());
        }
        if self.quiet.is_none() {
            match (&self.plain).read(&mut self.chunk) {
                Ok(n @ 1..) => {
                    self.tls.writer().write_all(self.chunk.get(..n).unwrap_or_default())?;
                    self.moved = Instant::now();
                }
                Err(e) if is_retry(&e) => {}
                Ok(0) | Err(_) => self.end(),
            }
        }
        if self.flush()? && self.quiet.is_some() {
            self.sent = true;
            self.tcp.shutdown(Shutdown::Write)?;
        }
        Ok(())
    }

    /// True: TCP has all.
    fn flush(&mut self) -> io::Result<bool> {
        let (bytes, all) = flush(&mut self.tls, &self.tcp)?;
        if bytes > 0 {
            self.moved = Instant::now();
        }
        Ok(all)
    }

    /// From TCP, if what came before is with the program.
    fn receive(&mut self) -> io::Result<()> {
        if self.peer_ended || !self.ready.is_empty() {
            return Ok(());
        }
        match (&self.tcp).read(&mut self.chunk) {
            Ok(0) => {
                self.peer_ended = true;
                self.end();
                Ok(())
            }
            Ok(n) => self.decrypt(n),
            Err(e) if is_retry(&e) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Makes `ready` of so many bytes of the chunk.
    fn decrypt(&mut self, len: usize) -> io::Result<()> {
        let wire = self.chunk.get(..len).unwrap_or_default();
        if decrypt(&mut self.tls, wire, &mut self.ready)? {
            self.peer_ended = true;
            self.end();
        }
        Ok(())
    }

    /// To the program, and the end after all else. One that has shut its socket gets nothing.
    fn deliver(&mut self) {
        while let Some(rest) = self.ready.get(self.taken..).filter(|rest| !rest.is_empty()) {
            match (&self.plain).write(rest) {
                Ok(n) => self.taken += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.taken = self.ready.len(),
            }
        }
        self.ready.clear();
        self.taken = 0;
        if self.peer_ended {
            let _ = self.plain.shutdown(Shutdown::Both);
            // A socket that is closed over unread bytes is no end to the other, but an error.
            while (&self.plain).read(&mut self.chunk).is_ok_and(|n| n > 0) {}
        }
    }

    /// Until there is something to do. An error when TCP did nothing for too long.
    fn wait(&mut self) -> io::Result<()> {
        let blocked = !self.sent && self.tls.wants_write();
        let stalled = blocked.then(|| self.moved + self.limits.stall);
        // With the program gone, and its end said: the peer's, and not for ever.
        let parted = self.quiet.filter(|_| !self.broken).map(|since| since + self.limits.farewell);
        let until = [stalled, parted].into_iter().flatten().min();
        if until.is_some_and(|until| Instant::now() >= until) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let mut fds = Vec::with_capacity(2);
        let mut watch = |fd, read: bool, write: bool| {
            // Not for nothing: an end is told of whether it is asked for or not.
            let mut events = PollFlags::empty();
            events.set(PollFlags::IN, read);
            events.set(PollFlags::OUT, write);
            if !events.is_empty() {
                fds.push(PollFd::from_borrowed_fd(fd, events));
            }
        };
        watch(self.tcp.as_fd(), !self.peer_ended && self.ready.is_empty(), blocked);
        watch(self.plain.as_fd(), self.quiet.is_none() && !blocked, !self.ready.is_empty());
        wait(&mut fds, until)
    }
}

/// Decrypts what came. True: after it the peer has closed the connection.
fn decrypt(tls: &mut Connection, mut wire: &[u8], ready: &mut Vec<u8>) -> io::Result<bool> {
    loop {
        let state = tls.process_new_packets().map_err(io::Error::other)?;
        // The connection takes no more before this is read.
        tls.reader().take(state.plaintext_bytes_to_read() as u64).read_to_end(ready)?;
        if state.peer_has_closed() || wire.is_empty() {
            return Ok(state.peer_has_closed());
        }
        tls.read_tls(&mut wire)?;
    }
}

/// Has TCP take little more than it can send. What is in the network and in the peer's kernel may be more, as it is without TLS: a
/// bound on that would be one on the rate over long ways. The sides bound it by the parts under way.
fn limit_unsent(tcp: &TcpStream) -> io::Result<()> {
    let bytes = UNSENT_BYTES;
    let len = libc::socklen_t::try_from(size_of_val(&bytes)).map_err(io::Error::other)?;
    // SAFETY: the option's value is an int, which lives through the call and whose size is given; the descriptor is open, for
    // `tcp` owns it.
    let set = unsafe {
        libc::setsockopt(tcp.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_NOTSENT_LOWAT, (&raw const bytes).cast(), len)
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
