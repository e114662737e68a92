//! How fast a guest goes while it is moved: its own count of what it has done, looked at from outside.
//!
//! A guest's record lies in its memory, so looking at it stops nobody. Until the switchover it is the source's
//! process that is asked, a few times a second; the last look before the blackout ends the account.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};
use vmm::guest::Testimony;

/// Between two looks.
pub const EVERY: Duration = Duration::from_millis(40);

/// Looks from which a pace can be told, at either side of the migration's begin.
const LOOKS: usize = 3;

/// One look.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Look {
    /// Milliseconds from the migration's begin; negative before it.
    pub ms: f64,
    /// Pages rewritten so far; looks at the clock of a guest that rewrites none.
    pub done: u64,
}

/// The looks at one guest, and the clock they go by.
pub struct Watch {
    begin: Option<Instant>,
    looks: Vec<(Instant, u64)>,
}

impl Watch {
    /// Begins to watch.
    pub fn new() -> Self {
        Watch { begin: None, looks: Vec::new() }
    }

    /// The migration begins now.
    pub fn begins(&mut self) {
        self.begin = Some(Instant::now());
    }

    /// Whether it is time to look again.
    pub fn due(&self) -> bool {
        self.looks.last().is_none_or(|(at, _)| at.elapsed() >= EVERY)
    }

    /// Takes down what the guest has done until now.
    pub fn look(&mut self, guest: &Testimony) {
        let done = if guest.working_set == 0 { guest.samples } else { guest.pages };
        self.looks.push((Instant::now(), done));
    }

    /// The looks of a migration whose blackout began after `precopy`.
    pub fn looks(&self, precopy: Duration) -> Vec<Look> {
        let Some(begin) = self.begin else { return Vec::new() };
        let ms = |at: Instant| match at.checked_duration_since(begin) {
            Some(after) => after.as_secs_f64() * 1e3,
            None => begin.duration_since(at).as_secs_f64() * -1e3,
        };
        let looks = self.looks.iter().map(|(at, done)| Look { ms: ms(*at), done: *done });
        looks.filter(|look| look.ms <= precopy.as_secs_f64() * 1e3).collect()
    }
}

/// What was done in a millisecond, between the first look and the last; `None` for too few looks.
fn rate(looks: &[Look]) -> Option<f64> {
    let (first, last) = (looks.first()?, looks.last()?);
    (looks.len() >= LOOKS && last.ms > first.ms)
        .then(|| last.done.saturating_sub(first.done) as f64 / (last.ms - first.ms))
}

/// By how many per cent the guest was slower from the migration's begin to the blackout than before it; negative
/// if it was faster. `None` where there was no time to look: a migration of an eighth of a second has no pace.
pub fn slowed_percent(looks: &[Look]) -> Option<f64> {
    let (before, during) = looks.split_at(looks.partition_point(|look| look.ms < 0.0));
    let usual = rate(before).filter(|usual| *usual > 0.0)?;
    Some(100.0 * (1.0 - rate(during)? / usual))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_at_half_its_pace_is_slowed_by_half() {
        let look = |ms: f64, done| Look { ms, done };
        let before = [look(-200.0, 0), look(-100.0, 1000), look(-10.0, 1900)];
        let during = [look(10.0, 2000), look(60.0, 2250), look(110.0, 2500)];
        let all = [before, during].concat();
        assert_eq!(slowed_percent(&all), Some(50.0));
        assert_eq!(slowed_percent(&all[..5]), None, "two looks are no pace");
        assert_eq!(slowed_percent(&during), None, "nothing to compare with");
        let still = [before.map(|look| Look { done: 7, ..look }), during].concat();
        assert_eq!(slowed_percent(&still), None, "a guest that did nothing cannot be slowed");
    }

    #[test]
    fn looks_after_the_blackout_began_do_not_count() {
        let mut watch = Watch::new();
        assert!(watch.due());
        let begin = Instant::now();
        watch.begin = Some(begin);
        let at = |ms| begin + Duration::from_millis(ms);
        watch.looks = vec![(begin - Duration::from_millis(5), 1), (at(10), 2), (at(30), 3)];
        let looks = watch.looks(Duration::from_millis(20));
        assert_eq!(looks.len(), 2);
        assert!(looks[0].ms < 0.0 && looks[1] == Look { ms: 10.0, done: 2 });
    }
}
