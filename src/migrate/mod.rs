//! Migration of running VMs: what the other host can rebuild does not travel.
//!
//! ```text
//!  QEMU ──migrate unix──▶ send ═══════════ link ═══════════▶ receive ──unix──▶ QEMU -incoming
//!            stream         │ frames: where each page is,        │               stream, the same bytes
//!                           │ and the bytes that are nowhere     │
//!                     kept image, base images,             kept image, base images,
//!                     template, earlier pages              template, earlier pages
//! ```
//!
//! - [`stream`] takes QEMU's migration stream apart as it comes, [`part`] cuts it,
//! - [`bases`], [`kept`] and [`template`] are what the other side may have: base images, the memory of an earlier stay, pages of many
//!   VMs,
//! - [`work`] hashes the pages of a part, decides where the other side has each of them ([`known`]) and packs what it has not,
//! - [`frame`] is how that is written, and how the part is made again of it,
//! - [`wire`] has the messages that carry frames, and those that decide where the VM lives; [`link`] carries them, over [`tls`] if
//!   the hosts have certificates,
//! - [`disk`] is the disk that goes with a VM if the hosts share no storage,
//! - [`send`] and [`receive`] are the two sides; [`record`] looks on, and [`memory`] remembers for the next time.

pub mod bases;
pub mod disk;
pub mod frame;
pub mod join;
pub mod kept;
pub mod known;
pub mod link;
pub mod memory;
pub mod monitor;
pub mod order;
pub mod part;
pub mod receive;
pub mod record;
pub mod send;
pub mod stream;
pub mod template;
pub mod tls;
pub mod varint;
pub mod wire;
pub mod work;

#[cfg(test)]
mod tests;
