//! One range entry, 16 bytes: the paper's merged entry {offset_source, length, ID_target, offset_target}
//! (section 3.3).

use std::ops::Range;

/// Bytes of an encoded entry.
pub(super) const ENTRY_BYTES: usize = 16;

/// A run of blocks that is contiguous in the source and in one target image. All numbers count 4 KiB blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// First block of the run in the source image.
    pub source: u32,
    /// Blocks of the run, at least 1.
    pub len: u32,
    /// Index into the map's table of targets (not an image ID).
    pub target: u32,
    /// First block of the run in the target image.
    pub block: u32,
}

impl Entry {
    /// The block after the run in the source image; up to 2^32, hence 64 bits wide.
    pub fn source_end(&self) -> u64 {
        u64::from(self.source) + u64::from(self.len)
    }

    /// The block after the run in the target image.
    pub fn block_end(&self) -> u64 {
        u64::from(self.block) + u64::from(self.len)
    }

    pub(super) fn encode(&self) -> [u8; ENTRY_BYTES] {
        let mut raw = [0u8; ENTRY_BYTES];
        raw[0..4].copy_from_slice(&self.source.to_le_bytes());
        raw[4..8].copy_from_slice(&self.len.to_le_bytes());
        raw[8..12].copy_from_slice(&self.target.to_le_bytes());
        raw[12..16].copy_from_slice(&self.block.to_le_bytes());
        raw
    }

    fn decode(raw: &[u8; ENTRY_BYTES]) -> Entry {
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = *raw;
        Entry {
            source: u32::from_le_bytes([a, b, c, d]),
            len: u32::from_le_bytes([e, f, g, h]),
            target: u32::from_le_bytes([i, j, k, l]),
            block: u32::from_le_bytes([m, n, o, p]),
        }
    }
}

/// The encoded entries, read where they lie. Indexing past the end panics: a wrong answer would be "zero block".
#[derive(Clone, Copy, Debug)]
pub(super) struct Table<'a>(&'a [[u8; ENTRY_BYTES]]);

impl<'a> Table<'a> {
    /// All whole entries in `bytes`.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Table(bytes.as_chunks().0)
    }

    pub(super) fn len(self) -> usize {
        self.0.len()
    }

    #[inline]
    pub(super) fn get(self, i: usize) -> Entry {
        Entry::decode(&self.0[i])
    }

    pub(super) fn iter(self) -> impl DoubleEndedIterator<Item = Entry> + ExactSizeIterator + 'a {
        self.0.iter().map(Entry::decode)
    }

    /// Index of the last entry of the non-empty `range` that starts at or below `block`, else the first of the
    /// range. It is the only one that can cover the block. Looks at `depth(range.len())` entries.
    #[inline]
    pub(super) fn search(self, range: Range<usize>, block: u32) -> usize {
        let part = &self.0[range.clone()];
        let (mut low, mut len) = (0, part.len());
        while len > 1 {
            let half = len / 2;
            let [a, b, c, d, ..] = part[low + half];
            // Both outcomes keep `len - half` candidates, so the compiler needs no branch to mispredict.
            low = if u32::from_le_bytes([a, b, c, d]) <= block { low + half } else { low };
            len -= half;
        }
        range.start + low
    }
}

/// Probes that a binary search among `candidates` sorted entries makes before one candidate is left, which is the
/// paper's search depth (figure 10): ⌈log2⌉, 0 for one candidate.
pub(super) fn depth(candidates: usize) -> u32 {
    candidates.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn search_finds_the_last_start_at_or_below() {
        for count in 1..40u32 {
            let bytes: Vec<u8> =
                (0..count).flat_map(|i| Entry { source: 3 * i + 2, len: 1, target: 0, block: 0 }.encode()).collect();
            let table = Table::new(&bytes);
            let count = table.len();
            for first in 0..count {
                for block in 0..130 {
                    let want = (first..count).rev().find(|&i| table.get(i).source <= block).unwrap_or(first);
                    assert_eq!(table.search(first..count, block), want);
                }
            }
        }
    }

    #[test]
    fn depth_counts_halvings() {
        assert_eq!([1, 2, 3, 4, 5, 370_000].map(depth), [0, 1, 2, 2, 3, 19]);
    }
}
