//! `--on-error`: what the guest gets when the host's disk is full or fails.

use crate::common::{Bench, Client, text};
use crate::support::{Loop, Mount, pattern};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const DISK: usize = 16 << 20;
const EIO: i32 = -libc::EIO;

/// A library with one image, and an overlay of it on a small disk.
fn small_disk(size: &str) -> (Bench, Mount, PathBuf) {
    let bench = Bench::with_library();
    let file = bench.file("one.raw", &pattern(1, DISK));
    bench.add(&[format!("one={}", text(&file))]);
    let mount = Mount::tmpfs(&bench, size);
    let overlay = mount.0.join("one.qcow2");
    crate::common::ok(&["--library", text(&bench.library()), "overlay", "create", text(&overlay), "--image", "one"]);
    (bench, mount, overlay)
}

/// True if queue `q` completes nothing for a while (several pauses between tries).
fn waits(client: &mut Client, q: usize) -> bool {
    let mut done: Vec<_> = vec![std::mem::MaybeUninit::uninit()];
    let until = Instant::now() + Duration::from_millis(700);
    while Instant::now() < until {
        let mut limit = Duration::from_millis(50);
        match client.queues[q].do_io(&mut done, 1, Some(&mut limit), None) {
            Ok(0) | Err(_) => {}
            Ok(_) => return false,
        }
    }
    true
}

fn write_from(client: &mut Client, offset: u64, at: usize, bytes: &[u8], id: usize) {
    client.memory(at, bytes.len()).copy_from_slice(bytes);
    client.submit_write(0, offset, at, bytes.len(), id);
}

#[test]
fn a_full_disk_is_reported_at_once_by_default() {
    let (bench, mount, overlay) = small_disk("8m");
    let server = bench.serve_overlay("one", &overlay);
    let mut client = server.client();
    mount.fill(64 << 10);
    assert_eq!(client.try_write(0, &pattern(2, 1 << 20)), EIO);
    assert!(is_full(&mount), "a part of the write is done");
    assert_eq!(client.try_write(8 << 20 | 512, &pattern(2, 512)), EIO);
    // What failed changed nothing: no sector of it was in the overlay before.
    assert!(client.read(0, 1 << 20) == pattern(1, 1 << 20));
    mount.free();
    client.write(0, &pattern(2, 1 << 20));
    client.flush();
    assert!(client.read(0, 1 << 20) == pattern(2, 1 << 20));
    drop(client);
    let (status, log) = server.stop();
    assert!(status.success(), "{log}");
    assert!(log.contains("No space left"), "{log}");
}

/// True when no page is left on the disk.
fn is_full(mount: &Mount) -> bool {
    rustix::fs::statvfs(&mount.0).unwrap().f_bavail == 0
}

#[test]
fn a_full_disk_that_is_given_room_goes_on() {
    let (bench, mount, overlay) = small_disk("8m");
    let server = bench.serve(&["--image", "one", "--overlay", text(&overlay), "--on-error", "retry"]);
    let mut client = Client::connect(&server.socket, 2, false);
    client.write(12 << 20, &pattern(5, 4096));
    mount.fill(300 << 10);
    // The first is partly done when the room ends; the second needs base data, which a thread of its own reads; the third
    // is a write-zeroes that has to write.
    let (big, small) = (pattern(2, 1 << 20), pattern(3, 512));
    write_from(&mut client, 0, 0, &big, 1);
    client.kick(0);
    assert!(waits(&mut client, 0));
    assert!(is_full(&mount), "a part of the write is done");
    write_from(&mut client, (4 << 20) + 512, 2 << 20, &small, 2);
    client.queues[0].write_zeroes((6 << 20) + 512, 512, 3, blkio::ReqFlags::NO_UNMAP);
    client.kick(0);
    assert!(waits(&mut client, 0));
    // Nothing else is held up: reads, overwrites of what has its place, flushes. (On a queue of their own: libblkio has no
    // inflight region, so completions of a queue keep their order.)
    client.submit_read(1, 12 << 20, 4 << 20, 4096, 4);
    assert_eq!(client.wait(1, 1), [(4, 0)]);
    assert!(client.memory(4 << 20, 4096) == pattern(5, 4096));
    client.memory(5 << 20, 4096).copy_from_slice(&pattern(6, 4096));
    client.submit_write(1, 12 << 20, 5 << 20, 4096, 5);
    assert_eq!(client.wait(1, 1), [(5, 0)]);
    client.queues[1].flush(6, blkio::ReqFlags::empty());
    assert_eq!(client.wait(1, 1), [(6, 0)]);
    assert!(waits(&mut client, 0));

    mount.free();
    let mut done = client.wait(0, 3);
    done.sort_unstable();
    assert_eq!(done, [(1, 0), (2, 0), (3, 0)]);
    client.flush();
    let mut expected = pattern(1, DISK);
    expected[..1 << 20].copy_from_slice(&big);
    expected[(4 << 20) + 512..][..512].copy_from_slice(&small);
    expected[(6 << 20) + 512..][..512].fill(0);
    expected[12 << 20..][..4096].copy_from_slice(&pattern(6, 4096));
    client.read_all(1 << 20, |offset, got| assert!(got == &expected[offset as usize..][..got.len()], "at {offset}"));
    drop(client);
    let (status, log) = server.stop();
    assert!(status.success(), "{log}");
    assert_eq!(log.matches("it is tried again until it works").count(), 1, "{log}");
    assert_eq!(log.matches("no request waits for another try any more").count(), 1, "{log}");
}

/// A disk that gives I/O errors (a loop device whose file is cut off), read through io_uring, comes back.
#[test]
fn a_read_that_fails_is_tried_again() {
    let bench = Bench::new();
    let data = pattern(7, 4 << 20);
    let file = bench.file("disk", &data);
    let device = Loop::new(&file);
    for (policy, result) in [("report", Some(EIO)), ("retry", None)] {
        let server = bench.serve(&["--blk-file", text(&device.0), "--on-error", policy]);
        let mut client = Client::connect(&server.socket, 2, false);
        let handle = std::fs::File::options().write(true).open(&file).unwrap();
        handle.set_len(1 << 20).unwrap();
        crate::common::tool("blockdev", &["--flushbufs", text(&device.0)]);
        client.submit_read(0, 2 << 20, 0, 64 << 10, 1);
        client.kick(0);
        match result {
            Some(error) => assert_eq!(client.wait(0, 1), [(1, error)]),
            None => {
                assert!(waits(&mut client, 0));
                client.submit_read(1, 0, 1 << 20, 4096, 2);
                assert_eq!(client.wait(1, 1), [(2, 0)], "other reads are served");
            }
        }
        std::os::unix::fs::FileExt::write_all_at(&handle, &data, 0).unwrap();
        if result.is_none() {
            assert_eq!(client.wait(0, 1), [(1, 0)]);
            assert!(client.memory(0, 64 << 10) == &data[2 << 20..][..64 << 10]);
        }
        drop(client);
        assert!(server.stop().0.success());
    }
}
