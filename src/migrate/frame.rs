//! What crosses the link for a part of the stream: where each of its pages can be had, and the bytes that the other side has
//! nowhere.
//!
//! A frame has *operations* and *literals*, a list of whole pages. Operations say, in order, what the stream goes on with; records
//! of pages that follow each other in memory take no bytes of their own, so a run of a thousand pages that the other side has is
//! three bytes. Numbers are [`super::varint`]s.
//!
//! | tag | name | then | is |
//! | --- | --- | --- | --- |
//! | 0 | bytes | length, bytes | bytes of the stream as they are |
//! | 1 | place | block, page, 0 or 1 | the next record is of this page; 1: and names its block |
//! | 2 | block | length, name | the next block gets this name; the first is block 0 |
//! | 3 | zero | n | n records of zero pages |
//! | 4 | literal | n | n records, with the next n pages of the literals |
//! | 5 | same | n | n records, with the pages that the kept image has in the same places |
//! | 6 | kept | page, n | n records, with n pages of the kept image from this one on |
//! | 7 | base | image, block, n | n records, with n blocks of an image, by its number in the greeting |
//! | 8 | template | page, n | n records, with n pages of the template |
//! | 9 | earlier | page, n | n records, with n pages of the literals of all frames so far, counted from the first |
//! | 10 | inline | 4,096 bytes | a record, with this page: of a frame that comes again, and then is no literal |
//!
//! A record is of the page after the one of the record before, and continues its block, unless a place says otherwise. Blocks,
//! the place and the count of literals go on from frame to frame.

use super::stream::{BLOCKS_MAX, Kind, NAME_BYTES_MAX, PAGE_BYTES, PAGE_SIZE, Place};
use super::varint;
use std::sync::Arc;

/// Bytes of the stream that a frame stands for, at most; a record may go over it.
pub const FRAME_BYTES: usize = 256 << 10;
/// The same, with the record that went over it.
pub const FRAME_BYTES_MAX: usize = FRAME_BYTES + 2 * PAGE_BYTES;
/// Operations of such a frame, in bytes: all of it as bytes, or a place for each page, and the names of all blocks.
pub const OPS_BYTES_MAX: usize = 2 * FRAME_BYTES_MAX + BLOCKS_MAX * (NAME_BYTES_MAX + 3);
/// Literals of such a frame, in pages.
pub const LITERALS_MAX: usize = FRAME_BYTES_MAX / PAGE_BYTES;

mod tag {
    pub const BYTES: u64 = 0;
    pub const PLACE: u64 = 1;
    pub const BLOCK: u64 = 2;
    pub const ZERO: u64 = 3;
    pub const LITERAL: u64 = 4;
    pub const SAME: u64 = 5;
    pub const KEPT: u64 = 6;
    pub const BASE: u64 = 7;
    pub const TEMPLATE: u64 = 8;
    pub const EARLIER: u64 = 9;
    pub const INLINE: u64 = 10;
}

/// Where the other side has a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Source {
    /// It is zero.
    Zero,
    /// Nowhere: it goes with the frame.
    Literal,
    /// In the kept image, in the same place of the same block.
    Same,
    /// In the kept image, as this page of all its pages.
    Kept(u64),
    /// A block of an image of the library, which is named by its number in the greeting.
    Base {
        /// Number of the image.
        image: u32,
        /// 4 KiB block of it.
        block: u32,
    },
    /// A page of the template.
    Template(u64),
    /// A literal of this migration, counted from the first.
    Earlier(u64),
}

impl Source {
    /// The source of the page after this one, if a run can go on with it.
    fn next(self) -> Source {
        match self {
            Source::Zero | Source::Literal | Source::Same => self,
            Source::Kept(n) => Source::Kept(n.wrapping_add(1)),
            Source::Base { image, block } => Source::Base { image, block: block.wrapping_add(1) },
            Source::Template(n) => Source::Template(n.wrapping_add(1)),
            Source::Earlier(n) => Source::Earlier(n.wrapping_add(1)),
        }
    }
}

/// The page that a record is of, if nothing else is said: the one after that of the record before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Cursor {
    block: u16,
    offset: u64,
}

impl Cursor {
    fn after(place: Place) -> Cursor {
        Cursor { block: place.block, offset: place.offset.wrapping_add(PAGE_SIZE) }
    }
}

/// Makes the operations of frames. One for a stream; a copy of it makes a frame again.
#[derive(Clone, Debug, Default)]
pub struct Encoder {
    cursor: Cursor,
    blocks: usize,
    ops: Vec<u8>,
    /// The run that is not written yet: its first source, the next one, and how many.
    run: Option<(Source, Source, u64)>,
    /// Bytes that are not written yet.
    bytes: Vec<u8>,
}

impl Encoder {
    /// The stream goes on with these bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.end_run();
        self.bytes.extend_from_slice(bytes);
    }

    /// The stream goes on with the record of a page, which comes with the operations.
    pub fn inline<'n>(&mut self, place: Place, page: &[u8], blocks: impl Iterator<Item = &'n [u8]>) {
        self.go_to(place, blocks);
        self.end_run();
        varint::write(&mut self.ops, tag::INLINE);
        self.ops.extend_from_slice(page);
    }

    /// The stream goes on with the record of a page that can be had like this. `blocks` has the names of all blocks so far.
    pub fn page<'n>(&mut self, place: Place, source: Source, blocks: impl Iterator<Item = &'n [u8]>) {
        self.go_to(place, blocks);
        match &mut self.run {
            Some((_, next, n)) if *next == source => {
                *n += 1;
                *next = source.next();
            }
            _ => {
                self.end_run();
                self.run = Some((source, source.next(), 1));
            }
        }
    }

    /// Says of which page the next record is, unless it is the next in any case.
    fn go_to<'n>(&mut self, place: Place, mut blocks: impl Iterator<Item = &'n [u8]>) {
        if usize::from(place.block) >= self.blocks {
            self.end_run();
            self.end_bytes();
            for name in blocks.by_ref().skip(self.blocks).take(usize::from(place.block) + 1 - self.blocks) {
                varint::write(&mut self.ops, tag::BLOCK);
                varint::write(&mut self.ops, name.len() as u64);
                self.ops.extend_from_slice(name);
                self.blocks += 1;
            }
        }
        if place.named || self.cursor != (Cursor { block: place.block, offset: place.offset }) {
            self.end_run();
            self.end_bytes();
            for n in [tag::PLACE, place.block.into(), place.offset / PAGE_SIZE, place.named.into()] {
                varint::write(&mut self.ops, n);
            }
        }
        self.end_bytes();
        self.cursor = Cursor::after(place);
    }

    /// The operations so far; the next frame begins.
    pub fn finish(&mut self) -> Vec<u8> {
        self.end_run();
        self.end_bytes();
        std::mem::take(&mut self.ops)
    }

    fn end_bytes(&mut self) {
        if !self.bytes.is_empty() {
            varint::write(&mut self.ops, tag::BYTES);
            varint::write(&mut self.ops, self.bytes.len() as u64);
            self.ops.append(&mut self.bytes);
        }
    }

    fn end_run(&mut self) {
        let Some((first, _, n)) = self.run.take() else { return };
        let (tag, place): (u64, &[u64]) = match first {
            Source::Zero => (tag::ZERO, &[]),
            Source::Literal => (tag::LITERAL, &[]),
            Source::Same => (tag::SAME, &[]),
            Source::Kept(page) => (tag::KEPT, &[page]),
            Source::Base { image, block } => (tag::BASE, &[image.into(), block.into()]),
            Source::Template(page) => (tag::TEMPLATE, &[page]),
            Source::Earlier(page) => (tag::EARLIER, &[page]),
        };
        for number in [tag].iter().chain(place).chain(&[n]) {
            varint::write(&mut self.ops, *number);
        }
    }
}

/// The literals of a frame.
struct Literals<'a> {
    all: &'a [[u8; PAGE_BYTES]],
    used: usize,
    /// Those of the frames before.
    before: u64,
}

impl<'a> Literals<'a> {
    fn next(&mut self) -> Option<&'a [u8; PAGE_BYTES]> {
        let page = self.all.get(self.used)?;
        self.used += 1;
        Some(page)
    }

    /// One that was used already, by its number in the stream.
    fn used(&self, n: u64) -> Option<&'a [u8; PAGE_BYTES]> {
        let index = usize::try_from(n.checked_sub(self.before)?).ok()?;
        self.all.get(..self.used)?.get(index)
    }
}

/// What was wrong with a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It cannot be what a sender made; nothing that follows can be believed.
    Broken(&'static str),
    /// A page that this side should have, and has not, or not any more: the frame is to come again with literals alone.
    Missing(Source),
}

/// Where pages that do not come with a frame are found. Each fills `page`, and says whether it could.
pub trait Pages {
    /// A page of the kept image, by block and offset.
    fn same(&mut self, block: &[u8], offset: u64, page: &mut [u8; PAGE_BYTES]) -> bool;
    /// Any other page that is neither zero nor a literal.
    fn find(&mut self, source: Source, page: &mut [u8; PAGE_BYTES]) -> bool;
}

/// Makes the stream of frames. One for a stream.
#[derive(Clone, Debug, Default)]
pub struct Decoder {
    cursor: Cursor,
    named: bool,
    blocks: Vec<Arc<[u8]>>,
    /// Literals of the frames before this one.
    literals: u64,
}

impl Decoder {
    /// Appends to `out` what the frame stands for, and gives the decoder of the frame after it. This one can do the frame again, if
    /// it was not right; then what `out` has is not to be used.
    ///
    /// The literals of a frame that was right can be asked for by [`Source::Earlier`] from then on.
    ///
    /// # Errors
    /// See [`Fault`].
    pub fn apply(
        &self,
        ops: &[u8],
        literals: &[u8],
        pages: &mut impl Pages,
        out: &mut Vec<u8>,
    ) -> Result<Decoder, Fault> {
        let mut next = self.clone();
        let limit = out.len() + FRAME_BYTES_MAX;
        next.run(ops, literals, pages, out, limit)?;
        Ok(next)
    }

    fn run(
        &mut self,
        mut ops: &[u8],
        literals: &[u8],
        pages: &mut impl Pages,
        out: &mut Vec<u8>,
        limit: usize,
    ) -> Result<(), Fault> {
        let (all, rest) = literals.as_chunks::<PAGE_BYTES>();
        if !rest.is_empty() {
            return Err(Fault::Broken("literals that are no whole pages"));
        }
        let mut literals = Literals { all, used: 0, before: self.literals };
        while !ops.is_empty() {
            match number(&mut ops)? {
                tag::BYTES => {
                    let bytes = take(&mut ops, limit.saturating_sub(out.len()))?;
                    out.extend_from_slice(bytes);
                }
                tag::BLOCK => {
                    let name = take(&mut ops, NAME_BYTES_MAX)?;
                    if self.blocks.len() >= BLOCKS_MAX {
                        return Err(Fault::Broken("too many blocks of memory"));
                    }
                    self.blocks.push(name.into());
                }
                tag::PLACE => {
                    let (block, page, named) = (number(&mut ops)?, number(&mut ops)?, number(&mut ops)?);
                    let block =
                        u16::try_from(block).map_err(|_| Fault::Broken("a block of memory that has no name"))?;
                    let offset = page.checked_mul(PAGE_SIZE).ok_or(Fault::Broken("a page past all memory"))?;
                    self.cursor = Cursor { block, offset };
                    self.named = named == 1;
                }
                tag::INLINE => {
                    let (page, rest) = ops.split_first_chunk().ok_or(Fault::Broken("a page is cut off"))?;
                    ops = rest;
                    self.record(Kind::Data, Some(page), out, limit)?;
                }
                op => {
                    let (first, n) = source(op, &mut ops)?;
                    let mut source = first;
                    for _ in 0..n {
                        self.page(source, &mut literals, pages, out, limit)?;
                        source = source.next();
                    }
                }
            }
        }
        if literals.used < all.len() {
            return Err(Fault::Broken("literals that nothing asks for"));
        }
        self.literals += all.len() as u64;
        Ok(())
    }

    /// The record of the page that the cursor is at, from where it can be had.
    fn page(
        &mut self,
        source: Source,
        literals: &mut Literals<'_>,
        pages: &mut impl Pages,
        out: &mut Vec<u8>,
        limit: usize,
    ) -> Result<(), Fault> {
        let mut found = [0; PAGE_BYTES];
        let page = match source {
            Source::Zero => return self.record(Kind::Zero, None, out, limit),
            Source::Literal => literals.next().ok_or(Fault::Broken("fewer literals than it asks for"))?,
            Source::Earlier(n) if n >= literals.before => {
                literals.used(n).ok_or(Fault::Broken("an earlier page that has not come yet"))?
            }
            Source::Same if pages.same(self.name()?, self.cursor.offset, &mut found) => &found,
            Source::Same => return Err(Fault::Missing(source)),
            _ if pages.find(source, &mut found) => &found,
            _ => return Err(Fault::Missing(source)),
        };
        self.record(Kind::Data, Some(page), out, limit)
    }

    fn record(
        &mut self,
        kind: Kind,
        page: Option<&[u8; PAGE_BYTES]>,
        out: &mut Vec<u8>,
        limit: usize,
    ) -> Result<(), Fault> {
        let Cursor { block, offset } = self.cursor;
        let place = Place { block, offset, named: std::mem::take(&mut self.named) };
        place.write_header(kind, self.name()?, out);
        self.cursor = Cursor::after(place);
        match page {
            Some(page) => out.extend_from_slice(page),
            None => out.push(0),
        }
        // The last record may go over what a frame is to have, none after it.
        if out.len() > limit { Err(Fault::Broken("more than a frame may have")) } else { Ok(()) }
    }

    /// The name of the block that the cursor is in.
    fn name(&self) -> Result<&[u8], Fault> {
        let name = self.blocks.get(usize::from(self.cursor.block));
        name.map(|name| &**name).ok_or(Fault::Broken("a block of memory that has no name"))
    }
}

/// The source of a run's first page, and how many there are.
fn source(op: u64, ops: &mut &[u8]) -> Result<(Source, u64), Fault> {
    let source = match op {
        tag::ZERO => Source::Zero,
        tag::LITERAL => Source::Literal,
        tag::SAME => Source::Same,
        tag::KEPT => Source::Kept(number(ops)?),
        tag::BASE => {
            let (image, block) = (number(ops)?, number(ops)?);
            let wrong = Fault::Broken("a block past all images");
            match (u32::try_from(image), u32::try_from(block)) {
                (Ok(image), Ok(block)) => Source::Base { image, block },
                _ => return Err(wrong),
            }
        }
        tag::TEMPLATE => Source::Template(number(ops)?),
        tag::EARLIER => Source::Earlier(number(ops)?),
        _ => return Err(Fault::Broken("an operation that there is not")),
    };
    Ok((source, number(ops)?))
}

fn number(ops: &mut &[u8]) -> Result<u64, Fault> {
    varint::read(ops).ok_or(Fault::Broken("a number is cut off"))
}

/// So many bytes as the next number says, at most `most`.
fn take<'a>(ops: &mut &'a [u8], most: usize) -> Result<&'a [u8], Fault> {
    let len = number(ops)?;
    let len = usize::try_from(len).ok().filter(|len| *len <= most && *len <= ops.len());
    let (bytes, rest) = ops.split_at(len.ok_or(Fault::Broken("bytes are cut off, or too many"))?);
    *ops = rest;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
