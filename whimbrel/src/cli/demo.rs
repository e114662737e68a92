//! `whimbrel demo`: both sides on this machine, and a guest that checks itself.

use super::Exit;
use super::args::{DemoArgs, SecurityArgs};
use super::migrate::{carry_out, exit, request};
use super::{render, say};
use anyhow::Context;
use serde_json::json;
use std::thread;
use std::time::Duration;
use whimbrel::node::Node;

/// How long the guest may take to fill its working set: emulated hosts are slow.
const READY: Duration = Duration::from_secs(120);

/// How long the guest runs between moves.
const BETWEEN: Duration = Duration::from_millis(500);

pub fn demo(args: &DemoArgs) -> anyhow::Result<Exit> {
    let program = std::env::current_exe().context("cannot find this program's own file")?;
    let folder = tempfile::tempdir().context("cannot make a temporary folder")?;
    let tell = |text: String| if args.json { Ok(()) } else { say(text) };
    let options = [
        ("--memory", args.machine.memory.to_string()),
        ("--vcpus", args.machine.vcpus.to_string()),
        ("--pages", args.machine.pages.to_string()),
        ("--working-set", args.working_set.to_string()),
        ("--serial", "none".to_string()),
    ];
    let run =
        std::iter::once("run".to_string()).chain(options.into_iter().flat_map(|(k, v)| [k.to_string(), v]));
    let mut node = Node::start(&program, folder.path(), "guest-0", run)?;
    node.expect("running")?;
    node.wait_guest("the guest's start", READY, |guest| guest.state == "running")?;
    tell(format!(
        "a guest of {} with {} runs in process {} and keeps rewriting {}",
        render::size(args.machine.memory),
        render::vcpus(args.machine.vcpus),
        node.pid(),
        render::size(args.working_set)
    ))?;
    // Both ends are this host, whatever the address is that lies between them.
    let security = SecurityArgs { insecure: true, ..SecurityArgs::default() };
    let mut reports = Vec::new();
    for number in 1..=args.moves {
        thread::sleep(BETWEEN);
        let name = format!("guest-{number}");
        let (mut next, address) =
            Node::receiver_on(&program, folder.path(), &name, (args.via, 0).into(), [""; 0])?;
        tell(format!("\nmove {number}: from process {} to process {}", node.pid(), next.pid()))?;
        let ended = carry_out(node.api_path(), request(&address.to_string(), &args.policy, &security))?;
        let report = ended.report.as_ref().context("the machine sent no report")?;
        tell(render::migration(&ended))?;
        reports.push(render::with_testimony(&ended)?);
        if exit(report) != Exit::Done {
            if args.json {
                say(json!({ "moves": reports, "guest": node.status()?.guest }))?;
            }
            return Ok(exit(report));
        }
        next.expect("arrived")?;
        node = next;
    }
    thread::sleep(BETWEEN);
    let guest = node.status()?.guest.context("the guest keeps no record of itself")?;
    node.quit()?;
    let clean = guest.clean;
    if args.json {
        say(json!({ "moves": reports, "guest": guest }))?;
    } else {
        say(format!(
            "the guest's own verdict: {}",
            if clean { "no page wrong, no timer lost, time never ran backwards" } else { "DAMAGED" }
        ))?;
    }
    Ok(if clean { Exit::Done } else { Exit::Failed })
}
