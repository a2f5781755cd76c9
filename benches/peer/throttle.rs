//! Limits on servers: what they read from the disk (cgroup controller `blkio` of version 1, `io` of version 2), and the
//! memory that they and the page cache they fill may take (`memory` of either).

use crate::Result;
use std::fs::File;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A cgroup with a limit on what all processes in it do together; removed when dropped.
#[derive(Debug)]
pub struct Throttle {
    path: PathBuf,
    procs: File,
}

impl Throttle {
    /// A cgroup whose processes read at most so many bytes a second from the disk below `dir`.
    ///
    /// # Errors
    /// One line that says why this machine or user cannot have it.
    pub fn new(dir: &Path, bytes_per_s: u64) -> Result<Throttle> {
        let disk = disk(dir)?;
        let (root, is_first) = controller(&mounts()?, "blkio", "io")?;
        let (knob, limit) = match is_first {
            true => ("blkio.throttle.read_bps_device", format!("{disk} {bytes_per_s}")),
            false => ("io.max", format!("{disk} rbps={bytes_per_s}")),
        };
        Throttle::make(&root.join(format!("vmar-disk.{}", std::process::id())), knob, &limit)
    }

    /// A cgroup whose processes have so many bytes of memory, page cache that they fill included.
    ///
    /// # Errors
    /// One line that says why this machine or user cannot have it.
    #[allow(dead_code, reason = "not every program that has this module limits memory")]
    pub fn memory(bytes: u64) -> Result<Throttle> {
        let (root, is_first) = controller(&mounts()?, "memory", "memory")?;
        let knob = if is_first { "memory.limit_in_bytes" } else { "memory.max" };
        Throttle::make(&root.join(format!("vmar-memory.{}", std::process::id())), knob, &bytes.to_string())
    }

    fn make(path: &Path, knob: &str, limit: &str) -> Result<Throttle> {
        let say = |path: &Path, e| format!("{}: {e}", path.display());
        std::fs::create_dir(path).map_err(|e| say(path, e))?;
        let made = || {
            let knob = path.join(knob);
            std::fs::write(&knob, limit).map_err(|e| format!("{}: '{limit}': {e}", knob.display()))?;
            let procs = path.join("cgroup.procs");
            File::options().write(true).open(&procs).map_err(|e| say(&procs, e))
        };
        match made() {
            Ok(procs) => Ok(Throttle { path: path.to_path_buf(), procs }),
            Err(why) => {
                let _ = std::fs::remove_dir(path);
                Err(why)
            }
        }
    }

    /// A process that writes `0` here is in the cgroup.
    pub fn entrance(&self) -> RawFd {
        self.procs.as_raw_fd()
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        // What ended a moment ago can still count as a member.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("{} is left: rmdir it", self.path.display());
    }
}

/// `MAJOR:MINOR` of the whole disk below a directory: partitions have no limit of their own.
fn disk(dir: &Path) -> Result<String> {
    let meta = std::fs::metadata(dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let number = format!("{}:{}", libc::major(meta.dev()), libc::minor(meta.dev()));
    let device = PathBuf::from(format!("/sys/dev/block/{number}"));
    if !device.exists() {
        return Err(format!("{} is not directly on a block device: name another place with --dir", dir.display()));
    }
    if !device.join("partition").exists() {
        return Ok(number);
    }
    // The kernel resolves the link before "..", so this is the directory of the whole disk.
    let whole = device.join("../dev");
    let number = std::fs::read_to_string(&whole).map_err(|e| format!("{}: {e}", whole.display()))?;
    Ok(number.trim().to_string())
}

fn mounts() -> Result<String> {
    std::fs::read_to_string("/proc/self/mountinfo").map_err(|e| format!("/proc/self/mountinfo: {e}"))
}

/// The root of the controller's hierarchy, by its names in version 1 and 2, and whether it is one of version 1.
fn controller(mounts: &str, first: &str, second: &str) -> Result<(PathBuf, bool)> {
    let mut unified = None;
    for line in mounts.lines() {
        // "36 35 98:0 /root /mount/point rw,noatime shared:1 - type source options"
        let Some((mount, kind)) = line.split_once(" - ") else { continue };
        let Some(point) = mount.split(' ').nth(4).map(PathBuf::from) else { continue };
        let mut kind = kind.split(' ');
        match (kind.next(), kind.nth(1)) {
            (Some("cgroup"), Some(options)) if options.split(',').any(|o| o == first) => return Ok((point, true)),
            (Some("cgroup2"), _) => unified = unified.or(Some(point)),
            _ => {}
        }
    }
    let root = unified.ok_or("no cgroups are mounted")?;
    let enabled = root.join("cgroup.subtree_control");
    let text = std::fs::read_to_string(&enabled).unwrap_or_default();
    if !text.split_whitespace().any(|name| name == second) {
        return Err(format!("the cgroup controller '{second}' is not enabled: echo +{second} > {}", enabled.display()));
    }
    Ok((root, false))
}
