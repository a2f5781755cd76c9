//! A libblkio client: the same code drives every server, and the raw file itself.

use crate::Result;
use crate::latency::Latencies;
use crate::scenario::Scenario;
use crate::stream::{Request, Rng, Stream};
use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// Requests in flight on one queue, at most.
const DEPTH_MAX: usize = 128;
/// Bytes of a request of a pass over the disk, and how many are in flight.
const PASS: (usize, usize) = (256 << 10, 8);
/// A request that takes longer means that the server hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// A turn with a throttle counts from the first completion after this: what an idle throttle saved up is gone then.
const LEAD: Duration = Duration::from_secs(1);

/// What is driven.
#[derive(Debug, Clone, Copy)]
pub enum Target<'a> {
    /// A vhost-user-blk socket.
    Socket(&'a Path),
    /// A file, by libblkio's own io_uring driver: the floor.
    File(&'a Path),
}

/// A connection with its queues and memory.
pub struct Client {
    // In this order they are dropped: queues before their device.
    lanes: Vec<Lane>,
    region: MemoryRegion,
    capacity: u64,
    is_polling: bool,
    _blkio: Blkio,
}

/// What a run came to.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    /// Reads and writes that ended in time.
    pub requests: u64,
    /// All of them, and the flushes: what the CPU time was spent on.
    pub requests_all: u64,
    /// Nanoseconds from the first request to the end of the turn, or to the last request if it ended before; with a
    /// throttle, between the completions at both ends of what counts.
    pub ns: u64,
    /// Latencies of the reads and writes.
    pub latencies: Latencies,
    /// Latencies of the flushes.
    pub flushes: Latencies,
}

/// A queue and the memory of its requests.
struct Lane {
    queue: Blkioq,
    /// Start of its part of the region.
    memory: usize,
    depth: usize,
    stream: Stream,
    /// When the request of each slot began, in nanoseconds of the run, and whether it is a flush.
    began: Vec<(u64, bool)>,
    flying: usize,
    waits_limited: bool,
}

// SAFETY: a libblkio queue may be used by any thread, as long as by one at a time; `&mut` sees to that. Its memory belongs to
// the client, which outlives the threads.
unsafe impl Send for Lane {}

impl Client {
    /// Connects with the scenario's queues and mode.
    ///
    /// # Errors
    /// What libblkio says, with the name of the target.
    pub fn connect(target: Target, scenario: &Scenario, read_only: bool) -> Result<Client> {
        let (driver, path) = match target {
            Target::Socket(path) => ("virtio-blk-vhost-user", path),
            Target::File(path) => ("io_uring", path),
        };
        let say = |e: blkio::Error| format!("{}: {e}", path.display());
        let text = path.to_str().ok_or("a path that is not UTF-8")?;
        let mut blkio = Blkio::new(driver).map_err(say)?;
        blkio.set_str("path", text).map_err(say)?;
        blkio.set_bool("read-only", read_only).map_err(say)?;
        blkio.connect().map_err(say)?;
        blkio.set_i32("num-queues", scenario.queues as i32).map_err(say)?;
        let depth = scenario.depth.div_ceil(scenario.queues);
        if let Target::Socket(_) = target {
            // libblkio has no indirect descriptors: a request takes three.
            let size = (3 * depth).next_power_of_two().max(256);
            blkio.set_i32("queue-size", size as i32).map_err(say)?;
        }
        let capacity = blkio.get_u64("capacity").map_err(say)?;
        let queues = blkio.start().map_err(say)?.queues;
        let share = (depth * scenario.block).max(PASS.0 * PASS.1);
        let region = blkio.alloc_mem_region(share * queues.len()).map_err(say)?;
        blkio.map_mem_region(&region).map_err(say)?;
        // Contents of their own, so that nothing is taken for zeroes; and every page touched.
        // SAFETY: the region was just allocated, with this length, and nobody else has it yet.
        Rng::new(7).fill(unsafe { std::slice::from_raw_parts_mut(region.addr as *mut u8, region.len) });
        let waits_limited = matches!(target, Target::Socket(_));
        let lane = |(i, queue)| {
            let stream = Stream::new(scenario, capacity, i, 0);
            Lane { queue, memory: region.addr + i * share, depth, stream, began: Vec::new(), flying: 0, waits_limited }
        };
        let lanes = queues.into_iter().enumerate().map(lane).collect();
        Ok(Client { lanes, region, capacity, is_polling: scenario.is_polling, _blkio: blkio })
    }

    /// Bytes of the disk.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// One turn: the scenario's requests for so long.
    ///
    /// # Errors
    /// A request that failed or hangs.
    pub fn run(&mut self, scenario: &Scenario, seed: u64, length: Duration) -> Result<Tally> {
        let capacity = self.capacity;
        for (i, lane) in self.lanes.iter_mut().enumerate() {
            lane.stream = Stream::new(scenario, capacity, i, seed);
            lane.depth = scenario.depth.div_ceil(scenario.queues);
        }
        let lead = if scenario.throttle.is_some() { LEAD } else { Duration::ZERO };
        if self.is_polling || self.lanes.len() == 1 {
            // One spinning thread for all queues: it has one CPU, the server has the other.
            return pump(&mut self.lanes, self.is_polling, lead, length);
        }
        std::thread::scope(|scope| {
            let spawn = |lane| scope.spawn(move || pump(std::slice::from_mut(lane), false, lead, length));
            let threads: Vec<_> = self.lanes.iter_mut().map(spawn).collect();
            let mut sum = Tally::default();
            for thread in threads {
                sum.merge(&thread.join().map_err(|_| "a client thread panicked")??);
            }
            Ok(sum)
        })
    }

    /// Reads or writes the first `bytes` of the disk once.
    pub fn pass(&mut self, bytes: u64, writes: bool) -> Result<()> {
        let lane = &mut self.lanes[0];
        lane.stream = Stream::pass(bytes, PASS.0, writes);
        lane.depth = PASS.1;
        pump(std::slice::from_mut(lane), self.is_polling, Duration::ZERO, Duration::from_secs(3600))?;
        Ok(())
    }

    /// Compares samples of the disk with what it must hold.
    ///
    /// # Errors
    /// The first byte that differs.
    pub fn verify(&mut self, want: &Path) -> Result<()> {
        let say = |e| format!("{}: {e}", want.display());
        let file = File::open(want).map_err(say)?;
        let mut rng = Rng::new(11);
        let mut expected = vec![0u8; PASS.0];
        for i in 0..96 {
            let len = if i % 2 == 0 { PASS.0 } else { 4 << 10 };
            let blocks = (self.capacity - len as u64) / 4096 + 1;
            let offset = if i == 0 { 0 } else { rng.below(blocks) * 4096 };
            file.read_exact_at(&mut expected[..len], offset).map_err(say)?;
            // SAFETY: nothing is in flight, so the region is the client's alone.
            let got = unsafe { std::slice::from_raw_parts_mut(self.region.addr as *mut u8, len) };
            got.fill(0xA5);
            let lane = &mut self.lanes[0];
            (lane.depth, lane.flying) = (1, 1);
            lane.queue.read(offset, got.as_mut_ptr(), len, 0, ReqFlags::empty());
            let mut done = [MaybeUninit::uninit()];
            lane.wait(&mut done, 1)?;
            lane.flying = 0;
            // SAFETY: one completion was asked for, without a limit below it.
            check(unsafe { done[0].assume_init_ref() })?;
            if let Some(at) = got.iter().zip(&expected[..len]).position(|(a, b)| a != b) {
                return Err(format!("the disk differs from {} at byte {}", want.display(), offset + at as u64));
            }
        }
        Rng::new(7).fill(self.memory());
        Ok(())
    }

    fn memory(&mut self) -> &mut [u8] {
        // SAFETY: the region lives as long as the client, the borrow is exclusive, and between runs nothing is in flight.
        unsafe { std::slice::from_raw_parts_mut(self.region.addr as *mut u8, self.region.len) }
    }
}

impl Tally {
    fn merge(&mut self, other: &Tally) {
        self.requests += other.requests;
        self.requests_all += other.requests_all;
        self.ns = self.ns.max(other.ns);
        self.latencies.merge(&other.latencies);
        self.flushes.merge(&other.flushes);
    }
}

impl Lane {
    /// Puts the next request into a slot; false if there is none.
    fn submit(&mut self, slot: usize, now: u64) -> bool {
        let block = self.stream.block();
        let memory = (self.memory + slot * block) as *mut u8;
        let flags = ReqFlags::empty();
        let Some(request) = self.stream.next() else { return false };
        match request {
            Request::Read(offset) => self.queue.read(offset, memory, block, slot, flags),
            Request::Write(offset) => self.queue.write(offset, memory, block, slot, flags),
            Request::Flush => self.queue.flush(slot, flags),
        }
        self.began[slot] = (now, request == Request::Flush);
        self.flying += 1;
        true
    }

    /// Sends what was submitted, and takes at least `min` completions.
    fn wait(&mut self, done: &mut [MaybeUninit<Completion>], min: usize) -> Result<usize> {
        let mut limit = PATIENCE;
        let limit = (self.waits_limited && min > 0).then_some(&mut limit);
        self.queue.do_io(done, min, limit, None).map_err(|e| format!("waiting for a request: {e}"))
    }
}

/// Sends requests until the time is over or the streams end, then waits for those in flight. What completes within `lead`
/// does not count.
fn pump(lanes: &mut [Lane], is_polling: bool, lead: Duration, length: Duration) -> Result<Tally> {
    let mut tally = Tally::default();
    let (lead, deadline) = (lead.as_nanos() as u64, length.as_nanos() as u64);
    let mut counts_from = 0;
    let start = Instant::now();
    let now = || start.elapsed().as_nanos() as u64;
    for lane in lanes.iter_mut() {
        lane.began.resize(lane.depth, (0, false));
        for slot in 0..lane.depth {
            lane.submit(slot, now());
        }
    }
    let mut last = 0;
    let mut spins = 0u32;
    while lanes.iter().any(|lane| lane.flying > 0) {
        for lane in lanes.iter_mut().filter(|lane| lane.flying > 0) {
            let mut done = [const { MaybeUninit::<Completion>::uninit() }; DEPTH_MAX];
            let n = lane.wait(&mut done[..lane.flying.min(DEPTH_MAX)], usize::from(!is_polling))?;
            if n == 0 {
                spins = spins.wrapping_add(1);
                if spins.is_multiple_of(1 << 16) && now() > last + PATIENCE.as_nanos() as u64 {
                    return Err(format!("a request takes longer than {PATIENCE:?}"));
                }
                std::hint::spin_loop();
                continue;
            }
            last = now();
            for completion in &done[..n] {
                // SAFETY: the first `n` completions are filled in.
                let completion = unsafe { completion.assume_init_ref() };
                check(completion)?;
                lane.flying -= 1;
                tally.requests_all += 1;
                let slot = completion.user_data;
                let (began, is_flush) = lane.began[slot];
                if last <= lead {
                    counts_from = last;
                    lane.submit(slot, last);
                    continue;
                }
                // On a crowded machine the server may not even have run: the first requests count in any case.
                if last <= deadline || tally.requests == 0 {
                    tally.ns = last - counts_from;
                    tally.requests += u64::from(!is_flush);
                    if is_flush { &mut tally.flushes } else { &mut tally.latencies }.add(last - began);
                    lane.submit(slot, last);
                }
            }
        }
    }
    if last > deadline && lead == 0 {
        tally.ns = tally.ns.max(deadline);
    }
    Ok(tally)
}

fn check(completion: &Completion) -> Result<()> {
    match completion.ret {
        0 => Ok(()),
        code => Err(format!("a request failed: {}", std::io::Error::from_raw_os_error(-code))),
    }
}
