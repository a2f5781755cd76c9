//! What a sender may say: messages, and frames whose operations and literals no sender makes. A receiver refuses them, or makes of them
//! what they stand for, and never more than a frame may have.

use super::edits::{self, Edit};
use super::rng::Rng;
use super::stream::{NAMES, cross};
use super::{Fuzz, Outcome, Seen, Setup};
use serde::{Deserialize, Serialize};
use vmar::migrate::frame::{Decoder, Encoder, FRAME_BYTES_MAX, Fault, LITERALS_MAX, Pages, Source};
use vmar::migrate::join::Joiner;
use vmar::migrate::known::Received;
use vmar::migrate::stream::{Kind, PAGE_BYTES, PAGE_SIZE, Place};
use vmar::migrate::varint;
use vmar::migrate::wire::{Digest, Frame, HEADER_BYTES, Hello, Message, Welcome, chain};

/// The last record of a frame may go over what it is to have.
const OUT_MAX: usize = FRAME_BYTES_MAX + PAGE_BYTES + 9 + 255;
/// Literals that a receiver keeps.
const WINDOW: u64 = 8;

/// Where a page is, in a form that serde knows.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Where {
    Zero,
    Literal,
    Same,
    Kept(u64),
    Base(u32, u32),
    Template(u64),
    Earlier(u64),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Step {
    /// Records of pages that follow each other, the first of this block and page unless it continues.
    Pages { block: u8, page: u32, named: bool, from: Where, count: u8 },
    Bytes {
        #[serde(with = "super::hex")]
        bytes: Vec<u8>,
    },
    /// Numbers that are written as they are: an operation, or what looks like one.
    Numbers { numbers: Vec<u64> },
    /// A page as an operation.
    Inline,
    /// The frame ends.
    Frame,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    steps: Vec<Step>,
    /// To the operations of each frame.
    ops: Vec<Edit>,
    /// So many literals more or less than are asked for.
    literals: i8,
    /// To the frame as a message, after its header.
    message: Vec<Edit>,
    /// A message of another type, and what is done to it.
    other: u8,
    other_edits: Vec<Edit>,
}

pub struct Frames;

/// What a receiver has; it lacks every seventh page.
struct Has;

impl Has {
    fn fill(n: u64, page: &mut [u8; PAGE_BYTES]) -> bool {
        page.as_chunks_mut::<8>().0.fill(n.wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
        n % 7 != 6
    }
}

impl Pages for Has {
    fn same(&mut self, block: &[u8], offset: u64, page: &mut [u8; PAGE_BYTES]) -> bool {
        Has::fill(block.len() as u64 + offset / PAGE_SIZE, page)
    }

    fn find(&mut self, source: Source, page: &mut [u8; PAGE_BYTES]) -> bool {
        match source {
            Source::Kept(n) | Source::Template(n) => Has::fill(n, page),
            Source::Base { image, block } => Has::fill(u64::from(image) << 32 | u64::from(block), page),
            _ => false,
        }
    }
}

fn literal(n: u64) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    Has::fill(n + 1_000_000, &mut page);
    page
}

/// A frame before it is packed, and the stream that it stands for if nothing was done to it and the receiver has all pages.
#[derive(Default)]
struct Plain {
    ops: Vec<u8>,
    literals: Vec<u8>,
    stream: Option<Vec<u8>>,
}

/// Makes frames of steps, as a sender would.
struct Maker {
    encoder: Encoder,
    plain: Plain,
    stream: Option<Vec<u8>>,
    /// Nothing was said so far that no sender says.
    honest: bool,
    next: (u8, u32),
    sent: Vec<[u8; PAGE_BYTES]>,
    done: Vec<Plain>,
}

impl Maker {
    fn step(&mut self, step: &Step) {
        match step {
            Step::Frame => self.end(),
            Step::Bytes { bytes } => {
                self.encoder.bytes(bytes);
                self.stream.iter_mut().for_each(|s| s.extend(bytes));
            }
            Step::Numbers { numbers } => {
                // What comes from an encoder ends first.
                self.plain.ops.append(&mut self.encoder.finish());
                numbers.iter().for_each(|n| varint::write(&mut self.plain.ops, *n));
                (self.honest, self.stream) = (false, None);
            }
            Step::Inline => self.page(self.next, false, None),
            Step::Pages { block, page, named, from, count } => {
                for n in 0..u64::from(*count) {
                    let here = if n == 0 { (*block % NAMES.len() as u8, *page) } else { self.next };
                    let source = match *from {
                        Where::Zero => Source::Zero,
                        Where::Literal => Source::Literal,
                        Where::Same => Source::Same,
                        Where::Kept(page) => Source::Kept(page.wrapping_add(n)),
                        Where::Base(image, block) => Source::Base { image, block: block.wrapping_add(n as u32) },
                        Where::Template(page) => Source::Template(page.wrapping_add(n)),
                        Where::Earlier(page) => Source::Earlier(page.wrapping_add(n)),
                    };
                    self.page(here, *named && n == 0, Some(source));
                }
            }
        }
    }

    /// A record, from where it can be had; from the operations themselves if nowhere.
    fn page(&mut self, (block, page): (u8, u32), named: bool, source: Option<Source>) {
        let place = Place { block: block.into(), offset: u64::from(page) * PAGE_SIZE, named };
        let names = || NAMES.iter().copied();
        let mut content = [0; PAGE_BYTES];
        let there = match source {
            None => {
                content = literal(77);
                true
            }
            Some(Source::Zero) => true,
            Some(Source::Literal) => {
                content = literal(self.sent.len() as u64);
                self.sent.push(content);
                self.plain.literals.extend(content);
                true
            }
            Some(Source::Same) => Has.same(NAMES[usize::from(block)], place.offset, &mut content),
            Some(Source::Earlier(n)) => {
                // The window moves on when a frame is whole.
                let before = self.sent.len() - self.plain.literals.len() / PAGE_BYTES;
                let index = usize::try_from(n).unwrap_or(usize::MAX);
                let found = self.sent.get(index).filter(|_| index + WINDOW as usize >= before);
                found.inspect(|found| content = **found).is_some()
            }
            Some(source) => Has.find(source, &mut content),
        };
        match source {
            Some(source) => self.encoder.page(place, source, names()),
            None => self.encoder.inline(place, &content, names()),
        }
        let kind = if source == Some(Source::Zero) { Kind::Zero } else { Kind::Data };
        self.stream = self.stream.take().filter(|_| there);
        if let Some(stream) = &mut self.stream {
            place.write_header(kind, NAMES[usize::from(block)], stream);
            let len = if kind == Kind::Zero { 1 } else { PAGE_BYTES };
            stream.extend(&content[..len]);
        }
        self.next = (block, page.wrapping_add(1));
    }

    fn end(&mut self) {
        let mut plain = std::mem::take(&mut self.plain);
        plain.ops.append(&mut self.encoder.finish());
        plain.stream = std::mem::replace(&mut self.stream, self.honest.then(Vec::new));
        self.done.push(plain);
    }
}

fn frames(input: &Input) -> Vec<Plain> {
    let mut maker = Maker {
        encoder: Encoder::default(),
        plain: Plain::default(),
        stream: Some(Vec::new()),
        honest: true,
        next: (0, 0),
        sent: Vec::new(),
        done: Vec::new(),
    };
    input.steps.iter().for_each(|s| maker.step(s));
    maker.end();
    let (mut frames, mut honest) = (maker.done, true);
    for frame in &mut frames {
        let clean = frame.ops.clone();
        input.ops.iter().for_each(|e| e.apply(&mut frame.ops));
        frame.ops.truncate(2 * FRAME_BYTES_MAX);
        let literals = (frame.literals.len() / PAGE_BYTES).saturating_add_signed(input.literals.into());
        let asked = frame.literals.len();
        frame.literals.resize(literals.min(LITERALS_MAX) * PAGE_BYTES, 0x5A);
        // What follows is of another place than it believes.
        honest &= frame.ops == clean && frame.literals.len() == asked;
        frame.stream = frame.stream.take().filter(|_| honest);
    }
    frames
}

fn packed(number: u64, plain: &Plain, digest: Digest) -> Frame {
    Frame {
        number,
        ops_len: plain.ops.len() as u32,
        literals_len: plain.literals.len() as u32,
        digest,
        ops: zstd::bulk::compress(&plain.ops, 1).unwrap(),
        literals: zstd::bulk::compress(&plain.literals, 1).unwrap(),
    }
}

/// A receiver twice: as it is, and taken apart.
struct Receiver {
    joiner: Joiner<Has>,
    decoder: Decoder,
    pages: Received<Has>,
    digest: Digest,
    number: u64,
}

impl Receiver {
    /// False: it takes nothing any more.
    fn take(&mut self, plain: &Plain, seen: &mut Seen) -> Result<bool, String> {
        let mut out = Vec::new();
        let applied = self.decoder.apply(&plain.ops, &plain.literals, &mut self.pages, &mut out);
        if out.len() > OUT_MAX {
            return Err(format!("a frame makes {} bytes", out.len()));
        }
        if let Some(stream) = &plain.stream
            && stream.len() <= FRAME_BYTES_MAX
            && (applied.is_err() || out != *stream)
        {
            return Err(format!("{} bytes of a stream become {}: {:?}", stream.len(), out.len(), applied.err()));
        }
        let digest = chain(&self.digest, blake3::hash(&out).as_bytes());
        let frame = cross(packed(self.number, plain, digest))?;
        // A digest that is wrong comes first, and changes nothing.
        if applied.is_ok() {
            let wrong = Frame { digest: [1; 32], ..frame.clone() };
            if self.joiner.join(&wrong).map_err(|e| e.to_string())? {
                return Err("a frame with a wrong digest is taken".into());
            }
        }
        let joined = self.joiner.join(&frame);
        match (applied, joined) {
            (Ok(next), Ok(true)) if self.joiner.out() == out => {
                seen.exact("taken");
                (self.decoder, self.digest, self.number) = (next, digest, self.number + 1);
                self.pages.keep(&plain.literals);
                Ok(true)
            }
            (Err(Fault::Missing(source)), Ok(false)) => {
                seen.exact(("missing", std::mem::discriminant(&source)));
                Ok(false)
            }
            (Err(Fault::Broken(what)), Err(e)) => {
                seen.note(what);
                seen.note(e);
                Ok(false)
            }
            (applied, joined) => Err(format!("{:?}, but joined: {joined:?}", applied.err())),
        }
    }
}

/// What is read is written as it came, whoever made it.
fn message(kind: u8, body: &[u8], seen: &mut Seen) -> Result<Option<Message>, String> {
    match Message::read(kind, body) {
        Err(e) => {
            seen.note(format!("{e:?}"));
            Ok(None)
        }
        Ok(message) => {
            let mut again = Vec::new();
            message.write(&mut again);
            seen.exact(std::mem::discriminant(&message));
            // A root that is not there may be anything.
            let free = matches!(&message, Message::Hello(_));
            if again[0] != kind || !free && again[HEADER_BYTES..] != *body {
                return Err(format!("a message of type {kind} is written otherwise than it was read"));
            }
            Ok(Some(message))
        }
    }
}

fn other(which: u8) -> Message {
    match which % 13 {
        0 => Message::Hello(Hello {
            vm: "web".into(),
            images: vec![[1; 32], [2; 32]],
            kept: Some([3; 32]),
            ..Hello::default()
        }),
        1 => Message::Welcome(Welcome { images: vec![true, false], kept: true, ..Welcome::default() }),
        2 => Message::Ack(1),
        3 => Message::Again(2),
        4 => Message::Return(vec![0, 1, 0, 4]),
        5 => Message::End,
        6 => Message::Ready,
        7 => Message::Commit,
        8 => Message::Done,
        9 => Message::DiskAck(1),
        10 => Message::DiskAgain(2),
        11 => Message::Settled(true),
        _ => Message::Abort("no room".into()),
    }
}

impl Frames {
    fn step(rng: &mut Rng) -> Step {
        let number = |rng: &mut Rng| if rng.chance(1, 6) { rng.edge() } else { rng.below(20) };
        match rng.below(12) {
            0 => Step::Frame,
            1 => {
                let n = rng.index(60);
                Step::Bytes { bytes: rng.bytes(n) }
            }
            2 | 3 => {
                let tag = rng.below(12);
                let numbers = (0..rng.below(5)).map(|_| number(rng));
                Step::Numbers { numbers: std::iter::once(tag).chain(numbers).collect() }
            }
            4 => Step::Inline,
            _ => {
                let n = number(rng);
                let small = rng.below(12);
                let from = match rng.below(9) {
                    0 | 1 => Where::Zero,
                    2 | 3 => Where::Literal,
                    4 => Where::Same,
                    5 => Where::Kept(n),
                    6 => Where::Base(rng.below(3) as u32, n as u32),
                    7 => Where::Template(n),
                    _ => Where::Earlier(small),
                };
                let count = if rng.chance(1, 10) { rng.below(80) as u8 } else { 1 + rng.below(4) as u8 };
                let page = if rng.chance(1, 10) { rng.edge() as u32 } else { rng.below(50) as u32 };
                Step::Pages { block: rng.below(4) as u8, page, named: rng.chance(1, 4), from, count }
            }
        }
    }
}

impl Fuzz for Frames {
    type Input = Input;
    const MEMORY_MAX: usize = 64 << 20;

    fn new(_: &Setup) -> Frames {
        Frames
    }

    fn fresh(&mut self, rng: &mut Rng) -> Input {
        let steps = (0..rng.below(16)).map(|_| Frames::step(rng)).collect();
        let mut input = Input {
            steps,
            ops: vec![],
            literals: if rng.chance(1, 8) { rng.below(5) as i8 - 2 } else { 0 },
            message: vec![],
            other: rng.below(10) as u8,
            other_edits: vec![],
        };
        (0..rng.below(4)).for_each(|_| self.mutate(rng, &mut input));
        input
    }

    fn mutate(&mut self, rng: &mut Rng, input: &mut Input) {
        match rng.below(9) {
            0 => input.literals = rng.below(5) as i8 - 2,
            1 => input.other = rng.below(10) as u8,
            2 if !input.steps.is_empty() => {
                let at = rng.index(input.steps.len());
                input.steps.remove(at);
            }
            3 | 4 if input.steps.len() < 30 => {
                let at = rng.index(input.steps.len() + 1);
                input.steps.insert(at, Frames::step(rng));
            }
            5 => edits::mutate(rng, &mut input.ops, &[], 64, false),
            6 => edits::mutate(
                rng,
                &mut input.other_edits,
                &[(0, 8), (8, 2), (26, 2), (31, 4), (99, 1), (6, 4), (0, 2)],
                120,
                false,
            ),
            _ => edits::mutate(rng, &mut input.message, &[(0, 8), (8, 4), (12, 4), (48, 4)], 80, false),
        }
    }

    fn run(&mut self, input: &Input) -> Outcome {
        let mut seen = Seen::default();
        let mut receiver = Receiver {
            joiner: Joiner::new(Received::new(WINDOW, Has)),
            decoder: Decoder::default(),
            pages: Received::new(WINDOW, Has),
            digest: [0; 32],
            number: 0,
        };
        for plain in &frames(input) {
            if !input.message.is_empty() {
                let mut bytes = Vec::new();
                Message::Frame(packed(receiver.number, plain, [0; 32])).write(&mut bytes);
                let kind = bytes[0];
                let mut body = bytes.split_off(HEADER_BYTES);
                input.message.iter().for_each(|e| e.apply(&mut body));
                if let Some(Message::Frame(frame)) = message(kind, &body, &mut seen)? {
                    // Its digest is that of nothing that it could make.
                    match receiver.joiner.join(&frame) {
                        Ok(true) => return Err("a frame with a wrong digest is taken".into()),
                        Ok(false) => seen.exact("not taken"),
                        Err(e) => seen.note(e),
                    }
                }
            }
            if !receiver.take(plain, &mut seen)? {
                break;
            }
        }
        let mut bytes = Vec::new();
        other(input.other).write(&mut bytes);
        let mut body = bytes.split_off(HEADER_BYTES);
        input.other_edits.iter().for_each(|e| e.apply(&mut body));
        message(bytes[0], &body, &mut seen)?;
        let header = [bytes[0], body.first().copied().unwrap_or(0), bytes[1], bytes[2], input.other];
        seen.exact(Message::header(header).is_ok());
        Ok(seen)
    }
}
