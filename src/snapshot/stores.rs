//! The stores that snapshots are in: each a place of its own, and what one has lost another one has.

use super::file::Snapshot;
use super::place::{self, Care, MARK, PACKS, Place, SNAPSHOTS, local};
use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::store::PackId;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::Read;
use std::time::SystemTime;

const FORMAT: &str = "vmar-snapshots";
const VERSION: u32 = 1;

/// What the mark of a store has.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    format: String,
    version: u32,
    id: String,
}

/// What is to be done with stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Those that are there are read.
    Read,
    /// All are written to, beside others who write; new ones are made.
    Write,
    /// The same, and nobody else writes: things are removed.
    Alone,
}

/// A store, open.
#[derive(Debug)]
pub struct Store {
    place: Box<dyn Place>,
    id: String,
    packs: HashMap<PackId, u64>,
    _lock: Option<local::Lock>,
}

impl Store {
    /// How the operator named it.
    pub fn url(&self) -> &str {
        self.place.url()
    }

    /// Where it is.
    pub fn place(&self) -> &dyn Place {
        &*self.place
    }

    /// Whether it had a pack when it was opened.
    pub fn has(&self, id: PackId) -> bool {
        self.packs.contains_key(&id)
    }

    /// Bytes of all packs that it had.
    pub fn pack_bytes(&self) -> u64 {
        self.packs.values().sum()
    }

    /// Bytes of a pack that it had.
    pub fn bytes_of(&self, id: PackId) -> Option<u64> {
        self.packs.get(&id).copied()
    }

    /// What it has of a snapshot.
    fn snapshot(&self, name: &str) -> Option<Result<Snapshot>> {
        let key = place::snapshot_key(name);
        match self.place.get(&key) {
            Err(e) if e.kind() == ErrorKind::NotFound => None,
            read => Some(read.and_then(|bytes| Snapshot::decode(&format!("{}/{key}", self.url()), name, &bytes))),
        }
    }

    fn open(url: &str, access: Access, others: &[Store]) -> Result<Store> {
        let place = place::open(url)?;
        let mark = match place.get(MARK) {
            Ok(mark) => mark,
            Err(e) if e.kind() == ErrorKind::NotFound && access != Access::Read => {
                log::info!("store {url} is new");
                let mark = Mark { format: FORMAT.into(), version: VERSION, id: new_id()? };
                let mark = serde_json::to_vec(&mark).map_err(|e| Error::new(ErrorKind::Io, "JSON", e))?;
                match place.put_new(MARK, &mark, Care::Critical) {
                    Ok(()) => mark,
                    // Another process may have been quicker.
                    Err(e) => place.get(MARK).map_err(|_| e)?,
                }
            }
            Err(e) if e.kind() == ErrorKind::NotFound => {
                return Err(Error::new(ErrorKind::NotFound, url, "is no store of snapshots").mend("check the URL"));
            }
            Err(e) => return Err(e),
        };
        let mark: Mark =
            serde_json::from_slice(&mark).ok().filter(|mark: &Mark| mark.format == FORMAT).ok_or_else(|| {
                Error::new(ErrorKind::Corrupt, url, "is not marked as a store of snapshots").mend("check the URL")
            })?;
        if mark.version != VERSION {
            let cause = format!("has version {}, not {VERSION}", mark.version);
            return Err(
                Error::new(ErrorKind::Unsupported, url, cause).mend("use the vmar that made it, or a newer one")
            );
        }
        if let Some(twin) = others.iter().find(|other| other.id == mark.id) {
            let cause = format!("is the same store as {}: what is lost there is lost here", twin.url());
            return Err(Error::new(ErrorKind::Usage, url, cause).mend("name each store once"));
        }
        let lock = match access {
            Access::Read => None,
            Access::Write => place.lock(false)?,
            Access::Alone => place.lock(true)?,
        };
        let objects = place.list(PACKS)?;
        let packs = objects.iter().filter_map(|o| Some((place::pack_id(&o.name)?, o.bytes))).collect();
        Ok(Store { place, id: mark.id, packs, _lock: lock })
    }
}

fn new_id() -> Result<String> {
    let mut id = [0; 16];
    let read = std::fs::File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut id));
    read.map_err(|e| Error::io("/dev/urandom", "read", e))?;
    Ok(hex(&id))
}

/// The stores.
#[derive(Debug)]
pub struct Stores {
    stores: Vec<Store>,
    /// Those that are not there, and why.
    lost: Vec<Error>,
}

impl Stores {
    /// Opens them. To read, those that are there are enough; to write all have to be.
    ///
    /// # Errors
    /// None is there, or one is not that has to be; two are the same.
    pub fn open(urls: &[String], access: Access) -> Result<Stores> {
        let (mut stores, mut lost): (Vec<Store>, Vec<Error>) = (Vec::new(), Vec::new());
        for url in urls {
            match Store::open(url, access, &stores) {
                Ok(store) => stores.push(store),
                Err(e) if access == Access::Read && !matches!(e.kind(), ErrorKind::Usage) => lost.push(e),
                Err(e) => return Err(e),
            }
        }
        if stores.is_empty()
            && let Some(e) = lost.pop()
        {
            return Err(e);
        }
        lost.iter().for_each(|e| log::warn!("a store is left out: {e}"));
        Ok(Stores { stores, lost })
    }

    /// Those that are there, in the order of the command line.
    pub fn all(&self) -> &[Store] {
        &self.stores
    }

    /// Why others are not.
    pub fn lost(&self) -> &[Error] {
        &self.lost
    }

    /// Where a pack belongs: so many stores, chosen by their names and its own, so that who reads looks there first and packs spread.
    pub fn homes(&self, id: PackId, copies: usize) -> Vec<&Store> {
        let rank =
            |store: &Store| *blake3::Hasher::new().update(store.id.as_bytes()).update(&id.0).finalize().as_bytes();
        let mut ranked: Vec<_> = self.stores.iter().map(|store| (rank(store), store)).collect();
        ranked.sort_by_key(|(rank, _)| *rank);
        ranked.into_iter().map(|(_, store)| store).take(copies).collect()
    }

    /// Those that have a pack, the ones first where it belongs.
    pub fn with(&self, id: PackId) -> Vec<&Store> {
        self.homes(id, usize::MAX).into_iter().filter(|store| store.has(id)).collect()
    }

    /// Writes a pack where it belongs, as far as it is not there. How many stores got it.
    ///
    /// # Errors
    /// A store does not take it.
    pub fn put_pack(&self, id: PackId, bytes: &[u8], copies: usize, care: Care) -> Result<usize> {
        let mut written = 0;
        for store in self.homes(id, copies).into_iter().filter(|store| !store.has(id)) {
            store.place.put(&place::pack_key(id), bytes, care)?;
            written += 1;
        }
        Ok(written)
    }

    /// The names of all snapshots, and which stores have them: places in [`Stores::all`].
    ///
    /// # Errors
    /// A store cannot be read.
    pub fn snapshots(&self) -> Result<BTreeMap<String, Vec<usize>>> {
        let mut out: BTreeMap<String, Vec<usize>> = BTreeMap::new();
        for (number, store) in self.stores.iter().enumerate() {
            for object in store.place.list(SNAPSHOTS)? {
                if let Some(name) = place::snapshot_name(&object.name) {
                    out.entry(name.into()).or_default().push(number);
                }
            }
        }
        Ok(out)
    }

    /// The names of all snapshots, those first that were written last.
    ///
    /// # Errors
    /// A store cannot be read.
    pub fn newest_first(&self) -> Result<Vec<String>> {
        let mut written: BTreeMap<String, SystemTime> = BTreeMap::new();
        for store in &self.stores {
            for object in store.place.list(SNAPSHOTS)? {
                if let Some(name) = place::snapshot_name(&object.name) {
                    written.entry(name.into()).or_insert(object.written);
                }
            }
        }
        let mut names: Vec<_> = written.into_iter().collect();
        names.sort_by_key(|(_, written)| std::cmp::Reverse(*written));
        Ok(names.into_iter().map(|(name, _)| name).collect())
    }

    /// The first copy of a snapshot that is whole. Whether all copies are the same is not looked at: [`Stores::load`] does.
    ///
    /// # Errors
    /// No store has one.
    pub fn load_any(&self, name: &str) -> Result<Snapshot> {
        let mut failed = None;
        for store in &self.stores {
            match store.snapshot(name) {
                Some(Ok(snapshot)) => return Ok(snapshot),
                Some(Err(e)) => failed = Some(e),
                None => {}
            }
        }
        Err(failed.unwrap_or_else(|| self.absent(name)))
    }

    fn absent(&self, name: &str) -> Error {
        let places = self.stores.iter().map(Store::url).collect::<Vec<_>>().join(", ");
        Error::new(ErrorKind::NotFound, format!("snapshot {name}"), format!("is not in {places}"))
            .mend("'vmar snapshot list' shows the names")
    }

    /// What each store has of a snapshot; none where it has nothing.
    pub fn copies_of(&self, name: &str) -> Vec<Option<Result<Snapshot>>> {
        self.stores.iter().map(|store| store.snapshot(name)).collect()
    }

    /// Reads a snapshot: the copy of any store that is whole.
    ///
    /// # Errors
    /// No store has it, none has a copy that is whole, or two have different ones.
    pub fn load(&self, name: &str) -> Result<Snapshot> {
        check_name(name)?;
        let mut found: Option<(usize, Snapshot)> = None;
        let mut failed = None;
        for (number, copy) in self.copies_of(name).into_iter().enumerate() {
            match (copy, &found) {
                (Some(Ok(snapshot)), None) => found = Some((number, snapshot)),
                (Some(Ok(snapshot)), Some((other, first))) if snapshot != *first => {
                    let url = |n: usize| self.stores.get(n).map_or("", |store| store.url());
                    let cause = format!("is not the same in {} and {}", url(*other), url(number));
                    return Err(Error::new(ErrorKind::Corrupt, format!("snapshot {name}"), cause)
                        .mend("find out which one is right, and name only stores that have it"));
                }
                (Some(Err(e)), _) => {
                    log::warn!("{e}");
                    failed = Some(e);
                }
                _ => {}
            }
        }
        found.map(|(_, snapshot)| snapshot).ok_or_else(|| failed.unwrap_or_else(|| self.absent(name)))
    }

    /// Writes a snapshot to all stores: last of all, when its packs are there.
    ///
    /// # Errors
    /// A store does not take it, or has one of this name by now; then none has it of this process.
    pub fn publish(&self, snapshot: &Snapshot) -> Result<u64> {
        let key = place::snapshot_key(&snapshot.about.name);
        let bytes = snapshot.encode().map_err(|e| Error::io(&key, "pack it", e))?;
        for (number, store) in self.stores.iter().enumerate() {
            if let Err(e) = store.place.put_new(&key, &bytes, Care::Critical) {
                for earlier in self.stores.iter().take(number) {
                    if let Err(e) = earlier.place.remove(&key) {
                        log::warn!("half a snapshot is left: {e}");
                    }
                }
                let name = &snapshot.about.name;
                return Err(if e.kind() == ErrorKind::Exists { taken(name) } else { e });
            }
        }
        Ok(bytes.len() as u64)
    }

    /// Looks again whether all packs of a snapshot are there that was just written: somebody else may have removed some that only a
    /// snapshot had which was deleted meanwhile.
    ///
    /// # Errors
    /// One is not; the snapshot is removed.
    pub fn check_packs(&self, snapshot: &Snapshot) -> Result<()> {
        let mut there = HashSet::new();
        for store in &self.stores {
            there.extend(store.place.list(PACKS)?.iter().filter_map(|object| place::pack_id(&object.name)));
        }
        if snapshot.packs().iter().all(|id| there.contains(id)) {
            return Ok(());
        }
        let name = &snapshot.about.name;
        self.delete(name)?;
        Err(Error::new(ErrorKind::Busy, format!("snapshot {name}"), "pages that it shares were deleted meanwhile")
            .mend("take it again"))
    }

    /// Removes a snapshot; [`Stores::prune`] then removes the packs that no other one has. False: there was none.
    ///
    /// # Errors
    /// A store cannot be written.
    pub fn delete(&self, name: &str) -> Result<bool> {
        check_name(name)?;
        let found = self.snapshots()?.contains_key(name);
        for store in &self.stores {
            store.place.remove(&place::snapshot_key(name))?;
        }
        Ok(found)
    }

    /// Removes packs that no snapshot names: what deleted ones left, and writers that ended halfway. Bytes that were freed.
    ///
    /// # Errors
    /// A store cannot be read or written.
    pub fn prune(&self) -> Result<u64> {
        let mut named = HashSet::new();
        for name in self.snapshots()?.into_keys() {
            for copy in self.copies_of(&name).into_iter().flatten() {
                match copy {
                    Ok(snapshot) => named.extend(snapshot.packs()),
                    Err(e) => {
                        // It may be mended yet, and names packs that nobody can tell.
                        log::warn!("packs that no snapshot names are kept: {e}");
                        return Ok(0);
                    }
                }
            }
        }
        let mut freed = 0;
        for store in &self.stores {
            for object in store.place.list(PACKS)? {
                let unnamed = place::pack_id(&object.name).is_some_and(|id| !named.contains(&id));
                let age = SystemTime::now().duration_since(object.written).unwrap_or_default().as_secs();
                if unnamed && store.place.grace().is_none_or(|grace| age > grace) {
                    store.place.remove(&format!("{PACKS}/{}", object.name))?;
                    freed += object.bytes;
                }
            }
        }
        Ok(freed)
    }
}

/// The name is another snapshot's.
pub fn taken(name: &str) -> Error {
    Error::new(ErrorKind::Exists, format!("snapshot {name}"), "is there already")
        .mend("take another name, or delete it first")
}

/// Refuses a name that no file and no URL can have.
///
/// # Errors
/// `Usage`.
pub fn check_name(name: &str) -> Result<()> {
    let fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > 100 || name.starts_with('.') || !name.chars().all(fine) {
        return Err(Error::new(ErrorKind::Usage, format!("name {name:?}"), "cannot be that of a snapshot")
            .mend("take up to 100 letters, digits, '-', '_' and '.'"));
    }
    Ok(())
}
