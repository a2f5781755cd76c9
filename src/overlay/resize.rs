//! Growing the disk while it is in use.
//!
//! Everything is laid out for the capacity from the start, so growth is one word of the header. What takes care is the
//! content: a guest must find zeros behind the old end. vmar has never written there, but QEMU may have: a disk that it
//! made smaller keeps the data behind the new end, and the bits that say so, up to the end of the cluster.

use super::layout::{SUB, SUB_BITS, index};
use super::{Overlay, State, bits};
use crate::error::{Error, ErrorKind, Result};
use crate::units::SECTOR_SIZE;
use std::io;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

impl Overlay {
    /// Makes the disk `new_size` bytes large (a multiple of 512), durably; what is added reads as zeros. Reads and writes go
    /// on meanwhile; they may use the new room as soon as this returns.
    ///
    /// # Errors
    /// `Usage` for a size that is smaller than now, larger than the capacity or no multiple of 512; `Unsupported` for a disk
    /// that is read-only or was made smaller than its base by another program. The size is the old one after any error.
    pub fn resize(&self, new_size: u64) -> Result<()> {
        let _one_at_a_time = self.resizing.lock().unwrap_or_else(PoisonError::into_inner);
        let old_size = self.size();
        self.check_resize(old_size, new_size)?;
        if new_size == old_size {
            return Ok(());
        }
        // Nobody may be writing the subcluster in which the disk ends: such a write counts it as covered to its end.
        let _guard = self.locks.lock(old_size >> SUB_BITS..u64::MAX);
        let failed = |e| Error::io(&self.path, "make the disk larger", e);
        self.check_open().map_err(failed)?;
        let cleared = self.clear_behind(old_size, new_size).map_err(failed)?;
        if cleared {
            // What was cleared must be durable before a header can say that it is a part of the disk.
            self.flush().map_err(failed)?;
        }
        self.write_size(new_size).map_err(failed)?;
        self.size.store(new_size, Ordering::Release);
        Ok(())
    }

    fn check_resize(&self, old_size: u64, new_size: u64) -> Result<()> {
        let refuse = |kind, cause: String, mend: String| Err(Error::file(kind, &self.path, cause).mend(mend));
        if self.read_only {
            return refuse(
                ErrorKind::Unsupported,
                "is open for reading only, so its size cannot change".into(),
                "serve it without --read-only".into(),
            );
        }
        if !new_size.is_multiple_of(SECTOR_SIZE) {
            return refuse(
                ErrorKind::Usage,
                format!("a disk of {new_size} bytes cannot be: it must be a multiple of {SECTOR_SIZE}"),
                "round the size up".into(),
            );
        }
        if new_size < old_size {
            return refuse(
                ErrorKind::Usage,
                format!("a disk of {old_size} bytes cannot shrink to {new_size}: the guest may use what would go"),
                "give a larger size".into(),
            );
        }
        if new_size > self.capacity() {
            return refuse(
                ErrorKind::Usage,
                format!("{new_size} bytes are more than its capacity of {} bytes", self.capacity()),
                "stop the VM and lay it out for more with 'vmar overlay relayout'".to_string(),
            );
        }
        if old_size < self.base.size && new_size > old_size {
            return refuse(
                ErrorKind::Unsupported,
                format!("the disk ({old_size} bytes) was made smaller than its base ({} bytes)", self.base.size),
                "stop the VM and use 'vmar overlay relayout'".to_string(),
            );
        }
        Ok(())
    }

    /// Sees to it that `[old_size, new_size)` reads as zeros. True if something had to change.
    fn clear_behind(&self, old_size: u64, new_size: u64) -> io::Result<bool> {
        let mut changed = false;
        let first_whole = old_size.div_ceil(SUB);
        if !old_size.is_multiple_of(SUB) && self.state(old_size >> SUB_BITS) == State::Data {
            let zeros = vec![0; index((first_whole << SUB_BITS) - old_size)];
            self.disk.write(&zeros, self.layout.data + old_size)?;
            changed = true;
        }
        // A subcluster in state "base" reads zeros already: the base ends before the old end.
        bits::data_to_zero(self.words.get(), first_whole..new_size.div_ceil(SUB), |word| {
            self.dirty.mark(word);
            changed = true;
        });
        Ok(changed)
    }

    /// The size in the header, durable. After an error the old one is put back as far as that goes; a power cut may then
    /// find either, and both are right.
    fn write_size(&self, new_size: u64) -> io::Result<()> {
        // The header's lock is not held over the sync: a flush takes the two in the other order.
        let write = |size| {
            let mut header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
            let (word, at) = header.with_size(size);
            self.disk.write(&word, at)
        };
        let done = write(new_size).and_then(|()| self.sync_all_that_is_written());
        if done.is_err()
            && let Err(e) = write(self.size())
        {
            log::warn!("{}: cannot put the old size back: {e}", self.path.display());
        }
        done
    }
}
