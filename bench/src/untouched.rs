//! A large guest that has touched next to nothing: what it costs to move memory that does not exist.

use crate::args::UntouchedArgs;
use crate::moves::{Figure, Move, Moved};
use crate::output::{Outcome, cells, table, value};
use crate::statistics::Distribution;
use serde_json::{Map, json};
use std::time::Duration;

/// How long the guest runs before it moves.
const SETTLE: Duration = Duration::from_millis(300);

const MIB: f64 = (1 << 20) as f64;

const FIGURES: [Figure; 6] = [
    ("whole migration, ms", |moved| moved.report.total_us as f64 / 1e3),
    ("set-up of that, ms", |moved| moved.report.setup_us as f64 / 1e3),
    ("blackout of that, ms", |moved| moved.report.blackout_us as f64 / 1e3),
    ("sent, MiB", |moved| moved.report.sent() as f64 / MIB),
    ("guest memory that exists at the destination, MiB", |moved| {
        moved.report.destination_resident.map_or(f64::NAN, |bytes| bytes as f64 / MIB)
    }),
    ("resident memory of the destination's process, MiB", |moved| {
        moved.resident.map_or(f64::NAN, |bytes| bytes as f64 / MIB)
    }),
];

/// Measures.
///
/// # Errors
/// When a move fails or damages its guest.
pub fn run(args: &UntouchedArgs) -> anyhow::Result<Outcome> {
    let program = args.program.path()?;
    let plan = Move {
        program: &program,
        memory: args.memory,
        vcpus: 1,
        working_set: 0,
        hz: None,
        fill: 0,
        populate: false,
        streams: 0,
        settle: SETTLE,
    };
    let moves = plan.repeat(args.runs)?;
    let mut summary = Map::new();
    let mut figures = table(["", "min", "median", "p90", "max"]);
    for (name, figure) in FIGURES {
        if let Some(d) = Distribution::of(moves.iter().map(figure).filter(|f| f.is_finite())) {
            figures.add_row([vec![name.to_string()], cells(&d, 1).to_vec()].concat());
            summary.insert(name.into(), value(d));
        }
    }
    Ok(Outcome {
        bench: "untouched",
        parameters: json!({ "memory": args.memory, "runs": args.runs }),
        runs: moves.iter().map(Moved::value).collect(),
        summary: summary.into(),
        text: format!("{} moves of an idle guest of {} MiB\n{figures}\n", moves.len(), args.memory >> 20),
    })
}
