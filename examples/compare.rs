//! Reads a whole vhost-user-blk disk with libblkio and compares it with a raw file.
//!
//! ```text
//! vmar serve --image web --read-only --socket-path /tmp/web.sock &
//! cargo run --release --example compare -- /tmp/web.sock /images/web.raw
//! ```
//!
//! The client is a vhost-user driver that has nothing of vmar in it. The raw file is read past the page cache (O_DIRECT),
//! so that what is cached afterwards was put there by the server.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use blkio::{Blkio, Completion, ReqFlags};
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::{FileExt, OpenOptionsExt};

/// Bytes of one read.
const PIECE: usize = 256 << 10;
/// Reads in flight.
const DEPTH: usize = 16;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket, raw] = args.as_slice() else {
        eprintln!("usage: compare SOCKET RAW");
        std::process::exit(2);
    };
    match compare(socket, raw) {
        Ok(bytes) => println!("{raw}: {bytes} bytes are the same"),
        Err(why) => {
            eprintln!("{raw}: {why}");
            std::process::exit(1);
        }
    }
}

fn compare(socket: &str, raw: &str) -> Result<u64, String> {
    let say = |e: blkio::Error| format!("{socket}: {e}");
    let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(raw).map_err(|e| e.to_string())?;
    let size = file.metadata().map_err(|e| e.to_string())?.len();
    let mut blkio = Blkio::new("virtio-blk-vhost-user").map_err(say)?;
    blkio.set_str("path", socket).map_err(say)?;
    blkio.set_bool("read-only", true).map_err(say)?;
    blkio.connect().map_err(say)?;
    let capacity = blkio.get_u64("capacity").map_err(say)?;
    if capacity != size {
        return Err(format!("has {size} bytes, the disk {capacity}"));
    }
    let mut queue = blkio.start().map_err(say)?.queues.remove(0);
    let region = blkio.alloc_mem_region(PIECE * DEPTH).map_err(say)?;
    blkio.map_mem_region(&region).map_err(say)?;
    let mut want = memmap2::MmapMut::map_anon(PIECE).map_err(|e| e.to_string())?;

    let mut offsets = [0u64; DEPTH];
    let mut idle: Vec<usize> = (0..DEPTH).collect();
    let mut next = 0;
    while next < size || idle.len() < DEPTH {
        while next < size
            && let Some(slot) = idle.pop()
        {
            let len = PIECE.min((size - next) as usize);
            queue.read(next, (region.addr + slot * PIECE) as *mut u8, len, slot, ReqFlags::empty());
            offsets[slot] = next;
            next += len as u64;
        }
        let mut done = [const { MaybeUninit::<Completion>::uninit() }; DEPTH];
        let n = queue.do_io(&mut done, 1, None, None).map_err(say)?;
        for completion in &done[..n] {
            // SAFETY: the first `n` completions are filled in.
            let completion = unsafe { completion.assume_init_ref() };
            let (slot, offset) = (completion.user_data, offsets[completion.user_data]);
            if completion.ret != 0 {
                return Err(format!("reading at byte {offset} fails with {}", completion.ret));
            }
            let len = PIECE.min((size - offset) as usize);
            // SAFETY: this part of the region is mapped and its read has ended.
            let got = unsafe { std::slice::from_raw_parts((region.addr + slot * PIECE) as *const u8, len) };
            // O_DIRECT wants whole blocks; past the end of the file it returns less.
            let n = file.read_at(&mut want, offset).map_err(|e| e.to_string())?;
            if n < len || want[..len] != *got {
                let at = want.iter().zip(got).position(|(a, b)| a != b).unwrap_or(n);
                return Err(format!("differs from the disk at byte {}", offset + at as u64));
            }
            idle.push(slot);
        }
    }
    Ok(size)
}
