//! Pages that the stores have already: of earlier snapshots of the same VM, of others in its sharing domain, and of a template.

use super::file::Snapshot;
use super::place::Care;
use super::stores::Stores;
use crate::error::Result;
use crate::store::manifest::{Held, Manifest};
use crate::store::{Digest, Pack, PackId, Store};
use std::collections::HashMap;
use std::path::{Path, PathBuf};

/// Contents in memory, at most; about half a GiB.
const CONTENTS_MAX: usize = 8 << 20;

/// A pack that pages may be found in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KnownPack {
    /// Which one.
    pub id: PackId,
    /// How it is looked after.
    pub care: Care,
    /// It is a template, here, and not in the stores yet.
    pub template: Option<PathBuf>,
}

/// Where pages are.
#[derive(Debug, Default)]
pub struct Known {
    packs: Vec<KnownPack>,
    numbers: HashMap<PackId, u32>,
    pages: HashMap<Digest, (u32, u32)>,
}

impl Known {
    /// Of a domain's snapshots, the newest first, as far as there is room. Only packs count that are in all the stores where they
    /// belong.
    ///
    /// # Errors
    /// A store cannot be read.
    pub fn load(stores: &Stores, domain: &str, copies: usize) -> Result<Known> {
        let mut known = Known::default();
        for name in stores.newest_first()? {
            match stores.load_any(&name) {
                Ok(snapshot) if snapshot.about.domain == domain => known.add_snapshot(stores, &snapshot, copies),
                Ok(_) => {}
                Err(e) => log::warn!("its pages are not used: {e}"),
            }
            if known.pages.len() >= CONTENTS_MAX {
                break;
            }
        }
        Ok(known)
    }

    fn add_snapshot(&mut self, stores: &Stores, snapshot: &Snapshot, copies: usize) {
        let once = snapshot.once();
        for manifest in std::iter::once(&snapshot.memory).chain(snapshot.disks.iter().map(|disk| &disk.data)) {
            let care = |id: &PackId| if once.contains(id) { Care::Once } else { Care::Critical };
            let numbers: Vec<Option<u32>> =
                manifest.packs.iter().map(|id| self.number(stores, *id, care(id), copies)).collect();
            self.add_pages(manifest, &numbers);
        }
    }

    /// The number of a pack here, if it is where it has to be.
    fn number(&mut self, stores: &Stores, id: PackId, care: Care, copies: usize) -> Option<u32> {
        let there = match care {
            Care::Critical => stores.homes(id, copies).iter().all(|store| store.has(id)),
            Care::Once => !stores.with(id).is_empty(),
        };
        there.then(|| self.push(KnownPack { id, care, template: None }))
    }

    fn push(&mut self, pack: KnownPack) -> u32 {
        *self.numbers.entry(pack.id).or_insert_with(|| {
            self.packs.push(pack);
            u32::try_from(self.packs.len() - 1).unwrap_or(u32::MAX)
        })
    }

    fn add_pages(&mut self, manifest: &Manifest, numbers: &[Option<u32>]) {
        for page in &manifest.pages {
            let Held::Pack { pack, page: number } = page.held else { continue };
            let known = usize::try_from(pack).ok().and_then(|n| numbers.get(n).copied().flatten());
            if let Some(known) = known {
                self.add(page.hash, known, number);
            }
        }
    }

    fn add(&mut self, hash: Digest, pack: u32, page: u32) {
        if self.pages.len() >= CONTENTS_MAX {
            return;
        }
        let better = |old: u32| self.care(old) == Care::Once && self.care(pack) == Care::Critical;
        match self.pages.get(&hash) {
            Some((old, _)) if !better(*old) => {}
            _ => drop(self.pages.insert(hash, (pack, page))),
        }
    }

    /// Adds the pages of the newest template of a domain, from a store of memory ('vmar template'). If one of them is used the template
    /// becomes a pack of the stores.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn add_template(&mut self, dir: &Path, domain: &str) -> Result<()> {
        let Some(file) = Store::open(dir)?.templates(Some(domain))?.into_iter().next() else {
            log::warn!("there is no template of domain {domain} in {}", dir.display());
            return Ok(());
        };
        let pack: Pack = file.open()?;
        let number = self.push(KnownPack { id: file.id, care: Care::Critical, template: Some(file.path) });
        for (hash, page) in pack.hashes().iter().zip(0..) {
            self.add(*hash, number, page);
        }
        Ok(())
    }

    fn care(&self, pack: u32) -> Care {
        self.pack(pack).map_or(Care::Once, |pack| pack.care)
    }

    /// A pack by its number.
    pub fn pack(&self, number: u32) -> Option<&KnownPack> {
        self.packs.get(usize::try_from(number).ok()?)
    }

    /// How a pack is looked after, if it is one of these.
    pub fn care_of(&self, id: PackId) -> Option<Care> {
        self.numbers.get(&id).map(|number| self.care(*number))
    }

    /// The file of a template that is not in the stores yet.
    pub fn template(&self, id: PackId) -> Option<&Path> {
        self.pack(*self.numbers.get(&id)?)?.template.as_deref()
    }

    /// Where a page is: number of the pack, and of the page in it. One that must not be lost is never found in a pack that may be.
    pub fn find(&self, hash: &Digest, care: Care) -> Option<(u32, u32)> {
        let (pack, page) = *self.pages.get(hash)?;
        (care == Care::Once || self.care(pack) == Care::Critical).then_some((pack, page))
    }
}
