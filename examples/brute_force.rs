//! Counts what raw images share, the slow and simple way, to check `vmar stats --json` against.
//!
//! ```text
//! cargo run --release --example brute_force -- NAME=FILE [NAME=FILE ...]     (in the order of their IDs)
//! ```
//!
//! It uses nothing of vmar's: it reads every byte of every file (holes too), keeps one record a block in memory, and
//! tells contents apart by the BLAKE3 hash of the real bytes (length included). `map_bytes` is not counted, for that is
//! no property of the images.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

const BLOCK: usize = 4096;

/// Content of a block: its hash, which stands for its bytes.
type Content = [u8; 32];

/// An image, block by block.
pub struct Image {
    /// Its name.
    pub name: String,
    size: u64,
    /// `None` for a block that is all zero.
    blocks: Vec<Option<Content>>,
}

/// Reads an image.
pub fn read(name: &str, path: &Path) -> std::io::Result<Image> {
    let mut file = File::open(path)?;
    let size = file.metadata()?.len();
    let mut blocks = Vec::new();
    let mut left = size;
    while left > 0 {
        let mut buf = vec![0u8; usize::try_from(left).map_or(BLOCK, |left| left.min(BLOCK))];
        file.read_exact(&mut buf)?;
        left -= buf.len() as u64;
        let zero = buf.iter().all(|&b| b == 0);
        blocks.push((!zero).then(|| *blake3::hash(&buf).as_bytes()));
    }
    Ok(Image { name: name.to_string(), size, blocks })
}

/// Where block `b` of image `i` is read from: the lowest block of the lowest image that holds its content.
fn target(
    images: &[&Image],
    canonical: &HashMap<Content, (usize, usize)>,
    i: usize,
    b: usize,
) -> Option<(usize, usize)> {
    let content = images[i].blocks[b]?;
    // A partial last block stays where it is.
    let partial = (b as u64 + 1) * BLOCK as u64 > images[i].size;
    Some(if partial { (i, b) } else { canonical[&content] })
}

/// The figures of the images, in the order of their IDs, as `vmar stats --json` prints them.
pub fn count(files: &[(String, PathBuf)]) -> std::io::Result<serde_json::Value> {
    let images = files.iter().map(|(name, path)| read(name, path)).collect::<std::io::Result<Vec<Image>>>()?;
    Ok(figures(&images.iter().collect::<Vec<_>>()))
}

/// The same of images that were read; IDs count from 0.
pub fn figures(images: &[&Image]) -> serde_json::Value {
    let mut canonical: HashMap<Content, (usize, usize)> = HashMap::new();
    let mut holders: HashMap<Content, Vec<usize>> = HashMap::new();
    for (i, image) in images.iter().enumerate() {
        for (b, content) in image.blocks.iter().enumerate() {
            if let Some(content) = content {
                canonical.entry(*content).or_insert((i, b));
                holders.entry(*content).or_default().push(i);
            }
        }
    }
    let nonzero: usize = holders.values().map(Vec::len).sum();
    let share = |wanted: &dyn Fn(&[usize]) -> bool| {
        let blocks: usize = holders.values().filter(|h| wanted(h)).map(|h| h.len()).sum();
        if nonzero == 0 { 0.0 } else { blocks as f64 / nonzero as f64 }
    };
    // Holders were pushed in order of image, so equal ones are neighbours.
    let distinct = |h: &[usize]| {
        let mut set = h.to_vec();
        set.dedup();
        set
    };
    let clusters: HashSet<Vec<usize>> = holders.values().map(|h| distinct(h)).collect();

    let per_image: Vec<serde_json::Value> = (0..images.len())
        .map(|i| {
            let targets: Vec<_> = (0..images[i].blocks.len()).map(|b| target(images, &canonical, i, b)).collect();
            let starts_entry = |b: usize| match (targets[b], b.checked_sub(1).and_then(|before| targets[before])) {
                (None, _) => false,
                (Some(_), None) => true,
                (Some((ti, tb)), Some((pi, pb))) => (ti, tb) != (pi, pb + 1),
            };
            serde_json::json!({
                "name": images[i].name,
                "id": i,
                "blocks": images[i].blocks.len(),
                "nonzero_blocks": targets.iter().flatten().count(),
                "redirected_blocks": targets.iter().flatten().filter(|t| t.0 != i).count(),
                "entries": (0..targets.len()).filter(|&b| starts_entry(b)).count(),
            })
        })
        .collect();
    serde_json::json!({
        "policy": "paper",
        "nonzero_blocks": nonzero,
        "unique_blocks": holders.len(),
        "clusters": clusters.len(),
        "duplicated_ge2": share(&|h| h.len() >= 2),
        "shared_ge2_images": share(&|h| distinct(h).len() >= 2),
        "shared_gt3_images": share(&|h| distinct(h).len() > 3),
        "images": per_image,
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut files = Vec::new();
    for arg in std::env::args().skip(1) {
        let (name, path) = arg.split_once('=').ok_or("usage: brute_force NAME=FILE ...")?;
        files.push((name.to_string(), PathBuf::from(path)));
    }
    println!("{}", serde_json::to_string_pretty(&count(&files)?)?);
    Ok(())
}
