//! Several sorted sources as one.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Merges sorted sources: yields each item with the index of its source, in order of item, then of source. Memory is
/// one item a source. The first error ends the merge.
pub fn merge<T, E, I>(sources: Vec<I>) -> impl Iterator<Item = Result<(T, usize), E>>
where
    T: Ord,
    I: Iterator<Item = Result<T, E>>,
{
    let mut merge = Merge { heap: BinaryHeap::with_capacity(sources.len()), sources, next: 0, failed: false };
    std::iter::from_fn(move || merge.step().transpose())
}

struct Merge<T, I> {
    sources: Vec<I>,
    heap: BinaryHeap<Reverse<(T, usize)>>,
    /// Sources below this one are in the heap, or at their end.
    next: usize,
    failed: bool,
}

impl<T: Ord, E, I: Iterator<Item = Result<T, E>>> Merge<T, I> {
    fn step(&mut self) -> Result<Option<(T, usize)>, E> {
        while !self.failed && self.next < self.sources.len() {
            self.next += 1;
            self.refill(self.next - 1)?;
        }
        if self.failed {
            return Ok(None);
        }
        let Some(Reverse((item, source))) = self.heap.pop() else { return Ok(None) };
        self.refill(source)?;
        Ok(Some((item, source)))
    }

    fn refill(&mut self, source: usize) -> Result<(), E> {
        match self.sources.get_mut(source).and_then(Iterator::next) {
            Some(Ok(item)) => self.heap.push(Reverse((item, source))),
            Some(Err(e)) => {
                self.failed = true;
                return Err(e);
            }
            None => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_merge_is_a_sort(mut lists in prop::collection::vec(prop::collection::vec(0u8..20, 0..20), 0..6)) {
            lists.iter_mut().for_each(|l| l.sort());
            let mut want: Vec<(u8, usize)> =
                lists.iter().enumerate().flat_map(|(i, l)| l.iter().map(move |&x| (x, i))).collect();
            want.sort();
            let sources: Vec<_> = lists.into_iter().map(|l| l.into_iter().map(Ok::<u8, ()>)).collect();
            let got: Vec<_> = merge(sources).map(Result::unwrap).collect();
            prop_assert_eq!(got, want);
        }
    }

    #[test]
    fn an_error_ends_it() {
        let sources = vec![vec![Ok(1), Err("bad"), Ok(3)].into_iter(), vec![Ok(2)].into_iter()];
        let got: Vec<_> = merge(sources).collect();
        assert_eq!(got, [Err("bad")]);
    }
}
