//! Adds real images to a library, removes them one after the other in random order, and adds them again; after each step what
//! `vmar stats` says must be what one look at all bytes says.
//!
//! ```text
//! cargo build --release; cargo run --release --example cycle -- [--seed N] --library NEW_DIR NAME=FILE [NAME=FILE ...]
//! ```
//!
//! The library is made, with the policy `paper`, by the `vmar` beside this program. It ends with status 0 if all was equal.

#![allow(clippy::unwrap_used, reason = "a program of its own")]

#[allow(dead_code, missing_docs)]
#[path = "brute_force.rs"]
mod brute_force;

use brute_force::Image;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

fn vmar(library: &Path, args: &[String]) -> String {
    let vmar = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("vmar");
    let output = Command::new(vmar).arg("--library").arg(library).args(args).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|s| s.to_string()).collect()
}

/// Shares to twelve digits; what is no property of the images left out.
fn comparable(mut value: serde_json::Value) -> serde_json::Value {
    for field in ["duplicated_ge2", "shared_ge2_images", "shared_gt3_images"] {
        value[field] = format!("{:.12}", value[field].as_f64().unwrap()).into();
    }
    for image in value["images"].as_array_mut().unwrap() {
        let image = image.as_object_mut().unwrap();
        image.remove("id");
        image.remove("map_bytes");
    }
    value
}

fn check(what: &str, library: &Path, there: &[&Image]) {
    let began = Instant::now();
    let got: serde_json::Value = serde_json::from_str(&vmar(library, &strings(&["--json", "stats"]))).unwrap();
    let want = comparable(brute_force::figures(there));
    assert_eq!(comparable(got), want, "{what}");
    println!(
        "{what}: {} images, {} blocks, {} unique, {} clusters: equal ({:.1} s)",
        there.len(),
        want["nonzero_blocks"],
        want["unique_blocks"],
        want["clusters"],
        began.elapsed().as_secs_f64()
    );
}

fn main() {
    let (mut library, mut seed, mut files) = (PathBuf::new(), 1u64, Vec::new());
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--library" => library = args.next().unwrap().into(),
            "--seed" => seed = args.next().unwrap().parse().unwrap(),
            _ => files.push(arg),
        }
    }
    let images: Vec<Image> = files
        .iter()
        .map(|arg| {
            let (name, path) = arg.split_once('=').expect("NAME=FILE");
            brute_force::read(name, Path::new(path)).unwrap()
        })
        .collect();
    vmar(&library, &strings(&["library", "init", "--policy", "paper"]));
    vmar(&library, &[strings(&["image", "add"]), files.clone()].concat());
    let mut there: Vec<&Image> = images.iter().collect();
    check("all added", &library, &there);
    let mut gone = Vec::new();
    while there.len() > 1 {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let image = there.remove(usize::try_from(seed >> 33).unwrap() % there.len());
        vmar(&library, &strings(&["image", "remove", &image.name]));
        check(&format!("without {}", image.name), &library, &there);
        gone.push(image);
    }
    for image in gone {
        let file = files.iter().find(|f| f.split_once('=').is_some_and(|(name, _)| name == image.name)).unwrap();
        vmar(&library, &strings(&["image", "add", file]));
        there.push(image);
        check(&format!("with {} again", image.name), &library, &there);
    }
    print!("{}", vmar(&library, &strings(&["image", "verify"])));
}
