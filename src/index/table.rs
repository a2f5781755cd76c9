//! A sorted file of rows, made once and never changed: looked up by hash, or read from end to end.
//!
//! ```text
//! page 0        header: magic, version, identity, rows, pages, checksum of the fences
//! page 1…n      157 rows of 26 bytes, ascending; how many; CRC-32C
//! then          fences: the first 8 bytes of each page's first hash, big-endian as in the hash
//! ```
//!
//! Pages have 4,096 bytes. A row is hash (20), set (u32), variant (u16), little-endian; see `FORMAT.md`. The checksum of a
//! page also covers which library, which table and which page it is, so nothing can be in another's place. Hashes are
//! evenly spread, so 8 bytes name the page of a hash: a lookup reads one page. Many lookups, in order, read near pages
//! together and far ones on several threads: a new image of 10^5 blocks reads 10^5 pages of a table of 10^9 rows, and
//! all of a table of 10^6.

use super::Row;
use crate::codec::Cursor;
use crate::error::{Error, ErrorKind, Result};
use crate::fingerprint::Hash;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

const MAGIC: &[u8; 8] = b"vmar-ctb";
/// The version that this code reads and writes.
const VERSION: u32 = 1;
const PAGE: usize = 4096;
const ROW: usize = 26;
const ROW_U32: u32 = 26;
/// Rows of a full page.
const ROWS_PER_PAGE: usize = 157;
const COUNT_AT: usize = ROWS_PER_PAGE * ROW;
const CRC_AT: usize = PAGE - 4;
/// Bytes of the header that have a meaning.
const HEADER_LEN: usize = 64;
/// Pages that may lie unused between two that are read together: reading 64 KiB takes no longer than two reads.
const GAP: usize = 15;
/// Most pages that are read at once.
const PAGES_PER_READ: usize = 256;
/// Reads in flight: what a disk needs to be busy.
const READERS: usize = 16;

/// What to do about a table that cannot be used.
pub const MEND: &str = "make the index anew with 'vmar library rebuild --index'";

/// Which table this is, and how large; the catalog has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// UUID of the library.
    pub library: [u8; 16],
    /// Counts the files of the library's indexes.
    pub id: u64,
    /// Rows.
    pub rows: u64,
}

/// Writes a table to a new file, row by row.
pub struct TableWriter {
    path: PathBuf,
    file: BufWriter<File>,
    library: [u8; 16],
    id: u64,
    rows: u64,
    page: Vec<u8>,
    fences: Vec<[u8; 8]>,
    last: Option<(Hash, u16)>,
}

impl TableWriter {
    /// Starts the file. The caller makes it durable and moves it in place.
    pub fn create(path: &Path, library: [u8; 16], id: u64) -> Result<TableWriter> {
        let mut options = File::options();
        let file = options.write(true).create_new(true).open(path).map_err(|e| Error::io(path, "create it", e))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        // The header comes when all is known.
        file.write_all(&[0; PAGE]).map_err(|e| Error::io(path, "write", e))?;
        let (page, fences) = (Vec::with_capacity(PAGE), Vec::new());
        Ok(TableWriter { path: path.to_path_buf(), file, library, id, rows: 0, page, fences, last: None })
    }

    /// Appends a row; they come in order.
    pub fn push(&mut self, row: &Row) -> Result<()> {
        let key = (row.hash, row.variant);
        if self.last.is_some_and(|last| last >= key) {
            return Err(Error::file(ErrorKind::Corrupt, &self.path, "rows of an index came out of order"));
        }
        self.last = Some(key);
        if self.page.is_empty() {
            let (prefix, _) = split(&row.hash);
            self.fences.push(prefix);
        }
        self.page.extend(row.hash);
        self.page.extend(row.set.to_le_bytes());
        self.page.extend(row.variant.to_le_bytes());
        self.rows += 1;
        if self.page.len() == COUNT_AT { self.end_page() } else { Ok(()) }
    }

    fn end_page(&mut self) -> Result<()> {
        let count = u16::try_from(self.page.len() / ROW).unwrap_or(u16::MAX);
        self.page.resize(COUNT_AT, 0);
        self.page.extend(count.to_le_bytes());
        self.page.resize(CRC_AT, 0);
        let crc = crc32c::crc32c_append(seed(&self.library, self.id, self.fences.len() as u64), &self.page);
        self.page.extend(crc.to_le_bytes());
        self.file.write_all(&self.page).map_err(|e| Error::io(&self.path, "write", e))?;
        self.page.clear();
        Ok(())
    }

    /// Writes what is left.
    pub fn finish(mut self) -> Result<Stamp> {
        if !self.page.is_empty() {
            self.end_page()?;
        }
        self.write_end().map_err(|e| Error::io(&self.path, "write", e))?;
        Ok(Stamp { library: self.library, id: self.id, rows: self.rows })
    }

    fn write_end(&mut self) -> io::Result<()> {
        let fences = self.fences.as_flattened();
        self.file.write_all(fences)?;
        self.file.flush()?;
        let mut header = Vec::with_capacity(PAGE);
        header.extend(MAGIC);
        header.extend(VERSION.to_le_bytes());
        header.extend(ROW_U32.to_le_bytes());
        header.extend(self.library);
        for n in [self.id, self.rows, self.fences.len() as u64] {
            header.extend(n.to_le_bytes());
        }
        header.extend([0; 4]);
        header.extend(crc32c::crc32c(fences).to_le_bytes());
        debug_assert_eq!(header.len(), HEADER_LEN);
        header.resize(CRC_AT, 0);
        header.extend(crc32c::crc32c(&header).to_le_bytes());
        self.file.get_ref().write_all_at(&header, 0)
    }
}

/// A table, open.
#[derive(Debug)]
pub struct Table {
    path: PathBuf,
    file: File,
    stamp: Stamp,
    fences: Vec<u64>,
}

impl Table {
    /// Opens a table and checks that it is the one that the catalog means. Rows are checked as they are read.
    ///
    /// # Errors
    /// `Corrupt` when it is another one, or cut; `Unsupported` when a newer vmar wrote it.
    pub fn open(path: &Path, stamp: Stamp) -> Result<Table> {
        let file = File::open(path).map_err(|e| Error::io(path, "open it", e).mend(MEND))?;
        let pages = read_header(path, &file, stamp)?;
        let end = (1 + pages) * PAGE as u64;
        let length = file.metadata().map_err(|e| Error::io(path, "look at it", e))?.len();
        if stamp.rows.div_ceil(ROWS_PER_PAGE as u64) != pages || length != end + pages * 8 {
            return Err(corrupt(path, "it is cut off, or longer than it was"));
        }
        let bytes = usize::try_from(pages * 8).map_err(|_| corrupt(path, "it is too large"))?;
        let mut fences = vec![0; bytes];
        read_at(path, &file, &mut fences, end)?;
        let mut crc = [0; 4];
        read_at(path, &file, &mut crc, HEADER_LEN as u64 - 4)?;
        if crc32c::crc32c(&fences) != u32::from_le_bytes(crc) {
            return Err(corrupt(path, "the checksum of its fences is wrong"));
        }
        let (fences, _) = fences.as_chunks::<8>();
        let fences: Vec<u64> = fences.iter().map(|f| u64::from_be_bytes(*f)).collect();
        if !fences.is_sorted() {
            return Err(corrupt(path, "its fences are not in order"));
        }
        Ok(Table { path: path.to_path_buf(), file, stamp, fences })
    }

    /// Rows in the file.
    pub fn rows(&self) -> u64 {
        self.stamp.rows
    }

    /// Looks up hashes, which are ascending: for each that is there, its index and all rows that it has, in order of the
    /// indices.
    pub fn lookup(&self, hashes: &[Hash]) -> Result<Hits> {
        let extents = self.extents(hashes);
        let next = AtomicUsize::new(0);
        let worker = || -> Result<Vec<(usize, Hits)>> {
            let (mut buf, mut out) = (Vec::new(), Vec::new());
            loop {
                let at = next.fetch_add(1, Ordering::Relaxed);
                let Some(extent) = extents.get(at) else { return Ok(out) };
                out.push((at, self.search(extent, hashes, &mut buf)?));
            }
        };
        let readers = READERS.min(extents.len());
        let parts: Result<Vec<_>> = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..readers).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().map(|w| w.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
        });
        let mut parts = parts?.concat();
        parts.sort_unstable_by_key(|(at, _)| *at);
        let mut out: Hits = parts.into_iter().flat_map(|(_, rows)| rows).collect();
        // A page that ends one extent and begins the next is read in both only for hashes of its own.
        out.dedup();
        Ok(out)
    }

    /// The pages where hashes with this prefix can be.
    fn pages_of(&self, hash: &Hash) -> Range<usize> {
        let (prefix, _) = split(hash);
        let prefix = u64::from_be_bytes(prefix);
        let start = self.fences.partition_point(|f| *f < prefix).saturating_sub(1);
        let more = self.fences.get(start..).map_or(0, |rest| rest.iter().take_while(|f| **f <= prefix).count());
        start..start + more
    }

    /// Ranges of pages to be read at once, each with the range of hashes that are looked up in it.
    fn extents(&self, hashes: &[Hash]) -> Vec<Extent> {
        let mut out: Vec<Extent> = Vec::new();
        for (i, hash) in hashes.iter().enumerate() {
            let pages = self.pages_of(hash);
            if pages.is_empty() {
                continue;
            }
            match out.last_mut() {
                Some(last) if pages.start <= last.pages.end + GAP && pages.end - last.pages.start <= PAGES_PER_READ => {
                    last.pages.end = pages.end.max(last.pages.end);
                    last.hashes.end = i + 1;
                }
                _ => out.push(Extent { pages, hashes: i..i + 1 }),
            }
        }
        out
    }

    fn search(&self, extent: &Extent, hashes: &[Hash], buf: &mut Vec<u8>) -> Result<Hits> {
        buf.resize(extent.pages.len() * PAGE, 0);
        read_at(&self.path, &self.file, buf, (1 + extent.pages.start as u64) * PAGE as u64)?;
        let (mut out, mut rows, mut loaded) = (Vec::new(), Vec::new(), None);
        for i in extent.hashes.clone() {
            let Some(hash) = hashes.get(i) else { break };
            for page in self.pages_of(hash) {
                if loaded != Some(page) {
                    self.decode(page, buf, page - extent.pages.start, &mut rows)?;
                    loaded = Some(page);
                }
                let from = rows.partition_point(|r: &Row| r.hash < *hash);
                out.extend(rows.iter().skip(from).take_while(|r| r.hash == *hash).map(|r| (i, *r)));
            }
        }
        Ok(out)
    }

    /// The rows of the page at `index` of the buffer.
    fn decode(&self, page: usize, buf: &[u8], index: usize, rows: &mut Vec<Row>) -> Result<()> {
        let broken = |what: &str| corrupt(&self.path, &format!("page {}: {what}", page + 1));
        let bytes = buf.get(index * PAGE..(index + 1) * PAGE).ok_or_else(|| broken("not read"))?;
        let (body, crc) = bytes.split_at(CRC_AT);
        let want = crc32c::crc32c_append(seed(&self.stamp.library, self.stamp.id, page as u64 + 1), body);
        if want.to_le_bytes() != *crc {
            return Err(broken("its checksum is wrong"));
        }
        let count = body.get(COUNT_AT..COUNT_AT + 2).and_then(|c| c.try_into().ok()).map_or(0, u16::from_le_bytes);
        let used = body.get(..usize::from(count) * ROW).ok_or_else(|| broken("too many rows"))?;
        rows.clear();
        let (all, _) = used.as_chunks::<ROW>();
        for bytes in all {
            let mut c = Cursor::new(bytes);
            let row = (|| Some((c.array()?, c.u32_le()?, c.array()?)))();
            let (hash, set, variant) = row.ok_or_else(|| broken("a row is cut off"))?;
            rows.push(Row { hash, set, variant: u16::from_le_bytes(variant) });
        }
        Ok(())
    }

    /// All rows, in order.
    pub fn scan(&self) -> Scan<'_> {
        Scan { table: self, page: 0, buf: Vec::new(), first: 0, rows: Vec::new(), at: 0, seen: 0, failed: false }
    }
}

/// Rows that were found, with the index of their hash.
pub type Hits = Vec<(usize, Row)>;

struct Extent {
    pages: Range<usize>,
    hashes: Range<usize>,
}

/// Goes through a table from end to end.
pub struct Scan<'t> {
    table: &'t Table,
    /// The next page to decode.
    page: usize,
    /// Pages that were read, from `first` on.
    buf: Vec<u8>,
    first: usize,
    rows: Vec<Row>,
    at: usize,
    seen: u64,
    failed: bool,
}

impl Scan<'_> {
    fn next_row(&mut self) -> Result<Option<Row>> {
        loop {
            if let Some(row) = self.rows.get(self.at) {
                self.at += 1;
                self.seen += 1;
                return Ok(Some(*row));
            }
            let table = self.table;
            if self.page == table.fences.len() {
                if self.seen != table.rows() {
                    return Err(corrupt(&table.path, "it has another number of rows than the catalog says"));
                }
                return Ok(None);
            }
            if self.page >= self.first + self.buf.len() / PAGE {
                self.first = self.page;
                self.buf.resize(PAGES_PER_READ.min(table.fences.len() - self.page) * PAGE, 0);
                read_at(&table.path, &table.file, &mut self.buf, (1 + self.page as u64) * PAGE as u64)?;
            }
            let last = self.rows.last().copied();
            table.decode(self.page, &self.buf, self.page - self.first, &mut self.rows)?;
            if !last
                .into_iter()
                .chain(self.rows.iter().copied())
                .is_sorted_by(|a, b| (a.hash, a.variant) < (b.hash, b.variant))
            {
                return Err(corrupt(&table.path, &format!("page {}: its rows are not in order", self.page + 1)));
            }
            self.page += 1;
            self.at = 0;
        }
    }
}

impl Iterator for Scan<'_> {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        if self.failed {
            return None;
        }
        let out = self.next_row().transpose();
        self.failed = !matches!(out, Some(Ok(_)));
        out
    }
}

/// Checks the header; gives the number of pages.
fn read_header(path: &Path, file: &File, stamp: Stamp) -> Result<u64> {
    let mut header = vec![0; PAGE];
    read_at(path, file, &mut header, 0)?;
    let mut c = Cursor::new(&header);
    if c.array() != Some(*MAGIC) {
        return Err(corrupt(path, "not a table of a content index"));
    }
    match c.u32_le() {
        Some(VERSION) => {}
        Some(newer) if newer > VERSION => {
            let cause = format!("content table format {newer}, this vmar knows up to {VERSION}");
            return Err(Error::file(ErrorKind::Unsupported, path, cause).mend("use a newer vmar"));
        }
        _ => return Err(corrupt(path, "not a table of a content index")),
    }
    let (body, crc) = header.split_at(CRC_AT);
    if crc32c::crc32c(body).to_le_bytes() != *crc {
        return Err(corrupt(path, "the checksum of its header is wrong"));
    }
    let row = c.u32_le();
    let found = (|| Some(Stamp { library: c.array()?, id: c.u64_le()?, rows: c.u64_le()? }))();
    if found != Some(stamp) || row != Some(ROW_U32) {
        return Err(corrupt(path, "it is another table than the catalog names"));
    }
    c.u64_le().ok_or_else(|| corrupt(path, "its header is cut off"))
}

fn read_at(path: &Path, file: &File, buf: &mut [u8], at: u64) -> Result<()> {
    file.read_exact_at(buf, at).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => corrupt(path, "it is cut off"),
        _ => Error::io(path, "read", e),
    })
}

fn corrupt(path: &Path, cause: &str) -> Error {
    Error::file(ErrorKind::Corrupt, path, cause).mend(MEND)
}

/// What the checksum of a page starts from: which library, which table, which page.
fn seed(library: &[u8; 16], id: u64, page: u64) -> u32 {
    let crc = crc32c::crc32c(library);
    crc32c::crc32c_append(crc32c::crc32c_append(crc, &id.to_le_bytes()), &page.to_le_bytes())
}

/// The first eight bytes of a hash, and the others.
fn split(hash: &Hash) -> ([u8; 8], [u8; 12]) {
    let (mut prefix, mut rest) = ([0; 8], [0; 12]);
    prefix.copy_from_slice(&hash[..8]);
    rest.copy_from_slice(&hash[8..]);
    (prefix, rest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    const LIBRARY: [u8; 16] = [5; 16];

    fn write(path: &Path, rows: &[Row]) -> Stamp {
        let mut writer = TableWriter::create(path, LIBRARY, 9).unwrap();
        rows.iter().for_each(|r| writer.push(r).unwrap());
        writer.finish().unwrap()
    }

    /// Hashes that crowd: few first bytes, so that many share their first eight and pages are full of one prefix.
    fn crowded(n: u32, spread: u32) -> Hash {
        let mut hash = [0; 20];
        hash[..4].copy_from_slice(&(n % spread).to_be_bytes());
        hash[16..].copy_from_slice(&(n / spread).to_be_bytes());
        hash
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]
        #[test]
        fn what_was_written_is_found_and_nothing_else(
            keys in prop::collection::btree_map((0u32..4000, 0u16..3), any::<u32>(), 0..1200),
            asked in prop::collection::btree_set(0u32..4500, 0..300),
            spread in prop_oneof![Just(1u32), Just(7), Just(4096)],
        ) {
            let rows: BTreeMap<(Hash, u16), u32> =
                keys.into_iter().map(|((n, variant), set)| ((crowded(n, spread), variant), set)).collect();
            let rows: Vec<Row> = rows.into_iter().map(|((hash, variant), set)| Row { hash, variant, set }).collect();
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("t");
            let stamp = write(&path, &rows);
            let table = Table::open(&path, stamp).unwrap();
            prop_assert_eq!(&table.scan().collect::<Result<Vec<Row>>>().unwrap(), &rows);
            let mut hashes: Vec<Hash> = asked.into_iter().map(|n| crowded(n, spread)).collect();
            hashes.sort_unstable();
            let want: Vec<(usize, Row)> = hashes.iter().enumerate()
                .flat_map(|(i, h)| rows.iter().filter(move |r| r.hash == *h).map(move |r| (i, *r))).collect();
            prop_assert_eq!(table.lookup(&hashes).unwrap(), want);
        }
    }

    #[test]
    fn far_lookups_are_found_on_all_threads() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        let hash = |n: u32| crate::fingerprint::hash_block(crate::fingerprint::Algorithm::Sha1, &n.to_le_bytes());
        let mut rows: Vec<Row> = (0..200_000).map(|n| Row { hash: hash(n), variant: 0, set: n }).collect();
        rows.sort_unstable();
        let table = Table::open(&path, write(&path, &rows)).unwrap();
        let mut hashes: Vec<Hash> = (0..30).map(|n| hash(n * 10_000)).collect();
        hashes.sort_unstable();
        let found = table.lookup(&hashes).unwrap();
        assert_eq!(found.len(), 20);
        assert!(found.iter().all(|(i, r)| hashes[*i] == r.hash && hash(r.set) == r.hash));
        assert!(table.extents(&hashes).len() > 15);
    }

    #[test]
    fn damage_is_found_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t");
        let rows: Vec<Row> = (0..500).map(|n| Row { hash: crowded(n, 4096), variant: 0, set: n }).collect();
        let stamp = write(&path, &rows);
        let good = std::fs::read(&path).unwrap();
        let all = |path: &Path| Table::open(path, stamp).and_then(|t| t.scan().collect::<Result<Vec<Row>>>());
        assert_eq!(all(&path).unwrap(), rows);
        for at in (0..good.len()).step_by(13) {
            let mut bad = good.clone();
            bad[at] ^= 4;
            std::fs::write(&path, &bad).unwrap();
            let err = all(&path).unwrap_err();
            assert!(matches!(err.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported), "byte {at}: {err}");
        }
        for len in [0, 100, 4096, good.len() - 1] {
            std::fs::write(&path, &good[..len]).unwrap();
            assert!(all(&path).unwrap_err().to_string().contains("rebuild"), "{len}");
        }
        // Two pages that changed places.
        let mut swapped = good.clone();
        swapped[4096..8192].copy_from_slice(&good[8192..12288]);
        std::fs::write(&path, &swapped).unwrap();
        assert_eq!(all(&path).unwrap_err().kind(), ErrorKind::Corrupt);
        std::fs::write(&path, &good).unwrap();
        for other in [Stamp { id: 10, ..stamp }, Stamp { library: [6; 16], ..stamp }, Stamp { rows: 499, ..stamp }] {
            assert!(Table::open(&path, other).unwrap_err().to_string().contains("another table"));
        }
        assert_eq!(TableWriter::create(&path, LIBRARY, 1).err().unwrap().kind(), ErrorKind::Exists);
    }

    #[test]
    fn rows_out_of_order_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = TableWriter::create(&dir.path().join("t"), LIBRARY, 1).unwrap();
        let row = Row { hash: [1; 20], variant: 1, set: 0 };
        writer.push(&row).unwrap();
        assert!(writer.push(&row).is_err());
        assert!(writer.push(&Row { variant: 0, ..row }).is_err());
    }
}
