//! A guest's memory, and QEMUs that send and take it as the real ones do, on both sides of two real processes.

use crate::common::*;
pub use crate::guest::*;
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// Success, as QEMU's return path says it.
pub const SHUT_OK: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];

/// What became of a migration.
pub struct End {
    pub sent: Output,
    pub received: Output,
    /// What the destination's QEMU got.
    pub got: Vec<u8>,
    /// The source's was told that the VM has moved.
    pub moved: bool,
}

impl End {
    /// It went well; what `send --json` printed.
    pub fn ok(&self, stream: &[u8]) -> serde_json::Value {
        assert!(self.sent.status.success(), "{}", said(&self.sent));
        assert!(self.received.status.success(), "{}", said(&self.received));
        assert!(self.got == stream, "the destination got another stream");
        assert!(self.moved);
        let told: serde_json::Value = serde_json::from_slice(&self.sent.stdout).unwrap();
        let sum: u64 = told["rounds"].as_array().unwrap().iter().map(|r| r["stream_bytes"].as_u64().unwrap()).sum();
        assert_eq!(sum, stream.len() as u64);
        told
    }
}

pub fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Two hosts with their sockets in one directory.
pub struct Hosts {
    pub dir: tempfile::TempDir,
}

impl Hosts {
    pub fn new() -> Hosts {
        Hosts { dir: tempfile::tempdir().unwrap() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts the receiver with these arguments more; it listens when this returns.
    pub fn receiver(&self, more: &[&str]) -> Child {
        let (link, destination, records) = (self.path("link"), self.path("destination"), self.path("records-b"));
        let _ = std::fs::remove_file(&link);
        let listen = format!("unix:{}", text(&link));
        let args = ["migrate", "receive", "--listen", &listen, "--destination", text(&destination), "--records"];
        let mut child = start(&args, text(&records), more);
        until(&link, &mut child);
        child
    }

    /// Starts the sender with these arguments more.
    pub fn sender(&self, vm: &str, more: &[&str]) -> Child {
        let (source, records) = (self.path("source"), self.path("records-a"));
        let _ = std::fs::remove_file(&source);
        let link = format!("unix:{}", text(&self.path("link")));
        let args = ["migrate", "send", "--vm", vm, "--source", text(&source), "--link", &link, "--json", "--records"];
        start(&args, text(&records), more)
    }

    /// Moves a VM; `stopped` is called when all of the stream was sent, before the destination says that it has it.
    pub fn migrate(
        &self,
        vm: &str,
        stream: &[u8],
        sender: &[&str],
        receiver: &[&str],
        stopped: impl FnOnce() + Send,
    ) -> End {
        let destination = self.path("destination");
        let _ = std::fs::remove_file(&destination);
        let listener = UnixListener::bind(&destination).unwrap();
        let receiver = self.receiver(receiver);
        let mut sender = self.sender(vm, sender);
        let len = stream.len();
        thread::scope(|scope| {
            let there = scope.spawn(move || {
                let (mut socket, _) = listener.accept().unwrap();
                let mut got = vec![0; len];
                let mut done = 0;
                while done < len {
                    match socket.read(&mut got[done..]) {
                        Ok(n @ 1..) => done += n,
                        _ => break,
                    }
                }
                got.truncate(done);
                if done == len {
                    stopped();
                    let _ = socket.write_all(&SHUT_OK);
                    let _ = socket.read(&mut [0]);
                }
                got
            });
            let moved = until(&self.path("source"), &mut sender) && send(&self.path("source"), stream);
            let (sent, received) = (sender.wait_with_output().unwrap(), receiver.wait_with_output().unwrap());
            // A destination that nobody came to.
            let _ = UnixStream::connect(&destination);
            End { sent, received, got: there.join().unwrap(), moved }
        })
    }
}

/// QEMU at the source: true if it was told that the VM has moved.
pub fn send(path: &Path, stream: &[u8]) -> bool {
    let Some(mut socket) = connect(path) else { return false };
    if socket.write_all(stream).is_err() {
        return false;
    }
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(&SHUT_OK) && socket.read(&mut byte).is_ok_and(|n| n > 0) {
        answer.extend(byte);
    }
    answer.ends_with(&SHUT_OK)
}

/// Connects to a socket that may have its name before somebody listens.
pub fn connect(path: &Path) -> Option<UnixStream> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => return Some(socket),
            Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(2));
            }
            Err(_) => return None,
        }
    }
}

fn start(args: &[&str], records: &str, more: &[&str]) -> Child {
    let mut command = vmar(&[args, &[records], more].concat());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits until a socket is there; false if the process has ended before.
fn until(path: &Path, child: &mut Child) -> bool {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !path.exists() {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(Instant::now() < deadline, "no {} after a minute", path.display());
        thread::sleep(Duration::from_millis(2));
    }
    true
}
