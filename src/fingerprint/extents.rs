//! Where a sparse file has data.

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;

/// The byte ranges of the first `size` bytes that are not holes, ascending and apart.
///
/// A file system that knows no holes says that all is data.
pub fn data_extents(file: &File, size: u64) -> io::Result<Vec<Range<u64>>> {
    let mut out = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::OPNOTSUPP) => at,
            Err(e) => return Err(e.into()),
        };
        if start >= size {
            break;
        }
        let end = match seek(file, SeekFrom::Hole(start)) {
            Ok(end) => end.min(size),
            Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => size,
            Err(e) => return Err(e.into()),
        };
        // A file that is punched meanwhile may report an empty range; go on behind it rather than for ever.
        let end = end.max(start + 1);
        out.push(start..end);
        at = end;
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn data_is_found_between_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(10 << 20).unwrap();
        file.write_all_at(&[1; 4096], 1 << 20).unwrap();
        file.write_all_at(&[1; 100], 5 << 20).unwrap();
        let found = data_extents(&file, 10 << 20).unwrap();
        assert_eq!(found, [1 << 20..(1 << 20) + 4096, 5 << 20..(5 << 20) + 4096]);
        assert_eq!(data_extents(&file, (5 << 20) + 512).unwrap()[1], 5 << 20..(5 << 20) + 512);
        assert_eq!(data_extents(&file, 4096).unwrap(), []);
        assert_eq!(data_extents(&file, 0).unwrap(), []);
    }
}
