//! The overlay of a VM, where it leaves and where it comes: `vmar migrate --with-disk`, and snapshots.

use crate::error::{Error, ErrorKind, Result};
use crate::migrate::disk::{ArrivingDisk, Each, LeavingDisk};
use crate::migrate::stream::PAGE_BYTES;
use crate::migrate::wire::Disk;
use crate::overlay::{self, BaseRead, CreateOptions, Glance, OpenOptions, Overlay, SessionInfo, State};
use crate::units::BLOCK_SIZE;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long the server of a VM that stands still may take until it lets go of the overlay.
const LETS_GO: Duration = Duration::from_secs(20);

/// The base image, to fill blocks that the overlay holds in part.
struct Base {
    path: PathBuf,
    file: File,
}

impl Base {
    fn open(path: &Path) -> Result<Base> {
        let file = File::open(path).map_err(|e| Error::io(path, "open the base image", e))?;
        Ok(Base { path: path.to_path_buf(), file })
    }
}

impl BaseRead for Base {
    fn read_base(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset + done as u64) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}

/// The overlay of a VM that leaves.
pub struct Leaving {
    path: PathBuf,
    state_dir: PathBuf,
    size: u64,
    base: Base,
    digest: [u8; 32],
}

impl Leaving {
    /// Whose server has its live bitmaps in `state_dir`.
    ///
    /// # Errors
    /// It is no overlay, or cannot be looked at.
    pub fn open(path: &Path, state_dir: &Path) -> Result<Leaving> {
        let glance = Glance::take(path, state_dir)?;
        Ok(Leaving {
            path: path.to_path_buf(),
            state_dir: state_dir.to_path_buf(),
            size: glance.size,
            base: Base::open(&glance.backing)?,
            digest: glance.base.digest,
        })
    }

    /// What the receiver is told of it.
    pub fn offer(&self) -> Disk {
        Disk { size: self.size, base: self.digest }
    }

    /// A look at it; at the last one nobody has it open any more.
    fn glance(&self, last: bool) -> Result<Glance> {
        let began = Instant::now();
        let glance = loop {
            let glance = Glance::take(&self.path, &self.state_dir)?;
            if glance.closed || !last {
                break glance;
            }
            if began.elapsed() > LETS_GO {
                let cause = "its server has not let go of it although the VM stands still";
                return Err(Error::file(ErrorKind::Busy, &self.path, cause)
                    .mend("is it the overlay of this VM's only disk, served by 'vmar serve'?"));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        if glance.size != self.size {
            let cause = format!("had {} bytes when the migration began, and has {} now", self.size, glance.size);
            return Err(Error::file(ErrorKind::Changed, &self.path, cause).mend("migrate again"));
        }
        Ok(glance)
    }

    /// The content of a block that lies in one or more runs.
    fn read(&self, glance: &Glance, block: u64, parts: &[overlay::Run], page: &mut [u8; PAGE_BYTES]) -> Result<()> {
        page.fill(0);
        let start = block * BLOCK_SIZE;
        for part in parts {
            let from = part.offset.max(start);
            let to = (part.offset + part.len).min(start + BLOCK_SIZE);
            let range = usize::try_from(from - start).unwrap_or(0)..usize::try_from(to - start).unwrap_or(0);
            let Some(bytes) = page.get_mut(range) else { continue };
            match part.state {
                State::Data => glance.read(from, bytes)?,
                State::Base => {
                    let read = self.base.read_base(from, bytes);
                    read.map_err(|e| Error::io(&self.base.path, "read", e))?;
                }
                State::Zero => {}
            }
        }
        Ok(())
    }
}

impl LeavingDisk for Leaving {
    fn look(&self, last: bool, each: Each<'_>) -> Result<bool> {
        let glance = self.glance(last)?;
        let mut page = [0; PAGE_BYTES];
        // Runs that share a block with those before them.
        let mut shared: Vec<overlay::Run> = Vec::new();
        for run in glance.runs() {
            let (mut at, end) = (run.offset, run.offset + run.len);
            // Blocks that end inside this run: the first may have begun in others.
            while let block = at / BLOCK_SIZE
                && let next = ((block + 1) * BLOCK_SIZE).min(glance.size)
                && next <= end
                && at < end
            {
                shared.push(overlay::Run { offset: at, len: next - at, ..run });
                if shared.iter().all(|part| part.state == State::Zero) {
                    each(block, None)?;
                } else if shared.iter().any(|part| part.state != State::Base) {
                    self.read(&glance, block, &shared, &mut page)?;
                    each(block, Some(&page))?;
                } else if run.state == State::Base {
                    // Whole blocks of the base: nothing to say, and there may be millions.
                    shared.clear();
                    at = (end / BLOCK_SIZE * BLOCK_SIZE).max(next);
                    continue;
                }
                shared.clear();
                at = next;
            }
            if at < end {
                shared.push(overlay::Run { offset: at, len: end - at, ..run });
            }
        }
        Ok(glance.write_cache)
    }
}

/// The overlay of a VM that comes: written beside the empty one that its server was given, and in its place when it is complete.
pub struct Arriving {
    path: PathBuf,
    new: PathBuf,
    overlay: Overlay,
    base: Base,
    /// The new file is in its place.
    settled: bool,
}

impl Arriving {
    /// In place of the empty overlay at `path`, for the disk that a sender offers.
    ///
    /// # Errors
    /// It holds data, is of another image or size, or is in use.
    pub fn open(path: &Path, state_dir: &Path, offer: &Disk) -> Result<Arriving> {
        let empty = overlay::inspect(path, state_dir)?;
        let refuse = |kind, cause: String, mend: &str| Err(Error::file(kind, path, cause).mend(mend));
        if empty.data_subclusters + empty.zero_subclusters > 0 || empty.session != SessionInfo::Closed || empty.in_use {
            let mend = "remove it if nobody needs it, and make a new one with 'vmar overlay create'";
            return refuse(ErrorKind::Exists, "is not empty, or is in use".into(), mend);
        }
        if empty.base.digest != offer.base {
            let cause = "was made on another image than the disk of the VM that comes".to_string();
            return refuse(ErrorKind::Changed, cause, "make it on that image, or on a copy of it");
        }
        if empty.size != offer.size {
            let cause = format!("is a disk of {} bytes, and the VM's has {}", empty.size, offer.size);
            return refuse(ErrorKind::Changed, cause, "make it with --size of the VM's disk");
        }
        let options =
            CreateOptions { backing: &empty.backing, base: empty.base, size: empty.size, capacity: empty.capacity };
        Arriving::begin(path, state_dir, &options)
    }

    /// Where there is no file yet.
    ///
    /// # Errors
    /// There is one, or it cannot be made.
    pub fn create(path: &Path, state_dir: &Path, options: &CreateOptions<'_>) -> Result<Arriving> {
        Arriving::check_free(path)?;
        Arriving::begin(path, state_dir, options)
    }

    /// Whether there is no file yet.
    ///
    /// # Errors
    /// There is one.
    pub fn check_free(path: &Path) -> Result<()> {
        if fs::symlink_metadata(path).is_ok() {
            return Err(Error::file(ErrorKind::Exists, path, "is there already")
                .mend("name a new file, or remove it if nobody needs it"));
        }
        Ok(())
    }

    fn begin(path: &Path, state_dir: &Path, options: &CreateOptions<'_>) -> Result<Arriving> {
        let new = beside(path)?;
        remove_leftover(&new)?;
        overlay::create(&new, options)?;
        let open = OpenOptions { read_only: false, state_dir, base: Some(options.base), discard_unflushed: false };
        let overlay = Overlay::open(&new, &open).inspect_err(|_| drop(fs::remove_file(&new)))?;
        let base = Base::open(options.backing)?;
        Ok(Arriving { path: path.to_path_buf(), new, overlay, base, settled: false })
    }
}

impl ArrivingDisk for Arriving {
    fn write(&mut self, block: u64, page: Option<&[u8; PAGE_BYTES]>) -> Result<()> {
        let offset = block.saturating_mul(BLOCK_SIZE);
        let len = BLOCK_SIZE.min(self.overlay.size().saturating_sub(offset));
        let bytes = page.map(|page| page.get(..usize::try_from(len).unwrap_or(0)).unwrap_or_default());
        if len == 0 {
            return Err(Error::new(ErrorKind::Corrupt, "sender", "it sends a block behind the end of the disk"));
        }
        let written = match bytes {
            Some(bytes) => self.overlay.write_bytes(offset, bytes, &self.base),
            None => self.overlay.write_zeroes(offset, len, true, &self.base),
        };
        written.map_err(|e| Error::io(&self.path, "write the VM's disk", e))
    }

    fn settle(&mut self, write_cache: bool) -> Result<()> {
        self.overlay.set_write_cache(write_cache);
        self.overlay.close()?;
        fs::rename(&self.new, &self.path).map_err(|e| Error::io(&self.path, "put the VM's disk in its place", e))?;
        self.settled = true;
        crate::io::file::sync_dir(self.path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".")))
    }
}

impl Drop for Arriving {
    fn drop(&mut self) {
        if !self.settled {
            // The session's live bitmap goes with it.
            if let Err(e) = self
                .overlay
                .close()
                .and_then(|()| fs::remove_file(&self.new).map_err(|e| Error::io(&self.new, "remove it", e)))
            {
                log::warn!("half a disk is left: {e}");
            }
        }
    }
}

fn beside(path: &Path) -> Result<PathBuf> {
    let name = path.file_name().ok_or_else(|| Error::file(ErrorKind::Usage, path, "is no file name"))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    hidden.push(".arriving");
    Ok(path.with_file_name(hidden))
}

/// Removes what a receiver left that was killed; not what another one writes.
fn remove_leftover(path: &Path) -> Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(path, "look at it", e)),
    };
    if crate::io::lock::in_use(&file, path)? {
        return Err(Error::file(ErrorKind::Busy, path, "another migration writes to it").mend("wait for its end"));
    }
    fs::remove_file(path).map_err(|e| Error::io(path, "remove what an earlier migration left", e))
}
