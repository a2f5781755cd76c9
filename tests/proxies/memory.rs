//! Kept memory, templates, base images.

use crate::common::*;
use crate::fakes::*;
use std::fs;
use std::path::Path;

fn pages(told: &serde_json::Value, kind: &str) -> u64 {
    told["pages"][kind].as_u64().unwrap()
}

/// The same memory, with noise of its own in a page of fifty.
fn later(memory: &[[u8; PAGE]]) -> Vec<[u8; PAGE]> {
    let mut memory = memory.to_vec();
    for n in (25..memory.len()).step_by(50) {
        memory[n] = noise(77_000_000 + n as u64);
    }
    memory
}

#[test]
fn a_vm_that_returns_brings_only_what_has_changed_however_often() {
    let hosts = Hosts::new();
    let stores = [hosts.path("store-a"), hosts.path("store-b")].map(|p| text(&p).to_string());
    let [a, b] = stores.each_ref().map(|store| ["--store", store.as_str()]);
    let mut memory = guest(1, 3000);
    let first = stream(&memory);
    let told = hosts.migrate("web", &first, &a, &b, || ()).ok(&first);
    assert_eq!((pages(&told, "kept"), pages(&told, "literal")), (0, 2700));
    for n in 0..3 {
        memory = later(&memory);
        let back = stream(&memory);
        let (from, to) = if n % 2 == 0 { (&b, &a) } else { (&a, &b) };
        let told = hosts.migrate("web", &back, from, to, || ()).ok(&back);
        // A page of fifty, the 300 zero ones aside; the second time it is changed to what it was.
        let changed = pages(&told, "literal");
        assert!(changed == if n == 0 { 60 } else { 0 }, "return {n}: {changed} pages were sent");
        assert!(pages(&told, "kept") >= 2640 && pages(&told, "link_bytes") < 300_000, "{told}");
    }
    let list = ok(&["--json", "kept", "list", "--store", &stores[0]]);
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list["images"].as_array().unwrap().len(), 2, "{list}");
    ok(&["kept", "remove", "web", "--store", &stores[0]]);
    assert!(fails(&["kept", "remove", "web", "--store", &stores[0]]).contains("nothing is kept"));
}

#[test]
fn what_was_kept_of_another_vm_or_stay_or_is_broken_costs_bytes_alone() {
    let hosts = Hosts::new();
    let (store_a, store_b) = (hosts.path("store-a"), hosts.path("store-b"));
    let (a, b) = (["--store", text(&store_a)], ["--store", text(&store_b)]);
    let memory = guest(1, 1000);
    let one = stream(&memory);
    hosts.migrate("web", &one, &a, &b, || ()).ok(&one);

    // Another VM of the same name there: its memory is not what the sender believes.
    let told = hosts.migrate("db", &one, &b, &a, || ()).ok(&one);
    assert_eq!(pages(&told, "kept"), 0, "kept of another VM");
    fs::copy(store_b.join("gone/web.mem"), hosts.path("noted")).unwrap();
    // The kept memory is that of a later stay.
    let two = stream(&later(&memory));
    hosts.migrate("web", &two, &a, &b, || ()).ok(&two);
    fs::copy(hosts.path("noted"), store_b.join("gone/web.mem")).unwrap();
    let told = hosts.migrate("web", &two, &b, &a, || ()).ok(&two);
    assert_eq!(pages(&told, "kept"), 0, "kept of another stay");

    // A byte of its pages is another one: the frames that need it come again.
    hosts.migrate("web", &two, &a, &b, || ()).ok(&two);
    let pack = only_file(&store_a.join("packs"), "web", &store_a);
    let mut bytes = fs::read(&pack).unwrap();
    let middle = bytes.len() / 3;
    bytes[middle] ^= 0x10;
    fs::write(&pack, bytes).unwrap();
    let end = hosts.migrate("web", &two, &b, &a, || ());
    let told = end.ok(&two);
    assert!(pages(&told, "kept") > 800 && pages(&told, "link_bytes") > 100_000, "{told}");
    let said = said(&end.received);
    assert!(said.contains(".pack") && said.contains("remove it"), "{said}");

    // The manifest is garbage.
    hosts.migrate("web", &two, &a, &b, || ()).ok(&two);
    fs::write(store_a.join("kept/web.mem"), b"vmar-mem and so on").unwrap();
    let end = hosts.migrate("web", &two, &b, &a, || ());
    assert_eq!(pages(&end.ok(&two), "kept"), 0);
    assert!(self::said(&end.received).contains("web.mem"), "{}", self::said(&end.received));
}

/// The pack of a VM's kept memory; the others of the store are those of other VMs.
fn only_file(packs: &Path, vm: &str, store: &Path) -> std::path::PathBuf {
    let store = vmar::store::Store::open(store).unwrap();
    let image = store.image(vmar::store::dir::Kind::Kept, vm).unwrap().unwrap();
    assert_eq!(image.packs.len(), 1);
    packs.join(image.packs[0].file_name())
}

#[test]
fn the_budget_is_kept_and_each_mechanism_can_be_switched_off() {
    let hosts = Hosts::new();
    let (store_a, store_b) = (hosts.path("store-a"), hosts.path("store-b"));
    let (a, b) = (["--store", text(&store_a), "--budget", "6M"], ["--store", text(&store_b)]);
    let memories = [guest(1, 1000), guest(2, 1000)].map(|memory| stream(&memory));
    for (vm, stream) in ["web", "db"].iter().zip(&memories) {
        let end = hosts.migrate(vm, stream, &a, &b, || ());
        end.ok(stream);
        // 3.5 MB each: the second has the first make room.
        assert_eq!(
            said(&end.sent).contains("the memory of VM web had to make room"),
            *vm == "db",
            "{}",
            said(&end.sent)
        );
    }
    assert!(!store_a.join("kept/web.mem").exists() && store_a.join("kept/db.mem").exists());
    let told = hosts.migrate("web", &memories[0], &b, &a, || ()).ok(&memories[0]);
    assert_eq!(pages(&told, "kept"), 0, "evicted");
    let no_kept = [&b[..], &["--no-kept"]].concat();
    let told = hosts.migrate("db", &memories[1], &no_kept, &a, || ()).ok(&memories[1]);
    assert_eq!(pages(&told, "kept"), 0, "switched off");
    // Every page twice: without the stream's own pages all of them go.
    let twice = stream(&[guest(3, 500), guest(3, 500)].concat());
    let told = hosts.migrate("x", &twice, &[], &[], || ()).ok(&twice);
    assert_eq!((pages(&told, "intra"), pages(&told, "literal")), (450, 450));
    let told = hosts.migrate("x", &twice, &["--no-intra"], &[], || ()).ok(&twice);
    assert_eq!((pages(&told, "intra"), pages(&told, "literal")), (0, 900));
}

#[test]
fn a_template_of_some_vms_serves_another_of_their_domain() {
    let hosts = Hosts::new();
    let (store_a, store_b) = (hosts.path("store-a"), hosts.path("store-b"));
    let of =
        |store: &Path, domain: &str| vec!["--store".to_string(), text(store).into(), "--domain".into(), domain.into()];
    // 1,000 pages that all have, and 200 of their own.
    let vm = |seed: u64| stream(&[guest(9, 1000), guest(seed, 200)].concat());
    for (seed, name, domain) in [(1, "w1", "shop"), (2, "w2", "shop"), (3, "w3", "bank")] {
        let (stream, args) = (vm(seed), of(&store_a, domain));
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        hosts.migrate(name, &stream, &args, &[], || ()).ok(&stream);
    }
    let build = |share: &str, domain: &str| {
        run(&["--json", "template", "build", "--store", text(&store_a), "--share", share, "--domain", domain])
    };
    assert!(said(&build("2", "bank")).contains("1 VMs of domain bank"), "{}", said(&build("2", "bank")));
    assert!(said(&build("3", "shop")).contains("smaller --share"));
    let made: serde_json::Value = serde_json::from_slice(&build("2", "shop").stdout).unwrap();
    assert_eq!((made["pages"].as_u64(), made["version"].as_u64()), (Some(900), Some(1)));
    let file = made["path"].as_str().unwrap().to_string();

    let move_one = |name: &str, domain: &str, more: &[&str]| {
        let stream = vm(4);
        let args = of(&store_a, domain);
        let args: Vec<&str> = args.iter().map(String::as_str).chain(more.iter().copied()).collect();
        let told = hosts.migrate(name, &stream, &args, &["--store", text(&store_b)], || ()).ok(&stream);
        pages(&told, "template")
    };
    assert_eq!(move_one("w4", "shop", &[]), 0, "the other host has it not yet");
    ok(&["template", "import", &file, "--store", text(&store_b), "--domain", "shop"]);
    assert_eq!(move_one("w4", "shop", &[]), 900);
    assert_eq!(move_one("w4", "bank", &[]), 0, "not of this domain");
    assert_eq!(move_one("w4", "shop", &["--no-template"]), 0);

    // Now three have pages in common, and a newer template; the other host still has the older one.
    ok(&["template", "build", "--store", text(&store_a), "--share", "3", "--domain", "shop", "--pages-max", "10"]);
    assert_eq!(move_one("w5", "shop", &["--no-kept"]), 900, "the newest that both have");
    let list = ok(&["template", "list", "--store", text(&store_a)]);
    assert_eq!(list.lines().count(), 3, "{list}");

    // A page of it is another one there: what needs it comes again.
    let there = fs::read_dir(store_b.join("templates/shop")).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&there).unwrap();
    bytes[1000] ^= 1;
    fs::write(&there, &bytes).unwrap();
    assert_eq!(move_one("w6", "shop", &["--no-kept"]), 900);
    assert!(fails(&["template", "import", text(&there), "--store", text(&store_a)]).contains(".pack"));
    assert!(fails(&["template", "import", text(&hosts.path("x")), "--store", text(&store_a)]).contains("N-ID.pack"));
    ok(&["template", "remove", "2", "--store", text(&store_a), "--domain", "shop"]);
}

#[test]
fn pages_of_base_images_do_not_travel_unless_they_are_missing_or_edited_there() {
    let hosts = Hosts::new();
    let (a, b) = (Bench::with_library(), Bench::with_library());
    let memory = guest(1, 1000);
    let image: Vec<u8> = memory.iter().flatten().copied().collect();
    let (here, there) = (a.file("web.raw", &image), b.file("w.raw", &image));
    a.add(&[format!("web={}", text(&here))]);
    let library = a.library();
    let sender = ["--library", text(&library), "--image", "web"];
    let stream = stream(&memory);
    let told = hosts.migrate("web", &stream, &sender, &[], || ()).ok(&stream);
    assert_eq!(pages(&told, "base"), 0, "the receiver has no library");
    let library_b = b.library();
    let receiver = ["--library", text(&library_b)];
    let told = hosts.migrate("web", &stream, &sender, &receiver, || ()).ok(&stream);
    assert_eq!(pages(&told, "base"), 0, "the receiver's library has no such image");
    b.add(&[format!("w={}", text(&there))]);
    let told = hosts.migrate("web", &stream, &sender, &receiver, || ()).ok(&stream);
    assert_eq!((pages(&told, "base"), pages(&told, "literal")), (900, 0));
    let no_base = [&sender[..], &["--no-base"]].concat();
    assert_eq!(pages(&hosts.migrate("web", &stream, &no_base, &receiver, || ()).ok(&stream), "base"), 0);
    // Edited behind the library's back, with its times as they were: only the content tells.
    edit_unseen(&there, 501 * PAGE);
    let told = hosts.migrate("web", &stream, &sender, &receiver, || ()).ok(&stream);
    assert!(pages(&told, "link_bytes") > 100_000, "what was edited had to be sent: {told}");
}

/// Changes a byte of an image that a library has, so that its time of modification stays.
fn edit_unseen(image: &Path, at: usize) {
    use std::os::unix::fs::FileExt;
    use std::os::unix::fs::PermissionsExt;
    let times = fs::metadata(image).unwrap();
    let mode = times.permissions();
    fs::set_permissions(image, fs::Permissions::from_mode(0o600)).unwrap();
    let file = fs::File::options().write(true).open(image).unwrap();
    file.write_all_at(&[0xEE; 8], at as u64 + 8).unwrap();
    file.set_modified(times.modified().unwrap()).unwrap();
    fs::set_permissions(image, mode).unwrap();
}
