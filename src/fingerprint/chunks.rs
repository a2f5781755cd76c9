//! The chunks of a content digest in a file: what is needed to compute the digest of an image that differs in a few
//! chunks, or to check a few chunks.
//!
//! ```text
//! "vmar-chk"  version u32  0 u32  then for each chunk that is not all zero, ascending: index u64, hash [32]
//! ```
//!
//! Little-endian. The catalog holds size and CRC-32C of the file. See [`super::digest`].

use crate::codec::Cursor;

const MAGIC: &[u8; 8] = b"vmar-chk";
/// The version that this code reads and writes.
const VERSION: u32 = 1;

/// Index and BLAKE3 hash of a chunk.
pub type Chunk = (u64, [u8; 32]);

/// The bytes of a file.
pub fn encode(chunks: &[Chunk]) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + chunks.len() * 40);
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend([0; 4]);
    for (index, hash) in chunks {
        out.extend(index.to_le_bytes());
        out.extend(hash);
    }
    out
}

/// The chunks in the bytes of a file.
///
/// # Errors
/// What is wrong with them, in a few words.
pub fn decode(bytes: &[u8]) -> Result<Vec<Chunk>, String> {
    let mut c = Cursor::new(bytes);
    match (c.array(), c.u32_le(), c.u32_le()) {
        (Some(magic), Some(VERSION), Some(0)) if magic == *MAGIC => {}
        (Some(magic), Some(newer), _) if magic == *MAGIC && newer > VERSION => {
            return Err(format!("chunk digests of format {newer}, this vmar knows up to {VERSION}"));
        }
        _ => return Err("not a file of chunk digests".to_string()),
    }
    let mut out = Vec::new();
    while c.position() < bytes.len() {
        out.push(c.u64_le().zip(c.array()).ok_or("it is cut off")?);
    }
    if out.is_sorted_by(|a: &Chunk, b| a.0 < b.0) { Ok(out) } else { Err("its chunks are not in order".to_string()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_and_back() {
        let chunks = vec![(0, [1; 32]), (7, [2; 32])];
        let bytes = encode(&chunks);
        assert_eq!(decode(&bytes).unwrap(), chunks);
        assert_eq!(decode(&encode(&[])).unwrap(), []);
        assert!(decode(&bytes[..bytes.len() - 1]).is_err() && decode(&bytes[..10]).is_err());
        let mut newer = bytes.clone();
        newer[8] = 2;
        assert!(decode(&newer).unwrap_err().contains("format 2"));
        assert!(decode(&encode(&[(7, [0; 32]), (7, [0; 32])])).is_err());
    }
}
