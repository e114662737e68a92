//! What monitoring sees of a host: Prometheus' text format.
//!
//! What is now is asked of the machines at each scrape. What has been is counted from the host's history,
//! which outlives the service: a service that is started anew counts from what is there.

use super::gate::Count;
use super::history::Tail;
use super::inventory::Listed;
use crate::api::model::word;
use prometheus::proto::MetricFamily;
use prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use serde_json::Value;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

/// The format, as HTTP calls it.
pub const FORMAT: &str = prometheus::TEXT_FORMAT;

/// All states that a machine of the inventory can be in; `silent` is one that does not answer.
const STATES: [&str; 9] =
    ["waiting", "receiving", "running", "paused", "migrating", "held", "moved", "ended", "silent"];

/// Bounds of the histogram of blackouts, in seconds.
const BLACKOUTS: [f64; 12] = [0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 5.0];

/// Bounds of the histogram of whole migrations, in seconds.
const DURATIONS: [f64; 11] = [0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 120.0, 600.0];

/// What has been.
pub struct Metrics {
    registry: Registry,
    migrations: IntCounterVec,
    failures: IntCounterVec,
    bytes: IntCounterVec,
    blackouts: Histogram,
    durations: Histogram,
    refused: IntCounter,
    tail: Mutex<Tail>,
}

/// What is now.
pub struct Now<'a> {
    /// The machines.
    pub machines: &'a [Listed],
    /// The processes at the gate.
    pub processes: Count,
    /// Whether nobody is taken in.
    pub drained: bool,
}

impl Metrics {
    /// None yet.
    ///
    /// # Errors
    /// Of definitions that contradict each other.
    pub fn new() -> prometheus::Result<Self> {
        let counters = |name: &str, help: &str, labels: &[&str]| {
            IntCounterVec::new(Opts::new(format!("whimbrel_{name}"), help), labels)
        };
        let histogram = |name: &str, help: &str, bounds: &[f64]| {
            let options = HistogramOpts::new(format!("whimbrel_{name}"), help);
            Histogram::with_opts(options.buckets(bounds.to_vec()))
        };
        let metrics = Metrics {
            registry: Registry::new(),
            migrations: counters(
                "migrations_total",
                "Migrations that are over, by direction (out of this host, or in) and how they ended.",
                &["direction", "outcome"],
            )?,
            failures: counters(
                "migration_failures_total",
                "Migrations that failed, by direction and the code of the failure.",
                &["direction", "code"],
            )?,
            bytes: counters(
                "migration_bytes_total",
                "Bytes of guest memory that travelled in migrations that are over, by direction and transport.",
                &["direction", "transport"],
            )?,
            blackouts: histogram(
                "blackout_seconds",
                "How long guests that moved away stood still, by the clock of this host.",
                &BLACKOUTS,
            )?,
            durations: histogram(
                "migration_duration_seconds",
                "How long migrations of guests that moved away took in all.",
                &DURATIONS,
            )?,
            refused: IntCounter::new(
                "whimbrel_callers_refused_total",
                "Callers of the port that were turned away before it was known who they are.",
            )?,
            tail: Mutex::default(),
        };
        let Metrics { registry, migrations, failures, bytes, blackouts, durations, refused, .. } = &metrics;
        registry.register(Box::new(migrations.clone()))?;
        registry.register(Box::new(failures.clone()))?;
        registry.register(Box::new(bytes.clone()))?;
        registry.register(Box::new(blackouts.clone()))?;
        registry.register(Box::new(durations.clone()))?;
        registry.register(Box::new(refused.clone()))?;
        Ok(metrics)
    }

    /// So many callers were turned away.
    pub fn refused(&self, callers: u64) {
        self.refused.inc_by(callers);
    }

    /// All of it as text. The history is in `folder`.
    ///
    /// # Errors
    /// What cannot be read, or put into words.
    pub fn text(&self, now: &Now<'_>, folder: &Path) -> Result<String, String> {
        // Whatever panicked while it held it has left it whole.
        let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        let entries =
            tail.entries(folder).map_err(|error| format!("cannot read {}: {error}", folder.display()))?;
        entries.iter().for_each(|entry| self.count(entry));
        drop(tail);
        let mut families = self.registry.gather();
        families.extend(present(now).map_err(|error| error.to_string())?);
        families.sort_by(|one, other| one.name().cmp(other.name()));
        TextEncoder::new().encode_to_string(&families).map_err(|error| error.to_string())
    }

    /// Counts an entry of the history. What an older or newer program wrote otherwise counts as far as it is
    /// understood.
    fn count(&self, entry: &Value) {
        let migration = &entry["migration"];
        if !migration["report"].is_null() && migration["dry_run"] != true {
            self.count_departure(&migration["report"]);
        }
        let arrival = &entry["arrival"];
        if arrival.is_object() {
            let failure = arrival["failure"]["code"].as_str();
            let outcome = if failure.is_some() { "refused" } else { "arrived" };
            self.migrations.with_label_values(&["in", outcome]).inc();
            self.count_failure("in", failure);
        }
    }

    fn count_departure(&self, report: &Value) {
        let outcome = report["verdict"].as_str().unwrap_or("unknown");
        self.migrations.with_label_values(&["out", outcome]).inc();
        self.count_failure("out", report["failure"]["code"].as_str());
        let rounds = report["rounds"].as_array().map(Vec::as_slice).unwrap_or_default();
        let sent: u64 = rounds.iter().filter_map(|round| round["sent"].as_u64()).sum();
        let transport = report["transport"].as_str().filter(|name| !name.is_empty());
        if let Some(transport) = transport {
            self.bytes.with_label_values(&["out", transport]).inc_by(sent);
        }
        if outcome == "moved" {
            let seconds = |what: &str| report[what].as_f64().map(|us| us / 1e6);
            seconds("blackout_us").into_iter().for_each(|time| self.blackouts.observe(time));
            seconds("total_us").into_iter().for_each(|time| self.durations.observe(time));
        }
    }

    fn count_failure(&self, direction: &str, code: Option<&str>) {
        if let Some(code) = code {
            self.failures.with_label_values(&[direction, code]).inc();
        }
    }
}

/// What is now, which nobody has to remember.
fn present(now: &Now<'_>) -> prometheus::Result<Vec<MetricFamily>> {
    let registry = Registry::new();
    let gauges = |name: &str, help: &str, labels: &[&str]| {
        let gauges = IntGaugeVec::new(Opts::new(format!("whimbrel_{name}"), help), labels)?;
        registry.register(Box::new(gauges.clone()))?;
        prometheus::Result::Ok(gauges)
    };
    let gauge = |name: &str, help: &str, value: u64| {
        let gauge = IntGauge::new(format!("whimbrel_{name}"), help)?;
        gauge.set(whole(value));
        registry.register(Box::new(gauge))
    };
    let machines = gauges("machines", "Machines of this host by state.", &["state"])?;
    STATES.iter().for_each(|state| machines.with_label_values(&[state]).set(0));
    for machine in now.machines {
        machines.with_label_values(&[machine.doing().as_str()]).inc();
    }
    let memory = |machine: &Listed| machine.vm.as_ref().map_or(0, |vm| vm.memory);
    gauge(
        "memory_bytes",
        "Bytes of memory that the machines of this host have.",
        now.machines.iter().map(memory).sum(),
    )?;
    gauge("drained", "1 if no guest is taken in at present.", u64::from(now.drained))?;
    let processes =
        gauges("gate_processes", "Processes at the gate by what they are there for.", &["phase"])?;
    let Count { standbys, arriving, settled } = now.processes;
    for (phase, count) in [("standby", standbys), ("arriving", arriving), ("settled", settled)] {
        processes.with_label_values(&[phase]).set(whole(count as u64));
    }

    let labels = &["machine"];
    let sent = gauges("migration_sent_bytes", "Bytes sent so far by the migration under way.", labels)?;
    let rate = gauges("migration_rate_bytes_per_second", "Its rate of sending.", labels)?;
    let dirty = gauges(
        "migration_dirty_rate_bytes_per_second",
        "How fast its guest dirties memory; missing in its first round.",
        labels,
    )?;
    let remaining =
        gauges("migration_remaining_bytes", "Bytes that its round has still to look at.", labels)?;
    let round = gauges("migration_round", "Its pre-copy round, from 0.", labels)?;
    let phase = gauges("migration_phase", "1 for the phase that it is in.", &["machine", "phase"])?;
    let predicted = gauges(
        "migration_predicted_blackout_microseconds",
        "The blackout to expect if it began now; missing as long as nothing is known.",
        labels,
    )?;
    for machine in now.machines {
        let Some(migration) = machine.migration.as_ref().filter(|migration| migration.report.is_none())
        else {
            continue;
        };
        let (name, progress) = (machine.name.as_str(), &migration.progress);
        let set = |gauges: &IntGaugeVec, value| gauges.with_label_values(&[name]).set(whole(value));
        set(&sent, progress.sent);
        set(&rate, progress.rate as u64);
        if let Some(bytes) = progress.dirty_rate {
            set(&dirty, bytes as u64);
        }
        set(&remaining, progress.round_bytes.saturating_sub(progress.round_done));
        set(&round, progress.round.into());
        if let Some(us) = progress.predicted_blackout_us {
            set(&predicted, us);
        }
        phase.with_label_values(&[name, word(&progress.phase).as_str()]).set(1);
    }
    Ok(registry.gather())
}

fn whole(value: u64) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::path::PathBuf;

    #[test]
    fn what_has_been_is_counted_from_the_history() {
        let folder = tempfile::tempdir().unwrap();
        let report = |verdict: &str, code: Option<&str>| {
            json!({ "verdict": verdict, "failure": code.map(|code| json!({ "code": code, "message": "" })),
                "transport": "tcp", "rounds": [{ "sent": 1000 }, { "sent": 24 }],
                "blackout_us": 1500, "total_us": 300_000 })
        };
        let entries = [
            json!({ "name": "web1", "migration": { "report": report("moved", None) } }),
            json!({ "name": "web2", "migration": { "report": report("stayed", Some("limits")) } }),
            json!({ "name": "web2", "migration": { "dry_run": true, "report": report("stayed", None) } }),
            json!({ "name": "web3", "arrival": { "failure": null } }),
            json!({ "name": "", "arrival": { "failure": { "code": "busy", "message": "" } } }),
            json!({ "something": "else" }),
        ];
        let lines: String = entries.iter().map(|entry| format!("{entry}\n")).collect();
        std::fs::write(super::super::history::file(folder.path()), lines).unwrap();
        let silent =
            Listed { name: "web4".into(), socket: PathBuf::new(), vm: None, migration: None, arrival: None };
        let now = Now { machines: &[silent], processes: Count::default(), drained: true };
        let metrics = Metrics::new().unwrap();
        metrics.refused(3);
        for _ in 0..2 {
            // The second time nothing is counted twice.
            let text = metrics.text(&now, folder.path()).unwrap();
            for line in [
                "whimbrel_migrations_total{direction=\"out\",outcome=\"moved\"} 1",
                "whimbrel_migrations_total{direction=\"out\",outcome=\"stayed\"} 1",
                "whimbrel_migrations_total{direction=\"in\",outcome=\"arrived\"} 1",
                "whimbrel_migration_failures_total{code=\"limits\",direction=\"out\"} 1",
                "whimbrel_migration_failures_total{code=\"busy\",direction=\"in\"} 1",
                "whimbrel_migration_bytes_total{direction=\"out\",transport=\"tcp\"} 2048",
                "whimbrel_blackout_seconds_bucket{le=\"0.001\"} 0",
                "whimbrel_blackout_seconds_bucket{le=\"0.002\"} 1",
                "whimbrel_migration_duration_seconds_count 1",
                "whimbrel_callers_refused_total 3",
                "whimbrel_machines{state=\"silent\"} 1",
                "whimbrel_machines{state=\"running\"} 0",
                "whimbrel_drained 1",
            ] {
                assert!(text.lines().any(|told| told == line), "no {line} in\n{text}");
            }
        }
    }
}
