//! Changes to the bytes of a valid file, as a list: so an input is a seed and what was done to it, and dropping steps
//! makes it smaller.

use super::rng::Rng;
use serde::{Deserialize, Serialize};

/// One change. Places past the end are taken modulo the length.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Edit {
    /// Writes over what is there; past the end nothing is written.
    Put {
        at: u64,
        #[serde(with = "super::hex")]
        bytes: Vec<u8>,
    },
    /// Flips bits of a byte.
    Flip {
        at: u64,
        bits: u8,
    },
    /// Adds to an integer of this many bytes.
    Add {
        at: u64,
        size: u8,
        big_endian: bool,
        by: i64,
    },
    Insert {
        at: u64,
        #[serde(with = "super::hex")]
        bytes: Vec<u8>,
    },
    Remove {
        at: u64,
        len: u64,
    },
    /// Copies bytes over others.
    Copy {
        from: u64,
        to: u64,
        len: u64,
    },
    Truncate {
        len: u64,
    },
    Append {
        #[serde(with = "super::hex")]
        bytes: Vec<u8>,
    },
}

/// No edit makes a file longer than that.
const LEN_MAX: usize = 16 << 20;

fn place(at: u64, len: usize) -> usize {
    (at % (len.max(1) as u64)) as usize
}

impl Edit {
    pub fn apply(&self, file: &mut Vec<u8>) {
        let len = file.len();
        match self {
            Edit::Put { at, bytes } => {
                let at = place(*at, len);
                let n = bytes.len().min(len - at);
                file[at..at + n].copy_from_slice(&bytes[..n]);
            }
            Edit::Flip { at, bits } if len > 0 => file[place(*at, len)] ^= bits,
            Edit::Add { at, size, big_endian, by } => {
                let (at, size) = (place(*at, len), usize::from(*size).clamp(1, 8));
                let Some(raw) = file.get_mut(at..at + size) else { return };
                let mut wide = [0u8; 8];
                for (i, b) in raw.iter().enumerate() {
                    wide[if *big_endian { size - 1 - i } else { i }] = *b;
                }
                let sum = u64::from_le_bytes(wide).wrapping_add_signed(*by).to_le_bytes();
                for (i, b) in raw.iter_mut().enumerate() {
                    *b = sum[if *big_endian { size - 1 - i } else { i }];
                }
            }
            Edit::Insert { at, bytes } if len + bytes.len() <= LEN_MAX => {
                let at = place(*at, len + 1);
                file.splice(at..at, bytes.iter().copied());
            }
            Edit::Remove { at, len: n } => {
                let at = place(*at, len);
                let end = at.saturating_add(*n as usize).min(len);
                file.drain(at..end);
            }
            Edit::Copy { from, to, len: n } => {
                let (from, to) = (place(*from, len), place(*to, len));
                let n = (*n as usize).min(len - from).min(len - to);
                file.copy_within(from..from + n, to);
            }
            Edit::Truncate { len: n } => file.truncate((*n).min(LEN_MAX as u64) as usize),
            Edit::Append { bytes } if len + bytes.len() <= LEN_MAX => file.extend(bytes),
            _ => {}
        }
    }
}

/// Where a format keeps its numbers: (offset, bytes).
pub type Field = (u64, u8);

/// A random change to a file of this length. `fields` are hit more often than other places; lengths rarely change.
pub fn random(rng: &mut Rng, fields: &[Field], len: u64, big_endian: bool) -> Edit {
    let anywhere = |rng: &mut Rng| match rng.below(4) {
        0 => rng.below(512).min(len),
        1 => len.saturating_sub(rng.below(64)),
        _ => rng.below(len.max(1)),
    };
    let number = |rng: &mut Rng, size: u8| {
        let n = rng.edge();
        let bytes = if big_endian { n.to_be_bytes().to_vec() } else { n.to_le_bytes().to_vec() };
        let size = usize::from(size).clamp(1, 8);
        if big_endian { bytes[8 - size..].to_vec() } else { bytes[..size].to_vec() }
    };
    match rng.below(20) {
        0..=7 if !fields.is_empty() => {
            let (at, size) = rng.one_of(fields);
            match rng.below(3) {
                0 => Edit::Put { at, bytes: number(rng, size) },
                1 => {
                    let by = rng.one_of(&[1i64, -1, 8, -8, 64, -64, 512, 4096, 65536, -65536, 1 << 20]);
                    Edit::Add { at, size, big_endian, by }
                }
                _ => Edit::Flip { at: at + rng.below(size.into()), bits: 1 << rng.below(8) },
            }
        }
        0..=11 => Edit::Flip { at: anywhere(rng), bits: 1 << rng.below(8) },
        12 | 13 => {
            let (at, size) = (anywhere(rng) & !7, rng.one_of(&[1, 2, 4, 8]));
            Edit::Put { at, bytes: number(rng, size) }
        }
        14 => {
            let (at, n) = (anywhere(rng), 1 + rng.index(32));
            Edit::Put { at, bytes: rng.bytes(n) }
        }
        15 => Edit::Copy { from: anywhere(rng), to: anywhere(rng), len: 1 << rng.below(12) },
        16 => Edit::Truncate { len: anywhere(rng) },
        17 => Edit::Remove { at: anywhere(rng), len: 1 << rng.below(10) },
        18 => {
            let n = 1 << rng.below(8);
            Edit::Insert { at: anywhere(rng), bytes: rng.bytes(n) }
        }
        _ => {
            let n = 1 << rng.below(8);
            Edit::Append { bytes: rng.bytes(n) }
        }
    }
}

/// Changes a list of edits: mostly one more, sometimes one less or another.
pub fn mutate(rng: &mut Rng, edits: &mut Vec<Edit>, fields: &[Field], len: u64, big_endian: bool) {
    match rng.below(8) {
        0 if !edits.is_empty() => _ = edits.remove(rng.index(edits.len())),
        1 if !edits.is_empty() => {
            let i = rng.index(edits.len());
            edits[i] = random(rng, fields, len, big_endian);
        }
        _ if edits.len() < 24 => edits.push(random(rng, fields, len, big_endian)),
        _ => edits.clear(),
    }
}

/// What a file of this kind has in front of its body and behind it: vmar's files of pages begin with magic, version and the body's
/// length, and end with a checksum. What zstd packs between these is edited unpacked, too.
pub const HEADER: usize = 24;
pub const CHECKSUM: usize = 32;

/// What is done to a file with a packed body.
pub struct PackedEdits<'a> {
    /// To the body before it is packed.
    pub body: &'a [Edit],
    /// What the header says that the body is long, if not what it is.
    pub announced: Option<u64>,
    /// To the file, before it gets its checksum.
    pub file: &'a [Edit],
    /// To all of it.
    pub whole: &'a [Edit],
}

impl PackedEdits<'_> {
    /// The file with all that done to it.
    pub fn apply(&self, clean: &[u8]) -> Vec<u8> {
        let mut file = clean[..clean.len() - CHECKSUM].to_vec();
        if !self.body.is_empty() {
            let len = u64::from_le_bytes(file[16..HEADER].try_into().unwrap()) as usize;
            let mut body = zstd::bulk::decompress(&file[HEADER..], len).unwrap();
            self.body.iter().for_each(|e| e.apply(&mut body));
            file.truncate(16);
            file.extend((body.len() as u64).to_le_bytes());
            file.extend(zstd::bulk::compress(&body, 1).unwrap());
        }
        if let Some(announced) = self.announced {
            file[16..HEADER].copy_from_slice(&announced.to_le_bytes());
        }
        self.file.iter().for_each(|e| e.apply(&mut file));
        let checksum = blake3::hash(&file);
        file.extend(checksum.as_bytes());
        self.whole.iter().for_each(|e| e.apply(&mut file));
        file
    }
}
