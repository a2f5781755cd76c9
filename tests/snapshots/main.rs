//! `vmar snapshot` as a process, with a QEMU that is played: what comes back is what was saved, whatever is lost, broken or killed.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/guest.rs"]
#[allow(dead_code)]
mod guest;
mod images;
mod kills;
mod loss;
mod qemu;
mod rig;
mod there_and_back;
mod wrong;
