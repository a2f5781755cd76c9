//! The library: a directory that names images and keeps what vmar knows of each.
//!
//! ```text
//! DIR/library.json             the catalog: one record an image (see `catalog`)
//! DIR/lock                     held (flock) by the one writer; holds its host and pid
//! DIR/runs/NAME.ID.parquet     fingerprints of an image, immutable (see `fingerprint::run`)
//! DIR/runs/NAME.ID.chunks      the chunks of its content digest (see `fingerprint::chunks`)
//! DIR/maps/NAME.map            the block map of an image (see FORMAT.md)
//! DIR/index/N.table, N.sets    which images hold which contents (see `index`)
//! DIR/images/NAME.ID.raw       only images that vmar made; raw images stay where they are
//! DIR/overlays/                which overlays were made on which images
//! DIR/leases/*.json            who reads which images at present (see `lease`)
//! DIR/staging/                 everything is written here first; what an interrupted writer left is removed
//! DIR/verify/NAME              how far an interrupted 'image verify --resume' has come; may be removed at any time
//! ```
//!
//! Readers take no lock: the catalog and the maps are only ever replaced by rename, and all else never changes. A directory
//! may be copied or moved: everything inside it is named relative to it, raw images by absolute path.
//!
//! An image that is updated gets a new ID; the content that it had goes with its ID, or stays as the image `NAME@N` if
//! overlays were made on it.

mod catalog;
mod journal;
pub mod lease;
mod name;
mod overlays;
mod writer;

pub use catalog::{Catalog, FileRef, ImageRecord, IndexRef, Policy, Removed, Runs, Source, TableRef};
pub use lease::{Lease, LeaseInfo, LeaseTarget, Live};
pub use name::{check_name, kept_name};
pub use writer::{Transaction, Writer};

use crate::error::{Error, ErrorKind, Result};
use crate::units::ImageId;
use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// File name of the catalog.
const CATALOG: &str = "library.json";
/// File name of the writers' lock.
const LOCK: &str = "lock";
/// Fingerprint runs.
const RUNS: &str = "runs";
/// Block maps.
const MAPS: &str = "maps";
/// Converted images.
const IMAGES: &str = "images";
/// Content indexes.
const INDEX: &str = "index";
/// Overlays that were made on images.
const OVERLAYS: &str = "overlays";
/// How logs of scans end.
const SCAN_LOG: &str = ".scan";
/// Files on their way to one of the others.
const STAGING: &str = "staging";

/// A library as it was when it was opened: a snapshot of its catalog. Open it again to see later changes.
#[derive(Clone, Debug)]
pub struct Library {
    dir: PathBuf,
    catalog: Catalog,
}

impl Library {
    /// Reads the catalog of the library in `dir`. If a writer was killed while it published a change, that is ended first, as
    /// far as this process may; one that is at it is waited for.
    ///
    /// # Errors
    /// `NotFound` when there is no library, `Unsupported` when a newer vmar wrote it, `Corrupt` when the catalog
    /// contradicts itself.
    pub fn open(dir: impl AsRef<Path>) -> Result<Library> {
        let dir = dir.as_ref();
        writer::settle(dir);
        Library::load(dir)
    }

    /// Reads the catalog as it is.
    fn load(dir: &Path) -> Result<Library> {
        Ok(Library { dir: dir.to_path_buf(), catalog: Catalog::load(&dir.join(CATALOG))? })
    }

    /// Opens the library and runs `look`, once more each time that it fails while a writer publishes a change: a reader
    /// in the middle of that can see a new map and the old catalog, or miss a file that is gone.
    pub fn consistently<T>(dir: impl AsRef<Path>, mut look: impl FnMut(&Library) -> Result<T>) -> Result<T> {
        const PAUSE: Duration = Duration::from_millis(20);
        const TRIES: u32 = 100;
        let dir = dir.as_ref();
        let mut library = Library::open(dir)?;
        for _ in 0..TRIES {
            let err = match look(&library) {
                Ok(done) => return Ok(done),
                Err(err) => err,
            };
            std::thread::sleep(PAUSE);
            let now = Library::open(dir)?;
            if now.catalog == library.catalog {
                return Err(err);
            }
            library = now;
        }
        look(&library)
    }

    /// Makes an empty library in `dir`, which is created if it is not there and must otherwise be empty.
    pub fn init(dir: impl AsRef<Path>, policy: Policy, fingerprint: crate::fingerprint::Algorithm) -> Result<Library> {
        writer::init(dir.as_ref(), policy, fingerprint)?;
        Library::open(dir)
    }

    /// The library's directory, as it was named when it was opened.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the catalog says.
    pub fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// All images, in order of ID.
    pub fn images(&self) -> &[ImageRecord] {
        &self.catalog.images
    }

    /// The image of that name.
    pub fn image(&self, name: &str) -> Result<&ImageRecord> {
        self.images().iter().find(|r| r.name == name).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, name, format!("no such image in library {}", self.dir.display()))
                .mend("'vmar image list' shows the names")
        })
    }

    /// The image of that name, or the older generation of it that has this content: a VM that was made before an update
    /// goes on with what it was made on.
    pub fn image_with(&self, name: &str, digest: Option<&[u8; 32]>) -> Result<&ImageRecord> {
        let is_older = |r: &&ImageRecord| {
            r.name.strip_prefix(name).is_some_and(|rest| rest.starts_with('@')) && Some(&r.digest) == digest
        };
        match self.image(name) {
            Ok(found) if digest.is_none_or(|d| found.digest == *d) => Ok(found),
            current => self.images().iter().find(is_older).map_or(current, Ok),
        }
    }

    /// The image of that ID.
    pub fn image_by_id(&self, id: ImageId) -> Result<&ImageRecord> {
        let found = self.images().binary_search_by_key(&id, |r| r.id).ok().and_then(|at| self.images().get(at));
        found.ok_or_else(|| {
            let cause = format!("library {} has no image with this ID", self.dir.display());
            Error::new(ErrorKind::NotFound, format!("image {id}"), cause)
        })
    }

    /// The raw file that holds the image's bytes.
    pub fn image_path(&self, record: &ImageRecord) -> PathBuf {
        // `join` with an absolute path is that path.
        self.dir.join(&record.path)
    }

    /// The block map of the image of that name.
    pub fn map_path(&self, name: &str) -> PathBuf {
        self.dir.join(map_file(name))
    }

    /// The fingerprint run of the image.
    pub fn run_path(&self, record: &ImageRecord) -> PathBuf {
        self.dir.join(&record.run.file)
    }

    /// Opens the image's raw file for reading, if it still is what was fingerprinted.
    ///
    /// # Errors
    /// `NotFound` when the file vanished; `Changed` when its size or its modification time differ from the catalog.
    /// The size and the time are hints that cost nothing; `vmar image verify` looks at the bytes.
    pub fn open_image(&self, record: &ImageRecord) -> Result<File> {
        let path = self.image_path(record);
        let file = self.open_any(record)?;
        let meta = file.metadata().map_err(|e| Error::io(&path, "look at it", e))?;
        self.check_identity(record, &meta)?;
        Ok(file)
    }

    /// Opens the image's raw file whatever its size and modification time: for whoever looks at its bytes.
    pub fn open_any(&self, record: &ImageRecord) -> Result<File> {
        let path = self.image_path(record);
        open_regular(&path).map_err(|err| match err.kind() {
            ErrorKind::NotFound => {
                let cause = format!("the raw file of image {} has vanished", record.name);
                Error::file(ErrorKind::NotFound, &path, cause).mend("put it back where it was")
            }
            _ => err,
        })
    }

    /// What has become of the image's raw file, as far as one look (`stat`) tells.
    pub fn state(&self, record: &ImageRecord) -> State {
        match std::fs::metadata(self.image_path(record)) {
            Err(_) => State::Missing,
            Ok(meta) if meta.is_file() && self.check_identity(record, &meta).is_ok() => State::Ok,
            Ok(_) => State::Changed,
        }
    }

    /// Refuses a file whose size or modification time are not those of the record.
    pub fn check_identity(&self, record: &ImageRecord, meta: &Metadata) -> Result<()> {
        let changed = |cause: String, mend: String| {
            Err(Error::file(ErrorKind::Changed, self.image_path(record), cause).mend(mend))
        };
        let name = &record.name;
        if meta.len() != record.size {
            return changed(
                format!("image {name} has {} bytes, but {} when it was added", meta.len(), record.size),
                format!("put the original back ('vmar image verify {name}' then checks its bytes)"),
            );
        }
        if mtime_ns(meta) != record.mtime_ns {
            return changed(
                format!("image {name} has another modification time than when it was added"),
                format!("run 'vmar image verify {name}': it accepts the file if its bytes are the same"),
            );
        }
        Ok(())
    }
}

/// What a look at an image's file, without reading it, says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Size and modification time are those of the catalog.
    Ok,
    /// One of them is not, or it is no file any more: servers refuse it until 'vmar image verify' has read it.
    Changed,
    /// There is no such file, or it cannot be looked at.
    Missing,
}

impl State {
    /// As it is printed.
    pub fn name(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Changed => "changed",
            State::Missing => "missing",
        }
    }
}

/// Opens a regular file for reading. A FIFO or a device of that name is refused before it can block or have effects.
pub fn open_regular(path: &Path) -> Result<File> {
    let meta = std::fs::metadata(path).map_err(|e| Error::io(path, "open it", e))?;
    if !meta.is_file() {
        return Err(Error::file(ErrorKind::Unsupported, path, "not a regular file").mend("put the file back"));
    }
    File::open(path).map_err(|e| Error::io(path, "open it", e))
}

/// Modification time in nanoseconds since 1970, as the catalog keeps it.
pub fn mtime_ns(meta: &Metadata) -> i64 {
    meta.mtime().saturating_mul(1_000_000_000).saturating_add(meta.mtime_nsec())
}

/// Waits until whoever writes to the file from now on must leave another modification time than `meta` has.
///
/// File systems stamp with the time of the last clock tick (up to 10 ms), old ones with whole seconds or two. A second
/// write within that grain leaves no trace in the time: a reader that began between the two would take the file for
/// unchanged. A time in the future needs no wait: any write sets it back to now.
pub fn settle_mtime(meta: &Metadata) {
    let grain = if meta.mtime_nsec() == 0 { Duration::from_secs(2) } else { Duration::from_millis(20) };
    if let Ok(age) =
        meta.modified().and_then(|time| SystemTime::now().duration_since(time).map_err(std::io::Error::other))
        && age < grain
    {
        std::thread::sleep(grain - age);
    }
}

/// Where the map of an image goes, relative to the library.
pub fn map_file(name: &str) -> String {
    format!("{MAPS}/{name}.map")
}

/// Where the fingerprints of an image go, relative to the library.
pub fn run_file(name: &str, id: ImageId) -> String {
    format!("{RUNS}/{name}.{id}.parquet")
}

/// Where the chunks of an image's digest go, relative to the library.
pub fn chunks_file(name: &str, id: ImageId) -> String {
    format!("{RUNS}/{name}.{id}.chunks")
}

/// Where an image that vmar makes goes, relative to the library.
pub fn made_file(name: &str, id: ImageId) -> String {
    format!("{IMAGES}/{name}.{id}.raw")
}

/// How the log of the scan of a large image is called in `staging/`, where it stays for a while if the scan does not end.
pub fn scan_log(name: &str) -> String {
    format!("{name}{SCAN_LOG}")
}

/// Where a file of a content index goes, relative to the library.
pub fn index_file(id: u64, kind: &str) -> String {
    format!("{INDEX}/{id}.{kind}")
}

#[cfg(test)]
mod tests;
