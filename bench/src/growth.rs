//! How figures grow with the size of the guest.

use crate::figures::Figure;
use crate::guest::Guest;
use crate::record::{Head, Measurement};
use crate::statistics::{Distribution, slope};

/// How a figure grows.
#[derive(Clone, Debug, PartialEq)]
pub struct Growth {
    /// What grows with what, such as `felt beyond the usual, ms, for each GiB of memory`.
    pub name: String,
    /// The contender.
    pub who: String,
    /// The slopes of all rounds.
    pub slopes: Distribution,
}

/// A dimension in which guests differ: its name, its value for a guest, and what sets it to a common value.
type Axis = (&'static str, fn(&Guest) -> f64, fn(&mut Guest));

const AXES: [Axis; 2] = [
    ("GiB of memory", |guest| guest.memory as f64 / (1u64 << 30) as f64, |guest| guest.memory = 0),
    ("vCPU", |guest| f64::from(guest.vcpus), |guest| guest.vcpus = 0),
];

/// The figures whose growth is shown.
const GROWING: [&str; 4] = ["felt_ms", "switchover_gap_ms", "blackout_ms", "moving_ms"];

/// Contenders that differ along one axis only: their common name, and the figures of each with its value on
/// the axis.
pub type Family = (String, Vec<(f64, Vec<f64>)>);

/// Every axis and figure for which there is a family, with the families.
pub fn families_by_figure(of: &Measurement) -> Vec<(&'static str, &'static str, Vec<Family>)> {
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

/// How figures grow along every axis: the slopes of straight lines through the runs of each round.
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

/// Contenders of one name that differ along one axis only, with their values on it. Where several families
/// have the same name, the rest of the guest's description is added.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Content;
    use crate::record::tests::measurement;

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
