//! How fast a guest works while it is moved, by its own count of what it has done.
//!
//! The guest keeps the count in its memory, so reading it does not stop the guest. It is sampled through the
//! source's process until the switchover. The last sample before the blackout is the last one that counts.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};
use vmm::guest::Testimony;

/// Time between two samples.
pub const INTERVAL: Duration = Duration::from_millis(40);

/// Samples that a pace needs on either side of the migration's start.
const MIN_SAMPLES: usize = 3;

/// One sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Milliseconds from the migration's start; negative before it.
    pub ms: f64,
    /// Pages that the guest has rewritten so far; for a guest that rewrites none, how often it has read the
    /// clock.
    pub done: u64,
}

/// The samples of one guest, and when its migration started.
pub struct Sampler {
    start: Option<Instant>,
    samples: Vec<(Instant, u64)>,
}

impl Sampler {
    /// A sampler without samples.
    pub fn new() -> Self {
        Sampler { start: None, samples: Vec::new() }
    }

    /// Notes that the migration starts now.
    pub fn start(&mut self) {
        self.start = Some(Instant::now());
    }

    /// Whether the next sample is due.
    pub fn due(&self) -> bool {
        self.samples.last().is_none_or(|(at, _)| at.elapsed() >= INTERVAL)
    }

    /// Takes a sample of what the guest has done until now.
    pub fn sample(&mut self, guest: &Testimony) {
        let done = if guest.working_set == 0 { guest.samples } else { guest.pages };
        self.samples.push((Instant::now(), done));
    }

    /// The samples of a migration whose blackout began after `precopy`.
    pub fn samples(&self, precopy: Duration) -> Vec<Sample> {
        let Some(start) = self.start else { return Vec::new() };
        let ms = |at: Instant| match at.checked_duration_since(start) {
            Some(after) => after.as_secs_f64() * 1e3,
            None => start.duration_since(at).as_secs_f64() * -1e3,
        };
        let samples = self.samples.iter().map(|(at, done)| Sample { ms: ms(*at), done: *done });
        samples.filter(|sample| sample.ms <= precopy.as_secs_f64() * 1e3).collect()
    }
}

/// What the guest did per millisecond between the first sample and the last; `None` for too few samples.
fn rate(samples: &[Sample]) -> Option<f64> {
    let (first, last) = (samples.first()?, samples.last()?);
    (samples.len() >= MIN_SAMPLES && last.ms > first.ms)
        .then(|| last.done.saturating_sub(first.done) as f64 / (last.ms - first.ms))
}

/// By how many per cent the guest was slower between the migration's start and the blackout than before;
/// negative if it was faster. `None` for a migration that was too short for [`MIN_SAMPLES`], such as one of
/// an eighth of a second.
pub fn slowed_percent(samples: &[Sample]) -> Option<f64> {
    let (before, during) = samples.split_at(samples.partition_point(|sample| sample.ms < 0.0));
    let usual = rate(before).filter(|usual| *usual > 0.0)?;
    Some(100.0 * (1.0 - rate(during)? / usual))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_at_half_its_pace_is_slowed_by_half() {
        let sample = |ms: f64, done| Sample { ms, done };
        let before = [sample(-200.0, 0), sample(-100.0, 1000), sample(-10.0, 1900)];
        let during = [sample(10.0, 2000), sample(60.0, 2250), sample(110.0, 2500)];
        let all = [before, during].concat();
        assert_eq!(slowed_percent(&all), Some(50.0));
        assert_eq!(slowed_percent(&all[..5]), None, "two samples are no pace");
        assert_eq!(slowed_percent(&during), None, "nothing to compare with");
        let still = [before.map(|sample| Sample { done: 7, ..sample }), during].concat();
        assert_eq!(slowed_percent(&still), None, "a guest that did nothing cannot be slowed");
    }

    #[test]
    fn samples_after_the_blackout_began_do_not_count() {
        let mut sampler = Sampler::new();
        assert!(sampler.due());
        let start = Instant::now();
        sampler.start = Some(start);
        let at = |ms| start + Duration::from_millis(ms);
        sampler.samples = vec![(start - Duration::from_millis(5), 1), (at(10), 2), (at(30), 3)];
        let samples = sampler.samples(Duration::from_millis(20));
        assert_eq!(samples.len(), 2);
        assert!(samples[0].ms < 0.0 && samples[1] == Sample { ms: 10.0, done: 2 });
    }
}
