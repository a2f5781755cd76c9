//! The page: HTML that carries everything it needs, reads on a phone, and prints.

use super::{Cell, Part, Picture, Plot, Section, Table};
use crate::error::Result;
use std::fmt::Write;

/// Looks. Plots flow in as many columns as fit, tables scroll by themselves, but that of the claims, whose verdicts must not be
/// out of sight on a phone; nothing is cut when printed.
const STYLE: &str = "
:root{color-scheme:light}*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;margin:0 auto;max-width:78rem;padding:1rem;overflow-wrap:anywhere}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.25rem;line-height:1.25;margin:2.2rem 0 .4rem;border-bottom:2px solid #ddd}
p{max-width:48rem;margin:.4rem 0}
nav{font-size:.9rem;display:flex;flex-wrap:wrap;gap:.1rem 1rem;margin:.6rem 0}a{color:#0058a0}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,23rem),1fr));gap:.4rem 1.4rem;align-items:start}
.plots.two{grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr))}.plots.two figure{max-width:40rem}
figure{margin:.8rem 0;min-width:0;break-inside:avoid}
svg{width:100%;height:auto;display:block}figure .wide{margin:0}
figcaption{font-size:.9rem;color:#333;margin-top:.3rem}figcaption span{display:block}figcaption b{font-weight:600}
.wide{overflow-x:auto;margin:.8rem 0}.wide.many svg{min-width:34rem}
table{border-collapse:collapse;font-size:.88rem;line-height:1.35}
p.caption{color:#333;font-size:.9rem;margin:1rem 0 -.4rem}
th,td{padding:.25rem .6rem;border-bottom:1px solid #e4e4e4;text-align:left;vertical-align:top;white-space:nowrap}
th{vertical-align:bottom;white-space:normal;min-width:4.2rem;overflow-wrap:normal}
td.n,th.n{text-align:right}td.t{white-space:normal;min-width:13rem}
td .bar{display:block;height:.3rem;background:#0072b2;min-width:1px;margin-left:auto}
tr.sum td{border-top:2px solid #888;font-weight:600}
.yes{color:#00604a;font-weight:600}.no{color:#a33c00;font-weight:600}.open{color:#555}
@media screen and (max-width:36rem){#claims thead{display:none}#claims tr{display:block;padding:.4rem 0;border-bottom:1px solid #ccc}
#claims td{display:block;border:0;padding:0;white-space:normal}#claims td:empty{display:none}#claims td:nth-child(2){font-weight:600}
#claims td:nth-child(1):before{content:\"figure \"}#claims td:nth-child(3):before{content:\"paper: \"}#claims td:nth-child(4):before{content:\"target: \"}#claims td:nth-child(5):before{content:\"ours: \"}}
.note{color:#444;border-left:3px solid #bbb;padding-left:.7rem}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
@media print{@page{margin:14mm}body{max-width:none;padding:0;font-size:10.5pt;color:#000}nav{display:none}
h2{break-after:avoid;margin-top:0}section{break-before:page}section:first-of-type{break-before:auto}
.plots{display:block}.plots figure{display:inline-block;width:48%;margin:0 .5% 1rem;vertical-align:top}
.plots.two figure{display:block;width:82%}.wide.many svg{min-width:0!important}svg{max-height:21cm}
.wide{overflow:visible}table{font-size:7.5pt;width:100%}th,td{white-space:normal;padding:.12rem .3rem;min-width:0!important;overflow-wrap:normal}td.n{white-space:nowrap}
table.dense{font-size:5.5pt}table.dense th,table.dense td{padding:.1rem .15rem;white-space:normal;overflow-wrap:anywhere}
thead{display:table-header-group}tr{break-inside:avoid}p.caption{break-after:avoid;margin-bottom:.1rem}figcaption,.caption,.note,.open{color:#000}}
";

/// What is on the page.
#[derive(Clone, Debug, Default)]
pub struct Page {
    /// Its title.
    pub title: String,
    /// What it is about, in a sentence or two.
    pub lead: String,
    /// Its sections.
    pub sections: Vec<Section>,
}

impl Page {
    /// The text of the page.
    ///
    /// # Errors
    /// When a plot cannot be drawn.
    pub fn html(&self) -> Result<String> {
        let mut out = String::from("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
        out.push_str("<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">");
        let title = escape(&self.title);
        put(&mut out, format_args!("<title>{title}</title><style>{STYLE}</style></head><body>\n"));
        put(&mut out, format_args!("<h1>{title}</h1>\n<p>{}</p>\n<nav>", escape(&self.lead)));
        for (number, section) in self.sections.iter().enumerate() {
            put(&mut out, format_args!("<a href=\"#s{number}\">{}</a>", escape(&section.title)));
        }
        out.push_str("</nav>\n");
        for (number, section) in self.sections.iter().enumerate() {
            put_section(&mut out, number, section)?;
        }
        out.push_str("</body></html>\n");
        Ok(out)
    }
}

fn put_section(out: &mut String, number: usize, section: &Section) -> Result<()> {
    put(out, format_args!("<section id=\"s{number}\"><h2>{}</h2>\n", escape(&section.title)));
    if !section.text.is_empty() {
        put(out, format_args!("<p>{}</p>\n", escape(&section.text)));
    }
    let mut parts = section.parts.iter().peekable();
    while let Some(part) = parts.next() {
        match part {
            Part::Table(table) => put_table(out, table),
            Part::Note(text) => put(out, format_args!("<p class=\"note\">{}</p>\n", escape(text))),
            Part::Plot(plot) => {
                let is_large = plot.is_large();
                out.push_str(if is_large { "<div class=\"plots two\">\n" } else { "<div class=\"plots\">\n" });
                put_plot(out, plot)?;
                let alike = |p: &&Part| matches!(p, Part::Plot(next) if next.is_large() == is_large);
                while let Some(Part::Plot(next)) = parts.next_if(alike) {
                    put_plot(out, next)?;
                }
                out.push_str("</div>\n");
            }
        }
    }
    out.push_str("</section>\n");
    Ok(())
}

fn put_plot(out: &mut String, plot: &Plot) -> Result<()> {
    let svg = inline(&plot.picture.svg()?, &plot.caption);
    let id = escape(&plot.id);
    // Of so many rows the text would be too small where the page is narrow.
    let many = matches!(&plot.picture, Picture::Square(square) if square.names.len() > ROWS_MAX);
    let class = if many { "wide many" } else { "wide" };
    put(out, format_args!("<figure id=\"{id}\"><div class=\"{class}\">{svg}</div>"));
    put(out, format_args!("<figcaption>{}", escape(&plot.caption)));
    for (name, text) in &plot.told {
        put(out, format_args!("<span><b>{}:</b> {}</span>", escape(name), escape(text)));
    }
    out.push_str("</figcaption></figure>\n");
    Ok(())
}

/// A picture as part of a page: as wide as there is room for, with a name for those who hear it.
fn inline(svg: &str, caption: &str) -> String {
    let (head, rest) = svg.split_once('>').unwrap_or(("", svg));
    let view = head.split_once("viewBox=\"").and_then(|(_, rest)| rest.split('"').next()).unwrap_or_default();
    // Shorter, and the same: families, opacity and the namespace are those of the page.
    let rest =
        rest.replace(" opacity=\"1\"", "").replace(" font-family=\"sans-serif\"", "").replace(" stroke=\"none\"", "");
    let label = escape(caption);
    format!(
        "<svg role=\"img\" aria-label=\"{label}\" viewBox=\"{view}\" font-family=\"sans-serif\">{}",
        rest.trim_end()
    )
}

/// Rows of a square that are legible on a phone.
const ROWS_MAX: usize = 20;

/// Columns that fit on paper in letters of the usual size.
const COLUMNS_MAX: usize = 10;

/// Text that is longer may be broken.
const WORDS: usize = 28;

fn put_table(out: &mut String, table: &Table) {
    let id = escape(&table.id);
    if !table.caption.is_empty() {
        put(out, format_args!("<p class=\"caption\" id=\"{id}-caption\">{}</p>", escape(&table.caption)));
    }
    let dense = if table.head.len() > COLUMNS_MAX { " class=\"dense\"" } else { "" };
    put(out, format_args!("<div class=\"wide\"><table{dense} id=\"{id}\" aria-describedby=\"{id}-caption\">"));
    let is_number = |column: usize| table.rows.iter().any(|r| matches!(r.get(column), Some(Cell::Number { .. })));
    if table.head.iter().any(|name| !name.is_empty()) {
        out.push_str("<thead><tr>");
        for (column, name) in table.head.iter().enumerate() {
            let class = if is_number(column) { " class=\"n\"" } else { "" };
            put(out, format_args!("<th{class}>{}</th>", escape(name)));
        }
        out.push_str("</tr></thead>");
    }
    out.push_str("<tbody>\n");
    let shown = if table.rows_max == 0 { table.rows.len() } else { table.rows_max };
    for row in table.rows.iter().take(shown) {
        let is_sum = matches!(row.first(), Some(Cell::Text(text)) if text == super::host::TOTAL);
        out.push_str(if is_sum { "<tr class=\"sum\">" } else { "<tr>" });
        row.iter().for_each(|cell| put_cell(out, cell));
        out.push_str("</tr>\n");
    }
    out.push_str("</tbody></table></div>\n");
    if table.rows.len() > shown {
        let rest = table.rows.len() - shown;
        put(out, format_args!("<p class=\"note\">{rest} more: {id}.csv (--csv DIR) has all.</p>\n"));
    }
}

fn put_cell(out: &mut String, cell: &Cell) {
    match cell {
        Cell::Text(text) if text.chars().count() > WORDS => {
            put(out, format_args!("<td class=\"t\">{}</td>", escape(text)))
        }
        Cell::Text(text) => put(out, format_args!("<td>{}</td>", escape(text))),
        Cell::Verdict { text, good } => {
            let (class, sign) = match good {
                Some(true) => ("yes", "✓ "),
                Some(false) => ("no", "✗ "),
                None => ("open", ""),
            };
            put(out, format_args!("<td class=\"{class}\">{sign}{}</td>", escape(text)));
        }
        Cell::Number { text, bar: None, .. } => put(out, format_args!("<td class=\"n\">{}</td>", escape(text))),
        Cell::Number { text, bar: Some(share), .. } => {
            let bar = format!("<span class=\"bar\" style=\"width:{:.1}%\"></span>", 100.0 * share);
            put(out, format_args!("<td class=\"n\">{}{bar}</td>", escape(text)));
        }
    }
}

/// Writing to a string does not fail.
fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(text);
}

/// Names come from files, and must stay text.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::chart::{Axis, Chart, Point, Series};
    use super::*;

    #[test]
    fn a_page_needs_nothing_else_and_names_stay_text() {
        let points = vec![Point { x: 1.0, y: 2.0, deviation: 0.0 }];
        let series = vec![Series { name: "a<b".into(), points, ..Series::default() }];
        let chart = Chart { x: Axis { label: "x".into(), log: false }, y: "y".into(), series };
        let hostile = "<script>alert(1)</script>";
        let table = Table {
            id: "t".into(),
            head: vec!["<h>".into()],
            rows: vec![vec![Cell::bar(1.0, "1", 0.5)], vec![Cell::text(hostile)]],
            rows_max: 2,
            ..Table::default()
        };
        let plot = Plot::new("p", "a & \"b\"", Picture::Lines(chart));
        let parts = vec![Part::Plot(plot), Part::Table(table), Part::Note(hostile.into())];
        let sections = vec![Section { title: hostile.into(), text: "t".into(), parts }];
        let page = Page { title: "<script>".into(), lead: "\"lead\"\u{0}".into(), sections }.html().unwrap();
        assert!(!page.contains("<script") && page.contains("&lt;script&gt;") && page.contains("a&lt;b"), "{page}");
        for outside in ["http:", "https:", "src=", "@import", "url(", "//", "\u{0}"] {
            assert!(!page.contains(outside), "{outside}");
        }
        assert!(page.contains("width:50.0%") && page.contains("aria-label=\"a &amp; &quot;b&quot;\""));
    }

    #[test]
    fn rows_beyond_the_most_are_told_of() {
        let rows = (0..5).map(|i| vec![Cell::text(format!("row{i}"))]).collect();
        let table = Table { id: "long".into(), rows, rows_max: 2, ..Table::default() };
        let mut out = String::new();
        put_table(&mut out, &table);
        assert!(out.contains("row1") && !out.contains("row2") && out.contains("3 more: long.csv"), "{out}");
        assert_eq!(table.csv().lines().count(), 6);
    }
}
