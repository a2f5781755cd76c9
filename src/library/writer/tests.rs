use super::super::tests::{record, with_one_image};
use super::super::{made_file, map_file, run_file};
use super::*;
use crate::units::ImageId;

/// Every file below the library but the lock.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut out = Vec::new();
    for place in [RUNS, MAPS, IMAGES, INDEX, STAGING] {
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

const B: ImageId = ImageId(1);

/// Adds a record as a commit does.
fn with(record: crate::library::ImageRecord) -> impl FnOnce(&mut Catalog) {
    |catalog| {
        catalog.next_id = record.id.0 + 1;
        catalog.images.push(record);
    }
}

#[test]
fn a_file_in_the_way_is_never_replaced() {
    let (dir, library, _) = with_one_image();
    let mine = library.dir().join(map_file("b"));
    let raw = dir.path().join("b.raw");
    fs::write(&raw, [1; 4096]).unwrap();
    let mut writer = Writer::open(library.dir()).unwrap();

    let mut change = writer.begin();
    fs::write(change.stage(&run_file("b", B)).unwrap(), "x").unwrap();
    fs::write(change.stage(&map_file("b")).unwrap(), "x").unwrap();
    fs::write(&mine, "mine").unwrap();
    let err = change.commit(with(record("b", 1, &raw))).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Exists);
    assert_eq!(fs::read_to_string(&mine).unwrap(), "mine");
    assert!(!library.dir().join(run_file("b", B)).exists(), "what was moved before is gone again");
    assert_eq!(Library::open(library.dir()).unwrap().images().len(), 1);

    assert_eq!(writer.begin().stage(&map_file("b")).unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(writer.begin().stage_over("maps/z.map").unwrap_err().kind(), ErrorKind::NotFound);
}

/// A commit with all that a commit can have: new files, a map in place of another, one that goes.
fn staged(library: &Library, raw: &Path) -> (Journal, Catalog) {
    let staging = library.dir().join(STAGING);
    let to_move = |to: String| Move { staged: format!("{}.s", to.rsplit('/').next().unwrap()), to };
    let mut journal = Journal::default();
    journal.new = [run_file("b", B), map_file("b"), made_file("b", B)].map(to_move).to_vec();
    journal.replace = vec![to_move(map_file("a"))];
    journal.remove = vec!["index/7.table".to_string()];
    for file in journal.new.iter().chain(&journal.replace) {
        fs::write(staging.join(&file.staged), "new").unwrap();
    }
    fs::write(library.dir().join("index/7.table"), "old").unwrap();
    let mut catalog = library.catalog().clone();
    with(record("b", 1, raw))(&mut catalog);
    catalog.changed();
    (journal, catalog)
}

/// Stops a commit after each of its steps, as kill -9 would, and lets the next writer recover.
#[test]
fn a_writer_killed_at_any_step_leaves_before_or_after() {
    for step in 0..=9 {
        let (dir, library, _) = with_one_image();
        let lib = library.dir().to_path_buf();
        let raw = dir.path().join("b.raw");
        fs::write(&raw, [1; 4096]).unwrap();
        // Somebody else's files that recovery must not touch.
        let foreign = [lib.join("images/b.g1.txt"), lib.join("maps/z.map")];
        for path in &foreign {
            fs::write(path, "mine").unwrap();
        }
        let before = files(&lib);
        let (journal, catalog) = staged(&library, &raw);
        let staging = lib.join(STAGING);
        let moves: Vec<Move> = journal.new.iter().chain(&journal.replace).cloned().collect();
        if step >= 1 {
            fs::write(staging.join("catalog.new"), catalog.to_json().unwrap()).unwrap();
        }
        if step >= 2 {
            journal.write_for_tests(&staging);
        }
        for (i, file) in moves.iter().enumerate() {
            if step >= 3 + i {
                fs::rename(staging.join(&file.staged), lib.join(&file.to)).unwrap();
            }
        }
        if step >= 7 {
            fs::rename(staging.join("catalog.new"), lib.join(CATALOG)).unwrap();
        }
        if step >= 8 {
            fs::remove_file(lib.join("index/7.table")).unwrap();
        }
        if step >= 9 {
            fs::remove_file(staging.join("commit.json")).unwrap();
        }

        let writer = Writer::open(&lib).unwrap();
        let mut want = before.clone();
        if step >= 2 {
            want.extend(journal.new.iter().map(|m| lib.join(&m.to)));
            assert_eq!(writer.library().images(), &catalog.images[..], "step {step}");
            assert_eq!(fs::read_to_string(lib.join(map_file("a"))).unwrap(), "new");
        } else {
            assert_eq!(writer.library().catalog(), library.catalog());
            want.push(lib.join("index/7.table"));
            assert_eq!(fs::read_to_string(lib.join(map_file("a"))).unwrap(), "x");
        }
        want.sort();
        assert_eq!(files(&lib), want, "step {step}");
        for path in &foreign {
            assert_eq!(fs::read_to_string(path).unwrap(), "mine");
        }
    }
}

#[test]
fn recovery_keeps_a_file_of_that_name_that_it_did_not_move() {
    let (dir, library, _) = with_one_image();
    let (lib, staging) = (library.dir().to_path_buf(), library.dir().join(STAGING));
    let raw = dir.path().join("b.raw");
    fs::write(&raw, [1; 4096]).unwrap();
    let mine = lib.join(made_file("b", B));
    let run = lib.join(run_file("b", B));
    // One file was moved, then the writer was killed, and somebody put theirs in the way of the next.
    let (journal, catalog) = staged(&library, &raw);
    fs::write(staging.join("catalog.new"), catalog.to_json().unwrap()).unwrap();
    journal.write_for_tests(&staging);
    fs::rename(staging.join(&journal.new[0].staged), &run).unwrap();
    fs::write(&mine, "mine").unwrap();
    assert_eq!(Writer::open(&lib).unwrap_err().kind(), ErrorKind::Exists);
    assert_eq!(fs::read_to_string(&mine).unwrap(), "mine");
    assert!(!run.exists());
    assert_eq!(Writer::open(&lib).unwrap().library().catalog(), library.catalog());
    assert_eq!(fs::read_to_string(lib.join(map_file("a"))).unwrap(), "x");

    // A second link to the staged file is the trace of a rename on a file system without RENAME_NOREPLACE.
    fs::remove_file(&mine).unwrap();
    let (journal, catalog) = staged(&library, &raw);
    fs::write(staging.join("catalog.new"), catalog.to_json().unwrap()).unwrap();
    journal.write_for_tests(&staging);
    fs::hard_link(staging.join(&journal.new[2].staged), &mine).unwrap();
    fs::write(lib.join(map_file("b")), "mine").unwrap();
    Writer::open(&lib).unwrap_err();
    assert!(!mine.exists());
}

#[test]
fn a_journal_that_leads_out_of_the_library_is_refused() {
    let (_dir, library, _) = with_one_image();
    let staging = library.dir().join(STAGING);
    for to in ["../x", "library.json", "runs/../../x", "other/x", "maps/..", "maps/."] {
        for place in 0..3 {
            let mut journal = Journal::default();
            let file = Move { staged: "x".to_string(), to: to.to_string() };
            match place {
                0 => journal.new.push(file),
                1 => journal.replace.push(file),
                _ => journal.remove.push(to.to_string()),
            }
            journal.write_for_tests(&staging);
            assert_eq!(Writer::open(library.dir()).unwrap_err().kind(), ErrorKind::Corrupt, "{to}");
        }
    }
    let older = "{\"version\":2,\"new\":[],\"replace\":[],\"remove\":[]}";
    fs::write(staging.join("commit.json"), older).unwrap();
    Writer::open(library.dir()).unwrap();
    for version in [1, 4] {
        fs::write(staging.join("commit.json"), format!("{{\"version\":{version},\"what\":0}}")).unwrap();
        assert_eq!(Writer::open(library.dir()).unwrap_err().kind(), ErrorKind::Unsupported);
    }
}

#[test]
fn a_disk_that_fails_among_the_renames_leaves_the_rest_to_the_next_writer() {
    let (_dir, library, _) = with_one_image();
    let map = library.dir().join(map_file("a"));
    let mut writer = Writer::open(library.dir()).unwrap();
    let mut change = writer.begin();
    fs::write(change.stage_over(&map_file("a")).unwrap(), "new").unwrap();
    // A directory in the place of the map: the rename fails.
    fs::remove_file(&map).unwrap();
    fs::create_dir(&map).unwrap();
    change.commit(|catalog| catalog.policy = Policy::BRIDGE).unwrap_err();
    drop(writer);
    assert!(Writer::open(library.dir()).is_err(), "and says so");
    fs::remove_dir(&map).unwrap();
    let writer = Writer::open(library.dir()).unwrap();
    assert_eq!(fs::read_to_string(&map).unwrap(), "new");
    assert_eq!(writer.library().catalog().policy, Policy::BRIDGE);
}

#[test]
fn a_catalog_that_would_contradict_itself_is_not_published() {
    let (dir, library, _) = with_one_image();
    let raw = dir.path().join("b.raw");
    fs::write(&raw, [1; 4096]).unwrap();
    let mut writer = Writer::open(library.dir()).unwrap();
    writer.begin().commit(with(record("a", 1, &raw))).unwrap_err();
    assert_eq!(Library::open(library.dir()).unwrap().images().len(), 1);
}
