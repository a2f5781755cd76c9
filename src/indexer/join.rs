//! Which earlier images have a block with the same hash: a merge of sorted runs.

use crate::error::Result;
use crate::fingerprint::Row;
use std::collections::HashMap;

/// A known content: where its canonical copy is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Known {
    /// Which content of its hash.
    pub variant: u32,
    /// Index of the image, earlier images first, the new one last.
    pub image: u32,
    /// Lowest block with this content in that image.
    pub block: u32,
}

/// The distinct hashes of the new image, with what is known of each.
#[derive(Debug)]
pub(super) struct Groups {
    /// Row at which each group of equal hashes starts.
    starts: Vec<u32>,
    /// The content of this hash that was found first; the only one but for collisions.
    first: Vec<Option<Known>>,
    /// Further contents of the same hash, for groups that have any.
    more: HashMap<usize, Vec<Known>>,
}

impl Groups {
    /// Groups rows that are sorted by hash, fewer than 2^32.
    pub fn new(rows: &[Row]) -> Groups {
        let mut starts = Vec::new();
        let mut last = None;
        for (i, row) in (0u32..).zip(rows) {
            if last != Some(&row.hash) {
                starts.push(i);
                last = Some(&row.hash);
            }
        }
        let first = vec![None; starts.len()];
        Groups { starts, first, more: HashMap::new() }
    }

    /// How many distinct hashes.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Index of the first row of a group; more than there are rows for the group after the last.
    pub fn start(&self, group: usize) -> u32 {
        self.starts.get(group).copied().unwrap_or(u32::MAX)
    }

    /// The group that row number `row` belongs to.
    pub fn of_row(&self, row: u32) -> usize {
        self.starts.partition_point(|&start| start <= row).saturating_sub(1)
    }

    /// The content of the group's hash that an earlier image holds.
    pub fn first(&self, group: usize) -> Option<Known> {
        self.first.get(group).copied().flatten()
    }

    /// Other contents of the group's hash in earlier images.
    pub fn more(&self, group: usize) -> &[Known] {
        self.more.get(&group).map_or(&[], Vec::as_slice)
    }

    /// Takes in the run of earlier image number `image`. Called in order of image ID: the first image that holds a
    /// content has the canonical copy (paper, figure 4: `lowest_numbered_image`).
    pub fn join(&mut self, rows: &[Row], image: u32, run: impl Iterator<Item = Result<Row>>) -> Result<()> {
        let mut group = 0;
        let mut before: Option<Row> = None;
        for row in run {
            let row = row?;
            // The rows of a content are in order of block: only the first one matters.
            let is_first = before.is_none_or(|b| (b.hash, b.variant) != (row.hash, row.variant));
            before = Some(row);
            if !is_first {
                continue;
            }
            let hash_of = |group: usize| rows.get(self.start(group) as usize).map(|r| r.hash);
            while hash_of(group).is_some_and(|hash| hash < row.hash) {
                group += 1;
            }
            match hash_of(group) {
                None => break,
                Some(hash) if hash == row.hash => {
                    self.learn(group, Known { variant: row.variant, image, block: row.block });
                }
                Some(_) => {}
            }
        }
        Ok(())
    }

    fn learn(&mut self, group: usize, known: Known) {
        let Some(first) = self.first.get_mut(group) else { return };
        let Some(first) = first else {
            *first = Some(known);
            return;
        };
        if first.variant == known.variant {
            return;
        }
        let more = self.more.entry(group).or_default();
        if more.iter().all(|m| m.variant != known.variant) {
            more.push(known);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(hash: u8, variant: u32, block: u32) -> Row {
        Row { hash: [hash; 20], variant, block }
    }

    #[test]
    fn the_lowest_image_and_its_lowest_block_win() {
        let own = [row(1, 0, 5), row(1, 0, 9), row(3, 0, 0), row(4, 0, 1)];
        let mut groups = Groups::new(&own);
        assert_eq!(groups.len(), 3);
        let first = [row(0, 0, 1), row(1, 0, 7), row(1, 0, 8), row(2, 0, 0), row(3, 1, 4)];
        groups.join(&own, 0, first.into_iter().map(Ok)).unwrap();
        let second = [row(1, 0, 2), row(3, 0, 6), row(3, 1, 5), row(5, 0, 0)];
        groups.join(&own, 1, second.into_iter().map(Ok)).unwrap();
        assert_eq!(groups.first(0), Some(Known { variant: 0, image: 0, block: 7 }));
        assert_eq!(groups.first(1), Some(Known { variant: 1, image: 0, block: 4 }));
        assert_eq!(groups.more(1), [Known { variant: 0, image: 1, block: 6 }]);
        assert_eq!(groups.first(2), None);
        assert_eq!(groups.first(3), None);
    }
}
