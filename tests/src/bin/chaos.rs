//! Chaos: many moves in which things go wrong. `ci/chaos` builds this and runs it.

use anyhow::{Context, ensure};
use clap::{Args, Parser, Subcommand, ValueEnum};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use whimbrel_tests::chaos::Run;
use whimbrel_tests::chaos::cable::Place;
use whimbrel_tests::chaos::tally::Tally;
use whimbrel_tests::lab;
use whimbrel_tests::scene::{self, Scene};
use whimbrel_tests::seclusion;

/// Kills whose outcomes are told together.
const BATCH: usize = 50;

/// The file, in the folder of the first process of the namespace, that says what has been done so far.
const SUMMARY: &str = "summary";

/// Bytes of the file system for disks in the lab.
const STORAGE: u64 = 64 << 20;

/// Moves guests between two hosts while things go wrong, and checks that no guest is lost or doubled, that
/// no disk or memory is wrong, and that what is reported is true. Ctrl-C ends it after the current move, and
/// a second Ctrl-C at once
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Job>,
    #[command(flatten)]
    moves: Moves,
    /// Only for the program itself: it is the first process of a namespace, and this is its folder
    #[arg(long, hide = true, global = true)]
    inside: Option<PathBuf>,
}

#[derive(Subcommand)]
enum Job {
    /// Kill one of the sides with `kill -9` during each move, and have the kernel say who touches the disk.
    /// WHIMBREL_SEED=N repeats the choices of fifty of them
    Kills {
        /// How many
        #[arg(long, default_value_t = 50)]
        count: usize,
    },
}

#[derive(Args)]
struct Moves {
    /// How many moves
    #[arg(long, default_value_t = 20)]
    moves: u64,
    /// Repeat the choices of another run
    #[arg(long)]
    seed: Option<u64>,
    /// The number of the first move
    #[arg(long, default_value_t = 0)]
    first: u64,
    /// Where: on this machine between network namespaces, or in the lab, with RDMA and netem
    #[arg(long = "where", value_enum, default_value = "machine")]
    place: Where,
    /// How many seconds a fault lasts at most
    #[arg(long, default_value_t = 8)]
    longest: u64,
    /// Print a summary as JSON
    #[arg(long)]
    json: bool,
    /// Where to keep what is left of a violation
    #[arg(long, default_value = "target/chaos")]
    logs: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Where {
    Machine,
    Lab,
}

fn main() -> anyhow::Result<ExitCode> {
    let cli = Cli::parse();
    match cli.inside {
        None => enclosed(),
        Some(folder) => {
            seclusion::arrive().context("/proc cannot be mounted")?;
            let good = match cli.command {
                None => moves(&cli.moves, &folder)?,
                Some(Job::Kills { count }) => kills(count, &folder)?,
            };
            let left = seclusion::others()?;
            ensure!(left.is_empty(), "processes are left over: {left:?}");
            Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

/// Has this program run once more where nothing of it is left over.
fn enclosed() -> anyhow::Result<ExitCode> {
    let program = std::env::current_exe()?;
    // Disks are where programs are built: there is a real file system, more likely than where temporary files
    // are. Paths of sockets must be short.
    let disks = tempfile::tempdir_in(program.parent().context("a program is in a folder")?)?;
    let sockets = tempfile::tempdir()?;
    let mut command = Command::new(&program);
    command.args(std::env::args_os().skip(1)).arg("--inside").arg(disks.path());
    let status = seclusion::run(command.env("TMPDIR", sockets.path()))
        .context("no namespace of processes can be made; this needs root")?;
    // However it has ended.
    if let Ok(summary) = std::fs::read_to_string(disks.path().join(SUMMARY)) {
        println!("{summary}");
    }
    Ok(status.code().map_or(ExitCode::from(130), |code| ExitCode::from(code as u8)))
}

fn moves(options: &Moves, folder: &Path) -> anyhow::Result<bool> {
    let place = if options.place == Where::Lab { Place::Lab } else { Place::Machine };
    ensure!(
        place == Place::Machine || std::env::var_os("LAB").is_some(),
        "this is not the lab; `ci/chaos --where lab` starts it"
    );
    let mut disks = folder.to_path_buf();
    if place == Place::Lab {
        let storage = disks.join("storage");
        disks = disks.join("disks");
        lab::mount_ext4(&storage, STORAGE, &disks);
    }
    let seed = options.seed.unwrap_or_else(|| fastrand::u64(..));
    let run = Run {
        seed,
        place,
        longest: Duration::from_secs(options.longest.max(1)),
        disks,
        logs: options.logs.clone(),
    };
    run.tell_once();
    let (began, mut tally) = (Instant::now(), Tally::default());
    let mut terminal = std::io::stderr();
    let shown = terminal.is_terminal();
    let asked = seclusion::asked()?;
    let keep = |tally: &Tally| {
        let took = began.elapsed();
        let text = if options.json {
            tally.json(seed, took).to_string()
        } else {
            format!("seed {seed}\n{tally}{:.0} s", took.as_secs_f64())
        };
        // Whoever reads it while it is exchanged reads a whole one.
        let next = folder.join("next");
        std::fs::write(&next, text).and_then(|()| std::fs::rename(next, folder.join(SUMMARY)))
    };
    keep(&tally)?;
    for number in options.first..options.first + options.moves {
        if asked.load(Ordering::Acquire) {
            break;
        }
        if shown {
            let (done, wrong) = (tally.moves(), tally.violations().len());
            write!(terminal, "\r{done} of {} moves, {wrong} violations ", options.moves)?;
        }
        let wrong = tally.violations().len();
        run.step(number, &mut tally)?;
        seclusion::reap();
        keep(&tally)?;
        if let Some(violation) = tally.violations().get(wrong) {
            eprintln!(
                "VIOLATION in move {number}: {}\n  repeat it with: ci/chaos --where {} --longest {} --seed {seed} --first {number} \
                 --moves 1\n  its logs are in {}",
                violation.what,
                if place == Place::Lab { "lab" } else { "machine" },
                options.longest,
                violation.logs.display()
            );
        }
    }
    if shown {
        writeln!(terminal, "\r\x1b[K")?;
    }
    Ok(tally.violations().is_empty())
}

fn kills(count: usize, disks: &Path) -> anyhow::Result<bool> {
    let (began, asked) = (Instant::now(), seclusion::asked()?);
    let batches = count.div_ceil(BATCH);
    let (mut done, mut touched) = (0, 0);
    for batch in 1..=batches {
        if asked.load(Ordering::Acquire) {
            break;
        }
        let size = count * batch / batches - done;
        touched += scene::kills("kill -9 with a disk", size, || Scene::local(disks));
        seclusion::reap();
        done += size;
        let minutes = began.elapsed().as_secs_f64() / 60.0;
        println!(
            "{done} of {count} kills in {minutes:.1} minutes, {:.1} a minute; {touched} processes had a disk, each \
             while it had its lock and none after the next",
            done as f64 / minutes
        );
    }
    Ok(true)
}
