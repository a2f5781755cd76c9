//! From a descriptor chain to a request (virtio 1.2, sections 2.7.5 and 5.2.6). No guest byte may panic here.

use crate::io::buf::{self, IoBuf};
use crate::units::SECTOR_SIZE;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::DescriptorChain;
use vm_memory::{GuestAddress, GuestMemory, Permissions};

/// Bytes of the request header: type u32, reserved u32, sector u64, little-endian.
const HEADER_SIZE: usize = 16;

/// Bytes of a segment of a discard or write-zeroes request: sector u64, count u32, flags u32, little-endian.
pub const SEGMENT_SIZE: usize = 16;

/// The serial that GET_ID answers with: 20 bytes, not terminated when full.
pub const SERIAL_SIZE: usize = 20;

/// Descriptors that a chain may have. QEMU's own limit is 1,024; a guest that follows SEG_MAX stays far below.
const CHAIN_MAX: usize = 1024;

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

/// A request whose buffers are pieces of guest memory.
#[derive(Debug)]
pub struct Request {
    /// What the guest wants, or the status it gets at once.
    pub kind: Result<Kind, Status>,
    /// Data: writable by us for reads and GET_ID, readable for writes.
    pub data: Vec<IoBuf>,
    /// The status byte; none in a chain that has no byte we may write.
    status: Option<IoBuf>,
}

impl Request {
    /// Takes a chain apart. The framing is the guest's own business (section 2.7.4.3): header and status are found by
    /// byte count, not by descriptor.
    ///
    /// A chain that makes no sense becomes a request with a status to answer, never an error: its head must go back.
    /// The caller keeps the memory behind the chain mapped as long as the request lives.
    pub fn parse<M>(chain: DescriptorChain<M>) -> Request
    where
        M: std::ops::Deref + Clone,
        M::Target: GuestMemory,
    {
        let Chain { mut readable, mut writable, whole } = Chain::collect(chain);
        let status = buf::pop_byte(&mut writable);
        if !whole || status.is_none() {
            return Request { kind: Err(Status::IoErr), data: Vec::new(), status };
        }
        let mut header = [0u8; HEADER_SIZE];
        if buf::copy_from(&readable, &mut header) < HEADER_SIZE {
            return Request { kind: Err(Status::IoErr), data: Vec::new(), status };
        }
        buf::advance(&mut readable, HEADER_SIZE);
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let sector = u64::from(word(8)) | u64::from(word(12)) << 32;
        let offset = sector.checked_mul(SECTOR_SIZE).ok_or(Status::IoErr);
        let (kind, data) = match word(0) {
            VIRTIO_BLK_T_IN => (offset.map(|offset| Kind::Read { offset }), writable),
            VIRTIO_BLK_T_OUT => (offset.map(|offset| Kind::Write { offset }), readable),
            VIRTIO_BLK_T_FLUSH => (Ok(Kind::Flush), Vec::new()),
            VIRTIO_BLK_T_GET_ID => (Ok(Kind::GetId), writable),
            VIRTIO_BLK_T_WRITE_ZEROES => (parse_segments(&readable, false).map(Kind::WriteZeroes), Vec::new()),
            VIRTIO_BLK_T_DISCARD => (parse_segments(&readable, true).map(Kind::Discard), Vec::new()),
            _ => (Err(Status::Unsupported), Vec::new()),
        };
        Request { kind, data, status }
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

/// The buffers of a chain.
struct Chain {
    readable: Vec<IoBuf>,
    writable: Vec<IoBuf>,
    /// False when something is wrong with the chain: cut short by a bad index or table, a piece out of reach, out of order,
    /// too long.
    whole: bool,
}

impl Chain {
    fn collect<M>(mut chain: DescriptorChain<M>) -> Chain
    where
        M: std::ops::Deref + Clone,
        M::Target: GuestMemory,
    {
        let mut out = Chain { readable: Vec::new(), writable: Vec::new(), whole: true };
        let mut count = 0;
        // The crate's iterator ends in silence at a bad descriptor: a chain whose last descriptor promises another one
        // was cut short.
        let mut promised = true;
        // A chain with something wrong in it is still walked to its end, where the status byte is: a driver that finds no
        // status there may take the one of an earlier request for it, which said that all went well.
        while let Some(desc) = chain.next() {
            promised = desc.has_next();
            count += 1;
            if count > CHAIN_MAX {
                promised = true;
                break;
            }
            let (list, access) = if desc.is_write_only() {
                (&mut out.writable, Permissions::Write)
            } else {
                // Readable descriptors come first (section 2.7.4.2).
                out.whole &= out.writable.is_empty();
                (&mut out.readable, Permissions::Read)
            };
            // u32 always fits in usize on the 64-bit machines that vmar is for.
            let len = desc.len() as usize;
            if !push_slices(chain.memory(), desc.addr(), len, access, list) {
                out.whole = false;
                // What came before a byte that is out of reach does not end with the status.
                list.clear();
            }
        }
        out.whole &= !promised;
        out
    }
}

/// Appends the pieces of a guest range; false when a part of it is not in guest memory.
fn push_slices<M: GuestMemory + ?Sized>(
    memory: &M,
    addr: GuestAddress,
    len: usize,
    access: Permissions,
    list: &mut Vec<IoBuf>,
) -> bool {
    let Ok(slices) = memory.get_slices(addr, len, access) else { return false };
    for slice in slices {
        let Ok(slice) = slice else { return false };
        // SAFETY: the slice lies in mapped guest memory; the memory snapshot that the chain was read through is kept by
        // the executor until the request has ended. No Rust reference to guest memory exists.
        list.push(unsafe { IoBuf::from_raw(slice.ptr_guard_mut().as_ptr(), slice.len()) });
    }
    true
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
