//! Keeps the lanes of one migration within a bandwidth.
//!
//! All lanes share one account. Whoever has sent some bytes moves the time at which the next ones may leave
//! by what these bytes take at the cap, and waits until the time before. Time that nobody used is not saved
//! up, but for [`SLACK`]: a source that was idle does not burst afterwards. There is no lock and no timer.
//! Without a cap it costs one load of an atomic for each chunk of memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How far the lanes may fall behind the cap and still catch up: threads wake late.
const SLACK: Duration = Duration::from_millis(10);

/// What lanes hand over at a time lasts so long at the cap.
const SLICE: Duration = Duration::from_millis(20);

/// What they hand over at least, in bytes: smaller pieces would cost more than they smooth.
const LEAST_SLICE: u64 = 64 << 10;

/// The account.
pub(crate) struct Pacer {
    began: Instant,
    /// Bytes a second; 0 for no cap.
    rate: AtomicU64,
    /// When the next bytes may leave, in nanoseconds since `began`.
    due: AtomicU64,
}

impl Default for Pacer {
    fn default() -> Self {
        Pacer { began: Instant::now(), rate: AtomicU64::new(0), due: AtomicU64::new(0) }
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl Pacer {
    /// The cap in bytes a second; `None` for none.
    pub fn rate(&self) -> Option<u64> {
        match self.rate.load(Ordering::Relaxed) {
            0 => None,
            rate => Some(rate),
        }
    }

    /// Sets the cap. A cap of 0 would let nothing through, so it counts as 1.
    pub fn set_rate(&self, rate: Option<u64>) {
        self.rate.store(rate.map_or(0, |rate| rate.max(1)), Ordering::Relaxed);
        // What was charged at the old rate is no longer owed.
        self.due.store(0, Ordering::Relaxed);
    }

    /// How many bytes to send at a time; `None` for as many as there are.
    pub fn slice(&self) -> Option<u64> {
        let rate = self.rate()?;
        let slice = u128::from(rate) * SLICE.as_nanos() / 1_000_000_000;
        Some(u64::try_from(slice).unwrap_or(u64::MAX).max(LEAST_SLICE))
    }

    /// Charges bytes that have just been sent. Returns how long their lane has to wait before it sends more.
    pub fn charge(&self, bytes: u64) -> Duration {
        self.charge_at(bytes, self.began.elapsed())
    }

    fn charge_at(&self, bytes: u64, now: Duration) -> Duration {
        let Some(rate) = self.rate() else { return Duration::ZERO };
        let takes = u128::from(bytes) * 1_000_000_000 / u128::from(rate);
        let takes = u64::try_from(takes).unwrap_or(u64::MAX);
        let earliest = nanoseconds(now.saturating_sub(SLACK));
        let later = |due: u64| due.max(earliest).saturating_add(takes);
        // Nothing else is read or written by this order.
        let before = self.due.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |due| Some(later(due)));
        let due = later(before.unwrap_or_default());
        Duration::from_nanos(due.saturating_sub(nanoseconds(now)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn bytes_take_their_time_whoever_sends_them() {
        let pacer = Pacer::default();
        assert_eq!((pacer.charge_at(1 << 40, SECOND), pacer.slice()), (Duration::ZERO, None));
        pacer.set_rate(Some(100 << 20));
        assert_eq!(pacer.slice(), Some(2 << 20));
        // Two lanes that send at once wait for each other's bytes, but for the slack.
        let first = pacer.charge_at(50 << 20, SECOND);
        assert_eq!(first, Duration::from_millis(500) - SLACK);
        assert_eq!(pacer.charge_at(50 << 20, SECOND), SECOND - SLACK);
        // A lane that sends on when it may keeps to the rate for ever.
        let mut now = SECOND + first;
        for _ in 0..1000 {
            now += pacer.charge_at(1 << 20, now);
        }
        assert!((now - SECOND).as_secs_f64() > 1100.0 / 100.0 - 0.02, "{now:?}");
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let pacer = Pacer::default();
        pacer.set_rate(Some(1000));
        assert_eq!(pacer.charge_at(1000, 100 * SECOND), SECOND - SLACK);
        assert_eq!(pacer.charge_at(1000, 200 * SECOND), SECOND - SLACK);
    }

    #[test]
    fn another_cap_holds_at_once() {
        let pacer = Pacer::default();
        pacer.set_rate(Some(1));
        assert!(pacer.charge_at(1 << 30, SECOND) > 1000 * SECOND);
        pacer.set_rate(Some(1 << 30));
        assert_eq!(pacer.charge_at(1 << 30, SECOND), SECOND - SLACK);
        pacer.set_rate(None);
        assert_eq!(pacer.charge_at(1 << 30, SECOND), Duration::ZERO);
        pacer.set_rate(Some(0));
        assert_eq!((pacer.rate(), pacer.slice()), (Some(1), Some(LEAST_SLICE)));
        assert!(pacer.charge_at(u64::MAX, SECOND) > 1000 * SECOND);
    }
}
