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
mod warm;

use anyhow::Context;
use args::{Cli, Command, CommonArgs};
use clap::Parser;
use plan::Plan;
use record::Log;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Blackout(args) => presets::blackout(&args).and_then(|plan| measure(&plan, &args.common)),
        Command::Untouched(args) => presets::untouched(&args).and_then(|plan| measure(&plan, &args.common)),
        Command::Throughput(args) => presets::throughput(&args).and_then(|plan| measure(&plan, &args.common)),
        Command::Matrix(args) => presets::matrix(&args).and_then(|plan| measure(&plan, &args.common)),
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
fn measure(plan: &Plan, args: &CommonArgs) -> anyhow::Result<ExitCode> {
    let mut log = Log::open(args.json, args.save.as_deref())?;
    let measured = plan.carry_out(&mut log, &interruption()?)?;
    if !args.json {
        print!("{}", summary::text(&measured));
    }
    let failed = measured.runs.iter().any(|run| run.failure.is_some());
    let interrupted = measured.end.as_ref().is_some_and(|end| end.interrupted);
    Ok(if failed || interrupted { ExitCode::FAILURE } else { ExitCode::SUCCESS })
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
    for path in &args.files {
        for measured in record::read(path)? {
            println!("{}", summary::text(&measured));
        }
    }
    Ok(ExitCode::SUCCESS)
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
    let files = args.files.iter().map(|path| record::read(path)).collect::<anyhow::Result<Vec<_>>>()?;
    let page = report::page(&args.title, &files.concat())?;
    std::fs::write(&args.output, page).with_context(|| format!("cannot write {}", args.output.display()))?;
    Ok(ExitCode::SUCCESS)
}
