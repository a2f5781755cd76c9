//! `vmar stats --matrix`: what every two images have in common.

use super::Common;
use super::output::{Table, percent, print_json};
use crate::error::Result;
use crate::indexer::matrix::{Matrix, matrix};
use crate::library::Library;
use std::collections::HashMap;

/// Prints the matrix.
pub(super) fn run(common: &Common, library: &Library) -> Result<()> {
    let found = matrix(library)?;
    if common.json {
        return print_json(&found);
    }
    print(&found);
    Ok(())
}

fn print(found: &Matrix) {
    println!("blocks of each image (row) whose content another (column) holds, of its non-zero blocks:");
    let mut held: HashMap<(&str, &str), u64> = HashMap::new();
    for pair in &found.pairs {
        held.insert((&pair.a, &pair.b), pair.blocks_of_a);
        held.insert((&pair.b, &pair.a), pair.blocks_of_b);
    }
    let columns: Vec<String> = found.images.iter().map(|line| format!("({})", line.id)).collect();
    let head: Vec<&str> =
        ["id", "name", "non-zero", "unique"].into_iter().chain(columns.iter().map(String::as_str)).collect();
    let mut table = Table::new(&head, 2);
    for line in &found.images {
        let cell = |other: &crate::indexer::matrix::Line| match other.id == line.id {
            true => "-".to_string(),
            false => {
                percent(held.get(&(line.name.as_str(), other.name.as_str())).copied().unwrap_or(0), line.nonzero_blocks)
            }
        };
        let own = [
            format!("({})", line.id),
            line.name.clone(),
            line.nonzero_blocks.to_string(),
            line.unique_blocks.to_string(),
        ];
        table.row(own.into_iter().chain(found.images.iter().map(cell)).collect());
    }
    table.print();
}
