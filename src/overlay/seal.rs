//! A reserved block behind the end of the overlay file, which says that the file was not written anew.
//!
//! `cp older-copy overlay` keeps the inode of the overlay, and a copy of the same session names the same live bitmap, which
//! would then speak of data that is not there. But it truncates the file first, and that frees what is reserved behind
//! its end. No program reserves it again, no reader sees it, the file's length stays, and writing data never touches it.
//!
//! A file system that cannot reserve or cannot tell (tmpfs, NFS) has no seal; the flush counter is all there is then.

use crate::io::file::{has_extent, reserve_behind_end};
use std::fs::File;

/// Bytes that are reserved. A file system may round that up to its blocks.
const LEN: u64 = 4096;

/// Reserves the block. Gives its offset, or 0 where that cannot be done or would not be seen.
pub(super) fn set(file: &File) -> u64 {
    let try_set = || {
        let at = file.metadata()?.len().next_multiple_of(LEN);
        reserve_behind_end(file, at, LEN)?;
        Ok(if at != 0 && has_extent(file, at, LEN)? { at } else { 0 })
    };
    try_set().unwrap_or_else(|e: std::io::Error| {
        log::debug!("an overlay is not sealed: {e}");
        0
    })
}

/// True if the seal that was set at `at` is gone. What cannot be told is not gone.
pub(super) fn is_broken(file: &File, at: u64) -> bool {
    at != 0 && has_extent(file, at, LEN).is_ok_and(|there| !there)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn truncation_breaks_it_and_nothing_else_does() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let at = set(&file);
        if at == 0 {
            // This test's own file system has no seals.
            assert!(reserve_behind_end(&file, 1 << 20, LEN).and_then(|()| has_extent(&file, 1 << 20, LEN)).is_err());
            return;
        }
        assert_eq!((at, file.metadata().unwrap().len()), (1 << 20, 1 << 20));
        assert_eq!(set(&file), at, "again is as well");
        file.write_all_at(&[1; 8192], (1 << 20) - 8192).unwrap();
        crate::io::file::punch_hole(&file, 0, 1 << 20).unwrap();
        file.sync_all().unwrap();
        assert!(!is_broken(&file, at));
        file.set_len(0).unwrap();
        file.set_len(1 << 20).unwrap();
        assert!(is_broken(&file, at));
        assert!(!is_broken(&file, 0), "none was set");
    }
}
