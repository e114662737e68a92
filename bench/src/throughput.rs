//! How fast a guest full of random content moves, beside peers in the same run.
//!
//! Every round runs each contender once, in an order that turns from round to round, and ratios are
//! taken within a round: what the machine does meanwhile then hits all alike. Two rates are told. The
//! *stream* rate is bytes sent in round 0 over the time from its begin to the last lane's confirmed barrier;
//! iperf3's figure is of that kind. The *migration* rate is all bytes sent over the whole migration, from its
//! begin to the guest running at the destination; QEMU's figure is of that kind. Where the destination is
//! populated first, QEMU does that before its clock starts, so there the time in which our destination
//! builds its machine (population is nearly all of it) is left out as well.

use crate::args::ThroughputArgs;
use crate::moves::{Move, Moved};
use crate::output::{self, Outcome, brief, table, value};
use crate::peers::{iperf3, qemu};
use crate::statistics::{Distribution, pairwise};
use crate::warm;
use migration::report::Report;
use serde_json::{Map, Value, json};
use std::path::PathBuf;
use std::time::Duration;

/// How long the guest runs before it moves.
const SETTLE: Duration = Duration::from_millis(200);

/// Timer interrupts a second of the guest that is moved. The peers' guests are paused all the while; ours runs, but
/// is to take from the processors no more than a kernel at rest would: where KVM emulates, each tick costs
/// thousands of instructions.
const HZ: u32 = 100;

const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

/// One thing that is compared.
enum Contender {
    Whimbrel { program: PathBuf, streams: u16 },
    Iperf3,
    Qemu { script: PathBuf, multifd: u16 },
}

/// What one run of a contender measured, in MiB a second and CPU seconds for each GiB.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Figures {
    stream: Option<f64>,
    migration: Option<f64>,
    source_cpu: Option<f64>,
    target_cpu: Option<f64>,
}

/// One of them.
type Field = fn(&Figures) -> Option<f64>;

impl Figures {
    fn of_report(report: &Report, populated: bool) -> Self {
        let rate = |bytes: u64, us: u64| (us > 0).then(|| bytes as f64 / MIB / (us as f64 / 1e6));
        let before = if populated { report.build_us } else { 0 };
        let cpu = |us: u64| us as f64 / 1e6 / (report.sent().max(1) as f64 / GIB);
        Figures {
            stream: report.rounds.first().and_then(|round| rate(round.sent, round.elapsed_us)),
            migration: rate(report.sent(), report.total_us.saturating_sub(before)),
            source_cpu: Some(cpu(report.source_cpu_us)),
            target_cpu: report.destination_cpu_us.map(cpu),
        }
    }
}

impl Contender {
    fn run(&self, args: &ThroughputArgs) -> anyhow::Result<(Figures, Value)> {
        Ok(match self {
            Contender::Whimbrel { program, streams } => {
                let moved = Move {
                    program,
                    memory: args.memory,
                    vcpus: 1,
                    working_set: 0,
                    hz: Some(HZ),
                    fill: args.memory,
                    populate: args.populate,
                    streams: *streams,
                    settle: SETTLE,
                }
                .carry_out()?;
                (Figures::of_report(&moved.report, args.populate), Moved::value(&moved))
            }
            Contender::Iperf3 => {
                let said = iperf3::run(args.memory)?;
                let (source_cpu, target_cpu) = iperf3::cpu(&said);
                let stream = iperf3::rate(&said);
                (Figures { stream, migration: None, source_cpu, target_cpu }, said)
            }
            Contender::Qemu { script, multifd } => {
                let said = qemu::run(script, args.memory, *multifd, args.populate)?;
                let (source_cpu, target_cpu) = qemu::cpu(&said);
                (Figures { stream: None, migration: qemu::rate(&said), source_cpu, target_cpu }, said)
            }
        })
    }
}

/// Everything that is compared, each with its name; the first is what ratios are of.
fn contenders(args: &ThroughputArgs) -> anyhow::Result<Vec<(String, Contender)>> {
    let mut all = Vec::new();
    let mut programs = vec![("whimbrel", args.program.path()?)];
    programs.extend(args.against.clone().map(|path| ("whimbrel (against)", path)));
    for (name, program) in programs {
        for streams in &args.streams {
            let how = match streams {
                0 => "default streams".into(),
                1 => "1 stream".into(),
                n => format!("{n} streams"),
            };
            let contender = Contender::Whimbrel { program: program.clone(), streams: *streams };
            all.push((format!("{name}, {how}"), contender));
        }
    }
    if args.iperf3 {
        all.push(("iperf3 -Z".into(), Contender::Iperf3));
    }
    if let Some(script) = &args.qemu_script {
        let usual = [if args.populate { 2 } else { 4 }];
        let channels = if args.multifd.is_empty() { &usual[..] } else { &args.multifd };
        for multifd in channels {
            let contender = Contender::Qemu { script: script.clone(), multifd: *multifd };
            all.push((format!("QEMU, multifd {multifd}"), contender));
        }
    }
    Ok(all)
}

/// Measures.
///
/// # Errors
/// When any run fails: a comparison with holes is none.
pub fn run(args: &ThroughputArgs) -> anyhow::Result<Outcome> {
    let contenders = contenders(args)?;
    let bar = output::progress(u64::from(args.rounds) * contenders.len() as u64);
    let mut figures = vec![Vec::new(); contenders.len()];
    let mut runs = Vec::new();
    for round in 0..args.rounds {
        for turn in 0..contenders.len() {
            let which = (turn + round as usize) % contenders.len();
            let (name, contender) = &contenders[which];
            bar.set_message(name.clone());
            if !args.no_warm_up {
                // Both sides of a migration, and what their processes need beside guest memory.
                warm::up(2 * args.memory + (512 << 20))?;
            }
            let (figure, said) = contender.run(args)?;
            figures[which].push(figure);
            runs.push(json!({
                "round": round, "contender": name, "stream_mib_s": figure.stream,
                "migration_mib_s": figure.migration, "source_cpu_s_per_gib": figure.source_cpu,
                "target_cpu_s_per_gib": figure.target_cpu, "said": said,
            }));
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    let names: Vec<&str> = contenders.iter().map(|(name, _)| name.as_str()).collect();
    let (summary, text) = summarise(args, &names, &figures);
    Ok(Outcome {
        bench: "throughput",
        parameters: json!({
            "memory": args.memory, "populate": args.populate, "rounds": args.rounds, "contenders": names,
            "warmed_up": !args.no_warm_up,
        }),
        runs,
        summary,
        text,
    })
}

fn summarise(args: &ThroughputArgs, names: &[&str], figures: &[Vec<Figures>]) -> (Value, String) {
    let column =
        |which: usize, field: Field| -> Vec<Option<f64>> { figures[which].iter().map(field).collect() };
    let spread = |values: &[Option<f64>]| Distribution::of(values.iter().copied().flatten());
    let mut rates =
        table(["MiB/s, median (min to max)", "stream", "migration", "source CPU s/GiB", "target CPU s/GiB"]);
    let mut ratios = table(["ratio in the same round", "stream", "migration", "source CPU", "target CPU"]);
    let mut summary = Map::new();
    let fields: [(&str, Field); 4] = [
        ("stream_mib_s", |f| f.stream),
        ("migration_mib_s", |f| f.migration),
        ("source_cpu_s_per_gib", |f| f.source_cpu),
        ("target_cpu_s_per_gib", |f| f.target_cpu),
    ];
    for (which, name) in names.iter().enumerate() {
        let mut entry = Map::new();
        let mut cells = vec![name.to_string()];
        let mut shares = vec![format!("{} : {name}", names[0])];
        for (index, (key, field)) in fields.into_iter().enumerate() {
            let values = column(which, field);
            let d = spread(&values);
            cells.push(brief(d.as_ref(), if index < 2 { 0 } else { 2 }));
            entry.insert(key.into(), value(d));
            // iperf3 has a stream rate only, and a guest that is not there needs no migration: the
            // nearest that QEMU can be set beside is the migration as a whole.
            let ratio = pairwise(&column(0, field), &values);
            shares.push(brief(ratio.as_ref(), 2));
            entry.insert(format!("ratio_{key}"), value(ratio));
        }
        rates.add_row(cells);
        if which > 0 {
            ratios.add_row(shares);
        }
        summary.insert(name.to_string(), entry.into());
    }
    let mut text = format!(
        "{} MiB of random content, destination {}, {} rounds\n{rates}\n",
        args.memory >> 20,
        if args.populate { "populated first" } else { "not populated" },
        args.rounds,
    );
    if names.len() > 1 {
        text += &format!("{ratios}\n");
    }
    (summary.into(), text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use migration::report::RoundReport;
    use migration::{Code, Failure};

    #[test]
    fn rates_are_of_the_time_that_they_say() {
        let mut report = Report::not_begun(Failure::new(Code::OTHER, ""), 4 << 30);
        let round = |round, sent, elapsed_us| RoundReport {
            round,
            dirty: sent,
            sent,
            zero: 0,
            untouched: 0,
            elapsed_us,
            barrier_us: 0,
            remaining: 0,
            predicted_blackout_us: 0,
        };
        report.rounds = vec![round(0, 1 << 30, 500_000), round(1, 1 << 30, 1_000_000)];
        (report.total_us, report.build_us, report.source_cpu_us) = (3_000_000, 1_000_000, 1_000_000);
        let populated = Figures::of_report(&report, true);
        assert_eq!((populated.stream, populated.migration), (Some(2048.0), Some(1024.0)));
        assert_eq!((populated.source_cpu, populated.target_cpu), (Some(0.5), None));
        let fresh = Figures::of_report(&report, false);
        assert_eq!(fresh.migration, Some(2048.0 / 3.0));
    }
}
