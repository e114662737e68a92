//! A measurement: a head that says what is compared and on which machine, the runs, and an end.
//!
//! Each of these is one line of JSON in a file (see [`log`](crate::log)).

use crate::facts::Facts;
use crate::figures::{Figures, Spread};
use crate::guest::Guest;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The version of the file format.
pub const FORMAT: u32 = 2;

/// Converts to JSON. What cannot be converted becomes null.
pub fn value(of: impl Serialize) -> Value {
    serde_json::to_value(of).unwrap_or(Value::Null)
}

/// What is compared, and on which machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Head {
    /// [`FORMAT`].
    pub format: u32,
    /// The subcommand.
    pub bench: String,
    /// Seconds since 1970.
    pub time: u64,
    /// The machine.
    pub facts: Facts,
    /// Rounds, each with one run of everything that is compared.
    pub rounds: u32,
    /// Whether memory was warmed up before each run.
    pub warmed_up: bool,
    /// Ids of the figures that are shown, in their order.
    pub show: Vec<String>,
    /// Everything that is compared.
    pub contenders: Vec<Setup>,
}

/// A contender as a file describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setup {
    /// The group in which it is compared: ratios are those of the group's first contender to each of the
    /// others.
    pub group: String,
    /// Its name.
    pub who: String,
    /// The guest that it moves, if any.
    pub guest: Option<Guest>,
    /// Whether the destination is populated first.
    pub populate: bool,
    /// Of one that encrypts: the name of the one, in the same group, that does the same without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plain: Option<String>,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Number of the round, from 0.
    pub round: u32,
    /// Number of the contender in the head, from 0.
    pub contender: usize,
    /// Its figures; empty if it failed.
    pub figures: Figures,
    /// Why it failed.
    pub failure: Option<String>,
    /// The share of all processors, in per cent, that other processes used during the run, where that is
    /// known.
    pub others_percent: Option<f64>,
    /// The contender's own result, unchanged.
    pub said: Value,
}

/// The end of a measurement.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct End {
    /// Whether it was interrupted before its last round.
    pub interrupted: bool,
    /// The distributions of each contender's figures, for programs that need nothing else.
    pub summary: Vec<Spread>,
    /// Those that encrypt beside those that do not, and beside each other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub encrypted: Vec<Encrypted>,
}

/// A contender that encrypts, beside others in the same rounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Encrypted {
    /// Its number in the head, from 0.
    pub contender: usize,
    /// What it is compared by, and the distribution of that.
    pub shares: Spread,
}

/// A line of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
pub enum Line {
    /// A measurement starts.
    Head(Box<Head>),
    /// A run is over.
    Run(Run),
    /// The measurement is over.
    End(End),
}

/// A measurement, complete or up to where it was cut off.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    /// Its head.
    pub head: Head,
    /// Its runs, in the order in which they were made.
    pub runs: Vec<Run>,
    /// Its end; `None` if it was cut off.
    pub end: Option<End>,
}

impl Measurement {
    /// A measurement without runs.
    pub fn new(head: Head) -> Self {
        Measurement { head, runs: Vec::new(), end: None }
    }

    /// A figure of every run of a contender, by round; `None` for runs that failed or do not have it.
    pub fn column(&self, contender: usize, id: &str) -> Vec<Option<f64>> {
        let mut column = vec![None; self.head.rounds as usize];
        for run in self.runs.iter().filter(|run| run.contender == contender) {
            if let Some(place) = column.get_mut(run.round as usize) {
                *place = run.figures.get(id).copied();
            }
        }
        column
    }

    /// Runs that succeeded.
    pub fn completed(&self) -> impl Iterator<Item = &Run> {
        self.runs.iter().filter(|run| run.failure.is_none())
    }
}

/// Merges measurements of the same contenders on the same machine into one with the rounds of all.
pub fn merged(all: Vec<Measurement>) -> Vec<Measurement> {
    let mut merged: Vec<Measurement> = Vec::new();
    for mut measured in all {
        let same = |earlier: &&mut Measurement| {
            let (time, rounds) = (earlier.head.time, earlier.head.rounds);
            earlier.head == Head { time, rounds, ..measured.head.clone() }
        };
        match merged.iter_mut().find(same) {
            Some(earlier) => {
                measured.runs.iter_mut().for_each(|run| run.round += earlier.head.rounds);
                earlier.head.rounds += measured.head.rounds;
                earlier.runs.append(&mut measured.runs);
                let interrupted = |m: &Measurement| m.end.as_ref().map(|end| end.interrupted);
                let either = interrupted(earlier).zip(interrupted(&measured)).map(|(a, b)| a || b);
                earlier.end =
                    either.map(|interrupted| End { interrupted, summary: Vec::new(), encrypted: Vec::new() });
            }
            None => merged.push(measured),
        }
    }
    merged
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::figures;

    /// A measurement of these contenders, with one figure `id` of each in every round.
    pub(crate) fn measurement(id: &str, contenders: &[(&str, &str, &[f64])]) -> Measurement {
        let rounds = contenders.iter().map(|(.., column)| column.len()).max().unwrap_or(0);
        let setup = |(group, who, _): &(&str, &str, &[f64])| Setup {
            group: group.to_string(),
            who: who.to_string(),
            guest: None,
            populate: false,
            plain: None,
        };
        let head = Head {
            format: FORMAT,
            bench: "throughput".into(),
            time: 0,
            facts: Facts::gather(),
            rounds: rounds as u32,
            warmed_up: false,
            show: vec![id.into()],
            contenders: contenders.iter().map(setup).collect(),
        };
        let mut runs = Vec::new();
        for round in 0..rounds {
            for (contender, (.., column)) in contenders.iter().enumerate() {
                if let Some(figure) = column.get(round) {
                    let figures = figures::named([(id, Some(*figure))]);
                    runs.push(Run {
                        round: round as u32,
                        contender,
                        figures,
                        failure: None,
                        others_percent: None,
                        said: Value::Null,
                    });
                }
            }
        }
        Measurement {
            head,
            runs,
            end: Some(End { interrupted: false, summary: Vec::new(), encrypted: Vec::new() }),
        }
    }

    #[test]
    fn what_was_measured_twice_is_one_measurement_with_more_rounds() {
        let one = measurement("total_ms", &[("g", "a", &[1.0, 2.0])]);
        let mut two = measurement("total_ms", &[("g", "a", &[3.0])]);
        two.head.time = 99;
        two.end = None;
        let other = measurement("total_ms", &[("g", "b", &[4.0])]);
        let all = merged(vec![one, other.clone(), two]);
        assert_eq!((all.len(), &all[1]), (2, &other));
        assert_eq!(all[0].column(0, "total_ms"), [Some(1.0), Some(2.0), Some(3.0)]);
        assert_eq!(all[0].end, None, "a part of it was cut off");
    }

    #[test]
    fn columns_have_a_place_for_every_round() {
        let mut m = measurement("total_ms", &[("g", "a", &[1.0, 2.0, 3.0]), ("g", "b", &[4.0])]);
        m.runs[2].failure = Some("lost".into());
        m.runs[2].figures.clear();
        assert_eq!(m.column(0, "total_ms"), [Some(1.0), None, Some(3.0)]);
        assert_eq!(m.column(1, "total_ms"), [Some(4.0), None, None]);
        assert_eq!(m.completed().count(), 3);
    }
}
