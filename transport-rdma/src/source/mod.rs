//! The source's side: connections to what a destination offered, and the plane they make.

mod barriers;
mod chain;
mod connect;
mod credits;
#[cfg(test)]
mod forged;
mod lane;
#[cfg(feature = "null-device")]
pub mod null;
mod registry;
mod watch;
mod window;

use crate::cm::{CmId, EventChannel};
use crate::halt::HaltReason;
use crate::options::Options;
use crate::queue::QueuePair;
use crate::receives::ReceiveQueue;
use migration::cpu::CpuTime;
use migration::transport::{Interrupt, Lane, PlaneError, Session, SourcePlane, SourceTransport};
use registry::Registry;
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};

/// Connects over RDMA to where a destination's offer says.
pub struct RdmaSource {
    options: Options,
}

impl RdmaSource {
    /// A source with these options.
    pub fn new(options: Options) -> Self {
        RdmaSource { options }
    }
}

impl SourceTransport for RdmaSource {
    fn name(&self) -> &'static str {
        crate::NAME
    }

    fn connect(&mut self, session: &Session, offer: &[u8]) -> Result<Box<dyn SourcePlane>, PlaneError> {
        Ok(Box::new(connect::connect(session, offer, &self.options)?))
    }
}

/// The lanes of a plane, with their queue pairs.
#[derive(Default)]
struct Lanes {
    lanes: Vec<Box<dyn Lane>>,
    /// Each is the lane's. The plane reaches it here though somebody may have taken the lane.
    queues: Vec<Weak<QueuePair>>,
}

/// A connected plane.
struct RdmaPlane {
    lanes: Lanes,
    registry: Arc<Registry>,
    /// All connections of the session.
    ids: Vec<Arc<CmId>>,
    /// Watches connections and takes the destination's answers.
    watch: Option<JoinHandle<()>>,
    /// Registers memory.
    register: Option<JoinHandle<()>>,
}

impl RdmaPlane {
    /// Starts the threads of a plane whose queue pairs are connected. `answers` is the receive queue of the
    /// registrations' connection.
    ///
    /// # Errors
    /// [`PlaneError::Io`] when a thread cannot be had.
    fn start(
        lanes: Lanes,
        registry: Arc<Registry>,
        (channel, ids): (Arc<EventChannel>, Vec<Arc<CmId>>),
        answers: ReceiveQueue,
    ) -> Result<RdmaPlane, PlaneError> {
        let spawn = |name: &str, work: Box<dyn FnOnce() + Send>| {
            let thread = thread::Builder::new().name(name.into()).spawn(work);
            thread.map_err(|source| PlaneError::Io { what: "starting a thread for RDMA", source })
        };
        // From here on `drop` disconnects, and ends the threads that there are.
        let mut plane =
            RdmaPlane { lanes, registry: Arc::clone(&registry), ids, watch: None, register: None };
        let registering = Arc::clone(&registry);
        plane.register = Some(spawn("rdma-register", Box::new(move || registering.register_queued()))?);
        let watching = move || watch::watch(&registry, &channel, &answers);
        plane.watch = Some(spawn("rdma-watch", Box::new(watching))?);
        Ok(plane)
    }
}

impl SourcePlane for RdmaPlane {
    fn name(&self) -> &'static str {
        crate::NAME
    }

    fn lanes(&mut self) -> &mut Vec<Box<dyn Lane>> {
        &mut self.lanes.lanes
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::clone(&self.registry) as _
    }

    fn cpu(&self) -> CpuTime {
        self.registry.cpu()
    }
}

impl Drop for RdmaPlane {
    /// Stops writing, tells the destination, and leaves the rest to a thread.
    ///
    /// Our queue pairs are taken out of service, so that nothing leaves any more. What has left may still
    /// land: only the destination's fence ends that, and whoever goes on over another transport has to ask
    /// for it first, as the engine does (`Retire`).
    fn drop(&mut self) {
        self.registry.stop(HaltReason::Interrupted);
        if let Some(watch) = self.watch.take() {
            // Its panic has been reported by its own message.
            let _ = watch.join();
        }
        // The lanes' queue pairs are destroyed with them. That of the registrations carries no writes.
        self.lanes.lanes.clear();
        let _ = self.registry.queue().reset();
        self.ids.iter().for_each(|id| id.disconnect());
        // Those of lanes that somebody has taken live on. The disconnection has stopped their sending, and
        // this does on every kind of device. The other way round librdmacm would not disconnect.
        self.lanes.queues.iter().filter_map(Weak::upgrade).for_each(|queue| drop(queue.reset()));
        let register = self.register.take();
        let registry = Arc::clone(&self.registry);
        let ids = std::mem::take(&mut self.ids);
        // Giving memory back takes as long as pinning it did: not while somebody waits for the guest. If
        // there is no thread to be had, the closure is dropped here, and does it all the same.
        let _ = thread::Builder::new().name("rdma-unpin".into()).spawn(move || {
            let _ = register.map(JoinHandle::join);
            drop((registry, ids));
        });
    }
}
