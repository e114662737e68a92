//! The way to the destination: the control link, the data plane, and the change of planes in mid-flight.

use crate::cpu::CpuTime;
use crate::failure::{Code, Failure};
use crate::link::{ControlLink, LinkError};
use crate::message::{Message, Offer};
use crate::monitor::Monitor;
use crate::report::Declined;
use crate::transport::{LaneStats, Session, SourcePlane, SourceTransport};
use std::collections::VecDeque;
use std::time::Duration;

/// A transport that both sides have, and has not been tried.
struct Candidate {
    transport: Box<dyn SourceTransport>,
    offer: Vec<u8>,
}

/// Everything that leads to the destination.
pub(super) struct Path<'a> {
    link: &'a mut dyn ControlLink,
    session: Session,
    monitor: &'a Monitor,
    /// How long the destination may take to fence a plane that broke.
    fence_patience: Duration,
    /// Before they are offered.
    transports: Vec<Box<dyn SourceTransport>>,
    /// `None` before one is connected, and after one broke and nothing could take its place.
    plane: Option<Box<dyn SourcePlane>>,
    /// What could take its place.
    candidates: VecDeque<Candidate>,
    /// Whether the destination's memory is as it was built: nothing has been written to it by a
    /// plane that broke.
    fresh: bool,
    /// Transports that are not used, and why.
    declined: Vec<Declined>,
    /// What the threads of planes that broke had used.
    gone_cpu: CpuTime,
}

impl<'a> Path<'a> {
    pub(super) fn new(
        link: &'a mut dyn ControlLink,
        transports: Vec<Box<dyn SourceTransport>>,
        session: Session,
        monitor: &'a Monitor,
        fence_patience: Duration,
    ) -> Self {
        Path {
            link,
            session,
            monitor,
            fence_patience,
            transports,
            plane: None,
            candidates: VecDeque::new(),
            fresh: true,
            declined: Vec::new(),
            gone_cpu: CpuTime::default(),
        }
    }

    /// Sends one frame of the control link.
    ///
    /// # Errors
    /// As [`ControlLink::send`].
    pub(super) fn send(&mut self, frame: &[u8]) -> Result<(), LinkError> {
        self.link.send(frame)
    }

    /// Receives one frame of the control link.
    ///
    /// # Errors
    /// As [`ControlLink::receive`].
    pub(super) fn receive(&mut self, wait: Duration) -> Result<Option<Vec<u8>>, LinkError> {
        self.link.receive(wait)
    }

    /// Names of the transports to ask the destination for, best first.
    pub(super) fn names(&self) -> Vec<String> {
        self.transports.iter().map(|t| t.name().to_string()).collect()
    }

    /// Connects the first transport that the destination offers and that works. Every one that does not is
    /// declined.
    ///
    /// # Errors
    /// [`Code::TRANSPORT`] when none works, with all the reasons.
    pub(super) fn connect(&mut self, mut offers: Vec<Offer>) -> Result<(), Failure> {
        for transport in std::mem::take(&mut self.transports) {
            let name = transport.name();
            let found = offers.iter().position(|o| o.transport == name).map(|at| offers.swap_remove(at));
            match found.map(|offer| offer.details) {
                Some(Ok(offer)) => self.candidates.push_back(Candidate { transport, offer }),
                Some(Err(why)) => self.decline(name, why.bounded().context("the destination")),
                None => {
                    let why = Failure::new(Code::TRANSPORT, "the destination does not know this transport");
                    self.decline(name, why);
                }
            }
        }
        self.plane = Some(self.first_that_works()?);
        Ok(())
    }

    /// Puts the next candidate in the place of a plane that broke with `why`. In between, the destination
    /// fences the broken one off: what that still has in the network must not land on top of what the next
    /// one brings.
    ///
    /// # Errors
    /// `why` itself, when there is no other transport or the migration is to stop; or why the destination
    /// does not fence.
    pub(super) fn replace(&mut self, why: Failure) -> Result<(), Failure> {
        let broken = matches!(why.code, Code::TRANSPORT | Code::TIMEOUT | Code::PROTOCOL);
        if !broken || self.candidates.is_empty() || self.monitor.stopped().is_some() {
            return Err(why);
        }
        let before = why.clone();
        // Dropped before anything else: nothing leaves it any more.
        if let Some(plane) = self.plane.take() {
            let name = plane.name();
            self.gone_cpu += plane.cpu();
            drop(plane);
            self.decline(name, why);
            self.retire(name)?;
        }
        self.fresh = false;
        self.plane = Some(self.first_that_works().map_err(|_| before)?);
        Ok(())
    }

    /// The plane in use.
    ///
    /// # Errors
    /// [`Code::TRANSPORT`] when there is none.
    pub(super) fn plane(&mut self) -> Result<&mut (dyn SourcePlane + 'static), Failure> {
        self.plane.as_deref_mut().ok_or_else(|| Failure::new(Code::TRANSPORT, "no data plane"))
    }

    /// Whether nothing has been written to the destination's memory by a plane that broke.
    pub(super) fn fresh(&self) -> bool {
        self.fresh
    }

    /// CPU time of all planes' own threads.
    pub(super) fn cpu(&self) -> CpuTime {
        let mut cpu = self.gone_cpu;
        cpu += self.plane.as_ref().map_or_else(CpuTime::default, |plane| plane.cpu());
        cpu
    }

    /// The transport in use; empty if there is none.
    pub(super) fn transport(&self) -> &'static str {
        self.plane.as_ref().map_or("", |plane| plane.name())
    }

    /// Counters of the lanes in use.
    pub(super) fn lanes(&mut self) -> Vec<LaneStats> {
        let Ok(plane) = self.plane() else { return Vec::new() };
        plane.lanes().iter().map(|lane| lane.stats()).collect()
    }

    /// Transports that were not used or broke.
    pub(super) fn into_declined(self) -> Vec<Declined> {
        self.declined
    }

    fn decline(&mut self, transport: &str, why: Failure) {
        self.declined.push(Declined { transport: transport.into(), why });
    }

    /// Has the destination fence the plane of this name off, and waits until it has.
    fn retire(&mut self, name: &str) -> Result<(), Failure> {
        self.link.send(&Message::Retire(name.into()).encode())?;
        let Some(frame) = self.link.receive(self.fence_patience)? else {
            let text = "the destination does not fence the broken transport off";
            return Err(Failure::new(Code::TIMEOUT, text));
        };
        match Message::decode(&frame)? {
            Message::Retired => Ok(()),
            Message::GaveUp(why) => Err(why.context("the destination refused")),
            other => Err(Failure::new(
                Code::PROTOCOL,
                format_args!("the destination sent {} when it was not its turn", other.name()),
            )),
        }
    }

    fn first_that_works(&mut self) -> Result<Box<dyn SourcePlane>, Failure> {
        while let Some(Candidate { mut transport, offer }) = self.candidates.pop_front() {
            match transport.connect(&self.session, &offer) {
                Ok(plane) => {
                    self.monitor.arm(plane.interrupter());
                    self.monitor.update(|p| p.transport = plane.name().into());
                    return Ok(plane);
                }
                Err(why) => self.decline(transport.name(), why.into()),
            }
        }
        let reasons: Vec<_> = self.declined.iter().map(|d| format!("{}: {}", d.transport, d.why)).collect();
        Err(Failure::new(Code::TRANSPORT, format_args!("no transport works: {}", reasons.join("; "))))
    }
}
