//! qcow2 and VMDK files may name other files, and the converter would read whatever they name: `/etc/shadow`, another
//! tenant's disk. An image may therefore refer to nothing but itself; a VMDK descriptor to files beside it.

use super::bytes_at;
use crate::codec::Cursor;
use crate::error::{Error, ErrorKind, Result};
use std::fs::File;
use std::path::Path;

/// Bit of the incompatible features of a qcow2: the data are in another file.
const EXTERNAL_DATA: u64 = 1 << 2;
/// A VMDK descriptor is a text of a few KiB; QEMU takes up to 20 sectors.
const DESCRIPTOR_BYTES_MAX: u64 = 20 * 512;

/// Refuses a qcow2 with a backing file or with an external data file.
pub(super) fn check_qcow2(file: &File, path: &Path) -> Result<()> {
    let broken = || Error::file(ErrorKind::Corrupt, path, "its qcow2 header is cut off").mend("fetch it again");
    let head = bytes_at(file, path, 0, 80.min(file.metadata().map_or(0, |m| m.len())))?;
    let mut cursor = Cursor::new(&head);
    let (_magic, version) = (cursor.u32_be(), cursor.u32_be().ok_or_else(broken)?);
    let backing_offset = cursor.u64_be().ok_or_else(broken)?;
    if backing_offset != 0 {
        return Err(refer(path, "it has a backing file", &flatten(path, "qcow2")));
    }
    // How it is encrypted is at byte 32.
    if cursor.take(16).and_then(|_| cursor.u32_be()).ok_or_else(broken)? != 0 {
        let mend = "decrypt it with 'qemu-img convert' and add the result";
        return Err(refer(path, "an encrypted qcow2: equal blocks do not look equal in it", mend));
    }
    // Version 2 ends before the features (at byte 72).
    if version >= 3 {
        let features = cursor.take(72 - 36).and_then(|_| cursor.u64_be()).ok_or_else(broken)?;
        if features & EXTERNAL_DATA != 0 {
            return Err(refer(path, "its data are in another file", &flatten(path, "qcow2")));
        }
    }
    Ok(())
}

/// Refuses a VMDK with a parent, and one whose extents are not plain files beside it.
pub(super) fn check_vmdk(file: &File, path: &Path, file_bytes: u64) -> Result<()> {
    let head = bytes_at(file, path, 0, 512.min(file_bytes))?;
    if head.starts_with(b"COWD") {
        return Ok(());
    }
    if !head.starts_with(b"KDMV") {
        let text = bytes_at(file, path, 0, file_bytes.min(DESCRIPTOR_BYTES_MAX))?;
        return check_descriptor(path, &text, false);
    }
    // Sparse: capacity is at byte 12, place and size of the embedded descriptor at 28 and 36, in sectors.
    let field = |at: usize| Cursor::new(head.get(at..).unwrap_or(&[])).u64_le().unwrap_or(0);
    if field(12) == 0 {
        // QEMU takes such a file for a wrapped descriptor and reads the extents that it names.
        return Err(refer(path, "a VMDK stub that names other files", &flatten(path, "vmdk")));
    }
    let (start, len) = (field(28).saturating_mul(512), field(36).saturating_mul(512).min(DESCRIPTOR_BYTES_MAX));
    if start == 0 || start >= file_bytes {
        return Ok(());
    }
    let text = bytes_at(file, path, start, len.min(file_bytes - start))?;
    check_descriptor(path, &text, true)
}

/// `embedded`: the extent is the file itself, whatever the descriptor calls it.
fn check_descriptor(path: &Path, text: &[u8], embedded: bool) -> Result<()> {
    let text = String::from_utf8_lossy(text);
    for line in text.lines().map(str::trim) {
        if let Some((key, value)) = line.split_once('=')
            && key.trim().eq_ignore_ascii_case("parentCID")
            && !value.trim().eq_ignore_ascii_case("ffffffff")
        {
            return Err(refer(path, "it has a parent image", &flatten(path, "vmdk")));
        }
        let is_extent = ["RW ", "RDONLY ", "NOACCESS "].iter().any(|access| line.starts_with(access));
        if is_extent && !embedded {
            let name = line.split('"').nth(1).unwrap_or("");
            let is_beside = !name.is_empty() && !name.contains(['/', '\\', ':']) && name != "..";
            let target = path.with_file_name(name);
            if line.contains('"') && (!is_beside || target.is_symlink()) {
                return Err(refer(
                    path,
                    &format!("its extent {name:?} is not a file beside it"),
                    &flatten(path, "vmdk"),
                ));
            }
            check_flat(path, line, &target)?;
        }
    }
    Ok(())
}

/// Refuses a flat extent (`RW SECTORS FLAT "NAME" OFFSET`) whose file is shorter: the converter would read zeros there.
fn check_flat(path: &Path, line: &str, target: &Path) -> Result<()> {
    let number = |text: Option<&str>| text.and_then(|t| t.parse::<u64>().ok()).unwrap_or(0);
    let mut words = line.split_whitespace().skip(1);
    let (sectors, kind) = (number(words.next()), words.next());
    let offset = number(line.rsplit('"').next().map(str::trim));
    let want = sectors.saturating_add(offset).saturating_mul(512);
    // A file that is missing is for the converter to name.
    let have = std::fs::metadata(target).map_or(want, |m| m.len());
    if kind == Some("FLAT") && have < want {
        let cause = format!("cut off: {have} bytes, but {} needs {want} of them", path.display());
        return Err(Error::file(ErrorKind::Corrupt, target, cause).mend("fetch it again"));
    }
    Ok(())
}

fn refer(path: &Path, cause: &str, mend: &str) -> Error {
    Error::file(ErrorKind::Unsupported, path, cause).mend(mend)
}

fn flatten(path: &Path, format: &str) -> String {
    let shown = path.display();
    format!("if you trust it, flatten it with 'qemu-img convert -f {format} -O raw {shown} {shown}.raw' and add that")
}

#[cfg(test)]
mod tests {
    use super::super::probe::probe;
    use crate::error::ErrorKind;
    use std::fs;

    fn qcow2(version: u8, backing: u8, features: u8) -> Vec<u8> {
        let mut head = vec![0u8; 512];
        head[..8].copy_from_slice(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version]);
        head[15] = backing;
        head[79] = features;
        head
    }

    fn sparse_vmdk(capacity: u8, descriptor: &str) -> Vec<u8> {
        let mut head = vec![0u8; 1024 + 512];
        head[..4].copy_from_slice(b"KDMV");
        head[12] = capacity;
        head[28] = 1;
        head[36] = 2;
        head[512..512 + descriptor.len()].copy_from_slice(descriptor.as_bytes());
        head
    }

    #[test]
    fn an_image_that_names_other_files_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        let descriptor =
            |extent: &str| format!("# Disk DescriptorFile\nparentCID=ffffffff\nRW 8 FLAT \"{extent}\" 0\n");
        let cases = [
            (qcow2(3, 0, 0), None),
            (qcow2(2, 0, 4), None),
            (qcow2(3, 0, 3), None),
            (qcow2(3, 1, 0), Some("backing file")),
            (qcow2(2, 1, 0), Some("backing file")),
            (qcow2(3, 0, 4), Some("another file")),
            (b"QFI\xfb\0\0\0\x03".to_vec(), Some("cut off")),
            (descriptor("disk-flat.vmdk").into_bytes(), None),
            (descriptor("/etc/shadow").into_bytes(), Some("not a file beside it")),
            (descriptor("../x").into_bytes(), Some("not a file beside it")),
            (descriptor("nbd:host").into_bytes(), Some("not a file beside it")),
            (descriptor("link").into_bytes(), Some("not a file beside it")),
            (b"# Disk DescriptorFile\nparentCID = 1234abcd\n".to_vec(), Some("parent image")),
            (sparse_vmdk(8, "# Disk DescriptorFile\nparentCID=ffffffff\nRW 8 SPARSE \"/old/name.vmdk\"\n"), None),
            (sparse_vmdk(8, "parentCID=12345678\n"), Some("parent image")),
            (sparse_vmdk(0, ""), Some("stub")),
        ];
        for (i, (bytes, want)) in cases.iter().enumerate() {
            fs::write(&path, bytes).unwrap();
            match (probe(&path), want) {
                (Ok(_), None) => {}
                (Err(err), Some(want)) => {
                    assert!(matches!(err.kind(), ErrorKind::Unsupported | ErrorKind::Corrupt), "{err}");
                    assert!(err.to_string().contains(want), "{err}");
                }
                (got, want) => panic!("case {i}: {got:?}, wanted {want:?}"),
            }
        }
    }
}
