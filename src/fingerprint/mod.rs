//! Fingerprints of 4 KiB blocks (paper, section 3.1), and the digest of a whole image.
//!
//! A fingerprint is a hint and never a proof: SHA-1 collisions exist, so two blocks are compared byte for byte before
//! one is read in place of the other. Zero blocks and holes have no fingerprint. A partial last block is fingerprinted
//! by the bytes that it has.
//!
//! - [`scan`] reads an image once, on all cores, and makes its fingerprints and its [`digest`],
//! - [`chunks`] keeps what the digest is made of,
//! - [`log`] keeps what a scan has found so far, for large images,
//! - [`run`] keeps the fingerprints of one image in a file, sorted by hash.

pub mod chunks;
pub mod digest;
pub mod extents;
pub mod log;
pub mod run;
pub mod scan;

use crate::error::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How blocks are fingerprinted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Algorithm {
    /// SHA-1, the paper's: 20 bytes.
    Sha1,
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Algorithm::Sha1 => "sha1",
        })
    }
}

impl FromStr for Algorithm {
    type Err = Error;
    fn from_str(text: &str) -> Result<Algorithm> {
        match text {
            "sha1" => Ok(Algorithm::Sha1),
            _ => {
                Err(Error::new(ErrorKind::Usage, format!("fingerprint {text:?}"), "unknown")
                    .mend("the fingerprints: sha1"))
            }
        }
    }
}

/// Bytes of a block, as a buffer length.
pub const BLOCK_BYTES: usize = 4096;
const _: () = assert!(BLOCK_BYTES as u64 == crate::units::BLOCK_SIZE);

/// The hash of a block.
pub type Hash = [u8; 20];

/// One non-zero block of an image. Rows are ordered by hash, then variant, then block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    /// Hash of the block's bytes.
    pub hash: Hash,
    /// Which content of this hash: 0, unless contents collide. Equal `(hash, variant)` means equal bytes, throughout a
    /// sharing domain.
    pub variant: u32,
    /// Where in the image, in blocks.
    pub block: u32,
}

/// Hashes one block.
pub fn hash_block(algorithm: Algorithm, bytes: &[u8]) -> Hash {
    use sha1::Digest;
    match algorithm {
        Algorithm::Sha1 => sha1::Sha1::digest(bytes).into(),
    }
}
