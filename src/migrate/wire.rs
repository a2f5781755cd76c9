//! The messages between the two sides of a link: pure, every length capped, a version in the first.
//!
//! ```text
//! message    type u8 │ length u32 │ body
//!
//! sender  ▶ HELLO ─────────────────────────────────────────────────────────────── receiver
//!         ◀ WELCOME
//!         ▶ FRAME 0, FRAME 1, …                    ◀ ACK n, RETURN bytes, AGAIN n
//!         ▶ END                                    ◀ READY (the destination has all of it)
//!         ▶ DISK 0, DISK 1, …, SETTLED             ◀ DISK_ACK n, DISK_AGAIN n, SETTLED
//!         ▶ COMMIT (written down before)           ◀ DONE  (the destination runs)
//!           either ABORT, at any time before COMMIT
//! ```
//!
//! A disk that goes with the VM is sent before the first FRAME, again and again while it changes, and what has changed since when the
//! destination is ready; each time with numbers from 0 on. SETTLED says that it is complete, and that it is durable.
//!
//! Integers are little-endian. Strings are UTF-8 with a u16 length.

use super::frame::{FRAME_BYTES_MAX, OPS_BYTES_MAX};
use crate::codec::Cursor;

/// The version that this code speaks, and the only one.
pub const VERSION: u16 = 1;
/// What the first message begins with.
const MAGIC: &[u8; 8] = b"vmar-mig";
/// Bytes of a message's header.
pub const HEADER_BYTES: usize = 5;
/// Bytes of a body, at most: a frame that zstd could not make smaller, and more.
pub const BODY_BYTES_MAX: usize = 2 * (FRAME_BYTES_MAX + OPS_BYTES_MAX);
/// Images that a greeting may name.
const IMAGES_MAX: usize = 65_536;
/// Templates that a greeting may name.
pub const TEMPLATES_MAX: usize = 16;
/// Bytes of a string.
const TEXT_MAX: usize = 1024;

mod kind {
    pub const HELLO: u8 = 1;
    pub const WELCOME: u8 = 2;
    pub const FRAME: u8 = 3;
    pub const ACK: u8 = 4;
    pub const AGAIN: u8 = 5;
    pub const RETURN: u8 = 6;
    pub const END: u8 = 7;
    pub const READY: u8 = 8;
    pub const COMMIT: u8 = 9;
    pub const DONE: u8 = 10;
    pub const ABORT: u8 = 11;
    pub const DISK: u8 = 12;
    pub const DISK_ACK: u8 = 13;
    pub const DISK_AGAIN: u8 = 14;
    pub const SETTLED: u8 = 15;
}

/// A BLAKE3 hash.
pub type Digest = [u8; 32];

/// A disk that goes with the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Bytes.
    pub size: u64,
    /// Content digest of the image that its overlay was made on.
    pub base: Digest,
}

/// What a sender offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hello {
    /// Names this migration: what both sides write down about it has it.
    pub migration: [u8; 16],
    /// Name of the VM.
    pub vm: String,
    /// Content digests of the images that pages may be read from; a page names them by their place here.
    pub images: Vec<Digest>,
    /// Root hash of the memory image that the sender has of the VM's last stay at the receiver.
    pub kept: Option<Digest>,
    /// The sender's templates by their IDs, the one that it would rather use first.
    pub templates: Vec<Digest>,
    /// The disk that goes with the VM, if it does.
    pub disk: Option<Disk>,
}

/// What a receiver has of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Welcome {
    /// For each image of the greeting whether the receiver has it.
    pub images: Vec<bool>,
    /// It has the kept image.
    pub kept: bool,
    /// The first of the templates that it has, by its place in the greeting.
    pub template: Option<u8>,
    /// It takes the disk.
    pub disk: bool,
}

/// A part of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Counts the frames.
    pub number: u64,
    /// Bytes that `ops` has unpacked.
    pub ops_len: u32,
    /// Bytes that `literals` has unpacked.
    pub literals_len: u32,
    /// Of all of the stream as far as this frame, see [`chain`].
    pub digest: Digest,
    /// Operations, zstd.
    pub ops: Vec<u8>,
    /// Literals, zstd.
    pub literals: Vec<u8>,
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// See [`Hello`].
    Hello(Hello),
    /// See [`Welcome`].
    Welcome(Welcome),
    /// See [`Frame`].
    Frame(Frame),
    /// The stream of all frames as far as this one was written to the destination.
    Ack(u64),
    /// A page of this frame is missing here: send it with literals alone. Those after it are waiting.
    Again(u64),
    /// Bytes of the destination's return path.
    Return(Vec<u8>),
    /// The stream is complete.
    End,
    /// The destination has loaded the VM, and does not run it.
    Ready,
    /// From now on the VM belongs to the receiver.
    Commit,
    /// The destination runs.
    Done,
    /// It failed; the VM stays where it is. Why, in a line.
    Abort(String),
    /// Blocks of the disk, as a frame of records of pages.
    Disk(Frame),
    /// The blocks of all such frames as far as this one were written to the overlay.
    DiskAck(u64),
    /// As [`Message::Again`].
    DiskAgain(u64),
    /// The sender's: the disk is complete; the guest has its write cache switched on. The receiver's: it is durable here.
    Settled(bool),
}

/// What was wrong with a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// The other side speaks another version.
    Version(u16),
    /// It is no message.
    Broken(&'static str),
}

/// The digest after a part of the stream that has this hash; the first follows zeros.
pub fn chain(before: &Digest, part: &Digest) -> Digest {
    *blake3::Hasher::new().update(before).update(part).finalize().as_bytes()
}

impl Message {
    /// Appends it.
    pub fn write(&self, out: &mut Vec<u8>) {
        let start = out.len();
        out.push(self.kind());
        out.extend([0; 4]);
        match self {
            Message::Hello(hello) => {
                out.extend(MAGIC);
                out.extend(VERSION.to_le_bytes());
                out.extend(hello.migration);
                write_text(&hello.vm, out);
                write_len(hello.images.len(), out);
                out.extend(hello.images.as_flattened());
                out.push(hello.kept.is_some().into());
                out.extend(hello.kept.unwrap_or_default());
                write_len(hello.templates.len(), out);
                out.extend(hello.templates.as_flattened());
                out.push(hello.disk.is_some().into());
                let disk = hello.disk.unwrap_or(Disk { size: 0, base: [0; 32] });
                out.extend(disk.size.to_le_bytes());
                out.extend(disk.base);
            }
            Message::Welcome(welcome) => {
                out.extend(VERSION.to_le_bytes());
                write_len(welcome.images.len(), out);
                out.extend(welcome.images.iter().chain([&welcome.kept]).map(|has| u8::from(*has)));
                out.push(welcome.template.map_or(0, |place| place.saturating_add(1)));
                out.push(welcome.disk.into());
            }
            Message::Frame(frame) | Message::Disk(frame) => {
                out.reserve(64 + frame.ops.len() + frame.literals.len());
                out.extend(frame.number.to_le_bytes());
                out.extend(frame.ops_len.to_le_bytes());
                out.extend(frame.literals_len.to_le_bytes());
                out.extend(frame.digest);
                write_len(frame.ops.len(), out);
                out.extend(&frame.ops);
                out.extend(&frame.literals);
            }
            Message::Ack(n) | Message::Again(n) | Message::DiskAck(n) | Message::DiskAgain(n) => {
                out.extend(n.to_le_bytes())
            }
            Message::Return(bytes) => out.extend(bytes),
            Message::End | Message::Ready | Message::Commit | Message::Done => {}
            Message::Abort(why) => write_text(why, out),
            Message::Settled(write_cache) => out.push((*write_cache).into()),
        }
        let len = u32::try_from(out.len() - start - HEADER_BYTES).unwrap_or(u32::MAX);
        if let Some(at) = out.get_mut(start + 1..start + HEADER_BYTES) {
            at.copy_from_slice(&len.to_le_bytes());
        }
    }

    /// The type and the length of the body of a message that begins like this.
    ///
    /// # Errors
    /// There is no such type, or it is longer than any message.
    pub fn header(bytes: [u8; HEADER_BYTES]) -> Result<(u8, usize), Malformed> {
        let [kind, len @ ..] = bytes;
        let len = usize::try_from(u32::from_le_bytes(len)).unwrap_or(usize::MAX);
        if !(kind::HELLO..=kind::SETTLED).contains(&kind) {
            return Err(Malformed::Broken(
                "a message of no known type: is the other side vmar, and --tls-* given on both sides or on neither?",
            ));
        }
        if len > BODY_BYTES_MAX {
            return Err(Malformed::Broken("a message longer than any"));
        }
        Ok((kind, len))
    }

    /// The message of this type with this body.
    ///
    /// # Errors
    /// See [`Malformed`].
    pub fn read(kind: u8, body: &[u8]) -> Result<Message, Malformed> {
        let mut c = Cursor::new(body);
        let message = match kind {
            kind::HELLO => {
                if c.array() != Some(*MAGIC) {
                    return Err(Malformed::Broken("the greeting is not vmar's"));
                }
                version(&mut c)?;
                hello(&mut c).map(Message::Hello)
            }
            kind::WELCOME => {
                version(&mut c)?;
                welcome(&mut c).map(Message::Welcome)
            }
            kind::FRAME => frame(&mut c, body.len()).map(Message::Frame),
            kind::ACK => c.u64_le().map(Message::Ack),
            kind::AGAIN => c.u64_le().map(Message::Again),
            kind::RETURN => c.take(body.len()).map(|bytes| Message::Return(bytes.to_vec())),
            kind::END => Some(Message::End),
            kind::READY => Some(Message::Ready),
            kind::COMMIT => Some(Message::Commit),
            kind::DONE => Some(Message::Done),
            kind::ABORT => text(&mut c).map(Message::Abort),
            kind::DISK => frame(&mut c, body.len()).map(Message::Disk),
            kind::DISK_ACK => c.u64_le().map(Message::DiskAck),
            kind::DISK_AGAIN => c.u64_le().map(Message::DiskAgain),
            kind::SETTLED => flag(&mut c).map(Message::Settled),
            _ => None,
        };
        match message {
            Some(message) if c.position() == body.len() => Ok(message),
            Some(_) => Err(Malformed::Broken("a message has more than belongs to it")),
            None => Err(Malformed::Broken("a message is cut off, or has what it may not have")),
        }
    }

    fn kind(&self) -> u8 {
        match self {
            Message::Hello(_) => kind::HELLO,
            Message::Welcome(_) => kind::WELCOME,
            Message::Frame(_) => kind::FRAME,
            Message::Ack(_) => kind::ACK,
            Message::Again(_) => kind::AGAIN,
            Message::Return(_) => kind::RETURN,
            Message::End => kind::END,
            Message::Ready => kind::READY,
            Message::Commit => kind::COMMIT,
            Message::Done => kind::DONE,
            Message::Abort(_) => kind::ABORT,
            Message::Disk(_) => kind::DISK,
            Message::DiskAck(_) => kind::DISK_ACK,
            Message::DiskAgain(_) => kind::DISK_AGAIN,
            Message::Settled(_) => kind::SETTLED,
        }
    }
}

fn version(c: &mut Cursor<'_>) -> Result<(), Malformed> {
    match c.array().map(u16::from_le_bytes) {
        Some(VERSION) => Ok(()),
        Some(other) => Err(Malformed::Version(other)),
        None => Err(Malformed::Broken("the greeting is cut off")),
    }
}

fn hello(c: &mut Cursor<'_>) -> Option<Hello> {
    let (migration, vm) = (c.array()?, text(c)?);
    let images = digests(c, IMAGES_MAX)?;
    let (there, root) = (flag(c)?, c.array()?);
    let kept = there.then_some(root);
    let templates = digests(c, TEMPLATES_MAX)?;
    let (there, disk) = (flag(c)?, Disk { size: c.u64_le()?, base: c.array()? });
    Some(Hello { migration, vm, images, kept, templates, disk: there.then_some(disk) })
}

fn digests(c: &mut Cursor<'_>, most: usize) -> Option<Vec<Digest>> {
    let count = len(c).filter(|n| *n <= most)?;
    (0..count).map(|_| c.array()).collect()
}

fn welcome(c: &mut Cursor<'_>) -> Option<Welcome> {
    let count = len(c).filter(|n| *n <= IMAGES_MAX)?;
    let images = (0..count).map(|_| flag(c)).collect::<Option<_>>()?;
    let (kept, [template]) = (flag(c)?, c.array()?);
    // 0 is none.
    Some(Welcome { images, kept, template: template.checked_sub(1), disk: flag(c)? })
}

fn frame(c: &mut Cursor<'_>, body: usize) -> Option<Frame> {
    let (number, ops_len, literals_len, digest) = (c.u64_le()?, c.u32_le()?, c.u32_le()?, c.array()?);
    let fits = |len: u32, most: usize| usize::try_from(len).is_ok_and(|len| len <= most);
    if !fits(ops_len, OPS_BYTES_MAX) || !fits(literals_len, FRAME_BYTES_MAX) {
        return None;
    }
    let ops = len(c)?;
    let ops = c.take(ops)?.to_vec();
    let literals = c.take(body - c.position())?.to_vec();
    Some(Frame { number, ops_len, literals_len, digest, ops, literals })
}

fn flag(c: &mut Cursor<'_>) -> Option<bool> {
    match c.array()? {
        [0u8] => Some(false),
        [1] => Some(true),
        _ => None,
    }
}

fn len(c: &mut Cursor<'_>) -> Option<usize> {
    usize::try_from(c.u32_le()?).ok()
}

fn write_len(len: usize, out: &mut Vec<u8>) {
    out.extend(u32::try_from(len).unwrap_or(u32::MAX).to_le_bytes());
}

fn text(c: &mut Cursor<'_>) -> Option<String> {
    let len = usize::from(u16::from_le_bytes(c.array()?));
    if len > TEXT_MAX {
        return None;
    }
    String::from_utf8(c.take(len)?.to_vec()).ok()
}

/// As much of it as a message may have.
fn write_text(text: &str, out: &mut Vec<u8>) {
    let end = (0..=text.len().min(TEXT_MAX)).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    let text = text.get(..end).unwrap_or_default();
    out.extend(u16::try_from(text.len()).unwrap_or_default().to_le_bytes());
    out.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn messages() -> Vec<Message> {
        let hello = Hello {
            migration: [7; 16],
            vm: "wéb".into(),
            images: vec![[1; 32], [2; 32]],
            kept: Some([3; 32]),
            templates: vec![[5; 32]],
            disk: Some(Disk { size: 1 << 30, base: [6; 32] }),
        };
        let frame = Frame {
            number: 9,
            ops_len: 30,
            literals_len: 8192,
            digest: [4; 32],
            ops: vec![1; 20],
            literals: vec![2; 99],
        };
        vec![
            Message::Hello(hello),
            Message::Hello(Hello::default()),
            Message::Welcome(Welcome { images: vec![true, false], kept: true, template: Some(1), disk: true }),
            Message::Frame(frame.clone()),
            Message::Disk(frame),
            Message::DiskAck(1),
            Message::DiskAgain(2),
            Message::Settled(true),
            Message::Ack(u64::MAX),
            Message::Again(3),
            Message::Return(vec![0, 1, 0, 4]),
            Message::End,
            Message::Ready,
            Message::Commit,
            Message::Done,
            Message::Abort("no room".into()),
        ]
    }

    fn bytes(message: &Message) -> (u8, Vec<u8>) {
        let mut out = vec![1, 2, 3];
        message.write(&mut out);
        let (kind, len) = Message::header(out[3..3 + HEADER_BYTES].try_into().unwrap()).unwrap();
        assert_eq!(out.len(), 3 + HEADER_BYTES + len);
        (kind, out[3 + HEADER_BYTES..].to_vec())
    }

    #[test]
    fn there_and_back() {
        for message in messages() {
            let (kind, body) = bytes(&message);
            assert_eq!(Message::read(kind, &body), Ok(message));
        }
    }

    #[test]
    fn what_is_cut_or_longer_is_refused() {
        // A frame's literals and the bytes of a return path end with the message.
        let whole = |m: &Message| !matches!(m, Message::Frame(_) | Message::Disk(_) | Message::Return(_));
        for message in messages().iter().filter(|m| whole(m)) {
            let (kind, body) = bytes(message);
            for len in 0..body.len() {
                assert!(Message::read(kind, &body[..len]).is_err(), "{message:?}, {len}");
            }
            assert!(Message::read(kind, &[&body[..], &[0]].concat()).is_err(), "{message:?}");
        }
    }

    #[test]
    fn another_version_is_named() {
        let (kind, mut body) = bytes(&Message::Hello(Hello::default()));
        body[8..10].copy_from_slice(&7u16.to_le_bytes());
        assert_eq!(Message::read(kind, &body), Err(Malformed::Version(7)));
        body[0] = b'X';
        assert!(matches!(Message::read(kind, &body), Err(Malformed::Broken(why)) if why.contains("not vmar's")));
    }

    #[test]
    fn a_stranger_is_noticed_by_the_first_bytes() {
        assert!(Message::header(*b"HTTP/").is_err());
        assert!(Message::header([1, 255, 255, 255, 255]).is_err());
    }

    #[test]
    fn a_long_reason_is_cut_at_a_letter() {
        let (kind, body) = bytes(&Message::Abort("é".repeat(2000)));
        assert_eq!(Message::read(kind, &body), Ok(Message::Abort("é".repeat(512))));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn whatever_comes_is_read_or_refused(kind in 0u8..17, body in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = Message::read(kind, &body) {
                let (kind_again, again) = bytes(&message);
                prop_assert_eq!((kind_again, again), (kind, body));
            }
        }

        #[test]
        fn lengths_that_lie_are_refused(message in 0usize..16, at in any::<prop::sample::Index>(), byte: u8) {
            let (kind, mut body) = bytes(&messages()[message]);
            if !body.is_empty() {
                let at = at.index(body.len());
                body[at] = byte;
                let _ = Message::read(kind, &body);
            }
        }
    }
}
