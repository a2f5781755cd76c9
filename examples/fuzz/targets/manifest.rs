//! Bytes of memory images and of packs.

use super::edits::{self, Edit, Field, PackedEdits};
use super::rng::Rng;
use super::{Fuzz, Outcome, Seen, Setup};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use vmar::store::manifest::{Held, MemoryBlock, Page};
use vmar::store::{Manifest, PAGE_BYTES, Pack, PackId, PackWriter};

const TRAILER: usize = 24;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    /// Pages of each block of memory.
    blocks: Vec<u16>,
    packs: u8,
    images: u8,
    /// To the body before it is packed.
    body: Vec<Edit>,
    /// What the header says that the body is long, if not what it is.
    announced: Option<u64>,
    /// To the file, before it gets its checksum.
    file: Vec<Edit>,
    /// To all of it.
    whole: Vec<Edit>,
    /// Pages of a pack, and what is done to it.
    pages: u16,
    pack: Vec<Edit>,
    /// It is opened by the name that its index has after that.
    renamed: bool,
}

pub struct Manifests {
    dir: PathBuf,
}

fn seed(input: &Input) -> Manifest {
    let mut pages = Vec::new();
    for n in 0..input.blocks.iter().map(|n| u32::from(*n)).sum::<u32>() {
        let hash = *blake3::hash(&n.to_le_bytes()).as_bytes();
        let held = match n % 4 {
            1 if input.packs > 0 => Held::Pack { pack: n % u32::from(input.packs), page: n },
            2 if input.images > 0 => Held::Image { image: n % u32::from(input.images), block: 7 * n },
            3 => Held::Elsewhere,
            _ => Held::Zero,
        };
        pages.push(if held == Held::Zero { Page::ZERO } else { Page { hash, held } });
    }
    let block = |(n, pages): (usize, &u16)| MemoryBlock {
        name: format!("ram{n}").into_bytes(),
        len: u64::from(*pages) * PAGE_BYTES as u64,
    };
    Manifest {
        vm: "web-1".into(),
        taken: 1_700_000_000,
        blocks: input.blocks.iter().enumerate().map(block).collect(),
        images: (0..input.images).map(|n| [n; 32]).collect(),
        packs: (0..input.packs).map(|n| PackId([n; 32])).collect(),
        pages,
        ..Manifest::default()
    }
}

/// The file of a manifest with all that was done to it.
fn file_of(clean: &[u8], input: &Input) -> Vec<u8> {
    let edits = PackedEdits { body: &input.body, announced: input.announced, file: &input.file, whole: &input.whole };
    edits.apply(clean)
}

impl Manifests {
    fn manifest(&self, input: &Input, seen: &mut Seen) -> Result<(), String> {
        let clean = seed(input).encode().map_err(|e| e.to_string())?;
        let file = file_of(&clean, input);
        let read = match Manifest::decode(Path::new("m.mem"), &file) {
            Err(e) if file == clean => return Err(format!("a valid memory image is refused: {e}")),
            Err(e) => {
                seen.note(e);
                return Ok(());
            }
            Ok(read) => read,
        };
        if file == clean && read != seed(input) {
            return Err("a valid memory image is read as another".into());
        }
        let pages: u64 = read.blocks.iter().map(|b| b.len / PAGE_BYTES as u64).sum();
        if pages != read.pages.len() as u64 {
            return Err(format!("{} pages in blocks of {pages}", read.pages.len()));
        }
        let again = read.encode().map_err(|e| e.to_string())?;
        if Manifest::decode(Path::new("again.mem"), &again).map_err(|e| e.to_string())? != read {
            return Err("what was read is not read again".into());
        }
        if let Some(block) = read.blocks.last() {
            let last = read.number(&block.name, block.len.saturating_sub(1));
            seen.exact(last.is_some());
        }
        seen.exact(("taken", pages.min(3)));
        Ok(())
    }

    fn pack(&self, input: &Input, seen: &mut Seen) -> Result<(), String> {
        let path = self.dir.join("a.pack");
        let _ = std::fs::remove_file(&path);
        let mut writer = PackWriter::create(&path).map_err(|e| e.to_string())?;
        let page = |n: u16| -> [u8; PAGE_BYTES] { n.to_le_bytes().repeat(PAGE_BYTES / 2).try_into().unwrap() };
        for n in 0..input.pages {
            writer.push(blake3::hash(&page(n)).as_bytes(), &page(n)).map_err(|e| e.to_string())?;
        }
        let mut id = writer.finish().map_err(|e| e.to_string())?;
        let clean = std::fs::read(&path).map_err(|e| e.to_string())?;
        let mut file = clean.clone();
        input.pack.iter().for_each(|e| e.apply(&mut file));
        if input.renamed && file.len() >= TRAILER {
            let end = file.len() - TRAILER;
            let at = u64::from_le_bytes(file[end..end + 8].try_into().unwrap());
            let index = usize::try_from(at).ok().and_then(|at| file.get(at..end)).unwrap_or_default();
            id = PackId(*blake3::hash(index).as_bytes());
        }
        std::fs::write(&path, &file).map_err(|e| e.to_string())?;
        let opened = match Pack::open(&path, id) {
            Err(e) if file == clean => return Err(format!("a valid pack is refused: {e}")),
            Err(e) => {
                seen.note(e);
                return Ok(());
            }
            Ok(pack) => pack,
        };
        match opened.verify() {
            Err(e) if file == clean => return Err(format!("a valid pack is wrong: {e}")),
            Err(e) => seen.note(e),
            Ok(()) => seen.exact("whole"),
        }
        let mut out = [0; PAGE_BYTES];
        for n in [0, u32::from(input.pages) / 2, u32::from(input.pages), u32::MAX] {
            match (opened.read(n, &mut out), opened.hashes().get(n as usize)) {
                (Ok(()), Some(hash)) if blake3::hash(&out).as_bytes() == hash => {}
                (Ok(()), _) => return Err(format!("page {n} is not what its hash says")),
                (Err(e), _) => seen.note(e),
            }
        }
        Ok(())
    }
}

impl Fuzz for Manifests {
    type Input = Input;
    const MEMORY_MAX: usize = 64 << 20;

    fn new(setup: &Setup) -> Manifests {
        let dir = setup.dir.join("manifest");
        std::fs::create_dir_all(&dir).unwrap();
        Manifests { dir }
    }

    fn fresh(&mut self, rng: &mut Rng) -> Input {
        let mut input = Input {
            blocks: (0..rng.below(4)).map(|_| rng.below(40) as u16).collect(),
            packs: rng.below(3) as u8,
            images: rng.below(3) as u8,
            body: vec![],
            announced: None,
            file: vec![],
            whole: vec![],
            pages: if rng.chance(1, 8) { 250 + rng.below(20) as u16 } else { rng.below(4) as u16 },
            pack: vec![],
            renamed: rng.chance(1, 2),
        };
        (0..rng.below(4)).for_each(|_| self.mutate(rng, &mut input));
        input
    }

    fn mutate(&mut self, rng: &mut Rng, input: &mut Input) {
        let header: [Field; 4] = [(0, 8), (8, 4), (12, 4), (16, 8)];
        match rng.below(12) {
            0 => input.announced = rng.chance(2, 3).then(|| rng.edge()),
            1 => input.renamed ^= true,
            2 => input.blocks = (0..rng.below(4)).map(|_| rng.below(400) as u16).collect(),
            3 => edits::mutate(rng, &mut input.file, &header, 200, false),
            4 => edits::mutate(rng, &mut input.whole, &header, 200, false),
            5..=7 => {
                // Lengths of the name, of the lists, and of the blocks, wherever they are by now.
                let fields: Vec<Field> = (0..30).map(|n| (n, if rng.chance(1, 2) { 4 } else { 8 })).collect();
                let len = seed(input).pages.len() as u64 * 41 + 100;
                edits::mutate(rng, &mut input.body, &fields, len, false);
            }
            _ => {
                // Half of a pack of a few pages is index and trailer.
                let index = 8 + u64::from(input.pages) * 32 + TRAILER as u64;
                let len = input.pack.iter().fold(16 + u64::from(input.pages) * 24 + index, |len, e| match e {
                    Edit::Truncate { len: n } => len.min(*n),
                    _ => len,
                });
                let end = len.saturating_sub(TRAILER as u64);
                let at = len.saturating_sub(index);
                let fields = [(8, 4), (at, 4), (at + 4, 4), (end, 8), (end + 8, 4), (end + 12, 4)];
                edits::mutate(rng, &mut input.pack, &fields, len, false);
            }
        }
    }

    fn run(&mut self, input: &Input) -> Outcome {
        let mut seen = Seen::default();
        self.manifest(input, &mut seen)?;
        self.pack(input, &mut seen)?;
        Ok(seen)
    }
}
