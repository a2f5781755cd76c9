//! Why a map was refused.

use crate::error::{Error, ErrorKind};
use std::fmt;
use std::path::Path;

/// What kind of refusal, as far as code may want to act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapErrorKind {
    /// The bytes do not start like a block map.
    NotAMap,
    /// A later version of the format.
    Newer,
    /// Bytes are missing or left over.
    Length,
    /// A checksum does not fit its bytes.
    Checksum,
    /// Checksums fit, but the content cannot be right.
    Broken,
}

/// A map was refused, whole; nothing of it may be used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapError {
    kind: MapErrorKind,
    what: String,
}

impl MapError {
    pub(super) fn new(kind: MapErrorKind, what: impl Into<String>) -> Self {
        MapError { kind, what: what.into() }
    }

    pub(super) fn broken(what: impl Into<String>) -> Self {
        MapError::new(MapErrorKind::Broken, what)
    }

    /// What kind of refusal.
    pub fn kind(&self) -> MapErrorKind {
        self.kind
    }

    /// The error of the file at `path`: names it, the cause and the mend.
    pub fn at(self, path: impl AsRef<Path>) -> Error {
        match self.kind {
            MapErrorKind::NotAMap => Error::file(ErrorKind::Corrupt, path, self)
                .mend("name a .map file; 'vmar library remap' makes those of a library anew"),
            MapErrorKind::Newer => {
                Error::file(ErrorKind::Unsupported, path, self).mend("use the newer vmar that wrote it")
            }
            MapErrorKind::Length | MapErrorKind::Checksum | MapErrorKind::Broken => {
                Error::file(ErrorKind::Corrupt, path, self)
                    .mend("make it anew with 'vmar library remap', or restore it from a copy of the library")
            }
        }
    }
}

impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for MapError {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operator_reads_file_cause_and_mend() {
        let err = MapError::new(MapErrorKind::Checksum, "the checksum of the entries is wrong").at("/l/maps/web.map");
        assert_eq!(
            err.to_string(),
            "/l/maps/web.map: the checksum of the entries is wrong; \
             make it anew with 'vmar library remap', or restore it from a copy of the library"
        );
        assert_eq!(err.kind(), ErrorKind::Corrupt);
    }
}
