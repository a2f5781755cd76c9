//! Tables for humans, JSON for scripts, and progress.

use crate::error::{Error, ErrorKind, Result};
use crate::indexer::Observer;
use crate::units::human_bytes;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How often a line of progress is printed when there is no terminal.
const LINE_PERIOD: Duration = Duration::from_secs(10);

/// Prints a value as JSON.
pub fn print_json(value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value).map_err(|e| Error::new(ErrorKind::Io, "JSON", e))?;
    println!("{text}");
    Ok(())
}

/// A table whose columns are as wide as they must be.
#[derive(Debug)]
pub struct Table {
    rows: Vec<Vec<String>>,
    text_columns: usize,
}

impl Table {
    /// The first `text_columns` columns are aligned left, the others (numbers) right.
    pub fn new(head: &[&str], text_columns: usize) -> Table {
        Table { rows: vec![head.iter().map(|s| s.to_string()).collect()], text_columns }
    }

    /// Appends a row.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The text, a line a row.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width_of =
            |c: usize| self.rows.iter().filter_map(|r| r.get(c)).map(|s| s.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width_of).collect();
        let mut out = String::new();
        for row in &self.rows {
            let cell = |(c, (text, &width)): (usize, (&String, &usize))| {
                if c < self.text_columns { format!("{text:<width$}") } else { format!("{text:>width$}") }
            };
            let cells: Vec<String> = row.iter().zip(&widths).enumerate().map(cell).collect();
            out.push_str(cells.join("  ").trim_end());
            out.push('\n');
        }
        out
    }

    /// Prints it.
    pub fn print(&self) {
        print!("{}", self.render());
    }
}

/// A share as a percentage.
pub fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_string() } else { format!("{:.1}%", 100.0 * part as f64 / whole as f64) }
}

/// Bytes in a time as MiB/s.
pub fn rate(bytes: u64, time: Duration) -> String {
    format!("{:.0} MiB/s", bytes as f64 / (1 << 20) as f64 / time.as_secs_f64().max(1e-6))
}

/// Progress on stderr: a bar with rate and time left on a terminal, a line now and then elsewhere.
#[derive(Debug, Default)]
pub struct Progress {
    part: Mutex<Option<Part>>,
}

#[derive(Debug)]
struct Part {
    what: String,
    total: u64,
    done: u64,
    began: Instant,
    last_line: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// Nothing is shown yet.
    pub fn new() -> Progress {
        Progress::default()
    }

    fn with_part(&self, then: impl FnOnce(&mut Option<Part>)) {
        // A worker that panicked is no reason to stop counting.
        then(&mut self.part.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // After an error the bar must not stay above its line.
        self.with_part(|part| {
            if let Some(bar) = part.take().and_then(|p| p.bar) {
                bar.finish_and_clear();
            }
        });
    }
}

impl Observer for Progress {
    fn begin(&self, what: &str, total: u64) {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(total).with_message(what.to_string());
            let template = "{msg:24!} {wide_bar} {bytes:>10}/{total_bytes:10} {bytes_per_sec:>12} {eta:>4} left";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style);
            }
            bar
        });
        let now = Instant::now();
        self.with_part(|part| {
            *part = Some(Part { what: what.to_string(), total, done: 0, began: now, last_line: now, bar });
        });
    }

    fn advance(&self, bytes: u64) {
        self.with_part(|part| {
            let Some(part) = part else { return };
            part.done += bytes;
            match &part.bar {
                Some(bar) => bar.set_position(part.done),
                None if part.last_line.elapsed() >= LINE_PERIOD => {
                    part.last_line = Instant::now();
                    eprintln!("{}", part.line());
                }
                None => {}
            }
        });
    }

    fn end(&self) {
        self.with_part(|part| {
            let Some(mut part) = part.take() else { return };
            // What was told in rounded steps is complete now.
            part.done = part.done.max(part.total);
            match part.bar {
                Some(bar) => bar.finish_and_clear(),
                None if part.total > 0 => eprintln!("{}", part.line()),
                None => {}
            }
        });
    }
}

impl Part {
    fn line(&self) -> String {
        let time = self.began.elapsed();
        let left = match self.done {
            done if done == 0 || done >= self.total => String::new(),
            done => {
                let seconds = time.as_secs_f64() / done as f64 * (self.total - done) as f64;
                format!(", {seconds:.0} s left")
            }
        };
        let (done, total) = (human_bytes(self.done), human_bytes(self.total));
        format!("{}: {done} of {total}, {}{left}", self.what, rate(self.done, time))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["name", "blocks"], 1);
        table.row(vec!["a".into(), "12345678".into()]);
        table.row(vec!["longer".into(), "1".into()]);
        assert_eq!(table.render(), "name      blocks\na       12345678\nlonger         1\n");
    }
}
