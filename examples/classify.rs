//! What a guest's memory is used for, and how far that agrees with what the guest says.
//!
//! ```text
//! cargo run --release --example classify -- RAM [--machine q35] [--note ADDRESS] \
//!     [--compare KPAGEFLAGS [--before KPAGEFLAGS]] [--meminfo FILE] [--json]
//! ```
//!
//! RAM is all of a guest's memory as one file, of a guest that stands still: the file of its `memory-backend-file,share=on`, or what
//! `pmemsave` of QEMU's monitor wrote (of a guest without memory above 4 GiB). KPAGEFLAGS and FILE are /proc/kpageflags and
//! /proc/meminfo, taken in the guest right before it was stopped. `--note` is what a device `vmcoreinfo` was told.
//!
//! A page agrees when the guest's flags give the same class by the kernel's documentation (admin-guide/mm/pagemap). A few do
//! not: the guest runs on while it reads its own flags. `--before` is an earlier reading; pages whose class differs between the two
//! have moved, and are counted apart. All agree (exit status 0) when less than 1% of the pages that have not moved differ, and less
//! than 1% of those called free are in use by the guest's flags; of meminfo when each number is within 3% or 4 MiB.

#![allow(clippy::unwrap_used, reason = "a program of its own")]

use clap::Parser;
use memmap2::Mmap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use vmar::error::{Error, ErrorKind, Result};
use vmar::introspect::{BlockMemory, Class, Introspection, Layout, PAGE_SIZE, introspect};
use vmar::units::to_usize;

#[derive(Parser)]
struct Arguments {
    /// File of the guest's memory.
    ram: PathBuf,
    /// QEMU's name of the machine.
    #[arg(long, default_value = "q35")]
    machine: String,
    /// Guest-physical address of the note, hexadecimal; all of RAM is looked through without it.
    #[arg(long, value_parser = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16))]
    note: Option<u64>,
    /// /proc/kpageflags of the guest.
    #[arg(long)]
    compare: Option<PathBuf>,
    /// An earlier reading of /proc/kpageflags.
    #[arg(long, requires = "compare")]
    before: Option<PathBuf>,
    /// /proc/meminfo of the guest.
    #[arg(long)]
    meminfo: Option<PathBuf>,
    /// JSON instead of tables.
    #[arg(long)]
    json: bool,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(err) => {
            eprintln!("{err}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<bool> {
    let file = fs::File::open(&arguments.ram).map_err(|e| Error::io(&arguments.ram, "open", e))?;
    // SAFETY: the guest stands still, so nobody writes into its memory; that is what the caller is told above.
    let ram = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(&arguments.ram, "map", e))?;
    let layout = Layout::for_machine(&arguments.machine, ram.len() as u64).ok_or_else(|| {
        let cause = format!("{} bytes of a machine {} lie nobody knows where", ram.len(), arguments.machine);
        Error::file(ErrorKind::Unsupported, &arguments.ram, cause).mend("name pc or q35 with --machine")
    })?;
    let memory = BlockMemory::new(layout, &ram).unwrap();
    let began = std::time::Instant::now();
    let seen = introspect(&memory, &layout, arguments.note)
        .map_err(|doubt| Error::file(ErrorKind::Unsupported, &arguments.ram, doubt))?;
    let seconds = began.elapsed().as_secs_f64();
    let with_content: Vec<Class> =
        seen.classes.iter().zip(ram.chunks(4096)).map(|(class, page)| class.with_content(page)).collect();
    let flags = |path: &Option<PathBuf>| path.as_deref().map(|path| guest_classes(path, &layout)).transpose();
    let (theirs, before) = (flags(&arguments.compare)?, flags(&arguments.before)?);
    let matrix = theirs.map(|theirs| Matrix::new(&seen.classes, &theirs, before.as_deref()));
    let meminfo = arguments.meminfo.as_deref().map(|path| meminfo(path, &seen)).transpose()?.unwrap_or_default();
    let agrees = matrix.as_ref().is_none_or(Matrix::agrees) && meminfo.iter().all(Number::agrees);
    if arguments.json {
        println!("{}", json(&seen, &with_content, matrix.as_ref(), &meminfo, agrees, seconds));
        return Ok(agrees);
    }
    println!(
        "Linux {}, {} pages, BTF {}, {} pages free by its own count, {seconds:.2} s\n",
        seen.release,
        seen.classes.len(),
        if seen.btf { "found" } else { "not found" },
        seen.free_counted
    );
    print_classes(&seen.classes, &with_content);
    if let Some(matrix) = &matrix {
        matrix.print();
    }
    if !meminfo.is_empty() {
        println!("\n{:<28} {:>12} {:>12} {:>9}", "/proc/meminfo, KiB", "guest", "found", "apart");
        meminfo.iter().for_each(Number::print);
    }
    Ok(agrees)
}

fn count(classes: &[Class], wanted: Class) -> u64 {
    classes.iter().filter(|class| **class == wanted).count() as u64
}

fn print_classes(used: &[Class], with_content: &[Class]) {
    println!("{:<20} {:>9} {:>9} {:>7}", "class", "by use", "by both", "of RAM");
    for class in Class::ALL {
        let both = count(with_content, class);
        let share = 100.0 * both as f64 / used.len() as f64;
        println!("{:<20} {:>9} {both:>9} {share:>6.1}%", class.name(), count(used, class));
    }
}

/// Bits of /proc/kpageflags (include/uapi/linux/kernel-page-flags.h; `RESERVED` is not of the documented ones).
mod kpf {
    pub const UPTODATE: u64 = 1 << 3;
    pub const DIRTY: u64 = 1 << 4;
    pub const LRU: u64 = 1 << 5;
    pub const SLAB: u64 = 1 << 7;
    pub const WRITEBACK: u64 = 1 << 8;
    pub const BUDDY: u64 = 1 << 10;
    pub const ANON: u64 = 1 << 12;
    pub const SWAPBACKED: u64 = 1 << 14;
    pub const COMPOUND_TAIL: u64 = 1 << 16;
    pub const HWPOISON: u64 = 1 << 19;
    pub const NOPAGE: u64 = 1 << 20;
    pub const PGTABLE: u64 = 1 << 26;
    pub const RESERVED: u64 = 1 << 32;
}

/// The class that the guest's own flags give a page.
fn class_of(flags: u64) -> Class {
    let has = |bits| flags & bits != 0;
    match flags {
        _ if has(kpf::NOPAGE | kpf::HWPOISON) => Class::Unknown,
        _ if has(kpf::BUDDY) => Class::Free,
        _ if has(kpf::RESERVED) => Class::Reserved,
        _ if has(kpf::SLAB) => Class::Slab,
        _ if has(kpf::PGTABLE) => Class::PageTable,
        _ if has(kpf::ANON) => Class::Anon,
        _ if !has(kpf::LRU) => Class::Kernel,
        _ if has(kpf::SWAPBACKED) => Class::Shmem,
        _ if has(kpf::DIRTY | kpf::WRITEBACK) => Class::CacheDirty,
        _ if has(kpf::UPTODATE) => Class::CacheClean,
        _ => Class::CacheNotUptodate,
    }
}

/// The classes by the guest's flags, in the order of the RAM block.
fn guest_classes(path: &Path, layout: &Layout) -> Result<Vec<Class>> {
    let bytes = fs::read(path).map_err(|e| Error::io(path, "read", e))?;
    let (words, _) = bytes.as_chunks::<8>();
    let mut classes = Vec::new();
    for range in layout.ranges() {
        let first = to_usize(range.physical / PAGE_SIZE);
        let mut head = Class::Unknown;
        for n in first..first + to_usize(range.len / PAGE_SIZE) {
            let Some(word) = words.get(n) else {
                let cause = format!("has {} pages, not {}", words.len(), n + 1);
                return Err(Error::file(ErrorKind::Corrupt, path, cause).mend("read all of /proc/kpageflags"));
            };
            let flags = u64::from_le_bytes(*word);
            // A tail has but the flags that say so, and is what its head is.
            let tail = flags & kpf::COMPOUND_TAIL != 0;
            if !tail {
                head = class_of(flags);
            }
            classes.push(head);
        }
    }
    Ok(classes)
}

/// Pages by the class that the guest's flags give, and by the one that was found.
struct Matrix {
    pages: Vec<Vec<u64>>,
    /// Pages that the guest's two readings have in different classes: they are not in `pages`.
    moved: u64,
}

impl Matrix {
    fn new(found: &[Class], theirs: &[Class], before: Option<&[Class]>) -> Matrix {
        let place = |class: &Class| Class::ALL.iter().position(|c| c == class).unwrap();
        let mut pages = vec![vec![0; Class::ALL.len()]; Class::ALL.len()];
        let mut moved = 0;
        for ((now, found), before) in theirs.iter().zip(found).zip(before.unwrap_or(theirs)) {
            if before == now {
                pages[place(now)][place(found)] += 1;
            } else {
                moved += 1;
            }
        }
        Matrix { pages, moved }
    }

    fn each(&self) -> impl Iterator<Item = (Class, Class, u64)> {
        let classes = || Class::ALL.into_iter().enumerate();
        classes().flat_map(move |(n, a)| classes().map(move |(m, b)| (a, b, self.pages[n][m])))
    }

    fn sum(&self, wanted: impl Fn(Class, Class) -> bool) -> u64 {
        self.each().filter(|(a, b, _)| wanted(*a, *b)).map(|(.., pages)| pages).sum()
    }

    fn agrees(&self) -> bool {
        let few = |some: u64, of: u64| some * 100 < of.max(1);
        few(self.sum(|a, b| a != b), self.sum(|_, _| true))
            && few(self.sum(|a, b| a != b && b == Class::Free), self.sum(|_, b| b == Class::Free))
    }

    fn print(&self) {
        println!(
            "\n{:<20} {:>9} {:>9} {:>9} {:>11} {:>11}",
            "class", "guest", "found", "both", "guest only", "found only"
        );
        for class in Class::ALL {
            let (guest, found) = (self.sum(|a, _| a == class), self.sum(|_, b| b == class));
            let both = self.sum(|a, b| a == class && b == class);
            if guest + found > 0 {
                let name = class.name();
                println!("{name:<20} {guest:>9} {found:>9} {both:>9} {:>11} {:>11}", guest - both, found - both);
            }
        }
        let mut apart: Vec<_> = self.each().filter(|(a, b, pages)| a != b && *pages > 0).collect();
        apart.sort_by_key(|(.., pages)| std::cmp::Reverse(*pages));
        let (differ, all) = (self.sum(|a, b| a != b), self.sum(|_, _| true));
        println!("\n{differ} of {all} pages differ; {} more moved between the guest's readings", self.moved);
        for (a, b, pages) in apart {
            println!("{pages:>9}  guest {}, found {}", a.name(), b.name());
        }
    }
}

/// A number of /proc/meminfo beside the same by classes, in KiB.
struct Number {
    name: &'static str,
    guest: u64,
    found: u64,
}

impl Number {
    fn agrees(&self) -> bool {
        self.guest.abs_diff(self.found) <= (self.guest * 3 / 100).max(4096)
    }

    fn print(&self) {
        println!(
            "{:<28} {:>12} {:>12} {:>9}",
            self.name,
            self.guest,
            self.found,
            self.found.cast_signed() - self.guest.cast_signed()
        );
    }
}

fn meminfo(path: &Path, seen: &Introspection) -> Result<Vec<Number>> {
    let text = fs::read_to_string(path).map_err(|e| Error::io(path, "read", e))?;
    let line = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.and_then(|value| value.trim().trim_end_matches(" kB").parse::<u64>().ok()).ok_or_else(|| {
            Error::file(ErrorKind::Corrupt, path, format!("has no {name}")).mend("give a guest's /proc/meminfo")
        })
    };
    let found = |classes: &[Class]| classes.iter().map(|class| count(&seen.classes, *class)).sum::<u64>() * 4;
    let cache = [Class::CacheClean, Class::CacheDirty, Class::CacheNotUptodate];
    let mut numbers = vec![
        Number { name: "MemFree", guest: line("MemFree")?, found: found(&[Class::Free]) },
        Number { name: "Slab", guest: line("Slab")?, found: found(&[Class::Slab]) },
        Number { name: "PageTables", guest: line("PageTables")?, found: found(&[Class::PageTable]) },
        Number { name: "AnonPages", guest: line("AnonPages")?, found: found(&[Class::Anon]) },
        Number { name: "Shmem", guest: line("Shmem")?, found: found(&[Class::Shmem]) },
        Number {
            name: "Cached + Buffers - Shmem",
            guest: (line("Cached")? + line("Buffers")?).saturating_sub(line("Shmem")?),
            found: found(&cache),
        },
    ];
    if seen.btf {
        let guest = line("Dirty")? + line("Writeback")?;
        numbers.push(Number { name: "Dirty + Writeback", guest, found: found(&[Class::CacheDirty]) });
    }
    Ok(numbers)
}

fn json(
    seen: &Introspection,
    with_content: &[Class],
    matrix: Option<&Matrix>,
    meminfo: &[Number],
    agrees: bool,
    seconds: f64,
) -> serde_json::Value {
    let table = |classes: &[Class]| -> serde_json::Map<String, serde_json::Value> {
        Class::ALL.iter().map(|class| (class.name().to_string(), count(classes, *class).into())).collect()
    };
    let compare = matrix.map(|matrix| {
        let apart: Vec<_> = matrix
            .each()
            .filter(|(a, b, pages)| a != b && *pages > 0)
            .map(|(a, b, pages)| serde_json::json!({"guest": a.name(), "found": b.name(), "pages": pages}))
            .collect();
        serde_json::json!({"differ": matrix.sum(|a, b| a != b), "moved": matrix.moved, "apart": apart})
    });
    let numbers: Vec<_> = meminfo
        .iter()
        .map(|n| serde_json::json!({"name": n.name, "guest_kib": n.guest, "found_kib": n.found}))
        .collect();
    serde_json::json!({
        "release": seen.release,
        "btf": seen.btf,
        "pages": seen.classes.len(),
        "free_counted": seen.free_counted,
        "by_use": table(&seen.classes),
        "by_use_and_content": table(with_content),
        "compare": compare,
        "meminfo": numbers,
        "seconds": seconds,
        "agrees": agrees,
    })
}
