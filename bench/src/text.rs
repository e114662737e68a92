//! A measurement as text with tables.

use crate::bound::{self, Beside, Comparison};
use crate::figures::{Figure, SPAN, Spread};
use crate::growth::{Growth, growths};
use crate::output::{brief, cells, table};
use crate::record::{Head, Measurement, Setup};
use crate::summary::{describe_others, names, others, ratio, spreads};
use std::collections::BTreeSet;
use std::fmt::Write;

/// The whole text.
pub fn text(of: &Measurement) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
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
        writeln!(out, "{}", describe_others(&others))?;
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
    write_encryption(out, of)?;
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

/// A row for each figure, and the parts of the blackout.
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

/// A row for each contender that encrypts, beside the one that does not.
fn write_encryption(out: &mut String, of: &Measurement) -> std::fmt::Result {
    let Some(Comparison { titles, all }) = bound::beside(of) else { return Ok(()) };
    let names = names(&of.head);
    let mut beside = table(std::iter::once("beside plain in the same round").chain(titles));
    for Beside { which, how, shares } in all {
        let how = how.map(|how| format!(" ({how})")).unwrap_or_default();
        let cells = shares.iter().map(|share| brief(share.as_ref(), 2));
        beside.add_row(std::iter::once(format!("{}{how}", names[which])).chain(cells));
    }
    writeln!(out, "{beside}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::{End, tests::measurement};

    #[test]
    fn ratios_are_those_of_the_first_in_the_group_to_the_others() {
        let columns: [(&str, &str, &[f64]); 2] = [("g", "us", &[200.0, 300.0]), ("h", "us", &[7.0, 7.0])];
        let peer: (&str, &str, &[f64]) = ("g", "peer", &[100.0, 100.0]);
        let text = text(&measurement("migration_mib_s", &[columns[0], peer, columns[1]]));
        assert!(text.contains("6 of 6 runs completed") && text.contains("us : g: peer"), "{text}");
        assert!(text.contains("2.50 (2.00 to 3.00)"), "{text}");
    }

    #[test]
    fn what_encrypts_is_told_beside_what_does_not() {
        let columns: [(&str, &str, &[f64]); 2] =
            [("g", "us", &[200.0, 300.0]), ("g", "us, TLS", &[100.0, 75.0])];
        let mut m = measurement("migration_mib_s", &columns);
        m.head.contenders[1].plain = Some("us".into());
        m.runs[3].said = serde_json::json!({ "lanes": [{ "encryption": "tls-in-user-space" }] });
        let text = text(&m);
        let row = text.lines().find(|line| line.contains("us, TLS (TLS 1.3 in user space)")).expect("a row");
        assert!(row.contains("0.38 (0.25 to 0.50)") && row.contains('–'), "no bound is known: {text}");
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
        m.end = Some(End { interrupted: true, summary: Vec::new(), encrypted: Vec::new() });
        assert!(super::text(&m).contains("interrupted"), "also with no run at all");
    }
}
