//! Where each block of an image could be read from, by its fingerprint: the content index says which images hold it, the
//! policy which of them is read, and that image's fingerprints at which block.

use super::contents::{Content, Contents, Held};
use super::images::Images;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::{Hash, Row};
use crate::index::{self, table::MEND};
use std::collections::BTreeMap;

/// Which image of a set is read by all that hold the content.
pub(super) trait Choose: Sync {
    /// One of `images`, which are ascending and at least one.
    fn choose(&self, images: &[u32]) -> u32;
}

/// A part of an image's rows: all rows of some hashes, ascending.
pub(super) struct Part<'r> {
    pub rows: &'r mut [Row],
    /// The variants of the rows were settled when the image was added; else they are to be found out.
    pub is_settled: bool,
}

/// Where a row could be read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Candidate {
    pub image: u32,
    pub block: u32,
}

/// What came out for a part.
pub(super) struct Candidates {
    /// One a row. Rows that were not settled have the variant of their candidate now.
    pub places: Vec<Candidate>,
    /// What the index knows of their hashes, ascending.
    pub known: Vec<index::Row>,
}

/// Finds the candidates of the rows of image `own`.
///
/// # Errors
/// `Corrupt` when index and fingerprints contradict each other.
pub(super) fn candidates(
    part: Part<'_>,
    own: u32,
    contents: &Contents,
    images: &Images,
    choose: &dyn Choose,
) -> Result<Candidates> {
    let Part { rows, is_settled } = part;
    let mut hashes: Vec<Hash> = rows.iter().map(|r| r.hash).collect();
    hashes.dedup();
    let found = contents.lookup(&hashes)?;
    let mut places = Vec::with_capacity(rows.len());
    // Contents of other images, whose blocks are to be found in their runs; `at` is their first row here.
    let mut wanted: Vec<Wanted> = Vec::new();
    let mut key = 0;
    let mut start = 0;
    while start < rows.len() {
        // All rows of one content.
        let first = rows[start];
        let end = start + rows[start..].iter().take_while(|r| (r.hash, r.variant) == (first.hash, first.variant)).count();
        while hashes.get(key).is_some_and(|h| *h < first.hash) {
            key += 1;
        }
        let known = found.of(key);
        let content = if is_settled {
            let same = |c: &&Content| u32::from(c.variant) == first.variant;
            Some(*known.iter().find(same).ok_or_else(|| contradiction("a content of an image is missing"))?)
        } else {
            known.first().copied()
        };
        let mut candidate = Candidate { image: own, block: first.block };
        if let Some(content) = content {
            candidate.image = choose.choose(contents.sets().images(content.set));
            rows[start..end].iter_mut().for_each(|r| r.variant = u32::from(content.variant));
            if candidate.image != own {
                let (at, key) = (narrow(start)?, narrow(key)?);
                wanted.push(Wanted { image: candidate.image, key, variant: content.variant, at, len: narrow(end - start)? });
            }
        }
        places.resize(end, candidate);
        start = end;
    }
    find_blocks(&mut wanted, &hashes, images, &mut places)?;
    let known = (0..).zip(&hashes).flat_map(|(i, hash)| {
        found.of(i).iter().map(|c| index::Row { hash: *hash, variant: c.variant, set: c.set })
    });
    Ok(Candidates { places, known: known.collect() })
}

/// A content whose lowest block in an image is wanted, for `len` rows from number `at` on.
struct Wanted {
    image: u32,
    key: u32,
    variant: u16,
    at: u32,
    len: u32,
}

/// Goes once through the run of each image that something is wanted of.
fn find_blocks(wanted: &mut [Wanted], hashes: &[Hash], images: &Images, places: &mut [Candidate]) -> Result<()> {
    wanted.sort_unstable_by_key(|w| (w.image, w.key, w.variant));
    for of_image in wanted.chunk_by(|a, b| a.image == b.image) {
        let Some(first) = of_image.first() else { continue };
        let hash = |key: u32| hashes.get(key as usize).copied().unwrap_or_default();
        let goals: Vec<(Hash, u16)> = of_image.iter().map(|w| (hash(w.key), w.variant)).collect();
        for (w, block) in of_image.iter().zip(blocks_of(images, first.image, &goals)?) {
            let rows = w.at as usize..(w.at + w.len) as usize;
            places.get_mut(rows).into_iter().flatten().for_each(|p| p.block = block);
        }
    }
    Ok(())
}

/// The lowest block of each of these contents, which are ascending, in an image that holds them all.
pub(super) fn blocks_of(images: &Images, image: u32, contents: &[(Hash, u16)]) -> Result<Vec<u32>> {
    let mut run = images.run(image)?;
    let mut row = run.next().transpose()?;
    let mut out = Vec::with_capacity(contents.len());
    for &(hash, variant) in contents {
        let goal = (hash, u32::from(variant));
        while row.is_some_and(|r| (r.hash, r.variant) < goal) {
            row = run.next().transpose()?;
        }
        match row.filter(|r| (r.hash, r.variant) == goal) {
            Some(found) => out.push(found.block),
            None => return Err(contradiction("an image does not hold what the index says")),
        }
    }
    Ok(out)
}

/// The index rows of an image: its settled contents (`rows`), with what the index knew of their hashes (`known`); both
/// ascending.
pub(super) fn held(
    rows: impl Iterator<Item = Result<Row>>,
    known: impl Iterator<Item = Result<index::Row>>,
) -> impl Iterator<Item = Result<Held>> {
    let (mut rows, mut known) = (rows.peekable(), known.peekable());
    let mut out: std::vec::IntoIter<Held> = Vec::new().into_iter();
    let mut next_hash = move || -> Result<Option<Vec<Held>>> {
        let Some(first) = rows.next().transpose()? else { return Ok(None) };
        let mut all: BTreeMap<u16, Held> = BTreeMap::new();
        while let Some(content) = known.next_if(|c| c.as_ref().map_or(true, |c| c.hash <= first.hash)).transpose()? {
            if content.hash == first.hash {
                let held = Held { hash: first.hash, variant: content.variant, set: Some(content.set), is_held: false };
                all.insert(content.variant, held);
            }
        }
        let mut row = Some(first);
        while let Some(this) = row {
            let variant = u16::try_from(this.variant).map_err(|_| too_many())?;
            all.entry(variant).or_insert(Held { hash: this.hash, variant, set: None, is_held: true }).is_held = true;
            row = rows.next_if(|r| r.as_ref().map_or(true, |r| r.hash == first.hash)).transpose()?;
        }
        Ok(Some(all.into_values().collect()))
    };
    std::iter::from_fn(move || {
        loop {
            if let Some(held) = out.next() {
                return Some(Ok(held));
            }
            match next_hash() {
                Ok(Some(of_hash)) => out = of_hash.into_iter(),
                Ok(None) => return None,
                Err(e) => return Some(Err(e)),
            }
        }
    })
}

fn too_many() -> Error {
    Error::new(ErrorKind::Unsupported, "the content index", "a hash has more than 65,536 contents")
}

fn narrow(n: usize) -> Result<u32> {
    u32::try_from(n).map_err(|_| Error::new(ErrorKind::Unsupported, "the image", "has too many blocks for one part"))
}

fn contradiction(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, "the content index", what).mend(MEND)
}
