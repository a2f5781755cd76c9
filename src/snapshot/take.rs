//! The instant of a snapshot: the VM is stopped, QEMU writes it to a socket, its disks are looked at, and it goes on.

use super::file::Run;
use super::keep::check;
use super::known::Known;
use super::place::Care;
use super::private::PrivateDir;
use super::save::{DiskOf, Options};
use super::spool::{Spool, Vm};
use crate::error::{Error, ErrorKind, Result};
use crate::migrate::monitor::{Monitor, Settings};
use crate::store::Digest;
use crate::units::is_zero;
use memmap2::Mmap;
use rustix::fs::{Mode, OFlags, open};
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

/// How long QEMU may take until it connects, until it says another byte, and until it says that it has ended.
const PATIENCE: Duration = Duration::from_secs(60);
/// How often it is looked whether all is well while nothing comes.
const LOOK: Duration = Duration::from_millis(100);

/// A VM and its disks, as they stood at one instant.
#[derive(Debug)]
pub struct Taken {
    /// The VM.
    pub vm: Vm,
    /// The disks, in the order of the options.
    pub disks: Vec<TakenDisk>,
    /// Content of the blocks that the stores do not have.
    pub spooled: Option<Mmap>,
    /// It ran before.
    pub ran: bool,
    /// How long it stood still.
    pub stood: Duration,
}

/// What an overlay held.
#[derive(Debug, Default)]
pub struct TakenDisk {
    /// Which blocks.
    pub runs: Vec<Run>,
    /// Those with data, in order.
    pub blocks: Vec<Block>,
    /// Whether the guest had its write cache switched on.
    pub write_cache: bool,
}

/// A block with data.
#[derive(Clone, Copy, Debug)]
pub enum Block {
    /// The stores have it.
    Known(Digest),
    /// The n-th of those that are spooled.
    Spooled(u64),
}

/// Stops the VM, takes it, and lets it go on.
///
/// # Errors
/// QEMU or a disk refuses, or `stop` was set. The VM goes on if it ran.
pub fn take(monitor: &mut Monitor, options: &Options<'_>, known: &Known, stop: &AtomicBool) -> Result<Taken> {
    let mut standing = Standing::begin(monitor)?;
    let began = Instant::now();
    let taken = standing.take(options, known, stop);
    let on = standing.end(options.stay_stopped && taken.is_ok());
    let (vm, disks, spooled) = taken?;
    on?;
    Ok(Taken { vm, disks, spooled, ran: standing.ran, stood: began.elapsed() })
}

/// A VM that stands still for us.
struct Standing<'a> {
    monitor: &'a mut Monitor,
    ran: bool,
    settings: Option<Settings>,
}

impl<'a> Standing<'a> {
    fn begin(monitor: &'a mut Monitor) -> Result<Standing<'a>> {
        let status = monitor.status()?;
        let ran = status == "running";
        if !ran && status != "paused" && status != "postmigrate" {
            let cause = format!("the VM is in state {status}");
            return Err(
                Error::new(ErrorKind::Usage, "QEMU", cause).mend("take a snapshot of a VM that runs, or is paused")
            );
        }
        let settings = monitor.plain()?;
        let mut standing = Standing { monitor, ran, settings: Some(settings) };
        if ran && let Err(e) = standing.monitor.stop() {
            standing.end(false)?;
            return Err(e);
        }
        Ok(standing)
    }

    fn take(
        &mut self,
        options: &Options<'_>,
        known: &Known,
        stop: &AtomicBool,
    ) -> Result<(Vm, Vec<TakenDisk>, Option<Mmap>)> {
        let door = Door::open(options.spool)?;
        self.monitor.migrate(door.path())?;
        let taken = self.receive(&door, options.spool, stop);
        let vm = taken.inspect_err(|_| drop(self.monitor.cancel()))?;
        let (disks, spooled) = look_at_disks(options.disks, options.spool, known, stop)?;
        Ok((vm, disks, spooled))
    }

    fn receive(&mut self, door: &Door, spool: &Path, stop: &AtomicBool) -> Result<Vm> {
        let mut stream = self.accept(door, stop)?;
        let set = stream.set_nonblocking(false).and_then(|()| stream.set_read_timeout(Some(LOOK)));
        set.map_err(|e| Error::io(door.path(), "use it", e))?;
        let (mut spool, mut buf, mut last) = (Spool::new(spool), vec![0; 1 << 20], Instant::now());
        loop {
            match stream.read(&mut buf) {
                Ok(0) => break,
                Ok(n) => {
                    spool.feed(buf.get(..n).unwrap_or_default())?;
                    last = Instant::now();
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                    self.look(last)?;
                }
                Err(e) => return Err(Error::io(door.path(), "read QEMU's migration", e)),
            }
            check(stop)?;
        }
        // All that it wrote is here: what is left is whether it thinks so, too.
        let ended = Instant::now();
        while self.look(ended)? {
            std::thread::sleep(Duration::from_millis(5));
        }
        spool.finish()
    }

    fn accept(&mut self, door: &Door, stop: &AtomicBool) -> Result<UnixStream> {
        let began = Instant::now();
        loop {
            match door.listener.accept() {
                Ok((stream, _)) => return Ok(stream),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.look(began)?;
                    std::thread::sleep(Duration::from_millis(2));
                }
                Err(e) => return Err(Error::io(door.path(), "wait for QEMU", e)),
            }
            check(stop)?;
        }
    }

    /// Whether QEMU still writes.
    fn look(&mut self, since: Instant) -> Result<bool> {
        let (status, why) = self.monitor.migration()?;
        match status.as_str() {
            "completed" => Ok(false),
            "failed" | "cancelled" | "cancelling" => {
                let cause = format!("QEMU cannot write this VM: {}", why.unwrap_or(status));
                Err(Error::new(ErrorKind::Unsupported, "snapshot", cause)
                    .mend("a device that cannot be migrated cannot be saved: take it away, or stop the VM instead"))
            }
            _ if since.elapsed() > PATIENCE => {
                let cause = format!("QEMU says nothing for {} s", PATIENCE.as_secs());
                Err(Error::new(ErrorKind::Io, "snapshot", cause).mend("see its log"))
            }
            _ => Ok(true),
        }
    }

    /// As it was. What went wrong before is told first, so that this is told only if nothing else is.
    fn end(&mut self, stay: bool) -> Result<()> {
        let restored = self.settings.take().map_or(Ok(()), |settings| self.restore(settings));
        let on = if self.ran && !stay { self.monitor.run() } else { Ok(()) };
        if let Err(e) = &on {
            log::error!("the VM stands still: {e}; say 'cont' to its monitor");
        }
        restored.and(on)
    }

    /// A migration that was cancelled takes a moment to end, and until then QEMU takes no settings.
    fn restore(&mut self, settings: Settings) -> Result<()> {
        let began = Instant::now();
        while matches!(
            self.monitor.migration()?.0.as_str(),
            "active" | "setup" | "cancelling" | "device" | "pre-switchover"
        ) && began.elapsed() < PATIENCE
        {
            std::thread::sleep(Duration::from_millis(5));
        }
        self.monitor.restore(settings)
    }
}

/// A socket that QEMU connects to, also as another user.
struct Door {
    dir: PrivateDir,
    listener: UnixListener,
}

impl Door {
    fn open(parent: &Path) -> Result<Door> {
        let dir = PrivateDir::create(parent)?;
        let listener = UnixListener::bind(dir.socket()).and_then(|listener| {
            fs::set_permissions(dir.socket(), fs::Permissions::from_mode(0o666))?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        });
        let listener = listener.map_err(|e| Error::io(dir.socket(), "make a socket", e))?;
        Ok(Door { dir, listener })
    }

    fn path(&self) -> &Path {
        self.dir.socket()
    }
}

/// Goes through the disks; what the stores do not have is spooled.
fn look_at_disks(
    disks: &[DiskOf<'_>],
    dir: &Path,
    known: &Known,
    stop: &AtomicBool,
) -> Result<(Vec<TakenDisk>, Option<Mmap>)> {
    if disks.is_empty() {
        return Ok((Vec::new(), None));
    }
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = open(dir, flags, Mode::RUSR | Mode::WUSR);
    let file = File::from(file.map_err(|e| Error::io(dir, "make a file in it", e.into()))?);
    let mut spool = BufWriter::with_capacity(1 << 20, file);
    let (mut spooled, mut out) = (0, Vec::new());
    for disk in disks {
        let mut taken = TakenDisk::default();
        taken.write_cache = disk.disk.look(true, &mut |number, page| {
            let page = page.filter(|page| !is_zero(&page[..]));
            taken.extend(number, page.is_some());
            let Some(page) = page else { return check(stop) };
            let hash = *blake3::hash(page).as_bytes();
            if known.find(&hash, Care::Critical).is_some() {
                taken.blocks.push(Block::Known(hash));
                return Ok(());
            }
            taken.blocks.push(Block::Spooled(spooled));
            spooled += 1;
            spool.write_all(page).map_err(|e| Error::io(dir, "keep changed blocks there for a while", e))
        })?;
        out.push(taken);
    }
    let file =
        spool.into_inner().map_err(|e| Error::io(dir, "keep changed blocks there for a while", e.into_error()))?;
    // SAFETY: the file has no name, so nobody else has it or can cut it; it is written no more.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(dir, "map a file in it", e));
    Ok((out, if spooled > 0 { Some(map?) } else { None }))
}

impl TakenDisk {
    fn extend(&mut self, block: u64, data: bool) {
        match self.runs.last_mut() {
            Some(run) if run.data == data && run.first + run.blocks == block => run.blocks += 1,
            _ => self.runs.push(Run { first: block, blocks: 1, data }),
        }
    }
}
