//! How far a verification has come, in a small file of the library, so that the next one can go on after Ctrl-C or a kill.
//!
//! ```text
//! DIR/verify/NAME      magic     "VMARVFY1"      8 bytes
//!                      binding   BLAKE3          32 bytes: which library, image, run, file, size and modification time
//!                      records   48 bytes each, appended in one write when a chunk is done
//!
//! record               number    u64   index of the chunk, the block, or how many redirects
//!                      kind      u32   1 chunk of zeros, 2 chunk with data, 3 bad block, 4 redirects compared
//!                      hash      32    of the chunk's bytes (2), of what is compared (4); else zeros
//!                      crc       u32   CRC-32C of the 44 bytes before
//! ```
//!
//! All little-endian. Bad blocks stand before their chunk, so a record that was cut off means that the chunk is looked at
//! again. What does not fit the image as it is now is thrown away, and so is the file when the verification has ended, or
//! when its image is no more. Nothing is made durable: after a power cut some chunks may be looked at again.

use super::bytes::Checked;
use crate::codec::Cursor;
use crate::error::{Error, ErrorKind, Result};
use crate::library::{ImageRecord, Library, mtime_ns};
use rustix::fs::{FlockOperation, flock};
use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// The directory of the library.
const DIR: &str = "verify";
const MAGIC: &[u8; 8] = b"VMARVFY1";
const HEADER_BYTES: usize = 40;
const RECORD_BYTES: usize = 48;

const ZERO_CHUNK: u32 = 1;
const DATA_CHUNK: u32 = 2;
const BAD_BLOCK: u32 = 3;
const REDIRECTS: u32 = 4;

/// An open file of progress; nobody else has it.
pub(in crate::indexer) struct Progress {
    path: PathBuf,
    file: Mutex<File>,
    /// What was done before.
    pub before: Done,
}

/// What is done.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::indexer) struct Done {
    /// Chunks, and the hashes of those that are not zero.
    pub chunks: BTreeMap<u64, Option<[u8; 32]>>,
    /// Blocks that were bad, ascending, each once.
    pub bad: Vec<u32>,
    /// Redirects that were compared, and what they were redirects of.
    redirects: (u64, [u8; 32]),
}

impl Done {
    /// Redirects that need no second comparison, if `binding` still says what is compared.
    pub fn redirects(&self, binding: &[u8; 32]) -> u64 {
        if self.redirects.1 == *binding { self.redirects.0 } else { 0 }
    }
}

impl Progress {
    /// Opens the progress of an image whose file is `meta` now, or begins anew.
    ///
    /// # Errors
    /// `Busy` when somebody else is at it; `Io` when the library cannot be written to.
    pub fn open(library: &Library, record: &ImageRecord, meta: &Metadata) -> Result<Progress> {
        let dir = library.dir().join(DIR);
        fs::create_dir_all(&dir).map_err(|e| unwritable(Error::io(&dir, "make the directory", e)))?;
        sweep(library, &dir);
        let path = dir.join(&record.name);
        let mut file = File::options()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .map_err(|e| unwritable(Error::io(&path, "open it", e)))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            Error::file(ErrorKind::Busy, &path, format!("image {} is being verified already", record.name))
                .mend("wait for that, or verify without --resume")
        })?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|e| Error::io(&path, "read", e))?;
        let binding = binding(library, record, meta);
        let (before, whole) = parse(&bytes, &binding);
        // Whatever is behind the last good record would make the next one unreadable.
        file.set_len(whole as u64).map_err(|e| unwritable(Error::io(&path, "write", e)))?;
        if whole == 0 {
            let header = [&MAGIC[..], &binding].concat();
            file.write_all(&header).map_err(|e| unwritable(Error::io(&path, "write", e)))?;
        }
        Ok(Progress { path, file: Mutex::new(file), before })
    }

    /// A chunk is done.
    pub fn chunk(&self, checked: &Checked) -> Result<()> {
        let mut records: Vec<u8> = checked.bad.iter().flat_map(|&b| record_of(b.into(), BAD_BLOCK, &[0; 32])).collect();
        let kind = if checked.hash.is_some() { DATA_CHUNK } else { ZERO_CHUNK };
        records.extend(record_of(checked.chunk, kind, &checked.hash.unwrap_or_default()));
        self.append(&records)
    }

    /// The first `count` redirects are done.
    pub fn redirects(&self, count: u64, binding: &[u8; 32]) -> Result<()> {
        self.append(&record_of(count, REDIRECTS, binding))
    }

    fn append(&self, records: &[u8]) -> Result<()> {
        let mut file = self.file.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        file.write_all(records).map_err(|e| unwritable(Error::io(&self.path, "write", e)))
    }

    /// The verification has ended, well or not.
    pub fn finish(self) -> Result<()> {
        fs::remove_file(&self.path).map_err(|e| Error::io(&self.path, "remove it", e))
    }
}

fn unwritable(err: Error) -> Error {
    err.mend("make the library writable, or verify without --resume")
}

/// Removes the progress of images that are no more.
fn sweep(library: &Library, dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let is_known = entry.file_name().to_str().is_some_and(|name| library.image(name).is_ok());
        if !is_known && let Err(e) = fs::remove_file(entry.path()) {
            log::info!("{}: cannot remove it: {e}", entry.path().display());
        }
    }
}

/// What the progress is of. A file that was replaced or written to is another.
fn binding(library: &Library, record: &ImageRecord, meta: &Metadata) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(library.catalog().uuid.as_bytes()).update(&record.digest);
    for number in [u64::from(record.id.0), record.generation, record.size, u64::from(record.run.crc32c)] {
        hasher.update(&number.to_le_bytes());
    }
    for number in [meta.dev(), meta.ino(), meta.len(), mtime_ns(meta).cast_unsigned()] {
        hasher.update(&number.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

fn record_of(number: u64, kind: u32, hash: &[u8; 32]) -> [u8; RECORD_BYTES] {
    let mut out = [0; RECORD_BYTES];
    out[..8].copy_from_slice(&number.to_le_bytes());
    out[8..12].copy_from_slice(&kind.to_le_bytes());
    out[12..44].copy_from_slice(hash);
    let crc = crc32c::crc32c(&out[..44]);
    out[44..].copy_from_slice(&crc.to_le_bytes());
    out
}

/// What the file says, and how many bytes of it count; none if it is not the progress of this.
fn parse(bytes: &[u8], binding: &[u8; 32]) -> (Done, usize) {
    let mut done = Done::default();
    if !bytes.strip_prefix(MAGIC).is_some_and(|rest| rest.starts_with(binding)) {
        return (done, 0);
    }
    let mut whole = HEADER_BYTES;
    for record in bytes.get(HEADER_BYTES..).unwrap_or_default().chunks_exact(RECORD_BYTES) {
        let mut cursor = Cursor::new(record);
        let (Some(number), Some(kind)) = (cursor.u64_le(), cursor.u32_le()) else { break };
        let Some(hash) = cursor.take(32).and_then(|h| <[u8; 32]>::try_from(h).ok()) else { break };
        if cursor.u32_le() != Some(crc32c::crc32c(&record[..44])) {
            break;
        }
        match kind {
            ZERO_CHUNK => drop(done.chunks.insert(number, None)),
            DATA_CHUNK => drop(done.chunks.insert(number, Some(hash))),
            BAD_BLOCK => done.bad.extend(u32::try_from(number)),
            REDIRECTS => done.redirects = (number, hash),
            _ => break,
        }
        whole += RECORD_BYTES;
    }
    done.bad.sort_unstable();
    done.bad.dedup();
    (done, whole)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Wherever the file was cut off or a byte of it changed: what is believed was written, from the start on.
        #[test]
        fn only_what_was_written_is_believed(
            chunks in prop::collection::vec((0u64..50, any::<bool>(), prop::collection::vec(0u32..9999, 0..3)), 0..12),
            cut in 0usize..1200, change in prop::option::of((0usize..1200, 1u8..=255)),
        ) {
            let mut bytes = [&MAGIC[..], &[7; 32]].concat();
            for (chunk, data, bad) in &chunks {
                bad.iter().for_each(|&b| bytes.extend(record_of(b.into(), BAD_BLOCK, &[0; 32])));
                let (kind, hash) = if *data { (DATA_CHUNK, [*chunk as u8 + 1; 32]) } else { (ZERO_CHUNK, [0; 32]) };
                bytes.extend(record_of(*chunk, kind, &hash));
            }
            let (all, whole) = parse(&bytes, &[7; 32]);
            prop_assert_eq!(whole, bytes.len());
            prop_assert_eq!(all.chunks.len(), chunks.iter().map(|c| c.0).collect::<std::collections::BTreeSet<_>>().len());
            let mut damaged = bytes.clone();
            damaged.truncate(cut);
            if let Some((at, flip)) = change && let Some(byte) = damaged.get_mut(at) {
                *byte ^= flip;
            }
            let (some, whole) = parse(&damaged, &[7; 32]);
            prop_assert!(whole <= damaged.len() && damaged[..whole] == bytes[..whole]);
            prop_assert_eq!(some, parse(&bytes[..whole], &[7; 32]).0);
            prop_assert_eq!(parse(&bytes, &[8; 32]), (Done::default(), 0));
        }
    }

    #[test]
    fn a_file_of_zeros_is_no_progress() {
        let mut bytes = [&MAGIC[..], &[7; 32]].concat();
        bytes.extend([0; 10 * RECORD_BYTES]);
        assert_eq!(parse(&bytes, &[7; 32]), (Done::default(), HEADER_BYTES));
    }
}
