//! `vmar library domain`: who shares with whom.

use super::Common;
use super::output::{Table, print_json};
use crate::error::Result;
use crate::fingerprint::Algorithm;
use crate::library::{Library, Writer, domain};
use serde::Serialize;

/// Verbs of `vmar library domain`.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Make a domain
    Add {
        /// What to call it
        name: String,
        /// Images of all domains may be read from its images
        #[arg(long)]
        public: bool,
    },
    /// Make a domain the public one; there is no way back
    Publish {
        /// The domain
        name: String,
    },
    /// List the domains
    List,
    /// Remove a domain that has no images
    Remove {
        /// The domain
        name: String,
    },
}

/// A domain as it is printed.
#[derive(Debug, Serialize)]
struct Line {
    name: String,
    public: bool,
    /// Images that are added without `--domain` go there.
    default: bool,
    images: u64,
    nonzero_blocks: u64,
    /// Tells its key from others.
    key_id: Option<String>,
}

/// Runs the verb.
pub fn run(common: &Common, verb: Verb) -> Result<()> {
    let dir = common.library()?;
    match verb {
        Verb::Add { name, public } => domain::add(&mut Writer::open(dir)?, &name, public),
        Verb::Publish { name } => {
            let mut writer = Writer::open(dir)?;
            domain::publish(&mut writer, &name)?;
            // With keys, what the images have in common with it is not known before they are read again.
            let verb = match writer.library().catalog().fingerprint {
                Algorithm::Sha1 => "remap",
                Algorithm::Blake3 => "rebuild",
            };
            println!("images that are in other domains already read from it after 'vmar library {verb}'");
            Ok(())
        }
        Verb::Remove { name } => domain::remove(&mut Writer::open(dir)?, &name),
        Verb::List => list(common, &Library::open(dir)?),
    }
}

fn list(common: &Common, library: &Library) -> Result<()> {
    let catalog = library.catalog();
    let line = |(name, domain): (&String, &domain::Domain)| {
        let of_it = || library.images().iter().filter(|r| r.domain == *name);
        Line {
            name: name.clone(),
            public: domain.public,
            default: *name == catalog.domain,
            images: of_it().count() as u64,
            nonzero_blocks: of_it().map(|r| r.nonzero_blocks).sum(),
            key_id: domain.key.as_ref().map(|key| key.id.clone()),
        }
    };
    let lines: Vec<Line> = catalog.domains.iter().map(line).collect();
    if common.json {
        return print_json(&lines);
    }
    let mut table = Table::new(&["domain", "may be read by", "key", "images", "non-zero blocks"], 3);
    for line in lines {
        table.row(vec![
            line.name,
            if line.public { "all" } else { "itself" }.to_string(),
            line.key_id.unwrap_or_else(|| "-".to_string()),
            line.images.to_string(),
            line.nonzero_blocks.to_string(),
        ]);
    }
    table.print();
    Ok(())
}
