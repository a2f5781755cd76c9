//! Writes the trace of base reads without ever holding up a read.

use super::Base;
use super::plan::{Piece, Source};
use super::trace::{MAGIC, Record, TraceHeader, TraceWriter};
use crate::error::{Error, ErrorKind, Result};
use crate::units::BLOCK_SIZE;
use std::fs::File;
use std::io::{BufWriter, Read, Seek};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Records that may wait for the writing thread (24 bytes each). Past that they are dropped and counted: a slow disk under
/// the trace must not slow the guest down.
const QUEUE: usize = 1 << 16;

/// How often what was recorded reaches the file.
const FLUSH_EVERY: Duration = Duration::from_millis(200);

type Writer = TraceWriter<BufWriter<File>>;

/// A trace being written.
#[derive(Debug)]
pub struct Recorder {
    start: Instant,
    requests: AtomicU32,
    dropped: AtomicU64,
    sender: Mutex<Option<SyncSender<Record>>>,
    thread: Mutex<Option<JoinHandle<std::io::Result<Writer>>>>,
    path: std::path::PathBuf,
}

impl Recorder {
    /// Starts a trace in a new file; an existing trace is replaced, and no other file.
    pub fn create(path: &Path, header: &TraceHeader) -> Result<Self> {
        let failed = |e| Error::io(path, "write the trace", e);
        let mut file =
            File::options().read(true).write(true).create(true).truncate(false).open(path).map_err(failed)?;
        refuse_other_file(&mut file, path)?;
        if file.metadata().map_err(failed)?.is_file() {
            file.set_len(0).and_then(|()| file.rewind()).map_err(failed)?;
        }
        let writer = TraceWriter::new(BufWriter::new(file), header).map_err(failed)?;
        let (sender, receiver) = sync_channel(QUEUE);
        let thread = std::thread::Builder::new()
            .name("vmar-trace".into())
            .spawn(move || write(writer, receiver))
            .map_err(failed)?;
        Ok(Recorder {
            start: Instant::now(),
            requests: AtomicU32::new(0),
            dropped: AtomicU64::new(0),
            sender: Mutex::new(Some(sender)),
            thread: Mutex::new(Some(thread)),
            path: path.to_path_buf(),
        })
    }

    /// Records the base reads of one request, in canonical coordinates. Zeros and the overlay leave no record.
    pub fn record(&self, base: &Base, pieces: &[Piece]) {
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(sender) = sender.as_ref() else { return };
        let time_us = u64::try_from(self.start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let request = self.requests.fetch_add(1, Ordering::Relaxed);
        for piece in pieces {
            let Source::Image { target, offset } = piece.source else { continue };
            let first = offset / BLOCK_SIZE;
            let count = (offset + piece.len as u64).div_ceil(BLOCK_SIZE) - first;
            // An image has at most 2^32 blocks and a request at most 2^32 bytes, so both fit.
            let (Ok(block), Ok(count)) = (u32::try_from(first), u32::try_from(count)) else { continue };
            let record = Record { time_us, request, image: base.image_id(target).0, block, count };
            if let Err(TrySendError::Full(_)) = sender.try_send(record) {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Writes what is left and ends the trace.
    pub fn finish(&self) {
        drop(self.sender.lock().unwrap_or_else(PoisonError::into_inner).take());
        let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() else { return };
        let dropped = self.dropped.load(Ordering::Relaxed);
        let ended = match thread.join() {
            Ok(writer) => writer.and_then(|writer| writer.finish(dropped).map(drop)),
            Err(_) => Err(std::io::Error::other("the writing thread panicked")),
        };
        if let Err(e) = ended {
            log::error!("{}: the trace is incomplete: {e}", self.path.display());
        }
    }
}

/// A wrong name on the command line must not cost anybody an image: only an empty file or a trace is replaced.
fn refuse_other_file(file: &mut File, path: &Path) -> Result<()> {
    let failed = |e| Error::io(path, "look at it", e);
    let meta = file.metadata().map_err(failed)?;
    if meta.file_type().is_block_device() {
        return Err(Error::file(ErrorKind::Exists, path, "is a block device").mend("name another file for the trace"));
    }
    if !meta.is_file() || meta.len() == 0 {
        return Ok(());
    }
    let mut magic = Vec::new();
    file.take(MAGIC.len() as u64).read_to_end(&mut magic).map_err(failed)?;
    if magic == MAGIC {
        return Ok(());
    }
    Err(Error::file(ErrorKind::Exists, path, "is there already and is no trace")
        .mend("name another file for the trace"))
}

/// The writing thread: returns the writer when the recorder lets go of its end.
fn write(mut writer: Writer, records: Receiver<Record>) -> std::io::Result<Writer> {
    use std::sync::mpsc::RecvTimeoutError;
    let mut dirty = false;
    loop {
        match records.recv_timeout(FLUSH_EVERY) {
            Ok(record) => {
                writer.record(&record)?;
                dirty = true;
            }
            Err(RecvTimeoutError::Timeout) if dirty => {
                writer.flush()?;
                dirty = false;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(writer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_trace_or_an_empty_file_is_replaced() {
        let header = TraceHeader { library: [1; 16], image: 0, generation: 1, digest: [2; 32], start_ns: 3 };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let create = || Recorder::create(&path, &header);
        for precious in [&b"v"[..], b"vmar-tr", b"an image, by a slip of the fingers"] {
            std::fs::write(&path, precious).unwrap();
            assert_eq!(create().unwrap_err().kind(), ErrorKind::Exists);
            assert_eq!(std::fs::read(&path).unwrap(), precious);
        }
        std::fs::write(&path, b"").unwrap();
        create().unwrap().finish();
        let trace = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&trace[..], b"more"].concat()).unwrap();
        create().unwrap().finish();
        assert_eq!(std::fs::read(&path).unwrap(), trace, "an earlier trace goes, with all it had");
        std::fs::remove_file(&path).unwrap();
        create().unwrap().finish();
        assert_eq!(std::fs::read(&path).unwrap(), trace);
        assert!(Recorder::create(Path::new("/dev/null"), &header).is_ok());
    }
}
