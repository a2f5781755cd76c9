//! Finds what stores have lost, and heals it from each other.

use super::file::Snapshot;
use super::keep::{check, threads};
use super::place::{self, Care};
use super::restore::fetch;
use super::stores::{Store, Stores, check_name};
use crate::error::{Error, Result};
use crate::indexer::Observer;
use crate::store::PackId;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A store does not have a snapshot.
    SnapshotMissing {
        /// Which one.
        name: String,
        /// The store's URL.
        store: String,
    },
    /// A store's copy of it is broken, or another than elsewhere.
    SnapshotBroken {
        /// Which one.
        name: String,
        /// The store's URL.
        store: String,
        /// What is wrong with it.
        why: String,
    },
    /// A store does not have a pack that belongs there.
    PackMissing {
        /// Which one.
        pack: PackId,
        /// The store's URL.
        store: String,
        /// How many stores have it, and whole.
        left: usize,
    },
    /// A store's copy is broken.
    PackBroken {
        /// Which one.
        pack: PackId,
        /// The store's URL.
        store: String,
        /// What is wrong with it.
        why: String,
        /// How many stores have it, and whole.
        left: usize,
    },
    /// No store has a whole copy of a pack that may be lost: its pages come back as zeros.
    PackGone {
        /// Which one.
        pack: PackId,
    },
}

/// What was looked at, and what is wrong.
#[derive(Debug, Default)]
pub struct Findings {
    /// Snapshots.
    pub snapshots: usize,
    /// Packs that they refer to.
    pub packs: usize,
    /// Bytes of all copies of packs that were read.
    pub bytes: u64,
    /// What is wrong, and not mended.
    pub faults: Vec<Fault>,
    /// Snapshots that cannot be restored.
    pub broken: Vec<String>,
    /// What was wrong, and is mended.
    pub mended: Vec<Fault>,
}

impl Findings {
    /// Faults that no guest notices, and nobody can mend.
    pub fn harmless(&self) -> usize {
        self.faults.iter().filter(|fault| matches!(fault, Fault::PackGone { .. })).count()
    }
}

/// What is known of a pack.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    care: Care,
    copies: usize,
}

/// What is to be done.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// The stores.
    pub stores: &'a Stores,
    /// Where packs of stores that are no directories are for a while.
    pub spool: &'a Path,
    /// Look whether packs are there, and do not read them.
    pub quick: bool,
    /// Mend what can be.
    pub repair: bool,
    /// Told of progress.
    pub observer: &'a dyn Observer,
    /// Set when all shall end.
    pub stop: &'a AtomicBool,
}

impl Work<'_> {
    /// Looks at these snapshots, or at all, and at their packs.
    ///
    /// # Errors
    /// A store cannot be read, or, to repair, written; or `stop` was set.
    pub fn run(&self, names: &[String]) -> Result<Findings> {
        let mut findings = Findings::default();
        let all = self.stores.snapshots()?;
        names.iter().try_for_each(|name| check_name(name))?;
        let names: Vec<String> = if names.is_empty() { all.into_keys().collect() } else { names.to_vec() };
        findings.snapshots = names.len();
        let mut snapshots = Vec::new();
        for name in &names {
            match self.snapshot(name, &mut findings)? {
                Some(snapshot) => snapshots.push(snapshot),
                None => findings.broken.push(name.clone()),
            }
        }
        let wanted = wanted(&snapshots);
        findings.packs = wanted.len();
        let lost = self.packs(&wanted, &mut findings)?;
        let lacks = |snapshot: &&Snapshot| snapshot.packs().iter().any(|id| lost.contains(id));
        findings.broken.extend(snapshots.iter().filter(lacks).map(|s| s.about.name.clone()));
        findings.faults.sort();
        findings.mended.sort();
        Ok(findings)
    }

    /// The snapshot as most stores have it, if any has.
    fn snapshot(&self, name: &str, findings: &mut Findings) -> Result<Option<Snapshot>> {
        let copies = self.stores.copies_of(name);
        let good: Vec<&Snapshot> = copies.iter().flatten().filter_map(|copy| copy.as_ref().ok()).collect();
        let votes = |snapshot: &Snapshot| good.iter().filter(|other| ***other == *snapshot).count();
        let Some(best) = good.iter().max_by_key(|snapshot| votes(snapshot)) else {
            findings
                .faults
                .extend(copies.iter().zip(self.stores.all()).map(|(copy, store)| fault(name, store, copy.as_ref())));
            return Ok(None);
        };
        // Half against half: nobody knows which one is right.
        let sure = votes(best) == good.len() || 2 * votes(best) > good.len();
        for (copy, store) in copies.iter().zip(self.stores.all()) {
            let fault = match copy {
                Some(Ok(snapshot)) if snapshot == *best => continue,
                Some(Ok(_)) => Fault::SnapshotBroken {
                    name: name.into(),
                    store: store.url().into(),
                    why: "is not what other stores have".into(),
                },
                other => fault(name, store, other.as_ref()),
            };
            if self.repair && sure {
                let bytes = best.encode().map_err(|e| Error::io(name, "pack it", e))?;
                store.place().put(&place::snapshot_key(name), &bytes, Care::Critical)?;
                findings.mended.push(fault);
            } else {
                findings.faults.push(fault);
            }
        }
        Ok(sure.then(|| (*best).clone()))
    }

    /// Looks at all packs; those that are lost.
    fn packs(&self, wanted: &BTreeMap<PackId, Wanted>, findings: &mut Findings) -> Result<Vec<PackId>> {
        let copies = |id: &PackId| self.stores.all().iter().filter_map(|store| store.bytes_of(*id)).sum::<u64>();
        let total = wanted.keys().map(copies).sum();
        self.observer.begin("checking packs", if self.quick { 0 } else { total });
        let next = Mutex::new(wanted.iter());
        let found = Mutex::new((Findings::default(), Vec::new(), None));
        std::thread::scope(|scope| {
            for _ in 0..threads() {
                scope.spawn(|| {
                    while !self.stop.load(Ordering::Relaxed)
                        && let Some((id, wanted)) = next.lock().unwrap_or_else(PoisonError::into_inner).next()
                    {
                        let mut own = Findings::default();
                        let lost = self.pack(*id, wanted, &mut own);
                        let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                        found.0.faults.append(&mut own.faults);
                        found.0.mended.append(&mut own.mended);
                        match lost {
                            Ok(lost) => found.1.extend(lost.then_some(*id)),
                            Err(e) => found.2 = Some(e),
                        }
                    }
                });
            }
        });
        self.observer.end();
        check(self.stop)?;
        let (own, lost, failed) = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        findings.faults.extend(own.faults);
        findings.mended.extend(own.mended);
        findings.bytes = if self.quick { 0 } else { total };
        failed.map_or(Ok(lost), Err)
    }

    /// Whether a pack is lost that must not be.
    fn pack(&self, id: PackId, wanted: &Wanted, findings: &mut Findings) -> Result<bool> {
        let (mut good, mut bad): (Vec<&Store>, HashMap<&str, String>) = (Vec::new(), HashMap::new());
        for store in self.stores.with(id) {
            let looked = if self.quick { Ok(()) } else { fetch(store, id, self.spool).and_then(|pack| pack.verify()) };
            match looked {
                Ok(()) => good.push(store),
                Err(e) => drop(bad.insert(store.url(), e.to_string())),
            }
            self.observer.advance(store.bytes_of(id).unwrap_or(0));
        }
        if good.is_empty() && wanted.care == Care::Once {
            findings.faults.push(Fault::PackGone { pack: id });
            return Ok(false);
        }
        let mut faults: Vec<(&Store, Fault)> = Vec::new();
        let left = good.len();
        for (store, why) in self.stores.all().iter().filter_map(|store| Some((store, bad.get(store.url())?))) {
            let fault = Fault::PackBroken { pack: id, store: store.url().into(), why: why.clone(), left };
            faults.push((store, fault));
        }
        if wanted.care == Care::Critical {
            for store in self.stores.homes(id, wanted.copies).into_iter().filter(|store| !store.has(id)) {
                faults.push((store, Fault::PackMissing { pack: id, store: store.url().into(), left }));
            }
        }
        let key = place::pack_key(id);
        for (store, fault) in faults {
            if let (true, Some(from)) = (self.repair, good.first()) {
                let bytes = from.place().get(&key)?;
                store.place().put(&key, &bytes, wanted.care)?;
                findings.mended.push(fault);
            } else {
                findings.faults.push(fault);
            }
        }
        Ok(good.is_empty() && wanted.care == Care::Critical)
    }
}

fn fault(name: &str, store: &Store, copy: Option<&Result<Snapshot>>) -> Fault {
    let (name, store) = (name.to_string(), store.url().to_string());
    match copy {
        Some(Err(e)) => Fault::SnapshotBroken { name, store, why: e.to_string() },
        _ => Fault::SnapshotMissing { name, store },
    }
}

/// All packs, and how each has to be kept: as the snapshot wants that asks for most.
fn wanted(snapshots: &[Snapshot]) -> BTreeMap<PackId, Wanted> {
    let mut out: BTreeMap<PackId, Wanted> = BTreeMap::new();
    for snapshot in snapshots {
        let once = snapshot.once();
        for id in snapshot.packs() {
            let care = if once.contains(&id) { Care::Once } else { Care::Critical };
            let wanted = out.entry(id).or_insert(Wanted { care, copies: snapshot.about.copies });
            wanted.copies = wanted.copies.max(snapshot.about.copies);
            if care == Care::Critical {
                wanted.care = care;
            }
        }
    }
    out
}
