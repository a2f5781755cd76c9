//! `vmar library`: makes a library.

use super::Common;
use crate::error::Result;
use crate::fingerprint::Algorithm;
use crate::library::{Library, Policy};
use std::path::PathBuf;

/// Verbs of `vmar library`.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Make an empty library in DIR (default: --library)
    Init {
        /// The directory: new or empty
        dir: Option<PathBuf>,
        /// Which copy of a content is read by all: 'paper' is the lowest block of the lowest image ID
        #[arg(long, default_value_t = Policy::Paper)]
        policy: Policy,
        /// How blocks are fingerprinted
        #[arg(long, default_value_t = Algorithm::Sha1)]
        fingerprint: Algorithm,
    },
}

/// Runs the verb.
pub fn run(common: &Common, verb: Verb) -> Result<()> {
    match verb {
        Verb::Init { dir, policy, fingerprint } => {
            let dir = match &dir {
                Some(dir) => dir,
                None => common.library()?,
            };
            Library::init(dir, policy, fingerprint).map(drop)
        }
    }
}
