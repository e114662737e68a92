//! Tests with a hostile source: one that even knows the session's token, and writes with whatever keys and
//! addresses it likes, at whatever time.

use super::{RdmaPlane, connect};
use crate::cm::{CmId, EventChannel};
use crate::destination::RdmaDestinationPlane;
use crate::domain::{MemoryRegion, ProtectionDomain};
use crate::halt::Halt;
use crate::hello::{self, Purpose};
use crate::offer::Offer;
use crate::queue::QueuePair;
use crate::zeroed::Zeroed;
use crate::{Options, RdmaDestination, probe};
use migration::conformance::bed::{extent, ram, read, scramble};
use migration::memory::Ram;
use migration::transport::{DestinationPlane, PlaneError, Secret, Session, SourcePlane, Token};
use rdma_sys::*;
use std::net::IpAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(15);

/// A session with a source that behaves, and has written page 0.
struct Honest {
    session: Session,
    shadow: Arc<Ram>,
    offer: Vec<u8>,
    destination: RdmaDestinationPlane,
    plane: RdmaPlane,
    /// The destination's key for the first chunk.
    key: u32,
}

impl Honest {
    fn new(to: IpAddr) -> Honest {
        let options = Options { lanes: 1, ..Options::default() };
        let shadow = ram();
        let (token, secret) = (Token::random().unwrap(), Secret::random().unwrap());
        let there = Session::new(token, Arc::clone(&shadow), PATIENCE).with_secret(secret);
        let (offer, destination) = RdmaDestination::new(to, options.clone()).serve(&there).unwrap();
        let session = Session::new(token, ram(), PATIENCE).with_secret(secret);
        scramble(&session.ram, &extent(0, 0, 64), &mut fastrand::Rng::with_seed(1));
        let mut plane = connect::connect(&session, &offer, &options).unwrap();
        let lane = &mut plane.lanes()[0];
        lane.write(&[extent(0, 0, 1)]).unwrap();
        lane.post_barrier(0).unwrap();
        lane.wait_barrier(0).unwrap();
        let key = plane.registry.keys(0).expect("a chunk that was written").rkey;
        Honest { session, shadow, offer, destination, plane, key }
    }
}

/// A further lane of a session, driven by hand.
struct Intruder {
    halt: Halt,
    queue: QueuePair,
    memory: MemoryRegion,
}

impl Intruder {
    fn join(session: &Session, offer: &[u8], lane: u16) -> Result<Intruder, u32> {
        let channel = EventChannel::new().unwrap();
        let halt = Halt::new().unwrap();
        let id = Arc::new(CmId::new(&channel).unwrap());
        let wait = || channel.wait(Instant::now() + PATIENCE, PATIENCE).unwrap().kind;
        id.resolve_address(Offer::decode(offer, 2).unwrap().address, PATIENCE).unwrap();
        assert_eq!(wait(), rdma_cm_event_type::RDMA_CM_EVENT_ADDR_RESOLVED);
        id.resolve_route(PATIENCE).unwrap();
        assert_eq!(wait(), rdma_cm_event_type::RDMA_CM_EVENT_ROUTE_RESOLVED);
        let domain = ProtectionDomain::open(&channel, id.local_ip().unwrap(), false).unwrap();
        let queue = QueuePair::new(Arc::clone(&id), &domain, 4, 4, Default::default()).unwrap();
        let memory = domain.register_ram(&session.ram, &extent(0, 0, 64), false).unwrap();
        id.connect(&hello::request(session.token, &session.secret, Purpose::Lane(lane), lane + 1)).unwrap();
        match wait() {
            rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED => Ok(Intruder { halt, queue, memory }),
            other => Err(other),
        }
    }

    /// Writes the source's pages 32 and 33 to `address` in the destination's first region.
    fn write(&self, address: u64, key: u32) -> Result<(), PlaneError> {
        let page = extent(0, 32, 2);
        let mut sge = ibv_sge { addr: page.offset, length: page.len as u32, lkey: self.memory.lkey() };
        let mut request = ibv_send_wr::zeroed();
        request.sg_list = &mut sge;
        request.num_sge = 1;
        request.opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE;
        request.send_flags = ibv_send_flags::IBV_SEND_SIGNALED.0;
        request.wr.rdma.remote_addr = address;
        request.wr.rdma.rkey = key;
        // SAFETY: a chain of one; what it reads is registered, and stays so for as long as the queue pair.
        unsafe { self.queue.post_send(&mut request) }
            .map_err(|source| PlaneError::Io { what: "posting", source })?;
        let deadline = Some(Instant::now() + Duration::from_secs(8));
        match self.queue.completions().wait(&mut Vec::new(), &self.halt, deadline)? {
            true => Ok(()),
            false => Err(PlaneError::Timeout(PATIENCE)),
        }
    }
}

/// The last device's address.
fn device() -> IpAddr {
    probe::addresses(&probe::host()).into_iter().rfind(IpAddr::is_ipv4).expect("an RDMA device")
}

const AT: u64 = 40 << 12;

/// What must not change; and with the right key and address it does, so that the tests would see it.
fn target(shadow: &Ram) -> Vec<u8> {
    read(shadow, &extent(0, 0, 8192))
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn the_right_key_writes() {
    let to = device();
    let honest = Honest::new(to);
    let intruder = Intruder::join(&honest.session, &honest.offer, 5).unwrap();
    intruder.write(AT, honest.key).unwrap();
    let (sent, arrived) = (extent(0, 32, 2), extent(0, 40, 2));
    assert!(read(&honest.shadow, &arrived) == read(&honest.session.ram, &sent));
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn wrong_keys_and_addresses_are_refused() {
    let to = device();
    let other = Honest::new(to);
    let chunk = crate::DEFAULT_CHUNK;
    for case in 0..6 {
        let honest = Honest::new(to);
        let key = honest.key;
        let (what, address, key) = match case {
            0 => ("a key that is off by one", AT, key ^ 1),
            1 => ("a key of no memory", AT, key.wrapping_add(0x0100_0000)),
            2 => ("another session's key", AT, other.key),
            3 => ("an address after the chunk", chunk, key),
            4 => ("a write that leaves the chunk", chunk - 4096, key),
            _ => ("an address that wraps", 0u64.wrapping_sub(4096), key),
        };
        let (before, others) = (target(&honest.shadow), target(&other.shadow));
        let intruder = Intruder::join(&honest.session, &honest.offer, 5).unwrap();
        let refused = intruder.write(address, key);
        assert!(matches!(refused, Err(PlaneError::Io { .. })), "{what}: {refused:?}");
        assert!(target(&honest.shadow) == before, "{what} changed memory");
        assert!(target(&other.shadow) == others, "{what} changed another guest's memory");
    }
}

#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn the_right_key_is_worth_nothing_after_the_fence() {
    worth_nothing_after(|destination| destination.fence());
}

/// As where a card was removed, which soft-RoCE cannot be: the queue pairs are then destroyed instead.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn a_fence_holds_where_queue_pairs_cannot_be_reset() {
    worth_nothing_after(|destination| {
        destination.fence_by(|_| Err(std::io::Error::from_raw_os_error(libc::EIO)))
    });
}

fn worth_nothing_after(fence: impl FnOnce(&mut RdmaDestinationPlane) -> Result<(), PlaneError>) {
    let to = device();
    let mut honest = Honest::new(to);
    let intruder = Intruder::join(&honest.session, &honest.offer, 5).unwrap();
    intruder.write(AT, honest.key).unwrap();
    fence(&mut honest.destination).unwrap();
    // The guest has changed its memory since: what the write would do to it shows.
    scramble(&honest.shadow, &extent(0, 40, 2), &mut fastrand::Rng::with_seed(2));
    let before = target(&honest.shadow);
    let late = intruder.write(AT, honest.key);
    assert!(late.is_err(), "a write after the fence was acknowledged");
    assert!(target(&honest.shadow) == before, "a write after the fence landed");
    assert!(Intruder::join(&honest.session, &honest.offer, 6).is_err(), "somebody joined after the fence");
    assert!(target(&honest.shadow) == before);
}

/// Queue pairs that fail take the plane with them, at once and not after the session's patience.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn a_failed_queue_pair_is_noticed() {
    let to = device();
    let mut honest = Honest::new(to);
    // A forged write puts the destination's queue pair into the error state.
    let intruder = Intruder::join(&honest.session, &honest.offer, 5).unwrap();
    assert!(intruder.write(AT, honest.key ^ 1).is_err());
    let began = Instant::now();
    let lane = &mut honest.plane.lanes()[0];
    let result = (0..).find_map(|round| {
        let sent = lane.write(&[extent(0, 0, 1)]).and_then(|()| lane.post_barrier(round));
        sent.and_then(|()| lane.wait_barrier(round)).err()
    });
    assert!(began.elapsed() < PATIENCE, "noticed late: {result:?}");
    assert!(honest.destination.error().is_some(), "the destination does not know");
    honest.destination.fence().unwrap();
}

/// What the kernel holds of RDMA on this host, a line for each device. Without contexts: librdmacm keeps
/// devices open.
fn held_resources() -> Vec<String> {
    let output = Command::new("rdma").args(["resource", "show"]).output().expect("rdma, of iproute2");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let without_contexts = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let kept = words.chunks(2).filter(|pair| pair[0] != "ctx");
        kept.map(|pair| pair.join(" ")).collect::<Vec<_>>().join(" ")
    };
    let lines: Vec<String> = String::from_utf8_lossy(&output.stdout).lines().map(without_contexts).collect();
    assert!(lines.iter().any(|line| line.contains(" qp ") && line.contains(" mr ")), "{lines:?}");
    lines
}

/// A connection that fails in its last phase gives back the identifiers, queue pairs and memory of all before
/// it.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn a_refused_connection_leaves_nothing_behind() {
    let honest = Honest::new(device());
    let stranger = Session::new(Token::random().unwrap(), honest.session.ram.clone(), PATIENCE);
    let refused = || {
        let Err(error) = connect::connect(&stranger, &honest.offer, &Options::default()) else {
            panic!("a stranger was let in");
        };
        assert!(error.to_string().contains("does not know this session"), "{error}");
    };
    // The first makes librdmacm open what it keeps open.
    refused();
    let before = settled_resources();
    (0..3).for_each(|_| refused());
    assert_eq!(settled_resources(), before);
}

/// The same once the destination has let go of the identifiers of those that it refused, which takes a
/// moment.
fn settled_resources() -> Vec<String> {
    let deadline = Instant::now() + PATIENCE;
    let mut last = held_resources();
    loop {
        std::thread::sleep(Duration::from_millis(200));
        let now = held_resources();
        if now == last {
            return now;
        }
        assert!(Instant::now() < deadline, "resources keep changing: {last:?}, then {now:?}");
        last = now;
    }
}

/// Whoever has taken a lane out of its plane keeps a queue pair that the plane's end has put out of service.
#[test]
#[ignore = "needs RDMA devices: ci/rdma runs it in the lab"]
fn a_lane_that_outlives_its_plane_sends_nothing() {
    let Honest { mut plane, destination, .. } = Honest::new(device());
    let taken = std::mem::take(&mut plane.lanes.lanes);
    drop(plane);
    // The destination has noticed too, or its queue pairs would be among these.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let states = queue_pair_states();
        if states == ["RESET"; 2] {
            break;
        }
        assert!(Instant::now() < deadline, "{states:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
    drop((taken, destination));
    settled_resources();
    assert_eq!(queue_pair_states(), [""; 0]);
}

/// The states of all reliable queue pairs of this host.
fn queue_pair_states() -> Vec<String> {
    let output = Command::new("rdma").args(["resource", "show", "qp"]).output().expect("rdma, of iproute2");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    let reliable = text.lines().filter(|line| line.contains(" type RC "));
    let state = |line: &str| line.split_once(" state ")?.1.split_whitespace().next().map(str::to_string);
    reliable.filter_map(state).collect()
}
