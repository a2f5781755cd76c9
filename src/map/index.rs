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

/// Binary logarithm of the smallest section that a builder makes. On recorded boots sections of 16 blocks leave 0.06
/// probes a lookup (policy `bridge`; 0.10 with `paper`), those of 32 twice as many (`FORMAT.md`).
const SECTION_BITS_MIN: u32 = 4;

/// Sections per entry, at most: a map of few entries stays small.
const SECTIONS_PER_ENTRY: u64 = 256;

/// Sections that every map may have: 1 MiB of index, enough for images up to 8 GiB. A map of more entries than that may
/// have as many sections as entries; the index is then at most half as large as they are.
const SECTIONS_FREE: u64 = 1 << 17;

/// The smallest section size (as a power of two) that keeps within all limits; two sections are always allowed.
pub(super) fn section_bits_for(blocks: u64, entries: u64) -> u32 {
    let limit = entries.saturating_mul(SECTIONS_PER_ENTRY).min(entries.max(SECTIONS_FREE)).max(2);
    let fits = |&bits: &u32| section_count(blocks, bits) <= limit;
    (SECTION_BITS_MIN..SECTION_BITS_MAX).find(fits).unwrap_or(SECTION_BITS_MAX)
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
        assert_eq!(section_bits_for(0, 0), SECTION_BITS_MIN);
        assert_eq!(section_bits_for(1 << 32, 0), 31);
        assert_eq!(section_bits_for(1 << 19, 1_000), 4, "2 GiB");
        assert_eq!(section_bits_for(1 << 23, 90_000), 6, "32 GiB");
        assert_eq!(section_bits_for(1 << 28, 1_600_000), 8, "1 TiB");
        for (blocks, entries) in [(1u64, 1u64), (100, 7), (786_432, 20_000), (8_388_608, 90_000), (1 << 32, 1 << 31)] {
            let bits = section_bits_for(blocks, entries);
            let bytes = section_count(blocks, bits) * SECTION_BYTES as u64;
            assert!(bytes <= (entries * 8).max(1 << 20), "{blocks} blocks, {entries} entries");
            assert!(section_count(blocks, bits) <= (entries * 256).max(2));
        }
    }
}
