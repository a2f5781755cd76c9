//! Overlay and base image together, as a new raw file. The base is never written: other VMs read it.

use super::copy::{Copier, Named, Work};
use super::create::{NewFile, exists};
use super::{Overlay, State};
use crate::error::{Error, ErrorKind, Result};
use crate::io::file::punch_hole;
use crate::io::lock::{Access, WAIT, lock};
use std::fs::{self, File};
use std::path::Path;

/// Writes the disk of an overlay that is open, by convention for reading only, to a new sparse file `to`. `base` is the raw
/// image below it.
///
/// The file appears complete and durable or not at all.
pub fn commit(overlay: &Overlay, base: &Path, to: &Path, work: &Work<'_>) -> Result<()> {
    if fs::symlink_metadata(to).is_ok() {
        return Err(exists(to));
    }
    let base_file = File::open(base).map_err(|e| Error::io(base, "open", e))?;
    lock(&base_file, base, Access::Read, WAIT)?;
    let base_len = base_file.metadata().map_err(|e| Error::io(base, "look at", e))?.len();
    if base_len != overlay.base().size {
        let cause = format!("has {base_len} bytes, and the overlay was made for {}", overlay.base().size);
        return Err(Error::file(ErrorKind::Changed, base, cause).mend("put the image back that it was made for"));
    }
    let new = NewFile::create(to)?;
    let target = Named { file: &new.file, path: to };
    // Where the file system can share blocks between files, the base's cost nothing.
    let is_clone = rustix::fs::ioctl_ficlone(&new.file, &base_file).is_ok();
    new.file.set_len(overlay.size()).map_err(|e| Error::io(to, "write", e))?;
    let mut copier = Copier::new(work);
    (work.begin)("writing", overlay.size());
    for run in overlay.runs(0, overlay.size()) {
        let (source, from, len) = match run.state {
            State::Data => {
                let source = Named { file: overlay.disk.bare(), path: &overlay.path };
                (source, overlay.data_start() + run.offset, run.len)
            }
            // Zeros behind the end of the base.
            State::Base => {
                let len = run.len.min(base_len.saturating_sub(run.offset));
                (Named { file: &base_file, path: base }, run.offset, len)
            }
            State::Zero => (target, 0, 0),
        };
        work.check(to)?;
        if is_clone && run.state == State::Base {
            (work.advance)(run.len);
            continue;
        }
        if is_clone {
            // The base shines through what is left out below.
            punch_hole(&new.file, run.offset, run.len).map_err(|e| Error::io(to, "write", e))?;
        }
        copier.copy(source, from, target, run.offset, len)?;
        (work.advance)(run.len - len);
    }
    new.file.sync_all().map_err(|e| Error::io(to, "write", e))?;
    new.publish(to)
}
