//! Watching a migration, and directing it, from other threads.

use crate::failure::{Code, Failure};
use crate::pacer::Pacer;
use crate::report::RoundReport;
use crate::transport::Interrupt;
use serde::{Deserialize, Serialize};
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Where a migration is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Phase {
    /// Greeting, and the shadow machine being built.
    #[default]
    Preparing,
    /// Memory travels, the guest runs.
    Precopy,
    /// The switchover is due, and waits for [`Monitor::proceed`]. The guest runs, and what it dirties
    /// travels. Only with
    /// [`Migration::pause_before_switchover`](crate::source::Migration::pause_before_switchover).
    ReadyToSwitch,
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
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[non_exhaustive]
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
    /// Bytes a second that the guest dirtied during the last round; `None` before the first has ended.
    pub dirty_rate: Option<f64>,
    /// Blackout in microseconds to expect if it began after the last round; `None` while nothing is known.
    pub predicted_blackout_us: Option<u64>,
    /// Bytes that the guest may make dirty in a second, if its writers are slowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttled_to: Option<u64>,
    /// Microseconds since the migration began.
    pub elapsed_us: u64,
}

type Callback = Arc<dyn Fn(&Progress) + Send + Sync>;

/// What the engine shares with whoever watches and directs one migration.
///
/// A monitor serves one migration, from before its start (it may be cancelled already) until after its end. A
/// second migration that is given the same monitor fails with [`Code::BUSY`] before it begins.
pub struct Monitor {
    began: Instant,
    current: Mutex<Current>,
    sent: AtomicU64,
    zero: AtomicU64,
    round_done: AtomicU64,
    taken: AtomicBool,
    /// Apart from the other orders, as lanes look at these two once a chunk.
    cancelled: AtomicBool,
    expired: AtomicBool,
    pacer: Pacer,
    orders: Mutex<Orders>,
    ordered: Condvar,
    interrupter: Mutex<Option<Arc<dyn Interrupt>>>,
    callbacks: Mutex<Vec<Callback>>,
}

struct Current {
    progress: Progress,
    rounds: Vec<RoundReport>,
    downtime_limit: Option<Duration>,
    round_began: Instant,
    sent_before: u64,
}

/// What whoever directs the migration has asked for.
#[derive(Default)]
struct Orders {
    switch_now: bool,
    proceed: bool,
    downtime_limit: Option<Duration>,
    /// The operator's cap on the bandwidth, and whether it was asked for beside the policy.
    cap: Option<u64>,
    asked: bool,
    /// What a whole host leaves for this migration.
    share: Option<u64>,
    /// Counts the changes of both.
    caps: u64,
    deadline: Deadline,
}

/// When the migration is to have handed the guest over.
#[derive(Clone, Copy, Default)]
enum Deadline {
    /// At no time: there is none, or the clock stands still while an operator is waited for.
    #[default]
    Never,
    At(Instant),
    /// It no longer matters: the guest is handed over, or the migration has ended.
    Done,
}

impl Default for Monitor {
    fn default() -> Self {
        let now = Instant::now();
        Monitor {
            began: now,
            current: Mutex::new(Current {
                progress: Progress::default(),
                rounds: Vec::new(),
                downtime_limit: None,
                round_began: now,
                sent_before: 0,
            }),
            sent: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            round_done: AtomicU64::new(0),
            taken: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
            expired: AtomicBool::new(false),
            pacer: Pacer::default(),
            orders: Mutex::default(),
            ordered: Condvar::new(),
            interrupter: Mutex::new(None),
            callbacks: Mutex::default(),
        }
    }
}

/// A poisoned lock guards plain values that are valid whatever the panicking thread had done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Monitor {
    /// This moment.
    pub fn progress(&self) -> Progress {
        let current = lock(&self.current);
        let mut now = current.progress.clone();
        now.sent = self.sent.load(Ordering::Relaxed);
        now.zero = self.zero.load(Ordering::Relaxed);
        now.round_done = self.round_done.load(Ordering::Relaxed);
        now.elapsed_us = self.began.elapsed().as_micros() as u64;
        let seconds = current.round_began.elapsed().as_secs_f64();
        if now.phase == Phase::Precopy && seconds > 0.05 {
            now.rate = (now.sent - current.sent_before) as f64 / seconds;
        }
        now
    }

    /// The pre-copy rounds that are over, as the report will have them.
    pub fn rounds(&self) -> Vec<RoundReport> {
        lock(&self.current).rounds.clone()
    }

    /// The longest blackout that is acceptable, by which the end of the last round was judged; `None` before
    /// memory travels.
    pub fn downtime_limit(&self) -> Option<Duration> {
        lock(&self.current).downtime_limit
    }

    /// Calls `callback` with [`progress`](Self::progress) whenever the phase changes and after each pre-copy
    /// round.
    ///
    /// It is called in the thread that migrates, once within the blackout ([`Phase::Committed`]), so it has
    /// to be quick: what takes time belongs in another thread. It may call this monitor's own methods. A
    /// callback that panics is not called again, and the migration goes on.
    pub fn on_progress(&self, callback: impl Fn(&Progress) + Send + Sync + 'static) {
        lock(&self.callbacks).push(Arc::new(callback));
    }

    /// Asks for the migration to be stopped. The guest then continues to run at the source, unless it has
    /// been handed over already.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
        self.order(|_| {});
        self.interrupt();
    }

    /// Whether a stop was asked for.
    pub fn cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Asks for the switchover as soon as the round under way has ended, even if the blackout is then longer
    /// than the limit. Implies [`proceed`](Self::proceed).
    pub fn switch_now(&self) {
        self.order(|orders| (orders.switch_now, orders.proceed) = (true, true));
    }

    /// Lets a migration switch over that
    /// [pauses before](crate::source::Migration::pause_before_switchover): at once if it waits in
    /// [`Phase::ReadyToSwitch`], without a wait if it is not there yet.
    pub fn proceed(&self) {
        self.order(|orders| orders.proceed = true);
    }

    /// Caps the bytes of memory that travel in a second, as [`Policy::bandwidth`] does, from now on; `None`
    /// for no cap. What is asked for before the migration begins stands above its policy.
    ///
    /// [`Policy::bandwidth`]: crate::policy::Policy::bandwidth
    pub fn set_bandwidth(&self, bytes_per_second: Option<u64>) {
        self.order(|orders| {
            (orders.cap, orders.asked) = (bytes_per_second, true);
            self.cap(orders);
        });
    }

    /// Caps them once more, by what a host of many migrations leaves for this one. The lower cap counts.
    pub fn set_share(&self, bytes_per_second: Option<u64>) {
        self.order(|orders| {
            // What lanes owe is forgotten when a cap changes.
            if orders.share != bytes_per_second {
                orders.share = bytes_per_second;
                self.cap(orders);
            }
        });
    }

    fn cap(&self, orders: &mut Orders) {
        self.pacer.set_rate([orders.cap, orders.share].into_iter().flatten().min());
        orders.caps += 1;
    }

    /// The cap on the bytes that travel in a second.
    pub fn bandwidth(&self) -> Option<u64> {
        self.pacer.rate()
    }

    /// Changes the longest blackout that is acceptable, from the end of the round under way on. The last one
    /// counts.
    pub fn limit_downtime(&self, limit: Duration) {
        self.order(|orders| orders.downtime_limit = Some(limit));
    }

    /// Notes how it ended, for a migration that ended before the engine began.
    pub fn end(&self, phase: Phase) {
        self.taken.store(true, Ordering::Release);
        self.enter(phase);
    }

    fn order(&self, change: impl FnOnce(&mut Orders)) {
        change(&mut lock(&self.orders));
        self.ordered.notify_all();
    }

    /// Takes the monitor for one migration.
    ///
    /// # Errors
    /// [`Code::BUSY`] when it has served one.
    pub(crate) fn take(&self) -> Result<(), Failure> {
        if self.taken.swap(true, Ordering::AcqRel) {
            let text = "this monitor has served another migration: give each migration a monitor of its own";
            return Err(Failure::new(Code::BUSY, text));
        }
        Ok(())
    }

    pub(crate) fn wants_switch(&self) -> bool {
        lock(&self.orders).switch_now
    }

    pub(crate) fn may_proceed(&self) -> bool {
        lock(&self.orders).proceed
    }

    /// The cap of the migration's policy, unless another was asked for already.
    pub(crate) fn default_bandwidth(&self, bytes_per_second: Option<u64>) {
        self.order(|orders| {
            if !orders.asked {
                orders.cap = bytes_per_second;
                self.cap(orders);
            }
        });
    }

    /// How many bytes a lane sends at a time; `None` for as many as there are.
    pub(crate) fn slice(&self) -> Option<u64> {
        self.pacer.slice()
    }

    /// Keeps a lane that has just sent so many bytes within the bandwidth. Returns at once if the migration
    /// has to stop, and also if the cap has changed.
    pub(crate) fn pace(&self, bytes: u64) {
        let wait = self.pacer.charge(bytes);
        if wait.is_zero() {
            return;
        }
        let orders = lock(&self.orders);
        let caps = orders.caps;
        let held = |orders: &mut Orders| orders.caps == caps && self.stopped().is_none();
        let woken = self.ordered.wait_timeout_while(orders, wait, held);
        drop(woken.unwrap_or_else(PoisonError::into_inner));
    }

    /// The limit that was set since this was last asked.
    pub(crate) fn take_downtime_limit(&self) -> Option<Duration> {
        lock(&self.orders).downtime_limit.take()
    }

    /// Waits until the migration may proceed or is cancelled, but no longer than `limit`.
    pub(crate) fn await_orders(&self, limit: Duration) {
        let idle = |orders: &mut Orders| !orders.proceed && self.stopped().is_none();
        let woken = self.ordered.wait_timeout_while(lock(&self.orders), limit, idle);
        drop(woken.unwrap_or_else(PoisonError::into_inner));
    }

    /// From now on what stops the migration also stops this plane.
    pub(crate) fn arm(&self, interrupter: Arc<dyn Interrupt>) {
        let mut slot = lock(&self.interrupter);
        if self.stopped().is_some() {
            interrupter.interrupt();
        }
        *slot = Some(interrupter);
    }

    fn interrupt(&self) {
        if let Some(interrupter) = &*lock(&self.interrupter) {
            interrupter.interrupt();
        }
    }

    /// Why the migration has to stop, if it has to.
    pub(crate) fn stopped(&self) -> Option<Failure> {
        if self.cancelled() {
            return Some(Failure::new(Code::CANCELLED, "cancelled"));
        }
        self.expired.load(Ordering::Acquire).then(|| {
            let text = "the guest was not moved within the time limit that was set, and goes on here; \
                        set a longer one, or none";
            Failure::new(Code::TIMEOUT, text)
        })
    }

    /// Sets the time by which the guest has to be handed over; `None` for no limit from now on.
    pub(crate) fn set_deadline(&self, deadline: Option<Instant>) {
        self.order(|orders| orders.deadline = deadline.map_or(Deadline::Never, Deadline::At));
    }

    /// Gives a migration that has a deadline at least `more` time from now.
    pub(crate) fn extend_deadline(&self, more: Duration) {
        self.order(|orders| {
            if let Deadline::At(deadline) = &mut orders.deadline {
                *deadline = (*deadline).max(Instant::now() + more);
            }
        });
    }

    /// The deadline, to be set again later.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match lock(&self.orders).deadline {
            Deadline::At(deadline) => Some(deadline),
            Deadline::Never | Deadline::Done => None,
        }
    }

    /// No deadline matters any more.
    pub(crate) fn settle(&self) {
        self.order(|orders| orders.deadline = Deadline::Done);
    }

    /// Stops the migration if its deadline passes. Returns then, or once it is settled.
    pub(crate) fn keep_deadline(&self) {
        let mut orders = lock(&self.orders);
        loop {
            let woken = match orders.deadline {
                Deadline::Done => return,
                Deadline::Never => self.ordered.wait(orders).unwrap_or_else(PoisonError::into_inner),
                Deadline::At(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    let waited = self.ordered.wait_timeout(orders, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
            orders = woken;
        }
        self.expired.store(true, Ordering::Release);
        drop(orders);
        self.ordered.notify_all();
        self.interrupt();
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut lock(&self.current).progress);
    }

    /// Notes what is judged by, before the first round and whenever it may have changed.
    pub(crate) fn judged_by(&self, downtime_limit: Duration) {
        lock(&self.current).downtime_limit = Some(downtime_limit);
    }

    /// Notes the pre-copy rounds that are over.
    pub(crate) fn rounds_are(&self, rounds: &[RoundReport]) {
        lock(&self.current).rounds = rounds.to_vec();
    }

    /// Notes a new phase and tells the callbacks.
    pub(crate) fn enter(&self, phase: Phase) {
        self.update(|p| p.phase = phase);
        self.notify();
    }

    /// Tells the callbacks where the migration is.
    pub(crate) fn notify(&self) {
        let callbacks = lock(&self.callbacks).clone();
        if callbacks.is_empty() {
            return;
        }
        let progress = self.progress();
        for callback in callbacks {
            // Asserted: whoever watches may leave its own state as it likes, it gets nothing else of the
            // engine's.
            if panic::catch_unwind(AssertUnwindSafe(|| callback(&progress))).is_err() {
                lock(&self.callbacks).retain(|other| !Arc::ptr_eq(other, &callback));
            }
        }
    }

    pub(crate) fn round_begins(&self, round: u32, bytes: u64) {
        let mut current = lock(&self.current);
        self.round_done.store(0, Ordering::Relaxed);
        current.progress.round = round;
        current.progress.round_bytes = bytes;
        current.round_began = Instant::now();
        current.sent_before = self.sent.load(Ordering::Relaxed);
    }

    /// One chunk of a round is dealt with: `looked_at` bytes, of which `sent` and `zero`.
    pub(crate) fn chunk(&self, looked_at: u64, sent: u64, zero: u64) {
        self.round_done.fetch_add(looked_at, Ordering::Relaxed);
        self.sent.fetch_add(sent, Ordering::Relaxed);
        self.zero.fetch_add(zero, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callbacks_hear_of_phases_and_one_that_panics_is_left_out() {
        let monitor = Arc::new(Monitor::default());
        let heard = Arc::new(Mutex::new(Vec::new()));
        monitor.on_progress({
            let heard = Arc::clone(&heard);
            move |progress| lock(&heard).push(progress.phase)
        });
        let panics = Arc::new(AtomicU64::new(0));
        monitor.on_progress({
            let panics = Arc::clone(&panics);
            move |_| {
                panics.fetch_add(1, Ordering::Relaxed);
                panic!("a watcher's own fault");
            }
        });
        // A callback may call the monitor.
        let same = Arc::downgrade(&monitor);
        monitor.on_progress(move |progress| {
            let monitor = same.upgrade().unwrap();
            assert_eq!(monitor.progress().phase, progress.phase);
            monitor.proceed();
        });
        monitor.enter(Phase::Precopy);
        monitor.enter(Phase::Switchover);
        assert_eq!(*lock(&heard), [Phase::Precopy, Phase::Switchover]);
        assert_eq!(panics.load(Ordering::Relaxed), 1);
        assert!(monitor.may_proceed() && !monitor.wants_switch());
    }

    #[test]
    fn orders_wake_whoever_waits_for_them() {
        let long = Duration::from_secs(600);
        for order in [Monitor::proceed, Monitor::switch_now, Monitor::cancel] {
            let monitor = Monitor::default();
            std::thread::scope(|scope| {
                scope.spawn(|| monitor.await_orders(long));
                order(&monitor);
            });
        }
    }

    #[test]
    fn a_lane_that_is_held_back_hears_of_a_stop_and_of_another_cap() {
        type Order = fn(&Monitor);
        let orders: [Order; 3] = [
            Monitor::cancel,
            |monitor| monitor.set_bandwidth(None),
            |monitor| monitor.set_share(Some(1 << 50)),
        ];
        for order in orders {
            let monitor = Monitor::default();
            monitor.set_bandwidth(Some(1));
            monitor.default_bandwidth(None);
            assert_eq!(monitor.bandwidth(), Some(1), "what was asked for stands above the policy");
            std::thread::scope(|scope| {
                // For years, if nothing happens.
                scope.spawn(|| monitor.pace(1 << 40));
                std::thread::sleep(Duration::from_millis(10));
                order(&monitor);
            });
        }
    }

    #[test]
    fn one_monitor_serves_one_migration() {
        let monitor = Monitor::default();
        monitor.cancel();
        assert_eq!(monitor.take(), Ok(()), "cancelled before it began");
        assert_eq!(monitor.take().unwrap_err().code, Code::BUSY);
    }
}
