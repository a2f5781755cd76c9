//! Pairs that come in any order and are wanted by block: in memory, or in a scratch file that is gone through once for every
//! stretch of the image that fits.

use super::compare::Pair;
use crate::error::{Error, Result};
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Blocks of a window: 16 GiB.
const WINDOW: u64 = 1 << 22;
const PAIR_BYTES: usize = 12;

pub(super) struct Spool {
    path: PathBuf,
    /// Pairs that memory may hold.
    limit: u64,
    memory: Vec<Pair>,
    file: Option<BufWriter<File>>,
}

impl Spool {
    /// Nothing yet; `path` is made if `limit` pairs are not enough, and removed at once: it lives as long as it is open.
    pub fn new(path: &Path, limit: u64) -> Spool {
        Spool { path: path.to_path_buf(), limit, memory: Vec::new(), file: None }
    }

    /// Takes pairs.
    pub fn push(&mut self, pairs: impl Iterator<Item = Pair>) -> Result<()> {
        for pair in pairs {
            self.memory.push(pair);
            if self.memory.len() as u64 >= self.limit {
                self.spill().map_err(|e| Error::io(&self.path, "write the scratch file", e))?;
            }
        }
        Ok(())
    }

    fn spill(&mut self) -> io::Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            none => {
                let file = File::options().read(true).write(true).create_new(true).open(&self.path)?;
                std::fs::remove_file(&self.path)?;
                none.insert(BufWriter::with_capacity(1 << 20, file))
            }
        };
        for pair in self.memory.drain(..) {
            let mut bytes = [0; PAIR_BYTES];
            for (at, n) in bytes.chunks_mut(4).zip([pair.source, pair.image, pair.block]) {
                at.copy_from_slice(&n.to_le_bytes());
            }
            file.write_all(&bytes)?;
        }
        Ok(())
    }

    /// Gives the pairs of each window, ascending, windows in order; those without a pair are left out.
    pub fn windows(mut self, blocks: u64, mut give: impl FnMut(&mut [Pair]) -> Result<()>) -> Result<()> {
        let Some(mut file) = self.file.take() else { return each_window(&mut self.memory, &mut give) };
        let path = self.path.clone();
        let failed = |e| Error::io(&path, "read the scratch file", e);
        // Those that are still in memory, too.
        self.file = Some(file);
        self.spill().map_err(failed)?;
        file = match self.file.take() {
            Some(file) => file,
            None => return Ok(()),
        };
        let mut file = file.into_inner().map_err(|e| failed(e.into_error()))?;
        // No window has more pairs than two a block: one in the image's own domain, one in the public one.
        let step = (self.limit / (2 * WINDOW)).max(1) * WINDOW;
        let mut from = 0;
        while from < blocks {
            let mut pairs = read_range(&mut file, from..from + step).map_err(failed)?;
            each_window(&mut pairs, &mut give)?;
            from += step;
        }
        Ok(())
    }
}

/// Sorts the pairs and gives those of each window: where a window ends, runs are cut.
pub(super) fn each_window(pairs: &mut [Pair], give: &mut impl FnMut(&mut [Pair]) -> Result<()>) -> Result<()> {
    pairs.sort_unstable_by_key(|p| p.source);
    let window = |p: &Pair| u64::from(p.source) / WINDOW;
    pairs.chunk_by_mut(|a, b| window(a) == window(b)).try_for_each(give)
}

fn read_range(file: &mut File, range: Range<u64>) -> io::Result<Vec<Pair>> {
    file.rewind()?;
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let mut out = Vec::new();
    let mut bytes = [0; PAIR_BYTES];
    loop {
        match reader.read_exact(&mut bytes) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(out),
            other => other?,
        }
        let n = |i: usize| bytes.get(i * 4..i * 4 + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
        if range.contains(&u64::from(n(0))) {
            out.push(Pair { source: n(0), image: n(1), block: n(2) });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_and_without_a_file_the_same_comes_out() {
        let dir = tempfile::tempdir().unwrap();
        let pair = |n: u32| Pair { source: n.wrapping_mul(2_654_435_761), image: n, block: n ^ 7 };
        let collect = |limit: u64| {
            let path = dir.path().join("s");
            let mut spool = Spool::new(&path, limit);
            spool.push((0..2000).map(pair)).unwrap();
            assert!(!path.exists());
            let mut windows: Vec<Vec<Pair>> = Vec::new();
            spool
                .windows(1 << 32, |w| {
                    windows.push(w.to_vec());
                    Ok(())
                })
                .unwrap();
            windows
        };
        let want = collect(1 << 20);
        assert_eq!(want.iter().map(Vec::len).sum::<usize>(), 2000);
        assert!(want.len() > 500 && want.concat().is_sorted_by_key(|p| p.source));
        assert_eq!(collect(64), want);
        assert_eq!(collect(2000), want);
    }
}
