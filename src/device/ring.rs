//! The split ring (virtio 1.2, section 2.7), walked where it lies.
//!
//! The addresses of a ring are translated once, when it starts or the guest's memory map changes; after that a request
//! costs a few loads. Everything in here that the guest can write may change at any time: each value is read once, checked,
//! and used as it was read.

use crate::io::IoBuf;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering, fence};
use virtio_bindings::bindings::virtio_ring::{
    VRING_AVAIL_F_NO_INTERRUPT, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE, VRING_USED_F_NO_NOTIFY,
};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// The guest's memory map, as a connection has it.
pub type GuestMap = GuestMemoryMmap<()>;

/// Bytes of a descriptor: address u64, length u32, flags u16, next u16, little-endian.
const DESC_SIZE: usize = 16;
/// The same, for lengths that the guest gives.
const DESC_BYTES: u32 = 16;

/// Descriptors that a chain may have. QEMU's own limit is 1,024; a guest that follows SEG_MAX stays far below.
const CHAIN_MAX: usize = 1024;

/// Where `idx` is in both rings, and where their entries begin (sections 2.7.6 and 2.7.8).
const IDX: usize = 2;
const ENTRIES: usize = 4;

/// The guest's memory by host addresses. Keeps the mappings alive.
pub struct Space {
    /// Start, end, host address; ascending.
    regions: Vec<(u64, u64, *mut u8)>,
    map: Arc<GuestMap>,
}

// SAFETY: the addresses stay valid as long as the map that is kept beside them, whichever thread uses them.
unsafe impl Send for Space {}

impl Space {
    /// Looks up the regions of a map.
    pub fn new(map: Arc<GuestMap>) -> Self {
        let regions = map
            .iter()
            .map(|region| {
                let start = region.start_addr().raw_value();
                (start, start.saturating_add(region.len()), region.as_ptr())
            })
            .collect();
        Space { regions, map }
    }

    /// The map that this was made of.
    pub fn map(&self) -> &Arc<GuestMap> {
        &self.map
    }

    /// The region that holds `addr`: its end, and where `addr` is.
    #[inline]
    fn find(&self, addr: u64) -> Option<(u64, *mut u8)> {
        // One to four of them.
        let (start, end, host) = *self.regions.iter().find(|(start, end, _)| (*start..*end).contains(&addr))?;
        Some((end, host.wrapping_add(usize::try_from(addr - start).ok()?)))
    }

    /// Where `len` bytes from `addr` on are, if they lie in one region.
    fn at(&self, addr: u64, len: usize) -> Option<*mut u8> {
        let (end, host) = self.find(addr)?;
        (len as u64 <= end - addr).then_some(host)
    }

    /// Appends the pieces of a guest range, which may span regions that adjoin; false when a part of it is no memory.
    #[inline]
    fn pieces(&self, mut addr: u64, mut len: u64, out: &mut Vec<IoBuf>) -> bool {
        while len > 0 {
            let Some((end, host)) = self.find(addr) else { return false };
            let part = len.min(end - addr);
            let Ok(bytes) = usize::try_from(part) else { return false };
            // SAFETY: the piece lies in a region of `map`, which whoever uses it keeps (a request in flight has a clone of the
            // map). No Rust reference to guest memory exists.
            out.push(unsafe { IoBuf::from_raw(host, bytes) });
            len -= part;
            let Some(next) = addr.checked_add(part) else { return len == 0 };
            addr = next;
        }
        true
    }
}

impl fmt::Debug for Space {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Space").field("regions", &self.regions.len()).finish_non_exhaustive()
    }
}

/// Where a ring is, by guest addresses, and how far it has got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Entries: a power of two.
    pub size: u16,
    /// The descriptor table.
    pub desc: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
    /// VIRTIO_RING_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// The next entry of the available ring.
    pub next_avail: u16,
    /// The next entry of the used ring.
    pub next_used: u16,
}

/// The guest claims to have offered more than a ring holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Overrun {
    /// What it claims.
    pub offered: u16,
    /// The ring's size.
    pub size: u16,
}

impl fmt::Display for Overrun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} requests in a ring of {}", self.offered, self.size)
    }
}

/// A ring in the guest's memory.
#[derive(Debug)]
pub struct Ring {
    space: Space,
    desc: *const u8,
    avail: *mut u8,
    used: *mut u8,
    size: u16,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    /// The available index when it was last looked at.
    offered: u16,
    /// The used index when the guest was last (perhaps) told.
    told: u16,
}

// SAFETY: as for `Space`, whose map keeps all three parts mapped.
unsafe impl Send for Ring {}

impl Ring {
    /// `None` when a part of it is not in the guest's memory (in one region, as QEMU wants it), or not aligned.
    pub fn open(place: &Place, space: Space) -> Option<Ring> {
        let n = usize::from(place.size);
        let desc = space.at(place.desc, DESC_SIZE * n)?;
        let avail = space.at(place.avail, ENTRIES + 2 * n + 2)?;
        let used = space.at(place.used, ENTRIES + 8 * n + 2)?;
        // Guest addresses are aligned; those of a region need not be.
        if !(avail as usize).is_multiple_of(2) || !(used as usize).is_multiple_of(4) || !place.size.is_power_of_two() {
            return None;
        }
        Some(Ring {
            space,
            desc,
            avail,
            used,
            size: place.size,
            event_idx: place.event_idx,
            next_avail: place.next_avail,
            next_used: place.next_used,
            offered: place.next_avail,
            told: place.next_used,
        })
    }

    /// The memory that it lies in.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The next entries of the available and of the used ring.
    pub fn position(&self) -> (u16, u16) {
        (self.next_avail, self.next_used)
    }

    /// The guest's view: the indices of the used and of the available ring.
    pub fn indices(&self) -> (u16, u16) {
        (u16::from_le(self.u16_of(self.used, IDX).load(Ordering::Acquire)), self.avail_idx())
    }

    #[inline]
    fn u16_of(&self, ring: *mut u8, at: usize) -> &AtomicU16 {
        // SAFETY: callers pass even offsets inside the part that `open` has checked; the map lives as long as this.
        unsafe { AtomicU16::from_ptr(ring.wrapping_add(at).cast()) }
    }

    fn used_u32(&self, at: usize) -> &AtomicU32 {
        // SAFETY: as in `u16_of`, with offsets that are multiples of four.
        unsafe { AtomicU32::from_ptr(self.used.wrapping_add(at).cast()) }
    }

    #[inline]
    fn avail_idx(&self) -> u16 {
        u16::from_le(self.u16_of(self.avail, IDX).load(Ordering::Acquire))
    }

    /// True when the guest has offered something that was not taken.
    #[inline]
    pub fn has_more(&self) -> bool {
        self.avail_idx() != self.next_avail
    }

    /// Appends the next heads of the available ring, whatever their values are, until there are `max` or no more.
    /// [`Ring::advance`] takes them, one by one.
    ///
    /// # Errors
    /// When the guest's index makes no sense.
    #[inline]
    pub fn peek(&mut self, max: usize, heads: &mut Vec<u16>) -> Result<(), Overrun> {
        let mut at = self.next_avail;
        while heads.len() < max {
            if at == self.offered {
                let offered = self.avail_idx().wrapping_sub(self.next_avail);
                if offered > self.size {
                    return Err(Overrun { offered, size: self.size });
                }
                self.offered = self.next_avail.wrapping_add(offered);
                if at == self.offered {
                    break;
                }
            }
            let slot = usize::from(at & (self.size - 1));
            heads.push(u16::from_le(self.u16_of(self.avail, ENTRIES + 2 * slot).load(Ordering::Relaxed)));
            at = at.wrapping_add(1);
        }
        Ok(())
    }

    /// Takes the first of what [`Ring::peek`] has shown.
    #[inline]
    pub fn advance(&mut self) {
        self.next_avail = self.next_avail.wrapping_add(1);
    }

    /// Puts a head into the used ring. The guest sees it after [`Ring::publish`].
    #[inline]
    pub fn push(&mut self, head: u16, len: u32) {
        let at = ENTRIES + 8 * usize::from(self.next_used & (self.size - 1));
        self.used_u32(at).store(u32::from(head).to_le(), Ordering::Relaxed);
        self.used_u32(at + 4).store(len.to_le(), Ordering::Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the guest what was pushed.
    #[inline]
    pub fn publish(&mut self) {
        self.u16_of(self.used, IDX).store(self.next_used.to_le(), Ordering::Release);
    }

    /// True when the guest wants to be told of what was published since this was last asked (sections 2.7.7 and 2.7.10).
    #[inline]
    pub fn wants_signal(&mut self) -> bool {
        // The guest looks at the index after it has written what it wants; the two must not pass each other.
        fence(Ordering::SeqCst);
        if self.event_idx {
            let event = self.u16_of(self.avail, ENTRIES + 2 * usize::from(self.size)).load(Ordering::Relaxed);
            let told = std::mem::replace(&mut self.told, self.next_used);
            self.next_used.wrapping_sub(u16::from_le(event)).wrapping_sub(1) < self.next_used.wrapping_sub(told)
        } else {
            let flags = u16::from_le(self.u16_of(self.avail, 0).load(Ordering::Relaxed));
            u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Asks the guest for no kicks. With EVENT_IDX there is nothing to say: it kicks when it passes the index that it was
    /// last told, and that one is behind it now.
    pub fn quiet(&mut self) {
        if !self.event_idx {
            self.set_flags(VRING_USED_F_NO_NOTIFY);
        }
    }

    /// Asks the guest for a kick; true when it has offered something before it could see that.
    pub fn listen(&mut self) -> bool {
        if self.event_idx {
            let at = ENTRIES + 8 * usize::from(self.size);
            self.u16_of(self.used, at).store(self.next_avail.to_le(), Ordering::Relaxed);
        } else {
            self.set_flags(0);
        }
        fence(Ordering::SeqCst);
        self.has_more()
    }

    fn set_flags(&self, flags: u32) {
        let flags = u16::try_from(flags).unwrap_or(0).to_le();
        // A store takes the line from the guest's processor: only if it changes something.
        if self.u16_of(self.used, 0).load(Ordering::Relaxed) != flags {
            self.u16_of(self.used, 0).store(flags, Ordering::Relaxed);
        }
    }

    /// Collects the buffers of the chain that begins with `head`, which is less than [`Ring::size`]: those that we may read
    /// and those that we may write, in order. False when something is wrong with the chain: cut short by a bad index or
    /// table, a piece out of reach, out of order, too long.
    ///
    /// A chain with something wrong in it is still walked to its end, where the status byte is: a driver that finds no
    /// status there may take the one of an earlier request for it, which said that all went well.
    #[inline]
    pub fn chain(&self, head: u16, readable: &mut Vec<IoBuf>, writable: &mut Vec<IoBuf>) -> bool {
        let mut table = Table::Ring;
        let (mut index, mut entries, mut left) = (u32::from(head), u32::from(self.size), u32::from(self.size));
        let (mut count, mut bytes) = (0, 0u32);
        let mut whole = true;
        loop {
            if left == 0 || index >= entries {
                return false;
            }
            let Some(desc) = self.desc(&table, index) else { return false };
            if desc.flags & VRING_DESC_F_INDIRECT != 0 {
                // One level, whole descriptors (section 2.7.5.3).
                if matches!(table, Table::Indirect(_)) || !desc.len.is_multiple_of(DESC_BYTES) {
                    return false;
                }
                (index, entries) = (0, desc.len / DESC_BYTES);
                if entries > u32::from(u16::MAX) {
                    return false;
                }
                left = entries;
                table = Table::Indirect(desc.addr);
                continue;
            }
            count += 1;
            // 2^32 bytes in all at most (section 2.7.5.2).
            let Some(sum) = bytes.checked_add(desc.len) else { return false };
            bytes = sum;
            if count > CHAIN_MAX {
                return false;
            }
            let list = if desc.flags & VRING_DESC_F_WRITE != 0 {
                &mut *writable
            } else {
                // Readable descriptors come first (section 2.7.4.2).
                whole &= writable.is_empty();
                &mut *readable
            };
            if !self.space.pieces(desc.addr, u64::from(desc.len), list) {
                whole = false;
                // What came before a byte that is out of reach does not end with the status.
                list.clear();
            }
            if desc.flags & VRING_DESC_F_NEXT == 0 {
                return whole;
            }
            index = u32::from(desc.next);
            left -= 1;
        }
    }

    #[inline]
    fn desc(&self, table: &Table, index: u32) -> Option<Desc> {
        let at = match table {
            Table::Ring => self.desc.wrapping_add(DESC_SIZE * index as usize),
            Table::Indirect(addr) => {
                self.space.at(addr.checked_add(DESC_SIZE as u64 * u64::from(index))?, DESC_SIZE)?.cast_const()
            }
        };
        // SAFETY: 16 bytes of guest memory, checked by `open` and the caller (an index below the size) or just now; read once,
        // in whatever alignment.
        let raw = unsafe { at.cast::<RawDesc>().read_volatile() };
        Some(Desc {
            addr: u64::from_le(raw.addr),
            len: u32::from_le(raw.len),
            flags: u32::from(u16::from_le(raw.flags)),
            next: u16::from_le(raw.next),
        })
    }
}

/// Where descriptors are looked up.
enum Table {
    /// In the ring's own table.
    Ring,
    /// In an indirect one, at this guest address.
    Indirect(u64),
}

/// A descriptor as it lies in memory, perhaps not aligned.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct RawDesc {
    addr: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// A descriptor.
struct Desc {
    addr: u64,
    len: u32,
    flags: u32,
    next: u16,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use virtio_queue::{Queue, QueueOwnedT, QueueT};
    use vm_memory::{Bytes, GuestAddress, Permissions};

    const SIZE: u16 = 8;
    const PLACE: Place =
        Place { size: SIZE, desc: 0x1000, avail: 0x2000, used: 0x3000, event_idx: true, next_avail: 0, next_used: 0 };

    /// Two regions that adjoin, and one behind a gap.
    fn memory() -> Arc<GuestMap> {
        let regions = [(0, 0x8000), (0x8000, 0x4000), (0x10000, 0x1000)];
        Arc::new(GuestMap::from_ranges(&regions.map(|(at, len)| (GuestAddress(at), len))).unwrap())
    }

    fn ring(map: &Arc<GuestMap>) -> Ring {
        Ring::open(&PLACE, Space::new(Arc::clone(map))).unwrap()
    }

    type Raw = (u64, u32, u16, u16);

    fn write_desc(map: &GuestMap, at: u64, (addr, len, flags, next): Raw) {
        map.write_obj(addr.to_le(), GuestAddress(at)).unwrap();
        map.write_obj(len.to_le(), GuestAddress(at + 8)).unwrap();
        map.write_obj(flags.to_le(), GuestAddress(at + 12)).unwrap();
        map.write_obj(next.to_le(), GuestAddress(at + 14)).unwrap();
    }

    type Numbers = Vec<(usize, usize)>;

    fn numbers(bufs: &[IoBuf]) -> Numbers {
        bufs.iter().map(|buf| (buf.as_ptr() as usize, buf.len())).collect()
    }

    /// The same by the iterator of the crate `virtio-queue`, which nobody here wrote.
    fn model(map: &Arc<GuestMap>, head: u16) -> (bool, Numbers, Numbers) {
        map.write_obj([0, 1u16.to_le(), head.to_le()], GuestAddress(PLACE.avail)).unwrap();
        let mut queue = Queue::new(SIZE).unwrap();
        queue.try_set_desc_table_address(GuestAddress(PLACE.desc)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(PLACE.avail)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(PLACE.used)).unwrap();
        queue.set_ready(true);
        let chain = queue.iter(Arc::clone(map)).unwrap().next().unwrap();
        let (mut whole, mut promised) = (true, true);
        let mut lists = [Vec::new(), Vec::new()];
        for desc in chain {
            promised = desc.has_next();
            let writable = usize::from(desc.is_write_only());
            whole &= writable == 1 || lists[1].is_empty();
            let access = if writable == 1 { Permissions::Write } else { Permissions::Read };
            let slices: Option<Vec<_>> =
                vm_memory::GuestMemory::get_slices(&**map, desc.addr(), desc.len() as usize, access)
                    .ok()
                    .and_then(|slices| slices.collect::<Result<_, _>>().ok());
            match slices {
                Some(slices) => {
                    lists[writable].extend(slices.iter().map(|s| (s.ptr_guard_mut().as_ptr() as usize, s.len())));
                }
                None => {
                    whole = false;
                    lists[writable].clear();
                }
            }
        }
        let [readable, writable] = lists;
        (whole && !promised, readable, writable)
    }

    fn desc() -> impl Strategy<Value = Raw> {
        let addr =
            prop_oneof![4 => 0x4000u64..0xc000, 1 => 0xb000u64..0x11800, 1 => Just(0x6000u64), 1 => any::<u64>()];
        let len =
            prop_oneof![4 => 1u32..0x800, 2 => (0u32..9).prop_map(|n| n * 16), 1 => Just(0x6000u32), 1 => any::<u32>()];
        let flags = prop_oneof![3 => Just(1u16), 2 => Just(3u16), 2 => Just(2u16), 1 => Just(0u16), 2 => Just(4u16), 1 => any::<u16>()];
        (addr, len, flags, 0u16..SIZE + 2)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn every_chain_is_what_the_crate_finds(
            table in proptest::collection::vec(desc(), SIZE as usize),
            indirect in proptest::collection::vec(desc(), 8),
            head in 0..SIZE,
        ) {
            // An indirect table across two regions is refused, as QEMU does; the crate reads it.
            let crosses = |(addr, len, flags, _): &Raw| {
                flags & 4 != 0 && *addr < 0x8000 && addr.saturating_add(u64::from(*len)) > 0x8000
            };
            prop_assume!(!table.iter().any(crosses));
            let map = memory();
            table.iter().enumerate().for_each(|(i, d)| write_desc(&map, PLACE.desc + 16 * i as u64, *d));
            indirect.iter().enumerate().for_each(|(i, d)| write_desc(&map, 0x6000 + 16 * i as u64, *d));
            let (mut readable, mut writable) = (Vec::new(), Vec::new());
            let whole = ring(&map).chain(head, &mut readable, &mut writable);
            let (want, r, w) = model(&map, head);
            prop_assert_eq!(whole, want);
            // What is behind a broken place is a guess of either.
            prop_assert_eq!(numbers(&writable).last().copied(), w.last().copied());
            if want {
                prop_assert_eq!((numbers(&readable), numbers(&writable)), (r, w));
            }
        }
    }

    #[test]
    fn a_ring_out_of_reach_or_out_of_line_is_none() {
        let map = memory();
        let open = |place: Place| Ring::open(&place, Space::new(Arc::clone(&map))).is_some();
        assert!(open(PLACE));
        for (desc, avail, used) in [(0xc000, 0x2000, 0x3000), (0x1000, 0xbffc, 0x3000), (0x1000, 0x2000, 0x10fc0)] {
            assert!(!open(Place { desc, avail, used, ..PLACE }));
        }
        // Across two regions: QEMU does not do that either.
        assert!(!open(Place { desc: 0x7fc0, ..PLACE }));
        assert!(!open(Place { avail: 0x2001, ..PLACE }) && !open(Place { used: 0x3002, ..PLACE }));
        assert!(!open(Place { size: 7, ..PLACE }) && !open(Place { desc: u64::MAX - 15, ..PLACE }));
    }

    #[test]
    fn heads_go_round_the_ring_and_come_back() {
        let map = memory();
        let (mut ring, mut heads) = (ring(&map), Vec::new());
        for round in 0..40u16 {
            for n in 0..3 {
                let slot = u64::from((round * 3 + n) % SIZE);
                map.write_obj((round + n).to_le(), GuestAddress(PLACE.avail + 4 + 2 * slot)).unwrap();
            }
            assert!(!ring.has_more());
            map.write_obj((round * 3 + 3).to_le(), GuestAddress(PLACE.avail + 2)).unwrap();
            assert!(ring.has_more());
            heads.clear();
            ring.peek(2, &mut heads).unwrap();
            assert_eq!(heads, [round, round + 1]);
            ring.advance();
            heads.clear();
            ring.peek(8, &mut heads).unwrap();
            assert_eq!(heads, [round + 1, round + 2], "what was not taken is shown again");
            ring.advance();
            ring.advance();
            for head in [7, 9] {
                ring.push(head, 5 + u32::from(round));
            }
            let used = |at| u16::from_le(map.read_obj(GuestAddress(PLACE.used + at)).unwrap());
            assert_eq!(used(2), round * 2, "not shown yet");
            ring.publish();
            assert_eq!((used(2), ring.position()), (round * 2 + 2, (round * 3 + 3, round * 2 + 2)));
            let last = 4 + 8 * u64::from((round * 2 + 1) % SIZE);
            assert_eq!((used(last), used(last + 4)), (9, 5 + round));
        }
        map.write_obj((120 + SIZE + 1).to_le(), GuestAddress(PLACE.avail + 2)).unwrap();
        heads.clear();
        assert_eq!(ring.peek(1, &mut heads), Err(Overrun { offered: SIZE + 1, size: SIZE }));
    }

    /// Virtio 1.2, section 2.7.10: a signal exactly when the used index passes `used_event`.
    #[test]
    fn a_signal_is_wanted_when_the_event_is_passed() {
        for start in [0u16, 65530] {
            for event in 0..6u16 {
                let map = memory();
                let place = Place { next_used: start, ..PLACE };
                let mut ring = Ring::open(&place, Space::new(Arc::clone(&map))).unwrap();
                let at = GuestAddress(PLACE.avail + 4 + 2 * u64::from(SIZE));
                map.write_obj(start.wrapping_add(event).to_le(), at).unwrap();
                let mut wanted = Vec::new();
                for step in [1, 2, 3] {
                    (0..step).for_each(|_| ring.push(0, 0));
                    ring.publish();
                    wanted.push(ring.wants_signal());
                }
                let steps = [0..1, 1..3, 3..6].map(|indices: std::ops::Range<u16>| indices.contains(&event));
                assert_eq!(wanted, steps, "{start} {event}");
            }
        }
        let map = memory();
        let mut ring = Ring::open(&Place { event_idx: false, ..PLACE }, Space::new(Arc::clone(&map))).unwrap();
        assert!(ring.wants_signal());
        map.write_obj(1u16.to_le(), GuestAddress(PLACE.avail)).unwrap();
        assert!(!ring.wants_signal());
        let flags = || u16::from_le(map.read_obj(GuestAddress(PLACE.used)).unwrap());
        ring.quiet();
        assert_eq!(flags(), 1);
        assert!(!ring.listen());
        assert_eq!(flags(), 0);
    }
}
