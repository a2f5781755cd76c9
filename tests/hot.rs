//! Reads from the mapping of an image while its pages go: taken by the kernel, or cut off for good.
#![cfg(target_arch = "x86_64")]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
use common::*;
use std::path::Path;
use std::time::Duration;

const SIZE: usize = 16 << 20;
const BLOCK: usize = 4096;
const DEPTH: usize = 32;

fn pattern() -> Vec<u8> {
    (0..SIZE).map(|i| (i / BLOCK * 37 + i % BLOCK / 16) as u8).collect()
}

/// The mapping of a file in a process: address, bytes, and how many of them its page table holds.
fn mapping(pid: u32, file: &Path) -> (usize, usize, usize) {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let mut lines = smaps.lines().skip_while(|line| !(line.contains(" r--s ") && line.ends_with(text(file))));
    let range = lines.next().expect("the file is mapped").split_once(' ').unwrap().0;
    let (start, end) = range.split_once('-').unwrap();
    let [start, end] = [start, end].map(|hex| usize::from_str_radix(hex, 16).unwrap());
    let rss = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
    (start, end - start, rss.trim().trim_end_matches(" kB").parse::<usize>().unwrap() << 10)
}

/// Faults of the queue's thread that had to wait for the disk.
fn waits_of_the_queue(pid: u32) -> u64 {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| task.unwrap().path());
    let stats = tasks.filter_map(|task| std::fs::read_to_string(task.join("stat")).ok());
    let queue = stats.into_iter().find(|stat| stat.contains("(vmar-queue0)")).expect("the queue has a thread");
    // Field 12 of proc_pid_stat(5), majflt; the name before may hold anything, so it is counted from behind it.
    queue.rsplit_once(')').unwrap().1.split_whitespace().nth(9).unwrap().parse().unwrap()
}

/// Has the kernel take a mapping's pages out of memory, as it does when it is short of it.
fn page_out(pid: u32, file: &Path) {
    let (start, len, _) = mapping(pid, file);
    let range = libc::iovec { iov_base: start as *mut libc::c_void, iov_len: len };
    // SAFETY: both calls take numbers and a list of one range of another process's memory, whose content stays what it is.
    let advised = unsafe {
        let pidfd = libc::syscall(libc::SYS_pidfd_open, pid, 0);
        assert!(pidfd >= 0, "{}", std::io::Error::last_os_error());
        let n = libc::syscall(libc::SYS_process_madvise, pidfd, &raw const range, 1, libc::MADV_PAGEOUT, 0);
        libc::close(pidfd as i32);
        n
    };
    assert_eq!(advised, len as i64, "{}", std::io::Error::last_os_error());
}

/// Random reads with [`DEPTH`] in flight; `check` is told of each: block, result, bytes.
fn reads(client: &mut Client, count: usize, seed: &mut u64, mut check: impl FnMut(usize, i32, &[u8])) {
    let mut blocks = [0; DEPTH];
    let mut submit = |client: &mut Client, slot: usize, blocks: &mut [usize; DEPTH]| {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        blocks[slot] = (*seed >> 33) as usize % (SIZE / BLOCK);
        client.memory(slot * BLOCK, BLOCK).fill(0xA5);
        client.submit_read(0, (blocks[slot] * BLOCK) as u64, slot * BLOCK, BLOCK, slot);
    };
    (0..DEPTH).for_each(|slot| submit(client, slot, &mut blocks));
    for left in (0..count).rev() {
        let (slot, ret) = client.wait(0, 1)[0];
        check(blocks[slot], ret, client.memory(slot * BLOCK, BLOCK));
        if left >= DEPTH {
            submit(client, slot, &mut blocks);
        }
    }
}

#[test]
fn pages_that_the_kernel_takes_cost_a_few_waits_and_no_wrong_byte() {
    let bench = Bench::new();
    let data = pattern();
    // Not in /tmp, which may be memory itself: from there pages go only to swap.
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let file = dir.path().join("disk");
    std::fs::write(&file, &data).unwrap();
    let server = bench.serve(&["--blk-file", text(&file), "--read-only"]);
    let pid = server.child.id();
    let mut client = Client::connect(&server.socket, 1, true);
    // Pages that have not been written back yet cannot be taken.
    std::fs::File::open(&file).unwrap().sync_all().unwrap();
    let (mut seed, mut waits) = (7, waits_of_the_queue(pid));
    let begin = waits;
    for round in 0..3 {
        for _ in 0..2 {
            client.read_all(64 << 10, |at, bytes| assert!(bytes == &data[at as usize..][..bytes.len()]));
        }
        let (_, _, resident) = mapping(pid, &file);
        assert!(resident > SIZE / 2, "round {round}: the second read came from the mapping, {resident} bytes of it");
        for _ in 0..3 {
            page_out(pid, &file);
            reads(&mut client, 2000, &mut seed, |block, ret, bytes| {
                assert_eq!(ret, 0);
                assert!(bytes == &data[block * BLOCK..][..BLOCK], "round {round}, block {block}");
            });
        }
        let now = waits_of_the_queue(pid);
        // As many as it takes to notice (64 reads and the batch in hand), not one for each of the pages that went. After the
        // first time the pages are cold, so that the others cost none.
        assert!((1..=2 * 64 + 32).contains(&(now - waits)), "round {round}: {} waits", now - waits);
        waits = now;
        // Until pages may become warm again: 1 s, and then twice as long.
        std::thread::sleep(Duration::from_millis(1200 << round));
    }
    assert!(waits > begin);
    drop(client);
    assert!(server.stop().0.success());
}

#[test]
fn a_file_cut_off_under_load_gives_errors_and_never_zeros() {
    let bench = Bench::new();
    let data = pattern();
    let file = bench.file("disk", &data);
    let server = bench.serve(&["--blk-file", text(&file), "--read-only"]);
    let mut client = Client::connect(&server.socket, 1, true);
    for _ in 0..2 {
        client.read_all(64 << 10, |at, bytes| assert!(bytes == &data[at as usize..][..bytes.len()]));
    }
    assert!(mapping(server.child.id(), &file).2 > SIZE / 2, "it is read from the mapping");
    let (mut seed, mut cut, mut seen, mut errors) = (1, false, 0, 0);
    let half = SIZE / BLOCK / 2;
    reads(&mut client, 5000, &mut seed, |block, ret, bytes| {
        seen += 1;
        if seen == 1000 {
            std::fs::File::options().write(true).open(&file).unwrap().set_len((SIZE / 2) as u64).unwrap();
            cut = true;
        }
        match ret {
            0 => assert!(bytes == &data[block * BLOCK..][..BLOCK], "block {block}"),
            _ => {
                assert!(cut && block >= half, "block {block}: {ret}");
                errors += 1;
            }
        }
        // Those in flight at the cut may have been read before it.
        assert!(ret != 0 || block < half || seen <= 1000 + 2 * DEPTH, "block {block} is not there any more");
    });
    assert!(errors > 1000, "{errors}");
    drop(client);
    let (status, err) = server.stop();
    assert!(status.success() && err.contains("a mapped page was lost"), "{err}");
}
