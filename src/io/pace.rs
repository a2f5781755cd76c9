//! Keeps work at a rate, so that it leaves the disk to others.

use std::num::NonZeroU64;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// What may be made up for after a pause: a longer one is not saved.
const BURST: Duration = Duration::from_millis(100);
/// How often a wait looks whether it is to end early.
const SLICE: Duration = Duration::from_millis(50);

/// A rate that several threads share.
#[derive(Debug)]
pub struct Pace {
    rate: NonZeroU64,
    start: Instant,
    bucket: Mutex<Bucket>,
}

/// A token bucket, kept as the time at which it has room for nothing more than the next token.
#[derive(Debug, Default)]
struct Bucket {
    next: Duration,
}

impl Bucket {
    /// Takes `bytes` out at time `now`: says when the work on them may begin.
    fn take(&mut self, now: Duration, bytes: u64, rate: NonZeroU64) -> Duration {
        let begin = self.next.max(now.saturating_sub(BURST));
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(rate.get());
        self.next = begin.saturating_add(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)));
        begin
    }
}

impl Pace {
    /// So many bytes a second.
    pub fn new(rate: NonZeroU64) -> Pace {
        Pace { rate, start: Instant::now(), bucket: Mutex::default() }
    }

    /// Waits until `bytes` more may be worked on, or `stop` is set.
    pub fn take(&self, bytes: u64, stop: &AtomicBool) {
        let begin = {
            // A worker that panicked is no reason to go faster.
            let mut bucket = self.bucket.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
            bucket.take(self.start.elapsed(), bytes, self.rate)
        };
        while !stop.load(Ordering::Relaxed) {
            match begin.saturating_sub(self.start.elapsed()) {
                Duration::ZERO => break,
                left => std::thread::sleep(left.min(SLICE)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However the calls come, what was begun by a time is no more than the rate allows, but for the burst and for
        /// the last piece, which is only begun; and nobody waits while there is something left.
        #[test]
        fn never_more_than_the_rate_and_the_burst(
            rate in 1_000u64..1_000_000_000,
            calls in prop::collection::vec((0u64..300_000_000, 1u64..4_000_000), 1..60),
        ) {
            let rate = NonZeroU64::new(rate).unwrap();
            let seconds = |bytes: u64| Duration::from_nanos((u128::from(bytes) * 1_000_000_000 / u128::from(rate.get())) as u64);
            let (mut bucket, mut now, mut sum) = (Bucket::default(), Duration::ZERO, 0);
            for (pause, bytes) in calls {
                now += Duration::from_nanos(pause);
                let begin = bucket.take(now, bytes, rate);
                prop_assert!(seconds(sum) <= begin + BURST + Duration::from_micros(1), "{sum} bytes before {begin:?}");
                now = now.max(begin);
                sum += bytes;
            }
        }
    }

    #[test]
    fn a_stop_ends_the_wait() {
        let pace = Pace::new(NonZeroU64::MIN);
        pace.take(1 << 30, &AtomicBool::new(false));
        let began = Instant::now();
        pace.take(1, &AtomicBool::new(true));
        assert!(began.elapsed() < Duration::from_secs(5));
    }
}
