//! Carries the source's state machine out with a real machine, link and transports.

use super::migration::Timeouts;
use super::path::Path;
use super::precopy::Precopy;
use super::state::{Command, Event, Outcome, State, Waiting};
use crate::cpu::{CpuTime, thread_cpu};
use crate::digest;
use crate::failure::{Code, Failure, printable};
use crate::judge::{Handover, Judge};
use crate::machine::{Arbiter, SourceMachine};
use crate::memory::Ram;
use crate::message::{
    self, ChunkDigests, Hello, MAX_DESCRIPTION, MAX_STATE, MAX_STATE_PART, Message, NAMED_DIFFERENCES, Offer,
    Prepare, SAYS_THAT_IT_WAITS, STATE_IN_PARTS, StatePart,
};
use crate::monitor::{Monitor, Phase};
use crate::policy::{OnStall, Policy};
use crate::report::{LAST_PAGES, Report, Span, Verdict};
use crate::unwind;
use std::thread;
use std::time::{Duration, Instant};

/// How often a wait looks whether it has been cancelled. Messages wake it at once.
const CANCEL_POLL: Duration = Duration::from_millis(50);

/// How long the destination's last words are waited for, after the guest has moved.
const EPILOGUE: Duration = Duration::from_secs(5);

/// How long a destination that closed its data connections is given to say why.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// Most of a destination's spans that are reported for one message.
const MAX_REPORTED_SPANS: usize = 16;

/// What the VMM and its operator chose.
pub(super) struct Options {
    pub(super) software: String,
    pub(super) policy: Policy,
    pub(super) timeouts: Timeouts,
    pub(super) compare_memory: bool,
    /// How long to wait for an operator before the switchover; `None` not to.
    pub(super) switchover_patience: Option<Duration>,
    /// What a handover of such a machine is known to take.
    pub(super) handover: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            software: message::SOFTWARE.into(),
            policy: Policy::default(),
            timeouts: Timeouts::default(),
            compare_memory: false,
            switchover_patience: None,
            handover: None,
        }
    }
}

/// Moves `machine` along `path`. Returns when the guest runs at either side, or is held.
pub(super) fn drive<'a>(
    machine: &'a dyn SourceMachine,
    ram: &'a Ram,
    has_arbiter: bool,
    path: Path<'a>,
    options: &'a Options,
    monitor: &'a Monitor,
) -> Report {
    let began = Instant::now();
    monitor.default_bandwidth(options.policy.bandwidth);
    let run = || run(machine, ram, has_arbiter, path, options, monitor, began);
    // One that is to switch over when its time has passed stops at nothing else.
    let Some(limit) = options.policy.timeout.filter(|_| options.policy.on_stall != OnStall::Switch) else {
        return run();
    };
    monitor.set_deadline(began.checked_add(limit));
    thread::scope(|scope| {
        let watch = thread::Builder::new().name("deadline".into());
        if let Err(e) = watch.spawn_scoped(scope, || monitor.keep_deadline()) {
            let why = Failure::new(Code::OTHER, format_args!("cannot start a thread: {e}"));
            monitor.end(Phase::Stayed);
            return Report::not_begun(why, ram.len());
        }
        // Dropped also when the VMM's code panics: the thread is waited for.
        let _settled = Settled(monitor);
        run()
    })
}

/// Whatever happens, the deadline does not matter any more once this is dropped.
struct Settled<'a>(&'a Monitor);

impl Drop for Settled<'_> {
    fn drop(&mut self) {
        self.0.settle();
    }
}

fn run<'a>(
    machine: &'a dyn SourceMachine,
    ram: &'a Ram,
    has_arbiter: bool,
    path: Path<'a>,
    options: &'a Options,
    monitor: &'a Monitor,
    began: Instant,
) -> Report {
    let mut driver = Driver {
        machine,
        ram,
        path,
        options,
        monitor,
        precopy: None,
        handover: Handover { known: options.handover, ..Handover::default() },
        greeted: None,
        features: 0,
        chunks: None,
        differing: Vec::new(),
        build_us: 0,
        setup: None,
        blackout_began: None,
        blackout_us: 0,
        spans: Vec::new(),
        began,
    };
    let cpu = thread_cpu();
    let hello = Hello { software: options.software.clone(), features: message::FEATURES };
    let mut state = State::new(hello, has_arbiter);
    let mut command = state.handle(Event::Start);
    let outcome = loop {
        if let Command::Finish(outcome) = command {
            break outcome;
        }
        let commits = matches!(command, Command::Send(Message::Commit));
        if commits {
            monitor.settle();
            monitor.update(|p| p.phase = Phase::Committed);
        }
        let event = driver.carry_out(command);
        if commits {
            // Only now, while the destination is at work: whoever watches must not delay `Commit`.
            monitor.notify();
        }
        command = state.handle(event);
    };
    let cpu = thread_cpu().since(cpu);
    driver.conclude(outcome, cpu)
}

struct Driver<'a> {
    machine: &'a dyn SourceMachine,
    ram: &'a Ram,
    path: Path<'a>,
    options: &'a Options,
    monitor: &'a Monitor,
    precopy: Option<Precopy<'a>>,
    handover: Handover,
    /// When the greeting was sent.
    greeted: Option<Instant>,
    /// Feature bits that both sides have.
    features: u64,
    /// Digests of the chunks of RAM, if they are to be sent with the state.
    chunks: Option<Vec<u64>>,
    /// Guest addresses of pages that differ.
    differing: Vec<u64>,
    build_us: u64,
    setup: Option<Duration>,
    blackout_began: Option<Instant>,
    blackout_us: u64,
    spans: Vec<Span>,
    began: Instant,
}

/// One of [`Precopy`]'s two pieces of work.
type MemoryWork<'a> = fn(&mut Precopy<'a>, &mut Path<'_>) -> Result<(), Failure>;

/// What a command does, for the report and for the text of a failure.
fn doing(command: &Command) -> &'static str {
    match command {
        Command::Describe => "describe the machine",
        Command::Send(Message::State(_)) => "send state",
        Command::Send(Message::Commit) => "send commit",
        Command::Send(_) => "send a message",
        Command::Wait(Waiting::Ready) => "round trip of state",
        Command::Wait(Waiting::Running) => "round trip of commit",
        Command::Wait(_) => "wait for an answer",
        Command::Connect(_) => "connect",
        Command::Precopy => "pre-copy",
        Command::Pause => "pause",
        Command::Save => "save state",
        Command::FinalRound => LAST_PAGES,
        Command::ReleaseDisks => "release disks",
        Command::TakeDisks => "take disks",
        Command::Resume => "resume",
        Command::Finish(_) => "finish",
    }
}

/// Whether a command is a part of the blackout.
fn in_blackout(command: &Command) -> bool {
    matches!(
        command,
        Command::Pause
            | Command::Save
            | Command::FinalRound
            | Command::Send(Message::State(_) | Message::Commit)
            | Command::Wait(Waiting::Ready | Waiting::Running)
            | Command::ReleaseDisks
    )
}

fn event(result: Result<(), Failure>) -> Event {
    result.map_or_else(Event::Failed, |()| Event::Done)
}

impl<'a> Driver<'a> {
    /// Carries a command out. If somebody else's code panics in it, it has failed.
    fn carry_out(&mut self, command: Command) -> Event {
        let panicked = match command {
            Command::Send(_) | Command::Wait(_) => Event::LinkLost,
            _ => Event::Failed,
        };
        let doing = doing(&command);
        unwind::catch(doing, || Ok(self.timed(doing, command))).unwrap_or_else(panicked)
    }

    /// Carries a command out; inside the blackout its duration becomes a span of the report.
    fn timed(&mut self, name: &'static str, command: Command) -> Event {
        if !in_blackout(&command) {
            return self.perform(command);
        }
        if command == Command::Pause {
            self.machine.before_pause();
            self.monitor.enter(Phase::Switchover);
            self.blackout_began = Some(Instant::now());
        }
        let command = match command {
            Command::Send(Message::State(state)) => Command::Send(Message::State(self.with_digest(state))),
            command => command,
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
        for span in theirs.iter().take(MAX_REPORTED_SPANS) {
            let within = span.us.min(us);
            us -= within;
            let name = printable(format!("destination: {}", span.name));
            self.spans.push(Span { name, us: within });
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
            Command::Precopy => {
                self.precopy = Some(self.begin_precopy());
                self.memory(Precopy::run)
            }
            Command::Pause => {
                let paused = self.machine.pause();
                self.let_go();
                event(paused)
            }
            Command::Save => match self.save() {
                Ok(state) => Event::Saved(Box::new(state)),
                Err(why) => Event::Failed(why),
            },
            Command::FinalRound => self.memory(Precopy::finish),
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
        if matches!(message, Message::Hello(_)) {
            self.greeted = Some(Instant::now());
        }
        match self.path.send(&message.encode()) {
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
        if let Some(chunks) = self.chunks.take() {
            match self.send(&Message::ChunkDigests(ChunkDigests(chunks))) {
                Event::Done => {}
                lost => return lost,
            }
        }
        self.send(&Message::State(state))
    }

    fn describe(&mut self) -> Result<Prepare, Failure> {
        let description = self.machine.describe()?;
        if description.len() > MAX_DESCRIPTION {
            return Err(Failure::new(Code::STATE, "the machine's description is too long to send"));
        }
        Ok(Prepare { description, layout: self.ram.layout(), transports: self.path.names() })
    }

    fn connect(&mut self, offers: Vec<Offer>) -> Result<(), Failure> {
        self.path.connect(offers)?;
        self.setup = Some(self.began.elapsed());
        Ok(())
    }

    fn begin_precopy(&self) -> Precopy<'a> {
        let handover = Handover { source: self.machine.handover_estimate(), ..self.handover };
        let judge = Judge::new(self.options.policy.clone(), handover);
        let speaks = self.features & SAYS_THAT_IT_WAITS != 0;
        Precopy::new(
            self.machine,
            self.ram,
            self.monitor,
            judge,
            self.options.switchover_patience,
            speaks,
            self.began,
        )
    }

    /// Moves memory. When that fails, the destination may have said why: its word goes first.
    fn memory(&mut self, work: MemoryWork<'a>) -> Event {
        let Some(precopy) = &mut self.precopy else {
            return Event::Failed(Failure::new(Code::TRANSPORT, "no data plane"));
        };
        let worked = work(precopy, &mut self.path);
        if worked.is_err() {
            self.let_go();
        }
        match worked {
            Ok(()) => Event::Done,
            Err(why) if matches!(why.code, Code::TRANSPORT | Code::TIMEOUT) => self.last_words(why),
            Err(why) => Event::Failed(why),
        }
    }

    /// The guest need not be slowed any more.
    fn let_go(&self) {
        if self.precopy.as_ref().is_some_and(Precopy::slows) {
            // That cannot fail in a way that somebody could mend.
            let _ = unwind::catch("let the guest's writers go", || self.machine.throttle(None));
        }
    }

    /// What becomes of a data plane's failure: the destination's own word, or what the control link tells.
    fn last_words(&mut self, why: Failure) -> Event {
        if self.monitor.stopped().is_some() {
            return Event::Failed(why);
        }
        match self.path.receive(LAST_WORDS) {
            Ok(Some(frame)) => Message::decode(&frame).map_or(Event::Failed(why), Event::Received),
            Ok(None) => Event::Failed(why),
            Err(lost) => {
                let both = format_args!("{why}; {lost} too");
                Event::Failed(Failure::new(why.code, both))
            }
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
        Ok(message::State { state, digest: None })
    }

    /// Adds the digest of all RAM, if it was asked for: the last round is through, so it no longer changes.
    fn with_digest(&mut self, state: message::State) -> message::State {
        if !self.options.compare_memory {
            return state;
        }
        let began = Instant::now();
        let (digest, chunks) = digest::of(self.ram);
        self.chunks = (self.features & NAMED_DIFFERENCES != 0).then_some(chunks);
        self.spans.push(Span { name: "digest memory".into(), us: began.elapsed().as_micros() as u64 });
        message::State { digest: Some(digest), ..state }
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
            match self.path.receive(left.min(CANCEL_POLL)) {
                Ok(Some(frame)) => match self.received(&frame, waiting) {
                    Some(event) => return event,
                    None => continue,
                },
                Ok(None) if waiting != Waiting::Running && self.monitor.cancelled() => return Event::Cancel,
                Ok(None) if waiting != Waiting::Running => {
                    if let Some(why) = self.monitor.stopped() {
                        return Event::Failed(why);
                    }
                }
                Ok(None) => {}
                Err(error) => return Event::LinkLost(error.into()),
            }
        }
    }

    /// Notes what a message tells about the destination. `None` if there is no more to it than that.
    fn received(&mut self, frame: &[u8], waiting: Waiting) -> Option<Event> {
        let message = match Message::decode(frame) {
            Ok(message) => message,
            Err(why) => return Some(Event::LinkLost(why)),
        };
        match &message {
            Message::Welcome(hello) => {
                self.features = hello.features & message::FEATURES;
                self.handover.round_trip = self.greeted.map_or(Duration::ZERO, |sent| sent.elapsed());
            }
            // Nobody has asked.
            Message::PageHashes(_) if !self.options.compare_memory => return Some(Event::Received(message)),
            Message::PageHashes(theirs) if waiting.goes_on_after(&message) => {
                digest::name_differing(self.ram, theirs, &mut self.differing);
            }
            Message::Estimate(estimate) if waiting.goes_on_after(&message) => {
                self.handover.destination = Some(Duration::from_micros(estimate.handover_us));
            }
            Message::Prepared(prepared) => self.build_us = prepared.build_us,
            _ => {}
        }
        (!waiting.goes_on_after(&message)).then_some(Event::Received(message))
    }

    fn conclude(mut self, outcome: Outcome, mut cpu: CpuTime) -> Report {
        let total_us = self.began.elapsed().as_micros() as u64;
        let (verdict, phase, mut failure) = match outcome {
            Outcome::Moved => (Verdict::Moved, Phase::Moved, None),
            Outcome::Stayed(why) => (Verdict::Stayed, Phase::Stayed, Some(why)),
            Outcome::Held(why) => (Verdict::Held, Phase::Held, Some(why)),
        };
        if !self.differing.is_empty() {
            let pages: Vec<_> = self.differing.iter().map(|address| format!("{address:#x}")).collect();
            failure = failure.map(|f| {
                Failure::new(f.code, format_args!("{}; these pages differ: {}", f.message, pages.join(", ")))
            });
        }
        self.let_go();
        let slows = self.precopy.as_ref().is_some_and(Precopy::slows);
        let throttled =
            slows.then(|| unwind::catch("tell of the guest's writers", || Ok(self.machine.throttled())));
        let throttled = throttled.and_then(Result::ok).unwrap_or_default();
        let epilogue = (verdict == Verdict::Moved).then(|| self.epilogue()).flatten();
        if verdict == Verdict::Stayed
            && let Err(why) = unwind::catch("stop dirty tracking", || self.machine.stop_tracking())
        {
            failure = failure.map(|f| f.context(format_args!("dirty tracking could not be stopped ({why})")));
        }
        let mut report = Report {
            failure,
            transport: self.path.transport().into(),
            lanes: self.path.lanes(),
            total_us,
            setup_us: self.setup.map_or(0, |d| d.as_micros() as u64),
            build_us: self.build_us,
            blackout_us: self.blackout_us,
            spans: self.spans,
            destination_cpu_us: epilogue.as_ref().map(|e| e.cpu_us),
            destination_resident: epilogue.as_ref().map(|e| e.resident),
            remarks: epilogue.and_then(|e| e.remarks),
            throttled_us: throttled.iter().map(|held| held.as_micros() as u64).collect(),
            ..Report::new(verdict, self.ram.len())
        };
        if let Some(precopy) = self.precopy {
            let story = precopy.into_story();
            report.over_limit = story.over_limit;
            report.rounds = story.rounds;
            cpu += story.lane_cpu;
        }
        cpu += self.path.cpu();
        report.declined = self.path.into_declined();
        report.source_cpu_us = cpu.all.as_micros() as u64;
        report.source_user_us = cpu.user.as_micros() as u64;
        self.monitor.end(phase);
        report
    }

    /// What the destination tells afterwards. The guest has moved whether or not it comes.
    fn epilogue(&mut self) -> Option<message::Epilogue> {
        let frame = unwind::catch("epilogue", || Ok(self.path.receive(EPILOGUE)?)).ok()??;
        match Message::decode(&frame) {
            Ok(Message::Epilogue(epilogue)) => Some(epilogue),
            _ => None,
        }
    }
}
