//! What there is to see of a ring in guest memory, beside what the `virtio-queue` crate looks at.

use super::GuestMap;
use std::sync::atomic::Ordering;
use virtio_queue::QueueT;
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

/// `avail.flags`: the driver wants no interrupts (virtio 1.2, section 2.7.6).
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// True when all three parts of the ring lie in the guest's memory (sizes: virtio 1.2, section 2.7). The crate checks only
/// the bytes that it comes across, and takes those that it cannot read for an empty ring.
pub fn in_reach(queue: &virtio_queue::Queue, memory: &GuestMap) -> bool {
    let size = usize::from(queue.size());
    let part = |at, len, access| memory.check_range(GuestAddress(at), len, access);
    part(queue.desc_table(), 16 * size, Permissions::Read)
        && part(queue.avail_ring(), 6 + 2 * size, Permissions::Read)
        && part(queue.used_ring(), 6 + 8 * size, Permissions::Write)
}

/// The driver set NO_INTERRUPT, which counts only without EVENT_IDX. The crate leaves this flag to us.
pub fn interrupts_off(queue: &virtio_queue::Queue, memory: &GuestMap) -> bool {
    !queue.event_idx_enabled()
        && memory
            .load::<u16>(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
            .is_ok_and(|flags| u16::from_le(flags) & AVAIL_F_NO_INTERRUPT != 0)
}
