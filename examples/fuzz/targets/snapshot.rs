//! Bytes of snapshots, and of the streams without pages in them.

use super::edits::{self, Edit, Field, PackedEdits};
use super::rng::Rng;
use super::{Fuzz, Outcome, Seen, Setup};
use serde::{Deserialize, Serialize};
use std::convert::Infallible;
use vmar::introspect::Class;
use vmar::snapshot::file::{About, AboutDisk, Disk, Kernel, Replication, Run, Snapshot};
use vmar::snapshot::skeleton::{PAGES_MAX, Piece, Skeleton};
use vmar::store::manifest::{Held, MemoryBlock, Page};
use vmar::store::{Manifest, PackId};

const NAME: &str = "monday";
/// Pages of a disk that are made; a run may say that there are more.
const DATA_MAX: u64 = 64;

/// First block, blocks, and whether they hold data.
type RawRun = (u64, u64, bool);

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    /// Pages of each block of memory.
    blocks: Vec<u16>,
    packs: u8,
    /// Bytes, or block, first, count and whether it is named.
    pieces: Vec<Result<u16, (u16, u64, u64, bool)>>,
    /// Size of each disk, and its runs.
    disks: Vec<(u64, Vec<RawRun>)>,
    /// More or fewer classes than pages.
    classes: i8,
    /// Images that the summary has and the manifests have not.
    images: u8,
    /// To the body before it is packed.
    body: Vec<Edit>,
    /// What the header says that the body is long, if not what it is.
    announced: Option<u64>,
    /// To the file, before it gets its checksum.
    file: Vec<Edit>,
    /// To all of it.
    whole: Vec<Edit>,
    /// A stream without pages, by itself.
    #[serde(with = "super::hex")]
    skeleton: Vec<u8>,
}

pub struct Snapshots;

fn manifest(blocks: Vec<MemoryBlock>, packs: u8) -> Manifest {
    let count: u64 = blocks.iter().map(|block| block.len / 4096).sum();
    let page = |n: u32| match n % 3 {
        1 if packs > 0 => {
            let held = Held::Pack { pack: n % u32::from(packs), page: n };
            Page { hash: *blake3::hash(&n.to_le_bytes()).as_bytes(), held }
        }
        _ => Page::ZERO,
    };
    Manifest {
        vm: "web".into(),
        taken: 1_700_000_000,
        blocks,
        packs: (0..packs).map(|n| PackId([n; 32])).collect(),
        pages: (0..count as u32).map(page).collect(),
        ..Manifest::default()
    }
}

fn seed(input: &Input) -> Snapshot {
    let block =
        |(n, pages): (usize, &u16)| MemoryBlock { name: format!("ram{n}").into_bytes(), len: u64::from(*pages) * 4096 };
    let memory = manifest(input.blocks.iter().enumerate().map(block).collect(), input.packs);
    let piece = |piece: &Result<u16, (u16, u64, u64, bool)>| match *piece {
        Ok(len) => Piece::Bytes(vec![0x5A; len.into()]),
        Err((block, first, count, named)) => Piece::Pages { block, first, count, named },
    };
    let disk = |(_, runs): &(u64, Vec<(u64, u64, bool)>)| {
        let data = runs.iter().filter(|run| run.2).fold(0u64, |sum, run| sum.saturating_add(run.1));
        let block = MemoryBlock { name: b"disk".to_vec(), len: data.min(DATA_MAX) * 4096 };
        let runs = runs.iter().map(|(first, blocks, data)| Run { first: *first, blocks: *blocks, data: *data });
        Disk { runs: runs.collect(), data: manifest(vec![block], input.packs) }
    };
    let about = About {
        name: NAME.into(),
        vm: "web".into(),
        domain: "shop".into(),
        taken: 1_700_000_000,
        machine: "pc-q35-9.2".into(),
        ran: true,
        copies: 2,
        replication: Replication::Page,
        stream_bytes: 1 << 30,
        kernel: Kernel::Doubt("none".into()),
        images: Vec::new(),
        once: Vec::new(),
        disks: Vec::new(),
    };
    let image = || vmar::snapshot::file::BaseImage { name: "base".into(), digest: "00".repeat(32) };
    let about_disk = |(size, _): &(u64, _)| AboutDisk {
        overlay: "/o".into(),
        size: *size,
        base: "00".repeat(32),
        write_cache: false,
    };
    let classes = memory.pages.len().saturating_add_signed(input.classes.into());
    Snapshot {
        about: About {
            images: (0..input.images).map(|_| image()).collect(),
            disks: input.disks.iter().map(about_disk).collect(),
            ..about
        },
        skeleton: Skeleton { pieces: input.pieces.iter().map(piece).collect() },
        classes: (0..classes).map(|n| Class::ALL[n % Class::ALL.len()]).collect(),
        memory,
        disks: input.disks.iter().map(disk).collect(),
    }
}

/// Whether its parts belong together, in words of its own.
fn makes_sense(snapshot: &Snapshot) -> bool {
    let piece = |piece: &Piece| match piece {
        Piece::Bytes(_) => true,
        Piece::Pages { block, first, count, .. } => {
            let pages = snapshot.memory.blocks.get(usize::from(*block)).map(|block| u128::from(block.len / 4096));
            (1..=PAGES_MAX).contains(count) && pages >= Some(u128::from(*first) + u128::from(*count))
        }
    };
    let disk = |(disk, about): (&Disk, &AboutDisk)| {
        let (mut end, mut data) = (0u128, 0u128);
        for run in &disk.runs {
            if u128::from(run.first) < end {
                return false;
            }
            end = u128::from(run.first) + u128::from(run.blocks);
            data += if run.data { run.blocks.into() } else { 0 };
        }
        end <= u128::from(about.size).div_ceil(4096) && data == disk.data.pages.len() as u128
    };
    snapshot.classes.len() == snapshot.memory.pages.len()
        && snapshot.about.images.len() == snapshot.memory.images.len()
        && snapshot.skeleton.pieces.iter().all(piece)
        && snapshot.disks.len() == snapshot.about.disks.len()
        && snapshot.disks.iter().zip(&snapshot.about.disks).all(disk)
}

/// The file of a snapshot with all that was done to it.
fn file_of(clean: &[u8], input: &Input) -> Vec<u8> {
    let edits = PackedEdits { body: &input.body, announced: input.announced, file: &input.file, whole: &input.whole };
    edits.apply(clean)
}

/// Writes the stream of what was read, as a restore does: whatever was believed must not be more than there is.
fn write_stream(read: &Snapshot, seen: &mut Seen) -> Result<(), String> {
    for piece in &read.skeleton.pieces {
        let mut out = Vec::new();
        let mut outside = 0;
        let done = piece.write(&read.memory.blocks, &mut out, |block, page, content| {
            outside += u64::from(page >= block.len / 4096);
            content.fill(page as u8);
            Ok::<bool, Infallible>(page % 2 == 0)
        });
        done.map_err(|e| e.to_string())?;
        if outside > 0 {
            return Err(format!("{outside} pages outside their block"));
        }
    }
    seen.exact(read.disks.len());
    let (memory, disk) = (read.memory_bytes(), read.disk_bytes());
    if memory != read.classes.len() as u64 * 4096 {
        return Err(format!("{memory} bytes of memory, {disk} of disks, and {} classes", read.classes.len()));
    }
    Ok(())
}

impl Snapshots {
    fn snapshot(&self, input: &Input, seen: &mut Seen) -> Result<(), String> {
        let made = seed(input);
        let clean = made.encode().map_err(|e| e.to_string())?;
        let file = file_of(&clean, input);
        let read = match Snapshot::decode("s", NAME, &file) {
            Err(e) if file == clean && makes_sense(&made) => return Err(format!("a valid snapshot is refused: {e}")),
            Err(e) => {
                seen.note(e);
                return Ok(());
            }
            Ok(read) => read,
        };
        if !makes_sense(&read) {
            return Err("a snapshot that makes no sense is believed".into());
        }
        // A piece of bytes behind another one is read as it was written.
        if file == clean && read != made {
            return Err("a valid snapshot is read as another".into());
        }
        let again = read.encode().map_err(|e| e.to_string())?;
        if Snapshot::decode("again", NAME, &again).map_err(|e| e.to_string())? != read {
            return Err("what was read is not read again".into());
        }
        if Snapshot::decode("s", "tuesday", &file).is_ok() {
            return Err("another name is believed".into());
        }
        (read.packs(), read.once()).0.iter().for_each(|id| seen.exact(id.0[0]));
        write_stream(&read, seen)
    }

    fn skeleton(&self, input: &Input, seen: &mut Seen) -> Result<(), String> {
        let Some(read) = Skeleton::decode(&input.skeleton) else { return Ok(()) };
        seen.exact(("skeleton", read.pieces.len().min(4)));
        if Skeleton::decode(&read.encode()).as_ref() != Some(&read) {
            return Err("a skeleton that was read is not read again".into());
        }
        let blocks = [MemoryBlock { name: b"ram".to_vec(), len: 10 * 4096 }];
        seen.exact(read.fits(&blocks));
        Ok(())
    }
}

impl Fuzz for Snapshots {
    type Input = Input;
    const MEMORY_MAX: usize = 64 << 20;

    fn new(_: &Setup) -> Snapshots {
        Snapshots
    }

    fn fresh(&mut self, rng: &mut Rng) -> Input {
        let blocks: Vec<u16> = (0..rng.below(4)).map(|_| 1 + rng.below(40) as u16).collect();
        let mut pieces = Vec::new();
        for (n, pages) in (0u16..).zip(&blocks) {
            pieces.push(Ok(rng.below(100) as u16));
            pieces.push(Err((n, 0, u64::from(*pages), true)));
        }
        let runs = |rng: &mut Rng| (0..rng.below(4)).map(|n| (n * 10, 1 + rng.below(9), rng.chance(1, 2))).collect();
        let mut input = Input {
            blocks,
            packs: rng.below(3) as u8,
            pieces,
            disks: (0..rng.below(3)).map(|_| (40 * 4096 - 512 * rng.below(8), runs(rng))).collect(),
            classes: 0,
            images: 0,
            body: vec![],
            announced: None,
            file: vec![],
            whole: vec![],
            skeleton: vec![],
        };
        (0..rng.below(4)).for_each(|_| self.mutate(rng, &mut input));
        input
    }

    fn mutate(&mut self, rng: &mut Rng, input: &mut Input) {
        let header: [Field; 4] = [(0, 8), (8, 4), (12, 4), (16, 8)];
        let number = |rng: &mut Rng| if rng.chance(1, 2) { rng.edge() } else { rng.below(60) };
        match rng.below(12) {
            0 => input.announced = rng.chance(2, 3).then(|| rng.edge()),
            1 => input.classes = rng.below(3) as i8 - 1,
            2 => input.images = rng.below(2) as u8,
            3 => edits::mutate(rng, &mut input.file, &header, 200, false),
            4 => edits::mutate(rng, &mut input.whole, &header, 200, false),
            5 | 6 => {
                let piece = Err((rng.below(4) as u16, number(rng), number(rng), rng.chance(1, 2)));
                let at = rng.index(input.pieces.len() + 1);
                input.pieces.insert(at, piece);
            }
            7 | 8 => match input.disks.first_mut() {
                Some((_, runs)) => runs.push((number(rng), number(rng), rng.chance(1, 2))),
                None => input.disks.push((rng.edge(), vec![(0, number(rng), true)])),
            },
            9 => {
                let (at, n) = (rng.index(input.skeleton.len() + 1), 1 + rng.index(12));
                let bytes = rng.bytes(n);
                input.skeleton.splice(at..at, bytes);
                input.skeleton.truncate(400);
            }
            _ => {
                // The length in front of the first part; the others are wherever the JSON ends.
                let fields: Vec<Field> = (0..8).map(|n| (n, 8)).collect();
                edits::mutate(rng, &mut input.body, &fields, 900, false);
            }
        }
    }

    fn run(&mut self, input: &Input) -> Outcome {
        let mut seen = Seen::default();
        self.snapshot(input, &mut seen)?;
        self.skeleton(input, &mut seen)?;
        Ok(seen)
    }
}
