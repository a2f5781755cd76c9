//! Which requests a queue sends, one after another.

use crate::scenario::Scenario;
use std::ops::Range;

/// A small generator: the same seed gives the same requests to every subject.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// Seeds that follow each other give unrelated sequences.
    pub fn new(seed: u64) -> Rng {
        let mut x = seed.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        x ^= x >> 32;
        Rng(x.wrapping_mul(0xD6E8_FEB8_6659_FD93) | 1)
    }

    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    /// Fills with bytes that no block has twice.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            chunk.copy_from_slice(&self.next().to_le_bytes()[..chunk.len()]);
        }
    }
}

/// One request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Read at this byte.
    Read(u64),
    /// Write at this byte.
    Write(u64),
    /// Make the completed writes durable.
    Flush,
}

/// The order of the places.
#[derive(Debug, Clone)]
enum Order {
    Random,
    /// Round and round.
    Sequential,
    /// Each once, in this order; then it ends.
    Once(std::vec::IntoIter<u32>),
    /// Each once, from the first to the last.
    Pass,
}

/// The requests of one queue.
#[derive(Debug, Clone)]
pub struct Stream {
    rng: Rng,
    order: Order,
    block: usize,
    /// Blocks of the disk that belong to this queue.
    part: Range<u64>,
    next: u64,
    read_percent: u64,
    flush_every: u32,
    unflushed: u32,
}

impl Stream {
    /// The requests of queue `queue` on a disk of `capacity` bytes. Queues share random places and divide those that are
    /// touched in order or once.
    pub fn new(scenario: &Scenario, capacity: u64, queue: usize, seed: u64) -> Stream {
        let blocks = capacity / scenario.block as u64;
        let share = blocks / scenario.queues as u64;
        let own = queue as u64 * share..(queue as u64 + 1) * share;
        let mut rng = Rng::new(seed * 64 + queue as u64);
        let (order, part) = match (scenario.is_once(), scenario.is_random) {
            (false, true) => (Order::Random, 0..blocks),
            (false, false) => (Order::Sequential, own),
            (true, false) => (Order::Pass, own),
            (true, true) => {
                let mut places: Vec<u32> = (own.start as u32..own.end as u32).collect();
                for i in (1..places.len()).rev() {
                    places.swap(i, rng.below(i as u64 + 1) as usize);
                }
                (Order::Once(places.into_iter()), own)
            }
        };
        let next = part.start;
        let (read_percent, flush_every) = (scenario.read_percent(), scenario.flush_every);
        Stream { rng, order, block: scenario.block, part, next, read_percent, flush_every, unflushed: 0 }
    }

    /// One pass over the first `bytes` of the disk.
    pub fn pass(bytes: u64, block: usize, writes: bool) -> Stream {
        let read_percent = if writes { 0 } else { 100 };
        let part = 0..bytes / block as u64;
        Stream {
            rng: Rng::new(0),
            order: Order::Pass,
            block,
            part,
            next: 0,
            read_percent,
            flush_every: 0,
            unflushed: 0,
        }
    }

    /// Bytes of each request.
    pub fn block(&self) -> usize {
        self.block
    }

    /// The next request; nothing more after the last place of those that are touched once.
    pub fn next(&mut self) -> Option<Request> {
        if self.flush_every > 0 && self.unflushed == self.flush_every {
            self.unflushed = 0;
            return Some(Request::Flush);
        }
        let place = match &mut self.order {
            Order::Random => self.part.start + self.rng.below(self.part.end - self.part.start),
            Order::Once(places) => u64::from(places.next()?),
            Order::Pass | Order::Sequential if self.next < self.part.end => {
                self.next += 1;
                self.next - 1
            }
            Order::Pass => return None,
            Order::Sequential => {
                self.next = self.part.start + 1;
                self.part.start
            }
        };
        let offset = place * self.block as u64;
        let reads = self.read_percent == 100 || (self.read_percent > 0 && self.rng.below(100) < self.read_percent);
        if reads {
            return Some(Request::Read(offset));
        }
        self.unflushed += 1;
        Some(Request::Write(offset))
    }
}
