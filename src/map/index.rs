//! The section index (paper, section 3.3): the image is cut into equal sections, and for each one the index holds
//! which entries can cover a block of it.
//!
//! ```text
//!  entries       [--0--]  [1][----------2----------]      [3]
//!  sections  |       0       |      1      |      2      |      3      |
//!  {first, end}    {0,3}          {2,3}         {2,4}         {4,4}
//! ```

use super::entry::Table;
use std::ops::Range;

/// Bytes of an index entry: {first, end}, 32 bits each.
pub(super) const SECTION_BYTES: usize = 8;

/// Binary logarithm of the largest section: one bit less than a block number, so that shifts stay defined.
pub(super) const SECTION_BITS_MAX: u32 = 31;

/// Sections per entry, at most. Entries lie in clusters, so this leaves most sections empty, and one or two entries in
/// the others: the index takes as many bytes as the entries and saves all but 0.5 to 0.7 probes (`FORMAT.md`).
const SECTIONS_PER_ENTRY: u64 = 2;

/// Sections, at most: 512 KiB of index.
const SECTIONS_MAX: u64 = 1 << 16;

/// The smallest section size (as a power of two) that keeps within both limits; two sections are always allowed.
pub(super) fn section_bits_for(blocks: u64, entries: u64) -> u32 {
    let limit = (entries * SECTIONS_PER_ENTRY).clamp(2, SECTIONS_MAX);
    (0..SECTION_BITS_MAX).find(|&bits| section_count(blocks, bits) <= limit).unwrap_or(SECTION_BITS_MAX)
}

/// Sections of `2^bits` blocks that cover `blocks`.
pub(super) fn section_count(blocks: u64, bits: u32) -> u64 {
    blocks.div_ceil(1 << bits)
}

/// What the index must say for each of `count` sections, in order. `first` is the first entry that ends behind the
/// start of the section, `end` the first entry that starts behind its last block; both are at most the number of
/// entries and never decrease. One pass over entries and sections together.
pub(super) fn sections(table: Table<'_>, bits: u32, count: u64) -> impl Iterator<Item = (u32, u32)> {
    let (mut first, mut end) = (0, 0);
    (0..count).map(move |section| {
        let (start, stop) = (section << bits, (section + 1) << bits);
        while first < table.len() && table.get(first).source_end() <= start {
            first += 1;
        }
        while end < table.len() && u64::from(table.get(end).source) < stop {
            end += 1;
        }
        (narrow(first), narrow(end))
    })
}

/// The number of entries fits 32 bits: the format says so, and `build` and `new` check it before they come here.
fn narrow(i: usize) -> u32 {
    u32::try_from(i).unwrap_or(u32::MAX)
}

/// The encoded index, read where it lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Index<'a>(&'a [[u8; SECTION_BYTES]]);

impl<'a> Index<'a> {
    /// All whole index entries in `bytes`.
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Index(bytes.as_chunks().0)
    }

    /// The entries that can cover a block of `section`.
    #[inline]
    pub(super) fn get(self, section: u32) -> Range<usize> {
        let [a, b, c, d, e, f, g, h] = self.0[section as usize];
        u32::from_le_bytes([a, b, c, d]) as usize..u32::from_le_bytes([e, f, g, h]) as usize
    }

    pub(super) fn iter(self) -> impl Iterator<Item = (u32, u32)> + 'a {
        self.0
            .iter()
            .map(|&[a, b, c, d, e, f, g, h]| (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Entry;
    use super::*;

    #[test]
    fn the_picture_above() {
        let entry = |source, len| Entry { source, len, target: 0, block: 0 }.encode();
        let bytes: Vec<u8> = [entry(4, 6), entry(13, 2), entry(15, 30), entry(46, 2)].concat();
        let got: Vec<_> = sections(Table::new(&bytes), 4, 4).collect();
        assert_eq!(got, [(0, 3), (2, 3), (2, 4), (4, 4)]);
    }

    #[test]
    fn few_entries_make_few_sections() {
        assert_eq!(section_bits_for(0, 0), 0);
        assert_eq!(section_bits_for(1 << 32, 0), 31);
        assert_eq!(section_bits_for(1 << 23, 90_000), 7);
        for (blocks, entries) in [(1u64, 1u64), (100, 7), (786_432, 20_000), (8_388_608, 90_000), (1 << 32, 1 << 31)] {
            let (bits, limit) = (section_bits_for(blocks, entries), (entries * 2).clamp(2, 65536));
            assert!(section_count(blocks, bits) <= limit);
            assert!(bits == 0 || section_count(blocks, bits - 1) > limit);
        }
    }
}
