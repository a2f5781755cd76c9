//! The block map of one image: where each of its 4 KiB blocks canonically lives (paper, sections 3.1 and 3.3).
//!
//! ```text
//!          block number
//!               │ >> section_bits
//!   section index ──► {first, end} ──► none: a zero block
//!               │
//!   binary search in entries[first..end] ──► {target image, target block, blocks left}
//! ```
//!
//! The paper puts a Bloom filter before the search, to answer zero blocks. The format has it, [`Map::lookup_by`] can ask it,
//! and [`Map::lookup`] does not: behind an index this fine it costs more than it saves.
//!
//! Bytes in, ranges out: this floor opens no file and starts no thread. [`build`] makes the bytes, [`Map::new`]
//! verifies bytes (usually a memory mapping shared by all `vmar serve` processes of the host), [`Map::lookup`] and
//! [`Map::runs`] answer. The layout, field by field with its reasons, is in `FORMAT.md` beside this file.
//!
//! A block without an entry is a zero block. So whatever could lose an entry (a cut file, a flipped bit, a map of
//! another image) must be found before the first lookup: [`Map::new`] accepts a map whole or not at all.
//!
//! ```
//! use vmar::map::{build, Entry, Map, MapSpec, Target};
//! use vmar::units::ImageId;
//!
//! let image = |id: u32, digest: u8| Target { image: ImageId(id), generation: 1, digest: [digest; 32], size: 40960 };
//! let spec = MapSpec {
//!     source: image(1, 0xb1),
//!     policy: 0,
//!     targets: vec![image(0, 0xb0), image(1, 0xb1)],
//!     entries: vec![Entry { source: 2, len: 3, target: 0, block: 5 }, Entry { source: 7, len: 1, target: 1, block: 7 }],
//! };
//! let map = Map::new(build(&spec)?)?;
//! assert_eq!(map.lookup(3).map(|hit| (hit.target, hit.block, hit.run)), Some((0, 6, 2)));
//! assert_eq!(map.lookup(6), None);
//! # Ok::<(), vmar::map::MapError>(())
//! ```

mod bloom;
mod build;
mod check;
mod entry;
mod error;
mod format;
mod index;
mod view;

pub use build::{EntryBuilder, build, build_with_filter};
pub use entry::Entry;
pub use error::{MapError, MapErrorKind};
pub use format::VERSION;
pub use view::{Entries, Hit, Layout, Map, Run, Runs, Scheme};

use crate::units::{ImageId, blocks_in};

/// Identity of an image, as a map records it for its own image and for each image that it points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Number of the image in its library.
    pub image: ImageId,
    /// Counts the contents that the image had under this ID.
    pub generation: u64,
    /// Digest of the content; the library says of which kind.
    pub digest: [u8; 32],
    /// Bytes of the image, a multiple of 512.
    pub size: u64,
}

impl Target {
    /// Blocks of the image, a partial last one included.
    pub fn blocks(&self) -> u64 {
        blocks_in(self.size)
    }

    /// True when both name the same content: same image, same generation.
    pub fn same_image(&self, other: &Target) -> bool {
        self.image == other.image && self.generation == other.generation
    }
}

/// What a map is built of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapSpec {
    /// The image whose reads are redirected.
    pub source: Target,
    /// Number of the redirect policy that chose the targets; the library names them.
    pub policy: u32,
    /// The images that entries point to, in any order, each once; the source image too if any entry stays in it.
    pub targets: Vec<Target>,
    /// Ascending by source block, not overlapping; [`EntryBuilder`] makes them.
    pub entries: Vec<Entry>,
}

/// What a map says about its image in numbers. Blocks are 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Blocks of the image, a partial last one included.
    pub blocks: u64,
    /// Blocks that some entry covers; all others are zero.
    pub nonzero_blocks: u64,
    /// Non-zero blocks whose canonical copy is in another image.
    pub redirected_blocks: u64,
    /// Non-zero blocks whose canonical copy is another block of this image.
    pub self_redirected_blocks: u64,
    /// Range entries.
    pub entries: u64,
    /// Bytes of the map.
    pub map_bytes: u64,
}
