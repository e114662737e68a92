//! The source's side: connections to what a destination offered, and the plane they make.

mod connect;
#[cfg(test)]
mod forged;
mod lane;
mod registry;
mod watch;

pub(crate) use lane::CREDITS as LANE_CREDITS;
pub(crate) use registry::CREDITS as REGISTRATION_CREDITS;

use crate::cm::{CmId, EventChannel};
use crate::halt::Why;
use crate::options::Options;
use migration::report::CpuTime;
use migration::transport::{Interrupt, Lane, PlaneError, Session, SourcePlane, SourceTransport};
use rdma_sys::rdma_cm_event_type::RDMA_CM_EVENT_DISCONNECTED;
use registry::Registry;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a source that leaves waits for the destination to have shut its queue pairs.
const FAREWELL: Duration = Duration::from_secs(1);

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
    channel: Arc<EventChannel>,
    /// Watches connections and takes the destination's answers.
    watch: Option<JoinHandle<()>>,
    /// Registers memory.
    register: Option<JoinHandle<()>>,
}

impl SourcePlane for RdmaPlane {
    fn name(&self) -> &'static str {
        crate::NAME
    }

    fn lanes(&mut self) -> &mut [Box<dyn Lane>] {
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
    /// Stops writing, sees to it that nothing of this plane lands later, and leaves the rest to a thread.
    ///
    /// The last part matters when TCP takes over: what goes over TCP from now on must not be overwritten by an
    /// older write that is still under way. Our queue pairs are taken out of service, so that nothing more
    /// leaves; and each connection is closed and the destination's answer awaited, which it gives after it has
    /// taken its own queue pairs out of service. Where no answer comes, the network between the two devices is
    /// down as well.
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
        self.await_farewell();
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

impl RdmaPlane {
    fn await_farewell(&self) {
        let mut open: Vec<_> = self.ids.iter().map(|id| id.key()).collect();
        let deadline = Instant::now() + FAREWELL;
        while !open.is_empty() {
            match self.channel.next() {
                Ok(Some(event)) => {
                    let over = event.kind == RDMA_CM_EVENT_DISCONNECTED || watch::ends(event.kind);
                    open.retain(|key| !(over && *key == event.key));
                }
                Ok(None) => match crate::halt::wait_readable([self.channel.fd()], Some(deadline)) {
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => return,
                },
                Err(_) => return,
            }
        }
    }
}
