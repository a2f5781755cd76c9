//! A base image, an overlay on it, a state directory, and QEMU's tools to look at them with.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use vmar::io::IoBuf;
use vmar::overlay::{self, BaseIdentity, BaseRead, CreateOptions, OpenOptions, Overlay, State};

pub struct Fixture {
    pub dir: tempfile::TempDir,
    pub base_path: PathBuf,
    pub base: Vec<u8>,
    pub overlay: PathBuf,
    size: u64,
    pub capacity: u64,
}

impl BaseRead for Fixture {
    fn read_base(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        base_at(&self.base, offset, buf);
        Ok(())
    }
}

pub fn base_at(base: &[u8], offset: u64, buf: &mut [u8]) {
    for (i, b) in buf.iter_mut().enumerate() {
        *b = base.get(offset as usize + i).copied().unwrap_or(0);
    }
}

impl Fixture {
    /// 4 MiB base and disk.
    pub fn new() -> Fixture {
        Fixture::with_sizes(4 << 20, 4 << 20)
    }

    pub fn with_sizes(base_size: u64, size: u64) -> Fixture {
        Fixture::with_capacity(base_size, size, size)
    }

    pub fn with_capacity(base_size: u64, size: u64, capacity: u64) -> Fixture {
        let dir = tempfile::tempdir().unwrap();
        let base_path = dir.path().join("base.raw");
        // Every sector is different, so that a wrong one shows.
        let base: Vec<u8> = (0..base_size / 512).flat_map(|s| [(s * 37 % 251) as u8 + 1; 512]).collect();
        fs::write(&base_path, &base).unwrap();
        let overlay = dir.path().join("o.qcow2");
        let fx = Fixture { dir, base_path, base, overlay, size, capacity };
        overlay::create(&fx.overlay, &fx.create_options()).unwrap();
        fx
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    pub fn identity(&self) -> BaseIdentity {
        BaseIdentity { digest: [0xb5; 32], generation: 1, size: self.base.len() as u64 }
    }

    pub fn create_options(&self) -> CreateOptions<'_> {
        CreateOptions { backing: &self.base_path, base: self.identity(), size: self.size, capacity: self.capacity }
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir.path().join("state")
    }

    pub fn live_files(&self) -> Vec<PathBuf> {
        match fs::read_dir(self.state_dir()) {
            Ok(entries) => entries.map(|e| e.unwrap().path()).collect(),
            Err(_) => Vec::new(),
        }
    }

    pub fn try_open(&self) -> vmar::Result<Overlay> {
        self.open_with(&self.overlay, false, false)
    }

    pub fn open(&self) -> Overlay {
        self.try_open().unwrap()
    }

    pub fn open_read_only(&self) -> vmar::Result<Overlay> {
        self.open_with(&self.overlay, true, false)
    }

    pub fn open_discarding(&self) -> vmar::Result<Overlay> {
        self.open_with(&self.overlay, false, true)
    }

    pub fn open_with(&self, path: &Path, read_only: bool, discard_unflushed: bool) -> vmar::Result<Overlay> {
        let state_dir = self.state_dir();
        let base = Some(self.identity());
        Overlay::open(path, &OpenOptions { read_only, state_dir: &state_dir, base, discard_unflushed })
    }
}

/// `mem` as a list of two pieces. The tests keep `mem` alive and unused while the list is in use.
pub fn iobufs(mem: &mut [u8]) -> Vec<IoBuf> {
    let (a, b) = mem.split_at_mut(mem.len() / 3);
    // SAFETY: see above.
    [a, b].map(|m| unsafe { IoBuf::from_raw(m.as_mut_ptr(), m.len()) }).to_vec()
}

/// Writes as a queue thread does: the fast path first.
pub fn write(o: &Overlay, base: &dyn BaseRead, offset: u64, bytes: &[u8]) {
    let mut mem = bytes.to_vec();
    let bufs = iobufs(&mut mem);
    if !o.try_write(offset, &bufs).unwrap() {
        o.write(offset, &bufs, base).unwrap();
    }
}

/// Reads as the device does: run by run.
pub fn read(o: &Overlay, base: &dyn BaseRead, offset: u64, buf: &mut [u8]) {
    let mut at = offset;
    for run in o.runs(offset, buf.len() as u64) {
        assert_eq!(run.offset, at);
        let part = &mut buf[(run.offset - offset) as usize..][..run.len as usize];
        match run.state {
            State::Base => base.read_base(run.offset, part).unwrap(),
            State::Data => o.file().read_exact_at(part, o.data_start() + run.offset).unwrap(),
            State::Zero => part.fill(0),
        }
        at += run.len;
    }
    assert_eq!(at, offset + buf.len() as u64);
}

pub fn read_all(o: &Overlay, base: &dyn BaseRead) -> Vec<u8> {
    let mut all = vec![0xee; o.size() as usize];
    read(o, base, 0, &mut all);
    all
}

pub fn path_str(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Runs a QEMU tool, which must succeed, and gives its output. A missing tool fails the test.
pub fn qemu(command: &[&str]) -> String {
    let out = Command::new(command[0]).args(&command[1..]).output();
    let out = out.unwrap_or_else(|e| panic!("{}: {e} (install qemu-utils)", command[0]));
    let (stdout, stderr) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    assert!(out.status.success(), "{command:?}: {}\n{stdout}{stderr}", out.status);
    stdout.into_owned()
}

/// `qemu-img check` finds nothing: no error, no leak.
pub fn qemu_check(path: &Path) {
    let text = qemu(&["qemu-img", "check", "-U", path_str(path)]);
    assert!(text.contains("No errors were found"), "{text}");
}

/// What plain QEMU reads from the overlay.
pub fn convert(fx: &Fixture) -> Vec<u8> {
    let raw = fx.dir.path().join("converted.raw");
    qemu(&["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", path_str(&fx.overlay), path_str(&raw)]);
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(&raw).unwrap();
    bytes
}

/// Overwrites bytes of a file.
pub fn patch(path: &Path, at: u64, bytes: &[u8]) {
    File::options().write(true).open(path).unwrap().write_all_at(bytes, at).unwrap();
}

/// Runs `qemu-io` commands on the overlay, opened for writing.
pub fn qemu_io(fx: &Fixture, commands: &[&str]) {
    let mut line = vec!["qemu-io", "-f", "qcow2"];
    for command in commands {
        line.extend(["-c", command]);
    }
    line.push(path_str(&fx.overlay));
    let text = qemu(&line);
    assert!(!text.contains("failed"), "{text}");
}
