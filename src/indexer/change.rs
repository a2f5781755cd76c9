//! A change of a library in the making: what is staged, and what the index and the images will be.

use super::Work;
use super::choose::Choose;
use super::compare::Side;
use super::contents::Contents;
use super::images::Images;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Row;
use crate::index;
use crate::library::{Catalog, ImageRecord, Policy, Removed, Transaction, Writer, map_file};
use crate::units::ImageId;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// A change of a library, in one sharing domain.
pub(super) struct Change<'w> {
    pub transaction: Transaction<'w>,
    pub contents: Contents,
    pub images: Images,
    /// How targets are chosen.
    pub policy: Policy,
    /// The images that the policy prefers.
    pub preference: BTreeMap<u32, u64>,
    added: Vec<ImageRecord>,
    gone: BTreeSet<u32>,
    /// Files of removed images that somebody still reads.
    left: Vec<Removed>,
}

impl<'w> Change<'w> {
    /// Starts with the library as it is.
    pub fn begin(writer: &'w mut Writer, work: &Work) -> Result<Change<'w>> {
        let transaction = writer.begin();
        let domain = transaction.library().catalog().domain.clone();
        let contents = Contents::open(&transaction, &domain, work)?;
        Ok(Change::with(transaction, contents, &domain))
    }

    /// Starts with an index that was made already.
    pub fn with(transaction: Transaction<'w>, contents: Contents, domain: &str) -> Change<'w> {
        let images = Images::of(transaction.library(), domain);
        let policy = transaction.library().catalog().policy;
        let preference = transaction.library().catalog().preference.clone();
        Change {
            transaction,
            contents,
            images,
            policy,
            preference,
            added: Vec::new(),
            gone: BTreeSet::new(),
            left: Vec::new(),
        }
    }

    /// How the targets of maps are chosen.
    pub fn choose(&self) -> Choose {
        Choose::by(self.policy, &self.preference)
    }

    /// The ID of the next image that is added.
    pub fn next_id(&self) -> Result<ImageId> {
        let library = self.transaction.library();
        let added = u32::try_from(self.added.len()).ok();
        let id = added.and_then(|n| library.catalog().next_id.checked_add(n)).filter(|id| *id < u32::MAX);
        id.map(ImageId).ok_or_else(|| {
            Error::file(ErrorKind::Unsupported, library.dir(), "the library has no IDs left").mend("make a new library")
        })
    }

    /// Where to write a file that will be `to`, in place of one of this library if there is one.
    pub fn stage_new_or_over(&mut self, to: &str) -> Result<PathBuf> {
        match self.transaction.stage_over(to) {
            Err(e) if e.kind() == ErrorKind::NotFound => self.transaction.stage(to),
            other => other,
        }
    }

    /// An image is there from now on.
    pub fn add(&mut self, side: Side, run: PathBuf) {
        self.added.push(side.record.clone());
        self.images.insert(side, run);
    }

    /// An image is not there from now on: its files go with the commit, but for a raw file that is not vmar's, and one
    /// that somebody reads. The map stays if its name does.
    pub fn remove(&mut self, record: &ImageRecord, keep_map: bool) {
        self.contents.remove(record.id);
        self.images.remove(record.id.0);
        self.gone.insert(record.id.0);
        self.transaction.remove(&record.run.file);
        if let Some(chunks) = &record.chunks {
            self.transaction.remove(&chunks.file);
        }
        if !keep_map {
            self.transaction.remove(Path::new(&map_file(&record.name)));
        }
        if record.owned() {
            let generation = record.generation;
            self.left.push(Removed { id: record.id, generation, name: record.name.clone(), path: record.path.clone() });
        }
    }

    /// Publishes all of it, and what `edit` does to the catalog besides.
    pub fn commit(self, edit: impl FnOnce(&mut Catalog), work: &Work) -> Result<()> {
        let Change { mut transaction, contents, images, added, gone, left, policy, preference } = self;
        // Last look: whoever wrote into a file while others were read is noticed.
        images.check_unchanged()?;
        work.check_stop("the library")?;
        let index = contents.stage(&mut transaction)?;
        transaction.commit(|catalog| {
            catalog.images.retain(|r| !gone.contains(&r.id.0));
            for record in added {
                catalog.next_id = catalog.next_id.max(record.id.0.saturating_add(1));
                catalog.images.retain(|r| r.id != record.id);
                catalog.images.push(record);
            }
            catalog.images.sort_by_key(|r| r.id);
            catalog.removed.extend(left);
            catalog.policy = policy;
            catalog.preference = preference;
            catalog.preference.retain(|id, _| !gone.contains(id));
            if let Some((domain, index, next_file)) = index {
                catalog.index.insert(domain, index);
                catalog.next_file = next_file;
            }
            edit(catalog);
        })
    }
}

/// Goes along the rows of an image and what the index knows of their hashes, both ascending.
pub(super) struct Lookout<'k> {
    known: &'k [index::Row],
}

impl<'k> Lookout<'k> {
    pub fn new(known: &'k [index::Row]) -> Lookout<'k> {
        Lookout { known }
    }

    /// The set of the row's content, if the index has it.
    pub fn set_of(&mut self, row: &Row) -> Option<u32> {
        let key = (row.hash, row.variant);
        let behind = self.known.partition_point(|k| (k.hash, u32::from(k.variant)) < key);
        self.known = self.known.get(behind..).unwrap_or(&[]);
        self.known.first().filter(|k| (k.hash, u32::from(k.variant)) == key).map(|k| k.set)
    }
}
