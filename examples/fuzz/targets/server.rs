//! `vmar serve` as a child process: a panic, an abort or a signal ends it, and it alone.

use super::Setup;
use super::frontend::{FEATURES, Frontend};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Bytes of the disk: not a whole number of clusters of the overlay.
pub const DISK: usize = (1 << 20) + 5 * 512;
/// Its sectors.
pub const SECTORS: u64 = DISK as u64 / 512;
/// Queues that it offers.
pub const QUEUES: u16 = 4;
/// Bytes of the log that are kept.
const LOG_MAX: usize = 64 << 10;
/// Bytes of memory that the server may use: it has few requests in flight, and none is large.
const RSS_MAX_KIB: u64 = 1 << 20;

/// What is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disk {
    /// A raw file, written in place.
    Flat,
    /// An overlay that is a little larger than its image.
    Overlay,
}

pub struct Server {
    child: Child,
    pub socket: PathBuf,
    /// The raw file, if that is what is served.
    file: Option<PathBuf>,
    log: Arc<Mutex<String>>,
    baseline: Option<(usize, usize)>,
}

pub fn pattern() -> Vec<u8> {
    (0..DISK).map(|i| (i / 512 * 31 + i * 7) as u8).collect()
}

fn vmar(setup: &Setup, args: &[&str]) {
    let out = (setup.vmar)().args(args).output().unwrap();
    assert!(out.status.success(), "vmar {args:?}: {}", String::from_utf8_lossy(&out.stderr));
}

impl Server {
    /// Starts one in a directory of its own.
    pub fn start(setup: &Setup, disk: Disk) -> Server {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let dir = setup.dir.join(format!("s{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir_all(&dir).unwrap();
        let at = |name: &str| dir.join(name).to_str().unwrap().to_string();
        let (raw, socket, state) = (at("disk"), at("socket"), at("state"));
        let mut args = vec!["serve".to_string(), "--socket-path".into(), socket.clone()];
        args.extend(["--num-queues".into(), QUEUES.to_string()]);
        let file = match disk {
            Disk::Flat => {
                fs::write(&raw, pattern()).unwrap();
                args.extend(["--blk-file".into(), raw.clone()]);
                Some(PathBuf::from(raw))
            }
            Disk::Overlay => {
                // Its last sectors are only in the overlay.
                fs::write(&raw, &pattern()[..DISK - 3 * 512]).unwrap();
                let (library, overlay) = (at("lib"), at("o.qcow2"));
                vmar(setup, &["library", "init", &library]);
                vmar(setup, &["--library", &library, "image", "add", &format!("web={raw}")]);
                let size = DISK.to_string();
                vmar(setup, &["--library", &library, "overlay", "create", &overlay, "--image", "web", "--size", &size]);
                args.extend(["--library", &library, "--image", "web", "--overlay", &overlay].map(String::from));
                args.extend(["--state-dir".into(), state]);
                None
            }
        };
        let mut command = (setup.vmar)();
        command.args(&args).env("RUST_BACKTRACE", "1").stderr(Stdio::piped()).stdin(Stdio::null());
        die_with_parent(&mut command);
        let mut child = command.spawn().unwrap();
        let mut pipe = child.stderr.take().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        std::thread::spawn({
            let log = Arc::clone(&log);
            move || {
                let mut bytes = [0; 4096];
                while let Ok(n @ 1..) = pipe.read(&mut bytes) {
                    let mut log = log.lock().unwrap();
                    log.push_str(&String::from_utf8_lossy(&bytes[..n]));
                    if log.len() > LOG_MAX && !log.contains("panicked") {
                        let mut cut = log.len() - LOG_MAX / 2;
                        while !log.is_char_boundary(cut) {
                            cut += 1;
                        }
                        log.drain(..cut);
                    }
                }
            }
        });
        let mut server = Server { child, socket: socket.into(), file, log, baseline: None };
        let deadline = Instant::now() + Duration::from_secs(30);
        while !server.socket.exists() {
            server.alive().unwrap();
            assert!(Instant::now() < deadline, "no socket after 30 s");
            std::thread::sleep(Duration::from_millis(2));
        }
        server
    }

    /// An error with the end of the log if the server is dead or a thread of it panicked.
    pub fn alive(&mut self) -> Result<(), String> {
        let status = self.child.try_wait().unwrap();
        let log = self.log.lock().unwrap().clone();
        if status.is_none() && !log.contains("panicked") {
            return Ok(());
        }
        // Give the pipe a moment to deliver the last words.
        std::thread::sleep(Duration::from_millis(100));
        let log = self.log.lock().unwrap().clone();
        let last: Vec<&str> = match log.find("panicked") {
            Some(at) => log[log[..at].rfind('\n').map_or(0, |n| n + 1)..].lines().take(12).collect(),
            None => log.lines().rev().take(6).collect(),
        };
        Err(format!("the server ended ({status:?}): {}", last.join(" | ")))
    }

    /// Waits a little for a server that may be dying to be dead, then says how.
    pub fn last_words(&mut self, why: &str) -> String {
        std::thread::sleep(Duration::from_millis(200));
        match self.alive() {
            Err(dead) => format!("{dead} ({why})"),
            Ok(()) => why.to_string(),
        }
    }

    /// What the raw file holds; `None` for an overlay.
    pub fn content(&self) -> Option<Vec<u8>> {
        self.file.as_ref().map(|f| fs::read(f).unwrap())
    }

    fn proc(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/{name}", self.child.id()))
    }

    /// Threads and open descriptors.
    fn holds(&self) -> (usize, usize) {
        let count = |name| fs::read_dir(self.proc(name)).map_or(0, |d| d.count());
        (count("task"), count("fd"))
    }

    fn rss_kib(&self) -> u64 {
        let status = fs::read_to_string(self.proc("status")).unwrap_or_default();
        let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"));
        line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse().ok()).unwrap_or(0)
    }

    /// The server lives; a new connection reads what the file holds; nothing of earlier connections is left over.
    pub fn check(&mut self) -> Result<(), String> {
        self.alive()?;
        let mut f = connect(&self.socket).map_err(|e| self.last_words(&e))?;
        if let Some(content) = self.content() {
            for sector in [0, SECTORS / 2, SECTORS - 8] {
                if f.read(0, sector, 4096) != content[sector as usize * 512..][..4096] {
                    return Err(format!("sector {sector} reads wrong on a new connection"));
                }
            }
        } else {
            f.read(0, SECTORS - 8, 4096);
        }
        // Now it holds this connection, its ring and its thread; the two helper threads (flushes, slow writes) may have
        // been started by anyone, and stay.
        let holds = self.holds();
        let first = *self.baseline.get_or_insert(holds);
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut now = holds;
        while (now.0 > first.0 + 2 || now.1 > first.1) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
            now = self.holds();
        }
        if now.0 > first.0 + 2 || now.1 > first.1 {
            return Err(format!("threads and descriptors: {now:?}, at first {first:?}"));
        }
        let rss = self.rss_kib();
        if rss > RSS_MAX_KIB {
            return Err(format!("{} MiB of memory", rss >> 10));
        }
        drop(f);
        self.alive()
    }
}

/// A connection with one ring; what goes wrong is a panic of the frontend, here an error.
pub fn connect(socket: &Path) -> Result<Frontend, String> {
    let made = std::panic::catch_unwind(|| Frontend::connect(socket, FEATURES, 1, 16));
    made.map_err(|_| "a new connection is not served".to_string())
}

/// A worker that is killed must not leave servers behind.
fn die_with_parent(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    // SAFETY: one system call, which is safe between fork and exec.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            Ok(())
        })
    };
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(dir) = self.socket.parent() {
            let _ = fs::remove_dir_all(dir);
        }
    }
}
