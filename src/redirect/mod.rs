//! Redirected reads of a base image (paper, section 3.2): the plan, and the reader that runs it.
//!
//! | file | holds |
//! | --- | --- |
//! | [`open`] | opens a base, and the same image by another map |
//! | [`current`] | the base that is read at present, and its replacement |
//! | [`ahead`] | who reads in sequence, and what to read ahead; pure |
//! | [`prefetch`] | what a recorded trace says that a guest will read, as far as this map reaches it |
//! | [`plan`] | which bytes come from where; pure |
//! | [`reader`] | sub-reads side by side into the guest's buffers |
//! | [`record`] | the trace of base reads (`serve --record`) |
//! | [`trace`] | the format of that trace |

pub mod ahead;
pub mod current;
pub mod open;
pub mod plan;
pub mod prefetch;
pub mod reader;
pub mod record;
pub mod trace;

pub use current::{Current, Retired, View};
pub use open::Passed;
pub use record::Recorder;

use crate::error::{Error, ErrorKind, Result};
use crate::io::fault::FileRef;
use crate::io::lock::{self, Access};
use crate::io::{Hot, Mapping};
use crate::map::Target;
use crate::units::{IMAGE_SIZE_MAX, ImageId, SECTOR_SIZE};
use plan::{Layout, Piece};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// An open base: the map of its image and every image that the map points to.
pub struct Base {
    layout: Layout<Mapping>,
    /// Shared with the base that comes next: it reads mostly the same images.
    targets: Vec<Arc<Open>>,
    /// Bytes; only that of a flat base changes.
    size: AtomicU64,
    /// Bytes to read ahead at most.
    readahead: u64,
}

/// An open target.
#[derive(Debug)]
struct Open {
    target: Target,
    path: PathBuf,
    file: File,
    /// Its mapping; `None` where it cannot be mapped.
    hot: Option<Hot>,
}

impl std::fmt::Debug for Base {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Base").field("targets", &self.targets).field("size", &self.size).finish_non_exhaustive()
    }
}

impl Base {
    /// A raw file read as it is (`--blk-file`), opened for writing if `writable`.
    ///
    /// # Errors
    /// Besides those of opening: a size that is no multiple of 512, and a file without any write permission when it is to
    /// be written (images of a library are made read-only; root's own rights do not count).
    pub fn flat(path: &Path, writable: bool) -> Result<Base> {
        let file = open_flat(path, writable)?;
        // One writer, or any number of readers.
        lock::lock(&file, path, if writable { Access::Write } else { Access::Read }, lock::WAIT)?;
        let size = flat_size(path, &file)?;
        let hot = Hot::map(&file, size);
        // No map names it.
        let target = Target { image: ImageId(0), generation: 0, digest: [0; 32], size };
        let open = Arc::new(Open { target, path: path.to_path_buf(), file, hot });
        Ok(Base { layout: Layout::Flat, targets: vec![open], size: AtomicU64::new(size), readahead: 0 })
    }

    /// Looks whether [`Base::flat`] could open the file, but for the lock, which it does not take; gives its size.
    pub fn look_flat(path: &Path, writable: bool) -> Result<u64> {
        flat_size(path, &open_flat(path, writable)?)
    }

    /// Bytes of the image.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Makes a flat base larger: a regular file grows, by zeros; a block device has grown already. Durable on return.
    ///
    /// # Errors
    /// `Usage` for a size that is less than now or can be no disk's.
    pub fn grow(&self, size: u64) -> Result<()> {
        let Open { path, file, .. } = &*self.targets[0];
        let refuse = |cause: String, mend: &str| Err(Error::file(ErrorKind::Usage, path, cause).mend(mend));
        let now = self.size();
        if size < now || !size.is_multiple_of(SECTOR_SIZE) || size > IMAGE_SIZE_MAX {
            let cause = format!("cannot have {size} bytes: it has {now} and does not shrink");
            return refuse(cause, "give a multiple of 512, up to 16 TiB");
        }
        let there = flat_size(path, file)?;
        if there < size {
            if !file.metadata().map_err(|e| Error::io(path, "look at", e))?.is_file() {
                return refuse(format!("is a device of {there} bytes"), "make the device larger first");
            }
            file.set_len(size)
                .and_then(|()| file.sync_all())
                .map_err(|e| Error::io(path, "make the file larger", e))?;
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// The image that is read; `None` for a flat base.
    pub fn source(&self) -> Option<Target> {
        match &self.layout {
            Layout::Flat => None,
            Layout::Mapped(map) => Some(map.source()),
        }
    }

    /// The images that the map points to. A flat base has none.
    pub fn targets(&self) -> impl Iterator<Item = Target> + '_ {
        self.targets.iter().filter(|_| self.source().is_some()).map(|open| open.target)
    }

    /// Entries of the map; 0 without one.
    pub fn entries(&self) -> u64 {
        match &self.layout {
            Layout::Flat => 0,
            Layout::Mapped(map) => map.totals().entries,
        }
    }

    /// Bytes to read ahead of a guest at most, which is [`ahead::WINDOW`] for an image. 0 for a flat base: the kernel reads
    /// ahead in that file.
    pub fn readahead(&self) -> u64 {
        self.readahead
    }

    /// Changes that, for an image; 0 switches it off.
    pub fn set_readahead(&mut self, bytes: u64) {
        if let Layout::Mapped(_) = self.layout {
            self.readahead = bytes;
        }
    }

    /// The file of a target of the map.
    ///
    /// # Panics
    /// If there is no such target: the map was verified when it was opened.
    pub fn file(&self, target: u32) -> &File {
        &self.targets[target as usize].file
    }

    /// The file of a target and its mapping, to be read.
    pub fn file_ref(&self, target: u32) -> FileRef<'_> {
        let open = &self.targets[target as usize];
        FileRef::with_hot(&open.file, open.hot.as_ref())
    }

    /// Relies no more on what was in the page cache.
    pub fn cool(&self) {
        self.targets.iter().filter_map(|t| t.hot.as_ref()).for_each(Hot::cool);
    }

    /// The path of that file.
    pub fn path(&self, target: u32) -> &Path {
        &self.targets[target as usize].path
    }

    /// The image ID of a target.
    pub fn image_id(&self, target: u32) -> ImageId {
        self.targets[target as usize].target.image
    }

    /// Which of the targets is that image.
    pub fn target_of(&self, image: ImageId) -> Option<u32> {
        self.targets.iter().position(|open| open.target.image == image).and_then(|at| u32::try_from(at).ok())
    }

    /// Bytes of a target.
    pub fn target_size(&self, target: u32) -> u64 {
        self.targets[target as usize].target.size
    }

    /// The pages of a range of a target that are not in the page cache, see [`Hot::absent`].
    pub fn absent(&self, target: u32, offset: u64, len: u64) -> Option<Vec<(u64, u64)>> {
        self.targets[target as usize].hot.as_ref()?.absent(offset, len)
    }

    /// Which of the targets is the image itself; `None` when all that it holds is read from other images.
    pub fn own_target(&self) -> Option<u32> {
        match &self.layout {
            Layout::Flat => Some(0),
            Layout::Mapped(map) => self.target_of(map.source().image),
        }
    }

    /// Appends the pieces that `[offset, offset + len)` is made of; the first is byte `at` of the request.
    pub fn plan(&self, offset: u64, len: usize, at: usize, out: &mut Vec<Piece>) {
        plan::plan_base(&self.layout, self.size(), offset, len, at, out);
    }
}

/// Opens a raw file.
fn open_flat(path: &Path, writable: bool) -> Result<File> {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    let failed = |e| Error::io(path, "open", e);
    let meta = std::fs::metadata(path).map_err(failed)?;
    if !meta.is_file() && !meta.file_type().is_block_device() {
        return Err(Error::file(ErrorKind::Unsupported, path, "is neither a regular file nor a block device"));
    }
    if writable && meta.permissions().mode() & 0o222 == 0 {
        return Err(Error::file(ErrorKind::Unsupported, path, "is read-only; vmar makes the images of a library so")
            .mend("serve it with --read-only, or through --image and --overlay"));
    }
    let file = File::options().read(true).write(writable).open(path).map_err(failed)?;
    Ok(file)
}

/// The size of a raw file or block device, if it can be a disk's.
fn flat_size(path: &Path, file: &File) -> Result<u64> {
    let size =
        rustix::fs::seek(file, rustix::fs::SeekFrom::End(0)).map_err(|e| Error::io(path, "look at", e.into()))?;
    if size % SECTOR_SIZE != 0 || size == 0 || size > IMAGE_SIZE_MAX {
        let cause = format!("has {size} bytes; a disk has a multiple of {SECTOR_SIZE}, up to 16 TiB");
        return Err(Error::file(ErrorKind::Unsupported, path, cause));
    }
    Ok(size)
}
