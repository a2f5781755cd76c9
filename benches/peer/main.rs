//! vmar beside its peers: drives vhost-user-blk sockets with libblkio and compares them, alternating in one run.
//!
//! ```text
//! cargo bench --bench peer -- --quick
//! ```
//!
//! README.md beside this file says what the scenarios are and how to read the columns. A program, not a timed test: it does
//! not fail on a slow result.
//!
//! `args` → `rig` (images and library) → for each `scenario`: `run` starts the `subject`s (`server` is their process),
//! `client` drives each in turn with the requests of a `stream` → `report`, `plot`.
#![allow(clippy::cast_possible_truncation)]

mod args;
mod client;
mod latency;
mod plot;
mod report;
mod rig;
mod run;
mod scenario;
mod server;
mod stream;
mod subject;
mod throttle;

use args::Args;
use clap::Parser;
use report::Measured;
use rig::Rig;
use scenario::Scenario;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use throttle::Throttle;

/// Errors are one line for a person.
type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    if std::env::args_os().len() == 1 {
        // `cargo test --all-targets` runs benches with nothing on the command line.
        println!("nothing to test here; to measure: cargo bench --bench peer");
        return ExitCode::SUCCESS;
    }
    match measure(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("peer: {why}");
            ExitCode::FAILURE
        }
    }
}

fn measure(args: &Args) -> Result<()> {
    let scenarios = select(args)?;
    if args.list {
        scenarios.iter().for_each(|s| println!("{}", s.name()));
        return Ok(());
    }
    let vmar = std::env::var_os("VMAR_BIN").map_or_else(|| env!("CARGO_BIN_EXE_vmar").into(), PathBuf::from);
    let about = about(args, &vmar)?;
    let rig = match args.socket {
        Some(_) => None,
        None => {
            eprintln!("making images of {} MiB in {}", args.image_bytes() >> 20, args.dir.display());
            Some(Rig::new(&args.dir, vmar, args.image_bytes())?)
        }
    };
    let mut measured = Vec::new();
    for (i, scenario) in scenarios.iter().enumerate() {
        eprintln!("{} of {}: {}", i + 1, scenarios.len(), scenario.name());
        let throttle = match scenario.throttle.map(|limit| throttle(args, limit)).transpose() {
            Ok(throttle) => throttle,
            Err(why) => {
                println!("\n{}\n  skipped: {why}", scenario.name());
                continue;
            }
        };
        let rows = match (&rig, &args.socket) {
            (Some(rig), _) => run::compare(args, rig, scenario, throttle.as_ref()),
            (None, Some(socket)) => run::drive(args, socket, scenario),
            (None, None) => Ok(Vec::new()),
        };
        let rows = rows.map_err(|why| format!("{}: {why}", scenario.name()))?;
        let done = Measured { scenario: *scenario, rows };
        print!("{}", done.table());
        measured.push(done);
        // After each scenario: a run that is cut off keeps what it has.
        if let Some(path) = &args.json {
            let text = format!("{:#}\n", report::json(&about, &measured));
            std::fs::write(path, text).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        if let Some(path) = &args.svg {
            plot::draw(path, &measured)?;
        }
    }
    Ok(())
}

fn throttle(args: &Args, bytes_per_s: u64) -> Result<Throttle> {
    // A turn leaves out its first second, and no place is read twice.
    if args.image_bytes() < 4 * bytes_per_s {
        return Err("the images are read in less than 4 s: a greater --size or a smaller --throttle".into());
    }
    Throttle::new(&args.dir, bytes_per_s).map_err(|why| format!("the disk cannot be throttled: {why}"))
}

fn select(args: &Args) -> Result<Vec<Scenario>> {
    let wanted = |s: &Scenario| {
        let name = s.name();
        let fits_socket = args.socket.is_none() || (!s.is_cold && (args.destroy || !s.writes()));
        let fits_names = args.only.is_empty() || args.only.iter().any(|p| scenario::matches(&name, p));
        (s.is_quick || !args.quick) && fits_socket && fits_names
    };
    let chosen: Vec<Scenario> = scenario::all(args.throttle * 1_000_000).into_iter().filter(wanted).collect();
    if chosen.is_empty() {
        return Err("no scenario is left: see --list".into());
    }
    Ok(chosen)
}

/// How and where it is measured, for the JSON. Fails early when a tool is missing.
fn about(args: &Args, vmar: &std::path::Path) -> Result<serde_json::Value> {
    let first_line = |text: String| text.lines().next().unwrap_or_default().to_string();
    let needs_qsd = args.socket.is_none() && args.subjects.iter().any(|k| k.is_qsd());
    let qsd = needs_qsd.then(|| rig::run(Command::new(&args.qsd).arg("--version"))).transpose()?;
    if needs_qsd {
        rig::run(Command::new("qemu-img").arg("--version"))?;
    }
    let own = if args.socket.is_none() { Some(rig::run(Command::new(vmar).arg("--version"))?) } else { None };
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    if load.split(' ').next().and_then(|l| l.parse().ok()).is_some_and(|l: f64| l > 0.5) {
        eprintln!("this machine is not quiet (load average {}): the figures will be noisy", load.trim());
    }
    Ok(serde_json::json!({
        "vmar": own.map(first_line),
        "qemu_storage_daemon": qsd.map(first_line),
        "kernel": kernel.trim(),
        "cpus": cpus,
        "image_bytes": args.image_bytes(),
        "rounds": args.rounds(),
        "seconds": args.seconds(),
        "load_average": load.trim(),
    }))
}
