//! `serve --metrics`: what Prometheus gets, and what others get who connect.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use common::*;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::Duration;

const RUN: usize = 64 << 10;
/// Longer than the server lets anybody take.
const PATIENCE: Duration = Duration::from_secs(20);

/// An address that nobody has.
fn free_address() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

/// Two images that share their first half, served with metrics at this address.
fn serve(bench: &Bench, address: &str) -> Server {
    let shared: Vec<u8> = (0..8 * RUN as u32 / 4).flat_map(|i| i.wrapping_mul(2654435761).to_le_bytes()).collect();
    let other: Vec<u8> = shared.iter().map(|byte| !byte).collect();
    let a = bench.file("a.raw", &shared);
    let b = bench.file("b.raw", &[shared, other].concat());
    bench.add(&[format!("a={}", text(&a)), format!("b={}", text(&b))]);
    bench.serve(&["--image", "b", "--read-only", "--metrics", address])
}

/// Sends all of it, and reads to the end.
fn ask(address: &str, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(request).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn metrics(address: &str) -> BTreeMap<String, f64> {
    let answer = ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains("Content-Type: text/plain; version=0.0.4"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    let mut families = BTreeMap::new();
    let mut out = BTreeMap::new();
    for line in body.lines() {
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').unwrap();
            assert!(families.insert(name.to_string(), kind.to_string()).is_none(), "{name} twice");
        } else if !line.starts_with("# HELP ") {
            let (name, value) = line.rsplit_once(' ').unwrap();
            let family = name.split('{').next().unwrap();
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|s| family.strip_suffix(s)).unwrap_or(family);
            assert!(families.contains_key(family) || families.get(base).is_some_and(|k| k == "histogram"), "{name}");
            assert!(name.contains("{image=\"b\""), "{name}");
            assert!(
                out.insert(name.replace("image=\"b\",", "").replace("{image=\"b\"}", ""), value.parse().unwrap())
                    .is_none()
            );
        }
    }
    out
}

#[test]
fn counters_tell_what_the_guest_did() {
    let (bench, address) = (Bench::with_library(), free_address());
    let server = serve(&bench, &address);
    assert_eq!(metrics(&address)["vmar_requests_total{type=\"reads\"}"], 0.0);
    let mut client = Client::connect(&server.socket, 1, true);
    (0..12).for_each(|run| drop(client.read((run * RUN) as u64, RUN)));
    let m = metrics(&address);
    assert_eq!(m["vmar_requests_total{type=\"reads\"}"], 12.0);
    assert_eq!(m["vmar_request_bytes_total{type=\"reads\"}"], 12.0 * RUN as f64);
    assert_eq!(m["vmar_read_bytes_total{source=\"other_images\"}"], 8.0 * RUN as f64);
    assert_eq!(m["vmar_read_bytes_total{source=\"own_image\"}"], 4.0 * RUN as f64);
    assert_eq!(m["vmar_request_errors_total{type=\"reads\"}"], 0.0);
    assert_eq!(m["vmar_requests_in_flight"], 0.0);
    let count = m["vmar_request_wait_seconds_count{type=\"reads\"}"];
    assert_eq!(m["vmar_request_wait_seconds_bucket{type=\"reads\",le=\"+Inf\"}"], count);
    drop(client);
    assert!(server.stop().0.success());
}

#[test]
fn whoever_says_something_else_gets_an_answer_or_nothing_and_holds_up_nobody() {
    let (bench, address) = (Bench::with_library(), free_address());
    let server = serve(&bench, &address);
    let status = |request: &[u8]| ask(&address, request).split(' ').nth(1).map(|code| code.parse::<u32>().unwrap());
    assert_eq!(status(b"GET / HTTP/1.1\r\n\r\n"), Some(404));
    assert_eq!(status(b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"), Some(405));
    assert_eq!(status(b"\x16\x03\x01\x02\x00\x01\x00\n\n"), Some(400));
    assert_eq!(status(&[b'a'; 9000]), Some(431));

    // One that says nothing, one that goes away, and one that never ends: the next is served after them.
    let silent = TcpStream::connect(&address).unwrap();
    drop(TcpStream::connect(&address).unwrap());
    let mut slow = TcpStream::connect(&address).unwrap();
    let loris = std::thread::spawn(move || {
        // Until the server has had enough.
        while slow.write_all(b"X").is_ok() {
            std::thread::sleep(Duration::from_millis(20));
        }
    });
    let mut client = Client::connect(&server.socket, 1, true);
    client.read(0, RUN);
    assert_eq!(metrics(&address)["vmar_requests_total{type=\"reads\"}"], 1.0);
    loris.join().unwrap();
    drop((silent, client));

    // A half-closed connection is no reason to wait.
    let mut half = TcpStream::connect(&address).unwrap();
    half.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    half.shutdown(Shutdown::Write).unwrap();
    let mut answer = Vec::new();
    half.read_to_end(&mut answer).unwrap();
    assert!(answer.starts_with(b"HTTP/1.1 200"));
    assert!(server.stop().0.success());
}

#[test]
fn a_unix_socket_is_for_its_owner() {
    let bench = Bench::with_library();
    let path = bench.path("metrics");
    let server = serve(&bench, text(&path));
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.contains("vmar_info{image=\"b\",version="), "{answer}");
    assert!(server.stop().0.success());
}

#[test]
fn an_address_that_cannot_be_had_is_an_error_at_the_start() {
    let bench = Bench::new();
    let file = bench.file("disk.raw", &[0; 8192]);
    let socket = bench.path("socket");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let serve = |address: &str| {
        fails(&["serve", "--blk-file", text(&file), "--socket-path", text(&socket), "--metrics", address])
    };
    let address = taken.local_addr().unwrap().to_string();
    let error = serve(&address);
    assert!(error.contains(&address) && error.contains("in use") && error.contains("another port"), "{error}");
    assert!(serve("nonsense").contains("ADDRESS:PORT"));
    assert!(!socket.exists());
}
