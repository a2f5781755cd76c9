//! `vmar trace replay`: what other maps would have made of the requests of recorded VMs.

use super::Common;
use super::output::print_json;
use super::trace::{Seen, Split};
use crate::error::{Error, ErrorKind, Result};
use crate::indexer::read_map;
use crate::library::Library;
use crate::map::Map;
use crate::redirect::Base;
use crate::redirect::plan::{Layout, Piece, Source, plan_base};
use crate::redirect::trace::{Record, TraceReader};
use crate::units::{BLOCK_SIZE, ImageId, human_bytes, to_usize};
use serde::Serialize;
use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What came of it.
#[derive(Debug, Serialize)]
struct Replayed {
    policy: String,
    traces: u64,
    /// Requests that read base data.
    requests: u64,
    /// Reads that they are split into.
    reads: u64,
    #[serde(flatten)]
    split: Split,
    /// Distinct blocks by the images' own addresses: pages of the host's cache without redirection.
    own_blocks: u64,
    /// Distinct blocks behind the maps: pages of the host's cache with it.
    distinct_blocks: u64,
    distinct_bytes: u64,
    /// How long reading the bytes took, with `--read`.
    read_ms: Option<u64>,
}

/// Runs the verb.
pub(super) fn run(common: &Common, files: &[PathBuf], with_bytes: bool) -> Result<()> {
    let library = Library::open(common.library()?)?;
    let mut took = Duration::ZERO;
    let (mut own, mut read) = (Seen::default(), Seen::default());
    let mut counts = Vec::new();
    for file in files {
        let (records, map, id) = open(&library, file)?;
        let size = map.source().size;
        let layout = Layout::Mapped(Box::new(map));
        let mut requests: HashMap<u32, u32> = HashMap::new();
        let mut pieces: Vec<Piece> = Vec::new();
        for record in &records {
            own.add(id, record.block.into(), record.end());
            pieces.clear();
            let bytes = to_usize(u64::from(record.count) * BLOCK_SIZE);
            plan_base(&layout, size, u64::from(record.block) * BLOCK_SIZE, bytes, 0, &mut pieces);
            for piece in &pieces {
                let Source::Image { target, offset } = piece.source else { continue };
                let Layout::Mapped(map) = &layout else { continue };
                let image = map.target(target).map_or(u32::MAX, |t| t.image.0);
                let end = (offset + piece.len as u64).div_ceil(BLOCK_SIZE);
                read.add(image, offset / BLOCK_SIZE, end);
                *requests.entry(record.request).or_default() += 1;
            }
        }
        counts.extend(requests.into_values());
        if with_bytes {
            took += read_all(&library, id, &records)?;
        }
    }
    let distinct_blocks = read.blocks();
    let replayed = Replayed {
        policy: library.catalog().policy.to_string(),
        traces: files.len() as u64,
        requests: counts.len() as u64,
        reads: counts.iter().copied().map(u64::from).sum(),
        split: Split::of(counts),
        own_blocks: own.blocks(),
        distinct_blocks,
        distinct_bytes: distinct_blocks * BLOCK_SIZE,
        read_ms: with_bytes.then(|| u64::try_from(took.as_millis()).unwrap_or(u64::MAX)),
    };
    if common.json {
        return print_json(&replayed);
    }
    let r = &replayed;
    println!("policy {}: {} traces, {} requests, {} reads", r.policy, r.traces, r.requests, r.reads);
    println!("{}", r.split);
    println!(
        "{} distinct blocks ({}), without redirection {}",
        r.distinct_blocks,
        human_bytes(r.distinct_bytes),
        r.own_blocks
    );
    if let Some(ms) = r.read_ms {
        println!("read in {:.3} s", ms as f64 / 1e3);
    }
    Ok(())
}

/// Does the reads of a trace, in its order, as fast as they come.
fn read_all(library: &Library, image: u32, records: &[Record]) -> Result<Duration> {
    let base = Base::open(library, &library.image_by_id(ImageId(image))?.name)?;
    let (mut pieces, mut buf) = (Vec::new(), Vec::new());
    let began = Instant::now();
    for record in records {
        let start = u64::from(record.block) * BLOCK_SIZE;
        let len = to_usize((u64::from(record.count) * BLOCK_SIZE).min(base.size().saturating_sub(start)));
        buf.resize(buf.len().max(len), 0);
        pieces.clear();
        base.plan(start, len, 0, &mut pieces);
        for piece in &pieces {
            let Source::Image { target, offset } = piece.source else { continue };
            let part = buf.get_mut(..piece.len).unwrap_or(&mut []);
            base.file(target).read_exact_at(part, offset).map_err(|e| Error::io(base.path(target), "read", e))?;
        }
    }
    Ok(began.elapsed())
}

/// The records of a trace, the map of its image as it is now, and the ID of that image.
fn open(library: &Library, path: &Path) -> Result<(Vec<Record>, Map<Vec<u8>>, u32)> {
    let file = File::open(path).map_err(|e| Error::io(path, "open the trace", e))?;
    let reader = TraceReader::new(file, path)?;
    let header = *reader.header();
    let refuse = |cause: &str, mend: &str| Err(Error::file(ErrorKind::Usage, path, cause).mend(mend));
    if crate::codec::hex(&header.library) != library.catalog().uuid {
        return refuse("was recorded with another library", "name that one with --library");
    }
    let record = library.images().iter().find(|r| r.id.0 == header.image);
    let Some(record) = record.filter(|r| (r.generation, r.digest) == (header.generation, header.digest)) else {
        return refuse("was recorded with an image that the library does not have any more", "record it anew");
    };
    let records = reader.collect::<Result<Vec<_>>>()?;
    if records.iter().any(|r| r.image != header.image) {
        let mend = "record it after 'vmar library remap --policy bridge --min-run 4294967295'";
        return refuse("has reads that were redirected, so what the VM asked for is not known", mend);
    }
    Ok((records, read_map(library, record)?, header.image))
}
