//! Which differences between two measurements are significant.
//!
//! Every figure of every contender that both measurements have is compared. The result is the ratio of new to
//! old, which is the median over all pairs of runs, and a p-value: the probability that runs of one and the
//! same program would differ as much in rank. P-values are adjusted for the number of comparisons. A
//! difference is *real* if its p-value is under 5 % and its ratio is further from 1 than the options ask for.
//!
//! No test can tell a slower program from a machine that was slower for an hour. Figures may therefore be
//! taken relative to an unchanged contender that both measurements have, in the same round of the same group.
//! Where there is none, both programs belong in one measurement (`throughput --against`).

use crate::facts::Facts;
use crate::figures::{Better, Figure};
use crate::output::{brief, table};
use crate::record::{Measurement, Setup};
use crate::statistics::{Distribution, adjusted_p_values, p_value, ratios};
use crate::summary;
use anyhow::Context;
use serde::Serialize;
use std::fmt::Write;

/// The p-value under which a difference is real.
const SIGNIFICANCE: f64 = 0.05;

/// What a difference means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Real and better.
    Better,
    /// Real and worse.
    Worse,
    /// Real, but of a figure for which neither direction is better.
    Other,
    /// Too small, or not significant.
    None,
}

/// One figure of one contender in both measurements.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Difference {
    /// The subcommand.
    pub bench: String,
    /// The group of the contender.
    pub group: String,
    /// The contender.
    pub who: String,
    /// The figure's id.
    pub figure: String,
    /// Before.
    pub old: Distribution,
    /// After.
    pub new: Distribution,
    /// The ratios of every new run to every old run.
    pub ratio: Distribution,
    /// The p-value, adjusted for the number of comparisons.
    pub chance: f64,
    /// What it means.
    pub verdict: Verdict,
}

/// How to compare.
#[derive(Clone, Debug)]
pub struct Options {
    /// The least distance of a ratio from 1 that matters.
    pub least: f64,
    /// Take figures relative to those of this contender.
    pub relative_to: Option<String>,
    /// Compare all figures, not only those that the measurement shows.
    pub all: bool,
}

/// One figure of one contender: the subcommand, the group, the contender and the figure's id.
#[derive(Clone, Debug, PartialEq)]
struct Subject {
    bench: String,
    group: String,
    who: String,
    figure: String,
}

/// The figures in a file that are compared.
fn subjects(of: &[Measurement], options: &Options) -> Vec<Subject> {
    let mut all: Vec<Subject> = Vec::new();
    for measured in of {
        let ids = summary::ids(measured);
        let wanted = || ids.iter().filter(|id| options.all || measured.head.show.contains(id));
        for (setup, id) in
            measured.head.contenders.iter().flat_map(|setup| wanted().map(move |id| (setup, id)))
        {
            let subject = Subject {
                bench: measured.head.bench.clone(),
                group: setup.group.clone(),
                who: setup.who.clone(),
                figure: id.clone(),
            };
            if !all.contains(&subject) {
                all.push(subject);
            }
        }
    }
    all
}

/// The values of a figure in all measurements of a file, as they are or relative to another contender's in
/// the same round.
fn sample(of: &[Measurement], subject: &Subject, options: &Options) -> Vec<f64> {
    let mut sample = Vec::new();
    for measured in of.iter().filter(|measured| measured.head.bench == subject.bench) {
        let column = |who: &str| {
            let is = |setup: &Setup| setup.group == subject.group && setup.who == who;
            let place = measured.head.contenders.iter().position(is)?;
            Some(measured.column(place, &subject.figure))
        };
        let Some(own) = column(&subject.who) else { continue };
        match &options.relative_to {
            None => sample.extend(own.into_iter().flatten()),
            Some(control) if *control == subject.who => {}
            Some(control) => {
                let pairs = own.into_iter().zip(column(control).unwrap_or_default());
                let shares = pairs.filter_map(|(own, control)| Some(own? / control?));
                sample.extend(shares.filter(|share| share.is_finite()));
            }
        }
    }
    sample
}

/// Compares everything that both files have. The runs of several measurements of one kind are pooled.
///
/// # Errors
/// When the files have no contender with runs in common.
pub fn compare(
    old: &[Measurement],
    new: &[Measurement],
    options: &Options,
) -> anyhow::Result<Vec<Difference>> {
    let difference = |subject: Subject| {
        let (before, after) = (sample(old, &subject, options), sample(new, &subject, options));
        let Subject { bench, group, who, figure } = subject;
        Some(Difference {
            ratio: ratios(&after, &before)?,
            chance: p_value(&before, &after),
            old: Distribution::of(before)?,
            new: Distribution::of(after)?,
            verdict: Verdict::None,
            bench,
            group,
            who,
            figure,
        })
    };
    let mut differences: Vec<_> = subjects(new, options).into_iter().filter_map(difference).collect();
    anyhow::ensure!(
        !differences.is_empty(),
        "the files have no contender with runs in common{}",
        if options.relative_to.is_some() { " beside the one that figures are relative to" } else { "" }
    );
    let adjusted = adjusted_p_values(&differences.iter().map(|d| d.chance).collect::<Vec<_>>());
    for (difference, chance) in differences.iter_mut().zip(adjusted) {
        difference.chance = chance;
        difference.verdict = verdict(difference, options);
    }
    Ok(differences)
}

fn verdict(of: &Difference, options: &Options) -> Verdict {
    let ratio = of.ratio.median;
    // The distance is the same in both directions: half as much is as far from 1 as twice as much.
    if of.chance >= SIGNIFICANCE || ratio.max(1.0 / ratio) < 1.0 + options.least {
        return Verdict::None;
    }
    match (Figure::of(&of.figure).better, ratio > 1.0) {
        (None, _) => Verdict::Other,
        (Some(Better::Higher), true) | (Some(Better::Lower), false) => Verdict::Better,
        (Some(_), _) => Verdict::Worse,
    }
}

/// The facts in which the machines differ.
fn other_machine(old: &Facts, new: &Facts) -> anyhow::Result<Vec<String>> {
    let object = |facts: &Facts| -> anyhow::Result<_> {
        serde_json::to_value(facts)?.as_object().cloned().context("facts are an object")
    };
    let (old, new) = (object(old)?, object(new)?);
    let differs = new.iter().filter(|(name, value)| *name != "version" && old.get(*name) != Some(value));
    let tell = |(name, value): (&String, &serde_json::Value)| {
        format!("{name}: {} then, {value} now", old.get(name).unwrap_or(&serde_json::Value::Null))
    };
    Ok(differs.map(tell).collect())
}

/// The comparison as text: the real differences, then the number of comparisons.
///
/// # Errors
/// When the facts of the machines cannot be compared.
pub fn text(
    old: &[Measurement],
    new: &[Measurement],
    options: &Options,
    all: &[Difference],
) -> anyhow::Result<String> {
    let mut text = String::new();
    if let (Some(old), Some(new)) = (old.first(), new.first()) {
        for fact in other_machine(&old.head.facts, &new.head.facts)? {
            writeln!(text, "ANOTHER MACHINE: {fact}")?;
        }
    }
    let cut =
        |all: &[Measurement]| all.iter().filter(|m| m.end.as_ref().is_none_or(|e| e.interrupted)).count();
    for (name, all) in [("OLD", old), ("NEW", new)] {
        if cut(all) > 0 {
            writeln!(text, "{name}: {} of {} measurements were cut off", cut(all), all.len())?;
        }
    }
    let mut real = table(["real differences", "old", "new", "new : old", "chance", ""]);
    for d in all.iter().filter(|d| d.verdict != Verdict::None) {
        let Figure { title, digits, .. } = Figure::of(&d.figure);
        let digits = if options.relative_to.is_some() { 2 } else { digits };
        real.add_row([
            format!("{}: {}: {}: {title}", d.bench, d.group, d.who),
            brief(Some(&d.old), digits),
            brief(Some(&d.new), digits),
            format!("{:.2}", d.ratio.median),
            format!("{:.1} %", d.chance * 100.0),
            match d.verdict {
                Verdict::Better => "better".into(),
                Verdict::Worse => "WORSE".into(),
                Verdict::Other | Verdict::None => String::new(),
            },
        ]);
    }
    if real.row_count() > 0 {
        writeln!(text, "{real}")?;
    }
    let fewest = all.iter().map(|d| d.old.count.min(d.new.count)).min().unwrap_or(0);
    writeln!(
        text,
        "{} of {} comparisons show a real difference: chance under {:.0} %, ratio at least {:.0} % from 1",
        real.row_count(),
        all.len(),
        SIGNIFICANCE * 100.0,
        options.least * 100.0
    )?;
    if fewest < 5 {
        writeln!(
            text,
            "only {fewest} runs of some: too few to tell anything but chance; use at least 7 rounds"
        )?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::measurement;

    const PLAIN: Options = Options { least: 0.02, relative_to: None, all: false };

    fn spread(centre: f64) -> Vec<f64> {
        [0.97, 1.01, 0.99, 1.02, 1.0, 0.98, 1.03].map(|x| x * centre).to_vec()
    }

    fn rates(us: f64, peer: f64) -> [Measurement; 1] {
        let (us, peer) = (spread(us), spread(peer));
        [measurement("migration_mib_s", &[("g", "us", &us), ("g", "peer", &peer)])]
    }

    fn verdicts(old: &[Measurement], new: &[Measurement], options: &Options) -> Vec<(String, Verdict)> {
        let all = compare(old, new, options).unwrap();
        all.into_iter().map(|d| (d.who, d.verdict)).collect()
    }

    #[test]
    fn what_is_real_is_told_from_what_is_not() {
        let named = |us, peer| vec![("us".to_string(), us), ("peer".to_string(), peer)];
        let old = rates(1000.0, 500.0);
        assert_eq!(verdicts(&old, &old, &PLAIN), named(Verdict::None, Verdict::None));
        assert_eq!(verdicts(&old, &rates(1200.0, 501.0), &PLAIN), named(Verdict::Better, Verdict::None));
        assert_eq!(verdicts(&old, &rates(800.0, 500.0), &PLAIN), named(Verdict::Worse, Verdict::None));
        let coarse = Options { least: 0.5, ..PLAIN };
        assert_eq!(verdicts(&old, &rates(800.0, 500.0), &coarse), named(Verdict::None, Verdict::None));
        let text =
            text(&old, &rates(800.0, 500.0), &PLAIN, &compare(&old, &rates(800.0, 500.0), &PLAIN).unwrap());
        let text = text.unwrap();
        assert!(text.contains("WORSE") && text.contains("1 of 2 comparisons"), "{text}");
    }

    #[test]
    fn a_slow_hour_is_no_slow_program() {
        let (old, slow_hour) = (rates(1000.0, 500.0), rates(700.0, 350.0));
        assert!(verdicts(&old, &slow_hour, &PLAIN).iter().all(|(_, verdict)| *verdict == Verdict::Worse));
        let relative = Options { relative_to: Some("peer".into()), ..PLAIN };
        assert_eq!(verdicts(&old, &slow_hour, &relative), [("us".to_string(), Verdict::None)]);
        assert_eq!(verdicts(&old, &rates(700.0, 500.0), &relative), [("us".to_string(), Verdict::Worse)]);
        let absent = Options { relative_to: Some("nobody".into()), ..PLAIN };
        assert!(compare(&old, &slow_hour, &absent).is_err());
    }

    #[test]
    fn only_like_is_compared_with_like() {
        let other = [measurement("migration_mib_s", &[("another group", "us", &spread(1.0))])];
        assert!(compare(&rates(1.0, 1.0), &other, &PLAIN).is_err());
        let twice = [rates(1000.0, 1.0), rates(1000.0, 1.0)].concat();
        let pooled = compare(&twice, &rates(1000.0, 1.0), &PLAIN).unwrap();
        assert_eq!((pooled[0].old.count, pooled[0].new.count), (14, 7));
    }

    #[test]
    fn another_machine_is_noticed() {
        let mut facts = Facts::gather();
        let here = facts.clone();
        assert!(other_machine(&here, &facts).unwrap().is_empty());
        facts.cpus += 1;
        facts.version = "another".into();
        let differs = other_machine(&here, &facts).unwrap();
        assert!(differs.len() == 1 && differs[0].starts_with("cpus: "), "{differs:?}");
    }
}
