//! An overlay under random faults, and after power cuts, at length.
//!
//! ```text
//! cargo run --example faults -- power [--states 1000] [--seed 1] [--broken bits-before-data|bits-later]
//! cargo run --example faults -- steps [--steps 1000000] [--seed 1]
//! ```
//!
//! `power`: several threads write, discard, zero, flush and resize an overlay, which is stopped, killed and taken up again
//! meanwhile; every write, hole and sync of its file is recorded. From the record it builds the files that a power cut may
//! leave: any 512-byte sector that was not synced is there or not. Each must be clean for `qemu-img check`, and each sector
//! of its disk must be what was flushed or newer. `--broken` leaves one sync of each flush out, which must be noticed.
//!
//! `steps`: four threads read, write, discard, zero and flush a small disk, as its queue threads do, while the operations
//! below (reads, io_uring reads, writes, holes, syncs) are held, reordered, shortened, interrupted and failed at random, and
//! the disk is stopped, killed and taken up again. The first difference from a flat model ends it, with the seed.
//!
//! Needs `qemu-img`. Not with `--release`, whose panics cannot be caught: a killed thread unwinds.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

#[path = "../tests/faults/crash.rs"]
mod crash;
#[path = "../tests/faults/engine.rs"]
mod engine;
#[path = "../tests/faults/kill.rs"]
mod kill;
#[path = "../tests/faults/model.rs"]
mod model;
#[path = "../tests/faults/power.rs"]
mod power;
#[path = "../tests/faults/recorder.rs"]
mod recorder;
#[path = "../tests/faults/rig.rs"]
mod rig;
#[path = "../tests/faults/steps.rs"]
mod steps;

use power::{Broken, Power};
use std::process::ExitCode;
use steps::Steps;

const USAGE: &str = "usage: faults power [--states N] [--seed N] [--broken bits-before-data|bits-later]
       faults steps [--steps N] [--seed N]";

/// What the command line says.
struct Args {
    power: bool,
    seed: u64,
    /// States or steps.
    count: Option<u64>,
    broken: Broken,
}

fn parse(mut args: impl Iterator<Item = String>) -> Option<Args> {
    let power = match args.next()?.as_str() {
        "power" => true,
        "steps" => false,
        _ => return None,
    };
    let mut out = Args { power, seed: 1, count: None, broken: Broken::No };
    while let Some(name) = args.next() {
        let value = args.next()?;
        match (name.as_str(), power) {
            ("--seed", _) => out.seed = value.parse().ok()?,
            ("--states", true) | ("--steps", false) => out.count = Some(value.parse().ok()?),
            ("--broken", true) => {
                out.broken = match value.as_str() {
                    "bits-before-data" => Broken::BitsBeforeData,
                    "bits-later" => Broken::BitsLater,
                    _ => return None,
                }
            }
            _ => return None,
        }
    }
    Some(out)
}

fn main() -> ExitCode {
    let Some(Args { power, seed, count, broken }) = parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let as_expected = if power {
        let states = usize::try_from(count.unwrap_or(1000)).unwrap();
        let report = power::run(&Power { seed, states, broken, ..Power::default() });
        println!("{report}");
        report.violations.is_empty() == (broken == Broken::No) && report.clean == report.states
    } else {
        let report = steps::run(&Steps { seed, steps: count.unwrap_or(1_000_000), tell: Some(100_000) });
        println!("{report}");
        report.assert_all_happened();
        true
    };
    if as_expected { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
