//! What only the inside can see: the order of writes and syncs, and what happens when one of them fails.

use super::*;
use crate::io::IoBuf;
use crate::io::buf::total_len;
use crate::io::fault::Op;
use std::fs;
use std::os::unix::fs::FileExt;

/// What changes the file or makes it durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Write { at: u64, len: usize },
    SyncData,
    SyncAll,
    Punch { at: u64, len: u64 },
}

/// Records events and fails the one it is told to.
#[derive(Debug, Default)]
pub(super) struct Probe {
    events: Mutex<Vec<Event>>,
    /// Fail the event that comes after this many others, with this errno.
    fail: Mutex<Option<(usize, i32)>>,
}

impl Faults for Probe {
    fn run(&self, op: &Op<'_>, go: &mut dyn FnMut(usize) -> io::Result<usize>) -> io::Result<usize> {
        self.events.lock().unwrap().push(match *op {
            Op::Write { at, bufs } => Event::Write { at, len: total_len(bufs) },
            Op::Punch { at, len } => Event::Punch { at, len },
            Op::SyncData => Event::SyncData,
            Op::SyncAll => Event::SyncAll,
            Op::Read { .. } | Op::ReadCached { .. } => return go(usize::MAX),
        });
        let mut fail = self.fail.lock().unwrap();
        match &mut *fail {
            Some((0, errno)) => {
                let err = io::Error::from_raw_os_error(*errno);
                *fail = None;
                return Err(err);
            }
            Some((n, _)) => *n -= 1,
            None => {}
        }
        drop(fail);
        go(usize::MAX)
    }
}

impl Probe {
    /// The events since the last call.
    pub fn take(&self) -> Vec<Event> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    /// Makes the event after the next `skip` ones fail.
    pub fn fail_after(&self, skip: usize, errno: i32) {
        *self.fail.lock().unwrap() = Some((skip, errno));
    }
}

/// An overlay and the probe in it.
#[derive(Debug)]
struct Probed {
    overlay: Overlay,
    probe: Arc<Probe>,
}

impl std::ops::Deref for Probed {
    type Target = Overlay;

    fn deref(&self) -> &Overlay {
        &self.overlay
    }
}

fn open_probed(path: &Path, opts: &OpenOptions<'_>) -> Result<Probed> {
    let probe = Arc::new(Probe::default());
    let overlay = Overlay::open_with_faults(path, opts, Some(Arc::clone(&probe) as Arc<dyn Faults>))?;
    probe.take();
    Ok(Probed { overlay, probe })
}

struct Base;

impl BaseRead for Base {
    fn read_base(&self, _offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0xba);
        Ok(())
    }
}

const SIZE: u64 = 16 * CLUSTER;

struct Fx {
    dir: tempfile::TempDir,
}

impl Fx {
    fn new() -> Fx {
        Fx::with_sizes(SIZE, SIZE)
    }

    fn with_sizes(size: u64, capacity: u64) -> Fx {
        let fx = Fx { dir: tempfile::tempdir().unwrap() };
        let base = BaseIdentity { digest: [1; 32], generation: 0, size };
        create(&fx.path(), &CreateOptions { backing: Path::new("/base"), base, size, capacity }).unwrap();
        fx
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("o")
    }

    fn open(&self, discard_unflushed: bool) -> Result<Probed> {
        let state_dir = self.dir.path().join("state");
        let opts = OpenOptions { read_only: false, state_dir: &state_dir, base: None, discard_unflushed };
        open_probed(&self.path(), &opts)
    }
}

/// The write of the flush counter.
fn counted(o: &Overlay) -> Event {
    Event::Write { at: o.header.lock().unwrap().flushes_at(), len: 8 }
}

fn write(o: &Overlay, offset: u64, len: usize) -> io::Result<()> {
    let mut mem = vec![7u8; len];
    // SAFETY: `mem` outlives the call.
    let buf = unsafe { IoBuf::from_raw(mem.as_mut_ptr(), len) };
    o.write(offset, &[buf], &Base)
}

fn sector(o: &Overlay, offset: u64) -> u8 {
    let run = o.runs(offset, 512).next().unwrap();
    let mut byte = [0];
    match run.state {
        State::Base => Base.read_base(offset, &mut byte).unwrap(),
        State::Zero => {}
        State::Data => o.file().read_exact_at(&mut byte, o.data_start() + offset).unwrap(),
    }
    byte[0]
}

#[test]
fn a_flush_writes_the_bits_between_two_syncs() {
    let fx = Fx::new();
    let o = fx.open(false).unwrap();
    let data = o.data_start();
    write(&o, 2 * CLUSTER, 4096).unwrap();
    o.flush().unwrap();
    let bits = Event::Write { at: o.layout.l2 + 2 * 16 + 8, len: 8 };
    assert_eq!(
        o.probe.take(),
        [Event::Write { at: data + 2 * CLUSTER, len: 4096 }, Event::SyncData, bits, counted(&o), Event::SyncData]
    );
    o.flush().unwrap();
    assert_eq!(o.probe.take(), [Event::SyncData], "nothing changed: one sync, for the data");
    write(&o, 2 * CLUSTER, 512).unwrap();
    o.flush().unwrap();
    let overwrite = Event::Write { at: data + 2 * CLUSTER, len: 512 };
    assert_eq!(o.probe.take(), [overwrite, Event::SyncData], "no bit changed");
}

#[test]
fn neighbouring_words_go_in_one_write() {
    let fx = Fx::new();
    let o = fx.open(false).unwrap();
    write(&o, 3 * CLUSTER, index(3 * CLUSTER)).unwrap();
    write(&o, 9 * CLUSTER, 2048).unwrap();
    o.probe.take();
    o.flush().unwrap();
    let l2 = o.layout.l2;
    assert_eq!(
        o.probe.take(),
        [
            Event::SyncData,
            Event::Write { at: l2 + 3 * 16 + 8, len: 16 * 2 + 8 },
            Event::Write { at: l2 + 9 * 16 + 8, len: 8 },
            counted(&o),
            Event::SyncData
        ]
    );
    drop(o);
    assert_eq!(check(&fx.path()).unwrap(), Vec::<String>::new());
}

#[test]
fn a_partial_subcluster_is_filled_in_the_same_write() {
    let fx = Fx::new();
    let o = fx.open(false).unwrap();
    write(&o, 2048 + 512, 4096).unwrap();
    assert_eq!(o.probe.take(), [Event::Write { at: o.data_start() + 2048, len: 6144 }]);
    assert_eq!([2048, 2560, 6144, 6656, 7680].map(|at| sector(&o, at)), [0xba, 7, 7, 0xba, 0xba]);
    // Head in data, tail in base: only the tail is filled.
    write(&o, 7680, 1024).unwrap();
    assert_eq!(o.probe.take(), [Event::Write { at: o.data_start() + 7680, len: 512 + 2048 }]);
    assert_eq!([7168, 7680, 8192, 8704, 9728].map(|at| sector(&o, at)), [0xba, 7, 7, 0xba, 0xba]);
}

#[test]
fn a_full_disk_changes_nothing_but_the_answer() {
    let fx = Fx::new();
    let o = fx.open(false).unwrap();
    o.probe.fail_after(0, libc::ENOSPC);
    assert_eq!(write(&o, 512, 512).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(o.runs(0, SIZE).map(|r| r.state).collect::<Vec<_>>(), [State::Base]);
    assert_eq!(sector(&o, 512), 0xba);
    o.probe.take();
    o.flush().unwrap();
    assert_eq!(o.probe.take(), [Event::SyncData], "no word is marked");
    write(&o, 512, 512).unwrap();
    assert_eq!(sector(&o, 512), 7);
}

#[test]
fn the_base_failing_fails_the_write_and_nothing_else() {
    struct Broken;
    impl BaseRead for Broken {
        fn read_base(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Err(io::Error::from_raw_os_error(libc::EIO))
        }
    }
    let fx = Fx::new();
    let o = fx.open(false).unwrap();
    let mut mem = [0u8; 512];
    // SAFETY: `mem` outlives the call.
    let buf = unsafe { IoBuf::from_raw(mem.as_mut_ptr(), 512) };
    assert_eq!(o.write(0, &[buf], &Broken).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert!(o.write_zeroes(1024, 4096, true, &Broken).is_err());
    assert_eq!(o.probe.take(), []);
    assert_eq!(o.runs(0, SIZE).map(|r| r.state).collect::<Vec<_>>(), [State::Base]);
    // The lock was given back.
    write(&o, 0, 512).unwrap();
}

#[test]
fn a_hole_that_cannot_be_punched_reads_zeros_all_the_same() {
    let fx = Fx::new();
    let o = fx.open(false).unwrap();
    write(&o, 0, 8192).unwrap();
    o.probe.take();
    o.probe.fail_after(0, libc::EOPNOTSUPP);
    o.write_zeroes(2048, 4096, true, &Base).unwrap();
    assert_eq!(o.probe.take(), [Event::Punch { at: o.data_start() + 2048, len: 4096 }]);
    assert_eq!([0, 2048, 4096, 6144].map(|at| sector(&o, at)), [7, 0, 0, 7]);
    // A part of it is written again: the rest is zeros, not what the file still holds.
    write(&o, 2560, 512).unwrap();
    assert_eq!([2048, 2560, 3072].map(|at| sector(&o, at)), [0, 7, 0]);
}

#[test]
fn a_failed_sync_is_final_also_for_the_next_process() {
    for events_before in [0, 3] {
        let fx = Fx::new();
        let o = fx.open(false).unwrap();
        write(&o, CLUSTER, 2048).unwrap();
        o.flush().unwrap();
        write(&o, 0, 2048).unwrap();
        // The sync before the bits, or the one after them.
        o.probe.fail_after(events_before, libc::EIO);
        assert_eq!(o.flush().unwrap_err().raw_os_error(), Some(libc::EIO));
        for _ in 0..2 {
            let err = o.flush().unwrap_err().to_string();
            assert!(err.contains("an earlier flush of this overlay failed"), "{err}");
        }
        let err = o.close().unwrap_err().to_string();
        assert!(err.contains("cannot flush"), "{err}");
        // Writing goes on; what is lost is the promise.
        write(&o, 4096, 2048).unwrap();
        assert_eq!(sector(&o, 4096), 7);
        drop(o);
        let err = fx.open(false).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Io);
        assert!(err.to_string().contains("a flush of it failed in its last session"), "{err}");
        assert!(err.to_string().contains("--discard-unflushed"), "{err}");
        let o = fx.open(true).unwrap();
        assert_eq!(sector(&o, CLUSTER), 7, "what was flushed before is there");
        assert_eq!(sector(&o, 4096), 0xba, "what was not is not");
        o.flush().unwrap();
        o.close().unwrap();
        assert_eq!(fs::read_dir(fx.dir.path().join("state")).unwrap().count(), 0, "no bitmap is left behind");
    }
}

#[test]
fn words_that_could_not_be_written_wait_for_the_next_flush() {
    let fx = Fx::new();
    let o = fx.open(false).unwrap();
    write(&o, 0, 2048).unwrap();
    write(&o, 5 * CLUSTER, 2048).unwrap();
    o.probe.fail_after(1, libc::ENOSPC);
    assert_eq!(o.flush().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    o.probe.take();
    o.flush().unwrap();
    let bits = |cluster| Event::Write { at: o.layout.bitmap_at(cluster), len: 8 };
    assert_eq!(o.probe.take(), [Event::SyncData, bits(0), bits(5), counted(&o), Event::SyncData]);
}

#[test]
fn what_a_killed_process_left_unflushed_is_marked_again() {
    let fx = Fx::new();
    let o = fx.open(false).unwrap();
    write(&o, 0, 2048).unwrap();
    o.flush().unwrap();
    write(&o, 7 * CLUSTER, 2048).unwrap();
    drop(o);
    let o = fx.open(false).unwrap();
    o.flush().unwrap();
    let bits = Event::Write { at: o.layout.bitmap_at(7), len: 8 };
    assert_eq!(o.probe.take(), [Event::SyncData, bits, counted(&o), Event::SyncData]);
}

#[test]
fn more_changed_words_than_one_batch() {
    // 20 GiB of disk, a write in every second cluster: 160,000 words.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("o");
    let base = BaseIdentity { digest: [1; 32], generation: 0, size: 0 };
    let size = 20 << 30;
    create(&path, &CreateOptions { backing: Path::new("/base"), base, size, capacity: size }).unwrap();
    let opts = OpenOptions { read_only: false, state_dir: &dir.path().join("s"), base: None, discard_unflushed: false };
    let o = open_probed(&path, &opts).unwrap();
    for cluster in (0..size / CLUSTER).step_by(2) {
        o.write_zeroes(cluster * CLUSTER, 2048, false, &Base).unwrap();
    }
    o.probe.take();
    o.flush().unwrap();
    let events = o.probe.take();
    assert_eq!(events.iter().filter(|e| matches!(e, Event::Write { .. })).count(), 163_841);
    assert_eq!(events.iter().filter(|e| **e == Event::SyncData).count(), 4, "3 batches and the end");
    o.close().unwrap();
    assert_eq!(inspect(&path, &dir.path().join("s")).unwrap().zero_subclusters, 163_840);
}

#[test]
fn a_flush_that_waited_for_one_begun_later_does_nothing() {
    let fx = Fx::new();
    let o = fx.open(false).unwrap();
    std::thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                for n in 0..50 {
                    write(&o, n * 2048, 2048).unwrap();
                    o.flush().unwrap();
                }
            });
        }
    });
    o.probe.take();
    drop(o);
    // All 200 returned: everything is in the file.
    let o = fx.open(false).unwrap();
    o.flush().unwrap();
    assert_eq!(o.probe.take(), [Event::SyncData]);
}

#[test]
fn a_header_of_any_bytes_is_an_error_and_no_panic() {
    use proptest::prelude::*;
    let fx = Fx::new();
    let good = fs::read(fx.path()).unwrap()[..512].to_vec();
    proptest!(|(at in 0usize..512, byte: u8, cut in 0usize..=512, junk in prop::collection::vec(any::<u8>(), 0..300))| {
        let path = Path::new("o");
        let _ = Header::parse(path, &good[..cut]);
        let _ = Header::parse(path, &junk);
        let mut bad = good.clone();
        bad[at] = byte;
        let _ = Header::parse(path, &bad);
        bad[112..112 + junk.len()].copy_from_slice(&junk);
        let _ = Header::parse(path, &bad);
    });
    let mut header = Header::parse(Path::new("o"), &good).unwrap();
    let session = Session { id: [9; 16], boot: [8; 16] };
    let open = header.with_session(session).to_vec();
    let reread = Header::parse(Path::new("o"), &open).unwrap();
    assert!(reread.untouched() && reread.extension.session == session);
    assert_eq!(header.with_session(Session::CLOSED), &good);
}

#[test]
fn a_header_of_version_1_is_only_read_to_be_rewritten() {
    let fx = Fx::new();
    let mut old = fs::read(fx.path()).unwrap()[..512].to_vec();
    // 104 bytes of extension, and everything behind it 16 bytes earlier.
    old.drain(136 + 104..136 + 120);
    old[132..136].copy_from_slice(&104u32.to_be_bytes());
    old[136..140].copy_from_slice(&1u32.to_be_bytes());
    let backing_at = u64::from_be_bytes(old[8..16].try_into().unwrap()) - 16;
    old[8..16].copy_from_slice(&backing_at.to_be_bytes());
    let path = Path::new("o");
    let err = Header::parse(path, &old).unwrap_err();
    assert!(err.to_string().contains("'vmar overlay relayout o'"), "{err}");
    let header = Header::parse_also_old(path, &old).unwrap();
    assert_eq!((header.backing.as_path(), header.extension.capacity), (Path::new("/base"), SIZE));
    assert_eq!(Layout::new(SIZE, SIZE).agrees_with(&header), Ok(()));
}

#[test]
fn growth_is_durable_before_it_is_told_and_clears_what_is_behind_the_end_first() {
    let fx = Fx::with_sizes(SIZE - CLUSTER + 512, SIZE);
    let o = fx.open(false).unwrap();
    let size = Event::Write { at: 24, len: 8 };
    o.resize(SIZE - CLUSTER + 1024).unwrap();
    assert_eq!(o.probe.take(), [size, Event::SyncData], "nothing was ever written there");
    write(&o, SIZE - CLUSTER + 512, 512).unwrap();
    o.probe.take();
    o.resize(SIZE - CLUSTER + 1536).unwrap();
    let zeros = Event::Write { at: o.data_start() + SIZE - CLUSTER + 1024, len: 1024 };
    let bits = Event::Write { at: o.layout.bitmap_at(15), len: 8 };
    assert_eq!(o.probe.take(), [zeros, Event::SyncData, bits, counted(&o), Event::SyncData, size, Event::SyncData]);
    // Any of them failing leaves the size as it was; a failed sync is as final as in a flush.
    for (skip, errno) in [(0, libc::ENOSPC), (1, libc::EIO)] {
        let before = o.size();
        o.probe.fail_after(skip, errno);
        let err = o.resize(before + CLUSTER / 2).unwrap_err().to_string();
        assert!(err.contains("cannot make the disk larger"), "{err}");
        assert_eq!(o.size(), before);
        let on_disk = fs::read(fx.path()).unwrap();
        assert_eq!(on_disk[24..32], before.to_be_bytes());
    }
    assert!(o.flush().unwrap_err().to_string().contains("an earlier flush"));
}

#[test]
fn each_flush_that_writes_words_counts_and_a_kill_in_between_is_no_matter() {
    let fx = Fx::new();
    let o = fx.open(false).unwrap();
    let in_file = |o: &Overlay| {
        let mut word = [0; 8];
        o.disk.read(&mut word, o.header.lock().unwrap().flushes_at()).unwrap();
        u64::from_be_bytes(word)
    };
    write(&o, 0, 2048).unwrap();
    o.flush().unwrap();
    o.flush().unwrap();
    write(&o, 0, 2048).unwrap();
    o.flush().unwrap();
    assert_eq!(in_file(&o), 1, "an overwrite changes no word");
    write(&o, 2048, 2048).unwrap();
    // The words get in, the counter does not: the next flush, which has no words, counts them.
    o.probe.fail_after(2, libc::ENOSPC);
    assert_eq!(o.flush().unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    assert_eq!((in_file(&o), o.words.live().unwrap().flushes()), (1, (1, 2)));
    o.probe.take();
    o.flush().unwrap();
    assert_eq!(o.probe.take(), [counted(&o), Event::SyncData]);
    assert_eq!((in_file(&o), o.words.live().unwrap().flushes()), (2, (2, 2)));
    // Killed before the counter was written, and after.
    drop(o);
    for counted in [false, true] {
        let o = fx.open(false).unwrap();
        let before = in_file(&o);
        assert_eq!(o.words.live().unwrap().flushes(), (before, before));
        o.words.begin_counting(before + 1);
        if counted {
            let (word, at) = o.header.lock().unwrap().with_flushes(before + 1);
            o.disk.write(&word, at).unwrap();
        }
        drop(o);
        assert_eq!(in_file(&fx.open(false).unwrap()), before + u64::from(counted));
    }
}

#[test]
fn bits_of_other_writers_go_also_from_a_session_that_is_taken_up() {
    let fx = Fx::new();
    let o = fx.open(false).unwrap();
    write(&o, 0, 2048).unwrap();
    drop(o);
    let file = File::options().write(true).open(fx.path()).unwrap();
    use std::os::unix::fs::FileExt;
    file.write_all_at(&[0x80, 0, 0, 0, 0, 0, 0, 1], 88).unwrap();
    let o = fx.open(false).unwrap();
    assert_eq!(sector(&o, 0), 7, "taken up");
    assert_eq!(fs::read(fx.path()).unwrap()[88..96], [0x80, 0, 0, 0, 0, 0, 0, 0]);
}

/// The sync that an open does for the header may be the one that hears of lost data of the process before.
#[test]
fn a_sync_that_fails_while_a_session_is_taken_up_is_final_too() {
    // Ours and another writer's bit; no bit at all, as QEMU leaves it when it opens the file for writing.
    for (bits, flushed) in [([0x80, 0, 0, 0, 0, 0, 0, 1], false), ([0; 8], true)] {
        let fx = Fx::new();
        let o = fx.open(false).unwrap();
        write(&o, 0, 2048).unwrap();
        if flushed {
            o.flush().unwrap();
        }
        write(&o, 0, 2048).unwrap();
        drop(o);
        let file = File::options().write(true).open(fx.path()).unwrap();
        file.write_all_at(&bits, 88).unwrap();
        let probe = Arc::new(Probe::default());
        probe.fail_after(1, libc::EIO);
        let state_dir = fx.dir.path().join("state");
        let opts = OpenOptions { read_only: false, state_dir: &state_dir, base: None, discard_unflushed: false };
        let faults = Some(Arc::clone(&probe) as Arc<dyn Faults>);
        Overlay::open_with_faults(&fx.path(), &opts, faults).unwrap_err();
        assert!(matches!(probe.take()[..], [Event::Write { at: 0, .. }, Event::SyncAll]));
        let err = fx.open(false).unwrap_err();
        assert!(err.to_string().contains("a flush of it failed in its last session"), "{err}");
    }
}

#[test]
fn the_write_cache_stays_off_over_a_kill_and_over_a_close() {
    let fx = Fx::new();
    let o = fx.open(false).unwrap();
    assert!(o.write_cache());
    o.set_write_cache(false);
    assert!(!o.write_cache());
    drop(o);
    let o = fx.open(false).unwrap();
    assert!(!o.write_cache());
    o.close().unwrap();
    drop(o);
    let o = fx.open(false).unwrap();
    assert!(!o.write_cache(), "a VM that was migrated, or its server started anew, is not asked again");
    o.set_write_cache(true);
    drop(o);
    let o = fx.open(false).unwrap();
    assert!(o.write_cache());
    o.close().unwrap();
    drop(o);
    assert!(fx.open(false).unwrap().write_cache());
}

#[test]
fn an_overlay_that_could_not_be_closed_goes_on_and_can_be_closed_later() {
    // The write of the header fails; its sync does.
    for skip in [1, 2] {
        let fx = Fx::new();
        let o = fx.open(false).unwrap();
        o.probe.fail_after(skip, libc::EIO);
        assert!(o.close().unwrap_err().to_string().contains("cannot close"));
        write(&o, 0, 2048).unwrap();
        drop(o);
        let o = fx.open(false).unwrap();
        assert_eq!(sector(&o, 0), 7, "killed after that, and taken up");
        o.probe.fail_after(skip + 3, libc::EIO);
        o.close().unwrap_err();
        write(&o, 2048, 2048).unwrap();
        o.close().unwrap();
        drop(o);
        let o = fx.open(true).unwrap();
        assert_eq!((sector(&o, 0), sector(&o, 2048)), (7, 7));
    }
}
