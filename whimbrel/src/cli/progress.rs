//! Watching a migration, with a progress bar where there is a terminal.

use super::render;
use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};
use migration::monitor::{Phase, Progress};
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

/// What the machine is asked.
pub enum Ask {
    /// To begin a migration.
    Begin(Box<MigrationRequest>),
    /// How the migration ends that is under way.
    Follow,
}

/// Waits for the end of a migration. One request is answered when it is over: the machine's process stays for
/// whoever waits so, whoever else looks at it. A bar that shows begins with `label`.
///
/// # Errors
/// With [`api::Error::Http`] and [`api::Error::Silent`] it is not known what has become of the guest.
pub fn watch(socket: &Path, ask: Ask, bar: &ProgressBar, label: &str) -> Result<Migration, api::Error> {
    const PATH: &str = "/v1/migration?wait=true";
    let client = Client::new(socket)?;
    let waiting = Client::new(socket)?;
    let (sender, over) = mpsc::channel();
    let wait = move || {
        let answer = match ask {
            Ask::Begin(request) => waiting.call_within(FOREVER, Method::POST, PATH, &*request),
            Ask::Follow => waiting.call_within(FOREVER, Method::GET, PATH, &()),
        };
        // Nobody listens any more only if the machine has fallen silent.
        let _ = sender.send(answer);
    };
    let spawned = thread::Builder::new().name("waiting".into()).spawn(wait);
    spawned.map_err(|source| api::Error::Connect { path: socket.into(), source })?;
    let interval = if bar.is_hidden() { LOOK } else { POLL };
    loop {
        match over.recv_timeout(interval) {
            Ok(answer) => return answer,
            Err(RecvTimeoutError::Disconnected) => {
                return Err(api::Error::Http("the thread that waited has panicked".into()));
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        match client.get::<Migration>("/v1/migration") {
            Ok(migration) if migration.report.is_none() => show(bar, label, &migration.progress),
            Err(silent @ api::Error::Silent(_)) => return Err(silent),
            // Whatever else is wrong, the request that waits will tell.
            _ => {}
        }
    }
}

/// A progress bar.
pub fn bar() -> ProgressBar {
    let bar = ProgressBar::new(0);
    // A template that does not parse would show in the very first run on a terminal.
    if let Ok(style) = ProgressStyle::with_template("{prefix:>11} [{bar:30}] {msg}") {
        bar.set_style(style.progress_chars("=> "));
    }
    bar
}

fn show(bar: &ProgressBar, label: &str, progress: &Progress) {
    let phase = match progress.phase {
        Phase::Preparing => "preparing".into(),
        Phase::Precopy => format!("round {}", progress.round),
        Phase::Switchover | Phase::Committed => "switchover".into(),
        Phase::ReadyToSwitch => "ready to switch".into(),
        _ => "done".into(),
    };
    bar.set_prefix(if label.is_empty() { phase } else { format!("{label} {phase:>11}") });
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
