//! A verified map and its answers.

use super::bloom::{self, Bloom};
use super::check::{check_entries, check_targets};
use super::entry::{Table, depth};
use super::format::{BLOOM, ENTRIES, Header, INDEX, PART_NAMES, TARGET_BYTES, TARGETS, decode_target};
use super::index::{Index, sections};
use super::{Entry, MapError, MapErrorKind, Target, Totals};
use std::iter::FusedIterator;
use std::ops::Range;

/// A block map that was verified once, whole, and is then read where it lies: no parsing, no copy of the entries.
///
/// The bytes must not change as long as the map lives (vmar replaces map files by rename). If they do all the same,
/// answers may be wrong and indexing may panic; memory stays safe.
#[derive(Debug)]
pub struct Map<B: AsRef<[u8]>> {
    bytes: B,
    header: Header,
    targets: Vec<(Target, u64)>,
    entries_at: Range<usize>,
    index_at: Range<usize>,
    bloom_at: Range<usize>,
}

/// Where a block lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hit {
    /// Index into the table of targets.
    pub target: u32,
    /// Block of the target image.
    pub block: u32,
    /// Blocks left in the entry from here, this one included: all contiguous in source and target.
    pub run: u32,
}

/// A piece of a range of source blocks: contiguous in one target image, or zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First source block.
    pub source: u32,
    /// Blocks, at least 1.
    pub len: u32,
    /// Index into the table of targets and first block there; `None` for zero blocks.
    pub to: Option<(u32, u32)>,
}

/// The search schemes of the paper's figure 10.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// Binary search among all entries.
    Plain,
    /// Binary search among the entries of the block's section.
    Sections,
    /// The same, after the Bloom filter had its say. Only a map of [`super::build_with_filter`] has one to speak of.
    SectionsAndBloom,
}

/// Sizes inside a map, for people who look at it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Bytes of the table of targets, the entries, the section index and the Bloom filter, padding left out.
    pub part_bytes: [u64; 4],
    /// Blocks of a section, a power of two.
    pub section_blocks: u64,
    /// Number of sections.
    pub sections: u32,
    /// Blocks that share a key of the Bloom filter, a power of two.
    pub bloom_group_blocks: u64,
    /// Keys in the Bloom filter.
    pub bloom_keys: u32,
    /// Bits of the Bloom filter.
    pub bloom_bits: u64,
    /// Bits set for each key.
    pub bloom_hashes: u32,
}

impl<B: AsRef<[u8]>> Map<B> {
    /// Verifies everything: magic, version, lengths, every checksum, and that targets, entries, totals, section
    /// index and Bloom filter agree. Time and memory are linear in the number of bytes, whatever they hold.
    pub fn new(bytes: B) -> Result<Self, MapError> {
        let file = bytes.as_ref();
        let header = Header::decode(file)?;
        check_parts(&header, file)?;
        let targets = file[header.range(TARGETS)]
            .chunks_exact(TARGET_BYTES)
            .map(decode_target)
            .collect::<Result<Vec<_>, MapError>>()?;
        check_content(&header, &targets, file)?;
        let (entries_at, index_at, bloom_at) = (header.range(ENTRIES), header.range(INDEX), header.range(BLOOM));
        Ok(Map { bytes, header, targets, entries_at, index_at, bloom_at })
    }

    /// Identity of the image whose blocks are mapped.
    pub fn source(&self) -> Target {
        self.header.source
    }

    /// The file as it was verified.
    pub fn bytes(&self) -> &[u8] {
        self.bytes.as_ref()
    }

    /// Number of the policy that chose the targets.
    pub fn policy(&self) -> u32 {
        self.header.policy
    }

    /// How many images entries may point to.
    pub fn target_count(&self) -> u32 {
        self.header.target_count
    }

    /// Identity of target `i`; `None` if there is none of that number.
    pub fn target(&self, i: u32) -> Option<Target> {
        self.targets.get(i as usize).map(|(target, _)| *target)
    }

    /// The table of targets with the number of source blocks mapped into each.
    pub fn targets(&self) -> impl ExactSizeIterator<Item = (Target, u64)> + '_ {
        self.targets.iter().copied()
    }

    /// Verified sums over all entries.
    pub fn totals(&self) -> Totals {
        self.header.totals
    }

    /// Sizes of the parts and parameters of index and filter.
    pub fn layout(&self) -> Layout {
        let h = &self.header;
        Layout {
            part_bytes: h.used(),
            section_blocks: 1 << h.section_bits,
            sections: h.section_count,
            bloom_group_blocks: 1 << h.bloom.group_bits,
            bloom_keys: h.bloom.keys,
            bloom_bits: h.bloom.bits(),
            bloom_hashes: h.bloom.hashes,
        }
    }

    /// All entries, ascending by source block.
    pub fn entries(&self) -> Entries<'_> {
        Entries { table: self.table(), range: 0..self.table().len() }
    }

    /// Where `block` lives; `None` for a zero block (and for one behind the end of the image).
    #[inline]
    pub fn lookup(&self, block: u32) -> Option<Hit> {
        if u64::from(block) >= self.header.totals.blocks {
            return None;
        }
        let candidates = self.candidates(block);
        if candidates.is_empty() { None } else { self.find(candidates, block) }
    }

    /// The answer of [`Map::lookup`] by one of the schemes of figure 10, to compare what they cost.
    #[inline]
    pub fn lookup_by(&self, scheme: Scheme, block: u32) -> Option<Hit> {
        if u64::from(block) >= self.header.totals.blocks
            || (scheme == Scheme::SectionsAndBloom && !self.may_hold(block))
        {
            return None;
        }
        let candidates = if scheme == Scheme::Plain { 0..self.table().len() } else { self.candidates(block) };
        if candidates.is_empty() { None } else { self.find(candidates, block) }
    }

    /// The search among entries of which at least one is left.
    #[inline]
    fn find(&self, candidates: Range<usize>, block: u32) -> Option<Hit> {
        let table = self.table();
        let entry = table.get(table.search(candidates, block));
        // Below the entry this wraps to at least 2^32 - source, which no length exceeds.
        let skip = block.wrapping_sub(entry.source);
        (skip < entry.len).then(|| Hit { target: entry.target, block: entry.block + skip, run: entry.len - skip })
    }

    /// Cuts the blocks `first..first + count` into runs: in order, without gaps or overlap, zero runs included and
    /// as long as they can be. Behind the end of the image all is zero; behind block 2^32 there is nothing.
    pub fn runs(&self, first: u32, count: u32) -> Runs<'_> {
        let table = self.table();
        let at = u64::from(first);
        let next = if at < self.header.totals.blocks {
            let candidates = self.candidates(first);
            let next = if candidates.is_empty() { candidates.start } else { table.search(candidates, first) };
            // The search may stop at an entry that ends before `first`; the next one is then the first that counts.
            if next < table.len() && table.get(next).source_end() <= at { next + 1 } else { next }
        } else {
            table.len()
        };
        Runs { table, next, at, end: (at + u64::from(count)).min(1 << 32) }
    }

    /// Probes of the binary search for `block` that [`Map::lookup`] makes behind the section index (paper, figure 10): 0
    /// when the index leaves at most one entry.
    pub fn search_depth(&self, block: u32) -> u32 {
        self.search_depth_by(Scheme::Sections, block)
    }

    /// Probes of the binary search for `block` under one of the schemes of figure 10.
    pub fn search_depth_by(&self, scheme: Scheme, block: u32) -> u32 {
        if scheme == Scheme::Plain {
            return depth(self.table().len());
        }
        if u64::from(block) >= self.header.totals.blocks
            || (scheme == Scheme::SectionsAndBloom && !self.may_hold(block))
        {
            return 0;
        }
        depth(self.candidates(block).len())
    }

    /// Number of the entry that covers `block`, and the entry; `None` for a zero block.
    pub fn entry_of(&self, block: u32) -> Option<(u32, Entry)> {
        self.lookup(block)?;
        let i = self.table().search(self.candidates(block), block);
        Some((u32::try_from(i).ok()?, self.table().get(i)))
    }

    /// Number of the section that `block` is in, and the entries (first, end) that can cover its blocks; `None`
    /// behind the end of the image.
    pub fn section_of(&self, block: u32) -> Option<(u32, Range<usize>)> {
        (u64::from(block) < self.header.totals.blocks)
            .then(|| (block >> self.header.section_bits, self.candidates(block)))
    }

    fn table(&self) -> Table<'_> {
        Table::new(&self.bytes.as_ref()[self.entries_at.clone()])
    }

    /// The entries that can cover `block`, which is inside the image.
    #[inline]
    fn candidates(&self, block: u32) -> Range<usize> {
        Index::new(&self.bytes.as_ref()[self.index_at.clone()]).get(block >> self.header.section_bits)
    }

    #[inline]
    fn may_hold(&self, block: u32) -> bool {
        let shape = &self.header.bloom;
        Bloom::new(&self.bytes.as_ref()[self.bloom_at.clone()], shape.hashes).may_hold(block >> shape.group_bits)
    }
}

/// Checksums of the parts, and zeros in their padding.
fn check_parts(header: &Header, file: &[u8]) -> Result<(), MapError> {
    for (i, (part, name)) in header.parts.iter().zip(PART_NAMES).enumerate() {
        let used = header.range(i);
        let padded = used.start..used.end.next_multiple_of(super::format::ALIGN);
        let what = |cause: &str| format!("the {cause} of the {name} is wrong");
        if crc32c::crc32c(&file[padded.clone()]) != part.crc {
            return Err(MapError::new(MapErrorKind::Checksum, what("checksum")));
        }
        if file[used.end..padded.end].iter().any(|&b| b != 0) {
            return Err(MapError::broken(what("padding")));
        }
    }
    Ok(())
}

/// Everything that checksums cannot tell. The order matters: the index is compared before it is used, and keys are
/// counted by arithmetic before one is looked at, so that no map makes work that its length does not pay for.
fn check_content(header: &Header, targets: &[(Target, u64)], file: &[u8]) -> Result<(), MapError> {
    let table = Table::new(&file[header.range(ENTRIES)]);
    let identities: Vec<Target> = targets.iter().map(|(target, _)| *target).collect();
    check_targets(&header.source, &identities)?;
    let tally = check_entries(&header.source, &identities, table)?;
    let t = &header.totals;
    if (tally.nonzero_blocks, tally.redirected_blocks, tally.self_redirected_blocks)
        != (t.nonzero_blocks, t.redirected_blocks, t.self_redirected_blocks)
        || !targets.iter().map(|(_, blocks)| blocks).eq(&tally.per_target)
    {
        return Err(MapError::broken("the entries do not add up to the totals"));
    }
    let index = Index::new(&file[header.range(INDEX)]);
    if !index.iter().eq(sections(table, header.section_bits, u64::from(header.section_count))) {
        return Err(MapError::broken("the section index does not fit the entries"));
    }
    let shape = header.bloom;
    let filter = Bloom::new(&file[header.range(BLOOM)], shape.hashes);
    if bloom::key_count(table, shape.group_bits) != u64::from(shape.keys)
        || !bloom::keys(table, shape.group_bits).all(|key| filter.may_hold(key))
    {
        return Err(MapError::broken("the Bloom filter misses a block"));
    }
    Ok(())
}

/// Iterator over all entries of a map.
#[derive(Clone, Debug)]
pub struct Entries<'a> {
    table: Table<'a>,
    range: Range<usize>,
}

impl Iterator for Entries<'_> {
    type Item = Entry;

    fn next(&mut self) -> Option<Entry> {
        self.range.next().map(|i| self.table.get(i))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        self.range.size_hint()
    }
}

impl ExactSizeIterator for Entries<'_> {}
impl FusedIterator for Entries<'_> {}

/// Iterator over the runs of a range of blocks; made by [`Map::runs`].
#[derive(Clone, Debug)]
pub struct Runs<'a> {
    table: Table<'a>,
    /// The first entry that ends behind `at`.
    next: usize,
    at: u64,
    end: u64,
}

impl Iterator for Runs<'_> {
    type Item = Run;

    #[inline]
    fn next(&mut self) -> Option<Run> {
        if self.at >= self.end {
            return None;
        }
        let mut stop = self.end;
        let mut to = None;
        if self.next < self.table.len() {
            let entry = self.table.get(self.next);
            let start = u64::from(entry.source);
            if self.at < start {
                stop = stop.min(start);
            } else {
                stop = stop.min(entry.source_end());
                to = Some((entry.target, entry.block + low32(self.at - start)));
                self.next += usize::from(stop == entry.source_end());
            }
        }
        let run = Run { source: low32(self.at), len: low32(stop - self.at), to };
        self.at = stop;
        Some(run)
    }
}

impl FusedIterator for Runs<'_> {}

/// `at < end <= 2^32`, and a range is at most 2^32 - 1 blocks long, so nothing is cut off here.
#[expect(clippy::cast_possible_truncation, reason = "see above")]
fn low32(value: u64) -> u32 {
    value as u32
}
