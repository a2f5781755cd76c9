//! Handing a disk from one server to another: the second is there before the first lets go, and never two of them write.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[allow(dead_code)]
#[path = "hostile/frontend.rs"]
mod frontend;

use common::*;
use frontend::*;
use std::os::fd::AsFd;
use std::path::PathBuf;

const CONFIG_WCE: u64 = 1 << 11;
const WRITEBACK: u32 = 32;

fn pattern() -> Vec<u8> {
    (0..4 << 20).map(|i: usize| (i / 512 * 31 + i) as u8).collect()
}

/// Both kinds of disks that are written: (a bench, what `vmar serve` is told).
fn disks() -> Vec<(Bench, Vec<String>)> {
    let overlay = Bench::with_library();
    let image = overlay.file("base.raw", &pattern());
    overlay.add(&[format!("base={}", text(&image))]);
    let path: PathBuf = overlay.overlay("base");
    let args = ["--image", "base", "--overlay", text(&path)].map(String::from).to_vec();
    let flat = Bench::new();
    let file = flat.file("disk", &pattern());
    let blk = vec!["--blk-file".to_string(), text(&file).to_string()];
    vec![(overlay, args), (flat, blk)]
}

fn serve(bench: &Bench, args: &[String], more: &[&str]) -> Server {
    let args: Vec<&str> = args.iter().map(String::as_str).chain(more.iter().copied()).collect();
    bench.serve(&args)
}

/// Starts the only ring, where it was if it had run; false when the server hangs up over it.
fn starts(f: &mut Frontend) -> bool {
    if f.rings.is_empty() {
        f.add_ring(0, 16);
    }
    let ring = &f.rings[0];
    let addr = [0, USER + ring.desc(), USER + ring.used_ring(), USER + ring.avail_ring(), 0];
    let base = u32::from(ring.avail);
    let (kick, call) = (ring.kick.try_clone().unwrap(), ring.call.try_clone().unwrap());
    f.set32(SET_VRING_NUM, 0, 16);
    f.set32(SET_VRING_BASE, 0, base);
    f.set(SET_VRING_ADDR, &addr);
    f.ok(SET_VRING_KICK, &bytes_of(&[0]), &[kick.as_fd()]);
    f.ok(SET_VRING_CALL, &bytes_of(&[0]), &[call.as_fd()]);
    f.ask(SET_VRING_ENABLE, &Frontend::body32(0, 1), &[]).is_ok_and(|answer| answer == 0)
}

#[test]
fn a_server_that_waits_takes_over_when_the_other_lets_go() {
    for (bench, args) in disks() {
        let first = serve(&bench, &args, &[]);
        let mut source = Frontend::connect(&first.socket, FEATURES, 1, 16);
        source.write(0, 8, 4096, 1);
        // It looks, and touches nothing.
        let second = serve(&bench, &args, &["--incoming", "--num-queues", "4"]);
        let mut waiting = Frontend::bare(&second.socket, FEATURES);
        assert_eq!(waiting.config(0, 8), (8192u64).to_le_bytes(), "the size is known before");
        assert!(!starts(&mut waiting), "two writers");
        source.write(0, 16, 4096, 2);
        assert_eq!(source.read(0, 8, 4096), [1; 4096]);
        // The source is stopped as QEMU does it, and still connected when the other starts.
        source.stop_ring(0);
        let mut f = Frontend::bare(&second.socket, FEATURES);
        assert!(starts(&mut f));
        assert_eq!(f.read(0, 8, 4096), [1; 4096]);
        assert_eq!(f.read(0, 16, 4096), [2; 4096], "not flushed by anybody");
        f.write(0, 24, 4096, 3);
        // The migration has failed after all: back again.
        f.stop_ring(0);
        assert!(starts(&mut source));
        assert_eq!(source.read(0, 24, 4096), [3; 4096]);
        drop(source);
        assert!(first.stop().0.success());
        // Nobody has it now, and the one that waits takes it with the next start.
        drop(f);
        let mut f = Frontend::connect(&second.socket, FEATURES, 1, 16);
        assert_eq!(f.read(0, 24, 4096), [3; 4096]);
        drop(f);
        assert!(second.stop().0.success());
    }
}

#[test]
fn a_server_that_does_not_wait_needs_the_disk_at_once() {
    for (bench, args) in disks() {
        let server = serve(&bench, &args, &[]);
        let socket = bench.path("other");
        let (state, library) = (bench.path("state"), bench.library());
        let mut all = vec!["serve", "--socket-path", text(&socket), "--state-dir", text(&state)];
        if library.exists() {
            all.extend(["--library", text(&library)]);
        }
        all.extend(args.iter().map(String::as_str));
        fails(&all);
        assert!(server.stop().0.success());
    }
}

/// The guest believes what it has set, whichever server it runs on.
#[test]
fn the_cache_mode_of_an_overlay_goes_with_it() {
    let (bench, args) = disks().remove(0);
    let first = serve(&bench, &args, &[]);
    let second = serve(&bench, &args, &["--incoming"]);
    let mut f = Frontend::connect(&first.socket, FEATURES | CONFIG_WCE, 1, 16);
    assert!(f.set_config(WRITEBACK, &[0]));
    f.stop_ring(0);
    let mut f2 = Frontend::connect(&second.socket, FEATURES | CONFIG_WCE, 1, 16);
    assert_eq!(f2.config(WRITEBACK, 1), [0]);
    let overlay = &args[3];
    let map = || tool("qemu-img", &["map", "-U", "--output=json", overlay]);
    let before = map();
    f2.write(0, 64, 4096, 9);
    assert_ne!(map(), before, "written through");
    second.kill();
    let third = serve(&bench, &args, &[]);
    let mut f3 = Frontend::connect(&third.socket, FEATURES | CONFIG_WCE, 1, 16);
    assert_eq!(f3.config(WRITEBACK, 1), [0], "also over a kill");
    assert_eq!(f3.read(0, 64, 4096), [9; 4096]);
}

/// What it asked the first server for, long ago, does not count when it comes back from another one.
#[test]
fn the_cache_mode_is_that_of_the_last_server() {
    let (bench, args) = disks().remove(0);
    let first = serve(&bench, &args, &[]);
    let second = serve(&bench, &args, &["--incoming"]);
    let mut f = Frontend::connect(&first.socket, FEATURES | CONFIG_WCE, 1, 16);
    assert!(f.set_config(WRITEBACK, &[1]));
    f.stop_ring(0);
    let mut f2 = Frontend::connect(&second.socket, FEATURES | CONFIG_WCE, 1, 16);
    assert!(f2.set_config(WRITEBACK, &[0]));
    f2.stop_ring(0);
    assert!(starts(&mut f));
    assert_eq!(f.config(WRITEBACK, 1), [0]);
}
