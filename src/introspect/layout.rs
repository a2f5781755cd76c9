//! Where QEMU's one block of RAM lies among the guest-physical addresses.
//!
//! Below 4 GiB there has to be room for devices: what does not fit under a machine's split goes on at 4 GiB. An offset into the
//! block is the same as a guest-physical address below the split only.

use super::{GuestMemory, PAGE_SIZE};
use crate::units::to_usize;

const GIB: u64 = 1 << 30;
const FOUR_GIB: u64 = 4 * GIB;

/// More RAM than this may be moved to 1 TiB (processors of AMD keep addresses below it for themselves): not handled.
const LEN_MAX: u64 = 900 * GIB;

/// A block of RAM, in guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    len: u64,
    low: u64,
}

/// A part of RAM that is contiguous.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// Where the guest has it.
    pub physical: u64,
    /// Where it is in the block.
    pub offset: u64,
    /// Bytes, whole pages.
    pub len: u64,
}

impl Layout {
    /// For QEMU's name of a machine, as in the migration stream or on the command line: `pc-q35-7.2`, `q35`, `pc-i440fx-10.0`, `pc`.
    /// None for other machines, for `max-ram-below-4g` cannot be seen from outside, and for more than 900 GiB.
    pub fn for_machine(machine: &str, len: u64) -> Option<Layout> {
        let (from, low) = if machine == "q35" || machine.starts_with("pc-q35") {
            (0xb000_0000, 2 * GIB)
        } else if machine == "pc" || machine.starts_with("pc-i440fx") {
            (0xe000_0000, 3 * GIB)
        } else {
            return None;
        };
        Layout::with_split(len, if len >= from { low } else { len })
    }

    /// RAM of `len` bytes whose first `low` bytes lie at 0 and whose others lie at 4 GiB. None when these are no whole pages, or do
    /// not fit.
    pub fn with_split(len: u64, low: u64) -> Option<Layout> {
        let whole = len.is_multiple_of(PAGE_SIZE) && low.is_multiple_of(PAGE_SIZE);
        (whole && low <= len && low <= FOUR_GIB && len <= LEN_MAX).then_some(Layout { len, low })
    }

    /// Bytes of RAM.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The parts of it, in the order of the block; the second may be empty.
    pub fn ranges(&self) -> [Range; 2] {
        [
            Range { physical: 0, offset: 0, len: self.low },
            Range { physical: FOUR_GIB, offset: self.low, len: self.len - self.low },
        ]
    }

    /// Where in the block an address is, and how many bytes follow there.
    pub fn offset(&self, physical: u64) -> Option<(u64, u64)> {
        self.ranges().into_iter().find_map(|range| {
            let inside = physical.checked_sub(range.physical).filter(|inside| *inside < range.len)?;
            Some((range.offset + inside, range.len - inside))
        })
    }

    /// The guest-physical address of an offset into the block.
    pub fn physical(&self, offset: u64) -> Option<u64> {
        self.ranges().into_iter().find_map(|range| {
            let inside = offset.checked_sub(range.offset).filter(|inside| *inside < range.len)?;
            Some(range.physical + inside)
        })
    }
}

/// A block of RAM in this process's memory.
#[derive(Clone, Copy, Debug)]
pub struct BlockMemory<'a> {
    layout: Layout,
    bytes: &'a [u8],
}

impl<'a> BlockMemory<'a> {
    /// None when the block is not as long as the layout says.
    pub fn new(layout: Layout, bytes: &'a [u8]) -> Option<Self> {
        (bytes.len() as u64 == layout.len).then_some(BlockMemory { layout, bytes })
    }
}

impl GuestMemory for BlockMemory<'_> {
    fn read(&self, physical: u64, buf: &mut [u8]) -> bool {
        let from = self.layout.offset(physical).filter(|(_, left)| *left >= buf.len() as u64);
        let bytes = from.and_then(|(offset, _)| self.bytes.get(to_usize(offset)..)?.get(..buf.len()));
        if let Some(bytes) = bytes {
            buf.copy_from_slice(bytes);
        }
        bytes.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn machines_split_where_qemu_splits_them() {
        let low = |machine, len| Layout::for_machine(machine, len).map(|layout| layout.ranges()[0].len);
        assert_eq!(low("q35", GIB), Some(GIB));
        assert_eq!(low("pc-q35-7.2", 0xb000_0000 - PAGE_SIZE), Some(0xb000_0000 - PAGE_SIZE));
        assert_eq!(low("pc-q35-10.0", 0xb000_0000), Some(2 * GIB));
        assert_eq!(low("pc", 3 * GIB + GIB / 4), Some(3 * GIB + GIB / 4));
        assert_eq!(low("pc-i440fx-7.2", 0xe000_0000), Some(3 * GIB));
        assert_eq!(low("microvm", GIB), None, "it has splits of its own");
        assert_eq!(low("q35", 1 << 40), None, "AMD's hole");
        assert_eq!(low("q35", GIB + 1), None);
    }

    #[test]
    fn a_read_ends_where_ram_ends() {
        let layout = Layout::with_split(4 * PAGE_SIZE, 3 * PAGE_SIZE).unwrap();
        let bytes: Vec<u8> = (0..4u8).flat_map(|n| [n; 4096]).collect();
        let memory = BlockMemory::new(layout, &bytes).unwrap();
        let mut buf = [9; 4];
        assert!(memory.read(3 * PAGE_SIZE - 4, &mut buf) && buf == [2; 4]);
        assert!(!memory.read(3 * PAGE_SIZE - 3, &mut buf), "what follows lies elsewhere");
        assert!(memory.read(FOUR_GIB, &mut buf) && buf == [3; 4]);
        assert!(!memory.read(FOUR_GIB + PAGE_SIZE, &mut buf));
        assert!(!memory.read(u64::MAX, &mut buf));
        assert!(BlockMemory::new(layout, &bytes[1..]).is_none());
    }

    proptest! {
        #[test]
        fn offsets_and_addresses_are_inverse(len in 0u64..40, low in 0u64..40, at in 0u64..40 * PAGE_SIZE) {
            let Some(layout) = Layout::with_split(len * PAGE_SIZE, low.min(len) * PAGE_SIZE) else {
                return Err(TestCaseError::fail("whole pages that fit"));
            };
            match layout.physical(at) {
                Some(physical) => prop_assert_eq!(layout.offset(physical).map(|(offset, _)| offset), Some(at)),
                None => prop_assert!(at >= layout.len()),
            }
        }
    }
}
