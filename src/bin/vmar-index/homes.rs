//! From the engine's rows to block maps: `vmar-index run`.
//!
//! The rows come in order of (rank, block), the images in the order of the policy, so that canonical addresses are always
//! behind. They are collected image by image, and go to a file of canonical addresses on the way, by which the policy
//! looks up what the blocks of other images hold. Memory is that of one image.

use super::preference::preference;
use super::session::Engine;
use super::sql::HOMES;
use super::{engine_error, tables};
use datafusion::arrow::array::{Array, Int64Array, RecordBatch};
use datafusion::common::DataFusionError;
use futures::StreamExt;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;
use vmar::indexer::offline::{Address, Canonical, Offline, in_order};
use vmar::library::{ImageRecord, Library, Policy};
use vmar::map::Totals;
use vmar::units::{human_bytes, to_usize};
use vmar::{Error, ErrorKind, Result};

/// How often a job is given to a cluster before it counts as failed. The cluster itself repeats what a lost executor did,
/// but not the sending of a result that was lost with it; and of a stage that it took back it can make an answer
/// that is wrong (seen with Ballista 55), which [`Offline`] notices.
const ATTEMPTS: u32 = 3;
/// Bytes of an address in the file.
const ADDRESS_BYTES: u64 = 8;
/// Addresses that are written to the file at a time.
const BUFFER: usize = 1 << 16;

/// Writes `OUT/NAME.map` for all images of the library: all of them, or none. Returns what there is to say of them.
pub async fn run(library: &Library, engine: &Engine, policy: Policy, out: &Path) -> Result<String> {
    let began = Instant::now();
    check_domains(library)?;
    let mut out = Out::open(out, library)?;
    for images in tables::domains(library) {
        tables::check(library, &images)?;
        let mut attempt = 1;
        while let Err(err) = map_domain(library, engine, policy, &images, &mut out).await {
            // What is wrong in this process stays wrong; what becomes of a cluster is another matter the next time.
            let is_of_cluster = engine.cluster.is_some() && matches!(err.kind(), ErrorKind::Io | ErrorKind::Corrupt);
            if !is_of_cluster || attempt == ATTEMPTS {
                return Err(err);
            }
            eprintln!("{err}: once more ({attempt} of {} times)", ATTEMPTS - 1);
            attempt += 1;
        }
    }
    let mut lines = out.publish()?;
    let rows: u64 = library.images().iter().map(|r| r.nonzero_blocks).sum();
    let seconds = began.elapsed().as_secs_f64();
    lines.push(format!("policy {policy}: {} maps of {rows} blocks in {seconds:.1} s", library.images().len()));
    Ok(lines.join("\n"))
}

/// What a private image finds in the public domain is not in its run: only `vmar` itself can make its map.
fn check_domains(library: &Library) -> Result<()> {
    let Some(public) = library.catalog().public_domain() else { return Ok(()) };
    match library.images().iter().find(|r| r.domain != public) {
        None => Ok(()),
        Some(record) => {
            let cause =
                "is of a private sharing domain beside the public one, in which it is looked up by other fingerprints";
            Err(Error::new(ErrorKind::Unsupported, format!("image {}", record.name), cause)
                .mend("make the maps of this library with 'vmar library remap'"))
        }
    }
}

/// One statement, and a map for each of these images.
async fn map_domain(
    library: &Library,
    engine: &Engine,
    policy: Policy,
    images: &[&ImageRecord],
    out: &mut Out,
) -> Result<()> {
    let failed = |e: DataFusionError| engine_error(engine.name(), e);
    let preference = preference(library, engine, policy, images).await?;
    let images = in_order(images.iter().copied(), policy, &preference);
    let ctx = engine.session().await?;
    tables::register(&ctx, library, &images).await?;
    let frame = ctx.sql(HOMES).await.map_err(failed)?;
    let mut rows = frame.execute_stream().await.map_err(failed)?;
    let homes = Homes::new(&images, &out.dir)?;
    let mut maker = Maker { policy, images: &images, next: 0, open: None, homes, out };
    while let Some(batch) = rows.next().await {
        maker.take(&batch.map_err(failed)?)?;
    }
    maker.finish()
}

/// Makes the maps of a domain, one after the other.
struct Maker<'a> {
    policy: Policy,
    /// In the order of the policy, which the rows follow.
    images: &'a [&'a ImageRecord],
    /// The first image that has no map and no row yet.
    next: usize,
    /// The image whose rows come, and its rank.
    open: Option<(u32, Offline<'a>)>,
    homes: Homes,
    out: &'a mut Out,
}

impl Maker<'_> {
    /// A batch of (rank, block, home rank, home block).
    fn take(&mut self, batch: &RecordBatch) -> Result<()> {
        let [rank, block, home_rank, home_block] = numbers(batch)?;
        for i in 0..batch.num_rows() {
            let address = address(rank.value(i), block.value(i))?;
            let home = self::address(home_rank.value(i), home_block.value(i))?;
            self.row(address, home)?;
        }
        Ok(())
    }

    fn row(&mut self, address: Address, home: Address) -> Result<()> {
        while self.open.as_ref().is_none_or(|(rank, _)| *rank != address.rank) {
            self.close()?;
            self.open_next()?;
        }
        let Some((_, map)) = &mut self.open else { return Ok(()) };
        map.push(address.block, home)?;
        self.homes.push(address, home)
    }

    /// Opens the next image, which need not be the one of that address: an image may be all zeros.
    fn open_next(&mut self) -> Result<()> {
        let images = self.images.get(..=self.next).unwrap_or(&[]);
        let (Some(map), Ok(rank)) = (Offline::new(images), u32::try_from(self.next)) else {
            return Err(wrong("it has blocks of an image too late, or of no image"));
        };
        self.open = Some((rank, map));
        self.next += 1;
        Ok(())
    }

    /// Makes the map of the image that is open.
    fn close(&mut self) -> Result<()> {
        let Some((rank, map)) = self.open.take() else { return Ok(()) };
        self.homes.flush()?;
        let (bytes, totals) = map.finish(self.policy, &mut self.homes)?;
        self.images.get(rank as usize).map_or(Ok(()), |record| self.out.write(&record.name, &bytes, totals))
    }

    fn finish(mut self) -> Result<()> {
        self.close()?;
        while self.next < self.images.len() {
            self.open_next()?;
            self.close()?;
        }
        Ok(())
    }
}

fn address(rank: i64, block: i64) -> Result<Address> {
    match (u32::try_from(rank), u32::try_from(block)) {
        (Ok(rank), Ok(block)) => Ok(Address { rank, block }),
        _ => Err(wrong("there is no such block")),
    }
}

/// The columns of an answer, which are as many and all numbers.
pub fn numbers<const N: usize>(batch: &RecordBatch) -> Result<[&Int64Array; N]> {
    let numbers = batch.columns().iter().map(|c| c.as_any().downcast_ref().filter(|c: &&Int64Array| !c.is_nullable()));
    let columns: Option<Vec<&Int64Array>> = numbers.collect();
    columns.and_then(|c| c.try_into().ok()).ok_or_else(|| wrong("its columns are others"))
}

/// The engine gave an answer that cannot be.
pub fn wrong(cause: &str) -> Error {
    Error::new(ErrorKind::Corrupt, "canonical addresses", format!("the answer of the engine is wrong: {cause}"))
        .mend("run it again; 'vmar library remap' needs no engine")
}

/// The canonical addresses of the images so far, in a file without a name: 8 bytes a block, images one after the other.
/// Stored inverted, so that a hole is no address.
struct Homes {
    file: File,
    path: PathBuf,
    /// First block in the file and blocks of each image, by rank.
    places: Vec<(u64, u64)>,
    /// Not yet in the file: where they begin, and what they are.
    buffer_at: u64,
    buffer: Vec<u8>,
}

impl Homes {
    fn new(images: &[&ImageRecord], dir: &Path) -> Result<Homes> {
        let path = dir.join(".homes");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(|e| Error::io(&path, "create it", e))?;
        // Nobody else needs it, and after a kill it is gone.
        fs::remove_file(&path).map_err(|e| Error::io(&path, "remove", e))?;
        let mut end = 0;
        let place = |record: &&ImageRecord| {
            let first = end;
            end += record.blocks;
            (first, record.blocks)
        };
        let places = images.iter().map(place).collect();
        Ok(Homes { file, path, places, buffer_at: 0, buffer: Vec::new() })
    }

    /// First block in the file and blocks of an image.
    fn place(&self, rank: u32) -> (u64, u64) {
        self.places.get(rank as usize).copied().unwrap_or_default()
    }

    /// Takes down one address. The block has passed [`Offline::push`], so it is one of its image.
    fn push(&mut self, address: Address, home: Address) -> Result<()> {
        let at = (self.place(address.rank).0 + u64::from(address.block)) * ADDRESS_BYTES;
        if self.buffer_at + self.buffer.len() as u64 != at || self.buffer.len() >= BUFFER {
            self.flush()?;
            self.buffer_at = at;
        }
        let packed = u64::from(home.rank) << 32 | u64::from(home.block);
        self.buffer.extend_from_slice(&(!packed).to_le_bytes());
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let written = self.file.write_all_at(&self.buffer, self.buffer_at);
        self.buffer.clear();
        written.map_err(|e| Error::io(&self.path, "write", e))
    }
}

impl Canonical for Homes {
    fn of(&mut self, rank: u32, first: u32, count: u32) -> Result<Vec<Option<Address>>> {
        let (start, blocks) = self.place(rank);
        let there = blocks.saturating_sub(first.into()).min(count.into());
        let mut bytes = vec![0u8; to_usize(there * ADDRESS_BYTES)];
        let mut filled = 0;
        // A file that ends early ends in zeros: nothing was ever written behind its end.
        while let Some(rest) = bytes.get_mut(filled..).filter(|rest| !rest.is_empty()) {
            let at = (start + u64::from(first)) * ADDRESS_BYTES + filled as u64;
            match self.file.read_at(rest, at) {
                Ok(0) => break,
                Ok(n) => filled += n,
                Err(e) => return Err(Error::io(&self.path, "read", e)),
            }
        }
        let (words, _) = bytes.as_chunks::<8>();
        let unpack = |word: &[u8; 8]| {
            let packed = !u64::from_le_bytes(*word);
            let half = |n: u64| u32::try_from(n & u64::from(u32::MAX)).unwrap_or(u32::MAX);
            (packed != u64::MAX).then(|| Address { rank: half(packed >> 32), block: half(packed) })
        };
        let mut out: Vec<Option<Address>> = words.iter().map(unpack).collect();
        out.resize(to_usize(count.into()), None);
        Ok(out)
    }
}

/// The directory of the maps. They get their names when all of them are there.
struct Out {
    dir: PathBuf,
    lines: Vec<(String, String)>,
}

impl Out {
    fn open(dir: &Path, library: &Library) -> Result<Out> {
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, "create it", e))?;
        let real = |path: &Path| path.canonicalize().map_err(|e| Error::io(path, "look at it", e));
        if real(dir)?.starts_with(real(library.dir())?) {
            return Err(Error::file(ErrorKind::Usage, dir, "is inside the library, whose writers would not know")
                .mend("name a directory elsewhere"));
        }
        Ok(Out { dir: dir.to_path_buf(), lines: Vec::new() })
    }

    fn staged(&self, name: &str) -> PathBuf {
        self.dir.join(format!(".{name}.map.new"))
    }

    fn write(&mut self, name: &str, bytes: &[u8], totals: Totals) -> Result<()> {
        let path = self.staged(name);
        fs::write(&path, bytes).map_err(|e| Error::io(&path, "write", e))?;
        let Totals { nonzero_blocks, redirected_blocks, entries, map_bytes, .. } = totals;
        let size = human_bytes(map_bytes);
        let line = format!("{redirected_blocks} of {nonzero_blocks} blocks redirected; {entries} entries, map {size}");
        // A second attempt makes some of them again.
        self.lines.retain(|(other, _)| other != name);
        self.lines.push((name.to_string(), line));
        Ok(())
    }

    fn publish(self) -> Result<Vec<String>> {
        for (name, _) in &self.lines {
            let (from, to) = (self.staged(name), self.dir.join(format!("{name}.map")));
            fs::rename(&from, &to).map_err(|e| Error::io(&to, "move it in place", e))?;
        }
        Ok(self.lines.iter().map(|(name, line)| format!("{name}: {line}")).collect())
    }
}
