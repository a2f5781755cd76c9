//! Many VMs boot at once, without their processors: replays recorded boots (`vmar serve --record`) against a server for each VM,
//! and measures what they cost the host. The I/O path alone, so that it is not hidden by a slow or emulated processor.
//!
//! ```text
//! cargo bench --bench storm -- --library LIB --scheme vmar --vms 12 --interval 5 --poisson --rate 12000000 TRACE...
//! ```
//!
//! Each trace is a guest: it reads what the trace says, in its order, waits for what it asked for, and lets pass the time that
//! passed before the next request was made (`--think` of it: recorded under emulation, a guest computes 10 to 20 times longer
//! than on a real processor). VM number n replays trace n, beginning anew at the end of the list. The schemes are those of the
//! paper's section 4.1: *pre-copy*, a raw file on the local disk; *on-demand*, a qcow2 overlay over a raw file on slow storage,
//! both by qemu-storage-daemon, QEMU's own block layer; *vmar*, `vmar serve` over the same slow storage.
//!
//! `args` → `boot` (a trace becomes steps) → `host` (servers in their control groups, page cache) ← `guest` (a VM's reads).
//! The result is one JSON object on standard output. A program, not a test: it fails on wrong bytes, never on slow ones.
#![allow(clippy::cast_possible_truncation)]

mod args;
mod boot;
mod guest;
mod host;
#[path = "../peer/server.rs"]
mod server;
#[path = "../peer/throttle.rs"]
mod throttle;

use args::Args;
use boot::Boot;
use clap::Parser;
use guest::{Guest, Played};
use host::Host;
use serde_json::json;
use server::Server;
use std::fs::File;
use std::process::ExitCode;
use std::sync::{Mutex, RwLock, mpsc};
use std::time::{Duration, Instant};

/// Errors are one line for a person.
type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    if std::env::args_os().len() == 1 {
        // `cargo test --all-targets` runs benches with nothing on the command line.
        println!("nothing to test here; to measure: cargo bench --bench storm -- --help");
        return ExitCode::SUCCESS;
    }
    match measure(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("storm: {why}");
            ExitCode::FAILURE
        }
    }
}

/// A VM that has booted, and still runs.
struct Up {
    // In this order they are dropped: a guest before its disk.
    guest: Guest,
    server: Server,
    /// From its arrival, the start of its server included: a customer waits for that as well.
    total: Duration,
    played: Played,
}

impl Up {
    /// Seconds until it was up; of a sweep, those of the second time.
    fn boot_s(&self) -> f64 {
        match self.played.marked {
            Some(marked) => (self.total - (self.played.total - marked)).as_secs_f64(),
            None => self.total.as_secs_f64(),
        }
    }

    /// Seconds in which it loaded its application.
    fn app_s(&self) -> Option<f64> {
        self.played.marked.map(|marked| (self.played.total - marked).as_secs_f64())
    }
}

fn measure(mut args: Args) -> Result<()> {
    let host = Host::new(&args)?;
    let boots = match (args.sweep, &args.image) {
        (Some(sweep), Some(image)) => vec![Boot::sweep(host.library(), image, sweep, args.seed)?],
        _ => args.traces.iter().map(|file| Boot::read(file, host.library())).collect::<Result<Vec<_>>>()?,
    };
    if args.limit {
        let some: Vec<&Boot> = boots.iter().take(args.vms).collect();
        let bytes = boot::distinct_bytes(&some)?;
        println!("{}", json!({ "vms": args.vms, "limit_bytes": bytes }));
        return Ok(());
    }
    for vm in 0..args.vms {
        host.prepare(vm, &boots[vm % boots.len()])?;
    }
    if !args.warm {
        host.drop_caches()?;
    }
    if let Some(seconds) = args.compute {
        let recorded = boots.iter().map(Boot::compute_s).sum::<f64>() / boots.len().max(1) as f64;
        args.think = seconds / recorded.max(1e-9);
    }
    let out = storm(&args, &host, &boots, |ups| result(&args, &host, &boots, ups))?;
    println!("{out}");
    Ok(())
}

/// All VMs, each from its arrival on; `then` sees them while all still run.
fn storm<T>(args: &Args, host: &Host, boots: &[Boot], then: impl FnOnce(Vec<Up>) -> Result<T>) -> Result<T> {
    let arrivals = arrivals(args);
    let (turn, end) = (Mutex::new(()), RwLock::new(()));
    let (sender, receiver) = mpsc::channel();
    let start = Instant::now();
    std::thread::scope(|scope| {
        let running = end.write();
        for (vm, due) in arrivals.into_iter().enumerate() {
            let (sender, turn, end) = (sender.clone(), &turn, &end);
            scope.spawn(move || {
                std::thread::sleep(due.saturating_sub(start.elapsed()));
                let alone = args.one_by_one.then(|| turn.lock());
                let up = boot(args, host, vm, &boots[vm % boots.len()]);
                drop(alone);
                let _ = sender.send((vm, up));
                drop(sender);
                // A server is told to end with the thread that started it.
                drop(end.read());
            });
        }
        drop(sender);
        let mut ups = Vec::new();
        for (vm, up) in &receiver {
            ups.push((vm, up?));
            eprint!("\r{} of {} VMs are up after {:.0} s ", ups.len(), args.vms, start.elapsed().as_secs_f64());
        }
        eprintln!();
        ups.sort_by_key(|(vm, _)| *vm);
        let out = then(ups.into_iter().map(|(_, up)| up).collect());
        drop(running);
        out
    })
}

/// One VM, from its arrival to its last read.
fn boot(args: &Args, host: &Host, vm: usize, boot: &Boot) -> Result<Up> {
    let began = Instant::now();
    let (server, mut guest) = host.start(vm, boot)?;
    let mut played = guest.replay(boot, args.think)?;
    let mut total = began.elapsed();
    if args.sweep.is_some() {
        played = guest.replay(boot, args.think)?;
        total = played.total;
    }
    Ok(Up { guest, server, total, played })
}

/// What it came to, as JSON.
fn result(args: &Args, host: &Host, boots: &[Boot], mut ups: Vec<Up>) -> Result<serde_json::Value> {
    let cached = host.cached_bytes()?;
    let (mut read, mut cpu, mut private) = (Some(0), 0, 0);
    for up in &ups {
        let pid = up.server.pid();
        read = read.zip(server::disk_bytes(pid)).map(|(sum, bytes)| sum + bytes);
        cpu += server::cpu_ns(pid)?;
        private += server::private_kib(pid)?;
    }
    // Now, when it cannot change what was measured any more.
    for (vm, up) in ups.iter_mut().enumerate() {
        let boot = &boots[vm % boots.len()];
        let raw = File::open(&boot.raw).map_err(|e| format!("{}: {e}", boot.raw.display()))?;
        up.guest.check(boot, &raw, args.check, vm as u64)?;
        up.server.check_alive()?;
    }
    let seconds: Vec<f64> = ups.iter().map(Up::boot_s).collect();
    let loads: Vec<f64> = ups.iter().filter_map(Up::app_s).collect();
    let waited: Vec<f64> = ups.iter().map(|up| up.played.waited.as_secs_f64()).collect();
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
    for up in ups {
        drop(up.guest);
        up.server.stop();
    }
    Ok(json!({
        "scheme": args.scheme.name(), "vms": args.vms, "traces": boots.len(), "interval_s": args.interval,
        "poisson": args.poisson, "one_by_one": args.one_by_one, "seed": args.seed, "rate": args.rate,
        "memory": args.memory, "think": args.think, "warm": args.warm,
        "mean_s": mean(&seconds), "max_s": seconds.iter().copied().fold(0.0, f64::max),
        "mean_wait_s": mean(&waited), "boot_s": seconds,
        "mean_app_s": (!loads.is_empty()).then(|| mean(&loads)), "app_s": loads,
        "images": (0..args.vms).map(|vm| boots[vm % boots.len()].image.as_str()).collect::<Vec<_>>(),
        "asked_bytes": (0..args.vms).map(|vm| boots[vm % boots.len()].bytes()).sum::<u64>(),
        "cached_bytes": cached, "read_bytes": read,
        "server_cpu_s": cpu as f64 / 1e9, "private_kib": private, "checked_reads": args.check * args.vms,
    }))
}

/// When each VM comes. One by one they come in order because a mutex is handed on in the order of arrival, nearly: so leave
/// them a millisecond.
fn arrivals(args: &Args) -> Vec<Duration> {
    let mut random = args.seed;
    let mut at = 0.0;
    let gap = if args.one_by_one { 1e-3 } else { args.interval };
    let mut next = |_| {
        let due = Duration::from_secs_f64(at);
        at += match args.poisson {
            true => -gap * (1.0 - unit(&mut random)).ln(),
            false => gap,
        };
        due
    };
    (0..args.vms).map(&mut next).collect()
}

/// A number in [0, 1), from SplitMix64.
fn unit(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
}
