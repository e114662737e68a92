//! When to stop copying and switch over.
//!
//! Pure arithmetic on what the rounds measured. The predicted blackout is what is still dirty at
//! the rate of the last real round, plus the barrier and what the [`Handover`] itself takes.
//! The downtime limit is a bound, not a goal: once under it, another round is made as long as
//! rounds still shorten the blackout by a quarter or more and it is long enough to be worth it. That is a
//! risk, as the guest may dirty more in that round. So it is taken only where rounds and time are left for
//! another one after it, and never again once it was lost.

use crate::failure::{Code, Failure};
use crate::machine::Throttle;
use crate::policy::{OnStall, Policy};
use std::time::Duration;

/// When what is left travels in less than this, another round is not worth its traffic: the fixed costs of a
/// switchover are of the same size.
const SHORT_ENOUGH: Duration = Duration::from_millis(5);

/// A round of fewer bytes than this measures latency, not the rate.
const MIN_RATE_SAMPLE: u64 = 1 << 20;

/// Rate to assume before any round has measured one, in bytes a second: a tenth of a 10 Gb/s link.
const FIRST_GUESS: f64 = 125e6;

/// What each side's part of a handover is taken to last if neither side says: better a round more than a
/// blackout over the limit.
const UNKNOWN_HANDOVER: Duration = Duration::from_millis(25);

/// Messages of the blackout that are answered before it goes on: the state and `Commit`.
const ROUND_TRIPS: u32 = 2;

/// A guest that is slowed may at first write half of what can be sent: each round then halves what is left.
const FIRST_SHARE: f64 = 0.5;

/// A guest that is slowed to this and does not converge never will.
const LAST_SHARE: f64 = 1.0 / 64.0;

/// What a switchover takes with no memory left to send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Handover {
    /// What the source's machine says of its part: pausing, saving, giving up its disks.
    pub source: Option<Duration>,
    /// What the destination's machine says of its part: loading, taking the disks, running.
    pub destination: Option<Duration>,
    /// The shortest round trip between the two that was seen so far.
    pub round_trip: Duration,
    /// What an earlier handover of such a machine took in all, if that is known.
    pub known: Option<Duration>,
}

impl Handover {
    /// How long to expect it to take. A side that says nothing is taken to need what the other says.
    pub fn expected(&self) -> Duration {
        let said =
            |this: Option<Duration>, other: Option<Duration>| this.or(other).unwrap_or(UNKNOWN_HANDOVER);
        let machines = match (self.source, self.destination, self.known) {
            // Nothing is better known than what was measured.
            (None, None, Some(_)) => Duration::ZERO,
            (source, destination, _) => said(source, destination).saturating_add(said(destination, source)),
        };
        let messages = self.round_trip.saturating_mul(ROUND_TRIPS);
        machines.saturating_add(messages).max(self.known.unwrap_or_default())
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
    /// Since the migration began, without the time that an operator was waited for.
    pub total_elapsed: Duration,
}

/// A blackout to expect, by its parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parts {
    /// Sending what is dirty.
    transfer: Duration,
    barrier: Duration,
    handover: Duration,
}

impl Parts {
    fn total(&self) -> Duration {
        self.transfer.saturating_add(self.barrier).saturating_add(self.handover)
    }
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
    handover: Handover,
    rate: f64,
    rounds: u32,
    last: Option<Duration>,
    best: Option<Duration>,
    stalled: u32,
    /// The last prediction that kept to the limit.
    met: Option<Duration>,
    throttle: Option<Slowed>,
}

/// How far the guest's writers are slowed.
#[derive(Clone, Copy, Debug)]
struct Slowed {
    /// Of what can be sent meanwhile, the part that they may make dirty.
    share: f64,
    /// What they made dirty in a second before, in bytes.
    dirty_rate: f64,
}

impl Judge {
    /// A judge under `policy` of a machine with this `handover`.
    pub fn new(policy: Policy, handover: Handover) -> Self {
        Judge {
            policy,
            handover,
            rate: FIRST_GUESS,
            rounds: 0,
            last: None,
            best: None,
            stalled: 0,
            met: None,
            throttle: None,
        }
    }

    /// Longest blackout that is acceptable.
    pub fn downtime_limit(&self) -> Duration {
        self.policy.downtime_limit
    }

    /// So many bytes may travel in a second at most.
    pub fn set_bandwidth(&mut self, bandwidth: Option<u64>) {
        self.policy.bandwidth = bandwidth;
    }

    /// Changes that limit. What was no progress under the old one is none under the new one, but what kept to
    /// the old one need not keep to the new one.
    pub fn limit_downtime(&mut self, limit: Duration) {
        self.policy.downtime_limit = limit;
        self.met = self.met.filter(|met| *met <= limit);
    }

    /// Forgets the measured rate and the record of progress: the transport has changed.
    pub fn start_over(&mut self) {
        *self = Judge {
            rounds: self.rounds,
            throttle: self.throttle,
            ..Judge::new(self.policy.clone(), self.handover)
        };
    }

    /// Blackout to expect if it began now.
    pub fn predict(&self, remaining: u64, barrier: Duration) -> Duration {
        self.parts(remaining, barrier).total()
    }

    fn parts(&self, remaining: u64, barrier: Duration) -> Parts {
        let seconds = remaining as f64 / self.rate;
        // A rate of nearly nothing predicts more than a Duration can hold.
        let transfer = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        Parts { transfer, barrier, handover: self.handover.expected() }
    }

    /// Learns from a round's facts; returns the prediction made of them.
    pub fn observe(&mut self, facts: &RoundFacts) -> Duration {
        if facts.sent >= MIN_RATE_SAMPLE && !facts.elapsed.is_zero() {
            self.rate = facts.sent as f64 / facts.elapsed.as_secs_f64();
        }
        // A barrier goes there and back too, and may have been quicker than the greeting.
        self.handover.round_trip = self.handover.round_trip.min(facts.barrier);
        self.predict(facts.remaining, facts.barrier)
    }

    /// Takes a round's facts; returns the prediction made of them and what to do.
    pub fn round(&mut self, facts: &RoundFacts) -> (Duration, Decision) {
        self.rounds += 1;
        let predicted = self.observe(facts);
        let decision = self.decide(predicted, facts);
        self.last = Some(predicted);
        (predicted, decision)
    }

    /// Why a switchover over the limit is accepted that an operator asked for, with this blackout
    /// `predicted`; `None` if it is not over the limit.
    pub fn switch_now(&self, predicted: Duration) -> Option<String> {
        let limit = self.policy.downtime_limit;
        (predicted > limit).then(|| {
            format!(
                "an operator asked for the switchover although a blackout of {} was expected (limit {})",
                milliseconds(predicted),
                milliseconds(limit),
            )
        })
    }

    fn decide(&mut self, predicted: Duration, facts: &RoundFacts) -> Decision {
        if predicted <= self.policy.downtime_limit {
            let again = self.another_round_is_worth_it(predicted, facts);
            (self.met, self.best, self.stalled) = (Some(predicted), None, 0);
            return if again { Decision::Again } else { Decision::Switch(None) };
        }
        if self.best.is_none_or(|best| predicted < best.mul_f64(0.9)) {
            self.best = Some(predicted);
            self.stalled = 0;
        } else {
            self.stalled += 1;
        }
        let throttles = self.policy.on_stall == OnStall::Throttle && self.writes_are_at_fault(facts.barrier);
        if throttles && self.stalled > 0 && self.slow_down(facts) {
            self.stalled = 0;
        }
        let stalled = self.stalled >= self.policy.stall_rounds;
        let why = if self.rounds >= self.policy.max_rounds {
            format!("after {} rounds", self.rounds)
        } else if self.out_of_time(facts.total_elapsed) {
            format!("after {:.1} s", facts.total_elapsed.as_secs_f64())
        } else if stalled {
            format!("{} rounds made no progress", self.stalled)
        } else {
            return Decision::Again;
        };
        let story = self.story(&why, stalled, facts);
        match self.policy.on_stall {
            OnStall::Switch => Decision::Switch(Some(story)),
            OnStall::Abort | OnStall::Throttle => Decision::GiveUp(Failure::new(
                Code::NOT_CONVERGING,
                format_args!("{story}; raise the downtime limit, or choose to switch over on a stall"),
            )),
        }
    }

    /// What the guest may write from here on, if it is to be slowed.
    pub fn throttle(&self) -> Option<Throttle> {
        self.throttle.map(|slowed| Throttle {
            limit: (self.rate * slowed.share) as u64,
            dirty_rate: slowed.dirty_rate as u64,
        })
    }

    /// Whether a blackout with nothing to send would keep to the limit.
    fn writes_are_at_fault(&self, barrier: Duration) -> bool {
        self.predict(0, barrier) <= self.policy.downtime_limit
    }

    /// Slows the guest's writers, or more than before. False if that is of no use any more.
    fn slow_down(&mut self, facts: &RoundFacts) -> bool {
        let slowed = match self.throttle {
            None => {
                let dirty_rate = facts.remaining as f64 / facts.elapsed.as_secs_f64().max(1e-6);
                Slowed { share: FIRST_SHARE, dirty_rate }
            }
            Some(slowed) if slowed.share > LAST_SHARE => Slowed { share: slowed.share / 2.0, ..slowed },
            Some(_) => return false,
        };
        self.throttle = Some(slowed);
        true
    }

    /// Whether to go on although `predicted` keeps to the limit.
    fn another_round_is_worth_it(&self, predicted: Duration, facts: &RoundFacts) -> bool {
        let improving = self.last.is_none_or(|last| predicted < last.mul_f64(0.75));
        let long = predicted.saturating_sub(self.handover.expected()) > SHORT_ENOUGH;
        // Over the limit after it was met: the risk was taken before, and lost.
        let lost = self.met.is_some() && self.best.is_some();
        // If it is lost this time, there has to be another round after it.
        let rounds_left = self.policy.max_rounds.saturating_sub(self.rounds) > 1;
        let two_rounds = predicted.saturating_mul(2).saturating_add(facts.total_elapsed);
        improving && long && !lost && rounds_left && !self.out_of_time(two_rounds)
    }

    fn out_of_time(&self, elapsed: Duration) -> bool {
        self.policy.timeout.is_some_and(|timeout| elapsed >= timeout)
    }

    /// Why the limit cannot be kept to: what is at fault, and every part of the blackout to expect.
    fn story(&self, why: &str, stalled: bool, facts: &RoundFacts) -> String {
        let parts = self.parts(facts.remaining, facts.barrier);
        let limit = self.policy.downtime_limit;
        let fault = if !self.writes_are_at_fault(facts.barrier) {
            "a switchover takes longer than the downtime limit even with no memory left to send"
        } else if stalled {
            "the guest dirties memory faster than it can be sent"
        } else {
            "too much memory is still dirty for a switchover within the downtime limit"
        };
        let capped = match self.policy.bandwidth {
            Some(cap) => format!(" (capped at {:.1})", cap as f64 / f64::from(1 << 20)),
            None => String::new(),
        };
        let mut story = format!(
            "{fault}: {why}, a blackout of {} is expected (limit {}): {} to send the {} MiB that are still dirty \
             at {:.0} MiB/s{capped}, {} for the barrier, and {} for the handover itself",
            milliseconds(parts.total()),
            milliseconds(limit),
            milliseconds(parts.transfer),
            facts.remaining >> 20,
            self.rate / f64::from(1 << 20),
            milliseconds(parts.barrier),
            milliseconds(parts.handover),
        );
        if let Some(throttle) = self.throttle() {
            let limit = throttle.limit as f64 / f64::from(1 << 20);
            story += &format!("; its writers were slowed to {limit:.1} MiB/s");
        }
        if let Some(met) = self.met {
            story += &format!("; after an earlier round it was {}", milliseconds(met));
        }
        story
    }
}

fn milliseconds(duration: Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// A handover of 2 ms.
    const QUICK: Handover = Handover {
        source: Some(Duration::from_millis(1)),
        destination: Some(Duration::from_millis(1)),
        round_trip: Duration::ZERO,
        known: None,
    };

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    /// Rounds at 1000 MiB/s in which the given amounts (in MiB) are sent and stay dirty.
    fn judge(policy: Policy, rounds: &[(u64, u64)]) -> Decision {
        let mut judge = Judge::new(policy, QUICK);
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

    /// A judge, and what it says after rounds at 1000 MiB/s with these MiB left and these milliseconds of
    /// barrier, a second each.
    fn decisions(policy: Policy, rounds: &[(u64, u64)]) -> Vec<(Duration, Decision)> {
        let mut judge = Judge::new(policy, QUICK);
        let facts = rounds.iter().zip(1..).map(|((remaining, barrier), second)| RoundFacts {
            sent: 1000 * MIB,
            elapsed: Duration::from_secs(1),
            barrier: ms(*barrier),
            remaining: remaining * MIB,
            total_elapsed: Duration::from_secs(second),
        });
        facts.map(|facts| judge.round(&facts)).collect()
    }

    /// Rounds of a second each, in which 1000 MiB are sent and so many stay dirty.
    fn seconds() -> impl FnMut(&mut Judge, u64) -> (Duration, Decision) {
        let mut second = 0;
        move |judge, remaining| {
            second += 1;
            judge.round(&RoundFacts {
                sent: 1000 * MIB,
                elapsed: Duration::from_secs(1),
                barrier: ms(1),
                remaining: remaining * MIB,
                total_elapsed: Duration::from_secs(second),
            })
        }
    }

    #[test]
    fn writers_are_slowed_until_rounds_make_progress() {
        let mut judge = Judge::new(Policy::default().with_on_stall(OnStall::Throttle), QUICK);
        let mut round = seconds();
        assert_eq!((round(&mut judge, 1000).1, judge.throttle()), (Decision::Again, None));
        // No progress, for the first time.
        assert_eq!(round(&mut judge, 1000).1, Decision::Again);
        let slowed = judge.throttle().unwrap();
        assert_eq!((slowed.limit, slowed.dirty_rate), (500 * MIB, 1000 * MIB));
        // Progress: as it is.
        assert_eq!(round(&mut judge, 500).1, Decision::Again);
        assert_eq!(judge.throttle(), Some(slowed));
        // None: more.
        assert_eq!(round(&mut judge, 480).1, Decision::Again);
        assert_eq!(judge.throttle().unwrap().limit, 250 * MIB);
        assert_eq!(round(&mut judge, 250).1, Decision::Again);
        assert_eq!(round(&mut judge, 240).1, Decision::Switch(None));
        // There is an end to it.
        let told = (0..30).map(|_| round(&mut judge, 1000).1).find(|told| *told != Decision::Again);
        let Some(Decision::GiveUp(why)) = told else { panic!("{told:?}") };
        assert!(why.message.contains("its writers were slowed to 15.6 MiB/s"), "{why}");
    }

    #[test]
    fn nobody_is_slowed_for_a_handover_that_takes_too_long() {
        let policy = Policy::default().with_on_stall(OnStall::Throttle).with_downtime_limit(ms(2));
        let (mut judge, mut round) = (Judge::new(policy, QUICK), seconds());
        let told = (0..30).map(|_| round(&mut judge, 0).1).find(|told| *told != Decision::Again);
        assert!(matches!(told, Some(Decision::GiveUp(_))), "{told:?}");
        assert_eq!(judge.throttle(), None);
    }

    #[test]
    fn the_limit_may_change_meanwhile() {
        let mut judge = Judge::new(Policy::default(), QUICK);
        let mut round = seconds();
        // Under the limit of 300 ms, and worth another round; then under the limit no more.
        assert_eq!(round(&mut judge, 250).1, Decision::Again);
        judge.limit_downtime(ms(100));
        assert_eq!(round(&mut judge, 240).1, Decision::Again);
        judge.limit_downtime(ms(400));
        assert_eq!(round(&mut judge, 240).1, Decision::Switch(None));
        assert_eq!(judge.downtime_limit(), ms(400));
    }

    #[test]
    fn the_last_round_that_keeps_to_the_limit_is_not_risked() {
        // Under the limit of 300 ms, and shorter than before by more than a quarter.
        let rounds = [(900, 1), (248, 1)];
        let two = decisions(Policy::default().with_max_rounds(2), &rounds);
        assert_eq!(two[1], (ms(251), Decision::Switch(None)));
        let three = decisions(Policy::default().with_max_rounds(3), &rounds);
        assert_eq!(three[1].1, Decision::Switch(None), "a third round could not be mended");
        let four = decisions(Policy::default().with_max_rounds(4), &rounds);
        assert_eq!(four[1].1, Decision::Again);
        // Two seconds have passed; two more rounds of a quarter second each still fit in, or do not.
        let timed = |limit| Policy::default().with_timeout(Some(ms(limit)));
        assert_eq!(decisions(timed(2400), &rounds)[1].1, Decision::Switch(None));
        assert_eq!(decisions(timed(2600), &rounds)[1].1, Decision::Again);
        // Exactly out of time, and under the limit all the same.
        assert_eq!(decisions(timed(2000), &rounds)[1].1, Decision::Switch(None));
    }

    #[test]
    fn a_risk_that_was_lost_is_not_taken_again() {
        let rounds = [(900, 1), (248, 1), (100, 205), (170, 1)];
        let told: Vec<_> = decisions(Policy::default(), &rounds).into_iter().map(|(_, told)| told).collect();
        assert_eq!(told, [Decision::Again, Decision::Again, Decision::Again, Decision::Switch(None)]);
    }

    #[test]
    fn a_verdict_names_every_part_and_what_is_at_fault() {
        let story = |rounds: &[(u64, u64)]| match decisions(
            Policy::default().with_max_rounds(rounds.len() as u32),
            rounds,
        )
        .pop()
        {
            Some((_, Decision::GiveUp(why))) => why.message,
            other => panic!("{other:?}"),
        };
        let slow_barrier = story(&[(100, 205)]);
        assert!(
            slow_barrier.contains(
                "a blackout of 307.0 ms is expected (limit 300.0 ms): 100.0 ms to send the 100 MiB"
            ) && slow_barrier.contains("205.0 ms for the barrier, and 2.0 ms for the handover itself"),
            "{slow_barrier}"
        );
        assert!(slow_barrier.starts_with("too much memory is still dirty"), "{slow_barrier}");
        let stalled = story(&[(900, 1), (900, 1), (900, 1), (900, 1)]);
        assert!(stalled.starts_with("the guest dirties memory faster than it can be sent"), "{stalled}");
        let lost = story(&[(900, 1), (248, 1), (900, 1), (900, 1)]);
        assert!(lost.ends_with("after an earlier round it was 251.0 ms; raise the downtime limit, or choose to switch over on a stall"), "{lost}");
    }

    #[test]
    fn a_handover_is_what_both_sides_say_and_the_messages_between() {
        let unknown = Handover::default();
        assert_eq!(unknown.expected(), 2 * UNKNOWN_HANDOVER);
        let one_says = Handover { source: Some(ms(300)), ..unknown };
        assert_eq!(one_says.expected(), ms(600), "the other side is no quicker");
        let both_say = Handover { destination: Some(ms(10)), ..one_says };
        assert_eq!(both_say.expected(), ms(310));
        assert_eq!(Handover { round_trip: ms(20), ..both_say }.expected(), ms(350));
        assert_eq!(Handover { known: Some(ms(200)), ..both_say }.expected(), ms(310), "the longer counts");
        assert_eq!(Handover { known: Some(ms(400)), ..both_say }.expected(), ms(400));
        assert_eq!(Handover { known: Some(ms(30)), ..unknown }.expected(), ms(30), "measured, not guessed");
    }

    #[test]
    fn a_handover_over_the_limit_is_not_begun() {
        let facts = RoundFacts {
            sent: 1000 * MIB,
            elapsed: Duration::from_secs(1),
            barrier: ms(1),
            remaining: 0,
            total_elapsed: Duration::from_secs(1),
        };
        let decide = |limit, source| {
            let policy = Policy::default().with_downtime_limit(ms(limit)).with_max_rounds(1);
            Judge::new(policy, Handover { source: Some(ms(source)), ..QUICK }).round(&facts)
        };
        let (predicted, decision) = decide(300, 300);
        assert_eq!(predicted, ms(302), "with the destination's 1 ms and the barrier's");
        let Decision::GiveUp(why) = decision else { panic!("{decision:?}") };
        assert!(why.message.starts_with("a switchover takes longer than the downtime limit"), "{why}");
        assert!(why.message.contains("a blackout of 302.0 ms is expected (limit 300.0 ms)"), "{why}");
        assert!(
            why.message.contains("1.0 ms for the barrier, and 301.0 ms for the handover itself"),
            "{why}"
        );
        assert_eq!(decide(310, 300).1, Decision::Switch(None));
    }

    #[test]
    fn a_quicker_barrier_corrects_the_round_trip() {
        let slow_greeting = Handover { round_trip: ms(100), ..QUICK };
        let mut judge = Judge::new(Policy::default(), slow_greeting);
        assert_eq!(judge.predict(0, ms(5)), ms(5 + 2 + 200));
        let facts =
            RoundFacts { sent: 0, elapsed: ms(10), barrier: ms(5), remaining: 0, total_elapsed: ms(10) };
        assert_eq!(judge.observe(&facts), ms(5 + 2 + 10));
    }

    #[test]
    fn an_operator_may_switch_over_the_limit_and_the_report_says_so() {
        let judge = Judge::new(Policy::default(), QUICK);
        assert_eq!(judge.switch_now(ms(300)), None);
        let why = judge.switch_now(ms(800)).unwrap();
        assert!(why.contains("800.0 ms") && why.contains("limit 300.0 ms"), "{why}");
    }

    #[test]
    fn a_rate_of_nothing_predicts_forever_without_overflow() {
        let mut judge = Judge::new(Policy::default(), QUICK);
        let facts = RoundFacts {
            sent: MIN_RATE_SAMPLE,
            elapsed: Duration::MAX,
            barrier: Duration::MAX,
            remaining: u64::MAX,
            total_elapsed: Duration::MAX,
        };
        assert_eq!(judge.round(&facts), (Duration::MAX, Decision::Again));
    }
}
