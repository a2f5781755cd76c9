//! The shape of the tree: floors, file sizes, and what may be imported where.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// The floors of `lib.rs`, bottom first. A module imports only what stands on a lower floor.
const FLOORS: &[&[&str]] = &[
    &["units", "error", "codec"],
    &["io"],
    &["fingerprint", "cluster", "image", "index", "introspect", "library", "store"],
    &["map"],
    &["indexer", "migrate", "overlay", "redirect"],
    &["device", "report", "snapshot"],
    &["daemon"],
    &["cli"],
];

/// Siblings that may be used on floor 2: the catalog names fingerprint algorithms and image formats.
const SIBLINGS: &[(&str, &str)] = &[("library", "fingerprint"), ("library", "image"), ("index", "fingerprint")];

/// Crates that belong to one module alone.
const CRATES: &[(&str, &[&str])] = &[
    ("vhost", &["daemon"]),
    ("vhost_user_backend", &["daemon"]),
    ("clap", &["cli", "bin"]),
    ("indicatif", &["cli"]),
    ("plotters", &["report"]),
    ("io_uring", &["io"]),
    ("parquet", &["fingerprint"]),
    ("zstd", &["store", "migrate", "snapshot"]),
    ("qapi", &["migrate"]),
    ("rustls", &["migrate"]),
    ("virtio_queue", &["device", "daemon"]),
    // Of the binary `vmar-index`: no process with a guest's disk in it links these.
    ("ballista", &["bin"]),
    ("ballista_core", &["bin"]),
    ("ballista_executor", &["bin"]),
    ("ballista_scheduler", &["bin"]),
    ("datafusion", &["bin"]),
    // Stores of snapshots, and the binary of the cluster.
    ("tokio", &["snapshot", "bin"]),
    ("object_store", &["snapshot"]),
    ("hdfs_native", &["snapshot"]),
];

/// Lines of a file that still has one idea.
const LINES_MAX: usize = 650;

fn sources(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

fn all_sources() -> Vec<(String, PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    sources(&root, &mut files);
    assert!(files.len() > 20, "the walk found the sources");
    files
        .into_iter()
        .map(|path| {
            let inside = path.strip_prefix(&root).unwrap();
            let first = inside.components().next().unwrap().as_os_str().to_string_lossy();
            let module = first.strip_suffix(".rs").unwrap_or(&first).to_string();
            let text = fs::read_to_string(&path).unwrap();
            (module, path, text)
        })
        .collect()
}

fn floor_of(module: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&module))
}

/// Names after `crate::` in code lines (comments and doc links may look anywhere).
fn imports(text: &str) -> Vec<(usize, String)> {
    let mut out = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let code = line.split("//").next().unwrap_or("");
        for (at, _) in code.match_indices("crate::") {
            let rest = &code[at + "crate::".len()..];
            if let Some(group) = rest.strip_prefix('{') {
                out.extend(group.split(',').map(|name| (number + 1, ident(name.trim()))));
            } else {
                out.push((number + 1, ident(rest)));
            }
        }
    }
    out
}

fn ident(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

/// What is wrong with the imports of one file.
fn upward_imports(module: &str, text: &str) -> Vec<String> {
    let Some(own) = floor_of(module) else { return Vec::new() };
    imports(text)
        .into_iter()
        .filter(|(_, name)| name != module)
        .filter_map(|(line, name)| {
            let other = floor_of(&name)?;
            let sibling = SIBLINGS.contains(&(module, name.as_str()));
            (other >= own && !sibling).then(|| format!("{line}: {module} (floor {own}) imports {name} (floor {other})"))
        })
        .collect()
}

#[test]
fn no_module_imports_upward() {
    let wrong: Vec<String> = all_sources()
        .iter()
        .flat_map(|(module, path, text)| {
            upward_imports(module, text).into_iter().map(|w| format!("{}:{w}", path.display())).collect::<Vec<_>>()
        })
        .collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_check_for_upward_imports_can_fail() {
    assert_eq!(upward_imports("map", "use crate::redirect::plan;").len(), 1);
    assert_eq!(
        upward_imports("redirect", "use crate::indexer::add;").len(),
        1,
        "the read path never imports the indexer"
    );
    assert_eq!(upward_imports("io", "use crate::{error::Error, daemon::serve};").len(), 1);
    assert!(upward_imports("redirect", "use crate::map::Map; // crate::daemon").is_empty());
}

#[test]
fn nothing_that_serves_imports_reports() {
    let wrong: Vec<String> = all_sources()
        .iter()
        .filter(|(module, ..)| !["cli", "report"].contains(&module.as_str()))
        .flat_map(|(_, path, text)| imports(text).into_iter().map(move |(line, name)| (path, line, name)))
        .filter(|(.., name)| name == "report")
        .map(|(path, line, _)| format!("{}:{line}", path.display()))
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn every_module_has_a_floor() {
    let known: Vec<&str> = FLOORS.iter().flat_map(|f| f.iter().copied()).chain(["lib", "main", "bin"]).collect();
    for (module, path, _) in all_sources() {
        assert!(known.contains(&module.as_str()), "{}: give {module} a floor", path.display());
    }
}

#[test]
fn crates_stay_where_they_belong() {
    let mut wrong = Vec::new();
    for (module, path, text) in all_sources() {
        for (name, homes) in CRATES {
            let used = text.lines().map(|l| l.split("//").next().unwrap_or("")).any(|l| {
                l.match_indices(&format!("{name}::"))
                    .any(|(at, _)| !l[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':'))
            });
            if used && !homes.contains(&module.as_str()) {
                wrong.push(format!("{}: {name} belongs to {homes:?}", path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_fit_a_mind() {
    let long: BTreeMap<_, _> = all_sources()
        .into_iter()
        .map(|(_, path, text)| (path, text.lines().count()))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .collect();
    assert!(long.is_empty(), "more than {LINES_MAX} lines: {long:?}");
}
