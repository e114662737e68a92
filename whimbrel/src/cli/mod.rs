//! The program's commands: one file each, and what they share.

pub mod args;
mod arrivals;
mod choice;
pub mod config;
mod demo;
mod doctor;
mod evacuate;
mod events;
mod fleet;
mod history;
mod host;
mod list;
mod man;
mod migrate;
mod pki;
mod place;
mod process;
mod progress;
mod receive;
mod render;
mod run;
mod stop;
mod terminal;

use anyhow::Context;
use args::{Cli, Command, Target};
use choice::Api;
use clap::CommandFactory;
use hyper::Method;
use migration::monitor::Phase;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::io::Write;
use std::process::ExitCode;
use whimbrel::api;
use whimbrel::api::client::Client;
use whimbrel::api::model::{Arrival, Migration, MigrationChange, Vm, VmState};
use whimbrel::host::run_dir::NotHere;

/// How a command ends, if it does not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    Done,
    Failed,
    /// The migration failed; the guest continues to run at the source.
    Stayed,
    /// The guest is held paused.
    Held,
    /// The guest crashed.
    Crashed,
    /// Whether the guest has moved is not known here.
    Unknown,
    /// No guest runs here.
    Elsewhere,
    /// Nobody answers on the API's socket.
    Unreachable,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        ExitCode::from(match exit {
            Exit::Done => 0,
            Exit::Failed => 1,
            Exit::Stayed => 3,
            Exit::Held => 4,
            Exit::Crashed => 5,
            Exit::Unknown => 6,
            Exit::Elsewhere => 7,
            Exit::Unreachable => 8,
        })
    }
}

/// Carries out the command line.
pub fn run(cli: Cli) -> ExitCode {
    let result = match cli.command {
        Command::Run(args) => run::run(args),
        Command::Receive(args) => receive::receive(args),
        Command::Host(args) => host::host(&args),
        Command::Units => host::units(),
        Command::Drain(args) => host::drain(&args),
        Command::Start(args) => host::start(&args),
        Command::Migrate(args) => migrate::migrate(args),
        Command::Evacuate(args) => evacuate::evacuate(&args),
        Command::List(args) => list::list(&args),
        Command::Status(target) => status(&target),
        Command::Change(args) => {
            let downtime_limit_ms = args.downtime_limit.map(|limit| limit.as_millis() as u64);
            let bandwidth_bps = args.bandwidth;
            let what = MigrationChange { downtime_limit_ms, bandwidth_bps, ..MigrationChange::default() };
            change(&args.target, &what)
        }
        Command::SwitchNow(target) => {
            change(&target, &MigrationChange { switch_now: true, ..MigrationChange::default() })
        }
        Command::History(args) => history::history(&args),
        Command::Events(args) => events::events(&args),
        Command::Cancel(target) => send(&target, Method::DELETE, "/v1/migration"),
        Command::Pause(target) => send(&target, Method::PUT, "/v1/vm/pause"),
        Command::Resume(args) if args.force => send(&args.target, Method::PUT, "/v1/vm/resume?force=true"),
        Command::Resume(args) => send(&args.target, Method::PUT, "/v1/vm/resume"),
        Command::Shutdown(target) => send(&target, Method::PUT, "/v1/vm/shutdown"),
        Command::Stop(args) => stop::stop(&args),
        Command::Quit(target) => send(&target, Method::PUT, "/v1/vm/quit"),
        Command::Doctor(args) => doctor::doctor(&args),
        Command::Demo(args) => demo::demo(&args),
        Command::Pki(args) => pki::pki(args),
        Command::Fleet(args) => fleet::fleet(args),
        Command::OpenApi { api: Api::Machine } => say(api::server::document()).map(|()| Exit::Done),
        Command::OpenApi { api: Api::Host } => say(whimbrel::host::server::document()).map(|()| Exit::Done),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "whimbrel", &mut std::io::stdout());
            Ok(Exit::Done)
        }
        Command::Man { folder } => man::man(&folder),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(error) => {
            eprintln!("whimbrel: {}", story(&error));
            let nobody = matches!(
                error.downcast_ref(),
                Some(api::Error::Connect { .. } | api::Error::Unreachable { .. })
            ) || error.is::<NotHere>();
            if nobody { Exit::Unreachable.into() } else { Exit::Failed.into() }
        }
    }
}

/// Prints a command's answer. A reader that has gone is no error: the exit code still tells the rest.
fn say(answer: impl std::fmt::Display) -> anyhow::Result<()> {
    match writeln!(std::io::stdout(), "{answer}") {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write to standard output")
        }
        _ => Ok(()),
    }
}

/// An error with its causes, each told once: most of our errors name their cause themselves.
fn story(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
    }
    text
}

fn status(target: &Target) -> anyhow::Result<Exit> {
    let client = Client::new(&target.socket()?)?;
    let vm: Vm = client.get("/v1/vm")?;
    let migration: Option<Migration> = if_any(&client, "/v1/migration")?;
    let arrival: Option<Arrival> = if_any(&client, "/v1/arrival")?;
    let exit = whose(&vm, migration.as_ref());
    if target.json {
        let migration = migration.map(|m| render::with_testimony(&m)).transpose()?;
        say(serde_json::json!({ "vm": vm, "migration": migration, "arrival": arrival }))?;
    } else {
        say(render::vm(&vm))?;
        if let Some(migration) = migration {
            say(render::migration(&migration))?;
        }
        if let Some(arrival) = arrival {
            say(render::arrival(&arrival))?;
        }
    }
    Ok(exit)
}

/// What there is to be told, if there is anything.
fn if_any<A: DeserializeOwned>(client: &Client, path: &str) -> anyhow::Result<Option<A>> {
    match client.get(path) {
        Ok(answer) => Ok(Some(answer)),
        Err(api::Error::Refused(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whose the guest is, as the exit code of `status`.
fn whose(vm: &Vm, migration: Option<&Migration>) -> Exit {
    match vm.state {
        // From here to the destination's word it is the same as held.
        VmState::Migrating if migration.is_some_and(|m| m.progress.phase == Phase::Committed) => Exit::Held,
        VmState::Running | VmState::Paused | VmState::Migrating => Exit::Done,
        VmState::Held => Exit::Held,
        VmState::Waiting | VmState::Receiving | VmState::Moved | VmState::Ended => Exit::Elsewhere,
    }
}

fn change(target: &Target, change: &MigrationChange) -> anyhow::Result<Exit> {
    ask(target, Method::PATCH, "/v1/migration", change)
}

/// A request that needs no words.
fn send(target: &Target, method: Method, path: &str) -> anyhow::Result<Exit> {
    ask(target, method, path, &())
}

/// A request whose answer matters only to programs.
fn ask(target: &Target, method: Method, path: &str, body: &impl Serialize) -> anyhow::Result<Exit> {
    let answer: Value = Client::new(&target.socket()?)?.call(method, path, body)?;
    if target.json {
        say(answer)?;
    }
    Ok(Exit::Done)
}
