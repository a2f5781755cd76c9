//! What a vhost-user-blk backend offers, asked over its socket with the messages as they are on the wire. Nothing of vmar is
//! in it: it asks any backend. It starts no ring and shares no memory.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_QUEUE_NUM: u32 = 17;
const GET_CONFIG: u32 = 24;
const GET_MAX_MEM_SLOTS: u32 = 36;

const VERSION: u32 = 1;
const REPLY: u32 = 4;

pub const F_LOG_ALL: u32 = 26;
pub const F_PROTOCOL_FEATURES: u32 = 30;
pub const P_MQ: u32 = 0;
pub const P_CONFIG: u32 = 9;
pub const P_CONFIGURE_MEM_SLOTS: u32 = 15;

/// Bytes of `struct virtio_blk_config` up to and with write_zeroes_may_unmap: what every backend knows.
pub const CONFIG_SIZE: usize = 60;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Device and ring features (virtio 1.3, sections 5.2.3 and 6), and the bits that vhost uses.
pub const FEATURES: &[(u32, &str)] = &[
    (0, "BARRIER"),
    (1, "SIZE_MAX"),
    (2, "SEG_MAX"),
    (4, "GEOMETRY"),
    (5, "RO"),
    (6, "BLK_SIZE"),
    (7, "SCSI"),
    (9, "FLUSH"),
    (10, "TOPOLOGY"),
    (11, "CONFIG_WCE"),
    (12, "MQ"),
    (13, "DISCARD"),
    (14, "WRITE_ZEROES"),
    (15, "LIFETIME"),
    (16, "SECURE_ERASE"),
    (17, "ZONED"),
    (24, "NOTIFY_ON_EMPTY"),
    (F_LOG_ALL, "VHOST_F_LOG_ALL"),
    (27, "ANY_LAYOUT"),
    (28, "INDIRECT_DESC"),
    (29, "EVENT_IDX"),
    (F_PROTOCOL_FEATURES, "VHOST_USER_F_PROTOCOL_FEATURES"),
    (32, "VERSION_1"),
    (33, "ACCESS_PLATFORM"),
    (34, "RING_PACKED"),
    (35, "IN_ORDER"),
    (36, "ORDER_PLATFORM"),
    (37, "SR_IOV"),
    (38, "NOTIFICATION_DATA"),
    (39, "NOTIF_CONFIG_DATA"),
    (40, "RING_RESET"),
];

/// Protocol features (QEMU docs/interop/vhost-user.rst).
pub const PROTOCOL_FEATURES: &[(u32, &str)] = &[
    (P_MQ, "MQ"),
    (1, "LOG_SHMFD"),
    (2, "RARP"),
    (3, "REPLY_ACK"),
    (4, "MTU"),
    (5, "BACKEND_REQ"),
    (6, "CROSS_ENDIAN"),
    (7, "CRYPTO_SESSION"),
    (8, "PAGEFAULT"),
    (P_CONFIG, "CONFIG"),
    (10, "BACKEND_SEND_FD"),
    (11, "HOST_NOTIFIER"),
    (12, "INFLIGHT_SHMFD"),
    (13, "RESET_DEVICE"),
    (14, "INBAND_NOTIFICATIONS"),
    (P_CONFIGURE_MEM_SLOTS, "CONFIGURE_MEM_SLOTS"),
    (16, "STATUS"),
    (17, "XEN_MMAP"),
    (18, "SHARED_OBJECT"),
    (19, "DEVICE_STATE"),
    (20, "GET_VRING_BASE_INFLIGHT"),
    (21, "GPA_ADDRESSES"),
    (22, "SHMEM"),
];

/// The name of a bit, or its number.
pub fn name(names: &[(u32, &str)], bit: u32) -> String {
    names.iter().find(|(b, _)| *b == bit).map_or(format!("bit {bit}"), |(_, name)| (*name).to_string())
}

/// What a backend answered.
#[derive(Debug, Default)]
pub struct Offer {
    pub features: u64,
    pub protocol: u64,
    /// Where the protocol feature that goes with it is offered:
    pub queues: Option<u64>,
    pub mem_slots: Option<u64>,
    pub config: Option<Vec<u8>>,
}

impl Offer {
    pub fn has(&self, bit: u32) -> bool {
        self.features & 1 << bit != 0
    }

    pub fn has_protocol(&self, bit: u32) -> bool {
        self.protocol & 1 << bit != 0
    }

    /// A little-endian field of the config space.
    pub fn field(&self, offset: usize, len: usize) -> Option<u64> {
        let bytes = self.config.as_ref()?.get(offset..offset + len)?;
        Some(bytes.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
    }
}

/// Asks the backend behind this socket.
pub fn ask(socket: &Path) -> io::Result<Offer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut offer = Offer { features: get(&mut stream, GET_FEATURES)?, ..Offer::default() };
    send(&mut stream, SET_OWNER, &[])?;
    if !offer.has(F_PROTOCOL_FEATURES) {
        return Ok(offer);
    }
    offer.protocol = get(&mut stream, GET_PROTOCOL_FEATURES)?;
    // Acknowledged is only what is used here.
    let used = offer.protocol & (1 << P_MQ | 1 << P_CONFIG | 1 << P_CONFIGURE_MEM_SLOTS);
    send(&mut stream, SET_PROTOCOL_FEATURES, &used.to_le_bytes())?;
    // Everything, as most drivers take it (the cache mode in the config space depends on it), but for the log of pages.
    send(&mut stream, SET_FEATURES, &(offer.features & !(1 << F_LOG_ALL)).to_le_bytes())?;
    if offer.has_protocol(P_MQ) {
        offer.queues = Some(get(&mut stream, GET_QUEUE_NUM)?);
    }
    if offer.has_protocol(P_CONFIGURE_MEM_SLOTS) {
        offer.mem_slots = Some(get(&mut stream, GET_MAX_MEM_SLOTS)?);
    }
    if offer.has_protocol(P_CONFIG) {
        let mut body = Vec::new();
        for word in [0, CONFIG_SIZE, 0] {
            body.extend((word as u32).to_le_bytes());
        }
        body.resize(body.len() + CONFIG_SIZE, 0);
        send(&mut stream, GET_CONFIG, &body)?;
        let reply = receive(&mut stream, GET_CONFIG)?;
        let config = reply.get(12..12 + CONFIG_SIZE).ok_or_else(|| bad("the config space is short"))?;
        offer.config = Some(config.to_vec());
    }
    Ok(offer)
}

fn bad(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn send(stream: &mut UnixStream, request: u32, body: &[u8]) -> io::Result<()> {
    let mut message = Vec::new();
    for word in [request, VERSION, body.len() as u32] {
        message.extend(word.to_le_bytes());
    }
    message.extend(body);
    stream.write_all(&message)
}

fn receive(stream: &mut UnixStream, request: u32) -> io::Result<Vec<u8>> {
    let mut header = [0u8; 12];
    stream.read_exact(&mut header)?;
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if word(0) != request || word(4) != VERSION | REPLY || word(8) > 4096 {
        return Err(bad(&format!("no answer to message {request}: {header:?}")));
    }
    let mut body = vec![0; word(8) as usize];
    stream.read_exact(&mut body)?;
    Ok(body)
}

fn get(stream: &mut UnixStream, request: u32) -> io::Result<u64> {
    send(stream, request, &[])?;
    let body = receive(stream, request)?;
    Ok(u64::from_le_bytes(body.try_into().map_err(|_| bad("an answer that is no u64"))?))
}
