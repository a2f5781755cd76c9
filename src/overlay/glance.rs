//! What an overlay holds at this moment, also while a server writes to it: for a copy that is gone over again later.
//!
//! No lock is taken. While a session is open the states are those of the live bitmap, and data may change between the look at
//! a state and the read; after its end they are those of the file, and nothing changes any more. The layout never moves, so
//! there is nothing else that a writer could pull away.

use super::bits::Runs;
use super::check::SessionInfo;
use super::disk::Disk;
use super::layout::index;
use super::session::{Ending, ending};
use super::{BaseIdentity, open_file, read_metadata, scan_all};
use crate::error::{Error, ErrorKind, Result};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How often the file is looked at again when its session ends under the look.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(20);

/// A look at an overlay.
#[derive(Debug)]
pub struct Glance {
    file: File,
    path: PathBuf,
    words: Box<[AtomicU64]>,
    data: u64,
    /// Bytes of the disk.
    pub size: u64,
    /// The image that it was made on.
    pub base: BaseIdentity,
    /// That image's path in the header.
    pub backing: PathBuf,
    /// Nobody has it open for writing: what is seen is all there is.
    pub closed: bool,
    /// False if the guest had switched the write cache off when it was last closed.
    pub write_cache: bool,
}

impl Glance {
    /// Looks at an overlay whose server has its live bitmaps in `state_dir`.
    ///
    /// # Errors
    /// It is none of vmar, is damaged, or belongs to a session that cannot be found in `state_dir`.
    pub fn take(path: &Path, state_dir: &Path) -> Result<Glance> {
        for _ in 0..TRIES {
            if let Some(glance) = Glance::once(path, state_dir)? {
                return Ok(glance);
            }
            std::thread::sleep(PAUSE);
        }
        let cause = format!("is in use, and {} does not tell how", state_dir.display());
        Err(Error::file(ErrorKind::NotFound, path, cause).mend("name the --state-dir of its server"))
    }

    /// None: the live bitmap is not there, maybe because the session ends just now.
    fn once(path: &Path, state_dir: &Path) -> Result<Option<Glance>> {
        let (disk, header, layout) = read_metadata(path, Disk::new(open_file(path, true)?, None))?;
        let words: Box<[AtomicU64]> = (0..layout.clusters).map(|_| AtomicU64::new(0)).collect();
        let session = match ending(&disk, path, &header, &layout, state_dir)? {
            Ending::Closed => SessionInfo::Closed,
            Ending::Killed(live) => {
                for (to, from) in words.iter().zip(live.words()) {
                    to.store(from.load(Ordering::Acquire), Ordering::Relaxed);
                }
                SessionInfo::Open
            }
            Ending::KilledThenQemu => SessionInfo::Open,
            Ending::OtherBoot => SessionInfo::OtherBoot,
            Ending::Lost(_) => return Ok(None),
        };
        if session != SessionInfo::Open {
            let store = |cluster, word| {
                if let Some(to) = words.get(index(cluster)) {
                    to.store(word, Ordering::Relaxed);
                }
            };
            scan_all(path, &disk, &header, &layout, store)?;
        }
        let file = disk.bare().try_clone().map_err(|e| Error::io(path, "use it", e))?;
        Ok(Some(Glance {
            file,
            path: path.to_path_buf(),
            words,
            data: layout.data,
            size: header.size,
            base: header.extension.base,
            write_cache: !header.write_through(),
            closed: session == SessionInfo::Closed,
            backing: header.backing,
        }))
    }

    /// Where the content of the disk comes from, in runs that cover it.
    pub fn runs(&self) -> Runs<'_> {
        Runs::new(&self.words, 0..self.size)
    }

    /// Reads what the file has at an offset of the disk; of use where a run says that it is data.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        self.file.read_exact_at(buf, self.data + offset).map_err(|e| Error::io(&self.path, "read", e))
    }
}
