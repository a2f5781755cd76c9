//! Adds images to a library: all of them, or none.

use super::Work;
use super::candidates::held;
use super::change::{Change, Lookout};
use super::compare::Side;
use super::images::check_unchanged;
use super::place::{Lent, Placing, Sink, correct_run, place, write_map};
use super::remap::Proved;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::chunks::{self, Chunk};
use crate::fingerprint::log::ScanLog;
use crate::fingerprint::{Algorithm, Hasher, Row, run, scan};
use crate::image::{Conversion, Format, Probe, convert, probe, virtual_size};
use crate::index;
use crate::index::{Table, TableWriter};
use crate::io::cold::Cold;
use crate::library::{
    FileRef, ImageRecord, Library, Source, Transaction, Writer, check_name, chunks_file, made_file, map_file, mtime_ns,
    public_run_file, run_file, scan_log, settle_mtime,
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

/// Adds the images to the default domain, in order; IDs count up in that order.
///
/// # Errors
/// Whatever stops one image stops all, and the library stays as it was.
pub fn add(writer: &mut Writer, images: &[NewImage], work: &Work) -> Result<Vec<Added>> {
    add_to(writer, None, images, work)
}

/// Adds the images to a sharing domain; `None` is the default one.
///
/// # Errors
/// As for [`add`]; `NotFound` when there is no such domain.
pub fn add_to(writer: &mut Writer, domain: Option<&str>, images: &[NewImage], work: &Work) -> Result<Vec<Added>> {
    let added = add_all(writer, domain, images, true, work)?;
    added.iter().for_each(|added| make_read_only(&writer.library().image_path(&added.record)));
    Ok(added)
}

/// Does all the work of [`add_to`], says what would become of it, and changes nothing.
pub fn preview(writer: &mut Writer, domain: Option<&str>, images: &[NewImage], work: &Work) -> Result<Vec<Added>> {
    add_all(writer, domain, images, false, work)
}

fn add_all(
    writer: &mut Writer,
    domain: Option<&str>,
    images: &[NewImage],
    publish: bool,
    work: &Work,
) -> Result<Vec<Added>> {
    let catalog = writer.library().catalog();
    if domain.is_none() && catalog.public_domain() == Some(&catalog.domain) && catalog.domains.len() > 1 {
        let cause = format!("would be added to domain {}, which all may read", catalog.domain);
        return Err(Error::new(ErrorKind::Usage, "the image", cause).mend("say whose it is: --domain NAME"));
    }
    let domain = domain.unwrap_or(&catalog.domain).to_string();
    catalog.domain(&domain)?;
    let probes = check(writer.library(), images)?;
    let mut change = Change::begin(writer);
    let mut added = Vec::new();
    for (image, from) in images.iter().zip(&probes) {
        work.check_stop(&image.name)?;
        let id = change.next_id()?;
        let newcomer = Newcomer { name: &image.name, id, domain: &domain };
        let found = fingerprint_file(&mut change, &newcomer, from, work)?;
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

/// An image on its way into the library.
#[derive(Clone, Copy)]
pub(super) struct Newcomer<'a> {
    pub name: &'a str,
    pub id: ImageId,
    pub domain: &'a str,
}

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
            Rows::Log(log) => Box::new(log.rows(rows_in(work.memory), work.threads)),
        }
    }
}

/// The name of a log that is removed as soon as it is open.
const UNSEEN: &str = "public@rows";

/// Rows that may be in memory, twice: with the key of the image's domain, and with the public one.
fn rows_in(memory: u64) -> u64 {
    (memory / 8 / size_of::<Row>() as u64).max(1)
}

/// What a log of a scan belongs to: the file as it is, and how it is hashed.
fn identity(meta: &fs::Metadata, hashed: Hasher) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for n in [meta.dev(), meta.ino(), meta.len(), mtime_ns(meta).cast_unsigned()] {
        hasher.update(&n.to_le_bytes());
    }
    *hasher.update(&hashed.hash(b"scan")).finalize().as_bytes()
}

/// An image that was read, and is not in the library yet.
pub(super) struct Fingerprints {
    pub side: Side,
    pub rows: Rows,
    /// The same with the key of the public domain, if it has one and is not the image's own.
    pub public_rows: Option<Rows>,
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
    new: &Newcomer<'_>,
    from: &Probe,
    work: &Work,
) -> Result<Fingerprints> {
    let began = Instant::now();
    let (raw, made) = bring_in(&mut change.transaction, new, from, work)?;
    let convert_time = made.is_some().then(|| began.elapsed());
    let source = made.is_some().then(|| Source { format: from.format, path: from.path.clone() });
    let mut found = fingerprint(change, new, RawFile { raw, made, source }, work)?;
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
    new: &Newcomer<'_>,
    from: &Probe,
    work: &Work,
) -> Result<(PathBuf, Option<String>)> {
    let name = new.name;
    if from.format == Format::Raw {
        check_owner(change.library(), new.domain, &from.path)?;
        return Ok((from.path.clone(), None));
    }
    let goal = made_file(name, new.id);
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

/// Refuses a raw file that is an image of a stranger: they would share the page cache of all of it.
fn check_owner(library: &Library, domain: &str, path: &Path) -> Result<()> {
    let identity = |path: &Path| fs::metadata(path).map(|meta| (meta.dev(), meta.ino()));
    let own = identity(path).map_err(|e| Error::io(path, "look at it", e))?;
    let is_strange = |r: &&ImageRecord| !r.owned() && !library.catalog().may_read(domain, &r.domain);
    match library.images().iter().filter(is_strange).find(|r| identity(&r.path).is_ok_and(|found| found == own)) {
        None => Ok(()),
        Some(_) => Err(Error::file(ErrorKind::Usage, path, "is used in place by an image of another sharing domain")
            .mend("give a copy of the file")),
    }
}

/// Scans the raw file and makes the record of the image, but for the stamps of its files.
fn fingerprint(change: &Change<'_>, new: &Newcomer<'_>, place: RawFile, work: &Work) -> Result<Fingerprints> {
    let raw = place.raw.clone();
    let file = crate::library::open_regular(&raw)?;
    let meta = file.metadata().map_err(|e| Error::io(&raw, "look at it", e))?;
    settle_mtime(&meta);
    let data_bytes = scan::data_bytes(&file, &raw, meta.len())?;
    // What is redirected is read again, to be compared.
    let cold = open_cold(&file, &raw, meta.len())?.keep_for_now(data_bytes);
    let reading =
        Reading { change, name: new.name, file: &file, meta: &meta, cold: &cold, path: &raw, data_bytes, work };
    let began = Instant::now();
    let (scanned, rows) = reading.scan(change.hasher(new.domain)?, Some(&scan_log(new.name)))?;
    let public_rows = match public_hasher(change, new.domain)? {
        Some(hasher) => Some(reading.scan(hasher, None)?.1),
        None => None,
    };
    let hash_time = began.elapsed();
    let side = described(change.transaction.library(), new, place, file, &scanned)?;
    let chunks = scanned.chunks;
    Ok(Fingerprints {
        side,
        rows,
        public_rows,
        chunks,
        data_bytes,
        convert_time: None,
        hash_time,
        proved: None,
        _cold: cold,
    })
}

/// With what the blocks of an image are hashed once more, to be found in the public domain.
pub(super) fn public_hasher(change: &Change<'_>, domain: &str) -> Result<Option<Hasher>> {
    let hasher = change.public_domain_for(domain).map(|public| change.hasher(public)).transpose()?;
    Ok(hasher.filter(|hasher| *hasher != Hasher::Sha1))
}

/// A raw file that is read.
struct Reading<'a> {
    change: &'a Change<'a>,
    name: &'a str,
    file: &'a fs::File,
    meta: &'a fs::Metadata,
    cold: &'a Cold,
    path: &'a Path,
    data_bytes: u64,
    work: &'a Work<'a>,
}

impl Reading<'_> {
    /// Reads and hashes. The rows of a large image go to a log as they come: that of this name, or one that nobody else ever
    /// sees. (The public key makes images of all domains comparable, so nothing that was hashed with it is left behind.)
    fn scan(&self, hasher: Hasher, log: Option<&str>) -> Result<(scan::Scan, Rows)> {
        let Reading { data_bytes, work, .. } = *self;
        let is_large = data_bytes >= WORTH_A_LOG || data_bytes / BLOCK_SIZE > rows_in(work.memory);
        let path = self.change.transaction.scratch(log.unwrap_or(UNSEEN));
        let open = || {
            let opened = ScanLog::open(&path, &identity(self.meta, hasher))?;
            if log.is_none() {
                fs::remove_file(&path).map_err(|e| Error::io(&path, "remove it", e))?;
            }
            Ok(opened)
        };
        let log = is_large.then(open).transpose()?;
        work.observer.begin(&format!("hashing {}", self.name), data_bytes);
        let job = scan::Job {
            file: self.file,
            cold: self.cold,
            path: self.path,
            size: self.meta.len(),
            hasher,
            threads: work.threads,
            stop: work.stop,
            advance: &|bytes| work.observer.advance(bytes),
            log: log.as_ref(),
        };
        let mut scanned = scan::scan(&job)?;
        work.observer.end();
        let rows = std::mem::take(&mut scanned.rows);
        Ok((scanned, log.map_or(Rows::Memory(rows), Rows::Log)))
    }
}

/// The record of an image that was read, and its file, which is durable and unchanged since.
pub(super) fn described(
    library: &Library,
    new: &Newcomer<'_>,
    place: RawFile,
    file: fs::File,
    scanned: &scan::Scan,
) -> Result<Side> {
    let meta = file.metadata().map_err(|e| Error::io(&place.raw, "look at it", e))?;
    let record = ImageRecord {
        id: new.id,
        name: new.name.to_string(),
        generation: 1,
        source: place.source,
        path: place.made.map_or_else(|| place.raw.clone(), PathBuf::from),
        size: meta.len(),
        mtime_ns: mtime_ns(&meta),
        digest: scanned.digest,
        domain: new.domain.to_string(),
        blocks: blocks_in(meta.len()),
        nonzero_blocks: scanned.count,
        fingerprint: library.catalog().fingerprint,
        run: FileRef { file: run_file(new.name, new.id).into(), bytes: 0, crc32c: 0 },
        public_run: None,
        chunks: None,
    };
    let cold = open_cold(&file, &place.raw, record.size)?;
    let side = Side { file, path: place.raw, record, cold: Some(cold) };
    // The catalog will be durable, so what it describes must be: a power cut could leave a file that was just copied with
    // its size and time, but with holes for data.
    side.file.sync_all().map_err(|e| Error::io(&side.path, "make it durable", e))?;
    check_unchanged(&side)?;
    Ok(side)
}

/// Joins, compares, and stages run, chunks, map and index rows of an image. It is among the change's images afterwards.
pub(super) fn enter(change: &mut Change<'_>, found: Fingerprints, work: &Work) -> Result<Added> {
    let began = Instant::now();
    let Fingerprints { mut side, rows, public_rows, chunks, data_bytes, convert_time, hash_time, proved, _cold } =
        found;
    let (id, name, domain) = (side.record.id, side.record.name.clone(), side.record.domain.clone());
    change.open(&domain, work)?;
    side.record.chunks = Some(write_chunks(change, &side.record, &chunks)?);
    let known_path = change.transaction.scratch(&format!("{id}.known"));
    let mut files = Files::create(change, &side.record, &known_path, public_rows.is_some())?;

    let choose = change.choose();
    let scratch = change.transaction.scratch(&format!("{id}.pairs"));
    let placing = Placing {
        own: &side,
        images: &change.images,
        contents: change.contents(&domain)?,
        hasher: &|| change.hasher(&domain),
        choose: &choose,
        policy: change.policy,
        is_settled: false,
        is_proved: &|pair| proved.as_ref().is_some_and(|p| p.has(pair)),
        scratch: &scratch,
        work,
    };
    let lent = match (change.public_contents_for(&domain), public_rows) {
        (Some(contents), Some(rows)) => Lent::ByOtherHash(contents, rows.sorted(work)),
        (Some(contents), None) => Lent::BySameHash(contents),
        (None, _) => Lent::Nothing,
    };
    let placed = place(rows.sorted(work), lent, &placing, &mut files)?;
    let mut shares = expand(&files.shared, change.contents(&domain)?);
    if let Some(public) = change.public_contents_for(&domain) {
        shares.extend(expand(&files.shared_public, public));
        shares.sort_unstable();
    }
    let Files { run, run_path, known, public_run, .. } = files;
    let mut stamp = run.finish()?;
    let known_stamp = known.finish()?;
    if !placed.corrections.is_empty() {
        let right = change.transaction.scratch(&format!("{id}.run"));
        let meta = meta(change.transaction.library(), &side.record);
        stamp = correct_run(&run_path, stamp, &right, &meta, &placed.corrections)?;
        fs::rename(&right, &run_path).map_err(|e| Error::io(&run_path, "replace it", e))?;
    }
    side.record.run = file_ref(&side.record.run.file, stamp);
    side.record.public_run = None;
    if let Some((file, run)) = public_run {
        side.record.public_run = Some(file_ref(Path::new(&file), run.finish()?));
    }

    let map_path = change.stage_new_or_over(&map_file(&name))?;
    let reads_from = placed.targets.iter().map(|&id| ImageId(id)).filter(|i| *i != id).collect();
    let totals = write_map(change, &map_path, &side, placed)?;

    let known = Table::open(&known_path, known_stamp)?;
    let rows = run::Reader::open(&run_path, stamp)?;
    change.insert(&side.record, held(rows, known.scan()), work)?;
    fs::remove_file(&known_path).map_err(|e| Error::io(&known_path, "remove it", e))?;

    let record = side.record.clone();
    change.add(side, run_path);
    let map_time = began.elapsed();
    Ok(Added { record, totals, data_bytes, reads_from, shares, convert_time, hash_time, map_time })
}

fn file_ref(file: &Path, stamp: run::Stamp) -> FileRef {
    FileRef { file: file.to_path_buf(), bytes: stamp.bytes, crc32c: stamp.crc32c }
}

/// Writes the new image's files as its rows are settled.
struct Files {
    run: run::Writer,
    run_path: PathBuf,
    /// What the index knew of its hashes.
    known: TableWriter,
    /// Relative to the library.
    public_run: Option<(String, run::Writer)>,
    /// Blocks of the image by the set of images that hold their content; of its own domain, and of the public one.
    shared: HashMap<u32, u64>,
    shared_public: HashMap<u32, u64>,
}

impl Files {
    fn create(change: &mut Change<'_>, record: &ImageRecord, known: &Path, is_public_too: bool) -> Result<Files> {
        let run_path = change.stage_new_or_over(&record.run.file.display().to_string())?;
        let public = change.public_domain_for(&record.domain).map(str::to_string).filter(|_| is_public_too);
        let mut public_run = None;
        let had = record.public_run.as_ref().map(|run| run.file.display().to_string());
        if let (None, Some(had)) = (&public, &had) {
            change.transaction.remove(Path::new(had));
        }
        if let Some(domain) = public {
            let file = had.unwrap_or_else(|| public_run_file(&record.name, record.id));
            let path = change.stage_new_or_over(&file)?;
            let meta = run::Meta { domain: &domain, ..meta(change.transaction.library(), record) };
            public_run = Some((file, run::Writer::create(&path, &meta)?));
        }
        let library = change.transaction.library();
        Ok(Files {
            run: run::Writer::create(&run_path, &meta(library, record))?,
            run_path,
            known: TableWriter::create(known, library.catalog().uuid_bytes(), u64::from(record.id.0))?,
            public_run,
            shared: HashMap::new(),
            shared_public: HashMap::new(),
        })
    }
}

impl Sink for Files {
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

    /// Only what the public domain holds is kept: its key would make the runs of private domains comparable.
    fn lent(&mut self, rows: &[Row], known: &[index::Row]) -> Result<()> {
        let mut lookout = Lookout::new(known);
        let mut found = Vec::new();
        for row in rows {
            if let Some(set) = lookout.set_of(row) {
                *self.shared_public.entry(set).or_default() += 1;
                // Which content of its hash it is comes out by comparison, each time.
                found.push(Row { variant: 0, ..*row });
            }
        }
        match &mut self.public_run {
            Some((_, run)) => run.push(&found),
            None => Ok(()),
        }
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
    let mut bytes = chunks::encode(all);
    let hasher = change.hasher(&record.domain)?;
    hasher.veil(&file, chunks::secret(&mut bytes));
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
        // Two domains that hold the same image would have the same.
        digest: (record.fingerprint == Algorithm::Sha1).then_some(record.digest),
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
    let made = record.owned().then(|| record.path.display().to_string());
    let raw = change.transaction.library().image_path(record);
    let place = RawFile { raw, made, source: record.source.clone() };
    let newcomer = Newcomer { name: &record.name, id: record.id, domain: &record.domain };
    let mut found = fingerprint(change, &newcomer, place, work)?;
    let new = &mut found.side.record;
    new.generation = record.generation;
    // A renamed image's files keep the names that they have.
    new.run.file.clone_from(&record.run.file);
    new.chunks.clone_from(&record.chunks);
    new.public_run.clone_from(&record.public_run);
    Ok(found)
}
