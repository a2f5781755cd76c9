//! From a descriptor chain to a request (virtio 1.2, sections 2.7.5 and 5.2.6). No guest byte may panic here.

use super::ring::Ring;
use crate::io::buf::{self, IoBuf};
use crate::redirect::plan::Piece;
use crate::units::SECTOR_SIZE;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

/// Bytes of the request header: type u32, reserved u32, sector u64, little-endian.
const HEADER_SIZE: usize = 16;

/// Bytes of a segment of a discard or write-zeroes request: sector u64, count u32, flags u32, little-endian.
pub const SEGMENT_SIZE: usize = 16;

/// The serial that GET_ID answers with: 20 bytes, not terminated when full.
pub const SERIAL_SIZE: usize = 20;

/// The most segments that one discard or write-zeroes request may carry (and what the config space offers).
pub const SEGMENTS_MAX: u32 = 1;

/// How a request ended, as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed, or the request makes no sense.
    IoErr,
    /// The device does not do that.
    Unsupported,
}

impl Status {
    fn code(self) -> u8 {
        let code = match self {
            Status::Ok => VIRTIO_BLK_S_OK,
            Status::IoErr => VIRTIO_BLK_S_IOERR,
            Status::Unsupported => VIRTIO_BLK_S_UNSUPP,
        };
        // The binding's type is wider than the byte on the ring.
        code.to_le_bytes()[0]
    }
}

/// What the guest wants.
#[derive(Debug, PartialEq, Eq)]
pub enum Kind {
    /// Read from this byte on into the writable buffers.
    Read {
        /// Byte offset on the disk.
        offset: u64,
    },
    /// Write the readable buffers from this byte on.
    Write {
        /// Byte offset on the disk.
        offset: u64,
    },
    /// Make completed writes durable.
    Flush,
    /// Tell the serial.
    GetId,
    /// Make ranges read as zeros.
    WriteZeroes(Vec<Segment>),
    /// Give the space of ranges back. Afterwards they read as zeros, as with plain QEMU.
    Discard(Vec<Segment>),
}

/// One range of a discard or write-zeroes request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Byte offset on the disk.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// The guest allows the space to be given back.
    pub unmap: bool,
}

/// A request whose buffers are pieces of guest memory. Made to be used again: its lists keep their room.
#[derive(Debug)]
pub struct Request {
    /// What the guest wants, or the status it gets at once.
    pub kind: Result<Kind, Status>,
    /// Data: writable by us for reads and GET_ID, readable for writes.
    pub data: Vec<IoBuf>,
    /// The status byte; none in a chain that has no byte we may write.
    status: Option<IoBuf>,
    /// Room for the pieces that are not data.
    rest: Vec<IoBuf>,
    /// What a read is made of, if that was found out before its turn; see [`super::Executor::fetch`].
    pub(super) plan: Vec<Piece>,
    /// Which base it was found out of, see [`crate::redirect::View::version`].
    pub(super) planned_by: u64,
}

impl Default for Request {
    fn default() -> Self {
        Request {
            kind: Err(Status::IoErr),
            data: Vec::new(),
            status: None,
            rest: Vec::new(),
            plan: Vec::new(),
            planned_by: 0,
        }
    }
}

impl Request {
    /// Takes the chain that begins with `head`, which is less than the ring's size, apart. The framing is the guest's own
    /// business (section 2.7.4.3): header and status are found by byte count, not by descriptor.
    ///
    /// A chain that makes no sense becomes a request with a status to answer, never an error: its head must go back.
    /// The caller keeps the memory behind the chain mapped as long as the request lives.
    #[inline]
    pub fn parse(&mut self, ring: &Ring, head: u16) {
        self.plan.clear();
        let (readable, writable) = (&mut self.rest, &mut self.data);
        readable.clear();
        writable.clear();
        let whole = ring.chain(head, readable, writable);
        self.status = buf::pop_byte(writable);
        let mut header = [0u8; HEADER_SIZE];
        if !whole || self.status.is_none() || buf::copy_from(readable, &mut header) < HEADER_SIZE {
            writable.clear();
            self.kind = Err(Status::IoErr);
            return;
        }
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let sector = u64::from(word(8)) | u64::from(word(12)) << 32;
        let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Status::IoErr);
        if word(0) == VIRTIO_BLK_T_IN {
            self.kind = offset.map(|offset| Kind::Read { offset });
            return;
        }
        buf::advance(readable, HEADER_SIZE);
        self.kind = match word(0) {
            VIRTIO_BLK_T_OUT => {
                std::mem::swap(readable, writable);
                offset.map(|offset| Kind::Write { offset })
            }
            VIRTIO_BLK_T_FLUSH => Ok(Kind::Flush),
            VIRTIO_BLK_T_GET_ID => Ok(Kind::GetId),
            VIRTIO_BLK_T_WRITE_ZEROES => parse_segments(readable, false).map(Kind::WriteZeroes),
            VIRTIO_BLK_T_DISCARD => parse_segments(readable, true).map(Kind::Discard),
            _ => Err(Status::Unsupported),
        };
        if !matches!(self.kind, Ok(Kind::Write { .. } | Kind::GetId)) {
            self.data.clear();
        }
    }

    /// Bytes that it is about: transferred, or made to read as zeros.
    pub fn bytes(&self) -> u64 {
        match &self.kind {
            Ok(Kind::WriteZeroes(segments) | Kind::Discard(segments)) => segments.iter().map(|s| s.len).sum(),
            _ => buf::total_len(&self.data) as u64,
        }
    }

    /// The pieces of guest memory that are ours to write: whatever became of the request, nothing else was written.
    pub fn writable(&self) -> impl Iterator<Item = &IoBuf> {
        let data = match &self.kind {
            Ok(Kind::Read { .. } | Kind::GetId) => &self.data[..],
            _ => &[],
        };
        data.iter().chain(&self.status)
    }

    /// Tells the guest how it ended. Returns the used length: the bytes that were written to its memory.
    pub fn finish(&self, status: Status) -> u32 {
        let Some(byte) = self.status else { return 0 };
        buf::copy_to(&[byte], &[status.code()]);
        let data = match (&self.kind, status) {
            (Ok(Kind::Read { .. }), Status::Ok) => buf::total_len(&self.data),
            (Ok(Kind::GetId), Status::Ok) => buf::total_len(&self.data).min(SERIAL_SIZE),
            _ => 0,
        };
        u32::try_from(data).unwrap_or(u32::MAX - 1) + 1
    }
}

/// The segments of a discard or write-zeroes request (section 5.2.6: reserved flags are "unsupported", and so is UNMAP in a
/// discard).
fn parse_segments(data: &[IoBuf], discard: bool) -> Result<Vec<Segment>, Status> {
    let len = buf::total_len(data);
    if len == 0 || !len.is_multiple_of(SEGMENT_SIZE) {
        return Err(Status::IoErr);
    }
    if len / SEGMENT_SIZE > SEGMENTS_MAX as usize {
        return Err(Status::Unsupported);
    }
    let mut bytes = vec![0u8; len];
    buf::copy_from(data, &mut bytes);
    let mut cursor = crate::codec::Cursor::new(&bytes);
    let mut segments = Vec::with_capacity(len / SEGMENT_SIZE);
    while let (Some(sector), Some(count), Some(flags)) = (cursor.u64_le(), cursor.u32_le(), cursor.u32_le()) {
        if flags & !u32::from(!discard) != 0 {
            return Err(Status::Unsupported);
        }
        let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Status::IoErr)?;
        segments.push(Segment { offset, len: u64::from(count) * SECTOR_SIZE, unmap: discard || flags & 1 != 0 });
    }
    Ok(segments)
}
