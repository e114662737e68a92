//! Carries the destination's state machine out with a real machine, link and transports.

use super::state::{Command, Event, Outcome, State, Waiting};
use crate::digest;
use crate::failure::{Code, Failure};
use crate::link::ControlLink;
use crate::machine::{DestinationHost, DestinationMachine};
use crate::memory::{PAGE_SIZE, Ram};
use crate::message::{
    self, Epilogue, Hello, MAX_TESTIMONY, Message, Offer, Prepare, Prepared, Ready, Running, Span,
};
use crate::report::thread_cpu;
use crate::scan;
use crate::transport::{DestinationPlane, DestinationTransport, PlaneError, Session, Token};
use std::time::{Duration, Instant};

/// How often a long wait looks whether data still arrives.
const ACTIVITY_POLL: Duration = Duration::from_millis(500);

/// How long the source may be silent.
#[derive(Clone, Debug)]
pub struct Timeouts {
    /// Between the messages of the beginning, and for `Commit`.
    pub answer: Duration,
    /// While data is expected: with neither data nor a message.
    pub silence: Duration,
    /// Waiting for a barrier's confirmation to be taken off our hands, and the like.
    pub data: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Timeouts {
            answer: Duration::from_secs(10),
            silence: Duration::from_secs(60),
            data: Duration::from_secs(10),
        }
    }
}

/// A guest that has arrived and runs.
pub struct Arrival<M> {
    /// The machine.
    pub machine: M,
    /// Who sent it, as the source called itself.
    pub sender: String,
    cpu: Duration,
}

impl<M: DestinationMachine> Arrival<M> {
    /// Tells the source what the guest says of its move. Takes up to a second; losing the link
    /// meanwhile changes nothing.
    pub fn conclude(&mut self, link: &mut dyn ControlLink) -> Option<String> {
        let testimony = self.machine.testimony().filter(|t| t.len() <= MAX_TESTIMONY);
        let epilogue = Epilogue {
            testimony: testimony.clone(),
            cpu_us: self.cpu.as_micros() as u64,
            resident: resident(&self.machine.ram()),
        };
        // The guest runs here whether or not the source hears of it.
        let _ = link.send(&Message::Epilogue(epilogue).encode());
        testimony
    }
}

/// Takes in the guest that the source at the other end of `link` sends. Returns when it runs here,
/// or with the reason why it never will.
///
/// # Errors
/// The reason; the shadow machine has been discarded.
pub fn receive<H: DestinationHost>(
    host: &mut H,
    link: &mut dyn ControlLink,
    token: Token,
    transports: &mut [Box<dyn DestinationTransport>],
    software: &str,
    timeouts: &Timeouts,
) -> Result<Arrival<H::Machine>, Failure> {
    let cpu = thread_cpu();
    let hello = Hello { software: software.to_string(), features: message::FEATURES };
    let mut driver = Driver {
        host,
        link,
        token,
        transports,
        timeouts,
        sender: String::new(),
        machine: None,
        planes: Vec::new(),
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
    match (outcome, driver.machine) {
        (Outcome::Running, Some(mut machine)) => {
            machine.announce();
            Ok(Arrival { machine, sender: driver.sender, cpu })
        }
        (Outcome::Running, None) => Err(Failure::new(Code::OTHER, "the machine is gone")),
        (Outcome::Discarded(why), _) => Err(why),
    }
}

/// Bytes of RAM that exist in memory.
fn resident(ram: &Ram) -> u64 {
    let mut pages = 0;
    for region in ram.regions() {
        scan::existing(region, 0, region.pages(), |_, n| pages += n);
    }
    pages * PAGE_SIZE
}

struct Driver<'a, H: DestinationHost> {
    host: &'a mut H,
    link: &'a mut dyn ControlLink,
    token: Token,
    transports: &'a mut [Box<dyn DestinationTransport>],
    timeouts: &'a Timeouts,
    sender: String,
    /// Dropped after the planes that write into its RAM.
    machine: Option<H::Machine>,
    planes: Vec<Box<dyn DestinationPlane>>,
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

impl<H: DestinationHost> Driver<'_, H> {
    fn carry_out(&mut self, command: Command) -> Event {
        let result = match command {
            Command::Wait(waiting) => return self.wait(waiting),
            Command::Send(message) => {
                return match self.link.send(&message.encode()) {
                    Ok(()) => Event::Done,
                    Err(error) => Event::LinkLost(error.into()),
                };
            }
            Command::Build(prepare) => self.build(&prepare).map(Event::Built),
            Command::Retire(name) => self.retire(&name).map(|()| Event::Done),
            Command::Fence => self.fence().map(|()| Event::Done),
            Command::Load(state) => self.load(&state).map(Event::Loaded),
            Command::TakeDisks => self.with_machine(H::Machine::take_disks).map(|()| Event::Done),
            Command::Run => {
                let (result, span) = timed("run", || self.with_machine(H::Machine::run));
                result.map(|()| Event::Started(Running { spans: vec![span] }))
            }
            Command::Discard => {
                // The planes first: their threads and devices write into the machine's RAM.
                self.planes.clear();
                self.machine = None;
                Ok(Event::Done)
            }
            Command::Finish(_) => Ok(Event::Done),
        };
        result.unwrap_or_else(Event::Failed)
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
        if ram.layout() != prepare.layout {
            return Err(Failure::new(
                Code::MEMORY,
                "the memory layout that was asked for does not fit the machine",
            ));
        }
        let session = Session { token: self.token, ram, timeout: self.timeouts.data };
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
            let (ours, span) = timed("compare memory", || digest::of(&machine.ram()));
            spans.push(span);
            if ours != theirs {
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
            Waiting::State => self.timeouts.silence,
        };
        let mut deadline = Instant::now() + limit;
        let mut placed = 0;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Event::Deadline;
            }
            match self.link.receive(left.min(ACTIVITY_POLL)) {
                Ok(Some(frame)) => return self.received(&frame),
                Ok(None) if waiting == Waiting::State => {
                    let now_placed: u64 = self.planes.iter().map(|p| p.bytes_placed()).sum();
                    if now_placed != placed {
                        placed = now_placed;
                        deadline = Instant::now() + limit;
                    }
                }
                Ok(None) => {}
                Err(error) => return Event::LinkLost(error.into()),
            }
        }
    }

    fn received(&mut self, frame: &[u8]) -> Event {
        match Message::decode(frame) {
            Ok(Message::Hello(hello)) => {
                self.sender = Failure::new(Code::OTHER, &hello.software).message;
                Event::Received(Message::Hello(hello))
            }
            Ok(message) => Event::Received(message),
            Err(why) => Event::LinkLost(why),
        }
    }
}
