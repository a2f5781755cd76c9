//! Mends blocks of an image that are not what was added any more: the images of a library are each other's backup, as far as
//! they hold the same contents.
//!
//! ```text
//! check ─ bad blocks ─ who holds their contents? ─ read and hash ─ write in place ─ make durable ─ check everything again
//! ```
//!
//! Nothing is made worse: only bytes that have the hash of the block are written, only where the block is bad, and one block
//! at a time. Whoever dies on the way leaves blocks that are bad or good; the modification time may be new, and then
//! [`super::verify`] has to look at the bytes before the image is served again.
//!
//! The file stays the same one, so whoever reads it through the page cache (every `vmar serve`, QEMU without `cache=none`)
//! sees the mended bytes at once; who reads past the cache sees them when they are durable, which is before this ends.

use super::compare::Side;
use super::holders::{Content, contents_of, holders};
use super::stats::open_run;
use super::verify::bytes::{self, Expected};
use super::verify::{accept_mtime, check_bytes, open};
use super::{Work, verify};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::BLOCK_BYTES;
use crate::io::lock::{Access, lock};
use crate::library::{Library, Writer, mtime_ns, settle_mtime};
use crate::units::{BLOCK_SIZE, ImageId, to_usize};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, Metadata, Permissions};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

/// Blocks of an image that are tried for each content: they may be bad too.
const TRIED_PER_IMAGE: usize = 8;

/// What to mend, and how far to go.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// This block only; otherwise all bad ones.
    pub block: Option<u32>,
    /// Only look.
    pub dry_run: bool,
    /// Write into an image file that vmar did not make.
    pub in_place: bool,
}

/// Where the bytes of a bad block come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cure {
    /// It has to be zero.
    Zeros,
    /// Another block has the same content.
    Copy {
        /// Of this image.
        image: ImageId,
        /// Its name.
        name: String,
        /// The block.
        block: u32,
    },
}

/// What was found and done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Repaired {
    /// The bad blocks, ascending, and their cures: those with one are good now, unless it was a dry run.
    pub blocks: Vec<(u32, Option<Cure>)>,
    /// The whole image was read again and is what was added.
    pub good: bool,
}

/// Mends an image.
///
/// # Errors
/// `Usage` when the file is not vmar's and `in_place` is not set, `Corrupt` when a file of the library is damaged, `Busy`
/// when another process writes to the image or to the library.
pub fn repair(dir: &Path, name: &str, options: &Options, work: &Work) -> Result<Repaired> {
    // Held to the end: no sibling goes away meanwhile.
    let mut writer = if options.dry_run { None } else { Some(Writer::open(dir)?) };
    let library = match &writer {
        Some(writer) => writer.library().clone(),
        None => Library::open(dir)?,
    };
    let side = open(&library, library.image(name)?)?;
    let before = side.file.metadata().map_err(|e| Error::io(&side.path, "look at it", e))?;
    if before.len() != side.record.size {
        library.check_identity(&side.record, &before)?;
    }
    if !options.dry_run {
        check_permission(&side, options)?;
        settle_mtime(&before);
    }
    let expected = Expected::new(side.record.fingerprint, open_run(&library, &side.record)?)?;
    let (bad, good) = find_bad(&library, &side, &expected, options.block, work)?;
    let cures = find_cures(&library, &side, &expected, &bad)?;
    let blocks: Vec<(u32, Option<Cure>)> =
        bad.iter().map(|b| (*b, cures.get(b).map(|(cure, _)| cure.clone()))).collect();
    match &mut writer {
        Some(writer) if !cures.is_empty() => {
            let all = cures.len() == bad.len();
            let good = mend(writer, &side, &before, &cures, all, work)?;
            Ok(Repaired { blocks, good })
        }
        // Killed when all was written, a repair has left a new modification time to a good image.
        Some(writer) if good && mtime_ns(&before) != side.record.mtime_ns => {
            side.file.sync_all().map_err(|e| Error::io(&side.path, "make it durable", e))?;
            accept(writer, &side, &before)?;
            Ok(Repaired { blocks, good })
        }
        _ => Ok(Repaired { blocks, good }),
    }
}

/// The image was read wholly and is good: the catalog takes the modification time that it had before, and still has.
fn accept(writer: &mut Writer, side: &Side, before: &Metadata) -> Result<()> {
    let after = side.file.metadata().map_err(|e| Error::io(&side.path, "look at it", e))?;
    if mtime_ns(&after) != mtime_ns(before) {
        let cause = format!("image {} was written to while it was verified", side.record.name);
        return Err(Error::file(ErrorKind::Changed, &side.path, cause).mend("stop what writes to it and try again"));
    }
    accept_mtime(writer, &side.record, mtime_ns(before))
}

/// vmar never changes an image file that it did not make, unless it is told to.
fn check_permission(side: &Side, options: &Options) -> Result<()> {
    if side.record.owned() || options.in_place {
        return Ok(());
    }
    let cause = "vmar did not make this file, and changes it only if it is told to";
    Err(Error::new(ErrorKind::Usage, side.path.display(), cause)
        .mend("give --in-place to have its bad blocks written, or --dry-run to see which"))
}

/// The bad blocks, and whether the image was read wholly and is good.
fn find_bad(
    library: &Library,
    side: &Side,
    expected: &Expected,
    block: Option<u32>,
    work: &Work,
) -> Result<(Vec<u32>, bool)> {
    let Some(block) = block else {
        let found = check_bytes(side, expected, &bytes::chunks(side, expected)?, None, None, work)?;
        if found.bad.is_empty() || found.digest == side.record.digest {
            verify::judge(library, side, &found, true)?;
        }
        return Ok((found.bad, found.digest == side.record.digest));
    };
    if u64::from(block) >= side.record.blocks {
        let cause = format!("image {} has no block {block}", side.record.name);
        return Err(
            Error::new(ErrorKind::Usage, "--block", cause).mend(format!("give a number below {}", side.record.blocks))
        );
    }
    let mut buf = [0; BLOCK_BYTES];
    // A block that cannot be read is a bad one: a disk gives a bad sector another place when it is written.
    let is_good = match side.read(block, 1, &mut buf) {
        Ok(bytes) => expected.is_right(block, bytes),
        Err(err) if err.kind() == ErrorKind::Io => false,
        Err(err) => return Err(err),
    };
    Ok((if is_good { Vec::new() } else { vec![block] }, false))
}

type Cures = BTreeMap<u32, (Cure, Vec<u8>)>;

/// The cures of the bad blocks that have one, with the bytes, which have the right hash.
fn find_cures(library: &Library, side: &Side, expected: &Expected, bad: &[u32]) -> Result<Cures> {
    let all: BTreeSet<u32> = bad.iter().copied().collect();
    let contents = contents_of(library, &side.record, &all)?;
    let wanted: BTreeSet<Content> = contents.values().copied().collect();
    let known = holders(library, &side.record, &wanted, TRIED_PER_IMAGE)?;
    let mut files: HashMap<ImageId, Option<Side>> = HashMap::new();
    let mut out = Cures::new();
    for &block in bad {
        let len = to_usize(side.record.block_len(block));
        let Some(content) = contents.get(&block) else {
            out.insert(block, (Cure::Zeros, vec![0; len]));
            continue;
        };
        let all = known.get(content).map(Vec::as_slice).unwrap_or_default();
        let places = all.iter().flat_map(|h| h.blocks.iter().map(move |&b| (h.image, b)));
        for (image, from) in places.filter(|place| *place != (side.record.id, block)) {
            let sibling = files.entry(image).or_insert_with(|| open_sibling(library, image));
            let Some(sibling) = sibling else { continue };
            let mut buf = vec![0; BLOCK_BYTES];
            // A sibling that cannot be read is no cure, and no reason to give up.
            let read = sibling.read(from, 1, &mut buf).map(<[u8]>::len).unwrap_or(0);
            if read == len && expected.is_right(block, &buf[..len]) {
                buf.truncate(len);
                let name = sibling.record.name.clone();
                out.insert(block, (Cure::Copy { image, name, block: from }, buf));
                break;
            }
        }
    }
    Ok(out)
}

fn open_sibling(library: &Library, image: ImageId) -> Option<Side> {
    let sibling = library.image_by_id(image).and_then(|record| open(library, record));
    sibling.inspect_err(|err| log::info!("no help from image {image}: {err}")).ok()
}

/// Writes the cures and looks at the image again. True if it is wholly what was added; the catalog then has its new
/// modification time.
fn mend(
    writer: &mut Writer,
    side: &Side,
    before: &Metadata,
    cures: &Cures,
    all_cured: bool,
    work: &Work,
) -> Result<bool> {
    let record = &side.record;
    let file = open_writable(&side.path, before)?;
    match lock(&file, &side.path, Access::Read, Duration::ZERO) {
        // Without such locks nobody else has one either.
        Err(err) if err.kind() != ErrorKind::Unsupported => return Err(err),
        _ => {}
    }
    for (block, (_, bytes)) in cures {
        work.check_stop(&record.name)?;
        let at = u64::from(*block) * BLOCK_SIZE;
        file.write_all_at(bytes, at).map_err(|e| Error::io(&side.path, "write", e))?;
    }
    file.sync_all().map_err(|e| Error::io(&side.path, "make it durable", e))?;
    for &block in cures.keys() {
        // So that what is checked comes from the disk. Only a hint: pages that somebody uses stay.
        let at = u64::from(block) * BLOCK_SIZE;
        let _ = rustix::fs::fadvise(&file, at, NonZeroU64::new(BLOCK_SIZE), rustix::fs::Advice::DontNeed);
    }
    let meta = file.metadata().map_err(|e| Error::io(&side.path, "look at it", e))?;
    settle_mtime(&meta);
    let good = check_mended(writer.library(), side, cures, all_cured, work)?;
    if good {
        accept(writer, side, &meta)?;
    } else if mtime_ns(before) == record.mtime_ns {
        // Some blocks are still bad. The image served before, with more of them: it shall do so still.
        let time = before.modified().map_err(|e| Error::io(&side.path, "look at it", e))?;
        file.set_modified(time).and_then(|()| file.sync_all()).map_err(|e| Error::io(&side.path, "set its time", e))?;
    }
    Ok(good)
}

/// Reads the mended blocks' chunks, or all if all may be good, from the disk.
fn check_mended(library: &Library, side: &Side, cures: &Cures, all_cured: bool, work: &Work) -> Result<bool> {
    let expected = Expected::new(side.record.fingerprint, open_run(library, &side.record)?)?;
    let mut chunks = bytes::chunks(side, &expected)?;
    if !all_cured {
        let touched: BTreeSet<u64> = cures.keys().map(|&b| bytes::chunk_of(b)).collect();
        chunks.retain(|chunk| touched.contains(chunk));
    }
    let found = check_bytes(side, &expected, &chunks, None, None, work)?;
    match found.bad.iter().find(|block| cures.contains_key(block)) {
        Some(block) => {
            let cause = format!("block {block} was written and is still not what was added");
            Err(Error::file(ErrorKind::Io, &side.path, cause).mend("the disk fails: copy the image to another one"))
        }
        None => Ok(all_cured && found.digest == side.record.digest),
    }
}

/// Opens the file for writing, though images are made read-only; it must be the one that was looked at.
fn open_writable(path: &Path, before: &Metadata) -> Result<File> {
    let open = || File::options().read(true).write(true).open(path);
    let file = match open() {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
            // Its owner may write for as long as it takes to open it.
            let mode = before.permissions().mode();
            let set = |mode| fs::set_permissions(path, Permissions::from_mode(mode));
            set(mode | 0o200).map_err(|e| Error::io(path, "make it writable", e))?;
            let file = open();
            set(mode).map_err(|e| Error::io(path, "make it read-only", e))?;
            file
        }
        other => other,
    };
    let file = file.map_err(|e| Error::io(path, "open it for writing", e))?;
    let meta = file.metadata().map_err(|e| Error::io(path, "look at it", e))?;
    if (meta.dev(), meta.ino(), mtime_ns(&meta)) != (before.dev(), before.ino(), mtime_ns(before)) {
        return Err(Error::file(ErrorKind::Changed, path, "was written to or replaced while it was looked at")
            .mend("stop what writes to it and try again"));
    }
    Ok(file)
}
