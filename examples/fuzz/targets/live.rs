//! Live bitmaps whose bytes were changed, beside an overlay whose process was killed.

use super::edits::{self, Edit, Field};
use super::overlays::{Place, Seed};
use super::rng::Rng;
use super::{Fuzz, Outcome, Seen, Setup};
use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    seed: Seed,
    edits: Vec<Edit>,
    /// The checksum of the header is put right after the edits.
    fix_checksum: bool,
    qemu: bool,
}

pub struct Live {
    place: Place,
}

/// Where the checksum of a good header is: it covers what stands before it.
fn checksum_at(clean: &[u8]) -> Option<usize> {
    (32..512).step_by(4).find(|&at| clean[at..at + 4] == crc32c::crc32c(&clean[..at]).to_ne_bytes())
}

fn fields() -> Vec<Field> {
    let header = [(0, 8), (8, 4), (12, 4), (16, 8), (32, 8), (48, 8), (56, 8), (64, 8), (72, 8), (80, 8), (1024, 8)];
    header.into_iter().chain((0..10).map(|i| (4096 + 8 * i, 8))).collect()
}

impl Fuzz for Live {
    type Input = Input;

    fn new(setup: &Setup) -> Live {
        Live { place: Place::new(&setup.dir.join("live")) }
    }

    fn fresh(&mut self, rng: &mut Rng) -> Input {
        let mut seed = Seed::random(rng);
        seed.killed = true;
        let mut input = Input { seed, edits: vec![], fix_checksum: rng.chance(2, 3), qemu: rng.chance(1, 30) };
        for _ in 0..rng.below(4) {
            edits::mutate(rng, &mut input.edits, &fields(), 4200, false);
        }
        input
    }

    fn mutate(&mut self, rng: &mut Rng, input: &mut Input) {
        match rng.below(8) {
            0 => input.seed.push(rng),
            1 => input.fix_checksum ^= true,
            2 => input.qemu = rng.chance(1, 10),
            _ => edits::mutate(rng, &mut input.edits, &fields(), 4200, false),
        }
        input.seed.ops.truncate(16);
    }

    fn run(&mut self, input: &Input) -> Outcome {
        let mut seen = Seen::default();
        let mut made = self.place.make(&Seed { killed: true, ..input.seed.clone() })?;
        let path = self.place.live().ok_or("no live bitmap after a kill")?;
        let clean = std::fs::read(&path).map_err(|e| e.to_string())?;
        let at = checksum_at(&clean).ok_or("no checksum in the header")?;
        let mut file = clean.clone();
        input.edits.iter().for_each(|e| e.apply(&mut file));
        if input.fix_checksum && file.len() >= at + 4 {
            let crc = crc32c::crc32c(&file[..at]).to_ne_bytes();
            file[at..at + 4].copy_from_slice(&crc);
        }
        let same = file == clean;
        std::fs::write(&path, &file).map_err(|e| e.to_string())?;
        match vmar::overlay::inspect(&self.place.overlay, &self.place.state) {
            Ok(info) => seen.note(format!("{:?}", info.session)),
            Err(e) => seen.note(e),
        }
        let read_only = self.place.open(&made, true).map(drop);
        match self.place.open(&made, false) {
            Ok(overlay) => {
                seen.note("taken");
                read_only.map_err(|e| format!("taken for writing, but not for reading: {e}"))?;
                self.place.use_it(&mut made, overlay, same, false)?;
                if input.qemu {
                    self.place.qemu_check()?;
                }
            }
            Err(e) if same => return Err(format!("a good live bitmap is refused: {e}")),
            Err(e) => seen.note(e),
        }
        Ok(seen)
    }
}
