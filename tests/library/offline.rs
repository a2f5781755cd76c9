//! Maps of canonical addresses alone, as an SQL engine finds them in the runs, against those of `library remap`.

use super::family::{Spec, spec};
use super::support::{BLOCK, Place, content, image_of, work};
use proptest::prelude::*;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use vmar::fingerprint::{Row, run};
use vmar::indexer::offline::{Address, Canonical, Offline, in_order};
use vmar::indexer::remap::remap_by;
use vmar::library::{ImageRecord, Library, Policy, Runs, Writer};
use vmar::{ErrorKind, Result};

/// Blocks of an image, and where they are canonically.
type Homes = Vec<(u32, Address)>;

/// What the engine has to find: by (hash, variant) the lowest address.
struct Model<'a> {
    images: Vec<&'a ImageRecord>,
    policy: Policy,
    homes: HashMap<Address, Address>,
}

impl<'a> Model<'a> {
    /// Of the library's policy.
    fn new(library: &'a Library) -> Model<'a> {
        let policy = library.catalog().policy;
        let images = in_order(library.images(), policy, &library.catalog().preference);
        let mut lowest = HashMap::new();
        let mut homes = HashMap::new();
        for (rank, record) in (0..).zip(&images) {
            for row in rows(library, record) {
                let address = Address { rank, block: row.block };
                homes.insert(address, *lowest.entry((row.hash, row.variant)).or_insert(address));
            }
        }
        Model { images, policy, homes }
    }

    /// The canonical addresses of an image in order of block.
    fn of_image(&self, rank: usize) -> Homes {
        let mut out: Vec<_> = self.homes.iter().filter(|(from, _)| from.rank as usize == rank).collect();
        out.sort();
        out.into_iter().map(|(from, home)| (from.block, *home)).collect()
    }

    /// The map that comes of these canonical addresses.
    fn map(&self, rank: usize, homes: &[(u32, Address)]) -> Result<Vec<u8>> {
        let mut map = Offline::new(&self.images[..=rank]).unwrap();
        homes.iter().try_for_each(|(block, home)| map.push(*block, *home))?;
        Ok(map.finish(self.policy, &mut Known(&self.homes))?.0)
    }
}

struct Known<'a>(&'a HashMap<Address, Address>);

impl Canonical for Known<'_> {
    fn of(&mut self, rank: u32, first: u32, count: u32) -> Result<Vec<Option<Address>>> {
        Ok((first..first + count).map(|block| self.0.get(&Address { rank, block }).copied()).collect())
    }
}

/// In order of block.
fn rows(library: &Library, record: &ImageRecord) -> Vec<Row> {
    let stamp = run::Stamp { bytes: record.run.bytes, crc32c: record.run.crc32c };
    let mut rows: Vec<Row> = run::Reader::open(&library.run_path(record), stamp).unwrap().map(Result::unwrap).collect();
    rows.sort_by_key(|r| r.block);
    rows
}

/// Remaps the library, and makes the same maps without it.
fn check(place: &Place, policy: Policy, usage: Option<BTreeMap<u32, u64>>) {
    remap_by(&mut Writer::open(place.lib()).unwrap(), policy, usage, &work()).unwrap();
    let library = place.library();
    let model = Model::new(&library);
    for (rank, record) in model.images.iter().enumerate() {
        let made = model.map(rank, &model.of_image(rank)).unwrap();
        assert!(made == std::fs::read(library.map_path(&record.name)).unwrap(), "{policy}: {}", record.name);
    }
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
        runs in (0u32..6, 0u32..6).prop_map(|(bridge, min_run)| Runs { bridge, min_run }),
        usage in prop::collection::vec(0u64..4, 5),
    ) {
        let place = with_images(&specs);
        let usage = (0..).zip(usage).collect();
        for policy in [Policy::Paper, Policy::Bridge(runs), Policy::LeastFragmented(runs)] {
            check(&place, policy, None);
        }
        check(&place, Policy::MostUsed(runs), Some(usage));
    }
}

/// Runs are cut at 16 GiB, so that no image need be in memory as a whole.
#[test]
fn runs_end_where_those_of_remap_end() {
    let place = Place::new();
    for name in ["a", "b"] {
        let file = File::create(place.path(name)).unwrap();
        file.set_len((16 << 30) + 100 * BLOCK as u64).unwrap();
        for block in 0..12 {
            file.write_all_at(&content(20 + block), (16 << 30) - 4 * BLOCK as u64 + u64::from(block) * BLOCK as u64)
                .unwrap();
        }
    }
    place.add(&[("a", &place.path("a")), ("b", &place.path("b"))]).unwrap();
    check(&place, Policy::Bridge(Runs { bridge: 0, min_run: 6 }), None);
    let map = vmar::indexer::read_map(&place.library(), place.library().image("b").unwrap()).unwrap();
    assert_eq!(map.totals().redirected_blocks, 8, "and not 12");
}

/// A lost or doubled row, or one of another content: no map comes of it.
#[test]
fn a_wrong_answer_is_refused() {
    let same = Spec { contents: (20..30).collect(), tail: None, written_zeros: 1 };
    let place = with_images(&[same.clone(), same]);
    let library = place.library();
    let model = Model::new(&library);
    let good = model.of_image(1);
    assert!(model.map(1, &good).is_ok());

    let refused = |why: &str, change: &dyn Fn(&mut Homes)| {
        let mut bad = good.clone();
        change(&mut bad);
        let err = model.map(1, &bad).unwrap_err();
        assert!(err.kind() == ErrorKind::Corrupt && err.to_string().contains(why), "{err}");
    };
    refused("9 canonical addresses for 10", &|rows| rows.truncate(9));
    refused("twice", &|rows| rows.insert(4, rows[4]));
    refused("out of order", &|rows| rows.swap(1, 2));
    refused("cannot have", &|rows| rows[3].1.rank = 2);
    refused("cannot have", &|rows| rows[3].1.block = 10);
    refused("not canonical", &|rows| rows[3].1.rank = 1);
}
