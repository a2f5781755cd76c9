//! `vmar snapshot`: keep running VMs in several stores, and bring them back.

use super::Common;
use super::image::stop_on_signals;
use super::moving_disk::{Arriving, Leaving};
use super::output::Progress;
use super::overlay::StateDir;
use super::snapshot_show as show;
use crate::codec::{hex, unhex};
use crate::error::{Error, ErrorKind, Result};
use crate::library::{ImageRecord, Library};
use crate::migrate::monitor::Monitor;
use crate::overlay::{BaseIdentity, CreateOptions};
use crate::snapshot::file::{AboutDisk, Replication, Snapshot};
use crate::snapshot::keep::check as stopped;
use crate::snapshot::mend::Work;
use crate::snapshot::private::PrivateDir;
use crate::snapshot::restore::{self, Pages};
use crate::snapshot::save::{self, DiskOf, Options};
use crate::snapshot::stores::{Access, Stores, check_name};
use clap::{Subcommand, ValueEnum};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// How long a QEMU that has got all may take until the VM stands there.
const LOADED: Duration = Duration::from_secs(120);

/// Verbs of `vmar snapshot`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Save a VM and its disks: it stands still for a moment, and goes on
    Save(SaveArgs),
    /// Bring a VM back: its disks as new overlays, its memory into a QEMU that waits ('-incoming defer')
    Restore(RestoreArgs),
    /// List the snapshots
    List {
        /// Where they are
        #[command(flatten)]
        stores: StoreArgs,
    },
    /// Show what a snapshot holds, by what the guest uses its memory for
    Show {
        /// The snapshot
        name: String,
        /// Where it is
        #[command(flatten)]
        stores: StoreArgs,
    },
    /// Look whether all is where it has to be, and whole; exit status 1 if not
    Check(CheckArgs),
    /// Heal what stores have lost from each other, and remove what no snapshot names
    Repair(CheckArgs),
    /// Delete snapshots, and the pages that no other one shares
    Delete {
        /// Which ones
        #[arg(required = true)]
        names: Vec<String>,
        /// Where they are: all stores, or the others will bring them back when they are repaired
        #[command(flatten)]
        stores: StoreArgs,
    },
}

/// Where snapshots are.
#[derive(Debug, clap::Args)]
pub struct StoreArgs {
    /// A store: a directory, s3://BUCKET/PREFIX (see docs/snapshots.md for its parameters) or hdfs://...; repeated, each is a
    /// domain of failure of its own
    #[arg(long = "store", value_name = "URL", required = true)]
    stores: Vec<String>,
}

/// Arguments of `vmar snapshot save`.
#[derive(Debug, clap::Args)]
pub struct SaveArgs {
    /// Name of the snapshot
    name: String,
    /// QEMU's monitor ('-qmp unix:PATH,server=on,wait=off')
    #[arg(long, value_name = "PATH")]
    qmp: PathBuf,
    #[command(flatten)]
    stores: StoreArgs,
    /// Name of the VM: a snapshot shares pages with earlier ones of it first [default: QEMU's -name]
    #[arg(long)]
    vm: Option<String>,
    /// An overlay of the VM, which 'vmar serve' serves; repeated, in the order in which they will be restored (needs --library)
    #[arg(long = "overlay", value_name = "FILE")]
    overlays: Vec<PathBuf>,
    /// Save no disk: nothing writes to those that the VM has, or they are kept in another way
    #[arg(long, conflicts_with = "overlays")]
    memory_only: bool,
    #[command(flatten)]
    state: StateDir,
    /// The VM's base image: pages that it holds are refilled from it [default: that of the first --overlay] (needs --library)
    #[arg(long, value_name = "NAME")]
    image: Option<String>,
    /// Sharing domain: pages are shared with snapshots of the same domain alone [default: that of the image, or "default"]
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,
    /// A store of memory ('vmar template') whose newest template of the domain is used
    #[arg(long, value_name = "DIR")]
    templates: Option<PathBuf>,
    /// Stores that have each page that must not be lost [default: all]
    #[arg(long, value_name = "N")]
    copies: Option<usize>,
    /// Which pages these are
    #[arg(long, value_enum, default_value_t = By::Page)]
    replication: By,
    /// Do not let the VM go on
    #[arg(long)]
    stay_stopped: bool,
    /// Directory for the VM's memory while it is packed, in a file without a name
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    spool: PathBuf,
}

/// Which pages are in several stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum By {
    /// All but those that the guest does not miss: free pages, which come back as zeros if their one copy is lost
    Page,
    /// All
    Full,
}

/// Arguments of `vmar snapshot restore`.
#[derive(Debug, clap::Args)]
pub struct RestoreArgs {
    /// The snapshot
    name: String,
    #[command(flatten)]
    stores: StoreArgs,
    /// Make this overlay, with the disk as it was; repeated, in the order of the snapshot (needs --library)
    #[arg(long = "overlay", value_name = "FILE")]
    overlays: Vec<PathBuf>,
    #[command(flatten)]
    state: StateDir,
    /// Load the memory into the QEMU of this monitor, started with the machine and devices of the VM and '-incoming defer'. With
    /// --overlay the disks are made first, and then the monitor is waited for
    #[arg(long, value_name = "PATH")]
    qmp: Option<PathBuf>,
    /// Where that QEMU waits, if it was started with '-incoming unix:PATH'
    #[arg(long, value_name = "PATH", requires = "qmp")]
    incoming: Option<PathBuf>,
    /// How long the monitor is waited for
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    wait: u64,
    /// Do not let the VM run
    #[arg(long)]
    stay_stopped: bool,
    /// Directory for packs of stores that are no directories
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    spool: PathBuf,
}

/// Arguments of `vmar snapshot check` and `repair`.
#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    /// These snapshots alone
    names: Vec<String>,
    #[command(flatten)]
    stores: StoreArgs,
    /// Look whether packs are there, and do not read them
    #[arg(long)]
    quick: bool,
    /// Directory for packs of stores that are no directories
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    spool: PathBuf,
}

/// Runs a verb.
pub fn run(common: &Common, verb: Verb) -> Result<()> {
    match verb {
        Verb::Save(args) => save(common, &args),
        Verb::Restore(args) => bring_back(common, &args),
        Verb::List { stores } => show::list(common, &Stores::open(&stores.stores, Access::Read)?),
        Verb::Show { name, stores } => {
            let stores = Stores::open(&stores.stores, Access::Read)?;
            show::show(common, &stores, &stores.load(&name)?)
        }
        Verb::Check(args) => check(common, &args, false),
        Verb::Repair(args) => check(common, &args, true),
        Verb::Delete { names, stores } => delete(&names, &stores),
    }
}

fn save(common: &Common, args: &SaveArgs) -> Result<()> {
    if args.overlays.is_empty() && !args.memory_only {
        return Err(Error::new(ErrorKind::Usage, "--overlay", "no disk is named")
            .mend("name each overlay of the VM, or say --memory-only if nothing writes to its disks"));
    }
    let stop = stop_on_signals()?;
    let needs = !args.overlays.is_empty() || args.image.is_some();
    let library = if needs { Some(Library::open(common.library()?)?) } else { None };
    let state_dir = args.state.path();
    let opened: Vec<Leaving> =
        args.overlays.iter().map(|path| Leaving::open(path, &state_dir)).collect::<Result<_>>()?;
    let disks: Vec<DiskOf<'_>> = opened
        .iter()
        .zip(&args.overlays)
        .map(|(disk, path)| {
            let offer = disk.offer();
            DiskOf { overlay: path.clone(), size: offer.size, base: offer.base, disk }
        })
        .collect();
    let image = match (&library, &args.image, disks.first()) {
        (Some(library), Some(name), _) => Some((library, library.image(name)?)),
        (Some(library), None, Some(disk)) => Some((library, image_of(library, &disk.base, &disk.overlay)?)),
        _ => None,
    };
    let domain = args.domain.clone().or_else(|| image.map(|(_, image)| image.domain.clone()));
    let options = Options {
        name: &args.name,
        vm: args.vm.as_deref(),
        domain: domain.as_deref().unwrap_or("default"),
        qmp: &args.qmp,
        copies: args.copies,
        replication: if args.replication == By::Full { Replication::Full } else { Replication::Page },
        image,
        memory_only: args.memory_only,
        disks: &disks,
        templates: args.templates.as_deref(),
        spool: &args.spool,
        stay_stopped: args.stay_stopped,
    };
    let stores = Stores::open(&args.stores.stores, Access::Write)?;
    let saved = save::save(&stores, &options, &Progress::new(), &stop)?;
    show::saved(common, &stores, &saved)
}

/// The image of an overlay.
fn image_of<'a>(library: &'a Library, digest: &[u8; 32], overlay: &Path) -> Result<&'a ImageRecord> {
    library.images().iter().find(|record| record.digest == *digest).ok_or_else(|| {
        let cause = format!("was made on an image (content {}) that the library does not have", hex(digest));
        Error::file(ErrorKind::NotFound, overlay, cause).mend("name its library with --library, or add the image to it")
    })
}

fn bring_back(common: &Common, args: &RestoreArgs) -> Result<()> {
    let began = Instant::now();
    let stop = stop_on_signals()?;
    let stores = Stores::open(&args.stores.stores, Access::Read)?;
    let snapshot = stores.load(&args.name)?;
    if args.overlays.is_empty() && args.qmp.is_none() {
        return Err(
            Error::new(ErrorKind::Usage, "restore", "there is nothing to do").mend("give --overlay, --qmp, or both")
        );
    }
    if !args.overlays.is_empty() && args.overlays.len() != snapshot.disks.len() {
        let cause = format!("the snapshot has {} disks", snapshot.disks.len());
        return Err(Error::new(ErrorKind::Usage, "--overlay", cause).mend("name a new file for each"));
    }
    args.overlays.iter().try_for_each(|path| Arriving::check_free(path))?;
    let library = common.library.as_deref().map(Library::open).transpose()?;
    let pages = Pages::new(&stores, &snapshot, library.as_ref(), &args.spool)?;
    let progress = Progress::new();
    let state_dir = args.state.path();
    for ((path, disk), about) in args.overlays.iter().zip(&snapshot.disks).zip(&snapshot.about.disks) {
        let Some(library) = &library else { return Err(common.library().err().unwrap_or_else(no_library)) };
        let (record, mut overlay) = new_overlay(library, path, &state_dir, about)?;
        restore::disk(&pages, disk, about.write_cache, &mut overlay, &progress, &stop)?;
        if let Err(e) = library.note_overlay(record, path) {
            log::info!("the library does not know of this overlay: {e}");
        }
    }
    let runs = match &args.qmp {
        Some(qmp) => Some(load(&pages, &snapshot, args, qmp, &progress, &stop)?),
        None => None,
    };
    show::restored(common, &snapshot, &pages, runs, began.elapsed())
}

fn no_library() -> Error {
    Error::new(ErrorKind::Usage, "--library", "no library is named")
}

/// An empty overlay for a disk of a snapshot, on the image that it was on.
fn new_overlay<'a>(
    library: &'a Library,
    path: &Path,
    state_dir: &Path,
    about: &AboutDisk,
) -> Result<(&'a ImageRecord, Arriving)> {
    let digest = unhex(&about.base).unwrap_or_default();
    let record = image_of(library, &digest, Path::new(&about.overlay))?;
    library.open_image(record)?;
    let raw = library.image_path(record);
    let backing = std::path::absolute(&raw).map_err(|e| Error::io(&raw, "find", e))?;
    let base = BaseIdentity { digest: record.digest, generation: record.generation, size: record.size };
    let options = CreateOptions { backing: &backing, base, size: about.size, capacity: about.size };
    Ok((record, Arriving::create(path, state_dir, &options)?))
}

/// Loads the memory into a QEMU that waits. Whether the VM runs.
fn load(
    pages: &Pages<'_>,
    snapshot: &Snapshot,
    args: &RestoreArgs,
    qmp: &Path,
    progress: &Progress,
    stop: &AtomicBool,
) -> Result<bool> {
    let began = Instant::now();
    let wait = Duration::from_secs(args.wait);
    let mut monitor = loop {
        match Monitor::connect(qmp) {
            Err(_) if began.elapsed() < wait => {
                stopped(stop)?;
                std::thread::sleep(Duration::from_millis(20));
            }
            result => break result?,
        }
    };
    let status = monitor.status()?;
    if status != "inmigrate" {
        return Err(Error::file(ErrorKind::Usage, qmp, format!("this QEMU waits for no VM: it is in state {status}"))
            .mend("start it with '-incoming defer'"));
    }
    let mut stream = match &args.incoming {
        Some(path) => UnixStream::connect(path).map_err(|e| Error::io(path, "connect to the waiting QEMU", e))?,
        None => {
            let dir = PrivateDir::create(&args.spool)?;
            let connected = monitor.incoming(dir.socket()).and_then(|()| {
                UnixStream::connect(dir.socket()).map_err(|e| Error::io(dir.socket(), "connect to the waiting QEMU", e))
            });
            connected?
        }
    };
    restore::memory(pages, &mut stream, progress, stop)?;
    let sent = Instant::now();
    while monitor.status().map_err(|e| ended(&e, snapshot))? == "inmigrate" {
        if let ("failed", why) = (monitor.migration()?.0.as_str(), monitor.migration()?.1) {
            let why = why.unwrap_or_else(|| "it does not say why".into());
            return Err(ended(&Error::file(ErrorKind::Io, qmp, why), snapshot));
        }
        if sent.elapsed() > LOADED {
            return Err(Error::file(ErrorKind::Io, qmp, "QEMU has got all, and still waits").mend("see its log"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let run = snapshot.about.ran && !args.stay_stopped;
    if run {
        monitor.run()?;
    }
    Ok(run)
}

fn ended(why: &Error, snapshot: &Snapshot) -> Error {
    let mib = |bytes: u64| bytes >> 20;
    let largest = snapshot.memory.blocks.iter().map(|block| block.len).max().unwrap_or(0);
    let mend = format!(
        "see its log; it needs machine {}, {} MiB of memory, and the devices of the VM that was saved",
        snapshot.about.machine,
        mib(largest)
    );
    Error::new(ErrorKind::Unsupported, "QEMU", format!("it did not take the VM: {why}")).mend(mend)
}

fn check(common: &Common, args: &CheckArgs, repair: bool) -> Result<()> {
    let stop = stop_on_signals()?;
    let access = if repair { Access::Alone } else { Access::Read };
    let stores = Stores::open(&args.stores.stores, access)?;
    let progress = Progress::new();
    let work =
        Work { stores: &stores, spool: &args.spool, quick: args.quick, repair, observer: &progress, stop: &stop };
    let findings = work.run(&args.names)?;
    let freed = if repair && args.names.is_empty() && findings.faults.len() == findings.harmless() {
        Some(stores.prune()?)
    } else {
        None
    };
    drop(progress);
    show::findings(common, &stores, &findings, freed)
}

fn delete(names: &[String], args: &StoreArgs) -> Result<()> {
    let stores = Stores::open(&args.stores, Access::Alone)?;
    let there = stores.snapshots()?;
    for name in names {
        check_name(name)?;
        if !there.contains_key(name) {
            return Err(Error::new(ErrorKind::NotFound, format!("snapshot {name}"), "is in none of the stores")
                .mend("'vmar snapshot list' shows the names"));
        }
    }
    names.iter().try_for_each(|name| stores.delete(name).map(|_| ()))?;
    let freed = stores.prune()?;
    println!("{} freed", crate::units::human_bytes(freed));
    Ok(())
}
