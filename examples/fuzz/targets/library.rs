//! `library.json`: changed as JSON, and changed as bytes.

use super::edits::{self, Edit};
use super::rng::Rng;
use super::{Fuzz, Outcome, Seen, Setup};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::{Component, Path, PathBuf};
use vmar::library::Library;

/// A change to a value of the catalog.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Change {
    /// Puts another value at a place; places are counted through the whole document.
    Set { place: u64, value: Value },
    /// Takes a member or an element away.
    Remove { place: u64 },
    /// Copies one value over another.
    Copy { from: u64, to: u64 },
    /// Repeats an element of an array, or adds a member that nobody knows.
    Add { place: u64 },
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    changes: Vec<Change>,
    edits: Vec<Edit>,
}

pub struct Libraries {
    dir: PathBuf,
    catalog: Value,
}

fn paths(value: &Value) -> Vec<String> {
    let mut out = vec![String::new()];
    let mut i = 0;
    while i < out.len() {
        let here = out[i].clone();
        match value.pointer(&here) {
            Some(Value::Array(items)) => out.extend((0..items.len()).map(|n| format!("{here}/{n}"))),
            Some(Value::Object(map)) => out.extend(map.keys().map(|k| format!("{here}/{}", k.replace('/', "~1")))),
            _ => {}
        }
        i += 1;
    }
    out
}

fn apply(catalog: &mut Value, change: &Change) {
    let all = paths(catalog);
    let at = |place: u64| all[(place % all.len() as u64) as usize].clone();
    let parent = |path: &str| path.rsplit_once('/').map(|(up, name)| (up.to_string(), name.to_string()));
    match change {
        Change::Set { place, value } => *catalog.pointer_mut(&at(*place)).unwrap() = value.clone(),
        Change::Copy { from, to } => {
            let value = catalog.pointer(&at(*from)).unwrap().clone();
            *catalog.pointer_mut(&at(*to)).unwrap() = value;
        }
        Change::Remove { place } => {
            let Some((up, name)) = parent(&at(*place)) else { return };
            match catalog.pointer_mut(&up) {
                Some(Value::Object(map)) => _ = map.remove(&name),
                Some(Value::Array(items)) => _ = items.remove(name.parse().unwrap()),
                _ => {}
            }
        }
        Change::Add { place } => match catalog.pointer_mut(&at(*place)) {
            Some(Value::Array(items)) if !items.is_empty() && items.len() < 64 => items.push(items[0].clone()),
            Some(Value::Object(map)) => _ = map.insert("unknown".into(), Value::from(1)),
            _ => {}
        },
    }
}

fn value(rng: &mut Rng) -> Value {
    match rng.below(12) {
        0 => Value::Null,
        1 => Value::from(rng.chance(1, 2)),
        2 | 3 => Value::from(rng.edge()),
        4 => Value::from(rng.edge() as i64),
        5 => Value::from(1e300),
        6 => Value::Array(vec![]),
        7 => Value::Object(serde_json::Map::new()),
        8 => Value::from("x".repeat(1 << rng.below(12))),
        _ => Value::from(rng.one_of(&[
            "",
            ".",
            "..",
            "/",
            "../../etc/passwd",
            "/etc/passwd",
            "a/../../b",
            "runs/../x",
            "web",
            "\u{0}",
            "é",
            "a/b",
            "-",
            "--help",
            "default",
            "sha1",
            "blake3",
            "paper",
            "bridge",
            "raw",
            "0",
            "images/web.g1.raw",
            "maps",
            "0000000000000000000000000000000000000000000000000000000000000000",
        ])),
    }
}

fn stays_inside(path: &Path) -> bool {
    !path.components().any(|c| matches!(c, Component::ParentDir))
}

impl Fuzz for Libraries {
    type Input = Input;
    const MEMORY_MAX: usize = 64 << 20;

    fn new(setup: &Setup) -> Libraries {
        let dir = setup.dir.join("library");
        let mut add = Vec::new();
        for (i, name) in ["web", "db", "cache"].iter().enumerate() {
            let raw = setup.dir.join(format!("{name}.raw"));
            let bytes: Vec<u8> = (0..65536 + i * 512).map(|b| (b / 4096 * (1 + i % 2)) as u8).collect();
            std::fs::write(&raw, bytes).unwrap();
            add.push(format!("{name}={}", raw.display()));
        }
        let run = |args: &[&str]| {
            let out = (setup.vmar)().args(args).output().unwrap();
            assert!(out.status.success(), "vmar {args:?}: {}", String::from_utf8_lossy(&out.stderr));
        };
        let at = dir.to_str().unwrap();
        run(&["library", "init", at]);
        let mut args = vec!["--library", at, "image", "add"];
        args.extend(add.iter().map(String::as_str));
        run(&args);
        let catalog = serde_json::from_slice(&std::fs::read(dir.join("library.json")).unwrap()).unwrap();
        Libraries { dir, catalog }
    }

    fn fresh(&mut self, rng: &mut Rng) -> Input {
        let mut input = Input { changes: vec![], edits: vec![] };
        (0..rng.below(5)).for_each(|_| self.mutate(rng, &mut input));
        input
    }

    fn mutate(&mut self, rng: &mut Rng, input: &mut Input) {
        let place = rng.below(200);
        match rng.below(12) {
            0..=4 if input.changes.len() < 16 => input.changes.push(Change::Set { place, value: value(rng) }),
            5 if input.changes.len() < 16 => input.changes.push(Change::Remove { place }),
            6 if input.changes.len() < 16 => input.changes.push(Change::Copy { from: rng.below(200), to: place }),
            7 if input.changes.len() < 16 => input.changes.push(Change::Add { place }),
            8 if !input.changes.is_empty() => _ = input.changes.remove(rng.index(input.changes.len())),
            9 if rng.chance(1, 20) => {
                // Deep nesting: a parser that recurses without a limit overflows its stack.
                let open = rng.one_of(&["[", "{\"a\":", "[[[["]);
                input.edits.push(Edit::Insert { at: rng.below(40), bytes: open.repeat(20_000).into_bytes() });
            }
            _ => edits::mutate(rng, &mut input.edits, &[], 3000, false),
        }
    }

    fn run(&mut self, input: &Input) -> Outcome {
        let mut seen = Seen::default();
        let mut catalog = self.catalog.clone();
        input.changes.iter().for_each(|c| apply(&mut catalog, c));
        let same = catalog == self.catalog && input.edits.is_empty();
        let mut text = serde_json::to_vec_pretty(&catalog).unwrap();
        input.edits.iter().for_each(|e| e.apply(&mut text));
        std::fs::write(self.dir.join("library.json"), text).unwrap();
        let library = match Library::open(&self.dir) {
            Err(e) if same => return Err(format!("a valid catalog is refused: {e}")),
            Err(e) => {
                if e.to_string().lines().count() != 1 {
                    return Err(format!("more than a line: {e}"));
                }
                seen.note(e);
                return Ok(seen);
            }
            Ok(library) => library,
        };
        let mut names = std::collections::HashSet::new();
        let mut last = None;
        for record in library.images() {
            if last >= Some(record.id.0) || !names.insert(&record.name) {
                return Err(format!("ID {} or name {:?} is there twice, or out of order", record.id, record.name));
            }
            last = Some(record.id.0);
            let run = library.run_path(record);
            let map = library.map_path(&record.name);
            let own = record.source.is_none() || stays_inside(&record.path) && record.path.is_relative();
            if !own || ![&run, &map].iter().all(|p| p.starts_with(&self.dir) && stays_inside(p)) {
                return Err(format!("a path leads out of the library: {record:?}"));
            }
            if library.image(&record.name).is_err() || library.image_by_id(record.id).is_err() {
                return Err(format!("{:?} is listed and not found", record.name));
            }
            for result in [library.open_image(record).err(), vmar::indexer::read_map(&library, record).err()] {
                seen.note(result.map_or("open".into(), |e| e.to_string()));
            }
        }
        Ok(seen)
    }
}
