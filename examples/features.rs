//! Prints what a vhost-user-blk backend offers: any backend, not only vmar.
//!
//! ```text
//! vmar serve --image web --read-only --socket-path /tmp/web.sock &
//! cargo run --example features -- /tmp/web.sock
//! ```
//!
//! `src/daemon/FEATURES.md` has its answers from vmar and from qemu-storage-daemon.
#![allow(clippy::cast_possible_truncation)]

#[path = "../tests/common/offer.rs"]
mod offer;

use offer::{FEATURES, Offer, PROTOCOL_FEATURES};
use std::path::Path;
use std::process::ExitCode;

/// Fields of `struct virtio_blk_config` (virtio 1.3, section 5.2.4): name, offset, bytes.
const FIELDS: &[(&str, usize, usize)] = &[
    ("capacity", 0, 8),
    ("size_max", 8, 4),
    ("seg_max", 12, 4),
    ("blk_size", 20, 4),
    ("physical_block_exp", 24, 1),
    ("alignment_offset", 25, 1),
    ("min_io_size", 26, 2),
    ("opt_io_size", 28, 4),
    ("writeback", 32, 1),
    ("num_queues", 34, 2),
    ("max_discard_sectors", 36, 4),
    ("max_discard_seg", 40, 4),
    ("discard_sector_alignment", 44, 4),
    ("max_write_zeroes_sectors", 48, 4),
    ("max_write_zeroes_seg", 52, 4),
    ("write_zeroes_may_unmap", 56, 1),
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [socket] = args.as_slice() else {
        eprintln!("usage: features SOCKET");
        return ExitCode::from(2);
    };
    match offer::ask(Path::new(socket)) {
        Ok(offer) => {
            print(&offer);
            ExitCode::SUCCESS
        }
        Err(why) => {
            eprintln!("{socket}: {why}");
            ExitCode::FAILURE
        }
    }
}

fn print(offer: &Offer) {
    bits("features", offer.features, FEATURES);
    bits("protocol features", offer.protocol, PROTOCOL_FEATURES);
    for (what, value) in [("queues", offer.queues), ("memory slots", offer.mem_slots)] {
        println!("{what}: {}", value.map_or("not told".to_string(), |v| v.to_string()));
    }
    for (name, offset, len) in FIELDS {
        if let Some(value) = offer.field(*offset, *len) {
            println!("config {name}: {value}");
        }
    }
}

fn bits(what: &str, value: u64, names: &[(u32, &str)]) {
    println!("{what}: {value:#x}");
    for bit in (0..u64::BITS).filter(|bit| value >> bit & 1 != 0) {
        println!("  {bit:2} {}", offer::name(names, bit));
    }
}
