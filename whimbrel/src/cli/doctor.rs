//! `whimbrel doctor`: what this host can do, what it lacks, and how to provide that; and whether guests can
//! go to another.

use super::Exit;
use super::args::DoctorArgs;
use super::{render, say};
use anyhow::Context;
use comfy_table::{ContentArrangement, Table};
use serde_json::json;
use whimbrel::doctor::pair::{self, Examined, Pair};
use whimbrel::doctor::{Finding, Level};
use whimbrel::host::config::{HostConfig, with_port};

pub fn doctor(args: &DoctorArgs) -> anyhow::Result<Exit> {
    let with = args.with.as_deref().map(|to| with(args, to)).transpose()?;
    let findings = whimbrel::doctor::examine(args.memory);
    let mut all = findings.iter().chain(with.iter().flat_map(|with| &with.findings));
    let healthy = all.all(|f| f.level != Level::Broken);
    if args.json {
        let mut answer = json!({ "healthy": healthy, "findings": findings });
        if let (Some(to), Some(with)) = (&args.with, &with) {
            answer["with"] = json!({ "to": with_port(to), "findings": with.findings, "clock": with.clock });
        }
        say(answer)?;
    } else {
        say(table(&findings))?;
        if let (Some(to), Some(with)) = (&args.with, &with) {
            say(format_args!("from here to {}:", with_port(to)))?;
            say(table(&with.findings))?;
        }
        say(match (healthy, &args.with) {
            (true, None) => "virtual machines can run and be moved here".into(),
            (true, Some(to)) => format!("virtual machines can run here, and move to {to}"),
            (false, _) => "repair first what is marked BROKEN".into(),
        })?;
    }
    Ok(if healthy { Exit::Done } else { Exit::Failed })
}

fn with(args: &DoctorArgs, to: &str) -> anyhow::Result<Examined> {
    let host = args.host_config.as_deref().map(HostConfig::read).transpose()?;
    let pair = Pair {
        program: std::env::current_exe().context("cannot find this program's own file")?,
        to: with_port(to),
        at: args.at.clone(),
        // A host's machines show its certificates.
        tls: args.security.files().or_else(|| host.as_ref().and_then(HostConfig::certificates)),
        insecure: args.security.insecure || host.as_ref().is_some_and(|host| host.insecure),
        host: host.as_ref(),
    };
    pair::examine(&pair).context("cannot make a temporary folder")
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
