//! What a power cut may leave: any 512-byte sector of any write or hole that was not synced is on disk or not, each by
//! itself.
//!
//! A sector is written as it is at some moment, so a later version of it stands for all earlier ones. The choice is
//! between what is certainly there and each version since. The size of the file is fixed before the record begins.

use crate::recorder::{FileChange, Log, What};
use crate::rig::{Rng, SECTOR};
use std::collections::BTreeMap;

const SECTOR_BYTES: u64 = SECTOR as u64;

/// Which of the versions that are not synced a power cut lets through.
#[derive(Clone, Copy, Debug)]
pub enum Choice {
    /// All: the order in which they were done.
    Everything,
    /// None but the synced.
    Nothing,
    /// Each sector by itself, every version as likely.
    Sectors,
    /// Each sector by itself: the newest in so many of 100 cases, else any.
    Mostly(u64),
    /// Everything in front of the data area, nothing behind.
    MetadataOnly,
    /// The other way round.
    DataOnly,
    /// Everything but one change.
    AllBut(usize),
    /// One change alone.
    Only(usize),
    /// Holes but no writes.
    HolesOnly,
    /// Writes but no holes.
    WritesOnly,
}

struct Pending {
    change: usize,
    is_hole: bool,
    content: Box<[u8; SECTOR]>,
}

/// Walks through a record, from one moment to a later one.
pub struct Replay<'a> {
    log: &'a Log,
    data_start: u64,
    /// What is certainly on disk.
    disk: Vec<u8>,
    /// For each sector that was changed since, its versions in order.
    pending: BTreeMap<u64, Vec<Pending>>,
    next: usize,
}

impl<'a> Replay<'a> {
    /// Starts from the file as it was when the record began.
    pub fn new(log: &'a Log, file: Vec<u8>, data_start: u64) -> Replay<'a> {
        Replay { log, data_start, disk: file, pending: BTreeMap::new(), next: 0 }
    }

    /// Moves on to time `now`.
    pub fn advance(&mut self, now: u64) {
        let log = self.log;
        while let Some(change) = log.changes.get(self.next).filter(|c| c.begin < now) {
            self.add(self.next, change);
            self.next += 1;
        }
        let synced = log.syncs.iter().filter(|s| s.end < now).map(|s| s.begin).max().unwrap_or(0);
        self.pending.retain(|sector, versions| {
            let certain = versions.iter().take_while(|v| log.changes[v.change].end < synced).count();
            if let Some(last) = versions.drain(..certain).next_back() {
                self.disk[(sector * SECTOR_BYTES) as usize..][..SECTOR].copy_from_slice(&last.content[..]);
            }
            !versions.is_empty()
        });
    }

    fn add(&mut self, number: usize, change: &FileChange) {
        let end = change.at + change.len();
        for sector in change.at / SECTOR_BYTES..end.div_ceil(SECTOR_BYTES) {
            let start = sector * SECTOR_BYTES;
            let versions = self.pending.entry(sector).or_default();
            let mut content: Box<[u8; SECTOR]> = match versions.last() {
                Some(last) => {
                    let before = &self.log.changes[last.change];
                    assert!(before.end < change.begin, "two changes of one sector at a time: {before:?} {change:?}");
                    last.content.clone()
                }
                None => Box::new(self.disk[start as usize..][..SECTOR].try_into().unwrap()),
            };
            let (from, to) = (change.at.max(start), end.min(start + SECTOR_BYTES));
            let part = &mut content[(from - start) as usize..(to - start) as usize];
            match &change.what {
                What::Write(bytes) => {
                    part.copy_from_slice(&bytes[(from - change.at) as usize..(to - change.at) as usize]);
                }
                What::Hole(_) => part.fill(0),
            }
            versions.push(Pending { change: number, is_hole: matches!(change.what, What::Hole(_)), content });
        }
    }

    /// Sectors of which more than one version may be there.
    pub fn unsynced(&self) -> usize {
        self.pending.len()
    }

    /// The changes of which something may be lost.
    pub fn open_changes(&self) -> Vec<usize> {
        let mut open: Vec<usize> = self.pending.values().flatten().map(|p| p.change).collect();
        open.sort_unstable();
        open.dedup();
        open
    }

    /// The file after a power cut now.
    pub fn state(&self, choice: Choice, rng: &mut Rng) -> Vec<u8> {
        let mut file = self.disk.clone();
        for (sector, versions) in &self.pending {
            let count = versions.len();
            let metadata = sector * SECTOR_BYTES < self.data_start;
            let place = |change: usize| versions.iter().rposition(|v| v.change == change);
            let last = |hole: bool| versions.iter().rposition(|v| v.is_hole == hole).map_or(0, |n| n + 1);
            // 0 is what is certainly there, n the n-th version since.
            let chosen = match choice {
                Choice::Everything => count,
                Choice::Nothing => 0,
                Choice::Sectors => rng.below(count as u64 + 1) as usize,
                Choice::Mostly(percent) if rng.below(100) < percent => count,
                Choice::Mostly(_) => rng.below(count as u64 + 1) as usize,
                Choice::MetadataOnly => {
                    if metadata {
                        count
                    } else {
                        0
                    }
                }
                Choice::DataOnly => {
                    if metadata {
                        0
                    } else {
                        count
                    }
                }
                Choice::AllBut(change) if place(change) == Some(count - 1) => count - 1,
                Choice::AllBut(_) => count,
                Choice::Only(change) => place(change).map_or(0, |n| n + 1),
                Choice::HolesOnly => last(true),
                Choice::WritesOnly => last(false),
            };
            if let Some(version) = chosen.checked_sub(1) {
                let at = (sector * SECTOR_BYTES) as usize;
                file[at..at + SECTOR].copy_from_slice(&versions[version].content[..]);
            }
        }
        file
    }
}

/// A choice for a moment: the extreme ones as often as the random ones.
pub fn choose(replay: &Replay<'_>, rng: &mut Rng) -> Choice {
    let open = replay.open_changes();
    let one = |rng: &mut Rng| open[rng.below(open.len() as u64) as usize];
    match rng.below(12) {
        0 => Choice::Everything,
        1 => Choice::Nothing,
        2 | 3 => Choice::MetadataOnly,
        4 => Choice::DataOnly,
        5 if !open.is_empty() => Choice::AllBut(one(rng)),
        6 if !open.is_empty() => Choice::Only(one(rng)),
        7 => Choice::HolesOnly,
        8 => Choice::WritesOnly,
        9 => Choice::Mostly(90),
        _ => Choice::Sectors,
    }
}
