//! The place of a thread's reads in the disk's queue.

use std::io;

/// `IOPRIO_WHO_PROCESS` of linux/ioprio.h; with the number 0 it means the calling thread.
const WHO_THREAD: libc::c_int = 1;

/// Class best-effort (2), level 7 of 0 to 7.
const LAST: libc::c_int = 2 << 13 | 7;

/// From here on this thread's reads go behind those of others, where the disk's scheduler looks at that (bfq, mq-deadline).
///
/// Not the class idle: somebody may come to wait for a page that is being read here, and with it until the disk has nothing
/// else to do, which on a busy host is never.
pub fn read_last() -> io::Result<()> {
    // SAFETY: a plain system call without pointers.
    match unsafe { libc::syscall(libc::SYS_ioprio_set, WHO_THREAD, 0, LAST) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_it_for_this_thread_alone() {
        // SAFETY: a plain system call without pointers.
        let now = || unsafe { libc::syscall(libc::SYS_ioprio_get, WHO_THREAD, 0) };
        let before = now();
        let inside = std::thread::spawn(move || {
            read_last().unwrap();
            now()
        });
        assert_eq!(inside.join().unwrap(), i64::from(LAST));
        assert_eq!(now(), before);
    }
}
