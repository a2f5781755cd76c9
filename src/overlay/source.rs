//! Reads an overlay whose clusters are anywhere: what QEMU makes of one that it has rearranged.

use super::header::Header;
use super::layout::{CLUSTER, CLUSTER_BITS, L2_ENTRIES, L2_ENTRY, index};
use super::{bits, open_file};
use crate::error::{Error, ErrorKind, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bits of an L1 entry or an L2 descriptor that are a host offset.
const OFFSET: u64 = (1 << 56) - (1 << 9);
const COMPRESSED: u64 = 1 << 62;

/// An overlay to read from, table by table.
#[derive(Debug)]
pub(super) struct Source {
    pub path: PathBuf,
    pub file: File,
    pub header: Header,
    l1: Vec<u64>,
    /// The L2 table that was read last, and its number.
    table: Vec<u8>,
    number: Option<u64>,
}

/// A cluster of the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Entry {
    /// Host offset; 0 if it has no place.
    pub host: u64,
    /// Its bitmap.
    pub word: u64,
}

impl Source {
    /// Opens the file for writing, so that it can be locked as a writer does, and reads header and L1 table.
    pub fn open(path: &Path) -> Result<Source> {
        Source::of(path, open_file(path, false)?)
    }

    /// The same for a file that is open.
    pub fn of(path: &Path, file: File) -> Result<Source> {
        let read = |e| Error::io(path, "read", e);
        let len = file.metadata().map_err(read)?.len();
        let mut bytes = vec![0; index(len.min(CLUSTER))];
        file.read_exact_at(&mut bytes, 0).map_err(read)?;
        let header = Header::parse_also_old(path, &bytes)?;
        let tables = header.size.div_ceil(CLUSTER * L2_ENTRIES);
        let end = header.l1.checked_add(tables * 8).filter(|end| *end <= len);
        if u64::from(header.l1_entries) < tables || end.is_none() || !header.l1.is_multiple_of(CLUSTER) {
            return Err(corrupt(path, "its L1 table is too short or not in the file".into()));
        }
        let mut bytes = vec![0; index(tables * 8)];
        file.read_exact_at(&mut bytes, header.l1).map_err(read)?;
        let l1 = bytes.as_chunks::<8>().0.iter().map(|entry| u64::from_be_bytes(*entry)).collect();
        Ok(Source { path: path.into(), file, header, l1, table: vec![0; index(CLUSTER)], number: None })
    }

    /// Clusters of the disk, a partial last one included.
    pub fn clusters(&self) -> u64 {
        self.header.size.div_ceil(CLUSTER)
    }

    /// What there is to know of a cluster. Cheap for ascending numbers.
    pub fn entry(&mut self, cluster: u64) -> Result<Entry> {
        let number = cluster / L2_ENTRIES;
        let at = self.l1.get(index(number)).map_or(0, |entry| entry & OFFSET);
        if at == 0 {
            return Ok(Entry::default());
        }
        if self.number != Some(number) {
            self.read_table(number, at)?;
        }
        let from = index(cluster % L2_ENTRIES * L2_ENTRY);
        let half = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&self.table[at..at + 8]);
            u64::from_be_bytes(bytes)
        };
        self.check_entry(cluster, half(from), half(from + 8))
    }

    fn read_table(&mut self, number: u64, at: u64) -> Result<()> {
        self.number = None;
        if !at.is_multiple_of(CLUSTER) {
            return Err(corrupt(&self.path, format!("L2 table {number} is at no cluster")));
        }
        self.file.read_exact_at(&mut self.table, at).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => corrupt(&self.path, format!("L2 table {number} is not in the file")),
            _ => Error::io(&self.path, "read", e),
        })?;
        self.number = Some(number);
        Ok(())
    }

    fn check_entry(&self, cluster: u64, descriptor: u64, word: u64) -> Result<Entry> {
        if descriptor & COMPRESSED != 0 {
            let mend =
                format!("write it anew with 'vmar overlay create NEW --image NAME --from {}'", self.path.display());
            let cause = format!("cluster {cluster} is compressed, which overlays of vmar are not");
            return Err(Error::file(ErrorKind::Unsupported, &self.path, cause).mend(mend));
        }
        let host = descriptor & OFFSET;
        if !bits::is_valid(word) || !host.is_multiple_of(CLUSTER) || host == 0 && word & 0xffff_ffff != 0 {
            return Err(corrupt(&self.path, format!("the L2 entry of cluster {cluster} cannot be")));
        }
        Ok(Entry { host, word })
    }

    /// Bytes of subclusters with data: how much there is to copy, about.
    pub fn data_bytes(&mut self) -> Result<u64> {
        let mut bytes = 0;
        for cluster in 0..self.clusters() {
            bytes += u64::from((self.entry(cluster)?.word & 0xffff_ffff).count_ones()) * super::layout::SUB;
        }
        Ok(bytes)
    }
}

const _: () = assert!(CLUSTER_BITS == 16, "an L2 table is one cluster");

fn corrupt(path: &Path, cause: String) -> Error {
    Error::file(ErrorKind::Corrupt, path, cause).mend("restore it from a backup; 'qemu-img check' says more")
}
