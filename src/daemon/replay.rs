//! A descriptor chain by its head, for requests that are started again: the `virtio-queue` crate gives chains only to who
//! finds their heads in an available ring. So it is shown one that holds the head and nothing else.

use super::GuestMap;
use std::cell::Cell;
use std::iter::FusedIterator;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{GuestMemorySliceIterator, Result};
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, Permissions, VolatileSlice,
};

/// Where the crate believes the available ring to be. Any even address does: guest memory is not looked at before the ring
/// is out of sight again.
const RING: u64 = 0x1000;

/// Guest memory, with an available ring of one entry in its place as long as `shown`.
pub struct Shown<'m> {
    memory: &'m GuestMap,
    /// Flags 0, index 1, the head.
    ring: [u16; 3],
    shown: Cell<bool>,
}

impl<'m> Shown<'m> {
    /// Guest memory in which [`Shown::chain`] finds the chain of `head`.
    pub fn new(memory: &'m GuestMap, head: u16) -> Self {
        Shown { memory, ring: [0, 1u16.to_le(), head.to_le()], shown: Cell::new(false) }
    }

    /// The chain, read from the descriptor table of `queue`. `None` when the crate finds none, which does not happen.
    pub fn chain(&self, queue: &Queue) -> Option<DescriptorChain<&Self>> {
        let mut one = Queue::new(queue.size()).ok()?;
        one.try_set_desc_table_address(GuestAddress(queue.desc_table())).ok()?;
        one.try_set_avail_ring_address(GuestAddress(RING)).ok()?;
        one.set_ready(true);
        self.shown.set(true);
        // Both of the ring's reads happen in here, those of the chain later.
        let chain = one.iter(self).ok().and_then(|mut chains| chains.next());
        self.shown.set(false);
        chain
    }
}

impl GuestMemory for Shown<'_> {
    type PhysicalMemory = GuestMap;
    type Bitmap = <GuestMap as GuestMemory>::Bitmap;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(self.memory, addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        if !self.shown.get() {
            return Ok(Slices::Memory(GuestMemory::get_slices(self.memory, addr, count, access)?));
        }
        let outside = || GuestMemoryError::InvalidGuestAddress(addr);
        let at = addr.0.checked_sub(RING).and_then(|at| usize::try_from(at).ok()).ok_or_else(outside)?;
        if access != Permissions::Read || at.checked_add(count).is_none_or(|end| end > size_of_val(&self.ring)) {
            return Err(outside());
        }
        let start = self.ring.as_ptr().cast::<u8>().cast_mut().wrapping_add(at);
        let region = GuestMemoryBackend::iter(self.memory).next();
        // SAFETY: the bounds are checked above, and the ring lives as long as the slice.
        let slice = region.map(|region| unsafe { slice_beside(region, start, count) });
        slice.map(|slice| Slices::Ring(Some(slice))).ok_or_else(outside)
    }
}

/// A slice that is only read, so that it may have any region's dirty bitmap.
///
/// # Safety
/// The bytes live as long as the region is borrowed, and nobody writes through the slice.
unsafe fn slice_beside<R: GuestMemoryRegion>(
    region: &R,
    start: *mut u8,
    count: usize,
) -> VolatileSlice<'_, BS<'_, R::B>> {
    // SAFETY: the caller's promise.
    unsafe { VolatileSlice::with_bitmap(start, count, region.bitmap(), None) }
}

/// Slices of the ring or of guest memory.
enum Slices<R, M> {
    Ring(Option<R>),
    Memory(M),
}

impl<R, E, M: Iterator<Item = std::result::Result<R, E>>> Iterator for Slices<R, M> {
    type Item = std::result::Result<R, E>;

    fn next(&mut self) -> Option<Self::Item> {
        match self {
            Slices::Ring(slice) => slice.take().map(Ok),
            Slices::Memory(slices) => slices.next(),
        }
    }
}

impl<R, E, M: FusedIterator<Item = std::result::Result<R, E>>> FusedIterator for Slices<R, M> {}

impl<'a, B: vm_memory::bitmap::BitmapSlice, M: GuestMemorySliceIterator<'a, B>> GuestMemorySliceIterator<'a, B>
    for Slices<VolatileSlice<'a, B>, M>
{
}
