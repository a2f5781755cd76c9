//! Claims: what the paper says, what was to be reached, and what came out. Always computed of the points, never written down.

use super::canvas::{number, rough};
use super::points::{Evaluation, Mean, X};
use super::{Cell, Part, Section, Table};
use serde::{Deserialize, Serialize};

/// A claim about two points of a figure, or one.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Claim {
    /// The figure whose points it is about.
    pub figure: String,
    /// What is claimed, in words.
    pub what: String,
    /// What the paper says, in words.
    #[serde(default)]
    pub paper: String,
    /// What was to be reached, in words.
    #[serde(default)]
    pub target: String,
    /// The point.
    pub of: Place,
    /// The point that it is compared with.
    #[serde(default)]
    pub against: Option<Place>,
    /// How.
    pub form: Form,
    /// The unit of a [`Form::Value`].
    #[serde(default)]
    pub unit: String,
    /// Met from there on.
    #[serde(default)]
    pub at_least: Option<f64>,
    /// Met up to there.
    #[serde(default)]
    pub at_most: Option<f64>,
}

/// A point of a figure.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// The scheme.
    pub scheme: String,
    /// Where on the x axis.
    pub x: X,
}

/// How a claim is computed of the means of its points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// `1 - of / against`, in percent.
    Less,
    /// `of / against`.
    Ratio,
    /// `of`.
    Value,
    /// `of / against` in percent, or `of`, which is a percentage then.
    Percent,
}

/// Whether a claim holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It does.
    Met,
    /// It does not.
    Short,
    /// A point is missing, or what it is compared with is 0.
    NotMeasured,
    /// Nothing was to be reached.
    NoTarget,
}

impl Verdict {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Met => "met",
            Verdict::Short => "short",
            Verdict::NotMeasured => "not measured",
            Verdict::NoTarget => "no target",
        }
    }

    fn good(self) -> Option<bool> {
        match self {
            Verdict::Met => Some(true),
            Verdict::Short => Some(false),
            Verdict::NotMeasured | Verdict::NoTarget => None,
        }
    }
}

/// What has become of a claim.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Judged {
    /// The figure.
    pub figure: String,
    /// What is claimed.
    pub what: String,
    /// What the paper says.
    pub paper: String,
    /// What was to be reached.
    pub target: String,
    /// What came out; `None` if it was not measured.
    pub ours: Option<f64>,
    /// Its standard deviation, of those of the two points; `None` with a single run of each.
    pub plus_minus: Option<f64>,
    /// Its unit.
    pub unit: String,
    /// Whether that is what was to be reached.
    pub verdict: Verdict,
}

impl Claim {
    /// What the types do not say.
    pub(super) fn check(&self) -> Result<(), String> {
        if matches!(self.form, Form::Less | Form::Ratio) && self.against.is_none() {
            let form = if self.form == Form::Less { "less" } else { "ratio" };
            return Err(format!("claim {:?}: the form {form:?} needs \"against\"", self.what));
        }
        Ok(())
    }

    /// Computes it.
    pub fn judge(&self, evaluation: &Evaluation) -> Judged {
        let mean = |place: &Place| evaluation.mean(&self.figure, &place.scheme, &place.x);
        let against = self.against.as_ref().map(mean);
        let computed = match (mean(&self.of), against) {
            (Some(of), None) => Some((of.mean, of.deviation, of.runs > 1)),
            (Some(of), Some(Some(against))) => self.compare(of, against),
            _ => None,
        };
        let verdict = match computed {
            None => Verdict::NotMeasured,
            Some(_) if self.at_least.is_none() && self.at_most.is_none() => Verdict::NoTarget,
            Some((ours, ..)) => {
                let is_met =
                    self.at_least.is_none_or(|least| ours >= least) && self.at_most.is_none_or(|most| ours <= most);
                if is_met { Verdict::Met } else { Verdict::Short }
            }
        };
        Judged {
            figure: self.figure.clone(),
            what: self.what.clone(),
            paper: self.paper.clone(),
            target: if self.target.is_empty() { self.bounds() } else { self.target.clone() },
            ours: computed.map(|(ours, ..)| ours),
            plus_minus: computed.filter(|(.., repeated)| *repeated).map(|(_, deviation, _)| deviation),
            unit: self.unit().to_string(),
            verdict,
        }
    }

    /// The value, its deviation, and whether there was more than one run. `None` when what it is compared with is 0.
    fn compare(&self, of: Mean, against: Mean) -> Option<(f64, f64, bool)> {
        if against.mean == 0.0 {
            return None;
        }
        let ratio = of.mean / against.mean;
        // Of first order, the two being measured apart; written so that a mean of 0 is none to divide by.
        let deviation = (of.deviation / against.mean).hypot(ratio * against.deviation / against.mean);
        let repeated = of.runs > 1 || against.runs > 1;
        Some(match self.form {
            Form::Less => (100.0 * (1.0 - ratio), 100.0 * deviation, repeated),
            Form::Percent => (100.0 * ratio, 100.0 * deviation, repeated),
            Form::Ratio => (ratio, deviation, repeated),
            Form::Value => (of.mean, of.deviation, of.runs > 1),
        })
    }

    fn unit(&self) -> &str {
        match self.form {
            Form::Less | Form::Percent => "%",
            Form::Ratio => "×",
            Form::Value => &self.unit,
        }
    }

    fn bounds(&self) -> String {
        let bound = |name: &str, value: Option<f64>| value.map(|v| format!("{name} {}", told(v, self.unit())));
        let bounds = [bound("at least", self.at_least), bound("at most", self.at_most)];
        bounds.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// A value with its unit.
fn told(value: f64, unit: &str) -> String {
    match unit {
        "" => number(value),
        "%" => format!("{}%", number((value * 10.0).round() / 10.0)),
        unit => format!("{} {unit}", number(value)),
    }
}

impl Judged {
    /// What came out, with its unit.
    pub fn ours(&self) -> String {
        match (self.ours, self.plus_minus) {
            (None, _) => Verdict::NotMeasured.name().to_string(),
            (Some(ours), None) => told(ours, &self.unit),
            (Some(ours), Some(deviation)) => {
                let bare = told(ours, if self.unit == "%" { "%" } else { "" });
                let unit =
                    if self.unit == "%" || self.unit.is_empty() { &self.unit } else { &format!(" {}", self.unit) };
                format!("{} ± {}{unit}", bare.trim_end_matches('%'), rough(deviation))
            }
        }
    }

    /// For the caption of the figure.
    pub fn sentence(&self) -> String {
        match self.verdict {
            Verdict::NotMeasured => format!("{}: not measured", self.what),
            Verdict::NoTarget => format!("{}: {}", self.what, self.ours()),
            verdict => format!("{}: {} ({})", self.what, self.ours(), verdict.name()),
        }
    }
}

/// The table at the top of the page.
pub(super) fn section(judged: &[Judged]) -> Section {
    let row = |j: &Judged| {
        let verdict = Cell::Verdict { text: j.verdict.name().into(), good: j.verdict.good() };
        let words = [&j.figure, &j.what, &j.paper, &j.target, &j.ours()].map(Cell::text);
        words.into_iter().chain([verdict]).collect()
    };
    let count = |verdict: Verdict| judged.iter().filter(|j| j.verdict == verdict).count();
    let (met, short) = (count(Verdict::Met), count(Verdict::Short));
    let missing = judged.iter().filter(|j| j.verdict == Verdict::NotMeasured && !j.target.is_empty()).count();
    let table = Table {
        id: "claims".into(),
        caption: "Ours: of the means of all runs; ± is the standard deviation of a run.".into(),
        head: ["figure", "what", "paper", "target", "ours", "verdict"].map(String::from).to_vec(),
        rows: judged.iter().map(row).collect(),
        rows_max: 0,
    };
    let all = met + short + missing;
    let text = format!("Of {all} claims with a target: {met} met, {short} short, {missing} not measured.");
    Section { title: "Paper, target, ours".into(), text, parts: vec![Part::Table(table)] }
}

#[cfg(test)]
mod tests {
    use super::super::points::Measured;
    use super::*;

    fn place(scheme: &str) -> Place {
        Place { scheme: scheme.into(), x: X::Number(12.0) }
    }

    fn claim(form: Form, against: Option<&str>, at_least: Option<f64>, at_most: Option<f64>) -> Claim {
        let (paper, target, unit) = (String::new(), String::new(), "s".to_string());
        let (figure, what) = ("12a".to_string(), "boot time".to_string());
        Claim {
            figure,
            what,
            paper,
            target,
            of: place("vmar"),
            against: against.map(place),
            form,
            unit,
            at_least,
            at_most,
        }
    }

    fn evaluation(vmar: &[f64], other: &[f64]) -> Evaluation {
        let point = |scheme: &str, value: &f64| {
            let (figure, scheme, x) = ("12a".to_string(), scheme.to_string(), X::Number(12.0));
            Measured { figure, x, scheme, value: *value, run: 0 }
        };
        let points = vmar.iter().map(|v| point("vmar", v)).chain(other.iter().map(|v| point("on-demand", v))).collect();
        Evaluation { points, ..Evaluation::default() }
    }

    #[test]
    fn a_claim_flips_when_the_points_change() {
        let claim = claim(Form::Less, Some("on-demand"), Some(60.0), None);
        let met = claim.judge(&evaluation(&[3.0], &[10.0]));
        assert_eq!((met.verdict, met.ours().as_str(), met.target.as_str()), (Verdict::Met, "70%", "at least 60%"));
        let short = claim.judge(&evaluation(&[5.0], &[10.0]));
        assert_eq!((short.verdict, short.ours().as_str()), (Verdict::Short, "50%"));
        for missing in [evaluation(&[], &[10.0]), evaluation(&[3.0], &[]), evaluation(&[3.0], &[0.0])] {
            assert_eq!(claim.judge(&missing).verdict, Verdict::NotMeasured);
            assert_eq!(claim.judge(&missing).ours(), "not measured");
        }
    }

    #[test]
    fn each_form_has_its_unit_and_its_deviation() {
        let evaluation = evaluation(&[1.9, 2.1], &[9.0, 11.0]);
        let ours = |form, against| claim(form, against, None, None).judge(&evaluation).ours();
        assert_eq!(ours(Form::Value, None), "2 ± 0.14 s");
        assert_eq!(ours(Form::Ratio, Some("on-demand")), "0.2 ± 0.032 ×");
        assert_eq!(ours(Form::Percent, Some("on-demand")), "20 ± 3.2%");
        assert_eq!(ours(Form::Less, Some("on-demand")), "80 ± 3.2%");
        assert_eq!(ours(Form::Percent, None), "2 ± 0.14%");
        let judged = claim(Form::Ratio, Some("on-demand"), None, Some(0.2)).judge(&evaluation);
        assert_eq!((judged.verdict, judged.sentence().as_str()), (Verdict::Met, "boot time: 0.2 ± 0.032 × (met)"));
        assert_eq!(claim(Form::Value, None, None, None).judge(&evaluation).verdict, Verdict::NoTarget);
    }

    #[test]
    fn the_table_counts() {
        let evaluation = evaluation(&[1.0], &[10.0]);
        let claims = [Some(60.0), Some(95.0), None].map(|least| claim(Form::Less, Some("on-demand"), least, None));
        let judged: Vec<Judged> = claims.iter().map(|c| c.judge(&evaluation)).collect();
        let section = section(&judged);
        assert!(section.text.starts_with("Of 2 claims with a target: 1 met, 1 short, 0 not"), "{}", section.text);
    }
}
