//! Power loss: a mixed load of several threads on an overlay, recorded; then the host goes down at random moments of the
//! record, and of what was on its way to the disk, any part may have got there.

use crate::crash::{Replay, choose};
use crate::kill::{KillSwitch, Killed};
use crate::model::{Change, Flush, History, Resize, Version};
pub use crate::recorder::Broken;
use crate::recorder::Recorder;
use crate::rig::{Action, Rig, Rng, SECTOR, ZERO, fill, iobufs, qemu_check, qemu_read, random_request};
use std::fmt;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use vmar::overlay::Overlay;

/// What to do.
#[derive(Clone, Debug)]
pub struct Power {
    pub seed: u64,
    /// Crash states to look at.
    pub states: usize,
    pub broken: Broken,
    /// Threads of the load.
    pub threads: u64,
    /// Requests of each thread between two restarts.
    pub requests: u64,
    /// Crash states of one load, before the next one begins.
    pub states_a_load: usize,
}

impl Default for Power {
    fn default() -> Power {
        Power { seed: 1, states: 80, broken: Broken::No, threads: 4, requests: 60, states_a_load: 40 }
    }
}

/// What was seen.
#[derive(Debug, Default)]
pub struct Report {
    seed: u64,
    pub loads: usize,
    pub requests: u64,
    pub flushes: u64,
    pub resizes: usize,
    pub kills: u64,
    pub closes: u64,
    pub file_changes: usize,
    pub syncs: usize,
    pub states: usize,
    /// States that `qemu-img check` found clean.
    pub clean: usize,
    /// Sectors of the file, over all states, of which one version had to be chosen.
    pub unsynced_sectors: usize,
    pub sectors_compared: u64,
    /// States that were also read by plain QEMU, opened for writing, written and checked again.
    pub went_on: usize,
    pub violations: Vec<String>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "seed {}: {} loads, {} requests ({} flushes and {} resizes that succeeded, {} kills, {} clean stops), {} file changes, {} \
             syncs; {} crash states, {} clean for qemu-img, {} sectors chosen, {} sectors compared, {} states gone on \
             with, {} violations{}",
            self.seed,
            self.loads,
            self.requests,
            self.flushes,
            self.resizes,
            self.kills,
            self.closes,
            self.file_changes,
            self.syncs,
            self.states,
            self.clean,
            self.unsynced_sectors,
            self.sectors_compared,
            self.went_on,
            self.violations.len(),
            self.violations.iter().take(5).map(|v| format!("\n  {v}")).collect::<String>(),
        )
    }
}

/// Runs loads and looks at crash states until there are as many as were asked for.
pub fn run(power: &Power) -> Report {
    let mut report = Report { seed: power.seed, ..Report::default() };
    while report.states < power.states {
        let states = power.states_a_load.min(power.states - report.states);
        let seed = power.seed.wrapping_mul(1000) + report.loads as u64;
        let mut load = Load::new(seed, power);
        load.run(&mut report);
        load.cut(states, &mut report);
        report.loads += 1;
    }
    report
}

/// The requests of one thread.
#[derive(Default)]
struct Done {
    changes: Vec<Change>,
    flushes: Vec<Flush>,
    resizes: Vec<Resize>,
    requests: u64,
}

struct Load<'a> {
    seed: u64,
    power: &'a Power,
    rig: Rig,
    recorder: Arc<Recorder>,
    history: History,
    before: Vec<u8>,
    data_start: u64,
    authors: AtomicU64,
    /// Held by flushes that are broken on purpose, so that no other repairs them.
    one_flush: Mutex<()>,
}

impl Load<'_> {
    fn new(seed: u64, power: &Power) -> Load<'_> {
        // Base and disk end inside a subcluster, of different clusters.
        let rig = match seed % 3 {
            0 => Rig::new(3 * 65536 + 2560, 5 * 65536 + 512, 7 * 65536 + 1024),
            1 => Rig::new(1 << 20, 1 << 20, 1 << 20),
            _ => Rig::new((2 << 20) + 1536, (3 << 20) + 1024, 4 << 20),
        };
        let before = fs::read(&rig.overlay).unwrap();
        let data_start = rig.open_copy(&rig.overlay, true).unwrap().data_start();
        let kill = KillSwitch::new(&rig.state_dir());
        Load {
            seed,
            power,
            history: History::new(&rig),
            rig,
            recorder: Arc::new(Recorder::new(power.broken, kill)),
            data_start,
            before,
            authors: AtomicU64::new(1),
            one_flush: Mutex::new(()),
        }
    }

    fn open(&self) -> Overlay {
        self.rig.open(Some(self.recorder.clone()), false).unwrap()
    }

    /// Some sessions: requests of several threads, then a clean stop or a kill.
    fn run(&mut self, report: &mut Report) {
        let mut rng = Rng::new(self.seed);
        for session in 0..5u64 {
            let overlay = self.open();
            if rng.one_in(2) {
                self.recorder.kill.arm(rng.below(self.power.requests * self.power.threads));
            }
            let all: Vec<Done> = std::thread::scope(|s| {
                let load = &*self;
                let overlay = &overlay;
                let threads: Vec<_> = (0..self.power.threads)
                    .map(|t| s.spawn(move || load.requests(overlay, Rng::part(load.seed, session << 8 | t), t == 0)))
                    .collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            });
            let mut overlay = Some(overlay);
            if self.recorder.kill.has_killed() {
                overlay = None;
                report.kills += 1;
            }
            let killed_at = self.recorder.kill.bury();
            let now = self.recorder.tick();
            let counts = |end: u64| end < killed_at.unwrap_or(now);
            for done in all {
                report.requests += done.requests;
                report.flushes += done.flushes.len() as u64;
                for mut change in done.changes {
                    change.finish(killed_at, now);
                    self.history.change(&change);
                }
                done.flushes.into_iter().filter(|f| counts(f.end)).for_each(|f| self.history.flush(f));
                report.resizes += done.resizes.iter().filter(|r| r.ok).count();
                for resize in done.resizes {
                    self.history.resize(Resize { ok: resize.ok && counts(resize.end), ..resize });
                }
            }
            let overlay = overlay.unwrap_or_else(|| self.open());
            // Nothing is lost as long as the host is up.
            let disk = self.rig.read_all(&overlay);
            let now = self.recorder.tick();
            self.history.check_size(overlay.size(), now).unwrap();
            let wrong = self.history.check_all(&disk, now, now);
            assert!(wrong.is_empty(), "seed {}, session {session}: {}", self.seed, wrong[0]);
            self.history.settle(&disk, now);
            if rng.one_in(2) {
                let begin = self.recorder.tick();
                overlay.close().unwrap();
                self.history.flush(Flush { begin, end: self.recorder.tick() });
                report.closes += 1;
            }
        }
    }

    /// The requests of one thread, until they are all done or it is killed.
    fn requests(&self, overlay: &Overlay, mut rng: Rng, may_resize: bool) -> Done {
        let mut done = Done::default();
        for _ in 0..self.power.requests {
            let ended = catch_unwind(AssertUnwindSafe(|| self.request(overlay, &mut rng, may_resize, &mut done)));
            if let Err(payload) = ended {
                match payload.downcast::<Killed>() {
                    Ok(_) => return done,
                    Err(other) => std::panic::resume_unwind(other),
                }
            }
            if self.recorder.kill.has_killed() {
                return done;
            }
        }
        done
    }

    /// Makes the disk larger by some sectors.
    fn resize(&self, overlay: &Overlay, rng: &mut Rng, done: &mut Done) {
        let most = ((self.rig.capacity - overlay.size()) / SECTOR as u64).min(400);
        let size = overlay.size() + (1 + rng.below(most)) * SECTOR as u64;
        done.resizes.push(Resize { size, begin: self.recorder.tick(), end: u64::MAX, ok: false });
        overlay.resize(size).unwrap();
        let resize = done.resizes.last_mut().unwrap();
        (resize.end, resize.ok) = (self.recorder.tick(), true);
    }

    fn request(&self, overlay: &Overlay, rng: &mut Rng, may_resize: bool, done: &mut Done) {
        if may_resize && rng.one_in(30) && overlay.size() < self.rig.capacity {
            return self.resize(overlay, rng, done);
        }
        let (action, sector, sectors) = random_request(rng, overlay.size() / SECTOR as u64);
        let (offset, len) = (sector * SECTOR as u64, sectors * SECTOR as u64);
        done.requests += 1;
        let author = match action {
            Action::Read => return,
            Action::Write => self.authors.fetch_add(1, Ordering::Relaxed),
            Action::Zero { .. } => ZERO,
            Action::Flush => {
                let _one = (self.power.broken != Broken::No).then(|| self.one_flush.lock());
                let begin = self.recorder.tick();
                self.recorder.flush(|| overlay.flush()).unwrap();
                done.flushes.push(Flush { begin, end: self.recorder.tick() });
                return;
            }
        };
        // Noted before it begins: if this thread is killed in it, it may have happened.
        let version = Version { author, begin: self.recorder.tick(), end: u64::MAX, ok: false };
        done.changes.push(Change { sector, sectors, version });
        if let Action::Zero { unmap } = action {
            overlay.write_zeroes(offset, len, unmap, &self.rig).unwrap();
        } else {
            let mut mem = vec![0; len as usize];
            fill(&mut mem, author, sector);
            let bufs = iobufs(&mut mem);
            if !overlay.try_write(offset, &bufs).unwrap() {
                overlay.write(offset, &bufs, &self.rig).unwrap();
            }
        }
        let version = &mut done.changes.last_mut().unwrap().version;
        (version.end, version.ok) = (self.recorder.tick(), true);
    }

    /// Cuts the power at random moments of the record.
    fn cut(&self, states: usize, report: &mut Report) {
        let end = self.recorder.tick();
        let log = self.recorder.finish();
        report.file_changes += log.changes.len();
        report.syncs += log.syncs.len();
        let data_start = self.data_start;
        let mut rng = Rng::part(self.seed, 77);
        let mut cuts: Vec<u64> = (0..states).map(|_| self.random_moment(&log, data_start, end, &mut rng)).collect();
        cuts.sort_unstable();
        let mut replay = Replay::new(&log, self.before.clone(), data_start);
        for now in cuts {
            replay.advance(now);
            report.unsynced_sectors += replay.unsynced();
            let choice = choose(&replay, &mut rng);
            let file = replay.state(choice, &mut rng);
            let what = format!("seed {} (load {}), cut at {now} of {end}, {choice:?}", report.seed, report.loads);
            self.look(file, now, &what, report);
        }
    }

    /// Any moment, or right behind the beginning or the end of something that flushes do.
    fn random_moment(&self, log: &crate::recorder::Log, data_start: u64, end: u64, rng: &mut Rng) -> u64 {
        let metadata: Vec<_> = log.changes.iter().filter(|c| c.at < data_start).collect();
        let near = match rng.below(4) {
            0 if !metadata.is_empty() => {
                let change = metadata[rng.below(metadata.len() as u64) as usize];
                [change.begin, change.end][rng.below(2) as usize]
            }
            1 if !log.syncs.is_empty() => {
                let sync = log.syncs[rng.below(log.syncs.len() as u64) as usize];
                [sync.begin, sync.end][rng.below(2) as usize]
            }
            _ => rng.below(end),
        };
        near.saturating_add(1).min(end)
    }

    /// One crash state: what QEMU says of it, and each sector of the disk.
    fn look(&self, mut file: Vec<u8>, now: u64, what: &str, report: &mut Report) {
        another_boot(&mut file);
        let path = self.rig.dir().join("cut.qcow2");
        fs::write(&path, &file).unwrap();
        report.states += 1;
        match qemu_check(&path) {
            Ok(()) => report.clean += 1,
            Err(e) => report.violations.push(format!("{what}: {e}")),
        }
        let overlay = match self.rig.open_copy(&path, true) {
            Ok(overlay) => overlay,
            Err(e) => return report.violations.push(format!("{what}: {e}")),
        };
        let disk = self.rig.read_all(&overlay);
        drop(overlay);
        if let Err(e) = self.history.check_size(disk.len() as u64, now) {
            report.violations.push(format!("{what}: {e}"));
        }
        report.sectors_compared += (disk.len() / SECTOR) as u64;
        let wrong = self.history.check_all(&disk, self.history.durable(now), now);
        if let Some(first) = wrong.first() {
            report.violations.push(format!("{what}: {} sectors are wrong: {first}", wrong.len()));
            return;
        }
        if report.states.is_multiple_of(8) {
            if let Err(e) = self.go_on(&path, &disk) {
                report.violations.push(format!("{what}: {e}"));
            }
            report.went_on += 1;
        }
    }

    /// A disk that lost its power is used again.
    fn go_on(&self, path: &Path, disk: &[u8]) -> Result<(), String> {
        let mut want = disk.to_vec();
        if qemu_read(path) != want {
            return Err("plain QEMU sees another disk".into());
        }
        let overlay = self.rig.open_copy(path, false).map_err(|e| e.to_string())?;
        let mut mem = vec![0; 3 * SECTOR];
        fill(&mut mem, 0xabc, 7);
        want[7 * SECTOR..][..mem.len()].copy_from_slice(&mem);
        overlay.write(7 * SECTOR as u64, &iobufs(&mut mem), &self.rig).map_err(|e| e.to_string())?;
        overlay.close().map_err(|e| e.to_string())?;
        if self.rig.read_all(&overlay) != want || qemu_read(path) != want {
            return Err("what was written after the power cut is not there".into());
        }
        qemu_check(path)
    }
}

/// Makes a file that was in use look as it does on a host that has been started again: its session is of another boot.
/// (A live bitmap is gone then, too: copies have a state directory of their own.)
pub fn another_boot(file: &mut [u8]) {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let digits: String = text.trim().chars().filter(|c| *c != '-').collect();
    let boot: Vec<u8> = (0..16).map(|n| u8::from_str_radix(&digits[2 * n..2 * n + 2], 16).unwrap()).collect();
    if let Some(at) = file[..4096].windows(16).position(|w| w == boot) {
        file[at] ^= 0xff;
    }
}
