//! A server's process: its start, its end, and what it costs.

use crate::Result;
use crate::throttle::Throttle;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A server that is told to end has this long.
const PATIENCE: Duration = Duration::from_secs(5);

/// A running server; killed when dropped.
#[derive(Debug)]
pub struct Server {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Server {
    /// Starts a server, within its limits from its first instruction, and waits until its socket is there.
    ///
    /// # Errors
    /// One line with the server's own words, if it cannot be started, ends, or has no socket after 20 s.
    pub fn start(name: &str, mut command: Command, socket: &Path, limits: &[&Throttle]) -> Result<Server> {
        let _ = std::fs::remove_file(socket);
        let log = socket.with_extension("log");
        let err = File::create(&log).map_err(|e| format!("{}: {e}", log.display()))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(err);
        let groups: Vec<_> = limits.iter().map(|limit| limit.entrance()).collect();
        // SAFETY: prctl and write are async-signal-safe, and the descriptors are open until the command is spawned. prctl lets
        // the server end with this program even if that is killed.
        unsafe {
            command.pre_exec(move || {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                match groups.iter().all(|fd| libc::write(*fd, c"0".as_ptr().cast(), 1) == 1) {
                    true => Ok(()),
                    false => Err(std::io::Error::last_os_error()),
                }
            });
        }
        let child = command.spawn().map_err(|e| format!("{name}: cannot start {:?}: {e}", command.get_program()))?;
        let mut server = Server { name: name.into(), child, log };
        let deadline = Instant::now() + Duration::from_secs(20);
        while !socket.exists() {
            server.check_alive()?;
            if Instant::now() > deadline {
                return Err(format!("{name}: no socket after 20 s: {}", server.words()));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(server)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// # Errors
    /// If it has ended, with its last words.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.child.try_wait() {
            Ok(None) => Ok(()),
            Ok(Some(status)) => Err(format!("{} ended with {status}: {}", self.name, self.words())),
            Err(e) => Err(format!("{}: {e}", self.name)),
        }
    }

    /// SIGTERM, as a supervisor would, and waits for the end: what is written must be out of the way of the next subject. One
    /// that does not end is named and killed: qemu-storage-daemon 7.2 with an I/O thread often hangs there.
    pub fn stop(mut self) {
        // SAFETY: kill has no memory effects; the child is not reaped yet, so the number is still its own.
        unsafe { libc::kill(self.child.id().cast_signed(), libc::SIGTERM) };
        let deadline = Instant::now() + PATIENCE;
        while matches!(self.child.try_wait(), Ok(None)) {
            if Instant::now() > deadline {
                eprintln!("{}: killed, as it still runs {PATIENCE:?} after SIGTERM: {}", self.name, self.words());
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn words(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        if text.is_empty() { "(it said nothing)".into() } else { text }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Nanoseconds of CPU that all threads of a process used, ended ones and the kernel's io_uring workers included.
///
/// # Errors
/// If there is no such process, or it belongs to somebody else.
pub fn cpu_ns(pid: u32) -> Result<u64> {
    let mut clock = 0;
    // SAFETY: `clock` outlives the call.
    let code = unsafe { libc::clock_getcpuclockid(pid.cast_signed(), &raw mut clock) };
    if code != 0 {
        return Err(format!("the CPU time of process {pid}: {}", std::io::Error::from_raw_os_error(code)));
    }
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `time` outlives the call.
    if unsafe { libc::clock_gettime(clock, &raw mut time) } != 0 {
        return Err(format!("the CPU time of process {pid}: {}", std::io::Error::last_os_error()));
    }
    Ok(time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
}

/// Bytes that all threads of a process made the disk read, the kernel's io_uring workers included; none if the kernel does
/// not count them.
pub fn disk_bytes(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/io")).ok()?;
    text.lines().find_map(|line| line.strip_prefix("read_bytes: "))?.parse().ok()
}

/// KiB of memory that the process has for itself: anonymous pages of its private mappings. Left out are the client's memory,
/// image files that are mapped, and the program's text, which more processes of it share: all of them are page cache.
///
/// # Errors
/// If the process is not there, or belongs to somebody else.
pub fn private_kib(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("{path}: {e}"))?;
    let mut is_private = false;
    let mut sum = 0;
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(first), Some(second)) = (words.next(), words.next()) else { continue };
        if !first.ends_with(':') {
            // The head of a mapping: "START-END rw-p ...".
            is_private = second.ends_with('p');
        } else if is_private && first == "Anonymous:" {
            sum += second.parse::<u64>().unwrap_or(0);
        }
    }
    Ok(sum)
}
