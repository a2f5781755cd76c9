//! The engine for what the page cache holds: never sleeps.

use super::buf::{IoBuf, total_len};
use super::fault::FileRef;
use std::io;

/// Reads what is in the page cache from `offset` on and returns how many bytes that was: 0 when the first page is
/// missing, fewer than asked when a later one is. The caller sends the rest to an engine that may wait.
///
/// End of file also shows as fewer bytes; the waiting engine then tells it apart. What a mapping is warm for is copied from
/// there, and what is found otherwise becomes warm ([`super::hot`]).
#[inline]
pub fn read_cached(file: FileRef<'_>, bufs: &[IoBuf], offset: u64) -> io::Result<usize> {
    match file.hot() {
        None => ask(file, bufs, offset),
        Some(hot) if hot.read(bufs, offset) => Ok(total_len(bufs)),
        Some(hot) => ask(file, bufs, offset).inspect(|n| hot.mark(offset, *n as u64)),
    }
}

fn ask(file: FileRef<'_>, bufs: &[IoBuf], offset: u64) -> io::Result<usize> {
    match file.read_cached(bufs, offset) {
        Ok(n) => Ok(n),
        Err(e) => match e.raw_os_error() {
            // EOPNOTSUPP: the file system has no such read (an old FUSE, some network ones): every read is a miss.
            Some(libc::EAGAIN | libc::EINTR | libc::EOPNOTSUPP) => Ok(0),
            _ => Err(e),
        },
    }
}
