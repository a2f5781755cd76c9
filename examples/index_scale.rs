//! How the cost of adding and removing one image grows with the library: the same image, in libraries of more and more
//! contents.
//!
//! ```text
//! cargo run --release --example index_scale -- --library DIR --image FILE [--contents 1e6,1e7,1e8] [--rounds 3]
//! ```
//!
//! DIR is a library of real images, which is copied for each size (raw images stay where they are). To its content index a
//! table of made-up contents is added, as many images would leave it; then FILE is added and removed by the `vmar` beside
//! this program, with cold caches (as root; otherwise they stay warm). Printed are wall time, the part of it that was
//! hashing alone, one sequential read of the index, and the peak memory (getrusage) of the `vmar` process. Needs 26 bytes of disk a content.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, reason = "a program of its own")]

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use vmar::index::sets::Identity;
use vmar::index::{Row, Sets, TableWriter};
use vmar::library::{TableRef, Writer, index_file};

/// The image that holds what is made up.
const NOBODY: u32 = u32::MAX - 1;

struct Args {
    library: PathBuf,
    image: PathBuf,
    contents: Vec<u64>,
    rounds: u32,
}

fn args() -> Args {
    let mut args = Args { library: PathBuf::new(), image: PathBuf::new(), contents: vec![1_000_000], rounds: 3 };
    let mut given = std::env::args().skip(1);
    while let Some(name) = given.next() {
        let value = given.next().unwrap_or_else(|| panic!("{name} needs a value"));
        match name.as_str() {
            "--library" => args.library = value.into(),
            "--image" => args.image = value.into(),
            "--contents" => args.contents = value.split(',').map(|n| n.parse::<f64>().unwrap() as u64).collect(),
            "--rounds" => args.rounds = value.parse().unwrap(),
            _ => panic!("there is no option {name}"),
        }
    }
    args
}

fn copy_dir(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (path, name) = entry.map(|e| (e.path(), e.file_name())).unwrap();
        if path.is_dir() { copy_dir(&path, &to.join(name)) } else { fs::copy(&path, to.join(name)).map(drop).unwrap() }
    }
}

/// Adds a table of `count` made-up contents, the oldest one.
fn enlarge(library: &Path, count: u64) {
    let mut writer = Writer::open(library).unwrap();
    let mut change = writer.begin();
    let catalog = change.library().catalog().clone();
    let (uuid, id) = (catalog.uuid_bytes(), catalog.next_file);
    let (domain, mut index) = catalog.index.iter().next().map(|(d, i)| (d.clone(), i.clone())).unwrap();
    let old = fs::read(library.join(&index.sets)).unwrap();
    let mut sets = Sets::decode(&old, &Identity { library: uuid, id: index.sets_id }).unwrap();
    let set = sets.intern(&[NOBODY]).unwrap();

    let mut table = TableWriter::create(&change.stage(&index_file(id, "table")).unwrap(), uuid, id).unwrap();
    let step = u64::MAX / count;
    let mut noise = 1u64;
    for n in 0..count {
        // Evenly spread, as hashes are, but for a jitter: in order without being sorted.
        noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let mut hash = [0; 20];
        hash[..8].copy_from_slice(&(n * step + (noise >> 33) % step).to_be_bytes());
        hash[8..16].copy_from_slice(&noise.to_be_bytes());
        table.push(&Row { hash, variant: 0, set }).unwrap();
        sets.gain(set);
    }
    let rows = table.finish().unwrap().rows;
    index.tables.push(TableRef { file: index_file(id, "table").into(), id, rows });
    change.remove(&index.sets);
    let sets_id = id + 1;
    fs::write(
        change.stage(&index_file(sets_id, "sets")).unwrap(),
        sets.encode(&Identity { library: uuid, id: sets_id }),
    )
    .unwrap();
    (index.sets, index.sets_id) = (index_file(sets_id, "sets").into(), sets_id);
    change
        .commit(|catalog| {
            catalog.next_file = sets_id + 1;
            catalog.index.insert(domain, index);
        })
        .unwrap();
}

fn drop_caches() {
    let _ = Command::new("sync").status();
    let _ = fs::write("/proc/sys/vm/drop_caches", "3");
}

/// Wall time in seconds, peak memory in MiB, and what was printed.
fn run(library: &Path, args: &[&str]) -> (f64, u64, String) {
    let vmar = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("vmar");
    drop_caches();
    let began = Instant::now();
    // GNU time tells the peak of this one process.
    let output = Command::new("/usr/bin/time")
        .args(["-f", "%M", "--"])
        .arg(&vmar)
        .arg("--library")
        .arg(library)
        .args(args)
        .output();
    let output = output.expect("/usr/bin/time is missing: apt install time");
    let took = began.elapsed().as_secs_f64();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let peak: u64 = errors.lines().last().unwrap().trim().parse().unwrap();
    (took, peak / 1024, String::from_utf8(output.stdout).unwrap())
}

fn read_index(library: &Path) -> f64 {
    drop_caches();
    let began = Instant::now();
    let mut buf = vec![0; 1 << 20];
    for entry in fs::read_dir(library.join("index")).unwrap() {
        let mut file = File::open(entry.unwrap().path()).unwrap();
        while file.read(&mut buf).unwrap() > 0 {}
    }
    began.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let args = args();
    let image = format!("new={}", args.image.display());
    println!("contents      add/s  hash/s  read index/s  add ÷ (hash + read)  add MiB  remove/s  remove MiB");
    for &count in &args.contents {
        let library = args.library.with_extension("scaled");
        let _ = fs::remove_dir_all(&library);
        copy_dir(&args.library, &library);
        enlarge(&library, count);
        let (mut adds, mut hashes, mut removes, mut reads) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut peak = [0, 0];
        for _ in 0..args.rounds {
            let (took, memory, text) = run(&library, &["--json", "image", "add", &image]);
            let said: serde_json::Value = serde_json::from_str(&text).unwrap();
            adds.push(took);
            hashes.push(said[0]["hash_seconds"].as_f64().unwrap());
            peak[0] = peak[0].max(memory);
            reads.push(read_index(&library));
            let (took, memory, _) = run(&library, &["image", "remove", "new"]);
            removes.push(took);
            peak[1] = peak[1].max(memory);
        }
        let [add, hash, remove, read] = [adds, hashes, removes, reads].map(median);
        println!(
            "{count:<12} {add:>6.2}  {hash:>6.2}  {read:>12.2}  {:>19.2}  {:>7}  {remove:>8.2}  {:>10}",
            add / (hash + read),
            peak[0],
            peak[1]
        );
        fs::remove_dir_all(&library).unwrap();
    }
}
