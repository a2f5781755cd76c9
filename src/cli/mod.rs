//! The command line: one file a verb. Raw arguments are resolved here, work is done on the floors below.

pub mod control;
mod domain;
pub mod estimate;
mod explain;
pub mod image;
mod kept;
pub mod library;
pub mod lifecycle;
pub mod map;
mod matrix;
pub mod migrate;
mod moved;
mod moving_disk;
pub mod output;
pub mod overlay;
pub mod repair;
mod replay;
pub mod report;
mod running;
pub mod serve;
pub mod snapshot;
mod snapshot_show;
pub mod stats;
pub mod tell;
mod tls;
pub mod trace;
pub mod verify;

use crate::error::{Error, ErrorKind, Result};
use clap::{Parser, Subcommand};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// VMs of different images share the host page cache.
#[derive(Debug, Parser)]
#[command(
    name = "vmar",
    version,
    about,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    verb: Verb,
}

/// What every verb takes.
#[derive(Debug, clap::Args)]
pub struct Common {
    /// The library directory
    #[arg(long, global = true, env = "VMAR_LIBRARY", value_name = "DIR")]
    pub library: Option<PathBuf>,
    /// Print JSON instead of a table (informational commands)
    #[arg(long, global = true)]
    pub json: bool,
}

impl Common {
    /// The library directory, or how to name one.
    pub fn library(&self) -> Result<&Path> {
        self.library.as_deref().ok_or_else(|| {
            Error::new(ErrorKind::Usage, "--library", "no library is named")
                .mend("give --library DIR or set VMAR_LIBRARY")
        })
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make a library
    #[command(subcommand)]
    Library(library::Verb),
    /// Add images and look at them
    #[command(subcommand)]
    Image(image::Verb),
    /// Look inside a block map
    #[command(subcommand)]
    Map(map::Verb),
    /// What image files would share, before any of them is in a library
    Estimate(estimate::Args),
    /// Copy-on-write overlays
    #[command(subcommand)]
    Overlay(overlay::Verb),
    /// Traces of base reads
    #[command(subcommand)]
    Trace(trace::Verb),
    /// Similarity and map sizes of a library
    Stats(stats::Args),
    /// A page with plots: of an evaluation, of a library
    Report(report::Args),
    /// Be a VM's disk: the vhost-user-blk backend
    Serve(Box<serve::Args>),
    /// Ask a running server, by its control socket
    Control(control::Args),
    /// Move running VMs to another host
    #[command(subcommand)]
    Migrate(Box<migrate::Verb>),
    /// Memory that VMs left behind when they migrated
    #[command(subcommand)]
    Kept(kept::Verb),
    /// Pages that many VMs hold, known to both hosts before a migration
    #[command(subcommand)]
    Template(kept::TemplateVerb),
    /// Keep running VMs, with their disks, in several stores
    #[command(subcommand)]
    Snapshot(Box<snapshot::Verb>),
}

/// A full disk under standard output is an error like any other, not the panic of println!.
#[expect(clippy::exit, reason = "println! has nobody to return an error to")]
fn no_panic_when_stdout_fails() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        let said = info.payload().downcast_ref::<String>();
        if let Some(why) = said.and_then(|s| s.strip_prefix("failed printing to stdout: ")) {
            eprintln!("vmar: standard output: cannot write: {why}; send it elsewhere");
            std::process::exit(1);
        }
        usual(info);
    }));
}

/// Prints help as it is, and wrong usage as one line.
fn refuse_arguments(err: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand as NothingGiven;
    if !err.use_stderr() || err.kind() == NothingGiven {
        err.exit();
    }
    let text = err.render().to_string();
    // The first paragraph says what is wrong, tips follow; the usage and where to find help come last.
    let said: Vec<&str> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty() && !l.starts_with("For more information"))
        .take_while(|l| !l.starts_with("Usage:"))
        .collect();
    let said = said.join(" ").replace(" tip:", "; tip:");
    let said = said.strip_prefix("error: ").unwrap_or(&said);
    match text.lines().find_map(|l| l.trim().strip_prefix("Usage: ")) {
        // As far as the options: the command itself.
        Some(usage) => {
            eprintln!("vmar: {said}; see '{} --help'", usage.split(['[', '<', '-']).next().unwrap_or(usage).trim())
        }
        None => eprintln!("vmar: {said}"),
    }
    ExitCode::from(2)
}

/// Runs the binary: parses, dispatches, prints one line on failure.
pub fn main() -> ExitCode {
    // Rust ignores SIGPIPE, and a closed `| head` would then be a panic in println!.
    // SAFETY: called once, first thing in main, before any thread exists.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    no_panic_when_stdout_fails();
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(err) => return refuse_arguments(&err),
    };
    let common = &cli.common;
    let result = match cli.verb {
        Verb::Library(verb) => library::run(common, verb),
        Verb::Image(verb) => image::run(common, verb),
        Verb::Map(verb) => map::run(common, verb),
        Verb::Estimate(args) => estimate::run(common, args),
        Verb::Overlay(verb) => overlay::run(common, verb),
        Verb::Trace(verb) => trace::run(common, verb),
        Verb::Stats(args) => stats::run(common, args),
        Verb::Report(args) => report::run(common, &args),
        Verb::Serve(args) => serve::run(common, *args),
        Verb::Control(args) => control::run(common, args),
        Verb::Migrate(verb) => migrate::run(common, *verb),
        Verb::Kept(verb) => kept::run(common, verb),
        Verb::Template(verb) => kept::run_template(common, verb),
        Verb::Snapshot(verb) => snapshot::run(common, *verb),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("vmar: {err}");
            ExitCode::from(if err.kind() == ErrorKind::Usage { 2 } else { 1 })
        }
    }
}
