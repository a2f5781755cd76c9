//! Every malformed chain and request.

use crate::frontend::*;
use crate::{SECTORS, Target, pattern};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
/// No status is expected: the byte stays as it was.
const NONE: u8 = 0xEE;

const H: u64 = HEADERS;
const S: u64 = STATUSES;
/// Segments of discards and write-zeroes.
const Z: u64 = HEADERS + 0x100;
/// An address that is in no region.
const WILD: u64 = 0x9999_0000_0000;
/// The size of the ring.
const SIZE: u16 = 256;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

struct Case {
    name: &'static str,
    kind: u32,
    sector: u64,
    descs: Vec<D>,
    status: u8,
    len: u32,
}

fn case(name: &'static str, kind: u32, sector: u64, descs: Vec<D>, status: u8, len: u32) -> Case {
    Case { name, kind, sector, descs, status, len }
}

/// A read of one sector with these data descriptors.
fn read(name: &'static str, data: &[D], status: u8, len: u32) -> Case {
    case(name, IN, 8, [&[r(H, 16)], data, &[w(S, 1)]].concat(), status, len)
}

fn segment(name: &'static str, kind: u32, len: u32, status: u8) -> Case {
    case(name, kind, 0, vec![r(H, 16), r(Z, len), w(S, 1)], status, 1)
}

/// Chains that are the same in a ring and in an indirect table.
fn chains() -> Vec<Case> {
    let bytes = |addr: u64, n: u64| (0..n).map(move |i| r(addr + i, 1));
    let sectors = |n: u64| (0..n).map(|i| w(DATA + i * 512, 512)).collect::<Vec<_>>();
    let cap = SECTORS;
    vec![
        read("plain read", &[w(DATA, 512)], OK, 513),
        read("128 pieces", &sectors(128), OK, 128 * 512 + 1),
        read("254 pieces fill the ring", &sectors(254), OK, 254 * 512 + 1),
        read("pieces of odd length", &[w(DATA, 1), w(DATA + 1, 510), w(DATA + 511, 1)], OK, 513),
        read("empty pieces, one of them nowhere", &[w(DATA, 0), w(WILD, 0), w(DATA, 512), w(S, 0)], OK, 513),
        read("nothing to read", &[], OK, 1),
        read("half a sector", &[w(DATA, 256)], IOERR, 1),
        read("a byte too few", &[w(DATA, 511)], IOERR, 1),
        read("a byte too many", &[w(DATA, 513)], IOERR, 1),
        read("data nowhere", &[w(WILD, 512)], IOERR, 1),
        read("data nowhere, then somewhere", &[w(WILD, 512), w(DATA, 512)], IOERR, 1),
        read("data across the end of memory", &[w(DATA + DATA_SIZE - 256, 512)], IOERR, 1),
        read("data below the start of memory", &[w(RAM - 256, 512)], IOERR, 1),
        read("data across the end of addresses", &[w(u64::MAX - 100, 512)], IOERR, 1),
        read("data at the last address", &[w(u64::MAX, 1)], IOERR, 1),
        read("4 GiB less a little", &[w(DATA, 0xFFFF_FE00)], IOERR, 1),
        read("more than 4 GiB", &[w(DATA, u32::MAX)], NONE, 0),
        read("readable behind writable", &[w(DATA, 512), r(DATA, 512)], IOERR, 1),
        case("header in single bytes", IN, 8, bytes(H, 16).chain([w(DATA, 512), w(S, 1)]).collect(), OK, 513),
        case("header only", IN, 8, vec![r(H, 16)], NONE, 0),
        case("half a header", IN, 8, vec![r(H, 8)], NONE, 0),
        case("header a byte short", IN, 8, vec![r(H, 15), w(DATA, 512), w(S, 1)], IOERR, 1),
        case("status only", IN, 8, vec![w(S, 1)], IOERR, 1),
        case("one empty descriptor", IN, 8, vec![r(H, 0)], NONE, 0),
        case("one empty writable descriptor", IN, 8, vec![w(S, 0)], NONE, 0),
        case("header nowhere", IN, 8, vec![r(WILD, 16), w(DATA, 512), w(S, 1)], IOERR, 1),
        case("status nowhere", IN, 8, vec![r(H, 16), w(DATA, 512), w(WILD, 1)], NONE, 0),
        case("status before a readable one", IN, 8, vec![r(H, 16), w(S, 1), r(DATA, 512)], IOERR, 1),
        case("sector of the end", IN, cap, vec![r(H, 16), w(DATA, 512), w(S, 1)], IOERR, 1),
        case("across the end", IN, cap - 1, vec![r(H, 16), w(DATA, 1024), w(S, 1)], IOERR, 1),
        case("nothing at the end", IN, cap, vec![r(H, 16), w(S, 1)], OK, 1),
        case("nothing past the end", IN, cap + 1, vec![r(H, 16), w(S, 1)], IOERR, 1),
        case("last sector there is", IN, u64::MAX, vec![r(H, 16), w(DATA, 512), w(S, 1)], IOERR, 1),
        case("sector that overflows to 0", IN, 1 << 55, vec![r(H, 16), w(DATA, 512), w(S, 1)], IOERR, 1),
        case("last byte address", IN, u64::MAX / 512, vec![r(H, 16), w(DATA, 512), w(S, 1)], IOERR, 1),
        case("write", OUT, 6144, vec![r(H, 16), r(DATA, 1024), w(S, 1)], OK, 1),
        case("write in one piece with its header", OUT, 6150, vec![r(H, 16 + 512), w(S, 1)], OK, 1),
        case("write of nothing", OUT, 6144, vec![r(H, 16), w(S, 1)], OK, 1),
        case("write of an odd length", OUT, 0, vec![r(H, 16), r(DATA, 700), w(S, 1)], IOERR, 1),
        case("write across the end", OUT, cap - 1, vec![r(H, 16), r(DATA, 1024), w(S, 1)], IOERR, 1),
        case("write to nowhere", OUT, 1 << 55, vec![r(H, 16), r(DATA, 512), w(S, 1)], IOERR, 1),
        case("write from nowhere", OUT, 0, vec![r(H, 16), r(WILD, 512), w(S, 1)], IOERR, 1),
        case("write partly from nowhere", OUT, 0, vec![r(H, 16), r(DATA, 512), r(WILD, 512), w(S, 1)], IOERR, 1),
        case("write without status", OUT, 0, vec![r(H, 16), r(DATA, 512)], NONE, 0),
        case("write with its status nowhere", OUT, 0, vec![r(H, 16), r(DATA, 512), w(WILD, 1)], NONE, 0),
        case("flush", FLUSH, 0, vec![r(H, 16), w(S, 1)], OK, 1),
        case("flush with data and a sector", FLUSH, u64::MAX, vec![r(H, 16), r(DATA, 5), w(S, 1)], OK, 1),
        case("identity", GET_ID, 0, vec![r(H, 16), w(DATA, 20), w(S, 1)], OK, 21),
        case("short identity", GET_ID, 0, vec![r(H, 16), w(DATA, 5), w(S, 1)], OK, 6),
        case("identity in pieces", GET_ID, 0, vec![r(H, 16), w(DATA, 3), w(DATA + 3, 17), w(S, 1)], OK, 21),
        case("no place for the identity", GET_ID, 0, vec![r(H, 16), w(S, 1)], OK, 1),
        case("long identity", GET_ID, 0, vec![r(H, 16), w(DATA, 4096), w(S, 1)], OK, 21),
        case("SCSI command", 2, 0, vec![r(H, 16), w(DATA, 512), w(S, 1)], UNSUPP, 1),
        case("secure erase", 14, 0, vec![r(H, 16), r(Z, 16), w(S, 1)], UNSUPP, 1),
        case("last type there is", u32::MAX, 0, vec![r(H, 16), r(DATA, 512), w(DATA, 512), w(S, 1)], UNSUPP, 1),
        segment("no segment", WRITE_ZEROES, 0, IOERR),
        segment("part of a segment", WRITE_ZEROES, 15, IOERR),
        segment("a segment and a byte", WRITE_ZEROES, 17, IOERR),
        segment("two segments", WRITE_ZEROES, 32, UNSUPP),
        segment("no segment to discard", DISCARD, 0, IOERR),
        segment("part of a segment to discard", DISCARD, 15, IOERR),
        segment("two segments to discard", DISCARD, 32, UNSUPP),
        case("65,536 segments", WRITE_ZEROES, 0, vec![r(H, 16), r(DATA, 1 << 20), w(S, 1)], UNSUPP, 1),
    ]
}

/// Segments: type of the request, sector, count, flags.
fn segments() -> Vec<(&'static str, u32, u64, u32, u32, u8)> {
    const Z: u32 = WRITE_ZEROES;
    const D: u32 = DISCARD;
    vec![
        ("zeroes", Z, 6160, 8, 0, OK),
        ("zeroes and unmap", Z, 6176, 16, 1, OK),
        ("zeroes of nothing", Z, 6200, 0, 0, OK),
        ("a reserved flag", Z, 0, 8, 2, UNSUPP),
        ("all flags", Z, 0, 8, u32::MAX, UNSUPP),
        ("zeroes across the end", Z, SECTORS - 1, 2, 0, IOERR),
        ("zeroes past the end", Z, SECTORS, 1, 0, IOERR),
        ("more than is allowed", Z, 0, u32::MAX, 0, IOERR),
        ("a sector that overflows", Z, u64::MAX, 1, 0, IOERR),
        ("a sum that overflows", Z, u64::MAX / 512, 8, 1, IOERR),
        ("discard", D, 6208, 16, 0, OK),
        ("a discard that is not aligned", D, 6241, 11, 0, OK),
        ("a discard of nothing", D, 6300, 0, 0, OK),
        ("a discard with unmap", D, 0, 8, 1, UNSUPP),
        ("a discard with a reserved flag", D, 0, 8, 1 << 31, UNSUPP),
        ("a discard across the end", D, SECTORS - 1, 2, 0, IOERR),
        ("a discard of more than is allowed", D, 0, u32::MAX, 0, IOERR),
        ("a discard whose sector overflows", D, u64::MAX, 1, 0, IOERR),
    ]
}

fn d(addr: u64, len: u32, flags: u16, next: u16) -> D {
    D { addr, len, flags, next }
}

/// What makes sense only as the ring's own table: (name, table, status, length).
fn tables() -> Vec<(&'static str, Vec<D>, u8, u32)> {
    let table = |entries: u32, flags| d(TABLES, entries * 16, INDIRECT | flags, 0);
    vec![
        ("a cycle of readable ones", vec![d(H, 16, NEXT, 1), d(H, 16, NEXT, 0)], NONE, 0),
        ("a descriptor that follows itself", vec![d(H, 16, NEXT, 1), d(S, 1, NEXT | WRITE, 1)], IOERR, 1),
        ("next out of range", vec![d(H, 16, NEXT, SIZE)], NONE, 0),
        ("next far out of range", vec![d(H, 16, NEXT, 1), d(S, 1, NEXT | WRITE, 0xFFFF)], IOERR, 1),
        ("an indirect table", vec![table(3, 0)], OK, 513),
        ("a table that is said to be writable", vec![table(3, WRITE)], OK, 513),
        ("a table and a next one", vec![table(3, NEXT)], OK, 513),
        ("a table with room behind the chain", vec![table(100, 0)], OK, 513),
        ("a table that ends before the chain", vec![table(1, 0)], NONE, 0),
        ("an empty table", vec![table(0, 0)], NONE, 0),
        ("a table of odd length", vec![d(TABLES, 47, INDIRECT, 0)], NONE, 0),
        ("a table of a byte", vec![d(TABLES, 1, INDIRECT, 0)], NONE, 0),
        ("a table of 65,536 entries", vec![d(TABLES, 0x10_0000, INDIRECT, 0)], NONE, 0),
        ("a table of 4 GiB", vec![d(TABLES, 0xFFFF_FFF0, INDIRECT, 0)], NONE, 0),
        ("a table nowhere", vec![d(WILD, 48, INDIRECT, 0)], NONE, 0),
        ("a table at the end of addresses", vec![d(u64::MAX - 15, 48, INDIRECT, 0)], NONE, 0),
        ("header, then a table", vec![d(H, 16, NEXT, 1), d(TABLES + 0x2000, 32, INDIRECT, 0)], OK, 513),
        ("a table in a table", vec![d(TABLES + 0x1000, 16, INDIRECT, 0)], NONE, 0),
        ("a table that is its own entry", vec![d(TABLES + 0x1010, 16, INDIRECT, 0)], NONE, 0),
    ]
}

/// Sends what stands in the tables as head 0; checks what comes back, and that it comes back once.
fn send(f: &mut Frontend, name: &str, status: u8, len: u32, old: &[u8]) {
    f.put(S, &[NONE]);
    let before = f.rings[0].avail;
    f.offer(0, &[0]);
    f.kick_if_wanted(0, before);
    assert_eq!(f.wait(0, 1), [(0, len)], "{name}");
    assert_eq!(f.get(S, 1), [status], "{name}: the status");
    assert!(f.read(0, 16, 512) == old[16 * 512..17 * 512], "{name}: the next read");
}

fn all_chains(features: u64, indirect: bool) {
    let mut target = Target::writable();
    let old = pattern();
    let mut f = target.connect(features, 1, SIZE);
    let mut cases = chains();
    if indirect {
        let sectors = |n: u64| (0..n).map(|i| w(DATA + i * 512, 512)).collect::<Vec<_>>();
        cases.push(read("513 pieces", &sectors(513), OK, 513 * 512 + 1));
        cases.push(read("1,022 pieces", &sectors(1022), OK, 1022 * 512 + 1));
        // The status byte is out of sight, so the end of what was seen takes the error.
        cases.push(read("1,023 pieces", &sectors(1023), NONE, 1));
        cases.push(read("16,000 pieces", &sectors(1000).repeat(16), NONE, 1));
    }
    let place = |f: &mut Frontend, descs: &[D]| {
        let chain = Frontend::chain(0, descs);
        if indirect {
            f.table(TABLES, 0, &chain);
            f.table(f.rings[0].desc(), 0, &[d(TABLES, chain.len() as u32 * 16, INDIRECT, 0)]);
        } else {
            f.table(f.rings[0].desc(), 0, &chain);
        }
    };
    for c in &cases {
        f.put(DATA, &vec![0x5A; 1 << 20]);
        f.put(Z, &[0; 64]);
        f.put(H + 16, &[0x5B; 512]);
        f.put(Z, &[0; 64]);
        f.header(H, c.kind, c.sector);
        place(&mut f, &c.descs);
        send(&mut f, c.name, c.status, c.len, &old);
        if c.status == OK && c.kind == IN && c.len > 1 {
            let len = c.len as usize - 1;
            assert!(f.get(DATA, len) == old[8 * 512..][..len], "{}: the data", c.name);
        }
        if c.kind == GET_ID {
            let len = c.len as usize - 1;
            assert!(f.get(DATA, len) == b"vmar-"[..len.min(5)] || len == 20, "{}", c.name);
            assert_eq!(f.get(DATA + len as u64, 1), [0x5A], "{}: not a byte more", c.name);
        }
    }
    for (name, kind, sector, count, flags, status) in segments() {
        f.header(H, kind, 0);
        f.put(Z, &[&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat());
        place(&mut f, &[r(H, 16), r(Z, 3), r(Z + 3, 13), w(S, 1)]);
        send(&mut f, name, status, 1, &old);
    }
    let mut want = pattern();
    want[6144 * 512..6146 * 512].fill(0x5A);
    want[6150 * 512..6151 * 512].copy_from_slice(&[&[0x5B; 240][..], &[0; 64], &[0x5B; 208]].concat());
    want[6160 * 512..6168 * 512].fill(0);
    want[6176 * 512..6192 * 512].fill(0);
    want[6208 * 512..6224 * 512].fill(0);
    want[6241 * 512..6252 * 512].fill(0);
    let got = target.content();
    let wrong: Vec<usize> = (0..SECTORS as usize).filter(|s| got[s * 512..][..512] != want[s * 512..][..512]).collect();
    assert!(wrong.is_empty(), "sectors {wrong:?}");
    drop(f);
    target.check();
    target.is_idle();
}

#[test]
fn every_chain() {
    all_chains(FEATURES, false);
}

#[test]
fn every_chain_with_event_idx() {
    all_chains(FEATURES | F_EVENT_IDX, false);
}

#[test]
fn every_chain_in_an_indirect_table() {
    all_chains(FEATURES, true);
}

#[test]
fn every_chain_in_an_indirect_table_with_event_idx() {
    all_chains(FEATURES | F_EVENT_IDX, true);
}

/// A driver without FLUSH: every write is durable before it completes.
#[test]
fn every_chain_on_a_write_through_disk() {
    all_chains(FEATURES & !F_FLUSH, false);
}

#[test]
fn every_table() {
    let mut target = Target::writable();
    let old = pattern();
    for features in [FEATURES, FEATURES | F_EVENT_IDX] {
        let mut f = target.connect(features, 1, SIZE);
        for (name, table, status, len) in tables() {
            f.header(H, IN, 8);
            f.table(TABLES, 0, &Frontend::chain(0, &[r(H, 16), w(DATA, 512), w(S, 1)]));
            f.table(TABLES + 0x1000, 0, &[d(TABLES, 48, INDIRECT, 0), d(TABLES + 0x1010, 16, INDIRECT, 0)]);
            f.table(TABLES + 0x2000, 0, &Frontend::chain(0, &[w(DATA, 512), w(S, 1)]));
            f.table(f.rings[0].desc(), 0, &table);
            send(&mut f, name, status, len, &old);
        }
        // The rest of the chain in a table that lies across the end of memory.
        let end = RAM + RAM_SIZE - 32;
        f.table(end, 0, &[d(H, 16, NEXT, 1), d(DATA, 512, NEXT | WRITE, 2)]);
        f.table(f.rings[0].desc(), 0, &[d(end, 64, INDIRECT, 0)]);
        send(&mut f, "a table across the end of memory", NONE, 1, &old);
    }
    target.check();
}

#[test]
fn a_read_only_disk_refuses_what_changes_it() {
    let mut target = Target::start(&["--read-only"]);
    let old = pattern();
    let mut f = target.connect(FEATURES, 1, SIZE);
    f.put(Z, &[&0u64.to_le_bytes()[..], &8u32.to_le_bytes(), &0u32.to_le_bytes()].concat());
    for (name, kind, data, status) in [
        ("write", OUT, r(DATA, 512), IOERR),
        ("write of nothing", OUT, r(DATA, 0), IOERR),
        ("write zeroes", WRITE_ZEROES, r(Z, 16), IOERR),
        ("discard", DISCARD, r(Z, 16), IOERR),
        ("flush", FLUSH, r(DATA, 0), OK),
    ] {
        f.header(H, kind, 0);
        f.table(f.rings[0].desc(), 0, &Frontend::chain(0, &[r(H, 16), data, w(S, 1)]));
        send(&mut f, name, status, 1, &old);
    }
    assert!(target.content() == old);
    drop(f);
    target.check();
}
