//! What each subcommand measures.

use crate::args::{BlackoutArgs, MatrixArgs, Populate, ThroughputArgs, TransportArgs, UntouchedArgs};
use crate::contender::{self, Contender, Peers};
use crate::guest::{self, Content, Guest};
use crate::moves::Move;
use crate::peers::perftest::{Perftest, Tool};
use crate::plan::Plan;
use crate::record::{self, Setup};
use crate::transport::client::{Probe, Test};
use crate::transport::{Completion, Terms};
use anyhow::ensure;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;
use whimbrel::api::model::TransportChoice;

/// Bytes that iperf3 sends: some seconds' worth.
const IPERF3_BYTES: u64 = 4 << 30;

/// Messages up to this many bytes are also measured one by one.
const LARGEST_LATENCY: u64 = 1 << 20;

/// Seconds of a bandwidth that perftest measures: it counts whole messages, and not those under way at the end.
const LEAST_PERFTEST: u64 = 2;

/// A move of `guest` by the defaults, which are what an operator gets.
fn usual(program: PathBuf, guest: Guest, settle: Duration) -> Move {
    Move {
        program,
        guest,
        populate: false,
        transport: TransportChoice::Auto,
        via: IpAddr::V4(Ipv4Addr::LOCALHOST),
        streams: 0,
        settle,
        watch: false,
    }
}

/// A move by us, and what it is called.
fn ours(who: impl Into<String>, plan: Move) -> (Setup, Contender) {
    (contender::setup(&plan.guest, plan.populate, who), Contender::Whimbrel(plan))
}

/// Timer interrupts a second of a guest whose throughput is measured. The peers' guests are paused all the while; ours
/// runs, but is to take from the processors no more than a kernel at rest would: where KVM emulates, each tick costs
/// thousands of instructions.
const CALM_HZ: u32 = 100;

/// The blackout: how long a guest is away when it moves.
///
/// Two clocks tell. The source's, from the pause to the destination's word that the guest runs, which is
/// longer than the truth by half a round trip. And the guest's own: it looks at the clock all the time (an
/// idle one whenever its timer wakes it, a thousand times a second) and keeps the longest gap of the
/// switchover, which begins just before the pause and ends 300 ms after the guest runs again, so that the
/// aftermath counts too. *Felt beyond the usual* is that gap less the 99th percentile of the gaps that the
/// same guest felt outside the switchover.
///
/// # Errors
/// When the program is not there.
pub fn blackout(args: &BlackoutArgs) -> anyhow::Result<Plan> {
    let (vcpus, working_set) = (args.vcpus, args.working_set);
    let guest = Guest { vcpus, working_set, ..Guest::idle(args.memory, Content::Untouched) };
    // The guest's usual gaps come from the second that it runs before.
    let plan = usual(args.common.program()?, guest, Duration::from_secs(1));
    Ok(Plan {
        bench: "blackout",
        show: &[
            "felt_ms",
            "switchover_gap_ms",
            "usual_gap_ms",
            "earlier_gap_ms",
            "blackout_ms",
            "last_write_ms",
            "last_write_felt_ms",
            "rounds",
            "last_round_kib",
            "slowed_percent",
        ],
        rounds: args.rounds,
        warm_up: false,
        // An idle guest does not move for long enough to be slowed down.
        contenders: vec![ours("whimbrel", Move { watch: working_set > 0, ..plan })],
    })
}

/// A large guest that has touched next to nothing: what it costs to move memory that does not exist.
///
/// # Errors
/// When the program is not there.
pub fn untouched(args: &UntouchedArgs) -> anyhow::Result<Plan> {
    let guest = Guest::idle(args.memory, Content::Untouched);
    let plan = usual(args.common.program()?, guest, Duration::from_millis(300));
    Ok(Plan {
        bench: "untouched",
        show: &["total_ms", "setup_ms", "blackout_ms", "sent_mib", "resident_mib", "process_mib"],
        rounds: args.rounds,
        warm_up: false,
        contenders: vec![ours("whimbrel", plan)],
    })
}

/// How fast a guest full of random content moves, beside peers in the same run.
///
/// # Errors
/// When the program is not there.
pub fn throughput(args: &ThroughputArgs) -> anyhow::Result<Plan> {
    let guest = Guest { timer_hz: Some(CALM_HZ), ..Guest::idle(args.memory, Content::Random) };
    let mut contenders = Vec::new();
    let mut programs = vec![("whimbrel", args.common.program()?)];
    programs.extend(args.against.clone().map(|path| ("whimbrel (against)", path)));
    for (name, program) in programs {
        for streams in &args.contest.streams {
            let plan = usual(program.clone(), guest.clone(), Duration::from_millis(200));
            let plan = Move { populate: args.populate, streams: *streams, ..plan };
            contenders.push(ours(format!("{name}, {}", by_streams(*streams)), plan));
        }
    }
    contenders.extend(Peers::from(args.contest.peers.clone()).beside(&guest, args.populate));
    Ok(Plan {
        bench: "throughput",
        show: &["stream_mib_s", "migration_mib_s", "source_cpu_s_per_gib", "target_cpu_s_per_gib"],
        rounds: args.contest.rounds,
        warm_up: !args.contest.no_warm_up,
        contenders,
    })
}

/// Guests of every combination.
///
/// # Errors
/// When the program is not there.
pub fn matrix(args: &MatrixArgs) -> anyhow::Result<Plan> {
    let program = args.common.program()?;
    let peers = Peers::from(args.contest.peers.clone());
    let mut contenders = Vec::new();
    for guest in guests(args) {
        for populate in args.populate.iter().map(|populate| *populate == Populate::Yes) {
            for transport in &args.transport {
                for streams in &args.contest.streams {
                    let plan = usual(program.clone(), guest.clone(), Duration::from_secs(1));
                    let (transport, streams, via) = (*transport, *streams, args.via);
                    let plan = Move { populate, transport, streams, via, watch: true, ..plan };
                    contenders.push(ours(way(transport, streams), plan));
                }
            }
            contenders.extend(peers.beside(&guest, populate));
        }
    }
    Ok(Plan {
        bench: "matrix",
        show: &[
            "moving_ms",
            "migration_mib_s",
            "source_cpu_s_per_gib",
            "felt_ms",
            "switchover_gap_ms",
            "blackout_ms",
            "slowed_percent",
        ],
        rounds: args.contest.rounds,
        warm_up: !args.contest.no_warm_up,
        contenders,
    })
}

/// What is measured of a transport towards the server at `to`, one plan a test.
///
/// # Errors
/// When the transport has none of that.
pub fn transport(args: &TransportArgs, to: &str) -> anyhow::Result<Vec<Plan>> {
    let rdma = args.transport == TransportChoice::Rdma;
    let all = [Test::Bandwidth, Test::Latency, Test::Registration];
    let tests = if args.test.is_empty() { &all[..if rdma { 3 } else { 2 }] } else { &args.test };
    ensure!(rdma || !tests.contains(&Test::Registration), "only RDMA registers memory: use --transport rdma");
    ensure!(rdma || !args.perftest, "perftest is the reference for RDMA: use --transport rdma");
    let plan = |test: &Test| match test {
        Test::Bandwidth => bandwidth(args, to),
        Test::Latency => latency(args, to),
        Test::Registration => registration(args, to),
    };
    Ok(tests.iter().map(plan).collect())
}

/// How much a transport carries without a guest.
fn bandwidth(args: &TransportArgs, to: &str) -> Plan {
    let mut contenders = Vec::new();
    let time = Duration::from_secs_f64(args.time);
    for streams in &args.parallel {
        let group = lanes(args.transport, *streams);
        for length in &args.length {
            for (completion, depth) in ways(args) {
                let base = base(args, to, Test::Bandwidth);
                let terms = Terms { completion, ..base.terms };
                contenders
                    .push(probe(&group, Probe { streams: *streams, size: *length, terms, depth, ..base }));
            }
        }
        if args.iperf3 {
            let contender = Contender::Iperf3 { bytes: IPERF3_BYTES, streams: *streams };
            contenders.push((without_guest(&group, "iperf3 -Z".into()), contender));
        }
        if args.perftest {
            contenders.push(perftest(args, to, &group, Tool::Bandwidth, args.length[0], *streams));
        }
        if args.copy {
            let contender = Contender::Copy { memory: args.memory, time };
            contenders.push((without_guest(&group, "copy of memory, 1 thread".into()), contender));
        }
    }
    Plan {
        bench: "transport, bandwidth",
        show: &["stream_mib_s", "messages_s", "source_cpu_s_per_gib", "target_cpu_s_per_gib"],
        rounds: args.rounds,
        warm_up: false,
        contenders,
    }
}

/// How long a transport takes to have one message confirmed.
fn latency(args: &TransportArgs, to: &str) -> Plan {
    let small = args.length.iter().copied().filter(|length| *length <= LARGEST_LATENCY);
    let mut contenders = Vec::new();
    for size in std::iter::once(0).chain(small) {
        let base = base(args, to, Test::Latency);
        // Ratios are for messages of one size, where there is something of that size to compare with.
        let group = if args.perftest { message(size) } else { lanes(args.transport, 1) };
        for completion in &args.completion {
            let terms = Terms { completion: *completion, ..base.terms };
            contenders.push(probe(&group, Probe { size, terms, ..base.clone() }));
        }
        if args.perftest {
            // Its smallest message stands beside a barrier.
            contenders.push(perftest(args, to, &group, Tool::Latency, size.max(2), 1));
        }
    }
    Plan {
        bench: "transport, latency",
        show: &["latency_us", "latency_p99_us", "latency_p99_9_us", "latency_p99_99_us", "latency_most_us"],
        rounds: args.rounds,
        warm_up: false,
        contenders,
    }
}

/// What it costs to make memory known to the devices.
fn registration(args: &TransportArgs, to: &str) -> Plan {
    let mut contenders = Vec::new();
    for pages in &args.page_size {
        let group = format!("{}, pages of {}", guest::size(args.memory), guest::size(pages.bytes()));
        for chunk in &args.chunk {
            let base = base(args, to, Test::Registration);
            let terms = Terms { pages: *pages, chunk: *chunk, ..base.terms };
            let who = format!("chunks of {}", guest::size(*chunk));
            let probe = Probe { terms, ..base };
            contenders.push((without_guest(&group, who), Contender::Transport(probe)));
        }
    }
    Plan {
        bench: "transport, registration",
        show: &["registered_ms_per_gib", "source_registered_ms_per_gib"],
        rounds: args.rounds,
        warm_up: false,
        contenders,
    }
}

/// Completion modes and depths, which only RDMA has.
fn ways(args: &TransportArgs) -> Vec<(Completion, u32)> {
    let each =
        |completion: &Completion| args.depth.iter().map(|depth| (*completion, *depth)).collect::<Vec<_>>();
    args.completion.iter().flat_map(each).collect()
}

/// One lane and a barrier alone, by which all that is measured of a transport differs.
fn base(args: &TransportArgs, to: &str, test: Test) -> Probe {
    Probe {
        to: to.into(),
        terms: Terms {
            transport: args.transport,
            memory: args.memory,
            pages: args.page_size[0],
            completion: args.completion[0],
            chunk: 0,
        },
        streams: 1,
        size: 0,
        batch: args.batch,
        depth: 0,
        time: Duration::from_secs_f64(args.time),
        test,
    }
}

fn without_guest(group: &str, who: String) -> Setup {
    Setup { group: group.into(), who, guest: None, populate: false }
}

fn perftest(
    args: &TransportArgs,
    to: &str,
    group: &str,
    tool: Tool,
    size: u64,
    queue_pairs: u16,
) -> (Setup, Contender) {
    let test = Perftest { tool, size, queue_pairs, seconds: (args.time.ceil() as u64).max(LEAST_PERFTEST) };
    let there_and_back = if tool == Tool::Latency { ", there and back" } else { "" };
    let who = format!("{}, {}{there_and_back}", test.name(), guest::size(size));
    (without_guest(group, who), Contender::Perftest { to: to.into(), test })
}

fn message(size: u64) -> String {
    if size == 0 { "a barrier alone".into() } else { guest::size(size) }
}

fn probe(group: &str, probe: Probe) -> (Setup, Contender) {
    let transport = record::value(probe.terms.transport);
    let mut who = format!("{}, {}", transport.as_str().unwrap_or_default(), message(probe.size));
    if probe.batch != 1 && probe.test == Test::Bandwidth {
        who += &format!(", {} at once", probe.batch);
    }
    if probe.depth != 0 {
        who += &format!(", {} under way", probe.depth);
    }
    if probe.terms.completion == Completion::BusyPoll {
        who += ", busy-poll";
    }
    (without_guest(group, who), Contender::Transport(probe))
}

/// What lanes are called.
fn lanes(transport: TransportChoice, n: u16) -> String {
    match (transport, n) {
        (TransportChoice::Rdma, 1) => "1 queue pair".into(),
        (TransportChoice::Rdma, n) => format!("{n} queue pairs"),
        _ => by_streams(n),
    }
}

/// Every guest that the arguments describe, once: a rate without a working set is none.
fn guests(args: &MatrixArgs) -> Vec<Guest> {
    let mut guests = Vec::new();
    for memory in &args.memory {
        for content in &args.content {
            for vcpus in &args.vcpus {
                for working_set in &args.working_set {
                    for rate in &args.rate {
                        let rate = if *working_set == 0 { 0 } else { rate.pages(*memory) };
                        let (working_set, vcpus) = (*working_set, *vcpus);
                        let timer_hz = args.timer_hz;
                        let guest = Guest::idle(*memory, *content);
                        let guest = Guest { vcpus, working_set, rate, timer_hz, ..guest };
                        if !guests.contains(&guest) {
                            guests.push(guest);
                        }
                    }
                }
            }
        }
    }
    guests
}

fn by_streams(streams: u16) -> String {
    match streams {
        0 => "default streams".into(),
        1 => "1 stream".into(),
        n => format!("{n} streams"),
    }
}

fn way(transport: TransportChoice, streams: u16) -> String {
    let transport = match transport {
        TransportChoice::Auto => "",
        TransportChoice::Tcp => "tcp, ",
        TransportChoice::Rdma => "rdma, ",
    };
    format!("whimbrel, {transport}{}", by_streams(streams))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    #[test]
    fn a_matrix_has_every_guest_once() {
        let line = "bench matrix -m 1G,2G --content untouched,random -c 1,2 --working-set 0,64M --rate 0,1% \
                    --populate no,yes --streams 1,4 --qemu-script peer --whimbrel /proc/self/exe";
        let Command::Matrix(args) = Cli::parse_from(line.split_whitespace()).command else {
            panic!("another command")
        };
        // An idle guest, and two rates of one that is not, of each of eight sizes, contents and vCPUs.
        assert_eq!(guests(&args).len(), 8 * 3);
        let plan = matrix(&args).unwrap();
        let ours = plan.contenders.iter().filter(|(setup, _)| setup.who.starts_with("whimbrel")).count();
        assert_eq!(ours, 8 * 3 * 2 * 2);
        // QEMU beside idle guests of random content: two sizes, two numbers of vCPUs, populated or not.
        assert_eq!(plan.contenders.len() - ours, 2 * 2 * 2);
    }
}
