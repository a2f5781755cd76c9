//! Fuzzes everything that hostile bytes can reach: guests, frontends, files.
//!
//! ```text
//! cargo run --profile test --example fuzz -- --target all --seconds 60 --jobs 2
//! cargo run --profile test --example fuzz -- --replay tests/data/fuzz/chains/loop.json
//! ```
//!
//! An input is a list of steps in JSON: see `targets/mod.rs` for the targets and their oracles. Inputs are made at random
//! or by changing one that showed something new: another status, another message of an error, and, if the crate was built
//! through `cover.sh`, another edge of the code. What fails is made smaller by dropping steps, and written to a file that
//! `--replay` takes. Each job is a process of its own, so that an abort, a signal, a hang (60 s without an end) or memory
//! without bounds is a finding like any other. `tests/fuzz_regressions.rs` replays `tests/data/fuzz`.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::exit, missing_docs)]

mod cover;
#[allow(dead_code)]
mod targets;
mod worker;

use clap::Parser;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};
use targets::{Kept, NAMES, Setup};

#[global_allocator]
static ALLOCATOR: targets::alloc::Counting = targets::alloc::Counting;

/// Set in children that are to be the command `vmar`.
const AS_VMAR: &str = "VMAR_FUZZ_AS_VMAR";

/// Random inputs against every parser, the device and the vhost-user protocol.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// One of the targets, several with commas between them, or all
    #[arg(long, default_value = "all")]
    target: String,
    /// How long each target is fuzzed
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where random numbers begin; job N of a target begins at SEED + N [default: the clock]
    #[arg(long)]
    seed: Option<u64>,
    /// Processes at a time
    #[arg(long, default_value_t = 1)]
    jobs: u64,
    /// Inputs to begin with, DIR/TARGET/*.json; what shows something new is added
    #[arg(long, value_name = "DIR")]
    corpus: Option<PathBuf>,
    /// Where failures go
    #[arg(long, value_name = "DIR", default_value = "build/fuzz")]
    failures: PathBuf,
    /// Runs one input, or all in a directory, and says what came of it
    #[arg(long, value_name = "FILE")]
    replay: Option<PathBuf>,
    /// Prints the table as JSON
    #[arg(long)]
    json: bool,
    /// A job: where it tells how far it is
    #[arg(long, hide = true)]
    worker: Option<PathBuf>,
    /// A job writes its inputs there before it runs them
    #[arg(long, hide = true)]
    current: Option<PathBuf>,
}

/// How far a job is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Progress {
    executions: u64,
    /// Different things seen.
    features: u64,
    corpus: u64,
    failures: Vec<String>,
}

/// A line of the table.
#[derive(Serialize)]
struct Line {
    target: String,
    executions: u64,
    seconds: f64,
    per_second: f64,
    features: u64,
    corpus: u64,
    failures: Vec<String>,
}

/// This program, as `vmar`.
fn vmar() -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(AS_VMAR, "1").env_remove("VMAR_LIBRARY").env_remove("VMAR_STATE_DIR");
    command
}

/// A directory of our own; on tmpfs, because some targets write thousands of files.
fn workspace() -> tempfile::TempDir {
    let shm = Path::new("/dev/shm");
    let made = tempfile::Builder::new().prefix("vmar-fuzz-").tempdir_in(shm);
    made.or_else(|_| tempfile::tempdir()).unwrap()
}

fn main() -> ExitCode {
    if std::env::var_os(AS_VMAR).is_some() {
        return vmar::cli::main();
    }
    let args = Args::parse();
    if let Some(path) = &args.replay {
        return replay(path);
    }
    if let Some(progress) = &args.worker {
        return worker::run(&args, progress);
    }
    let names: Vec<&str> = match args.target.as_str() {
        "all" => NAMES.to_vec(),
        list => list.split(',').collect(),
    };
    if let Some(unknown) = names.iter().find(|n| !NAMES.contains(n)) {
        eprintln!("fuzz: no target is called {unknown:?}; there are {}", NAMES.join(", "));
        return ExitCode::from(2);
    }
    let lines: Vec<Line> = names.iter().map(|name| fuzz(name, &args)).collect();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&lines).unwrap());
    } else {
        table(&lines);
    }
    ExitCode::from(u8::from(lines.iter().any(|l| !l.failures.is_empty())))
}

fn table(lines: &[Line]) {
    println!(
        "{:<10} {:>12} {:>8} {:>9} {:>9} {:>7} {:>9}",
        "target", "executions", "seconds", "per s", "features", "corpus", "failures"
    );
    for l in lines {
        println!(
            "{:<10} {:>12} {:>8.0} {:>9.1} {:>9} {:>7} {:>9}",
            l.target,
            l.executions,
            l.seconds,
            l.per_second,
            l.features,
            l.corpus,
            l.failures.len()
        );
    }
    lines.iter().flat_map(|l| &l.failures).for_each(|f| println!("{f}"));
}

/// A process that fuzzes.
struct Job {
    child: Child,
    progress: PathBuf,
    current: PathBuf,
    seed: u64,
}

impl Job {
    fn start(target: &str, args: &Args, dir: &Path, seed: u64, seconds: u64) -> Job {
        let (progress, current) =
            (dir.join(format!("{target}-{seed}.progress")), dir.join(format!("{target}-{seed}.json")));
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--target", target, "--seconds", &seconds.to_string(), "--seed", &seed.to_string()]);
        command.arg("--worker").arg(&progress).arg("--current").arg(&current).arg("--failures").arg(&args.failures);
        if let Some(corpus) = &args.corpus {
            command.arg("--corpus").arg(corpus);
        }
        let child = command.env("TMPDIR", dir).spawn().unwrap();
        Job { child, progress, current, seed }
    }

    fn progress(&self) -> Progress {
        let text = std::fs::read(&self.progress).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }
}

/// Fuzzes one target with as many jobs as wanted; starts those anew that die.
fn fuzz(target: &str, args: &Args) -> Line {
    let dir = workspace();
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |d| d.as_secs());
    let mut seed = args.seed.unwrap_or(clock);
    let start = Instant::now();
    let end = start + Duration::from_secs(args.seconds);
    let mut jobs: Vec<Job> = Vec::new();
    for _ in 0..args.jobs.max(1) {
        jobs.push(Job::start(target, args, dir.path(), seed, args.seconds));
        seed += 1;
    }
    let mut past = Progress::default();
    let mut said = Instant::now();
    while !jobs.is_empty() {
        std::thread::sleep(Duration::from_millis(100));
        let mut running = Vec::new();
        for mut job in jobs {
            let Some(status) = job.child.try_wait().unwrap() else {
                running.push(job);
                continue;
            };
            let mut done = job.progress();
            if !status.success() {
                done.failures.push(died(target, args, &job, status));
                let left = end.saturating_duration_since(Instant::now()).as_secs();
                if left > 0 && past.failures.len() + done.failures.len() < worker::FAILURES_MAX {
                    running.push(Job::start(target, args, dir.path(), seed, left));
                    seed += 1;
                }
            }
            add(&mut past, done);
        }
        jobs = running;
        if said.elapsed() >= Duration::from_secs(5) && !jobs.is_empty() {
            said = Instant::now();
            let mut now = past.clone();
            jobs.iter().for_each(|j| add(&mut now, j.progress()));
            let time = start.elapsed().as_secs_f64();
            eprintln!(
                "{target}: {time:.0} s, {} executions, {:.1} per s, {} features, {} failures",
                now.executions,
                now.executions as f64 / time,
                now.features,
                now.failures.len()
            );
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    Line {
        target: target.to_string(),
        executions: past.executions,
        seconds,
        per_second: past.executions as f64 / seconds,
        features: past.features,
        corpus: past.corpus,
        failures: past.failures,
    }
}

fn add(sum: &mut Progress, more: Progress) {
    sum.executions += more.executions;
    sum.features = sum.features.max(more.features);
    sum.corpus = sum.corpus.max(more.corpus);
    sum.failures.extend(more.failures);
}

/// A job died: the input that it ran is a failure.
fn died(target: &str, args: &Args, job: &Job, status: std::process::ExitStatus) -> String {
    let why = format!("the process that ran it ended with {status}");
    match std::fs::read(&job.current).ok().and_then(|text| serde_json::from_slice(&text).ok()) {
        Some(input) => worker::keep(&args.failures, &Kept { target: target.to_string(), why, input }),
        None => format!("{target}: seed {}: {why}, before it ran anything", job.seed),
    }
}

/// Runs kept inputs once each.
fn replay(path: &Path) -> ExitCode {
    let mut files = vec![path.to_path_buf()];
    let mut i = 0;
    while i < files.len() {
        if files[i].is_dir() {
            let dir = files.remove(i);
            files.extend(std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()));
        } else {
            i += 1;
        }
    }
    files.sort();
    let dir = workspace();
    let setup = Setup { dir: dir.path().to_path_buf(), vmar };
    let mut failed = false;
    for file in files.iter().filter(|f| f.extension().is_some_and(|x| x == "json")) {
        let kept: Kept = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        let outcome = with_target!(kept.target.as_str(), &setup, t => {
            let input = serde_json::from_value(kept.input).unwrap();
            targets::execute(&mut t, &input)
        });
        let said = outcome.as_ref().map_or_else(|why| format!("FAILED: {why}"), |_| "ok".into());
        println!("{}: {said}", file.display());
        failed |= outcome.is_err();
    }
    ExitCode::from(u8::from(failed))
}
