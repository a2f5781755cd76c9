//! vhost-user messages in any order, with any bodies and descriptors, between handshakes that make sense.

use super::frontend::*;
use super::rng::Rng;
use super::server::{Disk, QUEUES, Server};
use super::{Fuzz, Outcome, Seen, Setup};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create, open};
use serde::{Deserialize, Serialize};
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A descriptor to send along.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum Fd {
    Eventfd,
    /// An eventfd that blocks and is full.
    FullEventfd,
    /// Guest memory 0 or 1 of the connection.
    Ram,
    Data,
    /// A memfd of so many bytes, filled with one byte.
    Memfd {
        size: u64,
        fill: u8,
    },
    /// A memfd of random bytes.
    Garbage {
        size: u64,
        seed: u64,
    },
    ReadOnlyFile,
    Directory,
    Null,
    Zero,
    PipeRead,
    PipeWrite,
    /// The read end of a pipe whose other end is closed.
    DeadPipe,
    Socket,
    Listener,
    Epoll,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Step {
    /// A message. `claims`: the size in its header, if not the body's.
    Send {
        request: u32,
        flags: u32,
        #[serde(with = "super::hex")]
        body: Vec<u8>,
        claims: Option<u32>,
        fds: Vec<Fd>,
    },
    /// Bytes that are no message.
    Raw {
        #[serde(with = "super::hex")]
        bytes: Vec<u8>,
    },
    /// The messages that begin a connection.
    Handshake {
        features: u64,
    },
    /// The messages that start a ring.
    Start {
        ring: u8,
        size: u16,
    },
    /// A read on a ring that was started that way.
    Read {
        ring: u8,
    },
    Stop {
        ring: u8,
    },
    /// Keeps an inflight region: what GET_INFLIGHT_FD gave goes back with SET_INFLIGHT_FD, changed at some places.
    Inflight {
        queues: u16,
        size: u16,
        changes: Vec<(u32, u64)>,
    },
    /// Shares memory that is short, overlaps, or lies where nothing may.
    Memory {
        add: bool,
        regions: Vec<[u64; 4]>,
        fds: Vec<Fd>,
    },
    /// The log of dirty pages.
    Log {
        size: u64,
        offset: u64,
        fd: Fd,
        on: bool,
    },
    Reconnect,
    /// Another connection, which waits until this one has ended.
    Queue,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    steps: Vec<Step>,
}

pub struct Messages {
    setup: Setup,
    server: Option<Server>,
}

const GET_INFLIGHT_FD: u32 = 31;
const SET_INFLIGHT_FD: u32 = 32;
const SET_LOG_BASE: u32 = 6;
const SET_LOG_FD: u32 = 7;
/// Requests that a frontend may send; the rest are random numbers.
const REQUESTS_MAX: u64 = 48;
/// F_LOG_ALL, and the protocol features of a log, of inflight regions and of messages from the backend.
const LOG_ALL: u64 = 1 << 26;
const MORE_PROTOCOL: u64 = 1 << 1 | 1 << 12 | 1 << 5;

/// How long an answer may take: generous, the machine may have much else to do.
const PATIENCE: Duration = Duration::from_secs(30);

fn memfd(size: u64, bytes: &[u8]) -> OwnedFd {
    let fd = memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, size.min(1 << 40)).unwrap();
    if !bytes.is_empty() {
        rustix::io::pwrite(&fd, bytes, 0).unwrap();
    }
    fd
}

impl Fd {
    fn open(self, c: &Connection) -> OwnedFd {
        let file = |path: &str, flags| open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
        match self {
            Fd::Eventfd => eventfd(0, EventfdFlags::CLOEXEC).unwrap(),
            Fd::FullEventfd => {
                let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
                rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
                fd
            }
            Fd::Ram => c.f.ram.fd.try_clone().unwrap(),
            Fd::Data => c.f.data.fd.try_clone().unwrap(),
            Fd::Memfd { size, fill } => memfd(size, &vec![fill; size.min(1 << 20) as usize]),
            Fd::Garbage { size, seed } => memfd(size, &Rng::new(seed).bytes(size.min(1 << 16) as usize)),
            Fd::ReadOnlyFile => file("/proc/self/exe", OFlags::RDONLY),
            Fd::Directory => file("/", OFlags::RDONLY),
            Fd::Null => file("/dev/null", OFlags::RDWR),
            Fd::Zero => file("/dev/zero", OFlags::RDWR),
            Fd::PipeRead => {
                // The other end stays open as long as the connection.
                let (read, write) = rustix::pipe::pipe().unwrap();
                c.kept.borrow_mut().push(write);
                read
            }
            Fd::PipeWrite => {
                let (read, write) = rustix::pipe::pipe().unwrap();
                c.kept.borrow_mut().push(read);
                write
            }
            Fd::DeadPipe => rustix::pipe::pipe().unwrap().0,
            Fd::Socket => {
                let (a, b) = UnixStream::pair().unwrap();
                c.kept.borrow_mut().push(b.into());
                a.into()
            }
            Fd::Listener => {
                use rustix::net::{AddressFamily, SocketType, listen, socket};
                let fd = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
                let _ = listen(&fd, 1);
                fd
            }
            Fd::Epoll => rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap(),
        }
    }
}

fn fd(rng: &mut Rng) -> Fd {
    let size = match rng.below(6) {
        0 => 0,
        1 => rng.below(5000),
        2 => 4096,
        3 => 1 << 20,
        4 => (1 << 20) - 1,
        _ => rng.edge() % (1 << 40),
    };
    match rng.below(20) {
        0..=3 => Fd::Eventfd,
        4 => Fd::FullEventfd,
        5 | 6 => Fd::Ram,
        7 => Fd::Data,
        8 | 9 => Fd::Memfd { size, fill: rng.next() as u8 },
        10 | 11 => Fd::Garbage { size, seed: rng.next() },
        _ => rng.one_of(&[
            Fd::ReadOnlyFile,
            Fd::Directory,
            Fd::Null,
            Fd::Zero,
            Fd::PipeRead,
            Fd::PipeWrite,
            Fd::DeadPipe,
            Fd::Socket,
            Fd::Listener,
            Fd::Epoll,
        ]),
    }
}

fn fds(rng: &mut Rng) -> Vec<Fd> {
    let count = rng.one_of(&[0, 0, 0, 1, 1, 1, 2, 3, 8, 9, 32, 33]);
    (0..count).map(|_| fd(rng)).collect()
}

/// An address near something that is there.
fn near(rng: &mut Rng) -> u64 {
    match rng.below(6) {
        0 => rng.edge(),
        1 => USER + RAM + rng.below(RAM_SIZE),
        2 => USER + DATA + DATA_SIZE - rng.below(5000),
        3 => USER + RAM + rng.below(16) * 4096,
        4 => RAM + rng.below(RAM_SIZE),
        _ => USER + DATA + rng.below(64) * 4096,
    }
}

/// The body of a message, nearly right for its number.
fn body(rng: &mut Rng, request: u32) -> Vec<u8> {
    let index = if rng.chance(4, 5) { rng.below(u64::from(QUEUES) + 1) } else { rng.edge() };
    let words = |words: &[u64]| -> Vec<u8> { words.iter().flat_map(|w| w.to_le_bytes()).collect() };
    match request {
        _ if rng.chance(1, 12) => {
            let len = rng.below(200) as usize;
            rng.bytes(len)
        }
        8 | 10 | 11 | 18 => {
            let value = if rng.chance(1, 2) { rng.below(2000) } else { rng.edge() };
            Frontend::body32(index as u32, value as u32)
        }
        9 => {
            // Flags stand beside the index: bit 0 is the log.
            let flags = rng.below(4) << 32;
            words(&[index & 0xffff_ffff | flags, near(rng), near(rng), near(rng), near(rng)])
        }
        12..=14 => words(&[index & 0xff | if rng.chance(1, 6) { 0x100 } else { 0 }]),
        2 => words(&[if rng.chance(1, 2) { FEATURES | rng.below(1 << 30) } else { FEATURES ^ 1 << rng.below(64) }]),
        16 => words(&[if rng.chance(1, 2) { PROTOCOL | MORE_PROTOCOL } else { rng.next() & rng.next() }]),
        5 => {
            let count = rng.one_of(&[0u64, 1, 2, 2, 8, 9, 32, u64::MAX]);
            let mut out = words(&[count]);
            for _ in 0..count.min(9) {
                out.extend(words(&region(rng)));
            }
            out
        }
        37 | 38 => [words(&[0]), words(&region(rng))].concat(),
        6 => words(&[rng.edge(), rng.edge()]),
        31 | 32 => {
            let queues = if rng.chance(1, 2) { rng.below(6) } else { rng.edge() };
            let size = if rng.chance(1, 2) { rng.below(2000) } else { rng.edge() };
            [
                words(&[rng.edge(), rng.edge()]),
                (queues as u16).to_le_bytes().to_vec(),
                (size as u16).to_le_bytes().to_vec(),
            ]
            .concat()
        }
        _ => {
            let len = rng.one_of(&[0, 0, 8, 8, 16, 20, 40]);
            rng.bytes(len)
        }
    }
}

/// Guest address, size, address in the frontend, offset in the file.
fn region(rng: &mut Rng) -> [u64; 4] {
    let mut words = match rng.below(3) {
        0 => [RAM, RAM_SIZE, USER + RAM, 0],
        1 => [DATA, DATA_SIZE, USER + DATA, 0],
        _ => [0x8000_0000 + rng.below(64) * 4096, 4096 << rng.below(8), near(rng), 0],
    };
    if rng.chance(1, 3) {
        words[rng.index(4)] = if rng.chance(1, 2) { rng.edge() } else { rng.below(16) * 4096 };
    }
    words
}

fn step(rng: &mut Rng) -> Step {
    let ring = rng.below(u64::from(QUEUES) + 1) as u8;
    match rng.below(40) {
        0..=4 => {
            Step::Handshake { features: [FEATURES, FEATURES | F_EVENT_IDX, FEATURES | LOG_ALL, 1 << 32][rng.index(4)] }
        }
        5..=8 => Step::Start { ring, size: rng.one_of(&[16, 16, 64, 1024, 1, 2, 3, 0, 2048]) },
        9..=11 => Step::Read { ring },
        12 => Step::Stop { ring },
        13 | 14 => {
            let changes = (0..rng.below(6)).map(|_| (rng.below(4096) as u32, rng.edge())).collect();
            Step::Inflight { queues: rng.below(6) as u16, size: rng.one_of(&[16, 64, 1024, 0, 3, 65535]), changes }
        }
        15 | 16 => {
            let count = 1 + rng.below(3);
            Step::Memory {
                add: rng.chance(1, 2),
                regions: (0..count).map(|_| region(rng)).collect(),
                fds: (0..count)
                    .map(|_| if rng.chance(2, 3) { rng.one_of(&[Fd::Ram, Fd::Data]) } else { fd(rng) })
                    .collect(),
            }
        }
        17 | 18 => {
            let (size, offset) = (rng.one_of(&[0, 1, 4096, 131_072, 1 << 20]), rng.one_of(&[0, 0, 0, 1, 4096]));
            let fd = if rng.chance(2, 3) { Fd::Memfd { size: size + offset, fill: 0 } } else { fd(rng) };
            Step::Log { size: if rng.chance(1, 6) { rng.edge() } else { size }, offset, fd, on: rng.chance(3, 4) }
        }
        19 => Step::Reconnect,
        20 => Step::Queue,
        21 => {
            let len = rng.below(64) as usize;
            Step::Raw { bytes: rng.bytes(len) }
        }
        _ => {
            let request = if rng.chance(1, 20) { rng.edge() as u32 } else { rng.below(REQUESTS_MAX) as u32 };
            let flags = match rng.below(12) {
                0 => rng.edge() as u32,
                1 => rng.below(16) as u32,
                2..=4 => VERSION,
                _ => VERSION | NEED_REPLY,
            };
            let claims = rng.chance(1, 25).then(|| rng.edge() as u32);
            // Most messages that want a descriptor get one.
            let fds = match request {
                12..=14 if rng.chance(3, 4) => vec![if rng.chance(2, 3) { Fd::Eventfd } else { fd(rng) }],
                37 if rng.chance(3, 4) => vec![fd(rng)],
                5 if rng.chance(1, 2) => vec![Fd::Ram, Fd::Data],
                _ if rng.chance(1, 2) => vec![],
                _ => fds(rng),
            };
            Step::Send { request, flags, body: body(rng, request), claims, fds }
        }
    }
}

/// A connection of this target: a frontend that takes no for an answer.
struct Connection {
    f: Frontend,
    kept: std::cell::RefCell<Vec<OwnedFd>>,
    started: Vec<usize>,
}

impl Connection {
    fn new(server: &Server) -> Connection {
        let stream = UnixStream::connect(&server.socket).unwrap();
        let f = Frontend {
            stream,
            ram: Region::new(RAM, RAM_SIZE),
            data: Region::new(DATA, DATA_SIZE),
            rings: vec![],
            event_idx: false,
        };
        Connection { f, kept: Default::default(), started: vec![] }
    }

    /// Sends a message; `claims` is the size in its header. An error: the server has hung up, or takes nothing more.
    fn send(&mut self, request: u32, flags: u32, body: &[u8], claims: Option<u32>, fds: &[Fd]) -> std::io::Result<()> {
        let open: Vec<OwnedFd> = fds.iter().map(|fd| fd.open(self)).collect();
        let borrowed: Vec<_> = open.iter().map(|fd| fd.as_fd()).collect();
        let size = claims.unwrap_or(body.len() as u32);
        let header: Vec<u8> = [request, flags, size].iter().flat_map(|w| w.to_le_bytes()).collect();
        self.f.send_raw(&[header, body.to_vec()].concat(), &borrowed)
    }

    /// The next answer: request, body; none if the server hangs up.
    ///
    /// # Panics
    /// If it does neither: then it hangs.
    fn answer(&mut self) -> Option<(u32, Vec<u8>)> {
        self.f.stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut read = |len: usize| -> Option<Vec<u8>> {
            let mut bytes = vec![0; len];
            match self.f.stream.read_exact(&mut bytes) {
                Ok(()) => Some(bytes),
                Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => panic!("no answer in {PATIENCE:?}"),
                Err(_) => None,
            }
        };
        let header = read(12)?;
        let size = u32::from_le_bytes(header[8..].try_into().unwrap());
        let body = read(size.min(8192) as usize)?;
        Some((u32::from_le_bytes(header[..4].try_into().unwrap()), body))
    }

    /// What it answers to everything so far: it is asked a question more, whose answer comes last. `None`: it hung up.
    fn answers(&mut self, questions: usize) -> Option<Vec<(u32, Vec<u8>)>> {
        self.send(GET_FEATURES, VERSION, &[], None, &[]).ok()?;
        let (mut out, mut left) = (Vec::new(), questions + 1);
        loop {
            let answer = self.answer()?;
            left -= usize::from(answer.0 == GET_FEATURES);
            if left == 0 {
                return Some(out);
            }
            out.push(answer);
        }
    }

    /// Sends a message that wants an acknowledgement; true if it was one of success.
    fn ask(&mut self, request: u32, body: &[u8], fds: &[Fd]) -> bool {
        self.send(request, VERSION | NEED_REPLY, body, None, fds).is_ok() && self.acknowledged()
    }

    fn acknowledged(&mut self) -> bool {
        self.answers(0).is_some_and(|all| all.first().is_some_and(|(_, body)| body == &[0; 8]))
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    fn handshake(&mut self, features: u64) -> bool {
        let more = self.get(GET_PROTOCOL_FEATURES).unwrap_or(0) & MORE_PROTOCOL;
        let offered = self.get(GET_FEATURES).unwrap_or(0);
        self.f.event_idx = features & F_EVENT_IDX != 0;
        let mut table = Self::words(&[2]);
        table.extend(Self::words(&self.f.ram.words()));
        table.extend(Self::words(&self.f.data.words()));
        self.ask(SET_PROTOCOL_FEATURES, &Self::words(&[PROTOCOL | more]), &[])
            && self.ask(SET_OWNER, &[], &[])
            && self.ask(SET_FEATURES, &Self::words(&[features & offered]), &[])
            && self.ask(SET_MEM_TABLE, &table, &[Fd::Ram, Fd::Data])
    }

    fn get(&mut self, request: u32) -> Option<u64> {
        self.send(request, VERSION, &[], None, &[]).ok()?;
        let (_, body) = self.answer()?;
        Some(u64::from_le_bytes(body.try_into().ok()?))
    }

    fn start(&mut self, ring: u8, size: u16) -> bool {
        let (index, q) = (u32::from(ring), usize::from(ring));
        while self.f.rings.len() <= q {
            self.f.add_ring(self.f.rings.len() as u32, 16);
        }
        self.f.rings[q].size = size;
        let r = &self.f.rings[q];
        let (desc, used, avail) = (r.desc(), r.used_ring(), r.avail_ring());
        self.f.put(desc, &[0; 0xF000]);
        (self.f.rings[q].avail, self.f.rings[q].seen) = (0, 0);
        let (kick, call) = (&self.f.rings[q].kick, &self.f.rings[q].call);
        let (kick, call) = (kick.try_clone().unwrap(), call.try_clone().unwrap());
        let word = u64::from(index);
        let well = self.ask(SET_VRING_NUM, &Frontend::body32(index, size.into()), &[])
            && self.ask(SET_VRING_BASE, &Frontend::body32(index, 0), &[])
            && self.ask(SET_VRING_ADDR, &Self::words(&[word, USER + desc, USER + used, USER + avail, 0]), &[])
            && [(SET_VRING_KICK, kick), (SET_VRING_CALL, call)].into_iter().all(|(request, fd)| {
                let sent = self.f.try_send(request, VERSION | NEED_REPLY, &word.to_le_bytes(), &[fd.as_fd()]);
                sent.is_ok() && self.acknowledged()
            })
            && self.ask(SET_VRING_ENABLE, &Frontend::body32(index, 1), &[]);
        self.started.retain(|s| *s != q);
        if well {
            self.started.push(q);
        }
        well
    }

    /// A read on a ring. Other messages may have stopped it, so nothing is promised; but what comes back has to be right.
    fn read(&mut self, q: usize, content: &[u8]) -> Result<(), String> {
        if !self.started.contains(&q) || self.f.rings[q].size < 4 {
            return Ok(());
        }
        let (header, status, data) = (HEADERS, STATUSES, DATA + 0x10_0000);
        self.f.header(header, 0, 8);
        self.f.put(status, &[0xEE]);
        let table = self.f.rings[q].desc();
        self.f.table(table, 0, &Frontend::chain(0, &[r(header, 16), w(data, 512), w(status, 1)]));
        self.f.offer(q, &[0]);
        self.f.kick(q);
        let end = Instant::now() + Duration::from_millis(20);
        while self.f.used_idx(q) == self.f.rings[q].seen && Instant::now() < end {
            std::thread::sleep(Duration::from_micros(200));
        }
        let got = self.f.take(q);
        let right = self.f.get(status, 1) != [0] || self.f.get(data, 512) == content[8 * 512..9 * 512];
        if got.first() == Some(&(0, 513)) && !right {
            return Err(format!("ring {q} read sector 8 wrong"));
        }
        Ok(())
    }

    fn inflight(&mut self, queues: u16, size: u16, changes: &[(u32, u64)]) {
        use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
        let tail = [queues.to_le_bytes(), size.to_le_bytes()].concat();
        if self.send(GET_INFLIGHT_FD, VERSION, &[Self::words(&[0, 0]), tail].concat(), None, &[]).is_err() {
            return;
        }
        // A server without inflight regions says nothing; then the answer to the next question comes at once.
        if self.send(GET_FEATURES, VERSION, &[], None, &[]).is_err() {
            return;
        }
        let time = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        if poll(&mut [PollFd::new(&self.f.stream, PollFlags::IN)], Some(&time)).unwrap_or(0) == 0 {
            panic!("no answer in {PATIENCE:?}");
        }
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0u8; 256];
        let buf = &mut [std::io::IoSliceMut::new(&mut bytes)];
        let Ok(got) = recvmsg(&self.f.stream, buf, &mut control, RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC) else {
            return;
        };
        if bytes[0] == GET_FEATURES as u8 {
            return;
        }
        let fd = control.drain().find_map(|m| match m {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        let Some(fd) = fd else { return };
        // 12 bytes of header, 20 of body; the answer to the other question may have come along.
        if got.bytes < 32 || got.bytes < 52 && self.answer().is_none() {
            return;
        }
        for (at, word) in changes {
            let _ = rustix::io::pwrite(&fd, &word.to_le_bytes(), u64::from(*at));
        }
        let _ = self.f.try_send(SET_INFLIGHT_FD, VERSION | NEED_REPLY, &bytes[12..32], &[fd.as_fd()]);
        self.answers(0);
        self.kept.borrow_mut().push(fd);
    }

    /// True as long as it may go on.
    fn step(&mut self, step: &Step, content: &[u8], seen: &mut Seen) -> Result<bool, String> {
        Ok(match step {
            Step::Send { request, flags, body, claims, fds } => {
                let sent = self.send(*request, *flags, body, *claims, fds).is_ok();
                // Bytes too few swallow what comes next, bytes too many are the next message.
                let whole = claims.is_none_or(|c| c as usize == body.len());
                if !sent || !whole {
                    return Ok(false);
                }
                let answers = self.answers(usize::from(*request == GET_FEATURES));
                let said = answers
                    .as_ref()
                    .map(|all| all.iter().map(|a| (a.1.len() > 8, a.1.first().map(|b| *b > 0))).collect::<Vec<_>>());
                seen.exact((request.min(&64), said));
                answers.is_some()
            }
            Step::Raw { bytes } => self.f.send_raw(bytes, &[]).is_ok() && bytes.is_empty(),
            Step::Handshake { features } => self.handshake(*features),
            Step::Start { ring, size } => {
                seen.note(format!("start {}", self.start(*ring % 8, *size)));
                true
            }
            Step::Read { ring } => {
                self.read(usize::from(*ring), content)?;
                true
            }
            Step::Stop { ring } => {
                self.started.retain(|s| *s != usize::from(*ring));
                let sent = self.send(GET_VRING_BASE, VERSION, &Frontend::body32((*ring).into(), 0), None, &[]);
                sent.is_ok() && self.answers(0).is_some()
            }
            Step::Inflight { queues, size, changes } => {
                self.inflight(*queues, *size, changes);
                true
            }
            Step::Memory { add: false, regions, fds } => {
                let mut body = Self::words(&[regions.len() as u64]);
                regions.iter().for_each(|r| body.extend(Self::words(r)));
                self.started.clear();
                seen.note(format!("table {}", self.ask(SET_MEM_TABLE, &body, fds)));
                true
            }
            Step::Memory { add: true, regions, fds } => {
                for (region, fd) in regions.iter().zip(fds) {
                    let body = [Self::words(&[0]), Self::words(region)].concat();
                    seen.note(format!("add {}", self.ask(ADD_MEM_REG, &body, &[*fd])));
                }
                true
            }
            Step::Log { size, offset, fd, on } => {
                let _ = self.send(SET_LOG_BASE, VERSION | NEED_REPLY, &Self::words(&[*size, *offset]), None, &[*fd]);
                self.answers(0);
                let _ = self.send(SET_LOG_FD, VERSION | NEED_REPLY, &[], None, &[Fd::Eventfd]);
                self.answers(0);
                let bits = FEATURES | if *on { LOG_ALL } else { 0 };
                seen.note(format!("log {}", self.ask(SET_FEATURES, &bits.to_le_bytes(), &[])));
                true
            }
            Step::Reconnect | Step::Queue => true,
        })
    }
}

impl Messages {
    fn steps(&mut self, input: &Input, seen: &mut Seen) -> Result<(), String> {
        let setup = &self.setup;
        let server = self.server.get_or_insert_with(|| Server::start(setup, Disk::Flat));
        let content = server.content().unwrap_or_default();
        let mut c = Connection::new(server);
        let mut waiting = Vec::new();
        for step in &input.steps {
            match step {
                Step::Reconnect => {
                    // They would be served before the new one.
                    waiting.clear();
                    c = Connection::new(server);
                }
                Step::Queue if waiting.len() < 4 => waiting.push(UnixStream::connect(&server.socket).unwrap()),
                Step::Queue => {}
                step => {
                    if !c.step(step, &content, seen)? {
                        waiting.clear();
                        c = Connection::new(server);
                    }
                }
            }
        }
        drop(waiting);
        drop(c);
        server.check()
    }
}

impl Fuzz for Messages {
    type Input = Input;

    fn new(setup: &Setup) -> Messages {
        Messages { setup: setup.clone(), server: None }
    }

    fn fresh(&mut self, rng: &mut Rng) -> Input {
        let mut steps = Vec::new();
        if rng.chance(4, 5) {
            steps.push(Step::Handshake { features: FEATURES });
        }
        if rng.chance(2, 3) {
            steps.push(Step::Start { ring: 0, size: 16 });
        }
        (0..1 + rng.below(12)).for_each(|_| steps.push(step(rng)));
        Input { steps }
    }

    fn mutate(&mut self, rng: &mut Rng, input: &mut Input) {
        let steps = &mut input.steps;
        match rng.below(5) {
            0 if steps.len() > 1 => _ = steps.remove(rng.index(steps.len())),
            1 if !steps.is_empty() => {
                let at = rng.index(steps.len());
                steps[at] = step(rng);
            }
            2 if steps.len() > 1 => {
                let (a, b) = (rng.index(steps.len()), rng.index(steps.len()));
                steps.swap(a, b);
            }
            _ if steps.len() < 40 => {
                let at = rng.index(steps.len() + 1);
                steps.insert(at, step(rng));
            }
            _ => {}
        }
    }

    fn run(&mut self, input: &Input) -> Outcome {
        let mut seen = Seen::default();
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.steps(input, &mut seen)));
        let result = match run {
            Ok(result) => result.map(|()| seen),
            Err(said) => {
                Err(format!("the frontend failed: {}", said.downcast_ref::<String>().cloned().unwrap_or_default()))
            }
        };
        match (&mut self.server, result) {
            (Some(server), Err(why)) if !why.contains("the server ended") => Err(server.last_words(&why)),
            (_, result) => result,
        }
    }

    fn recover(&mut self) {
        self.server = None;
    }
}
