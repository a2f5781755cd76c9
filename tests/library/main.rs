//! The library from outside: images go in, and what the catalog, the runs, the maps and the figures say is compared
//! with a plain count over the real bytes; whatever goes wrong on the way leaves the library as it was.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "tests")]

mod bad_input;
mod bases;
mod bridge;
#[allow(dead_code, missing_docs)]
#[path = "../../examples/brute_force.rs"]
mod brute_force;
mod changed;
mod collisions;
mod crash;
mod domains;
mod estimate;
mod family;
mod full_disk;
mod hosts;
mod import;
mod lifecycle;
mod matrix;
mod offline;
mod oracle;
mod repair;
mod state;
mod support;
mod verify;
