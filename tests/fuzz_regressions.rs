//! Every input that the fuzzer (`examples/fuzz`) has kept: what once failed, and what reached something special.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "../examples/fuzz/targets/mod.rs"]
#[allow(dead_code, missing_docs)]
mod targets;

use std::path::{Path, PathBuf};
use std::process::Command;
use targets::{Fuzz, Kept, NAMES, Setup, catch_panics, execute, rng::Rng};

#[global_allocator]
static ALLOCATOR: targets::alloc::Counting = targets::alloc::Counting;

/// Random inputs that each target gets besides those that are kept.
const FRESH: u64 = 25;

fn vmar() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vmar"));
    command.env_remove("VMAR_LIBRARY").env_remove("VMAR_STATE_DIR");
    command
}

fn kept(target: &str) -> Vec<(PathBuf, Kept)> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fuzz").join(target);
    let mut files: Vec<PathBuf> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|f| (f.clone(), serde_json::from_slice(&std::fs::read(f).unwrap()).unwrap())).collect()
}

fn replay<T: Fuzz>(target: &mut T, name: &str) -> Vec<String> {
    let mut failed = Vec::new();
    let files = kept(name);
    assert!(!files.is_empty(), "inputs of {name} are kept");
    for (file, kept) in files {
        assert_eq!(kept.target, name, "{}", file.display());
        let input = serde_json::from_value(kept.input).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        if let Err(why) = execute(target, &input) {
            failed.push(format!("{}: {why}", file.display()));
            target.recover();
        }
    }
    let mut rng = Rng::new(0xD15C);
    for n in 0..FRESH {
        let mut input = target.fresh(&mut rng);
        (0..n % 4).for_each(|_| target.mutate(&mut rng, &mut input));
        if let Err(why) = execute(target, &input) {
            failed.push(format!("{name}: {why}: {}", serde_json::to_string(&input).unwrap()));
            target.recover();
        }
    }
    failed
}

/// One test: panics are caught by a hook of the whole process.
#[test]
fn what_the_fuzzer_has_kept() {
    catch_panics();
    let mut failed = Vec::new();
    for name in NAMES {
        let dir = tempfile::tempdir().unwrap();
        let setup = Setup { dir: dir.path().to_path_buf(), vmar };
        let run = std::panic::catch_unwind(|| with_target!(name, &setup, t => replay(&mut t, name)));
        failed.extend(run.unwrap_or_else(|_| vec![format!("{name}: cannot be run")]));
    }
    let _ = std::panic::take_hook();
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
