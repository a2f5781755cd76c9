//! A place where snapshots are: a directory, a bucket, or a directory of HDFS. Each is a domain of failure of its own.
//!
//! ```text
//! vmar-snapshots           {"format":"vmar-snapshots","version":1,"id":"…"}
//! packs/ID.pack            see [`crate::store::pack`]
//! snapshots/NAME.snapshot  see [`super::file`]
//! staging/                 of directories: what is being written
//! ```
//!
//! All objects are written whole or not at all, and never changed. Packs are named by what they hold, so that writing one twice is
//! writing it once.

#[cfg(feature = "hdfs")]
pub mod hdfs;
pub mod local;
pub mod remote;

use crate::error::{Error, ErrorKind, Result};
use crate::store::PackId;
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// The object that says that the place is one of snapshots.
pub const MARK: &str = "vmar-snapshots";
/// Where packs are.
pub const PACKS: &str = "packs";
/// Where snapshots are.
pub const SNAPSHOTS: &str = "snapshots";

/// How an object is looked after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Care {
    /// It must not be lost: it is in several places, or in a storage class that keeps several copies.
    Critical,
    /// It is in one place, and may be lost.
    Once,
}

/// What there is of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its name, without the folder.
    pub name: String,
    /// Bytes.
    pub bytes: u64,
    /// When it was written.
    pub written: SystemTime,
}

/// A place. Threads use it at once.
pub trait Place: Debug + Send + Sync {
    /// How the operator named it.
    fn url(&self) -> &str;

    /// The objects of a folder; none when there is no such folder.
    ///
    /// # Errors
    /// The place cannot be reached or read.
    fn list(&self, folder: &str) -> Result<Vec<Object>>;

    /// Reads an object.
    ///
    /// # Errors
    /// `NotFound` when there is none, or the place cannot be reached or read.
    fn get(&self, key: &str) -> Result<Vec<u8>>;

    /// Writes an object; when this returns it is durable. One of this name is replaced.
    ///
    /// # Errors
    /// It cannot be written; then there is none, or the one that there was.
    fn put(&self, key: &str, bytes: &[u8], care: Care) -> Result<()>;

    /// The same of one whose name nobody has. Places that cannot tell replace it: whoever writes there has looked before.
    ///
    /// # Errors
    /// `Exists` when there is one, and as [`Place::put`].
    fn put_new(&self, key: &str, bytes: &[u8], care: Care) -> Result<()> {
        self.put(key, bytes, care)
    }

    /// Removes an object, if there is one.
    ///
    /// # Errors
    /// It cannot be removed.
    fn remove(&self, key: &str) -> Result<()>;

    /// The file of an object, where objects are files.
    fn path(&self, _key: &str) -> Option<PathBuf> {
        None
    }

    /// Takes the right to write, until the returned value is dropped. `alone`: nobody else has it.
    ///
    /// # Errors
    /// `Busy` when somebody else has it; places without locks give it to everybody.
    fn lock(&self, _alone: bool) -> Result<Option<local::Lock>> {
        Ok(None)
    }

    /// Objects that nobody names are of a writer that ended halfway if they are older than this many seconds. None: whoever is alone
    /// ([`Place::lock`]) knows that there is no other writer.
    fn grace(&self) -> Option<u64> {
        None
    }
}

/// Key of a pack.
pub fn pack_key(id: PackId) -> String {
    format!("{PACKS}/{}", id.file_name())
}

/// Key of a snapshot.
pub fn snapshot_key(name: &str) -> String {
    format!("{SNAPSHOTS}/{name}{ENDING}")
}

/// How the names of snapshots' objects end.
pub const ENDING: &str = ".snapshot";

/// The name of a snapshot, if an object's name is one.
pub fn snapshot_name(object: &str) -> Option<&str> {
    object.strip_suffix(ENDING).filter(|name| !name.is_empty())
}

/// The pack that an object's name names.
pub fn pack_id(object: &str) -> Option<PackId> {
    let id = PackId(crate::codec::unhex(object.strip_suffix(".pack")?)?);
    Some(id).filter(|id| id.file_name() == object)
}

/// Takes `--store URL` apart: a directory, by its path or as `file://PATH`, or what [`remote`] knows.
///
/// # Errors
/// It is none of these, or has a parameter that nobody knows.
pub fn open(url: &str) -> Result<Box<dyn Place>> {
    if let Some(path) = url.strip_prefix("file://") {
        return Ok(Box::new(local::Directory::new(url, Path::new(path))));
    }
    if url.starts_with("hdfs://") {
        return hdfs_place(url);
    }
    if url.contains("://") {
        return Ok(Box::new(remote::Remote::open(url)?));
    }
    if url.is_empty() {
        return Err(Error::new(ErrorKind::Usage, "--store", "is empty").mend("name a directory or s3://BUCKET/PREFIX"));
    }
    Ok(Box::new(local::Directory::new(url, Path::new(url))))
}

#[cfg(feature = "hdfs")]
fn hdfs_place(url: &str) -> Result<Box<dyn Place>> {
    Ok(Box::new(hdfs::Hdfs::open(url)?))
}

#[cfg(not(feature = "hdfs"))]
fn hdfs_place(url: &str) -> Result<Box<dyn Place>> {
    Err(Error::new(ErrorKind::Unsupported, format!("--store {url}"), "this vmar was built without HDFS")
        .mend("build it with 'cargo build --release --features hdfs'"))
}
