//! When to stop copying and switch over.
//!
//! Pure arithmetic on what the rounds measured. The predicted blackout is what is still dirty at
//! the rate of the last real round, plus the barrier and the machine's own cost of switching.
//! The downtime limit is a bound, not a goal: once under it, another round is made as long as
//! rounds still shorten the blackout by a quarter or more and it is long enough to be worth it.

use crate::failure::{Code, Failure};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// When what is left travels in less than this, another round is not worth its traffic: the fixed costs of a
/// switchover are of the same size.
const SHORT_ENOUGH: Duration = Duration::from_millis(5);

/// A round of fewer bytes than this measures latency, not the rate.
const RATE_SAMPLE: u64 = 1 << 20;

/// Rate to assume before any round has measured one, in bytes a second: a tenth of a 10 Gb/s link.
const FIRST_GUESS: f64 = 125e6;

/// What to do with a guest that dirties memory faster than it can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnStall {
    /// Give the migration up; the guest continues to run here.
    #[default]
    Abort,
    /// Switch over all the same, with a blackout over the limit.
    Switch,
}

/// The operator's limits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Policy {
    /// Longest blackout that is acceptable.
    pub downtime_limit: Duration,
    /// Most pre-copy rounds.
    pub max_rounds: u32,
    /// Most time for all pre-copy rounds together; `None` for no limit.
    pub timeout: Option<Duration>,
    /// Rounds without progress (a tenth off the best prediction) after which it has stalled.
    pub stall_rounds: u32,
    /// What to do when it stalls, or runs out of rounds or time, over the limit.
    pub on_stall: OnStall,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            downtime_limit: Duration::from_millis(300),
            max_rounds: 30,
            timeout: None,
            stall_rounds: 3,
            on_stall: OnStall::Abort,
        }
    }
}

/// What one round measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RoundFacts {
    /// Bytes that travelled.
    pub sent: u64,
    /// From the round's beginning to its confirmed barrier.
    pub elapsed: Duration,
    /// The barrier's part of that.
    pub barrier: Duration,
    /// Bytes that were dirty again at the end.
    pub remaining: u64,
    /// Since pre-copy began.
    pub total_elapsed: Duration,
}

/// What to do after a round.
#[derive(Clone, Debug, PartialEq)]
pub enum Decision {
    /// Make another round.
    Again,
    /// Switch over. `Some` says why a blackout over the limit is accepted.
    Switch(Option<String>),
    /// Give up.
    GiveUp(Failure),
}

/// Follows one migration and decides after each round.
#[derive(Debug)]
pub struct Judge {
    policy: Policy,
    /// Cost of state and hand-over, as the machine estimates it.
    fixed: Duration,
    rate: f64,
    rounds: u32,
    last: Option<Duration>,
    best: Option<Duration>,
    stalled: u32,
}

impl Judge {
    /// A judge under `policy`; `fixed` is what a switchover costs with nothing left to send.
    pub fn new(policy: Policy, fixed: Duration) -> Self {
        Judge { policy, fixed, rate: FIRST_GUESS, rounds: 0, last: None, best: None, stalled: 0 }
    }

    /// Forgets the measured rate and the record of progress: the transport has changed.
    pub fn start_over(&mut self) {
        *self = Judge { rounds: self.rounds, ..Judge::new(self.policy.clone(), self.fixed) };
    }

    /// Blackout to expect if it began now.
    pub fn predict(&self, remaining: u64, barrier: Duration) -> Duration {
        let seconds = remaining as f64 / self.rate;
        // A rate of nearly nothing predicts more than a Duration can hold.
        let transfer = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        transfer.saturating_add(barrier).saturating_add(self.fixed)
    }

    /// Takes a round's facts; returns the prediction made of them and what to do.
    pub fn round(&mut self, facts: &RoundFacts) -> (Duration, Decision) {
        self.rounds += 1;
        if facts.sent >= RATE_SAMPLE && !facts.elapsed.is_zero() {
            self.rate = facts.sent as f64 / facts.elapsed.as_secs_f64();
        }
        let predicted = self.predict(facts.remaining, facts.barrier);
        let decision = self.decide(predicted, facts);
        self.last = Some(predicted);
        (predicted, decision)
    }

    fn decide(&mut self, predicted: Duration, facts: &RoundFacts) -> Decision {
        let limit = self.policy.downtime_limit;
        let out_of_rounds = self.rounds >= self.policy.max_rounds;
        let out_of_time = self.policy.timeout.is_some_and(|t| facts.total_elapsed >= t);
        if predicted <= limit {
            let improving = self.last.is_none_or(|last| predicted < last.mul_f64(0.75));
            let worth_it = predicted.saturating_sub(self.fixed) > SHORT_ENOUGH
                && improving
                && !out_of_rounds
                && !out_of_time;
            return if worth_it { Decision::Again } else { Decision::Switch(None) };
        }
        if self.best.is_none_or(|best| predicted < best.mul_f64(0.9)) {
            self.best = Some(predicted);
            self.stalled = 0;
        } else {
            self.stalled += 1;
        }
        let why = if out_of_rounds {
            format!("after {} rounds", self.rounds)
        } else if out_of_time {
            format!("after {:.1} s", facts.total_elapsed.as_secs_f64())
        } else if self.stalled >= self.policy.stall_rounds {
            format!("{} rounds made no progress", self.stalled)
        } else {
            return Decision::Again;
        };
        let story = format!(
            "the guest dirties memory faster than it can be sent: {why}, {} MiB are still dirty, which at {:.0} MiB/s \
             means a blackout of {:.0} ms (limit {:.0} ms)",
            facts.remaining >> 20,
            self.rate / f64::from(1 << 20),
            predicted.as_secs_f64() * 1e3,
            limit.as_secs_f64() * 1e3,
        );
        match self.policy.on_stall {
            OnStall::Switch => Decision::Switch(Some(story)),
            OnStall::Abort => Decision::GiveUp(Failure::new(
                Code::NOT_CONVERGING,
                format_args!("{story}; raise the downtime limit, or choose to switch over on a stall"),
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// Rounds at 1000 MiB/s in which the given amounts (in MiB) are sent and stay dirty.
    fn judge(policy: Policy, rounds: &[(u64, u64)]) -> Decision {
        let mut judge = Judge::new(policy, Duration::from_millis(2));
        let mut total_elapsed = Duration::ZERO;
        for (index, (sent, remaining)) in rounds.iter().enumerate() {
            let elapsed = Duration::from_millis(*sent);
            total_elapsed += elapsed;
            let facts = RoundFacts {
                sent: sent * MIB,
                elapsed,
                barrier: Duration::from_micros(100),
                remaining: remaining * MIB,
                total_elapsed,
            };
            let (_, decision) = judge.round(&facts);
            if decision != Decision::Again {
                assert_eq!(index + 1, rounds.len(), "decided early: {decision:?}");
                return decision;
            }
        }
        Decision::Again
    }

    #[test]
    fn an_idle_guest_switches_after_one_round() {
        assert_eq!(judge(Policy::default(), &[(4096, 0)]), Decision::Switch(None));
    }

    #[test]
    fn an_untouched_guest_switches_although_no_rate_was_measured() {
        assert_eq!(judge(Policy::default(), &[(0, 0)]), Decision::Switch(None));
    }

    #[test]
    fn under_the_limit_it_goes_on_while_that_helps_and_no_longer() {
        assert_eq!(judge(Policy::default(), &[(4096, 200)]), Decision::Again);
        assert_eq!(judge(Policy::default(), &[(4096, 200), (200, 60), (60, 55)]), Decision::Switch(None));
        assert_eq!(judge(Policy::default(), &[(4096, 64), (64, 64)]), Decision::Switch(None));
    }

    #[test]
    fn a_guest_that_dirties_too_fast_is_noticed_and_the_policy_obeyed() {
        let rounds = [(4096, 2000), (2000, 1000), (1000, 990), (990, 1010), (1000, 995)];
        let Decision::GiveUp(failure) = judge(Policy::default(), &rounds) else { panic!("did not give up") };
        assert_eq!(failure.code, Code::NOT_CONVERGING);
        let switch = Policy { on_stall: OnStall::Switch, ..Policy::default() };
        assert!(matches!(judge(switch, &rounds), Decision::Switch(Some(_))));
    }

    #[test]
    fn rounds_and_time_are_limited() {
        let two = Policy { max_rounds: 2, ..Policy::default() };
        assert!(matches!(judge(two, &[(4096, 2000), (2000, 1000)]), Decision::GiveUp(_)));
        let brief = Policy { timeout: Some(Duration::from_secs(5)), ..Policy::default() };
        assert!(matches!(judge(brief, &[(4096, 2000), (2000, 1000)]), Decision::GiveUp(_)));
    }

    #[test]
    fn a_rate_of_nothing_predicts_forever_without_overflow() {
        let mut judge = Judge::new(Policy::default(), Duration::from_millis(2));
        let facts = RoundFacts {
            sent: RATE_SAMPLE,
            elapsed: Duration::MAX,
            barrier: Duration::MAX,
            remaining: u64::MAX,
            total_elapsed: Duration::MAX,
        };
        assert_eq!(judge.round(&facts), (Duration::MAX, Decision::Again));
    }
}
