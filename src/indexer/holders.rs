//! Who holds a content: looked up in the runs, which are sorted by it. Nobody reads any image for that.

use super::stats::open_run;
use crate::error::Result;
use crate::fingerprint::Hash;
use crate::library::{ImageRecord, Library};
use crate::units::ImageId;
use std::collections::{BTreeMap, BTreeSet};

/// A content: its hash, and which of the contents with that hash.
pub type Content = (Hash, u32);

/// An image that holds a content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The image.
    pub image: ImageId,
    /// In how many blocks.
    pub count: u64,
    /// The lowest of them.
    pub blocks: Vec<u32>,
}

/// The contents of some blocks of an image; a block that is zero has none.
pub fn contents_of(library: &Library, record: &ImageRecord, blocks: &BTreeSet<u32>) -> Result<BTreeMap<u32, Content>> {
    let mut out = BTreeMap::new();
    // In order of hash: a block may be anywhere.
    for row in open_run(library, record)? {
        let row = row?;
        if out.len() == blocks.len() {
            break;
        }
        if blocks.contains(&row.block) {
            out.insert(row.block, (row.hash, row.variant));
        }
    }
    Ok(out)
}

/// For each content the images that hold it, in order of ID, of the sharing domain of `record`; and up to `most` of their
/// blocks. One pass over each run, as far as the last of the contents.
pub fn holders(
    library: &Library,
    record: &ImageRecord,
    contents: &BTreeSet<Content>,
    most: usize,
) -> Result<BTreeMap<Content, Vec<Holder>>> {
    let mut out: BTreeMap<Content, Vec<Holder>> = BTreeMap::new();
    let Some(last) = contents.last() else { return Ok(out) };
    let comparable = |r: &&ImageRecord| r.domain == record.domain && r.fingerprint == record.fingerprint;
    for image in library.images().iter().filter(comparable) {
        for row in open_run(library, image)? {
            let row = row?;
            let content = (row.hash, row.variant);
            if content > *last {
                break;
            }
            if !contents.contains(&content) {
                continue;
            }
            let all = out.entry(content).or_default();
            if all.last().is_none_or(|h| h.image != image.id) {
                all.push(Holder { image: image.id, count: 0, blocks: Vec::new() });
            }
            if let Some(holder) = all.last_mut() {
                holder.count += 1;
                if holder.blocks.len() < most {
                    holder.blocks.push(row.block);
                }
            }
        }
    }
    Ok(out)
}
