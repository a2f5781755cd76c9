//! Random descriptor tables and rings.

use crate::frontend::*;
use crate::{SECTORS, Target};
use std::time::{Duration, Instant};

/// How long to go on.
const TIME: Duration = Duration::from_secs(10);
/// Entries of the ring.
const SIZE: u16 = 64;

/// Random numbers (xorshift64*).
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    fn one_of<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

fn address(rng: &mut Rng) -> u64 {
    match rng.below(12) {
        0 => rng.next(),
        1 => u64::MAX - rng.below(600),
        2 => RAM + RAM_SIZE - rng.below(600),
        3 => DATA + DATA_SIZE - rng.below(600),
        4 => RAM - rng.below(600),
        5 => TABLES + rng.below(64) * 16,
        6 | 7 => HEADERS + rng.below(64) * 16,
        _ => DATA + rng.below(DATA_SIZE),
    }
}

fn length(rng: &mut Rng) -> u32 {
    match rng.below(10) {
        0 => rng.next() as u32,
        1 => u32::MAX - rng.below(32) as u32,
        2 => 0,
        3 | 4 => 16,
        5 => 1,
        6 => rng.below(2000) as u32,
        _ => rng.one_of(&[512, 1024, 4096, 48, 513]),
    }
}

/// A descriptor like anything, but often enough one that makes sense.
fn descriptor(rng: &mut Rng, entries: u16) -> D {
    let flags = match rng.below(10) {
        0 => rng.next() as u16,
        1 => INDIRECT,
        2 | 3 => 0,
        4 | 5 => WRITE,
        6 | 7 => NEXT,
        _ => NEXT | WRITE,
    };
    let next = if rng.below(20) == 0 { rng.next() as u16 } else { rng.below(u64::from(entries)) as u16 };
    D { addr: address(rng), len: length(rng), flags, next }
}

/// A request with one thing wrong, or none.
fn nearly_right(rng: &mut Rng, f: &Frontend, table: u64, first: u16) {
    let header = HEADERS + rng.below(64) * 16;
    let sector = rng.one_of(&[rng.0 % SECTORS, SECTORS - 1, SECTORS, u64::MAX, 0]);
    f.header(header, rng.one_of(&[0, 0, 1, 1, 4, 8, 13, 11, 77]), sector);
    let data = match rng.below(2) {
        0 => w(DATA + rng.below(DATA_SIZE / 2), 4096),
        _ => r(DATA + rng.below(DATA_SIZE / 2), 512),
    };
    let status = w(STATUSES + rng.below(256), 1);
    let mut chain = Frontend::chain(first, &[r(header, 16), data, status]);
    if rng.below(2) == 0 {
        let at = rng.below(3) as usize;
        chain[at] = match rng.below(5) {
            0 => D { addr: address(rng), ..chain[at] },
            1 => D { len: length(rng), ..chain[at] },
            2 => D { flags: chain[at].flags ^ (1 << rng.below(3)), ..chain[at] },
            3 => D { next: rng.next() as u16, ..chain[at] },
            _ => descriptor(rng, SIZE),
        };
    }
    f.table(table, first, &chain);
}

/// Fills the tables and offers heads until the time is up; each head that exists comes back as often as it was offered.
/// Returns how many heads at the end do not exist: nothing tells whether the server has passed over those by now.
fn throw(rng: &mut Rng, f: &mut Frontend) -> u16 {
    let ring = f.rings[0].desc();
    for first in (0..SIZE - 3).step_by(3) {
        match rng.below(3) {
            0 => nearly_right(rng, f, ring, first),
            _ => f.table(ring, first, &[0; 3].map(|_| descriptor(rng, SIZE))),
        }
    }
    for first in (0..60).step_by(3) {
        match rng.below(2) {
            0 => nearly_right(rng, f, TABLES, first),
            _ => f.table(TABLES, first, &[0; 3].map(|_| descriptor(rng, 64))),
        }
    }
    // Heads that do not exist may still be in the ring when the others have come back: together there is room for both.
    let count = 1 + rng.below(u64::from(SIZE) / 2);
    let heads: Vec<u16> = (0..count)
        .map(|_| match rng.below(15) {
            0 => rng.next() as u16,
            _ => rng.below(u64::from(SIZE)) as u16,
        })
        .collect();
    let mut want: Vec<u32> = heads.iter().filter(|h| **h < SIZE).map(|h| u32::from(*h)).collect();
    let old = f.rings[0].avail;
    f.offer(0, &heads);
    f.kick_if_wanted(0, old);
    let mut got: Vec<u32> = f.wait(0, want.len()).iter().map(|(head, _)| *head).collect();
    got.sort_unstable();
    want.sort_unstable();
    assert_eq!(got, want);
    heads.iter().rev().take_while(|h| **h >= SIZE).count() as u16
}

#[test]
fn random_rings() {
    let seed = std::env::var("VMAR_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(0xD15C);
    println!("VMAR_TEST_SEED={seed}");
    let mut rng = Rng::new(seed);
    let mut target = Target::writable();
    target.check();
    let before = target.holds();
    let end = Instant::now() + TIME;
    let (mut rounds, mut connections) = (0u64, 0u64);
    while Instant::now() < end {
        let features = rng.one_of(&[FEATURES, FEATURES | F_EVENT_IDX, FEATURES & !F_FLUSH]);
        let mut f = target.connect(features, 1, SIZE);
        let mut untold = 0;
        for _ in 0..1 + rng.below(100) {
            untold = throw(&mut rng, &mut f);
            rounds += 1;
            if Instant::now() > end {
                break;
            }
        }
        connections += 1;
        match rng.below(4) {
            // The server is idle with the connection open.
            0 if connections % 8 == 1 => target.is_idle(),
            // A random available index; nothing is promised any more.
            1 => {
                f.set_avail_idx(0, rng.next() as u16);
                f.kick(0);
            }
            2 => {
                let base = f.stop_ring(0);
                assert!(f.rings[0].avail.wrapping_sub(base) <= untold, "{base} of {}", f.rings[0].avail);
                assert_eq!(base.wrapping_sub(f.used_idx(0)), base.wrapping_sub(f.rings[0].seen));
            }
            _ => {}
        }
        drop(f);
        if connections % 4 == 0 {
            target.check();
        }
    }
    println!("{rounds} rings on {connections} connections");
    assert!(rounds > 50);
    target.check();
    // Two helper threads (slow writes, flushes) stay, once they were needed.
    target.holds_at_most((before.0 + 2, before.1));
    target.is_idle();
}
