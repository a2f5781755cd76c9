//! Adds images to a library: all of them, or none.

use super::Work;
use super::candidates::held;
use super::change::{Change, Lookout};
use super::compare::Side;
use super::images::check_unchanged;
use super::place::{Placing, Sink, correct_run, place, write_map};
use super::remap::Proved;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::chunks::{self, Chunk};
use crate::fingerprint::log::ScanLog;
use crate::fingerprint::{Algorithm, Row, run, scan};
use crate::image::{Conversion, Format, Probe, convert, probe, virtual_size};
use crate::index;
use crate::index::{Table, TableWriter};
use crate::io::cold::Cold;
use crate::library::{
    FileRef, ImageRecord, Library, Source, Transaction, Writer, check_name, chunks_file, made_file, map_file, mtime_ns,
    run_file, scan_log, settle_mtime,
};
use crate::map::Totals;
use crate::units::{BLOCK_SIZE, ImageId, blocks_in};
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
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
    /// How many of its blocks hold a content that the other image holds too, for each image that was there before.
    pub shares: Vec<(ImageId, u64)>,
    /// How long the conversion took, if there was one.
    pub convert_time: Option<Duration>,
    /// How long reading and hashing took.
    pub hash_time: Duration,
    /// How long join, comparison and writing took.
    pub map_time: Duration,
}

/// Adds the images, in order; IDs count up in that order.
///
/// # Errors
/// Whatever stops one image stops all, and the library stays as it was.
pub fn add(writer: &mut Writer, images: &[NewImage], work: &Work) -> Result<Vec<Added>> {
    let added = add_all(writer, images, true, work)?;
    added.iter().for_each(|added| make_read_only(&writer.library().image_path(&added.record)));
    Ok(added)
}

/// Does all the work of [`add`], says what would become of it, and changes nothing.
pub fn preview(writer: &mut Writer, images: &[NewImage], work: &Work) -> Result<Vec<Added>> {
    add_all(writer, images, false, work)
}

fn add_all(writer: &mut Writer, images: &[NewImage], publish: bool, work: &Work) -> Result<Vec<Added>> {
    let probes = check(writer.library(), images)?;
    let mut change = Change::begin(writer, work)?;
    let mut added = Vec::new();
    for (image, from) in images.iter().zip(&probes) {
        work.check_stop(&image.name)?;
        let id = change.next_id()?;
        let found = fingerprint_file(&mut change, &image.name, id, from, work)?;
        added.push(enter(&mut change, found, work)?);
    }
    if publish {
        change.commit(|_| {}, work)?;
    }
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

/// Bytes of data from which on a scan is kept in a log, so that an add that is killed goes on where it was.
const WORTH_A_LOG: u64 = 4 << 30;

/// The rows of an image that was read.
pub(super) enum Rows {
    Memory(Vec<Row>),
    Log(ScanLog),
}

impl Rows {
    /// All of them, sorted.
    fn sorted(self, work: &Work) -> Box<dyn Iterator<Item = Result<Row>>> {
        match self {
            Rows::Memory(rows) => Box::new(rows.into_iter().map(Ok)),
            Rows::Log(log) => Box::new(log.rows(rows_in(work.memory / 4), work.threads)),
        }
    }
}

/// Rows that fit.
fn rows_in(bytes: u64) -> u64 {
    (bytes / size_of::<Row>() as u64).max(1)
}

/// What a log of a scan belongs to: the file as it is, and how it is hashed.
fn identity(meta: &fs::Metadata, algorithm: Algorithm) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for n in [meta.dev(), meta.ino(), meta.len(), mtime_ns(meta).cast_unsigned()] {
        hasher.update(&n.to_le_bytes());
    }
    *hasher.update(algorithm.to_string().as_bytes()).finalize().as_bytes()
}

/// An image that was read, and is not in the library yet.
pub(super) struct Fingerprints {
    pub side: Side,
    pub rows: Rows,
    pub chunks: Vec<Chunk>,
    pub data_bytes: u64,
    pub convert_time: Option<Duration>,
    pub hash_time: Duration,
    /// Redirects that need no proof, see [`super::resolve::Proof::is_proved`].
    pub proved: Option<Proved>,
    /// What was read stays in the page cache as long as this.
    pub _cold: Cold,
}

/// The file once more, for reads that leave the page cache as it was.
pub(super) fn open_cold(file: &fs::File, path: &Path, size: u64) -> Result<Cold> {
    file.try_clone().and_then(|file| Cold::new(file, size)).map_err(|e| Error::io(path, "look into it", e))
}

/// Converts if need be, reads and hashes.
pub(super) fn fingerprint_file(
    change: &mut Change<'_>,
    name: &str,
    id: ImageId,
    from: &Probe,
    work: &Work,
) -> Result<Fingerprints> {
    let began = Instant::now();
    let (raw, made) = bring_in(&mut change.transaction, name, id, from, work)?;
    let convert_time = made.is_some().then(|| began.elapsed());
    let source = made.is_some().then(|| Source { format: from.format, path: from.path.clone() });
    let place = RawFile { raw, made, source };
    let log = change.transaction.scratch(&scan_log(name));
    let mut found = fingerprint(change.transaction.library(), name, id, place, &log, work)?;
    found.convert_time = convert_time;
    Ok(found)
}

/// A raw file to read: where it is now, and where it will be if vmar made it.
pub(super) struct RawFile {
    pub raw: PathBuf,
    pub made: Option<String>,
    pub source: Option<Source>,
}

/// The raw file to fingerprint, and where it will be inside the library if vmar makes it.
fn bring_in(
    change: &mut Transaction<'_>,
    name: &str,
    id: ImageId,
    from: &Probe,
    work: &Work,
) -> Result<(PathBuf, Option<String>)> {
    if from.format == Format::Raw {
        return Ok((from.path.clone(), None));
    }
    let goal = made_file(name, id);
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

/// Scans the raw file and makes the record of the image, but for the stamps of its files.
fn fingerprint(
    library: &Library,
    name: &str,
    id: ImageId,
    place: RawFile,
    log: &Path,
    work: &Work,
) -> Result<Fingerprints> {
    let raw = place.raw.clone();
    let file = crate::library::open_regular(&raw)?;
    let meta = file.metadata().map_err(|e| Error::io(&raw, "look at it", e))?;
    settle_mtime(&meta);
    let algorithm = library.catalog().fingerprint;
    let data_bytes = scan::data_bytes(&file, &raw, meta.len())?;
    work.observer.begin(&format!("hashing {name}"), data_bytes);
    let advance = |bytes| work.observer.advance(bytes);
    let (size, threads, stop) = (meta.len(), work.threads, work.stop);
    // What is redirected is read again, to be compared.
    let cold = open_cold(&file, &raw, size)?.keep_for_now(data_bytes);
    let is_large = data_bytes >= WORTH_A_LOG || data_bytes / BLOCK_SIZE > rows_in(work.memory / 4);
    let log = is_large.then(|| ScanLog::open(log, &identity(&meta, algorithm))).transpose()?;
    let job = scan::Job {
        file: &file,
        cold: &cold,
        path: &raw,
        size,
        algorithm,
        threads,
        stop,
        advance: &advance,
        log: log.as_ref(),
    };
    let began = Instant::now();
    let scanned = scan::scan(&job)?;
    let hash_time = began.elapsed();
    work.observer.end();
    let side = described(library, name, id, place, file, &scanned)?;
    let scan::Scan { rows, chunks, .. } = scanned;
    let rows = log.map_or(Rows::Memory(rows), Rows::Log);
    Ok(Fingerprints { side, rows, chunks, data_bytes, convert_time: None, hash_time, proved: None, _cold: cold })
}

/// The record of an image that was read, and its file, which is durable and unchanged since.
pub(super) fn described(
    library: &Library,
    name: &str,
    id: ImageId,
    place: RawFile,
    file: fs::File,
    scanned: &scan::Scan,
) -> Result<Side> {
    let meta = file.metadata().map_err(|e| Error::io(&place.raw, "look at it", e))?;
    let record = ImageRecord {
        id,
        name: name.to_string(),
        generation: 1,
        source: place.source,
        path: place.made.map_or_else(|| place.raw.clone(), PathBuf::from),
        size: meta.len(),
        mtime_ns: mtime_ns(&meta),
        digest: scanned.digest,
        domain: library.catalog().domain.clone(),
        blocks: blocks_in(meta.len()),
        nonzero_blocks: scanned.count,
        fingerprint: library.catalog().fingerprint,
        run: FileRef { file: run_file(name, id).into(), bytes: 0, crc32c: 0 },
        chunks: None,
    };
    let side = Side { file, path: place.raw, record };
    // The catalog will be durable, so what it describes must be: a power cut could leave a file that was just copied with
    // its size and time, but with holes for data.
    side.file.sync_all().map_err(|e| Error::io(&side.path, "make it durable", e))?;
    check_unchanged(&side)?;
    Ok(side)
}

/// Joins, compares, and stages run, chunks, map and index rows of an image. It is among the change's images afterwards.
pub(super) fn enter(change: &mut Change<'_>, found: Fingerprints, work: &Work) -> Result<Added> {
    let began = Instant::now();
    let Fingerprints { mut side, rows, chunks, data_bytes, convert_time, hash_time, proved, _cold } = found;
    let (id, name) = (side.record.id, side.record.name.clone());
    side.record.chunks = Some(write_chunks(change, &side.record, &chunks)?);

    let run_path = change.stage_new_or_over(&side.record.run.file.display().to_string())?;
    let known_path = change.transaction.scratch(&format!("{id}.known"));
    let library = change.transaction.library().catalog().uuid_bytes();
    let mut sink = Newcomer {
        run: run::Writer::create(&run_path, &meta(change.transaction.library(), &side.record))?,
        known: TableWriter::create(&known_path, library, u64::from(id.0))?,
        shared: HashMap::new(),
    };
    let policy = change.policy;
    let choose = change.choose();
    let scratch = change.transaction.scratch(&format!("{id}.pairs"));
    let placing = Placing {
        own: &side,
        images: &change.images,
        contents: &change.contents,
        choose: &choose,
        policy,
        is_settled: false,
        is_proved: &|pair| proved.as_ref().is_some_and(|p| p.has(pair)),
        scratch: &scratch,
        work,
    };
    let placed = place(rows.sorted(work), &placing, &mut sink)?;
    let shares = expand(&sink.shared, &change.contents);
    let mut stamp = sink.run.finish()?;
    let known_stamp = sink.known.finish()?;
    if !placed.corrections.is_empty() {
        let right = change.transaction.scratch(&format!("{id}.run"));
        let meta = meta(change.transaction.library(), &side.record);
        stamp = correct_run(&run_path, stamp, &right, &meta, &placed.corrections)?;
        fs::rename(&right, &run_path).map_err(|e| Error::io(&run_path, "replace it", e))?;
    }
    side.record.run = FileRef { bytes: stamp.bytes, crc32c: stamp.crc32c, ..side.record.run };

    let map_path = change.stage_new_or_over(&map_file(&name))?;
    let reads_from = placed.targets.iter().map(|&id| ImageId(id)).filter(|i| *i != id).collect();
    let totals = write_map(&map_path, policy, &change.images, &side, placed)?;

    let known = Table::open(&known_path, known_stamp)?;
    let rows = run::Reader::open(&run_path, stamp)?;
    let count = side.record.nonzero_blocks;
    change.contents.insert(&change.transaction, id, held(rows, known.scan()), count, work)?;
    fs::remove_file(&known_path).map_err(|e| Error::io(&known_path, "remove it", e))?;

    let record = side.record.clone();
    change.add(side, run_path);
    let map_time = began.elapsed();
    Ok(Added { record, totals, data_bytes, reads_from, shares, convert_time, hash_time, map_time })
}

/// Writes the new image's files as its rows are settled.
struct Newcomer {
    run: run::Writer,
    known: TableWriter,
    /// Blocks of the image by the set of images that hold their content.
    shared: HashMap<u32, u64>,
}

impl Sink for Newcomer {
    fn part(&mut self, rows: &[Row], known: &[index::Row]) -> Result<()> {
        self.run.push(rows)?;
        known.iter().try_for_each(|row| self.known.push(row))?;
        let mut lookout = Lookout::new(known);
        for row in rows {
            if let Some(set) = lookout.set_of(row) {
                *self.shared.entry(set).or_default() += 1;
            }
        }
        Ok(())
    }
}

/// From blocks by set to blocks by image.
fn expand(shared: &HashMap<u32, u64>, contents: &super::contents::Contents) -> Vec<(ImageId, u64)> {
    let mut by_image: std::collections::BTreeMap<u32, u64> = std::collections::BTreeMap::new();
    for (set, blocks) in shared {
        contents.sets().images(*set).iter().for_each(|image| *by_image.entry(*image).or_default() += blocks);
    }
    by_image.into_iter().map(|(id, blocks)| (ImageId(id), blocks)).collect()
}

fn write_chunks(change: &mut Change<'_>, record: &ImageRecord, all: &[Chunk]) -> Result<FileRef> {
    let known = record.chunks.as_ref().map(|c| c.file.display().to_string());
    let file = known.unwrap_or_else(|| chunks_file(&record.name, record.id));
    let path = change.stage_new_or_over(&file)?;
    let bytes = chunks::encode(all);
    fs::write(&path, &bytes).map_err(|e| Error::io(&path, "write", e))?;
    Ok(FileRef { file: file.into(), bytes: bytes.len() as u64, crc32c: crc32c::crc32c(&bytes) })
}

/// What the run of an image says of it.
fn meta<'a>(library: &'a Library, record: &'a ImageRecord) -> run::Meta<'a> {
    run::Meta {
        library: &library.catalog().uuid,
        domain: &record.domain,
        image: &record.name,
        image_id: record.id.0,
        generation: record.generation,
        size: record.size,
        digest: record.digest,
        algorithm: record.fingerprint,
    }
}

/// A base image must not change. Best effort: the file may be somebody else's, and root may write all the same.
pub(super) fn make_read_only(path: &Path) {
    let outcome = fs::metadata(path).and_then(|meta| {
        let mut permissions = meta.permissions();
        permissions.set_mode(permissions.mode() & !0o222);
        fs::set_permissions(path, permissions)
    });
    if let Err(e) = outcome {
        log::info!("{}: cannot make it read-only: {e}", path.display());
    }
}

/// Reads an image of the library again; it keeps name, ID, generation and what it was made of.
pub(super) fn refingerprint(change: &Change<'_>, record: &ImageRecord, work: &Work) -> Result<Fingerprints> {
    let library = change.transaction.library();
    let made = record.owned().then(|| record.path.display().to_string());
    let place = RawFile { raw: library.image_path(record), made, source: record.source.clone() };
    let log = change.transaction.scratch(&scan_log(&record.name));
    let mut found = fingerprint(library, &record.name, record.id, place, &log, work)?;
    let new = &mut found.side.record;
    new.generation = record.generation;
    new.domain.clone_from(&record.domain);
    // A renamed image's files keep the names that they have.
    new.run.file.clone_from(&record.run.file);
    new.chunks.clone_from(&record.chunks);
    Ok(found)
}
