//! What a migration was, in figures. Serialised as it is for `--json`.

use crate::failure::Failure;
use crate::message::Span;
use crate::transport::LaneStats;
use serde::{Deserialize, Serialize};

/// One pre-copy round, or the final one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
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
    /// Microseconds from begin to confirmed barrier.
    pub elapsed_us: u64,
    /// The barrier's part of that.
    pub barrier_us: u64,
    /// Bytes that were dirty again at the end.
    pub remaining: u64,
    /// Blackout in microseconds that was predicted after it.
    pub predicted_blackout_us: u64,
}

/// A transport that was not used, and why.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Declined {
    /// Its name.
    pub transport: String,
    /// Why not.
    pub why: Failure,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
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
    /// The blackout's parts, in order; together they are the blackout.
    pub spans: Vec<Span>,
    /// CPU time in microseconds of the source's migration threads, those of its transport included.
    pub source_cpu_us: u64,
    /// Of that, microseconds in user space, as exactly as the kernel samples it: by the tick.
    pub source_user_us: u64,
    /// The same of the destination, if it said so.
    pub destination_cpu_us: Option<u64>,
    /// Bytes of guest memory resident at the destination afterwards, if it said so.
    pub destination_resident: Option<u64>,
    /// What the destination's VMM had to say afterwards, in its own form; `None` if it said nothing.
    pub remarks: Option<String>,
}

impl Report {
    /// The report of a migration of `memory` bytes that failed before the destination was reached.
    pub fn not_begun(failure: Failure, memory: u64) -> Self {
        Report {
            verdict: Verdict::Stayed,
            failure: Some(failure),
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
        }
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
