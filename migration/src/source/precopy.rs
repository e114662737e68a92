//! Pre-copy: rounds until the switchover is due, then the final round inside it.

use super::path::Path;
use super::round::{RoundOptions, Rounds, Sent};
use crate::cpu::CpuTime;
use crate::dirty::DirtySet;
use crate::failure::{Code, Failure};
use crate::judge::{Decision, Judge, RoundFacts};
use crate::machine::{SourceMachine, Throttle};
use crate::memory::Ram;
use crate::message::Message;
use crate::monitor::{Monitor, Phase};
use crate::report::RoundReport;
use std::time::{Duration, Instant};

/// How often what the guest dirties is sent while the migration waits for an operator, and the destination is
/// told that the source is there.
const WAITING_ROUND: Duration = Duration::from_secs(1);

/// How often the destination is told that the source is there, while rounds follow each other.
const SIGN_OF_LIFE: Duration = Duration::from_secs(5);

/// What a switchover that begins in time may take at least before the deadline ends it, beyond the downtime
/// limit.
const SWITCHOVER_GRACE: Duration = Duration::from_secs(1);

/// The memory's side of one migration.
pub(super) struct Precopy<'a> {
    machine: &'a dyn SourceMachine,
    monitor: &'a Monitor,
    rounds: Rounds<'a>,
    judge: Judge,
    /// How long to wait for an operator's word before the switchover; `None` not to.
    patience: Option<Duration>,
    /// Whether the destination takes a word for a sign of life, and when it last got one.
    speaks: bool,
    spoke: Instant,
    /// Pages that are to travel in the next round, or were in the round that broke.
    dirty: DirtySet,
    /// Scratch of the same size.
    fresh_dirty: DirtySet,
    round: u32,
    /// When the migration began.
    began: Instant,
    /// Time that passed in waiting for an operator.
    waited: Duration,
    over_limit: Option<String>,
    reports: Vec<RoundReport>,
    lane_cpu: CpuTime,
    /// What the guest may write.
    throttle: Option<Throttle>,
}

/// What is left of a [`Precopy`] for the report.
pub(super) struct Story {
    pub(super) over_limit: Option<String>,
    pub(super) rounds: Vec<RoundReport>,
    /// CPU time of threads other than the one that asked for rounds.
    pub(super) lane_cpu: CpuTime,
}

impl<'a> Precopy<'a> {
    /// `patience`: how long to wait for an operator's word before the switchover, `None` not to. The
    /// migration `began` before its memory did.
    pub(super) fn new(
        machine: &'a dyn SourceMachine,
        ram: &'a Ram,
        monitor: &'a Monitor,
        judge: Judge,
        patience: Option<Duration>,
        speaks: bool,
        began: Instant,
    ) -> Self {
        Precopy {
            machine,
            monitor,
            rounds: Rounds::new(machine, ram, monitor),
            judge,
            patience,
            speaks,
            spoke: Instant::now(),
            dirty: DirtySet::empty(ram),
            fresh_dirty: DirtySet::empty(ram),
            round: 0,
            began,
            waited: Duration::ZERO,
            over_limit: None,
            reports: Vec::new(),
            lane_cpu: CpuTime::default(),
            throttle: None,
        }
    }

    /// Starts tracking and makes rounds until the policy or an operator decides.
    pub(super) fn run(&mut self, path: &mut Path<'_>) -> Result<(), Failure> {
        self.monitor.judged_by(self.judge.downtime_limit());
        self.monitor.enter(Phase::Precopy);
        self.machine.start_tracking()?;
        self.dirty.fill();
        loop {
            let facts = self.round(path)?;
            self.judge.set_bandwidth(self.monitor.bandwidth());
            if let Some(limit) = self.monitor.take_downtime_limit() {
                self.judge.limit_downtime(limit);
                self.monitor.judged_by(limit);
            }
            let (predicted, mut decision) = self.judge.round(&facts);
            self.predicted(predicted);
            if self.monitor.wants_switch() {
                decision = Decision::Switch(self.judge.switch_now(predicted));
            }
            self.slow_down()?;
            match decision {
                Decision::Again => self.sign_of_life(path, SIGN_OF_LIFE)?,
                // The round that follows the wait decides anew.
                Decision::Switch(_) if self.must_wait() => self.wait(path)?,
                Decision::Switch(over_limit) => {
                    self.over_limit = over_limit;
                    self.monitor.extend_deadline(self.judge.downtime_limit() + SWITCHOVER_GRACE);
                    // The guest is not paused for a switchover that has to end before it is made.
                    return self.monitor.stopped().map_or(Ok(()), Err);
                }
                Decision::GiveUp(why) => return Err(why),
            }
        }
    }

    /// Whether the guest was slowed.
    pub(super) fn slows(&self) -> bool {
        self.throttle.is_some()
    }

    /// Slows the guest's writers as the judge wants it.
    fn slow_down(&mut self) -> Result<(), Failure> {
        let throttle = self.judge.throttle();
        if throttle != self.throttle {
            self.machine.throttle(throttle)?;
            self.throttle = throttle;
            self.monitor.update(|p| p.throttled_to = throttle.map(|throttle| throttle.limit));
        }
        Ok(())
    }

    /// Sends what is dirty now that the guest is paused. Nothing is marked clean any more: no
    /// round follows, and a migration that fails after this begins tracking afresh.
    pub(super) fn finish(&mut self, path: &mut Path<'_>) -> Result<(), Failure> {
        self.machine.collect_dirty(&mut self.dirty)?;
        let dirty = self.dirty.bytes();
        let sent = self.send(path, false)?;
        self.note(dirty, &sent, 0);
        Ok(())
    }

    /// What there is to report.
    pub(super) fn into_story(self) -> Story {
        Story { over_limit: self.over_limit, rounds: self.reports, lane_cpu: self.lane_cpu }
    }

    /// Sends what is dirty, and finds what was dirtied meanwhile.
    fn round(&mut self, path: &mut Path<'_>) -> Result<RoundFacts, Failure> {
        let dirty = self.dirty.bytes();
        let sent = self.send(path, true)?;
        self.dirty.clear();
        self.machine.collect_dirty(&mut self.dirty)?;
        let remaining = self.dirty.bytes();
        self.note(dirty, &sent, remaining);
        Ok(RoundFacts {
            sent: sent.sent,
            elapsed: sent.elapsed,
            barrier: sent.barrier,
            remaining,
            total_elapsed: self.began.elapsed().saturating_sub(self.waited),
        })
    }

    /// Tells the destination that this side is there, if it has not been told for so long.
    fn sign_of_life(&mut self, path: &mut Path<'_>, interval: Duration) -> Result<(), Failure> {
        if self.speaks && self.spoke.elapsed() >= interval {
            path.send(&Message::Waiting.encode())?;
            self.spoke = Instant::now();
        }
        Ok(())
    }

    fn must_wait(&self) -> bool {
        self.patience.is_some() && !self.monitor.may_proceed()
    }

    /// Waits for an operator's word. Meanwhile what the guest dirties is sent every so often, so that little
    /// is left when it comes.
    fn wait(&mut self, path: &mut Path<'_>) -> Result<(), Failure> {
        let (began, written) = (Instant::now(), self.reports.len());
        let patience = self.patience.unwrap_or_default();
        // An operator's time is not the migration's.
        let deadline = self.monitor.deadline();
        self.monitor.set_deadline(None);
        self.monitor.enter(Phase::ReadyToSwitch);
        loop {
            let left = patience.saturating_sub(began.elapsed());
            self.monitor.await_orders(left.min(WAITING_ROUND));
            self.machine.collect_dirty(&mut self.dirty)?;
            if let Some(why) = self.monitor.stopped() {
                return Err(why);
            }
            if self.monitor.may_proceed() {
                break;
            }
            if began.elapsed() >= patience {
                return Err(Failure::new(
                    Code::TIMEOUT,
                    format_args!(
                        "nobody said within {patience:?} that the switchover may begin; the guest goes on here"
                    ),
                ));
            }
            self.sign_of_life(path, WAITING_ROUND)?;
            if !self.speaks {
                // A page at least: a destination that receives nothing at all gives up.
                self.dirty.insert(0, 0);
            }
            let facts = self.round(path)?;
            // However long the wait, it is one entry of the report.
            let entries = self.reports.len() - written;
            if entries > 1
                && let Some(later) = self.reports.pop()
                && let Some(first) = self.reports.last_mut()
            {
                first.absorb(&later);
            }
            let predicted = self.judge.observe(&facts);
            self.predicted(predicted);
        }
        self.waited += began.elapsed();
        self.monitor.set_deadline(deadline.map(|deadline| deadline + began.elapsed()));
        self.monitor.enter(Phase::Precopy);
        Ok(())
    }

    /// Sends the dirty pages; if the transport breaks, sends them all again over the next one,
    /// together with what was dirtied meanwhile. Nothing that the broken one carried since its last
    /// barrier counts as arrived, and zeros have to be named: it may have left anything there.
    fn send(&mut self, path: &mut Path<'_>, clear: bool) -> Result<Sent, Failure> {
        loop {
            let options = RoundOptions {
                round: self.round,
                // Only the first round is sparse: a page that was written exists.
                sparse: self.round == 0,
                // In the first round the destination's page still is as it was built.
                name_zeros: self.round > 0 || !path.fresh(),
                clear,
            };
            match self.rounds.send(path.plane()?, &self.dirty, options) {
                Ok(sent) => {
                    self.round += 1;
                    self.lane_cpu += sent.cpu;
                    return Ok(sent);
                }
                Err(why) => {
                    path.replace(why)?;
                    self.judge.start_over();
                    self.fresh_dirty.clear();
                    self.machine.collect_dirty(&mut self.fresh_dirty)?;
                    self.dirty.union(&self.fresh_dirty);
                }
            }
        }
    }

    /// Writes a round down.
    fn note(&mut self, dirty: u64, sent: &Sent, remaining: u64) {
        self.reports.push(RoundReport {
            round: self.round - 1,
            dirty,
            sent: sent.sent,
            zero: sent.zero,
            untouched: sent.untouched,
            elapsed_us: sent.elapsed.as_micros() as u64,
            barrier_us: sent.barrier.as_micros() as u64,
            remaining,
            predicted_blackout_us: 0,
            throttled_to: self.throttle.map(|throttle| throttle.limit),
        });
        let seconds = sent.elapsed.as_secs_f64().max(1e-6);
        self.monitor.update(|p| {
            p.rate = sent.sent as f64 / seconds;
            p.dirty_rate = Some(remaining as f64 / seconds);
            p.predicted_blackout_us = None;
        });
    }

    /// Adds what was predicted after the round that was written down last, and tells whoever watches.
    fn predicted(&mut self, blackout: Duration) {
        let us = u64::try_from(blackout.as_micros()).unwrap_or(u64::MAX);
        if let Some(report) = self.reports.last_mut() {
            report.predicted_blackout_us = us;
        }
        self.monitor.rounds_are(&self.reports);
        self.monitor.update(|p| p.predicted_blackout_us = Some(us));
        self.monitor.notify();
    }
}
