//! Who may open the overlay now, and which bitmap is the truth: the one in the file or the live one (see `FORMAT.md`).

use super::disk::Disk;
use super::header::{Header, Session};
use super::layout::{Layout, index};
use super::live::{Found, LiveFile, LiveId, path_of};
use super::{scan, seal};
use crate::codec::unhex;
use crate::error::{Error, ErrorKind, Result};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::Ordering;

/// The boot ID of the host: changes with every start of it, and live bitmaps do not outlive one.
pub(super) fn boot_id() -> Result<[u8; 16]> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(PATH).map_err(|e| Error::io(PATH, "read", e))?;
    unhex(&text.trim().replace('-', "")).ok_or_else(|| Error::file(ErrorKind::Corrupt, PATH, "is no boot ID"))
}

/// A new session of this boot.
pub(super) fn begin(boot: [u8; 16]) -> Result<Session> {
    const PATH: &str = "/dev/urandom";
    let mut id = [0; 16];
    while id == [0; 16] {
        File::open(PATH).and_then(|mut f| f.read_exact(&mut id)).map_err(|e| Error::io(PATH, "read", e))?;
    }
    Ok(Session { id, boot })
}

/// How the last session ended, as far as it can be told.
#[derive(Debug)]
pub(super) enum Ending {
    /// Cleanly: everything is in the file.
    Closed,
    /// The host went down: what was not flushed is gone, the file is the truth.
    OtherBoot,
    /// The process was killed, and the live bitmap holds what it had written (or it still runs).
    Killed(LiveFile),
    /// The process was killed, and QEMU wrote to the file since; nothing was left unflushed.
    KilledThenQemu,
    /// The process was killed, and writes of it cannot be found again.
    Lost(Loss),
}

/// What would be lost by going on.
#[derive(Debug)]
pub(super) enum Loss {
    /// The live bitmap is not there.
    Missing,
    /// It is not this overlay's.
    Foreign(String),
    /// An fsync failed in that session.
    FailedFlush,
    /// Another content was written over the file.
    Overwritten,
    /// QEMU opened the file for writing since, and so many subclusters differ that the session had written.
    Overtaken(u64),
}

/// Looks at the session in the header and for its live bitmap. Changes nothing.
pub(super) fn ending(disk: &Disk, path: &Path, header: &Header, layout: &Layout, state_dir: &Path) -> Result<Ending> {
    let session = header.extension.session;
    if session.is_closed() {
        return Ok(Ending::Closed);
    }
    if session.boot != boot_id()? {
        return Ok(Ending::OtherBoot);
    }
    let id = LiveId::of(disk.file(), session, layout.clusters).map_err(|e| Error::io(path, "look at", e))?;
    Ok(match LiveFile::open(state_dir, &id)? {
        Found::Missing => Ending::Lost(Loss::Missing),
        Found::Foreign(why) => Ending::Lost(Loss::Foreign(why)),
        Found::Matching(live) if live.has_failed() => Ending::Lost(Loss::FailedFlush),
        Found::Matching(live) if header.untouched() => {
            let own = is_own_content(disk, header, &live).map_err(|e| Error::io(path, "read", e))?;
            if own { Ending::Killed(live) } else { Ending::Lost(Loss::Overwritten) }
        }
        Found::Matching(live) => match unflushed(disk, path, layout, &live)? {
            0 => Ending::KilledThenQemu,
            n => Ending::Lost(Loss::Overtaken(n)),
        },
    })
}

/// False if the file does not hold what the session left in it, as far as that can be told: an older copy of the same
/// session lies over it. Its flush counter is another one then, or the seal is gone.
fn is_own_content(disk: &Disk, header: &Header, live: &LiveFile) -> io::Result<bool> {
    if seal::is_broken(disk.file(), live.seal()) {
        return Ok(false);
    }
    // `inspect` comes here while a vmar may be counting, so the counter is read again between two equal looks at the live
    // bitmap. A vmar that flushes all the time cannot keep up with that for long.
    loop {
        let before = live.flushes();
        let mut word = [0; 8];
        disk.read(&mut word, header.flushes_at())?;
        if live.flushes() == before {
            let found = u64::from_be_bytes(word);
            return Ok(found == before.0 || found == before.1);
        }
    }
}

/// Subclusters that the session has written (their live state is not "base", and nothing ever returns to that) and whose
/// state in the file is another one: not flushed, or changed by QEMU since; which of the two cannot be told.
fn unflushed(disk: &Disk, path: &Path, layout: &Layout, live: &LiveFile) -> Result<u64> {
    let mut count = 0;
    let add = |cluster, durable: u64| {
        let live = live.words()[index(cluster)].load(Ordering::Acquire);
        let written = live | live >> 32;
        let differs = (live ^ durable) | (live ^ durable) >> 32;
        count += u64::from((written & differs & 0xffff_ffff).count_ones());
    };
    scan::l2(disk, layout, Err, add).map_err(|stop| super::stopped(path, stop))?;
    Ok(count)
}

impl Loss {
    /// The refusal: what would be lost, and how to go on without it.
    pub fn refusal(&self, path: &Path, header: &Header, state_dir: &Path) -> Error {
        let live = path_of(state_dir, &header.extension.session);
        let discard = "or give --discard-unflushed to go on with the state of the last flush";
        let error = |kind, cause: String, mend: String| Error::file(kind, path, cause).mend(mend);
        match self {
            Loss::Missing => error(
                ErrorKind::NotFound,
                format!(
                    "its last vmar did not close it and its live bitmap {} is missing, so what the VM wrote since its \
                     last flush would be lost",
                    live.display()
                ),
                format!("give the --state-dir that it was served with, {discard}"),
            ),
            Loss::Foreign(why) => error(
                ErrorKind::Corrupt,
                format!(
                    "its last vmar did not close it and the live bitmap {} cannot be used: {why}; what the VM wrote \
                     since its last flush would be lost",
                    live.display()
                ),
                format!("use the original file or the vmar that wrote it, {discard}"),
            ),
            Loss::FailedFlush => error(
                ErrorKind::Io,
                "a flush of it failed in its last session, so what the VM wrote since the flush before may be lost"
                    .to_string(),
                format!("check the disk and copy what can be read, {discard}"),
            ),
            Loss::Overwritten => error(
                ErrorKind::Changed,
                "an older copy was written over it while its session was open, so its live bitmap belongs to what was \
                 there before"
                    .to_string(),
                "give --discard-unflushed to go on with that copy".to_string(),
            ),
            Loss::Overtaken(subclusters) => error(
                ErrorKind::Changed,
                format!(
                    "its last vmar did not close it and then QEMU wrote to it: {} KiB that the VM may have written \
                     without a flush would be lost",
                    subclusters * 2
                ),
                format!("compare it with a backup, {discard}"),
            ),
        }
    }
}
