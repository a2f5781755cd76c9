//! A directory.

use super::{Care, MARK, Object, Place};
use crate::error::{Error, ErrorKind, Result};
use crate::io::file::sync_dir;
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with};
use std::fs::{self, File};
use std::io::{ErrorKind as IoKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const STAGING: &str = "staging";
/// How long one waits for a writer that is alone.
const MOMENT: Duration = Duration::from_secs(1);

/// The right to write in a directory.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

/// A directory with snapshots.
#[derive(Debug)]
pub struct Directory {
    url: String,
    dir: PathBuf,
    written: AtomicU64,
}

impl Directory {
    /// At this path; there may be none yet.
    pub fn new(url: &str, dir: &Path) -> Directory {
        Directory { url: url.into(), dir: dir.to_path_buf(), written: AtomicU64::new(0) }
    }

    /// What killed writers left. Of use only to who is alone.
    fn clear_staging(&self) -> Result<()> {
        let staging = self.dir.join(STAGING);
        let failed = |e| Error::io(&staging, "look at it", e);
        let files = match fs::read_dir(&staging) {
            Ok(files) => files,
            Err(e) if e.kind() == IoKind::NotFound => return Ok(()),
            Err(e) => return Err(failed(e)),
        };
        for file in files {
            let path = file.map_err(failed)?.path();
            fs::remove_file(&path).map_err(|e| Error::io(&path, "remove it", e))?;
        }
        Ok(())
    }

    /// A directory with other files is not taken for a new store.
    fn check_new(&self) -> Result<()> {
        let looked = |e| Error::io(&self.dir, "look at it", e);
        for entry in fs::read_dir(&self.dir).map_err(looked)? {
            let name = entry.map_err(looked)?.file_name();
            // A mark is of somebody who was quicker.
            if ![STAGING, super::PACKS, super::SNAPSHOTS, MARK, "lost+found"].iter().any(|own| name == **own) {
                return Err(Error::file(ErrorKind::Exists, &self.dir, "is no store of snapshots, and not empty")
                    .mend("name an empty or a new directory"));
            }
        }
        Ok(())
    }

    /// A new file in staging. Processes of several hosts or containers may have one number.
    fn stage(&self) -> Result<(PathBuf, File)> {
        loop {
            let number = self.written.fetch_add(1, Ordering::Relaxed);
            let path = self.dir.join(STAGING).join(format!("{}-{number}", std::process::id()));
            match File::options().write(true).create_new(true).open(&path) {
                Ok(file) => return Ok((path, file)),
                Err(e) if e.kind() == IoKind::AlreadyExists => {}
                Err(e) => return Err(Error::io(&path, "create it", e)),
            }
        }
    }

    fn write(&self, key: &str, bytes: &[u8], replace: bool) -> Result<()> {
        let goal = self.dir.join(key);
        for dir in [Some(self.dir.join(STAGING)).as_deref(), goal.parent()].into_iter().flatten() {
            make_dir(dir)?;
        }
        if key == MARK {
            self.check_new()?;
        }
        let (staged, mut file) = self.stage()?;
        let written = file.write_all(bytes).and_then(|()| file.sync_all());
        let written = written.map_err(|e| Error::io(&staged, "write", e)).and_then(|()| {
            let moved = if replace { fs::rename(&staged, &goal) } else { rename_new(&staged, &goal) };
            moved.map_err(|e| Error::io(&staged, &format!("move it to {}", goal.display()), e))
        });
        if written.is_err() {
            drop(fs::remove_file(&staged));
        }
        written?;
        goal.parent().map_or(Ok(()), sync_dir)
    }

    fn try_lock(&self, file: &File, path: &Path, alone: bool) -> Result<()> {
        let refused = |e| match e {
            rustix::io::Errno::WOULDBLOCK => Error::file(ErrorKind::Busy, &self.dir, "another process writes there")
                .mend("wait for its end, or name another store"),
            e => Error::io(path, "lock it", e.into()),
        };
        match flock(file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => self.clear_staging()?,
            Err(rustix::io::Errno::WOULDBLOCK) if !alone => {}
            Err(e) => return Err(refused(e)),
        }
        if alone { Ok(()) } else { flock(file, FlockOperation::NonBlockingLockShared).map_err(refused) }
    }
}

/// Makes a directory and those above it, durably.
fn make_dir(dir: &Path) -> Result<()> {
    if dir.is_dir() {
        return Ok(());
    }
    let parent = dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    make_dir(parent)?;
    match fs::create_dir(dir) {
        // Another thread was faster.
        Err(e) if e.kind() == IoKind::AlreadyExists && dir.is_dir() => {}
        made => made.map_err(|e| Error::io(dir, "make it", e))?,
    }
    sync_dir(parent)
}

impl Place for Directory {
    fn url(&self) -> &str {
        &self.url
    }

    fn list(&self, folder: &str) -> Result<Vec<Object>> {
        let dir = self.dir.join(folder);
        let failed = |e| Error::io(&dir, "look at it", e);
        let files = match fs::read_dir(&dir) {
            Ok(files) => files,
            Err(e) if e.kind() == IoKind::NotFound && self.dir.exists() => return Ok(Vec::new()),
            Err(e) => return Err(failed(e)),
        };
        let mut out = Vec::new();
        for file in files {
            let file = file.map_err(failed)?;
            let (Ok(name), Ok(meta)) = (file.file_name().into_string(), file.metadata()) else { continue };
            out.push(Object { name, bytes: meta.len(), written: meta.modified().map_err(failed)? });
        }
        out.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(out)
    }

    fn get(&self, key: &str) -> Result<Vec<u8>> {
        let path = self.dir.join(key);
        fs::read(&path).map_err(|e| Error::io(&path, "read", e))
    }

    fn put(&self, key: &str, bytes: &[u8], _: Care) -> Result<()> {
        self.write(key, bytes, true)
    }

    fn put_new(&self, key: &str, bytes: &[u8], _: Care) -> Result<()> {
        self.write(key, bytes, false)
    }

    fn remove(&self, key: &str) -> Result<()> {
        let path = self.dir.join(key);
        match fs::remove_file(&path) {
            Ok(()) => path.parent().map_or(Ok(()), sync_dir),
            Err(e) if e.kind() == IoKind::NotFound => Ok(()),
            Err(e) => Err(Error::io(&path, "remove it", e)),
        }
    }

    fn path(&self, key: &str) -> Option<PathBuf> {
        Some(self.dir.join(key))
    }

    fn lock(&self, alone: bool) -> Result<Option<Lock>> {
        let path = self.dir.join(MARK);
        let file = File::open(&path).map_err(|e| Error::io(&path, "open it", e))?;
        let began = Instant::now();
        loop {
            match self.try_lock(&file, &path, alone) {
                // Another writer may be alone for the moment in which it clears what killed ones have left.
                Err(e) if e.kind() == ErrorKind::Busy && !alone && began.elapsed() < MOMENT => {
                    std::thread::sleep(Duration::from_millis(2));
                }
                result => return result.map(|()| Some(Lock { _file: file })),
            }
        }
    }
}

/// Renames a file to a name that nobody has. Where the file system cannot do that in one step it is looked at before.
fn rename_new(from: &Path, to: &Path) -> std::io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) if fs::symlink_metadata(to).is_err() => {
            fs::rename(from, to)
        }
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => Err(IoKind::AlreadyExists.into()),
        result => result.map_err(Into::into),
    }
}
