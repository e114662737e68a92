//! The figures of a run: their names, their format, and which direction is better.

use crate::statistics::Distribution;
use std::collections::BTreeMap;

/// The figures of one run, by their ids. Figures that a run does not have are missing.
pub type Figures = BTreeMap<String, f64>;

/// The distributions of a contender's figures, by their ids.
pub type Spread = BTreeMap<String, Distribution>;

/// Which direction of a figure is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// More is better.
    Higher,
    /// Less is better.
    Lower,
}

/// How a figure is shown.
#[derive(Clone, Debug, PartialEq)]
pub struct Figure {
    /// Its name with its unit.
    pub title: String,
    /// A shorter name for the head of a column.
    pub short: String,
    /// Digits after the decimal point.
    pub digits: usize,
    /// Which direction is better, if any.
    pub better: Option<Better>,
}

/// The prefix of the ids of the blackout's parts.
pub const SPAN: &str = "span: ";

const HIGHER: Option<Better> = Some(Better::Higher);
const LOWER: Option<Better> = Some(Better::Lower);

const CATALOGUE: &[(&str, &str, &str, usize, Option<Better>)] = &[
    ("stream_mib_s", "stream, MiB/s", "stream MiB/s", 0, HIGHER),
    ("stream_gbit_s", "stream, Gb/s", "Gb/s", 2, HIGHER),
    ("migration_mib_s", "migration, MiB/s", "MiB/s", 0, HIGHER),
    ("source_cpu_s_per_gib", "source CPU, s/GiB", "source CPU s/GiB", 2, LOWER),
    ("target_cpu_s_per_gib", "target CPU, s/GiB", "target CPU s/GiB", 2, LOWER),
    ("sealed_mib_s", "sealed by one processor, MiB/s", "sealed MiB/s", 0, HIGHER),
    ("opened_mib_s", "opened by one processor, MiB/s", "opened MiB/s", 0, HIGHER),
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
    /// The figure of an id. An unknown id, which a file of another version may hold, is its own name.
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

/// Collects the figures that exist and are finite. Others could not be saved, because JSON has no such
/// numbers. A stream's rate comes in both units.
pub fn named<const N: usize>(figures: [(&str, Option<f64>); N]) -> Figures {
    let there = |figure: Option<f64>| figure.filter(|figure| figure.is_finite());
    let mut figures: Figures =
        figures.into_iter().filter_map(|(id, figure)| Some((id.to_string(), there(figure)?))).collect();
    // Networks are sold in these.
    if let Some(rate) = figures.get("stream_mib_s").copied() {
        figures.insert("stream_gbit_s".into(), rate * f64::from(8 << 20) / 1e9);
    }
    figures
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_number_is_no_figure() {
        let figures =
            named([("a", Some(f64::NAN)), ("b", Some(f64::INFINITY)), ("c", None), ("d", Some(0.0))]);
        assert_eq!(figures.into_keys().collect::<Vec<_>>(), ["d"]);
    }

    #[test]
    fn an_unknown_figure_is_shown_by_its_id() {
        let unknown = Figure::of("of another version");
        assert_eq!((unknown.title.as_str(), unknown.better), ("of another version", None));
    }
}
