//! Stopping rings in bounded time, whatever the host's disk does.

use super::Handler;
use crate::daemon::let_go;
use crate::daemon::revoke::{map_again, revoke};
use crate::daemon::worker::{self, Stopped};
use crate::device::Late;
use std::io;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use vhost::vhost_user::{Error, Result};
use vm_memory::GuestAddressSpace;

/// How long the other rings may take when one ring could not stop in time and the memory of all must be revoked.
const OTHERS_TIME: Duration = Duration::from_millis(500);

impl Handler {
    /// Lets go of the disk when no ring runs any more: the VM may go on somewhere else.
    pub(super) fn rest(&mut self) {
        if self.rings.iter().any(|ring| ring.running) {
            return;
        }
        // The queue threads hold the disk.
        for ring in &mut self.rings {
            ring.worker = None;
        }
        // Whatever keeps it open is logged.
        let _ = let_go(&self.served, self.drain_time);
    }

    /// Stops the running rings that `which` names: nothing of them is in flight afterwards, as far as the guest can tell.
    ///
    /// QEMU waits for this, the guest and its monitor with it, so the time is bounded. What the kernel still holds then is
    /// given up as `late` says, after the memory that it lies in was revoked. That concerns all rings. A ring that the
    /// frontend stops gives back all its requests, late ones with an I/O error. If the connection or this server ends, the
    /// late ones stay in flight (in the inflight region, or by not being in the used ring, which is filled in order).
    pub(super) fn stop(&mut self, which: impl Fn(usize) -> bool, late: Late) -> Result<()> {
        if self.hung {
            return Err(hung());
        }
        let asked: Vec<usize> = (0..self.rings.len()).filter(|i| which(*i) && self.rings[*i].running).collect();
        let mut outcome = self.stop_until(&asked, Instant::now() + self.drain_time, late);
        if outcome.iter().any(|(_, stopped)| *stopped != Stopped::Drained) {
            let others: Vec<usize> =
                (0..self.rings.len()).filter(|i| self.rings[*i].running && !asked.contains(i)).collect();
            outcome.extend(self.stop_until(&others, Instant::now() + OTHERS_TIME, late));
            let freed = self.free_stuck(&outcome, late);
            // These run on as soon as the disk answers.
            for index in others {
                self.rings[index].running = true;
            }
            freed?;
        }
        for index in &asked {
            self.rings[*index].running = false;
        }
        if !asked.is_empty() {
            self.rest();
        }
        if outcome.len() > asked.len() { self.look_again() } else { Ok(()) }
    }

    fn stop_until(&self, rings: &[usize], deadline: Instant, late: Late) -> Vec<(usize, Stopped)> {
        let with_worker = || rings.iter().filter(|i| self.rings[**i].worker.is_some());
        let workers = with_worker().filter_map(|i| self.rings[*i].worker.as_ref());
        with_worker().copied().zip(worker::stop_all(workers, deadline, late)).collect()
    }

    /// Gives back to the guest what the kernel does not end. All rings have stopped.
    fn free_stuck(&mut self, outcome: &[(usize, Stopped)], late: Late) -> Result<()> {
        let current = self.memory.memory().into_inner();
        let mut maps: Vec<_> = self.old_maps.iter().filter_map(Weak::upgrade).collect();
        maps.push(Arc::clone(&current));
        let stuck: Vec<usize> =
            outcome.iter().filter(|(_, stopped)| *stopped != Stopped::Drained).map(|(index, _)| *index).collect();
        let requests: usize = outcome.iter().map(|(_, s)| if let Stopped::Stuck(n) = s { *n } else { 0 }).sum();
        let again = map_again(&current);
        if outcome.iter().any(|(_, stopped)| *stopped == Stopped::Hung) || again.is_err() {
            // SAFETY: all queue threads but those that hang have stopped. Should the kernel let one of them go before the
            // process has ended, a moment from now, it ends by SIGSEGV; that is as good as any kill.
            let revoked = unsafe { revoke(&maps) };
            return self.give_up(&stuck, again.and(revoked));
        }
        log::error!(
            "the host's disk holds {requests} requests for longer than --drain-timeout: {}. The disk stays open, and no \
             request is taken, until the kernel lets go of them",
            if late == Late::Fail { "the guest gets I/O errors for them" } else { "they are started again later" }
        );
        for index in &stuck {
            if let Some(worker) = self.rings[*index].worker.as_mut() {
                worker.abandon(late);
            }
        }
        // SAFETY: all queue threads have stopped, and have written the statuses of what they gave up. They and this thread
        // look up the rings in the map that is put in place now.
        if let Err(e) = unsafe { revoke(&maps) } {
            // The guest's memory must not change under it, so it never gets its requests back.
            return self.give_up(&stuck, Err(e));
        }
        self.replace_memory(again.map_err(Error::ReqHandlerError)?)?;
        for index in &stuck {
            if let Some(worker) = self.rings[*index].worker.as_ref() {
                worker.publish();
            }
        }
        Ok(())
    }

    /// Nobody can answer for what is in flight: the process has to end.
    fn give_up(&mut self, stuck: &[usize], revoked: io::Result<()>) -> Result<()> {
        self.hung = true;
        for index in stuck {
            if let Some(worker) = self.rings[*index].worker.as_mut() {
                worker.detach();
            }
        }
        log::error!(
            "the host's disk hangs, and a queue's thread with it: this server ends. Start it again when the disk answers; \
             requests in flight are as after a kill"
        );
        if let Err(e) = revoked {
            log::error!("cannot revoke the guest's memory: {e}");
        }
        Err(hung())
    }
}

fn hung() -> Error {
    Error::ReqHandlerError(io::Error::other("a queue's thread hangs in the kernel"))
}
