//! A recorded boot as a list of steps.

use crate::Result;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;
use vmar::library::Library;
use vmar::redirect::trace::{Record, TraceReader};
use vmar::units::BLOCK_SIZE;

/// Reads that follow each other faster than this were asked for together: nobody waited for the first of them.
const TOGETHER_US: u64 = 200;

/// What one guest reads, and when.
#[derive(Debug, PartialEq)]
pub struct Boot {
    /// Name of its image.
    pub image: String,
    /// The image's file.
    pub raw: PathBuf,
    /// In order.
    pub steps: Vec<Step>,
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
    /// One line, if it is none, or is not of this library, or of an image that changed, or was recorded while something was
    /// redirected: then it does not say what the guest asked for.
    pub fn read(path: &Path, library: &Library) -> Result<Boot> {
        let file = File::open(path).map_err(|e| format!("{}: {e}", path.display()))?;
        let reader = TraceReader::new(file, path).map_err(|e| e.to_string())?;
        let header = *reader.header();
        let fits = |r: &&vmar::library::ImageRecord| r.id.0 == header.image && r.digest == header.digest;
        let image = library.images().iter().find(fits).filter(|_| library.catalog().uuid_bytes() == header.library);
        let image = image.ok_or_else(|| {
            format!("{}: of an image that {} does not have: record it anew", path.display(), library.dir().display())
        })?;
        let records = reader.collect::<vmar::error::Result<Vec<_>>>().map_err(|e| e.to_string())?;
        if records.iter().any(|r| r.image != header.image) {
            let mend = "record it with qemu-scripts/record-boots.sh, which makes a library for that";
            return Err(format!("{}: has reads that were redirected: {mend}", path.display()));
        }
        let steps = steps(&records, image.size);
        Ok(Boot { image: image.name.clone(), raw: library.image_path(image), steps })
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

fn steps(records: &[Record], size: u64) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    let mut last = 0;
    for record in records {
        let gap = record.time_us.saturating_sub(last);
        last = last.max(record.time_us);
        let start = u64::from(record.block) * BLOCK_SIZE;
        let len = (u64::from(record.count) * BLOCK_SIZE).min(size.saturating_sub(start)) as usize;
        match steps.last_mut() {
            Some(step) if gap <= TOGETHER_US => step.reads.push((start, len)),
            _ => steps.push(Step { pause: Duration::from_micros(gap), reads: vec![(start, len)] }),
        }
    }
    steps
}
