//! Vectored I/O on files into memory that somebody else owns (a guest's), and read-only mappings.
//!
//! Three engines: [`hot`] copies what the page cache is known to hold from a mapping, [`nowait`] reads what it may hold
//! without ever sleeping, [`uring`] waits for the rest. The last two, and what writes, take a [`fault::FileRef`], so that a
//! test can hold, reorder, shorten and fail what they do. [`cold`] looks through whole files beside the page cache.

pub mod buf;
pub mod cold;
pub mod fault;
pub mod file;
pub mod guarded;
pub mod hot;
pub mod lock;
pub mod mapping;
pub mod nowait;
pub mod pace;
pub mod prio;
pub mod uring;

pub use buf::IoBuf;
pub use hot::Hot;
pub use mapping::Mapping;
