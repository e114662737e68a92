//! The figures that are taken of a run: what each is called, how it is written, and which way is better.

use crate::moves::Moved;
use crate::pace;
use std::collections::BTreeMap;

/// The figures of one run, by their ids. What a run cannot tell is left out.
pub type Figures = BTreeMap<String, f64>;

/// Which way a figure is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// The more the better.
    Higher,
    /// The less the better.
    Lower,
}

/// One figure.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Its name for people, with its unit.
    pub title: String,
    /// The same for the head of a column.
    pub short: String,
    /// Digits after the point.
    pub digits: usize,
    /// Which way is better, if any is.
    pub better: Option<Better>,
}

/// The blackout's part in which the last pages are written and confirmed.
const LAST_PAGES: &str = "last pages";

/// What begins the ids of the blackout's parts.
pub const SPAN: &str = "span: ";

const HIGHER: Option<Better> = Some(Better::Higher);
const LOWER: Option<Better> = Some(Better::Lower);

const CATALOGUE: &[(&str, &str, &str, usize, Option<Better>)] = &[
    ("stream_mib_s", "stream, MiB/s", "stream MiB/s", 0, HIGHER),
    ("migration_mib_s", "migration, MiB/s", "MiB/s", 0, HIGHER),
    ("source_cpu_s_per_gib", "source CPU, s/GiB", "source CPU s/GiB", 2, LOWER),
    ("target_cpu_s_per_gib", "target CPU, s/GiB", "target CPU s/GiB", 2, LOWER),
    ("messages_s", "messages a second", "messages/s", 0, HIGHER),
    ("latency_us", "until confirmed, median, µs", "median µs", 1, LOWER),
    ("latency_p99_us", "until confirmed, 99 % of messages, µs", "p99 µs", 1, LOWER),
    ("latency_p99_9_us", "until confirmed, 99.9 % of messages, µs", "p99.9 µs", 1, LOWER),
    ("latency_p99_99_us", "until confirmed, 99.99 % of messages, µs", "p99.99 µs", 1, LOWER),
    ("latency_most_us", "until confirmed, slowest message, µs", "most µs", 1, LOWER),
    ("registered_ms_per_gib", "to register at both sides, ms/GiB", "registered ms/GiB", 1, LOWER),
    ("source_registered_ms_per_gib", "of that at the source, ms/GiB", "source ms/GiB", 1, LOWER),
    ("total_ms", "whole migration, ms", "total ms", 1, LOWER),
    ("moving_ms", "to move, ms", "to move ms", 1, LOWER),
    ("setup_ms", "set-up of that, ms", "set-up ms", 1, LOWER),
    ("blackout_ms", "blackout, by the source's clock, ms", "blackout ms", 2, LOWER),
    ("last_write_ms", "of that after the last pages, ms", "after last pages ms", 2, LOWER),
    (
        "last_write_felt_ms",
        "last pages to the guest's next look at the clock, ms",
        "to next look ms",
        2,
        LOWER,
    ),
    ("switchover_gap_ms", "longest gap in the switchover, by the guest's, ms", "longest gap ms", 2, LOWER),
    ("usual_gap_ms", "usual gap of the same guest, 99th percentile, ms", "usual gap ms", 2, LOWER),
    ("felt_ms", "felt beyond the usual, ms", "felt ms", 2, LOWER),
    ("earlier_gap_ms", "longest gap before the switchover, ms", "earlier gap ms", 2, LOWER),
    ("slowed_percent", "slowed down before the blackout, %", "slowed %", 1, LOWER),
    ("rounds", "rounds", "rounds", 0, None),
    ("sent_mib", "sent, MiB", "sent MiB", 1, LOWER),
    ("last_round_kib", "sent in the last round, KiB", "last round KiB", 0, LOWER),
    ("resident_mib", "guest memory that exists at the destination, MiB", "resident MiB", 1, LOWER),
    ("process_mib", "resident memory of the destination's process, MiB", "process MiB", 1, LOWER),
];

impl Figure {
    /// What is known of a figure by its id; anything about one of another version's is taken from the id itself.
    pub fn of(id: &str) -> Self {
        let figure = |title: &str, short: &str, digits, better| Figure {
            title: title.into(),
            short: short.into(),
            digits,
            better,
        };
        if let Some(span) = id.strip_prefix(SPAN) {
            let title = format!("{span}, ms");
            return figure(&title, &title, 2, LOWER);
        }
        let known = CATALOGUE.iter().find(|(known, ..)| *known == id);
        known.map_or_else(
            || figure(id, id, 2, None),
            |(_, title, short, digits, better)| figure(title, short, *digits, *better),
        )
    }
}

const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

/// A migration that sent less than this says nothing of how fast bytes go.
const LEAST_BYTES: u64 = 64 << 20;

/// What a move tells.
///
/// Two rates are told. The *stream* rate is bytes sent in round 0 over the time from its begin to the last
/// lane's confirmed barrier; iperf3's figure is of that kind. The *migration* rate is all bytes sent over the
/// time *to move*: from the migration's begin to the guest running at the destination; QEMU's figure is of
/// that kind. Where the destination is populated first, QEMU does that before its clock starts, so there the
/// time in which our destination builds its machine (population is nearly all of it) is left out as well.
pub fn of_move(moved: &Moved, populated: bool) -> Figures {
    let Moved { report, testimony, .. } = moved;
    let ms = |us: u64| us as f64 / 1e3;
    let sent = report.sent();
    let moving_us = report.total_us.saturating_sub(if populated { report.build_us } else { 0 });
    let rate =
        |bytes: u64, us: u64| (us > 0 && sent >= LEAST_BYTES).then(|| bytes as f64 / MIB / (us as f64 / 1e6));
    let cpu = |us: u64| (sent >= LEAST_BYTES).then(|| us as f64 / 1e6 / (sent as f64 / GIB));
    let mib = |bytes: u64| bytes as f64 / MIB;
    // The blackout's first parts, up to the confirmation that the last page is in place.
    let last_pages = report.spans.iter().position(|span| span.name == LAST_PAGES);
    let stopping = last_pages.map(|at| report.spans[..=at].iter().map(|span| span.us).sum());
    let figures = [
        ("stream_mib_s", report.rounds.first().and_then(|round| rate(round.sent, round.elapsed_us))),
        ("migration_mib_s", rate(sent, moving_us)),
        ("source_cpu_s_per_gib", cpu(report.source_cpu_us)),
        ("target_cpu_s_per_gib", report.destination_cpu_us.and_then(cpu)),
        ("total_ms", Some(ms(report.total_us))),
        ("moving_ms", Some(ms(moving_us))),
        ("setup_ms", Some(ms(report.setup_us))),
        ("blackout_ms", Some(ms(report.blackout_us))),
        ("last_write_ms", stopping.map(|us| ms(report.blackout_us.saturating_sub(us)))),
        ("last_write_felt_ms", stopping.map(|us| (testimony.longest_gap_us[1] / 1e3 - ms(us)).max(0.0))),
        ("switchover_gap_ms", Some(testimony.longest_gap_us[1] / 1e3)),
        ("usual_gap_ms", Some(testimony.usual_gaps.p99_us / 1e3)),
        ("felt_ms", Some(testimony.felt_blackout_us() / 1e3)),
        ("earlier_gap_ms", Some(testimony.longest_gap_us[0] / 1e3)),
        ("slowed_percent", pace::slowed_percent(&moved.pace)),
        ("rounds", Some(report.rounds.len() as f64)),
        ("sent_mib", Some(mib(sent))),
        ("last_round_kib", report.rounds.last().map(|round| round.sent as f64 / 1024.0)),
        ("resident_mib", report.destination_resident.map(mib)),
        ("process_mib", moved.resident.map(mib)),
    ];
    let mut figures = named(figures);
    for span in &report.spans {
        *figures.entry(format!("{SPAN}{}", span.name)).or_default() += ms(span.us);
    }
    figures
}

/// Figures that are there. Nothing by nothing is none, and could not be saved: JSON has no such number.
pub fn named<const N: usize>(figures: [(&str, Option<f64>); N]) -> Figures {
    let there = |figure: Option<f64>| figure.filter(|figure| figure.is_finite());
    figures.into_iter().filter_map(|(id, figure)| Some((id.to_string(), there(figure)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record;
    use migration::report::{Report, RoundReport};
    use migration::{Code, Failure};

    #[test]
    fn what_is_no_number_is_no_figure() {
        let figures =
            named([("a", Some(f64::NAN)), ("b", Some(f64::INFINITY)), ("c", None), ("d", Some(0.0))]);
        assert_eq!(figures.into_keys().collect::<Vec<_>>(), ["d"]);
    }

    fn moved() -> Moved {
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
        let testimony = serde_json::from_value(serde_json::json!({
            "state": "running", "clean": true, "problems": [], "vcpus": 1, "working_set": 0, "pages": 0,
            "passes": 0, "verified": 0, "samples": 0, "ticks": 0, "longest_gap_us": [0.0, 5000.0, 0.0],
            "usual_gaps": { "count": 1, "median_us": 1.0, "p99_us": 2000.0, "p999_us": 1.0 },
            "switchover_gaps": { "count": 1, "median_us": 1.0, "p99_us": 1.0, "p999_us": 1.0 },
            "long_gaps": [], "timeline": [],
        }))
        .unwrap();
        Moved { report, testimony, resident: None, pace: Vec::new() }
    }

    #[test]
    fn rates_are_of_the_time_that_they_say() {
        let populated = of_move(&moved(), true);
        assert_eq!((populated["stream_mib_s"], populated["migration_mib_s"]), (2048.0, 1024.0));
        assert_eq!(populated["source_cpu_s_per_gib"], 0.5);
        assert_eq!((populated["felt_ms"], populated["moving_ms"]), (3.0, 2000.0));
        for unknown in ["target_cpu_s_per_gib", "slowed_percent", "process_mib"] {
            assert!(!populated.contains_key(unknown), "{unknown}");
        }
        assert_eq!(of_move(&moved(), false)["migration_mib_s"], 2048.0 / 3.0);
    }

    #[test]
    fn next_to_nothing_has_no_rate() {
        let mut moved = moved();
        moved.report.rounds.iter_mut().for_each(|round| round.sent = 4096);
        let figures = of_move(&moved, false);
        assert!(!figures.contains_key("migration_mib_s") && !figures.contains_key("source_cpu_s_per_gib"));
    }

    #[test]
    fn every_figure_of_a_move_is_known() {
        let mut moved = moved();
        let span = |name: &str, us| migration::message::Span { name: name.into(), us };
        moved.report.spans = vec![span("pause", 500), span(LAST_PAGES, 1000), span("state", 1500)];
        moved.report.blackout_us = 3000;
        let figures = of_move(&moved, false);
        assert_eq!(figures["span: state"], 1.5);
        // Of a blackout of 3 ms and a gap of 5 ms, 1.5 ms are over when the last page is in place.
        assert_eq!((figures["last_write_ms"], figures["last_write_felt_ms"]), (1.5, 3.5));
        for id in figures.keys() {
            assert!(id.starts_with(SPAN) || CATALOGUE.iter().any(|(known, ..)| known == id), "{id}");
        }
        assert_eq!(Figure::of("of another version").better, None);
        assert!(record::value(&figures).is_object());
    }
}
