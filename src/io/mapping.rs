//! A file mapped read-only, so that many processes share one copy of it.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

/// The bytes of a file, shared with every other process that maps it.
///
/// Limit: whoever truncates the file under the mapping kills the process with SIGBUS. vmar's own files that are
/// mapped (block maps) are only ever replaced by rename, never changed in place.
#[derive(Debug)]
pub struct Mapping(memmap2::Mmap);

impl Mapping {
    /// Maps the whole file.
    pub fn open(path: impl AsRef<Path>) -> io::Result<Self> {
        Self::of(&File::open(path)?)
    }

    /// Maps the whole of an open file, which may be closed then.
    pub fn of(file: &File) -> io::Result<Self> {
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        // SAFETY: the mapping is read-only and private to readers; vmar replaces mapped files by rename and never
        // writes into them. A foreign truncation raises SIGBUS, see the limit above.
        unsafe { memmap2::Mmap::map(file) }.map(Mapping)
    }
}

impl Deref for Mapping {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}
