//! `whimbrel-bench`: migrations measured between real processes, peers beside us in the same run.

mod args;
mod compare;
mod contender;
mod facts;
mod figures;
mod guest;
mod moves;
mod output;
mod pace;
mod peers;
mod plan;
mod presets;
mod record;
mod report;
mod statistics;
mod summary;
mod transport;
mod usage;
mod warm;

use anyhow::Context;
use args::{Cli, Command, OutputArgs, TransportArgs};
use clap::Parser;
use plan::Plan;
use record::{Log, Measurement};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Child, Command as Process, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Blackout(args) => {
            presets::blackout(&args).and_then(|plan| measure(&plan, &args.common.output))
        }
        Command::Untouched(args) => {
            presets::untouched(&args).and_then(|plan| measure(&plan, &args.common.output))
        }
        Command::Throughput(args) => {
            presets::throughput(&args).and_then(|plan| measure(&plan, &args.common.output))
        }
        Command::Matrix(args) => presets::matrix(&args).and_then(|plan| measure(&plan, &args.common.output)),
        Command::Transport(args) => measure_transport(&args),
        Command::Show(args) => show(&args),
        Command::Compare(args) => compare(&args),
        Command::Report(args) => report(&args),
    };
    result.unwrap_or_else(|error| {
        eprintln!("whimbrel-bench: {error:#}");
        ExitCode::FAILURE
    })
}

/// Measures; success is that every run was made and none failed.
fn measure(plan: &Plan, args: &OutputArgs) -> anyhow::Result<ExitCode> {
    let mut log = Log::open(args.json, args.save.as_deref())?;
    let measured = plan.carry_out(&mut log, &interruption()?)?;
    if !args.json {
        print!("{}", summary::text(&measured));
    }
    let failed = measured.runs.iter().any(|run| run.failure.is_some());
    let interrupted = measured.end.as_ref().is_some_and(|end| end.interrupted);
    Ok(if failed || interrupted { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Is the server, or measures towards one.
fn measure_transport(args: &TransportArgs) -> anyhow::Result<ExitCode> {
    if args.server {
        let server = transport::server::Server::bind((args.bind, args.port).into())?;
        println!("{LISTENING}{}", server.address());
        if args.until_input_ends {
            // However the client ends, its end of the pipe is closed.
            std::thread::spawn(|| {
                let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                std::process::exit(0);
            });
        }
        loop {
            server.serve_one()?;
        }
    }
    // Kept for as long as it is needed.
    let (_own, to) = match &args.client {
        Some(host) => (None, format!("{host}:{}", args.port)),
        None => OwnServer::start(args.bind).map(|(own, address)| (Some(own), address))?,
    };
    for plan in presets::transport(args, &to)? {
        let measured = measure(&plan, &args.output)?;
        if measured != ExitCode::SUCCESS {
            return Ok(measured);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What a server says before its address.
const LISTENING: &str = "listening on ";

/// A server on this machine, which ends with its client.
struct OwnServer(Child);

impl OwnServer {
    /// Starts it; returns it with its address.
    fn start(bind: IpAddr) -> anyhow::Result<(Self, String)> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut server = Process::new(program)
            .args(["transport", "--server", "--port", "0", "--until-input-ends", "--bind", &bind.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map(OwnServer)
            .context("cannot start a server")?;
        let stdout = server.0.stdout.take().context("the server has no output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("the server said nothing")?;
        let address = line.trim_end().strip_prefix(LISTENING).context("the server does not listen")?;
        Ok((server, address.into()))
    }
}

impl Drop for OwnServer {
    fn drop(&mut self) {
        // It may have ended by itself, by the same signal as this process.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Set by the first SIGINT or SIGTERM, after which the run under way is the last; the second ends the process.
fn interruption() -> anyhow::Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_shutdown(signal, 1, Arc::clone(&interrupted))?;
        flag::register(signal, Arc::clone(&interrupted))?;
    }
    Ok(interrupted)
}

fn show(args: &args::ShowArgs) -> anyhow::Result<ExitCode> {
    for measured in read_all(&args.files)? {
        println!("{}", summary::text(&measured));
    }
    Ok(ExitCode::SUCCESS)
}

/// What is in files, what was measured several times joined.
fn read_all(files: &[PathBuf]) -> anyhow::Result<Vec<Measurement>> {
    let all = files.iter().map(|path| record::read(path)).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(record::joined(all.concat()))
}

/// Success is that nothing is worse.
fn compare(args: &args::CompareArgs) -> anyhow::Result<ExitCode> {
    let (old, new) = (record::read(&args.old)?, record::read(&args.new)?);
    let least = args.least.max(0.0) / 100.0;
    let manner = compare::Manner { least, relative_to: args.relative_to.clone(), all: args.all };
    let differences = compare::compare(&old, &new, &manner)?;
    if args.json {
        println!("{}", serde_json::to_string(&differences)?);
    } else {
        print!("{}", compare::text(&old, &new, &manner, &differences)?);
    }
    let worse = differences.iter().any(|d| d.verdict == compare::Verdict::Worse);
    Ok(if worse { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn report(args: &args::ReportArgs) -> anyhow::Result<ExitCode> {
    let page = report::page(&args.title, &read_all(&args.files)?)?;
    std::fs::write(&args.output, page).with_context(|| format!("cannot write {}", args.output.display()))?;
    Ok(ExitCode::SUCCESS)
}
