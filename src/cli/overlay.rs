//! `vmar overlay` (being built)

use super::Common;
use crate::error::Result;

/// Verbs of `vmar overlay`.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {}

/// Runs the verb.
pub fn run(_common: &Common, verb: Verb) -> Result<()> {
    match verb {}
}
