//! A file of which every operation can be held, reordered, shortened or failed: what the tests of the write path stand on.
//!
//! In a server no file has [`Faults`], and each operation costs one branch that always goes the same way. A test opens an
//! overlay with faults ([`Overlay::open_with_faults`](crate::overlay::Overlay::open_with_faults)); then every system call
//! that reads, writes, punches or syncs the overlay file passes [`Faults::run`], and every read that is handed to io_uring
//! [`Faults::waiting_read`]. What is above (short transfers that go on, errors, retries) is the code that servers run.

use super::buf::{IoBuf, copy_from, slice_into, total_len};
use super::file;
use super::hot::Hot;
use crate::units::to_usize;
use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

/// One system call on a file.
#[derive(Clone, Copy, Debug)]
pub enum Op<'a> {
    /// `preadv2`, which may wait.
    Read {
        /// Byte offset in the file.
        at: u64,
        /// Bytes asked for.
        len: usize,
    },
    /// `preadv2` with `RWF_NOWAIT`. Failing it with `EAGAIN` makes it a miss of the page cache.
    ReadCached {
        /// Byte offset in the file.
        at: u64,
        /// Bytes asked for.
        len: usize,
    },
    /// `pwritev`.
    Write {
        /// Byte offset in the file.
        at: u64,
        /// What to write.
        bufs: &'a [IoBuf],
    },
    /// `fallocate` that makes a hole.
    Punch {
        /// Byte offset in the file.
        at: u64,
        /// Bytes.
        len: u64,
    },
    /// `fdatasync`.
    SyncData,
    /// `fsync`.
    SyncAll,
}

impl Op<'_> {
    /// A copy of what a write writes; empty for everything else.
    pub fn bytes(&self) -> Vec<u8> {
        let Op::Write { bufs, .. } = self else { return Vec::new() };
        let mut bytes = vec![0; total_len(bufs)];
        copy_from(bufs, &mut bytes);
        bytes
    }
}

/// What becomes of a read that io_uring carries out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It goes its way.
    Go,
    /// The kernel is asked for this many bytes only (at least 1); the rest follows, and has a fate of its own.
    Short(usize),
    /// It is not done and ends with this errno. `EAGAIN` and `EINTR` are tried again, and have a new fate then.
    Fail(i32),
    /// It is done, but its end is told so much later, after reads that began after it.
    Late(Duration),
}

/// Decides what becomes of the operations on a file. Called by every thread that uses the file, at the same time.
pub trait Faults: Debug + Send + Sync {
    /// Stands around a system call. `go(max)` does it, for `max` bytes at most (a read or a write; give `usize::MAX` for
    /// all), and returns the bytes transferred, 0 for what transfers none. To wait first is to hold the operation; not to
    /// call `go` is to fail it or to pretend that it was done.
    fn run(&self, op: &Op<'_>, go: &mut dyn FnMut(usize) -> io::Result<usize>) -> io::Result<usize>;

    /// What becomes of a read of `len` bytes from `at` on that is about to be handed to io_uring. Must not wait.
    fn waiting_read(&self, _at: u64, _len: usize) -> Fate {
        Fate::Go
    }
}

/// An open file, with its faults if it has any: what the engines of this floor work on.
#[derive(Clone, Copy, Debug)]
pub struct FileRef<'a> {
    file: &'a File,
    faults: Option<&'a Arc<dyn Faults>>,
    hot: Option<&'a Hot>,
}

impl<'a> From<&'a File> for FileRef<'a> {
    fn from(file: &'a File) -> Self {
        FileRef { file, faults: None, hot: None }
    }
}

impl<'a> FileRef<'a> {
    /// A file whose operations pass `faults`.
    pub fn new(file: &'a File, faults: Option<&'a Arc<dyn Faults>>) -> Self {
        FileRef { file, faults, hot: None }
    }

    /// A file that is mapped, too.
    pub fn with_hot(file: &'a File, hot: Option<&'a Hot>) -> Self {
        FileRef { file, faults: None, hot }
    }

    /// Has the processor fetch where a copy from `at` to `buf` begins, if it would be one from a mapping.
    #[inline]
    pub fn fetch(self, at: u64, buf: &IoBuf) {
        self.hot.iter().for_each(|hot| hot.fetch(at, buf));
    }

    /// Its mapping.
    #[inline]
    pub(super) fn hot(self) -> Option<&'a Hot> {
        self.hot
    }

    /// The file itself, for what is neither reading nor writing: its length, locks, names.
    pub fn file(self) -> &'a File {
        self.file
    }

    pub(super) fn faults(self) -> Option<&'a Arc<dyn Faults>> {
        self.faults
    }

    /// Reads exactly the list's length; see [`file::read_exact_at`].
    pub fn read_exact(self, bufs: &[IoBuf], at: u64) -> io::Result<()> {
        let Some(faults) = self.faults else { return file::read_exact_at(self.file, bufs, at) };
        file::whole(bufs, at, io::ErrorKind::UnexpectedEof, |bufs, at| {
            let op = Op::Read { at, len: total_len(bufs) };
            faults.run(&op, &mut |max| file::preadv2(self.file, &first(bufs, max), at, 0))
        })
    }

    /// Fills `buf` from `at` on.
    pub fn read_exact_at(self, buf: &mut [u8], at: u64) -> io::Result<()> {
        // SAFETY: `buf` is borrowed for the whole call, and used through the list only.
        let list = [unsafe { IoBuf::from_raw(buf.as_mut_ptr(), buf.len()) }];
        self.read_exact(&list, at)
    }

    /// One read of what the page cache holds: see [`super::nowait::read_cached`].
    pub(super) fn read_cached(self, bufs: &[IoBuf], at: u64) -> io::Result<usize> {
        let Some(faults) = self.faults else { return file::preadv2(self.file, bufs, at, libc::RWF_NOWAIT) };
        let op = Op::ReadCached { at, len: total_len(bufs) };
        faults.run(&op, &mut |max| file::preadv2(self.file, &first(bufs, max), at, libc::RWF_NOWAIT))
    }

    /// Writes the whole list; see [`file::write_all_at`].
    pub fn write_all(self, bufs: &[IoBuf], at: u64) -> io::Result<()> {
        let Some(faults) = self.faults else { return file::write_all_at(self.file, bufs, at) };
        file::write_whole(bufs, at, |bufs, at| {
            faults.run(&Op::Write { at, bufs }, &mut |max| file::pwritev(self.file, &first(bufs, max), at))
        })
    }

    /// Writes all of `bytes`.
    pub fn write_all_at(self, bytes: &[u8], at: u64) -> io::Result<()> {
        // SAFETY: `bytes` is borrowed for the whole call, and the list is only written from.
        let list = [unsafe { IoBuf::from_raw(bytes.as_ptr().cast_mut(), bytes.len()) }];
        self.write_all(&list, at)
    }

    /// Punches a hole; see [`file::punch_hole`].
    pub fn punch_hole(self, at: u64, len: u64) -> io::Result<()> {
        let Some(faults) = self.faults else { return file::punch_hole(self.file, at, len) };
        let part = |max: usize| file::punch_hole(self.file, at, len.min(max as u64)).map(|()| to_usize(len));
        faults.run(&Op::Punch { at, len }, &mut { part }).map(drop)
    }

    /// `fdatasync`.
    pub fn sync_data(self) -> io::Result<()> {
        let Some(faults) = self.faults else { return self.file.sync_data() };
        faults.run(&Op::SyncData, &mut |_| self.file.sync_data().map(|()| 0)).map(drop)
    }

    /// `fsync`.
    pub fn sync_all(self) -> io::Result<()> {
        let Some(faults) = self.faults else { return self.file.sync_all() };
        faults.run(&Op::SyncAll, &mut |_| self.file.sync_all().map(|()| 0)).map(drop)
    }
}

/// The first `max` bytes of the list.
pub(super) fn first(bufs: &[IoBuf], max: usize) -> Vec<IoBuf> {
    let mut out = Vec::with_capacity(bufs.len());
    slice_into(bufs, 0, max.min(total_len(bufs)), &mut out);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::VecDeque;
    use std::sync::Mutex;

    /// Does to each call what the next entry says: at most so many bytes, or an errno. Whole when there is none.
    #[derive(Debug, Default)]
    struct Script(Mutex<VecDeque<Result<usize, i32>>>);

    impl Faults for Script {
        fn run(&self, _op: &Op<'_>, go: &mut dyn FnMut(usize) -> io::Result<usize>) -> io::Result<usize> {
            let next = self.0.lock().unwrap().pop_front();
            next.unwrap_or(Ok(usize::MAX)).map_err(io::Error::from_raw_os_error).and_then(go)
        }
    }

    fn script(steps: &[Result<usize, i32>]) -> (File, Arc<dyn Faults>) {
        (tempfile::tempfile().unwrap(), Arc::new(Script(Mutex::new(steps.iter().copied().collect()))))
    }

    #[test]
    fn short_transfers_and_interruptions_are_carried_on() {
        let (file, faults) = script(&[Ok(3), Err(libc::EINTR), Ok(1), Ok(5), Ok(2), Err(libc::EINTR), Ok(1)]);
        let file = FileRef::new(&file, Some(&faults));
        let bytes: Vec<u8> = (1..=100).collect();
        file.write_all_at(&bytes, 10).unwrap();
        let mut back = [0; 100];
        file.read_exact_at(&mut back, 10).unwrap();
        assert!(back == bytes[..]);
    }

    #[test]
    fn a_write_that_fails_half_way_has_written_its_first_half() {
        let (file, faults) = script(&[Ok(40), Err(libc::ENOSPC)]);
        let hooked = FileRef::new(&file, Some(&faults));
        assert_eq!(hooked.write_all_at(&[7; 100], 0).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
        assert_eq!(file.metadata().unwrap().len(), 40);
    }

    #[test]
    fn each_operation_can_fail() {
        let (file, faults) = script(&[Err(libc::EIO); 6]);
        let file = FileRef::new(&file, Some(&faults));
        let failures = [
            file.read_exact_at(&mut [0; 1], 0),
            file.read_cached(&[], 0).map(drop),
            file.write_all_at(&[0; 1], 0),
            file.punch_hole(0, 1),
            file.sync_data(),
            file.sync_all(),
        ];
        assert!(failures.iter().all(|r| r.as_ref().is_err_and(|e| e.raw_os_error() == Some(libc::EIO))));
        file.write_all_at(&[1; 10], 0).unwrap();
        file.punch_hole(2, 3).unwrap();
        let mut back = [9; 10];
        file.read_exact_at(&mut back, 0).unwrap();
        assert_eq!(back, [1, 1, 0, 0, 0, 1, 1, 1, 1, 1]);
    }
}
