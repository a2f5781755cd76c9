//! The images, the library and the files of the subjects, in a directory that goes away at the end.

use crate::Result;
use crate::stream::Rng;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Bytes of a run of the redirected image that comes from one base image.
const RUN: u64 = 16 << 20;
const BLOCK: u64 = 4096;

/// Where everything is.
#[derive(Debug)]
pub struct Rig {
    dir: tempfile::TempDir,
    /// Live state of overlays: on tmpfs, as in real use.
    state: tempfile::TempDir,
    vmar: PathBuf,
}

/// Runs a command to its end.
///
/// # Errors
/// One line with its own words.
pub fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let out = command.output().map_err(|e| match e.kind() {
        std::io::ErrorKind::NotFound => format!("{program} is not there: {}", how_to_install(&program)),
        _ => format!("{program}: {e}"),
    })?;
    if out.status.success() {
        return Ok(String::from_utf8_lossy(&out.stdout).into_owned());
    }
    let words = String::from_utf8_lossy(&out.stderr).split_whitespace().collect::<Vec<_>>().join(" ");
    Err(format!("{program} ended with {}: {words}", out.status))
}

fn how_to_install(program: &str) -> &'static str {
    match program {
        "qemu-img" => "apt-get install qemu-utils",
        "qemu-storage-daemon" => {
            "apt-get install qemu-system-common (Debian 12) or qemu-storage-daemon, or name it with --qsd; or leave it out: --subjects vmar,vmar-flat,floor"
        }
        _ => "give its path",
    }
}

impl Rig {
    /// Makes the images and indexes them.
    ///
    /// `a` and `b` are random; `redirected` is runs of both, so that all of it is read from them in long runs; each 64 KiB of
    /// `scattered` are 16 blocks from 16 distant places of both; `flat.raw` has the bytes of `redirected`, outside the library.
    pub fn new(below: &Path, vmar: PathBuf, bytes: u64) -> Result<Rig> {
        let make = |below: &Path| {
            let made = tempfile::Builder::new().prefix("vmar-peer.").tempdir_in(below);
            made.map_err(|e| format!("{}: {e}: name another place with --dir", below.display()))
        };
        let tmpfs = Path::new("/dev/shm");
        let rig = Rig { dir: make(below)?, state: make(if tmpfs.is_dir() { tmpfs } else { below })?, vmar };
        for (name, seed) in [("a", 1), ("b", 2)] {
            let mut rng = Rng::new(seed);
            rig.write(&format!("{name}.raw"), bytes, 1 << 20, |_, piece| {
                rng.fill(piece);
                Ok(())
            })?;
        }
        let sources = [File::open(rig.path("a.raw")), File::open(rig.path("b.raw"))];
        let sources = sources.into_iter().collect::<std::io::Result<Vec<_>>>().map_err(|e| e.to_string())?;
        let read = |source: u64, piece: &mut [u8], at: u64| {
            use std::os::unix::fs::FileExt;
            sources[(source % 2) as usize].read_exact_at(piece, at).map_err(|e| format!("the images: {e}"))
        };
        for name in ["redirected.raw", "flat.raw"] {
            rig.write(name, bytes, 1 << 20, |at, piece| read(at / RUN, piece, at))?;
        }
        // A stride that is odd visits every block of a power of two, and neighbours are far from each other.
        let blocks = bytes / BLOCK;
        let span = 1 << blocks.ilog2();
        let place = |i: u64| if i < span { i.wrapping_mul(0x9E37_79B1) % span } else { i };
        rig.write("scattered.raw", bytes, BLOCK, |at, piece| read(at / BLOCK, piece, place(at / BLOCK) * BLOCK))?;
        drop(sources);

        // With the default policy runs as short as those of `scattered` would stay where they are.
        run(rig.vmar(&["library", "init", "--policy", "paper"]).arg(rig.library()))?;
        let mut add = rig.vmar(&["image", "add"]);
        add.arg("--library").arg(rig.library());
        for name in ["a", "b", "redirected", "scattered"] {
            add.arg(format!("{name}={}", rig.path(&format!("{name}.raw")).display()));
        }
        run(&mut add)?;
        rig.check_map(blocks)?;
        Ok(rig)
    }

    fn write(
        &self,
        name: &str,
        bytes: u64,
        piece: u64,
        mut fill: impl FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let path = self.path(name);
        let say = |e| format!("{}: {e}", path.display());
        let mut out = std::io::BufWriter::with_capacity(1 << 20, File::create(&path).map_err(say)?);
        let mut buffer = vec![0; piece as usize];
        for at in (0..bytes).step_by(piece as usize) {
            fill(at, &mut buffer)?;
            out.write_all(&buffer).map_err(say)?;
        }
        out.into_inner().map_err(|e| say(e.into_error()))?.sync_all().map_err(say)
    }

    /// The figures mean nothing unless the map does what the scenarios say.
    fn check_map(&self, blocks: u64) -> Result<()> {
        let text = run(self.vmar(&["stats", "--json", "--library"]).arg(self.library()))?;
        let stats: serde_json::Value = serde_json::from_str(&text).map_err(|e| format!("vmar stats: {e}"))?;
        for (name, entries) in [("redirected", 1..=blocks / 64), ("scattered", blocks * 9 / 10..=blocks)] {
            let images = stats["images"].as_array().into_iter().flatten();
            let image = images.into_iter().find(|i| i["name"] == name).ok_or_else(|| format!("{name} is missing"))?;
            let (redirected, found) = (image["redirected_blocks"].as_u64(), image["entries"].as_u64());
            if redirected != Some(blocks) || !found.is_some_and(|n| entries.contains(&n)) {
                return Err(format!(
                    "image {name} of {blocks} blocks has {redirected:?} redirected ones in {found:?} entries, not {entries:?}"
                ));
            }
        }
        Ok(())
    }

    /// The file of this name.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The library's directory.
    pub fn library(&self) -> PathBuf {
        self.path("library")
    }

    /// Where servers keep live state.
    pub fn state(&self) -> &Path {
        self.state.path()
    }

    /// A vmar command.
    pub fn vmar(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.vmar);
        command.args(args).env_remove("VMAR_LIBRARY").env_remove("VMAR_STATE_DIR");
        command
    }

    /// A copy of `flat.raw` for a subject that writes to it, the same one each time.
    pub fn scratch(&self, name: &str) -> Result<PathBuf> {
        let path = self.path(name);
        if !path.exists() {
            std::fs::copy(self.path("flat.raw"), &path).map_err(|e| format!("{}: {e}", path.display()))?;
        }
        Ok(path)
    }

    /// Writes everything back, so that one subject's dirty pages do not slow down the next.
    pub fn settle(&self) -> Result<()> {
        self.each_file(|file| file.sync_all())
    }

    /// Empties the page cache of every file. No server may run: what a process maps stays.
    ///
    /// # Errors
    /// If more than a hundredth of an image is still cached.
    pub fn drop_caches(&self) -> Result<()> {
        self.each_file(|file| {
            file.sync_all()?;
            // SAFETY: an advice about an open file touches no memory.
            match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
                0 => Ok(()),
                code => Err(std::io::Error::from_raw_os_error(code)),
            }
        })?;
        for name in ["a.raw", "b.raw", "flat.raw"] {
            let share = self.cached(&self.path(name))?;
            if share > 0.01 {
                return Err(format!("{name} is still cached ({:.0} %): is another process reading it?", share * 100.0));
            }
        }
        Ok(())
    }

    fn each_file(&self, mut act: impl FnMut(&File) -> std::io::Result<()>) -> Result<()> {
        let mut dirs = vec![self.dir.path().to_path_buf()];
        while let Some(dir) = dirs.pop() {
            let say = |path: &Path, e| format!("{}: {e}", path.display());
            for entry in std::fs::read_dir(&dir).map_err(|e| say(&dir, e))? {
                let entry = entry.map_err(|e| say(&dir, e))?;
                let kind = entry.file_type().map_err(|e| say(&dir, e))?;
                if kind.is_dir() {
                    dirs.push(entry.path());
                } else if kind.is_file() {
                    File::open(entry.path()).and_then(|file| act(&file)).map_err(|e| say(&entry.path(), e))?;
                }
            }
        }
        Ok(())
    }

    /// The share of a file that the page cache holds.
    fn cached(&self, path: &Path) -> Result<f64> {
        let say = |e| format!("{}: {e}", path.display());
        let file = File::open(path).map_err(say)?;
        // SAFETY: the map is asked about and never read, so nothing depends on what the file holds.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(say)?;
        let mut pages = vec![0u8; map.len().div_ceil(BLOCK as usize)];
        // SAFETY: the range is mapped, and `pages` has a byte for each of its pages.
        if unsafe { libc::mincore(map.as_ptr().cast_mut().cast(), map.len(), pages.as_mut_ptr()) } != 0 {
            return Err(say(std::io::Error::last_os_error()));
        }
        Ok(pages.iter().filter(|&&p| p & 1 == 1).count() as f64 / pages.len() as f64)
    }
}
