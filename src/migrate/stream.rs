//! QEMU's migration stream, taken apart as it comes, in pieces of any size.
//!
//! The stream has no lengths at its sections (QEMU, `docs/devel/migration`, and what 7.2 and 10.0 write), so this knows the
//! sections of RAM and how long everything around them is, and nothing else:
//!
//! ```text
//! "QEVM" 3 │ 07 configuration │ 01 id "ram" … 7e id │ 02 id … 7e id │ … │ 03 id … 7e id │ devices … │ 00 06 description
//!                                └── block list        └── records of pages, then 0x10       └── all the rest: [`Event::Bytes`]
//! ```
//!
//! A record of RAM is a big-endian u64, the page's offset in its block with flags in the low bits, the block's name unless it is
//! that of the record before (flag *continue*), and the page.
//!
//! What is told of the stream is lossless whatever it is: the bytes of all events, in order and put back by
//! [`Place::write_header`], are the bytes that came in. A stream that is not understood is [`Event::Bytes`] from there on, until
//! something is found again that looks like the end of a section: at worst a migration takes as long as without us. What may be
//! misread is which page is where, and nobody relies on that without comparing hashes.

use std::sync::Arc;

/// Bytes of a page of an x86 guest: what a record holds.
pub const PAGE_BYTES: usize = 4096;
/// The same, as an offset.
pub const PAGE_SIZE: u64 = 4096;

/// Names of blocks that are remembered; a real guest has about ten.
pub const BLOCKS_MAX: usize = 1024;
/// Bytes of a block's name, at most: its length is one byte.
pub const NAME_BYTES_MAX: usize = 255;

/// Types of sections, and what else may stand between them (QEMU, migration/savevm.h).
mod section {
    pub const EOF: u8 = 0x00;
    pub const START: u8 = 0x01;
    pub const PART: u8 = 0x02;
    pub const END: u8 = 0x03;
    pub const FULL: u8 = 0x04;
    pub const SUBSECTION: u8 = 0x05;
    pub const DESCRIPTION: u8 = 0x06;
    pub const CONFIGURATION: u8 = 0x07;
    pub const COMMAND: u8 = 0x08;
    pub const FOOTER: u8 = 0x7e;
}

/// Flags of a record of RAM (QEMU, migration/ram.c). HOOK (RDMA) and those that came after 10.0 are not understood.
mod flag {
    pub const ZERO: u64 = 0x02;
    pub const MEM_SIZE: u64 = 0x04;
    pub const PAGE: u64 = 0x08;
    pub const EOS: u64 = 0x10;
    pub const CONTINUE: u64 = 0x20;
    pub const XBZRLE: u64 = 0x40;
    pub const COMPRESS: u64 = 0x100;
    pub const MULTIFD_FLUSH: u64 = 0x200;
    pub const ALL: u64 = super::PAGE_SIZE - 1;
}

/// Commands (QEMU, migration/savevm.c) that matter here.
mod command {
    pub const OPEN_RETURN_PATH: u16 = 1;
    pub const POSTCOPY_LISTEN: u16 = 4;
    pub const PACKAGED: u16 = 7;
}

/// The start of RAM, after its type and id: name, instance, version.
const RAM_START: &[u8] = b"\x03ram\0\0\0\0\0\0\0\x04";

/// A block of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its name in the stream.
    pub name: Arc<[u8]>,
    /// Bytes, if the block list named it.
    pub len: Option<u64>,
}

/// Where a page is, and how its record says so.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    /// Index in [`Parser::blocks`].
    pub block: u16,
    /// Byte offset in the block; a multiple of a page.
    pub offset: u64,
    /// The record names the block although the one before it may be of the same.
    pub named: bool,
}

/// What kind of page a record has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// All zero; the record has one byte for it.
    Zero,
    /// 4,096 bytes.
    Data,
}

impl Kind {
    /// What a record of these flags is that continues its block; none for any other.
    pub fn of_flags(flags: u64) -> Option<Kind> {
        const ZERO: u64 = flag::ZERO | flag::CONTINUE;
        const PAGE: u64 = flag::PAGE | flag::CONTINUE;
        match flags {
            ZERO => Some(Kind::Zero),
            PAGE => Some(Kind::Data),
            _ => None,
        }
    }
}

impl Place {
    /// Appends what stands before the page's bytes in its record: the inverse of what the parser does.
    pub fn write_header(&self, kind: Kind, name: &[u8], out: &mut Vec<u8>) {
        let kind = match kind {
            Kind::Zero => flag::ZERO,
            Kind::Data => flag::PAGE,
        };
        let more = if self.named { 0 } else { flag::CONTINUE };
        out.extend((self.offset | kind | more).to_be_bytes());
        if self.named {
            // Names come from a byte that says how long they are.
            out.push(u8::try_from(name.len()).unwrap_or(u8::MAX));
            out.extend(name);
        }
    }
}

/// What came, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Bytes that are passed on as they are.
    Bytes(&'a [u8]),
    /// The record of a page with its 4,096 bytes.
    Page(Place, &'a [u8]),
    /// The record of a page that is zero.
    Zero(Place),
    /// No bytes: something that was just seen.
    Mark(Mark),
}

/// What a proxy wants to know of the stream beside its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// The source opened a return path (capability `return-path`).
    ReturnPath,
    /// The list of the blocks of memory is complete.
    Blocks,
    /// A section with pages has ended.
    RoundEnd,
    /// The last of them.
    RamEnd,
    /// Postcopy begins, or all of the devices follow in one piece: what comes is bytes.
    Packaged,
    /// The stream is not understood from here on.
    Lost,
}

/// Where in the stream the parser is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before the first byte.
    Magic,
    /// Between sections.
    Top,
    /// In a section with pages, of this type.
    Ram { section: u8 },
    /// In the block list, so many bytes of memory before its end.
    BlockList { left: u64 },
    /// In something of unknown length: until the footer of this section, or without one until RAM starts.
    Unknown { id: Option<u32> },
    /// All the rest is bytes.
    Rest,
}

/// What the bytes at hand are.
enum Token {
    /// More are needed to tell.
    More,
    /// So many bytes that are passed on, and then this.
    Bytes(usize, State, Option<Mark>),
    /// A record of so many bytes.
    Zero(usize, Place),
    Page(usize, Place),
    /// Nothing that is known.
    Lost,
}

/// Takes the stream apart. Holds back less than two records.
#[derive(Debug)]
pub struct Parser {
    state: State,
    buf: Vec<u8>,
    /// Bytes at the start of `buf` that were passed on already ([`Parser::flush`]).
    sent: usize,
    ram: Option<u32>,
    blocks: Vec<Block>,
    current: Option<u16>,
    machine: Option<String>,
}

impl Default for Parser {
    fn default() -> Self {
        Parser {
            state: State::Magic,
            buf: Vec::new(),
            sent: 0,
            ram: None,
            blocks: Vec::new(),
            current: None,
            machine: None,
        }
    }
}

impl Parser {
    /// The blocks of memory that were named so far, in order.
    pub fn blocks(&self) -> &[Block] {
        &self.blocks
    }

    /// The machine type of the configuration section, such as `pc-q35-7.2`.
    pub fn machine(&self) -> Option<&str> {
        self.machine.as_deref()
    }

    /// Bytes that came and are not told of yet.
    pub fn held(&self) -> usize {
        self.buf.len() - self.sent
    }

    /// What is held back is the beginning of a page's record: whoever wrote it goes on by himself.
    pub fn is_in_record(&self) -> bool {
        self.held() > 0 && matches!(self.state, State::Ram { .. })
    }

    /// Takes the next bytes, and tells `sink` of all that can be told now.
    pub fn feed<E>(
        &mut self,
        input: &[u8],
        mut sink: impl FnMut(&[Block], Event<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.state == State::Rest && self.held() == 0 {
            self.buf.clear();
            self.sent = 0;
            return if input.is_empty() { Ok(()) } else { sink(&self.blocks, Event::Bytes(input)) };
        }
        let mut input = input;
        while !self.buf.is_empty() && !input.is_empty() {
            // What is held back gets a little more, until all that comes can be told of where it lies.
            let (held, (now, later)) = (self.buf.len(), input.split_at(input.len().min(2 * PAGE_BYTES)));
            let mut buf = std::mem::take(&mut self.buf);
            buf.extend_from_slice(now);
            let (told, result) = self.tell(&buf, &mut sink);
            if result.is_ok() && told >= held {
                buf.clear();
                input = input.get(told - held..).unwrap_or_default();
            } else {
                buf.drain(..told.min(buf.len()));
                input = later;
            }
            self.buf = buf;
            if result.is_err() {
                self.buf.extend_from_slice(later);
                return result;
            }
        }
        let (told, result) = self.tell(input, &mut sink);
        self.buf.extend_from_slice(input.get(told..).unwrap_or_default());
        result
    }

    /// Tells of what is in these bytes; how many that were.
    fn tell<E>(
        &mut self,
        bytes: &[u8],
        sink: &mut impl FnMut(&[Block], Event<'_>) -> Result<(), E>,
    ) -> (usize, Result<(), E>) {
        let mut at = 0;
        loop {
            let rest = bytes.get(at..).unwrap_or_default();
            let (len, event, mark) = match self.token(rest) {
                Token::More => return (at, Ok(())),
                Token::Bytes(len, state, mark) => {
                    self.state = state;
                    (len, None, mark)
                }
                Token::Zero(len, place) => (len, Some(Event::Zero(place)), None),
                Token::Page(len, place) => {
                    let page = rest.get(len - PAGE_BYTES..len).unwrap_or_default();
                    (len, Some(Event::Page(place, page)), None)
                }
                Token::Lost => {
                    self.state = State::Unknown { id: self.ram };
                    self.current = None;
                    (0, None, Some(Mark::Lost))
                }
            };
            // What was flushed before it could be understood is not told of twice.
            let event = match (event, self.sent) {
                (Some(event), 0) => Some(event),
                (_, sent) => rest.get(sent.min(len)..len).filter(|b| !b.is_empty()).map(Event::Bytes),
            };
            self.sent = self.sent.saturating_sub(len);
            at += len;
            if let Some(Err(e)) = event.map(|event| sink(&self.blocks, event)) {
                return (at, Err(e));
            }
            if let Some(Err(e)) = mark.map(|mark| sink(&self.blocks, Event::Mark(mark))) {
                return (at, Err(e));
            }
        }
    }

    /// Passes on what is held back. For a source that has stopped to wait for an answer, and for the end.
    pub fn flush<E>(&mut self, mut sink: impl FnMut(&[Block], Event<'_>) -> Result<(), E>) -> Result<(), E> {
        let held = self.buf.get(self.sent..).unwrap_or_default();
        if !held.is_empty() {
            sink(&self.blocks, Event::Bytes(held))?;
            self.sent = self.buf.len();
        }
        Ok(())
    }

    fn token(&mut self, rest: &[u8]) -> Token {
        if rest.is_empty() {
            return Token::More;
        }
        match self.state {
            State::Magic => magic(rest),
            State::Top => self.top(rest).unwrap_or(Token::More),
            State::BlockList { left } => self.block(rest, left).unwrap_or(Token::More),
            State::Ram { section } => self.record(rest, section).unwrap_or(Token::More),
            State::Unknown { id } => unknown(rest, id, self.ram.is_none()),
            State::Rest => Token::Bytes(rest.len(), State::Rest, None),
        }
    }

    /// A section's header, or a command. `None`: more bytes are needed.
    fn top(&mut self, rest: &[u8]) -> Option<Token> {
        let (kind, body) = rest.split_first()?;
        Some(match *kind {
            section::START | section::FULL => {
                let id = be32(body, 0)?;
                let name_len = usize::from(*body.get(4)?);
                let header = body.get(4..5 + name_len + 8)?;
                let len = 1 + 4 + header.len();
                if *kind == section::START && header == RAM_START {
                    self.ram = Some(id);
                    self.current = None;
                    Token::Bytes(len, State::Ram { section: *kind }, None)
                } else {
                    Token::Bytes(len, State::Unknown { id: Some(id) }, None)
                }
            }
            section::PART | section::END => {
                let id = be32(body, 0)?;
                let state = match Some(id) == self.ram {
                    true => State::Ram { section: *kind },
                    false => State::Unknown { id: Some(id) },
                };
                // Its first record may continue the block of the last one of the section before.
                Token::Bytes(5, state, None)
            }
            section::FOOTER => {
                be32(body, 0)?;
                Token::Bytes(5, State::Top, None)
            }
            section::CONFIGURATION => {
                let len = usize::try_from(be32(body, 0)?).unwrap_or(usize::MAX);
                if len > 256 {
                    return Some(Token::Lost);
                }
                let name = body.get(4..4 + len)?;
                self.machine = Some(String::from_utf8_lossy(name).into_owned());
                Token::Bytes(5 + len, State::Top, None)
            }
            section::COMMAND => {
                let command = be16(body, 0)?;
                let len = usize::from(be16(body, 2)?);
                body.get(4..4 + len)?;
                let (state, mark) = match command {
                    command::OPEN_RETURN_PATH => (State::Top, Some(Mark::ReturnPath)),
                    command::PACKAGED | command::POSTCOPY_LISTEN => (State::Rest, Some(Mark::Packaged)),
                    _ => (State::Top, None),
                };
                Token::Bytes(5 + len, state, mark)
            }
            section::EOF | section::DESCRIPTION => Token::Bytes(1, State::Rest, None),
            section::SUBSECTION => Token::Bytes(1, State::Unknown { id: None }, None),
            _ => Token::Lost,
        })
    }

    /// One block of the block list.
    fn block(&mut self, rest: &[u8], left: u64) -> Option<Token> {
        let name_len = usize::from(*rest.first()?);
        let name = rest.get(1..1 + name_len)?;
        let len = be64(rest, 1 + name_len)?;
        if name.is_empty() || len == 0 || len > left || self.blocks.len() >= BLOCKS_MAX {
            // With capabilities that nobody has asked for, a block has more fields.
            return Some(Token::Lost);
        }
        self.blocks.push(Block { name: name.into(), len: Some(len) });
        let left = left - len;
        let (state, mark) = match left {
            0 => (State::Ram { section: section::START }, Some(Mark::Blocks)),
            _ => (State::BlockList { left }, None),
        };
        Some(Token::Bytes(1 + name_len + 8, state, mark))
    }

    /// A record of a section with pages.
    fn record(&mut self, rest: &[u8], section: u8) -> Option<Token> {
        let word = be64(rest, 0)?;
        let (offset, flags) = (word & !flag::ALL, word & flag::ALL);
        let here = State::Ram { section };
        match flags {
            flag::EOS => {
                let (state, mark) = match section {
                    section::END => (State::Rest, Mark::RamEnd),
                    _ => (State::Top, Mark::RoundEnd),
                };
                return Some(Token::Bytes(8, state, Some(mark)));
            }
            flag::MULTIFD_FLUSH => return Some(Token::Bytes(8, here, None)),
            // QEMU writes the list once. A second one would give other blocks the numbers of the first's.
            flag::MEM_SIZE if offset > 0 && self.blocks.is_empty() => {
                self.current = None;
                return Some(Token::Bytes(8, State::BlockList { left: offset }, None));
            }
            _ => {}
        }
        let named = flags & flag::CONTINUE == 0;
        let (mut len, block) = if named {
            let name_len = usize::from(*rest.get(8)?);
            let Some(block) = self.block_named(rest.get(9..9 + name_len)?) else { return Some(Token::Lost) };
            (9 + name_len, Some(block))
        } else {
            // After something that was not understood nobody knows which block is continued.
            (8, self.current)
        };
        let place = block.map(|block| Place { block, offset, named });
        let token = match (flags & !flag::CONTINUE, place) {
            (flag::ZERO, place) => match (*rest.get(len)?, place) {
                (0, Some(place)) => Token::Zero(len + 1, place),
                _ => Token::Bytes(len + 1, here, None),
            },
            (flag::PAGE, place) => {
                len += PAGE_BYTES;
                rest.get(..len)?;
                place.map_or(Token::Bytes(len, here, None), |place| Token::Page(len, place))
            }
            (flag::XBZRLE, _) => {
                len += 3 + usize::from(be16(rest, len + 1)?);
                rest.get(..len)?;
                Token::Bytes(len, here, None)
            }
            (flag::COMPRESS, _) => {
                let data = usize::try_from(be32(rest, len)?).unwrap_or(usize::MAX);
                if data > 2 * PAGE_BYTES {
                    return Some(Token::Lost);
                }
                len += 4 + data;
                rest.get(..len)?;
                Token::Bytes(len, here, None)
            }
            _ => return Some(Token::Lost),
        };
        // Only now, with all of the record here: the same bytes are looked at again when more have come.
        self.current = block;
        Some(token)
    }

    fn block_named(&mut self, name: &[u8]) -> Option<u16> {
        // The blocks of a guest are few, and most records continue one.
        let known = self.blocks.iter().position(|b| *b.name == *name);
        let index = match known {
            Some(index) => index,
            None if self.blocks.len() < BLOCKS_MAX && !name.is_empty() => {
                self.blocks.push(Block { name: name.into(), len: None });
                self.blocks.len() - 1
            }
            None => return None,
        };
        u16::try_from(index).ok()
    }
}

/// "QEVM" and version 3.
fn magic(rest: &[u8]) -> Token {
    const MAGIC: &[u8] = b"QEVM\0\0\0\x03";
    match rest.get(..MAGIC.len()) {
        Some(MAGIC) => Token::Bytes(MAGIC.len(), State::Top, None),
        None if MAGIC.starts_with(rest) => Token::More,
        _ => Token::Lost,
    }
}

/// As far as a footer with what may follow one; or, as long as no RAM was seen, as far as its start.
fn unknown(rest: &[u8], id: Option<u32>, before_ram: bool) -> Token {
    let here = State::Unknown { id };
    let footer = id.map(|id| {
        let [a, b, c, d] = id.to_be_bytes();
        [section::FOOTER, a, b, c, d]
    });
    for at in 0..rest.len() {
        let Some(from) = rest.get(at..) else { break };
        let mut cut = false;
        if let Some(footer) = footer {
            match from.get(..footer.len()) {
                Some(found) if *found == footer => match from.get(footer.len()) {
                    Some(next) if follows_footer(*next) => return skip(at, footer.len(), State::Top),
                    Some(_) => {}
                    None => cut = true,
                },
                Some(_) => {}
                None => cut = footer.starts_with(from),
            }
        }
        if before_ram && from.first() == Some(&section::START) {
            match from.get(5..5 + RAM_START.len()) {
                Some(RAM_START) => return skip(at, 0, State::Top),
                Some(_) => {}
                None => cut |= from.get(5..).is_none_or(|part| RAM_START.starts_with(part)),
            }
        }
        if cut {
            return if at == 0 { Token::More } else { Token::Bytes(at, here, None) };
        }
    }
    Token::Bytes(rest.len(), here, None)
}

/// So many bytes of what is unknown, and these.
fn skip(at: usize, more: usize, state: State) -> Token {
    Token::Bytes(at + more, state, None)
}

/// What may stand behind the footer of a section.
fn follows_footer(kind: u8) -> bool {
    matches!(kind, section::EOF | section::START | section::PART | section::END | section::FULL | section::COMMAND)
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|b| u16::from_be_bytes(*b))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|b| u32::from_be_bytes(*b))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|b| u64::from_be_bytes(*b))
}

#[cfg(test)]
mod tests;
