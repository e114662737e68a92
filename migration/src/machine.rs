//! What a VMM brings: a machine on either side.
//!
//! A VMM that wants its guests moved implements three traits. [`SourceMachine`] is a machine that is being
//! moved away. [`DestinationHost`] builds the machine that takes its place, the *shadow machine*, which is a
//! [`DestinationMachine`]. Guest memory is described to both sides as a [`Ram`]. Everything else, from the
//! rounds over memory to the decision who owns the guest, is the engine's. What is moved need not be a
//! virtual machine: any process that can be paused, saved, and told which of its pages were written will do.
//!
//! # What is called, and when
//!
//! At the source, [`source::Migration`](crate::source) makes these calls in this order:
//!
//! | step | calls | the guest |
//! |---|---|---|
//! | begin | [`ram`], [`describe`] | runs |
//! | pre-copy | [`start_tracking`]; in each round [`clear_dirty`] often and [`collect_dirty`] once | runs |
//! | switchover | [`before_pause`], [`pause`], [`save`], `collect_dirty`, [`release`] | stands still |
//! | hand-over | none: the message `Commit` leaves | stands still |
//!
//! The verdict tells what follows:
//!
//! | verdict | the engine's last calls | the VMM's turn |
//! |---|---|---|
//! | *moved* | none: it stays paused and tracked, without its locks | drop it, and never run it again |
//! | *stayed* | [`take`], [`resume`], as far as needed; [`stop_tracking`] | none; it may be moved again |
//! | *held* | none, or a `take` or a `resume` that failed | see [below](#leaving-held) |
//!
//! At the destination, [`destination::Migration`](crate::destination::Migration) makes these:
//!
//! | step | calls |
//! |---|---|
//! | begin | [`build`], `ram`, [`memory_is_zero`]; then data planes write to the memory |
//! | the state has come | data planes are shut out; [`load`] |
//! | `Commit` has come | [`take`], [`run`], [`announce`] |
//! | afterwards | [`after_run`], when the [`Arrival`] is concluded or dropped |
//!
//! [`ram`]: SourceMachine::ram
//! [`describe`]: SourceMachine::describe
//! [`start_tracking`]: SourceMachine::start_tracking
//! [`clear_dirty`]: SourceMachine::clear_dirty
//! [`collect_dirty`]: SourceMachine::collect_dirty
//! [`before_pause`]: SourceMachine::before_pause
//! [`pause`]: SourceMachine::pause
//! [`save`]: SourceMachine::save
//! [`release`]: Arbiter::release
//! [`take`]: Arbiter::take
//! [`resume`]: SourceMachine::resume
//! [`stop_tracking`]: SourceMachine::stop_tracking
//! [`build`]: DestinationHost::build
//! [`memory_is_zero`]: DestinationMachine::memory_is_zero
//! [`load`]: DestinationMachine::load
//! [`run`]: DestinationMachine::run
//! [`announce`]: DestinationMachine::announce
//! [`after_run`]: DestinationMachine::after_run
//! [`Arrival`]: crate::destination::Arrival
//!
//! If any of this fails before `run` has succeeded, the machine is *dropped*, and only then the source is
//! told: it runs its guest on that word. So dropping a `DestinationMachine` must end it for certain, even
//! where `run` has started some of its vCPUs, and must give its disk locks back. The host can then build the
//! next one.
//!
//! # Threads
//!
//! All calls come from the thread that has called `run` on the migration. There is one exception:
//! `clear_dirty` is called from one thread for each lane, all at once, each for pages of its own.
//! `collect_dirty`, `pause` and all others are called while no lane works. The guest and the VMM's own
//! threads run and write meanwhile, until `pause`.
//!
//! No call may wait for the peer. From `before_pause` on, time spent in a call is time in which the guest
//! stands still. Between the begin and the verdict nobody else may pause, resume or save the machine. A guest
//! that ends by itself is no trouble: `pause` or `save` says so by an error.
//!
//! # What may be called twice, or in vain
//!
//! - `resume` also comes after a `pause` that failed: some vCPUs may be stopped, or none.
//! - `stop_tracking` also comes when tracking was never started, or could not be.
//! - `start_tracking` after a failed migration begins afresh. The engine then sends all memory again.
//! - `Arbiter::take` also comes after a `release` that failed half-way. Having a lock already is as good as
//!   taking it.
//!
//! # Leaving held
//!
//! *Held* means that the guest was handed over and nobody could find out whether the destination runs it, or
//! that it could not be resumed here. The machine is paused, and its disk locks may be gone. It must not run
//! on before somebody has made sure that the destination does not run the guest: an operator, a cluster
//! manager that has fenced the other host, or the VMM by asking the destination. The engine takes no further
//! part. If the guest is lost at the destination, the VMM takes the locks and resumes the machine by its own
//! means. If it runs there, the VMM drops the machine.
//!
//! A machine with an [`Arbiter`] that [decides](Arbiter::decides) is rarely held: whoever gets all locks back
//! owns the guest.
//!
//! # One monitor for one migration
//!
//! A monitor ([`monitor::Monitor`](crate::monitor::Monitor) at the source,
//! [`destination::Monitor`](crate::destination::Monitor) at the destination) belongs to one attempt. It
//! starts its clock when it is made, and a cancellation stays for ever, so that one that comes before the
//! migration has begun is not lost. A second attempt takes a new one: at the source, one that is given a used
//! monitor fails with [`Code::BUSY`](crate::Code::BUSY) before it begins.
//!
//! # Errors and panics
//!
//! An error is a [`Failure`]: a code for programs and a sentence for people. It reaches the operators of both
//! sides, so it should say what is wrong and what to do. Any error before `Commit` leaves the guest running
//! at the source. A panic in a call counts as an error of that call, with one exception: if dropping a
//! `DestinationMachine` panics, the panic goes on to whoever has called `run`. The source is then not told
//! that the guest is gone, as nobody knows.

pub use crate::message::{MAX_DESCRIPTION, MAX_REMARKS, MAX_STATE, MAX_STATE_PART};

use crate::dirty::DirtySet;
use crate::failure::{Code, Failure};
use crate::memory::{Ram, RegionLayout};
use std::sync::Arc;
use std::time::Duration;

/// A machine that is being moved away. The [module](self) tells which call comes when, and from which thread.
pub trait SourceMachine: Send + Sync {
    /// The guest's RAM.
    fn ram(&self) -> Arc<Ram>;

    /// Everything the destination needs to build the shadow machine, in the VMM's own encoding:
    /// devices, vCPUs, CPUID. At most [`MAX_DESCRIPTION`] bytes.
    fn describe(&self) -> Result<Vec<u8>, Failure>;

    /// Starts tracking writes, by the guest and by the VMM itself. Every page that is written after this
    /// returns must show in a later [`collect_dirty`](Self::collect_dirty). Pages that were written before
    /// may show or not: the first round sends all of memory anyway.
    fn start_tracking(&self) -> Result<(), Failure>;

    /// Stops tracking. A later [`start_tracking`](Self::start_tracking) begins afresh, so nothing
    /// that was cleared in a failed attempt is lost for the next.
    fn stop_tracking(&self) -> Result<(), Failure>;

    /// Adds to `set` every page that was written since it was last cleared. Takes nothing out of `set`.
    ///
    /// There are two kinds of trackers, and both will do. One keeps its marks until
    /// [`clear_dirty`](Self::clear_dirty) takes them away. The other clears its marks *while* it collects, as
    /// most bitmaps in software do: then the engine has the only record, which it keeps, and `clear_dirty`
    /// stays the no-op that it is by default.
    ///
    /// **A tracker in software marks a page *after* it was written.** The engine takes a mark away and then
    /// reads the page. A mark that is made before the write can be taken away in between: the old content is
    /// read, the write comes, and nobody ever sends it. When [`pause`](Self::pause) has returned, all writes
    /// are marked.
    fn collect_dirty(&self, set: &mut DirtySet) -> Result<(), Failure>;

    /// Marks pages clean, just before their content is read, so that any later write shows again.
    /// Bit `b` of `words[w]` is page `first_page + 64 * w + b` of `region`; `first_page` is a
    /// multiple of 64. Called from several threads at once.
    ///
    /// By default nothing happens, which is right for a tracker that clears its marks while it collects. A
    /// tracker that keeps them has to implement this, or every round sends all that was ever written.
    fn clear_dirty(&self, _region: usize, _first_page: u64, _words: &[u64]) -> Result<(), Failure> {
        Ok(())
    }

    /// Told just before [`pause`](Self::pause), while the guest still runs: the place for work that would
    /// take longer in the blackout, such as a first flush of the disks. The blackout has not begun, but the
    /// guest's memory changes on while this takes its time: milliseconds are fine.
    fn before_pause(&self) {}

    /// Stops all vCPUs and device activity. When it returns, RAM no longer changes.
    fn pause(&self) -> Result<(), Failure>;

    /// Lets a paused machine run on.
    fn resume(&self) -> Result<(), Failure>;

    /// The state of the paused machine: vCPUs, interrupt controllers, clocks, devices. What saving itself
    /// writes to RAM has to show in the [`collect_dirty`](Self::collect_dirty) that follows. At most
    /// [`MAX_STATE`] bytes; what is over
    /// [`MAX_STATE_PART`] needs a destination that is not older than this
    /// engine.
    fn save(&self) -> Result<Vec<u8>, Failure>;

    /// How long this machine's part of a switchover takes beyond sending memory: pausing, saving, giving up
    /// its disk locks. Predictions of the blackout count it, so that the downtime limit holds. `None` if the
    /// VMM does not know; what the other side says is then taken for both. Asked when pre-copy begins.
    fn handover_estimate(&self) -> Option<Duration> {
        None
    }

    /// Keeps what the guest writes to a limit, for a migration under
    /// [`OnStall::Throttle`](crate::policy::OnStall::Throttle), by slowing whoever writes, and nobody who
    /// does not. `None` lets it run free again. Comes after a round, with another limit now and then; `None`
    /// comes once the machine is paused, and when the migration has failed. By default a machine cannot do
    /// that, and such a migration gives up where it would be asked for.
    fn throttle(&self, limit: Option<Throttle>) -> Result<(), Failure> {
        match limit {
            None => Ok(()),
            Some(_) => Err(Failure::new(Code::NOT_CONVERGING, "this machine cannot slow its guest")),
        }
    }

    /// How long each vCPU has stood still for that since it was first asked for: for the report.
    fn throttled(&self) -> Vec<Duration> {
        Vec::new()
    }

    /// The locks that have to be given up before the guest may run elsewhere; `None` if there are none.
    fn arbiter(&self) -> Option<&dyn Arbiter> {
        None
    }
}

/// What a guest may write while it is moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throttle {
    /// Bytes of pages that may become dirty in a second, by all vCPUs together.
    pub limit: u64,
    /// What became dirty in a second before there was a limit. A machine that cannot tell which vCPU writes
    /// how much is told by this how much too fast the guest is.
    pub dirty_rate: u64,
}

/// Builds shadow machines.
pub trait DestinationHost {
    /// The machine it builds.
    type Machine: DestinationMachine;

    /// Builds the machine that `description` asks for, with RAM laid out as `layout`, ready to be
    /// written to; refuses whatever could not run here. Both come from a peer: the layout has passed
    /// [`check_layout`](crate::memory::check_layout), the description is the VMM's to check.
    fn build(&mut self, description: &[u8], layout: &[RegionLayout]) -> Result<Self::Machine, Failure>;
}

/// A machine that is being taken in. Dropping it ends it and discards the guest, and gives back what
/// [`Arbiter::take`] took. The [module](self) tells which call comes when.
pub trait DestinationMachine {
    /// The shadow RAM.
    fn ram(&self) -> Arc<Ram>;

    /// Whether all of the RAM is zero when the machine is built.
    ///
    /// The source does not send pages that are zero, nor does it name them in its first round. So what
    /// [`build`](DestinationHost::build) leaves in memory (a firmware, a page of another guest) must be gone
    /// before data arrives. By default the engine sees to that: it reads each page that exists, and writes
    /// zeros over those that hold something else. That takes about a tenth of a second for each gibibyte that
    /// exists, and nothing where nothing does. A VMM that populates its memory, and knows that it has put
    /// nothing there, says so here and saves that time.
    fn memory_is_zero(&self) -> bool {
        false
    }

    /// Restores what [`SourceMachine::save`] saved. All RAM is in place. The bytes come from a peer.
    fn load(&mut self, state: &[u8]) -> Result<(), Failure>;

    /// The locks that have to be taken before the guest may run here; `None` if there are none.
    fn arbiter(&self) -> Option<&dyn Arbiter> {
        None
    }

    /// How long this machine's part of a switchover takes: loading a state, taking its disk locks, running.
    /// The source counts it in its predictions. `None` if the VMM does not know. Asked once it is built.
    fn handover_estimate(&self) -> Option<Duration> {
        None
    }

    /// Runs the guest.
    fn run(&mut self) -> Result<(), Failure>;

    /// Tells the network where the guest is now. Called at once after [`run`](Self::run).
    fn announce(&mut self) {}

    /// What there is to say of the move once the guest has run for a while, for the source's
    /// [report](crate::report::Report): a text of the VMM's own form, at most
    /// [`MAX_REMARKS`] bytes. May take up to a second; the guest runs meanwhile.
    fn after_run(&mut self) -> Option<String> {
        None
    }
}

/// Locks on shared storage, of which only one side can have all: whoever has them may run the guest.
///
/// The source gives them up before it hands the guest over, and the destination takes them before it runs the
/// guest. When the line is cut in between, they tell who owns the guest: a source that gets them all back
/// goes on.
pub trait Arbiter {
    /// Whether the locks can decide that. They can if the two sides see the same locks, and if a side that
    /// takes them can tell that the other side has had them since. One such lock is enough. If they cannot
    /// (each side has a disk of its own, say), they are given up and taken all the same, but a guest whose
    /// owner is not known is held.
    fn decides(&self) -> bool {
        true
    }

    /// Makes durable what was written, and gives up all locks. The machine is paused.
    ///
    /// # Errors
    /// When something cannot be made durable or given up. Some locks may be gone then: `take` follows.
    fn release(&self) -> Result<(), Failure>;

    /// Takes all locks, or none that was not held before. Once it has them all, whoever gave them up can
    /// tell, even when this machine and its process are gone.
    ///
    /// # Errors
    /// When somebody else holds one, or has run the guest with them since they were given up here: the disks
    /// are then newer than the memory.
    fn take(&self) -> Result<(), Failure>;
}
