//! Copies ranges of files and leaves out what is zero.

use crate::error::{Error, ErrorKind, Result};
use crate::units::is_zero;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes that are read at once.
const PIECE: usize = 1 << 20;
/// Zeros are left out in units of this many bytes: what file systems allocate.
const HOLE: usize = 4096;

/// Work that takes its time: how to stop it, and whom to tell how far it is.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// Set by somebody else to end the work early; nothing of it stays behind then.
    pub stop: &'a AtomicBool,
    /// Told what is done and how many bytes that goes through.
    pub begin: &'a (dyn Fn(&str, u64) + Sync),
    /// Told that so many more bytes are done.
    pub advance: &'a (dyn Fn(u64) + Sync),
}

impl Work<'_> {
    /// An error if somebody wants it to stop.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Error::file(ErrorKind::Interrupted, path, "stopped; nothing was changed")),
            false => Ok(()),
        }
    }
}

/// An open file and its name for errors.
#[derive(Clone, Copy)]
pub(super) struct Named<'a> {
    pub file: &'a File,
    pub path: &'a Path,
}

/// Copies with one buffer.
pub(super) struct Copier<'a> {
    work: &'a Work<'a>,
    buf: Vec<u8>,
}

impl<'a> Copier<'a> {
    pub fn new(work: &'a Work<'a>) -> Copier<'a> {
        Copier { work, buf: vec![0; PIECE] }
    }

    /// Copies `len` bytes at `from` to `to`, where the target must be a hole. The source must have them all.
    pub fn copy(&mut self, source: Named<'_>, from: u64, target: Named<'_>, to: u64, len: u64) -> Result<()> {
        let end = from + len;
        let mut at = from;
        while at < end {
            let data = next_data(source.file, at, end).map_err(|e| Error::io(source.path, "read", e))?;
            (self.work.advance)(data.start - at);
            at = data.start;
            while at < data.end {
                self.work.check(target.path)?;
                let piece = usize::try_from(data.end - at).map_or(PIECE, |n| n.min(PIECE));
                let buf = &mut self.buf[..piece];
                source.file.read_exact_at(buf, at).map_err(|e| Error::io(source.path, "read", e))?;
                write_sparse(target.file, buf, to + (at - from)).map_err(|e| Error::io(target.path, "write", e))?;
                at += piece as u64;
                (self.work.advance)(piece as u64);
            }
        }
        Ok(())
    }
}

/// Writes what is not zero.
fn write_sparse(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let mut from = 0;
    while from < bytes.len() {
        let is_hole = |at: usize| is_zero(&bytes[at..(at + HOLE).min(bytes.len())]);
        let hole = is_hole(from);
        let mut to = (from + HOLE).min(bytes.len());
        while to < bytes.len() && is_hole(to) == hole {
            to = (to + HOLE).min(bytes.len());
        }
        if !hole {
            file.write_all_at(&bytes[from..to], at + from as u64)?;
        }
        from = to;
    }
    Ok(())
}

/// The first range of `[at, end)` that is no hole; empty at `end` if there is none. A file system that cannot tell has no
/// holes, and a file that ends before `end` has none there, so that reading finds out.
fn next_data(file: &File, at: u64, end: u64) -> io::Result<Range<u64>> {
    use rustix::fs::{SeekFrom, seek};
    let len = file.metadata()?.len();
    if len < end {
        return Ok(at..end);
    }
    let start = match seek(file, SeekFrom::Data(at)) {
        Ok(start) => start.min(end),
        Err(rustix::io::Errno::NXIO) => return Ok(end..end),
        Err(_) => return Ok(at..end),
    };
    match seek(file, SeekFrom::Hole(start)) {
        Ok(hole) => Ok(start..hole.min(end)),
        Err(_) => Ok(start..end),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_equal_and_sparse() {
        use std::os::unix::fs::MetadataExt;
        let (a, b) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        a.set_len(8 << 20).unwrap();
        a.write_all_at(&[1; 70_000], 3 << 20).unwrap();
        a.write_all_at(&[0; 100_000], 5 << 20).unwrap();
        a.write_all_at(&[2; 512], (8 << 20) - 512).unwrap();
        b.set_len(8 << 20).unwrap();
        let stop = AtomicBool::new(false);
        let done = std::sync::atomic::AtomicU64::new(0);
        let advance = |n| {
            done.fetch_add(n, Ordering::Relaxed);
        };
        let work = Work { stop: &stop, begin: &|_, _| {}, advance: &advance };
        let name = Path::new("x");
        let named = |file| Named { file, path: name };
        let len = (8 << 20) - 1024;
        Copier::new(&work).copy(named(&a), 1024, named(&b), 1024, len).unwrap();
        assert_eq!(done.load(Ordering::Relaxed), len);
        let read = |f: &File| {
            let mut all = vec![0; 8 << 20];
            f.read_exact_at(&mut all, 0).unwrap();
            all
        };
        assert!(read(&a) == read(&b));
        assert!(b.metadata().unwrap().blocks() * 512 < 200_000);
        stop.store(true, Ordering::Relaxed);
        assert!(Copier::new(&work).copy(named(&a), 0, named(&b), 0, 8 << 20).is_err());
        stop.store(false, Ordering::Relaxed);
        let short = Copier::new(&work).copy(named(&a), 8 << 20, named(&b), 0, 512).unwrap_err();
        assert!(short.to_string().contains("cannot read"), "{short}");
    }
}
