//! The ratios as a picture: one line for each scenario, one mark for each comparison.

use crate::Result;
use crate::report::{Measured, Spread, iops, server_cpu};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::path::Path;

/// Pixels of a line, of the names at the left, and of each of the two panels.
const LINE: i32 = 18;
const NAMES: i32 = 270;
const PANEL: i32 = 430;
const HEAD: i32 = 64;
const MARGIN: i32 = 20;
/// Ratios at the borders of a panel; what lies beyond is drawn at the border.
const RANGE: (f64, f64) = (1.0 / 16.0, 16.0);
/// Colours of the subjects that vmar is compared with, in their order.
const COLORS: [RGBColor; 6] = [
    RGBColor(31, 119, 180),
    RGBColor(214, 39, 40),
    RGBColor(44, 160, 44),
    RGBColor(148, 103, 189),
    RGBColor(255, 127, 14),
    RGBColor(90, 90, 90),
];

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws IOPS and CPU of vmar, divided by those of every other subject.
///
/// # Errors
/// If the file cannot be written.
pub fn draw(path: &Path, measured: &[Measured]) -> Result<()> {
    let mut names: Vec<&str> = Vec::new();
    for row in measured.iter().flat_map(|m| &m.rows) {
        if row.name != "vmar" && !names.contains(&row.name.as_str()) {
            names.push(&row.name);
        }
    }
    let lines = i32::try_from(measured.len()).map_err(|e| e.to_string())?;
    let (width, height) = (NAMES + 2 * (PANEL + MARGIN), HEAD + lines * LINE + 2 * MARGIN);
    let area = SVGBackend::new(path, (width.unsigned_abs(), height.unsigned_abs())).into_drawing_area();
    paint(&area, measured, &names).map_err(|e| format!("{}: {e}", path.display()))
}

fn paint(area: &Area, measured: &[Measured], names: &[&str]) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let font = ("sans-serif", 14).into_font();
    area.fill(&WHITE)?;
    let bottom = HEAD + i32::try_from(measured.len())? * LINE + 4;
    let mut legend = 16;
    for (i, name) in names.iter().enumerate() {
        area.draw(&Circle::new((legend, 12), 4, color(i).filled()))?;
        area.draw(&Text::new(format!("vmar ÷ {name}"), (legend + 8, 6), font.clone()))?;
        // About 7 pixels a letter.
        legend += 7 * i32::try_from(name.len() + 7)? + 32;
    }
    for (panel, title) in
        ["IOPS (right of 1: vmar is faster)", "CPU of the server a request (left of 1: vmar is cheaper)"]
            .into_iter()
            .enumerate()
    {
        area.draw(&Text::new(title, (left(panel), 26), font.clone()))?;
        for power in -4..=4 {
            let ratio = 2f64.powi(power);
            let at = x(panel, ratio);
            let style = if power == 0 { BLACK.stroke_width(1) } else { RGBColor(215, 215, 215).stroke_width(1) };
            area.draw(&PathElement::new([(at, HEAD - 6), (at, bottom)], style))?;
            let label = if power < 0 { format!("1/{}", 2i32.pow(power.unsigned_abs())) } else { ratio.to_string() };
            area.draw(&Text::new(label, (at - 6, HEAD - 20), font.clone()))?;
        }
    }
    for (line, m) in measured.iter().enumerate() {
        let middle = HEAD + i32::try_from(line)? * LINE + LINE / 2;
        area.draw(&Text::new(m.scenario.name(), (8, middle - 6), font.clone()))?;
        for (i, name) in names.iter().enumerate() {
            // A pixel or two apart, so that equal ratios do not hide each other.
            let y = middle + (i32::try_from(i)? - i32::try_from(names.len())? / 2) * 2;
            for (panel, ratio) in
                [m.ratio("vmar", name, iops), m.ratio("vmar", name, server_cpu)].into_iter().enumerate()
            {
                if let Some(ratio) = ratio {
                    mark(area, panel, y, ratio, color(i))?;
                }
            }
        }
    }
    area.present()?;
    Ok(())
}

/// The median as a dot, from least to greatest as a line.
fn mark(
    area: &Area,
    panel: usize,
    y: i32,
    ratio: Spread,
    color: RGBColor,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let ends = [(x(panel, ratio.min), y), (x(panel, ratio.max), y)];
    area.draw(&PathElement::new(ends, color.stroke_width(1)))?;
    area.draw(&Circle::new((x(panel, ratio.median), y), 3, color.filled()))?;
    Ok(())
}

fn color(subject: usize) -> RGBColor {
    COLORS[subject % COLORS.len()]
}

fn left(panel: usize) -> i32 {
    if panel == 0 { NAMES } else { NAMES + PANEL + MARGIN }
}

/// Logarithmic, so that half and double are equally far from 1.
fn x(panel: usize, ratio: f64) -> i32 {
    let share = (ratio.clamp(RANGE.0, RANGE.1) / RANGE.0).ln() / (RANGE.1 / RANGE.0).ln();
    left(panel) + (share * f64::from(PANEL)).round() as i32
}
