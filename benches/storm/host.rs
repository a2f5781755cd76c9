//! The host of the storm: overlays, servers with their limits, the page cache of the images.

use crate::Result;
use crate::args::{Args, Scheme};
use crate::boot::Boot;
use crate::guest::Guest;
use crate::server::Server;
use crate::throttle::Throttle;
use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use vmar::library::Library;

/// Everything that VMs have in common.
pub struct Host {
    library: Library,
    scheme: Scheme,
    vmar: PathBuf,
    qsd: PathBuf,
    serve: Vec<String>,
    prefetches: bool,
    rate: Option<Throttle>,
    memory: Option<Throttle>,
    dir: tempfile::TempDir,
    /// Live state of overlays: on tmpfs, as in real use.
    state: tempfile::TempDir,
}

impl Host {
    /// Makes the control groups and a directory.
    ///
    /// # Errors
    /// One line, if there is no such library, or limits cannot be had here.
    pub fn new(args: &Args) -> Result<Host> {
        let library = Library::open(&args.library).map_err(|e| e.to_string())?;
        let make = |below: &Path| {
            let made = tempfile::Builder::new().prefix("vmar-storm.").tempdir_in(below);
            made.map_err(|e| format!("{}: {e}: name another place with --dir", below.display()))
        };
        let tmpfs = Path::new("/dev/shm");
        // The disk that is slow is the one with the images.
        let place = library.images().first().map(|r| library.image_path(r)).ok_or("the library has no images")?;
        let rate = args.rate.filter(|_| args.scheme != Scheme::PreCopy);
        Ok(Host {
            scheme: args.scheme,
            vmar: std::env::var_os("VMAR_BIN").map_or_else(|| env!("CARGO_BIN_EXE_vmar").into(), PathBuf::from),
            qsd: args.qsd.clone(),
            serve: args.serve.clone(),
            prefetches: args.prefetch,
            rate: rate.map(|rate| Throttle::new(&place, rate)).transpose()?,
            memory: args.memory.map(Throttle::memory).transpose()?,
            dir: make(&args.dir)?,
            state: make(if tmpfs.is_dir() { tmpfs } else { &args.dir })?,
            library,
        })
    }

    /// The library.
    pub fn library(&self) -> &Library {
        &self.library
    }

    /// Makes the overlay of a VM, before the clock runs: those who boot many VMs have them at hand.
    pub fn prepare(&self, vm: usize, boot: &Boot) -> Result<()> {
        let overlay = self.overlay(vm);
        let mut command = match self.scheme {
            Scheme::PreCopy => return Ok(()),
            Scheme::OnDemand => {
                let mut command = Command::new("qemu-img");
                command.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&boot.raw).arg(&overlay);
                command
            }
            Scheme::Vmar => {
                let mut command = Command::new(&self.vmar);
                command.args(["overlay", "create", "--image", &boot.image, "--library"]);
                command.arg(self.library.dir()).arg(&overlay);
                command
            }
        };
        let program = command.get_program().to_string_lossy().into_owned();
        let out = command.output().map_err(|e| format!("{program}: {e}"))?;
        match out.status.success() {
            true => Ok(()),
            false => Err(format!("{program}: {}", String::from_utf8_lossy(&out.stderr).trim())),
        }
    }

    /// Starts the server of a VM and connects its guest.
    pub fn start(&self, vm: usize, boot: &Boot) -> Result<(Server, Guest)> {
        let socket = self.dir.path().join(format!("{vm}.sock"));
        let command = match self.scheme {
            Scheme::Vmar => {
                let mut command = Command::new(&self.vmar);
                command.args(["serve", "--image", &boot.image, "--library"]).arg(self.library.dir());
                command.arg("--overlay").arg(self.overlay(vm)).arg("--socket-path").arg(&socket);
                command.arg("--state-dir").arg(self.state.path()).args(&self.serve);
                if let Some(trace) = boot.trace.as_ref().filter(|_| self.prefetches) {
                    command.arg("--prefetch").arg(trace);
                }
                command
            }
            _ => self.qsd(vm, boot, &socket),
        };
        let limits: Vec<&Throttle> = self.rate.iter().chain(&self.memory).collect();
        let mut server = Server::start(&format!("VM {vm} ({})", boot.image), command, &socket, &limits)?;
        // A socket file can be there a moment before somebody listens.
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match Guest::connect(&socket, boot.longest()) {
                Ok(guest) => return Ok((server, guest)),
                Err(e) if Instant::now() > deadline => return Err(e),
                Err(_) => server.check_alive()?,
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn qsd(&self, vm: usize, boot: &Boot, socket: &Path) -> Command {
        // Commas in a value are doubled.
        let value = |path: &Path| path.to_string_lossy().replace(',', ",,");
        let file = |node: &str, path: &Path, read_only: &str| {
            format!("driver=file,node-name={node},filename={},aio=io_uring,read-only={read_only}", value(path))
        };
        let mut command = Command::new(&self.qsd);
        let mut arg = |name: &str, text: String| {
            command.arg(name).arg(OsString::from(text));
        };
        let node = if self.scheme == Scheme::PreCopy { "disk" } else { "base" };
        arg("--blockdev", file(node, &boot.raw, "on"));
        if self.scheme == Scheme::OnDemand {
            arg("--blockdev", file("own", &self.overlay(vm), "off"));
            arg("--blockdev", "driver=qcow2,node-name=disk,file=own,backing=base".into());
        }
        let writable = if self.scheme == Scheme::OnDemand { "on" } else { "off" };
        let export = "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix";
        arg("--export", format!("{export},addr.path={},writable={writable}", value(socket)));
        command
    }

    fn overlay(&self, vm: usize) -> PathBuf {
        self.dir.path().join(format!("{vm}.qcow2"))
    }

    /// The images and their maps, out of the page cache; nothing else.
    pub fn drop_caches(&self) -> Result<()> {
        let maps = self.library.images().iter().map(|r| self.library.map_path(&r.name));
        for path in self.images().into_iter().chain(maps) {
            let file = File::open(&path).map_err(|e| format!("{}: {e}", path.display()))?;
            // SAFETY: the call touches no memory of this process.
            unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
        }
        let left = self.cached_bytes()?;
        if left > 0 {
            eprintln!("storm: {} KiB of the images stay in the page cache; does another process use them?", left >> 10);
        }
        Ok(())
    }

    /// Bytes of all images of the library in the page cache: whatever a VM reads is in one of them.
    pub fn cached_bytes(&self) -> Result<u64> {
        self.images().iter().map(|path| cached(path).map_err(|e| format!("{}: {e}", path.display()))).sum()
    }

    fn images(&self) -> Vec<PathBuf> {
        self.library.images().iter().map(|r| self.library.image_path(r)).collect()
    }
}

/// Bytes of a file in the page cache (mincore).
fn cached(path: &Path) -> std::io::Result<u64> {
    const PAGE: usize = 4096;
    let file = File::open(path)?;
    let len = file.metadata()?.len() as usize;
    if len == 0 {
        return Ok(0);
    }
    let mut pages = vec![0u8; len.div_ceil(PAGE)];
    // SAFETY: a new mapping that nothing else knows of; it is only looked at by mincore, never read, and unmapped below.
    unsafe {
        let at = libc::mmap(std::ptr::null_mut(), len, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0);
        if at == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let code = libc::mincore(at, len, pages.as_mut_ptr());
        libc::munmap(at, len);
        if code != 0 {
            return Err(std::io::Error::last_os_error());
        }
    }
    Ok(pages.iter().filter(|page| **page & 1 != 0).count() as u64 * PAGE as u64)
}
