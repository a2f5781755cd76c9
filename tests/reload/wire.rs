//! 'reload' on the control socket: what it answers, what it refuses, and that nothing is left of what was refused.

use crate::common::{Client, fails, ok, text, vmar};
use crate::place::*;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use vmar::map::Map;

fn why(answer: &Value) -> String {
    answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("{answer}")).to_string()
}

#[test]
fn by_itself_and_by_descriptors() {
    let place = Place::new(500);
    let server = place.serve("three", &["--read-only"]);
    let control = place.control("three");
    let mut client = Client::connect(&server.socket, 1, true);
    let same = |client: &mut Client| {
        client.read_all(64 << 10, |at, got| assert!(got == &place.images[3][at as usize..][..got.len()]))
    };
    same(&mut client);
    let maps: Vec<Value> = [PAPER, BRIDGE, OWN]
        .iter()
        .map(|&which| {
            let map = Map::new(fs::read(place.kept(which, "three")).unwrap()).unwrap();
            let targets: Vec<Value> =
                map.targets().map(|(t, _)| json!({"image": t.image.0, "generation": t.generation})).collect();
            json!({"entries": map.totals().entries, "targets": targets})
        })
        .collect();
    assert_ne!(maps[PAPER], maps[BRIDGE]);
    // The library has 'bridge'.
    let (request, files) = place.request(PAPER, "three");
    let answer = ask(&control, &request, &files);
    assert_eq!(answer["return"], json!({"old": maps[BRIDGE], "new": maps[PAPER], "closed": true}));
    same(&mut client);
    place.put(OWN, "three");
    assert_eq!(reload(&control), json!({"old": maps[PAPER], "new": maps[OWN], "closed": true}));
    assert_eq!(open_images(server.child.id(), &place), ["three.raw"]);
    same(&mut client);
    // Those that are open may be left out, and are kept.
    let (mut request, mut files) = place.request(PAPER, "three");
    let own = request["arguments"]["targets"].as_array().unwrap().iter().position(|t| t["image"] == json!(3)).unwrap();
    request["arguments"]["targets"].as_array_mut().unwrap().remove(own);
    files.remove(own + 1);
    for (at, target) in request["arguments"]["targets"].as_array_mut().unwrap().iter_mut().enumerate() {
        target["fd"] = json!(at + 1);
    }
    assert_eq!(ask(&control, &request, &files)["return"]["new"], maps[PAPER]);
    same(&mut client);
    // For humans.
    place.put(BRIDGE, "three");
    let said = ok(&["control", text(&control), "reload"]);
    assert!(said.starts_with("map with ") && said.trim_end().lines().count() == 1, "{said}");
    let status: Value = serde_json::from_str(&ok(&["--json", "control", text(&control), "status"])).unwrap();
    assert_eq!(status["map"], maps[BRIDGE]);
    assert!(Path::new(status["lease"].as_str().unwrap()).exists());
    // A server that waits for a VM, and one that is drained, have the new map when they go on.
    ok(&["control", text(&control), "drain"]);
    place.put(OWN, "three");
    reload(&control);
    ok(&["control", text(&control), "resume"]);
    same(&mut client);
    assert_eq!(open_images(server.child.id(), &place), ["three.raw"]);
}

#[test]
fn what_is_wrong_is_refused_and_leaves_nothing_behind() {
    let place = Place::new(500);
    let server = place.serve("three", &["--read-only"]);
    let control = place.control("three");
    let mut client = Client::connect(&server.socket, 1, true);
    client.read(0, 4096);
    let (pid, images) = (server.child.id(), open_images(server.child.id(), &place));
    let before = fd_count(pid);
    let lease =
        || fs::read(fs::read_dir(place.library().join("leases")).unwrap().next().unwrap().unwrap().path()).unwrap();
    let leased = lease();
    let refused = |request: &Value, files: &[File], cause: &str| {
        let answer = ask(&control, request, files);
        assert!(why(&answer).contains(cause), "{cause}: {answer}");
        assert!(!why(&answer).contains('\n'));
        until("nothing is left", || fd_count(pid) == before);
        assert_eq!(open_images(pid, &place), images);
    };
    let good = || place.request(PAPER, "three");
    let change = |change: &dyn Fn(&mut Value, &mut Vec<File>), cause: &str| {
        let (mut request, mut files) = good();
        change(&mut request, &mut files);
        refused(&request, &files, cause);
    };
    let damaged = |name: &str, at: usize| {
        let mut bytes = fs::read(place.kept(PAPER, "three")).unwrap();
        let at = at.min(bytes.len() - 1);
        bytes[at] ^= 4;
        File::open(place.bench.file(name, &bytes)).unwrap()
    };
    let first = |request: &mut Value| request["arguments"]["targets"][0].clone();
    change(&|_, f| f[0] = File::open(place.kept(PAPER, "two")).unwrap(), "is the map of image 2");
    change(&|_, f| f[0] = damaged("d1", 9000), "the map that was passed");
    change(&|_, f| f[0] = damaged("d2", 0), "the map that was passed");
    change(&|_, f| f[0] = File::open("/dev/null").unwrap(), "not a regular file");
    change(&|_, f| f[0] = File::open(place.library()).unwrap(), "not a regular file");
    change(&|_, f| f[0] = File::open(place.bench.file("empty", b"")).unwrap(), "the map that was passed");
    let path_only = || File::options().read(true).custom_flags(libc::O_PATH).open(place.kept(PAPER, "three")).unwrap();
    change(&|_, f| f[0] = path_only(), "O_PATH");
    // Images that are not what they are said to be. The server must need them: it reads by a map of its own alone.
    place.put(OWN, "three");
    reload(&control);
    let before = before - images.len() + 1;
    until("it has one image", || open_images(pid, &place).len() == 1 && fd_count(pid) == before);
    let images = open_images(pid, &place);
    let leased_own = lease();
    let refused = |request: &Value, files: &[File], cause: &str| {
        let answer = ask(&control, request, files);
        assert!(why(&answer).contains(cause), "{cause}: {answer}");
        until("nothing is left", || fd_count(pid) == before);
        assert_eq!(open_images(pid, &place), images);
        assert_eq!(lease(), leased_own);
    };
    let change = |change: &dyn Fn(&mut Value, &mut Vec<File>), cause: &str| {
        let (mut request, mut files) = good();
        change(&mut request, &mut files);
        refused(&request, &files, cause);
    };
    let write_only = || File::options().append(true).open(place.bench.file("w", &[0; 500 * BLOCK])).unwrap();
    change(&|_, f| f[1] = write_only(), "O_WRONLY");
    change(&|_, f| f[1] = File::open(place.bench.file("short", &[0; 4096])).unwrap(), "has 4096 bytes");
    change(&|_, f| f[1] = File::open("/dev/zero").unwrap(), "not a regular file");
    change(&|r, _| r["arguments"]["targets"][0]["generation"] = json!(9), "pass that image's file");
    change(&|r, _| r["arguments"]["targets"][0]["image"] = json!(77), "pass that image's file");
    change(&|r, _| r["arguments"]["targets"][0]["fd"] = json!(50), "there is no descriptor 50");
    change(&|r, _| r["arguments"]["targets"][0]["fd"] = json!(0), "named twice");
    change(&|r, _| r["arguments"]["targets"][0]["fd"] = json!(-1), "see CONTROL.md");
    change(&|r, _| r["arguments"]["map"] = Value::Null, "see CONTROL.md");
    change(&|r, _| r["arguments"]["mapp"] = json!(1), "mapp");
    change(&|r, _| r["arguments"] = json!([]), "see CONTROL.md");
    change(&|r, _| r["arguments"] = Value::Null, "no arguments that say what they are");
    change(
        &|r, f| drop((r["arguments"]["targets"].as_array_mut().unwrap().remove(0), f.remove(1))),
        "there is no descriptor",
    );
    change(&|_, f| f.push(File::open("/dev/null").unwrap()), "is not named");
    change(
        &|r, f| {
            let mut again = first(r);
            again["fd"] = json!(f.len());
            r["arguments"]["targets"].as_array_mut().unwrap().push(again);
            f.push(File::open(place.bench.path("zero.raw")).unwrap());
        },
        "does not point to it",
    );
    refused(&json!({"execute": "reload", "arguments": {"map": 0}}), &[], "there is no descriptor 0");
    // A file that somebody writes.
    let writer = File::options().read(true).write(true).open(place.bench.path("zero.raw")).unwrap();
    assert!(vmar::io::lock::try_lock(&writer, vmar::io::lock::Access::Write).unwrap());
    let (request, files) = good();
    refused(&request, &files, "in use by another process");
    refused_by_itself(&place, &control, "in use by another process");
    drop(writer);
    // The library's own map, damaged, gone, or of another image.
    let map = place.map("three");
    let file = File::options().read(true).write(true).open(&map).unwrap();
    drop(file);
    fs::copy(place.kept(PAPER, "two"), &map).unwrap();
    refused_by_itself(&place, &control, "another image");
    fs::remove_file(&map).unwrap();
    refused_by_itself(&place, &control, "three.map");
    fs::write(&map, b"vmar").unwrap();
    refused_by_itself(&place, &control, "three.map");
    fs::rename(place.library().join("library.json"), place.bench.path("away")).unwrap();
    refused_by_itself(&place, &control, "no vmar library");
    fs::rename(place.bench.path("away"), place.library().join("library.json")).unwrap();
    until("nothing is left", || fd_count(pid) == before);
    // And it still serves, and still changes.
    let (request, files) = good();
    assert!(ask(&control, &request, &files)["return"].is_object());
    client.read_all(64 << 10, |at, got| assert!(got == &place.images[3][at as usize..][..got.len()]));
    assert_ne!(leased, leased_own);
}

/// What was not asked for by `put` is refused without descriptors, too.
fn refused_by_itself(place: &Place, control: &Path, cause: &str) {
    if cause == "in use by another process" {
        place.put(PAPER, "three");
    }
    let answer = ask(control, &json!({"execute": "reload"}), &[]);
    assert!(why(&answer).contains(cause), "{cause}: {answer}");
}

#[test]
fn too_many_descriptors_and_other_commands_that_come_with_some() {
    let place = Place::new(200);
    let server = place.serve("one", &["--read-only"]);
    let control = place.control("one");
    let before = fd_count(server.child.id());
    let many: Vec<File> = (0..1030).map(|_| File::open("/dev/null").unwrap()).collect();
    let stream = UnixStream::connect(&control).unwrap();
    let line = [b"{\"execute\":\"reload\",\"arguments\":{\"map\":0}}".as_slice(), &[b' '; 100]].concat();
    // It may hang up before all is sent.
    if let Some(answer) = ask_by(&stream, &line, &many) {
        assert!(why(&answer).contains("at most 1024 descriptors"), "{answer}");
    }
    until("all are closed", || fd_count(server.child.id()) == before);
    let answer = ask(&control, &json!({"execute": "status"}), &many[..300]);
    assert_eq!(answer["return"]["image"], json!("one"));
    until("all are closed", || fd_count(server.child.id()) == before);
    // Two lines: the descriptors are those of the first.
    let (request, files) = place.request(PAPER, "one");
    let stream = UnixStream::connect(&control).unwrap();
    let both = format!("{{\"execute\":\"statistics\"}}\n{request}");
    ask_by(&stream, both.as_bytes(), &files).unwrap();
    drop(stream);
    until("all are closed", || fd_count(server.child.id()) == before);
}

#[test]
fn a_raw_file_has_no_map_to_change() {
    let place = Place::new(200);
    let file = place.bench.file("plain", &[7; 1 << 20]);
    let control = place.bench.path("raw.control");
    let _server = place.bench.serve(&["--blk-file", text(&file), "--control", text(&control)]);
    let line = fails(&["control", text(&control), "reload"]);
    assert!(line.contains("raw file"), "{line}");
}

/// Requests that make no sense, with descriptors that make none: each gets one answer, and costs nothing.
#[test]
fn requests_at_random() {
    let place = Place::new(200);
    let server = place.serve("three", &["--read-only"]);
    let control = place.control("three");
    let mut client = Client::connect(&server.socket, 1, true);
    client.read(0, 4096);
    let before = fd_count(server.child.id());
    let mut rng = Rng(31);
    let (good, _) = place.request(PAPER, "three");
    let mut stream = UnixStream::connect(&control).unwrap();
    let odd = [json!(null), json!(-1), json!(1u64 << 40), json!("0"), json!([]), json!({}), json!(1.5), json!(true)];
    let mut changed = 0;
    for round in 0..600 {
        let (_, mut files) = place.request([PAPER, BRIDGE][rng.below(2)], "three");
        for _ in 0..rng.below(3) {
            let at = rng.below(files.len());
            match rng.below(6) {
                0 => drop(files.remove(at)),
                1 => files.swap(at, 0),
                2 => files[at] = rustix::pipe::pipe().map(|(read, _)| File::from(read)).unwrap(),
                3 => files[at] = File::from(std::os::fd::OwnedFd::from(UnixStream::pair().unwrap().0)),
                4 => {
                    let file = tempfile::tempfile().unwrap();
                    file.write_all_at(&[rng.next() as u8; 5000], 0).unwrap();
                    files[at] = file;
                }
                _ => files.push(File::open("/proc/self/mem").unwrap()),
            }
            if files.is_empty() {
                break;
            }
        }
        let mut request = good.clone();
        let targets = request["arguments"]["targets"].as_array().unwrap().len();
        for _ in 0..rng.below(3) {
            let value = odd[rng.below(odd.len())].clone();
            match rng.below(5) {
                0 => request["arguments"] = value,
                1 if request["arguments"].is_object() => request["arguments"]["map"] = value,
                2 if request["arguments"]["targets"].is_array() => {
                    request["arguments"]["targets"][rng.below(targets)]["fd"] = json!(rng.below(6));
                }
                3 if request["arguments"]["targets"].is_array() => {
                    let key = ["image", "generation", "fd", "more"][rng.below(4)];
                    request["arguments"]["targets"][rng.below(targets)][key] = value;
                }
                _ => {}
            }
        }
        let mut line = request.to_string().into_bytes();
        if rng.below(4) == 0 {
            let at = rng.below(line.len());
            line[at] = b"\0{}[]\",x\xff"[rng.below(9)];
        }
        let answer = ask_by(&stream, &line, &files).unwrap_or_else(|| panic!("{round}: no answer to {line:?}"));
        assert!(answer["return"].is_object() || !why(&answer).is_empty(), "{answer}");
        changed += u32::from(answer["return"].is_object());
        if rng.below(20) == 0 {
            // Half a request, with descriptors.
            let fds: Vec<_> = files.iter().map(std::os::fd::AsFd::as_fd).collect();
            vmar::daemon::passing::send(&stream, b"{\"execute\":\"reload\",", &fds).unwrap();
            stream = UnixStream::connect(&control).unwrap();
        }
    }
    assert!(changed > 20, "{changed}: some make sense");
    drop(stream);
    // As it began.
    place.put(BRIDGE, "three");
    reload(&control);
    until("nothing is left", || fd_count(server.child.id()) == before);
    client.read_all(64 << 10, |at, got| assert!(got == &place.images[3][at as usize..][..got.len()]));
    let (status, err) = server.stop();
    assert!(status.success() && err.is_empty(), "{err}");
}

/// A server without any right to the library changes by what is passed.
#[test]
fn a_server_that_may_open_nothing_changes_by_descriptors() {
    let place = Place::new(300);
    // Its own user may neither list nor read where the images are; what it needs to begin is given to it by the mode.
    let server = place.serve("three", &["--read-only"]);
    let control = place.control("three");
    place.put(OWN, "three");
    reload(&control);
    let (request, files) = place.request(PAPER, "three");
    let hidden = place.bench.path("hidden");
    fs::create_dir(&hidden).unwrap();
    fs::rename(place.library(), hidden.join("lib")).unwrap();
    NAMES.iter().for_each(|name| {
        let file = format!("{name}.raw");
        fs::rename(place.bench.path(&file), hidden.join(&file)).unwrap();
    });
    assert!(why(&ask(&control, &json!({"execute": "reload"}), &[])).contains("no vmar library"));
    assert!(ask(&control, &request, &files)["return"].is_object());
    let mut client = Client::connect(&server.socket, 1, true);
    client.read_all(64 << 10, |at, got| assert!(got == &place.images[3][at as usize..][..got.len()]));
    assert!(vmar(&["--help"]).output().unwrap().status.success());
}
