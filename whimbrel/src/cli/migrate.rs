//! `whimbrel migrate`: starts a migration and watches it.

use super::Exit;
use super::args::{MigrateArgs, PolicyArgs};
use super::{render, say};
use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};
use migration::monitor::{Phase, Progress};
use migration::report::{Report, Verdict};
use std::io::IsTerminal;
use std::thread;
use std::time::Duration;
use whimbrel::api::client::Client;
use whimbrel::api::model::{Migration, MigrationRequest};

/// How often a migration is looked at.
const POLL: Duration = Duration::from_millis(50);

/// The request that the command line asks for.
pub fn request(to: &str, policy: &PolicyArgs) -> MigrationRequest {
    MigrationRequest {
        to: to.into(),
        transport: policy.transport,
        streams: policy.streams,
        queue_pairs: policy.queue_pairs,
        busy_poll: policy.busy_poll,
        downtime_limit_ms: policy.downtime_limit.as_millis() as u64,
        max_rounds: policy.max_rounds,
        timeout_s: policy.timeout.map(|t| t.as_secs().max(1)),
        on_stall: policy.on_stall,
        compare_memory: policy.compare_memory,
        silence_s: policy.silence.as_secs().max(1),
    }
}

/// `whimbrel migrate`.
pub fn migrate(args: MigrateArgs) -> anyhow::Result<Exit> {
    let client = Client::new(&args.target.api)?;
    let started: Migration = client.call(Method::POST, "/v1/migration", &request(&args.to, &args.policy))?;
    if args.detach {
        if args.target.json {
            say(serde_json::to_string(&started)?)?;
        }
        return Ok(Exit::Done);
    }
    let ended = watch(&client)?;
    let Some(report) = &ended.report else { anyhow::bail!("the machine sent no report") };
    if args.target.json {
        say(render::with_testimony(&ended)?)?;
    } else {
        say(render::migration(&ended))?;
    }
    Ok(exit(report))
}

/// What a report means for the exit code.
pub fn exit(report: &Report) -> Exit {
    match report.verdict {
        Verdict::Moved => Exit::Done,
        Verdict::Stayed => Exit::Stayed,
        // Held, or an end that this program does not know: an operator decides.
        _ => Exit::Held,
    }
}

/// Watches a migration to its end, with a progress bar where there is a terminal.
pub fn watch(client: &Client) -> anyhow::Result<Migration> {
    let bar = if std::io::stderr().is_terminal() { progress_bar() } else { ProgressBar::hidden() };
    loop {
        let migration: Migration = client.get("/v1/migration")?;
        if migration.report.is_some() {
            bar.finish_and_clear();
            return Ok(migration);
        }
        show(&bar, &migration.progress);
        thread::sleep(POLL);
    }
}

fn progress_bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    // A template that does not parse would show in the very first run on a terminal.
    if let Ok(style) = ProgressStyle::with_template("{prefix:>11} [{bar:30}] {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

fn show(bar: &ProgressBar, progress: &Progress) {
    let phase = match progress.phase {
        Phase::Preparing => "preparing".into(),
        Phase::Precopy => format!("round {}", progress.round),
        Phase::Switchover | Phase::Committed => "switchover".into(),
        Phase::ReadyToSwitch => "ready to switch".into(),
        _ => "done".into(),
    };
    bar.set_prefix(phase);
    if progress.transport.is_empty() {
        // Nothing travels before a transport is chosen.
        return;
    }
    bar.set_length(progress.round_bytes);
    bar.set_position(progress.round_done);
    bar.set_message(format!(
        "{} sent at {}/s over {}, dirtied {}/s, blackout of {:.1} ms expected",
        render::size(progress.sent),
        render::size(progress.rate as u64),
        progress.transport,
        render::size(progress.dirty_rate as u64),
        progress.predicted_blackout_us as f64 / 1e3,
    ));
}
