//! `vmar library`: makes a library, and its maps anew.

use super::Common;
use super::image::stop_on_signals;
use super::output::{Progress, percent, print_json};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Algorithm;
use crate::indexer::Work;
use crate::indexer::rebuild::{rebuild, rebuild_index};
use crate::indexer::remap::remap_by;
use crate::library::{Library, Policy, Writer};
use crate::redirect::trace::TraceReader;
use crate::units::{ImageId, human_bytes};
use serde::Serialize;
use std::collections::BTreeMap;
use std::fs::File;
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
        #[arg(long, value_name = "paper|bridge|most-used|least-fragmented", default_value = Policy::DEFAULT.name())]
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
        /// Which copy of a content is read by all (default: as before); 'most-used' prefers the images of --traces,
        /// 'least-fragmented' the image with the longest runs
        #[arg(long, value_name = "paper|bridge|most-used|least-fragmented")]
        policy: Option<Policy>,
        /// Knobs of the policy.
        #[command(flatten)]
        knobs: Knobs,
        /// Policy most-used: traces of boots ('vmar serve --record') that say which images are read most
        #[arg(long, value_name = "FILE", num_args = 1..)]
        traces: Vec<PathBuf>,
    },
    /// Make everything that the library knows anew, of the images; they must be what was added
    Rebuild {
        /// Only the content index, of the fingerprints
        #[arg(long)]
        index: bool,
    },
}

/// Knobs of the policies that look at the length of runs.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Knobs {
    /// Read on in another image through a break of at most N blocks, if it holds them too [8 with --policy]
    #[arg(long, value_name = "N")]
    bridge: Option<u32>,
    /// Runs of fewer than N blocks stay in the image itself [8 with --policy]
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
        Verb::Remap { policy, knobs, traces } => run_remap(common, policy, knobs, &traces),
        Verb::Rebuild { index } => run_rebuild(common, index),
    }
}

fn run_rebuild(common: &Common, index: bool) -> Result<()> {
    let stop = stop_on_signals()?;
    let progress = Progress::new();
    let mut writer = Writer::open(common.library()?)?;
    let work = Work::on_all_cores(&stop, &progress);
    let images = if index {
        rebuild_index(&mut writer, &work)?;
        Vec::new()
    } else {
        rebuild(&mut writer, &work)?
    };
    drop(progress);
    if common.json {
        return print_json(&serde_json::json!({ "index": true, "images": images.len() }));
    }
    images.iter().for_each(super::image::print_added);
    println!("the content index was made anew");
    Ok(())
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

/// Blocks that each image's VMs have read, by the image's ID.
fn usage(library: &Library, traces: &[PathBuf]) -> Result<Option<BTreeMap<u32, u64>>> {
    if traces.is_empty() {
        return Ok(None);
    }
    let mut usage = BTreeMap::new();
    for path in traces {
        let file = File::open(path).map_err(|e| Error::io(path, "open the trace", e))?;
        let reader = TraceReader::new(file, path)?;
        let header = *reader.header();
        if header.library != library.catalog().uuid_bytes() {
            let cause = "was recorded with another library, whose image numbers mean something else";
            return Err(Error::file(ErrorKind::Changed, path, cause).mend("give traces of this library"));
        }
        let mut blocks = 0;
        for record in reader {
            blocks += u64::from(record?.count);
        }
        // An image that is gone, or has another content by now, says nothing of what will be read.
        if library.image_by_id(ImageId(header.image)).is_ok_and(|r| r.digest == header.digest) {
            *usage.entry(header.image).or_default() += blocks;
        }
    }
    Ok(Some(usage))
}

fn run_remap(common: &Common, policy: Option<Policy>, knobs: Knobs, traces: &[PathBuf]) -> Result<()> {
    let stop = stop_on_signals()?;
    let progress = Progress::new();
    let mut writer = Writer::open(common.library()?)?;
    let old = writer.library().catalog().policy;
    let policy = policy.unwrap_or(old).with_knobs(knobs.bridge, knobs.min_run)?;
    let usage = usage(writer.library(), traces)?;
    let maps = remap_by(&mut writer, policy, usage, &Work::on_all_cores(&stop, &progress))?;
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
