//! `vmar serve` against a guest and a frontend that do everything wrong: whatever they send, each head comes back once,
//! the status says the truth, nothing leaks or spins, and the next request gets the right bytes.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod chains;
#[path = "../common/mod.rs"]
mod common;
mod config;
mod dirty;
mod frontend;
mod inflight;
mod random;
mod rings;
mod socket;

use common::{Bench, Server, text};
use frontend::{FEATURES, Frontend};
use std::io::Read;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Bytes of the disk.
const DISK: usize = 4 << 20;
/// Its sectors.
const SECTORS: u64 = DISK as u64 / 512;

fn pattern() -> Vec<u8> {
    (0..DISK).map(|i| (i / 512 * 31 + i * 7) as u8).collect()
}

/// Reads what a server has to say: a full pipe would hold it up.
fn keep_log(server: &mut Server, log: &Arc<Mutex<String>>) {
    let mut pipe = server.child.stderr.take().unwrap();
    let log = Arc::clone(log);
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(n @ 1..) = pipe.read(&mut bytes) {
            log.lock().unwrap().push_str(&String::from_utf8_lossy(&bytes[..n]));
        }
    });
}

/// A server, and what its disk holds.
struct Target {
    server: Server,
    file: PathBuf,
    socket: PathBuf,
    bench: Bench,
    log: Arc<Mutex<String>>,
}

impl Target {
    fn start(args: &[&str]) -> Target {
        let bench = Bench::new();
        let file = bench.file("disk", &pattern());
        let mut server = bench.serve(&[&["--blk-file", text(&file)], args].concat());
        let socket = server.socket.clone();
        let log = Arc::default();
        keep_log(&mut server, &log);
        Target { server, file, socket, bench, log }
    }

    /// kill -9, and another process on another socket in its place.
    fn kill_and_start(&mut self) {
        self.server.child.kill().unwrap();
        self.server.child.wait().unwrap();
        self.server = self.bench.serve(&["--blk-file", text(&self.file)]);
        self.socket.clone_from(&self.server.socket);
        keep_log(&mut self.server, &self.log);
    }

    fn writable() -> Target {
        Target::start(&[])
    }

    fn connect(&self, features: u64, queues: u32, size: u16) -> Frontend {
        Frontend::connect(&self.socket, features, queues, size)
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(&self.file).unwrap()
    }

    /// The server lives, and a new connection reads what the file holds.
    fn check(&mut self) {
        if let Some(status) = self.server.child.try_wait().unwrap() {
            panic!("the server ended: {status}\n{}", self.log());
        }
        assert!(!self.log().contains("panicked"), "{}", self.log());
        let content = self.content();
        let mut f = self.connect(FEATURES, 1, 16);
        for sector in [0, 8, 4095, SECTORS - 8] {
            assert!(f.read(0, sector, 4096) == content[sector as usize * 512..][..4096], "sector {sector}");
        }
    }

    /// Nothing of the file is in the page cache any more: reads of it have to wait.
    fn go_cold(&self) {
        use std::os::fd::AsRawFd;
        let file = std::fs::File::open(&self.file).unwrap();
        file.sync_all().unwrap();
        // SAFETY: plain system call on an open descriptor.
        assert_eq!(unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) }, 0);
    }

    fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.server.child.id()))
    }

    /// Threads and open descriptors.
    fn holds(&self) -> (usize, usize) {
        let count = |name| std::fs::read_dir(self.proc(name)).unwrap().count();
        (count("task"), count("fd"))
    }

    /// Waits until it holds no more than that.
    fn holds_at_most(&self, limit: (usize, usize)) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let now = self.holds();
            if now.0 <= limit.0 && now.1 <= limit.1 {
                return;
            }
            assert!(Instant::now() < deadline, "threads and descriptors: {now:?}, before: {limit:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// CPU time so far, in ticks of 10 ms.
    fn ticks(&self) -> u64 {
        let stat = std::fs::read_to_string(self.proc("stat")).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    /// The server sleeps when there is nothing to do.
    fn is_idle(&self) {
        std::thread::sleep(Duration::from_millis(50));
        let before = self.ticks();
        std::thread::sleep(Duration::from_millis(500));
        let spent = self.ticks() - before;
        assert!(spent <= 4, "{spent} ticks of CPU in half a second of doing nothing\n{}", self.log());
    }
}
