//! Plots of numbers over numbers: lines with error bars, steps of distributions, and a limit that is dashed.

use super::canvas::{Canvas, Drawn, GREY, GRID, LINE, Scale, Side, TEXT, WIDTH, color, number, svg, width_of, wrap};
use super::{Cell, Table};
use crate::error::Result;
use plotters::style::{BLACK, RGBColor};

/// Height of the field that lines are in.
const FIELD: f64 = 400.0;
/// Around everything.
const MARGIN: f64 = 14.0;
/// Between ticks and their labels.
const GAP: f64 = 10.0;
/// Least room between two labels of the x axis.
const BETWEEN: f64 = 18.0;
/// Ticks of an axis, about.
const TICKS: f64 = 6.0;

/// A plot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chart {
    /// What goes to the right.
    pub x: Axis,
    /// What goes up, and its unit; from 0.
    pub y: String,
    /// The lines.
    pub series: Vec<Series>,
}

/// The axis that goes to the right.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Axis {
    /// What, and its unit.
    pub label: String,
    /// Powers of two are equally far apart. Values are above 0 then.
    pub log: bool,
}

/// How a line is drawn.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Look {
    /// From point to point, with markers and error bars.
    #[default]
    Line,
    /// From each point on it stays level up to the next one: a distribution function. Up to 100.
    Steps,
    /// Dashed and black: what no scheme can pass.
    Limit,
}

/// A line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Number of its colour: the same scheme has the same one in all plots of a page.
    pub color: usize,
    /// How it is drawn.
    pub look: Look,
    /// Its points, in order of x.
    pub points: Vec<Point>,
}

/// A point.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Point {
    /// To the right.
    pub x: f64,
    /// Up: a mean.
    pub y: f64,
    /// Standard deviation of what it is the mean of; 0 draws no bar.
    pub deviation: f64,
}

/// An entry of a legend.
#[derive(Clone, Copy, Debug)]
pub struct Entry<'a> {
    /// The scheme.
    pub name: &'a str,
    /// Number of its colour.
    pub color: usize,
    /// How it is drawn; `None` for bars.
    pub look: Option<Look>,
}

impl Entry<'_> {
    fn of_series(series: &Series) -> Entry<'_> {
        Entry { name: &series.name, color: series.color, look: Some(series.look) }
    }
}

/// Where the parts of a plot are.
struct Frame {
    x: Scale,
    y: Scale,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    /// Below the name of the x axis.
    under: f64,
    labels: Vec<(f64, String)>,
    above: Vec<String>,
    below: Vec<String>,
}

impl Frame {
    fn place(&self, x: f64, y: f64) -> (f64, f64) {
        (self.x.place(x, self.left, self.right), self.y.place(y, self.bottom, self.top))
    }
}

impl Chart {
    /// Its points, a row each.
    pub fn table(&self) -> Table {
        let rows = self.series.iter().flat_map(|series| {
            series.points.iter().map(|p| {
                let numbers = [p.x, p.y, p.deviation].map(|v| Cell::number(v, number(v)));
                [Cell::text(&series.name)].into_iter().chain(numbers).collect()
            })
        });
        let head = ["series", &self.x.label, &self.y, "standard deviation"].map(String::from).to_vec();
        Table { head, rows: rows.collect(), ..Table::default() }
    }

    /// Draws it.
    ///
    /// # Errors
    /// When the picture cannot be made.
    pub fn svg(&self) -> Result<String> {
        let legend: Vec<Entry<'_>> = self.series.iter().map(Entry::of_series).collect();
        let frame = self.frame();
        svg(WIDTH, frame.under + legend_height(&legend) + MARGIN, |canvas| {
            self.draw_axes(canvas, &frame)?;
            for series in &self.series {
                draw_series(canvas, series, &frame)?;
            }
            draw_legend(canvas, frame.under, &legend)
        })
    }

    fn frame(&self) -> Frame {
        let (x, y) = self.scales();
        let labels = y.ticks(TICKS);
        let left = MARGIN + GAP + labels.iter().map(|(_, label)| width_of(label, TEXT)).fold(0.0, f64::max);
        let above = wrap(&self.y, WIDTH - 2.0 * MARGIN, TEXT, 2);
        let below = wrap(&self.x.label, WIDTH - left - MARGIN, TEXT, 2);
        let top = MARGIN + above.len() as f64 * LINE + 28.0;
        let bottom = top + FIELD;
        let under = bottom + GAP + LINE + below.len() as f64 * LINE;
        Frame { x, y, left, right: WIDTH - 2.0 * MARGIN, top, bottom, under, labels, above, below }
    }

    fn draw_axes(&self, canvas: &Canvas<'_>, f: &Frame) -> Drawn {
        for (i, line) in f.above.iter().enumerate() {
            canvas.text((MARGIN, MARGIN + (i as f64 + 0.5) * LINE), line, Side::Right, TEXT, BLACK)?;
        }
        for (value, label) in &f.labels {
            let at = f.y.place(*value, f.bottom, f.top);
            canvas.line(&[(f.left, at), (f.right, at)], if *value == 0.0 { GREY } else { GRID }, 2)?;
            canvas.text((f.left - GAP, at), label, Side::Left, TEXT, GREY)?;
        }
        for (value, label) in self.x_ticks(f.x, f.left, f.right) {
            let at = f.x.place(value, f.left, f.right);
            canvas.line(&[(at, f.bottom), (at, f.bottom + 8.0)], GREY, 2)?;
            canvas.text((at, f.bottom + GAP + LINE / 2.0), &label, Side::Both, TEXT, GREY)?;
        }
        for (i, line) in f.below.iter().enumerate() {
            let at = ((f.left + f.right) / 2.0, f.bottom + GAP + (i as f64 + 1.5) * LINE);
            canvas.text(at, line, Side::Both, TEXT, BLACK)?;
        }
        Ok(())
    }

    fn scales(&self) -> (Scale, Scale) {
        let points = || self.series.iter().flat_map(|s| &s.points);
        let low = points().map(|p| p.x).fold(f64::INFINITY, f64::min);
        let high = points().map(|p| p.x).fold(f64::NEG_INFINITY, f64::max);
        let is_steps = self.series.iter().any(|s| s.look == Look::Steps);
        let x = match (self.x.log, high > low) {
            (true, true) if is_steps => Scale { from: low, to: high, log: true },
            (true, true) => {
                // A little room beside the first and the last point.
                let room = (high / low).powf(0.04);
                Scale { from: low / room, to: high * room, log: true }
            }
            (false, true) => {
                let room = if is_steps { 0.0 } else { 0.04 * (high - low) };
                Scale { from: low - room, to: high + room, log: false }
            }
            // One point, or none.
            (log, false) if low.is_finite() => {
                let room = (low.abs() / 2.0).max(0.5);
                Scale { from: if log { low / 2.0 } else { low - room }, to: low + room, log }
            }
            (log, false) => Scale { from: 1.0, to: 2.0, log },
        };
        let y = match is_steps {
            true => Scale { from: 0.0, to: 100.0, log: false },
            false => Scale::from_zero(points().flat_map(|p| [p.y + p.deviation, p.y.min(0.0)])),
        };
        (x, y)
    }

    /// Where something was measured, if there is room for that, and round numbers otherwise.
    fn x_ticks(&self, scale: Scale, left: f64, right: f64) -> Vec<(f64, String)> {
        let points = self.series.iter().filter(|s| s.look == Look::Line).flat_map(|s| &s.points);
        let mut measured: Vec<f64> = points.map(|p| p.x).collect();
        measured.sort_by(f64::total_cmp);
        measured.dedup();
        let measured: Vec<(f64, String)> = measured.into_iter().map(|x| (x, number(x))).collect();
        let mut tries = vec![measured];
        tries.extend([8.0, 6.0, 4.0, 3.0, 2.0].map(|count| scale.ticks(count)));
        let has_room = |ticks: &Vec<(f64, String)>| {
            let span = |(x, label): &(f64, String)| {
                let (middle, half) = (scale.place(*x, left, right), width_of(label, TEXT) / 2.0);
                (middle - half, middle + half)
            };
            let spans: Vec<(f64, f64)> = ticks.iter().map(span).collect();
            let inside = spans.iter().all(|s| s.1 <= WIDTH);
            !ticks.is_empty() && inside && spans.iter().zip(spans.iter().skip(1)).all(|(a, b)| a.1 + BETWEEN <= b.0)
        };
        tries.into_iter().find(has_room).unwrap_or_default()
    }
}

fn draw_series(canvas: &Canvas<'_>, series: &Series, frame: &Frame) -> Drawn {
    let places: Vec<(f64, f64)> = series.points.iter().map(|p| frame.place(p.x, p.y)).collect();
    let paint = color(series.color);
    match series.look {
        Look::Steps => {
            let mut path = steps(&places, frame.bottom);
            path.extend(path.last().map(|&(_, y)| (frame.right, y)));
            canvas.line(&path, paint, 4)
        }
        Look::Limit => match places.as_slice() {
            // Of one point there is a level, not a line.
            [(_, y)] => canvas.dashed(&[(frame.left, *y), (frame.right, *y)], BLACK, 3),
            _ => canvas.dashed(&places, BLACK, 3),
        },
        Look::Line => {
            canvas.line(&places, paint, 4)?;
            for (point, at) in series.points.iter().zip(&places) {
                if point.deviation > 0.0 {
                    let end = |y: f64| (at.0, frame.place(point.x, y.max(point.y.min(0.0))).1);
                    canvas.error_bar(end(point.y - point.deviation), end(point.y + point.deviation), paint)?;
                }
                canvas.marker(*at, series.color, paint)?;
            }
            Ok(())
        }
    }
}

/// The corners of a line that stays level from each place to the next.
fn steps(places: &[(f64, f64)], floor: f64) -> Vec<(f64, f64)> {
    let mut out = Vec::with_capacity(2 * places.len());
    let mut level = floor;
    for &(x, y) in places {
        out.extend([(x, level), (x, y)]);
        level = y;
    }
    out
}

/// The share of values that are at most so large, as a line of steps; each value counts as often as its weight says.
pub fn distribution(name: &str, color: usize, values: impl IntoIterator<Item = (f64, u64)>) -> Series {
    let mut values: Vec<(f64, u64)> = values.into_iter().filter(|(_, weight)| *weight > 0).collect();
    values.sort_by(|a, b| a.0.total_cmp(&b.0));
    let total: u64 = values.iter().map(|(_, weight)| weight).sum();
    let mut points: Vec<Point> = Vec::new();
    let mut sum = 0;
    for (x, weight) in values {
        sum += weight;
        let y = 100.0 * sum as f64 / total as f64;
        match points.last_mut() {
            Some(last) if last.x == x => last.y = y,
            _ => points.push(Point { x, y, deviation: 0.0 }),
        }
    }
    Series { name: name.to_string(), color, look: Look::Steps, points }
}

/// Width of the sample of a line before its name.
const SAMPLE: f64 = 56.0;
/// Between two names.
const APART: f64 = 36.0;
/// Lines that a name may take.
const NAME_LINES: usize = 3;

/// An entry in its place.
struct Placed<'e> {
    entry: &'e Entry<'e>,
    x: f64,
    lines: Vec<String>,
}

/// The rows of a legend, as many entries in each as there is room for.
fn legend_rows<'e>(entries: &'e [Entry<'e>]) -> Vec<Vec<Placed<'e>>> {
    let mut rows: Vec<Vec<Placed<'_>>> = Vec::new();
    let mut x = WIDTH;
    for entry in entries {
        let lines = wrap(entry.name, WIDTH - 2.0 * MARGIN - SAMPLE, TEXT, NAME_LINES);
        let width = SAMPLE + lines.iter().map(|line| width_of(line, TEXT)).fold(0.0, f64::max);
        if x + width > WIDTH - MARGIN {
            rows.push(Vec::new());
            x = MARGIN;
        }
        if let Some(row) = rows.last_mut() {
            row.push(Placed { entry, x, lines });
        }
        x += width + APART;
    }
    rows
}

fn row_height(row: &[Placed<'_>]) -> f64 {
    row.iter().map(|placed| placed.lines.len()).max().unwrap_or(0) as f64 * LINE + 4.0
}

/// How much room a legend takes.
pub fn legend_height(entries: &[Entry<'_>]) -> f64 {
    legend_rows(entries).iter().map(|row| row_height(row)).sum::<f64>() + 8.0
}

/// Draws a legend from that height on, below the plot, where it can never lie over a line.
pub fn draw_legend(canvas: &Canvas<'_>, top: f64, entries: &[Entry<'_>]) -> Drawn {
    let mut y = top + 8.0 + LINE / 2.0;
    for row in legend_rows(entries) {
        for placed in &row {
            draw_sample(canvas, (placed.x, y), placed.entry)?;
            for (i, line) in placed.lines.iter().enumerate() {
                canvas.text((placed.x + SAMPLE, y + i as f64 * LINE), line, Side::Right, TEXT, BLACK)?;
            }
        }
        y += row_height(&row);
    }
    Ok(())
}

fn draw_sample(canvas: &Canvas<'_>, (x, y): (f64, f64), entry: &Entry<'_>) -> Drawn {
    let paint: RGBColor = color(entry.color);
    let sample = [(x, y), (x + SAMPLE - 12.0, y)];
    match entry.look {
        Some(Look::Limit) => canvas.dashed(&sample, BLACK, 3),
        Some(Look::Steps) => canvas.line(&sample, paint, 4),
        Some(Look::Line) => {
            canvas.line(&sample, paint, 4)?;
            canvas.marker((x + (SAMPLE - 12.0) / 2.0, y), entry.color, paint)
        }
        None => canvas.rect((x, y - 9.0), (x + SAMPLE - 20.0, y + 9.0), paint),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(name: &str, points: &[(f64, f64)]) -> Series {
        let points = points.iter().map(|&(x, y)| Point { x, y, deviation: 0.5 }).collect();
        Series { name: name.into(), points, ..Series::default() }
    }

    #[test]
    fn a_distribution_ends_at_100() {
        let series = distribution("x", 0, [(4.0, 1), (1.0, 2), (4.0, 1), (9.0, 0)]);
        let at = |x, y| Point { x, y, deviation: 0.0 };
        assert_eq!(series.points, [at(1.0, 50.0), at(4.0, 100.0)]);
        assert_eq!(steps(&[(1.0, 50.0), (4.0, 100.0)], 0.0), [(1.0, 0.0), (1.0, 50.0), (4.0, 50.0), (4.0, 100.0)]);
    }

    #[test]
    fn a_plot_has_its_labels_and_names_stay_text() {
        let series = vec![line("<script>", &[(1.0, 1.0), (2.0, 4.0), (4.0, 16.0)])];
        let chart = Chart { x: Axis { label: "VMs".into(), log: false }, y: "boot (s)".into(), series };
        let text = chart.svg().unwrap();
        assert!(text.starts_with("<svg ") && text.trim_end().ends_with("</svg>"), "{text}");
        assert!(text.contains("VMs") && text.contains("boot (s)") && text.contains("&lt;script&gt;"), "{text}");
        assert!(!text.contains("<script"), "{text}");
    }

    #[test]
    fn ticks_stand_where_was_measured_unless_they_would_touch() {
        let ticks = |points: &[(f64, f64)], log| {
            let chart =
                Chart { x: Axis { label: String::new(), log }, y: String::new(), series: vec![line("a", points)] };
            let labels = chart.x_ticks(chart.scales().0, 80.0, 800.0);
            labels.into_iter().map(|(_, label)| label).collect::<Vec<_>>()
        };
        assert_eq!(ticks(&[(1.0, 1.0), (4.0, 2.0), (12.0, 3.0)], false), ["1", "4", "12"]);
        assert_eq!(ticks(&[(1.0, 1.0), (2.0, 1.0), (100.0, 2.0)], false), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(ticks(&[(1.0, 1.0), (2.0, 1.0), (100.0, 2.0)], true), ["1", "2", "100"]);
        assert_eq!(ticks(&[(3.0, 1.0)], false), ["3"]);
    }

    #[test]
    fn plots_of_one_point_or_of_none_are_drawn() {
        for log in [false, true] {
            for points in [&[][..], &[(7.0, 0.0)]] {
                let x = Axis { label: "x".into(), log };
                let chart = Chart { x, y: "y".into(), series: vec![line("a", points)] };
                let text = chart.svg().unwrap();
                assert!(!text.contains("NaN") && !text.contains("2147483647"), "{text}");
            }
        }
    }
}
