//! The control socket: a line of JSON in, a line of JSON out (see CONTROL.md). One thread, never in the disk's way.

use super::socket::Listening;
use super::{Options, Served, passing, reload, report};
use crate::error::{Error, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Value, json};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of the longest line that is read.
pub const LINE_MAX: usize = 64 << 10;
const LINE_LONG: usize = LINE_MAX + 1;

/// Descriptors that may come with a line: a map, and the images that it points to.
pub const DESCRIPTORS_MAX: usize = 1024;
const DESCRIPTORS_MANY: usize = DESCRIPTORS_MAX + 1;

/// Clients at a time; more wait to be accepted.
const CLIENTS_MAX: usize = 8;

/// How long a client that does not read its replies holds up the others.
const SEND_TIME: Duration = Duration::from_secs(1);

/// How long the process that takes over may need to open the disk (it waits up to 4.5 s for its lock).
pub const TAKEN_TIME: Duration = Duration::from_secs(15);

/// How much longer than its drain and its flush a stop may take.
const STOP_SLACK: Duration = Duration::from_secs(5);

/// A socket that listens and is not served yet.
#[derive(Debug)]
pub struct Control {
    listening: Listening,
}

/// Removes the file of a control socket at the end, unless another server has taken over.
#[derive(Debug)]
pub struct ControlFile(Arc<Listening>);

impl Drop for ControlFile {
    fn drop(&mut self) {
        self.0.forget_file(true);
    }
}

struct Client {
    stream: UnixStream,
    bytes: Vec<u8>,
    /// What has come with the line that is not whole yet.
    fds: Vec<OwnedFd>,
    /// Some were lost.
    lost: bool,
}

/// A request that cannot be served: class and description.
struct Refused(&'static str, String);

struct Server {
    listening: Arc<Listening>,
    served: Arc<Served>,
    num_queues: u16,
    drain_time: Duration,
    clients: Vec<Client>,
}

impl Control {
    /// Listens on `path`, for its owner alone.
    ///
    /// # Errors
    /// Those of [`Listening::bind`].
    pub fn bind(path: &Path) -> Result<Self> {
        Ok(Control { listening: Listening::bind_private(path)? })
    }

    /// Serves it on a thread of its own, to the end of the process.
    pub fn start(self, served: Arc<Served>, options: &Options) -> Result<ControlFile> {
        let listening = Arc::new(self.listening);
        let failed = |e| Error::io(listening.path().unwrap_or(Path::new("")), "serve the control socket", e);
        listening.set_nonblocking().map_err(failed)?;
        let (num_queues, drain_time) = (options.num_queues, options.drain_time);
        let server = Server { listening: Arc::clone(&listening), served, num_queues, drain_time, clients: Vec::new() };
        std::thread::Builder::new().name("vmar-control".into()).spawn(move || server.run()).map_err(failed)?;
        Ok(ControlFile(listening))
    }
}

impl Server {
    fn run(mut self) {
        loop {
            let mut fds: Vec<PollFd<'_>> = self.clients.iter().map(|c| PollFd::new(&c.stream, PollFlags::IN)).collect();
            if self.clients.len() < CLIENTS_MAX {
                fds.push(PollFd::from_borrowed_fd(self.listening.as_fd(), PollFlags::IN));
            }
            if let Err(e) = poll(&mut fds, None)
                && e != rustix::io::Errno::INTR
            {
                log::error!("the control socket ends: poll failed: {e}");
                return;
            }
            let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            let accepts = ready.get(self.clients.len()) == Some(&true);
            let clients = std::mem::take(&mut self.clients);
            for (client, ready) in clients.into_iter().zip(ready) {
                if ready { self.clients.extend(self.serve(client)) } else { self.clients.push(client) }
            }
            if accepts {
                self.accept();
            }
        }
    }

    fn accept(&mut self) {
        match self.listening.accept() {
            Ok(Some(stream)) => {
                let set = stream.set_nonblocking(false).and_then(|()| stream.set_write_timeout(Some(SEND_TIME)));
                if set.is_ok() {
                    self.clients.push(Client { stream, bytes: Vec::new(), fds: Vec::new(), lost: false });
                }
            }
            Ok(None) => {}
            Err(e) => {
                log::error!("cannot accept a control connection now: {e}");
                std::thread::sleep(SEND_TIME);
            }
        }
    }

    /// Reads what a client has sent, and answers each line; none when the client has gone.
    fn serve(&self, mut client: Client) -> Option<Client> {
        let mut bytes = [0; 4096];
        match passing::receive(&client.stream, &mut bytes, &mut client.fds) {
            Ok(came) if came.bytes == 0 => return None,
            Ok(came) => {
                client.bytes.extend_from_slice(&bytes[..came.bytes]);
                client.lost |= came.lost;
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => return Some(client),
            Err(_) => return None,
        }
        while let Some(end) = client.bytes.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = client.bytes.drain(..=end).collect();
            if !line.trim_ascii().is_empty() {
                self.answer(&mut client, &line).ok()?;
            }
        }
        let too_much = match (client.bytes.len(), client.fds.len()) {
            (LINE_LONG.., _) => format!("a line has at most {LINE_MAX} bytes"),
            (_, DESCRIPTORS_MANY..) => format!("a line comes with at most {DESCRIPTORS_MAX} descriptors"),
            _ => return Some(client),
        };
        let _ = reply(&client, &error(None, &Refused("GenericError", too_much)));
        None
    }

    fn answer(&self, client: &mut Client, line: &[u8]) -> io::Result<()> {
        // Those of this line; whatever becomes of it, they are closed in the end.
        let fds = std::mem::take(&mut client.fds);
        let lost = std::mem::take(&mut client.lost);
        let request: Value = match serde_json::from_slice(line) {
            Ok(request) => request,
            Err(e) => return reply(client, &error(None, &Refused("GenericError", format!("no JSON: {e}")))),
        };
        let id = request.get("id").cloned();
        let command = request.get("execute").and_then(Value::as_str).unwrap_or_default();
        if command == "hand-over" {
            return self.hand_over(client, id);
        }
        let arguments = request.get("arguments").unwrap_or(&Value::Null);
        let done = match command {
            "reload" if lost => Err(Refused("GenericError", reload::LOST.into())),
            "reload" => {
                reload::reload(&self.served, arguments, fds).map_err(|e| Refused("GenericError", e.to_string()))
            }
            _ => self.execute(command, arguments),
        };
        reply(
            client,
            &done.map_or_else(|e| error(id.clone(), &e), |value| with_id(json!({"return": value}), id.clone())),
        )
    }

    fn execute(&self, command: &str, arguments: &Value) -> std::result::Result<Value, Refused> {
        let served = &self.served;
        match command {
            "status" => Ok(report::status(served, self.num_queues)),
            "statistics" => Ok(report::statistics(served)),
            "drain" => self.drain().map(|()| json!({})),
            "resume" => self.resume().map(|()| json!({})),
            "resize" => {
                let Some(size) = arguments.get("size").and_then(Value::as_u64) else {
                    return Err(Refused("GenericError", "'resize' needs the argument 'size', in bytes".into()));
                };
                let told = served.resize(size).map_err(|e| Refused("GenericError", e.to_string()))?;
                Ok(json!({"size": size, "told": told}))
            }
            "" => Err(Refused("GenericError", "a request is {\"execute\": COMMAND}".into())),
            _ => Err(Refused("CommandNotFound", format!("there is no command '{command}'"))),
        }
    }

    /// How long a stop may take before something is wrong.
    fn stop_time(&self) -> Duration {
        self.drain_time * 2 + STOP_SLACK
    }

    fn drain(&self) -> std::result::Result<(), Refused> {
        let hub = &self.served.hub;
        hub.pause(true);
        self.served.stop_prefetch();
        let stopped = hub.with_handler(self.stop_time(), |handler| match handler {
            Some(handler) => handler.pause().map_err(|e| e.to_string()),
            None => Ok(()),
        });
        let closed = stopped.and_then(|stopped| stopped).and_then(|()| {
            // Without a connection, or when it had nothing running: the disk may still be open.
            super::let_go(&self.served, self.drain_time).map_err(|e| e.to_string())
        });
        closed.map_err(|e| Refused("GenericError", format!("no request is taken any more, but the drain failed: {e}")))
    }

    fn resume(&self) -> std::result::Result<(), Refused> {
        let hub = &self.served.hub;
        hub.pause(false);
        let resumed = hub.with_handler(self.stop_time(), |handler| match handler {
            Some(handler) => handler.resume().map_err(|e| {
                // Also the rings that could start: what is said to be drained is.
                hub.pause(true);
                let _ = handler.pause();
                e.to_string()
            }),
            None => Ok(()),
        });
        resumed.and_then(|resumed| resumed).map_err(|e| {
            hub.pause(true);
            Refused("GenericError", format!("the disk stays drained: {e}"))
        })
    }

    /// Ends serving, passes the listening socket on, and ends the process if it is taken; else goes on.
    fn hand_over(&self, client: &mut Client, id: Option<Value>) -> io::Result<()> {
        let limit = self.stop_time() + super::CLOSE_TIME;
        let offer = self.served.hub.ask_for_socket(limit).and_then(|offer| match offer.listening {
            Ok(listening) => Ok((listening, offer.back)),
            Err(e) => Err(e),
        });
        let (listening, back) = match offer {
            Ok(offer) => offer,
            Err(e) => return reply(client, &error(id, &Refused("GenericError", e))),
        };
        let answer = with_id(json!({"return": {"socket": listening.path()}}), id);
        match passing::send(&client.stream, &line_of(&answer), &[listening.as_fd()])
            .and_then(|()| wait_for_taken(client))
        {
            Ok(()) => {
                self.listening.forget_file(true);
                listening.forget_file(false);
                let _ = reply(client, &json!({"return": {}}));
                let _ = back.send(None);
            }
            Err(e) => {
                log::error!("nobody has taken over ({e}): this server goes on");
                let _ = back.send(Some(listening));
            }
        }
        Ok(())
    }
}

/// The process that takes over says so when it has opened the disk.
fn wait_for_taken(client: &mut Client) -> io::Result<()> {
    let deadline = Instant::now() + TAKEN_TIME;
    loop {
        if let Some(end) = client.bytes.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = client.bytes.drain(..=end).collect();
            let request: Value = serde_json::from_slice(&line)?;
            return match request.get("execute").and_then(Value::as_str) {
                Some("taken") => Ok(()),
                _ => Err(io::Error::other("it said something else")),
            };
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let left =
            Timespec { tv_sec: i64::try_from(left.as_secs()).unwrap_or(0), tv_nsec: i64::from(left.subsec_nanos()) };
        match poll(&mut [PollFd::new(&client.stream, PollFlags::IN)], Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        }
        let mut bytes = [0; 4096];
        match client.stream.read(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) if client.bytes.len() + n <= LINE_MAX => client.bytes.extend_from_slice(&bytes[..n]),
            Ok(_) => return Err(io::ErrorKind::InvalidData.into()),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

fn with_id(mut value: Value, id: Option<Value>) -> Value {
    if let (Some(object), Some(id)) = (value.as_object_mut(), id) {
        object.insert("id".into(), id);
    }
    value
}

fn error(id: Option<Value>, refused: &Refused) -> Value {
    with_id(json!({"error": {"class": refused.0, "desc": refused.1}}), id)
}

fn line_of(value: &Value) -> Vec<u8> {
    let mut line = value.to_string().into_bytes();
    line.push(b'\n');
    line
}

fn reply(client: &Client, value: &Value) -> io::Result<()> {
    (&client.stream).write_all(&line_of(value))
}
