//! Plots of numbers over words: bars that lie, so that long words stand before them unbroken, with error bars and values.

use super::canvas::{
    Canvas, Drawn, GREY, GRID, LINE, Scale, Side, TEXT, WIDTH, color, number, rough, svg, width_of, wrap,
};
use super::chart::{Entry, Look, Point, draw_legend, legend_height};
use super::{Cell, Table};
use crate::error::Result;
use plotters::style::{BLACK, RGBColor};

/// Around everything.
const MARGIN: f64 = 14.0;
/// Thickness of a bar, with the gap to the next one.
const BAR: f64 = 29.0;
/// Height of the values behind the bars.
const TOLD: f64 = 25.0;
/// Between two words.
const BETWEEN: f64 = 16.0;
/// The most that words may take.
const WORDS_MAX: f64 = 290.0;

/// A plot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bars {
    /// What the words are.
    pub x: String,
    /// What the bars are, and their unit.
    pub y: String,
    /// The words, in order.
    pub words: Vec<String>,
    /// The schemes: a bar a word.
    pub series: Vec<Group>,
}

/// The bars of one scheme.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Group {
    /// Its name in the legend.
    pub name: String,
    /// Number of its colour.
    pub color: usize,
    /// A dashed line across the other bars of a word instead of a bar.
    pub is_limit: bool,
    /// A value a word; `x` is not looked at. `None`: was not measured.
    pub values: Vec<Option<Point>>,
}

impl Group {
    fn entry(&self) -> Entry<'_> {
        Entry { name: &self.name, color: self.color, look: self.is_limit.then_some(Look::Limit) }
    }
}

impl Bars {
    /// Its values, a row each.
    pub fn table(&self) -> Table {
        let mut rows = Vec::new();
        for group in &self.series {
            for (word, value) in self.words.iter().zip(&group.values) {
                let Some(p) = value else { continue };
                let numbers = [p.y, p.deviation].map(|v| Cell::number(v, number(v)));
                rows.push([Cell::text(&group.name), Cell::text(word)].into_iter().chain(numbers).collect());
            }
        }
        let head = ["series", &self.x, &self.y, "standard deviation"].map(String::from).to_vec();
        Table { head, rows, ..Table::default() }
    }

    /// Draws it.
    ///
    /// # Errors
    /// When the picture cannot be made.
    pub fn svg(&self) -> Result<String> {
        let legend: Vec<Entry<'_>> = self.series.iter().map(Group::entry).collect();
        let frame = self.frame();
        svg(WIDTH, frame.under + legend_height(&legend) + MARGIN, |canvas| {
            self.draw_axes(canvas, &frame)?;
            let mut top = frame.top;
            for (word, name) in frame.names.iter().enumerate() {
                let height = self.height_of(name);
                self.draw_word(canvas, &frame, word, (top, top + height))?;
                top += height;
            }
            draw_legend(canvas, frame.under, &legend)
        })
    }

    /// Those that are bars.
    fn bars(&self) -> impl Iterator<Item = &Group> {
        self.series.iter().filter(|g| !g.is_limit)
    }

    /// The room of a word with its bars.
    fn height_of(&self, name: &[String]) -> f64 {
        (self.bars().count() as f64 * BAR).max(name.len() as f64 * LINE).max(BAR) + BETWEEN
    }

    fn frame(&self) -> Frame {
        let values = self.series.iter().flat_map(|g| &g.values).flatten();
        let scale = Scale::from_zero(values.flat_map(|p| [p.y + p.deviation, p.y.min(0.0)]));
        let names: Vec<Vec<String>> = self.words.iter().map(|w| wrap(w, WORDS_MAX, TEXT, 3)).collect();
        let left = MARGIN + 12.0 + names.iter().flatten().map(|n| width_of(n, TEXT)).fold(0.0, f64::max);
        let told = self.bars().flat_map(|g| &g.values).flatten().map(|p| width_of(&label(p), TOLD));
        let right = WIDTH - MARGIN - 12.0 - told.fold(0.0, f64::max);
        let above = wrap(&self.x, WIDTH - 2.0 * MARGIN, TEXT, 2);
        let below = wrap(&self.y, WIDTH - 2.0 * MARGIN, TEXT, 2);
        let top = MARGIN + above.len() as f64 * LINE + 8.0;
        let bottom = top + names.iter().map(|name| self.height_of(name)).sum::<f64>();
        let under = bottom + 10.0 + LINE + below.len() as f64 * LINE;
        Frame { scale, names, left, right, top, bottom, under, above, below }
    }

    fn draw_axes(&self, canvas: &Canvas<'_>, f: &Frame) -> Drawn {
        for (i, line) in f.above.iter().enumerate() {
            canvas.text((MARGIN, MARGIN + (i as f64 + 0.5) * LINE), line, Side::Right, TEXT, BLACK)?;
        }
        for (value, text) in ticks(f.scale, f.left, f.right) {
            let at = f.place(value);
            canvas.line(&[(at, f.top), (at, f.bottom)], if value == 0.0 { GREY } else { GRID }, 2)?;
            canvas.text((at, f.bottom + 10.0 + LINE / 2.0), &text, Side::Both, TEXT, GREY)?;
        }
        for (i, line) in f.below.iter().enumerate() {
            let at = (WIDTH / 2.0, f.bottom + 10.0 + (i as f64 + 1.5) * LINE);
            canvas.text(at, line, Side::Both, TEXT, BLACK)?;
        }
        Ok(())
    }

    fn draw_word(&self, canvas: &Canvas<'_>, f: &Frame, word: usize, (top, bottom): (f64, f64)) -> Drawn {
        let middle = (top + bottom) / 2.0;
        let name = f.names.get(word).map_or(&[][..], Vec::as_slice);
        for (i, line) in name.iter().enumerate() {
            let at = middle + (i as f64 - (name.len() as f64 - 1.0) / 2.0) * LINE;
            canvas.text((f.left - 12.0, at), line, Side::Left, TEXT, BLACK)?;
        }
        let value = |group: &Group| group.values.get(word).copied().flatten();
        let mut y = middle - self.bars().count() as f64 * BAR / 2.0;
        for group in self.bars() {
            if let Some(p) = value(group) {
                draw_bar(canvas, f, &p, y, color(group.color))?;
            }
            y += BAR;
        }
        for p in self.series.iter().filter(|g| g.is_limit).filter_map(value) {
            let at = f.place(p.y);
            canvas.dashed(&[(at, top + 4.0), (at, bottom - 4.0)], BLACK, 3)?;
        }
        Ok(())
    }
}

/// Where the parts of a plot are.
struct Frame {
    scale: Scale,
    names: Vec<Vec<String>>,
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
    /// Below the name of the axis.
    under: f64,
    above: Vec<String>,
    below: Vec<String>,
}

impl Frame {
    fn place(&self, value: f64) -> f64 {
        self.scale.place(value, self.left, self.right)
    }
}

fn draw_bar(canvas: &Canvas<'_>, f: &Frame, p: &Point, top: f64, paint: RGBColor) -> Drawn {
    let middle = top + BAR / 2.0;
    canvas.rect((f.place(p.y.min(0.0)), top + 2.0), (f.place(p.y.max(0.0)), top + BAR - 2.0), paint)?;
    if p.deviation > 0.0 {
        let low = (p.y - p.deviation).max(p.y.min(0.0));
        canvas.error_bar((f.place(low), middle), (f.place(p.y + p.deviation), middle), BLACK)?;
    }
    let behind = f.place((p.y + p.deviation).max(0.0)) + 12.0;
    canvas.text((behind, middle), &label(p), Side::Right, TOLD, BLACK)
}

fn label(p: &Point) -> String {
    match p.deviation > 0.0 {
        true => format!("{} ± {}", number(p.y), rough(p.deviation)),
        false => number(p.y),
    }
}

/// As many as stand apart.
fn ticks(scale: Scale, left: f64, right: f64) -> Vec<(f64, String)> {
    let apart = |ticks: &Vec<(f64, String)>| {
        let widest = ticks.iter().map(|(_, label)| width_of(label, TEXT)).fold(0.0, f64::max);
        ticks.len() as f64 * (widest + 16.0) <= right - left
    };
    [5.0, 4.0, 3.0, 2.0, 1.0].map(|count| scale.ticks(count)).into_iter().find(apart).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_not_measured_has_no_bar_and_no_row() {
        let point = |y| Some(Point { x: 0.0, y, deviation: 0.0 });
        let group = |name: &str, is_limit, values| Group { name: name.into(), color: 0, is_limit, values };
        let bars = Bars {
            x: "words".into(),
            y: "seconds".into(),
            words: vec!["a rather long name of an application, which takes two lines".into(), "b".into()],
            series: vec![
                group("vmar", false, vec![point(1.0), None]),
                group("limit", true, vec![point(0.5), point(0.0)]),
            ],
        };
        assert_eq!(bars.table().rows.len(), 3);
        let text = bars.svg().unwrap();
        assert!(text.contains("seconds") && !text.contains("NaN"), "{text}");
        assert!(Bars::default().svg().is_ok());
    }
}
