//! Medians, ratios, the table and the JSON.

use crate::scenario::Scenario;
use crate::subject::Turn;
use serde_json::{Value, json};

/// The turns of one subject in one scenario.
#[derive(Debug, Clone)]
pub struct Row {
    /// Name of the subject.
    pub name: String,
    /// One for each round.
    pub turns: Vec<Turn>,
}

/// A scenario with its rows.
#[derive(Debug)]
pub struct Measured {
    /// What was measured.
    pub scenario: Scenario,
    /// The subjects.
    pub rows: Vec<Row>,
}

/// Median, least and greatest of some figures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// The middle one, or the mean of the middle two.
    pub median: f64,
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

/// A figure of a turn.
type Figure = fn(&Scenario, &Turn) -> Option<f64>;

/// The figures and their names in the JSON.
const FIGURES: [(&str, Figure); 12] = [
    ("iops", iops),
    ("mb_per_s", mb_per_s),
    ("p50_us", p50),
    ("p99_us", p99),
    ("p999_us", p999),
    ("flush_p50_us", |_, t| (t.tally.flushes.len() > 0).then(|| t.tally.flushes.quantile_us(0.5))),
    ("flush_p99_us", |_, t| (t.tally.flushes.len() > 0).then(|| t.tally.flushes.quantile_us(0.99))),
    ("server_cpu_s_per_million", server_cpu),
    ("client_cpu_s_per_million", |_, t| Some(t.client_cpu * 1e6 / t.tally.requests_all as f64)),
    ("server_private_kib", |_, t| t.private_kib.map(|kib| kib as f64)),
    ("share_of_throttle", share_of_throttle),
    ("disk_reads_per_byte", disk_reads),
];

/// Requests a second.
pub fn iops(_: &Scenario, turn: &Turn) -> Option<f64> {
    Some(turn.tally.requests as f64 * 1e9 / turn.tally.ns as f64)
}

fn mb_per_s(scenario: &Scenario, turn: &Turn) -> Option<f64> {
    iops(scenario, turn).map(|n| n * scenario.block as f64 / 1e6)
}

/// What the client got, of what the disk may read.
fn share_of_throttle(scenario: &Scenario, turn: &Turn) -> Option<f64> {
    Some(mb_per_s(scenario, turn)? * 1e6 / scenario.throttle? as f64)
}

/// Bytes that the disk read for each byte that the client got: above 1, the server reads what nobody asked for (yet).
fn disk_reads(scenario: &Scenario, turn: &Turn) -> Option<f64> {
    let got = turn.tally.requests_all as f64 * scenario.block as f64;
    turn.disk_bytes.filter(|_| scenario.is_cold).map(|bytes| bytes as f64 / got)
}

fn p50(_: &Scenario, turn: &Turn) -> Option<f64> {
    Some(turn.tally.latencies.quantile_us(0.5))
}

/// The latency that 1 request in 100 exceeds.
pub fn p99(_: &Scenario, turn: &Turn) -> Option<f64> {
    Some(turn.tally.latencies.quantile_us(0.99))
}

fn p999(_: &Scenario, turn: &Turn) -> Option<f64> {
    Some(turn.tally.latencies.quantile_us(0.999))
}

/// CPU of the server for a million requests; none without a server.
pub fn server_cpu(_: &Scenario, turn: &Turn) -> Option<f64> {
    turn.server_cpu.map(|s| s * 1e6 / turn.tally.requests_all as f64)
}

/// CPU of server and client: what a request costs the host. None of a client that spins.
fn whole_cpu(scenario: &Scenario, turn: &Turn) -> Option<f64> {
    let both = turn.server_cpu.unwrap_or(0.0) + turn.client_cpu;
    (!scenario.is_polling).then(|| both * 1e6 / turn.tally.requests_all as f64)
}

/// Median and spread; nothing of no figures.
pub fn spread(figures: impl IntoIterator<Item = f64>) -> Option<Spread> {
    let mut sorted: Vec<f64> = figures.into_iter().collect();
    sorted.sort_by(f64::total_cmp);
    let (min, max) = (*sorted.first()?, *sorted.last()?);
    let median = f64::midpoint(sorted[(sorted.len() - 1) / 2], sorted[sorted.len() / 2]);
    Some(Spread { median, min, max })
}

impl Row {
    /// An empty row.
    pub fn new(name: String) -> Row {
        Row { name, turns: Vec::new() }
    }

    fn figure(&self, scenario: &Scenario, figure: Figure) -> Option<Spread> {
        spread(self.turns.iter().filter_map(|turn| figure(scenario, turn)))
    }
}

impl Measured {
    /// `a` divided by `b`, of each round; then the spread of these ratios. None if one of them has no such figure.
    pub fn ratio(&self, a: &str, b: &str, figure: Figure) -> Option<Spread> {
        let row = |name| self.rows.iter().find(|row| row.name == name);
        let pairs = row(a)?.turns.iter().zip(&row(b)?.turns);
        spread(pairs.filter_map(|(a, b)| Some(figure(&self.scenario, a)? / figure(&self.scenario, b)?)))
    }

    /// The table of this scenario, for people.
    pub fn table(&self) -> String {
        let mut out = format!("\n{}\n", self.scenario.name());
        out += "                            IOPS   min..max      p50      p99    p99.9   CPU s/M  with   private  \
                vmar ÷ this             vmar-flat ÷ this\n";
        out += "                                     (%)      µs       µs       µs    server  client     MiB  \
                IOPS    p99    CPU      IOPS    p99    CPU\n";
        for row in &self.rows {
            let figure = |f| row.figure(&self.scenario, f);
            let Some(iops) = figure(iops) else { continue };
            let off = |x: f64| (x / iops.median - 1.0) * 100.0;
            let cell = |value: Option<Spread>, scale: f64, digits: usize| {
                value.map_or("-".into(), |v| format!("{:.digits$}", v.median / scale))
            };
            out += &format!(
                "  {:<20}{:>10.0} {:>10} {:>8} {:>8} {:>8} {:>9} {:>7} {:>7}",
                row.name,
                iops.median,
                format!("{:+.0}..{:+.0}", off(iops.min), off(iops.max)),
                cell(figure(p50), 1.0, 1),
                cell(figure(p99), 1.0, 1),
                cell(figure(p999), 1.0, 1),
                cell(figure(server_cpu), 1.0, 2),
                cell(figure(whole_cpu), 1.0, 2),
                cell(figure(|_, t| t.private_kib.map(|kib| kib as f64)), 1024.0, 1),
            );
            for first in ["vmar", "vmar-flat"] {
                out += "  ";
                for f in [iops_figure(), p99 as Figure, server_cpu as Figure] {
                    let ratio = if row.name == first { None } else { self.ratio(first, &row.name, f) };
                    out += &format!(" {:>6}", cell(ratio, 1.0, 2));
                }
            }
            out += "\n";
        }
        if self.scenario.flush_every > 0 {
            for row in &self.rows {
                if let Some(p50) = row.figure(&self.scenario, FIGURES[5].1) {
                    out += &format!("  {:<20} a flush takes {:.0} µs\n", row.name, p50.median);
                }
            }
        }
        for row in self.rows.iter().filter(|_| self.scenario.throttle.is_some()) {
            let figure = |f| row.figure(&self.scenario, f);
            if let (Some(speed), Some(share)) = (figure(mb_per_s), figure(share_of_throttle)) {
                let (name, Spread { median, min, max }) = (&row.name, share);
                out += &format!(
                    "  {name:<20}{:>6.1} MB/s = {median:.3} ({min:.3}..{max:.3}) of the throttle",
                    speed.median
                );
                out += &figure(disk_reads).map_or("\n".into(), |n| format!("; the disk read {:.2} × that\n", n.median));
            }
        }
        out
    }

    fn json(&self) -> Value {
        let s = &self.scenario;
        let subjects: Vec<Value> = self
            .rows
            .iter()
            .map(|row| {
                let rounds = row.turns.iter().map(|t| figures(|f| f(s, t).map(Value::from)));
                let of = |first: &str| {
                    figures(
                        |f| if row.name == first { None } else { self.ratio(first, &row.name, f).map(Spread::json) },
                    )
                };
                json!({
                    "name": row.name,
                    "median": figures(|f| row.figure(s, f).map(Spread::json)),
                    "vmar_divided_by_this": of("vmar"),
                    "vmar_flat_divided_by_this": of("vmar-flat"),
                    "rounds": rounds.collect::<Vec<_>>(),
                })
            })
            .collect();
        json!({
            "name": s.name(),
            "block_bytes": s.block,
            "depth": s.depth,
            "queues": s.queues,
            "client": if s.is_polling { "polling" } else { "sleeping" },
            "cold": s.is_cold,
            "throttle_bytes_per_s": s.throttle,
            "flush_every": s.flush_every,
            "subjects": subjects,
        })
    }
}

fn iops_figure() -> Figure {
    iops
}

fn figures(value: impl Fn(Figure) -> Option<Value>) -> Value {
    FIGURES.iter().filter_map(|(name, figure)| Some((name.to_string(), value(*figure)?))).collect()
}

impl Spread {
    fn json(self) -> Value {
        json!({"median": self.median, "min": self.min, "max": self.max})
    }
}

/// The whole report. `about` says how and where it was measured.
pub fn json(about: &Value, measured: &[Measured]) -> Value {
    json!({"format": "vmar-peer-1", "about": about, "scenarios": measured.iter().map(Measured::json).collect::<Vec<_>>()})
}
