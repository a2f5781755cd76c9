//! `serve --metrics`: the counters of [`crate::device::stats`] for Prometheus, as text over HTTP.
//!
//! One thread, one connection at a time, one request a connection. Whoever connects may be anybody: a request is limited in
//! bytes and in time, and none takes a lock that the disk needs. (A web server as a crate would do more than this needs, and
//! the small ones have no limits of time.)

use super::Served;
use super::socket::Listening;
use crate::device::stats::{Class, Counter, Ledger, QueueStats, WAITS_US};
use crate::error::{Error, ErrorKind, Result};
use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that a request may have.
const REQUEST_MAX: usize = 8 << 10;

/// How long a client may take to ask, and then to read the answer.
const CLIENT_TIME: Duration = Duration::from_secs(2);

/// How long to read what a client still says after its answer: closed before, the answer might not reach it.
const LINGER_TIME: Duration = Duration::from_millis(200);

/// How long to wait when the host is short of descriptors or memory.
const SHORTAGE_PAUSE: Duration = Duration::from_millis(100);

/// How long the server whose place is taken may hold on to the address.
const FREE_TIME: Duration = Duration::from_secs(15);
const FREE_PAUSE: Duration = Duration::from_millis(50);

/// Where to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A port.
    Tcp(SocketAddr),
    /// A unix socket, for its owner alone.
    Unix(PathBuf),
}

impl std::str::FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Address, String> {
        match text.parse() {
            Ok(address) => Ok(Address::Tcp(address)),
            Err(_) if text.contains('/') => Ok(Address::Unix(text.into())),
            Err(_) => Err("give ADDRESS:PORT, as in 127.0.0.1:9100 or [::1]:9100, or a path with a '/' in it".into()),
        }
    }
}

/// A socket that listens and is not served yet.
#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    Unix(Listening),
}

/// Listens, and answers on a thread of its own to the end of the process.
///
/// # Errors
/// When the address cannot be had; another process may have it.
pub fn start(address: &Address, served: &Arc<Served>) -> Result<()> {
    let socket = bind(address)?;
    let served = Arc::clone(served);
    spawn(move || run(&socket, &served))
}

/// The same when the server whose place is taken has let go of the address. What goes wrong is logged: there is a guest.
pub fn start_after(address: &Address, served: &Arc<Served>) {
    let (address, served) = (address.clone(), Arc::clone(served));
    let spawned = spawn(move || {
        let begin = Instant::now();
        loop {
            match bind(&address) {
                Ok(socket) => return run(&socket, &served),
                Err(e) if begin.elapsed() > FREE_TIME => return log::error!("there are no metrics: {e}"),
                Err(_) => std::thread::sleep(FREE_PAUSE),
            }
        }
    });
    if let Err(e) = spawned {
        log::error!("there are no metrics: {e}");
    }
}

fn bind(address: &Address) -> Result<Socket> {
    match address {
        Address::Unix(path) => Listening::bind_private(path).map(Socket::Unix),
        Address::Tcp(address) => TcpListener::bind(address).map(Socket::Tcp).map_err(|e| {
            let error = Error::new(ErrorKind::Io, address, format!("cannot listen for --metrics: {e}"));
            if e.kind() == io::ErrorKind::AddrInUse {
                error.mend("choose another port, one for each server")
            } else {
                error
            }
        }),
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<()> {
    let spawned = std::thread::Builder::new().name("vmar-metrics".into()).spawn(work);
    spawned.map(drop).map_err(|e| Error::new(ErrorKind::Io, "--metrics", format!("cannot start a thread: {e}")))
}

fn run(socket: &Socket, served: &Served) {
    loop {
        let accepted = match socket {
            Socket::Tcp(listener) => listener.accept().map(|(stream, _)| Some(Stream::Tcp(stream))),
            Socket::Unix(listening) => listening.accept().map(|stream| stream.map(Stream::Unix)),
        };
        match accepted {
            // That a client goes away is its own business.
            Ok(Some(stream)) => drop(answer(stream, || exposition(served))),
            Ok(None) => {}
            Err(e) => {
                log::debug!("no connection to the metrics: {e}");
                std::thread::sleep(SHORTAGE_PAUSE);
            }
        }
    }
}

/// A connection.
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    /// Lets the next read or write take until `deadline`.
    fn until(&self, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match self {
            Stream::Tcp(s) => s.set_read_timeout(Some(left)).and_then(|()| s.set_write_timeout(Some(left))),
            Stream::Unix(s) => s.set_read_timeout(Some(left)).and_then(|()| s.set_write_timeout(Some(left))),
        }
    }

    fn read(&mut self, buf: &mut [u8], deadline: Instant) -> io::Result<usize> {
        self.until(deadline)?;
        match self {
            Stream::Tcp(s) => s.read(buf),
            Stream::Unix(s) => s.read(buf),
        }
    }

    fn write_all(&mut self, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() {
            self.until(deadline)?;
            let written = match self {
                Stream::Tcp(s) => s.write(bytes),
                Stream::Unix(s) => s.write(bytes),
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => bytes = &bytes[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn end_writing(&self) -> io::Result<()> {
        match self {
            Stream::Tcp(s) => s.shutdown(Shutdown::Write),
            Stream::Unix(s) => s.shutdown(Shutdown::Write),
        }
    }
}

/// Reads a request and answers it.
fn answer(mut stream: Stream, metrics: impl FnOnce() -> String) -> io::Result<()> {
    let mut request = Vec::new();
    let deadline = Instant::now() + CLIENT_TIME;
    let response = loop {
        if let Some(end) = end_of_head(&request) {
            break respond(&request[..end], metrics);
        }
        if request.len() >= REQUEST_MAX {
            break response("431 Request Header Fields Too Large", "", "the request is too long\n");
        }
        let mut bytes = [0; 1024];
        match stream.read(&mut bytes, deadline) {
            Ok(0) => return Ok(()),
            Ok(n) => request.extend_from_slice(&bytes[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if matches!(e.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock) => {
                break response("408 Request Timeout", "", "the request took too long\n");
            }
            Err(e) => return Err(e),
        }
    };
    stream.write_all(response.as_bytes(), Instant::now() + CLIENT_TIME)?;
    stream.end_writing()?;
    let deadline = Instant::now() + LINGER_TIME;
    while stream.read(&mut [0; 1024], deadline)? > 0 {}
    Ok(())
}

/// Where the empty line ends that ends the head of a request.
fn end_of_head(bytes: &[u8]) -> Option<usize> {
    let crlf = bytes.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4);
    let lf = bytes.windows(2).position(|w| w == b"\n\n").map(|at| at + 2);
    crlf.into_iter().chain(lf).min()
}

/// The answer to a request of which the head has come.
fn respond(head: &[u8], metrics: impl FnOnce() -> String) -> String {
    let line = head.split(|b| *b == b'\n').next().unwrap_or_default();
    let mut words = std::str::from_utf8(line).unwrap_or_default().split_ascii_whitespace();
    let (method, target, version) = (words.next(), words.next(), words.next());
    let (Some(method), Some(target), None) = (method, target, words.next()) else {
        return response("400 Bad Request", "", "this is no request of HTTP\n");
    };
    if !version.is_some_and(|version| version.starts_with("HTTP/1.")) {
        return response("400 Bad Request", "", "HTTP/1.1 is spoken here\n");
    }
    match (method, target.split('?').next()) {
        ("GET", Some("/metrics")) => {
            response("200 OK", "Content-Type: text/plain; version=0.0.4; charset=utf-8\r\n", &metrics())
        }
        ("GET", _) => response("404 Not Found", "", "there is only /metrics\n"),
        _ => response("405 Method Not Allowed", "Allow: GET\r\n", "there is only GET\n"),
    }
}

fn response(status: &str, headers: &str, body: &str) -> String {
    let headers = if headers.contains("Content-Type") {
        headers.into()
    } else {
        format!("Content-Type: text/plain\r\n{headers}")
    };
    format!("HTTP/1.1 {status}\r\n{headers}Content-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

/// All metrics, in the text format 0.0.4.
fn exposition(served: &Served) -> String {
    let names = &served.names;
    let disk = match (&names.image, &names.blk_file) {
        (Some(image), _) => format!("image=\"{}\"", escaped(image)),
        (None, Some(file)) => format!("blk_file=\"{}\"", escaped(&file.to_string_lossy())),
        (None, None) => "image=\"\"".into(),
    };
    let mut text = Text { out: String::new(), disk };
    let version = format!("version=\"{}\"", env!("CARGO_PKG_VERSION"));
    text.family("vmar_info", "gauge", "The server that answers.", [(version, 1)]);
    requests(&mut text, served.drive.ledger());
    if let Some(prefetch) = &served.prefetch {
        let p = prefetch.progress();
        let none = |n| [(String::new(), n)];
        text.family(
            "vmar_prefetch_planned_bytes",
            "gauge",
            "Bytes of traces to prefetch, at the start.",
            none(p.planned),
        );
        text.family("vmar_prefetch_left_bytes", "gauge", "Of those not looked at, or in flight.", none(p.left));
        text.family("vmar_prefetch_read_bytes_total", "counter", "Of those read.", none(p.read));
        text.family(
            "vmar_prefetch_cached_bytes_total",
            "counter",
            "Of those in the page cache already.",
            none(p.cached),
        );
    }
    text.out
}

/// What is kept of requests.
fn requests(text: &mut Text, ledger: &Ledger) {
    let sum =
        |counter: &dyn Fn(&QueueStats) -> &Counter| -> u64 { ledger.queues().iter().map(|q| counter(q).get()).sum() };
    let by_class = |counter: &dyn Fn(&QueueStats, Class) -> u64| {
        let of = |class| ledger.queues().iter().map(|q| counter(q, class)).sum::<u64>();
        Class::ALL.map(|class| (format!("type=\"{}\"", class.name()), of(class)))
    };
    let none = |n: u64| [(String::new(), n)];
    let operations = by_class(&|q, class| q.by_class(class).operations.get());
    text.family("vmar_requests_total", "counter", "Requests that have ended.", operations);
    let bytes = by_class(&|q, class| q.by_class(class).bytes.get());
    text.family("vmar_request_bytes_total", "counter", "Bytes of requests that succeeded.", bytes);
    let errors = by_class(&|q, class| q.by_class(class).errors.get());
    text.family("vmar_request_errors_total", "counter", "Requests that failed.", errors);
    waits(text, ledger);
    let sources = [
        ("own_image", sum(&|q| &q.own_bytes)),
        ("other_images", sum(&|q| &q.shared_bytes)),
        ("overlay", sum(&|q| &q.overlay_bytes)),
        ("zeros", sum(&|q| &q.zero_bytes)),
    ];
    let sources = sources.map(|(name, n)| (format!("source=\"{name}\""), n));
    text.family("vmar_read_bytes_total", "counter", "Bytes that were read, by where they are.", sources);
    let in_flight = ledger.queues().iter().map(QueueStats::in_flight).sum();
    text.family("vmar_requests_in_flight", "gauge", "Requests that have not ended.", none(in_flight));
    text.family("vmar_retries_total", "counter", "Tries after the first.", none(sum(&|q| &q.retries)));
    let retrying = ledger.retrying() as u64;
    text.family("vmar_requests_retrying", "gauge", "Requests that wait for another try.", none(retrying));
    let stuck = ledger.stuck() as u64;
    text.family("vmar_requests_stuck", "gauge", "Requests given up while the kernel holds them.", none(stuck));
    let failed = u64::from(ledger.flush_failed());
    text.family("vmar_flush_failed", "gauge", "1 once a flush has failed, which is final.", none(failed));
}

/// How long requests took that did not end at once, as a histogram.
fn waits(text: &mut Text, ledger: &Ledger) {
    const NAME: &str = "vmar_request_wait_seconds";
    text.head(NAME, "histogram", "Time of requests that did not end at once.");
    for class in Class::ALL {
        let label = format!("type=\"{}\"", class.name());
        let queues = || ledger.queues().iter().map(|q| q.by_class(class));
        let mut below = 0u64;
        for i in 0..=WAITS_US.len() {
            below += queues().map(|c| c.waits[i].get()).sum::<u64>();
            let bound = WAITS_US.get(i).map_or("+Inf".into(), |us| (*us as f64 / 1e6).to_string());
            text.sample(&format!("{NAME}_bucket"), &format!("{label},le=\"{bound}\""), below);
        }
        let seconds = queues().map(|c| c.wait_ns.get()).sum::<u64>() as f64 / 1e9;
        text.sample(&format!("{NAME}_sum"), &label, seconds);
        text.sample(&format!("{NAME}_count"), &label, below);
    }
}

/// The text under way.
struct Text {
    out: String,
    /// The label that says which disk it is.
    disk: String,
}

impl Text {
    fn family<const N: usize>(&mut self, name: &str, kind: &str, help: &str, samples: [(String, u64); N]) {
        self.head(name, kind, help);
        for (label, n) in samples {
            self.sample(name, &label, n);
        }
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let _ = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, label: &str, n: impl std::fmt::Display) {
        let comma = if label.is_empty() { "" } else { "," };
        let _ = writeln!(self.out, "{name}{{{}{comma}{label}}} {n}", self.disk);
    }
}

/// A label's value as the format wants it.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_ports_or_paths() {
        let tcp = |text: &str| Ok(Address::Tcp(text.parse().unwrap()));
        assert_eq!("127.0.0.1:9100".parse::<Address>(), tcp("127.0.0.1:9100"));
        assert_eq!("[::1]:0".parse::<Address>(), tcp("[::1]:0"));
        assert_eq!("./m".parse::<Address>(), Ok(Address::Unix("./m".into())));
        for text in ["", "9100", ":9100", "localhost:9100", "127.0.0.1", "127.0.0.1:65536"] {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn requests_are_told_apart() {
        let status = |head: &str| {
            let text = respond(head.as_bytes(), || "m 1\n".into());
            assert!(text.contains("\r\nConnection: close\r\n"), "{text}");
            text.split(' ').nth(1).unwrap().parse::<u32>().unwrap()
        };
        assert_eq!(status("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), 200);
        assert_eq!(status("GET /metrics?x=1 HTTP/1.0\n\n"), 200);
        for target in ["/", "/metrics/", "/../metrics", "*", "http://x/metrics"] {
            assert_eq!(status(&format!("GET {target} HTTP/1.1\r\n\r\n")), 404, "{target}");
        }
        for method in ["POST", "HEAD", "get", "OPTIONS"] {
            assert_eq!(status(&format!("{method} /metrics HTTP/1.1\r\n\r\n")), 405, "{method}");
        }
        for head in
            ["\r\n\r\n", "GET\r\n\r\n", "GET /metrics\r\n\r\n", "GET /metrics HTTP/2\r\n\r\n", "GET / a b HTTP/1.1\n\n"]
        {
            assert_eq!(status(head), 400, "{head:?}");
        }
        assert!(respond(b"GET /\xff HTTP/1.1\r\n\r\n", String::new).starts_with("HTTP/1.1 400"));
    }

    #[test]
    fn the_head_of_a_request_ends_with_an_empty_line() {
        assert_eq!(end_of_head(b"GET / HTTP/1.1\r\nA: b\r\n"), None);
        assert_eq!(end_of_head(b"a\r\n\r\nb\n\n"), Some(5));
        assert_eq!(end_of_head(b"a\n\nb\r\n\r\n"), Some(3));
    }

    #[test]
    fn labels_are_escaped() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
