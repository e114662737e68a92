//! Starting, pausing and ending vCPU threads.
//!
//! Every vCPU thread is either parked here or running its vCPU. To pause, the phase changes and
//! each thread gets a signal. A signal alone would be lost if it arrived just before the thread
//! enters KVM_RUN, so its [handler](super::kick) sets `immediate_exit` in the vCPU's shared page: a
//! KVM_RUN that starts afterwards comes straight back. The thread clears the flag only after KVM_RUN
//! has said EINTR and looks at the phase only after that, so that no order of the two loses a pause.
//!
//! A guest that asks for a reset parks all vCPUs as well, whatever the phase. Somebody else then does what
//! has to be done, and only while the machine runs: a reset that is due when the machine is paused waits
//! until it runs again, here or elsewhere.
//!
//! KVM_RUN says EINTR only once whatever the vCPU's last exit left unfinished (a port read whose
//! value must still reach a register) has been completed; so a parked vCPU has no I/O in flight,
//! and its registers are whole.

use super::kick::{self, Thread};
use super::outcome::Outcome;
use crate::lock::lock;
use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

/// What vCPU threads are to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Stay parked.
    Paused,
    /// Run.
    Running,
    /// End.
    Stopping,
}

struct Inner {
    phase: Phase,
    parked: usize,
    outcome: Option<Outcome>,
    /// The guest has asked for a reset that has not been done yet.
    reset: bool,
    /// A device has requests that must wait.
    alarm: bool,
    /// vCPUs that wait although the machine runs.
    held: BTreeSet<u8>,
}

/// What the machine's supervisor has to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duty {
    /// The guest waits for a reset, and the machine runs.
    Reset,
    /// A device has requests that must wait.
    Alarm,
    /// Nothing came for as long as it wanted to wait.
    Look,
    /// End.
    End,
}

impl Inner {
    fn is_reset_due(&self) -> bool {
        self.reset && self.phase == Phase::Running && self.outcome.is_none()
    }
}

/// Shared by a machine and its vCPU threads.
pub struct Control {
    inner: Mutex<Inner>,
    changed: Condvar,
    /// Whether a reset is one, and not the end.
    reboots: bool,
    threads: OnceLock<Vec<Thread>>,
}

impl Control {
    /// Nobody parked, nobody to run. A guest that asks for a reset gets it if the machine `reboots`;
    /// otherwise it has ended.
    pub fn new(reboots: bool) -> Self {
        let inner = Inner {
            phase: Phase::Paused,
            parked: 0,
            outcome: None,
            reset: false,
            alarm: false,
            held: BTreeSet::new(),
        };
        Control { inner: Mutex::new(inner), changed: Condvar::new(), reboots, threads: OnceLock::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.inner)
    }

    /// Names the threads to kick, which live until [`Phase::Stopping`] and are joined only after.
    pub fn set_threads(&self, threads: Vec<Thread>) {
        let _ = self.threads.set(threads);
    }

    /// The current phase and, if the guest ended, how.
    pub fn status(&self) -> (Phase, Option<Outcome>) {
        let inner = self.lock();
        (inner.phase, inner.outcome.clone())
    }

    /// In a vCPU thread: parks until the machine runs; false when the thread is to end.
    pub fn park(&self) -> bool {
        let mut inner = self.lock();
        inner.parked += 1;
        self.changed.notify_all();
        while inner.phase == Phase::Paused || inner.phase == Phase::Running && inner.reset {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.parked -= 1;
        inner.phase == Phase::Running
    }

    /// In the thread of vCPU `index` that was kicked: whether to go on running, once it is not held. `clear`
    /// resets `immediate_exit`.
    pub fn go_on(&self, index: u8, clear: impl FnOnce()) -> bool {
        // In this order: a kick that comes after the look must still be there for the next KVM_RUN.
        clear();
        let mut inner = self.lock();
        while inner.phase == Phase::Running && !inner.reset && inner.held.contains(&index) {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.phase == Phase::Running && !inner.reset
    }

    /// Has a vCPU wait although the machine runs, or lets it go on.
    pub fn hold(&self, index: u8, held: bool) {
        let mut inner = self.lock();
        if !held {
            if inner.held.remove(&index) {
                self.changed.notify_all();
            }
        } else if inner.held.insert(index)
            && let Some(thread) = self.threads.get().and_then(|threads| threads.get(usize::from(index)))
        {
            // SAFETY: as in `kick`: whoever holds vCPUs of a machine is joined before their threads are.
            unsafe { kick::kick(thread) };
        }
    }

    /// In a vCPU thread: the guest has ended, or asks for a reset. All vCPUs park.
    pub fn end(&self, outcome: Outcome) {
        if !self.reboots || !outcome.is_reset() {
            return self.finish(outcome);
        }
        self.lock().reset = true;
        self.changed.notify_all();
        self.kick();
    }

    /// The guest has ended. The first such report counts; all vCPUs park.
    pub fn finish(&self, outcome: Outcome) {
        let mut inner = self.lock();
        inner.outcome.get_or_insert(outcome);
        inner.reset = false;
        if inner.phase == Phase::Running {
            inner.phase = Phase::Paused;
        }
        self.changed.notify_all();
        drop(inner);
        self.kick();
    }

    /// Lets vCPUs run; the outcome if the guest has ended.
    pub fn resume(&self) -> Result<(), Outcome> {
        let mut inner = self.lock();
        if let Some(outcome) = &inner.outcome {
            return Err(outcome.clone());
        }
        inner.phase = Phase::Running;
        self.changed.notify_all();
        Ok(())
    }

    /// Parks all `vcpus` vCPUs and returns once they are.
    pub fn pause(&self, vcpus: usize) {
        let mut inner = self.lock();
        if inner.phase == Phase::Running {
            inner.phase = Phase::Paused;
            if !inner.held.is_empty() {
                // Who is held waits for a word, which a kick is not.
                self.changed.notify_all();
            }
        }
        if inner.parked < vcpus {
            self.kick();
        }
        while inner.phase == Phase::Paused && inner.parked < vcpus {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether the guest waits for a reset.
    pub fn awaits_reset(&self) -> bool {
        self.lock().reset
    }

    /// Says that the guest waits for a reset. False if resets are none here.
    pub fn set_reset(&self) -> bool {
        self.lock().reset = self.reboots;
        self.reboots
    }

    /// A device has requests that must wait.
    pub fn alarm(&self) {
        self.lock().alarm = true;
        self.changed.notify_all();
    }

    /// Waits until there is something to do, for at most `patience`.
    pub fn next_duty(&self, patience: std::time::Duration) -> Duty {
        let idle =
            |inner: &mut Inner| inner.phase != Phase::Stopping && !inner.is_reset_due() && !inner.alarm;
        let waited = self.changed.wait_timeout_while(self.lock(), patience, idle);
        let (mut inner, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &*inner {
            inner if inner.phase == Phase::Stopping => Duty::End,
            inner if inner.is_reset_due() => Duty::Reset,
            inner if !inner.alarm => Duty::Look,
            _ => {
                inner.alarm = false;
                Duty::Alarm
            }
        }
    }

    /// Waits until all `vcpus` vCPUs are parked for a reset. False if none is due any more. Nobody may pause
    /// the machine meanwhile.
    pub fn park_for_reset(&self, vcpus: usize) -> bool {
        let mut inner = self.lock();
        while inner.is_reset_due() && inner.parked < vcpus {
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
        inner.is_reset_due()
    }

    /// The reset is done: vCPUs go on.
    pub fn reset_done(&self) {
        self.lock().reset = false;
        self.changed.notify_all();
    }

    /// Ends all vCPU threads.
    pub fn stop(&self) {
        let mut inner = self.lock();
        inner.phase = Phase::Stopping;
        inner.outcome.get_or_insert(Outcome::Stopped);
        self.changed.notify_all();
        drop(inner);
        self.kick();
    }

    /// Waits until the guest has ended or the machine was stopped.
    pub fn wait(&self) -> Outcome {
        let mut inner = self.lock();
        loop {
            if let Some(outcome) = &inner.outcome {
                return outcome.clone();
            }
            inner = self.changed.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits at most `patience` for the guest's end.
    pub fn wait_timeout(&self, patience: std::time::Duration) -> Option<Outcome> {
        let waited = self.changed.wait_timeout_while(self.lock(), patience, |inner| inner.outcome.is_none());
        waited.unwrap_or_else(PoisonError::into_inner).0.outcome.clone()
    }

    fn kick(&self) {
        for thread in self.threads.get().into_iter().flatten() {
            // SAFETY: the threads are joined only after they were told to stop and `stop` has
            // returned, so each id is that of a thread that has not been joined.
            unsafe { kick::kick(thread) };
        }
    }
}
