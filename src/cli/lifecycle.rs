//! `vmar image remove`, `update`, `capture`, `rename`.

use super::Common;
use super::image::{image_line, print_added, stop_on_signals};
use super::output::{Progress, Table, percent, print_json};
use super::overlay::StateDir;
use super::tell::tell_and_warn;
use crate::error::{Error, ErrorKind, Result};
use crate::indexer::capture::{Capture, capture};
use crate::indexer::lifecycle::{remove, rename, sweep, update};
use crate::indexer::remap::Remapped;
use crate::indexer::{Observer, Work};
use crate::library::{ImageRecord, Library, Live, Writer, lease};
use crate::overlay::{self, OpenOptions, Overlay, State};
use crate::units::{ImageId, human_bytes};
use std::path::{Path, PathBuf};

/// What `image remove` takes.
#[derive(Debug, clap::Args)]
pub struct RemoveArgs {
    /// The image
    name: String,
    /// Only say what would become of the images that read from it
    #[arg(long)]
    dry_run: bool,
    /// Remove it even if overlays were made on it: they cannot be served any more
    #[arg(long)]
    force: bool,
}

/// What `image update` takes.
#[derive(Debug, clap::Args)]
pub struct UpdateArgs {
    /// The image
    name: String,
    /// Its new content: raw (used in place), qcow2 or VMDK (converted into the library)
    file: PathBuf,
    /// Give up the old content even if overlays were made on it; without this it stays as NAME@GENERATION
    #[arg(long)]
    force: bool,
}

/// What `image capture` takes.
#[derive(Debug, clap::Args)]
pub struct CaptureArgs {
    /// What to call the new image
    name: String,
    /// The overlay of a VM that does not run; it stays as it is
    #[arg(long, value_name = "FILE")]
    overlay: PathBuf,
    /// Where its live state is
    #[command(flatten)]
    state: StateDir,
}

/// Runs `image remove`.
pub fn run_remove(common: &Common, args: &RemoveArgs) -> Result<()> {
    let stop = stop_on_signals()?;
    let progress = Progress::new();
    let mut writer = Writer::open(common.library()?)?;
    let record = writer.library().image(&args.name)?.clone();
    let overlays = known_overlays(writer.library(), &record)?;
    if !args.force && !args.dry_run {
        refuse_served(writer.library(), &record)?;
        refuse_overlays(&record, &overlays)?;
    }
    let work = Work::on_all_cores(&stop, &progress);
    let removal = remove(&mut writer, &args.name, !args.dry_run, &work)?;
    drop(progress);
    if !args.dry_run {
        tidy_up(&mut writer);
    }
    // Somebody reads it still.
    let is_kept = writer.library().catalog().removed.iter().any(|r| r.id == record.id);
    if common.json {
        return print_json(&serde_json::json!({
            "name": record.name,
            "id": record.id.0,
            "dry_run": args.dry_run,
            "overlays": overlays,
            "file": writer.library().image_path(&record),
            "file_removed": !args.dry_run && removal.file_goes && !is_kept,
            "followed": removal.followed.iter().map(followed_json).collect::<Vec<_>>(),
        }));
    }
    let would = if args.dry_run { "would go" } else { "is gone" };
    let file = match (removal.file_goes, is_kept) {
        (true, false) => "with the raw file that vmar made of it",
        (true, true) => "the raw file that vmar made of it goes when no server reads it any more",
        (false, _) => "its raw file stays",
    };
    println!("{}: {would}, {file}", record.name);
    print_overlays(&overlays);
    print_followed(&removal.followed);
    Ok(())
}

/// Runs `image update`.
pub fn run_update(common: &Common, args: &UpdateArgs) -> Result<()> {
    let stop = stop_on_signals()?;
    let progress = Progress::new();
    let mut writer = Writer::open(common.library()?)?;
    let record = writer.library().image(&args.name)?.clone();
    let overlays = known_overlays(writer.library(), &record)?;
    // Also for a VM without an overlay that runs on it just now.
    let is_served = refuse_served(writer.library(), &record).is_err();
    let keep = (is_served || !overlays.is_empty()) && !args.force;
    let work = Work::on_all_cores(&stop, &progress);
    let updated = update(&mut writer, &args.name, &args.file, keep, &work)?;
    drop(progress);
    tidy_up(&mut writer);
    if common.json {
        return print_json(&serde_json::json!({
            "image": image_line(writer.library(), &updated.added.record),
            "kept": updated.kept,
            "overlays": overlays,
            "followed": updated.followed.iter().map(followed_json).collect::<Vec<_>>(),
        }));
    }
    print_added(&updated.added);
    match &updated.kept {
        Some(kept) => println!("the old content stays as {kept}, for VMs that were made on it"),
        None => println!("the old content is gone"),
    }
    print_overlays(&overlays);
    print_followed(&updated.followed);
    Ok(())
}

/// Runs `image rename`.
pub fn run_rename(common: &Common, old: &str, new: &str) -> Result<()> {
    let mut writer = Writer::open(common.library()?)?;
    let renamed = rename(&mut writer, old, new)?;
    tidy_up(&mut writer);
    if common.json {
        let line = |(from, to): &(String, String)| serde_json::json!({ "from": from, "to": to });
        return print_json(&renamed.iter().map(line).collect::<Vec<_>>());
    }
    renamed.iter().for_each(|(from, to)| println!("{from} is {to} now"));
    Ok(())
}

/// Runs `image capture`.
pub fn run_capture(common: &Common, args: &CaptureArgs) -> Result<()> {
    let stop = stop_on_signals()?;
    let progress = Progress::new();
    let mut writer = Writer::open(common.library()?)?;
    let state_dir = args.state.path();
    let opts = OpenOptions { read_only: true, state_dir: &state_dir, base: None, discard_unflushed: false };
    let overlay = Overlay::open(&args.overlay, &opts)?;
    let base = base_of(writer.library(), &args.overlay, &overlay)?;
    let changed: Vec<_> = overlay
        .runs(0, overlay.size())
        .filter(|run| run.state != State::Base)
        .map(|run| run.offset..run.offset + run.len)
        .collect();
    let begin = |what: &str, total| progress.begin(what, total);
    let advance = |bytes| progress.advance(bytes);
    let copying = overlay::Work { stop: &stop, begin: &begin, advance: &advance };
    let write = |from: &Path, to: &Path| {
        overlay::commit(&overlay, from, to, &copying)?;
        progress.end();
        Ok(())
    };
    let source = std::path::absolute(&args.overlay).map_err(|e| Error::io(&args.overlay, "find it", e))?;
    let what = Capture {
        name: &args.name,
        base: &base,
        overlay: &source,
        size: overlay.size(),
        changed: &changed,
        write: &write,
    };
    let added = capture(&mut writer, &what, &Work::on_all_cores(&stop, &progress))?;
    drop(progress);
    if common.json {
        return print_json(&image_line(writer.library(), &added.record));
    }
    print_added(&added);
    Ok(())
}

/// The image below an overlay.
fn base_of(library: &Library, file: &Path, overlay: &Overlay) -> Result<ImageRecord> {
    let digest = overlay.base().digest;
    library.images().iter().find(|r| r.digest == digest).cloned().ok_or_else(|| {
        let cause = "was made for an image that this library does not have";
        Error::file(ErrorKind::Changed, file, cause).mend("name the library of its image")
    })
}

/// The overlays that are known on an image. One that cannot be looked into counts.
fn known_overlays(library: &Library, record: &ImageRecord) -> Result<Vec<PathBuf>> {
    let is_of = |path: &Path| overlay::base_of(path).map_or(true, |base| base.digest == record.digest);
    // Another image of the same content serves them as well.
    if library.images().iter().any(|r| r.digest == record.digest && r.id != record.id) {
        return Ok(Vec::new());
    }
    library.overlays_on(&record.digest, is_of)
}

fn refuse_overlays(record: &ImageRecord, overlays: &[PathBuf]) -> Result<()> {
    let Some(first) = overlays.first() else { return Ok(()) };
    let more = match overlays.len() {
        1 => String::new(),
        n => format!(" and {} more", n - 1),
    };
    let cause = format!("overlays were made on it: {}{more}", first.display());
    Err(Error::new(ErrorKind::Busy, format!("image {}", record.name), cause)
        .mend("remove them first, or give --force: they cannot be served any more then"))
}

/// Tells the servers, and removes files that nobody reads any more. What is committed is committed: the rest is for the next
/// command to do if it fails.
fn tidy_up(writer: &mut Writer) {
    tell_and_warn(writer.library());
    let swept = lease::live(writer.library().dir()).and_then(|live| {
        let is_needed = |id: ImageId, generation| live.iter().any(|lease| lease.covers(id.0, generation));
        sweep(writer, is_needed)
    });
    if let Err(e) = swept {
        log::warn!("files of removed images stay for now: {e}");
    }
}

/// Refuses to take away the image that a server serves.
fn refuse_served(library: &Library, record: &ImageRecord) -> Result<()> {
    let serves = |lease: &Live| match lease {
        Live::Known(info) => info.image_id == record.id.0,
        Live::Unknown(_) => true,
    };
    match lease::live(library.dir())?.iter().find(|lease| serves(lease)) {
        None => Ok(()),
        Some(lease) => Err(Error::new(ErrorKind::Busy, format!("image {}", record.name), format!("{lease} uses it"))
            .mend("stop that VM first, or give --force: it goes on, and cannot be started again")),
    }
}

fn print_overlays(overlays: &[PathBuf]) {
    overlays.iter().for_each(|path| println!("overlay {}", path.display()));
}

fn followed_json(followed: &Remapped) -> serde_json::Value {
    serde_json::json!({
        "name": followed.name,
        "nonzero_blocks": followed.totals.nonzero_blocks,
        "redirected_blocks": followed.totals.redirected_blocks,
        "entries": followed.totals.entries,
        "map_bytes": followed.totals.map_bytes,
        "reads_from": followed.reads_from.iter().map(|id| id.0).collect::<Vec<_>>(),
    })
}

fn print_followed(followed: &[Remapped]) {
    if followed.is_empty() {
        println!("no other image read from it");
        return;
    }
    let mut table = Table::new(&["new map of", "redirected", "from images", "entries", "map"], 1);
    for f in followed {
        table.row(vec![
            f.name.clone(),
            percent(f.totals.redirected_blocks, f.totals.nonzero_blocks),
            f.reads_from.len().to_string(),
            f.totals.entries.to_string(),
            human_bytes(f.totals.map_bytes),
        ]);
    }
    table.print();
}
