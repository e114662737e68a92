//! How a command may end, and which ends are faults.

use super::world::{Side, World};
use crate::message::Message;
use crate::{destination as dst, source as src};

/// How a command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Luck {
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

impl World {
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
    pub fn costs(&self, side: Side, luck: Luck) -> bool {
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

    pub fn lucks(&self, side: Side, newer: bool) -> Vec<Luck> {
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
}
