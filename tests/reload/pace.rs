//! What a change of the map costs a guest: measured and told, not asserted, for time is the machine's.

use crate::common::{Client, text};
use crate::place::*;
use serde_json::json;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The three kinds take turns, so that whatever else the machine does meets all of them.
const TURNS: u64 = 12;
const TURN: Duration = Duration::from_millis(400);
const PAUSE: Duration = Duration::from_millis(5);

/// What goes on beside the reads.
const KINDS: [&str; 3] =
    ["nothing else", "a new map put there and 'status' asked", "a new map put there and 'reload' asked"];

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
    let mut waits: [Vec<u64>; 3] = Default::default();
    let mut asked = [0u64; 3];
    for turn in 0..TURNS * 3 {
        let kind = turn as usize % 3;
        let stop = AtomicBool::new(false);
        std::thread::scope(|s| {
            let asker = s.spawn(|| {
                let mut count = 0;
                for which in [PAPER, BRIDGE, OWN].into_iter().cycle() {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    std::thread::sleep(PAUSE);
                    match kind {
                        0 => continue,
                        1 => {
                            place.put(which, "three");
                            ask(&place.control("three"), &json!({"execute": "status"}), &[]);
                        }
                        _ => {
                            place.put(which, "three");
                            reload(&place.control("three"));
                        }
                    }
                    count += 1;
                }
                count
            });
            let begin = Instant::now();
            while begin.elapsed() < TURN {
                let offset = (rng.below(4000) * BLOCK) as u64;
                let since = Instant::now();
                client.submit_read(0, offset, 0, BLOCK, 1);
                assert_eq!(client.wait(0, 1)[0].1, 0);
                waits[kind].push(since.elapsed().as_nanos() as u64);
            }
            stop.store(true, Ordering::Relaxed);
            asked[kind] += asker.join().unwrap();
        });
    }
    for (kind, mut waits) in waits.into_iter().enumerate() {
        waits.sort_unstable();
        let at = |share: f64| waits[((waits.len() - 1) as f64 * share) as usize] as f64 / 1000.0;
        println!(
            "{}: {} times, {} reads of 4 KiB one by one: median {:.1} us, 99% {:.1} us, 99.9% {:.1} us, worst {:.0} us",
            KINDS[kind],
            asked[kind],
            waits.len(),
            at(0.5),
            at(0.99),
            at(0.999),
            at(1.0),
        );
    }
}
