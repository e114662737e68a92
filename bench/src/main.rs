//! `whimbrel-bench`: migrations measured between real processes, peers beside us in the same run.

mod args;
mod blackout;
mod facts;
mod moves;
mod output;
mod peers;
mod statistics;
mod throughput;
mod untouched;
mod warm;

use args::{Cli, Command};
use clap::Parser;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let json = cli.json;
    let result = match cli.command {
        Command::Blackout(args) => blackout::run(&args),
        Command::Untouched(args) => untouched::run(&args),
        Command::Throughput(args) => throughput::run(&args),
    };
    match result {
        Ok(outcome) => {
            outcome.print(json);
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("whimbrel-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
