//! The content digest: which bytes an image holds, whatever its file looks like.
//!
//! The digest of a disk of `size` bytes is the BLAKE3 hash of
//!
//! ```text
//! "vmar content digest 1\n"      22 bytes
//! size                           u64, little-endian
//! for each 1 MiB chunk that is not all zero, in ascending order:
//!     index of the chunk         u64, little-endian
//!     BLAKE3 hash of its bytes   32 bytes; the last chunk may be short
//! ```
//!
//! Holes and written zeros are the same to it, so that a sparse copy has the same digest; and it can be computed in
//! parallel without reading holes.

/// Bytes of a chunk.
pub const CHUNK_SIZE: u64 = 1 << 20;
/// The same, as a buffer length.
pub const CHUNK_BYTES: usize = 1 << 20;

/// What the hash starts with.
const DOMAIN: &[u8] = b"vmar content digest 1\n";

/// Hash of one chunk's bytes.
pub fn chunk(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

/// The digest of an image of `size` bytes, given `(index, hash)` of its non-zero chunks in ascending order.
pub fn image(size: u64, chunks: &[(u64, [u8; 32])]) -> [u8; 32] {
    debug_assert!(chunks.is_sorted_by(|a, b| a.0 < b.0));
    let mut hasher = blake3::Hasher::new();
    hasher.update(DOMAIN).update(&size.to_le_bytes());
    for (index, hash) in chunks {
        hasher.update(&index.to_le_bytes()).update(hash);
    }
    *hasher.finalize().as_bytes()
}
