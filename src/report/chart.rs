//! Plots as SVG text: lines with error bars, and steps of distributions. The legend is the page's, so that it can never lie
//! over a line.

use super::{Cell, Table};
use crate::error::{Error, ErrorKind, Result};
use plotters::prelude::*;
use std::ops::Range;

/// Pixels. Drawn for a narrow screen, a wide one only makes it larger.
const SIZE: (u32, u32) = (560, 340);
/// Colours of the series, in their order: apart from each other for colour-blind people too (Okabe and Ito).
pub const COLORS: [&str; 8] =
    ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999"];
/// Room on the axis behind the last point.
const HEADROOM: f64 = 1.06;

/// A plot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Chart {
    /// What goes to the right.
    pub x: Axis,
    /// What goes up; from 0 unless it is logarithmic.
    pub y: Axis,
    /// The lines.
    pub series: Vec<Series>,
    /// A value that all are to be compared with, and what it is.
    pub limit: Option<(f64, String)>,
}

/// An axis.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Axis {
    /// What, and its unit.
    pub label: String,
    /// Powers of two are equally far apart.
    pub log: bool,
}

impl Axis {
    /// With a linear scale.
    pub fn linear(label: &str) -> Axis {
        Axis { label: label.to_string(), log: false }
    }

    /// With a logarithmic scale; values below 1 are drawn at 1.
    pub fn log(label: &str) -> Axis {
        Axis { label: label.to_string(), log: true }
    }

    fn place(&self, value: f64) -> f64 {
        if self.log { value.max(1.0).log2() } else { value }
    }

    fn tick(&self, place: f64) -> String {
        number(if self.log { place.exp2() } else { place })
    }
}

/// A line.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Series {
    /// Its name in the legend.
    pub name: String,
    /// Its points, in order of x.
    pub points: Vec<Point>,
    /// From each point on it stays level up to the next one: a distribution function.
    pub steps: bool,
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

impl Chart {
    /// Its points, a row each.
    pub fn table(&self) -> Table {
        let rows = self.series.iter().flat_map(|series| {
            series.points.iter().map(|p| {
                let numbers = [p.x, p.y, p.deviation].map(|v| Cell::number(v, number(v)));
                [Cell::text(&series.name)].into_iter().chain(numbers).collect()
            })
        });
        let head = ["series", &self.x.label, &self.y.label, "standard deviation"].map(String::from).to_vec();
        Table { head, rows: rows.collect(), ..Table::default() }
    }
}

/// The share of values that are at most so large, as a line of steps.
pub fn distribution(name: &str, values: impl IntoIterator<Item = (f64, u64)>) -> Series {
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
    Series { name: name.to_string(), points, steps: true }
}

/// A number with as many digits as matter.
pub fn number(value: f64) -> String {
    match value.abs() {
        0.0 => "0".to_string(),
        v if v >= 1e9 => format!("{:.1}G", value / 1e9),
        v if v >= 1e6 => format!("{:.1}M", value / 1e6),
        v if v >= 1e4 => format!("{:.0}k", value / 1e3),
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 1.0 => format!("{value:.1}").trim_end_matches(".0").to_string(),
        _ => format!("{value:.2}"),
    }
}

/// Draws it.
///
/// # Errors
/// `Usage` when it has no point.
pub fn svg(chart: &Chart) -> Result<String> {
    let mut out = String::new();
    let area = SVGBackend::with_string(&mut out, SIZE).into_drawing_area();
    let drawn = draw(&area, chart);
    drop(area);
    drawn.map_err(|e| Error::new(ErrorKind::Usage, format!("plot of {}", chart.y.label), e))?;
    // As wide as the page has room for.
    let (width, height) = SIZE;
    let fixed = format!("<svg width=\"{width}\" height=\"{height}\"");
    Ok(out.replacen(&fixed, "<svg role=\"img\"", 1))
}

fn bounds(chart: &Chart) -> Option<(Range<f64>, Range<f64>)> {
    let points = || chart.series.iter().flat_map(|s| &s.points);
    let xs = || points().map(|p| chart.x.place(p.x));
    let tops = points().map(|p| p.y + p.deviation).chain(chart.limit.iter().map(|(value, _)| *value));
    let (left, right) = (xs().reduce(f64::min)?, xs().reduce(f64::max)?);
    let top = tops.map(|y| chart.y.place(y)).reduce(f64::max)?;
    let right = if right > left { right } else { left + 1.0 };
    let left = if chart.x.log { left } else { left.min(0.0) };
    Some((left..left + (right - left) * 1.02, 0.0..if top > 0.0 { top * HEADROOM } else { 1.0 }))
}

type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(area: &DrawingArea<SVGBackend<'_>, plotters::coord::Shift>, chart: &Chart) -> Drawn {
    let (x, y) = bounds(chart).ok_or("there is nothing to draw")?;
    area.fill(&WHITE)?;
    let mut plot = ChartBuilder::on(area)
        .margin(8)
        .x_label_area_size(44)
        .y_label_area_size(58)
        .build_cartesian_2d(x.clone(), y)?;
    plot.configure_mesh()
        .x_desc(&chart.x.label)
        .y_desc(&chart.y.label)
        .x_labels(8)
        .y_labels(7)
        .x_label_formatter(&|v| chart.x.tick(*v))
        .y_label_formatter(&|v| chart.y.tick(*v))
        .label_style(("sans-serif", 14))
        .axis_desc_style(("sans-serif", 15))
        .light_line_style(WHITE)
        .draw()?;
    if let Some((value, _)) = &chart.limit {
        let level = chart.y.place(*value);
        plot.draw_series(DashedLineSeries::new([(x.start, level), (x.end, level)], 6, 4, BLACK.stroke_width(1)))?;
    }
    for (series, color) in chart.series.iter().zip(colors()) {
        let place = |p: &Point| (chart.x.place(p.x), chart.y.place(p.y));
        let places: Vec<(f64, f64)> = series.points.iter().map(place).collect();
        plot.draw_series(LineSeries::new(path(&places, series.steps), color.stroke_width(2)))?;
        if series.steps {
            continue;
        }
        plot.draw_series(places.iter().map(|at| Circle::new(*at, 4, color.filled())))?;
        for (point, (x, _)) in series.points.iter().zip(&places).filter(|(p, _)| p.deviation > 0.0) {
            let ends = [point.y - point.deviation, point.y + point.deviation].map(|y| (*x, chart.y.place(y.max(0.0))));
            plot.draw_series([PathElement::new(ends, color.stroke_width(1))])?;
        }
    }
    area.present()?;
    Ok(())
}

/// The corners of the line.
fn path(places: &[(f64, f64)], steps: bool) -> Vec<(f64, f64)> {
    if !steps {
        return places.to_vec();
    }
    let mut out = Vec::with_capacity(2 * places.len());
    let mut level = 0.0;
    for &(x, y) in places {
        out.extend([(x, level), (x, y)]);
        level = y;
    }
    out
}

fn colors() -> impl Iterator<Item = RGBColor> {
    let part = |color: &str, at: usize| color.get(at..at + 2).and_then(|hex| u8::from_str_radix(hex, 16).ok()).unwrap_or(0);
    COLORS.iter().cycle().map(move |c| RGBColor(part(c, 1), part(c, 3), part(c, 5)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_ends_at_100() {
        let series = distribution("x", [(4.0, 1), (1.0, 2), (4.0, 1), (9.0, 0)]);
        let at = |x, y| Point { x, y, deviation: 0.0 };
        assert_eq!(series.points, [at(1.0, 50.0), at(4.0, 100.0)]);
        assert_eq!(path(&[(1.0, 50.0), (4.0, 100.0)], true), [(1.0, 0.0), (1.0, 50.0), (4.0, 50.0), (4.0, 100.0)]);
    }

    #[test]
    fn numbers_are_short() {
        let all: Vec<String> = [0.0, 0.25, 1.0, 9.96, 12.5, 640.0, 12_000.0, 2_500_000.0].map(number).to_vec();
        assert_eq!(all, ["0", "0.25", "1", "10", "12.5", "640", "12k", "2.5M"]);
    }

    #[test]
    fn what_has_no_point_is_no_plot() {
        assert!(svg(&Chart::default()).is_err());
    }

    #[test]
    fn a_plot_has_its_labels_and_scales_with_the_page() {
        let points = (1..5).map(|i| Point { x: f64::from(i), y: f64::from(i * i), deviation: 0.5 }).collect();
        let series = vec![Series { name: "vmar".into(), points, steps: false }];
        let chart = Chart { x: Axis::linear("VMs"), y: Axis::log("seconds"), series, limit: Some((3.0, "limit".into())) };
        let text = svg(&chart).unwrap();
        assert!(text.starts_with("<svg role=\"img\" viewBox=\"0 0 560 340\""), "{}", &text[..80]);
        assert!(text.contains("VMs") && text.contains("seconds"));
    }
}
