//! Rewrites an overlay into the fixed layout: one that QEMU has rearranged, one of format 1, or one that is to have room for
//! a larger disk. The new file is made beside the old one and takes its name by one rename, or gets a name of its own.

use super::bits::state_in_word;
use super::copy::{Copier, Named, Work};
use super::create::{NewFile, exists, plan, write_metadata};
use super::header::Session;
use super::layout::{CLUSTER, SUB, SUBS};
use super::live::{self, LiveId};
use super::source::Source;
use super::{CreateOptions, OpenOptions, Overlay, State, session};
use crate::error::{Error, ErrorKind, Result};
use crate::io::lock::{Access, WAIT, lock};
use crate::units::{IMAGE_SIZE_MAX, SECTOR_SIZE};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};

/// How to rewrite an overlay.
#[derive(Clone, Copy, Debug)]
pub struct RelayoutOptions<'a> {
    /// The new file; the old one is replaced if none is given.
    pub out: Option<&'a Path>,
    /// Bytes of the disk; as it is if not given. What is added reads as zeros.
    pub size: Option<u64>,
    /// Bytes that the disk can grow to; as it is, but not less than the disk, if not given.
    pub capacity: Option<u64>,
    /// Where live bitmaps are.
    pub state_dir: &'a Path,
    /// As for opening: go on with the state of the last flush where the alternative is a refusal.
    pub discard_unflushed: bool,
}

/// Rewrites the overlay at `path`. A kill or a power cut leaves the old file or the new one, each complete.
///
/// It needs room for a second copy of the data. Internal snapshots and compressed clusters are refused; dirty bitmaps of QEMU
/// are not taken along.
pub fn relayout(path: &Path, opts: &RelayoutOptions<'_>, work: &Work<'_>) -> Result<()> {
    // A rename would replace a symbolic link and not what it names.
    let path = &fs::canonicalize(path).map_err(|e| Error::io(path, "open", e))?;
    if let Some(out) = opts.out
        && fs::symlink_metadata(out).is_ok()
    {
        return Err(exists(out));
    }
    settle(path, opts)?;
    let mut source = Source::open(path)?;
    lock(&source.file, path, Access::Write, WAIT)?;
    check_named(&source.file, path)?;
    // Only now is it sure that nobody changes it.
    source = Source::of(path, source.file)?;
    let state = source.header.extension.session;
    if !opts.discard_unflushed && !state.is_closed() && state.boot == session::boot_id()? {
        return Err(unflushed(path));
    }
    let (size, capacity) = sizes(&source, opts)?;
    check_end(&mut source, size)?;
    let target = opts.out.unwrap_or(path);
    let new = if opts.out.is_some() { NewFile::create(target)? } else { NewFile::create_named(target)? };
    rewrite(&mut source, Named { file: &new.file, path: target }, size, capacity, work)?;
    if opts.out.is_some() {
        return new.publish(target);
    }
    keep_owner(&source.file, &new.file).map_err(|e| Error::io(path, "keep owner and mode of", e))?;
    new.replace(path)?;
    // Nothing speaks of the old file any more.
    if let Ok(id) = LiveId::of(&source.file, Session::CLOSED, 0) {
        live::remove_stale(opts.state_dir, &id);
    }
    Ok(())
}

/// Makes the disk in the overlay at `path`, which nobody uses, `size` bytes large: in place if it has room, otherwise by
/// [`relayout`]. What is added reads as zeros. `opts.size` is not looked at.
pub fn grow(path: &Path, size: u64, opts: &RelayoutOptions<'_>, work: &Work<'_>) -> Result<()> {
    let RelayoutOptions { state_dir, discard_unflushed, .. } = *opts;
    let header = Source::open(path)?.header;
    if size < header.size {
        let cause = format!("a disk of {} bytes cannot shrink to {size}: the guest may use what would go", header.size);
        return Err(Error::file(ErrorKind::Usage, path, cause).mend("give a larger size"));
    }
    let same_capacity = opts.capacity.is_none_or(|c| c == header.extension.capacity);
    if same_capacity
        && opts.out.is_none()
        && size <= header.extension.capacity
        && header.size >= header.extension.base.size
    {
        let overlay = Overlay::open(path, &OpenOptions { read_only: false, state_dir, base: None, discard_unflushed })?;
        // A size that cannot be leaves no session behind.
        let resized = overlay.resize(size);
        overlay.close()?;
        return resized;
    }
    relayout(path, &RelayoutOptions { size: Some(size), ..*opts }, work)
}

/// Finishes a session whose process was killed, if its live bitmap is there: what was not flushed goes into the file.
fn settle(path: &Path, opts: &RelayoutOptions<'_>) -> Result<()> {
    let state = Source::open(path)?.header.extension.session;
    if state.is_closed() || state.boot != session::boot_id()? {
        return Ok(());
    }
    let RelayoutOptions { state_dir, discard_unflushed, .. } = *opts;
    match Overlay::open(path, &OpenOptions { read_only: false, state_dir, base: None, discard_unflushed }) {
        Ok(overlay) => overlay.close(),
        // QEMU has rearranged the file since, or it is of format 1.
        Err(e) if e.kind() == ErrorKind::Unsupported && discard_unflushed => Ok(()),
        Err(e) if e.kind() == ErrorKind::Unsupported => Err(unflushed(path)),
        Err(e) => Err(e),
    }
}

fn unflushed(path: &Path) -> Error {
    let cause = "its last vmar did not close it, and what the VM wrote since its last flush cannot be put together with \
                 what QEMU has rearranged since";
    let mend = "compare it with a backup, or give --discard-unflushed to go on with the state of the last flush";
    Error::file(ErrorKind::Changed, path, cause).mend(mend)
}

/// An error if `path` names another file by now: whoever waited for the lock of a file may have waited for its replacement.
pub(super) fn check_named(file: &File, path: &Path) -> Result<()> {
    let look = |e| Error::io(path, "look at", e);
    let (mine, named) = (file.metadata().map_err(look)?, fs::metadata(path).map_err(look)?);
    if (mine.dev(), mine.ino()) == (named.dev(), named.ino()) {
        return Ok(());
    }
    Err(Error::file(ErrorKind::Busy, path, "was replaced by another vmar meanwhile").mend("try again"))
}

fn sizes(source: &Source, opts: &RelayoutOptions<'_>) -> Result<(u64, u64)> {
    let header = &source.header;
    let size = opts.size.unwrap_or(header.size);
    let capacity = opts.capacity.unwrap_or(header.extension.capacity.max(size));
    let fits = |n: u64| n.is_multiple_of(SECTOR_SIZE) && n <= IMAGE_SIZE_MAX;
    if size < header.size || capacity < size || !fits(size) || !fits(capacity) {
        let cause = format!("a disk of {} bytes cannot become one of {size} with room for {capacity}", header.size);
        let mend = "give multiples of 512, not less than the disk is and up to 16 TiB";
        return Err(Error::file(ErrorKind::Usage, &source.path, cause).mend(mend));
    }
    Ok((size, capacity))
}

/// Refuses to make a disk larger that QEMU made smaller than its base, if it ends inside a subcluster that is the base's: its
/// rest reads through, and no bit can say that it does not.
fn check_end(source: &mut Source, new_size: u64) -> Result<()> {
    let (size, base) = (source.header.size, source.header.extension.base.size);
    if new_size == size || size >= base || size.is_multiple_of(SUB) {
        return Ok(());
    }
    let word = source.entry(size / CLUSTER)?.word;
    if state_in_word(word, size / SUB % SUBS) != State::Base {
        return Ok(());
    }
    let cause = format!("its disk ({size} bytes) ends inside a block of its larger base ({base} bytes)");
    let mend = format!("make it larger with 'qemu-img resize {} {base}' first", source.path.display());
    Err(Error::file(ErrorKind::Unsupported, &source.path, cause).mend(mend))
}

fn rewrite(source: &mut Source, target: Named<'_>, size: u64, capacity: u64, work: &Work<'_>) -> Result<()> {
    let (backing, base) = (source.header.backing.clone(), source.header.extension.base);
    let (layout, header) = plan(target.path, &CreateOptions { backing: &backing, base, size, capacity })?;
    (work.begin)("rewriting", source.data_bytes()?);
    copy_data(source, target, layout.data, work)?;
    work.check(target.path)?;
    write_metadata(target.file, target.path, &layout, &header, |cluster| {
        let word = if cluster < source.clusters() { source.entry(cluster)?.word } else { 0 };
        Ok(behind_end(word, cluster, source.header.size, base.size))
    })
}

/// The bitmap without what lies behind the end of the disk: bits that QEMU leaves when it makes a disk smaller. There the base
/// must not show through if the disk grows.
fn behind_end(word: u64, cluster: u64, size: u64, base_size: u64) -> u64 {
    let subs_up_to = |bytes: u64| bytes.div_ceil(SUB).saturating_sub(cluster * SUBS).min(SUBS);
    let mask = |subs: u64| (1u64 << subs) - 1;
    let (inside, of_base) = (mask(subs_up_to(size)), mask(subs_up_to(base_size)));
    word & (inside | inside << 32) | (of_base & !inside) << 32
}

/// Copies the data of all clusters, neighbours in one go. Nothing behind the end of the disk is copied.
fn copy_data(source: &mut Source, target: Named<'_>, data_start: u64, work: &Work<'_>) -> Result<()> {
    let mut copier = Copier::new(work);
    // Host offset, guest offset and length of what was found and not copied yet.
    let mut pending = (0, 0, 0);
    let mut copy = |file: &File, path: &PathBuf, (host, guest, len): (u64, u64, u64)| match len {
        0 => Ok(()),
        _ => copier.copy(Named { file, path }, host, target, data_start + guest, len),
    };
    for cluster in 0..source.clusters() {
        let entry = source.entry(cluster)?;
        let mut rest = entry.word & 0xffff_ffff;
        while rest != 0 {
            let first = u64::from(rest.trailing_zeros());
            let count = u64::from((rest >> first).trailing_ones());
            rest &= !(((1u64 << count) - 1) << first);
            let (host, guest) = (entry.host + first * SUB, cluster * CLUSTER + first * SUB);
            let len = (count * SUB).min(source.header.size.saturating_sub(guest));
            let (from, to, so_far) = pending;
            if so_far > 0 && (from + so_far, to + so_far) == (host, guest) {
                pending.2 += len;
            } else {
                copy(&source.file, &source.path, pending)?;
                pending = (host, guest, len);
            }
        }
    }
    copy(&source.file, &source.path, pending)
}

fn keep_owner(old: &File, new: &File) -> std::io::Result<()> {
    let (was, is) = (old.metadata()?, new.metadata()?);
    if (was.uid(), was.gid()) != (is.uid(), is.gid()) {
        fchown(new, Some(was.uid()), Some(was.gid()))?;
    }
    new.set_permissions(fs::Permissions::from_mode(was.mode() & 0o7777))?;
    new.sync_all()
}
