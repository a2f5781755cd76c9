//! The control socket, and take-over by it.

use crate::common::{Bench, Client, Server, fails, ok, run, signal, text, vmar, wait};
use crate::frontend::{FEATURES, Frontend};
use crate::support::pattern;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use vmar::library::Library;
use vmar::overlay::{BaseIdentity, CreateOptions};

const DISK: usize = 4 << 20;
const LIMIT: Duration = Duration::from_secs(60);

struct Place {
    bench: Bench,
    overlay: PathBuf,
    control: PathBuf,
}

impl Place {
    /// Two images that share their first half.
    fn new() -> Place {
        let bench = Bench::with_library();
        let base = bench.file("base.raw", &pattern(1, DISK));
        let mut other = pattern(1, DISK);
        other[DISK / 2..].copy_from_slice(&pattern(2, DISK / 2));
        let one = bench.file("one.raw", &other);
        bench.add(&[format!("base={}", text(&base)), format!("one={}", text(&one))]);
        let overlay = bench.overlay("one");
        let control = bench.path("control");
        Place { bench, overlay, control }
    }

    fn serve(&self) -> Server {
        self.bench.serve(&["--image", "one", "--overlay", text(&self.overlay), "--control", text(&self.control)])
    }

    fn control(&self, args: &[&str]) -> Value {
        serde_json::from_str(&ok(&[&["--json", "control", text(&self.control)], args].concat())).unwrap()
    }
}

/// Sends a line and reads one.
fn line(stream: &UnixStream, line: &str) -> Value {
    let mut to = stream;
    writeln!(to, "{line}").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    serde_json::from_str(&answer).unwrap()
}

#[test]
fn status_and_statistics_tell_what_happens() {
    let place = Place::new();
    let server = place.serve();
    let status = place.control(&["status"]);
    assert_eq!(
        (&status["image"], &status["connected"], &status["size"], &status["on_error"], &status["rings"]),
        (&json!("one"), &json!(false), &json!(DISK), &json!("report"), &json!([]))
    );
    assert_eq!(std::fs::metadata(&place.control).unwrap().permissions().mode() & 0o777, 0o600);

    let mut client = Client::connect(&server.socket, 2, false);
    client.read(0, 64 << 10); // shared
    client.read((DISK / 2) as u64, 32 << 10); // its own
    client.write(8192, &pattern(3, 4096));
    client.read(8192, 4096); // overlay
    client.write_zeroes(16384, 4096, true);
    client.read(16384, 4096); // zeros
    client.flush();
    assert!(client.try_read(DISK as u64 - 512, 512).is_ok());
    let status = place.control(&["status"]);
    assert_eq!(status["connected"], json!(true));
    assert_eq!(status["rings"][0], json!({"queue": 0, "running": true, "in_flight": 0}));
    let total = &place.control(&["statistics"])["total"];
    let count = |class: &str| (total[class]["operations"].as_u64(), total[class]["bytes"].as_u64());
    assert_eq!(count("reads"), (Some(5), Some((64 << 10) + (32 << 10) + 4096 + 4096 + 512)));
    assert_eq!(count("writes"), (Some(1), Some(4096)));
    assert_eq!(count("write_zeroes"), (Some(1), Some(4096)));
    assert_eq!(count("flushes"), (Some(1), Some(0)));
    let from = json!({"other_images": 64 << 10, "own_image": (32 << 10) + 512, "overlay": 4096, "zeros": 4096});
    assert_eq!(total["read_bytes_from"], from);
    let table = ok(&["control", text(&place.control), "statistics"]);
    assert!(table.contains("other_images"), "{table}");
    assert!(ok(&["control", text(&place.control), "status"]).contains("0 running, 0 in flight"));
    drop(client);
    assert!(server.stop().0.success());
    assert!(!place.control.exists(), "the control socket goes with the server");
    assert!(fails(&["control", text(&place.control), "status"]).contains("check the path"));
}

#[test]
fn requests_that_make_no_sense_are_answered() {
    let place = Place::new();
    let server = place.serve();
    let stream = UnixStream::connect(&place.control).unwrap();
    for (request, class) in [
        ("nonsense", "GenericError"),
        ("[1]", "GenericError"),
        (r#"{"execute":7}"#, "GenericError"),
        (r#"{"execute":"explode"}"#, "CommandNotFound"),
        (r#"{"execute":"resize"}"#, "GenericError"),
        (r#"{"execute":"resize","arguments":{"size":513}}"#, "GenericError"),
    ] {
        assert_eq!(line(&stream, request)["error"]["class"], json!(class), "{request}");
    }
    let answer = line(&stream, r#"{"execute":"status","id":{"a":[1]}}"#);
    assert_eq!((&answer["id"], &answer["return"]["image"]), (&json!({"a":[1]}), &json!("one")));
    // A client that says nothing, and one that talks without end, hold up nobody.
    let silent = UnixStream::connect(&place.control).unwrap();
    let endless = UnixStream::connect(&place.control).unwrap();
    let _ = (&endless).write_all(&vec![b'x'; 1 << 20]);
    assert_eq!(place.control(&["status"])["image"], json!("one"));
    let deadline = Instant::now() + LIMIT;
    while (&endless).write_all(b"x").is_ok() {
        assert!(Instant::now() < deadline, "an endless line is never refused");
    }
    drop(silent);
    assert!(server.stop().0.success());
}

/// Between drain and resume the overlay is closed and free, the guest's requests wait, and nothing of them is lost.
#[test]
fn a_drained_disk_can_be_looked_at_and_resumes() {
    let place = Place::new();
    let server = place.serve();
    let mut client = server.client();
    client.write(0, &pattern(4, 64 << 10));
    place.control(&["drain"]);
    let status = place.control(&["status"]);
    assert_eq!((&status["drained"], &status["active"]), (&json!(true), &json!(false)));
    // Plain qemu-img, with its locks.
    let info = crate::common::tool("qemu-img", &["check", text(&place.overlay)]);
    assert!(info.contains("No errors"), "{info}");
    client.memory(0, 4096).fill(0);
    client.submit_read(0, 0, 0, 4096, 1);
    client.kick(0);
    let mut done = vec![std::mem::MaybeUninit::uninit()];
    let mut short = Duration::from_millis(300);
    assert!(!matches!(client.queues[0].do_io(&mut done, 1, Some(&mut short), None), Ok(1)), "drained");
    place.control(&["resume"]);
    assert_eq!(client.wait(0, 1), [(1, 0)]);
    assert!(client.memory(0, 4096) == &pattern(4, 4096)[..]);
    client.write(4096, &pattern(5, 4096));
    drop(client);
    assert!(server.stop().0.success());
}

#[test]
fn a_disk_is_made_larger_while_it_runs() {
    let place = Place::new();
    std::fs::remove_file(&place.overlay).unwrap();
    let library = Library::open(place.bench.library()).unwrap();
    let image = library.image("one").unwrap();
    let base = BaseIdentity { digest: image.digest, generation: image.generation, size: image.size };
    let backing = library.image_path(image);
    let options = CreateOptions { backing: &backing, base, size: image.size, capacity: 64 << 20 };
    vmar::overlay::create(&place.overlay, &options).unwrap();
    let server = place.serve();
    let mut client = server.client();
    assert_eq!(place.control(&["resize", "8M"])["size"], json!(8 << 20));
    assert_eq!(place.control(&["status"])["size"], json!(8 << 20));
    assert_eq!(client.try_write(7 << 20, &pattern(6, 4096)), 0);
    assert!(fails(&["control", text(&place.control), "resize", "128M"]).contains("capacity"));
    drop(client);
    assert!(server.stop().0.success());
}

/// A server that takes the place of `old`, whose socket it keeps.
fn successor(place: &Place, old: &Server, extra: &[&str]) -> Server {
    let (library, state) = (place.bench.library(), place.bench.path("state"));
    let mut args = vec!["--library", text(&library), "serve", "--state-dir", text(&state), "--image", "one"];
    args.extend(["--overlay", text(&place.overlay), "--take-over", text(&place.control)]);
    args.extend(["--control", text(&place.control)]);
    args.extend(extra);
    Server::start(vmar(&args), old.socket.clone())
}

fn pid_of(control: &Path) -> Option<u64> {
    let out = run(&["--json", "control", text(control), "status"]);
    serde_json::from_slice::<Value>(&out.stdout).ok()?["pid"].as_u64()
}

#[test]
fn a_successor_takes_over_the_socket_and_the_disk() {
    let place = Place::new();
    let mut old = place.serve();
    let mut f = Frontend::connect(&old.socket, FEATURES, 1, 64);
    assert!(f.read(0, 0, 4096) == pattern(1, 4096));
    let new = successor(&place, &old, &[]);
    assert!(wait(&mut old.child, LIMIT).success(), "the old server ends well");
    // What QEMU does with reconnect=.
    f.reconnect(&new.socket, FEATURES);
    let used = f.used_idx(0);
    f.start_ring(0, used);
    assert!(f.read(0, 8, 4096) == pattern(1, 8192)[4096..]);
    let deadline = Instant::now() + LIMIT;
    while pid_of(&place.control) != Some(u64::from(new.child.id())) {
        assert!(Instant::now() < deadline, "the new server has no control socket");
        std::thread::sleep(Duration::from_millis(5));
    }
    // Again, from a server that has taken over itself; and then a client that connects anew.
    drop(f);
    let mut middle = new;
    let last = successor(&place, &middle, &[]);
    assert!(wait(&mut middle.child, LIMIT).success());
    assert!(last.client().read(0, 4096) == pattern(1, 4096));
    let socket = last.socket.clone();
    let (status, log) = last.stop();
    assert!(status.success(), "{log}");
    assert!(!socket.exists() && !place.control.exists());
}

/// A successor that cannot serve leaves the old server as it was, whether it fails before it asks or after.
#[test]
fn a_successor_that_fails_changes_nothing() {
    let place = Place::new();
    let old = place.serve();
    let mut f = Frontend::connect(&old.socket, FEATURES, 1, 64);
    let (library, state) = (place.bench.library(), place.bench.path("state"));
    let err = fails(&[
        "--library",
        text(&library),
        "serve",
        "--state-dir",
        text(&state),
        "--image",
        "base",
        "--overlay",
        text(&place.overlay),
        "--take-over",
        text(&place.control),
    ]);
    assert!(err.contains("made for another base image"), "{err}");
    assert!(f.read(0, 0, 4096) == pattern(1, 4096), "not even the connection has ended");

    // One that gets the socket and dies.
    let stream = UnixStream::connect(&place.control).unwrap();
    let answer = line(&stream, r#"{"execute":"hand-over"}"#);
    assert_eq!(answer["return"]["socket"], json!(old.socket));
    drop(stream);
    let mut f = Frontend::connect(&old.socket, FEATURES, 1, 64);
    assert!(f.read(0, 0, 4096) == pattern(1, 4096));
    assert_eq!(place.control(&["status"])["active"], json!(true));
    drop(f);
    assert!(old.stop().0.success());
    let err = fails(&["serve", "--blk-file", text(&place.overlay), "--take-over", text(&place.control)]);
    assert!(err.contains("start without --take-over"), "{err}");
}

/// systemd's convention: descriptor 3, announced by LISTEN_FDS and LISTEN_PID. The socket outlives the server.
#[test]
fn a_socket_of_a_supervisor_outlives_its_servers() {
    use std::os::fd::AsRawFd;
    let place = Place::new();
    let socket = place.bench.path("activated");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let (library, state) = (place.bench.library(), place.bench.path("state"));
    for _ in 0..2 {
        let script = format!(
            "exec env LISTEN_FDS=1 LISTEN_PID=$$ {} --library {} serve --state-dir {} --image one --overlay {} 3<&{}",
            env!("CARGO_BIN_EXE_vmar"),
            text(&library),
            text(&state),
            text(&place.overlay),
            listener.as_raw_fd()
        );
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
        let mut server = std::process::Command::new("sh").args(["-c", &script]).spawn().unwrap();
        let mut f = Frontend::connect(&socket, FEATURES, 1, 64);
        assert!(f.read(0, 0, 4096) == pattern(1, 4096));
        signal(server.id(), libc::SIGTERM);
        assert!(wait(&mut server, LIMIT).success());
        assert!(socket.exists());
    }
}
