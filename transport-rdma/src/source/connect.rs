//! Making a source's connections: all of them at once, since each takes several round trips.

use super::lane::{self, RdmaLane};
use super::registry::{self, Registry};
use super::{RdmaPlane, watch};
use crate::chunks::{Grid, least_shifts};
use crate::cm::{CmId, Event, EventChannel, describe};
use crate::domain::Domain;
use crate::halt::Halt;
use crate::hello::{self, Purpose};
use crate::limits;
use crate::offer::Offer;
use crate::options::{DEFAULT_DEPTH, DEFAULT_LANES, Options};
use crate::queue::QueuePair;
use crate::slots::Slots;
use crate::unavailable;
use migration::memory::PAGE_SIZE;
use migration::transport::{Lane, MAX_LANES, PlaneError, Session};
use rdma_sys::rdma_cm_event_type::*;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

pub(super) fn connect(session: &Session, offer: &[u8], options: &Options) -> Result<RdmaPlane, PlaneError> {
    let broken = |source| PlaneError::Io { what: "preparing the RDMA connections", source };
    let offer = Offer::decode(offer, session.ram.regions().len())?;
    let lanes = if options.lanes == 0 { DEFAULT_LANES } else { options.lanes.min(MAX_LANES as u16) };
    let channel = EventChannel::new()?;
    let halt = Halt::new().map_err(broken)?;
    let mut steps = Steps {
        channel: &channel,
        halt: &halt,
        deadline: Instant::now() + session.timeout,
        timeout: session.timeout,
        offer: &offer,
    };

    // The registrations' connection first, then the lanes.
    let ids = (0..=lanes)
        .map(|_| CmId::new(&channel).map(Arc::new))
        .collect::<Result<Vec<_>, _>>()
        .map_err(|e| unavailable::no_rdma(&e))?;
    // The first alone: it may have to find the neighbour's address, which then serves the others.
    steps.resolve(&ids[..1])?;
    steps.resolve(&ids[1..])?;
    steps.all(&ids, RDMA_CM_EVENT_ROUTE_RESOLVED, |id| id.resolve_route(session.timeout))?;

    let local = ids[0].local_ip().ok_or_else(|| broken(std::io::ErrorKind::AddrNotAvailable.into()))?;
    let domain = Domain::open(&channel, local, options.on_demand)?;
    if !domain.on_demand() {
        limits::check_locked_memory(session.ram.len())?;
    }
    let abilities = *domain.abilities();
    let mut shifts = least_shifts(&session.ram, options.chunk, abilities.max_mr);
    shifts.iter_mut().zip(&offer.chunk_shifts).for_each(|(ours, theirs)| *ours = (*ours).max(*theirs));
    let grid = Grid::new(&session.ram, &shifts);

    let credits = registry::CREDITS as u32;
    let queue = QueuePair::new(Arc::clone(&ids[0]), &domain, 2 * credits, credits, Default::default())?;
    let registry = Registry::new(
        Arc::clone(&session.ram),
        Arc::clone(&domain),
        grid,
        Arc::new(queue),
        Halt::new().map_err(broken)?,
    )
    .map_err(lane::buffers)?;
    let registry = Arc::new(registry);
    let answers = Slots::new(&domain, registry::CREDITS).map_err(lane::buffers)?;
    watch::post_all(&registry, &answers)?;

    let messages = super::LANE_CREDITS;
    let room = DEFAULT_DEPTH.min(abilities.max_work).max(8);
    let depth = if options.depth == 0 { room } else { options.depth.min(room) };
    // Whole pages, so that a page is never cut in two.
    let max_message = (u64::from(abilities.max_message) / PAGE_SIZE).max(1) * PAGE_SIZE;
    let mut made: Vec<Box<dyn Lane>> = Vec::new();
    for (number, id) in ids[1..].iter().enumerate() {
        let queue = QueuePair::new(Arc::clone(id), &domain, room, messages as u32, options.waiting)?;
        made.push(Box::new(RdmaLane::new(
            Arc::new(queue),
            Slots::new(&domain, messages).map_err(lane::buffers)?,
            Slots::new(&domain, messages).map_err(lane::buffers)?,
            Arc::clone(&registry),
            (max_message, depth),
            session.timeout,
            number == 0,
        )?));
    }
    let mut purposes = std::iter::once(Purpose::Registrations).chain((0..lanes).map(Purpose::Lane));
    steps.all(&ids, RDMA_CM_EVENT_ESTABLISHED, |id| {
        let purpose = purposes.next().unwrap_or(Purpose::Registrations);
        id.connect(&hello::request(session.token, purpose, lanes))
    })?;

    // From here on the plane's `drop` cleans up.
    let mut plane =
        RdmaPlane { lanes: made, registry: Arc::clone(&registry), ids, watch: None, register: None };
    let theirs = Arc::clone(&registry);
    let spawned = thread::Builder::new().name("rdma-register".into()).spawn(move || theirs.register());
    plane.register = Some(spawned.map_err(broken)?);
    let spawned = thread::Builder::new()
        .name("rdma-watch".into())
        .spawn(move || watch::watch(&registry, &channel, &answers));
    plane.watch = Some(spawned.map_err(broken)?);
    Ok(plane)
}

/// How long a kernel may look for an address at a time. Linux can miss that the neighbour it waits for has
/// answered, and then looks again only when its time is up.
const RESOLVING: Duration = Duration::from_secs(1);

/// Takes all connections from one state to the next.
struct Steps<'a> {
    channel: &'a Arc<EventChannel>,
    halt: &'a Halt,
    deadline: Instant,
    timeout: Duration,
    offer: &'a Offer,
}

impl Steps<'_> {
    /// Resolves the destination's address, trying again until the deadline.
    fn resolve(&mut self, ids: &[Arc<CmId>]) -> Result<(), PlaneError> {
        let to = self.offer.address;
        let begin = |id: &CmId| {
            id.resolve_address(to, RESOLVING).map_err(|e| unavailable::not_reachable(to.ip(), &e.to_string()))
        };
        ids.iter().try_for_each(|id| begin(id))?;
        let mut left: Vec<_> = ids.iter().collect();
        while !left.is_empty() {
            let event = self.wait("resolving its address")?;
            let Some(at) = left.iter().position(|id| id.key() == event.key) else { continue };
            match (event.kind, -event.status) {
                (RDMA_CM_EVENT_ADDR_RESOLVED, _) => drop(left.swap_remove(at)),
                (RDMA_CM_EVENT_ADDR_ERROR, libc::ETIMEDOUT) if Instant::now() < self.deadline => {
                    begin(left[at])?;
                }
                _ => return Err(unavailable::not_reachable(to.ip(), &reason(&event))),
            }
        }
        Ok(())
    }

    fn wait(&self, step: &str) -> Result<Event, PlaneError> {
        self.channel.wait(self.halt, self.deadline, self.timeout).map_err(|error| match error {
            PlaneError::Timeout(waited) => {
                let why = format!("{step} took longer than {waited:?}");
                unavailable::not_reachable(self.offer.address.ip(), &why)
            }
            error => error,
        })
    }

    fn all(
        &mut self,
        ids: &[Arc<CmId>],
        awaited: u32,
        mut begin: impl FnMut(&CmId) -> std::io::Result<()>,
    ) -> Result<(), PlaneError> {
        let to = self.offer.address.ip();
        for id in ids {
            begin(id).map_err(|e| unavailable::not_reachable(to, &e.to_string()))?;
        }
        let mut left: Vec<_> = ids.iter().map(|id| id.key()).collect();
        while !left.is_empty() {
            let event = self.wait(match awaited {
                RDMA_CM_EVENT_ROUTE_RESOLVED => "resolving the route",
                _ => "connecting",
            })?;
            match left.iter().position(|key| *key == event.key) {
                Some(at) if event.kind == awaited => drop(left.swap_remove(at)),
                _ if event.kind == awaited => {}
                _ => return Err(unavailable::not_reachable(to, &reason(&event))),
            }
        }
        Ok(())
    }
}

fn reason(event: &Event) -> String {
    match hello::refused(&event.private) {
        Some(why) if event.kind == RDMA_CM_EVENT_REJECTED => format!("the destination refused: {why}"),
        _ => describe(event),
    }
}
