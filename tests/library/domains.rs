//! Sharing domains: who is read by whom is what one look at all bytes says, and nobody learns of a stranger's images.

use super::lifecycle::write;
use super::support::{BLOCK, Place, content, image_of, named};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Instant;
use vmar::fingerprint::{Algorithm, run};
use vmar::indexer::{read_map, stats};
use vmar::library::{ImageRecord, Library, Policy, Writer};

const PUBLIC: &str = "providers";
const DOMAINS: [&str; 3] = [PUBLIC, "tenant-a", "tenant-b"];

fn place(algorithm: Algorithm) -> Place {
    let place = Place::with_fingerprint(Policy::Paper, algorithm);
    place.ok(&["library", "domain", "add", PUBLIC, "--public"]);
    DOMAINS[1..].iter().for_each(|domain| drop(place.ok(&["library", "domain", "add", domain])));
    place
}

/// An image, and what must be known of it.
#[derive(Clone)]
struct Member {
    name: String,
    domain: &'static str,
    bytes: Vec<u8>,
    /// Its contents that public images held when it was fingerprinted.
    seen: HashSet<Vec<u8>>,
}

struct Scene {
    place: Place,
    algorithm: Algorithm,
    /// In order of ID.
    images: Vec<Member>,
    state: u64,
    files: u32,
}

impl Scene {
    fn new(algorithm: Algorithm, seed: u64) -> Scene {
        Scene { place: place(algorithm), algorithm, images: Vec::new(), state: seed, files: 0 }
    }

    fn below(&mut self, n: u64) -> u64 {
        self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.state >> 33) % n
    }

    fn bytes(&mut self) -> Vec<u8> {
        let mut contents = Vec::new();
        for _ in 0..1 + self.below(6) {
            let (first, len) = (self.below(50) as u32, 1 + self.below(10) as u32);
            contents.extend((0..len).map(|i| if first < 4 { 0 } else { first + i }));
        }
        let tail = (self.below(3) == 0).then(|| (9 + self.below(12) as u32, 512 * (1 + self.below(7) as usize)));
        image_of(&contents, tail)
    }

    fn file(&mut self, bytes: &[u8]) -> PathBuf {
        self.files += 1;
        self.place.raw(&format!("{}.raw", self.files), bytes, |_| false)
    }

    /// What of these bytes the public images hold now.
    fn public_of(&self, bytes: &[u8]) -> HashSet<Vec<u8>> {
        let public = self.images.iter().filter(|m| m.domain == PUBLIC);
        let held: HashSet<&[u8]> = public.flat_map(|m| m.bytes.chunks(BLOCK)).collect();
        bytes.chunks(BLOCK).filter(|block| held.contains(block)).map(<[u8]>::to_vec).collect()
    }

    fn some(&mut self) -> usize {
        self.below(self.images.len() as u64) as usize
    }

    fn step(&mut self) {
        match self.below(10) {
            _ if self.images.len() < 3 => self.add(),
            0..=3 if self.images.len() < 9 => self.add(),
            4 => self.update(),
            5..=6 if self.images.len() < 9 => self.capture(),
            7 => self.rebuild(),
            _ => {
                let at = self.some();
                self.place.ok(&["image", "remove", &self.images[at].name, "--force"]);
                self.images.remove(at);
            }
        }
    }

    fn add(&mut self) {
        let domain = DOMAINS[self.below(3) as usize];
        let bytes = self.bytes();
        let file = self.file(&bytes);
        let name = format!("{domain}.{}", self.files);
        self.place.ok(&["image", "add", &named(&name, &file), "--domain", domain]);
        let seen = self.public_of(&bytes);
        self.images.push(Member { name, domain, bytes, seen });
    }

    fn update(&mut self) {
        let at = self.some();
        let mut bytes = self.images[at].bytes.clone();
        bytes[..512].fill(self.below(256) as u8);
        let file = self.file(&bytes);
        let Member { name, domain, .. } = self.images.remove(at);
        self.place.ok(&["image", "update", &name, &file.display().to_string(), "--force"]);
        let seen = self.public_of(&bytes);
        self.images.push(Member { name, domain, bytes, seen });
    }

    fn capture(&mut self) {
        let at = self.some();
        let Member { name: base, domain, mut bytes, .. } = self.images[at].clone();
        let domain = if domain == PUBLIC { DOMAINS[self.below(3) as usize] } else { domain };
        self.files += 1;
        let name = format!("{domain}.{}", self.files);
        let (file, state) = (self.place.path(&format!("{name}.qcow2")), self.place.path("state").display().to_string());
        let overlay = file.display().to_string();
        self.place.ok(&["overlay", "create", &overlay, "--image", &base]);
        let value = self.below(3) as u8;
        write(&file, 0, 512, value);
        bytes[..512].fill(value);
        let capture = ["image", "capture", &name, "--overlay", &overlay, "--state-dir", &state, "--domain", domain];
        self.place.ok(&capture);
        let seen = self.public_of(&bytes);
        self.images.push(Member { name, domain, bytes, seen });
    }

    fn rebuild(&mut self) {
        let keys = if self.algorithm == Algorithm::Blake3 && self.below(2) == 0 { "--new-keys" } else { "--json" };
        self.place.ok(&["library", "rebuild", keys]);
        for i in 0..self.images.len() {
            self.images[i].seen = self.public_of(&self.images[i].bytes);
        }
    }

    /// Where the block must be read, by one look at all bytes.
    fn home(&self, own: usize, block: usize) -> (usize, usize) {
        let Member { domain, bytes, seen, .. } = &self.images[own];
        let wanted = bytes.chunks(BLOCK).nth(block).unwrap();
        if wanted.len() < BLOCK {
            return (own, block);
        }
        let first_in = |domain: &str| {
            let (at, member) = self
                .images
                .iter()
                .enumerate()
                .find(|(_, m)| m.domain == domain && m.bytes.chunks(BLOCK).any(|b| b == wanted))?;
            Some((at, member.bytes.chunks(BLOCK).position(|b| b == wanted)?))
        };
        // Without keys, what came later is found as well.
        let is_known = self.algorithm == Algorithm::Sha1 || seen.contains(wanted);
        is_known.then(|| first_in(PUBLIC)).flatten().or_else(|| first_in(domain)).unwrap()
    }

    fn check(&self) {
        let library = self.place.library();
        for (i, member) in self.images.iter().enumerate() {
            let record = library.image(&member.name).unwrap();
            assert_eq!(record.domain, member.domain);
            let map = read_map(&library, record).unwrap();
            for (b, block) in member.bytes.chunks(BLOCK).enumerate() {
                // Of two contents with one hash the public domain lends only the first: no more is known than that the
                // bytes are right, and `image verify` has compared them.
                if self.algorithm == Algorithm::Sha1 && (1..=8).any(|k| content(k) == block) {
                    continue;
                }
                let got = map.lookup(b as u32).map(|hit| (map.target(hit.target).unwrap().image, hit.block as usize));
                let want = block.iter().any(|&byte| byte != 0).then(|| self.home(i, b));
                let want = want.map(|(image, at)| (library.images()[image].id, at));
                assert_eq!(got, want, "{} block {b}", member.name);
            }
        }
        for domain in DOMAINS {
            self.check_figures(&library, domain);
        }
        let sum: u64 = DOMAINS.iter().map(|d| stats::stats(&library, Some(d)).unwrap().unique_blocks).sum();
        assert_eq!(stats::stats(&library, None).unwrap().unique_blocks, sum);
    }

    /// Contents and clusters are counted as if the domain's images were alone in the world.
    fn check_figures(&self, library: &Library, domain: &str) {
        let mut holders: HashMap<&[u8], BTreeSet<u32>> = HashMap::new();
        for (member, record) in self.images.iter().zip(library.images()).filter(|(m, _)| m.domain == domain) {
            for block in member.bytes.chunks(BLOCK).filter(|b| b.iter().any(|&byte| byte != 0)) {
                holders.entry(block).or_default().insert(record.id.0);
            }
        }
        let mut want: BTreeMap<Vec<u32>, u64> = BTreeMap::new();
        holders.values().for_each(|h| *want.entry(h.iter().copied().collect()).or_default() += 1);
        let found = stats::stats(library, Some(domain)).unwrap();
        assert_eq!((found.unique_blocks, found.clusters), (holders.len() as u64, want.len() as u64), "{domain}");
        assert_eq!(found.images.len(), self.images.iter().filter(|m| m.domain == domain).count());
        let got = stats::indexed_clusters(library, Some(domain)).unwrap();
        assert_eq!(got.into_iter().collect::<BTreeMap<_, _>>(), want, "{domain}");
    }
}

fn random_steps(algorithm: Algorithm, seed: u64) {
    let mut scene = Scene::new(algorithm, seed);
    for step in 0..60 {
        eprintln!("step {step} of {algorithm}, seed {seed}");
        scene.step();
        // Whatever a map says after a step, it leads to the right bytes, and not to a stranger.
        scene.place.ok(&["image", "verify"]);
        assert_no_stranger(&scene.place.library());
        // Made anew, all maps are those of the model.
        scene.place.ok(&["library", "remap"]);
        scene.check();
        scene.place.assert_no_leftovers();
    }
    assert!(scene.images.iter().any(|m| m.domain != PUBLIC && !m.seen.is_empty()), "nothing was ever shared");
}

fn assert_no_stranger(library: &Library) {
    for record in library.images() {
        for (target, _) in read_map(library, record).unwrap().targets() {
            let owner = &library.image_by_id(target.image).unwrap().domain;
            assert!(*owner == record.domain || owner == PUBLIC, "{} reads from {owner}", record.name);
        }
    }
}

#[test]
fn images_read_from_their_own_and_the_public_domain() {
    random_steps(Algorithm::Blake3, 1);
}

#[test]
fn so_they_do_without_keys() {
    random_steps(Algorithm::Sha1, 2);
}

/// Rows of one of an image's runs.
fn hashes(library: &Library, file: &vmar::library::FileRef) -> Vec<[u8; 20]> {
    let stamp = run::Stamp { bytes: file.bytes, crc32c: file.crc32c };
    let rows = run::Reader::open(&library.dir().join(&file.file), stamp).unwrap();
    rows.map(|row| row.unwrap().hash).collect()
}

/// One file, in each of three domains, and more of it that the public domain does not have.
fn same_everywhere(algorithm: Algorithm) -> Place {
    let place = place(algorithm);
    let (common, secret) = ((20..40).collect::<Vec<u32>>(), (50..60).collect::<Vec<u32>>());
    let public = place.raw("public.raw", &image_of(&common, None), |_| false);
    let tenant = place.raw("tenant.raw", &image_of(&[secret, common].concat(), None), |_| false);
    place.ok(&["image", "add", &named("golden", &public), "--domain", PUBLIC]);
    place.ok(&["image", "add", &named("alpha", &tenant), "--domain", "tenant-a"]);
    let refused = place.fails(2, &["image", "add", &named("beta", &tenant), "--domain", "tenant-b"]);
    assert!(refused.contains("is used in place by an image of another sharing domain"), "{refused}");
    fs::copy(&tenant, place.path("tenant-b.raw")).unwrap();
    place.ok(&["image", "add", &named("beta", &place.path("tenant-b.raw")), "--domain", "tenant-b"]);
    fs::copy(&tenant, place.path("more.raw")).unwrap();
    place
}

#[test]
fn fingerprints_of_two_domains_have_nothing_in_common() {
    let place = same_everywhere(Algorithm::Blake3);
    let library = place.library();
    let runs: Vec<BTreeSet<[u8; 20]>> =
        library.images().iter().map(|r| hashes(&library, &r.run).into_iter().collect()).collect();
    assert_eq!(runs.iter().map(BTreeSet::len).collect::<Vec<_>>(), [20, 30, 30]);
    for (i, a) in runs.iter().enumerate() {
        assert!(runs.iter().skip(i + 1).all(|b| a.is_disjoint(b)), "equal bytes, equal hashes");
    }
    // With the public key is only kept what is public.
    let public = |r: &ImageRecord| r.public_run.as_ref().map(|file| hashes(&library, file));
    let found: Vec<Option<Vec<[u8; 20]>>> = library.images().iter().map(public).collect();
    assert_eq!(found[0], None);
    for found in &found[1..] {
        assert_eq!(found.as_ref().unwrap().iter().copied().collect::<BTreeSet<_>>(), runs[0]);
    }
    // Nor does anything else in these files tell what is in an image.
    let tenant = fs::read(place.path("tenant.raw")).unwrap();
    let chunk = vmar::fingerprint::digest::chunk(&tenant);
    let image = library.image("alpha").unwrap().digest;
    assert_eq!(image, vmar::fingerprint::digest::image(tenant.len() as u64, &[(0, chunk)]));
    for entry in fs::read_dir(place.lib().join("runs")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        for secret in [chunk, image] {
            let hex: String = secret.iter().map(|b| format!("{b:02x}")).collect();
            let found = bytes.windows(32).any(|w| w == secret) || text.contains(&hex);
            assert!(!found, "{}", path.display());
        }
    }
    for entry in fs::read_dir(place.lib().join("keys")).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
    let catalog = fs::read_to_string(place.lib().join("library.json")).unwrap();
    for entry in fs::read_dir(place.lib().join("keys")).unwrap() {
        let key = fs::read_to_string(entry.unwrap().path()).unwrap();
        assert!(!catalog.contains(key.trim()), "the key is in the catalog");
    }
}

/// Whatever is said of a tenant's image says nothing of another tenant's, though they hold the same bytes.
#[test]
fn nothing_that_is_said_of_an_image_names_a_stranger() {
    for algorithm in [Algorithm::Sha1, Algorithm::Blake3] {
        let place = same_everywhere(algorithm);
        let more = named("more", &place.path("more.raw"));
        let overlay = place.path("beta.qcow2").display().to_string();
        place.ok(&["overlay", "create", &overlay, "--image", "beta"]);
        for block in 0..30 {
            let said = place.ok(&["map", "explain", "alpha", "--block", &block.to_string(), "--json"]);
            assert!(!said.contains("beta"), "{said}");
        }
        for args in [
            &["image", "show", "alpha", "--json"][..],
            &["image", "show", "alpha"],
            &["image", "add", &more, "--domain", "tenant-a", "--dry-run"],
            &["image", "add", &more, "--domain", "tenant-a", "--dry-run", "--json"],
            &["image", "remove", "alpha", "--dry-run"],
            &["image", "remove", "alpha", "--dry-run", "--json"],
            &["stats", "--domain", "tenant-a", "--json"],
            &["stats", "--domain", "tenant-a", "--matrix", "--json"],
            &["stats", "--domain", "tenant-a", "--clusters", "--json"],
        ] {
            let said = place.ok(args);
            assert!(!said.contains("beta"), "{args:?}: {said}");
        }
        assert!(place.ok(&["image", "remove", "beta", "--dry-run"]).contains("beta.qcow2"));
        let said = place.ok(&["image", "add", &more, "--domain", "tenant-a", "--dry-run", "--json"]);
        let line: serde_json::Value = serde_json::from_str(&said).unwrap();
        let shares: Vec<(&str, u64)> = line[0]["shares"]
            .as_array()
            .unwrap()
            .iter()
            .map(|s| (s["name"].as_str().unwrap(), s["blocks"].as_u64().unwrap()))
            .collect();
        assert_eq!(shares, [("alpha", 30), ("golden", 20)]);
        // Of the whole library the sums are told, never what two domains have in common.
        let all: serde_json::Value = serde_json::from_str(&place.ok(&["stats", "--json"])).unwrap();
        assert_eq!((all["unique_blocks"].as_u64(), all["shared_ge2_images"].as_f64()), (Some(80), Some(0.0)));
        let matrix: serde_json::Value = serde_json::from_str(&place.ok(&["stats", "--matrix", "--json"])).unwrap();
        assert_eq!(matrix["pairs"].as_array().unwrap().len(), 0);
    }
}

#[test]
fn a_bad_block_is_mended_within_the_domain() {
    let place = same_everywhere(Algorithm::Blake3);
    let before = fs::read(place.path("tenant.raw")).unwrap();
    let other = place.raw("tenant-2.raw", &before, |_| false);
    place.ok(&["image", "add", &named("alpha-2", &other), "--domain", "tenant-a"]);
    let mut bad = before.clone();
    bad[5 * BLOCK + 7] ^= 1;
    fs::set_permissions(&other, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&other, &bad).unwrap();
    let line = place.fails(1, &["image", "verify", "alpha-2"]);
    assert!(line.contains("block 5"), "{line}");
    place.ok(&["image", "repair", "alpha-2", "--in-place"]);
    assert_eq!(fs::read(&other).unwrap(), before);
    place.ok(&["image", "verify"]);
}

#[test]
fn what_is_refused() {
    let place = same_everywhere(Algorithm::Blake3);
    let more = named("more", &place.path("more.raw"));
    for (args, want) in [
        (&["image", "add", &more, "--domain", "tenant-c"][..], "library domain list"),
        (&["library", "domain", "add", "tenant-a"], "there is one of this name"),
        (&["library", "domain", "add", "more", "--public"], "domain providers is the public one already"),
        (&["library", "domain", "publish", "tenant-a"], "domain providers is the public one already"),
        (&["library", "domain", "remove", "tenant-a"], "image alpha is in it"),
        (&["library", "domain", "remove", "tenant-c"], "there is none of this name"),
        (&["stats", "--domain", "tenant-c"], "there is none of this name"),
    ] {
        let line = place.fails(1, args);
        assert!(line.contains(want), "{args:?}: {line}");
    }
    assert!(place.fails(2, &["library", "domain", "remove", "default"]).contains("nothing else is said"));
    assert!(place.fails(2, &["library", "domain", "add", "../x"]).contains("not allowed"));
    place.ok(&["library", "domain", "add", "tenant-c"]);
    place.ok(&["library", "domain", "remove", "tenant-c"]);
    place.assert_no_leftovers();

    let state = place.path("state").display().to_string();
    let overlay = |image: &str| {
        let file = place.path(&format!("{image}.qcow2")).display().to_string();
        place.ok(&["overlay", "create", &file, "--image", image]);
        file
    };
    let (golden, alpha) = (overlay("golden"), overlay("alpha"));
    let capture = |overlay: &str, more: &[&str]| {
        let args = [&["image", "capture", "new", "--overlay", overlay, "--state-dir", &state], more].concat();
        place.fails(2, &args)
    };
    assert!(capture(&golden, &[]).contains("say whose the capture is: --domain NAME"));
    // alpha and beta have the same bytes: whose overlay it is, its backing file tells.
    for domain in [PUBLIC, "tenant-b"] {
        assert!(capture(&alpha, &["--domain", domain]).contains("give --domain tenant-a"));
    }
    let (here, away) = (place.path("tenant.raw"), place.path("away.raw"));
    fs::rename(&here, &away).unwrap();
    assert!(
        place.fails(1, &["image", "capture", "new", "--overlay", &alpha, "--state-dir", &state]).contains("vanished")
    );
    fs::rename(&away, &here).unwrap();
    place.ok(&["image", "capture", "newer", "--overlay", &alpha, "--state-dir", &state]);
    assert_eq!(place.library().image("newer").unwrap().domain, "tenant-a");
    place.ok(&["image", "capture", "new", "--overlay", &golden, "--state-dir", &state, "--domain", "tenant-b"]);
    assert_eq!(place.library().image("new").unwrap().domain, "tenant-b");
    place.ok(&["image", "verify"]);
}

/// A key that is gone, damaged, or another one: who needs it says so, who does not goes on; new keys mend it.
#[test]
fn keys_that_are_not_there() {
    let place = same_everywhere(Algorithm::Blake3);
    let library = place.library();
    let key = |domain: &str| place.lib().join(&library.catalog().domains[domain].key.as_ref().unwrap().file);
    let (a, b) = (key("tenant-a"), key("tenant-b"));
    let good = fs::read(&a).unwrap();
    let spoil: [(&dyn Fn(), &str); 3] = [
        (&|| fs::write(&a, "no key\n").unwrap(), "is no key: a key is 64 hexadecimal digits"),
        (&|| assert!(fs::copy(&b, &a).is_ok()), "is another key than the one that the fingerprints were made with"),
        (&|| fs::remove_file(&a).unwrap(), "read the key of the domain"),
    ];
    for (spoil, want) in spoil {
        spoil();
        let more = named("more", &place.path("more.raw"));
        for args in [&["image", "verify", "alpha"][..], &["image", "add", &more, "--domain", "tenant-a"]] {
            let line = place.fails(1, args);
            assert!(line.contains(want) && line.contains("library rebuild --new-keys"), "{line}");
        }
        place.ok(&["image", "verify", "beta"]);
        place.ok(&["stats"]);
        place.ok(&["library", "remap"]);
        vmar::redirect::Base::open(&place.library(), "alpha").unwrap();
        fs::write(&a, &good).unwrap();
        place.ok(&["image", "verify"]);
    }
    let maps = |place: &Place| {
        let library = place.library();
        let map = |r: &ImageRecord| read_map(&library, r).unwrap().entries().collect::<Vec<_>>();
        library.images().iter().map(map).collect::<Vec<_>>()
    };
    let before = maps(&place);
    fs::remove_file(&a).unwrap();
    place.ok(&["library", "rebuild", "--new-keys"]);
    assert_eq!(maps(&place), before);
    assert!(!b.exists(), "the old keys are gone");
    place.ok(&["image", "verify"]);
    place.assert_no_leftovers();
    scene_key_ids_differ(&place.library(), &library);
}

fn scene_key_ids_differ(now: &Library, before: &Library) {
    for (name, domain) in &now.catalog().domains {
        assert_ne!(domain.key, before.catalog().domains[name].key, "{name}");
    }
}

/// A map that leads to a stranger is refused, wherever it came from.
#[test]
fn a_map_into_another_domain_is_not_served() {
    let place = Place::new();
    let file = place.raw("f.raw", &image_of(&[20, 21, 22], None), |_| false);
    place.add(&[("a", &file), ("b", &file)]).unwrap();
    place.ok(&["library", "domain", "add", "other"]);
    let mut writer = Writer::open(place.lib()).unwrap();
    writer.update(|catalog| catalog.images[1].domain = "other".to_string()).unwrap();
    drop(writer);
    let err = vmar::redirect::Base::open(&place.library(), "b").map(drop).unwrap_err().to_string();
    assert!(err.contains("leads from sharing domain other to image a of default"), "{err}");
}

/// A library that has one domain only can be opened for tenants later: its images become what all may read.
#[test]
fn a_domain_is_published() {
    for algorithm in [Algorithm::Sha1, Algorithm::Blake3] {
        let place = Place::with_fingerprint(Policy::Paper, algorithm);
        let file = place.raw("f.raw", &image_of(&[20, 21, 22], None), |_| false);
        place.ok(&["library", "domain", "add", "tenant"]);
        let early = place.raw("e.raw", &fs::read(&file).unwrap(), |_| false);
        place.ok(&["image", "add", &named("early", &early), "--domain", "tenant"]);
        place.ok(&["image", "add", &named("golden", &file)]);
        place.ok(&["library", "domain", "publish", "default"]);
        let late = named("late", &file);
        assert!(place.fails(2, &["image", "add", &late]).contains("say whose it is: --domain NAME"));
        place.ok(&["image", "add", &late, "--domain", "tenant"]);
        let reads = |name: &str| {
            let shown: serde_json::Value = serde_json::from_str(&place.ok(&["image", "show", name, "--json"])).unwrap();
            shown["reads_from"][0]["name"].as_str().unwrap().to_string()
        };
        assert_eq!(
            (reads("early"), reads("golden"), reads("late")),
            ("early".into(), "golden".into(), "golden".into())
        );
        place.ok(&["library", "rebuild"]);
        assert_eq!(reads("early"), "golden");
        place.ok(&["image", "verify"]);
    }
}

/// Killed while domains, keys and images come and go: keys, fingerprints and maps belong together, before or after.
#[test]
fn kills_leave_keys_that_belong_to_the_fingerprints() {
    let place = same_everywhere(Algorithm::Blake3);
    let more = named("more", &place.path("more.raw"));
    let began = Instant::now();
    place.ok(&["library", "rebuild", "--new-keys"]);
    let usual = began.elapsed() * 5 / 4;
    let (mut keys, mut changed) = (BTreeSet::new(), 0);
    for kill in 0..40u32 {
        let args = match kill % 5 {
            0 | 1 => &["library", "rebuild", "--new-keys"][..],
            2 => &["library", "domain", "add", "tenant-c"],
            3 => &["image", "add", &more, "--domain", "tenant-c"],
            _ => &["image", "remove", "more"],
        };
        let mut child = place.vmar().args(args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(usual * (kill * 37 % 100) / 100);
        child.kill().unwrap();
        child.wait().unwrap();
        drop(Writer::open(place.lib()).unwrap());
        place.assert_no_leftovers();
        place.ok(&["image", "verify"]);
        let now = place.library().catalog().domains[PUBLIC].key.clone().unwrap().id;
        changed += u32::from(keys.insert(now));
        if kill % 5 == 4 {
            // So that there is something to do the next time.
            place.run(&["image", "remove", "more"]);
            place.run(&["library", "domain", "remove", "tenant-c"]);
        }
    }
    assert!((2..16).contains(&changed), "{changed} times there were new keys");
}

/// Nothing that was hashed with the public key is left behind, and nothing that others may read.
#[test]
fn what_a_dry_run_leaves_in_staging() {
    let place = same_everywhere(Algorithm::Blake3);
    let contents: Vec<u32> = (0..20_000).map(|i| 10 + i % 9000).collect();
    let large = named("large", &place.raw("large.raw", &image_of(&contents, None), |_| false));
    place.ok(&["image", "add", &large, "--domain", "tenant-a", "--dry-run", "--memory", "1M"]);
    let left: Vec<PathBuf> =
        fs::read_dir(place.lib().join("staging")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(left, [place.lib().join("staging/large.scan")]);
    assert_eq!(fs::metadata(&left[0]).unwrap().permissions().mode() & 0o777, 0o600);
    place.ok(&["image", "add", &large, "--domain", "tenant-a", "--memory", "1M"]);
    place.ok(&["image", "verify", "large"]);
    place.assert_no_leftovers();
}

/// A captured image of several chunks, of which one was written, has the fingerprints that one look at all of it gives.
#[test]
fn a_capture_has_the_fingerprints_of_its_bytes() {
    for (base_domain, domain) in [("tenant-a", "tenant-a"), (PUBLIC, PUBLIC), (PUBLIC, "tenant-b")] {
        let place = same_everywhere(Algorithm::Blake3);
        let contents: Vec<u32> = (20..1220).collect();
        let base = place.raw("base.raw", &image_of(&contents, None), |_| false);
        place.ok(&["image", "add", &named("base", &base), "--domain", base_domain]);
        let (file, state) = (place.path("vm.qcow2"), place.path("state").display().to_string());
        let overlay = file.display().to_string();
        place.ok(&["overlay", "create", &overlay, "--image", "base"]);
        write(&file, 300 * 4096 + 512, 9 * 4096, 7);
        place.ok(&["image", "capture", "new", "--overlay", &overlay, "--state-dir", &state, "--domain", domain]);
        let rows = || {
            let library = place.library();
            let record = library.image("new").unwrap();
            (hashes(&library, &record.run), record.public_run.as_ref().map(|file| hashes(&library, file)))
        };
        let captured = rows();
        assert_eq!(captured.0.len(), 1200);
        assert_eq!(captured.1.is_some(), domain != PUBLIC);
        place.ok(&["image", "verify"]);
        place.ok(&["library", "rebuild"]);
        assert_eq!(rows(), captured, "{base_domain} {domain}");
    }
}

/// With the public domain goes what was found in it.
#[test]
fn the_public_domain_goes() {
    let place = same_everywhere(Algorithm::Blake3);
    place.ok(&["image", "remove", "golden"]);
    place.ok(&["image", "verify"]);
    place.ok(&["library", "domain", "remove", PUBLIC]);
    place.assert_no_leftovers();
    assert!(place.library().images().iter().all(|r| r.public_run.is_none()));
    place.ok(&["library", "domain", "publish", "tenant-b"]);
    place.ok(&["library", "rebuild", "--new-keys"]);
    assert!(place.library().image("alpha").unwrap().public_run.is_some());
    place.ok(&["library", "rebuild", "--new-keys"]);
    place.assert_no_leftovers();
    place.ok(&["image", "verify"]);
    let sha1 = Place::new();
    assert!(sha1.fails(2, &["library", "rebuild", "--new-keys"]).contains("have no keys"));
}
