//! Making a source's connections: all of them at once, since each takes several round trips.
//!
//! What a phase has made is owned by a value that gives it back when it is dropped. So a phase that fails
//! leaves nothing behind of those before it: no identifier, queue pair, registered memory or thread.

use super::lane::{LaneLimits, RdmaLane};
use super::registry::{MAX_REQUESTS_IN_QUEUE, Registry};
use super::{Lanes, RdmaPlane};
use crate::chunks::{ChunkMap, min_chunk_shifts};
use crate::cm::{CmId, Event, EventChannel, describe};
use crate::domain::ProtectionDomain;
use crate::halt::Halt;
use crate::hello::{self, Purpose};
use crate::limits;
use crate::message::{LANE_CREDITS, REGISTRATION_CREDITS};
use crate::offer::Offer;
use crate::options::{DEFAULT_DEPTH, DEFAULT_LANES, Options};
use crate::queue::QueuePair;
use crate::receives::ReceiveQueue;
use crate::unavailable;
use migration::memory::{PAGE_SIZE, Ram};
use migration::transport::{MAX_LANES, PlaneError, Secret, Session, Token};
use rdma_sys::rdma_cm_event_type::{self, *};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a kernel may look for an address at a time. Linux can miss that the neighbour it waits for has
/// answered, and then looks again only when its time is up.
const ADDRESS_RESOLUTION_TIMEOUT: Duration = Duration::from_secs(1);

/// Fewest work requests that a lane's queue pair has room for.
const MIN_QUEUE_REQUESTS: u32 = 8;

/// Connects to what a destination has offered.
///
/// # Errors
/// [`PlaneError::Unavailable`] when RDMA cannot be used or does not reach the destination,
/// [`PlaneError::Protocol`] when `offer` is none, [`PlaneError::Io`] when the device fails.
pub(super) fn connect(session: &Session, offer: &[u8], options: &Options) -> Result<RdmaPlane, PlaneError> {
    let offer = Offer::decode(offer, session.ram.regions().len())?;
    let connector = Connector::new(offer.address, session.timeout, lane_count(options))?;
    connector.resolve_addresses()?;
    connector.resolve_routes()?;
    let domain = open_domain(&connector, &session.ram, options.on_demand)?;
    let map = map_chunks(&session.ram, options.chunk, &offer, &domain);
    let (registry, answers) = make_registry(&connector, &session.ram, &domain, map)?;
    let lanes = make_lanes(&connector, &domain, &registry, options)?;
    connector.connect(session.token, &session.secret)?;
    RdmaPlane::start(lanes, registry, connector.into_ids(), answers)
}

fn lane_count(options: &Options) -> u16 {
    if options.lanes == 0 { DEFAULT_LANES } else { options.lanes.min(MAX_LANES as u16) }
}

/// Opens the device through which the destination is reached.
fn open_domain(
    connector: &Connector,
    ram: &Ram,
    on_demand: bool,
) -> Result<Arc<ProtectionDomain>, PlaneError> {
    let domain = ProtectionDomain::open(&connector.channel, connector.local_ip()?, on_demand)?;
    if !domain.on_demand() {
        limits::check_locked_memory(ram.len())?;
    }
    Ok(domain)
}

/// Cuts memory into chunks that suit both sides.
fn map_chunks(ram: &Ram, chunk: u64, offer: &Offer, domain: &ProtectionDomain) -> ChunkMap {
    let mut shifts = min_chunk_shifts(ram, chunk, domain.abilities().max_mr);
    shifts.iter_mut().zip(&offer.chunk_shifts).for_each(|(ours, theirs)| *ours = (*ours).max(*theirs));
    ChunkMap::new(ram, &shifts)
}

/// Makes the queue pair for registrations, with receive buffers for the answers.
fn make_registry(
    connector: &Connector,
    ram: &Arc<Ram>,
    domain: &Arc<ProtectionDomain>,
    map: ChunkMap,
) -> Result<(Arc<Registry>, ReceiveQueue), PlaneError> {
    let id = Arc::clone(connector.registrations());
    let (sends, receives) = (MAX_REQUESTS_IN_QUEUE as u32, REGISTRATION_CREDITS as u32);
    let queue = Arc::new(QueuePair::new(id, domain, sends, receives, Default::default())?);
    let answers = ReceiveQueue::new(Arc::clone(&queue), domain, REGISTRATION_CREDITS)?;
    let halt = Halt::new().map_err(broken)?;
    let registry = Registry::new(Arc::clone(ram), Arc::clone(domain), map, queue, halt)?;
    Ok((Arc::new(registry), answers))
}

/// Makes a queue pair and a lane on each of the lanes' identifiers.
fn make_lanes(
    connector: &Connector,
    domain: &Arc<ProtectionDomain>,
    registry: &Arc<Registry>,
    options: &Options,
) -> Result<Lanes, PlaneError> {
    let abilities = domain.abilities();
    let room = DEFAULT_DEPTH.min(abilities.max_qp_wr).max(MIN_QUEUE_REQUESTS);
    let limits = LaneLimits {
        // Whole pages, so that a page is never cut in two.
        max_write_bytes: (u64::from(abilities.max_message_bytes) / PAGE_SIZE).max(1) * PAGE_SIZE,
        max_requests: if options.depth == 0 { room } else { options.depth.min(room) },
        timeout: connector.timeout,
    };
    let mut lanes = Lanes::default();
    for (number, id) in connector.lanes().iter().enumerate() {
        let queue = QueuePair::new(Arc::clone(id), domain, room, LANE_CREDITS as u32, options.waiting)?;
        let queue = Arc::new(queue);
        lanes.queues.push(Arc::downgrade(&queue));
        lanes.lanes.push(Box::new(RdmaLane::new(queue, domain, Arc::clone(registry), limits, number == 0)?));
    }
    Ok(lanes)
}

fn broken(source: io::Error) -> PlaneError {
    PlaneError::Io { what: "preparing the RDMA connections", source }
}

/// Takes all connections of a session from one state of rdma_cm to the next.
struct Connector {
    channel: Arc<EventChannel>,
    /// That of the registrations, then those of the lanes.
    ids: Vec<Arc<CmId>>,
    to: SocketAddr,
    timeout: Duration,
    deadline: Instant,
}

impl Connector {
    /// Makes the identifiers. All that follows has to be done within `timeout`.
    fn new(to: SocketAddr, timeout: Duration, lanes: u16) -> Result<Connector, PlaneError> {
        let channel = EventChannel::new()?;
        let ids = (0..=lanes)
            .map(|_| CmId::new(&channel).map(Arc::new))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| unavailable::no_rdma(&e))?;
        Ok(Connector { channel, ids, to, timeout, deadline: Instant::now() + timeout })
    }

    fn registrations(&self) -> &Arc<CmId> {
        &self.ids[0]
    }

    fn lanes(&self) -> &[Arc<CmId>] {
        &self.ids[1..]
    }

    /// This side's address on the way to the destination, once addresses are resolved.
    fn local_ip(&self) -> Result<std::net::IpAddr, PlaneError> {
        let ip = self.registrations().local_ip();
        ip.ok_or_else(|| broken(io::ErrorKind::AddrNotAvailable.into()))
    }

    fn into_ids(self) -> (Arc<EventChannel>, Vec<Arc<CmId>>) {
        (self.channel, self.ids)
    }

    /// Finds the device that reaches the destination.
    fn resolve_addresses(&self) -> Result<(), PlaneError> {
        // The first alone: it may have to find the neighbour's address, which then serves the others.
        self.resolve_address(&self.ids[..1])?;
        self.resolve_address(&self.ids[1..])
    }

    /// The same for some identifiers, trying again until the deadline.
    fn resolve_address(&self, ids: &[Arc<CmId>]) -> Result<(), PlaneError> {
        let begin = |id: &CmId| {
            id.resolve_address(self.to, ADDRESS_RESOLUTION_TIMEOUT)
                .map_err(|e| self.not_reachable(&e.to_string()))
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
                _ => return Err(self.not_reachable(&failure_text(&event))),
            }
        }
        Ok(())
    }

    fn resolve_routes(&self) -> Result<(), PlaneError> {
        self.all("resolving the route", RDMA_CM_EVENT_ROUTE_RESOLVED, |_, id| id.resolve_route(self.timeout))
    }

    /// Connects all queue pairs. Each says which it is, and proves to belong to the session.
    fn connect(&self, token: Token, secret: &Secret) -> Result<(), PlaneError> {
        let lanes = self.lanes().len() as u16;
        self.all("connecting", RDMA_CM_EVENT_ESTABLISHED, |number, id| {
            let purpose = match number.checked_sub(1) {
                None => Purpose::Registrations,
                Some(lane) => Purpose::Lane(lane as u16),
            };
            id.connect(&hello::request(token, secret, purpose, lanes))
        })
    }

    /// Begins a step for every identifier, and waits until all have got to the event `awaited`.
    fn all(
        &self,
        step: &str,
        awaited: rdma_cm_event_type::Type,
        begin: impl Fn(usize, &CmId) -> io::Result<()>,
    ) -> Result<(), PlaneError> {
        for (number, id) in self.ids.iter().enumerate() {
            begin(number, id).map_err(|e| self.not_reachable(&e.to_string()))?;
        }
        let mut left: Vec<_> = self.ids.iter().map(|id| id.key()).collect();
        while !left.is_empty() {
            let event = self.wait(step)?;
            if event.kind != awaited {
                return Err(self.not_reachable(&failure_text(&event)));
            }
            left.retain(|key| *key != event.key);
        }
        Ok(())
    }

    fn wait(&self, step: &str) -> Result<Event, PlaneError> {
        self.channel.wait(self.deadline, self.timeout).map_err(|error| match error {
            PlaneError::Timeout(waited) => self.not_reachable(&format!("{step} took longer than {waited:?}")),
            error => error,
        })
    }

    fn not_reachable(&self, why: &str) -> PlaneError {
        unavailable::not_reachable(self.to.ip(), why)
    }
}

fn failure_text(event: &Event) -> String {
    match hello::refused(&event.private_data) {
        Some(why) if event.kind == RDMA_CM_EVENT_REJECTED => format!("the destination refused: {why}"),
        _ => describe(event),
    }
}
