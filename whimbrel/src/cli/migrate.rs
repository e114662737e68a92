//! `whimbrel migrate`: starts a migration and watches it.

use super::Exit;
use super::args::{MigrateArgs, PolicyArgs, SecurityArgs, Target};
use super::progress::{self, Ask, watch};
use super::{render, say};
use hyper::Method;
use indicatif::ProgressBar;
use migration::report::{Report, Verdict};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::IsTerminal;
use std::path::Path;
use std::thread;
use whimbrel::api;
use whimbrel::api::client::Client;
use whimbrel::api::model::{Migration, MigrationRequest};
use whimbrel::host::config::with_port;

/// The request that the command line asks for, to a host or to its host and port.
pub fn request(to: &str, policy: &PolicyArgs, security: &SecurityArgs) -> MigrationRequest {
    MigrationRequest {
        to: with_port(to),
        encryption: policy.encryption,
        tls: security.files(),
        insecure: security.insecure,
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
    let request = request(&args.to, &args.policy, &args.security);
    if args.detach {
        let client = Client::new(&args.target.socket()?)?;
        let started: Migration = client.call(Method::POST, "/v1/migration", &request)?;
        if args.target.json {
            say(serde_json::to_string(&started)?)?;
        }
        return Ok(Exit::Done);
    }
    let socket = args.target.socket()?;
    explain_interruption(&args.target)?;
    let ended = match carry_out(&socket, request) {
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

/// Carries a migration out, with a progress bar where there is a terminal.
///
/// # Errors
/// Those of [`watch`].
pub fn carry_out(socket: &Path, request: MigrationRequest) -> Result<Migration, api::Error> {
    let bar = if std::io::stderr().is_terminal() { progress::bar() } else { ProgressBar::hidden() };
    let ended = watch(socket, Ask::Begin(Box::new(request)), &bar, "");
    bar.finish_and_clear();
    ended
}

/// Says at SIGINT and SIGTERM that the migration goes on, before they end this command.
fn explain_interruption(target: &Target) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let machine = target.to_string();
    thread::Builder::new().name("signals".into()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            eprintln!(
                "\nwhimbrel: the migration goes on without this command. `whimbrel status {machine}` shows it; \
                 `whimbrel cancel {machine}` calls it off"
            );
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
}
