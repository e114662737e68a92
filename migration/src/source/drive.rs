//! Carries the source's state machine out with a real machine, link and transports.

use super::path::Path;
use super::precopy::Precopy;
use super::state::{Command, Event, Outcome, State, Waiting};
use crate::cpu::{CpuTime, thread_cpu};
use crate::digest;
use crate::failure::{Code, Failure};
use crate::link::ControlLink;
use crate::machine::{Arbiter, SourceMachine};
use crate::memory::Ram;
use crate::message::{
    self, Hello, MAX_DESCRIPTION, MAX_STATE, MAX_STATE_PART, Message, Offer, Prepare, STATE_IN_PARTS, Span,
    StatePart,
};
use crate::monitor::{Monitor, Phase};
use crate::policy::Policy;
use crate::report::{Declined, Report, Verdict};
use crate::transport::{Session, SourceTransport, Token};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How often a wait looks whether it has been cancelled. Messages wake it at once.
const CANCEL_POLL: Duration = Duration::from_millis(50);

/// How long the destination's last words are waited for, after the guest has moved.
const EPILOGUE: Duration = Duration::from_secs(5);

/// How long a destination that closed its data connections is given to say why.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// How long the destination may take for each step.
#[derive(Clone, Debug)]
pub struct Timeouts {
    /// To answer the greeting.
    pub answer: Duration,
    /// To build the shadow machine; populating hundreds of gibibytes takes minutes.
    pub build: Duration,
    /// To load the state.
    pub load: Duration,
    /// To say that it runs.
    pub run: Duration,
    /// To confirm data.
    pub data: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            answer: Duration::from_secs(10),
            build: Duration::from_secs(300),
            load: Duration::from_secs(20),
            run: Duration::from_secs(20),
            data: Duration::from_secs(10),
        }
    }
}

/// What the operator chose.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// When to switch over.
    pub policy: Policy,
    /// How long to wait.
    pub timeouts: Timeouts,
    /// Compare a digest of all RAM on both sides before handing over. Lengthens the blackout by
    /// the time of reading all of memory.
    pub compare_memory: bool,
}

/// Moves `machine` to the destination at the other end of `link`. `transports`, best first, are
/// tried in order; later ones also step in for one that breaks. Returns when the guest runs at
/// either side, or is held.
pub fn migrate(
    machine: &dyn SourceMachine,
    link: &mut dyn ControlLink,
    token: Token,
    transports: Vec<Box<dyn SourceTransport>>,
    software: &str,
    options: &Options,
    monitor: &Monitor,
) -> Report {
    let ram = machine.ram();
    let session = Session { token, ram: Arc::clone(&ram), timeout: options.timeouts.data };
    let mut driver = Driver {
        machine,
        link,
        options,
        monitor,
        session: &session,
        ram: &ram,
        transports,
        precopy: None,
        declined: Vec::new(),
        features: 0,
        build_us: 0,
        setup: None,
        blackout_began: None,
        blackout_us: 0,
        spans: Vec::new(),
        began: Instant::now(),
    };
    let cpu = thread_cpu();
    let hello = Hello { software: software.to_string(), features: message::FEATURES };
    let mut state = State::new(hello, machine.arbiter().is_some_and(Arbiter::decides));
    let mut command = state.handle(Event::Start);
    let outcome = loop {
        if let Command::Finish(outcome) = command {
            break outcome;
        }
        if matches!(command, Command::Send(Message::Commit)) {
            monitor.update(|p| p.phase = Phase::Committed);
        }
        let event = driver.carry_out(command);
        command = state.handle(event);
    };
    let cpu = thread_cpu().since(cpu);
    driver.conclude(outcome, cpu)
}

struct Driver<'a> {
    machine: &'a dyn SourceMachine,
    link: &'a mut dyn ControlLink,
    options: &'a Options,
    monitor: &'a Monitor,
    session: &'a Session,
    ram: &'a Ram,
    transports: Vec<Box<dyn SourceTransport>>,
    precopy: Option<Precopy<'a>>,
    declined: Vec<Declined>,
    /// Feature bits that both sides have.
    features: u64,
    build_us: u64,
    setup: Option<Duration>,
    blackout_began: Option<Instant>,
    blackout_us: u64,
    spans: Vec<Span>,
    began: Instant,
}

/// One of [`Precopy`]'s two pieces of work.
type MemoryWork<'a> = fn(
    &mut Precopy<'a>,
    &mut Vec<Declined>,
    &mut dyn FnMut(&str) -> Result<(), Failure>,
) -> Result<(), Failure>;

/// Has the destination fence the plane of this name off, and waits until it has.
fn retire(link: &mut dyn ControlLink, name: &str, patience: Duration) -> Result<(), Failure> {
    link.send(&Message::Retire(name.into()).encode())?;
    match link.receive(patience)? {
        None => Err(Failure::new(Code::TIMEOUT, "the destination does not fence the broken transport off")),
        Some(frame) => match Message::decode(&frame)? {
            Message::Retired => Ok(()),
            Message::GaveUp(why) => Err(why.context("the destination refused")),
            other => Err(Failure::new(
                Code::PROTOCOL,
                format_args!("the destination sent {} when it was not its turn", other.name()),
            )),
        },
    }
}

fn event(result: Result<(), Failure>) -> Event {
    result.map_or_else(Event::Failed, |()| Event::Done)
}

impl<'a> Driver<'a> {
    /// Carries a command out; inside the blackout its duration becomes a span of the report.
    fn carry_out(&mut self, command: Command) -> Event {
        let name = match &command {
            Command::Pause => {
                self.machine.before_pause();
                self.monitor.update(|p| p.phase = Phase::Switchover);
                self.blackout_began = Some(Instant::now());
                "pause"
            }
            Command::FinalRound => "last pages",
            Command::Save => "save state",
            Command::Send(Message::State(_)) => "send state",
            Command::Wait(Waiting::Ready) => "round trip of state",
            Command::ReleaseDisks => "release disks",
            Command::Send(Message::Commit) => "send commit",
            Command::Wait(Waiting::Running) => "round trip of commit",
            _ => return self.perform(command),
        };
        let began = Instant::now();
        let event = self.perform(command);
        let mut us = began.elapsed().as_micros() as u64;
        // The destination's own spans are parts of the round trip: take them out of it.
        let theirs = match &event {
            Event::Received(Message::Ready(ready)) => ready.spans.as_slice(),
            Event::Received(Message::Running(running)) => running.spans.as_slice(),
            _ => &[],
        };
        for span in theirs.iter().take(16) {
            let within = span.us.min(us);
            us -= within;
            let name = Failure::new(Code::OTHER, &span.name).message;
            self.spans.push(Span { name: format!("destination: {name}"), us: within });
        }
        self.spans.push(Span { name: name.into(), us });
        if matches!(event, Event::Received(Message::Running(_))) {
            self.blackout_us = self.blackout_began.map_or(0, |began| began.elapsed().as_micros() as u64);
        }
        event
    }

    fn perform(&mut self, command: Command) -> Event {
        match command {
            Command::Describe => match self.describe() {
                Ok(prepare) => Event::Described(Box::new(prepare)),
                Err(why) => Event::Failed(why),
            },
            Command::Send(Message::State(state)) => self.send_state(state),
            Command::Send(message) => self.send(&message),
            Command::Wait(waiting) => self.wait(waiting),
            Command::Connect(offers) => event(self.connect(offers)),
            Command::Precopy => self.memory(Precopy::run),
            Command::Pause => event(self.machine.pause()),
            Command::FinalRound => self.memory(Precopy::finish),
            Command::Save => match self.save() {
                Ok(state) => Event::Saved(Box::new(state)),
                Err(why) => Event::Failed(why),
            },
            Command::ReleaseDisks => event(self.machine.arbiter().map_or(Ok(()), Arbiter::release)),
            Command::TakeDisks => event(self.machine.arbiter().map_or(Ok(()), Arbiter::take)),
            Command::Resume => {
                self.blackout_us = 0;
                event(self.machine.resume())
            }
            Command::Finish(_) => Event::Done,
        }
    }

    fn send(&mut self, message: &Message) -> Event {
        match self.link.send(&message.encode()) {
            Ok(()) => Event::Done,
            Err(error) => Event::LinkLost(error.into()),
        }
    }

    /// Sends a state, in parts if it does not fit into one message.
    fn send_state(&mut self, mut state: message::State) -> Event {
        let last = state.state.len().saturating_sub(1) / MAX_STATE_PART * MAX_STATE_PART;
        for part in state.state[..last].chunks(MAX_STATE_PART) {
            match self.send(&Message::StatePart(StatePart(part.to_vec()))) {
                Event::Done => {}
                lost => return lost,
            }
        }
        state.state.drain(..last);
        self.send(&Message::State(state))
    }

    fn describe(&mut self) -> Result<Prepare, Failure> {
        let description = self.machine.describe()?;
        if description.len() > MAX_DESCRIPTION {
            return Err(Failure::new(Code::STATE, "the machine's description is too long to send"));
        }
        let transports = self.transports.iter().map(|t| t.name().to_string()).collect();
        Ok(Prepare { description, layout: self.ram.layout(), transports })
    }

    fn connect(&mut self, offers: Vec<Offer>) -> Result<(), Failure> {
        let transports = std::mem::take(&mut self.transports);
        let path = Path::connect(transports, offers, self.session, self.monitor, &mut self.declined)?;
        let policy = self.options.policy.clone();
        self.precopy = Some(Precopy::new(self.machine, self.ram, self.session, self.monitor, policy, path));
        self.setup = Some(self.began.elapsed());
        Ok(())
    }

    /// Moves memory. When that fails, the destination may have said why: its word goes first.
    fn memory(&mut self, work: MemoryWork<'a>) -> Event {
        let Some(precopy) = &mut self.precopy else {
            return Event::Failed(Failure::new(Code::TRANSPORT, "no data plane"));
        };
        let (link, timeouts) = (&mut *self.link, &self.options.timeouts);
        let mut retire = |name: &str| retire(link, name, timeouts.answer + timeouts.load);
        match work(precopy, &mut self.declined, &mut retire) {
            Ok(()) => Event::Done,
            Err(why) if why.code == Code::TRANSPORT => match self.link.receive(LAST_WORDS) {
                Ok(Some(frame)) => match Message::decode(&frame) {
                    Ok(message) => Event::Received(message),
                    Err(_) => Event::Failed(why),
                },
                _ => Event::Failed(why),
            },
            Err(why) => Event::Failed(why),
        }
    }

    fn save(&mut self) -> Result<message::State, Failure> {
        let state = self.machine.save()?;
        let most = if self.features & STATE_IN_PARTS != 0 { MAX_STATE } else { MAX_STATE_PART };
        if state.len() > most {
            return Err(Failure::new(
                Code::STATE,
                format_args!(
                    "the machine's state of {} bytes is too long: {most} can be sent there",
                    state.len()
                ),
            ));
        }
        let digest = self.options.compare_memory.then(|| digest::of(self.ram));
        Ok(message::State { state, digest })
    }

    fn wait(&mut self, waiting: Waiting) -> Event {
        let timeouts = &self.options.timeouts;
        let limit = match waiting {
            Waiting::Welcome => timeouts.answer,
            Waiting::Prepared => timeouts.build,
            Waiting::Ready if self.options.compare_memory => timeouts.load + timeouts.build,
            Waiting::Ready => timeouts.load,
            Waiting::Running => timeouts.run,
        };
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Event::Deadline;
            }
            match self.link.receive(left.min(CANCEL_POLL)) {
                Ok(Some(frame)) => match Message::decode(&frame) {
                    Ok(Message::Prepared(prepared)) => {
                        self.build_us = prepared.build_us;
                        return Event::Received(Message::Prepared(prepared));
                    }
                    Ok(Message::Welcome(hello)) => {
                        self.features = hello.features & message::FEATURES;
                        return Event::Received(Message::Welcome(hello));
                    }
                    Ok(message) => return Event::Received(message),
                    Err(why) => return Event::LinkLost(why),
                },
                Ok(None) if waiting != Waiting::Running && self.monitor.cancelled() => return Event::Cancel,
                Ok(None) => {}
                Err(error) => return Event::LinkLost(error.into()),
            }
        }
    }

    fn conclude(mut self, outcome: Outcome, mut cpu: CpuTime) -> Report {
        let total_us = self.began.elapsed().as_micros() as u64;
        let (verdict, phase, mut failure) = match outcome {
            Outcome::Moved => (Verdict::Moved, Phase::Moved, None),
            Outcome::Stayed(why) => (Verdict::Stayed, Phase::Stayed, Some(why)),
            Outcome::Held(why) => (Verdict::Held, Phase::Held, Some(why)),
        };
        let epilogue = (verdict == Verdict::Moved).then(|| self.epilogue()).flatten();
        if verdict == Verdict::Stayed
            && let Err(why) = self.machine.stop_tracking()
        {
            failure = failure.map(|f| f.context(format_args!("dirty tracking could not be stopped ({why})")));
        }
        let mut report = Report {
            verdict,
            failure,
            declined: self.declined,
            total_us,
            setup_us: self.setup.map_or(0, |d| d.as_micros() as u64),
            build_us: self.build_us,
            blackout_us: self.blackout_us,
            spans: self.spans,
            destination_cpu_us: epilogue.as_ref().map(|e| e.cpu_us),
            destination_resident: epilogue.as_ref().map(|e| e.resident),
            remarks: epilogue.and_then(|e| e.remarks),
            ..Report::not_begun(Failure::new(Code::OTHER, ""), self.ram.len())
        };
        if let Some(mut precopy) = self.precopy {
            report.transport = precopy.transport().into();
            report.lanes = precopy.lanes();
            report.over_limit = precopy.over_limit.take();
            report.rounds = std::mem::take(&mut precopy.reports);
            cpu += precopy.cpu();
        }
        report.source_cpu_us = cpu.all.as_micros() as u64;
        report.source_user_us = cpu.user.as_micros() as u64;
        self.monitor.end(phase);
        report
    }

    /// What the destination tells afterwards. The guest has moved whether or not it comes.
    fn epilogue(&mut self) -> Option<message::Epilogue> {
        let frame = self.link.receive(EPILOGUE).ok()??;
        match Message::decode(&frame) {
            Ok(Message::Epilogue(epilogue)) => Some(epilogue),
            _ => None,
        }
    }
}
