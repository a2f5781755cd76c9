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
    for args in [&["x"][..], &["=f"], &["../x=f"], &["a b=f"], &[]] {
        let args: Vec<&str> = ["image", "add"].iter().chain(args).copied().collect();
        assert_eq!(place.run(&args).status.code(), Some(2), "{args:?}");
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
