//! What `run` and `receive` share: a process that holds one virtual machine until it ends.

use super::args::{OutputTarget, ProcessArgs, SerialTarget};
use super::place::Place;
use super::terminal::{self, Terminal};
use super::{Exit, render};
use migration::SAVE_TO;
use migration::report::Verdict;
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};
use vmm::machine::Notice;
use vmm::sandbox::Needs;
use vmm::serial::SerialOutput;
use vmm::virtio::LocalConfig;
use vmm::virtio::console::ConsoleConfig;
use vmm::{Machine, Outcome};
use whimbrel::api::model::{Arrival, Migration};
use whimbrel::instance::{End, Instance};
use whimbrel::record::Records;
use whimbrel::security::TlsFiles;
use whimbrel::slot::{self, Slot};

/// How long the process of a guest that has moved away stays at most for those who wait for its report, and
/// how long it stays if nobody has waited.
const LINGER: Duration = Duration::from_secs(15);

impl ProcessArgs {
    /// Where the serial port goes.
    pub fn serial(&self) -> SerialOutput {
        match &self.serial {
            SerialTarget::Stdio => SerialOutput::Stdout,
            SerialTarget::Output(target) => output(target),
        }
    }

    /// Connects the serial port to standard input, if it is to be.
    pub fn connect(&self, machine: &Machine) -> anyhow::Result<Option<Terminal>> {
        (self.serial == SerialTarget::Stdio).then(|| terminal::connect(machine.serial())).transpose()
    }

    /// What of a machine's PCI devices this process decides.
    pub fn local(&self) -> LocalConfig {
        let output = self.console.as_ref().map_or(SerialOutput::Null, output);
        let console = ConsoleConfig { output, input: self.console_input.clone() };
        LocalConfig { console, aio: self.aio, announcing: self.announce, ..LocalConfig::default() }
    }

    /// Reports what happens to a machine from here on.
    pub fn tell_notices(&self, machine: &Machine) {
        let process = self.clone();
        machine.on_notice(move |notice| match notice {
            Notice::Rebooted => {
                process.tell("rebooted", "the guest has been reset and boots again", json!({}))
            }
            Notice::DiskTrouble { why } => {
                let text = format!("the guest is paused until this is over: {why}");
                process.tell("disk-trouble", &text, json!({ "why": why }));
            }
            Notice::ClockAhead { seemed, most } => {
                let text = format!(
                    "this host's clock is ahead of the other's: by them the guest was paused {seemed:.1?} ago, in a \
                     migration that began {most:.1?} ago; its clocks went on from where they stopped; \
                     synchronise both hosts"
                );
                process.tell("clock-ahead", &text, json!({ "seemed_ms": seemed.as_millis() as u64 }));
            }
            Notice::DiskRecovered => {
                process.tell("disk-recovered", "the disk is all right, and the guest runs again", json!({}));
            }
            _ => {}
        });
    }

    /// What of this is opened after the process has confined itself. Only what is there can be allowed, so
    /// files for output are made if they are not.
    pub fn needs(&self, place: &Place) -> Needs {
        let mut needs = Needs::default();
        let serial = match &self.serial {
            SerialTarget::Output(target) => Some(target),
            SerialTarget::Stdio => None,
        };
        for target in [serial, self.console.as_ref()].into_iter().flatten() {
            let OutputTarget::File(path) = target else { continue };
            if !path.exists() {
                // If that fails, so does the machine, and says so.
                let _ = OpenOptions::new().append(true).create(true).open(path);
            }
            needs.write.push(path.clone());
        }
        // A pipe is opened for both.
        needs.write.extend(self.console_input.clone());
        needs.sockets.extend(place.folder());
        needs.make.extend(std::env::var_os(SAVE_TO).map(PathBuf::from));
        needs.read.extend(self.security.files().iter().flat_map(TlsFiles::folders));
        needs
    }

    /// Reports an event: to programs as a line of JSON on standard output, to people on standard
    /// error.
    pub fn tell(&self, event: &str, text: &str, mut details: Value) {
        if self.json {
            if let Value::Object(map) = &mut details {
                map.insert("event".into(), event.into());
            }
            // A closed pipe must not take the guest down.
            let _ = writeln!(std::io::stdout(), "{details}");
        } else {
            eprintln!("whimbrel: {text}");
        }
    }
}

/// Where what became of each move is told and kept.
#[derive(Clone)]
pub struct Keeper {
    process: ProcessArgs,
    file: Option<Arc<Records>>,
}

impl Keeper {
    /// Opens the file, if one is named.
    pub fn new(process: &ProcessArgs) -> anyhow::Result<Self> {
        let file = process.record.as_deref().map(Records::open).transpose()?.map(Arc::new);
        Ok(Keeper { process: process.clone(), file })
    }

    /// A migration from here is over.
    pub fn migration(&self, name: &str, migration: &Migration) {
        let event = match migration.report.as_ref().map(|report| report.verdict) {
            Some(Verdict::Moved) => "moved",
            Some(Verdict::Stayed) => "stayed",
            _ => "held",
        };
        // What cannot be told as it is to be read is told as it is.
        let whole = render::with_testimony(migration).unwrap_or_else(|_| json!(migration));
        let record = record(name, "migration", &whole);
        self.process.tell(event, &render::migration(migration), record.clone());
        self.keep(&record);
    }

    /// A guest that came here has arrived, or was not taken in.
    pub fn arrival(&self, name: &str, arrival: &Arrival) {
        self.keep(&record(name, "arrival", &json!(arrival)));
    }

    fn keep(&self, record: &Value) {
        // The guest is where it is, whether or not that can be written down.
        if let Some(Err(error)) = self.file.as_ref().map(|file| file.add(record)) {
            eprintln!("whimbrel: {error}");
        }
    }
}

fn record(name: &str, what: &str, whole: &Value) -> Value {
    json!({ "at": slot::now(), "name": name, "pid": std::process::id(), what: whole })
}

fn output(target: &OutputTarget) -> SerialOutput {
    match target {
        OutputTarget::Stdout => SerialOutput::Stdout,
        OutputTarget::None => SerialOutput::Null,
        OutputTarget::File(path) => SerialOutput::File(path.clone()),
    }
}

/// How long a guest may take to shut down after SIGTERM: less than a service manager waits (systemd: 90 s).
const SHUTDOWN_PATIENCE: Duration = Duration::from_secs(60);

/// Handles signals. SIGTERM presses the power button of a guest that listens to it, and quits if the guest
/// has not shut down in time. SIGTERM quits at once if the guest does not listen or is being moved; so do
/// SIGINT and any further signal. Without a guest, the process exits.
pub fn quit_on_signals(slot: &Arc<Slot>) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let slot = Arc::clone(slot);
    thread::Builder::new().name("signals".into()).spawn(move || {
        let mut pressed = false;
        for signal in signals.forever() {
            let Some(instance) = slot.get() else {
                terminal::restore();
                std::process::exit(128 + signal)
            };
            if signal == SIGTERM && !pressed && instance.shutdown().is_ok() {
                pressed = true;
                let instance = Arc::clone(instance);
                let patience = move || {
                    thread::sleep(SHUTDOWN_PATIENCE);
                    instance.quit();
                };
                if thread::Builder::new().name("shutdown".into()).spawn(patience).is_ok() {
                    continue;
                }
            }
            instance.quit();
        }
    })?;
    Ok(())
}

/// How long the reader of the guest's output may take to read the rest of it.
const DRAIN_PATIENCE: Duration = Duration::from_secs(1);

/// Waits until the machine's process has nothing left to do.
pub fn stay(args: &ProcessArgs, instance: &Instance) -> Exit {
    let end = instance.wait();
    let lost = instance.machine().drain_output(DRAIN_PATIENCE);
    if lost > 0 {
        let text =
            format!("{lost} bytes of the guest's output were dropped, because their reader did not keep up");
        args.tell("output-lost", &text, json!({ "bytes": lost }));
    }
    match end {
        End::Guest(outcome) => {
            let exit = match outcome {
                Outcome::PoweredOff | Outcome::Reset | Outcome::Stopped => Exit::Done,
                Outcome::Crashed(_) => Exit::Crashed,
            };
            args.tell("ended", &outcome.to_string(), json!({ "how": outcome }));
            exit
        }
        End::Moved => {
            let deadline = Instant::now() + LINGER;
            while instance.report_awaited() && Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
            Exit::Done
        }
        End::Quit => {
            args.tell("quit", "told to quit", json!({}));
            Exit::Done
        }
    }
}
