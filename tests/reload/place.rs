//! A library of which each image has several maps, and a server to ask.

use crate::common::{Bench, Server, ok, text, vmar};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmar::daemon::passing;
use vmar::library::Library;
use vmar::map::{EntryBuilder, Map, MapSpec, build};

pub const BLOCK: usize = 4096;

/// A small generator of its own, so that every run sees the same.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() >> 16) as usize % n
    }
}

fn content(n: u64) -> Vec<u8> {
    let mut rng = Rng(n.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
    (0..BLOCK / 8).flat_map(|_| rng.next().to_le_bytes()).collect()
}

/// An image of runs, short and long, from a common pool of contents: shared, zero and its own blocks.
pub fn image(seed: u64, blocks: usize) -> Vec<u8> {
    let mut rng = Rng(seed);
    let mut out = Vec::with_capacity((blocks + 40) * BLOCK);
    while out.len() < blocks * BLOCK {
        let most = if rng.below(3) == 0 { 40 } else { 10 };
        let run = 1 + rng.below(most);
        let start = rng.below(blocks) as u64;
        let kind = rng.below(10);
        for i in 0..run as u64 {
            match kind {
                0..=1 => out.extend([0u8; BLOCK]),
                2 => out.extend(content(seed << 32 | rng.next() & 0xFFFF)),
                _ => out.extend(content(start + i)),
            }
        }
    }
    out.truncate(blocks * BLOCK);
    out
}

pub const NAMES: [&str; 4] = ["zero", "one", "two", "three"];

/// Images that share, and for each three maps: of the policies paper and bridge, and one that leads nowhere else.
pub struct Place {
    pub bench: Bench,
    pub images: Vec<Vec<u8>>,
}

pub const PAPER: usize = 0;
pub const BRIDGE: usize = 1;
pub const OWN: usize = 2;

impl Place {
    pub fn new(blocks: usize) -> Place {
        let bench = Bench::with_library();
        let images: Vec<Vec<u8>> = (0..NAMES.len()).map(|i| image(i as u64 + 1, blocks)).collect();
        let add: Vec<String> = NAMES
            .iter()
            .zip(&images)
            .map(|(name, bytes)| format!("{name}={}", text(&bench.file(&format!("{name}.raw"), bytes))))
            .collect();
        bench.add(&add);
        let place = Place { bench, images };
        place.keep(PAPER);
        place.remap("bridge");
        place.keep(BRIDGE);
        for (name, bytes) in NAMES.iter().zip(&place.images) {
            fs::write(place.kept(OWN, name), own_map(&place.map(name), bytes)).unwrap();
        }
        place
    }

    pub fn library(&self) -> PathBuf {
        self.bench.library()
    }

    /// The map that the library has now.
    pub fn map(&self, name: &str) -> PathBuf {
        self.library().join(format!("maps/{name}.map"))
    }

    pub fn kept(&self, which: usize, name: &str) -> PathBuf {
        self.bench.path(&format!("{which}-{name}.map"))
    }

    fn keep(&self, which: usize) {
        for name in NAMES {
            fs::copy(self.map(name), self.kept(which, name)).unwrap();
        }
    }

    /// Gives the library another map of the image, as a remap does.
    pub fn put(&self, which: usize, name: &str) {
        let new = self.library().join(format!("staging/{name}.test"));
        fs::copy(self.kept(which, name), &new).unwrap();
        fs::rename(new, self.map(name)).unwrap();
    }

    pub fn remap(&self, policy: &str) {
        ok(&["--library", text(&self.library()), "library", "remap", "--policy", policy]);
    }

    pub fn control(&self, name: &str) -> PathBuf {
        self.bench.path(&format!("{name}.control"))
    }

    /// Serves with a control socket.
    pub fn serve(&self, name: &str, rest: &[&str]) -> Server {
        let control = self.control(name);
        self.bench.serve(&[&["--image", name, "--control", text(&control)], rest].concat())
    }

    /// The files that a reload to that map needs, and the line that goes with them.
    pub fn request(&self, which: usize, name: &str) -> (Value, Vec<File>) {
        let library = Library::open(self.library()).unwrap();
        let path = self.kept(which, name);
        let map = Map::new(fs::read(&path).unwrap()).unwrap();
        let mut files = vec![File::open(path).unwrap()];
        let mut targets = Vec::new();
        for (target, _) in map.targets() {
            targets.push(json!({"image": target.image.0, "generation": target.generation, "fd": files.len()}));
            files.push(library.open_image(library.image_by_id(target.image).unwrap()).unwrap());
        }
        (json!({"execute": "reload", "arguments": {"map": 0, "targets": targets}}), files)
    }
}

/// A map that leads to the image itself alone.
fn own_map(like: &Path, bytes: &[u8]) -> Vec<u8> {
    let like = Map::new(fs::read(like).unwrap()).unwrap();
    let mut entries = EntryBuilder::new();
    for (block, bytes) in bytes.chunks(BLOCK).enumerate() {
        if bytes.iter().any(|b| *b != 0) {
            entries.push(block as u32, 0, block as u32);
        }
    }
    let source = like.source();
    build(&MapSpec { source, policy: 0, targets: vec![source], entries: entries.finish() }).unwrap()
}

/// Asks a server, passing descriptors.
pub fn ask(control: &Path, request: &Value, files: &[File]) -> Value {
    let stream = UnixStream::connect(control).unwrap();
    ask_by(&stream, request.to_string().as_bytes(), files).unwrap()
}

/// The same on an open connection; none if the server ends it.
pub fn ask_by(stream: &UnixStream, line: &[u8], files: &[File]) -> Option<Value> {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let fds: Vec<_> = files.iter().map(File::as_fd).collect();
    passing::send(stream, &[line, b"\n"].concat(), &fds).ok()?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).ok()?;
    (!answer.is_empty()).then(|| serde_json::from_str(&answer).unwrap())
}

/// What 'reload' without descriptors answers.
pub fn reload(control: &Path) -> Value {
    let answer = ask(control, &json!({"execute": "reload"}), &[]);
    assert!(answer["return"].is_object(), "{answer}");
    answer["return"].clone()
}

/// What is open in a process, of the files in that directory: descriptors, and mappings.
pub fn open_below(pid: u32, dir: &Path) -> (Vec<String>, Vec<String>) {
    let inside = |name: &str| name.strip_prefix(text(dir)).map(|rest| rest.trim_start_matches('/').to_string());
    let mut fds: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|fd| inside(fs::read_link(fd.unwrap().path()).ok()?.to_str()?))
        .collect();
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mut mapped: Vec<String> = maps
        .lines()
        .filter_map(|line| inside(&line[line.find('/')?..]))
        .filter(|n| !n.contains(" (deleted)"))
        .collect();
    fds.sort_unstable();
    mapped.sort_unstable();
    mapped.dedup();
    (fds, mapped)
}

/// Descriptors of a process.
pub fn fd_count(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// The images that a process has open.
pub fn open_images(pid: u32, place: &Place) -> Vec<String> {
    let (mut fds, mapped) = open_below(pid, place.bench.dir.path());
    fds.retain(|name| name.ends_with(".raw"));
    let raw: Vec<&String> = mapped.iter().filter(|name| name.ends_with(".raw")).collect();
    assert_eq!(fds.iter().collect::<Vec<_>>(), raw, "each is mapped, and nothing else");
    fds
}

pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// `vmar` with this library; gives standard error, with what is logged.
pub fn logged(place: &Place, args: &[&str]) -> String {
    let out = vmar(&[&["--library", text(&place.library())], args].concat()).env("RUST_LOG", "info").output().unwrap();
    let err = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success(), "{err}");
    err
}
