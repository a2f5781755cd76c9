//! Vectored I/O on files into memory that somebody else owns (a guest's), and read-only mappings.
//!
//! Two engines: [`nowait`] serves what the page cache holds without ever sleeping, [`uring`] waits for the rest. Both, and
//! what writes, take a [`fault::FileRef`], so that a test can hold, reorder, shorten and fail what they do.

pub mod buf;
pub mod fault;
pub mod file;
pub mod lock;
pub mod mapping;
pub mod nowait;
pub mod uring;

pub use buf::IoBuf;
pub use mapping::Mapping;
