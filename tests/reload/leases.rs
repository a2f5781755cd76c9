//! Leases of real servers: taken, kept up to date, seen from other namespaces, and gone with their holders.

use crate::common::{Bench, Client, Server, ok, text, vmar};
use crate::place::*;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use vmar::library::{LeaseInfo, LeaseTarget, Live, lease};

fn holders(library: &Path) -> Vec<LeaseInfo> {
    let mut all: Vec<LeaseInfo> = lease::live(library)
        .unwrap()
        .into_iter()
        .map(|live| match live {
            Live::Known(info) => info,
            Live::Unknown(path) => panic!("{}", path.display()),
        })
        .collect();
    all.sort_by(|a, b| a.image.cmp(&b.image));
    all
}

fn files(library: &Path) -> usize {
    fs::read_dir(library.join("leases")).unwrap().count()
}

fn ids(info: &LeaseInfo) -> Vec<u32> {
    info.targets.iter().map(|t| t.id).collect()
}

#[test]
fn a_server_has_a_lease_as_long_as_it_lives() {
    let place = Place::new(300);
    let library = place.library();
    assert!(!library.join("leases").exists(), "made on demand");
    let one = place.serve("one", &["--read-only"]);
    let three = place.serve("three", &["--read-only"]);
    let seen = holders(&library);
    assert_eq!(seen.len(), 2, "{seen:?}");
    let info = &seen[1];
    assert_eq!((info.image.as_str(), info.image_id, info.generation), ("three", 3, 1));
    assert_eq!((info.pid, info.control.as_deref()), (three.child.id(), Some(&*place.control("three"))));
    assert!(info.is_here() && !info.host.is_empty() && info.digest.len() == 64);
    assert!(info.targets.len() > 1 && info.targets.contains(&LeaseTarget { id: 3, generation: 1 }), "{info:?}");
    let covered = |id| lease::live(&library).unwrap().iter().filter(|l| l.covers(id, 1)).count();
    assert_eq!((covered(3), covered(1)), (1, 2), "three reads from one");
    // It follows the map.
    place.put(OWN, "three");
    reload(&place.control("three"));
    until("the lease is that of the new map", || ids(&holders(&library)[1]) == [3]);
    assert_eq!(covered(1), 1);
    place.put(PAPER, "three");
    reload(&place.control("three"));
    assert!(ids(&holders(&library)[1]).contains(&1));
    // Ended in order, and killed.
    let (status, err) = one.stop();
    assert!(status.success() && err.is_empty(), "{err}");
    assert_eq!(files(&library), 1);
    three.kill();
    assert_eq!(holders(&library), []);
    assert_eq!(files(&library), 0, "who looked has removed it");
    // A copy of the library has leases that nobody holds.
    let server = place.serve("two", &["--read-only"]);
    let copy = place.bench.path("copy");
    assert!(Command::new("cp").arg("-a").arg(&library).arg(&copy).status().unwrap().success());
    assert_eq!((files(&copy), holders(&copy).len(), holders(&library).len()), (1, 0, 1));
    drop(server);
}

#[test]
fn servers_that_cannot_start_leave_no_lease() {
    let place = Place::new(200);
    let library = place.library();
    let overlay = place.bench.overlay("one");
    let socket = place.bench.path("sock");
    let start = |rest: &[&str]| {
        let all = [&["--library", text(&library), "serve", "--image", "two", "--socket-path", text(&socket)], rest];
        let out = vmar(&all.concat()).output().unwrap();
        assert!(!out.status.success());
        assert_eq!(files(&library), 0);
    };
    start(&["--overlay", text(&overlay)]);
    start(&["--read-only", "--control", "/nowhere/to/be/found"]);
}

/// All that goes with a process in namespaces of its own.
fn unshared(place: &Place, name: &str) -> Server {
    let socket = place.bench.path(&format!("{name}.sock"));
    let mut command = Command::new("unshare");
    command.args(["--pid", "--uts", "--fork", "--kill-child"]);
    command.args(["sh", "-c", "hostname elsewhere && exec \"$@\"", "sh", env!("CARGO_BIN_EXE_vmar")]);
    command.args(["--library", text(&place.library()), "serve", "--image", name, "--read-only"]);
    command.args(["--socket-path", text(&socket), "--control", text(&place.control(name))]);
    Server::start(command, socket)
}

#[test]
fn namespaces_see_each_others_leases() {
    let place = Place::new(300);
    let library = place.library();
    let _here = place.serve("one", &["--read-only"]);
    let there = unshared(&place, "three");
    let seen = holders(&library);
    assert_eq!(seen.len(), 2);
    assert!(seen[1].pid < 10 && seen[1].host == "elsewhere", "a number of its own namespace: {seen:?}");
    assert!(seen[1].is_here(), "the same machine");
    // From inside: who remaps there tells both.
    let out = Command::new("unshare")
        .args(["--pid", "--fork", env!("CARGO_BIN_EXE_vmar")])
        .args(["--library", text(&library), "library", "remap", "--policy", "paper"])
        .env("RUST_LOG", "info")
        .output()
        .unwrap();
    let err = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && err.matches(": map with ").count() == 2, "{err}");
    assert_eq!(files(&library), 2, "none was taken for dead");
    there.kill();
    until("the lease of the killed one is dead", || holders(&library).len() == 1);
    assert_eq!(files(&library), 1);
}

#[test]
fn remap_tells_servers_and_warns_of_those_that_cannot_be_told() {
    let place = Place::new(300);
    let library = place.library();
    let told = place.serve("three", &["--read-only"]);
    let mut client = Client::connect(&told.socket, 1, true);
    let deaf = place.bench.serve(&["--image", "two", "--read-only"]);
    let stopped = place.serve("one", &["--read-only"]);
    stopped.kill();
    fs::write(library.join("leases/odd.json"), "{}").unwrap();
    let err = logged(&place, &["library", "remap", "--policy", "paper"]);
    let line = |what: &str| err.lines().filter(|l| l.contains(what)).count();
    assert_eq!(line("server of three"), 1, "{err}");
    assert_eq!(line("server of two"), 1, "{err}");
    assert!(err.contains("no control socket") && line("server of one") == 0, "{err}");
    assert!(err.contains("odd.json") && library.join("leases/odd.json").exists(), "{err}");
    // Without being asked for it, only what went wrong is said, and standard output stays what it was.
    let out = vmar(&["--library", text(&library), "--json", "library", "remap"]).output().unwrap();
    serde_json::from_slice::<Vec<serde_json::Value>>(&out.stdout).unwrap();
    assert!(!String::from_utf8_lossy(&out.stderr).contains("server of three"));
    client.read_all(64 << 10, |at, got| assert!(got == &place.images[3][at as usize..][..got.len()]));
    drop(deaf);
}

/// A file system that is mounted read-only, and unmounted whatever happens.
struct ReadOnly<'b>(&'b Bench);

impl ReadOnly<'_> {
    fn mount(bench: &Bench, dir: &Path) -> std::path::PathBuf {
        let at = bench.path("ro");
        fs::create_dir(&at).unwrap();
        let mount = |args: &[&str]| assert!(Command::new("mount").args(args).status().unwrap().success());
        mount(&["--bind", text(dir), text(&at)]);
        mount(&["-o", "remount,bind,ro", text(&at)]);
        at
    }
}

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path("ro")).status();
    }
}

#[test]
fn a_library_that_cannot_be_written_is_served_without_a_lease() {
    let place = Place::new(200);
    let at = ReadOnly::mount(&place.bench, &place.library());
    let _guard = ReadOnly(&place.bench);
    let socket = place.bench.path("ro.sock");
    let mut command = vmar(&["--library", text(&at), "serve", "--image", "three", "--read-only"]);
    command.args(["--socket-path", text(&socket), "--control", text(&place.control("three"))]).env("RUST_LOG", "info");
    let server = Server::start(command, socket);
    assert!(!place.library().join("leases").exists());
    // It changes its map all the same.
    place.put(PAPER, "three");
    reload(&place.control("three"));
    let mut client = Client::connect(&server.socket, 1, true);
    client.read_all(64 << 10, |offset, got| assert!(got == &place.images[3][offset as usize..][..got.len()]));
    drop(client);
    let (_, err) = server.stop();
    assert_eq!(err.matches("no lease is taken here").count(), 1, "{err}");
}

#[test]
fn who_takes_over_has_a_lease_of_its_own() {
    let place = Place::new(200);
    let library = place.library();
    let mut old = place.serve("three", &["--read-only"]);
    let first = holders(&library);
    let control = place.control("three");
    let mut command = vmar(&["--library", text(&library), "serve", "--image", "three", "--read-only"]);
    command.args(["--take-over", text(&control), "--control", text(&control)]);
    let new = Server { child: command.spawn().unwrap(), socket: old.socket.clone() };
    crate::common::wait(&mut old.child, Duration::from_secs(20));
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let now = holders(&library);
        if now.len() == 1 {
            assert_eq!((now[0].pid, &now[0].control), (new.child.id(), &first[0].control));
            break;
        }
        assert!(!now.is_empty() && Instant::now() < deadline, "{now:?}");
    }
    // Its socket comes last.
    until("it can be asked", || std::os::unix::net::UnixStream::connect(&control).is_ok());
    reload(&control);
    ok(&["control", text(&control), "status"]);
}

#[test]
fn an_empty_directory_with_leases_becomes_a_library() {
    let bench = Bench::new();
    fs::create_dir_all(bench.library().join("leases")).unwrap();
    ok(&["library", "init", text(&bench.library())]);
}
