use super::super::tests::{record, with_one_image};
use super::super::{converted_file, map_file, run_file};
use super::*;

/// Every file below the library but the lock.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for place in [RUNS, MAPS, IMAGES, STAGING] {
        out.extend(fs::read_dir(dir.join(place)).unwrap().map(|e| e.unwrap().path()));
    }
    out.sort();
    out
}

#[test]
fn a_second_writer_is_refused_and_told_who_is_first() {
    let (_dir, library, _) = with_one_image();
    let first = Writer::open(library.dir()).unwrap();
    let err = Writer::open(library.dir()).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Busy);
    assert!(err.to_string().contains(&format!("process {}", std::process::id())), "{err}");
    drop(first);
    Writer::open(library.dir()).unwrap();
}

/// A child that is being started has copies of all open files for a moment, the lock's too.
#[test]
fn a_lock_that_was_let_go_is_free_although_processes_are_being_started() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let (_dir, library, _) = with_one_image();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                std::process::Command::new("true").status().unwrap();
            }
        });
        let outcome = (0..300).try_for_each(|_| Writer::open(library.dir()).map(drop));
        done.store(true, Ordering::Relaxed);
        outcome.unwrap();
    });
}

#[test]
fn a_dropped_change_leaves_nothing() {
    let (_dir, library, _) = with_one_image();
    let before = files(library.dir());
    let mut writer = Writer::open(library.dir()).unwrap();
    let mut change = writer.begin();
    fs::write(change.stage(&map_file("b")).unwrap(), "x").unwrap();
    drop(change);
    assert_eq!(files(library.dir()), before);
}

#[test]
fn a_file_in_the_way_is_never_replaced() {
    let (dir, library, _) = with_one_image();
    let mine = library.dir().join(map_file("b"));
    let raw = dir.path().join("b.raw");
    fs::write(&raw, [1; 4096]).unwrap();
    let mut writer = Writer::open(library.dir()).unwrap();

    let mut change = writer.begin();
    fs::write(change.stage(&run_file("b", 1)).unwrap(), "x").unwrap();
    fs::write(change.stage(&map_file("b")).unwrap(), "x").unwrap();
    fs::write(&mine, "mine").unwrap();
    let err = change.commit(vec![record("b", 1, &raw)]).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Exists);
    assert_eq!(fs::read_to_string(&mine).unwrap(), "mine");
    assert!(!library.dir().join(run_file("b", 1)).exists(), "what was moved before is gone again");
    assert_eq!(Library::open(library.dir()).unwrap().images().len(), 1);

    assert_eq!(writer.begin().stage(&map_file("b")).unwrap_err().kind(), ErrorKind::Exists);
}

/// Stops a commit after each of its steps, as kill -9 would, and lets the next writer recover.
#[test]
fn a_writer_killed_at_any_step_leaves_before_or_after() {
    for step in 0..=6 {
        let (dir, library, _) = with_one_image();
        let (lib, staging) = (library.dir().to_path_buf(), library.dir().join(STAGING));
        let before = files(&lib);
        let raw = dir.path().join("b.raw");
        fs::write(&raw, [1; 4096]).unwrap();
        let moves: Vec<Move> = [run_file("b", 1), map_file("b"), converted_file("b", 1)]
            .iter()
            .map(|to| Move { staged: to.rsplit('/').next().unwrap().to_string(), to: to.clone() })
            .collect();
        // Somebody else's files that recovery must not touch.
        let foreign = [lib.join("images/b.g1.txt"), lib.join("maps/z.map")];
        for path in &foreign {
            fs::write(path, "mine").unwrap();
        }

        for file in &moves {
            fs::write(staging.join(&file.staged), "x").unwrap();
        }
        if step >= 1 {
            write_journal(&staging, JOURNAL, &Journal { version: JOURNAL_VERSION, files: moves.clone() }).unwrap();
        }
        for (i, file) in moves.iter().enumerate() {
            if step >= 2 + i {
                rename_new(&staging.join(&file.staged), &lib.join(&file.to)).unwrap();
            }
        }
        let mut catalog = library.catalog().clone();
        catalog.next_id = 2;
        catalog.images.push(record("b", 1, &raw));
        if step == 5 {
            fs::write(staging.join(CATALOG), "half").unwrap();
        }
        if step == 6 {
            save(&lib, &catalog).unwrap();
        }

        let writer = Writer::open(&lib).unwrap();
        let mut after = before.clone();
        after.extend(foreign.iter().cloned());
        if step == 6 {
            after.extend(moves.iter().map(|m| lib.join(&m.to)));
            assert_eq!(writer.library().catalog(), &catalog);
        } else {
            assert_eq!(writer.library().catalog(), library.catalog());
        }
        // The converted file is not named by this record (it is a raw one), so it counts as a leftover.
        after.retain(|p| step != 6 || *p != lib.join(converted_file("b", 1)));
        after.sort();
        assert_eq!(files(&lib), after, "step {step}");
        for path in &foreign {
            assert_eq!(fs::read_to_string(path).unwrap(), "mine");
        }
    }
}

#[test]
fn recovery_keeps_a_file_of_that_name_that_it_did_not_move() {
    let (_dir, library, _) = with_one_image();
    let staging = library.dir().join(STAGING);
    let mine = library.dir().join(converted_file("b", 1));
    fs::write(&mine, "mine").unwrap();
    fs::write(staging.join("b.g1.raw"), "x").unwrap();
    let file = Move { staged: "b.g1.raw".to_string(), to: converted_file("b", 1) };
    write_journal(&staging, JOURNAL, &Journal { version: JOURNAL_VERSION, files: vec![file.clone()] }).unwrap();
    Writer::open(library.dir()).unwrap();
    assert_eq!(fs::read_to_string(&mine).unwrap(), "mine");
    assert!(!staging.join("b.g1.raw").exists());

    // A second link to the staged file is the trace of a rename on a file system without RENAME_NOREPLACE.
    fs::remove_file(&mine).unwrap();
    fs::write(staging.join("b.g1.raw"), "x").unwrap();
    fs::hard_link(staging.join("b.g1.raw"), &mine).unwrap();
    write_journal(&staging, JOURNAL, &Journal { version: JOURNAL_VERSION, files: vec![file] }).unwrap();
    Writer::open(library.dir()).unwrap();
    assert!(!mine.exists());
}

#[test]
fn a_journal_that_leads_out_of_the_library_is_refused() {
    let (_dir, library, _) = with_one_image();
    let staging = library.dir().join(STAGING);
    for to in ["../x", "library.json", "runs/../../x", "other/x", "maps/.."] {
        let file = Move { staged: "x".to_string(), to: to.to_string() };
        write_journal(&staging, JOURNAL, &Journal { version: JOURNAL_VERSION, files: vec![file] }).unwrap();
        assert_eq!(Writer::open(library.dir()).unwrap_err().kind(), ErrorKind::Corrupt, "{to}");
    }
    write_journal(&staging, JOURNAL, &Journal { version: JOURNAL_VERSION + 1, files: vec![] }).unwrap();
    assert_eq!(Writer::open(library.dir()).unwrap_err().kind(), ErrorKind::Unsupported);
}

/// Stops a replacement of all maps after each of its steps, and lets the next writer recover.
#[test]
fn new_maps_are_there_once_their_journal_is() {
    for step in 0..=6 {
        let (dir, library, _) = with_one_image();
        let (lib, staging) = (library.dir().to_path_buf(), library.dir().join(STAGING));
        let raw = dir.path().join("b.raw");
        fs::write(&raw, [1; 4096]).unwrap();
        let mut catalog = library.catalog().clone();
        catalog.next_id = 2;
        catalog.images.push(record("b", 1, &raw));
        save(&lib, &catalog).unwrap();
        let names = ["a".to_string(), "b".to_string()];
        let map = |name: &str| lib.join(map_file(name));
        for name in &names {
            fs::write(map(name), "old").unwrap();
            fs::write(staging.join(staged_map(name)), "new").unwrap();
        }
        let journal = RemapJournal { version: JOURNAL_VERSION, policy: Policy::BRIDGE, images: names.to_vec() };
        match step {
            0 => {}
            1 => fs::write(staging.join(format!("{REMAP}.new")), "half").unwrap(),
            _ => write_journal(&staging, REMAP, &journal).unwrap(),
        }
        for (i, name) in names.iter().enumerate() {
            if step >= 3 + i {
                fs::rename(staging.join(staged_map(name)), map(name)).unwrap();
            }
        }
        if step == 5 {
            fs::write(staging.join(CATALOG), "half").unwrap();
        }
        if step == 6 {
            catalog.set_policy(Policy::BRIDGE);
            save(&lib, &catalog).unwrap();
        }

        let writer = Writer::open(&lib).unwrap();
        let (content, policy) = if step < 2 { ("old", Policy::Paper) } else { ("new", Policy::BRIDGE) };
        assert_eq!(writer.library().catalog().policy, policy, "step {step}");
        assert_eq!(Library::open(&lib).unwrap().catalog(), writer.library().catalog());
        assert_eq!(writer.library().images(), catalog.images);
        for name in &names {
            assert_eq!(fs::read_to_string(map(name)).unwrap(), content, "step {step}");
        }
        assert_eq!(fs::read_dir(&staging).unwrap().count(), 0, "step {step}");
    }
}

#[test]
fn a_disk_that_fails_among_the_renames_leaves_the_rest_to_the_next_writer() {
    let (_dir, library, _) = with_one_image();
    let map = library.dir().join(map_file("a"));
    fs::write(&map, "old").unwrap();
    let mut writer = Writer::open(library.dir()).unwrap();
    let change = writer.begin();
    fs::write(change.stage_map("a").unwrap(), "new").unwrap();
    assert_eq!(change.stage_map("z").unwrap_err().kind(), ErrorKind::NotFound);
    // A directory in the place of the map: the rename fails.
    fs::remove_file(&map).unwrap();
    fs::create_dir(&map).unwrap();
    change.commit_maps(Policy::BRIDGE).unwrap_err();
    drop(writer);
    assert!(Writer::open(library.dir()).is_err(), "and says so");
    fs::remove_dir(&map).unwrap();
    let writer = Writer::open(library.dir()).unwrap();
    assert_eq!(fs::read_to_string(&map).unwrap(), "new");
    assert_eq!(writer.library().catalog().policy, Policy::BRIDGE);
}

#[test]
fn a_journal_of_maps_that_leads_out_of_the_library_is_refused() {
    let (_dir, library, _) = with_one_image();
    let staging = library.dir().join(STAGING);
    let write = |version, name: &str| {
        let images = vec![name.to_string()];
        write_journal(&staging, REMAP, &RemapJournal { version, policy: Policy::Paper, images }).unwrap();
        Writer::open(library.dir()).unwrap_err().kind()
    };
    assert_eq!(write(JOURNAL_VERSION, "../x"), ErrorKind::Corrupt);
    assert_eq!(write(JOURNAL_VERSION + 1, "a"), ErrorKind::Unsupported);
}
