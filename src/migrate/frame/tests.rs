use super::super::stream::{Event, Parser};
use super::*;
use proptest::prelude::*;
use std::collections::HashMap;

const NAMES: [&[u8]; 3] = [b"ram0", b"vga.vram", b"/rom@etc/acpi"];

fn page_of(byte: u16) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    page.as_chunks_mut::<2>().0.iter_mut().for_each(|word| *word = byte.to_le_bytes());
    page
}

/// What a receiver has: every page says where it is from.
#[derive(Clone, Default)]
struct Store {
    literals: Vec<[u8; PAGE_BYTES]>,
    lost: Option<Source>,
}

impl Store {
    fn held(source: Source) -> [u8; PAGE_BYTES] {
        page_of(match source {
            Source::Zero => 0,
            Source::Kept(n) => 1000u16.wrapping_add(n as u16),
            Source::Base { image, block } => {
                2000u16.wrapping_add(100u16.wrapping_mul(image as u16)).wrapping_add(block as u16)
            }
            Source::Template(n) => 3000u16.wrapping_add(n as u16),
            source => panic!("{source:?}"),
        })
    }

    fn same(block: &[u8], offset: u64) -> [u8; PAGE_BYTES] {
        page_of(5000u16.wrapping_add(100 * u16::from(block[0])).wrapping_add((offset / PAGE_SIZE) as u16))
    }
}

impl Pages for Store {
    fn same(&mut self, block: &[u8], offset: u64, page: &mut [u8; PAGE_BYTES]) -> bool {
        *page = Store::same(block, offset);
        self.lost != Some(Source::Same)
    }

    fn find(&mut self, source: Source, page: &mut [u8; PAGE_BYTES]) -> bool {
        match source {
            Source::Earlier(n) => match self.literals.get(n as usize) {
                Some(literal) => *page = *literal,
                None => return false,
            },
            source => *page = Store::held(source),
        }
        self.lost != Some(source)
    }
}

impl Store {
    /// What a receiver does with a frame.
    fn take(&mut self, decoder: &mut Decoder, ops: &[u8], literals: &[u8], out: &mut Vec<u8>) -> Result<(), Fault> {
        *decoder = decoder.apply(ops, literals, self, out)?;
        self.literals.extend(literals.as_chunks::<PAGE_BYTES>().0);
        Ok(())
    }
}

/// What a stream goes on with.
#[derive(Clone, Debug)]
enum Step {
    Bytes(Vec<u8>),
    Page(Place, Source),
    /// The page after the last one, continued.
    Next(Source),
    Frame,
}

fn sources() -> impl Strategy<Value = Source> {
    prop_oneof![
        Just(Source::Zero),
        Just(Source::Literal),
        Just(Source::Same),
        (0u64..20).prop_map(Source::Kept),
        (0u32..3, 0u32..20).prop_map(|(image, block)| Source::Base { image, block }),
        (0u64..20).prop_map(Source::Template),
        (0u64..20).prop_map(Source::Earlier),
    ]
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let place = (0u16..3, 0u64..30, any::<bool>()).prop_map(|(block, page, named)| Place {
        block,
        offset: page * PAGE_SIZE,
        named,
    });
    prop::collection::vec(
        prop_oneof![
            2 => prop::collection::vec(any::<u8>(), 0..50).prop_map(Step::Bytes),
            3 => (place, sources()).prop_map(|(place, source)| Step::Page(place, source)),
            6 => sources().prop_map(Step::Next),
            1 => Just(Step::Frame),
        ],
        0..80,
    )
}

/// Encodes steps and, beside that, writes the stream that they stand for.
#[derive(Default)]
struct Sender {
    encoder: Encoder,
    stream: Vec<u8>,
    literals: Vec<u8>,
    sent: Vec<[u8; PAGE_BYTES]>,
    frames: Vec<(Vec<u8>, Vec<u8>)>,
    last: Option<Place>,
}

impl Sender {
    fn step(&mut self, step: Step) {
        match step {
            Step::Bytes(bytes) => {
                self.encoder.bytes(&bytes);
                self.stream.extend(bytes);
            }
            Step::Frame => self.frames.push((self.encoder.finish(), std::mem::take(&mut self.literals))),
            Step::Next(source) => {
                let (block, offset) = self.last.map_or((0, 0), |p| (p.block, p.offset + PAGE_SIZE));
                self.step(Step::Page(Place { block, offset, named: false }, source));
            }
            Step::Page(place, source) => {
                // An earlier page that there is not yet is a literal.
                let source = match source {
                    Source::Earlier(n) if n as usize >= self.sent.len() => Source::Literal,
                    source => source,
                };
                let name = NAMES[usize::from(place.block)];
                let page = match source {
                    Source::Literal => {
                        let page = page_of(7000 + self.sent.len() as u16);
                        self.sent.push(page);
                        self.literals.extend(page);
                        page
                    }
                    Source::Same => Store::same(name, place.offset),
                    Source::Earlier(n) => self.sent[n as usize],
                    source => Store::held(source),
                };
                self.encoder.page(place, source, NAMES.iter().copied());
                if source == Source::Zero {
                    place.write_header(Kind::Zero, name, &mut self.stream);
                    self.stream.push(0);
                } else {
                    place.write_header(Kind::Data, name, &mut self.stream);
                    self.stream.extend(page);
                }
                self.last = Some(place);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn frames_make_the_stream_that_they_were_made_of(steps in steps()) {
        let mut sender = Sender::default();
        steps.into_iter().chain([Step::Frame]).for_each(|step| sender.step(step));
        let (mut decoder, mut store, mut out) = (Decoder::default(), Store::default(), Vec::new());
        for (ops, literals) in &sender.frames {
            store.take(&mut decoder, ops, literals, &mut out).unwrap();
        }
        prop_assert_eq!(out, sender.stream);
        prop_assert_eq!(store.literals, sender.sent);
    }

    #[test]
    fn whatever_comes_is_refused_or_made_and_never_too_large(
        steps in steps(), noise in prop::collection::vec(any::<u8>(), 0..40), at in any::<prop::sample::Index>(), cut: bool
    ) {
        let mut sender = Sender::default();
        steps.into_iter().chain([Step::Frame]).for_each(|step| sender.step(step));
        let (mut decoder, mut store) = (Decoder::default(), Store::default());
        for (mut ops, literals) in sender.frames {
            let at = at.index(ops.len() + 1);
            if cut { ops.truncate(at) } else { ops.splice(at..at, noise.iter().copied()); }
            let mut out = Vec::new();
            if store.take(&mut decoder, &ops, &literals, &mut out).is_ok() {
                prop_assert!(out.len() <= FRAME_BYTES_MAX + PAGE_BYTES + 300);
            }
        }
    }
}

#[test]
fn a_run_of_pages_takes_a_few_bytes() {
    let mut encoder = Encoder::default();
    for (first, source) in [(0, Source::Same), (1000, Source::Zero)] {
        for page in first..first + 1000 {
            encoder.page(Place { block: 0, offset: page * PAGE_SIZE, named: false }, source, NAMES.iter().copied());
        }
    }
    for n in 0..1000 {
        let place = Place { block: 0, offset: (2000 + n) * PAGE_SIZE, named: false };
        encoder.page(place, Source::Base { image: 3, block: 70_000 + n as u32 }, NAMES.iter().copied());
    }
    // The name of the block, then three runs.
    assert_eq!(encoder.finish().len(), 6 + 3 + 3 + 7);
}

#[test]
fn a_page_that_is_missing_is_named_and_the_frame_can_come_again() {
    let mut sender = Sender::default();
    let base = Source::Base { image: 1, block: 4 };
    for source in [Source::Literal, base, Source::Earlier(0)] {
        sender.step(Step::Next(source));
    }
    sender.step(Step::Frame);
    let (ops, literals) = &sender.frames[0];
    let (mut decoder, mut store) = (Decoder::default(), Store { lost: Some(base), ..Store::default() });
    assert_eq!(store.take(&mut decoder, ops, literals, &mut Vec::new()), Err(Fault::Missing(base)));
    assert!(store.literals.is_empty());
    store.lost = None;
    let mut out = Vec::new();
    store.take(&mut decoder, ops, literals, &mut out).unwrap();
    assert_eq!(out, sender.stream);
    assert_eq!(store.literals.len(), 1);
}

/// A frame comes again without anything that the other side might lack, and the next one still fits.
#[test]
fn a_frame_that_comes_again_leaves_the_decoder_as_the_first_would_have() {
    let place = |page: u64, named| Place { block: 0, offset: page * PAGE_SIZE, named };
    let base = Source::Base { image: 0, block: 9 };
    let mut encoder = Encoder::default();
    let before = encoder.clone();
    encoder.page(place(0, true), Source::Literal, NAMES.iter().copied());
    encoder.page(place(1, false), base, NAMES.iter().copied());
    let first = encoder.finish();
    encoder.page(place(2, false), Source::Earlier(0), NAMES.iter().copied());
    let second = encoder.finish();
    let literal = page_of(77);
    let mut again = before;
    again.page(place(0, true), Source::Literal, NAMES.iter().copied());
    again.inline(place(1, false), &Store::held(base), NAMES.iter().copied());
    let again = again.finish();
    let outs = [first, again].map(|ops| {
        let (mut decoder, mut store, mut out) = (Decoder::default(), Store::default(), Vec::new());
        store.take(&mut decoder, &ops, &literal, &mut out).unwrap();
        store.take(&mut decoder, &second, &[], &mut out).unwrap();
        out
    });
    assert_eq!(outs[0], outs[1]);
}

#[test]
fn what_no_sender_makes_is_refused() {
    let mut block = Encoder::default();
    block.page(Place { block: 0, offset: 0, named: true }, Source::Zero, NAMES.iter().copied());
    let start = block.finish();
    for (ops, literals, why) in [
        (&[3u8, 1][..], 0, "has no name"),
        (&[4, 2], PAGE_BYTES, "fewer literals"),
        (&[4, 1], 2 * PAGE_BYTES, "nothing asks for"),
        (&[4, 1], PAGE_BYTES + 1, "no whole pages"),
        (&[9, 0, 1], 0, "has not come yet"),
        (&[0, 5, 1], 0, "cut off"),
        (&[3], 0, "cut off"),
        (&[12, 1], 0, "there is not"),
        (&[10, 1, 2], 0, "cut off"),
        (&[3, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F], 0, "more than a frame"),
        (&[7, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F, 0, 1], 0, "past all images"),
        (&[1, 0, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F, 0], 0, "past all memory"),
    ] {
        let mut decoder = Decoder::default();
        if why != "has no name" {
            decoder = decoder.apply(&start, &[], &mut Store::default(), &mut Vec::new()).unwrap();
        }
        match decoder.apply(ops, &vec![1; literals], &mut Store::default(), &mut Vec::new()) {
            Err(Fault::Broken(said)) => assert!(said.contains(why), "{said}, not {why}"),
            other => panic!("{why}: {:?}", other.err()),
        }
    }
}

/// Parser, encoder and decoder in a row: what the parser tells of a stream makes that stream again.
#[test]
fn from_the_parser_to_the_other_side() {
    let mut input = b"QEVM\0\0\0\x03\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    input.extend(((64 * PAGE_SIZE) | 4).to_be_bytes());
    input.extend(b"\x04ram0");
    input.extend((64 * PAGE_SIZE).to_be_bytes());
    let place = |offset, named| Place { block: 0, offset: offset * PAGE_SIZE, named };
    for n in 0..64u64 {
        let kind = if n % 3 == 0 { Kind::Zero } else { Kind::Data };
        place(n, n == 0).write_header(kind, b"ram0", &mut input);
        match kind {
            Kind::Zero => input.push(0),
            Kind::Data => input.extend(page_of(1 + n as u16 % 5)),
        }
    }
    input.extend(0x10u64.to_be_bytes());
    let (mut parser, mut encoder) = (Parser::default(), Encoder::default());
    let (mut decoder, mut store, mut out) = (Decoder::default(), Store::default(), Vec::new());
    let (mut seen, mut count) = (HashMap::<Vec<u8>, u64>::new(), 0);
    for part in input.chunks(10_000) {
        let mut literals = Vec::new();
        let tell = |blocks: &[super::super::stream::Block], event: Event<'_>| {
            let names = || blocks.iter().map(|b| &*b.name);
            match event {
                Event::Bytes(bytes) => encoder.bytes(bytes),
                Event::Zero(place) => encoder.page(place, Source::Zero, names()),
                Event::Page(place, page) => {
                    let earlier = seen.get(page).map(|n| Source::Earlier(*n));
                    if earlier.is_none() {
                        seen.insert(page.to_vec(), count);
                        count += 1;
                        literals.extend_from_slice(page);
                    }
                    encoder.page(place, earlier.unwrap_or(Source::Literal), names());
                }
                Event::Mark(_) => {}
            }
            Ok::<(), ()>(())
        };
        parser.feed(part, tell).unwrap();
        store.take(&mut decoder, &encoder.finish(), &literals, &mut out).unwrap();
    }
    assert_eq!((out.len(), count), (input.len() - parser.held(), 5));
    assert_eq!(out, input[..out.len()]);
}
