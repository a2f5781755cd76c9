//! `vmar migrate`: the two ends of a link over which a running VM moves.

use super::Common;
use super::moved::{Watch, tell};
use super::moving_disk::{self, Arriving};
use super::tls::{Link, TlsArgs, TlsSendArgs};
use crate::codec::hex;
use crate::error::{Error, ErrorKind, Result};
use crate::library::Library;
use crate::migrate::bases::{BaseFiles, Bases, CONTENTS_MAX};
use crate::migrate::disk::{Arrival, Departure};
use crate::migrate::kept::Stay;
use crate::migrate::known::{Has, Knows, Received, WINDOW};
use crate::migrate::link::{Line, Socket};
use crate::migrate::memory::Memory;
use crate::migrate::monitor::Monitor;
use crate::migrate::receive::{self, Host, Outcome};
use crate::migrate::record::{Coming, Leaving};
use crate::migrate::send::{self, Options};
use crate::migrate::stream::PAGE_SIZE;
use crate::migrate::template::Template;
use crate::migrate::wire::{Disk, Hello, Welcome};
use crate::migrate::work::Counts;
use crate::store::templates::TemplateFile;
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

/// Sharing domain of VMs of which nothing else is said: the first one of a new library is called so.
const DOMAIN: &str = "default";
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
    /// Sharing domain of the VM, whose templates are used [default: that of --image, or "default"]
    #[arg(long, value_name = "NAME")]
    domain: Option<String>,
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    disk: DiskArgs,
    /// Do not look for pages in base images
    #[arg(long)]
    no_base: bool,
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
    #[command(flatten)]
    store: StoreArgs,
    #[command(flatten)]
    disk: DiskArgs,
    /// Where it is written down that a VM has come
    #[arg(long, value_name = "DIR", default_value = "/var/lib/vmar/migrations")]
    records: PathBuf,
    #[command(flatten)]
    tls: TlsArgs,
}

/// What both sides remember of VMs that came and went.
#[derive(Debug, clap::Args)]
struct StoreArgs {
    /// Keep the memory of VMs that leave, for their return, and what is known of those that come; has the templates, too
    /// (made if it is not there)
    #[arg(long, value_name = "DIR")]
    store: Option<PathBuf>,
    /// Bytes that the store may have in kept memory; the oldest makes room
    #[arg(long, value_name = "N[K|M|G|T]", value_parser = super::overlay::parse_size, default_value = "20G", requires = "store")]
    budget: u64,
    /// Neither keep memory nor use what was kept
    #[arg(long, requires = "store")]
    no_kept: bool,
    /// Use no template
    #[arg(long, requires = "store")]
    no_template: bool,
}

/// The VM's disk, where the hosts share no storage.
#[derive(Debug, clap::Args)]
struct DiskArgs {
    /// The VM's disk goes with it: at the sender its overlay, at the receiver an empty one on the same image, which 'vmar serve
    /// --incoming' was given
    #[arg(long, value_name = "OVERLAY")]
    with_disk: Option<PathBuf>,
    /// Where the overlay's server has its live state
    #[arg(long, env = "VMAR_STATE_DIR", value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

impl DiskArgs {
    fn state_dir(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(super::overlay::default_state_dir)
    }

    fn leaving(&self) -> Result<Option<moving_disk::Leaving>> {
        self.with_disk.as_deref().map(|path| moving_disk::Leaving::open(path, &self.state_dir())).transpose()
    }

    /// Both sides have to want it: a VM whose disk stays behind is none.
    fn arriving(&self, offer: Option<&Disk>) -> Result<Option<Arriving>> {
        match (&self.with_disk, offer) {
            (None, None) => Ok(None),
            (Some(path), Some(offer)) => Arriving::open(path, &self.state_dir(), offer).map(Some),
            (None, Some(_)) => Err(one_sided("the sender's disk goes with the VM, and this side takes none", "here")),
            (Some(_), None) => {
                Err(one_sided("the sender's disk does not go with the VM, and is awaited here", "there"))
            }
        }
    }
}

fn one_sided(cause: &str, side: &str) -> Error {
    Error::new(ErrorKind::Usage, "--with-disk", cause).mend(format!("give --with-disk {side}, too, or on neither side"))
}

impl StoreArgs {
    fn open(&self) -> Result<Option<Memory>> {
        self.store.as_deref().map(|dir| Memory::open(dir, self.budget)).transpose()
    }
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
    let domain = match (&args.domain, &knows.bases) {
        (Some(domain), _) => domain.clone(),
        (None, Some(bases)) => bases.domain().to_string(),
        (None, None) => DOMAIN.to_string(),
    };
    if args.no_base {
        knows.bases = None;
    }
    let migration = identity()?;
    let record = Record::new(&args.records, &args.vm, &migration, "sent")?;
    let memory = args.store.open()?;
    let disk = args.disk.leaving()?;
    let (link, tunnel) = connect(&args.link, &args.tls)?;
    greet(args, &mut knows, memory.as_ref(), &domain, migration, disk.as_ref(), &link)?;
    let mut options = Options::default();
    if let Some(workers) = args.workers {
        options.workers = workers.max(1);
    }
    if args.no_intra {
        options.window = 0;
    }
    let mut departure = disk.as_ref().map(|disk| Departure::new(disk, &knows, options.window));
    if let Some(departure) = &mut departure {
        departure.begin(&Line { link: &link, writing: &Mutex::default() }, told_of_disk)?;
    }
    let listener = listen_unix(&args.source)?;
    eprintln!("vmar: ready for VM {}: say 'migrate unix:{}' to its QEMU", args.vm, args.source.display());
    let (source, _) = listener.accept().map_err(|e| Error::io(&args.source, "wait for QEMU", e))?;
    // One migration; the next one has its own.
    let _ = fs::remove_file(&args.source);
    let began = Instant::now();
    let keeps = memory.as_ref().filter(|_| !args.store.no_kept);
    let mut watch = Watch::new(keeps.map(|memory| Leaving::new(memory.spool_dir())));
    let host = Origin { record: &record, disk: departure.map(Mutex::new) };
    let moved = send::run(&Socket::Unix(source), &link, &knows, options, &mut watch, &host);
    let leaving = watch.end();
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
    if let (Some(memory), Some(leaving)) = (keeps, leaving) {
        let images = knows.bases.as_ref().map(|b| b.digests().to_vec()).unwrap_or_default();
        keep(memory, leaving, Stay { vm: &args.vm, domain: &domain, taken: now(), images });
    }
    if !moved.confirmed {
        let cause = "it belongs to the receiver, and the link broke before that said that it runs";
        return Err(Error::new(ErrorKind::Interrupted, format!("VM {}", args.vm), cause)
            .mend("if it does not run there, say 'cont' to its QEMU there; never run it here"));
    }
    Ok(())
}

/// Tells the receiver what this host would use, and leaves in `knows` what the receiver has of it.
fn greet(
    args: &SendArgs,
    knows: &mut Knows,
    memory: Option<&Memory>,
    domain: &str,
    migration: [u8; 16],
    disk: Option<&moving_disk::Leaving>,
    link: &Socket,
) -> Result<()> {
    let templates = match memory {
        Some(memory) if !args.store.no_template => memory.templates(domain),
        _ => Vec::new(),
    };
    let kept = memory.filter(|_| !args.store.no_kept).and_then(|memory| memory.remembered(&args.vm));
    let welcome = send::greet(
        link,
        Hello {
            migration,
            vm: args.vm.clone(),
            images: knows.bases.as_ref().map(|b| b.digests().to_vec()).unwrap_or_default(),
            kept: kept.as_ref().map(|kept| kept.root()),
            templates: templates.iter().map(|t| t.id.0).collect(),
            disk: disk.map(moving_disk::Leaving::offer),
        },
    )?;
    if let Some(bases) = &mut knows.bases {
        bases.set_there(&welcome.images);
    }
    knows.kept = kept.filter(|_| welcome.kept);
    let template = welcome.template.and_then(|n| templates.get(usize::from(n)));
    let open = |t: &TemplateFile| t.open().inspect_err(|e| log::warn!("the template is not used: {e}")).ok();
    knows.template = template.and_then(open).map(|pack| Template::new(&pack));
    let has = |is: bool| if is { "yes" } else { "no" };
    log::info!(
        "the receiver has {} of {} images, kept memory: {}, template: {}",
        welcome.images.iter().filter(|has| **has).count(),
        welcome.images.len(),
        has(knows.kept.is_some()),
        has(knows.template.is_some())
    );
    Ok(())
}

/// This host, which a VM leaves.
struct Origin<'a> {
    record: &'a Record,
    disk: Option<Mutex<Departure<'a, Knows>>>,
}

impl send::Origin for Origin<'_> {
    fn settle(&self, line: &Line<'_>) -> Result<()> {
        let Some(disk) = &self.disk else { return Ok(()) };
        let mut disk = disk.lock().unwrap_or_else(PoisonError::into_inner);
        disk.settle(line)?;
        if let Some(last) = disk.passes().last() {
            told_of_disk(disk.passes().len(), last);
        }
        Ok(())
    }

    fn commit(&self) -> Result<()> {
        self.record.write("moved")
    }
}

/// A pass over a disk that goes with its VM.
fn told_of_disk(pass: usize, counts: &Counts) {
    let (blocks, link) = (human_bytes(counts.pages() * PAGE_SIZE), human_bytes(counts.link_bytes));
    eprintln!("vmar: disk, pass {pass}: {blocks} went as {link}");
}

/// Keeps the memory of a VM that has left. It has left, whether that can be kept or not.
fn keep(memory: &Memory, leaving: Leaving, stay: Stay<'_>) {
    let vm = stay.vm.to_string();
    let kept = leaving.finish().and_then(|spool| spool.map(|spool| memory.keep(spool, stay)).transpose());
    match kept {
        Ok(None) => log::warn!("VM {vm}: its stream told of no memory; nothing is kept"),
        Ok(Some(evicted)) if evicted.contains(&vm) => {
            eprintln!("vmar: the memory of VM {vm} is larger than --budget, and is not kept");
        }
        Ok(Some(evicted)) => {
            for other in evicted {
                eprintln!("vmar: the memory of VM {other} had to make room (--budget)");
            }
        }
        Err(error) => eprintln!("vmar: the memory of VM {vm} is not kept for its return: {error}"),
    }
}

fn receive(common: &Common, args: &ReceiveArgs) -> Result<()> {
    let library = common.library.as_deref().map(Library::open).transpose()?;
    let memory = args.store.open()?;
    let mut monitor = args.qmp.as_deref().map(Monitor::connect).transpose()?;
    if let Some(monitor) = &mut monitor {
        monitor.prepare()?;
    }
    let (link, tunnel) = accept(&args.listen, &args.tls)?;
    let hello = receive::greeted(&link)?;
    let mut disk = args.disk.arriving(hello.disk.as_ref()).inspect_err(|e| receive::refuse(&link, e))?;
    let (has, mut welcome) = offer(args, &hello, library.as_ref(), memory.as_ref());
    welcome.disk = disk.is_some();
    let record = Record::new(&args.records, &hello.vm, &hello.migration, "received")?;
    let destination = connect_unix(&args.destination)?;
    receive::welcome(&link, welcome)?;
    let host = Here { record, monitor: Mutex::new(monitor) };
    let pages = Received::new(WINDOW, &has);
    let arrival = disk.as_mut().map(|disk| Arrival::new(disk, &has, WINDOW));
    let notes = memory.as_ref().filter(|_| !args.store.no_kept);
    let mut coming = notes.map(|_| Coming::default());
    let outcome = receive::run(&Socket::Unix(destination), &link, pages, coming.as_mut(), arrival, &host);
    // Before anything else can end this process: what was said last goes out.
    drop(tunnel);
    if let (Some(memory), Some(coming), false) = (notes, coming, matches!(outcome, Outcome::There(_))) {
        let noted =
            coming.finish().and_then(|hashes| hashes.map_or(Ok(()), |hashes| memory.note(&hello.vm, hashes, now())));
        if let Err(error) = noted {
            eprintln!("vmar: what VM {} left behind is not noted for its return: {error}", hello.vm);
        }
    }
    end(args, &hello, outcome)
}

/// What this host has of what a sender would use.
fn offer(args: &ReceiveArgs, hello: &Hello, library: Option<&Library>, memory: Option<&Memory>) -> (Has, Welcome) {
    let bases = library.map_or_else(BaseFiles::none, |library| BaseFiles::open(library, &hello.images));
    let mut images = bases.here();
    images.resize(hello.images.len(), false);
    let keeps = memory.filter(|_| !args.store.no_kept);
    let kept = keeps.zip(hello.kept).and_then(|(memory, root)| memory.kept(&hello.vm, &root, library));
    let template = memory.filter(|_| !args.store.no_template).and_then(|memory| memory.template(&hello.templates));
    let welcome = Welcome {
        images,
        kept: kept.is_some(),
        template: template.as_ref().and_then(|(place, _)| u8::try_from(*place).ok()),
        disk: false,
    };
    (Has { kept, bases, template: template.map(|(_, pack)| pack) }, welcome)
}

/// Says what became of the VM.
fn end(args: &ReceiveArgs, hello: &Hello, outcome: Outcome) -> Result<()> {
    let migration = hex(&hello.migration);
    match outcome {
        Outcome::Here => {
            let runs = if args.qmp.is_some() { " and runs" } else { "; say 'cont' to its QEMU" };
            println!("VM {} has arrived{runs}", hello.vm);
            Ok(())
        }
        Outcome::There(error) => Err(error),
        Outcome::Stopped(error) => {
            let cause = format!("it is this host's now, and could not be started: {error}");
            Err(Error::new(ErrorKind::Io, format!("VM {}", hello.vm), cause).mend("say 'cont' to its QEMU here"))
        }
        Outcome::Doubt(error) => {
            let mend = format!(
                "wait until 'vmar migrate send' has ended on the host that it left; if QEMU runs the VM there, 'quit' here; if not, and \
                 {}-{migration}.sent.json there has \"moved\", say 'cont' to QEMU here",
                hello.vm
            );
            let cause = format!("whose it is is not known: {error}");
            Err(Error::new(ErrorKind::Interrupted, format!("VM {}", hello.vm), cause).mend(mend))
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
        let at = now();
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

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
