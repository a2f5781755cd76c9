//! The overlay from outside: against QEMU, against a flat byte array, against kill -9 and against damaged files.
//!
//! Needs `qemu-img` and `qemu-io`; a test that misses them fails.

#![allow(clippy::cast_possible_truncation, clippy::unwrap_used)]

mod cli;
mod common;
mod crash;
mod interop;
mod locks;
mod model;
mod refusals;
mod threads;
