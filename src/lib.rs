//! vmar lets VMs give each other free rides: VMs booted from *different but similar* images share the host's page cache.
//!
//! Images are fingerprinted once, in 4 KiB blocks. Every block that several images hold gets one canonical address
//! (image, block); a per-image block map says where each block of that image lives. At run time `vmar serve` is the VM's
//! disk (vhost-user-blk): base reads go through the map to the canonical address, so the host's page cache holds each
//! content once; writes go to the VM's own copy-on-write overlay. Images are never rewritten, and each VM can be started
//! with or without vmar at any time. The idea is IBM's VMAR (*Virtual Machine I/O Access Redirection*, Shen et al.).
//!
//! ```text
//!        offline                                  at run time
//!  web.raw  db.raw                     QEMU (guest)            QEMU (guest)
//!     │       │                           │ virtqueues             │
//!  fingerprint  4 KiB, SHA-1/BLAKE3    daemon   vhost-user         │
//!     │       │                           │                        │
//!  indexer   join, compare bytes       device   virtio-blk      device
//!     │       │                         │    │                   │    │
//!  web.map  db.map ───────────────▶ redirect overlay        redirect overlay
//!                                       │    qcow2              │    qcow2
//!                                       ▼                       ▼
//!                        page cache of web.raw, db.raw: each content once
//! ```
//!
//! # Floors
//!
//! A module imports only what stands below it; `tests/tidy.rs` fails otherwise. The centre is pure (map, plan, clusters);
//! input and output stay at the edge.
//!
//! | floor | modules |
//! | --- | --- |
//! | 7 | [`cli`]: one file a verb; prints and exits |
//! | 6 | [`daemon`]: vhost-user protocol, queue threads, what is in flight, control socket; the only importer of the vhost crates |
//! | 5 | [`device`]: virtio-blk requests to completions · [`report`]: pages with plots, of an evaluation or a library; nothing that serves imports it · [`snapshot`]: keeps running VMs, in several stores |
//! | 4 | [`indexer`]: adds images · [`overlay`]: the VM's writes, a qcow2 · [`redirect`]: plans and runs base reads · [`migrate`]: moves running VMs |
//! | 3 | [`map`]: the block map; bytes in, ranges out |
//! | 2 | [`library`], [`image`], [`fingerprint`], [`cluster`] · [`store`]: pages of guest memory, by content · [`introspect`]: what they are used for |
//! | 1 | [`io`]: copies from mappings, the page cache without waiting, io_uring for the rest; image locks; the fault engine of the tests |
//! | 0 | [`units`], [`error`], [`codec`] |
//!
//! # Follow one read
//!
//! 1. The guest puts a chain on a ring and kicks; the queue's thread ([`daemon::worker`]) takes it off ([`device::ring`]) and
//!    [`device::request`] takes it apart.
//! 2. [`device::disk`] asks the [`overlay`] which parts this VM wrote; for the rest [`redirect::plan`] asks the [`map`].
//!    The result is a list of pieces: overlay, canonical ranges of images, zeros.
//! 3. [`redirect::reader`] copies what the page cache holds straight into the guest's buffers, from a mapping where it is
//!    known to hold it ([`io::hot`]); each piece that misses goes to io_uring on its own. [`redirect::ahead`] sees who
//!    reads in sequence, and [`device::prefetch`] may have fetched what the last boot has read.
//! 4. When the last piece is in, [`device::executor`] writes the status byte, and the worker puts the head on the used
//!    ring and signals the guest.
//!
//! # Follow one write
//!
//! 1. Before a request is started its head is marked in [`daemon::inflight`], memory that outlives this process.
//! 2. [`overlay::Overlay::try_write`] writes the data to its one place in the overlay file, then sets the bits of its
//!    subclusters in the live bitmap on tmpfs: from here on the write survives `kill -9`.
//! 3. The head goes on the used ring and its mark is taken away. Whoever starts after a kill carries out what is still marked.
//! 4. A flush makes it survive a power cut: data, then bits, each with an fsync ([`overlay::Overlay::flush`]).
//!
//! # Follow one add
//!
//! [`cli::image`] → [`indexer`]: [`image`] probes the file, [`fingerprint`] hashes it on all cores, the indexer joins the
//! hashes with those of earlier images, compares bytes, [`map`] builds the block map, and [`library`] commits all of it by
//! one rename.
//!
//! # Follow one snapshot
//!
//! 1. [`snapshot::take`] stops the VM, has QEMU write it to a socket and looks at its disks; the VM goes on.
//! 2. [`introspect`] finds the guest's kernel in its memory and says what each page is used for; [`snapshot::keep`] finds pages in the base
//!    image and in the stores, and packs what is new ([`store`]).
//! 3. Packs go to all [`snapshot::stores`], or to one if they may be lost; the snapshot's own file follows when they are there.
//!
//! # Look inside
//!
//! ```
//! use vmar::map::{EntryBuilder, Map, MapSpec, Target, build};
//! use vmar::redirect::plan::{Layout, Piece, Source, plan_base};
//! use vmar::units::ImageId;
//!
//! // Image 1 has three blocks; the first two are blocks 7 and 8 of image 0, the third is zero.
//! let image = |id, blocks: u64| Target { image: ImageId(id), generation: 1, digest: [id as u8; 32], size: blocks * 4096 };
//! let mut entries = EntryBuilder::new();
//! entries.push(0, 0, 7);
//! entries.push(1, 0, 8);
//! let spec = MapSpec { source: image(1, 3), policy: 1, targets: vec![image(0, 10)], entries: entries.finish() };
//! let map = Map::new(build(&spec)?)?;
//!
//! // A read of the last 8 KiB is one read of image 0 and some zeros.
//! let mut pieces = Vec::new();
//! plan_base(&Layout::Mapped(Box::new(map)), 3 * 4096, 4096, 8192, 0, &mut pieces);
//! assert_eq!(pieces, [
//!     Piece { at: 0, len: 4096, source: Source::Image { target: 0, offset: 8 * 4096 } },
//!     Piece { at: 4096, len: 4096, source: Source::Zero },
//! ]);
//! # Ok::<(), vmar::map::MapError>(())
//! ```

// Tests cut numbers down to bytes on purpose.
#![cfg_attr(test, allow(clippy::cast_possible_truncation))]

#[cfg(not(target_pointer_width = "64"))]
compile_error!("vmar maps images of terabytes: it needs a 64-bit machine");

pub mod codec;
pub mod error;
pub mod units;

pub mod io;

pub mod cluster;
pub mod fingerprint;
pub mod image;
pub mod index;
pub mod introspect;
pub mod library;
pub mod store;

pub mod map;

pub mod indexer;
pub mod migrate;
pub mod overlay;
pub mod redirect;

pub mod device;
pub mod report;
pub mod snapshot;

pub mod daemon;

pub mod cli;

pub use error::{Error, ErrorKind, Result};
