//! What a file of an operator's is: raw, something that can be made raw, or nothing for vmar.

mod convert;
mod magic;
mod probe;
mod safety;

pub use convert::{Conversion, convert, virtual_size};
pub use probe::{Probe, probe};

use serde::{Deserialize, Serialize};
use std::fmt;

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
