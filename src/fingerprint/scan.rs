//! Reads an image once, on all cores, and makes its fingerprints and its digest.
//!
//! The unit of work is the chunk of the digest (1 MiB): a worker reads what of it is data, hashes its non-zero blocks
//! and, if there are any, the chunk. What running VMs have in the page cache stays there ([`crate::io::cold`]). There are
//! twice as many workers as cores, so that some hash while others wait for the disk.
//!
//! The rows of an image are held in memory, 28 bytes a non-zero block, or go to a [`ScanLog`] as they come.

use super::chunks::Chunk;
use super::digest::{self, CHUNK_BYTES, CHUNK_SIZE};
use super::extents::data_extents;
use super::log::ScanLog;
use super::{Algorithm, BLOCK_BYTES, Row, hash_block};
use crate::error::{Error, ErrorKind, Result};
use crate::io::cold::{Cold, Pages};
use crate::units::{BLOCK_SIZE, IMAGE_SIZE_MAX, is_zero};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// Chunks that a worker takes at a time: one disk request of some MiB.
const CHUNKS_PER_PIECE: u64 = 4;

/// An image to read, and how.
pub struct Job<'a> {
    /// The open raw file.
    pub file: &'a File,
    /// The same, to be read.
    pub cold: &'a Cold,
    /// Its name, for errors.
    pub path: &'a Path,
    /// Bytes of the image.
    pub size: u64,
    /// How to fingerprint.
    pub algorithm: Algorithm,
    /// Workers.
    pub threads: usize,
    /// Set by somebody else to end the work early.
    pub stop: &'a AtomicBool,
    /// Told how many bytes of data were hashed since the last call.
    pub advance: &'a (dyn Fn(u64) + Sync),
    /// Where rows go, instead of memory; what is in it already is not read again.
    pub log: Option<&'a ScanLog>,
}

/// What an image holds.
#[derive(Debug, PartialEq)]
pub struct Scan {
    /// The non-zero blocks, sorted by (hash, block); all variants are 0. Fewer than 2^32. Empty if they went to a log.
    pub rows: Vec<Row>,
    /// How many they are.
    pub count: u64,
    /// See [`digest`].
    pub digest: [u8; 32],
    /// What the digest is made of: the chunks that are not all zero, ascending.
    pub chunks: Vec<Chunk>,
}

/// Bytes of data (not holes) that [`scan`] will read and report to `advance`.
pub fn data_bytes(file: &File, path: &Path, size: u64) -> Result<u64> {
    let extents = data_extents(file, size).map_err(|e| Error::io(path, "find its holes", e))?;
    Ok(extents.iter().map(|e| e.end - e.start).sum())
}

/// Fingerprints the image.
///
/// # Errors
/// `Interrupted` when `stop` was set, `Changed` when the file ends before `size`, `Io` when it cannot be read.
pub fn scan(job: &Job) -> Result<Scan> {
    let extents = data_extents(job.file, job.size).map_err(|e| Error::io(job.path, "find its holes", e))?;
    scan_pieces(job, &extents, &pieces(&extents))
}

/// Fingerprints only the chunks with these indices, ascending; the digest is of no use then.
///
/// # Errors
/// As for [`scan`].
pub fn scan_chunks(job: &Job, chunks: &[u64]) -> Result<Scan> {
    let extents = data_extents(job.file, job.size).map_err(|e| Error::io(job.path, "find its holes", e))?;
    let pieces: Vec<Range<u64>> = chunks.iter().map(|&chunk| chunk..chunk + 1).collect();
    scan_pieces(job, &extents, &pieces)
}

fn scan_pieces(job: &Job, extents: &[Range<u64>], pieces: &[Range<u64>]) -> Result<Scan> {
    if job.size > IMAGE_SIZE_MAX {
        return Err(Error::file(ErrorKind::Unsupported, job.path, "larger than 16 TiB"));
    }
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let parts = thread::scope(|scope| {
        let worker = || {
            let part = work(job, extents, pieces, &next, &failed);
            failed.fetch_or(part.is_err(), Ordering::Relaxed);
            part
        };
        let workers: Vec<_> = (0..job.threads.max(1) * 2).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    // The first error in order is the one to tell; the other workers merely stopped early.
    let parts: Vec<Part> = Result::from_iter::<Vec<Result<Part>>>(parts)?;
    let mut rows = Vec::with_capacity(parts.iter().map(|p| p.rows.len()).sum());
    let mut chunks = Vec::new();
    for part in parts {
        rows.extend_from_slice(&part.rows);
        chunks.extend(part.chunks);
    }
    chunks.sort_unstable_by_key(|c| c.0);
    let mut count = rows.len() as u64;
    if let Some(log) = job.log {
        (count, chunks) = (log.count(), log.digests());
    }
    if u32::try_from(count).is_err() {
        return Err(Error::file(ErrorKind::Unsupported, job.path, "16 TiB without a zero block are too many"));
    }
    sort(&mut rows, job.threads);
    Ok(Scan { rows, count, digest: digest::image(job.size, &chunks), chunks })
}

/// What one worker found.
#[derive(Default)]
struct Part {
    rows: Vec<Row>,
    chunks: Vec<Chunk>,
}

/// Ranges of chunk indices that hold data, ascending and apart, each of a few chunks.
fn pieces(extents: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut out: Vec<Range<u64>> = Vec::new();
    for extent in extents {
        let mut at = (extent.start / CHUNK_SIZE).max(out.last().map_or(0, |p| p.end));
        let end = extent.end.div_ceil(CHUNK_SIZE);
        while at < end {
            match out.last_mut() {
                Some(last) if last.end == at && last.end - last.start < CHUNKS_PER_PIECE => last.end += 1,
                _ => out.push(at..at + 1),
            }
            at += 1;
        }
    }
    out
}

fn work(
    job: &Job,
    extents: &[Range<u64>],
    pieces: &[Range<u64>],
    next: &AtomicUsize,
    failed: &AtomicBool,
) -> Result<Part> {
    let mut part = Part::default();
    let mut buf = vec![0u8; CHUNK_BYTES];
    let mut pages = Pages::new(CHUNK_SIZE).map_err(|e| Error::io(job.path, "find memory to read", e))?;
    while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
        if job.log.is_some_and(|log| log.has(piece)) {
            (job.advance)(data_in(extents, piece));
            continue;
        }
        for index in piece.clone() {
            if failed.load(Ordering::Relaxed) {
                return Ok(part);
            }
            if job.stop.load(Ordering::Relaxed) {
                return Err(Error::file(ErrorKind::Interrupted, job.path, "stopped while it was read"));
            }
            let start = index * CHUNK_SIZE;
            let bytes = &mut buf[..part_len(start, job.size)];
            let data = read_chunk(job, extents, start, bytes, &mut pages)?;
            hash_chunk(job.algorithm, index, bytes, &mut part);
            (job.advance)(data);
        }
        if let Some(log) = job.log {
            log.append(piece, &part.rows, &part.chunks)?;
            part = Part::default();
        }
    }
    Ok(part)
}

/// Bytes of data in a piece.
fn data_in(extents: &[Range<u64>], piece: &Range<u64>) -> u64 {
    let (start, end) = (piece.start * CHUNK_SIZE, piece.end * CHUNK_SIZE);
    let first = extents.partition_point(|e| e.end <= start);
    let inside = extents[first..].iter().take_while(|e| e.start < end);
    inside.map(|e| e.end.min(end) - e.start.max(start)).sum()
}

/// Fills `bytes` with what is at `start`: reads the data, zeroes the holes (reading a hole would fill the page cache
/// with zeros). Returns how many bytes were data.
fn read_chunk(job: &Job, extents: &[Range<u64>], start: u64, bytes: &mut [u8], pages: &mut Pages) -> Result<u64> {
    let end = start + bytes.len() as u64;
    let first = extents.partition_point(|e| e.end <= start);
    let mut data = 0;
    let mut filled = start;
    for extent in extents[first..].iter().take_while(|e| e.start < end) {
        let (from, to) = (extent.start.max(start), extent.end.min(end));
        bytes[part_len(start, filled)..part_len(start, from)].fill(0);
        // Whole pages are read; what is before an extent in its first one is a hole, and reads as zeros.
        let page = from - from % BLOCK_SIZE;
        let read = job.cold.read(page, to - page, pages).map_err(|e| read_error(job.path, e))?;
        bytes[part_len(start, from)..part_len(start, to)].copy_from_slice(&read[part_len(page, from)..]);
        filled = to;
        data += to - from;
    }
    bytes[part_len(start, filled)..].fill(0);
    Ok(data)
}

/// Bytes from `start` to `end`, but no more than a chunk has.
fn part_len(start: u64, end: u64) -> usize {
    usize::try_from(end.saturating_sub(start)).map_or(CHUNK_BYTES, |len| len.min(CHUNK_BYTES))
}

/// The error of a read that was inside the file when it was opened.
fn read_error(path: &Path, e: io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::UnexpectedEof => Error::file(ErrorKind::Changed, path, "became shorter while it was read"),
        _ => Error::io(path, "read", e),
    }
}

fn hash_chunk(algorithm: Algorithm, index: u64, bytes: &[u8], part: &mut Part) {
    let before = part.rows.len();
    let first = index * (CHUNK_SIZE / BLOCK_SIZE);
    for (i, block) in (first..).zip(bytes.chunks(BLOCK_BYTES)) {
        // `scan` refuses images of more than 2^32 blocks.
        if let Ok(number) = u32::try_from(i)
            && !is_zero(block)
        {
            part.rows.push(Row { hash: hash_block(algorithm, block), variant: 0, block: number });
        }
    }
    if part.rows.len() > before {
        part.chunks.push((index, digest::chunk(bytes)));
    }
}

/// Sorts on several cores: around the median each half is sorted on its own.
pub fn sort(rows: &mut [Row], threads: usize) {
    const WORTH_A_THREAD: usize = 50_000;
    if threads <= 1 || rows.len() < WORTH_A_THREAD {
        rows.sort_unstable();
        return;
    }
    let middle = rows.len() / 2;
    rows.select_nth_unstable(middle);
    let (low, high) = rows.split_at_mut(middle);
    thread::scope(|scope| {
        scope.spawn(|| sort(low, threads / 2));
        sort(high, threads - threads / 2);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;

    /// One thread, whole file in memory, as plain as can be.
    fn plain(bytes: &[u8]) -> Scan {
        let mut rows: Vec<Row> = (0u32..)
            .zip(bytes.chunks(4096))
            .filter(|(_, b)| b.iter().any(|&x| x != 0))
            .map(|(block, b)| Row { hash: hash_block(Algorithm::Sha1, b), variant: 0, block })
            .collect();
        rows.sort();
        let mut hasher = blake3::Hasher::new();
        hasher.update(b"vmar content digest 1\n").update(&(bytes.len() as u64).to_le_bytes());
        let mut chunks = Vec::new();
        for (i, chunk) in (0u64..).zip(bytes.chunks(1 << 20)) {
            if chunk.iter().any(|&x| x != 0) {
                hasher.update(&i.to_le_bytes()).update(blake3::hash(chunk).as_bytes());
                chunks.push((i, *blake3::hash(chunk).as_bytes()));
            }
        }
        Scan { count: rows.len() as u64, rows, digest: *hasher.finalize().as_bytes(), chunks }
    }

    fn scan_file(file: &File, size: u64, threads: usize) -> (Result<Scan>, u64) {
        let told = std::sync::atomic::AtomicU64::new(0);
        let cold = Cold::new(file.try_clone().unwrap(), size).unwrap();
        let job = Job {
            file,
            cold: &cold,
            path: Path::new("t"),
            size,
            algorithm: Algorithm::Sha1,
            threads,
            stop: &AtomicBool::new(false),
            advance: &|n| {
                told.fetch_add(n, Ordering::Relaxed);
            },
            log: None,
        };
        let out = scan(&job);
        (out, told.into_inner())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn holes_zeros_and_a_short_end_do_not_matter(
            sectors in 1u64..20_000,
            spots in prop::collection::vec((0u64..10_000_000, 1usize..9000, 0u8..3), 0..20),
            threads in 1usize..4,
        ) {
            let file = tempfile::tempfile().unwrap();
            let size = sectors * 512;
            file.set_len(size).unwrap();
            let mut bytes = vec![0u8; size as usize];
            for (at, len, value) in spots {
                let at = at.min(size - 1) as usize;
                let len = len.min(bytes.len() - at);
                bytes[at..at + len].fill(value);
                file.write_all_at(&bytes[at..at + len], at as u64).unwrap();
            }
            let (got, told) = scan_file(&file, size, threads);
            prop_assert_eq!(got.unwrap(), plain(&bytes));
            prop_assert_eq!(told, data_bytes(&file, Path::new("t"), size).unwrap());
        }
    }

    /// Stopped somewhere, with a log: the next scan reads the rest, and all of it comes out.
    #[test]
    fn a_scan_goes_on_where_it_was_stopped() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..20u32 << 20).map(|i| (i >> 12) as u8 ^ (i >> 20) as u8).collect();
        file.write_all_at(&bytes, 0).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let size = bytes.len() as u64;
        let cold = Cold::new(file.try_clone().unwrap(), size).unwrap();
        let stop = AtomicBool::new(false);
        let read = std::sync::atomic::AtomicU64::new(0);
        let run = |stop_at: u64| {
            let log = ScanLog::open(&dir.path().join("l"), &[3; 32]).unwrap();
            read.store(0, Ordering::Relaxed);
            stop.store(false, Ordering::Relaxed);
            let advance = |n| {
                if read.fetch_add(n, Ordering::Relaxed) + n >= stop_at {
                    stop.store(true, Ordering::Relaxed);
                }
            };
            let path = Path::new("t");
            let algorithm = Algorithm::Sha1;
            let job = Job {
                file: &file,
                cold: &cold,
                path,
                size,
                algorithm,
                threads: 1,
                stop: &stop,
                advance: &advance,
                log: Some(&log),
            };
            scan(&job).map(|scan| (scan, log))
        };
        assert_eq!(run(9 << 20).err().unwrap().kind(), ErrorKind::Interrupted);
        let kept = ScanLog::open(&dir.path().join("l"), &[3; 32]).unwrap().count();
        assert!(kept > 0 && kept < 5120, "{kept}");
        let (scan, log) = run(u64::MAX).unwrap();
        let want = plain(&bytes);
        assert_eq!((scan.digest, scan.chunks, scan.count), (want.digest, want.chunks, want.count));
        assert_eq!(log.rows(1000, 1).collect::<Result<Vec<Row>>>().unwrap(), want.rows);
    }

    #[test]
    fn a_shorter_file_and_a_stop_are_errors() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 8192], 0).unwrap();
        // A file system that knows no holes reports data up to the size asked for.
        let cold = Cold::new(file.try_clone().unwrap(), 12288).unwrap();
        let job = Job {
            file: &file,
            cold: &cold,
            path: Path::new("t"),
            size: 12288,
            algorithm: Algorithm::Sha1,
            threads: 1,
            stop: &AtomicBool::new(true),
            advance: &|_| {},
            log: None,
        };
        assert_eq!(scan(&job).unwrap_err().kind(), ErrorKind::Interrupted);
        let mut buf = [0; 12288];
        let mut pages = Pages::new(CHUNK_SIZE).unwrap();
        let err = read_chunk(&job, std::slice::from_ref(&(0..12288)), 0, &mut buf, &mut pages).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Changed);
    }

    #[test]
    fn parallel_sort_sorts() {
        let row = |i: u32| Row { hash: hash_block(Algorithm::Sha1, &(i % 9000).to_le_bytes()), variant: 0, block: i };
        let mut rows: Vec<Row> = (0..200_000).map(row).collect();
        sort(&mut rows, 3);
        assert!(rows.is_sorted());
    }
}
