//! The content index: for every content of a sharing domain, the set of images that hold it.
//!
//! ```text
//! hash, variant ──► table ──► number of a set ──► sets ──► images, ascending
//!
//! tables   newest ┌────┐ ┌─────────┐ ┌──────────────────────┐ oldest      each at least four times
//!                 └────┘ └─────────┘ └──────────────────────┘             as large as the one before it
//! ```
//!
//! An image that is added writes one small [`table`] with the rows of its contents and never touches the large ones; a
//! lookup asks the tables from the newest to the oldest and believes the first that has the hash. Small tables are merged
//! when the next one is less than four times as large ([`to_merge`]), so a row is rewritten a few times in its life and a
//! library of 10^9 contents has some six tables.
//!
//! The sets are interned ([`sets`]): a row has a number, and images come and go in the table of the sets alone. An image
//! that is removed leaves the sets that it was in, and no row is rewritten for it; a set that loses its last image is
//! dead, and so are the rows with its number, which go at the next merge. Numbers are never given out again, nor are IDs
//! of images: what is dead stays dead.
//!
//! This is the paper's cluster structure (section 3.1): a cluster is a set with the contents that have its number.

pub mod sets;
pub mod table;

pub use sets::Sets;
pub use table::{Stamp, Table, TableWriter};

use crate::fingerprint::Hash;

/// A content: one hash can stand for several, which are its variants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    /// Hash of the block.
    pub hash: Hash,
    /// Which content of this hash; see [`crate::fingerprint::Row::variant`].
    pub variant: u16,
    /// Number of the set of images that hold it.
    pub set: u32,
}

/// How many of the newest tables become one with a new one of `rows` rows: as many as are too small to stay apart.
/// `sizes` are the rows of the tables, the newest first.
pub fn to_merge(rows: u64, sizes: &[u64]) -> usize {
    let mut sum = rows;
    let fits = |size: &&u64| {
        let merge = **size < sum.saturating_mul(4);
        sum = sum.saturating_add(**size);
        merge
    };
    sizes.iter().take_while(fits).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_stay_few_and_rows_are_seldom_rewritten() {
        let mut tables: Vec<u64> = Vec::new();
        let (mut written, adds) = (0u64, 10_000u64);
        for _ in 0..adds {
            let n = to_merge(1, &tables);
            let merged = 1 + tables.drain(..n).sum::<u64>();
            tables.insert(0, merged);
            written += merged;
            assert!(tables.windows(2).all(|w| w[1] >= 4 * w[0]), "{tables:?}");
        }
        assert_eq!(tables.iter().sum::<u64>(), adds);
        assert!(tables.len() <= 7, "{tables:?}");
        assert!(written < 25 * adds, "{written}");
        assert_eq!(to_merge(1, &[]), 0);
        assert_eq!(to_merge(10, &[100]), 0);
        assert_eq!(to_merge(10, &[30, 200]), 1);
        assert_eq!(to_merge(10, &[30, 150]), 2);
    }
}
