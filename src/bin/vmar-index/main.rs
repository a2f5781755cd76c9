//! `vmar-index`: the canonical addresses of a library that outgrew `vmar library remap`, by SQL over its fingerprint runs.
//!
//! ```text
//! library.json, runs/*.parquet            session: DataFusion in this process, or a Ballista cluster
//!        │                                   │
//!     library ── tables `blocks`, `images` ──┤  sql/homes.sql
//!                                            ▼
//!                       (rank, block, home) in order ── homes ── vmar::indexer::offline ── OUT/NAME.map
//! ```
//!
//! Only the constructor of the session knows whether there is a cluster ([`session`]). The statements are those of
//! `docs/index-sql.md`. Nothing of this is part of `vmar`: no VM's disk should link an SQL engine.

mod cluster;
mod homes;
mod preference;
mod session;
mod sql;
mod synthesize;
mod tables;
#[cfg(test)]
mod tests;

use clap::{Parser, Subcommand};
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use vmar::cli::overlay::parse_size;
use vmar::library::{Library, Policy};
use vmar::{Error, ErrorKind, Result};

/// Block maps of large libraries, by SQL over their fingerprint runs.
#[derive(Debug, Parser)]
#[command(name = "vmar-index", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Write the block maps of a library into a directory
    Run {
        #[command(flatten)]
        source: Source,
        /// Which copy of a content is read by all (default: the library's)
        #[arg(long, value_name = "paper|bridge|most-used|least-fragmented")]
        policy: Option<Policy>,
        /// Read on in another image through a break of at most N blocks, if it holds them too [8 with --policy]
        #[arg(long, value_name = "N")]
        bridge: Option<u32>,
        /// Runs of fewer than N blocks stay in the image itself [8 with --policy]
        #[arg(long, value_name = "N")]
        min_run: Option<u32>,
        /// Where the maps go, as NAME.map
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Print what an SQL statement says about a library
    Query {
        #[command(flatten)]
        source: Source,
        /// Plan instead of rows
        #[arg(long)]
        explain: bool,
        /// A statement over `blocks` and `images`, or the name of one: homes, clusters, shared, fragments,
        /// similarity
        statement: String,
    },
    /// Hand out the work of a cluster: the Ballista scheduler
    Scheduler(cluster::Scheduler),
    /// Do work of a cluster: a Ballista executor
    Executor(cluster::Executor),
    /// Make a library of runs, or raw images, of numbers that nobody stored: to try a cluster with
    Synthesize(synthesize::Args),
}

/// What is asked, and who answers.
#[derive(Debug, clap::Args)]
struct Source {
    /// The library directory; on a cluster the same path on every machine
    #[arg(long, env = "VMAR_LIBRARY", value_name = "DIR")]
    library: PathBuf,
    #[command(flatten)]
    engine: session::Engine,
}

fn main() -> ExitCode {
    // SIGPIPE stays ignored, other than in `vmar`: a peer that hangs up must not end an executor. See `say`.
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    match dispatch(Cli::parse().verb) {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("vmar-index: {err}");
            ExitCode::from(if err.kind() == ErrorKind::Usage { 2 } else { 1 })
        }
    }
}

fn dispatch(verb: Verb) -> Result<()> {
    // Plans are walked by recursion, and a plan over a thousand runs is a large one.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_stack_size(16 << 20).build();
    let runtime = runtime.map_err(|e| Error::new(ErrorKind::Io, "threads", format!("cannot start them: {e}")))?;
    match verb {
        Verb::Run { source, policy, bridge, min_run, out } => {
            let library = Library::open(&source.library)?;
            let policy = policy.unwrap_or(library.catalog().policy).with_knobs(bridge, min_run)?;
            say(runtime.block_on(homes::run(&library, &source.engine, policy, &out))?)
        }
        Verb::Query { source, explain, statement } => {
            runtime.block_on(sql::query(&Library::open(&source.library)?, &source.engine, &statement, explain))
        }
        Verb::Scheduler(args) => runtime.block_on(args.run()),
        Verb::Executor(args) => runtime.block_on(args.run()),
        Verb::Synthesize(args) => args.run(),
    }
}

/// Prints lines. A reader that has seen enough (`| head`) is no error.
fn say(text: impl std::fmt::Display) -> Result<()> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(Error::io("standard output", "write", e).mend("send it elsewhere"))
        }
        _ => Ok(()),
    }
}

/// An engine's error in one line. Its own words are kept, they are all there is.
fn engine_error(subject: &str, err: impl std::fmt::Display) -> Error {
    let text = err.to_string();
    let error = Error::new(ErrorKind::Io, subject, text.trim());
    match text.contains("Resources exhausted") {
        true => error.mend("give it more --memory, or fewer --partitions to share it"),
        false => error,
    }
}
