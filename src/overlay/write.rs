//! The write path: data first, then the bits.
//!
//! Every change of a subcluster (write, fill, write-zeroes) holds its range lock from before the state is looked at until
//! after the bits are set and marked dirty. That makes the fill of a partial subcluster see a state that cannot change
//! under it, and lets a flush rely on this: when a write has completed, whoever set the bit it needs has marked it.
//!
//! Reads take no lock. A read loads a word (acquire), then reads base, file or nothing. Sector by sector:
//! - *Base or zero seen*: the load came before the bit was set, so every write of this sector that had completed before the
//!   read began is not among what it missed; the content it gives is that of the moment of the load. The base never changes.
//! - *Data seen*: the data was in the file before the bit (release/acquire), and only a completed or a running write or
//!   write-zeroes has changed it since. A fill rewrites only sectors of a subcluster that was not data, with what they
//!   read as already.
//! - *Data seen, then zeroed and punched*: the write-zeroes runs at the same time as the read; old bytes and zeros are both
//!   right. No transition ever leads back to "base", so a stale "base" cannot be confused with a newer one.
//!
//! So a read gives, for each sector, the last completed write or one that is in flight: what a disk promises.

use super::bits::{self, State, state_in_word};
use super::layout::{SUB, SUB_BITS, SUB_LEN, SUBS, index};
use super::{BaseRead, Overlay};
use crate::io::IoBuf;
use crate::io::buf::total_len;
use crate::units::SECTOR_SIZE;
use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

/// A range of the disk and the subclusters it touches.
#[derive(Clone, Copy, Debug)]
struct Span {
    start: u64,
    end: u64,
    first_sub: u64,
    end_sub: u64,
    /// The first (last) subcluster is only partly covered. What is behind the end of the disk need not be covered.
    partial_head: bool,
    partial_tail: bool,
}

impl Span {
    fn new(start: u64, end: u64, disk_size: u64) -> Span {
        Span {
            start,
            end,
            first_sub: start >> SUB_BITS,
            end_sub: end.div_ceil(SUB),
            partial_head: !start.is_multiple_of(SUB),
            partial_tail: !end.is_multiple_of(SUB) && end != disk_size,
        }
    }

    fn subs(&self) -> Range<u64> {
        self.first_sub..self.end_sub
    }

    /// The subclusters that it covers whole; empty (and maybe with its ends crossed) if there is none.
    fn whole_subs(&self) -> Range<u64> {
        self.first_sub + u64::from(self.partial_head)..self.end_sub - u64::from(self.partial_tail)
    }
}

/// The subclusters that a range of bytes touches.
fn subs_of(range: &Range<u64>) -> Range<u64> {
    range.start >> SUB_BITS..range.end.div_ceil(SUB)
}

/// Zeros to write, a subcluster of them.
static ZEROS: [u8; SUB_LEN] = [0; SUB_LEN];

/// A list piece over bytes that are only read from.
///
/// # Safety
/// `bytes` must outlive every use of the piece, and the piece must only be used to write *from*.
unsafe fn piece_of(bytes: &[u8]) -> IoBuf {
    // SAFETY: the caller keeps the bytes alive, and nobody writes through the pointer.
    unsafe { IoBuf::from_raw(bytes.as_ptr().cast_mut(), bytes.len()) }
}

impl Overlay {
    /// The fast path of [`write`](Self::write): never waits for a lock nor for base data.
    ///
    /// `Ok(true)`: done. `Ok(false)`: nothing was done, because a subcluster that is covered only partly has to be filled,
    /// or somebody else is changing one of them; the caller goes to `write` on a thread that may block.
    pub fn try_write(&self, offset: u64, bufs: &[IoBuf]) -> io::Result<bool> {
        let range = self.range(offset, total_len(bufs) as u64)?;
        let Some(_guard) = self.locks.try_lock(subs_of(&range)) else { return Ok(false) };
        self.check_open()?;
        let span = self.span(range);
        if span.partial_head && self.state(span.first_sub) != State::Data
            || span.partial_tail && self.state(span.end_sub - 1) != State::Data
        {
            return Ok(false);
        }
        self.disk.write_bufs(bufs, self.layout.data + offset)?;
        self.mark_data(span.subs());
        Ok(true)
    }

    /// Writes the list at `offset` (both multiples of 512). May block: on a range that somebody else is changing, and on
    /// `base`, from which the rest of a subcluster is filled that is covered only partly.
    ///
    /// On an error the bits are not set, so what was in no overlay before still is not; sectors that were data before may
    /// hold old or new content, as on any disk.
    pub fn write(&self, offset: u64, bufs: &[IoBuf], base: &dyn BaseRead) -> io::Result<()> {
        let range = self.range(offset, total_len(bufs) as u64)?;
        let _guard = self.locks.lock(subs_of(&range));
        self.check_open()?;
        self.write_locked(self.span(range), bufs, base)
    }

    /// [`write`](Self::write) of bytes that this process has: a multiple of 512 of them.
    ///
    /// # Errors
    /// As that.
    pub fn write_bytes(&self, offset: u64, bytes: &[u8], base: &dyn BaseRead) -> io::Result<()> {
        // SAFETY: the piece is used inside this call alone, in which `bytes` lives, and only written from.
        let piece = unsafe { piece_of(bytes) };
        self.write(offset, &[piece], base)
    }

    /// Makes `[offset, offset + len)` (multiples of 512) read as zeros; with `unmap` the space in the file is given back.
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, base: &dyn BaseRead) -> io::Result<()> {
        let range = self.range(offset, len)?;
        let _guard = self.locks.lock(subs_of(&range));
        self.check_open()?;
        let span = self.span(range);
        let whole = span.whole_subs();
        if whole.start >= whole.end {
            // One partial subcluster, or two that meet.
            let middle = ((span.first_sub + 1) << SUB_BITS).min(span.end);
            self.zero_part(span.start..middle, base)?;
            return self.zero_part(middle..span.end, base);
        }
        let (start, end) = (whole.start << SUB_BITS, whole.end << SUB_BITS);
        self.zero_part(span.start..start, base)?;
        self.zero_part(end.min(span.end)..span.end, base)?;
        // The bits before the hole. The other way round, an error or a kill between the two would be no harm either (data
        // that was to be zeroed reads zeros), but a failing punch would leave the request half done.
        bits::set_zero(self.words.get(), whole, |word| self.dirty.mark(word));
        if unmap && let Err(e) = self.disk.punch(self.layout.data + start, end - start) {
            // The content is right already; what is missing is the space that would have become free.
            log::debug!("{}: cannot punch a hole: {e}", self.path.display());
        }
        Ok(())
    }

    /// Zeros for a part of one subcluster, whose lock is held.
    fn zero_part(&self, range: Range<u64>, base: &dyn BaseRead) -> io::Result<()> {
        if range.is_empty() || self.state(range.start >> SUB_BITS) == State::Zero {
            return Ok(());
        }
        // SAFETY: ZEROS is static, and `write_locked` only writes from it.
        let zeros = unsafe { piece_of(&ZEROS[..index(range.end - range.start)]) };
        self.write_locked(self.span(range), &[zeros], base)
    }

    /// A write whose range lock is held: one `pwritev` of the list between what fills its first and last subcluster.
    fn write_locked(&self, span: Span, bufs: &[IoBuf], base: &dyn BaseRead) -> io::Result<()> {
        let first = span.first_sub << SUB_BITS;
        let last_end = (span.end_sub << SUB_BITS).min(self.size());
        let (mut head, mut tail) = ([0; SUB_LEN], [0; SUB_LEN]);
        let head = &mut head[..index(span.start - first)];
        let tail = &mut tail[..index(last_end - span.end)];
        let fill_head = span.partial_head && self.fill(first, head, base)?;
        let fill_tail = span.partial_tail && self.fill(span.end, tail, base)?;
        if !fill_head && !fill_tail {
            self.disk.write_bufs(bufs, self.layout.data + span.start)?;
        } else {
            let mut list = Vec::with_capacity(bufs.len() + 2);
            let mut at = span.start;
            if fill_head {
                // SAFETY: `head` outlives `list`, which is only written from.
                list.push(unsafe { piece_of(head) });
                at = first;
            }
            list.extend_from_slice(bufs);
            if fill_tail {
                // SAFETY: `tail` outlives `list`, which is only written from.
                list.push(unsafe { piece_of(tail) });
            }
            self.disk.write_bufs(&list, self.layout.data + at)?;
        }
        self.mark_data(span.subs());
        Ok(())
    }

    /// Fills `buf`, a part of one subcluster, with what the disk holds at `offset`. False: the subcluster is data, so the
    /// file holds it already.
    fn fill(&self, offset: u64, buf: &mut [u8], base: &dyn BaseRead) -> io::Result<bool> {
        match self.state(offset >> SUB_BITS) {
            State::Data => return Ok(false),
            State::Zero => buf.fill(0),
            State::Base => base.read_base(offset, buf)?,
        }
        Ok(true)
    }

    pub(super) fn state(&self, sub: u64) -> State {
        state_in_word(self.words.get()[index(sub / SUBS)].load(Ordering::Acquire), sub % SUBS)
    }

    fn mark_data(&self, subs: Range<u64>) {
        bits::set_data(self.words.get(), subs, |word| self.dirty.mark(word));
    }

    /// The span of a checked range, whose lock is held: only then does the disk not end elsewhere a moment later.
    fn span(&self, range: Range<u64>) -> Span {
        Span::new(range.start, range.end, self.size())
    }

    /// Checks a range that may come from a guest.
    fn range(&self, offset: u64, len: u64) -> io::Result<Range<u64>> {
        if self.read_only {
            return Err(io::Error::from_raw_os_error(libc::EROFS));
        }
        let size = self.size();
        let end = offset.checked_add(len).filter(|end| *end <= size);
        match end {
            Some(end) if offset.is_multiple_of(SECTOR_SIZE) && len.is_multiple_of(SECTOR_SIZE) => Ok(offset..end),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("bytes {offset}+{len} are not whole sectors of a disk of {size} bytes"),
            )),
        }
    }

    /// Called with a range lock held: `close` takes all of them before it says that it is closed.
    pub(super) fn check_open(&self) -> io::Result<()> {
        if self.closed.load(Ordering::Acquire) { Err(io::Error::other("the overlay is closed")) } else { Ok(()) }
    }
}
