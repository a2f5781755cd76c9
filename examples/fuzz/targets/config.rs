//! The config space: every offset, size and flag, read and written.

use super::frontend::{FEATURES, Frontend, GET_CONFIG, NEED_REPLY, SET_FEATURES, VERSION};
use super::rng::Rng;
use super::server::{Disk, Server};
use super::{Fuzz, Outcome, Seen, Setup};
use serde::{Deserialize, Serialize};

const SET_CONFIG: u32 = 25;
/// Bytes of the header of a config message: offset, size, flags.
const CONFIG_HEADER: usize = 12;
/// What vhost-user allows at most (VHOST_USER_MAX_CONFIG_SIZE).
const SPACE: u32 = 256;
/// `writeback`, the only byte that a driver may ever write.
const WRITEBACK: usize = 32;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Step {
    set: bool,
    offset: u32,
    size: u32,
    flags: u32,
    /// The bytes behind the header; there may be more or fewer than `size` says.
    #[serde(with = "super::hex")]
    body: Vec<u8>,
    need_reply: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    steps: Vec<Step>,
}

pub struct Config {
    setup: Setup,
    server: Option<Server>,
    frontend: Option<Frontend>,
    runs: u64,
}

fn number(rng: &mut Rng) -> u32 {
    match rng.below(8) {
        0 => rng.edge() as u32,
        1 => SPACE - 2 + rng.below(4) as u32,
        2 => rng.one_of(&[0, 1, 2, 4, 8, 31, 32, 33, 34, 36, 40, 60, 96]),
        _ => rng.below(100) as u32,
    }
}

fn step(rng: &mut Rng) -> Step {
    let (offset, size) = (number(rng), number(rng));
    let len = if rng.chance(5, 6) { size.min(600) } else { rng.below(300) as u32 };
    Step {
        set: rng.chance(1, 2),
        offset,
        size,
        flags: if rng.chance(2, 3) { rng.below(2) as u32 } else { rng.edge() as u32 },
        body: rng.bytes(len as usize),
        need_reply: rng.chance(3, 4),
    }
}

fn message(offset: u32, size: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    [&offset.to_le_bytes()[..], &size.to_le_bytes(), &flags.to_le_bytes(), body].concat()
}

/// Reads all of it; `None` when the server has hung up.
fn space(f: &mut Frontend) -> Option<Vec<u8>> {
    f.try_send(GET_CONFIG, VERSION, &message(0, SPACE, 0, &[0; SPACE as usize]), &[]).ok()?;
    let reply = f.reply().ok()?;
    (reply.len() == CONFIG_HEADER + SPACE as usize).then(|| reply[CONFIG_HEADER..].to_vec())
}

impl Config {
    fn steps(&mut self, input: &Input, seen: &mut Seen) -> Result<(), String> {
        let setup = &self.setup;
        let server = self.server.get_or_insert_with(|| Server::start(setup, Disk::Flat));
        for step in &input.steps {
            let f = self.frontend.get_or_insert_with(|| Frontend::bare(&server.socket, FEATURES));
            let before = space(f).ok_or_else(|| server.last_words("the config space cannot be read"))?;
            let request = if step.set { SET_CONFIG } else { GET_CONFIG };
            let flags = VERSION | if step.need_reply { NEED_REPLY } else { 0 };
            let sent = f.try_send(request, flags, &message(step.offset, step.size, step.flags, &step.body), &[]);
            let end = step.offset.checked_add(step.size);
            let fits = end.is_some_and(|end| end <= SPACE) && step.size > 0 && step.body.len() == step.size as usize;
            if !step.set && fits && step.flags <= 1 && sent.is_ok() {
                let want = &before[step.offset as usize..][..step.size as usize];
                let reply = f.reply().map_err(|e| server.last_words(&format!("no answer to a good read: {e}")))?;
                if reply.get(CONFIG_HEADER..) != Some(want) {
                    return Err(format!("{}+{} reads {reply:?} in place of {want:?}", step.offset, step.size));
                }
                seen.note("read");
                continue;
            }
            // Whatever it says to this (a refusal, nothing, the end of the connection), it says before it answers the
            // next question.
            let asked = f.try_send(SET_FEATURES, VERSION | NEED_REPLY, &FEATURES.to_le_bytes(), &[]).is_ok();
            let mut answers = 0;
            let alive = asked
                && loop {
                    match read_message(f) {
                        Some(SET_FEATURES) => break true,
                        Some(_) if answers < 4 => answers += 1,
                        _ => break false,
                    }
                };
            seen.exact((step.set, alive, answers, fits, step.flags.min(2), step.need_reply));
            if !alive {
                self.frontend = None;
                server.alive()?;
                continue;
            }
            let after = space(f).ok_or_else(|| server.last_words("the config space cannot be read any more"))?;
            if let Some(at) = (0..after.len()).find(|&i| after[i] != before[i])
                && (at != WRITEBACK || !step.set || after[at] > 1 || after[at + 1..] != before[at + 1..])
            {
                return Err(format!("byte {at} of the config space changed from {} to {}", before[at], after[at]));
            }
        }
        self.runs += 1;
        if self.runs.is_multiple_of(32) {
            self.frontend = None;
            server.check()?;
        }
        server.alive()
    }
}

/// The number of a reply; its body is thrown away.
fn read_message(f: &mut Frontend) -> Option<u32> {
    use std::io::Read;
    let mut header = [0u8; 12];
    f.stream.read_exact(&mut header).ok()?;
    let size = u32::from_le_bytes(header[8..].try_into().unwrap());
    let mut body = vec![0; size.min(8192) as usize];
    f.stream.read_exact(&mut body).ok()?;
    Some(u32::from_le_bytes(header[..4].try_into().unwrap()))
}

impl Fuzz for Config {
    type Input = Input;

    fn new(setup: &Setup) -> Config {
        Config { setup: setup.clone(), server: None, frontend: None, runs: 0 }
    }

    fn fresh(&mut self, rng: &mut Rng) -> Input {
        Input { steps: (0..1 + rng.below(12)).map(|_| step(rng)).collect() }
    }

    fn mutate(&mut self, rng: &mut Rng, input: &mut Input) {
        match rng.below(3) {
            0 if input.steps.len() > 1 => _ = input.steps.remove(rng.index(input.steps.len())),
            1 if !input.steps.is_empty() => {
                let at = rng.index(input.steps.len());
                input.steps[at] = step(rng);
            }
            _ if input.steps.len() < 32 => input.steps.push(step(rng)),
            _ => {}
        }
    }

    fn run(&mut self, input: &Input) -> Outcome {
        let mut seen = Seen::default();
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.steps(input, &mut seen)));
        match (run, &mut self.server) {
            (Ok(result), _) => result.map(|()| seen),
            (Err(_), Some(server)) => Err(server.last_words("the frontend failed")),
            (Err(_), None) => Err("the server does not start".into()),
        }
    }

    fn recover(&mut self) {
        (self.server, self.frontend) = (None, None);
    }
}
