//! Strangers, other versions, and sides that die.

use crate::common::*;
use crate::fakes::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

/// A greeting of this version.
fn hello(version: u16) -> Vec<u8> {
    let mut body = b"vmar-mig".to_vec();
    body.extend(version.to_le_bytes());
    body.extend([7; 16]);
    let mut out = vec![1];
    out.extend((body.len() as u32).to_le_bytes());
    out.extend(body);
    out
}

#[test]
fn a_receiver_refuses_strangers_and_says_why() {
    let lying = [&[3u8, 255, 255, 255, 255][..], &[0; 64]].concat();
    let cases: [(&[u8], &str); 6] = [
        (b"GET / HTTP/1.1\r\n\r\n", "is the other side vmar"),
        (&hello(7), "speaks version 7"),
        (&hello(1), "cut off"),
        (&lying, "longer than any"),
        (&[4, 8, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "did not greet"),
        (b"", "closed it"),
    ];
    for (bytes, why) in cases {
        let hosts = Hosts::new();
        let _destination = UnixListener::bind(hosts.path("destination")).unwrap();
        let receiver = hosts.receiver(&[]);
        let mut link = connect(&hosts.path("link")).unwrap();
        link.write_all(bytes).unwrap();
        link.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        let _ = link.read_to_end(&mut rest);
        let out = receiver.wait_with_output().unwrap();
        let said = said(&out);
        assert!(out.status.code() == Some(1) && said.contains(why), "{why}: {said}");
        assert!(!said.contains("panicked"), "{said}");
    }
}

#[test]
fn a_sender_refuses_a_stranger_and_its_vm_stays() {
    for (bytes, why) in [(&b"SSH-2.0-OpenSSH\r\n"[..], "is the other side vmar"), (&hello(1), "cut off")] {
        let hosts = Hosts::new();
        let listener = UnixListener::bind(hosts.path("link")).unwrap();
        let sender = hosts.sender("web", &[]);
        let (mut link, _) = listener.accept().unwrap();
        link.write_all(bytes).unwrap();
        drop(link);
        let out = sender.wait_with_output().unwrap();
        assert!(!out.status.success());
        // The greeting was sent, and what came back is no answer to it.
        let said = said(&out);
        assert!(said.contains(why) || said.contains("broke"), "{why}: {said}");
    }
}

/// Reads the record of a side.
fn state(hosts: &Hosts, side: &str) -> String {
    let dir = hosts.path(&format!("records-{side}"));
    let file = std::fs::read_dir(dir).unwrap().next().unwrap().unwrap().path();
    let record: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    record["state"].as_str().unwrap().to_string()
}

/// Whichever of the two is killed in the middle, the other one ends, and both QEMUs see their socket closed.
#[test]
fn a_proxy_that_is_killed_leaves_the_vm_where_it_was() {
    let stream = stream(&guest(1, 4000));
    for kill_sender in [true, false] {
        let hosts = Hosts::new();
        let destination = UnixListener::bind(hosts.path("destination")).unwrap();
        let mut receiver = hosts.receiver(&[]);
        let mut sender = hosts.sender("web", &[]);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !hosts.path("source").exists() {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(2));
        }
        let mut source = connect(&hosts.path("source")).unwrap();
        let (mut there, _) = destination.accept().unwrap();
        std::thread::scope(|scope| {
            // More than fits on the way: it is written until the proxy is gone.
            let writes = scope.spawn(|| (&source).write_all(&stream));
            let mut some = vec![0; 1 << 20];
            there.read_exact(&mut some).unwrap();
            assert!(some == stream[..1 << 20]);
            if kill_sender {
                sender.kill().unwrap()
            } else {
                receiver.kill().unwrap()
            }
            let _ = there.read_to_end(&mut some);
            assert!(writes.join().unwrap().is_err());
        });
        let mut answer = Vec::new();
        let _ = source.read_to_end(&mut answer);
        assert!(answer.is_empty(), "the source was told something");
        for child in [&mut sender, &mut receiver] {
            assert!(!wait(child, Duration::from_secs(60)).success());
        }
        // Nobody finds that it has moved.
        assert_eq!(state(&hosts, "a"), if kill_sender { "begun" } else { "stayed" });
        assert_eq!(state(&hosts, "b"), "begun");
    }
}

#[test]
fn garbage_instead_of_a_stream_passes_and_is_not_taken_for_a_vm() {
    // No stream of QEMU at all: it passes as it is, byte for byte; the destination's QEMU is who refuses it.
    let noise: Vec<u8> = (0..300).flat_map(noise).collect();
    let hosts = Hosts::new();
    let end = hosts.migrate("web", &noise, &[], &[], || ());
    assert!(end.got == noise);
    let hosts = Hosts::new();
    // Memory, and no return path.
    let mut bare = stream(&guest(1, 50));
    let at = bare.windows(5).position(|w| w == [8, 0, 1, 0, 0]).unwrap();
    bare.drain(at..at + 5);
    let end = hosts.migrate("web", &bare, &[], &[], || ());
    assert!(!end.moved && said(&end.sent).contains("return-path on"), "{}", said(&end.sent));
    assert_eq!(state(&hosts, "a"), "stayed");
}
