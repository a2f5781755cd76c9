//! What must hold of targets and entries, whoever made them: the builder checks what it is given, the reader what it
//! reads. Work is linear in the number of entries, never in the number of blocks.

use super::entry::Table;
use super::{Entry, MapError, Target};
use std::collections::HashMap;

/// What the entries add up to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) nonzero_blocks: u64,
    pub(super) redirected_blocks: u64,
    pub(super) self_redirected_blocks: u64,
    /// Blocks mapped into each target.
    pub(super) per_target: Vec<u64>,
}

/// Each image once, and the source image among them only as itself.
pub(super) fn check_targets(source: &Target, targets: &[Target]) -> Result<(), MapError> {
    let mut seen = HashMap::with_capacity(targets.len());
    for (i, target) in targets.iter().enumerate() {
        if let Some(earlier) = seen.insert((target.image, target.generation), i) {
            return Err(MapError::broken(format!("targets {earlier} and {i} are the same image {}", target.image)));
        }
        if target.same_image(source) && target != source {
            return Err(MapError::broken(format!("target {i} is the map's own image, but differs from it")));
        }
    }
    Ok(())
}

/// Sorted, apart, inside both images, and a partial last block only where it is.
pub(super) fn check_entries(source: &Target, targets: &[Target], table: Table<'_>) -> Result<Tally, MapError> {
    let mut tally = Tally { per_target: vec![0; targets.len()], ..Tally::default() };
    let mut free = 0;
    for (i, entry) in table.iter().enumerate() {
        if entry.len == 0 {
            return Err(MapError::broken(format!("entry {i} covers no block")));
        }
        if u64::from(entry.source) < free {
            return Err(MapError::broken(format!("entry {i} starts at block {} before {free}", entry.source)));
        }
        free = entry.source_end();
        let target = (entry.target as usize, targets.get(entry.target as usize));
        let (index, Some(target)) = target else {
            return Err(MapError::broken(format!("entry {i} points to target {} of {}", entry.target, targets.len())));
        };
        if free > source.blocks() || entry.block_end() > target.blocks() {
            return Err(MapError::broken(format!("entry {i} reaches past the end of an image")));
        }
        let own = target.same_image(source);
        let in_place = own && entry.block == entry.source;
        if !in_place && (ends_in_partial_block(source, free) || ends_in_partial_block(target, entry.block_end())) {
            return Err(MapError::broken(format!("entry {i} redirects a partial last block")));
        }
        tally.add(&entry, index, own, in_place);
    }
    Ok(tally)
}

impl Tally {
    fn add(&mut self, entry: &Entry, target: usize, own: bool, in_place: bool) {
        let blocks = u64::from(entry.len);
        self.nonzero_blocks += blocks;
        self.per_target[target] += blocks;
        if !own {
            self.redirected_blocks += blocks;
        } else if !in_place {
            self.self_redirected_blocks += blocks;
        }
    }
}

/// True when a range of blocks that ends before block `end` takes in a last block which is not whole.
fn ends_in_partial_block(image: &Target, end: u64) -> bool {
    end == image.blocks() && !image.size.is_multiple_of(crate::units::BLOCK_SIZE)
}
