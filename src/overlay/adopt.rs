//! Takes back what QEMU leaves behind: its discard, and its write-zeroes with unmap, free whole clusters (descriptor 0,
//! refcount 0, the zero bits stay), and its resize adds clusters that were never allocated. Such a cluster is *unseated*;
//! seating it gives it its own place in the data area again.
//!
//! Nothing else can have that place: in a file whose other tables and descriptors are all at home, nothing refers to it
//! (snapshots and encryption are refused, and persistent bitmaps are refused by `check_bitmaps` where they could).

use super::disk::Disk;
use super::header::{AUTOCLEAR_BITMAPS, Header};
use super::layout::{CLUSTER, CLUSTER_BITS, L2_ENTRY, Layout, SUB, index};
use super::scan::Fault;
use std::io;
use std::ops::Range;

/// L2 entries that are rewritten at once (1 MiB of them).
const ENTRIES_MAX: u64 = 1 << 16;
/// Refcounts that are rewritten at once (64 KiB of them).
const COUNTS_MAX: u64 = 1 << 15;

/// The layout that a header speaks of. Of a disk that QEMU has made larger than its capacity, it is that of the new size if
/// only the data area is longer in it. The header keeps its capacity until a session is begun.
pub(super) fn layout_of(header: &Header) -> Layout {
    let layout = Layout::new(header.size, header.extension.capacity);
    if header.size <= layout.capacity {
        return layout;
    }
    let grown = Layout::new(header.size, header.size);
    if grown.has_tables_of(&layout) { grown } else { layout }
}

/// The clusters of an overlay that have no place, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Unseated {
    ranges: Vec<Range<u64>>,
    /// How far `take_count` has come in `ranges`.
    cursor: usize,
    /// The first one whose place is counted once although no descriptor points there.
    counted: Option<u64>,
    /// The file is shorter than it was made; no data is missing.
    pub is_short: bool,
}

impl Unseated {
    /// Adds a cluster behind all others.
    pub fn push(&mut self, cluster: u64) {
        match self.ranges.last_mut() {
            Some(last) if last.end == cluster => last.end += 1,
            _ => self.ranges.push(cluster..cluster + 1),
        }
    }

    /// True if `cluster` is one of them. To be asked for ascending clusters, once each; remembers if it is `counted`.
    pub fn take_count(&mut self, cluster: u64, counted: bool) -> bool {
        while self.ranges.get(self.cursor).is_some_and(|r| r.end <= cluster) {
            self.cursor += 1;
        }
        let found = self.ranges.get(self.cursor).is_some_and(|r| r.contains(&cluster));
        if found && counted {
            self.counted.get_or_insert(cluster);
        }
        found
    }

    /// How many they are.
    pub fn len(&self) -> u64 {
        self.ranges.iter().map(|r| r.end - r.start).sum()
    }

    /// A cluster that is counted may hold a dirty bitmap of QEMU, as long as the header says that those are valid.
    pub fn check_bitmaps(&self, header: &Header) -> Result<(), Fault> {
        match self.counted {
            Some(cluster) if header.autoclear & AUTOCLEAR_BITMAPS != 0 => {
                Err(Fault::Layout(format!("the place of cluster {cluster} may hold a dirty bitmap")))
            }
            _ => Ok(()),
        }
    }
}

/// Seats them. A kill or a power cut on the way leaves at worst clusters that are counted and not used (`qemu-img check`
/// calls them leaked) and that the next open seats; never one that is used and not counted.
///
/// The old bytes of a cluster never come to light: it has no data bits. They are given back, and what lies behind the end
/// of the disk in its last subcluster becomes zeros, which everyone else relies on.
pub(super) fn seat(disk: &Disk, layout: &Layout, unseated: &Unseated) -> io::Result<()> {
    if unseated.is_short {
        disk.bare().set_len(layout.file_len())?;
        disk.sync_all()?;
    }
    if unseated.ranges.is_empty() {
        return Ok(());
    }
    for range in &unseated.ranges {
        let (at, len) = (layout.data + range.start * CLUSTER, (range.end - range.start) * CLUSTER);
        if let Err(e) = disk.punch(at, len) {
            log::debug!("cannot punch a hole: {e}");
        }
    }
    zero_tail(disk, layout, unseated)?;
    for range in &unseated.ranges {
        each_piece(range, COUNTS_MAX, |piece| {
            let ones: Vec<u8> = (piece.start..piece.end).flat_map(|_| [0, 1]).collect();
            disk.write(&ones, layout.refcount_at(piece.start))
        })?;
    }
    disk.sync_all()?;
    for range in &unseated.ranges {
        each_piece(range, ENTRIES_MAX, |piece| {
            let at = layout.bitmap_at(piece.start) - 8;
            let mut entries = vec![0; index((piece.end - piece.start) * L2_ENTRY)];
            disk.read(&mut entries, at)?;
            for (cluster, entry) in piece.zip(entries.as_chunks_mut::<{ index(L2_ENTRY) }>().0) {
                entry[..8].copy_from_slice(&layout.descriptor(cluster).to_be_bytes());
            }
            disk.write(&entries, at)
        })?;
    }
    disk.sync_all()
}

/// The hole may have failed, or be rounded; these bytes must be zero.
fn zero_tail(disk: &Disk, layout: &Layout, unseated: &Unseated) -> io::Result<()> {
    let tail = layout.size..layout.size.next_multiple_of(SUB);
    let last = layout.size >> CLUSTER_BITS;
    if tail.is_empty() || !unseated.ranges.iter().any(|r| r.contains(&last)) {
        return Ok(());
    }
    disk.write(&vec![0; index(tail.end - tail.start)], layout.data + tail.start)
}

fn each_piece(range: &Range<u64>, max: u64, mut f: impl FnMut(Range<u64>) -> io::Result<()>) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let end = (at + max).min(range.end);
        f(at..end)?;
        at = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::tests::Probe;
    use super::super::{
        BaseIdentity, CreateOptions, OpenOptions, Overlay, check, create, examine, read_metadata, scan,
    };
    use super::*;
    use crate::io::fault::Faults;
    use std::fs::{self, File};
    use std::os::unix::fs::FileExt;
    use std::path::{Path, PathBuf};
    use std::sync::Arc;

    struct Zeros;

    impl super::super::BaseRead for Zeros {
        fn read_base(&self, _offset: u64, buf: &mut [u8]) -> io::Result<()> {
            buf.fill(0);
            Ok(())
        }
    }

    const SIZE: u64 = 20 * CLUSTER + 1536;

    fn new_overlay(dir: &Path) -> PathBuf {
        let path = dir.join("o.qcow2");
        let base = BaseIdentity { digest: [1; 32], generation: 0, size: 512 };
        create(&path, &CreateOptions { backing: Path::new("/base"), base, size: SIZE, capacity: SIZE }).unwrap();
        path
    }

    fn writable(path: &Path) -> File {
        File::options().read(true).write(true).open(path).unwrap()
    }

    fn metadata(path: &Path) -> (Disk, Header, Layout) {
        read_metadata(path, Disk::new(writable(path), None)).unwrap()
    }

    /// Frees clusters as QEMU does, with something in them.
    fn free(path: &Path, clusters: &[u64]) {
        let (disk, _, layout) = metadata(path);
        for cluster in clusters {
            let file = disk.bare();
            file.write_all_at(&[0, 0], layout.refcount_at(*cluster)).unwrap();
            file.write_all_at(&[0; 8], layout.bitmap_at(*cluster) - 8).unwrap();
            file.write_all_at(&0xffff_ffff_0000_0000u64.to_be_bytes(), layout.bitmap_at(*cluster)).unwrap();
            file.write_all_at(&[0xdd; 65536], layout.data + cluster * CLUSTER).unwrap();
        }
    }

    /// Descriptor and refcount of a cluster.
    fn place_of(path: &Path, cluster: u64) -> (u64, u16) {
        let (disk, _, layout) = metadata(path);
        let (mut descriptor, mut count) = ([0; 8], [0; 2]);
        disk.read(&mut descriptor, layout.bitmap_at(cluster) - 8).unwrap();
        disk.read(&mut count, layout.refcount_at(cluster)).unwrap();
        (u64::from_be_bytes(descriptor), u16::from_be_bytes(count))
    }

    #[test]
    fn whatever_step_fails_no_cluster_is_used_and_not_counted_and_the_next_time_puts_it_right() {
        let freed = [0, 3, 4, 5, 9, 19, 20];
        for step in 0.. {
            let dir = tempfile::tempdir().unwrap();
            let path = new_overlay(dir.path());
            free(&path, &freed);
            let (disk, _, layout) = metadata(&path);
            let unseated = scan::all(&disk, &layout, Err, |_, _| {}).unwrap();
            assert_eq!(unseated.ranges, [0..1, 3..6, 9..10, 19..21]);
            assert_eq!(examine(&path).unwrap().freed_clusters, 7);
            let probe = Arc::new(Probe::default());
            let probed = Disk::new(writable(&path), Some(Arc::clone(&probe) as Arc<dyn Faults>));
            probe.fail_after(step, libc::EIO);
            let failed = seat(&probed, &layout, &unseated).is_err();
            let events = probe.take().len();
            drop(probed);
            drop(disk);
            for cluster in 0..21 {
                let (descriptor, count) = place_of(&path, cluster);
                assert!(descriptor == 0 || descriptor == layout.descriptor(cluster) && count == 1, "{step}: {cluster}");
            }
            assert_eq!(check(&path).unwrap(), Vec::<String>::new(), "step {step}");
            let state_dir = &dir.path().join("state");
            let o = Overlay::open(
                &path,
                &OpenOptions { read_only: false, state_dir, base: None, discard_unflushed: false },
            );
            let o = o.unwrap();
            let words: Vec<u64> = o.words.get().iter().map(|w| w.load(std::sync::atomic::Ordering::Relaxed)).collect();
            o.close().unwrap();
            for cluster in 0..21 {
                assert_eq!(place_of(&path, cluster), (layout.descriptor(cluster), 1));
                let word = if freed.contains(&cluster) { 0xffff_ffff_0000_0000 } else { 0 };
                assert_eq!(words[index(cluster)], word);
            }
            assert_eq!(examine(&path).unwrap().freed_clusters, 0);
            let mut tail = [1; 512];
            o.disk.bare().read_exact_at(&mut tail, layout.data + SIZE).unwrap();
            assert_eq!(tail, [0; 512], "behind the end of the disk");
            if !failed && step >= events {
                return;
            }
        }
    }

    #[test]
    fn a_file_that_was_cut_off_behind_its_data_gets_its_length_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = new_overlay(dir.path());
        free(&path, &[18, 19, 20]);
        let (disk, _, layout) = metadata(&path);
        // Three subclusters of data.
        disk.write(&0x4u64.to_be_bytes(), layout.bitmap_at(17)).unwrap();
        let cut = |subclusters: u64| {
            let len = layout.data + 17 * CLUSTER + subclusters * SUB;
            File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        };
        let state_dir = &dir.path().join("state");
        let options = OpenOptions { read_only: false, state_dir, base: None, discard_unflushed: false };
        cut(2);
        assert!(Overlay::open(&path, &options).unwrap_err().to_string().contains("is cut off"));
        cut(3);
        let len = fs::metadata(&path).unwrap().len();
        assert!(Overlay::open(&path, &OpenOptions { read_only: true, ..options }).is_ok());
        assert_eq!(fs::metadata(&path).unwrap().len(), len, "reading changes nothing");
        // With data in the live bitmap only, it is another matter.
        let o = Overlay::open(&path, &options).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), layout.file_len());
        let mut sector = [7; 512];
        // SAFETY: `sector` outlives the write and is not touched meanwhile.
        let piece = unsafe { crate::io::IoBuf::from_raw(sector.as_mut_ptr(), 512) };
        o.write(19 * CLUSTER, &[piece], &Zeros).unwrap();
        drop(o);
        cut(3);
        // Its seal is gone too, where there are seals.
        let err = Overlay::open(&path, &options).unwrap_err().to_string();
        assert!(err.contains("is cut off") || err.contains("--discard-unflushed"), "{err}");
        let options = OpenOptions { discard_unflushed: true, ..options };
        fs::remove_dir_all(state_dir).unwrap();
        Overlay::open(&path, &options).unwrap().close().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), layout.file_len());
    }

    #[test]
    fn data_bits_without_a_place_and_places_that_may_hold_a_bitmap_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = new_overlay(dir.path());
        let state_dir = &dir.path().join("state");
        let options = OpenOptions { read_only: false, state_dir, base: None, discard_unflushed: false };
        let refused = |why: &str| {
            let err = Overlay::open(&path, &options).unwrap_err().to_string();
            assert!(err.contains(why) && check(&path).unwrap().join(" ").contains(why), "{err}");
        };
        free(&path, &[7]);
        let (disk, _, layout) = metadata(&path);
        disk.write(&1u64.to_be_bytes(), layout.bitmap_at(7)).unwrap();
        refused("cluster 7 is unallocated and has data all the same");
        disk.write(&(1u64 << 32).to_be_bytes(), layout.bitmap_at(7)).unwrap();
        disk.write(&[0, 1], layout.refcount_at(7)).unwrap();
        disk.write(&AUTOCLEAR_BITMAPS.to_be_bytes(), 88).unwrap();
        refused("the place of cluster 7 may hold a dirty bitmap");
        disk.write(&[0, 2], layout.refcount_at(7)).unwrap();
        refused("cluster 7 has refcount 2");
        disk.write(&[0, 1], layout.refcount_at(7)).unwrap();
        disk.write(&[0; 8], 88).unwrap();
        Overlay::open(&path, &options).unwrap().close().unwrap();
        assert_eq!(place_of(&path, 7), (layout.descriptor(7), 1));
    }
}
