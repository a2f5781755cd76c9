//! How a migration is told of: while it goes on, and when it is over.

use super::Common;
use super::output::{Table, percent, print_json};
use crate::codec::hex;
use crate::error::Result;
use crate::migrate::frame::Source;
use crate::migrate::part::Part;
use crate::migrate::record::{Leaving, Recorder};
use crate::migrate::send::Moved;
use crate::migrate::wire::Digest;
use crate::migrate::work::Counts;
use crate::units::human_bytes;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

/// How often a line is printed when there is no terminal.
const LINE_PERIOD: Duration = Duration::from_secs(10);

/// Looks on: shows how far it is, and keeps the memory if that is wanted.
pub struct Watch {
    leaving: Option<Leaving>,
    bar: Option<ProgressBar>,
    last_line: Instant,
    /// Bytes of the VM's memory, when they are known.
    memory: u64,
}

impl Watch {
    /// Nothing has come yet.
    pub fn new(leaving: Option<Leaving>) -> Watch {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {bytes:>10}/{total_bytes:10}") {
                bar.set_style(style);
            }
            bar
        });
        Watch { leaving, bar, last_line: Instant::now(), memory: 0 }
    }

    /// It is over; what is to be kept.
    pub fn end(self) -> Option<Leaving> {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
        self.leaving
    }
}

impl Recorder for Watch {
    fn part(&mut self, part: &Part, pages: &[(Digest, Option<Source>)]) {
        self.memory = part.blocks.iter().filter_map(|block| block.len).fold(0, u64::saturating_add);
        if let Some(leaving) = &mut self.leaving {
            leaving.part(part, pages);
        }
    }

    fn told(&mut self, rounds: &[Counts], link_bytes: u64) {
        let Some(round) = rounds.last() else { return };
        // The first round is all of the memory; of the others nobody knows how much has changed.
        let done = round.pages() * crate::migrate::stream::PAGE_SIZE;
        let all = Counts::sum(rounds).stream_bytes;
        let said =
            format!("round {}: {} of the stream went as {}", rounds.len(), human_bytes(all), human_bytes(link_bytes));
        match &self.bar {
            Some(bar) => {
                bar.set_length(self.memory.max(done));
                bar.set_position(done);
                bar.set_message(said);
            }
            None if self.last_line.elapsed() >= LINE_PERIOD => {
                self.last_line = Instant::now();
                eprintln!("vmar: {said}");
            }
            None => {}
        }
    }
}

/// The kinds of pages, as tables and JSON name them.
fn kinds(c: &Counts) -> [(&'static str, u64); 6] {
    [
        ("zero", c.zero),
        ("kept", c.kept),
        ("base", c.base),
        ("template", c.template),
        ("intra", c.intra),
        ("literal", c.literal),
    ]
}

/// Tells what went: in all, and of each round.
pub fn tell(common: &Common, vm: &str, migration: &[u8; 16], moved: &Moved, time: Duration) -> Result<()> {
    let counts = &moved.counts;
    if common.json {
        let round = |c: &Counts| {
            let ratio = c.link_bytes as f64 / c.stream_bytes.max(1) as f64;
            let mut all = serde_json::to_value(c).unwrap_or_default();
            if let Some(fields) = all.as_object_mut() {
                fields.insert("ratio".into(), json!(ratio));
            }
            all
        };
        return print_json(&json!({"vm": vm, "migration": hex(migration), "confirmed": moved.confirmed,
            "seconds": time.as_secs_f64(), "pages": round(counts),
            "rounds": moved.rounds.iter().map(round).collect::<Vec<_>>()}));
    }
    let mut head = vec!["round"];
    head.extend(kinds(counts).map(|(name, _)| name));
    head.extend(["stream", "on the link", "ratio"]);
    let mut table = Table::new(&head, 1);
    let mut row = |name: String, c: &Counts| {
        let mut cells = vec![name];
        cells.extend(kinds(c).map(|(_, n)| n.to_string()));
        cells.extend([human_bytes(c.stream_bytes), human_bytes(c.link_bytes), percent(c.link_bytes, c.stream_bytes)]);
        table.row(cells);
    };
    for (n, round) in (1..).zip(&moved.rounds) {
        row(n.to_string(), round);
    }
    row("all".into(), counts);
    table.print();
    println!("VM {vm} has left: {:.1} s from QEMU's first byte", time.as_secs_f64());
    Ok(())
}
