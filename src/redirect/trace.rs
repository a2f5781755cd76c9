//! Traces of base reads: which blocks a VM asked for, when, in canonical coordinates (image, block).
//!
//! `TRACE.md` beside this file specifies the format. It is made for a process that may be killed at any moment: the
//! header is written first, then records of one size are appended, and only an orderly end writes a trailer. A
//! reader takes every whole record and says how the trace ended.

use crate::codec::Cursor;
use crate::error::{Error, ErrorKind, Result};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

/// Version of the format that this vmar writes, and the newest that it reads.
pub const VERSION: u32 = 1;

pub(super) const MAGIC: [u8; 8] = *b"vmar-trc";
const HEADER_BYTES: usize = 96;
const HEADER_LEN: u32 = 96;
const RECORD_BYTES: usize = 24;
const RECORD_LEN: u32 = 24;

/// What stands in place of the time of a record in the trailer.
const TRAILER_MARK: u64 = u64::MAX;

/// Bytes that the writer collects; whole records, so that each write ends at a record.
const BUFFER_BYTES: usize = RECORD_BYTES * 1024;

/// Which VM disk was traced, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceHeader {
    /// UUID of the library: image IDs of different libraries cannot be compared.
    pub library: [u8; 16],
    /// ID of the image that the VM was started from.
    pub image: u32,
    /// Generation of that image.
    pub generation: u64,
    /// Content digest of that image.
    pub digest: [u8; 32],
    /// Start of the trace, nanoseconds since 1970 (UTC).
    pub start_ns: u64,
}

/// One read of base data: a range of one image, after redirection (paper, section 3.2: a descendant request).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Microseconds since the start of the trace.
    pub time_us: u64,
    /// Number of the guest's request. All descendants of a request have its number; numbers wrap.
    pub request: u32,
    /// ID of the image that holds the canonical copy.
    pub image: u32,
    /// First block there, 4 KiB each.
    pub block: u32,
    /// Blocks, at least 1.
    pub count: u32,
}

/// How a trace ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceEnd {
    /// In order. So many records were dropped because the disk under the trace was too slow.
    Finished {
        /// Records that are missing.
        dropped: u64,
    },
    /// Somewhere: the process was killed, or still runs. A torn last record was left out.
    Cut {
        /// Bytes of that record, 0 if there is none.
        torn_bytes: usize,
    },
}

impl TraceHeader {
    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0u8; HEADER_BYTES];
        out[0..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&HEADER_LEN.to_le_bytes());
        out[16..20].copy_from_slice(&RECORD_LEN.to_le_bytes());
        out[20..24].copy_from_slice(&self.image.to_le_bytes());
        out[24..40].copy_from_slice(&self.library);
        out[40..48].copy_from_slice(&self.generation.to_le_bytes());
        out[48..80].copy_from_slice(&self.digest);
        out[80..88].copy_from_slice(&self.start_ns.to_le_bytes());
        let crc = crc32c::crc32c(&out[..92]);
        out[92..96].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// The fields, or what is wrong with them; `None` past the end.
    fn decode(bytes: &[u8]) -> Option<Result<TraceHeader, (ErrorKind, String)>> {
        let corrupt = |what: &str| Some(Err((ErrorKind::Corrupt, what.to_string())));
        let mut c = Cursor::new(bytes);
        if c.array()? != MAGIC {
            return corrupt("this is no trace of vmar");
        }
        let version = c.u32_le()?;
        if version > VERSION {
            let what = format!("version {version} of the trace format; this vmar knows versions up to {VERSION}");
            return Some(Err((ErrorKind::Unsupported, what)));
        }
        if version != VERSION || (c.u32_le()?, c.u32_le()?) != (HEADER_LEN, RECORD_LEN) {
            return corrupt("version, header length or record length is wrong");
        }
        let image = c.u32_le()?;
        let header = TraceHeader {
            library: c.array()?,
            image,
            generation: c.u64_le()?,
            digest: c.array()?,
            start_ns: c.u64_le()?,
        };
        let reserved = c.u32_le()?;
        if crc32c::crc32c(bytes.get(..c.position())?) != c.u32_le()? {
            return corrupt("the checksum of the header is wrong");
        }
        if reserved != 0 {
            return corrupt("reserved bytes of the header are not zero");
        }
        Some(Ok(header))
    }
}

impl Record {
    fn encode(&self) -> [u8; RECORD_BYTES] {
        let mut out = [0u8; RECORD_BYTES];
        out[0..8].copy_from_slice(&self.time_us.min(TRAILER_MARK - 1).to_le_bytes());
        out[8..12].copy_from_slice(&self.request.to_le_bytes());
        out[12..16].copy_from_slice(&self.image.to_le_bytes());
        out[16..20].copy_from_slice(&self.block.to_le_bytes());
        out[20..24].copy_from_slice(&self.count.to_le_bytes());
        out
    }

    fn decode(raw: &[u8; RECORD_BYTES]) -> Option<Record> {
        let mut c = Cursor::new(raw);
        let time_us = c.u64_le()?;
        let [request, image, block, count] = [c.u32_le()?, c.u32_le()?, c.u32_le()?, c.u32_le()?];
        Some(Record { time_us, request, image, block, count })
    }

    /// The block after the range; up to 2^32.
    pub fn end(&self) -> u64 {
        u64::from(self.block) + u64::from(self.count)
    }
}

/// {mark, dropped, CRC-32C of all records, CRC-32C of the 20 bytes before}.
fn trailer(dropped: u64, records_crc: u32) -> [u8; RECORD_BYTES] {
    let mut out = [0u8; RECORD_BYTES];
    out[0..8].copy_from_slice(&TRAILER_MARK.to_le_bytes());
    out[8..16].copy_from_slice(&dropped.to_le_bytes());
    out[16..20].copy_from_slice(&records_crc.to_le_bytes());
    let crc = crc32c::crc32c(&out[..20]);
    out[20..24].copy_from_slice(&crc.to_le_bytes());
    out
}

/// Writes a trace. Records are collected in memory (24 KiB); [`TraceWriter::flush`] hands them on.
#[derive(Debug)]
pub struct TraceWriter<W: Write> {
    out: BufWriter<W>,
    crc: u32,
}

impl<W: Write> TraceWriter<W> {
    /// Starts a trace: the header is written at once, so that a trace that is cut off later can be read.
    pub fn new(out: W, header: &TraceHeader) -> io::Result<Self> {
        let mut out = BufWriter::with_capacity(BUFFER_BYTES, out);
        out.write_all(&header.encode())?;
        out.flush()?;
        Ok(TraceWriter { out, crc: 0 })
    }

    /// Appends a record.
    pub fn record(&mut self, record: &Record) -> io::Result<()> {
        let raw = record.encode();
        self.crc = crc32c::crc32c_append(self.crc, &raw);
        self.out.write_all(&raw)
    }

    /// Hands everything on, so that it outlives this process.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// Ends the trace in order; `dropped` records are missing.
    pub fn finish(mut self, dropped: u64) -> io::Result<W> {
        self.out.write_all(&trailer(dropped, self.crc))?;
        self.out.flush()?;
        self.out.into_inner().map_err(io::IntoInnerError::into_error)
    }
}

/// Reads a trace: an iterator over its records, which then knows how the trace ended.
#[derive(Debug)]
pub struct TraceReader<R: Read> {
    input: BufReader<R>,
    path: PathBuf,
    header: TraceHeader,
    crc: u32,
    records: u64,
    end: Option<TraceEnd>,
    failed: bool,
}

impl<R: Read> TraceReader<R> {
    /// Reads the header. `path` is only for messages.
    ///
    /// # Errors
    /// `Corrupt` for anything but a trace (one that was cut off inside its header included), `Unsupported` for one
    /// of a newer vmar.
    pub fn new(input: R, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut input = BufReader::new(input);
        let mut raw = [0u8; HEADER_BYTES];
        let len = read_full(&mut input, &mut raw).map_err(|e| Error::io(path, "read the trace", e))?;
        let bad = |(kind, what): (ErrorKind, String)| {
            let mend = match kind {
                ErrorKind::Unsupported => "use the newer vmar that wrote it",
                _ => "name a file that 'vmar serve --record' wrote",
            };
            Error::file(kind, path, what).mend(mend)
        };
        let cut = || bad((ErrorKind::Corrupt, "cut off inside its header".into()));
        let header = TraceHeader::decode(&raw[..len]).ok_or_else(cut)?.map_err(bad)?;
        Ok(TraceReader { input, path: path.to_path_buf(), header, crc: 0, records: 0, end: None, failed: false })
    }

    /// What was traced.
    pub fn header(&self) -> &TraceHeader {
        &self.header
    }

    /// How the trace ended; `None` until the last record was read.
    pub fn end(&self) -> Option<TraceEnd> {
        self.end
    }

    fn step(&mut self) -> Result<Option<Record>> {
        let mut raw = [0u8; RECORD_BYTES];
        let len = self.fill(&mut raw)?;
        let record = Record::decode(&raw).filter(|_| len == RECORD_BYTES);
        match record {
            None => {
                self.end = Some(TraceEnd::Cut { torn_bytes: len });
                Ok(None)
            }
            Some(record) if record.time_us == TRAILER_MARK => {
                self.end = Some(self.check_trailer(&raw)?);
                Ok(None)
            }
            Some(record) if record.count == 0 || record.end() > 1 << 32 => {
                Err(self.corrupt(format!("record {} cannot be right", self.records)))
            }
            Some(record) => {
                self.crc = crc32c::crc32c_append(self.crc, &raw);
                self.records += 1;
                Ok(Some(record))
            }
        }
    }

    /// `raw` starts with the mark.
    fn check_trailer(&mut self, raw: &[u8; RECORD_BYTES]) -> Result<TraceEnd> {
        let [_, _, _, _, _, _, _, _, a, b, c, d, e, f, g, h, ..] = *raw;
        let dropped = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
        if *raw != trailer(dropped, self.crc) {
            return Err(self.corrupt("the checksum at its end is wrong"));
        }
        if self.fill(&mut [0])? != 0 {
            return Err(self.corrupt("something follows after its end"));
        }
        Ok(TraceEnd::Finished { dropped })
    }

    fn fill(&mut self, buf: &mut [u8]) -> Result<usize> {
        read_full(&mut self.input, buf).map_err(|e| Error::io(&self.path, "read the trace", e))
    }

    fn corrupt(&self, what: impl std::fmt::Display) -> Error {
        Error::file(ErrorKind::Corrupt, &self.path, what).mend("record the trace again")
    }
}

impl<R: Read> Iterator for TraceReader<R> {
    type Item = Result<Record>;

    fn next(&mut self) -> Option<Result<Record>> {
        if self.failed || self.end.is_some() {
            return None;
        }
        let step = self.step();
        self.failed = step.is_err();
        step.transpose()
    }
}

/// Reads until `buf` is full or the input ends.
fn read_full(input: &mut impl Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buf.len() {
        match input.read(&mut buf[len..]) {
            Ok(0) => break,
            Ok(n) => len += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(len)
}
