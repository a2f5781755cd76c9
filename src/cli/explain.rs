//! `vmar map explain`: where one block lives and why there, and who else holds its content.

use super::map::{image_name, open_of};
use crate::error::{Error, ErrorKind, Result};
use crate::image::partitions::misaligned;
use crate::indexer::holders::{Holder, contents_of, holders};
use crate::library::{ImageRecord, Library};
use crate::map::Target;
use crate::units::{BLOCK_SIZE, ImageId, SECTOR_SIZE};
use serde::Serialize;
use std::collections::BTreeSet;

/// Source blocks that are listed for each image; contents like an empty directory block repeat thousands of times.
const LISTED_MAX: usize = 16;

/// What `map explain` says.
#[derive(Serialize)]
pub(super) struct Explained {
    name: String,
    id: u32,
    block: u32,
    offset: u64,
    zero: bool,
    target: Option<Address>,
    entry: Option<EntryRow>,
    section: u32,
    /// The entries that the section index leaves, first and end.
    section_entries: [usize; 2],
    search_depth: u32,
    shared_by: Vec<Sharer>,
    /// Which step of the policy chose the target.
    chosen_by: Option<Choice>,
    /// Everybody who holds the content, this image included, wherever it is read from.
    held_by: Vec<Sharer>,
    /// Partitions of the image that do not begin at a multiple of 4 KiB, which keeps it from sharing.
    misaligned_partitions: Vec<Misaligned>,
}

/// A step of a policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Choice {
    /// The lowest block of the lowest image ID that holds the content.
    Canonical,
    /// A run into another image is read on, though the canonical copy is elsewhere.
    Bridge,
    /// The run into another image would be too short to leave this one.
    MinRun,
    /// A partial last block stays where it is.
    Partial,
}

/// A partition, and the byte at which it starts.
#[derive(Serialize)]
struct Misaligned {
    partition: u32,
    start: u64,
    /// The block asked about is in it.
    has_block: bool,
}

/// The canonical address.
#[derive(Serialize)]
struct Address {
    id: u32,
    name: String,
    generation: u64,
    block: u32,
    offset: u64,
}

#[derive(Serialize)]
struct EntryRow {
    number: u32,
    source: u32,
    len: u32,
    target: u32,
    block: u32,
}

/// Blocks of an image, other than the one asked about, that live at the same address.
#[derive(Serialize)]
struct Sharer {
    id: u32,
    name: String,
    count: u64,
    /// The first few.
    blocks: Vec<u32>,
}

impl Explained {
    pub(super) fn of(library: &Library, record: &ImageRecord, block: u32) -> Result<Explained> {
        let map = open_of(library, record)?;
        let Some((section, candidates)) = map.section_of(block) else {
            let cause = format!("image {} has no block {block}", record.name);
            return Err(Error::new(ErrorKind::Usage, "--block", cause)
                .mend(format!("give a number below {}", map.totals().blocks)));
        };
        let found = map.entry_of(block);
        let home = found.and_then(|(_, entry)| Some((map.target(entry.target)?, entry.block + (block - entry.source))));
        let shared_by = match home {
            Some((target, at)) => sharers(library, &target, at, (record, block))?,
            None => Vec::new(),
        };
        let held = held_by(library, record, block)?;
        let at = home.map(|(target, at)| (target.image, at));
        let partial = record.block_len(block) < BLOCK_SIZE;
        Ok(Explained {
            chosen_by: at.and_then(|at| choice((record.id, block), at, &held, partial)),
            held_by: held.into_iter().map(|h| Sharer::of(library, h)).collect(),
            misaligned_partitions: misaligned_of(library, record, block),
            name: record.name.clone(),
            id: record.id.0,
            block,
            offset: u64::from(block) * BLOCK_SIZE,
            zero: found.is_none(),
            target: home.map(|(target, at)| Address {
                id: target.image.0,
                name: image_name(library, &target),
                generation: target.generation,
                block: at,
                offset: u64::from(at) * BLOCK_SIZE,
            }),
            entry: found.map(|(number, e)| EntryRow {
                number,
                source: e.source,
                len: e.len,
                target: e.target,
                block: e.block,
            }),
            section,
            section_entries: [candidates.start, candidates.end],
            search_depth: map.search_depth(block),
            shared_by,
        })
    }

    pub(super) fn print(&self) -> Result<()> {
        println!("{}: block {} (byte {})", self.name, self.block, self.offset);
        match &self.target {
            None => println!("  is zero"),
            Some(t) if (t.id, t.block) == (self.id, self.block) => println!("  is its own canonical copy"),
            Some(t) => println!("  lives in {} ({}), block {} (byte {})", t.name, t.id, t.block, t.offset),
        }
        if let Some(why) = self.chosen_by {
            println!("  {}", why.text());
        }
        if let Some(e) = &self.entry {
            println!(
                "  entry {}: blocks {}-{} to target {}, block {} on",
                e.number,
                e.source,
                u64::from(e.source) + u64::from(e.len) - 1,
                e.target,
                e.block
            );
        }
        let [first, end] = self.section_entries;
        match end - first {
            0 => println!("  section {}: no entries", self.section),
            1 => println!("  section {}: entry {first}", self.section),
            n => println!(
                "  section {}: entries {first}-{}, {n} of them; search depth {}",
                self.section,
                end - 1,
                self.search_depth
            ),
        }
        if self.shared_by.is_empty() && !self.zero {
            println!("  shared with no other block");
        }
        for sharer in &self.shared_by {
            let listed: Vec<String> = sharer.blocks.iter().map(u32::to_string).collect();
            let more = if sharer.count > listed.len() as u64 { ", …" } else { "" };
            let what = if sharer.count == 1 { "block" } else { "blocks" };
            let listed = listed.join(", ");
            println!("  shared with {} ({}), {} {what}: {listed}{more}", sharer.name, sharer.id, sharer.count);
        }
        for holder in &self.held_by {
            let what = if holder.count == 1 { "block" } else { "blocks" };
            println!("  content held by {} ({}): {} {what}", holder.name, holder.id, holder.count);
        }
        for p in &self.misaligned_partitions {
            let where_to = if p.has_block { "the block is in" } else { "the image has" };
            let sector = p.start / SECTOR_SIZE;
            println!("  {where_to} misaligned partition {} (starts at sector {sector}): it hardly shares", p.partition);
        }
        Ok(())
    }
}

impl Choice {
    fn text(self) -> &'static str {
        match self {
            Choice::Canonical => "chosen as the canonical copy: the lowest block of the lowest image ID that holds it",
            Choice::Bridge => "chosen by the bridge: a run is read on, the canonical copy is elsewhere",
            Choice::MinRun => "stays in this image: the run into another one would be too short (min-run)",
            Choice::Partial => "a partial last block stays where it is",
        }
    }
}

impl Sharer {
    fn of(library: &Library, holder: Holder) -> Sharer {
        let name =
            library.image_by_id(holder.image).map_or_else(|_| format!("image {}", holder.image), |r| r.name.clone());
        Sharer { id: holder.image.0, name, count: holder.count, blocks: holder.blocks }
    }
}

/// Everybody who holds the content of a block, by the fingerprints.
fn held_by(library: &Library, record: &ImageRecord, block: u32) -> Result<Vec<Holder>> {
    let content = contents_of(library, record, &BTreeSet::from([block]))?.remove(&block);
    let Some(content) = content else { return Ok(Vec::new()) };
    let mut found = holders(library, record, &BTreeSet::from([content]), LISTED_MAX)?;
    Ok(found.remove(&content).unwrap_or_default())
}

/// Why `own` is read from `target`: what the policies could have done, told by the outcome. An image only reads from itself
/// and from images with lower IDs.
fn choice(own: (ImageId, u32), target: (ImageId, u32), held: &[Holder], partial: bool) -> Option<Choice> {
    let first = held.iter().find(|h| h.image <= own.0)?;
    let canonical = (first.image, *first.blocks.first()?);
    Some(match () {
        _ if partial => Choice::Partial,
        _ if target == canonical => Choice::Canonical,
        _ if target.0 == own.0 => Choice::MinRun,
        _ => Choice::Bridge,
    })
}

/// Misaligned partitions; none if the image cannot be read, for this is about its map.
fn misaligned_of(library: &Library, record: &ImageRecord, block: u32) -> Vec<Misaligned> {
    let path = library.image_path(record);
    let found = library.open_any(record).and_then(|file| misaligned(&file, &path, record.size));
    let found = found.inspect_err(|err| log::info!("{err}")).unwrap_or_default();
    let at = u64::from(block) * BLOCK_SIZE;
    let has_block = |start: u64, len: u64| start < at.saturating_add(BLOCK_SIZE) && at < start.saturating_add(len);
    found
        .iter()
        .map(|p| Misaligned { partition: p.number, start: p.start, has_block: has_block(p.start, p.len) })
        .collect()
}

/// All blocks of all images of the library that live at block `at` of `home`, but for the one that was asked about.
fn sharers(library: &Library, home: &Target, at: u32, asked: (&ImageRecord, u32)) -> Result<Vec<Sharer>> {
    let mut out = Vec::new();
    for record in library.images() {
        let map = open_of(library, record)?;
        let Some(target) = (0..).zip(map.targets()).find_map(|(i, (t, _))| t.same_image(home).then_some(i)) else {
            continue;
        };
        let (mut count, mut blocks) = (0, Vec::new());
        for entry in map.entries().filter(|e| e.target == target && e.block <= at && u64::from(at) < e.block_end()) {
            let block = entry.source + (at - entry.block);
            if (record.id, block) != (asked.0.id, asked.1) {
                count += 1;
                if blocks.len() < LISTED_MAX {
                    blocks.push(block);
                }
            }
        }
        if count > 0 {
            out.push(Sharer { id: record.id.0, name: record.name.clone(), count, blocks });
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_outcome_tells_the_step() {
        let holder = |image, blocks: &[u32]| Holder { image: ImageId(image), count: 9, blocks: blocks.to_vec() };
        let held = [holder(1, &[40, 50]), holder(3, &[7, 9]), holder(5, &[0])];
        let why = |target: (u32, u32), partial| choice((ImageId(3), 9), (ImageId(target.0), target.1), &held, partial);
        assert_eq!(why((1, 40), false), Some(Choice::Canonical));
        assert_eq!(why((1, 50), false), Some(Choice::Bridge));
        assert_eq!(why((3, 9), false), Some(Choice::MinRun));
        assert_eq!(why((3, 9), true), Some(Choice::Partial));
        // An image with a higher ID is never read from, so the own lowest block is canonical.
        let alone = [holder(3, &[7, 9]), holder(5, &[0])];
        assert_eq!(choice((ImageId(3), 9), (ImageId(3), 7), &alone, false), Some(Choice::Canonical));
        assert_eq!(choice((ImageId(3), 9), (ImageId(3), 9), &[], false), None);
    }
}
