//! The note that Linux keeps in memory for whoever reads its crash dumps: where its tables are and how they are laid out.
//!
//! It is an ELF note (name `VMCOREINFO`, type 0) at the start of a page of its own; its text has a line for each fact
//! (`SYMBOL(name)=hex`, `OFFSET(struct.field)=decimal`, …). Copies of the text alone, without the header, also are in memory. Whole
//! notes may be left from a kernel that ran before, or be pages of a dump that somebody reads. So a note is believed only when the
//! kernel is where it says: its page tables map its symbols to where KASLR put them, and its name for itself is there.
//!
//! Lines that Linux 5.10 to 6.12 have are taken as they are. A line that is missing or out of range is a [`Doubt`].

use super::pagetable::PageTables;
use super::{Doubt, GuestMemory, Layout, PAGE_SIZE};
use crate::codec::Cursor;
use crate::units::to_usize;
use std::collections::HashMap;

/// Name, padded as ELF has it.
const NAME: &[u8; 12] = b"VMCOREINFO\0\0";
/// Bytes of it that the header counts.
const NAME_LEN: u32 = 11;
const HEADER: usize = 24;
/// Bytes of text: Linux gives it a page.
const TEXT_MAX: u32 = 4096;
/// Notes that are looked at more closely before the search is given up: a guest may fill its memory with them.
const NOTES_MAX: usize = 64;
/// Where Linux maps its own image, without what KASLR adds.
const IMAGE_BASE: u64 = 0xffff_ffff_8000_0000;
/// Bytes after the start of `init_uts_ns` in which the release is looked for: three strings of 65 bytes, or fields before them.
const UTS_BYTES: usize = 512;

/// Offsets in `struct page`, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageFields {
    /// Bytes of the whole.
    pub size: usize,
    /// `flags`, u64.
    pub flags: usize,
    /// `mapping`, u64.
    pub mapping: usize,
    /// `private`, u64: of a free block its order.
    pub private: usize,
    /// `compound_head`, u64.
    pub compound_head: usize,
    /// `_mapcount` and the page's type, u32.
    pub mapcount: usize,
    /// `_refcount`, i32.
    pub refcount: usize,
}

/// What has to be known of the sparse map of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SectionFields {
    /// Virtual address of the array of roots.
    pub roots: u64,
    /// How many roots there are.
    pub roots_len: u64,
    /// Bytes of a `struct mem_section`.
    pub size: u64,
    /// Offset of `section_mem_map` in it.
    pub map: u64,
    /// A section has 2 to the power of this bytes.
    pub bits: u32,
}

/// Where the counters of free pages are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ZoneFields {
    /// Virtual address of the array of pointers to nodes, or of the one node.
    pub nodes: u64,
    /// Pointers in the array; none when there is one node.
    pub nodes_len: Option<u64>,
    /// Offset of the first zone in a node.
    pub node_zones: u64,
    /// Offset of the number of zones in a node, i32.
    pub nr_zones: u64,
    /// Bytes of a zone.
    pub size: u64,
    /// Offset of the counter of free pages in a zone, i64.
    pub free: u64,
}

/// What a note tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Facts {
    /// `uname -r`.
    pub release: String,
    /// Whether the kernel runs with 5 levels of page tables.
    pub five_levels: bool,
    /// `struct page`.
    pub page: PageFields,
    /// The map of memory.
    pub sections: SectionFields,
    /// The zones.
    pub zones: ZoneFields,
    /// Bit of the flag `PG_lru`.
    pub lru: u32,
    /// Bit of the flag `PG_swapbacked`.
    pub swapbacked: u32,
    /// Bit of the flag `PG_slab`, before Linux 6.10.
    pub slab_flag: Option<u32>,
    /// Type of the pages of slabs, from Linux 6.10 on.
    pub slab_type: Option<u32>,
    /// Type of the first page of a free block.
    pub buddy_type: u32,
    /// Orders of free blocks, from 0 on.
    pub orders: u64,
    uts: u64,
    top: u64,
    text: u64,
    phys_base: i64,
}

impl Facts {
    /// Of the text of a note.
    ///
    /// # Errors
    /// A line is missing or has a value that cannot be.
    pub fn parse(text: &str) -> Result<Facts, Doubt> {
        let lines = Lines::new(text);
        if lines.number("PAGESIZE", PAGE_SIZE..=PAGE_SIZE).is_err() {
            return Err(Doubt::Field("PAGESIZE"));
        }
        if lines.signed("NUMBER(sme_mask)").is_some_and(|mask| mask != 0) {
            return Err(Doubt::Encrypted);
        }
        let release = lines.text("OSRELEASE").filter(|release| (4..65).contains(&release.len()));
        let size = to_usize(lines.number("SIZE(page)", 32..=256)?);
        let within = |name, bytes| lines.number(name, 0..=size as u64 - bytes).map(to_usize);
        let page = PageFields {
            size,
            flags: within("OFFSET(page.flags)", 8)?,
            mapping: within("OFFSET(page.mapping)", 8)?,
            private: within("OFFSET(page.private)", 8)?,
            compound_head: within("OFFSET(page.compound_head)", 8)?,
            mapcount: within("OFFSET(page._mapcount)", 4)?,
            refcount: within("OFFSET(page._refcount)", 4)?,
        };
        let section = lines.number("SIZE(mem_section)", 8..=256)?;
        let sections = SectionFields {
            roots: lines.symbol("SYMBOL(mem_section)")?,
            roots_len: lines.number("LENGTH(mem_section)", 1..=1 << 26)?,
            size: section,
            map: lines.number("OFFSET(mem_section.section_mem_map)", 0..=section - 8)?,
            bits: lines.small("NUMBER(SECTION_SIZE_BITS)", 20..=34)?,
        };
        Ok(Facts {
            release: release.ok_or(Doubt::Field("OSRELEASE"))?.to_string(),
            five_levels: lines.number("NUMBER(pgtable_l5_enabled)", 0..=1)? == 1,
            page,
            sections,
            zones: lines.zones()?,
            lru: lines.small("NUMBER(PG_lru)", 0..=63)?,
            swapbacked: lines.small("NUMBER(PG_swapbacked)", 0..=63)?,
            slab_flag: lines.small("NUMBER(PG_slab)", 0..=63).ok(),
            slab_type: lines.page_type("NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)"),
            buddy_type: lines
                .page_type("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)")
                .ok_or(Doubt::Field("NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)"))?,
            orders: lines.number("LENGTH(zone.free_area)", 1..=20)?,
            uts: lines.symbol("SYMBOL(init_uts_ns)")?,
            top: lines.symbol("SYMBOL(swapper_pg_dir)")?,
            text: lines.symbol("SYMBOL(_stext)")?,
            phys_base: lines.signed("NUMBER(phys_base)").ok_or(Doubt::Field("NUMBER(phys_base)"))?,
        })
    }

    /// Where a symbol of the kernel's image is: an address less what the image is mapped at, plus what KASLR moved it by, which may
    /// be negative.
    fn image_physical(&self, address: u64) -> u64 {
        address.wrapping_sub(IMAGE_BASE).wrapping_add_signed(self.phys_base)
    }

    /// Guest-physical address of the kernel's top page table.
    pub fn page_directory(&self) -> u64 {
        self.image_physical(self.top)
    }

    /// Guest-physical address at which the kernel's code starts.
    pub fn image_start(&self) -> u64 {
        self.image_physical(self.text)
    }

    /// Whether the kernel is older than this version; not when its name does not begin with one.
    pub fn before(&self, major: u32, minor: u32) -> bool {
        let mut parts = self.release.split('.').map(|part| part.parse::<u32>().ok());
        matches!((parts.next(), parts.next()), (Some(Some(a)), Some(Some(b))) if (a, b) < (major, minor))
    }

    /// Whether the kernel is where the note says.
    fn check(&self, memory: &impl GuestMemory) -> Result<(), Doubt> {
        let tables = PageTables::new(memory, self.page_directory(), self.five_levels);
        for symbol in [self.top, self.text, self.uts] {
            let found = tables.translate(symbol).map(|(physical, _)| physical);
            if found != Some(self.image_physical(symbol)) {
                return Err(Doubt::PageTables);
            }
        }
        let mut uts = [0; UTS_BYTES];
        let name = [self.release.as_bytes(), b"\0"].concat();
        let there = tables.read(self.uts, &mut uts) && uts.windows(name.len()).any(|window| window == name);
        if there { Ok(()) } else { Err(Doubt::OtherKernel) }
    }
}

/// The facts of the kernel that runs: of the note at `at`, or of the one in all of RAM that is to be believed.
///
/// # Errors
/// There is none, or more than one; with `at`, what is wrong with it.
pub fn find(memory: &impl GuestMemory, layout: &Layout, at: Option<u64>) -> Result<Facts, Doubt> {
    if let Some(at) = at {
        let text = read_note(memory, at).ok_or(Doubt::NoNote { refused: 0 })?;
        return believe(memory, &text);
    }
    let mut found: Option<Facts> = None;
    let (mut refused, mut last) = (0, None);
    let pages = layout
        .ranges()
        .into_iter()
        .flat_map(|range| (0..range.len / PAGE_SIZE).map(move |n| range.physical + n * PAGE_SIZE));
    for text in pages.filter_map(|page| read_note(memory, page)).take(NOTES_MAX) {
        match (believe(memory, &text), &found) {
            (Ok(facts), None) => found = Some(facts),
            // A copy of the same note names the same kernel.
            (Ok(facts), Some(before)) if facts == *before => {}
            (Ok(_), Some(_)) => return Err(Doubt::SeveralKernels),
            (Err(doubt), _) => {
                refused += 1;
                last = Some(doubt);
            }
        }
    }
    match (found, last) {
        (Some(facts), _) => Ok(facts),
        (None, Some(doubt)) if refused == 1 => Err(doubt),
        (None, _) => Err(Doubt::NoNote { refused }),
    }
}

fn believe(memory: &impl GuestMemory, text: &str) -> Result<Facts, Doubt> {
    let facts = Facts::parse(text)?;
    facts.check(memory)?;
    Ok(facts)
}

/// The text of the note that starts here.
fn read_note(memory: &impl GuestMemory, at: u64) -> Option<String> {
    let mut header = [0; HEADER];
    if !memory.read(at, &mut header) {
        return None;
    }
    let mut c = Cursor::new(&header);
    let (name_len, len, kind) = (c.u32_le()?, c.u32_le()?, c.u32_le()?);
    if name_len != NAME_LEN || kind != 0 || c.array() != Some(*NAME) || len == 0 || len > TEXT_MAX {
        return None;
    }
    let mut text = vec![0; to_usize(len.into())];
    if !memory.read(at.checked_add(HEADER as u64)?, &mut text) {
        return None;
    }
    String::from_utf8(text).ok()
}

/// `key=value`, the first of each key.
struct Lines<'a>(HashMap<&'a str, &'a str>);

impl<'a> Lines<'a> {
    fn new(text: &'a str) -> Self {
        let mut lines = HashMap::new();
        for (key, value) in text.lines().filter_map(|line| line.split_once('=')) {
            lines.entry(key).or_insert(value);
        }
        Lines(lines)
    }

    fn text(&self, key: &str) -> Option<&'a str> {
        self.0.get(key).copied()
    }

    fn signed(&self, key: &str) -> Option<i64> {
        self.text(key)?.parse().ok()
    }

    fn number(&self, key: &'static str, range: std::ops::RangeInclusive<u64>) -> Result<u64, Doubt> {
        let value = self.text(key).and_then(|value| value.parse().ok());
        value.filter(|value| range.contains(value)).ok_or(Doubt::Field(key))
    }

    fn small(&self, key: &'static str, range: std::ops::RangeInclusive<u32>) -> Result<u32, Doubt> {
        let value = self.number(key, u64::from(*range.start())..=u64::from(*range.end()))?;
        u32::try_from(value).map_err(|_| Doubt::Field(key))
    }

    /// A kernel address: in the upper half.
    fn symbol(&self, key: &'static str) -> Result<u64, Doubt> {
        let value = self.text(key).and_then(|value| u64::from_str_radix(value, 16).ok());
        value.filter(|value| *value >> 63 == 1).ok_or(Doubt::Field(key))
    }

    /// A page's type, 32 bits that some versions print as signed. All ones are a page without a type.
    fn page_type(&self, key: &str) -> Option<u32> {
        let value = self.signed(key)?;
        let value = u32::try_from(value).ok().or_else(|| i32::try_from(value).ok().map(i32::cast_unsigned))?;
        (1 << 31..u32::MAX).contains(&value).then_some(value)
    }

    fn zones(&self) -> Result<ZoneFields, Doubt> {
        // Zones and nodes are structures of some KiB.
        const STRUCT_MAX: u64 = 1 << 24;
        let (nodes, nodes_len) = match self.symbol("SYMBOL(node_data)") {
            Ok(nodes) => (nodes, Some(self.number("LENGTH(node_data)", 1..=1024)?)),
            Err(_) => (self.symbol("SYMBOL(contig_page_data)")?, None),
        };
        let counter = self.number("NUMBER(NR_FREE_PAGES)", 0..=256)?;
        Ok(ZoneFields {
            nodes,
            nodes_len,
            node_zones: self.number("OFFSET(pglist_data.node_zones)", 0..=STRUCT_MAX)?,
            nr_zones: self.number("OFFSET(pglist_data.nr_zones)", 0..=STRUCT_MAX)?,
            size: self.number("SIZE(zone)", 8..=STRUCT_MAX)?,
            free: self.number("OFFSET(zone.vm_stat)", 0..=STRUCT_MAX)? + counter * 8,
        })
    }
}
