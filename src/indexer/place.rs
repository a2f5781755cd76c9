//! From the fingerprints of one image to its block map: the way that adding, remapping and following a change have in common.
//!
//! ```text
//! rows by hash ─ parts ─ candidates ─┬─ pairs ─ by block ─ windows ─ prove ─ arrange ─ entries ─ map
//!                                    ├─ rows with variants ───────────┴─ corrections ─ run
//!                                    └─ what the index knew ─────────────────────────── index
//! ```
//!
//! Parts (all rows of some hashes) and windows (all blocks of 16 GiB) are worked on one after the other, and what goes from
//! parts to windows is kept in a scratch file when it is too much, so that memory is bounded whatever the image's size. Runs
//! are cut at the borders of windows for the policies that look at their length, for every image alike.

use super::candidates::{Candidates, Part, candidates};
use super::choose::Choose;
use super::compare::{Pair, Side, Sides};
use super::contents::Contents;
use super::images::Images;
use super::resolve::{Corrections, Proof, arrange, keep_partial_block, prove};
use super::spool::Spool;
use super::{Work, target_of};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::{Row, run};
use crate::index;
use crate::library::Policy;
use crate::map::{Entry, EntryBuilder, Map, MapSpec, Totals, build};
use crate::units::ImageId;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::Write;
use std::path::Path;

/// Bytes that the rows of a part cost until it is done: the rows, their hashes, what the index knows, the candidates.
const BYTES_PER_ROW: u64 = 120;
/// Bytes that are not the parts': buffers of readers and writers.
const OTHER_BYTES: u64 = 256 << 20;
/// Rows of the smallest part that makes sense.
const ROWS_MIN: u64 = 1 << 12;

/// Where the image and what it is compared with are.
#[derive(Clone, Copy)]
pub(super) struct Placing<'a> {
    pub own: &'a Side,
    pub images: &'a Images,
    pub contents: &'a Contents,
    pub choose: &'a Choose,
    pub policy: Policy,
    /// See [`Part::is_settled`].
    pub is_settled: bool,
    /// See [`Proof::is_proved`].
    pub is_proved: &'a (dyn Fn(&Pair) -> bool + Sync),
    /// A file for what does not fit in memory.
    pub scratch: &'a Path,
    pub work: &'a Work<'a>,
}

/// Told what becomes of the rows, part by part.
pub(super) trait Sink {
    /// The rows with the variants of their candidates, and what the index knew of their hashes.
    fn part(&mut self, rows: &[Row], known: &[index::Row]) -> Result<()>;
}

/// Nobody needs it: the image is in the library.
pub(super) struct NoSink;

impl Sink for NoSink {
    fn part(&mut self, _: &[Row], _: &[index::Row]) -> Result<()> {
        Ok(())
    }
}

/// Where each block of an image is read from.
#[derive(Debug, Default)]
pub(super) struct Placed {
    /// IDs of the images that are read from, ascending.
    pub targets: Vec<u32>,
    /// The map's entries; their targets are indices into `targets`.
    pub entries: Vec<Entry>,
    /// Rows that have another variant than the sink was told.
    pub corrections: Corrections,
}

/// Finds, proves and arranges. `rows` are the image's, sorted.
pub(super) fn place(
    rows: impl Iterator<Item = Result<Row>>,
    placing: &Placing<'_>,
    sink: &mut dyn Sink,
) -> Result<Placed> {
    let Placing { own, images, contents, choose, is_settled, work, .. } = *placing;
    let rows_per_part = (work.memory.saturating_sub(OTHER_BYTES) / BYTES_PER_ROW).max(ROWS_MIN);
    let mut spool = Spool::new(placing.scratch, rows_per_part);
    let mut parts = Parts { rows: rows.peekable(), limit: rows_per_part };
    while let Some(mut rows) = parts.next()? {
        work.check_stop(&own.record.name)?;
        let part = Part { rows: &mut rows, is_settled };
        let Candidates { pairs, known } = candidates(part, own.record.id.0, contents, images, choose)?;
        spool.push(pairs.into_iter())?;
        sink.part(&rows, &known)?;
    }
    let mut placed = Placed::default();
    let (mut used, mut runs): (BTreeSet<u32>, EntryBuilder) = (BTreeSet::new(), EntryBuilder::new());
    let proof = Proof {
        sides: Sides { own, images },
        images,
        contents,
        choose,
        is_settled,
        is_proved: placing.is_proved,
        work,
    };
    spool.windows(own.record.blocks, |pairs| {
        work.check_stop(&own.record.name)?;
        prove(pairs, &proof, &mut placed.corrections)?;
        keep_partial_block(pairs, &proof.sides);
        arrange(pairs, placing.policy, &proof)?;
        for pair in pairs.iter() {
            used.insert(pair.image);
            runs.push(pair.source, pair.image, pair.block);
        }
        Ok(())
    })?;
    placed.targets = used.into_iter().collect();
    placed.entries = runs.finish();
    for entry in &mut placed.entries {
        let number = placed.targets.binary_search(&entry.target).unwrap_or_default();
        entry.target = u32::try_from(number).unwrap_or_default();
    }
    Ok(placed)
}

/// Cuts sorted rows where a hash ends.
struct Parts<I: Iterator<Item = Result<Row>>> {
    rows: std::iter::Peekable<I>,
    limit: u64,
}

impl<I: Iterator<Item = Result<Row>>> Parts<I> {
    fn next(&mut self) -> Result<Option<Vec<Row>>> {
        let mut part: Vec<Row> = Vec::new();
        loop {
            let is_full = part.len() as u64 >= self.limit;
            let ends = |row: &Row| is_full && part.last().is_some_and(|last| last.hash != row.hash);
            match self.rows.peek() {
                Some(Ok(row)) if ends(row) => break,
                Some(_) => part.extend(self.rows.next().transpose()?),
                None => break,
            }
        }
        Ok((!part.is_empty()).then_some(part))
    }
}

/// Writes the map to a new file, once it has passed what every reader asks of it.
pub(super) fn write_map(path: &Path, policy: Policy, images: &Images, own: &Side, placed: Placed) -> Result<Totals> {
    let target = |&id: &u32| match ImageId(id) {
        id if id == own.record.id => Ok(target_of(&own.record)),
        id => images.record(id.0).map(target_of),
    };
    let spec = MapSpec {
        source: target_of(&own.record),
        policy: policy.code(),
        targets: placed.targets.iter().map(target).collect::<Result<_>>()?,
        entries: placed.entries,
    };
    let bytes = build(&spec).map_err(|e| e.at(path))?;
    // What a `serve` would refuse must not be published.
    let totals = Map::new(&bytes[..]).map_err(|e| e.at(path))?.totals();
    write_new(path, &bytes).map_err(|e| Error::io(path, "write", e))?;
    Ok(totals)
}

fn write_new(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    File::options().write(true).create_new(true).open(path)?.write_all(bytes)
}

/// Rewrites a staged run with other variants for some blocks; the rows of a hash come in another order then.
pub(super) fn correct_run(
    from: &Path,
    stamp: run::Stamp,
    to: &Path,
    meta: &run::Meta<'_>,
    corrections: &Corrections,
) -> Result<run::Stamp> {
    let mut writer = run::Writer::create(to, meta)?;
    let mut group: Vec<Row> = Vec::new();
    for row in run::Reader::open(from, stamp)? {
        let mut row = row?;
        if let Some((hash, variant)) = corrections.get(&row.block) {
            if *hash != row.hash {
                return Err(
                    Error::file(ErrorKind::Changed, from, "the image changed while it was added").mend("try again")
                );
            }
            row.variant = u32::from(*variant);
        }
        if group.first().is_some_and(|first| first.hash != row.hash) {
            group.sort_unstable();
            writer.push(&group)?;
            group.clear();
        }
        group.push(row);
    }
    group.sort_unstable();
    writer.push(&group)?;
    writer.finish()
}
