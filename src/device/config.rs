//! The config space and the feature bits (virtio 1.2, sections 5.2.3 and 5.2.4).

use super::request::SEGMENTS_MAX;
use crate::units::{BLOCK_SIZE, SECTOR_SIZE};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Data segments of a request: a queue of 128 less header and status, what QEMU's own virtio-blk offers by default.
/// SIZE_MAX is not offered at all: libblkio takes a value of 0 for a largest transfer of 0.
const SEG_MAX: u32 = 126;

/// Bytes of a logical block: what the guest may address.
const LOGICAL_BLOCK: u32 = 512;

/// Logical blocks of a physical block, as a power of two.
const PHYSICAL_BLOCK_EXP: u8 = 3;

const _: () = assert!(LOGICAL_BLOCK as u64 == SECTOR_SIZE && SECTOR_SIZE << PHYSICAL_BLOCK_EXP == BLOCK_SIZE);

/// The largest range of one discard or write-zeroes segment, in sectors: 2 GiB, which bounds how long a request can take.
const ZEROES_SECTORS_MAX: u32 = 1 << 22;

/// What a discard should be aligned to, in sectors: 4 KiB. The overlay tracks 2 KiB, but the host's file system gives
/// back whole blocks of its own, and those are 4 KiB nearly everywhere.
const DISCARD_ALIGNMENT: u32 = 8;

/// Where `writeback` is in the config space: the one byte that a driver may write (section 5.2.4).
pub const WRITEBACK_AT: usize = 32;

/// What the guest may know of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes, a multiple of 512.
    pub size: u64,
    /// Writes are refused.
    pub read_only: bool,
    /// The write cache is on: a write is durable only after a flush.
    pub write_cache: bool,
    /// Queues offered.
    pub num_queues: u16,
}

/// True when a discard or write-zeroes range may be that long.
pub fn zeroes_len_ok(len: u64) -> bool {
    len / SECTOR_SIZE <= u64::from(ZEROES_SECTORS_MAX)
}

impl Geometry {
    /// The device features to offer (without the vhost-user bit).
    pub fn features(&self) -> u64 {
        let mut bits = 1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.read_only {
            bits |= 1 << VIRTIO_BLK_F_RO;
        } else {
            bits |= 1 << VIRTIO_BLK_F_WRITE_ZEROES | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_CONFIG_WCE;
        }
        if self.num_queues > 1 {
            bits |= 1 << VIRTIO_BLK_F_MQ;
        }
        bits
    }

    /// `len` bytes of the config space from `offset` on; zeros past its end.
    pub fn config(&self, offset: usize, len: usize) -> Vec<u8> {
        let space = self.space();
        let mut out = vec![0; len];
        if let Some(part) = space.get(offset..) {
            let n = part.len().min(len);
            out[..n].copy_from_slice(&part[..n]);
        }
        out
    }

    /// `struct virtio_blk_config`, field by field, little-endian.
    fn space(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(64);
        out.extend((self.size / SECTOR_SIZE).to_le_bytes()); // capacity
        out.extend(0u32.to_le_bytes()); // size_max: not offered
        out.extend(SEG_MAX.to_le_bytes());
        out.extend([0; 4]); // geometry: not offered
        out.extend(LOGICAL_BLOCK.to_le_bytes()); // blk_size
        out.push(PHYSICAL_BLOCK_EXP); // topology: physical blocks of 4 KiB, the unit of the page cache ...
        out.push(0);
        out.extend((1u16 << PHYSICAL_BLOCK_EXP).to_le_bytes()); // ... as the least sensible I/O ...
        out.extend(128u32.to_le_bytes()); // ... and 64 KiB, a cluster of the overlay, as the best
        debug_assert_eq!(out.len(), WRITEBACK_AT);
        out.push(u8::from(self.write_cache));
        out.push(0);
        out.extend(self.num_queues.to_le_bytes());
        let if_writable = |n: u32| if self.read_only { 0 } else { n }.to_le_bytes();
        out.extend(if_writable(ZEROES_SECTORS_MAX)); // discard
        out.extend(if_writable(SEGMENTS_MAX));
        out.extend(if_writable(DISCARD_ALIGNMENT));
        out.extend(if_writable(ZEROES_SECTORS_MAX)); // write zeroes
        out.extend(if_writable(SEGMENTS_MAX));
        out.push(u8::from(!self.read_only)); // write_zeroes_may_unmap
        out.extend([0; 3]);
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_config_space_reads_at_any_offset() {
        let g = Geometry { size: 3 << 20, read_only: false, write_cache: true, num_queues: 4 };
        let whole = g.config(0, 60);
        assert_eq!(&whole[..8], &(3u64 * 2048).to_le_bytes());
        assert_eq!(&whole[34..36], &4u16.to_le_bytes(), "num_queues");
        assert_eq!(whole[56], 1, "may unmap");
        assert_eq!(whole[WRITEBACK_AT], 1);
        assert_eq!(Geometry { write_cache: false, ..g }.config(WRITEBACK_AT, 1), [0]);
        let words: Vec<_> = whole[36..56].chunks(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
        assert_eq!(words, [1 << 22, 1, 8, 1 << 22, 1], "limits of discard and of write zeroes");
        for offset in 0..=256 {
            assert_eq!(g.config(offset, 256 - offset.min(256)).len(), 256 - offset.min(256));
        }
        assert_eq!(g.config(20, 4), whole[20..24]);
        assert_eq!(g.config(1000, 4), [0; 4]);
    }

    #[test]
    fn a_read_only_disk_offers_nothing_that_writes() {
        let g = Geometry { size: 512, read_only: true, write_cache: true, num_queues: 1 };
        for bit in [VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_CONFIG_WCE] {
            assert_eq!(g.features() & (1 << bit), 0);
        }
        assert_ne!(g.features() & (1 << VIRTIO_BLK_F_RO), 0);
        assert_eq!(g.features() & (1 << VIRTIO_BLK_F_MQ), 0);
        assert_eq!(&g.config(36, 24), &[0; 24]);
    }
}
