//! What became of an evacuation.

use super::super::{Exit, render};
use migration::Failure;
use serde_json::{Value, json};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;
use whimbrel::api::model::{Migration, VmState};
use whimbrel::host::inventory::Listed;

/// What became of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It runs elsewhere.
    Moved,
    /// It is here.
    Stayed,
    /// It is paused here, and may run elsewhere: an operator decides.
    Held,
    /// It is not known whether it has moved.
    Unknown,
    /// It has ended by itself.
    Ended,
    /// Its process does not answer.
    Silent,
    /// It is just coming here.
    Arriving,
}

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Outcome::Moved => "moved",
            Outcome::Stayed => "stayed",
            Outcome::Held => "held",
            Outcome::Unknown => "unknown",
            Outcome::Ended => "ended",
            Outcome::Silent => "silent",
            Outcome::Arriving => "arriving",
        }
    }
}

/// An attempt to move a guest.
pub struct Try {
    /// Where to.
    pub to: String,
    /// Why it did not come to that.
    pub why: Option<Failure>,
}

/// A guest, and what was done with it.
pub struct Story {
    pub name: String,
    pub socket: PathBuf,
    memory: u64,
    /// Somebody else was moving it when it was found.
    pub migrating: bool,
    pub outcome: Outcome,
    pub tries: Vec<Try>,
    /// The last migration.
    pub migration: Option<Migration>,
}

impl Story {
    pub fn new(machine: Listed) -> Self {
        Story {
            migrating: machine.state() == Some(VmState::Migrating),
            memory: machine.vm.as_ref().map_or(0, |vm| vm.memory),
            name: machine.name,
            socket: machine.socket,
            outcome: Outcome::Stayed,
            tries: Vec::new(),
            migration: None,
        }
    }

    pub fn ends(self, outcome: Outcome) -> Self {
        Story { outcome, ..self }
    }

    /// Where it was moved to, or tried to be moved to at last.
    fn to(&self) -> &str {
        self.tries.last().map_or("", |last| &last.to)
    }

    fn why(&self) -> Option<&Failure> {
        self.tries.last()?.why.as_ref()
    }

    fn json(&self) -> anyhow::Result<Value> {
        let tries: Vec<_> = self.tries.iter().map(|t| json!({ "to": t.to, "why": t.why })).collect();
        Ok(json!({
            "name": self.name,
            "memory": self.memory,
            "outcome": self.outcome.word(),
            "tries": tries,
            "migration": self.migration.as_ref().map(render::with_testimony).transpose()?,
        }))
    }

    fn row(&self) -> [String; 6] {
        let report = self.migration.as_ref().and_then(|migration| migration.report.as_ref());
        let moved = report.filter(|_| self.outcome == Outcome::Moved);
        [
            self.name.clone(),
            render::size(self.memory),
            self.outcome.word().into(),
            self.to().into(),
            moved.map(|report| render::ms(report.total_us)).unwrap_or_default(),
            moved.map(|report| render::ms(report.blackout_us)).unwrap_or_default(),
        ]
    }
}

/// A machine that is not to be moved.
pub fn left(machine: Listed) -> Story {
    let outcome = match machine.state() {
        Some(VmState::Held) => Outcome::Held,
        Some(VmState::Receiving) => Outcome::Arriving,
        Some(_) => Outcome::Stayed,
        None => Outcome::Silent,
    };
    Story::new(machine).ends(outcome)
}

/// In a sentence.
impl fmt::Display for Story {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, to) = (&self.name, self.to());
        match self.outcome {
            Outcome::Moved => write!(f, "{name} has moved to {to}"),
            Outcome::Stayed => write!(f, "{name} stays here"),
            Outcome::Held if to.is_empty() => write!(f, "{name} is held: see `whimbrel status {name}`"),
            Outcome::Held => write!(f, "{name} is HELD: it is paused here and may run at {to}"),
            Outcome::Unknown => write!(
                f,
                "it is UNKNOWN whether {name} has moved to {to}: ask there, and start it nowhere before that is known"
            ),
            Outcome::Ended => write!(f, "{name} has ended"),
            Outcome::Silent => write!(f, "{name} does not answer, and stays here"),
            Outcome::Arriving => write!(f, "{name} is just coming here, and stays"),
        }?;
        match self.why() {
            Some(why) if self.outcome != Outcome::Moved => write!(f, ": {why}"),
            _ => Ok(()),
        }
    }
}

/// The whole story.
pub struct Summary {
    pub stories: Vec<Story>,
    /// The machines that are here at the end.
    pub left: Vec<String>,
    pub elapsed: Duration,
}

impl Summary {
    fn count(&self, outcome: Outcome) -> usize {
        self.stories.iter().filter(|story| story.outcome == outcome).count()
    }

    /// 0 only if nobody is here any more.
    pub fn exit(&self) -> Exit {
        if self.count(Outcome::Unknown) > 0 {
            Exit::Unknown
        } else if self.count(Outcome::Held) > 0 {
            Exit::Held
        } else if !self.left.is_empty() {
            Exit::Stayed
        } else {
            Exit::Done
        }
    }

    pub fn json(&self) -> anyhow::Result<Value> {
        let machines = self.stories.iter().map(Story::json).collect::<anyhow::Result<Vec<_>>>()?;
        Ok(json!({
            "empty": self.left.is_empty(),
            "left": self.left,
            "elapsed_ms": self.elapsed.as_millis() as u64,
            "machines": machines,
        }))
    }

    pub fn text(&self) -> String {
        if self.stories.is_empty() {
            return "no machine is here".into();
        }
        let mut table = render::table();
        table.set_header(["name", "memory", "outcome", "to", "time", "blackout"]);
        table.add_rows(self.stories.iter().map(Story::row));
        let moved = format!("{} of {} moved", self.count(Outcome::Moved), self.stories.len());
        let end = match &self.left[..] {
            [] => "the host is empty".into(),
            left => format!("still here: {}", left.join(", ")),
        };
        format!("{}\n{moved} in {:.1} s; {end}", render::trimmed(&table), self.elapsed.as_secs_f64())
    }
}
