//! What came of all moves.

use super::judge::Judgement;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

/// A move in which everything held.
pub struct Done {
    /// What came of it.
    pub judgement: Judgement,
    /// The kinds of faults that struck.
    pub struck: Vec<&'static str>,
    /// How many faults came when the move was over.
    pub late: usize,
}

/// A move in which something did not hold.
pub struct Violation {
    /// Its number.
    pub number: u64,
    /// What did not hold.
    pub what: String,
    /// The kinds of faults that struck, if it came so far.
    pub struck: Vec<&'static str>,
    /// Where what is left of it is kept.
    pub logs: PathBuf,
}

/// All of them.
#[derive(Default)]
pub struct Tally {
    moves: usize,
    late: usize,
    owners: usize,
    waited: usize,
    transports: BTreeMap<String, usize>,
    outcomes: BTreeMap<&'static str, usize>,
    /// By the kinds of faults that struck together: how often what came of it.
    faults: BTreeMap<String, BTreeMap<&'static str, usize>>,
    /// How often each kind struck.
    kinds: BTreeMap<&'static str, usize>,
    violations: Vec<Violation>,
}

impl Tally {
    /// Counts a move.
    pub fn add(&mut self, result: Result<Done, Violation>) {
        self.moves += 1;
        let (mut struck, outcome) = match result {
            Ok(done) => {
                self.late += done.late;
                self.owners += done.judgement.owners;
                self.waited += usize::from(done.judgement.waited);
                if !done.judgement.transport.is_empty() {
                    *self.transports.entry(done.judgement.transport).or_default() += 1;
                }
                (done.struck, done.judgement.outcome)
            }
            Err(violation) => {
                let struck = violation.struck.clone();
                self.violations.push(violation);
                (struck, "VIOLATION")
            }
        };
        *self.outcomes.entry(outcome).or_default() += 1;
        struck.sort_unstable();
        struck.iter().for_each(|kind| *self.kinds.entry(kind).or_default() += 1);
        let together = if struck.is_empty() { "nothing".into() } else { struck.join(" + ") };
        *self.faults.entry(together).or_default().entry(outcome).or_default() += 1;
    }

    /// How many moves there were.
    pub fn moves(&self) -> usize {
        self.moves
    }

    /// Those in which something did not hold.
    pub fn violations(&self) -> &[Violation] {
        &self.violations
    }

    /// For programs.
    pub fn json(&self, seed: u64, took: Duration) -> Value {
        let violation =
            |v: &Violation| json!({ "move": v.number, "what": v.what, "faults": v.struck, "logs": v.logs });
        json!({
            "seed": seed,
            "moves": self.moves,
            "seconds": took.as_secs_f64(),
            "faults": self.kinds,
            "late": self.late,
            "outcomes": self.outcomes,
            "together": self.faults,
            "transports": self.transports,
            "owners": self.owners,
            "waited_for_disk": self.waited,
            "violations": self.violations.iter().map(violation).collect::<Vec<_>>(),
        })
    }
}

/// For people.
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (faults, outcomes) in &self.faults {
            let mut line = String::new();
            for (outcome, count) in outcomes {
                let comma = if line.is_empty() { "" } else { "; " };
                write!(line, "{comma}{count} {outcome}")?;
            }
            writeln!(f, "    {faults}: {line}")?;
        }
        if !self.kinds.is_empty() {
            let kinds: Vec<_> = self.kinds.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
            writeln!(f, "faults by kind: {}", kinds.join(", "))?;
        }
        let transports: Vec<_> =
            self.transports.iter().map(|(name, count)| format!("{count} {name}")).collect();
        writeln!(
            f,
            "{} moves ({}), {} faults and {} that came too late; {} processes had a disk, by the kernel's word; {} guests \
             were seen to wait for one that was full; {} violations",
            self.moves,
            transports.join(", "),
            self.kinds.values().sum::<usize>(),
            self.late,
            self.owners,
            self.waited,
            self.violations.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_names_moves_faults_by_kind_and_violations() {
        let mut tally = Tally::default();
        let judgement = |outcome| Judgement { outcome, transport: "tcp".into(), owners: 2, waited: true };
        let done = |struck: &[&'static str], outcome| {
            Ok(Done { judgement: judgement(outcome), struck: struck.to_vec(), late: 1 })
        };
        tally.add(done(&["full disk", "cancelled"], "moved"));
        tally.add(done(&["full disk"], "stayed"));
        let (what, logs) = ("two owners".into(), PathBuf::from("logs"));
        tally.add(Err(Violation { number: 7, what, struck: vec!["cancelled"], logs }));
        let text = tally.to_string();
        for part in [
            "faults by kind: 2 cancelled, 2 full disk\n",
            "    cancelled + full disk: 1 moved\n",
            "    cancelled: 1 VIOLATION\n",
            "3 moves (2 tcp), 4 faults and 2 that came too late; 4 processes had a disk",
            "2 guests were seen to wait for one that was full; 1 violations",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let told = tally.json(5, Duration::from_secs(3));
        assert_eq!((&told["seed"], &told["moves"]), (&json!(5), &json!(3)));
        assert_eq!(told["faults"], json!({ "cancelled": 2, "full disk": 2 }));
        assert_eq!(told["violations"][0]["move"], 7);
    }
}
