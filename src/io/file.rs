//! Blocking transfers of whole ranges (short reads and writes are carried on, EINTR is retried), and what else files need.

use super::buf::{IoBuf, advance, cut, total_len};
use crate::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

/// Pieces that one system call takes (IOV_MAX).
const IOV_MAX: libc::c_int = 1024;

/// Bytes of one system call that writes. The page cache makes a folio as large as the write that brings it, and ext4 then
/// looks at every block of that folio at each write into it (Linux 6.16 to 6.18 at least): in a file that was filled by
/// writes of 1 MiB a random write of 4 KiB takes six times as long as in one filled by writes of this size, while the
/// filling takes a third longer (docs/performance.md).
const WRITE_PIECE: u64 = 32 << 10;

/// How many pieces of the list one call takes.
fn count(bufs: &[IoBuf]) -> libc::c_int {
    libc::c_int::try_from(bufs.len()).map_or(IOV_MAX, |n| n.min(IOV_MAX))
}

/// One `preadv2` with `flags` at `offset`; the kernel may transfer less than asked.
pub(super) fn preadv2(file: &File, bufs: &[IoBuf], offset: u64, flags: libc::c_int) -> io::Result<usize> {
    // SAFETY: IoBuf is a transparent iovec, `count(bufs)` of them are readable, and their makers promised the memory.
    let n = unsafe { libc::preadv2(file.as_raw_fd(), bufs.as_ptr().cast(), count(bufs), offset as libc::off_t, flags) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// One `pwritev` at `offset`; the kernel may transfer less than asked.
pub(super) fn pwritev(file: &File, bufs: &[IoBuf], offset: u64) -> io::Result<usize> {
    // SAFETY: as in `preadv2`.
    let n = unsafe { libc::pwritev(file.as_raw_fd(), bufs.as_ptr().cast(), count(bufs), offset as libc::off_t) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Repeats `once` until the whole list is transferred. Most transfers are whole at the first call, so the list is copied
/// only when one was short.
pub(super) fn whole(
    bufs: &[IoBuf],
    offset: u64,
    at_end: io::ErrorKind,
    once: impl Fn(&[IoBuf], u64) -> io::Result<usize>,
) -> io::Result<()> {
    let (total, mut done) = (total_len(bufs), 0);
    let mut rest: Option<Vec<IoBuf>> = None;
    while done < total {
        match once(rest.as_deref().unwrap_or(bufs), offset + done as u64) {
            Ok(0) => return Err(at_end.into()),
            Ok(n) => {
                done += n;
                if done < total {
                    advance(rest.get_or_insert_with(|| bufs.to_vec()), n);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Reads exactly the list's length at `offset`. End of file before that is `UnexpectedEof`: a short base image must
/// never read as zeros.
pub fn read_exact_at(file: &File, bufs: &[IoBuf], offset: u64) -> io::Result<()> {
    whole(bufs, offset, io::ErrorKind::UnexpectedEof, |bufs, offset| preadv2(file, bufs, offset, 0))
}

/// Writes the whole list at `offset`, in pieces of 32 KiB (see `WRITE_PIECE`).
pub fn write_all_at(file: &File, bufs: &[IoBuf], offset: u64) -> io::Result<()> {
    write_whole(bufs, offset, |bufs, offset| pwritev(file, bufs, offset))
}

/// Repeats `once`, which writes, until the whole list is written.
pub(super) fn write_whole(
    bufs: &[IoBuf],
    offset: u64,
    once: impl Fn(&[IoBuf], u64) -> io::Result<usize>,
) -> io::Result<()> {
    let piece = |bufs: &[IoBuf], offset| whole(bufs, offset, io::ErrorKind::WriteZero, &once);
    if total_len(bufs) as u64 <= WRITE_PIECE { piece(bufs, offset) } else { cut(bufs, offset, WRITE_PIECE, piece) }
}

/// Switches the kernel's own readahead off for this open file: reads fetch exactly the pages asked for. Readahead would
/// fill the cache with neighbours in the *target* image, which the plan of the read knows nothing of.
pub fn disable_readahead(file: &File) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_RANDOM) } {
        0 => Ok(()),
        e => Err(io::Error::from_raw_os_error(e)),
    }
}

/// Makes the names in a directory durable: those that were created, renamed and removed.
pub fn sync_dir(dir: &Path) -> crate::Result<()> {
    File::open(dir).and_then(|d| d.sync_all()).map_err(|e| Error::io(dir, "make the directory durable", e))
}

/// Lets this process open as many files as it may: an image of a library costs one, a ring of a VM six, and the usual soft
/// limit is 1,024. Best effort: where it does not suffice, the error that follows names the file.
pub fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        log::warn!("cannot raise the limit of open files: {e}");
    }
}

/// Punches a hole: the range reads as zeros afterwards and takes no space. The file's size stays.
pub fn punch_hole(file: &File, offset: u64, len: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    loop {
        // SAFETY: plain system call on an open descriptor.
        let r = unsafe { libc::fallocate(file.as_raw_fd(), mode, offset as libc::off_t, len as libc::off_t) };
        if r == 0 {
            return Ok(());
        }
        let e = io::Error::last_os_error();
        if e.kind() != io::ErrorKind::Interrupted {
            return Err(e);
        }
    }
}

/// Reserves space behind the end of the file, whose size stays (`fallocate`, FALLOC_FL_KEEP_SIZE). Truncating the file
/// gives it back.
pub fn reserve_behind_end(file: &File, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: plain system call on an open descriptor.
    let r = unsafe {
        libc::fallocate(file.as_raw_fd(), libc::FALLOC_FL_KEEP_SIZE, offset as libc::off_t, len as libc::off_t)
    };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `struct fiemap` of linux/fiemap.h with room for one extent (five words, then four half words).
#[repr(C)]
#[derive(Default)]
struct Fiemap {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extent: [u64; 7],
}

/// True if the file has space of its own somewhere in the range, written or only reserved, also behind its end.
///
/// # Errors
/// `EOPNOTSUPP` from file systems that cannot tell (FS_IOC_FIEMAP).
pub fn has_extent(file: &File, offset: u64, len: u64) -> io::Result<bool> {
    /// `_IOWR('f', 11, struct fiemap)`, whose size is that without extents: 32 bytes.
    const FS_IOC_FIEMAP: libc::Ioctl = 0xc020_660b;
    let mut map = Fiemap { start: offset, length: len, extent_count: 1, ..Fiemap::default() };
    // SAFETY: the kernel writes into `map` only: its head, and at most `extent_count` extents of 56 bytes behind it.
    let r = unsafe { libc::ioctl(file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut map) };
    if r == 0 { Ok(map.mapped_extents > 0) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn end_of_file_is_an_error_and_not_zeros() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 100], 0).unwrap();
        let mut mem = [0u8; 101];
        // SAFETY: `mem` outlives the call.
        let buf = unsafe { IoBuf::from_raw(mem.as_mut_ptr(), 101) };
        assert_eq!(read_exact_at(&file, &[buf], 0).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn more_pieces_than_one_call_takes() {
        let file = tempfile::tempfile().unwrap();
        let mut mem: Vec<u8> = (0..3000u32).map(|i| i as u8).collect();
        // SAFETY: `mem` outlives the calls and is not touched meanwhile.
        let bufs: Vec<_> = (0..3000).map(|i| unsafe { IoBuf::from_raw(mem.as_mut_ptr().wrapping_add(i), 1) }).collect();
        write_all_at(&file, &bufs, 7).unwrap();
        let mut got = vec![0; 3000];
        file.read_exact_at(&mut got, 7).unwrap();
        assert_eq!(got, mem);
        mem.fill(0);
        read_exact_at(&file, &bufs, 7).unwrap();
        assert_eq!(got, mem);
    }
}
