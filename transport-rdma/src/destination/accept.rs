//! Taking a session's connections, and noticing when they end.

use super::endpoint::Endpoint;
use super::{Connection, Plane};
use crate::cm::{CmId, Event, EventChannel};
use crate::halt::{lock, wait_readable};
use crate::hello::{self, Purpose};
use crate::message::{LANE_CREDITS, REGISTRATION_CREDITS};
use crate::queue::QueuePair;
use crate::unavailable;
use migration::cpu::thread_cpu;
use migration::preamble::Status;
use migration::transport::{MAX_LANES, PlaneError};
use rdma_sys::rdma_cm_event_type::*;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;

impl Plane {
    /// Takes connections until the plane is shut.
    pub(super) fn accept(self: &Arc<Self>, channel: &Arc<EventChannel>, listener: CmId) {
        if let Err(source) = self.serve_events(channel) {
            self.fail(&PlaneError::Io { what: "waiting for RDMA connections", source });
        }
        // Whoever comes now finds nobody listening.
        drop(listener);
    }

    fn serve_events(self: &Arc<Self>, channel: &Arc<EventChannel>) -> io::Result<()> {
        loop {
            while let Some(event) = channel.next()? {
                self.handle_event(event);
                self.accepting.note();
            }
            if lock(&self.connections).closed {
                return Ok(());
            }
            // A plane that a lane's failure has halted still has to end its connections.
            if self.halt.reason().is_some() {
                self.retire();
                return Ok(());
            }
            wait_readable([channel.fd(), self.halt.fd()], None)?;
        }
    }

    fn handle_event(self: &Arc<Self>, event: Event) {
        match event.kind {
            RDMA_CM_EVENT_CONNECT_REQUEST => {
                let Some(id) = event.incoming.map(Arc::new) else { return };
                let joined = hello::accept(&event.private_data, self.session.token, &self.session.secret)
                    .and_then(|purpose| self.join(&id, purpose));
                if let Err(status) = joined {
                    id.reject(&hello::refusal(status));
                }
            }
            RDMA_CM_EVENT_DEVICE_REMOVAL => {
                lock(&self.error).get_or_insert("the RDMA device was removed".into());
                self.retire();
            }
            RDMA_CM_EVENT_DISCONNECTED if self.knows(&event) => self.retire(),
            _ => {}
        }
    }

    /// Whether an event is about one of the connections that were taken.
    fn knows(&self, event: &Event) -> bool {
        lock(&self.connections).all.iter().any(|connection| connection.id.key() == event.key)
    }

    /// The source has gone, or the device has: nothing more is expected, and nothing more shall land.
    fn retire(&self) {
        match self.shut() {
            Ok(()) => self.hang_up(),
            Err(error) => {
                lock(&self.error).get_or_insert(error.to_string());
            }
        }
    }

    /// Takes a connection that has proved to belong to this session.
    fn join(self: &Arc<Self>, id: &Arc<CmId>, purpose: Purpose) -> Result<(), Status> {
        let mut connections = lock(&self.connections);
        let known = connections.all.iter().any(|c| c.purpose == purpose);
        if connections.closed || known || connections.all.len() > MAX_LANES {
            return Err(Status::Session);
        }
        let connection = self.serve(id, purpose).map_err(|error| {
            lock(&self.error).get_or_insert(error.to_string());
            Status::Busy
        })?;
        connections.all.push(connection);
        Ok(())
    }

    fn serve(self: &Arc<Self>, id: &Arc<CmId>, purpose: Purpose) -> Result<Connection, PlaneError> {
        let (credits, name) = match purpose {
            Purpose::Lane(lane) => (LANE_CREDITS, format!("receive-{lane}")),
            Purpose::Registrations => (REGISTRATION_CREDITS, "rdma-register".into()),
        };
        let depth = credits as u32;
        let waiting = if purpose == Purpose::Registrations { Default::default() } else { self.waiting };
        let queue = Arc::new(QueuePair::new(Arc::clone(id), &self.domain, depth, depth, waiting)?);
        let mut endpoint = Endpoint::new(Arc::clone(&queue), &self.domain, credits)?;
        id.accept(&[]).map_err(|e| unavailable::resource("accepting an RDMA connection", e))?;
        let plane = Arc::clone(self);
        let thread = thread::Builder::new().name(name).spawn(move || {
            let result = match purpose {
                Purpose::Lane(_) => plane.serve_lane(&mut endpoint),
                Purpose::Registrations => plane.serve_registrations(&mut endpoint),
            };
            if purpose != Purpose::Registrations {
                plane.lanes_cpu_us.fetch_add(thread_cpu().all.as_micros() as u64, Ordering::Relaxed);
            }
            if let Err(error) = result {
                plane.fail(&error);
            }
        });
        let thread = thread.map_err(|e| unavailable::resource("starting a thread", e))?;
        Ok(Connection { purpose, id: Arc::clone(id), queue: Some(queue), thread: Some(thread) })
    }
}
