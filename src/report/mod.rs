//! Reports: one HTML page that needs no network, with plots, tables, and for each figure of the paper its value beside ours.
//!
//! ```text
//! library ── similarity ─┐
//!                        ├─ sections ── page ── report.html     (and a CSV file for each figure)
//! points.jsonl ─ points ─┘     │
//!                            chart (SVG)
//! ```
//!
//! - [`similarity`] looks at a library: figures 8 to 11 of the paper, who shares with whom, what each image costs,
//! - [`points`] reads what `qemu-scripts/evaluate.sh` measured: figures 12 to 18,
//! - [`chart`] draws, [`page`] lays out; both are plain functions from values to text.

pub mod chart;
pub mod page;
pub mod points;
pub mod similarity;

use chart::Chart;

/// A part of the page.
#[derive(Clone, Debug, Default)]
pub struct Section {
    /// What it is about.
    pub title: String,
    /// A sentence or two below the title.
    pub text: String,
    /// What it shows.
    pub parts: Vec<Part>,
}

/// Something that a section shows.
#[derive(Clone, Debug)]
pub enum Part {
    /// A plot, with its figures as a CSV file of this name (without its ending).
    Plot {
        /// Name of the CSV file, and the anchor on the page.
        id: String,
        /// Which figure of the paper it is, what the axes are.
        caption: String,
        /// The plot.
        chart: Chart,
    },
    /// A table; also as a CSV file.
    Table(Table),
}

/// A table.
#[derive(Clone, Debug, Default)]
pub struct Table {
    /// Name of the CSV file.
    pub id: String,
    /// What it says.
    pub caption: String,
    /// Names of the columns.
    pub head: Vec<String>,
    /// Its rows.
    pub rows: Vec<Vec<Cell>>,
}

/// A cell of a table.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    /// Words.
    Text(String),
    /// A number as it is printed, the same for machines, and how much of the widest one in its column it is, 0 to 1, to
    /// draw a bar.
    Number {
        /// For people.
        text: String,
        /// For machines.
        value: f64,
        /// Length of the bar; `None` draws none.
        bar: Option<f64>,
    },
}

impl Cell {
    /// Words.
    pub fn text(text: impl Into<String>) -> Cell {
        Cell::Text(text.into())
    }

    /// A number without a bar.
    pub fn number(value: f64, text: impl Into<String>) -> Cell {
        Cell::Number { text: text.into(), value, bar: None }
    }

    /// A number with a bar of so much.
    pub fn bar(value: f64, text: impl Into<String>, share: f64) -> Cell {
        Cell::Number { text: text.into(), value, bar: Some(share.clamp(0.0, 1.0)) }
    }
}

impl Table {
    /// As comma-separated values (RFC 4180).
    pub fn csv(&self) -> String {
        let line = |cells: Vec<String>| cells.iter().map(|c| csv_cell(c)).collect::<Vec<_>>().join(",") + "\r\n";
        let mut out = line(self.head.clone());
        for row in &self.rows {
            let plain = |cell: &Cell| match cell {
                Cell::Text(text) => text.clone(),
                Cell::Number { value, .. } => value.to_string(),
            };
            out.push_str(&line(row.iter().map(plain).collect()));
        }
        out
    }
}

fn csv_cell(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_with_commas_and_quotes_are_quoted() {
        let table = Table {
            head: vec!["name".into(), "a, b".into()],
            rows: vec![vec![Cell::text("say \"x\""), Cell::bar(1.5, "1.5 MiB", 2.0)]],
            ..Table::default()
        };
        assert_eq!(table.csv(), "name,\"a, b\"\r\n\"say \"\"x\"\"\",1.5\r\n");
    }
}
