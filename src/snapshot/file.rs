//! The file of a snapshot: all that there is of it beside its pages.
//!
//! ```text
//! header    "vmar-snp", version u32, reserved u32, bytes of the body u64
//! body      zstd: about (JSON); skeleton; classes, a byte a page; memory; for each disk: runs, data
//! checksum  BLAKE3 of all before it
//! ```
//!
//! Each part of the body has a u64 length in front; integers are little-endian. *Memory* and *data* are manifests
//! ([`crate::store::manifest`]): pages in the order of the guest's blocks of memory, and the blocks of the disk that the overlay has data for,
//! in the order of the runs; all of them name the same packs and images. *Runs* has three numbers for each (LEB128): first block,
//! blocks, 1 for data or 0 for zeros; what is in no run is the base image's.

use super::skeleton::Skeleton;
use crate::codec::Cursor;
use crate::error::{Error, ErrorKind, Result};
use crate::introspect::Class;
use crate::migrate::varint;
use crate::store::manifest::Manifest;
use crate::store::{Digest, PackId};
use crate::units::to_usize;
use serde::{Deserialize, Serialize};
use std::collections::HashSet;
use std::io::Read;

const MAGIC: &[u8; 8] = b"vmar-snp";
const VERSION: u32 = 1;
const HEADER: usize = 24;
const CHECKSUM: usize = 32;
/// Bytes of a body, at most: what a snapshot of 1 TiB takes.
const BODY_MAX: u64 = 32 << 30;
/// What to do about one that cannot be used.
const MEND: &str = "'vmar snapshot repair' brings it back from another store";

/// Which pages are in how many stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Replication {
    /// What must not be lost, in several; free pages in one.
    Page,
    /// All pages in several.
    Full,
}

/// The base image of a disk, and of pages that are refilled from it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseImage {
    /// Its name in the library at that time.
    pub name: String,
    /// Its content digest, hexadecimal.
    pub digest: String,
}

/// What is known of the guest's kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kernel {
    /// Its release, and whether its BTF was found.
    Known {
        /// As `uname -r` prints it.
        release: String,
        /// Without it all page cache is dirty.
        btf: bool,
    },
    /// Nothing, and why: all pages are critical.
    Doubt(String),
}

/// What the summary has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Name of the snapshot.
    pub name: String,
    /// Name of the VM.
    pub vm: String,
    /// Sharing domain: pages of other domains are not used.
    pub domain: String,
    /// When it was taken, in seconds since 1970.
    pub taken: u64,
    /// QEMU's machine type.
    pub machine: String,
    /// Whether the VM ran.
    pub ran: bool,
    /// How many stores have the packs that must not be lost.
    pub copies: usize,
    /// Which pages these are.
    pub replication: Replication,
    /// Bytes of QEMU's migration stream.
    pub stream_bytes: u64,
    /// What is known of the guest's kernel.
    pub kernel: Kernel,
    /// The images that pages and disks refer to, in the order of [`Manifest::images`].
    pub images: Vec<BaseImage>,
    /// Packs that are in one store, and may be lost: hexadecimal.
    pub once: Vec<String>,
    /// The disks, in the order of [`Snapshot::disks`].
    pub disks: Vec<AboutDisk>,
}

/// What the summary has of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AboutDisk {
    /// Where its overlay was.
    pub overlay: String,
    /// Bytes.
    pub size: u64,
    /// Content digest of its image, hexadecimal.
    pub base: String,
    /// Whether the guest had its write cache switched on.
    pub write_cache: bool,
}

/// Blocks of a disk that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first, in 4 KiB.
    pub first: u64,
    /// How many.
    pub blocks: u64,
    /// They hold data; else they are zero.
    pub data: bool,
}

/// What an overlay held.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Disk {
    /// The blocks that it held, in order.
    pub runs: Vec<Run>,
    /// The content of those with data.
    pub data: Manifest,
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The summary.
    pub about: About,
    /// The stream without its pages.
    pub skeleton: Skeleton,
    /// What each page of memory was used for.
    pub classes: Vec<Class>,
    /// Where each page is.
    pub memory: Manifest,
    /// The disks.
    pub disks: Vec<Disk>,
}

impl Snapshot {
    /// All packs that it refers to, once each.
    pub fn packs(&self) -> Vec<PackId> {
        let mut seen = HashSet::new();
        let manifests = std::iter::once(&self.memory).chain(self.disks.iter().map(|disk| &disk.data));
        manifests.flat_map(|manifest| &manifest.packs).copied().filter(|id| seen.insert(*id)).collect()
    }

    /// The packs that are in one store and may be lost.
    pub fn once(&self) -> HashSet<PackId> {
        let named: HashSet<&str> = self.about.once.iter().map(String::as_str).collect();
        self.packs().into_iter().filter(|PackId(id)| named.contains(crate::codec::hex(id).as_str())).collect()
    }

    /// The bytes of its file.
    ///
    /// # Errors
    /// zstd or JSON fails.
    pub fn encode(&self) -> std::io::Result<Vec<u8>> {
        let mut body = Vec::new();
        part(&mut body, &serde_json::to_vec(&self.about)?);
        part(&mut body, &self.skeleton.encode());
        part(&mut body, &self.classes.iter().map(|class| code(*class)).collect::<Vec<_>>());
        part(&mut body, &self.memory.encode()?);
        for disk in &self.disks {
            let mut runs = Vec::new();
            for run in &disk.runs {
                [run.first, run.blocks, run.data.into()].into_iter().for_each(|n| varint::write(&mut runs, n));
            }
            part(&mut body, &runs);
            part(&mut body, &disk.data.encode()?);
        }
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend([0; 4]);
        out.extend((body.len() as u64).to_le_bytes());
        out.extend(zstd::bulk::compress(&body, 3)?);
        out.extend(blake3::hash(&out).as_bytes());
        Ok(out)
    }

    /// The snapshot of this name in these bytes; `place` is for errors alone.
    ///
    /// # Errors
    /// `Corrupt` when they are none, not whole, or another snapshot; `Unsupported` when a newer vmar wrote them.
    pub fn decode(place: &str, name: &str, bytes: &[u8]) -> Result<Snapshot> {
        let broken = |what: &str| Error::new(ErrorKind::Corrupt, place, what).mend(MEND);
        let mut c = Cursor::new(bytes);
        if c.array() != Some(*MAGIC) {
            return Err(broken("it is no snapshot"));
        }
        match c.u32_le() {
            Some(VERSION) => {}
            version => {
                let cause = format!("has version {}, not {VERSION}", version.unwrap_or_default());
                return Err(
                    Error::new(ErrorKind::Unsupported, place, cause).mend("use the vmar that wrote it, or a newer one")
                );
            }
        }
        let end = bytes.len().checked_sub(CHECKSUM).filter(|end| *end >= HEADER);
        let (covered, checksum) = bytes.split_at(end.ok_or_else(|| broken("it is cut off"))?);
        if blake3::hash(covered).as_bytes() != checksum {
            return Err(broken("its checksum is wrong"));
        }
        let len = c.u32_le().and_then(|_| c.u64_le()).filter(|len| *len <= BODY_MAX);
        let body = len.and_then(|len| unpack(covered.get(HEADER..)?, len));
        let body = body.ok_or_else(|| broken("it cannot be unpacked"))?;
        let snapshot = parse(place, &body)?.ok_or_else(|| broken("it makes no sense"))?;
        if snapshot.about.name != name {
            let cause = format!("is the snapshot {:?}, not {name:?}: files were swapped", snapshot.about.name);
            return Err(Error::new(ErrorKind::Corrupt, place, cause).mend(MEND));
        }
        Ok(snapshot)
    }
}

/// Takes memory for what there is, not for what the header says.
fn unpack(packed: &[u8], len: u64) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    zstd::stream::read::Decoder::with_buffer(packed).ok()?.take(len + 1).read_to_end(&mut body).ok()?;
    (body.len() as u64 == len).then_some(body)
}

fn part(body: &mut Vec<u8>, bytes: &[u8]) {
    body.extend((bytes.len() as u64).to_le_bytes());
    body.extend(bytes);
}

/// A class as a byte: its place in [`Class::ALL`], which only ever grows at its end.
fn code(class: Class) -> u8 {
    Class::ALL.iter().position(|c| *c == class).and_then(|n| u8::try_from(n).ok()).unwrap_or(u8::MAX)
}

fn parse(place: &str, body: &[u8]) -> Result<Option<Snapshot>> {
    let mut c = Cursor::new(body);
    let mut next = || c.u64_le().and_then(|len| c.take(usize::try_from(len).ok()?));
    let parts = (next(), next(), next(), next());
    let (Some(about), Some(skeleton), Some(classes), Some(memory)) = parts else { return Ok(None) };
    let Ok(about) = serde_json::from_slice::<About>(about) else { return Ok(None) };
    let class = |byte: &u8| Class::ALL.get(usize::from(*byte)).copied();
    let Some(classes) = classes.iter().map(class).collect::<Option<Vec<_>>>() else { return Ok(None) };
    let memory = Manifest::decode(place.as_ref(), memory)?;
    let Some(skeleton) = Skeleton::decode(skeleton) else { return Ok(None) };
    let mut disks = Vec::new();
    for _ in &about.disks {
        let (Some(runs), Some(data)) = (next(), next()) else { return Ok(None) };
        let Some(runs) = parse_runs(runs) else { return Ok(None) };
        disks.push(Disk { runs, data: Manifest::decode(place.as_ref(), data)? });
    }
    let whole = c.position() == body.len();
    let snapshot = Snapshot { about, skeleton, classes, memory, disks };
    Ok((whole && snapshot.fits()).then_some(snapshot))
}

fn parse_runs(mut bytes: &[u8]) -> Option<Vec<Run>> {
    let mut runs = Vec::new();
    while !bytes.is_empty() {
        let mut number = || varint::read(&mut bytes);
        let (first, blocks, data) = (number()?, number()?, number()? != 0);
        runs.push(Run { first, blocks, data });
    }
    Some(runs)
}

impl Snapshot {
    /// The parts belong together: whoever uses them need not look at that again.
    fn fits(&self) -> bool {
        let same = |manifest: &Manifest| manifest.images == self.memory.images && manifest.packs == self.memory.packs;
        let disk_fits = |(disk, about): (&Disk, &AboutDisk)| {
            let mut end = 0;
            let mut data = 0;
            let ordered = disk.runs.iter().all(|run| {
                let after = run.first >= end;
                end = run.first.saturating_add(run.blocks);
                data = if run.data { run.blocks.saturating_add(data) } else { data };
                after
            });
            ordered && end <= crate::units::blocks_in(about.size) && data == disk.data.pages.len() as u64
        };
        self.classes.len() == self.memory.pages.len()
            && self.skeleton.fits(&self.memory.blocks)
            && self.memory.images.len() == self.about.images.len()
            && self.disks.iter().all(|disk| same(&disk.data))
            && self.disks.iter().zip(&self.about.disks).all(disk_fits)
    }

    /// Content digests of the images, in the order of the manifests.
    pub fn image_digests(&self) -> &[Digest] {
        &self.memory.images
    }

    /// Bytes of memory.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.blocks.iter().map(|block| block.len).sum()
    }

    /// Bytes of all that the disks' overlays held.
    pub fn disk_bytes(&self) -> u64 {
        self.disks.iter().map(|disk| to_usize(disk.data.pages.len() as u64) as u64 * 4096).sum()
    }
}
