//! What the end-to-end tests share: the binary under test, a running server, and a libblkio client.
#![allow(dead_code, clippy::unwrap_used, clippy::cast_possible_truncation)]

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

/// The binary under test with these arguments.
pub fn vmar(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmar"));
    command.args(args).env_remove("VMAR_LIBRARY").env_remove("VMAR_STATE_DIR");
    command
}

/// Runs it to its end.
pub fn run(args: &[&str]) -> Output {
    vmar(args).output().unwrap()
}

/// Runs it and expects success; gives its standard output.
pub fn ok(args: &[&str]) -> String {
    let out = run(args);
    assert!(out.status.success(), "vmar {args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// Runs it and expects failure with one line; gives that line.
pub fn fails(args: &[&str]) -> String {
    let out = run(args);
    let err = String::from_utf8(out.stderr).unwrap();
    assert!(!out.status.success(), "vmar {args:?} succeeded");
    assert_eq!(err.trim_end().lines().count(), 1, "one line: {err}");
    assert!(!err.contains("panicked"), "{err}");
    err
}

/// Runs a tool that the tests need. A missing tool is a failure, never a skip.
pub fn tool(name: &str, args: &[&str]) -> String {
    let out = Command::new(name).args(args).output().unwrap_or_else(|e| panic!("{name} is needed for the tests: {e}"));
    assert!(
        out.status.success(),
        "{name} {args:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A directory with a library in it, and a place for live state.
pub struct Bench {
    pub dir: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        Bench { dir: tempfile::tempdir().unwrap() }
    }

    /// The same with an empty library.
    pub fn with_library() -> Self {
        let bench = Bench::new();
        // The images of tests are small: with the default policy few of their runs would leave them.
        ok(&["library", "init", text(&bench.library()), "--policy", "paper"]);
        bench
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn library(&self) -> PathBuf {
        self.path("lib")
    }

    /// Writes a raw image file.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// Adds images given as `NAME=FILE`.
    pub fn add(&self, images: &[String]) {
        let mut args = vec!["--library", self.library().to_str().unwrap(), "image", "add"]
            .into_iter()
            .map(String::from)
            .collect::<Vec<_>>();
        args.extend(images.iter().cloned());
        ok(&args.iter().map(String::as_str).collect::<Vec<_>>());
    }

    pub fn overlay(&self, image: &str) -> PathBuf {
        let path = self.path(&format!("{image}.qcow2"));
        ok(&["--library", text(&self.library()), "overlay", "create", text(&path), "--image", image]);
        path
    }

    /// Starts `vmar serve` with these arguments on a socket of its own.
    pub fn serve(&self, args: &[&str]) -> Server {
        let socket = self.path(&format!("s{}", rand_suffix()));
        let state = self.path("state");
        let library = self.library();
        let mut all = vec!["serve", "--socket-path", text(&socket), "--state-dir", text(&state)];
        if library.exists() {
            all.extend(["--library", text(&library)]);
        }
        all.extend(args);
        Server::start(vmar(&all), socket)
    }

    /// Serves an image with an overlay.
    pub fn serve_overlay(&self, image: &str, overlay: &Path) -> Server {
        self.serve(&["--image", image, "--overlay", text(overlay)])
    }
}

fn rand_suffix() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A running `vmar serve`; killed when dropped.
pub struct Server {
    pub child: Child,
    pub socket: PathBuf,
}

impl Server {
    pub fn start(mut command: Command, socket: PathBuf) -> Server {
        let child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut server = Server { child, socket };
        let deadline = Instant::now() + Duration::from_secs(10);
        while !server.socket.exists() {
            if let Some(status) = server.child.try_wait().unwrap() {
                panic!("vmar serve ended with {status}: {}", server.stderr());
            }
            assert!(Instant::now() < deadline, "no socket after 10 s");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    pub fn client(&self) -> Client {
        Client::connect(&self.socket, 1, false)
    }

    /// SIGTERM, and what came of it.
    pub fn stop(mut self) -> (ExitStatus, String) {
        signal(self.child.id(), libc::SIGTERM);
        let status = wait(&mut self.child, Duration::from_secs(20));
        let err = self.stderr();
        (status, err)
    }

    /// kill -9.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    fn stderr(&mut self) -> String {
        use std::io::Read;
        let mut out = String::new();
        if let Some(mut pipe) = self.child.stderr.take() {
            pipe.read_to_string(&mut out).unwrap();
        }
        out
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn signal(pid: u32, signal: i32) {
    // SAFETY: kill has no memory effects here.
    assert_eq!(unsafe { libc::kill(pid as i32, signal) }, 0);
}

pub fn wait(child: &mut Child, limit: Duration) -> ExitStatus {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "still running after {limit:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Bytes of client memory for data.
const POOL: usize = 8 << 20;

/// A libblkio client: a vhost-user-blk driver that nobody here wrote.
pub struct Client {
    pub queues: Vec<Blkioq>,
    region: MemoryRegion,
    pub blkio: Blkio,
}

// SAFETY: the region's memory belongs to this client alone.
unsafe impl Send for Client {}

impl Client {
    pub fn connect(socket: &Path, queues: i32, read_only: bool) -> Client {
        let mut blkio = Blkio::new("virtio-blk-vhost-user").unwrap();
        blkio.set_bool("read-only", read_only).unwrap();
        blkio.set_str("path", text(socket)).unwrap();
        blkio.connect().unwrap();
        blkio.set_i32("num-queues", queues).unwrap();
        let queues = blkio.start().unwrap().queues;
        let region = blkio.alloc_mem_region(POOL).unwrap();
        blkio.map_mem_region(&region).unwrap();
        Client { queues, region, blkio }
    }

    pub fn capacity(&self) -> u64 {
        self.blkio.get_u64("capacity").unwrap()
    }

    /// The client's memory from byte `at` on.
    pub fn memory(&mut self, at: usize, len: usize) -> &mut [u8] {
        assert!(at + len <= POOL);
        // SAFETY: the region is mapped as long as the client lives, and the borrow is exclusive; the device writes to it
        // only while a request is in flight.
        unsafe { std::slice::from_raw_parts_mut((self.region.addr + at) as *mut u8, len) }
    }

    fn ptr(&self, at: usize) -> *mut u8 {
        (self.region.addr + at) as *mut u8
    }

    /// Waits for `n` completions of queue `q`: (user data, result).
    pub fn wait(&mut self, q: usize, n: usize) -> Vec<(usize, i32)> {
        let mut out = Vec::new();
        let mut limit = Duration::from_secs(30);
        while out.len() < n {
            let mut done: Vec<MaybeUninit<Completion>> = (0..n - out.len()).map(|_| MaybeUninit::uninit()).collect();
            let got = self.queues[q].do_io(&mut done, 1, Some(&mut limit), None).expect("a completion within 30 s");
            for c in done.into_iter().take(got) {
                // SAFETY: the first `got` completions are filled in.
                let c = unsafe { c.assume_init() };
                out.push((c.user_data, c.ret));
            }
        }
        out
    }

    /// Hands what was queued to the server without waiting for anything.
    pub fn kick(&mut self, q: usize) {
        assert_eq!(self.queues[q].do_io(&mut [], 0, None, None).unwrap(), 0);
    }

    pub fn submit_read(&mut self, q: usize, offset: u64, at: usize, len: usize, id: usize) {
        let ptr = self.ptr(at);
        self.queues[q].read(offset, ptr, len, id, ReqFlags::empty());
    }

    pub fn submit_write(&mut self, q: usize, offset: u64, at: usize, len: usize, id: usize) {
        let ptr = self.ptr(at);
        self.queues[q].write(offset, ptr, len, id, ReqFlags::empty());
    }

    /// Reads; 0 or a negative errno.
    pub fn try_read(&mut self, offset: u64, len: usize) -> Result<Vec<u8>, i32> {
        self.memory(0, len).fill(0xA5);
        self.submit_read(0, offset, 0, len, 1);
        match self.wait(0, 1)[0].1 {
            0 => Ok(self.memory(0, len).to_vec()),
            e => Err(e),
        }
    }

    pub fn read(&mut self, offset: u64, len: usize) -> Vec<u8> {
        self.try_read(offset, len).unwrap()
    }

    pub fn try_write(&mut self, offset: u64, bytes: &[u8]) -> i32 {
        self.memory(0, bytes.len()).copy_from_slice(bytes);
        self.submit_write(0, offset, 0, bytes.len(), 1);
        self.wait(0, 1)[0].1
    }

    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        assert_eq!(self.try_write(offset, bytes), 0);
    }

    pub fn flush(&mut self) {
        self.queues[0].flush(1, ReqFlags::empty());
        assert_eq!(self.wait(0, 1)[0].1, 0);
    }

    pub fn write_zeroes(&mut self, offset: u64, len: u64, unmap: bool) {
        let flags = if unmap { ReqFlags::empty() } else { ReqFlags::NO_UNMAP };
        self.queues[0].write_zeroes(offset, len, 1, flags);
        assert_eq!(self.wait(0, 1)[0].1, 0);
    }

    /// Calls `check(offset, bytes)` with the whole disk, piece by piece, several reads in flight.
    pub fn read_all(&mut self, piece: usize, mut check: impl FnMut(u64, &[u8])) {
        let capacity = self.capacity();
        let depth = (POOL / piece).min(32);
        let mut next = 0u64;
        let mut offsets = vec![0u64; depth];
        let mut idle: Vec<usize> = (0..depth).collect();
        let mut flying = 0;
        loop {
            while next < capacity
                && let Some(slot) = idle.pop()
            {
                let len = piece.min((capacity - next) as usize);
                self.memory(slot * piece, len).fill(0xA5);
                self.submit_read(0, next, slot * piece, len, slot);
                offsets[slot] = next;
                next += len as u64;
                flying += 1;
            }
            if flying == 0 {
                return;
            }
            for (slot, ret) in self.wait(0, 1) {
                assert_eq!(ret, 0, "read at {}", offsets[slot]);
                let len = piece.min((capacity - offsets[slot]) as usize);
                let offset = offsets[slot];
                check(offset, self.memory(slot * piece, len));
                idle.push(slot);
                flying -= 1;
            }
        }
    }
}
