//! What all pictures are drawn with: text of known extent, lines, boxes and markers, at twice the size at which a phone shows them.

use crate::error::{Error, ErrorKind, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Width of a picture in its own units. A column of the page is half as many pixels wide, so that edges are sharp.
pub const WIDTH: f64 = 840.0;
/// Height of small text.
pub const TEXT: f64 = 28.0;
/// From one line of it to the next.
pub const LINE: f64 = 35.0;
/// Colour of grids.
pub const GRID: RGBColor = RGBColor(224, 224, 224);
/// Colour of what is said beside the plot.
pub const GREY: RGBColor = RGBColor(85, 85, 85);
/// Colours of the schemes, in their order: apart from each other for colour-blind people too (after Okabe and Ito). Black is
/// the limit's.
pub const COLORS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(110, 110, 110),
];

/// The backend's text is smaller than the size that it is given.
const BACKEND_SCALE: f64 = 1.24;
/// Mean width of a letter, of the height of the text: that of wide fonts, for nobody knows which one a reader has.
const LETTER: f64 = 0.58;

/// What drawing returns. Writing into a string does not fail; the backend cannot know.
pub type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

/// Where a text is, seen from its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// It begins there.
    Right,
    /// It is around it.
    Both,
    /// It ends there.
    Left,
}

/// A picture in the making. Places are from the upper left corner.
pub struct Canvas<'a> {
    area: DrawingArea<SVGBackend<'a>, Shift>,
}

/// Draws a picture of this size.
///
/// # Errors
/// Those of `paint`.
pub fn svg(width: f64, height: f64, paint: impl FnOnce(&Canvas<'_>) -> Drawn) -> Result<String> {
    let mut out = String::new();
    let area = SVGBackend::with_string(&mut out, (px(width).unsigned_abs(), px(height).unsigned_abs()));
    let canvas = Canvas { area: area.into_drawing_area() };
    let failed = |e: Box<dyn std::error::Error>| Error::new(ErrorKind::Io, "a plot", e);
    canvas.rect((0.0, 0.0), (width, height), WHITE).map_err(failed)?;
    paint(&canvas).map_err(failed)?;
    canvas.area.present().map_err(|e| failed(e.into()))?;
    drop(canvas);
    Ok(out)
}

#[expect(clippy::cast_possible_truncation, reason = "places in a picture are small; a cast of what is not saturates")]
fn px(value: f64) -> i32 {
    value.round() as i32
}

fn at(point: (f64, f64)) -> (i32, i32) {
    (px(point.0), px(point.1))
}

impl Canvas<'_> {
    /// Text, its middle at the height of the point.
    pub fn text(&self, point: (f64, f64), text: &str, side: Side, size: f64, color: RGBColor) -> Drawn {
        let h = match side {
            Side::Right => HPos::Left,
            Side::Both => HPos::Center,
            Side::Left => HPos::Right,
        };
        let style = TextStyle::from(("sans-serif", size * BACKEND_SCALE)).color(&color).pos(Pos::new(h, VPos::Center));
        Ok(self.area.draw(&Text::new(text.replace(char::is_control, " "), at(point), style))?)
    }

    /// A line through these points.
    pub fn line(&self, points: &[(f64, f64)], color: RGBColor, width: u32) -> Drawn {
        let mut places: Vec<(i32, i32)> = points.iter().map(|p| at(*p)).collect();
        places.dedup();
        // Those between two others of the same height, or below each other, say nothing.
        let level = |a: i32, b: i32, c: i32| a == b && b == c;
        let mut corners: Vec<(i32, i32)> = Vec::with_capacity(places.len());
        for place in places {
            if let [.., a, b] = corners.as_slice()
                && (level(a.1, b.1, place.1) || level(a.0, b.0, place.0))
            {
                corners.pop();
            }
            corners.push(place);
        }
        Ok(self.area.draw(&PathElement::new(corners, color.stroke_width(width)))?)
    }

    /// A dashed line through these points.
    pub fn dashed(&self, points: &[(f64, f64)], color: RGBColor, width: u32) -> Drawn {
        const DASH: f64 = 14.0;
        const GAP: f64 = 9.0;
        let mut phase = 0.0;
        for (&(x0, y0), &(x1, y1)) in points.iter().zip(points.iter().skip(1)) {
            let length = (x1 - x0).hypot(y1 - y0);
            let point = |d: f64| (x0 + (x1 - x0) * d / length, y0 + (y1 - y0) * d / length);
            let mut done = 0.0;
            while done < length {
                let (is_dash, rest) = if phase < DASH { (true, DASH - phase) } else { (false, DASH + GAP - phase) };
                let step = rest.min(length - done).max(0.01);
                if is_dash {
                    self.line(&[point(done), point(done + step)], color, width)?;
                }
                done += step;
                phase = (phase + step) % (DASH + GAP);
            }
        }
        Ok(())
    }

    /// A filled box.
    pub fn rect(&self, corner: (f64, f64), opposite: (f64, f64), color: RGBColor) -> Drawn {
        Ok(self.area.draw(&Rectangle::new([at(corner), at(opposite)], color.filled()))?)
    }

    /// A filled outline.
    pub fn shape(&self, corners: &[(f64, f64)], color: RGBColor) -> Drawn {
        let corners: Vec<(i32, i32)> = corners.iter().map(|p| at(*p)).collect();
        Ok(self.area.draw(&Polygon::new(corners, color.filled()))?)
    }

    /// A filled shape, another one for each `kind`: whoever sees no colours sees these.
    pub fn marker(&self, point: (f64, f64), kind: usize, color: RGBColor) -> Drawn {
        const R: f64 = 8.0;
        let (x, y) = point;
        let polygon = |corners: &[(f64, f64)]| -> Drawn {
            let corners: Vec<(f64, f64)> = corners.iter().map(|(dx, dy)| (x + dx * R, y + dy * R)).collect();
            self.shape(&corners, color)
        };
        match kind % 5 {
            0 => Ok(self.area.draw(&Circle::new(at(point), px(R), color.filled()))?),
            1 => polygon(&[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
            2 => polygon(&[(0.0, -1.2), (1.1, 0.9), (-1.1, 0.9)]),
            3 => polygon(&[(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)]),
            _ => polygon(&[(0.0, 1.2), (1.1, -0.9), (-1.1, -0.9)]),
        }
    }

    /// A vertical or horizontal bar with ends, from one point to the other: an error bar.
    pub fn error_bar(&self, from: (f64, f64), to: (f64, f64), color: RGBColor) -> Drawn {
        const CAP: f64 = 7.0;
        let (dx, dy) = if from.0 == to.0 { (CAP, 0.0) } else { (0.0, CAP) };
        self.line(&[from, to], color, 2)?;
        for (x, y) in [from, to] {
            self.line(&[(x - dx, y - dy), (x + dx, y + dy)], color, 2)?;
        }
        Ok(())
    }
}

/// The colour of the scheme of this number.
pub fn color(number: usize) -> RGBColor {
    COLORS.get(number % COLORS.len()).copied().unwrap_or(BLACK)
}

/// How wide a text is at most.
pub fn width_of(text: &str, size: f64) -> f64 {
    text.chars().count() as f64 * size * LETTER
}

/// The text, or its beginning and an ellipsis if it is wider.
pub fn fit(text: &str, width: f64, size: f64) -> String {
    if width_of(text, size) <= width {
        return text.to_string();
    }
    let mut out: Vec<char> = text.chars().collect();
    while !out.is_empty() && (out.len() + 1) as f64 * size * LETTER > width {
        out.pop();
    }
    let cut: String = out.into_iter().collect();
    format!("{}…", cut.trim_end())
}

/// The text in at most so many lines of that width, broken between words, and in words that are wider; what is left over
/// ends in an ellipsis.
pub fn wrap(text: &str, width: f64, size: f64, lines_max: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for (part, between) in parts(text, width, size) {
        let joined = lines.last().map(|line| format!("{line}{between}{part}"));
        match joined {
            Some(joined) if width_of(&joined, size) <= width || lines.len() == lines_max => {
                lines.pop();
                lines.push(joined);
            }
            _ => lines.push(part.to_string()),
        }
    }
    lines.iter().map(|line| fit(line, width, size)).collect()
}

/// The words, and what is between each and the one before. A word that is too wide is cut behind its signs.
fn parts(text: &str, width: f64, size: f64) -> Vec<(&str, &'static str)> {
    let mut out = Vec::new();
    for word in text.split_whitespace() {
        match width_of(word, size) <= width {
            true => out.push((word, " ")),
            false => {
                let pieces = word.split_inclusive(['-', '_', '.', ',', '/', ':', '@', '=']);
                out.extend(pieces.enumerate().map(|(i, piece)| (piece, if i == 0 { " " } else { "" })));
            }
        }
    }
    out
}

/// A number with as many digits as matter.
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 99.95 || v == 0.0 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.0995 => 2,
        _ => 4,
    };
    match value.abs() {
        v if v >= 1e9 => format!("{:.1}G", value / 1e9),
        v if v >= 1e6 => format!("{:.1}M", value / 1e6),
        v if v >= 1e5 => format!("{:.0}k", value / 1e3),
        _ => trim(format!("{value:.digits$}")),
    }
}

/// A deviation: two digits are all that it is worth.
pub fn rough(value: f64) -> String {
    match value.abs() {
        v if v >= 9.95 || v == 0.0 => number(value.round()),
        v if v >= 0.995 => format!("{value:.1}"),
        v if v >= 0.0995 => format!("{value:.2}"),
        v if v >= 0.00995 => trim(format!("{value:.3}")),
        v if v >= 0.000_995 => trim(format!("{value:.4}")),
        _ => format!("{value:.0e}"),
    }
}

fn trim(text: String) -> String {
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_string(),
        false => text,
    }
}

/// An axis of numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scale {
    /// Where it begins.
    pub from: f64,
    /// Where it ends, above.
    pub to: f64,
    /// Powers of two are equally far apart.
    pub log: bool,
}

impl Scale {
    /// From 0, or the least value if that is below, to the next tick above the largest.
    pub fn from_zero(values: impl Iterator<Item = f64>) -> Scale {
        let (low, high) = values.fold((0.0f64, 0.0f64), |(low, high), v| (low.min(v), high.max(v)));
        let high = if high > low { high } else { low + 1.0 };
        let step = step((high - low) / 5.0);
        Scale { from: (low / step).floor() * step, to: (high / step).ceil() * step, log: false }
    }

    /// Where a value is between `a` and `b`.
    pub fn place(&self, value: f64, a: f64, b: f64) -> f64 {
        let share = match self.log {
            true => (value.log2() - self.from.log2()) / (self.to.log2() - self.from.log2()),
            false => (value - self.from) / (self.to - self.from),
        };
        a + (b - a) * share
    }

    /// At most about so many ticks, with their labels.
    pub fn ticks(&self, count: f64) -> Vec<(f64, String)> {
        if self.log {
            let (low, high) = (self.from.log2().ceil(), self.to.log2().floor());
            let stride = ((high - low) / count).ceil().max(1.0);
            return grid(low, high, stride).map(|power| (power.exp2(), power_label(power.exp2()))).collect();
        }
        let step = step((self.to - self.from) / count);
        let first = (self.from / step - 1e-9).ceil() * step;
        grid(first, self.to + step * 1e-9, step).map(|v| (v, tick_label(v, step, self.to))).collect()
    }
}

/// `from`, and on by `step` as far as `to`.
fn grid(from: f64, to: f64, step: f64) -> impl Iterator<Item = f64> {
    (0..1000).map(move |i| from + f64::from(i) * step).take_while(move |v| *v <= to)
}

/// The next of 1, 2, 5, 10, … times a power of ten.
fn step(least: f64) -> f64 {
    let power = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0].map(|n| n * power).into_iter().find(|s| *s >= least * 0.999_999).unwrap_or(10.0 * power)
}

fn tick_label(value: f64, step: f64, most: f64) -> String {
    let (unit, name) = match most.abs() {
        m if m >= 1e9 => (1e9, "G"),
        m if m >= 1e6 => (1e6, "M"),
        m if m >= 2e4 => (1e3, "k"),
        _ => (1.0, ""),
    };
    let digits = (0..9).find(|d| step / unit * 10f64.powi(*d) >= 0.999).unwrap_or(9);
    let digits = usize::try_from(digits).unwrap_or(0);
    // No negative zero.
    let value = if value.abs() < step * 1e-6 { 0.0 } else { value };
    if value == 0.0 { "0".to_string() } else { format!("{:.digits$}{name}", value / unit) }
}

fn power_label(value: f64) -> String {
    match value {
        v if v >= 1_048_576.0 => format!("{}Mi", v / 1_048_576.0),
        v if v >= 0.1 => v.to_string(),
        v => format!("{v:.3}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let all: Vec<String> =
            [0.0, 0.25, 1.0, 9.96, 12.5, 640.0, 12_000.0, 120_000.0, 2_500_000.0, 0.0123].map(number).to_vec();
        assert_eq!(all, ["0", "0.25", "1", "9.96", "12.5", "640", "12000", "120k", "2.5M", "0.0123"]);
        let all = [0.0, 12.4, 1.26, 0.262, 0.0382, 0.0099, 0.00012].map(rough).to_vec();
        assert_eq!(all, ["0", "12", "1.3", "0.26", "0.038", "0.0099", "1e-4"]);
    }

    #[test]
    fn ticks_are_round_and_few() {
        let labels = |scale: Scale| scale.ticks(5.0).into_iter().map(|(_, label)| label).collect::<Vec<_>>();
        let up_to = |to| Scale::from_zero([to].into_iter());
        assert_eq!(labels(up_to(93.0)), ["0", "20", "40", "60", "80", "100"]);
        assert_eq!(labels(up_to(0.0031)), ["0", "0.001", "0.002", "0.003", "0.004"]);
        assert_eq!(labels(up_to(4.2e6)), ["0", "1M", "2M", "3M", "4M", "5M"]);
        assert_eq!(labels(up_to(45_000.0)), ["0", "10k", "20k", "30k", "40k", "50k"]);
        assert_eq!(labels(Scale { from: 1.0, to: 3000.0, log: true }), ["1", "8", "64", "512"]);
        assert_eq!(labels(Scale { from: 0.2, to: 1.0, log: true }), ["0.25", "0.5", "1"]);
        assert_eq!(up_to(0.0), Scale { from: 0.0, to: 1.0, log: false });
    }

    #[test]
    fn text_is_wrapped_and_cut() {
        assert_eq!(wrap("one two three", width_of("one two", 10.0), 10.0, 3), ["one two", "three"]);
        assert_eq!(wrap("one two three four", width_of("one two", 10.0), 10.0, 2), ["one two", "three…"]);
        assert_eq!(fit("abcdef", width_of("abc", 10.0), 10.0), "ab…");
        assert_eq!(
            wrap("openjdk-17.0-headless", width_of("openjdk-17.", 10.0), 10.0, 3),
            ["openjdk-17.", "0-headless"]
        );
        assert!(wrap("", 10.0, 10.0, 2).is_empty());
    }
}
