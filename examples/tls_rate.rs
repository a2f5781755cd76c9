//! What TLS between two hosts of a migration costs: bytes through a link on this machine, one way.
//!
//! ```text
//! cargo run --release --example tls_rate
//! ```
//!
//! Prints GB/s by the clock, and GB for a second of processor time of each side's thread, which is what one core carries.

#![allow(clippy::unwrap_used, reason = "a program of its own")]

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Instant;
use vmar::migrate::tls::Credentials;

const BYTES: usize = 4 << 30;
const ROUNDS: usize = 5;

fn credentials(dir: &Path) -> Credentials {
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let (ca, cert, host_key) = (dir.join("ca"), dir.join("cert"), dir.join("key"));
    fs::write(&ca, params.self_signed(&key).unwrap().pem()).unwrap();
    let (issuer, key) = (Issuer::new(params, key), KeyPair::generate().unwrap());
    let host = CertificateParams::new(["127.0.0.1".to_string()]).unwrap();
    fs::write(&cert, host.signed_by(&key, &issuer).unwrap().pem()).unwrap();
    fs::write(&host_key, key.serialize_pem()).unwrap();
    Credentials::load(&ca, &cert, &host_key).unwrap()
}

/// Seconds of processor time of the threads that carry TLS, the older first.
fn seconds() -> Vec<f64> {
    let mut threads: Vec<(u32, f64)> = fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "tls"))
        .map(|path| {
            let nanoseconds: f64 = {
                let text = fs::read_to_string(path.join("schedstat")).unwrap();
                text.split_whitespace().next().unwrap().parse().unwrap()
            };
            (path.file_name().unwrap().to_str().unwrap().parse().unwrap(), nanoseconds / 1e9)
        })
        .collect();
    threads.sort_by_key(|(id, _)| *id);
    threads.into_iter().map(|(_, seconds)| seconds).collect()
}

fn main() {
    let dir = tempfile::tempdir().unwrap();
    let credentials = credentials(dir.path());
    for _ in 0..ROUNDS {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let far = listener.accept().unwrap().0;
        std::thread::scope(|scope| {
            let (opened, far_open) = std::sync::mpsc::channel();
            let credentials = &credentials;
            let receiver = scope.spawn(move || {
                let (socket, tunnel) = credentials.accept(far).unwrap();
                opened.send(()).unwrap();
                let (mut buf, mut got) = (vec![0; 256 << 10], 0);
                while got < BYTES {
                    got += (&socket).read(&mut buf).unwrap();
                }
                drop((socket, tunnel));
            });
            let (socket, tunnel) = credentials.connect(near, "127.0.0.1").unwrap();
            far_open.recv().unwrap();
            let (data, began) = (vec![7; 256 << 10], Instant::now());
            for _ in 0..BYTES / data.len() {
                (&socket).write_all(&data).unwrap();
            }
            let used = seconds();
            let wall = began.elapsed().as_secs_f64();
            let gb = BYTES as f64 / 1e9;
            println!(
                "{:.2} GB/s; GB a second of the threads: {:.2?}",
                gb / wall,
                used.iter().map(|s| gb / s).collect::<Vec<_>>()
            );
            receiver.join().unwrap();
            drop((socket, tunnel));
        });
    }
}
