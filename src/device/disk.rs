//! The disk behind the queues: a base that is read through its plan, and a place for what the VM writes.

use super::config::Geometry;
use super::request::SERIAL_SIZE;
use crate::io::buf::{IoBuf, slice_into};
use crate::io::fault::FileRef;
use crate::io::file;
use crate::overlay::{BaseRead, Overlay, State};
use crate::redirect::plan::{Layer, Piece, Source, push};
use crate::redirect::{Base, Current, Recorder, View};
use crate::units::{SECTOR_SIZE, to_usize};
use rustix::fs::FallocateFlags;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Where writes go.
#[derive(Debug)]
pub enum Store {
    /// Nowhere: the disk is read-only. An overlay is only read.
    ReadOnly(Option<Overlay>),
    /// Into a copy-on-write overlay.
    Overlay(Overlay),
    /// Into the base file itself (`--blk-file`).
    InPlace,
}

/// A disk, shared by its queue threads.
#[derive(Debug)]
pub struct Disk {
    current: Arc<Current>,
    /// The base if it is a raw file, which no other takes the place of.
    flat: Option<Arc<Base>>,
    /// Bytes of the base, whichever it is.
    base_size: AtomicU64,
    store: Store,
    serial: [u8; SERIAL_SIZE],
    recorder: Arc<OnceLock<Recorder>>,
    /// A flush of the base file failed (`--blk-file`).
    flush_failed: AtomicBool,
    /// Each write is durable before it completes.
    write_through: AtomicBool,
    /// Held while the cache mode changes.
    changing: Mutex<()>,
}

impl Disk {
    /// A disk over the base that is `current`; its size is the overlay's, or the base's without one.
    pub fn new(
        current: Arc<Current>,
        store: Store,
        serial: [u8; SERIAL_SIZE],
        recorder: Arc<OnceLock<Recorder>>,
    ) -> Self {
        let base = current.get();
        let write_through = matches!(&store, Store::Overlay(overlay) if !overlay.write_cache());
        Disk {
            current,
            base_size: AtomicU64::new(base.size()),
            flat: base.source().is_none().then_some(base),
            store,
            serial,
            recorder,
            flush_failed: AtomicBool::new(false),
            write_through: AtomicBool::new(write_through),
            changing: Mutex::new(()),
        }
    }

    /// Bytes; may grow while the disk is in use.
    pub fn size(&self) -> u64 {
        self.overlay().map_or_else(|| self.base_size.load(Ordering::Acquire), Overlay::size)
    }

    /// Makes the disk larger, durably; what is new reads as zeros. Requests go on meanwhile.
    ///
    /// # Errors
    /// `Usage` for a size that cannot be, `Unsupported` for a read-only disk. The size is the old one then.
    pub fn resize(&self, size: u64) -> crate::Result<()> {
        match &self.store {
            Store::Overlay(overlay) => overlay.resize(size),
            Store::InPlace => {
                let base = self.raw_file();
                base.grow(size)?;
                self.base_size.store(base.size(), Ordering::Release);
                Ok(())
            }
            Store::ReadOnly(_) => {
                let err = crate::Error::new(crate::ErrorKind::Unsupported, "the disk", "is served read-only");
                Err(err.mend("serve it without --read-only to change its size"))
            }
        }
    }

    /// What the guest may know of it.
    pub fn geometry(&self, num_queues: u16) -> Geometry {
        // A trailing half sector cannot be addressed; image sizes are multiples of 512 and have none.
        let size = self.size() / SECTOR_SIZE * SECTOR_SIZE;
        Geometry { size, read_only: self.read_only(), write_cache: !self.write_through(), num_queues }
    }

    /// True when writes are refused.
    pub fn read_only(&self) -> bool {
        matches!(self.store, Store::ReadOnly(_))
    }

    /// What GET_ID answers.
    pub fn serial(&self) -> &[u8; SERIAL_SIZE] {
        &self.serial
    }

    /// True when the range is whole sectors inside the disk.
    pub fn contains(&self, offset: u64, len: u64) -> bool {
        offset.is_multiple_of(SECTOR_SIZE)
            && len.is_multiple_of(SECTOR_SIZE)
            && offset.checked_add(len).is_some_and(|end| end <= self.size())
    }

    /// What a queue reads the base by; `wake` as in [`Current::view`].
    pub fn view(&self, wake: impl Fn() + Send + 'static) -> View {
        self.current.view(wake)
    }

    /// Appends the pieces that make up `[offset, offset + len)`, with those of the base from this one.
    pub fn plan(&self, base: &Base, offset: u64, len: usize, out: &mut Vec<Piece>) {
        let Some(overlay) = self.overlay() else {
            return base.plan(offset, len, 0, out);
        };
        if overlay.is_base(offset, len as u64) {
            return base.plan(offset, len, 0, out);
        }
        for run in overlay.runs(offset, len as u64) {
            let at = to_usize(run.offset - offset);
            let len = to_usize(run.len);
            match layer(overlay, run.offset, run.state) {
                Layer::Base => base.plan(run.offset, len, at, out),
                Layer::Overlay { offset } => push(out, Piece { at, len, source: Source::Overlay { offset } }),
                Layer::Zero => push(out, Piece { at, len, source: Source::Zero }),
            }
        }
    }

    /// Writes the base reads of a plan into the trace, if one is recorded.
    pub fn record(&self, base: &Base, pieces: &[Piece]) {
        if let Some(recorder) = self.recorder.get() {
            recorder.record(base, pieces);
        }
    }

    /// The file that holds a source of a plan with this base, and the offset in it; `None` for zeros.
    pub fn file_of<'f>(&'f self, base: &'f Base, source: &Source) -> Option<(FileRef<'f>, u64)> {
        match *source {
            Source::Zero => None,
            Source::Overlay { offset } => self.overlay().map(|o| (o.file(), offset)),
            Source::Image { target, offset } => Some((base.file_ref(target), offset)),
        }
    }

    /// This thread had to wait for a page that was held to be in the page cache.
    pub fn cool(&self, base: &Base) {
        base.cool();
        self.overlay().iter().for_each(|overlay| overlay.cool());
    }

    /// Writes without waiting for locks or base data. `Ok(false)`: [`Disk::write`] must do it, on a thread that may wait.
    pub fn try_write(&self, offset: u64, bufs: &[IoBuf]) -> io::Result<bool> {
        match &self.store {
            Store::Overlay(overlay) => overlay.try_write(offset, bufs),
            Store::InPlace => file::write_all_at(self.raw_file().file(0), bufs, offset).map(|()| true),
            Store::ReadOnly(_) => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        }
    }

    /// Writes; may wait for a lock and for base data.
    pub fn write(&self, offset: u64, bufs: &[IoBuf]) -> io::Result<()> {
        match &self.store {
            Store::Overlay(overlay) => overlay.write(offset, bufs, self),
            Store::InPlace => file::write_all_at(self.raw_file().file(0), bufs, offset),
            Store::ReadOnly(_) => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        }
    }

    /// Makes the range read as zeros; may wait.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        match &self.store {
            Store::Overlay(overlay) => overlay.write_zeroes(offset, len, unmap, self),
            Store::InPlace => zero_in_place(self.raw_file().file(0), offset, len, unmap),
            Store::ReadOnly(_) => Err(io::ErrorKind::ReadOnlyFilesystem.into()),
        }
    }

    /// Makes completed writes durable; waits for the disk.
    ///
    /// A flush that failed is final: the kernel calls the pages clean all the same, so a later one would say nothing of
    /// what was lost.
    pub fn flush(&self) -> io::Result<()> {
        match &self.store {
            Store::Overlay(overlay) => overlay.flush(),
            Store::InPlace if self.flush_failed.load(Ordering::Acquire) => {
                Err(io::Error::other("an earlier flush of this file failed, so what it covered may be lost"))
            }
            Store::InPlace => self.raw_file().file(0).sync_data().inspect_err(|_| {
                self.flush_failed.store(true, Ordering::Release);
            }),
            Store::ReadOnly(_) => Ok(()),
        }
    }

    /// True when a write must be durable before it completes, as the guest has asked (CONFIG_WCE).
    ///
    /// Asked *after* the data was written: either this sees that the cache was switched off, or the flush that
    /// [`Disk::set_write_cache`] does after switching it off sees the write. The fences of the two make it so.
    pub fn write_through(&self) -> bool {
        fence(Ordering::SeqCst);
        self.write_through.load(Ordering::Relaxed)
    }

    /// Switches the write cache for all queues at once. When it goes off, all that has completed is durable on return.
    /// On an error the mode is as it was. An overlay remembers the mode; with `--blk-file` it ends with the process, and the
    /// guest is not asked again: a server that is started anew in the middle of a VM's life begins with the cache on.
    pub fn set_write_cache(&self, on: bool) -> io::Result<()> {
        let _one = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        if self.read_only() {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        let before = self.write_through.swap(!on, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if !on && let Err(e) = self.flush() {
            self.write_through.store(before, Ordering::Relaxed);
            return Err(e);
        }
        if let Store::Overlay(overlay) = &self.store {
            overlay.set_write_cache(on);
        }
        Ok(())
    }

    /// Ends the disk's life in order: flush, and close the overlay's session.
    pub fn close(&self) -> crate::Result<()> {
        match &self.store {
            Store::Overlay(overlay) => overlay.close(),
            Store::InPlace => self.flush().map_err(|e| crate::Error::io(self.raw_file().path(0), "flush", e)),
            Store::ReadOnly(_) => Ok(()),
        }
    }

    /// True after [`Disk::close`] has got so far that no request is taken any more, even if it failed then.
    pub fn is_closed(&self) -> bool {
        matches!(&self.store, Store::Overlay(overlay) if overlay.is_closed())
    }

    /// The file that is written in place.
    fn raw_file(&self) -> &Base {
        let Some(base) = &self.flat else { unreachable!("only a raw file is written in place") };
        base
    }

    fn overlay(&self) -> Option<&Overlay> {
        match &self.store {
            Store::Overlay(o) | Store::ReadOnly(Some(o)) => Some(o),
            Store::ReadOnly(None) | Store::InPlace => None,
        }
    }
}

/// The base as the overlay reads it, to fill a subcluster that a small write covers in part. These reads are in the trace
/// like all others.
impl BaseRead for Disk {
    fn read_base(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let base = self.current.get();
        let mut pieces = Vec::new();
        base.plan(offset, bytes.len(), 0, &mut pieces);
        self.record(&base, &pieces);
        // SAFETY: `bytes` outlives the call and is not touched through its reference while the list is used.
        let whole = [unsafe { IoBuf::from_raw(bytes.as_mut_ptr(), bytes.len()) }];
        for piece in &pieces {
            let mut part = Vec::new();
            slice_into(&whole, piece.at, piece.len, &mut part);
            match self.file_of(&base, &piece.source) {
                Some((file, offset)) => file.read_exact(&part, offset)?,
                None => crate::io::buf::fill_zero(&part),
            }
        }
        Ok(())
    }
}

fn layer(overlay: &Overlay, offset: u64, state: State) -> Layer {
    match state {
        State::Base => Layer::Base,
        State::Data => Layer::Overlay { offset: overlay.data_start() + offset },
        State::Zero => Layer::Zero,
    }
}

/// Zeroes a range of a raw file: a hole when space may be given back, else a zeroed allocated range. File systems that
/// have neither get zeros written.
fn zero_in_place(file: &File, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
    let mode = if unmap { FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE } else { FallocateFlags::ZERO_RANGE };
    // The signal that is to end us must not fail a request.
    match rustix::io::retry_on_intr(|| rustix::fs::fallocate(file, mode, offset, len)) {
        Ok(()) => Ok(()),
        // INVAL: a block device whose blocks are larger than the range.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL) => write_zeros(file, offset, len),
        Err(e) => Err(e.into()),
    }
}

fn write_zeros(file: &File, offset: u64, len: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let zeros = vec![0u8; (1 << 20).min(to_usize(len))];
    let mut done = 0;
    while done < len {
        let n = zeros.len().min(to_usize(len - done));
        file.write_all_at(&zeros[..n], offset + done)?;
        done += n as u64;
    }
    Ok(())
}
