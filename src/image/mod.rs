//! What a file of an operator's is: raw, something that can be made raw, or nothing for vmar.

mod convert;
mod magic;
mod over;
pub mod partitions;
mod probe;
mod safety;

pub use convert::{Conversion, convert, virtual_size};
pub use over::{Found, convert_over, look_at};
pub use probe::{Probe, probe};

use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Formats that vmar takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The bytes of the disk as they are.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// VMware's format, sparse or with a descriptor.
    Vmdk,
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
        })
    }
}

/// `len` bytes of the file from `offset` on; fewer is an error.
fn bytes_at(file: &File, path: &Path, offset: u64, len: u64) -> Result<Vec<u8>> {
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
    file.read_exact_at(&mut bytes, offset).map_err(|e| Error::io(path, "read", e))?;
    Ok(bytes)
}
