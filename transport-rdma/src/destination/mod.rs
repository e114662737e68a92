//! The destination's side: what it offers, and the plane that its source writes into.

mod accept;
mod endpoint;
mod lane;
mod register;

use crate::chunks::min_chunk_shifts;
use crate::cm::{CmId, EventChannel};
use crate::domain::{MemoryRegion, ProtectionDomain};
use crate::halt::{Halt, HaltReason, lock};
use crate::hello::Purpose;
use crate::limits;
use crate::offer::Offer;
use crate::options::Options;
use crate::queue::QueuePair;
use crate::unavailable;
use migration::cpu::CpuMeter;
use migration::memory::Extent;
use migration::transport::{
    Coverage, DestinationPlane, DestinationTransport, MAX_LANES, PlaneError, Session,
};
use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

/// Receives over RDMA, on the device that has the address to which the source has connected.
pub struct RdmaDestination {
    local: IpAddr,
    options: Options,
}

impl RdmaDestination {
    /// `local` is this host's address on the network that is to be used: that on which the control connection
    /// was accepted.
    pub fn new(local: IpAddr, options: Options) -> Self {
        RdmaDestination { local: local.to_canonical(), options }
    }
}

impl DestinationTransport for RdmaDestination {
    fn name(&self) -> &'static str {
        crate::NAME
    }

    fn offer(&mut self, session: &Session) -> Result<(Vec<u8>, Box<dyn DestinationPlane>), PlaneError> {
        let (offer, plane) = self.serve(session)?;
        Ok((offer, Box::new(plane)))
    }
}

impl RdmaDestination {
    /// Makes a plane for a session, and the offer that tells a source how to connect to it.
    pub(crate) fn serve(&self, session: &Session) -> Result<(Vec<u8>, RdmaDestinationPlane), PlaneError> {
        let broken = |source| PlaneError::Io { what: "preparing for RDMA connections", source };
        let channel = EventChannel::new()?;
        let domain = ProtectionDomain::open(&channel, self.local, self.options.on_demand)?;
        if !domain.on_demand() {
            limits::check_locked_memory(session.ram.len())?;
        }
        let listener = CmId::new(&channel).map_err(|e| unavailable::no_rdma(&e))?;
        let address = SocketAddr::new(self.local, 0);
        listener.bind(address).map_err(|e| unavailable::not_on_a_device(self.local, &e))?;
        let port = listener
            .listen(MAX_LANES as i32 + 1)
            .map_err(|e| unavailable::resource("listening for RDMA connections", e))?;
        let chunk_shifts = min_chunk_shifts(&session.ram, self.options.chunk, domain.abilities().max_mr);
        let offer = Offer { address: SocketAddr::new(self.local, port), chunk_shifts };
        let plane = Arc::new(Plane {
            session: session.clone(),
            waiting: self.options.waiting,
            chunk_shifts: offer.chunk_shifts.clone(),
            domain,
            halt: Halt::new().map_err(broken)?,
            connections: Mutex::default(),
            regions: Mutex::default(),
            placed: AtomicU64::new(0),
            claimed: AtomicU64::new(0),
            coverage: Coverage::new(&session.ram),
            lanes_cpu_us: AtomicU64::new(0),
            registering: CpuMeter::default(),
            accepting: CpuMeter::default(),
            error: Mutex::default(),
        });
        let accepting = Arc::clone(&plane);
        let accept = thread::Builder::new()
            .name("rdma-accept".into())
            .spawn(move || accepting.accept(&channel, listener))
            .map_err(broken)?;
        Ok((offer.encode(), RdmaDestinationPlane { plane, accept: Some(accept) }))
    }
}

/// A connection, with the thread that serves it.
struct Connection {
    purpose: Purpose,
    id: Arc<CmId>,
    /// `None` once it is destroyed, for want of another way to take it out of service.
    queue: Option<Arc<QueuePair>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Connections {
    /// Set for good: no connection is taken any more.
    closed: bool,
    all: Vec<Connection>,
}

/// Destroys the queue pair of a connection that could not be taken to RESET, because of `error`.
///
/// This is for a device that was removed. Drivers of cards then take the device away from its processes at
/// once (soft-RoCE's does not): Linux answers EIO to every command of the process, except to one that
/// destroys.
///
/// The EIO alone does not prove that the pair is dead. It is given from the moment at which the device is
/// taken away. Only then does the kernel destroy the process's queue pairs, one by one, and in between they
/// still write. The answer to the command that destroys does prove it: the kernel gives it under the lock
/// that it holds for all of that, when the pair is destroyed, whether by this command or before it. A pair
/// that does not exist writes nothing. Linux does so since 4.20.
///
/// # Errors
/// [`PlaneError::Io`] with `error`, and with that of the attempt to destroy it, when the pair may still
/// exist.
fn destroy(connection: &mut Connection, error: io::Error) -> Result<(), PlaneError> {
    let what = "taking an RDMA queue pair out of service";
    // Nobody else may have a pair in hand that is about to go. Threads of a plane that is shut end soon.
    let _ = connection.thread.take().map(JoinHandle::join);
    let Some(queue) = connection.queue.take() else { return Ok(()) };
    match Arc::try_unwrap(queue).map(QueuePair::destroy) {
        Ok(Ok(())) => Ok(()),
        Ok(Err((queue, second))) => {
            // It stays to be tried again, and the fence stays failed until then.
            connection.queue = Some(Arc::new(queue));
            let source = io::Error::other(format!("{error}; destroying it: {second}"));
            Err(PlaneError::Io { what, source })
        }
        Err(shared) => {
            connection.queue = Some(shared);
            Err(PlaneError::Io { what, source: error })
        }
    }
}

/// A session's receiving end.
struct Plane {
    session: Session,
    waiting: crate::completions::Waiting,
    chunk_shifts: Vec<u8>,
    domain: Arc<ProtectionDomain>,
    halt: Halt,
    connections: Mutex<Connections>,
    /// What is registered, by region and offset.
    regions: Mutex<BTreeMap<(u32, u64), (Extent, MemoryRegion)>>,
    placed: AtomicU64,
    /// Bytes that the source has said it wrote, since that was last asked for.
    claimed: AtomicU64,
    /// Of memory that was named as zero.
    coverage: Coverage,
    /// Of the lanes' threads, which have ended when it is asked for. Those that register and take connections
    /// go on after the fence.
    lanes_cpu_us: AtomicU64,
    registering: CpuMeter,
    accepting: CpuMeter,
    error: Mutex<Option<String>>,
}

impl Plane {
    /// Shuts every connection out of memory, and ends the threads that clear pages. Idempotent.
    ///
    /// Why no write can land once this has returned:
    ///
    /// - Memory of this session is reached through keys of its protection domain, and the devices check that
    ///   a key is used on a queue pair of the key's domain.
    /// - The only queue pairs of the domain are those in `connections`: `join` adds to them under the lock
    ///   that is held here, and not once `closed` is set.
    /// - Each of them is in RESET: the call that takes it there returns only when the device has stopped
    ///   working on it, the packet in hand included, and packets that come later, new or repeated, match no
    ///   connection and are dropped. It stays there: nothing here ever takes a pair out of RESET, and rdma_cm
    ///   only does so for a connection that is being made.
    /// - Or it is destroyed (`destroy`), if the call that should take it to RESET has failed.
    /// - The only threads of ours that write to memory are the lanes', which clear pages, and they have
    ///   ended.
    ///
    /// So the keys need not be revoked for the guest to be safe; taking the registrations down, which takes
    /// time, is left for later.
    fn shut(&self) -> Result<(), PlaneError> {
        self.shut_by(QueuePair::reset)
    }

    /// The same with another call in the place of the one that takes a queue pair to RESET.
    fn shut_by(&self, reset: impl Fn(&QueuePair) -> io::Result<()>) -> Result<(), PlaneError> {
        let mut connections = lock(&self.connections);
        connections.closed = true;
        self.halt.halt(HaltReason::Interrupted);
        let mut result = Ok(());
        let mut not_reset = Vec::new();
        for (number, connection) in connections.all.iter().enumerate() {
            if let Some(Err(error)) = connection.queue.as_deref().map(&reset) {
                not_reset.push((number, error));
            }
        }
        for connection in &mut connections.all {
            // A registration that is under way writes nothing, and may take its time.
            if connection.purpose == Purpose::Registrations {
                continue;
            }
            if let Some(thread) = connection.thread.take()
                && thread.join().is_err()
            {
                result = Err(PlaneError::Protocol("a receiving thread panicked".into()));
            }
        }
        for (number, error) in not_reset {
            destroy(&mut connections.all[number], error)?;
        }
        result
    }

    /// After [`shut`](Self::shut): tells the source, and gives the connections back.
    fn hang_up(&self) {
        let all = std::mem::take(&mut lock(&self.connections).all);
        for mut connection in all {
            // Its panic has been reported by its own message.
            let _ = connection.thread.take().map(JoinHandle::join);
            drop(connection.queue);
            connection.id.disconnect();
        }
    }

    /// Something is wrong: nothing of this plane is of use any more.
    fn fail(&self, error: &PlaneError) {
        if self.halt.reason().is_none() {
            lock(&self.error).get_or_insert(error.to_string());
            self.halt.halt(HaltReason::from(error));
        }
    }
}

/// The plane as the engine has it.
pub(crate) struct RdmaDestinationPlane {
    plane: Arc<Plane>,
    accept: Option<JoinHandle<()>>,
}

impl RdmaDestinationPlane {
    /// The fence, with another call in the place of the one that takes a queue pair to RESET.
    pub(crate) fn fence_by(
        &mut self,
        reset: impl Fn(&QueuePair) -> io::Result<()>,
    ) -> Result<(), PlaneError> {
        self.plane.shut_by(reset)?;
        // What is left takes time and no longer matters: connections, and above all unpinning memory. RAM
        // stays mapped for as long as a registration holds it.
        if let Some(accept) = self.accept.take() {
            let plane = Arc::clone(&self.plane);
            let _ = thread::Builder::new().name("rdma-unpin".into()).spawn(move || {
                plane.hang_up();
                let _ = accept.join();
                lock(&plane.regions).clear();
            });
        }
        Ok(())
    }
}

impl DestinationPlane for RdmaDestinationPlane {
    fn name(&self) -> &'static str {
        crate::NAME
    }

    fn fence(&mut self) -> Result<(), PlaneError> {
        self.fence_by(QueuePair::reset)
    }

    fn bytes_placed(&self) -> u64 {
        self.plane.placed.load(Ordering::Relaxed)
    }

    fn newly_covered(&self) -> Option<u64> {
        // What the card has placed, and where, only the source knows.
        Some(self.plane.coverage.take() + self.plane.claimed.swap(0, Ordering::Relaxed))
    }

    fn cpu_us(&self) -> u64 {
        let others: u64 = [&self.plane.registering, &self.plane.accepting]
            .map(|m| m.read().all.as_micros() as u64)
            .iter()
            .sum();
        self.plane.lanes_cpu_us.load(Ordering::Relaxed) + others
    }

    fn error(&self) -> Option<String> {
        lock(&self.plane.error).clone()
    }
}

impl Drop for RdmaDestinationPlane {
    fn drop(&mut self) {
        // A fence that fails is of no consequence: whoever drops a plane without one does not run the guest.
        let _ = self.fence();
    }
}
