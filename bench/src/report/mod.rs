//! A report: one HTML file that needs no other file.

mod details;
mod plots;

use crate::bound::{self, Beside, Comparison};
use crate::facts::Facts;
use crate::figures::{Figure, Spread};
use crate::growth::{self, Growth};
use crate::output::brief;
use crate::record::{self, Measurement, Setup};
use crate::statistics::Distribution;
use crate::summary;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use plots::{Series, Strip};
use std::time::{Duration, UNIX_EPOCH};

/// The most contenders of a measurement whose single runs are shown.
const MAX_DETAILS: usize = 3;

const STYLE: &str = "body{font:15px/1.45 sans-serif;max-width:940px;margin:2em auto;padding:0 1em;color:#222}\
    h2{margin-top:2.5em;border-top:2px solid #0072b2;padding-top:.5em}h3{margin:1.6em 0 .3em}\
    table{border-collapse:collapse;margin:.7em 0}td,th{padding:.2em .7em;border-bottom:1px solid #ddd;text-align:right}\
    td:first-child,th:first-child{text-align:left}.warn{color:#a33;font-weight:bold}.note{color:#555}\
    summary{cursor:pointer;margin:.4em 0}svg{max-width:100%;height:auto}";

/// The page for these measurements.
///
/// # Errors
/// When a plot cannot be drawn.
pub fn page(title: &str, all: &[Measurement]) -> anyhow::Result<String> {
    let sections = all.iter().map(section).collect::<anyhow::Result<Vec<_>>>()?;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                title { (title) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { (title) }
                p.note {
                    "Dots are single runs, upright lines medians. Only ratios within one measurement say anything "
                    "about another machine."
                }
                @for facts in machines(all) { (machine(facts)) }
                @for section in sections { (section) }
            }
        }
    };
    Ok(page.into_string())
}

/// The machines of the measurements, each once.
fn machines(all: &[Measurement]) -> Vec<&Facts> {
    let mut machines: Vec<&Facts> = Vec::new();
    for measured in all {
        if !machines.contains(&&measured.head.facts) {
            machines.push(&measured.head.facts);
        }
    }
    machines
}

fn machine(facts: &Facts) -> Markup {
    let facts = record::value(facts);
    let known = facts.as_object().into_iter().flatten().filter(|(_, value)| !value.is_null());
    html! {
        h3 { "The machine" }
        table {
            @for (name, value) in known {
                tr {
                    td { (name.replace('_', " ")) }
                    td { (value.as_str().map_or_else(|| value.to_string(), String::from)) }
                }
            }
        }
    }
}

fn section(of: &Measurement) -> anyhow::Result<Markup> {
    let head = &of.head;
    let spreads = summary::spreads(of);
    let names = summary::names(head);
    let planned = head.rounds as usize * head.contenders.len();
    let time = humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(head.time));
    let single = head.contenders.len() == 1;
    let plots = if single { single_plot(of, &spreads)? } else { plots_by_figure(of, &spreads, &names)? };
    let growths = growth::growths(of);
    let growing = growth_plots(of)?;
    let details = details::of(of, &names, MAX_DETAILS)?;
    Ok(html! {
        h2 { (head.bench) }
        p.note {
            (time) "; " (of.completed().count()) " of " (planned) " runs completed, in " (head.rounds) " rounds"
            @if head.warmed_up { "; memory warmed up before each run" }
        }
        @if let Some(others) = summary::others(of) { p.note { (summary::describe_others(&others)) "." } }
        @match &of.end {
            None => p.warn { "Cut off: the measurement has no end." },
            Some(end) if end.interrupted => p.warn { "Interrupted before its last round." },
            Some(_) => {}
        }
        @for run in of.runs.iter().filter(|run| run.failure.is_some()) {
            p.warn { "Failed: " (names[run.contender]) ": " (run.failure.as_deref().unwrap_or_default()) }
        }
        (common(&head.contenders))
        (figures(of, &spreads, &names))
        (encryption(of, &names))
        (plots)
        @if !growths.is_empty() { (growth_table(&growths)) (growing) }
        (details)
    })
}

/// What all contenders have in common, which their names leave out.
fn common(setups: &[Setup]) -> Markup {
    let same = |part: fn(&Setup) -> &String| setups.iter().all(|setup| part(setup) == part(&setups[0]));
    html! {
        @if !setups.is_empty() {
            p {
                @if same(|setup| &setup.group) { "Guest: " (setups[0].group) ". " }
                @if same(|setup| &setup.who) { (setups[0].who) "." }
            }
        }
    }
}

/// The figures to show that any contender has.
fn shown<'a>(of: &'a Measurement, spreads: &[Spread]) -> Vec<&'a String> {
    of.head.show.iter().filter(|id| spreads.iter().any(|spread| spread.contains_key(*id))).collect()
}

fn figures(of: &Measurement, spreads: &[Spread], names: &[String]) -> Markup {
    let shown = shown(of, spreads);
    let row = |name: &str, cell: &dyn Fn(&String) -> Option<Distribution>, digits: Option<usize>| {
        html! {
            tr {
                td { (name) }
                @for id in &shown {
                    td { (brief(cell(id).as_ref(), digits.unwrap_or(Figure::of(id).digits))) }
                }
            }
        }
    };
    let setups = &of.head.contenders;
    let has_ratio = |which: &usize| shown.iter().any(|id| summary::ratio(of, *which, id).is_some());
    let ratios: Vec<usize> = (0..setups.len()).filter(has_ratio).collect();
    html! {
        table {
            tr { th { "median (min to max)" } @for id in &shown { th { (Figure::of(id).short) } } }
            @for (name, spread) in names.iter().zip(spreads) { (row(name, &|id| spread.get(id).cloned(), None)) }
        }
        @if !ratios.is_empty() {
            table {
                tr { th { "ratio in the same round, ours to" } @for id in &shown { th { (Figure::of(id).short) } } }
                @for which in ratios { (row(&names[which], &|id| summary::ratio(of, which, id), Some(2))) }
            }
        }
    }
}

/// Those that encrypt beside those that do not.
fn encryption(of: &Measurement, names: &[String]) -> Markup {
    let Some(Comparison { titles, all }) = bound::beside(of) else { return html! {} };
    html! {
        table {
            tr { th { "beside plain in the same round" } @for title in &titles { th { (title) } } }
            @for Beside { which, how, shares } in all {
                tr {
                    td { (names[which]) @if let Some(how) = how { " (" (how) ")" } }
                    @for share in &shares { td { (brief(share.as_ref(), 2)) } }
                }
            }
        }
    }
}

fn strip(name: &str, of: &Measurement, which: usize, id: &str) -> Option<Strip> {
    let runs: Vec<f64> = of.column(which, id).into_iter().flatten().collect();
    let median = Distribution::of(runs.iter().copied())?.median;
    Some(Strip { name: name.into(), runs, median })
}

/// One plot with all times of a single contender.
fn single_plot(of: &Measurement, spreads: &[Spread]) -> anyhow::Result<Markup> {
    let times = shown(of, spreads).into_iter().filter(|id| id.ends_with("_ms"));
    let rows: Vec<Strip> = times.filter_map(|id| strip(&Figure::of(id).title, of, 0, id)).collect();
    Ok(html! { (PreEscaped(plots::strips("milliseconds", &rows)?)) })
}

/// A plot for each figure of several contenders.
fn plots_by_figure(of: &Measurement, spreads: &[Spread], names: &[String]) -> anyhow::Result<Markup> {
    let mut all = Vec::new();
    for id in shown(of, spreads) {
        let rows: Vec<Strip> =
            names.iter().enumerate().filter_map(|(which, name)| strip(name, of, which, id)).collect();
        all.push((Figure::of(id), plots::strips(&Figure::of(id).title, &rows)?));
    }
    Ok(html! { @for (figure, svg) in all { h3 { (figure.title) } (PreEscaped(svg)) } })
}

fn growth_table(growths: &[Growth]) -> Markup {
    html! {
        h3 { "Growth" }
        table {
            tr { th { "what" } th { "slopes of all rounds, median (min to max)" } }
            @for Growth { name, who, slopes } in growths {
                tr { td { (who) ": " (name) } td { (brief(Some(slopes), 2)) } }
            }
        }
    }
}

/// A plot for each figure that grows with the guest's size.
fn growth_plots(of: &Measurement) -> anyhow::Result<Markup> {
    let mut all = Vec::new();
    for (axis, id, families) in growth::families_by_figure(of) {
        let series: Vec<Series> = families
            .into_iter()
            .map(|(name, members)| {
                let runs =
                    |(x, column): &(f64, Vec<f64>)| column.iter().map(|y| (*x, *y)).collect::<Vec<_>>();
                let middle = |(x, column): &(f64, Vec<f64>)| {
                    Distribution::of(column.iter().copied()).map(|d| (*x, d.median))
                };
                let points = members.iter().flat_map(runs).collect();
                let mut line: Vec<_> = members.iter().filter_map(middle).collect();
                line.sort_by(|a: &(f64, f64), b| a.0.total_cmp(&b.0));
                Series { name, points, line }
            })
            .collect();
        let Figure { title, short, .. } = Figure::of(id);
        all.push((title, plots::curves(axis, &short, &series, &[])?));
    }
    Ok(html! { @for (title, svg) in all { h3 { (title) } (PreEscaped(svg)) } })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::measurement;

    #[test]
    fn a_page_needs_nothing_else_and_says_what_is_missing() {
        let mut m = measurement(
            "migration_mib_s",
            &[("g", "us <script>", &[200.0, 300.0]), ("g", "peer", &[100.0, 100.0])],
        );
        m.end = None;
        m.head.contenders[1].plain = Some("us <script>".into());
        m.runs[1].failure = Some("lost & gone".into());
        m.runs[1].figures.clear();
        let page = page("Sample", &[m]).unwrap();
        for expected in [
            "3 of 4 runs completed",
            "Cut off",
            "lost &amp; gone",
            "us &lt;script&gt;",
            "<svg",
            "3.00",
            "0.33",
        ] {
            assert!(page.contains(expected), "{expected}");
        }
        for forbidden in ["<script", "src=", "href=", "@import", "url("] {
            assert!(!page.contains(forbidden), "{forbidden}");
        }
    }
}
