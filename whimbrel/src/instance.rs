//! One virtual machine as its operators see it: its state, and at most one migration at a time.
//!
//! | state | the guest |
//! |---|---|
//! | running | runs here |
//! | migrating | runs here while its memory travels, and is paused here for the blackout |
//! | paused | is paused here by an operator |
//! | held | is paused here, was handed over, and may run at the destination |
//! | moved | runs at the destination; only the report is left here |
//! | ended | has powered off, crashed or been stopped |
//!
//! An instance begins *running*: its guest has just been booted here, or has just arrived. An operator may
//! pause and resume it as often as wanted. A migration begins from running or from paused (the guest then
//! arrives paused, and the instance there begins so), and as long as it lasts the
//! guest can be neither paused nor resumed from outside, so that nobody but the engine touches the machine in
//! the blackout. When the destination says that the guest runs there, the instance is *moved* and its machine
//! is stopped for good. [`Instance::wait`] then returns, and the process stays a little longer, for those who
//! wait for the report ([`Instance::report_awaited`]).
//!
//! What goes wrong leads to one of these states:
//!
//! - A migration that fails or is cancelled before the guest was handed over leads back to where it began;
//!   another may follow.
//! - If the guest was handed over and the destination falls silent, nobody here can know whether it runs
//!   there. It is *held*: only an operator, who can know, resumes it by force or ends the process.
//! - A guest that ends by itself is *ended*. A migration that is under way then fails, since nothing is left
//!   to move.
//! - A process that is told to quit calls a migration off, if that is still possible, and stops its machine
//!   whatever the state is.

use crate::api::events::Events;
use crate::api::model::{
    Event, EventKind, Migration, MigrationChange, MigrationRequest, TransportChoice, Vm, VmState,
};
use crate::security::{Encryption, Secured, Security};
use crate::transports;
use migration::monitor::{Monitor, Phase};
use migration::report::{Report, Verdict};
use migration::source::{self, Timeouts};
use migration::transport::Token;
use migration::{Code, Failure};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use tokio::sync::watch;
use transport_tcp::{Connection, Error};
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

/// What an operator or a migration has made of the guest. That it is being moved is seen by its migration,
/// which has no report yet, and that it has ended by its machine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Running,
    Paused,
    Held,
    Moved,
}

struct Attempt {
    number: u64,
    to: String,
    dry_run: bool,
    secured: Arc<OnceLock<Secured>>,
    monitor: Arc<Monitor>,
    report: Option<Report>,
    /// Tells those who wait how it ended.
    ended: watch::Sender<Option<Migration>>,
    thread: Option<JoinHandle<()>>,
}

struct Inner {
    state: State,
    /// An operator wants the process to end.
    quit: bool,
    attempt: Option<Attempt>,
}

/// A machine and what is being done with it.
pub struct Instance {
    name: String,
    machine: Arc<Machine>,
    /// Of its migrations that ask for nothing else.
    security: Security,
    inner: Mutex<Inner>,
    /// Keeps the record of a migration that is over.
    keep: Box<Keep>,
    /// How many wait for a report.
    waiting: AtomicUsize,
    /// The number of the last migration of whose end somebody who waited was told; 0 for none.
    told: AtomicU64,
    /// Where it is told what happens to it.
    events: OnceLock<Arc<Events>>,
}

/// What is done with the record of a migration that is over.
pub type Keep = dyn Fn(&Migration) + Send + Sync;

/// Somebody who waits for the report of a migration. The process stays for them.
pub struct Waiting {
    instance: Arc<Instance>,
    number: u64,
    ended: watch::Receiver<Option<Migration>>,
}

impl Waiting {
    /// The migration, once it is over.
    pub async fn report(mut self) -> Option<Migration> {
        // An error means that it has ended without a report.
        let migration = self.ended.wait_for(Option::is_some).await.ok()?.clone();
        self.instance.told.fetch_max(self.number, Ordering::AcqRel);
        migration
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.instance.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

fn busy(message: &str) -> Failure {
    Failure::new(Code::BUSY, message)
}

impl Instance {
    /// An instance of a machine that runs, or whose guest has arrived paused. `keep` is given each migration
    /// that is over, and `security` protects those that ask for nothing else. There is nothing in it that
    /// could fail: a guest that has just arrived runs nowhere else any more.
    pub fn new(
        name: String,
        machine: Arc<Machine>,
        security: Security,
        keep: impl Fn(&Migration) + Send + Sync + 'static,
    ) -> Arc<Self> {
        let state = if machine.stays_paused() { State::Paused } else { State::Running };
        Arc::new(Instance {
            name,
            machine,
            security,
            inner: Mutex::new(Inner { state, quit: false, attempt: None }),
            keep: Box::new(keep),
            waiting: AtomicUsize::new(0),
            told: AtomicU64::new(0),
            events: OnceLock::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The machine's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The machine.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// Tells what happens to it there from now on.
    pub fn tell(&self, events: &Arc<Events>) {
        let _ = self.events.set(Arc::clone(events));
        self.tell_state(&self.lock());
    }

    /// Tells what it is doing now. As long as it is locked, nobody tells it of a later moment.
    fn tell_state(&self, inner: &Inner) {
        if let Some(events) = self.events.get() {
            let trouble = self.machine.disk_trouble();
            events.add(Event::state(&self.name, self.state(inner, trouble.as_deref())));
        }
    }

    /// Waits until the process has nothing left to do. The machine has ended by then, in whatever way: it is
    /// stopped when the guest has moved, and when the process is to quit.
    pub fn wait(&self) -> End {
        let outcome = self.machine.wait();
        let inner = self.lock();
        match inner.state {
            State::Moved => End::Moved,
            _ if inner.quit => End::Quit,
            _ => End::Guest(outcome),
        }
    }

    /// What it is doing.
    pub fn status(&self) -> Vm {
        let inner = self.lock();
        let trouble = self.machine.disk_trouble();
        let state = self.state(&inner, trouble.as_deref());
        let guest = match inner.state {
            State::Moved => None,
            _ => guest::testimony(self.machine.memory()),
        };
        Vm {
            name: self.name.clone(),
            state,
            memory: self.machine.config().memory,
            vcpus: self.machine.config().vcpus,
            pid: std::process::id(),
            trouble,
            guest,
        }
    }

    fn state(&self, inner: &Inner, trouble: Option<&str>) -> VmState {
        let migrating = inner.attempt.as_ref().is_some_and(|a| a.report.is_none());
        match inner.state {
            State::Moved => VmState::Moved,
            State::Held => VmState::Held,
            _ if self.machine.outcome().is_some() => VmState::Ended,
            _ if migrating => VmState::Migrating,
            State::Running if trouble.is_none() => VmState::Running,
            State::Running | State::Paused => VmState::Paused,
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
        if inner.state == State::Running {
            inner.state = State::Paused;
        }
        self.tell_state(&inner);
        Ok(())
    }

    /// Lets a paused guest run on; a held one only by `force`.
    ///
    /// # Errors
    /// While it is being moved, has gone, or is held and `force` is not given.
    pub fn resume(&self, force: bool) -> Result<(), Failure> {
        let mut inner = self.lock();
        inner.refuse_unless_ours()?;
        if inner.state == State::Held && !force {
            return Err(busy(
                "the guest was handed over and may run at the destination; make sure that it does not, then force",
            ));
        }
        self.machine.resume()?;
        inner.state = State::Running;
        self.tell_state(&inner);
        Ok(())
    }

    /// Presses the guest's power button: whether and when it shuts down is its own business.
    ///
    /// # Errors
    /// While it is being moved, does not run, or does not listen to the button.
    pub fn shutdown(&self) -> Result<(), Failure> {
        let inner = self.lock();
        inner.refuse_unless_ours()?;
        if inner.state != State::Running || self.machine.disk_trouble().is_some() {
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
        self.lock().quit = true;
        self.machine.stop();
    }

    /// Starts to move the guest away.
    ///
    /// # Errors
    /// [`Code::BUSY`] when it is already moving or held.
    pub fn migrate(self: Arc<Self>, request: MigrationRequest) -> Result<Migration, Failure> {
        let token = Token::random()
            .map_err(|e| Failure::new(Code::HOST, format_args!("the kernel has no random numbers: {e}")))?;
        let mut inner = self.lock();
        inner.refuse_unless_ours()?;
        match inner.state {
            State::Running => {}
            State::Paused => self.machine.stay_paused()?,
            _ => return Err(busy("the guest is held; decide about it first")),
        }
        if let Some(outcome) = self.machine.outcome() {
            return Err(Failure::new(Code::GUEST_ENDED, outcome));
        }
        let number = inner.attempt.as_ref().map_or(1, |a| a.number + 1);
        let monitor = Arc::new(Monitor::default());
        let (to, dry_run) = (request.to.clone(), request.dry_run);
        let mover = Arc::clone(&self);
        let watched = Arc::clone(&monitor);
        let thread = thread::Builder::new()
            .name("migration".into())
            .spawn(move || mover.move_away(&request, token, &watched))
            .map_err(|e| Failure::new(Code::HOST, format_args!("cannot start a thread: {e}")))?;
        let ended = watch::Sender::new(None);
        let attempt = Attempt {
            number,
            to,
            dry_run,
            secured: Arc::default(),
            monitor,
            report: None,
            ended,
            thread: Some(thread),
        };
        let started = attempt.view();
        inner.attempt = Some(attempt);
        self.tell_state(&inner);
        Ok(started)
    }

    /// The migration that is under way, or the last one.
    pub fn migration(&self) -> Option<Migration> {
        self.lock().attempt.as_ref().map(Attempt::view)
    }

    /// Begins to wait for the report of the migration that is under way, or of the last one.
    pub fn await_report(self: &Arc<Self>) -> Option<Waiting> {
        let inner = self.lock();
        let attempt = inner.attempt.as_ref()?;
        self.waiting.fetch_add(1, Ordering::AcqRel);
        Some(Waiting { instance: Arc::clone(self), number: attempt.number, ended: attempt.ended.subscribe() })
    }

    /// Whether the report of the last migration may still be wanted: somebody waits for one, or nobody who
    /// waited for this one has been told. A mere look, such as that of `whimbrel status`, changes nothing.
    pub fn report_awaited(&self) -> bool {
        let last = self.lock().attempt.as_ref().map_or(0, |attempt| attempt.number);
        self.waiting.load(Ordering::Acquire) > 0 || self.told.load(Ordering::Acquire) < last
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

    /// Changes the migration that is under way.
    ///
    /// # Errors
    /// When none is, or the guest has been handed over.
    pub fn change(&self, change: &MigrationChange) -> Result<Migration, Failure> {
        let inner = self.lock();
        let under_way = inner.attempt.as_ref().filter(|attempt| attempt.report.is_none());
        let attempt = under_way.ok_or_else(|| busy("no migration is under way"))?;
        if attempt.monitor.progress().phase == Phase::Committed {
            return Err(busy("too late: the guest has been handed over"));
        }
        if let Some(limit) = change.downtime_limit_ms {
            attempt.monitor.limit_downtime(Duration::from_millis(limit));
        }
        let cap = |bits: u64| Some(bits.div_ceil(8)).filter(|bytes| *bytes > 0);
        if let Some(bits) = change.bandwidth_bps {
            attempt.monitor.set_bandwidth(cap(bits));
        }
        if let Some(bits) = change.share_bps {
            attempt.monitor.set_share(cap(bits));
        }
        if change.switch_now {
            attempt.monitor.switch_now();
        } else if change.proceed {
            attempt.monitor.proceed();
        }
        Ok(attempt.view())
    }

    fn move_away(&self, request: &MigrationRequest, token: Token, monitor: &Arc<Monitor>) {
        let came_to_memory = Arc::new(AtomicBool::new(false));
        self.tell_progress(monitor);
        if request.dry_run {
            end_before_memory(monitor, Arc::clone(&came_to_memory));
        }
        let mut report = match self.attempt(request, token, monitor) {
            Ok(report) => report,
            Err(failure) => {
                monitor.end(Phase::Stayed);
                Report::not_begun(failure, self.machine.config().memory)
            }
        };
        if came_to_memory.load(Ordering::Acquire) && report.verdict == Verdict::Stayed {
            report.failure = report.failure.filter(|why| why.code != Code::CANCELLED);
        }
        let moved = report.verdict == Verdict::Moved;
        let mut inner = self.lock();
        inner.state = match report.verdict {
            Verdict::Moved => State::Moved,
            Verdict::Stayed => inner.state,
            // Held, or an end that this program does not know: an operator decides.
            _ => State::Held,
        };
        let over = inner.attempt.as_mut().map(|attempt| {
            attempt.report = Some(report);
            attempt.ended.send_replace(Some(attempt.view()));
            attempt.view()
        });
        if let (Some(events), Some(over)) = (self.events.get(), &over) {
            events.add(Event::migration(EventKind::MigrationEnded, &self.name, over.clone()));
        }
        self.tell_state(&inner);
        drop(inner);
        // The process of a guest that has moved lives until this is done.
        if let Some(migration) = over.filter(|migration| !migration.dry_run) {
            (self.keep)(&migration);
        }
        if moved {
            // Its vCPUs are parked for good; nothing but the report is left of it here.
            self.machine.stop();
        }
    }

    /// Tells of the migration that begins, and how it gets on. In the blackout nobody is woken for that, and
    /// nothing is waited for.
    fn tell_progress(&self, monitor: &Monitor) {
        let begun =
            self.lock().attempt.as_ref().map(|attempt| (attempt.view(), Arc::clone(&attempt.secured)));
        let (Some((begun, secured)), Some(events)) = (begun, self.events.get().cloned()) else { return };
        let name = self.name.clone();
        events.add(Event::migration(EventKind::MigrationBegun, &name, begun.clone()));
        let before = Mutex::new(Phase::default());
        monitor.on_progress(move |progress| {
            let before = std::mem::replace(
                &mut *before.lock().unwrap_or_else(PoisonError::into_inner),
                progress.phase,
            );
            let kind = match progress.phase {
                // This is told with the report.
                Phase::Moved | Phase::Stayed | Phase::Held => return,
                phase if phase == before => EventKind::MigrationRound,
                _ => EventKind::MigrationPhase,
            };
            let (secured, progress) = (secured.get().cloned(), progress.clone());
            let quiet = matches!(progress.phase, Phase::Switchover | Phase::Committed);
            let event = Event::migration(kind, &name, Migration { secured, progress, ..begun.clone() });
            if quiet {
                events.add_quietly(event);
            } else {
                events.add(event);
            }
        });
    }

    /// Calls the destination, protected as the request or else the process says.
    fn connect(
        &self,
        request: &MigrationRequest,
        token: Token,
        silence: Duration,
    ) -> Result<Connection, Failure> {
        let security = match (&request.tls, request.insecure, &self.security) {
            (Some(files), ..) => &Security::Tls(files.clone()),
            // A process that was given certificates is not told by a request to do without.
            (None, true, Security::Near) => &Security::Insecure,
            (None, _, security) => security,
        };
        if request.encryption == Encryption::Required {
            let cannot = |why| Err(Failure::new(Code::AUTHENTICATION, why));
            if !matches!(security, Security::Tls(_)) {
                return cannot("encryption is required, and there are no certificates: use --tls FOLDER");
            }
            if request.transport == TransportChoice::Rdma {
                return cannot("encryption is required, and RDMA has none: use another transport");
            }
        }
        security.connector(request.encryption)?.connect(&request.to, token, silence).map_err(|error| {
            match error {
                Error::Exposed { .. } => Failure::new(
                    Code::AUTHENTICATION,
                    format_args!("{error}. Use --tls FOLDER, or --insecure if that is so"),
                ),
                error => error.into(),
            }
        })
    }

    fn attempt(
        &self,
        request: &MigrationRequest,
        token: Token,
        monitor: &Monitor,
    ) -> Result<Report, Failure> {
        let silence = Duration::from_secs(request.silence_s.max(1));
        transports::warm_up(request);
        let mut connection = self.connect(request, token, silence)?;
        if let Some(attempt) = &self.lock().attempt {
            // It is connected once.
            let _ = connection.identity().map(|identity| attempt.secured.set(identity.into()));
        }
        let transports = transports::source(request, &connection);
        let mut migration = source::Migration::new(self.machine.as_ref(), &mut connection);
        if let Some(patience) = request.pause_before_switchover_s {
            migration = migration.pause_before_switchover(Duration::from_secs(patience));
        }
        Ok(migration
            .transports(transports)
            .software(SOFTWARE)
            .policy(request.policy())
            .timeouts(Timeouts::default().with_answer(silence).with_data(silence))
            .compare_memory(request.compare_memory)
            .monitor(monitor)
            .run())
    }
}

/// Has a migration called off once the destination is ready for memory: whatever could be refused has been
/// asked by then.
fn end_before_memory(monitor: &Arc<Monitor>, came_to_memory: Arc<AtomicBool>) {
    let itself = Arc::downgrade(monitor);
    monitor.on_progress(move |progress| {
        if progress.phase == Phase::Precopy
            && let Some(monitor) = itself.upgrade()
            && !monitor.cancelled()
        {
            came_to_memory.store(true, Ordering::Release);
            monitor.cancel();
        }
    });
}

impl Inner {
    fn refuse_unless_ours(&self) -> Result<(), Failure> {
        if self.state == State::Moved {
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
        let rounds = if self.report.is_none() { self.monitor.rounds() } else { Vec::new() };
        let limit = self.monitor.downtime_limit();
        Migration {
            number: self.number,
            to: self.to.clone(),
            dry_run: self.dry_run,
            secured: self.secured.get().cloned(),
            downtime_limit_ms: limit.map(|limit| u64::try_from(limit.as_millis()).unwrap_or(u64::MAX)),
            bandwidth_bps: self.monitor.bandwidth().map(|bytes| bytes.saturating_mul(8)),
            progress: self.monitor.progress(),
            rounds,
            report: self.report.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm::guest::Workload;
    use vmm::{Host, MachineConfig, SerialOutput};

    /// An instance of a machine in which the embedded guest runs, idle.
    fn instance() -> Arc<Instance> {
        let host = Host::open().unwrap();
        let config = MachineConfig::new(&host, 32 << 20, 1).unwrap();
        let machine = Machine::build(&host, MachineConfig { serial: SerialOutput::Null, ..config }).unwrap();
        Workload::idle(1).boot(&machine).unwrap();
        machine.resume().unwrap();
        Instance::new("test".into(), Arc::new(machine), Security::Near, |_| {})
    }

    #[test]
    fn whoever_waits_learns_why_the_process_may_end() {
        let end = |cause: fn(&Instance)| {
            let instance = instance();
            let waiting = thread::spawn({
                let instance = Arc::clone(&instance);
                move || instance.wait()
            });
            cause(&instance);
            (waiting.join().unwrap(), instance.status().state)
        };
        assert_eq!(end(Instance::quit), (End::Quit, VmState::Ended));
        assert_eq!(end(|i| i.machine.stop()), (End::Guest(Outcome::Stopped), VmState::Ended));
        let moved = |instance: &Instance| {
            instance.lock().state = State::Moved;
            instance.quit();
        };
        assert_eq!(end(moved), (End::Moved, VmState::Moved), "also if it is to quit");
    }

    #[tokio::test]
    async fn whoever_waits_hears_of_the_migration_that_he_waits_for() {
        let instance = instance();
        let migrate = || {
            // Nobody listens there.
            let request = serde_json::from_str(r#"{"to": "127.0.0.1:1"}"#).unwrap();
            Arc::clone(&instance).migrate(request).unwrap().number
        };
        let over = || instance.migration().unwrap().report.is_some();
        assert_eq!(migrate(), 1);
        let waiting = instance.await_report().unwrap();
        while !over() {
            thread::sleep(Duration::from_millis(1));
        }
        // Before the first has been told, there is another one.
        assert_eq!(migrate(), 2);
        let told = waiting.report().await.unwrap();
        assert_eq!((told.number, told.report.is_some()), (1, true));
        while !over() {
            thread::sleep(Duration::from_millis(1));
        }
        assert!(instance.report_awaited(), "nobody was told of the second");
        assert_eq!(instance.await_report().unwrap().report().await.unwrap().number, 2);
        assert!(!instance.report_awaited());
    }
}
