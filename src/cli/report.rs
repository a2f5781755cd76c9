//! `vmar report`: one page with plots, of an evaluation, of a library, or of both.

use super::Common;
use crate::error::{Error, ErrorKind, Result};
use crate::library::Library;
use crate::report::{Part, Section, Table, page, points, similarity};
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
    /// Write the figures there too, a CSV file for each plot and table
    #[arg(long, value_name = "DIR")]
    csv: Option<PathBuf>,
    /// Of the library, one sharing domain alone
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,
}

/// Runs the verb.
pub fn run(common: &Common, args: &Args) -> Result<()> {
    crate::io::file::raise_open_files();
    let mut sections = Vec::new();
    let (mut title, mut lead) = ("vmar: a library".to_string(), String::new());
    if let Some(dir) = &args.dir {
        let (evaluation, points) = points::read(dir)?;
        sections.extend(points::sections(&evaluation, &points));
        (title, lead) = (evaluation.title, evaluation.lead);
    } else if common.library.is_none() {
        return Err(Error::new(ErrorKind::Usage, "vmar report", "there is nothing to report")
            .mend("name the directory of an evaluation, or a library (--library DIR)"));
    }
    if common.library.is_some() {
        let domain = args.domain.as_deref();
        sections.extend(Library::consistently(common.library()?, |library| {
            domain.map(|domain| library.catalog().domain(domain)).transpose()?;
            similarity::sections(library, domain)
        })?);
        if args.dir.is_none() {
            lead = "What its images have in common, and what that costs and saves.".to_string();
        }
    }
    write(&args.out, &page::html(&title, &lead, &sections)?)?;
    if let Some(dir) = &args.csv {
        write_csv(dir, &sections)?;
    }
    println!("{}: open it in a browser", args.out.display());
    Ok(())
}

fn write_csv(dir: &Path, sections: &[Section]) -> Result<()> {
    fs::create_dir_all(dir).map_err(|e| Error::io(dir, "make the directory", e))?;
    for part in sections.iter().flat_map(|section| &section.parts) {
        let table = match part {
            Part::Table(table) => table.clone(),
            Part::Plot { id, chart, .. } => Table { id: id.clone(), ..chart.table() },
        };
        write(&dir.join(format!("{}.csv", table.id)), &table.csv())?;
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).map_err(|e| Error::io(path, "write", e))
}
