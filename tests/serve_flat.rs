//! `vmar serve --blk-file` driven by libblkio: the ring, the requests, the socket.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
use common::*;
use std::time::Duration;

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 512 * 31 + i) as u8).collect()
}

#[test]
fn reads_and_writes_reach_the_file() {
    let bench = Bench::new();
    let data = pattern(3 << 20);
    let file = bench.file("disk", &data);
    let server = bench.serve(&["--blk-file", text(&file)]);
    let mut client = server.client();
    assert_eq!(client.capacity(), 3 << 20);
    client.read_all(128 << 10, |offset, bytes| assert!(bytes == &data[offset as usize..][..bytes.len()]));
    client.write(512, &[7; 1024]);
    client.flush();
    client.write_zeroes(8192, 4096, true);
    client.write_zeroes(16384, 512, false);
    assert_eq!(client.read(0, 2048), [&data[..512], &[7; 1024], &data[1536..2048]].concat());
    drop(client);
    let (status, err) = server.stop();
    assert!(status.success(), "{err}");
    let mut want = data;
    want[512..1536].fill(7);
    want[8192..12288].fill(0);
    want[16384..16896].fill(0);
    assert!(std::fs::read(&file).unwrap() == want);
}

#[test]
fn a_new_connection_after_the_old_one_ended() {
    let bench = Bench::new();
    let data = pattern(1 << 20);
    let file = bench.file("disk", &data);
    let server = bench.serve(&["--blk-file", text(&file)]);
    for _ in 0..5 {
        let mut client = server.client();
        assert_eq!(client.read(4096, 4096), &data[4096..8192]);
    }
    assert!(server.stop().0.success());
}

#[test]
fn several_queues_side_by_side() {
    let bench = Bench::new();
    let data = pattern(4 << 20);
    let file = bench.file("disk", &data);
    let server = bench.serve(&["--blk-file", text(&file), "--read-only", "--num-queues", "4"]);
    let mut client = Client::connect(&server.socket, 4, true);
    for round in 0..50usize {
        for q in 0..4 {
            let offset = ((round * 4 + q) * 8192) % (4 << 20);
            client.submit_read(q, offset as u64, q * 8192, 8192, offset);
        }
        for q in 0..4 {
            let (offset, ret) = client.wait(q, 1)[0];
            assert_eq!(ret, 0);
            assert!(client.memory(q * 8192, 8192) == &data[offset..][..8192]);
        }
    }
}

#[test]
fn out_of_range_and_read_only_requests_fail_alone() {
    let bench = Bench::new();
    let file = bench.file("disk", &pattern(1 << 20));
    let server = bench.serve(&["--blk-file", text(&file), "--read-only"]);
    let mut client = Client::connect(&server.socket, 1, true);
    assert!(client.try_read(1 << 20, 512).is_err());
    assert!(client.try_read((1 << 20) - 512, 1024).is_err());
    assert!(client.try_read(!511, 512).is_err());
    assert!(client.try_write(0, &[1; 512]) < 0);
    assert_eq!(client.read(0, 512), &pattern(512)[..]);
}

#[test]
fn a_truncated_file_gives_errors_and_not_zeros() {
    let bench = Bench::new();
    let file = bench.file("disk", &pattern(1 << 20));
    let server = bench.serve(&["--blk-file", text(&file)]);
    let mut client = server.client();
    std::fs::File::options().write(true).open(&file).unwrap().set_len(4096).unwrap();
    assert!(client.try_read(8192, 4096).is_err());
    assert!(client.try_read(0, 8192).is_err());
    assert_eq!(client.read(0, 4096), &pattern(4096)[..]);
}

#[test]
fn sigterm_ends_it_with_a_client_connected() {
    let bench = Bench::new();
    let file = bench.file("disk", &pattern(1 << 20));
    let server = bench.serve(&["--blk-file", text(&file)]);
    let socket = server.socket.clone();
    let mut client = server.client();
    client.write(0, &[9; 4096]);
    let (status, err) = server.stop();
    assert!(status.success(), "{err}");
    assert!(!socket.exists(), "the socket file goes with the server");
    assert_eq!(&std::fs::read(&file).unwrap()[..4096], &[9; 4096]);
}

#[test]
fn fd_takes_a_listening_socket() {
    use std::os::fd::AsRawFd;
    use std::os::unix::process::CommandExt;
    let bench = Bench::new();
    let data = pattern(1 << 20);
    let file = bench.file("disk", &data);
    let path = bench.path("listening");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let raw = listener.as_raw_fd();
    let mut command = vmar(&["serve", "--blk-file", text(&file), "--fd", "9"]);
    // SAFETY: dup2 is async-signal-safe; descriptor 9 of the child is free by then.
    unsafe {
        command.pre_exec(move || if libc::dup2(raw, 9) == 9 { Ok(()) } else { Err(std::io::Error::last_os_error()) });
    }
    let server = Server::start(command, path);
    assert_eq!(server.client().read(0, 512), &data[..512]);
    assert!(server.stop().0.success());
}

#[test]
fn start_up_errors_are_one_line_and_quick() {
    let bench = Bench::new();
    let file = bench.file("disk", &pattern(1 << 20));
    let odd = bench.file("odd", &[1; 1000]);
    let empty = bench.file("empty", &[]);
    let socket = bench.path("sock");
    let (file, socket) = (text(&file), text(&socket));
    let start = std::time::Instant::now();
    assert!(fails(&["serve", "--blk-file", text(&odd), "--socket-path", socket]).contains("multiple of 512"));
    assert!(fails(&["serve", "--blk-file", text(&empty), "--socket-path", socket]).contains("multiple of 512"));
    assert!(fails(&["serve", "--blk-file", "/nonexistent", "--socket-path", socket]).contains("/nonexistent"));
    assert!(
        fails(&["serve", "--blk-file", bench.dir.path().to_str().unwrap(), "--socket-path", socket])
            .contains("neither")
    );
    assert!(fails(&["serve", "--blk-file", file]).contains("--socket-path"));
    assert!(fails(&["serve", "--socket-path", socket]).contains("--image"));
    assert!(fails(&["serve", "--image", "x", "--read-only", "--socket-path", socket]).contains("VMAR_LIBRARY"));
    assert!(fails(&["serve", "--blk-file", file, "--socket-path", &"x".repeat(120)]).contains("107"));
    let server = bench.serve(&["--blk-file", file]);
    assert!(fails(&["serve", "--blk-file", file, "--socket-path", socket]).contains("is in use by another process"));
    drop(server);
    let server = bench.serve(&["--blk-file", file, "--read-only"]);
    let taken = text(&server.socket);
    let both = ["serve", "--blk-file", file, "--read-only", "--socket-path", taken];
    assert!(fails(&both).contains("another server"));
    assert!(start.elapsed() < Duration::from_secs(8), "each within 5 s");
    assert_eq!(run(&["serve", "--blk-file", file, "--socket-path", "a", "--fd", "3"]).status.code(), Some(2));
    assert_eq!(run(&["serve", "--socket-path", "a"]).status.code(), Some(2));
}

#[test]
fn conventions_of_qemu() {
    let printed: serde_json::Value = serde_json::from_str(&ok(&["serve", "--print-capabilities"])).unwrap();
    assert_eq!(printed, serde_json::json!({"type": "block", "features": ["read-only", "blk-file"]}));
    for args in [&["serve", "--help"][..], &["--help"], &["library", "init", "--help"], &["image", "add", "--help"]] {
        assert!(run(args).status.success(), "{args:?}");
    }
}
