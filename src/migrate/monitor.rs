//! QEMU's monitor (QMP): a destination is told to run the VM once that is this host's, and the QEMU of a snapshot to stop, to write
//! its VM to a socket, and to go on.
//!
//! Answers with names that later QEMUs add to are taken as JSON, not as the types of one QEMU's schema.

use crate::error::{Error, ErrorKind, Result};
use qapi::{Command, Qmp, Stream, qmp};
use serde::Serialize;
use serde_json::{Value, json};
use std::fmt::Display;
use std::io::{BufReader, ErrorKind as ErrorOf};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(30);

/// A command whose arguments and answer are JSON.
macro_rules! command {
    ($name:ident, $said:literal) => {
        #[derive(Debug, Serialize)]
        #[serde(transparent)]
        struct $name(Value);

        impl Command for $name {
            type Ok = Value;
            const NAME: &'static str = $said;
            const ALLOW_OOB: bool = false;
        }

        impl qmp::QmpCommand for $name {}
    };
}

command!(QueryStatus, "query-status");
command!(QueryName, "query-name");
command!(QueryBlock, "query-block");
command!(QueryCapabilities, "query-migrate-capabilities");
command!(SetCapabilities, "migrate-set-capabilities");
command!(QueryParameters, "query-migrate-parameters");
command!(SetParameters, "migrate-set-parameters");
command!(Migrate, "migrate");
command!(MigrateIncoming, "migrate-incoming");
command!(MigrateCancel, "migrate_cancel");
command!(QueryMigrate, "query-migrate");

/// How QEMU was set before a migration to a file, to be set so again.
#[derive(Debug, Default)]
pub struct Settings {
    capabilities: Vec<Value>,
    parameters: Option<Value>,
}

/// Bytes a second: more than any socket takes, and little enough for QEMU's own sums.
const FAST: u64 = 64 << 30;

/// Capabilities that change what a stream is; they are off in a stream that is kept.
const OFF: [&str; 12] = [
    "return-path",
    "xbzrle",
    "compress",
    "multifd",
    "mapped-ram",
    "postcopy-ram",
    "background-snapshot",
    "x-colo",
    "rdma-pin-all",
    "x-ignore-shared",
    "release-ram",
    "auto-converge",
];

/// A connected monitor.
pub struct Monitor {
    path: PathBuf,
    qmp: Qmp<Stream<BufReader<UnixStream>, UnixStream>>,
}

impl Monitor {
    /// Connects to a QMP socket of QEMU (`-qmp unix:PATH,server=on,wait=off`).
    ///
    /// # Errors
    /// Nobody listens there, or it is no monitor, or another client has it.
    pub fn connect(path: &Path) -> Result<Monitor> {
        let socket = UnixStream::connect(path).map_err(|e| Error::io(path, "connect to QEMU's monitor", e))?;
        let set = socket.set_read_timeout(Some(ANSWER)).and_then(|()| socket.set_write_timeout(Some(ANSWER)));
        let copy = set.and_then(|()| socket.try_clone()).map_err(|e| Error::io(path, "use it", e))?;
        let mut qmp = Qmp::new(Stream::new(BufReader::new(copy), socket));
        qmp.handshake().map_err(|e| refused(path, &e).mend("is it a QMP socket, with no other client?"))?;
        Ok(Monitor { path: path.to_path_buf(), qmp })
    }

    /// Has a QEMU that waits for a VM answer on the return path.
    ///
    /// # Errors
    /// It waits for none.
    pub fn prepare(&mut self) -> Result<()> {
        let status = self.qmp.execute(&qmp::query_status {}).map_err(|e| refused(&self.path, &e))?;
        if status.status != qmp::RunState::inmigrate {
            let cause = format!("this QEMU waits for no VM: it says {:?}", status.status);
            let mend = "start it with -incoming unix:PATH and -S";
            return Err(Error::file(ErrorKind::Usage, &self.path, cause).mend(mend));
        }
        let capability = qmp::MigrationCapability::return_path;
        let capabilities = vec![qmp::MigrationCapabilityStatus { capability, state: true }];
        self.qmp.execute(&qmp::migrate_set_capabilities { capabilities }).map_err(|e| refused(&self.path, &e))?;
        Ok(())
    }

    /// Refuses a VM that runs as soon as it is loaded: it may run where it came from, too. It is stopped.
    ///
    /// # Errors
    /// It runs.
    pub fn check_stopped(&mut self) -> Result<()> {
        let status = self.qmp.execute(&qmp::query_status {}).map_err(|e| refused(&self.path, &e))?;
        if !status.running {
            return Ok(());
        }
        self.qmp.execute(&qmp::stop {}).map_err(|e| refused(&self.path, &e))?;
        let cause = "this QEMU ran the VM before it was given away; it is stopped";
        Err(Error::file(ErrorKind::Usage, &self.path, cause).mend("start the destination's QEMU with -S"))
    }

    /// What state the VM is in, as QEMU names it (`running`, `paused`, `inmigrate`, …).
    ///
    /// # Errors
    /// QEMU does not say.
    pub fn status(&mut self) -> Result<String> {
        let said = self.ask(&QueryStatus(json!({})))?;
        Ok(said["status"].as_str().unwrap_or_default().into())
    }

    /// The name of the VM, if it has one (`-name`).
    ///
    /// # Errors
    /// QEMU does not say.
    pub fn name(&mut self) -> Result<Option<String>> {
        Ok(self.ask(&QueryName(json!({})))?["name"].as_str().map(str::to_string))
    }

    /// Files of the disks that QEMU itself writes to (`-drive`); those of vhost-user devices are not among them.
    ///
    /// # Errors
    /// QEMU does not say.
    pub fn own_disks(&mut self) -> Result<Vec<String>> {
        let said = self.ask(&QueryBlock(json!({})))?;
        let inserted = said.as_array().into_iter().flatten().map(|device| &device["inserted"]);
        let file = |disk: &Value| disk["file"].as_str().map(str::to_string);
        Ok(inserted.filter(|disk| disk["ro"] == false).filter_map(file).collect())
    }

    /// Stops the VM.
    ///
    /// # Errors
    /// QEMU does not.
    pub fn stop(&mut self) -> Result<()> {
        self.qmp.execute(&qmp::stop {}).map_err(|e| refused(&self.path, &e))?;
        Ok(())
    }

    /// Sets QEMU up to write all of its VM, once and as it is, as fast as it can. What to give to [`Monitor::restore`].
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn plain(&mut self) -> Result<Settings> {
        let on = |said: &Value| {
            let of = |c: &&Value| c["state"] == true && OFF.iter().any(|name| c["capability"] == *name);
            said.as_array().into_iter().flatten().filter(of).cloned().collect::<Vec<_>>()
        };
        let capabilities = on(&self.ask(&QueryCapabilities(json!({})))?);
        let off = capabilities.iter().map(|c| json!({"capability": c["capability"], "state": false}));
        let off: Vec<Value> = off.collect();
        let before = self.ask(&QueryParameters(json!({})))?;
        let parameters = json!({"max-bandwidth": before["max-bandwidth"], "tls-creds": before["tls-creds"].as_str().unwrap_or_default()});
        self.ask(&SetCapabilities(json!({"capabilities": off})))?;
        let settings = Settings { capabilities, parameters: Some(parameters) };
        match self.ask(&SetParameters(json!({"max-bandwidth": FAST, "tls-creds": ""}))) {
            Ok(_) => Ok(settings),
            Err(e) => {
                self.restore(settings)?;
                Err(e)
            }
        }
    }

    /// Sets QEMU as it was.
    ///
    /// # Errors
    /// QEMU refuses.
    pub fn restore(&mut self, settings: Settings) -> Result<()> {
        self.ask(&SetCapabilities(json!({"capabilities": settings.capabilities})))?;
        settings.parameters.map_or(Ok(()), |parameters| self.ask(&SetParameters(parameters)).map(|_| ()))
    }

    /// Has QEMU write its VM to a socket.
    ///
    /// # Errors
    /// QEMU does not begin.
    pub fn migrate(&mut self, to: &Path) -> Result<()> {
        self.ask(&Migrate(json!({"uri": format!("unix:{}", to.display())}))).map(|_| ())
    }

    /// Has a QEMU that was started with `-incoming defer` wait at a socket.
    ///
    /// # Errors
    /// QEMU does not.
    pub fn incoming(&mut self, at: &Path) -> Result<()> {
        self.ask(&MigrateIncoming(json!({"uri": format!("unix:{}", at.display())}))).map(|_| ())
    }

    /// Ends a migration that is under way.
    ///
    /// # Errors
    /// QEMU does not.
    pub fn cancel(&mut self) -> Result<()> {
        self.ask(&MigrateCancel(json!({}))).map(|_| ())
    }

    /// How far a migration is, as QEMU names it (`active`, `completed`, `failed`, …), and what it says about that.
    ///
    /// # Errors
    /// QEMU does not say.
    pub fn migration(&mut self) -> Result<(String, Option<String>)> {
        let said = self.ask(&QueryMigrate(json!({})))?;
        Ok((said["status"].as_str().unwrap_or_default().into(), said["error-desc"].as_str().map(str::to_string)))
    }

    fn ask<C: qmp::QmpCommand + Command<Ok = Value>>(&mut self, command: &C) -> Result<Value> {
        self.qmp.execute(command).map_err(|e| match &e {
            qapi::ExecuteError::Io(io) if matches!(io.kind(), ErrorOf::WouldBlock | ErrorOf::TimedOut) => {
                let cause = format!("QEMU's monitor does not answer {} within {} s", C::NAME, ANSWER.as_secs());
                Error::file(ErrorKind::Io, &self.path, cause).mend("see whether QEMU hangs, and what its log says")
            }
            e => refused(&self.path, &format!("{}: {e}", C::NAME)),
        })
    }

    /// Runs the VM.
    ///
    /// # Errors
    /// QEMU does not, and says why.
    pub fn run(&mut self) -> Result<()> {
        self.qmp.execute(&qmp::cont {}).map_err(|e| refused(&self.path, &e))?;
        Ok(())
    }
}

fn refused(path: &Path, why: &impl Display) -> Error {
    Error::file(ErrorKind::Io, path, format!("QEMU's monitor: {why}"))
}
