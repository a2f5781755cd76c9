//! Overlays whose bytes were changed: header, extensions, refcounts, L1, L2, length.

use super::edits::{self, Edit, Field};
use super::overlays::{Place, Seed, read};
use super::rng::Rng;
use super::{Fuzz, Outcome, Seen, Setup};
use serde::{Deserialize, Serialize};
use vmar::overlay;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    seed: Seed,
    edits: Vec<Edit>,
    /// The process that uses it afterwards is killed.
    killed_later: bool,
    /// QEMU has its say too, if it is taken.
    qemu: bool,
}

pub struct Qcow2 {
    place: Place,
    fields: Vec<Field>,
    len: u64,
}

fn be64(file: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(file[at..at + 8].try_into().unwrap())
}

/// Where the numbers of an overlay are.
fn fields(file: &[u8]) -> Vec<Field> {
    const HEADER: [Field; 19] = [
        (0, 4),
        (4, 4),
        (8, 8),
        (16, 4),
        (20, 4),
        (24, 8),
        (32, 4),
        (36, 4),
        (40, 8),
        (48, 8),
        (56, 4),
        (60, 4),
        (64, 8),
        (72, 8),
        (80, 8),
        (88, 8),
        (96, 4),
        (100, 4),
        (104, 1),
    ];
    let mut out = HEADER.to_vec();
    // The extensions: type and length of each, all words of those that are short, and the backing file name.
    let mut at = 112usize;
    while at + 8 < file.len().min(65536) {
        let kind = u32::from_be_bytes(file[at..at + 4].try_into().unwrap());
        let len = u32::from_be_bytes(file[at + 4..at + 8].try_into().unwrap()) as usize;
        out.extend([(at as u64, 4), (at as u64 + 4, 4)]);
        out.extend((0..len.min(160) / 8).map(|i| ((at + 8 + i * 8) as u64, 8)));
        at += 8 + len.next_multiple_of(8);
        if kind == 0 {
            break;
        }
    }
    let (refcounts, l1) = (be64(file, 48), be64(file, 40));
    let block = be64(file, refcounts as usize);
    let l2 = be64(file, l1 as usize) & !(1 << 63);
    for table in [refcounts, l1] {
        out.extend([(table, 8), (table + 8, 8), (table + 16, 8)]);
    }
    out.extend((0..16).map(|i| (block + 2 * i, 2)));
    out.extend((0..12).map(|i| (l2 + 8 * i, 8)));
    // Behind the last cluster of the disk.
    out.extend([(l2 + 16 * 10, 8), (l2 + 65528, 8)]);
    out
}

impl Fuzz for Qcow2 {
    type Input = Input;

    fn new(setup: &Setup) -> Qcow2 {
        let place = Place::new(&setup.dir.join("qcow2"));
        place.make(&Seed { base: 300, ..Seed::default() }).unwrap();
        let file = std::fs::read(&place.overlay).unwrap();
        Qcow2 { place, fields: fields(&file), len: file.len() as u64 }
    }

    fn fresh(&mut self, rng: &mut Rng) -> Input {
        let mut input =
            Input { seed: Seed::random(rng), edits: vec![], killed_later: rng.chance(1, 3), qemu: rng.chance(1, 30) };
        for _ in 0..rng.below(4) {
            edits::mutate(rng, &mut input.edits, &self.fields, self.len, true);
        }
        input
    }

    fn mutate(&mut self, rng: &mut Rng, input: &mut Input) {
        match rng.below(12) {
            0 => input.seed.push(rng),
            1 => input.seed.killed ^= true,
            2 => input.killed_later ^= true,
            3 => input.seed.ops.truncate(rng.index(input.seed.ops.len() + 1)),
            4 => input.qemu = rng.chance(1, 10),
            _ => edits::mutate(rng, &mut input.edits, &self.fields, self.len, true),
        }
        input.seed.ops.truncate(16);
    }

    fn run(&mut self, input: &Input) -> Outcome {
        let mut seen = Seen::default();
        let mut made = self.place.make(&input.seed)?;
        let clean = std::fs::read(&self.place.overlay).map_err(|e| e.to_string())?;
        let mut file = clean.clone();
        input.edits.iter().for_each(|e| e.apply(&mut file));
        let same = file == clean;
        if !same {
            // In place: a live bitmap belongs to this inode.
            std::fs::write(&self.place.overlay, &file).map_err(|e| e.to_string())?;
        }
        match overlay::check(&self.place.overlay) {
            Ok(faults) if same && !faults.is_empty() => return Err(format!("a good overlay has faults: {faults:?}")),
            Ok(faults) => seen.note(format!("{:?}", faults.first())),
            Err(e) => seen.note(e),
        }
        match overlay::inspect(&self.place.overlay, &self.place.state) {
            Ok(info) => seen.note(format!("{:?}", info.session)),
            Err(e) => seen.note(e),
        }
        match self.place.open(&made, true) {
            Ok(overlay) if overlay.size() < 4 << 20 => {
                let content = read(&overlay, &made.base)?;
                if same && content != made.model {
                    return Err("a good overlay reads wrong".into());
                }
            }
            Ok(_) => {}
            Err(e) if same => return Err(format!("a good overlay is refused: {e}")),
            Err(e) => seen.note(e),
        }
        let after = std::fs::read(&self.place.overlay).map_err(|e| e.to_string())?;
        if after != file {
            return Err("it was changed by looking at it".into());
        }
        match self.place.open(&made, false) {
            Ok(overlay) => {
                seen.note(format!("taken, killed {}", input.seed.killed));
                self.place.use_it(&mut made, overlay, same, input.killed_later)?;
                if input.qemu {
                    self.place.qemu_check()?;
                }
            }
            Err(e) if same => return Err(format!("a good overlay is refused: {e}")),
            Err(e) => seen.note(e),
        }
        Ok(seen)
    }
}
