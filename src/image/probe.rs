//! Looks at a file before anything is done with it.

use super::magic::{HEAD_BYTES, Kind, TAIL_BYTES, classify};
use super::{Format, bytes_at, safety};
use crate::error::{Error, ErrorKind, Result};
use crate::units::{IMAGE_SIZE_MAX, SECTOR_SIZE};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// A file that vmar can take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Its absolute path without symbolic links.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Bytes of the file (not of the disk in it).
    pub file_bytes: u64,
}

/// Says what `path` is.
///
/// # Errors
/// One line for whatever vmar cannot take: not a regular file, empty, not a multiple of 512, a foreign format, a qcow2
/// or VMDK that refers to other files than its own. Each says what the operator can do.
pub fn probe(path: &Path) -> Result<Probe> {
    let path = fs::canonicalize(path).map_err(|e| Error::io(path, "open it", e))?;
    if path.to_str().is_none() {
        // The catalog is JSON text.
        return Err(Error::file(ErrorKind::Unsupported, &path, "its name is not UTF-8").mend("rename it"));
    }
    let meta = fs::metadata(&path).map_err(|e| Error::io(&path, "open it", e))?;
    if !meta.is_file() {
        let cause = "not a regular file, so no image that vmar can share";
        let mend = if meta.is_dir() { "name an image file in it" } else { "copy the device to a file" };
        return Err(Error::file(ErrorKind::Unsupported, &path, cause).mend(mend));
    }
    let file = File::open(&path).map_err(|e| Error::io(&path, "open it", e))?;
    let head = bytes_at(&file, &path, 0, (HEAD_BYTES as u64).min(meta.len()))?;
    let tail_len = (TAIL_BYTES as u64).min(meta.len());
    let tail = bytes_at(&file, &path, meta.len() - tail_len, tail_len)?;
    let format = match classify(&head, &tail) {
        Kind::Known(format) => format,
        other => return Err(refuse(&path, other)),
    };
    match format {
        Format::Raw => check_size(&path, meta.len())?,
        Format::Qcow2 => safety::check_qcow2(&file, &path)?,
        Format::Vmdk => safety::check_vmdk(&file, &path, meta.len())?,
    }
    Ok(Probe { path, format, file_bytes: meta.len() })
}

/// Refuses sizes that no disk has.
pub(super) fn check_size(path: &Path, size: u64) -> Result<()> {
    let refuse = |cause: String, mend: &str| Err(Error::file(ErrorKind::Unsupported, path, cause).mend(mend));
    if size == 0 {
        return refuse("empty, so not a disk image".to_string(), "name another file");
    }
    if !size.is_multiple_of(SECTOR_SIZE) {
        return refuse(
            format!("{size} bytes, which is no multiple of {SECTOR_SIZE}: not a raw disk image"),
            "if it is one that was cut or has a trailer, mend its size with 'truncate -s'",
        );
    }
    if size > IMAGE_SIZE_MAX {
        return refuse(format!("{size} bytes, more than the 16 TiB that a block map can hold"), "split the disk");
    }
    Ok(())
}

fn refuse(path: &Path, kind: Kind) -> Error {
    let shown = path.display();
    let (cause, mend) = match kind {
        Kind::Packed(what, command) => {
            (format!("packed with {what}"), format!("unpack it ({command}) and add what is inside"))
        }
        Kind::Encrypted => (
            "an encrypted (LUKS) volume: equal blocks do not look equal in it".to_string(),
            "give vmar the decrypted image".to_string(),
        ),
        Kind::Foreign(what) => (
            format!("a {what} image, which vmar does not take"),
            format!("convert it with 'qemu-img convert -O raw {shown} {shown}.raw' and add that"),
        ),
        Kind::Known(format) => (format!("a {format} image"), String::new()),
    };
    Error::file(ErrorKind::Unsupported, path, cause).mend(mend)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_image_is_refused_with_a_mend() {
        let dir = tempfile::tempdir().unwrap();
        let refused = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            fs::write(&path, bytes).unwrap();
            let err = probe(&path).unwrap_err();
            assert_eq!(err.kind(), ErrorKind::Unsupported);
            assert!(err.to_string().contains("; "), "has a mend: {err}");
            err.to_string()
        };
        assert!(refused("empty", b"").contains("empty"));
        assert!(refused("text", b"hello").contains("5 bytes, which is no multiple of 512"));
        assert!(refused("gz", b"\x1f\x8b\x08 and so on").contains("gunzip"));
        let vhdx: Vec<u8> = b"vhdxfile".iter().copied().chain([0; 504]).collect();
        assert!(refused("vhdx", &vhdx).contains("qemu-img convert -O raw"));
        assert!(probe(dir.path()).unwrap_err().to_string().contains("not a regular file"));
        assert_eq!(probe(&dir.path().join("none")).unwrap_err().kind(), ErrorKind::NotFound);
        assert!(probe(Path::new("/dev/zero")).unwrap_err().to_string().contains("not a regular file"));
    }

    #[test]
    fn a_raw_file_is_named_without_symbolic_links() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.raw");
        fs::write(&path, [1; 512]).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let found = probe(&link).unwrap();
        assert_eq!(found, Probe { path: fs::canonicalize(&path).unwrap(), format: Format::Raw, file_bytes: 512 });
    }
}
