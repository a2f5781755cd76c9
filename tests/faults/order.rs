//! Single orders of events: an operation is held until something else has happened.

use crate::power::another_boot;
use crate::rig::{Rig, SECTOR, fill, iobufs, unit, units};
use std::fs;
use std::io;
use std::sync::{Arc, Condvar, Mutex};
use vmar::io::fault::{Faults, Op};
use vmar::overlay::Overlay;

/// Holds the first operation of a kind, once the gate is shut, until it is opened again; lists all that change the file.
#[derive(Debug)]
struct Gate {
    holds: fn(&Op<'_>) -> bool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    shut: bool,
    holding: bool,
    ended: Vec<&'static str>,
}

impl Gate {
    fn new(holds: fn(&Op<'_>) -> bool) -> Arc<Gate> {
        Arc::new(Gate { holds, state: Mutex::default(), changed: Condvar::new() })
    }

    fn shut(&self) {
        self.state.lock().unwrap().shut = true;
    }

    fn wait_for_someone(&self) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |s| !s.holding).unwrap());
    }

    fn open(&self) {
        self.state.lock().unwrap().shut = false;
        self.changed.notify_all();
    }

    fn ended(&self) -> Vec<&'static str> {
        std::mem::take(&mut self.state.lock().unwrap().ended)
    }
}

impl Faults for Gate {
    fn run(&self, op: &Op<'_>, go: &mut dyn FnMut(usize) -> io::Result<usize>) -> io::Result<usize> {
        let name = match op {
            Op::Read { .. } | Op::ReadCached { .. } => return go(usize::MAX),
            Op::Write { .. } => "write",
            Op::Punch { .. } => "punch",
            Op::SyncData | Op::SyncAll => "sync",
        };
        let mut state = self.state.lock().unwrap();
        if state.shut && !state.holding && (self.holds)(op) {
            state.holding = true;
            self.changed.notify_all();
            state = self.changed.wait_while(state, |s| s.shut).unwrap();
            state.holding = false;
        }
        drop(state);
        let result = go(usize::MAX);
        self.state.lock().unwrap().ended.push(name);
        result
    }
}

fn rig() -> Rig {
    Rig::new(1 << 20, 1 << 20, 1 << 20)
}

fn write(o: &Overlay, rig: &Rig, author: u64, sector: u64, sectors: usize) {
    let mut mem = vec![0; sectors * SECTOR];
    fill(&mut mem, author, sector);
    o.write(sector * SECTOR as u64, &iobufs(&mut mem), rig).unwrap();
}

/// The author of a sector if the power is cut now and everything that was done reaches the disk.
fn after_power_cut(rig: &Rig, sector: u64) -> u64 {
    let mut file = fs::read(&rig.overlay).unwrap();
    another_boot(&mut file);
    let path = rig.dir().join("cut.qcow2");
    fs::write(&path, file).unwrap();
    author(rig, &rig.open_copy(&path, true).unwrap(), sector)
}

fn author(rig: &Rig, o: &Overlay, sector: u64) -> u64 {
    let all = rig.read_all(o);
    let found = units(&all[sector as usize * SECTOR..]).next().unwrap();
    assert!(found == 0 || found == unit(found >> 20, sector));
    found >> 20
}

#[test]
fn bits_set_while_a_flush_waits_for_its_data_stay_behind() {
    let rig = rig();
    let gate = Gate::new(|op| matches!(op, Op::SyncData));
    let o = rig.open(Some(gate.clone()), false).unwrap();
    write(&o, &rig, 1, 0, 4);
    gate.shut();
    std::thread::scope(|s| {
        let flush = s.spawn(|| o.flush());
        gate.wait_for_someone();
        // In the cluster whose word the flush has in hand, and in another.
        write(&o, &rig, 2, 8, 4);
        write(&o, &rig, 3, 1000, 4);
        gate.open();
        flush.join().unwrap().unwrap();
    });
    assert_eq!([0, 8, 1000].map(|s| author(&rig, &o, s)), [1, 2, 3]);
    assert_eq!([0, 8, 1000].map(|s| after_power_cut(&rig, s)), [1, 0, 0]);
    o.flush().unwrap();
    assert_eq!([0, 8, 1000].map(|s| after_power_cut(&rig, s)), [1, 2, 3]);
}

#[test]
fn a_flush_behind_one_that_began_earlier_does_its_own() {
    let rig = rig();
    let gate = Gate::new(|op| matches!(op, Op::SyncData));
    let o = rig.open(Some(gate.clone()), false).unwrap();
    write(&o, &rig, 1, 0, 4);
    gate.shut();
    std::thread::scope(|s| {
        let first = s.spawn(|| o.flush());
        gate.wait_for_someone();
        write(&o, &rig, 2, 8, 4);
        // It cannot end before the first one; and the first one has not seen the second write.
        let second = s.spawn(|| o.flush());
        gate.open();
        first.join().unwrap().unwrap();
        second.join().unwrap().unwrap();
    });
    assert_eq!([0, 8].map(|s| after_power_cut(&rig, s)), [1, 2]);
}

#[test]
fn a_discard_waits_for_the_write_that_it_meets() {
    let rig = rig();
    let gate = Gate::new(|op| matches!(op, Op::Write { .. }));
    let o = rig.open(Some(gate.clone()), false).unwrap();
    gate.shut();
    gate.ended();
    std::thread::scope(|s| {
        let writer = s.spawn(|| write(&o, &rig, 1, 2, 8));
        gate.wait_for_someone();
        let discard = s.spawn(|| o.write_zeroes(0, 16 * SECTOR as u64, true, &rig));
        // Elsewhere everything goes on.
        write(&o, &rig, 5, 100, 3);
        assert_eq!(gate.ended(), ["write"]);
        gate.open();
        writer.join().unwrap();
        discard.join().unwrap().unwrap();
    });
    assert_eq!(gate.ended(), ["write", "punch"]);
    assert_eq!([0, 2, 9, 100].map(|s| author(&rig, &o, s)), [0, 0, 0, 5]);
    assert!(units(&rig.read_all(&o)[..16 * SECTOR]).all(|u| u == 0));
}
