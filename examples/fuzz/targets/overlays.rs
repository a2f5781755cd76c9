//! Overlays to be damaged: made by the library itself, with a flat model of what they hold.

use super::rng::Rng;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use vmar::io::IoBuf;
use vmar::overlay::{BaseIdentity, BaseRead, CreateOptions, OpenOptions, Overlay, State, create};

/// A step of the guest. Places and lengths in sectors; what is past the end is cut off.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Op {
    Write { sector: u64, count: u64, fill: u8 },
    Zero { sector: u64, count: u64, unmap: bool },
    Flush,
}

/// An overlay and its life so far.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Seed {
    /// Sectors of the base image, and how many more the disk has.
    pub base: u64,
    pub more: u64,
    pub ops: Vec<Op>,
    /// Sectors that the disk can grow by while it is in use.
    #[serde(default)]
    pub spare: u64,
    /// The process was killed: the session is open, and there is a live bitmap.
    pub killed: bool,
}

/// The most sectors that a base, and the rest of a disk, may have.
const SECTORS_MAX: u64 = 300;

/// The base image below every seed: each sector is different.
pub struct Base(Vec<u8>);

impl BaseRead for Base {
    fn read_base(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        for (i, b) in buf.iter_mut().enumerate() {
            *b = self.0.get(offset as usize + i).copied().unwrap_or(0);
        }
        Ok(())
    }
}

/// A place for one overlay.
pub struct Place {
    dir: PathBuf,
    pub overlay: PathBuf,
    pub state: PathBuf,
}

/// A seed that was carried out.
pub struct Made {
    pub base: Base,
    pub identity: BaseIdentity,
    /// What a guest reads.
    pub model: Vec<u8>,
}

impl Seed {
    pub fn random(rng: &mut Rng) -> Seed {
        let (base, more) = (1 + rng.below(SECTORS_MAX - 1), if rng.chance(1, 2) { 0 } else { rng.below(SECTORS_MAX) });
        let mut seed = Seed { base, more, ops: vec![], spare: 0, killed: rng.chance(1, 3) };
        if rng.chance(1, 4) {
            seed.spare = rng.below(4 * SECTORS_MAX);
        }
        (0..rng.below(6)).for_each(|_| seed.push(rng));
        seed
    }

    pub fn push(&mut self, rng: &mut Rng) {
        let (sector, count) = (rng.below(self.base + self.more + 1), 1 + rng.below(rng.clone().one_of(&[3, 8, 140])));
        self.ops.push(match rng.below(5) {
            0 => Op::Flush,
            1 => Op::Zero { sector, count, unmap: rng.chance(1, 2) },
            _ => Op::Write { sector, count, fill: 1 + rng.below(255) as u8 },
        });
    }
}

/// Writes as a queue thread does: the fast path first.
pub fn write(o: &Overlay, base: &Base, offset: u64, bytes: &[u8]) -> Result<(), String> {
    let mut mem = bytes.to_vec();
    // SAFETY: `mem` outlives the list, and nothing else looks at it meanwhile.
    let bufs = [unsafe { IoBuf::from_raw(mem.as_mut_ptr(), mem.len()) }];
    let said = |e: io::Error| format!("write of {} bytes at {offset}: {e}", bytes.len());
    if !o.try_write(offset, &bufs).map_err(said)? {
        o.write(offset, &bufs, base).map_err(said)?;
    }
    Ok(())
}

/// Reads all of the disk as the device does: run by run.
pub fn read(o: &Overlay, base: &Base) -> Result<Vec<u8>, String> {
    let mut all = vec![0xee; o.size() as usize];
    let mut at = 0;
    for run in o.runs(0, o.size()) {
        if run.offset != at || run.len == 0 || run.offset + run.len > o.size() {
            return Err(format!("a run at {at} of {}: {run:?}", o.size()));
        }
        let part = &mut all[run.offset as usize..][..run.len as usize];
        let read = match run.state {
            State::Base => base.read_base(run.offset, part),
            State::Data => o.file().read_exact_at(part, o.data_start() + run.offset),
            State::Zero => {
                part.fill(0);
                Ok(())
            }
        };
        read.map_err(|e| format!("{run:?} cannot be read: {e}"))?;
        at += run.len;
    }
    if at == o.size() { Ok(all) } else { Err(format!("the runs end at {at} of {}", o.size())) }
}

impl Place {
    pub fn new(dir: &Path) -> Place {
        fs::create_dir_all(dir).unwrap();
        Place { dir: dir.to_path_buf(), overlay: dir.join("o.qcow2"), state: dir.join("state") }
    }

    /// Makes the overlay of a seed; what was here before goes.
    pub fn make(&self, seed: &Seed) -> Result<Made, String> {
        let _ = fs::remove_file(&self.overlay);
        let _ = fs::remove_dir_all(&self.state);
        let base_len = seed.base.clamp(1, SECTORS_MAX) * 512;
        let size = base_len + seed.more.min(SECTORS_MAX) * 512;
        let base: Vec<u8> = (0..base_len).map(|i| (i / 512 * 37 % 251) as u8 + 1).collect();
        let backing = self.dir.join("base.raw");
        if fs::metadata(&backing).map_or(true, |m| m.len() != base_len) {
            fs::write(&backing, &base).map_err(|e| e.to_string())?;
        }
        let identity = BaseIdentity { digest: [0xb5; 32], generation: 1, size: base_len };
        let capacity = size + seed.spare.min(4 * SECTORS_MAX) * 512;
        let options = CreateOptions { backing: &backing, base: identity, size, capacity };
        create(&self.overlay, &options).map_err(|e| e.to_string())?;
        let mut model = base.clone();
        model.resize(size as usize, 0);
        let made = Made { base: Base(base), identity, model };
        let overlay = self.open(&made, false)?;
        let made = self.carry_out(seed, &overlay, made)?;
        if !seed.killed {
            overlay.close().map_err(|e| e.to_string())?;
        }
        Ok(made)
    }

    fn carry_out(&self, seed: &Seed, overlay: &Overlay, mut made: Made) -> Result<Made, String> {
        let sectors = made.model.len() as u64 / 512;
        let clip = |sector: u64, count: u64| {
            let first = sector.min(sectors);
            (first * 512, (count.min(sectors - first) * 512) as usize)
        };
        for op in &seed.ops {
            match *op {
                Op::Write { sector, count, fill } => {
                    let (at, len) = clip(sector, count);
                    if len > 0 {
                        write(overlay, &made.base, at, &vec![fill; len])?;
                        made.model[at as usize..][..len].fill(fill);
                    }
                }
                Op::Zero { sector, count, unmap } => {
                    let (at, len) = clip(sector, count);
                    overlay.write_zeroes(at, len as u64, unmap, &made.base).map_err(|e| e.to_string())?;
                    made.model[at as usize..][..len].fill(0);
                }
                Op::Flush => overlay.flush().map_err(|e| e.to_string())?,
            }
        }
        Ok(made)
    }

    pub fn open(&self, made: &Made, read_only: bool) -> Result<Overlay, String> {
        let opts =
            OpenOptions { read_only, state_dir: &self.state, base: Some(made.identity), discard_unflushed: false };
        let open = Overlay::open(&self.overlay, &opts);
        open.map_err(|e| {
            let text = e.to_string();
            assert_eq!(text.lines().count(), 1, "an error is one line: {text}");
            text
        })
    }

    /// The live bitmap, if there is one.
    pub fn live(&self) -> Option<PathBuf> {
        let mut entries = fs::read_dir(&self.state).ok()?;
        entries.find_map(|e| e.ok().map(|e| e.path()).filter(|p| p.extension().is_some_and(|x| x == "live")))
    }

    /// `qemu-img check` must find nothing.
    pub fn qemu_check(&self) -> Result<(), String> {
        let out = Command::new("qemu-img").args(["check", "-U", "-f", "qcow2"]).arg(&self.overlay).output();
        let out = out.map_err(|e| format!("qemu-img is needed: {e}"))?;
        let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        if out.status.success() && text.contains("No errors were found") {
            return Ok(());
        }
        // The name of the backing file is for QEMU; vmar goes by the digest.
        if text.contains("Could not open backing file") {
            return Ok(());
        }
        Err(format!("vmar takes it, qemu-img check says: {}", text.replace('\n', "; ")))
    }

    /// What a guest may do with an overlay that was taken: reads, a write in the middle, a flush, the end, and again.
    pub fn use_it(&self, made: &mut Made, overlay: Overlay, exact: bool, kill: bool) -> Result<(), String> {
        if overlay.size() as usize > 4 << 20 {
            return Ok(());
        }
        let mut want = read(&overlay, &made.base)?;
        if exact && want != made.model {
            let at = (0..want.len()).find(|&i| want[i] != made.model[i]);
            return Err(format!("byte {at:?} of the disk is wrong"));
        }
        let at = want.len() / 1024 * 512;
        let part = 512.min(want.len() - at);
        write(&overlay, &made.base, at as u64, &vec![0x77; part])?;
        want[at..at + part].fill(0x77);
        overlay.write_zeroes(0, 512, true, &made.base).map_err(|e| e.to_string())?;
        want[..512].fill(0);
        overlay.flush().map_err(|e| e.to_string())?;
        if read(&overlay, &made.base)? != want {
            return Err("the disk changed elsewhere than it was written".into());
        }
        if !kill {
            overlay.close().map_err(|e| format!("close: {e}"))?;
        }
        drop(overlay);
        let again = self.open(made, true).map_err(|e| format!("taken once, then refused: {e}"))?;
        if read(&again, &made.base)? != want {
            return Err("the disk is another one after it was opened again".into());
        }
        Ok(())
    }
}
