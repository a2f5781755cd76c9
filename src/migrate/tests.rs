//! Both sides with a source and a destination that behave as QEMU does: what arrives, and who runs the VM when the link is cut.

use super::bases::BaseFiles;
use super::disk::Arrival;
use super::frame::{Pages, Source};
use super::kept::{Kept, Remembered, Stay};
use super::known::{Has, Known, Knows, Nothing, Received};
use super::link::Socket;
use super::receive::{self, Host, Outcome};
use super::record::{Coming, Leaving, Recorder};
use super::send::{self, Moved, Options, SHUT_OK};
use super::stream::{Kind, PAGE_BYTES, PAGE_SIZE, Place};
use super::wire::{Digest, Hello, Welcome};
use crate::error::Result;
use crate::store::Pack;
use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

/// A guest's page: some zero, many alike, some that an image has.
fn page(n: u64, round: u64) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    let seed = match n % 7 {
        0 => return page,
        1 | 2 => n % 5 + 1,
        3 => 1_000_000 + n % 50,
        _ => 2_000_000 + n * 3 + round,
    };
    let mut x = seed;
    for word in page.as_chunks_mut::<8>().0 {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *word = (x ^ x >> 29).to_le_bytes();
    }
    page
}

/// A whole migration of so many pages, the second half of them told of twice.
fn stream(pages: u64, return_path: bool) -> Vec<u8> {
    let mut out = b"QEVM\0\0\0\x03\x07\0\0\0\x04test".to_vec();
    if return_path {
        out.extend([8, 0, 1, 0, 0]);
    }
    out.extend(b"\x01\0\0\0\x02\x03ram\0\0\0\0\0\0\0\x04");
    out.extend(((pages * PAGE_SIZE) | 4).to_be_bytes());
    out.extend(b"\x04ram0");
    out.extend((pages * PAGE_SIZE).to_be_bytes());
    out.extend(0x10u64.to_be_bytes());
    out.extend(b"\x7e\0\0\0\x02");
    for (round, kind) in [(0, 2u8), (1, 3)] {
        out.push(kind);
        out.extend(b"\0\0\0\x02");
        let first = if round == 0 { 0 } else { pages / 2 };
        for n in first..pages {
            let content = page(n, round);
            let zero = content == [0; PAGE_BYTES];
            let place = Place { block: 0, offset: n * PAGE_SIZE, named: n == first };
            place.write_header(if zero { Kind::Zero } else { Kind::Data }, b"ram0", &mut out);
            if zero { out.push(0) } else { out.extend(content) }
        }
        out.extend(0x10u64.to_be_bytes());
        out.extend(b"\x7e\0\0\0\x02");
    }
    out.extend(b"\x04\0\0\0\x09\x03cpu\0\0\0\0\0\0\0\x01");
    out.extend((0..60_000u32).flat_map(u32::to_be_bytes));
    out.extend(b"\x7e\0\0\0\x09\0");
    out
}

/// QEMU at the source: true if it runs the VM on.
fn source(mut socket: UnixStream, stream: &[u8]) -> bool {
    for part in stream.chunks(30_000) {
        if socket.write_all(part).is_err() {
            return true;
        }
    }
    let mut answer = Vec::new();
    let mut byte = [0];
    // It closes its socket when it has its answer, or when there will be none.
    while !answer.ends_with(&SHUT_OK) && socket.read(&mut byte).is_ok_and(|n| n > 0) {
        answer.extend(byte);
    }
    // A PONG was passed on, too.
    assert!(!answer.ends_with(&SHUT_OK) || answer.starts_with(&[0, 2, 0, 4, 0, 0, 0, 7]));
    !answer.ends_with(&SHUT_OK)
}

/// QEMU at the destination, with `-S`: what it got.
fn destination(mut socket: UnixStream, len: usize, status: [u8; 8]) -> Vec<u8> {
    let mut got = Vec::new();
    let mut buf = vec![0; 1 << 16];
    let _ = socket.write_all(&[0, 2, 0, 4, 0, 0, 0, 7]);
    while got.len() < len {
        match socket.read(&mut buf) {
            Ok(n) if n > 0 => got.extend(&buf[..n]),
            _ => return got,
        }
    }
    let _ = socket.write_all(&status);
    let _ = socket.read(&mut buf);
    got
}

/// A link that breaks when so many bytes have passed.
fn link(cut: usize) -> (Socket, Socket, thread::JoinHandle<usize>) {
    let (near, a) = UnixStream::pair().unwrap();
    let (b, far) = UnixStream::pair().unwrap();
    let pumps = thread::spawn(move || {
        let passed = AtomicUsize::new(0);
        let pump = |mut from: &UnixStream, mut to: &UnixStream| {
            let mut buf = vec![0; 4096];
            while let Ok(n @ 1..) = from.read(&mut buf) {
                let before = passed.fetch_add(n, Ordering::SeqCst);
                let n = n.min(cut.saturating_sub(before));
                let whole = n > 0 && to.write_all(&buf[..n]).is_ok();
                if !whole || passed.load(Ordering::SeqCst) >= cut {
                    break;
                }
            }
            for socket in [&a, &b] {
                let _ = socket.shutdown(std::net::Shutdown::Both);
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| pump(&b, &a));
            pump(&a, &b);
        });
        passed.into_inner()
    });
    (Socket::Unix(near), Socket::Unix(far), pumps)
}

/// A library: the pages of kind 3, by hash. `lost` of them the receiver lacks, `stale` are others there.
struct Images {
    by_hash: HashMap<Digest, u32>,
    lost: u32,
    stale: u32,
}

impl Images {
    fn new(lost: u32, stale: u32) -> Images {
        let hash = |n: u32| *blake3::hash(&page(3 + 7 * u64::from(n), 0)).as_bytes();
        Images { by_hash: (0..50).map(|n| (hash(n), n)).collect(), lost, stale }
    }
}

impl Known for Images {
    fn find(&self, _: &[u8], _: Place, hash: &Digest, _: &[u8]) -> Option<Source> {
        self.by_hash.get(hash).map(|n| Source::Base { image: 0, block: *n })
    }
}

impl Pages for Images {
    fn same(&mut self, _: &[u8], _: u64, _: &mut [u8; PAGE_BYTES]) -> bool {
        false
    }

    fn find(&mut self, source: Source, out: &mut [u8; PAGE_BYTES]) -> bool {
        let Source::Base { block, .. } = source else { return false };
        *out = page(3 + 7 * u64::from(block), 0);
        if block < self.stale {
            out[17] ^= 1;
        }
        block >= self.stale + self.lost || block < self.stale
    }
}

/// The destination's host: whether it was told to run the VM.
struct There<'a>(&'a AtomicBool);

impl Host for There<'_> {
    fn loaded(&self) -> Result<()> {
        Ok(())
    }

    fn commit(&self) -> Result<()> {
        Ok(())
    }

    fn start(&self) -> Result<()> {
        self.0.store(true, Ordering::SeqCst);
        Ok(())
    }
}

const NO_DISK: Option<Arrival<'static, Nothing>> = None;

struct End {
    sent: Result<Moved>,
    received: Outcome,
    /// The source's QEMU runs the VM on.
    here: bool,
    /// The destination's was told to run it.
    there: bool,
    committed: bool,
    got: Vec<u8>,
    passed: usize,
}

struct Try<'a, K, P> {
    stream: &'a [u8],
    known: K,
    pages: P,
    cut: usize,
    status: [u8; 8],
    options: Options,
}

fn migrate<K: Known, P: Pages + Send>(setup: Try<'_, K, P>) -> End {
    migrate_noting(setup, &mut (), &mut Coming::default())
}

fn migrate_noting<K: Known, P: Pages + Send>(
    setup: Try<'_, K, P>,
    recorder: &mut impl Recorder,
    coming: &mut Coming,
) -> End {
    let (to_source, source_end) = UnixStream::pair().unwrap();
    let (to_destination, destination_end) = UnixStream::pair().unwrap();
    let (near, far, pumps) = link(setup.cut);
    let (committed, there) = (AtomicBool::new(false), AtomicBool::new(false));
    let Try { stream, known, pages, status, options, .. } = setup;
    let (sent, received, here, got) = thread::scope(|scope| {
        let at_source = scope.spawn(|| source(source_end, stream));
        let at_destination = scope.spawn(|| destination(destination_end, stream.len(), status));
        let receiver = scope.spawn(|| {
            let to_destination = Socket::Unix(to_destination);
            let begun = receive::greeted(&far).and_then(|hello| {
                let images = vec![true; hello.images.len()];
                receive::welcome(&far, Welcome { images, ..Welcome::default() })
            });
            if let Err(error) = begun {
                return Outcome::There(error);
            }
            receive::run(
                &to_destination,
                &far,
                Received::new(options.window, pages),
                Some(coming),
                NO_DISK,
                &There(&there),
            )
        });
        let to_source = Socket::Unix(to_source);
        let hello = Hello { vm: "web".into(), images: vec![[1; 32]], ..Hello::default() };
        let sent = send::greet(&near, hello).and_then(|_| {
            send::run(&to_source, &near, &known, options, recorder, &|| {
                committed.store(true, Ordering::SeqCst);
                Ok(())
            })
        });
        drop((to_source, near));
        let received = receiver.join().unwrap();
        (sent, received, at_source.join().unwrap(), at_destination.join().unwrap())
    });
    let passed = pumps.join().unwrap();
    let (there, committed) = (there.into_inner(), committed.into_inner());
    End { sent, received, here, there, committed, got, passed }
}

fn options() -> Options {
    Options { window: 100, workers: 2, parts: 8 }
}

fn plain(stream: &[u8], cut: usize) -> Try<'_, Images, Images> {
    Try { stream, known: Images::new(0, 0), pages: Images::new(0, 0), cut, status: SHUT_OK, options: options() }
}

#[test]
fn the_stream_arrives_and_the_vm_moves() {
    let stream = stream(3000, true);
    let end = migrate(plain(&stream, usize::MAX));
    let moved = end.sent.unwrap();
    assert!(matches!(end.received, Outcome::Here), "{:?}", end.received);
    assert!(moved.confirmed && end.committed && end.there && !end.here);
    assert!(end.got == stream, "not the stream that was sent");
    let counts = moved.counts;
    assert_eq!(counts.stream_bytes, stream.len() as u64);
    assert_eq!(counts.zero + counts.base + counts.intra + counts.literal + counts.kept + counts.template, 4500);
    assert!(counts.base > 600 && counts.intra > 1000 && counts.zero > 600, "{counts:?}");
    // Literals are noise, and all else is next to nothing.
    assert!(counts.link_bytes < (counts.literal + 100) * 4096 + 300_000, "{counts:?}");
}

#[test]
fn a_receiver_without_anything_gets_everything() {
    let stream = stream(1000, true);
    let none = Options { window: 0, workers: 1, parts: 1 };
    let setup =
        Try { stream: &stream, known: Nothing, pages: Nothing, cut: usize::MAX, status: SHUT_OK, options: none };
    let end = migrate(setup);
    assert!(end.got == stream && end.sent.unwrap().counts.intra == 0);
}

#[test]
fn what_the_receiver_lacks_or_has_otherwise_comes_again() {
    let stream = stream(3000, true);
    for (lost, stale) in [(50, 0), (0, 50), (3, 4)] {
        let end = migrate(Try { pages: Images::new(lost, stale), ..plain(&stream, usize::MAX) });
        assert!(end.got == stream, "lost {lost}, stale {stale}");
        assert!(end.sent.unwrap().confirmed && end.there && !end.here);
    }
}

#[test]
fn a_destination_that_cannot_load_the_vm_leaves_it_at_the_source() {
    let stream = stream(500, true);
    let failed = [0, 1, 0, 4, 0, 0, 0, 1];
    let end = migrate(Try { status: failed, ..plain(&stream, usize::MAX) });
    assert!(end.sent.unwrap_err().to_string().contains("could not load"));
    assert!(end.here && !end.there && !end.committed);
    assert!(matches!(end.received, Outcome::There(_)));
}

#[test]
fn a_source_without_return_path_is_refused() {
    let stream = stream(500, false);
    let end = migrate(plain(&stream, usize::MAX));
    let said = end.sent.unwrap_err().to_string();
    assert!(said.contains("no return path") && said.contains("migrate-set-capabilities"), "{said}");
    assert!(end.here && !end.there);
}

#[test]
fn a_source_that_ends_early_is_not_moved() {
    let whole = stream(2000, true);
    let part = &whole[..whole.len() / 2];
    // The destination waits for more than comes.
    let (mut to_source, source_end) = UnixStream::pair().unwrap();
    let (to_destination, destination_end) = UnixStream::pair().unwrap();
    let (near, far, pumps) = link(usize::MAX);
    let started = &AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| destination(destination_end, whole.len(), SHUT_OK));
        scope.spawn(move || {
            to_source.write_all(part).unwrap();
        });
        let receiver = scope.spawn(move || {
            receive::greeted(&far).unwrap();
            receive::welcome(&far, Welcome::default()).unwrap();
            receive::run(
                &Socket::Unix(to_destination),
                &far,
                Received::new(100, Nothing),
                None,
                NO_DISK,
                &There(started),
            )
        });
        send::greet(&near, Hello::default()).unwrap();
        let sent = send::run(&Socket::Unix(source_end), &near, &Nothing, options(), &mut (), &|| panic!("nor moved"));
        assert!(sent.unwrap_err().to_string().contains("has ended it"));
        let Outcome::There(why) = receiver.join().unwrap() else { panic!("it is not there") };
        // The network here may end before it has carried the sender's last word.
        let why = why.to_string();
        assert!(why.contains("has ended it") || why.contains("link"), "{why}");
        drop(near);
    });
    assert!(!started.load(Ordering::SeqCst), "the VM is not complete");
    pumps.join().unwrap();
}

/// The VM runs at one side, or, after the sender has written down that it moved, at the other, or at neither; never at both.
#[test]
fn wherever_the_link_is_cut_the_vm_runs_at_one_side_at_most() {
    let stream = stream(600, true);
    let measure = || migrate(plain(&stream, usize::MAX)).passed;
    let whole = measure();
    for n in 0..60 {
        cut_at(&stream, n * whole / 60 + n * 7 % 97, whole);
    }
    // How many bytes it takes depends on how parts are cut, which is a matter of time: the end is where it was about.
    let doubts = (0..10).find(|_| {
        let whole = measure();
        let doubts = (whole.saturating_sub(220)..whole + 3).filter(|cut| cut_at(&stream, *cut, whole)).count();
        doubts > 0
    });
    assert!(doubts.is_some(), "no cut came between the sender's word and the receiver's ear");
}

/// Cuts the link after so many bytes. True: nobody at the receiver knows whose the VM is, and it was given away.
fn cut_at(stream: &[u8], cut: usize, whole: usize) -> bool {
    let end = migrate(plain(stream, cut));
    let said = format!("cut at {cut} of {whole}: {:?}, {:?}", end.sent.as_ref().map(|m| m.confirmed), end.received);
    assert!(!(end.here && end.there), "at both: {said}");
    // Who lost it can be told from what the sender wrote down.
    assert_eq!(end.here, !end.committed, "{said}");
    let doubt = match (&end.sent, &end.received) {
        (Ok(_), Outcome::Here) => {
            assert!(end.there, "{said}");
            false
        }
        (Ok(moved), Outcome::Doubt(_)) => {
            assert!(!moved.confirmed && !end.there, "{said}");
            true
        }
        (Err(_), Outcome::Doubt(_) | Outcome::There(_)) => {
            assert!(!end.there, "{said}");
            false
        }
        _ => panic!("{said}"),
    };
    if end.there {
        assert!(end.got == stream, "{said}");
    }
    doubt
}

/// Back where it was: what it left there is not sent, wherever in memory it is by now.
#[test]
fn a_vm_that_comes_back_finds_its_memory() {
    let dir = tempfile::tempdir().unwrap();
    let away = stream(2000, true);
    let (mut leaving, mut coming) = (Leaving::new(dir.path().into()), Coming::default());
    let end = migrate_noting(plain(&away, usize::MAX), &mut leaving, &mut coming);
    assert!(end.there && end.got == away);
    let pack = dir.path().join("new.pack");
    let stay = Stay { vm: "web", images: vec![[1; 32]], ..Stay::default() };
    let (manifest, id) = leaving.finish().unwrap().unwrap().seal(stay, &pack).unwrap();
    let remembered = Remembered::new(coming.finish().unwrap().unwrap());
    assert_eq!(manifest.root(), remembered.root(), "both sides name it alike");

    // It has 500 pages more, and its pages are those of the second round.
    let back = stream(2500, true);
    let known = Knows { kept: Some(remembered), ..Knows::default() };
    let images = BaseFiles::none();
    let kept = Kept::new(manifest, vec![Pack::open(&pack, id).unwrap()], images);
    let pages = Has { kept: Some(kept), bases: BaseFiles::none(), template: None };
    let setup = Try { stream: &back, known, pages: &pages, cut: usize::MAX, status: SHUT_OK, options: options() };
    let end = migrate(setup);
    assert!(end.there && end.got == back);
    let counts = end.sent.unwrap().counts;
    assert!(counts.kept > 1500, "{counts:?}");
}

/// A source that pauses in the middle of everything, as one at its bandwidth limit does.
#[test]
fn a_slow_source_is_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let (mut leaving, mut coming) = (Leaving::new(dir.path().into()), Coming::default());
    let noted = &mut coming;
    let stream = stream(300, true);
    let (to_source, source_end) = UnixStream::pair().unwrap();
    let (to_destination, destination_end) = UnixStream::pair().unwrap();
    let (near, far, pumps) = link(usize::MAX);
    let len = stream.len();
    let started = &AtomicBool::new(false);
    thread::scope(|scope| {
        let got = scope.spawn(move || destination(destination_end, len, SHUT_OK));
        let receiver = scope.spawn(move || {
            receive::greeted(&far).unwrap();
            receive::welcome(&far, Welcome::default()).unwrap();
            receive::run(
                &Socket::Unix(to_destination),
                &far,
                Received::new(100, Nothing),
                Some(noted),
                NO_DISK,
                &There(started),
            )
        });
        let slow = &stream;
        scope.spawn(move || {
            let mut to_source = to_source;
            for part in slow.chunks(50_001) {
                to_source.write_all(part).unwrap();
                thread::sleep(Duration::from_millis(30));
            }
            // SHUT, and what came before it.
            let mut rest = [0; 16];
            to_source.read_exact(&mut rest).unwrap();
        });
        send::greet(&near, Hello::default()).unwrap();
        let moved = send::run(&Socket::Unix(source_end), &near, &Nothing, options(), &mut leaving, &|| Ok(())).unwrap();
        assert!(moved.confirmed);
        assert!(got.join().unwrap() == stream);
        assert!(matches!(receiver.join().unwrap(), Outcome::Here));
        drop(near);
    });
    pumps.join().unwrap();
    // It paused in the middle of pages, too: both sides know all of them.
    let (manifest, _) = leaving.finish().unwrap().unwrap().seal(Stay::default(), &dir.path().join("new.pack")).unwrap();
    assert_eq!(manifest.root(), Remembered::new(coming.finish().unwrap().unwrap()).root());
}
