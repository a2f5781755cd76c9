//! What is in flight, so that it outlives the process (QEMU docs/interop/vhost-user.rst, "Inflight I/O tracking").
//!
//! The region is a memfd of ours that the frontend keeps and hands to the next backend. Each queue has a part of its own: a
//! header, then one entry for each descriptor, used by those that head a chain. The layout is the specification's for split
//! rings; numbers are in the machine's byte order.
//!
//! | bytes of the header | field |
//! | --- | --- |
//! | 0..8 | features: 0 |
//! | 8..10 | version: 1, or 0 before the first use |
//! | 10..12 | entries |
//! | 12..14 | head of the list of the last batch of used descriptors |
//! | 14..16 | index of the used ring after the last batch that was noted as a whole |
//!
//! | bytes of an entry | field |
//! | --- | --- |
//! | 0 | 1 while in flight |
//! | 6..8 | next of the batch list |
//! | 8..16 | counter: the order in which heads were taken |
//!
//! The requests of a batch are linked into the list one by one, shown in the used ring together, and then noted: first each
//! as no longer in flight, last the index. All stores are releases, and so keep their order: whoever is killed between two of them has done the first
//! and not the second.
//!
//! # What a crash may repeat
//! A request that was carried out and not published is carried out once more. For a write that is harmless: the guest did
//! not see it end, so it sent nothing that counts on it; whatever it sent to the same sectors meanwhile races with it anyway.

use rustix::fs::{MemfdFlags, SealFlags};
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use super::Vring;
use super::handler::QUEUE_SIZE_MAX;
use crate::device::Completion;
use vhost::vhost_user::Error;
use vhost::vhost_user::message::VhostUserInflight;
use vhost_user_backend::VringT;
use virtio_queue::QueueT;

/// Bytes of a part's header, and of an entry.
const HEADER_SIZE: usize = 16;
const ENTRY_SIZE: usize = 16;

/// Parts begin at multiples of this, the size of a cache line.
const PART_ALIGN: usize = 64;

/// The version of the layout.
const VERSION: u16 = 1;

const FEATURES: usize = 0;
const VERSION_AT: usize = 8;
const ENTRIES: usize = 10;
const LAST_BATCH_HEAD: usize = 12;
const USED_IDX: usize = 14;

const IN_FLIGHT: usize = 0;
const NEXT: usize = 6;
const COUNTER: usize = 8;

/// Bytes of one queue's part.
fn part_size(queue_size: u16) -> usize {
    (HEADER_SIZE + ENTRY_SIZE * usize::from(queue_size)).next_multiple_of(PART_ALIGN)
}

fn check_shape(shape: &VhostUserInflight, queues_max: usize) -> Result<(), Error> {
    let (queues, size) = (shape.num_queues, shape.queue_size);
    if queues == 0 || usize::from(queues) > queues_max || size > QUEUE_SIZE_MAX || !size.is_power_of_two() {
        log::error!("an inflight region for {queues} queues of {size} entries is not possible");
        return Err(Error::InvalidParam);
    }
    Ok(())
}

/// GET_INFLIGHT_FD: a new region, as the frontend wants it. An error ends the connection, because the message has no way to
/// say no.
pub fn get_fd(wanted: &VhostUserInflight, queues_max: usize) -> Result<(VhostUserInflight, File), Error> {
    check_shape(wanted, queues_max)?;
    let (queues, size) = (wanted.num_queues, wanted.queue_size);
    let file = Inflight::create(queues, size).map_err(|e| {
        log::error!("cannot make an inflight region: {e}");
        Error::ReqHandlerError(e)
    })?;
    Ok((VhostUserInflight::new(Inflight::size_of(queues, size) as u64, 0, queues, size), file))
}

/// SET_INFLIGHT_FD: the region that the frontend has kept. An error ends the connection: served without the region,
/// requests could be lost.
pub fn set_fd(told: &VhostUserInflight, file: &File, queues_max: usize) -> Result<Arc<Inflight>, Error> {
    check_shape(told, queues_max)?;
    let opened = Inflight::open(file, told.mmap_offset, told.mmap_size, told.num_queues, told.queue_size);
    opened.map(Arc::new).map_err(|why| {
        log::error!("the frontend's inflight region cannot be used: {why}");
        Error::InvalidParam
    })
}

/// What tracks the requests of a ring, if the frontend gave a region for that.
pub fn part_of(inflight: Option<&Arc<Inflight>>, index: u32, vring: &Vring) -> Result<Option<Part>, Error> {
    let Some(inflight) = inflight else { return Ok(None) };
    let size = vring.get_ref().get_queue().size();
    let part = inflight.part(index as usize, size);
    if part.is_none() {
        log::error!("queue {index}: the inflight region has no room for a ring of {size} entries");
        return Err(Error::InvalidParam);
    }
    Ok(part)
}

/// A mapped region.
#[derive(Debug)]
pub struct Inflight {
    map: memmap2::MmapRaw,
    num_queues: u16,
    queue_size: u16,
}

impl Inflight {
    /// Bytes of a region for so many queues of so many entries.
    pub fn size_of(num_queues: u16, queue_size: u16) -> usize {
        part_size(queue_size) * usize::from(num_queues)
    }

    /// A new file for a region, all zeros. It cannot be made shorter, so whoever maps it is safe from SIGBUS.
    ///
    /// # Errors
    /// The host is short of memory or descriptors.
    pub fn create(num_queues: u16, queue_size: u16) -> io::Result<File> {
        let fd = rustix::fs::memfd_create("vmar-inflight", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
        rustix::fs::ftruncate(&fd, Self::size_of(num_queues, queue_size) as u64)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        Ok(File::from(fd))
    }

    /// Maps what a frontend hands back: `size` bytes at `offset` of `file`.
    ///
    /// # Errors
    /// One line of what is wrong with it: not a memfd that is sealed against shrinking, too short, not aligned, written by
    /// something that has another layout.
    pub fn open(file: &File, offset: u64, size: u64, num_queues: u16, queue_size: u16) -> Result<Self, String> {
        let needed = Self::size_of(num_queues, queue_size);
        if size < needed as u64 || !offset.is_multiple_of(PART_ALIGN as u64) {
            return Err(format!("{size} bytes at {offset} cannot hold {num_queues} queues of {queue_size}"));
        }
        let failed = |what: &str, e: io::Error| format!("its file {what}: {e}");
        // Pages that are not there would be SIGBUS: it must be as long as it says, and stay so. Huge pages may run out.
        let seals = rustix::fs::fcntl_get_seals(file).map_err(|e| failed("is no memfd", e.into()))?;
        if !seals.contains(SealFlags::SHRINK) {
            return Err("its file is not sealed against shrinking".into());
        }
        let kind = rustix::fs::fstatfs(file.as_fd()).map_err(|e| failed("has no file system", e.into()))?.f_type;
        if kind != libc::TMPFS_MAGIC {
            return Err("its file is not made of ordinary memory".into());
        }
        let len = file.metadata().map_err(|e| failed("has no size", e))?.len();
        if offset.checked_add(size).is_none_or(|end| end > len) {
            return Err(format!("{size} bytes at {offset} of a file of {len}"));
        }
        let map = memmap2::MmapOptions::new()
            .offset(offset)
            .len(needed)
            .map_raw(file)
            .map_err(|e| failed("cannot be mapped", e))?;
        let inflight = Inflight { map, num_queues, queue_size };
        for index in 0..num_queues {
            inflight.check(index)?;
        }
        Ok(inflight)
    }

    fn check(&self, index: u16) -> Result<(), String> {
        let part = Bytes { base: self.base(index), len: part_size(self.queue_size) };
        let (features, version, entries) =
            (part.u64(FEATURES).load(ACQUIRE), part.u16(VERSION_AT).load(ACQUIRE), part.u16(ENTRIES).load(ACQUIRE));
        match version {
            0 => Ok(()),
            VERSION if features == 0 && entries == self.queue_size => Ok(()),
            _ => Err(format!("queue {index}: version {version}, features {features:#x}, {entries} entries")),
        }
    }

    fn base(&self, index: u16) -> *mut u8 {
        self.map.as_mut_ptr().wrapping_add(part_size(self.queue_size) * usize::from(index))
    }

    /// The part of queue `index`; `None` when there is none for a ring of `ring_size`.
    pub fn part(self: &Arc<Self>, index: usize, ring_size: u16) -> Option<Part> {
        let index = u16::try_from(index).ok().filter(|index| *index < self.num_queues)?;
        let bytes = Bytes { base: self.base(index), len: part_size(self.queue_size) };
        let entries = self.queue_size;
        (ring_size <= entries).then(|| Part { _map: Arc::clone(self), bytes, entries, counter: 0 })
    }
}

// SAFETY: the mapping is shared memory that every access reaches through atomics.
unsafe impl Send for Part {}

const ACQUIRE: Ordering = Ordering::Acquire;
const RELEASE: Ordering = Ordering::Release;

/// Shared memory. The frontend may write it at any time: what is read is never trusted.
#[derive(Debug)]
struct Bytes {
    base: *mut u8,
    len: usize,
}

impl Bytes {
    fn at(&self, offset: usize, len: usize) -> *mut u8 {
        assert!(offset.is_multiple_of(len) && offset + len <= self.len, "{offset} of {}", self.len);
        self.base.wrapping_add(offset)
    }

    fn u8(&self, offset: usize) -> &AtomicU8 {
        // SAFETY: `at` checks bounds and alignment (a part begins at a multiple of 64 of a mapping, or of a page's part
        // that is one); the mapping lives as long as `Inflight`, which whoever made this keeps; all accesses are atomic.
        unsafe { AtomicU8::from_ptr(self.at(offset, 1)) }
    }

    fn u16(&self, offset: usize) -> &AtomicU16 {
        // SAFETY: as in `u8`.
        unsafe { AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    fn u64(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as in `u8`.
        unsafe { AtomicU64::from_ptr(self.at(offset, 8).cast()) }
    }
}

/// The part of one queue.
#[derive(Debug)]
pub struct Part {
    _map: Arc<Inflight>,
    bytes: Bytes,
    entries: u16,
    /// The counter of the next head that is taken.
    counter: u64,
}

fn entry(head: u16, field: usize) -> usize {
    HEADER_SIZE + ENTRY_SIZE * usize::from(head) + field
}

impl Part {
    /// Brings the part up to date with a ring of `ring_size` whose used index is `used`; gives the heads that are in flight,
    /// in the order in which they were taken. `None`: the part was never used, and is ready now.
    pub fn recover(&mut self, used: u16, ring_size: u16) -> Option<Vec<u16>> {
        if self.bytes.u16(VERSION_AT).load(ACQUIRE) == 0 {
            for head in 0..self.entries {
                self.bytes.u8(entry(head, IN_FLIGHT)).store(0, RELEASE);
                self.bytes.u64(entry(head, COUNTER)).store(0, RELEASE);
            }
            self.bytes.u64(FEATURES).store(0, RELEASE);
            self.bytes.u16(ENTRIES).store(self.entries, RELEASE);
            self.bytes.u16(LAST_BATCH_HEAD).store(0, RELEASE);
            self.bytes.u16(USED_IDX).store(used, RELEASE);
            // Last: only now does the rest count.
            self.bytes.u16(VERSION_AT).store(VERSION, RELEASE);
            return None;
        }
        // The batch was published, and perhaps not all of it noted.
        let batch = used.wrapping_sub(self.bytes.u16(USED_IDX).load(ACQUIRE));
        if batch <= ring_size {
            let mut head = self.bytes.u16(LAST_BATCH_HEAD).load(ACQUIRE);
            for _ in 0..batch {
                if head >= ring_size {
                    break;
                }
                self.bytes.u8(entry(head, IN_FLIGHT)).store(0, RELEASE);
                head = self.bytes.u16(entry(head, NEXT)).load(ACQUIRE);
            }
        }
        self.bytes.u16(USED_IDX).store(used, RELEASE);
        let mut found: Vec<(u64, u16)> = (0..ring_size)
            .filter(|head| self.bytes.u8(entry(*head, IN_FLIGHT)).load(ACQUIRE) == 1)
            .map(|head| (self.bytes.u64(entry(head, COUNTER)).load(ACQUIRE), head))
            .collect();
        found.sort_unstable();
        self.counter = found.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Some(found.into_iter().map(|(_, head)| head).collect())
    }

    /// A head was taken off the ring. Before it is started.
    fn take(&mut self, head: u16) {
        self.bytes.u64(entry(head, COUNTER)).store(self.counter, RELEASE);
        self.counter = self.counter.wrapping_add(1);
        self.bytes.u8(entry(head, IN_FLIGHT)).store(1, RELEASE);
    }

    /// A head is about to be put into the used ring.
    fn publishing(&mut self, head: u16) {
        let last = self.bytes.u16(LAST_BATCH_HEAD).load(ACQUIRE);
        self.bytes.u16(entry(head, NEXT)).store(last, RELEASE);
        self.bytes.u16(LAST_BATCH_HEAD).store(head, RELEASE);
    }

    /// They are there, and the used ring's index is `used`: noted last, as long as it is not they are a batch that is looked
    /// through.
    fn published(&mut self, heads: &[u16], used: u16) {
        for head in heads {
            self.bytes.u8(entry(*head, IN_FLIGHT)).store(0, RELEASE);
        }
        self.bytes.u16(USED_IDX).store(used, RELEASE);
    }
}

/// What a queue has taken and not published, and in which order it may be published.
///
/// With a region: as it ends. Without one: in the order in which it was taken, because a frontend that loses its backend
/// then starts the ring anew at its used index, and takes all before it for done and all after it for not done.
#[derive(Debug, Default)]
pub struct Tracker {
    part: Option<Part>,
    /// Without a part: what was taken, with the used length of what has ended.
    order: VecDeque<(u16, Option<u32>)>,
    /// With a part: what has ended.
    ended: VecDeque<Completion>,
    outstanding: usize,
}

impl Tracker {
    /// A tracker of `outstanding` heads that the part has in flight already.
    pub fn new(part: Option<Part>, outstanding: usize) -> Self {
        Tracker { part, order: VecDeque::new(), ended: VecDeque::new(), outstanding }
    }

    /// Heads that were taken and not published.
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Heads that have to be taken again by whoever goes on with the ring: those that no region remembers.
    pub fn forgotten(&self) -> u16 {
        u16::try_from(self.order.len()).unwrap_or(u16::MAX)
    }

    /// A head below the ring's size was taken off the ring. Must come before it is started.
    pub fn take(&mut self, head: u16) {
        self.outstanding += 1;
        match &mut self.part {
            Some(part) => part.take(head),
            None => self.order.push_back((head, None)),
        }
    }

    /// A request has ended.
    pub fn end(&mut self, done: Completion) {
        if self.part.is_some() {
            self.ended.push_back(done);
        } else if let Some(slot) = self.order.iter_mut().find(|(head, len)| *head == done.head && len.is_none()) {
            slot.1 = Some(done.len);
        }
    }

    /// What is to be published next; the caller does so, between [`Tracker::publishing`] and [`Tracker::published`].
    pub fn next_ended(&mut self) -> Option<Completion> {
        if self.part.is_some() {
            return self.ended.pop_front();
        }
        let (head, Some(len)) = *self.order.front()? else { return None };
        self.order.pop_front();
        Some(Completion { head, len })
    }

    /// True when there is something to publish.
    pub fn is_ready(&self) -> bool {
        !self.ended.is_empty() || self.order.front().is_some_and(|(_, len)| len.is_some())
    }

    /// `head` is about to be put into the used ring.
    pub fn publishing(&mut self, head: u16) {
        if let Some(part) = &mut self.part {
            part.publishing(head);
        }
    }

    /// These heads are in the used ring, whose index is `used` now.
    pub fn published(&mut self, heads: &[u16], used: u16) {
        self.outstanding = self.outstanding.saturating_sub(heads.len());
        if let Some(part) = &mut self.part {
            part.published(heads, used);
        }
    }
}
