//! The stream cut into parts, each of which crosses the link as one frame.

use super::frame::{FRAME_BYTES, FRAME_BYTES_MAX};
use super::stream::{Block, Event, Kind, Mark, PAGE_BYTES, Parser, Place};
use std::sync::Arc;

/// What a part has, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Item {
    /// So many bytes.
    Bytes(usize),
    /// The record of a zero page.
    Zero(Place),
    /// The record of a page, whose bytes are at this place of the part's.
    Page(Place, usize),
}

/// A part of the stream.
#[derive(Clone, Debug, Default)]
pub struct Part {
    /// Counts the parts.
    pub number: u64,
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// What they are.
    pub items: Vec<Item>,
    /// The blocks of memory that were told of by its end.
    pub blocks: Arc<Vec<Block>>,
}

impl Part {
    /// The bytes of a page.
    pub fn page(&self, at: usize) -> &[u8] {
        self.bytes.get(at..at + PAGE_BYTES).unwrap_or_default()
    }

    /// The name of a block of memory.
    pub fn name(&self, block: u16) -> &[u8] {
        self.blocks.get(usize::from(block)).map_or(&[], |block| &block.name)
    }
}

/// Cuts the stream into parts as it comes.
#[derive(Debug, Default)]
pub struct Cutter {
    parser: Parser,
    part: Part,
    blocks: Arc<Vec<Block>>,
    done: Vec<Part>,
    /// The stream had these.
    marks: Vec<Mark>,
}

impl Cutter {
    /// Takes the next bytes of the stream.
    pub fn feed(&mut self, input: &[u8]) {
        let mut parser = std::mem::take(&mut self.parser);
        let Ok(()) = parser.feed(input, |blocks, event| {
            if blocks.len() != self.blocks.len() {
                self.blocks = Arc::new(blocks.to_vec());
            }
            self.take(event);
            Ok::<(), std::convert::Infallible>(())
        });
        self.parser = parser;
    }

    /// The source waits: all that there is, also what could only be told of with more.
    pub fn flush(&mut self) {
        let mut parser = std::mem::take(&mut self.parser);
        let Ok(()) = parser.flush(|_, event| {
            self.take(event);
            Ok::<(), std::convert::Infallible>(())
        });
        self.parser = parser;
        self.cut();
    }

    /// Ends the part in hand, if it has anything.
    pub fn cut(&mut self) {
        if !self.part.items.is_empty() {
            self.part.blocks = Arc::clone(&self.blocks);
            // With room for all that it may have: what is not written to takes no memory.
            let bytes = Vec::with_capacity(FRAME_BYTES_MAX);
            let next = Part { number: self.part.number + 1, bytes, ..Part::default() };
            self.done.push(std::mem::replace(&mut self.part, next));
        }
    }

    /// The parts that are complete.
    pub fn take_parts(&mut self) -> Vec<Part> {
        std::mem::take(&mut self.done)
    }

    /// What was seen in the stream since the last call.
    pub fn take_marks(&mut self) -> Vec<Mark> {
        std::mem::take(&mut self.marks)
    }

    /// The parser, for what it knows of the stream.
    pub fn parser(&self) -> &Parser {
        &self.parser
    }

    fn take(&mut self, event: Event<'_>) {
        match event {
            Event::Mark(mark) => self.marks.push(mark),
            Event::Bytes(mut bytes) => {
                while !bytes.is_empty() {
                    let room = FRAME_BYTES.saturating_sub(self.part.bytes.len()).max(1);
                    let (now, later) = bytes.split_at(room.min(bytes.len()));
                    self.part.bytes.extend_from_slice(now);
                    match self.part.items.last_mut() {
                        Some(Item::Bytes(len)) => *len += now.len(),
                        _ => self.part.items.push(Item::Bytes(now.len())),
                    }
                    bytes = later;
                    self.cut_if_full();
                }
            }
            Event::Zero(place) => {
                self.header(place, Kind::Zero);
                self.part.bytes.push(0);
                self.part.items.push(Item::Zero(place));
                self.cut_if_full();
            }
            Event::Page(place, page) => {
                self.header(place, Kind::Data);
                self.part.items.push(Item::Page(place, self.part.bytes.len()));
                self.part.bytes.extend_from_slice(page);
                self.cut_if_full();
            }
        }
    }

    fn header(&mut self, place: Place, kind: Kind) {
        let name = self.blocks.get(usize::from(place.block)).map_or(&[][..], |block| &block.name);
        place.write_header(kind, name, &mut self.part.bytes);
    }

    fn cut_if_full(&mut self) {
        if self.part.bytes.len() >= FRAME_BYTES {
            self.cut();
        }
    }
}
