//! What a migration was, in figures. Serialised as it is for `--json`.

use crate::failure::Failure;
use crate::transport::LaneStats;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Name of the [`Span`] in which the last pages travel.
pub(crate) const LAST_PAGES: &str = "last pages";

/// One pre-copy round, or the final one. All rounds that were made while the migration waited for an operator
/// are one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[non_exhaustive]
pub struct RoundReport {
    /// Number, from 0; the final round, in the blackout, is the last.
    pub round: u32,
    /// Bytes of pages that were dirty at its beginning (in round 0: all memory).
    pub dirty: u64,
    /// Bytes that travelled.
    pub sent: u64,
    /// Bytes that exist but hold zeros, and were only named or skipped.
    pub zero: u64,
    /// Bytes skipped because nobody ever touched them.
    pub untouched: u64,
    /// Microseconds from its beginning to the confirmed barrier.
    pub elapsed_us: u64,
    /// The barrier's part of that.
    pub barrier_us: u64,
    /// Bytes that were dirty again at the end.
    pub remaining: u64,
    /// Blackout in microseconds that was predicted after it.
    pub predicted_blackout_us: u64,
    /// Bytes that the guest was allowed to make dirty in a second meanwhile, if its writers were slowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttled_to: Option<u64>,
}

impl RoundReport {
    /// Counts a `later` round as part of this one.
    pub(crate) fn absorb(&mut self, later: &RoundReport) {
        *self = RoundReport {
            dirty: self.dirty + later.dirty,
            sent: self.sent + later.sent,
            zero: self.zero + later.zero,
            untouched: self.untouched + later.untouched,
            elapsed_us: self.elapsed_us + later.elapsed_us,
            barrier_us: self.barrier_us + later.barrier_us,
            ..*later
        };
    }
}

/// A transport that was not used, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[non_exhaustive]
pub struct Declined {
    /// Its name.
    pub transport: String,
    /// Why not.
    pub why: Failure,
}

/// A named part of the blackout on one side.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
pub struct Span {
    /// What was being done.
    pub name: String,
    /// How long it took, in microseconds.
    pub us: u64,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Verdict {
    /// The guest runs at the destination.
    Moved,
    /// The guest runs at the source.
    Stayed,
    /// The guest is paused at the source.
    Held,
}

/// The whole story.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[non_exhaustive]
pub struct Report {
    /// How it ended.
    pub verdict: Verdict,
    /// Why, unless the guest has moved.
    pub failure: Option<Failure>,
    /// Why a blackout over the limit was accepted, if it was.
    pub over_limit: Option<String>,
    /// Transport of the last round; empty if none was connected.
    pub transport: String,
    /// Transports that were not used, or broke in mid-flight.
    pub declined: Vec<Declined>,
    /// Guest memory in bytes.
    pub memory: u64,
    /// All rounds; the last is the one in the blackout, if it came so far.
    pub rounds: Vec<RoundReport>,
    /// Counters of each lane of the last transport.
    pub lanes: Vec<LaneStats>,
    /// Microseconds from the beginning to the end.
    pub total_us: u64,
    /// Microseconds until the data plane was connected: greeting, building, connecting.
    pub setup_us: u64,
    /// Microseconds of that in which the destination built the shadow machine.
    pub build_us: u64,
    /// Microseconds from the pause at the source to the destination's word that the guest runs;
    /// longer than the blackout by half a round trip. 0 if there was no switchover.
    pub blackout_us: u64,
    /// The blackout's parts, in order. What they leave of it passed between them.
    pub spans: Vec<Span>,
    /// CPU time in microseconds of the source's migration threads, those of its transport included.
    pub source_cpu_us: u64,
    /// Of that, microseconds in user space, as exactly as the kernel samples it: by the tick.
    pub source_user_us: u64,
    /// The same of the destination, if it said so.
    pub destination_cpu_us: Option<u64>,
    /// Bytes of guest memory resident at the destination afterwards, if it said so.
    pub destination_resident: Option<u64>,
    /// What the destination's VMM had to say afterwards, in its own form; `None` if it said nothing. Earlier
    /// programs called it the testimony.
    #[serde(alias = "testimony")]
    pub remarks: Option<String>,
    /// If the guest's writers were slowed: how many microseconds each vCPU stood still for that.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub throttled_us: Vec<u64>,
}

impl Report {
    /// The report of a migration of `memory` bytes that failed before the destination was reached.
    pub fn not_begun(failure: Failure, memory: u64) -> Self {
        Report { failure: Some(failure), ..Report::new(Verdict::Stayed, memory) }
    }

    /// A report of a migration of `memory` bytes that has nothing to tell but its end.
    pub fn new(verdict: Verdict, memory: u64) -> Self {
        Report {
            verdict,
            failure: None,
            over_limit: None,
            transport: String::new(),
            declined: Vec::new(),
            memory,
            rounds: Vec::new(),
            lanes: Vec::new(),
            total_us: 0,
            setup_us: 0,
            build_us: 0,
            blackout_us: 0,
            spans: Vec::new(),
            source_cpu_us: 0,
            source_user_us: 0,
            destination_cpu_us: None,
            destination_resident: None,
            remarks: None,
            throttled_us: Vec::new(),
        }
    }

    /// What the switchover took beyond the last pages: pausing, saving, loading, running, and the messages
    /// between. `None` if the guest has not moved. The next migration of a guest of this kind may be told by
    /// [`Migration::handover`](crate::source::Migration::handover).
    pub fn handover(&self) -> Option<Duration> {
        let parts = self.spans.iter().filter(|span| span.name != LAST_PAGES);
        (self.verdict == Verdict::Moved).then(|| Duration::from_micros(parts.map(|span| span.us).sum()))
    }

    /// Bytes that travelled, over all rounds.
    pub fn sent(&self) -> u64 {
        self.rounds.iter().map(|r| r.sent).sum()
    }

    /// Bytes found to be zero, over all rounds.
    pub fn zero(&self) -> u64 {
        self.rounds.iter().map(|r| r.zero).sum()
    }

    /// Bytes skipped as never touched.
    pub fn untouched(&self) -> u64 {
        self.rounds.iter().map(|r| r.untouched).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absorbed_rounds_add_up() {
        let mut first =
            RoundReport { round: 3, dirty: 8, sent: 4, elapsed_us: 10, remaining: 7, ..Default::default() };
        let later =
            RoundReport { round: 4, dirty: 1, sent: 1, elapsed_us: 5, remaining: 2, ..Default::default() };
        first.absorb(&later);
        let sum =
            RoundReport { round: 4, dirty: 9, sent: 5, elapsed_us: 15, remaining: 2, ..Default::default() };
        assert_eq!(first, sum);
    }

    #[test]
    fn the_handover_is_the_blackout_without_the_last_pages() {
        let mut report = Report::new(Verdict::Moved, 1 << 30);
        let span = |name: &str, us| Span { name: name.into(), us };
        report.spans = vec![span("pause", 10), span(LAST_PAGES, 1000), span("save state", 300_000)];
        assert_eq!(report.handover(), Some(Duration::from_micros(300_010)));
        // What a destination took that did not answer is no measure.
        report.verdict = Verdict::Held;
        assert_eq!(report.handover(), None);
    }
}
