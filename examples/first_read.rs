//! How long it takes from the start of a server until it has a disk to read from: to its socket, and to the first 4 KiB.
//!
//! ```sh
//! cargo run --release --example first_read -- 50 vmar serve --image NAME --overlay FILE --socket-path SOCKET
//! ```
//!
//! Starts the command so many times, one after the other, as whichever vhost-user-blk server it is (the word behind
//! `--socket-path` is the socket), connects libblkio, and reads one block from the middle of the disk.
#![allow(clippy::print_stdout)]

use blkio::{Blkio, ReqFlags};
use std::mem::MaybeUninit;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const BLOCK: usize = 4096;

/// How long a server may take.
const LIMIT: Duration = Duration::from_secs(10);

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let usage = "usage: first_read ROUNDS COMMAND [ARGUMENT ...] --socket-path SOCKET [ARGUMENT ...]";
    let [rounds, command @ ..] = &args[..] else { return Err(usage.into()) };
    let rounds: usize = rounds.parse().ok().filter(|n| *n > 0).ok_or(usage)?;
    let named = command.iter().position(|word| word == "--socket-path").and_then(|at| command.get(at + 1));
    let socket = PathBuf::from(named.ok_or(usage)?);
    let (mut sockets, mut reads) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        let _ = std::fs::remove_file(&socket);
        let began = Instant::now();
        let child = Command::new(&command[0]).args(&command[1..]).stdin(Stdio::null()).spawn()?;
        let mut server = Server(child);
        server.wait_for(&socket, began)?;
        sockets.push(began.elapsed());
        first_read(&socket)?;
        reads.push(began.elapsed());
    }
    println!("{:<22}{:>8}{:>8}{:>8}", format!("ms, {rounds} starts"), "median", "p95", "max");
    for (name, mut times) in [("start to socket", sockets), ("start to first read", reads)] {
        times.sort_unstable();
        let ms = |percent: usize| times[(times.len() - 1) * percent / 100].as_secs_f64() * 1e3;
        println!("{name:<22}{:>8.1}{:>8.1}{:>8.1}", ms(50), ms(95), ms(100));
    }
    Ok(())
}

/// Ends the server when it is dropped.
struct Server(Child);

impl Server {
    fn wait_for(&mut self, socket: &Path, began: Instant) -> Result<()> {
        while !socket.exists() {
            if let Some(status) = self.0.try_wait()? {
                return Err(format!("the server ended: {status}").into());
            }
            if began.elapsed() > LIMIT {
                return Err(format!("no socket after {LIMIT:?}").into());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(pid) = i32::try_from(self.0.id()).ok().and_then(rustix::process::Pid::from_raw) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

fn first_read(socket: &Path) -> Result<()> {
    let mut client = Blkio::new("virtio-blk-vhost-user")?;
    client.set_bool("read-only", true)?;
    client.set_str("path", socket.to_str().ok_or("the socket's name is not UTF-8")?)?;
    client.connect()?;
    let middle = client.get_u64("capacity")? / 2 / BLOCK as u64 * BLOCK as u64;
    let mut queues = client.start()?.queues;
    let region = client.alloc_mem_region(BLOCK)?;
    client.map_mem_region(&region)?;
    let queue = &mut queues[0];
    queue.read(middle, region.addr as *mut u8, BLOCK, 0, ReqFlags::empty());
    let mut done = [MaybeUninit::uninit()];
    let mut limit = LIMIT;
    let n = queue.do_io(&mut done, 1, Some(&mut limit), None)?;
    // SAFETY: the completions that are told of are filled in.
    if n == 1 && unsafe { done[0].assume_init_ref() }.ret == 0 { Ok(()) } else { Err("the first read failed".into()) }
}
