//! QEMU's image locks: who may use an image file together, decided among vmars and QEMUs alike.
//!
//! A process that has an image open says two things by shared `fcntl` locks of the open file (OFD locks) on single bytes of
//! it: byte 100 + *p*, "I use permission *p*"; byte 200 + *p*, "nobody else may". Nobody ever waits for these locks; they
//! are there to be looked at. Whoever opens an image first says its own, then looks whether somebody uses what it does
//! not share, or does not share what it uses, and takes its own back if so. Two that do this at once may both give way.
//!
//! The bytes are those of QEMU's `block/file-posix.c` (documented under "Image locking" in its user manual), seen in
//! `/proc/locks` with QEMU 7.2 and 10.0: a VM's disk uses 0, 1 and 3 and does not share 1 and 3; a backing file below a VM
//! uses 0 and does not share 1 and 3. `qemu-img` with `-U` only uses 0, so it is never in anybody's way.
//!
//! The locks go with the open file: closing it, or the death of the process, lets go of them (io_uring may keep a file open
//! for a moment longer). They are advisory: `cp` and `dd` do not look at them.

use crate::error::{Error, ErrorKind, Result};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

/// Reads what stays the same meanwhile.
const CONSISTENT_READ: libc::off_t = 0;
/// Writes.
const WRITE: libc::off_t = 1;
/// Changes the size.
const RESIZE: libc::off_t = 3;
/// QEMU has four permissions.
const PERMISSIONS: libc::off_t = 4;

/// First byte of the permissions that are in use.
const USED: libc::off_t = 100;
/// First byte of the permissions that are not shared.
const UNSHARED: libc::off_t = 200;

/// Nobody else may write, or change the size, of what one reads or writes oneself.
const NOT_SHARED: [libc::off_t; 2] = [WRITE, RESIZE];

/// How long it makes sense to try for a lock that a process may hold that was killed just now (io_uring). A little under
/// the 5 s after which `vmar serve` must have said why it cannot start.
pub const WAIT: Duration = Duration::from_millis(4500);
const PAUSE: Duration = Duration::from_millis(50);

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading; others may read too.
    Read,
    /// Reading and writing, alone.
    Write,
}

impl Access {
    fn uses(self) -> &'static [libc::off_t] {
        match self {
            Access::Read => &[CONSISTENT_READ],
            Access::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }
}

/// Takes the locks for `access` on an open file, whose they are from then on; tries for as long as `wait`.
///
/// # Errors
/// `Busy` when another process uses the file in a way that does not go together with this, `Unsupported` when the file
/// system has no such locks.
pub fn lock(file: &File, path: &Path, access: Access, wait: Duration) -> Result<()> {
    let deadline = Instant::now() + wait;
    loop {
        match try_lock(file, access) {
            Ok(true) => return Ok(()),
            Ok(false) if Instant::now() < deadline => std::thread::sleep(PAUSE),
            Ok(false) => {
                return Err(Error::file(ErrorKind::Busy, path, "is in use by another process (vmar or QEMU)")
                    .mend("stop that one first; 'lslocks' may name it"));
            }
            Err(e) => return Err(failed(path, e)),
        }
    }
}

/// One try: false if somebody else is in the way. `file` must have no locks yet.
pub fn try_lock(file: &File, access: Access) -> io::Result<bool> {
    let free = claim(file, access).and_then(|claimed| Ok(claimed && !is_contested(file, access)?));
    if !matches!(free, Ok(true)) {
        unlock(file)?;
    }
    free
}

/// Lets go of the locks of an open file, without closing it.
pub fn unlock(file: &File) -> io::Result<()> {
    set(file, libc::F_UNLCK, USED, PERMISSIONS)?;
    set(file, libc::F_UNLCK, UNSHARED, PERMISSIONS)?;
    Ok(())
}

/// True if any other process, or another open file of this one, has said that it uses the file. Takes no lock itself.
///
/// # Errors
/// As for [`lock`].
pub fn in_use(file: &File, path: &Path) -> Result<bool> {
    Ok(is_held(file, USED, PERMISSIONS).map_err(|e| failed(path, e))?
        || is_held(file, UNSHARED, PERMISSIONS).map_err(|e| failed(path, e))?)
}

/// Takes a single byte of an open file for oneself, as long as the file stays open; false if somebody else has it.
pub fn lock_byte(file: &File, byte: u64) -> io::Result<bool> {
    set(file, libc::F_WRLCK, byte as libc::off_t, 1)
}

/// True if somebody else, or another open file of this process, has locked that byte.
pub fn is_byte_held(file: &File, byte: u64) -> io::Result<bool> {
    is_held(file, byte as libc::off_t, 1)
}

fn failed(path: &Path, e: io::Error) -> Error {
    match e.raw_os_error() {
        Some(libc::ENOLCK | libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP) => {
            let cause = format!("its file system has no locks for image files ({e})");
            Error::file(ErrorKind::Unsupported, path, cause).mend(
                "put it on a file system with 'open file description' locks; NFS needs a lock service on both ends",
            )
        }
        _ => Error::io(path, "lock", e),
    }
}

/// Says what this side uses and does not share.
fn claim(file: &File, access: Access) -> io::Result<bool> {
    let bytes = access.uses().iter().map(|p| USED + p).chain(NOT_SHARED.iter().map(|p| UNSHARED + p));
    for byte in bytes {
        if !set(file, libc::F_RDLCK, byte, 1)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Looks whether that goes together with what all others said.
fn is_contested(file: &File, access: Access) -> io::Result<bool> {
    let bytes = access.uses().iter().map(|p| UNSHARED + p).chain(NOT_SHARED.iter().map(|p| USED + p));
    for byte in bytes {
        if is_held(file, byte, 1)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn range(kind: libc::c_int, from: libc::off_t, len: libc::off_t) -> libc::flock {
    // SAFETY: a C struct of numbers, for which zeros are valid.
    let mut range: libc::flock = unsafe { std::mem::zeroed() };
    // F_RDLCK, F_WRLCK and F_UNLCK are 0 to 2, SEEK_SET is 0.
    #[allow(clippy::cast_possible_truncation)]
    {
        range.l_type = kind as libc::c_short;
        range.l_whence = libc::SEEK_SET as libc::c_short;
    }
    range.l_start = from;
    range.l_len = len;
    range
}

/// Sets or clears a lock of the open file; false if a lock of somebody else's keeps it from that.
fn set(file: &File, kind: libc::c_int, from: libc::off_t, len: libc::off_t) -> io::Result<bool> {
    let range = range(kind, from, len);
    loop {
        // SAFETY: plain system call on an open descriptor; the kernel only reads `range`.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const range) } == 0 {
            return Ok(true);
        }
        let e = io::Error::last_os_error();
        match e.raw_os_error() {
            Some(libc::EAGAIN | libc::EACCES) => return Ok(false),
            Some(libc::EINTR) => {}
            _ => return Err(e),
        }
    }
}

/// True if anybody else holds a lock in the range.
fn is_held(file: &File, from: libc::off_t, len: libc::off_t) -> io::Result<bool> {
    let mut range = range(libc::F_WRLCK, from, len);
    // SAFETY: plain system call on an open descriptor; the kernel writes into `range`, which is a whole `struct flock`.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &raw mut range) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(libc::c_int::from(range.l_type) != libc::F_UNLCK)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(path: &Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    #[test]
    fn one_writer_or_many_readers() {
        let named = tempfile::NamedTempFile::new().unwrap();
        let path = named.path();
        let (a, b, c) = (open(path), File::open(path).unwrap(), File::open(path).unwrap());
        assert!(!in_use(&c, path).unwrap());
        assert!(try_lock(&a, Access::Write).unwrap());
        assert!(in_use(&c, path).unwrap());
        assert!(!in_use(&a, path).unwrap(), "its own locks are not in its way");
        assert!(!try_lock(&b, Access::Read).unwrap());
        assert!(!try_lock(&open(path), Access::Write).unwrap());
        drop(a);
        assert!(!in_use(&c, path).unwrap(), "who failed left nothing behind");
        assert!(try_lock(&b, Access::Read).unwrap());
        assert!(try_lock(&c, Access::Read).unwrap());
        let writer = open(path);
        assert!(!try_lock(&writer, Access::Write).unwrap());
        drop((b, c));
        lock(&writer, path, Access::Write, WAIT).unwrap();
        let err = lock(&open(path), path, Access::Write, Duration::from_millis(1)).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Busy);
        assert!(err.to_string().contains("is in use by another process (vmar or QEMU); stop"), "{err}");
    }

    #[test]
    fn many_writers_at_once_and_never_two() {
        use std::sync::atomic::{AtomicU32, Ordering};
        let named = tempfile::NamedTempFile::new().unwrap();
        let holders = AtomicU32::new(0);
        let taken = AtomicU32::new(0);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..500 {
                        let file = open(named.path());
                        if try_lock(&file, Access::Write).unwrap() {
                            assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0);
                            taken.fetch_add(1, Ordering::SeqCst);
                            holders.fetch_sub(1, Ordering::SeqCst);
                        }
                    }
                });
            }
        });
        assert!(taken.load(Ordering::SeqCst) > 0);
    }

    #[test]
    fn a_file_system_without_locks_is_named_as_the_cause() {
        let err = failed(Path::new("o"), io::Error::from_raw_os_error(libc::ENOLCK));
        assert_eq!(err.kind(), ErrorKind::Unsupported);
        assert!(err.to_string().contains("has no locks for image files"), "{err}");
    }
}
