//! The destination QEMU's monitor (QMP): it is told to run the VM once that is this host's.

use crate::error::{Error, ErrorKind, Result};
use qapi::{Qmp, Stream, qmp};
use std::fmt::Display;
use std::io::BufReader;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(30);

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
