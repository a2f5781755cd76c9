//! What a scan has found so far, in a file: for images whose rows are too many for memory, and to go on with after a kill.
//!
//! ```text
//! "vmar-scn"  version u32  0 u32  identity [32]
//! records: first chunk u64, chunks u32, rows u32, digests u32, then the rows (hash [20], block u32), then the digests (index u64,
//!          hash [32]), then the CRC-32C of the record u32
//! ```
//!
//! Records come in any order, one for each piece of the image that was hashed. A record that is cut off or damaged ends the
//! log: what is behind it was not written whole before the kill, and is hashed again. Nothing is made durable: after a power
//! cut the checksums tell what is there.
//!
//! The rows are wanted by hash: [`ScanLog::rows`] goes through the file once for every part of them that fits in memory.

use super::chunks::Chunk;
use super::{Hash, Row, scan};
use crate::codec::Cursor;
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

const MAGIC: &[u8; 8] = b"vmar-scn";
const VERSION: u32 = 1;
const HEADER: usize = 48;
const RECORD_HEAD: usize = 20;
const ROW: usize = 24;
const DIGEST: usize = 40;
/// The longest record that is read: far more than a piece has.
const RECORD_MAX: usize = 64 << 20;

/// A log that is being written, or is complete.
pub struct ScanLog {
    path: PathBuf,
    inner: Mutex<Inner>,
}

struct Inner {
    file: File,
    /// Pieces that are in the log: first chunk, and how many.
    done: BTreeMap<u64, u32>,
    rows: u64,
    digests: Vec<Chunk>,
}

/// One record, read back.
struct Record {
    chunks: Range<u64>,
    rows: Vec<Row>,
    digests: Vec<Chunk>,
}

impl ScanLog {
    /// Opens the log of a scan of what `identity` stands for (file, size, time, algorithm), to go on with it; begins a new
    /// one if there is none of this very scan.
    pub fn open(path: &Path, identity: &[u8; 32]) -> Result<ScanLog> {
        let failed = |e| Error::io(path, "keep what was hashed", e);
        let mut file = options().open(path).map_err(failed)?;
        let mut inner =
            Inner { file: file.try_clone().map_err(failed)?, done: BTreeMap::new(), rows: 0, digests: Vec::new() };
        let mut head = [0; HEADER];
        let is_this = file.read_exact(&mut head).is_ok() && head == header(identity);
        if !is_this {
            file.set_len(0)
                .and_then(|()| file.rewind())
                .and_then(|()| file.write_all(&header(identity)))
                .map_err(failed)?;
        }
        let mut end = HEADER as u64;
        let mut reader = BufReader::with_capacity(1 << 20, &file);
        while let Some((record, len)) = read_record(&mut reader).map_err(failed)? {
            let count = u32::try_from(record.chunks.end - record.chunks.start).unwrap_or(u32::MAX);
            inner.done.insert(record.chunks.start, count);
            inner.rows += record.rows.len() as u64;
            inner.digests.extend(record.digests);
            end += len;
        }
        drop(reader);
        // Behind it is what the kill cut off.
        inner.file.set_len(end).and_then(|()| inner.file.seek(SeekFrom::Start(end))).map_err(failed)?;
        Ok(ScanLog { path: path.to_path_buf(), inner: Mutex::new(inner) })
    }

    /// True if this piece is in the log already.
    pub fn has(&self, piece: &Range<u64>) -> bool {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.done.get(&piece.start).is_some_and(|count| piece.start + u64::from(*count) == piece.end)
    }

    /// Appends what was found in a piece.
    pub fn append(&self, piece: &Range<u64>, rows: &[Row], digests: &[Chunk]) -> Result<()> {
        let bytes = encode(piece, rows, digests);
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.file.write_all(&bytes).map_err(|e| Error::io(&self.path, "keep what was hashed", e))?;
        inner.done.insert(piece.start, u32::try_from(piece.end - piece.start).unwrap_or(u32::MAX));
        inner.rows += rows.len() as u64;
        inner.digests.extend_from_slice(digests);
        Ok(())
    }

    /// Rows in the log.
    pub fn count(&self) -> u64 {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).rows
    }

    /// The digests of all chunks, ascending.
    pub fn digests(&self) -> Vec<Chunk> {
        let mut digests = self.inner.lock().unwrap_or_else(PoisonError::into_inner).digests.clone();
        digests.sort_unstable_by_key(|(index, _)| *index);
        digests
    }

    /// All rows, sorted, with about `limit` of them in memory at a time.
    pub fn rows(self, limit: u64, threads: usize) -> Rows {
        let parts = self.count().div_ceil(limit.max(1)).clamp(1, 1 << 16);
        Rows { log: self, parts, part: 0, threads, rows: Vec::new().into_iter() }
    }

    /// The rows whose hashes begin with a number in this range, of 2^16 numbers.
    fn part(&self, prefixes: Range<u64>) -> Result<Vec<Row>> {
        let failed = |e| Error::io(&self.path, "read what was hashed", e);
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        (&inner.file).seek(SeekFrom::Start(HEADER as u64)).map_err(failed)?;
        let mut reader = BufReader::with_capacity(1 << 20, &inner.file);
        let mut out = Vec::new();
        while let Some((record, _)) = read_record(&mut reader).map_err(failed)? {
            let prefix = |row: &Row| u64::from(u16::from_be_bytes([row.hash[0], row.hash[1]]));
            out.extend(record.rows.into_iter().filter(|row| prefixes.contains(&prefix(row))));
        }
        Ok(out)
    }
}

/// The rows of a log, by hash.
pub struct Rows {
    log: ScanLog,
    parts: u64,
    part: u64,
    threads: usize,
    rows: std::vec::IntoIter<Row>,
}

impl Iterator for Rows {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        loop {
            if let Some(row) = self.rows.next() {
                return Some(Ok(row));
            }
            if self.part == self.parts {
                return None;
            }
            let border = |part: u64| part * (1 << 16) / self.parts;
            let prefixes = border(self.part)..border(self.part + 1);
            self.part += 1;
            match self.log.part(prefixes) {
                Ok(mut rows) => {
                    scan::sort(&mut rows, self.threads);
                    self.rows = rows.into_iter();
                }
                Err(e) => {
                    self.part = self.parts;
                    return Some(Err(e));
                }
            }
        }
    }
}

fn options() -> std::fs::OpenOptions {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false);
    options
}

fn header(identity: &[u8; 32]) -> [u8; HEADER] {
    let mut out = [0; HEADER];
    out[..8].copy_from_slice(MAGIC);
    out[8..12].copy_from_slice(&VERSION.to_le_bytes());
    out[16..].copy_from_slice(identity);
    out
}

fn encode(piece: &Range<u64>, rows: &[Row], digests: &[Chunk]) -> Vec<u8> {
    let mut out = Vec::with_capacity(RECORD_HEAD + rows.len() * ROW + digests.len() * DIGEST + 4);
    let small = |n: u64| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();
    out.extend(piece.start.to_le_bytes());
    out.extend(small(piece.end - piece.start));
    out.extend(small(rows.len() as u64));
    out.extend(small(digests.len() as u64));
    for row in rows {
        out.extend(row.hash);
        out.extend(row.block.to_le_bytes());
    }
    for (index, hash) in digests {
        out.extend(index.to_le_bytes());
        out.extend(hash);
    }
    let crc = crc32c::crc32c(&out);
    out.extend(crc.to_le_bytes());
    out
}

/// The next record and its length; `None` at the end of what is whole.
fn read_record(reader: &mut impl Read) -> io::Result<Option<(Record, u64)>> {
    let mut bytes = vec![0; RECORD_HEAD];
    if !fill(reader, &mut bytes)? {
        return Ok(None);
    }
    let mut c = Cursor::new(&bytes);
    let (Some(start), Some(chunks), Some(rows), Some(digests)) = (c.u64_le(), c.u32_le(), c.u32_le(), c.u32_le())
    else {
        return Ok(None);
    };
    let body = rows as usize * ROW + digests as usize * DIGEST;
    if body > RECORD_MAX {
        return Ok(None);
    }
    bytes.resize(RECORD_HEAD + body + 4, 0);
    if !fill(reader, bytes.get_mut(RECORD_HEAD..).unwrap_or_default())? {
        return Ok(None);
    }
    let Some((whole, crc)) = bytes.split_last_chunk::<4>() else { return Ok(None) };
    if crc32c::crc32c(whole) != u32::from_le_bytes(*crc) {
        return Ok(None);
    }
    let mut c = Cursor::new(whole.get(RECORD_HEAD..).unwrap_or_default());
    let row = |c: &mut Cursor<'_>| Some(Row { hash: c.array::<20>()? as Hash, variant: 0, block: c.u32_le()? });
    let digest = |c: &mut Cursor<'_>| Some((c.u64_le()?, c.array()?));
    let rows: Option<Vec<Row>> = (0..rows).map(|_| row(&mut c)).collect();
    let digests: Option<Vec<Chunk>> = (0..digests).map(|_| digest(&mut c)).collect();
    let (Some(rows), Some(digests), Some(end)) = (rows, digests, start.checked_add(u64::from(chunks))) else {
        return Ok(None);
    };
    Ok(Some((Record { chunks: start..end, rows, digests }, bytes.len() as u64)))
}

/// False if there is not so much any more.
fn fill(reader: &mut impl Read, bytes: &mut [u8]) -> io::Result<bool> {
    match reader.read_exact(bytes) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(e) => Err(e),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fingerprint::{Algorithm, hash_block};

    fn rows(from: u32, count: u32) -> Vec<Row> {
        let row = |n: u32| Row { hash: hash_block(Algorithm::Sha1, &(n % 700).to_le_bytes()), variant: 0, block: n };
        (from..from + count).map(row).collect()
    }

    #[test]
    fn rows_come_out_sorted_and_a_cut_log_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l");
        let log = ScanLog::open(&path, &[1; 32]).unwrap();
        log.append(&(4..8), &rows(1000, 500), &[(5, [5; 32])]).unwrap();
        log.append(&(0..4), &rows(0, 300), &[(0, [1; 32]), (2, [2; 32])]).unwrap();
        drop(log);
        // The second record is cut off.
        let len = std::fs::metadata(&path).unwrap().len();
        options().open(&path).unwrap().set_len(len - 1).unwrap();
        let log = ScanLog::open(&path, &[1; 32]).unwrap();
        assert!(log.has(&(4..8)) && !log.has(&(0..4)) && !log.has(&(4..7)));
        assert_eq!((log.count(), log.digests()), (500, vec![(5, [5; 32])]));
        log.append(&(0..4), &rows(0, 300), &[(0, [1; 32]), (2, [2; 32])]).unwrap();
        assert_eq!(log.digests().iter().map(|d| d.0).collect::<Vec<_>>(), [0, 2, 5]);
        let mut want = [rows(0, 300), rows(1000, 500)].concat();
        want.sort();
        for limit in [1, 100, 10_000] {
            let log = ScanLog::open(&path, &[1; 32]).unwrap();
            assert_eq!(log.rows(limit, 2).collect::<Result<Vec<Row>>>().unwrap(), want, "{limit}");
        }
        // Another file under the name: all begins anew.
        let log = ScanLog::open(&path, &[2; 32]).unwrap();
        assert_eq!((log.count(), log.has(&(4..8))), (0, false));
    }

    #[test]
    fn a_damaged_record_ends_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("l");
        let log = ScanLog::open(&path, &[1; 32]).unwrap();
        log.append(&(0..4), &rows(0, 30), &[]).unwrap();
        log.append(&(4..8), &rows(30, 30), &[]).unwrap();
        drop(log);
        let good = std::fs::read(&path).unwrap();
        for at in (HEADER..good.len()).step_by(7) {
            let mut bad = good.clone();
            bad[at] ^= 2;
            std::fs::write(&path, &bad).unwrap();
            assert!(ScanLog::open(&path, &[1; 32]).unwrap().count() <= 30, "byte {at}");
        }
    }
}
