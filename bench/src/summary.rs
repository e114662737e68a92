//! What a measurement comes to, made of the runs that completed and of nothing else.

use crate::figures::{Figure, SPAN};
use crate::guest::Guest;
use crate::output::{brief, cells, table};
use crate::record::{Head, Measurement, Setup};
use crate::statistics::{Distribution, pairwise, slope};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// The distributions of a contender's figures, by their ids.
pub type Spread = BTreeMap<String, Distribution>;

/// The distributions of all figures, one entry a contender.
pub fn spreads(of: &Measurement) -> Vec<Spread> {
    let ids = ids(of);
    let spread = |which| {
        let spread =
            |id: &String| Some((id.clone(), Distribution::of(of.column(which, id).into_iter().flatten())?));
        ids.iter().filter_map(spread).collect()
    };
    (0..of.head.contenders.len()).map(spread).collect()
}

/// The ids of all figures that any run has.
pub fn ids(of: &Measurement) -> BTreeSet<String> {
    of.completed().flat_map(|run| run.figures.keys().cloned()).collect()
}

/// The name of each contender, without what is common to all.
pub fn names(head: &Head) -> Vec<String> {
    let different =
        |part: fn(&Setup) -> &str| head.contenders.iter().map(part).collect::<BTreeSet<_>>().len();
    let (groups, whos) = (different(|s| &s.group), different(|s| &s.who));
    let name = |setup: &Setup| match (groups, whos) {
        (1, _) => setup.who.clone(),
        (_, 1) => setup.group.clone(),
        _ => format!("{}: {}", setup.group, setup.who),
    };
    head.contenders.iter().map(name).collect()
}

/// The ratios within a round of a contender's group's first to the contender; `None` for the first itself.
pub fn ratio(of: &Measurement, which: usize, id: &str) -> Option<Distribution> {
    let setups = &of.head.contenders;
    let first = setups.iter().position(|setup| setup.group == setups[which].group)?;
    if first == which {
        return None;
    }
    pairwise(&of.column(first, id), &of.column(which, id))
}

/// How a figure grows.
#[derive(Clone, Debug, PartialEq)]
pub struct Growth {
    /// What grows with what: `felt beyond the usual, ms, for each GiB of memory`.
    pub name: String,
    /// Of what.
    pub who: String,
    /// The slopes, one of each round.
    pub slopes: Distribution,
}

/// One way in which guests may differ: its name, its value in a guest, and the guest without it.
type Axis = (&'static str, fn(&Guest) -> f64, fn(&mut Guest));

const AXES: [Axis; 2] = [
    ("GiB of memory", |guest| guest.memory as f64 / (1u64 << 30) as f64, |guest| guest.memory = 0),
    ("vCPU", |guest| f64::from(guest.vcpus), |guest| guest.vcpus = 0),
];

/// Per cent of the processors that others have on a quiet machine at most, the kernel's own threads included.
const QUIET: f64 = 10.0;

/// Figures whose growth is told.
const GROWING: [&str; 4] = ["felt_ms", "switchover_gap_ms", "blackout_ms", "moving_ms"];

/// Contenders alike in all but one thing: whose they are, and the figures of each with its value on the axis.
pub type Family = (String, Vec<(f64, Vec<f64>)>);

/// Every axis and figure along which contenders differ that are alike in all else.
pub fn grown(of: &Measurement) -> Vec<(&'static str, &'static str, Vec<Family>)> {
    let mut all = Vec::new();
    for (axis, value, without) in AXES {
        let families = families(&of.head, value, without);
        for id in GROWING {
            let figures =
                |(which, x): &(usize, f64)| (*x, of.column(*which, id).into_iter().flatten().collect());
            let family = |(who, members): &(String, Vec<(usize, f64)>)| -> Family {
                (who.clone(), members.iter().map(figures).collect())
            };
            let grown: Vec<Family> = families.iter().map(family).collect();
            if grown.iter().any(|(_, members)| members.iter().any(|(_, figures)| !figures.is_empty())) {
                all.push((axis, id, grown));
            }
        }
    }
    all
}

/// How figures grow along every such axis: the slope of a straight line through each round's runs.
pub fn growths(of: &Measurement) -> Vec<Growth> {
    let mut growths = Vec::new();
    for (axis, value, without) in AXES {
        for (who, members) in families(&of.head, value, without) {
            for id in GROWING {
                let columns: Vec<_> = members.iter().map(|(which, x)| (*x, of.column(*which, id))).collect();
                let slopes = (0..of.head.rounds as usize).filter_map(|round| {
                    let point = |(x, column): &(f64, Vec<Option<f64>>)| Some((*x, column[round]?));
                    let points: Option<Vec<_>> = columns.iter().map(point).collect();
                    slope(&points?)
                });
                if let Some(slopes) = Distribution::of(slopes) {
                    let name = format!("{}, for each {axis}", Figure::of(id).title);
                    growths.push(Growth { name, who: who.clone(), slopes });
                }
            }
        }
    }
    growths
}

/// Contenders of one name that differ on one axis only, with their values on it; the name with what they share, where
/// several families have it.
fn families(
    head: &Head,
    value: fn(&Guest) -> f64,
    without: fn(&mut Guest),
) -> Vec<(String, Vec<(usize, f64)>)> {
    type Key = (String, Guest, bool);
    let mut families: Vec<(Key, Vec<(usize, f64)>)> = Vec::new();
    for (which, setup) in head.contenders.iter().enumerate() {
        let Some(guest) = &setup.guest else { continue };
        let mut rest = guest.clone();
        without(&mut rest);
        let key = (setup.who.clone(), rest, setup.populate);
        match families.iter_mut().find(|(known, _)| *known == key) {
            Some((_, members)) => members.push((which, value(guest))),
            None => families.push((key, vec![(which, value(guest))])),
        }
    }
    families.retain(|(_, members)| members.len() > 1);
    let names: Vec<String> = families.iter().map(|((who, ..), _)| who.clone()).collect();
    let name = |((who, guest, populate), members): (Key, Vec<(usize, f64)>)| {
        let alone = names.iter().filter(|name| **name == who).count() == 1;
        let populated = if populate { ", destination populated" } else { "" };
        let rest = guest.to_string().replace("0 B ", "").replace("0 vCPUs, ", "");
        (if alone { who } else { format!("{who}, {rest}{populated}") }, members)
    };
    families.into_iter().map(name).collect()
}

/// What others had of the processors during the runs, in per cent, where that is known.
pub fn others(of: &Measurement) -> Option<Distribution> {
    Distribution::of(of.runs.iter().filter_map(|run| run.others_percent))
}

/// The same in words.
pub fn tell_others(others: &Distribution) -> String {
    let warning = if others.median > QUIET { "; THE MACHINE WAS NOT QUIET" } else { "" };
    format!("others had {} % of the processors meanwhile{warning}", brief(Some(others), 0))
}

/// The measurement for people.
pub fn text(of: &Measurement) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write_text(&mut text, of);
    text
}

fn write_text(out: &mut String, of: &Measurement) -> std::fmt::Result {
    let Head { bench, rounds, contenders, .. } = &of.head;
    let planned = *rounds as usize * contenders.len();
    writeln!(out, "{bench}: {} of {planned} runs completed, in {rounds} rounds", of.completed().count())?;
    let groups: BTreeSet<_> = contenders.iter().map(|setup| &setup.group).collect();
    if groups.len() == 1 {
        writeln!(out, "{}", contenders[0].group)?;
    }
    if let Some(others) = others(of) {
        writeln!(out, "{}", tell_others(&others))?;
    }
    match &of.end {
        None => {
            writeln!(out, "CUT OFF: the measurement has no end; what follows is made of the runs it got to")?
        }
        Some(end) if end.interrupted => {
            writeln!(out, "interrupted: what follows is made of the runs until then")?
        }
        Some(_) => {}
    }
    for run in &of.runs {
        if let Some(failure) = &run.failure {
            let Setup { group, who, .. } = &contenders[run.contender];
            writeln!(out, "FAILED in round {}: {group}: {who}: {failure}", run.round + 1)?;
        }
    }
    let spreads = spreads(of);
    match &spreads[..] {
        [only] => write_one(out, &of.head, only)?,
        all => write_many(out, of, all)?,
    }
    let growths = growths(of);
    if !growths.is_empty() {
        let mut grows = table(["grows by", "median (min to max), of the slopes of all rounds"]);
        for Growth { name, who, slopes } in growths {
            grows.add_row([format!("{who}: {name}"), brief(Some(&slopes), 2)]);
        }
        writeln!(out, "{grows}")?;
    }
    Ok(())
}

/// Every figure that matters in a row of its own, and the blackout's parts.
fn write_one(out: &mut String, head: &Head, spread: &Spread) -> std::fmt::Result {
    let columns = |first: &'static str| [first, "min", "median", "p90", "max"];
    let row = |id: &str| {
        let Figure { title, digits, .. } = Figure::of(id);
        Some([vec![title], cells(spread.get(id)?, digits).to_vec()].concat())
    };
    let mut figures = table(columns(""));
    figures.add_rows(head.show.iter().filter_map(|id| row(id)));
    writeln!(out, "{figures}")?;
    let mut spans: Vec<&String> = spread.keys().filter(|id| id.starts_with(SPAN)).collect();
    if !spans.is_empty() && head.show.iter().any(|id| id == "blackout_ms") {
        spans.sort_by(|a, b| spread[*b].median.total_cmp(&spread[*a].median));
        let mut parts = table(columns("the blackout's parts, by the source's clock"));
        parts.add_rows(spans.into_iter().filter_map(|id| row(id)));
        writeln!(out, "{parts}")?;
    }
    Ok(())
}

/// A row for each contender, and the ratios within groups.
fn write_many(out: &mut String, of: &Measurement, spreads: &[Spread]) -> std::fmt::Result {
    let names = names(&of.head);
    let seen = |id: &&String| spreads.iter().any(|spread| spread.contains_key(*id));
    let shown: Vec<&String> = of.head.show.iter().filter(seen).collect();
    let titles = |first: &str| -> Vec<String> {
        std::iter::once(first.to_string()).chain(shown.iter().map(|id| Figure::of(id).short)).collect()
    };
    let mut figures = table(titles("median (min to max)"));
    let mut ratios = table(titles("ratio in the same round"));
    for (which, spread) in spreads.iter().enumerate() {
        let row = |cells: Vec<String>, name: String| [vec![name], cells].concat();
        let cell = |id: &&String| brief(spread.get(*id), Figure::of(id).digits);
        figures.add_row(row(shown.iter().map(cell).collect(), names[which].clone()));
        let shares: Vec<_> = shown.iter().map(|id| ratio(of, which, id)).collect();
        if shares.iter().any(Option::is_some) {
            let setups = &of.head.contenders;
            let first = setups.iter().find(|setup| setup.group == setups[which].group);
            let name = format!("{} : {}", first.map_or("", |setup| &setup.who), names[which]);
            ratios.add_row(row(shares.iter().map(|share| brief(share.as_ref(), 2)).collect(), name));
        }
    }
    writeln!(out, "{figures}")?;
    if ratios.row_count() > 0 {
        writeln!(out, "{ratios}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Content;
    use crate::record::{End, tests::measurement};

    #[test]
    fn ratios_are_of_the_first_in_the_group() {
        let m = measurement(
            "migration_mib_s",
            &[("g", "us", &[200.0, 300.0]), ("g", "peer", &[100.0, 100.0]), ("h", "us", &[7.0, 7.0])],
        );
        assert_eq!(ratio(&m, 1, "migration_mib_s").unwrap().median, 2.5);
        assert_eq!(ratio(&m, 0, "migration_mib_s"), None);
        assert_eq!(ratio(&m, 2, "migration_mib_s"), None);
        let text = text(&m);
        assert!(text.contains("6 of 6 runs completed") && text.contains("us : g: peer"), "{text}");
        assert!(text.contains("2.50 (2.00 to 3.00)"), "{text}");
    }

    #[test]
    fn what_is_missing_is_said() {
        let mut m = measurement("total_ms", &[("g", "us", &[1.0, 2.0, 4.0])]);
        m.end = None;
        m.runs[1].failure = Some("the guest was damaged".into());
        m.runs[1].figures.clear();
        let text = text(&m);
        assert!(text.contains("2 of 3 runs completed") && text.contains("CUT OFF"), "{text}");
        assert!(text.contains("FAILED in round 2: g: us: the guest was damaged"), "{text}");
        assert!(!text.contains("others had"), "{text}");
        m.runs[0].others_percent = Some(40.0);
        assert!(
            super::text(&m).contains("others had 40 (40 to 40) % of the processors meanwhile; THE MACHINE")
        );
        m.runs[0].others_percent = Some(2.0);
        assert!(super::text(&m).contains("meanwhile\n"));
        m.runs.clear();
        m.end = Some(End { interrupted: true, summary: Vec::new() });
        assert!(super::text(&m).contains("interrupted"), "also with no run at all");
    }

    #[test]
    fn growth_is_along_the_axis_that_differs() {
        let (one, two, three) = ([1.0, 1.5], [2.0, 2.5], [3.0, 9.5]);
        let mut m = measurement("felt_ms", &[("a", "us", &one), ("b", "us", &two), ("c", "us", &three)]);
        for (setup, gib) in m.head.contenders.iter_mut().zip([1, 2, 3]) {
            setup.guest = Some(Guest::idle(gib << 30, Content::Random));
        }
        let growths = growths(&m);
        assert_eq!(growths.len(), 1);
        assert_eq!(growths[0].name, "felt beyond the usual, ms, for each GiB of memory");
        assert_eq!((growths[0].slopes.min, growths[0].slopes.max), (1.0, 4.0));
        m.head.contenders[2].guest.as_mut().unwrap().vcpus = 2;
        m.head.contenders[1].who = "them".into();
        assert!(super::growths(&m).is_empty(), "nothing differs in one thing only");
    }
}
