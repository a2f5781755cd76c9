//! What is in flight when the map changes.

use crate::common::Client;
use crate::hanging::Hanging;
use crate::place::*;
use serde_json::json;
use std::fs::File;
use vmar::library::{Live, lease};

const PIECE: usize = 64 << 10;

fn leased(place: &Place) -> Vec<u32> {
    match &lease::live(&place.library()).unwrap()[..] {
        [Live::Known(info)] => info.targets.iter().map(|t| t.id).collect(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn requests_in_flight_keep_the_old_map_and_its_images_open() {
    let place = Place::new(480);
    let bytes = &place.images[3];
    let server = place.serve("three", &["--read-only"]);
    let (control, pid) = (place.control("three"), server.child.id());
    place.put(OWN, "three");
    reload(&control);
    // An image that hangs on demand.
    let slow = Hanging::new(&place.bench.path("slow"), place.images[0].clone());
    let (request, mut files) = place.request(PAPER, "three");
    let targets = request["arguments"]["targets"].as_array().unwrap();
    let at = targets.iter().position(|t| t["image"] == json!(0)).unwrap();
    files[at + 1] = File::open(&slow.path).unwrap();
    let images: Vec<u32> = targets.iter().map(|t| t["image"].as_u64().unwrap() as u32).collect();
    assert!(ask(&control, &request, &files)["return"].is_object());
    drop(files);
    let has_slow = || open_below(pid, place.bench.dir.path()).0.iter().any(|name| name == "slow");
    assert!(has_slow());

    let mut client = Client::connect(&server.socket, 2, true);
    slow.hold_reads();
    let count = bytes.len() / PIECE;
    for slot in 0..count {
        client.memory(slot * PIECE, PIECE).fill(0xA5);
        client.submit_read(0, (slot * PIECE) as u64, slot * PIECE, PIECE, slot);
    }
    client.kick(0);
    slow.wait_for_hang();
    for (which, closed) in [(OWN, false), (BRIDGE, true), (OWN, true)] {
        place.put(which, "three");
        assert_eq!(reload(&control)["closed"], json!(closed), "{which}");
        assert!(has_slow());
        assert!(images.iter().all(|id| leased(&place).contains(id)), "{:?}", leased(&place));
    }
    // Others go on with the new map, and so does whatever hangs once it does not.
    let at = count * PIECE;
    for slot in 0..count {
        client.memory(at, PIECE).fill(0xA5);
        client.submit_read(1, (slot * PIECE) as u64, at, PIECE, 1000 + slot);
        assert_eq!(client.wait(1, 1), [(1000 + slot, 0)]);
        assert!(client.memory(at, PIECE) == &bytes[slot * PIECE..][..PIECE], "{slot}");
    }
    slow.release();
    let mut ended: Vec<_> = client.wait(0, count);
    ended.sort_unstable();
    assert_eq!(ended, (0..count).map(|slot| (slot, 0)).collect::<Vec<_>>());
    assert!(client.memory(0, count * PIECE) == &bytes[..count * PIECE]);
    until("the old map is closed", || !has_slow());
    until("the lease has shrunk", || leased(&place) == [3]);
    assert_eq!(open_images(pid, &place), ["three.raw"]);
}
