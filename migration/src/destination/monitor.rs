//! Watching a guest come in, and refusing it, from other threads.

use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Where a migration is, as the destination sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = ArrivalPhase))]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Phase {
    /// Greeting, and the shadow machine being built.
    #[default]
    Preparing,
    /// Memory arrives.
    Receiving,
    /// The state has arrived and is loaded; then the source has the word.
    Switchover,
    /// The source has handed the guest over: it can no longer be refused.
    Committed,
    /// The guest runs here.
    Arrived,
    /// There is no guest here and there will be none.
    Discarded,
}

/// A moment of a migration, as the destination sees it.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema), schema(as = ArrivalProgress))]
#[non_exhaustive]
pub struct Progress {
    /// Where it is.
    pub phase: Phase,
    /// Bytes of guest RAM; 0 before the shadow machine is built.
    pub memory: u64,
    /// Bytes that were placed in it so far, as of the last look a twentieth of a second ago. A page that came
    /// twice counts twice, and what never came does not count.
    pub placed: u64,
    /// Microseconds since the monitor was made.
    pub elapsed_us: u64,
}

/// What the engine shares with whoever watches one migration at its destination, or cancels it.
pub struct Monitor {
    began: Instant,
    phase: Mutex<Phase>,
    memory: AtomicU64,
    placed: AtomicU64,
    cancelled: AtomicBool,
}

impl Default for Monitor {
    fn default() -> Self {
        Monitor {
            began: Instant::now(),
            phase: Mutex::default(),
            memory: AtomicU64::new(0),
            placed: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
        }
    }
}

impl Monitor {
    /// This moment.
    pub fn progress(&self) -> Progress {
        Progress {
            phase: *self.phase(),
            memory: self.memory.load(Ordering::Relaxed),
            placed: self.placed.load(Ordering::Relaxed),
            elapsed_us: self.began.elapsed().as_micros() as u64,
        }
    }

    /// Asks for the guest to be refused. It then runs on at the source, unless this side has taken `Commit`
    /// in: from then on the guest is this side's, and the call changes nothing. Heard within a twentieth of a
    /// second, except while the VMM is building the machine or loading its state.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// Whether that was asked for.
    pub fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    pub(super) fn enter(&self, phase: Phase) {
        *self.phase() = phase;
    }

    pub(super) fn built(&self, memory: u64) {
        self.memory.store(memory, Ordering::Relaxed);
    }

    pub(super) fn placed(&self, bytes: u64) {
        self.placed.store(bytes, Ordering::Relaxed);
    }

    /// A poisoned lock guards a plain value that is valid whatever the panicking thread had done.
    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
