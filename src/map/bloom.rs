//! The Bloom filter over non-zero blocks (paper, section 3.3): tells most zero blocks without a search.
//!
//! Its size and number of hashes come from crate `bloomfilter`; the bits are ours, because that crate keeps its bits
//! in a `Vec` of its own, behind SipHash, and cannot be served from a shared mapping. A key is a group of `2^bits`
//! blocks. All bits of a key lie in one line of 64 bytes, so that a probe costs one cache miss and not seven.

use super::entry::Table;
use bloomfilter::Bloom as Formulas;

/// Bytes of a line.
pub(super) const LINE_BYTES: usize = 64;
const LINE_BITS: u32 = 512;

/// Most hashes that a reader accepts; the best number for 16 is a rate of false positives of 0.002 %.
pub(super) const HASHES_MAX: u32 = 16;

/// Binary logarithm of the largest group.
pub(super) const GROUP_BITS_MAX: u32 = 31;

/// Wanted rate of false positives.
const FALSE_POSITIVES: f64 = 0.01;

/// Keys above which blocks are grouped, so that the filter stays below 320 KiB for any image.
pub(super) const KEYS_MAX: u64 = 1 << 18;

/// Keys of the smallest filter: the format wants one line at least, and the largest image has two groups of the largest
/// size. It says "perhaps" to nearly everything.
pub(super) const KEYS_LEAST: u64 = 2;

/// Size of a filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Shape {
    /// Binary logarithm of the blocks of a group.
    pub(super) group_bits: u32,
    /// Groups with a non-zero block.
    pub(super) keys: u32,
    /// Lines of 64 bytes.
    pub(super) lines: u32,
    /// Bits that are set for each key.
    pub(super) hashes: u32,
}

impl Shape {
    /// Bits of the filter.
    pub(super) fn bits(&self) -> u64 {
        u64::from(self.lines) * u64::from(LINE_BITS)
    }
}

/// The shape for these entries: the smallest groups that make at most `keys_max` keys.
pub(super) fn shape_for(table: Table<'_>, keys_max: u64) -> Shape {
    let (group_bits, keys) = (0..=GROUP_BITS_MAX)
        .map(|bits| (bits, key_count(table, bits)))
        .find(|&(_, keys)| keys <= keys_max)
        .unwrap_or((GROUP_BITS_MAX, 2)); // 2^32 blocks make two groups of 2^31
    // At most 2^18 from here on, so the conversions lose nothing.
    let keys = u32::try_from(keys).unwrap_or(u32::MAX);
    let items = keys.max(1) as usize;
    let bytes = Formulas::<u32>::compute_bitmap_size(items, FALSE_POSITIVES);
    let hashes = Formulas::<u32>::new_with_seed(bytes, items, &[0; 32])
        .map_or(1, |filter| filter.number_of_hash_functions())
        .min(HASHES_MAX);
    Shape { group_bits, keys, lines: u32::try_from(bytes.div_ceil(LINE_BYTES)).unwrap_or(u32::MAX), hashes }
}

/// Ranges (first and last) of groups that hold a non-zero block: ascending, each group once. No work per block.
fn groups(table: Table<'_>, bits: u32) -> impl Iterator<Item = (u64, u64)> {
    let mut next = 0;
    table.iter().filter_map(move |entry| {
        let first = (u64::from(entry.source) >> bits).max(next);
        let last = (entry.source_end().saturating_sub(1)) >> bits;
        next = next.max(last + 1);
        (first <= last).then_some((first, last))
    })
}

/// How many groups hold a non-zero block.
pub(super) fn key_count(table: Table<'_>, bits: u32) -> u64 {
    groups(table, bits).map(|(first, last)| last - first + 1).sum()
}

/// Every group that holds a non-zero block.
pub(super) fn keys(table: Table<'_>, bits: u32) -> impl Iterator<Item = u32> {
    groups(table, bits).flat_map(|(first, last)| first..=last).map(|key| u32::try_from(key).unwrap_or(u32::MAX))
}

/// SplitMix64 (Steele, Lea, Flood 2014): the finalizer of one step from state `key`.
fn mix(key: u32) -> u64 {
    let z = u64::from(key).wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The line of a key, and the first bit and the step of its bits in the line.
#[inline]
fn place(key: u32, lines: usize) -> (usize, u32, u32) {
    let hash = mix(key);
    // Multiply and shift instead of a division: maps the upper 32 bits evenly onto the lines.
    let line = ((hash >> 32) * lines as u64) >> 32;
    let low = u32::try_from(hash & 0xffff_ffff).unwrap_or(0);
    // An odd step visits all 512 bits before it repeats one.
    (line as usize, low, (low >> 9) | 1)
}

#[inline]
fn bit(first: u32, step: u32, i: u32) -> (usize, u8) {
    let bit = first.wrapping_add(i.wrapping_mul(step)) % LINE_BITS;
    ((bit / 8) as usize, 1 << (bit % 8))
}

/// The encoded filter, read where it lies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bloom<'a> {
    lines: &'a [[u8; LINE_BYTES]],
    hashes: u32,
}

impl<'a> Bloom<'a> {
    /// `bytes` hold at least one line.
    pub(super) fn new(bytes: &'a [u8], hashes: u32) -> Self {
        Bloom { lines: bytes.as_chunks().0, hashes }
    }

    /// False when the group of that number surely holds no non-zero block.
    #[inline]
    pub(super) fn may_hold(self, key: u32) -> bool {
        let (line, first, step) = place(key, self.lines.len());
        let line = &self.lines[line];
        (0..self.hashes).all(|i| {
            let (byte, mask) = bit(first, step, i);
            line[byte] & mask != 0
        })
    }
}

/// The bytes of the filter of these entries.
pub(super) fn fill(table: Table<'_>, shape: Shape) -> Vec<u8> {
    let mut lines = vec![[0u8; LINE_BYTES]; shape.lines as usize];
    for key in keys(table, shape.group_bits) {
        let (line, first, step) = place(key, lines.len());
        for i in 0..shape.hashes {
            let (byte, mask) = bit(first, step, i);
            lines[line][byte] |= mask;
        }
    }
    lines.into_flattened()
}

#[cfg(test)]
mod tests {
    use super::super::Entry;
    use super::*;

    fn table_of(ranges: impl Iterator<Item = (u32, u32)>) -> Vec<u8> {
        ranges.flat_map(|(source, len)| Entry { source, len, target: 0, block: 0 }.encode()).collect()
    }

    #[test]
    fn false_positives_are_rare_and_false_negatives_never_happen() {
        let bytes = table_of((0..50_000).map(|i| (4 * i, 2)));
        let table = Table::new(&bytes);
        let shape = shape_for(table, KEYS_MAX);
        assert_eq!((shape.group_bits, shape.keys, shape.hashes), (0, 100_000, 7));
        let filled = fill(table, shape);
        let bloom = Bloom::new(&filled, shape.hashes);
        assert!(keys(table, 0).all(|key| bloom.may_hold(key)));
        let false_positives = (0..50_000).filter(|i| bloom.may_hold(4 * i + 2)).count();
        assert!(false_positives < 1_000, "{false_positives} of 50000");
    }

    #[test]
    fn a_group_counts_once() {
        let bytes = table_of([(0, 3), (3, 1), (7, 1), (8, 9), (40, 1)].into_iter());
        let table = Table::new(&bytes);
        assert_eq!(key_count(table, 0), 15);
        assert_eq!(keys(table, 2).collect::<Vec<_>>(), [0, 1, 2, 3, 4, 10]);
        assert_eq!(key_count(table, 31), 1);
    }

    #[test]
    fn the_filter_of_a_huge_image_stays_small() {
        let bytes = table_of([(0, u32::MAX)].into_iter());
        let shape = shape_for(Table::new(&bytes), KEYS_MAX);
        assert_eq!((shape.group_bits, shape.keys), (14, 1 << 18));
        assert!(shape.lines as usize * LINE_BYTES <= 320 << 10);
        let least = shape_for(Table::new(&bytes), KEYS_LEAST);
        assert_eq!((least.group_bits, least.keys, least.lines), (31, 2, 1));
    }
}
