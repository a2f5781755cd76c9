//! The statements against what vmar's own code says of the same library, and against the documentation.

use super::preference::preference;
use super::session::Engine;
use super::synthesize::Family;
use super::{homes, sql, synthesize, tables};
use datafusion::arrow::array::{AsArray, Int64Array, RecordBatch};
use datafusion::arrow::datatypes::Int64Type;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use vmar::ErrorKind;
use vmar::fingerprint::{Algorithm, Hash, run};
use vmar::indexer::add::{NewImage, add, add_to};
use vmar::indexer::remap::{remap, remap_by};
use vmar::indexer::{MEMORY_DEFAULT, Silent, Work, stats};
use vmar::library::{Library, Policy, Runs, Writer, domain};

static GO_ON: AtomicBool = AtomicBool::new(false);

fn work() -> Work<'static> {
    Work { threads: 2, stop: &GO_ON, observer: &Silent, memory: MEMORY_DEFAULT }
}

/// A library of four images that share a lot, one that is all zeros, and two with the same unaligned end.
fn real_library(dir: &Path) -> Library {
    let lib = dir.join("lib [a*b] %41");
    Library::init(&lib, Policy::BRIDGE, Algorithm::Sha1).unwrap();
    let family = Family { seed: 7, blocks: 3000 };
    let mut new = Vec::new();
    for image in 0..7u32 {
        let mut bytes = Vec::new();
        for content in family.contents(image.min(4)).iter().take(if image == 5 { 0 } else { 3000 }) {
            let key = content.map_or(0, |c| c + 1);
            bytes.extend(key.to_le_bytes().repeat(512));
        }
        bytes.extend(if image == 5 { [0; 512] } else { [9; 512] });
        let file = dir.join(format!("{image}.raw"));
        fs::write(&file, bytes).unwrap();
        new.push(NewImage { name: format!("image{image}"), file });
    }
    add(&mut Writer::open(&lib).unwrap(), &new, &work()).unwrap();
    Library::open(&lib).unwrap()
}

fn rows_of(library: &Library) -> BTreeMap<(Hash, u32), Vec<u32>> {
    let mut out: BTreeMap<(Hash, u32), Vec<u32>> = BTreeMap::new();
    for record in library.images() {
        let stamp = run::Stamp { bytes: record.run.bytes, crc32c: record.run.crc32c };
        for row in run::Reader::open(&library.run_path(record), stamp).unwrap().map(Result::unwrap) {
            out.entry((row.hash, row.variant)).or_default().push(record.id.0);
        }
    }
    out
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap().block_on(future)
}

fn ask(library: &Library, statement: &str) -> Vec<RecordBatch> {
    let text = sql::STATEMENTS.iter().find(|(name, _)| *name == statement).map_or(statement, |(_, text)| text);
    block_on(async {
        let ctx = Engine::default().session().await.unwrap();
        tables::register(&ctx, library, &tables::domains(library)[0]).await.unwrap();
        ctx.sql(text).await.unwrap().collect().await.unwrap()
    })
}

fn numbers(batch: &RecordBatch, column: usize) -> &Int64Array {
    batch.column(column).as_primitive::<Int64Type>()
}

#[test]
fn maps_are_those_of_remap_with_little_memory_too() {
    let dir = tempfile::tempdir().unwrap();
    let library = real_library(dir.path());
    let short = Runs { bridge: 3, min_run: 2 };
    let mut maps = BTreeSet::new();
    let others = [Policy::Bridge(short), Policy::LeastFragmented(short), Policy::MostUsed(short)];
    for (n, policy) in Policy::ALL.into_iter().chain(others).enumerate() {
        let usage = matches!(policy, Policy::MostUsed(_)).then(|| [(1, 5), (3, 9), (4, 9)].into());
        remap_by(&mut Writer::open(library.dir()).unwrap(), policy, usage, &work()).unwrap();
        let library = Library::open(library.dir()).unwrap();
        maps.insert(fs::read(library.map_path("image2")).unwrap());
        for (memory, partitions) in [(None, None), (Some(64 << 20), Some(3))] {
            let engine = Engine { memory, partitions, ..Engine::default() };
            let out = dir.path().join(format!("out{n}"));
            block_on(homes::run(&library, &engine, policy, &out)).unwrap();
            for record in library.images() {
                let made = fs::read(out.join(format!("{}.map", record.name))).unwrap();
                assert!(made == fs::read(library.map_path(&record.name)).unwrap(), "{policy}: {}", record.name);
            }
            assert_eq!(fs::read_dir(&out).unwrap().count(), library.images().len(), "nothing else is left");
        }
    }
    assert_eq!(maps.len(), Policy::ALL.len() + others.len(), "they differ");
}

/// What `remap` would go by if it were asked now, and not what it went by.
#[test]
fn preferences_are_those_of_remap() {
    let dir = tempfile::tempdir().unwrap();
    let library = real_library(dir.path());
    let now = |library: &Library, policy| {
        block_on(preference(library, &Engine::default(), policy, &tables::domains(library)[0]))
    };
    let lengths = now(&library, Policy::LeastFragmented(Runs::DEFAULT)).unwrap();
    let err = now(&library, Policy::MostUsed(Runs::DEFAULT)).unwrap_err();
    assert!(err.kind() == ErrorKind::Usage && err.to_string().contains("--traces"), "{err}");

    let usage = [(2, 7)].into();
    let mut writer = Writer::open(library.dir()).unwrap();
    remap_by(&mut writer, Policy::MostUsed(Runs::DEFAULT), Some(usage), &work()).unwrap();
    assert_eq!(now(writer.library(), Policy::MostUsed(Runs::DEFAULT)).unwrap(), [(2, 7)].into());
    remap(&mut writer, Policy::LeastFragmented(Runs::DEFAULT), &work()).unwrap();
    let mut want = writer.library().catalog().preference.clone();
    want.retain(|_, length| *length > 0);
    assert!(lengths == want && want.len() > 3, "{lengths:?} {want:?}");
}

/// Sharing domains see nothing of each other; IDs have holes.
#[test]
fn each_domain_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let lib = dir.path().join("lib");
    Library::init(&lib, Policy::Paper, Algorithm::Sha1).unwrap();
    let mut writer = Writer::open(&lib).unwrap();
    for domain in ["red", "blue"] {
        domain::add(&mut writer, domain, false).unwrap();
        fs::write(dir.path().join(domain), [5; 40960]).unwrap();
    }
    for (name, domain) in [("a", "red"), ("b", "blue"), ("c", "red"), ("d", "blue")] {
        let image = NewImage { name: name.to_string(), file: dir.path().join(domain) };
        add_to(&mut writer, Some(domain), &[image], &work()).unwrap();
    }
    let library = Library::open(&lib).unwrap();
    assert_eq!(tables::domains(&library).len(), 2);
    let out = dir.path().join("out");
    block_on(homes::run(&library, &Engine::default(), Policy::Paper, &out)).unwrap();
    for record in library.images() {
        let made = fs::read(out.join(format!("{}.map", record.name))).unwrap();
        assert!(made == fs::read(library.map_path(&record.name)).unwrap(), "{}", record.name);
    }
    // What an image finds in the public domain is not in its run.
    domain::publish(&mut writer, "red").unwrap();
    let library = Library::open(&lib).unwrap();
    let err = block_on(homes::run(&library, &Engine::default(), Policy::Paper, &out)).unwrap_err();
    assert!(err.to_string().contains("image b: is of a private sharing domain beside the public one"), "{err}");
}

#[test]
fn a_damaged_run_stops_it_and_a_library_is_no_place_for_maps() {
    let dir = tempfile::tempdir().unwrap();
    let library = real_library(dir.path());
    let maps = library.dir().join("maps");
    let err = block_on(homes::run(&library, &Engine::default(), Policy::Paper, &maps)).unwrap_err();
    assert!(err.to_string().contains("inside the library"), "{err}");
    let run = library.run_path(&library.images()[1]);
    let mut bytes = fs::read(&run).unwrap();
    bytes[1000] ^= 1;
    fs::write(&run, bytes).unwrap();
    let out = dir.path().join("out");
    let err = block_on(homes::run(&library, &Engine::default(), Policy::Paper, &out)).unwrap_err();
    assert!(err.to_string().contains("image1.1.parquet: its checksum is wrong"), "{err}");
    assert_eq!(fs::read_dir(&out).unwrap().count(), 0);
}

#[test]
fn clusters_are_those_of_stats() {
    let dir = tempfile::tempdir().unwrap();
    let library = real_library(dir.path());
    let mut found = BTreeMap::new();
    for batch in ask(&library, "clusters") {
        let sets = batch.column(0).as_list::<i32>();
        for i in 0..batch.num_rows() {
            let set: Vec<i64> = sets.value(i).as_primitive::<Int64Type>().values().to_vec();
            let told = (numbers(&batch, 1).value(i), numbers(&batch, 2).value(i));
            assert!(set.is_sorted() && found.insert(set, told).is_none(), "each set once");
        }
    }
    let mut want: BTreeMap<Vec<i64>, (i64, i64)> = BTreeMap::new();
    for holders in rows_of(&library).values() {
        let set: BTreeSet<i64> = holders.iter().map(|&i| i.into()).collect();
        let told = want.entry(set.into_iter().collect()).or_default();
        (told.0, told.1) = (told.0 + 1, told.1 + i64::try_from(holders.len()).unwrap());
    }
    assert_eq!(found, want);
    assert_eq!(found.len() as u64, stats::stats(&library, None).unwrap().clusters);
}

#[test]
fn what_two_images_share() {
    let dir = tempfile::tempdir().unwrap();
    let library = real_library(dir.path());
    let mut want: BTreeMap<(i64, i64), i64> = BTreeMap::new();
    for holders in rows_of(&library).values() {
        let images: BTreeSet<u32> = holders.iter().copied().collect();
        for &holder in holders {
            images.iter().for_each(|&other| *want.entry((holder.into(), other.into())).or_default() += 1);
        }
    }
    let mut found = BTreeMap::new();
    for batch in ask(&library, "similarity") {
        for i in 0..batch.num_rows() {
            found.insert((numbers(&batch, 0).value(i), numbers(&batch, 1).value(i)), numbers(&batch, 2).value(i));
        }
    }
    assert_eq!(found, want);
    assert_eq!(numbers(&ask(&library, "shared")[0], 0).value(0), want[&(1, 0)]);
}

/// Hundreds of runs, and hashes that collide, in a library that was never real.
#[test]
fn many_runs() {
    let dir = tempfile::tempdir().unwrap();
    let lib = dir.path().join("lib");
    synthesize::library(&lib, &Family { seed: 3, blocks: 1200 }, 300).unwrap();
    let library = Library::open(&lib).unwrap();
    assert!(rows_of(&library).keys().any(|(_, variant)| *variant == 1), "some collide");
    block_on(homes::run(&library, &Engine::default(), Policy::BRIDGE, &dir.path().join("out"))).unwrap();
}

/// The statements of the documentation are those of the binary.
#[test]
fn the_documentation_has_these_very_statements() {
    let doc = include_str!("../../../docs/index-sql.md");
    for (name, text) in sql::STATEMENTS.iter().chain([&("run", sql::RUN)]) {
        assert!(doc.contains(&format!("```sql\n{text}```")), "docs/index-sql.md does not have sql/{name}.sql");
    }
    assert_eq!(doc.matches("```sql\n").count(), sql::STATEMENTS.len() + 1, "and no others");
}
