//! `vmar image`: adds images and looks at them.

use super::output::{Progress, Table, percent, print_json, rate};
use super::{Common, lifecycle};
use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::indexer::add::{Added, NewImage, add, preview};
use crate::indexer::stats::shares_of;
use crate::indexer::{Work, read_map};
use crate::library::{ImageRecord, Library, Writer};
use crate::units::human_bytes;
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// Verbs of `vmar image`.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Fingerprint images, find what they share with the others, and write their block maps; all of them or none
    Add {
        /// What to call an image, and its file: raw (used in place) or qcow2/VMDK (converted into the library)
        #[arg(required = true, value_name = "NAME=FILE", value_parser = parse_new_image)]
        images: Vec<NewImage>,
        /// Only say what they would share, and with which images
        #[arg(long)]
        dry_run: bool,
        /// Memory for what grows with an image; more of it goes through scratch files in the library
        #[arg(long, value_name = "N[K|M|G|T]", value_parser = super::overlay::parse_size, default_value = "1G")]
        memory: u64,
    },
    /// Remove an image; maps of images that read from it follow
    Remove(lifecycle::RemoveArgs),
    /// Give an image another content; maps of images that read from the old one follow
    Update(lifecycle::UpdateArgs),
    /// Make an image of a VM's overlay and the image below it
    Capture(lifecycle::CaptureArgs),
    /// Give an image another name
    Rename {
        /// The image
        name: String,
        /// Its new name
        new_name: String,
    },
    /// List the images
    List,
    /// What is known of an image, and which images it shares blocks with
    Show {
        /// The image
        name: String,
    },
    /// Read images again: their bytes and every redirect, against the fingerprints
    Verify(super::verify::Args),
    /// Mend blocks that are not what was added any more, from other images that hold the same
    Repair(super::repair::Args),
}

/// Runs the verb.
pub fn run(common: &Common, verb: Verb) -> Result<()> {
    match verb {
        Verb::Add { images, dry_run, memory } => run_add(common, &images, dry_run, memory),
        Verb::Remove(args) => lifecycle::run_remove(common, &args),
        Verb::Update(args) => lifecycle::run_update(common, &args),
        Verb::Capture(args) => lifecycle::run_capture(common, &args),
        Verb::Rename { name, new_name } => lifecycle::run_rename(common, &name, &new_name),
        Verb::List => run_list(common),
        Verb::Show { name } => run_show(common, &name),
        Verb::Verify(args) => super::verify::run(common, args),
        Verb::Repair(args) => super::repair::run(common, args),
    }
}

fn parse_new_image(text: &str) -> Result<NewImage> {
    let (name, file) = text.split_once('=').ok_or_else(|| {
        Error::new(ErrorKind::Usage, format!("{text:?}"), "is not NAME=FILE").mend("for example web=/images/web.raw")
    })?;
    crate::library::check_name(name)?;
    if file.is_empty() {
        let cause = "no file is named";
        return Err(Error::new(ErrorKind::Usage, text, cause).mend("for example web=/images/web.raw"));
    }
    Ok(NewImage { name: name.to_string(), file: PathBuf::from(file) })
}

/// A flag that Ctrl-C and SIGTERM set. A second Ctrl-C ends the process at once (the next writer cleans up).
pub(super) fn stop_on_signals() -> Result<Arc<AtomicBool>> {
    crate::io::file::raise_open_files();
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register_conditional_shutdown(signal, 1, stop.clone())
            .and_then(|_| signal_hook::flag::register(signal, stop.clone()))
            .map_err(|e| Error::new(ErrorKind::Io, "signals", e))?;
    }
    Ok(stop)
}

fn run_add(common: &Common, images: &[NewImage], dry_run: bool, memory: u64) -> Result<()> {
    let stop = stop_on_signals()?;
    let progress = Progress::new();
    let mut writer = Writer::open(common.library()?)?;
    let work = Work { memory, ..Work::on_all_cores(&stop, &progress) };
    let added = if dry_run { preview(&mut writer, images, &work)? } else { add(&mut writer, images, &work)? };
    drop(progress);
    added.iter().for_each(|a| super::estimate::warn_misaligned(&writer.library().image_path(&a.record)));
    if common.json {
        let names = Names::of(writer.library(), &added);
        let line = |a: &Added| AddedLine {
            image: image_line(writer.library(), &a.record),
            dry_run,
            data_bytes: a.data_bytes,
            hash_seconds: a.hash_time.as_secs_f64(),
            map_seconds: a.map_time.as_secs_f64(),
            shares: names.shares(a),
        };
        return print_json(&added.iter().map(line).collect::<Vec<_>>());
    }
    for outcome in &added {
        print_added(outcome);
    }
    if dry_run {
        print_shares(writer.library(), &added);
    }
    Ok(())
}

/// What `add` prints of an image.
#[derive(Debug, Serialize)]
struct AddedLine {
    #[serde(flatten)]
    image: ImageLine,
    dry_run: bool,
    data_bytes: u64,
    hash_seconds: f64,
    map_seconds: f64,
    shares: Vec<Reads>,
}

/// Names of images by ID, those that are being added among them.
struct Names(std::collections::BTreeMap<crate::units::ImageId, String>);

impl Names {
    fn of(library: &Library, added: &[Added]) -> Names {
        let records = library.images().iter().chain(added.iter().map(|a| &a.record));
        Names(records.map(|r| (r.id, r.name.clone())).collect())
    }

    /// How many of an image's blocks the others hold too, the most first.
    fn shares(&self, added: &Added) -> Vec<Reads> {
        let name = |id| self.0.get(&id).cloned().unwrap_or_default();
        let mut lines: Vec<Reads> =
            added.shares.iter().map(|&(id, blocks)| Reads { name: name(id), id: id.0, blocks }).collect();
        lines.sort_by_key(|r| std::cmp::Reverse(r.blocks));
        lines
    }
}

fn print_shares(library: &Library, added: &[Added]) {
    println!("nothing was changed");
    let names = Names::of(library, added);
    let mut table = Table::new(&["image", "would share with", "blocks", ""], 2);
    for outcome in added {
        for shared in names.shares(outcome) {
            let share = percent(shared.blocks, outcome.totals.nonzero_blocks);
            table.row(vec![outcome.record.name.clone(), shared.name, shared.blocks.to_string(), share]);
        }
    }
    table.print();
}

pub(super) fn print_added(added: &Added) {
    let (record, totals) = (&added.record, &added.totals);
    println!(
        "{}: image {}, {} ({} non-zero); {} read from {} other image{}; {} entries, map {}; hashed {} at {}, map in {:.1} s",
        record.name,
        record.id,
        human_bytes(record.size),
        human_bytes(totals.nonzero_blocks * crate::units::BLOCK_SIZE),
        percent(totals.redirected_blocks, totals.nonzero_blocks),
        added.reads_from.len(),
        if added.reads_from.len() == 1 { "" } else { "s" },
        totals.entries,
        human_bytes(totals.map_bytes),
        human_bytes(added.data_bytes),
        rate(added.data_bytes, added.hash_time),
        added.map_time.as_secs_f64(),
    );
    if let Some(time) = added.convert_time {
        println!("{}: converted in {:.1} s", record.name, time.as_secs_f64());
    }
}

/// An image as `list` and `show` print it.
#[derive(Debug, Serialize)]
pub(super) struct ImageLine {
    name: String,
    id: u32,
    generation: u64,
    path: PathBuf,
    format: String,
    converted_from: Option<PathBuf>,
    size: u64,
    blocks: u64,
    nonzero_blocks: u64,
    digest: String,
    domain: String,
    fingerprint: String,
    /// `ok`, `changed` or `missing`, as far as a look at the file tells.
    state: &'static str,
}

pub(super) fn image_line(library: &Library, record: &ImageRecord) -> ImageLine {
    ImageLine {
        name: record.name.clone(),
        id: record.id.0,
        generation: record.generation,
        path: library.image_path(record),
        format: record.source.as_ref().map_or_else(|| "raw".to_string(), |s| s.format.to_string()),
        converted_from: record.source.as_ref().map(|s| s.path.clone()),
        size: record.size,
        blocks: record.blocks,
        nonzero_blocks: record.nonzero_blocks,
        digest: hex(&record.digest),
        domain: record.domain.clone(),
        fingerprint: record.fingerprint.to_string(),
        state: library.state(record).name(),
    }
}

fn run_list(common: &Common) -> Result<()> {
    let library = Library::open(common.library()?)?;
    let lines: Vec<ImageLine> = library.images().iter().map(|r| image_line(&library, r)).collect();
    if common.json {
        return print_json(&lines);
    }
    let mut table = Table::new(&["name", "format", "state", "file", "id", "size", "non-zero"], 4);
    for line in lines {
        table.row(vec![
            line.name,
            line.format,
            line.state.to_string(),
            line.path.display().to_string(),
            line.id.to_string(),
            human_bytes(line.size),
            percent(line.nonzero_blocks, line.blocks),
        ]);
    }
    table.print();
    Ok(())
}

/// What `show` prints.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    image: ImageLine,
    entries: u64,
    map_bytes: u64,
    redirected_blocks: u64,
    self_redirected_blocks: u64,
    reads_from: Vec<Reads>,
    shares: Vec<Shares>,
}

/// How many distinct contents an image has in common with another one.
#[derive(Debug, Serialize)]
struct Shares {
    name: String,
    id: u32,
    contents: u64,
}

/// How many blocks are read from an image.
#[derive(Debug, Serialize)]
struct Reads {
    name: String,
    id: u32,
    blocks: u64,
}

fn run_show(common: &Common, name: &str) -> Result<()> {
    let shown = Library::consistently(common.library()?, |library| shown(library, name))?;
    if common.json {
        return print_json(&shown);
    }
    print_shown(&shown);
    Ok(())
}

fn shown(library: &Library, name: &str) -> Result<Shown> {
    let record = library.image(name)?;
    let map = read_map(library, record)?;
    let mut reads_from = Vec::new();
    for (target, blocks) in map.targets() {
        let name = library.image_by_id(target.image)?.name.clone();
        reads_from.push(Reads { name, id: target.image.0, blocks });
    }
    let totals = map.totals();
    let mut shares = Vec::new();
    for (id, contents) in shares_of(library, record.id)? {
        shares.push(Shares { name: library.image_by_id(id)?.name.clone(), id: id.0, contents });
    }
    Ok(Shown {
        image: image_line(library, record),
        entries: totals.entries,
        map_bytes: totals.map_bytes,
        redirected_blocks: totals.redirected_blocks,
        self_redirected_blocks: totals.self_redirected_blocks,
        reads_from,
        shares,
    })
}

fn print_shown(shown: &Shown) {
    let image = &shown.image;
    println!("image        {} (ID {}, generation {})", image.name, image.id, image.generation);
    let state = if image.state == "ok" { String::new() } else { format!(" ({})", image.state) };
    println!("file         {}{state}", image.path.display());
    if let Some(from) = &image.converted_from {
        println!("converted    from {} ({})", from.display(), image.format);
    }
    println!("size         {} ({} bytes, {} blocks)", human_bytes(image.size), image.size, image.blocks);
    println!("non-zero     {} blocks ({})", image.nonzero_blocks, percent(image.nonzero_blocks, image.blocks));
    println!("digest       {}", image.digest);
    println!("domain       {}", image.domain);
    println!("map          {} entries, {}", shown.entries, human_bytes(shown.map_bytes));
    let share = percent(shown.redirected_blocks, image.nonzero_blocks);
    println!("redirected   {} blocks ({share}) to other images", shown.redirected_blocks);
    println!("             {} blocks to another block of this image", shown.self_redirected_blocks);
    println!();
    let mut table = Table::new(&["read from", "id", "blocks", ""], 1);
    for reads in &shown.reads_from {
        let share = percent(reads.blocks, image.nonzero_blocks);
        table.row(vec![reads.name.clone(), reads.id.to_string(), reads.blocks.to_string(), share]);
    }
    table.print();
    if shown.shares.is_empty() {
        return;
    }
    println!();
    let mut table = Table::new(&["shares with", "id", "contents"], 1);
    for shares in &shown.shares {
        table.row(vec![shares.name.clone(), shares.id.to_string(), shares.contents.to_string()]);
    }
    table.print();
}
