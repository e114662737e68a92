//! A moment of a migration as the model sees it: both state machines, the wires, the locks, and who runs.

use super::luck::Luck;
use super::opening::{Opening, Said};
use super::step::failed;
use super::{Bounds, Broken};
use crate::message::{Hello, Message};
use crate::{destination as dst, source as src};
use std::collections::VecDeque;

/// Shared disks: with two of them, taking or giving up all of them has a half-way.
const DISKS: usize = 2;

/// Transports that the source may fall back to in one migration.
pub(super) const REPLACEMENTS: u8 = 1;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Side {
    Source,
    Destination,
}

/// A one-way connection: what is on the wire, and whether more can be put there.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Wire {
    /// What opens the link, before everything else.
    pub opening: Said,
    pub queue: VecDeque<Message>,
    pub cut: bool,
}

/// A moment of a migration.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct World {
    pub source: src::State,
    pub destination: dst::State,
    /// How far each side has opened the control link. A side begins once that is over.
    pub source_opening: Opening,
    pub destination_opening: Opening,
    /// Somebody was let in who had not proved the secret.
    pub unproved: bool,
    /// The command that each side is carrying out; `None` before it begins, and once the process is dead or
    /// has no session.
    pub source_command: Option<src::Command>,
    pub destination_command: Option<dst::Command>,
    /// While the source moves memory: it has had the broken transport retired and waits for the answer.
    pub retiring: bool,
    pub to_destination: Wire,
    pub to_source: Wire,
    /// Who holds each lock; `None` for a guest without disks on shared storage.
    pub locks: Option<[Option<Side>; DISKS]>,
    /// The destination has marked the disks as used: a source that takes them back can tell.
    pub claimed: bool,
    pub source_runs: bool,
    pub destination_runs: bool,
    pub destination_ran: bool,
    /// Everything that is in the source's memory has been sent.
    pub harvested: bool,
    /// The state was sent when that was not so.
    pub sent_too_early: bool,
    /// The destination has the guest's memory and state, as far as it knows.
    pub loaded: bool,
    /// It said that it has given up while it still had the guest.
    pub gave_up_too_early: bool,
    pub faults_left: u8,
    pub replacements_left: u8,
}

fn hello() -> Hello {
    Hello { software: String::new(), features: 0 }
}

impl World {
    pub fn new(bounds: &Bounds) -> Self {
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

    pub fn opening(&self, side: Side) -> Opening {
        match side {
            Side::Source => self.source_opening,
            Side::Destination => self.destination_opening,
        }
    }

    /// Carries on with the opening of the link; begins, or gives it up, when that is over.
    pub fn open(&mut self, side: Side, luck: Luck, credulous: bool) {
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

    pub fn incoming(&self, side: Side) -> &Wire {
        match side {
            Side::Source => &self.to_source,
            Side::Destination => &self.to_destination,
        }
    }

    /// Whether the side will do nothing more before it is sent something.
    pub fn idle(&self, side: Side) -> bool {
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

    pub fn can_take(&self, side: Side) -> bool {
        self.locks.is_none_or(|locks| locks.iter().all(|holder| holder.is_none_or(|holder| holder == side)))
    }

    /// Takes all locks that can be taken; false, and none of them, if one cannot.
    pub fn take(&mut self, side: Side, blind: bool) -> bool {
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

    pub fn release(&mut self, side: Side) {
        self.locks.iter_mut().flatten().filter(|lock| **lock == Some(side)).for_each(|lock| *lock = None);
    }

    pub fn holds_all(&self, side: Side) -> bool {
        self.locks.is_none_or(|locks| locks.iter().all(|holder| *holder == Some(side)))
    }

    pub fn put(&mut self, to: Side, message: Message) {
        let wire = if to == Side::Source { &mut self.to_source } else { &mut self.to_destination };
        if !wire.cut {
            wire.queue.push_back(message);
        }
    }

    /// The kernel lets go of the locks and closes the sockets; what was sent still arrives.
    pub fn kill(&mut self, side: Side) {
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
    pub fn ends_well(&self) -> bool {
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
