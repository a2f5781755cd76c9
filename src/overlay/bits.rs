//! The state of every subcluster in memory: one word a cluster, and which words changed since the last flush.

use super::layout::{CLUSTER, CLUSTER_BITS, SUB_BITS, SUBS, index};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

/// Where the content of a piece of the disk comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The base image (zeros past its end).
    Base,
    /// The overlay file, at `data_start` + guest offset.
    Data,
    /// It reads as zeros.
    Zero,
}

/// A piece of the disk that is in one state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Guest offset of its first byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Where its content comes from.
    pub state: State,
}

/// True if no subcluster of the word is both allocated and zero, which QEMU takes for corruption.
pub(super) fn is_valid(word: u64) -> bool {
    word & (word >> 32) & 0xffff_ffff == 0
}

/// How many subclusters from `sub` on, inside this word, are in `state`.
fn run_in_word(word: u64, sub: u64, state: State) -> u64 {
    let (data, zero) = (word & 0xffff_ffff, word >> 32);
    let same = match state {
        State::Data => data,
        State::Zero => zero,
        State::Base => !(data | zero) & 0xffff_ffff,
    };
    // The shift brings in zeros above bit 31, so the count ends with the word at the latest.
    u64::from((same >> sub).trailing_ones())
}

/// The state of one subcluster.
pub(super) fn state_in_word(word: u64, sub: u64) -> State {
    match (word >> sub & 1, word >> (sub + 32) & 1) {
        (0, 0) => State::Base,
        (0, _) => State::Zero,
        _ => State::Data,
    }
}

/// True if a range of bytes lies in one cluster and none of its subclusters is data or zero.
#[inline]
pub(super) fn is_base(words: &[AtomicU64], offset: u64, len: u64) -> bool {
    let (first, last) = (offset >> SUB_BITS, (offset + len.max(1) - 1) >> SUB_BITS);
    if first / SUBS != last / SUBS {
        return false;
    }
    let mask = (u64::MAX >> (63 - (last - first))) << (first % SUBS);
    let word = words[index(first / SUBS)].load(Ordering::Acquire);
    (word | word >> 32) & mask == 0
}

/// The words that hold a range of subclusters: index of the word, and its subclusters as a 32-bit mask.
fn words_of(subs: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    let clusters = if subs.is_empty() { 0..0 } else { subs.start / SUBS..subs.end.div_ceil(SUBS) };
    clusters.map(move |cluster| {
        let from = subs.start.saturating_sub(cluster * SUBS).min(SUBS);
        let to = (subs.end - cluster * SUBS).min(SUBS);
        (index(cluster), ((1u64 << to) - 1) & !((1u64 << from) - 1))
    })
}

/// Marks a range of subclusters as data; calls `changed` with each word that became another one.
pub(super) fn set_data(words: &[AtomicU64], subs: Range<u64>, changed: impl FnMut(usize)) {
    change(words, subs, |word, mask| (word | mask) & !(mask << 32), changed);
}

/// Marks a range of subclusters as reading zeros; calls `changed` with each word that became another one.
pub(super) fn set_zero(words: &[AtomicU64], subs: Range<u64>, changed: impl FnMut(usize)) {
    change(words, subs, |word, mask| (word | mask << 32) & !mask, changed);
}

/// Marks those subclusters of a range that are data as reading zeros and leaves the others; calls `changed` with each word
/// that became another one.
pub(super) fn data_to_zero(words: &[AtomicU64], subs: Range<u64>, changed: impl FnMut(usize)) {
    change(words, subs, |word, mask| (word & !mask) | (word & mask) << 32, changed);
}

/// The one place that changes words: a compare-and-swap that sets one bit of a subcluster and clears its twin.
/// Release: who sees the bit sees the data that was written before it.
fn change(words: &[AtomicU64], subs: Range<u64>, f: impl Fn(u64, u64) -> u64, mut changed: impl FnMut(usize)) {
    for (i, mask) in words_of(subs) {
        let step = |word| Some(f(word, mask)).filter(|new| *new != word);
        if words[i].fetch_update(Ordering::AcqRel, Ordering::Acquire, step).is_ok() {
            changed(i);
        }
    }
}

/// Runs of equal state that cover a range of the disk, neighbours merged. Each word is loaded once.
#[derive(Debug)]
pub struct Runs<'a> {
    words: &'a [AtomicU64],
    at: u64,
    end: u64,
    /// The word of the cluster at `at`, once loaded.
    word: Option<u64>,
}

impl<'a> Runs<'a> {
    pub(super) fn new(words: &'a [AtomicU64], range: Range<u64>) -> Runs<'a> {
        Runs { words, at: range.start, end: range.end, word: None }
    }
}

impl Iterator for Runs<'_> {
    type Item = Run;

    fn next(&mut self) -> Option<Run> {
        let offset = self.at;
        let mut state = None;
        while self.at < self.end {
            let word = match self.word {
                Some(word) => word,
                None => *self.word.insert(self.words[index(self.at >> CLUSTER_BITS)].load(Ordering::Acquire)),
            };
            let sub = (self.at >> SUB_BITS) % SUBS;
            let state = *state.get_or_insert_with(|| state_in_word(word, sub));
            let count = run_in_word(word, sub, state);
            if count == 0 {
                break;
            }
            self.at = (((self.at >> SUB_BITS) + count) << SUB_BITS).min(self.end);
            if !self.at.is_multiple_of(CLUSTER) {
                break;
            }
            self.word = None;
        }
        Some(Run { offset, len: self.at - offset, state: state? })
    }
}

/// Which words changed since the last flush: a bit a word, and a summary with a bit for 64 of those, so that a flush of a
/// large disk with few changes looks at little.
#[derive(Debug)]
pub(super) struct Dirty {
    leaves: Box<[AtomicU64]>,
    summary: Box<[AtomicU64]>,
}

fn zeroed(len: usize) -> Box<[AtomicU64]> {
    (0..len).map(|_| AtomicU64::new(0)).collect()
}

impl Dirty {
    pub fn new(words: usize) -> Dirty {
        let leaves = words.div_ceil(64);
        Dirty { leaves: zeroed(leaves), summary: zeroed(leaves.div_ceil(64)) }
    }

    /// Marks a word, after it was changed. Both steps are always taken: a mark that relied on somebody else to set the
    /// summary could be missed by a flush that starts before that somebody gets to it.
    pub fn mark(&self, word: usize) {
        let leaf = word / 64;
        self.leaves[leaf].fetch_or(1 << (word % 64), Ordering::AcqRel);
        self.summary[leaf / 64].fetch_or(1 << (leaf % 64), Ordering::AcqRel);
    }

    /// Takes the marks of the words from `*from` on, in order and about `max` of them; `*from` moves on. Whoever marked
    /// before this call is seen: the swap of the summary reads what `mark` wrote last.
    pub fn take(&self, from: &mut usize, max: usize, mut taken: impl FnMut(usize)) {
        let mut count = 0;
        while *from < self.summary.len() && count < max {
            for leaf in ones(self.summary[*from].swap(0, Ordering::AcqRel)) {
                let leaf = *from * 64 + leaf;
                for bit in ones(self.leaves[leaf].swap(0, Ordering::AcqRel)) {
                    taken(leaf * 64 + bit);
                    count += 1;
                }
            }
            *from += 1;
        }
    }

    /// True if `take` has been through everything.
    pub fn is_end(&self, from: usize) -> bool {
        from >= self.summary.len()
    }
}

/// Positions of the bits that are set.
fn ones(mut bits: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        (bits != 0).then(|| {
            let at = bits.trailing_zeros() as usize;
            bits &= bits - 1;
            at
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_base_as_its_runs_say() {
        for changed in 0..2 * SUBS {
            for zero in [false, true] {
                let words = [AtomicU64::new(0), AtomicU64::new(0)];
                match zero {
                    true => set_zero(&words, changed..changed + 1, |_| ()),
                    false => set_data(&words, changed..changed + 1, |_| ()),
                }
                for first in 0..2 * SUBS {
                    for end in first + 1..=2 * SUBS {
                        let (from, to) = ((first << SUB_BITS) + 512, (end << SUB_BITS) - 512);
                        let runs = Runs::new(&words, from..to).all(|run| run.state == State::Base);
                        let one = first / SUBS == (end - 1) / SUBS;
                        assert_eq!(is_base(&words, from, to - from), runs && one, "{changed} {first}..{end}");
                    }
                }
            }
        }
    }
    use proptest::prelude::*;

    fn word_strategy() -> impl Strategy<Value = u64> {
        prop_oneof![
            Just(0),
            Just(0xffff_ffff),
            Just(0xffff_ffff << 32),
            any::<u64>().prop_map(|w| w & !(w << 32)),
            any::<u64>().prop_map(|w| (w & !(w << 32)) & 0xffff_0000_00ff_ff00),
        ]
    }

    proptest! {
        #[test]
        fn runs_equal_a_walk_over_sectors(
            words in prop::collection::vec(word_strategy(), 1..6),
            a in 0u64..=6 * 128, b in 0u64..=6 * 128,
        ) {
            let max = words.len() as u64 * 128;
            let (from, to) = (a.min(b).min(max), a.max(b).min(max));
            let atomics: Vec<AtomicU64> = words.iter().map(|w| AtomicU64::new(*w)).collect();
            let runs: Vec<Run> = Runs::new(&atomics, from * 512..to * 512).collect();
            let mut sectors = Vec::new();
            for pair in runs.windows(2) {
                prop_assert_eq!(pair[0].offset + pair[0].len, pair[1].offset);
                prop_assert_ne!(pair[0].state, pair[1].state);
            }
            for run in &runs {
                prop_assert!(run.len > 0 && run.len % 512 == 0);
                sectors.extend(std::iter::repeat_n(run.state, index(run.len / 512)));
            }
            let want: Vec<State> =
                (from..to).map(|s| state_in_word(words[index(s / 128)], s / 4 % 32)).collect();
            prop_assert_eq!(sectors, want);
            prop_assert_eq!(runs.first().map_or(from * 512, |r| r.offset), from * 512);
        }

        #[test]
        fn changes_touch_their_range_only_and_keep_words_valid(
            words in prop::collection::vec(word_strategy(), 3), a in 0u64..=96, b in 0u64..=96, zero: bool,
        ) {
            let range = a.min(b)..a.max(b);
            let atomics: Vec<AtomicU64> = words.iter().map(|w| AtomicU64::new(*w)).collect();
            let mut changed = Vec::new();
            if zero {
                set_zero(&atomics, range.clone(), |i| changed.push(i));
            } else {
                set_data(&atomics, range.clone(), |i| changed.push(i));
            }
            let want = if zero { State::Zero } else { State::Data };
            for sub in 0..96u64 {
                let i = index(sub / 32);
                let now = atomics[i].load(Ordering::Relaxed);
                prop_assert!(is_valid(now));
                prop_assert_eq!(changed.contains(&i), now != words[i]);
                let before = state_in_word(words[i], sub % 32);
                prop_assert_eq!(state_in_word(now, sub % 32), if range.contains(&sub) { want } else { before });
            }
        }

        #[test]
        fn every_mark_is_taken_once(marks in prop::collection::btree_set(0usize..20_000, 0..200), max in 1usize..50) {
            let dirty = Dirty::new(20_000);
            marks.iter().for_each(|m| dirty.mark(*m));
            let (mut from, mut got) = (0, Vec::new());
            while !dirty.is_end(from) {
                dirty.take(&mut from, max, |w| got.push(w));
            }
            prop_assert_eq!(got, marks.into_iter().collect::<Vec<_>>());
        }
    }
}
