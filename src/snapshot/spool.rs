//! QEMU's stream of a VM that stands still, taken apart into memory and skeleton.

use super::skeleton::Skeleton;
use crate::error::{Error, ErrorKind, Result};
use crate::introspect::{GuestMemory, Layout};
use crate::migrate::stream::{Event, Mark, PAGE_SIZE, Parser, Place};
use crate::store::manifest::MemoryBlock;
use crate::units::to_usize;
use memmap2::Mmap;
use rustix::fs::{FallocateFlags, Mode, OFlags, fallocate, open};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Memory of all guests that are taken, at most.
const MEMORY_MAX: u64 = 1 << 40;

/// Pages that follow each other are written together, as many as this in bytes: by a mapping each of them would cost a fault while the VM
/// stands still.
const RUN: usize = 1 << 20;

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
    file: Option<Memory>,
    skeleton: Skeleton,
    bytes: u64,
    /// The last section of RAM has ended.
    ended: bool,
}

/// The file that memory is in.
#[derive(Debug)]
struct Memory {
    dir: PathBuf,
    file: File,
    len: u64,
    /// Pages that follow each other, and where the first one belongs.
    run: Vec<u8>,
    at: u64,
    /// A bit for each page that is not zero in the file.
    written: Vec<u64>,
}

/// A VM, as it stood.
#[derive(Debug)]
pub struct Vm {
    /// The blocks of its memory.
    pub blocks: Vec<MemoryBlock>,
    /// Their content, one after the other. Pages that were never written are better not touched: see [`Vm::page`].
    memory: Mmap,
    /// A bit for each page that is not zero, or was not once.
    written: Vec<u64>,
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
        let (Inner { blocks, file, skeleton, bytes, ended, .. }, machine) = (self.inner, self.parser.machine());
        match file {
            Some(file) if ended => {
                let machine = machine.unwrap_or_default().to_string();
                let (memory, written) = file.map()?;
                Ok(Vm { blocks, memory, written, skeleton, machine, stream_bytes: bytes })
            }
            _ => Err(strange("it ends in the middle of memory")),
        }
    }
}

impl Vm {
    /// Pages of all blocks.
    pub fn pages(&self) -> usize {
        self.memory.len() / 4096
    }

    /// A page, by its number among all; none when it is zero and nothing was ever there: to look at it would cost the host a page.
    pub fn page(&self, number: usize) -> Option<&[u8; 4096]> {
        let word = self.written.get(number / 64)?;
        if word >> (number % 64) & 1 == 0 {
            return None;
        }
        self.memory.as_chunks().0.get(number)
    }

    /// Pages of a block that are RAM of this layout, the first one of them by its number.
    pub fn ram(&self, layout: Layout, first: usize) -> Ram<'_> {
        Ram { vm: self, layout, first }
    }
}

/// A block of a VM's memory as the guest addresses it.
#[derive(Clone, Copy, Debug)]
pub struct Ram<'a> {
    vm: &'a Vm,
    layout: Layout,
    first: usize,
}

impl GuestMemory for Ram<'_> {
    fn read(&self, physical: u64, buf: &mut [u8]) -> bool {
        let Some((offset, left)) = self.layout.offset(physical) else { return false };
        if left < buf.len() as u64 {
            return false;
        }
        let (mut at, mut rest) = (to_usize(offset), buf);
        while !rest.is_empty() {
            let inside = at % 4096;
            let (now, later) = rest.split_at_mut((4096 - inside).min(rest.len()));
            match self.vm.page(self.first + at / 4096).and_then(|page| page.get(inside..inside + now.len())) {
                Some(bytes) => now.copy_from_slice(bytes),
                None => now.fill(0),
            }
            at += now.len();
            rest = later;
        }
        true
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
        self.file = Some(Memory::create(dir, all)?);
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
        let file = self.file.as_mut().ok_or_else(|| strange("a page comes before the list of blocks"))?;
        file.page(start + place.offset, page)?;
        self.skeleton.page(place);
        Ok(())
    }
}

impl Memory {
    fn create(dir: &Path, len: u64) -> Result<Memory> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = open(dir, flags, Mode::RUSR | Mode::WUSR);
        let file = File::from(file.map_err(|e| Error::io(dir, "make a file in it", e.into()))?);
        // All room now, and not an error when half of it has come.
        fallocate(&file, FallocateFlags::empty(), 0, len)
            .map_err(|e| Error::io(dir, &format!("keep {len} bytes of memory there for a while"), e.into()))?;
        let written = vec![0; to_usize((len / PAGE_SIZE).div_ceil(64))];
        Ok(Memory { dir: dir.to_path_buf(), file, len, run: Vec::with_capacity(RUN), at: 0, written })
    }

    /// The content of a page; none is zeros.
    fn page(&mut self, at: u64, page: Option<&[u8]>) -> Result<()> {
        let number = at / PAGE_SIZE;
        let word = self.written.get_mut(to_usize(number / 64)).filter(|_| at < self.len);
        let word = word.ok_or_else(|| strange("a page is behind the end of memory"))?;
        let bit = 1 << (number % 64);
        const ZEROS: [u8; 4096] = [0; 4096];
        let page = match page {
            Some(page) => page,
            // The file has zeros unless the page came before.
            None if *word & bit == 0 => return Ok(()),
            None => &ZEROS,
        };
        *word |= bit;
        if self.at + self.run.len() as u64 != at || self.run.len() >= RUN {
            self.flush()?;
            self.at = at;
        }
        self.run.extend_from_slice(page);
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        let written = self.file.write_all_at(&self.run, self.at);
        self.run.clear();
        written.map_err(|e| Error::io(&self.dir, "keep memory there for a while", e))
    }

    fn map(mut self) -> Result<(Mmap, Vec<u64>)> {
        self.flush()?;
        // SAFETY: the file has no name, so nobody else has it or can cut it, and it is written no more.
        let memory = unsafe { Mmap::map(&self.file) }.map_err(|e| Error::io(&self.dir, "map a file in it", e))?;
        Ok((memory, self.written))
    }
}

fn strange(why: &str) -> Error {
    Error::new(ErrorKind::Unsupported, "QEMU's migration stream", why)
        .mend("see docs/snapshots.md for the versions and capabilities of QEMU that are known")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::introspect::BlockMemory;

    /// Reads of any place and length are what they are of plain memory, across pages that were never written.
    #[test]
    fn ram_reads_as_a_block_does() {
        let dir = tempfile::tempdir().unwrap();
        let pages = 40;
        let mut memory = Memory::create(dir.path(), pages * 4096).unwrap();
        let mut model = vec![0; to_usize(pages * 4096)];
        for n in (3..pages).filter(|n| n % 4 != 0) {
            let page: Vec<u8> = (0..4096u64).map(|at| (at * n + at / 7) as u8).collect();
            memory.page(n * 4096, Some(&page)).unwrap();
            model[to_usize(n * 4096)..][..4096].copy_from_slice(&page);
        }
        memory.page(5 * 4096, None).unwrap();
        model[5 * 4096..6 * 4096].fill(0);
        let (memory, written) = memory.map().unwrap();
        let vm = Vm {
            blocks: vec![],
            memory,
            written,
            skeleton: Skeleton::default(),
            machine: "q35".into(),
            stream_bytes: 0,
        };
        assert!(vm.page(4).is_none() && vm.page(7).is_some() && vm.page(40).is_none());
        // The first three pages are another block's.
        let layout = Layout::with_split((pages - 3) * 4096, 20 * 4096).unwrap();
        let (ram, plain) = (vm.ram(layout, 3), BlockMemory::new(layout, &model[3 * 4096..]).unwrap());
        for at in (0..(1u64 << 32) + 40 * 4096).step_by(1234).filter(|at| *at < 30 * 4096 || *at > 0xFFFF_F000) {
            for len in [1, 8, 4096, 9000] {
                let (mut ours, mut theirs) = (vec![1; len], vec![2; len]);
                let read = (ram.read(at, &mut ours), plain.read(at, &mut theirs));
                assert!(read == (true, true) && ours == theirs || read == (false, false), "{at} {len}: {read:?}");
            }
        }
    }
}
