//! A guest's memory, made up in tests: page tables, a note, BTF, zones and a map of memory, as a kernel of some version has them.
//!
//! RAM is 20 MiB: 12 MiB at 0, 8 MiB at 4 GiB; a section has 4 MiB. The kernel's image starts at 2 MiB, moved there by KASLR.

use super::{BlockMemory, Doubt, Introspection, Layout, PAGE_SIZE, introspect};
use crate::units::to_usize;

pub const LOW: u64 = 12 << 20;
pub const LEN: u64 = 20 << 20;
/// Page numbers of the memory above 4 GiB start here.
pub const HIGH_FRAME: u64 = (4 << 30) / PAGE_SIZE;
/// Section size: less than any kernel's, but the note says so.
const SECTION_BITS: u32 = 22;
const SECTION_FRAMES: u64 = (1 << SECTION_BITS) / PAGE_SIZE;

/// The image is mapped here, and is at `IMAGE`.
const IMAGE_VIRTUAL: u64 = 0xffff_ffff_a600_0000;
const IMAGE: u64 = 2 << 20;
/// Where direct map and map of memory start.
const DIRECT: u64 = 0xffff_8e47_0000_0000;
const MAP: u64 = 0xffff_ea00_0000_0000;

// What is where in the image, from its start on.
const PGD: u64 = 0x1000;
const UTS: u64 = 0x2000;
const NODES: u64 = 0x3000;
const ROOTS: u64 = 0x4000;
const DESCRIPTORS: u64 = 0x5000;
const NODE: u64 = 0x6000;
const BTF: u64 = 0x20_0011;
/// The tables below the top one.
const TABLES: u64 = 0x9000;
/// Pages of the map of memory: 4 KiB each.
const MAP_PAGES: u64 = 0x10_0000;
pub const NOTE: u64 = 0x7000;

/// What differs between versions of Linux.
#[derive(Clone, Copy, Debug)]
pub struct Version {
    pub release: &'static str,
    pub buddy: &'static str,
    pub slab: &'static str,
    pub flags: &'static [(&'static str, u32)],
    pub types: &'static [(&'static str, u32)],
    pub five_levels: bool,
    pub btf: bool,
}

/// Types are bits that are not set, slabs have a flag.
pub const LINUX_6_1: Version = Version {
    release: "6.1.0-56-cloud-amd64",
    buddy: "-129",
    slab: "NUMBER(PG_slab)=9",
    flags: &[
        ("PG_locked", 0),
        ("PG_uptodate", 2),
        ("PG_dirty", 3),
        ("PG_lru", 4),
        ("PG_slab", 9),
        ("PG_reserved", 12),
        ("PG_writeback", 15),
        ("PG_swapbacked", 19),
        ("PG_hwpoison", 22),
    ],
    types: &[],
    five_levels: false,
    btf: true,
};

/// Types are numbers in the upper byte, and slabs have one.
pub const LINUX_6_12: Version = Version {
    release: "6.12.118+deb13-cloud-amd64",
    buddy: "4026531840",
    slab: "NUMBER(PAGE_SLAB_MAPCOUNT_VALUE)=4110417920",
    flags: &[
        ("PG_locked", 0),
        ("PG_writeback", 1),
        ("PG_uptodate", 3),
        ("PG_dirty", 4),
        ("PG_lru", 5),
        ("PG_reserved", 13),
        ("PG_swapbacked", 17),
        ("PG_hwpoison", 20),
    ],
    types: &[("PGTY_buddy", 0xf0), ("PGTY_offline", 0xf1), ("PGTY_table", 0xf2), ("PGTY_slab", 0xf5)],
    five_levels: true,
    btf: true,
};

/// A `struct page`, by what tests set in it.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    pub flags: u64,
    pub head: u64,
    pub mapping: u64,
    pub private: u64,
    pub mapcount: u32,
    pub refcount: u32,
}

/// In use by the kernel, nothing else.
pub const IN_USE: Page = Page { flags: 0, head: 0, mapping: 0, private: 0, mapcount: u32::MAX, refcount: 1 };

/// In a free block, after its first.
pub const IN_FREE: Page = Page { refcount: 0, ..IN_USE };

/// A guest's memory.
pub struct Guest {
    pub bytes: Vec<u8>,
    pub version: Version,
}

impl Guest {
    /// All pages are the kernel's; nothing is free, and the zones say so.
    pub fn new(version: Version) -> Guest {
        let mut guest = Guest { bytes: vec![0; to_usize(LEN)], version };
        guest.page_tables();
        guest.note(NOTE, &guest.text());
        guest.image(UTS, &[&[0; 65][..], b"\0", version.release.as_bytes(), b"\0"].concat());
        guest.image(NODES, &(DIRECT + IMAGE + NODE).to_le_bytes());
        guest.image(NODE + 256, &2u32.to_le_bytes());
        guest.image(ROOTS, &(DIRECT + IMAGE + DESCRIPTORS).to_le_bytes());
        // Sections above 4 GiB have descriptors in the page of a root of their own.
        guest.image(ROOTS + 8 * 4, &(DIRECT + IMAGE + DESCRIPTORS + 0x800).to_le_bytes());
        for n in 0..3 {
            guest.image(DESCRIPTORS + n * 16, &(MAP | 0xf).to_le_bytes());
        }
        for n in 0..2 {
            guest.image(DESCRIPTORS + 0x800 + n * 16, &(MAP | 0xf).to_le_bytes());
        }
        if version.btf {
            guest.image(BTF, &btf_blob(version.flags, version.types));
        }
        frames().for_each(|frame| guest.page(frame, IN_USE));
        guest
    }

    /// Writes into the image.
    fn image(&mut self, at: u64, bytes: &[u8]) {
        self.write(IMAGE + at, bytes);
    }

    pub fn write(&mut self, physical: u64, bytes: &[u8]) {
        let at = to_usize(if physical < LOW { physical } else { physical - (4 << 30) + LOW });
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn page_tables(&mut self) {
        let mut next = TABLES;
        let mut top = PGD;
        if self.version.five_levels {
            // Both halves of kernel space are under the last entry of the fifth level.
            self.image(PGD + 511 * 8, &(IMAGE + next + 3).to_le_bytes());
            top = next;
            next += 0x1000;
        }
        self.map(top, &mut next, IMAGE_VIRTUAL, IMAGE, 4, true);
        for n in 0..LOW >> 21 {
            self.map(top, &mut next, DIRECT + (n << 21), n << 21, 1, true);
        }
        let map_pages = LEN / PAGE_SIZE * 64 / PAGE_SIZE;
        for n in 0..map_pages {
            let frame = n * PAGE_SIZE / 64;
            let frame = if frame < LOW / PAGE_SIZE { frame } else { frame - LOW / PAGE_SIZE + HIGH_FRAME };
            self.map(top, &mut next, MAP + frame * 64, IMAGE + MAP_PAGES + n * PAGE_SIZE, 1, false);
        }
    }

    /// Maps pages of 2 MiB or 4 KiB, with tables from `next` on.
    fn map(&mut self, top: u64, next: &mut u64, address: u64, physical: u64, count: u64, large: bool) {
        let shift = if large { 21 } else { 12 };
        for n in 0..count {
            let (address, physical) = (address + (n << shift), physical + (n << shift));
            let mut table = top;
            for level in [39, 30, 21].into_iter().filter(|level| *level > shift) {
                let at = table + (address >> level & 511) * 8;
                let place = to_usize(IMAGE + at);
                let entry = u64::from_le_bytes(self.bytes[place..place + 8].try_into().unwrap());
                table = if entry == 0 {
                    let fresh = *next;
                    *next += 0x1000;
                    self.image(at, &(IMAGE + fresh + 3).to_le_bytes());
                    fresh
                } else {
                    (entry & !0xfff) - IMAGE
                };
            }
            let entry = physical | if large { 0x83 } else { 3 };
            self.image(table + (address >> shift & 511) * 8, &entry.to_le_bytes());
        }
        assert!(*next < MAP_PAGES);
    }

    /// The text of its note.
    pub fn text(&self) -> String {
        let flag = |name: &str| self.version.flags.iter().find(|(flag, _)| *flag == name).unwrap().1;
        let symbol = |at: u64| IMAGE_VIRTUAL + at;
        format!(
            "OSRELEASE={}\nPAGESIZE=4096\nSYMBOL(init_uts_ns)={:x}\nSYMBOL(swapper_pg_dir)={:x}\nSYMBOL(_stext)={IMAGE_VIRTUAL:x}\n\
             SYMBOL(mem_section)={:x}\nLENGTH(mem_section)=8\nSIZE(mem_section)=16\nOFFSET(mem_section.section_mem_map)=0\n\
             NUMBER(SECTION_SIZE_BITS)={SECTION_BITS}\nSIZE(page)=64\nOFFSET(page.flags)=0\nOFFSET(page._refcount)=52\n\
             OFFSET(page.mapping)=24\nOFFSET(page._mapcount)=48\nOFFSET(page.private)=40\nOFFSET(page.compound_head)=8\n\
             SIZE(zone)=64\nOFFSET(pglist_data.node_zones)=0\nOFFSET(pglist_data.nr_zones)=256\nOFFSET(zone.vm_stat)=16\n\
             NUMBER(NR_FREE_PAGES)=0\nLENGTH(zone.free_area)=11\nSYMBOL(node_data)={:x}\nLENGTH(node_data)=4\n\
             NUMBER(PG_lru)={}\nNUMBER(PG_swapbacked)={}\n{}\nNUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)={}\n\
             NUMBER(phys_base)={}\nNUMBER(pgtable_l5_enabled)={}\nNUMBER(sme_mask)=0\n",
            self.version.release,
            symbol(UTS),
            symbol(PGD),
            symbol(ROOTS),
            symbol(NODES),
            flag("PG_lru"),
            flag("PG_swapbacked"),
            self.version.slab,
            self.version.buddy,
            IMAGE.cast_signed() - (IMAGE_VIRTUAL - 0xffff_ffff_8000_0000).cast_signed(),
            u8::from(self.version.five_levels),
        )
    }

    /// Puts a note somewhere.
    pub fn note(&mut self, physical: u64, text: &str) {
        let mut bytes = 11u32.to_le_bytes().to_vec();
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(b"VMCOREINFO\0\0");
        bytes.extend(text.as_bytes());
        self.write(physical, &bytes);
    }

    /// Where the `struct page` of a page is, in virtual memory.
    pub fn address(frame: u64) -> u64 {
        MAP + frame * 64
    }

    /// Where it is in the block.
    pub fn place(frame: u64) -> usize {
        let n = if frame < HIGH_FRAME { frame } else { frame - HIGH_FRAME + LOW / PAGE_SIZE };
        to_usize(IMAGE + MAP_PAGES + n * 64)
    }

    pub fn page(&mut self, frame: u64, page: Page) {
        let at = Self::place(frame);
        let bytes = &mut self.bytes[at..at + 64];
        bytes[0..8].copy_from_slice(&page.flags.to_le_bytes());
        bytes[8..16].copy_from_slice(&page.head.to_le_bytes());
        bytes[24..32].copy_from_slice(&page.mapping.to_le_bytes());
        bytes[40..48].copy_from_slice(&page.private.to_le_bytes());
        bytes[48..52].copy_from_slice(&page.mapcount.to_le_bytes());
        bytes[52..56].copy_from_slice(&page.refcount.to_le_bytes());
    }

    /// The first page of a free block.
    pub fn free_head(&self, order: u64) -> Page {
        let mapcount = self.version.buddy.parse::<i64>().unwrap() as u32;
        Page { mapcount, private: order, ..IN_FREE }
    }

    pub fn free_block(&mut self, frame: u64, order: u64) {
        self.page(frame, self.free_head(order));
        (1..1 << order).for_each(|n| self.page(frame + n, IN_FREE));
    }

    /// What the second of the two zones counts as free.
    pub fn counted(&mut self, free: i64) {
        self.image(NODE + 64 + 16, &free.to_le_bytes());
    }

    /// The bit of a flag.
    pub fn flag(&self, name: &str) -> u64 {
        1 << self.version.flags.iter().find(|(flag, _)| *flag == name).unwrap().1
    }

    pub fn look(&self) -> Result<Introspection, Doubt> {
        self.look_at(None)
    }

    pub fn look_at(&self, note: Option<u64>) -> Result<Introspection, Doubt> {
        let layout = Layout::with_split(LEN, LOW).unwrap();
        introspect(&BlockMemory::new(layout, &self.bytes).unwrap(), &layout, note)
    }
}

/// Numbers of all pages, in the order of the block.
pub fn frames() -> impl Iterator<Item = u64> {
    (0..LOW / PAGE_SIZE).chain((0..(LEN - LOW) / PAGE_SIZE).map(|n| HIGH_FRAME + n))
}

const _: () = assert!(HIGH_FRAME / SECTION_FRAMES == 4 * 256, "the first section above 4 GiB is the first of root 4");

/// Types and strings: an int, a struct, then the enumerations.
pub fn btf(flags: &[(&str, u32)], types: &[(&str, u32)]) -> (Vec<u8>, Vec<u8>) {
    let mut strings = b"\0int\0".to_vec();
    let mut out = Vec::new();
    let word = |out: &mut Vec<u8>, value: u32| out.extend(value.to_le_bytes());
    for value in [1, 1 << 24, 4, 32, 1, 4 << 24 | 2, 8, 1, 1, 0, 1, 1, 32, 0, 3 << 24, 0, 1, 1, 4] {
        word(&mut out, value);
    }
    for (name, members) in [("pageflags", flags), ("pagetype", types)] {
        word(&mut out, strings.len() as u32);
        strings.extend([name.as_bytes(), b"\0"].concat());
        word(&mut out, 6 << 24 | members.len() as u32);
        word(&mut out, 4);
        for (name, value) in members {
            word(&mut out, strings.len() as u32);
            strings.extend([name.as_bytes(), b"\0"].concat());
            word(&mut out, *value);
        }
    }
    (out, strings)
}

/// The same as a kernel has it: with a header, and as large as those of a whole kernel.
pub fn btf_blob(flags: &[(&str, u32)], types: &[(&str, u32)]) -> Vec<u8> {
    let (mut kinds, mut strings) = btf(flags, types);
    // Pointers, and strings that nobody names.
    while kinds.len() < 256 << 10 {
        kinds.extend([0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0]);
    }
    strings.resize(256 << 10, 0);
    let mut out = vec![0x9f, 0xeb, 1, 0];
    for value in [24, 0, kinds.len() as u32, kinds.len() as u32, strings.len() as u32] {
        out.extend(value.to_le_bytes());
    }
    out.extend(kinds);
    out.extend(strings);
    out
}
