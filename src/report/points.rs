//! What an evaluation measured: a line of JSON for each run of each point, and what becomes of them, the mean and the standard
//! deviation of the runs. `docs/report.md` has the format.

use super::bars::{Bars, Group};
use super::canvas::number;
use super::chart::{Axis, Chart, Look, Point, Series};
use super::claims::{self, Claim, Judged};
use super::{Cell, Part, Picture, Plot, Section, Table};
use crate::error::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;

/// The scheme that no other one can pass.
pub const LIMIT: &str = "limit";
/// What describes the evaluation.
const FIGURES: &str = "figures.json";
/// What it measured.
const POINTS: &str = "points.jsonl";
/// Longest name of a figure or table: a file is named after it.
const ID_MAX: usize = 64;

/// Where on the x axis.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "x is neither a number nor a word")]
pub enum X {
    /// There.
    Number(f64),
    /// At that word.
    Word(String),
}

impl fmt::Display for X {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            X::Number(x) => f.write_str(&number(*x)),
            X::Word(word) => f.write_str(word),
        }
    }
}

/// One run of one point.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Which figure it belongs to.
    pub figure: String,
    /// Where on the x axis.
    pub x: X,
    /// Which line.
    pub scheme: String,
    /// How much.
    pub value: f64,
    /// Which of the repetitions.
    #[serde(default)]
    pub run: u32,
}

/// How a figure is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Lines with error bars; x are numbers.
    Line,
    /// A group of bars for each x.
    Bars,
    /// Steps; x are numbers, values percentages.
    Cdf,
}

/// What a figure is.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Figure {
    /// Its name in the points.
    pub id: String,
    /// The section that it is in.
    pub section: String,
    /// Below the plot.
    pub caption: String,
    /// The x axis, with its unit.
    pub x: String,
    /// The y axis, with its unit.
    pub y: String,
    /// The paper's value, in words.
    #[serde(default)]
    pub paper: String,
    /// What was to be reached, in words.
    #[serde(default)]
    pub target: String,
    /// Powers of two are equally far apart on the x axis.
    #[serde(default)]
    pub log_x: bool,
    /// How it is drawn; otherwise as the x of its points demand.
    #[serde(default)]
    pub kind: Option<Kind>,
}

/// A table, as it is.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tabled {
    /// Its name.
    pub id: String,
    /// The section that it is in.
    pub section: String,
    /// Above the table.
    pub caption: String,
    /// Names of the columns.
    pub head: Vec<String>,
    /// The rows, as wide as the head.
    pub rows: Vec<Vec<Value>>,
}

/// A cell of a [`Tabled`].
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(untagged, expecting = "a cell is neither a number nor a word nor null")]
pub enum Value {
    /// A number.
    Number(f64),
    /// Words.
    Word(String),
    /// Was not measured.
    Nothing(()),
}

/// What an evaluation says of itself: a machine, its versions, the commands, the figures.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Description {
    /// Of the whole report.
    pub title: String,
    /// What was done, in a sentence or two.
    pub lead: String,
    /// Name and value, in order.
    pub facts: Vec<(String, String)>,
    /// The figures, in order.
    pub figures: Vec<Figure>,
    /// What is claimed of them.
    #[serde(default)]
    pub claims: Vec<Claim>,
    /// Tables.
    #[serde(default)]
    pub tables: Vec<Tabled>,
}

/// An evaluation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluation {
    /// What it says of itself.
    pub says: Description,
    /// What it measured.
    pub points: Vec<Measured>,
}

/// Mean, sample standard deviation and number of the runs of a point.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Mean {
    /// Mean.
    pub mean: f64,
    /// Sample standard deviation; 0 for a single run.
    pub deviation: f64,
    /// Runs.
    pub runs: usize,
}

impl Mean {
    /// Of these values; `None` if there are none.
    pub fn of(values: &[f64]) -> Option<Mean> {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        let deviation = if values.len() > 1 { (squares / (count - 1.0)).sqrt() } else { 0.0 };
        (!values.is_empty()).then_some(Mean { mean, deviation, runs: values.len() })
    }
}

impl Evaluation {
    /// Reads what is in `dir`.
    ///
    /// # Errors
    /// `NotFound`; `Corrupt` naming the file, the line or the field.
    pub fn read(dir: &Path) -> Result<Evaluation> {
        let (path, text) = read_text(dir, FIGURES)?;
        let says: Description = serde_json::from_str(&text).map_err(|e| corrupt(&path, e))?;
        says.check().map_err(|why| corrupt(&path, why))?;
        let (path, text) = read_text(dir, POINTS)?;
        let mut points = Vec::new();
        for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
            let failed = |why: String| corrupt(&path, format!("line {number}: {why}"));
            // Its own line number would be 1 for each.
            let parsed = serde_json::from_str(line);
            let point: Measured =
                parsed.map_err(|e| failed(e.to_string().replace(" at line 1 column", " at column")))?;
            says.check_point(&point).map_err(failed)?;
            points.push(point);
        }
        Ok(Evaluation { says, points })
    }

    /// The mean of what was measured at one point.
    pub fn mean(&self, figure: &str, scheme: &str, x: &X) -> Option<Mean> {
        let is_there = |p: &&Measured| p.figure == figure && p.scheme == scheme && p.x == *x;
        Mean::of(&self.points.iter().filter(is_there).map(|p| p.value).collect::<Vec<f64>>())
    }

    /// What has become of the claims.
    pub fn judged(&self) -> Vec<Judged> {
        self.says.claims.iter().map(|claim| claim.judge(self)).collect()
    }

    /// The figures that have points.
    pub fn drawn(&self) -> Vec<&str> {
        let has_points = |f: &&Figure| self.points.iter().any(|p| p.figure == f.id);
        self.says.figures.iter().filter(has_points).map(|f| f.id.as_str()).collect()
    }

    /// The sections: the claims, the figures and tables, those of one section together, and the machine.
    pub fn sections(&self) -> Vec<Section> {
        let judged = self.judged();
        let mut out = Vec::new();
        if !judged.is_empty() {
            out.push(claims::section(&judged));
        }
        let first = out.len();
        let mut missing: Vec<(&str, &str)> = Vec::new();
        for figure in &self.says.figures {
            let into = section_of(&mut out, first, &figure.section);
            match self.plot(figure, &judged) {
                Some(plot) => into.parts.push(Part::Plot(plot)),
                None => missing.push((&figure.section, &figure.id)),
            }
        }
        for table in &self.says.tables {
            section_of(&mut out, first, &table.section).parts.push(Part::Table(table.table()));
        }
        for section in &mut out {
            let ids: Vec<&str> =
                missing.iter().filter(|(title, _)| *title == section.title).map(|(_, id)| *id).collect();
            if !ids.is_empty() {
                section.parts.push(Part::Note(format!("Not measured: figure {}.", ids.join(", "))));
            }
        }
        if !self.says.facts.is_empty() {
            out.push(machine(&self.says.facts));
        }
        out
    }

    /// The schemes of all figures in the order in which they appear: each has its colour.
    fn schemes(&self) -> Vec<&str> {
        let mut out: Vec<&str> = Vec::new();
        for point in self.points.iter().filter(|p| p.scheme != LIMIT) {
            if !out.contains(&point.scheme.as_str()) {
                out.push(&point.scheme);
            }
        }
        out
    }

    /// `None` for a figure without points.
    fn plot(&self, figure: &Figure, judged: &[Judged]) -> Option<Plot> {
        let points: Vec<&Measured> = self.points.iter().filter(|p| p.figure == figure.id).collect();
        if points.is_empty() {
            return None;
        }
        let colors = self.schemes();
        let has_words = points.iter().any(|p| matches!(p.x, X::Word(_)));
        let picture = match figure.kind {
            Some(Kind::Bars) => Picture::Bars(bars(figure, &points, &colors)),
            _ if has_words => Picture::Bars(bars(figure, &points, &colors)),
            kind => Picture::Lines(chart(figure, &points, &colors, kind == Some(Kind::Cdf))),
        };
        let mut told = Vec::new();
        for (name, text) in [("Paper", &figure.paper), ("Target", &figure.target)] {
            if !text.is_empty() {
                told.push((name.to_string(), text.clone()));
            }
        }
        told.extend(judged.iter().filter(|j| j.figure == figure.id).map(|j| ("Ours".to_string(), j.sentence())));
        let caption = format!("Figure {}: {}", figure.id, figure.caption);
        let id = format!("figure-{}", figure.id);
        Some(Plot { data: data(&id, figure, &points), id, caption, told, picture })
    }
}

fn read_text(dir: &Path, name: &str) -> Result<(std::path::PathBuf, String)> {
    let path = dir.join(name);
    let failed = |e| Error::io(&path, "read", e).mend("name the directory that qemu-scripts/evaluate.sh wrote");
    fs::read_to_string(&path).map_err(failed).map(|text| (path, text))
}

fn corrupt(path: &Path, why: impl fmt::Display) -> Error {
    Error::file(ErrorKind::Corrupt, path, why).mend("put it right (docs/report.md has the format) or measure again")
}

impl Description {
    /// What the types do not say.
    fn check(&self) -> std::result::Result<(), String> {
        let mut seen = BTreeSet::new();
        let figures = self.figures.iter().map(|f| ("figure", &f.id));
        for (what, id) in figures.chain(self.tables.iter().map(|t| ("table", &t.id))) {
            let is_plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            if id.is_empty() || id.len() > ID_MAX || id.starts_with('.') || !id.chars().all(is_plain) {
                return Err(format!(
                    "{what} {id:?}: an id has letters, digits, '-', '_' and '.' only, a file is named by it"
                ));
            }
            if !seen.insert((what, id)) {
                return Err(format!("{what} {id:?} is there twice"));
            }
        }
        for table in &self.tables {
            if let Some(row) = table.rows.iter().position(|row| row.len() != table.head.len()) {
                let (cells, columns) = (table.rows.get(row).map_or(0, Vec::len), table.head.len());
                return Err(format!("table {:?}: row {} has {cells} cells, its head {columns}", table.id, row + 1));
            }
        }
        self.claims.iter().try_for_each(Claim::check)
    }

    fn check_point(&self, point: &Measured) -> std::result::Result<(), String> {
        let figure = self.figures.iter().find(|f| f.id == point.figure);
        let Some(figure) = figure else {
            let is_claimed = self.claims.iter().any(|c| c.figure == point.figure);
            let known = || Err(format!("figure {:?} is not in {FIGURES}", point.figure));
            return if is_claimed { Ok(()) } else { known() };
        };
        match (&point.x, figure.kind) {
            (X::Word(word), Some(Kind::Line | Kind::Cdf)) => {
                Err(format!("x of figure {:?} is to be a number, not {word:?}", point.figure))
            }
            (X::Number(x), None | Some(Kind::Line | Kind::Cdf)) if figure.log_x && *x <= 0.0 => {
                Err(format!("x of figure {:?} has a logarithmic axis and is to be above 0, not {x}", point.figure))
            }
            (_, Some(Kind::Cdf)) if !(0.0..=100.0).contains(&point.value) => {
                Err(format!("figure {:?} is a distribution: a value is 0 to 100, not {}", point.figure, point.value))
            }
            _ => Ok(()),
        }
    }
}

impl Tabled {
    fn table(&self) -> Table {
        let cell = |value: &Value| match value {
            Value::Number(v) => Cell::number(*v, as_given(*v)),
            Value::Word(word) => Cell::text(word),
            Value::Nothing(()) => Cell::text("–"),
        };
        Table {
            id: format!("table-{}", self.id),
            caption: self.caption.clone(),
            head: self.head.clone(),
            rows: self.rows.iter().map(|row| row.iter().map(cell).collect()).collect(),
            rows_max: 0,
        }
    }
}

/// A number of a table, with at most three digits behind the point.
fn as_given(value: f64) -> String {
    let rounded = (value * 1000.0).round() / 1000.0;
    if rounded == 0.0 { value.to_string() } else { rounded.to_string() }
}

fn section_of<'s>(sections: &'s mut Vec<Section>, first: usize, title: &str) -> &'s mut Section {
    let at = sections.iter().skip(first).position(|s| s.title == title).map_or(sections.len(), |i| first + i);
    if at == sections.len() {
        sections.push(Section { title: title.to_string(), ..Section::default() });
    }
    &mut sections[at]
}

fn machine(facts: &[(String, String)]) -> Section {
    let rows = facts.iter().map(|(name, value)| vec![Cell::text(name), Cell::text(value)]).collect();
    let head = vec![String::new(); 2];
    let caption = "What it was measured on, and how.".to_string();
    let table = Table { id: "machine".into(), caption, head, rows, rows_max: 0 };
    Section { title: "Machine, versions, commands".into(), text: String::new(), parts: vec![Part::Table(table)] }
}

/// The points as they were measured, a row a run.
fn data(id: &str, figure: &Figure, points: &[&Measured]) -> Table {
    let row = |p: &&Measured| {
        let x = match &p.x {
            X::Number(x) => Cell::number(*x, number(*x)),
            X::Word(word) => Cell::text(word),
        };
        vec![
            Cell::text(&p.scheme),
            x,
            Cell::number(p.value, number(p.value)),
            Cell::number(f64::from(p.run), p.run.to_string()),
        ]
    };
    let head = ["scheme", &figure.x, &figure.y, "run"].map(String::from).to_vec();
    Table { id: id.to_string(), head, rows: points.iter().map(row).collect(), ..Table::default() }
}

/// The schemes of these points in the order in which they appear, the limit last.
fn schemes_of<'p>(points: &[&'p Measured]) -> Vec<&'p str> {
    let mut out: Vec<&str> = Vec::new();
    for point in points {
        if !out.contains(&point.scheme.as_str()) {
            out.push(&point.scheme);
        }
    }
    out.sort_by_key(|name| *name == LIMIT);
    out
}

fn color_of(scheme: &str, colors: &[&str]) -> usize {
    colors.iter().position(|name| *name == scheme).unwrap_or(0)
}

fn mean_at(points: &[&Measured], scheme: &str, is_there: impl Fn(&X) -> bool) -> Option<Mean> {
    let values: Vec<f64> = points.iter().filter(|p| p.scheme == scheme && is_there(&p.x)).map(|p| p.value).collect();
    Mean::of(&values)
}

fn chart(figure: &Figure, points: &[&Measured], colors: &[&str], is_cdf: bool) -> Chart {
    let of = |name: &str| {
        let mut places: Vec<f64> = Vec::new();
        for point in points.iter().filter(|p| p.scheme == name) {
            if let X::Number(x) = point.x {
                places.push(x);
            }
        }
        places.sort_by(f64::total_cmp);
        places.dedup();
        let point = |x: f64| {
            let mean = mean_at(points, name, |other| *other == X::Number(x))?;
            Some(Point { x, y: mean.mean, deviation: mean.deviation })
        };
        let look = match name {
            LIMIT => Look::Limit,
            _ if is_cdf => Look::Steps,
            _ => Look::Line,
        };
        let points = places.into_iter().filter_map(point).collect();
        Series { name: name.to_string(), color: color_of(name, colors), look, points }
    };
    let x = Axis { label: figure.x.clone(), log: figure.log_x };
    Chart { x, y: figure.y.clone(), series: schemes_of(points).into_iter().map(of).collect() }
}

fn bars(figure: &Figure, points: &[&Measured], colors: &[&str]) -> Bars {
    let mut words: Vec<String> = Vec::new();
    for point in points {
        let word = point.x.to_string();
        if !words.contains(&word) {
            words.push(word);
        }
    }
    let of = |name: &str| {
        let value = |word: &String| {
            let mean = mean_at(points, name, |x| x.to_string() == *word)?;
            Some(Point { x: 0.0, y: mean.mean, deviation: mean.deviation })
        };
        let values = words.iter().map(value).collect();
        Group { name: name.to_string(), color: color_of(name, colors), is_limit: name == LIMIT, values }
    };
    let series = schemes_of(points).into_iter().map(of).collect();
    Bars { x: figure.x.clone(), y: figure.y.clone(), words: words.clone(), series }
}

#[cfg(test)]
mod tests;
