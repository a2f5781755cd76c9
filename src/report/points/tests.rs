use super::*;

const GOOD: &str = r#"{"figure":"12","x":1,"scheme":"vmar","value":2,"run":1}"#;

fn written(figures: &str, points: &str) -> Result<Evaluation> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(FIGURES), figures).unwrap();
    fs::write(dir.path().join(POINTS), points).unwrap();
    Evaluation::read(dir.path())
}

/// `figures.json` with these fields of figure 12.
fn figures(more: &str) -> String {
    let figure = format!(r#"{{"id":"12","section":"s","caption":"c","x":"VMs","y":"time (s)"{more}}}"#);
    format!(r#"{{"title":"t","lead":"l","facts":[["cpu","two"]],"figures":[{figure}]}}"#)
}

fn why(result: Result<Evaluation>) -> String {
    let err = result.unwrap_err();
    assert_eq!(err.kind(), ErrorKind::Corrupt);
    err.to_string()
}

#[test]
fn runs_become_a_mean_with_its_deviation() {
    let lines = [(8, "vmar", 3), (1, "vmar", 9), (8, "vmar", 5), (8, "limit", 1), (8, "raw", 1)];
    let lines = lines.map(|(x, s, v)| format!(r#"{{"figure":"12","x":{x},"scheme":"{s}","value":{v}}}"#));
    let evaluation = written(&figures(""), &lines.join("\n")).unwrap();
    let points: Vec<&Measured> = evaluation.points.iter().collect();
    let chart = chart(&evaluation.says.figures[0], &points, &evaluation.schemes(), false);
    let schemes: Vec<(&str, usize, Look)> = chart.series.iter().map(|s| (s.name.as_str(), s.color, s.look)).collect();
    assert_eq!(schemes, [("vmar", 0, Look::Line), ("raw", 1, Look::Line), ("limit", 0, Look::Limit)]);
    let want = [Point { x: 1.0, y: 9.0, deviation: 0.0 }, Point { x: 8.0, y: 4.0, deviation: 2f64.sqrt() }];
    assert_eq!(chart.series[0].points, want);
    assert_eq!(evaluation.mean("12", "vmar", &X::Number(8.0)).unwrap().runs, 2);
    assert_eq!(evaluation.mean("12", "vmar", &X::Word("8".into())), None);
}

#[test]
fn words_become_bars_in_the_order_in_which_they_appear() {
    let lines = [("z", "vmar", 3), ("a", "raw", 5), ("z", "raw", 7)];
    let lines = lines.map(|(x, s, v)| format!(r#"{{"figure":"12","x":"{x}","scheme":"{s}","value":{v}}}"#));
    let evaluation = written(&figures(""), &lines.join("\n")).unwrap();
    let sections = evaluation.sections();
    let Part::Plot(Plot { picture: Picture::Bars(bars), data, .. }) = &sections[0].parts[0] else { panic!("no bars") };
    assert_eq!(bars.words, ["z", "a"]);
    let values: Vec<Vec<Option<f64>>> =
        bars.series.iter().map(|g| g.values.iter().map(|p| p.map(|p| p.y)).collect()).collect();
    assert_eq!(values, [[Some(3.0), None], [Some(7.0), Some(5.0)]]);
    assert_eq!(data.csv(), "scheme,VMs,time (s),run\r\nvmar,z,3,0\r\nraw,a,5,0\r\nraw,z,7,0\r\n");
    assert_eq!(sections[1].title, "Machine, versions, commands");
}

#[test]
fn numbers_are_bars_if_the_figure_says_so() {
    let evaluation = written(&figures(r#","kind":"bars""#), GOOD).unwrap();
    let Part::Plot(plot) = &evaluation.sections()[0].parts[0] else { panic!("no plot") };
    assert!(matches!(&plot.picture, Picture::Bars(bars) if bars.words == ["1"]));
}

#[test]
fn a_figure_without_points_is_told_of_and_not_drawn() {
    let evaluation = written(&figures(""), "").unwrap();
    let sections = evaluation.sections();
    assert!(matches!(&sections[0].parts[..], [Part::Note(text)] if text == "Not measured: figure 12."), "{sections:?}");
    assert!(evaluation.drawn().is_empty());
}

#[test]
fn what_is_wrong_is_named_by_its_line() {
    let dir = tempfile::tempdir().unwrap();
    let err = Evaluation::read(dir.path()).unwrap_err();
    assert!(err.kind() == ErrorKind::NotFound && err.to_string().contains("evaluate.sh"), "{err}");
    let points = |line: &str, more: &str| why(written(&figures(more), &format!("{GOOD}\n\n{GOOD}\n{line}")));
    let half = points("half", "");
    assert!(half.contains("points.jsonl: line 4: ") && half.contains("at column 1"), "{half}");
    for (from, to, more, cause) in [
        ("run", "turn", "", "unknown field `turn`"),
        (":1,\"s", ":[1],\"s", "", "x is neither a number nor a word"),
        ("\"12\"", "\"13\"", "", "figure \"13\" is not in figures.json"),
        (":1,\"s", ":\"a\",\"s", r#","kind":"line""#, "is to be a number, not \"a\""),
        (":1,\"s", ":0,\"s", r#","log_x":true"#, "is to be above 0"),
        ("\"value\":2", "\"value\":101", r#","kind":"cdf""#, "0 to 100, not 101"),
    ] {
        let said = points(&GOOD.replace(from, to), more);
        assert!(said.contains("line 4") && said.contains(cause), "{said}");
    }
}

#[test]
fn what_is_wrong_with_the_description_is_named() {
    let good = figures("");
    for (from, to, cause) in [
        (r#""id":"12""#, r#""id":"../12""#, "figure \"../12\": an id has letters"),
        (r#""lead""#, r#""leader""#, "unknown field `leader`"),
        (r#""caption":"c""#, r#""caption":"c","kind":"pie""#, "unknown variant `pie`"),
        (
            r#""figures":["#,
            r#""tables":[{"id":"a","section":"s","caption":"","head":["x"],"rows":[[1,2]]}],"figures":["#,
            "table \"a\": row 1 has 2 cells, its head 1",
        ),
        (
            r#""figures":["#,
            r#""claims":[{"figure":"12","what":"w","of":{"scheme":"a","x":1},"form":"less"}],"figures":["#,
            "\"less\" needs \"against\"",
        ),
    ] {
        let said = why(written(&good.replace(from, to), ""));
        assert!(said.contains("figures.json: ") && said.contains(cause), "{said}");
    }
}

#[test]
fn cells_of_tables_are_numbers_words_or_nothing() {
    let table = r#""tables":[{"id":"a","section":"other","caption":"c","head":["x","y","z"],"rows":[[1.5,"w",null]]}],"figures":["#;
    let evaluation = written(&figures("").replace(r#""figures":["#, table), "").unwrap();
    let Part::Table(table) = &evaluation.sections()[1].parts[0] else { panic!("no table") };
    assert_eq!(table.csv(), "x,y,z\r\n1.5,w,–\r\n");
    assert_eq!(table.id, "table-a");
}
