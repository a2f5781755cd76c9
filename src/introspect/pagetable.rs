//! Kernel addresses to guest-physical ones: the page tables of x86-64, with 4 or 5 levels.
//!
//! A walk reads one entry a level, so no table can keep it busy; tables that point to themselves are walked as any others.

use super::{GuestMemory, PAGE_SIZE, read_u64};
use crate::units::to_usize;

/// Entry is there.
const PRESENT: u64 = 1;
/// Entry of the second or third level from below: a page of 2 MiB or 1 GiB.
const LARGE: u64 = 1 << 7;
/// Address in an entry: bits 12 to 51.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Bits of an address that a level takes.
const LEVEL_BITS: u32 = 9;
const PAGE_BITS: u32 = 12;

/// The page tables that a kernel runs with.
#[derive(Debug)]
pub struct PageTables<'a, M> {
    memory: &'a M,
    root: u64,
    levels: u32,
}

impl<'a, M: GuestMemory> PageTables<'a, M> {
    /// Of this top table, by its guest-physical address.
    pub fn new(memory: &'a M, root: u64, five_levels: bool) -> Self {
        PageTables { memory, root, levels: if five_levels { 5 } else { 4 } }
    }

    /// Where a virtual address is: the guest-physical address, and how many bytes of the page follow there. None when it is not
    /// mapped or not canonical.
    pub fn translate(&self, address: u64) -> Option<(u64, u64)> {
        let above = PAGE_BITS + LEVEL_BITS * self.levels - 1;
        let sign = address.cast_signed() >> above;
        if sign != 0 && sign != -1 {
            return None;
        }
        let mut table = self.root & ADDRESS;
        for level in (0..self.levels).rev() {
            let shift = PAGE_BITS + LEVEL_BITS * level;
            let index = (address >> shift) & ((1 << LEVEL_BITS) - 1);
            let entry = read_u64(self.memory, table + index * 8)?;
            if entry & PRESENT == 0 {
                return None;
            }
            let last = level == 0 || (level <= 2 && entry & LARGE != 0);
            if last {
                let inside = address & ((1 << shift) - 1);
                // In a large entry the lowest address bit is an attribute.
                let frame = entry & ADDRESS & !((1 << shift) - 1);
                return Some((frame + inside, (1 << shift) - inside));
            }
            table = entry & ADDRESS;
        }
        None
    }

    /// Fills `buf` from a virtual address; false when a part of it is not mapped or no RAM.
    pub fn read(&self, mut address: u64, buf: &mut [u8]) -> bool {
        let mut rest = buf;
        while !rest.is_empty() {
            let Some((physical, left)) = self.translate(address) else { return false };
            let (part, after) = rest.split_at_mut(rest.len().min(to_usize(left)));
            if !self.memory.read(physical, part) {
                return false;
            }
            address = address.wrapping_add(part.len() as u64);
            rest = after;
        }
        true
    }

    /// A little-endian u64 at a virtual address.
    pub fn read_u64(&self, address: u64) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes).then(|| u64::from_le_bytes(bytes))
    }

    /// A little-endian u32 at a virtual address.
    pub fn read_u32(&self, address: u64) -> Option<u32> {
        let mut bytes = [0; 4];
        self.read(address, &mut bytes).then(|| u32::from_le_bytes(bytes))
    }
}

/// Bytes from an address to the end of its page.
pub fn left_in_page(address: u64) -> u64 {
    PAGE_SIZE - address % PAGE_SIZE
}

#[cfg(test)]
mod tests {
    use super::super::{BlockMemory, Layout};
    use super::*;
    use proptest::prelude::*;

    /// Memory of a few pages with these entries (table, index, entry).
    fn memory(pages: u64, entries: &[(u64, u64, u64)]) -> (Layout, Vec<u8>) {
        let mut bytes = vec![0; to_usize(pages * PAGE_SIZE)];
        for (table, index, entry) in entries {
            let at = to_usize(table * PAGE_SIZE + index * 8);
            bytes[at..at + 8].copy_from_slice(&entry.to_le_bytes());
        }
        (Layout::with_split(pages * PAGE_SIZE, pages * PAGE_SIZE).unwrap(), bytes)
    }

    const NO_EXECUTE: u64 = 1 << 63;

    #[test]
    fn pages_of_all_sizes_are_found_with_four_and_five_levels() {
        let entries = [
            (0, 511, 0x1003),
            // Large pages: 1 GiB with the attribute bit 12, 2 MiB, and a table of 4 KiB pages.
            (1, 0, 0x4000_1083),
            (1, 510, 0x2003 | NO_EXECUTE),
            (2, 8, 0x60_0083),
            (2, 9, 0x3003),
            (3, 1, 0x5003 | NO_EXECUTE),
            (3, 2, 0x6002),
        ];
        let (layout, mut bytes) = memory(8, &entries);
        // A fifth level above.
        bytes[7 * 4096 + 511 * 8..][..8].copy_from_slice(&3u64.to_le_bytes());
        let memory = BlockMemory::new(layout, &bytes).unwrap();
        for tables in [PageTables::new(&memory, 0, false), PageTables::new(&memory, 0x7000, true)] {
            assert_eq!(tables.translate(0xffff_ff80_0000_0123), Some((0x4000_0123, (1 << 30) - 0x123)));
            assert_eq!(tables.translate(0xffff_ffff_8100_0008), Some((0x60_0008, (2 << 20) - 8)));
            assert_eq!(tables.translate(0xffff_ffff_8120_1ffc), Some((0x5ffc, 4)));
            assert_eq!(tables.translate(0xffff_ffff_8120_2000), None, "not present");
            assert_eq!(tables.translate(0xffff_ffff_8140_0000), None, "no entry");
            assert_eq!(tables.translate(0x7fff_ffff_f000), None, "another half");
            assert!(!tables.read(0xffff_ffff_8120_1ffc, &mut [0; 5]), "the next page is not there");
            assert!(tables.read(0xffff_ffff_8120_1ffc, &mut [0; 4]));
            assert_eq!(tables.read_u64(0xffff_ffff_8100_0000), None, "mapped, but no RAM");
        }
        assert_eq!(PageTables::new(&memory, 0, false).translate(0xfeff_ffff_8100_0000), None, "not canonical");
    }

    #[test]
    fn a_table_that_points_to_itself_is_no_trap() {
        let (layout, bytes) = memory(1, &[(0, 511, 3), (0, 0, 3)]);
        let memory = BlockMemory::new(layout, &bytes).unwrap();
        assert_eq!(PageTables::new(&memory, 0, true).translate(u64::MAX), Some((0xfff, 1)));
        assert!(!PageTables::new(&memory, 0, true).read(u64::MAX, &mut [0; 1 << 20]), "what follows is not mapped");
    }

    proptest! {
        #[test]
        fn any_tables_can_be_walked(bytes in prop::collection::vec(any::<u8>(), 4 * 4096), address: u64, five: bool) {
            let memory = BlockMemory::new(Layout::with_split(16384, 8192).unwrap(), &bytes).unwrap();
            let tables = PageTables::new(&memory, 0x1000, five);
            if let Some((physical, left)) = tables.translate(address) {
                prop_assert!(left > 0 && physical.checked_add(left).is_some());
            }
            tables.read(address, &mut [0; 9000]);
        }
    }
}
