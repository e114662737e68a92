//! Where and how a guest is moved.

use super::super::choice::{ENCRYPTION, ON_STALL, TRANSPORTS, one_of};
use super::security::SecurityArgs;
use super::target::{HostArgs, Target};
use super::values::{bandwidth, bandwidth_or_none};
use clap::builder::TypedValueParser;
use clap::{ArgGroup, Args};
use migration::policy::OnStall;
use std::ops::RangeInclusive;
use std::time::Duration;
use whimbrel::api::model::TransportChoice;
use whimbrel::security::Encryption;

#[derive(Args, Debug)]
pub struct MigrateArgs {
    #[command(flatten)]
    pub target: Target,
    /// Where to: the host, or the address where a receiver listens. The port is 4444 unless one is given
    #[arg(long, value_name = "HOST[:PORT]")]
    pub to: String,
    /// Return at once instead of watching
    #[arg(long)]
    pub detach: bool,
    /// Only ask: the destination builds the machine, and drops it before any memory travels
    #[arg(long, conflicts_with_all = ["detach", "pause_before_switchover"])]
    pub dry_run: bool,
    /// Wait before the switchover until `whimbrel switch-now` is given, at most for so long. The guest runs
    /// on meanwhile
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub pause_before_switchover: Option<Duration>,
    #[command(flatten)]
    pub security: SecurityArgs,
    #[command(flatten)]
    pub policy: PolicyArgs,
}

#[derive(Args, Debug)]
#[command(group(ArgGroup::new("what").required(true).multiple(true).args(["downtime_limit", "bandwidth"])))]
pub struct ChangeArgs {
    #[command(flatten)]
    pub target: Target,
    /// Longest acceptable blackout
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub downtime_limit: Option<Duration>,
    /// Bits of memory that travel in a second at most, such as 10G; `none` for no cap
    #[arg(long, value_name = "BITS", value_parser = bandwidth_or_none)]
    pub bandwidth: Option<u64>,
}

#[derive(Args, Debug)]
pub struct EvacuateArgs {
    #[command(flatten)]
    pub host: HostArgs,
    /// Hosts to move the machines to, which take turns; a machine that one refuses is tried at the next. The
    /// port is 4444 unless one is given
    #[arg(long, value_name = "HOST[:PORT],...", value_delimiter = ',', required = true)]
    pub to: Vec<String>,
    /// How many machines are moved at once
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = number(1..=64))]
    pub parallel: usize,
    /// Only ask, for each machine by itself: a host builds it, and drops it before any memory travels
    #[arg(long)]
    pub dry_run: bool,
    /// Answer as JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub security: SecurityArgs,
    #[command(flatten)]
    pub policy: PolicyArgs,
}

/// A number in a range.
fn number(range: RangeInclusive<i64>) -> impl TypedValueParser<Value = usize> {
    clap::value_parser!(u16).range(range).map(usize::from)
}

/// How to move.
#[derive(Args, Clone, Debug)]
pub struct PolicyArgs {
    /// How memory travels
    #[arg(long, default_value = "auto", value_parser = one_of(TRANSPORTS))]
    pub transport: TransportChoice,
    /// What is encrypted if there are certificates: all but memory over RDMA (preferred), all, so that RDMA
    /// is not used (required), or not even memory over TCP, if the receiver permits that (off)
    #[arg(long, default_value = "preferred", value_parser = one_of(ENCRYPTION))]
    pub encryption: Encryption,
    /// TCP streams; 0 for the default
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=64))]
    pub streams: u16,
    /// RDMA queue pairs; 0 for the default
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=64))]
    pub queue_pairs: u16,
    /// Spin on RDMA completions instead of sleeping: shorter waits, but each queue pair keeps a processor
    /// busy
    #[arg(long)]
    pub busy_poll: bool,
    /// Longest acceptable blackout
    #[arg(long, default_value = "300ms", value_parser = humantime::parse_duration)]
    pub downtime_limit: Duration,
    /// The most that memory may take of the network while the guest runs, in bits a second: 10G is 10 Gb/s.
    /// What travels in the blackout is not held back
    #[arg(long, value_name = "BITS", value_parser = bandwidth)]
    pub bandwidth: Option<u64>,
    /// The most pre-copy rounds
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..))]
    pub max_rounds: u32,
    /// The longest time until the guest is handed over, such as 2m. Without it, memory is copied as long as
    /// that makes progress
    #[arg(long, value_parser = humantime::parse_duration)]
    pub timeout: Option<Duration>,
    /// What to do with a guest that dirties memory faster than it can be sent
    #[arg(long, default_value = "abort", value_parser = one_of(ON_STALL))]
    pub on_stall: OnStall,
    /// Compare all memory on both sides before handing over (lengthens the blackout)
    #[arg(long)]
    pub compare_memory: bool,
    /// How long the destination may give no sign of life before it counts as lost
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
    pub silence: Duration,
}
