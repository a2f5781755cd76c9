//! Sharing domains: images are only ever read from images of their own domain, or of the public one.
//!
//! ```text
//!            public: provider images             read from themselves alone
//!            ▲          ▲          ▲
//!      tenant a     tenant b     tenant c        read from their own and the public images, never from each other's
//! ```
//!
//! A tenant whose VM finds a block faster than the disk could give it learns that somebody else has read that block. Within a
//! domain that is accepted; between private domains no block is shared, so there is nothing to learn. What is counted
//! (`stats`, `estimate`, `image show`) is counted within a domain too.
//!
//! With `fingerprint = blake3` each domain has a key of its own, in a file that its owner alone may read. Fingerprints, the
//! content index and whatever is copied of them say nothing to who does not have the key: neither what an image holds, nor
//! what two images of different domains have in common. (Sizes and content digests of whole images are in the catalog and in
//! block maps, which are the operator's.) With SHA-1 the domains are kept apart as well, but who can read the runs can compare.
//!
//! A key is needed to add, verify or repair images, and not to serve them.

use super::{Transaction, Writer, check_name, key_file};
use crate::codec::{hex, unhex};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::{Algorithm, Hasher};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A sharing domain.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Domain {
    /// Images of all domains may be read from images of this one.
    #[serde(default)]
    pub public: bool,
    /// The key of its fingerprints, if they have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<KeyRef>,
}

/// Where a key is, and which one it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KeyRef {
    /// Relative to the library.
    pub file: PathBuf,
    /// Tells keys apart and says nothing of them: 16 hexadecimal digits.
    pub id: String,
}

/// What to do about a key that cannot be used.
const MEND: &str =
    "restore it from a backup, or make new keys and everything anew with 'vmar library rebuild --new-keys'";

impl KeyRef {
    /// Reads the key.
    pub(super) fn read(&self, library: &Path) -> Result<Key> {
        let path = library.join(&self.file);
        let text =
            fs::read_to_string(&path).map_err(|e| Error::io(&path, "read the key of the domain", e).mend(MEND))?;
        let corrupt = |cause: &str| Error::file(ErrorKind::Corrupt, &path, cause).mend(MEND);
        let key =
            unhex(text.trim_end()).map(Key).ok_or_else(|| corrupt("is no key: a key is 64 hexadecimal digits"))?;
        if key.id() != self.id {
            return Err(corrupt("is another key than the one that the fingerprints were made with"));
        }
        Ok(key)
    }
}

/// The secret of a domain. Never printed.
pub struct Key([u8; 32]);

impl Key {
    /// A new one.
    pub fn new() -> Result<Key> {
        let mut key = [0; 32];
        let random = "/dev/urandom";
        let read = File::open(random).and_then(|mut file| file.read_exact(&mut key));
        read.map(|()| Key(key)).map_err(|e| Error::io(random, "read", e))
    }

    /// What it is for.
    pub fn hasher(&self) -> Hasher {
        Hasher::Blake3(self.0)
    }

    fn id(&self) -> String {
        let id = blake3::keyed_hash(&self.0, b"vmar key 1");
        hex(id.as_bytes().first_chunk::<8>().unwrap_or(&[0; 8]))
    }

    /// As the catalog names it.
    pub(super) fn reference(&self, file: &str) -> KeyRef {
        KeyRef { file: file.into(), id: self.id() }
    }

    /// Writes it to a new file, durably.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let write = || {
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(path)?;
            writeln!(file, "{}", hex(&self.0))?;
            file.sync_all()
        };
        write().map_err(|e| Error::io(path, "write the key", e))
    }

    /// A new key for a domain, in the place of the one that it has, if any.
    pub fn stage(transaction: &mut Transaction<'_>, domain: &str) -> Result<(Key, KeyRef)> {
        let file = key_file(domain, transaction.number());
        let path = transaction.stage(&file)?;
        let key = Key::new()?;
        key.write(&path)?;
        if let Some(old) = transaction.library().catalog().domains.get(domain).and_then(|d| d.key.clone()) {
            transaction.remove(&old.file);
        }
        let reference = key.reference(&file);
        Ok((key, reference))
    }
}

/// Makes a domain, with a key if fingerprints have one.
///
/// # Errors
/// `Exists` when there is one of this name, or another public one.
pub fn add(writer: &mut Writer, name: &str, public: bool) -> Result<()> {
    check_name(name)?;
    let subject = || format!("sharing domain {name}");
    if writer.library().catalog().domains.contains_key(name) {
        return Err(Error::new(ErrorKind::Exists, subject(), "there is one of this name").mend("use another name"));
    }
    if public {
        check_no_public(writer, name)?;
    }
    let mut transaction = writer.begin();
    let key = match transaction.library().catalog().fingerprint {
        Algorithm::Sha1 => None,
        Algorithm::Blake3 => Some(Key::stage(&mut transaction, name)?.1),
    };
    transaction.commit(|catalog| drop(catalog.domains.insert(name.to_string(), Domain { public, key })))
}

/// Makes a domain the public one. There is no way back: images of other domains read from its images from then on.
///
/// # Errors
/// `Exists` when there is another public one.
pub fn publish(writer: &mut Writer, name: &str) -> Result<()> {
    writer.library().catalog().domain(name)?;
    check_no_public(writer, name)?;
    writer.update(|catalog| {
        if let Some(domain) = catalog.domains.get_mut(name) {
            domain.public = true;
        }
    })
}

fn check_no_public(writer: &Writer, name: &str) -> Result<()> {
    match writer.library().catalog().public_domain_for(name) {
        None => Ok(()),
        Some(public) => {
            let cause = format!("domain {public} is the public one already");
            Err(Error::new(ErrorKind::Exists, format!("sharing domain {name}"), cause)
                .mend(format!("add what all may read to domain {public}")))
        }
    }
}

/// Removes a domain that has no images, and its key.
///
/// # Errors
/// `Busy` when it has images, `Usage` for the one that images get when nothing else is said.
pub fn remove(writer: &mut Writer, name: &str) -> Result<()> {
    let catalog = writer.library().catalog();
    let domain = catalog.domain(name)?.clone();
    let refuse =
        |kind, cause: String, mend: &str| Err(Error::new(kind, format!("sharing domain {name}"), cause).mend(mend));
    if name == catalog.domain {
        return refuse(
            ErrorKind::Usage,
            "images that are added go there if nothing else is said".to_string(),
            "leave it",
        );
    }
    if let Some(image) = catalog.images.iter().find(|r| r.domain == name) {
        return refuse(ErrorKind::Busy, format!("image {} is in it", image.name), "remove its images first");
    }
    let index = catalog.index.get(name).cloned();
    let mut transaction = writer.begin();
    if let Some(index) = index {
        transaction.remove(&index.sets);
        index.tables.iter().for_each(|table| transaction.remove(&table.file));
    }
    if let Some(key) = &domain.key {
        transaction.remove(&key.file);
    }
    if domain.public {
        // What was found in it says nothing any more.
        let images = transaction.library().images().to_vec();
        images.iter().filter_map(|r| r.public_run.as_ref()).for_each(|run| transaction.remove(&run.file));
    }
    transaction.commit(|catalog| {
        catalog.domains.remove(name);
        catalog.index.remove(name);
        if domain.public {
            catalog.images.iter_mut().for_each(|r| r.public_run = None);
        }
    })
}
