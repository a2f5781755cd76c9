//! Base images as the dictionary of a migration: what a sender finds, a receiver with a library of its own reads.

use super::support::{BLOCK, Place, image_of};
use std::path::Path;
use vmar::fingerprint::Algorithm;
use vmar::library::Policy;
use vmar::migrate::bases::{BaseFiles, Bases, CONTENTS_MAX};
use vmar::migrate::frame::Source;

/// A host whose images have these contents, in this order, under its own names.
fn host(algorithm: Algorithm, images: &[(&str, &[u8])]) -> Place {
    let place = Place::with_fingerprint(Policy::Paper, algorithm);
    let files: Vec<_> = images.iter().map(|(name, bytes)| (*name, place.raw(name, bytes, |_| false))).collect();
    let files: Vec<(&str, &Path)> = files.iter().map(|(name, file)| (*name, file.as_path())).collect();
    place.add(&files).unwrap();
    place
}

fn page(bytes: &[u8], block: usize) -> &[u8; BLOCK] {
    bytes[block * BLOCK..].first_chunk().unwrap()
}

/// What the sender finds of these pages, after the greeting, and what the receiver reads there.
fn both(sender: &Place, receiver: &Place, own: &str, pages: &[&[u8; BLOCK]]) -> Vec<Option<[u8; BLOCK]>> {
    let mut bases = Bases::load(&sender.library(), own, CONTENTS_MAX).unwrap();
    let files = BaseFiles::open(&receiver.library(), bases.digests());
    bases.set_there(&files.here());
    let read = |page: &&[u8; BLOCK]| match bases.find(*page) {
        Some(Source::Base { image, block }) => {
            let mut out = [0; BLOCK];
            assert!(files.read(image, block, &mut out));
            Some(out)
        }
        None => None,
        other => panic!("{other:?}"),
    };
    pages.iter().map(read).collect()
}

#[test]
fn pages_are_found_in_images_that_both_hosts_have() {
    for algorithm in [Algorithm::Sha1, Algorithm::Blake3] {
        let (web, db) = (image_of(&[11, 12, 13], None), image_of(&[13, 14], None));
        let sender = host(algorithm, &[("db", &db), ("web", &web)]);
        // Another library: other numbers, other names, other keys.
        let receiver = host(algorithm, &[("w", &web), ("other", &image_of(&[19], None)), ("d", &db)]);
        let nowhere = [7; BLOCK];
        let pages = [page(&web, 0), page(&web, 2), page(&db, 1), &nowhere];
        let read = both(&sender, &receiver, "web", &pages);
        let right: Vec<bool> = read.iter().zip(pages).map(|(read, page)| *read == Some(*page)).collect();
        assert_eq!(right, [true, true, true, false]);
        assert!(read[3].is_none());
        // Content 13 is in both; it is named in the VM's own image.
        let bases = Bases::load(&sender.library(), "web", CONTENTS_MAX).unwrap();
        assert_eq!(bases.digests()[0], sender.library().image("web").unwrap().digest);
    }
}

/// Two contents of one SHA-1: the sender names one for the other, and the digest of the frame tells.
#[test]
fn a_collision_is_named_wrong() {
    let web = image_of(&[1, 2], None);
    let sender = host(Algorithm::Sha1, &[("web", &web)]);
    let read = both(&sender, &sender, "web", &[page(&web, 0), page(&web, 1)]);
    assert!(read[0] == read[1] && read[0] == Some(*page(&web, 0)));
}

#[test]
fn what_the_receiver_has_not_is_not_named() {
    let (web, db) = (image_of(&[11, 12, 13], None), image_of(&[13, 14], None));
    let sender = host(Algorithm::Sha1, &[("db", &db), ("web", &web)]);
    let receiver = host(Algorithm::Sha1, &[("db", &db)]);
    let read = both(&sender, &receiver, "web", &[page(&web, 0), page(&db, 1)]);
    assert!(read[0].is_none() && read[1] == Some(*page(&db, 1)));
    // An image that was changed since is one that it has not.
    let file = receiver.path("db");
    let library = receiver.library();
    let mut permissions = std::fs::metadata(&file).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
    std::fs::set_permissions(&file, permissions).unwrap();
    std::fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(BLOCK as u64).unwrap();
    let bases = Bases::load(&sender.library(), "web", CONTENTS_MAX).unwrap();
    assert_eq!(BaseFiles::open(&library, bases.digests()).here(), [false, false]);
}

#[test]
fn images_beyond_the_room_are_left_out_but_never_the_own() {
    let (web, db) = (image_of(&[11, 12, 13], None), image_of(&[13, 14], None));
    let sender = host(Algorithm::Sha1, &[("db", &db), ("web", &web)]);
    assert_eq!(Bases::load(&sender.library(), "web", 1).unwrap().digests().len(), 1);
    let missing = Bases::load(&sender.library(), "mail", 1).unwrap_err().to_string();
    assert!(missing.contains("mail"), "{missing}");
}

#[test]
fn a_partial_last_block_is_no_page() {
    let mut web = image_of(&[11, 12], None);
    web.truncate(BLOCK + 512);
    let sender = host(Algorithm::Sha1, &[("web", &web)]);
    let mut bases = Bases::load(&sender.library(), "web", CONTENTS_MAX).unwrap();
    bases.set_there(&[true]);
    assert_eq!(bases.find(&web[BLOCK..]), None);
    assert_eq!(bases.find(&web[..BLOCK]), Some(Source::Base { image: 0, block: 0 }));
}
