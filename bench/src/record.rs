//! What was measured, one JSON object a line: a head that says what is compared and on what machine, then
//! every run as soon as it is over, and an end. What was cut off lacks its end and is good up to there; one file may
//! hold several measurements, one after the other.

use crate::facts::Facts;
use crate::figures::Figures;
use crate::guest::Guest;
use crate::summary::Spread;
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom, Write};
use std::path::Path;

/// The version of all this.
pub const FORMAT: u32 = 2;

/// Most rounds of a measurement: columns have a place for each.
const MOST_ROUNDS: u32 = 100_000;

/// Anything that has a JSON form, as a value; what has none is null.
pub fn value(of: impl Serialize) -> Value {
    serde_json::to_value(of).unwrap_or(Value::Null)
}

/// What is compared and where.
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
    /// Ids of the figures that matter, in their order.
    pub show: Vec<String>,
    /// Everything that is compared.
    pub contenders: Vec<Setup>,
}

/// One thing that is compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Setup {
    /// What it is compared on: ratios are taken within a group, of its first contender to each of the others.
    pub group: String,
    /// What it is.
    pub who: String,
    /// The guest that moves, if one does.
    pub guest: Option<Guest>,
    /// Whether the destination is populated first.
    pub populate: bool,
}

/// One run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Number of the round, from 0.
    pub round: u32,
    /// Number of the contender in the head, from 0.
    pub contender: usize,
    /// What it measured; empty if it failed.
    pub figures: Figures,
    /// Why it failed.
    pub failure: Option<String>,
    /// Share of all processors, in per cent, that others had meanwhile, where that is known.
    pub others_percent: Option<f64>,
    /// Everything that the contender said of it.
    pub said: Value,
}

/// How it ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct End {
    /// Whether somebody ended it before its last round.
    pub interrupted: bool,
    /// The distributions of each contender's figures, for programs that want nothing else.
    pub summary: Vec<Spread>,
}

/// A line of a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "line", rename_all = "kebab-case")]
pub enum Line {
    /// A measurement begins.
    Head(Box<Head>),
    /// A run is over.
    Run(Run),
    /// The measurement is over.
    End(End),
}

/// A measurement, whole or up to where it was cut off.
#[derive(Clone, Debug, PartialEq)]
pub struct Measurement {
    /// Its head.
    pub head: Head,
    /// Its runs, in the order in which they were made.
    pub runs: Vec<Run>,
    /// Its end, if it came so far.
    pub end: Option<End>,
}

impl Measurement {
    /// One that begins.
    pub fn new(head: Head) -> Self {
        Measurement { head, runs: Vec::new(), end: None }
    }

    /// A figure of every run of a contender, by round; `None` for runs that failed or lack it.
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

/// Reads the measurements in a file.
///
/// # Errors
/// When there is none in it, or a line other than the last, which may be cut off, is not one of ours.
pub fn read(path: &Path) -> anyhow::Result<Vec<Measurement>> {
    let text = fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
    parse(&text).with_context(|| path.display().to_string())
}

fn parse(text: &str) -> anyhow::Result<Vec<Measurement>> {
    let mut all: Vec<Measurement> = Vec::new();
    for (number, line) in text.split_inclusive('\n').enumerate() {
        let parsed = match serde_json::from_str(line) {
            Ok(parsed) => parsed,
            Err(_) if !line.ends_with('\n') => break,
            Err(e) => bail!("line {}: {e}; is it a file that --save wrote?", number + 1),
        };
        match (parsed, all.last_mut()) {
            (Line::Head(head), _) if head.format != FORMAT => {
                bail!("line {}: format {} instead of {FORMAT}; measure again", number + 1, head.format)
            }
            (Line::Head(head), _) if head.rounds > MOST_ROUNDS => {
                bail!("line {}: {} rounds, more than anybody has made", number + 1, head.rounds)
            }
            (Line::Head(head), _) => all.push(Measurement::new(*head)),
            (Line::Run(run), Some(Measurement { head, runs, .. }))
                if run.contender < head.contenders.len() && run.round < head.rounds =>
            {
                runs.push(run);
            }
            (Line::End(end), Some(last)) => last.end = Some(end),
            (Line::Run(_) | Line::End(_), _) => bail!("line {}: a run of nothing that was begun", number + 1),
        }
    }
    anyhow::ensure!(!all.is_empty(), "there is no measurement in it");
    Ok(all)
}

/// The measurements, of which those that measured the same on the same machine are one with the rounds of all.
pub fn joined(all: Vec<Measurement>) -> Vec<Measurement> {
    let mut joined: Vec<Measurement> = Vec::new();
    for mut measured in all {
        let same = |earlier: &&mut Measurement| {
            let (time, rounds) = (earlier.head.time, earlier.head.rounds);
            earlier.head == Head { time, rounds, ..measured.head.clone() }
        };
        match joined.iter_mut().find(same) {
            Some(earlier) => {
                measured.runs.iter_mut().for_each(|run| run.round += earlier.head.rounds);
                earlier.head.rounds += measured.head.rounds;
                earlier.runs.append(&mut measured.runs);
                let interrupted = |m: &Measurement| m.end.as_ref().map(|end| end.interrupted);
                let either = interrupted(earlier).zip(interrupted(&measured)).map(|(a, b)| a || b);
                earlier.end = either.map(|interrupted| End { interrupted, summary: Vec::new() });
            }
            None => joined.push(measured),
        }
    }
    joined
}

/// Writes lines as they come.
pub struct Log {
    file: Option<File>,
    stdout: bool,
}

impl Log {
    /// A log that goes to standard output, is appended to a file, both or neither.
    ///
    /// # Errors
    /// When the file cannot be opened.
    pub fn open(stdout: bool, path: Option<&Path>) -> anyhow::Result<Self> {
        let open = |path: &Path| -> std::io::Result<File> {
            let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
            cut_torn_line(&mut file)?;
            Ok(file)
        };
        let file = path.map(|path| open(path).with_context(|| format!("cannot write to {}", path.display())));
        Ok(Log { file: file.transpose()?, stdout })
    }

    /// Writes a line, and has it on its way to the disk before it returns.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&mut self, line: &Line) -> anyhow::Result<()> {
        if self.file.is_none() && !self.stdout {
            return Ok(());
        }
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        if let Some(file) = &mut self.file {
            file.write_all(text.as_bytes()).context("cannot save a run")?;
        }
        if self.stdout {
            let mut stdout = std::io::stdout().lock();
            stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()).context("cannot print a run")?;
        }
        Ok(())
    }
}

/// Removes the rest of a line that an earlier measurement could not finish, which would spoil the next one.
fn cut_torn_line(file: &mut File) -> std::io::Result<()> {
    let mut text = Vec::new();
    std::io::Read::read_to_end(file, &mut text)?;
    let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    if whole < text.len() {
        file.set_len(whole as u64)?;
        file.seek(SeekFrom::End(0))?;
    }
    Ok(())
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
        Measurement { head, runs, end: Some(End { interrupted: false, summary: Vec::new() }) }
    }

    fn lines(of: &Measurement) -> Vec<Line> {
        let head = std::iter::once(Line::Head(Box::new(of.head.clone())));
        let ends = of.end.iter().cloned().map(Line::End);
        head.chain(of.runs.iter().cloned().map(Line::Run)).chain(ends).collect()
    }

    #[test]
    fn what_was_saved_is_read_also_if_it_was_cut_off() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs.jsonl");
        let whole = measurement("total_ms", &[("g", "a", &[1.0, 2.0]), ("g", "b", &[3.0])]);
        let mut log = Log::open(false, Some(&path)).unwrap();
        lines(&whole).iter().for_each(|line| log.write(line).unwrap());
        assert_eq!(read(&path).unwrap(), std::slice::from_ref(&whole));

        // Cut off in the middle of its third line, and then continued with another measurement.
        let text = fs::read_to_string(&path).unwrap();
        let third = text.match_indices('\n').nth(2).unwrap().0;
        fs::write(&path, &text[..third - 5]).unwrap();
        let cut = &read(&path).unwrap()[0];
        assert_eq!((cut.runs.len(), &cut.end), (1, &None));
        let mut log = Log::open(false, Some(&path)).unwrap();
        lines(&whole).iter().for_each(|line| log.write(line).unwrap());
        let both = read(&path).unwrap();
        assert_eq!((both.len(), both[0].runs.len(), &both[1]), (2, 1, &whole));
    }

    #[test]
    fn files_of_others_are_refused() {
        for text in ["", "{}\n", "hello\n", "{\"line\":\"end\",\"interrupted\":false,\"summary\":[]}\n"] {
            assert!(parse(text).is_err(), "{text:?}");
        }
        let whole = measurement("total_ms", &[("g", "a", &[1.0])]);
        let text = |lines: &[Line]| -> String {
            lines.iter().map(|line| serde_json::to_string(line).unwrap() + "\n").collect()
        };
        let mut stranger = lines(&whole);
        let Line::Run(run) = &mut stranger[1] else { panic!("a run") };
        run.contender = 1;
        assert!(parse(&text(&stranger)).is_err(), "a contender that is not in the head");
        let mut late = lines(&whole);
        let Line::Run(run) = &mut late[1] else { panic!("a run") };
        run.round = 1;
        assert!(parse(&text(&late)).is_err(), "a round that was not to be");
        let mut endless = whole.clone();
        endless.head.rounds = u32::MAX;
        assert!(parse(&text(&lines(&endless))).is_err());
        let mut old = whole.clone();
        old.head.format = 1;
        assert!(parse(&text(&lines(&old))).unwrap_err().to_string().contains("format 1"));
    }

    #[test]
    fn what_was_measured_twice_is_one_measurement_with_more_rounds() {
        let one = measurement("total_ms", &[("g", "a", &[1.0, 2.0])]);
        let mut two = measurement("total_ms", &[("g", "a", &[3.0])]);
        two.head.time = 99;
        two.end = None;
        let other = measurement("total_ms", &[("g", "b", &[4.0])]);
        let all = joined(vec![one, other.clone(), two]);
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
