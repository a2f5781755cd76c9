//! What an operator does to a running `vmar serve`, and what the host's disk does to it: full and failing disks, drains
//! that take too long, the control socket, take-over.
//!
//! Mounts small file systems and uses loop devices: needs root.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../common/mod.rs"]
mod common;
mod drain;
#[path = "../hostile/frontend.rs"]
#[allow(dead_code)]
mod frontend;
mod hanging;
mod on_error;
mod socket;
mod support;
