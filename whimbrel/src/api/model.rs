//! What the HTTP API takes and gives, as JSON. `docs/api.md` tells the same for people.

use crate::instance::SOFTWARE;
use crate::security::{Encryption, Secured, TlsFiles};
use migration::Failure;
use migration::destination;
use migration::monitor::Progress;
use migration::policy::{OnStall, Policy};
use migration::report::{Report, RoundReport};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use std::net::SocketAddr;
use std::time::Duration;
use utoipa::ToSchema;
use vmm::guest::Testimony;

/// `GET /v1/version`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Version {
    /// Of the program.
    pub version: String,
    /// Its name and version, as peers are told.
    pub software: String,
    /// Of the API: the first part of each path.
    pub api: String,
}

impl Version {
    /// That of this program.
    pub fn this() -> Self {
        Version { version: env!("CARGO_PKG_VERSION").into(), software: SOFTWARE.into(), api: "v1".into() }
    }
}

/// What a virtual machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VmState {
    /// A receiver that no guest has reached yet.
    Waiting,
    /// A receiver that is taking a guest in.
    Receiving,
    /// It runs here.
    Running,
    /// An operator has paused it.
    Paused,
    /// It is being moved away.
    Migrating,
    /// It was handed over and nobody confirmed: paused here until an operator decides.
    Held,
    /// It runs elsewhere now.
    Moved,
    /// It has ended.
    Ended,
}

/// `GET /v1/vm`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Vm {
    /// The machine's name; empty at a receiver that was given none, as long as it has no guest.
    pub name: String,
    /// What it is doing.
    pub state: VmState,
    /// Guest memory in bytes; 0 as long as a receiver does not know it.
    pub memory: u64,
    /// Number of virtual CPUs; 0 as long as a receiver has no guest.
    pub vcpus: u32,
    /// Process that runs it.
    pub pid: u32,
    /// Why the guest is paused though nobody has paused it: a disk cannot carry out its requests. It goes on
    /// by itself once that is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub trouble: Option<String>,
    /// What the embedded guest says of itself; absent for other guests.
    pub guest: Option<Testimony>,
}

/// What JSON calls it: a state, a phase.
pub fn word(value: &impl Serialize) -> String {
    serde_json::to_value(value).ok().and_then(|value| value.as_str().map(String::from)).unwrap_or_default()
}

/// `POST /v1/migration`: where to, and how. All but `to` may be left out. What was added after 0.2.0 is not
/// sent unless it is asked for: a machine whose process runs an earlier program refuses what it does not
/// know, and moves all the same when the command is newer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MigrationRequest {
    /// Where `whimbrel receive` listens, as `host:port`.
    #[schema(examples("hostb.example:4444"))]
    pub to: String,
    /// `auto`, or the one transport to use.
    #[serde(default)]
    pub transport: TransportChoice,
    /// TCP streams; 0 for the default.
    #[serde(default)]
    #[schema(maximum = 65535)]
    pub streams: u16,
    /// RDMA queue pairs; 0 for the default.
    #[serde(default)]
    #[schema(maximum = 65535)]
    pub queue_pairs: u16,
    /// Spin on RDMA completions instead of sleeping: shorter waits, a whole processor for each queue pair.
    #[serde(default)]
    pub busy_poll: bool,
    /// Longest acceptable blackout in milliseconds.
    #[serde(default = "default_downtime", deserialize_with = "at_most::<A_DAY_MS, _, _>")]
    #[schema(default = default_downtime, maximum = 86400000)]
    pub downtime_limit_ms: u64,
    /// Bits of memory that travel in a second at most while the guest runs; none for no cap.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(deserialize_with = "at_most::<A_PETABIT, _, _>")]
    #[schema(maximum = 1000000000000000u64)]
    pub bandwidth_bps: Option<u64>,
    /// Most pre-copy rounds.
    #[serde(default = "default_rounds")]
    #[schema(default = default_rounds, maximum = 4294967295u64)]
    pub max_rounds: u32,
    /// Most seconds of pre-copy.
    #[serde(default, deserialize_with = "at_most::<A_YEAR_S, _, _>")]
    #[schema(maximum = 31536000)]
    pub timeout_s: Option<u64>,
    /// What to do when the guest dirties memory too fast.
    #[serde(default)]
    pub on_stall: OnStall,
    /// Compare all memory on both sides before handing over.
    #[serde(default)]
    pub compare_memory: bool,
    /// Whether memory may travel unencrypted over RDMA.
    #[serde(default)]
    pub encryption: Encryption,
    /// Certificates to use instead of those that the process was given.
    #[serde(default, deserialize_with = "an_object")]
    pub tls: Option<TlsFiles>,
    /// Migrate to another host without certificates, if the process was given none.
    #[serde(default)]
    pub insecure: bool,
    /// Seconds without any sign from the destination after which it counts as lost.
    #[serde(default = "default_silence", deserialize_with = "at_most::<A_YEAR_S, _, _>")]
    #[schema(default = default_silence, maximum = 31536000)]
    pub silence_s: u64,
    /// Wait for an operator's word before the switchover, at most for so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[serde(deserialize_with = "at_most::<A_YEAR_S, _, _>")]
    #[schema(maximum = 31536000)]
    pub pause_before_switchover_s: Option<u64>,
    /// End before any memory travels, and tell whether anything speaks against the move.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
}

/// Times beyond these are no times that anybody waits for, and clocks cannot add them to the present.
const A_DAY_MS: u64 = 24 * 60 * 60 * 1000;
const A_YEAR_S: u64 = 365 * 24 * 60 * 60;
const A_PETABIT: u64 = 1_000_000_000_000_000;

/// A number that may be left out, up to `MOST`.
fn at_most<'de, const MOST: u64, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: Deserialize<'de> + Copy + Into<Option<u64>>,
    D: Deserializer<'de>,
{
    let value = T::deserialize(deserializer)?;
    match value.into() {
        Some(number) if number > MOST => {
            Err(serde::de::Error::custom(format_args!("{number} is too much: at most {MOST}")))
        }
        _ => Ok(value),
    }
}

/// A value with fields, if there is one: a list is none.
fn an_object<'de, T, D>(deserializer: D) -> Result<Option<T>, D::Error>
where
    T: DeserializeOwned,
    D: Deserializer<'de>,
{
    let fields = Option::<serde_json::Map<String, serde_json::Value>>::deserialize(deserializer)?;
    let value = |fields| serde_json::from_value(serde_json::Value::Object(fields));
    fields.map(value).transpose().map_err(serde::de::Error::custom)
}

fn default_downtime() -> u64 {
    Policy::default().downtime_limit.as_millis() as u64
}

fn default_rounds() -> u32 {
    Policy::default().max_rounds
}

fn default_silence() -> u64 {
    migration::source::Timeouts::default().data.as_secs()
}

impl MigrationRequest {
    /// The policy that the request asks for.
    pub fn policy(&self) -> Policy {
        Policy::default()
            .with_downtime_limit(Duration::from_millis(self.downtime_limit_ms))
            .with_max_rounds(self.max_rounds)
            .with_timeout(self.timeout_s.map(Duration::from_secs))
            .with_on_stall(self.on_stall)
            .with_bandwidth(self.bandwidth_bps.map(|bits| bits.div_ceil(8)))
    }
}

/// `PATCH /v1/migration`: what is to change in the migration that is under way. What is left out stays.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct MigrationChange {
    /// Longest acceptable blackout in milliseconds, from the end of the round under way on.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "at_most::<A_DAY_MS, _, _>")]
    #[schema(maximum = 86400000)]
    pub downtime_limit_ms: Option<u64>,
    /// Bits of memory that travel in a second at most while the guest runs; 0 for no cap.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "at_most::<A_PETABIT, _, _>")]
    #[schema(maximum = 1000000000000000u64)]
    pub bandwidth_bps: Option<u64>,
    /// What the host leaves for this migration, of what all its migrations together may send; 0 for no cap.
    /// The lower of the two counts. The host's service sets this by itself.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "at_most::<A_PETABIT, _, _>")]
    #[schema(maximum = 1000000000000000u64)]
    pub share_bps: Option<u64>,
    /// Switch over after the round under way, however long the blackout will be.
    pub switch_now: bool,
    /// Switch over as soon as the policy allows it, and wait for an operator no more.
    pub proceed: bool,
}

/// Which transports may be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TransportChoice {
    /// The best one that both sides have; another steps in if it breaks.
    #[default]
    Auto,
    /// RDMA or nothing.
    Rdma,
    /// TCP.
    Tcp,
}

/// `GET /v1/migration`: the migration that is under way, or the last one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Migration {
    /// Counts the migrations of this process, from 1.
    pub number: u64,
    /// Where to.
    pub to: String,
    /// Whether it is to end before any memory travels. If nothing speaks against the move, its report has no
    /// failure then.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub dry_run: bool,
    /// Who that is, and how what travels is encrypted; `None` as long as it is not known, and without
    /// certificates.
    #[serde(default)]
    pub secured: Option<Secured>,
    /// The longest acceptable blackout in milliseconds, as it is now; `None` before memory travels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_limit_ms: Option<u64>,
    /// Bits of memory that may travel in a second at most, as it is now; `None` for as many as there are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bps: Option<u64>,
    /// This moment.
    pub progress: Progress,
    /// The pre-copy rounds that are over, as long as there is no report, which has all of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rounds: Vec<RoundReport>,
    /// The whole story, once it is over.
    pub report: Option<Report>,
}

/// `GET /v1/arrival`: the guest that is being taken in, or the last one that was, or was not.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Arrival {
    /// Counts the guests that came to this process, from 1.
    pub number: u64,
    /// Where from.
    #[schema(value_type = String)]
    pub from: SocketAddr,
    /// Who that is, and how what travels is encrypted; `None` without certificates.
    #[serde(default)]
    pub secured: Option<Secured>,
    /// When it began, in UTC, by this host's clock.
    pub began: String,
    /// When it was over; `None` until then.
    pub ended: Option<String>,
    /// The program that sent it, once the guest runs here.
    pub sender: Option<String>,
    /// This moment, or the last one.
    pub progress: destination::Progress,
    /// Why the guest was not taken in, if so.
    pub failure: Option<Failure>,
}

/// What has happened, as `GET /v1/events` tells it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// Where it is in the order of its server's events: a time in microseconds since 1970, and no two have
    /// the same. Of those with which a stream begins, that from which it goes on.
    pub id: u64,
    /// When it happened, in UTC, by this host's clock.
    pub at: String,
    /// What has happened.
    pub event: EventKind,
    /// The machine that it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// With `machine`: what it is doing now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<VmState>,
    /// With `migration-…`: as it was at that moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<Migration>,
    /// With `arrival-…`: as it was at that moment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub arrival: Option<Arrival>,
    /// With `drain`: whether nobody is taken in from now on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drained: Option<bool>,
}

/// What can happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum EventKind {
    /// A machine is here, or its state is another one.
    Machine,
    /// A machine is not here any more.
    Gone,
    /// A migration from here has begun.
    MigrationBegun,
    /// It has come to another phase.
    MigrationPhase,
    /// A pre-copy round has ended.
    MigrationRound,
    /// It is over; its report tells how.
    MigrationEnded,
    /// A guest comes from another host.
    ArrivalBegun,
    /// It has arrived, or was not taken in.
    ArrivalEnded,
    /// The host takes nobody in from now on, or takes guests in again.
    Drain,
}

/// Body of every answer that is not 2xx.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong and what to do.
    pub error: Failure,
}
