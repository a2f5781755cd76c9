//! Maps of canonical addresses alone, as an SQL engine finds them in the runs, against those of `library remap`.

use super::family::{Spec, spec};
use super::support::{Place, image_of, work};
use proptest::prelude::*;
use std::collections::HashMap;
use std::path::Path;
use vmar::fingerprint::{Row, run};
use vmar::indexer::offline::{Address, Canonical, Offline};
use vmar::indexer::remap::remap;
use vmar::library::{Library, Policy, Writer};
use vmar::units::ImageId;
use vmar::{ErrorKind, Result};

/// What the engine has to find: by (hash, variant) the lowest address. Rows of each image are in order of block.
struct Model {
    homes: HashMap<Address, Address>,
}

impl Model {
    fn new(library: &Library) -> Model {
        let mut lowest = HashMap::new();
        let mut homes = HashMap::new();
        for record in library.images() {
            for row in rows(library, record.id) {
                let address = Address { image: record.id, block: row.block };
                homes.insert(address, *lowest.entry((row.hash, row.variant)).or_insert(address));
            }
        }
        Model { homes }
    }

    /// The canonical addresses of an image in order of block.
    fn of_image(&self, image: ImageId) -> Vec<(u32, Address)> {
        let mut out: Vec<_> =
            self.homes.iter().filter(|(from, _)| from.image == image).map(|(from, home)| (from.block, *home)).collect();
        out.sort();
        out
    }
}

impl Canonical for Model {
    fn of(&mut self, image: ImageId, first: u32, count: u32) -> Result<Vec<Option<Address>>> {
        Ok((first..first + count).map(|block| self.homes.get(&Address { image, block }).copied()).collect())
    }
}

fn rows(library: &Library, image: ImageId) -> Vec<Row> {
    let record = library.image_by_id(image).unwrap();
    let stamp = run::Stamp { bytes: record.run.bytes, crc32c: record.run.crc32c };
    let mut rows: Vec<Row> =
        run::Reader::open(&library.run_path(record), stamp).unwrap().collect::<Result<_>>().unwrap();
    rows.sort_by_key(|r| r.block);
    rows
}

fn map_of(library: &Library, at: usize, homes: &[(u32, Address)], policy: Policy) -> Result<Vec<u8>> {
    let mut map = Offline::new(&library.images()[..=at]).unwrap();
    homes.iter().try_for_each(|(block, home)| map.push(*block, *home))?;
    Ok(map.finish(policy, &mut Model::new(library))?.0)
}

fn with_images(specs: &[Spec]) -> Place {
    let place = Place::new();
    for (i, s) in specs.iter().enumerate() {
        let file =
            place.raw(&format!("i{i}.raw"), &image_of(&s.contents, s.tail), |block| block % s.written_zeros == 0);
        place.add(&[(&format!("i{i}"), &file as &Path)]).unwrap();
    }
    place
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, max_shrink_iters: 200, ..ProptestConfig::default() })]

    /// Whatever the images, colliding hashes and unaligned ends too.
    #[test]
    fn maps_without_a_look_at_the_images_are_those_of_remap(
        specs in prop::collection::vec(spec(), 1..6),
        bridge in 0u32..6,
        min_run in 0u32..6,
    ) {
        let place = with_images(&specs);
        for policy in [Policy::Paper, Policy::Bridge { bridge, min_run }] {
            remap(&mut Writer::open(place.lib()).unwrap(), policy, &work()).unwrap();
            let library = place.library();
            let model = Model::new(&library);
            for (at, record) in library.images().iter().enumerate() {
                let made = map_of(&library, at, &model.of_image(record.id), policy).unwrap();
                prop_assert!(made == std::fs::read(library.map_path(&record.name)).unwrap(), "{}", record.name);
            }
        }
    }
}

/// A lost or doubled row, or one of another content: no map comes of it.
#[test]
fn a_wrong_answer_is_refused() {
    let same = Spec { contents: (20..30).collect(), tail: None, written_zeros: 1 };
    let place = with_images(&[same.clone(), same]);
    let library = place.library();
    let good = Model::new(&library).of_image(ImageId(1));
    assert!(map_of(&library, 1, &good, Policy::Paper).is_ok());

    let refused = |why: &str, change: &dyn Fn(&mut Vec<(u32, Address)>)| {
        let mut bad = good.clone();
        change(&mut bad);
        let err = map_of(&library, 1, &bad, Policy::BRIDGE).unwrap_err();
        assert!(err.kind() == ErrorKind::Corrupt && err.to_string().contains(why), "{err}");
    };
    refused("9 canonical addresses for 10", &|rows| rows.truncate(9));
    refused("twice", &|rows| rows.insert(4, rows[4]));
    refused("out of order", &|rows| rows.swap(1, 2));
    refused("cannot have", &|rows| rows[3].1.image = ImageId(2));
    refused("cannot have", &|rows| rows[3].1.block = 10);
    refused("not canonical", &|rows| rows[3].1.image = ImageId(1));
}
