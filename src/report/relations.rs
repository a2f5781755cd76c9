//! Pictures of what images have to do with each other: a square of shares, and bands from readers to what they read.

use super::canvas::{GREY, LINE, Side, TEXT, WIDTH, color, fit, svg, width_of};
use super::{Cell, Table};
use crate::error::Result;
use plotters::style::{BLACK, RGBColor, WHITE};

/// Around everything.
const MARGIN: f64 = 14.0;
/// The most that names may take.
const NAMES_MAX: f64 = 300.0;

/// A square: how much of what a row is, a column has too.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Square {
    /// Names of the rows, and of the columns.
    pub names: Vec<String>,
    /// The shares, 0 to 1, a row each.
    pub shares: Vec<Vec<f64>>,
}

impl Square {
    /// The shares, a pair a row.
    pub fn table(&self) -> Table {
        let mut rows = Vec::new();
        for (a, shares) in self.names.iter().zip(&self.shares) {
            for (b, share) in self.names.iter().zip(shares) {
                rows.push(vec![Cell::text(a), Cell::text(b), Cell::number(*share, share.to_string())]);
            }
        }
        let head = ["of the blocks of", "held by", "share"].map(String::from).to_vec();
        Table { head, rows, ..Table::default() }
    }

    /// Draws it. Columns have the numbers of the rows.
    ///
    /// # Errors
    /// When the picture cannot be made.
    pub fn svg(&self) -> Result<String> {
        let count = self.names.len().max(1) as f64;
        let numbered = |(i, name): (usize, &String)| fit(&format!("{name}  {}", i + 1), NAMES_MAX, TEXT);
        let names: Vec<String> = self.names.iter().enumerate().map(numbered).collect();
        let left = MARGIN + 10.0 + names.iter().map(|n| width_of(n, TEXT)).fold(0.0, f64::max);
        let cell = ((WIDTH - MARGIN - left) / count).min(64.0);
        let top = MARGIN + LINE;
        // Three digits must fit.
        let size = (cell / 3.0 / 0.58).min(TEXT);
        svg(WIDTH, top + cell * count + MARGIN, |canvas| {
            for (i, (name, shares)) in names.iter().zip(&self.shares).enumerate() {
                let y = top + (i as f64 + 0.5) * cell;
                canvas.text((left - 10.0, y), name, Side::Left, TEXT.min(cell), BLACK)?;
                let head = (left + (i as f64 + 0.5) * cell, top - LINE / 2.0);
                canvas.text(head, &(i + 1).to_string(), Side::Both, TEXT.min(cell * 0.7), GREY)?;
                for (j, &share) in shares.iter().enumerate() {
                    let x = left + j as f64 * cell;
                    let corner = (x + 1.0, y - cell / 2.0 + 1.0);
                    canvas.rect(corner, (x + cell - 1.0, y + cell / 2.0 - 1.0), shade(share))?;
                    // Below 8 units it would be a smear; the colour and the table have to do.
                    if size >= 8.0 && i != j {
                        let ink = if share > 0.55 { WHITE } else { BLACK };
                        let text = format!("{:.0}", 100.0 * share);
                        canvas.text((x + cell / 2.0, y), &text, Side::Both, size, ink)?;
                    }
                }
            }
            Ok(())
        })
    }
}

/// From nearly white to dark blue.
fn shade(share: f64) -> RGBColor {
    let between = |from: f64, to: f64| {
        let value = (from + (to - from) * share.clamp(0.0, 1.0)).round();
        (0u8..=255).find(|v| f64::from(*v) >= value).unwrap_or(255)
    };
    RGBColor(between(243.0, 0.0), between(246.0, 72.0), between(250.0, 128.0))
}

/// Who reads from whom.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Bands {
    /// What is above the readers.
    pub from: String,
    /// What is above those that are read.
    pub to: String,
    /// Reader, whom it reads, how much, and that in words.
    pub edges: Vec<(String, String, f64, String)>,
}

/// Bands that are drawn: the widest.
const BANDS_MAX: usize = 60;
/// Height of the largest node at either side.
const NODES: f64 = 620.0;
/// Least height of a node: that of its name.
const NODE_MIN: f64 = 34.0;

/// An image at one side: where its bands begin.
struct Node<'a> {
    name: &'a str,
    sum: f64,
    top: f64,
    used: f64,
}

impl Bands {
    /// The edges, a row each.
    pub fn table(&self) -> Table {
        let row = |(a, b, value, text): &(String, String, f64, String)| {
            vec![Cell::text(a), Cell::text(b), Cell::number(*value, text)]
        };
        let head = [&self.from, &self.to, "bytes"].map(String::from).to_vec();
        Table { head, rows: self.edges.iter().map(row).collect(), ..Table::default() }
    }

    /// Draws it: readers at the left, those that are read at the right, between them a band as wide as what is read.
    ///
    /// # Errors
    /// When the picture cannot be made.
    pub fn svg(&self) -> Result<String> {
        let mut edges: Vec<&(String, String, f64, String)> = self.edges.iter().collect();
        edges.sort_by(|a, b| b.2.total_cmp(&a.2));
        edges.truncate(BANDS_MAX);
        let total: f64 = edges.iter().map(|e| e.2).sum::<f64>().max(1.0);
        let scale = NODES / total;
        let (mut readers, left_end) = nodes(edges.iter().map(|e| (e.0.as_str(), e.2)), scale);
        let (mut read, right_end) = nodes(edges.iter().map(|e| (e.1.as_str(), e.2)), scale);
        let widest = |nodes: &[Node<'_>]| nodes.iter().map(|n| width_of(n.name, TEXT)).fold(60.0, f64::max).min(250.0);
        let (left, right) = (MARGIN + widest(&readers) + 12.0, WIDTH - MARGIN - widest(&read) - 12.0);
        svg(WIDTH, left_end.max(right_end) + MARGIN, |canvas| {
            canvas.text((MARGIN, MARGIN + LINE / 2.0), &self.from, Side::Right, TEXT, GREY)?;
            canvas.text((WIDTH - MARGIN, MARGIN + LINE / 2.0), &self.to, Side::Left, TEXT, GREY)?;
            for (reader, target, value, _) in edges {
                let height = value * scale;
                let number = read.iter().position(|n| n.name == target).unwrap_or(0);
                let a = begin(&mut readers, reader, height);
                let b = begin(&mut read, target, height);
                let paint = pale(color(number));
                canvas.shape(&band((left, a), (right, b), height), paint)?;
            }
            for (nodes, x, side) in [(&readers, left, Side::Left), (&read, right, Side::Right)] {
                let out = if side == Side::Left { -1.0 } else { 1.0 };
                for node in nodes {
                    let middle = node.top + node.sum * scale / 2.0;
                    canvas.rect((x, node.top), (x + 6.0 * out, node.top + (node.sum * scale).max(2.0)), BLACK)?;
                    let name = fit(node.name, 250.0, TEXT);
                    canvas.text((x + 14.0 * out, middle), &name, side, TEXT, BLACK)?;
                }
            }
            Ok(())
        })
    }
}

/// The images of one side, one below the other, the largest first; and where the last one ends.
fn nodes<'a>(parts: impl Iterator<Item = (&'a str, f64)>, scale: f64) -> (Vec<Node<'a>>, f64) {
    let mut out: Vec<Node<'a>> = Vec::new();
    for (name, value) in parts {
        match out.iter_mut().find(|n| n.name == name) {
            Some(node) => node.sum += value,
            None => out.push(Node { name, sum: value, top: 0.0, used: 0.0 }),
        }
    }
    out.sort_by(|a, b| b.sum.total_cmp(&a.sum));
    let mut y = MARGIN + LINE + 16.0;
    for node in &mut out {
        let height = node.sum * scale;
        let room = height.max(NODE_MIN);
        node.top = y + (room - height) / 2.0;
        y += room + 8.0;
    }
    (out, y)
}

/// Where the next band of a node begins.
fn begin(nodes: &mut [Node<'_>], name: &str, height: f64) -> f64 {
    nodes.iter_mut().find(|n| n.name == name).map_or(0.0, |node| {
        node.used += height;
        node.top + node.used - height
    })
}

fn pale(paint: RGBColor) -> RGBColor {
    let mix = |v: u8| 255 - (255 - v) / 2;
    RGBColor(mix(paint.0), mix(paint.1), mix(paint.2))
}

/// The outline of a band that leaves and arrives level.
fn band(from: (f64, f64), to: (f64, f64), height: f64) -> Vec<(f64, f64)> {
    const STEPS: u32 = 16;
    let edge = |down: f64| {
        (0..=STEPS).map(move |i| {
            let t = f64::from(i) / f64::from(STEPS);
            let eased = t * t * (3.0 - 2.0 * t);
            (from.0 + (to.0 - from.0) * t, from.1 + (to.1 - from.1) * eased + down)
        })
    };
    let lower: Vec<(f64, f64)> = edge(height.max(1.0)).collect();
    edge(0.0).chain(lower.into_iter().rev()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn squares_of_any_size_are_drawn() {
        for count in [0, 1, 3, 15, 40] {
            let names: Vec<String> = (0..count).map(|i| format!("image-with-a-name-{i}")).collect();
            let shares = vec![vec![0.5; count]; count];
            let square = Square { names, shares };
            assert_eq!(square.table().rows.len(), count * count);
            assert!(!square.svg().unwrap().contains("NaN"));
        }
        assert_eq!((shade(0.0), shade(1.0)), (RGBColor(243, 246, 250), RGBColor(0, 72, 128)));
    }

    #[test]
    fn bands_begin_where_the_one_before_ended() {
        let edge = |a: &str, b: &str, value| (a.to_string(), b.to_string(), value, String::new());
        let bands = Bands {
            from: "reader".into(),
            to: "reads".into(),
            edges: vec![edge("a", "c", 3.0), edge("b", "c", 1.0), edge("a", "<b>", 2.0)],
        };
        let text = bands.svg().unwrap();
        assert!(text.contains("&lt;b&gt;") && !text.contains("NaN"), "{text}");
        let (mut list, _) = nodes([("a", 3.0), ("b", 1.0), ("a", 2.0)].into_iter(), 10.0);
        assert_eq!(list.iter().map(|n| (n.name, n.sum)).collect::<Vec<_>>(), [("a", 5.0), ("b", 1.0)]);
        let first = begin(&mut list, "a", 30.0);
        assert_eq!(begin(&mut list, "a", 20.0), first + 30.0);
        assert!(Bands::default().svg().is_ok());
    }
}
