//! Takes guest memory away from transfers that the kernel will not end.
//!
//! When the time for a drain is up, the guest gets back requests (with an I/O error) that a hanging disk still holds: a
//! read in io_uring, a write in a job's thread. Their buffers are the guest's again, but the kernel keeps their addresses
//! and would, once the disk answers, write into memory that the guest uses for something else, or write to the disk what it
//! has put there since. So the addresses are revoked before the guest is told: an anonymous mapping without any access
//! replaces the guest's memory at the same place. Whatever the kernel copies later, in either direction, fails with EFAULT.
//! The rings live on in a second mapping of the same files at new addresses.
//!
//! Why this is enough:
//! - The kernel reaches buffers of ours only by their addresses in this process: vmar reads and writes through the page
//!   cache, registers no buffers and never uses O_DIRECT, so no page of the guest is pinned by a transfer. A copy that runs
//!   in this moment ends before, or faults after, the exchange of the mapping; mmap(2) with MAP_FIXED is atomic to it.
//! - Nobody else uses the old addresses: the queue threads have stopped (they alone touch guest memory themselves; jobs
//!   hand it to the kernel only), and what a queue looks at next it looks up in the new map.
//! - The old range stays ours, so nothing else is ever mapped there, as long as a request that was given up holds its
//!   snapshot of the map.

use super::GuestMap;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use vm_memory::{
    FileOffset, GuestMemoryBackend as _, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion,
};

/// Maps the regions of `map` a second time, at new addresses.
///
/// # Errors
/// Those of mmap(2); the old map is as it was.
pub fn map_again(map: &GuestMap) -> io::Result<GuestMap> {
    let regions = map
        .iter()
        .map(|region| {
            let file = region.file_offset().ok_or_else(|| io::Error::other("guest memory without a file"))?;
            let file = FileOffset::from_arc(Arc::clone(file.arc()), file.start());
            let size = usize::try_from(region.len()).map_err(io::Error::other)?;
            let mapped = MmapRegion::from_file(file, size).map_err(io::Error::other)?;
            GuestRegionMmap::new(mapped, region.start_addr()).ok_or_else(|| io::Error::other("a region without an end"))
        })
        .collect::<io::Result<Vec<_>>>()?;
    if regions.is_empty() {
        return Ok(GuestMap::new());
    }
    GuestMap::from_regions(regions).map_err(io::Error::other)
}

/// Makes all memory of these maps inaccessible, for the kernel too, for good.
///
/// # Errors
/// Those of mmap(2). Some of the memory may be revoked then, and none of it can be relied on.
///
/// # Safety
/// No thread may touch the memory by itself any more, now or later; the kernel may.
pub unsafe fn revoke(maps: &[Arc<GuestMap>]) -> io::Result<()> {
    // Maps share regions: each once.
    let mut ranges = BTreeMap::new();
    for region in maps.iter().flat_map(|map| map.iter()) {
        let start = region.get_host_address(MemoryRegionAddress(0)).map_err(io::Error::other)?;
        ranges.insert(start as usize, usize::try_from(region.len()).map_err(io::Error::other)?);
    }
    for (start, len) in ranges {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
        // SAFETY: the range is a mapping of ours as a whole (a region of a map that is alive), so nothing else is replaced;
        // by this function's contract no thread accesses it. Its owner unmaps it as it would have the old one.
        let at = unsafe { libc::mmap(start as *mut libc::c_void, len, libc::PROT_NONE, flags, -1, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;
    use vm_memory::{Bytes, GuestAddress};

    fn guest(file: &File) -> Arc<GuestMap> {
        let region = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 4096), 8192).unwrap();
        Arc::new(GuestMap::from_regions(vec![GuestRegionMmap::new(region, GuestAddress(0x1000)).unwrap()]).unwrap())
    }

    #[test]
    fn the_kernel_can_neither_read_nor_write_what_was_revoked_and_the_new_map_is_the_same_memory() {
        let memory = tempfile::tempfile().unwrap();
        memory.set_len(16 << 10).unwrap();
        let old = guest(&memory);
        old.write_slice(b"ring", GuestAddress(0x1100)).unwrap();
        let address = old.get_host_address(GuestAddress(0x1100)).unwrap();
        let new = map_again(&old).unwrap();
        // SAFETY: nothing touches the old map below but system calls.
        unsafe { revoke(&[Arc::clone(&old), Arc::clone(&old)]) }.unwrap();

        let disk = tempfile::tempfile().unwrap();
        disk.write_all_at(&[7; 512], 0).unwrap();
        for write in [false, true] {
            // SAFETY: the kernel checks the address; that it finds nothing there is the point.
            let n = unsafe {
                match write {
                    false => libc::pread(disk.as_raw_fd(), address.cast(), 512, 0),
                    true => libc::pwrite(disk.as_raw_fd(), address.cast(), 512, 0),
                }
            };
            assert_eq!((n, io::Error::last_os_error().raw_os_error()), (-1, Some(libc::EFAULT)));
        }
        let mut bytes = [0; 512];
        disk.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [7; 512], "the late write changed nothing");

        let mut ring = [0; 4];
        new.read_slice(&mut ring, GuestAddress(0x1100)).unwrap();
        assert_eq!(&ring, b"ring");
        new.write_slice(b"used", GuestAddress(0x1100)).unwrap();
        drop(old);
        memory.read_exact_at(&mut ring, 4096 + 0x100).unwrap();
        assert_eq!(&ring, b"used", "it is still the frontend's memory, and it outlives the old map");
    }
}
