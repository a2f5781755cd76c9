//! The other side of 'hand-over': asks a running server for its listening socket, so that the guest notices nothing of an
//! upgrade but a short wait.

use super::control::{LINE_MAX, TAKEN_TIME};
use super::passing;
use super::socket::Listening;
use crate::error::{Error, ErrorKind, Result};
use serde_json::Value;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long the old server may take to finish what is in flight and to flush.
const HAND_OVER_TIME: Duration = Duration::from_secs(180);

/// A server that has stopped serving and waits for [`TakeOver::taken`]; without it, it goes on.
#[derive(Debug)]
pub struct TakeOver {
    stream: UnixStream,
    path: PathBuf,
}

impl TakeOver {
    /// Asks the server whose control socket is at `path` for its socket. Everything else should be in order before: the
    /// guest waits from here on.
    ///
    /// # Errors
    /// When there is no such server, or it does not hand over; it then serves on.
    pub fn ask(path: &Path) -> Result<(TakeOver, Listening)> {
        let failed = |e| {
            Error::io(path, "take over from the server of this control socket", e)
                .mend("if none is running, start without --take-over")
        };
        let stream = UnixStream::connect(path).map_err(failed)?;
        stream.set_read_timeout(Some(HAND_OVER_TIME)).map_err(failed)?;
        (&stream).write_all(b"{\"execute\":\"hand-over\"}\n").map_err(failed)?;
        let (line, fd) = receive(&stream).map_err(failed)?;
        let answer: Value = serde_json::from_slice(&line).map_err(|e| failed(e.into()))?;
        if let Some(why) = answer.pointer("/error/desc").and_then(Value::as_str) {
            return Err(Error::file(ErrorKind::Busy, path, format!("its server does not hand over: {why}"))
                .mend("it serves on; see its log"));
        }
        let fd = fd.ok_or_else(|| failed(io::Error::other("no socket came with the answer")))?;
        let file = answer.pointer("/return/socket").and_then(Value::as_str).map(PathBuf::from);
        let listening = Listening::adopt(fd, file)?;
        Ok((TakeOver { stream, path: path.to_path_buf() }, listening))
    }

    /// Says that this process serves now; the old one ends.
    ///
    /// # Errors
    /// When the old server does not answer: it may have gone on, so nothing must be served here.
    pub fn taken(self) -> Result<()> {
        let failed = |e| Error::io(&self.path, "take over from the server of this control socket", e);
        self.stream.set_read_timeout(Some(TAKEN_TIME)).map_err(failed)?;
        (&self.stream).write_all(b"{\"execute\":\"taken\"}\n").map_err(failed)?;
        let (line, _) = receive(&self.stream).map_err(failed)?;
        let answer: Value = serde_json::from_slice(&line).map_err(|e| failed(e.into()))?;
        // One that has lost patience serves on, and does not know what this is about.
        match answer.get("return") {
            Some(_) => Ok(()),
            None => Err(Error::file(ErrorKind::Busy, &self.path, "its server did not wait so long, and serves on")
                .mend("try again; opening the disk must not take longer than 15 s")),
        }
    }
}

/// Reads a line and the descriptor that comes with it.
fn receive(stream: &UnixStream) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let (mut line, mut fds) = (Vec::new(), Vec::new());
    while line.last() != Some(&b'\n') {
        let mut bytes = [0; 4096];
        // Leftover work of an io_uring interrupts as a signal would.
        let got = match passing::receive(stream, &mut bytes, &mut fds) {
            Ok(came) => came.bytes,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        line.extend_from_slice(&bytes[..got]);
        if line.len() > LINE_MAX {
            return Err(io::Error::other("the answer is too long"));
        }
    }
    Ok((line, fds.pop()))
}
