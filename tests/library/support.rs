//! A library in a temporary directory, and the binary to work on it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::AtomicBool;
use tempfile::TempDir;
use vmar::fingerprint::Algorithm;
use vmar::indexer::add::{Added, NewImage, add};
use vmar::indexer::{Silent, Work};
use vmar::library::{Library, Policy, Writer};

pub const BLOCK: usize = 4096;

pub static GO_ON: AtomicBool = AtomicBool::new(false);

/// Two workers, nobody watching.
pub fn work() -> Work<'static> {
    Work { threads: 2, stop: &GO_ON, observer: &Silent, memory: vmar::indexer::MEMORY_DEFAULT }
}

/// A directory with an empty library in `lib` and room for images.
pub struct Place {
    dir: TempDir,
}

impl Place {
    /// With the policy `paper`.
    pub fn new() -> Place {
        Place::with(Policy::Paper)
    }

    pub fn with(policy: Policy) -> Place {
        let place = Place { dir: tempfile::tempdir().unwrap() };
        Library::init(place.lib(), policy, Algorithm::Sha1).unwrap();
        place
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn lib(&self) -> PathBuf {
        self.dir().join("lib")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir().join(name)
    }

    pub fn library(&self) -> Library {
        Library::open(self.lib()).unwrap()
    }

    /// Writes a raw image: blocks that are all zero become holes unless `written` says so.
    pub fn raw(&self, name: &str, bytes: &[u8], written: impl Fn(usize) -> bool) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).unwrap();
        file.set_len(bytes.len() as u64).unwrap();
        for (i, block) in bytes.chunks(BLOCK).enumerate() {
            if written(i) || block.iter().any(|&b| b != 0) {
                file.write_all_at(block, (i * BLOCK) as u64).unwrap();
            }
        }
        path
    }

    /// Adds images in this process.
    pub fn add(&self, images: &[(&str, &Path)]) -> vmar::Result<Vec<Added>> {
        let new: Vec<NewImage> =
            images.iter().map(|(name, file)| NewImage { name: name.to_string(), file: file.to_path_buf() }).collect();
        add(&mut Writer::open(self.lib())?, &new, &work())
    }

    /// The binary, for this library.
    pub fn vmar(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmar"));
        command.arg("--library").arg(self.lib()).env_remove("VMAR_LIBRARY").env_remove("RUST_LOG");
        command
    }

    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> Output {
        self.vmar().args(args).output().unwrap()
    }

    /// Runs the binary, which must succeed; returns what it printed.
    pub fn ok<S: AsRef<std::ffi::OsStr>>(&self, args: &[S]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs the binary, which must fail with this status and one line; returns the line.
    pub fn fails<S: AsRef<std::ffi::OsStr>>(&self, status: i32, args: &[S]) -> String {
        one_line(self.run(args), status)
    }

    /// Every file of the library but the lock, with its content, so that "nothing changed" can be said exactly. (Of the
    /// catalog all but the count of its changes.)
    pub fn snapshot(&self) -> Vec<(PathBuf, Vec<u8>)> {
        let mut out = Vec::new();
        for sub in ["", "runs", "maps", "index", "images", "staging"] {
            for entry in fs::read_dir(self.lib().join(sub)).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() && path.file_name().unwrap() != "lock" {
                    let mut bytes = fs::read(&path).unwrap();
                    if path.file_name().unwrap() == "library.json" {
                        bytes = without_counter(&bytes);
                    }
                    out.push((path.strip_prefix(self.lib()).unwrap().to_path_buf(), bytes));
                }
            }
        }
        out.sort();
        out
    }

    /// The files are exactly those that the catalog names.
    pub fn assert_no_leftovers(&self) {
        let library = self.library();
        let mut want: Vec<PathBuf> = vec!["library.json".into()];
        for record in library.images() {
            want.push(record.run.file.clone());
            want.push(format!("maps/{}.map", record.name).into());
            want.extend(record.chunks.as_ref().map(|c| c.file.clone()));
            if record.owned() {
                want.push(record.path.clone());
            }
        }
        // Images that are gone, and whose files are going, or went.
        want.extend(library.catalog().removed.iter().map(|r| r.path.clone()).filter(|p| self.lib().join(p).exists()));
        for index in library.catalog().index.values() {
            want.push(index.sets.clone());
            want.extend(index.tables.iter().map(|t| t.file.clone()));
        }
        want.sort();
        let have: Vec<PathBuf> = self.snapshot().into_iter().map(|(path, _)| path).collect();
        assert_eq!(have, want);
    }
}

fn without_counter(catalog: &[u8]) -> Vec<u8> {
    let mut value: serde_json::Value = serde_json::from_slice(catalog).unwrap();
    for field in ["sequence", "crc32c"] {
        value[field] = 0.into();
    }
    value.to_string().into_bytes()
}

/// The one line that a failed command printed, progress aside.
pub fn one_line(output: Output, status: i32) -> String {
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{text}");
    let lines: Vec<&str> = text.lines().filter(|l| l.starts_with("vmar: ")).collect();
    assert_eq!(lines.len(), 1, "{text}");
    assert!(!text.contains("panicked"), "{text}");
    lines[0].to_string()
}

impl Place {
    /// A `PATH` on which `qemu-img convert` first runs this shell command.
    pub fn fake_qemu_img(&self, first: &str) -> std::ffi::OsString {
        use std::os::unix::fs::PermissionsExt;
        let bin = self.path("bin");
        fs::create_dir(&bin).unwrap();
        let path = std::env::var_os("PATH").unwrap();
        let rest = path.to_str().unwrap();
        let text =
            format!("#!/bin/sh\nPATH='{rest}'\nif [ \"$1\" = convert ]; then {first}; fi\nexec qemu-img \"$@\"\n");
        let tool = bin.join("qemu-img");
        fs::write(&tool, text).unwrap();
        fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).unwrap();
        bin.into_os_string()
    }
}

/// `NAME=FILE`.
pub fn named(name: &str, path: &Path) -> String {
    format!("{name}={}", path.display())
}

/// Content number `k` of a block: 0 is zeros; 1 and 2, 3 and 4, … 7 and 8 are pairs with one SHA-1; the others differ.
pub fn content(k: u32) -> Vec<u8> {
    let prefixes: [&[u8]; 2] =
        [include_bytes!("../data/shattered-1.prefix"), include_bytes!("../data/shattered-2.prefix")];
    match k {
        0 => vec![0; BLOCK],
        1..=8 => {
            let mut block = prefixes[(k as usize - 1) % 2].to_vec();
            block.resize(BLOCK, (k as u8 - 1) / 2);
            block
        }
        _ => noise(u64::from(k), BLOCK),
    }
}

/// Bytes that look random, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 32);
    let mut counter = 0u64;
    while out.len() < len {
        out.extend_from_slice(blake3::hash(&[seed.to_le_bytes(), counter.to_le_bytes()].concat()).as_bytes());
        counter += 1;
    }
    out.truncate(len);
    out
}

/// An image of these contents, one a block, and `tail` bytes of a further one.
pub fn image_of(contents: &[u32], tail: Option<(u32, usize)>) -> Vec<u8> {
    let mut bytes: Vec<u8> = contents.iter().flat_map(|&k| content(k)).collect();
    if let Some((k, len)) = tail {
        bytes.extend_from_slice(&content(k)[..len]);
    }
    bytes
}

/// Runs `qemu-img`, which these tests need.
pub fn qemu_img(args: &[&std::ffi::OsStr]) {
    let output = Command::new("qemu-img").args(args).output().expect("qemu-img is missing: apt install qemu-utils");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
