//! Every schedule within bounds: the two state machines as a model for an exhaustive checker.
//!
//! The [simulation](crate::simulation) throws dice and sees many long schedules. This sees *all* schedules,
//! as long as no more than a stated number of things go wrong in each. What runs is the very code that runs
//! in production: [`source::State`](src::State) and [`destination::State`](dst::State), unchanged. The world
//! around them is the model: a wire in each direction, the locks of shared disks, an operator on each side
//! who cancels, and a killer.
//!
//! A fault is any of these: an action fails; a wait ends too early; a message arrives twice; a send reports
//! an error although its bytes arrive; the operator cancels; the line is cut, and each direction loses any
//! number of its youngest messages; a process is killed. What follows from a fault by itself costs nothing
//! more: on a line that is cut, a send may or may not report an error, and a wait ends when the other side
//! can say no more. The source may also replace a transport that breaks, which is a fault too. So is memory
//! that differs between the sides, and an operator's time limit that passes.
//!
//! What is moved is checked as well as who has it: the guest's memory changes while it runs, and once more
//! when its state is saved, as the kernel may then write to it. What the destination runs must have all of
//! that.
//!
//! A schedule begins with the opening of the control link ([`opening`]), of which each step may fail: the
//! line is cut, nothing comes, what comes was changed on the way, the destination has no room, or its verdict
//! arrives although it could not tell it. One side may then have a session that the other knows nothing of.
//! A lane that is refused is a [`Connect`](src::Command::Connect) that fails.
//!
//! Of what an operator orders beside cancelling, the state machines see nothing but how a command ends:
//! waiting before the switchover and switching at once are [`Precopy`](src::Command::Precopy) that ends later
//! or sooner, and a guest that was paused is resumed by a machine that leaves it paused. "The guest runs"
//! here means of such a guest that it is there, to be run by whoever has it.
//!
//! Messages that not every peer knows (a state in parts, digests and hashes of pages, an estimate) are sent
//! where the drivers send them, and a wait goes on after them where the drivers' waits do.
//!
//! `WHIMBREL_MODEL_FAULTS=n` sets how many faults a schedule may have; eight unless told otherwise. The
//! number of states is printed. It grows slowly beyond that, since few faults can be met before somebody
//! gives up.

mod opening;

use crate::failure::{Code, Failure};
use crate::message::{
    self, ChunkDigests, Estimate, Hello, Message, PageHashes, Prepare, Prepared, Ready, Running, StatePart,
};
use crate::{destination as dst, source as src};
use opening::{Opening, Said};
use stateright::{Checker, Expectation, Model, Property};
use std::collections::VecDeque;
use std::time::Instant;

/// Shared disks: with two of them, taking or giving up all of them has a half-way.
const DISKS: usize = 2;

/// Transports that the source may fall back to in one migration.
const REPLACEMENTS: u8 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Side {
    Source,
    Destination,
}

/// A one-way connection: what is on the wire, and whether more can be put there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
struct Wire {
    /// What opens the link, before everything else.
    opening: Said,
    queue: VecDeque<Message>,
    cut: bool,
}

/// A moment of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    source: src::State,
    destination: dst::State,
    /// How far each side has opened the control link. A side begins once that is over.
    source_opening: Opening,
    destination_opening: Opening,
    /// Somebody was let in who had not proved the secret.
    unproved: bool,
    /// The command that each side is carrying out; `None` before it begins, and once the process is dead or
    /// has no session.
    source_command: Option<src::Command>,
    destination_command: Option<dst::Command>,
    /// While the source moves memory: it has had the broken transport retired and waits for the answer.
    retiring: bool,
    to_destination: Wire,
    to_source: Wire,
    /// Who holds each lock; `None` for a guest without disks on shared storage.
    locks: Option<[Option<Side>; DISKS]>,
    /// The destination has marked the disks as used: a source that takes them back can tell.
    claimed: bool,
    source_runs: bool,
    destination_runs: bool,
    destination_ran: bool,
    /// Everything that is in the source's memory has been sent.
    harvested: bool,
    /// The state was sent when that was not so.
    sent_too_early: bool,
    /// The destination has the guest's memory and state, as far as it knows.
    loaded: bool,
    /// It said that it has given up while it still had the guest.
    gave_up_too_early: bool,
    faults_left: u8,
    replacements_left: u8,
}

/// What may happen next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    /// A side's command ends so.
    Step(Side, Luck),
    /// The line is cut; this many messages of each direction still arrive.
    Cut { to_destination: usize, to_source: usize },
    /// `kill -9`.
    Kill(Side),
}

/// How a command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Luck {
    /// As it should; a wait by the next message, or by the news that the line is cut.
    Well,
    /// It fails.
    Fails,
    /// It fails with a part of it done.
    HalfDone,
    /// A wait takes too long.
    Late,
    /// A wait ends by the operator's wish.
    Cancelled,
    /// A wait ends by a message that arrives once more later.
    Twice,
    /// The transport breaks and is to be replaced.
    Replaced,
    /// The transport breaks, and the other side's last message is found instead.
    LastWords,
    /// A wait ends by the operator's time limit.
    Expired,
    /// Memory differs between the sides.
    Differs,
    /// What opens the link was changed on the way.
    Changed,
    /// The destination lets nobody in: it is busy, or does not admit this source.
    NoRoom,
}

/// The bounds of a check, and the rule that is broken on purpose.
struct Bounds {
    arbiter: bool,
    /// Both sides know all messages, and memory is compared.
    newer: bool,
    faults: u8,
    broken: Option<Broken>,
}

/// A rule that is broken on purpose: the checker must find out.
#[derive(Clone, Copy)]
enum Broken {
    Source(src::Sabotage),
    Destination(dst::Sabotage),
    /// The source takes the disks back without looking whether they were used.
    Blind,
    /// The destination lets in whoever calls.
    Credulous,
}

fn hello() -> Hello {
    Hello { software: String::new(), features: 0 }
}

fn failed() -> Failure {
    Failure::new(Code::OTHER, "it failed")
}

fn cut() -> Failure {
    Failure::new(Code::LINK, "the line is cut")
}

impl World {
    fn new(bounds: &Bounds) -> Self {
        let mut source = src::State::new(hello(), bounds.arbiter);
        let mut destination = dst::State::new(hello());
        match bounds.broken {
            Some(Broken::Source(rule)) => source.sabotage = Some(rule),
            Some(Broken::Destination(rule)) => destination.sabotage = Some(rule),
            Some(Broken::Blind | Broken::Credulous) | None => {}
        }
        World {
            source_command: None,
            destination_command: None,
            source_opening: Opening::Calls,
            destination_opening: Opening::AwaitsCall,
            unproved: false,
            source,
            destination,
            retiring: false,
            to_destination: Wire::default(),
            to_source: Wire::default(),
            locks: bounds.arbiter.then_some([Some(Side::Source); DISKS]),
            claimed: false,
            source_runs: true,
            destination_runs: false,
            destination_ran: false,
            harvested: false,
            sent_too_early: false,
            loaded: false,
            gave_up_too_early: false,
            faults_left: bounds.faults,
            replacements_left: REPLACEMENTS,
        }
    }

    fn opening(&self, side: Side) -> Opening {
        match side {
            Side::Source => self.source_opening,
            Side::Destination => self.destination_opening,
        }
    }

    /// Carries on with the opening of the link; begins, or gives it up, when that is over.
    fn open(&mut self, side: Side, luck: Luck, credulous: bool) {
        let (to_source, to_destination) = (&mut self.to_source, &mut self.to_destination);
        match side {
            Side::Source => {
                self.source_opening.step(luck, to_source, to_destination, false);
                match self.source_opening {
                    Opening::Open => self.source_command = Some(self.source.handle(src::Event::Start)),
                    Opening::Closed => {
                        self.source_command = Some(src::Command::Finish(src::Outcome::Stayed(failed())));
                        to_destination.cut = true;
                    }
                    _ => {}
                }
            }
            Side::Destination => {
                self.unproved |= self.destination_opening.step(luck, to_destination, to_source, credulous);
                match self.destination_opening {
                    Opening::Open => {
                        self.destination_command = Some(self.destination.handle(dst::Event::Start));
                    }
                    Opening::Closed => to_source.cut = true,
                    _ => {}
                }
            }
        }
    }

    fn incoming(&self, side: Side) -> &Wire {
        match side {
            Side::Source => &self.to_source,
            Side::Destination => &self.to_destination,
        }
    }

    /// Whether the side will do nothing more before it is sent something.
    fn idle(&self, side: Side) -> bool {
        let nothing_comes = self.incoming(side).len() == 0 && !self.incoming(side).cut;
        if self.opening(side).goes_on() {
            return self.opening(side).waits() && nothing_comes;
        }
        match side {
            Side::Source => match self.source_command {
                None | Some(src::Command::Finish(_)) => true,
                Some(src::Command::Wait(_)) => nothing_comes,
                _ => self.retiring && nothing_comes,
            },
            Side::Destination => match self.destination_command {
                None | Some(dst::Command::Finish(_)) => true,
                Some(dst::Command::Wait(_)) => nothing_comes,
                _ => false,
            },
        }
    }

    /// How a wait of `side` may end.
    fn waits(&self, side: Side, lucks: &mut Vec<Luck>) {
        let wire = self.incoming(side);
        let other = if side == Side::Source { Side::Destination } else { Side::Source };
        if wire.len() > 0 || wire.cut {
            lucks.push(Luck::Well);
        } else if self.idle(other) {
            // Only silence is left.
            lucks.push(Luck::Late);
        }
        if self.faults_left > 0 {
            lucks.push(Luck::Late);
            if self.opening(side).goes_on() {
                self.opening(side).lucks(wire.len() > 0, lucks);
                lucks.dedup();
                return;
            }
            if !wire.queue.is_empty() {
                lucks.push(Luck::Twice);
            }
            if side == Side::Destination || !self.retiring {
                lucks.push(Luck::Cancelled);
            }
            // From `Commit` on, the driver no longer looks at the limit.
            if side == Side::Source && !self.retiring && !self.source.committed() {
                lucks.push(Luck::Expired);
            }
        }
        lucks.dedup();
    }

    /// Whether ending a command so is a fault, or follows by itself.
    fn costs(&self, side: Side, luck: Luck) -> bool {
        let other = if side == Side::Source { Side::Destination } else { Side::Source };
        let outgoing_cut = self.incoming(other).cut;
        let wire = self.incoming(side);
        let sending = match side {
            Side::Source => matches!(self.source_command, Some(src::Command::Send(_))),
            Side::Destination => matches!(self.destination_command, Some(dst::Command::Send(_))),
        };
        let taking = match side {
            Side::Source => matches!(self.source_command, Some(src::Command::TakeDisks)),
            Side::Destination => matches!(self.destination_command, Some(dst::Command::TakeDisks)),
        };
        match luck {
            Luck::Well => false,
            Luck::Late => !(wire.len() == 0 && !wire.cut && self.idle(other)),
            Luck::Fails if sending => !outgoing_cut,
            Luck::Fails if taking => self.can_take(side),
            _ => true,
        }
    }

    fn lucks(&self, side: Side, newer: bool) -> Vec<Luck> {
        let mut lucks = Vec::new();
        match side {
            _ if self.opening(side).waits() => self.waits(side, &mut lucks),
            _ if self.opening(side).goes_on() => self.opening(side).lucks(false, &mut lucks),
            Side::Source => {
                use src::Command;
                match &self.source_command {
                    None | Some(Command::Finish(_)) => {}
                    Some(Command::Wait(_)) => self.waits(side, &mut lucks),
                    Some(Command::Precopy | Command::FinalRound) if self.retiring => {
                        self.waits(side, &mut lucks);
                    }
                    Some(Command::Precopy | Command::FinalRound) => {
                        lucks.extend([Luck::Well, Luck::Fails]);
                        if self.replacements_left > 0 {
                            lucks.push(Luck::Replaced);
                        }
                        if !self.to_source.queue.is_empty() {
                            lucks.push(Luck::LastWords);
                        }
                    }
                    Some(Command::ReleaseDisks) => lucks.extend([Luck::Well, Luck::Fails, Luck::HalfDone]),
                    Some(Command::TakeDisks) if !self.can_take(side) => lucks.push(Luck::Fails),
                    Some(Command::Send(Message::State(_))) if newer => {
                        lucks.extend([Luck::Well, Luck::Fails, Luck::HalfDone]);
                    }
                    // A failure to resume, or to stop, leaves a guest that does not run here.
                    Some(_) => lucks.extend([Luck::Well, Luck::Fails]),
                }
            }
            Side::Destination => {
                use dst::Command;
                match &self.destination_command {
                    None | Some(Command::Finish(_)) => {}
                    Some(Command::Wait(_)) => self.waits(side, &mut lucks),
                    Some(Command::Discard) => lucks.push(Luck::Well),
                    Some(Command::TakeDisks) if !self.can_take(side) => lucks.push(Luck::Fails),
                    Some(Command::Load(_)) if newer => {
                        lucks.extend([Luck::Well, Luck::Fails, Luck::Differs]);
                    }
                    Some(_) => lucks.extend([Luck::Well, Luck::Fails]),
                }
            }
        }
        lucks.retain(|luck| self.faults_left > 0 || !self.costs(side, *luck));
        lucks
    }

    fn can_take(&self, side: Side) -> bool {
        self.locks.is_none_or(|locks| locks.iter().all(|holder| holder.is_none_or(|holder| holder == side)))
    }

    /// Takes all locks that can be taken; false, and none of them, if one cannot.
    fn take(&mut self, side: Side, blind: bool) -> bool {
        if self.locks.is_none() {
            return true;
        }
        if !self.can_take(side) || (side == Side::Source && self.claimed && !blind) {
            self.release(side);
            return false;
        }
        self.locks = Some([Some(side); DISKS]);
        self.claimed |= side == Side::Destination;
        true
    }

    fn release(&mut self, side: Side) {
        self.locks.iter_mut().flatten().filter(|lock| **lock == Some(side)).for_each(|lock| *lock = None);
    }

    fn holds_all(&self, side: Side) -> bool {
        self.locks.is_none_or(|locks| locks.iter().all(|holder| *holder == Some(side)))
    }

    fn put(&mut self, to: Side, message: Message) {
        let wire = if to == Side::Source { &mut self.to_source } else { &mut self.to_destination };
        if !wire.cut {
            wire.queue.push_back(message);
        }
    }

    /// What a wait ends with.
    fn receive(&mut self, side: Side, luck: Luck) -> Result<Message, Failure> {
        let wire = if side == Side::Source { &mut self.to_source } else { &mut self.to_destination };
        match (luck, wire.queue.front()) {
            (Luck::Twice, Some(message)) => Ok(message.clone()),
            (_, Some(_)) => wire.queue.pop_front().ok_or_else(cut),
            (_, None) => Err(cut()),
        }
    }

    fn step_source(&mut self, command: &src::Command, luck: Luck, bounds: &Bounds) -> Option<src::Event> {
        use src::{Command, Event};
        let fails = luck == Luck::Fails;
        Some(match command {
            Command::Finish(_) => return None,
            Command::Wait(waiting) => match luck {
                Luck::Late => Event::Deadline,
                Luck::Cancelled => Event::Cancel,
                Luck::Expired => Event::Failed(failed()),
                luck => match self.receive(Side::Source, luck) {
                    Ok(message) if waiting.goes_on_after(&message) => return None,
                    Ok(message) => Event::Received(message),
                    Err(why) => Event::LinkLost(why),
                },
            },
            Command::Send(message) => {
                if matches!(message, Message::State(_)) {
                    self.sent_too_early = !self.harvested;
                    if bounds.newer {
                        self.put(Side::Destination, Message::StatePart(StatePart(Vec::new())));
                        self.put(Side::Destination, Message::ChunkDigests(ChunkDigests(Vec::new())));
                    }
                }
                if luck == Luck::HalfDone {
                    return Some(Event::LinkLost(cut()));
                }
                self.put(Side::Destination, message.clone());
                if fails { Event::LinkLost(cut()) } else { Event::Done }
            }
            Command::Precopy | Command::FinalRound if self.retiring => {
                self.retiring = false;
                match luck {
                    Luck::Late => Event::Failed(failed()),
                    luck => match self.receive(Side::Source, luck) {
                        // The next transport goes on with the same command.
                        Ok(Message::Retired) => return None,
                        Ok(_) => Event::Failed(failed()),
                        Err(why) => Event::Failed(why),
                    },
                }
            }
            Command::Precopy | Command::FinalRound if luck == Luck::Replaced => {
                self.replacements_left -= 1;
                self.retiring = true;
                self.put(Side::Destination, Message::Retire(String::new()));
                return None;
            }
            Command::Precopy | Command::FinalRound if luck == Luck::LastWords => {
                self.receive(Side::Source, Luck::Well).map_or_else(Event::Failed, Event::Received)
            }
            Command::Resume => {
                if fails {
                    Event::Failed(failed())
                } else {
                    (self.source_runs, self.harvested) = (true, false);
                    Event::Done
                }
            }
            Command::Pause => {
                self.source_runs = false;
                if fails { Event::Failed(failed()) } else { Event::Done }
            }
            Command::ReleaseDisks => match luck {
                Luck::Well => {
                    self.release(Side::Source);
                    Event::Done
                }
                luck => {
                    if luck == Luck::HalfDone
                        && let Some(locks) = &mut self.locks
                    {
                        locks[0] = None;
                    }
                    Event::Failed(failed())
                }
            },
            Command::TakeDisks => {
                if !fails && self.take(Side::Source, matches!(bounds.broken, Some(Broken::Blind))) {
                    Event::Done
                } else {
                    self.release(Side::Source);
                    Event::Failed(failed())
                }
            }
            _ if fails => Event::Failed(failed()),
            Command::Describe => Event::Described(Box::new(Prepare {
                description: Vec::new(),
                layout: Vec::new(),
                transports: Vec::new(),
            })),
            Command::Save => {
                self.harvested = false;
                Event::Saved(Box::new(message::State { state: Vec::new(), digest: None }))
            }
            Command::FinalRound => {
                // A guest that runs goes on writing.
                self.harvested = !self.source_runs;
                Event::Done
            }
            Command::Connect(_) | Command::Precopy => Event::Done,
        })
    }

    fn step_destination(&mut self, command: &dst::Command, luck: Luck, newer: bool) -> Option<dst::Event> {
        use dst::{Command, Event};
        let fails = luck == Luck::Fails;
        Some(match command {
            Command::Finish(_) => return None,
            Command::Wait(waiting) => match luck {
                Luck::Late => Event::Deadline,
                Luck::Cancelled => Event::Cancel,
                luck => match self.receive(Side::Destination, luck) {
                    Ok(message) if waiting.goes_on_after(&message) => return None,
                    Ok(message) => Event::Received(message),
                    Err(why) => Event::LinkLost(why),
                },
            },
            Command::Send(message) => {
                if newer && matches!(message, Message::Prepared(_)) {
                    self.put(Side::Source, Message::Estimate(Estimate { handover_us: 0 }));
                }
                self.gave_up_too_early |= matches!(message, Message::GaveUp(_)) && self.loaded;
                self.put(Side::Source, message.clone());
                if fails { Event::LinkLost(cut()) } else { Event::Done }
            }
            Command::Discard => {
                (self.destination_runs, self.loaded) = (false, false);
                self.release(Side::Destination);
                Event::Done
            }
            Command::TakeDisks => {
                if !fails && self.take(Side::Destination, false) {
                    Event::Done
                } else {
                    self.release(Side::Destination);
                    Event::Failed(failed())
                }
            }
            Command::Load(_) if luck == Luck::Differs => {
                let hashes = PageHashes { region: 0, first_page: 0, hashes: Vec::new() };
                self.put(Side::Source, Message::PageHashes(hashes));
                Event::Failed(failed())
            }
            _ if fails => Event::Failed(failed()),
            Command::Build(_) => Event::Built(Prepared { offers: Vec::new(), build_us: 0 }),
            Command::Fence | Command::Retire(_) => Event::Done,
            Command::Load(_) => {
                self.loaded = true;
                Event::Loaded(Ready { spans: Vec::new() })
            }
            Command::Run => {
                (self.destination_runs, self.destination_ran) = (true, true);
                Event::Started(Running { spans: Vec::new() })
            }
        })
    }

    /// The kernel lets go of the locks and closes the sockets; what was sent still arrives.
    fn kill(&mut self, side: Side) {
        self.release(side);
        match side {
            Side::Source => {
                (self.source_command, self.source_runs, self.retiring) = (None, false, false);
                self.source_opening = Opening::Closed;
                self.to_source.lose(0);
            }
            Side::Destination => {
                (self.destination_command, self.destination_runs) = (None, false);
                self.destination_opening = Opening::Closed;
                self.loaded = false;
                self.to_destination.lose(0);
            }
        }
        (self.to_destination.cut, self.to_source.cut) = (true, true);
    }

    /// Whether somebody rightfully has the guest, or the source says that it does not, when nothing more can
    /// happen.
    fn ends_well(&self) -> bool {
        use src::Outcome;
        if self.source_opening.goes_on() || self.destination_opening.goes_on() {
            return false;
        }
        let source = match &self.source_command {
            None => None,
            Some(src::Command::Finish(outcome)) => Some(outcome),
            Some(_) => return false,
        };
        let dead = match &self.destination_command {
            None => true,
            Some(dst::Command::Finish(_)) => false,
            Some(_) => return false,
        };
        let runs = (self.source_runs, self.destination_runs);
        match source {
            Some(Outcome::Moved) => runs == (false, !dead),
            Some(Outcome::Stayed(_)) => runs == (true, false),
            // The destination runs it, or nobody does, and the source runs nothing.
            Some(Outcome::Held(_)) | None => runs == (false, false) || runs == (false, !dead),
        }
    }
}

impl Model for Bounds {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        for side in [Side::Source, Side::Destination] {
            actions.extend(world.lucks(side, self.newer).into_iter().map(|luck| Action::Step(side, luck)));
        }
        if world.faults_left == 0 {
            return;
        }
        if !world.to_destination.cut || !world.to_source.cut {
            for to_destination in 0..=world.to_destination.len() {
                for to_source in 0..=world.to_source.len() {
                    actions.push(Action::Cut { to_destination, to_source });
                }
            }
        }
        if world.source_command.is_some() || world.source_opening.goes_on() {
            actions.push(Action::Kill(Side::Source));
        }
        if world.destination_command.is_some() || world.destination_opening.goes_on() {
            actions.push(Action::Kill(Side::Destination));
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        match action {
            Action::Cut { to_destination, to_source } => {
                world.faults_left -= 1;
                (world.to_destination.cut, world.to_source.cut) = (true, true);
                world.to_destination.lose(to_destination);
                world.to_source.lose(to_source);
            }
            Action::Kill(side) => {
                world.faults_left -= 1;
                world.kill(side);
            }
            Action::Step(side, luck) => {
                if last.costs(side, luck) {
                    world.faults_left -= 1;
                }
                match side {
                    _ if last.opening(side).goes_on() => {
                        world.open(side, luck, matches!(self.broken, Some(Broken::Credulous)));
                    }
                    Side::Source => {
                        let command = world.source_command.clone()?;
                        if let Some(event) = world.step_source(&command, luck, self) {
                            let next = world.source.handle(event);
                            // The process closes its end; what it sent still arrives.
                            world.to_destination.cut |= matches!(next, src::Command::Finish(_));
                            world.source_command = Some(next);
                        }
                    }
                    Side::Destination => {
                        let command = world.destination_command.clone()?;
                        if let Some(event) = world.step_destination(&command, luck, self.newer) {
                            let next = world.destination.handle(event);
                            world.to_source.cut |= matches!(next, dst::Command::Finish(_));
                            world.destination_command = Some(next);
                        }
                    }
                }
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("the guest never runs at both sides", |_, world: &World| {
                !(world.source_runs && world.destination_runs)
            }),
            Property::always("the source never goes on from older memory", |_, world: &World| {
                !(world.source_runs && world.destination_ran)
            }),
            Property::always("whoever runs the guest has its disks", |_, world: &World| {
                (!world.source_runs || world.holds_all(Side::Source))
                    && (!world.destination_runs || world.holds_all(Side::Destination))
            }),
            Property::always("what runs at the destination has all memory", |_, world: &World| {
                !(world.destination_runs && world.sent_too_early)
            }),
            Property::always("what runs at the destination was loaded", |_, world: &World| {
                !world.destination_runs || world.loaded
            }),
            Property::always("a guest is given back only when it is gone", |_, world: &World| {
                !world.gave_up_too_early
            }),
            Property::always("a session begins with a proof of its secret", |_, world: &World| {
                !world.unproved
            }),
            Property::always("every end has a rightful owner", |model: &Bounds, world: &World| {
                let mut actions = Vec::new();
                model.actions(world, &mut actions);
                !actions.iter().all(|action| matches!(action, Action::Kill(_) | Action::Cut { .. }))
                    || world.ends_well()
            }),
            Property::sometimes("the guest moves", |_, world: &World| {
                matches!(world.source_command, Some(src::Command::Finish(src::Outcome::Moved)))
                    && world.destination_runs
            }),
            Property::sometimes("the guest stays", |_, world: &World| {
                matches!(world.source_command, Some(src::Command::Finish(src::Outcome::Stayed(_))))
                    && world.source_runs
            }),
            Property::sometimes(
                "a session that only the destination knows comes to nothing",
                |_, world: &World| {
                    (world.source_opening, world.destination_opening) == (Opening::Closed, Opening::Open)
                        && matches!(world.destination_command, Some(dst::Command::Finish(_)))
                        && world.source_runs
                },
            ),
            Property::sometimes(
                "a session that only the source knows comes to nothing",
                |_, world: &World| {
                    (world.source_opening, world.destination_opening) == (Opening::Open, Opening::Closed)
                        && world.destination_command.is_none()
                        && matches!(world.source_command, Some(src::Command::Finish(src::Outcome::Stayed(_))))
                        && world.source_runs
                },
            ),
            Property::sometimes("the guest is held", |_, world: &World| {
                matches!(world.source_command, Some(src::Command::Finish(src::Outcome::Held(_))))
            }),
            Property::sometimes("the guest moves over the second transport", |_, world: &World| {
                matches!(world.source_command, Some(src::Command::Finish(src::Outcome::Moved)))
                    && world.replacements_left < REPLACEMENTS
            }),
        ]
    }
}

fn faults() -> u8 {
    std::env::var("WHIMBREL_MODEL_FAULTS").ok().and_then(|text| text.parse().ok()).unwrap_or(8)
}

fn check(arbiter: bool, newer: bool) {
    let began = Instant::now();
    let bounds = Bounds { arbiter, newer, faults: faults(), broken: None };
    let checker = bounds.checker().threads(2).spawn_bfs().join();
    println!(
        "with {} faults, {}, {}: {} states, {} of them different, schedules of up to {} steps, in {:.1} s",
        faults(),
        if arbiter { "disks that decide" } else { "no disks" },
        if newer { "all messages and memory compared" } else { "a peer that knows only the first messages" },
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        began.elapsed().as_secs_f64(),
    );
    checker.assert_properties();
}

#[test]
fn every_schedule_with_disks_that_decide_has_one_owner() {
    check(true, false);
    check(true, true);
}

#[test]
fn every_schedule_without_disks_has_one_owner() {
    check(false, false);
    check(false, true);
}

/// The properties that the checker finds violated when this rule is broken.
fn violated(arbiter: bool, broken: Broken) -> Vec<&'static str> {
    let bounds = Bounds { arbiter, newer: true, faults: 2, broken: Some(broken) };
    let always: Vec<_> =
        bounds.properties().iter().filter(|p| p.expectation == Expectation::Always).map(|p| p.name).collect();
    let checker = bounds.checker().threads(2).spawn_bfs().join();
    let found = checker.discoveries();
    always.into_iter().filter(|name| found.contains_key(name)).collect()
}

#[test]
fn every_broken_rule_is_found() {
    use Broken::{Blind, Credulous, Destination, Source};
    for (arbiter, broken, expected) in [
        (true, Source(src::Sabotage::ResumeAfterCommit), "whoever runs the guest has its disks"),
        (false, Source(src::Sabotage::ResumeAfterCommit), "the guest never runs at both sides"),
        (false, Source(src::Sabotage::SaveLast), "what runs at the destination has all memory"),
        (false, Source(src::Sabotage::PauseLast), "what runs at the destination has all memory"),
        (true, Source(src::Sabotage::ResumeWithoutDisks), "whoever runs the guest has its disks"),
        (false, Destination(dst::Sabotage::RunWithoutCommit), "the guest never runs at both sides"),
        (true, Destination(dst::Sabotage::RunWithoutDisks), "whoever runs the guest has its disks"),
        (false, Destination(dst::Sabotage::ReadyWithoutState), "what runs at the destination was loaded"),
        (false, Destination(dst::Sabotage::GiveUpFirst), "a guest is given back only when it is gone"),
        (false, Credulous, "a session begins with a proof of its secret"),
        (true, Blind, "the source never goes on from older memory"),
    ] {
        let found = violated(arbiter, broken);
        assert!(found.contains(&expected), "{expected:?} is not among what was found: {found:?}");
    }
}
