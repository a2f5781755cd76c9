//! Reads the metadata of an overlay and compares it with the one layout it may have.

use super::adopt::Unseated;
use super::bits::is_valid;
use super::disk::Disk;
use super::layout::{CLUSTER, CLUSTER_BITS, COPIED, L2_ENTRY, Layout, SUB, index};
use std::io;

/// Metadata is read in pieces of this many bytes.
const PIECE: u64 = 1 << 20;

/// Something that is not as vmar writes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// Not in the fixed layout: the text says what is where.
    Layout(String),
    /// Cannot be right in any qcow2 file.
    Corrupt(String),
}

/// Why reading stopped.
#[derive(Debug)]
pub(super) enum Stop {
    Io(io::Error),
    Fault(Fault),
}

impl From<io::Error> for Stop {
    fn from(e: io::Error) -> Stop {
        Stop::Io(e)
    }
}

/// Reads `len` bytes from `at` on and hands on each aligned group of `N` bytes with its number.
fn each<const N: usize>(
    disk: &Disk,
    at: u64,
    len: u64,
    mut f: impl FnMut(u64, &[u8; N]) -> Result<(), Fault>,
) -> Result<(), Stop> {
    let mut buf = vec![0; index(PIECE.min(len))];
    let mut done = 0;
    while done < len {
        let piece = &mut buf[..index(PIECE.min(len - done))];
        disk.read(piece, at + done)?;
        for (i, group) in piece.as_chunks::<N>().0.iter().enumerate() {
            f(done / N as u64 + i as u64, group).map_err(Stop::Fault)?;
        }
        done += piece.len() as u64;
    }
    Ok(())
}

/// Everything but the header. `fault` gets what is wrong and may stop it, `word` the number and the bitmap of each cluster
/// that is at home or that QEMU has freed. Gives the latter, which `adopt::seat` puts right.
pub(super) fn all(
    disk: &Disk,
    layout: &Layout,
    mut fault: impl FnMut(Fault) -> Result<(), Fault>,
    mut word: impl FnMut(u64, u64),
) -> Result<Unseated, Stop> {
    let mut end = 0;
    let word = |cluster, bitmap| {
        end = data_end(layout, cluster, bitmap).max(end);
        word(cluster, bitmap);
    };
    l1(disk, layout, &mut fault)?;
    let mut unseated = l2(disk, layout, &mut fault, word)?;
    refcounts(disk, layout, &mut unseated, &mut fault)?;
    // QEMU cuts a file off behind its last data, or has never made it longer.
    let len = disk.bare().metadata()?.len();
    if len < end {
        fault(cut_off(len, layout)).map_err(Stop::Fault)?;
    }
    unseated.is_short = len < layout.file_len();
    Ok(unseated)
}

/// Where the data of a cluster with this bitmap ends in the file; 0 if it has none.
pub(super) fn data_end(layout: &Layout, cluster: u64, bitmap: u64) -> u64 {
    let subs = u64::from(u64::BITS - (bitmap & 0xffff_ffff).leading_zeros());
    if subs == 0 { 0 } else { layout.data + (cluster * CLUSTER + subs * SUB).min(layout.size) }
}

/// The file is shorter than its data.
pub(super) fn cut_off(len: u64, layout: &Layout) -> Fault {
    Fault::Corrupt(format!("is cut off: {len} bytes in place of {}", layout.file_len()))
}

/// L1: each entry points at its own L2 table.
fn l1(disk: &Disk, layout: &Layout, mut fault: impl FnMut(Fault) -> Result<(), Fault>) -> Result<(), Stop> {
    each::<8>(disk, layout.l1, layout.l2_tables * 8, |table, bytes| {
        let entry = u64::from_be_bytes(*bytes);
        if entry == layout.l1_entry(table) { Ok(()) } else { fault(Fault::Layout(place("L2 table", table, entry))) }
    })
}

/// L2: each descriptor points at its own cluster or, if QEMU has freed that, at none; `word` gets the number and the bitmap
/// of each cluster.
pub(super) fn l2(
    disk: &Disk,
    layout: &Layout,
    mut fault: impl FnMut(Fault) -> Result<(), Fault>,
    mut word: impl FnMut(u64, u64),
) -> Result<Unseated, Stop> {
    let mut unseated = Unseated::default();
    each::<16>(disk, layout.l2, layout.l2_tables * CLUSTER, |cluster, bytes| {
        let (descriptor, bitmap) = split_entry(bytes);
        if cluster >= layout.clusters {
            let empty = descriptor == 0 && bitmap == 0;
            let what = format!("L2 entry {cluster}, behind the end of the disk, is used");
            return if empty { Ok(()) } else { fault(Fault::Layout(what)) };
        }
        if !is_valid(bitmap) {
            return fault(Fault::Corrupt(format!("cluster {cluster} has subclusters that are both data and zero")));
        }
        if descriptor == 0 {
            if bitmap & 0xffff_ffff != 0 {
                return fault(Fault::Corrupt(format!("cluster {cluster} is unallocated and has data all the same")));
            }
            unseated.push(cluster);
        } else if descriptor != layout.descriptor(cluster) {
            return fault(Fault::Layout(place("cluster", cluster, descriptor)));
        }
        word(cluster, bitmap);
        Ok(())
    })?;
    Ok(unseated)
}

fn split_entry(bytes: &[u8; 16]) -> (u64, u64) {
    let entry = u128::from_be_bytes(*bytes);
    // The upper and the lower half of the 16 bytes.
    #[allow(clippy::cast_possible_truncation)]
    ((entry >> 64) as u64, entry as u64)
}

/// Where an entry that is not at home points.
fn place(what: &str, number: u64, entry: u64) -> String {
    const OFFSET: u64 = (1 << 56) - (1 << 9);
    if entry & OFFSET == 0 {
        format!("{what} {number} is unallocated")
    } else if entry & COPIED == 0 {
        format!("{what} {number} may be shared")
    } else {
        format!("{what} {number} is elsewhere")
    }
}

/// Refcounts: the table points at the blocks in order, and every cluster of the file is counted once. One that QEMU has freed
/// is counted not at all, or once if `adopt::seat` was interrupted: no other entry of the fixed layout can refer to it.
fn refcounts(
    disk: &Disk,
    layout: &Layout,
    unseated: &mut Unseated,
    mut fault: impl FnMut(Fault) -> Result<(), Fault>,
) -> Result<(), Stop> {
    // The whole table: QEMU takes every entry of it for a block.
    each::<8>(disk, layout.refcount_table, layout.refcount_table_clusters * CLUSTER, |block, bytes| {
        let entry = u64::from_be_bytes(*bytes);
        let home = layout.refcount_blocks + block * CLUSTER;
        let at_home = entry == if block < layout.refcount_block_count { home } else { 0 };
        if at_home { Ok(()) } else { fault(Fault::Layout(place("refcount block", block, entry | COPIED))) }
    })?;
    each::<2>(disk, layout.refcount_blocks, layout.file_clusters() * 2, |cluster, bytes| {
        let count = u16::from_be_bytes(*bytes);
        let at = cluster << CLUSTER_BITS;
        let freed =
            count <= 1 && at >= layout.data && unseated.take_count((at - layout.data) >> CLUSTER_BITS, count == 1);
        if count == 1 || freed {
            return Ok(());
        }
        fault(Fault::Layout(if at < layout.data {
            format!("the metadata cluster at byte {at} has refcount {count}")
        } else {
            format!("cluster {} has refcount {count}", (at - layout.data) >> CLUSTER_BITS)
        }))
    })
}

const _: () = assert!(L2_ENTRY == 16, "`l2` reads groups of 16 bytes");
