//! Pages of guest memory, kept by content: what migrations and snapshots store.
//!
//! A *memory image* is a [`manifest`]: a hash for each page, and where its content is: nowhere (zeros), in an image of the library,
//! or in a [`pack`], a file of pages. Packs are named by what they hold and never changed, so writing one twice is writing it
//! once, and manifests share them. A pack is durable before a manifest that names it is there ([`dir`]).

pub mod dir;
pub mod manifest;
pub mod pack;
pub mod templates;

pub use dir::{Store, StoreWriter};
pub use manifest::Manifest;
pub use pack::{Pack, PackId, PackWriter};

use crate::error::{Error, ErrorKind, Result};
use std::path::Path;

/// A BLAKE3 hash.
pub type Digest = [u8; 32];

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;

/// What to do about a file of the store that cannot be used.
const MEND: &str = "remove it, or bring it back from another store";

/// Refuses a file of another version than this code's.
fn check_version(path: &Path, found: Option<u32>, known: u32) -> Result<()> {
    match found {
        Some(version) if version == known => Ok(()),
        found => {
            let cause = format!("has version {}, not {known}", found.unwrap_or_default());
            Err(Error::file(ErrorKind::Unsupported, path, cause).mend("use the vmar that wrote it, or a newer one"))
        }
    }
}
