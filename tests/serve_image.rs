//! Images of a library served through map and overlay, driven by libblkio and checked against flat byte arrays.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
use common::*;
use std::os::unix::fs::FileExt;
use std::path::Path;

const BLOCK: usize = 4096;

/// A small generator of its own, so that every run sees the same images.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

fn content(n: u64) -> Vec<u8> {
    let mut rng = Rng(n.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    (0..BLOCK / 8).flat_map(|_| rng.next().to_le_bytes()).collect()
}

/// An image of runs taken from a common pool of contents: shared, duplicated, zero and its own blocks.
fn image(seed: u64, blocks: usize, tail: usize) -> Vec<u8> {
    let mut rng = Rng(seed);
    let mut out = Vec::new();
    while out.len() < blocks * BLOCK {
        let run = 1 + rng.below(12);
        let start = rng.below(300) as u64;
        let kind = rng.below(10);
        for i in 0..run as u64 {
            match kind {
                0..=1 => out.extend([0u8; BLOCK]),
                2 => out.extend(content(seed * 1000 + rng.next() % 1000)),
                _ => out.extend(content(start + i)),
            }
        }
    }
    out.truncate(blocks * BLOCK);
    out.extend(content(seed).into_iter().take(tail));
    out
}

/// Three images; the second added as qcow2, the third with a partial last block.
fn family(bench: &Bench) -> Vec<(&'static str, Vec<u8>)> {
    let images = vec![("one", image(1, 700, 0)), ("two", image(2, 900, 0)), ("three", image(3, 500, 1536))];
    let mut add = Vec::new();
    for (name, bytes) in &images {
        let mut file = bench.file(&format!("{name}.raw"), bytes);
        if *name == "two" {
            let qcow2 = bench.path("two.qcow2-source");
            tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&file), text(&qcow2)]);
            file = qcow2;
        }
        add.push(format!("{name}={}", text(&file)));
    }
    bench.add(&add);
    images
}

#[test]
fn every_byte_of_every_image() {
    let bench = Bench::with_library();
    for (name, bytes) in family(&bench) {
        let server = bench.serve(&["--image", name, "--read-only"]);
        let mut client = Client::connect(&server.socket, 1, true);
        assert_eq!(client.capacity(), bytes.len() as u64);
        for piece in [512, 4096, 24 << 10, 1 << 20] {
            client.read_all(piece, |offset, got| {
                assert!(got == &bytes[offset as usize..][..got.len()], "{name} at {offset} by {piece}");
            });
        }
    }
}

/// Pages of a file in the page cache, by `fincore` (util-linux, mincore(2)).
fn cached_pages(path: &Path) -> usize {
    tool("fincore", &["--bytes", "--noheadings", "--output", "PAGES", text(path)]).trim().parse().unwrap()
}

fn drop_cache(path: &Path) {
    let file = std::fs::File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[test]
fn the_page_cache_holds_each_content_once() {
    let bench = Bench::with_library();
    let images = family(&bench);
    let stats: serde_json::Value =
        serde_json::from_str(&ok(&["--library", text(&bench.library()), "stats", "--json"])).unwrap();
    let unique = stats["unique_blocks"].as_u64().unwrap() as usize;
    let shown: serde_json::Value =
        serde_json::from_str(&ok(&["--library", text(&bench.library()), "image", "list", "--json"])).unwrap();
    let raws: Vec<_> = ["one.raw", "three.raw"]
        .iter()
        .map(|n| bench.path(n))
        .chain(std::fs::read_dir(bench.library().join("images")).unwrap().map(|e| e.unwrap().path()))
        .collect();
    assert_eq!(raws.len(), 3, "{shown}");
    raws.iter().for_each(|raw| drop_cache(raw));
    let before: usize = raws.iter().map(|raw| cached_pages(raw)).sum();
    assert!(before < unique / 20, "dropping the cache works here ({before} pages left)");
    for (name, bytes) in &images {
        let server = bench.serve(&["--image", name, "--read-only"]);
        let mut client = Client::connect(&server.socket, 1, true);
        client.read_all(64 << 10, |offset, got| assert!(got == &bytes[offset as usize..][..got.len()], "{name}"));
    }
    let pages: usize = raws.iter().map(|raw| cached_pages(raw)).sum();
    assert!(pages >= unique * 9 / 10, "{pages} pages for {unique} contents: the reads went through the cache");
    assert!(pages as f64 <= unique as f64 * 1.1, "{pages} pages for {unique} contents");
}

#[test]
fn writes_against_a_flat_model_with_kills_between() {
    let bench = Bench::with_library();
    let images = family(&bench);
    let (name, base) = &images[2];
    let overlay = bench.overlay(name);
    let mut model = base.clone();
    let mut rng = Rng(77);
    for round in 0..6 {
        let server = bench.serve_overlay(name, &overlay);
        let mut client = server.client();
        assert_eq!(client.capacity(), model.len() as u64);
        client.read_all(32 << 10, |offset, got| {
            assert!(got == &model[offset as usize..][..got.len()], "round {round} at {offset}")
        });
        for _ in 0..150 {
            let sectors = model.len() / 512;
            let first = rng.below(sectors);
            let most = if rng.below(4) == 0 { 200 } else { 12 };
            let count = 1 + rng.below(most).min(sectors - first - 1);
            let range = first * 512..(first + count) * 512;
            match rng.below(8) {
                0 => {
                    client.write_zeroes(range.start as u64, range.len() as u64, rng.below(2) == 0);
                    model[range].fill(0);
                }
                1 => client.flush(),
                2..=4 => assert!(client.read(range.start as u64, range.len()) == model[range.clone()], "round {round}"),
                _ => {
                    let fill = rng.next() as u8;
                    let bytes: Vec<u8> = (0..range.len()).map(|i| fill.wrapping_add((i / 512) as u8)).collect();
                    client.write(range.start as u64, &bytes);
                    model[range].copy_from_slice(&bytes);
                }
            }
        }
        if round % 2 == 0 {
            // While the VM runs: the disk is closed in order when it does not.
            server.kill();
            drop(client);
        } else {
            drop(client);
            let (status, err) = server.stop();
            assert!(status.success(), "{err}");
        }
        tool("qemu-img", &["check", text(&overlay)]);
    }
    // The last round ended in order, so plain QEMU tools see it all.
    let flat = bench.path("flat");
    tool("qemu-img", &["convert", "-O", "raw", text(&overlay), text(&flat)]);
    assert!(std::fs::read(&flat).unwrap() == model);
    let raw = std::fs::read(bench.path("three.raw")).unwrap();
    assert!(raw == *base, "the base is untouched");
}

/// Queues write neighbouring sectors of the same subclusters at the same time: fills (which read the base), overwrites and
/// write-zeroes must not lose each other's sectors.
#[test]
fn queues_write_neighbouring_sectors_side_by_side() {
    const QUEUES: usize = 4;
    const DEPTH: usize = 8;
    let bench = Bench::with_library();
    let images = family(&bench);
    let (name, base) = &images[0];
    let overlay = bench.overlay(name);
    let server = bench.serve_overlay(name, &overlay);
    let mut client = Client::connect(&server.socket, QUEUES as i32, false);
    let mut model = base.clone();
    let mut rng = Rng(4711);
    for round in 0..120 {
        // A window of 64 KiB; queue q writes those of its sectors that are q modulo 4, each once a round.
        let window = rng.below(model.len() / 65536) * 65536;
        for q in 0..QUEUES {
            for slot in 0..DEPTH {
                let sector = q + QUEUES * ((slot * 5 + round) % 32);
                let at = (q * DEPTH + slot) * 512;
                let fill = rng.next() as u8;
                client.memory(at, 512).fill(fill);
                let offset = window + sector * 512;
                client.submit_write(q, offset as u64, at, 512, slot);
                model[offset..offset + 512].fill(fill);
            }
        }
        // Hands the batches of all queues over before waiting for any.
        for q in 0..QUEUES {
            client.kick(q);
        }
        for q in 0..QUEUES {
            for (slot, ret) in client.wait(q, DEPTH) {
                assert_eq!(ret, 0, "round {round} queue {q} slot {slot}");
            }
        }
        if round % 10 == 0 {
            client.flush();
        }
        let got = client.read(window as u64, 65536);
        assert!(got == model[window..window + 65536], "round {round}");
    }
    client.read_all(64 << 10, |offset, got| assert!(got == &model[offset as usize..][..got.len()], "at {offset}"));
}

/// The colliding prefixes of the SHAttered PDFs: 320 bytes each, then any common bytes.
fn shattered() -> (Vec<u8>, Vec<u8>) {
    let read = |n: u32| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/shattered-{n}.prefix"));
        let mut block = std::fs::read(path).unwrap();
        assert_eq!(block.len(), 320);
        block.resize(BLOCK, 0x42);
        block
    };
    (read(1), read(2))
}

#[test]
fn blocks_that_share_a_sha1_but_not_their_bytes() {
    use sha1::{Digest, Sha1};
    let (a, b) = shattered();
    assert_eq!(Sha1::digest(&a), Sha1::digest(&b));
    assert_ne!(a, b);
    let bench = Bench::with_library();
    let images = [
        ("x", [a.clone(), content(5)].concat()),
        ("y", [content(5), b.clone()].concat()),
        ("z", [b.clone(), a.clone(), b.clone()].concat()),
    ];
    let add: Vec<String> =
        images.iter().map(|(n, bytes)| format!("{n}={}", text(&bench.file(&format!("{n}.raw"), bytes)))).collect();
    bench.add(&add);
    for (name, bytes) in &images {
        let server = bench.serve(&["--image", name, "--read-only"]);
        let mut client = Client::connect(&server.socket, 1, true);
        assert!(client.read(0, bytes.len()) == *bytes, "{name}");
    }
}

#[test]
fn what_does_not_belong_together_is_refused() {
    let bench = Bench::with_library();
    family(&bench);
    let library = bench.library();
    let overlay = bench.overlay("one");
    let socket = bench.path("sock");
    let state = bench.path("state");
    let serve = |image: &str, rest: &[&str]| {
        let mut args = vec![
            "--library",
            text(&library),
            "serve",
            "--socket-path",
            text(&socket),
            "--state-dir",
            text(&state),
            "--image",
            image,
        ];
        args.extend(rest);
        fails(&args)
    };
    let line = serve("two", &["--overlay", text(&overlay)]);
    assert!(line.contains("one.qcow2"), "an overlay of another image: {line}");
    assert!(serve("nosuch", &["--read-only"]).contains("nosuch"));
    assert!(serve("one", &[]).contains("--overlay"));
    let line = fails(&[
        "serve",
        "--library",
        text(&library),
        "--blk-file",
        text(&bench.path("one.raw")),
        "--socket-path",
        text(&socket),
    ]);
    assert!(line.contains("image one"), "{line}");
    let line = fails(&["serve", "--blk-file", text(&bench.path("one.raw")), "--socket-path", text(&socket)]);
    assert!(line.contains("read-only"), "{line}");

    // A map that is cut, flipped, swapped or gone.
    let map = library.join("maps/three.map");
    let good = std::fs::read(&map).unwrap();
    std::fs::write(&map, &good[..good.len() - 1]).unwrap();
    assert!(serve("three", &["--read-only"]).contains("three.map"));
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 4;
    std::fs::write(&map, &flipped).unwrap();
    assert!(serve("three", &["--read-only"]).contains("three.map"));
    std::fs::copy(library.join("maps/two.map"), &map).unwrap();
    assert!(serve("three", &["--read-only"]).contains("another image"));
    std::fs::remove_file(&map).unwrap();
    assert!(serve("three", &["--read-only"]).contains("three.map"));
    std::fs::write(&map, &good).unwrap();

    // An image that changed behind the library's back, or vanished; "three" points into "one".
    let raw = bench.path("one.raw");
    let file = std::fs::File::options().write(true).open(&raw).unwrap();
    file.write_all_at(&[1], 100).unwrap();
    let line = serve("three", &["--read-only"]);
    assert!(line.contains("one.raw") && line.contains("image verify one"), "{line}");
    file.set_len(4096).unwrap();
    assert!(serve("three", &["--read-only"]).contains("one.raw"));
    std::fs::remove_file(&raw).unwrap();
    assert!(serve("three", &["--read-only"]).contains("one.raw"));
}

#[test]
fn two_servers_on_one_overlay_are_refused() {
    let bench = Bench::with_library();
    family(&bench);
    let overlay = bench.overlay("one");
    let server = bench.serve_overlay("one", &overlay);
    let mut client = server.client();
    client.write(0, &[3; 512]);
    let line = fails(&[
        "--library",
        text(&bench.library()),
        "serve",
        "--socket-path",
        text(&bench.path("other")),
        "--state-dir",
        text(&bench.path("state")),
        "--image",
        "one",
        "--overlay",
        text(&overlay),
    ]);
    assert!(line.contains("one.qcow2"), "{line}");
    assert_eq!(client.read(0, 512), [3; 512]);
}

#[test]
fn the_trace_names_canonical_blocks_once() {
    let bench = Bench::with_library();
    let images = family(&bench);
    let trace = bench.path("trace");
    for (name, bytes) in &images {
        let server = bench.serve(&["--image", name, "--read-only", "--record", text(&trace)]);
        let mut client = Client::connect(&server.socket, 1, true);
        client.read_all(64 << 10, |_, _| {});
        drop(client);
        let (status, err) = server.stop();
        assert!(status.success(), "{err}");
        let stat: serde_json::Value = serde_json::from_str(&ok(&["trace", "stat", text(&trace), "--json"])).unwrap();
        let distinct: std::collections::HashSet<&[u8]> =
            bytes.chunks(BLOCK).filter(|b| b.iter().any(|&x| x != 0)).collect();
        assert_eq!(stat["distinct_blocks"].as_u64().unwrap(), distinct.len() as u64, "{name}: {stat}");
        assert_eq!(stat["dropped"].as_u64(), Some(0));
    }
}

/// A file system on which an overlay finds no room; unmounted whatever happens.
struct Small(std::path::PathBuf);

impl Small {
    fn mount(bench: &Bench) -> Small {
        let at = bench.path("small");
        std::fs::create_dir(&at).unwrap();
        tool("mount", &["-t", "tmpfs", "-o", "size=4m", "none", text(&at)]);
        Small(at)
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_below_the_overlay_is_an_error_for_the_guest_and_passes() {
    let bench = Bench::with_library();
    let base: Vec<u8> = (0..2048).flat_map(content).collect();
    bench.add(&[format!("one={}", text(&bench.file("one.raw", &base)))]);
    let small = Small::mount(&bench);
    let overlay = small.0.join("vm.qcow2");
    ok(&["--library", text(&bench.library()), "overlay", "create", text(&overlay), "--image", "one"]);
    let server = bench.serve_overlay("one", &overlay);
    let mut client = server.client();
    let mut model = base;
    let write = |client: &mut Client, model: &mut Vec<u8>, at: usize, fill: u8| {
        let piece = vec![fill; 64 << 10];
        let ret = client.try_write(at as u64, &piece);
        if ret == 0 {
            model[at..at + piece.len()].copy_from_slice(&piece);
        }
        ret
    };
    let mut failed = Vec::new();
    for at in (0..model.len()).step_by(64 << 10) {
        if write(&mut client, &mut model, at, 0x11) != 0 {
            failed.push(at);
        }
    }
    assert!(failed.len() > 50, "8 MiB do not fit in 4: {} writes failed", failed.len());
    // Every sector of what failed is wholly old or wholly new, and all that succeeded is new.
    client.read_all(64 << 10, |offset, got| {
        let torn = failed.contains(&(offset as usize));
        for (want, got) in model[offset as usize..].chunks(512).zip(got.chunks(512)) {
            assert!(got == want || torn && got == [0x11; 512], "at {offset}");
        }
    });
    client.flush();
    tool("mount", &["-o", "remount,size=64m", text(&small.0)]);
    for (i, &at) in failed.iter().enumerate() {
        assert_eq!(write(&mut client, &mut model, at, 0x20 + (i % 100) as u8), 0, "there is room again");
    }
    client.read_all(64 << 10, |offset, got| assert!(got == &model[offset as usize..][..got.len()], "at {offset}"));
    drop(client);
    let (status, err) = server.stop();
    assert!(status.success(), "{err}");
    tool("qemu-img", &["check", text(&overlay)]);
    let flat = bench.path("flat");
    tool("qemu-img", &["convert", "-O", "raw", text(&overlay), text(&flat)]);
    assert!(std::fs::read(&flat).unwrap() == model);
}
