//! What a sender does to a part: hash its pages (map), decide where the other side has each (reduce, in order), pack what it has not.
//!
//! The three steps are functions of their own, so that a study of one of them needs no sockets (DedupMR's figures over chunk sizes
//! and workers).

use super::frame::{Encoder, Source};
use super::known::{Known, Sent};
use super::part::{Item, Part};
use super::stream::Place;
use super::wire::{Digest, Frame, chain};
use serde::Serialize;
use std::cell::RefCell;
use std::io;

/// zstd's level: what a link of a gigabit wants.
pub const LEVEL: i32 = 1;
/// Rounds that are counted each; the last of them has all that follow.
const ROUNDS_MAX: usize = 1000;

/// A part with what can be said of its pages without knowing those before it.
#[derive(Debug)]
pub struct Hashed {
    /// The part.
    pub part: Part,
    /// Of each page that is not a zero record: its hash, and where the other side has it beside this stream.
    pub pages: Vec<(Digest, Option<Source>)>,
    /// Of the part's bytes.
    pub digest: Digest,
}

/// Hashes the pages of a part, and looks them up.
pub fn hash(part: Part, known: &impl Known) -> Hashed {
    let mut pages = Vec::new();
    for item in &part.items {
        let Item::Page(place, at) = *item else { continue };
        let page = part.page(at);
        if crate::units::is_zero(page) {
            pages.push((Digest::default(), None));
            continue;
        }
        let hash = *blake3::hash(page).as_bytes();
        pages.push((hash, known.find(part.name(place.block), place, &hash, page)));
    }
    let digest = *blake3::hash(&part.bytes).as_bytes();
    Hashed { part, pages, digest }
}

/// Pages of a migration by where the other side had them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Records of zero pages.
    pub zero: u64,
    /// In the kept image.
    pub kept: u64,
    /// In a base image.
    pub base: u64,
    /// In the template.
    pub template: u64,
    /// Earlier in this stream.
    pub intra: u64,
    /// Nowhere.
    pub literal: u64,
    /// Bytes of the stream.
    pub stream_bytes: u64,
    /// Bytes of the frames on the link.
    pub link_bytes: u64,
}

impl Counts {
    /// All pages.
    pub fn pages(&self) -> u64 {
        self.zero + self.kept + self.base + self.template + self.intra + self.literal
    }

    /// Of all rounds.
    pub fn sum(rounds: &[Counts]) -> Counts {
        rounds.iter().fold(Counts::default(), |a, b| Counts {
            zero: a.zero + b.zero,
            kept: a.kept + b.kept,
            base: a.base + b.base,
            template: a.template + b.template,
            intra: a.intra + b.intra,
            literal: a.literal + b.literal,
            stream_bytes: a.stream_bytes + b.stream_bytes,
            link_bytes: a.link_bytes + b.link_bytes,
        })
    }

    fn count(&mut self, source: Source) {
        let one = match source {
            Source::Zero => &mut self.zero,
            Source::Literal => &mut self.literal,
            Source::Same | Source::Kept(_) => &mut self.kept,
            Source::Base { .. } => &mut self.base,
            Source::Template(_) => &mut self.template,
            Source::Earlier(_) => &mut self.intra,
        };
        *one += 1;
    }
}

/// A part that is decided: everything that is needed to send it, and to send it again.
#[derive(Debug)]
pub struct Decided {
    /// The part.
    pub part: Part,
    /// Of each page what the encoder was told.
    pub sources: Vec<Source>,
    /// The encoder before it.
    pub before: Encoder,
    /// Operations, not packed.
    pub ops: Vec<u8>,
    /// Literals, not packed.
    pub literals: Vec<u8>,
    /// Of the stream as far as here.
    pub digest: Digest,
    /// The round that it ends in.
    pub round: usize,
}

/// Decides, part after part.
#[derive(Debug)]
pub struct Decider {
    encoder: Encoder,
    sent: Sent,
    digest: Digest,
    rounds: Vec<Counts>,
    /// Block and offset of the last page.
    last: (u16, u64),
}

impl Decider {
    /// With a window of so many literals.
    pub fn new(window: u64) -> Decider {
        let rounds = vec![Counts::default()];
        Decider { encoder: Encoder::default(), sent: Sent::new(window), digest: [0; 32], rounds, last: (0, 0) }
    }

    /// Pages so far, by rounds. A round is a pass over the memory: QEMU goes through it in order, again and again, and sends what
    /// has changed; the stream itself does not say where a round begins.
    pub fn rounds(&self) -> &[Counts] {
        &self.rounds
    }

    fn count(&mut self, place: Place, source: Source) {
        let here = (place.block, place.offset);
        if here < self.last && self.rounds.len() < ROUNDS_MAX {
            self.rounds.push(Counts::default());
        }
        self.last = here;
        if let Some(round) = self.rounds.last_mut() {
            round.count(source);
        }
    }

    /// Takes the next part.
    pub fn decide(&mut self, hashed: Hashed) -> Decided {
        let Hashed { part, pages, digest } = hashed;
        let before = self.encoder.clone();
        let (mut sources, mut literals) =
            (Vec::with_capacity(pages.len()), Vec::with_capacity(pages.len() * super::stream::PAGE_BYTES));
        let (mut at, mut hashes) = (0, pages.into_iter());
        for item in &part.items {
            match *item {
                Item::Bytes(len) => {
                    self.encoder.bytes(part.bytes.get(at..at + len).unwrap_or_default());
                    at += len;
                }
                Item::Zero(place) => {
                    self.count(place, Source::Zero);
                    self.encoder.page(place, Source::Zero, names(&part));
                    at += header_len(&part, place) + 1;
                }
                Item::Page(place, from) => {
                    let Some((hash, known)) = hashes.next() else { break };
                    let earlier = || self.sent.look(&hash).map(Source::Earlier);
                    let source = known.or_else(earlier).unwrap_or(Source::Literal);
                    if source == Source::Literal {
                        literals.extend_from_slice(part.page(from));
                    }
                    self.count(place, source);
                    self.encoder.page(place, source, names(&part));
                    sources.push(source);
                    at = from + super::stream::PAGE_BYTES;
                }
            }
        }
        if let Some(round) = self.rounds.last_mut() {
            round.stream_bytes += part.bytes.len() as u64;
        }
        self.digest = chain(&self.digest, &digest);
        let round = self.rounds.len() - 1;
        Decided { ops: self.encoder.finish(), sources, before, literals, digest: self.digest, round, part }
    }
}

impl Decided {
    /// The frame.
    ///
    /// # Errors
    /// zstd fails.
    pub fn pack(&self) -> io::Result<Frame> {
        self.frame(&self.ops)
    }

    /// The frame once more, with every page that the other side might not have.
    ///
    /// # Errors
    /// zstd fails.
    pub fn pack_again(&self) -> io::Result<Frame> {
        let mut encoder = self.before.clone();
        let (mut at, mut sources) = (0, self.sources.iter());
        for item in &self.part.items {
            match *item {
                Item::Bytes(len) => {
                    encoder.bytes(self.part.bytes.get(at..at + len).unwrap_or_default());
                    at += len;
                }
                Item::Zero(place) => {
                    encoder.page(place, Source::Zero, names(&self.part));
                    at += header_len(&self.part, place) + 1;
                }
                Item::Page(place, from) => {
                    match sources.next() {
                        // Its number must stay what it was.
                        Some(Source::Literal) => encoder.page(place, Source::Literal, names(&self.part)),
                        _ => encoder.inline(place, self.part.page(from), names(&self.part)),
                    }
                    at = from + super::stream::PAGE_BYTES;
                }
            }
        }
        self.frame(&encoder.finish())
    }

    fn frame(&self, ops: &[u8]) -> io::Result<Frame> {
        let len = |bytes: &[u8]| u32::try_from(bytes.len()).map_err(io::Error::other);
        Ok(Frame {
            number: self.part.number,
            ops_len: len(ops)?,
            literals_len: len(&self.literals)?,
            digest: self.digest,
            ops: compress(ops)?,
            literals: compress(&self.literals)?,
        })
    }
}

/// With what zstd needs of memory, once for each thread.
fn compress(bytes: &[u8]) -> io::Result<Vec<u8>> {
    thread_local!(static ZSTD: RefCell<Option<zstd::bulk::Compressor<'static>>> = const { RefCell::new(None) });
    ZSTD.with_borrow_mut(|zstd| match zstd {
        Some(zstd) => zstd.compress(bytes),
        None => zstd.insert(zstd::bulk::Compressor::new(LEVEL)?).compress(bytes),
    })
}

fn names(part: &Part) -> impl Iterator<Item = &[u8]> {
    part.blocks.iter().map(|block| &*block.name)
}

/// Bytes of a record before its page.
fn header_len(part: &Part, place: Place) -> usize {
    if place.named { 9 + part.name(place.block).len() } else { 8 }
}
