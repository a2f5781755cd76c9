//! What a guest's kernel uses each page of its memory for, seen from outside: no agent in the guest, no debug symbols.
//!
//! ```text
//!  RAM ── scan ──▶ vmcoreinfo   note that each Linux keeps for crash dumps: symbols, offsets, phys_base (KASLR)
//!                      │
//!                  pagetable    kernel addresses → guest-physical ones, 4 or 5 levels
//!                      │
//!                  memmap       sections → one struct page for each page     btf: numbers of the page flags
//!                      │                                                      │
//!                  classify     struct page → Class  ◀───────────────────────┘
//!                      │
//!                  zones        as many pages free as the kernel itself counts, or none of it is believed
//! ```
//!
//! All input comes from the guest and may be wrong or hostile: every read is checked, every loop has an end that the guest does not
//! choose, and what makes no sense ends in [`Doubt`] or [`Class::Unknown`]. A guest that lies can spoil its own pages alone. With a
//! [`Doubt`] every page counts as [`Class::Unknown`], which nobody may lose.
//!
//! Nothing here reads files or sockets: the caller gives memory as [`GuestMemory`], and where it lies as [`Layout`].

pub mod btf;
pub mod classify;
pub mod layout;
pub mod memmap;
pub mod pagetable;
pub mod vmcoreinfo;
pub mod zones;

#[cfg(test)]
pub(crate) mod synthetic;
#[cfg(test)]
mod tests;

pub use layout::{BlockMemory, Layout};

use crate::units::is_zero;
use classify::{Classifier, Rules};
use memmap::MemMap;
use pagetable::PageTables;
use std::fmt;
use vmcoreinfo::Facts;

/// Bytes of a page of x86-64.
pub const PAGE_SIZE: u64 = 4096;

/// Memory of a guest, by guest-physical address.
pub trait GuestMemory {
    /// Fills `buf` with what is at this guest-physical address. False when any byte of it is no RAM; `buf` is then of no use.
    fn read(&self, physical: u64, buf: &mut [u8]) -> bool;
}

/// A little-endian u64 of guest memory.
fn read_u64(memory: &impl GuestMemory, physical: u64) -> Option<u64> {
    let mut bytes = [0; 8];
    memory.read(physical, &mut bytes).then(|| u64::from_le_bytes(bytes))
}

/// What a page is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// All its bytes are zero, whatever it is used for: [`Class::with_content`] alone says so.
    Zero,
    /// In the buddy allocator: nobody uses it, and whoever gets it does not expect what is in it.
    Free,
    /// Page cache of a file or block device, read or written back. Not to be lost because of that: see [`Class::may_be_lost`].
    CacheClean,
    /// Page cache that is not on disk yet, or on its way there; or, without BTF, any page cache.
    CacheDirty,
    /// Page cache that is not read as a whole. Parts of it may be: file systems read their own metadata by blocks, and the page that
    /// holds them is never marked as read.
    CacheNotUptodate,
    /// Objects of the kernel.
    Slab,
    /// Page tables of processes.
    PageTable,
    /// Of a process, and of no file.
    Anon,
    /// tmpfs, shared anonymous memory.
    Shmem,
    /// Any other page that is in use: stacks of the kernel, per-CPU lists, drivers, huge pages of hugetlbfs.
    Kernel,
    /// Never given to the allocator: the kernel's image, firmware, its map of memory.
    Reserved,
    /// No struct page, or one that makes no sense.
    Unknown,
}

impl Class {
    /// All classes, in the order in which tables show them.
    pub const ALL: [Class; 12] = [
        Class::Zero,
        Class::Free,
        Class::CacheClean,
        Class::CacheDirty,
        Class::CacheNotUptodate,
        Class::Slab,
        Class::PageTable,
        Class::Anon,
        Class::Shmem,
        Class::Kernel,
        Class::Reserved,
        Class::Unknown,
    ];

    /// Its name in tables, JSON and manifests.
    pub fn name(self) -> &'static str {
        match self {
            Class::Zero => "zero",
            Class::Free => "free",
            Class::CacheClean => "cache-clean",
            Class::CacheDirty => "cache-dirty",
            Class::CacheNotUptodate => "cache-not-uptodate",
            Class::Slab => "slab",
            Class::PageTable => "page-table",
            Class::Anon => "anon",
            Class::Shmem => "shmem",
            Class::Kernel => "kernel",
            Class::Reserved => "reserved",
            Class::Unknown => "unknown",
        }
    }

    /// The class when this is what is in the page.
    ///
    /// A kernel that runs with `page_poison` fills free pages with a pattern and looks for it when it gives them out: such a page
    /// must come back as it was, and is not [`Class::Free`].
    #[must_use]
    pub fn with_content(self, page: &[u8]) -> Class {
        if is_zero(page) {
            return Class::Zero;
        }
        let poisoned = || page.iter().all(|byte| *byte == POISON);
        if self == Class::Free && poisoned() { Class::Unknown } else { self }
    }

    /// Whether the guest does not notice when the page comes back as zeros.
    ///
    /// Clean page cache is not among these: the guest believes that it holds the file, and would read zeros from it. It may be
    /// lost only where it is filled again with the same content, found by its hash.
    pub fn may_be_lost(self) -> bool {
        matches!(self, Class::Zero | Class::Free)
    }

    /// Whether PARS keeps one copy of it only: free pages and page cache that is on disk.
    pub fn paper_keeps_once(self) -> bool {
        matches!(self, Class::Zero | Class::Free | Class::CacheClean)
    }
}

/// What Linux fills free pages with when it runs with `page_poison` (PAGE_POISON of linux/poison.h).
const POISON: u8 = 0xaa;

/// Why nothing is known of any page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// No note of a kernel that runs; how many there were that fit none.
    NoNote {
        /// Notes that were found and not believed.
        refused: usize,
    },
    /// More than one kernel seems to run in this memory.
    SeveralKernels,
    /// The note lacks this, or has a value there that cannot be.
    Field(&'static str),
    /// The guest's memory is encrypted.
    Encrypted,
    /// What the note names is not where its page tables say.
    PageTables,
    /// The kernel's name for itself is not where the note says.
    OtherKernel,
    /// The zones' counters cannot be read.
    Zones,
    /// Not as many pages are free as the kernel counts.
    Count {
        /// Pages found free.
        found: u64,
        /// Pages free by the kernel's counters.
        counted: u64,
    },
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Doubt::NoNote { refused: 0 } => f.write_str("no VMCOREINFO of a Linux kernel in memory"),
            Doubt::NoNote { refused } => write!(f, "{refused} VMCOREINFO in memory, none of the kernel that runs"),
            Doubt::SeveralKernels => f.write_str("more than one VMCOREINFO looks like that of the kernel that runs"),
            Doubt::Field(name) => write!(f, "VMCOREINFO has no {name} that makes sense"),
            Doubt::Encrypted => f.write_str("the guest's memory is encrypted"),
            Doubt::PageTables => f.write_str("the kernel's page tables are not where VMCOREINFO says"),
            Doubt::OtherKernel => f.write_str("the kernel in memory is not the one of VMCOREINFO"),
            Doubt::Zones => f.write_str("the kernel's counters of free pages cannot be read"),
            Doubt::Count { found, counted } => write!(f, "{found} pages look free, the kernel counts {counted}"),
        }
    }
}

/// What is known of a guest's memory.
#[derive(Clone, Debug)]
pub struct Introspection {
    /// Release of the kernel, as `uname -r` prints it.
    pub release: String,
    /// Whether its BTF was found; without it all page cache is [`Class::CacheDirty`].
    pub btf: bool,
    /// What the kernel counts as free, in pages.
    pub free_counted: u64,
    /// A class for each page of RAM, in the order of the RAM block. Content was not looked at: none is [`Class::Zero`].
    pub classes: Vec<Class>,
}

/// Looks into a guest that stands still. `note` is where `-device vmcoreinfo` was told that the note is, a guest-physical address;
/// without it all of RAM is looked through.
///
/// # Errors
/// [`Doubt`]: nothing is known, and every page counts as [`Class::Unknown`].
pub fn introspect(
    memory: &impl GuestMemory,
    layout: &Layout,
    note: Option<u64>,
) -> std::result::Result<Introspection, Doubt> {
    let facts = vmcoreinfo::find(memory, layout, note)?;
    let tables = facts.page_tables(memory);
    let enums = btf::find(memory, facts.image_start());
    let map = MemMap::new(&tables, &facts);
    let rules = Rules::new(&facts, enums.as_ref());
    let mut classes = Vec::new();
    for range in layout.ranges() {
        let mut classifier = Classifier::new(&rules, &tables);
        map.each(range.physical / PAGE_SIZE, range.len / PAGE_SIZE, |frame, at, page| {
            classes.push(classifier.class(frame, at, page));
        });
    }
    let found = classes.iter().filter(|class| **class == Class::Free).count() as u64;
    let counted = zones::free_pages(&tables, &facts).ok_or(Doubt::Zones)?;
    if found.abs_diff(counted) > zones::tolerance(classes.len() as u64) {
        return Err(Doubt::Count { found, counted });
    }
    Ok(Introspection { release: facts.release, btf: enums.is_some(), free_counted: counted, classes })
}

impl Facts {
    fn page_tables<'a, M: GuestMemory>(&self, memory: &'a M) -> PageTables<'a, M> {
        PageTables::new(memory, self.page_directory(), self.five_levels)
    }
}
