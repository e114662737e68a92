//! Choosing the data plane, and changing it in mid-flight.

use crate::cpu::CpuTime;
use crate::failure::{Code, Failure};
use crate::message::Offer;
use crate::monitor::Monitor;
use crate::report::Declined;
use crate::transport::{Session, SourcePlane, SourceTransport};
use std::collections::VecDeque;

/// A transport that both sides have, and has not been tried.
struct Candidate {
    transport: Box<dyn SourceTransport>,
    offer: Vec<u8>,
}

/// The connected plane, and what could take its place.
pub(super) struct Path {
    /// `None` only after a plane broke and nothing could take its place.
    plane: Option<Box<dyn SourcePlane>>,
    candidates: VecDeque<Candidate>,
    /// Whether the destination's memory is as it was built: nothing has been written to it by a
    /// plane that broke.
    fresh: bool,
    /// What the threads of planes that broke had used.
    gone_cpu: CpuTime,
}

impl Path {
    /// Connects the first of `transports` that the destination offers and that works. Every one
    /// that does not is noted in `declined`.
    ///
    /// # Errors
    /// [`Code::TRANSPORT`] when none works, with all the reasons.
    pub(super) fn connect(
        transports: Vec<Box<dyn SourceTransport>>,
        mut offers: Vec<Offer>,
        session: &Session,
        monitor: &Monitor,
        declined: &mut Vec<Declined>,
    ) -> Result<Path, Failure> {
        let mut candidates = VecDeque::new();
        for transport in transports {
            let name = transport.name();
            let found = offers.iter().position(|o| o.transport == name).map(|at| offers.swap_remove(at));
            match found.map(|offer| offer.details) {
                Some(Ok(offer)) => candidates.push_back(Candidate { transport, offer }),
                Some(Err(why)) => {
                    let why = why.bounded().context("the destination");
                    declined.push(Declined { transport: name.into(), why });
                }
                None => {
                    let why = Failure::new(Code::TRANSPORT, "the destination does not know this transport");
                    declined.push(Declined { transport: name.into(), why });
                }
            }
        }
        let plane = first_that_works(&mut candidates, session, monitor, declined)?;
        Ok(Path { plane: Some(plane), candidates, fresh: true, gone_cpu: CpuTime::default() })
    }

    /// Puts the next candidate in the place of a plane that broke with `why`. In between, `retire` has the
    /// destination fence the broken one off: what that still has in the network must not land on top of what
    /// the next one brings.
    ///
    /// # Errors
    /// `why` itself, when there is no other transport or an operator has cancelled; what `retire` says.
    pub(super) fn replace(
        &mut self,
        why: Failure,
        retire: &mut dyn FnMut(&str) -> Result<(), Failure>,
        session: &Session,
        monitor: &Monitor,
        declined: &mut Vec<Declined>,
    ) -> Result<(), Failure> {
        let broken = matches!(why.code, Code::TRANSPORT | Code::TIMEOUT | Code::PROTOCOL);
        if !broken || self.candidates.is_empty() || monitor.cancelled() {
            return Err(why);
        }
        let before = why.clone();
        // Dropped before anything else: nothing leaves it any more.
        if let Some(plane) = self.plane.take() {
            let name = plane.name();
            self.gone_cpu += plane.cpu();
            drop(plane);
            declined.push(Declined { transport: name.into(), why });
            retire(name)?;
        }
        self.fresh = false;
        let next = first_that_works(&mut self.candidates, session, monitor, declined);
        self.plane = Some(next.map_err(|_| before)?);
        Ok(())
    }

    pub(super) fn plane(&mut self) -> Option<&mut (dyn SourcePlane + 'static)> {
        self.plane.as_deref_mut()
    }

    /// CPU time of all planes' own threads.
    pub(super) fn cpu(&self) -> CpuTime {
        let mut cpu = self.gone_cpu;
        cpu += self.plane.as_ref().map_or_else(CpuTime::default, |plane| plane.cpu());
        cpu
    }

    pub(super) fn fresh(&self) -> bool {
        self.fresh
    }
}

fn first_that_works(
    candidates: &mut VecDeque<Candidate>,
    session: &Session,
    monitor: &Monitor,
    declined: &mut Vec<Declined>,
) -> Result<Box<dyn SourcePlane>, Failure> {
    while let Some(Candidate { mut transport, offer }) = candidates.pop_front() {
        match transport.connect(session, &offer) {
            Ok(plane) => {
                monitor.arm(plane.interrupter());
                monitor.update(|p| p.transport = plane.name().into());
                return Ok(plane);
            }
            Err(why) => declined.push(Declined { transport: transport.name().into(), why: why.into() }),
        }
    }
    let reasons: Vec<_> = declined.iter().map(|d| format!("{}: {}", d.transport, d.why)).collect();
    Err(Failure::new(Code::TRANSPORT, format_args!("no transport works: {}", reasons.join("; "))))
}
