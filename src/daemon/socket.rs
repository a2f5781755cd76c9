//! The listening socket: visible only once it accepts; a stale file is replaced, a live one refused.

use crate::error::{Error, ErrorKind, Result};
use rustix::fs::{FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// The longest path of a unix socket: `sun_path` less the terminating zero byte (unix(7)).
const PATH_MAX: usize = 107;

/// How long to wait for the lock on the socket's directory, and how often to try.
const LOCK_TIME: Duration = Duration::from_secs(3);
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// A listening socket, and the file to remove when we are done.
#[derive(Debug)]
pub struct Listening {
    listener: UnixListener,
    file: Option<SocketFile>,
    /// Somebody else uses the socket from now on, and its file.
    forgotten: AtomicBool,
}

#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

/// What `--fd N` turned out to be.
#[derive(Debug)]
pub enum Inherited {
    /// A listening socket, as a supervisor hands over.
    Listening(Listening),
    /// One connection, as libvirt hands over.
    Connected(UnixStream),
}

impl Listening {
    /// Listens on `path`.
    ///
    /// The socket is bound under a temporary name in the same directory and renamed once it listens, so whoever sees the
    /// file can connect. A lock on the directory keeps two starting servers from replacing each other.
    pub fn bind(path: &Path) -> Result<Self> {
        Self::bind_with(path, None)
    }

    /// The same, for a socket to which only its owner may connect.
    pub fn bind_private(path: &Path) -> Result<Self> {
        Self::bind_with(path, Some(Mode::RUSR | Mode::WUSR))
    }

    fn bind_with(path: &Path, mode: Option<Mode>) -> Result<Self> {
        let length = path.as_os_str().len();
        if length > PATH_MAX {
            return Err(Error::file(
                ErrorKind::Usage,
                path,
                format!("a socket path may have {PATH_MAX} bytes, this one has {length}"),
            )
            .mend("use a shorter path, such as one below /run"));
        }
        let (Some(name), dir) = (path.file_name(), path.parent().unwrap_or(Path::new("."))) else {
            return Err(Error::file(ErrorKind::Usage, path, "names no file"));
        };
        let dir = if dir.as_os_str().is_empty() { Path::new(".") } else { dir };
        let dirfd = rustix::fs::open(dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|e| Error::io(dir, "open the socket's directory", e.into()))?;
        lock_directory(dir, &dirfd)?;
        refuse_if_live(path)?;

        // Through /proc the temporary path is short whatever the directory is called.
        let temp = format!(".vmar-{}", std::process::id());
        let _ = rustix::fs::unlinkat(&dirfd, &temp, rustix::fs::AtFlags::empty());
        let listener = UnixListener::bind(format!("/proc/self/fd/{}/{temp}", dirfd.as_raw_fd()))
            .map_err(|e| Error::io(path, "listen", e))?;
        // Before the socket has its name: whoever knows where it will be cannot know this one.
        let limited =
            mode.map_or(Ok(()), |mode| rustix::fs::chmodat(&dirfd, &temp, mode, rustix::fs::AtFlags::empty()));
        let renamed =
            limited.and_then(|()| rustix::fs::renameat_with(&dirfd, &temp, &dirfd, name, RenameFlags::empty()));
        if let Err(e) = renamed {
            let _ = rustix::fs::unlinkat(&dirfd, &temp, rustix::fs::AtFlags::empty());
            return Err(Error::io(path, "listen", e.into()));
        }
        let meta = std::fs::symlink_metadata(path).map_err(|e| Error::io(path, "listen", e))?;
        let file = SocketFile { path: path.to_path_buf(), inode: (meta.dev(), meta.ino()) };
        Ok(Listening { listener, file: Some(file), forgotten: AtomicBool::new(false) })
    }

    /// A listening socket that another server has passed on, with the file that it listens on: the other's, until
    /// [`Listening::own_file`].
    ///
    /// # Errors
    /// When it is no listening unix socket.
    pub fn adopt(fd: OwnedFd, path: Option<PathBuf>) -> Result<Self> {
        if !rustix::net::sockopt::socket_acceptconn(&fd).unwrap_or(false) {
            return Err(Error::new(ErrorKind::Unsupported, "the socket that was handed over", "does not listen"));
        }
        let file = path.and_then(|path| {
            let meta = std::fs::symlink_metadata(&path).ok()?;
            Some(SocketFile { path, inode: (meta.dev(), meta.ino()) })
        });
        Ok(Listening { listener: UnixListener::from(fd), file, forgotten: AtomicBool::new(true) })
    }

    /// The file is ours now, to be removed at the end.
    pub fn own_file(&self) {
        self.forgotten.store(false, Ordering::Release);
    }

    /// The socket's file, if it is known.
    pub fn path(&self) -> Option<&Path> {
        self.file.as_ref().map(|file| file.path.as_path())
    }

    /// Makes [`Listening::accept`] never wait.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        self.listener.set_nonblocking(true)
    }

    /// Leaves the file alone from now on: it is gone, or another process's. With `remove`, removes it now.
    pub fn forget_file(&self, remove: bool) {
        if !self.forgotten.swap(true, Ordering::AcqRel) && remove {
            self.remove_file();
        }
    }

    /// Removes the socket file if it is still ours.
    fn remove_file(&self) {
        if let Some(file) = &self.file
            && let Ok(meta) = std::fs::symlink_metadata(&file.path)
            && (meta.dev(), meta.ino()) == file.inode
        {
            let _ = std::fs::remove_file(&file.path);
        }
    }

    /// Accepts a connection that poll announced; `None` when it has gone again.
    pub fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(e) => match e.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => Ok(None),
                _ => Err(e),
            },
        }
    }
}

impl AsFd for Listening {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.forget_file(true);
    }
}

/// Takes over the descriptor of `--fd`.
pub fn inherit(fd: i32) -> Result<Inherited> {
    let name = format!("--fd {fd}");
    let bad = |cause: String| Error::new(ErrorKind::Usage, &name, cause).mend("pass the number of an open unix socket");
    // SAFETY: fcntl on any number is harmless; it only asks whether the descriptor is open.
    if fd < 3 || unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
        return Err(bad("is not an open descriptor".into()));
    }
    // SAFETY: the descriptor is open, and whoever passed `--fd` gave it to us; nothing else in this process uses it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    match rustix::net::sockopt::socket_domain(&fd) {
        Ok(rustix::net::AddressFamily::UNIX) => {}
        Ok(_) => return Err(bad("is a socket, but no unix socket".into())),
        Err(_) => return Err(bad("is not a socket".into())),
    }
    let _ = rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::CLOEXEC);
    let listens = rustix::net::sockopt::socket_acceptconn(&fd).map_err(|e| bad(e.to_string()))?;
    Ok(if listens {
        Inherited::Listening(Listening {
            listener: UnixListener::from(fd),
            file: None,
            forgotten: AtomicBool::new(false),
        })
    } else {
        Inherited::Connected(UnixStream::from(fd))
    })
}

/// Fails if something at `path` answers, or is no socket at all; a socket that nobody answers is stale and may be replaced.
fn refuse_if_live(path: &Path) -> Result<()> {
    use std::os::unix::fs::FileTypeExt;
    let meta = match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(path, "look at", e)),
        Ok(meta) => meta,
    };
    if !meta.file_type().is_socket() {
        return Err(Error::file(ErrorKind::Exists, path, "is there already and is no socket")
            .mend("choose another socket path"));
    }
    match probe(path) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(()),
        // AGAIN: somebody listens and is too busy to accept.
        Ok(()) | Err(Errno::AGAIN) => {
            Err(Error::file(ErrorKind::Busy, path, "another server is listening on this socket")
                .mend("stop that server or choose another socket path"))
        }
        Err(Errno::PROTOTYPE) => {
            Err(Error::file(ErrorKind::Exists, path, "is a socket of another kind").mend("choose another socket path"))
        }
        Err(e) => Err(Error::io(path, "find out whether the socket is in use", e.into())),
    }
}

/// Connects without waiting: a listener whose backlog is full must not hold up our start.
fn probe(path: &Path) -> std::result::Result<(), Errno> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)
}

/// Keeps two starting servers apart. Somebody else may hold a lock on the directory for reasons of his own.
fn lock_directory(dir: &Path, fd: &OwnedFd) -> Result<()> {
    let deadline = Instant::now() + LOCK_TIME;
    loop {
        match rustix::fs::flock(fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => std::thread::sleep(LOCK_PAUSE),
            Err(Errno::WOULDBLOCK) => {
                return Err(Error::file(ErrorKind::Busy, dir, "another process keeps this directory locked (flock)")
                    .mend("wait for it or choose a socket path in another directory"));
            }
            Err(e) => return Err(Error::io(dir, "lock", e.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_live_socket_is_refused_and_a_stale_one_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let first = Listening::bind(&path).unwrap();
        assert_eq!(Listening::bind(&path).unwrap_err().kind(), ErrorKind::Busy);
        UnixStream::connect(&path).unwrap();
        drop(first);
        assert!(!path.exists(), "the socket file goes with the server");
        // A server that was killed leaves its file behind.
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let again = Listening::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(again);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_listener_too_busy_to_accept_is_live_and_holds_nobody_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        // SAFETY: listen on an open socket; only its backlog changes.
        assert_eq!(unsafe { libc::listen(listener.as_raw_fd(), 0) }, 0);
        let waiting: Vec<_> = std::iter::from_fn(|| probe(&path).ok()).take(100).collect();
        assert!(waiting.len() < 100, "the backlog fills up");
        assert_eq!(Listening::bind(&path).unwrap_err().kind(), ErrorKind::Busy);
    }

    #[test]
    fn a_directory_that_stays_locked_is_told_in_time() {
        let dir = tempfile::tempdir().unwrap();
        let lock = std::fs::File::open(dir.path()).unwrap();
        rustix::fs::flock(&lock, FlockOperation::LockExclusive).unwrap();
        let start = Instant::now();
        let err = Listening::bind(&dir.path().join("s")).unwrap_err();
        assert!(err.to_string().contains("flock"), "{err}");
        assert!(start.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn an_ordinary_file_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        std::fs::write(&path, "precious").unwrap();
        assert!(Listening::bind(&path).unwrap_err().to_string().contains("no socket"));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_path_of_107_bytes_works_and_108_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let room = PATH_MAX - dir.path().as_os_str().len() - 1;
        let longest = dir.path().join("s".repeat(room));
        let l = Listening::bind(&longest).unwrap();
        UnixStream::connect(&longest).unwrap();
        drop(l);
        let err = Listening::bind(&dir.path().join("s".repeat(room + 1))).unwrap_err();
        assert!(err.to_string().contains("107"), "{err}");
    }

    #[test]
    fn a_descriptor_that_is_no_socket_is_refused() {
        use std::os::fd::IntoRawFd;
        let file = tempfile::tempfile().unwrap().into_raw_fd();
        assert!(inherit(file).unwrap_err().to_string().contains("not a socket"));
        assert!(inherit(987).unwrap_err().to_string().contains("not an open descriptor"));
    }
}
