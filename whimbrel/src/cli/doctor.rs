//! `whimbrel doctor`: what this host can do, what it lacks, and how to provide that.

use super::Exit;
use super::args::DoctorArgs;
use super::{render, say};
use comfy_table::{ContentArrangement, Table};
use whimbrel::doctor::{Finding, Level};

pub fn doctor(args: &DoctorArgs) -> anyhow::Result<Exit> {
    let findings = whimbrel::doctor::examine(args.memory);
    let healthy = findings.iter().all(|f| f.level != Level::Broken);
    if args.json {
        say(serde_json::json!({ "healthy": healthy, "findings": findings }))?;
    } else {
        say(table(&findings))?;
        say(if healthy {
            "virtual machines can run and be moved here"
        } else {
            "repair first what is marked BROKEN"
        })?;
    }
    Ok(if healthy { Exit::Done } else { Exit::Failed })
}

fn table(findings: &[Finding]) -> Table {
    let mut table = render::table();
    table.set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["", "what", "found", "remedy"]);
    for f in findings {
        let level = match f.level {
            Level::Good => "ok",
            Level::Limited => "limited",
            Level::Broken => "BROKEN",
        };
        table.add_row([level, f.what, &f.found, f.mend.as_deref().unwrap_or("")]);
    }
    table
}
