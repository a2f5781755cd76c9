//! How many pages the kernel itself counts as free: what the pages found free are held against.
//!
//! Only pages that are found [`Free`](super::Class::Free) are ever lost, so a wrong idea of what is free would be the one that does
//! harm. A map that is misread, of a kernel that is laid out in another way, gives another number than the kernel's.

use super::pagetable::PageTables;
use super::{Facts, GuestMemory};

/// Zones of a node that are believed; Linux has at most six.
const ZONES_MAX: u32 = 8;

/// Pages that the zones of all nodes count as free. None when the counters cannot be read, or there is no zone.
pub fn free_pages<M: GuestMemory>(tables: &PageTables<'_, M>, facts: &Facts) -> Option<u64> {
    let zones = &facts.zones;
    let mut sum = 0i64;
    let mut count = 0;
    for n in 0..zones.nodes_len.unwrap_or(1) {
        let node = match zones.nodes_len {
            Some(_) => tables.read_u64(zones.nodes.checked_add(n * 8)?)?,
            None => zones.nodes,
        };
        // Numbers of nodes are not all in use.
        if node == 0 {
            continue;
        }
        let zones_of_node = tables.read_u32(node.checked_add(zones.nr_zones)?)?;
        if zones_of_node > ZONES_MAX {
            return None;
        }
        for zone in 0..u64::from(zones_of_node) {
            let at = node.checked_add(zones.node_zones)?.checked_add(zone * zones.size)?.checked_add(zones.free)?;
            sum = sum.checked_add(tables.read_u64(at)?.cast_signed())?;
            count += 1;
        }
    }
    (count > 0).then_some(sum.try_into().unwrap_or(0))
}

/// How far the two numbers may be apart, in pages, in so many pages of RAM: each processor counts up to 125 pages of each zone for
/// itself before it adds them, and pages on their way between lists are counted by one side alone.
pub fn tolerance(pages: u64) -> u64 {
    1024 + pages / 64
}
