//! Libraries to try a cluster with, made of a seed: images that share runs of contents, as those of one family do.
//!
//! ```text
//! image 0   base base base  pkg 7  zero  own own  base …
//! image 1   base base base  own    pkg 7 zero     base …     the same base at the same place, packages anywhere
//! ```
//!
//! Either a library of fingerprint runs alone, whose images do not exist (24 bytes a block), or raw images that
//! `vmar image add` takes (4 KiB a block).

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use vmar::fingerprint::{Algorithm, BLOCK_BYTES, Row, run};
use vmar::library::{FileRef, ImageRecord, Library, Policy, Writer, run_file};
use vmar::units::{BLOCK_SIZE, ImageId};
use vmar::{Error, ErrorKind, Result};

/// `vmar-index synthesize`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where it goes; must not be there
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Raw images NUMBER.raw instead of a library of runs
    #[arg(long)]
    raw: bool,
    /// Images
    #[arg(long, value_name = "N", default_value_t = 8)]
    images: u32,
    /// 4 KiB blocks of an image, zero ones included
    #[arg(long, value_name = "N", default_value_t = 1_000_000)]
    blocks: u32,
    /// Another seed, other contents
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

impl Args {
    /// Makes it.
    pub fn run(self) -> Result<()> {
        if self.out.exists() {
            return Err(Error::file(ErrorKind::Exists, &self.out, "is there already").mend("name another place"));
        }
        let family = Family { seed: self.seed, blocks: self.blocks };
        match self.raw {
            true => raw_images(&self.out, &family, self.images),
            false => library(&self.out, &family, self.images),
        }
    }
}

/// The contents of a family of images.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// Of all numbers.
    pub seed: u64,
    /// Blocks of each image.
    pub blocks: u32,
}

impl Family {
    /// The contents of image `image`, block by block; `None` is a zero block.
    pub fn contents(&self, image: u32) -> Vec<Option<u64>> {
        let mut random = Random(self.seed ^ u64::from(image) << 40);
        let mut out = Vec::with_capacity(self.blocks as usize);
        while out.len() < self.blocks as usize {
            let len = 1 + random.below(48);
            let at = out.len() as u64;
            let package = random.below(4096) << 12 | random.below(64);
            let content = |i: u64, kind: u64| match kind {
                0 => None,
                1..=5 => Some(at + i),
                6..=7 => Some(1 << 40 | (package + i)),
                _ => Some(2 << 40 | u64::from(image) << 32 | (at + i)),
            };
            let kind = random.below(10);
            out.extend((0..len).map(|i| content(i, kind)));
        }
        out.truncate(self.blocks as usize);
        out
    }

    /// What an image has of a content: some pairs of contents share a hash, as collisions do.
    fn row(&self, content: u64, block: u32) -> Row {
        let collides = content.is_multiple_of(1000) || content % 1000 == 1;
        let (key, variant) = if collides { (content & !1, u32::from(content & 1 == 1)) } else { (content, 0) };
        let mut hash = [0; 20];
        self.expand(key, &mut hash);
        Row { hash, variant, block }
    }

    fn expand(&self, key: u64, out: &mut [u8]) {
        blake3::Hasher::new().update(&self.seed.to_le_bytes()).update(&key.to_le_bytes()).finalize_xof().fill(out);
    }
}

/// splitmix64: small, and enough for a test.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

fn raw_images(out: &Path, family: &Family, images: u32) -> Result<()> {
    fs::create_dir_all(out).map_err(|e| Error::io(out, "create it", e))?;
    for image in 0..images {
        let path = out.join(format!("{image}.raw"));
        write_raw(&path, family, image).map_err(|e| Error::io(&path, "write", e))?;
    }
    Ok(())
}

fn write_raw(path: &Path, family: &Family, image: u32) -> std::io::Result<()> {
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path)?);
    let mut block = [0; BLOCK_BYTES];
    for content in family.contents(image) {
        match content {
            Some(key) => family.expand(key, &mut block),
            None => block.fill(0),
        }
        file.write_all(&block)?;
    }
    file.flush()
}

/// A library whose catalog names images that are nowhere.
pub fn library(dir: &Path, family: &Family, images: u32) -> Result<()> {
    let library = Library::init(dir, Policy::DEFAULT, Algorithm::Sha1)?;
    let mut records = Vec::new();
    for image in 0..images {
        records.push(write_run(&library, family, image)?);
    }
    // The writer does not look whether the images are there.
    Writer::open(dir)?.update(|catalog| {
        catalog.next_id = images;
        catalog.images = records;
    })
}

fn write_run(library: &Library, family: &Family, image: u32) -> Result<ImageRecord> {
    let contents = family.contents(image);
    let mut rows: Vec<Row> =
        (0..).zip(&contents).filter_map(|(block, content)| Some(family.row((*content)?, block))).collect();
    rows.sort_unstable();
    let name = format!("image{image}");
    let file = run_file(&name, ImageId(image));
    let mut digest = [0; 32];
    family.expand(u64::MAX - u64::from(image), &mut digest);
    let size = u64::from(family.blocks) * BLOCK_SIZE;
    let meta = run::Meta {
        library: &library.catalog().uuid,
        domain: &library.catalog().domain,
        image: &name,
        image_id: image,
        generation: 1,
        size,
        digest: Some(digest),
        algorithm: Algorithm::Sha1,
    };
    let mut writer = run::Writer::create(&library.dir().join(&file), &meta)?;
    writer.push(&rows)?;
    let stamp = writer.finish()?;
    Ok(ImageRecord {
        id: ImageId(image),
        path: format!("/nowhere/{name}.raw").into(),
        name,
        generation: 1,
        source: None,
        size,
        mtime_ns: 0,
        digest,
        domain: library.catalog().domain.clone(),
        blocks: family.blocks.into(),
        nonzero_blocks: rows.len() as u64,
        fingerprint: Algorithm::Sha1,
        public_run: None,
        chunks: None,
        run: FileRef { file: file.into(), bytes: stamp.bytes, crc32c: stamp.crc32c },
    })
}
