//! The operator's limits for a migration.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What to do with a guest that dirties memory faster than it can be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(utoipa::ToSchema))]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum OnStall {
    /// Give the migration up; the guest continues to run here.
    #[default]
    Abort,
    /// Switch over all the same, with a blackout over the limit.
    Switch,
    /// Slow the guest's writers, just as much as it takes to keep to the limit; give up if that does not do.
    Throttle,
}

/// The operator's limits. Begin with the default and change what is to differ:
///
/// ```
/// # use whimbrel_migration::policy::Policy;
/// # use std::time::Duration;
/// let policy = Policy::default().with_downtime_limit(Duration::from_millis(50)).with_max_rounds(10);
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Policy {
    /// Longest blackout that is acceptable.
    pub downtime_limit: Duration,
    /// Most pre-copy rounds.
    pub max_rounds: u32,
    /// Most time for the migration, from its begin until the guest is handed over; `None` for no limit. When
    /// it has passed, any migration but one under [`OnStall::Switch`] stops wherever it is, inside a round
    /// too; only a switchover that has begun gets a second more than
    /// [`downtime_limit`](Self::downtime_limit). Under [`OnStall::Switch`], the round under way becomes the
    /// last. Waiting for an operator does not count.
    pub timeout: Option<Duration>,
    /// Rounds without progress (a tenth off the best prediction) after which it has stalled.
    pub stall_rounds: u32,
    /// What to do when it stalls, or runs out of rounds or time, over the limit.
    pub on_stall: OnStall,
    /// Bytes of memory that travel in a second at most, all lanes together, while the guest runs; `None` for
    /// no cap. What travels in the blackout is not held back, since the guest stands still. Predictions
    /// reckon with the cap, so a blackout is shorter than they say.
    #[serde(default)]
    pub bandwidth: Option<u64>,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            downtime_limit: Duration::from_millis(300),
            max_rounds: 30,
            timeout: None,
            stall_rounds: 3,
            on_stall: OnStall::Abort,
            bandwidth: None,
        }
    }
}

impl Policy {
    /// The same with another [`downtime_limit`](Self::downtime_limit).
    pub fn with_downtime_limit(self, downtime_limit: Duration) -> Self {
        Policy { downtime_limit, ..self }
    }

    /// The same with another [`max_rounds`](Self::max_rounds).
    pub fn with_max_rounds(self, max_rounds: u32) -> Self {
        Policy { max_rounds, ..self }
    }

    /// The same with another [`timeout`](Self::timeout).
    pub fn with_timeout(self, timeout: Option<Duration>) -> Self {
        Policy { timeout, ..self }
    }

    /// The same with other [`stall_rounds`](Self::stall_rounds).
    pub fn with_stall_rounds(self, stall_rounds: u32) -> Self {
        Policy { stall_rounds, ..self }
    }

    /// The same with another [`on_stall`](Self::on_stall).
    pub fn with_on_stall(self, on_stall: OnStall) -> Self {
        Policy { on_stall, ..self }
    }

    /// The same with another [`bandwidth`](Self::bandwidth).
    pub fn with_bandwidth(self, bandwidth: Option<u64>) -> Self {
        Policy { bandwidth, ..self }
    }
}
