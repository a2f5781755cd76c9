//! The sparse map of memory: for each page its `struct page`.
//!
//! Memory is cut into sections (128 MiB each). An array of roots points to pages full of section descriptors; a descriptor has, with
//! some bits of state below, the address of its first `struct page` *less* that page's number times the size, so that adding the
//! number of any page in the section gives that page's.

use super::pagetable::{PageTables, left_in_page};
use super::vmcoreinfo::{PageFields, SectionFields};
use super::{Facts, GuestMemory, PAGE_SIZE};
use crate::units::to_usize;

/// Bits of state below the address in a descriptor. What lies in them of the address itself is zero.
const STATE: u64 = 0x3f;
/// Section is there, and has a map.
const USABLE: u64 = 0x03;
/// Bytes of the map that are read at once, at most.
const CHUNK: usize = 64 << 10;

/// The map of a guest's memory.
#[derive(Debug)]
pub struct MemMap<'a, M> {
    tables: &'a PageTables<'a, M>,
    sections: SectionFields,
    page: PageFields,
}

impl<'a, M: GuestMemory> MemMap<'a, M> {
    /// As the note tells of it.
    pub fn new(tables: &'a PageTables<'a, M>, facts: &Facts) -> Self {
        MemMap { tables, sections: facts.sections, page: facts.page }
    }

    /// Tells of each of `count` pages from page number `first` on: its number, the address of its `struct page`, and its bytes, if
    /// there are any.
    pub fn each(&self, first: u64, count: u64, mut tell: impl FnMut(u64, u64, Option<&[u8]>)) {
        let pages = (1 << self.sections.bits) / PAGE_SIZE;
        let (mut frame, end) = (first, first + count);
        let mut buf = vec![0; CHUNK];
        while frame < end {
            let section_end = end.min((frame / pages + 1) * pages);
            match self.section(frame / pages) {
                Some(map) => self.run(map, frame..section_end, &mut buf, &mut tell),
                None => (frame..section_end).for_each(|frame| tell(frame, 0, None)),
            }
            frame = section_end;
        }
    }

    /// What a section's pages' numbers have to be added to.
    fn section(&self, number: u64) -> Option<u64> {
        let s = &self.sections;
        let each_root = (PAGE_SIZE / s.size).max(1);
        let root = number / each_root;
        if root >= s.roots_len {
            return None;
        }
        let root = self.tables.read_u64(s.roots.checked_add(root * 8)?)?;
        let at = root.checked_add(number % each_root * s.size)?.checked_add(s.map)?;
        let map = self.tables.read_u64(at)?;
        (root != 0 && map & USABLE == USABLE).then_some(map & !STATE)
    }

    /// The pages of a part of a section.
    fn run(
        &self,
        map: u64,
        frames: std::ops::Range<u64>,
        buf: &mut [u8],
        tell: &mut impl FnMut(u64, u64, Option<&[u8]>),
    ) {
        let size = self.page.size as u64;
        let address = |frame: u64| map.wrapping_add(frame.wrapping_mul(size));
        let mut frame = frames.start;
        while frame < frames.end {
            let at = address(frame);
            // As many as lie in one mapping, or one that may lie across the border of two.
            let mapped = self.tables.translate(at).map_or(left_in_page(at), |(_, left)| left);
            let whole = (mapped.min(buf.len() as u64) / size).max(1).min(frames.end - frame);
            let part = &mut buf[..to_usize(whole * size)];
            let there = self.tables.read(at, part);
            for (n, page) in (0..whole).zip(part.chunks_exact(self.page.size)) {
                tell(frame + n, address(frame + n), there.then_some(page));
            }
            frame += whole;
        }
    }
}
