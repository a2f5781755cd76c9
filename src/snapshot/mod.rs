//! Snapshots of running VMs, replicated by page (PARS: *a page-aware replication system for efficiently storing virtual machine
//! snapshots*, Cui et al., VEE 2015).
//!
//! ```text
//!  QEMU ──stop, migrate unix──▶ take ──▶ memory, skeleton, disks        QEMU -incoming ◀── restore
//!                                │                                              ▲
//!                    introspect: a class for each page                          │ every page compared with its hash
//!                                ▼                                              │
//!                     keep: zero │ base image │ in the stores │ new pack        │
//!                                ▼                                              │
//!            stores: what must not be lost in N of them, free pages in one ─────┘   what one has lost another one has
//! ```
//!
//! - [`place`] is where things are: a directory, a bucket; [`stores`] is several of them,
//! - [`take`] has QEMU write its VM, [`spool`] takes that apart into memory and [`skeleton`],
//! - [`known`] is what the stores have already, [`keep`] decides and writes the rest, [`file`](mod@file) is what is published last,
//! - [`save`] and [`restore`] are the two ways, and [`mend`] finds and heals what stores have lost.
//!
//! What may be lost is less than in the paper: clean page cache "can be read again from disk" only by who knows that it has to be. The
//! guest does not, so it is critical here unless the base image has the same content, and then it is refilled from there.

pub mod file;
pub mod keep;
pub mod known;
pub mod mend;
pub mod place;
pub mod private;
pub mod restore;
pub mod save;
pub mod skeleton;
pub mod spool;
pub mod stores;
pub mod take;

#[cfg(test)]
mod tests;
