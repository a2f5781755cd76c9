//! Writes a new overlay: all metadata, and a data area that is one hole.

use super::CreateOptions;
use super::header::{self, Extension, Session};
use super::layout::{CLUSTER, Layout, REFCOUNTS, index};
use crate::error::{Error, ErrorKind, Result};
use crate::io::file::sync_dir;
use crate::units::{IMAGE_SIZE_MAX, SECTOR_SIZE};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Makes a new overlay at `path`. Never overwrites; the file appears complete and durable or not at all.
///
/// It takes 256 KiB per GiB of the capacity (L2 tables) plus 32 KiB per GiB (refcounts); the data area is a hole.
pub fn create(path: &Path, opts: &CreateOptions<'_>) -> Result<()> {
    check_options(path, opts)?;
    if fs::symlink_metadata(path).is_ok() {
        return Err(exists(path));
    }
    let layout = Layout::new(opts.size, opts.capacity);
    let extension = Extension {
        base: opts.base,
        l2_start: layout.l2,
        data_start: layout.data,
        session: Session::CLOSED,
        capacity: layout.capacity,
        flushes: 0,
    };
    let header = header::encode(path, &layout, opts.backing, &extension)?;
    let dir = match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    let new = NewFile::create(dir, path)?;
    write_all(&new.file, &layout, &header).map_err(|e| Error::io(path, "write", e))?;
    new.publish(path)?;
    sync_dir(dir)
}

fn check_options(path: &Path, opts: &CreateOptions<'_>) -> Result<()> {
    let refuse = |cause: String| {
        let mend = format!("give a multiple of 512 from {} bytes to 16 TiB (--size)", opts.base.size);
        Err(Error::file(ErrorKind::Usage, path, cause).mend(mend))
    };
    if !opts.backing.is_absolute() {
        return refuse(format!("the path of the base image, {}, is not absolute", opts.backing.display()));
    }
    if opts.size == 0 || !opts.size.is_multiple_of(SECTOR_SIZE) {
        return refuse(format!("a disk of {} bytes cannot be: it must be a multiple of 512", opts.size));
    }
    if opts.size > IMAGE_SIZE_MAX {
        return refuse(format!("a disk of {} bytes is larger than 16 TiB, the most that vmar handles", opts.size));
    }
    if opts.capacity < opts.size || !opts.capacity.is_multiple_of(SECTOR_SIZE) || opts.capacity > IMAGE_SIZE_MAX {
        let cause = format!("a disk of {} bytes cannot have a capacity of {}", opts.size, opts.capacity);
        let mend = format!("give a multiple of 512 from {} bytes to 16 TiB (--capacity)", opts.size);
        return Err(Error::file(ErrorKind::Usage, path, cause).mend(mend));
    }
    if opts.size < opts.base.size {
        return refuse(format!("the disk ({} bytes) is smaller than its base ({} bytes)", opts.size, opts.base.size));
    }
    Ok(())
}

fn exists(path: &Path) -> Error {
    Error::file(ErrorKind::Exists, path, "exists already").mend("choose another name or remove it")
}

/// A file without its name yet. Where the file system can, it has no name at all, so that not even a kill leaves it.
struct NewFile {
    file: File,
    temporary: Option<PathBuf>,
}

impl NewFile {
    fn create(dir: &Path, path: &Path) -> Result<NewFile> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).mode(0o600);
        match options.clone().custom_flags(libc::O_TMPFILE).open(dir) {
            Ok(file) => return Ok(NewFile { file, temporary: None }),
            Err(e) if matches!(e.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EISDIR | libc::EINVAL)) => {}
            Err(e) => return Err(Error::io(path, "create", e)),
        }
        let name = path.file_name().ok_or_else(|| Error::file(ErrorKind::Usage, path, "is no file name"))?;
        let mut hidden = std::ffi::OsString::from(".");
        hidden.push(name);
        hidden.push(format!(".{}.tmp", std::process::id()));
        let temporary = dir.join(hidden);
        let file = options.create_new(true).open(&temporary).map_err(|e| Error::io(path, "create", e))?;
        Ok(NewFile { file, temporary: Some(temporary) })
    }

    /// Gives it its name, unless somebody else has taken that meanwhile.
    fn publish(&self, path: &Path) -> Result<()> {
        use rustix::fs::{AtFlags, CWD, RenameFlags, linkat, renameat_with};
        let done = match &self.temporary {
            None => {
                use std::os::fd::AsRawFd;
                let unnamed = format!("/proc/self/fd/{}", self.file.as_fd().as_raw_fd());
                linkat(CWD, unnamed, CWD, path, AtFlags::SYMLINK_FOLLOW)
            }
            Some(temporary) => renameat_with(CWD, temporary, CWD, path, RenameFlags::NOREPLACE),
        };
        done.map_err(|e| match e {
            rustix::io::Errno::EXIST => exists(path),
            e => Error::io(path, "create", e.into()),
        })
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        // After a successful rename there is nothing of that name, which is as well.
        if let Some(temporary) = &self.temporary {
            let _ = fs::remove_file(temporary);
        }
    }
}

fn write_all(file: &File, layout: &Layout, header: &[u8]) -> io::Result<()> {
    file.write_all_at(header, 0)?;
    let mut out = Writer::new(file, layout.refcount_table);
    for block in 0..layout.refcount_block_count {
        out.put(&(layout.refcount_blocks + block * CLUSTER).to_be_bytes())?;
    }
    out.move_to(layout.refcount_blocks)?;
    // A block at a time: they are all alike but the last.
    let ones: Vec<u8> = (0..CLUSTER).map(|i| u8::from(i % 2 == 1)).collect();
    for block in 0..layout.refcount_block_count {
        let counts = (layout.file_clusters() - block * REFCOUNTS).min(REFCOUNTS);
        out.put(&ones[..index(counts * 2)])?;
    }
    out.move_to(layout.l1)?;
    for table in 0..layout.l2_tables {
        out.put(&layout.l1_entry(table).to_be_bytes())?;
    }
    out.move_to(layout.l2)?;
    for cluster in 0..layout.clusters {
        out.put(&layout.descriptor(cluster).to_be_bytes())?;
        out.put(&[0; 8])?;
    }
    out.flush()?;
    file.set_len(layout.file_len())?;
    file.sync_all()
}

/// Collects small pieces into large writes.
struct Writer<'a> {
    file: &'a File,
    at: u64,
    buf: Vec<u8>,
}

impl Writer<'_> {
    const CAPACITY: usize = 1 << 20;

    fn new(file: &File, at: u64) -> Writer<'_> {
        Writer { file, at, buf: Vec::with_capacity(Self::CAPACITY) }
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.buf.len() + bytes.len() > Self::CAPACITY {
            self.flush()?;
        }
        self.buf.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buf, self.at)?;
        self.at += self.buf.len() as u64;
        self.buf.clear();
        Ok(())
    }

    fn move_to(&mut self, at: u64) -> io::Result<()> {
        self.flush()?;
        self.at = at;
        Ok(())
    }
}
