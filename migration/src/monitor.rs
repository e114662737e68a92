//! Watching a migration, and stopping it, from other threads.

use crate::transport::Interrupt;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// Where a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Greeting, and the shadow machine being built.
    #[default]
    Preparing,
    /// Memory travels, the guest runs.
    Precopy,
    /// The blackout.
    Switchover,
    /// The guest is handed over; the destination has not yet said that it runs.
    Committed,
    /// The guest runs at the destination.
    Moved,
    /// The guest runs at the source: the migration failed or was cancelled.
    Stayed,
    /// The guest is paused at the source: an operator decides.
    Held,
}

/// A moment of a migration.
#[derive(Clone, Debug, PartialEq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Where it is.
    pub phase: Phase,
    /// Pre-copy round, from 0.
    pub round: u32,
    /// Transport in use; empty before one is chosen.
    pub transport: String,
    /// Bytes of guest RAM sent so far.
    pub sent: u64,
    /// Bytes found to be zero so far, in memory that exists.
    pub zero: u64,
    /// Bytes this round set out to look at.
    pub round_bytes: u64,
    /// Bytes of them dealt with so far.
    pub round_done: u64,
    /// Sending rate in bytes a second, of the last round or of this one so far.
    pub rate: f64,
    /// Bytes a second that the guest dirtied during the last round.
    pub dirty_rate: f64,
    /// Blackout in microseconds to expect if it began after the last round; 0 before one.
    pub predicted_blackout_us: u64,
    /// Microseconds since the migration began.
    pub elapsed_us: u64,
}

/// Shared by the engine, which writes it, and whoever watches.
pub struct Monitor {
    began: Instant,
    progress: Mutex<(Progress, Instant, u64)>,
    sent: AtomicU64,
    zero: AtomicU64,
    round_done: AtomicU64,
    cancelled: AtomicBool,
    interrupter: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Default for Monitor {
    fn default() -> Self {
        let now = Instant::now();
        Monitor {
            began: now,
            progress: Mutex::new((Progress::default(), now, 0)),
            sent: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            round_done: AtomicU64::new(0),
            cancelled: AtomicBool::new(false),
            interrupter: Mutex::new(None),
        }
    }
}

/// A poisoned lock guards plain numbers that are valid whatever the panicking thread had done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Monitor {
    /// This moment.
    pub fn progress(&self) -> Progress {
        let guard = lock(&self.progress);
        let (progress, round_began, sent_before) = &*guard;
        let mut now = progress.clone();
        now.sent = self.sent.load(Ordering::Relaxed);
        now.zero = self.zero.load(Ordering::Relaxed);
        now.round_done = self.round_done.load(Ordering::Relaxed);
        now.elapsed_us = self.began.elapsed().as_micros() as u64;
        let seconds = round_began.elapsed().as_secs_f64();
        if now.phase == Phase::Precopy && seconds > 0.05 {
            now.rate = (now.sent - sent_before) as f64 / seconds;
        }
        now
    }

    /// Asks for the migration to be stopped. The guest then continues to run at the source, unless it has
    /// been handed over already.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        if let Some(interrupter) = &*lock(&self.interrupter) {
            interrupter.interrupt();
        }
    }

    /// Whether a stop was asked for.
    pub fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Notes how it ended, for a migration that ended before the engine began.
    pub fn end(&self, phase: Phase) {
        self.update(|p| p.phase = phase);
    }

    /// From now on `cancel` also stops this plane.
    pub(crate) fn arm(&self, interrupter: Arc<dyn Interrupt>) {
        let mut slot = lock(&self.interrupter);
        if self.cancelled() {
            interrupter.interrupt();
        }
        *slot = Some(interrupter);
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut lock(&self.progress).0);
    }

    pub(crate) fn round_begins(&self, round: u32, bytes: u64) {
        let mut guard = lock(&self.progress);
        self.round_done.store(0, Ordering::Relaxed);
        guard.0.round = round;
        guard.0.round_bytes = bytes;
        guard.1 = Instant::now();
        guard.2 = self.sent.load(Ordering::Relaxed);
    }

    /// One chunk of a round is dealt with: `looked_at` bytes, of which `sent` and `zero`.
    pub(crate) fn chunk(&self, looked_at: u64, sent: u64, zero: u64) {
        self.round_done.fetch_add(looked_at, Ordering::Relaxed);
        self.sent.fetch_add(sent, Ordering::Relaxed);
        self.zero.fetch_add(zero, Ordering::Relaxed);
    }
}
