use super::*;
use crate::fingerprint::Algorithm;
use std::fs;
use tempfile::TempDir;

/// A library with one raw image of 8 KiB, registered without fingerprints.
pub(super) fn with_one_image() -> (TempDir, Library, ImageRecord) {
    let dir = tempfile::tempdir().unwrap();
    let lib = dir.path().join("lib");
    Library::init(&lib, Policy::Paper, Algorithm::Sha1).unwrap();
    let raw = dir.path().join("a.raw");
    fs::write(&raw, [7u8; 8192]).unwrap();
    let record = record("a", 0, &raw);
    let mut writer = Writer::open(&lib).unwrap();
    let mut change = writer.begin();
    for file in [run_file("a", ImageId(0)), map_file("a")] {
        fs::write(change.stage(&file).unwrap(), b"x").unwrap();
    }
    let added = record.clone();
    change
        .commit(|catalog| {
            catalog.next_id = 1;
            catalog.images.push(added);
        })
        .unwrap();
    let library = Library::open(&lib).unwrap();
    (dir, library, record)
}

pub(super) fn record(name: &str, id: u32, raw: &Path) -> ImageRecord {
    let meta = fs::metadata(raw).unwrap();
    ImageRecord {
        id: ImageId(id),
        name: name.to_string(),
        generation: 1,
        path: raw.to_path_buf(),
        source: None,
        size: meta.len(),
        mtime_ns: mtime_ns(&meta),
        digest: [id as u8; 32],
        domain: "default".to_string(),
        blocks: meta.len().div_ceil(4096),
        nonzero_blocks: 1,
        fingerprint: Algorithm::Sha1,
        run: FileRef { file: run_file(name, ImageId(id)).into(), bytes: 1, crc32c: 0 },
        chunks: None,
    }
}

#[test]
fn what_was_added_is_found_again_also_after_a_move() {
    let (dir, library, record) = with_one_image();
    assert_eq!(library.image("a").unwrap(), &record);
    assert_eq!(library.image_by_id(ImageId(0)).unwrap(), &record);
    let moved = dir.path().join("elsewhere");
    fs::rename(library.dir(), &moved).unwrap();
    let library = Library::open(&moved).unwrap();
    library.open_image(&record).unwrap();
    assert_eq!(library.map_path("a"), moved.join("maps/a.map"));
    assert!(library.run_path(&record).is_file());
    assert_eq!(library.image("b").unwrap_err().kind(), ErrorKind::NotFound);
    assert_eq!(library.image_by_id(ImageId(1)).unwrap_err().kind(), ErrorKind::NotFound);
}

#[test]
fn an_image_that_changed_or_vanished_is_refused_by_name() {
    let (_dir, library, record) = with_one_image();
    let raw = library.image_path(&record);

    fs::File::options().write(true).open(&raw).unwrap().set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let err = library.open_image(&record).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Changed);
    assert!(err.to_string().contains("vmar image verify a") && err.to_string().contains("a.raw"), "{err}");

    fs::write(&raw, [7u8; 4096]).unwrap();
    let err = library.open_image(&record).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Changed);
    assert!(err.to_string().contains("4096 bytes, but 8192"), "{err}");

    fs::remove_file(&raw).unwrap();
    let err = library.open_image(&record).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::NotFound);
    assert!(err.to_string().contains("image a has vanished"), "{err}");

    fs::create_dir(&raw).unwrap();
    assert_eq!(library.open_image(&record).unwrap_err().kind(), ErrorKind::Unsupported);
}

#[test]
fn a_newer_library_is_refused_by_name() {
    let (_dir, library, _) = with_one_image();
    let path = library.dir().join(CATALOG);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"version\": 3", "\"version\": 4, \"news\": true")).unwrap();
    let err = Library::open(library.dir()).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Unsupported);
    assert!(err.to_string().contains("library format 4"), "{err}");
}

#[test]
fn a_catalog_that_contradicts_itself_is_refused() {
    let (_dir, library, _) = with_one_image();
    let path = library.dir().join(CATALOG);
    let text = fs::read_to_string(&path).unwrap();
    for (good, bad) in [
        ("\"name\": \"a\"", "\"name\": \"../a\""),
        ("\"size\": 8192", "\"size\": 8193"),
        ("\"size\": 8192", "\"size\": 0"),
        ("\"blocks\": 2", "\"blocks\": 3"),
        ("\"next_id\": 1", "\"next_id\": 0"),
        ("runs/a.0.parquet", "runs/../../a"),
        ("runs/a.0.parquet", "/etc/passwd"),
        ("\"policy\": \"paper\"", "\"policy\": \"magic\""),
        ("\"source\": null", "\"source\": {\"format\": \"qcow2\", \"path\": \"/x\"}"),
        ("vmar-library", "other"),
        ("{", "["),
        ("}", ""),
    ] {
        assert!(text.contains(good), "{good}");
        fs::write(&path, text.replacen(good, bad, 1)).unwrap();
        let err = Library::open(library.dir()).unwrap_err();
        assert_eq!(err.kind(), ErrorKind::Corrupt, "{bad}");
        assert!(!err.to_string().contains("checksum"), "{err}");
    }
    // What contradicts nothing is found by the checksum; another layout of the same is as good.
    fs::write(&path, text.replacen("\"mtime_ns\": 1", "\"mtime_ns\": 2", 1)).unwrap();
    let err = Library::open(library.dir()).unwrap_err();
    assert!(err.to_string().contains("checksum"), "{err}");
    fs::write(&path, text.replace("\n", " ")).unwrap();
    Library::open(library.dir()).unwrap();
}

/// Version 1 and 2 have no checksum, no index and no counter of changes.
#[test]
fn an_older_catalog_is_read_and_written_anew() {
    let (_dir, library, record) = with_one_image();
    let path = library.dir().join(CATALOG);
    let mut old: serde_json::Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let fields = old.as_object_mut().unwrap();
    for field in ["crc32c", "sequence", "next_file", "index", "removed", "preference"] {
        fields.remove(field).unwrap();
    }
    fields.insert("version".into(), 1.into());
    fs::write(&path, old.to_string()).unwrap();
    assert_eq!(Library::open(library.dir()).unwrap().images(), [record]);
    Writer::open(library.dir()).unwrap().update(|c| c.policy = Policy::BRIDGE).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"version\": 3"), "{text}");
    Library::open(library.dir()).unwrap();
}

#[test]
fn no_library_says_how_to_make_one() {
    let dir = tempfile::tempdir().unwrap();
    let err = Library::open(dir.path()).unwrap_err();
    assert_eq!(err.kind(), ErrorKind::NotFound);
    assert!(err.to_string().contains("vmar library init"), "{err}");
}

#[test]
fn init_wants_an_empty_directory() {
    let dir = tempfile::tempdir().unwrap();
    let init = |p: &Path| Library::init(p, Policy::Paper, Algorithm::Sha1);
    fs::create_dir(dir.path().join("staging")).unwrap();
    init(dir.path()).unwrap();
    let err = init(dir.path()).unwrap_err();
    assert!(err.to_string().contains("already"), "{err}");
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("mine"), "").unwrap();
    assert_eq!(init(other.path()).unwrap_err().kind(), ErrorKind::Exists);
}
