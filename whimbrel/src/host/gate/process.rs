//! The side of a process that takes a guest in.

use super::line::Line;
use super::{ABSENCE, FromHost, FromProcess, Guest, OPENING, Phase, Presence};
use migration::transport::Token;
use migration::{Code, Failure};
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long the service may take to say whether a guest may come. It may be started anew meanwhile.
const PATIENCE: Duration = Duration::from_secs(8);

/// How often a service is looked for that is not there, at first and later.
const SOON: Duration = Duration::from_millis(20);
const LATER: Duration = Duration::from_secs(1);

/// The gate of a host, at which this process stands for as long as it lives. Clones are the same place there.
#[derive(Clone, Debug)]
pub struct Gate(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    path: PathBuf,
    state: Mutex<State>,
    answered: Condvar,
}

#[derive(Debug)]
struct State {
    /// `None` as long as no service is there.
    line: Option<Arc<Line>>,
    /// Since when.
    absent: Instant,
    presence: Presence,
    /// What the service has not answered yet.
    question: Option<Guest>,
    verdict: Option<Result<(), Failure>>,
    /// Kept for the next service.
    listeners: Vec<OwnedFd>,
    /// Whether no further caller comes.
    retiring: bool,
    /// When the last one has come.
    called: Option<Instant>,
}

impl Gate {
    /// Goes to the gate at `path` as a standby. Connections that come from there are given to `take`, in a
    /// thread that ends with the process.
    ///
    /// # Errors
    /// When there can be no further thread.
    pub fn stand(path: PathBuf, take: impl Fn(TcpStream) + Send + 'static) -> io::Result<Self> {
        let presence = Presence { pid: std::process::id(), phase: Phase::Standby, token: None, guest: None };
        let state = State {
            line: None,
            absent: Instant::now(),
            presence,
            question: None,
            verdict: None,
            listeners: Vec::new(),
            retiring: false,
            called: None,
        };
        let shared = Arc::new(Shared { path, state: Mutex::new(state), answered: Condvar::new() });
        let gate = Gate(Arc::clone(&shared));
        thread::Builder::new().name("gate".into()).spawn(move || shared.attend(&take))?;
        Ok(gate)
    }

    /// This process has a session.
    pub fn session(&self, token: Token) {
        self.0.change(|presence| {
            presence.phase = Phase::Arriving;
            presence.token = Some(token);
        });
    }

    /// Its guest runs here.
    pub fn settled(&self, guest: Guest) {
        self.0.change(|presence| {
            *presence = Presence { phase: Phase::Settled, token: None, guest: Some(guest), ..*presence };
        });
    }

    /// Asks whether this guest may come, and waits for the answer.
    ///
    /// # Errors
    /// Why it may not.
    pub fn ask(&self, guest: Guest) -> Result<(), Failure> {
        let mut state = self.0.lock();
        state.question = Some(guest.clone());
        state.verdict = None;
        state.say(&FromProcess::Ask(guest.clone()));
        let unanswered = |state: &mut State| state.verdict.is_none();
        let waited = self.0.answered.wait_timeout_while(state, PATIENCE, unanswered);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.question = None;
        let verdict = state.verdict.take().unwrap_or_else(|| {
            let text = "the service of this host is not there to admit the guest: start `whimbrel host`";
            Err(Failure::new(Code::HOST, text))
        });
        if verdict.is_ok() {
            state.presence.guest = Some(guest);
            state.say_presence();
        }
        verdict
    }

    /// Whether a standby is wanted no more: the service has said so, or has been away for long.
    pub fn is_over(&self) -> bool {
        let state = self.0.lock();
        // Those that have come before have their time.
        let retired = state.retiring && state.called.is_none_or(|when| when.elapsed() > OPENING);
        retired || (state.line.is_none() && state.absent.elapsed() > ABSENCE)
    }
}

impl State {
    /// Says something, if somebody is there. Whoever comes next is told all of it.
    fn say(&self, message: &FromProcess) {
        if let Some(line) = &self.line {
            // The thread that reads notices what is wrong.
            let _ = line.send(message, &[]);
        }
    }

    fn say_presence(&self) {
        self.say(&FromProcess::Here(self.presence.clone()));
    }

    /// Says everything to a service that has just come.
    fn greet(&mut self, line: Arc<Line>) -> io::Result<()> {
        let listeners: Vec<_> = self.listeners.iter().map(AsFd::as_fd).collect();
        line.send(&FromProcess::Here(self.presence.clone()), &listeners)?;
        if let Some(guest) = &self.question {
            line.send(&FromProcess::Ask(guest.clone()), &[])?;
        }
        self.line = Some(line);
        Ok(())
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut Presence)) {
        let mut state = self.lock();
        change(&mut state.presence);
        state.say_presence();
    }

    /// Stands at the gate for ever.
    fn attend(&self, take: &impl Fn(TcpStream)) {
        loop {
            if let Ok(line) = Line::connect(&self.path).map(Arc::new)
                && self.lock().greet(Arc::clone(&line)).is_ok()
            {
                while let Ok(Some((message, files))) = line.receive() {
                    self.hear(message, files, take);
                }
                let mut state = self.lock();
                state.line = None;
                state.absent = Instant::now();
            }
            let absent = {
                let mut state = self.lock();
                let absent = state.absent.elapsed();
                if absent > ABSENCE {
                    // Whoever calls is told by the kernel that nobody listens.
                    state.listeners.clear();
                }
                absent
            };
            thread::sleep(if absent > ABSENCE { LATER } else { SOON });
        }
    }

    fn hear(&self, message: FromHost, files: Vec<OwnedFd>, take: &impl Fn(TcpStream)) {
        match message {
            FromHost::Caller => {
                self.lock().called = Some(Instant::now());
                files.into_iter().map(TcpStream::from).for_each(take);
            }
            FromHost::Listeners => self.lock().listeners = files,
            FromHost::Retire => self.lock().retiring = true,
            FromHost::Admitted => self.answer(Ok(())),
            FromHost::Refused(failure) => self.answer(Err(failure)),
        }
    }

    fn answer(&self, verdict: Result<(), Failure>) {
        self.lock().verdict = Some(verdict);
        self.answered.notify_all();
    }
}
