//! `vmar kept` and `vmar template`: what a store of memory has for migrations to come.

use super::Common;
use super::output::{Table, print_json};
use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::migrate::memory::{build_template, import_template};
use crate::store::dir::Kind;
use crate::store::templates::TemplateFile;
use crate::store::{PackId, Store};
use crate::units::human_bytes;
use clap::Subcommand;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Verbs of `vmar kept`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the memory of VMs that left, and what is known of those that came
    List {
        /// The store ('vmar migrate --store')
        #[arg(long, value_name = "DIR")]
        store: PathBuf,
    },
    /// Forget a VM
    Remove {
        /// The VM
        vm: String,
        /// The store
        #[arg(long, value_name = "DIR")]
        store: PathBuf,
    },
}

/// Verbs of `vmar template`.
#[derive(Debug, Subcommand)]
pub enum TemplateVerb {
    /// Make a template: the pages that several of the VMs hold that left this host
    Build {
        /// The store
        #[arg(long, value_name = "DIR")]
        store: PathBuf,
        /// Sharing domain of the VMs
        #[arg(long, value_name = "NAME", default_value = "default")]
        domain: String,
        /// How many of the VMs have to hold a page
        #[arg(long, value_name = "K", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..))]
        share: u16,
        /// Pages of the template, at most, those that most VMs hold first
        #[arg(long, value_name = "N", default_value_t = 262_144, value_parser = clap::value_parser!(u32).range(1..=i64::from(crate::store::pack::PAGES_MAX)))]
        pages_max: u32,
    },
    /// List the templates
    List {
        /// The store
        #[arg(long, value_name = "DIR")]
        store: PathBuf,
    },
    /// Take a template from another host's store; the file keeps its name
    Import {
        /// The file (its path is in 'vmar template list')
        file: PathBuf,
        /// The store
        #[arg(long, value_name = "DIR")]
        store: PathBuf,
        /// Sharing domain of the VMs that it is for
        #[arg(long, value_name = "NAME", default_value = "default")]
        domain: String,
    },
    /// Remove a template
    Remove {
        /// Which one
        version: u64,
        /// The store
        #[arg(long, value_name = "DIR")]
        store: PathBuf,
        /// Sharing domain
        #[arg(long, value_name = "NAME", default_value = "default")]
        domain: String,
    },
}

/// Runs a verb of `vmar kept`.
pub fn run(common: &Common, verb: Verb) -> Result<()> {
    match verb {
        Verb::List { store } => list(common, &store),
        Verb::Remove { vm, store } => {
            let mut writer = Store::open(&store)?.writer()?;
            let mut found = false;
            for kind in [Kind::Kept, Kind::Gone] {
                found |= writer.remove(kind, &vm)?;
            }
            if found {
                return Ok(());
            }
            Err(Error::file(ErrorKind::NotFound, store, format!("nothing is kept of a VM {vm}"))
                .mend("see 'vmar kept list'"))
        }
    }
}

fn list(common: &Common, dir: &Path) -> Result<()> {
    let store = Store::open(dir)?;
    let mut table = Table::new(&["vm", "is", "domain", "memory", "pages kept", "age"], 3);
    let mut lines = Vec::new();
    for (kind, is) in [(Kind::Kept, "kept"), (Kind::Gone, "gone")] {
        for entry in store.entries(kind)? {
            let Some(image) = store.image(kind, &entry.vm)? else { continue };
            let memory: u64 = image.blocks.iter().map(|b| b.len).sum();
            let pages = image.pages.iter().filter(|p| p.hash != crate::store::manifest::ZERO).count();
            let age = SystemTime::now().duration_since(entry.written).unwrap_or_default().as_secs();
            lines
                .push(json!({"vm": entry.vm, "is": is, "domain": image.domain, "memory_bytes": memory, "pages": pages,
                "age_s": age, "root": hex(&image.root())}));
            table.row(vec![
                entry.vm,
                is.into(),
                image.domain,
                human_bytes(memory),
                pages.to_string(),
                format!("{age} s"),
            ]);
        }
    }
    let bytes = store.bytes()?;
    if common.json {
        return print_json(&json!({"images": lines, "bytes": bytes}));
    }
    table.print();
    println!("{} in all", human_bytes(bytes));
    Ok(())
}

/// Runs a verb of `vmar template`.
pub fn run_template(common: &Common, verb: TemplateVerb) -> Result<()> {
    match verb {
        TemplateVerb::Build { store, domain, share, pages_max } => {
            let mut writer = Store::open(&store)?.writer()?;
            let most = usize::try_from(pages_max).unwrap_or(usize::MAX);
            let (file, pages) = build_template(&mut writer, &domain, share.into(), most)?;
            tell(common, &file, pages)
        }
        TemplateVerb::List { store } => list_templates(common, &store),
        TemplateVerb::Import { file, store, domain } => {
            let mut writer = Store::create(&store)?.writer()?;
            let file = import_template(&mut writer, &domain, &file)?;
            let pages = file.open()?.hashes().len();
            tell(common, &file, pages)
        }
        TemplateVerb::Remove { version, store, domain } => {
            Store::open(&store)?.writer()?.remove_template(&domain, version)
        }
    }
}

fn line(file: &TemplateFile, pages: usize) -> serde_json::Value {
    let PackId(id) = file.id;
    json!({"domain": file.domain, "version": file.version, "id": hex(&id), "pages": pages, "path": file.path})
}

fn tell(common: &Common, file: &TemplateFile, pages: usize) -> Result<()> {
    if common.json {
        return print_json(&line(file, pages));
    }
    println!("template {} of domain {}: {pages} pages, {}", file.version, file.domain, file.path.display());
    Ok(())
}

fn list_templates(common: &Common, dir: &Path) -> Result<()> {
    let mut table = Table::new(&["domain", "version", "pages", "file"], 1);
    let mut lines = Vec::new();
    for file in Store::open(dir)?.templates(None)? {
        let pages = file.open()?.hashes().len();
        lines.push(line(&file, pages));
        table.row(vec![
            file.domain.clone(),
            file.version.to_string(),
            pages.to_string(),
            file.path.display().to_string(),
        ]);
    }
    if common.json {
        return print_json(&lines);
    }
    table.print();
    Ok(())
}
