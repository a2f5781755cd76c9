//! The overlay under a fault engine, and after power cuts: small forms of what `examples/fault_steps.rs` and
//! `examples/power_loss.rs` do at length.
//!
//! | file | does |
//! | --- | --- |
//! | `rig` | a base and an overlay on it, contents that say who wrote them, random numbers |
//! | `model` | which versions a sector may hold, told from when each write began and ended |
//! | `kill` | ends all threads as kill -9 does |
//! | `recorder` | records what is done to the overlay file |
//! | `crash` | rebuilds what a power cut may leave of the record |
//! | `power` | mixed load, cuts, comparison |
//! | `engine` | random faults |
//! | `steps` | random steps under random faults |
//! | `order` | single orders of events, held where they matter |
//!
//! Needs `qemu-img`; a test that misses it fails.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod crash;
mod engine;
mod kill;
mod model;
mod order;
mod power;
mod recorder;
mod rig;
mod steps;

use power::{Broken, Power};
use steps::Steps;

#[test]
fn what_a_power_cut_leaves_is_what_was_flushed_or_newer() {
    let report = power::run(&Power { seed: seed(1), states: 80, ..Power::default() });
    println!("{report}");
    assert_eq!(report.violations, Vec::<String>::new());
    assert!(report.states >= 80 && report.clean == report.states);
    assert!(report.unsynced_sectors > 10_000, "the cuts leave little to choose: {report}");
}

#[test]
fn bits_on_disk_before_their_data_are_noticed() {
    let report = power::run(&Power { seed: seed(2), states: 60, broken: Broken::BitsBeforeData, ..Power::default() });
    println!("{report}");
    assert_eq!(report.clean, report.states, "QEMU sees nothing wrong in it");
    assert!(!report.violations.is_empty(), "{report}");
}

#[test]
fn a_flush_that_returns_before_its_bits_are_on_disk_is_noticed() {
    let report = power::run(&Power { seed: seed(3), states: 60, broken: Broken::BitsLater, ..Power::default() });
    println!("{report}");
    assert!(!report.violations.is_empty(), "{report}");
}

#[test]
fn random_steps_under_random_faults_agree_with_a_flat_model() {
    let report = steps::run(&Steps { seed: seed(4), steps: 50_000, ..Steps::default() });
    println!("{report}");
    report.assert_all_happened();
}

/// A number for the run: the same each time, or from the environment.
fn seed(default: u64) -> u64 {
    std::env::var("VMAR_TEST_SEED").map_or(default, |s| s.parse().expect("VMAR_TEST_SEED is a number"))
}
