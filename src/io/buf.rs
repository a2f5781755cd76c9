//! [`IoBuf`]: one piece of a scatter/gather list.

use crate::units::to_usize;
use std::ptr;

/// A piece of memory for vectored I/O: a `struct iovec` whose memory is kept alive by whoever made it.
///
/// Guest memory is shared with a running guest, so no Rust reference to it may exist; an `IoBuf` is a pointer
/// and a length, and only the kernel or a raw copy ever touches what it points at.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct IoBuf(libc::iovec);

// SAFETY: an IoBuf is an address and a length. The maker of each IoBuf promised (see `from_raw`) that the memory stays
// mapped as long as any copy of it is used, on whichever thread.
unsafe impl Send for IoBuf {}
// SAFETY: as for Send; an IoBuf has no interior mutability of its own.
unsafe impl Sync for IoBuf {}

impl IoBuf {
    /// A piece of `len` bytes at `base`.
    ///
    /// # Safety
    /// The memory must stay mapped, readable and (if data is read into it) writable as long as this value or a copy of
    /// it is used; no Rust reference to it may be used meanwhile unless access is otherwise synchronized.
    pub unsafe fn from_raw(base: *mut u8, len: usize) -> Self {
        IoBuf(libc::iovec { iov_base: base.cast(), iov_len: len })
    }

    /// Where it starts.
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Bytes.
    pub fn len(&self) -> usize {
        self.0.iov_len
    }

    /// True for a piece of no bytes.
    pub fn is_empty(&self) -> bool {
        self.0.iov_len == 0
    }

    /// The part `[from, from + len)` of this piece.
    fn part(&self, from: usize, len: usize) -> IoBuf {
        debug_assert!(from + len <= self.len());
        IoBuf(libc::iovec { iov_base: self.as_ptr().wrapping_add(from).cast(), iov_len: len })
    }
}

/// Total bytes of a list.
pub fn total_len(bufs: &[IoBuf]) -> usize {
    bufs.iter().map(IoBuf::len).sum()
}

/// Appends to `out` the pieces that make up bytes `[from, from + len)` of the list.
///
/// # Panics
/// If the list is shorter than that: the caller has cut the plan to the list's length.
pub fn slice_into(bufs: &[IoBuf], mut from: usize, mut len: usize, out: &mut Vec<IoBuf>) {
    for buf in bufs {
        if len == 0 {
            return;
        }
        if from >= buf.len() {
            from -= buf.len();
            continue;
        }
        let n = len.min(buf.len() - from);
        out.push(buf.part(from, n));
        from = 0;
        len -= n;
    }
    assert_eq!(len, 0, "range past the end of the buffers");
}

/// Cuts the list, which begins at byte `offset` of a file, where the file's offset is a multiple of `size`, and gives the
/// cuts to `each` with their offsets. Ends with its first error.
pub fn cut<E>(
    bufs: &[IoBuf],
    offset: u64,
    size: u64,
    mut each: impl FnMut(&[IoBuf], u64) -> Result<(), E>,
) -> Result<(), E> {
    let (mut at, mut left) = (offset, total_len(bufs) as u64);
    let (mut bufs, mut rest) = (bufs.iter(), None::<IoBuf>);
    let mut list = Vec::new();
    while left > 0 {
        let len = (size - at % size).min(left);
        let mut want = to_usize(len);
        list.clear();
        while want > 0
            && let Some(buf) = rest.take().or_else(|| bufs.next().copied())
        {
            let n = want.min(buf.len());
            list.push(buf.part(0, n));
            rest = (n < buf.len()).then(|| buf.part(n, buf.len() - n));
            want -= n;
        }
        each(&list, at)?;
        at += len;
        left -= len;
    }
    Ok(())
}

/// Drops the first `n` bytes of the list in place (after a short transfer).
pub fn advance(bufs: &mut Vec<IoBuf>, mut n: usize) {
    let mut whole = 0;
    for buf in bufs.iter() {
        if n < buf.len() {
            break;
        }
        n -= buf.len();
        whole += 1;
    }
    bufs.drain(..whole);
    if n > 0
        && let Some(first) = bufs.first_mut()
    {
        *first = first.part(n, first.len() - n);
    }
}

/// Takes the last byte off the list in place; `None` if there is none.
pub fn pop_byte(bufs: &mut Vec<IoBuf>) -> Option<IoBuf> {
    while let Some(last) = bufs.pop() {
        if let Some(rest) = last.len().checked_sub(1) {
            if rest > 0 {
                bufs.push(last.part(0, rest));
            }
            return Some(last.part(rest, 1));
        }
    }
    None
}

/// Fills the whole list with zeros.
pub fn fill_zero(bufs: &[IoBuf]) {
    for buf in bufs {
        // SAFETY: the maker of the IoBuf promised that the memory is mapped and writable.
        unsafe { ptr::write_bytes(buf.as_ptr(), 0, buf.len()) };
    }
}

/// Copies `src` to the start of the list; returns how many bytes fitted.
pub fn copy_to(bufs: &[IoBuf], mut src: &[u8]) -> usize {
    let mut done = 0;
    for buf in bufs {
        let n = src.len().min(buf.len());
        // SAFETY: as in `fill_zero`; `src` is a live slice of at least `n` bytes, and an IoBuf never points into memory
        // that a reference in use covers, so the two do not overlap.
        unsafe { ptr::copy_nonoverlapping(src.as_ptr(), buf.as_ptr(), n) };
        src = &src[n..];
        done += n;
        if src.is_empty() {
            break;
        }
    }
    done
}

/// Copies the start of the list to `dst`; returns how many bytes there were.
pub fn copy_from(bufs: &[IoBuf], dst: &mut [u8]) -> usize {
    let mut done = 0;
    for buf in bufs {
        let n = (dst.len() - done).min(buf.len());
        // SAFETY: as in `copy_to`, with the roles exchanged.
        unsafe { ptr::copy_nonoverlapping(buf.as_ptr(), dst[done..].as_mut_ptr(), n) };
        done += n;
        if done == dst.len() {
            break;
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The list over `mem` cut at `cuts`.
    fn list(mem: &mut [u8], cuts: &[usize]) -> Vec<IoBuf> {
        let mut out = Vec::new();
        let mut at = 0;
        for &c in cuts.iter().chain([mem.len()].iter()) {
            // SAFETY: `mem` outlives the list in each test and is not borrowed while the list is used.
            out.push(unsafe { IoBuf::from_raw(mem.as_mut_ptr().wrapping_add(at), c - at) });
            at = c;
        }
        out
    }

    #[test]
    fn slices_and_advances_agree_with_a_flat_array() {
        for from in 0..20 {
            for len in 0..=(20 - from) {
                let mut mem: Vec<u8> = (0..20).collect();
                let bufs = list(&mut mem, &[3, 3, 10, 19]);
                let mut part = Vec::new();
                slice_into(&bufs, from, len, &mut part);
                assert_eq!(total_len(&part), len);
                let mut got = vec![0; len];
                assert_eq!(copy_from(&part, &mut got), len);
                let want: Vec<u8> = (from as u8..(from + len) as u8).collect();
                assert_eq!(got, want);

                let mut rest = bufs.clone();
                advance(&mut rest, from);
                assert_eq!(total_len(&rest), 20 - from);
                let mut got = vec![0; 20 - from];
                copy_from(&rest, &mut got);
                assert_eq!(got, (from as u8..20).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn cuts_lie_at_multiples_and_leave_nothing_out() {
        for (offset, size) in [(0, 8), (5, 8), (8, 3), (7, 1), (1, 100)] {
            let mut mem: Vec<u8> = (0..20).collect();
            let bufs = list(&mut mem, &[3, 3, 10, 19]);
            let (mut got, mut at) = (Vec::new(), offset);
            let whole: Result<(), ()> = cut(&bufs, offset, size, |part, from| {
                assert_eq!(from, at, "one follows the other");
                assert!(from == offset || from % size == 0);
                let mut bytes = vec![0; total_len(part)];
                copy_from(part, &mut bytes);
                assert!(!bytes.is_empty() && from % size + bytes.len() as u64 <= size);
                at += bytes.len() as u64;
                got.extend(bytes);
                Ok(())
            });
            assert_eq!((whole, got), (Ok(()), (0..20).collect()));
        }
        let mut mem = vec![0; 20];
        let mut calls = 0;
        let failing = cut(&list(&mut mem, &[]), 0, 8, |_, from| {
            calls += 1;
            if from == 8 { Err("full") } else { Ok(()) }
        });
        assert_eq!((failing, calls), (Err("full"), 2));
    }

    #[test]
    fn bytes_come_off_the_end_whatever_the_pieces_are() {
        let mut mem: Vec<u8> = (0..6).collect();
        let mut bufs = list(&mut mem, &[0, 3, 3, 5, 6, 6]);
        for left in (0..6).rev() {
            let byte = pop_byte(&mut bufs).unwrap();
            let mut got = [0xff];
            assert_eq!((copy_from(&[byte], &mut got), got[0] as usize), (1, left));
            assert_eq!(total_len(&bufs), left);
        }
        assert!(pop_byte(&mut bufs).is_none());
    }

    #[test]
    #[should_panic(expected = "past the end")]
    fn a_slice_past_the_end_is_a_bug() {
        let mut mem = vec![0u8; 4];
        slice_into(&list(&mut mem, &[]), 2, 3, &mut Vec::new());
    }

    #[test]
    fn zero_fill_touches_only_its_part() {
        let mut mem = vec![7u8; 10];
        let bufs = list(&mut mem, &[5]);
        let mut part = Vec::new();
        slice_into(&bufs, 4, 3, &mut part);
        fill_zero(&part);
        assert_eq!(mem, [7, 7, 7, 7, 0, 0, 0, 7, 7, 7]);
    }
}
