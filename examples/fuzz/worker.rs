//! A job: one target in one process.

use crate::targets::rng::Rng;
use crate::targets::shrink::shrink;
use crate::targets::{Fuzz, Kept, Setup, catch_panics, execute};
use crate::{Args, Progress, cover, vmar, with_target, workspace};
use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A job gives up after so many different failures.
pub const FAILURES_MAX: usize = 12;
/// An input that has not ended by then hangs.
const HANG: Duration = Duration::from_secs(60);
/// How long a failing input is made smaller.
const SHRINK: Duration = Duration::from_secs(60);
/// Inputs that are kept in memory.
const CORPUS_MAX: usize = 4000;
/// Bytes of address space of a job whose target lives in its process.
const ADDRESS_SPACE: u64 = 16 << 30;

/// When the running input was begun, in milliseconds since the job began; 0: none runs.
static BEGUN: AtomicU64 = AtomicU64::new(0);

/// Ends the process when an input hangs; whoever started it knows which one it was.
fn watch(start: Instant) {
    std::thread::spawn(move || {
        loop {
            std::thread::sleep(Duration::from_millis(500));
            let begun = BEGUN.load(Ordering::Relaxed);
            if begun != 0 && start.elapsed() > Duration::from_millis(begun) + HANG {
                eprintln!("fuzz: an input does not end");
                std::process::abort();
            }
        }
    });
}

/// Writes a failure to a file; gives a line that tells of it.
pub fn keep(dir: &Path, kept: &Kept) -> String {
    let dir = dir.join(&kept.target);
    fs::create_dir_all(&dir).unwrap();
    let text = serde_json::to_string(kept).unwrap();
    let path = dir.join(format!("{:08x}.json", crc32c::crc32c(text.as_bytes())));
    fs::write(&path, text).unwrap();
    format!("{}: {}", path.display(), kept.why)
}

/// The same cause gives the same text.
fn class(why: &str) -> String {
    why.chars().filter(|c| !c.is_ascii_digit()).take(120).collect()
}

pub fn run(args: &Args, progress: &Path) -> ExitCode {
    // An overflowing address space must not take the machine with it.
    let limit = rustix::process::Rlimit { current: Some(ADDRESS_SPACE), maximum: Some(ADDRESS_SPACE) };
    if !matches!(args.target.as_str(), "chains" | "config" | "messages") {
        rustix::process::setrlimit(rustix::process::Resource::As, limit).unwrap();
    }
    catch_panics();
    let dir = workspace();
    let setup = Setup { dir: dir.path().to_path_buf(), vmar };
    with_target!(args.target.as_str(), &setup, t => fuzz(&mut t, args, progress));
    ExitCode::SUCCESS
}

/// Inputs to begin with.
fn load<T: Fuzz>(dir: &Path) -> Vec<T::Input> {
    let Ok(entries) = fs::read_dir(dir) else { return vec![] };
    let mut files: Vec<_> = entries.filter_map(|e| e.ok().map(|e| e.path())).collect();
    files.sort();
    let parse = |file| serde_json::from_slice::<Kept>(&fs::read(file).ok()?).ok();
    files.iter().filter_map(parse).filter_map(|k| serde_json::from_value(k.input).ok()).collect()
}

fn fuzz<T: Fuzz>(target: &mut T, args: &Args, file: &Path) {
    let start = Instant::now();
    let end = start + Duration::from_secs(args.seconds);
    watch(start);
    let mut rng = Rng::new(args.seed.unwrap_or(1));
    let mut known: HashSet<u64> = HashSet::new();
    let mut failures: HashSet<String> = HashSet::new();
    let mut corpus: Vec<T::Input> = Vec::new();
    let mut seeds: Vec<T::Input> =
        load::<T>(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/fuzz").join(&args.target));
    let own = args.corpus.as_ref().map(|dir| dir.join(&args.target));
    if let Some(dir) = &own {
        fs::create_dir_all(dir).unwrap();
        seeds.extend(load::<T>(dir));
    }
    let mut progress = Progress::default();
    let mut told = Instant::now();
    while Instant::now() < end && failures.len() < FAILURES_MAX {
        let input = match seeds.pop() {
            Some(seed) => seed,
            None if corpus.is_empty() || rng.chance(1, 4) => target.fresh(&mut rng),
            None => {
                // Those that were found last have been changed least often.
                let newest = if rng.chance(1, 3) { corpus.len().saturating_sub(16) } else { 0 };
                let mut input = corpus[newest + rng.index(corpus.len() - newest)].clone();
                (0..1 + rng.below(4)).for_each(|_| target.mutate(&mut rng, &mut input));
                input
            }
        };
        if let Some(current) = &args.current {
            fs::write(current, serde_json::to_vec(&input).unwrap()).unwrap();
        }
        BEGUN.store(start.elapsed().as_millis() as u64 + 1, Ordering::Relaxed);
        cover::clear();
        let outcome = execute(target, &input);
        let edges = cover::edges();
        BEGUN.store(0, Ordering::Relaxed);
        progress.executions += 1;
        match outcome {
            Ok(seen) => {
                // Before `extend`, which forgets how many were new.
                let fresh = seen.0.into_iter().chain(edges).filter(|f| known.insert(*f)).count();
                if fresh > 0 && corpus.len() < CORPUS_MAX {
                    if let Some(dir) = &own {
                        let kept = Kept {
                            target: args.target.clone(),
                            why: "shows something new".into(),
                            input: serde_json::to_value(&input).unwrap(),
                        };
                        let text = serde_json::to_string(&kept).unwrap();
                        fs::write(dir.join(format!("{:08x}.json", crc32c::crc32c(text.as_bytes()))), text).unwrap();
                    }
                    corpus.push(input);
                }
            }
            Err(why) => {
                target.recover();
                if failures.insert(class(&why)) {
                    let small = smaller(target, &input, &why);
                    let kept = Kept { target: args.target.clone(), why: why.replace('\n', " "), input: small };
                    progress.failures.push(keep(&args.failures, &kept));
                    eprintln!("FAILURE {}", progress.failures.last().unwrap());
                }
            }
        }
        if told.elapsed() > Duration::from_secs(1) {
            told = Instant::now();
            tell(&mut progress, &known, corpus.len(), file);
        }
    }
    tell(&mut progress, &known, corpus.len(), file);
}

fn tell(progress: &mut Progress, known: &HashSet<u64>, corpus: usize, file: &Path) {
    (progress.features, progress.corpus) = (known.len() as u64, corpus as u64);
    // A reader must not find half of it.
    let temporary = file.with_extension("new");
    fs::write(&temporary, serde_json::to_vec(progress).unwrap()).unwrap();
    fs::rename(&temporary, file).unwrap();
}

/// Drops what the failure does not need.
fn smaller<T: Fuzz>(target: &mut T, input: &T::Input, why: &str) -> serde_json::Value {
    let (value, class) = (serde_json::to_value(input).unwrap(), class(why));
    shrink(value, SHRINK, |candidate| {
        let Ok(input) = serde_json::from_value::<T::Input>(candidate.clone()) else { return false };
        let outcome = execute(target, &input);
        if outcome.is_err() {
            target.recover();
        }
        // The beginning of the text: what follows may tell of details that go with the steps that were dropped.
        outcome.is_err_and(|w| self::class(&w).chars().take(64).eq(class.chars().take(64)))
    })
}
