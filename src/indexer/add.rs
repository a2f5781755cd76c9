//! Adds images to a library: all of them, or none.

use super::compare::{Side, Sides};
use super::join::Groups;
use super::resolve::{Resolved, resolve};
use super::{Work, target_of};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::{Row, run, scan};
use crate::image::{Conversion, Format, Probe, convert, probe, virtual_size};
use crate::library::{
    ImageRecord, Library, Policy, RunRef, Source, Transaction, Writer, check_name, converted_file, map_file, mtime_ns,
    run_file, settle_mtime,
};
use crate::map::{Map, MapSpec, Totals, build};
use crate::units::{ImageId, blocks_in};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// An image to add.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewImage {
    /// What to call it.
    pub name: String,
    /// Raw, qcow2 or VMDK file.
    pub file: PathBuf,
}

/// What became of it.
#[derive(Clone, Debug)]
pub struct Added {
    /// As the catalog has it.
    pub record: ImageRecord,
    /// As its map has it.
    pub totals: Totals,
    /// Bytes of data (holes left out) that were hashed.
    pub data_bytes: u64,
    /// Other images that it shares blocks with, by being read from them.
    pub reads_from: Vec<ImageId>,
    /// How long the conversion took, if there was one.
    pub convert_time: Option<Duration>,
    /// How long reading and hashing took.
    pub hash_time: Duration,
    /// How long join, comparison and writing took.
    pub map_time: Duration,
}

/// Everything about an image of the library that a later one is compared with.
pub(super) struct Earlier {
    pub record: ImageRecord,
    /// Where its run is now: in place, or staged by this very command.
    pub run: PathBuf,
    /// The open file of an image that this command adds; others are opened when they are needed.
    pub side: Option<Side>,
}

/// Adds the images, in order; IDs count up in that order.
///
/// # Errors
/// Whatever stops one image stops all, and the library stays as it was.
pub fn add(writer: &mut Writer, images: &[NewImage], work: &Work) -> Result<Vec<Added>> {
    let probes = check(writer.library(), images)?;
    let mut change = writer.begin();
    let mut earlier: Vec<Earlier> = change.library().images().iter().map(|r| existing(change.library(), r)).collect();
    let mut added = Vec::new();
    for (n, (image, from)) in (0u32..).zip(images.iter().zip(&probes)) {
        work.check_stop(&image.name)?;
        let id = change.library().catalog().next_id.checked_add(n).map(ImageId);
        let id = id.ok_or_else(|| Error::new(ErrorKind::Unsupported, &image.name, "the library has no IDs left"))?;
        let (outcome, side) = add_one(&mut change, &mut earlier, &image.name, id, from, work)?;
        earlier.push(Earlier { record: outcome.record.clone(), run: staged_run(&change, &outcome), side: Some(side) });
        added.push(outcome);
    }
    // Last look: whoever wrote into a file while others were hashed is noticed.
    for side in earlier.iter().filter_map(|e| e.side.as_ref()) {
        check_unchanged(side)?;
    }
    work.check_stop("add")?;
    let records: Vec<ImageRecord> = added.iter().map(|a| a.record.clone()).collect();
    change.commit(records.clone())?;
    records.iter().for_each(|record| make_read_only(&writer.library().image_path(record)));
    Ok(added)
}

/// Names and files, before any work is done.
fn check(library: &Library, images: &[NewImage]) -> Result<Vec<Probe>> {
    for (i, image) in images.iter().enumerate() {
        check_name(&image.name)?;
        let twice = images.iter().take(i).any(|other| other.name == image.name);
        if twice || library.image(&image.name).is_ok() {
            let cause = if twice { "named twice" } else { "there is an image of this name already" };
            return Err(Error::new(ErrorKind::Exists, &image.name, cause).mend("use another name"));
        }
    }
    images.iter().map(|image| probe(&image.file)).collect()
}

fn existing(library: &Library, record: &ImageRecord) -> Earlier {
    Earlier { record: record.clone(), run: library.run_path(record), side: None }
}

fn staged_run(change: &Transaction, added: &Added) -> PathBuf {
    change.staged(&added.record.run.file)
}

/// Converts if need be, fingerprints, joins, compares, and stages run and map.
fn add_one(
    change: &mut Transaction,
    earlier: &mut [Earlier],
    name: &str,
    id: ImageId,
    from: &Probe,
    work: &Work,
) -> Result<(Added, Side)> {
    let began = Instant::now();
    let (raw, owned) = bring_in(change, name, from, work)?;
    let convert_time = owned.is_some().then(|| began.elapsed());

    let (mut side, mut scanned, data_bytes, hash_time) =
        fingerprint(change.library(), name, id, raw, owned, from, work)?;

    let map_began = Instant::now();
    let rows = std::mem::take(&mut scanned.rows);
    let groups = join(&rows, earlier, &side.record, work)?;
    open_sides(change.library(), earlier, &groups)?;
    let sides = Sides::new(earlier.iter().map(|e| e.side.as_ref()).collect(), &side);
    let resolved = resolve(rows, &groups, &sides, change.library().catalog().policy, work)?;
    // What was compared must still be what the catalog says.
    sides.open().try_for_each(check_unchanged)?;

    let stamp = write_run(change, &side.record, &resolved)?;
    side.record.run = RunRef { bytes: stamp.bytes, crc32c: stamp.crc32c, ..side.record.run };
    let targets = resolved.images.iter().filter_map(|&i| earlier.get(i as usize).map(|e| e.record.id));
    let reads_from = targets.collect();
    let path = change.stage(&map_file(name))?;
    let policy = change.library().catalog().policy;
    let totals = write_map(&path, policy, earlier, &side.record, resolved)?;
    let map_time = map_began.elapsed();
    let record = side.record.clone();
    Ok((Added { record, totals, data_bytes, reads_from, convert_time, hash_time, map_time }, side))
}

/// The raw file to fingerprint, and where it will be inside the library if vmar makes it.
fn bring_in(change: &mut Transaction, name: &str, from: &Probe, work: &Work) -> Result<(PathBuf, Option<String>)> {
    if from.format == Format::Raw {
        return Ok((from.path.clone(), None));
    }
    let goal = converted_file(name, 1);
    let staged = change.stage(&goal)?;
    let size = virtual_size(from)?;
    let told = Mutex::new(0u64);
    let progress = |ten_thousandths: u64| {
        let now = size / 10_000 * ten_thousandths;
        if let Ok(mut told) = told.lock() {
            work.observer.advance(now.saturating_sub(*told));
            *told = now.max(*told);
        }
    };
    work.observer.begin(&format!("converting {name}"), size);
    convert(&Conversion { from, to: &staged, stop: work.stop, progress: &progress })?;
    work.observer.end();
    Ok((staged, Some(goal)))
}

/// Scans the raw file and makes the record of the image, but for the stamp of its run. Also: bytes of data, and how long
/// reading and hashing them took.
fn fingerprint(
    library: &Library,
    name: &str,
    id: ImageId,
    raw: PathBuf,
    owned: Option<String>,
    from: &Probe,
    work: &Work,
) -> Result<(Side, scan::Scan, u64, Duration)> {
    let file = crate::library::open_regular(&raw)?;
    let meta = file.metadata().map_err(|e| Error::io(&raw, "look at it", e))?;
    settle_mtime(&meta);
    let algorithm = library.catalog().fingerprint;
    let data_bytes = scan::data_bytes(&file, &raw, meta.len())?;
    work.observer.begin(&format!("hashing {name}"), data_bytes);
    let advance = |bytes| work.observer.advance(bytes);
    let (size, threads, stop) = (meta.len(), work.threads, work.stop);
    let job = scan::Job { file: &file, path: &raw, size, algorithm, threads, stop, advance: &advance };
    let began = Instant::now();
    let scanned = scan::scan(&job)?;
    let hash_time = began.elapsed();
    work.observer.end();
    let record = ImageRecord {
        id,
        name: name.to_string(),
        generation: 1,
        source: owned.is_some().then(|| Source { format: from.format, path: from.path.clone() }),
        path: owned.map_or_else(|| raw.clone(), PathBuf::from),
        size,
        mtime_ns: mtime_ns(&meta),
        digest: scanned.digest,
        domain: library.catalog().domain.clone(),
        blocks: blocks_in(size),
        nonzero_blocks: scanned.rows.len() as u64,
        fingerprint: algorithm,
        run: RunRef { file: run_file(name, 1).into(), bytes: 0, crc32c: 0 },
    };
    let side = Side { file, path: raw, record };
    // The catalog will be durable, so what it describes must be: a power cut could leave a file that was just copied with
    // its size and time, but with holes for data.
    side.file.sync_all().map_err(|e| Error::io(&side.path, "make it durable", e))?;
    check_unchanged(&side)?;
    Ok((side, scanned, data_bytes, hash_time))
}

/// What the earlier images of the same domain know of the new image's hashes.
pub(super) fn join(rows: &[Row], earlier: &[Earlier], new: &ImageRecord, work: &Work) -> Result<Groups> {
    let mut groups = Groups::new(rows);
    for (i, other) in (0u32..).zip(earlier) {
        work.check_stop(&new.name)?;
        if other.record.domain == new.domain && other.record.fingerprint == new.fingerprint {
            let stamp = run::Stamp { bytes: other.record.run.bytes, crc32c: other.record.run.crc32c };
            groups.join(rows, i, run::Reader::open(&other.run, stamp)?)?;
        }
    }
    Ok(groups)
}

/// Opens the earlier images that blocks will be compared with.
pub(super) fn open_sides(library: &Library, earlier: &mut [Earlier], groups: &Groups) -> Result<()> {
    let mut needed = vec![false; earlier.len()];
    for group in 0..groups.len() {
        for known in groups.first(group).iter().chain(groups.more(group)) {
            if let Some(flag) = needed.get_mut(known.image as usize) {
                *flag = true;
            }
        }
    }
    for (other, _) in earlier.iter_mut().zip(needed).filter(|(other, needed)| *needed && other.side.is_none()) {
        let file = library.open_image(&other.record)?;
        let path = library.image_path(&other.record);
        other.side = Some(Side { file, path, record: other.record.clone() });
    }
    Ok(())
}

/// Refuses a file that was written to since it was opened.
pub(super) fn check_unchanged(side: &Side) -> Result<()> {
    let meta = side.file.metadata().map_err(|e| Error::io(&side.path, "look at it", e))?;
    if meta.len() != side.record.size || mtime_ns(&meta) != side.record.mtime_ns {
        let cause = format!("image {} was written to while it was being read", side.record.name);
        return Err(Error::file(ErrorKind::Changed, &side.path, cause).mend("stop what writes to it and try again"));
    }
    Ok(())
}

fn write_run(change: &mut Transaction, record: &ImageRecord, resolved: &Resolved) -> Result<run::Stamp> {
    let path = change.stage(&run_file(&record.name, record.generation))?;
    let meta = run::Meta {
        library: &change.library().catalog().uuid,
        domain: &record.domain,
        image: &record.name,
        image_id: record.id.0,
        generation: record.generation,
        size: record.size,
        digest: record.digest,
        algorithm: record.fingerprint,
    };
    run::write(&path, &meta, &resolved.rows)
}

/// Writes the map to a new file, once it has passed what every reader asks of it.
pub(super) fn write_map(
    path: &Path,
    policy: Policy,
    earlier: &[Earlier],
    record: &ImageRecord,
    resolved: Resolved,
) -> Result<Totals> {
    let target = |&i: &u32| target_of(earlier.get(i as usize).map_or(record, |e| &e.record));
    let spec = MapSpec {
        source: target_of(record),
        policy: policy.code(),
        targets: resolved.images.iter().map(target).collect(),
        entries: resolved.entries,
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

/// A base image must not change. Best effort: the file may be somebody else's, and root may write all the same.
fn make_read_only(path: &Path) {
    let outcome = fs::metadata(path).and_then(|meta| {
        let mut permissions = meta.permissions();
        permissions.set_mode(permissions.mode() & !0o222);
        fs::set_permissions(path, permissions)
    });
    if let Err(e) = outcome {
        log::info!("{}: cannot make it read-only: {e}", path.display());
    }
}
