//! Bytes of trace files.

use super::edits::{self, Edit, Field};
use super::rng::Rng;
use super::{Fuzz, Outcome, Seen, Setup};
use serde::{Deserialize, Serialize};
use vmar::redirect::trace::{Record, TraceEnd, TraceHeader, TraceReader, TraceWriter};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    /// Time, request, image, block, count.
    records: Vec<(u64, u32, u32, u32, u32)>,
    /// With a trailer that tells of so many dropped records.
    dropped: Option<u64>,
    edits: Vec<Edit>,
    /// The checksum of the header is put right after the edits.
    fix_header: bool,
}

pub struct Traces;

const HEADER: usize = 96;
const RECORD: u64 = 24;

fn records(input: &Input) -> Vec<Record> {
    let clip = |&(time_us, request, image, block, count): &(u64, u32, u32, u32, u32)| Record {
        time_us: time_us % u64::MAX,
        request,
        image,
        block,
        count: count.clamp(1, (u32::MAX - block).max(1)),
    };
    input.records.iter().map(clip).collect()
}

fn seed(input: &Input) -> Vec<u8> {
    let header = TraceHeader { library: [7; 16], image: 3, generation: 2, digest: [9; 32], start_ns: 1 << 60 };
    let mut file = Vec::new();
    let mut writer = TraceWriter::new(&mut file, &header).unwrap();
    records(input).iter().for_each(|r| writer.record(r).unwrap());
    match input.dropped {
        Some(dropped) => _ = writer.finish(dropped).unwrap(),
        None => {
            writer.flush().unwrap();
            drop(writer);
        }
    }
    file
}

impl Traces {
    fn fields() -> Vec<Field> {
        let header = [(0, 8), (8, 4), (12, 4), (16, 4), (20, 4), (40, 8), (80, 8), (88, 4), (92, 4)];
        let record =
            |i: u64| [(0, 8), (8, 4), (12, 4), (16, 4), (20, 4)].map(|(at, n)| (HEADER as u64 + i * RECORD + at, n));
        header.into_iter().chain((0..6).flat_map(record)).collect()
    }
}

impl Fuzz for Traces {
    type Input = Input;
    const MEMORY_MAX: usize = 16 << 20;

    fn new(_: &Setup) -> Traces {
        Traces
    }

    fn fresh(&mut self, rng: &mut Rng) -> Input {
        let number = |rng: &mut Rng| if rng.chance(1, 3) { rng.edge() } else { rng.below(1000) };
        let records = (0..rng.below(8))
            .map(|_| {
                let [a, b, c, d] = [(); 4].map(|()| number(rng) as u32);
                (number(rng), a, b, c, d)
            })
            .collect();
        let dropped = rng.chance(1, 2).then(|| rng.below(3));
        let mut input = Input { records, dropped, edits: vec![], fix_header: rng.chance(1, 2) };
        (0..rng.below(4)).for_each(|_| self.mutate(rng, &mut input));
        input
    }

    fn mutate(&mut self, rng: &mut Rng, input: &mut Input) {
        match rng.below(8) {
            0 => input.fix_header ^= true,
            1 => input.dropped = rng.chance(1, 2).then(|| rng.edge()),
            _ => {
                let len = HEADER as u64 + (input.records.len() as u64 + 1) * RECORD;
                edits::mutate(rng, &mut input.edits, &Self::fields(), len, false);
            }
        }
    }

    fn run(&mut self, input: &Input) -> Outcome {
        let mut seen = Seen::default();
        let clean = seed(input);
        let mut file = clean.clone();
        input.edits.iter().for_each(|e| e.apply(&mut file));
        if input.fix_header && file.len() >= HEADER {
            let crc = crc32c::crc32c(&file[..HEADER - 4]);
            file[HEADER - 4..HEADER].copy_from_slice(&crc.to_le_bytes());
        }
        let same = file == clean;
        let mut reader = match TraceReader::new(&file[..], "trace") {
            Err(e) if same => return Err(format!("a valid trace is refused: {e}")),
            Err(e) => {
                seen.note(e);
                return Ok(seen);
            }
            Ok(reader) => reader,
        };
        let mut got = Vec::new();
        let mut failed = false;
        for record in reader.by_ref() {
            match record {
                Ok(r) if r.count == 0 || r.end() > 1 << 32 => return Err(format!("{r:?} was taken")),
                Ok(r) => got.push(r),
                Err(e) => {
                    seen.note(e);
                    failed = true;
                }
            }
        }
        if reader.next().is_some() {
            return Err("a record after the end".into());
        }
        if got.len() as u64 * RECORD > file.len() as u64 {
            return Err(format!("{} records in {} bytes", got.len(), file.len()));
        }
        if failed == reader.end().is_some() {
            return Err(format!("failed: {failed}, end: {:?}", reader.end()));
        }
        if same {
            let end = input.dropped.map_or(TraceEnd::Cut { torn_bytes: 0 }, |dropped| TraceEnd::Finished { dropped });
            if got != records(input) || reader.end() != Some(end) {
                return Err(format!("{got:?} and {:?} in place of what was written", reader.end()));
            }
        }
        seen.note(format!("{:?}", reader.end().map(|e| std::mem::discriminant(&e))));
        Ok(seen)
    }
}
