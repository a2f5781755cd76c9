//! Bytes of QEMU's migration stream, in pieces, from the parser to the other side: whatever comes in goes out, and little is held back.

use super::edits::{self, Edit};
use super::rng::Rng;
use super::{Fuzz, Outcome, Seen, Setup};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use vmar::migrate::frame::{FRAME_BYTES_MAX, Pages, Source};
use vmar::migrate::join::Joiner;
use vmar::migrate::known::{Known, Received};
use vmar::migrate::part::{Cutter, Item, Part};
use vmar::migrate::stream::{PAGE_BYTES, PAGE_SIZE, Place};
use vmar::migrate::wire::{Digest, Frame, HEADER_BYTES, Message};
use vmar::migrate::work::{self, Decider};
use vmar::units::is_zero;

/// Names of blocks, the last of which is in no list.
pub const NAMES: [&[u8]; 4] = [b"pc.ram", b"0000:00:02.0/vga.vram", b"/rom@etc/acpi/tables", b"late"];
/// What a parser may hold back: a record of XBZRLE or a command, both with a u16 length, and a header with a name.
const HELD_MAX: usize = 65_535 + 512;

/// A record of RAM, or what only looks like one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    kind: RecordKind,
    /// Index in [`NAMES`]; `None` continues the block of the record before.
    block: Option<u8>,
    page: u32,
    /// What the page is filled with, or the length of what is compressed.
    fill: u16,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum RecordKind {
    Zero,
    Page,
    Xbzrle,
    Compress,
    Flush,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Step {
    /// The start of RAM with a list of so many blocks.
    Ram {
        blocks: u8,
    },
    /// A round of pages, so many times.
    Round {
        end: bool,
        records: Vec<Record>,
        times: u8,
    },
    /// The state of a device.
    Device {
        id: u32,
        len: u16,
    },
    Command {
        command: u16,
        len: u16,
    },
    Bytes {
        #[serde(with = "super::hex")]
        bytes: Vec<u8>,
    },
}

/// How the stream comes in; the list is gone through again and again.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Feed {
    Bytes(u32),
    /// The source waits.
    Flush,
    Cut,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    steps: Vec<Step>,
    edits: Vec<Edit>,
    feeds: Vec<Feed>,
    /// Literals that both sides remember.
    window: u8,
    /// Of the pages that the other side is believed to have, every so many-th is not there, and as many are others; 0: all are right.
    wrong: u8,
}

pub struct Stream;

fn write(step: &Step, out: &mut Vec<u8>) {
    let footer = |id: u32, out: &mut Vec<u8>| {
        out.push(0x7e);
        out.extend(id.to_be_bytes());
    };
    match step {
        Step::Ram { blocks } => {
            let names = &NAMES[..usize::from(*blocks).clamp(1, NAMES.len() - 1)];
            out.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
            out.extend(((names.len() as u64 * 16 * PAGE_SIZE) | 4).to_be_bytes());
            for name in names {
                out.push(name.len() as u8);
                out.extend(*name);
                out.extend((16 * PAGE_SIZE).to_be_bytes());
            }
            out.extend(0x10u64.to_be_bytes());
            footer(2, out);
        }
        Step::Round { end, records, times } => {
            out.push(if *end { 3 } else { 2 });
            out.extend(2u32.to_be_bytes());
            for n in 0..u64::from(*times).max(1) {
                records.iter().for_each(|r| record(r, n, out));
            }
            out.extend(0x10u64.to_be_bytes());
            footer(2, out);
        }
        Step::Device { id, len } => {
            out.push(4);
            out.extend(id.to_be_bytes());
            out.extend(b"\x05timer\0\0\0\0\0\0\0\x02");
            out.extend((0..*len).map(|n| n.to_be_bytes()[1]));
            footer(*id, out);
        }
        Step::Command { command, len } => {
            out.push(8);
            out.extend(command.to_be_bytes());
            out.extend(len.to_be_bytes());
            out.extend((0..*len).map(|n| n.to_be_bytes()[1]));
        }
        Step::Bytes { bytes } => out.extend(bytes),
    }
}

/// The same record again is of a later page with another content.
fn record(r: &Record, again: u64, out: &mut Vec<u8>) {
    let flags = match r.kind {
        RecordKind::Zero => 0x02,
        RecordKind::Page => 0x08,
        RecordKind::Xbzrle => 0x40,
        RecordKind::Compress => 0x100,
        RecordKind::Flush => {
            out.extend(0x200u64.to_be_bytes());
            return;
        }
    };
    let offset = (u64::from(r.page) + again) * PAGE_SIZE;
    out.extend((offset | flags | if r.block.is_none() { 0x20 } else { 0 }).to_be_bytes());
    if let Some(block) = r.block {
        let name = NAMES[usize::from(block) % NAMES.len()];
        out.push(name.len() as u8);
        out.extend(name);
    }
    let data = |len: usize, out: &mut Vec<u8>| out.extend(std::iter::repeat_n(0x7e, len));
    match r.kind {
        RecordKind::Zero => out.push(u8::from(r.fill == 0xFFFF)),
        RecordKind::Page => {
            let word = r.fill.wrapping_mul(if again.is_multiple_of(3) { 1 } else { again as u16 });
            out.extend(word.to_le_bytes().repeat(PAGE_BYTES / 2));
        }
        RecordKind::Xbzrle => {
            out.push(1);
            out.extend(r.fill.to_be_bytes());
            data(r.fill.into(), out);
        }
        RecordKind::Compress => {
            out.extend(u32::from(r.fill).to_be_bytes());
            data(r.fill.into(), out);
        }
        RecordKind::Flush => {}
    }
}

fn seed(input: &Input) -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x04test\x08\0\x01\0\0".to_vec();
    input.steps.iter().for_each(|s| write(s, &mut out));
    out.extend([0, 6, 0, 0, 0, 2, b'{', b'}']);
    out.truncate(4 << 20);
    out
}

/// What the other side is believed to have: by the first byte of a page's hash.
#[derive(Default)]
pub struct Belief {
    held: Mutex<HashMap<Key, [u8; PAGE_BYTES]>>,
    pub wrong: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Place(Vec<u8>, u64),
    Source(Source),
}

impl Known for Belief {
    fn find(&self, block: &[u8], place: Place, hash: &Digest, page: &[u8]) -> Option<Source> {
        let number = u32::from_le_bytes([hash[4], hash[5], hash[6], hash[7]]);
        let source = match hash[0] % 8 {
            0 => Source::Same,
            1 => Source::Kept(number.into()),
            2 => Source::Base { image: 1, block: number },
            3 => Source::Template(number.into()),
            _ => return None,
        };
        let key = if source == Source::Same { Key::Place(block.to_vec(), place.offset) } else { Key::Source(source) };
        let mut page: [u8; PAGE_BYTES] = page.try_into().unwrap();
        match hash[3].checked_rem(self.wrong) {
            Some(0) => return Some(source),
            Some(1) => page[9] ^= 1,
            _ => {}
        }
        // What it has does not change.
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        (*held.entry(key).or_insert(page) == page).then_some(source)
    }
}

impl Pages for &Belief {
    fn same(&mut self, block: &[u8], offset: u64, page: &mut [u8; PAGE_BYTES]) -> bool {
        self.take(&Key::Place(block.to_vec(), offset), page)
    }

    fn find(&mut self, source: Source, page: &mut [u8; PAGE_BYTES]) -> bool {
        self.take(&Key::Source(source), page)
    }
}

impl Belief {
    fn take(&self, key: &Key, page: &mut [u8; PAGE_BYTES]) -> bool {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.get(key).inspect(|found| *page = **found).is_some()
    }
}

/// Over the wire.
pub fn cross(frame: Frame) -> Result<Frame, String> {
    let mut bytes = Vec::new();
    Message::Frame(frame).write(&mut bytes);
    let header = *bytes.first_chunk::<HEADER_BYTES>().unwrap();
    let (kind, len) = Message::header(header).map_err(|e| format!("a frame's header is refused: {e:?}"))?;
    match Message::read(kind, &bytes[HEADER_BYTES..]) {
        Ok(Message::Frame(frame)) if bytes.len() == HEADER_BYTES + len => Ok(frame),
        other => Err(format!("a frame of {len} bytes is refused: {:?}", other.err())),
    }
}

/// What a part says of itself must fit its bytes.
fn check(part: &Part, number: u64) -> Result<(), String> {
    if part.number != number || part.items.is_empty() || part.bytes.len() > FRAME_BYTES_MAX {
        let (items, bytes) = (part.items.len(), part.bytes.len());
        return Err(format!("part {} with {items} items and {bytes} bytes in place of part {number}", part.number));
    }
    let header = |place: &Place| if place.named { 9 + part.name(place.block).len() } else { 8 };
    let mut at = 0;
    for item in &part.items {
        let (place, len) = match item {
            Item::Bytes(len) => {
                at += len;
                continue;
            }
            Item::Zero(place) => (place, 1),
            Item::Page(place, from) if *from == at + header(place) => (place, PAGE_BYTES),
            Item::Page(..) => return Err(format!("{item:?}, but {at} bytes stand before it")),
        };
        if part.blocks.get(usize::from(place.block)).is_none() || !place.offset.is_multiple_of(PAGE_SIZE) {
            return Err(format!("{item:?} is in no block"));
        }
        let from = at + header(place);
        at = from + len;
        match (item, part.bytes.get(from..at)) {
            (Item::Zero(_), Some(bytes)) if !is_zero(bytes) => return Err(format!("{item:?} is not zero")),
            (_, Some(_)) => {}
            (_, None) => return Err(format!("{item:?} ends past the part")),
        }
    }
    if at == part.bytes.len() { Ok(()) } else { Err(format!("{at} bytes are told of {}", part.bytes.len())) }
}

/// Both sides of a link, and the stream that has come out of it.
struct Link<'a> {
    belief: &'a Belief,
    decider: Decider,
    joiner: Joiner<&'a Belief>,
    out: Vec<u8>,
    parts: u64,
}

impl Link<'_> {
    fn take(&mut self, part: Part, seen: &mut Seen) -> Result<(), String> {
        check(&part, self.parts)?;
        self.parts += 1;
        let decided = self.decider.decide(work::hash(part, self.belief));
        decided.sources.iter().for_each(|s| seen.exact(std::mem::discriminant(s)));
        let frame = cross(decided.pack().map_err(|e| e.to_string())?)?;
        let right = self.joiner.join(&frame).map_err(|e| format!("a frame is refused: {e}"))?;
        if !right {
            seen.exact("again");
            if self.belief.wrong == 0 {
                return Err("a frame is wrong although all pages are there".into());
            }
            let frame = cross(decided.pack_again().map_err(|e| e.to_string())?)?;
            if !self.joiner.join(&frame).map_err(|e| format!("a frame that came again is refused: {e}"))? {
                return Err("a frame that came again is wrong".into());
            }
        }
        if self.joiner.out() != decided.part.bytes {
            return Err("the other side has made something else of a part".into());
        }
        self.out.extend(&decided.part.bytes);
        Ok(())
    }
}

impl Stream {
    fn step(rng: &mut Rng) -> Step {
        match rng.below(10) {
            0 | 1 => Step::Ram { blocks: 1 + rng.below(3) as u8 },
            2 => Step::Device { id: rng.below(4) as u32, len: rng.below(300) as u16 },
            3 => Step::Command { command: rng.below(9) as u16, len: rng.below(20) as u16 },
            4 => {
                let n = rng.index(40);
                Step::Bytes { bytes: rng.bytes(n) }
            }
            _ => {
                let times = if rng.chance(1, 12) { rng.below(40) as u8 } else { 1 };
                let records = (0..rng.below(10)).map(|_| Stream::record(rng)).collect();
                Step::Round { end: rng.chance(1, 8), records, times }
            }
        }
    }

    fn record(rng: &mut Rng) -> Record {
        use RecordKind::{Compress, Flush, Page, Xbzrle, Zero};
        let kind = rng.one_of(&[Zero, Zero, Page, Page, Page, Page, Page, Xbzrle, Compress, Flush]);
        let fill = if rng.chance(1, 20) { rng.edge() as u16 } else { rng.below(40) as u16 };
        Record { kind, block: rng.chance(1, 3).then(|| rng.below(4) as u8), page: rng.below(20) as u32, fill }
    }

    fn feed(rng: &mut Rng) -> Feed {
        match rng.below(6) {
            0 => Feed::Flush,
            1 => Feed::Cut,
            2 => Feed::Bytes(1 + rng.below(20) as u32),
            _ => Feed::Bytes(1 + rng.below(20_000) as u32),
        }
    }
}

impl Fuzz for Stream {
    type Input = Input;
    const MEMORY_MAX: usize = 64 << 20;

    fn new(_: &Setup) -> Stream {
        Stream
    }

    fn fresh(&mut self, rng: &mut Rng) -> Input {
        let mut steps = vec![Step::Ram { blocks: 2 }];
        steps.extend((0..rng.below(6)).map(|_| Stream::step(rng)));
        if rng.chance(1, 10) {
            steps.remove(0);
        }
        let feeds = (0..rng.below(6)).map(|_| Stream::feed(rng)).collect();
        let wrong = if rng.chance(1, 2) { 0 } else { 2 + rng.below(4) as u8 };
        let mut input = Input { steps, edits: vec![], feeds, window: rng.below(6) as u8, wrong };
        (0..rng.below(3)).for_each(|_| self.mutate(rng, &mut input));
        input
    }

    fn mutate(&mut self, rng: &mut Rng, input: &mut Input) {
        match rng.below(10) {
            0 => input.window = rng.below(40) as u8,
            1 => input.wrong = rng.below(6) as u8,
            2 => input.feeds = (0..rng.below(8)).map(|_| Stream::feed(rng)).collect(),
            3 if !input.steps.is_empty() => {
                let at = rng.index(input.steps.len());
                input.steps.remove(at);
            }
            4 | 5 if input.steps.len() < 12 => {
                let at = rng.index(input.steps.len() + 1);
                input.steps.insert(at, Stream::step(rng));
            }
            6 => {
                let rounds = input.steps.iter_mut().filter_map(|s| match s {
                    Step::Round { records, .. } => Some(records),
                    _ => None,
                });
                if let Some(records) = rounds.last().filter(|r| r.len() < 20) {
                    records.push(Stream::record(rng));
                }
            }
            _ => {
                let len = seed(input).len() as u64;
                edits::mutate(rng, &mut input.edits, &[], len, true);
            }
        }
    }

    fn run(&mut self, input: &Input) -> Outcome {
        let mut seen = Seen::default();
        let mut bytes = seed(input);
        input.edits.iter().for_each(|e| e.apply(&mut bytes));
        let belief = Belief { wrong: if input.wrong == 1 { 2 } else { input.wrong }, ..Belief::default() };
        let window = input.window.into();
        let mut link = Link {
            belief: &belief,
            decider: Decider::new(window),
            joiner: Joiner::new(Received::new(window, &belief)),
            out: Vec::new(),
            parts: 0,
        };
        let mut cutter = Cutter::default();
        let mut rest = &bytes[..];
        // A list without bytes would never end.
        let ends = input.feeds.iter().any(|f| matches!(f, Feed::Bytes(_)));
        let mut feeds = input.feeds.get(..).filter(|_| ends).unwrap_or_default().iter().cycle();
        // Small pieces of a large stream would take all day.
        let least = bytes.len() / 2000;
        while !rest.is_empty() {
            match feeds.next().copied().unwrap_or(Feed::Bytes(u32::MAX)) {
                Feed::Bytes(n) => {
                    let (now, later) = rest.split_at(rest.len().min((n as usize).max(least).max(1)));
                    cutter.feed(now);
                    rest = later;
                }
                Feed::Flush => cutter.flush(),
                Feed::Cut => cutter.cut(),
            }
            if cutter.parser().held() > HELD_MAX {
                return Err(format!("{} bytes are held back", cutter.parser().held()));
            }
            for part in cutter.take_parts() {
                link.take(part, &mut seen)?;
            }
            cutter.take_marks().into_iter().for_each(|m| seen.exact(m as u8));
        }
        cutter.flush();
        for part in cutter.take_parts() {
            link.take(part, &mut seen)?;
        }
        if cutter.parser().held() > 0 || link.out != bytes {
            let (out, len) = (link.out.len(), bytes.len());
            let same = link.out.iter().zip(&bytes).take_while(|(a, b)| a == b).count();
            return Err(format!("{len} bytes went in, {out} came out, alike as far as {same}"));
        }
        seen.exact((cutter.parser().blocks().len().min(5), link.parts.min(4)));
        Ok(seen)
    }
}
