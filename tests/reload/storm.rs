//! Maps change hundreds of times under load, and every byte is right.

use crate::common::{Client, Server, ok, text};
use crate::place::*;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

const QUEUES: usize = 2;
/// Changes of maps in a round.
const CHANGES: u64 = 75;
const DEPTH: usize = 32;
/// The most bytes of a request: all slots fit the client's memory.
const LEN_MAX: usize = 64 << 10;

/// What one slot is doing.
#[derive(Clone)]
enum Doing {
    Nothing,
    Read { offset: usize, len: usize },
    Write { offset: usize, len: usize, fill: u8 },
}

/// A guest that reads and writes at random with full queues, and knows what it must see.
struct Guest {
    client: Client,
    model: Vec<u8>,
    slots: Vec<Doing>,
    rng: Rng,
    writes: bool,
    requests: u64,
}

impl Guest {
    fn new(server: &Server, model: Vec<u8>, seed: u64, writes: bool) -> Guest {
        let client = Client::connect(&server.socket, QUEUES as i32, !writes);
        Guest { client, model, slots: vec![Doing::Nothing; QUEUES * DEPTH], rng: Rng(seed), writes, requests: 0 }
    }

    /// Requests in flight together have no order: where one writes, no other may be.
    fn collides(&self, offset: usize, len: usize, writes: bool) -> bool {
        self.slots.iter().any(|slot| match *slot {
            Doing::Nothing => false,
            Doing::Read { offset: o, len: l } => writes && o < offset + len && offset < o + l,
            Doing::Write { offset: o, len: l, .. } => o < offset + len && offset < o + l,
        })
    }

    fn start(&mut self, slot: usize) {
        let sectors = self.model.len() / 512;
        // Mostly small: a write of less than 4 KiB fills the rest of a subcluster from the base.
        let writes = self.writes && self.rng.below(6) == 0;
        let most = if writes { 9 } else { [8, 16, LEN_MAX / 512][self.rng.below(3)] };
        let first = self.rng.below(sectors - most);
        let (offset, len) = (first * 512, (1 + self.rng.below(most)) * 512);
        if self.collides(offset, len, writes) {
            return;
        }
        let at = slot * LEN_MAX;
        let (queue, fill) = (slot / DEPTH, self.rng.next() as u8);
        if writes {
            self.client.memory(at, len).fill(fill);
            self.client.submit_write(queue, offset as u64, at, len, slot);
            self.slots[slot] = Doing::Write { offset, len, fill };
        } else {
            self.client.memory(at, len).fill(0xA5);
            self.client.submit_read(queue, offset as u64, at, len, slot);
            self.slots[slot] = Doing::Read { offset, len };
        }
    }

    fn end(&mut self, slot: usize, ret: i32) {
        assert_eq!(ret, 0, "slot {slot}");
        self.requests += 1;
        match std::mem::replace(&mut self.slots[slot], Doing::Nothing) {
            Doing::Nothing => panic!("slot {slot} has ended twice"),
            Doing::Read { offset, len } => {
                let got = self.client.memory(slot * LEN_MAX, len);
                if let Some(at) = got.iter().zip(&self.model[offset..]).position(|(got, want)| got != want) {
                    panic!("a wrong byte at {} of a read of {len} at {offset}", offset + at);
                }
            }
            Doing::Write { offset, len, fill } => self.model[offset..][..len].fill(fill),
        }
    }

    fn run(&mut self, stop: &AtomicBool) {
        loop {
            let goes_on = !stop.load(Ordering::Relaxed);
            for slot in (0..self.slots.len()).filter(|_| goes_on) {
                if matches!(self.slots[slot], Doing::Nothing) {
                    self.start(slot);
                }
            }
            for queue in 0..QUEUES {
                self.client.kick(queue);
            }
            let mut idle = true;
            for queue in 0..QUEUES {
                let flying = |slot: &Doing| !matches!(slot, Doing::Nothing);
                if self.slots[queue * DEPTH..][..DEPTH].iter().any(flying) {
                    idle = false;
                    for (slot, ret) in self.client.wait(queue, 1) {
                        self.end(slot, ret);
                    }
                }
            }
            if idle && !goes_on {
                return;
            }
        }
    }

    fn check_all(&mut self) {
        let model = std::mem::take(&mut self.model);
        self.client.read_all(LEN_MAX, |offset, got| assert!(got == &model[offset as usize..][..got.len()], "{offset}"));
        self.model = model;
    }
}

fn drop_cache(path: &Path) {
    let file = File::open(path).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

#[test]
fn no_wrong_byte_while_maps_change_hundreds_of_times() {
    let place = Place::new(6000);
    let served = ["one", "two", "three"];
    let overlays: Vec<_> = served.iter().map(|name| place.bench.overlay(name)).collect();
    let mut models: Vec<Vec<u8>> = place.images[1..].to_vec();
    let (mut reloads, mut requests) = (0u64, 0);
    for round in 0..4u64 {
        // Without a server nothing is mapped, and the cache can be dropped: the first requests all miss.
        if round % 2 == 0 {
            NAMES.iter().for_each(|name| drop_cache(&place.bench.path(&format!("{name}.raw"))));
        }
        let servers: Vec<Server> = served
            .iter()
            .zip(&overlays)
            .map(|(name, overlay)| match *name {
                // One of them only reads.
                "two" => place.serve(name, &["--read-only"]),
                _ => place.serve(name, &["--overlay", text(overlay)]),
            })
            .collect();
        let before: Vec<usize> = servers.iter().map(|s| fd_count(s.child.id())).collect();
        let mut guests: Vec<Guest> = servers
            .iter()
            .zip(&models)
            .enumerate()
            .map(|(i, (server, model))| Guest::new(server, model.clone(), round * 10 + i as u64 + 1, i != 1))
            .collect();
        let stop = AtomicBool::new(false);
        let asked = AtomicU64::new(0);
        std::thread::scope(|s| {
            guests.iter_mut().for_each(|guest| drop(s.spawn(|| guest.run(&stop))));
            let swapper = s.spawn(|| {
                let mut rng = Rng(round + 99);
                // As many on a busy machine too.
                while asked.load(Ordering::Relaxed) < CHANGES {
                    let name = served[rng.below(served.len())];
                    let which = [PAPER, BRIDGE, OWN][rng.below(3)];
                    match rng.below(20) {
                        // The whole way, which tells all servers.
                        0 => place.remap(["paper", "bridge"][rng.below(2)]),
                        1..=9 => {
                            let (request, files) = place.request(which, name);
                            let answer = ask(&place.control(name), &request, &files);
                            assert!(answer["return"].is_object(), "{answer}");
                        }
                        _ => {
                            place.put(which, name);
                            reload(&place.control(name));
                        }
                    }
                    asked.fetch_add(1, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(rng.below(8) as u64));
                }
            });
            let swapped = swapper.join();
            stop.store(true, Ordering::Relaxed);
            swapped.unwrap();
        });
        reloads += asked.load(Ordering::Relaxed);
        requests += guests.iter().map(|g| g.requests).sum::<u64>();
        // Nobody asks for anything now, and still the old maps are closed.
        for (name, server) in served.iter().zip(&servers) {
            place.put(OWN, name);
            reload(&place.control(name));
            until("the old map is closed", || open_images(server.child.id(), &place) == [format!("{name}.raw")]);
            assert_eq!(open_below(server.child.id(), &place.library()).0.len(), 1, "the lease, and no map");
        }
        guests.iter_mut().for_each(Guest::check_all);
        models = guests.into_iter().map(|g| g.model).collect();
        // The image itself is one of the descriptors that there were; a queue in use has some of its own.
        let after: Vec<usize> = servers.iter().map(|s| fd_count(s.child.id())).collect();
        assert!(before.iter().zip(&after).all(|(b, a)| *a <= b + 6 + 6 * QUEUES), "{before:?} {after:?}");
        for server in servers {
            let (status, err) = server.stop();
            assert!(status.success() && err.is_empty(), "{err}");
        }
    }
    println!("{requests} requests, {reloads} changes of maps, no wrong byte");
    for overlay in overlays.iter().step_by(2) {
        ok(&["overlay", "check", text(overlay)]);
    }
}
