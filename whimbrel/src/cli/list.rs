//! `whimbrel list`: all machines of a host.

use super::args::ListArgs;
use super::{Exit, render, say};
use anyhow::Context;
use migration::monitor::Phase;
use serde_json::{Value, json};
use whimbrel::api::model::{Migration, word};
use whimbrel::host::inventory::{self, Listed};

pub fn list(args: &ListArgs) -> anyhow::Result<Exit> {
    let run = args.host.host.run_dir();
    let listed: Vec<Listed> = match &args.host.at {
        Some(_) => args.host.client()?.get("/v1/machines")?,
        None => inventory::take(&run, inventory::PATIENCE)
            .with_context(|| format!("cannot look at {}", run.machines_folder().display()))?,
    };
    if args.json {
        say(Value::from_iter(listed.iter().map(program)))?;
    } else if listed.is_empty() {
        let place = args.host.at.clone().unwrap_or_else(|| run.path().display().to_string());
        say(format_args!("no machine is in {place}"))?;
    } else {
        let mut table = render::table();
        table.set_header(["name", "state", "memory", "vCPUs", "process", "from", "moving"]);
        table.add_rows(listed.iter().map(row));
        say(render::trimmed(&table))?;
    }
    Ok(Exit::Done)
}

fn program(machine: &Listed) -> Value {
    let Listed { name, vm, migration, arrival, .. } = machine;
    json!({ "name": name, "state": machine.doing(), "vm": vm, "migration": migration, "arrival": arrival })
}

fn row(machine: &Listed) -> [String; 7] {
    let of =
        |tell: &dyn Fn(&whimbrel::api::model::Vm) -> String| machine.vm.as_ref().map_or(String::new(), tell);
    let trouble = of(&|vm| vm.trouble.as_ref().map(|why| format!(" ({why})")).unwrap_or_default());
    let from = machine.arrival.as_ref().filter(|arrival| arrival.failure.is_none());
    [
        machine.name.clone(),
        machine.doing() + &trouble,
        of(&|vm| render::size(vm.memory)),
        of(&|vm| vm.vcpus.to_string()),
        of(&|vm| vm.pid.to_string()),
        from.map(|arrival| render::from(arrival.from, arrival.secured.as_ref())).unwrap_or_default(),
        machine.migration.as_ref().map(moving).unwrap_or_default(),
    ]
}

/// Where a guest is going, and how far it is.
fn moving(migration: &Migration) -> String {
    let progress = &migration.progress;
    let phase = match progress.phase {
        Phase::Precopy => format!("round {}", progress.round),
        other => word(&other),
    };
    let left = progress.round_bytes.saturating_sub(progress.round_done);
    let mut text = format!("to {}: {phase}", migration.to);
    if !progress.transport.is_empty() && migration.report.is_none() {
        let rate = render::size(progress.rate as u64);
        text += &format!(", {} left, {rate}/s{}", render::size(left), render::outlook(progress));
    }
    text
}
