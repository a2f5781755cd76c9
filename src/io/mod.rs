//! Vectored I/O on files into memory that somebody else owns (a guest's), and read-only mappings.
//!
//! Two engines: [`nowait`] serves what the page cache holds without ever sleeping, [`uring`] waits for the rest.

pub mod buf;
pub mod file;
pub mod lock;
pub mod mapping;
pub mod nowait;
pub mod uring;

pub use buf::IoBuf;
pub use mapping::Mapping;
