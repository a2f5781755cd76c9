//! A migration stream without its pages: everything else, and where the pages stood.
//!
//! With the pages put back ([`Piece`]) it is what QEMU wrote, byte for byte, if QEMU wrote each page once: as it does when the VM
//! stands still. A page that came twice comes twice again, with its last content.

use crate::migrate::stream::{Kind, PAGE_SIZE, Place};
use crate::migrate::varint;
use crate::store::manifest::MemoryBlock;

/// Pieces of this many pages at most, so that several can be made at once.
pub const PAGES_MAX: u64 = 1024;

/// A piece of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// Bytes as they were.
    Bytes(Vec<u8>),
    /// Records of pages that follow each other in a block.
    Pages {
        /// Which block.
        block: u16,
        /// The first page of it.
        first: u64,
        /// How many.
        count: u64,
        /// The first record names the block.
        named: bool,
    },
}

/// A stream without its pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Skeleton {
    /// In order.
    pub pieces: Vec<Piece>,
}

impl Skeleton {
    /// The next bytes.
    pub fn bytes(&mut self, more: &[u8]) {
        if let Some(Piece::Bytes(bytes)) = self.pieces.last_mut() {
            bytes.extend_from_slice(more);
        } else if !more.is_empty() {
            self.pieces.push(Piece::Bytes(more.to_vec()));
        }
    }

    /// The next record is of this page.
    pub fn page(&mut self, place: Place) {
        let number = place.offset / PAGE_SIZE;
        if let Some(Piece::Pages { block, first, count, .. }) = self.pieces.last_mut()
            && *block == place.block
            && *first + *count == number
            && *count < PAGES_MAX
            && !place.named
        {
            *count += 1;
            return;
        }
        self.pieces.push(Piece::Pages { block: place.block, first: number, count: 1, named: place.named });
    }

    /// Whether all pages are in these blocks.
    pub fn fits(&self, blocks: &[MemoryBlock]) -> bool {
        self.pieces.iter().all(|piece| match piece {
            Piece::Bytes(_) => true,
            Piece::Pages { block, first, count, .. } => blocks.get(usize::from(*block)).is_some_and(|block| {
                let pages = block.len / PAGE_SIZE;
                *count > 0 && *count <= PAGES_MAX && first.checked_add(*count).is_some_and(|end| end <= pages)
            }),
        })
    }

    /// As bytes: for each piece its bytes' number times two and the bytes, or, odd, block, first and count.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for piece in &self.pieces {
            match piece {
                Piece::Bytes(bytes) => {
                    varint::write(&mut out, (bytes.len() as u64) << 1);
                    out.extend(bytes);
                }
                Piece::Pages { block, first, count, named } => {
                    varint::write(&mut out, u64::from(*block) << 2 | u64::from(*named) << 1 | 1);
                    varint::write(&mut out, *first);
                    varint::write(&mut out, *count);
                }
            }
        }
        out
    }

    /// The inverse; none when they are no such bytes.
    pub fn decode(mut bytes: &[u8]) -> Option<Skeleton> {
        let mut pieces = Vec::new();
        while !bytes.is_empty() {
            let word = varint::read(&mut bytes)?;
            pieces.push(if word & 1 == 0 {
                let (own, rest) = bytes.split_at_checked(usize::try_from(word >> 1).ok()?)?;
                bytes = rest;
                Piece::Bytes(own.to_vec())
            } else {
                let block = u16::try_from(word >> 2).ok()?;
                let (first, count) = (varint::read(&mut bytes)?, varint::read(&mut bytes)?);
                Piece::Pages { block, first, count, named: word & 2 != 0 }
            });
        }
        Some(Skeleton { pieces })
    }
}

impl Piece {
    /// Appends the bytes of the piece to a stream. `page` fills in a page of a block, and says whether it is zero.
    ///
    /// # Errors
    /// What `page` says.
    pub fn write<E>(
        &self,
        blocks: &[MemoryBlock],
        out: &mut Vec<u8>,
        mut page: impl FnMut(&MemoryBlock, u64, &mut [u8; 4096]) -> Result<bool, E>,
    ) -> Result<(), E> {
        let (block, first, count, named) = match self {
            Piece::Bytes(bytes) => {
                out.extend_from_slice(bytes);
                return Ok(());
            }
            Piece::Pages { block, first, count, named } => (*block, *first, *count, *named),
        };
        let Some(of) = blocks.get(usize::from(block)) else { return Ok(()) };
        let mut content = [0; 4096];
        for n in 0..count {
            let place = Place { block, offset: (first + n) * PAGE_SIZE, named: named && n == 0 };
            if page(of, first + n, &mut content)? {
                place.write_header(Kind::Zero, &of.name, out);
                out.push(0);
            } else {
                place.write_header(Kind::Data, &of.name, out);
                out.extend_from_slice(&content);
            }
        }
        Ok(())
    }
}
