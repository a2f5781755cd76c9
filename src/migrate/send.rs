//! The sender's side: from QEMU's stream to the link, and what comes back.
//!
//! ```text
//! source ─▶ reader ─▶ hash ×N ─▶ decide ─▶ pack ×N ─▶ writer ─▶ link
//!    ▲       parts     (map)     in order             in order    │
//!    └──────────────────────── answers ◀──────────────────────────┘
//! ```
//!
//! Parts are under way in a fixed number, from the reader to the receiver's ACK: that bounds the memory, and what QEMU believes to
//! be sent and is not, by which it guesses when the rest fits into the downtime. A part stays until it is acknowledged, for it may
//! have to come again.
//!
//! Whose the VM is, is one lock (`Phase`): until it says *committed* every error closes the source's socket, upon which QEMU
//! ends the migration and runs the VM on; from then on nothing here lets it run again.

use super::known::Known;
use super::link::{self, Line, NoMessage, Socket, given_up};
use super::order::{Permits, Reorder};
use super::part::{Cutter, Part};
use super::record::Recorder;
use super::stream::Mark;
use super::wire::{Hello, Malformed, Message, Welcome};
use super::work::{self, Counts, Decided, Decider, Hashed};
use crate::error::{Error, ErrorKind, Result};
use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Parts under way: 2 MiB of the stream.
pub const PARTS: usize = 8;
/// How long a part waits for the next bytes before it goes as it is.
const LINGER: Duration = Duration::from_millis(2);
/// How long bytes wait that make no sense alone.
const IDLE: Duration = Duration::from_millis(20);
/// The same for the beginning of a page: QEMU waits for nothing in the middle of one, but may get no processor. A page that went in
/// two pieces is one that nobody takes for a page, and what is kept of the VM is of no use.
const RECORD: Duration = Duration::from_secs(2);
/// How long QEMU may take to end after it was told that the VM has moved.
const FAREWELL: Duration = Duration::from_secs(10);
/// How long the receiver's being told of a failure may take, while the source waits for its own.
const LAST_WORD_PAUSE: Duration = Duration::from_millis(10);
const LAST_WORD_TRIES: usize = 100;
/// Success, as QEMU's return path says it: type SHUT (1), 4 bytes, status 0.
pub const SHUT_OK: [u8; 8] = [0, 1, 0, 4, 0, 0, 0, 0];
/// What the return path must be switched on with.
const RETURN_PATH: &str = "set it on both sides before 'migrate': migrate-set-capabilities return-path on";

/// How a migration is sent.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Literals that the receiver keeps for later pages; 0: pages are not looked for in the stream itself.
    pub window: u64,
    /// Threads that hash, and threads that pack.
    pub workers: usize,
    /// Parts under way.
    pub parts: usize,
}

impl Default for Options {
    fn default() -> Self {
        let workers = std::thread::available_parallelism().map_or(1, |n| n.get());
        Options { window: super::known::WINDOW, workers, parts: PARTS.max(2 * workers) }
    }
}

/// What became of a VM that was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Moved {
    /// The receiver has said that it runs there. If not, nobody here knows; it never runs here.
    pub confirmed: bool,
    /// What was sent.
    pub counts: Counts,
    /// The same by rounds, see [`Decider::rounds`].
    pub rounds: Vec<Counts>,
}

/// The host that a VM leaves.
pub trait Origin: Sync {
    /// The VM stands still, and its destination has loaded it: what goes with it, and was not complete before, goes now.
    ///
    /// # Errors
    /// It cannot; the VM stays.
    fn settle(&self, line: &Line<'_>) -> Result<()>;
    /// Writes down, durably, that the VM has moved, before anybody is told.
    ///
    /// # Errors
    /// It cannot be written down; the VM stays.
    fn commit(&self) -> Result<()>;
}

/// One of which nothing goes but the VM's memory; called to write down that it has moved.
impl<F: Fn() -> Result<()> + Sync> Origin for F {
    fn settle(&self, _: &Line<'_>) -> Result<()> {
        Ok(())
    }

    fn commit(&self) -> Result<()> {
        self()
    }
}

/// Greets the receiver.
///
/// # Errors
/// It does not answer, or is none.
pub fn greet(link: &Socket, hello: Hello) -> Result<Welcome> {
    link.watch().map_err(|e| cut(&e))?;
    let images = hello.images.len();
    link::send(link, &Message::Hello(hello)).map_err(|e| cut(&e))?;
    match link::receive(link) {
        Ok(Message::Welcome(welcome)) if welcome.images.len() == images => Ok(welcome),
        Ok(Message::Abort(why)) => Err(given_up("receiver", &why)),
        Ok(_) => Err(strange("it answered the greeting with something else")),
        Err(e) => Err(no_message(e)),
    }
}

/// Whose the VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The source's.
    Here,
    /// The source's, and the migration has failed.
    Failed,
    /// The receiver's.
    Moved,
}

/// What all threads share.
struct Shared<'a> {
    source: &'a Socket,
    link: &'a Socket,
    /// Held for a whole message.
    writing: Mutex<()>,
    phase: Mutex<Phase>,
    error: Mutex<Option<Error>>,
    permits: Permits,
    unacked: Mutex<BTreeMap<u64, Arc<Decided>>>,
    /// Bytes of frames on the link, by rounds.
    link_bytes: Mutex<Vec<u64>>,
    source_ended: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared<'_> {
    /// Ends the migration, and lets the VM run on where it is; too late if it has moved.
    fn fail(&self, error: Error) {
        let mut phase = lock(&self.phase);
        if *phase == Phase::Here {
            *phase = Phase::Failed;
            // So that the receiver is not left in doubt; it goes without if the link takes nothing.
            let whole = (0..LAST_WORD_TRIES).find_map(|_| match self.writing.try_lock() {
                Ok(whole) => Some(whole),
                Err(_) => {
                    std::thread::sleep(LAST_WORD_PAUSE);
                    None
                }
            });
            if whole.is_some() {
                let _ = link::send(self.link, &Message::Abort(error.to_string()));
            }
            drop(whole);
            *lock(&self.error) = Some(error);
            self.source.shut();
            self.link.shut();
            self.permits.close();
        }
    }

    fn line(&self) -> Line<'_> {
        Line { link: self.link, writing: &self.writing }
    }

    /// Counts bytes of a frame.
    fn count(&self, round: usize, bytes: usize) {
        let mut rounds = lock(&self.link_bytes);
        let len = rounds.len().max(round + 1);
        rounds.resize(len, 0);
        if let Some(round) = rounds.get_mut(round) {
            *round += bytes as u64;
        }
    }
}

/// Sends a VM: from the source's first byte until the receiver runs it, or until it is clear that it stays. `recorder` sees all of it.
/// `origin` gives it away.
///
/// # Errors
/// Why the VM stays; its QEMU was told, and runs it on.
pub fn run(
    source: &Socket,
    link: &Socket,
    known: &impl Known,
    options: Options,
    recorder: &mut impl Recorder,
    origin: &impl Origin,
) -> Result<Moved> {
    let shared = Shared {
        source,
        link,
        writing: Mutex::default(),
        phase: Mutex::new(Phase::Here),
        error: Mutex::default(),
        permits: Permits::new(options.parts),
        unacked: Mutex::default(),
        link_bytes: Mutex::default(),
        source_ended: AtomicBool::new(false),
    };
    let (confirmed, mut rounds) = std::thread::scope(|scope| {
        let shared = &shared;
        let (parts, to_hash) = channel();
        let (hashed, to_decide) = channel();
        let (decided, to_pack) = channel();
        let (packed, to_write) = channel();
        let (to_hash, to_pack) = (Arc::new(Mutex::new(to_hash)), Arc::new(Mutex::new(to_pack)));
        scope.spawn(move || read(shared, &parts));
        for _ in 0..options.workers {
            let (from, to) = (Arc::clone(&to_hash), hashed.clone());
            scope.spawn(move || each(&from, |part: Part| to.send((part.number, work::hash(part, known))).is_ok()));
            let (from, to) = (Arc::clone(&to_pack), packed.clone());
            scope.spawn(move || each(&from, |decided: Arc<Decided>| pack(shared, &decided, &to)));
        }
        drop((hashed, packed));
        let decider = scope.spawn(move || decide(shared, options.window, recorder, &to_decide, &decided));
        scope.spawn(move || write(shared, &to_write));
        let confirmed = answers(shared, origin);
        (confirmed, decider.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    });
    let link_bytes = shared.link_bytes.into_inner().unwrap_or_else(PoisonError::into_inner);
    rounds.iter_mut().zip(link_bytes).for_each(|(round, bytes)| round.link_bytes = bytes);
    match shared.error.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(Moved { confirmed, counts: Counts::sum(&rounds), rounds }),
    }
}

/// Cuts the stream into parts. Ends when the source does, or when there are no permits any more.
fn read(shared: &Shared<'_>, parts: &Sender<Part>) {
    if let Err(error) = read_until_end(shared, parts) {
        shared.fail(error);
    }
    shared.source_ended.store(true, Ordering::Release);
}

fn read_until_end(shared: &Shared<'_>, parts: &Sender<Part>) -> Result<()> {
    let (mut cutter, mut return_path, mut lost) = (Cutter::default(), false, false);
    let mut buf = vec![0; 128 << 10];
    let mut source = shared.source;
    loop {
        let more = source.is_readable(LINGER).map_err(|e| no_source(&e))?;
        if !more {
            cutter.cut();
            let patience = if cutter.parser().is_in_record() { RECORD } else { IDLE };
            if cutter.parser().held() > 0 && !source.is_readable(patience).map_err(|e| no_source(&e))? {
                cutter.flush();
            }
        }
        for part in cutter.take_parts() {
            if !shared.permits.take() || parts.send(part).is_err() {
                return Ok(());
            }
        }
        let n = match source.read(&mut buf) {
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(no_source(&e)),
        };
        if n == 0 {
            // What it wrote last is of no use without its end.
            return Err(source_ended());
        }
        cutter.feed(buf.get(..n).unwrap_or_default());
        for mark in cutter.take_marks() {
            match mark {
                Mark::ReturnPath => return_path = true,
                Mark::Blocks if !return_path => {
                    let what = "the source QEMU has no return path: the VM could be lost at the end";
                    return Err(Error::new(ErrorKind::Unsupported, "migration", what).mend(RETURN_PATH));
                }
                Mark::Lost if !lost => {
                    lost = true;
                    log::warn!("a part of the migration stream is not understood; it passes as it is");
                }
                _ => {}
            }
        }
    }
}

/// Takes pieces from a queue that several threads share, until it ends or `then` is false.
fn each<T>(from: &Mutex<Receiver<T>>, mut then: impl FnMut(T) -> bool) {
    loop {
        let Ok(piece) = lock(from).recv() else { return };
        if !then(piece) {
            return;
        }
    }
}

fn decide(
    shared: &Shared<'_>,
    window: u64,
    recorder: &mut impl Recorder,
    hashed: &Receiver<(u64, Hashed)>,
    decided: &Sender<Arc<Decided>>,
) -> Vec<Counts> {
    let (mut decider, mut order) = (Decider::new(window), Reorder::default());
    while let Ok((number, piece)) = hashed.recv() {
        for piece in order.push(number, piece) {
            recorder.part(&piece.part, &piece.pages);
            let piece = Arc::new(decider.decide(piece));
            lock(&shared.unacked).insert(piece.part.number, Arc::clone(&piece));
            recorder.told(decider.rounds(), lock(&shared.link_bytes).iter().sum());
            if decided.send(piece).is_err() {
                return decider.rounds().to_vec();
            }
        }
    }
    decider.rounds().to_vec()
}

/// A frame as it goes on the link.
struct Packed {
    round: usize,
    bytes: Vec<u8>,
}

fn pack(shared: &Shared<'_>, decided: &Decided, packed: &Sender<(u64, Packed)>) -> bool {
    match decided.pack() {
        Ok(frame) => {
            let mut bytes = Vec::new();
            Message::Frame(frame).write(&mut bytes);
            packed.send((decided.part.number, Packed { round: decided.round, bytes })).is_ok()
        }
        Err(e) => {
            shared.fail(Error::new(ErrorKind::Io, "zstd", e));
            false
        }
    }
}

fn write(shared: &Shared<'_>, packed: &Receiver<(u64, Packed)>) {
    let mut order = Reorder::default();
    while let Ok((number, bytes)) = packed.recv() {
        for Packed { round, bytes } in order.push(number, bytes) {
            if let Err(e) = shared.line().write(&bytes) {
                return shared.fail(cut(&e));
            }
            shared.count(round, bytes.len());
        }
    }
}

/// Does what the receiver says, until it is clear where the VM is. True: the receiver runs it.
fn answers(shared: &Shared<'_>, origin: &impl Origin) -> bool {
    let confirmed = loop {
        let message = match link::receive(shared.link) {
            Ok(message) => message,
            Err(e) => {
                shared.fail(no_message(e));
                break false;
            }
        };
        match answer(shared, message, origin) {
            Ok(false) => {}
            Ok(true) => break true,
            Err(error) => {
                if *lock(&shared.phase) == Phase::Moved {
                    log::error!("after the VM was given away: {error}");
                }
                shared.fail(error);
            }
        }
    };
    end(shared);
    confirmed
}

fn answer(shared: &Shared<'_>, message: Message, origin: &impl Origin) -> Result<bool> {
    let mut source = shared.source;
    match message {
        Message::Ack(number) => {
            if lock(&shared.unacked).remove(&number).is_none() {
                return Err(strange("it acknowledged what was not sent"));
            }
            shared.permits.give();
        }
        Message::Again(number) => {
            let decided = lock(&shared.unacked).get(&number).map(Arc::clone);
            let decided = decided.ok_or_else(|| strange("it asks again for what was not sent"))?;
            log::info!("frame {number} is sent again: the receiver lacks a page that it was to have");
            let frame = decided.pack_again().map_err(|e| Error::new(ErrorKind::Io, "zstd", e))?;
            let len = shared.line().send(&Message::Frame(frame)).map_err(|e| cut(&e))?;
            shared.count(decided.round, len);
        }
        Message::Return(bytes) => source.write_all(&bytes).map_err(|e| no_source(&e))?,
        Message::Ready => {
            if *lock(&shared.phase) != Phase::Here {
                return Ok(false);
            }
            // Its VM stands still; nothing but this is on the link any more.
            origin.settle(&shared.line())?;
            let mut phase = lock(&shared.phase);
            if *phase != Phase::Here {
                return Ok(false);
            }
            // Written down, then said: whatever happens from here on, the VM is not this host's.
            if let Err(error) = origin.commit() {
                drop(phase);
                return Err(error);
            }
            // The source first: once it has its success it never runs the VM again, whatever becomes of this process. One that does not
            // take it has ended the migration, and may run the VM on.
            if let Err(e) = source.write_all(&SHUT_OK) {
                drop(phase);
                return Err(no_source(&e));
            }
            *phase = Phase::Moved;
            if let Err(e) = shared.line().send(&Message::Commit) {
                log::error!("the link broke when the VM was given away: {e}");
            }
        }
        Message::Done => return Ok(*lock(&shared.phase) == Phase::Moved),
        Message::Abort(why) => return Err(given_up("receiver", &why)),
        _ => {
            return Err(strange("it said what a receiver never says"));
        }
    }
    Ok(false)
}

/// All threads end. A source that was told of its success ends by itself; it is left some time for that.
fn end(shared: &Shared<'_>) {
    if *lock(&shared.phase) == Phase::Moved {
        let step = Duration::from_millis(10);
        let mut left = FAREWELL;
        while !shared.source_ended.load(Ordering::Acquire) && !left.is_zero() {
            std::thread::sleep(step);
            left = left.saturating_sub(step);
        }
    }
    shared.permits.close();
    shared.source.shut();
    shared.link.shut();
}

fn no_source(e: &io::Error) -> Error {
    match e.kind() {
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => source_ended(),
        _ => Error::new(ErrorKind::Io, "migration", format!("the source QEMU's socket broke: {e}")),
    }
}

fn source_ended() -> Error {
    Error::new(ErrorKind::Interrupted, "migration", "the source QEMU has ended it")
}

fn cut(e: &io::Error) -> Error {
    Error::new(ErrorKind::Io, "link", format!("it broke: {e}")).mend("the VM runs on here; migrate it again")
}

fn strange(what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, "receiver", what).mend("look at its log; the VM runs on here")
}

/// What it means that there is no message.
pub fn no_message(e: NoMessage) -> Error {
    match e {
        NoMessage::End => Error::new(ErrorKind::Io, "link", "the other side has closed it"),
        NoMessage::Broken(e) => Error::new(ErrorKind::Io, "link", format!("it broke: {e}")),
        NoMessage::Malformed(Malformed::Broken(what)) => Error::new(ErrorKind::Corrupt, "link", what),
        NoMessage::Malformed(Malformed::Version(version)) => {
            let what = format!("the other side speaks version {version}, this one {}", super::wire::VERSION);
            Error::new(ErrorKind::Unsupported, "link", what).mend("use the same vmar on both hosts")
        }
    }
}
