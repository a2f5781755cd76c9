//! The images of a library while a command works on them: their records, fingerprints and bytes, each opened when
//! it is needed. Images that the command itself adds are among them, with their files still in `staging/`.

use super::add::open_cold;
use super::compare::{Others, Side};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::run;
use crate::index::table::MEND;
use crate::library::{FileRef, ImageRecord, Library, mtime_ns};
use crate::units::BLOCK_SIZE;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// An image.
struct Member {
    record: ImageRecord,
    run: PathBuf,
    side: OnceLock<Side>,
}

/// The images, by ID.
pub(super) struct Images {
    library: Library,
    /// Bytes that stay in the page cache until the command is done.
    kept: AtomicU64,
    members: BTreeMap<u32, Member>,
}

impl Images {
    /// All images, of whatever domain: which of them may be read from is for the content indexes to say.
    pub fn of(library: &Library) -> Images {
        let mut images = Images { library: library.clone(), kept: AtomicU64::new(0), members: BTreeMap::new() };
        for record in library.images() {
            let (record, run, side) = (record.clone(), library.run_path(record), OnceLock::new());
            images.members.insert(record.id.0, Member { record, run, side });
        }
        images
    }

    /// One more, which is open already.
    pub fn insert(&mut self, mut side: Side, run: PathBuf) {
        let record = side.record.clone();
        let data = record.nonzero_blocks * BLOCK_SIZE;
        let kept = self.kept.fetch_add(data, Ordering::Relaxed);
        side.cold = side.cold.map(|cold| cold.keep_for_now(kept + data));
        self.members.insert(record.id.0, Member { record, run, side: OnceLock::from(side) });
    }

    /// One less.
    pub fn remove(&mut self, id: u32) {
        self.members.remove(&id);
    }

    fn member(&self, id: u32) -> Result<&Member> {
        self.members.get(&id).ok_or_else(|| {
            let cause = format!("names image {id}, which is not there");
            Error::new(ErrorKind::Corrupt, "the content index", cause).mend(MEND)
        })
    }

    /// What is known of an image.
    pub fn record(&self, id: u32) -> Result<&ImageRecord> {
        self.member(id).map(|m| &m.record)
    }

    /// Its fingerprints, sorted.
    pub fn run(&self, id: u32) -> Result<run::Reader> {
        let member = self.member(id)?;
        let stamp = run::Stamp { bytes: member.record.run.bytes, crc32c: member.record.run.crc32c };
        run::Reader::open(&member.run, stamp)
    }

    /// Those of its fingerprints that have the key of the public domain, if it has any.
    pub fn public_run(&self, id: u32) -> Result<Option<run::Reader>> {
        let member = self.member(id)?;
        let open = |run: &FileRef| {
            let stamp = run::Stamp { bytes: run.bytes, crc32c: run.crc32c };
            run::Reader::open(&self.library.dir().join(&run.file), stamp)
        };
        member.record.public_run.as_ref().map(open).transpose()
    }

    /// Refuses images that were written to since they were opened: what was compared must still be what the catalog says.
    pub fn check_unchanged(&self) -> Result<()> {
        self.members.values().filter_map(|m| m.side.get()).try_for_each(check_unchanged)
    }
}

impl Others for Images {
    fn side(&self, id: u32) -> Result<&Side> {
        let member = self.member(id)?;
        if let Some(side) = member.side.get() {
            return Ok(side);
        }
        let file = self.library.open_image(&member.record)?;
        let path = self.library.image_path(&member.record);
        // Blocks that many share are read more than once.
        let data = member.record.nonzero_blocks * BLOCK_SIZE;
        let kept = self.kept.fetch_add(data, Ordering::Relaxed);
        let cold = open_cold(&file, &path, member.record.size)?.keep_for_now(kept + data);
        Ok(member.side.get_or_init(|| Side { file, path, record: member.record.clone(), cold: Some(cold) }))
    }
}

/// Refuses a file that was written to since it was opened.
pub(super) fn check_unchanged(side: &Side) -> Result<()> {
    let meta = side.file.metadata().map_err(|e| Error::io(&side.path, "look at it", e))?;
    if meta.len() != side.record.size || mtime_ns(&meta) != side.record.mtime_ns {
        let cause = format!("image {} was written to while it was being read", side.record.name);
        return Err(Error::file(ErrorKind::Changed, &side.path, cause).mend("stop what writes to it and try again"));
    }
    Ok(())
}
