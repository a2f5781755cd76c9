//! Images go, get another content, another name, or come from a VM's overlay (paper, figure 7: `update_map`). Images that
//! read from one that goes are followed up first, and all of it is one change: there is no instant at which a map points
//! to what is not there.

use super::add::{Added, enter, fingerprint_file, make_read_only};
use super::change::Change;
use super::remap::{Remapped, dependants, remap_one};
use super::{Work, read_map};
use crate::error::{Error, ErrorKind, Result};
use crate::image::probe;
use crate::library::{ImageRecord, Library, Writer, check_name, kept_name, map_file};
use crate::units::ImageId;
use std::fs;
use std::path::Path;

/// What a removal does, or would do.
#[derive(Clone, Debug)]
pub struct Removal {
    /// The image that goes.
    pub record: ImageRecord,
    /// Images whose maps follow, with what their new maps say; without `publish` too.
    pub followed: Vec<Remapped>,
    /// The raw file goes too, since vmar made it.
    pub file_goes: bool,
}

/// Removes an image. Its raw file stays, unless vmar made it.
///
/// # Errors
/// Whatever stops it leaves the library as it was. Whether overlays or servers need the image is for the caller to ask.
pub fn remove(writer: &mut Writer, name: &str, publish: bool, work: &Work) -> Result<Removal> {
    let record = writer.library().image(name)?.clone();
    let mut change = Change::begin(writer, work)?;
    let behind = dependants(&change, &[record.id.0])?;
    change.remove(&record, false);
    let followed = follow(&mut change, &behind, work)?;
    if publish {
        change.commit(|_| {}, work)?;
    }
    Ok(Removal { file_goes: record.owned(), record, followed })
}

/// New maps for the images that read from what is gone.
fn follow(change: &mut Change<'_>, behind: &[ImageRecord], work: &Work) -> Result<Vec<Remapped>> {
    let mut out = Vec::with_capacity(behind.len());
    for record in behind {
        let old = read_map(change.transaction.library(), record)?;
        out.push(remap_one(change, record, Some(old), work)?);
    }
    Ok(out)
}

/// What an update did.
#[derive(Clone, Debug)]
pub struct Updated {
    /// The new content.
    pub added: Added,
    /// The name under which the old content stays, if it does.
    pub kept: Option<String>,
    /// Images whose maps follow.
    pub followed: Vec<Remapped>,
}

/// Gives an image another content: that of `file`. It gets a new ID and the next generation; the old content goes, or stays
/// as `NAME@GENERATION` if `keep`.
///
/// # Errors
/// As for [`remove`] and [`super::add::add`].
pub fn update(writer: &mut Writer, name: &str, file: &Path, keep: bool, work: &Work) -> Result<Updated> {
    check_name(name)?;
    let old = writer.library().image(name)?.clone();
    let from = probe(file)?;
    let mut change = Change::begin(writer, work)?;
    let mut behind = Vec::new();
    if keep {
        keep_generation(&mut change, &old)?;
    } else {
        behind = dependants(&change, &[old.id.0])?;
        change.remove(&old, true);
    }
    let id = change.next_id()?;
    let mut found = fingerprint_file(&mut change, name, id, &from, work)?;
    found.side.record.generation = old.generation + 1;
    let added = enter(&mut change, found, work)?;
    let followed = follow(&mut change, &behind, work)?;
    let kept = keep.then(|| kept_name(name, old.generation));
    change.commit(
        |catalog| {
            if let (Some(kept), Some(found)) = (&kept, catalog.images.iter_mut().find(|r| r.id == old.id)) {
                found.name.clone_from(kept);
            }
        },
        work,
    )?;
    make_read_only(&writer.library().image_path(&added.record));
    Ok(Updated { added, kept, followed })
}

/// The old content keeps its map, under another name.
fn keep_generation(change: &mut Change<'_>, old: &ImageRecord) -> Result<()> {
    let kept = map_file(&kept_name(&old.name, old.generation));
    let from = change.transaction.library().map_path(&old.name);
    let to = change.transaction.stage(&kept)?;
    fs::copy(&from, &to).map_err(|e| Error::io(&from, "copy it", e))?;
    Ok(())
}

/// Gives an image another name; older contents that were kept go with it.
///
/// # Errors
/// `NotFound` and `Exists`, for the names.
pub fn rename(writer: &mut Writer, old: &str, new: &str) -> Result<Vec<(String, String)>> {
    check_name(old)?;
    check_name(new)?;
    writer.library().image(old)?;
    if writer.library().image(new).is_ok() {
        return Err(
            Error::new(ErrorKind::Exists, new, "there is an image of this name already").mend("use another name")
        );
    }
    let renamed: Vec<(ImageId, String, String)> = writer
        .library()
        .images()
        .iter()
        .filter_map(|r| Some((r.id, r.name.clone(), renamed(&r.name, old, new)?)))
        .collect();
    let mut transaction = writer.begin();
    for (_, from, to) in &renamed {
        let source = transaction.library().map_path(from);
        let path = transaction.stage(&map_file(to))?;
        fs::copy(&source, &path).map_err(|e| Error::io(&source, "copy it", e))?;
        transaction.remove(Path::new(&map_file(from)));
    }
    transaction.commit(|catalog| {
        for record in &mut catalog.images {
            if let Some((_, _, to)) = renamed.iter().find(|(id, ..)| *id == record.id) {
                record.name.clone_from(to);
            }
        }
    })?;
    Ok(renamed.into_iter().map(|(_, from, to)| (from, to)).collect())
}

fn renamed(name: &str, old: &str, new: &str) -> Option<String> {
    let rest = name.strip_prefix(old)?;
    (rest.is_empty() || rest.starts_with('@')).then(|| format!("{new}{rest}"))
}

/// Deletes raw files of images that were removed while somebody read them, as far as nobody does any more. `is_needed` says
/// of an image's ID and generation whether a server still has a map with it.
///
/// # Errors
/// When the catalog cannot be written; a file that cannot be removed is tried again the next time.
pub fn sweep(writer: &mut Writer, is_needed: impl Fn(ImageId, u64) -> bool) -> Result<usize> {
    let library = writer.library().clone();
    let gone: Vec<ImageId> = library
        .catalog()
        .removed
        .iter()
        .filter(|r| !is_needed(r.id, r.generation) && delete(&library, &r.path))
        .map(|r| r.id)
        .collect();
    if !gone.is_empty() {
        writer.update(|catalog| catalog.removed.retain(|r| !gone.contains(&r.id)))?;
    }
    Ok(gone.len())
}

/// True if the file is gone. One that somebody has open (a server, or QEMU) stays: on a network file system it would vanish
/// under them.
fn delete(library: &Library, path: &Path) -> bool {
    let path = library.dir().join(path);
    let in_use = fs::File::open(&path).is_ok_and(|file| crate::io::lock::in_use(&file, &path).unwrap_or(true));
    if in_use {
        return false;
    }
    match fs::remove_file(&path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            log::warn!("{}: cannot remove it: {e}", path.display());
            false
        }
        _ => true,
    }
}
