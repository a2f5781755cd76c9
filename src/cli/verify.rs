//! `vmar image verify`: reads images again.

use super::Common;
use super::image::stop_on_signals;
use super::output::{Progress, print_json};
use super::overlay::parse_size;
use crate::error::{Error, ErrorKind, Result};
use crate::indexer::Work;
use crate::indexer::verify::{Options, Sample, Verified, verify_with};
use crate::library::Library;
use crate::units::human_bytes;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::num::NonZeroU64;

/// Arguments of `vmar image verify`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image; all if none is named
    name: Option<String>,
    /// Look at a random part only: a share of the chunks of 1 MiB that have data, and the redirects in them
    #[arg(long, value_name = "1/N | P%", value_parser = parse_share)]
    sample: Option<f64>,
    /// Look at the same part as a verification that printed this seed
    #[arg(long, value_name = "N", requires = "sample")]
    seed: Option<u64>,
    /// Keep the progress in the library, and go on where a verification with --resume was stopped or killed
    #[arg(long, conflicts_with = "sample")]
    resume: bool,
    /// Read no more than N bytes a second
    #[arg(long, value_name = "N[K|M|G|T]", value_parser = parse_rate)]
    rate_limit: Option<NonZeroU64>,
}

/// `1/64` or `5%`, as a share: more than 0, and no more than 1.
fn parse_share(text: &str) -> Result<f64, String> {
    let share = match (text.strip_prefix("1/"), text.strip_suffix('%')) {
        (Some(n), _) => n.parse::<u32>().ok().map(|n| 1.0 / f64::from(n)),
        (_, Some(percent)) => percent.parse::<f64>().ok().map(|p| p / 100.0),
        _ => None,
    };
    share.filter(|s| *s > 0.0 && *s <= 1.0).ok_or_else(|| "give a share, as 1/64 or 5%".to_string())
}

fn parse_rate(text: &str) -> Result<NonZeroU64, String> {
    NonZeroU64::new(parse_size(text)?).ok_or_else(|| "nothing a second would take for ever".to_string())
}

/// Runs the verb.
pub fn run(common: &Common, args: Args) -> Result<()> {
    let dir = common.library()?;
    let stop = stop_on_signals()?;
    let library = Library::open(dir)?;
    let names: Vec<String> = match args.name {
        Some(name) => vec![name],
        None => library.images().iter().map(|r| r.name.clone()).collect(),
    };
    // A number that nobody chose: this hasher is keyed by the operating system.
    let seed = args.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish());
    let sample = args.sample.map(|share| Sample { share, seed });
    let options = Options { sample, resume: args.resume, rate: args.rate_limit };
    let (mut bad, mut lines) = (Vec::new(), Vec::new());
    for name in &names {
        let progress = Progress::new();
        let outcome = verify_with(dir, name, &options, &Work::on_all_cores(&stop, &progress));
        drop(progress);
        match outcome {
            Ok(verified) if common.json => lines.push(verified_json(name, &verified, sample)),
            Ok(verified) => print_verified(name, &verified, sample),
            Err(err) if err.kind() == ErrorKind::Interrupted && options.resume => {
                return Err(err.mend("the same command with --resume goes on from here"));
            }
            Err(err) if names.len() == 1 || err.kind() == ErrorKind::Interrupted => return Err(err),
            Err(err) => {
                lines.push(serde_json::json!({ "name": name, "good": false, "error": err.to_string() }));
                eprintln!("vmar: {err}");
                bad.push(name.as_str());
            }
        }
    }
    if common.json {
        print_json(&lines)?;
    }
    if bad.is_empty() {
        return Ok(());
    }
    let cause = format!("{} of {} images are bad: {}", bad.len(), names.len(), bad.join(", "));
    Err(Error::file(ErrorKind::Corrupt, dir, cause).mend("see the lines above"))
}

fn verified_json(name: &str, verified: &Verified, sample: Option<Sample>) -> serde_json::Value {
    let (chunks, looked_at) = verified.chunks;
    serde_json::json!({
        "name": name,
        "good": true,
        "data_bytes": verified.data_bytes,
        "redirects": verified.redirects,
        "mended": verified.mended,
        "chunks": chunks,
        "verified_chunks": looked_at,
        "resumed_bytes": verified.resumed_bytes,
        "seed": sample.map(|s| s.seed),
    })
}

fn print_verified(name: &str, verified: &Verified, sample: Option<Sample>) {
    let mended = if verified.mended { "; its modification time had changed and is accepted" } else { "" };
    let data = human_bytes(verified.data_bytes);
    let before = match verified.resumed_bytes {
        0 => String::new(),
        bytes => format!(", {} before", human_bytes(bytes)),
    };
    let (chunks, looked_at) = verified.chunks;
    let part = sample.map_or(String::new(), |s| format!(" (a sample: {looked_at} of {chunks} MiB, seed {})", s.seed));
    println!("{name}: good: {data} of data{before}, {} redirected blocks{part}{mended}", verified.redirects);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_fractions_and_percentages() {
        assert_eq!(parse_share("1/64"), Ok(1.0 / 64.0));
        assert_eq!(parse_share("5%"), Ok(0.05));
        assert_eq!(parse_share("0.5%"), Ok(0.005));
        assert_eq!(parse_share("1/1"), Ok(1.0));
        for text in ["", "5", "0%", "101%", "-1%", "1/0", "2/3", "1/-2", "%", "NaN%", "inf%", "1/", "x"] {
            assert!(parse_share(text).is_err(), "{text}");
        }
        assert!(parse_rate("0").is_err() && parse_rate("10M").is_ok());
    }
}
