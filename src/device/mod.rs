//! virtio-blk: requests in, completions out. Knows virtio and nothing of vhost.
//!
//! | file | holds |
//! | --- | --- |
//! | [`request`] | a descriptor chain taken apart |
//! | [`config`] | config space and feature bits |
//! | [`disk`] | base and overlay as one disk |
//! | [`executor`] | requests of one queue, from start to completion |
//! | [`jobs`], [`mailbox`] | threads for what may wait, and their results |

pub mod config;
pub mod disk;
pub mod executor;
pub mod jobs;
pub mod mailbox;
pub mod request;

pub use config::Geometry;
pub use disk::{Disk, Store};
pub use executor::{Completion, Executor};
pub use jobs::Jobs;
pub use mailbox::Mailbox;
pub use request::Request;
