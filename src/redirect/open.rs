//! Opens bases: everything that a read relies on later is made sure of here.

use super::{Base, Open, ahead};
use crate::error::{Error, ErrorKind, Result};
use crate::io::lock::{self, Access};
use crate::io::{Hot, Mapping, file};
use crate::library::{ImageRecord, Library};
use crate::map::{Map, Target};
use crate::redirect::plan::Layout;
use rustix::fs::OFlags;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

/// How long to try for the lock of a base image.
const BASE_LOCK_WAIT: Duration = Duration::from_millis(500);

/// A file that somebody else has opened for us.
#[derive(Debug)]
pub struct Passed {
    /// The image that it is said to be.
    pub image: crate::units::ImageId,
    /// Its generation.
    pub generation: u64,
    /// The file, opened for nobody else: its locks are ours from now on.
    pub file: File,
}

impl Base {
    /// Opens the image of that name: its map, and each image that the map points to, if it is still the one that the map
    /// was made for.
    ///
    /// # Errors
    /// `Corrupt` for a broken map, `Changed` when map, catalog and files do not belong together, `NotFound` when one is
    /// missing. Nothing is ever served in place of what is missing.
    pub fn open(library: &Library, name: &str) -> Result<Base> {
        open_record(library, library.image(name)?, None)
    }

    /// Opens the same image of the library again, by its present map. Images that are open already stay open, with what is
    /// known of them.
    ///
    /// # Errors
    /// Those of [`Base::open`]; `NotFound` and `Changed` when the library has the image no more, or another generation of
    /// it.
    pub fn reopen(&self, library: &Library) -> Result<Base> {
        let own = self.source().ok_or_else(not_an_image)?;
        let record = library.image_by_id(own.image)?;
        if identity(record) != own {
            let cause = format!(
                "the library has generation {} of it, and generation {} is served here",
                record.generation, own.generation
            );
            return Err(Error::new(ErrorKind::Changed, format!("image {}", record.name), cause)
                .mend("the server goes on with the map that it has"));
        }
        open_record(library, record, Some(self))
    }

    /// The same by files that were passed: a map of this image, and the images that it points to, but for those that are
    /// open already.
    ///
    /// # Errors
    /// `Corrupt` for a broken map; `Changed` when it is another image's, or a file is not as large as the image that it is
    /// said to be; `NotFound` when one is missing; `Usage` for one that nobody needs or that cannot be read.
    pub fn reopen_by(&self, map: &File, passed: Vec<Passed>) -> Result<Base> {
        let name = Path::new("the map that was passed");
        let own = self.source().ok_or_else(not_an_image)?;
        check_readable(map, name)?;
        let mapping = Mapping::of(map).map_err(|e| Error::io(name, "map it", e))?;
        let map = Map::new(mapping).map_err(|e| e.at(name))?;
        if map.source() != own {
            let is = map.source();
            let cause = format!("is the map of image {}, generation {}, of {} bytes", is.image, is.generation, is.size);
            return Err(Error::file(ErrorKind::Changed, name, cause).mend(format!(
                "pass one of image {}, generation {}, of {} bytes, with the same content",
                own.image, own.generation, own.size
            )));
        }
        let mut passed: Vec<Option<Passed>> = passed.into_iter().map(Some).collect();
        let targets = map
            .targets()
            .map(|(target, _)| {
                let is_it = |p: &&mut Option<Passed>| {
                    p.as_ref().is_some_and(|p| (p.image, p.generation) == (target.image, target.generation))
                };
                let found = passed.iter_mut().find(is_it).and_then(Option::take);
                match (self.held(target), found) {
                    (Some(open), _) => Ok(open),
                    (None, Some(found)) => open_passed(found.file, target).map(Arc::new),
                    (None, None) => {
                        let cause = format!("points to image {}, generation {}", target.image, target.generation);
                        Err(Error::file(ErrorKind::NotFound, name, cause).mend("pass that image's file, too"))
                    }
                }
            })
            .collect::<Result<Vec<_>>>()?;
        if let Some(Passed { image, generation, .. }) = passed.into_iter().flatten().next() {
            let cause = format!("was passed, but the map does not point to it (generation {generation})");
            return Err(Error::new(ErrorKind::Usage, format!("image {image}"), cause).mend("pass what the map names"));
        }
        Ok(Base::mapped(map, targets, self.readahead))
    }

    /// True when the library, as it is now, still has the map that this base reads by, and all images that it points to.
    /// (Whether the image's name is the same makes no difference.)
    pub fn is_current(&self, library: &Library) -> Result<bool> {
        let Layout::Mapped(map) = &self.layout else { return Ok(true) };
        let is_there = |target: Target| library.image_by_id(target.image).is_ok_and(|r| identity(r) == target);
        if !is_there(map.source()) || !map.targets().all(|(target, _)| is_there(target)) {
            return Ok(false);
        }
        let path = library.map_path(&library.image_by_id(map.source().image)?.name);
        match Mapping::open(&path) {
            Ok(now) => Ok(*now == *map.bytes()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(Error::io(&path, "open the block map", e)),
        }
    }

    fn mapped(map: Map<Mapping>, targets: Vec<Arc<Open>>, readahead: u64) -> Base {
        let size = AtomicU64::new(map.source().size);
        Base { layout: Layout::Mapped(Box::new(map)), targets, size, readahead }
    }

    /// A target that is open already.
    fn held(&self, target: Target) -> Option<Arc<Open>> {
        self.targets.iter().find(|open| open.target == target).map(Arc::clone)
    }
}

fn not_an_image() -> Error {
    Error::new(ErrorKind::Unsupported, "the disk", "is a raw file served as it is (--blk-file), which has no block map")
}

/// What a map would say of the image.
fn identity(record: &ImageRecord) -> Target {
    Target { image: record.id, generation: record.generation, digest: record.digest, size: record.size }
}

fn open_record(library: &Library, record: &ImageRecord, held: Option<&Base>) -> Result<Base> {
    let path = library.map_path(&record.name);
    let mapping = Mapping::open(&path).map_err(|e| {
        let err = Error::io(&path, "open the block map", e);
        if err.kind() == ErrorKind::NotFound { err.mend("make it anew with 'vmar library remap'") } else { err }
    })?;
    let map = Map::new(mapping).map_err(|e| e.at(&path))?;
    if map.source() != identity(record) {
        return Err(Error::file(
            ErrorKind::Changed,
            &path,
            format!("is the map of another image than {}", record.name),
        )
        .mend("restore the map that belongs to this library"));
    }
    let open = |target| match held.and_then(|base| base.held(target)) {
        Some(open) => Ok(open),
        None => open_target(library, &path, target).map(Arc::new),
    };
    let targets = map.targets().map(|(target, _)| open(target)).collect::<Result<_>>()?;
    Ok(Base::mapped(map, targets, held.map_or(ahead::WINDOW, |base| base.readahead)))
}

/// Opens one target of a map and makes sure that it is the image that the map means.
fn open_target(library: &Library, map: &Path, target: Target) -> Result<Open> {
    let record = library.image_by_id(target.image).map_err(|e| {
        Error::file(ErrorKind::Changed, map, format!("points to an image that is gone: {e}"))
            .mend("make the maps anew with 'vmar library remap', or restore the library from a copy")
    })?;
    if identity(record) != target {
        let cause = format!("was made for another generation of image {}", record.name);
        return Err(Error::file(ErrorKind::Changed, map, cause)
            .mend("make the maps anew with 'vmar library remap', or restore the library from a copy"));
    }
    let path = library.image_path(record);
    let file = library.open_image(record)?;
    prepare(file, path, target)
}

/// Takes a target that somebody else has opened.
fn open_passed(file: File, target: Target) -> Result<Open> {
    let name = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .unwrap_or_else(|_| PathBuf::from(format!("the file that was passed for image {}", target.image)));
    check_readable(&file, &name)?;
    let size = file.metadata().map_err(|e| Error::io(&name, "look at it", e))?.len();
    if size != target.size {
        let cause = format!("has {size} bytes, but image {} of the map {}", target.image, target.size);
        return Err(Error::file(ErrorKind::Changed, &name, cause).mend("pass the file of that image"));
    }
    prepare(file, name, target)
}

/// Refuses what cannot be read as an image or a map is read here: by mappings, and through the page cache.
fn check_readable(file: &File, name: &Path) -> Result<()> {
    let refuse = |cause: &str| Err(Error::file(ErrorKind::Usage, name, cause).mend("pass a file opened for reading"));
    let flags = rustix::fs::fcntl_getfl(file).map_err(|e| Error::io(name, "look at it", e.into()))?;
    if !file.metadata().map_err(|e| Error::io(name, "look at it", e))?.is_file() {
        return refuse("is not a regular file");
    }
    if flags.intersects(OFlags::PATH | OFlags::DIRECT) || flags.contains(OFlags::WRONLY) {
        return refuse("is not open for plain reading (O_PATH, O_DIRECT, O_WRONLY)");
    }
    Ok(())
}

fn prepare(file: File, path: PathBuf, target: Target) -> Result<Open> {
    // Other VMs may read it too, through vmar or not; nobody may write it ('qemu-img commit' into it would). No process
    // that was killed is in the way of that for longer than it takes to die, so there is little to wait for.
    lock::lock(&file, &path, Access::Read, BASE_LOCK_WAIT)?;
    file::disable_readahead(&file).map_err(|e| Error::io(&path, "switch readahead off", e))?;
    let hot = Hot::map(&file, target.size);
    Ok(Open { target, path, file, hot })
}
