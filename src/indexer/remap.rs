//! Makes the maps of a library anew, with another policy or the same one: of the fingerprints it has, and of the bytes.
//!
//! Each map is chosen and proved as when its image was added: the images are gone through in order of ID, every candidate
//! is compared byte for byte. So a map that was damaged comes back too. What is published is all or nothing, and a
//! `vmar serve` that has the old map open goes on with it: images never change, so it stays right.

use super::Work;
use super::add::{Earlier, check_unchanged, join, open_sides, write_map};
use super::compare::{Side, Sides};
use super::resolve::resolve;
use super::stats::open_run;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::{Row, scan};
use crate::library::{Library, Policy, Writer};
use crate::map::Totals;
use crate::units::ImageId;

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

/// Writes all maps anew with this policy, which is the library's from then on.
///
/// # Errors
/// Whatever stops one map stops all, and the library stays as it was: `Changed` when the bytes of an image are not those
/// that were added, `Corrupt` when a run is damaged.
pub fn remap(writer: &mut Writer, policy: Policy, work: &Work) -> Result<Vec<Remapped>> {
    let change = writer.begin();
    let records = change.library().images().to_vec();
    let mut earlier: Vec<Earlier> = Vec::with_capacity(records.len());
    let mut out = Vec::with_capacity(records.len());
    for record in records {
        work.check_stop(&record.name)?;
        let path = change.stage_map(&record.name)?;
        let library = change.library();
        let side = Side { file: library.open_image(&record)?, path: library.image_path(&record), record };
        let remapped = remap_one(library, &path, &mut earlier, &side, policy, work)?;
        out.push(remapped);
        earlier.push(Earlier { record: side.record.clone(), run: library.run_path(&side.record), side: Some(side) });
    }
    // Last look, as `add` does: what was compared must still be there.
    earlier.iter().filter_map(|e| e.side.as_ref()).try_for_each(check_unchanged)?;
    work.check_stop("remap")?;
    change.commit_maps(policy)?;
    Ok(out)
}

fn remap_one(
    library: &Library,
    path: &std::path::Path,
    earlier: &mut [Earlier],
    side: &Side,
    policy: Policy,
    work: &Work,
) -> Result<Remapped> {
    let record = &side.record;
    let mut rows: Vec<Row> = open_run(library, record)?.collect::<Result<_>>()?;
    // A block without a row would be read as zeros.
    if rows.len() as u64 != record.nonzero_blocks {
        let cause = format!("has {} fingerprints, image {} {} blocks", rows.len(), record.name, record.nonzero_blocks);
        return Err(Error::file(ErrorKind::Corrupt, library.run_path(record), cause)
            .mend("restore it from a backup, or build the library anew"));
    }
    // As they were when they were joined for the first time. Which content of its hash a block is comes out again, by
    // comparison; the run keeps the numbers that it has.
    if rows.iter().any(|row| row.variant != 0) {
        rows.iter_mut().for_each(|row| row.variant = 0);
        scan::sort(&mut rows, work.threads);
    }
    let groups = join(&rows, earlier, record, work)?;
    open_sides(library, earlier, &groups)?;
    let sides = Sides::new(earlier.iter().map(|e| e.side.as_ref()).collect(), side);
    let resolved = resolve(rows, &groups, &sides, policy, work)?;
    let ids = resolved.images.iter().filter_map(|&i| earlier.get(i as usize).map(|e| e.record.id)).collect();
    let totals = write_map(path, policy, earlier, record, resolved)?;
    Ok(Remapped { name: record.name.clone(), totals, reads_from: ids })
}
