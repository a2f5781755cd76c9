//! Templates: pages that many VMs have, known to both hosts before anybody migrates.
//!
//! A template is a pack of the store, made of the memory images of a group of VMs: the pages that at least K of them hold and no
//! base image does, those that most hold first. It is copied to the other host once, as any file; its name says what it holds,
//! and by that name both sides agree on it. A later one is another pack.

use super::frame::Source;
use super::wire::Digest;
use crate::error::{Error, ErrorKind, Result};
use crate::store::manifest::{Held, Manifest};
use crate::store::{Pack, PackId, PackWriter};
use std::collections::{HashMap, HashSet};
use std::path::Path;

/// The pages that at least `share` of these memory images hold, and where the first that holds each has it: {image, page}. Those
/// that most hold come first, then as they are met.
pub fn choose(images: &[Manifest], share: usize, most: usize) -> Vec<(Digest, (usize, u64))> {
    let mut found: HashMap<Digest, (usize, (usize, u64))> = HashMap::new();
    for (image, manifest) in images.iter().enumerate() {
        let mut own = HashSet::new();
        for (number, page) in (0u64..).zip(&manifest.pages) {
            // What a base image has is found there.
            if matches!(page.held, Held::Pack { .. }) && own.insert(page.hash) {
                found.entry(page.hash).or_insert((0, (image, number))).0 += 1;
            }
        }
    }
    let mut out: Vec<_> = found.into_iter().filter(|(_, (count, _))| *count >= share.max(1)).collect();
    out.sort_by(|(_, (a, first)), (_, (b, second))| b.cmp(a).then(first.cmp(second)));
    out.into_iter().take(most).map(|(hash, (_, place))| (hash, place)).collect()
}

/// Writes a template of these pages to a new file; the caller gives it its name.
///
/// # Errors
/// A page cannot be read, or the file not be written.
pub fn build(path: &Path, images: &[super::kept::Kept], pages: &[(Digest, (usize, u64))]) -> Result<PackId> {
    let mut writer = PackWriter::create(path)?;
    let mut page = [0; super::stream::PAGE_BYTES];
    for (hash, (image, number)) in pages {
        if !images.get(*image).is_some_and(|kept| kept.read(*number, &mut page)) {
            let what = format!("page {number} of memory image {image} cannot be read");
            return Err(Error::file(ErrorKind::Corrupt, path, what).mend("leave that image out"));
        }
        writer.push(hash, &page)?;
    }
    writer.finish()
}

/// A template by its pages' hashes, for a sender.
#[derive(Debug)]
pub struct Template {
    by_hash: HashMap<Digest, u64>,
}

impl Template {
    /// Of a pack that both sides have.
    pub fn new(pack: &Pack) -> Template {
        Template { by_hash: pack.hashes().iter().copied().zip(0..).collect() }
    }

    /// Where it has this page.
    pub fn find(&self, hash: &Digest) -> Option<Source> {
        self.by_hash.get(hash).map(|number| Source::Template(*number))
    }
}

#[cfg(test)]
mod tests {
    use super::super::bases::BaseFiles;
    use super::super::kept::{Kept, Spool, Stay};
    use super::super::stream::{PAGE_BYTES, PAGE_SIZE};
    use super::*;
    use crate::store::manifest::MemoryBlock;

    fn content(byte: u8) -> ([u8; PAGE_BYTES], Digest) {
        let page = [byte; PAGE_BYTES];
        (page, *blake3::hash(&page).as_bytes())
    }

    /// A VM whose memory has these pages; 0 is a zero page, and those from 200 on are an image's.
    fn vm(dir: &Path, name: &str, bytes: &[u8]) -> (Manifest, Kept) {
        let block = MemoryBlock { name: b"ram".to_vec(), len: bytes.len() as u64 * PAGE_SIZE };
        let mut spool = Spool::create(dir, vec![block]).unwrap();
        for (n, byte) in (0u64..).zip(bytes) {
            let (page, hash) = content(*byte);
            match byte {
                0 => spool.zero(b"ram", n * PAGE_SIZE),
                200.. => spool.image(b"ram", n * PAGE_SIZE, hash, 0, 1),
                _ => spool.page(b"ram", n * PAGE_SIZE, hash, &page).unwrap(),
            }
        }
        let path = dir.join(format!("{name}.pack"));
        let (manifest, id) = spool.seal(Stay { vm: name, images: vec![[9; 32]], ..Stay::default() }, &path).unwrap();
        let kept = Kept::new(manifest.clone(), vec![Pack::open(&path, id).unwrap()], BaseFiles::none());
        (manifest, kept)
    }

    #[test]
    fn a_template_has_what_enough_vms_hold() {
        let dir = tempfile::tempdir().unwrap();
        // 1 is in all, 2 in two, 3 twice in one alone, 0 and 200 need no template.
        let vms = [("a", &[1u8, 2, 3, 3, 0, 200][..]), ("b", &[4, 2, 1, 0, 200]), ("c", &[200, 1, 5])];
        let (manifests, kept): (Vec<_>, Vec<_>) = vms.iter().map(|(name, bytes)| vm(dir.path(), name, bytes)).unzip();
        let hashes = |share, most| -> Vec<Digest> { choose(&manifests, share, most).iter().map(|(h, _)| *h).collect() };
        assert_eq!(hashes(2, 100), [content(1).1, content(2).1]);
        assert_eq!(hashes(3, 100), [content(1).1]);
        assert_eq!(hashes(2, 1), [content(1).1]);
        assert_eq!(hashes(0, 100).len(), 5);

        let path = dir.path().join("t.pack");
        let id = build(&path, &kept, &choose(&manifests, 2, 100)).unwrap();
        let pack = Pack::open(&path, id).unwrap();
        let template = Template::new(&pack);
        assert_eq!(template.find(&content(2).1), Some(Source::Template(1)));
        assert_eq!(template.find(&content(3).1), None);
        let mut page = [0; PAGE_BYTES];
        pack.read(1, &mut page).unwrap();
        assert_eq!(page, content(2).0);
    }
}
