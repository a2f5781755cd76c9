//! Rounds of vmar and QEMU in turn on one overlay, at random, against a flat model: content, and where it comes from.
//!
//! `VMAR_TEST_SEED` and `VMAR_TEST_ROUNDS` repeat or lengthen it. Needs QEMU 10 beside the installed one:
//! `tests/qemu/qemu10.sh` unpacks it into `build/qemu10`, or `VMAR_QEMU10_DIR` says where it is.

use crate::common::*;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use vmar::overlay::{self, CreateOptions, OpenOptions, Overlay, RelayoutOptions, Work};

const SUB: usize = 2048;
const CLUSTER: usize = 65536;
/// Base and disk end inside a subcluster.
const BASE_SIZE: u64 = (6 << 20) + 2560;
const SIZE: u64 = (9 << 20) + 1536;
/// There is room for some growth by QEMU; what comes after that needs a new layout.
const CAPACITY: u64 = 10 << 20;
const SIZE_MAX: u64 = 14 << 20;

struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    /// A range of sectors in bytes: small ones, ones with whole clusters, and ones that start or end on a cluster.
    fn range(&mut self, size: u64) -> (u64, u64) {
        let sectors = size / 512;
        let mut at = self.below(sectors);
        let mut len = match self.below(6) {
            0..=2 => 1 + self.below(12),
            3 => 1 + self.below(200),
            _ => 1 + self.below(1000),
        };
        if self.below(3) == 0 {
            at -= at % 128;
        }
        if self.below(3) == 0 {
            len = len.next_multiple_of(128) - at % 128;
        }
        (at * 512, len.min(sectors - at) * 512)
    }
}

/// Where the content of a subcluster comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum From {
    Base,
    Data,
    Zero,
    /// QEMU may write zeros or note them.
    DataOrZero,
}

/// The disk as it has to be.
struct Model {
    bytes: Vec<u8>,
    from: Vec<From>,
}

impl Model {
    fn subs(at: usize, len: usize) -> std::ops::Range<usize> {
        at / SUB..(at + len).div_ceil(SUB)
    }

    fn is_whole(&self, sub: usize, at: usize, len: usize) -> bool {
        at <= sub * SUB && ((sub + 1) * SUB).min(self.bytes.len()) <= at + len
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.from[Model::subs(at, bytes.len())].fill(From::Data);
    }

    fn zero(&mut self, at: usize, len: usize, by_qemu: bool) {
        self.bytes[at..at + len].fill(0);
        for sub in Model::subs(at, len) {
            self.from[sub] = match self.from[sub] {
                _ if self.is_whole(sub, at, len) => From::Zero,
                From::Zero => From::Zero,
                From::DataOrZero => From::DataOrZero,
                // QEMU may have noted zeros for whole clusters when the disk ended in one of them.
                From::Base if sub as u64 >= SIZE / SUB as u64 => From::DataOrZero,
                _ if by_qemu => From::DataOrZero,
                _ => From::Data,
            };
        }
    }

    /// QEMU discards whole clusters and nothing else; the last one of the disk may be a part.
    fn discard(&mut self, at: usize, len: usize) {
        let end = if at + len == self.bytes.len() { at + len } else { (at + len) / CLUSTER * CLUSTER };
        let at = at.next_multiple_of(CLUSTER);
        if at < end {
            self.zero(at, end - at, true);
        }
    }

    fn grow(&mut self, size: u64) {
        self.bytes.resize(size as usize, 0);
        self.from.resize(self.bytes.len().div_ceil(SUB), From::Base);
    }

    /// Compares with `qemu-img map --output=json`.
    fn check_map(&self, map: &serde_json::Value, data_start: Option<u64>, context: &str) {
        let mut covered = 0;
        for extent in map.as_array().unwrap() {
            let number = |key: &str| extent[key].as_u64();
            let (start, len) = (number("start").unwrap(), number("length").unwrap());
            assert_eq!(start, covered, "{context}");
            covered += len;
            let own = extent["depth"] == 0;
            let (data, zero) = (extent["data"] == true, extent["zero"] == true);
            if let (true, true, Some(data_start)) = (own, data, data_start) {
                assert_eq!(number("offset"), Some(data_start + start), "{context}: at home");
            }
            for sub in Model::subs(start as usize, len as usize) {
                let behind_base = (sub * SUB) as u64 >= BASE_SIZE;
                let agrees = match self.from[sub] {
                    // Which of several files has nothing there is not told.
                    From::Base if behind_base => !data && zero,
                    From::Base => !own,
                    From::Data => own && data,
                    From::Zero => own && zero && !data,
                    From::DataOrZero => own,
                };
                // The end of the base is in the middle of a subcluster.
                let mixed = (sub * SUB) as u64 <= BASE_SIZE && BASE_SIZE < ((sub + 1) * SUB) as u64;
                assert!(agrees || mixed, "{context}: subcluster {sub} is {:?}; {extent}", self.from[sub]);
            }
        }
        assert_eq!(covered, self.bytes.len() as u64, "{context}");
    }
}

/// One QEMU: a directory with its tools, or the installed one.
struct Qemu {
    name: &'static str,
    bin: Option<PathBuf>,
    /// Of the qcow2 driver.
    options: &'static str,
}

impl Qemu {
    fn all() -> Vec<Qemu> {
        let dir = std::env::var_os("VMAR_QEMU10_DIR")
            .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("build/qemu10"), PathBuf::from);
        let bin = dir.join("bin");
        assert!(
            bin.join("qemu-io").exists(),
            "{}: no qemu-io; run tests/qemu/qemu10.sh or set VMAR_QEMU10_DIR",
            bin.display()
        );
        vec![
            Qemu { name: "installed", bin: None, options: "" },
            Qemu { name: "10.0", bin: Some(bin.clone()), options: "" },
            Qemu { name: "10.0 discard-no-unref", bin: Some(bin), options: ",discard-no-unref=on" },
        ]
    }

    fn tool(&self, name: &str) -> String {
        self.bin.as_ref().map_or(name.to_string(), |bin| path_str(&bin.join(name)).to_string())
    }

    fn img(&self, args: &[&str]) -> String {
        qemu(&[&[self.tool("qemu-img").as_str()], args].concat())
    }

    fn io(&self, file: &Path, commands: &[String]) {
        let tool = self.tool("qemu-io");
        let image = format!("driver=qcow2,discard=unmap{},file.filename={}", self.options, path_str(file));
        let mut line = vec![tool.as_str(), "--image-opts"];
        commands.iter().for_each(|c| line.extend(["-c", c]));
        line.push(&image);
        let text = qemu(&line);
        assert!(!text.contains("failed"), "{text}");
    }
}

#[derive(Default)]
struct Counts {
    vmar: BTreeMap<&'static str, u64>,
    qemu: BTreeMap<&'static str, u64>,
    compared: u64,
    relayouts: u64,
    /// Refusals because QEMU wrote after a kill.
    overtaken: u64,
    seated: u64,
}

struct Rounds {
    fx: Fixture,
    file: PathBuf,
    model: Model,
    rng: Rng,
    counts: Counts,
    /// vmar was killed with nothing unflushed.
    flushed: bool,
}

impl Rounds {
    fn new(seed: u64) -> Rounds {
        let fx = Fixture::with_sizes(BASE_SIZE, SIZE);
        let file = fx.dir.path().join("vm.qcow2");
        let options = CreateOptions { capacity: CAPACITY, ..fx.create_options() };
        overlay::create(&file, &options).unwrap();
        let mut bytes = fx.base.clone();
        bytes.resize(SIZE as usize, 0);
        let from = vec![From::Base; bytes.len().div_ceil(SUB)];
        Rounds { fx, file, model: Model { bytes, from }, rng: Rng(seed), counts: Counts::default(), flushed: false }
    }

    fn size(&self) -> u64 {
        self.model.bytes.len() as u64
    }

    /// Opens for writing, in the way that the refusal says if there is one.
    fn open(&mut self) -> Overlay {
        let state_dir = self.fx.state_dir();
        let base = Some(self.fx.identity());
        let mut options = OpenOptions { read_only: false, state_dir: &state_dir, base, discard_unflushed: false };
        loop {
            let refusal = match Overlay::open(&self.file, &options) {
                Ok(o) => return o,
                Err(e) => e.to_string(),
            };
            let discard_unflushed = options.discard_unflushed;
            if self.flushed && refusal.contains("and then QEMU wrote to it") && !discard_unflushed {
                // What of it was flushed cannot be told from outside. Here it is known that all was.
                options.discard_unflushed = true;
                self.counts.overtaken += 1;
                continue;
            }
            assert!(refusal.contains("'vmar overlay relayout"), "{refusal}");
            self.counts.relayouts += 1;
            let stop = AtomicBool::new(false);
            let work = Work { stop: &stop, begin: &|_, _| {}, advance: &|_| {} };
            let how = |discard_unflushed| RelayoutOptions {
                out: None,
                size: None,
                capacity: None,
                state_dir: &state_dir,
                discard_unflushed,
            };
            if let Err(e) = overlay::relayout(&self.file, &how(false), &work) {
                assert!(self.flushed && e.to_string().contains("--discard-unflushed"), "{e}");
                self.counts.overtaken += 1;
                overlay::relayout(&self.file, &how(true), &work).unwrap();
            }
        }
    }

    fn vmar_turn(&mut self, context: &str) {
        let freed = overlay::examine(&self.file).map_or(0, |report| report.freed_clusters);
        let mut o = self.open();
        self.counts.seated += freed;
        self.flushed = false;
        assert!(read_all(&o, &self.fx) == self.model.bytes, "{context}: vmar reads what QEMU wrote");
        for _ in 0..40 {
            let (at, len) = self.rng.range(self.size());
            let what = match self.rng.below(10) {
                0..=4 => {
                    let bytes = vec![1 + self.rng.below(255) as u8; len as usize];
                    write(&o, &self.fx, at, &bytes);
                    self.model.write(at as usize, &bytes);
                    "write"
                }
                n @ 5..=7 => {
                    o.write_zeroes(at, len, n > 5, &self.fx).unwrap();
                    self.model.zero(at as usize, len as usize, false);
                    "write-zeroes"
                }
                8 => {
                    o.flush().unwrap();
                    "flush"
                }
                _ => {
                    drop(o);
                    o = self.open();
                    "kill"
                }
            };
            *self.counts.vmar.entry(what).or_default() += 1;
        }
        if self.rng.below(4) == 0 && self.size() < o.capacity() {
            let size = self.size() + 512 * (1 + self.rng.below((o.capacity() - self.size()) / 512));
            o.resize(size).unwrap();
            self.model.grow(size);
            *self.counts.vmar.entry("resize").or_default() += 1;
        }
        assert!(read_all(&o, &self.fx) == self.model.bytes, "{context}: vmar reads what vmar wrote");
        if self.rng.below(3) == 0 {
            // Killed with nothing unflushed.
            o.flush().unwrap();
            self.flushed = true;
            *self.counts.vmar.entry("kill").or_default() += 1;
        } else {
            o.close().unwrap();
        }
    }

    fn qemu_turn(&mut self, qemu: &Qemu) {
        let grows = self.rng.below(4) == 0 && self.size() + 512 < SIZE_MAX;
        if grows {
            let size = self.size() + 512 * (1 + self.rng.below((SIZE_MAX - self.size()) / 512).min(2500));
            qemu.img(&["resize", "-q", "-f", "qcow2", path_str(&self.file), &size.to_string()]);
            self.model.grow(size);
            *self.counts.qemu.entry("resize").or_default() += 1;
        }
        let mut commands = Vec::new();
        for _ in 0..25 {
            let (at, len) = self.rng.range(self.size());
            let (a, l) = (at as usize, len as usize);
            let (what, command) = match self.rng.below(10) {
                0..=4 => {
                    let byte = 1 + self.rng.below(255) as u8;
                    self.model.write(a, &vec![byte; l]);
                    ("write", format!("write -P {byte} {at} {len}"))
                }
                5 | 6 => {
                    self.model.zero(a, l, true);
                    ("write -z", format!("write -z {at} {len}"))
                }
                7 => {
                    self.model.zero(a, l, true);
                    ("write -z -u", format!("write -z -u {at} {len}"))
                }
                _ => {
                    self.model.discard(a, l);
                    ("discard", format!("discard {at} {len}"))
                }
            };
            *self.counts.qemu.entry(what).or_default() += 1;
            commands.push(command);
        }
        qemu.io(&self.file, &commands);
    }

    /// What QEMU says of the file; `data_start` if it is in vmar's layout.
    fn compare(&mut self, qemu: &Qemu, data_start: Option<u64>, context: &str) {
        let file = path_str(&self.file);
        assert!(qemu.img(&["check", "-f", "qcow2", file]).contains("No errors were found"), "{context}");
        let raw = self.fx.dir.path().join("flat.raw");
        qemu.img(&["convert", "-f", "qcow2", "-O", "raw", file, path_str(&raw)]);
        let flat = fs::read(&raw).unwrap();
        let differs = flat.iter().zip(&self.model.bytes).position(|(a, b)| a != b);
        assert!(flat.len() == self.model.bytes.len() && differs.is_none(), "{context}: differs at {differs:?}");
        let json = |text: String| -> serde_json::Value { serde_json::from_str(&text).unwrap() };
        self.model.check_map(&json(qemu.img(&["map", "-f", "qcow2", "--output=json", file])), data_start, context);
        let info = json(qemu.img(&["info", "-f", "qcow2", "--output=json", file]));
        assert_eq!(info["virtual-size"], self.size(), "{context}");
        assert_eq!(info["backing-filename"], path_str(&self.fx.base_path));
        assert_eq!(info["backing-filename-format"], "raw");
        assert_eq!((&info["dirty-flag"], &info["cluster-size"]), (&false.into(), &65536.into()));
        let specific = &info["format-specific"]["data"];
        assert_eq!((&specific["corrupt"], &specific["extended-l2"]), (&false.into(), &true.into()));
        self.counts.compared += 1;
    }
}

#[test]
fn vmar_and_two_qemus_in_turn_agree_with_a_flat_model() {
    let variable = |name: &str| std::env::var(name).ok().map(|v| v.parse::<u64>().unwrap());
    let seed = variable("VMAR_TEST_SEED").unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_nanos() as u64 % 1_000_000
    });
    let rounds = variable("VMAR_TEST_ROUNDS").unwrap_or(20);
    let qemus = Qemu::all();
    let mut r = Rounds::new(seed);
    for round in 0..rounds {
        // The installed one every other time, the two ways of 10.0 in between.
        let qemu = &qemus[[0, 1, 0, 2][round as usize % 4]];
        let context = format!("VMAR_TEST_SEED={seed}, round {round}, QEMU {}", qemu.name);
        r.vmar_turn(&context);
        let data_start = overlay::inspect(&r.file, &r.fx.state_dir()).unwrap().data_start;
        r.compare(qemu, Some(data_start), &format!("{context}, after vmar"));
        r.qemu_turn(qemu);
        r.compare(qemu, None, &format!("{context}, after QEMU"));
    }
    let context = format!("VMAR_TEST_SEED={seed}, at the end");
    r.vmar_turn(&context);
    r.compare(&qemus[0], None, &context);
    let counts = &r.counts;
    println!(
        "seed {seed}: {rounds} rounds; vmar {:?}; QEMU {:?}; {} comparisons of {} MiB, 0 mismatches; {} clusters seated, {} \
         relayouts, {} refusals of what a killed vmar might have lost",
        counts.vmar,
        counts.qemu,
        counts.compared,
        r.model.bytes.len() >> 20,
        counts.seated,
        counts.relayouts,
        counts.overtaken
    );
}
