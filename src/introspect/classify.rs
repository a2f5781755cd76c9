//! From `struct page` to class: the rules.
//!
//! The first that fits decides:
//!
//! | what the page has | class |
//! | --- | --- |
//! | no `struct page` that can be read | unknown |
//! | in a free block: its first page has the buddy's type, a sane order and no user | free; a page in it that has a user: unknown |
//! | bit 0 of `compound_head` | that of its head |
//! | `PG_hwpoison` | unknown |
//! | `PG_reserved` | reserved |
//! | `PG_slab` (before 6.10), type of slabs (since) | slab |
//! | type of page tables | page-table |
//! | any other type (balloon, guard, huge pages of hugetlbfs since 6.10) | kernel |
//! | bit 0 of `mapping` | anon |
//! | `PG_lru` and `PG_swapbacked` | shmem |
//! | `PG_lru`, `PG_dirty` or `PG_writeback` (or no BTF) | cache-dirty |
//! | `PG_lru`, not `PG_uptodate` | cache-not-uptodate |
//! | `PG_lru` | cache-clean |
//! | nothing of that | kernel |

use super::btf::Enums;
use super::pagetable::PageTables;
use super::vmcoreinfo::PageFields;
use super::{Class, Facts, GuestMemory};

/// `_mapcount` of a page that has no type and is not mapped.
const NO_TYPE: u32 = u32::MAX;
/// From this on `_mapcount` is a type: no page is mapped 2 billion times.
const TYPES: u32 = 0x8000_0000;
/// Pages of the largest compound page: 1 GiB.
const COMPOUND_MAX: u64 = 1 << 18;

/// A type of pages, in the field that else counts mappings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Type {
    /// A bit that is clear, before Linux 6.12; a page may have several types.
    Bit(u32),
    /// The upper byte, from 6.12 on.
    Number(u32),
}

impl Type {
    /// Of the value that a page has which has this type alone.
    fn of(value: u32) -> Type {
        if value & 0x00ff_ffff == 0 { Type::Number(value >> 24) } else { Type::Bit(!value) }
    }

    fn is(self, mapcount: u32) -> bool {
        match self {
            Type::Bit(bit) => mapcount >= TYPES && mapcount & bit == 0,
            Type::Number(number) => mapcount >> 24 == number,
        }
    }
}

/// How types of pages are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Types {
    buddy: Type,
    slab: Option<Type>,
    table: Option<Type>,
}

impl Types {
    fn new(facts: &Facts, enums: Option<&Enums>) -> Types {
        let named = |name| enums?.page_type(name);
        let buddy = Type::of(facts.buddy_type);
        let table = match (buddy, named("PGTY_table"), named("PG_table")) {
            (Type::Number(_), Some(number), _) => Some(Type::Number(number)),
            (Type::Number(_), None, _) => None,
            (Type::Bit(_), _, Some(bit)) => Some(Type::Bit(bit)),
            // Without a name for it: the bits for the buddy, for offline pages and for tables follow each other, and before Linux
            // 5.11 there was one more in front of that for tables.
            (Type::Bit(buddy), ..) => Some(Type::Bit(buddy << if facts.before(5, 11) { 3 } else { 2 })),
        };
        Types { buddy, slab: facts.slab_type.map(Type::of), table }
    }
}

/// Masks of page flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Flags {
    lru: u64,
    swapbacked: u64,
    slab: u64,
    reserved: u64,
    hwpoison: u64,
    /// Those of page cache, which the note does not have.
    cache: Option<CacheFlags>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct CacheFlags {
    dirty: u64,
    uptodate: u64,
}

impl Flags {
    fn new(facts: &Facts, enums: Option<&Enums>) -> Flags {
        let named = |name| enums?.flag(name).map(|bit| 1 << bit);
        let cache = || {
            let dirty = named("PG_dirty")? | named("PG_writeback")?;
            Some(CacheFlags { dirty, uptodate: named("PG_uptodate")? })
        };
        Flags {
            lru: 1 << facts.lru,
            swapbacked: 1 << facts.swapbacked,
            slab: facts.slab_flag.map_or(0, |bit| 1 << bit),
            reserved: named("PG_reserved").unwrap_or(0),
            hwpoison: named("PG_hwpoison").unwrap_or(0),
            cache: cache(),
        }
    }
}

/// The rules, with the numbers of one kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    fields: PageFields,
    types: Types,
    flags: Flags,
    orders: u64,
}

/// What the rules look at.
#[derive(Clone, Copy, Debug)]
struct Page {
    flags: u64,
    mapping: u64,
    private: u64,
    head: u64,
    mapcount: u32,
    refcount: u32,
}

impl Rules {
    /// Of this kernel; without `enums` all page cache is dirty.
    pub fn new(facts: &Facts, enums: Option<&Enums>) -> Rules {
        Rules {
            fields: facts.page,
            types: Types::new(facts, enums),
            flags: Flags::new(facts, enums),
            orders: facts.orders,
        }
    }

    fn page(&self, bytes: &[u8]) -> Option<Page> {
        let long = |at| Some(u64::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        let int = |at| Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?));
        Some(Page {
            flags: long(self.fields.flags)?,
            mapping: long(self.fields.mapping)?,
            private: long(self.fields.private)?,
            head: long(self.fields.compound_head)?,
            mapcount: int(self.fields.mapcount)?,
            refcount: int(self.fields.refcount)?,
        })
    }

    /// How many pages the free block has that starts with this one, if one does.
    fn free_block(&self, frame: u64, page: &Page) -> Option<u64> {
        let sane = self.types.buddy.is(page.mapcount) && page.refcount == 0 && page.private < self.orders;
        let pages = sane.then(|| 1 << page.private)?;
        frame.is_multiple_of(pages).then_some(pages)
    }

    /// Whether a page after the first of a free block looks as if nobody used it.
    fn unused(&self, page: &Page) -> bool {
        let used = self.flags.lru | self.flags.slab | self.flags.reserved | self.flags.hwpoison;
        page.refcount == 0 && page.mapcount == NO_TYPE && page.flags & used == 0 && page.head & 1 == 0
    }

    /// The class of a page that is neither free nor a tail.
    fn class_in_use(&self, page: &Page) -> Class {
        let has = |flag: u64| page.flags & flag != 0;
        if has(self.flags.hwpoison) || self.types.buddy.is(page.mapcount) {
            return Class::Unknown;
        }
        if has(self.flags.reserved) {
            return Class::Reserved;
        }
        let is = |kind: Option<Type>| kind.is_some_and(|kind| kind.is(page.mapcount));
        if has(self.flags.slab) || is(self.types.slab) {
            return Class::Slab;
        }
        if is(self.types.table) {
            return Class::PageTable;
        }
        if page.mapcount >= TYPES && page.mapcount != NO_TYPE {
            return Class::Kernel;
        }
        if page.mapping & 1 != 0 {
            return Class::Anon;
        }
        match self.flags.cache {
            _ if !has(self.flags.lru) => Class::Kernel,
            _ if has(self.flags.swapbacked) => Class::Shmem,
            None => Class::CacheDirty,
            Some(cache) if has(cache.dirty) => Class::CacheDirty,
            Some(cache) if !has(cache.uptodate) => Class::CacheNotUptodate,
            Some(_) => Class::CacheClean,
        }
    }
}

/// Goes through pages in order.
#[derive(Debug)]
pub struct Classifier<'a, M> {
    rules: &'a Rules,
    tables: &'a PageTables<'a, M>,
    /// The page after the free block that this one may be in.
    free_until: u64,
    /// Address of the last head that was looked up, and its class.
    head: (u64, Class),
}

impl<'a, M: GuestMemory> Classifier<'a, M> {
    /// Starts before any page.
    pub fn new(rules: &'a Rules, tables: &'a PageTables<'a, M>) -> Self {
        Classifier { rules, tables, free_until: 0, head: (0, Class::Unknown) }
    }

    /// The class of the next page: its number, the address of its `struct page`, and its bytes.
    pub fn class(&mut self, frame: u64, at: u64, bytes: Option<&[u8]>) -> Class {
        let Some(page) = bytes.and_then(|bytes| self.rules.page(bytes)) else { return Class::Unknown };
        if frame < self.free_until {
            return if self.rules.unused(&page) { Class::Free } else { Class::Unknown };
        }
        if let Some(pages) = self.rules.free_block(frame, &page) {
            self.free_until = frame + pages;
            return Class::Free;
        }
        match page.head {
            head if head & 1 != 0 => self.class_of_head(at, head - 1),
            _ => self.rules.class_in_use(&page),
        }
    }

    /// The class of a tail: that of its head, which lies before it in the same array.
    fn class_of_head(&mut self, tail: u64, head: u64) -> Class {
        let size = self.rules.fields.size;
        let pages = tail.checked_sub(head).map_or(0, |distance| distance / size as u64);
        if pages == 0 || pages >= COMPOUND_MAX || tail - head != pages * size as u64 {
            return Class::Unknown;
        }
        if self.head.0 != head {
            let mut bytes = vec![0; size];
            let page = self.tables.read(head, &mut bytes).then(|| self.rules.page(&bytes)).flatten();
            let class =
                page.filter(|page| page.head & 1 == 0).map_or(Class::Unknown, |page| self.rules.class_in_use(&page));
            self.head = (head, class);
        }
        self.head.1
    }
}
