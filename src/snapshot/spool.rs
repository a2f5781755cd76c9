//! QEMU's stream of a VM that stands still, taken apart into memory and skeleton.

use super::skeleton::Skeleton;
use crate::error::{Error, ErrorKind, Result};
use crate::migrate::stream::{Event, Mark, PAGE_SIZE, Parser, Place};
use crate::store::manifest::MemoryBlock;
use crate::units::to_usize;
use memmap2::MmapMut;
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open};
use std::fs::File;
use std::path::{Path, PathBuf};

/// Memory of all guests that are taken, at most.
const MEMORY_MAX: u64 = 1 << 40;

/// What a stream holds, as far as it has come.
#[derive(Debug)]
pub struct Spool {
    dir: PathBuf,
    parser: Parser,
    inner: Inner,
}

#[derive(Debug, Default)]
struct Inner {
    blocks: Vec<MemoryBlock>,
    /// Where each block begins in `memory`.
    starts: Vec<u64>,
    memory: Option<MmapMut>,
    skeleton: Skeleton,
    bytes: u64,
    /// The last section of RAM has ended.
    ended: bool,
}

/// A VM, as it stood.
#[derive(Debug)]
pub struct Vm {
    /// The blocks of its memory.
    pub blocks: Vec<MemoryBlock>,
    /// Their content, one after the other.
    pub memory: MmapMut,
    /// All the rest.
    pub skeleton: Skeleton,
    /// QEMU's machine type.
    pub machine: String,
    /// Bytes of the stream.
    pub stream_bytes: u64,
}

impl Spool {
    /// Nothing has come yet. The memory will be in a file of this directory that has no name, and is gone with the process.
    pub fn new(dir: &Path) -> Spool {
        Spool { dir: dir.to_path_buf(), parser: Parser::default(), inner: Inner::default() }
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// The stream is not understood, or there is no room for the memory.
    pub fn feed(&mut self, bytes: &[u8]) -> Result<()> {
        let Spool { dir, parser, inner } = self;
        inner.bytes += bytes.len() as u64;
        parser.feed(bytes, |blocks, event| match event {
            Event::Mark(Mark::Blocks) => {
                let known = blocks.iter().map(|b| MemoryBlock { name: b.name.to_vec(), len: b.len.unwrap_or(0) });
                inner.begin(dir, known.collect())
            }
            Event::Mark(Mark::RamEnd) => {
                inner.ended = true;
                Ok(())
            }
            Event::Mark(Mark::Lost) => Err(strange("it is not understood")),
            Event::Mark(Mark::Packaged) => Err(strange("it is one of postcopy")),
            Event::Mark(Mark::ReturnPath | Mark::RoundEnd) => Ok(()),
            Event::Bytes(bytes) => {
                inner.skeleton.bytes(bytes);
                Ok(())
            }
            Event::Page(place, page) => inner.page(place, Some(page)),
            Event::Zero(place) => inner.page(place, None),
        })
    }

    /// It was all.
    ///
    /// # Errors
    /// It was not.
    pub fn finish(mut self) -> Result<Vm> {
        let Spool { parser, inner, .. } = &mut self;
        parser.flush(|_, event| {
            if let Event::Bytes(bytes) = event {
                inner.skeleton.bytes(bytes);
            }
            Ok::<(), Error>(())
        })?;
        let (Inner { blocks, memory, skeleton, bytes, ended, .. }, machine) = (self.inner, self.parser.machine());
        match memory {
            Some(memory) if ended => {
                let machine = machine.unwrap_or_default().to_string();
                Ok(Vm { blocks, memory, skeleton, machine, stream_bytes: bytes })
            }
            _ => Err(strange("it ends in the middle of memory")),
        }
    }
}

impl Inner {
    fn begin(&mut self, dir: &Path, blocks: Vec<MemoryBlock>) -> Result<()> {
        let mut all = 0u64;
        for block in &blocks {
            if !block.len.is_multiple_of(PAGE_SIZE) {
                return Err(strange("a block of memory is not whole pages"));
            }
            self.starts.push(all);
            all = all.saturating_add(block.len);
        }
        if all == 0 || all > MEMORY_MAX {
            return Err(strange(&format!("it has {all} bytes of memory")));
        }
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = open(dir, flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(file.map_err(|e| Error::io(dir, "make a file in it", e.into()))?);
        // All room now: to write to a mapping for which there is none ends the process.
        fallocate(&file, FallocateFlags::empty(), 0, all)
            .map_err(|e| Error::io(dir, &format!("keep {all} bytes of memory there for a while"), e.into()))?;
        // SAFETY: the file has no name, so nobody else has it or can cut it.
        let memory = unsafe { MmapMut::map_mut(&file) }.map_err(|e| Error::io(dir, "map a file in it", e))?;
        self.memory = Some(memory);
        self.blocks = blocks;
        Ok(())
    }

    fn page(&mut self, place: Place, page: Option<&[u8]>) -> Result<()> {
        let (Some(block), Some(start)) =
            (self.blocks.get(usize::from(place.block)), self.starts.get(usize::from(place.block)))
        else {
            return Err(strange("a page is in a block that was not announced"));
        };
        if place.offset >= block.len {
            return Err(strange("a page is behind the end of its block"));
        }
        let at = to_usize(start + place.offset);
        let goal = self.memory.as_mut().and_then(|memory| memory.get_mut(at..at + to_usize(PAGE_SIZE)));
        match (goal, page) {
            (Some(goal), Some(page)) if page.len() == goal.len() => goal.copy_from_slice(page),
            // The file is zeros; only a page that came before and is zero now has to be written.
            (Some(goal), None) if crate::units::is_zero(goal) => {}
            (Some(goal), None) => goal.fill(0),
            _ => return Err(strange("a page is behind the end of memory")),
        }
        self.skeleton.page(place);
        Ok(())
    }
}

fn strange(why: &str) -> Error {
    Error::new(ErrorKind::Unsupported, "QEMU's migration stream", why)
        .mend("see docs/snapshots.md for the versions and capabilities of QEMU that are known")
}
