//! The overlay file as a device: every write, fsync and punch of it goes through here and nowhere else, so that the
//! order of them can be recorded, and any of them be made to fail.

use crate::io::IoBuf;
use crate::io::file::{punch_hole, write_all_at};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// What changes the file or makes it durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(test), allow(dead_code))]
pub(super) enum Event {
    Write { at: u64, len: usize },
    SyncData,
    SyncAll,
    Punch { at: u64, len: u64 },
}

/// The open overlay file.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    #[cfg(test)]
    pub probe: probe::Probe,
}

impl Disk {
    pub fn new(file: File) -> Disk {
        Disk {
            file,
            #[cfg(test)]
            probe: probe::Probe::default(),
        }
    }

    pub fn file(&self) -> &File {
        &self.file
    }

    /// Called before each event; tests record it or make it fail.
    fn step(&self, _event: Event) -> io::Result<()> {
        #[cfg(test)]
        self.probe.step(_event)?;
        Ok(())
    }

    pub fn read(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, at)
    }

    pub fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        self.step(Event::Write { at, len: bytes.len() })?;
        self.file.write_all_at(bytes, at)
    }

    pub fn write_bufs(&self, bufs: &[IoBuf], at: u64) -> io::Result<()> {
        self.step(Event::Write { at, len: crate::io::buf::total_len(bufs) })?;
        write_all_at(&self.file, bufs, at)
    }

    pub fn sync_data(&self) -> io::Result<()> {
        self.step(Event::SyncData)?;
        self.file.sync_data()
    }

    pub fn sync_all(&self) -> io::Result<()> {
        self.step(Event::SyncAll)?;
        self.file.sync_all()
    }

    pub fn punch(&self, at: u64, len: u64) -> io::Result<()> {
        self.step(Event::Punch { at, len })?;
        punch_hole(&self.file, at, len)
    }
}

#[cfg(test)]
pub(super) mod probe {
    use super::Event;
    use std::io;
    use std::sync::Mutex;

    /// Records events and fails the one it is told to.
    #[derive(Debug, Default)]
    pub struct Probe {
        events: Mutex<Vec<Event>>,
        /// Fail the event that comes after this many others, with this errno.
        fail: Mutex<Option<(usize, i32)>>,
    }

    impl Probe {
        pub fn step(&self, event: Event) -> io::Result<()> {
            self.events.lock().unwrap().push(event);
            let mut fail = self.fail.lock().unwrap();
            match &mut *fail {
                Some((0, errno)) => {
                    let err = io::Error::from_raw_os_error(*errno);
                    *fail = None;
                    Err(err)
                }
                Some((n, _)) => {
                    *n -= 1;
                    Ok(())
                }
                None => Ok(()),
            }
        }

        /// The events since the last call.
        pub fn take(&self) -> Vec<Event> {
            std::mem::take(&mut self.events.lock().unwrap())
        }

        /// Makes the event after the next `skip` ones fail.
        pub fn fail_after(&self, skip: usize, errno: i32) {
            *self.fail.lock().unwrap() = Some((skip, errno));
        }
    }
}
