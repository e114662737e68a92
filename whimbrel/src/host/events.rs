//! What happens on a host, by what its machines tell of themselves.
//!
//! The service listens to each machine's own events, and adds what it is told to the host's. Only two things
//! are looked at again and again, both in the run directory: which sockets there are, and whether the host
//! drains. Events from before the service's time are those that the history has: how moves ended.

use super::history;
use super::run_dir::RunDir;
use crate::api::Error;
use crate::api::client::Caller;
use crate::api::events::Events;
use crate::api::model::{Event, EventKind};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, UNIX_EPOCH};
use tokio::task::JoinHandle;

/// How often the run directory is looked at.
const LOOK: Duration = Duration::from_millis(250);

/// A machine: its name, and which of several sockets that had the name in turn is its own.
type Socket = (String, u64);

/// Listens to the machines of this run directory as long as the program runs.
///
/// # Errors
/// When there can be no further thread or descriptor.
pub fn watch(run: RunDir, events: Arc<Events>) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    thread::Builder::new().name("events".into()).spawn(move || runtime.block_on(look(run, events)))?;
    Ok(())
}

async fn look(run: RunDir, events: Arc<Events>) {
    let began = events.floor();
    let mut listening: BTreeMap<Socket, JoinHandle<()>> = BTreeMap::new();
    let mut here: BTreeSet<Socket> = BTreeSet::new();
    // Of those that are here at first, it is told what they are doing. Those that come tell all themselves.
    let mut since = None;
    loop {
        events.add(Event { drained: Some(run.is_drained()), ..Event::new(EventKind::Drain, "") });
        // What cannot be read now may be read later.
        let names = run.machines().unwrap_or_default();
        let now: BTreeSet<Socket> = names
            .into_iter()
            .filter_map(|name| socket_of(&run, &name).map(|number| (name, number)))
            .collect();
        for (name, _) in here.difference(&now) {
            events.add(Event::new(EventKind::Gone, name));
        }
        listening.retain(|socket, task| now.contains(socket) || !task.is_finished());
        for socket in &now {
            if !listening.contains_key(socket) {
                let task = listen(run.clone(), socket.clone(), Arc::clone(&events), since);
                listening.insert(socket.clone(), tokio::spawn(task));
            }
        }
        (here, since) = (now, Some(began));
        tokio::time::sleep(LOOK).await;
    }
}

/// Which socket has this name.
fn socket_of(run: &RunDir, name: &str) -> Option<u64> {
    std::fs::symlink_metadata(run.machine_socket(name)).ok().map(|socket| socket.ino())
}

/// Adds what a machine tells, until it tells nothing more.
async fn listen(run: RunDir, (name, number): Socket, events: Arc<Events>, since: Option<u64>) {
    let path = run.machine_socket(&name);
    let has_name = || socket_of(&run, &name) == Some(number);
    let mut last = since;
    while let Err(error) = hear(&path, &mut last, |event| {
        // Whoever has the name now has a state of its own.
        if event.event != EventKind::Machine || has_name() {
            events.add(Event { name: Some(name.clone()), ..event });
        }
    })
    .await
    {
        // It may be too busy. A process of another version may tell no events.
        if !has_name() || !matches!(&error, Error::Connect { source, .. } if is_passing(source)) {
            break;
        }
        tokio::time::sleep(LOOK).await;
    }
    // Of one that has been killed the socket stays.
    if has_name() {
        events.add(Event::new(EventKind::Gone, &name));
    }
}

fn is_passing(error: &io::Error) -> bool {
    !matches!(error.kind(), io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound)
}

async fn hear(path: &Path, last: &mut Option<u64>, mut tell: impl FnMut(Event)) -> Result<(), Error> {
    let mut listening = Caller::connect(path).await?.listen(*last, true).await?;
    while let Some(event) = listening.next().await? {
        *last = Some(event.id);
        tell(event);
    }
    Ok(())
}

/// The events after `since` and up to `until` that the history in this folder has.
///
/// # Errors
/// Those of reading it.
pub fn earlier(folder: &Path, since: u64, until: u64) -> io::Result<Vec<Event>> {
    let entries = history::read(folder, None)?;
    let mut events: Vec<_> = entries.iter().filter_map(of_entry).collect();
    events.retain(|event| (since + 1..=until).contains(&event.id));
    // Several processes write it.
    events.sort_by_key(|event| event.id);
    Ok(events)
}

/// An entry of the history as the event that it was. `None` if it is one that this program does not know.
fn of_entry(entry: &Value) -> Option<Event> {
    let at = entry["at"].as_str()?;
    let time = humantime::parse_rfc3339(at).ok()?.duration_since(UNIX_EPOCH).ok()?;
    let kind = if entry["arrival"].is_object() { EventKind::ArrivalEnded } else { EventKind::MigrationEnded };
    let mut event = Event::new(kind, entry["name"].as_str().unwrap_or_default());
    match kind {
        EventKind::ArrivalEnded => {
            event.arrival = Some(serde_json::from_value(entry["arrival"].clone()).ok()?)
        }
        _ => event.migration = Some(serde_json::from_value(entry["migration"].clone()).ok()?),
    }
    Some(Event { id: u64::try_from(time.as_micros()).ok()?, at: at.into(), ..event })
}
