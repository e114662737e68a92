//! One migration between two real processes, from a fresh guest to its end.

use crate::guest::Guest;
use crate::pace::{self, Look, Watch};
use crate::{facts, record};
use anyhow::{Context, bail};
use migration::report::{Report, Verdict};
use serde_json::Value;
use std::net::IpAddr;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};
use vmm::guest::Testimony;
use whimbrel::api::model::{MigrationRequest, TransportChoice};
use whimbrel::node::Node;

/// How long a guest may take to come up: emulated hosts are slow, and filling gibibytes takes time too.
const READY: Duration = Duration::from_secs(300);

/// How long a migration may take.
const PATIENCE: Duration = Duration::from_secs(600);

/// Between two questions whether it is over.
const STEP: Duration = Duration::from_millis(10);

/// What is to be moved, and how.
#[derive(Clone, Debug)]
pub struct Move {
    /// The whimbrel program, for both sides.
    pub program: PathBuf,
    /// The guest.
    pub guest: Guest,
    /// Whether the destination populates its memory before data may come.
    pub populate: bool,
    /// Which way memory goes.
    pub transport: TransportChoice,
    /// Address of this machine through which it goes.
    pub via: IpAddr,
    /// TCP streams, 0 for the default.
    pub streams: u16,
    /// How long the guest runs before it is moved.
    pub settle: Duration,
    /// Whether the guest's pace is watched, which costs the source a few hundred microseconds a look.
    pub watch: bool,
}

/// What came of it.
pub struct Moved {
    /// The source's report.
    pub report: Report,
    /// What the guest says, which is clean.
    pub testimony: Testimony,
    /// Resident bytes of the destination's process.
    pub resident: Option<u64>,
    /// The guest's pace until the blackout, if it was watched.
    pub pace: Vec<Look>,
}

impl Move {
    /// Starts both sides, moves the guest, ends both.
    ///
    /// # Errors
    /// When the guest does not move, or says that anything is wrong with it: no figure of such a
    /// move is worth anything.
    pub fn carry_out(&self) -> anyhow::Result<Moved> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let run = ["run", "--serial", "none"].map(String::from).into_iter().chain(self.guest.options());
        let mut source = Node::start(&self.program, folder.path(), "source", run)?;
        source.expect("running")?;
        source.wait_guest("the guest's start", READY, |guest| guest.state == "running")?;
        let populate = self.populate.then_some("--populate");
        let listen = (self.via, 0).into();
        let (mut target, address) =
            Node::receiver_on(&self.program, folder.path(), "target", listen, populate)?;
        let mut watch = Watch::new();
        self.settle(&source, &mut watch)?;
        // Everything that is not asked for is as an operator gets it: the defaults are measured.
        let mut request: MigrationRequest =
            serde_json::from_value(serde_json::json!({ "to": address.to_string() }))?;
        request.streams = self.streams;
        request.transport = self.transport;
        watch.begins();
        source.migrate(&request)?;
        let report = self.follow(&source, &mut watch)?;
        if report.verdict != Verdict::Moved {
            let why = report.failure.map_or("no reason given".into(), |why| why.to_string());
            bail!("the guest was not moved: {why}");
        }
        target.expect("arrived")?;
        let resident = facts::resident(target.pid());
        let testimony = report.remarks.as_deref().context("the guest's testimony did not arrive")?;
        let testimony: Testimony = serde_json::from_str(testimony).context("the guest's testimony")?;
        if !testimony.clean {
            bail!("the guest was damaged: {}", testimony.problems.join("; "));
        }
        target.quit()?;
        // Its memory has to be free again before anything else is measured.
        source.kill().context("cannot end the source's process")?;
        let precopy = Duration::from_micros(report.total_us.saturating_sub(report.blackout_us));
        Ok(Moved { report, testimony, resident, pace: watch.looks(precopy) })
    }

    /// Lets the guest run for a while.
    fn settle(&self, source: &Node, watch: &mut Watch) -> anyhow::Result<()> {
        let end = Instant::now() + self.settle;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            if self.watch {
                self.look(source, watch)?;
            }
            thread::sleep(if self.watch { pace::EVERY.min(left) } else { left });
        }
        Ok(())
    }

    /// Waits for the migration's end.
    fn follow(&self, source: &Node, watch: &mut Watch) -> anyhow::Result<Report> {
        if !self.watch {
            return source.wait_migration(PATIENCE)?.report.context("the machine sent no report");
        }
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(report) = source.migration()?.report {
                return Ok(report);
            }
            if watch.due() {
                self.look(source, watch)?;
            }
            thread::sleep(STEP);
        }
        bail!("the migration did not end within {PATIENCE:?}")
    }

    fn look(&self, source: &Node, watch: &mut Watch) -> anyhow::Result<()> {
        if let Some(guest) = source.status()?.guest {
            watch.look(&guest);
        }
        Ok(())
    }
}

impl Moved {
    /// All of it as JSON.
    pub fn value(&self) -> Value {
        // Instead of the text in which it came.
        let mut report = record::value(&Report { remarks: None, ..self.report.clone() });
        report["testimony"] = record::value(&self.testimony);
        report["process_resident"] = self.resident.into();
        report["pace"] = record::value(&self.pace);
        report
    }
}
