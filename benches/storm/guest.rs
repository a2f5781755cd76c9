//! One VM: a libblkio client that does the reads of a boot.

use crate::Result;
use crate::boot::Boot;
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Reads in flight at most.
const SLOTS: usize = 8;
/// A read that takes longer means that the server hangs. A hundred VMs at a slow disk wait long.
const PATIENCE: Duration = Duration::from_secs(600);

/// A connected guest.
pub struct Guest {
    // In this order they are dropped: the queue before its device.
    queue: Blkioq,
    region: MemoryRegion,
    slot: usize,
    _blkio: Blkio,
}

// SAFETY: libblkio's objects may be used by any thread, as long as by one at a time; `&mut` sees to that.
unsafe impl Send for Guest {}

/// What a boot took.
#[derive(Debug, Default, Clone, Copy)]
pub struct Played {
    /// From the first pause to the last read.
    pub total: Duration,
    /// Of it, waiting for reads.
    pub waited: Duration,
    /// Of it, before the application began to load.
    pub marked: Option<Duration>,
}

impl Guest {
    /// Connects to a VM's disk, for reads of at most `longest` bytes.
    ///
    /// # Errors
    /// What libblkio says, with the name of the socket.
    pub fn connect(socket: &Path, longest: usize) -> Result<Guest> {
        let say = |e: blkio::Error| format!("{}: {e}", socket.display());
        let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(say)?;
        blkio.set_str("path", socket.to_str().ok_or("a path that is not UTF-8")?).map_err(say)?;
        blkio.set_bool("read-only", true).map_err(say)?;
        blkio.connect().map_err(say)?;
        blkio.set_i32("num-queues", 1).map_err(say)?;
        let queue = blkio.start().map_err(say)?.queues.pop().ok_or("libblkio has no queue")?;
        let slot = longest.next_multiple_of(4096);
        let region = blkio.alloc_mem_region(slot * SLOTS).map_err(say)?;
        blkio.map_mem_region(&region).map_err(say)?;
        // Every page touched by this process, so that none of it counts as memory of the server's control group.
        // SAFETY: the region was just allocated, with this length, and nobody else has it yet.
        unsafe { std::ptr::write_bytes(region.addr as *mut u8, 1, region.len) };
        Ok(Guest { queue, region, slot, _blkio: blkio })
    }

    /// Does the reads; `think` of each pause passes.
    ///
    /// # Errors
    /// A read that failed or hangs.
    pub fn replay(&mut self, boot: &Boot, think: f64) -> Result<Played> {
        let mut played = Played::default();
        let start = Instant::now();
        for (i, step) in boot.steps.iter().enumerate() {
            if boot.mark == Some(i) {
                played.marked = Some(start.elapsed());
            }
            std::thread::sleep(step.pause.mul_f64(think));
            let asked = Instant::now();
            for reads in step.reads.chunks(SLOTS) {
                self.read(reads)?;
            }
            played.waited += asked.elapsed();
        }
        played.total = start.elapsed();
        Ok(played)
    }

    /// Compares some reads with the image.
    ///
    /// # Errors
    /// The first byte that differs.
    pub fn check(&mut self, boot: &Boot, raw: &File, count: usize, seed: u64) -> Result<()> {
        let reads: Vec<_> = boot.reads().collect();
        let mut random = seed;
        for _ in 0..count.min(reads.len()) {
            let (offset, len) = reads[(crate::unit(&mut random) * reads.len() as f64) as usize];
            self.read(&[(offset, len)])?;
            let mut want = vec![0; len];
            raw.read_exact_at(&mut want, offset).map_err(|e| format!("{}: {e}", boot.raw.display()))?;
            // SAFETY: nothing is in flight, so the region is this process's alone; a slot has room for the longest read.
            let got = unsafe { std::slice::from_raw_parts_mut(self.region.addr as *mut u8, len) };
            if let Some(at) = got.iter().zip(&want).position(|(a, b)| a != b) {
                let place = offset + at as u64;
                return Err(format!("the disk differs from {} at byte {place}", boot.raw.display()));
            }
            // So that a read that writes nothing is seen.
            got.fill(0xA5);
        }
        Ok(())
    }

    /// Several reads at once, at most as many as there are slots.
    fn read(&mut self, reads: &[(u64, usize)]) -> Result<()> {
        for (i, &(offset, len)) in reads.iter().enumerate() {
            let memory = (self.region.addr + i * self.slot) as *mut u8;
            self.queue.read(offset, memory, len, i, ReqFlags::empty());
        }
        let mut left = reads.len();
        while left > 0 {
            let mut done = [const { MaybeUninit::<Completion>::uninit() }; SLOTS];
            let mut patience = PATIENCE;
            let n = self.queue.do_io(&mut done[..left], 1, Some(&mut patience), None);
            let n = n.map_err(|e| format!("waiting for a read: {e}"))?;
            for completion in &done[..n] {
                // SAFETY: the first `n` completions are filled in.
                match unsafe { completion.assume_init_ref() }.ret {
                    0 => left -= 1,
                    code => return Err(format!("a read failed: {}", std::io::Error::from_raw_os_error(-code))),
                }
            }
        }
        Ok(())
    }
}
