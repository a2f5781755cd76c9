//! Byte-for-byte comparison of blocks: what makes a redirect of two equal fingerprints.

use super::Work;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::BLOCK_BYTES;
use crate::library::ImageRecord;
use crate::units::BLOCK_SIZE;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

/// Blocks that are read at a time: 1 MiB from each side.
const BLOCKS_PER_READ: usize = 256;

/// An image whose blocks are read.
#[derive(Debug)]
pub(super) struct Side {
    /// The open raw file.
    pub file: File,
    /// Where it is, for errors.
    pub path: PathBuf,
    /// What the library knows of it.
    pub record: ImageRecord,
}

/// The images that blocks are compared in.
#[derive(Clone, Copy)]
pub(super) struct Sides<'a> {
    /// The image whose blocks are to be read from elsewhere.
    pub own: &'a Side,
    /// The others.
    pub images: &'a dyn Others,
}

/// Images by ID.
pub(super) trait Others: Sync {
    /// The image of that number, open.
    fn side(&self, id: u32) -> Result<&Side>;
}

impl<'a> Sides<'a> {
    /// The number of the image itself.
    pub fn own_id(&self) -> u32 {
        self.own.record.id.0
    }

    /// The image of that number.
    pub fn get(&self, id: u32) -> Result<&'a Side> {
        if id == self.own_id() { Ok(self.own) } else { self.images.side(id) }
    }
}

/// "Block `source` of the new image could be read from block `block` of image `image`."
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Pair {
    pub source: u32,
    /// ID of that image.
    pub image: u32,
    pub block: u32,
}

impl Pair {
    fn continues(&self, before: &Pair) -> bool {
        self.image == before.image
            && before.source.checked_add(1) == Some(self.source)
            && before.block.checked_add(1) == Some(self.block)
    }
}

impl Side {
    /// Reads blocks `first..first + count` into `buf`, as far as the image goes, and returns them.
    pub fn read<'b>(&self, first: u32, count: usize, buf: &'b mut [u8]) -> Result<&'b [u8]> {
        let start = u64::from(first) * BLOCK_SIZE;
        let len = self.record.size.saturating_sub(start).min(count as u64 * BLOCK_SIZE);
        let bytes = usize::try_from(len).ok().and_then(|n| buf.get_mut(..n)).unwrap_or(&mut []);
        self.file.read_exact_at(bytes, start).map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => {
                let cause = format!("image {} became shorter while it was read", self.record.name);
                Error::file(ErrorKind::Changed, &self.path, cause).mend("put the original back")
            }
            _ => Error::io(&self.path, "read", e),
        })?;
        Ok(bytes)
    }
}

/// Indices of the pairs whose blocks differ, ascending. A partial last block equals only another of its length.
pub(super) fn differing(sides: &Sides, pairs: &[Pair], work: &Work) -> Result<Vec<usize>> {
    let batches = batches(pairs);
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let worker = || -> Result<Vec<usize>> {
        let mut bufs = [vec![0; BLOCKS_PER_READ * BLOCK_BYTES], vec![0; BLOCKS_PER_READ * BLOCK_BYTES]];
        let mut out = Vec::new();
        while let Some(batch) = batches.get(next.fetch_add(1, Ordering::Relaxed)) {
            if failed.load(Ordering::Relaxed) {
                break;
            }
            work.check_stop(&sides.own.record.name)?;
            compare(sides, pairs, batch.clone(), &mut bufs, &mut out)?;
            work.observer.advance(batch.len() as u64 * BLOCK_SIZE);
        }
        Ok(out)
    };
    let worker = || {
        let out = worker();
        failed.fetch_or(out.is_err(), Ordering::Relaxed);
        out
    };
    let parts: Vec<Result<Vec<usize>>> = thread::scope(|scope| {
        let workers: Vec<_> = (0..work.threads.max(1)).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    });
    let mut out: Vec<usize> = parts.into_iter().collect::<Result<Vec<_>>>()?.concat();
    out.sort_unstable();
    Ok(out)
}

/// True when two blocks hold the same bytes.
pub(super) fn equal(a: &Side, block_a: u32, b: &Side, block_b: u32) -> Result<bool> {
    let mut bufs = [[0u8; BLOCK_BYTES]; 2];
    let [buf_a, buf_b] = &mut bufs;
    Ok(a.read(block_a, 1, buf_a)? == b.read(block_b, 1, buf_b)?)
}

/// Cuts the pairs into ranges that are contiguous on both sides and fit into the buffers.
fn batches(pairs: &[Pair]) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    for (i, pair) in pairs.iter().enumerate() {
        match out.last_mut() {
            Some(last) if last.len() < BLOCKS_PER_READ && pairs.get(i - 1).is_some_and(|p| pair.continues(p)) => {
                last.end += 1;
            }
            _ => out.push(i..i + 1),
        }
    }
    out
}

fn compare(
    sides: &Sides,
    pairs: &[Pair],
    batch: Range<usize>,
    bufs: &mut [Vec<u8>; 2],
    out: &mut Vec<usize>,
) -> Result<()> {
    let Some(first) = pairs.get(batch.start) else { return Ok(()) };
    let [buf_a, buf_b] = bufs;
    let a = sides.own.read(first.source, batch.len(), buf_a)?;
    let b = sides.get(first.image)?.read(first.block, batch.len(), buf_b)?;
    if a == b && a.len() == batch.len() * BLOCK_BYTES {
        return Ok(());
    }
    // Something differs, or a partial last block is among them: look at each block.
    let block_of = |bytes: &[u8], i: usize| -> Range<usize> {
        let start = (i * BLOCK_BYTES).min(bytes.len());
        start..(start + BLOCK_BYTES).min(bytes.len())
    };
    for i in 0..batch.len() {
        let (in_a, in_b) = (block_of(a, i), block_of(b, i));
        if in_a.is_empty() || a.get(in_a) != b.get(in_b) {
            out.push(batch.start + i);
        }
    }
    Ok(())
}
