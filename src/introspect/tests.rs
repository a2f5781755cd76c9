use super::synthetic::{
    Guest, HIGH_FRAME, IN_FREE, IN_USE, LEN, LINUX_6_1, LINUX_6_12, LOW, NOTE, Page, Version, frames,
};
use super::*;
use crate::units::to_usize;
use proptest::prelude::*;

const VERSIONS: [Version; 2] = [LINUX_6_1, LINUX_6_12];

/// The class of a page with this number.
fn class(guest: &Guest, frame: u64) -> Class {
    let seen = guest.look().unwrap();
    assert_eq!(seen.classes.len() as u64, LEN / PAGE_SIZE);
    let n = if frame < HIGH_FRAME { frame } else { frame - HIGH_FRAME + LOW / PAGE_SIZE };
    seen.classes[to_usize(n)]
}

/// `_mapcount` of a page of this type.
fn type_of(version: &Version, numbered: u32, bit: u32) -> u32 {
    if version.types.is_empty() { !bit } else { numbered << 24 }
}

#[test]
fn each_rule_gives_its_class() {
    for version in VERSIONS {
        let mut guest = Guest::new(version);
        let flag = |name| guest.flag(name);
        let (lru, uptodate, dirty) = (flag("PG_lru"), flag("PG_uptodate"), flag("PG_dirty"));
        let file = 0xffff_8e47_0012_3450;
        let table = Page { mapcount: type_of(&version, 0xf2, 0x200), ..IN_USE };
        let offline = Page { mapcount: type_of(&version, 0xf1, 0x100), ..IN_USE };
        let slab = if version.types.is_empty() {
            Page { flags: flag("PG_slab"), mapcount: 17, ..IN_USE }
        } else {
            Page { mapcount: 0xf500_0000, ..IN_USE }
        };
        let cases = [
            (IN_USE, Class::Kernel),
            (Page { flags: flag("PG_reserved"), ..IN_USE }, Class::Reserved),
            (Page { flags: flag("PG_hwpoison"), ..IN_USE }, Class::Unknown),
            (slab, Class::Slab),
            (table, Class::PageTable),
            (offline, Class::Kernel),
            (Page { flags: lru | uptodate, mapping: file | 1, mapcount: 0, ..IN_USE }, Class::Anon),
            (Page { flags: lru | uptodate | dirty, mapping: file | 3, mapcount: 2, ..IN_USE }, Class::Anon),
            (Page { flags: lru | uptodate | dirty | flag("PG_swapbacked"), mapping: file, ..IN_USE }, Class::Shmem),
            (Page { flags: lru | uptodate, mapping: file, ..IN_USE }, Class::CacheClean),
            (Page { flags: lru | uptodate, mapping: file, mapcount: 3, ..IN_USE }, Class::CacheClean),
            (Page { flags: lru | uptodate | dirty, mapping: file, ..IN_USE }, Class::CacheDirty),
            (Page { flags: lru | uptodate | flag("PG_writeback"), mapping: file, ..IN_USE }, Class::CacheDirty),
            (Page { flags: lru | flag("PG_locked"), mapping: file, ..IN_USE }, Class::CacheNotUptodate),
        ];
        // Below and above 4 GiB, in different sections.
        for first in [3000, HIGH_FRAME + 1500] {
            for (n, (page, _)) in (first..).zip(&cases) {
                guest.page(n, *page);
            }
            for (n, (page, expected)) in (first..).zip(&cases) {
                assert_eq!(class(&guest, n), *expected, "{}: {page:x?}", version.release);
            }
        }
    }
}

#[test]
fn page_tables_of_older_kernels_have_another_bit() {
    let mut guest = Guest::new(Version { release: "5.10.0-32-cloud-amd64", ..LINUX_6_1 });
    // Charged to a group of processes: that is a type of its own there, and a page may have both.
    for (frame, clear, expected) in
        [(3000, 0x400, Class::PageTable), (3001, 0x600, Class::PageTable), (3002, 0x200, Class::Kernel)]
    {
        guest.page(frame, Page { mapcount: !clear, ..IN_USE });
        assert_eq!(class(&guest, frame), expected, "{clear:x}");
    }
}

#[test]
fn free_blocks_are_free_as_far_as_they_are_sane() {
    for version in VERSIONS {
        let mut guest = Guest::new(version);
        guest.free_block(2816, 6);
        guest.free_block(2816 + 64, 0);
        guest.free_block(HIGH_FRAME, 10);
        guest.counted(64 + 1 + 1024);
        let seen = guest.look().unwrap();
        assert_eq!(seen.free_counted, 1089);
        let free: Vec<u64> = frames().zip(&seen.classes).filter(|(_, c)| **c == Class::Free).map(|(n, _)| n).collect();
        let expected: Vec<u64> = (2816..2881).chain(HIGH_FRAME..HIGH_FRAME + 1024).collect();
        assert_eq!(free, expected, "{}", version.release);

        // One in it has a user, one is on a list, one has a type.
        guest.page(2820, Page { refcount: 1, ..IN_FREE });
        guest.page(2821, Page { flags: guest.flag("PG_lru"), ..IN_FREE });
        guest.page(2822, guest.free_head(0));
        // A block that is not where its order has it, one of no order, one in use.
        guest.page(2801, guest.free_head(1));
        guest.page(2802, guest.free_head(11));
        guest.page(2803, Page { refcount: 1, ..guest.free_head(0) });
        for frame in [2820, 2821, 2822, 2801, 2802, 2803] {
            assert_eq!(class(&guest, frame), Class::Unknown, "{}: {frame}", version.release);
        }
        assert_eq!(class(&guest, 2823), Class::Free);
    }
}

#[test]
fn a_tail_is_what_its_head_is() {
    let mut guest = Guest::new(LINUX_6_12);
    let first = HIGH_FRAME + 1024;
    guest.page(first, Page { mapping: 0xffff_8e47_0000_1001, mapcount: 0, ..IN_USE });
    for n in 1..512 {
        guest.page(first + n, Page { head: Guest::address(first) | 1, ..IN_FREE });
    }
    // A head that is a tail, one after its tail, one between two pages, one that is not mapped.
    let wrong = [Guest::address(first + 1) | 1, Guest::address(first + 600) | 1, Guest::address(first) + 9, 0x1001];
    for (n, head) in (513..).zip(wrong) {
        guest.page(first + n, Page { head, ..IN_FREE });
        assert_eq!(class(&guest, first + n), Class::Unknown, "{n}");
    }
    let seen = guest.look().unwrap();
    assert_eq!(seen.classes.iter().filter(|class| **class == Class::Anon).count(), 512);
}

#[test]
fn without_btf_all_page_cache_is_dirty() {
    let mut guest = Guest::new(Version { btf: false, ..LINUX_6_1 });
    guest.page(2900, Page { flags: guest.flag("PG_lru") | guest.flag("PG_uptodate"), mapping: 16, ..IN_USE });
    assert_eq!(class(&guest, 2900), Class::CacheDirty);
    assert!(!guest.look().unwrap().btf);
}

#[test]
fn a_map_that_does_not_count_as_the_kernel_does_is_not_believed() {
    let mut guest = Guest::new(LINUX_6_1);
    guest.free_block(2048, 10);
    let tolerance = zones::tolerance(LEN / PAGE_SIZE).cast_signed();
    guest.counted(1024 + tolerance);
    assert!(guest.look().is_ok());
    guest.counted(1024 + tolerance + 1);
    assert_eq!(guest.look().unwrap_err(), Doubt::Count { found: 1024, counted: 2049 + LEN / PAGE_SIZE / 64 });
    guest.counted(-5);
    assert!(guest.look().is_ok(), "counters of the processors may make a small one negative");
    guest.counted(i64::MAX);
    assert!(guest.look().is_err());
}

#[test]
fn a_note_is_believed_when_its_kernel_runs() {
    let mut guest = Guest::new(LINUX_6_1);
    let whole = guest.look().unwrap();
    assert_eq!(whole.release, LINUX_6_1.release);
    assert_eq!(guest.look_at(Some(NOTE)).unwrap().classes, whole.classes);
    assert_eq!(guest.look_at(Some(NOTE + PAGE_SIZE)).unwrap_err(), Doubt::NoNote { refused: 0 });

    // Left from another kernel, from one that KASLR had put elsewhere, and without a header.
    let text = guest.text();
    guest.note(0x8000, &text.replace("6.1.0-56", "6.1.0-55"));
    guest.note(0xa000, &text.replace("NUMBER(phys_base)=-", "NUMBER(phys_base)=-1"));
    guest.write(0xc000, text.as_bytes());
    assert_eq!(guest.look().unwrap().classes, whole.classes);
    assert_eq!(guest.look_at(Some(0x8000)).unwrap_err(), Doubt::OtherKernel);
    assert_eq!(guest.look_at(Some(0xa000)).unwrap_err(), Doubt::PageTables);

    // A copy of the note is no second kernel; one that says something else is.
    guest.note(0xe000, &text);
    assert_eq!(guest.look().unwrap().classes, whole.classes);
    guest.note(0xe000, &text.replace("LENGTH(zone.free_area)=11", "LENGTH(zone.free_area)=12"));
    assert_eq!(guest.look().unwrap_err(), Doubt::SeveralKernels);

    guest.note(NOTE, "OSRELEASE=4");
    guest.note(0xe000, "OSRELEASE=4");
    assert_eq!(guest.look().unwrap_err(), Doubt::NoNote { refused: 4 });
}

#[test]
fn an_encrypted_guest_and_lines_that_cannot_be_are_refused() {
    let guest = Guest::new(LINUX_6_12);
    let text = guest.text();
    let parse = |from: &str, to: &str| vmcoreinfo::Facts::parse(&text.replace(from, to)).err();
    assert_eq!(parse("sme_mask)=0", "sme_mask)=140737488355328"), Some(Doubt::Encrypted));
    for line in text.lines().filter(|line| !line.contains("sme_mask") && !line.contains("SLAB")) {
        assert!(parse(line, "").is_some(), "goes without {line}");
        let (key, _) = line.split_once('=').unwrap();
        assert!(parse(line, &format!("{key}=")).is_some(), "takes nothing for {line}");
        if !line.starts_with("OSRELEASE") && !line.contains("phys_base") {
            assert!(parse(line, &format!("{key}=99999999999")).is_some(), "takes any number for {line}");
        }
    }
}

#[test]
fn content_decides_what_is_zero_and_what_is_poisoned() {
    let mut page = [0; 4096];
    for class in Class::ALL {
        assert_eq!(class.with_content(&page), Class::Zero);
    }
    page[4095] = 1;
    assert_eq!(Class::Free.with_content(&page), Class::Free);
    page.fill(0xaa);
    assert_eq!(Class::Free.with_content(&page), Class::Unknown, "a kernel with page_poison looks for this");
    assert_eq!(Class::Anon.with_content(&page), Class::Anon);
    assert!(Class::ALL.iter().all(|class| !class.may_be_lost() || matches!(class, Class::Free | Class::Zero)));
}

/// Memory with some of everything, to be spoilt.
fn furnished(version: Version) -> Guest {
    let mut guest = Guest::new(version);
    guest.free_block(2048, 9);
    guest.counted(512);
    guest.page(3000, Page { flags: guest.flag("PG_lru"), mapping: 0xffff_8e47_0000_0010, ..IN_USE });
    (1..8).for_each(|n| guest.page(3000 + n, Page { head: Guest::address(3000) | 1, ..IN_FREE }));
    guest
}

proptest! {
    // Each case looks through 20 MiB.
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Bytes of tables, note and map are wrong: what comes out is a doubt, or a class for each page; and pages that were in use
    /// and whose own `struct page` is not touched are never free.
    #[test]
    fn spoilt_memory_is_no_trap(
        new in any::<bool>(),
        spoilt in prop::collection::vec((0u64..0x16_0000, any::<u64>(), prop::bool::ANY), 1..30),
    ) {
        let mut guest = furnished(if new { LINUX_6_12 } else { LINUX_6_1 });
        for (at, value, in_tables) in &spoilt {
            // Half of it where page tables, sections, zones and the note are.
            let at = if *in_tables { 0x1000 + at % 0x20_f000 } else { (2 << 20) + at };
            guest.write(at & !7, &value.to_le_bytes());
        }
        if let Ok(seen) = guest.look() {
            prop_assert_eq!(seen.classes.len() as u64, LEN / PAGE_SIZE);
        }
        let _ = guest.look_at(Some(spoilt[0].1));
    }

    /// Lines of the note are wrong.
    #[test]
    fn a_spoilt_note_is_no_trap(line in 0usize..33, value: u64, hex: bool) {
        let mut guest = furnished(LINUX_6_1);
        let text = guest.text();
        let key = text.lines().nth(line).and_then(|line| line.split_once('=')).map_or("X", |(key, _)| key);
        let value = if hex { format!("{value:x}") } else { (value.cast_signed() >> (value % 60)).to_string() };
        let spoilt: String = text
            .lines()
            .map(|line| if line.starts_with(&format!("{key}=")) { format!("{key}={value}\n") } else { format!("{line}\n") })
            .collect();
        guest.note(NOTE, &spoilt);
        if let Ok(seen) = guest.look() {
            prop_assert_eq!(seen.classes.len() as u64, LEN / PAGE_SIZE);
        }
    }

    /// Any bytes as the `struct page` of a page.
    #[test]
    fn any_struct_page_has_a_class(bytes in prop::array::uniform32(any::<u64>()), first in 2600u64..3000) {
        let mut guest = furnished(LINUX_6_12);
        let at = Guest::place(first);
        let words: Vec<u8> = bytes.iter().flat_map(|word| word.to_le_bytes()).collect();
        guest.bytes[at..at + 256].copy_from_slice(&words);
        prop_assert!(guest.look().is_ok());
    }
}

#[test]
fn memory_of_noise_and_of_nothing_is_in_doubt() {
    let layout = Layout::with_split(8 << 20, 4 << 20).unwrap();
    let empty = vec![0; 8 << 20];
    let noise: Vec<u8> = (0..1u64 << 20).flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect();
    for bytes in [empty, noise] {
        let memory = BlockMemory::new(layout, &bytes).unwrap();
        assert_eq!(introspect(&memory, &layout, None).unwrap_err(), Doubt::NoNote { refused: 0 });
        assert_eq!(introspect(&memory, &layout, Some(u64::MAX - 3)).unwrap_err(), Doubt::NoNote { refused: 0 });
    }
}
