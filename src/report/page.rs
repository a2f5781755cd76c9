//! The page: HTML that carries everything it needs, reads on a phone, and prints.

use super::chart::{COLORS, Chart, svg};
use super::{Cell, Part, Section, Table};
use crate::error::Result;
use std::fmt::Write;

/// Looks. Figures flow in as many columns as fit, tables scroll by themselves, nothing is cut when printed.
const STYLE: &str = "
:root{color-scheme:light}*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff;margin:0 auto;max-width:76rem;padding:1rem}
h1{font-size:1.7rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.25rem;margin:2.2rem 0 .3rem;border-bottom:2px solid #ddd}
p{max-width:48rem;margin:.4rem 0}.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,28rem),1fr));gap:1.2rem}
figure{margin:.8rem 0;break-inside:avoid}figure svg{width:100%;height:auto;display:block}
figcaption{font-size:.9rem;color:#444}.legend{font-size:.85rem;margin:.2rem 0;display:flex;flex-wrap:wrap;gap:.2rem 1rem}
.legend i{display:inline-block;width:1.1rem;height:.25rem;margin-right:.35rem;vertical-align:middle}
.wide{overflow-x:auto;margin:.8rem 0}table{border-collapse:collapse;font-size:.88rem;min-width:20rem}
caption{text-align:left;color:#444;font-size:.9rem;padding-bottom:.2rem}
th,td{padding:.18rem .6rem;border-bottom:1px solid #e4e4e4;text-align:left;white-space:nowrap}td.n,th.n{text-align:right}
td .bar{display:block;height:.3rem;background:#0072b2;min-width:1px}
@media print{body{max-width:none;padding:0;font-size:11pt}.wide{overflow:visible}h2{break-after:avoid}table{font-size:8pt}}
";

/// The text of the page.
///
/// # Errors
/// When a plot has no point.
pub fn html(title: &str, lead: &str, sections: &[Section]) -> Result<String> {
    let mut out = String::from("<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">");
    out.push_str("<meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">");
    put(&mut out, format_args!("<title>{}</title><style>{STYLE}</style></head><body>\n", escape(title)));
    put(&mut out, format_args!("<h1>{}</h1>\n<p>{}</p>\n", escape(title), escape(lead)));
    for section in sections {
        put(&mut out, format_args!("<section><h2>{}</h2>\n<p>{}</p>\n", escape(&section.title), escape(&section.text)));
        let mut parts = section.parts.iter().peekable();
        while let Some(part) = parts.next() {
            match part {
                Part::Table(table) => put_table(&mut out, table),
                Part::Plot { .. } => {
                    out.push_str("<div class=\"plots\">\n");
                    put_plot(&mut out, part)?;
                    while let Some(next) = parts.next_if(|p| matches!(p, Part::Plot { .. })) {
                        put_plot(&mut out, next)?;
                    }
                    out.push_str("</div>\n");
                }
            }
        }
        out.push_str("</section>\n");
    }
    out.push_str("</body></html>\n");
    Ok(out)
}

fn put_plot(out: &mut String, part: &Part) -> Result<()> {
    let Part::Plot { id, caption, chart } = part else { return Ok(()) };
    put(out, format_args!("<figure id=\"{}\">{}", escape(id), svg(chart)?));
    put_legend(out, chart);
    put(out, format_args!("<figcaption>{}</figcaption></figure>\n", escape(caption)));
    Ok(())
}

fn put_legend(out: &mut String, chart: &Chart) {
    out.push_str("<div class=\"legend\">");
    for (series, color) in chart.series.iter().zip(COLORS.iter().cycle()) {
        put(out, format_args!("<span><i style=\"background:{color}\"></i>{}</span>", escape(&series.name)));
    }
    if let Some((value, what)) = &chart.limit {
        put(out, format_args!("<span>dashed: {} ({})</span>", escape(what), super::chart::number(*value)));
    }
    out.push_str("</div>");
}

fn put_table(out: &mut String, table: &Table) {
    put(out, format_args!("<div class=\"wide\"><table id=\"{}\"><caption>{}</caption><tr>", escape(&table.id), escape(&table.caption)));
    let is_number = |column: usize| table.rows.iter().any(|r| matches!(r.get(column), Some(Cell::Number { .. })));
    for (column, name) in table.head.iter().enumerate() {
        let class = if is_number(column) { " class=\"n\"" } else { "" };
        put(out, format_args!("<th{class}>{}</th>", escape(name)));
    }
    out.push_str("</tr>\n");
    for row in &table.rows {
        out.push_str("<tr>");
        for cell in row {
            match cell {
                Cell::Text(text) => put(out, format_args!("<td>{}</td>", escape(text))),
                Cell::Number { text, bar: None, .. } => put(out, format_args!("<td class=\"n\">{}</td>", escape(text))),
                Cell::Number { text, bar: Some(share), .. } => put(
                    out,
                    format_args!(
                        "<td class=\"n\">{}<span class=\"bar\" style=\"width:{:.1}%\"></span></td>",
                        escape(text),
                        100.0 * share
                    ),
                ),
            }
        }
        out.push_str("</tr>\n");
    }
    out.push_str("</table></div>\n");
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
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::super::chart::{Axis, Point, Series};
    use super::*;

    #[test]
    fn a_page_needs_nothing_else_and_names_stay_text() {
        let series = vec![Series { name: "a<b".into(), points: vec![Point { x: 1.0, y: 2.0, deviation: 0.0 }], steps: false }];
        let chart = Chart { x: Axis::linear("x"), y: Axis::linear("y"), series, limit: None };
        let parts = vec![
            Part::Plot { id: "p".into(), caption: "a & b".into(), chart },
            Part::Table(Table { head: vec!["<h>".into()], rows: vec![vec![Cell::bar(1.0, "1", 0.5)]], ..Table::default() }),
        ];
        let page = html("<script>", "\"lead\"", &[Section { title: "s".into(), text: "t".into(), parts }]).unwrap();
        assert!(!page.contains("<script") && page.contains("&lt;script&gt;") && page.contains("a&lt;b"), "{page}");
        for outside in ["http:", "https:", "src=", "@import", "url("] {
            let without_namespace = page.replace("http://www.w3.org/2000/svg", "");
            assert!(!without_namespace.contains(outside), "{outside}");
        }
        assert!(page.contains("width:50.0%"));
    }
}
