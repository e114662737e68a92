//! One running virtual machine as its operators see it: its state, and at most one migration.

use crate::api::model::{Migration, MigrationRequest, Vm, VmState};
use crate::transports;
use crossbeam_channel::{Receiver, Sender, bounded};
use migration::monitor::{Monitor, Phase};
use migration::report::{Report, Verdict};
use migration::source::{Options, Timeouts};
use migration::transport::Token;
use migration::{Code, Failure};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use vmm::guest;
use vmm::{Machine, Outcome};

/// Name and version, as told to peers.
pub const SOFTWARE: &str = concat!("whimbrel ", env!("CARGO_PKG_VERSION"));

/// How long a machine that is told to quit waits for its migration to be called off.
const QUIT_PATIENCE: Duration = Duration::from_secs(5);

/// Why an instance's process may end.
#[derive(Clone, Debug, PartialEq)]
pub enum End {
    /// The guest ended, or the machine was stopped.
    Guest(Outcome),
    /// The guest runs elsewhere.
    Moved,
    /// An operator wants the process to end.
    Quit,
}

/// What an operator or a migration has done to the machine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hold {
    None,
    Paused,
    Held,
    Moved,
}

struct Attempt {
    number: u64,
    to: String,
    monitor: Arc<Monitor>,
    report: Option<Report>,
    thread: Option<JoinHandle<()>>,
}

struct Inner {
    hold: Hold,
    attempt: Option<Attempt>,
}

/// A machine and what is being done with it.
pub struct Instance {
    name: String,
    machine: Arc<Machine>,
    inner: Mutex<Inner>,
    ends: (Sender<End>, Receiver<End>),
    report_seen: AtomicBool,
}

fn busy(message: &str) -> Failure {
    Failure::new(Code::BUSY, message)
}

impl Instance {
    /// An instance of a machine that runs.
    ///
    /// # Errors
    /// When no thread can be started to watch it.
    pub fn new(name: String, machine: Arc<Machine>) -> Result<Arc<Self>, Failure> {
        let inner = Inner { hold: Hold::None, attempt: None };
        // One place for each way to end: none is ever lost, and nobody waits to report one.
        let ends = bounded(3);
        let instance = Arc::new(Instance {
            name,
            machine: Arc::clone(&machine),
            inner: Mutex::new(inner),
            ends,
            report_seen: AtomicBool::new(false),
        });
        let guest_ended = instance.ends.0.clone();
        thread::Builder::new()
            .name("watch".into())
            .spawn(move || {
                let _ = guest_ended.try_send(End::Guest(machine.wait()));
            })
            .map_err(|e| Failure::new(Code::HOST, format_args!("cannot start a thread: {e}")))?;
        Ok(instance)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Waits until the process has nothing left to do.
    pub fn wait(&self) -> End {
        self.ends.1.recv().unwrap_or(End::Quit)
    }

    /// What it is doing.
    pub fn status(&self) -> Vm {
        let inner = self.lock();
        let migrating = inner.attempt.as_ref().is_some_and(|a| a.report.is_none());
        let state = match inner.hold {
            Hold::Moved => VmState::Moved,
            Hold::Held => VmState::Held,
            _ if self.machine.outcome().is_some() => VmState::Ended,
            _ if migrating => VmState::Migrating,
            Hold::Paused => VmState::Paused,
            Hold::None => VmState::Running,
        };
        let guest = match inner.hold {
            Hold::Moved => None,
            _ => guest::testimony(self.machine.memory()),
        };
        Vm {
            name: self.name.clone(),
            state,
            memory: self.machine.config().memory,
            vcpus: self.machine.config().vcpus,
            pid: std::process::id(),
            guest,
        }
    }

    /// Pauses the guest.
    ///
    /// # Errors
    /// While it is being moved, or has gone.
    pub fn pause(&self) -> Result<(), Failure> {
        let mut inner = self.lock();
        inner.refuse_unless_ours()?;
        self.machine.pause()?;
        if inner.hold == Hold::None {
            inner.hold = Hold::Paused;
        }
        Ok(())
    }

    /// Lets a paused guest run on; a held one only by `force`.
    ///
    /// # Errors
    /// While it is being moved, has gone, or is held and `force` is not given.
    pub fn resume(&self, force: bool) -> Result<(), Failure> {
        let mut inner = self.lock();
        inner.refuse_unless_ours()?;
        if inner.hold == Hold::Held && !force {
            return Err(busy(
                "the guest was handed over and may run at the destination; make sure that it does not, then force",
            ));
        }
        self.machine.resume()?;
        inner.hold = Hold::None;
        Ok(())
    }

    /// Presses the guest's power button: whether and when it shuts down is its own business.
    ///
    /// # Errors
    /// While it is being moved, does not run, or does not listen to the button.
    pub fn shutdown(&self) -> Result<(), Failure> {
        let inner = self.lock();
        inner.refuse_unless_ours()?;
        if inner.hold != Hold::None {
            return Err(busy("the guest is paused and would not notice; resume it first"));
        }
        if self.machine.press_power_button() {
            Ok(())
        } else {
            Err(busy("the guest does not listen to its power button; `whimbrel quit` ends it all the same"))
        }
    }

    /// Calls a migration off, stops the machine and ends the process.
    pub fn quit(&self) {
        let thread = {
            let mut inner = self.lock();
            inner.attempt.as_mut().and_then(|attempt| {
                attempt.monitor.cancel();
                attempt.thread.take()
            })
        };
        if let Some(thread) = thread {
            let deadline = std::time::Instant::now() + QUIT_PATIENCE;
            while !thread.is_finished() && std::time::Instant::now() < deadline {
                thread::sleep(Duration::from_millis(10));
            }
        }
        let _ = self.ends.0.try_send(End::Quit);
    }

    /// Starts to move the guest away.
    ///
    /// # Errors
    /// [`Code::BUSY`] when it is already moving, paused or held.
    pub fn migrate(self: Arc<Self>, request: MigrationRequest) -> Result<Migration, Failure> {
        let token = Token::random()
            .map_err(|e| Failure::new(Code::HOST, format_args!("the kernel has no random numbers: {e}")))?;
        let mut inner = self.lock();
        inner.refuse_unless_ours()?;
        match inner.hold {
            Hold::None => {}
            Hold::Paused => return Err(busy("the guest is paused; resume it first")),
            _ => return Err(busy("the guest is held; decide about it first")),
        }
        if let Some(outcome) = self.machine.outcome() {
            return Err(Failure::new(Code::GUEST_ENDED, outcome));
        }
        let number = inner.attempt.as_ref().map_or(1, |a| a.number + 1);
        let monitor = Arc::new(Monitor::default());
        let to = request.to.clone();
        let mover = Arc::clone(&self);
        let watched = Arc::clone(&monitor);
        let thread = thread::Builder::new()
            .name("migration".into())
            .spawn(move || mover.move_away(&request, token, &watched))
            .map_err(|e| Failure::new(Code::HOST, format_args!("cannot start a thread: {e}")))?;
        let attempt = Attempt { number, to, monitor, report: None, thread: Some(thread) };
        let started = attempt.view();
        inner.attempt = Some(attempt);
        Ok(started)
    }

    /// The migration that is under way, or the last one.
    pub fn migration(&self) -> Option<Migration> {
        let inner = self.lock();
        let view = inner.attempt.as_ref().map(Attempt::view)?;
        if view.report.is_some() {
            self.report_seen.store(true, Ordering::Release);
        }
        Some(view)
    }

    /// Whether somebody has been told how the last migration ended.
    pub fn report_seen(&self) -> bool {
        self.report_seen.load(Ordering::Acquire)
    }

    /// Calls the migration off; it may already be too late.
    ///
    /// # Errors
    /// When none is under way.
    pub fn cancel(&self) -> Result<Migration, Failure> {
        let inner = self.lock();
        match &inner.attempt {
            Some(attempt) if attempt.report.is_none() => {
                if attempt.monitor.progress().phase == Phase::Committed {
                    return Err(busy("too late: the guest has been handed over"));
                }
                attempt.monitor.cancel();
                Ok(attempt.view())
            }
            _ => Err(busy("no migration is under way")),
        }
    }

    fn move_away(&self, request: &MigrationRequest, token: Token, monitor: &Monitor) {
        let report = match self.attempt(request, token, monitor) {
            Ok(report) => report,
            Err(failure) => {
                monitor.end(Phase::Stayed);
                Report::not_begun(failure, self.machine.config().memory)
            }
        };
        let moved = report.verdict == Verdict::Moved;
        let mut inner = self.lock();
        inner.hold = match report.verdict {
            Verdict::Moved => Hold::Moved,
            Verdict::Held => Hold::Held,
            Verdict::Stayed => inner.hold,
        };
        if let Some(attempt) = &mut inner.attempt {
            attempt.report = Some(report);
        }
        self.report_seen.store(false, Ordering::Release);
        drop(inner);
        if moved {
            let _ = self.ends.0.try_send(End::Moved);
            // Its vCPUs are parked for good; nothing but the report is left of it here.
            self.machine.stop();
        }
    }

    fn attempt(
        &self,
        request: &MigrationRequest,
        token: Token,
        monitor: &Monitor,
    ) -> Result<Report, Failure> {
        let silence = Duration::from_secs(request.silence_s.max(1));
        transports::warm_up(request);
        let mut connection = transport_tcp::connect_control(&request.to, token, silence)?;
        let transports = transports::source(request, &connection);
        let options = Options {
            policy: request.policy(),
            timeouts: Timeouts { answer: silence, data: silence, ..Timeouts::default() },
            compare_memory: request.compare_memory,
        };
        Ok(migration::source::migrate(
            self.machine.as_ref(),
            &mut connection,
            token,
            transports,
            SOFTWARE,
            &options,
            monitor,
        ))
    }
}

impl Inner {
    fn refuse_unless_ours(&self) -> Result<(), Failure> {
        if self.hold == Hold::Moved {
            return Err(Failure::new(Code::GUEST_ENDED, "the guest runs elsewhere now"));
        }
        if self.attempt.as_ref().is_some_and(|a| a.report.is_none()) {
            return Err(busy("the guest is being moved; wait, or cancel the migration"));
        }
        Ok(())
    }
}

impl Attempt {
    fn view(&self) -> Migration {
        Migration {
            number: self.number,
            to: self.to.clone(),
            progress: self.monitor.progress(),
            report: self.report.clone(),
        }
    }
}
