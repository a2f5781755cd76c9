//! The plan of a read: which bytes come from where. Pure: values in, pieces out.
//!
//! ```text
//! request      |----------------------------------------------|
//! overlay        Data     |        Base             |  Zero
//! block map               | →image 0 | zero | →image 2
//! pieces       | overlay  | image 0  | zero | img 2 |  zero   |
//! ```

use crate::map::Map;
use crate::units::{BLOCK_SIZE, to_usize};

/// Where the bytes of one stretch of the disk are, seen from the overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Never written: the base has them.
    Base,
    /// Written by this VM: at `offset` of the overlay file.
    Overlay {
        /// Byte offset in the overlay file.
        offset: u64,
    },
    /// Zeroed by this VM.
    Zero,
}

/// Where the bytes of one piece are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: they are zeros.
    Zero,
    /// At `offset` of the overlay file.
    Overlay {
        /// Byte offset in the overlay file.
        offset: u64,
    },
    /// At `offset` of an image: the canonical address (paper, section 3.2).
    Image {
        /// Index into the targets of the map.
        target: u32,
        /// Byte offset in that image.
        offset: u64,
    },
}

/// A descendant read: `len` bytes of the request from byte `at` on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First byte, counted from the start of the request.
    pub at: usize,
    /// Bytes.
    pub len: usize,
    /// Where they are.
    pub source: Source,
}

/// What a base is made of, as far as planning goes.
pub enum Layout<B: AsRef<[u8]>> {
    /// An image with its block map.
    Mapped(Box<Map<B>>),
    /// A single file read as it is (`--blk-file`).
    Flat,
}

/// Appends the pieces that base bytes `[offset, offset + len)` are made of; the first one starts at byte `at` of the
/// request. Bytes past `base_size` are zeros: an overlay may be larger than its base.
pub fn plan_base<B: AsRef<[u8]>>(
    layout: &Layout<B>,
    base_size: u64,
    offset: u64,
    len: usize,
    at: usize,
    out: &mut Vec<Piece>,
) {
    let inside = to_usize(base_size.saturating_sub(offset).min(len as u64));
    if inside > 0 {
        match layout {
            Layout::Flat => push(out, Piece { at, len: inside, source: Source::Image { target: 0, offset } }),
            Layout::Mapped(map) => plan_mapped(map, offset, inside, at, out),
        }
    }
    if inside < len {
        push(out, Piece { at: at + inside, len: len - inside, source: Source::Zero });
    }
}

/// The part of [`plan_base`] that looks into the map. The range lies inside the image, so its block numbers fit the map.
fn plan_mapped<B: AsRef<[u8]>>(map: &Map<B>, offset: u64, len: usize, at: usize, out: &mut Vec<Piece>) {
    let end = offset + len as u64;
    let first = offset / BLOCK_SIZE;
    let count = end.div_ceil(BLOCK_SIZE) - first;
    // Both fit: images have at most 2^32 blocks, and a request, bounded by 2^32 bytes, far fewer.
    let first = u32::try_from(first).unwrap_or(u32::MAX);
    let count = u32::try_from(count).unwrap_or(u32::MAX);
    for run in map.runs(first, count) {
        // The run's bytes, clipped to the request: the first and the last block may be wanted only in part.
        let run_start = u64::from(run.source) * BLOCK_SIZE;
        let from = run_start.max(offset);
        let to = (run_start + u64::from(run.len) * BLOCK_SIZE).min(end);
        let source = match run.to {
            None => Source::Zero,
            Some((target, block)) => {
                Source::Image { target, offset: u64::from(block) * BLOCK_SIZE + (from - run_start) }
            }
        };
        push(out, Piece { at: at + to_usize(from - offset), len: to_usize(to - from), source });
    }
}

/// Appends a piece, or lengthens the last one when the new one simply goes on.
pub fn push(out: &mut Vec<Piece>, piece: Piece) {
    if let Some(last) = out.last_mut()
        && last.at + last.len == piece.at
    {
        let n = last.len as u64;
        let goes_on = match (last.source, piece.source) {
            (Source::Zero, Source::Zero) => true,
            (Source::Overlay { offset: a }, Source::Overlay { offset: b }) => a + n == b,
            (Source::Image { target: s, offset: a }, Source::Image { target: t, offset: b }) => s == t && a + n == b,
            _ => false,
        };
        if goes_on {
            last.len += piece.len;
            return;
        }
    }
    out.push(piece);
}
