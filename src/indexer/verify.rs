//! Verifies images: the bytes against digest and fingerprints, and every redirect byte for byte.

use super::compare::{Others, Pair, Side, Sides, differing};
use super::stats::open_run;
use super::{Work, read_map, target_of};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::{Row, scan};
use crate::library::{ImageRecord, Library, Writer, mtime_ns, settle_mtime};
use crate::map::{Entry, Map};
use crate::units::BLOCK_SIZE;
use std::collections::BTreeMap;
use std::path::Path;

/// Redirected blocks that are compared at a time; bounds memory.
const PAIRS_PER_STEP: usize = 1 << 20;

/// What a good image turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verified {
    /// Bytes of data that were read.
    pub data_bytes: u64,
    /// Blocks that are read from elsewhere and were compared.
    pub redirects: u64,
    /// The modification time had changed and the content had not: the catalog now has the new time.
    pub mended: bool,
}

/// Verifies one image wholly.
///
/// # Errors
/// `Changed` when a byte of the image is not what was added, `Corrupt` when a file of the library is damaged; the line
/// names the first bad block.
pub fn verify(dir: &Path, name: &str, work: &Work) -> Result<Verified> {
    let library = Library::open(dir)?;
    let record = library.image(name)?;
    let side = open(&library, record)?;
    let meta = side.file.metadata().map_err(|e| Error::io(&side.path, "look at it", e))?;
    if meta.len() != record.size {
        library.check_identity(record, &meta)?;
    }
    settle_mtime(&meta);
    let (rows, data_bytes) = check_bytes(&library, &side, work)?;
    let map = read_map(&library, record)?;
    check_coverage(&library, record, &map, rows)?;
    let redirects = check_redirects(&library, &side, &map, work)?;

    let mended = mtime_ns(&meta) != record.mtime_ns;
    if mended {
        // As when it was added: what the catalog is going to say must be durable.
        side.file.sync_all().map_err(|e| Error::io(&side.path, "make it durable", e))?;
    }
    let after = side.file.metadata().map_err(|e| Error::io(&side.path, "look at it", e))?;
    if mtime_ns(&after) != mtime_ns(&meta) {
        let cause = format!("image {name} was written to while it was verified");
        return Err(Error::file(ErrorKind::Changed, &side.path, cause).mend("stop what writes to it and try again"));
    }
    if mended {
        accept_mtime(dir, record, mtime_ns(&meta))?;
    }
    Ok(Verified { data_bytes, redirects, mended })
}

/// Opens an image whatever its modification time says: its bytes are going to be looked at.
fn open(library: &Library, record: &ImageRecord) -> Result<Side> {
    let path = library.image_path(record);
    Ok(Side { file: library.open_any(record)?, path, record: record.clone() })
}

/// Hashes everything again and compares with run and digest. Returns the blocks that have data, ascending.
fn check_bytes(library: &Library, side: &Side, work: &Work) -> Result<(Vec<u32>, u64)> {
    let record = &side.record;
    let data_bytes = scan::data_bytes(&side.file, &side.path, record.size)?;
    work.observer.begin(&format!("hashing {}", record.name), data_bytes);
    let advance = |bytes| work.observer.advance(bytes);
    let scanned = scan::scan(&scan::Job {
        file: &side.file,
        path: &side.path,
        size: record.size,
        algorithm: record.fingerprint,
        threads: work.threads,
        stop: work.stop,
        advance: &advance,
    })?;
    work.observer.end();

    let kept: Vec<Row> = open_run(library, record)?.collect::<Result<_>>()?;
    let first_bad = first_difference(&scanned.rows, kept);
    let intact = scanned.digest == record.digest;
    let name = &record.name;
    match first_bad {
        None if intact => {}
        // The whole image is right, so the fingerprints are not.
        Some(block) if intact => {
            let cause = format!("the fingerprint of block {block} of image {name} is wrong");
            return Err(Error::file(ErrorKind::Corrupt, library.run_path(record), cause)
                .mend("make everything anew with 'vmar library rebuild'"));
        }
        Some(block) => return Err(changed(side, &format!("block {block} of image {name} is not what was added"))),
        None => return Err(changed(side, &format!("image {name} is not what was added, yet no fingerprint differs"))),
    }
    let mut blocks: Vec<u32> = scanned.rows.iter().map(|r| r.block).collect();
    blocks.sort_unstable();
    Ok((blocks, data_bytes))
}

fn changed(side: &Side, cause: &str) -> Error {
    Error::file(ErrorKind::Changed, &side.path, cause).mend("put the original back, or add it under another name")
}

/// The lowest block whose fingerprint is in one of the lists and not in the other, variants aside.
fn first_difference(now: &[Row], mut kept: Vec<Row>) -> Option<u32> {
    kept.iter_mut().for_each(|row| row.variant = 0);
    kept.sort_unstable();
    let (mut a, mut b) = (now.iter().peekable(), kept.iter().peekable());
    let mut lowest = None;
    loop {
        let block = match (a.peek(), b.peek()) {
            (None, None) => return lowest,
            (Some(x), Some(y)) if x == y => {
                a.next();
                b.next();
                continue;
            }
            (Some(x), Some(y)) if x > y => b.next(),
            (None, Some(_)) => b.next(),
            (Some(_), _) => a.next(),
        };
        lowest = [lowest, block.map(|r| r.block)].into_iter().flatten().min();
    }
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

/// Compares every redirected block with what is read in its place. Returns how many there were.
fn check_redirects(library: &Library, own: &Side, map: &Map<Vec<u8>>, work: &Work) -> Result<u64> {
    let targets = open_targets(library, own, map)?;
    let sides = Sides { own, images: &targets };
    let ids: Vec<u32> = map.targets().map(|(target, _)| target.image.0).collect();
    let own_id = sides.own_id();
    let is_redirect = |e: &Entry| ids.get(e.target as usize) != Some(&own_id) || e.block != e.source;
    let total: u64 = map.entries().filter(is_redirect).map(|e| u64::from(e.len)).sum();
    work.observer.begin(&format!("comparing {}", own.record.name), total * BLOCK_SIZE);
    let pairs_of = |e: Entry| {
        let image = ids.get(e.target as usize).copied().unwrap_or(own_id);
        (0..e.len).map(move |i| Pair { source: e.source + i, image, block: e.block + i })
    };
    let mut all = map.entries().filter(is_redirect).flat_map(pairs_of);
    loop {
        let pairs: Vec<Pair> = all.by_ref().take(PAIRS_PER_STEP).collect();
        if pairs.is_empty() {
            break;
        }
        if let Some(bad) = differing(&sides, &pairs, work)?.first().and_then(|&i| pairs.get(i)) {
            let target = sides.get(bad.image)?;
            let cause = format!(
                "block {} of image {} is read from block {} of image {}, which holds other bytes",
                bad.source, own.record.name, bad.block, target.record.name
            );
            let mend = format!("'vmar image verify {}' says whether that image changed", target.record.name);
            return Err(Error::file(ErrorKind::Changed, &target.path, cause).mend(mend));
        }
    }
    work.observer.end();
    Ok(total)
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
fn accept_mtime(dir: &Path, record: &ImageRecord, mtime_ns: i64) -> Result<()> {
    let mut writer = Writer::open(dir)?;
    writer.update(|catalog| {
        let same = |r: &&mut ImageRecord| r.id == record.id && r.generation == record.generation;
        if let Some(found) = catalog.images.iter_mut().find(same) {
            found.mtime_ns = mtime_ns;
        }
    })
}
