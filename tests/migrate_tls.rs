//! `vmar migrate send` and `receive` with TLS between them, and something that behaves as QEMU does at either end.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;

use common::*;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::thread;

/// What QEMU's return path says at the end.
const SHUT_OK: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];
const PAGES: u64 = 500;
const PAGE_BYTES: u64 = 4096;

/// The hosts that the documentation makes certificates for.
const NEAR: &str = "192.0.2.1";
const FAR: &str = "192.0.2.2";

/// A whole migration of one block of memory.
fn stream() -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x04test\x08\0\x01\0\0".to_vec();
    out.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    out.extend(((PAGES * PAGE_BYTES) | 4).to_be_bytes());
    out.extend(b"\x04ram0");
    out.extend((PAGES * PAGE_BYTES).to_be_bytes());
    out.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02\x03\0\0\0\x02");
    for n in 0..PAGES {
        out.extend(((n * PAGE_BYTES) | 8).to_be_bytes());
        out.extend(b"\x04ram0");
        let word = |i: u64| (n * 512 + i).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes();
        out.extend((0..PAGE_BYTES / 8).flat_map(word));
    }
    out.extend(b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x02");
    out.extend(b"\x04\0\0\0\x09\x03cpu\0\0\0\0\0\0\0\x01 registers \x7e\0\0\0\x09\0");
    out
}

/// Runs the commands that docs/migrate.md has for certificates in a directory of their own.
fn certificates() -> Bench {
    let bench = Bench::new();
    let text = include_str!("../docs/migrate.md");
    let block =
        text.split("```sh\n").filter_map(|rest| rest.split("```").next()).find(|block| block.contains("openssl"));
    let out = Command::new("sh").args(["-ec", block.unwrap()]).current_dir(bench.dir.path()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    bench
}

/// `--tls-*` of a host.
fn tls(bench: &Bench, host: &str) -> Vec<String> {
    [("ca", "ca.pem".to_string()), ("cert", format!("{host}.pem")), ("key", format!("{host}.key"))]
        .into_iter()
        .flat_map(|(flag, file)| [format!("--tls-{flag}"), text(&bench.path(&file)).to_string()])
        .collect()
}

/// A command that was started; killed when dropped.
struct Running {
    child: Child,
    stderr: BufReader<ChildStderr>,
}

impl Running {
    fn start(args: &[&str], more: &[String]) -> Running {
        let mut command = vmar(args);
        let mut child = command.args(more).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        Running { child, stderr }
    }

    /// Its next line with this in it: what comes after.
    fn says(&mut self, what: &str) -> String {
        let mut line = String::new();
        self.stderr.read_line(&mut line).unwrap();
        let (_, rest) = line.split_once(what).unwrap_or_else(|| panic!("no {what:?}: {line}"));
        rest.trim().to_string()
    }

    /// Its status and what it said besides.
    fn ends(mut self) -> (bool, String) {
        let mut said = String::new();
        self.stderr.read_to_string(&mut said).unwrap();
        let mut out = self.child.stdout.take().unwrap();
        out.read_to_string(&mut said).unwrap();
        (self.child.wait().unwrap().success(), said)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A receiver that waits for a sender at this address, and its destination.
fn receiver(bench: &Bench, tls: &[String]) -> (Running, String, UnixListener) {
    let destination = bench.path("in");
    let _ = std::fs::remove_file(&destination);
    let listener = UnixListener::bind(&destination).unwrap();
    let records = bench.path("received");
    let args = [
        "migrate",
        "receive",
        "--listen",
        "127.0.0.1:0",
        "--destination",
        text(&destination),
        "--records",
        text(&records),
    ];
    let mut running = Running::start(&args, tls);
    let address = running.says("waits for a sender at ");
    (running, address, listener)
}

fn sender(bench: &Bench, link: &str, tls: &[String]) -> Running {
    let (source, records) = (bench.path("out"), bench.path("sent"));
    let args =
        ["migrate", "send", "--vm", "web", "--source", text(&source), "--link", link, "--records", text(&records)];
    Running::start(&args, tls)
}

fn with_name(mut tls: Vec<String>, name: &str) -> Vec<String> {
    tls.extend(["--tls-name".to_string(), name.to_string()]);
    tls
}

#[test]
fn a_vm_moves_over_tls_with_the_certificates_of_the_documentation() {
    let bench = certificates();
    let (receiving, address, listener) = receiver(&bench, &tls(&bench, FAR));
    let mut sending = sender(&bench, &address, &with_name(tls(&bench, NEAR), FAR));
    sending.says("ready for VM web");
    let stream = stream();
    let len = stream.len();
    let destination = thread::spawn(move || {
        let (mut socket, _) = listener.accept().unwrap();
        let mut got = vec![0; len];
        socket.read_exact(&mut got).unwrap();
        socket.write_all(&SHUT_OK).unwrap();
        // Until it is told to run: the proxy leaves.
        let _ = socket.read(&mut [0]);
        got
    });
    let mut source = UnixStream::connect(bench.path("out")).unwrap();
    source.write_all(&stream).unwrap();
    let mut shut = [0; 8];
    source.read_exact(&mut shut).unwrap();
    assert_eq!(shut, SHUT_OK);
    drop(source);
    assert!(destination.join().unwrap() == stream, "not the stream that was sent");
    for (side, (ok, said), expected) in
        [("send", sending.ends(), "VM web has left"), ("receive", receiving.ends(), "VM web has arrived")]
    {
        assert!(ok && said.contains(expected) && !said.contains("WARN"), "{side}: {said}");
    }
}

/// A network between the two that ends after so many bytes: where the sender finds it.
fn network(receiver: String, carries: usize) -> (String, thread::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let carry = thread::spawn(move || {
        let (near, far) = (listener.accept().unwrap().0, TcpStream::connect(receiver).unwrap());
        thread::scope(|scope| {
            scope.spawn(|| std::io::copy(&mut &far, &mut &near));
            let _ = std::io::copy(&mut (&near).take(carries as u64), &mut &far);
            let _ = (near.shutdown(Shutdown::Both), far.shutdown(Shutdown::Both));
        });
    });
    (address, carry)
}

/// An error at both, and not the death of a process by SIGPIPE; the source's QEMU is let go.
#[test]
fn a_cut_link_is_an_error_at_both_hosts() {
    let bench = certificates();
    for carries in [300_000, 1_000_000] {
        let (receiving, address, listener) = receiver(&bench, &tls(&bench, FAR));
        let (address, carry) = network(address, carries);
        let mut sending = sender(&bench, &address, &with_name(tls(&bench, NEAR), FAR));
        sending.says("ready for VM web");
        let destination = thread::spawn(move || {
            let mut got = Vec::new();
            let _ = listener.accept().unwrap().0.read_to_end(&mut got);
            got
        });
        let mut source = UnixStream::connect(bench.path("out")).unwrap();
        let stream = stream();
        let _ = source.write_all(&stream);
        assert!(!source.read(&mut [0]).is_ok_and(|n| n > 0), "no success is told");
        let got = destination.join().unwrap();
        assert!(got.len() < stream.len() && stream.starts_with(&got), "{} bytes", got.len());
        for (ok, said) in [sending.ends(), receiving.ends()] {
            assert!(!ok && said.contains("link: "), "{said}");
        }
        carry.join().unwrap();
    }
}

#[test]
fn hosts_that_do_not_know_each_other_say_why_they_refuse() {
    let (ours, other) = (certificates(), certificates());
    let right = with_name(tls(&ours, NEAR), FAR);
    let tried = |sender_tls: &[String], receiver_tls: &[String]| {
        let (receiving, address, _destination) = receiver(&ours, receiver_tls);
        let ((sent, sent_said), (received, received_said)) =
            (sender(&ours, &address, sender_tls).ends(), receiving.ends());
        assert!(!sent && !received, "{sent_said} {received_said}");
        assert!(sent_said.lines().count() == 1 && received_said.lines().count() == 1, "{sent_said} {received_said}");
        (sent_said, received_said)
    };
    for (sender_tls, receiver_tls, sent, received) in [
        (
            &with_name(tls(&other, NEAR), FAR),
            &tls(&ours, FAR),
            "not signed by the CA of --tls-ca",
            "does not know the CA",
        ),
        // Without --tls-name.
        (&tls(&ours, NEAR), &tls(&ours, FAR), "is only valid for", "for another name"),
        (&vec![], &tls(&ours, FAR), "--tls-*", "it speaks no TLS"),
        (&right, &vec![], "it ended the connection in the TLS handshake", "--tls-*"),
    ] {
        let (sent_said, received_said) = tried(sender_tls, receiver_tls);
        assert!(sent_said.contains(sent) && received_said.contains(received), "{sent_said} {received_said}");
    }
    // The sender believes this receiver, and shows a certificate of another CA.
    let mut stranger = right.clone();
    for flag in ["--tls-cert", "--tls-key"] {
        let value = 1 + stranger.iter().position(|arg| arg == flag).unwrap();
        let file = PathBuf::from(&stranger[value]);
        stranger[value] = text(&other.path(text(file.file_name().unwrap().as_ref()))).to_string();
    }
    let (sent, received) = tried(&stranger, &tls(&ours, FAR));
    assert!(
        sent.contains("does not know the CA") && received.contains("not signed by the CA of --tls-ca"),
        "{sent} {received}"
    );
}

#[test]
fn flags_that_do_not_go_together_are_refused() {
    let bench = certificates();
    let all = tls(&bench, NEAR);
    let records = bench.path("records");
    let send = ["migrate", "send", "--vm", "web", "--source", "s", "--records", text(&records), "--link"];
    let receive = ["migrate", "receive", "--destination", "d", "--records", text(&records), "--listen"];
    for begin in [&send[..], &receive[..]] {
        let status = |address: &str, more: &[String]| {
            let out = vmar(begin).arg(address).args(more).output().unwrap();
            (out.status.code(), String::from_utf8(out.stderr).unwrap())
        };
        for missing in [0, 2, 4] {
            let mut some = all.clone();
            let flag = some.drain(missing..missing + 2).next().unwrap();
            let (code, said) = status("127.0.0.1:1", &some);
            assert!(code == Some(2) && said.contains(&flag), "{flag}: {said}");
        }
        let (code, said) = status("unix:l", &all);
        assert!(code == Some(2) && said.contains("a Unix socket has no TLS"), "{said}");
        let mut key = all.clone();
        key[5] = tls(&bench, FAR)[5].clone();
        let (code, said) = status("127.0.0.1:1", &key);
        assert!(code == Some(1) && said.contains("is not the key of the certificate"), "{said}");
    }
    let (code, said) = {
        let out = vmar(&send).args(["127.0.0.1:1", "--tls-name", "b"]).output().unwrap();
        (out.status.code(), String::from_utf8(out.stderr).unwrap())
    };
    assert!(code == Some(2) && said.contains("--tls-ca"), "{said}");
}
