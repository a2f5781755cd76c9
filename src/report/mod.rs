//! Reports: one HTML page that needs no network, with plots, tables, and for each figure of the paper its value beside ours.
//!
//! ```text
//! library ──── similarity, maps ─┐
//! servers ──── host ─────────────┼─ sections ── page ── report.html    (and CSV and SVG files)
//! evaluation ─ points, claims ───┘     │
//!                         chart, bars, relations (SVG, by canvas)
//! ```
//!
//! - [`similarity`] and [`maps`] look at a library: figures 8 to 11 of the paper, who shares with whom, what each image costs,
//! - [`points`] reads what `qemu-scripts/evaluate.sh` measured (`docs/report.md`), [`claims`] judges it: figures 12 to 18,
//! - [`host`] tells what running servers say of themselves,
//! - the others draw and lay out: plain functions from values to text.

pub mod bars;
pub mod canvas;
pub mod chart;
pub mod claims;
pub mod host;
pub mod maps;
pub mod page;
pub mod points;
pub mod relations;
pub mod similarity;

use crate::error::Result;

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
    /// A plot; also as an SVG and a CSV file.
    Plot(Plot),
    /// A table; also as a CSV file.
    Table(Table),
    /// What is to be said and cannot be shown.
    Note(String),
}

/// A plot on the page.
#[derive(Clone, Debug)]
pub struct Plot {
    /// Name of its files, without their ending, and its anchor on the page.
    pub id: String,
    /// Which figure of the paper it is, what it shows.
    pub caption: String,
    /// What else is told of it, a line each: the paper's value, the target, ours.
    pub told: Vec<(String, String)>,
    /// What is drawn.
    pub picture: Picture,
    /// Its numbers, for the CSV file.
    pub data: Table,
}

impl Plot {
    /// A plot whose numbers are all in the picture.
    pub fn new(id: &str, caption: impl Into<String>, picture: Picture) -> Plot {
        let data = Table { id: id.to_string(), ..picture.table() };
        Plot { id: id.to_string(), caption: caption.into(), told: Vec::new(), picture, data }
    }

    /// Whether it needs more room than others.
    pub fn is_large(&self) -> bool {
        matches!(self.picture, Picture::Square(_) | Picture::Bands(_))
    }
}

/// What can be drawn.
#[derive(Clone, Debug, PartialEq)]
pub enum Picture {
    /// Numbers over numbers.
    Lines(chart::Chart),
    /// Numbers over words.
    Bars(bars::Bars),
    /// All with all.
    Square(relations::Square),
    /// Some with some.
    Bands(relations::Bands),
}

impl Picture {
    /// The picture as SVG, for a file or for the page.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn svg(&self) -> Result<String> {
        match self {
            Picture::Lines(chart) => chart.svg(),
            Picture::Bars(bars) => bars.svg(),
            Picture::Square(square) => square.svg(),
            Picture::Bands(bands) => bands.svg(),
        }
    }

    /// Its numbers.
    pub fn table(&self) -> Table {
        match self {
            Picture::Lines(chart) => chart.table(),
            Picture::Bars(bars) => bars.table(),
            Picture::Square(square) => square.table(),
            Picture::Bands(bands) => bands.table(),
        }
    }
}

/// A table.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Table {
    /// Name of the CSV file, without its ending, and its anchor on the page.
    pub id: String,
    /// What it says.
    pub caption: String,
    /// Names of the columns.
    pub head: Vec<String>,
    /// Its rows.
    pub rows: Vec<Vec<Cell>>,
    /// Rows that the page shows; the CSV file has all. 0: all.
    pub rows_max: usize,
}

/// A cell of a table.
#[derive(Clone, Debug, PartialEq)]
pub enum Cell {
    /// Words.
    Text(String),
    /// Words that say whether something is as it was to be.
    Verdict {
        /// The words.
        text: String,
        /// Whether it is; `None`: cannot be told.
        good: Option<bool>,
    },
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
        Cell::Number { text: text.into(), value, bar: (share > 0.0).then(|| share.clamp(0.0, 1.0)) }
    }

    /// A share, 0 to 1, as a percentage.
    pub fn share(share: f64) -> Cell {
        Cell::number(share, percent(share))
    }
}

/// A share, 0 to 1, for people.
pub fn percent(share: f64) -> String {
    format!("{:.1}%", 100.0 * share)
}

/// `part / whole`, 0 when there is nothing.
pub fn ratio(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}

impl Table {
    /// As comma-separated values (RFC 4180).
    pub fn csv(&self) -> String {
        let line = |cells: Vec<String>| cells.iter().map(|c| csv_cell(c)).collect::<Vec<_>>().join(",") + "\r\n";
        let mut out = line(self.head.clone());
        for row in &self.rows {
            let plain = |cell: &Cell| match cell {
                Cell::Text(text) | Cell::Verdict { text, .. } => text.clone(),
                Cell::Number { value, .. } => value.to_string(),
            };
            out.push_str(&line(row.iter().map(plain).collect()));
        }
        out
    }
}

/// A cell of a CSV file. What a spreadsheet would take for a formula gets an apostrophe: names come from elsewhere.
fn csv_cell(text: &str) -> String {
    let is_number = text.parse::<f64>().is_ok();
    let text = match text.starts_with(['=', '+', '-', '@', '\t']) && !is_number {
        true => format!("'{text}"),
        false => text.to_string(),
    };
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_with_commas_and_quotes_are_quoted() {
        let table = Table {
            head: vec!["name".into(), "a, b".into()],
            rows: vec![
                vec![Cell::text("say \"x\""), Cell::bar(1.5, "1.5 MiB", 2.0)],
                vec![Cell::text("=1+1"), Cell::number(-2.0, "-2")],
            ],
            ..Table::default()
        };
        assert_eq!(table.csv(), "name,\"a, b\"\r\n\"say \"\"x\"\"\",1.5\r\n'=1+1,-2\r\n");
    }
}
