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
    /// BLAKE3 with a key for each sharing domain, the first 20 bytes: who has the fingerprints of one domain and not its key
    /// learns nothing of what its images hold, nor what they have in common with those of another domain.
    Blake3,
}

impl Algorithm {
    /// All of them.
    const ALL: [Algorithm; 2] = [Algorithm::Sha1, Algorithm::Blake3];

    fn name(self) -> &'static str {
        match self {
            Algorithm::Sha1 => "sha1",
            Algorithm::Blake3 => "blake3",
        }
    }
}

impl fmt::Display for Algorithm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Algorithm {
    type Err = Error;
    fn from_str(text: &str) -> Result<Algorithm> {
        Algorithm::ALL.into_iter().find(|a| a.name() == text).ok_or_else(|| {
            Error::new(ErrorKind::Usage, format!("fingerprint {text:?}"), "unknown")
                .mend("the fingerprints: sha1, blake3")
        })
    }
}

/// What makes the hash of a block: the algorithm, with its key if it takes one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Hasher {
    /// [`Algorithm::Sha1`].
    Sha1,
    /// [`Algorithm::Blake3`], with the key of a sharing domain.
    Blake3([u8; 32]),
}

impl Hasher {
    /// Which algorithm it is.
    pub fn algorithm(&self) -> Algorithm {
        match self {
            Hasher::Sha1 => Algorithm::Sha1,
            Hasher::Blake3(_) => Algorithm::Blake3,
        }
    }

    /// Hashes one block.
    pub fn hash(&self, bytes: &[u8]) -> Hash {
        match self {
            Hasher::Sha1 => <sha1::Sha1 as sha1::Digest>::digest(bytes).into(),
            Hasher::Blake3(key) => {
                let mut out = Hash::default();
                blake3::Hasher::new_keyed(key).update(bytes).finalize_xof().fill(&mut out);
                out
            }
        }
    }
}

impl Hasher {
    /// Makes bytes that are stored unreadable without the key, or readable again; does nothing without a key. No two contents
    /// may ever be stored under one `name` and key.
    pub fn veil(&self, name: &str, bytes: &mut [u8]) {
        let Hasher::Blake3(key) = self else { return };
        let mut stream = blake3::Hasher::new_keyed(key).update(b"vmar veil 1\n").update(name.as_bytes()).finalize_xof();
        let mut pad = [0; 4096];
        for part in bytes.chunks_mut(pad.len()) {
            stream.fill(&mut pad);
            part.iter_mut().zip(&pad).for_each(|(byte, pad)| *byte ^= pad);
        }
    }
}

/// Never with the key.
impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Hasher({})", self.algorithm())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_the_standards() {
        let hex = |hash: Hash| crate::codec::hex(&hash);
        assert_eq!(hex(Hasher::Sha1.hash(b"abc")), "a9993e364706816aba3e25717850c26c9cd0d89d");
        // The first of BLAKE3's published test vectors: no input, this key.
        let key = *b"whats the Elvish word for friend";
        assert_eq!(hex(Hasher::Blake3(key).hash(b"")), "92b2b75604ed3c761f9d6f62392c8a9227ad0ea3");
        assert_ne!(Hasher::Blake3(key).hash(b"abc"), Hasher::Blake3([0; 32]).hash(b"abc"));
        assert!(!format!("{:?}", Hasher::Blake3(key)).contains("119"), "a key is not to be printed");
    }

    #[test]
    fn what_is_veiled_is_readable_with_key_and_name() {
        let plain: Vec<u8> = (0..9000u32).map(|i| i as u8).collect();
        let veiled = |hasher: Hasher, name: &str, bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            hasher.veil(name, &mut bytes);
            bytes
        };
        let (a, b) = (Hasher::Blake3([1; 32]), Hasher::Blake3([2; 32]));
        let secret = veiled(a, "x", &plain);
        assert_eq!(veiled(a, "x", &secret), plain);
        assert_eq!(veiled(Hasher::Sha1, "x", &plain), plain);
        for (hasher, name) in [(b, "x"), (a, "y"), (Hasher::Sha1, "x")] {
            let other = veiled(hasher, name, &plain);
            assert!(secret.windows(8).zip(other.windows(8)).all(|(a, b)| a != b));
        }
    }
}
