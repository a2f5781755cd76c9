//! What becomes of a request that the host's disk refuses: the guest hears of it, or waits until there is room again.
//!
//! vhost-user has no `werror` and no `rerror`: QEMU cannot pause the VM, so the policy is the backend's.

use std::io;
use std::time::{Duration, Instant};

/// The first pause before another try, and the longest: each is twice the one before.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// What to do when a read, a write, a discard or a write-zeroes fails with a full disk or an I/O error.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnError {
    /// Tell the guest (VIRTIO_BLK_S_IOERR).
    #[default]
    Report,
    /// Keep the request and try again until it works; the guest waits.
    Retry,
}

impl OnError {
    /// As the command line and the control socket name it.
    pub fn name(self) -> &'static str {
        match self {
            OnError::Report => "report",
            OnError::Retry => "retry",
        }
    }

    /// True when a request that failed like this is worth another try: no room (also by quota), or an error of the disk.
    /// Never asked for an fsync: Linux calls the pages clean after one that failed, and a second one would say nothing.
    pub fn tries_again(self, error: &io::Error) -> bool {
        self == OnError::Retry && matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EIO))
    }
}

/// When the next try is due.
#[derive(Clone, Copy, Debug)]
pub struct Pause {
    length: Duration,
    due: Instant,
}

impl Pause {
    /// The pause after the first failure.
    pub fn first(now: Instant) -> Self {
        Pause { length: PAUSE_MIN, due: now + PAUSE_MIN }
    }

    /// The pause after one more failure.
    #[must_use]
    pub fn next(self, now: Instant) -> Self {
        let length = (self.length * 2).min(PAUSE_MAX);
        Pause { length, due: now + length }
    }

    /// The moment of the next try.
    pub fn due(&self) -> Instant {
        self.due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_full_or_failing_disk_is_tried_again() {
        let tries = |policy: OnError, errno| policy.tries_again(&io::Error::from_raw_os_error(errno));
        for errno in [libc::ENOSPC, libc::EDQUOT, libc::EIO] {
            assert!(tries(OnError::Retry, errno));
            assert!(!tries(OnError::Report, errno));
        }
        for errno in [libc::EFAULT, libc::EROFS, libc::EBADF, libc::EFBIG] {
            assert!(!tries(OnError::Retry, errno));
        }
        assert!(!OnError::Retry.tries_again(&io::ErrorKind::UnexpectedEof.into()), "a base that is too short stays so");
    }

    #[test]
    fn pauses_grow_to_a_second() {
        let now = Instant::now();
        let mut pause = Pause::first(now);
        let lengths: Vec<u128> = (0..6)
            .map(|_| {
                let length = (pause.due() - now).as_millis();
                pause = pause.next(now);
                length
            })
            .collect();
        assert_eq!(lengths, [100, 200, 400, 800, 1000, 1000]);
    }
}
