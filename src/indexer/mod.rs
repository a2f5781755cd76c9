//! The indexer: makes block maps of fingerprints, and checks them (paper, section 3.1). Nothing on the read path of a
//! guest imports it.
//!
//! ```text
//! add:  file ─ probe ─ (convert) ─ scan ── rows, sorted by hash
//!                                           │ look up: which images hold this hash
//!                                        candidates: one of them, by the policy, and its block
//!                                           │ compare byte for byte ─── differing ─ resolve
//!                                           │ equal                                   │ variants
//!                                        map file                        run file, content index
//! ```
//!
//! - [`add`] puts images into a library, all or none,
//! - [`lifecycle`] removes, updates and renames them, [`capture`] makes one of an overlay,
//! - [`remap`] makes the maps anew, with another policy; [`rebuild`] makes everything anew, of the images,
//! - [`offline`] makes a map of canonical addresses that somebody else found, an SQL engine for one,
//! - [`verify`] reads everything again and compares; [`repair`] mends what it finds bad,
//! - [`stats`] counts what is shared, [`matrix`] by two,
//! - [`estimate`] guesses it for files that are in no library.

pub mod add;
mod arrange;
mod candidates;
pub mod capture;
mod change;
mod choose;
mod compare;
mod contents;
pub mod estimate;
pub mod holders;
mod images;
pub mod lifecycle;
pub mod matrix;
pub mod offline;
mod place;
pub mod rebuild;
pub mod remap;
pub mod repair;
mod resolve;
mod spool;
pub mod stats;
pub mod verify;

use crate::error::{Error, ErrorKind, Result};
use crate::library::{ImageRecord, Library};
use crate::map::{Map, Target};
use std::sync::atomic::{AtomicBool, Ordering};

/// Told how long work goes on.
pub trait Observer: Sync {
    /// A part of the work starts: a phrase for people, and how many bytes it will go through.
    fn begin(&self, what: &str, total_bytes: u64);
    /// So many more bytes are done. Called from all workers.
    fn advance(&self, bytes: u64);
    /// The part is done.
    fn end(&self);
}

/// Nobody wants to know.
pub struct Silent;

impl Observer for Silent {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn end(&self) {}
}

/// How long work is to be done.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// Workers.
    pub threads: usize,
    /// Set by somebody else (a signal handler) to end the work early, with nothing changed.
    pub stop: &'a AtomicBool,
    /// Told about the progress.
    pub observer: &'a dyn Observer,
    /// Bytes of memory that may be used for what grows with the size of an image.
    pub memory: u64,
}

/// Bytes that are enough for images of 30 GiB of data without a scratch file.
pub const MEMORY_DEFAULT: u64 = 1 << 30;

impl<'a> Work<'a> {
    /// One worker a core.
    pub fn on_all_cores(stop: &'a AtomicBool, observer: &'a dyn Observer) -> Work<'a> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        Work { threads, stop, observer, memory: MEMORY_DEFAULT }
    }

    /// An error if the work is to end.
    fn check_stop(&self, what: &str) -> Result<()> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Interrupted, what, "stopped; nothing was changed"));
        }
        Ok(())
    }
}

/// The identity of an image, as maps record it.
pub fn target_of(record: &ImageRecord) -> Target {
    Target { image: record.id, generation: record.generation, digest: record.digest, size: record.size }
}

/// Reads and verifies the block map of an image, which must be the map of that very image.
pub fn read_map(library: &Library, record: &ImageRecord) -> Result<Map<Vec<u8>>> {
    let path = library.map_path(&record.name);
    let bytes = std::fs::read(&path)
        .map_err(|e| Error::io(&path, "read the block map", e).mend("make it anew with 'vmar library remap'"))?;
    let map = Map::new(bytes).map_err(|e| e.at(&path))?;
    if map.source() != target_of(record) {
        let cause = format!("it is a map of another image than {}", record.name);
        return Err(Error::file(ErrorKind::Corrupt, &path, cause).mend("restore it from a backup"));
    }
    Ok(map)
}
