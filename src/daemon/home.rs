//! Where a served image comes from: its library, the lease on it, and the way to another map while the VM runs.
//!
//! A change of the map costs the VM nothing: the new map and the images that it needs are opened and checked by the thread
//! of the control socket, the queues take it between two batches, and what is in flight ends with the old one
//! ([`crate::redirect::current`]). If anything is wrong with the new one, the old one goes on: images never change, so a map
//! stays right for as long as its images are open.

use crate::error::{Error, ErrorKind, Result};
use crate::library::{ImageRecord, Lease, LeaseInfo, LeaseTarget, Library};
use crate::redirect::{Base, Current, Passed, Retired};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// How often to begin anew when the library changes between two looks at it.
const TRIES: u32 = 10;
const TRY_PAUSE: Duration = Duration::from_millis(20);

/// How long whoever asked for another map waits for the old one to be closed; it is closed in any case.
const CLOSE_TIME: Duration = Duration::from_secs(1);
const SWEEP_PAUSE: Duration = Duration::from_millis(50);

/// Old maps that requests may still hold open, before there is no other change: a disk that hangs holds them for long.
const OLD_MAX: usize = 4;

/// What a server knows of the library that its image is in.
#[derive(Debug)]
pub struct Home {
    dir: PathBuf,
    leased: Mutex<Leased>,
    /// The lease covers the base that is read.
    cover: Mutex<Option<Cover>>,
    old: Mutex<Old>,
}

/// The lease, and what it has to cover.
#[derive(Debug)]
struct Leased {
    lease: Option<Lease>,
    /// The images of each base that is open, by number.
    covers: Vec<(u64, Vec<LeaseTarget>)>,
    next: u64,
}

/// As long as this lives, the lease covers the images of a base.
#[derive(Debug)]
struct Cover {
    home: Weak<Home>,
    number: u64,
}

/// Bases that were replaced and are still in use.
#[derive(Debug, Default)]
struct Old {
    bases: Vec<(Retired, Cover)>,
    /// A thread looks after them.
    swept: bool,
}

/// An image, ready to be served.
pub struct Opened {
    /// Its map and all that it points to.
    pub base: Base,
    /// The library as it was then.
    pub library: Library,
    /// What the library says of the image.
    pub record: ImageRecord,
    /// Its home.
    pub home: Arc<Home>,
}

/// A base, as a reload tells of it.
#[derive(Clone, Debug)]
pub struct Outline {
    /// The images that its map points to.
    pub targets: Vec<LeaseTarget>,
    /// Entries of the map.
    pub entries: u64,
}

/// What has come of a reload.
#[derive(Clone, Debug)]
pub struct Reloaded {
    /// The map before.
    pub old: Outline,
    /// The map from now on.
    pub new: Outline,
    /// The old one and what only it pointed to is closed. Otherwise requests still use it.
    pub closed: bool,
}

impl Outline {
    /// Of that base.
    pub fn of(base: &Base) -> Outline {
        Outline { targets: targets(base), entries: base.entries() }
    }
}

fn targets(base: &Base) -> Vec<LeaseTarget> {
    base.targets().map(|t| LeaseTarget { id: t.image.0, generation: t.generation }).collect()
}

impl Home {
    /// Opens an image of the library in `dir` and takes a lease on all that it reads, in the order that
    /// [`crate::library::lease`] asks for. `control`: where the control socket will be.
    ///
    /// # Errors
    /// Those of [`Base::open`] and [`Lease::take`].
    pub fn open(dir: &Path, name: &str, control: Option<&Path>) -> Result<Opened> {
        let opened = settled(dir, |library| {
            let record = library.image(name)?.clone();
            let base = Base::open(library, name)?;
            let info = LeaseInfo { targets: targets(&base), ..LeaseInfo::of_this_process(&record, control) };
            Ok((base, (record, Lease::take(library, &info)?)))
        })?;
        let (library, base, (record, lease)) = opened;
        let leased = Leased { lease, covers: Vec::new(), next: 0 };
        let dir = std::path::absolute(dir).unwrap_or_else(|_| dir.to_path_buf());
        let home = Arc::new(Home { dir, leased: Mutex::new(leased), cover: Mutex::default(), old: Mutex::default() });
        let cover = home.cover(&base)?;
        *lock(&home.cover) = Some(cover);
        Ok(Opened { base, library, record, home })
    }

    /// Changes to the map that the library has now.
    ///
    /// # Errors
    /// Those of [`Base::reopen`]. The old map is read on then, whatever has failed.
    pub fn reload(self: &Arc<Self>, current: &Current) -> Result<Reloaded> {
        self.sweep()?;
        let now = current.get();
        let (_, base, cover) = settled(&self.dir, |library| {
            let base = now.reopen(library)?;
            let cover = self.cover(&base)?;
            Ok((base, cover))
        })?;
        drop(now);
        self.change(current, base, cover)
    }

    /// Changes to a map that was passed, with the images that are not open yet.
    ///
    /// # Errors
    /// Those of [`Base::reopen_by`]. The old map is read on then, whatever has failed.
    pub fn reload_by(self: &Arc<Self>, current: &Current, map: &File, passed: Vec<Passed>) -> Result<Reloaded> {
        self.sweep()?;
        let base = current.get().reopen_by(map, passed)?;
        let cover = self.cover(&base)?;
        self.change(current, base, cover)
    }

    /// Ends the lease: nothing of the library is read any more.
    pub fn end(&self) {
        drop(lock(&self.leased).lease.take());
    }

    /// The file of the lease, if there is one.
    pub fn lease(&self) -> Option<PathBuf> {
        lock(&self.leased).lease.as_ref().map(|lease| lease.path().to_path_buf())
    }

    fn change(self: &Arc<Self>, current: &Current, base: Base, cover: Cover) -> Result<Reloaded> {
        let new = Outline::of(&base);
        let retired = current.replace(base)?;
        let old = Outline::of(retired.base());
        let before = lock(&self.cover).replace(cover);
        log::info!("the block map is another one now: {} entries, before {}", new.entries, old.entries);
        let closed = match (retired.close_in_time(Some(CLOSE_TIME)), before) {
            (Ok(()), before) => {
                // Only now the lease may shrink.
                drop(before);
                true
            }
            (Err(used), Some(before)) => {
                self.linger(used, before);
                false
            }
            (Err(_), None) => unreachable!("each base is covered"),
        };
        Ok(Reloaded { old, new, closed })
    }

    /// Has the lease cover the images of a base, too.
    fn cover(self: &Arc<Self>, base: &Base) -> Result<Cover> {
        let mut leased = lock(&self.leased);
        let number = leased.next;
        leased.next += 1;
        leased.covers.push((number, targets(base)));
        // If it cannot, this is taken back by the drop, behind the lock.
        let cover = Cover { home: Arc::downgrade(self), number };
        let told = leased.tell();
        drop(leased);
        told.map(|()| cover)
    }

    /// Closes old bases that are not used any more.
    ///
    /// # Errors
    /// `Busy` when there are too many that are.
    fn sweep(&self) -> Result<()> {
        if self.sweep_once() <= OLD_MAX {
            return Ok(());
        }
        let cause = format!("still has requests in flight on {OLD_MAX} earlier maps");
        Err(Error::new(ErrorKind::Busy, "the disk", cause).mend("try again when the host's disk answers"))
    }

    /// Tells how many are left.
    fn sweep_once(&self) -> usize {
        let mut old = lock(&self.old);
        let mut gone = Vec::new();
        let bases = std::mem::take(&mut old.bases);
        for (retired, cover) in bases {
            match retired.close() {
                Ok(()) => gone.push(cover),
                Err(used) => old.bases.push((used, cover)),
            }
        }
        old.bases.len()
    }

    /// Closes a base when it is not used any more, which nobody waits for.
    fn linger(self: &Arc<Self>, used: Retired, cover: Cover) {
        let mut old = lock(&self.old);
        old.bases.push((used, cover));
        if old.swept {
            return;
        }
        let home = Arc::clone(self);
        let thread = std::thread::Builder::new().name("vmar-close".into()).spawn(move || {
            loop {
                std::thread::sleep(SWEEP_PAUSE);
                home.sweep_once();
                let mut old = lock(&home.old);
                if old.bases.is_empty() {
                    old.swept = false;
                    return;
                }
            }
        });
        match thread {
            Ok(_) => old.swept = true,
            Err(e) => log::error!("cannot start a thread, so the old map is closed with the next change: {e}"),
        }
    }
}

impl Leased {
    /// Writes into the lease what it has to cover.
    fn tell(&mut self) -> Result<()> {
        let Some(lease) = &mut self.lease else { return Ok(()) };
        let mut all: Vec<LeaseTarget> = self.covers.iter().flat_map(|(_, targets)| targets.iter().copied()).collect();
        all.sort_unstable();
        all.dedup();
        if all == lease.info().targets { Ok(()) } else { lease.update(all) }
    }
}

impl Drop for Cover {
    fn drop(&mut self) {
        let Some(home) = self.home.upgrade() else { return };
        let mut leased = lock(&home.leased);
        leased.covers.retain(|(number, _)| *number != self.number);
        // A lease that names too much is a nuisance, and no danger.
        if let Err(e) = leased.tell() {
            log::warn!("{e}");
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Opens something in the library until the library is, afterwards, still as it was: a writer may be at work.
fn settled<T>(dir: &Path, open: impl Fn(&Library) -> Result<(Base, T)>) -> Result<(Library, Base, T)> {
    for _ in 0..TRIES {
        let library = Library::open(dir)?;
        let opened = open(&library);
        let now = Library::open(dir)?;
        match opened {
            Ok((base, with)) if base.is_current(&now)? => return Ok((library, base, with)),
            // Catalog and map, or file, of two moments do not fit.
            Err(e) if library.catalog() == now.catalog() => return Err(e),
            _ => std::thread::sleep(TRY_PAUSE),
        }
    }
    Err(Error::file(ErrorKind::Busy, dir, "the library changes all the time").mend("try again when it is at rest"))
}
