//! What each subcommand measures.

mod transport;

pub use transport::{least_seconds, transport};

use crate::args::{BlackoutArgs, MatrixArgs, Populate, ThroughputArgs, UntouchedArgs};
use crate::contender::{self, Contender, Peers};
use crate::guest::{Content, Guest};
use crate::moves::Move;
use crate::plan::Plan;
use crate::record::Setup;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;
use whimbrel::api::model::TransportChoice;

/// A migration of `guest` with the defaults, which are what operators use.
fn default_move(program: PathBuf, guest: Guest, settle: Duration) -> Move {
    Move {
        program,
        guest,
        populate: false,
        transport: TransportChoice::Auto,
        via: IpAddr::V4(Ipv4Addr::LOCALHOST),
        streams: 0,
        tls: false,
        settle,
        sample_pace: false,
    }
}

/// A migration by Whimbrel, and its name.
fn whimbrel(who: impl Into<String>, plan: Move) -> (Setup, Contender) {
    (contender::setup(&plan.guest, plan.populate, who), Contender::Whimbrel(plan))
}

/// The same migration through TLS, which is measured beside the plain one.
fn through_tls((plain, contender): &(Setup, Contender)) -> Option<(Setup, Contender)> {
    let Contender::Whimbrel(plan) = contender else { return None };
    Some((contender::through_tls(plain), Contender::Whimbrel(Move { tls: true, ..plan.clone() })))
}

/// Timer interrupts a second of a guest whose throughput is measured. The peers' guests are paused all the
/// time. Ours runs, but it should take no more processor time than an idle kernel does: where KVM emulates,
/// each timer interrupt costs thousands of instructions.
const IDLE_TIMER_HZ: u32 = 100;

/// The blackout: how long a guest stands still when it moves.
///
/// Two clocks measure it. The source's clock runs from the pause until the destination reports that the guest
/// runs, which is too long by half a round trip. The guest's own clock is read by the guest all the time (an
/// idle guest reads it when its timer wakes it, a thousand times a second). The guest keeps the longest gap
/// of the switchover, which begins just before the pause and ends 300 ms after the guest runs again, so that
/// the aftermath counts too. *Felt beyond the usual* is that gap less the 99th percentile of the gaps that
/// the same guest felt outside the switchover.
///
/// # Errors
/// When the `whimbrel` program does not exist.
pub fn blackout(args: &BlackoutArgs) -> anyhow::Result<Plan> {
    let (vcpus, working_set) = (args.vcpus, args.working_set);
    let guest = Guest { vcpus, working_set, ..Guest::idle(args.memory, Content::Untouched) };
    // The guest's usual gaps are those of the second before it moves.
    let plan = default_move(args.common.program()?, guest, Duration::from_secs(1));
    // The migration of an idle guest is too short to slow it down.
    let mut contenders = vec![whimbrel("whimbrel", Move { sample_pace: working_set > 0, ..plan })];
    if args.tls {
        contenders.extend(through_tls(&contenders[0]));
    }
    Ok(Plan {
        bench: "blackout",
        show: &[
            "felt_ms",
            "switchover_gap_ms",
            "usual_gap_ms",
            "earlier_gap_ms",
            "setup_ms",
            "blackout_ms",
            "last_write_ms",
            "last_write_felt_ms",
            "rounds",
            "last_round_kib",
            "slowed_percent",
        ],
        rounds: args.rounds,
        warm_up: false,
        contenders,
    })
}

/// A large guest that has touched next to nothing: what it costs to move memory that has no pages.
///
/// # Errors
/// When the `whimbrel` program does not exist.
pub fn untouched(args: &UntouchedArgs) -> anyhow::Result<Plan> {
    let guest = Guest::idle(args.memory, Content::Untouched);
    let plan = default_move(args.common.program()?, guest, Duration::from_millis(300));
    Ok(Plan {
        bench: "untouched",
        show: &["total_ms", "setup_ms", "blackout_ms", "sent_mib", "resident_mib", "process_mib"],
        rounds: args.rounds,
        warm_up: false,
        contenders: vec![whimbrel("whimbrel", plan)],
    })
}

/// Processor time for which sealing and opening are measured in each round.
const CIPHER_TIME: Duration = Duration::from_millis(500);

/// How fast a guest full of random content moves, compared with peers in the same run.
///
/// # Errors
/// When the `whimbrel` program does not exist.
pub fn throughput(args: &ThroughputArgs) -> anyhow::Result<Plan> {
    let guest = Guest { timer_hz: Some(IDLE_TIMER_HZ), ..Guest::idle(args.memory, Content::Random) };
    let mut contenders = Vec::new();
    let mut programs = vec![("whimbrel", args.common.program()?)];
    programs.extend(args.against.clone().map(|path| ("whimbrel (against)", path)));
    for (name, program) in programs {
        for streams in &args.comparison.streams {
            let plan = default_move(program.clone(), guest.clone(), Duration::from_millis(200));
            let plan = Move { populate: args.populate, streams: *streams, ..plan };
            let plain = whimbrel(format!("{name}, {}", stream_count(*streams)), plan);
            let tls = args.tls.then(|| through_tls(&plain)).flatten();
            contenders.extend(std::iter::once(plain).chain(tls));
        }
    }
    let peers = Peers { tls: args.tls, ..Peers::from(args.comparison.peers.clone()) };
    contenders.extend(peers.beside(&guest, args.populate));
    if args.tls {
        let setup = contender::setup(&guest, args.populate, "AES-128-GCM, one processor");
        contenders.push((setup, Contender::Cipher { time: CIPHER_TIME }));
    }
    Ok(Plan {
        bench: "throughput",
        show: &[
            "stream_mib_s",
            "migration_mib_s",
            "source_cpu_s_per_gib",
            "target_cpu_s_per_gib",
            "sealed_mib_s",
            "opened_mib_s",
        ],
        rounds: args.comparison.rounds,
        warm_up: !args.comparison.no_warm_up,
        contenders,
    })
}

/// Guests of every combination of the arguments.
///
/// # Errors
/// When the `whimbrel` program does not exist.
pub fn matrix(args: &MatrixArgs) -> anyhow::Result<Plan> {
    let program = args.common.program()?;
    let peers = Peers::from(args.comparison.peers.clone());
    let mut contenders = Vec::new();
    for guest in guests(args) {
        for populate in args.populate.iter().map(|populate| *populate == Populate::Yes) {
            for transport in &args.transport {
                for streams in &args.comparison.streams {
                    let plan = default_move(program.clone(), guest.clone(), Duration::from_secs(1));
                    let (transport, streams, via) = (*transport, *streams, args.via);
                    let plan = Move { populate, transport, streams, via, sample_pace: true, ..plan };
                    contenders.push(whimbrel(whimbrel_name(transport, streams), plan));
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
        rounds: args.comparison.rounds,
        warm_up: !args.comparison.no_warm_up,
        contenders,
    })
}

/// Every guest that the arguments describe, once. A rate has no effect without a working set.
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

fn stream_count(streams: u16) -> String {
    match streams {
        0 => "default streams".into(),
        1 => "1 stream".into(),
        n => format!("{n} streams"),
    }
}

fn whimbrel_name(transport: TransportChoice, streams: u16) -> String {
    let transport = match transport {
        TransportChoice::Auto => "",
        TransportChoice::Tcp => "tcp, ",
        TransportChoice::Rdma => "rdma, ",
    };
    format!("whimbrel, {transport}{}", stream_count(streams))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    #[test]
    fn tls_is_measured_beside_plain() {
        let parse = |line: &str| Cli::parse_from(line.split_whitespace()).command;
        let whos = |plan: Plan| -> Vec<(String, Option<String>)> {
            plan.contenders.into_iter().map(|(setup, _)| (setup.who, setup.plain)).collect()
        };
        let line = "bench throughput --tls --streams 0,4 --iperf3 --whimbrel /proc/self/exe";
        let Command::Throughput(args) = parse(line) else { panic!("another command") };
        let plan = throughput(&args).unwrap();
        let through_tls = |contender: &Contender| matches!(contender, Contender::Whimbrel(plan) if plan.tls);
        assert!(plan.contenders.iter().all(|(setup, c)| through_tls(c) == setup.plain.is_some()));
        let beside = |plain: &str| (format!("{plain}, TLS"), Some(plain.to_string()));
        let alone = |who: &str| (who.to_string(), None);
        let (one, other) = ("whimbrel, default streams", "whimbrel, 4 streams");
        let peers = ["iperf3 -Z", "AES-128-GCM, one processor"].map(alone);
        let ours = [alone(one), beside(one), alone(other), beside(other)];
        assert_eq!(whos(plan), [&ours[..], &peers].concat());
        let line = "bench blackout --tls --whimbrel /proc/self/exe";
        let Command::Blackout(args) = parse(line) else { panic!("another command") };
        assert_eq!(whos(blackout(&args).unwrap()), [alone("whimbrel"), beside("whimbrel")]);
    }

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
        let whimbrel = plan.contenders.iter().filter(|(setup, _)| setup.who.starts_with("whimbrel")).count();
        assert_eq!(whimbrel, 8 * 3 * 2 * 2);
        // QEMU beside idle guests of random content: two sizes, two numbers of vCPUs, populated or not.
        assert_eq!(plan.contenders.len() - whimbrel, 2 * 2 * 2);
    }
}
