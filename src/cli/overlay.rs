//! `vmar overlay`: make overlays and look at them.

use super::Common;
use super::image::stop_on_signals;
use super::output::{Progress, print_json};
use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::indexer::Observer;
use crate::library::{ImageRecord, Library};
use crate::overlay::{
    self, BaseIdentity, CreateOptions, Info, OpenOptions, Overlay, RelayoutOptions, SessionInfo, Work,
};
use crate::units::human_bytes;
use std::path::{Path, PathBuf};

/// Bytes of a subcluster, the unit in which overlays are counted.
const SUBCLUSTER: u64 = 2048;

/// Verbs of `vmar overlay`.
#[derive(Debug, clap::Subcommand)]
pub enum Verb {
    /// Make the overlay of a new VM: an empty qcow2 file on top of an image
    Create {
        /// The file to make; never overwritten
        file: PathBuf,
        /// Image of the library that the VM starts from
        #[arg(long, value_name = "NAME")]
        image: String,
        /// Size of the disk, if it is to be larger than the image
        #[arg(long, value_name = "N[K|M|G|T]", value_parser = parse_size)]
        size: Option<u64>,
        /// Size that the disk can grow to while a VM runs on it; each GiB of it costs 288 KiB in the file
        #[arg(long, value_name = "N[K|M|G|T]", value_parser = parse_size)]
        max_size: Option<u64>,
        /// Take the content from this overlay of plain QEMU (a qcow2 whose backing file is the image, or with none)
        #[arg(long, value_name = "OTHER.qcow2")]
        from: Option<PathBuf>,
    },
    /// Say what an overlay is and holds; also while a VM runs on it
    Info {
        /// The overlay
        file: PathBuf,
        /// Where its live state is
        #[command(flatten)]
        state: StateDir,
    },
    /// Check header, layout, bitmaps and refcounts of an overlay; also while a VM runs on it
    Check {
        /// The overlay
        file: PathBuf,
    },
    /// Rewrite an overlay that QEMU has rearranged (or an older vmar made) into vmar's layout; no VM may run on it
    Relayout {
        /// The overlay; replaced by one rename when the new file is complete
        file: PathBuf,
        /// Write a new file and leave the overlay as it is
        #[arg(long, value_name = "NEW")]
        out: Option<PathBuf>,
        /// Size that the disk can grow to while a VM runs on it
        #[arg(long, value_name = "N[K|M|G|T]", value_parser = parse_size)]
        max_size: Option<u64>,
        /// How to open it
        #[command(flatten)]
        state: OpenArgs,
    },
    /// Write overlay and image together to a new sparse raw file; the image is never written
    Commit {
        /// The overlay; no VM may run on it
        file: PathBuf,
        /// The file to make; never overwritten
        #[arg(long, value_name = "NEW.raw")]
        to: PathBuf,
        /// How to open it
        #[command(flatten)]
        state: OpenArgs,
    },
    /// Make the disk in an overlay larger while no VM runs on it; what is added reads as zeros
    Resize {
        /// The overlay; rewritten if it was not made for such a size
        file: PathBuf,
        /// Size of the disk
        #[arg(value_name = "N[K|M|G|T]", value_parser = parse_size)]
        size: u64,
        /// Size that the disk can grow to later, while a VM runs on it
        #[arg(long, value_name = "N[K|M|G|T]", value_parser = parse_size)]
        max_size: Option<u64>,
        /// How to open it
        #[command(flatten)]
        state: OpenArgs,
    },
}

/// Where live bitmaps are.
#[derive(Debug, clap::Args)]
pub struct StateDir {
    /// Directory on tmpfs for the overlay's live state [default: /run/vmar, or below XDG_RUNTIME_DIR]
    #[arg(long, value_name = "DIR", env = "VMAR_STATE_DIR")]
    state_dir: Option<PathBuf>,
}

/// How to open an overlay.
#[derive(Debug, clap::Args)]
pub struct OpenArgs {
    /// Where its live state is
    #[command(flatten)]
    state: StateDir,
    /// Go on with the state of the last flush if a killed vmar wrote later and its live state is gone
    #[arg(long)]
    discard_unflushed: bool,
}

impl StateDir {
    pub(super) fn path(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(default_state_dir)
    }
}

/// Runs the verb.
pub fn run(common: &Common, verb: Verb) -> Result<()> {
    match verb {
        Verb::Create { file, image, size, max_size, from } => {
            create(common, &file, &image, (size, max_size), from.as_deref())
        }
        Verb::Info { file, state } => {
            let info = overlay::inspect(&file, &state.path())?;
            if common.json {
                println!("{}", info_json(&info))
            } else {
                print_info(&info)
            }
            Ok(())
        }
        Verb::Check { file } => check(common, &file),
        Verb::Relayout { file, out, max_size, state } => relayout(&file, out.as_deref(), max_size, &state),
        Verb::Commit { file, to, state } => commit(common, &file, &to, &state),
        Verb::Resize { file, size, max_size, state } => {
            let state_dir = state.state.path();
            let opts = rewriting(None, max_size, &state_dir, &state);
            long_work(|work| overlay::grow(&file, size, &opts, work))?;
            println!("{}: a disk of {}", file.display(), human_bytes(size));
            Ok(())
        }
    }
}

fn rewriting<'a>(
    out: Option<&'a Path>,
    capacity: Option<u64>,
    state_dir: &'a Path,
    args: &OpenArgs,
) -> RelayoutOptions<'a> {
    RelayoutOptions { out, size: None, capacity, state_dir, discard_unflushed: args.discard_unflushed }
}

/// Runs something that takes its time, with progress on stderr, until it is done or the operator stops it.
fn long_work<T>(run: impl FnOnce(&Work<'_>) -> Result<T>) -> Result<T> {
    let stop = stop_on_signals()?;
    let progress = Progress::new();
    let begin = |what: &str, total| progress.begin(what, total);
    let advance = |bytes| progress.advance(bytes);
    let done = run(&Work { stop: &stop, begin: &begin, advance: &advance })?;
    progress.end();
    Ok(done)
}

fn relayout(file: &Path, out: Option<&Path>, max_size: Option<u64>, args: &OpenArgs) -> Result<()> {
    let state_dir = args.state.path();
    long_work(|work| overlay::relayout(file, &rewriting(out, max_size, &state_dir, args), work))?;
    let new = out.unwrap_or(file);
    let info = overlay::inspect(new, &state_dir)?;
    println!("{}: a disk of {}, {} on disk", new.display(), human_bytes(info.size), human_bytes(info.disk_bytes));
    Ok(())
}

/// The image comes from the library, if one is named and has it, and is checked there; otherwise it is the backing file.
fn commit(common: &Common, file: &Path, to: &Path, args: &OpenArgs) -> Result<()> {
    let state_dir = &args.state.path();
    let opts = OpenOptions { read_only: true, state_dir, base: None, discard_unflushed: args.discard_unflushed };
    let overlay = Overlay::open(file, &opts)?;
    let mut base = overlay.backing().to_path_buf();
    if common.library.is_some() {
        let library = Library::open(common.library()?)?;
        let found = images_below(&library, &overlay).first().copied();
        let record = found.ok_or_else(|| {
            let cause = "was made for an image that this library does not have";
            Error::file(ErrorKind::Changed, file, cause).mend("name the library of its image, or none")
        })?;
        library.open_image(record)?;
        base = library.image_path(record);
    }
    long_work(|work| overlay::commit(&overlay, &base, to, work))?;
    println!("{}: a disk of {}", to.display(), human_bytes(overlay.size()));
    Ok(())
}

/// The images that the overlay may have been made on: the one whose file it names, or else all that have its base's content.
pub(super) fn images_below<'l>(library: &'l Library, overlay: &Overlay) -> Vec<&'l ImageRecord> {
    let all: Vec<&ImageRecord> = library.images().iter().filter(|r| r.digest == overlay.base().digest).collect();
    let named = all.iter().find(|r| library.image_path(r) == overlay.backing()).copied();
    named.map_or(all, |named| vec![named])
}

fn create(
    common: &Common,
    file: &Path,
    image: &str,
    (size, max_size): (Option<u64>, Option<u64>),
    from: Option<&Path>,
) -> Result<()> {
    let library = Library::open(common.library()?)?;
    let record = library.image(image)?;
    library.open_image(record)?;
    let raw = library.image_path(record);
    let backing = std::path::absolute(&raw).map_err(|e| Error::io(&raw, "find", e))?;
    let base = BaseIdentity { digest: record.digest, generation: record.generation, size: record.size };
    let size = match from {
        Some(other) => {
            let (size, capacity) = (size.unwrap_or(0), max_size.unwrap_or(0));
            let opts = CreateOptions { backing: &backing, base, size, capacity };
            long_work(|work| overlay::create_from(file, other, &opts, work))?
        }
        None => {
            let size = size.unwrap_or(record.size);
            let capacity = max_size.unwrap_or(size);
            overlay::create(file, &CreateOptions { backing: &backing, base, size, capacity })?;
            size
        }
    };
    if let Err(e) = library.note_overlay(record, file) {
        log::info!("the library does not know of this overlay: {e}");
    }
    println!("{}: a disk of {} on image {image}", file.display(), human_bytes(size));
    Ok(())
}

/// Where the live state of overlays goes if nobody says: it must not survive a reboot, so it is on tmpfs.
pub(super) fn default_state_dir() -> PathBuf {
    let run = match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !rustix::process::geteuid().is_root() => PathBuf::from(dir),
        _ => PathBuf::from("/run"),
    };
    run.join("vmar")
}

/// `12`, `12K`, `12M`, `12G`, `12T`: bytes, or powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.char_indices().last() {
        Some((at, unit)) if !unit.is_ascii_digit() => {
            let power = "KMGT".find(unit.to_ascii_uppercase()).ok_or("the unit must be K, M, G or T")?;
            (&text[..at], 10 * (power + 1))
        }
        _ => (text, 0),
    };
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    let number: u64 = digits.parse().ok().filter(|_| plain).ok_or("give a whole number, as in 20G")?;
    number.checked_mul(1 << shift).ok_or_else(|| "that is too large".to_string())
}

fn session_text(info: &Info) -> &'static str {
    match (info.session, info.in_use) {
        (SessionInfo::Closed, false) => "closed",
        (SessionInfo::Closed, true) => "closed, being opened or read",
        (SessionInfo::Open, true) => "open, in use",
        (SessionInfo::Open, false) => "open, its process was killed; the next vmar goes on from there",
        (SessionInfo::OtherBoot, _) => "open when the host went down; the state of the last flush counts",
        (SessionInfo::Lost, _) => "open without its live state; only --discard-unflushed opens it",
    }
}

fn print_info(info: &Info) {
    let base = &info.base;
    let amount = |subclusters: u64| format!("{} ({subclusters} subclusters)", human_bytes(subclusters * SUBCLUSTER));
    let rows = [
        ("disk", format!("{} ({} bytes)", human_bytes(info.size), info.size)),
        ("capacity", human_bytes(info.capacity)),
        ("base", info.backing.display().to_string()),
        ("", format!("digest {}", hex(&base.digest))),
        ("", format!("generation {}, {} bytes", base.generation, base.size)),
        ("session", session_text(info).to_string()),
        ("written", amount(info.data_subclusters)),
        ("zeroed", amount(info.zero_subclusters)),
        ("freed", format!("{} clusters that QEMU has freed or added; opening takes them back", info.freed_clusters)),
        ("on disk", human_bytes(info.disk_bytes)),
    ];
    for (name, value) in rows.into_iter().filter(|(name, _)| *name != "freed" || info.freed_clusters > 0) {
        println!("{name:<8} {value}");
    }
}

fn info_json(info: &Info) -> serde_json::Value {
    serde_json::json!({
        "size": info.size,
        "capacity": info.capacity,
        "base": {
            "path": info.backing.display().to_string(),
            "digest": hex(&info.base.digest),
            "generation": info.base.generation,
            "size": info.base.size,
        },
        "session": info.session.name(),
        "in_use": info.in_use,
        "subcluster_size": SUBCLUSTER,
        "data_subclusters": info.data_subclusters,
        "zero_subclusters": info.zero_subclusters,
        "freed_clusters": info.freed_clusters,
        "disk_bytes": info.disk_bytes,
        "data_start": info.data_start,
    })
}

fn check(common: &Common, file: &Path) -> Result<()> {
    let report = overlay::examine(file)?;
    let faults = &report.faults;
    if common.json {
        print_json(&serde_json::json!({
            "clean": faults.is_empty(),
            "faults": faults,
            "freed_clusters": report.freed_clusters,
            "relayout": report.relayout,
        }))?;
    } else {
        faults.iter().for_each(|fault| println!("{fault}"));
        if report.freed_clusters > 0 {
            println!("note: {} clusters that QEMU has freed or added; opening takes them back", report.freed_clusters);
        }
    }
    let mend = match report.relayout {
        true => format!("rewrite it with 'vmar overlay relayout {}'", file.display()),
        false => "plain QEMU may still be able to use it; see 'qemu-img check'".to_string(),
    };
    match faults.first() {
        None => {
            if !common.json {
                println!("{}: clean", file.display());
            }
            Ok(())
        }
        Some(first) => {
            Err(Error::file(ErrorKind::Corrupt, file, format!("is not as vmar writes it: {first}")).mend(mend))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_numbers_with_a_unit() {
        for (text, bytes) in [("512", 512), ("4K", 4096), ("3m", 3 << 20), ("20G", 20 << 30), ("16T", 16 << 40)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "G", "1.5G", "-1", "+1", "1KB", "1P", "99999999999999999999", "99999999T", "1µ", "1 G"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }
}
