//! Disks that can be full, fail or hang.

use crate::common::{Bench, tool};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted file system that is unmounted whatever happens.
pub struct Mount(pub PathBuf);

impl Mount {
    /// A tmpfs of that size.
    pub fn tmpfs(bench: &Bench, size: &str) -> Mount {
        let at = bench.path("small");
        std::fs::create_dir(&at).unwrap();
        tool("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "none", at.to_str().unwrap()]);
        Mount(at)
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    /// Fills it but for about that many bytes.
    pub fn fill(&self, leave: u64) {
        let mut file = std::fs::File::create(self.ballast()).unwrap();
        let page = [0xBA; 4096];
        let mut len = 0;
        while file.write_all(&page).is_ok() {
            len += page.len() as u64;
        }
        file.set_len(len.checked_sub(leave).unwrap()).unwrap();
    }

    /// Makes room again.
    pub fn free(&self) {
        std::fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

/// A loop device over a file.
pub struct Loop(pub PathBuf);

impl Loop {
    pub fn new(file: &Path) -> Loop {
        Loop(PathBuf::from(tool("losetup", &["--find", "--show", file.to_str().unwrap()]).trim()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// Bytes that tell where they belong.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64 / 8).flat_map(|i| (seed << 40 | i).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes()).collect()
}
