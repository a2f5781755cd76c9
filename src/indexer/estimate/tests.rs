use super::*;
use std::collections::BTreeMap;
use std::collections::BTreeSet;

/// Files as lists of contents, one a block.
type Files = Vec<Vec<u64>>;

/// What is true of the files, by name of the figure, counted.
fn truth(files: &Files) -> BTreeMap<String, f64> {
    let sets: Vec<BTreeSet<u64>> = files.iter().map(|f| f.iter().copied().collect()).collect();
    let all: BTreeSet<u64> = sets.iter().flatten().copied().collect();
    let blocks: usize = files.iter().map(Vec::len).sum();
    let distinct: usize = sets.iter().map(BTreeSet::len).sum();
    let mut out = BTreeMap::new();
    let mut put = |name: String, value: f64| {
        out.insert(name, value);
    };
    put("unique".into(), all.len() as f64);
    put("within".into(), (blocks - distinct) as f64);
    put("between".into(), (distinct - all.len()) as f64);
    put("saving".into(), (blocks - all.len()) as f64 / blocks as f64);
    for (a, set) in sets.iter().enumerate() {
        let in_others = |c: &u64| sets.iter().enumerate().any(|(b, other)| b != a && other.contains(c));
        let only = set.iter().filter(|c| !in_others(c)).count();
        put(format!("unique of {a}"), set.len() as f64);
        put(format!("within {a}"), (files[a].len() - set.len()) as f64);
        put(format!("only in {a}"), only as f64);
        put(format!("{a} held by others"), 1.0 - only as f64 / set.len() as f64);
        for (b, other) in sets.iter().enumerate().skip(a + 1) {
            let both = set.intersection(other).count() as f64;
            put(format!("common of {a} and {b}"), both);
            put(format!("{a} held by {b}"), both / set.len() as f64);
            put(format!("{b} held by {a}"), both / other.len() as f64);
            put(format!("similarity of {a} and {b}"), both / set.union(other).count() as f64);
        }
    }
    out
}

/// The same figures, estimated.
fn figures(e: &Estimate) -> BTreeMap<String, Interval> {
    let mut out = BTreeMap::new();
    out.insert("unique".to_string(), e.unique_blocks);
    out.insert("within".into(), e.duplicates_within);
    out.insert("between".into(), e.duplicates_between);
    out.insert("saving".into(), e.saving);
    for (a, file) in e.files.iter().enumerate() {
        out.insert(format!("unique of {a}"), file.unique_blocks);
        out.insert(format!("within {a}"), file.duplicates_within);
        out.insert(format!("only in {a}"), file.only_here);
        out.insert(format!("{a} held by others"), file.held_by_others);
    }
    for p in &e.pairs {
        let (a, b) = (p.a, p.b);
        out.insert(format!("common of {a} and {b}"), p.common_blocks);
        out.insert(format!("{a} held by {b}"), p.a_held_by_b);
        out.insert(format!("{b} held by {a}"), p.b_held_by_a);
        out.insert(format!("similarity of {a} and {b}"), p.similarity);
    }
    out
}

fn estimate_of(files: &Files, sampling: Sampling) -> Estimate {
    let sample = |file: &Vec<u64>| Sample {
        blocks: file.len() as u64 + 5,
        nonzero_blocks: file.len() as u64,
        contents: file.iter().copied().filter(|&c| sampling.takes(c)).collect::<BTreeSet<u64>>().into_iter().collect(),
    };
    estimate(&files.iter().map(sample).collect::<Vec<_>>(), sampling)
}

/// Four files of a family: much in common, one a near copy of another, one with nothing to do with the rest, and in each
/// one content that repeats as often as all the others together.
fn family(scale: u64) -> Files {
    let mut files: Files = vec![
        (0..10 * scale).collect(),
        (6 * scale..14 * scale).collect(),
        (0..9 * scale).chain(20 * scale..20 * scale + scale / 2).collect(),
        (30 * scale..33 * scale).collect(),
    ];
    for (file, filler) in files.iter_mut().zip([3, 7 * scale, 3, 31 * scale]) {
        let len = file.len();
        file.extend(std::iter::repeat_n(filler, len));
    }
    files
}

/// The promise of the intervals, kept: in 95 of 100 samples the truth is inside. A 200-fold repetition strays by 1.5 %
/// (one standard deviation), so fewer than 90 % of a figure would be a wrong formula, and 100 % of nearly all of them
/// intervals that are too wide to be of use.
#[test]
fn the_truth_is_inside_the_intervals_as_often_as_they_say() {
    const TRIALS: u64 = 200;
    let files = family(1000);
    let truth = truth(&files);
    let mut inside: BTreeMap<String, u64> = BTreeMap::new();
    for seed in 0..TRIALS {
        for (name, found) in figures(&estimate_of(&files, Sampling { one_in: 64, seed })) {
            let want = truth[&name];
            let hit = found.low - 1e-9 <= want && want <= found.high + 1e-9;
            *inside.entry(name).or_default() += u64::from(hit);
        }
    }
    assert_eq!(inside.len(), truth.len());
    for (name, &hits) in &inside {
        assert!(hits >= TRIALS * 90 / 100, "{name}: {hits} of {TRIALS}");
    }
    // The figures that are certain (nothing in common, say) are always inside.
    let uncertain: Vec<u64> = inside.values().copied().filter(|&hits| hits < TRIALS).collect();
    assert!(uncertain.len() * 3 > inside.len(), "most intervals miss sometimes: {inside:?}");
    let mean = uncertain.iter().sum::<u64>() as f64 / (uncertain.len() as u64 * TRIALS) as f64;
    assert!((0.93..0.975).contains(&mean), "on average {mean}");
}

/// The same for small files, where a sample has a handful of contents.
#[test]
fn the_intervals_hold_for_small_samples_too() {
    const TRIALS: u64 = 200;
    let files = family(30);
    let truth = truth(&files);
    let mut inside: BTreeMap<String, u64> = BTreeMap::new();
    for seed in 0..TRIALS {
        for (name, found) in figures(&estimate_of(&files, Sampling { one_in: 16, seed: seed + 7777 })) {
            let hit = found.low - 1e-9 <= truth[&name] && truth[&name] <= found.high + 1e-9;
            *inside.entry(name).or_default() += u64::from(hit);
        }
    }
    for (name, &hits) in &inside {
        assert!(hits >= TRIALS * 90 / 100, "{name}: {hits} of {TRIALS}");
    }
}

#[test]
fn a_sample_of_everything_is_exact() {
    let files = family(50);
    let found = figures(&estimate_of(&files, Sampling { one_in: 1, seed: 5 }));
    for (name, want) in truth(&files) {
        let f = found[&name];
        assert!([f.low, f.estimate, f.high].iter().all(|x| (x - want).abs() < 1e-6), "{name}: {f:?}, truth {want}");
    }
}

#[test]
fn no_files_and_empty_files_are_no_trouble() {
    let sampling = Sampling { one_in: 64, seed: 0 };
    assert_eq!(estimate(&[], sampling).unique_blocks.high, 0.0);
    let found = estimate_of(&vec![vec![], vec![1]], sampling);
    assert_eq!((found.files[0].unique_blocks.high, found.files[1].unique_blocks.high), (0.0, 1.0));
    assert!(figures(&found).values().all(|f| f.low <= f.estimate && f.estimate <= f.high && f.high.is_finite()));
}
