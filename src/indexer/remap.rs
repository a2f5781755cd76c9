//! Makes maps of a library anew: all of them with another policy or the same one, or those that a change leaves without a
//! target. Of the fingerprints and the index that the library has, and of the bytes.
//!
//! Each map is chosen and proved as when its image was added. What is published is all or nothing, and a `vmar serve` that
//! has the old map open goes on with it until it is told: images never change, so it stays right.

use super::change::Change;
use super::choose::run_length;
use super::compare::{Others, Pair};
use super::place::{NoSink, Placing, place, write_map};
use super::stats::open_run;
use super::{Work, read_map};
use crate::error::{Error, ErrorKind, Result};
use crate::library::{ImageRecord, Policy, Writer, map_file};
use crate::map::{Map, Totals};
use crate::units::ImageId;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

/// What became of one image's map.
#[derive(Clone, Debug)]
pub struct Remapped {
    /// Name of the image.
    pub name: String,
    /// What the new map says.
    pub totals: Totals,
    /// Other images that it reads from now.
    pub reads_from: Vec<ImageId>,
}

/// Writes all maps anew with this policy, which is the library's from then on. Every candidate is compared byte for byte,
/// so a map that was damaged comes back too.
///
/// # Errors
/// Whatever stops one map stops all, and the library stays as it was: `Changed` when the bytes of an image are not those
/// that were added, `Corrupt` when a run or the index is damaged.
pub fn remap(writer: &mut Writer, policy: Policy, work: &Work) -> Result<Vec<Remapped>> {
    remap_by(writer, policy, None, work)
}

/// The same, with new numbers for the policy `most-used`: how much each image is used, by ID. `None` keeps those that the
/// library has.
pub fn remap_by(
    writer: &mut Writer,
    policy: Policy,
    usage: Option<BTreeMap<u32, u64>>,
    work: &Work,
) -> Result<Vec<Remapped>> {
    let mut change = Change::begin(writer, work)?;
    let was_by_use = matches!(change.policy, Policy::MostUsed(_));
    change.policy = policy;
    let records = change.transaction.library().images().to_vec();
    match (policy, usage) {
        (Policy::LeastFragmented(_), _) => {
            let length = |r: &ImageRecord| Ok((r.id.0, run_length(r.id.0, &change.contents, &change.images)?));
            change.preference = records.iter().map(length).collect::<Result<_>>()?;
        }
        (_, Some(usage)) => change.preference = usage,
        // What another policy went by says nothing of use.
        (Policy::MostUsed(_), None) if !was_by_use => change.preference.clear(),
        _ => {}
    }
    let mut out = Vec::with_capacity(records.len());
    for record in records {
        out.push(remap_one(&mut change, &record, None, work)?);
    }
    change.commit(|_| {}, work)?;
    Ok(out)
}

/// Stages a new map of an image. Redirects that its old map has are not proved again if that is given.
pub(super) fn remap_one(
    change: &mut Change<'_>,
    record: &ImageRecord,
    old: Option<Map<Vec<u8>>>,
    work: &Work,
) -> Result<Remapped> {
    work.check_stop(&record.name)?;
    let path = change.transaction.stage_over(&map_file(&record.name))?;
    let scratch = change.transaction.scratch(&format!("{}.pairs", record.id));
    let library = change.transaction.library();
    let run = open_run(library, record)?;
    // A block without a row would be read as zeros.
    if run.rows() != record.nonzero_blocks {
        let cause = format!("has {} fingerprints, image {} {} blocks", run.rows(), record.name, record.nonzero_blocks);
        return Err(Error::file(ErrorKind::Corrupt, library.run_path(record), cause)
            .mend("restore it from a backup, or make it anew with 'vmar library rebuild'"));
    }
    let proved = old.map(|map| Proved::by(map, Vec::new()));
    let choose = change.choose();
    let own = change.images.side(record.id.0)?;
    let placing = Placing {
        own,
        images: &change.images,
        contents: &change.contents,
        choose: &choose,
        policy: change.policy,
        is_settled: true,
        is_proved: &|pair| proved.as_ref().is_some_and(|p| p.has(pair)),
        scratch: &scratch,
        work,
    };
    let placed = place(run, &placing, &mut NoSink)?;
    let reads_from = placed.targets.iter().map(|&id| ImageId(id)).filter(|id| *id != record.id).collect();
    let totals = write_map(&path, change.policy, &change.images, own, placed)?;
    Ok(Remapped { name: record.name.clone(), totals, reads_from })
}

/// The redirects that an old map has: they were compared when it was made, and images never change.
pub(super) struct Proved {
    map: Map<Vec<u8>>,
    /// Number of an image in the map by its ID.
    numbers: HashMap<u32, u32>,
    /// Blocks of which that is not true: they were written since. Ascending, apart.
    but: Vec<Range<u64>>,
}

impl Proved {
    /// All that the map says, but for these blocks.
    pub fn by(map: Map<Vec<u8>>, but: Vec<Range<u64>>) -> Proved {
        let numbers = (0u32..).zip(map.targets()).map(|(n, (target, _))| (target.image.0, n)).collect();
        Proved { map, numbers, but }
    }

    /// True if the redirect was compared.
    pub fn has(&self, pair: &Pair) -> bool {
        let hit = self.map.lookup(pair.source);
        let is_same =
            hit.is_some_and(|hit| self.numbers.get(&pair.image) == Some(&hit.target) && hit.block == pair.block);
        let block = u64::from(pair.source);
        let behind = self.but.partition_point(|r| r.end <= block);
        is_same && !self.but.get(behind).is_some_and(|r| r.contains(&block))
    }
}

/// The images that read from images which go, or would if runs were arranged in another way; in order of ID. `gone` are
/// still in the index.
pub(super) fn dependants(change: &Change<'_>, gone: &[u32]) -> Result<Vec<ImageRecord>> {
    let choose = change.choose();
    let mut affected = std::collections::BTreeSet::new();
    for (_, images, _) in change.contents.sets().live() {
        if gone.contains(&choose.one(images)) {
            affected.extend(images.iter().copied());
        }
    }
    let library = change.transaction.library();
    let mut out = Vec::new();
    for record in library.images().iter().filter(|r| !gone.contains(&r.id.0)) {
        let reads = || Ok(read_map(library, record)?.targets().any(|(t, _)| gone.contains(&t.image.0)));
        if affected.contains(&record.id.0) || reads()? {
            out.push(record.clone());
        }
    }
    Ok(out)
}
