//! Fingerprints of 4 KiB blocks (paper, section 3.1), and the digest of a whole image.
//!
//! A fingerprint is a hint and never a proof: SHA-1 collisions exist, so two blocks are compared byte for byte before
//! one is read in place of the other.

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
