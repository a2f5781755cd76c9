//! Makes an overlay of vmar from one that plain QEMU made. `qemu-img`, which knows all flavours of qcow2, carries the content
//! over: into a file in the fixed layout, in which it has nothing to allocate.

use super::copy::Work;
use super::create::{self, NewFile, check_options, exists, plan, write_metadata};
use super::disk::Disk;
use super::header::Header;
use super::layout::{CLUSTER, index};
use super::{CreateOptions, adopt, read_metadata, scan, session, stopped};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Conversion, Format, Probe, convert_over, look_at};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Makes a new overlay at `path` with the content of the qcow2 file `other`, whose backing file must be `opts.backing`
/// itself, or which has none. A size of 0 in `opts` stands for that of `other`, a capacity of 0 for the size.
///
/// # Errors
/// As for [`create`](super::create), and whatever keeps `qemu-img` from reading `other`: it is in use, damaged, or its
/// backing file is another one (a chain is to be shortened with `qemu-img rebase` first).
pub fn create_from(path: &Path, other: &Path, opts: &CreateOptions<'_>, work: &Work<'_>) -> Result<u64> {
    let from = fs::canonicalize(other).map_err(|e| Error::io(other, "open", e))?;
    check_session(&from)?;
    let found = look_at(&from)?;
    check_backing(&from, found.backing.as_deref(), opts.backing)?;
    let size = if opts.size == 0 { found.size.max(opts.base.size) } else { opts.size };
    if size < found.size {
        let cause =
            format!("the disk ({size} bytes) is smaller than that of {} ({} bytes)", from.display(), found.size);
        return Err(Error::file(ErrorKind::Usage, path, cause).mend("give a larger --size, or none"));
    }
    if found.size < opts.base.size {
        let cause = format!("its disk ({} bytes) is smaller than the image ({} bytes)", found.size, opts.base.size);
        let mend = format!("make it larger with 'qemu-img resize {} {}'", from.display(), opts.base.size);
        return Err(Error::file(ErrorKind::Unsupported, &from, cause).mend(mend));
    }
    let opts = &CreateOptions { size, capacity: opts.capacity.max(size), ..*opts };
    check_options(path, opts)?;
    if fs::symlink_metadata(path).is_ok() {
        return Err(exists(path));
    }
    let (layout, header) = plan(path, opts)?;
    let new = NewFile::create_named(path)?;
    write_metadata(&new.file, path, &layout, &header, |_| Ok(0))?;
    let Some(temporary) = new.name() else { return Err(create::exists(path)) };
    carry_over(&from, temporary, opts, found.size, work)?;
    take_back(temporary)?;
    new.publish(path)?;
    Ok(size)
}

/// An overlay of vmar whose process was killed: `qemu-img` would see the state of the last flush. If QEMU has written to it
/// since, that is the state that counts.
fn check_session(from: &Path) -> Result<()> {
    let read = |e| Error::io(from, "read", e);
    let file = File::open(from).map_err(read)?;
    let mut bytes = vec![0; index(file.metadata().map_err(read)?.len().min(CLUSTER))];
    file.read_exact_at(&mut bytes, 0).map_err(read)?;
    let Ok(header) = Header::parse_also_old(from, &bytes) else { return Ok(()) };
    let open = header.extension.session;
    if open.is_closed() || !header.untouched() || open.boot != session::boot_id()? {
        return Ok(());
    }
    let cause = "is an overlay of vmar that is in use or whose vmar was killed, so not all of it is in the file";
    let mend = format!("stop its VM, or finish it with 'vmar overlay relayout {}'", from.display());
    Err(Error::file(ErrorKind::Busy, from, cause).mend(mend))
}

/// The backing file must be the image: `qemu-img` takes over the top layer only.
fn check_backing(from: &Path, backing: Option<&Path>, image: &Path) -> Result<()> {
    let Some(backing) = backing else { return Ok(()) };
    let real = |path: &Path| fs::canonicalize(path).map_err(|e| Error::io(path, "open", e));
    if real(backing)? == real(image)? {
        return Ok(());
    }
    let (from_name, image) = (from.display(), image.display());
    let cause = format!("its backing file is {}, and the image {image}", backing.display());
    let mend = format!("put it on the image with 'qemu-img rebase -F raw -b {image} {from_name}'");
    Err(Error::file(ErrorKind::Unsupported, from, cause).mend(mend))
}

fn carry_over(from: &Path, to: &Path, opts: &CreateOptions<'_>, size: u64, work: &Work<'_>) -> Result<()> {
    let file_bytes = fs::metadata(from).map_err(|e| Error::io(from, "look at", e))?.len();
    let probe = Probe { path: from.to_path_buf(), format: Format::Qcow2, file_bytes };
    (work.begin)("taking over", size);
    let done = AtomicU64::new(0);
    // Ten-thousandths, of which only the difference counts.
    let progress = |now: u64| {
        let before = done.fetch_max(now, Ordering::Relaxed);
        (work.advance)(now.saturating_sub(before).saturating_mul(size / 10_000));
    };
    convert_over(&Conversion { from: &probe, to, stop: work.stop, progress: &progress }, opts.backing)
}

/// Gives the clusters that `qemu-img` freed for zeros their places back, and looks if all others have kept theirs.
fn take_back(temporary: &Path) -> Result<()> {
    let file = super::open_file(temporary, false)?;
    let (disk, _, layout) = read_metadata(temporary, Disk::new(file, None))?;
    let freed = scan::all(&disk, &layout, Err, |_, _| {}).map_err(|stop| stopped(temporary, stop))?;
    adopt::seat(&disk, &layout, &freed).and_then(|()| disk.sync_all()).map_err(|e| Error::io(temporary, "write", e))
}
