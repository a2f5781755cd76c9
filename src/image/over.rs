//! The top layer of a qcow2 file, carried over into another one by `qemu-img`.

use super::Conversion;
use super::convert::{TOOL, check_whole, failed, missing, run, tool};
use crate::error::{Error, ErrorKind, Result};
use std::path::{Path, PathBuf};

/// What a qcow2 file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Bytes of its disk.
    pub size: u64,
    /// Its backing file, if it has one.
    pub backing: Option<PathBuf>,
}

/// Looks at the qcow2 file `path` without opening its backing file.
///
/// # Errors
/// `Unsupported` if its data are in another file, or if it is encrypted or marked dirty; otherwise what the tool says.
pub fn look_at(path: &Path) -> Result<Found> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Info {
        virtual_size: u64,
        #[serde(default)]
        encrypted: bool,
        #[serde(default)]
        dirty_flag: bool,
        full_backing_filename: Option<PathBuf>,
        backing_filename: Option<PathBuf>,
        format_specific: Option<Specific>,
    }
    #[derive(serde::Deserialize)]
    struct Specific {
        data: serde_json::Value,
    }
    let mut command = tool();
    command.args(["info", "--output=json", "-U", "-f", "qcow2"]).arg(path);
    let output = command.output().map_err(missing)?;
    if !output.status.success() {
        return Err(failed(path, &output.stderr));
    }
    let info: Info = serde_json::from_slice(&output.stdout)
        .map_err(|e| Error::file(ErrorKind::Unsupported, path, format!("cannot understand {TOOL} info: {e}")))?;
    let refuse = |cause: &str, mend: &str| Err(Error::file(ErrorKind::Unsupported, path, cause).mend(mend));
    if info.format_specific.is_some_and(|s| s.data.get("data-file").is_some()) {
        return refuse("its data are in another file", "flatten it with 'qemu-img convert -O qcow2' first");
    }
    if info.encrypted {
        return refuse("it is encrypted", "decrypt it with 'qemu-img convert' first");
    }
    if info.dirty_flag {
        return refuse("QEMU marked it dirty and did not close it", "run 'qemu-img check -r all' on it");
    }
    Ok(Found { size: info.virtual_size, backing: info.full_backing_filename.or(info.backing_filename) })
}

/// Carries the content of a qcow2 over into the qcow2 `job.to`, which exists, is not smaller, and whose backing file has the
/// raw content of `backing`; so has the backing file of `job.from`, if there is one. What is not allocated stays so.
///
/// # Errors
/// As for [`convert`](super::convert).
pub fn convert_over(job: &Conversion, backing: &Path) -> Result<()> {
    check_whole(job)?;
    let mut command = tool();
    command.args(["convert", "-n", "-p", "-f", "qcow2", "-O", "qcow2", "-F", "raw", "-B"]);
    command.arg(backing).arg(&job.from.path).arg(job.to);
    let (status, said) = run(job, command)?;
    if status.success() { Ok(()) } else { Err(failed(&job.from.path, &said)) }
}
