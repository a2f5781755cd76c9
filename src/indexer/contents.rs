//! The content index of a sharing domain while a command works on it: asked, and carried on.
//!
//! What is carried on lies in `staging/` until the command's commit; several images that are added by one command see each
//! other's contents there.

use super::Work;
use super::stats::open_run;
use crate::cluster::merge;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Hash;
use crate::index::sets::{Identity, Unreadable};
use crate::index::table::{MEND, Stamp};
use crate::index::{Row, Sets, Table, TableWriter, to_merge};
use crate::library::{IndexRef, Library, TableRef, Transaction, index_file};
use crate::units::ImageId;
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// A content of some hash, and the set of images that hold it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Content {
    pub variant: u16,
    pub set: u32,
}

/// What is known of a list of hashes.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Where the contents of each hash begin; one more at the end.
    starts: Vec<u32>,
    contents: Vec<Content>,
}

impl Found {
    /// The contents of hash number `i`, in order of variant.
    pub fn of(&self, i: usize) -> &[Content] {
        let range = self.starts.get(i).zip(self.starts.get(i + 1)).map(|(a, b)| *a as usize..*b as usize);
        range.and_then(|r| self.contents.get(r)).unwrap_or(&[])
    }
}

/// A table, and whether it is this command's.
struct OpenTable {
    reference: TableRef,
    table: Table,
    staged: Option<PathBuf>,
}

/// The index of a domain.
pub(super) struct Contents {
    library: [u8; 16],
    domain: String,
    sets: Sets,
    /// The newest first.
    tables: Vec<OpenTable>,
    next_file: u64,
    /// What the catalog names now.
    before: Option<IndexRef>,
    changed: bool,
}

impl Contents {
    /// Opens the index of a domain. One that an older vmar did not keep is made of the fingerprints.
    pub fn open(change: &Transaction, domain: &str, work: &Work) -> Result<Contents> {
        let library = change.library();
        let mut contents = Contents::empty(change, domain);
        contents.changed = false;
        match contents.before.clone() {
            Some(index) => {
                contents.sets = read_sets(library, &index)?;
                for reference in index.tables {
                    let stamp = Stamp { library: contents.library, id: reference.id, rows: reference.rows };
                    let table = Table::open(&library.dir().join(&reference.file), stamp)?;
                    contents.tables.push(OpenTable { reference, table, staged: None });
                }
            }
            None => contents.derive(change, work)?,
        }
        Ok(contents)
    }

    /// An index that is to be made anew of the fingerprints, whatever there is.
    pub fn derived(change: &Transaction, domain: &str, work: &Work) -> Result<Contents> {
        let mut contents = Contents::empty(change, domain);
        contents.derive(change, work)?;
        Ok(contents)
    }

    /// An index that is to be made anew from nothing.
    pub fn empty(change: &Transaction, domain: &str) -> Contents {
        let catalog = change.library().catalog();
        Contents {
            library: catalog.uuid_bytes(),
            domain: domain.to_string(),
            sets: Sets::default(),
            tables: Vec::new(),
            next_file: catalog.next_file,
            before: catalog.index.get(domain).cloned(),
            changed: true,
        }
    }

    /// The sets of images.
    pub fn sets(&self) -> &Sets {
        &self.sets
    }

    /// What is known of these hashes, which are ascending and distinct. Dead contents are left out.
    pub fn lookup(&self, hashes: &[Hash]) -> Result<Found> {
        let mut rows: Vec<(u32, Content)> = Vec::new();
        let mut left: Vec<u32> = (0u32..).zip(hashes).map(|(i, _)| i).collect();
        for open in &self.tables {
            let asked: Vec<Hash> = left.iter().filter_map(|&i| hashes.get(i as usize).copied()).collect();
            let found = open.table.lookup(&asked)?;
            let mut is_found = vec![false; left.len()];
            for (at, row) in found {
                if let (Some(&i), Some(flag)) = (left.get(at), is_found.get_mut(at)) {
                    *flag = true;
                    if !self.sets.images(row.set).is_empty() {
                        rows.push((i, Content { variant: row.variant, set: row.set }));
                    }
                }
            }
            let mut known = is_found.into_iter();
            left.retain(|_| !known.next().unwrap_or(false));
        }
        rows.sort_unstable_by_key(|(i, c)| (*i, c.variant));
        let mut starts = Vec::with_capacity(hashes.len() + 1);
        let mut at = 0u32;
        for i in 0..=hashes.len() {
            while rows.get(at as usize).is_some_and(|(r, _)| (*r as usize) < i) {
                at += 1;
            }
            starts.push(at);
        }
        Ok(Found { starts, contents: rows.into_iter().map(|(_, c)| c).collect() })
    }

    /// An image goes: it leaves every set.
    pub fn remove(&mut self, image: ImageId) {
        self.sets.remove(image.0);
        self.changed = true;
    }

    /// An image comes: `held` are its contents, ascending by (hash, variant), with the other contents of each of its hashes
    /// among them (`false`) so that a row that is found says all of its hash. The set is the one before.
    pub fn insert(
        &mut self,
        change: &Transaction,
        image: ImageId,
        held: impl Iterator<Item = Result<Held>>,
        count: u64,
        work: &Work,
    ) -> Result<()> {
        let sizes: Vec<u64> = self.tables.iter().map(|t| t.table.rows()).collect();
        let merged = to_merge(count, &sizes);
        let (id, path, mut writer) = self.start_table(change)?;
        let mut with: HashMap<Option<u32>, u32> = HashMap::new();
        let is_live: Vec<bool> = (0u32..).take(self.sets.len()).map(|n| !self.sets.images(n).is_empty()).collect();
        let sets = &mut self.sets;
        let new_rows = held.map(|held| {
            let held = held?;
            let set = match (held.is_held, held.set) {
                (false, Some(set)) => set,
                (_, before) => {
                    let joined = match with.get(&before) {
                        Some(set) => Some(*set),
                        None => match before {
                            Some(set) => sets.with(set, image.0),
                            None => sets.intern(&[image.0]),
                        },
                    };
                    let joined = joined.ok_or_else(|| {
                        Error::new(ErrorKind::Unsupported, "the content index", "has no numbers left").mend(MEND)
                    })?;
                    with.insert(before, joined);
                    if before.is_some_and(|set| !sets.lose(set)) {
                        return Err(contradiction("a set of images has fewer contents than are found"));
                    }
                    sets.gain(joined);
                    joined
                }
            };
            Ok(Row { hash: held.hash, variant: held.variant, set })
        });
        // New rows first: they hide those of the tables that they are merged with.
        let mut sources: Vec<Box<dyn Iterator<Item = Result<Row>> + '_>> = vec![Box::new(new_rows)];
        for open in self.tables.iter().take(merged) {
            let is_live = |row: &Result<Row>| row.as_ref().map_or(true, |r| is_live.get(r.set as usize) == Some(&true));
            sources.push(Box::new(open.table.scan().filter(is_live)));
        }
        let total: u64 = count + sizes.iter().take(merged).sum::<u64>();
        work.observer.begin(&format!("indexing image {image}"), total * crate::units::BLOCK_SIZE);
        let mut group = Group::default();
        for item in merge(sources) {
            let (row, source) = item?;
            group.take(row, source).into_iter().try_for_each(|row| writer.push(&row))?;
            work.observer.advance(crate::units::BLOCK_SIZE);
        }
        group.end().into_iter().try_for_each(|row| writer.push(&row))?;
        work.observer.end();
        let stamp = writer.finish()?;
        self.put_table(id, path, stamp, merged)
    }

    /// Makes the index of the fingerprints that the images of the domain have.
    fn derive(&mut self, change: &Transaction, work: &Work) -> Result<()> {
        let library = change.library();
        let records: Vec<_> = library.images().iter().filter(|r| r.domain == self.domain).collect();
        if records.is_empty() {
            return Ok(());
        }
        let total: u64 = records.iter().map(|r| r.nonzero_blocks).sum();
        let runs = records.iter().map(|r| open_run(library, r)).collect::<Result<Vec<_>>>()?;
        let (id, path, mut writer) = self.start_table(change)?;
        work.observer.begin("making the content index", total * crate::units::BLOCK_SIZE);
        let mut content: Option<(Hash, u32)> = None;
        let mut holders: Vec<u32> = Vec::new();
        let mut end = |content: Option<(Hash, u32)>, holders: &mut Vec<u32>, sets: &mut Sets| -> Result<()> {
            let Some((hash, variant)) = content else { return Ok(()) };
            holders.sort_unstable();
            holders.dedup();
            let full = || Error::new(ErrorKind::Unsupported, "the content index", "a hash has too many contents");
            let (Some(set), Ok(variant)) = (sets.intern(holders), u16::try_from(variant)) else { return Err(full()) };
            sets.gain(set);
            holders.clear();
            writer.push(&Row { hash, variant, set })
        };
        for (n, item) in (0u64..).zip(merge(runs)) {
            let (row, source) = item?;
            if n.is_multiple_of(1 << 16) {
                work.check_stop("the content index")?;
            }
            if content != Some((row.hash, row.variant)) {
                end(content, &mut holders, &mut self.sets)?;
                content = Some((row.hash, row.variant));
            }
            holders.extend(records.get(source).map(|r| r.id.0));
            work.observer.advance(crate::units::BLOCK_SIZE);
        }
        end(content, &mut holders, &mut self.sets)?;
        work.observer.end();
        let stamp = writer.finish()?;
        self.put_table(id, path, stamp, 0)
    }

    fn start_table(&mut self, change: &Transaction) -> Result<(u64, PathBuf, TableWriter)> {
        let id = self.next_file;
        self.next_file += 1;
        let path = change.scratch(&format!("{id}.table"));
        let writer = TableWriter::create(&path, self.library, id)?;
        Ok((id, path, writer))
    }

    /// The new table takes the place of the `merged` newest ones.
    fn put_table(&mut self, id: u64, path: PathBuf, stamp: Stamp, merged: usize) -> Result<()> {
        let table = Table::open(&path, stamp)?;
        for old in self.tables.drain(..merged) {
            if let Some(staged) = old.staged {
                std::fs::remove_file(&staged).map_err(|e| Error::io(&staged, "remove it", e))?;
            }
        }
        let reference = TableRef { file: index_file(id, "table").into(), id, rows: stamp.rows };
        if stamp.rows > 0 {
            self.tables.insert(0, OpenTable { reference, table, staged: Some(path) });
        } else {
            std::fs::remove_file(&path).map_err(|e| Error::io(&path, "remove it", e))?;
        }
        self.changed = true;
        Ok(())
    }

    /// Stages what is new, and says what the catalog is to name; `None` if nothing changed. `next_file` of the catalog must
    /// be what comes with it.
    pub fn stage(mut self, change: &mut Transaction) -> Result<Option<(String, IndexRef, u64)>> {
        if !self.changed {
            return Ok(None);
        }
        self.sets.forget_unused();
        let sets_id = self.next_file;
        self.next_file += 1;
        let file = index_file(sets_id, "sets");
        let path = change.stage(&file)?;
        std::fs::write(&path, self.sets.encode(&Identity { library: self.library, id: sets_id }))
            .map_err(|e| Error::io(&path, "write", e))?;
        for open in self.tables.iter().filter(|t| t.staged.is_some()) {
            change.stage(&open.reference.file.display().to_string())?;
        }
        let tables: Vec<TableRef> = self.tables.into_iter().map(|t| t.reference).collect();
        if let Some(before) = &self.before {
            change.remove(&before.sets);
            before.tables.iter().filter(|t| !tables.contains(t)).for_each(|t| change.remove(&t.file));
        }
        Ok(Some((self.domain, IndexRef { sets: file.into(), sets_id, tables }, self.next_file)))
    }
}

/// A content that an image holds, or that shares a hash with one that it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub hash: Hash,
    pub variant: u16,
    /// The set of the images that held it before.
    pub set: Option<u32>,
    /// The image holds this very content.
    pub is_held: bool,
}

/// The rows of one hash from several tables, of which the newest that has any counts. (That rows whose set is dead were left
/// out before does no harm: an older row of that content is dead too.)
#[derive(Default)]
struct Group {
    rows: Vec<Row>,
    /// Where they came from, the lowest number being the newest table.
    source: usize,
}

impl Group {
    /// Takes the next row; gives the rows of the hash before if it is of another one.
    fn take(&mut self, row: Row, source: usize) -> Vec<Row> {
        if self.rows.first().is_some_and(|first| first.hash == row.hash) {
            if source < self.source {
                self.rows.clear();
                self.source = source;
            }
            if source == self.source {
                self.rows.push(row);
            }
            return Vec::new();
        }
        let done = std::mem::replace(&mut self.rows, vec![row]);
        self.source = source;
        done
    }

    fn end(self) -> Vec<Row> {
        self.rows
    }
}

fn contradiction(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, "the content index", what).mend(MEND)
}

/// The image sets that the catalog names.
pub(super) fn read_sets(library: &Library, index: &IndexRef) -> Result<Sets> {
    let path = library.dir().join(&index.sets);
    let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, "read it", e).mend(MEND))?;
    let identity = Identity { library: library.catalog().uuid_bytes(), id: index.sets_id };
    Sets::decode(&bytes, &identity).map_err(|e| unreadable(&path, &e))
}

fn unreadable(path: &Path, e: &Unreadable) -> Error {
    match e {
        Unreadable::Corrupt(cause) => Error::file(ErrorKind::Corrupt, path, cause).mend(MEND),
        Unreadable::Newer(version) => {
            let cause =
                format!("image sets of format {version}, this vmar knows up to {}", crate::index::sets::VERSION);
            Error::file(ErrorKind::Unsupported, path, cause).mend("use a newer vmar")
        }
    }
}
