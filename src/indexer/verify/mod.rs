//! Verifies images: the bytes against digest and fingerprints, and every redirect byte for byte.

pub(super) mod bytes;
mod progress;

use super::compare::{Others, Pair, Side, Sides, differing};
use super::stats::open_run;
use super::{Work, read_map, target_of};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::digest::{self, CHUNK_SIZE};
use crate::io::pace::Pace;
use crate::library::{ImageRecord, Library, Writer, mtime_ns, settle_mtime};
use crate::map::{Entry, Map};
use crate::units::BLOCK_SIZE;
use bytes::{Checked, Expected};
use progress::Progress;
use std::collections::BTreeMap;
use std::fs::Metadata;
use std::num::NonZeroU64;
use std::path::Path;
use std::sync::Mutex;

/// Redirected blocks that are compared at a time; bounds memory, and what is compared again after an interruption.
const PAIRS_PER_STEP: usize = 1 << 16;
/// The same when there is a rate to keep.
const PAIRS_PER_STEP_AT_PACE: usize = 256;

/// How an image is verified. By default wholly, from the start, as fast as it goes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Only some of it.
    pub sample: Option<Sample>,
    /// Keep the progress in the library, and go on from what is kept there. Not for samples.
    pub resume: bool,
    /// Bytes that are read in a second.
    pub rate: Option<NonZeroU64>,
}

/// A random part of an image, in chunks of 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    /// Which share of the chunks with data, 0 to 1; at least one chunk.
    pub share: f64,
    /// Chooses them.
    pub seed: u64,
}

/// What a good image turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Bytes of data that were read.
    pub data_bytes: u64,
    /// Blocks that are read from elsewhere and were compared.
    pub redirects: u64,
    /// The modification time had changed and the content had not: the catalog now has the new time.
    pub mended: bool,
    /// Chunks with data, and how many of them were looked at, now or before an interruption.
    pub chunks: (u64, u64),
    /// Bytes of the chunks that an interrupted verification had looked at before.
    pub resumed_bytes: u64,
}

/// Verifies one image wholly.
///
/// # Errors
/// `Changed` when a byte of the image is not what was added, `Corrupt` when a file of the library is damaged; the line
/// names the first bad block.
pub fn verify(dir: &Path, name: &str, work: &Work) -> Result<Verified> {
    verify_with(dir, name, &Options::default(), work)
}

/// Verifies one image.
///
/// # Errors
/// As for [`verify`].
pub fn verify_with(dir: &Path, name: &str, options: &Options, work: &Work) -> Result<Verified> {
    let library = Library::open(dir)?;
    let record = library.image(name)?;
    let side = open(&library, record)?;
    let meta = side.file.metadata().map_err(|e| Error::io(&side.path, "look at it", e))?;
    if meta.len() != record.size {
        library.check_identity(record, &meta)?;
    }
    settle_mtime(&meta);
    let progress = match options.resume {
        true => Some(Progress::open(&library, record, &meta)?),
        false => None,
    };
    let outcome = look(&library, &side, &meta, options, progress.as_ref(), work);
    match progress {
        Some(progress) if !was_stopped(&outcome) => progress.finish()?,
        _ => {}
    }
    outcome
}

/// True if the verification did not come to an end, so that it makes sense to go on later.
fn was_stopped(outcome: &Result<Verified>) -> bool {
    outcome.as_ref().is_err_and(|e| matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::Io | ErrorKind::Busy))
}

fn look(
    library: &Library,
    side: &Side,
    meta: &Metadata,
    options: &Options,
    progress: Option<&Progress>,
    work: &Work,
) -> Result<Verified> {
    let record = &side.record;
    let pace = options.rate.map(Pace::new);
    let run = open_run(library, record)?;
    let expected = Expected::new(record.fingerprint, run)?;
    let all = bytes::chunks(side, &expected)?;
    let chosen = options.sample.map(|sample| choose(&all, sample));
    let looked_at = chosen.as_ref().unwrap_or(&all);
    let found = check_bytes(side, &expected, looked_at, pace.as_ref(), progress, work)?;
    judge(library, side, &found, chosen.is_none())?;

    let map = read_map(library, record)?;
    check_coverage(library, record, &map, expected.with_data().collect())?;
    let within = chosen.as_deref();
    let redirects = check_redirects(library, side, &map, within, pace.as_ref(), progress, work)?;
    let mended = check_mtime(library.dir(), side, meta, chosen.is_none())?;
    Ok(Verified {
        data_bytes: found.data_bytes,
        redirects,
        mended,
        chunks: (all.len() as u64, looked_at.len() as u64),
        resumed_bytes: found.resumed_chunks * CHUNK_SIZE,
    })
}

/// The content is right, wholly or as far as it was looked at: a new modification time may be accepted. True if it was.
fn check_mtime(dir: &Path, side: &Side, meta: &Metadata, whole: bool) -> Result<bool> {
    let record = &side.record;
    let mended = whole && mtime_ns(meta) != record.mtime_ns;
    if mended {
        // As when it was added: what the catalog is going to say must be durable.
        side.file.sync_all().map_err(|e| Error::io(&side.path, "make it durable", e))?;
    }
    let after = side.file.metadata().map_err(|e| Error::io(&side.path, "look at it", e))?;
    if mtime_ns(&after) != mtime_ns(meta) {
        let cause = format!("image {} was written to while it was verified", record.name);
        return Err(Error::file(ErrorKind::Changed, &side.path, cause).mend("stop what writes to it and try again"));
    }
    if mended {
        accept_mtime(&mut Writer::open(dir)?, record, mtime_ns(meta))?;
    }
    Ok(mended)
}

/// Opens an image whatever its modification time says: its bytes are going to be looked at.
pub(super) fn open(library: &Library, record: &ImageRecord) -> Result<Side> {
    let path = library.image_path(record);
    Ok(Side { file: library.open_any(record)?, path, record: record.clone() })
}

/// A random choice of chunks, ascending; the same for the same seed.
fn choose(all: &[u64], sample: Sample) -> Vec<u64> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share of a number of chunks")]
    let wanted = ((all.len() as f64 * sample.share).ceil() as usize).clamp(1, all.len().max(1));
    // Each chunk draws a lot; the lowest win. BLAKE3 is a fair drum, and chunks are few.
    let lot = |chunk: u64| {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&sample.seed.to_le_bytes()).update(&chunk.to_le_bytes());
        *hasher.finalize().as_bytes()
    };
    let mut lots: Vec<([u8; 32], u64)> = all.iter().map(|&chunk| (lot(chunk), chunk)).collect();
    lots.sort_unstable();
    let mut out: Vec<u64> = lots.into_iter().take(wanted).map(|(_, chunk)| chunk).collect();
    out.sort_unstable();
    out
}

/// What the bytes turned out to be.
pub(super) struct Found {
    /// Blocks that are not what was added, ascending.
    pub bad: Vec<u32>,
    /// Digest of all chunks that were looked at.
    pub digest: [u8; 32],
    /// Bytes of data that were read.
    pub data_bytes: u64,
    /// Chunks that need not be read any more.
    pub resumed_chunks: u64,
}

/// Compares chunks with the fingerprints.
pub(super) fn check_bytes(
    side: &Side,
    expected: &Expected,
    chunks: &[u64],
    pace: Option<&Pace>,
    progress: Option<&Progress>,
    work: &Work,
) -> Result<Found> {
    let record = &side.record;
    let is_done = |chunk: &u64| progress.is_some_and(|p| p.before.chunks.contains_key(chunk));
    let left: Vec<u64> = chunks.iter().copied().filter(|chunk| !is_done(chunk)).collect();
    let data_bytes = bytes::data_bytes(side, &left)?;
    work.observer.begin(&format!("hashing {}", record.name), data_bytes);
    let mut bad = progress.map(|p| p.before.bad.clone()).unwrap_or_default();
    let before = progress.iter().flat_map(|p| p.before.chunks.iter());
    let mut hashes: Vec<(u64, [u8; 32])> = before.filter_map(|(&chunk, &hash)| Some((chunk, hash?))).collect();
    let sum = Mutex::new((&mut bad, &mut hashes));
    let done = |checked: Checked| {
        progress.map_or(Ok(()), |p| p.chunk(&checked))?;
        let mut sum = sum.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        sum.0.extend_from_slice(&checked.bad);
        sum.1.extend(checked.hash.map(|hash| (checked.chunk, hash)));
        Ok(())
    };
    bytes::check(side, expected, &left, pace, work, &done)?;
    work.observer.end();
    bad.sort_unstable();
    bad.dedup();
    hashes.sort_unstable();
    let digest = digest::image(record.size, &hashes);
    Ok(Found { bad, digest, data_bytes, resumed_chunks: (chunks.len() - left.len()) as u64 })
}

/// The error that says what is wrong with the bytes, if anything is.
pub(super) fn judge(library: &Library, side: &Side, found: &Found, whole: bool) -> Result<()> {
    let name = &side.record.name;
    let intact = found.digest == side.record.digest;
    let more = match found.bad.len() {
        0 | 1 => String::new(),
        n => format!(" (the first of {n})"),
    };
    match found.bad.first() {
        None if intact || !whole => Ok(()),
        // The whole image is right, so the fingerprints are not.
        Some(block) if intact && whole => {
            let cause = format!("the fingerprint of block {block} of image {name} is wrong");
            Err(Error::file(ErrorKind::Corrupt, library.run_path(&side.record), cause)
                .mend("make everything anew with 'vmar library rebuild'"))
        }
        Some(block) => Err(changed(side, &format!("block {block} of image {name} is not what was added{more}"))),
        None => Err(changed(side, &format!("image {name} is not what was added, yet no fingerprint differs"))),
    }
}

fn changed(side: &Side, cause: &str) -> Error {
    Error::file(ErrorKind::Changed, &side.path, cause).mend(format!(
        "put the original back, add it under another name, or see what 'vmar image repair {} --dry-run' can mend",
        side.record.name
    ))
}

/// Every block with data has an entry, and no other: a block without one would be read as zeros.
fn check_coverage(library: &Library, record: &ImageRecord, map: &Map<Vec<u8>>, blocks: Vec<u32>) -> Result<()> {
    let mut mapped = map.entries().flat_map(|e| u64::from(e.source)..e.source_end());
    for block in blocks {
        let found = mapped.next();
        if found != Some(u64::from(block)) {
            let (at, what) = match found {
                Some(other) if other < u64::from(block) => (other, "has an entry but no data"),
                _ => (u64::from(block), "has data but no entry"),
            };
            return Err(bad_map(library, record, &format!("block {at} {what}")));
        }
    }
    match mapped.next() {
        Some(other) => Err(bad_map(library, record, &format!("block {other} has an entry but no data"))),
        None => Ok(()),
    }
}

fn bad_map(library: &Library, record: &ImageRecord, cause: &str) -> Error {
    Error::file(ErrorKind::Corrupt, library.map_path(&record.name), cause)
        .mend("make everything anew with 'vmar library rebuild'")
}

/// Compares every redirected block (of the given chunks, if any are given) with what is read in its place. Returns how many
/// there are.
fn check_redirects(
    library: &Library,
    own: &Side,
    map: &Map<Vec<u8>>,
    within: Option<&[u64]>,
    pace: Option<&Pace>,
    progress: Option<&Progress>,
    work: &Work,
) -> Result<u64> {
    let targets = open_targets(library, own, map)?;
    let sides = Sides { own, images: &targets };
    let ids: Vec<u32> = map.targets().map(|(target, _)| target.image.0).collect();
    let own_id = sides.own_id();
    let id_of = |e: &Entry| ids.get(e.target as usize).copied().unwrap_or(own_id);
    let is_redirect = |e: &Entry| id_of(e) != own_id || e.block != e.source;
    let pairs_of = |e: Entry| {
        let image = id_of(&e);
        (0..e.len).map(move |i| Pair { source: e.source + i, image, block: e.block + i })
    };
    let is_within =
        |pair: &Pair| within.is_none_or(|chunks| chunks.binary_search(&bytes::chunk_of(pair.source)).is_ok());
    let pairs = || map.entries().filter(is_redirect).flat_map(pairs_of).filter(is_within);
    let total = pairs().count() as u64;
    let binding = binding_of(library, own, &targets)?;
    let mut done = progress.map_or(0, |p| p.before.redirects(&binding)).min(total);
    work.observer.begin(&format!("comparing {}", own.record.name), (total - done) * BLOCK_SIZE);
    let mut rest = pairs().skip(crate::units::to_usize(done));
    let step = if pace.is_some() { PAIRS_PER_STEP_AT_PACE } else { PAIRS_PER_STEP };
    loop {
        let pairs: Vec<Pair> = rest.by_ref().take(step).collect();
        if pairs.is_empty() {
            break;
        }
        if let Some(pace) = pace {
            // Both sides are read.
            pace.take(2 * pairs.len() as u64 * BLOCK_SIZE, work.stop);
        }
        if let Some(bad) = differing(&sides, &pairs, work)?.first().and_then(|&i| pairs.get(i)) {
            return Err(wrong_redirect(own, sides.get(bad.image)?, bad));
        }
        done += pairs.len() as u64;
        progress.map_or(Ok(()), |p| p.redirects(done, &binding))?;
    }
    work.observer.end();
    Ok(total)
}

fn wrong_redirect(own: &Side, target: &Side, bad: &Pair) -> Error {
    let cause = format!(
        "block {} of image {} is read from block {} of image {}, which holds other bytes",
        bad.source, own.record.name, bad.block, target.record.name
    );
    let mend = format!("'vmar image verify {}' says whether that image changed", target.record.name);
    Error::file(ErrorKind::Changed, &target.path, cause).mend(mend)
}

/// What is compared: the map, and the files as they are now.
fn binding_of(library: &Library, own: &Side, targets: &Targets) -> Result<[u8; 32]> {
    let path = library.map_path(&own.record.name);
    let mut hasher = blake3::Hasher::new();
    hasher.update(&std::fs::read(&path).map_err(|e| Error::io(&path, "read the block map", e))?);
    for side in targets.0.values().chain([own]) {
        let meta = side.file.metadata().map_err(|e| Error::io(&side.path, "look at it", e))?;
        hasher.update(&side.record.digest).update(&meta.len().to_le_bytes()).update(&mtime_ns(&meta).to_le_bytes());
    }
    Ok(*hasher.finalize().as_bytes())
}

/// The images that the map points to, but for the image itself, whatever their modification times.
struct Targets(BTreeMap<u32, Side>);

impl Others for Targets {
    fn side(&self, id: u32) -> Result<&Side> {
        // A bug of this module, and no reason to go on: a block that is not compared must not be called good.
        self.0.get(&id).ok_or_else(|| Error::new(ErrorKind::Io, format!("image {id}"), "was not opened to be compared"))
    }
}

fn open_targets(library: &Library, own: &Side, map: &Map<Vec<u8>>) -> Result<Targets> {
    let mut out = BTreeMap::new();
    for (target, _) in map.targets().filter(|(target, _)| target.image != own.record.id) {
        let record = library.image_by_id(target.image)?;
        if target_of(record) != target {
            let cause = format!("it points to another generation of image {} than the library has", record.name);
            return Err(bad_map(library, &own.record, &cause));
        }
        out.insert(target.image.0, open(library, record)?);
    }
    Ok(Targets(out))
}

/// The content is right: the catalog takes the new modification time.
pub(super) fn accept_mtime(writer: &mut Writer, record: &ImageRecord, mtime_ns: i64) -> Result<()> {
    writer.update(|catalog| {
        let same = |r: &&mut ImageRecord| r.id == record.id && r.generation == record.generation;
        if let Some(found) = catalog.images.iter_mut().find(same) {
            found.mtime_ns = mtime_ns;
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_the_size_asked_for_and_is_another_for_another_seed() {
        let all: Vec<u64> = (0..1000).map(|i| i * 3).collect();
        let chosen = |share, seed| choose(&all, Sample { share, seed });
        assert_eq!(chosen(0.05, 1).len(), 50);
        assert_eq!(chosen(0.0001, 1).len(), 1);
        assert_eq!(chosen(1.0, 1), all);
        assert_eq!(chosen(0.05, 1), chosen(0.05, 1));
        assert!(chosen(0.05, 1) != chosen(0.05, 2));
        assert!(chosen(0.05, 1).is_sorted() && chosen(0.05, 1).iter().all(|c| all.contains(c)));
        // Every chunk has its chance: 200 samples of 5 % leave out one with a probability of 3.5e-5.
        let mut seen: Vec<u64> = (0..400).flat_map(|seed| chosen(0.05, seed)).collect();
        seen.sort_unstable();
        seen.dedup();
        assert_eq!(seen, all);
        assert!(choose(&[], Sample { share: 0.5, seed: 0 }).is_empty());
    }
}
