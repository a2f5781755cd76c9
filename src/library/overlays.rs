//! Which overlays were made on which images, so that nobody removes what is below a VM's disk: one small file for each in
//! `overlays/`, written by whoever makes or serves an overlay. No lock is needed, as each is written by one rename.
//!
//! A note is a hint. An overlay that was moved is not known under its new path until it is served from there; one that is
//! gone is forgotten when somebody looks.

use super::{Library, OVERLAYS};
use crate::codec::{hex, unhex};
use crate::error::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// The version that this code writes.
const VERSION: u32 = 1;

/// An overlay that is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    version: u32,
    /// Content digest of its base, hexadecimal.
    digest: String,
    /// Absolute path.
    path: PathBuf,
}

impl Library {
    /// Remembers that there is an overlay on an image with this content.
    ///
    /// # Errors
    /// When it cannot be written: the library may be somebody else's, or read-only. Callers go on.
    pub fn note_overlay(&self, digest: &[u8; 32], overlay: &Path) -> Result<()> {
        let dir = self.dir().join(OVERLAYS);
        let path = std::path::absolute(overlay).map_err(|e| Error::io(overlay, "find it", e))?;
        let note = Note { version: VERSION, digest: hex(digest), path };
        let goal = dir.join(note_name(&note.path));
        let text = serde_json::to_vec(&note).map_err(|e| Error::io(&goal, "write", e.into()))?;
        if fs::read(&goal).is_ok_and(|old| old == text) {
            return Ok(());
        }
        let write = || {
            fs::create_dir_all(&dir)?;
            let temporary = goal.with_extension(format!("{}.new", std::process::id()));
            fs::write(&temporary, &text)?;
            fs::rename(&temporary, &goal)
        };
        write().map_err(|e| Error::io(&goal, "write", e))
    }

    /// The overlays that are known on an image with this content and are still there. `is_of` looks into one: true unless it
    /// is certainly another image's by now.
    pub fn overlays_on(&self, digest: &[u8; 32], is_of: impl Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
        let dir = self.dir().join(OVERLAYS);
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(Error::io(&dir, "list the directory", e)),
        };
        let mut out = Vec::new();
        for entry in entries {
            let path = entry.map_err(|e| Error::io(&dir, "list the directory", e))?.path();
            let Some(note) = fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Note>(&text).ok()) else {
                continue;
            };
            if unhex::<32>(&note.digest) == Some(*digest) && note.path.exists() && is_of(&note.path) {
                out.push(note.path);
            }
        }
        out.sort();
        Ok(out)
    }
}

/// One file a path.
fn note_name(path: &Path) -> String {
    let hash = blake3::hash(path.as_os_str().as_encoded_bytes());
    format!("{}.json", hex(&hash.as_bytes()[..16]))
}

#[cfg(test)]
mod tests {
    use super::super::tests::with_one_image;
    use super::*;

    #[test]
    fn overlays_are_known_while_they_are_there() {
        let (dir, library, record) = with_one_image();
        let (a, b) = (dir.path().join("a.qcow2"), dir.path().join("b.qcow2"));
        fs::write(&a, "").unwrap();
        fs::write(&b, "").unwrap();
        library.note_overlay(&record.digest, &b).unwrap();
        library.note_overlay(&record.digest, &a).unwrap();
        library.note_overlay(&record.digest, &a).unwrap();
        assert_eq!(library.overlays_on(&record.digest, |_| true).unwrap(), [a.clone(), b.clone()]);
        assert_eq!(library.overlays_on(&[9; 32], |_| true).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(library.overlays_on(&record.digest, |p| p != a).unwrap(), std::slice::from_ref(&b));
        fs::remove_file(&a).unwrap();
        fs::write(library.dir().join(OVERLAYS).join("x.json"), "half").unwrap();
        assert_eq!(library.overlays_on(&record.digest, |_| true).unwrap(), [b]);
    }
}
