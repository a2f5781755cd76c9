//! The command line.

use crate::subject::Kind;
use std::path::PathBuf;

/// Compares vhost-user-blk backends, alternating in one run. What the scenarios and columns mean: benches/peer/README.md.
#[derive(Debug, clap::Parser)]
#[command(name = "peer", bin_name = "cargo bench --bench peer --")]
pub struct Args {
    /// A shorter run: 3 rounds of 0.3 s, images of 128 MiB, and only the scenarios that decide
    #[arg(long)]
    pub quick: bool,
    /// Only scenarios whose name contains one of these; '*' stands for anything ("qd1-*sleep")
    #[arg(long, value_name = "PATTERN", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Name the scenarios and end
    #[arg(long)]
    pub list: bool,
    /// Who is measured; vmar is what the others are compared with
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_enum, default_values_t = Kind::DEFAULT)]
    pub subjects: Vec<Kind>,
    /// Rounds of each scenario; every subject has its turn in every round [default: 5, quick: 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub rounds: Option<u32>,
    /// Seconds of one turn [default: 1, quick: 0.3]
    #[arg(long, value_name = "S", value_parser = seconds)]
    pub seconds: Option<f64>,
    /// MiB of each image [default: 512, quick: 128]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(16..=65536))]
    pub size: Option<u64>,
    /// Write every figure of every round to this file, after each scenario
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draw the ratios to this file
    #[arg(long, value_name = "FILE")]
    pub svg: Option<PathBuf>,
    /// Make the images below this directory: up to 9 times the size, on the file system that is to be measured
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    pub dir: PathBuf,
    /// MB (of 1000000 bytes) a second that a server may read from the disk in throttled scenarios
    #[arg(long, value_name = "MB", default_value_t = 20, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    pub throttle: u64,
    /// The peer's program
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-storage-daemon")]
    pub qsd: PathBuf,
    /// Drive this socket, whoever serves it, instead of the subjects: hot scenarios that only read
    #[arg(long, value_name = "PATH", conflicts_with_all = ["svg", "size", "subjects"])]
    pub socket: Option<PathBuf>,
    /// The process behind --socket, for its CPU time and memory
    #[arg(long, value_name = "PID", requires = "socket")]
    pub pid: Option<u32>,
    /// With --socket: scenarios that write as well, over what the disk holds
    #[arg(long, requires = "socket")]
    pub destroy: bool,
    /// What cargo bench adds
    #[arg(long, hide = true)]
    pub bench: bool,
}

impl Args {
    /// Rounds of each scenario.
    pub fn rounds(&self) -> u32 {
        self.rounds.unwrap_or(if self.quick { 3 } else { 5 })
    }

    /// Seconds of one turn.
    pub fn seconds(&self) -> f64 {
        self.seconds.unwrap_or(if self.quick { 0.3 } else { 1.0 })
    }

    /// Bytes of each image.
    pub fn image_bytes(&self) -> u64 {
        self.size.unwrap_or(if self.quick { 128 } else { 512 }) << 20
    }
}

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(s) if (0.01..=3600.0).contains(&s) => Ok(s),
        _ => Err("seconds from 0.01 to 3600".into()),
    }
}
