//! One migration between two real processes, from a fresh guest to its end.

use crate::{facts, output};
use anyhow::{Context, bail};
use migration::report::{Report, Verdict};
use serde_json::Value;
use std::path::Path;
use std::thread;
use std::time::Duration;
use vmm::api::model::MigrationRequest;
use vmm::guest::Testimony;
use vmm::node::Node;

/// How long a guest may take to come up: emulated hosts are slow, and filling gibibytes takes time too.
const READY: Duration = Duration::from_secs(300);

/// How long a migration may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// What is to be moved, and how.
#[derive(Clone, Debug)]
pub struct Move<'a> {
    /// The whimbrel program, for both sides.
    pub program: &'a Path,
    /// Guest memory in bytes.
    pub memory: u64,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Bytes that the guest keeps rewriting.
    pub working_set: u64,
    /// Timer interrupts a second, `None` for the guest's default.
    pub hz: Option<u32>,
    /// Bytes filled with random content before the guest starts.
    pub fill: u64,
    /// Whether the destination populates its memory before data may come.
    pub populate: bool,
    /// TCP streams, 0 for the default.
    pub streams: u16,
    /// How long the guest runs before it is moved.
    pub settle: Duration,
}

/// What came of it.
pub struct Moved {
    /// The source's report.
    pub report: Report,
    /// What the guest says, which is clean.
    pub testimony: Testimony,
    /// Resident bytes of the destination's process.
    pub resident: Option<u64>,
}

impl Move<'_> {
    /// Carries it out so many times, with progress on a terminal.
    ///
    /// # Errors
    /// As for [`carry_out`](Self::carry_out); the first one ends it.
    pub fn repeat(&self, times: u32) -> anyhow::Result<Vec<Moved>> {
        let bar = output::progress(times.into());
        let moves = (0..times).map(|_| self.carry_out().inspect(|_| bar.inc(1))).collect();
        bar.finish_and_clear();
        moves
    }

    /// Starts both sides, moves the guest, ends both.
    ///
    /// # Errors
    /// When the guest does not move, or says that anything is wrong with it: no figure of such a
    /// move is worth anything.
    pub fn carry_out(&self) -> anyhow::Result<Moved> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let number = |n: u64| n.to_string();
        let run = [
            ("--memory", number(self.memory)),
            ("--vcpus", number(self.vcpus.into())),
            ("--working-set", number(self.working_set)),
            ("--fill", number(self.fill)),
            ("--serial", "none".into()),
        ];
        let run = run.into_iter().chain(self.hz.map(|hz| ("--timer-hz", number(hz.into()))));
        let run = std::iter::once("run".to_string()).chain(run.flat_map(|(k, v)| [k.into(), v]));
        let mut source = Node::start(self.program, folder.path(), "source", run)?;
        source.expect("running")?;
        source.wait_guest("the guest's start", READY, |guest| guest.state == "running")?;
        let populate = self.populate.then_some("--populate");
        let (mut target, address) = Node::receiver(self.program, folder.path(), "target", populate)?;
        thread::sleep(self.settle);
        // Everything that is not asked for is as an operator gets it: the defaults are measured.
        let mut request: MigrationRequest =
            serde_json::from_value(serde_json::json!({ "to": address.to_string() }))?;
        request.streams = self.streams;
        source.migrate(&request)?;
        let report = source.wait_migration(PATIENCE)?.report.context("the machine sent no report")?;
        if report.verdict != Verdict::Moved {
            let why = report.failure.map_or("no reason given".into(), |why| why.to_string());
            bail!("the guest was not moved: {why}");
        }
        target.expect("arrived")?;
        let resident = facts::resident(target.pid());
        let testimony = report.testimony.as_deref().context("the guest's testimony did not arrive")?;
        let testimony: Testimony = serde_json::from_str(testimony).context("the guest's testimony")?;
        if !testimony.clean {
            bail!("the guest was damaged: {}", testimony.problems.join("; "));
        }
        target.quit()?;
        // Its memory has to be free again before anything else is measured.
        source.kill().context("cannot end the source's process")?;
        Ok(Moved { report, testimony, resident })
    }
}

/// A figure of a move, and its name.
pub type Figure = (&'static str, fn(&Moved) -> f64);

impl Moved {
    /// All of it as JSON.
    pub fn value(&self) -> Value {
        let mut report = crate::output::value(&self.report);
        report["testimony"] = crate::output::value(&self.testimony);
        report["process_resident"] = self.resident.into();
        report
    }
}
