//! Bytes of block maps. A map that was not changed answers like its model; one that was is refused, or answers within
//! the images that it names.

use super::edits::{self, Edit, Field};
use super::rng::Rng;
use super::{Fuzz, Outcome, Seen, Setup};
use serde::{Deserialize, Serialize};
use vmar::map::{EntryBuilder, Map, MapSpec, Scheme, Target, build};
use vmar::redirect::plan::{Layout, Piece, Source, plan_base};
use vmar::units::{BLOCK_SIZE, ImageId};

/// A run of blocks: kind (0, 1, 2: image 0, image 1, the image itself; else zeros), first block there, blocks.
type Piece3 = (u32, u32, u32);

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    pieces: Vec<Piece3>,
    /// Bytes that the image's last block lacks, in sectors.
    short: u64,
    edits: Vec<Edit>,
    /// The checksums are put right after the edits.
    fix_checksums: bool,
    /// The length in the header too.
    fix_length: bool,
}

pub struct Maps {
    fields: Vec<Field>,
}

/// Blocks of the two other images.
const LIMITS: [u32; 2] = [3000, 700];
const PARTS_AT: usize = 164;
const CRC_AT: usize = 252;

type Model = Vec<Option<(u32, u32)>>;

fn model_of(input: &Input) -> Model {
    let total: u32 = input.pieces.iter().map(|p| p.2 % 5000).sum();
    let limits = [LIMITS[0], LIMITS[1], total];
    let mut model = Model::new();
    for &(kind, start, len) in &input.pieces {
        for i in 0..len % 5000 {
            model.push(limits.get(kind as usize).map(|limit| (kind, (start % limit + i) % limit)));
        }
    }
    if !input.short.is_multiple_of(8)
        && let Some(last) = model.len().checked_sub(1)
    {
        // A partial last block cannot be redirected, nor can anything be redirected to it.
        model[last] = Some((2, last as u32));
        for (at, to) in model.iter_mut().enumerate() {
            if *to == Some((2, last as u32)) && at != last {
                *to = None;
            }
        }
    }
    model
}

fn image(id: u32, size: u64) -> Target {
    Target { image: ImageId(id), generation: 1 + u64::from(id), digest: [id as u8 ^ 0x5a; 32], size }
}

fn seed(model: &Model, short: u64) -> Vec<u8> {
    let short = if model.is_empty() { 0 } else { short % 8 * 512 };
    let source = image(2, model.len() as u64 * BLOCK_SIZE - short);
    let others = LIMITS.map(|blocks| u64::from(blocks) * BLOCK_SIZE);
    let mut entries = EntryBuilder::new();
    for (block, to) in model.iter().enumerate() {
        if let Some((target, at)) = *to {
            entries.push(block as u32, target, at);
        }
    }
    let targets = vec![image(0, others[0]), image(1, others[1]), source];
    build(&MapSpec { source, policy: 0, targets, entries: entries.finish() }).unwrap()
}

fn fix(file: &mut [u8], length: bool) {
    if file.len() < 256 {
        return;
    }
    let word = |file: &[u8], at: usize| u64::from_le_bytes(file[at..at + 8].try_into().unwrap());
    if length {
        let len = file.len() as u64;
        file[16..24].copy_from_slice(&len.to_le_bytes());
    }
    for at in (0..4).map(|i| PARTS_AT + 20 * i) {
        let (offset, len) = (word(file, at) as usize, word(file, at + 8) as usize);
        if let Some(part) = offset.checked_add(len).and_then(|end| file.get(offset..end)) {
            let crc = crc32c::crc32c(part);
            file[at + 16..at + 20].copy_from_slice(&crc.to_le_bytes());
        }
    }
    let crc = crc32c::crc32c(&file[..CRC_AT]);
    file[CRC_AT..256].copy_from_slice(&crc.to_le_bytes());
}

/// What must hold of any map that is taken.
fn answers(map: Map<Vec<u8>>, seen: &mut Seen) -> Result<(), String> {
    let blocks = map.source().blocks();
    let targets: Vec<Target> = map.targets().map(|(t, _)| t).collect();
    let inside = |target: u32, block: u32, len: u32| {
        targets.get(target as usize).is_some_and(|t| u64::from(block) + u64::from(len) <= t.blocks())
    };
    let mut probes: Vec<u64> = (0..blocks.min(300)).collect();
    probes.extend((blocks.saturating_sub(20)..blocks + 3).chain([u64::from(u32::MAX), u64::from(u32::MAX) - 1]));
    probes.extend(map.entries().take(200).flat_map(|e| [u64::from(e.source), e.source_end() - 1, e.source_end()]));
    for block in probes.into_iter().filter_map(|b| u32::try_from(b).ok()) {
        let hit = map.lookup(block);
        if let Some(hit) = hit
            && (!inside(hit.target, hit.block, hit.run) || u64::from(block) + u64::from(hit.run) > blocks)
        {
            return Err(format!("block {block} of {blocks} leads out of the image: {hit:?}"));
        }
        if map.entry_of(block).is_some() != hit.is_some() {
            return Err(format!("block {block}: lookup says {hit:?}, entry_of {:?}", map.entry_of(block)));
        }
        for scheme in [Scheme::Plain, Scheme::Sections, Scheme::SectionsAndBloom] {
            map.search_depth_by(scheme, block);
        }
        map.section_of(block);
        let mut at = u64::from(block);
        for run in map.runs(block, 64) {
            let to = map.lookup(run.source).map(|h| (h.target, h.block));
            if u64::from(run.source) != at || run.len == 0 || to != run.to {
                return Err(format!("{run:?} at {at}, but lookup says {to:?}"));
            }
            if let Some((target, first)) = run.to
                && !inside(target, first, run.len)
            {
                return Err(format!("{run:?} leads out of image {target}"));
            }
            at += u64::from(run.len);
        }
        if at != (u64::from(block) + 64).min(1 << 32) {
            return Err(format!("the runs from {block} on end at {at}"));
        }
    }
    let size = map.source().size;
    seen.note(format!("taken: {} targets, {} sections", targets.len().min(4), map.layout().sections.max(1).ilog2()));
    let layout = Layout::Mapped(Box::new(map));
    let mut pieces: Vec<Piece> = Vec::new();
    for (offset, len) in [(0, 1 << 20), (size / 1024 * 512, 70_000), (size.saturating_sub(512), 8192)] {
        pieces.clear();
        plan_base(&layout, size, offset, len, 0, &mut pieces);
        let mut at = 0;
        for piece in &pieces {
            if piece.at != at || piece.len == 0 {
                return Err(format!("the plan of {offset}+{len} has a gap at {at}: {piece:?}"));
            }
            if let Source::Image { target, offset } = piece.source
                && targets.get(target as usize).is_none_or(|t| offset + piece.len as u64 > t.size)
            {
                return Err(format!("the plan leads out of image {target}: {piece:?}"));
            }
            at += piece.len;
        }
        if at != len {
            return Err(format!("the plan of {offset}+{len} ends after {at}"));
        }
    }
    Ok(())
}

/// The map answers like the model.
fn equals(map: &Map<Vec<u8>>, model: &Model) -> Result<(), String> {
    for block in 0..model.len() as u32 + 2 {
        let want = model.get(block as usize).copied().flatten();
        let got = map.lookup(block).map(|h| (h.target, h.block));
        if got != want {
            return Err(format!("block {block}: {got:?} in place of {want:?}"));
        }
    }
    Ok(())
}

impl Fuzz for Maps {
    type Input = Input;
    const MEMORY_MAX: usize = 64 << 20;

    fn new(_: &Setup) -> Maps {
        let mut fields: Vec<Field> =
            vec![(8, 4), (12, 4), (16, 8), (24, 4), (28, 4), (32, 4), (36, 4), (40, 8), (48, 8)];
        fields.extend((0..6).map(|i| (88 + 8 * i, 8)));
        fields.extend((0..7).map(|i| (136 + 4 * i, 4)));
        fields.extend((0..4).flat_map(|i| [(164 + 20 * i, 8), (172 + 20 * i, 8), (180 + 20 * i, 4)]));
        // Targets, and the first entries behind them.
        fields
            .extend((0..3).flat_map(|i| [(256 + 64 * i, 4), (264 + 64 * i, 8), (272 + 64 * i, 8), (312 + 64 * i, 8)]));
        fields.extend((0..24).map(|i| (448 + 4 * i, 4)));
        Maps { fields }
    }

    fn fresh(&mut self, rng: &mut Rng) -> Input {
        let pieces = (0..rng.below(12))
            .map(|_| {
                let len = rng.one_of(&[1, 1, 3, 17, 70, 400]);
                (rng.below(5) as u32, rng.below(3000) as u32, 1 + rng.below(len) as u32)
            })
            .collect();
        let mut input = Input {
            pieces,
            short: if rng.chance(1, 3) { rng.below(8) } else { 0 },
            edits: vec![],
            fix_checksums: rng.chance(4, 5),
            fix_length: rng.chance(1, 2),
        };
        for _ in 0..rng.below(4) {
            edits::mutate(rng, &mut input.edits, &self.fields, 2000, false);
        }
        input
    }

    fn mutate(&mut self, rng: &mut Rng, input: &mut Input) {
        match rng.below(10) {
            0 => input.fix_checksums ^= true,
            1 => input.fix_length ^= true,
            2 if !input.pieces.is_empty() => _ = input.pieces.remove(rng.index(input.pieces.len())),
            3 if input.pieces.len() < 40 => {
                input.pieces.push((rng.below(5) as u32, rng.below(3000) as u32, 1 + rng.below(90) as u32));
            }
            _ => edits::mutate(rng, &mut input.edits, &self.fields, 2500, false),
        }
    }

    fn run(&mut self, input: &Input) -> Outcome {
        let mut seen = Seen::default();
        let model = model_of(input);
        let clean = seed(&model, input.short);
        let mut file = clean.clone();
        input.edits.iter().for_each(|e| e.apply(&mut file));
        if input.fix_checksums {
            fix(&mut file, input.fix_length);
        }
        let same = file == clean;
        match Map::new(file) {
            Err(e) if same => return Err(format!("a valid map is refused: {e}")),
            Err(e) => seen.note(e),
            Ok(map) => {
                if same {
                    equals(&map, &model)?;
                }
                answers(map, &mut seen)?;
            }
        }
        Ok(seen)
    }
}
