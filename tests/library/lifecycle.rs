//! Images that come, go, change, and are captured, in random order: after every step the library must be what one look at
//! all bytes says.

use super::oracle;
use super::support::{BLOCK, Place, content, image_of};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;
use vmar::library::{Policy, Runs, Writer};

/// A generator of numbers; the seed of a failed test is in its output.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }

    /// A small image: runs of contents that others have too, zeros, blocks that collide, sometimes a short last block.
    fn image(&mut self) -> Vec<u8> {
        let mut contents = Vec::new();
        for _ in 0..1 + self.below(8) {
            let first = self.below(60) as u32;
            let len = 1 + self.below(12) as u32;
            match self.below(6) {
                0 => contents.extend((0..len).map(|_| 0)),
                1 => contents.extend((0..len).map(|_| self.below(9) as u32)),
                _ => contents.extend((0..len).map(|i| first + i)),
            }
        }
        let tail = (self.below(3) == 0).then(|| (self.below(12) as u32, 512 * (1 + self.below(7) as usize)));
        image_of(&contents, tail)
    }
}

/// The library and what must be in it, in order of ID.
struct Scene {
    place: Place,
    images: Vec<(String, Vec<u8>)>,
    random: Random,
    files: u32,
}

impl Scene {
    fn new(policy: Policy, seed: u64) -> Scene {
        Scene { place: Place::with(policy), images: Vec::new(), random: Random(seed), files: 0 }
    }

    fn new_file(&mut self, bytes: &[u8]) -> (String, PathBuf) {
        self.files += 1;
        let name = format!("i{}", self.files);
        let path = self.place.raw(&format!("{name}.raw"), bytes, |_| false);
        (name, path)
    }

    fn some_image(&mut self) -> usize {
        self.random.below(self.images.len() as u64) as usize
    }

    /// Chooses what to do next.
    fn next(&mut self) -> Step {
        let full = self.images.len() >= 9;
        match self.random.below(10) {
            _ if self.images.is_empty() => self.add(),
            0..=3 if !full => self.add(),
            4..=5 => self.update(),
            6..=7 if !full => self.capture(),
            8 => self.rename(),
            _ => self.remove(),
        }
    }

    /// Does it.
    fn run(&mut self, step: Step) -> &'static str {
        self.place.ok(&step.args);
        self.images = step.after;
        step.what
    }

    fn step(&mut self) -> &'static str {
        let step = self.next();
        self.run(step)
    }

    fn add(&mut self) -> Step {
        let (mut args, mut after) = (strings(&["image", "add"]), self.images.clone());
        for _ in 0..1 + self.random.below(2) {
            let bytes = self.random.image();
            let (name, path) = self.new_file(&bytes);
            args.push(format!("{name}={}", path.display()));
            after.push((name, bytes));
        }
        Step { what: "add", args, after }
    }

    fn remove(&mut self) -> Step {
        let (at, mut after) = (self.some_image(), self.images.clone());
        let (name, _) = after.remove(at);
        Step { what: "remove", args: strings(&["image", "remove", &name, "--force"]), after }
    }

    fn update(&mut self) -> Step {
        let (at, mut after) = (self.some_image(), self.images.clone());
        let (name, old) = after.remove(at);
        // Like the old content, as updates are, or quite another.
        let mut bytes = if self.random.below(3) == 0 { self.random.image() } else { old };
        let block = self.random.below(bytes.len().div_ceil(BLOCK) as u64) as usize * BLOCK;
        let end = (block + BLOCK).min(bytes.len());
        bytes[block..end].copy_from_slice(&content(self.random.below(70) as u32)[..end - block]);
        let (_, path) = self.new_file(&bytes);
        let args = strings(&["image", "update", &name, &path.display().to_string(), "--force"]);
        after.push((name, bytes));
        Step { what: "update", args, after }
    }

    fn rename(&mut self) -> Step {
        let (at, mut after) = (self.some_image(), self.images.clone());
        self.files += 1;
        let new = format!("r{}", self.files);
        let old = std::mem::replace(&mut after[at].0, new.clone());
        Step { what: "rename", args: strings(&["image", "rename", &old, &new]), after }
    }

    fn capture(&mut self) -> Step {
        let (at, mut after) = (self.some_image(), self.images.clone());
        let (base, mut bytes) = self.images[at].clone();
        self.files += 1;
        let (name, overlay) = (format!("c{}", self.files), self.place.path(&format!("c{}.qcow2", self.files)));
        let larger = bytes.len() + 512 * self.random.below(40) as usize;
        let (file, size) = (overlay.display().to_string(), larger.to_string());
        self.place.ok(&["overlay", "create", &file, "--image", &base, "--size", &size]);
        bytes.resize(larger, 0);
        for _ in 0..self.random.below(4) {
            let sectors = larger as u64 / 512;
            let from = self.random.below(sectors);
            let len = (1 + self.random.below(24)).min(sectors - from);
            let value = self.random.below(3) as u8 * 7;
            write(&overlay, from * 512, len * 512, value);
            bytes[from as usize * 512..(from + len) as usize * 512].fill(value);
        }
        let state = self.place.path("state").display().to_string();
        after.push((name.clone(), bytes));
        Step {
            what: "capture",
            args: strings(&["image", "capture", &name, "--overlay", &file, "--state-dir", &state]),
            after,
        }
    }

    fn expected(&self) -> Vec<(&str, Vec<u8>)> {
        self.images.iter().map(|(name, bytes)| (name.as_str(), bytes.clone())).collect()
    }
}

/// A command, and the images that there are once it has succeeded.
struct Step {
    what: &'static str,
    args: Vec<String>,
    after: Vec<(String, Vec<u8>)>,
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|s| s.to_string()).collect()
}

/// What a plain QEMU does to the overlay.
fn write(overlay: &Path, at: u64, len: u64, value: u8) {
    let command = format!("write -P {value} {at} {len}");
    let output = Command::new("qemu-io").args(["-f", "qcow2", "-c", &command]).arg(overlay).output();
    let output = output.expect("qemu-io is missing: apt install qemu-utils");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn seed() -> u64 {
    std::env::var("VMAR_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(5)
}

#[test]
fn after_every_one_of_200_steps_the_library_is_what_its_images_say() {
    let mut scene = Scene::new(Policy::Paper, seed());
    let mut counts = std::collections::BTreeMap::new();
    for step in 0..200 {
        let what = scene.step();
        *counts.entry(what).or_insert(0) += 1;
        eprintln!("step {step}: {what}, {} images", scene.images.len());
        oracle::check(&scene.place, &scene.expected());
        scene.place.assert_no_leftovers();
    }
    scene.place.ok(&["image", "verify"]);
    println!("{counts:?}");
    assert!(counts.len() == 5 && counts.values().all(|n| *n >= 8), "{counts:?}");
}

/// With runs arranged, the maps that follow step by step are those that are made at once.
#[test]
fn maps_that_followed_are_those_that_are_made_anew() {
    let mut scene = Scene::new(Policy::Bridge(Runs { bridge: 4, min_run: 3 }), seed() + 1);
    for step in 0..60 {
        let what = scene.step();
        eprintln!("step {step}: {what}");
        if step % 3 != 0 {
            continue;
        }
        let followed = maps(&scene.place);
        scene.place.ok(&["library", "remap"]);
        assert_eq!(maps(&scene.place), followed, "step {step}");
        let index = vmar::indexer::stats::indexed_clusters(&scene.place.library()).unwrap();
        scene.place.ok(&["library", "rebuild"]);
        assert_eq!(maps(&scene.place), followed, "step {step}");
        assert_eq!(vmar::indexer::stats::indexed_clusters(&scene.place.library()).unwrap(), index);
        scene.place.ok(&["image", "verify"]);
    }
}

fn maps(place: &Place) -> Vec<(String, Vec<u8>)> {
    let library = place.library();
    library.images().iter().map(|r| (r.name.clone(), fs::read(library.map_path(&r.name)).unwrap())).collect()
}

#[test]
fn an_image_with_overlays_is_not_removed_and_its_content_is_kept_by_an_update() {
    let mut scene = Scene::new(Policy::Paper, 3);
    let step = scene.add();
    scene.run(step);
    let place = &scene.place;
    let name = scene.images[0].0.clone();
    let old = place.library().image(&name).unwrap().clone();
    let overlay = place.path("vm.qcow2");
    place.ok(&["overlay", "create", overlay.to_str().unwrap(), "--image", &name]);
    let line = place.fails(1, &["image", "remove", &name]);
    assert!(line.contains("vm.qcow2") && line.contains("--force"), "{line}");
    place.ok(&["image", "remove", &name, "--dry-run"]);
    assert!(place.library().image(&name).is_ok());

    let new = place.raw("new.raw", &image_of(&[70, 71, 72], None), |_| false);
    let said = place.ok(&["image", "update", &name, new.to_str().unwrap()]);
    assert!(said.contains(&format!("{name}@1")), "{said}");
    let library = place.library();
    let (kept, updated) = (library.image(&format!("{name}@1")).unwrap(), library.image(&name).unwrap());
    assert_eq!((kept.id, kept.digest), (old.id, old.digest));
    assert_eq!((updated.generation, updated.blocks), (2, 3));
    assert!(updated.id > kept.id);
    place.assert_no_leftovers();
    place.ok(&["image", "verify"]);

    fs::remove_file(&overlay).unwrap();
    place.ok(&["image", "remove", &format!("{name}@1")]);
    place.ok(&["image", "update", &name, new.to_str().unwrap()]);
    assert!(place.library().image(&format!("{name}@2")).is_err(), "nobody needs it");
    place.assert_no_leftovers();
}

#[test]
fn a_file_that_vmar_made_goes_with_its_image_and_no_other() {
    let place = Place::new();
    let bytes = image_of(&[20, 21, 22, 23], None);
    let raw = place.raw("a.raw", &bytes, |_| false);
    let qcow2 = place.path("b.qcow2");
    let args = ["convert", "-O", "qcow2"].map(std::ffi::OsStr::new);
    super::support::qemu_img(&[&args[..], &[raw.as_os_str(), qcow2.as_os_str()]].concat());
    place.ok(&["image", "add", &format!("a={}", raw.display()), &format!("b={}", qcow2.display())]);
    let made = place.library().image_path(place.library().image("b").unwrap());
    assert!(made.starts_with(place.lib()) && made.exists());
    // Somebody reads it: it stays until nobody does.
    let held = fs::File::open(&made).unwrap();
    vmar::io::lock::lock(&held, &made, vmar::io::lock::Access::Read, std::time::Duration::ZERO).unwrap();
    assert!(place.ok(&["image", "remove", "b"]).contains("when no server reads it"));
    assert!(made.exists());
    drop(held);
    place.ok(&["image", "remove", "a"]);
    assert!(!made.exists() && raw.exists() && qcow2.exists());
    place.assert_no_leftovers();
}

#[test]
fn a_dry_run_tells_and_changes_nothing() {
    let mut scene = Scene::new(Policy::Paper, 9);
    for _ in 0..3 {
        let step = scene.add();
        scene.run(step);
    }
    let place = &scene.place;
    let before = place.snapshot();
    let bytes = scene.images[0].1.clone();
    let raw = place.raw("again.raw", &bytes, |_| false);
    let said = place.ok(&["--json", "image", "add", "--dry-run", &format!("again={}", raw.display())]);
    let said: serde_json::Value = serde_json::from_str(&said).unwrap();
    let first = said[0]["shares"].as_array().unwrap().iter().find(|s| s["id"] == 0).unwrap();
    assert_eq!(first["blocks"], said[0]["nonzero_blocks"]);
    assert_eq!(said[0]["dry_run"], true);
    place.ok(&["image", "remove", "--dry-run", &scene.images[0].0]);
    assert!(place.snapshot() == before);
}

/// An index that is damaged is named with the mend, and the mend mends.
#[test]
fn a_damaged_index_is_named_and_made_anew() {
    let mut scene = Scene::new(Policy::Paper, 11);
    for _ in 0..3 {
        let step = scene.add();
        scene.run(step);
    }
    let files: Vec<PathBuf> =
        fs::read_dir(scene.place.lib().join("index")).unwrap().map(|e| e.unwrap().path()).collect();
    assert!(files.len() >= 2);
    for file in files {
        if !file.exists() {
            continue;
        }
        let good = fs::read(&file).unwrap();
        let mut flipped = good.clone();
        flipped[good.len() / 2] ^= 1;
        for bad in [&good[..good.len() / 2], &flipped, b"", b"other"] {
            fs::write(&file, bad).unwrap();
            let raw = scene.place.raw("x.raw", &image_of(&(0..70).collect::<Vec<_>>(), None), |_| false);
            let line = scene.place.fails(1, &["image", "add", &format!("x={}", raw.display())]);
            assert!(line.contains(file.file_name().unwrap().to_str().unwrap()), "{line}");
            assert!(line.contains("library rebuild --index"), "{line}");
        }
        fs::remove_file(&file).unwrap();
        scene.place.fails(1, &["image", "remove", &scene.images[0].0]);
        scene.place.ok(&["library", "rebuild", "--index"]);
        oracle::check(&scene.place, &scene.expected());
        scene.place.assert_no_leftovers();
    }
    // Fingerprints that are gone come back from the images.
    let library = scene.place.library();
    fs::remove_file(library.run_path(&library.images()[0])).unwrap();
    scene.place.ok(&["library", "rebuild"]);
    oracle::check(&scene.place, &scene.expected());
    scene.place.assert_no_leftovers();
}

/// Whatever is killed, and whenever: the library is as before or as after, and sound.
#[test]
fn a_hundred_kills_leave_before_or_after() {
    let mut scene = Scene::new(Policy::Paper, seed() + 2);
    for _ in 0..4 {
        let step = scene.add();
        scene.run(step);
    }
    let began = Instant::now();
    scene.place.ok(&["library", "remap"]);
    let usual = began.elapsed() * 3 / 2;
    let (mut before, mut after, mut whats) = (0, 0, std::collections::BTreeMap::new());
    for kill in 0..100u32 {
        let step = match scene.random.below(8) {
            0 => Step { what: "remap", args: strings(&["library", "remap"]), after: scene.images.clone() },
            1 => Step { what: "rebuild", args: strings(&["library", "rebuild"]), after: scene.images.clone() },
            2 => Step { what: "verify", args: strings(&["image", "verify"]), after: scene.images.clone() },
            _ => scene.next(),
        };
        *whats.entry(step.what).or_insert(0) += 1;
        let mut child =
            scene.place.vmar().args(&step.args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(usual * scene.random.below(1000) as u32 / 1000);
        child.kill().unwrap();
        child.wait().unwrap();
        // Readers see a whole library before anybody has cleaned up.
        scene.place.ok(&["stats"]);
        drop(Writer::open(scene.place.lib()).unwrap());
        let names = |images: &[(String, Vec<u8>)]| images.iter().map(|(n, _)| n.clone()).collect::<Vec<_>>();
        let library = scene.place.library();
        let have: Vec<(String, u64)> = library.images().iter().map(|r| (r.name.clone(), r.generation)).collect();
        let is_after = if step.what == "update" {
            have.last().is_some_and(|(name, generation)| Some(name) == names(&step.after).last() && *generation > 1)
                && have.iter().map(|(n, _)| n).eq(&names(&step.after))
                && library.images().last().map(|r| r.size) == step.after.last().map(|(_, b)| b.len() as u64)
                && digest_of(&library) == Some(step.after.last().unwrap().1.clone())
        } else {
            have.iter().map(|(n, _)| n).eq(&names(&step.after))
        };
        if is_after && step.what != "verify" {
            scene.images = step.after;
            after += 1;
        } else {
            before += 1;
        }
        eprintln!("kill {kill}: {}, {}", step.what, if is_after { "after" } else { "before" });
        oracle::check(&scene.place, &scene.expected());
        scene.place.assert_no_leftovers();
        scene.place.ok(&["image", "verify"]);
    }
    assert!(before >= 10 && after >= 10, "{before} before, {after} after: {whats:?}");
}

/// The bytes of the newest image.
fn digest_of(library: &vmar::library::Library) -> Option<Vec<u8>> {
    library.images().last().and_then(|r| fs::read(library.image_path(r)).ok())
}

/// Every policy reads the right bytes, whatever it prefers, also after images went.
#[test]
fn every_policy_reads_the_right_bytes() {
    let mut scene = Scene::new(Policy::Paper, 21);
    for _ in 0..3 {
        let step = scene.add();
        scene.run(step);
    }
    for policy in Policy::ALL {
        scene.place.ok(&["library", "remap", "--policy", policy.name(), "--json"]);
        assert_eq!(scene.place.library().catalog().policy.name(), policy.name());
        for _ in 0..4 {
            scene.step();
            scene.place.ok(&["image", "verify"]);
        }
    }
}

/// With next to no memory everything goes through files, and the same comes out; also when the first try was stopped.
#[test]
fn little_memory_makes_no_difference() {
    let place = Place::new();
    let mut contents: Vec<u32> = (100..3000).collect();
    contents.extend((1..9).cycle().take(300));
    contents.extend(500..2500);
    let first = place.raw("first.raw", &image_of(&contents, Some((3, 512))), |_| false);
    contents.rotate_left(777);
    let second = place.raw("second.raw", &image_of(&contents, None), |_| false);
    let named = |name: &str, file: &Path| format!("{name}={}", file.display());
    let (a, b) = (named("a", &first), named("b", &second));
    place.ok(&["image", "add", &a, &b]);
    let (want, other) = (maps(&place), Place::new());
    other.ok(&["image", "add", "--memory", "4K", &a]);
    // Killed on the way: what was hashed is kept, and used.
    let mut child = other.vmar().args(["image", "add", "--memory", "4K", &b]).stderr(Stdio::null()).spawn().unwrap();
    let log = other.lib().join("staging/b.scan");
    while !fs::metadata(&log).is_ok_and(|m| m.len() > 1000) && child.try_wait().unwrap().is_none() {
        std::thread::sleep(std::time::Duration::from_micros(200));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    if other.library().images().len() == 1 {
        drop(Writer::open(other.lib()).unwrap());
        assert!(log.exists(), "the next one goes on with it");
        other.ok(&["image", "add", "--memory", "4K", &b]);
    }
    assert!(maps(&other) == want);
    let index = |place: &Place| vmar::indexer::stats::indexed_clusters(&place.library()).unwrap();
    assert_eq!(index(&other), index(&place));
    other.ok(&["image", "verify"]);
    other.assert_no_leftovers();
}

/// A map from before a removal (a stopped host's copy of the library, a backup) points to what is gone.
#[test]
fn a_map_that_points_to_a_removed_image_is_not_served() {
    let place = Place::new();
    let file = place.raw("f", &image_of(&(20..60).collect::<Vec<u32>>(), None), |_| false);
    place.add(&[("a", &file), ("b", &file)]).unwrap();
    let map = place.library().map_path("b");
    let old = fs::read(&map).unwrap();
    place.ok(&["image", "remove", "a"]);
    fs::write(&map, old).unwrap();
    let socket = place.path("s").display().to_string();
    let line = place.fails(1, &["serve", "--image", "b", "--read-only", "--socket-path", &socket]);
    assert!(line.contains("b.map") && line.contains("gone") && line.contains("library remap"), "{line}");
    place.ok(&["library", "remap"]);
    place.ok(&["image", "verify"]);
}

#[test]
fn the_clusters_are_listed() {
    let place = Place::new();
    let image = |contents: std::ops::Range<u32>| image_of(&contents.collect::<Vec<_>>(), None);
    let (a, b) = (place.raw("a.raw", &image(20..50), |_| false), place.raw("b.raw", &image(40..60), |_| false));
    place.add(&[("a", &a), ("b", &b)]).unwrap();
    let said: serde_json::Value = serde_json::from_str(&place.ok(&["--json", "stats", "--clusters"])).unwrap();
    let want = serde_json::json!([
        { "images": ["a"], "contents": 20 },
        { "images": ["a", "b"], "contents": 10 },
        { "images": ["b"], "contents": 10 },
    ]);
    assert_eq!(said, want);
    assert!(place.ok(&["stats", "--clusters"]).contains("a, b"));
}
