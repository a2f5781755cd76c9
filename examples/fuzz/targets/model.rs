//! What a device may make of a descriptor chain: written from the virtio specification, without a look at vmar's parser.

use super::frontend::{DATA, DATA_SIZE, INDIRECT, NEXT, RAM, RAM_SIZE, WRITE};
use super::server::SECTORS;

/// A range of guest memory: first address, bytes.
pub type Range = (u64, u64);

/// The guest's memory as the driver left it.
pub struct Memory {
    pub ram: Vec<u8>,
    pub data: Vec<u8>,
}

impl Memory {
    /// Bytes that differ everywhere from their neighbours, and are never a status.
    pub fn new() -> Memory {
        let fill = |len: u64, seed: u64| (0..len).map(|i| Self::canary(seed + i)).collect();
        Memory { ram: fill(RAM_SIZE, RAM), data: fill(DATA_SIZE, DATA) }
    }

    pub fn canary(addr: u64) -> u8 {
        (addr.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 57) as u8 | 0x80
    }

    /// The range, if it lies in one region.
    pub fn get(&self, addr: u64, len: u64) -> Option<&[u8]> {
        let (region, base) = if addr >= DATA { (&self.data, DATA) } else { (&self.ram, RAM) };
        let from = addr.checked_sub(base)? as usize;
        region.get(from..from.checked_add(len as usize)?)
    }

    pub fn put(&mut self, addr: u64, bytes: &[u8]) {
        let (region, base) = if addr >= DATA { (&mut self.data, DATA) } else { (&mut self.ram, RAM) };
        let from = (addr - base) as usize;
        region[from..from + bytes.len()].copy_from_slice(bytes);
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sure {
    /// The device has to carry it out.
    Good,
    /// The device must not say that all went well.
    Bad,
    /// The specification, or vmar's limits, leave room.
    Unsure,
}

/// What it does to the disk if it goes well; bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effect {
    None,
    Read { offset: u64, len: u64 },
    Write { offset: u64, from: Vec<Range>, len: u64 },
    Zero(Vec<Range>),
}

/// A chain, looked at.
#[derive(Clone, Debug)]
pub struct Verdict {
    pub sure: Sure,
    pub effect: Effect,
    /// Memory that may be written, memory that is read (tables included).
    pub writes: Vec<Range>,
    pub reads: Vec<Range>,
    /// Where the data of a read goes: `writes` without the status.
    pub data: Vec<Range>,
    /// Where the status goes; only for chains that are whole, and of which it is certain.
    pub status: Option<u64>,
    /// The used length if it goes well, where that is certain.
    pub used: Option<u64>,
    pub kind: Option<u32>,
}

/// Descriptors beyond which a device may refuse a chain.
const CHAIN_SURE: usize = 128;

/// Descriptors beyond which a chain is taken for a loop, or for one that no device has to take.
const CHAIN_MAX: usize = 2048;

struct Walk {
    descs: Vec<(u64, u32, u16)>,
    tables: Vec<Range>,
    whole: bool,
    sure: bool,
}

fn walk(memory: &Memory, ring: u64, size: u16, head: u16) -> Walk {
    let mut out = Walk { descs: vec![], tables: vec![(ring, u64::from(size) * 16)], whole: false, sure: true };
    let (mut table, mut entries, mut at, mut indirect, mut steps) =
        (ring, u64::from(size), u64::from(head), false, 0u64);
    loop {
        if at >= entries {
            return out;
        }
        let Some(raw) = memory.get(table + at * 16, 16) else { return out };
        let (addr, len) =
            (u64::from_le_bytes(raw[..8].try_into().unwrap()), u32::from_le_bytes(raw[8..12].try_into().unwrap()));
        let (flags, next) = (u16::from_le_bytes([raw[12], raw[13]]), u16::from_le_bytes([raw[14], raw[15]]));
        steps += 1;
        if flags & INDIRECT != 0 {
            if indirect || len == 0 || len % 16 != 0 {
                return out;
            }
            // A driver must not set NEXT or WRITE here; what a device does then is its own affair.
            out.sure &= flags & (NEXT | WRITE) == 0;
            (table, entries, at, indirect, steps) = (addr, u64::from(len / 16), 0, true, 0);
            out.tables.push((addr, u64::from(len)));
            continue;
        }
        // More steps than entries: a loop.
        if steps > entries {
            return out;
        }
        out.descs.push((addr, len, flags));
        out.sure &= out.descs.len() <= CHAIN_SURE;
        if flags & NEXT == 0 {
            out.whole = true;
            return out;
        }
        if out.descs.len() >= CHAIN_MAX {
            return out;
        }
        at = u64::from(next);
    }
}

/// The parts of a range that are memory.
fn clip((addr, len): Range) -> Vec<Range> {
    [(RAM, RAM_SIZE), (DATA, DATA_SIZE)]
        .into_iter()
        .filter_map(|(start, size)| {
            let (from, to) = (addr.max(start), addr.saturating_add(len).min(start + size));
            (from < to).then(|| (from, to - from))
        })
        .collect()
}

fn total(ranges: &[Range]) -> u64 {
    ranges.iter().map(|r| r.1).sum()
}

/// Without the first `n` bytes.
fn skip(ranges: &[Range], mut n: u64) -> Vec<Range> {
    let mut out = Vec::new();
    for &(addr, len) in ranges {
        let cut = n.min(len);
        n -= cut;
        if len > cut {
            out.push((addr + cut, len - cut));
        }
    }
    out
}

/// The bytes, if all of them are memory.
pub fn gather(memory: &Memory, ranges: &[Range]) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    for &(addr, len) in ranges {
        out.extend_from_slice(memory.get(addr, len)?);
    }
    Some(out)
}

/// Looks at the chain that starts at `head`.
pub fn judge(memory: &Memory, ring: u64, size: u16, head: u16) -> Verdict {
    let walk = walk(memory, ring, size, head);
    let list = |write: bool| -> Vec<Range> {
        let side = walk.descs.iter().filter(|d| (d.2 & WRITE != 0) == write && d.1 > 0);
        side.map(|d| (d.0, u64::from(d.1))).collect()
    };
    let (readable, writable) = (list(false), list(true));
    let mut verdict = Verdict {
        sure: Sure::Bad,
        effect: Effect::None,
        writes: writable.iter().copied().flat_map(clip).collect(),
        reads: readable.iter().chain(&walk.tables).copied().flat_map(clip).collect(),
        data: vec![],
        status: None,
        used: None,
        kind: None,
    };
    if !walk.whole {
        // A loop names the same ranges again and again.
        for list in [&mut verdict.writes, &mut verdict.reads] {
            let mut known = std::collections::HashSet::new();
            list.retain(|range| known.insert(*range));
        }
    }
    // Everything in reach, in order, and room for the status.
    let mut written = false;
    let mut nowhere = false;
    for &(addr, len, flags) in &walk.descs {
        let inside = clip((addr, len.into())) == [(addr, len.into())];
        nowhere |= len > 0 && (!inside || written && flags & WRITE == 0);
        written |= len > 0 && flags & WRITE != 0;
    }
    if !walk.whole || nowhere || writable.is_empty() || total(&readable) < 16 || total(&writable) > u32::MAX.into() {
        return verdict;
    }
    let last = writable[writable.len() - 1];
    verdict.status = Some(last.0 + last.1 - 1);
    verdict.data = writable.clone();
    match verdict.data.pop() {
        Some((addr, len)) if len > 1 => verdict.data.push((addr, len - 1)),
        _ => {}
    }
    let Some(bytes) = gather(memory, &readable) else { return verdict };
    let kind = u32::from_le_bytes(bytes[..4].try_into().unwrap());
    let sector = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    verdict.kind = Some(kind);
    let (body, room) = (&bytes[16..], total(&verdict.data));
    let fits = |len: u64| {
        let end = sector.checked_mul(512).and_then(|at| at.checked_add(len));
        len.is_multiple_of(512) && end.is_some_and(|end| end <= SECTORS * 512)
    };
    // An empty descriptor may point anywhere, and a device may look at that.
    let unsure = walk.descs.iter().any(|d| d.1 == 0) || !walk.sure;
    verdict.sure = match kind {
        0 if fits(room) => {
            verdict.effect = Effect::Read { offset: sector * 512, len: room };
            verdict.used = Some(room + 1);
            if body.is_empty() && room > 0 { Sure::Good } else { Sure::Unsure }
        }
        1 if fits(body.len() as u64) => {
            let from = skip(&readable, 16);
            verdict.effect = Effect::Write { offset: sector * 512, from, len: body.len() as u64 };
            verdict.used = Some(1);
            if room == 0 && !body.is_empty() { Sure::Good } else { Sure::Unsure }
        }
        4 => {
            verdict.used = Some(1);
            Sure::Good
        }
        8 => Sure::Unsure,
        11 | 13 => zeroes(kind, body, &mut verdict),
        _ => Sure::Bad,
    };
    if unsure {
        (verdict.sure, verdict.status) = (Sure::Unsure, None);
    }
    verdict
}

/// DISCARD and WRITE_ZEROES: segments {sector u64, count u32, flags u32}.
fn zeroes(kind: u32, body: &[u8], verdict: &mut Verdict) -> Sure {
    let mut ranges = Vec::new();
    let mut ok = !body.is_empty() && body.len().is_multiple_of(16);
    for segment in body.chunks_exact(16) {
        let sector = u64::from_le_bytes(segment[..8].try_into().unwrap());
        let count = u64::from(u32::from_le_bytes(segment[8..12].try_into().unwrap()));
        let flags = u32::from_le_bytes(segment[12..].try_into().unwrap());
        ok &= sector.checked_add(count).is_some_and(|end| end <= SECTORS);
        ok &= flags == 0 || kind == 13 && flags == 1;
        if ok {
            ranges.push((sector * 512, count * 512));
        }
    }
    verdict.used = Some(1);
    verdict.effect = Effect::Zero(ranges);
    if !ok {
        return Sure::Bad;
    }
    // How many segments it takes, and whether it has DISCARD at all, is the device's choice.
    Sure::Unsure
}

pub fn overlap(a: &[Range], b: &[Range]) -> bool {
    a.iter().any(|x| b.iter().any(|y| x.0 < y.0 + y.1 && y.0 < x.0 + x.1))
}
