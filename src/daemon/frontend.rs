//! What a frontend sends by descriptor: memory, kicks and calls. All of it is looked at before it is used.

use std::fs::File;
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost::vhost_user::{Error, Result};
use vm_memory::{GuestAddress, GuestRegionMmap};

/// A region of guest memory as the frontend sees it.
#[derive(Clone, Copy, Debug)]
pub struct Mapping {
    /// Address in the frontend's process.
    pub user: u64,
    /// Guest-physical address.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
}

/// Maps one region that the frontend shares. Pages that the file does not have would be SIGBUS later.
pub fn map_region(region: &VhostUserMemoryRegion, file: File) -> Result<(GuestRegionMmap, Mapping)> {
    let meta = file.metadata().map_err(Error::ReqHandlerError)?;
    let (offset, size) = (region.mmap_offset, region.memory_size);
    if region.user_addr.checked_add(size).is_none() {
        return Err(Error::InvalidParam);
    }
    if meta.is_file() && offset.checked_add(size).is_none_or(|end| end > meta.len()) {
        log::error!("the frontend shares {size} bytes at {offset} of a file of {}", meta.len());
        return Err(Error::InvalidParam);
    }
    let mapped = region.mmap_region(file)?;
    let guest = GuestRegionMmap::new(mapped, GuestAddress(region.guest_phys_addr)).ok_or(Error::InvalidParam)?;
    let mapping = Mapping { user: region.user_addr, guest: region.guest_phys_addr, size: region.memory_size };
    Ok((guest, mapping))
}

/// Checks a kick or call descriptor and makes it non-blocking: no frontend that reads or writes it at the wrong moment may
/// hold up a queue. What is always ready (a regular file, most devices) would spin one.
pub fn prepare_event(file: &File) -> Result<()> {
    use rustix::fs::{FileType, OFlags, fcntl_getfl, fcntl_setfl, fstat};
    let failed = |e: rustix::io::Errno| Error::ReqHandlerError(e.into());
    match FileType::from_raw_mode(fstat(file).map_err(failed)?.st_mode) {
        FileType::RegularFile | FileType::Directory | FileType::CharacterDevice | FileType::BlockDevice => {
            log::error!("the frontend sent a file in place of an eventfd");
            Err(Error::InvalidParam)
        }
        _ => fcntl_setfl(file, fcntl_getfl(file).map_err(failed)? | OFlags::NONBLOCK).map_err(failed),
    }
}
