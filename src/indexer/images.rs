//! The images of a sharing domain while a command works on them: their records, fingerprints and bytes, each opened when
//! it is needed. Images that the command itself adds are among them, with their files still in `staging/`.

use super::compare::{Others, Side};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::run;
use crate::index::table::MEND;
use crate::library::{ImageRecord, Library, mtime_ns};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::OnceLock;

/// An image.
struct Member {
    record: ImageRecord,
    run: PathBuf,
    side: OnceLock<Side>,
}

/// The images, by ID.
pub(super) struct Images {
    library: Library,
    members: BTreeMap<u32, Member>,
}

impl Images {
    /// All images of the domain.
    pub fn of(library: &Library, domain: &str) -> Images {
        let mut images = Images { library: library.clone(), members: BTreeMap::new() };
        for record in library.images().iter().filter(|r| r.domain == domain) {
            let (record, run, side) = (record.clone(), library.run_path(record), OnceLock::new());
            images.members.insert(record.id.0, Member { record, run, side });
        }
        images
    }

    /// One more, which is open already.
    pub fn insert(&mut self, side: Side, run: PathBuf) {
        let record = side.record.clone();
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
        Ok(member.side.get_or_init(|| Side { file, path, record: member.record.clone() }))
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
