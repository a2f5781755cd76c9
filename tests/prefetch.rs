//! The prefetch of recorded reads (`serve --prefetch`): the right blocks come into the page cache, and no others.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "control/hanging.rs"]
#[allow(dead_code)]
mod hanging;

use common::*;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmar::redirect::trace::{Record, TraceHeader, TraceReader, TraceWriter};

const BLOCK: usize = 4096;
/// Bytes of the runs that images are made of, and of the guest's requests.
const RUN: usize = 64 << 10;
/// Runs that the images share, and that each has besides.
const SHARED: usize = 32;
const OWN: usize = 16;

fn random(mut seed: u64, len: usize) -> Vec<u8> {
    let mut next = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 32) as u32
    };
    (0..len / 4).flat_map(|_| next().to_le_bytes()).collect()
}

/// The place in image `a` of a run of image `b`.
fn place(run: usize) -> usize {
    run * 13 % SHARED
}

/// Two images: `a` is the shared runs and its own, `b` the shared ones in another order and its own.
struct Family {
    bench: Bench,
    a: Vec<u8>,
    b: Vec<u8>,
}

impl Family {
    fn new(policy: &[&str]) -> Family {
        let bench = Bench::new();
        ok(&[&["library", "init", text(&bench.library()), "--policy"], policy].concat());
        let shared = random(1, SHARED * RUN);
        let a = [shared.clone(), random(2, OWN * RUN)].concat();
        let b = (0..SHARED).flat_map(|run| shared[place(run) * RUN..][..RUN].to_vec());
        let b = b.chain(random(3, OWN * RUN)).collect::<Vec<_>>();
        bench.add(&[("a", &a), ("b", &b)].map(|(name, bytes)| {
            let file = bench.file(&format!("{name}.raw"), bytes);
            format!("{name}={}", text(&file))
        }));
        Family { bench, a, b }
    }

    fn raw(&self, name: &str) -> PathBuf {
        self.bench.path(&format!("{name}.raw"))
    }

    /// The trace of a guest that reads these runs of an image.
    fn record(&self, image: &str, runs: &[usize]) -> PathBuf {
        let trace = self.bench.path(&format!("{image}.trace"));
        let server = self.bench.serve(&["--image", image, "--read-only", "--readahead", "0", "--record", text(&trace)]);
        let mut client = Client::connect(&server.socket, 1, true);
        for run in runs {
            client.read((run * RUN) as u64, RUN);
        }
        drop(client);
        assert!(server.stop().0.success());
        trace
    }

    fn drop_caches(&self) {
        for name in ["a", "b"] {
            let file = File::open(self.raw(name)).unwrap();
            file.sync_all().unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            assert_eq!(self.cached(name), [0; 0], "dropping the cache works here");
        }
    }

    /// The runs of an image of which anything is in the page cache; each is there as a whole, but for single pages that the
    /// kernel may have taken again.
    fn cached(&self, name: &str) -> Vec<usize> {
        let pages = resident(&self.raw(name));
        let there = pages.chunks(RUN / BLOCK).map(|run| run.iter().filter(|page| **page).count()).enumerate();
        let some: Vec<(usize, usize)> = there.filter(|(_, pages)| *pages > 0).collect();
        assert!(some.iter().all(|(_, pages)| *pages > RUN / BLOCK / 2), "{some:?}");
        some.into_iter().map(|(run, _)| run).collect()
    }

    /// Serves an image from cold caches with these traces until the prefetch has ended; gives its last word. The image is
    /// then read as a whole, and compared.
    fn prefetch(&self, image: &str, more: &[&str], look: impl FnOnce(&serde_json::Value)) {
        self.drop_caches();
        let server = self.serve(image, more);
        let end = wait_for_end(&self.control());
        look(&end);
        let mut client = Client::connect(&server.socket, 1, true);
        let bytes = if image == "a" { &self.a } else { &self.b };
        client.read_all(RUN, |at, got| assert!(got == &bytes[at as usize..][..got.len()], "at {at}"));
        drop(client);
        let (status, said) = server.stop();
        assert!(status.success() && said.is_empty(), "{said}");
    }

    fn control(&self) -> PathBuf {
        self.bench.path("control")
    }

    fn serve(&self, image: &str, more: &[&str]) -> Server {
        let control = self.control();
        self.bench.serve(&[&["--image", image, "--read-only", "--control", text(&control)], more].concat())
    }
}

/// Which pages of a file are in the page cache, by mincore(2).
fn resident(path: &Path) -> Vec<bool> {
    let file = File::open(path).unwrap();
    // SAFETY: nobody changes the file, and its bytes are not looked at.
    let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    let mut pages = vec![0u8; map.len().div_ceil(BLOCK)];
    // SAFETY: the range is mapped, and there is a byte for each of its pages.
    assert_eq!(unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), pages.as_mut_ptr()) }, 0);
    pages.iter().map(|page| page & 1 == 1).collect()
}

fn progress(control: &Path) -> serde_json::Value {
    let statistics = ok(&["control", text(control), "--json", "statistics"]);
    serde_json::from_str::<serde_json::Value>(&statistics).unwrap()["prefetch"].clone()
}

fn wait_for_end(control: &Path) -> serde_json::Value {
    let limit = Instant::now() + Duration::from_secs(20);
    loop {
        let now = progress(control);
        if now["state"] != "running" {
            return now;
        }
        assert!(Instant::now() < limit, "{now}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The places in `a` of some shared runs of `b`, ascending.
fn places(runs: &[usize]) -> Vec<usize> {
    let mut places: Vec<usize> = runs.iter().map(|run| place(*run)).collect();
    places.sort_unstable();
    places
}

#[test]
fn what_was_recorded_is_cached_and_nothing_else() {
    let family = Family::new(&["paper"]);
    let shared = [3, 4, 9, 20];
    let trace = family.record("b", &[&shared[..], &[SHARED + 2, SHARED + 3, 4]].concat());
    family.prefetch("b", &["--prefetch", text(&trace)], |end| {
        assert_eq!(family.cached("a"), places(&shared));
        assert_eq!(family.cached("b"), [SHARED + 2, SHARED + 3]);
        let bytes = 6 * RUN as u64;
        assert_eq!(*end, serde_json::json!({"state": "done", "planned": bytes, "read": bytes, "cached": 0, "left": 0}));
    });
    // Twice the same, and what is there already, costs nothing.
    File::open(family.raw("a")).unwrap().read_exact_at(&mut vec![0; SHARED * RUN], 0).unwrap();
    let server = family.serve("b", &["--prefetch", text(&trace), "--prefetch", text(&trace)]);
    let end = wait_for_end(&family.control());
    assert_eq!((end["planned"].clone(), end["read"].clone()), ((6 * RUN).into(), 0.into()), "{end}");
    assert!(server.stop().0.success());
}

#[test]
fn a_trace_of_another_image_serves_as_far_as_it_is_shared() {
    let family = Family::new(&["paper"]);
    let trace = family.record("a", &[7, 1, SHARED + 5, 30, SHARED + 6]);
    family.prefetch("b", &["--prefetch", text(&trace)], |end| {
        assert_eq!(family.cached("a"), [1, 7, 30], "not what only a holds");
        assert_eq!(family.cached("b"), [0; 0]);
        assert_eq!((end["state"].as_str(), end["planned"].clone()), (Some("done"), (3 * RUN).into()));
    });
}

#[test]
fn the_policy_may_have_changed_since() {
    // Runs that never are long enough stay in the image: all is recorded where each image has it.
    let family = Family::new(&["bridge", "--min-run", "4294967295"]);
    let trace = family.record("b", &[2, 3, 17, SHARED + 1]);
    family.prefetch("b", &["--prefetch", text(&trace)], |_| {
        assert_eq!((family.cached("a"), family.cached("b")), (vec![], vec![2, 3, 17, SHARED + 1]));
    });
    ok(&["--library", text(&family.bench.library()), "library", "remap", "--policy", "paper"]);
    family.prefetch("b", &["--prefetch", text(&trace)], |_| {
        assert_eq!((family.cached("a"), family.cached("b")), (places(&[2, 3, 17]), vec![SHARED + 1]));
    });
    // By the map that b has now, what it read from itself is known for what a holds.
    family.prefetch("a", &["--prefetch", text(&trace)], |_| {
        assert_eq!((family.cached("a"), family.cached("b")), (places(&[2, 3, 17]), vec![]));
    });
}

#[test]
fn the_limit_is_kept() {
    let family = Family::new(&["paper"]);
    let trace = family.record("a", &(0..SHARED + OWN).collect::<Vec<_>>());
    family.prefetch("a", &["--prefetch", text(&trace), "--prefetch-limit", "512K"], |end| {
        assert_eq!(family.cached("a"), [0, 1, 2, 3, 4, 5, 6, 7], "the first ones");
        let all = ((SHARED + OWN) * RUN) as u64;
        let want = serde_json::json!(
            {"state": "limit", "planned": all, "read": 512 << 10, "cached": 0, "left": all - (512 << 10)});
        assert_eq!(*end, want);
    });
    family.prefetch("a", &["--prefetch", text(&trace), "--prefetch-limit", "0"], |end| {
        assert_eq!((family.cached("a"), end["state"].as_str()), (vec![], Some("limit")));
    });
}

#[test]
fn what_is_no_trace_of_this_library_is_refused_in_one_line() {
    let family = Family::new(&["paper"]);
    let trace = family.record("a", &[1, 2, 3]);
    let library = family.bench.library();
    let socket = family.bench.path("socket");
    let refused = |file: &Path| {
        let args =
            ["--library", text(&library), "serve", "--image", "a", "--read-only", "--socket-path", text(&socket)];
        let error = fails(&[&args[..], &["--prefetch", text(file)]].concat());
        assert!(error.contains(text(file)), "{error}");
        error
    };
    assert!(refused(&family.bench.path("none")).contains("No such file"));
    assert!(refused(family.bench.dir.path()).contains("no regular file"));
    let bytes = std::fs::read(&trace).unwrap();
    assert!(refused(&family.bench.file("cut", &bytes[..50])).contains("cut off inside its header"));
    assert!(refused(&family.bench.file("garbage", &random(9, 4096))).contains("no trace"));
    let mut flipped = bytes.clone();
    flipped[96 + 16] ^= 1;
    assert!(refused(&family.bench.file("flipped", &flipped)).contains("checksum"));
    let other = Family::new(&["paper"]);
    assert!(refused(&other.record("a", &[1])).contains("another library"));
    assert!(!socket.exists());
    let error = fails(&["serve", "--socket-path", "s", "--blk-file", "x", "--prefetch", text(&trace)]);
    assert!(error.contains("--blk-file"), "{error}");

    // One whose server was killed is good for what it has.
    let cut = family.bench.file("killed", &bytes[..96 + 2 * 24 + 5]);
    family.prefetch("a", &["--prefetch", text(&cut)], |_| assert_eq!(family.cached("a"), [1, 2]));
}

/// Writes a trace with the header of `like` and these records: {image, block, count}.
fn forge(like: &Path, to: &Path, change: impl FnOnce(&mut TraceHeader), records: &[(u32, u32, u32)]) {
    let mut header = *TraceReader::new(File::open(like).unwrap(), like).unwrap().header();
    change(&mut header);
    let mut writer = TraceWriter::new(File::create(to).unwrap(), &header).unwrap();
    for (image, block, count) in records {
        let record = Record { time_us: 0, request: 0, image: *image, block: *block, count: *count };
        writer.record(&record).unwrap();
    }
    writer.finish(0).unwrap();
}

#[test]
fn images_that_have_changed_since_are_left_out_with_a_warning() {
    let family = Family::new(&["paper"]);
    let trace = family.record("b", &[0]);
    let forged = family.bench.path("forged");
    let blocks = (RUN / BLOCK) as u32;
    // Image 0 is a, 1 is b, 7 is none; and no image is as long as the last one says.
    let own = SHARED as u32 * blocks;
    let records =
        [(7, 0, blocks), (1, own, blocks), (0, 2 * blocks, blocks), (0, u32::MAX, 1), (0, 1 << 20, u32::MAX >> 1)];
    let serve = |change: fn(&mut TraceHeader)| {
        forge(&trace, &forged, change, &records);
        family.drop_caches();
        let server = family.serve("b", &["--prefetch", text(&forged)]);
        wait_for_end(&family.control());
        let found = (family.cached("a"), family.cached("b"));
        let (status, said) = server.stop();
        assert!(status.success());
        assert_eq!(said.lines().count(), 1, "{said}");
        assert!(said.contains(text(&forged)) && said.contains("that the library has no more"), "{said}");
        found
    };
    assert_eq!(serve(|_| ()), (vec![2], vec![SHARED]));
    assert_eq!(serve(|header| header.digest[3] ^= 1), (vec![2], vec![]), "b had another content then");
    assert_eq!(serve(|header| header.generation += 1), (vec![2], vec![]));
}

#[test]
fn another_map_in_the_middle_takes_the_prefetch_along() {
    let family = Family::new(&["bridge", "--min-run", "4294967295"]);
    let trace = family.record("b", &(0..SHARED + OWN).collect::<Vec<_>>());
    family.drop_caches();
    let server = family.serve("b", &["--prefetch", text(&trace)]);
    // Tells the server, which may be anywhere in its prefetch.
    ok(&["--library", text(&family.bench.library()), "library", "remap", "--policy", "paper"]);
    wait_for_end(&family.control());
    let mut client = Client::connect(&server.socket, 1, true);
    client.read_all(RUN, |at, got| assert!(got == &family.b[at as usize..][..got.len()], "at {at}"));
    drop(client);
    assert!(server.stop().0.success());
}

#[test]
fn a_stop_and_a_drain_end_it() {
    let family = Family::new(&["paper"]);
    let trace = family.record("b", &(0..SHARED + OWN).collect::<Vec<_>>());
    for _ in 0..5 {
        family.drop_caches();
        let server = family.serve("b", &["--prefetch", text(&trace)]);
        assert!(server.stop().0.success());
    }
    family.drop_caches();
    let server = family.serve("b", &["--prefetch", text(&trace)]);
    ok(&["control", text(&family.control()), "drain"]);
    let end = wait_for_end(&family.control());
    assert!(["stopped", "done"].contains(&end["state"].as_str().unwrap()), "{end}");
    ok(&["control", text(&family.control()), "resume"]);
    let mut client = Client::connect(&server.socket, 1, true);
    client.read_all(RUN, |at, got| assert!(got == &family.b[at as usize..][..got.len()], "at {at}"));
    drop(client);
    assert!(server.stop().0.success());
}

#[test]
fn a_disk_that_hangs_does_not_hold_up_the_stop() {
    let bench = Bench::with_library();
    let image = hanging::Hanging::new(&bench.path("image"), random(5, 32 * RUN));
    bench.add(&[format!("a={}", text(&image.path))]);
    let trace = bench.path("trace");
    let server = bench.serve(&["--image", "a", "--read-only", "--record", text(&trace)]);
    let mut client = Client::connect(&server.socket, 1, true);
    (0..32).for_each(|run| drop(client.read((run * RUN) as u64, RUN)));
    drop(client);
    assert!(server.stop().0.success());

    let file = File::open(&image.path).unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    assert!(resident(&image.path).iter().all(|page| !page));
    let control = bench.path("control");
    image.hold_reads();
    let server = bench.serve(&["--image", "a", "--read-only", "--prefetch", text(&trace), "--control", text(&control)]);
    image.wait_for_hang();
    let now = progress(&control);
    assert_eq!((now["state"].as_str(), now["read"].clone()), (Some("running"), 0.into()), "{now}");
    assert!(server.stop().0.success(), "it is no request of the guest that hangs");
    image.release();
}
