//! Random requests for target `chains`: made right, then made wrong.

use super::chains::{Desc, Input, Offer, Put, Round, Table};
use super::frontend::*;
use super::rng::Rng;
use super::server::SECTORS;

/// Room for what a round needs; every round starts from the beginning.
struct Room {
    header: u64,
    status: u64,
    table: u64,
    /// Next free entry of each ring's table.
    entries: [u16; 4],
}

impl Room {
    fn take(at: &mut u64, len: u64, start: u64, end: u64) -> u64 {
        if *at + len > end {
            *at = start;
        }
        *at += len;
        *at - len
    }
}

fn address(rng: &mut Rng) -> u64 {
    match rng.below(24) {
        0 => rng.next(),
        1 | 2 => u64::MAX - rng.below(600),
        3 | 4 => RAM + RAM_SIZE - rng.below(600),
        5 | 6 => DATA + DATA_SIZE - rng.below(600),
        7 => RAM - rng.below(600),
        8 => DATA - rng.below(600),
        9 => TABLES + rng.below(64) * 16,
        10 => HEADERS + rng.below(64) * 16,
        11 if rng.chance(1, 8) => RAM + rng.below(0x4_0000),
        _ => DATA + rng.below(DATA_SIZE),
    }
}

fn length(rng: &mut Rng) -> u32 {
    match rng.below(12) {
        0 => rng.next() as u32,
        1 => u32::MAX - rng.below(32) as u32,
        2 => 0,
        3 | 4 => 16,
        5 => 1,
        6 | 7 => rng.below(2000) as u32,
        8 => rng.edge() as u32,
        _ => rng.one_of(&[512, 1024, 4096, 48, 513, 65536, 1 << 20]),
    }
}

fn descriptor(rng: &mut Rng, entries: u16) -> Desc {
    let flags = match rng.below(10) {
        0 => rng.next() as u16,
        1 => INDIRECT,
        2 | 3 => 0,
        4 | 5 => WRITE,
        6 | 7 => NEXT,
        _ => NEXT | WRITE,
    };
    let next = if rng.chance(1, 20) { rng.next() as u16 } else { rng.below(u64::from(entries)) as u16 };
    (address(rng), length(rng), flags, next)
}

fn sector(rng: &mut Rng) -> u64 {
    match rng.below(16) {
        0 => rng.edge(),
        1 => SECTORS + rng.below(3),
        2 => SECTORS - 1 - rng.below(9),
        3 => u64::MAX / 512 + rng.below(3),
        4 => rng.below(16),
        _ => rng.below(SECTORS),
    }
}

fn kind(rng: &mut Rng) -> u32 {
    match rng.below(100) {
        0..=33 => 0,
        34..=61 => 1,
        62..=69 => 4,
        70..=74 => 8,
        75..=83 => 11,
        84..=93 => 13,
        94 => 14,
        95 => rng.below(32) as u32,
        96 => rng.edge() as u32,
        _ => rng.one_of(&[0x8000_0000, 2, 3, 5, 6, 7, 16, 20]),
    }
}

/// Cuts a buffer into pieces, most of them odd ones.
fn pieces(rng: &mut Rng, total: u32, write: bool, apart: bool) -> Vec<Desc> {
    let flags = if write { WRITE } else { 0 };
    let mut out = Vec::new();
    let mut left = total;
    let mut addr = DATA + rng.below(DATA_SIZE - u64::from(total) - 1);
    let many = 1 + rng.one_of(&[0u64, 0, 1, 2, 7, 40]);
    for i in 0..many {
        let len = if i + 1 == many { left } else { (rng.below(u64::from(left) + 1) as u32).min(left) };
        if len > 0 || rng.chance(1, 30) {
            out.push((addr, len, flags, 0));
        }
        left -= len;
        addr += u64::from(len);
        if apart {
            addr = DATA + rng.below(DATA_SIZE - u64::from(total) - 1);
        }
    }
    out
}

/// A request that makes sense: header bytes, and the descriptors behind the header's.
fn request(rng: &mut Rng, room: &mut Room, round: &mut Round) -> Vec<Desc> {
    let kind = kind(rng);
    let sectors = rng.one_of(&[1, 1, 1, 2, 3, 8, 8, 64, 300]);
    let first = if rng.chance(9, 10) && sectors < SECTORS { rng.below(SECTORS - sectors) } else { sector(rng) };
    let mut header = [&kind.to_le_bytes()[..], &rng.below(3).to_le_bytes()[..4], &first.to_le_bytes()].concat();
    let apart = rng.chance(1, 3);
    let mut body = match kind {
        0 => pieces(rng, (sectors * 512) as u32, true, apart),
        1 => pieces(rng, (sectors * 512) as u32, false, apart),
        8 => pieces(rng, 20, true, false),
        11 | 13 | 14 => {
            let segments = if rng.chance(1, 5) { rng.below(4) } else { 1 };
            for _ in 0..segments {
                let count = if rng.chance(1, 12) { rng.edge() as u32 } else { sectors as u32 };
                let at = if rng.chance(9, 10) { first } else { sector(rng) };
                let flags: u32 =
                    if rng.chance(1, 10) { rng.edge() as u32 } else { u32::from(kind == 13) & rng.next() as u32 };
                header.extend([&at.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat());
            }
            vec![]
        }
        _ if rng.chance(1, 3) => pieces(rng, 512, rng.clone().chance(1, 2), false),
        _ => vec![],
    };
    let at = Room::take(&mut room.header, 256, HEADERS, STATUSES);
    let len = header.len() as u32;
    round.puts.push(Put { at, bytes: header });
    // The framing is the driver's: the header may come in pieces.
    let mut chain = match rng.below(10) {
        0 => {
            let cut = 1 + rng.below(u64::from(len) - 1) as u32;
            vec![(at, cut, 0, 0), (at + u64::from(cut), len - cut, 0, 0)]
        }
        _ => vec![(at, len, 0, 0)],
    };
    chain.append(&mut body);
    let status = Room::take(&mut room.status, 8, STATUSES, RAM + RAM_SIZE);
    chain.push((status, if rng.chance(1, 30) { 8 } else { 1 }, WRITE, 0));
    chain
}

/// Something is wrong with it.
fn spoil(rng: &mut Rng, chain: &mut Vec<Desc>, entries: u16) {
    let i = rng.index(chain.len());
    match rng.below(12) {
        0 | 1 => chain[i].0 = address(rng),
        2 | 3 => chain[i].1 = length(rng),
        4 => chain[i].1 = chain[i].1.wrapping_add_signed(rng.one_of(&[1, -1, 16, -16, 512, -512])),
        5 | 6 => chain[i].2 ^= 1 << rng.below(3),
        7 => chain[i].3 = rng.next() as u16,
        8 if chain.len() > 1 => _ = chain.remove(i),
        9 => chain.insert(i, chain[i]),
        10 => {
            let j = rng.index(chain.len());
            chain.swap(i, j);
        }
        _ => chain[i] = descriptor(rng, entries),
    }
}

/// Links descriptors that follow each other in a table from `first` on; what is spoilt already stays so now and then.
fn link(rng: &mut Rng, chain: &mut [Desc], first: u16) {
    let last = chain.len() - 1;
    for (i, desc) in chain.iter_mut().enumerate() {
        if i < last && !(desc.3 != 0 && rng.chance(1, 2)) {
            desc.2 |= NEXT;
            desc.3 = first + i as u16 + 1;
        }
    }
}

fn add(rng: &mut Rng, room: &mut Room, round: &mut Round, q: u8, size: u16) {
    let ring = RAM + u64::from(q) * 0x1_0000;
    if rng.chance(1, 16) {
        // Descriptors like anything, in place of a request.
        let first = rng.below(u64::from(size)) as u16;
        let descs = (0..3).map(|_| descriptor(rng, size)).collect();
        round.tables.push(Table { at: ring, first: first.min(size - 3), descs });
        round.offers.push(Offer { ring: q, heads: vec![first] });
        return;
    }
    let mut chain = request(rng, room, round);
    if rng.chance(2, 5) {
        (0..1 + rng.below(2)).for_each(|_| spoil(rng, &mut chain, size));
    }
    let first = room.entries[usize::from(q)];
    let direct = usize::from(first) + chain.len() <= usize::from(size);
    if !direct && usize::from(first) + 2 > usize::from(size) {
        return;
    }
    let mut head = if direct && rng.chance(2, 3) {
        link(rng, &mut chain, first);
        chain
    } else {
        // The whole chain, or what follows its first descriptor, in a table of its own.
        let split = if rng.chance(1, 4) && chain.len() > 1 { 1 } else { 0 };
        let mut inner = chain.split_off(split);
        link(rng, &mut inner, 0);
        let at = Room::take(&mut room.table, inner.len() as u64 * 16, TABLES, HEADERS);
        let mut len = inner.len() as u32 * 16;
        if rng.chance(1, 20) {
            len = rng.one_of(&[len + 16, len.saturating_sub(16), len + 1, len * 2, u32::MAX - 15, 0]);
        }
        round.tables.push(Table { at, first: 0, descs: inner });
        let more = if rng.chance(1, 40) { rng.below(4) as u16 } else { 0 };
        chain.push((at, len, INDIRECT | more, 0));
        link(rng, &mut chain, first);
        chain
    };
    let count = head.len() as u16;
    round.tables.push(Table { at: ring, first, descs: std::mem::take(&mut head) });
    room.entries[usize::from(q)] = first + count;
    let mut heads = vec![first];
    match rng.below(60) {
        0 => heads.push(first),
        1 => heads.push(size + rng.below(3) as u16),
        2 => heads.insert(0, rng.next() as u16),
        3 => heads.push(rng.below(u64::from(size)) as u16),
        _ => {}
    }
    round.offers.push(Offer { ring: q, heads });
}

fn round(rng: &mut Rng, rings: u8, size: u16) -> Round {
    let mut round = Round { stop: rng.chance(1, 12), ..Round::default() };
    let mut room = Room { header: HEADERS, status: STATUSES, table: TABLES, entries: [0; 4] };
    for _ in 0..1 + rng.below(rng.clone().one_of(&[2, 6, 16])) {
        add(rng, &mut room, &mut round, rng.clone().below(u64::from(rings)) as u8, size);
    }
    if rng.chance(1, 80) {
        round.jump = Some(rng.next() as u16);
    }
    round
}

pub fn fresh(rng: &mut Rng) -> Input {
    let rings = rng.one_of(&[1, 1, 2, 4]);
    let size_bits = 3 + rng.below(6) as u8;
    let rounds = (0..1 + rng.below(5)).map(|_| round(rng, rings, 1 << size_bits)).collect();
    Input {
        overlay: rng.chance(2, 5),
        event_idx: rng.chance(1, 2),
        write_through: rng.chance(1, 6),
        rings,
        size_bits,
        rounds,
    }
}

pub fn mutate(rng: &mut Rng, input: &mut Input) {
    let size = 1 << input.size_bits.clamp(3, 8);
    if input.rounds.is_empty() {
        *input = fresh(rng);
    }
    let (i, count) = (rng.index(input.rounds.len()), input.rounds.len());
    let this = &mut input.rounds[i];
    match rng.below(12) {
        0 if count < 8 => input.rounds.push(round(rng, input.rings.clamp(1, 4), size)),
        1 if count > 1 => _ = input.rounds.remove(i),
        2 => input.event_idx ^= true,
        3 => input.overlay ^= true,
        4 => input.write_through ^= true,
        5 => this.stop ^= true,
        6 if !this.puts.is_empty() => {
            let at = rng.index(this.puts.len());
            let put = &mut this.puts[at];
            if !put.bytes.is_empty() {
                let byte = rng.index(put.bytes.len());
                put.bytes[byte] = rng.next() as u8;
            }
        }
        7 if !this.offers.is_empty() => {
            let at = rng.index(this.offers.len());
            let heads = &mut this.offers[at].heads;
            heads.push(if rng.chance(1, 4) { rng.next() as u16 } else { rng.below(u64::from(size)) as u16 });
        }
        8 => input.size_bits = 3 + rng.below(6) as u8,
        _ if !this.tables.is_empty() => {
            let at = rng.index(this.tables.len());
            let table = &mut this.tables[at];
            if !table.descs.is_empty() {
                spoil(rng, &mut table.descs, size);
            }
        }
        _ => {}
    }
}
