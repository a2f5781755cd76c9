//! The qcow2 header, its extensions and the backing file name: bytes to values and back. Opens no file.

use super::BaseIdentity;
use super::layout::{CLUSTER, CLUSTER_BITS, Layout, index};
use crate::codec::Cursor;
use crate::error::{Error, ErrorKind, Result};
use crate::units::{IMAGE_SIZE_MAX, SECTOR_SIZE};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

const MAGIC: u32 = 0x5146_49fb;
const HEADER_LEN: u32 = 112;
const REFCOUNT_ORDER: u32 = 4;
/// Longest backing file name that QEMU takes.
const BACKING_MAX: usize = 1023;

const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;

/// QEMU's autoclear feature bit for persistent dirty bitmaps: those in the file are valid.
pub(super) const AUTOCLEAR_BITMAPS: u64 = 1;

/// Our autoclear feature bit: "the last one to open this file for writing was vmar". QEMU clears every autoclear bit
/// that it does not know when it opens the file for writing; 63 is as far from the bits that qcow2 hands out
/// (counted from 0) as can be.
pub(super) const AUTOCLEAR_VMAR_BIT: u8 = 63;
pub(super) const AUTOCLEAR_VMAR: u64 = 1 << AUTOCLEAR_VMAR_BIT;

const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_FEATURE_NAMES: u32 = 0x6803_f857;
/// "VMAR".
pub(super) const EXT_VMAR: u32 = 0x564d_4152;
/// Version of our extension.
const EXT_VERSION: u32 = 2;
const EXT_LEN: usize = 120;
/// What version 1 had of it.
const EXT_LEN_1: usize = 104;
/// Where session and boot ID, and the flush counter stand in our extension.
const EXT_SESSION_AT: usize = 72;
const EXT_FLUSHES_AT: usize = 112;
/// Where the byte of flags stands in our extension (the last one of its word), and the only flag.
const EXT_FLAGS_AT: usize = 7;
const FLAG_WRITE_THROUGH: u8 = 1;
/// Where size and autoclear bits stand in the header.
const SIZE_AT: usize = 24;
const EXT_CAPACITY_AT: usize = 104;
const AUTOCLEAR_AT: usize = 88;

/// Our header extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Extension {
    pub base: BaseIdentity,
    pub l2_start: u64,
    pub data_start: u64,
    pub session: Session,
    /// Bytes of disk that the metadata is laid out for.
    pub capacity: u64,
    /// Counts the flushes that changed something; never goes back while a session is open.
    pub flushes: u64,
}

/// The session part of the extension: all zeros when the overlay was stopped cleanly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Session {
    pub id: [u8; 16],
    /// The host's boot ID when the session was begun.
    pub boot: [u8; 16],
}

impl Session {
    pub const CLOSED: Session = Session { id: [0; 16], boot: [0; 16] };

    /// True if no process has the overlay open for writing, and none was killed while it had.
    pub fn is_closed(&self) -> bool {
        self.id == [0; 16]
    }
}

impl Extension {
    fn encode(&self) -> [u8; EXT_LEN] {
        let mut out = Vec::with_capacity(EXT_LEN);
        out.extend(EXT_VERSION.to_be_bytes());
        out.extend([0; 4]);
        out.extend(self.base.digest);
        for n in [self.base.generation, self.base.size, self.l2_start, self.data_start] {
            out.extend(n.to_be_bytes());
        }
        out.extend(self.session.id);
        out.extend(self.session.boot);
        out.extend(self.capacity.to_be_bytes());
        out.extend(self.flushes.to_be_bytes());
        let mut array = [0; EXT_LEN];
        array.copy_from_slice(&out);
        array
    }

    /// With `old_of`, the size of the disk, version 1 is taken too: it had no room to grow.
    fn parse(path: &Path, bytes: &[u8], old_of: Option<u64>) -> Result<Extension> {
        let mut c = Cursor::new(bytes);
        let version = c.u32_be().ok_or_else(|| short(path))?;
        let mut longer = bytes.to_vec();
        if let (1, Some(size)) = (version, old_of) {
            longer.truncate(EXT_LEN_1);
            longer.extend(size.to_be_bytes());
            longer.extend([0; 8]);
        } else if version != EXT_VERSION {
            let cause = format!("vmar overlay format {version}; this vmar knows format {EXT_VERSION}");
            let mend = match version {
                1 => format!("rewrite it with 'vmar overlay relayout {}'", path.display()),
                _ => "use the vmar that wrote it, or a newer one".to_string(),
            };
            return Err(Error::file(ErrorKind::Unsupported, path, cause).mend(mend));
        }
        if longer.len() != EXT_LEN {
            return Err(short(path));
        }
        let parse = |c: &mut Cursor| {
            c.take(4)?;
            Some(Extension {
                base: BaseIdentity { digest: c.array()?, generation: c.u64_be()?, size: c.u64_be()? },
                l2_start: c.u64_be()?,
                data_start: c.u64_be()?,
                session: Session { id: c.array()?, boot: c.array()? },
                capacity: c.u64_be()?,
                flushes: c.u64_be()?,
            })
        };
        let mut c = Cursor::new(&longer[4..]);
        parse(&mut c).ok_or_else(|| short(path))
    }
}

fn wrong(path: &Path, what: &str, found: u64) -> Error {
    Error::file(ErrorKind::Corrupt, path, format!("{what} is {found}, which vmar never writes"))
}

fn short(path: &Path) -> Error {
    Error::file(ErrorKind::Corrupt, path, "vmar's header extension has a wrong length")
}

/// A header that was checked: version, features and geometry are what vmar writes.
#[derive(Clone, Debug)]
pub(super) struct Header {
    pub size: u64,
    pub backing: PathBuf,
    pub refcount_table: u64,
    pub refcount_table_clusters: u32,
    pub l1: u64,
    pub l1_entries: u32,
    pub autoclear: u64,
    pub extension: Extension,
    /// Where the payload of our extension starts.
    extension_at: usize,
    /// All of it as it is on disk, extensions and backing file name included, up to a sector border.
    bytes: Vec<u8>,
}

/// The bytes of a new header.
pub(super) fn encode(path: &Path, layout: &Layout, backing: &Path, extension: &Extension) -> Result<Vec<u8>> {
    let backing = backing.as_os_str().as_bytes();
    if backing.len() > BACKING_MAX {
        return Err(Error::file(
            ErrorKind::Unsupported,
            path,
            format!("the path of its base image has {} bytes, qcow2 takes {BACKING_MAX}", backing.len()),
        )
        .mend("move the image to a shorter path"));
    }
    // Ours comes before the feature names, so that session and autoclear bit share the first sector.
    let mut extensions = Vec::new();
    add_extension(&mut extensions, EXT_BACKING_FORMAT, b"raw");
    add_extension(&mut extensions, EXT_VMAR, &extension.encode());
    add_extension(&mut extensions, EXT_FEATURE_NAMES, &feature_names());
    add_extension(&mut extensions, EXT_END, b"");
    let backing_at = u64::from(HEADER_LEN) + extensions.len() as u64;

    let mut out = Vec::with_capacity(1024);
    out.extend(MAGIC.to_be_bytes());
    out.extend(3u32.to_be_bytes());
    out.extend(backing_at.to_be_bytes());
    out.extend((backing.len() as u64).to_be_bytes()[4..].iter());
    out.extend(CLUSTER_BITS.to_be_bytes());
    out.extend(layout.size.to_be_bytes());
    out.extend(0u32.to_be_bytes()); // no encryption
    out.extend(layout.l2_tables.to_be_bytes()[4..].iter());
    out.extend(layout.l1.to_be_bytes());
    out.extend(layout.refcount_table.to_be_bytes());
    out.extend(layout.refcount_table_clusters.to_be_bytes()[4..].iter());
    out.extend(0u32.to_be_bytes()); // no snapshots
    out.extend(0u64.to_be_bytes());
    out.extend(INCOMPATIBLE_EXTENDED_L2.to_be_bytes());
    out.extend(0u64.to_be_bytes()); // compatible
    out.extend(0u64.to_be_bytes()); // autoclear: set when a session is opened
    out.extend(REFCOUNT_ORDER.to_be_bytes());
    out.extend(HEADER_LEN.to_be_bytes());
    out.extend([0; 8]); // compression type zlib, padding
    debug_assert_eq!(out.len(), HEADER_LEN as usize);
    out.extend(extensions);
    out.extend(backing);
    Ok(out)
}

fn add_extension(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    out.extend(kind.to_be_bytes());
    out.extend((data.len() as u64).to_be_bytes()[4..].iter());
    out.extend(data);
    out.resize(out.len().next_multiple_of(8), 0);
}

/// Names for what an older QEMU does not know: it prints them when it refuses.
fn feature_names() -> Vec<u8> {
    let mut out = Vec::new();
    for (kind, bit, name) in [(0u8, 4u8, "extended L2 entries"), (2, AUTOCLEAR_VMAR_BIT, "vmar session")] {
        let mut entry = [0u8; 48];
        entry[0] = kind;
        entry[1] = bit;
        entry[2..2 + name.len()].copy_from_slice(name.as_bytes());
        out.extend(entry);
    }
    out
}

impl Header {
    /// Parses and checks the first cluster of a file (`bytes` may be shorter for a shorter file).
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Header> {
        Header::parse_versions(path, bytes, false)
    }

    /// The same, for rewriting a file: one with version 1 of our extension is taken as if its capacity were its size. Such a
    /// header must not be written back.
    pub fn parse_also_old(path: &Path, bytes: &[u8]) -> Result<Header> {
        Header::parse_versions(path, bytes, true)
    }

    fn parse_versions(path: &Path, bytes: &[u8], also_old: bool) -> Result<Header> {
        let bytes = bytes.get(..index(CLUSTER)).unwrap_or(bytes);
        let fields = Fields::read(bytes).ok_or_else(|| {
            if bytes.get(..4) == Some(&MAGIC.to_be_bytes()) {
                Error::file(ErrorKind::Corrupt, path, "the qcow2 header is cut off")
            } else {
                no_overlay(path, "is no qcow2 file")
            }
        })?;
        fields.check(path)?;
        let (found, end) = walk_extensions(path, bytes, &fields)?;
        let Some((extension_at, extension_len)) = found else {
            return Err(no_overlay(path, "is a qcow2 file, but vmar did not make it (no vmar header extension)"));
        };
        let payload = bytes.get(extension_at..extension_at + extension_len).ok_or_else(|| short(path))?;
        let extension = Extension::parse(path, payload, also_old.then_some(fields.size))?;
        fields.check_geometry(path)?;
        let capacity = extension.capacity;
        if capacity == 0 || !capacity.is_multiple_of(SECTOR_SIZE) || capacity > IMAGE_SIZE_MAX {
            return Err(wrong(path, "the capacity in vmar's extension", capacity));
        }

        let (name_at, name_len) = (index(fields.backing_at), fields.backing_len as usize);
        let name = name_at.checked_add(name_len).and_then(|end| bytes.get(name_at..end));
        let name = name.filter(|n| name_at != 0 && !n.is_empty() && n.len() <= BACKING_MAX).ok_or_else(|| {
            Error::file(ErrorKind::Unsupported, path, "has no backing file, so it is no overlay any more")
        })?;
        let end = end.max(name_at + name_len).next_multiple_of(index(SECTOR_SIZE));
        let mut whole = bytes[..end.min(bytes.len())].to_vec();
        whole.resize(end, 0);
        Ok(Header {
            size: fields.size,
            backing: PathBuf::from(OsStr::from_bytes(name)),
            refcount_table: fields.refcount_table,
            refcount_table_clusters: fields.refcount_table_clusters,
            l1: fields.l1,
            l1_entries: fields.l1_entries,
            autoclear: fields.autoclear,
            extension,
            extension_at,
            bytes: whole,
        })
    }

    /// Another capacity for what is written next.
    pub fn set_capacity(&mut self, capacity: u64) {
        self.extension.capacity = capacity;
        let at = self.extension_at + EXT_CAPACITY_AT;
        self.bytes[at..at + 8].copy_from_slice(&capacity.to_be_bytes());
    }

    /// True if nobody but vmar has opened the file for writing since the session was opened.
    pub fn untouched(&self) -> bool {
        self.autoclear & AUTOCLEAR_VMAR != 0
    }

    /// True if some other writer has left autoclear bits of its own.
    pub fn has_foreign_autoclear(&self) -> bool {
        self.autoclear & !AUTOCLEAR_VMAR != 0
    }

    /// The bytes to write at offset 0 for another session. Nothing but the session and the autoclear bits changes, and
    /// nothing moves: whichever sectors of this write reach the disk before a power cut, the header can be parsed.
    /// Bits that are not ours are cleared, as the qcow2 specification asks of a writer that does not maintain what
    /// they stand for (bit 0: dirty bitmaps).
    pub fn with_session(&mut self, session: Session) -> &[u8] {
        self.extension.session = session;
        self.autoclear = if session.is_closed() { 0 } else { AUTOCLEAR_VMAR };
        self.bytes[AUTOCLEAR_AT..AUTOCLEAR_AT + 8].copy_from_slice(&self.autoclear.to_be_bytes());
        let at = self.extension_at + EXT_SESSION_AT;
        self.bytes[at..at + 16].copy_from_slice(&session.id);
        self.bytes[at + 16..at + 32].copy_from_slice(&session.boot);
        &self.bytes
    }

    /// True if the guest had the write cache switched off when the overlay was closed. It is not told again that it should,
    /// neither by a guest that goes on here nor by one that was migrated here.
    pub fn write_through(&self) -> bool {
        self.bytes[self.extension_at + EXT_FLAGS_AT] & FLAG_WRITE_THROUGH != 0
    }

    /// Remembers that for the next write of the header.
    pub fn set_write_through(&mut self, on: bool) {
        self.bytes[self.extension_at + EXT_FLAGS_AT] = if on { FLAG_WRITE_THROUGH } else { 0 };
    }

    /// The bytes of another virtual size, and where they go: one aligned word, which no power cut tears.
    pub fn with_size(&mut self, size: u64) -> ([u8; 8], u64) {
        self.size = size;
        self.patch(SIZE_AT, size)
    }

    /// The bytes of another flush counter, and where they go: one aligned word, which no power cut tears.
    pub fn with_flushes(&mut self, flushes: u64) -> ([u8; 8], u64) {
        self.extension.flushes = flushes;
        self.patch(self.extension_at + EXT_FLUSHES_AT, flushes)
    }

    /// Where the flush counter is in the file.
    pub fn flushes_at(&self) -> u64 {
        (self.extension_at + EXT_FLUSHES_AT) as u64
    }

    fn patch(&mut self, at: usize, value: u64) -> ([u8; 8], u64) {
        let word = value.to_be_bytes();
        self.bytes[at..at + 8].copy_from_slice(&word);
        (word, at as u64)
    }
}

fn no_overlay(path: &Path, what: &str) -> Error {
    Error::file(ErrorKind::Unsupported, path, what).mend("make an overlay with 'vmar overlay create'")
}

/// The fixed part of a version 3 header.
struct Fields {
    version: u32,
    backing_at: u64,
    backing_len: u32,
    cluster_bits: u32,
    size: u64,
    crypt: u32,
    l1_entries: u32,
    l1: u64,
    refcount_table: u64,
    refcount_table_clusters: u32,
    snapshots: u32,
    snapshots_at: u64,
    incompatible: u64,
    autoclear: u64,
    refcount_order: u32,
    header_len: u32,
    compression: u8,
}

impl Fields {
    fn read(bytes: &[u8]) -> Option<Fields> {
        let mut c = Cursor::new(bytes);
        if c.u32_be()? != MAGIC {
            return None;
        }
        let mut fields = Fields {
            version: c.u32_be()?,
            backing_at: c.u64_be()?,
            backing_len: c.u32_be()?,
            cluster_bits: c.u32_be()?,
            size: c.u64_be()?,
            crypt: c.u32_be()?,
            l1_entries: c.u32_be()?,
            l1: c.u64_be()?,
            refcount_table: c.u64_be()?,
            refcount_table_clusters: c.u32_be()?,
            snapshots: c.u32_be()?,
            snapshots_at: c.u64_be()?,
            incompatible: 0,
            autoclear: 0,
            refcount_order: REFCOUNT_ORDER,
            header_len: 72,
            compression: 0,
        };
        if fields.version == 3 {
            fields.incompatible = c.u64_be()?;
            c.take(8)?;
            fields.autoclear = c.u64_be()?;
            fields.refcount_order = c.u32_be()?;
            fields.header_len = c.u32_be()?;
            if fields.header_len > 104 {
                fields.compression = c.array::<1>()?[0];
            }
        }
        Some(fields)
    }

    /// Version and features: the reasons for which no qcow2 file of whatever maker can be served.
    fn check(&self, path: &Path) -> Result<()> {
        let refuse = |cause: String| Err(Error::file(ErrorKind::Unsupported, path, cause));
        if self.version != 3 {
            return refuse(format!("qcow2 version {}; overlays of vmar are version 3", self.version));
        }
        let bits = self.incompatible;
        if bits & INCOMPATIBLE_CORRUPT != 0 {
            return Err(Error::file(ErrorKind::Corrupt, path, "QEMU marked it corrupt")
                .mend(format!("look at it with 'qemu-img check {}'", path.display())));
        }
        if bits & INCOMPATIBLE_DIRTY != 0 {
            return Err(Error::file(ErrorKind::Unsupported, path, "QEMU marked it dirty and did not close it")
                .mend(format!("run 'qemu-img check -r all {}'", path.display())));
        }
        if bits & INCOMPATIBLE_DATA_FILE != 0 {
            return refuse("keeps its data in an external data file".into());
        }
        let unknown = bits & !(INCOMPATIBLE_EXTENDED_L2 | INCOMPATIBLE_COMPRESSION);
        if unknown != 0 {
            return refuse(format!("has unknown incompatible features ({unknown:#x})"));
        }
        if bits & INCOMPATIBLE_COMPRESSION != 0 || self.compression != 0 {
            return refuse(format!("uses compression type {}; overlays of vmar are not compressed", self.compression));
        }
        if self.crypt != 0 {
            return refuse("is encrypted".into());
        }
        if self.snapshots != 0 {
            return Err(Error::file(
                ErrorKind::Unsupported,
                path,
                format!("has {} internal snapshot(s), whose clusters vmar would overwrite", self.snapshots),
            )
            .mend("delete them with 'qemu-img snapshot -d'"));
        }
        if !self.snapshots_at.is_multiple_of(CLUSTER) || i64::try_from(self.snapshots_at).is_err() {
            // QEMU looks at it also if there are none, and keeps offsets in 63 bits.
            return Err(Error::file(ErrorKind::Corrupt, path, "the offset of its snapshot table is no cluster's"));
        }
        Ok(())
    }

    /// What vmar chose at creation and nobody changes afterwards.
    fn check_geometry(&self, path: &Path) -> Result<()> {
        let wrong = |what: &str, found: u64| Err(wrong(path, what, found));
        if self.incompatible & INCOMPATIBLE_EXTENDED_L2 == 0 {
            return wrong("the feature bit of extended L2 entries", 0);
        }
        if self.cluster_bits != CLUSTER_BITS {
            return wrong("the number of cluster bits", self.cluster_bits.into());
        }
        if self.refcount_order != REFCOUNT_ORDER {
            return wrong("the refcount order", self.refcount_order.into());
        }
        if self.size == 0 || !self.size.is_multiple_of(SECTOR_SIZE) || self.size > IMAGE_SIZE_MAX {
            return wrong("the size of the disk", self.size);
        }
        Ok(())
    }
}

/// Finds our extension (offset and length of its payload) and where the extensions end.
fn walk_extensions(path: &Path, bytes: &[u8], fields: &Fields) -> Result<(Option<(usize, usize)>, usize)> {
    let broken = || Error::file(ErrorKind::Corrupt, path, "the qcow2 header extensions are damaged");
    let mut at = fields.header_len as usize;
    if at < 104 || !at.is_multiple_of(8) {
        return Err(Error::file(ErrorKind::Corrupt, path, format!("a qcow2 header of {at} bytes cannot be")));
    }
    // The backing file name ends the extensions even if no end marker comes before it.
    let limit = match index(fields.backing_at) {
        0 => bytes.len(),
        n if n < at || n > bytes.len() => return Err(broken()),
        n => n,
    };
    let mut ours = None;
    while at < limit {
        let mut c = Cursor::new(bytes.get(at..limit).ok_or_else(broken)?);
        let (Some(kind), Some(len)) = (c.u32_be(), c.u32_be()) else { return Err(broken()) };
        if kind == EXT_END {
            // QEMU does not open a file whose end marker has a length.
            if len != 0 {
                return Err(broken());
            }
            return Ok((ours, at + 8));
        }
        let len = len as usize;
        let data = c.take(len).ok_or_else(broken)?;
        match kind {
            EXT_BACKING_FORMAT if data != b"raw" => {
                let format = String::from_utf8_lossy(data).into_owned();
                let cause = format!("its backing file has the format '{format}'; vmar serves overlays of raw images");
                return Err(Error::file(ErrorKind::Unsupported, path, cause));
            }
            EXT_VMAR if ours.is_some() => return Err(broken()),
            EXT_VMAR => ours = Some((at + 8, len)),
            _ => {}
        }
        at += 8 + len.next_multiple_of(8);
    }
    Ok((ours, at.min(limit)))
}
