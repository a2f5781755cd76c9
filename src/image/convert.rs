//! Makes a sparse raw file of a qcow2 or VMDK, by `qemu-img`.

use super::Probe;
use super::probe::check_size;
use crate::error::{Error, ErrorKind, Result};
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
use std::io::{ErrorKind as IoKind, Read};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// The tool that reads the formats. (It writes sparse files, and it is where the formats are maintained.)
pub(super) const TOOL: &str = "qemu-img";
/// How often a running conversion is looked at.
const POLL: Duration = Duration::from_millis(20);

/// A conversion to do.
pub struct Conversion<'a> {
    /// What to convert.
    pub from: &'a Probe,
    /// The raw file to make. The caller removes it if this fails.
    pub to: &'a Path,
    /// Set by somebody else to end the work early.
    pub stop: &'a AtomicBool,
    /// Told how much of the disk is done, in ten-thousandths.
    pub progress: &'a (dyn Fn(u64) + Sync),
}

/// Bytes of the disk in a qcow2 or VMDK.
pub fn virtual_size(from: &Probe) -> Result<u64> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Info {
        virtual_size: u64,
        backing_filename: Option<String>,
    }
    let mut command = tool();
    command.args(["info", "--output=json", "-U", "-f", &from.format.to_string()]).arg(&from.path);
    let output = command.output().map_err(missing)?;
    if !output.status.success() {
        return Err(failed(&from.path, &output.stderr));
    }
    let info: Info = serde_json::from_slice(&output.stdout)
        .map_err(|e| Error::file(ErrorKind::Unsupported, &from.path, format!("cannot understand {TOOL} info: {e}")))?;
    if info.backing_filename.is_some() {
        return Err(Error::file(ErrorKind::Unsupported, &from.path, "it has a backing file").mend("flatten it first"));
    }
    check_size(&from.path, info.virtual_size)?;
    Ok(info.virtual_size)
}

/// Converts to a new sparse raw file and returns its size. Blocks of 4 KiB of zeros become holes.
///
/// The file is not durable yet. The tool dies with this process, also when that is killed.
///
/// # Errors
/// `NotFound` when the tool is missing, `Interrupted` when `stop` was set, otherwise what the tool says.
pub fn convert(job: &Conversion) -> Result<u64> {
    let size = virtual_size(job.from)?;
    check_whole(job)?;
    let mut command = tool();
    command.args(["convert", "-p", "-S", "4k", "-f", &job.from.format.to_string(), "-O", "raw"]);
    command.arg(&job.from.path).arg(job.to);
    let (status, said) = run(job, command)?;
    if !status.success() {
        return Err(failed(&job.from.path, &said));
    }
    let written = std::fs::metadata(job.to).map_err(|e| Error::io(job.to, "look at it", e))?.len();
    if written != size {
        let cause = format!("the converted disk has {written} bytes instead of {size}");
        return Err(Error::file(ErrorKind::Corrupt, &job.from.path, cause).mend("check it with 'qemu-img check'"));
    }
    Ok(size)
}

/// Refuses a file that was cut off or whose tables are damaged: the converter would read zeros where data are missing.
pub(super) fn check_whole(job: &Conversion) -> Result<()> {
    let path = &job.from.path;
    let mut command = tool();
    command.args(["check", "-f", &job.from.format.to_string()]).arg(path);
    let (status, said) = run(job, command)?;
    match status.code() {
        // Leaked clusters (3) waste space and hurt no data; 63: there is no check for this flavour.
        Some(0 | 3 | 63) => Ok(()),
        _ => {
            let text = String::from_utf8_lossy(&said);
            match text.lines().find_map(|line| line.trim().strip_prefix("ERROR")) {
                Some(first) => {
                    let cause = format!("cut off or damaged: {}", first.trim_start_matches([':', ' ']));
                    let mend = format!("fetch it again; 'qemu-img check {}' says more", path.display());
                    Err(Error::file(ErrorKind::Corrupt, path, cause).mend(mend))
                }
                None => Err(failed(path, &said)),
            }
        }
    }
}

/// Runs the tool to its end: how it ended, and what it said.
pub(super) fn run(job: &Conversion, mut command: Command) -> Result<(ExitStatus, Vec<u8>)> {
    die_with_parent(&mut command);
    let mut child = command.spawn().map_err(missing)?;
    let outcome = attend(job, &mut child);
    // Whatever happened, no converter stays behind and goes on writing.
    let _ = child.kill();
    let _ = child.wait();
    outcome
}

pub(super) fn tool() -> Command {
    let mut command = Command::new(TOOL);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).env("LC_ALL", "C");
    command
}

/// Has the kernel kill the child when this process dies, however it dies.
fn die_with_parent(command: &mut Command) {
    let parent = getpid();
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; these are plain system calls.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            // The parent may have died before the line above.
            if getppid() == Some(parent) { Ok(()) } else { Err(IoKind::Interrupted.into()) }
        });
    }
}

/// Waits for the child, passing on its progress and the wish to stop.
fn attend(job: &Conversion, child: &mut Child) -> Result<(ExitStatus, Vec<u8>)> {
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        let progress = job.progress;
        scope.spawn(move || stdout.map(|pipe| follow(pipe, progress)));
        let said = scope.spawn(move || {
            let mut text = Vec::new();
            if let Some(mut pipe) = stderr {
                let _ = pipe.by_ref().take(64 << 10).read_to_end(&mut text);
                // A closed pipe would kill a tool that has more to say.
                let _ = std::io::copy(&mut pipe, &mut std::io::sink());
            }
            text
        });
        let status = loop {
            if job.stop.load(Ordering::Relaxed) {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Error::file(ErrorKind::Interrupted, &job.from.path, "stopped while it was converted"));
            }
            match child.try_wait() {
                Ok(Some(status)) => break status,
                Ok(None) => thread::sleep(POLL),
                Err(e) => return Err(Error::file(ErrorKind::Io, TOOL, format!("cannot wait for it: {e}"))),
            }
        };
        if !status.success() {
            // Ctrl-C on a terminal reaches the tool too, and perhaps before this process.
            thread::sleep(POLL);
            if job.stop.load(Ordering::Relaxed) {
                return Err(Error::file(ErrorKind::Interrupted, &job.from.path, "stopped while it was converted"));
            }
        }
        Ok((status, said.join().unwrap_or_default()))
    })
}

/// Reads `    (12.34/100%)\r    (12.40/100%)\r…`.
fn follow(mut pipe: impl Read, progress: &(dyn Fn(u64) + Sync)) {
    let mut text = Vec::new();
    let mut buf = [0u8; 256];
    while let Ok(n @ 1..) = pipe.read(&mut buf) {
        text.extend_from_slice(buf.get(..n).unwrap_or(&[]));
        if let Some(done) = last_progress(&text) {
            progress(done);
        }
        let keep = text.len().saturating_sub(64);
        text.drain(..keep);
    }
}

/// Ten-thousandths: the percentage has two decimals.
fn last_progress(text: &[u8]) -> Option<u64> {
    let text = String::from_utf8_lossy(text);
    let (before, _) = text.rsplit_once("/100%)")?;
    before.rsplit_once('(')?.1.replace('.', "").parse().ok()
}

pub(super) fn missing(e: std::io::Error) -> Error {
    let cause = if e.kind() == IoKind::NotFound { "not installed".to_string() } else { format!("cannot run it: {e}") };
    Error::new(ErrorKind::NotFound, TOOL, cause).mend("install it with 'apt install qemu-utils', or add raw images")
}

/// What the tool said, as one error line about the image.
pub(super) fn failed(path: &Path, stderr: &[u8]) -> Error {
    let text = String::from_utf8_lossy(stderr);
    let said: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.is_empty()).collect();
    let err = Error::file(ErrorKind::Io, path, format!("{TOOL} failed: {}", said.join(", ")));
    match () {
        _ if text.contains("No space left") => err.mend("free some space on the library's file system and try again"),
        _ if text.contains("Failed to get") && text.contains("lock") => err.mend("stop the VM that is using it"),
        _ => err.mend(format!("check it with 'qemu-img check {}'", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_read_from_pieces() {
        assert_eq!(last_progress(b"    (0.00/100%)\r    (12.50/100%)\r   (13"), Some(1250));
        assert_eq!(last_progress(b"    (0."), None);
        assert_eq!(last_progress(b"x/100%)"), None);
    }

    #[test]
    fn what_the_tool_says_becomes_one_line() {
        let err = failed(Path::new("/a"), b"qemu-img: error while writing:\n No space left on device\n");
        let text = err.to_string();
        assert!(!text.contains('\n') && text.contains("free some space"), "{text}");
    }
}
