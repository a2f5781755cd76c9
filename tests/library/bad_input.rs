//! What cannot be added, and what is said about it.

use super::support::{Place, image_of, named};
use std::fs;

/// The add fails with one line that says all of `words`, and changes nothing.
fn refused(place: &Place, status: i32, args: &[String], words: &[&str]) {
    let before = place.snapshot();
    let args: Vec<&str> = ["image", "add"].into_iter().chain(args.iter().map(String::as_str)).collect();
    let line = place.fails(status, &args);
    words.iter().for_each(|word| assert!(line.contains(word), "{line}: {word}"));
    assert_eq!(place.snapshot(), before);
}

#[test]
fn what_is_no_image() {
    let place = Place::new();
    let good = place.raw("good", &image_of(&[9], None), |_| false);
    let file = |name: &str, bytes: &[u8]| {
        fs::write(place.path(name), bytes).unwrap();
        named("x", &place.path(name))
    };
    let gzip = [b"\x1f\x8b\x08".as_slice(), &[0; 509]].concat();
    for (arg, words) in [
        (file("text", b"hello\n"), &["text", "6 bytes", "512"][..]),
        (file("empty", b""), &["empty"]),
        (file("packed.gz", &gzip), &["packed.gz", "gunzip"]),
        (file("vhdx", &[b"vhdxfile".as_slice(), &[0; 504]].concat()), &["VHDX", "qemu-img convert -O raw"]),
        (named("x", place.dir()), &["not a regular file"]),
        (named("x", &place.path("none")), &["none", "No such file"]),
        (named("x", std::path::Path::new("/dev/null")), &["/dev/null", "not a regular file"]),
    ] {
        refused(&place, 1, std::slice::from_ref(&arg), words);
        // All or nothing: the good image is not added either.
        refused(&place, 1, &[named("good", &good), arg], words);
    }
}

#[test]
fn names_that_cannot_be() {
    let place = Place::new();
    let good = place.raw("good", &image_of(&[9], None), |_| false);
    place.add(&[("good", &good)]).unwrap();
    refused(&place, 1, &[named("good", &good)], &["good", "already"]);
    refused(&place, 1, &[named("a", &good), named("a", &good)], &["named twice"]);
    for args in [&["x"][..], &["=f"], &["x="], &["../x=f"], &["a b=f"], &["a\nb=f"], &[]] {
        let args: Vec<&str> = ["image", "add"].iter().chain(args).copied().collect();
        place.fails(2, &args);
    }
}

#[test]
fn no_library() {
    let place = Place::new();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_vmar"))
        .args(["image", "list"])
        .env_remove("VMAR_LIBRARY")
        .output()
        .unwrap();
    assert!(super::support::one_line(output, 2).contains("VMAR_LIBRARY"));
    fs::remove_file(place.lib().join("library.json")).unwrap();
    assert!(place.fails(1, &["image", "list"]).contains("vmar library init"));
    assert!(place.fails(1, &["stats"]).contains("vmar library init"));
}

#[test]
fn init_makes_a_library_once() {
    let place = Place::new();
    let new = place.path("new/lib");
    let init = |args: &[&str]| place.run(&[&["library", "init", new.to_str().unwrap()], args].concat());
    assert_eq!(init(&["--policy", "magic"]).status.code(), Some(2));
    assert!(init(&["--policy", "paper", "--fingerprint", "sha1"]).status.success());
    assert!(super::support::one_line(init(&[]), 1).contains("already"));
}

#[test]
fn every_verb_has_help() {
    let place = Place::new();
    for verb in [
        &["library", "init"][..],
        &["image", "add"],
        &["image", "list"],
        &["image", "show"],
        &["image", "verify"],
        &["stats"],
    ] {
        assert!(place.ok(&[verb, &["--help"]].concat()).contains("Usage"));
    }
}

#[test]
fn a_second_add_at_the_same_time_is_refused() {
    let place = Place::new();
    let good = place.raw("good", &image_of(&[9], None), |_| false);
    let writer = vmar::library::Writer::open(place.lib()).unwrap();
    refused(&place, 1, &[named("good", &good)], &["lib:", &format!("process {}", std::process::id()), "try again"]);
    // Reading needs no lock.
    place.ok(&["image", "list"]);
    drop(writer);
    place.ok(&["image", "add", &named("good", &good)]);
}

#[test]
fn wrong_usage_is_one_line_that_names_the_help() {
    let place = Place::new();
    for (args, help) in [
        (&["bogus"][..], "'vmar --help'"),
        (&["image", "explode", "x"], "'vmar image --help'"),
        (&["image", "list", "--jsno"], "'vmar image list --help'"),
        (&["serve", "--image", "a", "--blk-file", "b"], "'vmar serve --help'"),
        (&["map", "explain", "a"], "'vmar map explain --help'"),
    ] {
        let output = place.run(args);
        assert_eq!(String::from_utf8_lossy(&output.stderr).lines().count(), 1, "{args:?}");
        let line = super::support::one_line(output, 2);
        assert!(line.contains(help), "{line}");
    }
}

#[test]
fn a_full_standard_output_is_an_error_and_no_panic() {
    let place = Place::new();
    for args in [&["image", "list"][..], &["stats", "--json"], &["serve", "--print-capabilities"]] {
        let full = fs::File::options().write(true).open("/dev/full").unwrap();
        let output = place.vmar().args(args).stdout(full).output().unwrap();
        let line = super::support::one_line(output, 1);
        assert!(line.contains("standard output") && line.contains("No space left"), "{line}");
    }
}

#[test]
fn verify_speaks_json() {
    let place = Place::new();
    let (a, b) =
        (place.raw("a", &image_of(&[9], None), |_| false), place.raw("b", &image_of(&[9, 10], None), |_| false));
    place.add(&[("a", &a), ("b", &b)]).unwrap();
    let good: serde_json::Value = serde_json::from_str(&place.ok(&["image", "verify", "--json"])).unwrap();
    assert_eq!((&good[0]["name"], &good[0]["good"], &good[1]["redirects"]), (&"a".into(), &true.into(), &1.into()));
    fs::remove_file(&b).unwrap();
    let output = place.run(&["image", "verify", "--json"]);
    assert_eq!(output.status.code(), Some(1));
    let bad: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&bad[0]["good"], &bad[1]["good"]), (&true.into(), &false.into()));
    assert!(bad[1]["error"].as_str().unwrap().contains("vanished"), "{bad}");
}
