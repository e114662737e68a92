//! `whimbrel evacuate`: moves all machines of a host away.
//!
//! Nothing is kept between two runs: what is still here is moved by the next one, and a migration that is
//! under way by then is waited for.

mod summary;

use super::args::EvacuateArgs;
use super::migrate::request;
use super::progress::{self, Ask, watch};
use super::{Exit, say};
use anyhow::Context;
use hyper::Method;
use indicatif::MultiProgress;
use migration::report::Verdict;
use migration::{Code, Failure};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use summary::{Outcome, Story, Summary, Try};
use whimbrel::api;
use whimbrel::api::client::Client;
use whimbrel::api::model::{Migration, VmState};
use whimbrel::host::evacuation::{Answer, Next, Schedule, Task};
use whimbrel::host::inventory::{self, Listed};

/// How long a machine may take to say what it is doing, which decides whether it is moved.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long a guest waits that all hosts were too busy for, until it is offered to them again.
const BUSY: Duration = Duration::from_millis(500);

/// How often migrations that are to be called off are told so: one may be just about to begin.
const CANCELLING: Duration = Duration::from_millis(100);

pub fn evacuate(args: &EvacuateArgs) -> anyhow::Result<Exit> {
    let began = Instant::now();
    let run = args.host.run_dir();
    let look = || {
        inventory::take(&run, PATIENCE)
            .with_context(|| format!("cannot look at {}", run.machines_folder().display()))
    };
    let evacuation = Arc::new(Evacuation {
        hosts: args.to.clone(),
        called_off: AtomicBool::new(false),
        under_way: Mutex::default(),
        bars: MultiProgress::new(),
        tells: !args.json,
    });
    call_off_on_signals(&evacuation)?;
    let mut stories: Vec<Story> = Vec::new();
    // By name and process: a guest may come back meanwhile.
    let mut known: HashSet<(String, u32)> = HashSet::new();
    // What comes here meanwhile is moved as well, if it is here by then.
    let left = loop {
        let present = look()?;
        let is_new = |machine: &&Listed| match &machine.vm {
            Some(vm) => known.insert((machine.name.clone(), vm.pid)),
            None => {
                !known.iter().any(|(name, _)| *name == machine.name)
                    && known.insert((machine.name.clone(), 0))
            }
        };
        let new: Vec<_> = present.iter().filter(|machine| is_here(machine)).filter(is_new).cloned().collect();
        if new.is_empty() || evacuation.is_called_off() {
            stories.extend(new.into_iter().map(|machine| Story::new(machine).ends(Outcome::Stayed)));
            break present.into_iter().filter(is_here).map(|machine| machine.name).collect();
        }
        stories.extend(evacuation.pass(new, args));
    };
    let summary = Summary { stories, left, elapsed: began.elapsed() };
    if args.json {
        say(summary.json()?)?
    } else {
        say(summary.text())?
    }
    Ok(summary.exit())
}

/// Whether a guest is here, or comes here, or nobody can tell.
fn is_here(machine: &Listed) -> bool {
    !matches!(machine.state(), Some(VmState::Waiting | VmState::Moved | VmState::Ended))
}

/// What the threads that move guests share.
struct Evacuation {
    hosts: Vec<String>,
    called_off: AtomicBool,
    /// The sockets of the machines that are being moved, by their names.
    under_way: Mutex<BTreeMap<String, PathBuf>>,
    bars: MultiProgress,
    /// Whether what happens is told as it happens.
    tells: bool,
}

/// Whatever panicked while it held one of these has left it whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Evacuation {
    fn is_called_off(&self) -> bool {
        self.called_off.load(Ordering::Acquire)
    }

    /// Tells what happened, above the progress bars. Standard error is not buffered.
    fn tell(&self, text: std::fmt::Arguments<'_>) {
        if self.tells {
            self.bars.suspend(|| eprintln!("whimbrel: {text}"));
        }
    }

    /// Moves these machines, as far as possible.
    fn pass(&self, machines: Vec<Listed>, args: &EvacuateArgs) -> Vec<Story> {
        let (movable, others): (Vec<_>, Vec<_>) = machines.into_iter().partition(|machine| {
            matches!(machine.state(), Some(VmState::Running | VmState::Paused | VmState::Migrating))
        });
        let mut stories: Vec<_> = others.into_iter().map(summary::left).collect();
        for story in &stories {
            self.tell(format_args!("{story}"));
        }
        let memory = movable.iter().map(|machine| machine.vm.as_ref().map_or(0, |vm| vm.memory));
        let schedule = Mutex::new(Schedule::new(memory, self.hosts.len()));
        let moves: Vec<_> = movable.into_iter().map(|machine| Mutex::new(Story::new(machine))).collect();
        thread::scope(|scope| {
            for _ in 0..args.parallel.min(moves.len()) {
                scope.spawn(|| self.work(&schedule, &moves, args));
            }
        });
        stories.extend(
            moves.into_iter().map(|story| story.into_inner().unwrap_or_else(PoisonError::into_inner)),
        );
        stories
    }

    /// Moves one machine after the other until none is waiting.
    fn work(&self, schedule: &Mutex<Schedule>, stories: &[Mutex<Story>], args: &EvacuateArgs) {
        loop {
            let Some(mut task) = lock(schedule).next_task() else { return };
            let mut story = lock(&stories[task.guest]);
            if task.put_off > 0 {
                self.pause(BUSY);
            }
            loop {
                let answer = self.attempt(&mut story, &task, args);
                // Whoever is put off may be taken by another thread at once, and waits there for the story.
                match lock(schedule).answered(task, answer) {
                    Next::Elsewhere(next) => task = next,
                    Next::Later => break,
                    Next::Done => {
                        self.tell(format_args!("{story}"));
                        break;
                    }
                }
            }
        }
    }

    fn pause(&self, time: Duration) {
        let until = Instant::now() + time;
        while !self.is_called_off() && Instant::now() < until {
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Offers a guest to a host, or waits for a migration that somebody else has begun.
    fn attempt(&self, story: &mut Story, task: &Task, args: &EvacuateArgs) -> Answer {
        let (name, socket) = (story.name.clone(), story.socket.clone());
        let host = &self.hosts[task.host];
        let bar = self.bars.add(progress::bar());
        lock(&self.under_way).insert(name.clone(), socket.clone());
        let begun = (|| {
            if std::mem::take(&mut story.migrating) {
                let followed = watch(&socket, Ask::Follow, &bar, &name)?;
                if followed.report.as_ref().is_some_and(|report| report.verdict != Verdict::Stayed) {
                    return Ok(followed);
                }
            }
            // Only now: whoever calls off from here on finds this machine among those that are under way.
            if self.is_called_off() {
                let why = Failure::new(Code::CANCELLED, "the evacuation was called off");
                return Err(api::Error::Refused(why));
            }
            let request = request(host, &args.policy, &args.security);
            watch(&socket, Ask::Begin(Box::new(request)), &bar, &name)
        })();
        lock(&self.under_way).remove(&name);
        bar.finish_and_clear();
        self.bars.remove(&bar);
        match begun {
            Ok(migration) => self.ended(story, host, migration),
            Err(error) => {
                story.outcome = match &error {
                    api::Error::Http(_) | api::Error::Silent(_) => Outcome::Unknown,
                    // It ended before it could be moved.
                    api::Error::Connect { .. } => Outcome::Ended,
                    api::Error::Refused(why) if why.code == Code::GUEST_ENDED => Outcome::Ended,
                    _ => Outcome::Stayed,
                };
                let why = match error {
                    api::Error::Refused(why) => why,
                    other => Failure::new(Code::OTHER, other),
                };
                story.tries.push(Try { to: host.clone(), why: Some(why) });
                Answer::Settled
            }
        }
    }

    /// A migration is over.
    fn ended(&self, story: &mut Story, host: &str, migration: Migration) -> Answer {
        let report = migration.report.as_ref();
        let answer = report.map_or(Answer::Settled, Answer::of);
        story.outcome = match report.map(|report| report.verdict) {
            Some(Verdict::Moved) => Outcome::Moved,
            Some(Verdict::Stayed) => Outcome::Stayed,
            _ => Outcome::Held,
        };
        let why = report.and_then(|report| report.failure.clone());
        if let (Answer::Refused | Answer::Unreachable, Some(why)) = (answer, &why) {
            self.tell(format_args!("{} is not taken by {host}: {why}", story.name));
        }
        story.tries.push(Try { to: migration.to.clone(), why });
        story.migration = Some(migration);
        if self.is_called_off() { Answer::Settled } else { answer }
    }
}

/// SIGINT and SIGTERM call off what may be called off; once more, and the rest is left to itself.
fn call_off_on_signals(evacuation: &Arc<Evacuation>) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM])?;
    let evacuation = Arc::clone(evacuation);
    thread::Builder::new().name("signals".into()).spawn(move || {
        for signal in signals.forever() {
            if evacuation.called_off.swap(true, Ordering::AcqRel) {
                let names: Vec<_> = lock(&evacuation.under_way).keys().cloned().collect();
                evacuation.bars.suspend(|| {
                    eprintln!(
                        "whimbrel: left, while these are still being moved: {}. `whimbrel list` shows them",
                        names.join(", ")
                    );
                });
                std::process::exit(128 + signal);
            }
            evacuation
                .tell(format_args!("called off; waiting for the moves under way. Once more leaves them"));
            let evacuation = Arc::clone(&evacuation);
            let cancelling = move || {
                loop {
                    let under_way = lock(&evacuation.under_way).clone();
                    for socket in under_way.values() {
                        // Whatever it answers: it may be too late, or not yet time.
                        let client = Client::new(socket);
                        let _ = client.map(|client| {
                            client.call::<serde_json::Value>(Method::DELETE, "/v1/migration", &())
                        });
                    }
                    thread::sleep(CANCELLING);
                }
            };
            // Without it the moves go on to their end, and no further one begins.
            let _ = thread::Builder::new().name("cancelling".into()).spawn(cancelling);
        }
    })?;
    Ok(())
}
