//! The fixed parts of the file: header, section table, target records. `FORMAT.md` specifies them.

use super::entry::ENTRY_BYTES;
use super::index::{SECTION_BITS_MAX, SECTION_BYTES, section_count};
use super::{MapError, MapErrorKind, Target, Totals, bloom};
use crate::codec::Cursor;
use crate::units::{IMAGE_SIZE_MAX, ImageId, SECTOR_SIZE};
use std::ops::Range;

/// Version of the format that this vmar writes, and the newest that it reads.
pub const VERSION: u32 = 1;

pub(super) const MAGIC: [u8; 8] = *b"vmar-map";
pub(super) const HEADER_BYTES: usize = 256;
const HEADER_LEN: u32 = 256;
pub(super) const TARGET_BYTES: usize = 64;

/// Every part starts at a multiple of a cache line and is padded with zeros to one.
pub(super) const ALIGN: usize = 64;

/// Names of the parts in file order, for messages.
pub(super) const PART_NAMES: [&str; 4] = ["targets", "entries", "section index", "Bloom filter"];
pub(super) const TARGETS: usize = 0;
pub(super) const ENTRIES: usize = 1;
pub(super) const INDEX: usize = 2;
pub(super) const BLOOM: usize = 3;

/// Where a part lies, padding included, and the CRC-32C of its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) crc: u32,
}

/// The header, decoded. Everything a lookup needs of it is in memory once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) policy: u32,
    pub(super) source: Target,
    pub(super) totals: Totals,
    pub(super) target_count: u32,
    pub(super) section_bits: u32,
    pub(super) section_count: u32,
    pub(super) bloom: bloom::Shape,
    pub(super) parts: [Part; 4],
}

impl Header {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER_BYTES);
        let u32s = |out: &mut Vec<u8>, values: &[u32]| values.iter().for_each(|v| out.extend(v.to_le_bytes()));
        let u64s = |out: &mut Vec<u8>, values: &[u64]| values.iter().for_each(|v| out.extend(v.to_le_bytes()));
        let t = &self.totals;
        out.extend(MAGIC);
        u32s(&mut out, &[VERSION, HEADER_LEN]);
        u64s(&mut out, &[t.map_bytes]);
        u32s(&mut out, &[self.policy, 0]);
        out.extend(encode_identity(&self.source));
        let zero_blocks = t.blocks - t.nonzero_blocks;
        u64s(&mut out, &[t.blocks, t.nonzero_blocks, zero_blocks, t.redirected_blocks, t.self_redirected_blocks]);
        u64s(&mut out, &[t.entries]);
        u32s(&mut out, &[self.target_count, self.section_bits, self.section_count]);
        u32s(&mut out, &[self.bloom.group_bits, self.bloom.keys, self.bloom.lines, self.bloom.hashes]);
        for part in &self.parts {
            u64s(&mut out, &[part.offset, part.len]);
            u32s(&mut out, &[part.crc]);
        }
        out.resize(HEADER_BYTES - 4, 0);
        let crc = crc32c::crc32c(&out);
        u32s(&mut out, &[crc]);
        out
    }

    /// Reads the header of a whole file. What it returns fits the length of the file, the checksum of the header and
    /// itself; the checksums of the parts and their content are not looked at yet.
    pub(super) fn decode(file: &[u8]) -> Result<Header, MapError> {
        let mut c = Cursor::new(check_envelope(file)?);
        let (header, zero_blocks, reserved) =
            Header::fields(&mut c).ok_or_else(|| MapError::broken("the header is too short"))?;
        let rest = c.take(HEADER_BYTES - 4 - c.position()).unwrap_or_default();
        if reserved != 0 || rest.iter().any(|&b| b != 0) {
            return Err(MapError::broken("reserved bytes of the header are not zero"));
        }
        if header.totals.map_bytes != file.len() as u64 {
            return Err(MapError::new(
                MapErrorKind::Length,
                format!("{} bytes long, but its header says {}", file.len(), header.totals.map_bytes),
            ));
        }
        check_identity(&header.source)?;
        header.check_shape(zero_blocks)?;
        Ok(header)
    }

    /// The fields in file order, with the number of zero blocks and all reserved bits; `None` past the end.
    fn fields(c: &mut Cursor<'_>) -> Option<(Header, u64, u32)> {
        c.take(MAGIC.len() + 8)?; // magic, version, header_len: checked by check_envelope
        let map_bytes = c.u64_le()?;
        let policy = c.u32_le()?;
        let flags = c.u32_le()?;
        let (source, reserved) = decode_identity(c)?;
        let [blocks, nonzero_blocks, zero_blocks] = [c.u64_le()?, c.u64_le()?, c.u64_le()?];
        let [redirected_blocks, self_redirected_blocks, entries] = [c.u64_le()?, c.u64_le()?, c.u64_le()?];
        let [target_count, section_bits, section_count] = [c.u32_le()?, c.u32_le()?, c.u32_le()?];
        let bloom =
            bloom::Shape { group_bits: c.u32_le()?, keys: c.u32_le()?, lines: c.u32_le()?, hashes: c.u32_le()? };
        let mut parts = [Part::default(); 4];
        for part in &mut parts {
            *part = Part { offset: c.u64_le()?, len: c.u64_le()?, crc: c.u32_le()? };
        }
        let totals = Totals { blocks, nonzero_blocks, redirected_blocks, self_redirected_blocks, entries, map_bytes };
        let header = Header { policy, source, totals, target_count, section_bits, section_count, bloom, parts };
        Some((header, zero_blocks, flags | reserved))
    }

    /// Counts must fit each other and the lengths of the parts, so that all later work is bounded by the file.
    fn check_shape(&self, zero_blocks: u64) -> Result<(), MapError> {
        let t = &self.totals;
        let ok = t.blocks == self.source.blocks()
            && t.nonzero_blocks.checked_add(zero_blocks) == Some(t.blocks)
            && t.entries <= t.nonzero_blocks
            && u32::try_from(t.entries).is_ok()
            && self.section_bits <= SECTION_BITS_MAX
            && section_count(t.blocks, self.section_bits) == u64::from(self.section_count)
            && self.bloom.group_bits <= bloom::GROUP_BITS_MAX
            && (1..=bloom::HASHES_MAX).contains(&self.bloom.hashes)
            && self.bloom.lines >= 1
            && u64::from(self.bloom.keys) * u64::from(self.bloom.hashes) <= self.bloom.bits();
        if !ok {
            return Err(MapError::broken("the totals in the header contradict each other"));
        }
        let mut offset = HEADER_BYTES as u64;
        for ((part, used), name) in self.parts.iter().zip(self.used()).zip(PART_NAMES) {
            if part.offset != offset || part.len != used.next_multiple_of(ALIGN as u64) {
                return Err(MapError::broken(format!("the {name} do not lie where they must")));
            }
            offset += part.len;
        }
        if offset != t.map_bytes {
            return Err(MapError::new(MapErrorKind::Length, "bytes are missing or left over after the last part"));
        }
        Ok(())
    }

    /// Bytes of each part without its padding.
    pub(super) fn used(&self) -> [u64; 4] {
        [
            u64::from(self.target_count) * TARGET_BYTES as u64,
            self.totals.entries * ENTRY_BYTES as u64,
            u64::from(self.section_count) * SECTION_BYTES as u64,
            u64::from(self.bloom.lines) * bloom::LINE_BYTES as u64,
        ]
    }

    /// Where part `i` lies in the file, without its padding. [`Header::decode`] has compared it with the file's
    /// length, so it fits a `usize`.
    pub(super) fn range(&self, i: usize) -> Range<usize> {
        let start = usize::try_from(self.parts[i].offset).unwrap_or(usize::MAX);
        let len = usize::try_from(self.used()[i]).unwrap_or(usize::MAX);
        start..start.saturating_add(len)
    }
}

/// Magic, version, length and checksum of the header, in the order that gives the best message.
fn check_envelope(file: &[u8]) -> Result<&[u8], MapError> {
    let mut c = Cursor::new(file);
    let cut = || MapError::new(MapErrorKind::Length, format!("cut short: {} bytes, not even a header", file.len()));
    let magic: Option<[u8; 8]> = c.array();
    if magic.is_none() && MAGIC.starts_with(file) {
        return Err(cut());
    }
    if magic != Some(MAGIC) {
        return Err(MapError::new(MapErrorKind::NotAMap, "this is no block map of vmar"));
    }
    let version = c.u32_le().ok_or_else(cut)?;
    if version > VERSION {
        let what = format!("version {version} of the block map format; this vmar knows versions up to {VERSION}");
        return Err(MapError::new(MapErrorKind::Newer, what));
    }
    if version != VERSION {
        return Err(MapError::broken(format!("there is no version {version} of the block map format")));
    }
    if c.u32_le().ok_or_else(cut)? != HEADER_LEN {
        return Err(MapError::broken("the length of the header is wrong"));
    }
    let head = file.get(..HEADER_BYTES).ok_or_else(cut)?;
    let (body, crc) = head.split_at(HEADER_BYTES - 4);
    if crc32c::crc32c(body).to_le_bytes() != crc {
        return Err(MapError::new(MapErrorKind::Checksum, "the checksum of the header is wrong"));
    }
    Ok(head)
}

/// The 56 bytes that name an image: {image, 0, generation, size, digest}.
fn encode_identity(t: &Target) -> Vec<u8> {
    let mut out = Vec::with_capacity(TARGET_BYTES);
    out.extend(t.image.0.to_le_bytes());
    out.extend(0u32.to_le_bytes());
    out.extend(t.generation.to_le_bytes());
    out.extend(t.size.to_le_bytes());
    out.extend(t.digest);
    out
}

/// The identity, and its reserved bits, which must be zero.
fn decode_identity(c: &mut Cursor<'_>) -> Option<(Target, u32)> {
    let image = ImageId(c.u32_le()?);
    let reserved = c.u32_le()?;
    let (generation, size) = (c.u64_le()?, c.u64_le()?);
    Some((Target { image, generation, digest: c.array()?, size }, reserved))
}

/// What holds for every image of a library.
pub(super) fn check_identity(target: &Target) -> Result<(), MapError> {
    if target.size > IMAGE_SIZE_MAX || !target.size.is_multiple_of(SECTOR_SIZE) {
        return Err(MapError::broken(format!("image {} cannot have {} bytes", target.image, target.size)));
    }
    Ok(())
}

/// A record of the target table: identity, then how many blocks of the source are mapped into it.
pub(super) fn encode_target(target: &Target, blocks: u64) -> Vec<u8> {
    let mut out = encode_identity(target);
    out.extend(blocks.to_le_bytes());
    out
}

/// Reads one record of the target table; `raw` is `TARGET_BYTES` long.
pub(super) fn decode_target(raw: &[u8]) -> Result<(Target, u64), MapError> {
    let mut c = Cursor::new(raw);
    let fields = decode_identity(&mut c).zip(c.u64_le());
    let Some(((target, 0), blocks)) = fields else {
        return Err(MapError::broken("reserved bytes of a target are not zero"));
    };
    check_identity(&target)?;
    Ok((target, blocks))
}
