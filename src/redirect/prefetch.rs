//! What to have in the page cache before the guest asks for it: the blocks of recorded traces that this image's map reaches,
//! in the order in which they were read. Pure but for the opening of traces and of other images' maps.
//!
//! A trace is in canonical coordinates of its library (`TRACE.md`), so that of one image's boot says what other images will
//! read, too, as far as they share it. Which blocks those are depends on the maps of this day:
//!
//! ```text
//!  record: image A, block 7 ── does this map read that? ──yes──▶ fetch it
//!                                       │ no
//!                 A's own map, as it is now: A 7 is read at C 3 ── does this map read that? ──yes──▶ fetch that
//!                                                                            │ no
//!                                                                            ▼ leave it out
//! ```
//!
//! The second look is for traces that were recorded with another policy, or while nothing was redirected. A block that this
//! image holds and reads from another place than both is not found: that would take the content index.

use super::Base;
use crate::codec::unhex;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Mapping;
use crate::library::Library;
use crate::map::Map;
use crate::redirect::plan::Layout;
use crate::redirect::trace::{Record, TraceEnd, TraceReader};
use crate::units::{BLOCK_SIZE, ImageId, human_bytes};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Blocks that are fetched by one request at most: 256 KiB.
pub const PIECE_BLOCKS: u32 = 64;

/// Records that are taken from all traces together; a boot has some ten thousand. It bounds memory and the time to start.
const RECORDS_MAX: u64 = 1 << 20;

/// How far back a piece may be that another one continues: readers take turns.
const JOIN_BACK: usize = 8;

/// Some blocks of an image to fetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// The image.
    pub image: ImageId,
    /// First block.
    pub block: u32,
    /// Blocks.
    pub count: u32,
}

impl Piece {
    /// Bytes, if no block is cut off by the end of the image.
    pub fn bytes(&self) -> u64 {
        u64::from(self.count) * BLOCK_SIZE
    }
}

/// What to fetch, in order. Each block is in it once.
#[derive(Debug, Default)]
pub struct Plan {
    pieces: VecDeque<Piece>,
    blocks: u64,
}

/// What became of the blocks that were read, each counted once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Tally {
    recorded: u64,
    planned: u64,
    /// Not read by this image, as far as one can tell.
    elsewhere: u64,
    /// Of images that the library has no more, or has with another content.
    gone: u64,
}

impl Plan {
    /// Reads traces, and picks what `base` can reach. `library` is the one that it was opened from.
    ///
    /// # Errors
    /// For a file that is no trace, is a broken one or one of another library. What the library no longer has is left out,
    /// with a warning: traces age.
    pub fn load(files: &[PathBuf], library: &Library, base: &Base) -> Result<Plan> {
        let mut builder = Builder::new(library, base);
        let mut left = RECORDS_MAX;
        for file in files {
            let before = builder.tally;
            let cut = builder.add(file, &mut left)?;
            let t = builder.tally.since(&before);
            let text = format!("{}: {t}{}", file.display(), if cut { "; it was cut off" } else { "" });
            if t.gone > 0 { log::warn!("{text}") } else { log::info!("{text}") }
        }
        if left == 0 {
            log::warn!("the traces to prefetch have more than {RECORDS_MAX} records: the rest is left out");
        }
        Ok(Plan { pieces: builder.pieces, blocks: builder.tally.planned })
    }

    /// A plan of these pieces.
    #[cfg(test)]
    pub(crate) fn of(pieces: VecDeque<Piece>) -> Plan {
        let blocks = pieces.iter().map(|piece| u64::from(piece.count)).sum();
        Plan { pieces, blocks }
    }

    /// Bytes in it.
    pub fn bytes(&self) -> u64 {
        self.blocks * BLOCK_SIZE
    }

    /// Takes the next piece, or the beginning of it: at most so many blocks, at least one.
    pub fn next(&mut self, blocks_max: u32) -> Option<Piece> {
        let front = self.pieces.front_mut()?;
        let count = front.count.min(blocks_max.max(1));
        let piece = Piece { count, ..*front };
        front.block += count;
        front.count -= count;
        self.blocks -= u64::from(count);
        if front.count == 0 {
            self.pieces.pop_front();
        }
        Some(piece)
    }

    /// Leaves out what another base does not reach.
    pub fn keep_reachable(&mut self, base: &Base) {
        let reach = Reach::of(base);
        let pieces = std::mem::take(&mut self.pieces);
        for Piece { image, block, count } in pieces {
            let kept = reach.clip(image.0, block.into(), u64::from(block) + u64::from(count));
            self.pieces.extend(kept.into_iter().filter_map(|(first, end)| piece_of(image, first, end)));
        }
        self.blocks = self.pieces.iter().map(|piece| u64::from(piece.count)).sum();
    }
}

fn piece_of(image: ImageId, first: u64, end: u64) -> Option<Piece> {
    Some(Piece { image, block: u32::try_from(first).ok()?, count: u32::try_from(end - first).ok()? })
}

impl Tally {
    fn since(&self, before: &Tally) -> Tally {
        Tally {
            recorded: self.recorded - before.recorded,
            planned: self.planned - before.planned,
            elsewhere: self.elsewhere - before.elsewhere,
            gone: self.gone - before.gone,
        }
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bytes = |blocks: u64| human_bytes(blocks * BLOCK_SIZE);
        write!(
            f,
            "of {} that were read {} are new and in reach to prefetch",
            bytes(self.recorded),
            bytes(self.planned)
        )?;
        write!(f, ", {} are not read by this image", bytes(self.elsewhere))?;
        if self.gone > 0 {
            write!(f, ", {} are of images that the library has no more", bytes(self.gone))?;
        }
        Ok(())
    }
}

/// The blocks that a map points to: by image, ascending, neither overlapping nor touching.
#[derive(Debug, Default)]
struct Reach(HashMap<u32, Vec<(u64, u64)>>);

impl Reach {
    fn of(base: &Base) -> Reach {
        let Layout::Mapped(map) = &base.layout else { return Reach::default() };
        Reach::from_ranges(map.entries().map(|e| (base.image_id(e.target).0, e.block.into(), e.block_end())))
    }

    fn from_ranges(ranges: impl Iterator<Item = (u32, u64, u64)>) -> Reach {
        let mut all: HashMap<u32, Vec<(u64, u64)>> = HashMap::new();
        for (image, first, end) in ranges {
            all.entry(image).or_default().push((first, end));
        }
        for ranges in all.values_mut() {
            ranges.sort_unstable();
            ranges.dedup_by(|next, last| {
                let joins = next.0 <= last.1;
                if joins {
                    last.1 = last.1.max(next.1);
                }
                joins
            });
        }
        Reach(all)
    }

    /// The parts of a range that are in reach.
    fn clip(&self, image: u32, first: u64, end: u64) -> Vec<(u64, u64)> {
        let ranges = self.0.get(&image).map_or(&[][..], Vec::as_slice);
        let from = ranges.partition_point(|range| range.1 <= first);
        let ranges = ranges[from..].iter().take_while(|range| range.0 < end);
        ranges.map(|range| (range.0.max(first), range.1.min(end))).collect()
    }
}

/// Blocks that were taken in: ranges by image and first block, not overlapping.
#[derive(Debug, Default)]
struct Seen(BTreeMap<(u32, u64), u64>);

impl Seen {
    /// Takes a range in; gives the parts of it that are new.
    fn take(&mut self, image: u32, first: u64, end: u64) -> Vec<(u64, u64)> {
        let mut new = Vec::new();
        let mut at = first;
        // The range that begins at or before this one may cover its beginning; others begin inside it.
        let before = self.0.range(..=(image, first)).next_back().filter(|((i, _), _)| *i == image).map(|(_, end)| *end);
        at = at.max(before.unwrap_or(0));
        for ((_, next), next_end) in self.0.range((image, first + 1)..(image, end.max(first + 1))) {
            if at < *next {
                new.push((at, *next));
            }
            at = at.max(*next_end);
        }
        if at < end {
            new.push((at, end));
        }
        self.0.extend(new.iter().map(|(first, end)| ((image, *first), *end)));
        new
    }
}

/// Makes a plan of traces.
struct Builder<'a> {
    library: &'a Library,
    uuid: Option<[u8; 16]>,
    reach: Reach,
    maps: Maps<'a>,
    /// As recorded, and as planned.
    read: Seen,
    planned: Seen,
    pieces: VecDeque<Piece>,
    tally: Tally,
}

impl<'a> Builder<'a> {
    fn new(library: &'a Library, base: &'a Base) -> Self {
        Builder {
            library,
            uuid: unhex(&library.catalog().uuid),
            reach: Reach::of(base),
            maps: Maps::new(library, base),
            read: Seen::default(),
            planned: Seen::default(),
            pieces: VecDeque::new(),
            tally: Tally::default(),
        }
    }

    /// Takes a trace in, up to `left` records; true when it has no orderly end.
    fn add(&mut self, path: &Path, left: &mut u64) -> Result<bool> {
        let mut reader = TraceReader::new(open_trace(path)?, path)?;
        let header = *reader.header();
        if Some(header.library) != self.uuid {
            let cause = format!("was recorded with another library than {}", self.library.dir().display());
            return Err(Error::file(ErrorKind::Usage, path, cause).mend("name a trace of this one"));
        }
        // Of the traced image the trace says which content it had.
        let traced = self.library.image_by_id(ImageId(header.image)).ok();
        let changed = traced.is_some_and(|r| (r.generation, r.digest) != (header.generation, header.digest));
        let changed = changed.then_some(header.image);
        for record in reader.by_ref() {
            let record = record?;
            if *left == 0 {
                break;
            }
            *left -= 1;
            self.record(&record, changed);
        }
        Ok(matches!(reader.end(), Some(TraceEnd::Cut { .. })))
    }

    fn record(&mut self, record: &Record, changed: Option<u32>) {
        let image = record.image;
        let gone = changed == Some(image) || self.library.image_by_id(ImageId(image)).is_err();
        for (first, end) in self.read.take(image, record.block.into(), record.end()) {
            self.tally.recorded += end - first;
            if gone {
                self.tally.gone += end - first;
                continue;
            }
            let mut at = first;
            for (from, to) in self.reach.clip(image, first, end).into_iter().chain([(end, end)]) {
                if at < from {
                    self.translate(image, at, from);
                }
                self.plan(image, from, to);
                at = to;
            }
        }
    }

    /// Takes blocks that this image does not read where they were read.
    fn translate(&mut self, image: u32, first: u64, end: u64) {
        let mut found = 0;
        for (other, first, end) in self.maps.translate(image, first, end) {
            for (first, end) in self.reach.clip(other, first, end) {
                found += end - first;
                self.plan(other, first, end);
            }
        }
        self.tally.elsewhere += (end - first).saturating_sub(found);
    }

    /// Takes blocks in that are in reach.
    fn plan(&mut self, image: u32, first: u64, end: u64) {
        if first >= end {
            return;
        }
        for (first, end) in self.planned.take(image, first, end) {
            self.tally.planned += end - first;
            let mut at = first;
            while at < end {
                let joins = |p: &&mut Piece| {
                    p.image.0 == image && u64::from(p.block) + u64::from(p.count) == at && p.count < PIECE_BLOCKS
                };
                let room = self.pieces.iter_mut().rev().take(JOIN_BACK).find(joins);
                let count = PIECE_BLOCKS - room.as_ref().map_or(0, |piece| piece.count);
                // Both fit: a piece is short, and block numbers have 32 bits.
                let count = u32::try_from(end - at).map_or(count, |n| n.min(count));
                let Ok(block) = u32::try_from(at) else { return };
                match room {
                    Some(piece) => piece.count += count,
                    None => self.pieces.push_back(Piece { image: ImageId(image), block, count }),
                }
                at += u64::from(count);
            }
        }
    }
}

/// Opens a trace. A FIFO or a device of that name is refused: it might never end.
fn open_trace(path: &Path) -> Result<File> {
    let failed = |e| Error::io(path, "open the trace", e);
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(Error::file(ErrorKind::Unsupported, path, "is no regular file")
            .mend("name a file that 'vmar serve --record' wrote"));
    }
    File::open(path).map_err(failed)
}

/// The maps of the images whose blocks were read, as they are now.
struct Maps<'a> {
    library: &'a Library,
    base: &'a Base,
    /// `None`: there is none that can be used.
    others: HashMap<u32, Option<Map<Mapping>>>,
}

impl<'a> Maps<'a> {
    fn new(library: &'a Library, base: &'a Base) -> Self {
        Maps { library, base, others: HashMap::new() }
    }

    /// Where the image itself would read these blocks now: {image, first block, end}.
    fn translate(&mut self, image: u32, first: u64, end: u64) -> Vec<(u32, u64, u64)> {
        let (library, base) = (self.library, self.base);
        let map = match &base.layout {
            Layout::Mapped(own) if own.source().image.0 == image => Some(&**own),
            _ => self.others.entry(image).or_insert_with(|| open_map(library, image)).as_ref(),
        };
        let (Some(map), Ok(block), Ok(count)) = (map, u32::try_from(first), u32::try_from(end - first)) else {
            return Vec::new();
        };
        let place = |run: crate::map::Run| {
            let (target, block) = run.to?;
            let block = u64::from(block);
            Some((map.target(target)?.image.0, block, block + u64::from(run.len)))
        };
        map.runs(block, count).filter_map(place).collect()
    }
}

/// The map of an image of the library. One that cannot be had is no reason not to serve: it is not what is served.
fn open_map(library: &Library, image: u32) -> Option<Map<Mapping>> {
    let path = library.map_path(&library.image_by_id(ImageId(image)).ok()?.name);
    let mapping = Mapping::open(&path).map_err(|e| Error::io(&path, "open the block map", e));
    let map = mapping.and_then(|mapping| Map::new(mapping).map_err(|e| e.at(&path)));
    map.inspect_err(|e| log::warn!("what was recorded of image {image} is taken as it is: {e}")).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_is_clipped_to_what_is_in_reach() {
        let reach = Reach::from_ranges([(1, 10, 20), (1, 20, 25), (1, 15, 18), (1, 40, 41), (2, 0, 5)].into_iter());
        assert_eq!(reach.0[&1], [(10, 25), (40, 41)]);
        assert_eq!(reach.clip(1, 0, 100), [(10, 25), (40, 41)]);
        assert_eq!(reach.clip(1, 24, 41), [(24, 25), (40, 41)]);
        assert_eq!(reach.clip(1, 25, 40), []);
        assert_eq!(reach.clip(2, 4, 1 << 32), [(4, 5)]);
        assert_eq!(reach.clip(3, 0, 100), []);
    }

    #[test]
    fn a_plan_is_handed_out_in_order_and_in_the_size_that_is_asked_for() {
        let piece = |image, block, count| Piece { image: ImageId(image), block, count };
        let mut plan = Plan::of([piece(1, 5, 3), piece(0, 9, 64)].into());
        assert_eq!(plan.bytes(), 67 * BLOCK_SIZE);
        let sizes = [2, 64, 16, 0, 64, 64];
        let got: Vec<_> = sizes.into_iter().map(|max| plan.next(max)).collect();
        let want = [piece(1, 5, 2), piece(1, 7, 1), piece(0, 9, 16), piece(0, 25, 1), piece(0, 26, 47)];
        assert_eq!(got, [want.map(Some).to_vec(), vec![None]].concat());
        assert_eq!(plan.bytes(), 0);
    }

    proptest! {
        #[test]
        fn every_block_is_new_once(
            ranges in proptest::collection::vec((0u32..2, 0u64..60, 1u64..20), 1..40),
        ) {
            let (mut seen, mut model) = (Seen::default(), std::collections::BTreeSet::new());
            for (image, first, len) in ranges {
                let new = seen.take(image, first, first + len);
                let blocks: Vec<u64> = new.iter().flat_map(|(first, end)| *first..*end).collect();
                let want: Vec<u64> = (first..first + len).filter(|block| model.insert((image, *block))).collect();
                prop_assert_eq!(blocks, want);
            }
        }

        #[test]
        fn clipping_agrees_with_single_blocks(
            ranges in proptest::collection::vec((0u64..60, 1u64..20), 0..10),
            first in 0u64..70,
            len in 1u64..30,
        ) {
            let reach = Reach::from_ranges(ranges.iter().map(|(first, len)| (7, *first, first + len)));
            let got: Vec<u64> = reach.clip(7, first, first + len).iter().flat_map(|(a, b)| *a..*b).collect();
            let inside = |block: &u64| ranges.iter().any(|(first, len)| (*first..first + len).contains(block));
            prop_assert_eq!(got, (first..first + len).filter(inside).collect::<Vec<_>>());
        }
    }
}
