//! One bit a block, set for data: the exact answer that the Bloom filter approximates.

use vmar::map::Map;

pub struct Bitmap(Vec<u64>);

impl Bitmap {
    pub fn of(map: &Map<Vec<u8>>) -> Bitmap {
        let blocks = usize::try_from(map.totals().blocks).unwrap();
        let mut words = vec![0u64; blocks.div_ceil(64)];
        for entry in map.entries() {
            for block in u64::from(entry.source)..entry.source_end() {
                words[usize::try_from(block / 64).unwrap()] |= 1 << (block % 64);
            }
        }
        Bitmap(words)
    }

    #[inline]
    pub fn holds(&self, block: u32) -> bool {
        self.0[block as usize / 64] >> (block % 64) & 1 != 0
    }

    pub fn bytes(&self) -> usize {
        self.0.len() * 8
    }
}
