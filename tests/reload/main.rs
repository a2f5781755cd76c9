//! Other block maps for servers that run: 'reload' by themselves and by descriptors, and the leases that tell who reads what.
//!
//! Makes namespaces and mounts file systems: needs root.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../control/hanging.rs"]
#[allow(dead_code)]
mod hanging;
mod in_flight;
mod leases;
mod pace;
mod place;
mod storm;
mod wire;
