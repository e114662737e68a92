//! The thread that does what neither vCPUs nor devices can: it resets the machine for its guest, and pauses
//! the guest while a disk has requests that this host cannot carry out.
//!
//! Such a guest is paused as by an operator, except that it goes on by itself. Its requests are tried again
//! now and then, and once none waits any more, the guest runs. An operator may pause it for good, let it run
//! (if nothing has changed it comes back here), or move it: the requests go along, and are tried there.

use super::Shared;
use super::reset::{self, Recent};
use crate::fatal::EndOnPanic;
use crate::lock::lock;
use crate::vcpu::control::{Duty, Phase};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// How often requests are tried again.
const RETRY: Duration = Duration::from_secs(1);

/// How long it waits for anything else.
const IDLE: Duration = Duration::from_secs(3600);

/// What a machine tells whoever has it, beside how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Notice {
    /// The guest has been reset, and boots again.
    Rebooted,
    /// The guest is paused, because a disk's requests cannot be carried out.
    DiskTrouble {
        /// Why not.
        why: String,
    },
    /// They were, and the guest runs again.
    DiskRecovered,
    /// By the two hosts' clocks, more time has passed since the guest was paused than the migration took. Its
    /// own clocks went on from where they stopped.
    ClockAhead {
        /// By the clocks.
        seemed: Duration,
        /// How long ago the migration began here.
        most: Duration,
    },
}

pub(super) fn supervise(shared: &Shared) {
    let _end = EndOnPanic;
    let mut recent = Recent::default();
    loop {
        let waits = shared.waits_for_disk.load(Ordering::Relaxed);
        let duty = shared.control.next_duty(if waits { RETRY } else { IDLE });
        // Nobody pauses, moves or resumes the machine meanwhile.
        let mut standing = lock(&shared.standing);
        match duty {
            Duty::End => return,
            Duty::Reset => reset::serve(shared, &mut recent),
            Duty::Alarm => {
                let Some(why) = shared.devices.trouble() else { continue };
                // One that is paused tries again when it is resumed.
                if shared.is_running() {
                    standing.interrupted = true;
                    shared.park();
                    shared.waits_for_disk.store(true, Ordering::Relaxed);
                    shared.tell(Notice::DiskTrouble { why });
                }
            }
            Duty::Look => {
                let here = shared.control.status() == (Phase::Paused, None) && !standing.engine_has_ram;
                let waits = shared.waits_for_disk.load(Ordering::Relaxed);
                if waits && here && shared.devices.retry().is_none() && shared.go_on(&standing).is_ok() {
                    shared.tell(Notice::DiskRecovered);
                }
            }
        }
    }
}
