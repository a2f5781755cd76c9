//! A recorded boot as a list of steps; or reads that are no boot.

use crate::Result;
use crate::args::Sweep;
use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmar::library::{ImageRecord, Library};
use vmar::redirect::trace::{Record, TraceReader};
use vmar::units::BLOCK_SIZE;

/// Reads that follow each other faster than this were asked for together: nobody waited for the first of them.
const TOGETHER_US: u64 = 200;
/// Bytes of a read of a sweep, and how many chunks or bytes of them (paper, section 4.2).
const CHUNK: u64 = 1 << 20;
const RANDOM_CHUNKS: usize = 3000;
const SEQUENTIAL_CHUNKS: usize = 350;

/// What one guest reads, and when.
#[derive(Debug, PartialEq)]
pub struct Boot {
    /// Name of its image.
    pub image: String,
    /// The image's file.
    pub raw: PathBuf,
    /// Its trace.
    pub trace: Option<PathBuf>,
    /// In order.
    pub steps: Vec<Step>,
    /// The step with which an application begins to load.
    pub mark: Option<usize>,
}

/// Some reads that are in flight together; the guest goes on when all are there.
#[derive(Debug, Default, PartialEq)]
pub struct Step {
    /// Before it the guest computes.
    pub pause: Duration,
    /// Byte offset and length.
    pub reads: Vec<(u64, usize)>,
}

impl Boot {
    /// Reads a trace.
    ///
    /// # Errors
    /// One line, if it is none, or is of an image that the library does not have, or was recorded while something was redirected:
    /// then it does not say what the guest asked for.
    pub fn read(path: &Path, library: &Library) -> Result<Boot> {
        let file = File::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let reader = TraceReader::new(file, path).map_err(|e| e.to_string())?;
        let header = *reader.header();
        // By content: it need not be the library that it was recorded with.
        let image = library.images().iter().find(|r| r.digest == header.digest).ok_or_else(|| {
            format!("{}: of an image that {} does not have: record it anew", path.display(), library.dir().display())
        })?;
        let records = reader.collect::<vmar::error::Result<Vec<_>>>().map_err(|e| e.to_string())?;
        if records.iter().any(|r| r.image != header.image) {
            let mend = "record it with qemu-scripts/record-boots.sh, which makes a library for that";
            return Err(format!("{}: has reads that were redirected: {mend}", path.display()));
        }
        let mark_us = mark(path)?;
        let (steps, mark) = steps(&records, image.size, mark_us);
        let trace = Some(path.to_path_buf());
        Ok(Boot { image: image.name.clone(), raw: library.image_path(image), trace, steps, mark })
    }

    /// Chunks of an image without a zero block.
    ///
    /// # Errors
    /// If there is no such image, or it cannot be read, or has no such chunk.
    pub fn sweep(library: &Library, name: &str, sweep: Sweep, seed: u64) -> Result<Boot> {
        let image = library.image(name).map_err(|e| e.to_string())?;
        let raw = library.image_path(image);
        let full = full_chunks(image, &raw).map_err(|e| format!("{}: {e}", raw.display()))?;
        if full.is_empty() {
            return Err(format!("{name} has no MiB without zero blocks: name another --image"));
        }
        let mut random = seed;
        let places: Vec<u64> = match sweep {
            Sweep::Sequential => full.into_iter().take(SEQUENTIAL_CHUNKS).collect(),
            Sweep::Random => {
                let mut any = |_| full[(crate::unit(&mut random) * full.len() as f64) as usize];
                (0..RANDOM_CHUNKS).map(&mut any).collect()
            }
        };
        let step = |place| Step { pause: Duration::ZERO, reads: vec![(place, CHUNK as usize)] };
        Ok(Boot { image: name.into(), raw, trace: None, steps: places.into_iter().map(step).collect(), mark: None })
    }

    /// Seconds that the guest computes until it is up.
    pub fn compute_s(&self) -> f64 {
        let steps = self.steps.get(..self.mark.unwrap_or(self.steps.len()));
        steps.unwrap_or_default().iter().map(|step| step.pause.as_secs_f64()).sum()
    }

    /// Bytes of the longest read.
    pub fn longest(&self) -> usize {
        self.reads().map(|(_, len)| len).max().unwrap_or(0)
    }

    /// Bytes of all reads.
    pub fn bytes(&self) -> u64 {
        self.reads().map(|(_, len)| len as u64).sum()
    }

    /// All reads, in order.
    pub fn reads(&self) -> impl Iterator<Item = (u64, usize)> {
        self.steps.iter().flat_map(|step| step.reads.iter().copied())
    }
}

/// Bytes of the distinct contents that these boots read.
///
/// # Errors
/// If an image cannot be read.
pub fn distinct_bytes(boots: &[&Boot]) -> Result<u64> {
    let (mut blocks, mut contents) = (HashSet::new(), HashSet::new());
    let mut buf = Vec::new();
    for boot in boots {
        let say = |e| format!("{}: {e}", boot.raw.display());
        let raw = File::open(&boot.raw).map_err(say)?;
        for (offset, len) in boot.reads() {
            buf.resize(len, 0);
            raw.read_exact_at(&mut buf, offset).map_err(say)?;
            for (at, block) in (offset..).step_by(BLOCK_SIZE as usize).zip(buf.chunks(BLOCK_SIZE as usize)) {
                if blocks.insert((boot.image.as_str(), at)) {
                    contents.insert(vmar::fingerprint::Hasher::Sha1.hash(block));
                }
            }
        }
    }
    Ok(contents.len() as u64 * BLOCK_SIZE)
}

/// Where the application begins, in microseconds of the trace, if it was recorded with one.
fn mark(trace: &Path) -> Result<Option<u64>> {
    let path = trace.with_extension("app.json");
    let text = match std::fs::read_to_string(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(|e| format!("{}: {e}", path.display()))?,
    };
    let value: serde_json::Value = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    let mark = value.get("boot_us").and_then(serde_json::Value::as_u64);
    mark.map(Some).ok_or_else(|| format!("{}: it has no boot_us: record it anew", path.display()))
}

fn full_chunks(image: &ImageRecord, raw: &Path) -> std::io::Result<Vec<u64>> {
    let file = File::open(raw)?;
    let mut buf = vec![0; CHUNK as usize];
    let mut full = Vec::new();
    for place in (0..image.size / CHUNK).map(|i| i * CHUNK) {
        file.read_exact_at(&mut buf, place)?;
        if buf.chunks(BLOCK_SIZE as usize).all(|block| block.iter().any(|byte| *byte != 0)) {
            full.push(place);
        }
    }
    Ok(full)
}

/// The steps, and the first one at or after the mark.
fn steps(records: &[Record], size: u64, mark_us: Option<u64>) -> (Vec<Step>, Option<usize>) {
    let mut steps: Vec<Step> = Vec::new();
    let (mut last, mut mark) = (0, None);
    for record in records {
        let gap = record.time_us.saturating_sub(last);
        last = last.max(record.time_us);
        let start = u64::from(record.block) * BLOCK_SIZE;
        let len = (u64::from(record.count) * BLOCK_SIZE).min(size.saturating_sub(start)) as usize;
        let is_mark = mark.is_none() && mark_us.is_some_and(|mark| record.time_us >= mark);
        match steps.last_mut() {
            Some(step) if gap <= TOGETHER_US && !is_mark => step.reads.push((start, len)),
            _ => steps.push(Step { pause: Duration::from_micros(gap), reads: vec![(start, len)] }),
        }
        if is_mark {
            mark = Some(steps.len() - 1);
        }
    }
    (steps, mark)
}
