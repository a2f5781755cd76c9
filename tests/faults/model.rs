//! Which versions a sector may hold: told from when each write began and ended, and whether it succeeded.
//!
//! Time is a counter that moves with every event. A version is out of date at a time if a later one is *settled*: one that
//! succeeded, and began after this one had ended. For a running overlay a version is settled when its write has returned;
//! after a power cut, when a flush that began later has succeeded.

use crate::rig::{Rig, SECTOR, unit, units};

/// A write or a write-zeroes, seen from one sector.
#[derive(Clone, Copy, Debug)]
pub struct Version {
    /// Who: the content follows from it.
    pub author: u64,
    pub begin: u64,
    pub end: u64,
    /// It succeeded. One that failed, or whose process was killed, may have happened or not.
    pub ok: bool,
}

/// A write or a write-zeroes, over some sectors.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    pub sector: u64,
    pub sectors: u64,
    pub version: Version,
}

impl Change {
    /// What is told of it when all threads have ended, at time `now`; `killed`: the process had ended before.
    pub fn finish(&mut self, killed: Option<u64>, now: u64) {
        if self.version.end > killed.unwrap_or(now) {
            (self.version.end, self.version.ok) = (now, false);
        }
    }
}

/// A flush that succeeded.
#[derive(Clone, Copy, Debug)]
pub struct Flush {
    pub begin: u64,
    pub end: u64,
}

/// The disk was made larger, or that was tried.
#[derive(Clone, Copy, Debug)]
pub struct Resize {
    pub size: u64,
    pub begin: u64,
    pub end: u64,
    pub ok: bool,
}

/// All versions of all sectors that may still count.
pub struct History {
    sectors: Vec<Vec<Version>>,
    flushes: Vec<Flush>,
    resizes: Vec<Resize>,
}

impl History {
    pub fn new(rig: &Rig) -> History {
        let first = |sector| Version { author: rig.first_author(sector), begin: 0, end: 0, ok: true };
        History {
            sectors: (0..rig.sectors()).map(|s| vec![first(s)]).collect(),
            flushes: vec![Flush { begin: 1, end: 1 }],
            resizes: vec![Resize { size: rig.size, begin: 0, end: 0, ok: true }],
        }
    }

    pub fn change(&mut self, change: &Change) {
        for sector in change.sector..change.sector + change.sectors {
            self.sectors[sector as usize].push(change.version);
        }
    }

    pub fn flush(&mut self, flush: Flush) {
        self.flushes.push(flush);
    }

    pub fn resize(&mut self, resize: Resize) {
        self.resizes.push(resize);
    }

    /// Compares the size of the disk at time `now`: a resize is durable when it has returned.
    pub fn check_size(&self, size: u64, now: u64) -> Result<(), String> {
        let least = self.resizes.iter().filter(|r| r.ok && r.end < now).map(|r| r.size).max();
        let begun = |r: &&Resize| r.begin < now && Some(r.size) >= least;
        if self.resizes.iter().filter(begun).any(|r| r.size == size) {
            return Ok(());
        }
        Err(format!("the disk has {size} bytes at {now}: {:?}", self.resizes))
    }

    /// Versions that ended before this are durable at time `now`.
    pub fn durable(&self, now: u64) -> u64 {
        self.flushes.iter().filter(|f| f.end < now).map(|f| f.begin).max().unwrap_or(0)
    }

    /// What `sector` may hold at some time before `now`, if what succeeded before `settled` counts.
    pub fn allowed(&self, sector: u64, settled: u64, now: u64) -> impl Iterator<Item = &Version> {
        let versions = &self.sectors[sector as usize];
        let newest = newest_settled(versions, settled);
        versions.iter().filter(move |v| v.begin < now && v.end >= newest)
    }

    /// Compares one sector; `torn`: a write may have been under way while it was read, and then each byte may be of another
    /// version. The error says what was found and what might have been.
    pub fn check(&self, sector: u64, bytes: &[u8], settled: u64, now: u64, torn: bool) -> Result<(), String> {
        let first = units(bytes).next().unwrap();
        let contents = || self.allowed(sector, settled, now).map(|v| unit(v.author, sector));
        if contents().any(|c| c == first) && units(bytes).all(|u| u == first) {
            return Ok(());
        }
        let is_a_byte = |(n, byte): (usize, &u8)| contents().any(|c| c.to_le_bytes()[n % 8] == *byte);
        if torn && bytes.iter().enumerate().all(is_a_byte) {
            return Ok(());
        }
        let authors: Vec<String> = {
            let mut seen: Vec<u64> = units(bytes).collect();
            seen.dedup();
            seen.truncate(4);
            seen.iter().map(|u| format!("{} (sector {})", u >> 20, u & 0xf_ffff)).collect()
        };
        Err(format!(
            "sector {sector} holds {} where, by {settled} of {now}, it may hold {:?}",
            authors.join(", "),
            self.allowed(sector, settled, now).collect::<Vec<_>>(),
        ))
    }

    /// Compares the whole disk; the sectors that are wrong.
    pub fn check_all(&self, disk: &[u8], settled: u64, now: u64) -> Vec<String> {
        let sectors = disk.chunks(SECTOR).enumerate();
        sectors.filter_map(|(s, bytes)| self.check(s as u64, bytes, settled, now, false).err()).collect()
    }

    /// What a quiet disk holds at time `now` is what it holds from then on. Compare it first.
    pub fn settle(&mut self, disk: &[u8], now: u64) {
        for (sector, (versions, bytes)) in self.sectors.iter_mut().zip(disk.chunks(SECTOR)).enumerate() {
            if versions.len() > 1 {
                let found = units(bytes).next().unwrap();
                let author = versions.iter().map(|v| v.author).find(|a| unit(*a, sector as u64) == found);
                let author = author.expect("the disk was compared before");
                versions.push(Version { author, begin: now, end: now, ok: true });
            }
        }
    }

    /// Forgets what can no longer come back; then no time before `now` can be asked for.
    pub fn forget(&mut self, now: u64) {
        let durable = self.durable(now);
        for versions in &mut self.sectors {
            let newest = newest_settled(versions, durable);
            versions.retain(|v| v.end >= newest);
        }
        self.flushes.retain(|f| f.begin >= durable);
    }
}

fn newest_settled(versions: &[Version], settled: u64) -> u64 {
    versions.iter().filter(|v| v.ok && v.end < settled).map(|v| v.begin).max().unwrap_or(0)
}
