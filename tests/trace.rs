//! Traces of base reads: there and back, and cut off anywhere.

#![allow(clippy::unwrap_used, reason = "a test")]

mod golden;

use proptest::prelude::*;
use vmar::ErrorKind;
use vmar::redirect::trace::{Record, TraceEnd, TraceHeader, TraceReader, TraceWriter, VERSION};

const HEADER_BYTES: usize = 96;
const RECORD_BYTES: usize = 24;

fn header() -> TraceHeader {
    TraceHeader {
        library: *b"sixteen bytes id",
        image: 7,
        generation: 2,
        digest: [0xd7; 32],
        start_ns: 1_700_000_000_123_456_789,
    }
}

fn records() -> Vec<Record> {
    vec![
        Record { time_us: 0, request: 0, image: 0, block: 256, count: 8 },
        Record { time_us: 1500, request: 1, image: 0, block: 4660, count: 2 },
        Record { time_us: 1500, request: 1, image: 7, block: 99, count: 1 },
    ]
}

fn write(records: &[Record], dropped: Option<u64>) -> Vec<u8> {
    let mut out = Vec::new();
    let mut writer = TraceWriter::new(&mut out, &header()).unwrap();
    records.iter().for_each(|r| writer.record(r).unwrap());
    match dropped {
        Some(dropped) => drop(writer.finish(dropped).unwrap()),
        None => drop(writer),
    }
    out
}

fn read(bytes: &[u8]) -> vmar::Result<(Vec<Record>, TraceEnd)> {
    let mut reader = TraceReader::new(bytes, "t.trace")?;
    assert_eq!(*reader.header(), header());
    let records = reader.by_ref().collect::<vmar::Result<Vec<_>>>()?;
    assert!(reader.next().is_none());
    Ok((records, reader.end().unwrap()))
}

#[test]
fn the_specification_shows_these_bytes() {
    golden::assert_golden(include_str!("../src/redirect/TRACE.md"), &write(&records(), Some(5)));
}

#[test]
fn a_trace_that_is_cut_off_anywhere_keeps_its_whole_records() {
    let bytes = write(&records(), Some(5));
    assert_eq!(read(&bytes).unwrap(), (records(), TraceEnd::Finished { dropped: 5 }));
    for len in 0..bytes.len() {
        if len < HEADER_BYTES {
            assert_eq!(read(&bytes[..len]).unwrap_err().kind(), ErrorKind::Corrupt);
            continue;
        }
        let (whole, torn_bytes) = ((len - HEADER_BYTES) / RECORD_BYTES, (len - HEADER_BYTES) % RECORD_BYTES);
        assert_eq!(read(&bytes[..len]).unwrap(), (records()[..whole].to_vec(), TraceEnd::Cut { torn_bytes }));
    }
}

#[test]
fn every_flipped_bit_of_a_finished_trace_is_noticed() {
    let mut bytes = write(&records(), Some(5));
    for bit in 0..bytes.len() * 8 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        // A flip in the trailer's mark makes a record of it, and the trace then ends like one that was cut off.
        let noticed = !matches!(read_unchecked(&bytes), Ok((_, TraceEnd::Finished { .. })));
        assert!(noticed, "bit {bit}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
}

fn read_unchecked(bytes: &[u8]) -> vmar::Result<(Vec<Record>, TraceEnd)> {
    let mut reader = TraceReader::new(bytes, "t.trace")?;
    let records = reader.by_ref().collect::<vmar::Result<Vec<_>>>()?;
    Ok((records, reader.end().unwrap()))
}

#[test]
fn other_files_newer_traces_and_tails_are_refused() {
    let mut bytes = write(&records(), Some(0));
    assert!(read(b"vmar-map and so on").unwrap_err().to_string().contains("no trace"));
    bytes.push(0);
    assert!(read(&bytes).unwrap_err().to_string().contains("follows after"));
    bytes[8..12].copy_from_slice(&(VERSION + 1).to_le_bytes());
    let err = read(&bytes).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Unsupported);
    assert!(err.to_string().contains("version 2"), "{err}");
}

#[test]
fn the_header_is_there_before_the_first_record_and_records_after_a_flush() {
    let shared = std::cell::RefCell::new(Vec::new());
    struct Sink<'a>(&'a std::cell::RefCell<Vec<u8>>);
    impl std::io::Write for Sink<'_> {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            self.0.borrow_mut().extend(buf);
            Ok(buf.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut writer = TraceWriter::new(Sink(&shared), &header()).unwrap();
    assert_eq!(shared.borrow().len(), HEADER_BYTES);
    for i in 0..5000 {
        writer.record(&Record { time_us: i, ..records()[0] }).unwrap();
        assert_eq!((shared.borrow().len() - HEADER_BYTES) % RECORD_BYTES, 0, "writes end at records");
    }
    writer.flush().unwrap();
    assert_eq!(shared.borrow().len(), HEADER_BYTES + 5000 * RECORD_BYTES);
}

proptest! {
    #[test]
    fn there_and_back(
        rows in proptest::collection::vec((0..u64::MAX, any::<u32>(), any::<u32>(), any::<u32>(), 1u32..5000), 0..200),
        dropped in proptest::option::of(any::<u64>()),
    ) {
        let records: Vec<Record> = rows
            .into_iter()
            .map(|(time_us, request, image, block, count)| Record { time_us, request, image, block: block.min(u32::MAX - 5000), count })
            .collect();
        let end = dropped.map_or(TraceEnd::Cut { torn_bytes: 0 }, |dropped| TraceEnd::Finished { dropped });
        prop_assert_eq!(read(&write(&records, dropped)).unwrap(), (records, end));
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), keep in 0usize..200) {
        let mut mixed = write(&records(), Some(1));
        mixed.truncate(keep);
        mixed.extend(bytes);
        let _ = read_unchecked(&mixed);
    }
}
