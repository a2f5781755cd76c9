//! A disk that is open while a VM runs on it: who may write is settled anew each time that a VM starts or stops.
//!
//! A live migration on shared storage needs that: the destination's server is there before the source's has let go, and
//! must neither hold the disk's lock nor believe anything that it has read before.

use super::config::Geometry;
use super::disk::{Disk, Store};
use super::jobs::Jobs;
use super::request::SERIAL_SIZE;
use super::stats::Ledger;
use crate::error::{Error, ErrorKind, Result};
use crate::overlay::{self, BaseIdentity, Look, OpenOptions, Overlay};
use crate::redirect::{Base, Current, Recorder};
use crate::units::SECTOR_SIZE;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// How to open a disk, as often as it takes.
#[derive(Debug)]
pub enum Recipe {
    /// An image of a library, which stays open throughout: nobody writes it.
    Image {
        /// The image, by the map that is read at present: all disks that are opened share it.
        base: Arc<Current>,
        /// Where the VM's writes go; without one the disk is read-only.
        overlay: Option<OverlayRecipe>,
    },
    /// A raw file as it is.
    File {
        /// The file.
        path: PathBuf,
        /// Nothing is written.
        read_only: bool,
    },
}

/// How to open an overlay.
#[derive(Clone, Debug)]
pub struct OverlayRecipe {
    /// The file.
    pub path: PathBuf,
    /// Where live bitmaps are.
    pub state_dir: PathBuf,
    /// The image below it.
    pub base: BaseIdentity,
    /// Nothing is written.
    pub read_only: bool,
    /// Give up writes whose live state is lost. Said by a human who has looked, so it counts for the first time only.
    pub discard_unflushed: bool,
}

/// An open disk and its threads.
#[derive(Clone, Debug)]
pub struct Active {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Its threads for what may wait.
    pub jobs: Arc<Jobs>,
}

/// A disk, open or not.
#[derive(Debug)]
pub struct Drive {
    recipe: Recipe,
    serial: [u8; SERIAL_SIZE],
    recorder: Arc<OnceLock<Recorder>>,
    ledger: Arc<Ledger>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    active: Option<Active>,
    /// A VM runs on it, or is about to.
    used: bool,
    /// What was seen of the disk last.
    seen: Look,
    /// What the guest has asked for while the disk was closed, or of a disk that does not remember it.
    write_cache: Option<bool>,
    discard_unflushed: bool,
}

impl Drive {
    /// A disk that is not open yet. Looks whether all is there and belongs together; takes no lock and changes nothing.
    pub fn new(recipe: Recipe, serial: [u8; SERIAL_SIZE], ledger: Arc<Ledger>) -> Result<Self> {
        let seen = recipe.look()?;
        let discard_unflushed = matches!(&recipe, Recipe::Image { overlay: Some(o), .. } if o.discard_unflushed);
        let state = Mutex::new(State { active: None, used: false, seen, write_cache: None, discard_unflushed });
        Ok(Drive { recipe, serial, recorder: Arc::default(), ledger, state })
    }

    /// Records the reads of the base from here on. Only the first recorder counts.
    pub fn set_recorder(&self, recorder: Recorder) {
        let _ = self.recorder.set(recorder);
    }

    /// What is kept on its requests.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// True when writes are refused.
    pub fn read_only(&self) -> bool {
        match &self.recipe {
            Recipe::Image { overlay, .. } => overlay.as_ref().is_none_or(|o| o.read_only),
            Recipe::File { read_only, .. } => *read_only,
        }
    }

    /// The image that it reads, if it is one of a library.
    pub fn image(&self) -> Option<&Arc<Current>> {
        match &self.recipe {
            Recipe::Image { base, .. } => Some(base),
            Recipe::File { .. } => None,
        }
    }

    /// What the guest may know of it. Of a disk that is not open it tells what is there now: somebody else may have it
    /// open, and may make it larger.
    pub fn geometry(&self, num_queues: u16) -> Geometry {
        let mut state = self.state();
        if let Some(active) = &state.active {
            return active.disk.geometry(num_queues);
        }
        match self.recipe.look() {
            Ok(seen) => state.seen = seen,
            Err(e) => log::warn!("{e}"),
        }
        Geometry {
            size: state.seen.size / SECTOR_SIZE * SECTOR_SIZE,
            read_only: self.read_only(),
            write_cache: state.write_cache.unwrap_or(state.seen.write_cache),
            num_queues,
        }
    }

    /// The open disk. Whoever keeps it keeps its lock: let go of it before [`Drive::inactivate`] is called.
    pub fn active(&self) -> Option<Active> {
        self.state().active.clone()
    }

    /// Opens the disk, if it is not open: takes its lock and begins or takes up its session. May wait some seconds for the
    /// lock.
    ///
    /// # Errors
    /// Those of opening; the disk stays closed then and nothing may be served.
    pub fn activate(&self) -> Result<Active> {
        let mut state = self.state();
        match state.active.take() {
            // Its close failed halfway: it takes no request any more, but can be opened again like that of a server that
            // was killed.
            Some(active) if active.disk.is_closed() => active.jobs.end(),
            Some(active) => {
                state.active = Some(active.clone());
                state.used = true;
                return Ok(active);
            }
            None => {}
        }
        let disk = self.open(&mut state)?;
        let disk = Arc::new(disk);
        let jobs = Arc::new(Jobs::new(Arc::clone(&disk), Arc::clone(&self.ledger)));
        let active = Active { disk, jobs };
        state.active = Some(active.clone());
        state.used = true;
        Ok(active)
    }

    fn open(&self, state: &mut State) -> Result<Disk> {
        let (base, store) = match &self.recipe {
            Recipe::Image { base, overlay } => {
                (Arc::clone(base), open_store(overlay.as_ref(), state.discard_unflushed)?)
            }
            Recipe::File { path, read_only } => {
                let store = if *read_only { Store::ReadOnly(None) } else { Store::InPlace };
                (Current::new(Base::flat(path, !read_only)?), store)
            }
        };
        state.discard_unflushed = false;
        let disk = Disk::new(base, store, self.serial, Arc::clone(&self.recorder));
        if let Some(on) = state.write_cache
            && !disk.read_only()
        {
            disk.set_write_cache(on).map_err(|e| Error::io("the write cache", "switch", e))?;
            if self.remembers_write_cache() {
                state.write_cache = None;
            }
        }
        Ok(disk)
    }

    /// No queue uses the disk any more: [`Drive::inactivate`] may close it, until it is activated again.
    pub fn release(&self) {
        self.state().used = false;
    }

    /// Closes the disk, if it is open and was released: flushes, closes its session, lets go of its lock. Holds up whoever
    /// wants to know anything of the disk: when the flush may take long, one comes before.
    ///
    /// # Errors
    /// When it cannot be flushed, or requests of it hang in the kernel. Lock and session are kept then: a second writer
    /// would be worse than one that has to wait.
    pub fn inactivate(&self) -> Result<()> {
        let mut state = self.state();
        let Some(active) = state.active.clone().filter(|_| !state.used) else { return Ok(()) };
        if self.ledger.stuck() > 0 {
            return Err(Error::new(ErrorKind::Busy, "the disk", "stays open: requests of it hang in the kernel"));
        }
        active.disk.close()?;
        state.seen = Look { size: active.disk.size(), write_cache: !active.disk.write_through() };
        // Its threads hold the disk, and the disk holds the lock.
        active.jobs.end();
        state.active = None;
        Ok(())
    }

    /// Ends its life in order: ends the trace and closes the disk.
    ///
    /// # Errors
    /// Those of [`Drive::inactivate`].
    pub fn close(&self) -> Result<()> {
        if let Some(recorder) = self.recorder.get() {
            recorder.finish();
        }
        self.release();
        self.inactivate()
    }

    /// Switches the write cache, see [`Disk::set_write_cache`]. If the disk is not open it will be opened so.
    pub fn set_write_cache(&self, on: bool) -> std::io::Result<()> {
        let mut state = self.state();
        if self.read_only() {
            return Err(std::io::ErrorKind::ReadOnlyFilesystem.into());
        }
        if let Some(active) = &state.active {
            active.disk.set_write_cache(on)?;
            if self.remembers_write_cache() {
                state.write_cache = None;
                return Ok(());
            }
        }
        state.write_cache = Some(on);
        Ok(())
    }

    /// An overlay remembers the mode itself, wherever the VM runs next. What was asked for here must not come back with
    /// the VM: it may have asked another server for something else meanwhile.
    fn remembers_write_cache(&self) -> bool {
        matches!(self.recipe, Recipe::Image { .. })
    }

    /// Makes the disk larger; what is new reads as zeros. A disk that is not open is opened for it.
    ///
    /// # Errors
    /// `Usage` for a size that cannot be, `Unsupported` for a disk that is read-only; those of opening. The size is the old
    /// one then.
    pub fn resize(&self, size: u64) -> Result<()> {
        let mut state = self.state();
        if let Some(active) = &state.active {
            return active.disk.resize(size);
        }
        let disk = self.open(&mut state)?;
        let resized = disk.resize(size);
        disk.close()?;
        resized
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Between any two statements the state is one that can be gone on with.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Recipe {
    /// Looks from outside.
    fn look(&self) -> Result<Look> {
        let cached = |size| Look { size, write_cache: true };
        match self {
            Recipe::Image { overlay: Some(o), .. } => overlay::look(&o.path, o.base),
            Recipe::Image { base, overlay: None } => Ok(cached(base.get().size())),
            Recipe::File { path, read_only } => Base::look_flat(path, !read_only).map(cached),
        }
    }
}

fn open_store(recipe: Option<&OverlayRecipe>, discard_unflushed: bool) -> Result<Store> {
    let Some(recipe) = recipe else { return Ok(Store::ReadOnly(None)) };
    let options = OpenOptions {
        read_only: recipe.read_only,
        state_dir: &recipe.state_dir,
        base: Some(recipe.base),
        discard_unflushed,
    };
    let overlay = Overlay::open(&recipe.path, &options)?;
    Ok(if recipe.read_only { Store::ReadOnly(Some(overlay)) } else { Store::Overlay(overlay) })
}
