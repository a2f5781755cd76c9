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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{EntryBuilder, MapSpec, Target, build};
    use crate::units::{ImageId, SECTOR_SIZE};
    use proptest::prelude::*;

    /// Where each block lives: `None` for zero.
    type Blocks = Vec<Option<(u32, u32)>>;

    const OTHER_BLOCKS: u32 = 50;

    fn layout(blocks: &Blocks, size: u64) -> Layout<Vec<u8>> {
        let image = |id: u32, size| Target { image: ImageId(id), generation: 1, digest: [id as u8; 32], size };
        let mut entries = EntryBuilder::new();
        for (block, to) in blocks.iter().enumerate() {
            if let Some((target, at)) = to {
                entries.push(block as u32, *target, *at);
            }
        }
        let spec = MapSpec {
            source: image(2, size),
            policy: 1,
            targets: vec![
                image(0, u64::from(OTHER_BLOCKS) * BLOCK_SIZE),
                image(1, u64::from(OTHER_BLOCKS) * BLOCK_SIZE),
                image(2, size),
            ],
            entries: entries.finish(),
        };
        Layout::Mapped(Box::new(Map::new(build(&spec).unwrap()).unwrap()))
    }

    /// The source of one byte by the flat model.
    fn model(blocks: &Blocks, size: u64, byte: u64) -> Source {
        if byte >= size {
            return Source::Zero;
        }
        match blocks[to_usize(byte / BLOCK_SIZE)] {
            None => Source::Zero,
            Some((target, at)) => Source::Image { target, offset: u64::from(at) * BLOCK_SIZE + byte % BLOCK_SIZE },
        }
    }

    fn blocks_and_size() -> impl Strategy<Value = (Blocks, u64)> {
        let block = prop_oneof![
            2 => Just(None),
            6 => (0u32..2, 0..OTHER_BLOCKS).prop_map(Some),
        ];
        (proptest::collection::vec(block, 1..40), 0u64..8, any::<bool>()).prop_map(|(mut blocks, cut, runs)| {
            if runs {
                // Real maps have runs: continue the one before.
                for i in 1..blocks.len() {
                    if i % 4 != 0
                        && let Some((t, b)) = blocks[i - 1]
                        && b + 1 < OTHER_BLOCKS
                    {
                        blocks[i] = Some((t, b + 1));
                    }
                }
            }
            let size = blocks.len() as u64 * BLOCK_SIZE - cut * SECTOR_SIZE;
            if cut > 0 {
                // A partial last block stays where it is.
                let last = blocks.len() - 1;
                blocks[last] = blocks[last].map(|_| (2, last as u32));
            }
            (blocks, size)
        })
    }

    proptest! {
        #[test]
        fn pieces_tile_the_request_and_agree_with_the_flat_model(
            (blocks, size) in blocks_and_size(),
            start in 0u64..45 * 8,
            sectors in 1usize..60,
        ) {
            let (offset, len) = (start * SECTOR_SIZE, sectors * 512);
            let mut pieces = Vec::new();
            plan_base(&layout(&blocks, size), size, offset, len, 100, &mut pieces);
            let mut at = 100;
            for (i, piece) in pieces.iter().enumerate() {
                prop_assert_eq!(piece.at, at, "no gap, no overlap");
                prop_assert!(piece.len > 0);
                for byte in (0..piece.len).step_by(512) {
                    let want = model(&blocks, size, offset + (at - 100 + byte) as u64);
                    let got = match piece.source {
                        Source::Image { target, offset } => Source::Image { target, offset: offset + byte as u64 },
                        other => other,
                    };
                    prop_assert_eq!(got, want, "piece {} byte {}", i, byte);
                }
                at += piece.len;
            }
            prop_assert_eq!(at, 100 + len);
        }
    }

    #[test]
    fn neighbours_that_go_on_become_one_piece() {
        let mut out = Vec::new();
        let image = |target, offset| Source::Image { target, offset };
        push(&mut out, Piece { at: 0, len: 512, source: image(1, 4096) });
        push(&mut out, Piece { at: 512, len: 512, source: image(1, 4608) });
        push(&mut out, Piece { at: 1024, len: 512, source: image(2, 5120) });
        push(&mut out, Piece { at: 1536, len: 512, source: Source::Zero });
        push(&mut out, Piece { at: 2048, len: 512, source: Source::Zero });
        push(&mut out, Piece { at: 2560, len: 512, source: image(2, 6656) });
        assert_eq!(out.iter().map(|p| p.len).collect::<Vec<_>>(), [1024, 512, 1024, 512]);
    }

    #[test]
    fn a_flat_file_is_one_piece() {
        let mut out = Vec::new();
        plan_base(&Layout::<Vec<u8>>::Flat, 8192, 4096, 8192, 0, &mut out);
        assert_eq!(
            out,
            [
                Piece { at: 0, len: 4096, source: Source::Image { target: 0, offset: 4096 } },
                Piece { at: 4096, len: 4096, source: Source::Zero },
            ]
        );
    }
}
