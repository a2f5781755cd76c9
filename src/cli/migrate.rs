//! `vmar migrate`: the two ends of a link over which a running VM moves.

use super::Common;
use super::output::{Table, print_json};
use super::tls::{Link, TlsArgs, TlsSendArgs};
use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::library::Library;
use crate::migrate::bases::{BaseFiles, Bases, CONTENTS_MAX};
use crate::migrate::known::{Has, Knows, Received, WINDOW};
use crate::migrate::link::Socket;
use crate::migrate::monitor::Monitor;
use crate::migrate::receive::{self, Host, Outcome};
use crate::migrate::send::{self, Moved, Options};
use crate::migrate::wire::{Hello, Welcome};
use crate::migrate::work::Counts;
use crate::units::human_bytes;
use clap::Subcommand;
use serde_json::json;
use std::fs::{self, File};
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long a destination's QEMU may take until it listens.
const DESTINATION: Duration = Duration::from_secs(30);

/// Verbs of `vmar migrate`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// On the host that the VM leaves: takes QEMU's migration ('migrate unix:PATH'), sends what the receiver cannot rebuild
    Send(SendArgs),
    /// On the host that it goes to: rebuilds the migration for a QEMU that waits ('-incoming unix:PATH -S'), and runs the VM
    Receive(ReceiveArgs),
}

/// Arguments of `vmar migrate send`.
#[derive(Debug, clap::Args)]
pub struct SendArgs {
    /// Name of the VM, for logs and for what is written down about it
    #[arg(long)]
    vm: String,
    /// Where QEMU's migration is taken: then say 'migrate unix:PATH' to it, with the capability return-path on
    #[arg(long, value_name = "PATH")]
    source: PathBuf,
    /// The receiver: HOST:PORT, or unix:PATH
    #[arg(long, value_name = "ADDR")]
    link: String,
    /// The VM's base image: pages that this or another image of its sharing domain holds do not travel if the receiver has
    /// the image, too (needs --library)
    #[arg(long, value_name = "NAME")]
    image: Option<String>,
    /// Do not look for pages that were sent before in this migration
    #[arg(long)]
    no_intra: bool,
    /// Threads that hash, and threads that pack (default: one a processor)
    #[arg(long, value_name = "N")]
    workers: Option<usize>,
    /// Where it is written down, before anybody is told, that a VM has moved
    #[arg(long, value_name = "DIR", default_value = "/var/lib/vmar/migrations")]
    records: PathBuf,
    #[command(flatten)]
    tls: TlsSendArgs,
}

/// Arguments of `vmar migrate receive`.
#[derive(Debug, clap::Args)]
pub struct ReceiveArgs {
    /// Where the sender is waited for: ADDRESS:PORT, or unix:PATH
    #[arg(long, value_name = "ADDR")]
    listen: String,
    /// Where QEMU listens for its migration ('-incoming unix:PATH', and -S)
    #[arg(long, value_name = "PATH")]
    destination: PathBuf,
    /// QEMU's monitor (QMP), to switch its return path on, and to run the VM when it is this host's; nobody else may have the
    /// monitor meanwhile. Without it whoever started QEMU does both
    #[arg(long, value_name = "PATH")]
    qmp: Option<PathBuf>,
    /// Where it is written down that a VM has come
    #[arg(long, value_name = "DIR", default_value = "/var/lib/vmar/migrations")]
    records: PathBuf,
    #[command(flatten)]
    tls: TlsArgs,
}

/// Runs the verb.
pub fn run(common: &Common, verb: Verb) -> Result<()> {
    // A host or a QEMU that is gone is an error like any other: what becomes of the VM is still to be said.
    // SAFETY: SIG_IGN is a valid disposition, and nothing here relies on SIGPIPE.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    match verb {
        Verb::Send(args) => send(common, &args),
        Verb::Receive(args) => receive(common, &args),
    }
}

fn send(common: &Common, args: &SendArgs) -> Result<()> {
    let mut knows = Knows::default();
    if let Some(image) = &args.image {
        let library = Library::open(common.library()?)?;
        knows.bases = Some(Bases::load(&library, image, CONTENTS_MAX)?);
    }
    let migration = identity()?;
    let record = Record::new(&args.records, &args.vm, &migration, "sent")?;
    let (link, tunnel) = connect(&args.link, &args.tls)?;
    let images = knows.bases.as_ref().map(|b| b.digests().to_vec()).unwrap_or_default();
    let hello = Hello { migration, vm: args.vm.clone(), images, kept: None, template: None };
    let welcome = send::greet(&link, hello)?;
    if let Some(bases) = &mut knows.bases {
        bases.set_there(&welcome.images);
    }
    let listener = listen_unix(&args.source)?;
    eprintln!("vmar: ready for VM {}: say 'migrate unix:{}' to its QEMU", args.vm, args.source.display());
    let (source, _) = listener.accept().map_err(|e| Error::io(&args.source, "wait for QEMU", e))?;
    // One migration; the next one has its own.
    let _ = fs::remove_file(&args.source);
    let mut options = Options::default();
    if let Some(workers) = args.workers {
        options.workers = workers.max(1);
    }
    if args.no_intra {
        options.window = 0;
    }
    let began = Instant::now();
    let moved = send::run(&Socket::Unix(source), &link, &knows, options, &mut (), || record.write("moved"));
    let moved = moved.inspect_err(|_| {
        // Also when "moved" could be written and not be made durable: nobody must find that word there and run the VM elsewhere.
        if let Err(error) = record.write("stayed") {
            log::error!("the VM stays here, whatever its record says: {error}");
        }
    })?;
    let time = began.elapsed();
    // Before anything else can end this process: what was said last goes out.
    drop(tunnel);
    tell(common, &args.vm, &migration, &moved, time)?;
    if !moved.confirmed {
        let cause = "it belongs to the receiver, and the link broke before that said that it runs";
        return Err(Error::new(ErrorKind::Interrupted, format!("VM {}", args.vm), cause)
            .mend("if it does not run there, say 'cont' to its QEMU there; never run it here"));
    }
    Ok(())
}

fn receive(common: &Common, args: &ReceiveArgs) -> Result<()> {
    let library = common.library.as_deref().map(Library::open).transpose()?;
    let mut monitor = args.qmp.as_deref().map(Monitor::connect).transpose()?;
    if let Some(monitor) = &mut monitor {
        monitor.prepare()?;
    }
    let (link, tunnel) = accept(&args.listen, &args.tls)?;
    let hello = receive::greeted(&link)?;
    let bases = library.as_ref().map_or_else(BaseFiles::none, |library| BaseFiles::open(library, &hello.images));
    let mut images = bases.here();
    images.resize(hello.images.len(), false);
    let record = Record::new(&args.records, &hello.vm, &hello.migration, "received")?;
    let destination = connect_unix(&args.destination)?;
    receive::welcome(&link, Welcome { images, kept: false, template: false })?;
    let has = Has { kept: None, bases, template: None };
    let host = Here { record, monitor: Mutex::new(monitor) };
    let pages = Received::new(WINDOW, has);
    let migration = hex(&hello.migration);
    let outcome = receive::run(&Socket::Unix(destination), &link, pages, None, &host);
    // Before anything else can end this process: what was said last goes out.
    drop(tunnel);
    match outcome {
        Outcome::Here => {
            println!(
                "VM {} has arrived{}",
                hello.vm,
                if args.qmp.is_some() { " and runs" } else { "; say 'cont' to its QEMU" }
            );
            Ok(())
        }
        Outcome::There(error) => Err(error),
        Outcome::Stopped(error) => {
            let cause = format!("it is this host's now, and could not be started: {error}");
            Err(Error::new(ErrorKind::Io, format!("VM {}", hello.vm), cause).mend("say 'cont' to its QEMU here"))
        }
        Outcome::Doubt(error) => {
            let mend = format!(
                "look for {}-{migration}.sent.json with \"moved\" on the host that it left: if it is there, say 'cont' to QEMU here; \
                 if not, 'quit', and the VM runs there",
                hello.vm
            );
            Err(Error::new(
                ErrorKind::Interrupted,
                format!("VM {}", hello.vm),
                format!("whose it is is not known: {error}"),
            )
            .mend(mend))
        }
    }
}

/// This host, to which a VM comes.
struct Here {
    record: Record,
    monitor: Mutex<Option<Monitor>>,
}

impl Here {
    /// Of the monitor, if there is one.
    fn ask(&self, what: impl FnOnce(&mut Monitor) -> Result<()>) -> Result<()> {
        self.monitor.lock().unwrap_or_else(PoisonError::into_inner).as_mut().map_or(Ok(()), what)
    }
}

impl Host for Here {
    fn loaded(&self) -> Result<()> {
        self.ask(Monitor::check_stopped)
    }

    fn commit(&self) -> Result<()> {
        self.record.write("arrived")
    }

    fn start(&self) -> Result<()> {
        self.ask(Monitor::run)
    }
}

/// What a side writes down about a migration, in a file of its own.
struct Record {
    path: PathBuf,
    vm: String,
    migration: String,
}

impl Record {
    /// Makes sure that it can be written when it must be.
    fn new(dir: &Path, vm: &str, migration: &[u8; 16], side: &str) -> Result<Record> {
        crate::library::check_name(vm)?;
        fs::create_dir_all(dir).map_err(|e| Error::io(dir, "make it", e))?;
        let migration = hex(migration);
        let record = Record { path: dir.join(format!("{vm}-{migration}.{side}.json")), vm: vm.into(), migration };
        record.write("begun")?;
        Ok(record)
    }

    fn write(&self, state: &str) -> Result<()> {
        let at = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let text = json!({"format": "vmar-migration", "version": 1, "vm": self.vm, "migration": self.migration,
            "state": state, "at": at});
        let new = self.path.with_extension("new");
        let written = File::create(&new).and_then(|mut file| {
            writeln!(file, "{text}")?;
            file.sync_all()
        });
        written.map_err(|e| Error::io(&new, "write", e))?;
        fs::rename(&new, &self.path).map_err(|e| Error::io(&self.path, "write", e))?;
        crate::io::file::sync_dir(self.path.parent().unwrap_or(Path::new(".")))
    }
}

/// A name for a migration that no other has.
fn identity() -> Result<[u8; 16]> {
    let path = Path::new("/proc/sys/kernel/random/uuid");
    let text = fs::read_to_string(path).map_err(|e| Error::io(path, "read", e))?;
    crate::codec::unhex(&text.trim().replace('-', ""))
        .ok_or_else(|| Error::file(ErrorKind::Corrupt, path, "is no UUID"))
}

fn listen_unix(path: &Path) -> Result<UnixListener> {
    match UnixStream::connect(path) {
        Ok(_) => return Err(Error::file(ErrorKind::Busy, path, "somebody listens there").mend("name another path")),
        Err(e) if e.kind() == std::io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(|e| Error::io(path, "remove the old socket", e))?;
        }
        Err(_) => {}
    }
    UnixListener::bind(path).map_err(|e| Error::io(path, "listen there", e))
}

fn connect(address: &str, tls: &TlsSendArgs) -> Result<Link> {
    let over_tcp = tls.sender(address)?;
    let failed = |e| Error::io(address, "connect to the receiver", e);
    match address.strip_prefix("unix:") {
        Some(path) => Ok((Socket::Unix(UnixStream::connect(path).map_err(failed)?), None)),
        None => over_tcp(TcpStream::connect(address).map_err(failed)?),
    }
}

/// The destination's socket, which is there a moment after its QEMU was started.
fn connect_unix(path: &Path) -> Result<UnixStream> {
    let began = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(socket) => return Ok(socket),
            Err(e) if began.elapsed() > DESTINATION => {
                return Err(Error::io(path, "connect to the destination's QEMU", e));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn accept(address: &str, tls: &TlsArgs) -> Result<Link> {
    let over_tcp = tls.receiver(address)?;
    let failed = |e| Error::io(address, "wait there for the sender", e);
    match address.strip_prefix("unix:") {
        Some(path) => Ok((Socket::Unix(listen_unix(Path::new(path))?.accept().map_err(failed)?.0), None)),
        None => {
            let listener = TcpListener::bind(address).map_err(failed)?;
            if let Ok(bound) = listener.local_addr() {
                eprintln!("vmar: waits for a sender at {bound}");
            }
            over_tcp(listener.accept().map_err(failed)?.0)
        }
    }
}

fn tell(common: &Common, vm: &str, migration: &[u8; 16], moved: &Moved, time: Duration) -> Result<()> {
    let counts = &moved.counts;
    if common.json {
        return print_json(&json!({"vm": vm, "migration": hex(migration), "confirmed": moved.confirmed,
            "seconds": time.as_secs_f64(), "pages": counts}));
    }
    let Counts { zero, kept, base, template, intra, literal, stream_bytes, link_bytes } = *counts;
    let all = zero + kept + base + template + intra + literal;
    let mut table = Table::new(&["pages", "number", "share"], 1);
    for (name, n) in [
        ("zero", zero),
        ("in the kept image", kept),
        ("in base images", base),
        ("in the template", template),
        ("sent before", intra),
        ("sent", literal),
    ] {
        table.row(vec![name.into(), n.to_string(), super::output::percent(n, all)]);
    }
    table.print();
    println!(
        "{} of QEMU's stream went as {} ({}) in {:.1} s",
        human_bytes(stream_bytes),
        human_bytes(link_bytes),
        super::output::percent(link_bytes, stream_bytes),
        time.as_secs_f64()
    );
    Ok(())
}
