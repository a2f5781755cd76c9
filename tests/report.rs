//! `vmar report`: the page, its files and its errors, of an evaluation, of a small library and of servers that run.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
use common::*;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const HOSTILE: &str = "<script>alert('1')</script>&\"";

/// An evaluation in a directory: lines with a limit, bars, a distribution, and a figure that nobody measured.
fn evaluation(dir: &Path, vmar_s: f64) -> PathBuf {
    let dir = dir.join("evaluation");
    fs::create_dir_all(&dir).unwrap();
    let figure = |id: &str, more: Value| {
        let mut figure =
            json!({"id": id, "section": HOSTILE, "caption": HOSTILE, "x": "number of VMs", "y": "time (s)"});
        figure.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        figure
    };
    let at = |scheme: &str| json!({"scheme": scheme, "x": 12});
    let claim = json!({"figure": "12a", "what": "boot time", "paper": "over 50% less", "target": "at least 60% less",
        "of": at("vmar"), "against": at("on-demand"), "form": "less", "at_least": 60});
    let missing = json!({"figure": "19", "what": "nothing", "of": at("vmar"), "form": "value", "at_most": 1});
    let figures = json!({
        "title": HOSTILE, "lead": "lead", "facts": [["machine", HOSTILE]],
        "figures": [
            figure("12a", json!({"paper": "50%", "target": "60%", "log_x": true})),
            figure("15", json!({"kind": "bars"})),
            figure("17", json!({"kind": "cdf"})),
            figure("19", json!({})),
        ],
        "claims": [claim, missing],
        "tables": [{"id": "copy", "section": "other", "caption": "c", "head": ["image", "s"], "rows": [[HOSTILE, 1.5], ["b", null]]}],
    });
    fs::write(dir.join("figures.json"), figures.to_string()).unwrap();
    let mut lines = Vec::new();
    let mut point = |figure: &str, x: Value, scheme: &str, value: f64, run: u32| {
        lines.push(json!({"figure": figure, "x": x, "scheme": scheme, "value": value, "run": run}).to_string());
    };
    for run in 1..=3 {
        point("12a", json!(12), "on-demand", 40.0 + f64::from(run), run);
        point("12a", json!(1), "vmar", 20.0, run);
        point("12a", json!(12), "vmar", vmar_s + 0.1 * f64::from(run), run);
    }
    point("12a", json!(1), "limit", 3.0, 1);
    point("12a", json!(12), "limit", 4.0, 1);
    point("15", json!(HOSTILE), HOSTILE, 3.5, 1);
    point("15", json!(4), "vmar", 2.5, 1);
    point("17", json!(1.5), "vmar", 50.0, 1);
    point("17", json!(2.5), "vmar", 100.0, 1);
    fs::write(dir.join("points.jsonl"), lines.join("\n") + "\n").unwrap();
    dir
}

/// Every element that is opened is closed, in order, and nothing is hidden in what looks like text.
fn assert_well_formed(html: &str) {
    let mut open: Vec<&str> = Vec::new();
    let body = html.strip_prefix("<!doctype html>\n").unwrap_or(html);
    let style = body.find("<style>").map(|from| (from + "<style>".len(), body.find("</style>").unwrap()));
    let mut at = 0;
    while let Some(found) = body[at..].find(['<', '>']) {
        let from = at + found;
        if let Some((_, end)) = style.filter(|(a, b)| (*a..*b).contains(&from)) {
            at = end;
            continue;
        }
        assert!(body[from..].starts_with('<'), "a lone '>' at {from}: {}", &body[from.saturating_sub(60)..from]);
        let end = from + body[from..].find('>').expect("a tag that ends");
        let tag = &body[from + 1..end];
        assert_eq!(tag.matches('"').count() % 2, 0, "quotes of <{tag}>");
        let name = tag.trim_start_matches('/').split([' ', '\n', '/']).next().unwrap();
        match tag {
            _ if tag.starts_with('/') => assert_eq!(open.pop(), Some(name), "</{name}>"),
            _ if tag.ends_with('/') || name == "meta" => {}
            _ => open.push(name),
        }
        at = end + 1;
    }
    assert!(open.is_empty(), "never closed: {open:?}");
}

/// It needs no network and runs nothing.
fn assert_self_contained(html: &str) {
    for outside in ["<script", "<link", "<iframe", "<img", "http:", "https:", "src=", "@import", "url(", "javascript:"]
    {
        assert!(!html.contains(outside), "{outside}");
    }
}

/// The page of these arguments, which must be as a page is to be.
fn page(bench: &Bench, args: &[&str]) -> String {
    let out = bench.path("page.html");
    let mut all = vec!["report", "--out", text(&out)];
    all.extend(args);
    assert!(ok(&all).contains("page.html"));
    let html = fs::read_to_string(out).unwrap();
    assert_well_formed(&html);
    assert_self_contained(&html);
    html
}

/// Four images: the second holds what the first does and more, the third half of it, the last nothing.
fn with_images() -> Bench {
    let bench = Bench::with_library();
    let image = |contents: &[u32]| -> Vec<u8> {
        let block = |&k: &u32| blake3::Hasher::new().update(&k.to_le_bytes()).finalize_xof().fill_block();
        contents.iter().flat_map(block).collect()
    };
    trait FillBlock {
        fn fill_block(self) -> Vec<u8>;
    }
    impl FillBlock for blake3::OutputReader {
        fn fill_block(mut self) -> Vec<u8> {
            let mut out = vec![0; 4096];
            self.fill(&mut out);
            out
        }
    }
    let range = |from: u32, to: u32| (from..to).collect::<Vec<u32>>();
    let all = [
        ("base", range(1, 101)),
        ("more", range(1, 151)),
        ("half", [range(1, 51), range(300, 350), vec![300, 300]].concat()),
        ("alone", range(500, 540)),
    ];
    let named = all.map(|(name, contents)| format!("{name}={}", bench.file(name, &image(&contents)).display()));
    bench.add(&named);
    bench
}

#[test]
fn an_evaluation_becomes_a_page_and_files() {
    let bench = Bench::new();
    let dir = evaluation(bench.dir.path(), 10.0);
    let csv = bench.path("csv");
    let html = page(&bench, &[text(&dir), "--csv", text(&csv)]);
    assert!(html.contains("&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&amp;&quot;"));
    assert!(html.contains("Not measured: figure 19.") && html.contains("1 met, 0 short, 1 not measured"));
    assert_eq!(html.matches("<svg ").count(), 3);
    let read = |name: &str| fs::read_to_string(csv.join(name)).unwrap();
    // A row a line of the points, with the same values.
    let points: Vec<Value> = fs::read_to_string(dir.join("points.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .filter(|p| p["figure"] == "12a")
        .collect();
    let rows: Vec<String> = read("figure-12a.csv").lines().skip(1).map(String::from).collect();
    let row = |p: &Value| {
        format!("{},{},{},{}", p["scheme"].as_str().unwrap(), p["x"], p["value"].as_f64().unwrap(), p["run"])
    };
    assert_eq!(rows, points.iter().map(row).collect::<Vec<_>>());
    assert!(read("figure-15.csv").contains("\"<script>alert('1')</script>&\"\"\""));
    assert_eq!(read("table-copy.csv").lines().last(), Some("b,–"));
    for name in ["figure-12a.svg", "figure-15.svg", "figure-17.svg"] {
        let svg = read(name);
        assert_well_formed(&svg);
        assert!(svg.starts_with("<svg ") && svg.contains("xmlns=") && !svg.contains("<script"));
    }
    assert!(!csv.join("figure-19.csv").exists());
}

#[test]
fn a_claim_flips_when_the_points_change() {
    let bench = Bench::new();
    let out = bench.path("o.html");
    let verdicts = |seconds: f64| {
        let dir = evaluation(bench.dir.path(), seconds);
        let said: Value = serde_json::from_str(&ok(&["report", text(&dir), "--out", text(&out), "--json"])).unwrap();
        assert_eq!(said["figures"], json!(["figure-12a", "figure-15", "figure-17"]));
        assert_eq!(said["out"], text(&out));
        let of = |i: usize| said["claims"][i]["verdict"].as_str().unwrap().to_string();
        [of(0), of(1)]
    };
    assert_eq!(verdicts(10.0), ["met", "not-measured"]);
    assert_eq!(verdicts(30.0), ["short", "not-measured"]);
}

/// Every claim of `qemu-scripts/evaluate.sh` finds the points that `points.jq` makes of its measurements.
#[test]
fn what_the_evaluation_script_measures_is_what_its_claims_ask_for() {
    let bench = Bench::new();
    let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("qemu-scripts/evaluate");
    let dir = bench.path("measured");
    fs::create_dir_all(&dir).unwrap();
    fs::copy(scripts.join("figures.json"), dir.join("figures.json")).unwrap();
    let figures: Value = serde_json::from_str(&fs::read_to_string(dir.join("figures.json")).unwrap()).unwrap();
    let result = json!({"mean_s": 2.0, "mean_wait_s": 1.0, "mean_app_s": 3.0, "cached_bytes": 4 << 20, "read_bytes": 5 << 20,
        "random_s": 2.0, "sequential_s": 1.0, "limit_bytes": 6 << 20, "server_cpu_s": 1.2, "vms": 12, "private_kib": 12288, "boot_s": vec![1.0; 12]});
    let cpu = json!({"vcpu_ms": 3000, "runqueue_ms": 2000, "idle_ms": 1000});
    let guest = json!({"vms": [{"boot_ms": 6000, "cpu": cpu}], "cache": {"images_bytes": 1 << 20}, "disk": {"read_bytes": 2 << 20}});
    let jobs = fs::read_to_string(scripts.join("jobs.sh")).unwrap();
    let mut raw = String::new();
    for claim in figures["claims"].as_array().unwrap() {
        for side in [&claim["of"], &claim["against"]] {
            let figure = claim["figure"].as_str().unwrap();
            let told = jobs.split([',', '"', ' ', '\n']).find(|word| word.starts_with(&format!("{figure}:")));
            let metric = told.unwrap_or_else(|| panic!("no job measures figure {figure}")).split(':').nth(1).unwrap();
            let of = if metric.starts_with("guest") { &guest } else { &result };
            let points = json!([{"figure": figure, "metric": metric, "x": side["x"]}, {"figure": "none", "metric": "mean_s", "x": 0}]);
            raw += &json!({"series": side["scheme"], "run": 1, "points": points, "result": of}).to_string();
        }
    }
    fs::write(dir.join("raw.json"), raw).unwrap();
    let program = scripts.join("points.jq");
    let points = tool("jq", &["-c", "-f", text(&program), text(&dir.join("raw.json"))]);
    fs::write(dir.join("points.jsonl"), points).unwrap();
    let out = bench.path("measured.html");
    let told: Value = serde_json::from_str(&ok(&["report", text(&dir), "--out", text(&out), "--json"])).unwrap();
    for claim in told["claims"].as_array().unwrap() {
        assert_ne!(claim["verdict"], "not-measured", "{claim}");
    }
}

#[test]
fn a_library_becomes_a_page() {
    let bench = with_images();
    let (library, csv) = (bench.library(), bench.path("csv"));
    let html = page(&bench, &["--library", text(&library), "--csv", text(&csv)]);
    for said in ["What each image costs", "Similarity", "Who shares with whom", "Candidates to merge", "Block maps"] {
        assert!(html.contains(said), "{said}");
    }
    for id in ["map-sizes", "entry-lengths", "search-depth", "duplicates", "holders", "matrix", "readers"] {
        assert!(html.contains(&format!("<figure id=\"library-{id}\">")), "{id}");
        for ending in ["csv", "svg"] {
            assert!(csv.join(format!("library-{id}.{ending}")).exists(), "{id}.{ending}");
        }
    }
    assert!(html.contains("base is nearly contained in more") && html.contains("No server of this library runs."));
    let rows = |name: &str| -> Vec<String> {
        fs::read_to_string(csv.join(name)).unwrap().lines().skip(1).map(String::from).collect()
    };
    // Held by no other image: none of the 100 blocks, 50 of 150, 50 contents of 102 blocks, all 40.
    let own: Vec<String> = rows("library-images.csv").iter().map(|r| r.split(',').nth(2).unwrap().into()).collect();
    assert_eq!(own, [0, 50, 50, 40].map(|blocks: u64| (blocks * 4096).to_string()));
    assert_eq!(rows("library-readers.csv"), ["more,base,409600", "half,base,204800"]);
    // 392 blocks of data; once there: 50 of 'more', 49 of 'half' (block 300 is there three times) and 40 of 'alone'.
    let once = rows("library-duplicates.csv").first().unwrap().clone();
    let share: f64 = once.split(',').nth(2).unwrap().parse().unwrap();
    assert!((share - 100.0 * (50.0 + 49.0 + 40.0) / 392.0).abs() < 1e-9, "{once}");
}

#[test]
fn an_empty_library_and_both_at_once() {
    let bench = Bench::with_library();
    let library = bench.library();
    assert!(page(&bench, &["--library", text(&library)]).contains("There is no image in it yet"));
    let dir = evaluation(bench.dir.path(), 10.0);
    let html = page(&bench, &["--library", text(&library), text(&dir)]);
    assert!(html.contains("Paper, target, ours") && html.contains("Running servers"));
}

#[test]
fn a_domain_sees_its_own_images_alone() {
    let bench = with_images();
    let library = bench.library();
    ok(&["--library", text(&library), "library", "domain", "add", "tenant"]);
    let image = bench.file("secret.raw", &[7; 8192]);
    ok(&["--library", text(&library), "image", "add", "--domain", "tenant", &format!("secret={}", image.display())]);
    let html = page(&bench, &["--library", text(&library), "--domain", "tenant"]);
    assert!(html.contains(">secret<") && !html.contains(">alone<") && !html.contains(">half<"));
    let html = page(&bench, &["--library", text(&library), "--domain", "default"]);
    assert!(html.contains(">half<") && !html.contains("secret"));
    let (report, stats) = (
        fails(&["--library", text(&library), "report", "--domain", "nobody", "--out", "/nonexistent"]),
        fails(&["--library", text(&library), "stats", "--domain", "nobody"]),
    );
    assert_eq!(report, stats);
}

#[test]
fn running_servers_are_asked_and_a_hung_one_is_told_of() {
    let bench = with_images();
    let library = bench.library();
    let (one, two) = (bench.path("one.control"), bench.path("two.control"));
    let first = bench.serve(&["--image", "more", "--overlay", text(&bench.overlay("more")), "--control", text(&one)]);
    let second = bench.serve(&["--image", "half", "--overlay", text(&bench.overlay("half")), "--control", text(&two)]);
    let third = bench.serve(&["--image", "alone", "--overlay", text(&bench.overlay("alone"))]);
    let mut client = first.client();
    client.read(0, 128 * 1024);
    let csv = bench.path("csv");
    let html = page(&bench, &["--library", text(&library), "--csv", text(&csv)]);
    assert!(html.contains("2 of 3 servers of this library answered"), "the three of them");
    assert!(html.contains("it has no control socket"));
    let rows = fs::read_to_string(csv.join("host-servers.csv")).unwrap();
    let row: Vec<&str> = rows.lines().find(|row| row.starts_with("more,")).unwrap().split(',').collect();
    let place = |name: &str| rows.lines().next().unwrap().split(',').position(|n| n == name).unwrap();
    assert_eq!((row[place("bytes read")], row[place("from other images")]), ("131072", "131072"));
    assert!(rows.lines().last().unwrap().starts_with("all,2 servers,"));

    signal(second.child.id(), libc::SIGSTOP);
    let begun = Instant::now();
    let html = page(&bench, &["--library", text(&library)]);
    let took = begun.elapsed();
    signal(second.child.id(), libc::SIGCONT);
    assert!(html.contains("1 of 3 servers of this library answered") && html.contains("does not answer"));
    assert!(took < Duration::from_secs(20), "{took:?}");
    drop(client);
    drop((first, second, third));
}

#[test]
fn errors_name_the_file_the_line_and_the_mend() {
    let bench = Bench::new();
    let out = bench.path("o.html");
    let report = |dir: &Path| fails(&["report", text(dir), "--out", text(&out)]);
    let said = report(&bench.path("nowhere"));
    assert!(said.contains("nowhere/figures.json") && said.contains("qemu-scripts/evaluate.sh"), "{said}");
    let dir = evaluation(bench.dir.path(), 10.0);
    let points = dir.join("points.jsonl");
    let good = fs::read_to_string(&points).unwrap();
    fs::write(&points, format!("{good}{{\"figure\":\"12a\",\"colour\":1}}\n")).unwrap();
    let said = report(&dir);
    let line = format!("points.jsonl: line {}: unknown field `colour`", good.lines().count() + 1);
    assert!(said.contains(&line) && said.contains("docs/report.md"), "{said}");
    fs::write(dir.join("figures.json"), "{\"titel\":\"\"}").unwrap();
    assert!(report(&dir).contains("figures.json: unknown field `titel`"));
    assert!(!out.exists(), "nothing is written then");
    assert_eq!(run(&["report", text(&dir)]).status.code(), Some(1));
    for usage in [&["report"][..], &["report", "--colour"], &["report", text(&dir), "more"]] {
        assert_eq!(run(usage).status.code(), Some(2), "{usage:?}");
    }
    assert!(fails(&["report"]).contains("name the directory of an evaluation, or a library"));
}
