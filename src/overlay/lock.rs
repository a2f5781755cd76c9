//! Range locks over subclusters: whoever changes a subcluster holds it. Reads take none (see `write.rs` for why).

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Exclusive locks on ranges, granted in the order they were asked for: a request waits for every *earlier* overlapping
/// one, held or waiting, so that a large write-zeroes is not starved by a stream of small writes.
///
/// The list is as long as there are requests in flight (threads, not queue depth), so it is searched from end to end. The
/// mutex is held for that search only, never across I/O.
#[derive(Debug, Default)]
pub(super) struct RangeLocks {
    list: Mutex<List>,
    released: Condvar,
}

#[derive(Debug, Default)]
struct List {
    next_ticket: u64,
    waiting: usize,
    /// In order of tickets.
    entries: Vec<(u64, Range<u64>)>,
}

impl List {
    fn push(&mut self, range: Range<u64>) -> u64 {
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.entries.push((ticket, range));
        ticket
    }

    fn overlaps(&self, range: &Range<u64>, before_ticket: u64) -> bool {
        self.entries.iter().any(|(t, r)| *t < before_ticket && r.start < range.end && range.start < r.end)
    }
}

/// A held range; dropping it lets the next one in.
#[derive(Debug)]
pub(super) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    ticket: u64,
}

impl RangeLocks {
    fn list(&self) -> MutexGuard<'_, List> {
        // The list is valid between any two statements, so a panic elsewhere leaves nothing half done.
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the range if nobody holds or waits for a part of it.
    pub fn try_lock(&self, range: Range<u64>) -> Option<RangeGuard<'_>> {
        let mut list = self.list();
        if list.overlaps(&range, u64::MAX) {
            return None;
        }
        let ticket = list.push(range);
        Some(RangeGuard { locks: self, ticket })
    }

    /// Takes the range, after everybody who came earlier. A thread that holds a range must not ask for another.
    pub fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        let mut list = self.list();
        let ticket = list.push(range.clone());
        while list.overlaps(&range, ticket) {
            list.waiting += 1;
            list = self.released.wait(list).unwrap_or_else(PoisonError::into_inner);
            list.waiting -= 1;
        }
        RangeGuard { locks: self, ticket }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut list = self.locks.list();
        // `remove`, not `swap_remove`: the order is the queue.
        if let Some(at) = list.entries.iter().position(|(t, _)| *t == self.ticket) {
            list.entries.remove(at);
        }
        if list.waiting > 0 {
            self.locks.released.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::index;
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[test]
    fn neighbours_do_not_exclude_each_other_and_overlaps_do() {
        let locks = RangeLocks::default();
        let a = locks.try_lock(0..4).unwrap();
        let _b = locks.try_lock(4..8).unwrap();
        assert!(locks.try_lock(3..5).is_none());
        drop(a);
        assert!(locks.try_lock(3..5).is_none());
        assert!(locks.try_lock(0..4).is_some());
    }

    #[test]
    fn a_waiting_large_range_comes_before_later_small_ones() {
        let locks = RangeLocks::default();
        let held = locks.try_lock(5..6).unwrap();
        std::thread::scope(|s| {
            let large = s.spawn(|| drop(locks.lock(0..100)));
            while locks.list().waiting == 0 {
                std::thread::yield_now();
            }
            assert!(locks.try_lock(50..51).is_none(), "would overtake the waiting one");
            drop(held);
            large.join().unwrap();
        });
        assert!(locks.try_lock(50..51).is_some());
    }

    #[test]
    fn never_two_holders_of_one_subcluster() {
        let locks = RangeLocks::default();
        let holders: Vec<AtomicU64> = (0..8).map(|_| AtomicU64::new(0)).collect();
        std::thread::scope(|s| {
            for t in 0..4u64 {
                let (locks, holders) = (&locks, &holders);
                s.spawn(move || {
                    for i in 0..2000u64 {
                        let start = (i * 7 + t * 3) % 8;
                        let range = start..(start + 1 + i % 3).min(8);
                        let guard =
                            if i % 5 == 0 { locks.try_lock(range.clone()) } else { Some(locks.lock(range.clone())) };
                        if guard.is_some() {
                            for n in range.clone() {
                                assert_eq!(holders[index(n)].fetch_add(1, Ordering::SeqCst), 0);
                            }
                            for n in range {
                                holders[index(n)].fetch_sub(1, Ordering::SeqCst);
                            }
                        }
                    }
                });
            }
        });
        assert!(locks.list().entries.is_empty());
    }
}
