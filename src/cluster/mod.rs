//! Clusters: contents grouped by the set of images that hold them (paper, section 3.1). Pure functions on values.
//!
//! The sets are interned: each distinct set of images is kept once and has a number, and a content only ever refers to
//! that number. 84 images of the paper gave 453 sets.

mod merge;
mod sets;

pub use merge::merge;
pub use sets::{Cluster, Clusters};
