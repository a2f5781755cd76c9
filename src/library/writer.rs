//! Changing a library: one writer at a time, and every change is there wholly or not at all.
//!
//! A [`Transaction`] writes its files in `staging/`. The commit then
//! 1. makes the staged files durable and writes the journal `staging/commit.json`, which lists where each will go,
//! 2. renames them into place, never over a file that is there already,
//! 3. replaces the catalog by rename: **this is the commit point**,
//! 4. removes the journal.
//!
//! New maps for old ([`Transaction::commit_maps`]) are rolled forward instead, for each map is right by itself, whatever
//! policy chose it: once the journal `staging/remap.json` is durable, **which is the commit point**, the maps are renamed
//! over the old ones, the catalog takes the policy, and the journal goes. The next writer does what is left of that.
//! Readers between the two see maps of both policies, and read the same bytes through either.
//!
//! Whoever dies before 3 leaves files that the catalog does not name. The next writer removes them: what the journal
//! lists and was moved, then everything in `staging/`, and never anything else.

use super::catalog::{Catalog, ImageRecord, Policy};
use super::{CATALOG, IMAGES, LOCK, Library, MAPS, RUNS, STAGING, check_name};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Algorithm;
use crate::io::file::sync_dir;
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind as IoKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Name of the journal in `staging/`.
const JOURNAL: &str = "commit.json";
/// The version of the journals that this code reads and writes.
const JOURNAL_VERSION: u32 = 1;
/// Name of the journal of new maps in `staging/`.
const REMAP: &str = "remap.json";

/// Which maps are replaced, and by whose choice.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RemapJournal {
    version: u32,
    policy: Policy,
    /// Names of the images.
    images: Vec<String>,
}

/// Where the staged files of a commit go.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Journal {
    version: u32,
    files: Vec<Move>,
}

/// One file of a commit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Move {
    /// Name in `staging/`.
    staged: String,
    /// Path relative to the library.
    to: String,
}

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
        Library::open(dir)?;
        let lock = take_lock(dir)?;
        let library = Library::open(dir)?;
        make_directories(dir)?;
        Ok(Writer { library: recover(library)?, _lock: lock })
    }

    /// The library as it is.
    pub fn library(&self) -> &Library {
        &self.library
    }

    /// Starts a change that adds files.
    pub fn begin(&mut self) -> Transaction<'_> {
        Transaction { writer: self, files: Vec::new() }
    }

    /// Changes the catalog alone.
    pub fn update(&mut self, change: impl FnOnce(&mut Catalog)) -> Result<()> {
        let mut catalog = self.library.catalog.clone();
        change(&mut catalog);
        save(&self.library.dir, &catalog)?;
        self.library.catalog = catalog;
        Ok(())
    }
}

/// A change in the making. Dropped without [`Transaction::commit`], it leaves nothing behind.
#[derive(Debug)]
pub struct Transaction<'w> {
    writer: &'w mut Writer,
    files: Vec<Move>,
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
        self.files.push(Move { staged, to: to.to_string() });
        Ok(path)
    }

    /// Says where to write the new map of an image until [`Transaction::commit_maps`].
    ///
    /// # Errors
    /// `NotFound` when there is no such image: only maps of this library are ever replaced.
    pub fn stage_map(&self, name: &str) -> Result<PathBuf> {
        self.library().image(name)?;
        Ok(self.staging().join(staged_map(name)))
    }

    /// Puts the maps that were staged for **all** images in place of those that are there, and gives the library the policy
    /// that chose them.
    ///
    /// # Errors
    /// Before the commit point nothing has changed. Behind it (a disk that fails between two renames) the next writer goes
    /// on; until then some maps are new, some are old, and all are right.
    pub fn commit_maps(self, policy: Policy) -> Result<()> {
        let staging = self.staging();
        let images: Vec<String> = self.library().images().iter().map(|r| r.name.clone()).collect();
        for name in &images {
            let path = staging.join(staged_map(name));
            File::open(&path).and_then(|f| f.sync_all()).map_err(|e| Error::io(&path, "make it durable", e))?;
        }
        let journal = RemapJournal { version: JOURNAL_VERSION, policy, images };
        write_journal(&staging, REMAP, &journal)?;
        // From here on `drop` would do the same.
        let mut library = self.library().clone();
        finish_remap(&mut library, &journal)?;
        self.writer.library = library;
        Ok(())
    }

    /// Where the file that will be `to` is until the commit.
    pub fn staged(&self, to: &Path) -> PathBuf {
        self.staging().join(to.file_name().unwrap_or_default())
    }

    /// Publishes the staged files and the records of the new images.
    pub fn commit(mut self, records: Vec<ImageRecord>) -> Result<()> {
        let mut catalog = self.library().catalog.clone();
        for record in records {
            catalog.next_id = catalog.next_id.max(record.id.0.saturating_add(1));
            catalog.images.push(record);
        }
        // From here on `drop` undoes whatever an error leaves half done.
        let files = std::mem::take(&mut self.files);
        self.move_in_place(&files)?;
        save(&self.library().dir, &catalog)?;
        self.writer.library.catalog = catalog;
        Ok(())
    }

    fn staging(&self) -> PathBuf {
        self.library().dir.join(STAGING)
    }

    fn move_in_place(&self, files: &[Move]) -> Result<()> {
        let staging = self.staging();
        for file in files {
            let path = staging.join(&file.staged);
            File::open(&path).and_then(|f| f.sync_all()).map_err(|e| Error::io(&path, "make it durable", e))?;
        }
        let journal = Journal { version: JOURNAL_VERSION, files: files.to_vec() };
        write_journal(&staging, JOURNAL, &journal)?;
        for file in files {
            rename_new(&staging.join(&file.staged), &self.library().dir.join(&file.to))?;
        }
        for place in [RUNS, MAPS, IMAGES, STAGING] {
            sync_dir(&self.library().dir.join(place))?;
        }
        Ok(())
    }
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        // Whether the change was committed is for the catalog on disk to say, not for this process.
        match Library::open(&self.writer.library.dir).and_then(recover) {
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
        if ![LOCK, RUNS, MAPS, IMAGES, STAGING, super::lease::LEASES, "lost+found"].iter().any(|known| name == *known) {
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
    let _ = file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id()));
    Ok(Lock(file))
}

/// The error that names the holder of the lock.
fn held(dir: &Path, file: &mut File) -> Error {
    let mut text = String::new();
    let _ = file.take(32).read_to_string(&mut text);
    let holder = match text.trim().parse::<u32>() {
        Ok(pid) => format!("process {pid}"),
        Err(_) => "another process".to_string(),
    };
    Error::file(ErrorKind::Busy, dir, format!("{holder} is changing this library")).mend("try again when it is done")
}

fn make_directories(dir: &Path) -> Result<()> {
    for place in [RUNS, MAPS, IMAGES, STAGING] {
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

fn write_journal(staging: &Path, name: &str, journal: &impl Serialize) -> Result<()> {
    let goal = staging.join(name);
    let text = serde_json::to_vec(journal).map_err(|e| Error::file(ErrorKind::Io, &goal, e))?;
    let temporary = staging.join(format!("{name}.new"));
    write_durably(&temporary, &text)?;
    fs::rename(&temporary, &goal).map_err(|e| Error::io(&goal, "write the journal", e))?;
    sync_dir(staging)
}

fn write_durably(path: &Path, text: &[u8]) -> Result<()> {
    let write = || {
        let mut file = File::create(path)?;
        file.write_all(text)?;
        file.sync_all()
    };
    write().map_err(|e| Error::io(path, "write", e))
}

/// Renames, but never over something that is there.
fn rename_new(from: &Path, to: &Path) -> Result<()> {
    let outcome = match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // File systems without this flag (some network ones) can at least link, which does not replace either.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            fs::hard_link(from, to).and_then(|()| fs::remove_file(from))
        }
        other => other.map_err(std::io::Error::from),
    };
    outcome.map_err(|e| match e.kind() {
        IoKind::AlreadyExists => in_the_way(to),
        _ => Error::io(to, "move it in place", e),
    })
}

fn in_the_way(path: &Path) -> Error {
    Error::file(ErrorKind::Exists, path, "is in the way and is not part of the library").mend("move it elsewhere")
}

/// Removes what the catalog does not name: files that the journal moved, then the journal, then the rest of `staging/`.
///
/// The order matters: the journal goes before the staged files, because "no longer in `staging/`" is how a moved file
/// is told from somebody else's file of that name.
///
/// Maps that were committed are put in place before all that. Returns the library as it is then.
fn recover(mut library: Library) -> Result<Library> {
    let staging = library.dir.join(STAGING);
    if let Some(journal) = read_remap(&staging.join(REMAP))? {
        finish_remap(&mut library, &journal)?;
    }
    if let Some(journal) = read_journal(&staging.join(JOURNAL))? {
        for file in &journal.files {
            undo(&library, &staging, file)?;
        }
        for place in [RUNS, MAPS, IMAGES] {
            sync_dir(&library.dir.join(place))?;
        }
        remove(&staging.join(JOURNAL))?;
        sync_dir(&staging)?;
    }
    let io = |e| Error::io(&staging, "list the directory", e);
    for entry in fs::read_dir(&staging).map_err(io)? {
        let entry = entry.map_err(io)?;
        if entry.file_type().map_err(io)?.is_dir() {
            log::warn!("{}: a directory that vmar did not make", entry.path().display());
        } else {
            remove(&entry.path())?;
        }
    }
    Ok(library)
}

/// Where the new map of an image is until it is put in place.
fn staged_map(name: &str) -> String {
    format!("{name}.map.new")
}

/// From the commit point of new maps to their end, or from wherever somebody died on that way.
fn finish_remap(library: &mut Library, journal: &RemapJournal) -> Result<()> {
    let staging = library.dir.join(STAGING);
    for name in &journal.images {
        let (from, to) = (staging.join(staged_map(name)), library.map_path(name));
        match fs::rename(&from, &to) {
            // Moved already. (A map that somebody removed since is missed by whoever needs it.)
            Err(e) if e.kind() == IoKind::NotFound => {}
            other => other.map_err(|e| Error::io(&to, "replace the block map", e))?,
        }
    }
    sync_dir(&library.dir.join(MAPS))?;
    sync_dir(&staging)?;
    let mut catalog = library.catalog.clone();
    catalog.set_policy(journal.policy);
    save(&library.dir, &catalog)?;
    library.catalog = catalog;
    remove(&staging.join(REMAP))?;
    sync_dir(&staging)
}

fn read_remap(path: &Path) -> Result<Option<RemapJournal>> {
    let Some(journal) = read_json::<RemapJournal>(path, |j| j.version)? else { return Ok(None) };
    match journal.images.iter().try_for_each(|name| check_name(name)) {
        Ok(()) => Ok(Some(journal)),
        Err(e) => Err(corrupt_journal(path, e)),
    }
}

fn corrupt_journal(path: &Path, cause: impl std::fmt::Display) -> Error {
    Error::file(ErrorKind::Corrupt, path, cause).mend("remove it if the files in the library are as you want them")
}

/// A journal of the kind `J`, if there is one.
fn read_json<J: for<'j> Deserialize<'j>>(path: &Path, version_of: impl Fn(&J) -> u32) -> Result<Option<J>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(e) if e.kind() == IoKind::NotFound => return Ok(None),
        Err(e) => return Err(Error::io(path, "read the journal", e)),
    };
    let journal: J = serde_json::from_slice(&text).map_err(|e| corrupt_journal(path, e))?;
    let version = version_of(&journal);
    if version > JOURNAL_VERSION {
        let cause = format!("journal format {version}, this vmar knows up to {JOURNAL_VERSION}");
        return Err(Error::file(ErrorKind::Unsupported, path, cause).mend("use a newer vmar"));
    }
    Ok(Some(journal))
}

fn read_journal(path: &Path) -> Result<Option<Journal>> {
    let Some(journal) = read_json::<Journal>(path, |j| j.version)? else { return Ok(None) };
    let is_ours = |file: &Move| {
        let place = file.to.split_once('/');
        place.is_some_and(|(dir, name)| [RUNS, MAPS, IMAGES].contains(&dir) && !name.contains('/') && name != "..")
            && !file.staged.contains('/')
    };
    if !journal.files.iter().all(is_ours) {
        return Err(corrupt_journal(path, "it names a file outside of the library"));
    }
    Ok(Some(journal))
}

/// Removes a file that was moved in place for a change that the catalog does not know.
fn undo(library: &Library, staging: &Path, file: &Move) -> Result<()> {
    let named = library.images().iter().any(|record| {
        let to = Path::new(&file.to);
        record.path == to || record.run.file == to || super::map_file(&record.name) == file.to
    });
    if named {
        return Ok(());
    }
    let goal = library.dir.join(&file.to);
    let inode = |path: &Path| path.symlink_metadata().ok().map(|m| (m.dev(), m.ino()));
    let staged = inode(&staging.join(&file.staged));
    // Still staged: what lies at the goal is somebody else's, unless it is a second link to the same file.
    if staged.is_none() || staged == inode(&goal) { remove(&goal) } else { Ok(()) }
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != IoKind::NotFound => Err(Error::io(path, "remove it", e)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
