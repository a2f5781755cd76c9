//! `vmar image add` that is killed at a random instant.

use super::support::{Place, named, noise, qemu_img};
use rustix::process::{Pid, Signal, kill_process};
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use vmar::library::Writer;

/// A library with one image, and two more images to add: a raw one and a qcow2 one that share with it.
struct Scene {
    place: Place,
    args: [String; 2],
    /// How long an undisturbed add takes.
    time: Duration,
}

impl Scene {
    fn new() -> Scene {
        let place = Place::new();
        let base = noise(1, 24 << 20);
        let mut more = base.clone();
        more.rotate_left(5 << 20);
        more.extend_from_slice(&noise(2, 8 << 20));
        let base = place.raw("base.raw", &base, |_| false);
        let raw = place.raw("more.raw", &more, |_| false);
        let qcow2 = place.path("more.qcow2");
        let args = ["convert", "-f", "raw", "-O", "qcow2"].map(OsStr::new);
        qemu_img(&[&args[..], &[raw.as_os_str(), qcow2.as_os_str()]].concat());
        place.add(&[("base", &base)]).unwrap();
        let mut scene = Scene { place, args: [named("q", &qcow2), named("r", &raw)], time: Duration::ZERO };
        scene.save();
        let began = Instant::now();
        assert!(scene.start().wait().unwrap().success());
        scene.time = began.elapsed();
        scene.restore();
        scene
    }

    fn start(&self) -> Child {
        let mut command = self.place.vmar();
        command.args(["image", "add"]).args(&self.args);
        command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
    }

    fn saved(&self) -> PathBuf {
        self.place.path("saved")
    }

    fn save(&self) {
        copy(&self.place.lib(), &self.saved());
    }

    fn restore(&self) {
        fs::remove_dir_all(self.place.lib()).unwrap();
        copy(&self.saved(), &self.place.lib());
    }

    /// Before or after, and what is there is right. True for after.
    fn check(&self, with_recovery: bool) -> bool {
        if with_recovery {
            drop(Writer::open(self.place.lib()).unwrap());
        }
        self.place.assert_no_leftovers();
        let library = self.place.library();
        let names: Vec<&str> = library.images().iter().map(|r| r.name.as_str()).collect();
        assert!(names == ["base"] || names == ["base", "q", "r"], "{names:?}");
        self.place.ok(&["image", "verify"]);
        names.len() == 3
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, name) = entry.map(|e| (e.path(), e.file_name())).unwrap();
        if path.is_dir() {
            copy(&path, &to.join(name));
        } else {
            fs::copy(&path, to.join(name)).unwrap();
        }
    }
}

/// Processes whose command line names the library.
fn processes_of(place: &Place) -> Vec<String> {
    let wanted = place.lib().display().to_string();
    let lines = fs::read_dir("/proc").unwrap().filter_map(|e| fs::read(e.ok()?.path().join("cmdline")).ok());
    lines.map(|l| String::from_utf8_lossy(&l).replace('\0', " ")).filter(|l| l.contains(&wanted)).collect()
}

fn wait_until_gone(place: &Place) {
    for _ in 0..200 {
        if processes_of(place).is_empty() {
            return;
        }
        thread::sleep(Duration::from_millis(10));
    }
    panic!("still running: {:?}", processes_of(place));
}

/// Instants that cover the whole of an add, closer towards its end, where files move in place.
fn instants(time: Duration) -> impl Iterator<Item = Duration> {
    let even = (0..16).map(move |i| time * i / 16);
    let late = (0..24).map(move |i| time * 85 / 100 + time * i * 30 / (24 * 100));
    even.chain(late)
}

#[test]
fn kill_9_leaves_before_or_after_and_the_next_writer_cleans_up() {
    let scene = Scene::new();
    let (mut before, mut after) = (0, 0);
    for instant in instants(scene.time) {
        let mut child = scene.start();
        thread::sleep(instant);
        child.kill().unwrap();
        child.wait().unwrap();
        // The converter dies with its parent.
        wait_until_gone(&scene.place);
        if scene.check(true) {
            after += 1
        } else {
            before += 1
        }
        scene.restore();
    }
    assert!(before > 0, "some were killed in time ({before} before, {after} after)");
}

/// A converter that tells its process ID and then takes a minute.
#[test]
fn the_converter_dies_with_a_killed_add() {
    let scene = Scene::new();
    let pid_file = scene.place.path("pid");
    let path = scene.place.fake_qemu_img(&format!("echo $$ > {}; exec sleep 60", pid_file.display()));
    let mut child = scene.place.vmar().args(["image", "add", &scene.args[0]]).env("PATH", path).spawn().unwrap();
    let pid = loop {
        match fs::read_to_string(&pid_file).map(|text| text.trim().parse::<u32>()) {
            Ok(Ok(pid)) => break pid,
            _ => thread::sleep(Duration::from_millis(5)),
        }
    };
    let proc = PathBuf::from(format!("/proc/{pid}/cmdline"));
    assert!(proc.exists());
    child.kill().unwrap();
    child.wait().unwrap();
    let began = Instant::now();
    // Its new parent may take a while to collect it; a process that is only a name has no command line.
    while fs::read(&proc).is_ok_and(|line| !line.is_empty()) {
        assert!(began.elapsed() < Duration::from_secs(5), "the converter lives on");
        thread::sleep(Duration::from_millis(5));
    }
    assert!(!scene.check(true));
}

#[test]
fn ctrl_c_and_sigterm_clean_up_at_once() {
    let scene = Scene::new();
    for (signal, instant) in [Signal::INT, Signal::TERM].into_iter().cycle().zip(instants(scene.time)) {
        let child = scene.start();
        thread::sleep(instant);
        let pid = Pid::from_child(&child);
        let _ = kill_process(pid, signal);
        let began = Instant::now();
        let output = child.wait_with_output().unwrap();
        assert!(began.elapsed() < Duration::from_secs(5));
        let text = String::from_utf8_lossy(&output.stderr);
        // Before the handlers are in place the signal simply ends the process: nothing was begun then.
        let early = output.status.code().is_none();
        let after = scene.check(early);
        assert_eq!(after, output.status.success(), "{text}");
        if !after && !early {
            assert_eq!(output.status.code(), Some(1), "{text}");
            assert!(text.lines().last().unwrap().contains("stopped"), "{text}");
        }
        wait_until_gone(&scene.place);
        scene.restore();
    }
}

#[test]
fn two_adds_at_once_end_with_one_or_both_and_never_a_mixture() {
    let scene = Scene::new();
    let children = [scene.start(), scene.start()];
    let outputs = children.map(|c| c.wait_with_output().unwrap());
    assert!(outputs.iter().any(|o| o.status.success()));
    for output in outputs.iter().filter(|o| !o.status.success()) {
        let text = String::from_utf8_lossy(&output.stderr);
        // Refused by the lock, or, having come later, by the name.
        assert!(text.contains("is changing this library") || text.contains("already"), "{text}");
    }
    assert!(scene.check(false));
}
