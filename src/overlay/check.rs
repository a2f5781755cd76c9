//! Looking at an overlay from outside: changes nothing and takes no lock, so it works while a VM runs on it.

use super::disk::Disk;
use super::layout::index;
use super::scan::{self, Fault};
use super::session::{self, Ending};
use super::{BaseIdentity, check_base, open_file, read_metadata, scan_all, stopped};
use crate::error::{Error, Result};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// What an overlay is and holds.
#[derive(Clone, Debug)]
pub struct Info {
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes that it can grow to.
    pub capacity: u64,
    /// The base image that it was made for.
    pub base: BaseIdentity,
    /// The path of that image.
    pub backing: PathBuf,
    /// Its session.
    pub session: SessionInfo,
    /// True if a vmar or a QEMU has it open right now.
    pub in_use: bool,
    /// Subclusters (2 KiB) whose data is in the file.
    pub data_subclusters: u64,
    /// Subclusters that read as zeros.
    pub zero_subclusters: u64,
    /// Clusters (64 KiB) that QEMU has freed or added; opening for writing takes them back.
    pub freed_clusters: u64,
    /// Bytes that the file takes on disk.
    pub disk_bytes: u64,
    /// Host offset of guest byte 0.
    pub data_start: u64,
}

/// The session of an overlay, seen from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionInfo {
    /// Stopped cleanly: everything is in the file.
    Closed,
    /// Open, with its live bitmap: in use, or its process was killed and the next one goes on.
    Open,
    /// Was open when the host went down: the state of the last flush counts.
    OtherBoot,
    /// Open without a live bitmap that can be used; opening it needs `--discard-unflushed`.
    Lost,
}

impl SessionInfo {
    /// A word for it, also in JSON.
    pub fn name(self) -> &'static str {
        match self {
            SessionInfo::Closed => "closed",
            SessionInfo::Open => "open",
            SessionInfo::OtherBoot => "other-boot",
            SessionInfo::Lost => "lost",
        }
    }
}

/// What the header of an overlay says of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Bytes of the disk.
    pub size: u64,
    /// False if the guest had switched the write cache off when the overlay was last closed.
    pub write_cache: bool,
}

/// Makes sure, by its header alone, that the file at `path` is an overlay for this base; takes no lock.
pub fn look(path: &Path, base: BaseIdentity) -> Result<Look> {
    let (_, header, _) = read_metadata(path, Disk::new(open_file(path, true)?, None))?;
    check_base(path, &header, Some(base))?;
    Ok(Look { size: header.size, write_cache: !header.write_through() })
}

/// The image that an overlay was made on; reads its header alone.
pub fn base_of(path: &Path) -> Result<BaseIdentity> {
    let (_, header, _) = read_metadata(path, Disk::new(open_file(path, true)?, None))?;
    Ok(header.extension.base)
}

/// What the overlay at `path` is and holds; the live bitmap is used if there is one in `state_dir`.
pub fn inspect(path: &Path, state_dir: &Path) -> Result<Info> {
    let file = open_file(path, true)?;
    let meta = file.metadata().map_err(|e| Error::io(path, "look at", e))?;
    let in_use = crate::io::lock::in_use(&file, path)?;
    let (disk, header, layout) = read_metadata(path, Disk::new(file, None))?;
    let ending = session::ending(&disk, path, &header, &layout, state_dir)?;
    let (session, live) = match ending {
        Ending::Closed => (SessionInfo::Closed, None),
        Ending::Killed(live) => (SessionInfo::Open, Some(live)),
        Ending::KilledThenQemu => (SessionInfo::Open, None),
        Ending::OtherBoot => (SessionInfo::OtherBoot, None),
        Ending::Lost(_) => (SessionInfo::Lost, None),
    };
    let (mut data, mut zero) = (0, 0);
    let count = |cluster, durable: u64| {
        let word = live.as_ref().map_or(durable, |l| l.words()[index(cluster)].load(Ordering::Acquire));
        data += u64::from((word & 0xffff_ffff).count_ones());
        zero += u64::from((word >> 32).count_ones());
    };
    let unseated = scan_all(path, &disk, &header, &layout, count)?;
    Ok(Info {
        size: header.size,
        capacity: layout.capacity,
        base: header.extension.base,
        backing: header.backing,
        session,
        in_use,
        data_subclusters: data,
        zero_subclusters: zero,
        freed_clusters: unseated.len(),
        disk_bytes: meta.blocks() * 512,
        data_start: layout.data,
    })
}

/// How many faults are told one by one.
const FAULTS_MAX: usize = 20;

/// What [`examine`] finds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// What is wrong, a line each; none is a clean overlay.
    pub faults: Vec<String>,
    /// Clusters (64 KiB) that QEMU has freed or added; opening for writing takes them back. No fault.
    pub freed_clusters: u64,
    /// All that is wrong is where clusters are: 'vmar overlay relayout' puts it right.
    pub relayout: bool,
}

/// Checks header, layout, bitmaps and refcounts of the file. Returns the faults, a line each; none is a clean overlay.
pub fn check(path: &Path) -> Result<Vec<String>> {
    Ok(examine(path)?.faults)
}

/// The same, and what else there is to say.
pub fn examine(path: &Path) -> Result<Report> {
    let (disk, header, layout) = read_metadata(path, Disk::new(open_file(path, true)?, None))?;
    let mut corrupt = false;
    let mut faults = Vec::new();
    let mut more = 0u64;
    let mut note = |fault| {
        corrupt |= matches!(fault, Fault::Corrupt(_));
        let (Fault::Layout(what) | Fault::Corrupt(what)) = fault;
        if faults.len() < FAULTS_MAX {
            faults.push(what);
        } else {
            more += 1;
        }
        Ok(())
    };
    let unseated = scan::all(&disk, &layout, &mut note, |_, _| {}).map_err(|stop| stopped(path, stop))?;
    if let Err(fault) = unseated.check_bitmaps(&header) {
        // Collected like the others.
        let _: std::result::Result<(), Fault> = note(fault);
    }
    if more > 0 {
        faults.push(format!("and {more} more"));
    }
    let relayout = !faults.is_empty() && !corrupt;
    Ok(Report { faults, freed_clusters: unseated.len(), relayout })
}
