//! The ring of a queue's thread, translated again whenever the guest's memory map has changed.

use super::{GuestMemory, Vring};
use crate::device::{Place, Ring, Space};
use vhost_user_backend::VringT;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

/// A ring as its thread has it. How far it has got is the thread's own until [`Port::close`] says it.
pub struct Port {
    vring: Vring,
    memory: GuestMemory,
    ring: Option<Ring>,
}

impl Port {
    /// Nothing is translated yet.
    pub fn new(vring: Vring, memory: GuestMemory) -> Self {
        Port { vring, memory, ring: None }
    }

    /// What the message handler set up.
    pub fn vring(&self) -> &Vring {
        &self.vring
    }

    /// The guest's memory map.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The ring in the guest's present memory; `None` when it is not there.
    #[inline]
    pub fn ring(&mut self) -> Option<&mut Ring> {
        let map = self.memory.memory();
        if !self.ring.as_ref().is_some_and(|ring| std::ptr::eq(&raw const **ring.space().map(), &raw const *map)) {
            let map = map.into_inner();
            self.close();
            let place = self.place();
            self.ring = Ring::open(&place, Space::new(map));
        }
        self.ring.as_mut()
    }

    /// The ring as it was last seen.
    pub fn open(&mut self) -> Option<&mut Ring> {
        self.ring.as_mut()
    }

    /// Lets go of the memory; what the thread knows of the ring's state becomes what everybody knows.
    pub fn close(&mut self) {
        if let Some(ring) = self.ring.take() {
            let (avail, used) = ring.position();
            let mut vring = self.vring.get_mut();
            let queue = vring.get_queue_mut();
            queue.set_next_avail(avail);
            queue.set_next_used(used);
        }
    }

    /// Entries of the ring.
    pub fn size(&self) -> u16 {
        match &self.ring {
            Some(ring) => ring.size(),
            None => self.vring.get_ref().get_queue().size(),
        }
    }

    fn place(&self) -> Place {
        let vring = self.vring.get_ref();
        let queue = vring.get_queue();
        Place {
            size: queue.size(),
            desc: queue.desc_table(),
            avail: queue.avail_ring(),
            used: queue.used_ring(),
            event_idx: queue.event_idx_enabled(),
            next_avail: queue.next_avail(),
            next_used: queue.next_used(),
        }
    }
}
