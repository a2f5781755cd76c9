//! The command line.

use clap::ValueEnum;
use std::path::PathBuf;

/// How a VM gets at its image (paper, section 4.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Scheme {
    /// qemu-storage-daemon: the raw file, on the local disk (not slowed by --rate)
    PreCopy,
    /// qemu-storage-daemon: a qcow2 overlay over the raw file
    OnDemand,
    /// vmar serve
    Vmar,
}

impl Scheme {
    /// Its name on the command line and in the result.
    pub fn name(self) -> String {
        self.to_possible_value().map(|v| v.get_name().to_string()).unwrap_or_default()
    }
}

/// Reads that are no boot (paper, section 4.2, overhead).
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Sweep {
    /// 3,000 chunks of 1 MiB at random places
    Random,
    /// 350 MiB in sequence, by 1 MiB
    Sequential,
}

/// Boots many VMs from recorded traces, and measures time, page cache and disk reads. Prints one JSON object.
#[derive(Debug, clap::Parser)]
#[command(name = "storm", bin_name = "cargo bench --bench storm --")]
pub struct Args {
    /// Traces that `vmar serve --record` wrote with a library whose maps redirect nothing. TRACE.app.json beside TRACE.trace
    /// (qemu-scripts/record-boots.sh) says when the boot ended and an application began to load
    #[arg(value_name = "TRACE", required_unless_present = "sweep")]
    pub traces: Vec<PathBuf>,
    /// A library with the same images
    #[arg(long, value_name = "DIR")]
    pub library: PathBuf,
    /// How VMs get at their images
    #[arg(long, value_enum, default_value_t = Scheme::Vmar)]
    pub scheme: Scheme,
    /// No VMs: only say how many bytes of distinct contents these boots read, the least that any page cache must hold
    #[arg(long)]
    pub limit: bool,
    /// No boots: this many non-zero bytes of --image, twice; the second time counts, from the page cache
    #[arg(long, value_enum, requires = "image", conflicts_with_all = ["traces", "vms", "limit"])]
    pub sweep: Option<Sweep>,
    /// For --sweep
    #[arg(long, value_name = "NAME")]
    pub image: Option<String>,
    /// So many VMs; more than traces: several of one image
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub vms: usize,
    /// Seconds between arrivals
    #[arg(long, value_name = "S", default_value_t = 0.0)]
    pub interval: f64,
    /// The interval is the mean of exponential gaps
    #[arg(long)]
    pub poisson: bool,
    /// Each VM comes when the one before it is up
    #[arg(long, conflicts_with_all = ["interval", "poisson"])]
    pub one_by_one: bool,
    /// For --poisson and --sweep random
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Bytes a second that all servers together may read from slow storage
    #[arg(long, value_name = "BYTES")]
    pub rate: Option<u64>,
    /// Bytes of memory for all servers together, with the page cache that they fill
    #[arg(long, value_name = "BYTES")]
    pub memory: Option<u64>,
    /// Which part of the recorded pauses passes
    #[arg(long, value_name = "SHARE", default_value_t = 1.0)]
    pub think: f64,
    /// Seconds that these guests compute until they are up, on average: instead of --think
    #[arg(long, value_name = "S", conflicts_with = "think")]
    pub compute: Option<f64>,
    /// Leave the page cache as it is
    #[arg(long)]
    pub warm: bool,
    /// Reads of each VM that are compared with its image, after the measurement
    #[arg(long, value_name = "N", default_value_t = 50)]
    pub check: usize,
    /// Have `vmar serve` prefetch what the VM's own trace says
    #[arg(long)]
    pub prefetch: bool,
    /// One more argument for `vmar serve`
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    pub serve: Vec<String>,
    /// Overlays and sockets are made below this directory
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    pub dir: PathBuf,
    /// The peer's program
    #[arg(long, value_name = "PROGRAM", default_value = "qemu-storage-daemon")]
    pub qsd: PathBuf,
    /// What cargo bench adds
    #[arg(long, hide = true)]
    pub bench: bool,
}
