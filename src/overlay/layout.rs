//! Where everything in the file is: a pure function of the capacity, the largest size that the disk may grow to (see
//! `FORMAT.md`).
//!
//! ```text
//! | header | refcount table | refcount blocks | L1 | every L2 table, in order | data area |
//! 0        64 KiB                                  l2_start                   data_start
//! ```

use super::header::Header;

/// log2 of the cluster size.
pub(super) const CLUSTER_BITS: u32 = 16;
/// Bytes of a cluster.
pub(super) const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// log2 of the subcluster size.
pub(super) const SUB_BITS: u32 = 11;
/// Bytes of a subcluster: the unit of the allocation and zero bits.
pub(super) const SUB: u64 = 1 << SUB_BITS;
/// The same as a length of buffers.
pub(super) const SUB_LEN: usize = index(SUB);
/// Subclusters of a cluster.
pub(super) const SUBS: u64 = CLUSTER / SUB;
/// Bytes of an extended L2 entry: descriptor and bitmap.
pub(super) const L2_ENTRY: u64 = 16;
/// Clusters that one L2 table (one cluster) describes.
pub(super) const L2_ENTRIES: u64 = CLUSTER / L2_ENTRY;
/// Clusters that one refcount block (one cluster of 16-bit counts) describes.
pub(super) const REFCOUNTS: u64 = CLUSTER / 2;
/// L1 entries and L2 descriptors: the refcount is exactly one.
pub(super) const COPIED: u64 = 1 << 63;

const _: () = assert!(usize::BITS == 64, "indices are taken from 64-bit offsets");

/// A 64-bit count as an index; lossless, see the assertion above.
#[allow(clippy::cast_possible_truncation)]
pub(super) const fn index(n: u64) -> usize {
    n as usize
}

/// The layout of an overlay for a disk that can grow to `capacity` bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Layout {
    /// Virtual size of the disk in the header that this was made for. Nothing else depends on it, and it grows while the
    /// overlay is open: `Overlay::size` is the one that counts then.
    pub size: u64,
    /// Bytes of disk that there is room for.
    pub capacity: u64,
    /// Data clusters of the capacity, a partial last one included.
    pub clusters: u64,
    pub refcount_table: u64,
    pub refcount_table_clusters: u64,
    pub refcount_blocks: u64,
    pub refcount_block_count: u64,
    pub l1: u64,
    pub l2: u64,
    pub l2_tables: u64,
    /// Host offset of guest byte 0.
    pub data: u64,
}

impl Layout {
    /// The layout for a disk of `size` bytes that can grow to `capacity` (not less, at most 16 TiB; the caller has checked
    /// that).
    pub fn new(size: u64, capacity: u64) -> Layout {
        let clusters = capacity.div_ceil(CLUSTER);
        let l2_tables = clusters.div_ceil(L2_ENTRIES);
        let l1_clusters = (l2_tables * 8).div_ceil(CLUSTER);
        // Refcount blocks count themselves and their table too. The number grows with the total and the total with the
        // number, so counting up from nothing ends at the smallest number that is enough.
        let (mut table, mut blocks) = (0, 0);
        loop {
            let total = 1 + table + blocks + l1_clusters + l2_tables + clusters;
            let need_blocks = total.div_ceil(REFCOUNTS);
            let need_table = (need_blocks * 8).div_ceil(CLUSTER);
            if (need_table, need_blocks) == (table, blocks) {
                break;
            }
            (table, blocks) = (need_table, need_blocks);
        }
        let refcount_blocks = (1 + table) * CLUSTER;
        let l1 = refcount_blocks + blocks * CLUSTER;
        let l2 = l1 + l1_clusters * CLUSTER;
        Layout {
            size,
            capacity,
            clusters,
            refcount_table: CLUSTER,
            refcount_table_clusters: table,
            refcount_blocks,
            refcount_block_count: blocks,
            l1,
            l2,
            l2_tables,
            data: l2 + l2_tables * CLUSTER,
        }
    }

    /// Clusters of the file, metadata included.
    pub fn file_clusters(&self) -> u64 {
        self.file_len() >> CLUSTER_BITS
    }

    /// Bytes of the file.
    pub fn file_len(&self) -> u64 {
        self.data + self.clusters * CLUSTER
    }

    /// The one descriptor that data cluster `cluster` may have.
    pub fn descriptor(&self, cluster: u64) -> u64 {
        (self.data + cluster * CLUSTER) | COPIED
    }

    /// The one L1 entry that L2 table `table` may have.
    pub fn l1_entry(&self, table: u64) -> u64 {
        (self.l2 + table * CLUSTER) | COPIED
    }

    /// Host offset of the bitmap of data cluster `cluster`.
    pub fn bitmap_at(&self, cluster: u64) -> u64 {
        self.l2 + cluster * L2_ENTRY + 8
    }

    /// Compares with what a header says; the text names the first difference.
    pub fn agrees_with(&self, header: &Header) -> Result<(), String> {
        if header.size > self.capacity {
            return Err(format!("a disk of {} bytes has no room in a capacity of {}", header.size, self.capacity));
        }
        let fields = [
            ("the refcount table", header.refcount_table, self.refcount_table),
            (
                "the number of refcount table clusters",
                header.refcount_table_clusters.into(),
                self.refcount_table_clusters,
            ),
            ("the L1 table", header.l1, self.l1),
            ("the number of L1 entries", header.l1_entries.into(), self.l2_tables),
            ("the first L2 table in vmar's extension", header.extension.l2_start, self.l2),
            ("the data area in vmar's extension", header.extension.data_start, self.data),
        ];
        match fields.iter().find(|(_, found, expected)| found != expected) {
            Some((what, found, expected)) => Err(format!("{what} is {found} in place of {expected}")),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gigabyte_takes_256_kib_of_l2_tables() {
        let l = Layout::new(1 << 29, 1 << 30);
        assert_eq!((l.clusters, l.l2_tables), (16384, 4));
        assert_eq!((l.refcount_table_clusters, l.refcount_block_count), (1, 1));
        assert_eq!(
            (l.refcount_table, l.refcount_blocks, l.l1, l.l2, l.data),
            (0x10000, 0x20000, 0x30000, 0x40000, 0x80000)
        );
        assert_eq!(l.file_len(), 0x80000 + (1 << 30));
    }

    #[test]
    fn refcounts_cover_every_cluster_and_nothing_overlaps() {
        let mut sizes = vec![512, 65536, 65536 + 512, (1 << 44) - 512, 1 << 44];
        // Around each border of the refcount blocks and their table.
        for border in [REFCOUNTS, 2 * REFCOUNTS, 8192 * REFCOUNTS] {
            sizes.extend((0..40).map(|back| (border - back) * CLUSTER));
        }
        for size in sizes {
            let l = Layout::new(512, size);
            assert!(l.clusters * CLUSTER >= size && (l.clusters - 1) * CLUSTER < size);
            assert!(l.refcount_block_count * REFCOUNTS >= l.file_clusters(), "{size}");
            assert!((l.refcount_block_count - 1) * REFCOUNTS < l.file_clusters(), "{size}");
            assert!(l.refcount_table_clusters * CLUSTER >= l.refcount_block_count * 8);
            assert_eq!(l.refcount_blocks, l.refcount_table + l.refcount_table_clusters * CLUSTER);
            assert_eq!(l.l1, l.refcount_blocks + l.refcount_block_count * CLUSTER);
            assert!(l.l2 >= l.l1 + l.l2_tables * 8 && l.l2 < l.l1 + l.l2_tables * 8 + CLUSTER);
            assert!(l.l2_tables * L2_ENTRIES >= l.clusters);
            assert_eq!(l.data % CLUSTER, 0);
        }
    }
}
