//! Interned sets of images, and how many contents each has: bytes to values and back. Opens no file.
//!
//! ```text
//! "vmar-set"  version u32  0 u32  library [16]  id u64  count u64
//! count times: contents u64, images u32, that many IDs u32, ascending
//! CRC-32C of all that u32
//! ```
//!
//! All little-endian. Set number *n* is the *n*-th of them; one without images is dead, and its number stays taken.

use crate::codec::Cursor;
use std::collections::HashMap;

const MAGIC: &[u8; 8] = b"vmar-set";
/// The version that this code reads and writes.
pub const VERSION: u32 = 1;

/// Which file this is: a sets file of another library, or an older one of this library, is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// UUID of the library.
    pub library: [u8; 16],
    /// Counts the files of the library's indexes.
    pub id: u64,
}

/// The sets of a sharing domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    images: Vec<Box<[u32]>>,
    contents: Vec<u64>,
    numbers: HashMap<Box<[u32]>, u32>,
}

/// Why bytes are no sets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// Cut, flipped or swapped.
    Corrupt(String),
    /// Written by a newer vmar.
    Newer(u32),
}

impl Sets {
    /// How many numbers have been given out.
    pub fn len(&self) -> usize {
        self.images.len()
    }

    /// True if there never was a set.
    pub fn is_empty(&self) -> bool {
        self.images.is_empty()
    }

    /// The images of a set, ascending; none if it is dead or was never there.
    pub fn images(&self, set: u32) -> &[u32] {
        self.images.get(set as usize).map_or(&[], |s| s)
    }

    /// Contents that exactly these images hold.
    pub fn contents(&self, set: u32) -> u64 {
        self.contents.get(set as usize).copied().unwrap_or(0)
    }

    /// The sets that have contents: number, images, contents. Two numbers can have the same images, after one that made
    /// the difference was removed.
    pub fn live(&self) -> impl Iterator<Item = (u32, &[u32], u64)> {
        let all = (0u32..).zip(self.images.iter().zip(&self.contents));
        all.filter(|(_, (images, contents))| !images.is_empty() && **contents > 0).map(|(n, (i, c))| (n, &**i, *c))
    }

    /// The number of the set of exactly these images, which are ascending and at least one. `None` when 2^32 numbers are
    /// used up.
    pub fn intern(&mut self, images: &[u32]) -> Option<u32> {
        debug_assert!(!images.is_empty() && images.is_sorted_by(|a, b| a < b));
        if let Some(&number) = self.numbers.get(images) {
            return Some(number);
        }
        let number = u32::try_from(self.images.len()).ok()?;
        self.images.push(images.into());
        self.contents.push(0);
        self.numbers.insert(images.into(), number);
        Some(number)
    }

    /// The number of the set with this image in addition.
    pub fn with(&mut self, set: u32, image: u32) -> Option<u32> {
        let mut images = self.images(set).to_vec();
        match images.binary_search(&image) {
            Ok(_) => return Some(set),
            Err(at) => images.insert(at, image),
        }
        self.intern(&images)
    }

    /// One more content has this set.
    pub fn gain(&mut self, set: u32) {
        if let Some(n) = self.contents.get_mut(set as usize) {
            *n += 1;
        }
    }

    /// One content less has this set. False when it had none: the index contradicts itself.
    pub fn lose(&mut self, set: u32) -> bool {
        let Some(n) = self.contents.get_mut(set as usize).filter(|n| **n > 0) else { return false };
        *n -= 1;
        true
    }

    /// Takes an image out of all sets.
    pub fn remove(&mut self, image: u32) {
        for images in &mut self.images {
            if let Ok(at) = images.binary_search(&image) {
                let mut left = images.to_vec();
                left.remove(at);
                *images = left.into();
            }
        }
        self.number_anew();
    }

    /// Forgets the images of sets without contents: only rows that newer ones hide have their numbers.
    pub fn forget_unused(&mut self) {
        for (images, contents) in self.images.iter_mut().zip(&mut self.contents) {
            if *contents == 0 || images.is_empty() {
                *images = Box::default();
                *contents = 0;
            }
        }
        self.number_anew();
    }

    /// Of several numbers with the same images the lowest is given out.
    fn number_anew(&mut self) {
        self.numbers.clear();
        for (number, images) in (0u32..).zip(&self.images).filter(|(_, images)| !images.is_empty()) {
            self.numbers.entry(images.clone()).or_insert(number);
        }
    }

    /// The bytes of a file.
    pub fn encode(&self, identity: &Identity) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend([0; 4]);
        out.extend(identity.library);
        out.extend(identity.id.to_le_bytes());
        out.extend((self.images.len() as u64).to_le_bytes());
        for (images, contents) in self.images.iter().zip(&self.contents) {
            out.extend(contents.to_le_bytes());
            out.extend((images.len() as u64).to_le_bytes()[..4].iter());
            images.iter().for_each(|image| out.extend(image.to_le_bytes()));
        }
        let crc = crc32c::crc32c(&out);
        out.extend(crc.to_le_bytes());
        out
    }

    /// The sets in the bytes of a file.
    ///
    /// # Errors
    /// When they are not whole, or not those of `identity`.
    pub fn decode(bytes: &[u8], identity: &Identity) -> Result<Sets, Unreadable> {
        let corrupt = |what: &str| Unreadable::Corrupt(what.to_string());
        let mut c = Cursor::new(bytes);
        if c.array() != Some(*MAGIC) {
            return Err(corrupt("not a file of image sets"));
        }
        match c.u32_le() {
            Some(VERSION) => {}
            Some(newer) if newer > VERSION => return Err(Unreadable::Newer(newer)),
            _ => return Err(corrupt("not a file of image sets")),
        }
        let Some((body, crc)) = bytes.split_last_chunk::<4>() else { return Err(corrupt("cut off")) };
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return Err(corrupt("its checksum is wrong"));
        }
        if (c.u32_le(), c.array(), c.u64_le()) != (Some(0), Some(identity.library), Some(identity.id)) {
            return Err(corrupt("it is another one than the catalog names"));
        }
        let sets = Sets::decode_sets(&mut c).ok_or_else(|| corrupt("it contradicts itself"))?;
        if c.position() + 4 == bytes.len() { Ok(sets) } else { Err(corrupt("it is too long")) }
    }

    fn decode_sets(c: &mut Cursor<'_>) -> Option<Sets> {
        let mut sets = Sets::default();
        for _ in 0..c.u64_le()? {
            sets.contents.push(c.u64_le()?);
            let count = c.u32_le()?;
            let bytes = c.take(usize::try_from(count).ok()?.checked_mul(4)?)?;
            let (ids, _) = bytes.as_chunks::<4>();
            let images: Box<[u32]> = ids.iter().map(|id| u32::from_le_bytes(*id)).collect();
            if !images.is_sorted_by(|a, b| a < b) {
                return None;
            }
            sets.images.push(images);
        }
        sets.number_anew();
        Some(sets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::{BTreeMap, BTreeSet};

    const ME: Identity = Identity { library: [7; 16], id: 3 };

    proptest! {
        /// Contents move among sets as images come and go; a plain table of contents says what must come out.
        #[test]
        fn images_come_and_go(steps in prop::collection::vec((0u32..6, any::<bool>(), prop::collection::btree_set(0u32..12, 0..8)), 0..30)) {
            let mut sets = Sets::default();
            let mut numbers: BTreeMap<u32, u32> = BTreeMap::new();
            let mut model: BTreeMap<u32, BTreeSet<u32>> = BTreeMap::new();
            let mut gone: BTreeSet<u32> = BTreeSet::new();
            for (n, (image, add, contents)) in (0u32..).zip(steps) {
                if add {
                    // IDs are never given out twice.
                    let image = 100 + n;
                    for content in contents {
                        model.entry(content).or_default().insert(image);
                        let old = numbers.get(&content).copied().filter(|s| !sets.images(*s).is_empty());
                        let new = match old {
                            Some(set) => { prop_assert!(sets.lose(set)); sets.with(set, image) }
                            None => sets.intern(&[image]),
                        }.unwrap();
                        sets.gain(new);
                        numbers.insert(content, new);
                    }
                } else {
                    let image = 100 + image;
                    gone.insert(image);
                    sets.remove(image);
                    model.values_mut().for_each(|s| { s.remove(&image); });
                }
                sets.forget_unused();
                let bytes = sets.encode(&ME);
                sets = Sets::decode(&bytes, &ME).unwrap();
            }
            for (content, images) in &model {
                let found = numbers.get(content).map_or(&[][..], |set| sets.images(*set));
                prop_assert_eq!(found, images.iter().copied().collect::<Vec<_>>());
            }
            let mut want: BTreeMap<Vec<u32>, u64> = BTreeMap::new();
            model.values().filter(|s| !s.is_empty()).for_each(|s| *want.entry(s.iter().copied().collect()).or_default() += 1);
            let mut got: BTreeMap<Vec<u32>, u64> = BTreeMap::new();
            sets.live().for_each(|(_, images, contents)| *got.entry(images.to_vec()).or_default() += contents);
            prop_assert_eq!(got, want);
        }

        #[test]
        fn a_changed_byte_is_found(at in 0usize..200, bit in 0u8..8) {
            let mut sets = Sets::default();
            for images in [&[1][..], &[1, 2], &[1, 2, 5]] {
                let set = sets.intern(images).unwrap();
                sets.gain(set);
            }
            let mut bytes = sets.encode(&ME);
            prop_assert_eq!(Sets::decode(&bytes, &ME).unwrap(), sets);
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(Sets::decode(&bytes, &ME).is_err());
            prop_assert!(Sets::decode(&bytes[..at], &ME).is_err());
        }
    }

    #[test]
    fn another_library_or_an_older_file_is_refused() {
        let bytes = Sets::default().encode(&ME);
        assert!(Sets::decode(&bytes, &Identity { id: 4, ..ME }).is_err());
        assert!(Sets::decode(&bytes, &Identity { library: [8; 16], ..ME }).is_err());
        let mut newer = bytes.clone();
        newer[8] = 9;
        assert_eq!(Sets::decode(&newer, &ME), Err(Unreadable::Newer(9)));
    }
}
