//! What a migration came to, and its figures.

use crate::figures::{Figures, SPAN, named};
use crate::pace::{self, Sample};
use crate::record;
use migration::report::Report;
use serde_json::Value;
use vmm::guest::Testimony;

/// The outcome of one migration.
pub struct Moved {
    /// The source's report.
    pub report: Report,
    /// The guest's own record, in which no error is noted.
    pub testimony: Testimony,
    /// Resident bytes of the destination's process.
    pub resident: Option<u64>,
    /// The guest's pace until the blackout; empty if it was not sampled.
    pub pace: Vec<Sample>,
}

const MIB: f64 = (1 << 20) as f64;
const GIB: f64 = (1 << 30) as f64;

/// A migration that sent fewer bytes than this has no rate: fixed costs would dominate it.
const MIN_BYTES: u64 = 64 << 20;

/// The part of the blackout in which the last pages are written and confirmed.
const LAST_PAGES: &str = "last pages";

impl Moved {
    /// The figures of the migration; `populated` says whether the destination was populated first.
    ///
    /// There are two rates. The *stream* rate is the bytes of round 0 over the time from its start to the
    /// last lane's confirmed barrier; iperf3 reports a rate of this kind. The *migration* rate is all bytes
    /// over the time *to move*, from the start of the migration until the guest runs at the destination; QEMU
    /// reports a rate of this kind. QEMU populates a destination before its clock starts, so for a populated
    /// destination the time in which ours builds its machine, which is nearly all population, does not count
    /// either.
    pub fn figures(&self, populated: bool) -> Figures {
        let Moved { report, testimony, .. } = self;
        let ms = |us: u64| us as f64 / 1e3;
        let sent = report.sent();
        let moving_us = report.total_us.saturating_sub(if populated { report.build_us } else { 0 });
        let rate = |bytes: u64, us: u64| {
            (us > 0 && sent >= MIN_BYTES).then(|| bytes as f64 / MIB / (us as f64 / 1e6))
        };
        let cpu = |us: u64| (sent >= MIN_BYTES).then(|| us as f64 / 1e6 / (sent as f64 / GIB));
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
            ("slowed_percent", pace::slowed_percent(&self.pace)),
            ("rounds", Some(report.rounds.len() as f64)),
            ("sent_mib", Some(mib(sent))),
            ("last_round_kib", report.rounds.last().map(|round| round.sent as f64 / 1024.0)),
            ("resident_mib", report.destination_resident.map(mib)),
            ("process_mib", self.resident.map(mib)),
        ];
        let mut figures = named(figures);
        for span in &report.spans {
            *figures.entry(format!("{SPAN}{}", span.name)).or_default() += ms(span.us);
        }
        figures
    }

    /// All of it as JSON.
    pub fn value(&self) -> Value {
        // What the guest said stands below, and not also as the text in which it came.
        let mut report = self.report.clone();
        report.remarks = None;
        let mut report = record::value(&report);
        report["testimony"] = record::value(&self.testimony);
        report["process_resident"] = self.resident.into();
        report["pace"] = record::value(&self.pace);
        report
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::figures::Figure;
    use migration::report::RoundReport;
    use migration::{Code, Failure};

    pub(crate) fn round(round: u32, sent: u64, elapsed_us: u64) -> RoundReport {
        serde_json::from_value(serde_json::json!({
            "round": round, "dirty": sent, "sent": sent, "zero": 0, "untouched": 0, "elapsed_us": elapsed_us,
            "barrier_us": 0, "remaining": 0, "predicted_blackout_us": 0,
        }))
        .unwrap()
    }

    /// A migration in two rounds.
    pub(crate) fn moved() -> Moved {
        let mut report = Report::not_begun(Failure::new(Code::OTHER, ""), 4 << 30);
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
        let populated = moved().figures(true);
        assert_eq!((populated["stream_mib_s"], populated["migration_mib_s"]), (2048.0, 1024.0));
        assert_eq!(populated["source_cpu_s_per_gib"], 0.5);
        assert_eq!((populated["felt_ms"], populated["moving_ms"]), (3.0, 2000.0));
        for unknown in ["target_cpu_s_per_gib", "slowed_percent", "process_mib"] {
            assert!(!populated.contains_key(unknown), "{unknown}");
        }
        assert_eq!(moved().figures(false)["migration_mib_s"], 2048.0 / 3.0);
    }

    #[test]
    fn next_to_nothing_has_no_rate() {
        let mut moved = moved();
        moved.report.rounds.iter_mut().for_each(|round| round.sent = 4096);
        let figures = moved.figures(false);
        assert!(!figures.contains_key("migration_mib_s") && !figures.contains_key("source_cpu_s_per_gib"));
    }

    #[test]
    fn every_figure_of_a_move_is_known() {
        let mut moved = moved();
        let span = |name: &str, us| migration::report::Span { name: name.into(), us };
        moved.report.spans = vec![span("pause", 500), span(LAST_PAGES, 1000), span("state", 1500)];
        moved.report.blackout_us = 3000;
        let figures = moved.figures(false);
        assert_eq!(figures["span: state"], 1.5);
        // Of a blackout of 3 ms and a gap of 5 ms, 1.5 ms are over when the last page is in place.
        assert_eq!((figures["last_write_ms"], figures["last_write_felt_ms"]), (1.5, 3.5));
        for id in figures.keys() {
            let unknown = Figure { title: id.clone(), short: id.clone(), digits: 2, better: None };
            assert_ne!(Figure::of(id), unknown, "it is in the catalogue");
        }
        assert!(record::value(&figures).is_object());
    }
}
