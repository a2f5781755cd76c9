//! The indexer: makes block maps of fingerprints, and checks them (paper, section 3.1). Nothing on the read path of a
//! guest imports it.
//!
//! ```text
//! add:  file ─ probe ─ (convert) ─ scan ─┬─ run, sorted by hash ─────────────────────┐
//!                                        └─ join with the earlier images' runs       │
//!                                               │ candidates: same hash              │ variants
//!                                        compare byte for byte ─── differing ─ resolve ─ run file
//!                                               │ equal                                  map file
//! ```
//!
//! - [`add`] puts images into a library, all or none,
//! - [`remap`] makes the maps anew, with another policy,
//! - [`offline`] makes a map of canonical addresses that somebody else found, an SQL engine for one,
//! - [`verify`] reads everything again and compares,
//! - [`stats`] counts what is shared.

pub mod add;
mod arrange;
mod compare;
mod join;
pub mod offline;
pub mod remap;
mod resolve;
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
}

impl<'a> Work<'a> {
    /// One worker a core.
    pub fn on_all_cores(stop: &'a AtomicBool, observer: &'a dyn Observer) -> Work<'a> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        Work { threads, stop, observer }
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
