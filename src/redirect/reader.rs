//! Runs the plan of a read: the sub-reads of a request side by side into the guest's own buffers, one completion.
//!
//! What the page cache holds is copied inline ([`nowait`]); each sub-read that misses goes to io_uring on its own, so the
//! misses of one request are in flight together and a miss never holds up a hit of another request.

use super::Base;
use super::plan::{Piece, Source};
use crate::error::{Error, ErrorKind, Result};
use crate::io::buf::{IoBuf, advance, fill_zero, slice_into};
use crate::io::fault::FileRef;
use crate::io::nowait::{self, Got};
use crate::io::uring::{Finished, Keep, Uring};
use crate::units::to_usize;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

/// Pieces of a request whose first bytes are being fetched while one is copied: they are spread widely.
const FETCH_AHEAD: usize = 4;

/// A request of which some sub-reads are still in flight.
#[derive(Debug)]
struct Pending {
    token: u64,
    left: u32,
    error: Option<io::Error>,
}

/// Reads of one queue thread.
pub struct Reader {
    ring: Uring,
    pending: Vec<Pending>,
    free: Vec<usize>,
    parts: Vec<IoBuf>,
    /// The last read was not copied from mappings alone.
    cold: bool,
}

impl Reader {
    /// A reader that raises `event` (an eventfd) when [`Reader::reap`] has something to tell. Must stay on this thread.
    pub fn new(event: BorrowedFd<'_>) -> io::Result<Self> {
        Ok(Reader { ring: Uring::new(event)?, pending: Vec::new(), free: Vec::new(), parts: Vec::new(), cold: false })
    }

    /// Finds out whether readers can be made here at all: a kernel or a container profile may forbid io_uring.
    pub fn probe() -> Result<()> {
        let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).map_err(io::Error::from);
        event.and_then(|event| Uring::new(event.as_fd()).map(drop)).map_err(|e| {
            Error::new(ErrorKind::Unsupported, "io_uring", format!("cannot be used: {e}")).mend(
                "allow it: sysctl kernel.io_uring_disabled=0, a seccomp profile with the io_uring calls, or more \
                 locked memory (ulimit -l) before Linux 5.12",
            )
        })
    }

    /// Sub-reads in flight.
    pub fn in_flight(&self) -> usize {
        self.ring.in_flight()
    }

    /// True when [`Reader::reap`] would find something.
    pub fn is_ready(&mut self) -> bool {
        self.ring.is_ready()
    }

    /// Fills `bufs` as `pieces` say. `Some` when that is done already; `None` when [`Reader::reap`] will tell it under
    /// `token`. `file_of` gives the file of a piece and the offset in it; `None` for zeros.
    ///
    /// `base` is the one that the pieces were planned with. What is not done at once keeps it, and so the files of its
    /// images, until then: another one may have taken its place by that time. The caller keeps the overlay's file open and
    /// the memory mapped, and calls [`Reader::submit`] after a batch.
    pub fn read<'f>(
        &mut self,
        token: u64,
        pieces: &[Piece],
        bufs: &[IoBuf],
        base: &Arc<Base>,
        file_of: impl Fn(&Source) -> Option<(FileRef<'f>, u64)>,
    ) -> Option<io::Result<()>> {
        let mut slot = None;
        let mut error = None;
        self.cold = false;
        let fetch = |piece: Option<&Piece>| {
            if let (Some(piece), Some(buf)) = (piece, bufs.first())
                && let Some((file, offset)) = file_of(&piece.source)
            {
                file.fetch(offset, buf);
            }
        };
        (1..FETCH_AHEAD).for_each(|i| fetch(pieces.get(i)));
        for (i, piece) in pieces.iter().enumerate() {
            fetch(pieces.get(i + FETCH_AHEAD));
            self.parts.clear();
            slice_into(bufs, piece.at, piece.len, &mut self.parts);
            let Some((file, offset)) = file_of(&piece.source) else {
                fill_zero(&self.parts);
                continue;
            };
            match nowait::read_cached(file, &self.parts, offset) {
                Ok(Got { len, mapped }) if len == piece.len => self.cold |= !mapped,
                Ok(Got { len: n, .. }) => {
                    self.cold = true;
                    let slot = *slot.get_or_insert_with(|| self.allot(token));
                    self.pending[slot].left += 1;
                    let mut rest = std::mem::take(&mut self.parts);
                    advance(&mut rest, n);
                    self.ring.read(slot as u64, file, offset + n as u64, rest, Some(Arc::clone(base) as Keep));
                }
                Err(e) => {
                    error = Some(e);
                    break;
                }
            }
        }
        match (slot, error) {
            (None, None) => Some(Ok(())),
            (None, Some(e)) => Some(Err(e)),
            (Some(slot), error) => {
                self.pending[slot].error = error;
                None
            }
        }
    }

    /// True if the last [`Reader::read`] was not copied from mappings alone: some of it is new to this process.
    #[inline]
    pub fn was_cold(&self) -> bool {
        self.cold
    }

    /// Brings base pieces into the page cache (see [`Uring::fetch`]) that are not there.
    /// `base` as in [`Reader::read`].
    pub fn read_ahead(&mut self, pieces: &[Piece], base: &Arc<Base>) {
        for piece in pieces {
            let Source::Image { target, offset } = piece.source else { continue };
            let file = base.file_ref(target);
            if !nowait::is_cached(file, offset, piece.len as u64)
                && !self.ring.fetch(None, file.file(), offset, piece.len, Some(Arc::clone(base) as Keep))
            {
                return;
            }
        }
    }

    /// Hands the misses of a batch to the kernel.
    pub fn submit(&mut self) -> io::Result<()> {
        self.ring.submit()
    }

    /// Tells which requests have all their bytes, or failed; never waits.
    pub fn reap(&mut self, mut done: impl FnMut(u64, io::Result<()>)) -> io::Result<()> {
        let Reader { ring, pending, free, .. } = self;
        ring.reap(|finished| finish(pending, free, finished, &mut done))
    }

    /// Lets all sub-reads fail that the kernel has not seen yet.
    pub fn cancel_waiting(&mut self, mut done: impl FnMut(u64, io::Result<()>)) {
        let Reader { ring, pending, free, .. } = self;
        ring.cancel_waiting(|finished| finish(pending, free, finished, &mut done));
    }

    fn allot(&mut self, token: u64) -> usize {
        let fresh = Pending { token, left: 0, error: None };
        match self.free.pop() {
            Some(slot) => {
                self.pending[slot] = fresh;
                slot
            }
            None => {
                self.pending.push(fresh);
                self.pending.len() - 1
            }
        }
    }
}

/// Takes the end of a sub-read into account.
fn finish(
    pending: &mut [Pending],
    free: &mut Vec<usize>,
    finished: Finished,
    done: &mut impl FnMut(u64, io::Result<()>),
) {
    let slot = to_usize(finished.token);
    let p = &mut pending[slot];
    p.left -= 1;
    if let Err(e) = finished.result {
        p.error.get_or_insert(e);
    }
    if p.left == 0 {
        free.push(slot);
        done(p.token, p.error.take().map_or(Ok(()), Err));
    }
}
