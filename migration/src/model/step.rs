//! What a command does to the world, and the event that it ends with.

use super::luck::Luck;
use super::world::{Side, World};
use super::{Bounds, Broken};
use crate::failure::{Code, Failure};
use crate::message::{
    self, ChunkDigests, Estimate, Message, PageHashes, Prepare, Prepared, Ready, Running, StatePart,
};
use crate::{destination as dst, source as src};

pub(super) fn failed() -> Failure {
    Failure::new(Code::OTHER, "it failed")
}

fn cut() -> Failure {
    Failure::new(Code::LINK, "the line is cut")
}

impl World {
    /// What a wait ends with.
    fn receive(&mut self, side: Side, luck: Luck) -> Result<Message, Failure> {
        let wire = if side == Side::Source { &mut self.to_source } else { &mut self.to_destination };
        match (luck, wire.queue.front()) {
            (Luck::Twice, Some(message)) => Ok(message.clone()),
            (_, Some(_)) => wire.queue.pop_front().ok_or_else(cut),
            (_, None) => Err(cut()),
        }
    }

    pub fn step_source(&mut self, command: &src::Command, luck: Luck, bounds: &Bounds) -> Option<src::Event> {
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

    pub fn step_destination(
        &mut self,
        command: &dst::Command,
        luck: Luck,
        newer: bool,
    ) -> Option<dst::Event> {
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
}
