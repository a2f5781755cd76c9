//! Where each block of an image could be read from, by its fingerprint: the content index says which images hold it, the
//! policy which of them is read, and that image's fingerprints at which block.

use super::choose::Choose;
use super::compare::Pair;
use super::contents::{Content, Contents, Held};
use super::images::Images;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::{Hash, Row};
use crate::index::{self, table::MEND};
use std::collections::BTreeMap;

/// A part of an image's rows: all rows of some hashes, ascending.
pub(super) struct Part<'r> {
    pub rows: &'r mut [Row],
    /// The variants of the rows were settled when the image was added; else they are to be found out.
    pub is_settled: bool,
}

/// What came out for a part.
pub(super) struct Candidates {
    /// Where each row could be read from, in any order. Rows that were not settled have the variant of their candidate now.
    pub pairs: Vec<Pair>,
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
    choose: &Choose,
) -> Result<Candidates> {
    let Part { rows, is_settled } = part;
    let mut hashes: Vec<Hash> = rows.iter().map(|r| r.hash).collect();
    hashes.dedup();
    let found = contents.lookup(&hashes)?;
    let mut pairs = Vec::with_capacity(rows.len());
    let mut wanted: Vec<Wanted> = Vec::new();
    let mut key = 0;
    let mut at = 0;
    for of_content in rows.chunk_by_mut(|a, b| (a.hash, a.variant) == (b.hash, b.variant)) {
        let Some(first) = of_content.first().copied() else { continue };
        while hashes.get(key).is_some_and(|h| *h < first.hash) {
            key += 1;
        }
        let content = known_content(found.of(key), &first, is_settled)?;
        let len = of_content.len();
        match content {
            None => pairs.extend(of_content.iter().map(|r| Pair { source: r.block, image: own, block: first.block })),
            Some(content) => {
                of_content.iter_mut().for_each(|r| r.variant = u32::from(content.variant));
                let image = choose.one(contents.sets().images(content.set));
                if image == own {
                    pairs.extend(of_content.iter().map(|r| Pair { source: r.block, image, block: first.block }));
                } else {
                    let (at, len, key) = (narrow(at)?, narrow(len)?, narrow(key)?);
                    wanted.push(Wanted { image, key, variant: content.variant, at, len });
                }
            }
        }
        at += len;
    }
    find_blocks(&mut wanted, &hashes, images, rows, &mut pairs)?;
    let known = (0..)
        .zip(&hashes)
        .flat_map(|(i, hash)| found.of(i).iter().map(|c| index::Row { hash: *hash, variant: c.variant, set: c.set }));
    Ok(Candidates { pairs, known: known.collect() })
}

/// The content that rows like `row` have, or could have; `None` if no image holds their hash.
fn known_content(known: &[Content], row: &Row, is_settled: bool) -> Result<Option<Content>> {
    if !is_settled {
        return Ok(known.first().copied());
    }
    let same = known.iter().find(|c| u32::from(c.variant) == row.variant);
    same.copied().map(Some).ok_or_else(|| contradiction("a content of an image is missing"))
}

/// A content whose lowest block in another image is wanted, for `len` rows from number `at` on.
struct Wanted {
    image: u32,
    key: u32,
    variant: u16,
    at: u32,
    len: u32,
}

/// Goes once through the run of each image that something is wanted of.
fn find_blocks(
    wanted: &mut [Wanted],
    hashes: &[Hash],
    images: &Images,
    rows: &[Row],
    pairs: &mut Vec<Pair>,
) -> Result<()> {
    wanted.sort_unstable_by_key(|w| (w.image, w.key, w.variant));
    for of_image in wanted.chunk_by(|a, b| a.image == b.image) {
        let Some(image) = of_image.first().map(|w| w.image) else { continue };
        let hash = |key: u32| hashes.get(key as usize).copied().unwrap_or_default();
        let goals: Vec<(Hash, u16)> = of_image.iter().map(|w| (hash(w.key), w.variant)).collect();
        for (w, block) in of_image.iter().zip(blocks_of(images, image, &goals)?) {
            let rows = rows.get(w.at as usize..(w.at + w.len) as usize).unwrap_or(&[]);
            pairs.extend(rows.iter().map(|r| Pair { source: r.block, image, block }));
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
