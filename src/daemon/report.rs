//! What the control socket tells: status and statistics as JSON (see CONTROL.md).

use super::home::Outline;
use super::{Served, reload};
use crate::device::stats::{Class, Counter, QueueStats, WAITS_US};
use serde_json::{Map, Value, json};
use std::time::Duration;

/// How long a status waits for a connection that is busy; it then tells what it knows without it.
const BUSY_TIME: Duration = Duration::from_millis(200);

/// The answer to 'status'.
pub fn status(served: &Served, num_queues: u16) -> Value {
    let drive = &served.drive;
    let ledger = drive.ledger();
    let geometry = drive.geometry(num_queues);
    let connection = served.hub.with_handler(BUSY_TIME, |handler| handler.map(|h| h.summary()));
    let (connected, busy, summary) = match connection {
        Ok(summary) => (summary.is_some(), false, summary),
        Err(_) => (true, true, None),
    };
    let running = |index: usize| summary.as_ref().and_then(|s| s.running.get(index).copied());
    let rings: Vec<Value> = ledger
        .queues()
        .iter()
        .enumerate()
        .filter(|(index, queue)| running(*index) == Some(true) || queue.begun.get() > 0)
        .map(|(index, queue)| json!({"queue": index, "running": running(index), "in_flight": queue.in_flight()}))
        .collect();
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "pid": std::process::id(),
        "image": served.names.image,
        "overlay": served.names.overlay,
        "blk_file": served.names.blk_file,
        "map": drive.image().map(|base| reload::outline(&Outline::of(&base.get()))),
        "lease": served.home.as_ref().and_then(|home| home.lease()),
        "size": geometry.size,
        "read_only": geometry.read_only,
        "write_cache": geometry.write_cache,
        "active": drive.active().is_some(),
        "connected": connected,
        "busy": busy,
        "drained": served.hub.paused(),
        "features": summary.as_ref().map(|s| format!("{:#x}", s.features)),
        "rings": rings,
        "on_error": ledger.on_error().name(),
        "retrying": ledger.retrying(),
        "stuck": ledger.stuck(),
        "flush_failed": ledger.flush_failed(),
    })
}

/// The answer to 'statistics'.
pub fn statistics(served: &Served) -> Value {
    let ledger = served.drive.ledger();
    let queues: Vec<Value> = ledger
        .queues()
        .iter()
        .enumerate()
        .filter(|(_, queue)| queue.begun.get() > 0)
        .map(|(index, queue)| {
            let mut value = of_queues(&[queue]);
            value.insert("queue".into(), index.into());
            Value::Object(value)
        })
        .collect();
    let all: Vec<&QueueStats> = ledger.queues().iter().collect();
    let prefetch = served.prefetch.as_ref().map(|prefetch| {
        let p = prefetch.progress();
        json!({"state": p.state.name(), "planned": p.planned, "read": p.read, "cached": p.cached, "left": p.left})
    });
    json!({"waits_us": WAITS_US, "total": of_queues(&all), "queues": queues, "prefetch": prefetch})
}

/// The sums over some queues.
fn of_queues(queues: &[&QueueStats]) -> Map<String, Value> {
    let sum = |counter: &dyn Fn(&QueueStats) -> &Counter| -> u64 { queues.iter().map(|q| counter(q).get()).sum() };
    let mut out = Map::new();
    for class in Class::ALL {
        let waits: Vec<u64> = (0..=WAITS_US.len()).map(|i| sum(&|q| &q.by_class(class).waits[i])).collect();
        let value = json!({
            "operations": sum(&|q| &q.by_class(class).operations),
            "bytes": sum(&|q| &q.by_class(class).bytes),
            "errors": sum(&|q| &q.by_class(class).errors),
            "waits": waits,
            "wait_ns": sum(&|q| &q.by_class(class).wait_ns),
        });
        out.insert(class.name().into(), value);
    }
    let sources = json!({
        "own_image": sum(&|q| &q.own_bytes),
        "other_images": sum(&|q| &q.shared_bytes),
        "overlay": sum(&|q| &q.overlay_bytes),
        "zeros": sum(&|q| &q.zero_bytes),
    });
    out.insert("read_bytes_from".into(), sources);
    out.insert("in_flight".into(), queues.iter().map(|q| q.in_flight()).sum::<u64>().into());
    out.insert("retries".into(), sum(&|q| &q.retries).into());
    out
}
