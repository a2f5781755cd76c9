//! Descriptor chains against a served disk: whatever they are, each head comes back exactly once, nothing outside of a
//! chain's buffers is written, and the disk holds what the well-formed requests made of it.

use super::frontend::*;
use super::model::{Effect, Memory, Range, Sure, Verdict, gather, judge, overlap};
use super::requests;
use super::rng::Rng;
use super::server::{DISK, Disk, SECTORS, Server, pattern};
use super::{Fuzz, Outcome, Seen, Setup};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// A descriptor: address, length, flags, next.
pub type Desc = (u64, u32, u16, u16);

/// Bytes that the driver puts into memory: headers, segments.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Put {
    pub at: u64,
    #[serde(with = "super::hex")]
    pub bytes: Vec<u8>,
}

/// Descriptors from entry `first` of the table at `at` on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Table {
    pub at: u64,
    pub first: u16,
    pub descs: Vec<Desc>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Offer {
    pub ring: u8,
    pub heads: Vec<u16>,
}

/// What the driver does at once; it then waits for all of it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Round {
    pub puts: Vec<Put>,
    pub tables: Vec<Table>,
    pub offers: Vec<Offer>,
    /// The rings are stopped and started again before it waits.
    pub stop: bool,
    /// At the end the available index jumps there. Nothing is promised any more.
    pub jump: Option<u16>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Input {
    /// An overlay in place of a raw file.
    pub overlay: bool,
    pub event_idx: bool,
    /// The driver does not know FLUSH.
    pub write_through: bool,
    pub rings: u8,
    /// Binary logarithm of the entries of a ring.
    pub size_bits: u8,
    pub rounds: Vec<Round>,
}

/// What is kept from one input to the next: the disk, the connection, the memory as it should be.
struct Session {
    server: Server,
    frontend: Option<(Frontend, [memmap2::MmapRaw; 2])>,
    memory: Memory,
    disk: Vec<u8>,
    /// Sectors of which nothing is known.
    unknown: Vec<bool>,
}

pub struct Chains {
    setup: Setup,
    sessions: [Option<Session>; 2],
    runs: u64,
}

/// How long heads may take to come back. Generous: the machine may have much else to do.
const LIMIT: Duration = Duration::from_secs(30);
/// Rings end here; a device that writes below this breaks what the driver reads.
const RINGS_END: u64 = RAM + 0x4_0000;
/// The server is looked at as a whole now and then.
const CHECK_EVERY: u64 = 64;

fn features(input: &Input) -> u64 {
    let mut bits = FEATURES;
    if input.event_idx {
        bits |= F_EVENT_IDX;
    }
    if input.write_through {
        bits &= !F_FLUSH;
    }
    bits
}

/// A chain that was offered.
struct Item {
    ring: usize,
    head: u16,
    verdict: Verdict,
    /// Another chain of the round writes where this one does, or reads.
    muddled: bool,
}

impl Session {
    fn start(setup: &Setup, disk: Disk) -> Session {
        let server = Server::start(setup, disk);
        let mut disk = pattern();
        if server.content().is_none() {
            disk[DISK - 3 * 512..].fill(0);
        }
        Session { server, frontend: None, memory: Memory::new(), disk, unknown: vec![false; SECTORS as usize] }
    }

    /// A connection with fresh rings of the input's shape, and memory full of canaries.
    fn prepare(&mut self, input: &Input) -> Result<(), String> {
        let bits = features(input);
        if self.frontend.is_none() {
            let socket = self.server.socket.clone();
            let made = std::panic::catch_unwind(|| Frontend::bare(&socket, bits));
            let f = made.map_err(|_| self.server.last_words("a new connection is not served"))?;
            let maps =
                [&f.ram, &f.data].map(|r| memmap2::MmapOptions::new().len(r.size as usize).map_raw(&r.fd).unwrap());
            self.memory = Memory::new();
            f.put(RAM, &self.memory.ram);
            f.put(DATA, &self.memory.data);
            self.frontend = Some((f, maps));
        }
        let memory = &mut self.memory;
        let (f, _) = self.frontend.as_mut().ok_or("no connection")?;
        f.ok(SET_FEATURES, &bits.to_le_bytes(), &[]);
        f.event_idx = input.event_idx;
        f.rings.clear();
        let zeros = vec![0; (RINGS_END - RAM) as usize];
        f.put(RAM, &zeros);
        memory.put(RAM, &zeros);
        for q in 0..usize::from(input.rings.clamp(1, 4)) {
            f.add_ring(q as u32, 1 << input.size_bits.clamp(3, 8));
            f.start_ring(q, 0);
        }
        Ok(())
    }

    fn put(&mut self, addr: u64, bytes: &[u8]) {
        if self.memory.get(addr, bytes.len() as u64).is_some()
            && let Some((f, _)) = &self.frontend
        {
            f.put(addr, bytes);
            self.memory.put(addr, bytes);
        }
    }

    /// Carries a round out. `Ok(false)`: nothing can be said about this connection any more.
    fn round(&mut self, round: &Round, seen: &mut Seen) -> Result<bool, String> {
        for put in &round.puts {
            self.put(put.at, &put.bytes);
        }
        for table in &round.tables {
            let bytes: Vec<u8> = (table.descs.iter())
                .flat_map(|d| {
                    [&d.0.to_le_bytes()[..], &d.1.to_le_bytes(), &d.2.to_le_bytes(), &d.3.to_le_bytes()].concat()
                })
                .collect();
            self.put(table.at.saturating_add(u64::from(table.first) * 16), &bytes);
        }
        let Some((f, _)) = &mut self.frontend else { return Ok(false) };
        // What it ought to do.
        let mut items = Vec::new();
        let mut offers: Vec<Vec<u16>> = vec![vec![]; f.rings.len()];
        for offer in &round.offers {
            let q = usize::from(offer.ring) % f.rings.len();
            let size = f.rings[q].size;
            for &head in &offer.heads {
                // Heads that do not exist may still be in the ring when the others are back: there is room for both.
                if offers[q].len() < usize::from(size) / 2 {
                    offers[q].push(head);
                    if head < size {
                        let verdict = judge(&self.memory, f.rings[q].desc(), size, head);
                        items.push(Item { ring: q, head, verdict, muddled: false });
                    }
                }
            }
        }
        let loose = muddle(&mut items);
        let wild = items.iter().any(|i| overlap(&i.verdict.writes, &[(RAM, RINGS_END - RAM)]));
        let before: Vec<u16> = f.rings.iter().map(|r| r.avail).collect();
        for (q, heads) in offers.iter().enumerate() {
            f.offer(q, heads);
        }
        for (q, heads) in offers.iter().enumerate() {
            if !heads.is_empty() {
                f.kick_if_wanted(q, before[q]);
            }
        }
        if wild {
            seen.note("wild");
            // Buffers over the rings: whatever comes of it, the server has to live.
            std::thread::sleep(Duration::from_millis(2));
            self.unknown.fill(true);
            return Ok(false);
        }
        if round.stop {
            for q in 0..f.rings.len() {
                let base = f.stop_ring(q);
                let gone = base.wrapping_sub(before[q]);
                if usize::from(gone) > offers[q].len() {
                    return Err(format!(
                        "ring {q} stopped at {base}, offered were {}..+{}",
                        before[q],
                        offers[q].len()
                    ));
                }
                let size = f.rings[q].size;
                let taken = offers[q][..usize::from(gone)].iter().filter(|h| **h < size).count();
                let used = f.used_idx(q).wrapping_sub(f.rings[q].seen);
                if usize::from(used) != taken {
                    return Err(format!("ring {q} stopped at {base} after {taken} chains, but {used} are used"));
                }
                f.start_ring(q, base);
            }
        }
        let mut results: Vec<(usize, u32, u32)> = Vec::new();
        for q in 0..f.rings.len() {
            let want = items.iter().filter(|i| i.ring == q).count();
            let got = f.wait_for(q, want, LIMIT);
            if got.len() != want {
                return Err(self
                    .server
                    .last_words(&format!("ring {q} used {} of {want} heads in {LIMIT:?}", got.len())));
            }
            results.extend(got.into_iter().map(|(head, len)| (q, head, len)));
        }
        if let Some(idx) = round.jump {
            f.set_avail_idx(0, idx);
            f.kick(0);
            self.unknown.fill(true);
            std::thread::sleep(Duration::from_millis(2));
            return Ok(false);
        }
        self.settle(items, results, loose, seen).map(|()| true)
    }

    /// Compares what came back with what ought to.
    fn settle(
        &mut self,
        items: Vec<Item>,
        mut results: Vec<(usize, u32, u32)>,
        loose: bool,
        seen: &mut Seen,
    ) -> Result<(), String> {
        let Some((f, maps)) = &self.frontend else { return Ok(()) };
        // Statuses, lengths, data.
        let mut effects = Vec::new();
        for item in &items {
            let v = &item.verdict;
            let Some(at) = results.iter().position(|r| (r.0, r.1) == (item.ring, u32::from(item.head))) else {
                return Err(format!("head {} of ring {} did not come back: {results:?}", item.head, item.ring));
            };
            let len = u64::from(results.swap_remove(at).2);
            let room: u64 = v.writes.iter().map(|r| r.1).sum();
            if !loose && len > room {
                return Err(format!("head {}: used length {len}, but {room} bytes could be written", item.head));
            }
            let status = v.status.map(|at| f.get(at, 1)[0]);
            let shape =
                (v.writes.len().min(3), v.reads.len().min(4), len.min(2), v.sure == Sure::Good, v.sure == Sure::Bad);
            seen.exact((
                v.kind.map(|k| k.min(32)),
                status.filter(|s| *s < 4),
                shape,
                f.event_idx,
                loose || item.muddled,
            ));
            if loose || item.muddled {
                effects.push((v.effect.clone(), None));
                continue;
            }
            effects.push((v.effect.clone(), status));
            let what = || format!("head {} of ring {} (type {:?})", item.head, item.ring, v.kind);
            match (v.sure, status) {
                (_, Some(0..=2)) | (Sure::Bad, _) | (Sure::Unsure, None) => {}
                (_, status) => return Err(format!("{}: status {status:?}", what())),
            }
            match (v.sure, status) {
                (Sure::Good, Some(s)) if s != 0 => return Err(format!("{}: a good request got status {s}", what())),
                (Sure::Bad, Some(0)) => return Err(format!("{}: a bad request went well", what())),
                _ => {}
            }
            // A chain that is broken has no status of its own, but must not say OK at the end of what it has.
            if v.status.is_none()
                && v.sure == Sure::Bad
                && let Some(last) = v.writes.last()
                && f.get(last.0 + last.1 - 1, 1)[0] == 0
                && self.memory.get(last.0 + last.1 - 1, 1) != Some(&[0])
            {
                return Err(format!("{}: a broken chain went well", what()));
            }
            if let (Some(0), Some(used)) = (status, v.used)
                && used != len
            {
                return Err(format!("{}: used length {len} in place of {used}", what()));
            }
        }
        // Nothing else was written.
        if !loose {
            let mut writes: Vec<Range> = items.iter().flat_map(|i| i.verdict.writes.clone()).collect();
            writes.extend(f.rings.iter().map(|r| (r.used_ring(), 6 + 8 * u64::from(r.size))));
            for r in &f.rings {
                writes.push((r.avail_ring(), 6 + 2 * u64::from(r.size)));
            }
            untouched(maps, &self.memory, writes)?;
        }
        for i in 0..items.len() {
            self.apply(i, &items, &effects)?;
        }
        // The canaries come back.
        let Some((f, _)) = &self.frontend else { return Ok(()) };
        for &(addr, len) in items.iter().flat_map(|i| &i.verdict.writes) {
            let fresh: Vec<u8> = (addr..addr + len).map(Memory::canary).collect();
            f.put(addr, &fresh);
            self.memory.put(addr, &fresh);
        }
        if loose {
            self.unknown.fill(true);
            f.put(RINGS_END, &self.memory.ram[(RINGS_END - RAM) as usize..]);
            f.put(DATA, &self.memory.data);
        }
        Ok(())
    }

    /// What a request of the round did to the model of the disk, or what it read.
    fn apply(&mut self, i: usize, items: &[Item], effects: &[(Effect, Option<u8>)]) -> Result<(), String> {
        let ranges = |effect: &Effect| -> Vec<Range> {
            match effect {
                Effect::None => vec![],
                Effect::Read { offset, len } | Effect::Write { offset, len, .. } => vec![(*offset, *len)],
                Effect::Zero(ranges) => ranges.clone(),
            }
        };
        let (effect, status) = &effects[i];
        let mine = ranges(effect);
        let changes = |e: &Effect| matches!(e, Effect::Write { .. } | Effect::Zero(_));
        let contested = (effects.iter().enumerate())
            .any(|(j, (other, _))| j != i && changes(other) && overlap(&mine, &ranges(other)));
        let (muddled, part) = (status.is_none() || contested, matches!(effect, Effect::Zero(r) if r.len() > 1));
        if changes(effect) && (muddled || part && *status != Some(0)) {
            for (offset, len) in mine {
                self.unknown[(offset / 512) as usize..((offset + len) / 512) as usize].fill(true);
            }
            return Ok(());
        }
        if muddled || *status != Some(0) {
            return Ok(());
        }
        match effect {
            Effect::Write { offset, from, len } => {
                let bytes = gather(&self.memory, from).ok_or("a write from nowhere went well")?;
                self.disk[*offset as usize..][..*len as usize].copy_from_slice(&bytes);
                self.unknown[(offset / 512) as usize..((offset + len) / 512) as usize].fill(false);
            }
            Effect::Zero(_) => {
                for (offset, len) in mine {
                    self.disk[offset as usize..][..len as usize].fill(0);
                    self.unknown[(offset / 512) as usize..((offset + len) / 512) as usize].fill(false);
                }
            }
            Effect::Read { offset, len } => {
                let Some((f, _)) = &self.frontend else { return Ok(()) };
                let mut got = Vec::new();
                for &(addr, len) in &items[i].verdict.data {
                    got.extend(f.get(addr, len as usize));
                }
                let own = &items[i].verdict.data;
                let twice = (0..own.len()).any(|a| (0..a).any(|b| overlap(&own[a..=a], &own[b..=b])));
                for s in 0..if twice { 0 } else { (len / 512) as usize } {
                    let at = *offset as usize + s * 512;
                    if !self.unknown[at / 512] && got[s * 512..][..512] != self.disk[at..at + 512] {
                        return Err(format!("head {}: sector {} was read wrong", items[i].head, at / 512));
                    }
                }
            }
            Effect::None => {}
        }
        Ok(())
    }

    /// The rings stop: no head is missing, none came twice. Then the whole disk is compared.
    fn finish(&mut self, input: &Input) -> Result<(), String> {
        let Some((f, _)) = &mut self.frontend else { return Ok(()) };
        for q in 0..f.rings.len() {
            let base = f.stop_ring(q);
            let (used, seen) = (f.used_idx(q), f.rings[q].seen);
            if used != seen {
                return Err(format!("ring {q}: {} more used entries than heads", used.wrapping_sub(seen)));
            }
            if usize::from(f.rings[q].avail.wrapping_sub(base)) > usize::from(f.rings[q].size) / 2 {
                return Err(format!("ring {q} ends at {base} of {}", f.rings[q].avail));
            }
        }
        let now = match self.server.content() {
            Some(content) => content,
            None => {
                self.prepare(input)?;
                let Some((f, _)) = &mut self.frontend else { return Ok(()) };
                let mut all = Vec::with_capacity(DISK);
                while all.len() < DISK {
                    let len = (DISK - all.len()).min(512 << 10);
                    all.extend(f.read(0, all.len() as u64 / 512, len as u32));
                }
                for q in 0..f.rings.len() {
                    f.stop_ring(q);
                }
                // `read` used memory of its own.
                f.put(RAM, &self.memory.ram);
                f.put(DATA, &self.memory.data);
                all
            }
        };
        for s in 0..SECTORS as usize {
            let range = s * 512..s * 512 + 512;
            if self.unknown[s] {
                self.disk[range.clone()].copy_from_slice(&now[range]);
                self.unknown[s] = false;
            } else if self.disk[range.clone()] != now[range] {
                return Err(format!("sector {s} of the disk is wrong"));
            }
        }
        Ok(())
    }

    fn run(&mut self, input: &Input, whole: bool, seen: &mut Seen) -> Result<(), String> {
        self.prepare(input)?;
        let mut sane = true;
        for round in &input.rounds {
            sane = self.round(round, seen)?;
            if !sane {
                break;
            }
        }
        if sane {
            self.finish(input)?;
        } else {
            self.frontend = None;
        }
        if whole || !sane {
            self.frontend = None;
            self.server.check()?;
        }
        if !sane {
            // Whoever still wrote when the connection went has ended by now.
            self.prepare(&Input { rings: 1, size_bits: 8, ..input.clone() })?;
            self.unknown.fill(true);
            self.finish(&Input { rings: 1, size_bits: 8, ..input.clone() })?;
        }
        self.server.alive()
    }
}

/// Finds chains that write into what others use. True when one writes into tables or headers: then anything may happen
/// inside the guest's memory and to its disk.
fn muddle(items: &mut [Item]) -> bool {
    let mut loose = false;
    for i in 0..items.len() {
        for j in 0..items.len() {
            let (a, b) = (&items[i].verdict, &items[j].verdict);
            loose |= overlap(&a.writes, &b.reads);
            if i != j && overlap(&a.writes, &b.writes) {
                items[i].muddled = true;
            }
        }
        // A chain that names a byte twice decides for itself what stands there in the end.
        let own = &items[i].verdict.writes;
        if (0..own.len()).any(|a| (0..a).any(|b| overlap(&own[a..=a], &own[b..=b]))) {
            items[i].muddled = true;
        }
    }
    loose
}

/// Every byte outside of `writes` is as the driver left it.
fn untouched(maps: &[memmap2::MmapRaw; 2], memory: &Memory, mut writes: Vec<Range>) -> Result<(), String> {
    writes.sort_unstable();
    for (map, want, start) in [(&maps[0], &memory.ram, RAM), (&maps[1], &memory.data, DATA)] {
        let size = want.len() as u64;
        // SAFETY: the mapping is `size` bytes long and lives as long as the borrow; all requests have ended, so nobody
        // writes to it.
        let now = unsafe { std::slice::from_raw_parts(map.as_ptr(), want.len()) };
        let mut at = 0;
        let ends = writes.iter().copied().filter(|w| w.0 >= start && w.0 < start + size).chain([(start + size, 0)]);
        for (addr, len) in ends {
            let stop = addr - start;
            if at < stop && now[at as usize..stop as usize] != want[at as usize..stop as usize] {
                let byte = (at..stop).find(|&b| now[b as usize] != want[b as usize]);
                let addr = byte.map_or(0, |b| b + start);
                return Err(format!("memory at {addr:#x} was written, which no chain named"));
            }
            at = at.max(stop + len);
        }
    }
    Ok(())
}

impl Fuzz for Chains {
    type Input = Input;

    fn new(setup: &Setup) -> Chains {
        Chains { setup: setup.clone(), sessions: [None, None], runs: 0 }
    }

    fn fresh(&mut self, rng: &mut Rng) -> Input {
        requests::fresh(rng)
    }

    fn mutate(&mut self, rng: &mut Rng, input: &mut Input) {
        requests::mutate(rng, input);
    }

    fn run(&mut self, input: &Input) -> Outcome {
        let mut seen = Seen::default();
        let kind = if input.overlay { Disk::Overlay } else { Disk::Flat };
        let setup = &self.setup;
        let session = self.sessions[usize::from(input.overlay)].get_or_insert_with(|| Session::start(setup, kind));
        self.runs += 1;
        let whole = self.runs.is_multiple_of(CHECK_EVERY);
        let run = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| session.run(input, whole, &mut seen)));
        match run {
            Ok(Ok(())) => Ok(seen),
            Ok(Err(why)) => Err(session.server.last_words(&why)),
            Err(said) => {
                let said = said.downcast_ref::<String>().cloned().unwrap_or_default();
                Err(session.server.last_words(&format!("the frontend failed: {said}")))
            }
        }
    }

    fn recover(&mut self) {
        self.sessions = [None, None];
    }
}
