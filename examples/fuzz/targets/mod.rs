//! What is fuzzed: an input is a value of serde that is made at random, changed at random, written to a file and run.
//!
//! | target | throws | at |
//! | --- | --- | --- |
//! | `chains` | descriptor chains, rings, stops in between | a served disk, through shared memory |
//! | `config` | GET_CONFIG and SET_CONFIG | a served disk |
//! | `messages` | vhost-user messages and descriptors | a served disk |
//! | `map` | bytes of block maps | `map::Map` |
//! | `qcow2` | header, tables and bitmaps of overlays | `overlay::{Overlay, check, inspect}` |
//! | `live` | bytes of live bitmaps | `Overlay::open` |
//! | `trace` | bytes of traces | `redirect::trace::TraceReader` |
//! | `library` | `library.json` | `library::Library` |
//! | `stream` | bytes of QEMU's migration stream, in pieces | `migrate::part::Cutter`, and both sides of a link |
//! | `frames` | messages, operations and literals of a sender | `migrate::{wire::Message, frame::Decoder, join::Joiner}` |
//! | `manifest` | bytes of memory images and packs | `store::{Manifest, Pack}` |
//! | `snapshot` | bytes of snapshots, parts that do not belong together | `snapshot::{file::Snapshot, skeleton::Skeleton}` |

pub mod alloc;
pub mod chains;
pub mod config;
pub mod edits;
pub mod frames;
#[path = "../../../tests/hostile/frontend.rs"]
pub mod frontend;
pub mod library;
pub mod live;
pub mod manifest;
pub mod map;
pub mod messages;
pub mod model;
pub mod overlays;
pub mod qcow2;
pub mod requests;
pub mod rng;
pub mod server;
pub mod shrink;
pub mod snapshot;
pub mod stream;
pub mod trace;

use rng::Rng;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Mutex;

pub const NAMES: [&str; 12] = [
    "chains", "config", "messages", "map", "qcow2", "live", "trace", "library", "stream", "frames", "manifest",
    "snapshot",
];

/// What a target needs of its surroundings.
#[derive(Clone)]
pub struct Setup {
    /// A directory of its own, on tmpfs if there is one.
    pub dir: PathBuf,
    /// The command `vmar`.
    pub vmar: fn() -> Command,
}

/// What happened in a run, in a few numbers: an input that shows a new one is worth keeping.
#[derive(Default, Debug)]
pub struct Seen(pub Vec<u64>);

impl Seen {
    /// Notes an event. Numbers, paths and what stands in quotes do not count: "block 7" and "block 8" are the same event.
    pub fn note(&mut self, what: impl std::fmt::Display) {
        let text = what.to_string();
        let outside: String = text.split(['"', '`']).step_by(2).collect();
        let dull = |word: &&str| !word.contains(|c: char| c.is_ascii_digit() || c == '/' || !c.is_ascii());
        let words: Vec<&str> = outside.split_whitespace().filter(dull).take(16).collect();
        self.exact(words);
    }

    /// The same where numbers count.
    pub fn exact(&mut self, what: impl Hash) {
        let mut hash = DefaultHasher::new();
        what.hash(&mut hash);
        self.0.push(hash.finish());
    }
}

/// What went wrong, in words; or what was seen.
pub type Outcome = Result<Seen, String>;

/// Something that can be fuzzed.
pub trait Fuzz {
    type Input: Serialize + DeserializeOwned + Clone;
    /// Bytes that one run may hold in this process.
    const MEMORY_MAX: usize = 256 << 20;

    fn new(setup: &Setup) -> Self;
    /// A new input.
    fn fresh(&mut self, rng: &mut Rng) -> Self::Input;
    /// Changes an input a little.
    fn mutate(&mut self, rng: &mut Rng, input: &mut Self::Input);
    /// Runs it. The same input does the same every time, whatever ran before.
    fn run(&mut self, input: &Self::Input) -> Outcome;
    /// Starts anew after a failure.
    fn recover(&mut self) {}
}

/// Calls `$body` with a new target of that name as `$t`.
#[macro_export]
macro_rules! with_target {
    ($name:expr, $setup:expr, $t:ident => $body:expr) => {{
        use $crate::targets::{self as all, Fuzz as _};
        match $name {
            "chains" => {
                let mut $t = all::chains::Chains::new($setup);
                $body
            }
            "config" => {
                let mut $t = all::config::Config::new($setup);
                $body
            }
            "messages" => {
                let mut $t = all::messages::Messages::new($setup);
                $body
            }
            "map" => {
                let mut $t = all::map::Maps::new($setup);
                $body
            }
            "qcow2" => {
                let mut $t = all::qcow2::Qcow2::new($setup);
                $body
            }
            "live" => {
                let mut $t = all::live::Live::new($setup);
                $body
            }
            "trace" => {
                let mut $t = all::trace::Traces::new($setup);
                $body
            }
            "library" => {
                let mut $t = all::library::Libraries::new($setup);
                $body
            }
            "stream" => {
                let mut $t = all::stream::Stream::new($setup);
                $body
            }
            "frames" => {
                let mut $t = all::frames::Frames::new($setup);
                $body
            }
            "manifest" => {
                let mut $t = all::manifest::Manifests::new($setup);
                $body
            }
            "snapshot" => {
                let mut $t = all::snapshot::Snapshots::new($setup);
                $body
            }
            other => panic!("no target is called {other:?}"),
        }
    }};
}

/// An input in a file, to be run again.
#[derive(Serialize, Deserialize)]
pub struct Kept {
    pub target: String,
    /// What went wrong when it was found, or what it is for.
    pub why: String,
    pub input: serde_json::Value,
}

/// What the last panic said, and where: the hook has put it there.
static PANIC: Mutex<String> = Mutex::new(String::new());

/// Keeps panics for [`execute`] and prints nothing.
pub fn catch_panics() {
    std::panic::set_hook(Box::new(|info| {
        *PANIC.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = info.to_string();
    }));
}

/// Runs an input; a panic is a failure, and so is memory without bounds.
pub fn execute<T: Fuzz>(target: &mut T, input: &T::Input) -> Outcome {
    let before = alloc::start();
    let outcome = catch_unwind(AssertUnwindSafe(|| target.run(input)));
    let peak = alloc::peak(before);
    let outcome = match outcome {
        Ok(outcome) => outcome,
        Err(_) => Err(PANIC.lock().unwrap_or_else(std::sync::PoisonError::into_inner).clone()),
    };
    match outcome {
        Ok(_) if peak > T::MEMORY_MAX => Err(format!("{} MiB of memory at once", peak >> 20)),
        other => other,
    }
}

/// Bytes as hexadecimal digits.
pub mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub fn serialize<S: Serializer>(bytes: &[u8], s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&vmar::codec::hex(bytes))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(d)?;
        let digits: Option<Vec<u8>> = text.chars().map(|c| c.to_digit(16).map(|d| d as u8)).collect();
        let digits = digits.ok_or_else(|| de::Error::custom("bytes are hexadecimal digits"))?;
        Ok(digits.chunks_exact(2).map(|d| d[0] << 4 | d[1]).collect())
    }
}
