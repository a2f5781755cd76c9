//! How long a queue looks for more work before it sleeps.
//!
//! To sleep and be woken costs the guest a system call and the queue some ten microseconds, as much as a hundred reads from
//! the page cache take. To look costs a processor. So a queue looks for as long as a wake-up takes, and only while that pays:
//! when work keeps coming later than that, the time is halved each time, down to nothing; as soon as a sleep turns out to
//! have been that short, it is whole again. An idle queue does not look at all.

use std::time::{Duration, Instant};

/// The longest look.
const SPIN_MAX: Duration = Duration::from_micros(50);

/// Shorter ones are none.
const SPIN_MIN: Duration = Duration::from_micros(6);

/// Looks at the ring between two looks at the clock.
const LOOKS: u32 = 16;

/// Belongs to one queue.
#[derive(Debug)]
pub struct Spin {
    limit: Duration,
    max: Duration,
    /// When there was nothing left to do.
    since: Option<Instant>,
}

impl Default for Spin {
    /// Looks only where there is a second processor: what is waited for must come from somewhere.
    fn default() -> Self {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        let max = if processors > 1 { SPIN_MAX } else { Duration::ZERO };
        Spin { limit: max, max, since: None }
    }
}

impl Spin {
    /// Looks until `found` says so; false when the time is up.
    pub fn look(&mut self, mut found: impl FnMut() -> bool) -> bool {
        if self.max.is_zero() {
            return false;
        }
        let since = Instant::now();
        self.since = Some(since);
        if self.limit.is_zero() {
            return false;
        }
        loop {
            for _ in 0..LOOKS {
                if found() {
                    self.since = None;
                    return true;
                }
                std::hint::spin_loop();
            }
            if since.elapsed() >= self.limit {
                self.limit = if self.limit < SPIN_MIN { Duration::ZERO } else { self.limit / 2 };
                return false;
            }
        }
    }

    /// The queue slept after [`Spin::look`], and there is work now.
    pub fn woken(&mut self) {
        if self.since.take().is_some_and(|since| since.elapsed() < self.max) {
            self.limit = self.max;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_queue_stops_looking_and_a_busy_one_begins_again() {
        let mut spin = Spin { limit: SPIN_MAX, max: SPIN_MAX, since: None };
        assert!(spin.look(|| true));
        let mut looks = 0;
        while !spin.limit.is_zero() {
            assert!(!spin.look(|| false));
            std::thread::sleep(SPIN_MAX);
            spin.woken();
            looks += 1;
            assert!(looks < 10);
        }
        let mut asked = 0;
        assert!(!spin.look(|| {
            asked += 1;
            true
        }));
        assert_eq!(asked, 0, "it does not even ask");
        // As if it had been woken at once.
        spin.max = Duration::from_secs(3600);
        spin.woken();
        assert_eq!(spin.limit, spin.max);
    }

    #[test]
    fn without_a_second_processor_it_never_looks() {
        let mut spin = Spin { limit: Duration::ZERO, max: Duration::ZERO, since: None };
        assert!(!spin.look(|| true));
        spin.woken();
        assert!(spin.limit.is_zero());
    }
}
