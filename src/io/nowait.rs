//! The engine for what the page cache holds: never sleeps.

use super::buf::{IoBuf, total_len};
use super::fault::FileRef;
use std::io;

/// What came from the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Got {
    /// Bytes from the beginning: 0 when the first page is missing, fewer than asked when a later one is.
    pub len: usize,
    /// They were copied from a mapping; otherwise the kernel was asked, who then fetches what is missing.
    pub mapped: bool,
}

/// Reads what is in the page cache from `offset` on. The caller sends the rest to an engine that may wait.
///
/// End of file also shows as fewer bytes; the waiting engine then tells it apart. What a mapping is warm for is copied from
/// there, and what is found otherwise becomes warm ([`super::hot`]).
#[inline]
pub fn read_cached(file: FileRef<'_>, bufs: &[IoBuf], offset: u64) -> io::Result<Got> {
    match file.hot() {
        None => ask(file, bufs, offset),
        Some(hot) if hot.read(bufs, offset) => Ok(Got { len: total_len(bufs), mapped: true }),
        Some(hot) => ask(file, bufs, offset).inspect(|got| hot.mark(offset, got.len as u64)),
    }
}

/// True if the whole range is known to be in the page cache. Fetches nothing.
pub fn is_cached(file: FileRef<'_>, offset: u64, len: u64) -> bool {
    file.hot().is_some_and(|hot| hot.is_warm(offset, len) || hot.is_cached(offset, len))
}

fn ask(file: FileRef<'_>, bufs: &[IoBuf], offset: u64) -> io::Result<Got> {
    let got = |len| Ok(Got { len, mapped: false });
    match file.read_cached(bufs, offset) {
        Ok(n) => got(n),
        Err(e) => match e.raw_os_error() {
            // EOPNOTSUPP: the file system has no such read (an old FUSE, some network ones): every read is a miss.
            Some(libc::EAGAIN | libc::EINTR | libc::EOPNOTSUPP) => got(0),
            _ => Err(e),
        },
    }
}
