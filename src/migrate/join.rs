//! The stream out of its frames, each compared with its digest before anybody gets a byte of it.

use super::frame::{Decoder, Fault, Pages};
use super::known::Received;
use super::wire::{Digest, Frame, chain};
use crate::error::{Error, ErrorKind, Result};
use crate::units::to_usize;
use std::cell::RefCell;

/// Makes the stream of frames.
#[derive(Debug)]
pub struct Joiner<P> {
    decoder: Decoder,
    pages: Received<P>,
    digest: Digest,
    next: u64,
    out: Vec<u8>,
}

impl<P: Pages> Joiner<P> {
    /// Of a stream that begins, with what is here.
    pub fn new(pages: Received<P>) -> Joiner<P> {
        Joiner { decoder: Decoder::default(), pages, digest: [0; 32], next: 0, out: Vec::new() }
    }

    /// What the last frame stood for.
    pub fn out(&self) -> &[u8] {
        &self.out
    }

    /// Makes the part that a frame stands for. False: it is to come again.
    ///
    /// # Errors
    /// It is no frame, or not the next one.
    pub fn join(&mut self, frame: &Frame) -> Result<bool> {
        if frame.number != self.next {
            return Err(strange("frames came out of order"));
        }
        let ops = unpack(&frame.ops, frame.ops_len)?;
        let literals = unpack(&frame.literals, frame.literals_len)?;
        self.out.clear();
        let decoder = match self.decoder.apply(&ops, &literals, &mut self.pages, &mut self.out) {
            Ok(decoder) => decoder,
            Err(Fault::Broken(what)) => return Err(strange(what)),
            Err(Fault::Missing(source)) => {
                log::info!("frame {}: {source:?} is not here", frame.number);
                return Ok(false);
            }
        };
        let digest = chain(&self.digest, blake3::hash(&self.out).as_bytes());
        if digest != frame.digest {
            log::warn!("frame {}: a page that is here is not what the sender believes it to be", frame.number);
            return Ok(false);
        }
        self.decoder = decoder;
        self.digest = digest;
        self.next += 1;
        self.pages.keep(&literals);
        Ok(true)
    }
}

/// Lengths were capped when the message was read.
fn unpack(packed: &[u8], len: u32) -> Result<Vec<u8>> {
    let len = to_usize(len.into());
    // With what zstd needs of memory, once for each thread.
    thread_local!(static ZSTD: RefCell<zstd::bulk::Decompressor<'static>> = RefCell::default());
    let bytes = ZSTD.with_borrow_mut(|zstd| zstd.decompress(packed, len));
    let bytes = bytes.map_err(|e| strange(&format!("a frame cannot be unpacked: {e}")))?;
    if bytes.len() == len { Ok(bytes) } else { Err(strange("a frame is shorter than it says")) }
}

/// What no sender says.
pub(super) fn strange(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, "sender", what).mend("look at its log; the VM runs on there")
}
