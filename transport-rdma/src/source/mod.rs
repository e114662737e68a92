//! The source's side: connections to what a destination offered, and the plane they make.

mod connect;
#[cfg(test)]
mod forged;
mod lane;
#[cfg(feature = "null-device")]
pub mod null;
mod registry;
mod watch;

pub(crate) use lane::CREDITS as LANE_CREDITS;
pub(crate) use registry::CREDITS as REGISTRATION_CREDITS;

use crate::cm::CmId;
use crate::halt::Why;
use crate::options::Options;
use migration::report::CpuTime;
use migration::transport::{Interrupt, Lane, PlaneError, Session, SourcePlane, SourceTransport};
use registry::Registry;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

/// RDMA to where the destination's offer says.
pub struct RdmaSource {
    options: Options,
}

impl RdmaSource {
    /// A source with these choices.
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

/// A connected plane.
struct RdmaPlane {
    lanes: Vec<Box<dyn Lane>>,
    registry: Arc<Registry>,
    /// All connections of the session.
    ids: Vec<Arc<CmId>>,
    /// Watches connections and takes the destination's answers.
    watch: Option<JoinHandle<()>>,
    /// Registers memory.
    register: Option<JoinHandle<()>>,
}

impl SourcePlane for RdmaPlane {
    fn name(&self) -> &'static str {
        crate::NAME
    }

    fn lanes(&mut self) -> &mut Vec<Box<dyn Lane>> {
        &mut self.lanes
    }

    fn interrupter(&self) -> Arc<dyn Interrupt> {
        Arc::new(Interrupter { registry: Arc::clone(&self.registry) })
    }

    fn cpu(&self) -> CpuTime {
        self.registry.cpu()
    }
}

struct Interrupter {
    registry: Arc<Registry>,
}

impl Interrupt for Interrupter {
    fn interrupt(&self) {
        self.registry.halt(Why::Interrupted);
    }
}

impl Drop for RdmaPlane {
    /// Stops writing, tells the destination, and leaves the rest to a thread.
    ///
    /// Our queue pairs are taken out of service, so that nothing leaves any more. What has left may still land:
    /// only the destination's fence ends that, and whoever goes on over another transport has to ask for it first,
    /// as the engine does (`Retire`).
    fn drop(&mut self) {
        self.registry.halt(Why::Interrupted);
        if let Some(watch) = self.watch.take() {
            // Its panic has been reported by its own message.
            let _ = watch.join();
        }
        // The lanes' queue pairs are destroyed with them. That of the registrations carries no writes.
        self.lanes.clear();
        let _ = self.registry.queue().reset();
        self.ids.iter().for_each(|id| id.disconnect());
        let register = self.register.take();
        let registry = Arc::clone(&self.registry);
        let ids = std::mem::take(&mut self.ids);
        // Giving memory back takes as long as pinning it did: not while somebody waits for the guest. If there
        // is no thread to be had, the closure is dropped here, and does it all the same.
        let _ = thread::Builder::new().name("rdma-unpin".into()).spawn(move || {
            let _ = register.map(JoinHandle::join);
            drop((registry, ids));
        });
    }
}
