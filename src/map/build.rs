//! Makes the bytes of a map.

use super::check::{check_entries, check_targets};
use super::entry::Table;
use super::format::{ALIGN, HEADER_BYTES, Header, Part, check_identity, encode_target};
use super::index::{SECTION_BYTES, section_bits_for, section_count, sections};
use super::{Entry, MapError, MapSpec, Totals, bloom};

/// Merges single redirects into entries: maximal runs that are contiguous in the source and in one target.
#[derive(Clone, Debug, Default)]
pub struct EntryBuilder {
    entries: Vec<Entry>,
}

impl EntryBuilder {
    /// No entries yet.
    pub fn new() -> Self {
        EntryBuilder::default()
    }

    /// Says where one block of the source image lives. Source blocks must ascend; [`build`] refuses entries of a
    /// builder that was fed otherwise. A block that is never pushed is a zero block.
    pub fn push(&mut self, source_block: u32, target: u32, target_block: u32) {
        if let Some(last) = self.entries.last_mut()
            && last.target == target
            && last.len < u32::MAX
            && last.source_end() == u64::from(source_block)
            && last.block_end() == u64::from(target_block)
        {
            last.len += 1;
            return;
        }
        self.entries.push(Entry { source: source_block, len: 1, target, block: target_block });
    }

    /// The entries, ascending by source block.
    pub fn finish(self) -> Vec<Entry> {
        self.entries
    }
}

/// The bytes of a map, ready to be written to a file and opened by [`super::Map::new`]. The same specification
/// always gives the same bytes. The Bloom filter is the smallest that the format allows: no lookup asks it, for it costs more
/// than the search that it saves (`FORMAT.md`).
///
/// # Errors
/// When the specification breaks a rule of the format.
pub fn build(spec: &MapSpec) -> Result<Vec<u8>, MapError> {
    build_filtered(spec, bloom::KEYS_LEAST)
}

/// The same with the Bloom filter of the paper (1 % false positives), to compare the schemes of its figure 10.
///
/// # Errors
/// Those of [`build`].
pub fn build_with_filter(spec: &MapSpec) -> Result<Vec<u8>, MapError> {
    build_filtered(spec, bloom::KEYS_MAX)
}

fn build_filtered(spec: &MapSpec, keys_max: u64) -> Result<Vec<u8>, MapError> {
    check_identity(&spec.source)?;
    spec.targets.iter().try_for_each(check_identity)?;
    check_targets(&spec.source, &spec.targets)?;
    let entries: Vec<u8> = spec.entries.iter().flat_map(Entry::encode).collect();
    let table = Table::new(&entries);
    let tally = check_entries(&spec.source, &spec.targets, table)?;

    let blocks = spec.source.blocks();
    let section_bits = section_bits_for(blocks, table.len() as u64);
    let shape = bloom::shape_for(table, keys_max);
    let targets = spec.targets.iter().zip(&tally.per_target).flat_map(|(t, &n)| encode_target(t, n)).collect();
    let index: Vec<u8> = sections(table, section_bits, section_count(blocks, section_bits))
        .flat_map(|(first, end)| [first.to_le_bytes(), end.to_le_bytes()].concat())
        .collect();
    let filter = bloom::fill(table, shape);

    let header = Header {
        policy: spec.policy,
        source: spec.source,
        totals: Totals {
            blocks,
            nonzero_blocks: tally.nonzero_blocks,
            redirected_blocks: tally.redirected_blocks,
            self_redirected_blocks: tally.self_redirected_blocks,
            entries: u64::from(count(table.len(), "entries")?),
            map_bytes: 0,
        },
        target_count: count(spec.targets.len(), "targets")?,
        section_bits,
        section_count: count(index.len() / SECTION_BYTES, "sections")?,
        bloom: shape,
        parts: Default::default(),
    };
    Ok(assemble(header, [targets, entries, index, filter]))
}

fn count(n: usize, what: &str) -> Result<u32, MapError> {
    u32::try_from(n).map_err(|_| MapError::broken(format!("{n} {what} do not fit into a map")))
}

/// Header and parts one after the other, each padded with zeros to a cache line.
fn assemble(mut header: Header, parts: [Vec<u8>; 4]) -> Vec<u8> {
    let mut body = Vec::with_capacity(parts.iter().map(|p| p.len() + ALIGN).sum());
    for (slot, mut bytes) in header.parts.iter_mut().zip(parts) {
        bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        let offset = (HEADER_BYTES + body.len()) as u64;
        *slot = Part { offset, len: bytes.len() as u64, crc: crc32c::crc32c(&bytes) };
        body.append(&mut bytes);
    }
    header.totals.map_bytes = (HEADER_BYTES + body.len()) as u64;
    let mut file = header.encode();
    file.append(&mut body);
    file
}
