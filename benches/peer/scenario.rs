//! What is measured: the list of scenarios.

/// What the requests are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Reads of base data.
    Read,
    /// Reads of base data that vmar's map scatters in 4 KiB pieces; the same request is one piece of the other subjects.
    Scattered,
    /// Writes to a fresh overlay, no place twice.
    WriteFirst,
    /// Writes to an overlay that holds the whole disk.
    WriteOver,
    /// 70 % reads, 30 % writes; the overlay holds half the disk at the start.
    Mixed,
}

/// One row of the comparison.
#[derive(Debug, Clone, Copy)]
pub struct Scenario {
    /// What the requests are.
    pub action: Action,
    /// Whether the page cache is emptied before each turn.
    pub is_cold: bool,
    /// Bytes a second that a server may read from the disk; cold ones only.
    pub throttle: Option<u64>,
    /// Whether the offsets are random; otherwise they follow each other.
    pub is_random: bool,
    /// Bytes of a request.
    pub block: usize,
    /// Requests in flight, all queues together.
    pub depth: usize,
    /// Virtqueues, with an equal share of the depth.
    pub queues: usize,
    /// Whether the client spins; otherwise it sleeps until a completion is signalled.
    pub is_polling: bool,
    /// A flush goes with every so many writes; 0: never.
    pub flush_every: u32,
    /// Whether `--quick` has it.
    pub is_quick: bool,
}

impl Scenario {
    /// A hot random read.
    const READ: Scenario = Scenario {
        action: Action::Read,
        is_cold: false,
        throttle: None,
        is_random: true,
        block: 4 << 10,
        depth: 1,
        queues: 1,
        is_polling: false,
        flush_every: 0,
        is_quick: false,
    };

    /// Name, unique in the list.
    pub fn name(&self) -> String {
        let action = match (self.action, self.is_random) {
            (Action::Read, true) => "randread",
            (Action::Read, false) => "seqread",
            (Action::Scattered, true) => "scattered",
            (Action::Scattered, false) => "seqscattered",
            (Action::WriteFirst, _) => "write-first",
            (Action::WriteOver, _) => "write-over",
            (Action::Mixed, _) => "mixed70",
        };
        let heat = match (self.writes(), self.is_cold) {
            (true, _) => "",
            _ if self.throttle.is_some() => "throttled-",
            (_, true) => "cold-",
            (_, false) => "hot-",
        };
        let block =
            if self.block >= 1 << 20 { format!("{}m", self.block >> 20) } else { format!("{}k", self.block >> 10) };
        let client = if self.is_polling { "poll" } else { "sleep" };
        let flush = if self.flush_every > 0 { format!("-flush{}", self.flush_every) } else { String::new() };
        format!("{heat}{action}-{block}-qd{}-q{}-{client}{flush}", self.depth, self.queues)
    }

    /// Whether it writes.
    pub fn writes(&self) -> bool {
        matches!(self.action, Action::WriteFirst | Action::WriteOver | Action::Mixed)
    }

    /// Whether no place may be touched twice: a second touch would be a hit in the cache, or an overwrite.
    pub fn is_once(&self) -> bool {
        self.is_cold || self.action == Action::WriteFirst
    }

    /// Whether every turn needs a new server: on an emptied cache or a fresh overlay.
    pub fn is_fresh(&self) -> bool {
        self.is_cold || matches!(self.action, Action::WriteFirst | Action::Mixed)
    }

    /// Per cent of the requests that read.
    pub fn read_percent(&self) -> u64 {
        match self.action {
            Action::Read | Action::Scattered => 100,
            Action::Mixed => 70,
            Action::WriteFirst | Action::WriteOver => 0,
        }
    }
}

/// Every scenario, in the order in which they run; `throttle` is the limit of those that are throttled.
pub fn all(throttle: u64) -> Vec<Scenario> {
    let mut out = Vec::new();
    let both = |out: &mut Vec<Scenario>, s: Scenario| {
        for is_polling in [true, false] {
            out.push(Scenario { is_polling, ..s });
        }
    };
    for queues in [1, 2] {
        for depth in [1, 32, 128] {
            if depth >= queues {
                let is_quick = queues == 1 && depth < 128;
                both(&mut out, Scenario { depth, queues, is_quick, ..Scenario::READ });
            }
        }
    }
    let large = Scenario { block: 64 << 10, depth: 8, is_quick: true, ..Scenario::READ };
    both(&mut out, large);
    both(&mut out, Scenario { action: Action::Scattered, ..large });
    let sequential = Scenario { block: 1 << 20, depth: 4, is_random: false, is_quick: true, ..Scenario::READ };
    both(&mut out, sequential);

    for depth in [1, 32, 128] {
        out.push(Scenario { is_cold: true, depth, is_quick: depth == 32, ..Scenario::READ });
    }
    out.push(Scenario { is_cold: true, ..large });
    out.push(Scenario { is_cold: true, action: Action::Scattered, ..large });
    out.push(Scenario { is_cold: true, ..sequential });
    // Without anything in flight together: who reads ahead?
    let alone = Scenario { is_cold: true, depth: 1, block: 64 << 10, is_quick: false, ..sequential };
    out.push(alone);
    out.push(Scenario { action: Action::Scattered, ..alone });
    let throttled = Scenario { is_cold: true, throttle: Some(throttle), is_quick: false, ..sequential };
    out.push(throttled);
    out.push(Scenario { action: Action::Scattered, ..throttled });

    for action in [Action::WriteFirst, Action::WriteOver] {
        let small = Scenario { action, depth: 32, ..Scenario::READ };
        out.push(Scenario { is_polling: true, ..small });
        out.push(Scenario { is_quick: true, ..small });
        out.push(Scenario { flush_every: 16, is_quick: action == Action::WriteFirst, ..small });
        out.push(Scenario { action, is_quick: false, ..sequential });
        out.push(Scenario { action, flush_every: 16, is_quick: false, ..sequential });
    }
    let mixed = Scenario { action: Action::Mixed, depth: 32, ..Scenario::READ };
    out.push(Scenario { is_polling: true, ..mixed });
    out.push(Scenario { is_quick: true, ..mixed });
    out.push(Scenario { queues: 2, ..mixed });
    out
}

/// Whether a name contains a pattern, in which `*` stands for anything.
pub fn matches(name: &str, pattern: &str) -> bool {
    let mut rest = name;
    pattern.split('*').all(|piece| match rest.find(piece) {
        Some(at) => {
            rest = &rest[at + piece.len()..];
            true
        }
        None => false,
    })
}
