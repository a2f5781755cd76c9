//! The overlay file as a device: every read, write, fsync and punch of it goes through here and nowhere else, so that the
//! order of them can be recorded, and any of them be held or made to fail ([`crate::io::fault`]).

use crate::io::fault::{Faults, FileRef};
use crate::io::{Hot, IoBuf};
use std::fs::File;
use std::io;
use std::sync::Arc;

/// The open overlay file.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    /// `None` outside of tests.
    faults: Option<Arc<dyn Faults>>,
    /// The file mapped, for the reads of a running VM.
    hot: Option<Hot>,
}

impl Disk {
    pub fn new(file: File, faults: Option<Arc<dyn Faults>>) -> Disk {
        Disk { file, faults, hot: None }
    }

    /// Maps the first `len` bytes for reading. A file with faults is not mapped: nothing may pass them by.
    pub fn map(&mut self, len: u64) {
        self.hot = if self.faults.is_none() { Hot::map(&self.file, len) } else { None };
    }

    /// Relies no more on what was in the page cache.
    pub fn cool(&self) {
        self.hot.iter().for_each(Hot::cool);
    }

    /// The file for those who read it elsewhere.
    pub fn file(&self) -> FileRef<'_> {
        match &self.hot {
            Some(hot) => FileRef::with_hot(&self.file, Some(hot)),
            None => FileRef::new(&self.file, self.faults.as_ref()),
        }
    }

    /// The file without faults: for its metadata.
    pub fn bare(&self) -> &File {
        &self.file
    }

    pub fn read(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.file().read_exact_at(buf, at)
    }

    pub fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.file().write_all_at(bytes, at)
    }

    pub fn write_bufs(&self, bufs: &[IoBuf], at: u64) -> io::Result<()> {
        self.file().write_all(bufs, at)
    }

    pub fn sync_data(&self) -> io::Result<()> {
        self.file().sync_data()
    }

    pub fn sync_all(&self) -> io::Result<()> {
        self.file().sync_all()
    }

    pub fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.file().punch_hole(at, len)
    }
}
