//! `vmar library`: makes a library, and its maps anew.

use super::Common;
use super::image::stop_on_signals;
use super::output::{Progress, percent, print_json};
use crate::error::Result;
use crate::fingerprint::Algorithm;
use crate::indexer::Work;
use crate::indexer::remap::remap;
use crate::library::{Library, Policy, Writer};
use crate::units::human_bytes;
use serde::Serialize;
use std::path::PathBuf;

/// Verbs of `vmar library`.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Make an empty library in DIR (default: --library)
    Init {
        /// The directory: new or empty
        dir: Option<PathBuf>,
        /// Which copy of a content is read by all: 'paper' is the lowest block of the lowest image ID; 'bridge' the same
        /// without its short runs
        #[arg(long, value_name = "paper|bridge", default_value = Policy::DEFAULT.name())]
        policy: Policy,
        /// Knobs of the policy.
        #[command(flatten)]
        knobs: Knobs,
        /// How blocks are fingerprinted
        #[arg(long, default_value_t = Algorithm::Sha1)]
        fingerprint: Algorithm,
    },
    /// Make all block maps anew, with another policy or the library's own. Servers with a control socket on this
    /// host change to their new map; others keep the one that they have until they are told (vmar control PATH reload)
    Remap {
        /// Which copy of a content is read by all (default: as before)
        #[arg(long, value_name = "paper|bridge")]
        policy: Option<Policy>,
        /// Knobs of the policy.
        #[command(flatten)]
        knobs: Knobs,
    },
}

/// Knobs of the policy `bridge`.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Knobs {
    /// Policy bridge: read on in another image through a break of at most N blocks, if it holds them too [8 with --policy]
    #[arg(long, value_name = "N")]
    bridge: Option<u32>,
    /// Policy bridge: runs of fewer than N blocks stay in the image itself [8 with --policy]
    #[arg(long, value_name = "N")]
    min_run: Option<u32>,
}

/// Runs the verb.
pub fn run(common: &Common, verb: Verb) -> Result<()> {
    match verb {
        Verb::Init { dir, policy, knobs, fingerprint } => {
            let dir = match &dir {
                Some(dir) => dir,
                None => common.library()?,
            };
            let policy = policy.with_knobs(knobs.bridge, knobs.min_run)?;
            Library::init(dir, policy, fingerprint).map(drop)
        }
        Verb::Remap { policy, knobs } => run_remap(common, policy, knobs),
    }
}

/// A map as `remap` prints it.
#[derive(Debug, Serialize)]
struct MapLine {
    name: String,
    nonzero_blocks: u64,
    redirected_blocks: u64,
    entries: u64,
    map_bytes: u64,
    reads_from: Vec<u32>,
}

fn run_remap(common: &Common, policy: Option<Policy>, knobs: Knobs) -> Result<()> {
    let stop = stop_on_signals()?;
    let progress = Progress::new();
    let mut writer = Writer::open(common.library()?)?;
    let old = writer.library().catalog().policy;
    let policy = policy.unwrap_or(old).with_knobs(knobs.bridge, knobs.min_run)?;
    let maps = remap(&mut writer, policy, &Work::on_all_cores(&stop, &progress))?;
    drop(progress);
    super::tell::tell_and_warn(writer.library());
    let line = |m: &crate::indexer::remap::Remapped| MapLine {
        name: m.name.clone(),
        nonzero_blocks: m.totals.nonzero_blocks,
        redirected_blocks: m.totals.redirected_blocks,
        entries: m.totals.entries,
        map_bytes: m.totals.map_bytes,
        reads_from: m.reads_from.iter().map(|id| id.0).collect(),
    };
    let lines: Vec<MapLine> = maps.iter().map(line).collect();
    if common.json {
        return print_json(&lines);
    }
    println!("policy {policy}{}", if policy == old { String::new() } else { format!(", before {old}") });
    for m in &lines {
        println!(
            "{}: {} read from {} other image{}; {} entries, map {}",
            m.name,
            percent(m.redirected_blocks, m.nonzero_blocks),
            m.reads_from.len(),
            if m.reads_from.len() == 1 { "" } else { "s" },
            m.entries,
            human_bytes(m.map_bytes),
        );
    }
    Ok(())
}
