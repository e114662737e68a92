//! What the engine asks of a machine on either side.
//!
//! These two traits are all that a VMM has to bring. The engine calls them from one thread (and
//! [`SourceMachine::clear_dirty`] from one thread per lane at once); none of them may block on
//! the peer.

use crate::dirty::DirtySet;
use crate::failure::Failure;
use crate::memory::{Ram, RegionLayout};
use std::sync::Arc;

/// A machine that is being moved away.
pub trait SourceMachine: Send + Sync {
    /// The guest's RAM.
    fn ram(&self) -> Arc<Ram>;

    /// Everything the destination needs to build the shadow machine, in the VMM's own encoding:
    /// devices, vCPUs, CPUID. Bounded by [`crate::message::MAX_DESCRIPTION`].
    fn describe(&self) -> Result<Vec<u8>, Failure>;

    /// Starts tracking writes, by the guest and by the VMM itself. From here on every page counts
    /// as dirty until [`clear_dirty`](Self::clear_dirty) has been called for it.
    fn start_tracking(&self) -> Result<(), Failure>;

    /// Stops tracking. A later [`start_tracking`](Self::start_tracking) begins afresh, so nothing
    /// that was cleared in a failed attempt is lost for the next.
    fn stop_tracking(&self) -> Result<(), Failure>;

    /// Adds to `set` every page written since it was last cleared.
    fn collect_dirty(&self, set: &mut DirtySet) -> Result<(), Failure>;

    /// Marks pages clean, just before their content is read, so that any later write shows again.
    /// Bit `b` of `words[w]` is page `first_page + 64 * w + b` of `region`; `first_page` is a
    /// multiple of 64.
    fn clear_dirty(&self, region: usize, first_page: u64, words: &[u64]) -> Result<(), Failure>;

    /// Stops all vCPUs and device activity. When it returns, RAM no longer changes.
    fn pause(&self) -> Result<(), Failure>;

    /// Lets a paused machine run on.
    fn resume(&self) -> Result<(), Failure>;

    /// The state of the paused machine: vCPUs, interrupt controllers, clocks, devices. Bounded by
    /// [`crate::message::MAX_STATE`].
    fn save(&self) -> Result<Vec<u8>, Failure>;

    /// Whether disks on shared storage can arbitrate who owns the guest.
    fn has_arbiter(&self) -> bool {
        false
    }

    /// Gives up the disk locks.
    fn release_disks(&self) -> Result<(), Failure> {
        Ok(())
    }

    /// Takes all disk locks back, or none. An error means that somebody else holds one, or has run the guest with
    /// them since they were given up: its disks are then newer than the memory here.
    fn take_disks(&self) -> Result<(), Failure> {
        Ok(())
    }

    /// Told just before the pause of the switchover, for a guest that records what it feels.
    fn switchover_begins(&self) {}
}

/// Builds shadow machines.
pub trait DestinationHost {
    /// The machine it builds.
    type Machine: DestinationMachine;

    /// Builds the machine that `description` asks for, with RAM laid out as `layout`, ready to be
    /// written to; refuses whatever could not run here.
    fn build(&mut self, description: &[u8], layout: &[RegionLayout]) -> Result<Self::Machine, Failure>;
}

/// A machine that is being taken in. Dropping it discards the guest.
pub trait DestinationMachine {
    /// The shadow RAM.
    fn ram(&self) -> Arc<Ram>;

    /// Restores what [`SourceMachine::save`] saved. All RAM is in place.
    fn load(&mut self, state: &[u8]) -> Result<(), Failure>;

    /// Takes all disk locks, or none. Once it has them all, whoever gave them up can tell, even when this
    /// machine and its process are gone.
    fn take_disks(&mut self) -> Result<(), Failure> {
        Ok(())
    }

    /// Runs the guest.
    fn run(&mut self) -> Result<(), Failure>;

    /// Tells the network where the guest is now.
    fn announce(&mut self) {}

    /// What the guest itself says of its move, as a JSON text, once it had time to notice; `None`
    /// when it keeps no such record. Called after the guest runs; may take up to a second.
    fn testimony(&mut self) -> Option<String> {
        None
    }
}
