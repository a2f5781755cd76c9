//! Leases: which servers read which images of a library, for whoever wants to remove or replace one.
//!
//! A server writes one small file into `DIR/leases/` and keeps it locked as long as it lives. The lock is what counts: when
//! nobody holds it the server is gone, however it ended, and whoever looks removes the file. It is a byte-range lock of the
//! open file (OFD), which file servers pass on to other hosts, so leases work on a shared directory, across hosts and
//! across containers. Process numbers are only there to be read by humans: they mean nothing in another namespace.
//!
//! # Who sees whom
//!
//! A writer that takes an image away and a server that begins to read it must not miss each other. Both first say what they
//! do and then look what the other has said:
//!
//! | writer | server |
//! | --- | --- |
//! | 1. commits the catalog without the image | 1. reads catalog and map |
//! | 2. looks at the leases ([`live`]) | 2. takes a lease on what they point to ([`Lease::take`]) |
//! | 3. leaves alone what a lease names | 3. reads catalog and map again; starts over if they have changed |
//!
//! If the lease is there before the writer looks (its 2), the writer sees it. If not, the server reads again (its 3) after
//! the writer has committed (its 1), and sees that. There is no third case. The same goes for a server that changes to
//! another map: its lease first names the images of the old map *and* of the new one ([`Lease::update`]), then it reads the
//! catalog again, then it changes, and only when nothing uses the old map any more does the lease shrink.
//!
//! # The file
//!
//! Its name is random, so no two servers ever share one, and a name that is gone never comes back. It is written under a
//! name that ends in `.new` and locked before it gets its own, so a file `*.json` that is not locked never belongs to a
//! server that has only just begun. A change is written over the old text in place, without a moment at which the name does
//! not lead to it; a checksum tells whoever reads at that moment to read again.
//!
//! ```text
//! {"format":"vmar-lease","version":1,"crc32c":"90abcdef","lease":{"host":"h1","boot_id":"…","pid":4711,"image":"web",…}}
//! ```
//!
//! A lease that does not make sense, or that a newer vmar has written, may be anybody's: it counts as one on every image
//! ([`Live::Unknown`]), and is never removed.
//!
//! Limits: a host that loses its file server for longer than that one waits loses its locks, and with them the lease, while
//! it may go on reading; images that were only unlinked then fail to be read there, never read wrong. A directory that is
//! *copied* has leases that nobody holds, which is harmless.

use super::Library;
use crate::codec::{hex, unhex};
use crate::error::{Error, ErrorKind, Result};
use crate::io::lock;
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{ErrorKind as IoKind, Read};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where leases are, in the library.
pub const LEASES: &str = "leases";

const FORMAT: &str = "vmar-lease";
const VERSION: u32 = 1;

/// How the name of a lease ends, and that of one in the making.
const DONE: &str = ".json";
const NEW: &str = ".new";

/// The byte that is locked: far behind the text, for some systems let nobody read what is locked.
const LOCKED_BYTE: u64 = 1 << 40;

/// The longest lease that is read: a map has at most some thousand targets.
const BYTES_MAX: u64 = 16 << 20;

/// How often a lease that does not make sense is read again, and after which time: somebody may be writing it.
const LOOKS: u32 = 5;
const LOOK_PAUSE: Duration = Duration::from_millis(10);

/// How often to begin anew when somebody takes a new lease for a dead one.
const TRIES: u32 = 20;

/// What a server says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseInfo {
    /// Name of its host.
    pub host: String,
    /// Which boot of which machine: two servers with the same one share a kernel.
    pub boot_id: String,
    /// Its process, in its own namespace.
    pub pid: u32,
    /// The image that it serves, by the name that it had then.
    pub image: String,
    /// Number of that image.
    pub image_id: u32,
    /// Its generation.
    pub generation: u64,
    /// Digest of its content, hexadecimal.
    pub digest: String,
    /// All images that it may read: those of the map that it reads by, or of several while it changes.
    pub targets: Vec<LeaseTarget>,
    /// Its control socket, by absolute path in its own namespace.
    pub control: Option<PathBuf>,
    /// When it began, in seconds since 1970.
    pub started: u64,
}

/// An image that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LeaseTarget {
    /// Number of the image.
    pub id: u32,
    /// Its generation.
    pub generation: u64,
}

/// A lease that is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Live {
    /// Of this server.
    Known(LeaseInfo),
    /// Of whomever: this file makes no sense here. It counts as one on every image.
    Unknown(PathBuf),
}

impl Live {
    /// True if the holder may read that generation of the image, be it as the image that it serves.
    pub fn covers(&self, id: u32, generation: u64) -> bool {
        match self {
            Live::Unknown(_) => true,
            Live::Known(info) => {
                (info.image_id, info.generation) == (id, generation)
                    || info.targets.contains(&LeaseTarget { id, generation })
            }
        }
    }
}

impl std::fmt::Display for Live {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Live::Known(info) => write!(f, "the server of {} (process {} on {})", info.image, info.pid, info.host),
            Live::Unknown(path) => write!(f, "an unknown server ({})", path.display()),
        }
    }
}

impl LeaseInfo {
    /// What this process says; `digest` as in the catalog. Nothing is read yet.
    pub fn of_this_process(image: &super::ImageRecord, control: Option<&Path>) -> LeaseInfo {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        LeaseInfo {
            host: this_host(),
            boot_id: this_boot(),
            pid: std::process::id(),
            image: image.name.clone(),
            image_id: image.id.0,
            generation: image.generation,
            digest: hex(&image.digest),
            targets: Vec::new(),
            control: control.map(|path| std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf())),
            started: since.as_secs(),
        }
    }

    /// True if the holder runs on this machine, so that its control socket may be within reach.
    pub fn is_here(&self) -> bool {
        self.boot_id == this_boot()
    }
}

/// Name of this host.
pub fn this_host() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default().trim().to_string()
}

/// Which boot of this machine this is. Containers share it.
fn this_boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_string()
}

/// The lease of this process, which ends when this is dropped, or the process.
#[derive(Debug)]
pub struct Lease {
    path: PathBuf,
    file: File,
    info: LeaseInfo,
    /// Bytes of the file.
    len: usize,
}

/// What is in the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    format: String,
    version: u32,
    /// Of `lease`, as it is written.
    crc32c: String,
    lease: LeaseInfo,
}

impl Lease {
    /// Takes a lease in this library. `None` where that cannot be done (read-only, another user's, full, a file system
    /// without such locks): the log says so, once, and the locks on the images themselves have to do.
    ///
    /// # Errors
    /// A disk that fails.
    pub fn take(library: &Library, info: &LeaseInfo) -> Result<Option<Lease>> {
        let dir = library.dir().join(LEASES);
        match take_in(&dir, info) {
            Ok(lease) => Ok(Some(lease)),
            Err(e) if is_refusal(&e) => {
                log::info!("{}: no lease is taken here ({e}); the images are protected by their locks", dir.display());
                Ok(None)
            }
            // No reason to keep a VM from starting.
            Err(e) if matches!(e.kind(), IoKind::StorageFull | IoKind::QuotaExceeded) => {
                log::warn!("{}: no lease is taken here ({e}); the images are protected by their locks", dir.display());
                Ok(None)
            }
            Err(e) => Err(Error::io(&dir, "take a lease", e)),
        }
    }

    /// What it says.
    pub fn info(&self) -> &LeaseInfo {
        &self.info
    }

    /// Its file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names other images from now on; on return everybody who looks sees that.
    ///
    /// # Errors
    /// When it cannot be written, or taken anew if somebody has removed it. It may name the old images or the new then.
    pub fn update(&mut self, mut targets: Vec<LeaseTarget>) -> Result<()> {
        let failed = |path: &Path, e| Error::io(path, "change the lease", e);
        targets.sort_unstable();
        targets.dedup();
        let info = LeaseInfo { targets, ..self.info.clone() };
        match self.file.metadata().map(|meta| meta.nlink()) {
            // Somebody has removed it: by hand, or because its lock was lost for a while.
            Ok(0) => {
                *self = take_in(self.path.parent().unwrap_or(&self.path), &info).map_err(|e| failed(&self.path, e))?
            }
            Err(e) if e.raw_os_error() == Some(libc::ESTALE) => {
                *self = take_in(self.path.parent().unwrap_or(&self.path), &info).map_err(|e| failed(&self.path, e))?;
            }
            // By the open file, not by its path: this process may have given up its rights since.
            _ => {
                self.len = write_text(&self.file, &info, self.len).map_err(|e| failed(&self.path, e))?;
                self.info = info;
            }
        }
        Ok(())
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // What cannot be removed is dead once the file is closed.
        let _ = fs::remove_file(&self.path);
    }
}

/// Those who hold leases in this library; `dir` is the library's. Removes the leases of those that are gone.
///
/// For a writer: after its commit, see [the order](self#who-sees-whom).
///
/// # Errors
/// When the leases cannot be read: whoever wants to remove something must not go on then.
pub fn live(dir: &Path) -> Result<Vec<Live>> {
    let leases = dir.join(LEASES);
    let entries = match fs::read_dir(&leases) {
        Ok(entries) => entries,
        Err(e) if e.kind() == IoKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(&leases, "look at the leases", e)),
    };
    let mut out = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| Error::io(&leases, "look at the leases", e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(DONE) {
            out.extend(look(&path)?);
        } else if name.ends_with(NEW) && is_free(&path)? {
            // Left by somebody who was killed, or just made: that one finds out, and makes another.
            let _ = fs::remove_file(&path);
        }
    }
    Ok(out)
}

/// One lease; `None` for a dead one.
fn look(path: &Path) -> Result<Option<Live>> {
    let failed = |e| Error::io(path, "look at the lease", e);
    let file = match super::open_regular(path) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) if e.kind() == ErrorKind::Unsupported => return Ok(Some(unknown(path, "it is no regular file"))),
        Err(e) => return Err(e),
    };
    let mut read = Err(String::new());
    for again in 0..LOOKS {
        if again > 0 {
            std::thread::sleep(LOOK_PAUSE);
        }
        read = read_text(&file).map_err(failed)?;
        if read.is_ok() {
            break;
        }
    }
    match read {
        Ok(info) if lock::is_byte_held(&file, LOCKED_BYTE).map_err(failed)? => Ok(Some(Live::Known(info))),
        Ok(_) => {
            // Nobody takes the lock of a lease that has its name, so this cannot be the lease of somebody who lives.
            let _ = fs::remove_file(path);
            Ok(None)
        }
        // Dropped by its owner while we looked.
        Err(_) if !leads_to(path, &file).map_err(failed)? => Ok(None),
        Err(why) => Ok(Some(unknown(path, &why))),
    }
}

fn unknown(path: &Path, why: &str) -> Live {
    let warning = Error::file(ErrorKind::Unsupported, path, format!("a lease that makes no sense here: {why}"));
    log::warn!("{}", warning.mend("it counts as one on every image; remove it if no such server runs"));
    Live::Unknown(path.to_path_buf())
}

/// True for a file that nobody has locked.
fn is_free(path: &Path) -> Result<bool> {
    match super::open_regular(path) {
        Ok(file) => lock::is_byte_held(&file, LOCKED_BYTE)
            .map(|held| !held)
            .map_err(|e| Error::io(path, "look at the lease", e)),
        // Gone by now, or somebody else's thing.
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::Unsupported) => Ok(false),
        Err(e) => Err(e),
    }
}

/// An error that says: not here, and not by you.
fn is_refusal(e: &std::io::Error) -> bool {
    use libc::{EACCES, EINVAL, ENOLCK, ENOSYS, EOPNOTSUPP, EPERM, EROFS};
    matches!(e.raw_os_error(), Some(EACCES | EPERM | EROFS | ENOLCK | EINVAL | ENOSYS | EOPNOTSUPP))
}

fn take_in(dir: &Path, info: &LeaseInfo) -> std::io::Result<Lease> {
    match fs::create_dir(dir) {
        Err(e) if e.kind() != IoKind::AlreadyExists => return Err(e),
        _ => {}
    }
    for _ in 0..TRIES {
        if let Some(lease) = try_take(dir, info)? {
            return Ok(lease);
        }
    }
    Err(std::io::Error::other("somebody removes what is made there"))
}

/// `None` when somebody has taken the new file for one that was left behind.
fn try_take(dir: &Path, info: &LeaseInfo) -> std::io::Result<Option<Lease>> {
    let mut random = [0u8; 16];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let (new, path) = (dir.join(hex(&random) + NEW), dir.join(hex(&random) + DONE));
    let file = File::options().read(true).write(true).create_new(true).open(&new)?;
    let made = (|| -> std::io::Result<Option<usize>> {
        if !lock::lock_byte(&file, LOCKED_BYTE)? {
            return Ok(None);
        }
        let len = write_text(&file, info, 0)?;
        match fs::rename(&new, &path) {
            Err(e) if e.kind() == IoKind::NotFound => return Ok(None),
            other => other?,
        }
        Ok(Some(len))
    })();
    if !matches!(made, Ok(Some(_))) {
        let _ = fs::remove_file(&new);
    }
    // A name that a power cut takes away is one of a server that it took away, too.
    Ok(made?.map(|len| Lease { path, file, info: info.clone(), len }))
}

/// Writes the text over one of `before` bytes, in place. Returns the length.
fn write_text(file: &File, info: &LeaseInfo, before: usize) -> std::io::Result<usize> {
    let lease = serde_json::to_vec(info)?;
    let crc32c = hex(&crc32c::crc32c(&lease).to_be_bytes());
    let mut text = serde_json::to_vec(&Text { format: FORMAT.into(), version: VERSION, crc32c, lease: info.clone() })?;
    // Blanks instead of the rest of a longer text: a file that was cut would have a moment of being too short.
    text.resize(text.len().max(before.saturating_sub(1)), b' ');
    text.push(b'\n');
    file.write_all_at(&text, 0)?;
    file.sync_all()?;
    Ok(text.len())
}

/// The lease in a file, or why it is none.
fn read_text(file: &File) -> std::io::Result<std::result::Result<LeaseInfo, String>> {
    let len = file.metadata()?.len();
    if len > BYTES_MAX {
        return Ok(Err(format!("it has {len} bytes")));
    }
    let mut bytes = vec![0; crate::units::to_usize(len)];
    match file.read_exact_at(&mut bytes, 0) {
        Err(e) if e.kind() == IoKind::UnexpectedEof => return Ok(Err("it is cut short".into())),
        other => other?,
    }
    Ok(parse(&bytes))
}

fn parse(bytes: &[u8]) -> std::result::Result<LeaseInfo, String> {
    /// What every version has.
    #[derive(Deserialize)]
    struct Header {
        format: String,
        version: u32,
    }
    let header: Header = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if header.format != FORMAT {
        return Err(format!("its format is {:?}", header.format));
    }
    if header.version > VERSION {
        return Err(format!("its version is {}, this vmar knows up to {VERSION}", header.version));
    }
    let text: Text = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    let lease = serde_json::to_vec(&text.lease).map_err(|e| e.to_string())?;
    let sum = unhex::<4>(&text.crc32c).map(u32::from_be_bytes);
    if sum == Some(crc32c::crc32c(&lease)) { Ok(text.lease) } else { Err("its checksum is wrong".into()) }
}

/// True if the path still leads to that open file.
fn leads_to(path: &Path, file: &File) -> std::io::Result<bool> {
    // Opened, not only looked at: file servers ask anew then.
    let now = match File::open(path) {
        Ok(now) => now.metadata()?,
        Err(e) if e.kind() == IoKind::NotFound => return Ok(false),
        Err(e) => return Err(e),
    };
    let own = file.metadata()?;
    Ok((now.dev(), now.ino()) == (own.dev(), own.ino()))
}

#[cfg(test)]
mod tests;
