//! A machine as the migration engine's source.

use crate::description::Description;
use crate::error::Error;
use crate::guest::{self, When};
use crate::machine::Machine;
use crate::vcpu::outcome::{Crash, Outcome};
use migration::Failure;
use migration::dirty::DirtySet;
use migration::machine::{Arbiter, SourceMachine, Throttle};
use migration::memory::Ram;
use std::sync::Arc;
use std::time::Duration;

impl Machine {
    /// Whether there is a guest to move. One that KVM could not run on is moved as it stands: the
    /// destination may know how to go on where this host did not.
    fn movable(&self) -> Result<(), Error> {
        match self.outcome() {
            None => Ok(()),
            Some(Outcome::Crashed(Crash::Emulation { .. } | Crash::Internal { .. })) => Ok(()),
            Some(Outcome::Stopped) => Err(Error::Stopped),
            Some(outcome) => Err(Error::Ended(outcome)),
        }
    }
}

/// What either side's part of a switchover takes. Blackouts with nothing left to send were measured at 1.4 ms
/// with one vCPU, 1.7 ms with two and 3.3 ms with eight, and at twice that on a slow host.
pub(crate) fn half_a_handover(vcpus: u32) -> Duration {
    Duration::from_micros(1500) + Duration::from_micros(250) * vcpus
}

impl SourceMachine for Machine {
    fn ram(&self) -> Arc<Ram> {
        self.memory().ram().clone()
    }

    fn describe(&self) -> Result<Vec<u8>, Failure> {
        self.movable()?;
        Ok(Description::of(self).encode()?)
    }

    fn start_tracking(&self) -> Result<(), Failure> {
        Ok(self.tracking.start().map_err(Error::from)?)
    }

    fn stop_tracking(&self) -> Result<(), Failure> {
        Ok(self.tracking.stop().map_err(Error::from)?)
    }

    fn collect_dirty(&self, set: &mut DirtySet) -> Result<(), Failure> {
        Ok(self.tracking.collect(set).map_err(Error::from)?)
    }

    fn clear_dirty(&self, region: usize, first_page: u64, words: &[u64]) -> Result<(), Failure> {
        Ok(self.tracking.clear(region, first_page, words).map_err(Error::from)?)
    }

    fn pause(&self) -> Result<(), Failure> {
        self.pause_to_move()?;
        // A guest may have ended while its last round was under way.
        Ok(self.movable()?)
    }

    fn resume(&self) -> Result<(), Failure> {
        match self.resume_after_move() {
            // Nothing is left to run, which is no failure of the migration's.
            Err(Error::Ended(_)) => Ok(()),
            result => Ok(result?),
        }
    }

    fn save(&self) -> Result<Vec<u8>, Failure> {
        Ok(Machine::save(self)?)
    }

    fn handover_estimate(&self) -> Option<Duration> {
        Some(half_a_handover(self.config().vcpus))
    }

    fn throttle(&self, limit: Option<Throttle>) -> Result<(), Failure> {
        Ok(Machine::throttle(self, limit)?)
    }

    fn throttled(&self) -> Vec<Duration> {
        Machine::throttled(self)
    }

    fn arbiter(&self) -> Option<&dyn Arbiter> {
        Some(self)
    }

    fn before_pause(&self) {
        // What is durable before the pause need not be made so during it.
        self.shared.devices.flush_disks();
        guest::set_phase(self, When::During);
    }
}

/// The locks of all disks. Of one that cannot decide anything, such as a local block device, what was written
/// is made durable all the same, and it is given up with the others.
impl Arbiter for Machine {
    fn decides(&self) -> bool {
        self.disk_locks_decide()
    }

    fn release(&self) -> Result<(), Failure> {
        Ok(self.release_disk_locks()?)
    }

    fn take(&self) -> Result<(), Failure> {
        Ok(self.take_disk_locks()?)
    }
}
