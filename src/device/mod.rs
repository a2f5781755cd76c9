//! virtio-blk: requests in, completions out. Knows virtio and nothing of vhost.
//!
//! | file | holds |
//! | --- | --- |
//! | [`ring`] | the split ring in guest memory |
//! | [`request`] | a descriptor chain taken apart |
//! | [`config`] | config space and feature bits |
//! | [`disk`] | base and overlay as one disk |
//! | [`drive`] | that disk, open while a VM runs |
//! | [`executor`] | requests of one queue, from start to completion |
//! | [`jobs`], [`mailbox`] | threads for what may wait, and their results |
//! | [`prefetch`] | what a trace tells of, into the page cache behind the guest's own reads |
//! | [`retry`] | what becomes of a request that the host's disk refuses |
//! | [`stats`] | counters by queue |

pub mod config;
pub mod disk;
pub mod drive;
pub mod executor;
pub mod jobs;
pub mod mailbox;
pub mod prefetch;
pub mod request;
pub mod retry;
pub mod ring;
pub mod stats;

pub use config::Geometry;
pub use disk::{Disk, Store};
pub use drive::{Active, Drive, OverlayRecipe, Recipe};
pub use executor::{Completion, Executor, Late};
pub use jobs::Jobs;
pub use mailbox::Mailbox;
pub use prefetch::Prefetch;
pub use request::Request;
pub use retry::OnError;
pub use ring::{GuestMap, Place, Ring, Space};
pub use stats::Ledger;
