//! What `vmar migrate` lets through: a sender and a receiver, each a process of its own, between a source and a destination that play
//! QEMU; the rate, the processor time and the memory of each side.
//!
//! ```text
//! cargo run --release --example migrate_rate -- --gib 2 --workers 1,2
//! cargo run --release --example migrate_rate -- --stream web.stream --library DIR --image web --link unix
//! taskset -c 0 target/release/examples/migrate_rate ...
//! ```
//!
//! The stream is a file that QEMU wrote (`migrate "exec:cat > FILE"`; the return path that it lacks is put in front), or a guest of so
//! many GiB that is made up as it goes: `--zero`, `--again`, `--base` and `--compressible` are shares of its pages, all others are noise
//! that is nowhere else. Pages of `--base` are blocks of an image, in a library that is made for it; those of `--again` are of a thousand
//! contents; those of `--compressible` are half noise. What the destination gets is compared with what the source wrote.
//!
//! Rates are of guest memory, 4 KiB for each record of a page, zero or not, from the first byte of the source to the destination's last. Processor
//! time is that of the whole process, and tells more than the rate on a machine that others use, too: a source, a destination and both sides run
//! at once. *Played* is what source and destination took.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::exit, reason = "a program of its own")]

use clap::{Parser, ValueEnum};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use vmar::cli::output::{Table, percent};
use vmar::error::Result;
use vmar::library::Library;
use vmar::migrate::bases::{BaseFiles, Bases, CONTENTS_MAX};
use vmar::migrate::disk::Arrival;
use vmar::migrate::known::{Has, Knows, Received};
use vmar::migrate::link::Socket;
use vmar::migrate::part::{Cutter, Item};
use vmar::migrate::receive::{self, Host, Outcome};
use vmar::migrate::send::{self, Options, SHUT_OK};
use vmar::migrate::stream::{Kind, PAGE_BYTES, PAGE_SIZE, Place};
use vmar::migrate::wire::{Hello, Welcome};

/// Set in children that are to be the command `vmar`.
const AS_VMAR: &str = "VMAR_RATE_AS_VMAR";
/// Noise that pages are cut from; zstd sees no more than a frame of it at once.
const NOISE_BYTES: usize = 32 << 20;
/// Contents of pages that come again.
const AGAIN: u64 = 1000;
/// Blocks of the base image.
const BASE_BLOCKS: u64 = 32_768;
/// Pages of a section of the stream.
const SECTION: u64 = 4096;
/// Bytes that QEMU writes at once.
const WRITE_BYTES: usize = 32 << 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LinkKind {
    Tcp,
    Unix,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Role {
    Send,
    Receive,
}

/// Throughput, processor time and memory of a migration.
#[derive(Clone, Debug, Parser)]
struct Args {
    /// What QEMU wrote, instead of a guest that is made up
    #[arg(long)]
    stream: Option<PathBuf>,
    /// Memory of the guest that is made up
    #[arg(long, default_value_t = 1.0)]
    gib: f64,
    #[arg(long, default_value_t = 0.4)]
    zero: f64,
    #[arg(long, default_value_t = 0.1)]
    again: f64,
    #[arg(long, default_value_t = 0.2)]
    base: f64,
    #[arg(long, default_value_t = 0.2)]
    compressible: f64,
    #[arg(long, value_enum, default_value = "tcp")]
    link: LinkKind,
    /// Threads that hash, and threads that pack; several with commas between them
    #[arg(long, value_delimiter = ',', default_value = "1,2")]
    workers: Vec<usize>,
    /// How often each is measured; the medians count
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// A library of both sides, with --image
    #[arg(long, requires = "image")]
    library: Option<PathBuf>,
    /// The guest's base image
    #[arg(long, requires = "library")]
    image: Option<String>,
    #[arg(long)]
    json: bool,
    /// A side: sockets are in this directory
    #[arg(long, hide = true, requires = "role")]
    dir: Option<PathBuf>,
    #[arg(long, hide = true, value_enum)]
    role: Option<Role>,
}

/// What a side says of itself at its end.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
struct Cost {
    user_seconds: f64,
    system_seconds: f64,
    peak_bytes: u64,
}

impl Cost {
    /// Of this process.
    fn now() -> Cost {
        // SAFETY: all of a `rusage` may be zero, and the kernel fills it.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: `usage` is one, and ours.
        assert_eq!(unsafe { libc::getrusage(libc::RUSAGE_SELF, &raw mut usage) }, 0);
        let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 / 1e6;
        Cost {
            user_seconds: seconds(usage.ru_utime),
            system_seconds: seconds(usage.ru_stime),
            peak_bytes: usage.ru_maxrss as u64 * 1024,
        }
    }

    fn cpu(&self) -> f64 {
        self.user_seconds + self.system_seconds
    }
}

/// What the sender says at its end.
#[derive(Debug, Serialize, Deserialize)]
struct Sent {
    cost: Cost,
    link_bytes: u64,
}

/// A line of the table.
#[derive(Clone, Debug, Serialize)]
struct Line {
    link: String,
    workers: usize,
    cpus: usize,
    memory_bytes: u64,
    stream_bytes: u64,
    link_bytes: u64,
    seconds: f64,
    /// GB of guest memory a second.
    memory_rate: f64,
    send: Cost,
    receive: Cost,
    played_cpu_seconds: f64,
}

fn main() -> ExitCode {
    if std::env::var_os(AS_VMAR).is_some() {
        return vmar::cli::main();
    }
    let mut args = Args::parse();
    match args.role {
        Some(Role::Send) => sender(&args),
        Some(Role::Receive) => receiver(&args),
        None => measure(&mut args),
    }
    ExitCode::SUCCESS
}

// ---- the two sides ----

fn sender(args: &Args) {
    let dir = args.dir.as_ref().unwrap();
    let mut knows = Knows::default();
    if let (Some(library), Some(image)) = (&args.library, &args.image) {
        knows.bases = Some(Bases::load(&Library::open(library).unwrap(), image, CONTENTS_MAX).unwrap());
    }
    let link = match fs::read_to_string(dir.join("address")) {
        Ok(address) => Socket::Tcp(TcpStream::connect(address).unwrap()),
        Err(_) => Socket::Unix(UnixStream::connect(dir.join("link")).unwrap()),
    };
    let images = knows.bases.as_ref().map(|b| b.digests().to_vec()).unwrap_or_default();
    let welcome = send::greet(&link, Hello { vm: "rate".into(), images, ..Hello::default() }).unwrap();
    if let Some(bases) = &mut knows.bases {
        bases.set_there(&welcome.images);
    }
    let listener = UnixListener::bind(dir.join("source")).unwrap();
    println!("ready");
    let source = Socket::Unix(listener.accept().unwrap().0);
    let options = Options { workers: args.workers[0], ..Options::default() };
    let moved = send::run(&source, &link, &knows, options, &mut (), &|| Ok(())).unwrap();
    let sent = Sent { cost: Cost::now(), link_bytes: moved.counts.link_bytes };
    println!("{}", serde_json::to_string(&sent).unwrap());
}

struct Nobody;

impl Host for Nobody {
    fn loaded(&self) -> Result<()> {
        Ok(())
    }

    fn commit(&self) -> Result<()> {
        Ok(())
    }

    fn start(&self) -> Result<()> {
        Ok(())
    }
}

fn receiver(args: &Args) {
    let dir = args.dir.as_ref().unwrap();
    let library = args.library.as_ref().map(|dir| Library::open(dir).unwrap());
    let link = match args.link {
        LinkKind::Tcp => {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            fs::write(dir.join("address"), listener.local_addr().unwrap().to_string()).unwrap();
            println!("ready");
            Socket::Tcp(listener.accept().unwrap().0)
        }
        LinkKind::Unix => {
            let listener = UnixListener::bind(dir.join("link")).unwrap();
            println!("ready");
            Socket::Unix(listener.accept().unwrap().0)
        }
    };
    let hello = receive::greeted(&link).unwrap();
    let bases = library.as_ref().map_or_else(BaseFiles::none, |library| BaseFiles::open(library, &hello.images));
    let destination = Socket::Unix(UnixStream::connect(dir.join("destination")).unwrap());
    receive::welcome(&link, Welcome { images: bases.here(), ..Welcome::default() }).unwrap();
    let has = Has { kept: None, bases, template: None };
    let pages = Received::new(Options::default().window, &has);
    let outcome = receive::run(&destination, &link, pages, None, None::<Arrival<'_, &Has>>, &Nobody);
    assert!(matches!(outcome, Outcome::Here), "{outcome:?}");
    println!("{}", serde_json::to_string(&Cost::now()).unwrap());
}

// ---- source and destination ----

/// A stream that is read from the beginning, in pieces.
enum Source {
    File(PathBuf),
    Guest { pages: u64, kinds: [f64; 4], noise: Vec<u8> },
}

/// What a page of the guest that is made up is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Made {
    Zero,
    Again,
    Base,
    Compressible,
    Noise,
}

/// A number that looks random, the same every time.
fn scatter(n: u64) -> u64 {
    let x = n.wrapping_add(1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ x >> 31).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    x ^ x >> 29
}

fn noise() -> Vec<u8> {
    (0..NOISE_BYTES as u64 / 8).flat_map(|n| scatter(n).to_le_bytes()).collect()
}

/// The start of a stream, as far as the block list, with a return path.
fn preamble(pages: u64) -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x04test\x08\0\x01\0\0".to_vec();
    out.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    out.extend(((pages * PAGE_SIZE) | 4).to_be_bytes());
    out.extend(b"\x06pc.ram");
    out.extend((pages * PAGE_SIZE).to_be_bytes());
    out.extend(0x10u64.to_be_bytes());
    out.extend(b"\x7e\0\0\0\x02");
    out
}

impl Source {
    fn new(args: &Args) -> Source {
        match &args.stream {
            Some(path) => Source::File(path.clone()),
            None => {
                let kinds = [args.zero, args.again, args.base, args.compressible];
                assert!(kinds.iter().sum::<f64>() <= 1.0, "the shares are more than all pages");
                Source::Guest { pages: (args.gib * f64::from(1 << 18)) as u64, kinds, noise: noise() }
            }
        }
    }

    /// Runs of eight pages are alike, as a guest's are.
    fn kind(kinds: &[f64; 4], n: u64) -> Made {
        let mut at = scatter(n / 8) as f64 / u64::MAX as f64;
        for (share, kind) in kinds.iter().zip([Made::Zero, Made::Again, Made::Base, Made::Compressible]) {
            if at < *share {
                return kind;
            }
            at -= share;
        }
        Made::Noise
    }

    /// The content of a page of a kind that is not zero.
    fn content(noise: &[u8], kind: Made, n: u64) -> [u8; PAGE_BYTES] {
        let (number, salt) = match kind {
            Made::Again => (scatter(n) % AGAIN, 1),
            Made::Base => (n % BASE_BLOCKS, 2),
            _ => (n, 3),
        };
        let at = (number as usize * (PAGE_BYTES + 64)) % (NOISE_BYTES - PAGE_BYTES);
        let mut page = [0; PAGE_BYTES];
        page.copy_from_slice(&noise[at..at + PAGE_BYTES]);
        page[..8].copy_from_slice(&(number << 8 | salt).to_le_bytes());
        if kind == Made::Compressible {
            page[PAGE_BYTES / 2..].fill(0x20);
        }
        page
    }

    /// Gives all of the stream to `sink`, in pieces.
    fn pour(&self, mut sink: impl FnMut(&[u8])) {
        match self {
            Source::File(path) => {
                let mut file = File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
                let mut buf = vec![0; 1 << 20];
                // A return path, behind the configuration.
                let mut head = [0; 13];
                file.read_exact(&mut head).unwrap();
                let [.., a, b, c, d] = head;
                let mut machine = vec![0; u32::from_be_bytes([a, b, c, d]) as usize];
                file.read_exact(&mut machine).unwrap();
                sink(&[&head[..], &machine, b"\x08\0\x01\0\0"].concat());
                loop {
                    match file.read(&mut buf).unwrap() {
                        0 => return,
                        n => sink(&buf[..n]),
                    }
                }
            }
            Source::Guest { pages, kinds, noise } => {
                let mut out = preamble(*pages);
                for n in 0..*pages {
                    if n % SECTION == 0 {
                        out.push(if n + SECTION < *pages { 2 } else { 3 });
                        out.extend(2u32.to_be_bytes());
                    }
                    let kind = Source::kind(kinds, n);
                    let place = Place { block: 0, offset: n * PAGE_SIZE, named: n == 0 };
                    if kind == Made::Zero {
                        place.write_header(Kind::Zero, b"pc.ram", &mut out);
                        out.push(0);
                    } else {
                        place.write_header(Kind::Data, b"pc.ram", &mut out);
                        out.extend(Source::content(noise, kind, n));
                    }
                    if (n + 1) % SECTION == 0 || n + 1 == *pages {
                        out.extend(0x10u64.to_be_bytes());
                        out.extend(b"\x7e\0\0\0\x02");
                    }
                    if out.len() >= WRITE_BYTES {
                        sink(&out);
                        out.clear();
                    }
                }
                out.extend(b"\x04\0\0\0\x09\x03cpu\0\0\0\0\0\0\0\x01");
                out.extend([7; 4096]);
                out.extend(b"\x7e\0\0\0\x09\0");
                sink(&out);
            }
        }
    }

    /// Bytes of the stream, and of the memory that it tells of.
    fn measure(&self) -> (u64, u64) {
        let (mut bytes, mut pages, mut cutter) = (0, 0, Cutter::default());
        let mut note = |cutter: &mut Cutter| {
            for part in cutter.take_parts() {
                pages += part.items.iter().filter(|i| !matches!(i, Item::Bytes(_))).count() as u64;
            }
        };
        self.pour(|piece| {
            bytes += piece.len() as u64;
            cutter.feed(piece);
            note(&mut cutter);
        });
        cutter.flush();
        note(&mut cutter);
        (bytes, pages * PAGE_SIZE)
    }
}

/// QEMU at the source; the checksum of what it wrote.
fn play_source(mut socket: UnixStream, source: &Source) -> u32 {
    let mut sum = 0;
    source.pour(|piece| {
        for piece in piece.chunks(WRITE_BYTES) {
            sum = crc32c::crc32c_append(sum, piece);
            socket.write_all(piece).unwrap();
        }
    });
    let mut answer = [0; SHUT_OK.len()];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(answer, SHUT_OK);
    sum
}

/// QEMU at the destination; the checksum of what it got, and when that was all.
fn play_destination(mut socket: UnixStream, len: u64) -> (u32, Instant) {
    let (mut sum, mut got, mut buf) = (0, 0, vec![0; WRITE_BYTES]);
    while got < len {
        let n = socket.read(&mut buf).unwrap();
        assert!(n > 0, "the destination has {got} bytes of {len}");
        sum = crc32c::crc32c_append(sum, &buf[..n]);
        got += n as u64;
    }
    let all = Instant::now();
    socket.write_all(&SHUT_OK).unwrap();
    let _ = socket.read(&mut buf);
    (sum, all)
}

// ---- measurements ----

/// A side as a process, and its standard output.
struct Side(Child, BufReader<std::process::ChildStdout>);

impl Side {
    fn start(args: &Args, role: &str, dir: &Path, workers: usize) -> Side {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--role", role, "--workers", &workers.to_string()]).arg("--dir").arg(dir);
        command.args(["--link", if args.link == LinkKind::Tcp { "tcp" } else { "unix" }]);
        if let (Some(library), Some(image)) = (&args.library, &args.image) {
            command.arg("--library").arg(library).args(["--image", image]);
        }
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        let mut side = Side(child, out);
        assert_eq!(side.line().trim(), "ready", "the side that is to {role} does not come up");
        side
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.1.read_line(&mut line).unwrap();
        line
    }

    /// What it says at its end.
    fn end(mut self) -> String {
        let line = self.line();
        assert!(self.0.wait().unwrap().success());
        line
    }
}

fn run(args: &Args, source: &Source, workers: usize, (stream_bytes, memory_bytes): (u64, u64)) -> Line {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let listener = UnixListener::bind(dir.join("destination")).unwrap();
    let receiver = Side::start(args, "receive", dir, workers);
    let sender = Side::start(args, "send", dir, workers);
    let to_destination = listener.accept().unwrap().0;
    let to_source = UnixStream::connect(dir.join("source")).unwrap();
    let (before, began) = (Cost::now(), Instant::now());
    let (sent, (got, all)) = std::thread::scope(|scope| {
        let destination = scope.spawn(|| play_destination(to_destination, stream_bytes));
        (play_source(to_source, source), destination.join().unwrap())
    });
    assert_eq!(sent, got, "the destination got another stream");
    let seconds = all.duration_since(began).max(Duration::from_micros(1)).as_secs_f64();
    let Sent { cost, link_bytes } = serde_json::from_str(&sender.end()).unwrap();
    Line {
        link: format!("{:?}", args.link).to_lowercase(),
        workers,
        cpus: std::thread::available_parallelism().map_or(1, |n| n.get()),
        memory_bytes,
        stream_bytes,
        link_bytes,
        seconds,
        memory_rate: memory_bytes as f64 / 1e9 / seconds,
        send: cost,
        receive: serde_json::from_str(&receiver.end()).unwrap(),
        played_cpu_seconds: Cost::now().cpu() - before.cpu(),
    }
}

/// The median of each figure by itself.
fn median(lines: &[Line]) -> Line {
    let of = |figure: &dyn Fn(&Line) -> f64| {
        let mut all: Vec<f64> = lines.iter().map(figure).collect();
        all.sort_by(f64::total_cmp);
        all[all.len() / 2]
    };
    let cost = |side: &dyn Fn(&Line) -> Cost| Cost {
        user_seconds: of(&|l| side(l).user_seconds),
        system_seconds: of(&|l| side(l).system_seconds),
        peak_bytes: of(&|l| side(l).peak_bytes as f64) as u64,
    };
    Line {
        seconds: of(&|l| l.seconds),
        memory_rate: of(&|l| l.memory_rate),
        send: cost(&|l| l.send),
        receive: cost(&|l| l.receive),
        played_cpu_seconds: of(&|l| l.played_cpu_seconds),
        ..lines[0].clone()
    }
}

/// A library with the base image of the guest that is made up.
fn make_library(dir: &Path, noise: &[u8]) {
    let image = dir.join("base.raw");
    let mut file = std::io::BufWriter::new(File::create(&image).unwrap());
    for n in 0..BASE_BLOCKS {
        file.write_all(&Source::content(noise, Made::Base, n)).unwrap();
    }
    file.into_inner().unwrap().sync_all().unwrap();
    let library = dir.join("library");
    let vmar = |args: &[&str]| {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.env(AS_VMAR, "1").args(args).stdout(Stdio::null()).stderr(Stdio::null());
        assert!(command.status().unwrap().success(), "vmar {args:?} fails");
    };
    let path = library.to_str().unwrap();
    vmar(&["library", "init", path]);
    vmar(&["--library", path, "image", "add", &format!("base={}", image.display())]);
}

fn measure(args: &mut Args) {
    let source = Source::new(args);
    let made = tempfile::tempdir().unwrap();
    if let Source::Guest { noise, .. } = &source
        && args.library.is_none()
        && args.base > 0.0
    {
        make_library(made.path(), noise);
        (args.library, args.image) = (Some(made.path().join("library")), Some("base".into()));
    }
    let sizes = source.measure();
    let mut lines = Vec::new();
    for &workers in &args.workers {
        let rounds: Vec<Line> = (0..args.rounds.max(1)).map(|_| run(args, &source, workers, sizes)).collect();
        lines.push(median(&rounds));
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&lines).unwrap());
        return;
    }
    let Line { memory_bytes, stream_bytes, link_bytes, .. } = lines[0];
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    let (memory, stream, link) = (mib(memory_bytes), mib(stream_bytes), mib(link_bytes));
    println!("{memory} of memory, {stream} of stream, {link} on the link ({})", percent(link_bytes, stream_bytes));
    let head = [
        "link",
        "workers",
        "CPUs",
        "s",
        "GB/s",
        "send CPU s",
        "of it system",
        "MiB",
        "receive CPU s",
        "of it system",
        "MiB",
        "played CPU s",
    ];
    let mut table = Table::new(&head, 1);
    for l in &lines {
        let side = |c: &Cost| {
            [format!("{:.2}", c.cpu()), format!("{:.2}", c.system_seconds), (c.peak_bytes >> 20).to_string()]
        };
        let mut row = vec![l.link.clone(), l.workers.to_string(), l.cpus.to_string()];
        row.extend([format!("{:.2}", l.seconds), format!("{:.2}", l.memory_rate)]);
        row.extend(side(&l.send).into_iter().chain(side(&l.receive)));
        row.push(format!("{:.2}", l.played_cpu_seconds));
        table.row(row);
    }
    table.print();
}
