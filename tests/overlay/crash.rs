//! kill -9: a helper process (this test binary, run again) writes and says so, is killed at a random moment, and the next
//! process must find everything that was said to be done.

use crate::common::*;
use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::time::Duration;
use vmar::overlay::{OpenOptions, Overlay};

const SIZE: u64 = 2 << 20;
const SECTORS: u64 = SIZE / 512;
const THREADS: u64 = 3;
const ENV: &str = "VMAR_TEST_KILL_HELPER";

/// What a thread of the helper says on its pipe before ("b") and after ("d") each operation: `b SECTOR COUNT VALUE`.
fn content(sector: u64, value: u64) -> Vec<u8> {
    if value == 0 {
        return vec![0; 512];
    }
    let mut bytes = Vec::with_capacity(512);
    while bytes.len() < 512 {
        bytes.extend(value.to_le_bytes());
        bytes.extend(sector.to_le_bytes());
    }
    bytes
}

/// Small and repeatable: no dependency for it.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Does nothing when it is run as a test; as the helper it writes until it is killed.
#[test]
fn helper() {
    let Ok(spec) = std::env::var(ENV) else { return };
    let parts: Vec<&str> = spec.split(',').collect();
    let [overlay, base, state_dir, seed] = parts[..] else { panic!("{spec}") };
    let base = std::fs::read(base).unwrap();
    let opts = OpenOptions {
        read_only: false,
        state_dir: std::path::Path::new(state_dir),
        base: None,
        discard_unflushed: false,
    };
    let o = Overlay::open(std::path::Path::new(overlay), &opts).unwrap();
    let seed: u64 = seed.parse().unwrap();
    struct Slice(Vec<u8>);
    impl vmar::overlay::BaseRead for Slice {
        fn read_base(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
            base_at(&self.0, offset, buf);
            Ok(())
        }
    }
    let base = Slice(base);
    // One write call a line, so that lines of threads do not mix. File descriptor 2 is the pipe; the test harness owns 1.
    let say = |line: String| File::options().write(true).open("/proc/self/fd/2").unwrap().write_all(line.as_bytes());
    std::thread::scope(|s| {
        for t in 0..THREADS {
            let (o, base) = (&o, &base);
            s.spawn(move || {
                let mut rng = seed * 1000 + t * 7 + 1;
                for n in 1u64.. {
                    // Each thread has its own sectors, mixed with the others' in every subcluster.
                    let sector = random(&mut rng) % (SECTORS / THREADS) * THREADS + t;
                    let zero = random(&mut rng).is_multiple_of(8);
                    let value = if zero { 0 } else { seed << 32 | t << 28 | n };
                    say(format!("b {sector} {value}\n")).unwrap();
                    if zero {
                        o.write_zeroes(sector * 512, 512, true, base).unwrap();
                    } else {
                        write(o, base, sector * 512, &content(sector, value));
                    }
                    say(format!("d {sector} {value}\n")).unwrap();
                    if n.is_multiple_of(64) && t == 0 {
                        o.flush().unwrap();
                    }
                }
            });
        }
    });
}

/// Runs the helper and kills it after a while; gives what it said.
fn run_and_kill(fx: &Fixture, seed: u64) -> String {
    let spec = [path_str(&fx.overlay), path_str(&fx.base_path), path_str(&fx.state_dir()), &seed.to_string()].join(",");
    let (mut from_child, to_parent) = std::io::pipe().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crash::helper", "--nocapture"])
        .env(ENV, spec)
        .stdout(Stdio::null())
        .stderr(to_parent)
        .spawn()
        .unwrap();
    let (under_way, wait) = std::sync::mpsc::channel();
    let reader = std::thread::spawn(move || {
        let mut said = vec![0; 4096];
        from_child.read_exact(&mut said).unwrap();
        under_way.send(()).unwrap();
        from_child.read_to_end(&mut said).unwrap();
        String::from_utf8(said).unwrap()
    });
    // However slow the machine is, it is killed in the middle of its work.
    wait.recv().unwrap();
    std::thread::sleep(Duration::from_millis(seed * 37 % 150));
    child.kill().unwrap();
    child.wait().unwrap();
    reader.join().unwrap()
}

#[test]
fn every_completed_write_survives_kill_minus_9() {
    let fx = Fixture::with_sizes(SIZE, SIZE);
    // What each sector was last said to hold.
    let mut done: HashMap<u64, u64> = HashMap::new();
    let mut completed = 0;
    for round in 1..=8 {
        let said = run_and_kill(&fx, round);
        let mut in_flight: HashMap<u64, u64> = HashMap::new();
        for line in said.lines() {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                [what @ ("b" | "d"), sector, value] => {
                    let (sector, value) = (sector.parse().unwrap(), value.parse().unwrap());
                    if what == "b" {
                        in_flight.insert(sector, value);
                    } else {
                        in_flight.remove(&sector);
                        done.insert(sector, value);
                        completed += 1;
                    }
                }
                _ => panic!("the helper says: {said}"),
            }
        }
        assert!(in_flight.len() as u64 <= THREADS);
        qemu_check(&fx.overlay);
        let o = fx.open();
        let all = read_all(&o, &fx);
        for sector in 0..SECTORS {
            let found = &all[(sector * 512) as usize..][..512];
            let old = match done.get(&sector) {
                Some(value) => content(sector, *value),
                None => fx.base[(sector * 512) as usize..][..512].to_vec(),
            };
            if let Some(value) = in_flight.get(&sector) {
                let new = content(sector, *value);
                assert!(found == old || found == new, "round {round}, sector {sector}: neither old nor new");
                // Whichever it was: from now on it stays so.
                done.insert(sector, if found == new { *value } else { done.get(&sector).copied().unwrap_or(u64::MAX) });
                if done[&sector] == u64::MAX {
                    done.remove(&sector);
                }
            } else {
                assert!(found == old, "round {round}: a completed write of sector {sector} is lost");
            }
        }
        // Dropped, not closed: the next helper takes the same session up.
        drop(o);
    }
    assert!(completed > 200, "only {completed} writes in 8 rounds");
    let o = fx.open();
    let want = read_all(&o, &fx);
    o.close().unwrap();
    qemu_check(&fx.overlay);
    assert!(convert(&fx) == want);
}
