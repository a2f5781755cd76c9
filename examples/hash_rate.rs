//! The hash rate of one core, beside `openssl speed`, in turns.
//!
//! ```text
//! cargo run --release --example hash_rate
//! ```
//!
//! Prints MiB/s for blocks of 4 KiB: openssl's SHA-1, vmar's fingerprint, and what a scan does for each block besides (is it
//! zero? the BLAKE3 of its chunk); then the ratio of the medians. Needs the program `openssl`.

#![allow(clippy::unwrap_used, reason = "a program of its own")]

use std::hint::black_box;
use std::process::Command;
use std::time::Instant;
use vmar::fingerprint::{Algorithm, BLOCK_BYTES, digest, hash_block};
use vmar::units::is_zero;

const BYTES: usize = 256 << 20;
const ROUNDS: usize = 7;

fn openssl() -> f64 {
    let args = ["speed", "-seconds", "1", "-bytes", "4096", "sha1"];
    let output = Command::new("openssl").args(args).output().expect("openssl is missing: apt install openssl");
    let text = String::from_utf8(output.stdout).unwrap();
    let line = text.lines().find(|l| l.starts_with("sha1")).unwrap();
    // "sha1   1491437.99k": thousands of bytes a second.
    line.split_whitespace().last().unwrap().trim_end_matches('k').parse::<f64>().unwrap() * 1000.0 / f64::from(1 << 20)
}

fn rate(work: impl Fn()) -> f64 {
    let began = Instant::now();
    work();
    BYTES as f64 / f64::from(1 << 20) / began.elapsed().as_secs_f64()
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let bytes: Vec<u8> =
        (0..BYTES as u64 / 8).flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes()).collect();
    let (mut peer, mut ours, mut scan) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        peer.push(openssl());
        ours.push(rate(|| {
            bytes.chunks(BLOCK_BYTES).for_each(|b| {
                black_box(hash_block(Algorithm::Sha1, b));
            });
        }));
        scan.push(rate(|| {
            for chunk in bytes.chunks(digest::CHUNK_BYTES) {
                chunk.chunks(BLOCK_BYTES).filter(|b| !is_zero(b)).for_each(|b| {
                    black_box(hash_block(Algorithm::Sha1, b));
                });
                black_box(digest::chunk(chunk));
            }
        }));
    }
    let [peer, ours, scan] = [&mut peer, &mut ours, &mut scan].map(|v| median(v));
    println!(
        "openssl sha1 {peer:.0} MiB/s, fingerprint {ours:.0} MiB/s ({:.2}), with zero test and digest {scan:.0} MiB/s",
        ours / peer
    );
}
