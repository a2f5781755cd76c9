//! The disk that goes with a VM when the hosts share no storage: the blocks of its overlay, as pages of a memory are sent.
//!
//! ```text
//!  guest runs ───────────────────────────────▶ memory migrates ──▶ stands still ─────────▶ runs there
//!  pass 1: all blocks, pass 2: what has changed, …                  last pass ▶ SETTLED
//! ```
//!
//! A pass looks at all blocks that the overlay holds and sends those whose hash is not that of the pass before. That a block changes
//! while it is read costs the block once more. The last pass comes when the source's QEMU has stopped the VM and its server has
//! let go of the overlay, so what it reads is what the disk is. It is part of the downtime: reading and hashing the overlay, and
//! sending what the guest wrote while its memory migrated.
//!
//! Blocks go as frames of their own ([`Message::Disk`]): a block is a page, and found as one in base images, the kept memory and the template.

use super::frame::{FRAME_BYTES, Pages};
use super::join::{Joiner, strange};
use super::known::{Known, Received};
use super::link::{self, Line};
use super::part::{Item, Part};
use super::send::no_message;
use super::stream::{Block, Kind, PAGE_BYTES, PAGE_SIZE, Place};
use super::wire::{Digest, Frame, Message};
use super::work::{self, Counts, Decided, Decider};
use crate::error::{Error, ErrorKind, Result};
use crate::store::manifest::ZERO;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

/// Frames that are not acknowledged, at most.
const FRAMES: usize = 8;
/// Passes while the guest runs, at most.
const PASSES: usize = 6;
/// So few blocks that another pass is not worth its time: 8 MiB.
const FEW: u64 = 2048;
/// What the blocks are called in frames.
const NAME: &[u8] = b"disk";

/// Gets a block and its content; none is zeros. Behind the end of the disk are zeros.
pub type Each<'a> = &'a mut dyn FnMut(u64, Option<&[u8; PAGE_BYTES]>) -> Result<()>;

/// The disk of a VM that leaves.
pub trait LeavingDisk: Sync {
    /// Goes through the blocks of 4 KiB that are not the base image's, in order. `last`: nobody may write to it any more. True: the
    /// guest has its write cache switched on, as far as is known by then.
    ///
    /// # Errors
    /// It cannot be read, or somebody has it open although this is the last look.
    fn look(&self, last: bool, each: Each<'_>) -> Result<bool>;
}

/// The disk of a VM that comes.
pub trait ArrivingDisk: Send {
    /// Writes a block; none is zeros.
    ///
    /// # Errors
    /// It cannot be written.
    fn write(&mut self, block: u64, page: Option<&[u8; PAGE_BYTES]>) -> Result<()>;
    /// It is complete: from now on it is the VM's disk here, durably.
    ///
    /// # Errors
    /// It could not be made so; then there is none.
    fn settle(&mut self, write_cache: bool) -> Result<()>;
}

/// Sends a disk.
pub struct Departure<'a, K> {
    disk: &'a dyn LeavingDisk,
    known: &'a K,
    window: u64,
    /// Hash of each block as it was sent last.
    sent: HashMap<u64, Digest>,
    passes: Vec<Counts>,
}

impl<'a, K: Known> Departure<'a, K> {
    /// Of this disk, to a receiver of which this is known; the window is as in [`super::send::Options`].
    pub fn new(disk: &'a dyn LeavingDisk, known: &'a K, window: u64) -> Departure<'a, K> {
        Departure { disk, known, window, sent: HashMap::new(), passes: Vec::new() }
    }

    /// What each pass sent.
    pub fn passes(&self) -> &[Counts] {
        &self.passes
    }

    /// Sends what there is while the guest runs, until little changes any more. `told` hears of every pass.
    ///
    /// # Errors
    /// The disk cannot be read, or the link broke.
    pub fn begin(&mut self, line: &Line<'_>, mut told: impl FnMut(usize, &Counts)) -> Result<()> {
        for n in 1..=PASSES {
            let (counts, _) = self.pass(line, false)?;
            told(n, &counts);
            if counts.pages() < FEW {
                break;
            }
        }
        Ok(())
    }

    /// Sends the rest, and waits until the disk is durable there.
    ///
    /// # Errors
    /// As [`Departure::begin`], or the receiver cannot keep it.
    pub fn settle(&mut self, line: &Line<'_>) -> Result<()> {
        let (_, write_cache) = self.pass(line, true)?;
        line.send(&Message::Settled(write_cache)).map_err(|e| no_message(link::NoMessage::Broken(e)))?;
        match link::receive(line.link).map_err(no_message)? {
            Message::Settled(_) => Ok(()),
            other => Err(unexpected(other)),
        }
    }

    fn pass(&mut self, line: &Line<'_>, last: bool) -> Result<(Counts, bool)> {
        let mut pass = Pass::new(line, self.known, self.window);
        let (disk, sent) = (self.disk, &mut self.sent);
        let write_cache = disk.look(last, &mut |block, page| {
            let page = page.filter(|page| !crate::units::is_zero(&page[..]));
            let hash = page.map_or(ZERO, |page| *blake3::hash(page).as_bytes());
            if sent.insert(block, hash) == Some(hash) { Ok(()) } else { pass.block(block, page) }
        })?;
        let counts = pass.end()?;
        self.passes.push(counts);
        Ok((counts, write_cache))
    }
}

/// One time through the disk.
struct Pass<'a, K> {
    line: &'a Line<'a>,
    known: &'a K,
    decider: Decider,
    part: Part,
    /// Sent, and not acknowledged.
    waiting: VecDeque<Decided>,
    link_bytes: u64,
}

impl<'a, K: Known> Pass<'a, K> {
    fn new(line: &'a Line<'a>, known: &'a K, window: u64) -> Self {
        let blocks = Arc::new(vec![Block { name: NAME.into(), len: None }]);
        let part = Part { blocks, ..Part::default() };
        Pass { line, known, decider: Decider::new(window), part, waiting: VecDeque::new(), link_bytes: 0 }
    }

    fn block(&mut self, block: u64, page: Option<&[u8; PAGE_BYTES]>) -> Result<()> {
        let place = Place { block: 0, offset: block * PAGE_SIZE, named: false };
        let bytes = &mut self.part.bytes;
        match page {
            None => {
                place.write_header(Kind::Zero, NAME, bytes);
                bytes.push(0);
                self.part.items.push(Item::Zero(place));
            }
            Some(page) => {
                place.write_header(Kind::Data, NAME, bytes);
                self.part.items.push(Item::Page(place, bytes.len()));
                bytes.extend_from_slice(page);
            }
        }
        if self.part.bytes.len() >= FRAME_BYTES { self.send() } else { Ok(()) }
    }

    fn send(&mut self) -> Result<()> {
        let next = Part { number: self.part.number + 1, blocks: Arc::clone(&self.part.blocks), ..Part::default() };
        let part = std::mem::replace(&mut self.part, next);
        let decided = self.decider.decide(work::hash(part, self.known));
        self.write(decided.pack())?;
        self.waiting.push_back(decided);
        while self.waiting.len() >= FRAMES {
            self.answer()?;
        }
        Ok(())
    }

    fn write(&mut self, frame: std::io::Result<Frame>) -> Result<()> {
        let frame = frame.map_err(|e| Error::new(ErrorKind::Io, "zstd", e))?;
        let sent = self.line.send(&Message::Disk(frame)).map_err(|e| self.why(e))?;
        self.link_bytes += sent as u64;
        Ok(())
    }

    /// A receiver that gave up has said why.
    fn why(&self, e: std::io::Error) -> Error {
        if let Some(why) = link::last_word(self.line.link, &e) {
            return link::given_up("receiver", &why);
        }
        no_message(link::NoMessage::Broken(e))
    }

    fn answer(&mut self) -> Result<()> {
        let first = self.waiting.front().map(|decided| decided.part.number);
        match link::receive(self.line.link).map_err(no_message)? {
            Message::DiskAck(n) if Some(n) == first => {
                self.waiting.pop_front();
            }
            // The receiver takes nothing else until it comes; what was sent meanwhile is sent once more.
            Message::DiskAgain(n) if Some(n) == first => {
                let frames: Vec<_> = self.waiting.iter().skip(1).map(Decided::pack).collect();
                let again = self.waiting.front().map(Decided::pack_again);
                for frame in again.into_iter().chain(frames) {
                    self.write(frame)?;
                }
            }
            other => return Err(unexpected(other)),
        }
        Ok(())
    }

    fn end(mut self) -> Result<Counts> {
        if !self.part.items.is_empty() {
            self.send()?;
        }
        while !self.waiting.is_empty() {
            self.answer()?;
        }
        Ok(Counts { link_bytes: self.link_bytes, ..Counts::sum(self.decider.rounds()) })
    }
}

fn unexpected(message: Message) -> Error {
    match message {
        Message::Abort(why) => link::given_up("receiver", &why),
        _ => Error::new(ErrorKind::Corrupt, "receiver", "it said something else while the disk was sent"),
    }
}

/// Receives a disk.
pub struct Arrival<'a, P> {
    disk: &'a mut dyn ArrivingDisk,
    pages: P,
    window: u64,
    joiner: Option<Joiner<P>>,
    again: Option<u64>,
    settled: bool,
}

impl<'a, P: Pages + Clone> Arrival<'a, P> {
    /// Into this disk, with what is here.
    pub fn new(disk: &'a mut dyn ArrivingDisk, pages: P, window: u64) -> Arrival<'a, P> {
        Arrival { disk, pages, window, joiner: None, again: None, settled: false }
    }

    /// It is complete and durable.
    pub fn is_settled(&self) -> bool {
        self.settled
    }

    /// Takes a frame, and what is answered; nothing for one that comes behind one that is to come again.
    ///
    /// # Errors
    /// It is none, or the disk cannot be written.
    pub fn frame(&mut self, frame: &Frame) -> Result<Option<Message>> {
        if self.settled {
            return Err(strange("the disk goes on after its end"));
        }
        if self.again.is_some_and(|number| number != frame.number) {
            return Ok(None);
        }
        if frame.number == 0 && self.again.is_none() {
            self.joiner = Some(Joiner::new(Received::new(self.window, self.pages.clone())));
        }
        let joiner = self.joiner.as_mut().ok_or_else(|| strange("the disk does not begin with its first frame"))?;
        if joiner.join(frame)? {
            self.again = None;
            let mut records = joiner.out();
            while let Some(record) = Record::next(records) {
                self.disk.write(record.block, record.page)?;
                records = record.rest;
            }
            if !records.is_empty() {
                return Err(strange("blocks of a disk that make no sense"));
            }
            return Ok(Some(Message::DiskAck(frame.number)));
        }
        if self.again == Some(frame.number) {
            return Err(strange("a frame is wrong, and as wrong when it came again"));
        }
        self.again = Some(frame.number);
        Ok(Some(Message::DiskAgain(frame.number)))
    }

    /// The disk is complete.
    ///
    /// # Errors
    /// It is not, or cannot be made durable.
    pub fn settle(&mut self, write_cache: bool) -> Result<()> {
        if self.again.is_some() || self.settled {
            return Err(strange("the disk is not complete, or was before"));
        }
        self.joiner = None;
        self.disk.settle(write_cache)?;
        self.settled = true;
        Ok(())
    }
}

/// A block in a frame; no page is zeros.
struct Record<'a> {
    block: u64,
    page: Option<&'a [u8; PAGE_BYTES]>,
    rest: &'a [u8],
}

impl<'a> Record<'a> {
    /// The next one.
    fn next(records: &'a [u8]) -> Option<Record<'a>> {
        let (head, rest) = records.split_first_chunk::<8>()?;
        let head = u64::from_be_bytes(*head);
        let block = head / PAGE_SIZE;
        match Kind::of_flags(head % PAGE_SIZE)? {
            Kind::Zero => Some(Record { block, page: None, rest: rest.get(1..)? }),
            Kind::Data => {
                let (page, rest) = rest.split_first_chunk()?;
                Some(Record { block, page: Some(page), rest })
            }
        }
    }
}
