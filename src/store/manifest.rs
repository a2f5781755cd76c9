//! What a memory image is: for each page of each block of a guest's memory its hash, and where its content is kept.
//!
//! ```text
//! header    "vmar-mem", version u32, reserved u32, bytes of the body u64
//! body      zstd: vm, domain, taken, blocks, images, packs; a byte a page; hashes; places
//! checksum  BLAKE3 of all before it
//! ```
//!
//! Integers are little-endian, strings have a u32 length. Pages are in columns: first for each page what it is (0 zero, 1 in a pack, 2
//! in an image, 3 on another host), then the hashes of those that are not zero, then of each that is here two u32: pack and page, or image
//! and block, by their places in the lists. Zero pages, and those that were never told of, take a byte that zstd takes away.
//!
//! The *root* names a memory image by its content alone, wherever that is kept: both sides of a migration make it of the stream
//! that they saw, and by it agree on what both have.

use super::pack::PackId;
use super::{Digest, MEND};
use crate::codec::Cursor;
use crate::error::{Error, ErrorKind, Result};
use crate::units::to_usize;
use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

const MAGIC: &[u8; 8] = b"vmar-mem";
const VERSION: u32 = 1;
const HEADER: usize = 24;
const CHECKSUM: usize = 32;
/// Bytes of a page, as memory is counted.
const PAGE_SIZE: u64 = super::PAGE_BYTES as u64;
/// Pages of a manifest: 16 TiB of memory.
const PAGES_MAX: u64 = 1 << 32;
/// The hash that stands for a zero page.
pub const ZERO: Digest = [0; 32];

/// A block of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryBlock {
    /// Its name in QEMU's migration stream.
    pub name: Vec<u8>,
    /// Bytes; a multiple of a page.
    pub len: u64,
}

/// Where the content of a page is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Held {
    /// It is zero.
    Zero,
    /// A page of a pack, by its place in [`Manifest::packs`].
    Pack {
        /// Place of the pack.
        pack: u32,
        /// Number of the page.
        page: u32,
    },
    /// A block of an image of the library, by its place in [`Manifest::images`].
    Image {
        /// Place of the image.
        image: u32,
        /// 4 KiB block of it.
        block: u32,
    },
    /// Another host has it; here is its hash alone.
    Elsewhere,
}

/// A page: hash and place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Page {
    /// BLAKE3 of its bytes; [`ZERO`] for zeros.
    pub hash: Digest,
    /// Where it is.
    pub held: Held,
}

impl Page {
    /// A page of zeros.
    pub const ZERO: Page = Page { hash: ZERO, held: Held::Zero };
}

/// A memory image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Manifest {
    /// Name of the VM.
    pub vm: String,
    /// Sharing domain of the VM.
    pub domain: String,
    /// When it was taken, in seconds since 1970.
    pub taken: u64,
    /// The blocks of memory.
    pub blocks: Vec<MemoryBlock>,
    /// Content digests of the images that hold pages.
    pub images: Vec<Digest>,
    /// The packs that hold pages.
    pub packs: Vec<PackId>,
    /// The pages of all blocks, in order.
    pub pages: Vec<Page>,
}

impl Manifest {
    /// What names the image by its content: BLAKE3 of the blocks and of the hashes of all pages.
    pub fn root(&self) -> Digest {
        root(&self.blocks, self.pages.iter().map(|page| page.hash))
    }

    /// Number, among all pages, of the page at this offset of a block.
    pub fn number(&self, block: &[u8], offset: u64) -> Option<usize> {
        number(&self.blocks, block, offset)
    }

    /// The images that pages are in, by their places in the list.
    pub fn images_used(&self) -> BTreeSet<u32> {
        let image = |page: &Page| if let Held::Image { image, .. } = page.held { Some(image) } else { None };
        self.pages.iter().filter_map(image).collect()
    }

    /// The bytes of its file.
    ///
    /// # Errors
    /// zstd fails.
    pub fn encode(&self) -> std::io::Result<Vec<u8>> {
        let mut body = Vec::with_capacity(self.pages.len() * 41);
        write_bytes(self.vm.as_bytes(), &mut body);
        write_bytes(self.domain.as_bytes(), &mut body);
        body.extend(self.taken.to_le_bytes());
        write_len(self.blocks.len(), &mut body);
        for block in &self.blocks {
            write_bytes(&block.name, &mut body);
            body.extend(block.len.to_le_bytes());
        }
        write_len(self.images.len(), &mut body);
        body.extend(self.images.as_flattened());
        write_len(self.packs.len(), &mut body);
        self.packs.iter().for_each(|pack| body.extend(pack.0));
        body.extend(self.pages.iter().map(|page| match page.held {
            Held::Zero => 0,
            Held::Pack { .. } => 1,
            Held::Image { .. } => 2,
            Held::Elsewhere => 3,
        }));
        let kept = || self.pages.iter().filter(|page| page.held != Held::Zero);
        kept().for_each(|page| body.extend(page.hash));
        for page in kept() {
            let (a, b) = match page.held {
                Held::Zero | Held::Elsewhere => continue,
                Held::Pack { pack, page } => (pack, page),
                Held::Image { image, block } => (image, block),
            };
            body.extend(a.to_le_bytes());
            body.extend(b.to_le_bytes());
        }
        let mut out = MAGIC.to_vec();
        out.extend(VERSION.to_le_bytes());
        out.extend([0; 4]);
        out.extend((body.len() as u64).to_le_bytes());
        out.extend(zstd::bulk::compress(&body, 1)?);
        out.extend(blake3::hash(&out).as_bytes());
        Ok(out)
    }

    /// The manifest in these bytes of a file; `path` is for errors alone.
    ///
    /// # Errors
    /// `Corrupt` when they are none or not whole, `Unsupported` when a newer vmar wrote them.
    pub fn decode(path: &Path, bytes: &[u8]) -> Result<Manifest> {
        let broken = |what: &str| Error::file(ErrorKind::Corrupt, path, what).mend(MEND);
        let mut c = Cursor::new(bytes);
        if c.array() != Some(*MAGIC) {
            return Err(broken("it is no memory image"));
        }
        super::check_version(path, c.u32_le(), VERSION)?;
        let end =
            bytes.len().checked_sub(CHECKSUM).filter(|end| *end >= HEADER).ok_or_else(|| broken("it is cut off"))?;
        let (covered, checksum) = bytes.split_at(end);
        if blake3::hash(covered).as_bytes() != checksum {
            return Err(broken("its checksum is wrong"));
        }
        let len = c.u32_le().and_then(|_| c.u64_le()).unwrap_or(u64::MAX);
        // A page takes at most this much, and the lists before the pages less than a page's share each.
        if len > PAGES_MAX * 48 {
            return Err(broken("it is larger than any"));
        }
        let packed = covered.get(HEADER..).unwrap_or_default();
        let body = unpack(packed, len).map_err(|e| broken(&format!("cannot be unpacked: {e}")))?;
        parse(&body).ok_or_else(|| broken("it makes no sense"))
    }
}

/// Takes memory for what there is, not for what the header says: that may be anything.
fn unpack(packed: &[u8], len: u64) -> std::io::Result<Vec<u8>> {
    let mut body = Vec::new();
    zstd::stream::read::Decoder::with_buffer(packed)?.take(len.saturating_add(1)).read_to_end(&mut body)?;
    if body.len() as u64 == len { Ok(body) } else { Err(std::io::Error::other("it is not as long as it says")) }
}

/// Number, among all pages of these blocks, of the page at this offset of one.
pub fn number(blocks: &[MemoryBlock], block: &[u8], offset: u64) -> Option<usize> {
    let mut first = 0;
    for b in blocks {
        if b.name == block {
            return (offset < b.len).then_some(to_usize(first + offset / PAGE_SIZE));
        }
        first += b.len / PAGE_SIZE;
    }
    None
}

/// Of blocks and hashes of their pages; see [`Manifest::root`].
pub fn root(blocks: &[MemoryBlock], hashes: impl Iterator<Item = Digest>) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"vmar memory 1\n");
    for block in blocks {
        hasher.update(&(block.name.len() as u64).to_le_bytes()).update(&block.name).update(&block.len.to_le_bytes());
    }
    hashes.for_each(|hash| {
        hasher.update(&hash);
    });
    *hasher.finalize().as_bytes()
}

fn parse(body: &[u8]) -> Option<Manifest> {
    let mut c = Cursor::new(body);
    let text = |c: &mut Cursor<'_>| String::from_utf8(bytes(c)?.to_vec()).ok();
    let (vm, domain) = (text(&mut c)?, text(&mut c)?);
    let taken = c.u64_le()?;
    let mut blocks = Vec::new();
    let mut count = 0u64;
    for _ in 0..c.u32_le()? {
        let (name, len) = (bytes(&mut c)?.to_vec(), c.u64_le()?);
        if !len.is_multiple_of(PAGE_SIZE) {
            return None;
        }
        count = count.checked_add(len / PAGE_SIZE)?;
        blocks.push(MemoryBlock { name, len });
    }
    let images = digests(&mut c)?;
    let packs: Vec<PackId> = digests(&mut c)?.into_iter().map(PackId).collect();
    let tags = c.take(usize::try_from(count).ok()?)?;
    let kept = tags.iter().filter(|tag| **tag != 0).count();
    let (hashes, _) = c.take(kept.checked_mul(32)?)?.as_chunks::<32>();
    let mut hashes = hashes.iter();
    let mut pages = Vec::with_capacity(tags.len());
    for tag in tags {
        if *tag == 0 {
            pages.push(Page::ZERO);
            continue;
        }
        let hash = *hashes.next()?;
        let held = match *tag {
            1 => Held::Pack { pack: c.u32_le().filter(|n| to_usize((*n).into()) < packs.len())?, page: c.u32_le()? },
            2 => {
                Held::Image { image: c.u32_le().filter(|n| to_usize((*n).into()) < images.len())?, block: c.u32_le()? }
            }
            3 => Held::Elsewhere,
            _ => return None,
        };
        pages.push(Page { hash, held });
    }
    (c.position() == body.len()).then_some(Manifest { vm, domain, taken, blocks, images, packs, pages })
}

fn bytes<'a>(c: &mut Cursor<'a>) -> Option<&'a [u8]> {
    let len = c.u32_le()?;
    c.take(to_usize(len.into()))
}

fn digests(c: &mut Cursor<'_>) -> Option<Vec<Digest>> {
    let count = to_usize(c.u32_le()?.into());
    let (all, _) = c.take(count.checked_mul(32)?)?.as_chunks::<32>();
    Some(all.to_vec())
}

fn write_len(len: usize, out: &mut Vec<u8>) {
    out.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
}

fn write_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    write_len(bytes.len(), out);
    out.extend(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn manifest() -> Manifest {
        let held = |n: u8| match n % 4 {
            0 => Page::ZERO,
            1 => Page { hash: [n; 32], held: Held::Pack { pack: 1, page: n.into() } },
            2 => Page { hash: [n; 32], held: Held::Elsewhere },
            _ => Page { hash: [n; 32], held: Held::Image { image: 0, block: 1000 + u32::from(n) } },
        };
        Manifest {
            vm: "web-1".into(),
            domain: "shop".into(),
            taken: 1_700_000_000,
            blocks: vec![
                MemoryBlock { name: b"ram0".to_vec(), len: 10 * 4096 },
                MemoryBlock { name: b"vga.vram".to_vec(), len: 4 * 4096 },
            ],
            images: vec![[9; 32]],
            packs: vec![PackId([1; 32]), PackId([2; 32])],
            pages: (0..14).map(held).collect(),
        }
    }

    #[test]
    fn there_and_back() {
        for one in [manifest(), Manifest::default()] {
            let bytes = one.encode().unwrap();
            assert_eq!(Manifest::decode(Path::new("m"), &bytes).unwrap(), one);
        }
    }

    #[test]
    fn the_root_is_of_the_content_alone() {
        let one = manifest();
        let mut elsewhere = one.clone();
        elsewhere.vm = "other".into();
        elsewhere.taken = 1;
        elsewhere.pages[1].held = Held::Pack { pack: 0, page: 77 };
        assert_eq!(one.root(), elsewhere.root());
        let mut other = one.clone();
        other.pages[1].hash[31] ^= 1;
        assert_ne!(one.root(), other.root());
        let mut other = one.clone();
        other.blocks[0].name = b"ram1".to_vec();
        assert_ne!(one.root(), other.root());
        // A page may not move from one block to the next.
        let mut other = one;
        other.blocks[0].len += 4096;
        other.blocks[1].len -= 4096;
        assert_ne!(manifest().root(), other.root());
    }

    #[test]
    fn pages_are_numbered_over_all_blocks() {
        let one = manifest();
        assert_eq!(one.number(b"ram0", 9 * 4096), Some(9));
        assert_eq!(one.number(b"ram0", 10 * 4096), None);
        assert_eq!(one.number(b"vga.vram", 4096), Some(11));
        assert_eq!(one.number(b"nothing", 0), None);
    }

    #[test]
    fn every_cut_and_every_wrong_byte_is_noticed() {
        let whole = manifest().encode().unwrap();
        for at in 0..whole.len() {
            assert!(Manifest::decode(Path::new("m"), &whole[..at]).is_err(), "cut at {at}");
            let mut wrong = whole.clone();
            wrong[at] ^= 0x40;
            let error = Manifest::decode(Path::new("m.mem"), &wrong).unwrap_err().to_string();
            assert!(error.starts_with("m.mem: "), "{error}");
        }
    }

    #[test]
    fn a_length_that_lies_takes_no_memory() {
        let whole = manifest().encode().unwrap();
        for len in [0, 100, PAGES_MAX * 48] {
            let mut lies = whole[..whole.len() - CHECKSUM].to_vec();
            lies[16..HEADER].copy_from_slice(&len.to_le_bytes());
            lies.extend(blake3::hash(&lies).as_bytes());
            let error = Manifest::decode(Path::new("m"), &lies).unwrap_err().to_string();
            assert!(error.contains("not as long as it says"), "{len}: {error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

        /// Whoever made it: what is inside is believed only as far as it makes sense.
        #[test]
        fn a_body_that_lies_is_refused(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4)) {
            let whole = manifest().encode().unwrap();
            let len = u64::from_le_bytes(whole[16..24].try_into().unwrap());
            let mut body = zstd::bulk::decompress(&whole[HEADER..whole.len() - CHECKSUM], to_usize(len)).unwrap();
            for (at, byte) in edits {
                let at = at.index(body.len());
                body[at] = byte;
            }
            if let Some(read) = parse(&body) {
                let again = read.encode().unwrap();
                prop_assert_eq!(Manifest::decode(Path::new("m"), &again).unwrap(), read);
            }
        }
    }
}
