//! The blackout: how long a guest is away when it moves.
//!
//! Two clocks tell. The source's, from the pause to the destination's word that the guest runs, which is
//! longer than the truth by half a round trip. And the guest's own: it looks at the clock all the time (an
//! idle one whenever its timer wakes it, a thousand times a second) and keeps the longest gap of the
//! switchover, which begins just before the pause and ends 300 ms after the guest runs again, so that the
//! aftermath counts too. *Felt beyond the usual* is that gap less the 99th percentile of the gaps that the
//! same guest felt outside the switchover.

use crate::args::BlackoutArgs;
use crate::moves::{Figure, Move, Moved};
use crate::output::{self, Outcome, cells, table, value};
use crate::statistics::Distribution;
use serde_json::{Map, json};
use std::time::Duration;

/// How long the guest runs before it moves: its usual gaps come from here.
const SETTLE: Duration = Duration::from_secs(1);

/// What is measured of a move, in milliseconds.
const FIGURES: [Figure; 5] = [
    ("blackout, by the source's clock", |moved| moved.report.blackout_us as f64 / 1e3),
    ("longest gap in the switchover, by the guest's", |moved| moved.testimony.longest_gap_us[1] / 1e3),
    ("usual gap of the same guest, 99th percentile", |moved| moved.testimony.usual_gaps.p99_us / 1e3),
    ("felt beyond the usual", |moved| moved.testimony.felt_blackout_us() / 1e3),
    ("longest gap before the switchover", |moved| moved.testimony.longest_gap_us[0] / 1e3),
];

/// Measures.
///
/// # Errors
/// When a move fails or damages its guest.
pub fn run(args: &BlackoutArgs) -> anyhow::Result<Outcome> {
    let program = args.program.path()?;
    let plan = Move {
        program: &program,
        memory: args.memory,
        vcpus: args.vcpus,
        working_set: args.working_set,
        hz: None,
        fill: 0,
        populate: false,
        streams: 0,
        settle: SETTLE,
    };
    let moves = plan.repeat(args.runs)?;
    let (summary, text) = summarise(args, &moves);
    Ok(Outcome {
        bench: "blackout",
        parameters: json!({
            "memory": args.memory, "vcpus": args.vcpus, "working_set": args.working_set, "runs": args.runs,
        }),
        runs: moves.iter().map(Moved::value).collect(),
        summary,
        text,
    })
}

fn summarise(args: &BlackoutArgs, moves: &[Moved]) -> (serde_json::Value, String) {
    let mut summary = Map::new();
    let columns = ["milliseconds", "min", "median", "p90", "max"];
    let mut figures = table(columns);
    for (name, figure) in FIGURES {
        if let Some(d) = Distribution::of(moves.iter().map(figure)) {
            figures.add_row([vec![name.to_string()], cells(&d, 2).to_vec()].concat());
            summary.insert(name.into(), value(d));
        }
    }
    let mut spans = table(columns);
    let mut span_summary = Map::new();
    for (name, times) in spans_of(moves) {
        if let Some(d) = Distribution::of(times) {
            spans.add_row([vec![name.clone()], cells(&d, 2).to_vec()].concat());
            span_summary.insert(name, value(d));
        }
    }
    summary.insert("spans".into(), span_summary.into());
    let last = Distribution::of(moves.iter().map(|m| m.report.rounds.last().map_or(0.0, |r| r.sent as f64)));
    let rounds = Distribution::of(moves.iter().map(|m| m.report.rounds.len() as f64));
    let text = format!(
        "{} moves of a guest of {} MiB with {} vCPUs that keeps rewriting {} MiB\n{figures}\n\
         the blackout's parts, by the source's clock\n{spans}\n\
         rounds {}, bytes sent in the last {}\n",
        moves.len(),
        args.memory >> 20,
        args.vcpus,
        args.working_set >> 20,
        output::brief(rounds.as_ref(), 0),
        output::brief(last.as_ref(), 0),
    );
    summary.insert("rounds".into(), value(rounds));
    summary.insert("bytes sent in the last round".into(), value(last));
    (summary.into(), text)
}

/// The spans' times in milliseconds, in the order in which they came.
fn spans_of(moves: &[Moved]) -> Vec<(String, Vec<f64>)> {
    let mut spans: Vec<(String, Vec<f64>)> = Vec::new();
    for span in moves.iter().flat_map(|moved| &moved.report.spans) {
        let ms = span.us as f64 / 1e3;
        match spans.iter_mut().find(|(name, _)| *name == span.name) {
            Some((_, times)) => times.push(ms),
            None => spans.push((span.name.clone(), vec![ms])),
        }
    }
    spans
}
