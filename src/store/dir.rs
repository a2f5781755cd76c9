//! A store: a directory with packs, and the memory images that are made of them.
//!
//! ```text
//! DIR/vmar-store          {"format":"vmar-store","version":1}; locked by who writes
//! DIR/packs/ID.pack       named by what they hold
//! DIR/kept/VM.mem         the memory of a VM that left this host
//! DIR/gone/VM.mem         the hashes alone of one that came, and whose memory the host that it came from keeps
//! DIR/templates/          see [`super::templates`]
//! DIR/staging/            what is being written; whatever a writer finds there is of one that was killed
//! ```
//!
//! Everything is written in `staging`, made durable, and moved to its place: packs first, the manifest last. So a kill leaves packs
//! that no manifest names at worst, and the next writer removes them.

use super::manifest::Manifest;
use super::pack::{Pack, PackId};
use crate::error::{Error, ErrorKind, Result};
use crate::io::file::sync_dir;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{ErrorKind as IoKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MARK: &str = "vmar-store";
const VERSION: u32 = 1;
const PACKS: &str = "packs";
const STAGING: &str = "staging";
const ENDING: &str = "mem";

/// Which images of a store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// With their pages: the memory of VMs that left this host.
    Kept,
    /// Hashes alone: of VMs that came to this host.
    Gone,
}

impl Kind {
    fn dir(self) -> &'static str {
        match self {
            Kind::Kept => "kept",
            Kind::Gone => "gone",
        }
    }
}

/// What the mark has.
#[derive(Debug, Serialize, Deserialize)]
struct Mark {
    format: String,
    version: u32,
}

/// An image in a store, as its file tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Name of the VM.
    pub vm: String,
    /// Bytes of its manifest.
    pub bytes: u64,
    /// When it was written.
    pub written: std::time::SystemTime,
}

/// A store.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
}

/// The one who may change a store, until dropped.
#[derive(Debug)]
pub struct StoreWriter {
    store: Store,
    _lock: File,
}

impl Store {
    /// Makes an empty store, or opens the one that is there.
    ///
    /// # Errors
    /// The directory has other files, or cannot be made; or see [`Store::open`].
    pub fn create(dir: &Path) -> Result<Store> {
        if dir.join(MARK).exists() {
            return Store::open(dir);
        }
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, "make it", e))?;
        // Another process may be making it, too.
        let subs = [PACKS, STAGING, Kind::Kept.dir(), Kind::Gone.dir()];
        let looked = |e| Error::io(dir, "look at it", e);
        for entry in fs::read_dir(dir).map_err(looked)? {
            let name = entry.map_err(looked)?.file_name();
            if !subs.iter().chain([&MARK]).any(|own| name == **own) {
                return Err(Error::file(ErrorKind::Exists, dir, "is no store of memory images, and not empty")
                    .mend("name an empty or a new directory"));
            }
        }
        for sub in subs.map(|sub| dir.join(sub)) {
            fs::create_dir_all(&sub).map_err(|e| Error::io(&sub, "make it", e))?;
        }
        let mark = Mark { format: MARK.into(), version: VERSION };
        let text = serde_json::to_vec(&mark).map_err(|e| Error::new(ErrorKind::Io, "JSON", e))?;
        // Whoever sees the mark sees all of the store.
        static MADE: AtomicU64 = AtomicU64::new(0);
        let (process, made) = (std::process::id(), MADE.fetch_add(1, Ordering::Relaxed));
        let staged = dir.join(STAGING).join(format!("{MARK}.{process}.{made}"));
        write_durably(&staged, &text)?;
        rename(&staged, &dir.join(MARK))?;
        sync_dir(dir)?;
        Store::open(dir)
    }

    /// Opens a store.
    ///
    /// # Errors
    /// `NotFound` if it is none, `Unsupported` if a newer vmar made it.
    pub fn open(dir: &Path) -> Result<Store> {
        let path = dir.join(MARK);
        let text = fs::read(&path).map_err(|e| match e.kind() {
            IoKind::NotFound => {
                Error::file(ErrorKind::NotFound, dir, "is no store of memory images").mend("check the path")
            }
            _ => Error::io(&path, "read", e),
        })?;
        let broken = || Error::file(ErrorKind::Corrupt, &path, "is not the mark of a store").mend(super::MEND);
        let mark: Mark = serde_json::from_slice(&text).map_err(|_| broken())?;
        match mark {
            Mark { format, version: VERSION } if format == MARK => Ok(Store { dir: dir.to_path_buf() }),
            Mark { format, version } if format == MARK => {
                Err(Error::file(ErrorKind::Unsupported, dir, format!("has version {version}, not {VERSION}"))
                    .mend("use the vmar that made it, or a newer one"))
            }
            _ => Err(broken()),
        }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The images of a kind, the oldest first.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn entries(&self, kind: Kind) -> Result<Vec<Entry>> {
        let dir = self.dir.join(kind.dir());
        let failed = |e| Error::io(&dir, "look at it", e);
        let mut out = Vec::new();
        for file in fs::read_dir(&dir).map_err(failed)? {
            let path = file.map_err(failed)?.path();
            let vm =
                path.file_stem().and_then(|s| s.to_str()).filter(|_| path.extension().is_some_and(|e| e == ENDING));
            let (Some(vm), Ok(meta)) = (vm, path.metadata()) else { continue };
            out.push(Entry { vm: vm.into(), bytes: meta.len(), written: meta.modified().map_err(failed)? });
        }
        out.sort_by(|a, b| (a.written, &a.vm).cmp(&(b.written, &b.vm)));
        Ok(out)
    }

    /// The image of a VM, if there is one.
    ///
    /// # Errors
    /// It cannot be read, or is broken.
    pub fn image(&self, kind: Kind, vm: &str) -> Result<Option<Manifest>> {
        let path = self.path(kind, vm)?;
        match fs::read(&path) {
            Ok(bytes) => Manifest::decode(&path, &bytes).map(Some),
            Err(e) if e.kind() == IoKind::NotFound => Ok(None),
            Err(e) => Err(Error::io(&path, "read", e)),
        }
    }

    /// Opens the packs that an image names, in its order.
    ///
    /// # Errors
    /// One is not there, or is broken.
    pub fn packs(&self, manifest: &Manifest) -> Result<Vec<Pack>> {
        let open = |id: &PackId| Pack::open(&self.dir.join(PACKS).join(id.file_name()), *id);
        manifest.packs.iter().map(open).collect()
    }

    /// Where files are made that [`StoreWriter::publish`] moves to their place. Without a writer, only files without a name: a writer
    /// removes the others.
    pub fn staging(&self) -> PathBuf {
        self.dir.join(STAGING)
    }

    /// Takes the lock, and removes what a killed writer left.
    ///
    /// # Errors
    /// `Busy` when another process writes.
    pub fn writer(self) -> Result<StoreWriter> {
        let path = self.dir.join(MARK);
        let lock = File::open(&path).map_err(|e| Error::io(&path, "open it", e))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(|e| match e {
            rustix::io::Errno::WOULDBLOCK => Error::file(ErrorKind::Busy, &self.dir, "another process writes there")
                .mend("wait for its end, or name another store"),
            e => Error::io(&path, "lock it", e.into()),
        })?;
        let writer = StoreWriter { store: self, _lock: lock };
        let staging = writer.store.staging();
        for file in fs::read_dir(&staging).map_err(|e| Error::io(&staging, "look at it", e))? {
            let path = file.map_err(|e| Error::io(&staging, "look at it", e))?.path();
            fs::remove_file(&path).map_err(|e| Error::io(&path, "remove it", e))?;
        }
        writer.remove_unnamed()?;
        Ok(writer)
    }

    /// The same, and waits so long for another process that writes.
    ///
    /// # Errors
    /// `Busy` when it still writes.
    pub fn writer_within(dir: &Path, within: Duration) -> Result<StoreWriter> {
        let began = Instant::now();
        loop {
            match Store::open(dir)?.writer() {
                Err(e) if e.kind() == ErrorKind::Busy && began.elapsed() < within => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                result => return result,
            }
        }
    }

    /// The file of a VM's image. Its name is a file's name here.
    fn path(&self, kind: Kind, vm: &str) -> Result<PathBuf> {
        Ok(self.dir.join(kind.dir()).join(format!("{}.{ENDING}", check_file_name(vm)?)))
    }
}

impl StoreWriter {
    /// The store.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Puts an image in the place of the one that the VM had. `packs` were made in [`Store::staging`] and are durable.
    ///
    /// # Errors
    /// A file cannot be written or moved; then the VM has the image that it had.
    pub fn publish(&mut self, kind: Kind, manifest: &Manifest, packs: &[(PathBuf, PackId)]) -> Result<()> {
        let home = self.store.dir.join(PACKS);
        for (path, id) in packs {
            let goal = home.join(id.file_name());
            if goal.exists() {
                fs::remove_file(path).map_err(|e| Error::io(path, "remove it", e))?;
            } else {
                rename(path, &goal)?;
            }
        }
        sync_dir(&home)?;
        let goal = self.store.path(kind, &manifest.vm)?;
        let staged = self.store.staging().join("manifest");
        let bytes = manifest.encode().map_err(|e| Error::io(&staged, "pack it", e))?;
        write_durably(&staged, &bytes)?;
        rename(&staged, &goal)?;
        sync_dir(&self.store.dir.join(kind.dir()))?;
        self.remove_unnamed()
    }

    /// Removes the image of a VM. False: there was none.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&mut self, kind: Kind, vm: &str) -> Result<bool> {
        let path = self.store.path(kind, vm)?;
        match fs::remove_file(&path) {
            Ok(()) => {}
            Err(e) if e.kind() == IoKind::NotFound => return Ok(false),
            Err(e) => return Err(Error::io(&path, "remove it", e)),
        }
        sync_dir(&self.store.dir.join(kind.dir()))?;
        self.remove_unnamed()?;
        Ok(true)
    }

    /// Removes the oldest images of both kinds until all of them take no more than this; the names of their VMs. Templates are not
    /// counted: whoever made them removes them.
    ///
    /// # Errors
    /// One cannot be removed.
    pub fn evict(&mut self, bytes_max: u64) -> Result<Vec<String>> {
        let mut images = Vec::new();
        for kind in [Kind::Kept, Kind::Gone] {
            images.extend(self.store.entries(kind)?.into_iter().map(|entry| (entry.written, kind, entry.vm)));
        }
        images.sort_by_key(|(written, ..)| *written);
        let mut gone = Vec::new();
        for (_, kind, vm) in images {
            if self.store.bytes()? <= bytes_max {
                break;
            }
            self.remove(kind, &vm)?;
            gone.push(vm);
        }
        Ok(gone)
    }
}

impl Store {
    /// Bytes of all images and their packs.
    ///
    /// # Errors
    /// A directory cannot be read.
    pub fn bytes(&self) -> Result<u64> {
        let mut sum = 0;
        for dir in [PACKS, Kind::Kept.dir(), Kind::Gone.dir()] {
            let dir = self.dir.join(dir);
            let failed = |e| Error::io(&dir, "look at it", e);
            for file in fs::read_dir(&dir).map_err(failed)? {
                sum += file.and_then(|f| f.metadata()).map_err(failed)?.len();
            }
        }
        Ok(sum)
    }
}

impl StoreWriter {
    /// Packs that no image names are of a killed writer, or of images that are gone.
    fn remove_unnamed(&self) -> Result<()> {
        let mut named = HashSet::new();
        for kind in [Kind::Kept, Kind::Gone] {
            for entry in self.store.entries(kind)? {
                match self.store.image(kind, &entry.vm) {
                    Ok(image) => named.extend(image.into_iter().flat_map(|m| m.packs).map(|id| id.file_name())),
                    Err(e) => {
                        // It may be mended yet, and names packs that nobody can tell.
                        log::warn!("packs are not cleared: {e}");
                        return Ok(());
                    }
                }
            }
        }
        let home = self.store.dir.join(PACKS);
        for file in fs::read_dir(&home).map_err(|e| Error::io(&home, "look at it", e))? {
            let file = file.map_err(|e| Error::io(&home, "look at it", e))?;
            if !file.file_name().to_str().is_some_and(|name| named.contains(name)) {
                fs::remove_file(file.path()).map_err(|e| Error::io(file.path(), "remove it", e))?;
            }
        }
        Ok(())
    }
}

/// Refuses a VM's or a domain's name that no file can have.
pub(super) fn check_file_name(name: &str) -> Result<&str> {
    if name.is_empty() || name.len() > 200 || name.starts_with('.') || name.contains(['/', '\0']) {
        return Err(Error::new(ErrorKind::Usage, format!("name {name:?}"), "cannot be the name of a file")
            .mend("take letters, digits, - and _"));
    }
    Ok(name)
}

fn write_durably(path: &Path, bytes: &[u8]) -> Result<()> {
    let written = File::create(path).and_then(|mut file| file.write_all(bytes).and_then(|()| file.sync_all()));
    written.map_err(|e| Error::io(path, "write", e))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    fs::rename(from, to).map_err(|e| Error::io(from, &format!("move it to {}", to.display()), e))
}

#[cfg(test)]
mod tests {
    use super::super::PAGE_BYTES;
    use super::super::manifest::{Held, MemoryBlock, Page};
    use super::super::pack::PackWriter;
    use super::*;

    /// An image of one page with this byte.
    fn put(writer: &mut StoreWriter, vm: &str, byte: u8) -> PackId {
        let page = [byte; PAGE_BYTES];
        let hash = *blake3::hash(&page).as_bytes();
        let path = writer.store().staging().join("new.pack");
        let mut pack = PackWriter::create(&path).unwrap();
        pack.push(&hash, &page).unwrap();
        let id = pack.finish().unwrap();
        let manifest = Manifest {
            vm: vm.into(),
            blocks: vec![MemoryBlock { name: b"ram".to_vec(), len: 4096 }],
            packs: vec![id],
            pages: vec![Page { hash, held: Held::Pack { pack: 0, page: 0 } }],
            ..Manifest::default()
        };
        writer.publish(Kind::Kept, &manifest, &[(path, id)]).unwrap();
        id
    }

    fn packs(dir: &Path) -> usize {
        fs::read_dir(dir.join(PACKS)).unwrap().count()
    }

    #[test]
    fn images_share_packs_and_packs_go_with_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Store::create(dir.path()).unwrap().writer().unwrap();
        assert_eq!(put(&mut writer, "web", 1), put(&mut writer, "db", 1));
        assert_eq!(packs(dir.path()), 1);
        put(&mut writer, "mail", 2);
        let store = Store::open(dir.path()).unwrap();
        let image = store.image(Kind::Kept, "db").unwrap().unwrap();
        let mut page = [0; PAGE_BYTES];
        store.packs(&image).unwrap()[0].read(0, &mut page).unwrap();
        assert_eq!(page, [1; PAGE_BYTES]);
        assert!(writer.remove(Kind::Kept, "web").unwrap() && !writer.remove(Kind::Kept, "web").unwrap());
        assert_eq!(packs(dir.path()), 2);
        writer.remove(Kind::Kept, "db").unwrap();
        assert_eq!(packs(dir.path()), 1);
        assert_eq!(store.image(Kind::Kept, "db").unwrap(), None);
        // What takes its place.
        put(&mut writer, "mail", 3);
        assert_eq!(packs(dir.path()), 1);
    }

    #[test]
    fn the_oldest_go_when_there_is_no_room() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Store::create(dir.path()).unwrap().writer().unwrap();
        for (n, vm) in ["a", "b", "c"].into_iter().enumerate() {
            put(&mut writer, vm, n as u8 + 1);
            let file = File::options().write(true).open(dir.path().join(format!("kept/{vm}.mem"))).unwrap();
            file.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(n as u64)).unwrap();
        }
        let all = writer.store().bytes().unwrap();
        assert_eq!(writer.evict(all).unwrap(), [""; 0]);
        assert_eq!(writer.evict(all - 1).unwrap(), ["a"]);
        assert_eq!(writer.evict(0).unwrap(), ["b", "c"]);
        assert_eq!((writer.store().bytes().unwrap(), packs(dir.path())), (0, 0));
    }

    #[test]
    fn one_writes_at_a_time_and_clears_up_after_a_kill() {
        let dir = tempfile::tempdir().unwrap();
        let writer = Store::create(dir.path()).unwrap().writer().unwrap();
        let busy = Store::open(dir.path()).unwrap().writer().unwrap_err();
        assert_eq!(busy.kind(), ErrorKind::Busy);
        drop(writer);
        fs::write(dir.path().join("staging/new.pack"), b"half").unwrap();
        fs::write(dir.path().join("packs").join(PackId([1; 32]).file_name()), b"unnamed").unwrap();
        Store::open(dir.path()).unwrap().writer().unwrap();
        assert_eq!((packs(dir.path()), fs::read_dir(dir.path().join(STAGING)).unwrap().count()), (0, 0));
    }

    #[test]
    fn a_broken_image_keeps_all_packs() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = Store::create(dir.path()).unwrap().writer().unwrap();
        put(&mut writer, "web", 1);
        fs::write(dir.path().join("kept/db.mem"), b"vmar-mem, but not really").unwrap();
        writer.remove(Kind::Kept, "web").unwrap();
        assert_eq!(packs(dir.path()), 1);
    }

    #[test]
    fn two_make_a_store_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        std::thread::scope(|scope| {
            let makers: Vec<_> = (0..8).map(|_| scope.spawn(|| Store::create(&path).map(|_| ()))).collect();
            makers.into_iter().for_each(|maker| maker.join().unwrap().unwrap());
        });
        Store::open(&path).unwrap().writer().unwrap();
    }

    #[test]
    fn what_is_no_store_is_named() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Store::open(dir.path()).unwrap_err().kind(), ErrorKind::NotFound);
        fs::write(dir.path().join("letter.txt"), b"x").unwrap();
        assert_eq!(Store::create(dir.path()).unwrap_err().kind(), ErrorKind::Exists);
        fs::write(dir.path().join(MARK), br#"{"format":"vmar-store","version":2}"#).unwrap();
        assert!(Store::open(dir.path()).unwrap_err().to_string().contains("version 2"));
        let new = dir.path().join("new");
        let store = Store::create(&new).unwrap();
        for vm in ["", "../x", ".x", "a/b"] {
            assert_eq!(store.image(Kind::Kept, vm).unwrap_err().kind(), ErrorKind::Usage, "{vm}");
        }
    }
}
