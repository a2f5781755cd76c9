//! Plots of numbers over words: bars that lie, so that long words stand before them unbroken, with error bars and values.

use super::canvas::{GREY, GRID, LINE, Scale, Side, TEXT, WIDTH, color, number, svg, width_of, wrap};
use super::chart::{Entry, Look, Point, draw_legend, legend_height};
use super::{Cell, Table};
use crate::error::Result;
use plotters::style::BLACK;

/// Around everything.
const MARGIN: f64 = 14.0;
/// Thickness of a bar, with the gap to the next one.
const BAR: f64 = 26.0;
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
        let look = |g: &Group| g.is_limit.then_some(Look::Limit);
        let legend: Vec<Entry<'_>> =
            self.series.iter().map(|g| Entry { name: &g.name, color: g.color, look: look(g) }).collect();
        let bars: Vec<&Group> = self.series.iter().filter(|g| !g.is_limit).collect();
        let scale = Scale::from_zero(
            self.series.iter().flat_map(|g| &g.values).flatten().flat_map(|p| [p.y + p.deviation, p.y.min(0.0)]),
        );
        let names: Vec<Vec<String>> = self.words.iter().map(|w| wrap(w, WORDS_MAX, TEXT, 2)).collect();
        let left = MARGIN + 12.0 + names.iter().flatten().map(|n| width_of(n, TEXT)).fold(0.0, f64::max);
        let told = bars.iter().flat_map(|g| &g.values).flatten().map(|p| width_of(&label(p), TEXT)).fold(0.0, f64::max);
        let right = WIDTH - MARGIN - told - 12.0;
        let thick = |name: &Vec<String>| (bars.len() as f64 * BAR).max(name.len() as f64 * LINE).max(BAR) + BETWEEN;
        let above = wrap(&self.x, WIDTH - 2.0 * MARGIN, TEXT, 2);
        let top = MARGIN + above.len() as f64 * LINE + 8.0;
        let bottom = top + names.iter().map(thick).sum::<f64>();
        let below = wrap(&self.y, WIDTH - 2.0 * MARGIN, TEXT, 2);
        let under = bottom + 10.0 + LINE + below.len() as f64 * LINE;
        svg(WIDTH, under + legend_height(&legend) + MARGIN, |canvas| {
            for (i, line) in above.iter().enumerate() {
                canvas.text((MARGIN, MARGIN + (i as f64 + 0.5) * LINE), line, Side::Right, TEXT, BLACK)?;
            }
            for (value, text) in ticks(scale, left, right) {
                let at = scale.place(value, left, right);
                canvas.line(&[(at, top), (at, bottom)], if value == 0.0 { GREY } else { GRID }, 2)?;
                canvas.text((at, bottom + 10.0 + LINE / 2.0), &text, Side::Both, TEXT, GREY)?;
            }
            for (i, line) in below.iter().enumerate() {
                let at = (WIDTH / 2.0, bottom + 10.0 + (i as f64 + 1.5) * LINE);
                canvas.text(at, line, Side::Both, TEXT, BLACK)?;
            }
            let mut y = top;
            for (word, name) in names.iter().enumerate() {
                let height = thick(name);
                let middle = y + height / 2.0;
                for (i, line) in name.iter().enumerate() {
                    let at = middle + (i as f64 - (name.len() as f64 - 1.0) / 2.0) * LINE;
                    canvas.text((left - 12.0, at), line, Side::Left, TEXT, BLACK)?;
                }
                let mut from = middle - bars.len() as f64 * BAR / 2.0;
                let zero = scale.place(0.0, left, right);
                for group in &bars {
                    if let Some(Some(p)) = group.values.get(word) {
                        let at = from + BAR / 2.0;
                        canvas.rect(
                            (zero, from + 2.0),
                            (scale.place(p.y, left, right), from + BAR - 2.0),
                            color(group.color),
                        )?;
                        let end = |v: f64| (scale.place(v, left, right), at);
                        if p.deviation > 0.0 {
                            canvas.error_bar(
                                end((p.y - p.deviation).max(p.y.min(0.0))),
                                end(p.y + p.deviation),
                                BLACK,
                            )?;
                        }
                        let behind = end((p.y + p.deviation).max(0.0)).0 + 12.0;
                        canvas.text((behind, at), &label(p), Side::Right, TEXT * 0.9, BLACK)?;
                    }
                    from += BAR;
                }
                for limit in self.series.iter().filter(|g| g.is_limit) {
                    if let Some(Some(p)) = limit.values.get(word) {
                        let at = scale.place(p.y, left, right);
                        canvas.dashed(&[(at, y + 4.0), (at, y + height - 4.0)], BLACK, 3)?;
                    }
                }
                y += height;
            }
            draw_legend(canvas, under, &legend)
        })
    }
}

fn label(p: &Point) -> String {
    match p.deviation > 0.0 {
        true => format!("{} ± {}", number(p.y), number(p.deviation)),
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
