//! One scenario: its subjects take turns, round after round.

use crate::Result;
use crate::args::Args;
use crate::report::Row;
use crate::rig::Rig;
use crate::scenario::Scenario;
use crate::subject::{Kind, Running, Turn, attach, prepare, start};
use crate::throttle::Throttle;
use std::time::Duration;

/// The shortest turn with a throttle: it hands out bytes in slices.
const THROTTLED: f64 = 6.0;

/// Measures a scenario on the subjects; those with a process of their own if it is throttled.
///
/// # Errors
/// The first failure of a subject, with its name.
pub fn compare(args: &Args, rig: &Rig, scenario: &Scenario, throttle: Option<&Throttle>) -> Result<Vec<Row>> {
    let takes_part = |kind: &Kind| throttle.is_none() || *kind != Kind::Floor;
    let kinds: Vec<Kind> = args.subjects.iter().copied().filter(takes_part).collect();
    let mut rows: Vec<Row> = kinds.iter().map(|kind| Row::new(kind.name())).collect();
    if scenario.is_fresh() {
        for round in 0..args.rounds() {
            for (row, &kind) in rows.iter_mut().zip(&kinds) {
                row.turns.push(fresh(args, rig, scenario, kind, round, throttle).map_err(named(kind))?);
            }
        }
        return Ok(rows);
    }
    // What was just written lies in the page cache in other pieces than what a host has read from its disk.
    if !scenario.writes() {
        rig.drop_caches()?;
    }
    let mut running = Vec::new();
    for &kind in &kinds {
        prepare(kind, rig, scenario)?;
        let mut subject = start(kind, rig, scenario, &args.qsd, None)?;
        subject.verify().map_err(named(kind))?;
        subject.warm(scenario).map_err(named(kind))?;
        running.push(subject);
    }
    for (subject, &kind) in running.iter_mut().zip(&kinds) {
        subject.turn(scenario, u64::MAX >> 8, warm_up(args)).map_err(named(kind))?;
    }
    for round in 0..args.rounds() {
        for ((row, subject), &kind) in rows.iter_mut().zip(&mut running).zip(&kinds) {
            if scenario.writes() {
                rig.settle()?;
            }
            row.turns.push(turn(args, subject, scenario, round).map_err(named(kind))?);
        }
    }
    running.into_iter().for_each(Running::stop);
    Ok(rows)
}

/// Measures a scenario on a socket.
pub fn drive(args: &Args, socket: &std::path::Path, scenario: &Scenario) -> Result<Vec<Row>> {
    let mut row = Row::new("socket".into());
    let mut subject = attach(socket, args.pid, scenario)?;
    if !scenario.writes() {
        subject.warm(scenario)?;
    }
    subject.turn(scenario, u64::MAX >> 8, warm_up(args))?;
    for round in 0..args.rounds() {
        row.turns.push(turn(args, &mut subject, scenario, round)?);
    }
    subject.stop();
    Ok(vec![row])
}

/// A turn on a new server, with an empty cache or a new overlay.
fn fresh(
    args: &Args,
    rig: &Rig,
    scenario: &Scenario,
    kind: Kind,
    round: u32,
    throttle: Option<&Throttle>,
) -> Result<Turn> {
    prepare(kind, rig, scenario)?;
    if scenario.is_cold {
        rig.drop_caches()?;
    }
    let mut subject = start(kind, rig, scenario, &args.qsd, throttle)?;
    subject.warm(scenario)?;
    if scenario.writes() {
        rig.settle()?;
    }
    let turn = turn(args, &mut subject, scenario, round)?;
    subject.stop();
    if scenario.writes() {
        rig.settle()?;
    }
    Ok(turn)
}

fn turn(args: &Args, subject: &mut Running, scenario: &Scenario, round: u32) -> Result<Turn> {
    let seconds = if scenario.throttle.is_some() { args.seconds().max(THROTTLED) } else { args.seconds() };
    subject.turn(scenario, u64::from(round), Duration::from_secs_f64(seconds))
}

fn warm_up(args: &Args) -> Duration {
    Duration::from_secs_f64(args.seconds().min(0.2))
}

fn named(kind: Kind) -> impl Fn(String) -> String {
    move |why| format!("{}: {why}", kind.name())
}
