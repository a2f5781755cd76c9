//! Makes a failing input smaller by dropping steps: it knows JSON and nothing of what the input means.

use serde_json::Value;
use std::time::{Duration, Instant};

/// The smallest input found within `limit` for which `fails` still says yes.
pub fn shrink(mut value: Value, limit: Duration, mut fails: impl FnMut(&Value) -> bool) -> Value {
    let end = Instant::now() + limit;
    let mut smaller = true;
    while smaller && Instant::now() < end {
        smaller = false;
        for path in paths(&value) {
            smaller |= one(&mut value, &path, end, &mut fails);
        }
    }
    value
}

/// Pointers to everything in it, the outermost first.
fn paths(value: &Value) -> Vec<String> {
    let mut out = vec![String::new()];
    let mut i = 0;
    while i < out.len() {
        let here = out[i].clone();
        match value.pointer(&here) {
            Some(Value::Array(items)) => out.extend((0..items.len()).map(|n| format!("{here}/{n}"))),
            Some(Value::Object(map)) => out.extend(map.keys().map(|k| format!("{here}/{k}"))),
            _ => {}
        }
        i += 1;
    }
    out
}

fn one(value: &mut Value, path: &str, end: Instant, fails: &mut impl FnMut(&Value) -> bool) -> bool {
    let mut done = false;
    // Something dropped before may have taken this with it.
    let mut chunk = match value.pointer(path) {
        Some(Value::Array(items)) => items.len(),
        Some(Value::String(text)) => text.len() / 2 * 2,
        Some(Value::Number(n)) if n.as_u64() != Some(0) => 1,
        Some(Value::Bool(true)) => 1,
        _ => 0,
    };
    while chunk > 0 && Instant::now() < end {
        let mut at = 0;
        while Instant::now() < end {
            let mut candidate = value.clone();
            let Some(place) = candidate.pointer_mut(path) else { return done };
            let more = match place {
                Value::Array(items) => {
                    let stop = (at + chunk).min(items.len());
                    items.drain(at.min(stop)..stop).count() > 0
                }
                // Bytes in hexadecimal: whole bytes are dropped.
                Value::String(text) if text.is_ascii() => {
                    let stop = (at + chunk).min(text.len());
                    let some = at < stop;
                    text.replace_range(at.min(stop)..stop, "");
                    some
                }
                Value::Number(_) if at == 0 => {
                    *place = Value::from(0);
                    true
                }
                Value::Bool(_) if at == 0 => {
                    *place = Value::Bool(false);
                    true
                }
                _ => false,
            };
            if !more {
                break;
            }
            if fails(&candidate) {
                *value = candidate;
                done = true;
                if !matches!(value.pointer(path), Some(Value::Array(_) | Value::String(_))) {
                    return done;
                }
            } else {
                at += chunk;
            }
        }
        let is_text = matches!(value.pointer(path), Some(Value::String(_)));
        chunk = if is_text { (chunk / 2) & !1 } else { chunk / 2 };
    }
    done
}
