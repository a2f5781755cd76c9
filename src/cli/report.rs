//! `vmar report`: one page with plots, of an evaluation, of a library and its servers, or of both.

use super::Common;
use super::output::print_json;
use crate::error::{Error, ErrorKind, Result};
use crate::library::Library;
use crate::report::page::Page;
use crate::report::points::Evaluation;
use crate::report::{Part, Section, host, similarity};
use serde_json::json;
use std::fs;
use std::path::{Path, PathBuf};

/// Arguments of `vmar report`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What an evaluation measured ('qemu-scripts/evaluate.sh'); without it the report is of the library alone
    dir: Option<PathBuf>,
    /// The page
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    out: PathBuf,
    /// Write the figures there too: a CSV file for each plot and table, an SVG file for each plot
    #[arg(long, value_name = "DIR")]
    csv: Option<PathBuf>,
    /// Of the library, one sharing domain alone
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,
}

/// Runs the verb.
pub fn run(common: &Common, args: &Args) -> Result<()> {
    crate::io::file::raise_open_files();
    let evaluation = args.dir.as_deref().map(Evaluation::read).transpose()?;
    if evaluation.is_none() && common.library.is_none() {
        return Err(Error::new(ErrorKind::Usage, "vmar report", "there is nothing to report")
            .mend("name the directory of an evaluation, or a library (--library DIR)"));
    }
    let mut page = match &evaluation {
        Some(e) => Page { title: e.says.title.clone(), lead: e.says.lead.clone(), sections: e.sections() },
        None => Page { title: "vmar: a library".into(), lead: lead(args.domain.as_deref()), sections: Vec::new() },
    };
    match common.library.as_deref() {
        Some(library) => page.sections.extend(of_library(library, args.domain.as_deref())?),
        None if args.domain.is_some() => {
            common.library()?;
        }
        None => {}
    }
    write(&args.out, &page.html()?)?;
    if let Some(dir) = &args.csv {
        write_files(dir, &page.sections)?;
    }
    if common.json {
        let claims = evaluation.as_ref().map(Evaluation::judged).unwrap_or_default();
        return print_json(&json!({"out": args.out, "figures": ids(&page.sections), "claims": claims}));
    }
    println!("{}: open it in a browser", args.out.display());
    Ok(())
}

fn lead(domain: Option<&str>) -> String {
    let which = domain.map_or(String::new(), |domain| format!(" of the sharing domain {domain}"));
    format!("What the images{which} have in common, what that costs and saves, and what their servers do at present.")
}

/// The sections of a library and of the servers that read it.
fn of_library(dir: &Path, domain: Option<&str>) -> Result<Vec<Section>> {
    Library::consistently(dir, |library| {
        domain.map(|domain| library.catalog().domain(domain)).transpose()?;
        let mut sections = similarity::sections(library, domain)?;
        sections.push(host::section(&super::running::servers(library, domain)?));
        Ok(sections)
    })
}

/// Names of the plots on the page.
fn ids(sections: &[Section]) -> Vec<&str> {
    sections.iter().flat_map(|s| &s.parts).filter_map(plot_id).collect()
}

fn plot_id(part: &Part) -> Option<&str> {
    match part {
        Part::Plot(plot) => Some(&plot.id),
        Part::Table(_) | Part::Note(_) => None,
    }
}

fn write_files(dir: &Path, sections: &[Section]) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, "make the directory", e))?;
    for part in sections.iter().flat_map(|section| &section.parts) {
        let table = match part {
            Part::Table(table) => table,
            Part::Plot(plot) => {
                write(&dir.join(format!("{}.svg", plot.id)), &plot.picture.svg()?)?;
                &plot.data
            }
            Part::Note(_) => continue,
        };
        write(&dir.join(format!("{}.csv", table.id)), &table.csv())?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| Error::io(path, "write", e))
}
