//! The subjects: whom a scenario compares, and how each is started.

use crate::Result;
use crate::client::{Client, Tally, Target};
use crate::rig::{Rig, run};
use crate::scenario::{Action, Scenario};
use crate::server::{Server, cpu_ns, disk_bytes, private_kib};
use crate::throttle::Throttle;
use clap::ValueEnum;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// Whom a scenario compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// vmar: overlay and map, every base block redirected to another image
    Vmar,
    /// vmar --blk-file: a raw file
    VmarFlat,
    /// qemu-storage-daemon: a raw file
    QsdRaw,
    /// qemu-storage-daemon: a qcow2 overlay on a raw file
    QsdQcow2,
    /// The same as vmar without readahead
    VmarNoReadahead,
    /// The same as qsd-raw with its export in an I/O thread
    QsdRawIothread,
    /// The same as qsd-qcow2 with its export in an I/O thread
    QsdQcow2Iothread,
    /// The same as qsd-qcow2 with extended L2 entries and clusters of 128 KiB
    QsdQcow2Extended,
    /// No server: libblkio's io_uring driver on the raw file
    Floor,
}

/// A running subject with its client.
pub struct Running {
    client: Client,
    server: Option<Server>,
    /// Whose CPU time and memory count.
    pid: Option<u32>,
    /// What the disk holds at the start.
    holds: Option<PathBuf>,
}

/// One turn of one subject.
#[derive(Debug, Clone)]
pub struct Turn {
    /// What the client saw.
    pub tally: Tally,
    /// Seconds of CPU of the server; none without a server.
    pub server_cpu: Option<f64>,
    /// Seconds of CPU of the client.
    pub client_cpu: f64,
    /// Bytes that the server made the disk read.
    pub disk_bytes: Option<u64>,
    /// Private memory of the server after it.
    pub private_kib: Option<u64>,
}

impl Kind {
    /// What is measured if nothing is said.
    pub const DEFAULT: [Kind; 5] = [Kind::Vmar, Kind::VmarFlat, Kind::QsdRaw, Kind::QsdQcow2, Kind::Floor];

    /// Its name on the command line and in the report.
    pub fn name(self) -> String {
        self.to_possible_value().map(|v| v.get_name().to_string()).unwrap_or_default()
    }

    /// Whether it needs qemu-storage-daemon.
    pub fn is_qsd(self) -> bool {
        !matches!(self, Kind::VmarFlat | Kind::Floor) && !self.has_map()
    }

    fn has_map(self) -> bool {
        matches!(self, Kind::Vmar | Kind::VmarNoReadahead)
    }

    fn has_iothread(self) -> bool {
        matches!(self, Kind::QsdRawIothread | Kind::QsdQcow2Iothread)
    }

    fn has_overlay(self) -> bool {
        self.has_map() || matches!(self, Kind::QsdQcow2 | Kind::QsdQcow2Iothread | Kind::QsdQcow2Extended)
    }
}

/// Makes the files which a subject needs for a scenario: an empty overlay, or a raw file of its own to write to.
pub fn prepare(kind: Kind, rig: &Rig, scenario: &Scenario) -> Result<()> {
    if !kind.has_overlay() {
        if scenario.writes() {
            rig.scratch(&file_name(kind))?;
        }
        return Ok(());
    }
    let overlay = rig.path(&file_name(kind));
    if overlay.exists() {
        std::fs::remove_file(&overlay).map_err(|e| format!("{}: {e}", overlay.display()))?;
    }
    if kind.has_map() {
        let mut create = rig.vmar(&["overlay", "create", "--image", image(scenario), "--library"]);
        run(create.arg(rig.library()).arg(&overlay))?;
        return Ok(());
    }
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(rig.path("flat.raw"));
    if kind == Kind::QsdQcow2Extended {
        create.args(["-o", "extended_l2=on,cluster_size=128k"]);
    }
    run(create.arg(&overlay))?;
    Ok(())
}

/// Starts a prepared subject and connects the client.
pub fn start(kind: Kind, rig: &Rig, scenario: &Scenario, qsd: &Path, throttle: Option<&Throttle>) -> Result<Running> {
    let own = rig.path(&file_name(kind));
    let raw = if scenario.writes() { own.clone() } else { rig.path("flat.raw") };
    let socket = rig.path(&format!("{}.sock", kind.name()));
    let read_only = !scenario.writes();
    let say = |e| format!("{}: {e}", kind.name());
    let holds = match (kind, scenario.action) {
        (_, Action::Scattered) if kind.has_map() => rig.path("scattered.raw"),
        _ if kind.has_overlay() => rig.path("flat.raw"),
        _ => raw.clone(),
    };
    if kind == Kind::Floor {
        let client = Client::connect(Target::File(&raw), scenario, read_only).map_err(say)?;
        return Ok(Running { client, server: None, pid: None, holds: Some(holds) });
    }
    let command = match kind {
        Kind::Vmar | Kind::VmarNoReadahead | Kind::VmarFlat => {
            let mut command = rig.vmar(&["serve", "--num-queues", &scenario.queues.to_string()]);
            command.arg("--state-dir").arg(rig.state()).arg("--socket-path").arg(&socket);
            command.args((kind == Kind::VmarNoReadahead).then_some("--readahead=0"));
            if kind.has_map() {
                command.arg("--library").arg(rig.library());
                command.args(["--image", image(scenario), "--overlay"]).arg(&own);
            } else {
                command.arg("--blk-file").arg(&raw);
                command.args(read_only.then_some("--read-only"));
            }
            command
        }
        _ => qsd_command(kind, rig, scenario, qsd, &raw, &socket),
    };
    let mut server = Server::start(&kind.name(), command, &socket, throttle.as_slice())?;
    let client = connect(&mut server, &socket, scenario, read_only).map_err(say)?;
    Ok(Running { client, pid: Some(server.pid()), server: Some(server), holds: Some(holds) })
}

/// The client of a socket that somebody else serves; `pid` for its CPU time and memory.
pub fn attach(socket: &Path, pid: Option<u32>, scenario: &Scenario) -> Result<Running> {
    let client = Client::connect(Target::Socket(socket), scenario, !scenario.writes())?;
    Ok(Running { client, server: None, pid, holds: None })
}

/// The file that a subject writes to.
fn file_name(kind: Kind) -> String {
    format!("{}.{}", kind.name(), if kind.has_overlay() { "qcow2" } else { "raw" })
}

fn image(scenario: &Scenario) -> &'static str {
    if scenario.action == Action::Scattered { "scattered" } else { "redirected" }
}

/// A socket file can be there a moment before somebody listens.
fn connect(server: &mut Server, socket: &Path, scenario: &Scenario, read_only: bool) -> Result<Client> {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        match Client::connect(Target::Socket(socket), scenario, read_only) {
            Ok(client) => return Ok(client),
            Err(e) if Instant::now() > deadline => return Err(e),
            Err(_) => server.check_alive()?,
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn qsd_command(kind: Kind, rig: &Rig, scenario: &Scenario, qsd: &Path, raw: &Path, socket: &Path) -> Command {
    // Commas in a value are doubled.
    let value = |path: &Path| path.to_string_lossy().replace(',', ",,");
    let on = |yes: bool| if yes { "on" } else { "off" };
    let file = |node: &str, path: &Path, read_only: bool| {
        format!("driver=file,node-name={node},filename={},aio=io_uring,read-only={}", value(path), on(read_only))
    };
    let mut command = Command::new(qsd);
    let mut arg = |name: &str, text: String| {
        command.arg(name).arg(OsString::from(text));
    };
    if kind.has_overlay() {
        arg("--blockdev", file("base", &rig.path("flat.raw"), true));
        arg("--blockdev", file("own", &rig.path(&file_name(kind)), false));
        arg("--blockdev", "driver=qcow2,node-name=disk,file=own,backing=base".into());
    } else {
        arg("--blockdev", file("disk", raw, !scenario.writes()));
    }
    let mut export = format!(
        "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={},writable={},num-queues={}",
        value(socket),
        on(kind.has_overlay() || scenario.writes()),
        scenario.queues
    );
    if kind.has_iothread() {
        arg("--object", "iothread,id=thread".into());
        export += ",iothread=thread";
    }
    arg("--export", export);
    command
}

impl Running {
    /// Compares samples of the disk with what it must hold.
    pub fn verify(&mut self) -> Result<()> {
        match &self.holds {
            Some(file) => self.client.verify(file),
            None => Ok(()),
        }
    }

    /// Brings the disk into the state in which the scenario starts, and the page cache with it.
    pub fn warm(&mut self, scenario: &Scenario) -> Result<()> {
        let capacity = self.client.capacity();
        match scenario.action {
            Action::Read | Action::Scattered if scenario.is_cold => Ok(()),
            Action::Read | Action::Scattered => self.client.pass(capacity, false),
            Action::WriteFirst => self.client.pass(capacity, false),
            Action::WriteOver => self.client.pass(capacity, true),
            Action::Mixed => {
                self.client.pass(capacity, false)?;
                self.client.pass(capacity / 2, true)
            }
        }
    }

    /// One turn.
    pub fn turn(&mut self, scenario: &Scenario, seed: u64, length: Duration) -> Result<Turn> {
        let own = std::process::id();
        let server_before = self.pid.map(cpu_ns).transpose()?;
        let disk_before = self.pid.and_then(disk_bytes);
        let client_before = cpu_ns(own)?;
        let tally = self.client.run(scenario, seed, length);
        if let Some(server) = &mut self.server {
            server.check_alive()?;
        }
        let tally = tally?;
        let client_cpu = (cpu_ns(own)? - client_before) as f64 / 1e9;
        let server_after = self.pid.map(cpu_ns).transpose()?;
        let server_cpu = server_before.zip(server_after).map(|(before, after)| (after - before) as f64 / 1e9);
        let disk_bytes = disk_before.zip(self.pid.and_then(disk_bytes)).map(|(before, after)| after - before);
        let private_kib = self.pid.map(private_kib).transpose()?;
        Ok(Turn { tally, server_cpu, client_cpu, disk_bytes, private_kib })
    }

    /// Disconnects, and ends the server.
    pub fn stop(self) {
        drop(self.client);
        if let Some(server) = self.server {
            server.stop();
        }
    }
}
