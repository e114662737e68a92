//! `whimbrel migrate`: starts a migration and watches it.

use super::Exit;
use super::args::{MigrateArgs, PolicyArgs, SecurityArgs};
use super::{render, say};
use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};
use migration::monitor::{Phase, Progress};
use migration::report::{Report, Verdict};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;
use whimbrel::api;
use whimbrel::api::client::Client;
use whimbrel::api::model::{Migration, MigrationRequest};

/// How often a progress bar is renewed.
const POLL: Duration = Duration::from_millis(50);

/// How often a machine is asked for a sign of life if there is no progress bar.
const LOOK: Duration = Duration::from_secs(1);

/// Longer than any migration lasts: the machine is asked for signs of life meanwhile.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// The request that the command line asks for.
pub fn request(to: &str, policy: &PolicyArgs, security: &SecurityArgs) -> MigrationRequest {
    MigrationRequest {
        to: to.into(),
        encryption: policy.encryption,
        tls: security.files(),
        insecure: security.insecure,
        transport: policy.transport,
        streams: policy.streams,
        queue_pairs: policy.queue_pairs,
        busy_poll: policy.busy_poll,
        downtime_limit_ms: policy.downtime_limit.as_millis() as u64,
        bandwidth_bps: policy.bandwidth,
        max_rounds: policy.max_rounds,
        timeout_s: policy.timeout.map(|t| t.as_secs().max(1)),
        on_stall: policy.on_stall,
        compare_memory: policy.compare_memory,
        silence_s: policy.silence.as_secs().max(1),
    }
}

/// `whimbrel migrate`.
pub fn migrate(args: MigrateArgs) -> anyhow::Result<Exit> {
    let request = request(&args.to, &args.policy, &args.security);
    if args.detach {
        let client = Client::new(&args.target.api)?;
        let started: Migration = client.call(Method::POST, "/v1/migration", &request)?;
        if args.target.json {
            say(serde_json::to_string(&started)?)?;
        }
        return Ok(Exit::Done);
    }
    explain_interruption(&args.target.api)?;
    let ended = match carry_out(&args.target.api, request) {
        Err(error @ (api::Error::Http(_) | api::Error::Silent(_))) => {
            eprintln!(
                "whimbrel: UNKNOWN whether the guest has moved to {}: {error}. Ask the destination with `whimbrel \
                 status`; start the guest nowhere before that is known",
                args.to
            );
            return Ok(Exit::Unknown);
        }
        ended => ended?,
    };
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

/// Carries a migration out, with a progress bar where there is a terminal. One request starts it and is
/// answered when it is over: the machine's process stays for whoever waits so, whoever else looks at it.
///
/// # Errors
/// With [`api::Error::Http`] and [`api::Error::Silent`] it is not known what has become of the guest.
pub fn carry_out(socket: &Path, request: MigrationRequest) -> Result<Migration, api::Error> {
    let client = Client::new(socket)?;
    let waiting = Client::new(socket)?;
    let (sender, over) = mpsc::channel();
    let wait = move || {
        let answer = waiting.call_within(FOREVER, Method::POST, "/v1/migration?wait=true", &request);
        // Nobody listens any more only if the machine has fallen silent.
        let _ = sender.send(answer);
    };
    let spawned = thread::Builder::new().name("waiting".into()).spawn(wait);
    spawned.map_err(|source| api::Error::Connect { path: socket.into(), source })?;
    let terminal = std::io::stderr().is_terminal();
    let bar = if terminal { progress_bar() } else { ProgressBar::hidden() };
    loop {
        match over.recv_timeout(if terminal { POLL } else { LOOK }) {
            Ok(answer) => {
                bar.finish_and_clear();
                return answer;
            }
            Err(RecvTimeoutError::Disconnected) => {
                return Err(api::Error::Http("the thread that waited has panicked".into()));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        match client.get::<Migration>("/v1/migration") {
            Ok(migration) if migration.report.is_none() => show(&bar, &migration.progress),
            Err(silent @ api::Error::Silent(_)) => return Err(silent),
            // Whatever else is wrong, the request that waits will tell.
            _ => {}
        }
    }
}

/// Says at SIGINT and SIGTERM that the migration goes on, before they end this command.
fn explain_interruption(socket: &Path) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let api = socket.display().to_string();
    thread::Builder::new().name("signals".into()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            eprintln!(
                "\nwhimbrel: the migration goes on without this command. `whimbrel status --api {api}` shows it; \
                 `whimbrel cancel --api {api}` calls it off"
            );
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
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
        "{} sent at {}/s over {}{}",
        render::size(progress.sent),
        render::size(progress.rate as u64),
        progress.transport,
        render::outlook(progress),
    ));
}
