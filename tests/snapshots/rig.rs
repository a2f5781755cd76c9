//! A host with stores, a library and overlays, and what the verbs say there.

use crate::common::*;
use crate::guest::*;
use crate::qemu::Qemu;
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};
use vmar::overlay::{BaseRead, OpenOptions, Overlay};

pub struct Rig {
    pub bench: Bench,
    pub stores: Vec<PathBuf>,
    next: AtomicUsize,
}

/// What a snapshot has to come back as.
pub struct Saved {
    pub name: String,
    pub stream: Vec<u8>,
}

impl Rig {
    /// With so many stores, which are not there yet.
    pub fn new(stores: usize) -> Rig {
        let bench = Bench::with_library();
        let stores = (0..stores).map(|n| bench.path(&format!("store{n}"))).collect();
        Rig { bench, stores, next: AtomicUsize::new(0) }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.bench.path(name)
    }

    /// A path that nobody has used.
    pub fn fresh(&self, name: &str) -> PathBuf {
        self.path(&format!("{name}{}", self.next.fetch_add(1, Ordering::Relaxed)))
    }

    /// Adds an image.
    pub fn image(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let file = self.bench.file(&format!("{name}.raw"), bytes);
        self.bench.add(&[format!("{name}={}", text(&file))]);
        file
    }

    pub fn running(&self, stream: &[u8]) -> Qemu {
        Qemu::running(self.fresh("qmp"), stream)
    }

    pub fn waiting(&self, stream: &[u8]) -> Qemu {
        Qemu::waiting(self.fresh("qmp"), stream.len())
    }

    /// `vmar snapshot VERB` with all stores.
    pub fn command(&self, verb: &str, args: &[&str]) -> Command {
        self.command_in(&self.stores, verb, args)
    }

    /// The same with these.
    pub fn command_in(&self, stores: &[PathBuf], verb: &str, args: &[&str]) -> Command {
        let mut command = vmar(&["--json", "--library", text(&self.bench.library()), "snapshot", verb]);
        command.args(args);
        for store in stores {
            command.arg("--store").arg(store);
        }
        command
    }

    pub fn run(&self, verb: &str, args: &[&str]) -> Output {
        self.command(verb, args).output().unwrap()
    }

    /// It goes well, and what it says.
    pub fn ok(&self, verb: &str, args: &[&str]) -> Value {
        went_well(self.run(verb, args))
    }

    /// Saves with these arguments more.
    pub fn save_with(&self, qemu: &Qemu, name: &str, more: &[&str]) -> Output {
        let (state, spool) = (self.path("state"), self.spool());
        let args = [name, "--qmp", text(&qemu.path), "--state-dir", text(&state), "--spool", text(&spool)];
        let disks: &[&str] = if more.contains(&"--overlay") { &[] } else { &["--memory-only"] };
        self.run("save", &[&args, disks, more].concat())
    }

    /// A directory for what is there for a while; nothing is left in it.
    pub fn spool(&self) -> PathBuf {
        let spool = self.path("spool");
        fs::create_dir_all(&spool).unwrap();
        spool
    }

    /// Saves a VM that runs, and runs and is set as before when that is done. What was said.
    pub fn save(&self, name: &str, vm: &Vm, more: &[&str]) -> (Saved, Value) {
        let stream = vm.stream();
        let qemu = self.running(&stream);
        let said = went_well(self.save_with(&qemu, name, more));
        as_before(&qemu);
        self.check_spool();
        (Saved { name: name.into(), stream }, said)
    }

    pub fn check_spool(&self) {
        assert_eq!(fs::read_dir(self.spool()).unwrap().count(), 0, "something is left in the spool");
    }

    /// Restores the memory into a QEMU that waits; the output, and what came.
    pub fn restore_in(&self, stores: &[PathBuf], saved: &Saved, more: &[&str]) -> (Output, Qemu) {
        let qemu = self.waiting(&saved.stream);
        let (state, spool) = (self.path("state"), self.spool());
        let args = [&saved.name, "--qmp", text(&qemu.path), "--state-dir", text(&state), "--spool", text(&spool)];
        let out = self.command_in(stores, "restore", &[&args, more].concat()).output().unwrap();
        (out, qemu)
    }

    /// It comes back byte for byte from these stores, and runs.
    pub fn comes_back_from(&self, stores: &[PathBuf], saved: &Saved, more: &[&str]) -> Value {
        let (out, qemu) = self.restore_in(stores, saved, more);
        let said = went_well(out);
        assert!(qemu.got() == saved.stream, "{} came back as something else", saved.name);
        assert_eq!(qemu.state().status, "running");
        self.check_spool();
        said
    }

    pub fn comes_back(&self, saved: &Saved) {
        self.comes_back_from(&self.stores, saved, &[]);
    }

    /// A new overlay on an image.
    pub fn overlay(&self, image: &str) -> Disk {
        let path = self.fresh("overlay");
        let library = self.bench.library();
        ok(&["--library", text(&library), "overlay", "create", text(&path), "--image", image]);
        let base = fs::read(self.path(&format!("{image}.raw"))).unwrap();
        Disk { path, state: self.path("state"), model: base.clone(), base }
    }

    /// What the disk of an overlay holds.
    pub fn disk(&self, overlay: &Path) -> Vec<u8> {
        assert!(vmar::overlay::check(overlay).unwrap().is_empty());
        let (library, state, to) = (self.bench.library(), self.path("state"), self.fresh("raw"));
        let args = ["--library", text(&library), "overlay", "commit", text(overlay), "--to", text(&to)];
        ok(&[&args[..], &["--state-dir", text(&state)]].concat());
        let bytes = fs::read(&to).unwrap();
        fs::remove_file(to).unwrap();
        bytes
    }

    /// Names of the packs of a store.
    pub fn packs(&self, store: usize) -> Vec<String> {
        names(&self.stores[store].join("packs"))
    }
}

pub fn names(dir: &Path) -> Vec<String> {
    let Ok(files) = fs::read_dir(dir) else { return Vec::new() };
    let mut out: Vec<String> = files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect();
    out.sort();
    out
}

/// All files below a directory.
pub fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut out = BTreeMap::new();
    let Ok(entries) = fs::read_dir(dir) else { return out };
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            out.extend(tree(&path));
        } else if path.is_file() {
            out.insert(path.clone(), fs::read(&path).unwrap());
        }
    }
    out
}

pub fn copy_all(from: &Path, to: &Path) {
    for (path, bytes) in tree(from) {
        let goal = to.join(path.strip_prefix(from).unwrap());
        fs::create_dir_all(goal.parent().unwrap()).unwrap();
        fs::write(goal, bytes).unwrap();
    }
}

pub fn went_well(out: Output) -> Value {
    let said = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && !said.contains("panicked"), "{said}");
    serde_json::from_slice(&out.stdout).unwrap_or(Value::Null)
}

/// It has failed with this status and one line that has all these words; progress and warnings of the log may stand before it.
pub fn line(out: &Output, status: i32, words: &[&str]) -> String {
    let said = String::from_utf8(out.stderr.clone()).unwrap();
    assert_eq!(out.status.code(), Some(status), "{words:?}: {said}");
    let told = |line: &&str| line.starts_with("vmar: ") || line.contains(" ERROR ") || line.contains("panicked");
    let lines: Vec<&str> = said.lines().filter(told).collect();
    assert_eq!(lines.len(), 1, "one line of an error: {said}");
    for word in words {
        assert!(lines[0].contains(word), "{word:?} is not in: {said}");
    }
    // File, cause and mend.
    assert!(lines[0].starts_with("vmar: ") && lines[0].contains(": ") && lines[0].contains("; "), "{said}");
    lines[0].into()
}

/// The VM runs, and QEMU is set as it was.
pub fn as_before(qemu: &Qemu) {
    let state = qemu.state();
    assert_eq!(state.status, "running", "{:?}", state.told);
    let on: Vec<&String> = state.capabilities.iter().filter(|(_, on)| **on).map(|(name, _)| name).collect();
    assert_eq!(on, ["events", "return-path", "xbzrle"], "{:?}", state.told);
    let parameters = serde_json::json!({"max-bandwidth": 134_217_728, "tls-creds": "", "downtime-limit": 300});
    assert_eq!(state.parameters, parameters);
}

/// An overlay, and what a guest sees of it.
pub struct Disk {
    pub path: PathBuf,
    state: PathBuf,
    base: Vec<u8>,
    pub model: Vec<u8>,
}

struct Base<'a>(&'a [u8]);

impl BaseRead for Base<'_> {
    fn read_base(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
        for (byte, at) in buf.iter_mut().zip(offset as usize..) {
            *byte = self.0.get(at).copied().unwrap_or(0);
        }
        Ok(())
    }
}

impl Disk {
    fn with(&self, then: impl FnOnce(&Overlay, &Base<'_>)) {
        let options = OpenOptions { read_only: false, state_dir: &self.state, base: None, discard_unflushed: false };
        let overlay = Overlay::open(&self.path, &options).unwrap();
        then(&overlay, &Base(&self.base));
        overlay.close().unwrap();
    }

    pub fn write(&mut self, at: usize, bytes: &[u8]) {
        self.with(|overlay, base| overlay.write_bytes(at as u64, bytes, base).unwrap());
        self.model[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub fn zero(&mut self, at: usize, len: usize) {
        self.with(|overlay, base| overlay.write_zeroes(at as u64, len as u64, true, base).unwrap());
        self.model[at..at + len].fill(0);
    }
}

/// A VM of one block of memory.
pub fn vm(pages: Vec<[u8; PAGE]>) -> Vm {
    Vm { machine: "pc-q35-9.2", return_path: false, blocks: vec![("pc.ram", pages)], section_pages: 700, again: vec![] }
}
