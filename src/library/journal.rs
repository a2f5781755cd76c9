//! The journal of a commit: `staging/commit.json`, and how it is carried out.
//!
//! A commit is new files, new maps in place of old ones, a new catalog, and files that are not needed any more. All
//! that is new lies in `staging/`, durable, before the journal does, and **the journal is the commit point**. From
//! there on it is carried out by whoever comes, as often as it takes:
//!
//! 1. new files are moved to their places, never over a file that is there. If one is, and that can only be somebody
//!    else's, the files that were moved are removed again, the journal too, and nothing has changed;
//! 2. maps are moved over the old ones;
//! 3. the catalog is replaced;
//! 4. files that the new catalog does not name are removed, then the journal.
//!
//! A reader that comes in the middle waits, or ends what a dead writer began ([`super::Library::open`]). One that came just
//! before can see the new map of an image with the old catalog; it looks again ([`super::Library::consistently`]).

use super::writer::{in_the_way, remove, write_durably};
use super::{CATALOG, IMAGES, INDEX, MAPS, RUNS, STAGING};
use crate::error::{Error, ErrorKind, Result};
use crate::io::file::sync_dir;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::ErrorKind as IoKind;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// Its name in `staging/`.
const JOURNAL: &str = "commit.json";
/// The catalog that will be, in `staging/`.
const NEW_CATALOG: &str = "catalog.new";
/// The version that this code writes and carries out.
const VERSION: u32 = 2;
/// Directories that a commit moves files into.
const PLACES: [&str; 4] = [RUNS, MAPS, IMAGES, INDEX];

/// What a commit does.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Journal {
    version: u32,
    /// New files.
    pub new: Vec<Move>,
    /// Files that are moved over those of their names, if there are any.
    pub replace: Vec<Move>,
    /// Files that go, relative to the library.
    pub remove: Vec<String>,
}

/// One file of a commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Move {
    /// Name in `staging/`.
    pub staged: String,
    /// Path relative to the library.
    pub to: String,
}

/// True while a change is being published, or was when its writer died.
pub(super) fn is_there(dir: &Path) -> bool {
    dir.join(STAGING).join(JOURNAL).exists()
}

/// What every version of the journal has.
#[derive(Deserialize)]
struct Header {
    version: u32,
}

impl Journal {
    /// Publishes: what is staged is made durable, then the journal is, then all is done.
    ///
    /// # Errors
    /// Before the commit point nothing has changed, nor if a file is in the way. After it (a disk that fails between two
    /// renames) the next writer goes on.
    pub fn commit(mut self, dir: &Path, catalog: &[u8]) -> Result<()> {
        self.version = VERSION;
        let staging = dir.join(STAGING);
        for file in self.new.iter().chain(&self.replace) {
            let path = staging.join(&file.staged);
            fs::File::open(&path).and_then(|f| f.sync_all()).map_err(|e| Error::io(&path, "make it durable", e))?;
        }
        write_durably(&staging.join(NEW_CATALOG), catalog)?;
        self.write(&staging)?;
        self.carry_out(dir)
    }

    fn write(&self, staging: &Path) -> Result<()> {
        let goal = staging.join(JOURNAL);
        let text = serde_json::to_vec(self).map_err(|e| Error::file(ErrorKind::Io, &goal, e))?;
        let temporary = staging.join("commit.new");
        write_durably(&temporary, &text)?;
        fs::rename(&temporary, &goal).map_err(|e| Error::io(&goal, "write the journal", e))?;
        sync_dir(staging)
    }

    /// The journal of a commit that somebody did not end, if there is one.
    pub fn read(dir: &Path) -> Result<Option<Journal>> {
        let path = dir.join(STAGING).join(JOURNAL);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == IoKind::NotFound => return Ok(None),
            Err(e) => return Err(Error::io(&path, "read the journal", e)),
        };
        let corrupt = |cause: String| {
            Error::file(ErrorKind::Corrupt, &path, cause)
                .mend("remove it if the files in the library are as you want them")
        };
        let version = serde_json::from_slice::<Header>(&text).map_err(|e| corrupt(e.to_string()))?.version;
        if version != VERSION {
            let cause = format!("journal format {version}; this vmar knows format {VERSION}");
            return Err(Error::file(ErrorKind::Unsupported, &path, cause)
                .mend("use the vmar that wrote it for any command that changes the library"));
        }
        let journal: Journal = serde_json::from_slice(&text).map_err(|e| corrupt(e.to_string()))?;
        let moves = || journal.new.iter().chain(&journal.replace);
        let inside = moves().map(|m| &m.to).chain(&journal.remove).all(|to| is_inside(to));
        if !inside || moves().any(|m| m.staged.contains('/')) {
            return Err(corrupt("it names a file outside of the library".to_string()));
        }
        Ok(Some(journal))
    }

    /// Does all that is not done yet.
    pub fn carry_out(&self, dir: &Path) -> Result<()> {
        let staging = dir.join(STAGING);
        for file in &self.new {
            match rename_new(&staging.join(&file.staged), &dir.join(&file.to)) {
                Err(e) if e.kind() == ErrorKind::Exists => {
                    self.give_up(dir)?;
                    return Err(e);
                }
                other => other?,
            }
        }
        for file in &self.replace {
            let goal = dir.join(&file.to);
            match fs::rename(staging.join(&file.staged), &goal) {
                // Moved already.
                Err(e) if e.kind() == IoKind::NotFound => {}
                other => other.map_err(|e| Error::io(&goal, "replace it", e))?,
            }
        }
        sync_places(dir)?;
        let goal = dir.join(CATALOG);
        match fs::rename(staging.join(NEW_CATALOG), &goal) {
            Err(e) if e.kind() == IoKind::NotFound => {}
            other => other.map_err(|e| Error::io(&goal, "replace the catalog", e))?,
        }
        sync_dir(dir)?;
        self.remove.iter().try_for_each(|file| remove(&dir.join(file)))?;
        remove(&staging.join(JOURNAL))?;
        sync_dir(&staging)
    }

    /// Takes back the new files; no map and no catalog was replaced yet. The journal goes before what is staged, because
    /// "no longer in `staging/`" is how a moved file is told from somebody else's file of that name.
    fn give_up(&self, dir: &Path) -> Result<()> {
        let staging = dir.join(STAGING);
        for file in &self.new {
            let goal = dir.join(&file.to);
            let inode = |path: &Path| path.symlink_metadata().ok().map(|m| (m.dev(), m.ino()));
            let staged = inode(&staging.join(&file.staged));
            // Still staged: what lies at the goal is somebody else's, unless it is a second link to the same file.
            if staged.is_none() || staged == inode(&goal) {
                remove(&goal)?;
            }
        }
        sync_places(dir)?;
        remove(&staging.join(JOURNAL))?;
        sync_dir(&staging)
    }
}

fn sync_places(dir: &Path) -> Result<()> {
    PLACES.iter().chain(&[STAGING]).try_for_each(|place| sync_dir(&dir.join(place)))
}

/// A plain file in one of the directories of a library.
fn is_inside(to: &str) -> bool {
    to.split_once('/')
        .is_some_and(|(dir, name)| PLACES.contains(&dir) && !name.contains('/') && name != ".." && name != ".")
}

/// Renames, but never over something that is there; a file that is not staged any more was moved already.
fn rename_new(from: &Path, to: &Path) -> Result<()> {
    let outcome = match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // File systems without this flag (some network ones) can at least link, which does not replace either.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => link_new(from, to),
        other => other.map_err(std::io::Error::from),
    };
    match outcome {
        Err(e) if e.kind() == IoKind::NotFound => Ok(()),
        Err(e) if e.kind() == IoKind::AlreadyExists => Err(in_the_way(to)),
        other => other.map_err(|e| Error::io(to, "move it in place", e)),
    }
}

fn link_new(from: &Path, to: &Path) -> std::io::Result<()> {
    match fs::hard_link(from, to) {
        // Killed between the two steps: it is the same file.
        Err(e) if e.kind() == IoKind::AlreadyExists && same_file(from, to) => {}
        other => other?,
    }
    fs::remove_file(from)
}

fn same_file(a: &Path, b: &Path) -> bool {
    let inode = |path: &Path| path.symlink_metadata().ok().map(|m| (m.dev(), m.ino()));
    inode(a).is_some() && inode(a) == inode(b)
}

#[cfg(test)]
impl Journal {
    /// As a writer that is killed at once leaves it.
    pub fn write_for_tests(&self, staging: &Path) {
        let journal = Journal {
            version: VERSION,
            new: self.new.clone(),
            replace: self.replace.clone(),
            remove: self.remove.clone(),
        };
        journal.write(staging).unwrap();
    }
}
