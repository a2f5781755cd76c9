//! A QEMU as its monitor shows it: states, settings, a migration to a socket, and one from a socket.

use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What it does when it is told to migrate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Writes {
    All,
    /// So many bytes, and then it says that it has failed, and why.
    Fails(usize, &'static str),
    /// So many bytes, and then the process ends.
    Dies(usize),
    /// So many bytes, and then it closes the socket, and says that all is well.
    Cut(usize),
    /// So many bytes, and then nothing more.
    Stops(usize),
    /// It does not even connect.
    NeverConnects,
}

/// How it takes a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Takes {
    All,
    /// So many bytes, and then it has failed.
    Fails(usize),
    /// So many bytes, and then the process ends.
    Dies(usize),
}

#[derive(Debug)]
pub struct State {
    pub status: String,
    pub migration: Option<String>,
    pub why: Option<String>,
    pub capabilities: BTreeMap<String, bool>,
    pub parameters: Value,
    /// The commands that came.
    pub told: Vec<String>,
    pub stream: Vec<u8>,
    pub writes: Writes,
    pub takes: Takes,
    /// The command that gets no answer; the greeting is one, too.
    pub mute: Option<&'static str>,
    pub name: Option<String>,
    /// Its own disks.
    pub blocks: Value,
    /// What it was given by a migration.
    pub got: Vec<u8>,
    /// Whoever wrote it has closed the socket.
    drained: bool,
    client: Option<UnixStream>,
    ended: bool,
}

/// A running one; it ends when this is dropped.
pub struct Qemu {
    pub path: PathBuf,
    state: Arc<Mutex<State>>,
    thread: Option<JoinHandle<()>>,
}

impl Qemu {
    fn start(path: PathBuf, status: &str, stream: &[u8]) -> Qemu {
        let on = |name: &str| matches!(name, "return-path" | "xbzrle" | "events");
        let names = ["return-path", "xbzrle", "events", "multifd", "postcopy-ram", "auto-converge"];
        let state = State {
            status: status.into(),
            migration: None,
            why: None,
            capabilities: names.iter().map(|name| (name.to_string(), on(name))).collect(),
            parameters: json!({"max-bandwidth": 134_217_728, "tls-creds": "", "downtime-limit": 300}),
            told: Vec::new(),
            stream: stream.to_vec(),
            writes: Writes::All,
            takes: Takes::All,
            mute: None,
            name: Some("web".into()),
            blocks: json!([{"device": "ide1-cd0", "inserted": {"ro": true, "file": "/seed.iso"}}, {"device": "floppy0"}]),
            got: Vec::new(),
            drained: false,
            client: None,
            ended: false,
        };
        let state = Arc::new(Mutex::new(state));
        let listener = UnixListener::bind(&path).unwrap();
        let serves = Arc::clone(&state);
        let thread = thread::spawn(move || serve(&listener, &serves));
        Qemu { path, state, thread: Some(thread) }
    }

    /// A VM that runs, and whose stream this is.
    pub fn running(path: PathBuf, stream: &[u8]) -> Qemu {
        Qemu::start(path, "running", stream)
    }

    /// One that waits for a VM ('-incoming defer -S').
    pub fn waiting(path: PathBuf, stream_bytes: usize) -> Qemu {
        Qemu::start(path, "inmigrate", &vec![0; stream_bytes])
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// All that it was given, when whoever wrote it has closed the socket.
    pub fn got(&self) -> Vec<u8> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !self.state().drained {
            assert!(Instant::now() < deadline, "nobody brings a VM, or the socket stays open");
            thread::sleep(Duration::from_millis(2));
        }
        self.state().got.clone()
    }

    /// As [`Qemu::waiting`], but at this socket ('-incoming unix:PATH').
    pub fn waits_at(&self, path: &Path) {
        listen(path, &self.state).unwrap();
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let client = {
            let mut state = self.state();
            state.ended = true;
            state.client.take()
        };
        if let Some(client) = client {
            let _ = client.shutdown(Shutdown::Both);
        }
        let _ = UnixStream::connect(&self.path);
        let _ = self.thread.take().unwrap().join();
        let _ = std::fs::remove_file(&self.path);
    }
}

/// One client after the other.
fn serve(listener: &UnixListener, state: &Arc<Mutex<State>>) {
    for client in listener.incoming() {
        let client = client.unwrap();
        {
            let mut state = state.lock().unwrap();
            if state.ended {
                return;
            }
            state.client = Some(client.try_clone().unwrap());
        }
        let _ = talk(&client, state);
        if state.lock().unwrap().ended {
            return;
        }
    }
}

fn talk(client: &UnixStream, state: &Arc<Mutex<State>>) -> std::io::Result<()> {
    let mut out = client;
    let version = json!({"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""});
    if state.lock().unwrap().mute != Some("greeting") {
        writeln!(out, "{}", json!({"QMP": {"version": version, "capabilities": ["oob"]}}))?;
    }
    for line in BufReader::new(client).lines() {
        let said: Value = serde_json::from_str(&line?)?;
        let command = said["execute"].as_str().unwrap_or_default().to_string();
        let mut answer = {
            let mut now = state.lock().unwrap();
            now.told.push(command.clone());
            if now.mute == Some(command.as_str()) {
                continue;
            }
            match execute(&mut now, state, &command, &said["arguments"]) {
                Ok(value) => json!({"return": value}),
                Err(why) => json!({"error": {"class": "GenericError", "desc": why}}),
            }
        };
        if !said["id"].is_null() {
            answer["id"] = said["id"].clone();
        }
        if matches!(command.as_str(), "stop" | "cont") && answer["error"].is_null() {
            let event = if command == "stop" { "STOP" } else { "RESUME" };
            writeln!(out, "{}", json!({"event": event, "timestamp": {"seconds": 1, "microseconds": 2}}))?;
        }
        writeln!(out, "{answer}")?;
    }
    Ok(())
}

fn execute(now: &mut State, state: &Arc<Mutex<State>>, command: &str, with: &Value) -> Result<Value, String> {
    let under_way = matches!(now.migration.as_deref(), Some("setup" | "active" | "cancelling" | "device"));
    let socket = || PathBuf::from(with["uri"].as_str().unwrap().strip_prefix("unix:").unwrap());
    match command {
        "query-status" => return Ok(json!({"status": now.status, "running": now.status == "running"})),
        "query-name" => return Ok(now.name.as_ref().map_or(json!({}), |name| json!({"name": name}))),
        "query-block" => return Ok(now.blocks.clone()),
        "query-migrate-capabilities" => {
            let of = |(name, on): (&String, &bool)| json!({"capability": name, "state": on});
            return Ok(now.capabilities.iter().map(of).collect());
        }
        "query-migrate-parameters" => return Ok(now.parameters.clone()),
        "query-migrate" => {
            let Some(status) = &now.migration else { return Ok(json!({})) };
            let why = now.why.as_ref().map_or(json!({}), |why| json!({"error-desc": why}));
            let mut answer = json!({"status": status});
            answer.as_object_mut().unwrap().extend(why.as_object().unwrap().clone());
            return Ok(answer);
        }
        "migrate-set-capabilities" if under_way => return Err("There's a migration process in progress".into()),
        "migrate-set-capabilities" => {
            for one in with["capabilities"].as_array().unwrap() {
                let name = one["capability"].as_str().unwrap().to_string();
                now.capabilities.insert(name, one["state"].as_bool().unwrap());
            }
        }
        "migrate-set-parameters" => {
            for (name, value) in with.as_object().unwrap() {
                now.parameters[name] = value.clone();
            }
        }
        "stop" if now.status == "running" => now.status = "paused".into(),
        "cont" if now.status == "inmigrate" || under_way => return Err("it is not for that yet".into()),
        "cont" => now.status = "running".into(),
        "migrate" if now.status == "inmigrate" => return Err("Guest is waiting for an incoming migration".into()),
        "migrate" if under_way => return Err("There's a migration process in progress".into()),
        "migrate" => {
            let (to, state, before) = (socket(), Arc::clone(state), now.status.clone());
            (now.migration, now.why) = (Some("active".into()), None);
            now.status = "finish-migrate".into();
            thread::spawn(move || migrate(&to, &state, before));
        }
        "migrate_cancel" if under_way => now.migration = Some("cancelling".into()),
        "migrate-incoming" if now.status != "inmigrate" => return Err("'-incoming' was not specified".into()),
        "migrate-incoming" => listen(&socket(), state).map_err(|e| e.to_string())?,
        "qmp_capabilities" | "stop" | "migrate_cancel" => {}
        _ => return Err(format!("The command {command} has not been found")),
    }
    Ok(json!({}))
}

/// Writes the VM as it was told to.
fn migrate(to: &Path, state: &Arc<Mutex<State>>, before: String) {
    let (stream, writes) = {
        let now = state.lock().unwrap();
        (now.stream.clone(), now.writes.clone())
    };
    let written = write_to(to, &stream, &writes, state);
    // What was written may be read before it is known here that all is.
    thread::sleep(Duration::from_millis(5));
    let mut now = state.lock().unwrap();
    let cancelled = now.migration.as_deref() == Some("cancelling");
    match (written, &writes) {
        _ if cancelled => {
            drop(now);
            thread::sleep(Duration::from_millis(30));
            now = state.lock().unwrap();
            now.migration = Some("cancelled".into());
        }
        (_, Writes::Fails(_, why)) => {
            now.migration = Some("failed".into());
            now.why = Some((*why).into());
        }
        (Err(e), _) => {
            now.migration = Some("failed".into());
            now.why = Some(e.to_string());
        }
        (Ok(()), Writes::Dies(_)) => {
            now.ended = true;
            if let Some(client) = now.client.take() {
                let _ = client.shutdown(Shutdown::Both);
            }
        }
        (Ok(()), _) => {
            now.migration = Some("completed".into());
            now.status = "postmigrate".into();
            return;
        }
    }
    now.status = before;
}

fn write_to(to: &Path, stream: &[u8], writes: &Writes, state: &Mutex<State>) -> std::io::Result<()> {
    let goes_on = || {
        let now = state.lock().unwrap();
        now.migration.as_deref() == Some("active") && !now.ended
    };
    let wait = || {
        while goes_on() {
            thread::sleep(Duration::from_millis(2));
        }
    };
    let len = match *writes {
        Writes::All => stream.len(),
        Writes::Fails(n, _) | Writes::Dies(n) | Writes::Cut(n) | Writes::Stops(n) => n,
        Writes::NeverConnects => {
            wait();
            return Ok(());
        }
    };
    let mut socket = UnixStream::connect(to)?;
    for piece in stream[..len].chunks(1 << 16) {
        socket.write_all(piece)?;
        if !goes_on() {
            return Ok(());
        }
    }
    if matches!(writes, Writes::Stops(_)) {
        wait();
    }
    Ok(())
}

/// Waits for a VM.
fn listen(at: &Path, state: &Arc<Mutex<State>>) -> std::io::Result<()> {
    let listener = UnixListener::bind(at)?;
    let state = Arc::clone(state);
    thread::spawn(move || {
        let (socket, _) = listener.accept().unwrap();
        let loaded = load(socket, &state);
        if loaded.is_err() {
            let mut now = state.lock().unwrap();
            now.migration = Some("failed".into());
            now.why = Some("load of migration failed: Input/output error".into());
        }
    });
    Ok(())
}

fn load(mut socket: UnixStream, state: &Mutex<State>) -> std::io::Result<()> {
    let (len, takes) = {
        let mut now = state.lock().unwrap();
        now.migration = Some("active".into());
        (now.stream.len(), now.takes)
    };
    let mut got = vec![
        0;
        match takes {
            Takes::All => len,
            Takes::Fails(n) | Takes::Dies(n) => n,
        }
    ];
    socket.read_exact(&mut got)?;
    let mut now = state.lock().unwrap();
    match takes {
        Takes::All => {
            now.got = got;
            now.migration = Some("completed".into());
            now.status = "paused".into();
            drop(now);
            // Nothing comes behind its end.
            let mut more = Vec::new();
            let _ = socket.read_to_end(&mut more);
            let mut now = state.lock().unwrap();
            now.got.extend(more);
            now.drained = true;
            Ok(())
        }
        Takes::Fails(_) => Err(std::io::Error::other("it is another machine")),
        Takes::Dies(_) => {
            now.ended = true;
            if let Some(client) = now.client.take() {
                let _ = client.shutdown(Shutdown::Both);
            }
            Ok(())
        }
    }
}
