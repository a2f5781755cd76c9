//! `library.json`: what a library is and which images it has.

use super::name::check_stored_name;
use crate::codec::{hex, unhex};
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Algorithm;
use crate::image::Format;
use crate::units::{BLOCK_SIZE, IMAGE_SIZE_MAX, ImageId, SECTOR_SIZE, blocks_in};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::io::Read;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

/// What the file says it is.
const FORMAT: &str = "vmar-library";
/// The version that this code writes. It reads those below too: version 2 added the policy `bridge`, version 3 the content
/// indexes, without which an image cannot be added, so an older vmar must not go on with it.
const VERSION: u32 = 3;

/// Which copy of a content is read: the policy that chooses the targets of block maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Policy {
    /// The lowest block of the lowest image ID, inside one image too (paper, section 3.1).
    Paper,
    /// The same, but for runs that would be short: fewer descendant reads for a little less sharing.
    Bridge(Runs),
    /// The image that recorded boots have read most, then the lowest ID; runs as with `bridge` (paper, section 6: future
    /// work).
    MostUsed(Runs),
    /// The image whose shared blocks lie in the longest runs, then the lowest ID; runs as with `bridge` (paper, section 6:
    /// future work).
    LeastFragmented(Runs),
}

/// Knobs of the policies that look at the length of runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Runs {
    /// A run into another image is read on through a break of at most so many blocks, if that image holds them too.
    pub bridge: u32,
    /// Runs of fewer blocks than this stay in the image itself.
    pub min_run: u32,
}

impl Runs {
    /// Bridge 8, min-run 8: measured on recorded boots (`docs/performance.md`).
    pub const DEFAULT: Runs = Runs { bridge: 8, min_run: 8 };
}

impl Policy {
    /// With the runs of [`Runs::DEFAULT`].
    pub const BRIDGE: Policy = Policy::Bridge(Runs::DEFAULT);

    /// What a new library gets.
    pub const DEFAULT: Policy = Policy::BRIDGE;

    /// All of them.
    pub const ALL: [Policy; 4] =
        [Policy::Paper, Policy::BRIDGE, Policy::MostUsed(Runs::DEFAULT), Policy::LeastFragmented(Runs::DEFAULT)];

    /// Most blocks that a bridge may span: finding one looks at so many blocks for each break.
    pub const BRIDGE_MAX: u32 = 4096;

    /// The number that stands for the policy in a block map; its knobs are in the catalog.
    pub fn code(self) -> u32 {
        match self {
            Policy::Paper => 1,
            Policy::Bridge(_) => 2,
            Policy::MostUsed(_) => 3,
            Policy::LeastFragmented(_) => 4,
        }
    }

    /// The name of the policy whose number a block map has; `None` for a number of a newer vmar.
    pub fn name_of(code: u32) -> Option<&'static str> {
        Policy::ALL.into_iter().find(|p| p.code() == code).map(Policy::name)
    }

    /// Its knobs; `None` if it leaves runs alone.
    pub fn runs(self) -> Option<Runs> {
        match self {
            Policy::Paper => None,
            Policy::Bridge(runs) | Policy::MostUsed(runs) | Policy::LeastFragmented(runs) => Some(runs),
        }
    }

    /// Its name, without its knobs.
    pub fn name(self) -> &'static str {
        match self {
            Policy::Paper => "paper",
            Policy::Bridge(_) => "bridge",
            Policy::MostUsed(_) => "most-used",
            Policy::LeastFragmented(_) => "least-fragmented",
        }
    }

    /// This policy with other knobs; `None` leaves one as it is.
    ///
    /// # Errors
    /// `Usage` when the policy has no such knob, or the value is out of range.
    pub fn with_knobs(mut self, new_bridge: Option<u32>, new_min_run: Option<u32>) -> Result<Policy> {
        let runs = match &mut self {
            Policy::Paper if new_bridge.is_some() || new_min_run.is_some() => {
                return Err(Error::new(ErrorKind::Usage, "policy paper", "has no --bridge and no --min-run")
                    .mend("give them with --policy bridge"));
            }
            Policy::Paper => return Ok(self),
            Policy::Bridge(runs) | Policy::MostUsed(runs) | Policy::LeastFragmented(runs) => runs,
        };
        runs.bridge = new_bridge.unwrap_or(runs.bridge);
        runs.min_run = new_min_run.unwrap_or(runs.min_run);
        if runs.bridge > Policy::BRIDGE_MAX {
            return Err(Error::new(ErrorKind::Usage, format!("--bridge {}", runs.bridge), "is too long a bridge")
                .mend(format!("give at most {} blocks", Policy::BRIDGE_MAX)));
        }
        Ok(self)
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self.runs() {
            None => Ok(()),
            Some(Runs { bridge, min_run }) if *self == Policy::Bridge(Runs { bridge, min_run }) => {
                write!(f, " {bridge}, min-run {min_run}")
            }
            Some(Runs { bridge, min_run }) => write!(f, ", bridge {bridge}, min-run {min_run}"),
        }
    }
}

impl FromStr for Policy {
    type Err = Error;
    fn from_str(text: &str) -> Result<Policy> {
        Policy::ALL.into_iter().find(|p| p.name() == text).ok_or_else(|| {
            Error::new(ErrorKind::Usage, format!("policy {text:?}"), "unknown")
                .mend("the policies: paper, bridge, most-used, least-fragmented")
        })
    }
}

/// The whole catalog.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalog {
    format: String,
    version: u32,
    /// CRC-32C of the catalog's text with this field 0; absent before version 3.
    #[serde(default)]
    crc32c: u32,
    /// Counts the changes; a reader sees by it that something was changed.
    #[serde(default)]
    sequence: u64,
    /// Says which library this is, however often it is copied or moved: 32 hexadecimal digits.
    pub uuid: String,
    /// The canonical copy of a content.
    pub policy: Policy,
    /// How blocks are fingerprinted.
    pub fingerprint: Algorithm,
    /// The sharing domain of images that are added: blocks are only shared inside one.
    pub domain: String,
    /// The ID of the next image. IDs are never reused.
    pub next_id: u32,
    /// Numbers the files of content indexes; never reused either.
    #[serde(default)]
    pub next_file: u64,
    /// The content index of each sharing domain that has images.
    #[serde(default)]
    pub index: BTreeMap<String, IndexRef>,
    /// Which images the policies `most-used` and `least-fragmented` prefer, by ID: blocks that recorded boots have read, or the
    /// mean length of runs. An image that came later has none until the next remap.
    #[serde(default)]
    pub preference: BTreeMap<u32, u64>,
    /// Files of images that were removed, and that somebody may still read.
    #[serde(default)]
    pub removed: Vec<Removed>,
    /// In order of ID.
    pub images: Vec<ImageRecord>,
}

/// One image.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageRecord {
    /// Its number: the lower it is, the more images read from this one.
    #[serde(with = "id_as_number")]
    pub id: ImageId,
    /// Its name in this library.
    pub name: String,
    /// Counts up from 1 when the image is replaced by an update.
    pub generation: u64,
    /// Raw file: absolute, or relative to the library if vmar made it. See [`super::Library::image_path`].
    pub path: PathBuf,
    /// What it was converted from; `None` for a raw file used in place.
    pub source: Option<Source>,
    /// Bytes of the raw file, a multiple of 512.
    pub size: u64,
    /// Modification time of the raw file: a cheap hint that it changed.
    pub mtime_ns: i64,
    /// Digest of the content, see [`crate::fingerprint::digest`].
    #[serde(with = "digest_as_hex")]
    pub digest: [u8; 32],
    /// Sharing domain.
    pub domain: String,
    /// 4 KiB blocks, a partial last one included.
    pub blocks: u64,
    /// Of these, how many are not all zero.
    pub nonzero_blocks: u64,
    /// How the blocks were fingerprinted.
    pub fingerprint: Algorithm,
    /// The fingerprints.
    pub run: FileRef,
    /// The chunks of the content digest; images that an older vmar added have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunks: Option<FileRef>,
}

impl ImageRecord {
    /// True if vmar made the raw file (and may remove it with the image).
    pub fn owned(&self) -> bool {
        self.source.is_some()
    }

    /// Bytes of block `block`: 4096, or fewer for a partial last one; 0 past the end.
    pub fn block_len(&self, block: u32) -> u64 {
        self.size.saturating_sub(u64::from(block) * BLOCK_SIZE).min(BLOCK_SIZE)
    }
}

/// The file that an image was converted from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// Its format.
    pub format: Format,
    /// Where it was. vmar does not need it any more.
    pub path: PathBuf,
}

/// The content index of a sharing domain, see [`crate::index`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IndexRef {
    /// The image sets, relative to the library.
    pub sets: PathBuf,
    /// The number in that file's header.
    pub sets_id: u64,
    /// The tables, the newest first.
    pub tables: Vec<TableRef>,
}

/// A table of a content index.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableRef {
    /// Relative to the library.
    pub file: PathBuf,
    /// The number in its header.
    pub id: u64,
    /// Its rows.
    pub rows: u64,
}

/// A raw file that vmar made for an image that is gone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Removed {
    /// The image's number.
    #[serde(with = "id_as_number")]
    pub id: ImageId,
    /// The image's generation.
    pub generation: u64,
    /// The image's name.
    pub name: String,
    /// Relative to the library.
    pub path: PathBuf,
}

/// Names a file of the library and proves that it is whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRef {
    /// Relative to the library.
    pub file: PathBuf,
    /// Size of the file.
    pub bytes: u64,
    /// CRC-32C of the file.
    pub crc32c: u32,
}

/// What every version of the catalog has.
#[derive(Deserialize)]
struct Header {
    format: String,
    version: u32,
}

impl Catalog {
    /// The catalog of a new library.
    pub(super) fn new(policy: Policy, fingerprint: Algorithm) -> std::io::Result<Catalog> {
        let mut uuid = [0u8; 16];
        std::fs::File::open("/dev/urandom")?.read_exact(&mut uuid)?;
        Ok(Catalog {
            format: FORMAT.to_string(),
            version: VERSION,
            crc32c: 0,
            sequence: 0,
            uuid: hex(&uuid),
            policy,
            fingerprint,
            domain: "default".to_string(),
            next_id: 0,
            next_file: 0,
            index: BTreeMap::new(),
            preference: BTreeMap::new(),
            removed: Vec::new(),
            images: Vec::new(),
        })
    }

    /// Reads and checks the catalog in `path`.
    pub(super) fn load(path: &Path) -> Result<Catalog> {
        let text = std::fs::read(path).map_err(|e| match e.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
                let dir = path.parent().unwrap_or(path);
                Error::file(ErrorKind::NotFound, dir, "no vmar library here")
                    .mend(format!("make one with 'vmar library init {}'", dir.display()))
            }
            _ => Error::io(path, "read the catalog", e),
        })?;
        let corrupt = |cause: String| Error::file(ErrorKind::Corrupt, path, cause).mend("restore it from a backup");
        let header: Header = serde_json::from_slice(&text).map_err(|e| corrupt(format!("not a catalog: {e}")))?;
        if header.format != FORMAT {
            return Err(corrupt(format!("its format is {:?} and not {FORMAT:?}", header.format)));
        }
        if header.version > VERSION {
            let cause = format!("written in library format {}, this vmar knows up to {VERSION}", header.version);
            return Err(Error::file(ErrorKind::Unsupported, path, cause).mend("use a newer vmar"));
        }
        let catalog: Catalog = serde_json::from_slice(&text).map_err(|e| corrupt(e.to_string()))?;
        catalog.check().map_err(corrupt)?;
        let crc = catalog.checksum().map_err(|e| corrupt(e.to_string()))?;
        if catalog.version >= 3 && crc != catalog.crc32c {
            return Err(corrupt("its checksum is wrong: it is damaged, or was changed by hand".to_string()));
        }
        Ok(catalog)
    }

    /// Counts the changes.
    pub fn sequence(&self) -> u64 {
        self.sequence
    }

    /// The UUID as bytes.
    pub fn uuid_bytes(&self) -> [u8; 16] {
        unhex(&self.uuid).unwrap_or_default()
    }

    /// One more change.
    pub(super) fn changed(&mut self) {
        self.version = VERSION;
        self.sequence += 1;
    }

    /// The text of the catalog file.
    pub(super) fn to_json(&self) -> serde_json::Result<Vec<u8>> {
        let mut stamped = self.clone();
        stamped.crc32c = self.checksum()?;
        let mut text = serde_json::to_vec_pretty(&stamped)?;
        text.push(b'\n');
        Ok(text)
    }

    /// Of the values, not of the text: who only lays it out anew has changed nothing.
    fn checksum(&self) -> serde_json::Result<u32> {
        let mut plain = self.clone();
        plain.crc32c = 0;
        serde_json::to_vec(&plain).map(|text| crc32c::crc32c(&text))
    }

    /// Everything that other code takes for granted.
    pub(super) fn check(&self) -> Result<(), String> {
        if unhex::<16>(&self.uuid).is_none() {
            return Err(format!("uuid {:?} is not 32 hexadecimal digits", self.uuid));
        }
        self.policy.with_knobs(None, None).map_err(|e| e.to_string())?;
        for (domain, index) in &self.index {
            let files = index.tables.iter().map(|t| (&t.file, t.id)).chain([(&index.sets, index.sets_id)]);
            if !files.into_iter().all(|(file, id)| is_inside(file) && id < self.next_file) {
                return Err(format!("the index of domain {domain:?} names a file that is none of this library's"));
            }
        }
        if !self.removed.iter().all(|r| is_inside(&r.path)) {
            return Err("a removed image's path leads out of the library".to_string());
        }
        let mut names = HashSet::new();
        let mut lowest_free = 0;
        for record in &self.images {
            let name = &record.name;
            record.check().map_err(|what| format!("image {name:?}: {what}"))?;
            if record.id.0 < lowest_free || record.id.0 >= self.next_id {
                return Err(format!("image {name:?}: ID {} is out of order", record.id));
            }
            lowest_free = record.id.0 + 1;
            if !names.insert(name) {
                return Err(format!("two images are called {name:?}"));
            }
        }
        Ok(())
    }
}

impl ImageRecord {
    fn check(&self) -> Result<(), String> {
        check_stored_name(&self.name).map_err(|e| e.to_string())?;
        if self.size == 0 || !self.size.is_multiple_of(SECTOR_SIZE) || self.size > IMAGE_SIZE_MAX {
            return Err(format!("impossible size {}", self.size));
        }
        if self.blocks != blocks_in(self.size) || self.nonzero_blocks > self.blocks {
            return Err(format!("{} blocks, {} non-zero, do not fit the size", self.blocks, self.nonzero_blocks));
        }
        let path_is_good = if self.owned() { is_inside(&self.path) } else { self.path.is_absolute() };
        let files_are_good = [Some(&self.run), self.chunks.as_ref()].into_iter().flatten().all(|f| is_inside(&f.file));
        if !path_is_good || !files_are_good {
            return Err("a path leads out of the library".to_string());
        }
        Ok(())
    }
}

/// A relative path that stays below where it starts.
fn is_inside(path: &Path) -> bool {
    path.components().all(|c| matches!(c, Component::Normal(_))) && path.file_name().is_some()
}

/// [`ImageId`] as a plain number.
mod id_as_number {
    use crate::units::ImageId;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(id: &ImageId, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_u32(id.0)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<ImageId, D::Error> {
        u32::deserialize(d).map(ImageId)
    }
}

/// A digest as 64 hexadecimal digits.
mod digest_as_hex {
    use crate::codec::{hex, unhex};
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(digest: &[u8; 32], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&hex(digest))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<[u8; 32], D::Error> {
        let text = String::deserialize(d)?;
        unhex(&text).ok_or_else(|| de::Error::custom("a digest is 64 hexadecimal digits"))
    }
}
