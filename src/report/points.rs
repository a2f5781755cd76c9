//! What an evaluation measured: a line of JSON for each run of each point, and what becomes of them, the mean and the standard
//! deviation of the runs.
//!
//! ```text
//! {"figure":"12a","x":4,"scheme":"vmar","value":21.5,"run":1}
//! ```
//!
//! `figures.json` beside it says what a figure is: its title, axes, unit, the paper's value and the target in words.

use super::chart::{Axis, Chart, Point, Series};
use super::{Cell, Part, Section, Table};
use crate::error::{Error, ErrorKind, Result};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

/// One run of one point.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Measured {
    /// Which figure it belongs to.
    pub figure: String,
    /// Where on the x axis.
    pub x: f64,
    /// Which line.
    pub scheme: String,
    /// How much.
    pub value: f64,
    /// Which of the repetitions.
    #[serde(default)]
    pub run: u32,
}

/// What a figure is.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Described {
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
    /// A value that no scheme can pass, and what it is.
    #[serde(default)]
    pub limit: Option<(f64, String)>,
}

/// A machine, its versions, the commands: what a reader needs to do it again.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Evaluation {
    /// Of the whole report.
    pub title: String,
    /// What was done, in a sentence or two.
    pub lead: String,
    /// Name and value, in order.
    pub facts: Vec<(String, String)>,
    /// The figures, in order.
    pub figures: Vec<Described>,
}

/// Reads `figures.json` and `points.jsonl` in `dir`.
///
/// # Errors
/// `NotFound`, and `Corrupt` naming the line.
pub fn read(dir: &Path) -> Result<(Evaluation, Vec<Measured>)> {
    let text = |name: &str| {
        let path = dir.join(name);
        let text = fs::read_to_string(&path)
            .map_err(|e| Error::io(&path, "read", e).mend("name the directory that qemu-scripts/evaluate.sh wrote"));
        text.map(|text| (path, text))
    };
    let corrupt = |path: &Path, cause: String| Error::file(ErrorKind::Corrupt, path, cause).mend("measure again");
    let (path, figures) = text("figures.json")?;
    let evaluation = serde_json::from_str(&figures).map_err(|e| corrupt(&path, e.to_string()))?;
    let (path, lines) = text("points.jsonl")?;
    let mut points = Vec::new();
    for (number, line) in (1..).zip(lines.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let point: Measured = serde_json::from_str(line).map_err(|e| corrupt(&path, format!("line {number}: {e}")))?;
        points.push(point);
    }
    Ok((evaluation, points))
}

/// The lines of a figure: the schemes in the order in which they appear.
pub fn series(figure: &str, points: &[Measured]) -> Vec<Series> {
    let mut names: Vec<&str> = Vec::new();
    let mut values: BTreeMap<(usize, u64), (f64, Vec<f64>)> = BTreeMap::new();
    for point in points.iter().filter(|p| p.figure == figure) {
        let scheme = names.iter().position(|name| *name == point.scheme).unwrap_or_else(|| {
            names.push(&point.scheme);
            names.len() - 1
        });
        // Ordered like the numbers, for those that are not negative.
        values.entry((scheme, point.x.max(0.0).to_bits())).or_insert((point.x, Vec::new())).1.push(point.value);
    }
    let mut out: Vec<Series> =
        names.iter().map(|name| Series { name: name.to_string(), points: Vec::new(), steps: false }).collect();
    for ((scheme, _), (x, values)) in values {
        let (y, deviation) = mean(&values);
        if let Some(series) = out.get_mut(scheme) {
            series.points.push(Point { x, y, deviation });
        }
    }
    out
}

/// Mean and standard deviation (of a sample).
fn mean(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count.max(1.0);
    let squares: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
    (mean, if values.len() > 1 { (squares / (count - 1.0)).sqrt() } else { 0.0 })
}

/// The sections: the figures, those of one section together.
pub fn sections(evaluation: &Evaluation, points: &[Measured]) -> Vec<Section> {
    let mut out: Vec<Section> = Vec::new();
    let facts = evaluation.facts.iter().map(|(name, value)| vec![Cell::text(name), Cell::text(value)]).collect();
    let head = ["", ""].map(String::from).to_vec();
    let machine = Table { id: "machine".into(), caption: "What it was measured on, and how.".into(), head, rows: facts };
    for figure in &evaluation.figures {
        let series = series(&figure.id, points);
        if series.is_empty() {
            continue;
        }
        let told = [("Paper: ", &figure.paper), ("Target: ", &figure.target)];
        let told: Vec<String> = told.iter().filter(|(_, t)| !t.is_empty()).map(|(a, b)| format!(" {a}{b}.")).collect();
        let caption = format!("{}{}", figure.caption, told.concat());
        let chart =
            Chart { x: Axis::linear(&figure.x), y: Axis::linear(&figure.y), series, limit: figure.limit.clone() };
        let part = Part::Plot { id: format!("figure-{}", figure.id), caption, chart };
        match out.iter_mut().find(|section| section.title == figure.section) {
            Some(section) => section.parts.push(part),
            None => out.push(Section { title: figure.section.clone(), text: String::new(), parts: vec![part] }),
        }
    }
    let title = "Machine, versions, commands".to_string();
    out.push(Section { title, text: String::new(), parts: vec![Part::Table(machine)] });
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(x: f64, scheme: &str, value: f64) -> Measured {
        Measured { figure: "12".into(), x, scheme: scheme.into(), value, run: 0 }
    }

    #[test]
    fn runs_become_a_mean_with_its_deviation() {
        let points = [at(8.0, "vmar", 3.0), at(1.0, "vmar", 9.0), at(8.0, "vmar", 5.0), at(8.0, "raw", 1.0)];
        let series = series("12", &points);
        assert_eq!(series.iter().map(|s| s.name.as_str()).collect::<Vec<_>>(), ["vmar", "raw"]);
        let root = 2f64.sqrt();
        let want = [Point { x: 1.0, y: 9.0, deviation: 0.0 }, Point { x: 8.0, y: 4.0, deviation: root }];
        assert_eq!(series[0].points, want);
        assert!(super::series("13", &points).is_empty());
    }

    #[test]
    fn what_is_wrong_is_named_by_its_line() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).unwrap_err().to_string().contains("evaluate.sh"));
        fs::write(dir.path().join("figures.json"), r#"{"title":"t","lead":"l","facts":[],"figures":[]}"#).unwrap();
        let good = r#"{"figure":"12","x":1,"scheme":"vmar","value":2,"run":1}"#;
        fs::write(dir.path().join("points.jsonl"), format!("{good}\n\n{good}\nhalf")).unwrap();
        assert!(read(dir.path()).unwrap_err().to_string().contains("line 4"), "{:?}", read(dir.path()));
        fs::write(dir.path().join("points.jsonl"), format!("{good}\n")).unwrap();
        assert_eq!(read(dir.path()).unwrap().1.len(), 1);
    }
}
