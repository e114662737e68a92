//! `whimbrel-bench` measures migrations between real processes, and other programs in the same run.

mod args;
mod bound;
mod cipher;
mod compare;
mod contender;
mod facts;
mod figures;
mod growth;
mod guest;
mod log;
mod moved;
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
mod text;
mod transport;
mod usage;
mod warm;

use anyhow::Context;
use args::{Cli, Command, OutputArgs, TransportArgs};
use clap::{CommandFactory, Parser};
use log::Log;
use plan::Plan;
use record::Measurement;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
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
        Command::Man { folder } => man(&folder),
    };
    result.unwrap_or_else(|error| {
        eprintln!("whimbrel-bench: {error:#}");
        ExitCode::FAILURE
    })
}

fn man(folder: &Path) -> anyhow::Result<ExitCode> {
    std::fs::create_dir_all(folder)?;
    clap_mangen::generate_to(Cli::command(), folder)?;
    Ok(ExitCode::SUCCESS)
}

/// Makes a measurement. It succeeds if every run was made and none failed.
fn measure(plan: &Plan, args: &OutputArgs) -> anyhow::Result<ExitCode> {
    let mut log = Log::open(args.json, args.save.as_deref())?;
    let measured = plan.measure(&mut log, &interrupt_flag()?)?;
    if !args.json {
        print!("{}", text::text(&measured));
    }
    let failed = measured.runs.iter().any(|run| run.failure.is_some());
    let interrupted = measured.end.as_ref().is_some_and(|end| end.interrupted);
    Ok(if failed || interrupted { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Runs the server, or measures with one.
fn measure_transport(args: &TransportArgs) -> anyhow::Result<ExitCode> {
    if args.server {
        let server = transport::server::Server::bind((args.bind, args.port).into())?;
        println!("{LISTENING}{}", server.address());
        if args.until_input_ends {
            // However the client ends, the kernel closes its end of the pipe.
            std::thread::spawn(|| {
                let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
                std::process::exit(0);
            });
        }
        loop {
            server.serve_one()?;
        }
    }
    // A local server runs for as long as this value lives.
    let (_server, to) = match &args.client {
        Some(host) => (None, format!("{host}:{}", args.port)),
        None => LocalServer::start(args.bind).map(|(own, address)| (Some(own), address))?,
    };
    let plans = presets::transport(args, &to)?;
    let seconds = presets::least_seconds(args, &plans);
    eprintln!("this takes some {} and what lies between the runs", span(seconds));
    for plan in &plans {
        let measured = measure(plan, &args.output)?;
        if measured != ExitCode::SUCCESS {
            return Ok(measured);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A time in words.
fn span(seconds: f64) -> String {
    if seconds < 120.0 { format!("{seconds:.0} seconds") } else { format!("{:.0} minutes", seconds / 60.0) }
}

/// What a server prints before its address.
const LISTENING: &str = "listening on ";

/// A server on this machine. Dropping it ends the process.
struct LocalServer(Child);

impl LocalServer {
    /// Starts the server and returns it with its address.
    fn start(bind: IpAddr) -> anyhow::Result<(Self, String)> {
        let program = std::env::current_exe().context("cannot find this program's own file")?;
        let mut server = Process::new(program)
            .args(["transport", "--server", "--port", "0", "--until-input-ends", "--bind", &bind.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .map(LocalServer)
            .context("cannot start a server")?;
        let stdout = server.0.stdout.take().context("the server has no output")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).context("the server said nothing")?;
        let address = line.trim_end().strip_prefix(LISTENING).context("the server does not listen")?;
        Ok((server, address.into()))
    }
}

impl Drop for LocalServer {
    fn drop(&mut self) {
        // The signal that ended this process may have ended it too.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A flag that the first SIGINT or SIGTERM sets, after which the current run is the last. The second ends the
/// process.
fn interrupt_flag() -> anyhow::Result<Arc<AtomicBool>> {
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_shutdown(signal, 1, Arc::clone(&interrupted))?;
        flag::register(signal, Arc::clone(&interrupted))?;
    }
    Ok(interrupted)
}

fn show(args: &args::ShowArgs) -> anyhow::Result<ExitCode> {
    for measured in read_all(&args.files)? {
        println!("{}", text::text(&measured));
    }
    Ok(ExitCode::SUCCESS)
}

/// The measurements in files; repeated measurements are merged.
fn read_all(files: &[PathBuf]) -> anyhow::Result<Vec<Measurement>> {
    let all = files.iter().map(|path| log::read(path)).collect::<anyhow::Result<Vec<_>>>()?;
    Ok(record::merged(all.concat()))
}

/// Compares two files. It succeeds if nothing is worse.
fn compare(args: &args::CompareArgs) -> anyhow::Result<ExitCode> {
    let (old, new) = (log::read(&args.old)?, log::read(&args.new)?);
    let least = args.least.max(0.0) / 100.0;
    let options = compare::Options { least, relative_to: args.relative_to.clone(), all: args.all };
    let differences = compare::compare(&old, &new, &options)?;
    if args.json {
        println!("{}", serde_json::to_string(&differences)?);
    } else {
        print!("{}", compare::text(&old, &new, &options, &differences)?);
    }
    let worse = differences.iter().any(|d| d.verdict == compare::Verdict::Worse);
    Ok(if worse { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn report(args: &args::ReportArgs) -> anyhow::Result<ExitCode> {
    let page = report::page(&args.title, &read_all(&args.files)?)?;
    std::fs::write(&args.output, page).with_context(|| format!("cannot write {}", args.output.display()))?;
    Ok(ExitCode::SUCCESS)
}
