use super::*;
use crate::fingerprint::Algorithm;
use crate::library::Policy;

fn library() -> (tempfile::TempDir, Library) {
    let dir = tempfile::tempdir().unwrap();
    let library = Library::init(dir.path().join("lib"), Policy::DEFAULT, Algorithm::Sha1).unwrap();
    (dir, library)
}

fn info(targets: &[u32]) -> LeaseInfo {
    LeaseInfo {
        host: "h\"1\n".into(),
        boot_id: this_boot(),
        pid: 7,
        image: "web".into(),
        image_id: 3,
        generation: 2,
        digest: hex(&[9; 32]),
        targets: targets.iter().map(|&id| LeaseTarget { id, generation: 1 }).collect(),
        control: Some("/run/c".into()),
        started: 1_700_000_000,
    }
}

fn files(library: &Library) -> usize {
    fs::read_dir(library.dir().join(LEASES)).unwrap().count()
}

#[test]
fn a_lease_lives_as_long_as_its_holder() {
    let (_dir, library) = library();
    assert_eq!(live(library.dir()).unwrap(), [], "no directory, no leases");
    let first = Lease::take(&library, &info(&[0, 3])).unwrap().unwrap();
    let second = Lease::take(&library, &info(&[5])).unwrap().unwrap();
    let seen = live(library.dir()).unwrap();
    assert_eq!(seen.len(), 2);
    assert!(seen.contains(&Live::Known(info(&[0, 3]))), "{seen:?}");
    let covered = |id, generation| seen.iter().filter(|l| l.covers(id, generation)).count();
    assert_eq!((covered(0, 1), covered(0, 2), covered(3, 2), covered(5, 1), covered(6, 1)), (1, 0, 2, 1, 0));
    drop(first);
    assert_eq!(live(library.dir()).unwrap(), [Live::Known(info(&[5]))]);
    // As a kill leaves it.
    let Lease { path, file, .. } = &*std::mem::ManuallyDrop::new(second);
    assert!(path.exists());
    // SAFETY: the descriptor is open, belongs to a lease that is never dropped, and nothing uses it afterwards.
    unsafe { libc::close(std::os::fd::AsRawFd::as_raw_fd(file)) };
    assert_eq!(live(library.dir()).unwrap(), []);
    assert_eq!(files(&library), 0, "who looks removes what is dead");
}

#[test]
fn a_change_is_seen_at_once_and_whole() {
    let (_dir, library) = library();
    let mut lease = Lease::take(&library, &info(&[])).unwrap().unwrap();
    let long: Vec<u32> = (0..5000).collect();
    let mut states = [info(&[1]), info(&long), info(&[2, 3])];
    states.iter_mut().for_each(|s| s.targets.sort_unstable());
    lease.update(states[0].targets.clone()).unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|s| {
        let watcher = s.spawn(|| {
            let mut looks = 0;
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                let seen = live(library.dir()).unwrap();
                assert!(matches!(&seen[..], [Live::Known(one)] if states.contains(one)), "{looks}: not whole");
                looks += 1;
            }
            looks
        });
        for round in 0..100 {
            lease.update(states[round % 3].targets.clone()).unwrap();
            assert_eq!(live(library.dir()).unwrap(), [Live::Known(states[round % 3].clone())]);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        assert!(watcher.join().unwrap() > 10);
    });
    // Removed by somebody: it is there again with the next change.
    fs::remove_file(lease.path()).unwrap();
    assert_eq!(live(library.dir()).unwrap(), []);
    lease.update(states[2].targets.clone()).unwrap();
    assert_eq!(live(library.dir()).unwrap(), [Live::Known(states[2].clone())]);
}

#[test]
fn what_makes_no_sense_counts_for_every_image_and_stays() {
    let (_dir, library) = library();
    let lease = Lease::take(&library, &info(&[1])).unwrap().unwrap();
    let text = fs::read(lease.path()).unwrap();
    drop(lease);
    let put = |name: &str, bytes: &[u8]| fs::write(library.dir().join(LEASES).join(name), bytes).unwrap();
    let good = String::from_utf8(text.clone()).unwrap();
    put("newer.json", good.replace("\"version\":1", "\"version\":2,\"more\":{}").as_bytes());
    put("empty.json", b"");
    put("cut.json", &text[..text.len() / 2]);
    put("other.json", good.replace("vmar-lease", "something").as_bytes());
    put("changed.json", good.replace("\"id\":1", "\"id\":4").as_bytes());
    put("not-a-lease", b"x");
    put("dead.json", &text);
    put("dead.new", b"half of it");
    // Opening this would wait for somebody to write.
    rustix::fs::mkfifoat(rustix::fs::CWD, library.dir().join(LEASES).join("fifo.json"), rustix::fs::Mode::RUSR)
        .unwrap();
    let seen = live(library.dir()).unwrap();
    assert_eq!(seen.len(), 6, "{seen:?}");
    assert!(seen.iter().all(|l| matches!(l, Live::Unknown(_)) && l.covers(77, 7)));
    assert_eq!(files(&library), 7, "only the dead ones went");
}

/// Nobody loses a lease to somebody who looks at the very moment that it is taken.
#[test]
fn takers_and_lookers_side_by_side() {
    let (_dir, library) = library();
    std::thread::scope(|s| {
        let takers: Vec<_> = (0..2)
            .map(|i| {
                let library = &library;
                s.spawn(move || {
                    for round in 0..150 {
                        let mine = info(&[i, 1000 + round]);
                        let lease = Lease::take(library, &mine).unwrap().unwrap();
                        assert!(live(library.dir()).unwrap().contains(&Live::Known(mine)), "{i} {round}");
                        assert!(lease.path().exists());
                    }
                })
            })
            .collect();
        while !takers.iter().all(|t| t.is_finished()) {
            live(library.dir()).unwrap();
        }
    });
    assert_eq!(live(library.dir()).unwrap(), []);
    assert_eq!(files(&library), 0);
}

#[test]
fn a_library_that_cannot_be_written_gives_no_lease_and_no_error() {
    let (_dir, library) = library();
    let leases = library.dir().join(LEASES);
    // Even root cannot make a directory here.
    fs::write(&leases, b"").unwrap();
    assert!(Lease::take(&library, &info(&[1])).is_err(), "something in the way is no refusal");
    fs::remove_file(&leases).unwrap();
    assert!(is_refusal(&std::io::Error::from_raw_os_error(libc::EROFS)));
    assert!(!is_refusal(&std::io::Error::from_raw_os_error(libc::ENOSPC)));
}
