//! Single runs: the rounds of a migration, its blackout as a waterfall, and the guest's work over time.

use super::plots::{self, Bar, Series};
use crate::guest::size;
use crate::pace::Sample;
use crate::record::{Measurement, Run};
use crate::statistics::Distribution;
use anyhow::Context;
use maud::{Markup, PreEscaped, html};
use migration::report::Report;
use serde_json::Value;
use vmm::guest::Testimony;

/// Milliseconds of each interval of the guest's own timeline.
const INTERVAL: f64 = 10.0;

/// A typical migration of each contender, for at most `most` contenders.
///
/// # Errors
/// When a run cannot be drawn.
pub fn of(measured: &Measurement, names: &[String], most: usize) -> anyhow::Result<Markup> {
    let mut all = Vec::new();
    for (which, name) in names.iter().enumerate() {
        if all.len() < most
            && let Some(run) = typical(measured, which)
            && let Some(migration) = Migration::of(&run.said)
        {
            all.push((name, run.round, migration.markup().with_context(|| name.clone())?));
        }
    }
    Ok(html! {
        @for (place, (name, round, markup)) in all.into_iter().enumerate() {
            details open[place == 0] {
                summary { "A typical run of " (name) " (round " (round + 1) ")" }
                (markup)
            }
        }
    })
}

/// The run whose time is closest to the median.
fn typical(of: &Measurement, which: usize) -> Option<&Run> {
    let time = |run: &Run| run.figures.get("total_ms").copied();
    let runs = || of.completed().filter(|run| run.contender == which);
    let median = Distribution::of(runs().filter_map(time))?.median;
    let far = |run: &&Run| time(run).map_or(f64::INFINITY, |ms| (ms - median).abs());
    runs().min_by(|a, b| far(a).total_cmp(&far(b)))
}

/// A migration as a run recorded it.
struct Migration {
    report: Report,
    testimony: Testimony,
    pace: Vec<Sample>,
}

impl Migration {
    /// Reads what a contender said; `None` if it was not Whimbrel.
    fn of(said: &Value) -> Option<Self> {
        // Read apart from the report, whose remarks had this name in earlier programs.
        let mut report = said.clone();
        report.as_object_mut()?.remove("testimony");
        let field = |name: &str| said.get(name).cloned().unwrap_or_default();
        Some(Migration {
            report: serde_json::from_value(report).ok()?,
            testimony: serde_json::from_value(field("testimony")).ok()?,
            pace: serde_json::from_value(field("pace")).unwrap_or_default(),
        })
    }

    fn markup(&self) -> anyhow::Result<Markup> {
        let pace = self.pace()?;
        Ok(html! {
            h3 { "Its rounds" }
            (PreEscaped(plots::bars("milliseconds from the start", &self.rounds())?))
            h3 { "Its blackout, by the source's clock" }
            (PreEscaped(plots::bars("milliseconds from the pause", &self.waterfall())?))
            h3 { "What the guest did in each 10 ms of its own time, until it was asked" }
            (PreEscaped(self.timeline()?))
            @if let Some(svg) = pace {
                h3 { "What the guest did, seen from outside, until the blackout" }
                (PreEscaped(svg))
            }
        })
    }

    /// Set-up, rounds and blackout. The gaps between them are the time of decisions.
    fn rounds(&self) -> Vec<Bar> {
        let Report { rounds, setup_us, total_us, blackout_us, .. } = &self.report;
        let ms = |us: u64| us as f64 / 1e3;
        let mut bars = vec![Bar { name: "set-up".into(), range: 0.0..ms(*setup_us) }];
        for round in rounds {
            let begin = bars.last().map_or(0.0, |bar| bar.range.end);
            let zero = if round.zero > 0 { format!(", {} zero", rounded(round.zero)) } else { String::new() };
            let last = round.round as usize + 1 == rounds.len();
            let (place, range) = match last {
                // The last round is sent while the guest is paused.
                true => ("blackout with ", ms(total_us.saturating_sub(*blackout_us))..ms(*total_us)),
                false => ("", begin..begin + ms(round.elapsed_us)),
            };
            let name = format!("{place}round {}: {} sent{zero}", round.round, rounded(round.sent));
            bars.push(Bar { name, range });
        }
        bars
    }

    fn waterfall(&self) -> Vec<Bar> {
        let mut begin = 0.0;
        let bar = |span: &migration::report::Span| {
            let range = begin..begin + span.us as f64 / 1e3;
            begin = range.end;
            Bar { name: format!("{}: {:.2} ms", span.name, range.end - range.start), range }
        };
        self.report.spans.iter().map(bar).collect()
    }

    fn timeline(&self) -> anyhow::Result<String> {
        let timeline = self.testimony.timeline.iter().zip(0u32..);
        let line = timeline.map(|(done, place)| (f64::from(place) * INTERVAL, *done as f64)).collect();
        let what = if self.testimony.working_set == 0 { "looks at the clock" } else { "pages rewritten" };
        let series = Series { name: String::new(), points: Vec::new(), line };
        plots::curves("milliseconds", what, &[series], &[])
    }

    fn pace(&self) -> anyhow::Result<Option<String>> {
        let between = |pair: &[Sample]| {
            let ms = pair[1].ms - pair[0].ms;
            (ms > 0.0).then(|| (pair[1].ms, pair[1].done.saturating_sub(pair[0].done) as f64 / ms))
        };
        let line: Vec<_> = self.pace.windows(2).filter_map(between).collect();
        if line.is_empty() {
            return Ok(None);
        }
        let series = Series { name: String::new(), points: Vec::new(), line };
        let marks = [(0.0, "migration begins")];
        plots::curves("milliseconds", "done per millisecond", &[series], &marks).map(Some)
    }
}

/// Bytes, rounded to about three digits.
fn rounded(bytes: u64) -> String {
    let unit = [30, 20, 10].into_iter().find(|shift| bytes >> shift >= 10).unwrap_or(0);
    size(bytes >> unit << unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::moved::tests::{moved, round};
    use crate::record;
    use migration::report::Span;

    #[test]
    fn spans_follow_each_other_and_so_do_rounds() {
        let mut moved = moved();
        let report = &mut moved.report;
        report.rounds = vec![round(0, 1 << 30, 500_000), round(1, 20 << 10, 1000)];
        report.rounds[1].zero = 4096;
        report.spans = ["pause", "state"].map(|name| Span { name: name.into(), us: 500 }).to_vec();
        (report.setup_us, report.total_us, report.blackout_us) = (10_000, 520_000, 1500);
        moved.testimony.timeline = vec![1, 2, 0, 4];
        assert!(Migration::of(&record::value(&moved.report)).is_none(), "no testimony");
        let migration = Migration::of(&moved.value()).unwrap();
        let ranges = |bars: Vec<Bar>| bars.into_iter().map(|bar| bar.range).collect::<Vec<_>>();
        assert_eq!(ranges(migration.waterfall()), [0.0..0.5, 0.5..1.0]);
        assert_eq!(ranges(migration.rounds()), [0.0..10.0, 10.0..510.0, 518.5..520.0]);
        assert_eq!(migration.rounds()[2].name, "blackout with round 1: 20 KiB sent, 4 KiB zero");
        assert!(migration.markup().unwrap().into_string().contains("<svg"));
    }
}
