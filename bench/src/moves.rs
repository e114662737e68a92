//! One migration between two real processes: starts both, moves a fresh guest, ends both.

use crate::facts;
use crate::guest::Guest;
use crate::moved::Moved;
use crate::pace::{self, Sampler};
use anyhow::{Context, bail};
use migration::report::{Report, Verdict};
use std::net::IpAddr;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};
use vmm::guest::Testimony;
use whimbrel::api::model::{MigrationRequest, TransportChoice};
use whimbrel::node::Node;

/// How long a guest may take to start: emulated hosts are slow, and filling gibibytes takes time too.
const START_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a migration may take.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(600);

/// Time between two checks whether the migration is over.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// A guest, and how to move it.
#[derive(Clone, Debug)]
pub struct Move {
    /// The whimbrel program, for both sides.
    pub program: PathBuf,
    /// The guest.
    pub guest: Guest,
    /// Whether the destination populates its memory before it accepts data.
    pub populate: bool,
    /// The transport that carries memory.
    pub transport: TransportChoice,
    /// The address of this machine on which the destination listens.
    pub via: IpAddr,
    /// TCP streams, 0 for the default.
    pub streams: u16,
    /// How long the guest runs before it is moved.
    pub settle: Duration,
    /// Whether the guest's pace is sampled, which costs the source a few hundred microseconds a sample.
    pub sample_pace: bool,
}

impl Move {
    /// Starts both sides, moves the guest and ends both sides.
    ///
    /// # Errors
    /// When the guest does not move, or reports damage to itself: the figures of such a migration mean
    /// nothing.
    pub fn run(&self) -> anyhow::Result<Moved> {
        let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
        let run = ["run", "--serial", "none"].map(String::from).into_iter().chain(self.guest.options());
        let mut source = Node::start(&self.program, folder.path(), "source", run)?;
        source.expect("running")?;
        source.wait_guest("the guest's start", START_TIMEOUT, |guest| guest.state == "running")?;
        let populate = self.populate.then_some("--populate");
        let listen = (self.via, 0).into();
        let (mut target, address) =
            Node::receiver_on(&self.program, folder.path(), "target", listen, populate)?;
        let mut sampler = Sampler::new();
        self.settle(&source, &mut sampler)?;
        // Everything else keeps its default, because the defaults are what operators use.
        let mut request: MigrationRequest =
            serde_json::from_value(serde_json::json!({ "to": address.to_string() }))?;
        request.insecure = true;
        request.streams = self.streams;
        request.transport = self.transport;
        sampler.start();
        source.migrate(&request)?;
        let report = self.follow(&source, &mut sampler)?;
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
        // Its memory must be free again before anything else is measured.
        source.kill().context("cannot end the source's process")?;
        let precopy = Duration::from_micros(report.total_us.saturating_sub(report.blackout_us));
        Ok(Moved { report, testimony, resident, pace: sampler.samples(precopy) })
    }

    /// Lets the guest run for the settle time.
    fn settle(&self, source: &Node, sampler: &mut Sampler) -> anyhow::Result<()> {
        let end = Instant::now() + self.settle;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            if self.sample_pace {
                self.sample(source, sampler)?;
            }
            thread::sleep(if self.sample_pace { pace::INTERVAL.min(left) } else { left });
        }
        Ok(())
    }

    /// Waits for the end of the migration.
    fn follow(&self, source: &Node, sampler: &mut Sampler) -> anyhow::Result<Report> {
        if !self.sample_pace {
            return source.wait_migration(MIGRATION_TIMEOUT)?.report.context("the machine sent no report");
        }
        let deadline = Instant::now() + MIGRATION_TIMEOUT;
        while Instant::now() < deadline {
            if let Some(report) = source.migration()?.report {
                return Ok(report);
            }
            if sampler.due() {
                self.sample(source, sampler)?;
            }
            thread::sleep(POLL_INTERVAL);
        }
        bail!("the migration did not end within {MIGRATION_TIMEOUT:?}")
    }

    fn sample(&self, source: &Node, sampler: &mut Sampler) -> anyhow::Result<()> {
        if let Some(guest) = source.status()?.guest {
            sampler.sample(&guest);
        }
        Ok(())
    }
}
