//! `whimbrel history`: what became of the moves from and to this host.

use super::args::HistoryArgs;
use super::host::encoded;
use super::{Exit, render, say};
use anyhow::Context;
use serde_json::Value;
use whimbrel::host::history;
use whimbrel::host::server::MOST_ENTRIES;

pub fn history(args: &HistoryArgs) -> anyhow::Result<Exit> {
    let folder = args.state_dir.clone().unwrap_or_else(|| args.host.host.run_dir().state_folder());
    let (mut entries, place) = match &args.host.at {
        Some(url) => (told(args)?, format!("of {url}")),
        None => {
            let place = format!("in {}", folder.display());
            let read = history::read(&folder, args.name.as_deref());
            (read.with_context(|| format!("cannot read the history {place}"))?, place)
        }
    };
    if let Some(last) = args.last {
        entries.drain(..entries.len().saturating_sub(last));
    }
    if args.json {
        say(Value::Array(entries))?;
    } else if entries.is_empty() {
        say(format_args!("no move is in the history {place}"))?;
    } else {
        let mut table = render::table();
        table.set_header(["at", "name", "what", "where", "over", "time", "blackout", "why"]);
        table.add_rows(entries.iter().map(row));
        say(render::trimmed(&table))?;
    }
    Ok(Exit::Done)
}

/// What another host tells of its own.
fn told(args: &HistoryArgs) -> anyhow::Result<Vec<Value>> {
    let last = args.last.map_or(MOST_ENTRIES, |last| last.min(MOST_ENTRIES));
    let name = args.name.as_ref().map(|name| format!("&name={}", encoded(name))).unwrap_or_default();
    Ok(args.host.client()?.get(&format!("/v1/history?limit={last}{name}"))?)
}

fn row(entry: &Value) -> [String; 8] {
    let text = |path: &str| entry.pointer(path).and_then(Value::as_str).unwrap_or_default().to_string();
    let time = |path: &str| entry.pointer(path).and_then(Value::as_u64).filter(|us| *us > 0).map(render::ms);
    let (what, place, whole, why) = match entry.get("arrival") {
        Some(arrival) => {
            let refused = arrival.get("failure").is_some_and(|failure| !failure.is_null());
            let what = if refused { "refused" } else { "arrived" };
            let from = format!("from {}", text("/arrival/from"));
            (what.into(), from, time("/arrival/progress/elapsed_us"), text("/arrival/failure/message"))
        }
        None => (
            text("/migration/report/verdict"),
            format!("to {}", text("/migration/to")),
            time("/migration/report/total_us"),
            text("/migration/report/failure/message"),
        ),
    };
    let blackout = time("/migration/report/blackout_us").unwrap_or_default();
    let over = text("/migration/report/transport");
    [text("/at"), text("/name"), what, place, over, whole.unwrap_or_default(), blackout, why]
}
