//! Work of numbered pieces on several threads, in order at the end, and never more than so many at once.

use std::collections::BTreeMap;
use std::sync::{Condvar, Mutex, PoisonError};

/// What came out of order, until it is its turn.
#[derive(Debug)]
pub struct Reorder<T> {
    next: u64,
    early: BTreeMap<u64, T>,
}

impl<T> Default for Reorder<T> {
    fn default() -> Self {
        Reorder { next: 0, early: BTreeMap::new() }
    }
}

impl<T> Reorder<T> {
    /// Takes piece number `number`; gives, in order, all whose turn it is now.
    pub fn push(&mut self, number: u64, piece: T) -> impl Iterator<Item = T> {
        self.early.insert(number, piece);
        std::iter::from_fn(|| {
            let piece = self.early.remove(&self.next)?;
            self.next += 1;
            Some(piece)
        })
    }
}

/// So many pieces may be under way.
#[derive(Debug)]
pub struct Permits {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    free: usize,
    closed: bool,
}

impl Permits {
    /// This many.
    pub fn new(free: usize) -> Permits {
        Permits { state: Mutex::new(State { free, closed: false }), changed: Condvar::new() }
    }

    /// Waits for one. False: there will be none any more.
    pub fn take(&self) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.free == 0 && !state.closed {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if !state.closed {
            state.free -= 1;
        }
        !state.closed
    }

    /// Gives one back.
    pub fn give(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).free += 1;
        self.changed.notify_one();
    }

    /// Whoever waits, or comes, gets none.
    pub fn close(&self) {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_come_out_in_order() {
        let mut reorder = Reorder::default();
        let out: Vec<Vec<u64>> = [2, 0, 1, 5, 3, 4].map(|n| reorder.push(n, n).collect()).into();
        assert_eq!(out, [vec![], vec![0], vec![1, 2], vec![], vec![3], vec![4, 5]]);
    }

    #[test]
    fn who_waits_for_a_permit_gets_it_or_is_told() {
        let permits = Permits::new(1);
        assert!(permits.take());
        std::thread::scope(|scope| {
            let one = scope.spawn(|| permits.take());
            permits.give();
            assert!(one.join().unwrap());
            let two = scope.spawn(|| permits.take());
            permits.close();
            assert!(!two.join().unwrap());
        });
        permits.give();
        assert!(!permits.take());
    }
}
