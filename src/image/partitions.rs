//! Where the partitions of a disk begin. Blocks are compared at multiples of 4 KiB of the disk, so a partition that begins
//! elsewhere (sector 63 was usual before 2010) has each of its file system's blocks in two halves, and next to nothing in
//! it equals a block of an image whose partitions begin at a multiple.
//!
//! The tables are somebody else's bytes: what they say is bounded, checked against the size of the disk, and believed no
//! further than a warning goes. Checksums are not looked at, for a table that a boot loader would refuse lies just the same.

use crate::error::{Error, Result};
use crate::units::{BLOCK_SIZE, SECTOR_SIZE};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Most entries of a GPT that are looked at; 128 is usual.
const GPT_ENTRIES_MAX: u32 = 1024;
/// Most logical partitions: the chain of an extended partition may be a ring.
const LOGICAL_MAX: u32 = 128;

/// One partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, as Linux counts: from 1; logical ones from 5.
    pub number: u32,
    /// Byte of the disk at which it starts.
    pub start: u64,
    /// Bytes, no more than the disk has behind `start`.
    pub len: u64,
}

impl Partition {
    /// True if its blocks do not lie on the disk's blocks.
    pub fn is_misaligned(&self) -> bool {
        !self.start.is_multiple_of(BLOCK_SIZE)
    }
}

/// The partitions of a raw disk, in order of their numbers; none if it has no table that makes sense.
pub fn partitions(file: &File, path: &Path, size: u64) -> Result<Vec<Partition>> {
    let mut read = |at: u64, buf: &mut [u8]| file.read_exact_at(buf, at);
    parse(size, &mut read).map_err(|e| Error::io(path, "read its partition table", e))
}

/// Those of them that do not begin at a multiple of 4 KiB.
pub fn misaligned(file: &File, path: &Path, size: u64) -> Result<Vec<Partition>> {
    Ok(partitions(file, path, size)?.into_iter().filter(Partition::is_misaligned).collect())
}

/// One line for people: what is wrong with a misaligned partition, what it costs, and the mend.
pub fn warning(path: &Path, partition: &Partition) -> String {
    format!(
        "{}: partition {} starts at sector {}, no multiple of 4 KiB: its blocks equal those of no image that is aligned, so \
         next to nothing of it is shared; copy it to an aligned disk ('virt-resize --align-first always OLD NEW') and use that",
        path.display(),
        partition.number,
        partition.start / SECTOR_SIZE
    )
}

type Read<'a> = dyn FnMut(u64, &mut [u8]) -> io::Result<()> + 'a;

fn parse(size: u64, read: &mut Read) -> io::Result<Vec<Partition>> {
    let Some(sector) = sector_at(size, 0, read)? else { return Ok(Vec::new()) };
    let Some(primary) = entries(&sector) else { return Ok(Vec::new()) };
    let is_protective = |e: &Entry| e.kind == 0xee;
    let found = match primary.iter().any(is_protective) {
        true => gpt(size, read)?,
        false => mbr(size, &primary, read)?,
    };
    Ok(found)
}

/// A partition that the disk has room for the start of; `None` for anything else.
fn partition(number: u32, start: Option<u64>, len: Option<u64>, size: u64) -> Option<Partition> {
    let start = start.filter(|start| *start > 0 && *start < size)?;
    let len = len.filter(|len| *len > 0)?.min(size - start);
    Some(Partition { number, start, len })
}

/// A sector of the disk; `None` past its end.
fn sector_at(size: u64, at: u64, read: &mut Read) -> io::Result<Option<[u8; 512]>> {
    if at.checked_add(SECTOR_SIZE).is_none_or(|end| end > size) {
        return Ok(None);
    }
    let mut sector = [0; 512];
    read(at, &mut sector)?;
    Ok(Some(sector))
}

// ---- MBR ----

/// One of the four entries of a boot record; sectors have 512 bytes.
#[derive(Clone, Copy)]
struct Entry {
    kind: u8,
    start: u32,
    sectors: u32,
}

impl Entry {
    fn is_extended(&self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    fn is_empty(&self) -> bool {
        self.kind == 0 || self.sectors == 0
    }
}

/// The entries of a boot record. A file system without a table has the same signature but no sensible flags there.
fn entries(sector: &[u8; 512]) -> Option<[Entry; 4]> {
    let table = sector.get(446..510)?;
    let flags_are_sensible = table.chunks(16).all(|e| matches!(e.first(), Some(0 | 0x80)));
    if sector.get(510..) != Some(&[0x55, 0xaa]) || !flags_are_sensible {
        return None;
    }
    let entry = |i: usize| Entry {
        kind: table[16 * i + 4],
        start: u32_at(table, 16 * i + 8),
        sectors: u32_at(table, 16 * i + 12),
    };
    Some([0, 1, 2, 3].map(entry))
}

fn mbr(size: u64, primary: &[Entry; 4], read: &mut Read) -> io::Result<Vec<Partition>> {
    let mut out = Vec::new();
    let mut logical = 5;
    for (number, entry) in (1..).zip(primary).filter(|(_, e)| !e.is_empty()) {
        if entry.is_extended() {
            chain(size, entry.start, &mut logical, &mut out, read)?;
        } else {
            out.extend(partition(number, bytes(entry.start), bytes(entry.sectors), size));
        }
    }
    out.sort_by_key(|p| p.number);
    Ok(out)
}

/// The logical partitions: each boot record names one, relative to itself, and the next record, relative to the first.
fn chain(size: u64, first: u32, logical: &mut u32, out: &mut Vec<Partition>, read: &mut Read) -> io::Result<()> {
    let mut at = u64::from(first) * SECTOR_SIZE;
    while *logical < 5 + LOGICAL_MAX {
        let Some(sector) = sector_at(size, at, read)? else { return Ok(()) };
        let Some([own, next, ..]) = entries(&sector) else { return Ok(()) };
        if !own.is_empty() {
            let start = bytes(own.start).map(|start| start + at);
            out.extend(partition(*logical, start, bytes(own.sectors), size));
        }
        // Counted even if it is empty: this is what ends a ring.
        *logical += 1;
        if next.is_empty() || !next.is_extended() {
            return Ok(());
        }
        at = (u64::from(first) + u64::from(next.start)) * SECTOR_SIZE;
    }
    Ok(())
}

/// Bytes of so many sectors; 32 bits of them cannot overflow.
fn bytes(sectors: u32) -> Option<u64> {
    Some(u64::from(sectors) * SECTOR_SIZE)
}

// ---- GPT ----

/// The GPT behind a protective boot record; its sectors have 512 or 4,096 bytes.
fn gpt(size: u64, read: &mut Read) -> io::Result<Vec<Partition>> {
    for sector_bytes in [512, 4096] {
        if let Some(header) = sector_at(size, sector_bytes, read)?
            && header.starts_with(b"EFI PART")
        {
            return gpt_entries(size, sector_bytes, &header, read);
        }
    }
    Ok(Vec::new())
}

fn gpt_entries(size: u64, sector_bytes: u64, header: &[u8; 512], read: &mut Read) -> io::Result<Vec<Partition>> {
    let first = u64_at(header, 72).checked_mul(sector_bytes);
    let (count, entry_bytes) = (u32_at(header, 80).min(GPT_ENTRIES_MAX), u32_at(header, 84));
    let mut out = Vec::new();
    if !(128..=4096).contains(&entry_bytes) {
        return Ok(out);
    }
    for i in 0..count {
        let at = first.and_then(|first| first.checked_add(u64::from(i) * u64::from(entry_bytes)));
        let mut entry = [0; 128];
        match at {
            Some(at) if at.checked_add(128).is_some_and(|end| end <= size) => read(at, &mut entry)?,
            _ => break,
        }
        let is_used = entry[..16].iter().any(|&b| b != 0);
        let (start, last) = (u64_at(&entry, 32), u64_at(&entry, 40));
        let sectors = last.checked_sub(start).and_then(|len| len.checked_add(1));
        let in_bytes = |sectors: u64| sectors.checked_mul(sector_bytes);
        out.extend(partition(i + 1, in_bytes(start), sectors.and_then(in_bytes), size).filter(|_| is_used));
    }
    Ok(out)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    crate::codec::Cursor::new(bytes.get(at..).unwrap_or_default()).u32_le().unwrap_or(0)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    crate::codec::Cursor::new(bytes.get(at..).unwrap_or_default()).u64_le().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DISK: usize = 8 << 20;

    fn put_entry(disk: &mut [u8], record: usize, slot: usize, kind: u8, start: u32, sectors: u32) {
        let at = record + 446 + 16 * slot;
        disk[at + 4] = kind;
        disk[at + 8..at + 12].copy_from_slice(&start.to_le_bytes());
        disk[at + 12..at + 16].copy_from_slice(&sectors.to_le_bytes());
        disk[record + 510..record + 512].copy_from_slice(&[0x55, 0xaa]);
    }

    fn put_gpt(disk: &mut [u8], sector: usize, count: u32, entry_bytes: u32, parts: &[(u64, u64)]) {
        put_entry(disk, 0, 0, 0xee, 1, u32::MAX);
        disk[sector..sector + 8].copy_from_slice(b"EFI PART");
        disk[sector + 72..sector + 80].copy_from_slice(&2u64.to_le_bytes());
        disk[sector + 80..sector + 84].copy_from_slice(&count.to_le_bytes());
        disk[sector + 84..sector + 88].copy_from_slice(&entry_bytes.to_le_bytes());
        for (i, (start, last)) in parts.iter().enumerate() {
            let at = 2 * sector + i * entry_bytes as usize;
            disk[at..at + 16].fill(7);
            disk[at + 32..at + 40].copy_from_slice(&start.to_le_bytes());
            disk[at + 40..at + 48].copy_from_slice(&last.to_le_bytes());
        }
    }

    /// Parses, and counts the reads.
    fn parsed(disk: &[u8]) -> (Vec<Partition>, usize) {
        let mut reads = 0;
        let mut read = |at: u64, buf: &mut [u8]| {
            reads += 1;
            let at = at as usize;
            buf.copy_from_slice(disk.get(at..at + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        };
        let found = parse(disk.len() as u64, &mut read).unwrap();
        (found, reads)
    }

    fn part(number: u32, start: u64, len: u64) -> Partition {
        Partition { number, start: start * 512, len: len * 512 }
    }

    #[test]
    fn primary_and_logical_partitions_are_found() {
        let mut disk = vec![0; DISK];
        put_entry(&mut disk, 0, 0, 0x83, 63, 100);
        put_entry(&mut disk, 0, 1, 0x05, 1000, 5000);
        put_entry(&mut disk, 0, 3, 0x83, 2048, u32::MAX);
        put_entry(&mut disk, 1000 * 512, 0, 0x83, 8, 50);
        put_entry(&mut disk, 1000 * 512, 1, 0x05, 500, 1000);
        put_entry(&mut disk, 1500 * 512, 0, 0x83, 63, 50);
        let (found, _) = parsed(&disk);
        let rest = DISK as u64 / 512 - 2048;
        assert_eq!(found, [part(1, 63, 100), part(4, 2048, rest), part(5, 1008, 50), part(6, 1563, 50)]);
        let bad: Vec<u32> = found.iter().filter(|p| p.is_misaligned()).map(|p| p.number).collect();
        assert_eq!(bad, [1, 6]);
        assert!(warning(Path::new("a.raw"), &found[0]).starts_with("a.raw: partition 1 starts at sector 63, "));
    }

    #[test]
    fn a_gpt_is_read_with_small_and_large_sectors() {
        for sector in [512, 4096] {
            let mut disk = vec![0; DISK];
            put_gpt(&mut disk, sector, 128, 128, &[(34, 49), (64, 71)]);
            let (found, _) = parsed(&disk);
            let per = sector as u64 / 512;
            assert_eq!(found, [part(1, 34 * per, 16 * per), part(2, 64 * per, 8 * per)]);
            assert_eq!(found[0].is_misaligned(), sector == 512);
        }
    }

    #[test]
    fn hostile_tables_end_soon_and_name_nothing_outside() {
        let mut ring = vec![0; DISK];
        put_entry(&mut ring, 0, 0, 0x05, 10, 100);
        put_entry(&mut ring, 10 * 512, 0, 0x83, 1, 1);
        put_entry(&mut ring, 10 * 512, 1, 0x05, 0, 100);
        let (found, reads) = parsed(&ring);
        assert!(found.len() == LOGICAL_MAX as usize && reads <= 1 + LOGICAL_MAX as usize, "{reads}");

        // All four are rings: they share the limit.
        (1..4).for_each(|slot| put_entry(&mut ring, 0, slot, 0x0f, 10, 100));
        assert!(parsed(&ring).1 <= 1 + LOGICAL_MAX as usize);

        let mut many = vec![0; DISK];
        put_gpt(&mut many, 512, u32::MAX, 128, &vec![(63, 63); 5000]);
        let (found, reads) = parsed(&many);
        assert!(found.len() == GPT_ENTRIES_MAX as usize && reads <= GPT_ENTRIES_MAX as usize + 3, "{reads}");

        for (start, last) in [(u64::MAX, u64::MAX), (u64::MAX / 512, u64::MAX), (5, 4), (1 << 40, 1 << 41), (0, 9)] {
            let mut disk = vec![0; DISK];
            put_gpt(&mut disk, 512, 4, 128, &[(start, last)]);
            assert_eq!(parsed(&disk).0, [], "{start} {last}");
        }
        for entry_bytes in [0, 1, 127, 4097, u32::MAX] {
            let mut disk = vec![0; DISK];
            put_gpt(&mut disk, 512, 4, 128, &[(63, 64)]);
            disk[512 + 84..512 + 88].copy_from_slice(&entry_bytes.to_le_bytes());
            assert_eq!(parsed(&disk).0, []);
        }
    }

    #[test]
    fn a_file_system_and_an_empty_disk_have_no_partitions() {
        assert_eq!(parsed(&[]).0, []);
        assert_eq!(parsed(&[0; 512]).0, []);
        let mut fat = vec![0; DISK];
        put_entry(&mut fat, 0, 0, 0x20, 0x6c_6c_6f_66, 63);
        fat[446] = 0x72;
        assert_eq!(parsed(&fat).0, []);
    }

    proptest! {
        /// Whatever stands in the sectors that tables are in, nothing outside the disk is named or read.
        #[test]
        fn no_table_makes_it_panic(
            sectors in 0usize..70,
            noise in prop::collection::vec((0usize..70 * 512, any::<u8>()), 0..200),
            tables in prop::collection::vec((0usize..60, 0usize..4, prop::sample::select(vec![0x05u8, 0x83, 0xee]),
                0u32..80, 0u32..80), 0..12),
            gpt in prop::option::of((any::<u32>(), 100u32..300, any::<u64>())),
        ) {
            let mut disk = vec![0u8; 70 * 512];
            if let Some((count, entry_bytes, first)) = gpt {
                put_gpt(&mut disk, 512, count, entry_bytes, &[(3, 9)]);
                let first = if first % 2 == 0 { first } else { first % 80 };
                disk[512 + 72..512 + 80].copy_from_slice(&first.to_le_bytes());
            }
            for (record, slot, kind, start, len) in tables {
                put_entry(&mut disk, record * 512, slot, kind, start, len);
            }
            for (at, byte) in noise {
                disk[at] = byte;
            }
            disk.truncate(sectors * 512);
            let (found, reads) = parsed(&disk);
            prop_assert!(reads <= (GPT_ENTRIES_MAX + LOGICAL_MAX) as usize + 3);
            for p in found {
                prop_assert!(p.start > 0 && p.len > 0 && p.start + p.len <= disk.len() as u64);
            }
        }
    }
}
