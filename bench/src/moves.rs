//! One migration between two real processes: starts both, moves a fresh guest, ends both.

use crate::facts;
use crate::guest::Guest;
use crate::moved::Moved;
use crate::pace::{self, Sampler};
use anyhow::{Context, bail};
use migration::report::{Report, Verdict};
use migration::transport::LaneEncryption;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};
use vmm::guest::Testimony;
use whimbrel::api::model::{MigrationRequest, TransportChoice};
use whimbrel::node::Node;
use whimbrel::pki::{Authority, days_from_now};

/// How long a guest may take to start: emulated hosts are slow, and filling gibibytes takes time too.
const START_TIMEOUT: Duration = Duration::from_secs(300);

/// How long a migration may take.
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(600);

/// Time between two checks whether the migration is over.
const POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Makes an authority and a host's certificate, good for both sides; returns the host's folder.
fn certificates(folder: &Path, via: IpAddr) -> anyhow::Result<String> {
    let made = Authority::create(&folder.join("pki"))
        .and_then(|authority| authority.issue("bench.example", &[via.to_string()], days_from_now(1)))
        .context("cannot make certificates")?;
    made.into_os_string().into_string().map_err(|path| anyhow::anyhow!("{path:?} is not UTF-8"))
}

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
    /// Whether it moves through TLS, with certificates that are made for this run.
    pub tls: bool,
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
        let tls = self.tls.then(|| certificates(folder.path(), self.via)).transpose()?;
        let tls: Vec<String> = tls.into_iter().flat_map(|folder| ["--tls".into(), folder]).collect();
        let run = ["run", "--serial", "none"].map(String::from).into_iter().chain(self.guest.options());
        let run = run.chain(tls.iter().cloned());
        let mut source = Node::start(&self.program, folder.path(), "source", run)?;
        source.expect("running")?;
        source.wait_guest("the guest's start", START_TIMEOUT, |guest| guest.state == "running")?;
        let receive = self.populate.then(|| "--populate".into()).into_iter().chain(tls);
        let listen = (self.via, 0).into();
        let (mut target, address) =
            Node::receiver_on(&self.program, folder.path(), "target", listen, receive)?;
        let mut sampler = Sampler::new();
        self.settle(&source, &mut sampler)?;
        // Everything else keeps its default, because the defaults are what operators use.
        let mut request: MigrationRequest =
            serde_json::from_value(serde_json::json!({ "to": address.to_string() }))?;
        request.insecure = !self.tls;
        request.streams = self.streams;
        request.transport = self.transport;
        sampler.start();
        source.migrate(&request)?;
        let report = self.follow(&source, &mut sampler)?;
        if report.verdict != Verdict::Moved {
            let why = report.failure.map_or("no reason given".into(), |why| why.to_string());
            bail!("the guest was not moved: {why}");
        }
        if self.tls && report.lanes.iter().any(|lane| lane.encryption == LaneEncryption::None) {
            bail!("the guest's memory was not encrypted");
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
