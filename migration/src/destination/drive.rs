//! Carries the destination's state machine out with a real machine, link and transports.

use super::Arrival;
use super::migration::Timeouts;
use super::monitor::{Monitor, Phase};
use super::state::{Command, Event, Outcome, State, Waiting};
use crate::cpu::thread_cpu;
use crate::digest;
use crate::failure::{Code, Failure, printable};
use crate::link::{ControlLink, LinkError};
use crate::machine::{Arbiter, DestinationHost, DestinationMachine};
use crate::message::{
    self, Estimate, HANDOVER_ESTIMATE, Hello, MAX_OFFERS, MAX_STATE, Message, Offer, Prepare, Prepared,
    Ready, Running, SAYS_THAT_IT_WAITS, StatePart,
};
use crate::report::Span;
use crate::scan;
use crate::transport::{COVERAGE_UNIT, DestinationPlane, DestinationTransport, PlaneError, Session};
use crate::unwind;
use std::time::{Duration, Instant};

/// How often a wait looks whether data still arrives, and whether it has been cancelled. Messages wake it at
/// once.
const POLL: Duration = Duration::from_millis(50);

/// How much different memory has to come while a source is waited for as long as it may be silent: more than
/// one page can be, however often it comes, and less than the slowest network carries.
const MIN_NEWS: u64 = 2 * COVERAGE_UNIT;

/// How many times as long a source may repeat itself that cannot say that it waits.
const PATIENCE_WITH_THE_MUTE: u32 = 10;

/// What has come since it was last looked whether the source gets on.
struct News {
    patience: Duration,
    since: Instant,
    /// Bytes that had been placed by then.
    placed: u64,
    /// A message has come.
    spoke: bool,
}

impl News {
    fn new(patience: Duration) -> Self {
        News { patience, since: Instant::now(), placed: 0, spoke: false }
    }
}

/// What the VMM chose.
pub(super) struct Options {
    pub(super) software: String,
    pub(super) timeouts: Timeouts,
}

/// Takes in the guest that the source at the other end of `link` sends.
pub(super) fn drive<'a, 'o, H: DestinationHost>(
    host: &'a mut H,
    link: &'a mut dyn ControlLink,
    transports: Vec<Box<dyn DestinationTransport>>,
    options: &'o Options,
    monitor: &'o Monitor,
) -> Result<Arrival<'a, H::Machine>, Failure> {
    let cpu = thread_cpu();
    let hello = Hello { software: options.software.clone(), features: message::FEATURES };
    let mut driver = Driver {
        host,
        link,
        transports,
        timeouts: &options.timeouts,
        monitor,
        sender: String::new(),
        features: 0,
        machine: None,
        planes: Vec::new(),
        parts: Vec::new(),
        chunks: None,
        retired: 0,
        receiving_since: None,
        fence: None,
    };
    let mut state = State::new(hello);
    let mut command = state.handle(Event::Start);
    let outcome = loop {
        if let Command::Finish(outcome) = command {
            break outcome;
        }
        let event = driver.carry_out(command);
        command = state.handle(event);
    };
    let plane_cpu: u64 = driver.planes.iter().map(|p| p.cpu_us()).sum();
    let cpu = thread_cpu().since(cpu).all + Duration::from_micros(plane_cpu);
    let Driver { link, sender, machine, .. } = driver;
    match (outcome, machine) {
        (Outcome::Running, Some(mut machine)) => {
            // The guest runs: it does not end because the network cannot be told.
            let _ = unwind::catch("announce", || {
                machine.announce();
                Ok(())
            });
            monitor.enter(Phase::Arrived);
            Ok(Arrival::new(machine, link, sender, cpu))
        }
        (Outcome::Running, None) => Err(Failure::new(Code::OTHER, "the machine is gone")),
        (Outcome::Discarded(why), _) => {
            monitor.enter(Phase::Discarded);
            Err(why)
        }
    }
}

struct Driver<'a, 'o, H: DestinationHost> {
    host: &'a mut H,
    link: &'a mut dyn ControlLink,
    transports: Vec<Box<dyn DestinationTransport>>,
    timeouts: &'o Timeouts,
    monitor: &'o Monitor,
    sender: String,
    /// Feature bits that both sides have.
    features: u64,
    /// Dropped after the planes that write into its RAM.
    machine: Option<H::Machine>,
    planes: Vec<Box<dyn DestinationPlane>>,
    /// What has arrived of a state that comes in parts.
    parts: Vec<u8>,
    /// The source's digests of the chunks of RAM, if it sent them.
    chunks: Option<Vec<u64>>,
    /// How often the source has changed its transport.
    retired: usize,
    /// When memory was first waited for.
    receiving_since: Option<Instant>,
    fence: Option<Span>,
}

fn not_shut_out(error: PlaneError) -> Failure {
    Failure::from(error).context("the data plane cannot be shut out of memory")
}

fn timed<T>(name: &str, work: impl FnOnce() -> T) -> (T, Span) {
    let began = Instant::now();
    let result = work();
    (result, Span { name: name.into(), us: began.elapsed().as_micros() as u64 })
}

impl<H: DestinationHost> Driver<'_, '_, H> {
    /// Carries a command out. If somebody else's code panics in it, it has failed.
    ///
    /// A panic while the machine is dropped goes on to the caller instead. Nobody knows what of the machine
    /// is left, so `GaveUp` must not be said.
    fn carry_out(&mut self, command: Command) -> Event {
        let (step, panicked): (_, fn(Failure) -> Event) = match command {
            Command::Discard | Command::Finish(_) => return self.perform(command),
            Command::Wait(_) => ("wait for a message", Event::LinkLost),
            Command::Send(_) => ("send a message", Event::LinkLost),
            Command::Build(_) => ("build", Event::Failed),
            Command::Retire(_) | Command::Fence => ("fence", Event::Failed),
            Command::Load(_) => ("load state", Event::Failed),
            Command::TakeDisks => ("take disks", Event::Failed),
            Command::Run => ("run", Event::Failed),
        };
        unwind::catch(step, || Ok(self.perform(command))).unwrap_or_else(panicked)
    }

    fn perform(&mut self, command: Command) -> Event {
        let result = match command {
            Command::Wait(waiting) => return self.wait(waiting),
            Command::Send(message) => {
                return match self.send(&message) {
                    Ok(()) => Event::Done,
                    Err(error) => Event::LinkLost(error.into()),
                };
            }
            Command::Build(prepare) => self.build(&prepare).map(Event::Built),
            Command::Retire(name) => self.retire(&name).map(|()| Event::Done),
            Command::Fence => self.fence().map(|()| Event::Done),
            Command::Load(state) => self.load(&state).map(Event::Loaded),
            Command::TakeDisks => {
                self.monitor.enter(Phase::Committed);
                self.with_machine(|machine| machine.arbiter().map_or(Ok(()), Arbiter::take))
                    .map(|()| Event::Done)
            }
            Command::Run => {
                let (result, span) = timed("run", || self.with_machine(H::Machine::run));
                result.map(|()| Event::Started(Running { spans: vec![span] }))
            }
            Command::Discard => {
                // The planes first: their threads and devices write into the machine's RAM.
                self.planes.clear();
                self.machine = None;
                self.parts = Vec::new();
                Ok(Event::Done)
            }
            Command::Finish(_) => Ok(Event::Done),
        };
        result.unwrap_or_else(Event::Failed)
    }

    /// Sends a message, and before `Prepared` what the machine expects of the switchover.
    fn send(&mut self, message: &Message) -> Result<(), LinkError> {
        if matches!(message, Message::Prepared(_))
            && self.features & HANDOVER_ESTIMATE != 0
            && let Some(estimate) = self.machine.as_ref().and_then(DestinationMachine::handover_estimate)
        {
            let estimate = Estimate { handover_us: estimate.as_micros() as u64 };
            self.link.send(&Message::Estimate(estimate).encode())?;
        }
        self.link.send(&message.encode())
    }

    fn with_machine(
        &mut self,
        work: impl FnOnce(&mut H::Machine) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        match &mut self.machine {
            Some(machine) => work(machine),
            None => Err(Failure::new(Code::PROTOCOL, "there is no machine yet")),
        }
    }

    fn build(&mut self, prepare: &Prepare) -> Result<Prepared, Failure> {
        let began = Instant::now();
        let machine = self.host.build(&prepare.description, &prepare.layout)?;
        let ram = machine.ram();
        self.monitor.built(ram.len());
        if ram.layout() != prepare.layout {
            return Err(Failure::new(
                Code::MEMORY,
                "the memory layout that was asked for does not fit the machine",
            ));
        }
        if !machine.memory_is_zero() {
            scan::make_zero(&ram);
        }
        let session =
            Session::new(self.link.token(), ram, self.timeouts.data).with_secret(self.link.secret());
        self.machine = Some(machine);
        let mut offers = Vec::new();
        for transport in
            self.transports.iter_mut().filter(|t| prepare.transports.iter().any(|n| n == t.name()))
        {
            let details = match transport.offer(&session) {
                Ok((details, plane)) => {
                    self.planes.push(plane);
                    Ok(details)
                }
                Err(why) => Err(why.into()),
            };
            offers.push(Offer { transport: transport.name().into(), details });
        }
        Ok(Prepared { offers, build_us: began.elapsed().as_micros() as u64 })
    }

    /// Fences one plane; an unknown name is as good as fenced.
    fn retire(&mut self, name: &str) -> Result<(), Failure> {
        self.retired += 1;
        if self.retired > MAX_OFFERS {
            return Err(Failure::new(Code::PROTOCOL, "the source has changed its transport too often"));
        }
        let mut named = self.planes.iter_mut().filter(|plane| plane.name() == name);
        named.try_for_each(|plane| plane.fence()).map_err(not_shut_out)
    }

    fn fence(&mut self) -> Result<(), Failure> {
        let (result, span) = timed("fence", || self.planes.iter_mut().try_for_each(|plane| plane.fence()));
        self.fence = Some(span);
        result.map_err(not_shut_out)
    }

    fn load(&mut self, state: &message::State) -> Result<Ready, Failure> {
        let mut spans: Vec<Span> = self.fence.take().into_iter().collect();
        if let Some(theirs) = state.digest {
            let machine = self.machine.as_ref().ok_or_else(|| Failure::new(Code::PROTOCOL, "no machine"))?;
            let ram = machine.ram();
            let ((ours, chunks), span) = timed("compare memory", || digest::of(&ram));
            spans.push(span);
            if ours != theirs {
                for hashes in digest::suspects(&ram, &chunks, self.chunks.as_deref().unwrap_or_default()) {
                    // If the link is lost, the source learns less of what is wrong.
                    let _ = self.link.send(&Message::PageHashes(hashes).encode());
                }
                return Err(Failure::new(
                    Code::DIGEST,
                    format_args!(
                        "memory differs between the sides after the last barrier ({} non-zero pages there, {} here)",
                        theirs.pages, ours.pages
                    ),
                ));
            }
        }
        let (result, span) = timed("load state", || self.with_machine(|m| m.load(&state.state)));
        spans.push(span);
        result.map(|()| Ready { spans })
    }

    fn wait(&mut self, waiting: Waiting) -> Event {
        let limit = match waiting {
            Waiting::Hello | Waiting::Prepare | Waiting::Commit => self.timeouts.answer,
            Waiting::State => {
                self.monitor.enter(Phase::Receiving);
                self.timeouts.silence
            }
        };
        let began = Instant::now();
        let mut deadline = began + limit;
        if waiting == Waiting::State {
            self.receiving_since.get_or_insert(began);
        }
        let mut news = News::new(self.news_patience(limit));
        let mut placed = 0;
        loop {
            // Even if a message is there already: one that says `Commit` is answered by `GaveUp`, and the
            // guest goes back.
            if self.monitor.cancelled() {
                return Event::Cancel;
            }
            let now = Instant::now();
            let left = deadline.saturating_duration_since(now);
            if left.is_zero() {
                return Event::Deadline;
            }
            if waiting == Waiting::State
                && let Err(why) = self.gets_on(&mut news, now)
            {
                return Event::LinkLost(why);
            }
            let frame = match self.link.receive(left.min(POLL)) {
                Ok(frame) => frame,
                Err(error) => return Event::LinkLost(error.into()),
            };
            let placed_before = placed;
            placed = self.planes.iter().map(|p| p.bytes_placed()).sum();
            self.monitor.placed(placed);
            let spoke = frame.is_some();
            let alive = match frame.map(|frame| self.received(&frame, waiting)) {
                Some(Ok(Some(message))) => return Event::Received(message),
                Some(Err(why)) => return Event::LinkLost(why),
                Some(Ok(None)) => true,
                None => waiting == Waiting::State && placed != placed_before,
            };
            news.spoke |= spoke;
            if alive {
                deadline = Instant::now() + limit;
            }
        }
    }

    /// How long the source may send nothing new.
    fn news_patience(&self, silence: Duration) -> Duration {
        if self.features & SAYS_THAT_IT_WAITS != 0 { silence } else { silence * PATIENCE_WITH_THE_MUTE }
    }

    /// Fails for a source that sends next to nothing, or the same few pages again and again, and does not say
    /// that it waits; and for one that takes too long altogether.
    fn gets_on(&self, news: &mut News, now: Instant) -> Result<(), Failure> {
        let failed = |text: std::fmt::Arguments<'_>| Err(Failure::new(Code::TIMEOUT, text));
        if self.receiving_since.is_some_and(|since| now.duration_since(since) >= self.timeouts.whole) {
            return failed(format_args!(
                "the source has not come to the switchover within {:?}",
                self.timeouts.whole
            ));
        }
        if now.duration_since(news.since) < news.patience {
            return Ok(());
        }
        let covered: Option<u64> = self.planes.iter().map(|plane| plane.newly_covered()).sum();
        let all: u64 = self.planes.iter().map(|plane| plane.bytes_placed()).sum();
        let covered = covered.unwrap_or(all.saturating_sub(news.placed));
        if !news.spoke && covered < self.monitor.progress().memory.min(MIN_NEWS) {
            return failed(format_args!(
                "the source makes no progress: for {:?} it has sent no more than {} KiB of different memory",
                news.patience,
                covered >> 10
            ));
        }
        *news = News { since: now, placed: all, ..News::new(news.patience) };
        Ok(())
    }

    /// The message in a frame, or `None` if more has to come: it is a part of a state, or only says that the
    /// source is there.
    fn received(&mut self, frame: &[u8], waiting: Waiting) -> Result<Option<Message>, Failure> {
        let message = Message::decode(frame)?;
        let goes_on = waiting.goes_on_after(&message);
        match message {
            Message::StatePart(part) if goes_on => append(&mut self.parts, &part).map(|()| None),
            Message::ChunkDigests(chunks) if goes_on && self.chunks.is_none() => {
                self.chunks = Some(chunks.0);
                Ok(None)
            }
            Message::Waiting if goes_on => Ok(None),
            Message::State(last) => {
                self.monitor.enter(Phase::Switchover);
                self.whole(last).map(|state| Some(Message::State(state)))
            }
            Message::Hello(hello) => {
                self.sender = printable(hello.software.clone());
                self.features = hello.features & message::FEATURES;
                Ok(Some(Message::Hello(hello)))
            }
            message => Ok(Some(message)),
        }
    }

    /// The whole state, of which `last` has the end.
    fn whole(&mut self, mut last: message::State) -> Result<message::State, Failure> {
        if !self.parts.is_empty() {
            append(&mut self.parts, &StatePart(std::mem::take(&mut last.state)))?;
            last.state = std::mem::take(&mut self.parts);
        }
        Ok(last)
    }
}

/// Adds a part of a state to those before it, if there may be so much.
fn append(parts: &mut Vec<u8>, StatePart(part): &StatePart) -> Result<(), Failure> {
    if parts.len() + part.len() > MAX_STATE {
        return Err(Failure::new(
            Code::PROTOCOL,
            format_args!("the machine's state is longer than {MAX_STATE} bytes, the most that is taken"),
        ));
    }
    parts.extend_from_slice(part);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_without_an_end_is_refused_before_memory_is_taken_for_it() {
        // Zeros that nobody has touched: address space, no memory.
        let mut parts = vec![0; MAX_STATE - 1];
        append(&mut parts, &StatePart(vec![1])).unwrap();
        assert_eq!(append(&mut parts, &StatePart(vec![1])).unwrap_err().code, Code::PROTOCOL);
    }
}
