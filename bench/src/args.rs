//! The command line.

use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use std::path::PathBuf;

/// Measures migrations between real processes on this machine.
#[derive(Debug, Parser)]
#[command(name = "whimbrel-bench", version, about, max_term_width = 110)]
pub struct Cli {
    /// Print every run and its summary as one JSON object
    #[arg(long, global = true)]
    pub json: bool,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// How long a guest is away when it moves, by its own clock and by the source's
    Blackout(BlackoutArgs),
    /// How fast a guest moves that has touched next to nothing of its memory
    Untouched(UntouchedArgs),
    /// How fast memory full of random content moves, beside iperf3 and QEMU in the same run
    Throughput(ThroughputArgs),
}

/// The program that is measured.
#[derive(Args, Clone, Debug)]
pub struct ProgramArgs {
    /// The whimbrel program; without it, the one beside this program
    #[arg(long)]
    pub whimbrel: Option<PathBuf>,
}

impl ProgramArgs {
    /// The program's path.
    ///
    /// # Errors
    /// When there is no such file.
    pub fn path(&self) -> anyhow::Result<PathBuf> {
        let path = match &self.whimbrel {
            Some(path) => path.clone(),
            None => std::env::current_exe()
                .context("cannot find this program's own file")?
                .with_file_name("whimbrel"),
        };
        anyhow::ensure!(
            path.is_file(),
            "there is no program {}; build it (cargo build --release --bin whimbrel) or name one with --whimbrel",
            path.display()
        );
        Ok(path)
    }
}

#[derive(Args, Debug)]
pub struct BlackoutArgs {
    #[command(flatten)]
    pub program: ProgramArgs,
    /// Guest memory
    #[arg(long, short = 'm', default_value = "1G", value_parser = size)]
    pub memory: u64,
    /// Virtual CPUs
    #[arg(long, short = 'c', default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub vcpus: u32,
    /// Memory that the guest keeps rewriting while it moves; 0 for an idle guest
    #[arg(long, default_value = "0", value_parser = size)]
    pub working_set: u64,
    /// Moves, each of a fresh guest
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
}

#[derive(Args, Debug)]
pub struct UntouchedArgs {
    #[command(flatten)]
    pub program: ProgramArgs,
    /// Guest memory
    #[arg(long, short = 'm', default_value = "8G", value_parser = size)]
    pub memory: u64,
    /// Moves, each of a fresh guest
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
}

#[derive(Args, Debug)]
pub struct ThroughputArgs {
    #[command(flatten)]
    pub program: ProgramArgs,
    /// A second whimbrel program, measured in turn with the first
    #[arg(long)]
    pub against: Option<PathBuf>,
    /// Guest memory, filled with random content
    #[arg(long, short = 'm', default_value = "4G", value_parser = size)]
    pub memory: u64,
    /// Populate the destination's memory before the clock starts
    #[arg(long)]
    pub populate: bool,
    /// TCP streams, several for a comparison; 0 for the default
    #[arg(long, value_delimiter = ',', default_value = "0", value_parser = clap::value_parser!(u16).range(0..=64))]
    pub streams: Vec<u16>,
    /// Rounds, each with one run of everything that is compared
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    pub rounds: u32,
    /// Run iperf3 with zero copy over loopback in every round
    #[arg(long)]
    pub iperf3: bool,
    /// A script that migrates a QEMU guest and prints one line of JSON, run in every round
    #[arg(long)]
    pub qemu_script: Option<PathBuf>,
    /// Its multifd channels; without it, 2 when the destination is populated, else 4
    #[arg(long, value_delimiter = ',', requires = "qemu_script")]
    pub multifd: Vec<u16>,
    /// Do not touch and free as much memory as a run needs before each run
    #[arg(long)]
    pub no_warm_up: bool,
}

/// A size in bytes; K, M, G and T are powers of 1024.
fn size(text: &str) -> Result<u64, String> {
    let config = parse_size::Config::new().with_binary();
    config.parse_size(text).map_err(|e| format!("{e}; write a size such as 512M or 4G"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn lists_of_streams_are_read() {
        let cli =
            Cli::try_parse_from(["whimbrel-bench", "throughput", "--streams", "1,2,4", "--json"]).unwrap();
        assert!(cli.json);
        let Command::Throughput(args) = cli.command else { panic!("another command") };
        assert_eq!((args.streams, args.memory), (vec![1, 2, 4], 4 << 30));
        assert!(Cli::try_parse_from(["whimbrel-bench", "throughput", "--streams", "65"]).is_err());
    }
}
