//! A base, an overlay on it, and contents by which each sector tells who wrote it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use vmar::io::IoBuf;
use vmar::io::fault::Faults;
use vmar::overlay::{self, BaseIdentity, BaseRead, CreateOptions, OpenOptions, Overlay, State};

pub const SECTOR: usize = 512;

/// The author of zeros. Author 0 is the base.
pub const ZERO: u64 = u64::MAX;

/// The eight bytes that fill a sector: its author and its place. Never 0, but for zeros.
pub fn unit(author: u64, sector: u64) -> u64 {
    if author == ZERO { 0 } else { author << 20 | (sector + 1) }
}

/// Fills whole sectors, of which the first is `sector`, with what `author` writes.
pub fn fill(bytes: &mut [u8], author: u64, sector: u64) {
    for (n, bytes) in bytes.chunks_mut(SECTOR).enumerate() {
        let unit = unit(author, sector + n as u64).to_le_bytes();
        bytes.chunks_mut(8).for_each(|b| b.copy_from_slice(&unit));
    }
}

/// The units of a sector.
pub fn units(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b))
}

/// Random numbers that repeat with their seed (splitmix64).
#[derive(Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        let mut rng = Rng(seed);
        rng.next();
        rng
    }

    /// One for part `n` of what `seed` stands for.
    pub fn part(seed: u64, n: u64) -> Rng {
        Rng::new(seed.wrapping_mul(0x9e37_79b9).wrapping_add(n) ^ n << 40)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// Once in `n` times.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

pub struct Rig {
    dir: tempfile::TempDir,
    pub base_path: PathBuf,
    pub overlay: PathBuf,
    pub base_size: u64,
    /// Bytes that the disk has at first, and that it can grow to.
    pub size: u64,
    pub capacity: u64,
}

impl BaseRead for Rig {
    fn read_base(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        let inside = (self.base_size.saturating_sub(offset) as usize).min(buf.len());
        fill(&mut buf[..inside], 0, offset / SECTOR as u64);
        Ok(())
    }
}

impl Rig {
    pub fn new(base_size: u64, size: u64, capacity: u64) -> Rig {
        let dir = tempfile::tempdir().unwrap();
        let (base_path, overlay) = (dir.path().join("base.raw"), dir.path().join("o.qcow2"));
        let mut base = vec![0; base_size as usize];
        fill(&mut base, 0, 0);
        fs::write(&base_path, &base).unwrap();
        let rig = Rig { dir, base_path, overlay, base_size, size, capacity };
        let base = rig.identity();
        let opts = CreateOptions { backing: &rig.base_path, base, size, capacity };
        overlay::create(&rig.overlay, &opts).unwrap();
        rig
    }

    pub fn identity(&self) -> BaseIdentity {
        BaseIdentity { digest: [0xb5; 32], generation: 1, size: self.base_size }
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub fn state_dir(&self) -> PathBuf {
        self.dir().join("state")
    }

    /// Sectors that the disk may have one day.
    pub fn sectors(&self) -> u64 {
        self.capacity / SECTOR as u64
    }

    /// Who wrote a sector of the new overlay: zeros from the end of the base on, also in what is added later.
    pub fn first_author(&self, sector: u64) -> u64 {
        if sector * (SECTOR as u64) < self.base_size { 0 } else { ZERO }
    }

    pub fn open(&self, faults: Option<Arc<dyn Faults>>, discard_unflushed: bool) -> vmar::Result<Overlay> {
        let state_dir = &self.state_dir();
        let opts = OpenOptions { read_only: false, state_dir, base: Some(self.identity()), discard_unflushed };
        Overlay::open_with_faults(&self.overlay, &opts, faults)
    }

    /// Opens a copy as it is after a reboot: no live bitmap anywhere.
    pub fn open_copy(&self, path: &Path, read_only: bool) -> vmar::Result<Overlay> {
        let state_dir = &self.dir().join("state of a copy");
        let _ = fs::remove_dir_all(state_dir);
        let opts = OpenOptions { read_only, state_dir, base: Some(self.identity()), discard_unflushed: false };
        Overlay::open(path, &opts)
    }

    /// The whole disk as a guest sees it.
    pub fn read_all(&self, o: &Overlay) -> Vec<u8> {
        let mut all = vec![0xee; o.size() as usize];
        for run in o.runs(0, o.size()) {
            let part = &mut all[run.offset as usize..][..run.len as usize];
            match run.state {
                State::Base => self.read_base(run.offset, part).unwrap(),
                State::Data => o.file().read_exact_at(part, o.data_start() + run.offset).unwrap(),
                State::Zero => part.fill(0),
            }
        }
        all
    }
}

/// `mem` as a list of two pieces; the caller keeps it alive and unused while the list is in use.
pub fn iobufs(mem: &mut [u8]) -> Vec<IoBuf> {
    let (a, b) = mem.split_at_mut(mem.len() / 3);
    // SAFETY: see above.
    [a, b].map(|m| unsafe { IoBuf::from_raw(m.as_mut_ptr(), m.len()) }).to_vec()
}

/// What `qemu-img check` has against an overlay.
pub fn qemu_check(path: &Path) -> Result<(), String> {
    let out = Command::new("qemu-img").args(["check", "-U", "-f", "qcow2"]).arg(path).output();
    let out = out.unwrap_or_else(|e| panic!("qemu-img: {e} (install qemu-utils)"));
    let text = String::from_utf8_lossy(&out.stdout);
    if out.status.success() && text.contains("No errors were found") {
        return Ok(());
    }
    Err(format!("qemu-img check: {} {text}{}", out.status, String::from_utf8_lossy(&out.stderr)))
}

/// The whole disk as plain QEMU sees it.
pub fn qemu_read(path: &Path) -> Vec<u8> {
    let raw = path.with_extension("raw");
    let out = Command::new("qemu-img").args(["convert", "-U", "-f", "qcow2", "-O", "raw"]).arg(path).arg(&raw).output();
    let out = out.unwrap_or_else(|e| panic!("qemu-img: {e} (install qemu-utils)"));
    assert!(out.status.success(), "qemu-img convert: {}", String::from_utf8_lossy(&out.stderr));
    let bytes = fs::read(&raw).unwrap();
    fs::remove_file(&raw).unwrap();
    bytes
}

/// What a guest asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    Read,
    Write,
    /// Discard is write-zeroes with unmap.
    Zero {
        unmap: bool,
    },
    Flush,
}

/// A random request: mostly small ones, half of them in one place so that they meet.
pub fn random_request(rng: &mut Rng, sectors: u64) -> (Action, u64, u64) {
    let action = match rng.below(100) {
        0..25 => Action::Read,
        25..70 => Action::Write,
        70..83 => Action::Zero { unmap: true },
        83..93 => Action::Zero { unmap: false },
        _ => Action::Flush,
    };
    let count = match rng.below(20) {
        0..11 => 1 + rng.below(3),
        11..18 => 1 + rng.below(64),
        _ => 1 + rng.below(300),
    };
    const HOT: u64 = 256;
    let at = if rng.one_in(2) { sectors / 3 + rng.below(HOT) } else { rng.below(sectors) };
    // Whole subclusters now and then: they take no fill.
    let (at, count) = if rng.one_in(4) { (at / 4 * 4, count.next_multiple_of(4)) } else { (at, count) };
    let at = at.min(sectors - 1);
    (action, at, count.min(sectors - at))
}
