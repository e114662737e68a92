//! What is measured of a transport without a guest.

use super::stream_count;
use crate::args::TransportArgs;
use crate::contender::Contender;
use crate::guest;
use crate::peers::perftest::{Perftest, Tool};
use crate::plan::Plan;
use crate::record::{self, Setup};
use crate::transport::client::{Probe, Test};
use crate::transport::{Completion, SessionConfig};
use anyhow::{bail, ensure};
use std::net::IpAddr;
use std::time::Duration;
use whimbrel::api::model::TransportChoice;

/// Bytes that iperf3 sends, which takes some seconds.
const IPERF3_BYTES: u64 = 4 << 30;

/// The latency of messages up to this many bytes is measured too.
const MAX_LATENCY_SIZE: u64 = 1 << 20;

/// The shortest time of perftest's bandwidth test in seconds. It counts whole messages only, so that a short
/// test loses those that are in flight at its end.
const MIN_PERFTEST_SECONDS: u64 = 2;

/// The tests of a transport with the server at `to`, one plan for each.
///
/// # Errors
/// When the transport does not have a test that was asked for.
pub fn transport(args: &TransportArgs, to: &str) -> anyhow::Result<Vec<Plan>> {
    let rdma = args.transport == TransportChoice::Rdma;
    let elsewhere = args.client.as_deref().filter(|host| !is_here(host));
    if let Some(host) = elsewhere.filter(|_| args.iperf3) {
        bail!(
            "--iperf3 measures within this machine, which is no reference for {host}; leave it out, and run \
             `iperf3 --server` there and `iperf3 --zerocopy --client {host}` here"
        );
    }
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

/// Whether a host is this machine's loopback interface, by whatever name.
fn is_here(host: &str) -> bool {
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Seconds that the runs of `plans` take at least.
pub fn least_seconds(args: &TransportArgs, plans: &[Plan]) -> f64 {
    plans.iter().map(|plan| f64::from(plan.rounds) * plan.contenders.len() as f64 * args.time).sum()
}

/// The bandwidth of a transport.
fn bandwidth(args: &TransportArgs, to: &str) -> Plan {
    let mut contenders = Vec::new();
    let time = Duration::from_secs_f64(args.time);
    for streams in &args.parallel {
        let group = lane_count(args.transport, *streams);
        for length in &args.length {
            for (completion, depth) in completions_and_depths(args) {
                let base_probe = base_probe(args, to, Test::Bandwidth);
                let terms = SessionConfig { completion, ..base_probe.terms };
                contenders.push(probe(
                    &group,
                    Probe { streams: *streams, size: *length, terms, depth, ..base_probe },
                ));
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
        show: &[
            "stream_mib_s",
            "stream_gbit_s",
            "messages_s",
            "source_cpu_s_per_gib",
            "target_cpu_s_per_gib",
        ],
        rounds: args.rounds,
        warm_up: false,
        contenders,
    }
}

/// How long it takes until a message is confirmed.
fn latency(args: &TransportArgs, to: &str) -> Plan {
    let small = args.length.iter().copied().filter(|length| *length <= MAX_LATENCY_SIZE);
    let mut contenders = Vec::new();
    for size in std::iter::once(0).chain(small) {
        let base_probe = base_probe(args, to, Test::Latency);
        // With perftest, messages of one size form a group, because ratios are taken within groups.
        let group = if args.perftest { message(size) } else { lane_count(args.transport, 1) };
        for completion in &args.completion {
            let terms = SessionConfig { completion: *completion, ..base_probe.terms };
            contenders.push(probe(&group, Probe { size, terms, ..base_probe.clone() }));
        }
        if args.perftest {
            // perftest's smallest message is compared with a barrier.
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

/// What it costs to register memory with the devices.
fn registration(args: &TransportArgs, to: &str) -> Plan {
    let mut contenders = Vec::new();
    for pages in &args.page_size {
        let group = format!("{}, pages of {}", guest::size(args.memory), guest::size(pages.bytes()));
        for chunk in &args.chunk {
            let base_probe = base_probe(args, to, Test::Registration);
            let terms = SessionConfig { pages: *pages, chunk: *chunk, ..base_probe.terms };
            let who = format!("chunks of {}", guest::size(*chunk));
            let probe = Probe { terms, ..base_probe };
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

/// Every combination of completion mode and depth, which only RDMA has.
fn completions_and_depths(args: &TransportArgs) -> Vec<(Completion, u32)> {
    let each =
        |completion: &Completion| args.depth.iter().map(|depth| (*completion, *depth)).collect::<Vec<_>>();
    args.completion.iter().flat_map(each).collect()
}

/// A probe with one lane that sends barriers only; each test changes what it needs.
fn base_probe(args: &TransportArgs, to: &str, test: Test) -> Probe {
    Probe {
        to: to.into(),
        terms: SessionConfig {
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
    Setup { group: group.into(), who, guest: None, populate: false, plain: None }
}

fn perftest(
    args: &TransportArgs,
    to: &str,
    group: &str,
    tool: Tool,
    size: u64,
    queue_pairs: u16,
) -> (Setup, Contender) {
    let test =
        Perftest { tool, size, queue_pairs, seconds: (args.time.ceil() as u64).max(MIN_PERFTEST_SECONDS) };
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

/// A number of lanes in words.
fn lane_count(transport: TransportChoice, n: u16) -> String {
    match (transport, n) {
        (TransportChoice::Rdma, 1) => "1 queue pair".into(),
        (TransportChoice::Rdma, n) => format!("{n} queue pairs"),
        _ => stream_count(n),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn args(more: &[&str]) -> TransportArgs {
        let words = ["whimbrel-bench", "transport"].iter().chain(more);
        match Cli::parse_from(words).command {
            Command::Transport(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_reference_within_this_machine_is_none_for_another_host() {
        for host in ["192.0.2.7", "host", "[2001:db8::7]"] {
            let refused =
                transport(&args(&["-c", host, "--iperf3"]), "to").err().expect("refused").to_string();
            assert!(refused.contains("no reference") && refused.contains(host), "{refused}");
            transport(&args(&["-c", host]), "to").unwrap();
        }
        for here in [&["--iperf3"][..], &["--iperf3", "-c", "localhost"], &["--iperf3", "-c", "[::1]"]] {
            transport(&args(here), "to").unwrap();
        }
    }

    #[test]
    fn how_long_it_takes_is_known_before() {
        let args = args(&["--rounds", "3", "-t", "2", "--test", "bandwidth", "-P", "1,2", "-l", "64K"]);
        let plans = transport(&args, "to").unwrap();
        assert_eq!(least_seconds(&args, &plans), 3.0 * 2.0 * 2.0);
    }
}
