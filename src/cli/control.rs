//! `vmar control`: ask a running server.

use super::Common;
use super::output::{Table, print_json};
use crate::daemon::passing;
use crate::error::{Error, ErrorKind, Result};
use clap::Subcommand;
use serde_json::{Value, json};
use std::io::{self, BufRead, BufReader};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long an answer may take: a drain finishes what is in flight and flushes.
const ANSWER_TIME: Duration = Duration::from_secs(180);

/// Arguments of `vmar control`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The socket that the server was given by --control
    #[arg(value_name = "PATH")]
    socket: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// What is served, and in which state it is
    Status,
    /// What has happened to requests so far
    Statistics,
    /// Finish what is in flight, flush, close the disk, and take no more requests until 'resume'; the guest waits
    Drain,
    /// Go on after 'drain'
    Resume,
    /// Go on with the block map that the library has now; the guest notices nothing
    Reload,
    /// Make the disk larger and tell the guest
    Resize {
        /// Bytes; K, M, G and T are powers of 1024
        #[arg(value_name = "SIZE", value_parser = super::overlay::parse_size)]
        size: u64,
    },
}

/// Runs the verb.
pub fn run(common: &Common, args: Args) -> Result<()> {
    let (command, arguments) = match args.verb {
        Verb::Status => ("status", Value::Null),
        Verb::Statistics => ("statistics", Value::Null),
        Verb::Drain => ("drain", Value::Null),
        Verb::Resume => ("resume", Value::Null),
        Verb::Reload => ("reload", Value::Null),
        Verb::Resize { size } => ("resize", json!({"size": size})),
    };
    let answer = ask(&args.socket, &json!({"execute": command, "arguments": arguments}))?;
    match args.verb {
        _ if common.json => print_json(&answer),
        Verb::Status => {
            print_status(&answer);
            Ok(())
        }
        Verb::Statistics => {
            print_statistics(&answer);
            Ok(())
        }
        Verb::Reload => {
            println!("{}", reloaded(&answer));
            Ok(())
        }
        Verb::Resize { .. } if answer.get("told") == Some(&Value::Bool(false)) => {
            println!("the disk is larger; nobody could be told: a guest sees it when it starts next");
            Ok(())
        }
        Verb::Drain | Verb::Resume | Verb::Resize { .. } => Ok(()),
    }
}

fn ask(path: &Path, request: &Value) -> Result<Value> {
    let failed = |e| Error::io(path, "ask the server", e);
    let stream = UnixStream::connect(path).map_err(failed)?;
    stream.set_read_timeout(Some(ANSWER_TIME)).map_err(failed)?;
    ask_by(&stream, path, request, &[])
}

/// Asks over a connection to the server whose control socket is at `path`; passes descriptors along.
pub(super) fn ask_by(stream: &UnixStream, path: &Path, request: &Value, fds: &[BorrowedFd<'_>]) -> Result<Value> {
    let failed = |e: io::Error| match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            Error::file(ErrorKind::Busy, path, "the server does not answer")
                .mend("see whether its disk or its process hangs")
        }
        _ => Error::io(path, "ask the server", e),
    };
    passing::send(stream, format!("{request}\n").as_bytes(), fds).map_err(failed)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).map_err(failed)?;
    let answer: Value = serde_json::from_str(&line).map_err(|e| failed(e.into()))?;
    match (answer.get("return"), answer.pointer("/error/desc").and_then(Value::as_str)) {
        (Some(value), _) => Ok(value.clone()),
        (None, Some(why)) => Err(Error::file(ErrorKind::Io, path, why)),
        (None, None) => Err(Error::file(ErrorKind::Corrupt, path, "gives an answer that makes no sense")),
    }
}

/// What a human wants to know of the answer to 'reload'.
pub(super) fn reloaded(answer: &Value) -> String {
    let map = |which: &str| {
        let map = &answer[which];
        let images = map["targets"].as_array().map_or(0, Vec::len);
        format!("{} entries into {images} image{}", map["entries"], if images == 1 { "" } else { "s" })
    };
    let rest = if answer["closed"] == Value::Bool(true) { "" } else { "; requests in flight still use the old one" };
    format!("map with {}, before {}{rest}", map("new"), map("old"))
}

fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        Value::Object(map) if map.contains_key("entries") => {
            let images = map.get("targets").and_then(Value::as_array).map_or(0, Vec::len);
            format!("{} entries into {images} images", text(&value["entries"]))
        }
        Value::Array(rings) => {
            let ring = |r: &Value| {
                let running = if r["running"] == Value::Bool(true) { "running" } else { "stopped" };
                format!("{} {running}, {} in flight", text(&r["queue"]), text(&r["in_flight"]))
            };
            rings.iter().map(ring).collect::<Vec<_>>().join("; ")
        }
        other => other.to_string(),
    }
}

fn print_status(status: &Value) {
    let mut table = Table::new(&["status", ""], 2);
    for (name, value) in status.as_object().into_iter().flatten() {
        table.row(vec![name.clone(), text(value)]);
    }
    table.print();
}

fn print_statistics(statistics: &Value) {
    let total = &statistics["total"];
    let mut table = Table::new(&["requests", "operations", "bytes", "errors", "waited", "mean wait/us"], 1);
    for name in ["reads", "writes", "discards", "write_zeroes", "flushes", "other"] {
        let class = &total[name];
        let waited: u64 = class["waits"].as_array().into_iter().flatten().filter_map(Value::as_u64).sum();
        let mean = class["wait_ns"].as_u64().unwrap_or(0) / 1000 / waited.max(1);
        let cell = |field: &str| text(&class[field]);
        table.row(vec![
            name.into(),
            cell("operations"),
            cell("bytes"),
            cell("errors"),
            waited.to_string(),
            mean.to_string(),
        ]);
    }
    table.print();
    let mut table = Table::new(&["bytes read from", ""], 1);
    for (name, value) in total["read_bytes_from"].as_object().into_iter().flatten() {
        table.row(vec![name.clone(), text(value)]);
    }
    table.print();
    if let Some(prefetch) = statistics["prefetch"].as_object() {
        let mut table = Table::new(&["prefetch", ""], 1);
        for (name, value) in prefetch {
            table.row(vec![name.clone(), text(value)]);
        }
        table.print();
    }
}
