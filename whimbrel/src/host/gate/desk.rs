//! The service's side: who stands at the gate, and who is given what.

use super::line::{Door, Line};
use super::{FromHost, FromProcess, Guest, OPENING, Phase, Presence};
use crate::host::inventory;
use crate::host::processes::tell;
use crate::host::run_dir::RunDir;
use crate::host::units::Units;
use migration::transport::Token;
use migration::{Code, Failure};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a caller waits for a standby of its own before it has to share one.
const CROWD: Duration = Duration::from_millis(500);

/// Standbys at once, however many call.
const MOST_STANDBYS: usize = 4;

/// Most processes at the gate.
const MOST: usize = 4096;

/// Which guests a host takes in, beyond what is said of each by itself.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    /// Bytes of memory of all guests together at most.
    pub total_memory: Option<u64>,
    /// How many guests the host has at most.
    pub max_guests: Option<usize>,
    /// How many are taken in at once at most.
    pub max_arrivals: Option<usize>,
}

/// See the module.
pub struct Desk {
    run_dir: RunDir,
    rules: Rules,
    units: Units,
    state: Mutex<State>,
    changed: Condvar,
    /// Held while one guest is decided about.
    deciding: Mutex<()>,
}

#[derive(Default)]
struct State {
    next: u64,
    processes: BTreeMap<u64, Process>,
    /// Processes that this service has started and that have not come to the gate.
    expected: BTreeSet<u32>,
    /// Those that it has started and that are standbys.
    own: BTreeSet<u32>,
    /// Callers for whom no standby has been found yet.
    waiting: usize,
    /// Standbys are wanted no more.
    closing: bool,
    listeners: Listeners,
    /// Machines that are being started from files, and their memory.
    starting: BTreeMap<String, u64>,
}

/// The sockets by which callers come.
enum Listeners {
    /// Those that processes have brought along, as long as it is not known which are used.
    Offered(Vec<TcpListener>),
    Used(Vec<TcpListener>),
}

impl Default for Listeners {
    fn default() -> Self {
        Listeners::Offered(Vec::new())
    }
}

struct Process {
    line: Arc<Line>,
    /// `None` until it has said it.
    presence: Option<Presence>,
    /// When it was given callers, of whom none has begun a session yet.
    given: Vec<Instant>,
}

impl Process {
    fn is_at(&self, phase: Phase) -> bool {
        self.presence.as_ref().is_some_and(|presence| presence.phase == phase)
    }

    fn guest(&self) -> Option<&Guest> {
        self.presence.as_ref().and_then(|presence| presence.guest.as_ref())
    }
}

/// How many are at the gate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Count {
    /// Processes that wait for a session.
    pub standbys: usize,
    /// Processes that take a guest in.
    pub arriving: usize,
    /// Processes that have taken one in.
    pub settled: usize,
}

impl Desk {
    /// A desk at which nobody is.
    pub fn new(run_dir: RunDir, rules: Rules, units: Units) -> Arc<Self> {
        let (state, changed, deciding) = (Mutex::default(), Condvar::new(), Mutex::default());
        Arc::new(Desk { run_dir, rules, units, state, changed, deciding })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets processes come by `door`, each with a thread of its own, as long as the program runs.
    ///
    /// # Errors
    /// When there can be no further thread.
    pub fn open(self: &Arc<Self>, door: Door) -> io::Result<()> {
        let desk = Arc::clone(self);
        thread::Builder::new().name("gate".into()).spawn(move || {
            loop {
                match door.accept() {
                    Ok(line) => desk.welcome(line),
                    // Out of descriptors, or a stranger: it is not worth more.
                    Err(_) => thread::sleep(Duration::from_millis(10)),
                }
            }
        })?;
        Ok(())
    }

    fn welcome(self: &Arc<Self>, line: Line) {
        let line = Arc::new(line);
        let number = {
            let mut state = self.lock();
            if state.processes.len() >= MOST {
                return;
            }
            let number = state.next;
            state.next += 1;
            let process = Process { line: Arc::clone(&line), presence: None, given: Vec::new() };
            state.processes.insert(number, process);
            number
        };
        let desk = Arc::clone(self);
        let attend = move || {
            // Whoever says something else than messages is not listened to any longer.
            while let Ok(Some((message, files))) = line.receive() {
                desk.hear(number, message, files);
            }
            desk.lock().leave(number);
            desk.changed.notify_all();
        };
        if thread::Builder::new().name("process".into()).spawn(attend).is_err() {
            self.lock().leave(number);
        }
    }

    fn hear(&self, number: u64, message: FromProcess, files: Vec<OwnedFd>) {
        match message {
            FromProcess::Here(presence) => {
                // An earlier service may have come to its end before it could do this.
                if let Some(guest) = &presence.guest {
                    self.give_unit(presence.pid, guest);
                }
                self.lock().arrive(number, presence, files);
                self.changed.notify_all();
            }
            FromProcess::Ask(guest) => self.decide(number, guest),
        }
    }

    /// One of the listening sockets at `address` that processes have brought along, which is waited for.
    pub fn inherited(&self, address: SocketAddr, patience: Duration) -> Option<TcpListener> {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            if let Listeners::Offered(offered) = &mut state.listeners {
                let at = offered.iter().position(|l| l.local_addr().is_ok_and(|local| local == address));
                if let Some(at) = at {
                    return Some(offered.swap_remove(at));
                }
            }
            state = self.wait(state, deadline)?;
        }
    }

    /// Uses these listening sockets from now on, and lets each process keep them.
    pub fn use_listeners(&self, listeners: Vec<TcpListener>) {
        let mut state = self.lock();
        state.listeners = Listeners::Used(listeners);
        state.processes.values().for_each(|process| state.share_listeners(process));
    }

    /// The process that has the session of this token, which is waited for.
    pub fn session(&self, token: Token, patience: Duration) -> Option<Arc<Line>> {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        loop {
            let has = |process: &&Process| process.presence.as_ref().is_some_and(|p| p.token == Some(token));
            if let Some(process) = state.processes.values().find(has) {
                return Some(Arc::clone(&process.line));
            }
            state = self.wait(state, deadline)?;
        }
    }

    /// A standby for a new caller, which is waited for. It is the caller's alone unless many call.
    pub fn standby(&self, patience: Duration) -> Option<Arc<Line>> {
        let began = Instant::now();
        let mut state = self.lock();
        state.waiting += 1;
        // More of them may be wanted.
        self.changed.notify_all();
        loop {
            let crowded = began.elapsed() > CROWD;
            if let Some(line) = state.give(crowded) {
                state.waiting -= 1;
                return Some(line);
            }
            // Crowds gather while nothing changes.
            let turn = (began + patience).min(Instant::now() + Duration::from_millis(50));
            let waited = self.changed.wait_timeout(state, turn.saturating_duration_since(Instant::now()));
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if began.elapsed() > patience {
                state.waiting -= 1;
                return None;
            }
        }
    }

    /// How many standbys are to be started now.
    pub fn wanted(&self) -> usize {
        let mut state = self.lock();
        if state.closing {
            return 0;
        }
        let waiting = state.waiting.max(1);
        let expected = state.expected.len();
        let standbys = state.standbys();
        let (all, free) =
            standbys.fold((expected, expected), |(all, free), s| (all + 1, free + usize::from(s.is_free())));
        waiting.saturating_sub(free).min(MOST_STANDBYS.saturating_sub(all))
    }

    /// A process with this number has been started, and will come.
    pub fn expect(&self, pid: u32) {
        let mut state = self.lock();
        state.own.insert(pid);
        // It may be here by now.
        if !state.processes.values().any(|p| p.presence.as_ref().is_some_and(|p| p.pid == pid)) {
            state.expected.insert(pid);
        }
    }

    /// It has ended. Whether it has never come.
    pub fn is_lost(&self, pid: u32) -> bool {
        let mut state = self.lock();
        state.own.remove(&pid);
        state.expected.remove(&pid)
    }

    /// Waits until something changes, or a little.
    pub fn wait_for_change(&self, patience: Duration) {
        drop(self.changed.wait_timeout(self.lock(), patience));
    }

    /// Lets the standbys that this service has started end, as far as no caller is with them, and waits for
    /// that.
    pub fn dismiss(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut state = self.lock();
        state.closing = true;
        for standby in state.standbys() {
            let _ = standby.line.send(&FromHost::Retire, &[]);
        }
        while state.standbys().next().is_some() || !state.expected.is_empty() {
            match self.wait(state, deadline) {
                Some(still) => state = still,
                None => return,
            }
        }
    }

    /// How many are here.
    pub fn count(&self) -> Count {
        let state = self.lock();
        let count = |phase| state.processes.values().filter(|process| process.is_at(phase)).count();
        Count {
            standbys: count(Phase::Standby),
            arriving: count(Phase::Arriving),
            settled: count(Phase::Settled),
        }
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>, deadline: Instant) -> Option<MutexGuard<'a, State>> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        Some(self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0)
    }

    /// Says whether a guest may come, after those who have asked before.
    fn decide(&self, number: u64, guest: Guest) {
        let _turn = self.deciding.lock().unwrap_or_else(PoisonError::into_inner);
        let verdict = self.judge(Some(number), &guest);
        let pid = self.lock().processes.get(&number).and_then(|p| Some(p.presence.as_ref()?.pid));
        // Before it has any of the guest's memory, which is then counted as the unit's.
        if let (Ok(()), Some(pid)) = (&verdict, pid) {
            self.give_unit(pid, &guest);
        }
        let mut state = self.lock();
        let Some(process) = state.processes.get_mut(&number) else { return };
        let answer = match verdict {
            Ok(()) => {
                // It counts from now on, and not only when the process says so.
                if let Some(presence) = &mut process.presence {
                    presence.guest = Some(guest);
                }
                FromHost::Admitted
            }
            Err(failure) => FromHost::Refused(failure),
        };
        let _ = process.line.send(&answer, &[]);
    }

    fn give_unit(&self, pid: u32, guest: &Guest) {
        if let Err(error) = self.units.enter(pid, &guest.name) {
            tell(format_args!("{} has no unit of its own: {error}", guest.name));
        }
    }

    /// Says whether a machine may be started here: if a guest of its name and size may come. It counts as one
    /// of the host's as long as the answer lives, and then as what it is.
    ///
    /// # Errors
    /// Why it may not, as a guest would be told.
    pub fn admit_start(self: &Arc<Self>, guest: Guest) -> Result<Starting, Failure> {
        let _turn = self.deciding.lock().unwrap_or_else(PoisonError::into_inner);
        self.judge(None, &guest)?;
        self.lock().starting.insert(guest.name.clone(), guest.memory);
        Ok(Starting { desk: Arc::clone(self), name: guest.name })
    }

    /// Judges the guest of the process with this number, or a machine that does not come but is started.
    fn judge(&self, number: Option<u64>, guest: &Guest) -> Result<(), Failure> {
        let refused = |code, text: String| Err(Failure::new(code, text));
        if self.run_dir.is_drained() {
            let text =
                "this host takes no guests: its operator empties it (`whimbrel drain --off` ends that)";
            return refused(Code::LIMITS, text.into());
        }
        let Rules { total_memory, max_guests, max_arrivals } = self.rules;
        let mut guests = BTreeMap::new();
        let arrivals = {
            let state = self.lock();
            let others =
                || state.processes.iter().filter(|(other, _)| Some(**other) != number).map(|(_, p)| p);
            guests.extend(state.starting.clone());
            guests.extend(others().filter_map(Process::guest).map(|g| (g.name.clone(), g.memory)));
            others().filter(|p| p.is_at(Phase::Arriving) && p.guest().is_some()).count()
        };
        if number.is_some() && max_arrivals.is_some_and(|most| arrivals >= most) {
            let text =
                format!("this host takes in {arrivals} guests at once already; wait until one is there");
            return refused(Code::BUSY, text);
        }
        if max_guests.is_none() && total_memory.is_none() {
            return Ok(());
        }
        // Those that have been started here say themselves how large they are.
        let machines = inventory::take(&self.run_dir, inventory::PATIENCE);
        let unknown =
            |error| Failure::new(Code::HOST, format_args!("this host does not know its machines: {error}"));
        for machine in machines.map_err(unknown)? {
            let memory = machine.vm.map_or(0, |vm| vm.memory);
            guests.entry(machine.name).or_insert(memory);
        }
        guests.remove(&guest.name);
        if let Some(most) = max_guests.filter(|most| guests.len() >= *most) {
            return refused(
                Code::LIMITS,
                format!("this host has {} guests, of which {most} are allowed", guests.len()),
            );
        }
        let taken: u64 = guests.values().sum();
        if let Some(most) = total_memory.filter(|most| taken.saturating_add(guest.memory) > *most) {
            let [taken, wanted, most] = [taken, guest.memory, most].map(|bytes| bytes >> 20);
            let text = format!(
                "the guest has {wanted} MiB of memory, and those of this host have {taken} of the {most} MiB that all \
                 may have together"
            );
            return refused(Code::LIMITS, text);
        }
        Ok(())
    }
}

/// A machine that is being started.
pub struct Starting {
    desk: Arc<Desk>,
    name: String,
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.desk.lock().starting.remove(&self.name);
    }
}

impl Process {
    fn is_free(&self) -> bool {
        self.given.is_empty()
    }
}

impl State {
    /// The standbys that this service has started. Callers who have had their time are forgotten.
    fn standbys(&mut self) -> impl Iterator<Item = &mut Process> {
        let own = &self.own;
        self.processes.values_mut().filter_map(|process| {
            let presence = process.presence.as_ref()?;
            if presence.phase != Phase::Standby || !own.contains(&presence.pid) {
                return None;
            }
            process.given.retain(|when| when.elapsed() < OPENING);
            Some(process)
        })
    }

    /// Gives a caller to the standby that has been given the fewest.
    fn give(&mut self, crowded: bool) -> Option<Arc<Line>> {
        let standby = self.standbys().min_by_key(|standby| standby.given.len())?;
        if !standby.is_free() && !crowded {
            return None;
        }
        standby.given.push(Instant::now());
        Some(Arc::clone(&standby.line))
    }

    fn arrive(&mut self, number: u64, presence: Presence, files: Vec<OwnedFd>) {
        self.expected.remove(&presence.pid);
        let own = self.own.contains(&presence.pid);
        if presence.phase != Phase::Standby {
            self.own.remove(&presence.pid);
        }
        let Some(process) = self.processes.get_mut(&number) else { return };
        let is_new = process.presence.is_none();
        let is_standby = presence.phase == Phase::Standby;
        process.presence = Some(presence);
        if !is_new {
            return;
        }
        if is_standby && (!own || self.closing) {
            // It was told what an earlier service was told, or comes too late.
            let _ = process.line.send(&FromHost::Retire, &[]);
        }
        if let Listeners::Offered(offered) = &mut self.listeners {
            offered.extend(files.into_iter().map(TcpListener::from));
        } else if let Some(process) = self.processes.get(&number) {
            self.share_listeners(process);
        }
    }

    fn share_listeners(&self, process: &Process) {
        let Listeners::Used(listeners) = &self.listeners else { return };
        let files: Vec<BorrowedFd<'_>> = listeners.iter().map(AsFd::as_fd).collect();
        let _ = process.line.send(&FromHost::Listeners, &files);
    }

    fn leave(&mut self, number: u64) {
        self.processes.remove(&number);
    }
}

/// Hands a connection to a process.
///
/// # Errors
/// When the process is gone.
pub(in crate::host) fn hand_over(line: &Line, connection: BorrowedFd<'_>) -> io::Result<()> {
    line.send(&FromHost::Caller, &[connection])
}
