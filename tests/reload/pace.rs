//! What a change of the map costs a guest: measured and told, not asserted, for time is the machine's.

use crate::common::{Client, text};
use crate::place::*;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const TIME: Duration = Duration::from_secs(3);

/// Latencies of single cached reads for a while, sorted, in nanoseconds.
fn reads(client: &mut Client, blocks: usize, rng: &mut Rng) -> Vec<u64> {
    let begin = Instant::now();
    let mut out = Vec::new();
    while begin.elapsed() < TIME {
        let offset = (rng.below(blocks) * BLOCK) as u64;
        let since = Instant::now();
        client.submit_read(0, offset, 0, BLOCK, 1);
        assert_eq!(client.wait(0, 1)[0].1, 0);
        out.push(since.elapsed().as_nanos() as u64);
    }
    out.sort_unstable();
    out
}

fn tell(what: &str, waits: &[u64], changes: u64) {
    let at = |share: f64| waits[((waits.len() - 1) as f64 * share) as usize] as f64 / 1000.0;
    println!(
        "{what}: {changes} changes, {} reads, median {:.1} us, 99.9% {:.1} us, 99.99% {:.1} us, worst {:.1} us",
        waits.len(),
        at(0.5),
        at(0.999),
        at(0.9999),
        at(1.0),
    );
}

#[test]
fn the_worst_wait_with_and_without_changes() {
    let place = Place::new(4000);
    let overlay = place.bench.overlay("three");
    let server = place.serve("three", &["--overlay", text(&overlay)]);
    let mut client = Client::connect(&server.socket, 1, false);
    for _ in 0..2 {
        client.read_all(64 << 10, |_, _| {});
    }
    let mut rng = Rng(5);
    for round in 0..2 {
        let waits = reads(&mut client, 4000, &mut rng);
        tell(&format!("round {round}, one map"), &waits, 0);
        let stop = AtomicBool::new(false);
        let changes = AtomicU64::new(0);
        let waits = std::thread::scope(|s| {
            s.spawn(|| {
                for which in [PAPER, BRIDGE, OWN].into_iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        return;
                    }
                    place.put(which, "three");
                    reload(&place.control("three"));
                    changes.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(20));
                }
            });
            let waits = reads(&mut client, 4000, &mut rng);
            stop.store(true, Ordering::Relaxed);
            waits
        });
        tell(&format!("round {round}, changing"), &waits, changes.into_inner());
    }
}
