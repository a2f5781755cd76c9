//! vmar (front page to come)

#[cfg(not(target_pointer_width = "64"))]
compile_error!("vmar maps images of terabytes: it needs a 64-bit machine");

pub mod codec;
pub mod error;
pub mod units;

pub mod io;

pub mod cluster;
pub mod fingerprint;
pub mod image;
pub mod library;

pub mod map;

pub mod indexer;
pub mod overlay;
pub mod redirect;

pub mod device;

pub mod daemon;

pub mod cli;

pub use error::{Error, ErrorKind, Result};
