//! `whimbrel events`: what happens on this host.

use super::args::EventsArgs;
use super::{Exit, render, say};
use migration::monitor::Phase;
use std::ops::ControlFlow;
use std::thread;
use std::time::Duration;
use whimbrel::api::model::{Event, EventKind, Migration, word};
use whimbrel::api::{self};

/// How often a service that has ended is looked for.
const AGAIN: Duration = Duration::from_millis(500);

pub fn events(args: &EventsArgs) -> anyhow::Result<Exit> {
    let client = args.host.client()?;
    let mut failed = None;
    // Without an end, it begins with what is now. Otherwise it is all that is known.
    let mut last = (!args.follow).then_some(0);
    let mut known = false;
    loop {
        let ended = client.listen(last, args.follow, |event| {
            (last, known) = (Some(event.id), true);
            match tell(&event, args.json) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => {
                    failed = Some(error);
                    ControlFlow::Break(())
                }
            }
        });
        if let Some(error) = failed {
            return Err(error);
        }
        match ended {
            // Another service may be there soon.
            Ok(())
            | Err(api::Error::Connect { .. } | api::Error::Unreachable { .. } | api::Error::Http(_))
                if args.follow && known =>
            {
                thread::sleep(AGAIN);
            }
            Ok(()) => return Ok(Exit::Done),
            Err(error) => return Err(error.into()),
        }
    }
}

fn tell(event: &Event, json: bool) -> anyhow::Result<()> {
    if json {
        return say(serde_json::to_string(event)?);
    }
    let name = event.name.as_deref().unwrap_or("-");
    say(format_args!("{} {name}: {}", event.at, happened(event)))
}

fn happened(event: &Event) -> String {
    let state = event.state.map(|state| word(&state)).unwrap_or_default();
    let migration = |tell: fn(&Migration) -> String| event.migration.as_ref().map(tell).unwrap_or_default();
    let from = event.arrival.as_ref().map(|a| render::from(a.from, a.secured.as_ref())).unwrap_or_default();
    match event.event {
        EventKind::Machine => state,
        EventKind::Gone => "is not here any more".into(),
        EventKind::MigrationBegun => migration(|m| format!("a migration to {} has begun", m.to)),
        EventKind::MigrationPhase => migration(|m| format!("to {}: {}", m.to, phase(m.progress.phase))),
        EventKind::MigrationRound => migration(|m| {
            let sent = render::size(m.progress.sent);
            format!(
                "to {}: round {} has ended, {sent} sent{}",
                m.to,
                m.progress.round,
                render::outlook(&m.progress)
            )
        }),
        EventKind::MigrationEnded => migration(|m| {
            let end = m.report.as_ref().map(|report| {
                let why = report.failure.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
                format!("{}{why}", word(&report.verdict))
            });
            format!("the migration to {} is over: {}", m.to, end.unwrap_or_default())
        }),
        EventKind::ArrivalBegun => format!("a guest comes from {from}"),
        EventKind::ArrivalEnded => {
            match event.arrival.as_ref().and_then(|arrival| arrival.failure.as_ref()) {
                Some(why) => format!("the guest from {from} was not taken in: {why}"),
                None => format!("the guest has arrived from {from}"),
            }
        }
        EventKind::Drain => match event.drained {
            Some(true) => "this host takes no guests in".into(),
            _ => "this host takes guests in".into(),
        },
    }
}

fn phase(phase: Phase) -> String {
    match phase {
        Phase::Precopy => "memory travels".into(),
        other => word(&other),
    }
}
