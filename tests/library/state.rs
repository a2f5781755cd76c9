//! What has become of the images' files, as `image list` and `show` say without reading them; and what `map explain` says of
//! a block's content.

use super::support::{Place, image_of};
use serde_json::{Value, json};
use std::fs::{self, File};
use std::time::{Duration, SystemTime};
use vmar::library::Policy;

fn list(place: &Place) -> Vec<(String, String)> {
    let all: Vec<Value> = serde_json::from_str(&place.ok(&["--json", "image", "list"])).unwrap();
    let text = |v: &Value| v.as_str().unwrap().to_string();
    all.iter().map(|line| (text(&line["name"]), text(&line["state"]))).collect()
}

#[test]
fn changed_and_missing_files_are_shown() {
    let place = Place::new();
    let names = ["fine", "touched", "longer", "gone", "dir", "dangling"];
    let files: Vec<_> = names.iter().map(|n| place.raw(n, &image_of(&[20, 21], None), |_| false)).collect();
    for (name, file) in names.iter().zip(&files) {
        place.add(&[(name, file)]).unwrap();
    }
    assert!(list(&place).iter().all(|(_, state)| state == "ok"));
    let bytes = fs::read(&files[2]).unwrap();
    // Renamed in place, as copying tools do: root may write to read-only files, but other users need not be root.
    let replace = |at: usize, bytes: &[u8]| {
        fs::remove_file(&files[at]).unwrap();
        fs::write(&files[at], bytes).unwrap();
    };
    replace(1, &bytes);
    File::options()
        .write(true)
        .open(&files[1])
        .unwrap()
        .set_modified(SystemTime::now() + Duration::from_secs(9))
        .unwrap();
    replace(2, &[&bytes[..], &[0; 512]].concat());
    fs::remove_file(&files[3]).unwrap();
    fs::remove_file(&files[4]).unwrap();
    fs::create_dir(&files[4]).unwrap();
    fs::remove_file(&files[5]).unwrap();
    std::os::unix::fs::symlink("nowhere", &files[5]).unwrap();
    let want = ["ok", "changed", "changed", "missing", "changed", "missing"];
    let want: Vec<_> = names.iter().zip(want).map(|(n, s)| (n.to_string(), s.to_string())).collect();
    assert_eq!(list(&place), want);
    let table = place.ok(&["image", "list"]);
    assert!(table.lines().any(|l| l.starts_with("gone ") && l.contains(" missing ")), "{table}");
    assert!(place.ok(&["image", "show", "touched"]).contains(" (changed)"));
    assert!(!place.ok(&["image", "show", "fine"]).contains(" (ok)"));
    // Looking does not mend: that is for verify.
    place.ok(&["image", "verify", "touched"]);
    assert_eq!(list(&place)[1].1, "ok");
}

fn explain(place: &Place, name: &str, block: u32) -> Value {
    serde_json::from_str(&place.ok(&["--json", "map", "explain", name, "--block", &block.to_string()])).unwrap()
}

#[test]
fn a_block_is_explained_by_content_and_policy() {
    let place = Place::with(Policy::Bridge(vmar::library::Runs { bridge: 2, min_run: 3 }));
    // b: three blocks that a holds in a row; one alone that a holds too; own ones; and a partial last block.
    let a = place.raw("a", &image_of(&[20, 21, 22, 23, 30, 23], Some((40, 512))), |_| false);
    let b = place.raw("b", &image_of(&[21, 22, 23, 50, 30, 51], Some((40, 512))), |_| false);
    let c = place.raw("c", &image_of(&[23, 0], None), |_| false);
    place.add(&[("a", &a), ("b", &b), ("c", &c)]).unwrap();

    let found = explain(&place, "b", 2);
    assert_eq!((&found["chosen_by"], &found["target"]["name"]), (&"canonical".into(), &"a".into()));
    let held = json!([
        { "id": 0, "name": "a", "count": 2, "blocks": [3, 5] },
        { "id": 1, "name": "b", "count": 1, "blocks": [2] },
        { "id": 2, "name": "c", "count": 1, "blocks": [0] },
    ]);
    assert_eq!(found["held_by"], held);
    // c keeps its only shared block, for a run of one is too short: it is not read from a, but the content is the same.
    let found = explain(&place, "c", 0);
    assert_eq!((&found["chosen_by"], &found["target"]["name"]), (&"min-run".into(), &"c".into()));
    assert_eq!(found["held_by"], held);
    assert_eq!(explain(&place, "b", 4)["chosen_by"], "min-run");
    assert_eq!(explain(&place, "b", 5)["chosen_by"], "canonical");
    assert_eq!(explain(&place, "b", 6)["chosen_by"], "partial");
    let zero = explain(&place, "c", 1);
    assert_eq!((&zero["chosen_by"], &zero["held_by"]), (&Value::Null, &json!([])));
    assert_eq!(zero["misaligned_partitions"], json!([]));
    let text = place.ok(&["map", "explain", "b", "--block", "2"]);
    assert!(text.contains("content held by a (0): 2 blocks") && text.contains("canonical copy"), "{text}");
}

#[test]
fn a_misaligned_partition_is_part_of_the_explanation() {
    let place = Place::new();
    let mut disk = image_of(&(20..60).collect::<Vec<_>>(), None);
    disk[446..512].fill(0);
    disk[450] = 0x83;
    disk[454..458].copy_from_slice(&63u32.to_le_bytes());
    disk[458..462].copy_from_slice(&100u32.to_le_bytes());
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    let path = place.raw("old", &disk, |_| false);
    place.add(&[("old", &path)]).unwrap();
    for (block, inside) in [(6, false), (7, true), (20, true), (21, false)] {
        let want = json!([{ "partition": 1, "start": 63 * 512, "has_block": inside }]);
        assert_eq!(explain(&place, "old", block)["misaligned_partitions"], want, "{block}");
    }
    assert!(place.ok(&["map", "explain", "old", "--block", "9"]).contains("the block is in misaligned partition 1"));
}
