//! A directory for a socket between QEMU and this process: QEMU may be another user, so who knows the name may connect. The directory
//! cannot be listed by others, and its name not be guessed.

use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

const PREFIX: &str = ".vmar-";
/// What the kernel takes as the path of a socket, and a little less.
const PATH_MAX: usize = 100;

/// The directory; gone when this is dropped.
#[derive(Debug)]
pub struct PrivateDir {
    dir: PathBuf,
    socket: PathBuf,
    /// Held as long as its process lives: who is killed leaves a directory that nobody holds.
    _lock: File,
}

impl PrivateDir {
    /// A new one. Those of processes that were killed are removed.
    ///
    /// # Errors
    /// It cannot be made, or its path is too long for a socket.
    pub fn create(parent: &Path) -> Result<PrivateDir> {
        let parent = std::path::absolute(parent).map_err(|e| Error::io(parent, "find", e))?;
        remove_leftovers(&parent);
        let mut random = [0; 8];
        let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random));
        read.map_err(|e| Error::io("/dev/urandom", "read", e))?;
        let dir = parent.join(format!("{PREFIX}{}", hex(&random)));
        let socket = dir.join("stream");
        if socket.as_os_str().len() > PATH_MAX {
            let cause = "is too long a path for a socket";
            return Err(Error::file(ErrorKind::Usage, &parent, cause).mend("name another with --spool"));
        }
        let made = fs::DirBuilder::new().mode(0o700).create(&dir);
        let lock = made.and_then(|()| File::open(&dir)).map_err(|e| Error::io(&dir, "make it", e))?;
        let own = PrivateDir { dir, socket, _lock: lock };
        flock(&own._lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|e| Error::io(&own.dir, "lock it", e.into()))?;
        fs::set_permissions(&own.dir, fs::Permissions::from_mode(0o711))
            .map_err(|e| Error::io(&own.dir, "open it", e))?;
        Ok(own)
    }

    /// Where the socket is, or will be.
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for PrivateDir {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_dir_all(&self.dir) {
            log::warn!("{}: is left: {e}", self.dir.display());
        }
    }
}

/// One that is held, or that somebody else made, stays. So does one whose owner has not locked it yet: it has no mode for others then.
fn remove_leftovers(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let ours = name.to_str().and_then(|name| name.strip_prefix(PREFIX)).is_some_and(|hex| hex.len() == 16);
        let open = entry.metadata().is_ok_and(|meta| meta.is_dir() && meta.permissions().mode() & 0o777 == 0o711);
        let Some(dir) = (ours && open).then(|| File::open(entry.path()).ok()).flatten() else { continue };
        if flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok() {
            drop(fs::remove_dir_all(entry.path()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_killed_left_goes_and_what_is_held_stays() {
        let parent = tempfile::tempdir().unwrap();
        let held = PrivateDir::create(parent.path()).unwrap();
        let left = parent.path().join(".vmar-0123456789abcdef");
        fs::create_dir(&left).unwrap();
        fs::write(left.join("stream"), b"").unwrap();
        fs::set_permissions(&left, fs::Permissions::from_mode(0o711)).unwrap();
        let other = parent.path().join(".vmar-cache");
        fs::create_dir(&other).unwrap();
        let more = PrivateDir::create(parent.path()).unwrap();
        assert!(held.dir.exists() && more.dir.exists() && other.exists() && !left.exists());
        let dir = held.dir.clone();
        drop(held);
        assert!(!dir.exists());
    }
}
