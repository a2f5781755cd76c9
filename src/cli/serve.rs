//! `vmar serve`: be a VM's disk.

use super::Common;
use super::overlay::default_state_dir;
use crate::daemon::control::{Control, ControlFile};
use crate::daemon::home::{Home, Opened};
use crate::daemon::metrics::{self, Address};
use crate::daemon::socket::{Inherited, Listening, inherit};
use crate::daemon::take_over::TakeOver;
use crate::daemon::{Names, Options, QUEUES_MAX, Served, StopSignal, serve};
use crate::device::request::SERIAL_SIZE;
use crate::device::{Drive, Ledger, OnError, OverlayRecipe, Prefetch, Recipe};
use crate::error::{Error, ErrorKind, Result};
use crate::library::{ImageRecord, Library};
use crate::overlay::{self, BaseIdentity};
use crate::redirect::prefetch::Plan;
use crate::redirect::trace::TraceHeader;
use crate::redirect::{Current, Recorder};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// What QEMU's conventions for backend programs ask for (docs/interop/vhost-user.rst).
const CAPABILITIES: &str = r#"{"type":"block","features":["read-only","blk-file"]}"#;

/// Arguments of `vmar serve`.
#[derive(Debug, clap::Args)]
#[command(after_help = "QEMU's side:\n  \
    -object memory-backend-memfd,id=mem,size=1G,share=on -machine q35,memory-backend=mem\n  \
    -chardev socket,id=disk0,path=PATH -device vhost-user-blk-pci,chardev=disk0")]
pub struct Args {
    /// Image of the library to serve
    #[arg(long, value_name = "NAME", conflicts_with = "blk_file")]
    image: Option<String>,
    /// Copy-on-write overlay of that image ('vmar overlay create'); needed unless --read-only
    #[arg(long, value_name = "FILE", requires = "image")]
    overlay: Option<PathBuf>,
    /// Serve a raw file as it is, without a library; written in place unless --read-only
    #[arg(long, value_name = "FILE")]
    blk_file: Option<PathBuf>,
    /// Listen on this unix socket
    #[arg(long, value_name = "PATH", conflicts_with = "fd")]
    socket_path: Option<PathBuf>,
    /// Use this inherited unix socket, listening or connected
    #[arg(long, value_name = "N")]
    fd: Option<i32>,
    /// Take the place of the server with this control socket: it finishes what is in flight, closes the disk, passes its
    /// socket on and ends; a QEMU with reconnect= goes on without its guest noticing
    #[arg(long, value_name = "CONTROL_PATH", conflicts_with_all = ["socket_path", "fd", "incoming"])]
    take_over: Option<PathBuf>,
    /// Serve a control socket here, for its owner alone: 'vmar control PATH status', and JSON lines for programs
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Serve counters for Prometheus here, at /metrics: ADDRESS:PORT, such as 127.0.0.1:9100, or a unix socket for its owner
    /// alone
    #[arg(long, value_name = "ADDR")]
    metrics: Option<Address>,
    /// Print what this backend can do as JSON, and exit
    #[arg(long)]
    print_capabilities: bool,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Queues to offer; a VM uses as many of them as it has CPUs, and only those cost a thread
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUES_MAX)))]
    num_queues: u16,
    /// Bytes of the image to read ahead of a guest that reads in sequence, along the map; 0: none
    #[arg(long, value_name = "N[K|M]", default_value = "1M", requires = "image", value_parser = parse_readahead)]
    readahead: u64,
    /// Write the trace of base reads to this file
    #[arg(long, value_name = "FILE", requires = "image")]
    record: Option<PathBuf>,
    /// Bring what this trace tells of ('--record') into the host's page cache, ahead of the guest and behind its own reads, as
    /// far as this image's map reaches it: traces of other images serve, too. May be given several times
    #[arg(long, value_name = "FILE", conflicts_with = "blk_file")]
    prefetch: Vec<PathBuf>,
    /// Bytes that the prefetch may read
    #[arg(long, value_name = "N[K|M|G]", default_value = "256M", requires = "prefetch", value_parser = super::overlay::parse_size)]
    prefetch_limit: u64,
    /// Directory on tmpfs for the overlay's live state [default: /run/vmar, or below XDG_RUNTIME_DIR]
    #[arg(long, value_name = "DIR", env = "VMAR_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// When the host's disk is full or fails: 'report' it to the guest, or 'retry' reads, writes, discards and
    /// write-zeroes until they work, while the guest waits. Never flushes: Linux drops what one that failed was to save.
    /// (vhost-user has no werror; QEMU cannot pause the VM.)
    #[arg(long, value_name = "POLICY", default_value = "report", value_parser = ["report", "retry"])]
    on_error: String,
    /// How long a queue that has to stop waits for requests in flight; QEMU's monitor and the guest wait with it
    #[arg(long, value_name = "SECONDS", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=3600))]
    drain_timeout: u32,
    /// Wait for a VM that is migrated here: the disk stays closed and unlocked until the VM starts, as its old server still
    /// has it
    #[arg(long)]
    incoming: bool,
    /// Open an overlay whose live state is lost; writes that were not flushed are given up
    #[arg(long, requires = "overlay")]
    discard_unflushed: bool,
}

/// Runs the verb.
pub fn run(common: &Common, args: Args) -> Result<()> {
    if args.print_capabilities {
        println!("{CAPABILITIES}");
        return Ok(());
    }
    let place = place(&args)?;
    // From here on SIGTERM means: finish, flush, close.
    let stop = StopSignal::install()?;
    crate::redirect::reader::Reader::probe()?;
    let (drive, home, plan) = open_drive(common, &args)?;
    let names = Names { image: args.image.clone(), overlay: args.overlay.clone(), blk_file: args.blk_file.clone() };
    let prefetch = start_prefetch(&args, plan, &drive);
    let served = Arc::new(Served { home, prefetch, ..Served::new(drive, names)? });
    let options = options(&args);
    let ended = match start(&args, &place, &served, &options) {
        // The file of the control socket goes with this.
        Ok((endpoint, _control)) => serve(&served, endpoint, &options, &stop),
        Err(e) => {
            // Nobody was served, so the overlay is left as it was found.
            if let Err(close) = served.drive.close() {
                log::error!("{close}");
            }
            Err(e)
        }
    };
    // Others may hold on to what is served to the end of the process.
    served.home.iter().for_each(|home| home.end());
    ended
}

/// Begins the prefetch. Without one the guest reads what it reads, so nothing that is wrong with it is a reason not to serve.
fn start_prefetch(args: &Args, plan: Option<Plan>, drive: &Drive) -> Option<Prefetch> {
    let started = Prefetch::start(plan?, drive.image()?, Arc::clone(drive.ledger()), args.prefetch_limit);
    started.inspect_err(|e| log::warn!("{e}")).ok()
}

/// Where the vhost-user socket comes from.
enum Place {
    Path(PathBuf),
    Descriptor(i32),
    Server(PathBuf),
}

fn place(args: &Args) -> Result<Place> {
    let inherited = args.fd.or_else(systemd_fd);
    match (&args.socket_path, &args.take_over, inherited) {
        (Some(path), ..) => Ok(Place::Path(path.clone())),
        (None, Some(path), _) => Ok(Place::Server(path.clone())),
        (None, None, Some(fd)) => Ok(Place::Descriptor(fd)),
        (None, None, None) => {
            Err(usage("no socket is named", "give --socket-path PATH, --fd N, or --take-over CONTROL_PATH"))
        }
    }
}

/// The one socket that systemd has for us (sd_listen_fds(3)).
fn systemd_fd() -> Option<i32> {
    let is = |name: &str, value: &str| std::env::var(name).is_ok_and(|v| v == value);
    (is("LISTEN_PID", &std::process::id().to_string()) && is("LISTEN_FDS", "1")).then_some(3)
}

/// Opens the sockets, the one of QEMU last: it may connect at once.
fn start(
    args: &Args,
    place: &Place,
    served: &Arc<Served>,
    options: &Options,
) -> Result<(Inherited, Option<ControlFile>)> {
    let control = |path: &PathBuf| Control::bind(path)?.start(Arc::clone(served), options);
    if let Place::Server(old) = place {
        let listening = take_over(old, served)?;
        // The guest has its disk; nothing may end this server now.
        let control = args
            .control
            .as_ref()
            .and_then(|path| control(path).inspect_err(|e| log::error!("there is no control socket: {e}")).ok());
        args.metrics.iter().for_each(|address| metrics::start_after(address, served));
        return Ok((Inherited::Listening(listening), control));
    }
    let control = args.control.as_ref().map(control).transpose()?;
    args.metrics.as_ref().map(|address| metrics::start(address, served)).transpose()?;
    let endpoint = match place {
        Place::Path(path) | Place::Server(path) => Inherited::Listening(Listening::bind(path)?),
        Place::Descriptor(fd) => inherit(*fd)?,
    };
    Ok((endpoint, control))
}

/// Takes the place of the server with this control socket: all is in order here, and its guest waits from now on.
fn take_over(old: &Path, served: &Served) -> Result<Listening> {
    let (over, listening) = TakeOver::ask(old)?;
    served.drive.activate()?;
    over.taken()?;
    listening.own_file();
    Ok(listening)
}

fn options(args: &Args) -> Options {
    Options { num_queues: args.num_queues, drain_time: Duration::from_secs(u64::from(args.drain_timeout)) }
}

fn parse_readahead(text: &str) -> std::result::Result<u64, String> {
    const MAX: u64 = 16 << 20;
    super::overlay::parse_size(text).and_then(|n| if n <= MAX { Ok(n) } else { Err("at most 16M".into()) })
}

fn usage(cause: &str, mend: &str) -> Error {
    Error::new(ErrorKind::Usage, "serve", cause).mend(mend)
}

/// The disk, open unless a migrated VM is waited for.
fn open_drive(common: &Common, args: &Args) -> Result<(Drive, Option<Arc<Home>>, Option<Plan>)> {
    let on_error = if args.on_error == OnError::Retry.name() { OnError::Retry } else { OnError::Report };
    let ledger = Arc::new(Ledger::new(on_error, args.num_queues));
    if let Some(file) = &args.blk_file {
        if !args.read_only
            && let Some(dir) = &common.library
        {
            refuse_library_image(dir, file)?;
        }
        let recipe = Recipe::File { path: file.clone(), read_only: args.read_only };
        let drive = Drive::new(recipe, serial(file.as_os_str().as_encoded_bytes(), None), ledger)?;
        if !args.incoming && args.take_over.is_none() {
            drive.activate()?;
        }
        return Ok((drive, None, None));
    }
    let Some(name) = &args.image else {
        return Err(usage(
            "no disk is named",
            "give --image NAME with --overlay FILE or --read-only, or --blk-file FILE",
        ));
    };
    if args.overlay.is_none() && !args.read_only {
        return Err(usage(
            "an image is never written",
            "give --overlay FILE (made by 'vmar overlay create') for the VM's writes, or --read-only",
        ));
    }
    let dir = common.library()?;
    // What the overlay was made on, if that is an older content of the image; what is wrong with it is told later.
    let made_on = args.overlay.as_ref().and_then(|file| overlay::base_of(file).ok()).map(|base| base.digest);
    let name = Library::open(dir)?.image_with(name, made_on.as_ref()).map(|r| r.name.clone())?;
    let Opened { mut base, library, record, home } = Home::open(dir, &name, args.control.as_deref())?;
    if let Some(file) = &args.overlay
        && let Err(e) = library.note_overlay(&record, file)
    {
        log::info!("the library does not know of this overlay: {e}");
    }
    base.set_readahead(args.readahead);
    // Before a trace is recorded, which may be to the same file.
    let plan = match args.prefetch.as_slice() {
        [] => None,
        traces => Some(Plan::load(traces, &library, &base)?),
    };
    let recipe = Recipe::Image { base: Current::new(base), overlay: overlay_recipe(args, &record) };
    let serial = serial(&record.digest, args.overlay.as_deref());
    let drive = Drive::new(recipe, serial, ledger)?;
    if !args.incoming && args.take_over.is_none() {
        drive.activate()?;
    }
    if let Some(path) = &args.record {
        let recorder = Recorder::create(path, &trace_header(&library, &record));
        // Nobody was served, so the overlay is left as it was found.
        drive.set_recorder(recorder.inspect_err(|_| drop(drive.close()))?);
    }
    Ok((drive, Some(home), plan))
}

fn overlay_recipe(args: &Args, record: &ImageRecord) -> Option<OverlayRecipe> {
    Some(OverlayRecipe {
        path: args.overlay.clone()?,
        state_dir: args.state_dir.clone().unwrap_or_else(default_state_dir),
        base: BaseIdentity { digest: record.digest, generation: record.generation, size: record.size },
        read_only: args.read_only,
        discard_unflushed: args.discard_unflushed,
    })
}

/// A raw image that a library maps must never be written. Its read-only mode says so too, see [`Base::flat`].
fn refuse_library_image(dir: &Path, file: &Path) -> Result<()> {
    let Ok(meta) = std::fs::metadata(file) else { return Ok(()) };
    let library = Library::open(dir)?;
    for record in library.images() {
        let same =
            std::fs::metadata(library.image_path(record)).is_ok_and(|m| (m.dev(), m.ino()) == (meta.dev(), meta.ino()));
        if same {
            let cause = format!("is image {} of library {}, which must not change", record.name, dir.display());
            return Err(Error::file(ErrorKind::Unsupported, file, cause)
                .mend(format!("use --image {} with --overlay, or --read-only", record.name)));
        }
    }
    Ok(())
}

/// A serial that stays the same as long as image and overlay do.
fn serial(image: &[u8], overlay: Option<&Path>) -> [u8; SERIAL_SIZE] {
    let mut hash = blake3::Hasher::new();
    hash.update(image);
    if let Some(path) = overlay {
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
        hash.update(path.as_os_str().as_encoded_bytes());
    }
    let text = format!("vmar-{}", hash.finalize().to_hex());
    let mut out = [0; SERIAL_SIZE];
    out.copy_from_slice(&text.as_bytes()[..SERIAL_SIZE]);
    out
}

fn trace_header(library: &Library, record: &ImageRecord) -> TraceHeader {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    TraceHeader {
        library: crate::codec::unhex(&library.catalog().uuid).unwrap_or_default(),
        image: record.id.0,
        generation: record.generation,
        digest: record.digest,
        start_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
    }
}
