//! `vmar migrate send` and `receive` as two processes, between QEMUs that are played: what both hosts remember, what goes with a
//! VM, and what happens when either is given something wrong.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../common/mod.rs"]
mod common;
mod disk;
mod fakes;
#[path = "../common/guest.rs"]
#[allow(dead_code)]
mod guest;
mod memory;
mod wrong;
