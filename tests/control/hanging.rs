//! A file that hangs on demand: a FUSE file system of one file, served by the test itself. When the test ends, however it
//! ends, the kernel aborts what still waits.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
/// FORGET, INTERRUPT and BATCH_FORGET have no answer.
const SILENT: [u32; 3] = [2, 36, 42];
const IN_HEADER: usize = 40;

#[derive(Default)]
struct State {
    content: Vec<u8>,
    /// Requests of this kind get no answer for now.
    held: Option<u32>,
    waiting: Vec<Vec<u8>>,
    /// What a write takes.
    write_time: Duration,
}

/// The file; unmounted when dropped.
pub struct Hanging {
    pub path: PathBuf,
    device: Arc<File>,
    state: Arc<Mutex<State>>,
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

impl Hanging {
    /// Mounts it over a file at `path`.
    pub fn new(path: &Path, content: Vec<u8>) -> Hanging {
        File::create(path).unwrap();
        let device = Arc::new(File::options().read(true).write(true).open("/dev/fuse").unwrap());
        let options = format!("fd={},rootmode=100644,user_id=0,group_id=0,allow_other\0", device.as_raw_fd());
        let target = [path.as_os_str().as_bytes(), b"\0"].concat();
        // SAFETY: all strings end with a zero byte.
        let mounted = unsafe {
            libc::mount(c"vmar-test".as_ptr(), target.as_ptr().cast(), c"fuse".as_ptr(), 0, options.as_ptr().cast())
        };
        assert_eq!(mounted, 0, "mount FUSE: {}", std::io::Error::last_os_error());
        let state = Arc::new(Mutex::new(State { content, ..State::default() }));
        std::thread::spawn({
            let (device, state) = (Arc::clone(&device), Arc::clone(&state));
            move || {
                let mut bytes = vec![0; 1 << 20];
                while let Ok(n) = (&*device).read(&mut bytes) {
                    let mut state = state.lock().unwrap();
                    let request = bytes[..n].to_vec();
                    if state.held == Some(word(&request, 4)) {
                        state.waiting.push(request);
                    } else {
                        if word(&request, 4) == WRITE {
                            std::thread::sleep(state.write_time);
                        }
                        answer(&device, &mut state, &request);
                    }
                }
            }
        });
        Hanging { path: path.to_path_buf(), device, state }
    }

    fn hold(&self, kind: u32) {
        self.state.lock().unwrap().held = Some(kind);
    }

    /// From now on reads hang.
    pub fn hold_reads(&self) {
        self.hold(READ);
    }

    /// From now on writes hang.
    pub fn hold_writes(&self) {
        self.hold(WRITE);
    }

    /// From now on fsyncs hang.
    pub fn hold_fsyncs(&self) {
        self.hold(FSYNC);
    }

    /// From now on each write takes that long.
    pub fn slow_writes(&self, time: Duration) {
        self.state.lock().unwrap().write_time = time;
    }

    /// Waits until something hangs.
    pub fn wait_for_hang(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.state.lock().unwrap().waiting.is_empty() {
            assert!(Instant::now() < deadline, "nothing came to hang");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Answers what hangs, and goes on.
    pub fn release(&self) {
        let mut state = self.state.lock().unwrap();
        state.held = None;
        for request in std::mem::take(&mut state.waiting) {
            answer(&self.device, &mut state, &request);
        }
    }

    pub fn content(&self) -> Vec<u8> {
        self.state.lock().unwrap().content.clone()
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.release();
        let target = [self.path.as_os_str().as_bytes(), b"\0"].concat();
        // SAFETY: the path ends with a zero byte.
        unsafe { libc::umount2(target.as_ptr().cast(), libc::MNT_DETACH | libc::MNT_FORCE) };
    }
}

fn answer(device: &File, state: &mut State, request: &[u8]) {
    let (kind, unique, body) = (word(request, 4), long(request, 8), &request[IN_HEADER..]);
    if SILENT.contains(&kind) {
        return;
    }
    let attributes = || {
        let size = state.content.len() as u64;
        let longs = [1, size, size / 512, 0, 0, 0];
        let rest = words(&[0, 0, 0, 0o100_644, 1, 0, 0, 0, 4096, 0]);
        [longs.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<u8>>(), rest].concat()
    };
    let (error, out) = match kind {
        // Version 7.31; no readahead; FUSE_ASYNC_READ, so that who only asks for a read does not wait for it; 16 background
        // requests; writes of 128 KiB.
        INIT => (0, words(&[7, 31, 0, 1, 12 << 16 | 16, 128 << 10, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
        GETATTR | SETATTR => (0, [vec![0; 16], attributes()].concat()),
        OPEN => (0, vec![0; 16]),
        READ => {
            let (offset, size) = (long(body, 8) as usize, word(body, 16) as usize);
            let end = (offset + size).min(state.content.len());
            (0, state.content[offset.min(end)..end].to_vec())
        }
        WRITE => {
            let (offset, size) = (long(body, 8) as usize, word(body, 16) as usize);
            state.content[offset..offset + size].copy_from_slice(&body[40..40 + size]);
            (0, words(&[size as u32, 0]))
        }
        RELEASE | FSYNC | FLUSH => (0, Vec::new()),
        _ => (-libc::ENOSYS, Vec::new()),
    };
    let mut reply = words(&[16 + out.len() as u32, error as u32]);
    reply.extend(unique.to_le_bytes());
    reply.extend(out);
    // A request that was aborted takes no answer.
    let _ = (&*device).write(&reply);
}
