//! The copy-on-write overlay of a VM: a standard qcow2 file whose layout never moves.
//!
//! ```text
//!   guest write ──> pwrite at data_start + offset ──> one compare-and-swap in the live bitmap (tmpfs)
//!   guest read  ──> one atomic load: base, data (at data_start + offset) or zeros
//!   guest flush ──> fdatasync ──> changed words of the live bitmap into the L2 tables ──> fdatasync
//! ```
//!
//! Nothing is ever allocated at run time: every L2 entry points at its own cluster from the start, and only the bitmaps of
//! subclusters (2 KiB) change. The live bitmap survives `kill -9`, the one in the L2 tables survives power loss. The format,
//! the order of a flush and the rules of sessions are in `FORMAT.md`.
//!
//! | file | does |
//! | --- | --- |
//! | `layout` | where everything is: arithmetic |
//! | `header` | the qcow2 header and vmar's extension: bytes ↔ values |
//! | `scan` | compares the metadata of a file with the layout |
//! | `adopt` | clusters that QEMU has freed: seated again |
//! | `create` | writes a new file |
//! | `bits` | words of subcluster states, runs, dirty marks |
//! | `live` | the live bitmap file |
//! | `seal` | tells whether the file was written anew under a session |
//! | `session` | boot ID, which bitmap is the truth |
//! | `lock` | range locks of writers |
//! | `write`, `flush`, `resize` | the three things that change an overlay |
//! | `disk` | the only place from which the file is written and synced |
//! | `relayout`, `source` | rewrites a file that QEMU has rearranged, or for a larger disk |
//! | `commit`, `import` | overlay and base to a raw file; an overlay of plain QEMU to one of vmar |
//! | `copy` | copies data, sparsely |
//! | `check` | what `vmar overlay info` and `check` show |
//! | `glance` | what an overlay holds, also while a server writes to it |

mod adopt;
mod bits;
mod check;
mod commit;
mod copy;
mod create;
mod disk;
mod flush;
mod glance;
mod header;
mod import;
mod layout;
mod live;
mod lock;
mod relayout;
mod resize;
mod scan;
mod seal;
mod session;
mod source;
#[cfg(test)]
mod tests;
mod write;

pub use bits::{Run, Runs, State};
pub use check::{Info, Look, Report, SessionInfo, base_of, check, examine, inspect, look};
pub use commit::commit;
pub use copy::Work;
pub use create::create;
pub use glance::Glance;
pub use import::create_from;
pub use relayout::{RelayoutOptions, grow, relayout};

use crate::error::{Error, ErrorKind, Result};
use crate::io::fault::{Faults, FileRef};
use crate::io::lock::{Access, WAIT};
use crate::units::SECTOR_SIZE;
use adopt::Unseated;
use bits::Dirty;
use disk::Disk;
use flush::Flusher;
use header::{Header, Session};
use layout::{CLUSTER, Layout, index};
use live::{LiveFile, LiveId};
use lock::RangeLocks;
use scan::{Fault, Stop};
use session::Ending;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Which base image an overlay was made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseIdentity {
    /// Digest of the image's content.
    pub digest: [u8; 32],
    /// How often the image had been updated in its library. Tells a human which one it was; the digest decides.
    pub generation: u64,
    /// Bytes of the image.
    pub size: u64,
}

/// What [`create`] makes.
#[derive(Clone, Copy, Debug)]
pub struct CreateOptions<'a> {
    /// The raw base image, as an absolute path: plain QEMU reads through it.
    pub backing: &'a Path,
    /// What that image is.
    pub base: BaseIdentity,
    /// Bytes of the disk: a multiple of 512, not less than the base, at most 16 TiB.
    pub size: u64,
    /// Bytes that the disk can grow to while it is in use: a multiple of 512, not less than `size`, at most 16 TiB. Each
    /// GiB of it costs 288 KiB of metadata in the file and 128 KiB of tmpfs while the overlay is open.
    pub capacity: u64,
}

/// How to open an overlay.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions<'a> {
    /// Nothing is written, not even the header; other readers (vmar or QEMU) may have it open too.
    pub read_only: bool,
    /// Where live bitmaps are: a directory on tmpfs, made if it is not there.
    pub state_dir: &'a Path,
    /// The base image that will be read below the overlay; refused if the overlay was made for another one.
    pub base: Option<BaseIdentity>,
    /// Go on with the state of the last flush where the alternative is a refusal, because the process that wrote later
    /// was killed and its live bitmap is gone. A live bitmap that can be used is used all the same.
    pub discard_unflushed: bool,
}

/// Reads the base image below an overlay, for filling subclusters that a write covers only partly.
pub trait BaseRead {
    /// Fills `buf` with the base's content at guest offset `offset`; zeros past the end of the base.
    fn read_base(&self, offset: u64, buf: &mut [u8]) -> io::Result<()>;
}

/// The states of all subclusters in memory: shared with the next process, or private when nothing will change.
#[derive(Debug)]
enum Words {
    Live(LiveFile),
    Private(Box<[AtomicU64]>),
}

impl Words {
    fn get(&self) -> &[AtomicU64] {
        match self {
            Words::Live(live) => live.words(),
            Words::Private(words) => words,
        }
    }

    fn live(&self) -> Option<&LiveFile> {
        match self {
            Words::Live(live) => Some(live),
            Words::Private(_) => None,
        }
    }

    fn set_failed(&self) {
        if let Some(live) = self.live() {
            live.set_failed();
        }
    }

    fn begin_counting(&self, flushes: u64) {
        if let Some(live) = self.live() {
            live.begin_counting(flushes);
        }
    }

    fn end_counting(&self, flushes: u64) {
        if let Some(live) = self.live() {
            live.end_counting(flushes);
        }
    }

    fn remove(&self) -> Result<()> {
        match self {
            Words::Live(live) => live.remove(),
            Words::Private(_) => Ok(()),
        }
    }
}

/// An open overlay, shared by the threads that serve one VM.
///
/// Dropping it without [`close`](Overlay::close) is what a kill does: the session stays open, the live bitmap stays, and
/// the next open for writing goes on from there.
#[derive(Debug)]
pub struct Overlay {
    path: PathBuf,
    disk: Disk,
    layout: Layout,
    /// Bytes of the disk. Grows, and only in `resize`.
    size: AtomicU64,
    resizing: Mutex<()>,
    header: Mutex<Header>,
    words: Words,
    dirty: Dirty,
    locks: RangeLocks,
    flusher: Flusher,
    base: BaseIdentity,
    backing: PathBuf,
    read_only: bool,
    closed: AtomicBool,
}

impl Overlay {
    /// Opens an overlay and, for writing, begins a session or takes up the one of a process that was killed.
    ///
    /// Everything is checked first: whatever is not as vmar writes it is refused with the reason, and nothing is changed.
    pub fn open(path: &Path, opts: &OpenOptions<'_>) -> Result<Overlay> {
        Overlay::open_with_faults(path, opts, None)
    }

    /// Opens an overlay of which every read, write, punch and sync of the file passes `faults`: for tests, which see what
    /// is done in which order and make any of it fail. The same as [`open`](Overlay::open) in all else.
    pub fn open_with_faults(path: &Path, opts: &OpenOptions<'_>, faults: Option<Arc<dyn Faults>>) -> Result<Overlay> {
        let file = open_file(path, opts.read_only)?;
        let access = if opts.read_only { Access::Read } else { Access::Write };
        crate::io::lock::lock(&file, path, access, WAIT)?;
        relayout::check_named(&file, path)?;
        let (mut disk, mut header, layout) = read_metadata(path, Disk::new(file, faults))?;
        check_base(path, &header, opts.base)?;
        let dirty = Dirty::new(if opts.read_only { 0 } else { index(layout.clusters) });

        let ending = session::ending(&disk, path, &header, &layout, opts.state_dir)?;
        // Writes that no flush has covered may still be in the page cache.
        let unsynced = !matches!(ending, Ending::Closed | Ending::OtherBoot);
        let live = match ending {
            Ending::Killed(live) => Some(live),
            Ending::Closed | Ending::KilledThenQemu => None,
            Ending::OtherBoot => {
                log::warn!("{}: was open when the host went down; goes on from its last flush", path.display());
                None
            }
            Ending::Lost(_) if opts.discard_unflushed => {
                log::warn!("{}: goes on from its last flush, as --discard-unflushed says", path.display());
                None
            }
            Ending::Lost(loss) => return Err(loss.refusal(path, &header, opts.state_dir)),
        };
        let words = match live {
            Some(live) => {
                let words = take_up(path, &disk, &header, &layout, live, &dirty, opts.read_only)?;
                if !opts.read_only {
                    go_on(path, &disk, &mut header, &words)?;
                }
                words
            }
            None if opts.read_only => {
                let words: Box<[AtomicU64]> = (0..layout.clusters).map(|_| AtomicU64::new(0)).collect();
                load(path, &disk, &header, &layout, &words)?;
                Words::Private(words)
            }
            None => begin(path, &disk, &layout, &mut header, opts.state_dir, unsynced)?,
        };
        disk.map(layout.file_len());
        Ok(Overlay {
            path: path.to_path_buf(),
            disk,
            layout,
            size: AtomicU64::new(header.size),
            resizing: Mutex::new(()),
            words,
            dirty,
            locks: RangeLocks::default(),
            flusher: Flusher::default(),
            base: header.extension.base,
            backing: header.backing.clone(),
            header: Mutex::new(header),
            read_only: opts.read_only,
            closed: AtomicBool::new(false),
        })
    }

    /// Bytes of the disk, now.
    pub fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Bytes that the disk can grow to.
    pub fn capacity(&self) -> u64 {
        self.layout.capacity
    }

    /// The base image that it was made for.
    pub fn base(&self) -> BaseIdentity {
        self.base
    }

    /// The path of the base image in the header, for plain QEMU.
    pub fn backing(&self) -> &Path {
        &self.backing
    }

    /// The overlay file; data of guest offset `o` is at `data_start() + o`. For reading only: whoever wrote through it
    /// would go behind the bitmap's back.
    pub fn file(&self) -> FileRef<'_> {
        self.disk.file()
    }

    /// Relies no more on what was in the page cache, see [`crate::io::hot`].
    pub fn cool(&self) {
        self.disk.cool();
    }

    /// Host offset of guest byte 0.
    pub fn data_start(&self) -> u64 {
        self.layout.data
    }

    /// True if all of `[offset, offset + len)`, inside the disk, was never written, as far as one look can tell: it is false
    /// for a range that spans clusters. One atomic load.
    #[inline]
    pub fn is_base(&self, offset: u64, len: u64) -> bool {
        bits::is_base(self.words.get(), offset, len)
    }

    /// Where the content of `[offset, offset + len)` comes from, as runs that cover it exactly. Only looks at the live
    /// bitmap: no allocation, no lock, no system call. What is behind the end of the disk is not covered.
    pub fn runs(&self, offset: u64, len: u64) -> Runs<'_> {
        debug_assert!(offset.is_multiple_of(SECTOR_SIZE) && len.is_multiple_of(SECTOR_SIZE), "{offset}+{len}");
        let end = offset.saturating_add(len).min(self.size());
        Runs::new(self.words.get(), offset..end)
    }

    /// False while the guest has its disk's write cache switched off (CONFIG_WCE): every write then has to be followed by a
    /// [`flush`](Self::flush), which is the caller's business.
    pub fn write_cache(&self) -> bool {
        !self.words.live().is_some_and(LiveFile::write_through)
    }

    /// Remembers what the guest chose, also for the process that comes after this one is killed or has closed the overlay:
    /// QEMU does not tell it again, neither after a reconnect nor after a migration. A new overlay has its cache on. Does nothing on an overlay that is only read.
    pub fn set_write_cache(&self, on: bool) {
        if let Some(live) = self.words.live() {
            live.set_write_through(!on);
        }
    }

    /// True once [`close`](Self::close) has flushed: nothing can be written any more, whatever became of the rest of it.
    pub fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Stops cleanly: flushes, closes the session in the file, removes the live bitmap, lets go of the file's locks. Waits
    /// for writes in flight; later ones fail, and reads must not come later (another process may write then). If it fails, the session stays as it is, for the next open to take up.
    pub fn close(&self) -> Result<()> {
        let _all = self.locks.lock(0..u64::MAX);
        if self.read_only || self.closed.load(Ordering::Acquire) {
            return Ok(());
        }
        self.flush().map_err(|e| Error::io(&self.path, "flush", e))?;
        self.closed.store(true, Ordering::Release);
        let mut header = self.header.lock().unwrap_or_else(PoisonError::into_inner);
        header.set_write_through(!self.write_cache());
        let session = header.extension.session;
        // If this sync fails nothing is lost: all data was flushed above.
        if let Err(e) = write_header(&self.disk, &mut header, Session::CLOSED, || {}) {
            // The owner may go on with it, or try again. Not if the file may say that it is closed: after a kill nobody
            // would look for what was written then.
            let open_again = self.disk.write(header.with_session(session), 0);
            self.closed.store(open_again.is_err(), Ordering::Release);
            return Err(Error::io(&self.path, "close", e));
        }
        self.words.remove()?;
        // Whoever waits for it need not wait until the last reader has dropped it.
        crate::io::lock::unlock(self.disk.bare()).map_err(|e| Error::io(&self.path, "unlock", e))
    }
}

fn open_file(path: &Path, read_only: bool) -> Result<File> {
    let file = File::options().read(true).write(!read_only).open(path).map_err(|e| Error::io(path, "open", e))?;
    let meta = file.metadata().map_err(|e| Error::io(path, "look at", e))?;
    if !meta.is_file() {
        return Err(Error::file(ErrorKind::Unsupported, path, "is no regular file")
            .mend("name an overlay ('vmar overlay create' makes one)"));
    }
    Ok(file)
}

/// Header and layout of a file that is an overlay of vmar as far as those tell.
fn read_metadata(path: &Path, disk: Disk) -> Result<(Disk, Header, Layout)> {
    let len = disk.bare().metadata().map_err(|e| Error::io(path, "look at", e))?.len();
    let mut bytes = vec![0; index(len.min(CLUSTER))];
    disk.read(&mut bytes, 0).map_err(|e| Error::io(path, "read", e))?;
    let header = Header::parse(path, &bytes)?;
    let layout = adopt::layout_of(&header);
    layout.agrees_with(&header).map_err(|what| stopped(path, Stop::Fault(Fault::Layout(what))))?;
    if len < layout.data {
        return Err(stopped(path, Stop::Fault(scan::cut_off(len, &layout))));
    }
    Ok((disk, header, layout))
}

fn check_base(path: &Path, header: &Header, base: Option<BaseIdentity>) -> Result<()> {
    let made_for = header.extension.base;
    match base {
        Some(base) if (base.digest, base.size) != (made_for.digest, made_for.size) => {
            let name = |b: &BaseIdentity| {
                format!("digest {}…, generation {}, {} bytes", crate::codec::hex(&b.digest[..6]), b.generation, b.size)
            };
            let (backing, was, is) = (header.backing.display(), name(&made_for), name(&base));
            let cause = format!("was made for another base image ({backing}: {was}) than this one ({is})");
            Err(Error::file(ErrorKind::Changed, path, cause).mend("serve it with the image that it was made for"))
        }
        _ => Ok(()),
    }
}

/// The error for metadata that is not as it has to be.
fn stopped(path: &Path, stop: Stop) -> Error {
    match stop {
        Stop::Io(e) => Error::io(path, "read", e),
        Stop::Fault(Fault::Corrupt(what)) => Error::file(ErrorKind::Corrupt, path, what)
            .mend("restore it from a backup; 'qemu-img check' says what plain QEMU can still read"),
        Stop::Fault(Fault::Layout(what)) => {
            Error::file(ErrorKind::Unsupported, path, format!("is not in vmar's fixed layout ({what})"))
                .mend(format!("rewrite it with 'vmar overlay relayout {}'", path.display()))
        }
    }
}

/// Fills `words` from the L2 tables, and checks all there is to check on the way.
fn load(path: &Path, disk: &Disk, header: &Header, layout: &Layout, words: &[AtomicU64]) -> Result<Unseated> {
    let store = |cluster, word| words[index(cluster)].store(word, Ordering::Relaxed);
    scan_all(path, disk, header, layout, store)
}

/// `scan::all` for a file that must be without fault.
fn scan_all(
    path: &Path,
    disk: &Disk,
    header: &Header,
    layout: &Layout,
    word: impl FnMut(u64, u64),
) -> Result<Unseated> {
    let unseated = scan::all(disk, layout, Err, word).map_err(|stop| stopped(path, stop))?;
    unseated.check_bitmaps(header).map_err(|fault| stopped(path, Stop::Fault(fault)))?;
    Ok(unseated)
}

/// Seats what QEMU has freed, before anything is written to it.
fn seat(path: &Path, disk: &Disk, layout: &Layout, unseated: &Unseated) -> Result<()> {
    if unseated.len() > 0 {
        log::info!("{}: takes {} clusters back that QEMU has freed or added", path.display(), unseated.len());
    }
    adopt::seat(disk, layout, unseated).map_err(|e| Error::io(path, "take back clusters that QEMU has freed in", e))
}

/// Goes on with the live bitmap of a process that was killed: what differs from the file was not flushed.
fn take_up(
    path: &Path,
    disk: &Disk,
    header: &Header,
    layout: &Layout,
    live: LiveFile,
    dirty: &Dirty,
    read_only: bool,
) -> Result<Words> {
    let words = live.words();
    let mut end = 0;
    let compare = |cluster, durable| {
        let word = words[index(cluster)].load(Ordering::Acquire);
        end = scan::data_end(layout, cluster, word).max(end);
        if !read_only && word != durable {
            dirty.mark(index(cluster));
        }
    };
    let unseated = scan_all(path, disk, header, layout, compare)?;
    let len = disk.bare().metadata().map_err(|e| Error::io(path, "look at", e))?.len();
    if len < end {
        return Err(stopped(path, Stop::Fault(scan::cut_off(len, layout))));
    }
    if !read_only {
        seat(path, disk, layout, &unseated)?;
        return Ok(Words::Live(live));
    }
    Ok(Words::Private(words.iter().map(|w| AtomicU64::new(w.load(Ordering::Acquire))).collect()))
}

/// What a session that is taken up needs besides its words.
fn go_on(path: &Path, disk: &Disk, header: &mut Header, words: &Words) -> Result<()> {
    words.end_counting(header.extension.flushes);
    if header.has_foreign_autoclear() {
        let session = header.extension.session;
        let written = write_header(disk, header, session, || words.set_failed());
        written.map_err(|e| Error::io(path, "go on with the session in", e))?;
    }
    Ok(())
}

/// Begins a session: the live bitmap first, then the header that names it, so that a session that is open always had one.
fn begin(
    path: &Path,
    disk: &Disk,
    layout: &Layout,
    header: &mut Header,
    state_dir: &Path,
    unsynced: bool,
) -> Result<Words> {
    let session = session::begin(session::boot_id()?)?;
    let id = LiveId::of(disk.bare(), session, layout.clusters).map_err(|e| Error::io(path, "look at", e))?;
    let mut live = LiveFile::create(state_dir, &id)?;
    let unseated = load(path, disk, header, layout, live.words())?;
    seat(path, disk, layout, &unseated)?;
    header.set_capacity(layout.capacity);
    live.end_counting(header.extension.flushes);
    live.set_seal(seal::set(disk.bare()));
    live.set_write_through(header.write_through());
    live.publish()?;
    // If this fails half-way, the new bitmap stays: the header may name it by now, and if it does not, `remove_stale` of
    // the next open takes it away.
    let sync_failed = || {
        if unsynced {
            live.set_failed();
        }
    };
    write_header(disk, header, session, sync_failed).map_err(|e| Error::io(path, "open a session in", e))?;
    live::remove_stale(state_dir, &id);
    Ok(Words::Live(live))
}

/// Writes the header, durably. The kernel tells of a failed sync only once, and it may have been about data that a killed
/// process wrote: `sync_failed` has to see to it that no later flush says that this data is safe.
fn write_header(disk: &Disk, header: &mut Header, session: Session, sync_failed: impl FnOnce()) -> io::Result<()> {
    disk.write(header.with_session(session), 0)?;
    disk.sync_all().inspect_err(|_| sync_failed())
}
