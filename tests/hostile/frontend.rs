//! A vhost-user frontend and a guest driver of our own, which can be told to do everything wrong.

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicU16, Ordering, fence};
use std::time::{Duration, Instant};

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const SET_VRING_ENABLE: u32 = 18;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const RESET_DEVICE: u32 = 34;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;

pub const VERSION: u32 = 1;
pub const NEED_REPLY: u32 = 8;
/// MQ, REPLY_ACK, CONFIG, RESET_DEVICE, CONFIGURE_MEM_SLOTS.
pub const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 15;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_FLUSH: u64 = 1 << 9;
/// VERSION_1, INDIRECT_DESC, the vhost-user bit, FLUSH.
pub const FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 30 | F_FLUSH;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Address of region 0 (rings, headers, status bytes) and of region 1 (data) in the guest and in the "frontend's process".
pub const RAM: u64 = 0x10_0000;
pub const RAM_SIZE: u64 = 1 << 20;
pub const DATA: u64 = 0x4000_0000;
pub const DATA_SIZE: u64 = 8 << 20;
/// Where `read` puts its data.
const SCRATCH: u64 = DATA + (DATA_SIZE / 2);
pub const USER: u64 = 0x7000_0000_0000;

/// Where things are in region 0; each queue has a slice of its own for its ring.
const RING_BYTES: u64 = 0x1_0000;
pub const TABLES: u64 = RAM + 0x8_0000;
pub const HEADERS: u64 = RAM + 0xC_0000;
pub const STATUSES: u64 = RAM + 0xE_0000;

/// A piece of guest memory in a memfd.
pub struct Region {
    pub fd: OwnedFd,
    base: *mut u8,
    pub guest: u64,
    pub size: u64,
}

// SAFETY: the mapping is shared memory; every access is a raw copy or an atomic.
unsafe impl Send for Region {}

impl Region {
    pub fn new(guest: u64, size: u64) -> Region {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, size).unwrap();
        // SAFETY: a fresh mapping at an address that the kernel chooses.
        let base = unsafe {
            mmap(std::ptr::null_mut(), size as usize, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &fd, 0)
        }
        .unwrap()
        .cast();
        Region { fd, base, guest, size }
    }

    /// As ADD_MEM_REG and the memory table describe it.
    pub fn words(&self) -> [u64; 4] {
        [self.guest, self.size, USER + self.guest, 0]
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping after its owner is gone.
        unsafe { munmap(self.base.cast(), self.size as usize) }.unwrap();
    }
}

/// A descriptor.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct D {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// What the device reads.
pub fn r(addr: u64, len: u32) -> D {
    D { addr, len, flags: 0, next: 0 }
}

/// What the device writes.
pub fn w(addr: u64, len: u32) -> D {
    D { addr, len, flags: WRITE, next: 0 }
}

fn bytes_of(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// The driver's side of a ring.
pub struct Ring {
    pub index: u32,
    pub size: u16,
    pub kick: OwnedFd,
    pub call: OwnedFd,
    pub avail: u16,
    pub seen: u16,
}

impl Ring {
    pub fn desc(&self) -> u64 {
        RAM + u64::from(self.index) * RING_BYTES
    }

    pub fn avail_ring(&self) -> u64 {
        self.desc() + 0x8000
    }

    pub fn used_ring(&self) -> u64 {
        self.desc() + 0xA000
    }
}

/// A connection to the server under test.
pub struct Frontend {
    pub stream: UnixStream,
    pub ram: Region,
    pub data: Region,
    pub rings: Vec<Ring>,
    pub event_idx: bool,
}

/// An answer: the body.
pub type Reply = std::io::Result<Vec<u8>>;

impl Frontend {
    /// Connects and negotiates; shares memory; starts no ring.
    pub fn bare(socket: &Path, features: u64) -> Frontend {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let (ram, data) = (Region::new(RAM, RAM_SIZE), Region::new(DATA, DATA_SIZE));
        let event_idx = features & F_EVENT_IDX != 0;
        let mut f = Frontend { stream, ram, data, rings: Vec::new(), event_idx };
        f.negotiate(features);
        f.share();
        f
    }

    /// Reconnects with the same memory, as QEMU does: the base of each ring is its used index.
    pub fn reconnect(&mut self, socket: &Path, features: u64) {
        self.stream = UnixStream::connect(socket).unwrap();
        self.stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        self.negotiate(features);
        self.share();
    }

    fn negotiate(&mut self, features: u64) {
        let offered = self.u64_of(GET_FEATURES);
        assert_eq!(offered & features, features, "offered {offered:#x}");
        let protocol = self.u64_of(GET_PROTOCOL_FEATURES);
        assert_eq!(protocol & PROTOCOL, PROTOCOL, "offered {protocol:#x}");
        self.set(SET_PROTOCOL_FEATURES, &[PROTOCOL]);
        self.send(SET_OWNER, VERSION, &[], &[]);
        self.ok(SET_FEATURES, &bytes_of(&[features]), &[]);
    }

    pub fn share(&mut self) {
        let mut body = 2u64.to_le_bytes().to_vec();
        body.extend(bytes_of(&self.ram.words()));
        body.extend(bytes_of(&self.data.words()));
        let fds = [self.ram.fd.try_clone().unwrap(), self.data.fd.try_clone().unwrap()];
        self.ok(SET_MEM_TABLE, &body, &[fds[0].as_fd(), fds[1].as_fd()]);
    }

    /// The same with queues that run, of this many entries each.
    pub fn connect(socket: &Path, features: u64, queues: u32, size: u16) -> Frontend {
        let mut f = Frontend::bare(socket, features);
        for index in 0..queues {
            f.add_ring(index, size);
            f.start_ring(index as usize, 0);
        }
        f
    }

    pub fn add_ring(&mut self, index: u32, size: u16) {
        let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        self.rings.push(Ring { index, size, kick: event(), call: event(), avail: 0, seen: 0 });
    }

    /// The messages with which QEMU starts a ring.
    pub fn start_ring(&mut self, q: usize, base: u16) {
        let ring = &self.rings[q];
        let (index, size) = (ring.index, ring.size);
        let addr = [u64::from(index), USER + ring.desc(), USER + ring.used_ring(), USER + ring.avail_ring(), 0];
        self.set32(SET_VRING_NUM, index, u32::from(size));
        self.set32(SET_VRING_BASE, index, u32::from(base));
        self.set(SET_VRING_ADDR, &addr);
        let (kick, call) = (self.rings[q].kick.try_clone().unwrap(), self.rings[q].call.try_clone().unwrap());
        self.ok(SET_VRING_KICK, &bytes_of(&[u64::from(index)]), &[kick.as_fd()]);
        self.ok(SET_VRING_CALL, &bytes_of(&[u64::from(index)]), &[call.as_fd()]);
        self.set32(SET_VRING_ENABLE, index, 1);
    }

    /// Sends a message.
    pub fn send(&mut self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        self.try_send(request, flags, body, fds).unwrap();
    }

    pub fn try_send(&mut self, request: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
        let size = u32::try_from(body.len()).unwrap();
        let header: Vec<u8> = [request, flags, size].iter().flat_map(|w| w.to_le_bytes()).collect();
        self.send_raw(&[header, body.to_vec()].concat(), fds)
    }

    pub fn send_raw(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let n = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
        assert_eq!(n, bytes.len());
        Ok(())
    }

    /// Reads a reply.
    pub fn reply(&mut self) -> Reply {
        let mut header = [0u8; 12];
        self.stream.read_exact(&mut header)?;
        let size = u32::from_le_bytes(header[8..12].try_into().unwrap());
        let mut body = vec![0; size as usize];
        self.stream.read_exact(&mut body)?;
        Ok(body)
    }

    /// Sends and reads the acknowledgement: 0 is success. An error means that the server hung up.
    pub fn ask(&mut self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<u64> {
        self.try_send(request, VERSION | NEED_REPLY, body, fds)?;
        Ok(u64::from_le_bytes(self.reply()?.try_into().unwrap()))
    }

    pub fn ok(&mut self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) {
        assert_eq!(self.ask(request, body, fds).unwrap(), 0, "request {request}");
    }

    pub fn set(&mut self, request: u32, words: &[u64]) {
        self.ok(request, &bytes_of(words), &[]);
    }

    pub fn body32(index: u32, value: u32) -> Vec<u8> {
        [index.to_le_bytes(), value.to_le_bytes()].concat()
    }

    pub fn set32(&mut self, request: u32, index: u32, value: u32) {
        self.ok(request, &Self::body32(index, value), &[]);
    }

    pub fn u64_of(&mut self, request: u32) -> u64 {
        self.send(request, VERSION, &[], &[]);
        u64::from_le_bytes(self.reply().unwrap().try_into().unwrap())
    }

    /// Reads the config space.
    pub fn config(&mut self, offset: u32, size: u32) -> Vec<u8> {
        let head: Vec<u8> = [offset, size, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
        self.send(GET_CONFIG, VERSION, &[&head[..], &vec![0; size as usize]].concat(), &[]);
        let body = self.reply().unwrap();
        assert_eq!(body[..12], head);
        body[12..].to_vec()
    }

    /// Writes to the config space; whether it was taken.
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> bool {
        let head: Vec<u8> = [offset, bytes.len() as u32, 0].iter().flat_map(|w| w.to_le_bytes()).collect();
        self.ask(SET_CONFIG, &[&head[..], bytes].concat(), &[]).unwrap() == 0
    }

    /// Stops a ring; gives its base.
    pub fn stop_ring(&mut self, q: usize) -> u16 {
        let index = self.rings[q].index;
        self.send(GET_VRING_BASE, VERSION, &Self::body32(index, 0), &[]);
        let body = self.reply().unwrap();
        assert_eq!(u32::from_le_bytes(body[..4].try_into().unwrap()), index);
        u32::from_le_bytes(body[4..].try_into().unwrap()) as u16
    }

    pub fn region_message(region: &Region) -> Vec<u8> {
        bytes_of(&[&[0u64][..], &region.words()].concat())
    }

    fn at(&self, addr: u64, len: usize) -> *mut u8 {
        let region = if addr >= DATA { &self.data } else { &self.ram };
        let offset = addr.checked_sub(region.guest).unwrap();
        assert!(offset + len as u64 <= region.size, "{addr:#x}+{len}");
        region.base.wrapping_add(offset as usize)
    }

    pub fn put(&self, addr: u64, bytes: &[u8]) {
        // SAFETY: `at` checked the range; the mapping is ours, and the server's copies are as racy as a guest's.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(addr, bytes.len()), bytes.len()) };
    }

    pub fn get(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut out = vec![0; len];
        // SAFETY: as in `put`.
        unsafe { std::ptr::copy_nonoverlapping(self.at(addr, len), out.as_mut_ptr(), len) };
        out
    }

    fn shared16(&self, addr: u64) -> &AtomicU16 {
        assert_eq!(addr % 2, 0);
        // SAFETY: `at` checked the range, which lives as long as self; the alignment is checked above.
        unsafe { &*self.at(addr, 2).cast::<AtomicU16>() }
    }

    /// Writes descriptors as they are from entry `first` of a table on.
    pub fn table(&self, table: u64, first: u16, descs: &[D]) {
        for (i, d) in (u64::from(first)..).zip(descs) {
            let mut bytes = d.addr.to_le_bytes().to_vec();
            bytes.extend(d.len.to_le_bytes());
            bytes.extend(d.flags.to_le_bytes());
            bytes.extend(d.next.to_le_bytes());
            self.put(table + i * 16, &bytes);
        }
    }

    /// Links them: each but the last goes on with the next entry. Those with NEXT set already stay as they are.
    pub fn chain(first: u16, descs: &[D]) -> Vec<D> {
        let last = descs.len() - 1;
        (0..descs.len())
            .map(|i| match descs[i] {
                d if i == last || d.flags & NEXT != 0 => d,
                d => D { flags: d.flags | NEXT, next: first + i as u16 + 1, ..d },
            })
            .collect()
    }

    pub fn header(&self, addr: u64, kind: u32, sector: u64) {
        self.put(addr, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    }

    /// Offers heads.
    pub fn offer(&mut self, q: usize, heads: &[u16]) {
        for head in heads {
            let ring = &self.rings[q];
            self.put(ring.avail_ring() + 4 + u64::from(ring.avail % ring.size) * 2, &head.to_le_bytes());
            self.rings[q].avail = self.rings[q].avail.wrapping_add(1);
        }
        let ring = &self.rings[q];
        self.set_avail_idx(q, ring.avail);
    }

    pub fn set_avail_idx(&self, q: usize, idx: u16) {
        self.shared16(self.rings[q].avail_ring() + 2).store(idx, Ordering::Release);
    }

    pub fn kick(&self, q: usize) {
        rustix::io::write(&self.rings[q].kick, &1u64.to_ne_bytes()).unwrap();
    }

    /// Kicks only if the device asked for it, as a driver does. `old`: the available index before the offer.
    pub fn kick_if_wanted(&self, q: usize, old: u16) {
        let ring = &self.rings[q];
        fence(Ordering::SeqCst);
        let wanted = if self.event_idx {
            let event = self.shared16(ring.used_ring() + 4 + u64::from(ring.size) * 8).load(Ordering::Acquire);
            ring.avail.wrapping_sub(event).wrapping_sub(1) < ring.avail.wrapping_sub(old)
        } else {
            self.shared16(ring.used_ring()).load(Ordering::Acquire) & 1 == 0
        };
        if wanted {
            self.kick(q);
        }
    }

    pub fn used_idx(&self, q: usize) -> u16 {
        self.shared16(self.rings[q].used_ring() + 2).load(Ordering::Acquire)
    }

    /// Takes used entries that are there: (head, length).
    pub fn take(&mut self, q: usize) -> Vec<(u32, u32)> {
        let idx = self.used_idx(q);
        let mut out = Vec::new();
        while self.rings[q].seen != idx {
            let ring = &self.rings[q];
            let at = ring.used_ring() + 4 + u64::from(ring.seen % ring.size) * 8;
            let entry = self.get(at, 8);
            let word = |i: usize| u32::from_le_bytes(entry[i..i + 4].try_into().unwrap());
            out.push((word(0), word(4)));
            self.rings[q].seen = ring.seen.wrapping_add(1);
        }
        out
    }

    /// Waits for `n` used entries, asleep on the call descriptor as a guest is: a missing signal shows as a timeout.
    pub fn wait(&mut self, q: usize, n: usize) -> Vec<(u32, u32)> {
        let got = self.wait_for(q, n, Duration::from_secs(20));
        assert_eq!(got.len(), n, "queue {q}: used {} of {n} in 20 s", got.len());
        got
    }

    pub fn wait_for(&mut self, q: usize, n: usize, limit: Duration) -> Vec<(u32, u32)> {
        let deadline = Instant::now() + limit;
        let mut out = self.take(q);
        while out.len() < n {
            let ring = &self.rings[q];
            if self.event_idx {
                self.shared16(ring.avail_ring() + 4 + u64::from(ring.size) * 2).store(ring.seen, Ordering::Release);
            }
            fence(Ordering::SeqCst);
            let more = self.take(q);
            if !more.is_empty() {
                out.extend(more);
                continue;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            let told = poll(&mut [PollFd::new(&self.rings[q].call, PollFlags::IN)], Some(&left)).unwrap();
            if told == 0 {
                assert_eq!(self.used_idx(q), self.rings[q].seen, "completions without a signal");
                return out;
            }
            let _ = rustix::io::read(&self.rings[q].call, &mut [0u8; 8][..]);
            out.extend(self.take(q));
        }
        out
    }

    /// An ordinary write of a repeated byte through queue `q`, which must succeed.
    pub fn write(&mut self, q: usize, sector: u64, len: u32, byte: u8) {
        self.put(SCRATCH, &vec![byte; len as usize]);
        self.order(q, 1, sector, len);
    }

    /// Write-zeroes of `count` sectors, or a discard, which must succeed.
    pub fn zero(&mut self, q: usize, sector: u64, count: u32, discard: bool) {
        self.put(SCRATCH, &[&sector.to_le_bytes()[..], &count.to_le_bytes(), &[0; 4]].concat());
        self.order(q, if discard { 11 } else { 13 }, 0, 16);
    }

    /// A request with `len` bytes of SCRATCH for the device to read.
    fn order(&mut self, q: usize, kind: u32, sector: u64, len: u32) {
        let (header, status) = (HEADERS + 0xF00, STATUSES + 0xF00);
        let table = self.rings[q].desc();
        self.header(header, kind, sector);
        self.put(status, &[0xEE]);
        self.table(table, 0, &Frontend::chain(0, &[r(header, 16), r(SCRATCH, len), w(status, 1)]));
        let old = self.rings[q].avail;
        self.offer(q, &[0]);
        self.kick_if_wanted(q, old);
        assert_eq!(self.wait(q, 1), [(0, 1)]);
        assert_eq!(self.get(status, 1), [0]);
    }

    /// An ordinary read through queue `q`.
    pub fn read(&mut self, q: usize, sector: u64, len: u32) -> Vec<u8> {
        let (header, status) = (HEADERS + 0xF00, STATUSES + 0xF00);
        let table = self.rings[q].desc();
        self.header(header, 0, sector);
        self.put(status, &[0xEE]);
        self.put(SCRATCH, &vec![0xA5; len as usize]);
        self.table(table, 0, &Frontend::chain(0, &[r(header, 16), w(SCRATCH, len), w(status, 1)]));
        let old = self.rings[q].avail;
        self.offer(q, &[0]);
        self.kick_if_wanted(q, old);
        assert_eq!(self.wait(q, 1), [(0, len + 1)]);
        assert_eq!(self.get(status, 1), [0]);
        self.get(SCRATCH, len as usize)
    }
}
