//! Changing a library: one writer at a time, and every change is there wholly or not at all.
//!
//! A [`Transaction`] writes its files in `staging/` and then publishes them by a journal ([`super::journal`]). Whoever
//! dies before the journal is there leaves only what is in `staging/`, which the next writer removes; whoever dies
//! later leaves a commit that the next writer ends.

use super::catalog::{Catalog, ImageRecord, Policy};
use super::journal::{self, Journal, Move};
use super::lease::{LEASES, this_host};
use super::{CATALOG, IMAGES, INDEX, LOCK, Library, MAPS, OVERLAYS, RUNS, SCAN_LOG, STAGING, map_file};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Algorithm;
use crate::io::file::sync_dir;
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind as IoKind, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The one who may change a library: holds the lock until dropped.
#[derive(Debug)]
pub struct Writer {
    library: Library,
    _lock: Lock,
}

/// The writers' lock, held until dropped.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Closing would do, but for a child process that is being started: until it runs its program it has a copy of
        // every open file, and a copy keeps the lock.
        if let Err(e) = flock(&self.0, FlockOperation::Unlock) {
            log::warn!("the library's lock stays until this process ends: {e}");
        }
    }
}

impl Writer {
    /// Takes the lock of the library in `dir`, removes what an interrupted writer left, and reads the catalog.
    ///
    /// # Errors
    /// `Busy` at once, naming the holder, when another process holds the lock.
    pub fn open(dir: impl AsRef<Path>) -> Result<Writer> {
        let dir = dir.as_ref();
        Library::load(dir)?;
        let lock = take_lock(dir)?;
        make_directories(dir)?;
        Ok(Writer { library: recover(dir)?, _lock: lock })
    }

    /// The library as it is.
    pub fn library(&self) -> &Library {
        &self.library
    }

    /// Starts a change.
    pub fn begin(&mut self) -> Transaction<'_> {
        Transaction { writer: self, journal: Journal::default() }
    }

    /// Changes the catalog alone.
    pub fn update(&mut self, change: impl FnOnce(&mut Catalog)) -> Result<()> {
        let mut catalog = self.library.catalog.clone();
        change(&mut catalog);
        catalog.changed();
        save(&self.library.dir, &catalog)?;
        self.library.catalog = catalog;
        Ok(())
    }
}

/// A change in the making. Dropped without [`Transaction::commit`], it leaves nothing behind.
#[derive(Debug)]
pub struct Transaction<'w> {
    writer: &'w mut Writer,
    journal: Journal,
}

impl Transaction<'_> {
    /// The library as it is without this change.
    pub fn library(&self) -> &Library {
        &self.writer.library
    }

    /// Announces a new file that will be `to` (relative to the library) and says where to write it until then.
    ///
    /// # Errors
    /// `Exists` when there is a file of that name: it is not of this library's making and stays.
    pub fn stage(&mut self, to: &str) -> Result<PathBuf> {
        let goal = self.library().dir.join(to);
        if goal.symlink_metadata().is_ok() {
            return Err(in_the_way(&goal));
        }
        let staged = to.rsplit('/').next().unwrap_or(to).to_string();
        let path = self.staging().join(&staged);
        self.journal.new.push(Move { staged, to: to.to_string() });
        Ok(path)
    }

    /// Says where to write a file that will take the place of one that is this library's. Twice for one file: the same place.
    ///
    /// # Errors
    /// `NotFound` when the catalog knows no such file: nothing else is ever replaced.
    pub fn stage_over(&mut self, to: &str) -> Result<PathBuf> {
        let is_ours = |r: &ImageRecord| {
            let files = [Some(&r.run), r.chunks.as_ref()].into_iter().flatten().map(|f| f.file.as_path());
            map_file(&r.name) == to || files.into_iter().any(|f| f == Path::new(to))
        };
        if !self.library().images().iter().any(is_ours) {
            return Err(Error::new(ErrorKind::NotFound, to, "is not a file of this library"));
        }
        let staged = format!("{}.over", to.rsplit('/').next().unwrap_or(to));
        let path = self.staging().join(&staged);
        let file = Move { staged, to: to.to_string() };
        if !self.journal.replace.contains(&file) {
            self.journal.replace.push(file);
        }
        Ok(path)
    }

    /// A file that is of use until the change ends, and goes with it.
    pub fn scratch(&self, name: &str) -> PathBuf {
        self.staging().join(name)
    }

    /// This file (relative to the library) goes once the change is published.
    pub fn remove(&mut self, file: &Path) {
        self.journal.remove.push(file.display().to_string());
    }

    /// Where the file that will be `to` is until the commit.
    pub fn staged(&self, to: &Path) -> PathBuf {
        self.staging().join(to.file_name().unwrap_or_default())
    }

    /// Publishes what was staged and what `edit` makes of the catalog.
    ///
    /// # Errors
    /// Before the commit point nothing has changed. Behind it (a disk that fails between two renames) the next writer
    /// goes on.
    pub fn commit(mut self, edit: impl FnOnce(&mut Catalog)) -> Result<()> {
        let mut catalog = self.library().catalog.clone();
        edit(&mut catalog);
        catalog.changed();
        catalog.check().map_err(|e| Error::file(ErrorKind::Corrupt, &self.library().dir, e))?;
        let text = catalog.to_json().map_err(|e| Error::file(ErrorKind::Io, self.library().dir.join(CATALOG), e))?;
        let dir = self.library().dir.clone();
        // Whatever becomes of it, `drop` looks at what is there.
        std::mem::take(&mut self.journal).commit(&dir, &text)?;
        // The scans of images that are in the library now have served.
        for record in &catalog.images {
            remove(&self.staging().join(super::scan_log(&record.name)))?;
        }
        Ok(())
    }

    fn staging(&self) -> PathBuf {
        self.library().dir.join(STAGING)
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        // Whether the change was committed is for the journal and the catalog on disk to say, not for this process.
        match recover(&self.writer.library.dir) {
            Ok(library) => self.writer.library = library,
            Err(err) => log::warn!("the next writer will clean up: {err}"),
        }
    }
}

/// Makes an empty library: the catalog comes last, and with it the directory is a library.
pub(super) fn init(dir: &Path, policy: Policy, fingerprint: Algorithm) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, "make the directory", e))?;
    check_empty(dir)?;
    let _lock = take_lock(dir)?;
    check_empty(dir)?;
    make_directories(dir)?;
    let catalog = Catalog::new(policy, fingerprint).map_err(|e| Error::io("/dev/urandom", "read", e))?;
    save(dir, &catalog)
}

/// Refuses a directory that holds anything but what an interrupted `init` left.
fn check_empty(dir: &Path) -> Result<()> {
    let io = |e| Error::io(dir, "list the directory", e);
    for entry in fs::read_dir(dir).map_err(io)? {
        let name = entry.map_err(io)?.file_name();
        if name == CATALOG {
            return Err(
                Error::file(ErrorKind::Exists, dir, "is a vmar library already").mend("use it, or name another")
            );
        }
        if ![LOCK, RUNS, MAPS, IMAGES, INDEX, STAGING, LEASES, OVERLAYS, "lost+found"]
            .iter()
            .any(|known| name == *known)
        {
            return Err(Error::file(ErrorKind::Exists, dir, "is not empty").mend("name a new or an empty directory"));
        }
    }
    Ok(())
}

fn take_lock(dir: &Path) -> Result<Lock> {
    let path = dir.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|e| Error::io(&path, "open the lock", e))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Err(held(dir, &mut file)),
        Err(e) => return Err(Error::io(&path, "lock it", e.into())),
    }
    // Only for the message of the next one who comes: that this fails (a full disk) is no reason to stop.
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{} {}", std::process::id(), this_host()));
    Ok(Lock(file))
}

/// The error that names the holder of the lock.
fn held(dir: &Path, file: &mut File) -> Error {
    let mut text = String::new();
    let _ = file.take(300).read_to_string(&mut text);
    let holder = match text.trim().split_once(' ') {
        Some((pid, host)) if pid.parse::<u32>().is_ok() => format!("process {pid} on {host}"),
        _ => "another process".to_string(),
    };
    Error::file(ErrorKind::Busy, dir, format!("{holder} is changing this library")).mend("try again when it is done")
}

fn make_directories(dir: &Path) -> Result<()> {
    for place in [RUNS, MAPS, IMAGES, INDEX, STAGING] {
        let path = dir.join(place);
        match fs::create_dir(&path) {
            Err(e) if e.kind() != IoKind::AlreadyExists => return Err(Error::io(&path, "make the directory", e)),
            _ => {}
        }
    }
    Ok(())
}

/// Replaces the catalog: written in `staging/`, made durable, renamed.
fn save(dir: &Path, catalog: &Catalog) -> Result<()> {
    let text = catalog.to_json().map_err(|e| Error::file(ErrorKind::Io, dir.join(CATALOG), e))?;
    let temporary = dir.join(STAGING).join(CATALOG);
    write_durably(&temporary, &text)?;
    let goal = dir.join(CATALOG);
    fs::rename(&temporary, &goal).map_err(|e| Error::io(&goal, "replace the catalog", e))?;
    sync_dir(dir)
}

pub(super) fn write_durably(path: &Path, text: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(text)?;
        file.sync_all()
    };
    write().map_err(|e| Error::io(path, "write", e))
}

pub(super) fn in_the_way(path: &Path) -> Error {
    Error::file(ErrorKind::Exists, path, "is in the way and is not part of the library").mend("move it elsewhere")
}

/// Ends what an interrupted writer began, and removes what it left. Returns the library as it is then.
fn recover(dir: &Path) -> Result<Library> {
    if let Some(journal) = Journal::read(dir)? {
        journal.carry_out(dir)?;
    }
    let staging = dir.join(STAGING);
    let io = |e| Error::io(&staging, "list the directory", e);
    for entry in fs::read_dir(&staging).map_err(io)? {
        let entry = entry.map_err(io)?;
        if is_young_log(&entry) {
            continue;
        }
        if entry.file_type().map_err(io)?.is_dir() {
            log::warn!("{}: a directory that vmar did not make", entry.path().display());
        } else {
            remove(&entry.path())?;
        }
    }
    Library::load(dir)
}

/// True for the log of a scan that somebody may still go on with.
fn is_young_log(entry: &fs::DirEntry) -> bool {
    const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);
    let age = entry.metadata().and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
    entry.file_name().to_string_lossy().ends_with(SCAN_LOG) && age.is_none_or(|age| age < KEPT)
}

/// Waits until no change is half published: its writer ends it, or is dead, and then this process does. Whoever may not
/// write into the library, or waits in vain, goes on as it is.
pub(super) fn settle(dir: &Path) {
    const PAUSE: Duration = Duration::from_millis(10);
    const TRIES: u32 = 500;
    for _ in 0..TRIES {
        if !journal::is_there(dir) {
            return;
        }
        match take_lock(dir) {
            // The journal alone: what else is in `staging/` may be a writer's that comes to the lock just now.
            Ok(_lock) => match Journal::read(dir).and_then(|j| j.map_or(Ok(()), |j| j.carry_out(dir))) {
                Ok(()) => return,
                Err(e) => return log::warn!("a change of the library was not published wholly: {e}"),
            },
            Err(e) if e.kind() == ErrorKind::Busy => std::thread::sleep(PAUSE),
            Err(e) => {
                return log::info!("a change of the library is half published, and not for this process to end: {e}");
            }
        }
    }
}

pub(super) fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != IoKind::NotFound => Err(Error::io(path, "remove it", e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
