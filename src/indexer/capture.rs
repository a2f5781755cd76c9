//! Makes an image of what a VM left: a base image and its overlay. Only what the overlay has changed is hashed; the rest is
//! known of the base.

use super::add::{Added, Fingerprints, RawFile, Rows, described, enter, make_read_only, open_cold};
use super::change::Change;
use super::remap::Proved;
use super::stats::open_run;
use super::{Work, read_map};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::chunks::{self, Chunk};
use crate::fingerprint::digest::{self, CHUNK_SIZE};
use crate::fingerprint::{Row, scan};
use crate::image::Format;
use crate::library::{ImageRecord, Library, Source, Writer, check_name, made_file, open_regular};
use crate::units::BLOCK_SIZE;
use std::collections::BTreeSet;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Blocks of a chunk.
const CHUNK_BLOCKS: u64 = CHUNK_SIZE / BLOCK_SIZE;

/// What is captured.
pub struct Capture<'a> {
    /// What to call the new image.
    pub name: &'a str,
    /// The overlay's base, an image of the library.
    pub base: &'a ImageRecord,
    /// The overlay, which is remembered.
    pub overlay: &'a Path,
    /// Bytes of the disk.
    pub size: u64,
    /// The bytes that the overlay has, ascending and apart.
    pub changed: &'a [Range<u64>],
    /// Writes base (first path) and overlay together to a new file (second path).
    pub write: &'a dyn Fn(&Path, &Path) -> Result<()>,
}

/// Adds the image.
///
/// # Errors
/// As for [`super::add::add`].
pub fn capture(writer: &mut Writer, capture: &Capture<'_>, work: &Work) -> Result<Added> {
    check_name(capture.name)?;
    if writer.library().image(capture.name).is_ok() {
        let cause = "there is an image of this name already";
        return Err(Error::new(ErrorKind::Exists, capture.name, cause).mend("use another name"));
    }
    let mut change = Change::begin(writer, work)?;
    let id = change.next_id()?;
    let goal = made_file(capture.name, id);
    let raw = change.transaction.stage(&goal)?;
    let library = change.transaction.library();
    // What the base's fingerprints say must still be so.
    library.open_image(capture.base)?;
    (capture.write)(&library.image_path(capture.base), &raw)?;
    let source = Source { format: Format::Qcow2, path: capture.overlay.to_path_buf() };
    let place = RawFile { raw, made: Some(goal), source: Some(source) };
    let found = fingerprint(library, capture, id, place, work)?;
    let added = enter(&mut change, found, work)?;
    change.commit(|_| {}, work)?;
    make_read_only(&writer.library().image_path(&added.record));
    Ok(added)
}

/// Hashes the chunks that the overlay has changed, and takes the others from the base.
fn fingerprint(
    library: &Library,
    capture: &Capture<'_>,
    id: crate::units::ImageId,
    place: RawFile,
    work: &Work,
) -> Result<Fingerprints> {
    let Capture { name, base, size, changed, .. } = *capture;
    let file = open_regular(&place.raw)?;
    let touched = touched_chunks(base.size, size, changed);
    let of_base = read_chunks(library, base)?;
    let algorithm = library.catalog().fingerprint;
    let known = of_base.filter(|_| base.fingerprint == algorithm);
    let bytes = touched.len() as u64 * CHUNK_SIZE;
    work.observer.begin(&format!("hashing {name}"), bytes);
    let advance = |bytes| work.observer.advance(bytes);
    let cold = open_cold(&file, &place.raw, size)?.keep_for_now(bytes);
    let job = scan::Job {
        file: &file,
        cold: &cold,
        path: &place.raw,
        size,
        algorithm,
        threads: work.threads,
        stop: work.stop,
        advance: &advance,
        log: None,
    };
    let began = Instant::now();
    let mut scanned = match &known {
        Some(_) => scan::scan_chunks(&job, &touched.iter().copied().collect::<Vec<_>>())?,
        // The base was added by a vmar that kept no chunks.
        None => scan::scan(&job)?,
    };
    if let Some(known) = known {
        merge_base(library, base, &touched, known, &mut scanned, work)?;
        scanned.digest = digest::image(size, &scanned.chunks);
        scanned.count = scanned.rows.len() as u64;
    }
    let hash_time = began.elapsed();
    work.observer.end();
    let proved = Proved::by(read_map(library, base)?, changed_blocks(&touched));
    let side = described(library, name, id, place, file, &scanned)?;
    let scan::Scan { rows, chunks, .. } = scanned;
    Ok(Fingerprints {
        side,
        rows: Rows::Memory(rows),
        chunks,
        data_bytes: bytes,
        convert_time: None,
        hash_time,
        proved: Some(proved),
        _cold: cold,
    })
}

/// The chunks that can differ from the base's: those that the overlay has a byte of, and those from where the base ends.
fn touched_chunks(base_size: u64, size: u64, changed: &[Range<u64>]) -> BTreeSet<u64> {
    let grown = (size > base_size).then_some(base_size..size);
    let ranges = changed.iter().cloned().chain(grown).filter(|r| !r.is_empty());
    ranges.flat_map(|r| r.start / CHUNK_SIZE..r.end.div_ceil(CHUNK_SIZE)).collect()
}

fn changed_blocks(touched: &BTreeSet<u64>) -> Vec<Range<u64>> {
    touched.iter().map(|chunk| chunk * CHUNK_BLOCKS..(chunk + 1) * CHUNK_BLOCKS).collect()
}

/// Adds rows and chunks of the base where nothing was touched.
fn merge_base(
    library: &Library,
    base: &ImageRecord,
    touched: &BTreeSet<u64>,
    known: Vec<Chunk>,
    scanned: &mut scan::Scan,
    work: &Work,
) -> Result<()> {
    scanned.chunks.extend(known.into_iter().filter(|(index, _)| !touched.contains(index)));
    scanned.chunks.sort_unstable_by_key(|(index, _)| *index);
    for row in open_run(library, base)? {
        let row = row?;
        if !touched.contains(&(u64::from(row.block) / CHUNK_BLOCKS)) {
            // Which content of its hash it is comes out again.
            scanned.rows.push(Row { variant: 0, ..row });
        }
    }
    scan::sort(&mut scanned.rows, work.threads);
    Ok(())
}

/// The chunks of an image's digest; `None` if it was added by a vmar that kept none.
pub(super) fn read_chunks(library: &Library, record: &ImageRecord) -> Result<Option<Vec<Chunk>>> {
    let Some(file) = &record.chunks else { return Ok(None) };
    let path: PathBuf = library.dir().join(&file.file);
    let mend = "make everything anew with 'vmar library rebuild'";
    let bytes = fs::read(&path).map_err(|e| Error::io(&path, "read it", e).mend(mend))?;
    let corrupt = |cause: String| Error::file(ErrorKind::Corrupt, &path, cause).mend(mend);
    if bytes.len() as u64 != file.bytes || crc32c::crc32c(&bytes) != file.crc32c {
        return Err(corrupt("its checksum is wrong".to_string()));
    }
    chunks::decode(&bytes).map(Some).map_err(corrupt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_overlay_touches() {
        const M: u64 = CHUNK_SIZE;
        let touched =
            |base, size, changed: &[Range<u64>]| touched_chunks(base, size, changed).into_iter().collect::<Vec<_>>();
        assert!(touched(4 * M, 4 * M, &[]).is_empty());
        assert_eq!(touched(4 * M, 4 * M, std::slice::from_ref(&(M - 1..M + 1))), [0, 1]);
        assert_eq!(touched(4 * M, 4 * M, &[M..2 * M, 3 * M..3 * M + 1]), [1, 3]);
        assert_eq!(touched(2 * M + 512, 4 * M, &[]), [2, 3], "the base's last chunk was short");
    }
}
