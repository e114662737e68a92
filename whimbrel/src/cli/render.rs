//! Reports for people, and the JSON for programs where it differs from the API's.

use comfy_table::{CellAlignment, LineStyle, Table, TableStyle};
use migration::monitor::Progress;
use migration::report::{Report, Verdict};
use serde_json::Value;
use std::fmt::Write;
use std::net::SocketAddr;
use vmm::guest::Testimony;
use whimbrel::api::model::{Arrival, Migration, Vm, VmState, word};
use whimbrel::security::Secured;

/// A number of bytes in the largest binary unit that it fills.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// A number of vCPUs.
pub fn vcpus(number: u32) -> String {
    format!("{number} vCPU{}", if number == 1 { "" } else { "s" })
}

/// A time.
pub fn ms(us: u64) -> String {
    format!("{:.2} ms", us as f64 / 1e3)
}

/// The migration as JSON, with the guest's testimony as an object in the place of the remarks, of which it is
/// the text.
pub fn with_testimony(migration: &Migration) -> anyhow::Result<Value> {
    let mut value = serde_json::to_value(migration)?;
    if let Some(report) = value.pointer_mut("/report").and_then(Value::as_object_mut)
        && let Some(remarks) = report.remove("remarks")
    {
        let testimony = remarks.as_str().map(serde_json::from_str).transpose()?;
        report.insert("testimony".into(), testimony.unwrap_or(Value::Null));
    }
    Ok(value)
}

/// A machine's status.
pub fn vm(vm: &Vm) -> String {
    let state = word(&vm.state);
    let name = if vm.name.is_empty() { "receiver" } else { &vm.name };
    match vm.state {
        VmState::Waiting | VmState::Receiving => format!("{name}: {state}, process {}", vm.pid),
        _ => {
            let trouble = vm.trouble.as_ref().map(|why| format!("; {why}")).unwrap_or_default();
            format!("{name}: {state}, {}, {}, process {}{trouble}", vcpus(vm.vcpus), size(vm.memory), vm.pid)
        }
    }
}

/// A guest that comes, has come or was not taken in.
pub fn arrival(arrival: &Arrival) -> String {
    let p = &arrival.progress;
    let from = from(arrival.from, arrival.secured.as_ref());
    let so_far = format!("{} of memory, {} placed in {}", size(p.memory), size(p.placed), ms(p.elapsed_us));
    match (&arrival.ended, &arrival.failure) {
        (None, _) => {
            format!("a guest comes from {from}: {}, {so_far}", word(&p.phase))
        }
        (Some(at), Some(why)) => format!("the guest from {from} was not taken in at {at}: {why}"),
        (Some(at), None) => format!("the guest arrived from {from} at {at}: {so_far}"),
    }
}

/// Where a guest comes from, and from whom.
pub fn from(address: SocketAddr, secured: Option<&Secured>) -> String {
    match secured {
        Some(secured) => format!("{} ({address})", secured.peer),
        None => address.to_string(),
    }
}

/// A migration's status or report.
pub fn migration(migration: &Migration) -> String {
    match &migration.report {
        Some(report) if migration.dry_run && report.verdict == Verdict::Stayed => match &report.failure {
            None => format!("nothing speaks against moving to {}", migration.to),
            Some(why) => format!("it could not move to {}: {why}", migration.to),
        },
        Some(report) => {
            let who = migration.secured.as_ref().map(|secured| secured.told(&report.lanes));
            let to = who.map(|who| format!("{} ({who})", migration.to));
            self::report(report, to.as_deref().unwrap_or(&migration.to))
        }
        None => {
            let p = &migration.progress;
            format!(
                "moving to {}: round {}, {} sent at {}/s{}",
                migration.to,
                p.round,
                size(p.sent),
                size(p.rate as u64),
                outlook(p),
            )
        }
    }
}

/// What a migration's rounds let expect, as far as it is known.
pub fn outlook(progress: &Progress) -> String {
    let dirtied = progress.dirty_rate.map(|rate| format!(", dirtied {}/s", size(rate as u64)));
    let blackout = progress.predicted_blackout_us.map(|us| format!(", blackout of {} expected", ms(us)));
    let slowed = progress.throttled_to.map(|rate| format!(", its writers slowed to {}/s", size(rate)));
    [dirtied, slowed, blackout].into_iter().flatten().collect()
}

/// The whole story.
pub fn report(report: &Report, to: &str) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write_report(&mut text, report, to);
    text.truncate(text.trim_end().len());
    text
}

fn write_report(out: &mut String, report: &Report, to: &str) -> std::fmt::Result {
    match (&report.verdict, &report.failure) {
        (Verdict::Moved, _) => {
            writeln!(out, "moved to {to} over {} in {}", report.transport, ms(report.total_us))?
        }
        (Verdict::Stayed, Some(why)) => writeln!(out, "not moved, the guest continues to run here: {why}")?,
        (_, None) => writeln!(out, "not moved")?,
        (_, Some(why)) => writeln!(
            out,
            "HELD: the guest is paused here and may run at {to}: {why}\n\
             If it runs there, use `whimbrel quit` here. If it certainly does not, use `whimbrel resume --force` here."
        )?,
    }
    for declined in &report.declined {
        writeln!(out, "{} was not used: {}", declined.transport, declined.why)?;
    }
    if let Some(why) = &report.over_limit {
        writeln!(out, "switched over beyond the limit: {why}")?;
    }
    if !report.rounds.is_empty() {
        writeln!(out, "{}", rounds(report))?;
    }
    if !report.throttled_us.is_empty() {
        let held = report.throttled_us.iter().map(|us| ms(*us)).collect::<Vec<_>>().join(", ");
        writeln!(out, "the guest's writers were slowed; its vCPUs stood still for {held}")?;
    }
    if !report.lanes.is_empty() {
        writeln!(out, "{}", lanes(report))?;
    }
    if report.blackout_us > 0 {
        writeln!(out, "blackout {}", ms(report.blackout_us))?;
        writeln!(out, "{}", spans(report))?;
    }
    if report.verdict == Verdict::Moved {
        let cpu = |us: Option<u64>| us.map_or("unknown".into(), ms);
        writeln!(
            out,
            "memory {}: sent {}, zero {}, never touched {}, resident there {}",
            size(report.memory),
            size(report.sent()),
            size(report.zero()),
            size(report.untouched()),
            report.destination_resident.map_or("unknown".into(), size),
        )?;
        writeln!(
            out,
            "set-up {} (building there {}); CPU here {} ({} of it in user space), there {}",
            ms(report.setup_us),
            ms(report.build_us),
            ms(report.source_cpu_us),
            ms(report.source_user_us),
            cpu(report.destination_cpu_us),
        )?;
    }
    if let Some(testimony) = report.remarks.as_deref().and_then(|t| serde_json::from_str::<Testimony>(t).ok())
    {
        write!(out, "{testimony}")?;
    }
    Ok(())
}

fn rounds(report: &Report) -> Table {
    let mut table = table();
    table.set_header([
        "round",
        "dirty",
        "sent",
        "zero",
        "untouched",
        "time",
        "rate",
        "barrier",
        "dirty after",
        "predicted",
    ]);
    let final_round = (report.blackout_us > 0).then(|| report.rounds.len() - 1);
    for (index, r) in report.rounds.iter().enumerate() {
        let rate = (r.sent as f64 / (r.elapsed_us.max(1) as f64 / 1e6)) as u64;
        let last = final_round == Some(index);
        table.add_row([
            if last { "final".to_string() } else { r.round.to_string() },
            size(r.dirty),
            size(r.sent),
            size(r.zero),
            size(r.untouched),
            ms(r.elapsed_us),
            format!("{}/s", size(rate)),
            ms(r.barrier_us),
            if last { String::new() } else { size(r.remaining) },
            if last { String::new() } else { ms(r.predicted_blackout_us) },
        ]);
    }
    right_align(table)
}

/// What each lane carried. Depth and registration are columns only for transports that have them.
fn lanes(report: &Report) -> Table {
    let deep = report.lanes.iter().any(|l| l.max_in_flight > 0);
    let mut table = table();
    let mut header = vec!["lane", "bytes", "zero", "requests", "encryption"];
    if deep {
        header.extend(["in flight", "registering", "of that while sending"]);
    }
    table.set_header(header);
    for (number, lane) in report.lanes.iter().enumerate() {
        let mut row = vec![
            number.to_string(),
            size(lane.bytes),
            size(lane.zero_bytes),
            lane.requests.to_string(),
            lane.encryption.to_string(),
        ];
        if deep {
            row.extend([
                lane.max_in_flight.to_string(),
                ms(lane.registration_us),
                ms(lane.registration_overlap_us),
            ]);
        }
        table.add_row(row);
    }
    right_align(table)
}

fn spans(report: &Report) -> Table {
    let mut table = table();
    for span in &report.spans {
        table.add_row([span.name.clone(), ms(span.us)]);
    }
    right_align(table)
}

/// An empty table as all commands print it.
pub fn table() -> Table {
    let mut table = Table::new();
    table.load_style(TableStyle::new().header_separator(LineStyle::none().fill('─').junction('─')));
    table
}

/// A table without the spaces at the ends of its lines.
pub fn trimmed(table: &Table) -> String {
    let lines: Vec<_> = table.lines().map(|line| line.trim_end().to_string()).collect();
    lines.join("\n")
}

/// All columns but the first hold figures.
fn right_align(mut table: Table) -> Table {
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::{Progress, outlook, size};

    #[test]
    fn sizes_read_well() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1023), "1023 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(8 << 30), "8.0 GiB");
    }

    #[test]
    fn what_is_not_known_yet_is_not_shown() {
        let mut progress = Progress::default();
        assert_eq!(outlook(&progress), "");
        (progress.dirty_rate, progress.predicted_blackout_us) = (Some(0.0), Some(2000));
        assert!(outlook(&progress).starts_with(", dirtied 0 B/s, blackout of 2"), "{}", outlook(&progress));
    }
}
