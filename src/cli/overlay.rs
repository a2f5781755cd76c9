//! `vmar overlay`: make overlays and look at them.

use super::Common;
use super::output::print_json;
use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::library::Library;
use crate::overlay::{self, BaseIdentity, CreateOptions, Info, SessionInfo};
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
}

/// Where live bitmaps are.
#[derive(Debug, clap::Args)]
pub struct StateDir {
    /// Directory on tmpfs for the overlay's live state [default: /run/vmar, or below XDG_RUNTIME_DIR]
    #[arg(long, value_name = "DIR", env = "VMAR_STATE_DIR")]
    state_dir: Option<PathBuf>,
}

/// Runs the verb.
pub fn run(common: &Common, verb: Verb) -> Result<()> {
    match verb {
        Verb::Create { file, image, size } => create(common, &file, &image, size),
        Verb::Info { file, state } => {
            let state_dir = state.state_dir.unwrap_or_else(default_state_dir);
            let info = overlay::inspect(&file, &state_dir)?;
            if common.json {
                println!("{}", info_json(&info))
            } else {
                print_info(&info)
            }
            Ok(())
        }
        Verb::Check { file } => check(common, &file),
    }
}

fn create(common: &Common, file: &Path, image: &str, size: Option<u64>) -> Result<()> {
    let library = Library::open(common.library()?)?;
    let record = library.image(image)?;
    library.open_image(record)?;
    let raw = library.image_path(record);
    let backing = std::path::absolute(&raw).map_err(|e| Error::io(&raw, "find", e))?;
    let size = size.unwrap_or(record.size);
    let base = BaseIdentity { digest: record.digest, generation: record.generation, size: record.size };
    overlay::create(file, &CreateOptions { backing: &backing, base, size, capacity: size })?;
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
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
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
        ("base", info.backing.display().to_string()),
        ("", format!("digest {}", hex(&base.digest))),
        ("", format!("generation {}, {} bytes", base.generation, base.size)),
        ("session", session_text(info).to_string()),
        ("written", amount(info.data_subclusters)),
        ("zeroed", amount(info.zero_subclusters)),
        ("on disk", human_bytes(info.disk_bytes)),
    ];
    for (name, value) in rows {
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
        "disk_bytes": info.disk_bytes,
        "data_start": info.data_start,
    })
}

fn check(common: &Common, file: &Path) -> Result<()> {
    let faults = overlay::check(file)?;
    if common.json {
        print_json(&serde_json::json!({ "clean": faults.is_empty(), "faults": faults }))?;
    } else {
        faults.iter().for_each(|fault| println!("{fault}"));
    }
    match faults.first() {
        None => {
            if !common.json {
                println!("{}: clean", file.display());
            }
            Ok(())
        }
        Some(first) => Err(Error::file(ErrorKind::Corrupt, file, format!("is not as vmar writes it: {first}"))
            .mend("plain QEMU may still be able to use it; see 'qemu-img check'")),
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
