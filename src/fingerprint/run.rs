//! A fingerprint run: the fingerprints of one image in a Parquet file that any SQL engine reads.
//!
//! ```text
//! message vmar_fingerprints {
//!   required fixed_len_byte_array(20) hash;     SHA-1 of the block's bytes
//!   required int32 variant;                     which content of this hash: 0 unless contents collide
//!   required int32 block (INTEGER(32, false));  where in the image, in blocks of 4,096 bytes
//! }
//! ```
//!
//! One row a non-zero block, sorted by (hash, variant, block) and declared so, compressed with zstd. The key-value
//! metadata name the image: `vmar.format` (1), `vmar.library`, `vmar.domain`, `vmar.image`, `vmar.image_id`,
//! `vmar.generation`, `vmar.size`, `vmar.digest`, `vmar.algorithm`.
//!
//! Two rows with the same hash and variant, in whatever images of one sharing domain, are the same content, byte for
//! byte. What two images share is therefore
//! `select count(*) from a join (select distinct hash, variant from b) using (hash, variant)`.
//!
//! A run never changes; the catalog holds its size and CRC-32C, and a reader checks them before it believes a row.

use super::{Algorithm, Hash, Row};
use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use parquet::basic::{Compression, Encoding, ZstdLevel};
use parquet::column::reader::{ColumnReaderImpl, get_typed_column_reader};
use parquet::data_type::{ByteArray, FixedLenByteArray, FixedLenByteArrayType, Int32Type};
use parquet::errors::ParquetError;
use parquet::file::metadata::{KeyValue, SortingColumn};
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::ColumnPath;
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What to do about a run that cannot be used.
const MEND: &str = "restore it from a backup, or make it anew with 'vmar library rebuild'";
/// The schema, as above.
const SCHEMA: &str = "message vmar_fingerprints {
    required fixed_len_byte_array(20) hash;
    required int32 variant;
    required int32 block (INTEGER(32, false));
}";
/// The version of the run that this code reads and writes.
const VERSION: u32 = 1;
/// Rows of a row group: 28 MiB in memory while it is written.
const ROWS_PER_GROUP: usize = 1 << 20;
/// Rows that are decoded at a time.
const ROWS_PER_BATCH: usize = 8192;

/// Whose fingerprints these are.
#[derive(Clone, Debug)]
pub struct Meta<'a> {
    /// UUID of the library.
    pub library: &'a str,
    /// Sharing domain.
    pub domain: &'a str,
    /// Name of the image.
    pub image: &'a str,
    /// ID of the image.
    pub image_id: u32,
    /// Generation of the image.
    pub generation: u64,
    /// Bytes of the image.
    pub size: u64,
    /// Content digest of the image.
    pub digest: [u8; 32],
    /// How the blocks were hashed.
    pub algorithm: Algorithm,
}

/// Size and checksum of a run's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Bytes.
    pub bytes: u64,
    /// CRC-32C of the bytes.
    pub crc32c: u32,
}

/// Writes a run to a new file, in pieces. The caller makes it durable and moves it in place.
pub struct Writer {
    path: PathBuf,
    parquet: SerializedFileWriter<Stamped<BufWriter<File>>>,
    group: Vec<Row>,
    last: Option<Row>,
}

impl Writer {
    /// Starts the file.
    pub fn create(path: &Path, meta: &Meta) -> Result<Writer> {
        let mut options = File::options();
        let file = options.write(true).create_new(true).open(path).map_err(|e| Error::io(path, "create it", e))?;
        let file = Stamped { inner: BufWriter::with_capacity(1 << 20, file), stamp: Stamp { bytes: 0, crc32c: 0 } };
        let start =
            || SerializedFileWriter::new(file, Arc::new(parse_message_type(SCHEMA)?), Arc::new(properties(meta)?));
        let parquet = start().map_err(|e| parquet_error(path, "write", e))?;
        Ok(Writer { path: path.to_path_buf(), parquet, group: Vec::new(), last: None })
    }

    /// Appends rows; they come in order.
    pub fn push(&mut self, rows: &[Row]) -> Result<()> {
        if !self.last.iter().chain(rows).is_sorted_by(|a, b| a < b) {
            return Err(corrupt(&self.path, "its rows came out of order"));
        }
        self.last = rows.last().copied().or(self.last);
        for row in rows {
            self.group.push(*row);
            if self.group.len() == ROWS_PER_GROUP {
                self.end_group()?;
            }
        }
        Ok(())
    }

    fn end_group(&mut self) -> Result<()> {
        write_group(&mut self.parquet, &self.group).map_err(|e| parquet_error(&self.path, "write", e))?;
        self.group.clear();
        Ok(())
    }

    /// Writes what is left.
    pub fn finish(mut self) -> Result<Stamp> {
        if !self.group.is_empty() {
            self.end_group()?;
        }
        let mut file = self.parquet.into_inner().map_err(|e| parquet_error(&self.path, "write", e))?;
        file.flush().map_err(|e| Error::io(&self.path, "write", e))?;
        Ok(file.stamp)
    }
}

fn write_group(
    parquet: &mut SerializedFileWriter<Stamped<BufWriter<File>>>,
    group: &[Row],
) -> Result<(), ParquetError> {
    let mut columns = parquet.next_row_group()?;
    if let Some(mut column) = columns.next_column()? {
        // One allocation for all hashes; the values are slices of it.
        let all = ByteArray::from(group.iter().flat_map(|r| r.hash).collect::<Vec<u8>>());
        let values: Vec<_> = (0..group.len()).map(|i| FixedLenByteArray::from(all.slice(i * 20, 20))).collect();
        column.typed::<FixedLenByteArrayType>().write_batch(&values, None, None)?;
        column.close()?;
    }
    for value in [|r: &Row| r.variant, |r: &Row| r.block] {
        if let Some(mut column) = columns.next_column()? {
            let values: Vec<i32> = group.iter().map(|r| value(r).cast_signed()).collect();
            column.typed::<Int32Type>().write_batch(&values, None, None)?;
            column.close()?;
        }
    }
    columns.close().map(drop)
}

fn properties(meta: &Meta) -> Result<WriterProperties, ParquetError> {
    let pair = |key: &str, value: String| KeyValue::new(format!("vmar.{key}"), value);
    let sorted_by = |column_idx| SortingColumn { column_idx, descending: false, nulls_first: false };
    Ok(WriterProperties::builder()
        .set_created_by(concat!("vmar ", env!("CARGO_PKG_VERSION")).to_string())
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(1)?))
        .set_dictionary_enabled(false)
        .set_column_dictionary_enabled(ColumnPath::from("variant"), true)
        .set_encoding(Encoding::PLAIN)
        .set_statistics_enabled(EnabledStatistics::Page)
        .set_max_row_group_row_count(Some(ROWS_PER_GROUP))
        .set_sorting_columns(Some((0..3).map(sorted_by).collect()))
        .set_key_value_metadata(Some(vec![
            pair("format", VERSION.to_string()),
            pair("library", meta.library.to_string()),
            pair("domain", meta.domain.to_string()),
            pair("image", meta.image.to_string()),
            pair("image_id", meta.image_id.to_string()),
            pair("generation", meta.generation.to_string()),
            pair("size", meta.size.to_string()),
            pair("digest", hex(&meta.digest)),
            pair("algorithm", meta.algorithm.to_string()),
        ]))
        .build())
}

/// A writer that keeps count and checksum.
struct Stamped<W> {
    inner: W,
    stamp: Stamp,
}

impl<W: Write> Write for Stamped<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        let written = bytes.get(..n).unwrap_or(bytes);
        self.stamp.crc32c = crc32c::crc32c_append(self.stamp.crc32c, written);
        self.stamp.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Reads the rows of a run one after the other; memory does not grow with the run.
pub struct Reader {
    path: PathBuf,
    file: SerializedFileReader<File>,
    next_group: usize,
    columns: Option<Columns>,
    batch: std::vec::IntoIter<Row>,
    last: Option<Row>,
    done: bool,
}

struct Columns {
    hash: ColumnReaderImpl<FixedLenByteArrayType>,
    variant: ColumnReaderImpl<Int32Type>,
    block: ColumnReaderImpl<Int32Type>,
}

impl Reader {
    /// Opens a run and checks that it is whole.
    ///
    /// # Errors
    /// `Corrupt` when size or checksum differ from `stamp`, `Unsupported` when a newer vmar wrote it.
    pub fn open(path: &Path, stamp: Stamp) -> Result<Reader> {
        let mut file = File::open(path).map_err(|e| Error::io(path, "open it", e).mend(MEND))?;
        if stamp_of(&mut file).map_err(|e| Error::io(path, "read", e))? != stamp {
            return Err(corrupt(path, "its checksum is wrong"));
        }
        let file = SerializedFileReader::new(file).map_err(|e| parquet_error(path, "read", e))?;
        check_version(path, &file)?;
        Ok(Reader {
            path: path.to_path_buf(),
            file,
            next_group: 0,
            columns: None,
            batch: Vec::new().into_iter(),
            last: None,
            done: false,
        })
    }

    /// Rows in the file.
    pub fn rows(&self) -> u64 {
        u64::try_from(self.file.metadata().file_metadata().num_rows()).unwrap_or(0)
    }

    /// The next batch of rows, empty at the end.
    fn next_batch(&mut self) -> Result<Vec<Row>, ParquetError> {
        loop {
            if self.columns.is_none() {
                if self.next_group >= self.file.num_row_groups() {
                    return Ok(Vec::new());
                }
                self.columns = Some(Columns::open(&self.file, self.next_group)?);
                self.next_group += 1;
            }
            if let Some(columns) = &mut self.columns {
                let rows = columns.read()?;
                if !rows.is_empty() {
                    return Ok(rows);
                }
                self.columns = None;
            }
        }
    }

    fn next_row(&mut self) -> Result<Option<Row>> {
        let row = match self.batch.next() {
            Some(row) => row,
            None => {
                self.batch = self.next_batch().map_err(|e| parquet_error(&self.path, "read", e))?.into_iter();
                let Some(row) = self.batch.next() else { return Ok(None) };
                row
            }
        };
        if self.last.is_some_and(|last| last >= row) {
            return Err(corrupt(&self.path, "its rows are not in order"));
        }
        self.last = Some(row);
        Ok(Some(row))
    }
}

impl Iterator for Reader {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Result<Row>> {
        if self.done {
            return None;
        }
        let out = self.next_row().transpose();
        self.done = !matches!(out, Some(Ok(_)));
        out
    }
}

impl Columns {
    fn open(file: &SerializedFileReader<File>, group: usize) -> Result<Columns, ParquetError> {
        let group = file.get_row_group(group)?;
        Ok(Columns {
            hash: get_typed_column_reader(group.get_column_reader(0)?),
            variant: get_typed_column_reader(group.get_column_reader(1)?),
            block: get_typed_column_reader(group.get_column_reader(2)?),
        })
    }

    fn read(&mut self) -> Result<Vec<Row>, ParquetError> {
        let (mut hashes, mut variants, mut blocks) = (Vec::new(), Vec::new(), Vec::new());
        self.hash.read_records(ROWS_PER_BATCH, None, None, &mut hashes)?;
        self.variant.read_records(ROWS_PER_BATCH, None, None, &mut variants)?;
        self.block.read_records(ROWS_PER_BATCH, None, None, &mut blocks)?;
        if hashes.len() != variants.len() || hashes.len() != blocks.len() {
            return Err(ParquetError::General("its columns differ in length".to_string()));
        }
        let row = |((hash, variant), block): ((FixedLenByteArray, i32), i32)| {
            let hash = Hash::try_from(hash.data()).map_err(|_| ParquetError::General("a hash has 20 bytes".into()))?;
            Ok(Row { hash, variant: variant.cast_unsigned(), block: block.cast_unsigned() })
        };
        hashes.into_iter().zip(variants).zip(blocks).map(row).collect()
    }
}

/// Size and checksum of a file, read from its start.
fn stamp_of(file: &mut File) -> io::Result<Stamp> {
    let mut stamp = Stamp { bytes: 0, crc32c: 0 };
    let mut buf = vec![0; 1 << 20];
    file.rewind()?;
    loop {
        match file.read(&mut buf)? {
            0 => return Ok(stamp),
            n => {
                stamp.crc32c = crc32c::crc32c_append(stamp.crc32c, buf.get(..n).unwrap_or(&buf));
                stamp.bytes += n as u64;
            }
        }
    }
}

fn check_version(path: &Path, file: &SerializedFileReader<File>) -> Result<()> {
    let metadata = file.metadata().file_metadata();
    let pairs = metadata.key_value_metadata().map_or(&[][..], Vec::as_slice);
    let version = pairs.iter().find(|p| p.key == "vmar.format").and_then(|p| p.value.as_deref()?.parse::<u32>().ok());
    match version {
        Some(VERSION) => {}
        Some(newer) if newer > VERSION => {
            let cause = format!("fingerprint run format {newer}, this vmar knows up to {VERSION}");
            return Err(Error::file(ErrorKind::Unsupported, path, cause).mend("use a newer vmar"));
        }
        _ => return Err(corrupt(path, "not a fingerprint run")),
    }
    let schema = parse_message_type(SCHEMA).map_err(|e| parquet_error(path, "read", e))?;
    if metadata.schema() != &schema {
        return Err(corrupt(path, "its columns are not those of a fingerprint run"));
    }
    Ok(())
}

fn corrupt(path: &Path, cause: &str) -> Error {
    Error::file(ErrorKind::Corrupt, path, cause).mend(MEND)
}

fn parquet_error(path: &Path, what: &str, e: ParquetError) -> Error {
    match e {
        ParquetError::External(source) => match source.downcast::<io::Error>() {
            Ok(io) => Error::io(path, what, *io),
            Err(other) => corrupt(path, &other.to_string()),
        },
        other => corrupt(path, &other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta() -> Meta<'static> {
        Meta {
            library: "00",
            domain: "default",
            image: "web",
            image_id: 3,
            generation: 1,
            size: 4096,
            digest: [9; 32],
            algorithm: Algorithm::Sha1,
        }
    }

    fn rows(n: u32) -> Vec<Row> {
        let mut rows: Vec<Row> = (0..n)
            .map(|i| Row {
                hash: super::super::hash_block(Algorithm::Sha1, &(i / 3).to_le_bytes()),
                variant: i % 2,
                block: !i,
            })
            .collect();
        rows.sort();
        rows
    }

    fn write(path: &Path, rows: &[Row]) -> Stamp {
        let mut writer = Writer::create(path, &meta()).unwrap();
        rows.chunks(300_000).for_each(|part| writer.push(part).unwrap());
        writer.finish().unwrap()
    }

    #[test]
    fn what_was_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        for n in [0, 1, 8191, 8193, 1_100_000] {
            let path = dir.path().join(format!("{n}"));
            let stamp = write(&path, &rows(n));
            assert_eq!(stamp.bytes, std::fs::metadata(&path).unwrap().len());
            let reader = Reader::open(&path, stamp).unwrap();
            assert_eq!(reader.rows(), u64::from(n));
            let back: Vec<Row> = reader.map(Result::unwrap).collect();
            assert!(back == rows(n), "{n} rows");
        }
    }

    #[test]
    fn a_single_changed_byte_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        let stamp = write(&path, &rows(100));
        let good = std::fs::read(&path).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            std::fs::write(&path, &bad).unwrap();
            assert_eq!(Reader::open(&path, stamp).err().unwrap().kind(), ErrorKind::Corrupt, "byte {at}");
        }
        std::fs::write(&path, &good[..good.len() - 1]).unwrap();
        assert_eq!(Reader::open(&path, stamp).err().unwrap().kind(), ErrorKind::Corrupt);
    }

    #[test]
    fn another_file_with_the_right_checksum_is_no_run() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r");
        std::fs::write(&path, "hello").unwrap();
        let stamp = stamp_of(&mut File::open(&path).unwrap()).unwrap();
        assert_eq!(Reader::open(&path, stamp).err().unwrap().kind(), ErrorKind::Corrupt);
    }
}
