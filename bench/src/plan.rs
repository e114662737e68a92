//! Runs all contenders, round by round.
//!
//! Every round runs each contender once. The order rotates from round to round, so that disturbances of the
//! machine hit all contenders alike. Each run is saved as soon as it is over. A run that fails is saved as a
//! failure, and the measurement goes on. A contender that fails in two consecutive rounds is left out of the
//! rest.

use crate::contender::Contender;
use crate::facts::Facts;
use crate::figures::{Figure, Figures};
use crate::log::Log;
use crate::output;
use crate::record::{End, FORMAT, Head, Line, Measurement, Run, Setup};
use crate::usage::Usage;
use crate::{bound, summary, warm};
use serde_json::Value;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

/// Consecutive rounds in which a contender may fail.
const MAX_FAILURES: u32 = 2;

/// A measurement to make.
pub struct Plan {
    /// The subcommand.
    pub bench: &'static str,
    /// Ids of the figures that are shown.
    pub show: &'static [&'static str],
    /// Rounds.
    pub rounds: u32,
    /// Whether to warm memory up before each run.
    pub warm_up: bool,
    /// The contenders, each with its description.
    pub contenders: Vec<(Setup, Contender)>,
}

impl Plan {
    /// Makes the measurement.
    ///
    /// # Errors
    /// When a run cannot be saved. A run that fails is not an error here.
    pub fn measure(&self, log: &mut Log, interrupted: &Arc<AtomicBool>) -> anyhow::Result<Measurement> {
        let head = self.head();
        log.write(&Line::Head(Box::new(head.clone())))?;
        let mut measured = Measurement::new(head);
        let mut failures = vec![0; self.contenders.len()];
        let bar = output::progress(u64::from(self.rounds) * self.contenders.len() as u64);
        let mut stopped = false;
        'rounds: for round in 0..self.rounds {
            for turn in 0..self.contenders.len() {
                let which = (turn + round as usize) % self.contenders.len();
                if failures[which] >= MAX_FAILURES {
                    bar.inc(1);
                    continue;
                }
                if interrupted.load(Ordering::Relaxed) {
                    stopped = true;
                    break 'rounds;
                }
                let (_, contender) = &self.contenders[which];
                let setup = &measured.head.contenders[which];
                bar.set_message(format!("{}: {}", setup.group, setup.who));
                let before = Usage::now();
                let result = self.run(contender);
                let others = before.zip(Usage::now()).and_then(|(before, after)| after.of_others(&before));
                if result.is_err() && interrupted.load(Ordering::Relaxed) {
                    // An interrupt from the terminal reaches the processes of the run as well.
                    stopped = true;
                    break 'rounds;
                }
                let mut run = finished_run(round, which, result);
                run.others_percent = others.filter(|_| contender.ends_with_the_run());
                failures[which] = if run.failure.is_some() { failures[which] + 1 } else { 0 };
                bar.suspend(|| eprintln!("{}", brief(&measured.head, setup, &run)));
                bar.inc(1);
                log.write(&Line::Run(run.clone()))?;
                measured.runs.push(run);
            }
        }
        bar.finish_and_clear();
        let end = End {
            interrupted: stopped,
            summary: summary::spreads(&measured),
            encrypted: bound::summary(&measured),
        };
        log.write(&Line::End(end.clone()))?;
        measured.end = Some(end);
        Ok(measured)
    }

    fn run(&self, contender: &Contender) -> anyhow::Result<(Figures, Value)> {
        if self.warm_up {
            warm::run(contender.needs(), contender.fills(), || contender.run())
        } else {
            contender.run()
        }
    }

    fn head(&self) -> Head {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        Head {
            format: FORMAT,
            bench: self.bench.into(),
            time: now.map_or(0, |time| time.as_secs()),
            facts: Facts::gather(),
            rounds: self.rounds,
            warmed_up: self.warm_up,
            show: self.show.iter().map(|id| id.to_string()).collect(),
            contenders: self.contenders.iter().map(|(setup, _)| setup.clone()).collect(),
        }
    }
}

fn finished_run(round: u32, contender: usize, result: anyhow::Result<(Figures, Value)>) -> Run {
    match result {
        Ok((figures, said)) => Run { round, contender, figures, failure: None, others_percent: None, said },
        Err(error) => {
            let failure = Some(format!("{error:#}"));
            Run {
                round,
                contender,
                figures: Figures::new(),
                failure,
                others_percent: None,
                said: Value::Null,
            }
        }
    }
}

/// A run in one line.
fn brief(head: &Head, setup: &Setup, run: &Run) -> String {
    let what = match &run.failure {
        Some(failure) => format!("FAILED: {failure}"),
        None => {
            let shown = head.show.iter().filter_map(|id| Some((Figure::of(id), run.figures.get(id)?)));
            let all: Vec<String> = shown
                .map(|(Figure { short, digits, .. }, figure)| format!("{short} {figure:.digits$}"))
                .collect();
            all.join("; ")
        }
    };
    format!("round {} of {}: {}: {}: {what}", run.round + 1, head.rounds, setup.group, setup.who)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contender::{Qemu, setup};
    use crate::guest::{Content, Guest};
    use crate::log;

    /// A plan with two peers, of which the first fails every time.
    fn plan(folder: &std::path::Path, rounds: u32) -> Plan {
        use std::os::unix::fs::PermissionsExt;
        let script = |name: &str, text: &str| {
            let path = folder.join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let good = script("good", r#"echo '{"status": "completed", "mib": 1024, "total_s": 2.0}'"#);
        let bad = script("bad", "exit 1");
        let contender = |who: &str, script| {
            let (populate, guest) = (false, Guest::idle(1 << 30, Content::Random));
            let by = Qemu::Script(script);
            (setup(&guest, populate, who), Contender::Qemu { by, guest, populate, multifd: 4 })
        };
        Plan {
            bench: "throughput",
            show: &["migration_mib_s"],
            rounds,
            warm_up: false,
            contenders: vec![contender("bad", bad), contender("good", good)],
        }
    }

    #[test]
    fn a_contender_that_fails_spoils_nothing_but_itself() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("saved");
        let mut log = Log::open(false, Some(&path)).unwrap();
        let measured = plan(folder.path(), 4).measure(&mut log, &Arc::default()).unwrap();
        let of = |which| measured.runs.iter().filter(|run| run.contender == which).collect::<Vec<_>>();
        assert_eq!(of(0).len(), MAX_FAILURES as usize);
        assert!(of(0).iter().all(|run| run.failure.is_some() && run.figures.is_empty()));
        assert_eq!(of(1).len(), 4);
        assert_eq!(measured.column(1, "migration_mib_s"), [Some(512.0); 4]);
        assert_eq!(log::read(&path).unwrap(), [measured]);
    }

    #[test]
    fn an_interrupt_keeps_what_there_is() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = Log::open(false, None).unwrap();
        let interrupted = Arc::new(AtomicBool::new(true));
        let measured = plan(folder.path(), 4).measure(&mut log, &interrupted).unwrap();
        assert!(measured.runs.is_empty());
        assert_eq!(
            measured.end,
            Some(End { interrupted: true, summary: vec![Default::default(); 2], encrypted: Vec::new() })
        );
    }
}
