//! `vmar stats` (being built)

use super::Common;
use crate::error::Result;

/// Arguments of `vmar stats`.
#[derive(Debug, clap::Args)]
pub struct Args {}

/// Runs the verb.
pub fn run(_common: &Common, _args: Args) -> Result<()> {
    Ok(())
}
