//! Pre-copy: rounds until the switchover is due, then the final round inside it.

use super::path::Path;
use super::round::{Manner, Rounds, Sent};
use crate::cpu::CpuTime;
use crate::dirty::DirtySet;
use crate::failure::{Code, Failure};
use crate::machine::SourceMachine;
use crate::memory::Ram;
use crate::monitor::{Monitor, Phase};
use crate::policy::{Decision, Judge, Policy, RoundFacts};
use crate::report::{Declined, RoundReport};
use crate::transport::{LaneStats, Session};
use std::time::{Duration, Instant};

/// What a switchover costs with nothing left to send, for the first prediction: saving, loading
/// and the messages between. Measured at 2 to 4 ms for small machines on a slow host.
const HANDOVER: Duration = Duration::from_millis(4);

/// The memory's side of one migration.
pub(super) struct Precopy<'a> {
    machine: &'a dyn SourceMachine,
    session: &'a Session,
    monitor: &'a Monitor,
    rounds: Rounds<'a>,
    judge: Judge,
    path: Path,
    /// Pages that are to travel in the next round, or were in the round that broke.
    dirty: DirtySet,
    /// Scratch of the same size.
    fresh_dirty: DirtySet,
    round: u32,
    pub(super) over_limit: Option<String>,
    pub(super) reports: Vec<RoundReport>,
    lane_cpu: CpuTime,
}

impl<'a> Precopy<'a> {
    pub(super) fn new(
        machine: &'a dyn SourceMachine,
        ram: &'a Ram,
        session: &'a Session,
        monitor: &'a Monitor,
        policy: Policy,
        path: Path,
    ) -> Self {
        Precopy {
            machine,
            session,
            monitor,
            rounds: Rounds::new(machine, ram, monitor),
            judge: Judge::new(policy, HANDOVER),
            path,
            dirty: DirtySet::empty(ram),
            fresh_dirty: DirtySet::empty(ram),
            round: 0,
            over_limit: None,
            reports: Vec::new(),
            lane_cpu: CpuTime::default(),
        }
    }

    /// Starts tracking and makes rounds until the policy decides. `retire`: see [`Path::replace`].
    pub(super) fn run(
        &mut self,
        declined: &mut Vec<Declined>,
        retire: &mut dyn FnMut(&str) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let began = Instant::now();
        self.monitor.update(|p| p.phase = Phase::Precopy);
        self.machine.start_tracking()?;
        self.dirty.fill();
        loop {
            let dirty = self.dirty.bytes();
            let sent = self.send(true, declined, retire)?;
            self.dirty.clear();
            self.machine.collect_dirty(&mut self.dirty)?;
            let facts = RoundFacts {
                sent: sent.sent,
                elapsed: sent.elapsed,
                barrier: sent.barrier,
                remaining: self.dirty.bytes(),
                total_elapsed: began.elapsed(),
            };
            let (predicted, decision) = self.judge.round(&facts);
            self.note(dirty, &sent, facts.remaining, predicted);
            match decision {
                Decision::Again => {}
                Decision::Switch(over_limit) => {
                    self.over_limit = over_limit;
                    return Ok(());
                }
                Decision::GiveUp(why) => return Err(why),
            }
        }
    }

    /// Sends what is dirty now that the guest is paused. Nothing is marked clean any more: no
    /// round follows, and a migration that fails after this begins tracking afresh.
    pub(super) fn finish(
        &mut self,
        declined: &mut Vec<Declined>,
        retire: &mut dyn FnMut(&str) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        self.machine.collect_dirty(&mut self.dirty)?;
        let dirty = self.dirty.bytes();
        let sent = self.send(false, declined, retire)?;
        self.note(dirty, &sent, 0, Duration::ZERO);
        Ok(())
    }

    /// Counters of the lanes in use.
    pub(super) fn lanes(&mut self) -> Vec<LaneStats> {
        let Some(plane) = self.path.plane() else { return Vec::new() };
        plane.lanes().iter().map(|lane| lane.stats()).collect()
    }

    /// CPU time that was used for memory by other threads than the one that asks for rounds.
    pub(super) fn cpu(&self) -> CpuTime {
        let mut cpu = self.lane_cpu;
        cpu += self.path.cpu();
        cpu
    }

    /// The transport in use.
    pub(super) fn transport(&mut self) -> &'static str {
        self.path.plane().map_or("", |plane| plane.name())
    }

    /// Sends the dirty pages; if the transport breaks, sends them all again over the next one,
    /// together with what was dirtied meanwhile. Nothing that the broken one carried since its last
    /// barrier counts as arrived, and zeros have to be named: it may have left anything there.
    fn send(
        &mut self,
        clear: bool,
        declined: &mut Vec<Declined>,
        retire: &mut dyn FnMut(&str) -> Result<(), Failure>,
    ) -> Result<Sent, Failure> {
        loop {
            // Only the first round is sparse: a page that was written exists.
            let manner = Manner {
                round: self.round,
                sparse: self.round == 0,
                name_zeros: !self.writes_fresh_memory(),
                clear,
            };
            let Some(plane) = self.path.plane() else {
                return Err(Failure::new(Code::TRANSPORT, "no data plane"));
            };
            match self.rounds.send(plane, &self.dirty, manner) {
                Ok(sent) => {
                    self.round += 1;
                    self.lane_cpu += sent.cpu;
                    return Ok(sent);
                }
                Err(why) => {
                    self.path.replace(why, retire, self.session, self.monitor, declined)?;
                    self.judge.start_over();
                    self.fresh_dirty.clear();
                    self.machine.collect_dirty(&mut self.fresh_dirty)?;
                    self.dirty.union(&self.fresh_dirty);
                }
            }
        }
    }

    /// Whether a zero page need not even be named: the destination's page still is as it was built.
    fn writes_fresh_memory(&self) -> bool {
        self.round == 0 && self.path.fresh()
    }

    fn note(&mut self, dirty: u64, sent: &Sent, remaining: u64, predicted: Duration) {
        let report = RoundReport {
            round: self.round - 1,
            dirty,
            sent: sent.sent,
            zero: sent.zero,
            untouched: sent.untouched,
            elapsed_us: sent.elapsed.as_micros() as u64,
            barrier_us: sent.barrier.as_micros() as u64,
            remaining,
            predicted_blackout_us: u64::try_from(predicted.as_micros()).unwrap_or(u64::MAX),
        };
        let seconds = sent.elapsed.as_secs_f64().max(1e-6);
        self.monitor.update(|p| {
            p.rate = sent.sent as f64 / seconds;
            p.dirty_rate = remaining as f64 / seconds;
            p.predicted_blackout_us = report.predicted_blackout_us;
        });
        self.reports.push(report);
    }
}
