//! Where each page of a snapshot is kept: decided in one go over all hashes, then packed and written on all processors.
//!
//! ```text
//! zero → a block of the base image → a page that the stores have → a page of this snapshot → a new pack
//! ```
//!
//! Pages that must not be lost come first, so that one of the others with the same content is found among them.

use super::known::Known;
use super::place::Care;
use super::stores::Stores;
use crate::error::{Error, ErrorKind, Result};
use crate::indexer::Observer;
use crate::introspect::Class;
use crate::migrate::bases::{BaseFiles, Bases};
use crate::migrate::frame::Source;
use crate::store::manifest::{Held, Page, ZERO};
use crate::store::{Digest, PackId, PackWriter};
use crate::units::is_zero;
use serde::Serialize;
use std::collections::HashMap;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Pages of a pack: what is fetched and mended as a whole, 64 MiB before zstd.
const PACK_PAGES: usize = 16_384;
/// Pages that a thread takes at a time.
const CHUNK: usize = 1024;
/// zstd's level: the VM runs again when packs are made.
pub const LEVEL: i32 = 3;

/// A page to be kept.
#[derive(Clone, Copy, Debug)]
pub struct Content<'a> {
    /// Its bytes; none of a page that is known to be in the stores, or zero.
    pub bytes: Option<&'a [u8; 4096]>,
    /// Its hash, if it has no bytes.
    pub hash: Digest,
    /// What it is used for; none of a block of a disk.
    pub class: Option<Class>,
    /// Whether it may be lost.
    pub care: Care,
}

/// What became of the pages of a class, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// All of them.
    pub pages: u64,
    /// Zero: kept nowhere.
    pub zero: u64,
    /// In the base image.
    pub base: u64,
    /// In the stores already.
    pub known: u64,
    /// Like another one of this snapshot.
    pub same: u64,
    /// New, and in several stores.
    pub critical: u64,
    /// New, and in one.
    pub once: u64,
}

/// All that is decided: a page of a manifest each, and the packs that they refer to.
#[derive(Debug, Default)]
pub struct Kept {
    /// In the order of the contents.
    pub pages: Vec<Page>,
    /// What [`Held::Pack`] counts.
    pub packs: Vec<PackId>,
    /// Of these the ones that may be lost.
    pub once: Vec<PackId>,
    /// By class, in the order of [`Class::ALL`]; last of disks.
    pub counts: Vec<Count>,
    /// Bytes of new packs, once each.
    pub new_bytes: u64,
    /// New packs.
    pub new_packs: usize,
    /// Bytes that were written to stores.
    pub written_bytes: u64,
}

/// What pages are compared with, and where they go.
#[derive(Clone, Copy)]
pub struct Keeper<'a> {
    /// The stores.
    pub stores: &'a Stores,
    /// What they have.
    pub known: &'a Known,
    /// The base image: its fingerprints, and its bytes to be sure.
    pub base: Option<(&'a Bases, &'a BaseFiles)>,
    /// In how many stores pages are that must not be lost.
    pub copies: usize,
    /// Told of progress.
    pub observer: &'a dyn Observer,
    /// Set when all shall end.
    pub stop: &'a AtomicBool,
}

/// A page, looked at.
#[derive(Clone, Copy, Debug)]
struct Seen {
    hash: Digest,
    base: Option<(u32, u32)>,
}

/// A pack to come.
struct New {
    care: Care,
    contents: Vec<usize>,
}

impl Keeper<'_> {
    /// Keeps all of these pages: writes what the stores have not.
    ///
    /// # Errors
    /// A store does not take a pack, or `stop` was set.
    pub fn keep(&self, contents: &[Content<'_>]) -> Result<Kept> {
        let seen = self.look(contents)?;
        let mut plan = Plan::new(self.known);
        for care in [Care::Critical, Care::Once] {
            for (number, (content, seen)) in contents.iter().zip(&seen).enumerate().filter(|(_, (c, _))| c.care == care)
            {
                plan.place(number, content, seen)?;
            }
        }
        let (news, mut kept) = plan.end(contents.len());
        self.write(contents, &seen, &news, &mut kept)?;
        for (page, seen) in kept.pages.iter_mut().zip(&seen) {
            *page = Page { hash: seen.hash, held: plan.held(seen) };
        }
        self.add_templates(&kept)?;
        Ok(kept)
    }

    /// Hashes all pages, and looks for them in the base image.
    fn look(&self, contents: &[Content<'_>]) -> Result<Vec<Seen>> {
        self.observer.begin("hashing pages", contents.len() as u64 * 4096);
        let mut out = vec![Seen { hash: ZERO, base: None }; contents.len()];
        let chunks = Mutex::new(contents.chunks(CHUNK).zip(out.chunks_mut(CHUNK)));
        let next = || chunks.lock().unwrap_or_else(PoisonError::into_inner).next();
        std::thread::scope(|scope| {
            for _ in 0..threads() {
                scope.spawn(|| {
                    while !self.stop.load(Ordering::Relaxed)
                        && let Some((contents, out)) = next()
                    {
                        for (content, seen) in contents.iter().zip(out) {
                            *seen = self.look_at(content);
                        }
                        self.observer.advance(contents.len() as u64 * 4096);
                    }
                });
            }
        });
        self.observer.end();
        check(self.stop)?;
        Ok(out)
    }

    fn look_at(&self, content: &Content<'_>) -> Seen {
        let Some(bytes) = content.bytes else { return Seen { hash: content.hash, base: None } };
        if is_zero(bytes) {
            return Seen { hash: ZERO, base: None };
        }
        // Fingerprints are believed nowhere where the page is thrown away after it: the bytes are compared.
        let base = self.base.and_then(|(bases, files)| {
            let Source::Base { image, block } = bases.find(bytes)? else { return None };
            let mut found = [0; 4096];
            (files.read(image, block, &mut found) && found == *bytes).then_some((image, block))
        });
        Seen { hash: *blake3::hash(bytes).as_bytes(), base }
    }

    /// Makes the new packs and writes each where it belongs.
    fn write(&self, contents: &[Content<'_>], seen: &[Seen], news: &[New], kept: &mut Kept) -> Result<()> {
        let pages: usize = news.iter().map(|new| new.contents.len()).sum();
        self.observer.begin("writing new pages", pages as u64 * 4096);
        let next = AtomicUsize::new(0);
        let (bytes, written) = (AtomicU64::new(0), AtomicU64::new(0));
        let made: Vec<Mutex<Option<PackId>>> = news.iter().map(|_| Mutex::new(None)).collect();
        let failed: Mutex<Option<Error>> = Mutex::new(None);
        let make = || {
            while let Some((new, made)) = {
                let number = next.fetch_add(1, Ordering::Relaxed);
                news.get(number).zip(made.get(number))
            } {
                let has_failed = failed.lock().unwrap_or_else(PoisonError::into_inner).is_some();
                if has_failed || self.stop.load(Ordering::Relaxed) {
                    return;
                }
                match self.write_one(contents, seen, new) {
                    Ok((id, len, copies)) => {
                        bytes.fetch_add(len, Ordering::Relaxed);
                        written.fetch_add(len * copies, Ordering::Relaxed);
                        *made.lock().unwrap_or_else(PoisonError::into_inner) = Some(id);
                    }
                    Err(e) => *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(e),
                }
            }
        };
        std::thread::scope(|scope| (0..threads().min(news.len())).for_each(|_| drop(scope.spawn(make))));
        self.observer.end();
        if let Some(e) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(e);
        }
        check(self.stop)?;
        for (new, made) in news.iter().zip(made) {
            let made = made.into_inner().unwrap_or_else(PoisonError::into_inner);
            let id = made.ok_or_else(|| Error::new(ErrorKind::Io, "snapshot", "a pack was not made"))?;
            kept.packs.push(id);
            kept.once.extend((new.care == Care::Once).then_some(id));
        }
        kept.new_packs = news.len();
        kept.new_bytes = bytes.into_inner();
        kept.written_bytes = written.into_inner();
        Ok(())
    }

    fn write_one(&self, contents: &[Content<'_>], seen: &[Seen], new: &New) -> Result<(PackId, u64, u64)> {
        let mut writer = PackWriter::in_memory(LEVEL)?;
        for number in &new.contents {
            if let (Some(Content { bytes: Some(bytes), .. }), Some(seen)) = (contents.get(*number), seen.get(*number)) {
                writer.push(&seen.hash, bytes)?;
                if writer.len() % 256 == 0 {
                    self.observer.advance(1 << 20);
                }
            }
        }
        let (id, bytes) = writer.into_bytes()?;
        let copies = if new.care == Care::Once { 1 } else { self.copies };
        let written = self.stores.put_pack(id, &bytes, copies, new.care)?;
        Ok((id, bytes.len() as u64, written as u64))
    }

    /// Templates whose pages are used become packs of the stores.
    fn add_templates(&self, kept: &Kept) -> Result<()> {
        for id in &kept.packs {
            let Some(path) = self.known.template(*id) else { continue };
            let bytes = fs::read(path).map_err(|e| Error::io(path, "read", e))?;
            self.stores.put_pack(*id, &bytes, self.copies, Care::Critical)?;
        }
        Ok(())
    }
}

/// Where a page is that was decided.
#[derive(Clone, Copy, Debug)]
enum Spot {
    /// In a pack of the stores: its number in [`Plan::old`].
    Old(u32, u32),
    /// In a new pack of this care, the n-th page of all such packs.
    New(Care, usize),
}

/// Decides, page after page.
struct Plan<'a> {
    known: &'a Known,
    /// Known packs that are used, and their numbers in the manifest.
    old: HashMap<u32, u32>,
    packs: Vec<PackId>,
    placed: HashMap<Digest, Spot>,
    critical: Vec<usize>,
    once: Vec<usize>,
    counts: Vec<Count>,
    /// Where packs of each care begin in the manifest, when all are known.
    starts: (u32, u32),
}

impl<'a> Plan<'a> {
    fn new(known: &'a Known) -> Plan<'a> {
        Plan {
            known,
            old: HashMap::new(),
            packs: Vec::new(),
            placed: HashMap::new(),
            critical: Vec::new(),
            once: Vec::new(),
            counts: vec![Count::default(); Class::ALL.len() + 1],
            starts: (0, 0),
        }
    }

    fn place(&mut self, number: usize, content: &Content<'_>, seen: &Seen) -> Result<()> {
        let class = Class::ALL.iter().position(|class| Some(*class) == content.class).unwrap_or(Class::ALL.len());
        let mut none = Count::default();
        let count = self.counts.get_mut(class).unwrap_or(&mut none);
        count.pages += 1;
        if seen.hash == ZERO {
            count.zero += 1;
        } else if seen.base.is_some() {
            count.base += 1;
        } else if self.placed.contains_key(&seen.hash) {
            count.same += 1;
        } else if let Some((pack, page)) = self.known.find(&seen.hash, content.care) {
            count.known += 1;
            let packs = &mut self.packs;
            let place = self.old.entry(pack).or_insert_with(|| {
                packs.extend(self.known.pack(pack).map(|pack| pack.id));
                u32::try_from(packs.len() - 1).unwrap_or(u32::MAX)
            });
            self.placed.insert(seen.hash, Spot::Old(*place, page));
        } else if content.bytes.is_none() {
            // It was found before the VM was stopped, and nobody else writes to what is known.
            return Err(Error::new(ErrorKind::Corrupt, "snapshot", "a page is not where it was").mend("take it again"));
        } else {
            let (list, counted) = match content.care {
                Care::Critical => (&mut self.critical, &mut count.critical),
                Care::Once => (&mut self.once, &mut count.once),
            };
            *counted += 1;
            self.placed.insert(seen.hash, Spot::New(content.care, list.len()));
            list.push(number);
        }
        Ok(())
    }

    /// The packs to be made, in the order in which the manifest will name them behind those that are known.
    fn end(&mut self, pages: usize) -> (Vec<New>, Kept) {
        let critical = self.critical.chunks(PACK_PAGES).map(|c| New { care: Care::Critical, contents: c.to_vec() });
        let once = self.once.chunks(PACK_PAGES).map(|c| New { care: Care::Once, contents: c.to_vec() });
        let news: Vec<New> = critical.chain(once).collect();
        let first = u32::try_from(self.packs.len()).unwrap_or(u32::MAX);
        let critical_packs = u32::try_from(self.critical.len().div_ceil(PACK_PAGES)).unwrap_or(u32::MAX);
        self.starts = (first, first.saturating_add(critical_packs));
        let once = self.packs.iter().copied().filter(|id| self.known.care_of(*id) == Some(Care::Once)).collect();
        let kept = Kept {
            pages: vec![Page::ZERO; pages],
            packs: self.packs.clone(),
            once,
            counts: self.counts.clone(),
            ..Kept::default()
        };
        (news, kept)
    }

    fn held(&self, seen: &Seen) -> Held {
        if seen.hash == ZERO {
            return Held::Zero;
        }
        if let Some((image, block)) = seen.base {
            return Held::Image { image, block };
        }
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        match self.placed.get(&seen.hash) {
            Some(Spot::Old(pack, page)) => Held::Pack { pack: *pack, page: *page },
            Some(Spot::New(care, number)) => {
                let first = if *care == Care::Critical { self.starts.0 } else { self.starts.1 };
                Held::Pack { pack: first + narrow(number / PACK_PAGES), page: narrow(number % PACK_PAGES) }
            }
            // Each page was placed.
            None => Held::Elsewhere,
        }
    }
}

/// One a processor.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(2, std::num::NonZero::get)
}

/// Whether to go on.
///
/// # Errors
/// `Interrupted`.
pub fn check(stop: &AtomicBool) -> Result<()> {
    if stop.load(Ordering::Relaxed) {
        return Err(Error::new(ErrorKind::Interrupted, "snapshot", "stopped; earlier snapshots are as they were"));
    }
    Ok(())
}
