//! The one error type: a kind for code, one line for the operator, and the source for the log.
//!
//! The line names the file, the cause and the mend, in that order:
//! `web.map: checksum of the entries is wrong; rebuild it with 'vmar image verify web'`.

use std::fmt;
use std::path::Path;

/// What went wrong, as far as code may want to act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The command line or a parameter makes no sense (exit status 2).
    Usage,
    /// A file, image or library is not there.
    NotFound,
    /// Something of that name is there already.
    Exists,
    /// Another process holds it.
    Busy,
    /// Bytes that cannot be what they claim to be.
    Corrupt,
    /// A base image is not what was fingerprinted.
    Changed,
    /// A format, version or feature that vmar does not handle.
    Unsupported,
    /// The operator stopped it (Ctrl-C, SIGTERM).
    Interrupted,
    /// The operating system refused.
    Io,
}

/// An error that an operator can act on.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    subject: String,
    cause: String,
    mend: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

/// Result with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error about `subject`, usually a file name.
    pub fn new(kind: ErrorKind, subject: impl fmt::Display, cause: impl fmt::Display) -> Self {
        Error { kind, subject: subject.to_string(), cause: cause.to_string(), mend: None, source: None }
    }

    /// An operating-system error while doing `what` (an infinitive phrase: "read", "create") to `path`.
    pub fn io(path: impl AsRef<Path>, what: &str, err: std::io::Error) -> Self {
        let kind = match err.kind() {
            std::io::ErrorKind::NotFound => ErrorKind::NotFound,
            std::io::ErrorKind::AlreadyExists => ErrorKind::Exists,
            _ => ErrorKind::Io,
        };
        use std::io::ErrorKind as Kind;
        let mend = match err.kind() {
            Kind::StorageFull => Some("free some space on that file system and try again"),
            Kind::QuotaExceeded => Some("free some space or raise the quota, and try again"),
            Kind::NotFound | Kind::NotADirectory => Some("check the path"),
            Kind::PermissionDenied => Some("check owner and mode of it and of the directories above, or run as root"),
            Kind::ReadOnlyFilesystem => Some("mount it writable or use another place"),
            _ if err.raw_os_error() == Some(libc::EMFILE) => Some("raise the limit of open files (ulimit -n)"),
            _ => None,
        };
        Error {
            kind,
            subject: path.as_ref().display().to_string(),
            cause: format!("cannot {what}: {err}"),
            mend: mend.map(str::to_string),
            source: Some(Box::new(err)),
        }
    }

    /// An error about a file on disk.
    pub fn file(kind: ErrorKind, path: impl AsRef<Path>, cause: impl fmt::Display) -> Self {
        Error::new(kind, path.as_ref().display(), cause)
    }

    /// Says what the operator can do about it.
    #[must_use]
    pub fn mend(mut self, mend: impl fmt::Display) -> Self {
        self.mend = Some(mend.to_string());
        self
    }

    /// What went wrong, for code.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // A file name may hold a newline; the line that names it must stay one line.
        let line = match &self.mend {
            Some(mend) => format!("{}: {}; {}", self.subject, self.cause, mend),
            None => format!("{}: {}", self.subject, self.cause),
        };
        f.write_str(&line.replace(['\n', '\r'], " "))
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_ref().map(|s| s.as_ref() as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_with_file_cause_and_mend() {
        let err = Error::file(ErrorKind::Corrupt, "/l/maps/w\neb.map", "bad magic").mend("run X");
        assert_eq!(err.to_string(), "/l/maps/w eb.map: bad magic; run X");
    }

    #[test]
    fn a_full_disk_says_how_to_go_on() {
        let err = Error::io("f", "write", std::io::Error::from_raw_os_error(28));
        assert!(err.to_string().contains("free some space"), "{err}");
        assert_eq!(err.kind(), ErrorKind::Io);
    }
}
