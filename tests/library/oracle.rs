//! What must come out, counted over the real bytes, as plainly as can be.

use super::support::{BLOCK, Place};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use vmar::indexer::{read_map, stats};
use vmar::library::Library;

/// Compares the whole library with what its images (in order of ID) hold.
pub fn check(place: &Place, images: &[(&str, Vec<u8>)]) {
    let library = place.library();
    assert_eq!(library.images().len(), images.len());
    let mut canonical: HashMap<&[u8], (usize, usize)> = HashMap::new();
    let mut holders: HashMap<&[u8], Vec<usize>> = HashMap::new();
    let is_zero = |block: &[u8]| block.iter().all(|&b| b == 0);
    for (i, (_, bytes)) in images.iter().enumerate() {
        for (b, block) in bytes.chunks(BLOCK).enumerate().filter(|(_, block)| !is_zero(block)) {
            canonical.entry(block).or_insert((i, b));
            holders.entry(block).or_default().push(i);
        }
    }

    let ids: Vec<u32> = library.images().iter().map(|r| r.id.0).collect();
    let found = stats::stats(&library).unwrap();
    let nonzero: usize = holders.values().map(Vec::len).sum();
    let sets: BTreeSet<BTreeSet<usize>> = holders.values().map(|h| h.iter().copied().collect()).collect();
    assert_eq!(found.policy, "paper");
    assert_eq!(found.nonzero_blocks, nonzero as u64);
    assert_eq!(found.unique_blocks, holders.len() as u64);
    assert_eq!(found.clusters, sets.len() as u64);
    let share = |wanted: &dyn Fn(&Vec<usize>) -> bool| {
        let blocks: usize = holders.values().filter(|h| wanted(h)).map(Vec::len).sum();
        if nonzero == 0 { 0.0 } else { blocks as f64 / nonzero as f64 }
    };
    let in_images = |h: &Vec<usize>| h.iter().collect::<BTreeSet<_>>().len();
    assert_eq!(found.duplicated_ge2, share(&|h| h.len() >= 2));
    assert_eq!(found.shared_ge2_images, share(&|h| in_images(h) >= 2));
    assert_eq!(found.shared_gt3_images, share(&|h| in_images(h) > 3));

    check_index(&library, &ids, &holders);
    for (i, (name, bytes)) in images.iter().enumerate() {
        let record = library.image(name).unwrap();
        assert_eq!(record.id.0, ids[i]);
        let map = read_map(&library, record).unwrap();
        let blocks: Vec<&[u8]> = bytes.chunks(BLOCK).collect();
        let (mut redirected, mut entries, mut before) = (0, 0, None);
        for (b, block) in blocks.iter().enumerate() {
            let want = match is_zero(block) {
                true => None,
                false if block.len() < BLOCK => Some((i, b)),
                false => Some(canonical[block]),
            };
            let hit = map.lookup(b as u32);
            let got = hit.map(|h| (map.target(h.target).unwrap().image.0, h.block as usize));
            assert_eq!(got, want.map(|(image, at)| (ids[image], at)), "image {name} block {b}");
            if let Some((image, at)) = want {
                redirected += u64::from(image != i);
                entries += u64::from(before.is_none_or(|(pi, pb)| (image, at) != (pi, pb + 1)));
            }
            before = want;
        }
        let figures = &found.images[i];
        assert_eq!((figures.name.as_str(), figures.id), (*name, ids[i]));
        assert_eq!(figures.blocks, blocks.len() as u64);
        assert_eq!(figures.nonzero_blocks, blocks.iter().filter(|b| !is_zero(b)).count() as u64);
        assert_eq!(figures.redirected_blocks, redirected);
        assert_eq!(figures.entries, entries, "image {name}");
        assert_eq!(figures.map_bytes, std::fs::metadata(library.map_path(name)).unwrap().len());
    }
}

/// The content index says of every set of images how many contents exactly they hold.
fn check_index(library: &Library, ids: &[u32], holders: &HashMap<&[u8], Vec<usize>>) {
    let mut want: BTreeMap<Vec<u32>, u64> = BTreeMap::new();
    for images in holders.values() {
        let set: BTreeSet<u32> = images.iter().map(|&i| ids[i]).collect();
        *want.entry(set.into_iter().collect()).or_default() += 1;
    }
    let got: BTreeMap<Vec<u32>, u64> = stats::indexed_clusters(library).unwrap().into_iter().collect();
    assert_eq!(got, want);
}
