use super::*;
use proptest::prelude::*;

/// A stream as QEMU 10 writes it, in small: configuration, a device before RAM, three rounds, a foreign section that is told
/// in parts, devices. And what is to be told of it.
fn stream(rounds: usize) -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03".to_vec();
    out.push(0x07);
    out.extend(4u32.to_be_bytes());
    out.extend(b"pc-q");
    // The return path, asked for and tried.
    out.extend([0x08, 0, 1, 0, 0]);
    out.extend([0x08, 0, 2, 0, 4, 0, 0, 0, 9]);
    header(&mut out, 0x04, 77, b"virtio-mem-early", 1);
    out.extend([0x7e, 0, 0, 0, 1, 0x01, 2, 3]);
    footer(&mut out, 77);
    header(&mut out, 0x01, 2, b"ram", 4);
    out.extend(((12 * PAGE_SIZE) | 0x04).to_be_bytes());
    for (name, pages) in [(&b"ram0"[..], 8u64), (b"0000:00:02.0/vga.vram", 4)] {
        out.push(name.len() as u8);
        out.extend(name);
        out.extend((pages * PAGE_SIZE).to_be_bytes());
    }
    out.extend(0x10u64.to_be_bytes());
    footer(&mut out, 2);
    header(&mut out, 0x01, 5, b"dirty-bitmap", 1);
    out.extend([9; 100]);
    footer(&mut out, 5);
    for round in 0..rounds {
        let kind = if round + 1 == rounds { 0x03 } else { 0x02 };
        out.push(0x02);
        out.extend(5u32.to_be_bytes());
        out.extend([round as u8; 37]);
        footer(&mut out, 5);
        out.push(kind);
        out.extend(2u32.to_be_bytes());
        // QEMU continues a block from one section to the next.
        let name = if round == 1 { None } else { Some(&b"ram0"[..]) };
        page(&mut out, 0x08, name, 0, round as u8 + 1);
        page(&mut out, 0x08, None, 1, 0);
        page(&mut out, 0x02, None, 2, 0);
        page(&mut out, 0x02, None, 3, 0xAA);
        out.extend(((4 * PAGE_SIZE) | 0x40 | 0x20).to_be_bytes());
        out.extend([1, 0, 3, 7, 8, 9]);
        out.extend(((5 * PAGE_SIZE) | 0x100 | 0x20).to_be_bytes());
        out.extend([0, 0, 0, 2, 7, 8]);
        out.extend(0x200u64.to_be_bytes());
        page(&mut out, 0x08, Some(b"0000:00:02.0/vga.vram"), 3, 5);
        page(&mut out, 0x02, Some(b"ram0"), 7, 0);
        out.extend(0x10u64.to_be_bytes());
        footer(&mut out, 2);
    }
    header(&mut out, 0x04, 9, b"timer", 2);
    out.extend([1; 50]);
    footer(&mut out, 9);
    out.extend([0x00, 0x06, 0, 0, 0, 2, b'{', b'}']);
    out
}

fn header(out: &mut Vec<u8>, kind: u8, id: u32, name: &[u8], version: u32) {
    out.push(kind);
    out.extend(id.to_be_bytes());
    out.push(name.len() as u8);
    out.extend(name);
    out.extend(0u32.to_be_bytes());
    out.extend(version.to_be_bytes());
}

fn footer(out: &mut Vec<u8>, id: u32) {
    out.push(0x7e);
    out.extend(id.to_be_bytes());
}

fn page(out: &mut Vec<u8>, kind: u64, name: Option<&[u8]>, number: u64, byte: u8) {
    out.extend(((number * PAGE_SIZE) | kind | if name.is_none() { 0x20 } else { 0 }).to_be_bytes());
    if let Some(name) = name {
        out.push(name.len() as u8);
        out.extend(name);
    }
    match kind {
        0x02 => out.push(byte),
        _ => out.extend([byte; PAGE_BYTES]),
    }
}

/// What was told, in a form that can be compared, and the bytes that it stands for.
#[derive(Debug, Default, PartialEq)]
struct Told {
    bytes: Vec<u8>,
    pages: Vec<(Vec<u8>, u64, Option<u8>)>,
    marks: Vec<Mark>,
}

fn take(told: &mut Told) -> impl FnMut(&[Block], Event<'_>) -> Result<(), ()> {
    |blocks, event| {
        match event {
            Event::Bytes(bytes) => told.bytes.extend(bytes),
            Event::Page(place, page) => {
                let name = &blocks[usize::from(place.block)].name;
                place.write_header(Kind::Data, name, &mut told.bytes);
                told.bytes.extend(page);
                told.pages.push((name.to_vec(), place.offset, Some(page[0])));
            }
            Event::Zero(place) => {
                let name = &blocks[usize::from(place.block)].name;
                place.write_header(Kind::Zero, name, &mut told.bytes);
                told.bytes.push(0);
                told.pages.push((name.to_vec(), place.offset, None));
            }
            Event::Mark(mark) => told.marks.push(mark),
        }
        Ok(())
    }
}

fn tell(parts: &[&[u8]], flush: bool) -> (Told, Parser) {
    let (mut told, mut parser) = (Told::default(), Parser::default());
    for part in parts {
        parser.feed(part, take(&mut told)).unwrap();
        if flush {
            parser.flush(take(&mut told)).unwrap();
        }
    }
    parser.flush(take(&mut told)).unwrap();
    (told, parser)
}

#[test]
fn a_stream_is_taken_apart() {
    let input = stream(2);
    let (told, parser) = tell(&[&input], false);
    assert_eq!(told.bytes, input);
    assert_eq!(parser.machine(), Some("pc-q"));
    let blocks: Vec<_> = parser.blocks().iter().map(|b| (&*b.name, b.len)).collect();
    assert_eq!(blocks, [(&b"ram0"[..], Some(8 * 4096)), (b"0000:00:02.0/vga.vram", Some(4 * 4096))]);
    let round = |byte| {
        let ram = |page: u64, byte| (b"ram0".to_vec(), page * PAGE_SIZE, byte);
        let vram = (b"0000:00:02.0/vga.vram".to_vec(), 3 * PAGE_SIZE, Some(5));
        [ram(0, Some(byte)), ram(1, Some(0)), ram(2, None), vram, ram(7, None)]
    };
    assert_eq!(told.pages, [round(1), round(2)].concat());
    let expected = [Mark::ReturnPath, Mark::Blocks, Mark::RoundEnd, Mark::RoundEnd, Mark::RamEnd];
    assert_eq!(told.marks, expected);
}

#[test]
fn byte_by_byte_it_is_the_same() {
    let input = stream(2);
    let (whole, _) = tell(&[&input], false);
    let bytes: Vec<&[u8]> = input.chunks(1).collect();
    let (told, _) = tell(&bytes, false);
    assert_eq!(told, whole);
}

#[test]
fn what_is_flushed_in_the_middle_of_a_record_is_bytes() {
    let input = stream(2);
    let bytes: Vec<&[u8]> = input.chunks(1000).collect();
    let (told, _) = tell(&bytes, true);
    assert_eq!(told.bytes, input);
    // Some records lay across the cuts, the others were still told of.
    assert!(!told.pages.is_empty() && told.pages.len() < 10, "{}", told.pages.len());
    assert_eq!(told.marks.last(), Some(&Mark::RamEnd));
}

#[test]
fn a_stranger_in_the_ram_section_loses_it_and_the_next_section_is_understood_again() {
    let mut input = stream(3);
    let at = input.windows(8).position(|w| w == ((5 * PAGE_SIZE) | 0x100 | 0x20).to_be_bytes()).unwrap();
    input[at + 6] |= 0x08;
    let (told, _) = tell(&[&input], false);
    assert_eq!(told.bytes, input);
    assert!(told.marks.contains(&Mark::Lost) && told.marks.contains(&Mark::RamEnd), "{:?}", told.marks);
    // What the next round continues was not understood; what it names is.
    assert_eq!(told.pages.len(), 3 + 2 + 5, "{:?}", told.pages);
}

/// Numbers of blocks that a sender has told of stay what they are.
#[test]
fn a_second_list_of_blocks_is_not_understood() {
    let (first, more) = (stream(2), stream(3));
    let start = more.windows(4).position(|w| w == b"\x03ram").unwrap() - 5;
    // After the first round, as a section of its own.
    let at = first.windows(5).rposition(|w| w == [2, 0, 0, 0, 5]).unwrap();
    let input = [&first[..at], &more[start..]].concat();
    let (told, parser) = tell(&[&input], false);
    assert_eq!(told.bytes, input);
    assert_eq!(parser.blocks().len(), 2);
    assert!(told.marks.contains(&Mark::Lost) && told.marks.last() == Some(&Mark::RamEnd), "{:?}", told.marks);
    assert_eq!(told.pages.len(), 5 * 4, "{:?}", told.pages);
}

#[test]
fn garbage_is_passed_on() {
    for garbage in [&b"HTTP/1.1 400 Bad Request\r\n"[..], b"QEVM\0\0\0\x02", b"QEV", b"", &[0x7e; 9000]] {
        let (told, _) = tell(&[garbage], false);
        assert_eq!(told.bytes, garbage);
        assert!(told.pages.is_empty());
    }
}

#[test]
fn little_is_held_back() {
    let input = stream(2);
    let (mut told, mut parser) = (Told::default(), Parser::default());
    for part in input.chunks(777) {
        parser.feed(part, take(&mut told)).unwrap();
        assert!(parser.held() < 2 * (PAGE_BYTES + 300), "{}", parser.held());
    }
}

#[test]
fn an_error_of_the_sink_is_told() {
    let input = stream(2);
    let mut parser = Parser::default();
    assert_eq!(parser.feed(&input, |_, _| Err("full")), Err("full"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever comes, in whatever pieces: it is all there, in order.
    #[test]
    fn every_byte_comes_out(
        rounds in 1usize..4, cuts in prop::collection::vec(1usize..6000, 0..40), flush: bool,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut input = stream(rounds);
        for (at, byte) in edits {
            let at = at.index(input.len());
            input[at] = byte;
        }
        let len = cut.index(input.len()) + 1;
        input.truncate(len.max(input.len() / 2));
        let (mut parts, mut rest) = (Vec::new(), &input[..]);
        for len in cuts {
            let (part, more) = rest.split_at(len.min(rest.len()));
            parts.push(part);
            rest = more;
        }
        parts.push(rest);
        let (told, _) = tell(&parts, flush);
        prop_assert_eq!(told.bytes, input);
    }
}
