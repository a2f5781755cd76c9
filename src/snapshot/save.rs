//! Takes a snapshot: the VM stands still while QEMU writes it to a socket and its disks are looked at, and runs again while what was
//! taken is classified, compared and written.
//!
//! ```text
//!  runs ──stop──▶ stands still ──────────────────────────▶ runs ──────────────────────────────────────────────────▶
//!                 stream → memory, skeleton │ disks          classify → keep → packs in stores → snapshot in stores
//! ```

use super::file::{About, AboutDisk, BaseImage, Disk, Kernel, Replication, Snapshot};
use super::keep::{Content, Count, Keeper, Kept};
use super::known::Known;
use super::place::Care;
use super::spool::Vm;
use super::stores::{Stores, check_name, taken};
use super::take::{Block, Taken, TakenDisk, take};
use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::indexer::Observer;
use crate::introspect::{Class, Layout, introspect};
use crate::library::{ImageRecord, Library};
use crate::migrate::bases::{BaseFiles, Bases};
use crate::migrate::disk::LeavingDisk;
use crate::migrate::monitor::Monitor;
use crate::store::Digest;
use crate::store::manifest::{Manifest, MemoryBlock, ZERO};
use crate::units::to_usize;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// A disk of the VM.
pub struct DiskOf<'a> {
    /// Its overlay, as the operator named it.
    pub overlay: PathBuf,
    /// Bytes.
    pub size: u64,
    /// Content digest of its image.
    pub base: Digest,
    /// Reads it.
    pub disk: &'a dyn LeavingDisk,
}

/// What to save, and how.
pub struct Options<'a> {
    /// Name of the snapshot.
    pub name: &'a str,
    /// Name of the VM; QEMU's own (`-name`) without it.
    pub vm: Option<&'a str>,
    /// Sharing domain.
    pub domain: &'a str,
    /// QEMU's monitor.
    pub qmp: &'a Path,
    /// In how many stores pages are that must not be lost; all without it.
    pub copies: Option<usize>,
    /// Which these are.
    pub replication: Replication,
    /// The VM's base image.
    pub image: Option<(&'a Library, &'a ImageRecord)>,
    /// Disks are not to be saved.
    pub memory_only: bool,
    /// Its disks.
    pub disks: &'a [DiskOf<'a>],
    /// A store of memory whose template is used.
    pub templates: Option<&'a Path>,
    /// Where memory and changed blocks are for a while.
    pub spool: &'a Path,
    /// The VM does not run again.
    pub stay_stopped: bool,
}

/// How it went.
#[derive(Debug)]
pub struct Saved {
    /// The summary.
    pub about: About,
    /// What became of the pages, by class, in the order of [`Class::ALL`]; last of the blocks of disks.
    pub counts: Vec<Count>,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Bytes of new packs, each counted once.
    pub new_bytes: u64,
    /// How many.
    pub new_packs: usize,
    /// Bytes of the snapshot's own file.
    pub snapshot_bytes: u64,
    /// Bytes that were written to all stores.
    pub written_bytes: u64,
    /// How long the VM stood still.
    pub stood: Duration,
    /// How long it took.
    pub took: Duration,
}

/// Saves a VM.
///
/// # Errors
/// QEMU, a disk or a store refuses. The VM runs again if it ran, and earlier snapshots are as they were.
pub fn save(stores: &Stores, options: &Options<'_>, observer: &dyn Observer, stop: &AtomicBool) -> Result<Saved> {
    let began = Instant::now();
    let copies = check_options(stores, options)?;
    let mut monitor = Monitor::connect(options.qmp)?;
    if !options.memory_only {
        refuse_own_disks(&mut monitor)?;
    }
    let vm = options.vm.map(str::to_string).map_or_else(|| monitor.name(), |vm| Ok(Some(vm)))?;
    let vm =
        vm.ok_or_else(|| Error::new(ErrorKind::Usage, "--vm", "QEMU has no name for the VM").mend("give it one"))?;
    let mut known = Known::load(stores, options.domain, copies)?;
    if let Some(dir) = options.templates {
        known.add_template(dir, options.domain)?;
    }
    let bases = match options.image {
        Some((library, image)) => Some((Bases::of_image(library, image)?, BaseFiles::open(library, &[image.digest]))),
        None => None,
    };
    let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let taken = take(&mut monitor, options, &known, stop)?;
    drop(monitor);
    let (classes, kernel) = classify(&taken.vm);
    let base = bases.as_ref().map(|(bases, files)| (bases, files));
    let keeper = Keeper { stores, known: &known, base, copies, observer, stop };
    let kept = keeper.keep(&contents(&taken, &classes, options.replication))?;
    let about = About {
        name: options.name.into(),
        vm,
        domain: options.domain.into(),
        taken: at,
        machine: taken.vm.machine.clone(),
        ran: taken.ran,
        copies,
        replication: options.replication,
        stream_bytes: taken.vm.stream_bytes,
        kernel,
        images: options.image.iter().map(|(_, i)| BaseImage { name: i.name.clone(), digest: hex(&i.digest) }).collect(),
        once: kept.once.iter().map(|id| hex(&id.0)).collect(),
        disks: about_disks(options.disks, &taken),
    };
    let (memory_bytes, stood) = (taken.vm.pages() as u64 * 4096, taken.stood);
    let snapshot = assemble(about, taken, classes, &kept, options.image.map(|(_, image)| image.digest));
    let bytes = stores.publish(&snapshot)?;
    stores.check_packs(&snapshot)?;
    Ok(Saved {
        about: snapshot.about,
        counts: kept.counts,
        memory_bytes,
        new_bytes: kept.new_bytes,
        new_packs: kept.new_packs,
        snapshot_bytes: bytes,
        written_bytes: kept.written_bytes + bytes * stores.all().len() as u64,
        stood,
        took: began.elapsed(),
    })
}

/// A disk that is not in the snapshot, and goes on being written, is not what the restored VM believes it is.
fn refuse_own_disks(monitor: &mut Monitor) -> Result<()> {
    match monitor.own_disks()?.first() {
        None => Ok(()),
        Some(disk) => {
            Err(Error::file(ErrorKind::Unsupported, disk, "is a disk of QEMU's own, and would not be in the snapshot")
                .mend("have 'vmar serve' serve it, or say --memory-only if nothing writes to it"))
        }
    }
}

/// In how many stores pages will be, if all makes sense.
fn check_options(stores: &Stores, options: &Options<'_>) -> Result<usize> {
    check_name(options.name)?;
    if stores.snapshots()?.contains_key(options.name) {
        return Err(taken(options.name));
    }
    let copies = options.copies.unwrap_or(stores.all().len());
    if copies == 0 || copies > stores.all().len() {
        let cause = format!("{copies} copies in {} stores", stores.all().len());
        return Err(Error::new(ErrorKind::Usage, "--copies", cause).mend("name more stores, or ask for fewer copies"));
    }
    Ok(copies)
}

/// The class of each page of all blocks, and what is known of the kernel.
fn classify(vm: &Vm) -> (Vec<Class>, Kernel) {
    let pages = |block: usize| vm.blocks.get(block).map_or(0, |b| to_usize(b.len / 4096));
    let mut classes = vec![Class::Unknown; vm.pages()];
    // RAM of a VM without NUMA nodes is one block, and by far the largest.
    let Some(main) = (0..vm.blocks.len()).max_by_key(|n| pages(*n)) else {
        return (classes, Kernel::Doubt("the VM has no memory".into()));
    };
    let first: usize = (0..main).map(pages).sum();
    let kernel = match Layout::for_machine(&vm.machine, pages(main) as u64 * 4096) {
        None => Kernel::Doubt(format!("where memory lies in a machine {} is not known", vm.machine)),
        Some(layout) => match introspect(&vm.ram(layout, first), &layout, None) {
            Ok(seen) => {
                for (class, found) in classes.iter_mut().skip(first).zip(seen.classes) {
                    *class = found;
                }
                Kernel::Known { release: seen.release, btf: seen.btf }
            }
            Err(doubt) => Kernel::Doubt(doubt.to_string()),
        },
    };
    for (number, class) in classes.iter_mut().enumerate() {
        *class = vm.page(number).map_or(Class::Zero, |page| class.with_content(page));
    }
    (classes, kernel)
}

/// All pages of memory, then all blocks of the disks.
fn contents<'a>(taken: &'a Taken, classes: &[Class], replication: Replication) -> Vec<Content<'a>> {
    let memory = classes.iter().enumerate().map(|(number, class)| {
        let care = if replication == Replication::Page && class.may_be_lost() { Care::Once } else { Care::Critical };
        Content { bytes: taken.vm.page(number), hash: ZERO, class: Some(*class), care }
    });
    let spooled = taken.spooled.as_deref().unwrap_or_default().as_chunks::<4096>().0;
    let block = |block: &Block| match block {
        Block::Known(hash) => Content { bytes: None, hash: *hash, class: None, care: Care::Critical },
        Block::Spooled(n) => {
            Content { bytes: spooled.get(to_usize(*n)), hash: ZERO, class: None, care: Care::Critical }
        }
    };
    memory.chain(taken.disks.iter().flat_map(|disk| &disk.blocks).map(block)).collect()
}

fn about_disks(disks: &[DiskOf<'_>], taken: &Taken) -> Vec<AboutDisk> {
    let about = |(of, taken): (&DiskOf<'_>, &TakenDisk)| AboutDisk {
        overlay: of.overlay.display().to_string(),
        size: of.size,
        base: hex(&of.base),
        write_cache: taken.write_cache,
    };
    disks.iter().zip(&taken.disks).map(about).collect()
}

fn assemble(about: About, taken: Taken, classes: Vec<Class>, kept: &Kept, image: Option<Digest>) -> Snapshot {
    let mut pages = kept.pages.iter().copied();
    let manifest = |blocks, pages: Vec<_>| Manifest {
        vm: about.vm.clone(),
        domain: about.domain.clone(),
        taken: about.taken,
        blocks,
        images: image.into_iter().collect(),
        packs: kept.packs.clone(),
        pages,
    };
    let memory = manifest(taken.vm.blocks, pages.by_ref().take(classes.len()).collect());
    let disk = |disk: TakenDisk| {
        let pages: Vec<_> = pages.by_ref().take(disk.blocks.len()).collect();
        let block = MemoryBlock { name: b"disk".to_vec(), len: pages.len() as u64 * 4096 };
        Disk { runs: disk.runs, data: manifest(vec![block], pages) }
    };
    let disks = taken.disks.into_iter().map(disk).collect();
    Snapshot { skeleton: taken.vm.skeleton, classes, memory, disks, about }
}
