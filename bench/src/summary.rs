//! The results of a measurement, from completed runs only.

use crate::figures::Spread;
use crate::output::brief;
use crate::record::{Head, Measurement, Setup};
use crate::statistics::{Distribution, pairwise};
use std::collections::BTreeSet;

/// The distributions of all figures, for each contender.
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

/// The name of each contender, without the part that all have in common.
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

/// The ratios, round by round, of the first contender of a group to another one; `None` for the first itself.
pub fn ratio(of: &Measurement, which: usize, id: &str) -> Option<Distribution> {
    let setups = &of.head.contenders;
    let first = setups.iter().position(|setup| setup.group == setups[which].group)?;
    if first == which {
        return None;
    }
    pairwise(&of.column(first, id), &of.column(which, id))
}

/// The most that other processes use on a quiet machine, in per cent of all processors; kernel threads count
/// too.
const QUIET: f64 = 10.0;

/// The share of the processors, in per cent, that other processes used during the runs, where that is known.
pub fn others(of: &Measurement) -> Option<Distribution> {
    Distribution::of(of.runs.iter().filter_map(|run| run.others_percent))
}

/// That share in words.
pub fn describe_others(others: &Distribution) -> String {
    let warning = if others.median > QUIET { "; THE MACHINE WAS NOT QUIET" } else { "" };
    format!("others had {} % of the processors meanwhile{warning}", brief(Some(others), 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::measurement;

    #[test]
    fn ratios_are_of_the_first_in_the_group() {
        let m = measurement(
            "migration_mib_s",
            &[("g", "us", &[200.0, 300.0]), ("g", "peer", &[100.0, 100.0]), ("h", "us", &[7.0, 7.0])],
        );
        assert_eq!(ratio(&m, 1, "migration_mib_s").unwrap().median, 2.5);
        assert_eq!(ratio(&m, 0, "migration_mib_s"), None);
        assert_eq!(ratio(&m, 2, "migration_mib_s"), None);
    }
}
