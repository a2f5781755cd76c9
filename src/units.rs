//! Sizes and the two indices that must never be mixed up: which image, and which block of it.

use std::fmt;

/// Bytes of a virtio/qcow2 sector, the smallest unit a guest can address.
pub const SECTOR_SIZE: u64 = 512;

/// Bytes of a block: the unit of fingerprints, of redirects and of the host page cache (paper, section 3.1).
pub const BLOCK_SIZE: u64 = 4096;

/// The largest image: block numbers are 32 bits wide in the map, so 2^32 blocks of 4 KiB (16 TiB).
pub const IMAGE_SIZE_MAX: u64 = BLOCK_SIZE << 32;

/// Number of an image in its library. IDs count up from 0 and are never reused; under the policy `paper` the
/// lowest ID that holds a content is the target of everyone who holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageId(pub u32);

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Index of a 4 KiB block inside one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Block(pub u32);

impl Block {
    /// The byte at which the block starts.
    pub fn offset(self) -> u64 {
        u64::from(self.0) * BLOCK_SIZE
    }
}

impl fmt::Display for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// How many blocks `size_bytes` takes, a partial last block included.
pub fn blocks_in(size_bytes: u64) -> u64 {
    size_bytes.div_ceil(BLOCK_SIZE)
}

/// True when every byte is zero. Compares words, which the compiler turns into vector code.
pub fn is_zero(bytes: &[u8]) -> bool {
    // SAFETY: u64 has no invalid bit patterns, so the aligned middle part may be read as words.
    let (head, words, tail) = unsafe { bytes.align_to::<u64>() };
    head.iter().all(|&b| b == 0)
        && words.chunks(64).all(|c| c.iter().fold(0, |acc, &w| acc | w) == 0)
        && tail.iter().all(|&b| b == 0)
}

/// A byte count or an index as `usize`. vmar runs on 64-bit machines only, where nothing is lost.
#[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits, see the check in lib.rs")]
pub const fn to_usize(n: u64) -> usize {
    n as usize
}

/// `1536 → "1.5 KiB"`: for humans only, scripts get plain byte counts.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_set_bit_anywhere_is_not_zero() {
        for len in [0usize, 1, 7, 8, 511, 512, 4096, 4099] {
            let mut buf = vec![0u8; len];
            assert!(is_zero(&buf));
            for at in 0..len {
                buf[at] = 1;
                assert!(!is_zero(&buf), "len {len} at {at}");
                buf[at] = 0;
            }
        }
    }

    #[test]
    fn a_partial_last_block_counts() {
        assert_eq!(blocks_in(0), 0);
        assert_eq!(blocks_in(4096), 1);
        assert_eq!(blocks_in(4608), 2);
    }
}
