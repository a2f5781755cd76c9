//! Garbage on the socket, and what many connections leave behind.

use crate::Target;
use crate::frontend::*;
use crate::random::Rng;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

fn message(request: u32, flags: u32, size: u32, body: &[u8]) -> Vec<u8> {
    let header = [request, flags, size].iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>();
    [&header[..], body].concat()
}

#[test]
fn garbage_on_the_socket_ends_its_connection_alone() {
    let mut target = Target::writable();
    let before = target.holds();
    let mut cases: Vec<Vec<u8>> = vec![
        vec![],
        vec![1],
        vec![0; 11],
        vec![0; 12],
        vec![0xFF; 12],
        vec![0xFF; 64 << 10],
        message(GET_FEATURES, VERSION, u32::MAX, &[]),
        message(GET_FEATURES, VERSION, 4097, &[0; 100]),
        message(GET_FEATURES, VERSION, 4096, &[0; 4096]),
        message(GET_FEATURES, VERSION, 8, &[0; 3]),
        message(GET_FEATURES, VERSION | 4, 0, &[]),
        message(GET_FEATURES, 0, 0, &[]),
        message(GET_FEATURES, 2, 0, &[]),
        message(SET_FEATURES, VERSION, 0, &[]),
        message(SET_FEATURES, VERSION, 8, &[0xFF; 8]),
        message(SET_PROTOCOL_FEATURES, VERSION, 8, &[0xFF; 8]),
        message(SET_MEM_TABLE, VERSION, 8, &[1, 0, 0, 0, 0, 0, 0, 0]),
        message(SET_MEM_TABLE, VERSION, 8, &[0xFF; 8]),
        message(SET_MEM_TABLE, VERSION, 40, &[1; 40]),
        message(SET_VRING_KICK, VERSION, 8, &[0; 8]),
        message(SET_VRING_KICK, VERSION, 8, &[0xFF; 8]),
        message(SET_VRING_ADDR, VERSION, 40, &[0xFF; 40]),
        message(GET_VRING_BASE, VERSION, 8, &[0xFF; 8]),
        message(GET_CONFIG, VERSION, 12, &[0; 12]),
        message(ADD_MEM_REG, VERSION, 40, &[0; 40]),
    ];
    for request in 0..=45 {
        cases.push(message(request, VERSION | NEED_REPLY, 8, &[0x80; 8]));
        cases.push(message(request, VERSION, 0, &[]));
    }
    let mut rng = Rng::new(1);
    for _ in 0..100 {
        let mut bytes: Vec<u8> = (0..rng.below(200)).map(|_| rng.next() as u8).collect();
        if bytes.len() > 12 && rng.below(2) == 0 {
            let size = (bytes.len() - 12) as u32;
            bytes[..12].copy_from_slice(&message(rng.below(45) as u32, VERSION | NEED_REPLY, size, &[]));
        }
        cases.push(bytes);
    }
    for bytes in &cases {
        let mut stream = UnixStream::connect(&target.socket).unwrap();
        let _ = stream.write_all(bytes);
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        // Whatever it answers, it hangs up at the end. Unread bytes of ours make that a reset.
        let mut answer = Vec::new();
        match stream.read_to_end(&mut answer) {
            Ok(_) => {}
            Err(e) => assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset, "{bytes:?}"),
        }
    }
    target.holds_at_most(before);
    target.check();
    target.is_idle();
}

#[test]
fn a_message_may_come_in_pieces() {
    let mut target = Target::writable();
    let mut stream = UnixStream::connect(&target.socket).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let features = message(SET_FEATURES, VERSION, 8, &FEATURES.to_le_bytes());
    for byte in features.iter().chain(&message(GET_FEATURES, VERSION, 0, &[])) {
        stream.write_all(&[*byte]).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut answer = [0; 20];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[0], 1);
    drop(stream);
    target.check();
}

#[test]
fn memory_that_cannot_be_is_refused() {
    let mut target = Target::writable();
    let other = Region::new(0x8000_0000, 1 << 20);
    for words in [
        [0x8000_0000u64, 2 << 20, 0x8000_0000, 0], // longer than its file: SIGBUS for whoever touches it
        [0x8000_0000, 1 << 20, 0x8000_0000, 4096],
        [0x8000_0000, 1 << 20, 0x8000_0000, 1],
        [0x8000_0000, 0, 0x8000_0000, 0],
        [RAM, 1 << 20, 0x8000_0000, 0],
        [u64::MAX - 4095, 1 << 20, 0x8000_0000, 0],
        [0x8000_0000, 1 << 20, u64::MAX - 4095, 0],
        [0x8000_0000, 1 << 20, 0x8000_0000, u64::MAX - 4095],
        [0x8000_0000, !4095, 0x8000_0000, 0],
    ] {
        let mut f = target.connect(FEATURES, 1, 64);
        let body: Vec<u8> = std::iter::once(0).chain(words).flat_map(|w: u64| w.to_le_bytes()).collect();
        assert!(!matches!(f.ask(ADD_MEM_REG, &body, &[other.fd.as_fd()]), Ok(0)), "{words:x?}");
    }
    let mut f = target.connect(FEATURES, 1, 64);
    let unknown = Frontend::region_message(&other);
    assert!(!matches!(f.ask(REM_MEM_REG, &unknown, &[]), Ok(0)));
    drop(f);
    // As many as there is room for, and then some.
    let mut f = target.connect(FEATURES, 1, 64);
    let small = Region::new(0, 4096);
    let added = (0..600u64)
        .take_while(|i| {
            let words = [0, 0x10_0000_0000 + i * 4096, 4096, 0x10_0000_0000 + i * 4096, 0];
            let body: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
            matches!(f.ask(ADD_MEM_REG, &body, &[small.fd.as_fd()]), Ok(0))
        })
        .count();
    assert_eq!(added, 510, "512 slots, two of them in use");
    drop(f);
    target.check();
}

#[test]
fn hundreds_of_connections_leave_nothing() {
    let mut target = Target::writable();
    let old = target.content();
    target.check();
    let before = target.holds();
    for i in 0..400u32 {
        match i % 4 {
            0 => drop(UnixStream::connect(&target.socket).unwrap()),
            1 => {
                // Gone before the answer.
                let mut stream = UnixStream::connect(&target.socket).unwrap();
                stream.write_all(&message(GET_FEATURES, VERSION, 0, &[]).repeat(3)).unwrap();
            }
            2 => drop(Frontend::bare(&target.socket, FEATURES)),
            _ => {
                let features = if i % 8 == 3 { FEATURES } else { FEATURES | F_EVENT_IDX };
                let mut f = target.connect(features, 1 + i % 3, 16);
                assert!(f.read(0, 8, 512) == old[4096..4608]);
            }
        }
    }
    target.holds_at_most(before);
    target.check();
    target.is_idle();
}

#[test]
fn all_queues_of_256_run() {
    let mut target = Target::start(&["--num-queues", "256"]);
    let before = target.holds();
    let mut f = Frontend::bare(&target.socket, FEATURES);
    for index in 0..256 {
        let q = index as usize;
        f.add_ring(index % 8, 16);
        f.rings[q].index = index;
    }
    // All rings in one place: they are started one after the other, and none is offered anything.
    for q in 0..256 {
        let index = f.rings[q].index;
        let addr = [u64::from(index), USER + RAM, USER + RAM + 0xA000, USER + RAM + 0x8000, 0];
        f.set32(SET_VRING_NUM, index, 16);
        f.set(SET_VRING_ADDR, &addr);
        let (kick, call) = (f.rings[q].kick.try_clone().unwrap(), f.rings[q].call.try_clone().unwrap());
        f.ok(SET_VRING_KICK, &u64::from(index).to_le_bytes(), &[kick.as_fd()]);
        f.ok(SET_VRING_CALL, &u64::from(index).to_le_bytes(), &[call.as_fd()]);
        f.set32(SET_VRING_ENABLE, index, 1);
    }
    assert_eq!(target.holds().0, before.0 + 256);
    drop(f);
    target.holds_at_most(before);
    target.check();
}

/// SIGTERM is heard while a frontend owes half a message, or does not read its answers.
#[test]
fn sigterm_is_heard_whatever_the_frontend_does() {
    for stuck in 0..3 {
        let target = Target::writable();
        let mut stream = UnixStream::connect(&target.socket).unwrap();
        match stuck {
            0 => stream.write_all(&[1]).unwrap(),
            1 => stream.write_all(&message(SET_FEATURES, VERSION, 8, &[1, 2, 3])).unwrap(),
            _ => {
                stream.set_nonblocking(true).unwrap();
                while stream.write_all(&message(GET_FEATURES, VERSION, 0, &[])).is_ok() {}
            }
        }
        std::thread::sleep(Duration::from_millis(100));
        let start = Instant::now();
        let (status, _) = target.server.stop();
        assert!(status.success());
        assert!(start.elapsed() < Duration::from_secs(2), "case {stuck}: {:?}", start.elapsed());
    }
}
