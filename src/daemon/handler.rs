//! The vhost-user messages of one connection (QEMU docs/interop/vhost-user.rst).
//!
//! `vhost-user-backend` brings a handler of its own, but it is private and leaves no room for what a disk needs later
//! (an inflight region, a config-change message, several connections); only its vrings are used here.

mod halt;

use super::dirty_log::{DirtyLog, Logging};
use super::frontend::{Mapping, map_region, prepare_event};
use super::inflight::{self, Inflight};
use super::worker::{Run, Worker};
use super::{GuestMap, GuestMemory, Served, Vring};
use crate::device::config::WRITEBACK_AT;
use crate::device::{Geometry, Late};
use std::fs::File;
use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Backend, Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vhost_user_backend::VringT;
use virtio_bindings::bindings::virtio_blk::VIRTIO_BLK_F_FLUSH;
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestAddressSpace, GuestMemoryMmap};

/// Entries a ring may have: what QEMU allows for vhost-user-blk (its `queue-size` property).
pub const QUEUE_SIZE_MAX: u16 = 1024;

/// Memory slots offered: what QEMU's own backends offer (VHOST_USER_MAX_RAM_SLOTS).
const MEM_SLOTS_MAX: u64 = 512;

/// A ring and its thread.
struct Ring {
    vring: Vring,
    worker: Option<Worker>,
    running: bool,
    /// Where in guest memory writes to the used ring are logged, if the frontend wants them logged.
    log_used: Option<u64>,
    /// Told when the guest has broken the ring.
    err: Option<File>,
}

/// What there is to know of a connection.
#[derive(Clone, Debug)]
pub struct Summary {
    /// The virtio features that the guest's driver has accepted.
    pub features: u64,
    /// Which rings run.
    pub running: Vec<bool>,
}

/// The state of one connection.
pub struct Handler {
    served: Arc<Served>,
    num_queues: u16,
    memory: GuestMemory,
    /// Earlier memory maps: requests in flight may still use them.
    old_maps: Vec<Weak<GuestMap>>,
    mappings: Vec<Mapping>,
    rings: Vec<Ring>,
    features: u64,
    /// The frontend's bitmap of dirty pages.
    log: Option<Arc<DirtyLog>>,
    inflight: Option<Arc<Inflight>>,
    drain_time: Duration,
    /// The kernel does not let go of a queue's thread. The process has to end.
    hung: bool,
}

impl Handler {
    /// A handler for a new connection.
    pub fn new(served: Arc<Served>, num_queues: u16, drain_time: Duration) -> io::Result<Self> {
        let memory = GuestMemory::new(GuestMap::new());
        let ring = || {
            let vring = Vring::new(memory.clone(), QUEUE_SIZE_MAX).map_err(io::Error::other)?;
            Ok(Ring { vring, worker: None, running: false, log_used: None, err: None })
        };
        let rings = (0..num_queues).map(|_| ring()).collect::<io::Result<_>>()?;
        Ok(Handler {
            served,
            num_queues,
            memory,
            old_maps: Vec::new(),
            mappings: Vec::new(),
            rings,
            features: 0,
            log: None,
            inflight: None,
            drain_time,
            hung: false,
        })
    }

    /// Finishes what is in flight, ends the queue threads, and lets go of the disk if rings have run.
    pub fn shut_down(&mut self) {
        // What could not be finished is logged.
        let _ = self.stop(|_| true, Late::Leave);
        for ring in &mut self.rings {
            ring.worker = None;
        }
    }

    fn geometry(&self) -> Geometry {
        let mut geometry = self.served.drive.geometry(self.num_queues);
        // A driver that does not flush gets a write-through disk.
        geometry.write_cache &= self.features == 0 || self.features & (1 << VIRTIO_BLK_F_FLUSH) != 0;
        geometry
    }

    /// Stops all rings until [`Handler::resume`], finishes what is in flight, and lets go of the disk. The frontend is not
    /// told: its guest waits. The hub says that no ring may run.
    pub fn pause(&mut self) -> Result<()> {
        self.stop(|_| true, Late::Leave)
    }

    /// Lets the rings run that the frontend has started.
    pub fn resume(&mut self) -> Result<()> {
        (0..u32::from(self.num_queues)).try_for_each(|index| self.update(index))
    }

    /// What the control socket tells of the connection.
    pub fn summary(&self) -> Summary {
        Summary { features: self.features, running: self.rings.iter().map(|ring| ring.running).collect() }
    }

    /// True when the kernel keeps a queue's thread: this process can do nothing more for the disk.
    pub fn is_hung(&self) -> bool {
        self.hung
    }

    fn offered(&self) -> u64 {
        let more = VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL;
        self.geometry().features() | more.bits()
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        self.rings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    /// Starts or stops the ring's thread, as kick, enable and addresses now say. A ring that (re)starts is looked at
    /// without waiting for a kick: QEMU sends none after reconnecting.
    fn update(&mut self, index: u32) -> Result<()> {
        let paused = self.served.hub.paused();
        let ring = self.ring(index)?;
        let (runs, kick) = {
            let state = ring.vring.get_ref();
            let runs = state.is_enabled() && state.get_queue().ready();
            (runs, state.get_kick().as_ref().map(|kick| kick.try_clone()))
        };
        let Some(kick) = kick.filter(|_| runs && !paused) else {
            return self.stop(|i| i == index as usize, Late::Fail);
        };
        let kick = {
            use std::os::fd::{FromRawFd, IntoRawFd};
            let raw = kick.map_err(Error::ReqHandlerError)?.into_raw_fd();
            // SAFETY: the clone was just made and its number taken; the File is its only owner.
            unsafe { File::from_raw_fd(raw) }
        };
        let vring = ring.vring.clone();
        let part = inflight::part_of(self.inflight.as_ref(), index, &vring)?;
        if self.ring(index)?.worker.is_none() {
            // Without its thread nobody uses a disk that was opened for this ring.
            let worker = self.start_worker(index, vring).inspect_err(|_| self.rest())?;
            self.ring(index)?.worker = Some(worker);
            self.update_logging(index)?;
        }
        let write_through = self.features & (1 << VIRTIO_BLK_F_FLUSH) == 0;
        let ring = self.ring(index)?;
        if let Some(worker) = &ring.worker {
            let err = ring.err.as_ref().and_then(|err| err.try_clone().ok());
            worker.run(Run { kick, err, write_through, part });
        }
        ring.running = true;
        Ok(())
    }

    /// Tells a ring's thread what to log. Whatever ends after this is logged, also what began before.
    fn update_logging(&mut self, index: u32) -> Result<()> {
        let data = self.features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0;
        let log = self.log.clone();
        let ring = self.ring(index)?;
        let Some(worker) = &ring.worker else { return Ok(()) };
        let used = ring.log_used.or_else(|| data.then(|| ring.vring.get_ref().get_queue().used_ring()));
        let logging = log.filter(|_| used.is_some()).map(|log| Logging { log, data, used });
        worker.log(logging).map_err(Error::ReqHandlerError)
    }

    fn update_all_logging(&mut self) -> Result<()> {
        (0..u32::from(self.num_queues)).try_for_each(|index| self.update_logging(index))
    }

    /// Starts a ring's thread; opens the disk if it is not open. A disk that cannot be opened ends the connection: nothing is
    /// served without the lock, and the frontend tries again when it reconnects.
    fn start_worker(&self, index: u32, vring: Vring) -> Result<Worker> {
        let told = self.geometry();
        let active = self.served.drive.activate().map_err(|e| {
            log::error!("the disk cannot be opened for the VM that starts: {e}");
            Error::ReqHandlerError(io::Error::other(e.to_string()))
        })?;
        if self.geometry() != told {
            self.served.channel.config_changed();
        }
        Worker::spawn(index as usize, vring, self.memory.clone(), active.disk, active.jobs).map_err(|e| {
            log::error!("queue {index}: cannot start its thread and io_uring: {e}");
            Error::ReqHandlerError(e)
        })
    }

    fn replace_memory(&mut self, map: GuestMap) -> Result<()> {
        // Requests in flight keep the old map until they have ended.
        self.old_maps.retain(|map| map.strong_count() > 0);
        self.old_maps.push(Arc::downgrade(&self.memory.memory().into_inner()));
        self.memory.lock().map_err(|_| Error::BackendInternalError)?.replace(map);
        Ok(())
    }

    /// Looks at every ring that runs again. One that was out of reach while the frontend took its memory away and gave it
    /// back (it does so to change the size of a region) goes on.
    fn look_again(&mut self) -> Result<()> {
        for index in 0..u32::from(self.num_queues) {
            if self.ring(index)?.running {
                self.update(index)?;
            }
        }
        Ok(())
    }

    fn guest_address(&self, user: u64) -> Result<u64> {
        self.mappings
            .iter()
            .find(|m| user >= m.user && user - m.user < m.size)
            .map(|m| user - m.user + m.guest)
            .ok_or_else(|| {
                log::error!("the frontend named a ring address {user:#x} outside the memory that it shared");
                Error::InvalidParam
            })
    }
}

fn memory_error(e: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(e))
}

impl VhostUserBackendReqHandlerMut for Handler {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // Deprecated in the specification and not to be relied upon: it does what a new connection does.
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop(|_| true, Late::Fail)?;
        self.shut_down();
        for ring in &self.rings {
            ring.vring.set_enabled(false);
            ring.vring.set_queue_ready(false);
        }
        self.features = 0;
        self.inflight = None;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.offered() != 0 {
            log::error!("the frontend wants features that were not offered: {:#x}", features & !self.offered());
            return Err(Error::InvalidParam);
        }
        self.features = features;
        let event_idx = features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        for ring in &self.rings {
            ring.vring.set_queue_event_idx(event_idx);
        }
        self.update_all_logging()?;
        // Without protocol features there is no SET_VRING_ENABLE, and rings start enabled.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            for index in 0..u32::from(self.num_queues) {
                self.ring(index)?.vring.set_enabled(true);
                self.update(index)?;
            }
        }
        self.look_again()
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let (mapped, mappings): (Vec<_>, Vec<_>) = regions
            .iter()
            .zip(files)
            .map(|(region, file)| map_region(region, file))
            .collect::<Result<Vec<_>>>()?
            .into_iter()
            .unzip();
        self.replace_memory(GuestMemoryMmap::from_regions(mapped).map_err(memory_error)?)?;
        self.mappings = mappings;
        self.look_again()?;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MEM_SLOTS_MAX)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<u64>> {
        if self.mappings.len() as u64 >= MEM_SLOTS_MAX {
            return Err(Error::InvalidParam);
        }
        let (mapped, mapping) = map_region(region, file)?;
        let map = self.memory.memory().insert_region(Arc::new(mapped)).map_err(memory_error)?;
        self.replace_memory(map)?;
        self.mappings.push(mapping);
        self.look_again()?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (map, _) = self
            .memory
            .memory()
            .remove_region(GuestAddress(region.guest_phys_addr), region.memory_size)
            .map_err(memory_error)?;
        self.replace_memory(map)?;
        self.mappings.retain(|m| m.guest != region.guest_phys_addr);
        self.rings.iter().filter_map(|ring| ring.worker.as_ref()).for_each(Worker::forget);
        Ok(())
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let ring = self.ring(index)?;
        let size = u16::try_from(num).map_err(|_| Error::InvalidParam)?;
        // The crate logs and ignores a size that it does not take.
        if size == 0 || size > QUEUE_SIZE_MAX || !size.is_power_of_two() || ring.running {
            log::error!(
                "queue {index}: a ring of {num} entries is not possible (a power of two up to {QUEUE_SIZE_MAX})"
            );
            return Err(Error::InvalidParam);
        }
        ring.vring.set_queue_size(size);
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let (descriptor, used, available) =
            (self.guest_address(descriptor)?, self.guest_address(used)?, self.guest_address(available)?);
        let ring = self.ring(index)?;
        if ring.running {
            let same = {
                let state = ring.vring.get_ref();
                let queue = state.get_queue();
                (queue.desc_table(), queue.used_ring(), queue.avail_ring()) == (descriptor, used, available)
            };
            if !same {
                return Err(Error::InvalidOperation("ring addresses cannot change while the ring runs"));
            }
        }
        ring.log_used = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        if ring.running {
            // QEMU says so to switch the log on and off.
            return self.update_logging(index);
        }
        ring.vring.set_queue_info(descriptor, available, used).map_err(|e| {
            log::error!("queue {index}: bad ring addresses: {e}");
            Error::InvalidParam
        })?;
        // The index of the used ring is in guest memory; SET_VRING_BASE tells only that of the available ring.
        let used_idx = ring.vring.queue_used_idx().map_err(|_| Error::InvalidParam)?;
        ring.vring.set_queue_next_used(used_idx);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let ring = self.ring(index)?;
        if ring.running {
            return Err(Error::InvalidOperation("the ring's base cannot change while it runs"));
        }
        ring.vring.set_queue_next_avail(u16::try_from(base).map_err(|_| Error::InvalidParam)?);
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        // First of all: a thread that hangs keeps its ring locked.
        self.stop(|i| i == index as usize, Late::Fail)?;
        let ring = self.ring(index)?;
        ring.vring.set_queue_ready(false);
        let base = ring.vring.queue_next_avail();
        ring.vring.set_kick(None);
        ring.vring.set_call(None);
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let ring = self.ring(u32::from(index))?;
        let Some(file) = file else {
            log::error!("queue {index}: the frontend asks for polling mode, which vmar does not have");
            return Err(Error::InvalidParam);
        };
        prepare_event(&file)?;
        ring.vring.set_kick(Some(file));
        ring.vring.set_queue_ready(true);
        self.update(u32::from(index))
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let ring = self.ring(u32::from(index))?;
        file.as_ref().map_or(Ok(()), prepare_event)?;
        ring.vring.set_call(file);
        // Completions published between the old descriptor and the new one would go unnoticed, also those of an earlier
        // connection. libvhost-user signals here whether the ring runs or not, and QEMU's own test waits for it.
        let _ = ring.vring.signal_used_queue();
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        file.as_ref().map_or(Ok(()), prepare_event)?;
        self.ring(u32::from(index))?.err = file;
        Ok(())
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        if !enable {
            self.stop(|i| i == index as usize, Late::Fail)?;
        }
        self.ring(index)?.vring.set_enabled(enable);
        self.update(index)
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let more = features & !self.get_protocol_features()?.bits();
        if more != 0 {
            log::error!("the frontend wants protocol features that were not offered: {more:#x}");
            return Err(Error::InvalidParam);
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        Ok(self.geometry().config(offset as usize, size as usize))
    }

    /// Only the cache mode can be written. Whatever is refused changes nothing, so the connection goes on.
    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let write_cache = match buf {
            [byte @ (0 | 1)] if offset as usize == WRITEBACK_AT && !self.geometry().read_only => *byte == 1,
            _ => return Err(Error::InvalidOperation("only the cache mode of a writable disk can be set, to 0 or 1")),
        };
        self.served.drive.set_write_cache(write_cache).map_err(|e| {
            log::error!("cannot switch the write cache: {e}");
            Error::InvalidOperation("the cache mode cannot be switched")
        })
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("a disk has no GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        inflight::get_fd(wanted, self.rings.len())
    }

    fn set_inflight_fd(&mut self, told: &VhostUserInflight, file: File) -> Result<()> {
        if self.rings.iter().any(|ring| ring.running) {
            log::error!("the frontend changes the inflight region while a ring runs");
            return Err(Error::InvalidParam);
        }
        self.inflight = Some(inflight::set_fd(told, &file, self.rings.len())?);
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("not offered"))
    }

    fn set_backend_req_fd(&mut self, _backend: Backend) {
        self.served.channel.accept();
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let opened = DirtyLog::open(&file, log.mmap_offset, log.mmap_size).map_err(|e| {
            log::error!("the frontend's log of dirty pages cannot be used: {e}");
            Error::ReqHandlerError(e)
        })?;
        self.log = Some(Arc::new(opened));
        self.update_all_logging()
    }
}
