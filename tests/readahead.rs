//! Readahead along the map: what a sequential guest reads next is fetched from where it is, and nothing else is.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
use common::*;
use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
/// Bytes of the runs that the images share, and of the guest's requests.
const RUN: usize = 64 << 10;
const RUNS: usize = 128;

/// The place in image `a` of a run of image `b`: far from that of the one before.
fn place(run: usize) -> usize {
    run * 37 % RUNS
}

fn image_a() -> Vec<u8> {
    let mut seed = 1u64;
    let mut next = || {
        seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (seed >> 32) as u32
    };
    (0..RUNS * RUN / 4).flat_map(|_| next().to_le_bytes()).collect()
}

fn drop_cache(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// For each run of the file how many of its pages are in the page cache, by mincore(2).
fn cached(path: &Path) -> Vec<usize> {
    let file = File::open(path).unwrap();
    // SAFETY: nobody changes the file, and its bytes are not looked at.
    let map = unsafe { memmap2::Mmap::map(&file) }.unwrap();
    let mut pages = vec![0u8; map.len() / BLOCK];
    // SAFETY: the range is mapped, and there is a byte for each of its pages.
    assert_eq!(unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), pages.as_mut_ptr()) }, 0);
    pages.chunks(RUN / BLOCK).map(|run| run.iter().filter(|page| **page & 1 == 1).count()).collect()
}

/// Reads the first `reads` runs of `b` from the disk, and gives which runs of `b` are cached then, in `a`.
fn runs_cached_after(bench: &Bench, b: &[u8], reads: usize, args: &[&str], want: usize) -> Vec<usize> {
    let raws = [bench.path("a.raw"), bench.path("b.raw")];
    raws.iter().for_each(|raw| drop_cache(raw));
    assert!(raws.iter().all(|raw| cached(raw).iter().all(|pages| *pages == 0)), "dropping the cache works here");
    let server = bench.serve(&[&["--image", "b", "--read-only"], args].concat());
    let mut client = Client::connect(&server.socket, 1, true);
    for run in 0..reads {
        assert!(client.read((run * RUN) as u64, RUN) == b[run * RUN..][..RUN], "run {run}");
    }
    let limit = Instant::now() + Duration::from_secs(20);
    let mut again = false;
    let found = loop {
        // The kernel may have taken single pages again.
        let in_a = cached(&raws[0]);
        let found: Vec<usize> = (0..RUNS).filter(|run| in_a[place(*run)] > RUN / BLOCK / 2).collect();
        let there = found.len() >= want;
        // Once more when all is there: more than that would come now.
        if there && again || Instant::now() > limit {
            break found;
        }
        again = there;
        std::thread::sleep(Duration::from_millis(30));
    };
    assert!(cached(&raws[1]).iter().all(|pages| *pages == 0), "b itself is never read");
    drop(client);
    assert!(server.stop().0.success());
    found
}

#[test]
fn what_is_read_in_sequence_is_fetched_along_the_map() {
    let bench = Bench::with_library();
    let a = image_a();
    let b: Vec<u8> = (0..RUNS).flat_map(|run| a[place(run) * RUN..][..RUN].to_vec()).collect();
    bench.add(&[("a", &a), ("b", &b)].map(|(name, bytes)| {
        let file = bench.file(&format!("{name}.raw"), bytes);
        format!("{name}={}", text(&file))
    }));
    let ahead = |reads, args: &[&str], want| runs_cached_after(&bench, &b, reads, args, want);
    let upto = |n: usize| (0..n).collect::<Vec<_>>();
    assert_eq!(ahead(15, &[], 15), upto(15), "less than a MiB is no sequence yet");
    assert_eq!(ahead(16, &[], 32), upto(32), "after a MiB as much again");
    assert_eq!(ahead(16, &["--readahead", "128K"], 18), upto(18), "a window of two runs");
    assert_eq!(ahead(16, &["--readahead", "0"], 16), upto(16), "switched off");
    assert_eq!(ahead(RUNS, &[], RUNS), upto(RUNS), "to the end, and not past it");
}

#[test]
fn it_can_be_switched_off_and_is_limited() {
    let error = fails(&["serve", "--socket-path", "s", "--image", "x", "--read-only", "--readahead", "17M"]);
    assert!(error.contains("at most 16M"), "{error}");
}
