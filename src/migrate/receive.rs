//! The receiver's side: from the link to QEMU, and back.
//!
//! Every frame is made whole in memory and compared with its digest before the destination gets a byte of it. One that could not
//! be made, for a page that this side was believed to have, is asked for again; those that came meanwhile wait.
//!
//! The destination's QEMU was started with `-S`, so it loads the VM and does not run it. It tells its success (SHUT) on the return
//! path; that is held back here, and the sender is told that this side is ready. Only the sender's COMMIT makes the VM this
//! side's. If the link is cut between the two, nobody here can know whether it was said: the VM runs at neither side, and whoever
//! looks decides by what the source runs, and by what the sender has written down ([`Outcome::Doubt`]).

use super::disk::Arrival;
use super::frame::Pages;
use super::join::{Joiner, strange};
use super::known::Received;
use super::link::{self, NoMessage, Socket, given_up};
use super::record::Coming;
use super::send::{SHUT_OK, no_message};
use super::wire::{Frame, Hello, Message, Welcome};
use crate::error::{Error, ErrorKind, Result};
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Frames that may wait for one that comes again, and their bytes: more than a sender has under way.
const WAITING_MAX: usize = 1024;
const WAITING_BYTES_MAX: usize = 256 << 20;
/// Types of the return path's messages.
const RP_SHUT: u16 = 1;
/// The highest that QEMU 10 knows.
const RP_LAST: u16 = 16;

/// What became of a VM that was to come.
#[derive(Debug)]
pub enum Outcome {
    /// It is here, and was started.
    Here,
    /// It is here, and could not be started.
    Stopped(Error),
    /// It is here or at the sender, and runs at neither.
    Doubt(Error),
    /// It is at the sender.
    There(Error),
}

/// Waits for a sender's greeting.
///
/// # Errors
/// It is none.
pub fn greeted(link: &Socket) -> Result<Hello> {
    link.watch().map_err(|e| no_message(NoMessage::Broken(e)))?;
    match link::receive(link).map_err(no_message)? {
        Message::Hello(hello) => Ok(hello),
        _ => Err(strange("it did not greet")),
    }
}

/// Answers it.
///
/// # Errors
/// The link broke.
pub fn welcome(link: &Socket, welcome: Welcome) -> Result<()> {
    link::send(link, &Message::Welcome(welcome)).map_err(|e| no_message(NoMessage::Broken(e)))
}

/// Tells a sender, whose VM it still is, why that is not taken.
pub fn refuse(link: &Socket, why: &Error) {
    // It may have gone; then it knows.
    let _ = link::send(link, &Message::Abort(why.to_string()));
}

/// The host that a VM comes to.
pub trait Host: Sync {
    /// Its QEMU says that it has loaded the VM. An error if it already runs it: nobody has given it away.
    ///
    /// # Errors
    /// It must not have the VM.
    fn loaded(&self) -> Result<()>;
    /// Writes down, durably, that the VM is this host's.
    ///
    /// # Errors
    /// It cannot be written down.
    fn commit(&self) -> Result<()>;
    /// Runs the VM.
    ///
    /// # Errors
    /// It does not run.
    fn start(&self) -> Result<()>;
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The stream comes.
    Loading,
    /// The destination has loaded the VM, and the sender is told.
    Ready,
    /// It failed while the VM was the sender's.
    Failed,
    /// The VM is this side's.
    Here,
}

struct Shared<'a> {
    destination: &'a Socket,
    link: &'a Socket,
    writing: Mutex<()>,
    phase: Mutex<Phase>,
    error: Mutex<Option<Error>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared<'_> {
    fn send(&self, message: &Message) -> Result<()> {
        let _whole = lock(&self.writing);
        link::send(self.link, message).map_err(|e| no_message(NoMessage::Broken(e)))
    }

    /// The same for who reads the link: a sender that has closed it may have said why before.
    fn answer(&self, message: &Message) -> Result<()> {
        let sent = {
            let _whole = lock(&self.writing);
            link::send(self.link, message)
        };
        let Err(e) = sent else { return Ok(()) };
        if let Some(why) = link::last_word(self.link, &e) {
            return Err(given_up("sender", &why));
        }
        Err(no_message(NoMessage::Broken(e)))
    }

    /// Ends it. The sender hears why, unless this side was ready: then only the sender may say what becomes of the VM, and it
    /// has not.
    fn fail(&self, error: Error) {
        let mut phase = lock(&self.phase);
        if *phase == Phase::Loading {
            *phase = Phase::Failed;
            let _ = self.send(&Message::Abort(error.to_string()));
        }
        if *phase != Phase::Here {
            lock(&self.error).get_or_insert(error);
            self.destination.shut();
            self.link.shut();
        }
    }
}

/// Receives a VM into the destination's QEMU, with what this side has. `coming`, if given, sees what the destination gets; `disk` is the
/// disk that comes with the VM, if one does.
pub fn run<P: Pages + Clone>(
    destination: &Socket,
    link: &Socket,
    pages: Received<impl Pages>,
    coming: Option<&mut Coming>,
    disk: Option<Arrival<'_, P>>,
    host: &impl Host,
) -> Outcome {
    let shared = Shared {
        destination,
        link,
        writing: Mutex::default(),
        phase: Mutex::new(Phase::Loading),
        error: Mutex::default(),
    };
    let mut disk = disk;
    std::thread::scope(|scope| {
        let (shared, disk) = (&shared, disk.as_mut());
        scope.spawn(move || {
            if let Err(error) = return_path(shared, host) {
                shared.fail(error);
            }
        });
        if let Err(error) = frames(shared, pages, coming, disk) {
            shared.fail(error);
        }
    });
    let error = shared.error.into_inner().unwrap_or_else(PoisonError::into_inner);
    let error = || error.unwrap_or_else(|| no_message(NoMessage::End));
    match shared.phase.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Phase::Here => {}
        // A sender gives nothing away before it hears that the disk is complete.
        Phase::Ready if disk.is_some_and(|disk| !disk.is_settled()) => return Outcome::There(error()),
        Phase::Ready => return Outcome::Doubt(error()),
        Phase::Loading | Phase::Failed => return Outcome::There(error()),
    }
    let started = host.commit().and_then(|()| host.start());
    let done = started.as_ref().map_or_else(|e| Message::Abort(e.to_string()), |()| Message::Done);
    // The VM is here, whether the sender hears of it or not.
    let _ = link::send(link, &done);
    link.shut();
    match started {
        Ok(()) => Outcome::Here,
        Err(error) => Outcome::Stopped(error),
    }
}

/// The frames of the link, until COMMIT.
fn frames<P: Pages + Clone>(
    shared: &Shared<'_>,
    pages: Received<impl Pages>,
    mut coming: Option<&mut Coming>,
    mut disk: Option<&mut Arrival<'_, P>>,
) -> Result<()> {
    let mut joiner = Joiner::new(pages);
    let (mut again, mut waiting) = (None, VecDeque::new());
    loop {
        let message = link::receive(shared.link).map_err(no_message)?;
        match message {
            Message::Frame(frame) => {
                if again.is_some_and(|number| number != frame.number) {
                    let bytes: usize = waiting.iter().map(|f: &Frame| f.ops.len() + f.literals.len()).sum();
                    if waiting.len() >= WAITING_MAX || bytes > WAITING_BYTES_MAX {
                        return Err(strange("it goes on although it was asked for a frame again"));
                    }
                    waiting.push_back(frame);
                    continue;
                }
                let mut next = Some(frame);
                while let Some(frame) = next {
                    let number = frame.number;
                    if joiner.join(&frame)? {
                        again = None;
                        let mut destination = shared.destination;
                        destination.write_all(joiner.out()).map_err(|e| gone(&e))?;
                        shared.answer(&Message::Ack(number))?;
                        if let Some(coming) = &mut coming {
                            coming.bytes(joiner.out());
                        }
                        next = waiting.pop_front();
                    } else if again == Some(number) {
                        return Err(strange("a frame is wrong, and as wrong when it came again"));
                    } else {
                        again = Some(number);
                        shared.answer(&Message::Again(number))?;
                        next = None;
                    }
                }
            }
            Message::Commit => {
                let mut phase = lock(&shared.phase);
                if *phase != Phase::Ready || disk.as_ref().is_some_and(|disk| !disk.is_settled()) {
                    return Err(strange("it gave the VM away before this side was ready"));
                }
                *phase = Phase::Here;
                return Ok(());
            }
            Message::Abort(why) => {
                // Said before it committed: the VM is there.
                let mut phase = lock(&shared.phase);
                *phase = Phase::Failed;
                return Err(given_up("sender", &why));
            }
            Message::Disk(frame) => {
                let disk = disk.as_mut().ok_or_else(|| strange("it sends a disk that this side does not take"))?;
                if let Some(answer) = disk.frame(&frame).inspect_err(|e| refuse(shared.link, e))? {
                    shared.answer(&answer)?;
                }
            }
            Message::Settled(write_cache) => {
                let disk = disk.as_mut().ok_or_else(|| strange("it sends a disk that this side does not take"))?;
                if *lock(&shared.phase) != Phase::Ready {
                    return Err(strange("the disk is complete before the VM is"));
                }
                disk.settle(write_cache).inspect_err(|e| refuse(shared.link, e))?;
                shared.send(&Message::Settled(write_cache))?;
            }
            _ => return Err(strange("it said what a sender never says")),
        }
    }
}

/// The destination's answers to the source; its success is held back.
fn return_path(shared: &Shared<'_>, host: &impl Host) -> Result<()> {
    let mut destination = shared.destination;
    loop {
        let mut message = vec![0; 4];
        destination.read_exact(&mut message).map_err(|e| gone(&e))?;
        let field = |at: usize| message.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u16::from_be_bytes(*b));
        let (kind, len) = (field(0), field(2));
        if kind > RP_LAST {
            return Err(Error::new(ErrorKind::Unsupported, "destination QEMU", "its return path is not understood"));
        }
        message.resize(4 + usize::from(len), 0);
        destination.read_exact(message.get_mut(4..).unwrap_or_default()).map_err(|e| gone(&e))?;
        if kind != RP_SHUT {
            shared.send(&Message::Return(message))?;
            continue;
        }
        if message != SHUT_OK {
            return Err(Error::new(ErrorKind::Io, "destination QEMU", "it could not load the VM")
                .mend("look at its standard error; the VM runs on at the source"));
        }
        host.loaded()?;
        let mut phase = lock(&shared.phase);
        if *phase == Phase::Loading {
            *phase = Phase::Ready;
            // If it is not heard, the link's end is.
            let _ = shared.send(&Message::Ready);
        }
        return Ok(());
    }
}

fn gone(e: &io::Error) -> Error {
    Error::new(ErrorKind::Io, "destination QEMU", format!("its socket broke: {e}"))
        .mend("look at its standard error; the VM runs on at the source")
}
