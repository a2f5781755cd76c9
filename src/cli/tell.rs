//! Tells running servers that their block maps have changed.
//!
//! A server that is not told, or cannot change, stays right: images never change, and it keeps open what its old map points
//! to. So whatever fails here is a warning. But its lease goes on naming those images.

use super::control::{ask_by, reloaded};
use crate::daemon::control::DESCRIPTORS_MAX;
use crate::error::{Error, ErrorKind, Result};
use crate::io::Mapping;
use crate::io::file::raise_open_files;
use crate::library::{LeaseInfo, LeaseTarget, Library, Live, lease};
use crate::map::{Map, Target};
use serde_json::{Value, json};
use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

/// How long a server may take to accept and to read, and how often to knock.
const REACH_TIME: Duration = Duration::from_secs(2);
const KNOCK_PAUSE: Duration = Duration::from_millis(20);

/// How long it may take to open a map and its images: half a second an image that somebody has locked.
const ANSWER_TIME: Duration = Duration::from_secs(30);

/// A server that holds a lease, and what has come of telling it.
#[derive(Debug)]
pub struct Told {
    /// Its lease.
    pub lease: Live,
    /// What has come of it.
    pub outcome: Outcome,
}

/// What has come of telling a server.
#[derive(Debug)]
pub enum Outcome {
    /// It reads by the new map: its answer (see CONTROL.md).
    Reloaded(Value),
    /// There was nobody to tell, or nothing to tell; why.
    Left(String),
    /// It reads by the old map.
    Failed(Error),
}

/// Tells each server of this library that can be reached from here which map its image has now, and passes it the map and
/// all images that it points to: it may have no right to open them.
///
/// To be called after a commit and with the library's lock held ([`crate::library::Writer`]): a writer that came in between
/// could take away what was just passed. `library`: as it is since the commit.
///
/// # Errors
/// When the leases cannot be read. Nobody was told then, and every server goes on with the map that it has.
pub fn tell_servers(library: &Library) -> Result<Vec<Told>> {
    raise_open_files();
    let tell = |lease: Live| {
        let outcome = match &lease {
            Live::Unknown(_) => Outcome::Left("its lease makes no sense here".into()),
            Live::Known(info) => match (reach(library, info), &info.control) {
                (Ok(name), Some(control)) => {
                    tell_one(library, name, info, control).map_or_else(Outcome::Failed, Outcome::Reloaded)
                }
                (Ok(_), None) => Outcome::Left("it has no control socket ('vmar serve --control')".into()),
                (Err(why), _) => Outcome::Left(why),
            },
        };
        Told { lease, outcome }
    };
    Ok(lease::live(library.dir())?.into_iter().map(tell).collect())
}

/// [`tell_servers`] for a command that has done what it was to do: what fails is logged.
pub fn tell_and_warn(library: &Library) {
    match tell_servers(library) {
        Ok(told) => warn_of_the_rest(&told),
        Err(e) => log::warn!("servers are not told of the new maps: {e}"),
    }
}

/// Logs whom the change did not reach.
pub fn warn_of_the_rest(told: &[Told]) {
    for Told { lease, outcome } in told {
        match outcome {
            Outcome::Reloaded(answer) => log::info!("{lease}: {}", reloaded(answer)),
            Outcome::Left(why) => log::warn!("{lease} goes on with the map that it has: {why}"),
            Outcome::Failed(e) => log::warn!("{lease} goes on with the map that it has: {e}"),
        }
    }
}

/// The present name of the image that a server reads, or why it cannot be told.
fn reach<'l>(library: &'l Library, info: &LeaseInfo) -> std::result::Result<&'l str, String> {
    if !info.is_here() {
        return Err(format!("it runs on {}; 'vmar control PATH reload' there tells it", info.host));
    }
    let record = library.images().iter().find(|r| (r.id.0, r.generation) == (info.image_id, info.generation));
    record.map(|record| record.name.as_str()).ok_or_else(|| "the library has its image no more".into())
}

fn tell_one(library: &Library, name: &str, info: &LeaseInfo, control: &Path) -> Result<Value> {
    let path = library.map_path(name);
    let file = File::open(&path).map_err(|e| Error::io(&path, "open the block map", e))?;
    let mapping = Mapping::of(&file).map_err(|e| Error::io(&path, "open the block map", e))?;
    let map = Map::new(mapping).map_err(|e| e.at(&path))?;
    let mut targets: Vec<Target> = map.targets().map(|(target, _)| target).collect();
    if targets.len() >= DESCRIPTORS_MAX {
        // It has these open.
        targets.retain(|t| !info.targets.contains(&LeaseTarget { id: t.image.0, generation: t.generation }));
    }
    // Opened for this server alone: it takes locks on what it gets.
    let mut files = vec![file];
    let reader = library.image(name)?;
    for target in &targets {
        let record = library.image_by_id(target.image)?;
        library.check_may_read(reader, record, &path)?;
        files.push(library.open_image(record)?);
    }
    let named = |(at, t): (usize, &Target)| json!({"image": t.image.0, "generation": t.generation, "fd": at + 1});
    let named: Vec<Value> = targets.iter().enumerate().map(named).collect();
    let request = json!({"execute": "reload", "arguments": {"map": 0, "targets": named}});
    let fds: Vec<_> = files.iter().map(File::as_fd).collect();
    let stream = connect(control, ANSWER_TIME)?;
    ask_by(&stream, control, &request, &fds)
}

/// Connects, but not for ever: a server may be stopped, with others waiting before us.
pub(super) fn connect(path: &Path, answer_time: Duration) -> Result<UnixStream> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let failed = |e: std::io::Error| Error::io(path, "reach the server", e);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(|e| failed(e.into()))?;
    let address = SocketAddrUnix::new(path).map_err(|e| failed(e.into()))?;
    let deadline = Instant::now() + REACH_TIME;
    loop {
        match connect(&socket, &address) {
            Ok(()) => break,
            Err(rustix::io::Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(KNOCK_PAUSE),
            Err(rustix::io::Errno::AGAIN) => {
                return Err(
                    Error::file(ErrorKind::Busy, path, "the server does not answer").mend("see whether it hangs")
                );
            }
            Err(e) => return Err(failed(e.into())),
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false).map_err(failed)?;
    stream.set_write_timeout(Some(REACH_TIME)).map_err(failed)?;
    stream.set_read_timeout(Some(answer_time)).map_err(failed)?;
    Ok(stream)
}
