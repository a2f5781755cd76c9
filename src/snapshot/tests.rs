//! Pages that may be lost: the free ones of a guest whose kernel is known.

use super::file::{About, Kernel, Replication, Snapshot};
use super::keep::{Content, Count, Keeper, Kept};
use super::known::Known;
use super::mend::{Fault, Findings, Work};
use super::place::Care;
use super::restore::{Pages, memory};
use super::spool::{Spool, Vm};
use super::stores::{Access, Stores};
use crate::codec::hex;
use crate::error::ErrorKind;
use crate::indexer::Silent;
use crate::introspect::Class;
use crate::introspect::synthetic::{Guest, HIGH_FRAME, LINUX_6_12, LOW};
use crate::migrate::stream::{Kind, Place};
use crate::store::manifest::{Held, Manifest, Page, ZERO};
use crate::units::{is_zero, to_usize};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;

static GO_ON: AtomicBool = AtomicBool::new(false);
/// The first free page, and how many there are.
const FREE: u64 = 256;
const FREE_PAGES: u64 = 256;

/// Content of its own in each page of the upper 8 MiB, of which a block is free; one of the free pages is like one that is used.
fn guest(seed: u8) -> (Vec<u8>, Vec<Class>) {
    let mut guest = Guest::new(LINUX_6_12);
    for n in 0..2048u64 {
        let mut page = blake3::Hasher::new().update(&n.to_le_bytes()).update(&[seed]).finalize_xof();
        let mut bytes = [0; 4096];
        page.fill(&mut bytes);
        guest.write((HIGH_FRAME + n) * 4096, &bytes);
    }
    let used = page_of(&guest.bytes, 1000).to_vec();
    guest.write((HIGH_FRAME + FREE + 7) * 4096, &used);
    guest.free_block(HIGH_FRAME + FREE, 8);
    guest.counted(FREE_PAGES.cast_signed());
    let classes = guest.look().unwrap().classes;
    let classes = classes.into_iter().zip(guest.bytes.chunks(4096)).map(|(class, page)| class.with_content(page));
    let classes: Vec<Class> = classes.collect();
    assert_eq!(classes.iter().filter(|class| **class == Class::Free).count() as u64, FREE_PAGES);
    (guest.bytes, classes)
}

/// A page of the upper part.
fn page_of(memory: &[u8], number: u64) -> &[u8] {
    let at = to_usize(LOW + number * 4096);
    &memory[at..at + 4096]
}

fn stream(memory: &[u8]) -> Vec<u8> {
    let len = memory.len() as u64;
    let mut out = b"QEVM\0\0\0\x03\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    out.extend((len | 4).to_be_bytes());
    out.extend(b"\x06pc.ram");
    out.extend(len.to_be_bytes());
    out.extend(0x10u64.to_be_bytes());
    out.extend(b"\x7e\0\0\0\x02\x03\0\0\0\x02");
    for (n, page) in (0u64..).zip(memory.chunks(4096)) {
        let place = Place { block: 0, offset: n * 4096, named: n == 0 };
        if is_zero(page) {
            place.write_header(Kind::Zero, b"pc.ram", &mut out);
            out.push(0);
        } else {
            place.write_header(Kind::Data, b"pc.ram", &mut out);
            out.extend(page);
        }
    }
    out.extend(0x10u64.to_be_bytes());
    out.extend(b"\x7e\0\0\0\x02\0");
    out
}

struct Rig {
    dir: tempfile::TempDir,
    urls: Vec<String>,
}

impl Rig {
    fn new() -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let urls = (0..3).map(|n| dir.path().join(format!("store{n}")).display().to_string()).collect();
        Rig { dir, urls }
    }

    fn open(&self, access: Access) -> Stores {
        Stores::open(&self.urls, access).unwrap()
    }

    fn save(&self, name: &str, bytes: &[u8], classes: &[Class]) -> Vec<Count> {
        let mut spool = Spool::new(self.dir.path());
        spool.feed(&stream(bytes)).unwrap();
        let vm = spool.finish().unwrap();
        let stores = self.open(Access::Write);
        let known = Known::load(&stores, "default", 3).unwrap();
        let keeper = Keeper { stores: &stores, known: &known, base: None, copies: 3, observer: &Silent, stop: &GO_ON };
        let content = |(number, class): (usize, &Class)| Content {
            bytes: vm.page(number),
            hash: ZERO,
            class: Some(*class),
            care: if class.may_be_lost() { Care::Once } else { Care::Critical },
        };
        let kept = keeper.keep(&classes.iter().enumerate().map(content).collect::<Vec<_>>()).unwrap();
        let counts = kept.counts.clone();
        let snapshot = snapshot(name, vm, classes, kept);
        stores.publish(&snapshot).unwrap();
        stores.check_packs(&snapshot).unwrap();
        counts
    }

    /// The stream that comes back, and how many pages are lost.
    fn restore(&self, name: &str) -> crate::error::Result<(Vec<u8>, u64)> {
        let stores = self.open(Access::Read);
        let snapshot = stores.load(name)?;
        let pages = Pages::new(&stores, &snapshot, None, self.dir.path())?;
        let mut out = Vec::new();
        memory(&pages, &mut out, &Silent, &GO_ON)?;
        Ok((out, pages.lost()))
    }

    fn look(&self, repair: bool) -> Findings {
        let stores = self.open(if repair { Access::Alone } else { Access::Read });
        let spool = self.dir.path();
        Work { stores: &stores, spool, quick: false, repair, observer: &Silent, stop: &GO_ON }.run(&[]).unwrap()
    }

    /// Where the packs of a snapshot are that may be lost, or that may not.
    fn packs(&self, name: &str, once: bool) -> Vec<PathBuf> {
        let snapshot = self.open(Access::Read).load(name).unwrap();
        let all = snapshot.packs().into_iter().filter(|id| snapshot.once().contains(id) == once);
        let paths =
            all.flat_map(|id| self.urls.iter().map(move |url| Path::new(url).join("packs").join(id.file_name())));
        paths.filter(|path| path.exists()).collect()
    }
}

fn snapshot(name: &str, vm: Vm, classes: &[Class], kept: Kept) -> Snapshot {
    let about = About {
        name: name.into(),
        vm: "web".into(),
        domain: "default".into(),
        taken: 1,
        machine: "q35".into(),
        ran: true,
        copies: 3,
        replication: Replication::Page,
        stream_bytes: vm.stream_bytes,
        kernel: Kernel::Known { release: LINUX_6_12.release.into(), btf: true },
        images: Vec::new(),
        once: kept.once.iter().map(|id| hex(&id.0)).collect(),
        disks: Vec::new(),
    };
    let memory = Manifest {
        vm: "web".into(),
        domain: "default".into(),
        taken: 1,
        blocks: vm.blocks,
        images: Vec::new(),
        packs: kept.packs,
        pages: kept.pages,
    };
    Snapshot { about, skeleton: vm.skeleton, classes: classes.to_vec(), memory, disks: Vec::new() }
}

/// The same memory with zeros in the free pages, but for the one that a used page has.
fn without_free(memory: &[u8]) -> Vec<u8> {
    let mut memory = memory.to_vec();
    for n in (FREE..FREE + FREE_PAGES).filter(|n| *n != FREE + 7) {
        let at = to_usize(LOW + n * 4096);
        memory[at..at + 4096].fill(0);
    }
    memory
}

#[test]
fn free_pages_are_in_one_store_and_come_back_as_zeros_when_it_is_lost() {
    let (rig, (bytes, classes)) = (Rig::new(), guest(1));
    let counts = rig.save("one", &bytes, &classes);
    let free = counts[Class::ALL.iter().position(|class| *class == Class::Free).unwrap()];
    // The one that is like a used page is found among the pages that must not be lost.
    assert_eq!((free.pages, free.once, free.same, free.critical), (FREE_PAGES, FREE_PAGES - 1, 1, 0));
    assert!(rig.restore("one").unwrap() == (stream(&bytes), 0));
    let (once, critical) = (rig.packs("one", true), rig.packs("one", false));
    assert_eq!((once.len(), critical.len()), (1, 3));

    // Two copies of what must not be lost are gone, and the one of what may be: nothing else than that is missing.
    let whole = fs::read(&once[0]).unwrap();
    fs::remove_file(&once[0]).unwrap();
    let kept = fs::read(&critical[0]).unwrap();
    critical[..2].iter().for_each(|path| fs::remove_file(path).unwrap());
    assert!(rig.restore("one").unwrap() == (stream(&without_free(&bytes)), FREE_PAGES - 1));
    let found = rig.look(true);
    assert!(matches!(found.faults[..], [Fault::PackGone { .. }]) && found.harmless() == 1, "{:?}", found.faults);
    assert_eq!((found.broken.len(), found.mended.len()), (0, 2), "{:?}", found.mended);
    assert!(fs::read(&critical[0]).unwrap() == kept);

    // Rotten in its only store is as lost, as far as it is rotten, and no fault that a repair could mend.
    let mut rotten = whole.clone();
    let middle = whole.len() / 2;
    rotten[middle] ^= 1;
    fs::write(&once[0], &rotten).unwrap();
    let (out, lost) = rig.restore("one").unwrap();
    assert!((1..FREE_PAGES).contains(&lost) && out.len() == stream(&bytes).len() - to_usize(lost) * 4095, "{lost}");
    assert!(matches!(rig.look(false).faults[..], [Fault::PackGone { .. }]));
    fs::write(&once[0], &whole).unwrap();
    assert!(rig.look(false).faults.is_empty());
    assert!(rig.restore("one").unwrap() == (stream(&bytes), 0));

    // All copies of what must not be lost: then it cannot be restored.
    critical.iter().for_each(|path| fs::remove_file(path).unwrap());
    let error = rig.restore("one").unwrap_err().to_string();
    assert!(error.contains("no store has a whole copy of pack"), "{error}");
    assert_eq!(rig.look(true).broken, ["one"]);
}

/// A page that is used now is not looked for where it may be lost, also if its content is there.
#[test]
fn what_was_free_and_is_used_now_is_kept_as_what_is_used() {
    let (rig, (bytes, classes)) = (Rig::new(), guest(1));
    rig.save("free", &bytes, &classes);
    let once = rig.packs("free", true);
    let used: Vec<Class> = classes.iter().map(|class| if class.may_be_lost() { Class::Anon } else { *class }).collect();
    let used: Vec<Class> = used.iter().zip(bytes.chunks(4096)).map(|(class, page)| class.with_content(page)).collect();
    let counts = rig.save("used", &bytes, &used);
    let anon = counts[Class::ALL.iter().position(|class| *class == Class::Anon).unwrap()];
    assert_eq!((anon.critical, anon.same, anon.known), (FREE_PAGES - 1, 0, 1), "one is like a used page");
    // The same pages in the same order are the pack of the same name, which is now in all stores.
    once.iter().for_each(|path| fs::remove_file(path).unwrap());
    assert!(rig.restore("used").unwrap() == (stream(&bytes), 0));
    // Free again: what is kept with more care than it needs is not written once more.
    let counts = rig.save("free again", &bytes, &classes);
    assert_eq!(counts.iter().map(|count| count.once + count.critical).sum::<u64>(), 0);
}

/// A file that is whole and names another page than it has the hash of: what it says of hashes is what counts.
#[test]
fn a_page_that_is_another_one_is_not_restored() {
    let (rig, (bytes, classes)) = (Rig::new(), guest(1));
    rig.save("one", &bytes, &classes);
    let stores = rig.open(Access::Write);
    let mut wrong = stores.load("one").unwrap();
    let of_pack = |page: &Page| matches!(page.held, Held::Pack { .. });
    let numbers: Vec<usize> = (0..wrong.memory.pages.len()).filter(|n| of_pack(&wrong.memory.pages[*n])).collect();
    let (a, b) = (numbers[10], numbers[11]);
    let held = wrong.memory.pages[a].held;
    wrong.memory.pages[a].held = wrong.memory.pages[b].held;
    wrong.memory.pages[b].held = held;
    wrong.about.name = "wrong".into();
    stores.publish(&wrong).unwrap();
    let error = rig.restore("wrong").unwrap_err();
    assert!(error.kind() == ErrorKind::Corrupt && error.to_string().contains("is another one"), "{error}");
    assert!(rig.restore("one").unwrap() == (stream(&bytes), 0));
}
